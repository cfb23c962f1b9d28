"""The marginal-return rule, case by case. Run: pytest tests/runs/test_stopping.py"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_blueprint.errors import BlueprintError, FormatError, MismatchError
from peft_blueprint.runs.stopping import MarginalReturn
from peft_blueprint.runs.trend import noise, phase, spent_rate, trend, windows


FLAT = [2.0, 1.5, 1.2, 1.1] + [1.0] * 16  # twenty evaluations
FALLING = [3 * (i + 1) ** -0.1 for i in range(20)]


def feed(machine, metrics, rates=None, budget=100.0, until_stop=True, start=0):
    """Every decision on a curve with a check at equal shares of the budget, up to the first that stops."""
    found = []
    for i, metric in enumerate(metrics, start=start):
        done = (i + 1) / (len(metrics) + start)
        rate = None if rates is None else rates[i - start]
        found.append(machine.check(budget * done, metric, step=10 * (i + 1), learning_rate=rate, progress=done))
        if until_stop and found[-1].stop:
            break
    return found


def test_a_flat_curve_stops_after_patience_checks_and_says_why():
    """The five evaluations of the window are flat at the 9th; the third such check is the 11th."""
    last = feed(MarginalReturn(), FLAT, [1e-3] * 20)[-1]
    assert last.stop and last.below == 3 and last.proposal is None
    assert last.ratio == pytest.approx(0.0, abs=1e-12) and last.expected == pytest.approx(0.0, abs=1e-10)
    assert last.reason.startswith("Stopped at step 110. Over the last 5 evaluations the metric")
    assert "for the 3rd check in a row" in last.reason and "the next 10 % of the budget was expected" in last.reason


def test_a_curve_that_still_falls_is_never_stopped():
    """A power law far from its floor."""
    found = feed(MarginalReturn(), FALLING, [1e-3] * 20)
    assert len(found) == 20 and not any(decision.below for decision in found)
    assert "above the threshold" in found[-1].reason


def test_the_ratio_is_improvement_per_unit_of_the_resource():
    """On a straight line all is known: its slope, no error, and what a tenth of the budget buys."""
    last = feed(MarginalReturn(budget=400.0), [5 - 0.04 * i for i in range(10)], budget=200.0)[-1]
    assert last.ratio == pytest.approx(0.04 / 20) and last.error == pytest.approx(0, abs=1e-9)
    assert last.expected == pytest.approx(0.04 / 20 * 40)
    assert last.threshold == pytest.approx(0.002 * (5 - 0.36) / 40)


@pytest.mark.parametrize("curve", [FLAT, FALLING])
def test_maximize_is_the_mirror_of_minimize(curve):
    """Turned upside down, a curve is judged alike."""
    down = feed(MarginalReturn(threshold=1e-3), curve)
    up = feed(MarginalReturn(threshold=1e-3, direction="maximize"), [-metric for metric in curve])
    assert [(d.stop, d.ratio, d.below) for d in down] == [(d.stop, d.ratio, d.below) for d in up]


def test_a_threshold_is_taken_as_it_is():
    """The same line, 0.02 a unit, is above one threshold and below another."""
    line = [5 - 0.1 * i for i in range(20)]
    assert not feed(MarginalReturn(threshold=0.019), line)[-1].stop
    last = feed(MarginalReturn(threshold=0.021), line)[-1]
    assert last.stop and last.threshold == 0.021


def test_the_budget_is_given_or_follows_from_progress_or_cost():
    """`expected` is for a tenth of it."""
    line = [5 - 0.1 * i for i in range(10)]
    assert feed(MarginalReturn(), line)[-1].expected == pytest.approx(0.1)
    alone = MarginalReturn()
    for i, metric in enumerate(line):
        last = alone.check(10.0 * (i + 1), metric)
    assert last.expected == pytest.approx(0.1) and "another 10 % of the resource spent so far" in last.reason


def test_no_stop_before_enough_evaluations():
    """Not from fewer evaluations than the window, and not before a tenth of the budget is spent."""
    machine = MarginalReturn(budget=1000.0, patience=1)
    found = [machine.check(10.0 * i, 1.0) for i in range(1, 11)]
    assert [decision.stop for decision in found] == [False] * 9 + [True]
    assert found[0].ratio is None and "Too early to decide after 9 evaluations" in found[8].reason


def test_many_evaluations_are_judged_over_a_tenth_of_the_budget():
    """A window of five of a thousand evaluations would see noise alone."""
    values = np.random.default_rng(0).normal(0, 0.003, 1000) + [3 * ((i + 1) / 1000) ** -0.1 for i in range(1000)]
    assert not feed(MarginalReturn(), list(values))[-1].stop


def test_noise_does_not_stop_a_run():
    """A curve that falls by little, under noise that is larger: ten evaluations cannot tell, and it says so."""
    noisy = [2 - 0.004 * i + 0.03 * (-1) ** i for i in range(20)]
    last = feed(MarginalReturn(patience=1), noisy)[9]
    assert not last.stop and last.below == 0 and "Noise is too large to tell" in last.reason


def test_noise_is_averaged_away_where_there_is_more_to_see():
    """A wider window finds a noisy plateau that the shortest does not."""
    noisy = list(2 + np.random.default_rng(1).normal(0, 0.006, 40))
    last = feed(MarginalReturn(), noisy)[-1]
    assert last.stop and int(last.reason.split("Over the last ")[1].split()[0]) > 5


def test_a_check_that_pays_begins_the_count_anew():
    """A flat stretch, a fall, and a flat stretch again."""
    found = feed(MarginalReturn(patience=2), [1.0] * 8 + [0.5] + [0.5] * 11, until_stop=False)
    below = [decision.below for decision in found]
    assert below[4:8] == [1, 2, 3, 4] and below[8] == 0 and below[-1] > 2


def test_while_the_learning_rate_rises_checks_do_not_count():
    """Under warm-up nothing is held against the metric."""
    found = feed(MarginalReturn(), [2.0] * 20, [1e-4 * (i + 1) for i in range(20)])
    assert len(found) == 20 and not any(decision.below for decision in found)
    assert "the learning rate is rising" in found[-1].reason


@pytest.mark.parametrize("shape", [lambda p: 1 - p, lambda p: (1 + math.cos(math.pi * p)) / 2])
def test_under_a_decay_it_never_stops_but_proposes_a_shorter_schedule(shape):
    """A linear and a cosine decay, with a metric that was flat before the middle."""
    rates = [1e-3 * shape((i + 1) / 20) for i in range(20)]
    found = feed(MarginalReturn(), FLAT, rates)
    assert len(found) == 20 and found[-1].below > 3
    flat = [decision for decision in found if decision.proposal]
    assert flat and all(0.3 <= decision.proposed_progress <= 0.9 for decision in flat)
    assert "of the planned steps would do about as well" in flat[0].proposal and "Not stopped" in flat[0].reason


def test_a_stable_phase_is_stopped_and_its_decay_is_not():
    """WSD: the same flat curve, once while the rate is steady, once after it began to fall."""
    assert feed(MarginalReturn(), FLAT, [1e-3] * 15 + [8e-4, 6e-4, 4e-4, 2e-4, 0.0])[-1].stop
    assert not any(d.stop for d in feed(MarginalReturn(), FLAT, [1e-3] * 9 + [1e-3 * (1 - i / 11) for i in range(11)]))


@pytest.mark.parametrize("shape", [lambda p: 1 - p, lambda p: (1 + math.cos(math.pi * p)) / 2, lambda p: p**-0.5])
def test_the_switch_stops_under_a_decay_too(shape):
    """At the check at which a constant rate is stopped, without a proposal."""
    rates = [1e-3 * shape((i + 1) / 20) for i in range(20)]
    last = feed(MarginalReturn(stop_in_decay=True), FLAT, rates)[-1]
    assert last.stop and last.proposal is None and last.reason.startswith("Stopped at step 110.")
    assert "The learning rate was falling: the rest of its decay is missed." in last.reason


@pytest.mark.parametrize("stop_in_decay", [False, True])
@pytest.mark.parametrize("checks", [3, 7, 20, 200])
@pytest.mark.parametrize(
    "shape",
    [
        lambda p: 1.0,
        lambda p: 1 - p,
        lambda p: min(1.0, p / 0.4),
        lambda p: min(1.0, (1 - p) / 0.3),
        lambda p: p if p < 0.3 else 1 - p,
    ],
)
def test_the_forecast_holds_for_a_metric_that_never_pays(shape, checks, stop_in_decay):
    """The checks that it names are those that stop, under any schedule."""
    rule = MarginalReturn(threshold=1e9, stop_in_decay=stop_in_decay)
    rates = [shape((i + 1) / checks) for i in range(checks)]
    found = feed(MarginalReturn(**rule.settings()), [1.0 + i / 99 for i in range(checks)], rates, until_stop=False)
    stops = [i + 1 for i, decision in enumerate(found[:-1]) if decision.stop]
    said = rule.forecast(rates)
    assert said.startswith(f"MarginalReturn has {checks} checks in this run and ")
    if not stops:
        assert "cannot stop it. " in said, "with a reason"
        return
    spans = said.split("can stop it at check")[1].removeprefix("s").split(".")[0].split(", ")
    ends = [[int(number) for number in span.split(" to ")] for span in spans]
    assert [n for span in ends for n in range(span[0], span[-1] + 1)] == stops


@pytest.mark.parametrize(
    ("noise", "checks", "points", "says"),
    [
        (0.0, 20, 5, "Over the last 5 evaluations the metric"),
        (0.0, 200, 21, "Over the last 21 evaluations (window=5, widened to the last 10 % of the budget) the metric"),
        (0.03, 20, 20, "Over the last 20 evaluations (window=5, widened because of noise) the metric"),
    ],
)
def test_a_widened_window_is_noted(noise, checks, points, says):
    """In the reason and as a number: by many evaluations or by noise."""
    curve = [2 - 0.02 * i / checks + noise * (-1) ** i for i in range(checks)]
    last = feed(MarginalReturn(patience=1000), curve, until_stop=False)[-1]
    assert last.points == points and says in last.reason


def test_under_a_decay_past_its_best_the_shorter_schedule_ends_near_the_best():
    """Overfitting from a third on: the proposal is about the learning rate spent by then."""
    done = np.arange(1, 41) / 40
    curve = 1.5 + np.exp(-done / 0.06) + np.maximum(0, done - 0.33)
    last = feed(MarginalReturn(), list(curve), list(1e-3 * (1 - done)))[-1]
    assert not last.stop and 0.4 < last.proposed_progress < 0.65  # by 0.33, 1 - 0.67² = 0.55 of the rate is spent
    assert "The best was" in last.proposal


def test_a_metric_that_gets_worse_stops_and_the_best_is_named():
    """Overfitting is a negative return."""
    last = feed(MarginalReturn(), [2.0, 1.5, 1.2, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5])[-1]
    assert last.stop and last.ratio < 0 and "got worse" in last.reason and "The best was 1.1 at step 40" in last.reason


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_nan_is_not_used_and_stops_if_it_stays(wrong, direction):
    """One is passed over; as many in a row as patience are divergence, under any schedule."""
    machine = MarginalReturn(direction=direction)
    machine.check(1, 2.0, step=1, learning_rate=1.0)
    assert "and is not used" in machine.check(2, wrong, step=2, learning_rate=0.9).reason
    assert not machine.check(3, 1.9, step=3, learning_rate=0.8).stop
    found = [machine.check(3 + i, wrong, step=3 + i, learning_rate=0.7) for i in (1, 2, 3)]
    assert [decision.stop for decision in found] == [False, False, True]
    assert f"the metric is {wrong} for the 3rd check" in found[-1].reason and "The best was" in found[-1].reason
    json.dumps(machine.state_dict(), allow_nan=False)


def test_a_check_at_which_nothing_was_spent_changes_nothing():
    """As when a trainer evaluates twice at the same step."""
    once, twice = MarginalReturn(), MarginalReturn()
    for i, metric in enumerate(FLAT[:10], start=1):
        a = once.check(i, metric)
        b = twice.check(i, metric)
        idle = twice.check(i, metric - 1)
        assert a == b and (idle.below, idle.stop) == (b.below, b.stop) and "Nothing was spent since" in idle.reason
    assert once.state_dict() == twice.state_dict()


def test_a_resource_that_goes_back_is_refused_and_nothing_changes():
    """A tally that began anew after a resumption."""
    machine = MarginalReturn()
    machine.check(10, 1.0)
    before = machine.state_dict()
    with pytest.raises(BlueprintError, match="decreased from 10 to 3.*after a resumption load the rule's state"):
        machine.check(3, 1.0)
    assert machine.state_dict() == before


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"resource": math.nan}, "resource must be at least 0.*, got nan"),
        ({"resource": -1.0}, "resource must be at least 0.*, got -1.0"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0 or None, got -0.001"),
        ({"progress": 1.5}, "progress must be a share .*, got 1.5"),
    ],
)
def test_bad_checks_are_refused(call, says):
    """The error names the number and the allowed ones."""
    with pytest.raises(BlueprintError, match=says):
        MarginalReturn().check(**{"resource": 1.0, "metric": 1.0} | call)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"direction": "down"}, "direction must be 'minimize', 'maximize' or None, got 'down'"),
        ({"threshold": math.inf}, "threshold must be finite .*, got inf"),
        ({"worth": 0.0}, "worth must be a positive share .*, got 0.0"),
        ({"budget": -1.0}, "budget must be a positive amount .*, got -1.0"),
        ({"window": 2}, "window must be an integer of at least 3, got 2"),
        ({"patience": True}, "patience must be an integer of at least 1, got True"),
        ({"stop_in_decay": 1}, "stop_in_decay must be True or False, got 1"),
    ],
)
def test_bad_settings_are_refused(wish, says):
    """Each error names the allowed values."""
    with pytest.raises(BlueprintError, match=says):
        MarginalReturn(**wish)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_resumed_machine_decides_exactly_as_the_uninterrupted_one(data):
    """Any curve, any schedule, any split, through JSON."""
    metric = st.floats(-3, 3) | st.sampled_from([math.nan, 1.0])
    curve = data.draw(st.lists(metric, min_size=2, max_size=24))
    n = len(curve)
    rates = data.draw(st.sampled_from([None, [1e-3] * n, [1 - i / n for i in range(n)], [i / n for i in range(n)]]))
    split = data.draw(st.integers(0, n))
    wishes = {"direction": data.draw(st.sampled_from(["minimize", "maximize"])), "window": 3, "patience": 2}
    whole, first = MarginalReturn(**wishes), MarginalReturn(**wishes)
    second = MarginalReturn(**json.loads(json.dumps(first.settings())))

    def go(machine, indices):
        return [
            machine.check(i * 0.1, curve[i], step=i, learning_rate=rates and rates[i], progress=i / n) for i in indices
        ]

    uninterrupted = go(whole, range(n))
    before = go(first, range(split))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert before + go(second, range(split, n)) == uninterrupted
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "change", [{"points": 3}, {"points": [[1.0]]}, {"below": -1}, {"lost": "1"}, {"points": [[2, 0, 0, 0, 0]] * 2}]
)
def test_a_state_that_is_none_is_refused(change):
    """And the machine goes on as before."""
    machine = MarginalReturn()
    machine.check(1, 1.0)
    before = machine.state_dict()
    with pytest.raises(FormatError, match="The state of MarginalReturn"):
        machine.load_state_dict(before | change)
    assert machine.state_dict() == before


def test_a_state_of_the_other_direction_is_refused():
    """Its best would be the worst."""
    with pytest.raises(MismatchError, match="direction='minimize', this rule has 'maximize'"):
        MarginalReturn(direction="maximize").load_state_dict(MarginalReturn().state_dict())


def test_a_decision_is_json():
    """As it goes into a record of the run."""
    decision = feed(MarginalReturn(), FLAT)[-1]
    assert json.loads(json.dumps(decision.to_dict())) == decision.to_dict()


def test_noise_sees_neither_a_trend_nor_a_jump():
    """A line with a step in it has none; independent noise is found to within its sampling error."""
    x = np.arange(1.0, 201.0)
    assert noise(x, 3 * x + (x > 100) * 50)[0] == pytest.approx(0, abs=1e-9)
    assert noise(x, 3 * x + np.random.default_rng(0).normal(0, 2, 200))[0] == pytest.approx(2, rel=0.25)


def test_a_trend_is_the_least_squares_line_with_its_error():
    """Against numpy's own fit, on unequal steps."""
    x = np.array([1.0, 2, 4, 5, 9, 11])
    y = np.array([1.0, 3, 2, 5, 4, 8])
    slope, covariance = np.polyfit(x, y, 1, cov=True)
    found = trend(list(x), list(y), 6)
    assert found.slope == pytest.approx(slope[0]) and found.error >= covariance[0, 0] ** 0.5 * (1 - 1e-9)
    assert found.margin > found.error and windows(5, 12) == [5, 7, 10, 12]


def test_the_schedules_phase_follows_from_the_rates():
    """Constant, warm-up, decay, unknown, and a decay that has just begun."""
    found = [phase(r) for r in ([1.0] * 4, [0.1, 0.2], [1.0, 0.9], [1.0, None], [], [1.0, 1.0, 1.0, 0.999])]
    assert found == ["steady", "rising", "falling", "unknown", "unknown", "falling"]


@pytest.mark.parametrize("shape", [lambda p: 1 - p, lambda p: (1 + np.cos(np.pi * p)) / 2])
def test_the_rest_of_a_schedule_is_read_off_its_shape(shape):
    """Both spend half of the peak rate times the steps, seen to 40 % of the way."""
    done = np.linspace(0.0, 0.4, 21)
    areas, rest = spent_rate(done, shape(done))
    assert areas[-1] + rest == pytest.approx(0.5, abs=1e-3)
