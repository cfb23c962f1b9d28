"""Reports on runs that are odd: half known or not ours."""

import json
import math
from dataclasses import replace

import pytest

from peft_blueprint.runs.record import Point, RunRecord, direction_of
from peft_blueprint.runs.report import make_report, series
from tests.made_up_runs import made_up_run


def state(folder, history, **more):
    """A Trainer's output folder that knows no ledger."""
    folder.mkdir()
    content = {"log_history": history, "global_step": 300, "total_flos": 6.0e12, **more}
    (folder / "trainer_state.json").write_text(json.dumps(content))
    return folder


def evaluations(first=100):
    return [{"step": step, "eval_loss": 2.0 - step / 300} for step in range(first, 301, 100)]


def test_a_resource_that_no_evaluation_knows_makes_no_curve(tmp_path):
    """The untrained model alone would have a place on it; nothing is read off that."""
    history = [{"step": 0, "eval_loss": 2.3}, *evaluations(), {"step": 300, "train_runtime": 60.0}]
    record = RunRecord.load(state(tmp_path / "run", history))
    assert series(record, "seconds", "eval_loss") == ()
    row = make_report([record, made_up_run("base")], baseline="base", resource="seconds").rows[0]
    assert row.to_baseline is None and row.at_budget is None


def test_a_first_evaluation_of_unknown_cost_gives_no_gain_per_resource(tmp_path):
    """The cost before it is not taken for zero."""
    record = RunRecord.load(state(tmp_path / "run", [*evaluations(), {"step": 300, "train_runtime": 60.0}]))
    row = make_report([record], resource="seconds").rows[0]
    assert row.gain > 0 and row.per_resource is None


def test_tokens_are_those_of_the_whole_run(tmp_path):
    """From the state, the closing entry, and TRL's tokens at evaluations, which do not become a metric."""
    history = [{"step": 250, "loss": 1.0, "num_input_tokens_seen": 250_000}, *evaluations(300)]
    record = RunRecord.load(state(tmp_path / "run", history, num_input_tokens_seen=300_000))
    assert record.totals["tokens"].value == 300_000
    trl = [{"step": 300, "eval_loss": 1.0, "eval_num_tokens": 7000}]
    point = RunRecord.load(state(tmp_path / "trl", trl)).points[0]
    assert point.spent["tokens"] == 7000 and set(point.metrics) == {"eval_loss"}


@pytest.mark.parametrize("metric", ["eval_exact_answer", "eval_f1_cancer", "eval_power"])
def test_words_that_end_like_an_error_rate_are_not_one(metric):
    """ "answer" and "power" are not word error rates; wer and cer are."""
    assert direction_of(metric) == "maximize"
    assert {direction_of(f"eval_{name}") for name in ("wer", "cer", "rmse", "ppl", "loss")} == {"minimize"}


def test_the_trainers_count_and_the_ledgers_compare_roughly(tmp_path):
    """A note says so: both are FLOPs, and not of one definition."""
    theirs = RunRecord.load(state(tmp_path / "theirs", evaluations()))
    assert any(
        "comparison is approximate" in n for n in make_report([made_up_run("ours"), theirs], resource="flops").notes
    )
    assert not any("comparison is approximate" in n for n in make_report([theirs], resource="flops").notes)


def test_a_first_evaluation_that_is_not_finite_is_noted():
    """It was evaluated more than once, and from where it improved is not known."""
    run = made_up_run("broken")
    first = Point(0, run.points[0].spent, {"eval_loss": math.nan})
    notes = make_report([replace(run, points=(first, *run.points[1:]))]).notes
    assert any("first eval_loss of broken is not finite" in note for note in notes)


@pytest.mark.parametrize("entry", [{"step": 1, "loss": 10**400}, {"step": 1, "eval_loss": 10**400}])
def test_numbers_beyond_all_measure_are_not_finite(entry, tmp_path):
    """They count as infinite, without a traceback."""
    record = RunRecord.load(state(tmp_path / "run", [entry]))
    assert not any(math.isfinite(value) for p in (*record.points, *record.losses) for value in p.metrics.values())
