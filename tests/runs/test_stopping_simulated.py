"""The marginal-return rule on simulated learning curves, fixed seeds. Run: pytest tests/runs/test_stopping_simulated.py

The curves are those on which the defaults were chosen; `early_stop` replays transformers' EarlyStoppingCallback.
"""

import numpy as np
import pytest

from peft_blueprint.runs.stopping import MarginalReturn


FLAT = {
    "exponential": lambda t: 1.5 + np.exp(-t / 0.06),
    "fine-tuning": lambda t: 1.9 + 0.15 * np.exp(-t / 0.08),
    "overfitting": lambda t: 1.6 + 0.8 * np.exp(-t / 0.08) + 0.5 * np.maximum(0, t - 0.25),
    "noise": lambda t: 2.0 + 0 * t,
}
FALLING = {
    "power 0.1": lambda t: 3 * t**-0.1,
    "power 0.05": lambda t: 3 * t**-0.05,
    "power over a floor": lambda t: 1.9 + 0.35 * t**-0.3,
}


def early_stop(metrics, patience=3):
    """The evaluation at which EarlyStoppingCallback stops: `patience` in a row without a new best."""
    best, waited = np.inf, 0
    for i, metric in enumerate(metrics):
        best, waited = (metric, 0) if metric < best else (best, waited + 1)
        if waited == patience:
            return i
    return len(metrics) - 1


def marginal_stop(metrics):
    """The evaluation at which the rule stops, at a constant learning rate."""
    machine, n = MarginalReturn(), len(metrics)
    for i, metric in enumerate(metrics):
        if machine.check((i + 1) / n, metric, learning_rate=1e-3, progress=(i + 1) / n).stop:
            return i
    return n - 1


def replayed(curve, rule, evaluations, sigma, seeds):
    """Share of the resource saved and of the final metric lost, without the noise, one per seed."""
    t = np.arange(1, evaluations + 1) / evaluations
    clean = curve(t)
    saved, lost = [], []
    for seed in range(seeds):
        at = rule(clean * (1 + np.random.default_rng(seed).normal(0, sigma, evaluations)))
        saved.append(1 - t[at])
        lost.append(clean[at] / clean[-1] - 1)
    return np.array(saved), np.array(lost)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize(("evaluations", "sigma"), [(30, 0.0005), (60, 0.002)])
def test_on_curves_with_a_flat_tail_a_third_is_saved_for_a_percent(name, evaluations, sigma):
    """At least 30 % of the resource on average, and in no run more than 1 % of the final metric."""
    saved, lost = replayed(FLAT[name], marginal_stop, evaluations, sigma, seeds=5)
    assert saved.mean() >= 0.3 and lost.max() <= 0.01


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.parametrize("evaluations", [20, 60, 200])
def test_curves_that_still_fall_are_run_to_their_end(name, evaluations):
    """However often they are looked at, and under noise of half a percent."""
    saved, _ = replayed(FALLING[name], marginal_stop, evaluations, 0.005, seeds=2)
    assert saved.max() == 0


@pytest.mark.parametrize("name", FALLING)
def test_early_stopping_is_misled_by_noise_where_the_rule_is_not(name):
    """Three evaluations without a new best come by chance: it gives up several percent of curves that still fall."""
    saved, lost = replayed(FALLING[name], early_stop, 60, 0.01, seeds=5)
    ours, given_up = replayed(FALLING[name], marginal_stop, 60, 0.01, seeds=5)
    assert saved.mean() > 0.2 and lost.mean() > 0.015
    assert ours.mean() < 0.05 and given_up.mean() < 0.005


def test_early_stopping_waits_on_a_plateau_that_creeps():
    """Without noise every evaluation of a flattening curve is a new best, so that it never stops, and the rule does."""
    t = np.arange(1, 51) / 50
    creeping = 1.5 + np.exp(-t / 0.06)
    assert early_stop(creeping) == 49 and marginal_stop(creeping) < 32


def quadratic(kind, steps, *, peak, noise, power, decay):
    """Learning rates and losses of SGD on a noisy quadratic (Zhang et al., 2019), in expectation.

    200 directions of curvature k^-decay, each with its share k^(-power) of the excess loss at the start. Gradient noise
    keeps a loss in proportion to the rate, so that a rate that falls to nought lowers the loss by itself.
    """
    done = (np.arange(steps) + 0.5) / steps
    after = np.clip((done - 0.04) / 0.96, 0, 1)
    fall = {"linear": 1 - after, "cosine": (1 + np.cos(np.pi * after)) / 2}[kind]
    rates = peak * np.minimum(1, done / 0.04) * fall
    k = np.arange(1.0, 201.0)
    curvature = k**-decay
    variance, losses = 0.5 * k**-power / curvature, []
    for rate in rates:
        variance = (1 - rate * curvature) ** 2 * variance + rate**2 * curvature * noise
        losses.append(1.5 + 0.5 * float(curvature @ variance))
    return rates, losses


EASY = {"peak": 1.0, "noise": 0.02, "power": 2.0, "decay": 0.8}
NOISY = {"peak": 0.5, "noise": 0.1, "power": 2.0, "decay": 1.0}
LONG = {"peak": 0.5, "noise": 0.0, "power": 1.0, "decay": 1.2}


def proposals(kind, problem, steps=400):
    """Every share proposed along a run that is evaluated 50 times, which is never stopped; and its final loss."""
    rates, losses = quadratic(kind, steps, **problem)
    machine, shares = MarginalReturn(), []
    for i in range(steps // 50 - 1, steps, steps // 50):
        found = machine.check(i + 1, losses[i], learning_rate=rates[i], progress=(i + 1) / steps)
        assert not found.stop
        shares += [] if found.proposed_progress is None else [found.proposed_progress]
    return shares, losses[-1]


@pytest.mark.parametrize("problem", [EASY, NOISY], ids=["easy", "noisy"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_proposed_schedule_loses_no_more_than_a_percent_when_it_is_run(kind, problem):
    """Learnt long before the end: under noise the loss even looks flat at the highest rate, and falls with the rate."""
    shares, final = proposals(kind, problem)
    assert problem is NOISY and kind == "linear" or min(shares) <= 0.7
    for share in {min(shares, default=1.0), max(shares, default=1.0)}:
        shorter = quadratic(kind, round(400 * share), **problem)[1][-1]
        assert shorter / final - 1 <= 0.01


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_no_shorter_schedule_is_proposed_where_the_whole_is_needed(kind):
    """Half of this schedule would lose 7 %."""
    assert proposals(kind, LONG)[0] == []
