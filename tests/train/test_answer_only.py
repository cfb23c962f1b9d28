"""Answer-only training: losses and gradients of PEFT's activated LoRA, at the cost of the answers."""

import copy
import importlib.util
import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_blueprint import BlueprintConfig, BlueprintError, generate_blueprint
from peft_blueprint.measure import linear_modules
from peft_blueprint.testing import (
    VOCABULARY,
    quantize,
    random_model,
    randomize_adapters,
    save_tiny_model,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    toy_batches,
)
from peft_blueprint.train import PromptCache, answer_only
from tests import ROOT


INVOCATION = [7, 8]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
WINDOWS = SIZES | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mixtral": tiny_mixtral,
    "qwen2": lambda: random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": lambda: random_model(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "gemma2": lambda: random_model(Gemma2ForCausalLM, Gemma2Config(**WINDOWS, head_dim=8)),
    "gemma3": lambda: random_model(Gemma3ForCausalLM, Gemma3TextConfig(**WINDOWS, head_dim=8)),
    "positions by mask": lambda: random_model(
        OPTForCausalLM, OPTConfig(**OPT, vocab_size=VOCABULARY, pad_token_id=0, dropout=0.0)
    ),
    "alibi": lambda: random_model(
        BloomForCausalLM, BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=VOCABULARY, pad_token_id=0)
    ),
    "nf4": lambda: quantize(tiny_llama(), "nf4"),
}


def adapted(base=None, seed=0, **changes):
    """A model in training mode, with activated LoRA of random weights on every linear layer that PEFT can adapt."""
    torch.manual_seed(seed)
    base = tiny_llama() if base is None else base
    names = {name for name, _ in linear_modules(base)} if not hasattr(base.config, "ffn_dim") else {"q_proj", "v_proj"}
    names = {name for name in names if not name.endswith(("lm_head", "fc1", "fc2"))}
    settings = {
        "r": 4,
        "target_modules": sorted(names),
        "task_type": "CAUSAL_LM",
        "alora_invocation_tokens": INVOCATION,
        "fan_in_fan_out": base.config.model_type == "gpt2",
    }
    return randomize_adapters(get_peft_model(base, LoraConfig(**settings | changes))).train()


def make_batch(rows, padding="right", device=None):
    """Pad (ids, labels) rows."""
    length = max(len(ids) for ids, _ in rows)

    def padded(values, fill):
        rest = [fill] * (length - len(values))
        return [*values, *rest] if padding == "right" else [*rest, *values]

    return {
        "input_ids": torch.tensor([padded(ids, 0) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def example(prompt, answer, seed=0, turns=1):
    """Return ids, labels and ends of turns with these numbers of prompt and answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, ends = [], [], []
    for _ in range(turns):
        asked, said = (torch.randint(10, 97, (n,), generator=generator).tolist() for n in (prompt, answer))
        ids += [*asked, *INVOCATION, *said]
        labels += [-100] * (prompt + len(INVOCATION)) + said
        ends.append(len(ids))
    return ids, labels, ends


ROWS = [example(*sizes, seed=i)[:2] for i, sizes in enumerate([(12, 5), (3, 9), (20, 2), (1, 1)])]
CHATS = [example(*sizes, seed=i, turns=2) for i, sizes in enumerate([(3, 4), (5, 6), (4, 5)])]


def loss_and_gradients(model, batch, **keywords):
    """A step's loss, and the gradient of everything that is trained."""
    model.zero_grad()
    loss = model(**batch, **keywords).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(model, other, batch, other_batch=None, **keywords):
    """The same loss, and the same gradients to 1e-5 of the largest of each."""
    loss, gradients = loss_and_gradients(model, batch, **keywords)
    own_loss, own = loss_and_gradients(other, batch if other_batch is None else other_batch, **keywords)
    assert own_loss.item() == pytest.approx(loss.item(), abs=5e-6)
    assert gradients.keys() == own.keys() and len(gradients) > 3
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert (own[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


PADDED_LEFT = ("llama", "gpt2", "gemma2", "positions by mask", "alibi")  # each finds positions in another way


@pytest.mark.parametrize(("name", "padding"), [*((n, "right") for n in MODELS), *((n, "left") for n in PADDED_LEFT)])
def test_gradients_are_those_of_activated_lora(name, padding):
    """For ragged rows with prompts of 1 to 20 tokens, in chunks; sliding windows are shorter than prompts."""
    model = adapted(MODELS[name]())
    split = answer_only(copy.deepcopy(model), chunk_tokens=16)
    assert_equal(model, split, make_batch(ROWS, padding))


@pytest.mark.parametrize(("name", "reentrant"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_with_gradient_checkpointing(name, reentrant):
    """Layers are repeated in the backward pass with the same prompt; twice, so that nothing stays from the first step."""
    model = adapted(MODELS[name]())
    split = answer_only(copy.deepcopy(model))
    split.gradient_checkpointing_enable({"use_reentrant": reentrant})
    split.enable_input_require_grads()
    for _ in range(2):
        assert_equal(model, split, make_batch(ROWS))
    layers = [module for module in split.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers and all(layer.gradient_checkpointing for layer in layers)


def test_in_bfloat16_it_rounds_no_more_than_peft():
    """The distance to float32 gradients is PEFT's within a tenth."""
    exact = adapted(tiny_llama().bfloat16()).float()
    batch = make_batch(ROWS)
    expected = loss_and_gradients(exact, batch)[1]

    def distance(model):
        gradients = loss_and_gradients(model, batch)[1]
        return sum((gradients[name].float() - value).square().sum() for name, value in expected.items()).sqrt()

    peft, split = distance(adapted(tiny_llama().bfloat16())), distance(answer_only(adapted(tiny_llama().bfloat16())))
    assert 0 < split < 1.1 * peft


def test_adapters_run_on_answers_alone_and_the_base_keeps_no_graph_of_prompts():
    """Of 12 + 2 + 5 positions an adapter sees 6: invocation tokens, and the answer without its last token."""
    model = answer_only(adapted())
    batch = make_batch([ROWS[0]])
    model(**batch)  # the first is checked
    seen, graphs = [], []
    adapter = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_A.default"))
    layer = model.base_model.model.model.layers[0].mlp
    adapter.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    layer.register_forward_hook(lambda module, inputs, output: graphs.append((output.shape[1], output.requires_grad)))
    logits = model(**batch).logits
    assert seen == [(1, 6, 4)] and graphs == [(12, False), (6, True)]
    assert logits.shape == (1, 5, VOCABULARY)


def test_rows_may_begin_with_the_invocation_tokens():
    """Some of a batch, or all."""
    model = adapted()
    split = answer_only(copy.deepcopy(model), cache=PromptCache("1MiB"))
    empty = [example(0, 4, seed=i)[:2] for i in range(2)]
    for rows in (empty, [*empty, ROWS[0]]):
        assert_equal(model, split, make_batch(rows))


def test_the_last_turn_of_a_chat_is_trained_as_by_peft():
    """Earlier answers count in the mean loss, without gradients, and a warning says so once; also with a number of items."""
    batch = make_batch([chat[:2] for chat in CHATS])
    model = adapted()
    split = answer_only(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="15 of 30 targets of the first batch come before the last invocation tokens"):
        assert_equal(model, split, batch)
    assert_equal(model, split, batch, num_items_in_batch=torch.tensor(77))


def test_every_turn_of_a_chat_is_trained_as_an_example_of_its_own():
    """The gradients are PEFT's on one example a turn, in which earlier turns are prompt."""
    cut = [(ids[: ends[0]], labels[: ends[0]]) for ids, labels, ends in CHATS]
    cut += [(ids, [-100] * ends[0] + labels[ends[0] :]) for ids, labels, ends in CHATS]
    model = adapted()
    split = answer_only(copy.deepcopy(model), turns="every")
    assert_equal(model, split, make_batch(cut), make_batch([chat[:2] for chat in CHATS]))


def prompt_positions(model, batch):
    """Number of positions that pass the first layer without gradient in a step."""
    seen = []
    layer = model.base_model.model.model.layers[0].mlp
    hook = layer.register_forward_hook(
        lambda module, inputs, output: None if torch.is_grad_enabled() else seen.append(output[..., 0].numel())
    )
    model(**batch)
    hook.remove()
    return sum(seen)


def test_shared_prompts_and_beginnings_are_computed_once():
    """Four prompts of 30, 30, 33 and 35 tokens that share 30: 30 tokens once, and rests of 3 and 5."""
    start = example(30, 0)[0][:30]
    rows = [(start + [11] * k + INVOCATION + [20, 21], [-100] * (32 + k) + [20, 21]) for k in (0, 0, 3, 5)]
    batch = make_batch(rows)
    model = adapted()
    split = answer_only(copy.deepcopy(model), chunk_tokens=9)
    assert_equal(model, split, batch)
    assert prompt_positions(split, batch) == 35  # a prompt that another begins with is a part of it
    rows[2] = (start + [12, 13, 14] + INVOCATION + [20, 21], [-100] * 35 + [20, 21])
    assert prompt_positions(split, make_batch(rows)) == 30 + 2 * 4 + 1


@pytest.mark.parametrize("in_files", [False, True])
def test_cached_prompts_cost_nothing_and_change_nothing(in_files, tmp_path):
    """From the second time on; with other rows and padding too. Files serve a second run of the same model only."""
    cache = PromptCache("1MiB", tmp_path if in_files else None)
    model = adapted()
    split = answer_only(copy.deepcopy(model), cache=cache)
    inert = [(ids, [-100, ids[1], *labels[2:]]) for ids, labels in ROWS[:3]]
    batches = [make_batch(ROWS), make_batch(inert)]
    positions = [prompt_positions(split, batch) for batch in batches]
    assert all(count > 30 for count in positions)
    for batch in [*batches, make_batch([ROWS[2], ROWS[0]])]:
        assert_equal(model, split, batch)
        assert prompt_positions(split, batch) == 0
    assert len(cache) == 7 and cache.found >= 7 and 0 < cache.used < 2**20
    if in_files:
        again = answer_only(adapted(seed=0), cache=PromptCache("1MiB", tmp_path))
        again(**batches[0])
        assert prompt_positions(again, batches[0]) == 0
        other = answer_only(adapted(tiny_llama(seed=1)), cache=PromptCache("1MiB", tmp_path))
        assert prompt_positions(other, batches[0]) > 30


def test_the_cache_keeps_the_prompts_that_save_most():
    """Long prompts save more FLOPs a byte than short ones; a prompt that was asked for more often stays."""
    rows = [example(n, 3, seed=n)[:2] for n in (10, 11, 30)]
    one = PromptCache(2**30)
    model = answer_only(adapted(), cache=one)
    model(**make_batch(rows[:1]))
    a_token = one.used / 10
    cache = PromptCache(int(35 * a_token))
    model = answer_only(adapted(), cache=cache)
    for row in (rows[0], rows[1], rows[0], rows[0]):
        model(**make_batch([row]))
    assert len(cache) == 2
    model(**make_batch([rows[2]]))
    assert (
        len(cache) == 2 and cache.used == 21 * a_token
    )  # too long to be worth both, one of which was asked for thrice
    assert cache.found == 2 and str(cache).endswith("2 of 5 found")
    for bad in ("12 parameters", 0, True, 1.5):
        with pytest.raises(BlueprintError, match="budget"):
            PromptCache(bad)


def test_evaluation_and_generation_stay_as_they_are(tmp_path):
    """The saved adapter is PEFT's: loaded without this package's function, it generates the same."""
    model = answer_only(adapted())
    batch = make_batch(ROWS)
    model(**batch).loss.backward()
    model.eval()
    ids = batch["input_ids"][:1, :14]
    with torch.no_grad():
        logits, written = model(**batch).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)
        assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False), written)
    assert logits.shape == (*batch["input_ids"].shape, VOCABULARY)


def test_a_placement_trains_answer_only():
    """`BlueprintConfig` passes the invocation tokens on, and its adapters at varied ranks train the same."""
    base = tiny_llama()
    blueprint = generate_blueprint(base, toy_batches(8), progress=False)
    config = BlueprintConfig(blueprint=blueprint, task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION)
    model = randomize_adapters(get_peft_model(base, config)).train()
    assert_equal(model, answer_only(copy.deepcopy(model)), make_batch(ROWS))


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_trainers_train_the_same_weights(kind, tmp_path):
    """Two steps with gradient accumulation, as PEFT's to 1e-5, and an evaluation; TRL computes its own head."""
    if kind == "SFTTrainer" and importlib.util.find_spec("trl") is None:
        pytest.skip("needs TRL")
    rows = [
        example(*sizes, seed=i)[:2] for i, sizes in enumerate([(12, 5), (3, 9), (20, 2), (1, 1), (4, 4), (5, 5)] * 2)
    ]
    data = [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in rows]
    weights, losses = [], []
    for split in (False, True):
        model = adapted()
        if split:
            answer_only(model, cache=PromptCache("1MiB"))
        settings = {
            "output_dir": str(tmp_path / str(split)),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "optim": "sgd",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        trainer = _trainer(kind, model, settings, data, tmp_path)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name], weight, atol=1e-5, rtol=1e-4), name
    assert any((weight - adapted().state_dict()[name]).abs().max() > 1e-3 for name, weight in weights[0].items())


def _trainer(kind, model, settings, data, folder):
    if kind == "Trainer":

        def collate(rows):
            return make_batch([(row["input_ids"], row["labels"]) for row in rows])

        arguments = TrainingArguments(**settings)
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], data_collator=collate)
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder / "tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL turns checkpointing on by its older name
        arguments = SFTConfig(**settings, max_length=64, bf16=False)
    rows = Dataset.from_list(data)
    return SFTTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=tokenizer
    )


def edited(**changes):
    """A sound batch with changes."""
    return make_batch(ROWS) | changes


PLAIN = make_batch(ROWS)
PACKED = torch.arange(PLAIN["input_ids"].shape[1]).repeat(4, 1) % 10
BATCHES = {
    "Example 1 of the batch .* has no invocation tokens": edited(
        input_ids=PLAIN["input_ids"].where(torch.tensor([1, 0, 1, 1])[:, None] > 0, torch.tensor(5))
    ),
    "position_ids must rise by one": edited(position_ids=PACKED),
    "padding between its tokens": edited(attention_mask=(PLAIN["input_ids"] != 7).long()),
    "cannot split the inputs 'token_type_ids'": edited(token_type_ids=torch.zeros_like(PLAIN["input_ids"])),
    "cannot split the inputs 'cu_seq_lens_q'": edited(cu_seq_lens_q=torch.tensor([0, 9])),
    "needs input_ids of shape": {"inputs_embeds": torch.zeros(1, 4, 32), "labels": PLAIN["labels"]},
    "takes no prepared mask": edited(attention_mask=torch.ones(4, 1, 24, 24)),
}


@pytest.mark.parametrize("message", BATCHES)
def test_a_batch_that_cannot_be_split_is_refused(message):
    """With the example or input named."""
    with pytest.raises(BlueprintError, match=message):
        answer_only(adapted())(**BATCHES[message])


def test_an_answer_beyond_the_context_is_refused():
    """Rotary positions would be extrapolated in silence."""
    model = answer_only(adapted(tiny_llama(max_position_embeddings=20)))
    with pytest.raises(
        BlueprintError, match="Example 2 of the batch has 24 positions, more than the model's context of 20"
    ):
        model(**make_batch(ROWS))


def bidirectional():
    """A model that attends to later tokens in spite of its configuration."""
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.is_causal = False
        layer.self_attn.forward = _unmasked(layer.self_attn.forward)
    return base


def _unmasked(forward):
    def run(*args, **keywords):
        hidden = keywords.get("hidden_states", args[0] if args else None)
        total = hidden.shape[1] if keywords.get("past_key_values") is None else 0
        mask = torch.zeros(1, 1, hidden.shape[1], total) if total else keywords["attention_mask"]
        return forward(*args, **keywords | {"attention_mask": mask})

    return run


MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
REFUSED = {
    "must be a PeftModelForCausalLM, got LlamaForCausalLM": tiny_llama,
    "is not an activated LoRA": lambda: adapted(alora_invocation_tokens=None),
    "are trained on prompts too": lambda: adapted(modules_to_save=["model.layers.3.mlp"], target_modules=["q_proj"]),
    "are trained on prompts too, so": lambda: adapted(tiny_llama(attention_bias=True), bias="all"),
    "layers of kind": lambda: adapted(
        random_model(MambaForCausalLM, MambaConfig(**MAMBA)), target_modules=["in_proj", "x_proj"]
    ),
    "loss on its routers": lambda: adapted(tiny_mixtral(output_router_logits=True)),
    "which has an encoder": lambda: adapted(tiny_t5(), target_modules=["q", "v"]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_model_that_cannot_be_split_is_refused(message):
    """Before anything is trained."""
    with pytest.raises(BlueprintError, match=message):
        answer_only(REFUSED[message]())


def test_a_model_whose_loss_changes_is_refused_at_its_first_batch():
    """Here because it attends to later tokens."""
    model = answer_only(adapted(bidirectional()))
    with pytest.raises(
        BlueprintError, match="The loss of LlamaForCausalLM changes from .* when its prompt is split off"
    ):
        model(**make_batch(ROWS))


def test_rounding_of_few_targets_is_no_change(monkeypatch):
    """In bfloat16 the loss of one target moves by a tenth (seen on SmolLM2-135M), the mean over many does not."""
    module = importlib.import_module("peft_blueprint.train.answer_only")
    forward = module._forward

    def rounded(*arguments):
        output = forward(*arguments)
        return SimpleNamespace(loss=output.loss + 0.15)

    monkeypatch.setattr(module, "_forward", rounded)
    for targets, is_refused in ((1, False), (20, True)):
        ids = [*range(20, 40), *INVOCATION, *range(50, 50 + targets)]
        batch = make_batch([(ids, [-100] * (len(ids) - targets) + ids[-targets:])])
        model = answer_only(adapted(tiny_llama().bfloat16()))
        refused = pytest.raises(BlueprintError, match="The loss of LlamaForCausalLM changes")
        with refused if is_refused else nullcontext():
            model(**batch)


def test_targets_before_the_answer_and_a_trained_head_are_refused_together():
    """Such a head would learn from prompts. Without such targets it is trained as by PEFT."""
    model = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    split = answer_only(copy.deepcopy(model))
    assert_equal(model, split, make_batch(ROWS))
    with pytest.raises(BlueprintError, match="come before its invocation tokens"):
        split(**make_batch([chat[:2] for chat in CHATS]))


def test_a_cache_and_dropout_of_the_base_are_refused_together():
    """Prompts' states would be drawn anew at each step."""
    model = adapted(tiny_gpt2())
    with pytest.raises(BlueprintError, match=r"drops out activations .*at 0\.1"):
        answer_only(model, cache=PromptCache("1MiB"))
    for turns, chunk_tokens in (("first", 8), ("last", 0)):
        with pytest.raises(BlueprintError, match="must be"):
            answer_only(adapted(), turns=turns, chunk_tokens=chunk_tokens)


def test_the_guides_code_runs(tmp_path, monkeypatch, capsys):
    """docs/how-to/long_prompts.md, in one namespace."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "how-to" / "long_prompts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "long_prompts.md", "exec"), names)
    out = capsys.readouterr().out
    assert len(blocks) == 4 and "2 prompts" in out and "4 of 6 found" in out and "q_proj: " in out
    assert names["loss"].requires_grad
