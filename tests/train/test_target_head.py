"""The head on target positions: equal losses and gradients, for models alone, with adapters and in a Trainer."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, Trainer, TrainingArguments

from peft_blueprint import BlueprintError
from peft_blueprint.testing import (
    VOCABULARY,
    random_model,
    randomize_adapters,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    toy_batches,
)
from peft_blueprint.train import head_on_targets


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def with_adapters(**changes):
    """A tiny Llama with LoRA."""
    return randomize_adapters(get_peft_model(tiny_llama(), LoraConfig(r=4, task_type="CAUSAL_LM", **changes)))


MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "routers' loss": lambda: tiny_mixtral(output_router_logits=True),
    "capped logits": lambda: random_model(Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8)),
    "scaled logits": lambda: random_model(CohereForCausalLM, CohereConfig(**SIZES)),
    "LoRA": lambda: with_adapters(target_modules=["q_proj"]),
    "LoRA on the head": lambda: with_adapters(target_modules=["q_proj", "lm_head"]),
    "a trained head": lambda: with_adapters(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def loss_and_gradients(model, batch, **keywords):
    """A step's loss, and the gradient of everything that is trained."""
    model.zero_grad()
    loss = model(**batch, **keywords).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_equal(name):
    """Also with a given number of items, and with targets that are shifted already."""
    model = MODELS[name]().train()
    own = head_on_targets(copy.deepcopy(model))
    batch = toy_batches()[0]
    shift = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for more in ({}, {"num_items_in_batch": torch.tensor(50)}, {"shift_labels": shift}):
        if name == "gpt2" and "shift_labels" in more:
            continue
        loss, gradients = loss_and_gradients(model, batch, **more)
        own_loss, own_gradients = loss_and_gradients(own, batch, **more)
        assert own_loss == pytest.approx(loss, abs=2e-6)
        assert gradients.keys() == own_gradients.keys() and gradients
        for key, gradient in gradients.items():
            assert (own_gradients[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, key


def test_only_targets_reach_the_head_in_training():
    """26 of 48 positions; in evaluation and generation all, and nothing of it stays in the model."""
    model = head_on_targets(head_on_targets(tiny_llama())).train()
    batch = toy_batches()[0]
    targets = int((batch["labels"][:, 1:] != -100).sum())
    assert model(**batch).logits.shape == (1, targets, VOCABULARY) and targets == 26
    assert not model.lm_head._forward_pre_hooks and "_loss_function" not in vars(model)
    assert model(batch["input_ids"]).logits.shape == (4, 12, VOCABULARY)
    model.eval()
    assert torch.equal(model(**batch).logits, tiny_llama()(**batch).logits)
    assert model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False).shape[1] <= 15
    assert type(copy.deepcopy(model)) is type(model) and type(model).__name__ == "LlamaForCausalLM"
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == tiny_llama().state_dict().keys()


def test_a_trainer_keeps_its_columns_and_trains_the_same(tmp_path):
    """It reads the names of the forward's arguments, and passes the number of items."""
    data = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(8, batch_size=1)]
    data = [row | {"text": "unused"} for row in data]
    weights = []
    for make in (lambda model: model, head_on_targets):
        model = make(tiny_llama())
        settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "report_to": [], "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, gradient_accumulation_steps=2, **settings)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name], weight, atol=1e-5), name


def test_models_without_such_a_head_are_refused():
    """With the reason: no decoder, an encoder, a loss of its own, positions left out."""
    with pytest.raises(BlueprintError, match="must be a transformers causal language model, got BertForSequence"):
        head_on_targets(tiny_bert())
    with pytest.raises(BlueprintError, match="T5ForConditionalGeneration, which has an encoder"):
        head_on_targets(tiny_t5())
    batch = toy_batches()[0]
    model = head_on_targets(tiny_llama()).train()
    with pytest.raises(BlueprintError, match="Leave out logits_to_keep"):
        model(**batch, logits_to_keep=2)
    model.loss_function = lambda logits, labels, vocab_size, **keywords: logits.sum()
    with pytest.raises(BlueprintError, match="takes no shift_labels"):
        model(**batch)
    model = head_on_targets(with_adapters(target_modules=["lm_head"], alora_invocation_tokens=[7])).train()
    with pytest.raises(BlueprintError, match="has activated LoRA, which counts positions"):
        model(**batch)
