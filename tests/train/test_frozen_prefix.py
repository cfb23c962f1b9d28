"""The cache of the frozen prefix: equal losses and gradients, refusals, and Trainers."""

import itertools
import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_blueprint import BlueprintError
from peft_blueprint.testing import (
    VOCABULARY,
    quantize,
    random_model,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    toy_batches,
)
from peft_blueprint.train import CacheFrozenPrefix, cache_frozen_prefix
from peft_blueprint.train.frozen_prefix import _check_layer_inputs
from peft_blueprint.train.state_store import StateStore
from tests import ROOT
from tests.fused import needs_fused


LAYERS, LOWEST = 4, 2
EXAMPLES = 8
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
GROUPED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def gemma3():
    """Layers of two kinds, one of which attends to the last four tokens; embeddings are scaled."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return random_model(Gemma3ForCausalLM, Gemma3TextConfig(sliding_window=4, layer_types=kinds, **GROUPED))


def opt():
    """Positions are learned, and counted from a row's first token."""
    config = OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **SHAPE)
    return random_model(OPTForCausalLM, config)


FAMILIES = {
    "llama": lambda: tiny_llama(LAYERS),
    "gpt2": lambda: tiny_gpt2(LAYERS, **NO_DROPOUT),
    "qwen3": lambda: random_model(Qwen3ForCausalLM, Qwen3Config(**GROUPED)),
    "gemma3": gemma3,
    "opt": opt,
    "mixtral": lambda: tiny_mixtral(LAYERS),
    "nf4": lambda: quantize(tiny_llama(LAYERS, hidden_size=64, intermediate_size=64), "nf4"),
    "bfloat16": lambda: tiny_llama(LAYERS).bfloat16(),
}


def adapted(model, lowest=LOWEST, **settings):
    """The model in training mode, with LoRA on the layers from `lowest` on, whose B is not zero."""
    torch.manual_seed(0)
    kinds = ["q_proj", "v_proj", "c_attn", "o_proj", "out_proj", "down_proj", "fc2"]
    config = LoraConfig(
        r=4,
        target_modules=kinds,
        layers_to_transform=list(range(lowest, LAYERS)),
        init_lora_weights=False,
        fan_in_fan_out=type(model).__name__.startswith("GPT2"),
        **settings,
    )
    return get_peft_model(model, config).train()


def rows(padding="right"):
    return [{key: value[0] for key, value in batch.items()} for batch in toy_batches(EXAMPLES, 12, 1, padding=padding)]


def epochs(count=2, size=2):
    """Batches in another order and company in every epoch, each padded to its own longest row."""
    examples = rows()
    for epoch in range(count):
        order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
        for i in range(0, EXAMPLES, size):
            taken = [examples[j] for j in order[i : i + size]]
            longest = max(int(row["attention_mask"].sum()) for row in taken)
            yield {key: torch.stack([row[key][:longest] for row in taken]) for key in taken[0]}


def gradients(model, batches):
    """The loss and gradient of every batch."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        taken = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(taken)))
    return found


def assert_equal(found, expected, rtol=1e-5):
    for (loss, gradient), (other_loss, other) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, other_loss, rtol=rtol, atol=rtol)
        assert (gradient - other).abs().max() <= rtol * other.abs().max()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fused if name == "mixtral" else ()) for name in FAMILIES]
)
def test_losses_and_gradients_are_those_without_it(name):
    """Over two shuffled epochs; in the second the lower layers are not computed at all."""
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    model = adapted(FAMILIES[name]())
    expected = gradients(model, epochs())
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        found = gradients(model, epochs(1))
        assert cache.statistics.rows_computed == cache.statistics.examples == EXAMPLES
        found += gradients(model, itertools.islice(epochs(), EXAMPLES // 2, None))
        assert cache.statistics.rows_read == cache.statistics.rows_computed == EXAMPLES
    assert_equal(found, expected, 2e-2 if name == "bfloat16" else 1e-5)
    assert_equal(gradients(model, epochs(1)), expected[: EXAMPLES // 2], 2e-2 if name == "bfloat16" else 1e-6)


def layer_calls(model, layer=0):
    """A list that grows with the number of rows whenever a layer is computed."""
    seen = []
    q_proj = model.get_base_model().model.layers[layer].self_attn.q_proj
    q_proj.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def test_rows_that_do_not_fit_are_computed_alone():
    """A budget for half of the examples: the others' lower layers are computed, in batches with cached rows."""
    model = adapted(tiny_llama(LAYERS))
    expected = gradients(model, epochs())
    tokens = sum(int(row["attention_mask"].sum()) for row in rows())
    with cache_frozen_prefix(model, budget=tokens * 32 * 4 // 2) as cache:
        found = gradients(model, epochs(1))
        computed = layer_calls(model)
        found += gradients(model, itertools.islice(epochs(), EXAMPLES // 2, None))
    assert_equal(found, expected)
    assert 2 <= sum(computed) < EXAMPLES and sum(computed) == cache.statistics.rows_computed - EXAMPLES


def test_it_moves_up_with_later_freezing():
    """From the states stored so far: the layers below are not computed again, and the gradients stay right."""
    model, plain = adapted(tiny_llama(LAYERS), lowest=1), adapted(tiny_llama(LAYERS), lowest=1)

    def freeze(one):
        for name, parameter in one.named_parameters():
            if "layers.1." in name or "layers.2." in name:
                parameter.requires_grad_(False)
                parameter.grad = None

    with cache_frozen_prefix(model, budget="1MiB") as cache:
        found = gradients(model, epochs(1))
        assert cache.lowest == 1
        freeze(model)
        bottom, above = layer_calls(model, 0), layer_calls(model, 1)
        found += gradients(model, itertools.islice(epochs(3), EXAMPLES // 2, None))
        assert cache.lowest == 3 and not bottom and sum(above) == EXAMPLES
        assert len(cache.store) == EXAMPLES
    expected = gradients(plain, epochs(1))
    freeze(plain)
    expected += gradients(plain, itertools.islice(epochs(3), EXAMPLES // 2, None))
    assert_equal(found, expected)


@pytest.mark.parametrize(("dtype", "share", "error"), [("bfloat16", 0.5, 2e-2), ("int8", 66 / 256, 8e-2)])
def test_smaller_states_are_close(dtype, share, error):
    model = adapted(tiny_llama(LAYERS, hidden_size=64, intermediate_size=64))
    expected = gradients(model, epochs())
    with cache_frozen_prefix(model, budget="1MiB", dtype=dtype) as cache:
        found = gradients(model, epochs())
        whole = sum(int(row["attention_mask"].sum()) for row in rows()) * 64 * 4
        assert cache.statistics.bytes == whole * share
    assert_equal(found[EXAMPLES // 2 :], expected[EXAMPLES // 2 :], error)
    assert not torch.equal(found[-1][1], expected[-1][1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    """Also reentrant, which needs an input that requires a gradient."""
    model = adapted(tiny_llama(LAYERS))
    expected = gradients(model, epochs())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with cache_frozen_prefix(model, budget="1MiB"):
        found = gradients(model, epochs())
    assert_equal(found, expected)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


def test_evaluation_generation_and_the_reference_are_the_models_own():
    """In evaluation mode, without gradient, with adapters off; before and after, and nothing of it is stored."""
    model = adapted(tiny_llama(LAYERS))
    [batch] = toy_batches(4, 12, 4)

    def outputs():
        model.eval()
        with torch.no_grad():
            found = [model(**batch).logits, model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False)]
            model.train()
            with model.disable_adapter():
                return [*found, model(**batch).logits]

    expected = outputs()
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        model(**batch)
        assert all(map(torch.equal, outputs(), expected)) and len(cache.store) == 4
    assert all(map(torch.equal, outputs(), expected))


def test_weights_that_change_below_start_it_anew(caplog):
    """Loading an adapter or editing a weight: stale states are never used."""
    model = adapted(tiny_llama(LAYERS))
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        gradients(model, epochs(1))
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with caplog.at_level(logging.WARNING):
            found = gradients(model, epochs(1))
        assert cache.statistics.rows_read == 0
    assert "changed" in caplog.text
    assert_equal(found, gradients(model, epochs(1)))


def test_adapters_below_that_are_switched_off_are_not_mixed_up():
    """Frozen adapters act below; with them switched off, a training pass with gradients is computed in full."""
    model = adapted(tiny_llama(LAYERS), lowest=1)
    for name, parameter in model.named_parameters():
        if "layers.1." in name:
            parameter.requires_grad_(False)
    [batch] = toy_batches(4, 12, 4)
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        model(**batch)
        assert cache.lowest == 2
        with model.disable_adapter():
            found = model(**batch).logits
        used = cache.statistics.rows_read
    with model.disable_adapter():
        torch.testing.assert_close(found, model(**batch).logits)
    assert used == 0


def test_left_padding_needs_positions():
    """Given them, or with a model that counts a row's own tokens, it works; without, it is refused."""
    left = toy_batches(4, 12, 2, padding="left")
    model = adapted(tiny_llama(LAYERS))
    with cache_frozen_prefix(model, budget="1MiB"), pytest.raises(BlueprintError, match="padded on the left"):
        gradients(model, left)
    with_positions = [{**b, "position_ids": (b["attention_mask"].cumsum(-1) - 1).clamp(min=0)} for b in left]
    expected = gradients(model, with_positions * 2)
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        assert_equal(gradients(model, with_positions * 2), expected)
        assert cache.statistics.rows_read == 4
        moved = {**with_positions[0], "position_ids": with_positions[0]["position_ids"] + 1}
        with pytest.raises(BlueprintError, match="other position_ids than before"):
            model(**moved)
    model = adapted(opt())
    expected = gradients(model, left * 2)
    with cache_frozen_prefix(model, budget="1MiB") as cache:
        assert_equal(gradients(model, left * 2), expected)
        assert cache.statistics.rows_read == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]] * 2)}, "start again within a row"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, "shape"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 12, 32)}, "'inputs_embeds'"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "cu_seq_lens_q|packed"),
    ],
)
def test_batches_it_refuses(change, message):
    [batch] = toy_batches(2, 12, 2, padding="none")
    model = adapted(tiny_llama(LAYERS))
    with cache_frozen_prefix(model, budget="1MiB"), pytest.raises(BlueprintError, match=message):
        model(**{**batch, **change})


class TakesMore(torch.nn.Module):
    """A layer that also reads a tensor of its own from the model, unseen by its arguments."""

    def __init__(self, layer, memory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states, **kwargs):
        made = self.layer(hidden_states, **kwargs)
        made = made + self.memory[-1][: len(made), : made.shape[1]] if self.memory else made
        self.memory.append(made.detach())
        return made


def test_models_it_refuses():
    """Dropout below, a trained first layer or embedding, encoder-decoders, RoPE by length, and layers that talk."""
    [batch] = toy_batches(2, 12, 2, padding="none")
    with pytest.raises(BlueprintError, match="Layer 0 is trained"):
        cache_frozen_prefix(adapted(tiny_llama(LAYERS), lowest=0))
    with pytest.raises(BlueprintError, match="encoder-decoder"):
        cache_frozen_prefix(tiny_t5())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(BlueprintError, match="'dynamic'"):
        cache_frozen_prefix(adapted(tiny_llama(LAYERS, rope_scaling=rope)))
    shared = adapted(tiny_llama(LAYERS))
    shared.config.num_kv_shared_layers = 2
    with pytest.raises(BlueprintError, match="shares keys and values between layers"):
        cache_frozen_prefix(shared)
    with pytest.raises(BlueprintError, match="take 'per_layer_input' beside hidden states"):
        _check_layer_inputs({"attention_mask": batch["attention_mask"], "per_layer_input": batch["input_ids"]})
    with pytest.raises(BlueprintError, match="budget must be"):
        cache_frozen_prefix(adapted(tiny_llama(LAYERS)), budget="0.7x")
    model = adapted(tiny_gpt2(LAYERS, **NO_DROPOUT | {"resid_pdrop": 0.1}))
    with (
        cache_frozen_prefix(model, budget="1MiB"),
        pytest.raises(BlueprintError, match="Dropout of 0.1 below layer 2"),
    ):
        model(**batch)
    model = adapted(tiny_llama(LAYERS, attention_dropout=0.1))
    with cache_frozen_prefix(model, budget="1MiB"), pytest.raises(BlueprintError, match="Dropout of 0.1"):
        model(**batch)
    model = adapted(tiny_llama(LAYERS))
    model.get_input_embeddings().weight.requires_grad_(True)
    with cache_frozen_prefix(model, budget="1MiB"), pytest.raises(BlueprintError, match="embeddings are trained"):
        model(**batch)
    model, memory = adapted(tiny_llama(LAYERS)), []
    layers = model.get_base_model().model.layers
    for i in range(LAYERS):
        layers[i] = TakesMore(layers[i], memory)
    with cache_frozen_prefix(model, budget="1MiB"), pytest.raises(BlueprintError, match="computes other outputs"):
        model(**batch)


def test_dropout_above_is_allowed():
    """Adapters' dropout draws the same numbers as without the cache."""
    model = adapted(tiny_llama(LAYERS), lora_dropout=0.5)
    torch.manual_seed(1)
    expected = gradients(model, epochs())
    torch.manual_seed(1)
    with cache_frozen_prefix(model, budget="1MiB"):
        assert_equal(gradients(model, epochs()), expected)


def make_trainer(model, folder, callbacks, cls=Trainer, arguments=TrainingArguments, **settings):
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **settings,
    }
    data = settings.pop("data", rows())
    return cls(model, arguments(str(folder), **settings), train_dataset=data, callbacks=callbacks)


def losses(trainer):
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_with_transformers_trainer(tmp_path, monkeypatch):
    """Equal losses; two epochs of three are read; the lower layers may leave from the second epoch on."""
    expected = losses(make_trainer(adapted(tiny_llama(LAYERS)), tmp_path, []))
    callback = CacheFrozenPrefix("1MiB", offload=True)
    offloaded = []
    monkeypatch.setattr(
        "peft_blueprint.train.frozen_prefix.PrefixCache.offload", lambda cache: offloaded.append(cache.lowest)
    )
    trainer = make_trainer(adapted(tiny_llama(LAYERS)), tmp_path, [callback])
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)
    assert callback.statistics.rows_read == 2 * EXAMPLES and offloaded == [LOWEST, LOWEST]
    assert callback.cache is None


def test_with_trl(tmp_path):
    """SFTTrainer on tokens and completion masks, without packing."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from peft_blueprint.measure import load_tokenizer
    from peft_blueprint.testing import save_tiny_model

    save_tiny_model(tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    data = datasets.Dataset.from_list(
        [
            {"input_ids": list(range(4 + i, 12 + 2 * i)), "completion_mask": [0, 0] + [1] * (6 + i)}
            for i in range(EXAMPLES)
        ]
    )
    names = ("activation_checkpointing", "gradient_checkpointing")  # of transformers 5 and 4; TRL turns it on
    checkpointing = {next(name for name in names if hasattr(TrainingArguments("out"), name)): False}
    found = []
    for callbacks in ([], [CacheFrozenPrefix("1MiB")]):
        trainer = trl.SFTTrainer(
            adapted(tiny_llama(LAYERS)),
            trl.SFTConfig(
                str(tmp_path),
                num_train_epochs=2,
                per_device_train_batch_size=2,
                learning_rate=0.05,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                dataloader_pin_memory=False,
                **checkpointing,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert callbacks[0].statistics.rows_read == EXAMPLES


def test_the_guides_code_runs(tmp_path, monkeypatch, capsys):
    """docs/how-to/frozen_prefix.md, in one namespace."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "how-to" / "frozen_prefix.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "frozen_prefix.md", "exec"), names)
    assert len(blocks) == 2 and "rows_read=16" in capsys.readouterr().out
    assert {name.split(".layers.")[1][0] for name, p in names["model"].named_parameters() if p.requires_grad} == {"3"}


def test_the_store_keeps_entries_within_its_budget(tmp_path):
    """Bit by bit; within 1/127 of the largest of 64 features in 8 bits; nothing beyond its budget."""
    states = torch.randn(5, 100) * torch.logspace(-3, 3, 100)
    store = StateStore(2 * states.nbytes, folder=tmp_path)
    assert store.put(b"a", states.bfloat16(), 1) and store.put(b"b", -states.bfloat16(), 1)
    assert torch.equal(store.get(b"a"), states.bfloat16()) and torch.equal(store.get(b"b"), -states.bfloat16())
    assert store.put(b"c", states.bfloat16(), 1) and store.put(b"d", states.bfloat16(), 1)
    assert not store.put(b"e", states.bfloat16(), 1) and store.refused == 1 and store.used == store.budget
    assert store.put(b"a", 2 * states.bfloat16(), 3), "in its own place"
    assert torch.equal(store.get(b"a"), 2 * states.bfloat16()) and store.entry(b"a").depth == 3
    store.close()
    small = StateStore(10_000, "int8", tmp_path)
    small.put(b"a", states, 1)
    largest = (
        torch.nn.functional.pad(states, (0, 28)).reshape(5, 2, 64).abs().amax(2).repeat_interleave(64, 1)[:, :100]
    )
    assert ((small.get(b"a") - states).abs() <= largest / 127 + 1e-6).all()
    assert not list(tmp_path.iterdir()), "the file has no name"
    small.close()
    with pytest.raises(BlueprintError, match="free"):
        StateStore(2**62, folder=tmp_path)
    with pytest.raises(BlueprintError, match="cannot be used"):
        StateStore(1, folder=tmp_path / "missing")
    with pytest.raises(BlueprintError, match="dtype must be one of"):
        StateStore(1, "int4", tmp_path)
