"""`peft-blueprint select-data` writes the chosen examples as they came. Run: pytest tests/test_cli_select.py"""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.cli.program import app
from peft_blueprint.data.options import DEFAULT_METHOD, METHODS
from peft_blueprint.data.tables import read_table, write_table
from peft_blueprint.errors import BlueprintError
from peft_blueprint.testing import save_tiny_model, tiny_llama, toy_batches


ROWS = [
    {
        "question": " ".join(str((7 * i + j) % 90) for j in range(4 + i % 5)),
        "answer": f"{i} {2 * i % 90}",
        "id": f"é{i}",
    }
    for i in range(24)
]


def run(*arguments):
    """What the verb prints."""
    done = CliRunner().invoke(app, ["select-data", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


@pytest.fixture
def asked(folder, tmp_path):
    """The arguments that every call has, but for the file to write."""
    return [folder, "--data", folder / "data.jsonl", "--columns", "prompt=question,completion=answer"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_chosen_are_written_with_all_their_columns(asked, tmp_path, ending):
    """In the data's order, in each format, with scores when asked; the JSON says which, and how."""
    out = tmp_path / f"new/chosen.{ending}"
    said = json.loads(
        run(
            *asked,
            "--fraction",
            0.25,
            "--method",
            "loss",
            "--out",
            out,
            "--with-scores",
            "--format",
            "json",
            "--batch-size",
            4,
        )
    )
    kind = "json" if ending == "jsonl" else ending
    found = load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["id"] for row in found] == [ROWS[i]["id"] for i in said["indices"]] and len(found) == 6
    assert found["question"] == [ROWS[i]["question"] for i in said["indices"]]
    assert found["selection_score"] == pytest.approx(said["scores"]) and found["selection_index"] == said["indices"]
    assert said["method"] == "loss" and said["report"]["cost"]["flops"] > 0 and said["written"] == str(out)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_quietly_it_prints_the_file_alone(asked, tmp_path):
    """And without a method that asks the model, loads no weights."""
    out = tmp_path / "chosen.jsonl"
    assert run(*asked, "--count", 5, "--out", out, "--format", "quiet") == f"{out}\n"
    first = out.read_text(encoding="utf-8")
    assert first.count("\n") == 5 and "é" in first and "selection_score" not in first
    run(*asked, "--count", 5, "--out", out, "--format", "quiet", "--stream")
    assert out.read_text(encoding="utf-8") == first


def test_a_target_and_a_blueprint_are_read(asked, folder, tmp_path):
    """Alignment on the submodules of a placement; the table says how well predictions held."""
    target = tmp_path / "target.jsonl"
    target.write_text("".join(json.dumps({"text": row["question"]}) + "\n" for row in ROWS[:4]), encoding="utf-8")
    record = generate_blueprint(tiny_llama(2), toy_batches(), model_id="tiny", progress=False).save(
        tmp_path / "b.json"
    )
    assert isinstance(Blueprint.from_pretrained(str(record)), Blueprint)
    options = ["--method", "predicted_alignment", "--small", 16, "--target", target, "--blueprint", record]
    out = tmp_path / "chosen.jsonl"
    said = run(*asked, "--count", 5, "--out", out, *options, "--placement-fraction", 0.5)
    assert "5 of 24 examples by predicted_alignment" in said and "held-out rank correlation" in said
    state = tmp_path / "state"
    asked_again = [*asked, "--count", 5, "--out", out, *options, "--keep-state", state, "--format", "json"]
    first, second = (json.loads(run(*asked_again)) for _ in range(2))
    assert first["indices"] == second["indices"] and state.exists()
    assert json.loads(
        run(*asked, "--count", 3, "--method", "bm25", "--target", target, "--out", out, "--format", "json")
    )["scores"]


def test_bad_use_ends_before_anything_is_loaded(asked, folder, tmp_path):
    """Nothing is written, and the data itself cannot be written over."""
    out = tmp_path / "chosen.jsonl"
    for arguments, message in [
        ([*asked, "--count", 3, "--out", tmp_path / "chosen.txt"], "must end in one of"),
        ([*asked, "--count", 3, "--out", folder / "data.jsonl"], "would overwrite the file of --data"),
        ([*asked, "--out", out], "Give either fraction or count"),
        ([*asked, "--count", 3, "--out", out, "--method", "best"], "method must be one of .* got 'best'"),
        ([*asked, "--count", 3, "--out", out, "--method", "bm25"], "Give target"),
        ([*asked, "--count", 3, "--out", out, "--placement-fraction", 0.5], "needs the blueprint to place by"),
        ([folder, "--data", tmp_path / "none.jsonl", "--count", 3, "--out", out], "does not exist"),
    ]:
        with pytest.raises(BlueprintError, match=message):
            run(*arguments)
    usage = CliRunner().invoke(app, ["select-data", *map(str, [*asked[:-1], "prompt", "--count", 3, "--out", out])])
    assert usage.exit_code == 2 and "NAME=COLUMN pairs" in usage.output
    assert not out.exists() and len((folder / "data.jsonl").read_text(encoding="utf-8").splitlines()) == 24


def test_the_help_names_what_there_is():
    """Every method, and the default."""
    text = CliRunner().invoke(app, ["select-data", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).stdout
    assert all(name in text for name in [*METHODS, "iterative"]) and DEFAULT_METHOD in text


def test_the_verb_starts_without_torch():
    """Its help does not wait."""
    script = "import sys, peft_blueprint.cli.program; print(sorted({'torch', 'datasets'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_tables_that_cannot_be_are_refused(tmp_path):
    """A file that is no table, and values that a format cannot hold; what was there stays."""
    broken, out = tmp_path / "broken.jsonl", tmp_path / "out.jsonl"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(BlueprintError, match="cannot be read"):
        read_table(str(broken))
    out.write_text("before", encoding="utf-8")
    with pytest.raises(BlueprintError, match="cannot hold these examples"):
        write_table(out, [{"a": 1}, {"a": {1}}])
    assert out.read_text(encoding="utf-8") == "before" and len(list(tmp_path.iterdir())) == 2
