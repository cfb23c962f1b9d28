"""Studies of placements: arms by name, jobs in order, runs that resume, one archive. On a tiny model and made-up rows."""

import json
import math
from dataclasses import asdict, replace

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet

from benchmarks.setup import RESULTS
from benchmarks.study import run as running
from benchmarks.study.arms import UNFREEZE, Infeasible, charge_of, choice_of, equal_in_parameters, filled, rule_of
from benchmarks.study.ground import Charge
from benchmarks.study.plan import UNTRAINED, Entry, Job, Schedule, Study, best_octave, next_octaves
from benchmarks.study.report import Report
from benchmarks.study.run import Runner, without_retired
from benchmarks.study.store import Store
from benchmarks.study.training import losses_of, mean_of, prepare
from peft_blueprint import Blueprint
from peft_blueprint.blueprint import bundled_blueprints
from tests import ROOT


SIZES = {"length": 16, "batch": 2, "steps": 2, "warm_up": 1, "rank": 4, "measured": 4, "held_out": 4}
SIZES |= {"data": "numbers", "model": "tiny", "few": 2, "every": 1, "unrelated": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the tiny model and its blueprint are kept."""
    return tmp_path_factory.mktemp("study")


@pytest.fixture(autouse=True)
def _in_cache(cache, monkeypatch):
    monkeypatch.chdir(cache)


def study_of(folder, order: list, **changes) -> Study:
    """A study of the tiny model, read from a YAML."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"order": order, **SIZES, **changes}))
    return Study.read(path)


def runner_of(study: Study, folder, cache) -> Runner:
    """A runner with its log in a folder, and no archive."""
    store = Store(study, folder / "runs.jsonl", folder / "runs.parquet")
    return Runner(study, store, cache, cache / "measured")


ARMS = ["all-linear", "even", "random"]


# ---- order


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
    assert best_octave({0: {0: 0.7}, 1: {0: 0.6, 1: 0.9}, 2: {0: math.inf}}) == 1
    assert best_octave({0: {0: 0.7, 1: 0.7}, 1: {0: 0.6, 1: 0.9, 2: 0.1}}) == 0
    assert best_octave({0: {0: 0.7, 1: 0.7}, 1: {0: 0.6, 1: 0.7}, 2: {0: 0.65, 1: math.inf}}) == 1


def test_the_schedule_takes_first_things_first_and_seeds_for_the_closest(tmp_path):
    """Ladders of rates grow with the results; further seeds go to the arms of the lowest loss, at their best rate."""
    order = [
        {"arms": ARMS, "budgets": [0.2], "rates": "best"},
        {"arms": ["random #1", {"arm": "even", "blueprint": "task x 8"}], "budgets": [0.2]},
        {"arms": ["all-linear"], "closest": 1, "budgets": [0.2], "seeds": [1, 2]},
    ]
    wanted = study_of(tmp_path, order)
    best = {"all-linear": 0, "even": 2, "random": -1, "random #1": 0, UNTRAINED: 0}
    known: dict[Job, float] = {}
    while True:
        schedule = Schedule(wanted, known.get, lambda *_: 0, lambda arm: arm != "all-linear")
        job = next((j for j in schedule.jobs() if j not in known), None)
        if job is None:
            break
        known[job] = 1.0 + abs(job.octave - best[job.entry.arm]) / 10 - 0.01 * (job.entry.arm == "even")
    jobs = list(known)
    assert jobs[0].entry == Entry(UNTRAINED)
    assert [j.octave for j in jobs if j.entry == Entry("even") and j.seed == 0] == [0, 1, -1, 2, 3]
    assert [j.octave for j in jobs if j.entry.blueprint == "task x 8"] == [2], "another blueprint takes its arm's rate"
    assert [j.octave for j in jobs if j.entry.arm == "random #1"] == [-1], "a further draw takes its family's rate"
    seeds = {(j.entry.arm, j.octave, j.seed) for j in jobs if j.seed}
    assert seeds == {("all-linear", 0, 1), ("all-linear", 0, 2), ("even", 2, 1), ("even", 2, 2)}


def test_an_invalid_study_is_refused(tmp_path):
    """The error names the file, the fault and the fix; all studies in the repository can be read."""
    with pytest.raises(SystemExit, match=r"Cannot read .*missing.yaml: .*No such file.* benchmarks/studies"):
        Study.read(tmp_path / "missing.yaml")
    cases = {
        "a: [": "Cannot read",
        "just words": "must be a mapping with the keys data and order",
        "{data: gsm8k, order: [], stride: 3}": "bad.yaml has no option 'stride'",
        "{data: gsm8k, order: [], flops_per_second: 1e13}": "flops_per_second must be a number, got '1e13'",
        "{data: gsm8k, order: [], steps: true}": "steps must be a whole number, got True",
        "{data: gsm8k, order: [{arm: planner}]}": "bad.yaml, order has no option 'arm'. Did you mean 'arms'",
        "{data: gsm8k, order: [{arms: [{arm: even, part: 0.2}]}]}": "bad.yaml, order has no option 'part'",
        "{data: gsm8k, order: [even]}": "bad.yaml, order must be a mapping, got 'even'",
    }
    for text, said in cases.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SystemExit, match=said):
            Study.read(tmp_path / "bad.yaml")
    for path in (ROOT / "benchmarks" / "studies").glob("*.yaml"):
        found = Study.read(path)
        assert found.name == path.stem and found.entries


# ---- arms


def test_an_arms_name_names_the_adapted_modules():
    """Base, number, modifiers and draw in any combination; an unknown part is refused."""
    assert rule_of("planner").is_budgeted and not rule_of("planner, as shipped").is_budgeted
    found = rule_of("random, within kind x 50, along the gradient x 16, as shipped #2")
    assert (found.base, found.coverage, found.count, found.draw) == ("random", "kind", 50, 2)
    assert found.start == "gradient x 16" and found.is_shipped
    assert rule_of("cover, keep 0.9, as shipped").wish == (("keep", 0.9),)
    assert rule_of("planner, 0.7x, as shipped").wish == (("budget", "0.7x"),)
    assert rule_of("gradient_norm, pooled").coverage == "none"
    assert rule_of("all-linear, LoRA+").ahead == 8.0 and not rule_of("all-linear, LoRA+").is_budgeted
    assert rule_of("all-linear, low rank").is_budgeted and rule_of("AdaLoRA").start == "adalora"
    for name in ("strata, as shipped", "planner, rates by gain", "luck"):
        with pytest.raises(SystemExit, match="Unknown arm"):
            rule_of(name)


def test_budgets_are_filled_from_below(tmp_path, cache):
    """Every kind of arm stays within its parameters and comes near to them."""
    ground = runner_of(study_of(tmp_path, [{"arms": ARMS}]), tmp_path, cache).ground
    sizes = {entry.name: sum(entry.shape) for entry in ground.entries}
    names = ["planner", "gradient_norm, pooled", "even", "random", "MLP only", "all-linear, low rank", "KappaTune"]
    for name in [*names, "Spectrum", "planner, along the gradient x 4", "random, within kind, as many"]:
        choice = choice_of(ground, Entry(name), 0.5)
        total = sum(rank * sizes[module] for module, rank in choice.ranks.items())
        assert 0.8 * 0.5 * ground.whole < total <= 0.5 * ground.whole, name
    whole = {name: choice_of(ground, Entry(name), None) for name in ("all-linear", "planner, as shipped")}
    assert set(whole["all-linear"].ranks.values()) == {4} and len(whole["planner, as shipped"].ranks) < 28
    with pytest.raises(Infeasible, match="the smallest block has more than the .* parameters that are allowed"):
        choice_of(ground, Entry("unfreeze top"), 0.01)
    with pytest.raises(Infeasible, match="rank 1 on 28 submodules has .* parameters, and 5 are allowed"):
        filled(ground.entries, 5)


def test_ranks_of_equal_parameters_are_those_of_the_archive():
    """So that a study of covers goes on where it ended."""
    kept = parquet.read_table(RESULTS / "runs.parquet", columns=["arm", "length", "record"]).to_pylist()
    [ranks, *_] = [
        json.loads(row["record"])["ranks"]
        for row in kept
        if row["arm"] == "cover_gain x 30, as shipped" and row["length"] == 200
    ]
    entries = Blueprint.from_pretrained(bundled_blueprints("HuggingFaceTB/SmolLM2-135M-Instruct")["gsm8k"])
    chosen = [entry for entry in entries if entry.name in ranks]
    assert equal_in_parameters(chosen, list(entries), 16) == ranks and len(ranks) == 30


def test_every_start_trains(tmp_path, cache):
    """PEFT's and the library's ways to begin, and modules that are trained whole, run as arms."""
    starts = ["all-linear, EVA", "all-linear, LoRA-GA", "AdaLoRA", "planner, along the gradient x 4"]
    others = ["full fine-tuning", "unfreeze by gain", "all-linear, LoRA+"]
    wanted = study_of(
        tmp_path, [{"arms": [*starts, *others], "budgets": [0.5]}], attention="eager", batch=8, measured=8
    )
    runner = runner_of(wanted, tmp_path, cache)
    assert runner.ground.model().config._attn_implementation == "eager"
    runner.run(math.inf)
    records = {job.entry.arm: record for job, record in runner.store.jobs()}
    failed = {name: r["error"] for name, r in records.items() if r["status"] == "failed"}
    assert failed == {} and set(records) == {UNTRAINED, *starts, *others}
    charged = {name for name, r in records.items() if r["status"] == "done" and r["charged_flops"]}
    assert {"all-linear, EVA", "all-linear, LoRA-GA", "planner, along the gradient x 4"} <= charged
    assert not charged & {UNTRAINED, "AdaLoRA", "all-linear, LoRA+"}
    begun = prepare(runner.ground, choice_of(runner.ground, Entry("all-linear, LoRA+"), None), 2, 0)
    names = {id(p): name for name, p in begun.model.named_parameters()}
    groups = begun.optimizer(1.0).param_groups
    rates = {(".lora_B." in names[id(p)], group["factor"]) for group in groups for p in group["params"]}
    assert rates == {(True, 8.0), (False, 1.0)}


# ---- runs


def test_an_interrupted_run_resumes_with_the_missing_jobs(tmp_path, cache, monkeypatch):
    """A killed run leaves no half result; the next one runs only missing jobs, and failed ones on request."""
    wanted = study_of(tmp_path, [{"arms": ARMS, "budgets": [0.5]}])
    ran: list[str] = []
    run = running.run

    def counted(ground, job, choice):
        ran.append(job.entry.arm)
        if ran == [UNTRAINED, "all-linear", "even"]:
            raise KeyboardInterrupt
        if ran[-1] == "random" and "random" not in ran[:-1]:
            raise RuntimeError("out of luck")
        return run(ground, job, choice)

    monkeypatch.setattr(running, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        runner_of(wanted, tmp_path, cache).run(math.inf)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"cut')  # a process that was killed while it wrote
    assert runner_of(wanted, tmp_path, cache).run(math.inf) == 2 and ran[3:] == ["even", "random"]
    assert runner_of(wanted, tmp_path, cache).run(math.inf) == 0
    store = runner_of(wanted, tmp_path, cache).store
    [failed] = [r for _, r in store.jobs() if r["status"] == "failed"]
    assert failed["error"] == "RuntimeError: out of luck" and len(store.jobs()) == 4
    assert runner_of(wanted, tmp_path, cache).run(math.inf, retry=True) == 1
    assert {r["status"] for _, r in runner_of(wanted, tmp_path, cache).store.jobs()} == {"done"}
    longer = runner_of(replace(wanted, steps=3), tmp_path, cache)
    assert longer.run(0.0) == 0 and longer.store.jobs() == [], (
        "other sizes are other results, and need more than no time"
    )


def test_processes_share_a_study_without_running_a_job_twice(tmp_path, cache, monkeypatch):
    """A claimed job is skipped, and run here if its process ends without a result."""
    wanted = study_of(tmp_path, [{"arms": ARMS, "budgets": [0.5]}])
    here, there = (runner_of(wanted, tmp_path, cache) for _ in range(2))
    taken = {name: next(j for j in there.schedule.jobs() if j.entry.arm == name) for name in ("even", "all-linear")}
    claims = [there.store.claim(job, there._trained(job)) for job in taken.values()]
    assert all(claims) and here.store.claim(taken["even"], here._trained(taken["even"])) is None
    ran: list[str] = []

    def wait(seconds):
        ran.extend(sorted(job.entry.arm for job, _ in here.store.jobs()))
        there._one(taken["all-linear"])
        for claim in claims:
            claim.release()

    monkeypatch.setattr(running.time, "sleep", wait)
    assert here.run(math.inf) == 3 and ran == ["random", UNTRAINED]
    assert len(there.store.jobs()) == 4


def test_the_log_moves_into_the_archive_and_studies_resume_from_it(tmp_path, cache):
    """Each record once with its date; jobs whose training changed run again, and their old records stay."""
    wanted = study_of(tmp_path, [{"arms": ["all-linear", "even"], "budgets": [0.5]}])
    first = runner_of(wanted, tmp_path, cache)
    first.run(math.inf)
    first.store.append({"status": "step time", "row": "even at 50%", "ratio": 0.8, "round": 1})
    before = first.store.jobs()
    assert first.store.keep() == 4 and not first.store.log.exists()
    second = runner_of(wanted, tmp_path, cache)
    assert second.run(math.inf) == 0 and dict(second.store.jobs()) == dict(before)
    assert second.store.step_times() == {"even at 50%": [0.8]}
    rows = parquet.read_table(second.store.archive).to_pylist()
    [even] = [row for row in rows if row["arm"] == "even"]
    record = json.loads(even["record"])
    assert (even["loss"], even["seed"], even["steps"]) == (record["loss"], 0, record["study"]["steps"])
    even["record"] = json.dumps({**record, "ranks": {"model.layers.0.mlp.up_proj": 1}})
    parquet.write_table(pyarrow.Table.from_pylist(rows), second.store.archive)
    third = runner_of(wanted, tmp_path, cache)
    assert third.run(math.inf) == 1 and third.store.keep() == 5 and first.store.log.exists() is False


def test_a_choice_that_fails_is_that_jobs_failure(tmp_path, cache, monkeypatch):
    """The process goes on; failed jobs run again on request, and a record beyond JSON counts as failed."""
    wanted = study_of(tmp_path, [{"arms": ARMS, "budgets": [0.5]}])
    run, choose = running.run, running.choice_of

    def choice(ground, entry, budget):
        return {}["no such module"] if entry.arm == "even" else choose(ground, entry, budget)

    def trained(ground, job, choice):
        return {**run(ground, job, choice), **({"seconds": math.nan} if job.entry.arm == "random" else {})}

    with monkeypatch.context() as patch:
        patch.setattr(running, "choice_of", choice)
        patch.setattr(running, "run", trained)
        assert runner_of(wanted, tmp_path, cache).run(math.inf) == 4
        assert runner_of(wanted, tmp_path, cache).run(math.inf) == 0
    failed = {j.entry.arm: r["error"] for j, r in runner_of(wanted, tmp_path, cache).store.jobs() if "error" in r}
    assert failed["even"] == "KeyError: 'no such module'" and failed["random"].startswith("ValueError: Out of range")
    runner = runner_of(wanted, tmp_path, cache)
    assert runner.run(math.inf, retry=True) == 2
    report = Report(wanted, runner.store.jobs(), {})
    assert len(report.rows) == 3 and not report.failed


def test_an_arm_that_no_rule_knows_any_more_is_left_out_where_it_ran_once(tmp_path, cache, capsys):
    """A name that never ran is a mistake."""
    wanted = study_of(tmp_path, [{"arms": ["all-linear", "strata, as shipped"]}])
    store = runner_of(wanted, tmp_path, cache).store
    with pytest.raises(SystemExit, match="Unknown arm 'strata, as shipped'"):
        without_retired(wanted, store)
    store.append({"status": "done", "loss": 1.0, "job": asdict(Job(Entry("strata, as shipped"), None, 0, 0, 2))})
    assert [entry.arm for entry in without_retired(wanted, store).entries] == ["all-linear"]
    assert "Not run any more: strata, as shipped." in capsys.readouterr().err


def test_resampling_draws_rows_for_every_seed(tmp_path, cache):
    """Measured, curve, training and test examples stay apart; without resampling all seeds share theirs."""
    own = study_of(tmp_path, [{"arms": ARMS}], spare=3, resample=True, test_from_train=100)
    grounds = [runner_of(study, tmp_path, cache).ground for study in (study_of(tmp_path, [{"arms": ARMS}]), own)]
    assert "resample" not in grounds[0].study.facts() and own.facts()["resample"] is True
    assert grounds[0].data_of(0).train == grounds[0].data_of(1).train
    parts = [grounds[1].data_of(seed) for seed in range(40)]
    assert parts[0].measured == parts[1].measured and parts[0].spare == parts[1].spare
    assert parts[0].train != parts[1].train and parts[0].tested != parts[1].tested

    def ids(name):
        return {tuple(row["input_ids"]) for part in parts for row in getattr(part, name)}

    groups = [ids(name) for name in ("measured", "spare", "train", "test")]
    assert sum(map(len, groups)) == len(set().union(*groups)), "no example serves two ends, in any seed"
    assert max(i for part in parts for i in part.tested) >= 400, "test examples come from the training split too"
    with pytest.raises(SystemExit, match="numbers has 300 training examples .* needs 801"):
        greedy = replace(own, steps=397)
        runner_of(greedy, tmp_path, cache).ground.data_of(0)


def test_arms_of_a_resampled_study_share_their_first_weights(tmp_path, cache):
    """A follows from the seed and the module's name alone."""
    ground = runner_of(study_of(tmp_path, [{"arms": ARMS}], resample=True), tmp_path, cache).ground
    whole, few = (choice_of(ground, Entry(arm), None) for arm in ("all-linear", "cover_gain x 3"))
    few = replace(few, ranks=dict.fromkeys(few.ranks, ground.study.rank))
    weights = [
        dict(prepare(ground, choice, 1, seed).model.named_parameters())
        for choice, seed in ((whole, 1), (few, 1), (few, 2))
    ]
    names = [name for name in weights[1] if ".lora_A." in name]
    assert len(names) == 3 and all(torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert not any(torch.equal(weights[1][name], weights[2][name]) for name in names)
    assert len({tuple(weights[1][name].flatten()[:4].tolist()) for name in names}) == 3


def test_whole_blocks_fill_a_share_of_the_model(tmp_path, cache):
    """Each rule takes the most expensive blocks that fit; weights alternate attention and feed-forward."""
    wanted = study_of(tmp_path, [{"arms": ARMS}], budgets_of="model")
    ground = runner_of(wanted, tmp_path, cache).ground
    of_model = sum(p.numel() for p in ground.shell.parameters())
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in ground.shell.named_modules()}
    found = {arm: choice_of(ground, Entry(arm), 0.5).whole for arm in UNFREEZE}
    for arm, blocks in found.items():
        assert blocks and 0.3 * of_model < sum(map(sizes.__getitem__, blocks)) <= 0.5 * of_model, arm
    assert len(set(found.values())) > 3
    assert [name.rpartition(".")[2] for name in found["unfreeze by Spectrum"]][:2] in (
        ["self_attn", "mlp"],
        ["mlp", "self_attn"],
    )
    assert charge_of(ground, choice_of(ground, Entry("unfreeze random"), 0.5), "task") == Charge()
    with pytest.raises(Infeasible, match="smallest block"):
        choice_of(ground, Entry("unfreeze random"), 0.001)


def test_a_cover_of_equal_weights_measures_nothing(tmp_path, cache):
    """It is the measured cover's rule, at its learning rate and without its charge."""
    ground = runner_of(study_of(tmp_path, [{"arms": ARMS}]), tmp_path, cache).ground
    equal = Entry("cover_gain x 3, as shipped", blueprint="equal")
    choice = choice_of(ground, equal, None)
    assert len(choice.ranks) == 3 and equal.family == Entry("cover_gain x 3, as shipped")
    assert {entry.adam_gain for entry in ground.blueprint("equal")} == {1.0}
    assert charge_of(ground, choice, "equal") == Charge() != charge_of(ground, choice, "task")


def test_the_curve_is_of_spare_examples_where_there_are_some(tmp_path, cache):
    """The untrained model's only point is its loss on them."""
    wanted = study_of(tmp_path, [{"arms": ["all-linear"]}], spare=3)
    runner = runner_of(wanted, tmp_path, cache)
    runner.run(math.inf)
    [untrained] = [r for job, r in runner.store.jobs() if job.entry.arm == UNTRAINED]
    ready = prepare(runner.ground, choice_of(runner.ground, Entry(UNTRAINED), None), 0, 0)
    expected = mean_of(*losses_of(ready, runner.ground.data_of(0).spare))
    assert untrained["curve"] == [[0, pytest.approx(expected)]]


def test_other_blueprints_and_chosen_data_run_as_arms(tmp_path, cache, capsys):
    """With the costs of measuring and choosing and the agreement of placements; --jobs and --times work on them."""
    arms = ["all-linear", "planner", *({"arm": "planner", "blueprint": b} for b in ("task x 2", "after 1 x 4"))]
    arms += [{"arm": "planner", "blueprint": "nf4 x 4"}, {"arm": "planner", "select": "alignment", "share": 0.5}]
    runner = runner_of(study_of(tmp_path, [{"arms": arms, "budgets": [0.5]}]), tmp_path, cache)
    runner.run(math.inf)
    runner.times(1, "planner at *")
    records = {job.entry.label: r for job, r in runner.store.jobs()}
    assert {r["status"] for r in records.values()} == {"done"}
    assert 0 < records["planner [after 1 x 4]"]["agreement"]["jaccard"] <= 1
    chosen = records["planner + alignment 0.5"]
    assert chosen["examples"] == 2 and chosen["charged_flops"] > records["planner"]["charged_flops"]
    assert {name: len(ratios) for name, ratios in runner.store.step_times().items()} == {"planner at 50%": 1}
    runner.show("planner + *")
    assert capsys.readouterr().out.startswith("done")
    ground = runner.ground
    before, after = ground.charge("task x 4"), ground.charge("after 3 x 4")
    assert after.steps - before.steps == pytest.approx(3.0)
    with pytest.raises(SystemExit, match="Unknown blueprint 'luck x 3'. Write 'task x 8'"):
        ground.measured("luck x 3")


def test_a_job_of_fewer_steps_warms_up_for_as_many_fewer(tmp_path, cache, monkeypatch):
    """The warm-up is a share of a job's own steps."""
    from benchmarks.study import training

    ground = runner_of(study_of(tmp_path, [{"arms": ARMS}], steps=8, warm_up=4, every=99), tmp_path, cache).ground
    rates: list[float] = []
    step = training.Ready.step

    def noted(self, optimizer, rows, number=1):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(self, optimizer, rows, number)

    monkeypatch.setattr(training.Ready, "step", noted)
    for steps, peak in ((8, 4), (4, 2), (1, 1)):
        rates.clear()
        ready = prepare(ground, choice_of(ground, Entry("all-linear"), None), steps, 0)
        training.train(ready, [ground.data_of(0).train[:2]] * steps, 1e-6, [])
        assert rates.index(1e-6) + 1 == peak == rates.index(max(rates)) + 1 and len(rates) == steps


def test_jobs_are_read_back_as_they_were_written():
    """Archived jobs that stopped early keep their label and are not run again."""
    job = Job(Entry("planner", stop=True, select="random", share=0.3), 0.2, 1, 0, 9)
    assert Job.of(json.loads(json.dumps(asdict(job)))) == job
    assert job.label == "planner + random 0.3 + stop at 20% 2^+1 seed 0"
