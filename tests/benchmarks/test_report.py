"""A study's tables agree with its records; on made-up records, and on the archive."""

import math

import pytest

from benchmarks.study.plan import UNTRAINED, Entry, Job, Phase, Study
from benchmarks.study.report import Report, difference
from benchmarks.study.store import Store
from tests import ROOT


COUNTS = [4] * 8


def run_of(arm: str, above: float, budget: float | None = None, seed: int = 0, octave: int = 0, **changes) -> tuple:
    """A job and its record, so much above a loss of about 1.3 on every example."""
    losses = [1.0 + above + 0.1 * i + 0.001 * (i % 2) * (arm != "all-linear") for i in range(8)]
    loss = sum(losses) / 8
    record = {"status": "done", "loss": loss, "losses": losses, "counts": COUNTS, "ranks": {"a": 16}, "whole": []}
    record |= {"created": "2026-01-01", "rate": 0.002 * 2**octave, "modules": 9, "parameters": 1000, "lowest": 0}
    record |= {"flops": 1e12, "charged_flops": 0.0, "step_time": 1.0, "memory": 2**30, "unrelated": {"license": 3.0}}
    entry = Entry(arm, **changes.pop("entry", {}))
    return Job(entry, budget, octave, seed, changes.pop("steps", 30)), {**record, **changes}


def seeds_of(arm: str, above: float, budget: float | None = None, seeds: int = 3, **changes) -> list:
    """The same run with several seeds."""
    return [run_of(arm, above, budget, seed, **changes) for seed in range(seeds)]


def report_of(*runs: tuple, times: dict | None = None, **changes) -> Report:
    """A report of such runs."""
    arms = tuple(dict.fromkeys(job.entry for job, _ in runs))
    budgets = tuple(dict.fromkeys(job.budget for job, _ in runs if job.budget is not None))
    study = Study("s", "gsm8k", (Phase(arms, budgets),), **{"compare": ("all-linear", "random"), **changes})
    return Report(study, runs, times or {})


def test_differences_are_paired():
    """Differences shared by all examples cancel; the error is over seeds, examples and draws."""
    runs = [*seeds_of("all-linear", 0.0), *seeds_of("planner", -0.05)]
    report = report_of(*runs)
    [reference], [row] = report.reference, report.named("planner")
    one = difference(row, [reference])
    assert one.mean == pytest.approx(-0.0495) and one.error < 0.001 and one.seeds == 3
    moved = [run_of("planner", 0.0), run_of("planner", 0.1, seed=1), run_of("planner", 9.0, seed=7)]
    [row] = report_of(*moved).named("planner")
    two = difference(row, [reference])
    assert two.seeds == 2 and two.mean == pytest.approx(0.0505)
    assert two.error == pytest.approx(math.hypot(0.05, one.error)), "seeds, and examples"
    assert difference(row, []) is None and "(1 seed)" in str(difference(report_of(moved[0]).rows[0], [reference]))


def test_other_held_out_examples_for_every_seed_leave_the_error_of_seeds():
    """Then examples of different seeds have nothing in common to pair."""
    other = {"counts": [5, 3] * 4}
    runs = [run_of("all-linear", 0.0), run_of("all-linear", 0.0, seed=1, **other)]
    runs += [run_of("planner", 0.1), run_of("planner", 0.3, seed=1, **other)]
    report = report_of(*runs)
    found = difference(report.named("planner")[0], report.reference)
    assert found.seeds == 2 and found.error == pytest.approx(0.1, rel=0.01)


def test_draws_of_a_random_rule_are_compared_with_together():
    """Their mean, each draw over the seeds it shares; the draws' spread is part of the error."""
    runs = [*seeds_of("all-linear", 0.0), *seeds_of("planner", 0.0, 0.2), *seeds_of("random", 0.1, 0.2)]
    runs += seeds_of("random #1", 0.3, 0.2)
    report = report_of(*runs)
    draws = report.named("random", 0.2)
    assert [row.entry.arm for row in draws] == ["random", "random #1"]
    found = difference(report.named("planner", 0.2)[0], draws)
    assert found.mean == pytest.approx(-0.2) and found.error == pytest.approx(0.1, rel=0.01)
    lines = {line.split(" | ")[0][2:]: line for line in report.markdown().splitlines() if line.startswith("| ")}
    assert "| -0.2000 ± 0.1000 |" in lines["planner"] and "minus random" in lines["arm"]


def test_a_row_is_of_the_best_rate_and_of_one_placement():
    """Runs of an older rule or of other lengths are left out; a row without the first seed is not shown."""
    last = {"ranks": {"b": 4}, "created": "2026-01-02"}
    runs = [run_of("even", 0.0, 0.2, octave=1), run_of("even", 0.9, 0.2, **last), run_of("even", 0.2, 0.2, steps=3)]
    runs += [run_of("even", 0.0, 0.2, octave=-1, **last, status="diverged", loss=None)]
    runs += [run_of("all-linear", 0.0), run_of("random", 0.0, 0.2, seed=1)]
    runs += [run_of("first", 0.0, 0.2, status="failed", error="KeyError: 'x'")]
    report = report_of(*runs)
    [row] = report.named("even", 0.2)
    assert row.tried == {0, -1} and row.octave == 0 and list(row.runs) == [0] and not row.is_inside
    text = report.markdown()
    assert "- random at 20%: done, not yet with the first seed" in text
    assert "- first at 20%: failed, KeyError: 'x'" in text and "Not run" not in text
    missing = Report(report.study, runs[:1], {}).markdown()
    assert "Not run: all-linear at 20%; random at 20%; first at 20%." in missing


def test_rows_of_one_seed_and_of_several_compare_by_the_paired_loss():
    """The loss shown is the reference's mean plus the paired difference; rows come in its order, budgets apart."""
    runs = [run_of("all-linear", 0.0), run_of("all-linear", 0.6, seed=1), run_of("planner", 0.05)]
    report = report_of(*runs, run_of("random", 0.02, 0.2, parameters=100))
    loss = report.reference[0].loss
    assert report.paired_loss(report.named("planner")[0]) == pytest.approx(loss + 0.0505)
    assert [row.label for row in report.rows] == ["all-linear", "planner", "random at 20%"]
    assert "| 0.00 M (0.50 of the budget) |" in report.markdown()


def test_a_step_time_that_was_measured_often_enough_stands_for_the_predicted_one():
    """The reference takes 1 by definition."""
    runs = [*seeds_of("all-linear", 0.0), *seeds_of("planner", 0.0, 0.2, step_time=0.65)]
    few, enough = ({"planner at 20%": [0.9, 0.5, 0.52][:n], "all-linear": [1.2] * 3} for n in (2, 3))
    for times, expected in ((few, (0.65, False)), (enough, (0.52, True))):
        report = report_of(*runs, times=times)
        assert report.step_time(report.named("planner", 0.2)[0]) == expected
        assert report.step_time(report.reference[0]) == (1.0, False)
    assert "| 0.52 (measured) |" in report.markdown()


def test_the_picture_needs_the_reference(tmp_path):
    """It is drawn relative to it."""
    path = tmp_path / "picture.png"
    report_of(*seeds_of("all-linear", 0.0), *seeds_of("planner", 0.1, 0.2, step_time=0.8)).picture(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="all-linear has not run yet"):
        report_of(*seeds_of("planner", 0.1, 0.2)).picture(path)


def test_unrelated_text_is_shown_as_a_rise():
    """Over the untrained model's."""
    untrained = (Job(Entry(UNTRAINED), None, 0, 0, 0), run_of("x", 0.0, unrelated={"license": 2.5})[1])
    assert "| +0.500 |" in report_of(untrained, *seeds_of("all-linear", 0.0)).markdown()


def test_documents_quote_the_archive(tmp_path):
    """The numbers of the contest in bfloat16 follow from the archived runs."""
    study = Study.read(ROOT / "benchmarks" / "studies" / "contest_bf16.yaml")
    store = Store(study, tmp_path / "none.jsonl")
    report = Report(study, store.jobs(), store.step_times())
    assert len(report.runs) == 221 and len(report.rows) == 83
    [row] = report.named("planner, as shipped")
    against = {label: difference(row, report.named(label)) for label in study.compare[:2]}
    assert str(against["all-linear"]) == "-0.0004 ± 0.0080"
    assert str(against["random, within kind, as shipped"]) == "-0.0182 ± 0.0083"
    assert report.step_time(row) == (pytest.approx(0.78, abs=0.005), True)
    page = (ROOT / "docs" / "results" / "default_placement.md").read_text()
    [whole] = report.reference
    shares = [f"{100 * one.mean / whole.loss:+.1f} % ± {100 * one.error / whole.loss:.1f}" for one in against.values()]
    assert shares[0] in page and shares[1].removeprefix("-") in page


@pytest.mark.parametrize("name", ["contest_bf16", "longer_bf16", "longer_pubmedqa_bf16"])
def test_the_table_of_the_readme_is_the_archives(tmp_path, name):
    """Loss and measured step time of the default placement, begun along the gradient, against all-linear LoRA."""
    study = Study.read(ROOT / "benchmarks" / "studies" / f"{name}.yaml")
    store = Store(study, tmp_path / "none.jsonl")
    report = Report(study, store.jobs(), store.step_times())
    [row], [whole] = report.named("planner, along the gradient, as shipped"), report.reference
    apart = difference(row, [whole])
    time, is_measured = report.step_time(row)
    assert is_measured
    cells = [
        f"{study.steps} steps, {apart.seeds} seeds",
        f"{time:.2f}",
        f"{100 * apart.mean / whole.loss:+.1f} % ± {100 * apart.error / whole.loss:.1f}",
    ]
    assert " | ".join(cells) in (ROOT / "README.md").read_text()
