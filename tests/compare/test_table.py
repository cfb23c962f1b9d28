"""Many blueprints in one table, and its files."""

import csv
import functools
import json
import math
import warnings
from dataclasses import replace

import datasets
import pytest

from peft_blueprint import Blueprint, BlueprintError, Submodule, generate_blueprint
from peft_blueprint import blueprint as records
from peft_blueprint.compare.merging import merge_all
from peft_blueprint.compare.table import COLUMNS, aggregate, read_sources, write_table
from peft_blueprint.errors import FormatError
from peft_blueprint.measure.privacy import Privacy
from peft_blueprint.testing import tiny_llama, toy_batches
from tests.hub.loopback import loopback_hub
from tests.made_up import UP, measured


# The table


def test_aggregation_keeps_two_labs_and_two_tasks_apart(tmp_path):
    """Four files of one model and checkpoint give four rows for its one entry, as files and as named blueprints."""
    sources = {}
    for lab in ("oxford", "berlin"):
        for task in ("law", "code"):
            entry = Submodule("attn.0", float(len(sources)))
            sources[f"{lab}/{task}"] = Blueprint("org/m", (entry,), training_checkpoint=0.8, level="group")
    rows = aggregate(sources)
    assert [row["gradient_norm"] for row in rows] == [0.0, 1.0, 2.0, 3.0]
    assert len({(r["model_id"], r["training_checkpoint"], r["source"], r["id"]) for r in rows}) == 4
    paths = [blueprint.save(tmp_path / source / "blueprint.json") for source, blueprint in sources.items()]
    assert [row | {"source": ""} for row in aggregate(paths)] == [row | {"source": ""} for row in rows]
    assert {row["source"] for row in aggregate(paths)} == set(map(str, paths))
    named = dict(zip(sources, paths, strict=True))
    assert aggregate(named) == rows, "a mapping may name paths too"


def test_rows_are_flat_and_alike(blueprint):
    """A measured blueprint and a bare one have the same columns in the same order, each of one type."""
    tagged = replace(blueprint, submodules=tuple(replace(e, domain_tags={"bio": 1, "a": 0.5}) for e in blueprint))
    bare = Blueprint("x", (Submodule("attn.0", 1, domain_tags={"law": 1.0}, extra={"note": [1]}),), level="group")
    rows = aggregate({"measured": tagged, "bare": bare})
    columns = [*COLUMNS, "domain_tags.a", "domain_tags.bio", "domain_tags.law"]
    assert len(rows) == 85 and all(list(row) == columns for row in rows)
    for row in rows:
        for column, value in row.items():
            assert value is None or type(value) is COLUMNS.get(column, float), column
    entry, row = blueprint.submodules[0], rows[0]
    assert (row["id"], row["shape"], row["parameters"]) == (entry.name, "32x32", 1024)
    assert (row["interval_low"], row["interval_high"]) == entry.norm_interval
    assert row["domain_tags.bio"] == 1.0 and row["domain_tags.law"] is None
    assert rows[-1]["extra"] == '{"note": [1]}' and rows[-1]["gamma"] is None


def test_a_row_says_where_its_norm_comes_from():
    """Domain, data, digest, command, dtype and privacy are columns; of a merged blueprint those of all its parts."""
    first = measured(UP, data="a", command="one", dtype="float32", privacy={"epsilon": 2.0, "delta": 1e-5})
    second = measured(
        UP, data="b", domain="code", command="two", dtype="float32", privacy={"epsilon": 4, "delta": 1e-6}
    )
    row = aggregate({"lab": first})[0]
    assert (row["domain"], row["data_digest"], row["command"]) == ("law", "sha256:a", "one")
    assert (row["private"], row["privacy_epsilon"], row["privacy_delta"]) == (True, 2.0, 1e-5)
    both = aggregate({"both": Blueprint.merge([first, second])})[0]
    assert (both["domain"], both["data_digest"], both["command"]) == ("law; code", "sha256:a; sha256:b", "one; two")
    assert (both["dtype"], both["examples"], both["privacy_epsilon"]) == ("float32", 16, 4.0)
    public = aggregate({"lab": measured(UP)})[0]
    assert public["private"] is False and public["privacy_epsilon"] is None


@pytest.mark.parametrize(
    "provenance",
    [
        {"domains": []},
        {"domains": {"law": 3}},
        {"domains": {"law": {"data_digest": 7}}},
        {"merged": "all"},
        {"merged": [1]},
        {"privacy": "much", "command": ["a", "b"]},
    ],
)
def test_provenance_of_any_shape_makes_a_row(provenance):
    """Any content of a provenance can be tabulated and merged."""
    odd = replace(measured(UP), provenance=provenance)
    rows = aggregate({"odd": odd})
    assert len(rows) == len(UP) and all(type(v) in (str, int, float, bool, type(None)) for v in rows[0].values())
    assert merge_all({"odd": odd, "even": measured(UP)})[0][0] == odd


def test_one_bad_file_is_named_or_skipped(tmp_path):
    """By default the error names it; on_error="skip" goes on and lists skipped files with reasons."""
    good = measured(UP).save(tmp_path / "good.json")
    bad, gone = tmp_path / "bad.json", tmp_path / "gone.json"
    bad.write_text('{"model_id": ')
    with pytest.raises(FormatError, match=r"bad\.json is not valid JSON"):
        aggregate([good, bad])
    with pytest.raises(BlueprintError, match=r"^lab 3: .*no such file or folder"):
        aggregate({"lab 3": "no such thing"})
    with pytest.warns(UserWarning, match=r"Sources skipped: 2.*bad\.json.*gone\.json"):
        rows = aggregate([bad, good, gone], on_error="skip")
    assert {row["source"] for row in rows} == {str(good)}
    blueprints, skipped = read_sources([bad, good], on_error="skip")
    assert list(blueprints) == [str(good)] and list(skipped) == [str(bad)] and "not valid JSON" in skipped[str(bad)]
    with pytest.raises(BlueprintError, match="None of the sources"):
        aggregate([bad, gone], on_error="skip")


def test_a_repository_stands_for_all_its_checkpoints(tmp_path, monkeypatch, no_token_of_mine):
    """Over HTTP: rows of each, the final one under the repository's id; no final one is needed."""
    folders = {"org/done": tmp_path / "done", "org/going": tmp_path / "going", "org/none": tmp_path / "none"}
    for folder in folders.values():
        folder.mkdir()
    for share in (0.5, 0.8):
        for name in ("done", "going"):
            measured(UP, checkpoint=share).save(tmp_path / name / f"blueprint-{100 * share:g}.json")
    measured(UP, checkpoint=1.0).save(tmp_path / "done")
    with loopback_hub(folders) as endpoint:
        for name in ("fetch", "find_blueprints"):
            asked = functools.partial(getattr(records, name), endpoint=endpoint, cache_dir=tmp_path / "cache")
            monkeypatch.setattr(records, name, asked)
        rows = aggregate(["org/done", "org/going"])
        found = {row["source"]: row["training_checkpoint"] for row in rows}
        assert found == {
            "org/done": 1.0,
            "org/done/blueprint-50.json": 0.5,
            "org/done/blueprint-80.json": 0.8,
            "org/going/blueprint-50.json": 0.5,
            "org/going/blueprint-80.json": 0.8,
        }
        assert len(rows) == 5 * len(UP)
        assert list(read_sources({"lab": "org/going"})[0]) == ["lab/blueprint-50.json", "lab/blueprint-80.json"]


def test_bad_use_is_refused():
    """No source, a blueprint without a name, an unknown on_error."""
    with pytest.raises(BlueprintError, match="at least one file"):
        aggregate([])
    with pytest.raises(BlueprintError, match="A source must be .* in a mapping .* got Blueprint"):
        aggregate([measured(UP)])
    with pytest.raises(BlueprintError, match="lab must be .* got int"):
        aggregate({"lab": 3})
    with pytest.raises(BlueprintError, match="on_error must be one of raise, skip, got 'ignore'"):
        aggregate(["a"], on_error="ignore")


def test_a_folder_stands_for_every_blueprint_in_it(tmp_path):
    """`blueprint.json` and the files beside it, 50 before 100, each once; a source given twice counts once."""
    run, lab = tmp_path / "run", tmp_path / "lab"
    for share in (100, 50, 80):
        measured(UP, checkpoint=share / 100).save(run / f"blueprint-{share}.json")
    (run / "trainer_state.json").write_text("{}")
    for name in ("blueprint.json", "blueprint.csv", "blueprint-math-80.csv", "blueprints.json"):
        measured(UP).save(lab / name)
    expected = [str(run / f"blueprint-{share}.json") for share in (50, 80, 100)]
    of_lab = [str(lab / "blueprint.json"), str(lab / "blueprint-math-80.csv")]
    assert list(read_sources([run, lab, str(lab)])[0]) == [*expected, *of_lab]
    assert list(read_sources({"mine": run})[0]) == [f"mine/blueprint-{share}.json" for share in (50, 80, 100)]
    assert list(read_sources(str(lab))[0]) == of_lab
    (tmp_path / "empty").mkdir()
    with pytest.raises(BlueprintError, match="empty"):
        aggregate([tmp_path / "empty"])


@pytest.mark.parametrize("privacy", [Privacy(noise=0.1), Privacy(epsilon=50.0, delta=1e-3)])
def test_private_measurements_are_marked_in_the_table(privacy):
    """The table says which norms are noisy, and the guarantee where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight examples are few for a guarantee
        noisy = generate_blueprint(tiny_llama(layers=2), toy_batches(), privacy=privacy, progress=False)
    row = aggregate({"lab": noisy})[0]
    assert row["private"] is True and (row["privacy_epsilon"], row["privacy_delta"]) == (
        privacy.epsilon,
        privacy.delta,
    )
    assert row["examples"] == 8 and row["data_digest"] is None and merge_all({"lab": noisy})[0] == (noisy,)


# Its files


def test_parquet_reads_back_as_the_same_rows(blueprint, tmp_path):
    """Through datasets, value by value; an empty column keeps its type."""
    rows = aggregate({"measured": blueprint, "other": measured(UP)})
    path = write_table(rows, tmp_path / "deep" / "table.parquet")
    back = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert back.to_list() == rows
    assert all(row["privacy_epsilon"] is None and row["group"] != 3 for row in rows)
    types = {column: feature.dtype for column, feature in back.features.items()}
    assert (types["privacy_epsilon"], types["examples"], types["extra"]) == ("float64", "int64", "string")


def test_csv_and_json_hold_the_same_rows(blueprint, tmp_path):
    """CSV leaves unknown cells empty and keeps every digit; JSON and JSON lines give the rows back."""
    rows = aggregate({"a, quoted\n": blueprint})
    assert json.loads(write_table(rows, tmp_path / "t.json").read_text()) == rows
    lines = write_table(rows, tmp_path / "t.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    with write_table(rows, tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(rows) and list(cells[0]) == list(rows[0])
    assert [float(cell["gradient_norm"]) for cell in cells] == [row["gradient_norm"] for row in rows]
    assert cells[0]["source"] == "a, quoted\n" and cells[0]["privacy_epsilon"] == ""


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_a_table_that_cannot_be_written_leaves_the_old_one(suffix, tmp_path):
    """A column of two types, a nested cell and invalid Unicode are errors that leave no file."""
    path = tmp_path / f"t.{suffix}"
    write_table([{"a": 1}], path)
    before = path.read_bytes()
    with pytest.raises(BlueprintError, match="Column 'a' must hold text, numbers"):
        write_table([{"a": 1}, {"a": "x"}], path)
    with pytest.raises(BlueprintError, match="Column 'a' must hold .* got struct"):
        write_table([{"a": {"b": 1}}], path)
    with pytest.raises(BlueprintError, match="The table has no rows"):
        write_table([], path)
    with pytest.raises(BlueprintError, match="Column 'a' must hold text.*surrogates"):
        write_table([{"a": "\ud800"}], path)
    if suffix in ("json", "jsonl"):
        with pytest.raises(BlueprintError, match="cannot be written to .* finite"):
            write_table([{"a": math.nan}], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unknown_suffix_lists_those_there_are(tmp_path):
    """Before anything is written."""
    with pytest.raises(BlueprintError, match=r"must end in \.csv, \.json, \.jsonl, \.parquet, got .*xlsx"):
        write_table([{"a": 1}], tmp_path / "t.xlsx")
    with pytest.raises(BlueprintError, match="must end in"):
        write_table([{"a": 1}], tmp_path / "table")
    assert not list(tmp_path.iterdir())
