"""`peft-blueprint select-data` writes the chosen examples as they came. Run: pytest tests/test_cli_select.py"""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.cli.program import app
from peft_blueprint.data import CrossInfluence
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
    """Return the output of the verb."""
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
    """The data stays as it was."""
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


def test_the_help_lists_all_methods():
    """Every method, and the default."""
    text = CliRunner().invoke(app, ["select-data", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).stdout
    assert all(name in text for name in [*METHODS, "iterative"]) and DEFAULT_METHOD in text


def test_the_verb_starts_without_torch():
    """Its help does not wait."""
    script = "import sys, peft_blueprint.cli.program; print(sorted({'torch', 'datasets'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_tables_that_cannot_be_are_refused(tmp_path):
    """A file that is not a table, and values that a format cannot hold; an old file stays."""
    broken, out = tmp_path / "broken.jsonl", tmp_path / "out.jsonl"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(BlueprintError, match="cannot be read"):
        read_table(str(broken))
    out.write_text("before", encoding="utf-8")
    with pytest.raises(BlueprintError, match="cannot hold these examples"):
        write_table(out, [{"a": 1}, {"a": {1}}])
    assert out.read_text(encoding="utf-8") == "before" and len(list(tmp_path.iterdir())) == 2


CORPUS = [{"text": " ".join(str((11 * i + j * j) % 90) for j in range(30 + 17 * (i % 3)))} for i in range(12)]


@pytest.fixture
def corpus(folder, tmp_path):
    """Documents longer than a block, and the arguments of every call."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CORPUS), encoding="utf-8")
    return [folder, "--data", path, "--max-length", 16, "--batch-size", 4]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_blocks_of_a_corpus_are_written_as_rows_to_train_on(corpus, tmp_path):
    """The half of highest gradient norm, of a list and of a stream, with packing and with a count."""
    out, options = tmp_path / "blocks.jsonl", ["--unit", "block", "--method", "norm", "--format", "json"]
    said = json.loads(run(*corpus, *options, "--fraction", 0.5, "--out", out, "--with-scores"))
    rows = rows_of(out)
    assert len(rows) == said["report"]["chosen"] == said["report"]["examples"] // 2
    assert all(2 <= len(row["input_ids"]) == len(row["labels"]) <= 16 and row["start"] % 16 == 0 for row in rows)
    assert [row["selection_index"] for row in rows] == said["indices"]
    streamed = json.loads(run(*corpus, *options, "--fraction", 0.5, "--out", out, "--stream"))
    assert streamed["report"]["unit"] == "example" and 0.4 < streamed["report"]["share"] < 0.6
    assert len(rows_of(out)) == streamed["report"]["kept"] and "selection_score" not in rows_of(out)[0]
    run(*corpus, *options, "--count", 5, "--out", out, "--stream", "--pack")
    assert [len(row["input_ids"]) for row in rows_of(out)] == [16] * 5


def test_tokens_are_masked_and_a_run_is_resumed(corpus, tmp_path):
    """Rows come with the labels of half of the targets; a second run with the kept state writes the same file."""
    out, state = tmp_path / "masked.jsonl", tmp_path / "state"
    options = ["--unit", "token", "--method", "head_norm", "--fraction", 0.5, "--pack", "--keep-state", state]
    said = json.loads(run(*corpus, *options, "--out", out, "--format", "json"))
    rows, first = rows_of(out), out.read_bytes()
    kept = sum(label != -100 for row in rows for label in row["labels"])
    assert said["report"]["kept"] == kept and said["report"]["share"] == pytest.approx(0.5, abs=0.03)
    assert all(set(row) == {"input_ids", "labels"} and set(row["labels"]) > {-100} for row in rows)
    again = run(*corpus, *options, "--out", out)
    assert out.read_bytes() == first and f"{kept} of {said['report']['units']} tokens by head_norm" in again


def test_a_smaller_model_or_the_first_layers_score(corpus, folder, tmp_path):
    """Its scores, with the other's token ids; a model of another vocabulary can choose examples alone."""
    out, small = tmp_path / "out.jsonl", save_tiny_model(tmp_path / "small", layers=1)
    options = ["--unit", "block", "--method", "loss", "--count", 4, "--format", "json"]
    whole, by_small, alone, cut = (
        json.loads(run(model, *corpus[1:], *options, "--out", out, *more))["scores"]
        for model, more in (
            *[(folder, []), (folder, ["--scorer", small]), (small, [])],
            (folder, ["--scorer-layers", 1]),
        )
    )
    assert by_small == alone and len({tuple(scores) for scores in (whole, by_small, cut)}) == 3
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BlueprintError, match=r"tokenizers of .*small' and .* differ. Score with a model of the same"):
        run(*corpus, *options, "--out", out, "--scorer", small)
    run(*corpus, "--method", "loss", "--count", 4, "--scorer", small, "--out", out)
    assert [row in CORPUS for row in rows_of(out)] == [True] * 4


def test_units_that_do_not_fit_are_refused(corpus, tmp_path):
    """Before the model is loaded."""
    out = tmp_path / "out.jsonl"
    for arguments, message in [
        (["--unit", "token", "--fraction", 0.5, "--out", tmp_path / "out.csv"], "--out must end in .jsonl"),
        (["--fraction", 0.5, "--out", out, "--pack"], "--pack joins documents .* give --unit block or token"),
        (["--unit", "token", "--fraction", 0.5, "--out", out, "--with-scores"], "--with-scores needs one score a row"),
        (["--unit", "token", "--count", 5, "--out", out], "filtered by a fraction"),
    ]:
        with pytest.raises(BlueprintError, match=message):
            run(*corpus, *arguments)
    assert not out.exists()


def test_submodules_and_blocks_of_data_are_chosen_for_each_other(folder, tmp_path):
    """Within the shares of parameters and of examples; the matrix is kept, and captures that share."""
    out = tmp_path / "blocks.safetensors"
    asked = [
        "cross-influence",
        folder,
        "--data",
        folder / "data.jsonl",
        "--columns",
        "prompt=question,completion=answer",
    ]
    asked += ["--block", 5, "--k", 0.3, "--q", 0.5, "--out", out, "--normalize"]
    done = CliRunner().invoke(app, [*map(str, asked), "--format", "json"])
    assert done.exit_code == 0, done.output
    said, matrix = json.loads(done.stdout), CrossInfluence.load(out)
    assert matrix.sizes.tolist() == [5, 5, 5, 5, 4] and matrix.normalized == ("kind",)
    costs = dict(zip(matrix.names, matrix.parameters.tolist(), strict=True))
    assert 0 < sum(costs[name] for name in said["submodules"]) <= 0.3 * sum(costs.values())
    assert 0 < sum(matrix.sizes[block] for block in said["examples"]) <= 12
    assert said["share"] == pytest.approx(matrix.captured_share(said["submodules"], said["examples"]), rel=1e-5)
    shown = CliRunner().invoke(app, [*map(str, asked), "--statistic", "block_norms"]).stdout
    assert "of 5 blocks" in shown and "captured share" in shown
