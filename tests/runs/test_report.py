"""What a report finds in runs, in words and as PEFT's results. Run: pytest tests/runs/test_report.py"""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_blueprint.errors import BlueprintError, MismatchError
from peft_blueprint.publish.words import describe_run
from peft_blueprint.runs.quantity import measured, modelled
from peft_blueprint.runs.record import Point, RunRecord
from peft_blueprint.runs.report import make_report, pareto_front
from tests.made_up_runs import made_up_run


def run(name, curve, *, metric="eval_loss", direction="minimize", total=None, **about):
    """A run whose points are (seconds, metric); the steps are the seconds."""
    points = tuple(Point(min(int(x), 10**9), {"seconds": float(x)}, {metric: y}) for x, y in curve)
    spent = measured(float(total if total is not None else curve[-1][0]), "clock")
    return RunRecord(name, metric, direction, "seconds", {"seconds": spent}, points, about=about)


BASE = run("base", [(0, 3.0), (10, 2.5), (20, 2.2), (40, 2.0)])
FAST = run("fast", [(0, 3.0), (5, 2.4), (10, 1.9)], total=12)


def test_capability_per_resource_is_the_gain_over_the_cost():
    """With the multiple of the baseline's, the cost of its metric, and the metric at its cost."""
    base, fast = make_report([BASE, FAST], baseline="base").rows
    assert base.gain == pytest.approx(1.0) and base.per_resource == pytest.approx(1.0 / 40)
    assert fast.per_resource == pytest.approx(1.1 / 12) and fast.relative == pytest.approx(1.1 / 12 * 40)
    assert fast.to_baseline == pytest.approx(9.0)  # on the line from 2.4 at 5 to 1.9 at 10
    assert base.to_baseline == pytest.approx(40.0) and base.relative == pytest.approx(1.0)
    assert fast.at_budget == 1.9
    assert [row.at_budget for row in make_report([BASE, FAST], baseline="fast").rows] == pytest.approx([2.44, 1.9])
    assert (base.on_front, fast.on_front) == (False, True)


def test_a_metric_that_rises_is_better_when_it_rises():
    """The same figures with the sign of the direction, and one that falls got worse."""
    rising = run("up", [(0, 0.2), (10, 0.5), (20, 0.6)], metric="accuracy", direction="maximize")
    row = make_report([rising, replace(rising, name="b")], baseline="b").rows[0]
    assert row.gain == pytest.approx(0.4) and row.ratio == pytest.approx(0.02) and row.to_baseline == pytest.approx(20)
    falling = make_report([run("worse", [(0, 0.5), (10, 0.4)], metric="accuracy", direction="maximize")])
    assert falling.rows[0].gain == pytest.approx(-0.1)


def test_the_last_ratio_is_the_slope_over_the_window():
    """Of the line of least squares through as many evaluations as asked for, or as there are."""
    assert make_report([BASE], window=2).rows[0].ratio == pytest.approx(0.2 / 20)
    x, y = [0, 10, 20, 40], [3.0, 2.5, 2.2, 2.0]
    mean_x, mean_y = sum(x) / 4, sum(y) / 4
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    row = make_report([BASE], window=9).rows[0]
    assert row.ratio == pytest.approx(-slope) and row.window == 4


def test_a_slope_beyond_the_range_of_floats_is_not_known():
    """A damaged record ends no report."""
    assert make_report([run("huge", [(0, 1.0), (1e300, 2.0), (2e300, 1e300)])]).rows[0].ratio is None


def test_gain_and_cost_count_from_the_first_evaluation():
    """Costs before a late first evaluation do not count, and a note says so."""
    late = run("late", [(10, 2.5), (20, 2.0)])
    report = make_report([late])
    assert report.rows[0].per_resource == pytest.approx(0.05)
    assert any("late (step 10)" in note and "eval_on_start" in note for note in report.notes)
    assert make_report([BASE]).notes == ()


def test_runs_without_evaluation_show_their_known_figures():
    """One without any, one with a single one, one that diverged; none is on the front or against the baseline."""
    none = replace(BASE, name="none", points=())
    once = run("once", [(10, 2.5)])
    broken = run("broken", [(0, 3.0), (10, math.nan)])
    report = make_report([none, once, broken, FAST], baseline="none")
    assert [row.gain for row in report.rows[:3]] == [None] * 3
    assert [row.on_front for row in report.rows] == [None, True, None, True]
    said = " ".join(report.notes)
    assert "none has no evaluation" in said and "once was evaluated only once" in said and "diverged" in said
    assert all(row.relative is None for row in report.rows) and "Runs are not compared with none" in said
    assert "not evaluated" in describe_run(report.rows[0], report) and "diverged" in describe_run(
        report.rows[2], report
    )


def test_a_baseline_that_did_not_improve_gives_no_multiple():
    """Rather than a negative or infinite one."""
    report = make_report([run("flat", [(0, 2.0), (10, 2.0)]), FAST], baseline="flat")
    assert report.rows[1].relative is None and any("did not improve" in note for note in report.notes)
    assert report.rows[1].to_baseline is not None


def test_different_metrics_do_not_compare_unless_one_is_common():
    """The error names both runs, both metrics and what they share."""
    both = made_up_run("a"), replace(made_up_run("b"), metric="eval_accuracy", direction="maximize")
    with pytest.raises(MismatchError, match=r"got eval_loss for a and eval_accuracy for b.*--metric eval_accuracy"):
        make_report(both)
    assert make_report(both, metric="accuracy").direction == "maximize"
    with pytest.raises(MismatchError, match="no metric in common"):
        make_report([BASE, run("other", [(0, 1.0), (5, 0.5)], metric="wer")])
    with pytest.raises(MismatchError, match="base has no eval_bleu; it has eval_loss"):
        make_report([BASE, FAST], metric="bleu")
    with pytest.raises(MismatchError, match="base has minimize, fast has maximize"):
        make_report([BASE, replace(FAST, direction="maximize")])


def test_different_models_compare_with_a_note():
    """Their costs compare; the note names both."""
    report = make_report([replace(BASE, about={"model_id": "org/a"}), replace(FAST, about={"model_id": "org/b"})])
    assert any("org/a, org/b" in note for note in report.notes)


def test_the_resource_is_one_that_all_runs_have():
    """Where the chief run's is not, the first that is, with a note; an unknown one is refused."""
    tokens = replace(FAST, totals={"tokens": measured(5.0, "count")}, resource="tokens")
    both = replace(BASE, totals={**BASE.totals, "tokens": modelled(9.0, "batches")})
    report = make_report([both, tokens])
    assert report.resource == "tokens" and "base was judged by seconds, which not all have" in report.notes[0]
    assert any("modelled, not measured, in base" in note for note in report.notes)
    with pytest.raises(BlueprintError, match="resource must be one of seconds, .*, got 'money'"):
        make_report([BASE], resource="money")
    row = make_report([BASE], resource="energy_joules").rows[0]
    assert row.spent.how == "absent" and row.per_resource is None and row.ratio is None


def test_bad_wishes_are_refused():
    """No runs, a window of one, a baseline that is none of the runs."""
    with pytest.raises(BlueprintError, match="at least one run"):
        make_report([])
    with pytest.raises(BlueprintError, match="window must be at least 2 evaluations, got 1"):
        make_report([BASE], window=1)
    with pytest.raises(BlueprintError, match="baseline must be one of the runs base, fast, .*, got 'best'"):
        make_report([BASE, FAST], baseline="best")


def test_runs_of_one_name_get_distinct_names():
    """By a number."""
    assert [row.name for row in make_report([BASE, BASE, BASE]).rows] == ["base", "base (2)", "base (3)"]


def test_a_charged_probe_is_noted():
    """A note names the run that paid for a measurement."""
    probed, plain = made_up_run("probed", probe={"seconds": {"value": 9.0, "how": "measured"}}), made_up_run("plain")
    assert any("charged to probed." in note for note in make_report([probed, plain]).notes)
    assert not any("charged" in note for note in make_report([plain]).notes)


NUMBERS = st.none() | st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan, math.inf]) | st.floats(-5, 5)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_undominated_runs_are_on_the_front(pairs):
    """As the definition says it, pair by pair: at least as good in both, and better in one."""
    known = [all(value is not None and math.isfinite(value) for value in pair) for pair in pairs]

    def is_beaten(i):
        return any(
            known[j] and pairs[j][0] <= pairs[i][0] and pairs[j][1] >= pairs[i][1] and pairs[j] != pairs[i]
            for j in range(len(pairs))
        )

    expected = tuple(known[i] and not is_beaten(i) for i in range(len(pairs)))
    assert pareto_front([cost for cost, _ in pairs], [worth for _, worth in pairs]) == expected


def test_a_report_is_short_in_a_notebook_and_whole_in_pandas():
    """One line, a row for each run, and a column for each figure."""
    report = make_report([BASE, FAST], baseline="base")
    assert repr(report) == "<Report of 2 runs: eval_loss by seconds>"
    assert report._repr_html_().count("<tr>") == 3
    frame = report.to_pandas().set_index("run")
    assert list(frame.index) == ["base", "fast"] and frame.loc["fast", "relative"] == report.rows[1].relative
