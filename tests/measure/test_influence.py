"""The measurement agrees with plain autograd, one example at a time. Run: pytest tests/measure/test_influence.py"""

import pytest
import torch

from peft_blueprint import Influence, measure_influence
from peft_blueprint.errors import BlueprintError, MeasurementError, MismatchError
from peft_blueprint.measure.submodules import dequantized_weight, linear_modules
from peft_blueprint.testing import quantize, tiny_bert, tiny_gpt2, tiny_llama, toy_batches


def autograd_gradients(model, batches, loss=None):
    """{name: (examples, d_out, d_in)}: the model's own loss, one example at a time, by autograd."""
    modules = dict(linear_modules(model))
    gradients = {name: [] for name in modules}
    for batch in batches:
        for i in range(len(batch["labels"])):
            model.zero_grad()
            one = {key: value[i : i + 1] for key, value in batch.items()}
            (loss(model, one) if loss else model(**one).loss).backward()
            for name, module in modules.items():
                gradient = module.weight.grad
                is_transposed = gradient is not None and type(module).__name__ == "Conv1D"
                gradients[name].append(gradient.T.clone() if is_transposed else gradient.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in gradients.items()}


def assert_agrees(influence, gradients, tolerance=1e-4):
    expected = torch.stack([gradients[s.name].flatten(1).norm(dim=1) for s in influence.submodules])
    assert influence.norms.shape == expected.shape
    torch.testing.assert_close(influence.norms, expected, rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_norms_agree_with_autograd_for_any_padding(build, padding):
    """Per-example, per-submodule norms are autograd's, to 1e-4, on grouped-query Llama and on GPT-2's Conv1D."""
    model, batches = build(), toy_batches(padding=padding)
    influence = measure_influence(model, batches, progress=False)
    assert_agrees(influence, autograd_gradients(model, batches))
    assert len(influence.submodules) == len(list(linear_modules(model))) - 1  # all but the head


def test_some_submodules_are_measured_as_among_all_without_the_passes_before_them():
    """Norms are those of the whole measurement, in the model's order, and the backward pass ends at the first of them."""
    model, batches = tiny_llama(layers=4), toy_batches()
    whole = measure_influence(model, batches, progress=False)
    names = ["model.layers.3.mlp.down_proj", "model.layers.2.self_attn.v_proj"]
    reached = []
    for layer in model.model.layers:
        layer.mlp.register_full_backward_hook(lambda *_: reached.append(1))
    part = measure_influence(model, batches, submodules=names, progress=False)
    assert [s.name for s in part.submodules] == names[::-1] and part.unmeasured == ()
    rows = [[s.name for s in whole.submodules].index(name) for name in names[::-1]]
    torch.testing.assert_close(part.norms, whole.norms[rows])
    assert len(reached) == 2 * len(batches)
    for wrong, said in (
        (["model.layers.9.mlp.up_proj"], "1 of 1"),
        ([], "none was named"),
        ("x", "must be a list of names"),
    ):
        with pytest.raises(MismatchError, match=said):
            measure_influence(model, batches, submodules=wrong, progress=False)


@pytest.mark.parametrize("tokens", [False, True])
def test_norms_agree_with_autograd_on_an_encoder(tokens):
    """BERT for sequence and for token classification."""
    model, batches = tiny_bert(tokens=tokens), toy_batches()
    for batch in batches:
        batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 3)
        if not tokens:
            batch["labels"] = batch["labels"].max(dim=1).values
    assert_agrees(measure_influence(model, batches, progress=False), autograd_gradients(model, batches))


@pytest.mark.parametrize("tokens", [4, 400])
def test_both_forms_of_the_norm_agree_with_autograd(tokens):
    """Short examples take the Gram form, long ones form the gradient; each is right."""
    model = tiny_llama(layers=2)
    batches = toy_batches(examples=3, length=tokens, prompt=1, padding="none")
    assert_agrees(measure_influence(model, batches, progress=False), autograd_gradients(model, batches))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_and_is_used(reentrant):
    """With gradient checkpointing on, norms are the same, and layers do run twice."""
    model, batches = tiny_llama(attention_dropout=0.5), toy_batches()
    expected = measure_influence(model, batches, progress=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: calls.append(1))
    measured = measure_influence(model, batches, progress=False)
    # and twice the first example: for the model's own loss, and in training mode for the layers called there
    assert len(calls) == 2 * len(batches) + 2
    torch.testing.assert_close(measured.norms, expected.norms)
    assert model.training and all(module.training for module in model.modules())


def test_the_model_is_put_back_as_it_was_even_after_an_error():
    """Training flags, requires_grad and forwards survive; a second measurement gives the same."""
    model, batches = tiny_gpt2(), toy_batches()
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    first = measure_influence(model, batches, progress=False)
    with pytest.raises(MeasurementError, match="no labels"):
        measure_influence(model, [{"input_ids": batches[0]["input_ids"]}], progress=False)
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(first.norms, measure_influence(model, batches, progress=False).norms)


def test_losses_are_means_over_an_examples_own_targets():
    """Losses and target counts are per example, and match the model's own loss on that example alone."""
    model, batches = tiny_llama(), toy_batches()
    influence = measure_influence(model, batches, progress=False)
    alone = [model(**{k: v[i : i + 1] for k, v in batch.items()}).loss.item() for batch in batches for i in range(4)]
    torch.testing.assert_close(influence.losses, torch.tensor(alone))
    counts = torch.cat([(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in batches])
    assert torch.equal(influence.target_tokens, counts)
    assert influence.tokens == 8 * 12


def test_signal_norm_is_the_unbiased_norm_of_the_mean_gradient():
    """Where the mean gradient is kept whole, the signal norm follows from autograd's gradients to 1e-4."""
    model, batches = tiny_llama(), toy_batches()
    influence = measure_influence(model, batches, sketch_size=None, progress=False)
    gradients = autograd_gradients(model, batches)
    for i, submodule in enumerate(influence.submodules):
        g = gradients[submodule.name].flatten(1)
        mean_square = g.mean(dim=0).square().sum()
        signal = (8 * mean_square - g.square().sum(dim=1).mean()) / 7
        torch.testing.assert_close(influence.signal_norms[i], signal.clamp_min(0).sqrt(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(influence.mean_gradient_norms[i], mean_square.sqrt(), rtol=1e-4, atol=0)
        rows = gradients[submodule.name].mean(dim=0).norm(dim=1)
        torch.testing.assert_close(influence.row_norms[i], rows, rtol=1e-3, atol=1e-7)


def test_the_sketch_estimates_the_mean_gradient_without_bias():
    """Averaged over seeds, the sketched square of the norm is the exact one, within 3 standard errors."""
    model, batches = tiny_llama(layers=1), toy_batches()
    exact = measure_influence(model, batches, sketch_size=None, progress=False).mean_gradient_norms.square()
    seeds = [measure_influence(model, batches, sketch_size=8, seed=s, progress=False) for s in range(60)]
    ratios = torch.stack([s.mean_gradient_norms.square() for s in seeds]) / exact
    error = ratios.std(dim=0) / len(seeds) ** 0.5
    assert ((ratios.mean(dim=0) - 1).abs() < 3 * error + 1e-6).all()
    assert (error > 0).all(), "a sketch of 8 columns is not exact"
    again = measure_influence(model, batches, sketch_size=8, seed=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(again.sketches, seeds[3].sketches, strict=True))


def test_shards_merge_to_the_whole():
    """Measuring two halves and merging equals measuring everything, sketches included."""
    model, batches = tiny_llama(), toy_batches(examples=12)
    whole = measure_influence(model, batches, sketch_size=8, progress=False)
    parts = [measure_influence(model, half, sketch_size=8, progress=False) for half in (batches[:1], batches[1:])]
    merged = Influence.merge(parts)
    assert torch.equal(merged.norms, whole.norms)
    torch.testing.assert_close(merged.signal_norms, whole.signal_norms, rtol=1e-4, atol=1e-6)
    with pytest.raises(MismatchError, match="sketch size 8.*sketch size 4"):
        Influence.merge([whole, measure_influence(model, batches, sketch_size=4, progress=False)])


def test_a_module_called_twice_in_a_pass_accumulates():
    """Two layers that share their weights are one submodule whose gradient is the sum of both calls'."""
    model, batches = tiny_llama(layers=2), toy_batches()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    influence = measure_influence(model, batches, progress=False)
    assert_agrees(influence, autograd_gradients(model, batches))


def test_weights_without_a_gradient_are_listed_not_dropped():
    """A submodule without a gradient is named with the reason, and so is the head."""
    model, batches = tiny_bert(), toy_batches()
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda m, a, out: out.detach())
    for batch in batches:
        batch["labels"] = batch["labels"].max(dim=1).values % 3
    influence = measure_influence(model, batches, progress=False)
    reasons = dict(influence.unmeasured)
    assert "no gradient reached it" in reasons["bert.encoder.layer.1.intermediate.dense"]
    assert "head" in reasons["classifier"]
    assert "bert.encoder.layer.1.intermediate.dense" not in [s.name for s in influence.submodules]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_weights_give_the_norms_of_the_dequantised_model(kind):
    """4- and 8-bit weights are measured as they are, with the norms of autograd on their dequantised values."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 64}
    model, reference = quantize(tiny_llama(**wide), kind), tiny_llama(**wide)
    others = dict(linear_modules(reference))
    batches = toy_batches()
    influence = measure_influence(model, batches, progress=False)
    assert all(s.quantized for s in influence.submodules)
    for submodule in influence.submodules:
        weight = dequantized_weight(dict(linear_modules(model))[submodule.name])
        others[submodule.name].weight.data = weight.float().reshape(submodule.shape)
    # 8-bit layers round their inputs too, so that they can only be near
    assert_agrees(influence, autograd_gradients(reference, batches), 0.1 if kind == "int8" else 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.02)])
def test_half_precision_weights_are_measured(dtype, tolerance):
    """bf16 and fp16 give fp32's norms to their own precision; tiny fp16 gradients do not underflow."""
    batches = toy_batches()
    expected = measure_influence(tiny_llama(), batches, progress=False)
    measured = measure_influence(tiny_llama().to(dtype), batches, progress=False)
    error = (measured.norms - expected.norms).norm(dim=1) / expected.norms.norm(dim=1)
    assert error.max() < tolerance


def test_a_custom_loss_replaces_the_models_own():
    """loss_fn(model, batch) -> (B,) is differentiated."""
    model, batches = tiny_llama(), toy_batches(padding="none")

    def last_token(model, batch):
        return -model(batch["input_ids"]).logits[:, -1].float().log_softmax(-1)[:, 5]

    influence = measure_influence(model, batches, loss_fn=last_token, progress=False)
    assert_agrees(influence, autograd_gradients(model, batches, lambda m, b: last_token(m, b).sum()))


def test_a_peft_model_is_measured_under_the_base_models_names():
    """Fresh adapters change nothing, and their matrices are not submodules."""
    from peft import LoraConfig, get_peft_model

    batches = toy_batches()
    expected = measure_influence(tiny_llama(), batches, progress=False)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    measured = measure_influence(wrapped, batches, progress=False)
    assert [s.name for s in measured.submodules] == [s.name for s in expected.submodules]
    torch.testing.assert_close(measured.norms, expected.norms)
    assert [n for n, p in wrapped.named_parameters() if p.requires_grad] and "forward" not in vars(wrapped)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches are empty"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], "no labels"),
        (
            [{"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([[1, 1, 1, 1], [-100] * 4])}],
            r"Examples \[1\] of a batch of 2 have no target",
        ),
    ],
)
def test_bad_data_is_named(batches, message):
    """Without data, labels or targets the error says which are missing."""
    with pytest.raises(MeasurementError, match=message):
        measure_influence(tiny_llama(layers=1), batches, progress=False)


def test_nan_weights_are_an_error_that_names_the_submodule():
    """A NaN in a weight makes no blueprint."""
    model = tiny_llama(layers=2)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(MeasurementError, match="is infinite or NaN"):
        measure_influence(model, toy_batches(), progress=False)


LABELS = toy_batches(2)[0]["labels"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            tiny_llama(),
            {"labels": LABELS[..., None]},
            "The labels, 2x12x1, do not fit LlamaForCausalLM and its input_ids",
        ),
        (tiny_llama(), {key: value[:0] for key, value in toy_batches(2)[0].items()}, "A batch has no example"),
        (None, {}, "model must be a torch.nn.Module, got NoneType"),
        ("org/model", {}, "model must be a torch.nn.Module, got 'org/model'. Load it first"),
    ],
)
def test_a_measurement_of_nothing_is_refused(model, changes, message):
    """Labels of another form, batches without rows, and names in place of models."""
    with pytest.raises(BlueprintError, match=message):
        measure_influence(model, [toy_batches(2)[0] | changes], progress=False)


def test_max_examples_stops_within_a_batch():
    """Only `max_examples` are measured, and an endless iterator is not drained."""
    influence = measure_influence(tiny_llama(layers=1), iter(toy_batches() * 100), max_examples=6, progress=False)
    assert influence.norms.shape[1] == len(influence.losses) == 6
    with pytest.raises(MeasurementError, match="max_examples must be a positive integer or None, got 0"):
        measure_influence(tiny_llama(layers=1), toy_batches(), max_examples=0, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_cross_entropy_is_torchs_own(dtype, monkeypatch):
    """Losses and their gradient, a few rows at a time, are F.cross_entropy's, with zeros where there is no target."""
    from peft_blueprint.measure import losses

    monkeypatch.setattr(losses, "NUMBERS_AT_A_TIME", 3 * 11)
    logits = (3 * torch.randn(2, 5, 11)).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (2, 5)).index_fill(1, torch.tensor([1]), -100)
    mine, counts = losses._token_losses(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").sum(1) / 4
    assert counts.tolist() == [4, 4]
    torch.testing.assert_close(mine, theirs)
    weights = torch.tensor([1.0, -2.0])
    [expected] = torch.autograd.grad(theirs @ weights, logits)
    [gradient] = torch.autograd.grad(mine @ weights, logits)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[:, 1].any()


def test_the_progress_bar_counts_examples(capsys):
    """Not submodules or batches; the last line has both numbers."""
    batches = toy_batches(examples=6, batch_size=2)
    measure_influence(tiny_llama(), batches, max_examples=5)
    assert "5/5" in capsys.readouterr().err
