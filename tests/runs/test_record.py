"""Records of runs, written and read. Run: pytest tests/runs/test_record.py"""

import copy
import json
import math
from contextlib import suppress
from dataclasses import replace
from enum import Enum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_blueprint.errors import BlueprintError, FormatError, MismatchError
from peft_blueprint.publish import method_comparison_json, update_card
from peft_blueprint.runs.record import RUN_FILE, Point, RunRecord, direction_of, jsonable
from peft_blueprint.runs.report import make_report
from tests.made_up_runs import made_up_run


HISTORY = [
    {"loss": 2.4, "grad_norm": 1.0, "learning_rate": 2e-4, "epoch": 0.5, "step": 10},
    {"eval_loss": 2.2, "eval_runtime": 1.0, "eval_samples_per_second": 8.0, "epoch": 0.5, "step": 10},
    {"loss": 2.0, "learning_rate": 1e-4, "epoch": 1.0, "step": 20, "num_input_tokens_seen": 4096},
    {"eval_loss": math.nan, "eval_accuracy": 0.5, "eval_runtime": 1.0, "epoch": 1.0, "step": 20},
    {"train_runtime": 30.0, "total_flos": 8e12, "train_loss": 2.2, "epoch": 1.0, "step": 20},
]


def trainers(folder, history=HISTORY, **more):
    folder.mkdir(parents=True)
    state = {"global_step": 20, "total_flos": 8e12, "log_history": history, **more}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_a_record_is_read_as_it_was_written(tmp_path):
    """Through a folder and through a file, with a metric that was not finite."""
    record = made_up_run(note={"a": [1, None, "b"]})
    bad = Point(9999, {"seconds": 1.0}, {"eval_loss": math.nan})
    assert RunRecord.load(made_up_run().save(tmp_path / "run")) == RunRecord.load(tmp_path / "run") == made_up_run()
    assert record.save(tmp_path / "other.json") == tmp_path / "other.json"
    assert RunRecord.load(tmp_path / "other.json") == record
    again = RunRecord.load(replace(record, points=(*record.points, bad)).save(tmp_path))
    assert math.isnan(again.points[-1].metrics["eval_loss"]) and again.points[:-1] == record.points


def test_values_beyond_json_are_written_as_text(tmp_path):
    """Sets in order, enumerations by their values: a record is never lost to a config's odd field."""

    class Kind(Enum):
        LORA = "LORA"

    about = {"peft_config": {"peft_type": Kind.LORA, "target_modules": {"b", "a"}, "path": tmp_path, "x": math.inf}}
    record = RunRecord.load(made_up_run(**about).save(tmp_path))
    assert record.about["peft_config"] == {
        "peft_type": "LORA",
        "target_modules": ["a", "b"],
        "path": str(tmp_path),
        "x": None,
    }


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """Whole or not at all, with a clear error."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BlueprintError, match="cannot be written"):
        made_up_run().save(tmp_path / "file" / RUN_FILE)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_trainers_output_folder_is_a_run(tmp_path):
    """Of its newest checkpoint: evaluations and losses by step, FLOPs modelled, other figures absent."""
    trainers(tmp_path / "sft" / "checkpoint-9", [])
    newest = trainers(tmp_path / "sft" / "checkpoint-20")
    (newest / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/m"}')
    record = RunRecord.load(tmp_path / "sft")
    assert (record.name, record.metric, record.direction, record.resource) == ("sft", "eval_loss", "minimize", "flops")
    assert [point.step for point in record.points] == [10, 20]
    assert record.points[0].metrics == {"eval_loss": 2.2} and record.points[0].spent == {"flops": 4e12}
    assert math.isnan(record.points[1].metrics["eval_loss"]) and record.points[1].metrics["eval_accuracy"] == 0.5
    assert [point.metrics["loss"] for point in record.losses] == [2.4, 2.0]
    assert record.losses[1].spent == {"flops": 8e12, "tokens": 4096.0} and record.losses[0].learning_rate == 2e-4
    assert {
        name: record.total(name).how for name in ("flops", "seconds", "tokens", "energy_joules", "carbon_grams")
    } == {
        "flops": "modelled",
        "seconds": "measured",
        "tokens": "measured",
        "energy_joules": "absent",
        "carbon_grams": "absent",
    }
    assert record.about["model_id"] == "org/m"
    assert RunRecord.load(newest / "trainer_state.json") == record


def test_a_record_goes_before_a_trainers_state(tmp_path):
    """Even one in a checkpoint, since it says more."""
    trainers(tmp_path / "sft")
    made_up_run("kept").save(tmp_path / "sft" / "checkpoint-20")
    assert RunRecord.load(tmp_path / "sft").name == "kept"


def broken(change):
    data = made_up_run().to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (
            lambda d: d["points"][3]["metrics"].update(eval_loss="low"),
            r"points\.3\.metrics\.eval_loss must be a number, got 'low'",
        ),
        (lambda d: d["points"][2].update(step=1.5), r"points\.2\.step must be a whole number, got 1\.5"),
        (
            lambda d: d["points"][3]["metrics"].update({"a\nb\x1b" + "c" * 99: "low"}),
            r"metrics\.a\\nb\\x1bc{49,52}… must be a number, got 'low'",
        ),
        (lambda d: d["points"].reverse(), "points must have rising steps, got 550 after 600"),
        (lambda d: d.update(points=7), "points must be a list, got 7"),
        (lambda d: d["totals"]["tokens"].update(how="guessed"), r"totals\.tokens\.how must be one of"),
        (lambda d: d.update(direction="up"), "direction must be one of 'minimize', 'maximize', got 'up'"),
        (lambda d: d.update(resource="money"), "resource must be one of seconds, .*, got 'money'"),
        (lambda d: d.update(name=""), "name must not be empty"),
        (lambda d: d.update(schema_version=2), "schema_version must be 1, got 2"),
        (lambda d: d.clear(), "schema_version must be 1, got None"),
    ],
)
def test_a_broken_record_says_where(tmp_path, change, place):
    """The file and the place in it."""
    file = tmp_path / RUN_FILE
    file.write_text(json.dumps(broken(change)))
    with pytest.raises(FormatError, match=place) as raised:
        RunRecord.load(tmp_path)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("text", ['{"name": "a",', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "[1]", "\xff"])
def test_an_invalid_record_names_the_file(tmp_path, text):
    """Cut short, nested without end, a number too long, a list, no text."""
    (tmp_path / RUN_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=RUN_FILE):
        RunRecord.load(tmp_path)


def paths(value, path=()):
    """Every place in nested lists and objects."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from paths(item, (*path, key))


ABOUT = {
    "held_out": "org/data",
    "system": {"devices": ["cpu"]},
    "train_config": {"learning_rate": 1e-4},
    "placement": {"lora": {"q": 4}},
    "probe": {"seconds": {"value": 1.0, "how": "measured"}},
}
STOPPING = {
    "stopped": True,
    "step": 3,
    "reason": "flat",
    "ratio": 1.0,
    "proposal": "shorter",
    "settings": {"window": 5},
}
SOUND = json.loads(json.dumps(replace(made_up_run(evaluations=3, **ABOUT), stopping=STOPPING).to_dict()))
STATE = {"global_step": 20, "total_flos": 8e12, "log_history": HISTORY}
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, "", "a", "\ud800", math.inf, math.nan])
)
ANYTHING = st.recursive(
    SCALARS | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sound=st.sampled_from([SOUND, STATE]))
def test_a_mutated_record_is_sound_or_a_format_error(tmp_path_factory, data, sound):
    """With any value at any place, an accepted record can be written, reported on and read again."""
    changed = copy.deepcopy(sound)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([p for p in paths(changed) if p] or [()]))
        if not path:
            break
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[path[-1]] = data.draw(ANYTHING)
        elif isinstance(inner, dict):
            del inner[path[-1]]
        else:
            inner.insert(path[-1], inner[path[-1]])
    folder = tmp_path_factory.mktemp("run")
    file = folder / ("run.json" if sound is SOUND else "trainer_state.json")
    file.write_text(json.dumps(changed))
    try:
        record = RunRecord.load(file)
    except FormatError as error:
        assert str(file) in str(error)
        return
    again = RunRecord.load(record.save(folder / "again.json"))
    assert jsonable(again.to_dict()) == jsonable(record.to_dict())
    assert not any(math.isinf(value) for point in record.points for value in point.metrics.values())
    with suppress(MismatchError):  # a metric of another name
        report = make_report([record])
        json.dumps(method_comparison_json(report.rows[0], report), allow_nan=False)
        assert update_card(folder, report, report.rows[0])[0].exists()


def test_a_broken_trainers_state_says_where(tmp_path):
    """An entry without a step."""
    trainers(tmp_path / "sft", [{"loss": 1.0}])
    with pytest.raises(FormatError, match=r"log_history\.0\.step is missing"):
        RunRecord.load(tmp_path / "sft")


def test_the_error_for_a_missing_run_says_how_to_make_one(tmp_path):
    """No folder, and a folder with nothing of the kind."""
    with pytest.raises(BlueprintError, match="No run found at"):
        RunRecord.load(tmp_path / "nowhere")
    with pytest.raises(BlueprintError, match="LedgerCallback"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval_perplexity", "word_error_rate", "wer", "rmse"])
def test_losses_and_errors_fall(name):
    """By their names; other metrics rise."""
    assert direction_of(name) == "minimize" and direction_of(f"{name}_accuracy") == "maximize"
