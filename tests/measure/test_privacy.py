"""Guarantee and content of a private release. Run: pytest tests/measure/test_privacy.py"""

import itertools
import json
import math
import multiprocessing
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import optimize, stats
from scipy.special import log_ndtr

from peft_blueprint import Blueprint, BlueprintError, generate_blueprint, measure_influence
from peft_blueprint._processes import process_count
from peft_blueprint.blueprint import to_dict
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.compare.drift import check_drift
from peft_blueprint.errors import MeasurementError
from peft_blueprint.measure import GenerateOptions
from peft_blueprint.measure.generate import _released
from peft_blueprint.measure.privacy import (
    SCALES,
    Privacy,
    bounded,
    choose_scale,
    gaussian_sigma,
    one_by_one,
    release,
    scale_scores,
    shrink,
)
from peft_blueprint.measure.summary import concentration
from peft_blueprint.testing import tiny_llama, toy_batches


WIDE = Privacy(epsilon=200.0, delta=0.01)  # little noise on a few examples

# every key of a private file; a new statistic must be looked at before it is added here
TOP = {
    *("schema_version", "digest", "model_id", "model_revision", "model_digest", "training_checkpoint", "level"),
    *("concentration", "costs", "provenance", "layers"),
}
ENTRY = {
    *("id", "gradient_norm", "kind", "depth", "group", "shape", "form", "quantized", "weight_norm", "examples"),
    "domain_tags",
}
PROVENANCE = {
    *("created", "command", "data", "domains", "privacy", "method", "sketch_size", "seed", "dtype", "quantized"),
    *("device", "processes", "versions", "weights_digest"),
}
STATEMENT = {
    *("mechanism", "epsilon", "delta", "clip", "clip_chosen", "unit", "neighbours", "covers", "composition"),
    *("post_processing", "scale_chosen", "scale_epsilon", "domains"),
}
STATEMENT_OF_DOMAIN = {"examples", "sensitivity", "sigma", "reliability", "scale"}


def rows(kinds=3, depth=8):
    return [Submodule(f"{d}.{k}", kind=f"k{k}", depth=d) for k in range(kinds) for d in range(depth)]


def smooth_norms(examples, seed=0, kinds=3, depth=8):
    """Norms that vary slowly with depth, (kinds · depth, examples)."""
    generator = np.random.default_rng(seed)
    means = [(1 + k) * (1 + 0.5 * math.cos(2.5 * d / depth + k)) for k in range(kinds) for d in range(depth)]
    return np.array(means)[:, None] * generator.lognormal(0, 0.3, (1, examples))


def private_blueprint(privacy=WIDE, batches=None, model=None, **options):
    model = model or tiny_llama(layers=4)
    return generate_blueprint(
        model, batches or toy_batches(), model_id="tiny/llama", progress=False, privacy=privacy, **options
    )


def analytic_sigma(epsilon, delta):
    """The smallest σ for real numbers of sensitivity 1, by theorem 8 of Balle and Wang 2018 (arXiv:1805.06530)."""

    def excess(log_sigma):
        a, b = 0.5 / math.exp(log_sigma), epsilon * math.exp(log_sigma)
        high, low = log_ndtr(a - b), epsilon + log_ndtr(-a - b)
        return high + math.log1p(-math.exp(low - high)) - math.log(delta)

    return math.exp(optimize.brentq(excess, math.log(0.6 / math.sqrt(2 * epsilon + 1)) - 3, 4))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("delta, excess", [(1e-10, 1.08), (1e-5, 1.12), (1e-2, 1.28)])
def test_noise_is_enough_and_little_more_than_real_numbers_need(epsilon, delta, excess):
    """OpenDP's sigma keeps the analytic (ε, δ) bound and exceeds the smallest possible one by a few per cent."""
    smallest, sigma = analytic_sigma(epsilon, delta), gaussian_sigma(epsilon, delta)
    assert smallest <= sigma <= excess * smallest
    assert gaussian_sigma(epsilon, delta, 7.0) == pytest.approx(7 * sigma, rel=1e-9)


def test_the_analytic_sigma_has_the_published_value():
    """3.730632 at (1, 1e-5), as other libraries test it, and OpenDP's is 8 % above."""
    assert analytic_sigma(1.0, 1e-5) == pytest.approx(3.730632, abs=5e-7)
    assert gaussian_sigma(1.0, 1e-5) == pytest.approx(4.045, abs=0.001)


def test_sigma_falls_with_epsilon_and_delta():
    """A weaker guarantee needs less noise."""
    for a, b in itertools.pairwise(np.geomspace(1e-2, 100, 8)):
        assert gaussian_sigma(a, 1e-5) > gaussian_sigma(b, 1e-5)
    for a, b in itertools.pairwise(np.geomspace(1e-12, 0.5, 8)):
        assert gaussian_sigma(2.0, a) > gaussian_sigma(2.0, b)


@pytest.mark.parametrize("clip", [None, 1.7])
def test_neighbouring_means_are_at_most_root_two_bounds_over_n_apart(clip):
    """For non-negative vectors; two without a common submodule reach the bound."""
    generator = np.random.default_rng(0)
    bound, n = clip or 1.0, 5
    others = generator.lognormal(size=(6, n - 1))
    worst = 0.0
    for _ in range(300):
        pair = generator.lognormal(0, 3, size=(2, 6, 1)) * (generator.random((2, 6, 1)) < 0.4)
        a, b = (bounded(np.concatenate([others, one], axis=1), clip).mean(axis=1) for one in pair)
        worst = max(worst, float(np.linalg.norm(a - b)))
    assert 0.95 * math.sqrt(2) * bound / n < worst <= math.sqrt(2) * bound / n * (1 + 1e-12)


def test_the_scale_is_chosen_with_its_epsilon():
    """One changed example moves no score by more than 1, for which the noise is set; the median is likeliest."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(1, 1, 40)
    scores = scale_scores(lengths, 0.7)
    for changed in (0.0, 1e-9, 3.0, 1e9):
        for i in range(40):
            neighbour = scale_scores(np.r_[changed, np.delete(lengths, i)], 0.7)
            assert np.abs(scores - neighbour).max() <= 1 + 1e-9
    lengths = generator.lognormal(1, 0.3, 4001)
    assert SCALES[scale_scores(lengths, 1.0).argmax()] == pytest.approx(math.e, rel=0.1)
    assert np.median([choose_scale(lengths, 1.0) for _ in range(50)]) == pytest.approx(math.e, rel=0.1)
    strayed = [abs(math.log10(choose_scale(lengths[:5], 0.01))) > 1 for _ in range(50)]
    assert 2 < sum(strayed) < 48, "with next to no epsilon the prior alone decides"


@pytest.mark.parametrize("clip", [None, 5.0])
def test_noise_has_the_stated_sigma_in_every_coordinate(clip, monkeypatch):
    """Over many releases, before postprocessing; means are unbiased."""
    monkeypatch.setattr("peft_blueprint.measure.privacy.shrink", lambda values, *_: values)
    norms, submodules = smooth_norms(400), rows()
    found, scales, sigma = [], [], 0.0
    for _ in range(200):
        values, said = release(norms, submodules, Privacy(epsilon=8.0, delta=1e-5, clip=clip))
        scales.append(said.get("scale", 1.0))
        found.append(values / scales[-1])
        sigma = said["sigma"]
    expected = gaussian_sigma(8.0 * (1 if clip else 0.9), 1e-5, math.sqrt(2) * (clip or 1) / 400)
    assert sigma == pytest.approx(expected, rel=1e-5)
    assert np.std(found, axis=0).mean() == pytest.approx(sigma, rel=0.06)  # 24 · 200 draws: 1 % is one standard error
    assert np.mean(found, axis=0) == pytest.approx(bounded(norms, clip).mean(axis=1), abs=6 * sigma / math.sqrt(200))
    if clip is None:
        assert np.median(scales) == pytest.approx(np.median(np.linalg.norm(norms, axis=0)), rel=0.1)


def test_the_noise_of_a_release_is_normal_and_its_own_in_every_coordinate():
    """In one release of many coordinates the noise is normal, and no two coordinates share it."""
    submodules = [Submodule(str(i), kind=str(i)) for i in range(4000)]  # kinds of one are not shrunk
    norms = np.full((4000, 100), 1.0)
    values, said = release(norms, submodules, Privacy(epsilon=8.0, delta=1e-5, clip=200.0))
    z = (values - 1.0) / said["sigma"]
    above = z > -1.0 / said["sigma"] + 0.2  # smaller ones were raised to the floor
    assert len(set(z[above])) == above.sum()
    assert abs(np.median(z)) < 0.1 and (z > 1).mean() == pytest.approx(stats.norm.sf(1), abs=0.03)


def test_shrinking_takes_noise_away_and_leaves_signal():
    """Along smooth norms the error halves at least; without noise to speak of nothing changes; means stay."""
    submodules = rows(kinds=2, depth=32)
    truth = smooth_norms(1, kinds=2, depth=32)[:, 0]
    generator = np.random.default_rng(0)
    noisy = truth + 0.3 * generator.standard_normal((50, len(truth)))
    shrunk = np.array([shrink(values, submodules, 0.3) for values in noisy])
    assert ((shrunk - truth) ** 2).mean() < 0.5 * ((noisy - truth) ** 2).mean()
    assert shrunk[0, :32].mean() == pytest.approx(noisy[0, :32].mean())
    assert shrink(noisy[0], submodules, 1e-6) == pytest.approx(noisy[0], abs=1e-4)


def test_no_seed_is_honoured_under_a_guarantee():
    """The noise comes from the operating system, not from a seed that a reader could know."""
    with pytest.raises(BlueprintError, match="noise of a guarantee comes from the operating system"):
        release(smooth_norms(100), rows(), Privacy(epsilon=1.0, delta=1e-5), np.random.default_rng(0))
    np.random.seed(0)
    torch.manual_seed(0)
    first = private_blueprint(seed=0)
    torch.manual_seed(0)
    np.random.seed(0)
    second = private_blueprint(seed=0)
    assert all(a.gradient_norm != b.gradient_norm for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("privacy", [WIDE, Privacy(epsilon=200.0, delta=0.01, clip=3.0), Privacy(noise=0.1)])
@pytest.mark.parametrize("domains", [1, 2])
def test_a_private_file_has_only_the_listed_keys(privacy, domains):
    """Every key of the finished file is on the list, so that new statistics are not released by accident."""
    batches = {"maths": toy_batches(), "code": toy_batches(seed=1)} if domains == 2 else toy_batches()
    private = private_blueprint(privacy, batches, data="toys", command="type this")
    record = json.loads(json.dumps(to_dict(private)))
    assert record.keys() <= TOP
    assert set().union(*(entry.keys() for entry in record["layers"])) <= ENTRY
    provenance = record["provenance"]
    assert provenance.keys() <= PROVENANCE
    assert all(of.keys() == {"examples"} for of in provenance["domains"].values())
    said = provenance["privacy"]
    if privacy.is_guaranteed:
        assert said.keys() <= STATEMENT
        assert all(of.keys() <= STATEMENT_OF_DOMAIN for of in said["domains"].values())
        assert (said["epsilon"], said["delta"]) == (200.0, 0.01)
    else:
        assert said.keys() == {"mechanism", "noise", "sigma_is", "guarantee", "domains"}
        assert said["guarantee"] == "none"
    assert len(said["domains"]) == domains
    # what is concluded is concluded from released norms
    bare = [Submodule(entry.name, entry.gradient_norm, kind=entry.kind) for entry in private]
    assert record["concentration"] == json.loads(json.dumps(concentration(bare)))
    if domains == 2:
        assert {tuple(entry.domain_tags) for entry in private} == {("maths", "code")}
        assert {entry.domain_tags["maths"] for entry in private} == {1.0}
        assert len({entry.domain_tags["code"] for entry in private}) > 1


def test_with_little_noise_it_is_the_blueprint_one_would_have_had(blueprint):
    """Ranks and weights' norms are those without privacy, and norms about; and it is read back from its file."""
    private = private_blueprint(Privacy(epsilon=5e3, delta=0.01), model=tiny_llama(layers=12))
    assert check_drift(private, blueprint, draws=2).correlation > 0.9
    ratios = [a.gradient_norm / b.gradient_norm for a, b in zip(private, blueprint, strict=True)]
    assert 0.5 < min(ratios) and max(ratios) < 2
    assert [e.weight_norm for e in private] == [e.weight_norm for e in blueprint]


def test_it_is_read_back_from_its_file(tmp_path):
    """A private file is a blueprint like any other."""
    private = private_blueprint()
    assert Blueprint.from_pretrained(private.save(tmp_path)) == private


def test_noise_alone_is_a_share_of_the_kinds_mean():
    """Its standard deviation agrees with the file."""
    submodules, norms = rows(), smooth_norms(20)
    generator = np.random.default_rng(0)
    found = [release(norms, submodules, Privacy(noise=0.05), generator)[0] for _ in range(500)]
    means = norms.mean(axis=1).reshape(3, 8).mean(axis=1)
    assert np.std(found, axis=0).reshape(3, 8).mean(axis=1) == pytest.approx(0.05 * means, rel=0.06)


def test_under_a_guarantee_a_column_depends_on_its_example_alone():
    """Other examples of the batch do not change its norms by one bit."""
    model = tiny_llama(layers=2)
    long, short = toy_batches(examples=1, length=40, padding="none")[0], toy_batches(examples=1, seed=3)[0]
    joined = {key: torch.cat([torch.nn.functional.pad(short[key], (0, 28)), long[key]]) for key in short}
    joined["labels"][0, 12:] = -100
    alone = measure_influence(model, one_by_one([short]), progress=False).norms[:, 0]
    beside = measure_influence(model, one_by_one([joined]), progress=False).norms[:, 0]
    assert torch.equal(alone, beside)
    turned = {key: value.flip(1) for key, value in joined.items()}  # padded on the left
    assert [len(example["labels"][0]) for example in one_by_one([turned])] == [int(short["attention_mask"].sum()), 40]


def test_a_guaranteed_files_rows_do_not_depend_on_the_examples():
    """A weight that no example reached has its entry, as in any other file of the model."""
    model = tiny_llama(layers=2)
    unused = model.model.layers[1].self_attn.q_proj
    unused.register_forward_hook(lambda module, args, output: output.detach())
    name = "model.layers.1.self_attn.q_proj"
    usual = generate_blueprint(model, toy_batches(), progress=False)
    private = private_blueprint(model=model)
    assert name not in usual.names and name in private.names
    assert len(private) == len(usual) + 1


def in_a_process(rank, folder, model, influence):
    """Return the release by one of two processes of their common measurement."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    entries, _ = _released({"": influence}, model, GenerateOptions(), WIDE, process_count())
    (folder / f"{rank}.json").write_text(json.dumps([entry.gradient_norm for entry in entries]))
    dist.destroy_process_group()


def test_several_processes_release_the_same_noise_once(tmp_path):
    """Two processes that measured together publish one blueprint; apart they would draw different noise."""
    model = tiny_llama(layers=2)
    influence = measure_influence(model, toy_batches(), progress=False)
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=in_a_process, args=(i, tmp_path, model, influence)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone, _ = _released({"": influence}, model, GenerateOptions(), WIDE, 1)
    assert first != [entry.gradient_norm for entry in alone]


def test_too_much_noise_is_noted():
    """A release whose differences are noise warns, and its statement has no reliability."""
    with pytest.warns(UserWarning, match="the rest is noise: ranks mean little"):
        values, said = release(smooth_norms(10), rows(), Privacy(epsilon=0.1, delta=1e-6))
    assert said["reliability"] < 0.5 and (values > 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs noise, or epsilon and delta"),
        ({"epsilon": 1.0}, "A guarantee needs both"),
        ({"delta": 1e-5}, "A guarantee needs both"),
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon must be positive, such as 4, got 0.0"),
        ({"epsilon": math.nan, "delta": 1e-5}, "epsilon must be positive, such as 4, got nan"),
        ({"epsilon": 1.0, "delta": 0.0}, r"delta must be in \(0, 1\), such as 1e-5, got 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, r"delta must be in \(0, 1\), such as 1e-5, got 1.0"),
        ({"epsilon": 1.0, "delta": 1e-5, "noise": 0.1}, "Give one or the other"),
        ({"epsilon": 1.0, "delta": 1e-5, "clip": 0.0}, "clip must be positive.*got clip=0.0"),
        ({"noise": 0.1, "clip": 1.0}, "got clip=1.0, epsilon=None"),
        ({"noise": -0.1}, "noise must be a number of at least 0, such as 0.1, got -0.1"),
    ],
)
def test_impossible_guarantees_are_errors(options, message):
    """Each error names the given and the allowed values."""
    with pytest.raises(BlueprintError, match=message):
        Privacy(**options)


@pytest.mark.parametrize(
    "norms, privacy, message",
    [
        (np.ones((24, 1)), Privacy(noise=0.1), "at least 2 examples, better hundreds, got 1"),
        (np.ones((24, 100)), Privacy(epsilon=1.0, delta=0.01), "far below 1/100, such as 1e-05"),
        (np.ones((3, 100)), Privacy(noise=0.1), r"got shape \(3, 100\) and 24 submodules"),
        (-np.ones((24, 100)), Privacy(noise=0.1), "negative, infinite or NaN"),
        (np.full((24, 100), np.nan), WIDE, "negative, infinite or NaN"),
    ],
)
def test_unreleasable_data_is_an_error(norms, privacy, message):
    """Too few examples, a delta that would give one away, and norms that are none."""
    with pytest.raises(MeasurementError, match=message):
        release(norms, rows(), privacy)


def test_numbers_out_of_range_are_errors():
    """Of the calibration too."""
    with pytest.raises(BlueprintError, match="sensitivity must be positive, got 0.0"):
        gaussian_sigma(1.0, 1e-5, 0.0)
    with pytest.raises(BlueprintError, match=r"delta must be in \(0, 1\), such as 1e-5, got 2"):
        gaussian_sigma(1.0, 2)
    with pytest.raises(BlueprintError, match="OpenDP cannot calibrate noise for epsilon=100000"):
        gaussian_sigma(1e5, 1e-5)


def test_a_guarantee_without_opendp_is_an_error_before_anything_is_measured(monkeypatch):
    """It names the extra; noise without a guarantee needs no extra."""
    monkeypatch.setitem(sys.modules, "opendp.prelude", None)
    with pytest.raises(BlueprintError, match=r"needs OpenDP. Run: pip install 'peft-blueprint\[privacy\]'"):
        generate_blueprint(None, {"": []}, privacy=WIDE)
    assert private_blueprint(Privacy(noise=0.1)).provenance["privacy"]["guarantee"] == "none"
