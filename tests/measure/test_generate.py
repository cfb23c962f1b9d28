"""The measurement that fills the record. Run: pytest tests/measure/test_generate.py"""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr

from peft_blueprint import Blueprint, Submodule, generate_blueprint, measure_influence
from peft_blueprint.blueprint import to_dict
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure import Privacy
from peft_blueprint.measure.concentration import fit_rank_exponent
from peft_blueprint.measure.submodules import find_submodules, linear_modules, structure_digest
from peft_blueprint.measure.summary import bootstrap_intervals
from peft_blueprint.testing import tiny_gpt2, tiny_llama, tiny_t5, toy_batches
from tests.made_up import norms_of
from tests.records import from_json, to_json


def measured(model, batches, **wish):
    return generate_blueprint(model, batches, progress=False, **{"bootstrap": 200} | wish)


def test_a_blueprint_says_how_it_was_made():
    """Model, revision, checkpoint, data, its digest and size, command, seed, dtype and versions are in the file."""
    model, batches = tiny_llama(layers=2), toy_batches()
    wish = {"model_id": "org/m", "model_revision": "abc", "training_checkpoint": 0.8, "seed": 3, "max_examples": 6}
    blueprint = measured(model, batches, data={"name": "toy"}, command="peft-blueprint generate …", **wish)
    assert (blueprint.model_id, blueprint.model_revision, blueprint.training_checkpoint) == ("org/m", "abc", 0.8)
    made = blueprint.provenance
    spent = made["spent"]
    assert spent["tokens"]["value"] > 0 and {spent[name]["how"] for name in ("seconds", "tokens")} == {"measured"}
    assert spent["flops"]["how"] == "modelled" and spent["flops"]["value"] > 2 * spent["tokens"]["value"]
    assert (made["data"], made["command"]) == ({"name": "toy"}, "peft-blueprint generate …")
    assert (made["seed"], made["dtype"], made["quantized"], made["unmeasured"]) == (3, "float32", False, 7)
    domain = made["domains"]["data"]
    targets = torch.cat([batch["labels"][:, 1:] for batch in batches])[:6] != -100
    assert (domain["examples"], domain["tokens"], domain["target_tokens"]) == (6, 6 * 12, int(targets.sum()))
    assert {"python", "peft", "peft-blueprint", "torch", "transformers"} <= made["versions"].keys()
    assert {e.examples for e in blueprint} == {6}
    again = measured(model, batches, **wish)
    assert again.submodules == blueprint.submodules
    assert again.provenance["domains"]["data"]["data_digest"] == domain["data_digest"]
    other = measured(model, toy_batches(seed=1), **wish)
    assert other.provenance["domains"]["data"]["data_digest"] != domain["data_digest"]
    assert from_json(to_json(blueprint)) == blueprint


def test_the_digest_is_of_the_structure_alone():
    """The same in bf16, in 4 bits and under an adapter; another for another size."""
    bnb = pytest.importorskip("bitsandbytes")
    digest = measured(tiny_llama(), toy_batches()).model_digest
    assert digest == measured(tiny_llama().bfloat16(), toy_batches()).model_digest
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    quantised = tiny_llama()
    for name, module in list(linear_modules(quantised)):
        small = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False)
        parent, _, last = name.rpartition(".")
        setattr(quantised.get_submodule(parent), last, small.to("cpu"))
    assert any(s.quantized for s in find_submodules(quantised))
    for model in (adapted, quantised):
        assert structure_digest(find_submodules(model)) == digest
    for model in (tiny_llama(layers=5), tiny_llama(intermediate_size=64), tiny_gpt2()):
        assert structure_digest(find_submodules(model)) != digest


def test_bootstrap_intervals_hold_the_mean_and_shrink_with_examples():
    """95 % intervals contain the mean, cover the truth about that often, and narrow as 1/√n."""
    draws = np.random.default_rng(0).gamma(4, size=(400, 160))
    few, many = bootstrap_intervals(draws[:, :10], 500, seed=1), bootstrap_intervals(draws, 500, seed=1)
    for norms, intervals in ((draws[:, :10], few), (draws, many)):
        assert (intervals[:, 0] <= norms.mean(axis=1)).all() and (norms.mean(axis=1) <= intervals[:, 1]).all()
    assert np.ptp(few, axis=1).mean() / np.ptp(many, axis=1).mean() == pytest.approx(3.8, rel=0.1)
    assert 0.9 < ((many[:, 0] < 4) & (4 < many[:, 1])).mean() < 0.99
    blueprint = measured(tiny_llama(layers=1), toy_batches())
    assert all(e.norm_interval[0] < e.gradient_norm < e.norm_interval[1] for e in blueprint)


def test_adam_gain_agrees_with_pefts_initial_adapter():
    """Against the L1 norm of B's gradient from autograd's mean gradient and rows of PEFT's own initialised A."""
    model, batches = tiny_llama(layers=2), toy_batches()
    gains = {e.name: e.adam_gain for e in measured(model, batches)}
    modules = dict(linear_modules(model))
    for batch in batches:
        for i in range(len(batch["labels"])):
            (model(**{key: value[i : i + 1] for key, value in batch.items()}).loss / 8).backward()
    gradients = {name: modules[name].weight.grad.clone() for name in gains}
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(layers=2), LoraConfig(r=2000, target_modules=list(gains)))
    for name, gradient in gradients.items():
        rows = adapted.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
        assert gains[name] == pytest.approx((gradient @ rows.T).abs().sum(dim=0).mean().item(), rel=0.04), name


@pytest.mark.parametrize("examples", [1, 2, 8])
def test_a_measured_blueprint_holds_no_nan(examples):
    """Unknown statistics (noise from one example) are absent, not NaN: the JSON is strict and reads back."""
    blueprint = measured(tiny_llama(layers=2), toy_batches(examples=examples), max_examples=examples)
    text = to_json(blueprint)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert from_json(text) == blueprint
    assert all((e.norm_interval is None) == (examples == 1) for e in blueprint)
    if examples == 8:
        empty = {f.name for f in fields(Submodule) if all(getattr(e, f.name) in (None, {}) for e in blueprint)}
        assert empty == {"domain_tags", "extra", "token_share", "gate_weight"}


def test_the_retained_mass_curve_is_that_of_the_norms():
    """Fractions start at one submodule; mass ends at 1; one submodule alone has no exponent."""
    blueprint = measured(tiny_llama(layers=2), toy_batches())
    curve = blueprint.concentration
    assert curve["fractions"][0] == 0.1 and curve["fractions"][-1] == curve["retained_mass"][-1] == 1
    half = sorted(norms_of(blueprint))[7:]
    assert curve["retained_mass"][curve["fractions"].index(0.5)] == pytest.approx(sum(half) / sum(norms_of(blueprint)))
    assert 0 < curve["gamma_fit"] < 1 and curve["gamma_fit_residual"] >= 0
    single = torch.nn.Sequential(torch.nn.Linear(3, 4))
    loss = {"loss_fn": lambda model, batch: model(batch["x"]).square().sum(dim=-1)}
    assert "gamma_fit" not in measured(single, [{"x": torch.ones(2, 3)}], **loss).concentration


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches are empty"),
        ({}, "mapping of domains is empty"),
        (toy_batches()[0], "got Tensor. For a single batch, give \\[batch\\]"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long)}], "no labels"),
        ([toy_batches()[0] | {"labels": torch.full((4, 12), -100)}], r"Examples \[0, 1, 2, 3\].*no target token"),
    ],
    ids=["nothing", "no domains", "one batch", "no labels", "no targets"],
)
def test_data_that_cannot_be_measured_is_an_error(batches, message):
    """Each error names the fault of the data."""
    with pytest.raises(MeasurementError, match=message):
        measured(tiny_llama(layers=1), batches)


def test_merging_equals_measuring_all_examples_together():
    """Two halves of unequal size merge to the norms, tags and counts of the whole."""
    model, batches = tiny_llama(layers=2), toy_batches(examples=12)
    other = toy_batches(examples=12, seed=7)
    halves = [
        measured(model, {"law": batches[:1], "code": other[:1]}),
        measured(model, {"law": batches[1:], "code": other[1:]}),
    ]
    whole = measured(model, {"law": batches, "code": other}, bootstrap=2000)
    merged = Blueprint.merge(halves)
    assert norms_of(merged) == pytest.approx(norms_of(whole), rel=1e-6)
    assert {e.examples for e in merged} == {12}
    assert [e.domain_tags["code"] for e in merged] == pytest.approx([e.domain_tags["code"] for e in whole], rel=1e-5)
    ratios = [a.norm_error / b.norm_error for a, b in zip(merged, whole, strict=True)]
    assert 0.6 < min(ratios) and max(ratios) < 1.4
    assert merged["model.layers.0.mlp.up_proj"].adam_gain is None and len(merged.provenance["merged"]) == 2
    assert merged["model.layers.0.mlp.up_proj"].gamma is None


def test_several_domains_are_measured_into_one_blueprint():
    """Tags are relative to the first domain, whose own is 1; weighted by its tag, a domain's norms are its own."""
    model, law, code = tiny_llama(), toy_batches(), toy_batches(seed=5, length=8)
    both = measured(model, {"law": law, "code": code})
    alone = {"law": measured(model, law), "code": measured(model, code)}
    assert norms_of(both) == norms_of(alone["law"]) and not alone["law"].submodules[0].domain_tags
    assert {e.domain_tags["law"] for e in both} == {1.0}
    assert norms_of(both.for_domain("code")) == pytest.approx(norms_of(alone["code"]), rel=1e-6)
    assert list(both.provenance["domains"]) == ["law", "code"]


@pytest.mark.parametrize(
    ("options", "exact_norms", "exact_signals"),
    [
        ({"method": "exact", "sketch_size": None}, True, True),
        ({"method": "exact", "sketch_size": 4}, True, False),
        ({"method": "sketch", "sketch_size": 4}, False, False),
        ({"method": "exact", "sketch_size": 64}, True, True),
    ],
)
def test_a_blueprint_says_which_statistics_are_estimates(options, exact_norms, exact_signals):
    """Those it does not name are the same as from whole gradients."""
    wish = {"bootstrap": 20, "progress": False}
    truth = generate_blueprint(tiny_llama(), toy_batches(examples=4), method="exact", sketch_size=None, **wish)
    blueprint = generate_blueprint(tiny_llama(), toy_batches(examples=4), **options, **wish)
    estimates = blueprint.provenance.get("estimates", [])
    assert ("gradient_norm" not in estimates, "signal_norm" not in estimates) == (exact_norms, exact_signals)
    for name in (
        "gradient_norm",
        "median_norm",
        "signal_norm",
        "noise_scale",
        "adam_gain",
        "weight_gradient",
        "alpha",
    ):
        mine, right = ([getattr(entry, name) or 0 for entry in b] for b in (blueprint, truth))
        if name not in estimates:
            assert mine == pytest.approx(right, rel=1e-3, abs=1e-9)
        else:
            assert mine != pytest.approx(right, rel=1e-3, abs=1e-9)


def test_a_norm_is_in_its_interval_with_few_resamples():
    """A single resample misses the mean; a record whose norm is outside of its interval is refused."""
    blueprint = generate_blueprint(tiny_llama(), toy_batches(examples=4), bootstrap=1, progress=False)
    assert all(entry.norm_interval[0] <= entry.gradient_norm <= entry.norm_interval[1] for entry in blueprint)


@pytest.mark.parametrize("level", ["group", "layer"])
def test_a_coarse_blueprint_measures_its_units_whole(level):
    """Norms, medians and intervals are of each example's gradient over all members; α is of their rows together."""
    options = {"bootstrap": 50, "progress": False, "method": "exact", "sketch_size": None}
    blueprint = generate_blueprint(tiny_llama(), toy_batches(), level=level, **options)
    influence = measure_influence(tiny_llama(), toy_batches(), progress=False, method="exact", sketch_size=None)
    fine = generate_blueprint(tiny_llama(), toy_batches(), **options)
    coarse = fine.coarsen(level)
    assert blueprint.level == level and blueprint.names == coarse.names
    for entry in blueprint:
        rows = [i for i, s in enumerate(influence.submodules) if entry.name in (s.group, f"layer.{s.depth}")]
        norms = influence.norms[rows].double().square().sum(dim=0).sqrt()
        assert entry.gradient_norm == pytest.approx(float(norms.mean()))
        assert entry.median_norm == pytest.approx(float(norms.quantile(0.5)))
        low, high = entry.norm_interval
        assert norms.min() < low < entry.gradient_norm < high < norms.max()
        assert coarse[entry.name].gradient_norm <= entry.gradient_norm * (1 + 1e-6)
        fit = fit_rank_exponent(np.concatenate([influence.row_norms[i].numpy() for i in rows]))
        assert (entry.alpha, entry.alpha_error) == pytest.approx((fit.exponent, fit.error))
        assert entry.gamma == pytest.approx(1 / (1 + fit.exponent)) and 0 < entry.k_star <= 1
        assert entry.prompt_share == pytest.approx(influence.prompt_share(rows)[0])
        same = (
            "signal_norm",
            "noise_scale",
            "influence",
            "influence_mismatch",
            "adam_gain",
            "weight_norm",
            "prompt_adam_share",
        )
        for name in same:
            assert getattr(entry, name) == pytest.approx(getattr(coarse[entry.name], name), abs=1e-6), name
    assert blueprint.influence["scale"] == pytest.approx(fine.influence["scale"])
    norms, influences = ([getattr(e, key) for e in blueprint] for key in ("gradient_norm", "influence"))
    assert blueprint.influence["rank_correlation"] == pytest.approx(spearmanr(norms, influences).statistic)
    assert blueprint.concentration["fractions"] != fine.concentration["fractions"] and blueprint.costs["k_star"] > 0


def test_a_coarse_blueprint_of_domains_and_with_noise():
    """Tags are of whole units; released norms are coarsened afterwards."""
    domains = {"law": toy_batches(), "code": toy_batches(seed=1)}
    options = {"progress": False, "bootstrap": 20, "method": "exact"}
    both = generate_blueprint(tiny_llama(), domains, level="group", **options)
    code = generate_blueprint(tiny_llama(), domains["code"], level="group", **options)
    for entry in both:
        assert entry.gradient_norm * entry.domain_tags["code"] == pytest.approx(code[entry.name].gradient_norm)
    noisy = generate_blueprint(tiny_llama(), toy_batches(), privacy=Privacy(noise=0.01), level="layer", **options)
    assert noisy.level == "layer" and noisy.submodules[0].alpha is None
    with pytest.raises(MeasurementError, match="level must be submodule, group or layer, got 'block'"):
        generate_blueprint(tiny_llama(), domains, level="block")


def test_a_translation_model_keeps_self_and_cross_attention_apart():
    """The entries of a T5, whose decoder attends to the encoder too."""
    ids = torch.arange(1, 25).view(4, 6)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    blueprint = generate_blueprint(tiny_t5(), batches, level="group", bootstrap=20, progress=False)
    assert {entry.kind for entry in blueprint} == {
        *("encoder.attn", "encoder.ffn", "decoder.attn", "decoder.cross_attn", "decoder.ffn")
    }
    assert all(entry.alpha and entry.k_star and entry.norm_interval for entry in blueprint)
    assert to_dict(blueprint)["layers"][5]["id"] == "decoder.cross_attn.0"
