"""Bad input data is refused before the work, with the example's position. Run: pytest tests/data/test_selection_inputs.py"""

import json
from datetime import date, datetime, time

import numpy as np
import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from peft_blueprint import measure
from peft_blueprint.cli.program import app
from peft_blueprint.data.examples import Pool
from peft_blueprint.data.options import SCORE_COLUMNS
from peft_blueprint.data.tables import read_table, require_columns, require_storable, write_table
from peft_blueprint.errors import BlueprintError
from peft_blueprint.measure import encode, encode_one
from peft_blueprint.testing import save_tiny_model
from tests.choosing import choose, make_rows


CHAT = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)
    rows = [{"text": f"{i} {i + 1} {i + 2} 7", "made": f"2020-01-0{1 + i}T01:02:03"} for i in range(9)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fail the test if a model or tokenizer is loaded."""

    def load(*_):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(measure, "load_model", load)
    monkeypatch.setattr(measure, "load_tokenizer", load)


def run(folder, *arguments):
    """Run the verb; raise its exception, if any."""
    done = CliRunner().invoke(app, ["select-data", *map(str, (folder, *arguments))])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_dates_are_written_in_iso_form(folder, tmp_path, stream):
    """As they were in the file, although datasets parses them."""
    out = tmp_path / "out.jsonl"
    assert (
        run(
            folder, "--data", folder / "data.jsonl", "--count", 9, "--out", out, "--format", "quiet", *stream
        ).exit_code
        == 0
    )
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["made"] for row in found] == [f"2020-01-0{1 + i}T01:02:03" for i in range(9)]


def test_json_lines_hold_null_instead_of_nan(tmp_path):
    """At any depth; dates and times are in ISO form."""
    rows = [{"a": float("nan"), "b": [1.5, float("inf"), {"c": date(2020, 1, 2)}], "d": time(1, 2)}]
    write_table(tmp_path / "a.jsonl", [*rows, {"a": datetime(2020, 1, 2)}])
    first, second = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {"a": None, "b": [1.5, None, {"c": "2020-01-02"}], "d": "01:02:00"}
    assert json.loads(second) == {"a": "2020-01-02T00:00:00"}


@pytest.mark.usefixtures("nothing_loads")
def test_values_that_cannot_be_written_are_refused_first(folder, tmp_path):
    """Such as bytes in JSON; no file is left behind."""
    data, out = tmp_path / "data.parquet", tmp_path / "out.jsonl"
    Dataset.from_list([{"text": "1 2", "raw": b"1"}] * 3).to_parquet(str(data))
    for stream in ([], ["--stream"]):
        with pytest.raises(BlueprintError, match=r"out.jsonl cannot hold these examples: .*bytes.*another format"):
            run(folder, "--data", data, "--count", 1, "--out", out, *stream)
    data.with_suffix(".jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(BlueprintError, match=r"cannot be read: 'utf-8' codec .* Save the data as UTF-8"):
        run(folder, "--data", data.with_suffix(".jsonl"), "--count", 1, "--out", out)
    with pytest.raises(BlueprintError, match=r"out.parquet cannot hold"):
        require_storable(tmp_path / "out.parquet", [{"a": 2**70}])
    require_storable(out, [{"a": 1}])
    assert not out.exists()


@pytest.mark.usefixtures("nothing_loads")
def test_input_files_are_not_overwritten(folder, tmp_path):
    """A folder, one file twice, and an existing score column are refused too."""
    data, target, out = folder / "data.jsonl", tmp_path / "target.jsonl", tmp_path / "out.jsonl"
    scored = tmp_path / "scored.jsonl"
    target.write_text('{"text": "1 2"}\n', encoding="utf-8")
    scored.write_text('{"text": "1 2", "selection_index": 1}\n', encoding="utf-8")
    (tmp_path / "folder.jsonl").mkdir()
    asked = ["--data", data, "--count", 3, "--target", target]
    with_scores = ["--data", scored, "--count", 1, "--out", out, "--with-scores"]
    for arguments, message in [
        ([*asked, "--out", target], "--out .*target.jsonl would overwrite the file of --target .*target.jsonl"),
        ([*asked, "--out", out, "--keep-state", out], "--keep-state .* would overwrite the file of --out"),
        ([*asked, "--out", out, "--keep-state", data], "--keep-state .* would overwrite the file of --data"),
        ([*asked, "--out", tmp_path / "folder.jsonl"], "--out .*folder.jsonl is a folder"),
        (with_scores, "already has 'selection_index'"),
        ([*with_scores, "--stream"], "already has 'selection_index'"),
        (["--data", data, "--out", out, "--fraction", 1.5], "fraction must be a number in .0, 1., got 1.5"),
        (["--data", data, "--out", out, "--fraction", 0.5, "--count", 1], "Give either fraction or count"),
        (["--data", data, "--out", tmp_path / "o.csv", "--fraction", 0.5, "--stream"], "--out must end in .jsonl"),
        (["--data", data, "--out", out, "--fraction", 0.5, "--count", 1, "--stream"], "Give either fraction or count"),
        ([*asked, "--out", out, "--columns", "promt=text"], "columns has unknown keys 'promt'. Keys are 'prompt'"),
        ([*asked, "--out", out, "--columns", "text=txet"], "no column 'txet'; it has 'text', 'made'"),
        ([*asked, "--out", out, "--columns", "text=txet", "--stream"], "no column 'txet'"),
        ([*asked, "--out", out, "--seed", -1], "seed must be at least 0, got -1"),
    ]:
        with pytest.raises(BlueprintError, match=message):
            run(folder, *arguments)
    assert target.read_text(encoding="utf-8") == '{"text": "1 2"}\n' and not out.exists()


def test_score_columns_have_fixed_names():
    """Which the command line knows without torch."""
    rows = choose(make_rows(4), count=2).apply(make_rows(4), with_scores=True)
    assert set(rows[0]) == {"input_ids", "labels", *SCORE_COLUMNS}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\nnot json\n', "JSON parse error"),
        ("b.jsonl", "", "has no examples"),
        ("c.jsonl", "\n\n", "has no examples"),
        ("d.csv", "", "has no examples"),
        ("e.csv", "a,b\n", "has no examples"),
        ("f.csv", "a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3"),
        ("g.parquet", "xx", "Parquet file size"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_reason(tmp_path, name, content, message, stream):
    """Read whole or as a stream."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BlueprintError, match=rf"The data '.*{name}' .*{message}.*\."):
        list(read_table(str(tmp_path / name), stream=stream))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:1], "Example 1 must have at least two messages, .*, got 1"),
        ([], "Example 1 must have at least two messages, .*, got 0"),
        ("hello", "messages of example 1 must be a list, got str"),
        (None, "messages of example 1 must be a list, got NoneType"),
        ([CHAT[0], "3"], "Message 1 of example 1 must be a mapping .* got str"),
        ([CHAT[0], {"role": "tool", "content": "3"}], "refuses example 1 with the roles 'user', 'tool': no tools"),
    ],
)
def test_invalid_chats_are_refused_by_position(tokenizer, messages, message):
    """Also those that the template itself refuses."""
    tokenizer.chat_template = (
        "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(BlueprintError, match=message):
        encode([{"messages": CHAT}, {"messages": messages}], tokenizer)
    if messages and isinstance(messages, list):
        with pytest.raises(BlueprintError, match=message):
            choose([{"messages": CHAT}, {"messages": messages}], count=1, tokenizer=tokenizer)


def test_messages_need_a_chat_template(tokenizer):
    """A prompt and completion do not."""
    with pytest.raises(BlueprintError, match=r"Example 4 has messages, but the tokenizer has no chat template. Set"):
        encode_one({"messages": CHAT}, tokenizer, 16, 4)
    assert encode_one({"prompt": "1", "completion": "2"}, tokenizer, 1) is None


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ("1 2 3", [1, 2, 3], r"'input_ids' of example 1 must be .*, got str of shape \(\)"),
        (["1", "2"], [1, 2], "'input_ids' of example 1 must be .*, got list of str"),
        ([1.0, 2.0], [1, 2], "'input_ids' of example 1 must be .*, got list of float"),
        ([1, 2], [1, float("nan")], "'labels' of example 1 must be .*, got list of float"),
        ([[1, 2]], [[1, 2]], r"'input_ids' of example 1 must be .*, got list of shape \(1, 2\)"),
        ([[1, 2], [3]], [1, 2], "'input_ids' of example 1 .* ragged"),
        ([1, -2], [1, 2], "'input_ids' of example 1 must be one sequence of integers from 0, got -2"),
        ([1, -100], [1, -100], "'input_ids' of example 1 must .*, got -100"),
        ([1, 2], [1, -1], "'labels' of example 1 must .* or -100, got -1"),
        ([1, 2, 3], [1, 2], r"of example 1 must be of one length, got 3 and 2"),
        (None, [1, 2], "'input_ids' of example 1 must .*, got NoneType"),
    ],
)
def test_token_ids_must_be_one_sequence_of_integers(ids, labels, message):
    """The error names the example's position."""
    with pytest.raises(BlueprintError, match=message):
        choose([*make_rows(1), {"input_ids": ids, "labels": labels}], count=1)


def test_arrays_and_tensors_of_integers_are_token_ids():
    """Like lists and tuples; without ids there is no target."""
    pool = Pool(make_rows(1))
    for kind in (list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint16)):
        one = pool.encode(0, {"input_ids": kind([1, 2, 3]), "labels": kind([1, 2, 3])})
        assert one is not None and one.row == {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    assert pool.encode(0, {"input_ids": [], "labels": []}) is None


def test_unknown_columns_are_refused(tokenizer):
    """Keys always, names for the data; a target may have other names."""
    rows, columns = [{"text": "1 2 3"}], {"text": "body"}
    require_columns({"messages": "a", "completion": "b"})
    with pytest.raises(BlueprintError, match="unknown keys 'promt'"):
        Pool(rows, tokenizer, {"promt": "question"})
    with pytest.raises(BlueprintError, match="no column 'body'; it has 'text'"):
        Pool(rows, tokenizer, columns, requires_columns=True).encode(0, rows[0])
    assert Pool(rows, tokenizer, columns).encode(0, rows[0]) is not None


def test_data_with_a_length_and_no_positions_is_refused():
    """It works as a stream."""
    rows = dict(enumerate(make_rows(6)))
    with pytest.raises(BlueprintError, match=r"has a length and no positions \(dict_values\)"):
        choose(rows.values(), count=2)
    assert choose(iter(rows.values()), count=2).indices == choose(list(rows.values()), count=2).indices
