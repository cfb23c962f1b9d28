"""Statements on tails are right, and undecided where the data do not decide. Run: pytest tests/measure/test_concentration.py"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.measure.concentration import (
    Fit,
    _best_tails,
    _judge,
    entries_report,
    normalize_within,
    tail_report,
)
from peft_blueprint.measure.summary import concentration
from tests.records import from_json, to_json


FEW = 100  # resamples, the fewest allowed


def power_law(n, alpha, seed):
    """Values drawn from the Pareto law whose rank-size exponent is alpha."""
    return np.random.default_rng(seed).uniform(size=n) ** -alpha


def verdicts(draw, n, seeds):
    return [tail_report(draw(np.random.default_rng(seed), n), resamples=FEW).verdict for seed in range(seeds)]


@pytest.fixture(scope="module")
def reports():
    """Of 40 power laws of 200 values with alpha 0.25, whose Gini coefficient is 1/7 and whose top share 0.1^0.75."""
    return [tail_report(power_law(200, 0.25, seed), resamples=FEW) for seed in range(40)]


def test_alpha_is_recovered_within_its_standard_error(reports):
    """Both estimates have about no bias, and their spread is the error stated, though x_min is estimated too."""
    for name in ("alpha", "alpha_rank"):
        fits = [getattr(report, name) for report in reports]
        z = np.array([(fit.exponent - 0.25) / fit.error for fit in fits])
        assert abs(np.mean(z)) < 0.5 and 0.6 < np.std(z) < 1.4, name
    assert all(report.alpha.n == report.n_tail <= report.n == 200 for report in reports)


@pytest.mark.parametrize("power", [0.2, 3.0, 12.0])
def test_alpha_is_the_rank_size_exponent_however_large(power):
    """Values to a power have alpha times that power, and all tests come out the same; no exponent is out of reach."""
    one = tail_report(power_law(80, 0.5, 0), resamples=FEW)
    other = tail_report(power_law(80, 0.5, 0) ** power, resamples=FEW)
    assert other.alpha.exponent == pytest.approx(power * one.alpha.exponent)
    assert other.alpha.error == pytest.approx(power * one.alpha.error)
    assert (other.n_tail, other.p_value, other.verdict) == (one.n_tail, one.p_value, one.verdict)
    assert other.likelihood_ratio == pytest.approx(one.likelihood_ratio, abs=1e-6)


def test_a_power_law_is_rejected_as_seldom_as_p_says(reports):
    """Of 40 true ones about a tenth have p of at most 0.1, and most are called by their name, none by the other."""
    assert sum(report.p_value <= 0.1 for report in reports) <= 10
    named = [report.verdict for report in reports]
    assert named.count("power law") > 24 and named.count("lognormal") == 0


def test_intervals_hold_the_truth_about_as_often_as_they_say(reports):
    """Almost always where values are evenly spread, and of this heavy tail less often, as the docstring admits."""
    even = [tail_report(np.random.default_rng(s).uniform(size=40), resamples=FEW) for s in range(40)]
    for name, truth, held in (("gini", 1 / 7, 0.7), ("top_share", 0.1**0.75, 0.6)):
        estimates = [getattr(report, name) for report in reports]
        assert all(e.low <= e.value <= e.high for e in estimates)
        assert held <= np.mean([e.low <= truth <= e.high for e in estimates]) <= 1, name
    for name, truth in (("gini", 1 / 3), ("top_share", 0.19)):
        assert np.mean([getattr(r, name).low <= truth <= getattr(r, name).high for r in even]) >= 0.85, name


def test_a_lognormal_is_not_called_a_power_law():
    """Other curved tails too: a good fit is not enough, the likelihood ratio must favour the law."""
    for draw in (
        lambda rng, n: rng.lognormal(0, 1, n),
        lambda rng, n: rng.lognormal(0, 3, n),
        lambda rng, n: rng.weibull(0.5, n),
        lambda rng, n: np.exp(rng.normal(0, 0.3, n) + 0.7 * rng.integers(0, 4, n)),
    ):
        assert "power law" not in verdicts(draw, 210, 4)


def test_an_exponential_sample_is_given_neither_name():
    """The law is "neither" or undecided."""
    said = verdicts(lambda rng, n: rng.exponential(size=n), 210, 8)
    assert {*said} == {"neither", "cannot tell"}


def test_a_clear_lognormal_is_named():
    """Where x_min keeps enough values for the curve to show; most samples are undecided."""
    assert verdicts(lambda rng, n: rng.lognormal(0, 1, n), 210, 2) == ["lognormal", "cannot tell"]


def test_values_of_neither_law_are_reported_so():
    """Evenly spread values end abruptly."""
    assert verdicts(lambda rng, n: rng.uniform(1, 2, n), 2000, 4).count("neither") >= 2


def test_a_power_law_is_seen_above_another_body():
    """With a body that is none, x_min is found between, and the tail's exponent."""
    rng = np.random.default_rng(0)
    report = tail_report(np.append(power_law(800, 0.7, 0), rng.uniform(0.2, 1, 1200)), resamples=FEW)
    assert report.verdict == "power law"
    assert 0.8 < report.x_min < 1.5 and 500 < report.n_tail < 1000
    assert abs(report.alpha.exponent - 0.7) < 3 * report.alpha.error < 0.2


@pytest.mark.parametrize("n", [1, 5, 12, 30, 49])
def test_few_values_do_not_decide(n):
    """Below 50 values no law is named, however straight the line; the concentration is still reported."""
    report = tail_report(power_law(n, 1.0, 1), resamples=FEW)
    assert report.verdict == "cannot tell"
    assert ("50 are needed" if n > 10 else "no tail to fit") in report.reason
    assert 1 <= report.effective_number.value <= n


@pytest.mark.parametrize(
    ("n", "p", "lognormal_p", "ratio", "ratio_p", "verdict"),
    [
        (200, 0.5, 0.01, 9, 0.01, "power law"),
        (200, 0.5, 0.5, 9, 0.1, "power law"),
        (200, 0.5, 0.5, 9, 0.11, "cannot tell"),
        (200, 0.5, 0.01, 1, 0.6, "cannot tell"),
        (200, 0.1, 0.5, 9, 0.01, "cannot tell"),
        (200, 0.01, 0.5, -9, 0.01, "lognormal"),
        (200, 0.5, 0.5, -9, 0.01, "lognormal"),
        (200, 0.5, 0.05, -9, 0.01, "cannot tell"),
        (200, 0.1, 0.1, 9, 0.01, "neither"),
        (49, 0.5, 0.01, 9, 0.01, "cannot tell"),
        (49, 0.01, 0.01, 9, 0.01, "cannot tell"),
    ],
)
def test_a_law_is_named_that_fits_and_is_significantly_likelier(n, p, lognormal_p, ratio, ratio_p, verdict):
    """The rules of `tail_report`, one by one."""
    assert _judge(n, p, lognormal_p, ratio, ratio_p)[0] == verdict


def test_x_min_is_where_the_distance_is_smallest():
    """By trying each of them with scipy's Kolmogorov-Smirnov distance."""
    values = np.sort(np.random.default_rng(3).lognormal(0, 1, 60))
    excesses = [np.log(values[i:] / values[i]) for i in range(51)]
    distances = [stats.kstest(e, stats.expon(scale=e.mean()).cdf).statistic for e in excesses]
    (size,), (alpha,), (distance,) = _best_tails(np.log(values)[None])
    assert size == 60 - np.argmin(distances)
    assert (alpha, distance) == pytest.approx((excesses[60 - size].mean(), min(distances)))


def test_equal_values_are_in_the_tail_together():
    """Norms of a coarse type repeat; the tail is all values from x_min on, and so in the bootstrap."""
    values = np.round(power_law(200, 0.4, 5), 1)
    report = tail_report(values, resamples=FEW)
    assert report.n_tail == (values >= report.x_min).sum()


@pytest.mark.parametrize("values", [power_law(150, 0.5, 2), np.random.default_rng(2).lognormal(0, 1, 150)])
def test_the_likelihood_ratio_is_that_of_the_best_of_each_law(values):
    """A general optimiser finds the same censored lognormal, and the power law has its share of the values."""
    report = tail_report(values, resamples=FEW)
    logs, n, m = np.log(values[values >= report.x_min]), 150, report.n_tail
    start = math.log(report.x_min)

    def lognormal(parameters):
        law = stats.norm(parameters[0], math.exp(parameters[1]))
        return -law.logpdf(logs).sum() - (n - m) * law.logcdf(start)

    best = -optimize.minimize(lognormal, [0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).fun
    alpha = report.alpha.exponent
    power = stats.expon(start, alpha).logpdf(logs).sum() + m * math.log(m / n)
    power += (n - m) * math.log(1 - m / n) if m < n else 0
    assert report.likelihood_ratio == pytest.approx(power - best, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_powerlaw_package_agrees():
    """Above the same x_min: the exponent, its textbook error, and the distance but for the step it leaves out."""
    powerlaw = pytest.importorskip("powerlaw")
    values = np.append(power_law(300, 0.8, 4), np.random.default_rng(4).uniform(0.1, 1, 200))
    ours = tail_report(values, resamples=FEW)
    theirs = powerlaw.Fit(values, xmin=ours.x_min, verbose=0)
    assert ours.alpha.density_exponent == pytest.approx(theirs.power_law.alpha)
    logs = np.sort(np.log(values[values >= ours.x_min]))[None]
    assert _best_tails(logs)[2][0] <= theirs.power_law.D + 1 / ours.n_tail
    chosen = powerlaw.Fit(values, verbose=0)
    assert 1 / (chosen.power_law.alpha - 1) == pytest.approx(ours.alpha.exponent, abs=ours.alpha.error)


@pytest.mark.parametrize(
    ("values", "gini", "effective"),
    [
        (np.ones(40), 0, 40),
        ([0.0] * 39 + [2.0], 39 / 40, 1),
        ([1, 3], 0.25, 1.6),
        (np.arange(1, 2001) - 0.5, 1 / 3, 1500),
        ([7], 0, 1),
    ],
    ids=["equal", "one holds all", "by hand", "uniform", "single"],
)
def test_known_concentrations(values, gini, effective):
    """Gini's coefficient and the effective number where both have a closed form."""
    report = tail_report(values, resamples=FEW)
    assert report.gini.value == pytest.approx(gini, abs=1e-3)
    assert report.effective_number.value == pytest.approx(effective, rel=1e-3)


def test_the_top_share_is_of_the_largest_tenth():
    """In any order, and linear between whole numbers of values."""
    assert tail_report([1, 1, 1, 1, 1, 6, 1, 1, 1, 1], resamples=FEW).top_share.value == pytest.approx(0.4)
    assert tail_report([4, 2, 3, 1, 10], resamples=FEW).top_share.value == pytest.approx(0.5 * 10 / 20)
    assert tail_report([0] * 14 + [4, 6], resamples=FEW).top_share.value == pytest.approx((6 + 0.6 * 4) / 10)


@settings(max_examples=8, deadline=None)
@given(st.integers(-60, 60), st.integers(0, 5))
def test_only_x_min_depends_on_the_unit(exponent, seed):
    """Norms in other units have the same report."""
    values = np.random.default_rng(seed).lognormal(0, 1, 60)
    one, other = tail_report(values, resamples=FEW), tail_report(values * 2.0**exponent, resamples=FEW)
    for name in ("gini", "top_share", "effective_number"):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value)
    assert other.x_min == pytest.approx(one.x_min * 2.0**exponent)
    assert (one.n_tail, one.p_value, one.verdict) == (other.n_tail, other.p_value, other.verdict)


def test_zeros_count_in_the_concentration_and_not_in_the_fits():
    """A submodule without a gradient raises the concentration, and has no logarithm to fit."""
    values = power_law(60, 0.5, 0)
    without, report = tail_report(values, resamples=FEW), tail_report([*values, *np.zeros(60)], resamples=FEW)
    assert report.zeros == 60 and report.gini.value == pytest.approx(0.5 + 0.5 * without.gini.value)
    assert (report.x_min, report.alpha.exponent) == (without.x_min, without.alpha.exponent)


def test_a_sample_of_a_submodules_entries_agrees_with_all():
    """Signs do not matter, zeros are dropped and counted, and a sample by seed agrees with all entries."""
    rng = np.random.default_rng(0)
    gradient = (power_law(60_000, 0.5, 1) * rng.choice([-1.0, 1.0], 60_000)).reshape(300, 200)
    gradient[:10] = 0
    report = entries_report(gradient, sample=1000, resamples=FEW)
    assert (report.n, report.of, report.zeros) == (1000, 60_000, 2000)
    assert report == entries_report(-gradient.ravel(), sample=1000, resamples=FEW)
    assert report.x_min != entries_report(gradient, sample=1000, resamples=FEW, seed=1).x_min
    assert report.verdict == "power law" and abs(report.alpha.exponent - 0.5) < 3 * report.alpha.error
    assert entries_report(gradient[10:12], resamples=FEW).n == 400


def test_kinds_are_put_on_one_scale():
    """Each value over the mean of its kind; a kind that is all zero stays so, and None is a kind."""
    scaled = normalize_within([1, 3, 10, 30, 0, 5], ["q", "q", "up", "up", "gate", None])
    assert scaled == pytest.approx([0.5, 1.5, 0.5, 1.5, 0, 1])


def test_a_report_can_be_read_and_published():
    """The text says the numbers and the verdict; the mapping is JSON, and has no key without a value."""
    report = tail_report(power_law(210, 0.5, 0), resamples=FEW)
    text = str(report)
    assert text.endswith(f"{report.verdict}: {report.reason}") and f"alpha {report.alpha.exponent:.2f} ±" in text
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["gini"] == {"value": report.gini.value, "low": report.gini.low, "high": report.gini.high}
    few = tail_report([1, 2, 3], resamples=FEW)
    assert "alpha" not in few.to_dict() and str(few).count("\n") == 1
    assert Fit(0.5, 0.1, 50).density_exponent == 3


def test_a_blueprint_carries_the_reports():
    """Of the norms as they are and, where there are several kinds, within kinds; and they survive a file."""
    norms = power_law(60, 0.5, 0)
    entries = [
        Submodule(f"m.{i}", gradient_norm=float(norm) * (9 if i % 2 else 1), kind="qk"[i % 2])
        for i, norm in enumerate(norms)
    ]
    found = concentration(entries)
    assert found["tail"]["effective_number"]["value"] < found["tail_within_kinds"]["effective_number"]["value"] <= 60
    assert found["tail"]["verdict"] == tail_report([e.gradient_norm for e in entries], resamples=500).verdict
    blueprint = Blueprint(model_id="org/model", submodules=tuple(entries), concentration=found)
    assert from_json(to_json(blueprint)).concentration == found
    assert "tail_within_kinds" not in concentration(entries[::2])


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (lambda: tail_report([]), "values must not be empty"),
        (lambda: tail_report([1.0, math.nan]), "Value 1 is nan, which is not finite. Give measured norms"),
        (lambda: tail_report([1.0, 2.0, math.inf]), "Value 2 is inf, which is not finite"),
        (lambda: tail_report([1.0, -2.0]), "Value 1 is -2.0, which is negative"),
        (lambda: tail_report(np.zeros(5)), "All 5 values are zero.*Check the data"),
        (lambda: tail_report([1.0], resamples=99), "resamples must be at least 100, got 99"),
        (lambda: entries_report([]), "values must not be empty"),
        (lambda: entries_report([[1.0, math.nan]]), "Value 1 is nan"),
        (lambda: entries_report(np.zeros((2, 3))), "All 6 values are zero"),
        (lambda: entries_report([1.0], sample=0), "sample must be a positive integer, got 0"),
        (lambda: normalize_within([1.0, 2.0], ["q"]), "got 2 values and 1 kinds"),
    ],
)
def test_values_that_cannot_be_described_are_named(report, message):
    """Each error names the fault and the fix."""
    with pytest.raises(BlueprintError, match=message):
        report()
