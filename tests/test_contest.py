"""The benchmark of placements: what is run, that a killed run goes on, and that the report says what the numbers say.

On a tiny random model and made-up rows. Run alone: pytest tests/test_contest.py
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from peft_blueprint.testing import save_tiny_model


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import benchmark  # noqa: E402
from contest import results, study, verdict  # noqa: E402
from contest.report import markdown  # noqa: E402
from contest.schedule import Schedule, next_octaves  # noqa: E402
from contest.study import Entry, Job, Study  # noqa: E402


SIZES = {
    "data": "jsonl",
    "length": 16,
    "batch": 2,
    "steps": 2,
    "warm_up": 1,
    "rank": 4,
    "measured": 4,
    "held_out": 4,
    "few": 2,
    "every": 1,
    "unrelated": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and made-up rows of numbers."""
    path = tmp_path_factory.mktemp("contest")
    save_tiny_model(path / "model", layers=2)
    for split, count in (("train", 12), ("test", 6)):
        generator = torch.Generator().manual_seed(len(split))
        rows = torch.randint(0, 90, (count, 10), generator=generator).tolist()
        lines = [{"prompt": " ".join(map(str, r[:4])), "completion": " " + " ".join(map(str, r[4:]))} for r in rows]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def study_of(folder: Path, order: list, **changes) -> Study:
    """A study of the tiny model, read from a YAML."""
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({"name": "tiny", "model": str(folder / "model"), "order": order, **SIZES, **changes})
    )
    return Study.read(path)


def runner_of(folder: Path, study: Study, out: Path) -> benchmark.Runner:
    """A runner of a study, with results in a folder."""
    return benchmark.Runner(study, results.Store(out, study), folder)


def test_an_interrupted_run_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    """A killed run leaves no half result, and the next runs only what has none; a failure is run again when asked."""
    from contest import job as jobs

    wanted = study_of(folder, [{"arms": ["all-linear", "even", "random"], "budgets": [0.5]}])
    ran: list[str] = []
    run = jobs.run

    def counted(ground, job, choice):
        ran.append(job.entry.arm)
        if ran == ["untrained", "all-linear", "even"]:
            raise KeyboardInterrupt
        if ran[-1] == "random" and "random" not in ran[:-1]:
            raise RuntimeError("out of luck")
        return run(ground, job, choice)

    monkeypatch.setattr(jobs, "run", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner_of(folder, wanted, out).run(math.inf)
    assert sorted(p.name.split("_")[0] for p in out.iterdir()) == ["all-linear", "untrained"]
    assert runner_of(folder, wanted, out).run(math.inf) == 2 and ran[3:] == ["even", "random"]
    assert runner_of(folder, wanted, out).run(math.inf) == 0
    [failed] = [r for _, r in results.Store(out, wanted).all() if r["status"] == "failed"]
    assert failed["error"] == "RuntimeError: out of luck"
    assert runner_of(folder, wanted, out).run(math.inf, retry=True) == 1
    assert {r["status"] for _, r in results.Store(out, wanted).all()} == {"done"}
    longer = replace(wanted, steps=3)
    assert runner_of(folder, longer, out).run(0.0) == 0 and results.Store(out, longer).all() == []


def test_budgets_are_filled_from_below_and_nothing_is_dropped(folder, tmp_path):
    """Every kind of arm runs within its parameters; one that cannot be had is in the report with the reason."""
    arms = ["planner", "gradient_norm, pooled", "even, raised", "norm, bottom of strata", "KappaTune", "Spectrum"]
    starts = ["all-linear, EVA", "planner, LoRA-GA", "all-linear, A from gradients", "AdaLoRA", "ranks by gain"]
    whole = ["full fine-tuning", "unfreeze top", "unfreeze top blocks", "planner, rates by gain"]
    wanted = study_of(folder, [{"arms": ["all-linear", *arms, *starts, *whole], "budgets": [0.5]}])
    out = tmp_path / "out"
    runner = runner_of(folder, wanted, out)
    runner.run(math.inf)
    records = {job.entry.arm: record for job, record in results.Store(out, wanted).all()}
    assert {name: r["error"] for name, r in records.items() if r["status"] == "failed"} == {}
    limit = 0.5 * records["all-linear"]["parameters"]
    for name in {*arms, *starts} - {"AdaLoRA", "all-linear, EVA"}:  # which have whole ranks, the same for all
        assert 0.8 * limit < records[name]["parameters"] <= limit, name
    assert records["unfreeze top"]["status"] == "infeasible"
    text = markdown(results.summary(wanted, results.Store(out, wanted).all(), {}))
    assert "unfreeze top at 50%: infeasible, the smallest choice has" in text
    charged = {name for name, r in records.items() if r["status"] == "done" and r["charged_flops"]}
    assert {"planner", "KappaTune", "all-linear, EVA"} <= charged and not charged & {"all-linear", "even, raised"}


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


def test_the_schedule_takes_first_things_first_and_seeds_for_the_closest(folder):
    """Ladders grow with what is known; further seeds go to the arms of the lowest loss, at their best rate."""
    order = [
        {"arms": ["all-linear", "even", "random"], "budgets": [0.2], "rates": "best"},
        {"arms": ["random #1"], "budgets": [0.2]},
        {"arms": ["all-linear"], "closest": 1, "budgets": [0.2], "seeds": [1, 2]},
    ]
    wanted = study_of(folder, order)
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
    assert [j.octave for j in jobs if j.entry.arm == "even" and j.seed == 0] == [0, 1, -1, 2, 3]
    assert [j.octave for j in jobs if j.entry.arm == "random #1"] == [-1], "a further draw takes its family's rate"
    assert {(j.entry.arm, j.octave, j.seed) for j in jobs if j.seed} == {
        *(("all-linear", 0, s) for s in (1, 2)),
        *(("even", 2, s) for s in (1, 2)),
    }
    stopped = replace(wanted, order=(study.Phase((Entry("even", stop=True),), (0.2,)),))
    later = list(Schedule(stopped, lambda job: None, lambda *_: 0, lambda arm: True, lambda: 0.5).jobs())
    waits = list(Schedule(stopped, lambda job: None, lambda *_: 0, lambda arm: True, lambda: None).jobs())
    assert len(waits) == 1 and later[1].steps == 1


def made_up(shift: float) -> dict:
    """A summary of three arms: the default is `shift` above all-linear."""

    def row(arm, budget, above, time):
        losses = [1.0 + above + 0.1 * i + 0.001 * (i % 2) * (arm != "all-linear") for i in range(8)]
        loss = sum(losses) / 8
        one = {"loss": loss, "losses": losses, "curve": [[30, loss]], "unrelated": {"license": 3.0}, "accuracy": None}
        numbers = {"modules": 9, "lowest": 0, "parameters": 1000, "rate": 0.002, "flops": 1e12, "charged_flops": 0.0}
        numbers |= {"step_time": time, "time": 30 * time, "charged_time": 0.0, "memory": 2**30, "steps": 30}
        own = {"arm": arm, "label": arm, "budget": budget, "status": "done", "tried": {"0.002": loss}, "ranks": [16]}
        return {**own, **numbers, "is_inside": False, "seeds": {"0": one}}

    rows = [row("all-linear", None, 0.0, 1.0), row("planner", 0.2, shift, 0.65), row("random", 0.2, 0.02, 0.8)]
    facts = {"data": "made up", "steps": 30, "batch": 8, "length": 9, "held_out": 8, "dtype": "float32"}
    before = {"loss": 2.0, "losses": [2.0] * 8, "curve": [[0, 2.0]], "unrelated": {"license": 2.5}, "accuracy": None}
    about = {
        "study": "s",
        "kind": "contest",
        "reference": "all-linear",
        "default": "planner",
        "jobs": 4,
        "device": "-",
    }
    return {
        **about,
        "facts": facts,
        "counts": [4] * 8,
        "untrained": before,
        "rows": rows,
        "times": {},
        "not_run": ["x"],
    }


def test_the_paragraph_follows_the_numbers():
    """Change a number of the summary, and the sentences change with it."""
    good, bad = (markdown(made_up(shift)) for shift in (-0.05, 0.05))
    assert "planner came out lowest" in good and "better by two standard errors" in good
    assert "beats random placements by two standard errors" in good and "is met" in good
    assert "random came out lowest" in bad and "does not beat random placements" in bad
    assert "is missed, the loss by" in bad and "Not run: x." in bad and "Not run: x." in good
    slow = made_up(-0.05)
    slow["rows"][1]["time"] = 27.0
    assert "is missed, the time by 0.20" in verdict.paragraph(slow)
    assert "All-linear" not in verdict.paragraph(made_up(0.0)) and "1 arms have" not in good


def test_differences_are_paired():
    """What all examples share cancels; the standard error is of what is left, over examples or seeds."""
    summary = made_up(-0.05)
    reference, row, _ = summary["rows"]
    one = verdict.difference(summary, row, [reference])
    assert one is not None and one.mean == pytest.approx(-0.0495) and one.error < 0.001 and one.is_clear
    second = json.loads(json.dumps(row["seeds"]["0"]))
    second["losses"] = [loss + 0.1 for loss in second["losses"]]
    row["seeds"]["1"], reference["seeds"]["1"] = second, json.loads(json.dumps(reference["seeds"]["0"]))
    two = verdict.difference(summary, row, [reference])
    assert two is not None and two.seeds == 2 and two.error == pytest.approx(0.05) and not two.is_clear


def test_transfer_and_multiplication(folder, tmp_path, capsys):
    """Other blueprints, chosen data and stopping run as arms, and have tables of their own."""
    arms = ["all-linear", "planner", {"arm": "planner", "blueprint": "task x 2"}]
    arms += [{"arm": "planner", "blueprint": "after 1 x 4"}, {"arm": "planner", "blueprint": "nf4 x 4"}]
    arms += [{"arm": "planner", "select": "alignment", "share": 0.5, "stop": True}]
    order = [{"arms": arms, "budgets": [0.5]}]
    wanted = study_of(folder, order, report="transfer", default="planner")
    store = results.Store(tmp_path / "out", wanted)
    runner = benchmark.Runner(wanted, store, folder)
    runner.run(math.inf)
    assert {r["status"] for _, r in store.all()} == {"done"}
    runner.times(1, "planner at *")
    found = benchmark.report(wanted, store, tmp_path)
    assert "planner [nf4 x 4] at 50%" in capsys.readouterr().out and (tmp_path / "tiny.png").exists()
    assert list(found["times"]) == ["planner at 50%"] and len(found["times"]["planner at 50%"]) == 1
    runner.show("planner + *")
    assert capsys.readouterr().out.startswith("done")
    by_label = {row["label"]: row for row in found["rows"]}
    assert 0 < by_label["planner [after 1 x 4]"]["agreement"]["jaccard"] <= 1
    combined = by_label["planner + alignment 0.5 + stop"]
    assert combined["examples"] == 2 and combined["charged_flops"] > by_label["planner"]["charged_flops"]
    text = markdown({**found, "kind": "multiplication"})
    assert "Stopping is at" in text and "72% of the gain at 6% of the cost" in text
