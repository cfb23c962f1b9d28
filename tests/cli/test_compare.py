"""The verb that tables, merges and follows. Run: pytest tests/test_cli_aggregate.py"""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.cli.program import app
from peft_blueprint.compare.table import aggregate, read_sources
from peft_blueprint.errors import FormatError
from tests.made_up import UP, measured


@pytest.fixture
def run():
    """Runs the verb with the words given."""

    def call(*words):
        result = CliRunner().invoke(app, ["aggregate", *map(str, words)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def labs(tmp_path):
    """Files of two labs, of the same model on different data."""
    return [measured(UP, data=lab).save(tmp_path / "labs" / f"{lab}.json") for lab in ("oxford", "berlin")]


def test_the_verb_shows_the_sources_and_writes_the_table(run, labs, tmp_path):
    """A line per source; --out the table; --quiet its name alone; --json the rows where nothing is written."""
    out = tmp_path / "new" / "table.csv"
    result = run(*labs, "--out", out)
    assert result.exit_code == 0 and "2 blueprints, 24 entries" in result.stdout and str(labs[0]) in result.stdout
    assert f"Written to {out}." in result.stderr and len(out.read_text().splitlines()) == 25
    assert run(*labs, "--out", out, "--format", "quiet").stdout == f"{out}\n"
    answer = json.loads(run(*labs, "--format", "json").stdout)
    assert answer["rows"] == aggregate(labs) and [s["examples"] for s in answer["sources"]] == [8, 8]
    assert "rows" not in json.loads(run(*labs, "--format", "json", "--out", out).stdout)


def test_the_verb_skips_bad_sources_on_request(run, labs, tmp_path):
    """Otherwise it stops at it, and nothing is written."""
    bad, out = tmp_path / "bad.json", tmp_path / "t.jsonl"
    bad.write_text("[]")
    with pytest.raises(FormatError, match="bad.json"):
        run(*labs, bad, "--out", out)
    assert not out.exists()
    result = run(*labs, bad, "--out", out, "--skip-bad")
    assert "warning: Sources skipped: 1" in result.stderr and len(out.read_text().splitlines()) == 24
    assert list(json.loads(run(*labs, bad, "--skip-bad", "--format", "json").stdout)["skipped"]) == [str(bad)]


def test_the_verb_merges(run, labs, tmp_path):
    """Into one file where all merge; into a folder where several remain, by model and checkpoint."""
    merged = tmp_path / "merged.json"
    result = run(*labs, "--merge", merged)
    assert "merged into one of 16 examples" in result.stderr
    assert Blueprint.from_pretrained(merged)["0.q"].examples == 16
    other = measured(UP, checkpoint=0.5).save(tmp_path / "other.json")
    with pytest.raises(
        BlueprintError, match=r"2 blueprints remain after merging.*differ in training_checkpoint.*folder"
    ):
        run(*labs, other, "--merge", merged)
    folder = tmp_path / "folder"
    names = run(*labs, other, "--merge", folder, "--format", "quiet").stdout.split()
    assert names == [str(folder / "blueprint-of_org_m-80.json"), str(folder / "blueprint-of_org_m-50.json")]
    assert sorted(read_sources(folder)[0]) == sorted(names), "the folder is a source itself"
    with pytest.raises(BlueprintError, match=r"a blueprint cannot be written as \.yaml"):
        run(*labs, "--merge", tmp_path / "m.yaml")


def test_the_verb_overwrites_no_source(run, labs):
    """With the table or the merged blueprint, however the path is spelled."""
    before = labs[0].read_bytes()
    for option in ("--out", "--merge"):
        with pytest.raises(BlueprintError, match="is one of the sources and would be overwritten"):
            run(*labs, option, labs[0].parent / ".." / "labs" / labs[0].name)
    assert labs[0].read_bytes() == before


def test_the_verb_follows_a_training(run, run_folder, labs, tmp_path):
    """--movement describes the folder of a training, with --merge the merged blueprints."""
    result = run(run_folder, "--movement")
    assert "at 50, 80 and 100 % of its training: 28 submodules" in result.stdout and "norm_100" in result.stdout
    answer = json.loads(run(run_folder, "--movement", "--format", "json").stdout)
    assert answer["movement"]["checkpoints"] == [0.5, 0.8, 1.0] and "rows" not in answer
    assert len(run(run_folder, "--movement", "--format", "quiet").stdout.split()) == 28
    early = measured(UP, checkpoint=0.5).save(tmp_path / "early.json")
    with pytest.raises(BlueprintError, match="both at 80 %"):
        run(*labs, early, "--movement")
    assert "at 50 and 80 %" in run(*labs, early, "--movement", "--merge", tmp_path / "merged").stdout


def test_aggregating_waits_for_no_tensor_library(labs, tmp_path):
    """A table of JSON files as CSV: without torch, transformers, datasets or scipy."""
    script = f"""
import sys
from peft_blueprint.compare import aggregate, write_table
import peft_blueprint.cli.compare
write_table(aggregate({list(map(str, labs))!r}), {str(tmp_path / "t.csv")!r})
print(sorted({{"torch", "transformers", "datasets", "scipy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
