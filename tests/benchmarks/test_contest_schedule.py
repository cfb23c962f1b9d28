"""The benchmark of placements: which jobs a study makes, in which order.

Without a model. Run alone: pytest tests/test_contest_schedule.py
"""

import math
from dataclasses import replace

import pytest
import yaml

from benchmarks.study import study
from benchmarks.study.catalogue import arm_of
from benchmarks.study.schedule import Schedule, best_octave, next_octaves
from benchmarks.study.study import Entry, Job, Study
from tests import ROOT


def test_learning_rates_go_on_until_the_best_is_not_at_an_edge():
    """At least three rates, then on beyond the edge at which the best is, and not without end."""
    assert next_octaves({}, 1) == [1]
    assert sorted(next_octaves({1: 0.7}, 1)) == [0, 2]
    assert next_octaves({0: 0.8, 1: 0.7, 2: 0.9}, 1) == []
    assert next_octaves({0: 0.8, 1: 0.7, 2: 0.6}, 1) == [3]
    assert next_octaves({0: 0.5, 1: 0.7, 2: 0.6}, 1) == [-1]
    assert next_octaves({0: 0.8, 1: 0.7, 2: math.inf}, 1) == []
    assert next_octaves(dict.fromkeys((0, 1, 2), math.inf), 1) == [-1]
    assert next_octaves({0: math.nan}, 0) == []
    assert next_octaves({k: -float(k) for k in range(-1, 6)}, 0) == []


def test_one_lucky_seed_does_not_choose_a_learning_rate_where_there_are_more():
    """Rates compare by the mean of the seeds that both ran with."""
    assert best_octave({}) is None and best_octave({0: {1: 0.5}, 1: {0: math.nan}}) is None
    assert best_octave({0: {0: 0.7}, 1: {0: 0.6, 1: 0.9}, 2: {0: math.inf}}) == 1, (
        "nothing but the first seed to go by"
    )
    assert best_octave({0: {0: 0.7, 1: 0.7}, 1: {0: 0.6, 1: 0.9, 2: 0.1}}) == 0
    assert best_octave({0: {0: 0.7, 1: 0.7}, 1: {0: 0.6, 1: 0.7}, 2: {0: 0.65, 1: math.inf}}) == 1


def test_the_schedule_takes_first_things_first_and_seeds_for_the_closest(tmp_path):
    """Ladders grow with what is known; further seeds go to the arms of the lowest loss, at their best rate."""
    order = [
        {"arms": ["all-linear", "even", "random"], "budgets": [0.2], "rates": "best"},
        {"arms": ["random #1", {"arm": "even", "blueprint": "task x 8"}], "budgets": [0.2]},
        {"arms": ["all-linear"], "closest": 1, "budgets": [0.2], "seeds": [1, 2]},
    ]
    text = yaml.safe_dump({"data": "gsm8k", "steps": 2, "order": order})
    (tmp_path / "study.yaml").write_text(text)
    wanted = Study.read(tmp_path / "study.yaml")
    best = {"all-linear": 0, "even": 2, "random": -1, "random #1": 0}

    def loss(job):
        return 1.0 + abs(job.octave - best[job.entry.arm]) / 10 - 0.01 * (job.entry.arm == "even")

    known: dict[Job, float] = {}
    while True:
        schedule = Schedule(wanted, known.get, lambda *_: 0, lambda arm: arm != "all-linear", lambda: None)
        job = next((j for j in schedule.jobs() if j not in known), None)
        if job is None:
            break
        known[job] = 2.0 if job.entry.arm == study.UNTRAINED else loss(job)
    jobs = list(known)
    assert [j.octave for j in jobs if j.entry == Entry("even") and j.seed == 0] == [0, 1, -1, 2, 3]
    assert [j.octave for j in jobs if j.entry.blueprint == "task x 8"] == [2], "another blueprint takes its arm's rate"
    assert [j.octave for j in jobs if j.entry.arm == "random #1"] == [-1], "a further draw takes its family's rate"
    assert {(j.entry.arm, j.octave, j.seed) for j in jobs if j.seed} == {
        *(("all-linear", 0, s) for s in (1, 2)),
        *(("even", 2, s) for s in (1, 2)),
    }
    stopped = replace(wanted, order=(study.Phase((Entry("even", stop=True),), (0.2,)),))
    later = list(Schedule(stopped, lambda job: None, lambda *_: 0, lambda arm: True, lambda: 0.5).jobs())
    waits = list(Schedule(stopped, lambda job: None, lambda *_: 0, lambda arm: True, lambda: None).jobs())
    assert len(waits) == 1 and later[1].steps == 1


def test_a_file_that_is_no_study_is_refused(tmp_path):
    """With its name, what is wrong and what to do; and all studies that come with the recipes can be read."""
    with pytest.raises(SystemExit, match=r"missing.yaml cannot be read: .*No such file.* See benchmarks/studies"):
        Study.read(tmp_path / "missing.yaml")
    cases = {
        "a: [": "cannot be read",
        "just words": "is no study: it needs data and order",
        "data: gsm8k": "is no study: it needs data and order",
        "{data: gsm8k, order: [], stride: 3}": r"unknown keys \['stride'\]",
        "{data: gsm8k, order: [], flops_per_second: 1e13}": "flops_per_second: '1e13', which is no number",
        "{data: gsm8k, order: [], steps: true}": "steps: True, which is no number; 30 is usual",
        "{data: gsm8k, order: [{arm: planner}]}": r"a phase with \['arm'\]",
    }
    for text, said in cases.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit, match=said):
            Study.read(tmp_path / "bad.yaml")
    studies = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
    assert len(studies) >= 6
    for path in studies:
        found = Study.read(path)
        assert found.name == path.stem and found.default in {e.label for e in found.entries}
        for entry in found.entries:
            arm_of(entry.arm)
