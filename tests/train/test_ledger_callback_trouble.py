"""Failures in bookkeeping end no run and make no wrong number.

Run: pytest tests/train/test_ledger_callback_trouble.py
"""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from peft_blueprint.errors import BlueprintError, FormatError, MeasurementError
from peft_blueprint.runs.ledger import LOOK_EVERY, Ledger
from peft_blueprint.runs.log import RunLog
from peft_blueprint.runs.quantity import modelled
from peft_blueprint.runs.record import RunRecord
from peft_blueprint.runs.stopping import MarginalReturn
from peft_blueprint.train.ledger_callback import LedgerCallback
from tests.accounts import make_trainer, train


class Meter:
    """A meter that fails after `joules`."""

    name = "a meter"

    def __init__(self, fails_at):
        self.shown, self.fails_at = 0.0, fails_at

    def joules(self):
        self.shown += 100.0
        if self.shown > self.fails_at:
            raise MeasurementError("it fell off the wall")
        return self.shown


def rule():
    return MarginalReturn(threshold=1e-9, window=3, patience=2)


def log_of(resource="flops", **settings):
    ledger = settings.pop("ledger", None) or Ledger(flops_per_token=modelled(2.0, "assumed"), meters=[])
    return RunLog("own", metric="loss", stop=rule(), resource=resource, ledger=ledger, **settings)


@pytest.mark.parametrize("watts", [None, 50.0])
def test_a_meter_that_fails_takes_decisions_and_not_the_run(watts, caplog):
    """Energy is absent or modelled from then on; the ledger continues without a rule."""
    with log_of("energy_joules", ledger=Ledger(meters=[Meter(600)], watts=watts)) as log:
        decisions = [log.evaluate(2.0 - i / 10, step=i + 1) for i in range(8)]
    assert decisions[0] is not None and decisions[-1] is None and len(log.points) == 8
    assert "decisions by energy_joules" in caplog.text


def test_an_evaluation_of_something_else_ends_nothing(tmp_path):
    """Once the metric was seen, an evaluation without it, under a prefix of the user's own, is a point like another."""

    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                trainer.evaluate(metric_key_prefix="test")

    trainer = make_trainer(tmp_path, max_steps=6, eval_steps=2)
    callback = LedgerCallback(trainer, stop=MarginalReturn(threshold=-1e9))
    trainer.add_callback(callback)
    trainer.add_callback(Other())
    trainer.train()
    assert trainer.state.global_step == 6
    assert [set(point.metrics) for point in callback.log.points][2] == {"test_loss"}


def test_numbers_of_any_kind_are_taken(tmp_path):
    """Tensors and NumPy's, as loops have them; the record can be read."""
    with log_of(output_dir=tmp_path) as log:
        log.step(tokens=torch.tensor(20), flops=np.float32(7.0))
        assert log.evaluate({"loss": torch.tensor(1.5), "accuracy": np.float32(0.5)}, step=1) is not None
    record = RunRecord.load(tmp_path)
    assert record.points[0].metrics == {"loss": 1.5, "accuracy": 0.5}
    assert (record.totals["tokens"].value, record.totals["flops"].value) == (20, 7.0)
    with pytest.raises(BlueprintError, match="flops must be at least 0, got -5.0"):
        Ledger(meters=[]).add(1, flops=-5.0)


def some_steps(log, first, last):
    with log:
        for i in range(first, last):
            log.step(tokens=10)
            log.evaluate(3.0 - i / 10, step=i)
    return log


def test_the_rule_begins_anew_where_something_else_is_counted(caplog):
    """Costs in tokens do not convert to seconds; totals continue."""
    state = some_steps(log_of("tokens"), 1, 6).state_dict()
    other = log_of("flops")
    other.load_state_dict(state)
    assert "the stopping rule starts again" in caplog.text and other.stop.last_resource is None
    assert some_steps(other, 6, 8).totals()["tokens"].value == 70
    same = log_of("tokens")
    same.load_state_dict(state)
    assert same.stop.last_resource == 50


def test_a_state_that_does_not_fit_changes_nothing():
    """Ledger and rule both stay as they were."""
    state = some_steps(log_of(), 1, 6).state_dict()
    del state["totals"]["energy_joules"]
    log = log_of()
    with pytest.raises(FormatError, match="The state of RunLog: totals must be"):
        log.load_state_dict(state)
    assert log.stop.last_resource is None and some_steps(log, 1, 2).totals()["tokens"].value == 10


def test_meters_are_looked_at_in_long_evaluations(clock, tmp_path):
    """Once a minute, by the ledger and by the callback's step of an evaluation."""
    meter = Meter(1e9)
    with Ledger(meters=[meter]) as ledger:
        before = meter.shown
        ledger.look_if_due()
        assert meter.shown == before
        clock.now += LOOK_EVERY + 1
        ledger.look_if_due()
        assert meter.shown > before


def test_an_evaluation_looks(tmp_path, monkeypatch):
    """At every step of an evaluation that the Trainer announces."""
    looks = []
    monkeypatch.setattr(Ledger, "look_if_due", lambda self: looks.append(self))
    train(tmp_path, arguments={"max_steps": 2, "eval_steps": 2})
    with_evaluation = len(looks)
    looks.clear()
    train(tmp_path, arguments={"max_steps": 2, "eval_strategy": "no"})
    assert with_evaluation > len(looks)


def test_work_on_the_cpu_counts_no_gpu(monkeypatch):
    """On a machine with GPUs, the process's own memory counts."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with Ledger(meters=[], gpus=False) as ledger:
        pass
    assert ledger.devices == 1 and ledger.peak_bytes > 0
    assert "resident" in ledger.quantities()["peak_bytes"].source


def test_the_stored_state_is_made_once():
    """A checkpoint of a long run does not write its whole log anew at every step that logs."""
    log = some_steps(log_of(), 1, 6)
    first, second = log.state_dict(), log.state_dict()
    assert first == second and all(a is b for a, b in zip(first["points"], second["points"], strict=True))


@pytest.mark.parametrize("place", ["forward", "on_step_end", "on_step_begin"])
def test_an_interrupt_leaves_no_hook_on_the_model(tmp_path, place):
    """The token hook and the FLOP counter, active in the second step, are removed."""

    class Interrupting(TrainerCallback):
        steps = 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.steps += 1
            if self.steps == 2 and place == "on_step_begin":
                raise KeyboardInterrupt

        def on_step_end(self, args, state, control, **kwargs):
            if self.steps == 2 and place == "on_step_end":
                raise KeyboardInterrupt

    trainer, interrupting = make_trainer(tmp_path), Interrupting()
    trainer.add_callback(LedgerCallback(trainer))
    trainer.add_callback(interrupting)
    forward = trainer.model.forward

    def interrupted(*args, **kwargs):
        if interrupting.steps == 2 and place == "forward":
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    trainer.model.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.model._forward_pre_hooks and not trainer.model_wrapped._forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
