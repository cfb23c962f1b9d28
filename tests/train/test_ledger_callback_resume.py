"""A resumed run has the record of an uninterrupted one. Run: pytest tests/train/test_ledger_callback_resume.py"""

import json
import logging

import pytest

from peft_blueprint.runs.record import RunRecord
from peft_blueprint.runs.stopping import MarginalReturn
from peft_blueprint.train.ledger_callback import STATE_KEY, LedgerCallback
from tests.accounts import At, end, make_trainer, train


# PEFT 0.20, of a model without a name
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")

SAVING = {"save_strategy": "steps", "save_steps": 2}


def rule():
    """Stops at the fifth check of a curve that is flat or not."""
    return MarginalReturn(threshold=1e9, window=3, patience=3)


def settings(resource):
    return {"stop": rule(), "resource": resource}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of a run of twenty steps that stops after ten, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = train(folder, arguments={"max_steps": 20}, **settings("tokens"))
    assert trainer.state.global_step == callback.log.stopped_at == 10
    return RunRecord.load(folder)


# before, between and after the first checks that count
@pytest.mark.parametrize(("cut", "restore"), [(2, False), (6, True), (8, False)])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(cut, restore, whole, tmp_path):
    """With the same evaluations, words and totals, with and without transformers' own restoring."""
    folder = tmp_path / "parts"
    arguments = {**SAVING, "max_steps": 20, "restore_callback_states_from_checkpoint": restore}
    train(folder, None, At(cut, end), arguments=arguments, **settings("tokens"))
    checkpoint = str(folder / f"checkpoint-{cut}")
    resumed, rest = train(folder, None, arguments=arguments, resume=checkpoint, **settings("tokens"))
    assert resumed.state.global_step == rest.log.stopped_at == 10
    mine, theirs = RunRecord.load(folder), whole
    assert [point.step for point in mine.points] == [point.step for point in theirs.points]
    assert [point.metrics for point in mine.points] == [point.metrics for point in theirs.points]
    assert [point.step for point in mine.losses] == [point.step for point in theirs.losses]
    assert mine.stopping == theirs.stopping and mine.name != theirs.name
    for name in ("tokens", "flops", "optimizer_bytes"):
        assert mine.totals[name] == theirs.totals[name], "with how each came about"


def test_totals_go_on_counting(tmp_path):
    """Seconds and all else begin where the checkpoint was, so that no figure of the curve goes back."""
    train(tmp_path, None, At(4, end), arguments=SAVING)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"][STATE_KEY]["log"]["totals"]
    before = RunRecord.load(tmp_path)
    assert 0 < saved["seconds"]["value"] <= before.totals["seconds"].value
    train(tmp_path, None, arguments=SAVING, resume=str(tmp_path / "checkpoint-4"))
    after = RunRecord.load(tmp_path)
    assert [point.step for point in after.points] == [2, 4, 6, 8, 10]
    for name in ("seconds", "device_hours", "tokens", "flops"):
        values = [point.spent[name] for point in after.points]
        assert values == sorted(values) and values[2] > saved[name]["value"]
    assert after.totals["seconds"].value > saved["seconds"]["value"]


def test_an_unscheduled_save_has_the_ledger_too(tmp_path):
    """As they were when the processes last added up."""
    train(tmp_path, None, At(5, end), arguments={"save_strategy": "no", "logging_steps": 2})
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    books = state["stateful_callbacks"][STATE_KEY]["log"]
    assert [point["step"] for point in books["points"]] == [2, 4] and books["totals"]["tokens"]["value"] > 0


def test_a_checkpoint_without_a_ledger_resumes(tmp_path, caplog):
    """Made without a callback, or with a damaged ledger: a new ledger begins there, with a warning."""
    trainer = make_trainer(tmp_path, **SAVING, max_steps=4)
    trainer.train()
    resumed, callback = train(tmp_path, arguments=SAVING, resume=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 10 and [p.step for p in callback.log.points] == [6, 8, 10]
    assert not caplog.records

    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"][STATE_KEY]["log"]["points"] = "gone"
    path.write_text(json.dumps(state))
    with caplog.at_level(logging.WARNING):
        resumed, callback = train(tmp_path, arguments=SAVING, resume=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 10 and [p.step for p in callback.log.points] == [8, 10]
    assert "The state of RunLog: points must be a list" in caplog.text


def test_a_checkpoint_with_a_ledger_resumes_without_one(tmp_path):
    """With transformers' own restoring on, which looks for the callbacks in the checkpoint."""
    train(tmp_path, None, At(4, end), arguments=SAVING)
    plain = make_trainer(tmp_path, **SAVING, restore_callback_states_from_checkpoint=True)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert plain.state.global_step == 10


def test_best_model_checkpoints_have_the_ledger_of_their_evaluation(tmp_path):
    """Whether to save is known only after it."""
    arguments = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trainer, _ = train(tmp_path, arguments=arguments)
    for folder in tmp_path.glob("checkpoint-*"):
        step = int(folder.name.rpartition("-")[2])
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["stateful_callbacks"][STATE_KEY]["log"]["points"][-1]["step"] == step
    assert list(tmp_path.glob("checkpoint-*"))


def test_two_trainings_of_one_callback_do_not_share_a_ledger(tmp_path):
    """The second starts at zero with the same trainer."""
    trainer = make_trainer(tmp_path, max_steps=4)
    callback = LedgerCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    first = callback.log
    trainer.train()
    assert callback.log is not first and [p.step for p in callback.log.points] == [2, 4]
    assert callback.log.totals()["tokens"] == first.totals()["tokens"]
