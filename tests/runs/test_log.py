"""Costs of evaluations, checkpoints and optimizer states in the record of an own loop."""

import math

import pytest
import torch

from peft_blueprint.runs import Ledger, MarginalReturn, RunLog, RunRecord
from peft_blueprint.runs.record import Point


def loop(clock, log, saving=0.0, steps=20):
    """Train for `steps` steps of 10 s whose loss falls evenly, with evaluations of 1 s; checkpoints get slower."""
    with log:
        for step in range(1, steps + 1):
            clock.now += 10
            log.step(tokens=10)
            with log.evaluating():
                clock.now += 1
            decision = log.evaluate(3 - 0.01 * step, step=step, progress=step / steps)
            with log.saving():
                clock.now += saving * step
            if decision is not None and decision.stop:
                return step
    return None


def log_of(**settings):
    return RunLog("own", ledger=Ledger(meters=[]), **settings)


def test_evaluating_and_saving_are_parts_of_the_seconds(clock, tmp_path):
    """Each is counted, also when it fails; every evaluation has them so far, and so has the file."""
    log = log_of(output_dir=tmp_path)
    loop(clock, log, saving=0.5, steps=4)
    assert log.seconds == {"evaluating": 4.0, "saving": 5.0} and log.ledger.seconds == 49
    assert [point.of_which["saving"] for point in log.points] == [0.0, 0.5, 1.5, 3.0]
    with pytest.raises(OSError), log.saving():
        clock.now += 2
        raise OSError
    assert log.seconds["saving"] == 7.0
    assert RunRecord.load(tmp_path).points == tuple(log.points)
    assert math.isnan(Point(1, of_which={"saving": None}).of_which["saving"]), "a null of a file"
    other = log_of()
    other.load_state_dict(log.state_dict())
    assert other.points == log.points and other.seconds == log.seconds


def test_slow_checkpoints_halt_a_run_that_pays_without_them(clock):
    """They raise ΔΓ: the same fall of the loss buys less per second."""
    rule = {"threshold": 0.0005, "budget": 500}
    assert loop(clock, log_of(stop=MarginalReturn(**rule))) is None
    assert 10 < loop(clock, log_of(stop=MarginalReturn(**rule)), saving=1.0) < 20


def test_the_summary_shows_the_last_window_and_the_optimizer(clock):
    """Shares of the last five evaluations; GB·h of Adam's states; neither without its numbers."""
    log, parameter = log_of(), torch.nn.Parameter(torch.zeros(1000, 1000))
    assert "window" not in log.summary() and "optimizer states" not in log.summary()
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    log.note_optimizer(optimizer)
    loop(clock, log, saving=1.0)
    lines = log.summary().splitlines()
    between = 16 + 17 + 18 + 19
    share = between / (4 * 11 + between)
    assert f"  of these saving: 3 min 30 s, {share:.1%} of the last window (measured)" in lines
    bytes_held = log.totals()["optimizer_bytes"].value
    assert bytes_held == pytest.approx(8e6, rel=1e-3)
    spent = log.record().about["optimizer_gb_hours"]
    assert spent == pytest.approx(bytes_held / 1e9 * log.ledger.seconds / 3600) and spent > 0
    assert any(line.startswith("  optimizer states: 9.56") and "GB·h (modelled" in line for line in lines)
