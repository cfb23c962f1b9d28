"""The benchmark of placements: what is run, that a killed run goes on, and what becomes of its results.

On a tiny random model and made-up rows. Run alone: pytest tests/test_contest.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import freezing
from benchmarks.study import results, study
from benchmarks.study import run as benchmark
from benchmarks.study.report import markdown
from benchmarks.study.study import Entry, Job, Study
from peft_blueprint.testing import save_tiny_model


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
    from benchmarks.study import job as jobs

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


def test_processes_share_a_study_and_none_runs_what_another_is_running(folder, tmp_path, monkeypatch):
    """A claimed job is passed over, and waited for: what is not run by the time its process is gone is run here."""
    wanted = study_of(folder, [{"arms": ["all-linear", "even", "random"], "budgets": [0.5]}])
    here, there = (runner_of(folder, wanted, tmp_path / "out") for _ in range(2))
    taken = {name: next(j for j in there.schedule.jobs() if j.entry.arm == name) for name in ("even", "all-linear")}
    claims = {name: there.store.claim(there._path(job)) for name, job in taken.items()}
    assert all(claims.values()) and here.store.claim(here._path(taken["even"])) is None
    ran: list[str] = []

    def wait(seconds):
        ran.extend(sorted(job.entry.arm for job, _ in here.store.all()))
        there._one(taken["all-linear"])
        for claim in claims.values():
            claim.release()

    monkeypatch.setattr(benchmark.time, "sleep", wait)
    assert here.run(math.inf) == 3 and ran == ["random", "untrained"]
    assert len(results.Store(tmp_path / "out", wanted).all()) == 4
    assert here.store.claim(here._path(taken["even"])) is None, "what has run cannot be claimed"


def test_results_are_kept_in_one_file_and_restored_elsewhere(folder, tmp_path):
    """Once each and with their date; what an arm would not train now stays behind, and what is there is not written over."""
    wanted = study_of(folder, [{"arms": ["all-linear", "even"], "budgets": [0.5]}])
    first, archive = runner_of(folder, wanted, tmp_path / "one" / "runs"), tmp_path / "runs.jsonl.gz"
    with pytest.raises(SystemExit, match="There is no .*runs.jsonl.gz: --keep makes it"):
        first.restore(archive)
    first.run(math.inf)
    assert first.store.keep(archive) == 3 == results.Store(tmp_path / "empty", wanted).keep(archive)
    [even] = [path for path in first.store.folder.iterdir() if path.name.startswith("even")]
    changed = json.loads(even.read_text()) | {"ranks": {"model.layers.0.mlp.up_proj": 1}}
    even.write_text(json.dumps(changed))
    assert first.store.keep(archive) == 4, "another placement under one name is another result"
    second = runner_of(folder, wanted, tmp_path / "two" / "runs")
    assert second.restore(archive) == 3 and second.restore(archive) == 0 and second.run(math.inf) == 0
    dates = [{record["created"] for _, record in runner.store.all()} for runner in (first, second)]
    assert dates[0] == dates[1] and len(second.store.all()) == 3
    assert results.Store(tmp_path / "empty", replace(wanted, steps=3)).archived(archive) == []


def test_arms_may_have_their_own_number_of_adapters_and_bs_that_learn_faster(folder, tmp_path):
    """As many adapters as named, with all-linear's parameters as far as ranks go; LoRA+ moves every B's rate alone."""
    from benchmarks.study.catalogue import choice_of
    from benchmarks.study.starts import ready

    ground = runner_of(folder, study_of(folder, [{"arms": ["all-linear"]}], attention="eager"), tmp_path).ground
    assert ground.model().config._attn_implementation == "eager"
    choices = {name: choice_of(ground, Entry(name), None) for name in ("all-linear", "all-linear, LoRA+")}
    assert {name: choice.ahead for name, choice in choices.items()} == {"all-linear": 1.0, "all-linear, LoRA+": 8.0}
    assert choices["all-linear"].ranks == choices["all-linear, LoRA+"].ranks
    begun = ready(ground, choices["all-linear, LoRA+"], 2, 0)
    names = {id(p): name for name, p in begun.model.named_parameters()}
    rates = {(".lora_B." in names[id(p)], group["factor"]) for group in begun.groups for p in group["params"]}
    assert rates == {(True, 8.0), (False, 1.0)}
    few = choice_of(ground, Entry("cover_gain x 15, LoRA+, as shipped"), None)
    many = choice_of(ground, Entry("cover, keep 0.9, as shipped"), None)
    assert len(few.ranks) == 14 and few.ahead == 8.0, "the tiny model has fourteen"
    assert few.charges == ("blueprint",) and 1 <= len(many.ranks) <= 14


def test_budgets_are_filled_from_below_and_nothing_is_dropped(folder, tmp_path):
    """Every kind of arm runs within its parameters; one that cannot be had is in the report with the reason."""
    arms = ["planner", "gradient_norm, pooled", "even, raised", "norm, bottom of strata", "KappaTune", "Spectrum"]
    starts = ["all-linear, EVA", "planner, LoRA-GA", "all-linear, A from gradients", "AdaLoRA", "ranks by gain"]
    starts += ["planner, along the gradient", "planner, along the gradient x 16"]
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
    assert "unfreeze top at 50%: infeasible, the smallest" in text
    charged = {name for name, r in records.items() if r["status"] == "done" and r["charged_flops"]}
    assert {"planner", "KappaTune", "all-linear, EVA"} <= charged and not charged & {"all-linear", "even, raised"}


def record_of(entry: Entry, budget: float | None, octave: int = 0, seed: int = 0, steps: int = 2, **changes) -> tuple:
    """A job and its record."""
    own = {"status": "done", "loss": 1.0, "ranks": {"a": 4}, "whole": [], "created": "2026-01-01", "device": "cpu"}
    return Job(entry, budget, octave, seed, steps), {**own, "versions": {}, "counts": [1], "rate": 0.002, **changes}


def test_a_row_is_of_one_placement_and_what_has_not_run_is_said_by_budget(folder):
    """What an older rule or blueprint placed is left out; an arm that ran at one budget may not have at another."""
    even, last = Entry("even"), {"ranks": {"b": 4}, "created": "2026-01-02"}
    order = [{"arms": ["all-linear", "even"], "budgets": [0.2, 0.02, 0.05]}]
    wanted = study_of(folder, order)
    records = [record_of(even, 0.2, 1, loss=0.1), record_of(even, 0.2, 0, 1), record_of(even, 0.2, loss=0.9, **last)]
    records += [record_of(even, 0.2, 2, steps=3, loss=0.2), record_of(even, 0.2, -1, status="failed", **last)]
    records.append((Job(even, 0.2, -2, 0, 2), {"status": "failed", "error": "-", "created": "2026-01-03"}))
    found = results.summary(wanted, records, {}, lambda arm: arm == "even")
    [row] = found["rows"]
    assert row["tried"] == {"0.001": None, "0.002": 0.9} and list(row["seeds"]) == ["0"]
    assert found["not_run"] == ["all-linear", "even at 5%, 2%"]
    [row] = results.summary(wanted, [records[0], record_of(even, 0.2, 0, 1, **last)], {})["rows"]
    assert row["status"] == "begun" and not row["seeds"]


def test_what_goes_wrong_with_a_choice_or_a_number_is_that_jobs_failure(folder, tmp_path, monkeypatch):
    """The process goes on; what failed runs again when asked, and does without the failure."""
    from benchmarks.study import catalogue
    from benchmarks.study import job as jobs

    wanted = study_of(folder, [{"arms": ["all-linear", "even", "random"], "budgets": [0.5]}])
    run, choice_of = jobs.run, catalogue.choice_of

    def choose(ground, entry, budget):
        return {}["no such module"] if entry.arm == "even" else choice_of(ground, entry, budget)

    def trained(ground, job, choice):
        return {**run(ground, job, choice), **({"seconds": math.nan} if job.entry.arm == "random" else {})}

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "choice_of", choose)
        patch.setattr(jobs, "run", trained)
        assert runner_of(folder, wanted, tmp_path).run(math.inf) == 4
        assert runner_of(folder, wanted, tmp_path).run(math.inf) == 0
    store = results.Store(tmp_path, wanted)
    failed = {job.entry.arm: r["error"] for job, r in store.all() if r["status"] == "failed"}
    assert failed["even"] == "KeyError: 'no such module'" and failed["random"].startswith("ValueError: Out of range")
    assert runner_of(folder, wanted, tmp_path).run(math.inf, retry=True) == 2
    rows = results.summary(wanted, results.Store(tmp_path, wanted).all(), {})["rows"]
    assert {(row["status"], len(row["tried"])) for row in rows} == {("done", 1)} and len(rows) == 3


def test_warming_up_takes_a_share_of_a_jobs_own_steps(monkeypatch):
    """A job of half the steps warms up for half as many, one of all of them for as many as the study says."""
    from benchmarks.study import job as jobs

    rates: list[float] = []
    sizes = SimpleNamespace(steps=8, warm_up=4, every=99, few=1)
    ground = SimpleNamespace(study=sizes, data=SimpleNamespace(test=[], spare=[]))
    monkeypatch.setattr(
        jobs, "one_step", lambda g, b, optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]) or 1.0
    )
    for steps, peak in ((8, 4), (4, 2), (1, 1)):
        rates.clear()
        begun = SimpleNamespace(model=None, groups=[{"params": [torch.nn.Parameter(torch.ones(1))], "factor": 1.0}])
        jobs.train(ground, begun, [[]] * steps, 1.0)
        assert rates.index(1.0) + 1 == peak and rates[-1] == min(1.0, 1 / (steps - peak + 1))


def test_the_curve_can_be_of_examples_that_nothing_else_uses(folder, tmp_path):
    """Spare examples are of the training data, behind all others; results of studies without them keep their names."""
    from benchmarks.study import job as jobs

    plain, wanted = (study_of(folder, [{"arms": ["all-linear"]}], **more) for more in ({}, {"spare": 3}))
    assert "spare" not in plain.facts() and wanted.facts() == {**plain.facts(), "spare": 3}
    runner = runner_of(folder, wanted, tmp_path)
    data = runner.ground.data
    assert len(data.spare) == 3 and not runner_of(folder, plain, tmp_path).ground.data.spare
    assert not any(row in [*data.train, *data.measured, *data.test] for row in data.spare)
    runner.run(math.inf)
    [untrained] = [r for job, r in runner.store.all() if job.entry.arm == study.UNTRAINED]
    expected = jobs.mean_of(*jobs.losses_of(runner.ground, runner.ground.model(), data.spare))
    assert untrained["curve"] == [[0, pytest.approx(expected)]]
    with pytest.raises(SystemExit, match="12 training examples .* needs 13: .* spare"):
        runner_of(folder, replace(wanted, spare=5), tmp_path).ground.data  # noqa: B018  made when asked for


def test_what_is_charged_is_in_steps_as_long_as_they_are(folder, tmp_path):
    """Examples are shorter than the longest: the same measurement takes more of such steps."""
    from benchmarks.study.data import in_batches, steps_of, tokens_of

    ground = runner_of(folder, study_of(folder, [{"arms": ["all-linear"]}]), tmp_path).ground
    positions = tokens_of(steps_of(ground.data.train, 2, 2, 0)) / 2
    assert ground.positions == positions < 2 * 16
    costs, rows = ground.costs, ground.data.measured
    whole, floor = costs.all_linear(), costs.floor()
    once = ground.passes(rows, forward=1, backward=1)
    share = tokens_of(in_batches(rows, 2)) / positions
    assert once.steps == pytest.approx(share * costs.step_time(floor) / costs.step_time(whole))
    assert ground.of_weights.steps == pytest.approx(ground.of_weights.flops / costs.step_time(whole) / positions)
    kept, spent = ground.selected("alignment", 0.5)
    tokens = spent.flops / floor.flops
    assert spent.steps == pytest.approx(tokens / positions * costs.step_time(floor) / costs.step_time(whole)) and kept
    before, after = ground.charge("task x 4"), ground.charge("after 3 x 4")
    assert after.steps - before.steps == pytest.approx(3.0)
    assert after.flops - before.flops == pytest.approx(3 * whole.flops * positions)


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
    (tmp_path / "notes.md").write_text("Before.\n<!-- tiny: whole -->\nold\n<!-- tiny: end -->\nAfter.\n")
    found = benchmark.report(wanted, store, tmp_path, [tmp_path / "notes.md"])
    notes = (tmp_path / "notes.md").read_text()
    assert "\n| planner [nf4 x 4] at 50% |" in notes and "old" not in notes
    assert notes.startswith("Before.") and notes.endswith("<!-- tiny: end -->\nAfter.\n")
    assert "planner [nf4 x 4] at 50%" in capsys.readouterr().out and not (tmp_path / "tiny.png").exists()
    with pytest.raises(SystemExit, match=r"tiny.json tells of 7 jobs, and .*empty has results of 0: .* --out"):
        benchmark.report(wanted, results.Store(tmp_path / "empty", wanted), tmp_path)
    benchmark.report(replace(wanted, report="contest"), store, tmp_path)
    assert "Arms with a size of their own" in capsys.readouterr().out and (tmp_path / "tiny.png").exists()
    assert list(found["times"]) == ["planner at 50%"] and len(found["times"]["planner at 50%"]) == 1
    runner.show("planner + *")
    assert capsys.readouterr().out.startswith("done")
    by_label = {row["label"]: row for row in found["rows"]}
    assert 0 < by_label["planner [after 1 x 4]"]["agreement"]["jaccard"] <= 1
    combined = by_label["planner + alignment 0.5 + stop"]
    assert combined["examples"] == 2 and combined["charged_flops"] > by_label["planner"]["charged_flops"]
    text = markdown({**found, "kind": "multiplication"})
    assert "Stopping is at" in text and "72% of the gain at 6% of the cost" in text


def test_freezing_the_lower_half_on_some_steps(folder, tmp_path):
    """With the lower half trained on all steps it is the contest's job; on none, the lower half stays as it began."""
    from benchmarks.study.catalogue import choice_of

    runner = runner_of(folder, study_of(folder, [{"arms": ["all-linear"]}]), tmp_path)
    runner.run(math.inf)
    [loss] = [r["loss"] for job, r in runner.store.all() if job.entry.arm == "all-linear"]
    choice = choice_of(runner.ground, Entry("all-linear"), None)
    assert freezing.train(runner.ground, choice, [True, True]) == pytest.approx(loss)
    one = freezing.train(runner.ground, choice, [True, False])
    assert len({round(x, 6) for x in (loss, one, freezing.train(runner.ground, choice, [False, False]))}) == 3
    assert freezing.step_time(runner.ground, choice, 1) < freezing.step_time(runner.ground, choice, 0) == 1
    assert [freezing.is_of_all("every 2", i, 5) for i in range(5)] == [True, False, True, False, True]
    assert [freezing.is_of_all("until 0.4", i, 5) for i in range(5)] == [True, True, False, False, False]
    with pytest.raises(SystemExit, match="'sometimes' is no schedule: say 'every N' or 'until SHARE'"):
        freezing.is_of_all("sometimes", 0, 5)
