"""Several processes keep one record, take one decision, and start, freeze and train experts alike.

They run once, as two gloo processes that `torchrun` starts with this very file as their script.
"""

import random
import sys
from pathlib import Path

import pytest
import torch

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.runs.ledger import Ledger
from peft_blueprint.runs.log import RunLog
from peft_blueprint.runs.quantity import UNITS, modelled
from peft_blueprint.runs.record import RunRecord
from peft_blueprint.runs.stopping import MarginalReturn
from peft_blueprint.train import BlueprintCallback
from tests.accounts import LENGTH, At, end, logged, lora, make_trainer, rows, train
from tests.fused import HAS_FUSED
from tests.processes import error_of, gloo_process, in_two_processes
from tests.train import test_experts, test_freezing, test_initialization


STEP = 2 * 4 * LENGTH  # tokens of both processes


def rule():
    return MarginalReturn(threshold=1e9, window=3, patience=2)


def outcome(trainer, callback):
    return {
        "step": trainer.state.global_step,
        "stopped": callback.log.stopped_at,
        "totals": callback.log.totals(),
        "own": callback.log.ledger.quantities(),
        "logged": logged(trainer),
        "points": callback.log.points,
        "rule": callback.stop.state_dict(),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def scenario_trainer(rank, path):
    """DDP with accelerate, stopped by the rule."""
    return outcome(*train(path / "whole", stop=rule(), resource="tokens"))


def scenario_resumed(rank, path):
    """The same in two parts."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    train(path / "parts", None, At(4, end), arguments=saving, stop=rule(), resource="tokens")
    checkpoint = str(path / "parts" / "checkpoint-4")
    return outcome(*train(path / "parts", arguments=saving, resume=checkpoint, stop=rule(), resource="tokens"))


def scenario_blueprints(rank, path):
    """DDP, measured on seven of nine validation examples; the weights stay as they are."""
    trainer = make_trainer(path / "measured", eval_dataset=rows(9), max_steps=2, learning_rate=0.0)
    callback = BlueprintCallback(trainer, max_examples=7, milestones=[1.0])
    trainer.add_callback(callback)
    trainer.train()
    return error_of(callback.checkpoints)


def scenario_loop(rank, path):
    """An own loop, in which the processes see other metrics and spend other amounts."""
    ledger = Ledger(flops_per_token=modelled(10.0, "assumed"), meters=[])
    log = RunLog("loop", metric="loss", stop=rule(), ledger=ledger, resource="flops", output_dir=path / "loop")
    decisions = []
    with log:
        for step in range(1, 9):
            log.step(tokens=100 + 50 * rank)
            value = 1.0 if rank == 0 else 1.0 / step**4
            decisions.append(log.evaluate(value, step=step, progress=step / 8))
            if decisions[-1].stop:
                break
    return {"decisions": decisions, "totals": log.totals(), "state": log.state_dict(), "step": step}


def scenario_absent(rank, path):
    """A resource that is not there."""
    log = RunLog("absent", stop=rule(), ledger=Ledger(meters=[]), resource="energy_joules")
    log.ledger.start()
    return error_of(lambda: log.evaluate(1.0, step=1))


def scenario_failing(rank, path):
    """One process's ledger cannot be read."""
    log = RunLog("failing", ledger=Ledger(meters=[]), output_dir=path / "failing")
    with log:
        log.step(tokens=5)
        log.evaluate(1.0, step=1)
        if rank == 1:
            log.ledger.quantities = lambda: 1 / 0
        log.step(tokens=5)
        log.evaluate(1.0, step=2)
    return log.totals()["tokens"].value


def scenario_initialization(rank, path):
    """Adapters along the gradient of both processes' examples."""
    return test_initialization.in_processes(rank)


def scenario_freezing(rank, path):
    """Freezing from below under DDP, and experts that the tokens of one process do not reach."""
    test_freezing.in_processes(path / "freezing")
    if HAS_FUSED:
        test_experts.in_processes()
    return "equal"


SCENARIOS = [name for name in globals() if name.startswith("scenario_")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of both processes by scenario, and their folder."""
    folder = tmp_path_factory.mktemp("found")
    in_two_processes(__file__, folder)
    both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name.removeprefix("scenario_"): [of[name] for of in both] for name in SCENARIOS} | {"folder": folder}


def test_all_processes_measure_one_blueprint(found):
    """Each has full batches of its own examples; the first writes the same blueprint as one process alone."""
    first, second = found["blueprints"]
    assert first == "none" and "Call checkpoints() in the first process" in second
    measured = Blueprint.from_pretrained(found["folder"] / "measured" / "blueprint-100.json")
    assert measured.provenance["processes"] == 2 and measured.submodules[0].examples == 6
    chosen = sorted(random.Random(0).sample(range(9), 7))[:6]
    examples = [{key: value.tolist() for key, value in rows(9)[i].items()} for i in chosen]
    alone = generate_blueprint(lora(), examples, progress=False)
    assert [entry.gradient_norm for entry in measured] == pytest.approx(
        [entry.gradient_norm for entry in alone], rel=1e-4
    )


def test_all_processes_stop_at_the_same_step(found):
    """By the first one's decision; the rule's state is the same everywhere, and one file says why."""
    first, second = found["trainer"]
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    assert first["step"] == second["step"] == first["stopped"] == second["stopped"] == 8
    assert first["rule"] == second["rule"] and first["points"] == second["points"]
    record = RunRecord.load(found["folder"] / "whole")
    assert record.stopping["step"] == 8 and record.points == tuple(first["points"])
    assert record.about["train_config"]["processes"] == record.about["system"]["processes"] == 2


def test_totals_are_those_of_all_processes(found):
    """Tokens, FLOPs and device-hours added, seconds and peak the largest; the log has the same."""
    first, second = found["trainer"]
    totals = first["totals"]
    assert totals.keys() == UNITS.keys() and totals == second["totals"]
    assert totals["tokens"].value == 8 * STEP and totals["tokens"].how == "measured"
    for name, together in (("flops", sum), ("device_hours", sum), ("seconds", max), ("peak_bytes", max)):
        own = [part["own"][name].value for part in (first, second)]
        assert totals[name].value == pytest.approx(together(own)), name
    assert first["own"]["tokens"].value == second["own"]["tokens"].value == 8 * STEP / 2
    assert first["logged"][5]["tokens"] == 5 * STEP


def test_a_resumed_run_has_the_totals_of_an_uninterrupted_one(found):
    """Of both processes, nothing twice."""
    for whole, parts in zip(found["trainer"], found["resumed"], strict=True):
        assert parts["step"] == parts["stopped"] == 8 and parts["points"][-1].metrics == whole["points"][-1].metrics
        assert parts["totals"]["tokens"].value == whole["totals"]["tokens"].value
        assert parts["totals"]["flops"].value == pytest.approx(whole["totals"]["flops"].value)
        assert [p.spent["tokens"] for p in parts["points"]] == [p.spent["tokens"] for p in whole["points"]]


def test_processes_of_an_own_loop_decide_together(found):
    """For any metric of the other process, with the costs of both."""
    first, second = found["loop"]
    assert first["decisions"] == second["decisions"] and first["step"] == second["step"] == 4
    assert first["totals"]["tokens"].value == 4 * 250 and first["totals"]["flops"].value == 4 * 2500
    assert first["totals"]["flops"].how == "modelled" and first["state"]["stop"] == second["state"]["stop"]
    record = RunRecord.load(found["folder"] / "loop")
    assert [point.metrics["loss"] for point in record.points] == [1.0] * 4, "the first process's"


def test_an_error_is_every_processs(found):
    """A resource that is absent ends all of them with the same words, and none waits for another."""
    first, second = found["absent"]
    assert first == second and "'energy_joules' is absent" in first and "Use one of seconds" in first


def test_a_ledger_that_fails_on_one_process_ends_no_run(found):
    """The totals stay at their last common sum."""
    assert found["failing"] == [10, 10]


def test_initializing_shares_the_examples_and_ends_with_one_a(found):
    """As one process with all examples; an error in one process ends the others too."""
    alone = test_initialization.begun_alone()
    (first, own), (second, others) = found["initialization"]
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name].abs(), expected.abs(), atol=1e-4), name
    assert own[0] == others[0] == "none" and "no target" in own[1]
    assert others[1] == f"MeasurementError: Process 0 of 2 failed, so the others stop: {own[1]}"
    assert own[2] == others[2]
    assert own[2].startswith("MeasurementError: Processes 0 and 1 have other adapters or seeds: give every process")


def test_freezing_and_experts_leave_equal_weights(found):
    """Under DDP with unused parameters found; without, freezing is refused. The scenario compares the weights."""
    assert found["freezing"] == ["equal", "equal"]


def main():
    """One process of the two."""
    path = Path(sys.argv[1])
    with gloo_process() as rank:
        torch.save({name: globals()[name](rank, path) for name in SCENARIOS}, path / f"{rank}.pt")


if __name__ == "__main__":
    main()
