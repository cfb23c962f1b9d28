"""Many blueprints in one table, merged, and followed over a training. Run: pytest tests/test_aggregate.py"""

import csv
import json
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import datasets
import pytest
import typer
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from peft_blueprint import Blueprint, BlueprintError, Submodule, check_drift, generate_blueprint
from peft_blueprint.aggregate import COLUMNS, aggregate, read_sources, write_table
from peft_blueprint.callbacks import BlueprintCallback
from peft_blueprint.cli_aggregate import VERBS
from peft_blueprint.errors import FormatError, MismatchError
from peft_blueprint.merging import merge_all
from peft_blueprint.movement import movement
from peft_blueprint.privacy import Privacy
from peft_blueprint.testing import tiny_llama, toy_batches


def measured(norms, *, data="a", examples=8, model_id="org/m", checkpoint=0.8, domain="law", error=0.1, **more):
    """A blueprint of made-up norms, by name, over made-up data; more keys are the provenance's."""
    entries = tuple(
        Submodule(
            name,
            float(norm),
            kind=name.rpartition(".")[2],
            depth=int(name.split(".")[0]),
            norm_interval=(norm * (1 - error), norm * (1 + error)),
            examples=examples,
        )
        for name, norm in norms.items()
    )
    provenance = {"domains": {domain: {"examples": examples, "data_digest": f"sha256:{data}"}}, **more}
    return Blueprint(model_id, entries, training_checkpoint=checkpoint, provenance=provenance)


UP = {f"{depth}.{kind}": depth + 1.0 + 10 * (kind == "up") for depth in range(6) for kind in ("q", "up")}


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
    """What strangers put in a provenance stops no table and no merge."""
    odd = replace(measured(UP), provenance=provenance)
    rows = aggregate({"odd": odd})
    assert len(rows) == len(UP) and all(type(v) in (str, int, float, bool, type(None)) for v in rows[0].values())
    assert merge_all({"odd": odd, "even": measured(UP)})[0][0] == odd


def test_one_bad_file_is_named_or_skipped(tmp_path):
    """By default the error names it; on_error="skip" goes on and says what was left out and why."""
    good = measured(UP).save(tmp_path / "good.json")
    bad, gone = tmp_path / "bad.json", tmp_path / "gone.json"
    bad.write_text('{"model_id": ')
    with pytest.raises(FormatError, match=r"bad\.json is not valid JSON"):
        aggregate([good, bad])
    with pytest.raises(BlueprintError, match=r"^lab 3: .*neither a file or folder"):
        aggregate({"lab 3": "no such thing"})
    with pytest.warns(UserWarning, match=r"2 of the sources skipped.*bad\.json.*gone\.json"):
        rows = aggregate([bad, good, gone], on_error="skip")
    assert {row["source"] for row in rows} == {str(good)}
    blueprints, skipped = read_sources([bad, good], on_error="skip")
    assert list(blueprints) == [str(good)] and list(skipped) == [str(bad)] and "not valid JSON" in skipped[str(bad)]
    with pytest.raises(BlueprintError, match="None of the sources"):
        aggregate([bad, gone], on_error="skip")


def test_bad_use_is_refused():
    """No source, a blueprint without a name, an unknown on_error."""
    with pytest.raises(BlueprintError, match="nothing to aggregate"):
        aggregate([])
    with pytest.raises(BlueprintError, match="A source is a Blueprint: .*mapping"):
        aggregate([measured(UP)])
    with pytest.raises(BlueprintError, match="lab is a int"):
        aggregate({"lab": 3})
    with pytest.raises(BlueprintError, match="on_error='ignore': choose one of raise, skip"):
        aggregate(["a"], on_error="ignore")


def test_a_folder_stands_for_every_blueprint_in_it(tmp_path):
    """`blueprint.json` and what stands beside it, 50 before 100, each once; a source given twice counts once."""
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


# Its files


def test_parquet_reads_back_as_the_same_rows(blueprint, tmp_path, monkeypatch):
    """Through datasets, value by value, though it is given in parts; a column in which nothing is known keeps its type."""
    monkeypatch.setattr("peft_blueprint.aggregate._PART", 40)
    rows = aggregate({"measured": blueprint, "other": measured(UP)})
    path = write_table(rows, tmp_path / "deep" / "table.parquet")
    back = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert back.to_list() == rows
    assert all(row["privacy_epsilon"] is None and row["group"] != 3 for row in rows)
    types = {column: feature.dtype for column, feature in back.features.items()}
    assert (types["privacy_epsilon"], types["examples"], types["extra"]) == ("float64", "int64", "string")
    assert not datasets.are_progress_bars_disabled(), "the switch is as it was"


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
    """A column of two types, a nested cell, or a text that is no Unicode is an error; nothing half written remains."""
    path = tmp_path / f"t.{suffix}"
    write_table([{"a": 1}], path)
    before = path.read_bytes()
    with pytest.raises(BlueprintError, match="Column 'a' holds 'int', 'str'"):
        write_table([{"a": 1}, {"a": "x"}], path)
    with pytest.raises(BlueprintError, match="Column 'a' holds 'dict'"):
        write_table([{"a": {}}], path)
    with pytest.raises(BlueprintError, match="There are no rows"):
        write_table([], path)
    if suffix in ("csv", "parquet"):
        with pytest.raises(BlueprintError, match="cannot be written to .* Unicode"):
            write_table([{"a": "\ud800"}], path)
    else:
        with pytest.raises(BlueprintError, match="cannot be written to .* finite"):
            write_table([{"a": math.nan}], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unknown_suffix_lists_those_there_are(tmp_path):
    """Before anything is written."""
    with pytest.raises(BlueprintError, match=r"no table is written as \.xlsx.*\.csv, \.json, \.jsonl, \.parquet"):
        write_table([{"a": 1}], tmp_path / "t.xlsx")
    with pytest.raises(BlueprintError, match="a file without suffix"):
        write_table([{"a": 1}], tmp_path / "table")
    assert not list(tmp_path.iterdir())


# Merging


def test_different_data_merge_by_their_examples():
    """Two labs' norms become their mean weighted by examples, as Blueprint.merge has it, whatever the names' order."""
    one, other = measured(UP, data="a", examples=8), measured({n: 2 * v for n, v in UP.items()}, data="b", examples=24)
    merged, notes = merge_all({"oxford": one, "berlin": other})
    assert merged == (Blueprint.merge([one, other]),)
    assert merged[0]["3.q"].gradient_norm == pytest.approx(4 * (8 + 2 * 24) / 32) and merged[0]["3.q"].examples == 32
    assert notes == ("'oxford', 'berlin' are merged into one of 32 examples.",)
    shuffled = replace(other, submodules=other.submodules[::-1])
    assert merge_all({"oxford": one, "berlin": shuffled})[0] == merged


def test_the_same_data_count_once():
    """A copy, a second measurement on the same data, and a part of what is merged already add nothing."""
    one, other = measured(UP, data="a"), measured(UP, data="b")
    both = Blueprint.merge([one, other])
    again = replace(one, provenance={**one.provenance, "seed": 1})
    merged, notes = merge_all({"one": one, "copy": one, "again": again, "both": both})
    assert merged == (both,)
    assert [note for note in notes if note.endswith("is of the same data as both and counts once.")] == list(notes)
    assert len(notes) == 3
    overlapping = Blueprint.merge([other, measured(UP, data="c")])
    merged, notes = merge_all({"both": both, "overlapping": overlapping})
    assert set(map(id, merged)) == {id(both), id(overlapping)}
    assert notes == ("overlapping stays apart: part of its data is in 'both' too.",)


def test_one_name_of_the_data_twice_is_said():
    """64 and 128 examples of a file have two digests; that they may overlap is noted."""
    named = {lab: measured(UP, data=lab) for lab in ("a", "b")}
    named = {lab: replace(one, provenance={**one.provenance, "data": "gsm8k"}) for lab, one in named.items()}
    _, notes = merge_all(named)
    assert notes[-1] == "Several of them name the data 'gsm8k': if they share examples, those count twice."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": "org/other"}, None),
        ({"training_checkpoint": 0.5}, r"differ in training_checkpoint \(0\.8, 0\.5\)"),
        ({"model_digest": "sha256:f"}, r"differ in model_digest \(unknown, sha256:f\)"),
        ({"submodules": measured({"0.q": 1.0}).submodules}, r"submodules \(12, 1 of them\)"),
        ({"submodules": tuple(replace(e, quantized=True) for e in measured(UP))}, "what is quantised"),
        ({"submodules": tuple(replace(e, examples=None) for e in measured(UP))}, "'0.q', .* how many examples"),
        ({"provenance": {}}, "no data digest"),
        ({"provenance": {"method": "training"}}, "training batches"),
        ({"provenance": {**measured(UP, data="b").provenance, "blend": {"weight": 0.5}}}, "a blend"),
        ({"provenance": {**measured(UP, data="b").provenance, "privacy": {"sigma": 1.0}}}, "privacy noise"),
    ],
)
def test_what_does_not_merge_stays_apart_with_the_reason(changes, reason):
    """Both come back as they were, and a note says why."""
    one, other = measured(UP, data="a"), replace(measured(UP, data="b"), **changes)
    merged, notes = merge_all({"one": one, "other": other})
    assert merged == (one, other)
    if reason is None:
        assert notes == (), "blueprints of two models need no reason"
    else:
        assert len(notes) == 1 and re.search(reason, notes[0])


def test_revisions_are_kept_apart_where_both_are_known():
    """Two commits are two models; a blueprint that names none joins the only one there is, and a note says so."""
    first = replace(measured(UP, data="a"), model_revision="1111")
    second = replace(measured(UP, data="a"), model_revision="2222")
    silent = measured(UP, data="c")
    merged, notes = merge_all({"first": first, "second": second})
    assert merged == (first, second), "the same data on two revisions are two measurements"
    assert notes == ("second stays apart from first: model_revision 2222 is not 1111.",)
    merged, notes = merge_all({"silent": silent, "first": first})
    assert len(merged) == 1 and merged[0].model_revision == "1111" and merged[0]["0.q"].examples == 16
    assert notes[0] == "'silent' does not say its model_revision; taken to be that of the others."
    merged, notes = merge_all({"silent": silent, "first": first, "second": second})
    assert len(merged) == 3 and "silent stays apart: it could be of the weights of first or second." in notes


def test_private_blueprints_stay_apart():
    """They merge with nobody, each other included; a copy still counts once, and a movement of one says it is noisy."""
    clear, noisy = measured(UP, data="c"), measured(UP, checkpoint=1.0)
    noisy = replace(
        noisy, provenance={"domains": {"law": {"examples": 8}}, "privacy": {"epsilon": 4.0, "delta": 1e-6}}
    )
    other = replace(noisy, submodules=measured(UP | {"0.q": 1.1}).submodules)
    merged, notes = merge_all({"clear": clear, "one": noisy, "two": other, "copy": noisy})
    assert merged == (clear, noisy, other) and notes[-1] == "copy is the same as one and counts once."
    assert all("privacy noise" in note for note in notes[:2]) and len(notes) == 3
    assert any("privacy noise" in note for note in movement([clear, noisy]).notes)


@pytest.mark.parametrize("privacy", [Privacy(noise=0.1), Privacy(epsilon=50.0, delta=1e-3)])
def test_what_is_measured_with_privacy_is_marked_in_the_table(privacy):
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


# Movement


def test_a_scale_alone_is_no_movement():
    """Norms three times as large everywhere: every ratio 1, ranks and shares the same, correlation 1."""
    later = measured({name: 3 * norm for name, norm in UP.items()}, checkpoint=1.0)
    found = movement([later, measured(UP, checkpoint=0.5)])
    assert found.checkpoints == (0.5, 1.0) and found.scales == (1.0, pytest.approx(1 / 3))
    assert all(moved.ratio == pytest.approx(1) and moved.climbed == 0 for moved in found.submodules)
    assert found.drifts[0].correlation > 0.99 and "by kind: unchanged" in str(found)
    assert found.kind_shares["up"] == pytest.approx((found.kind_shares["up"][0],) * 2)
    assert sum(shares[1] for shares in found.depth_shares.values()) == pytest.approx(1)


def test_what_moved_is_found():
    """The weakest q becomes the strongest: it climbs five ranks, comes first in the rows, and its block gains."""
    later = measured(UP | {"0.q": 60.0}, checkpoint=0.8)
    last = measured(UP | {"0.q": 60.0}, checkpoint=1.0)
    found = movement({"c": last, "a": measured(UP, checkpoint=0.5), "b": later})
    first_row = found.rows()[0]
    assert (first_row["id"], first_row["climbed"], first_row["rank_50"], first_row["rank_100"]) == ("0.q", 5, 6, 1)
    scale = (1 / 60) ** (1 / 12)  # of geometric means over 12 submodules
    assert found.scales == pytest.approx((1, scale, scale)) and first_row["norm_80"] == pytest.approx(60 * scale)
    assert first_row["ratio"] == pytest.approx(60 * scale)
    expected = check_drift(later, measured(UP, checkpoint=0.5))
    assert found.drifts[0] == expected and expected.by_kind == pytest.approx({"q": 1 / 7, "up": 1.0})
    assert found.drifts[1].by_kind == pytest.approx({"q": 1.0, "up": 1.0})
    total = math.fsum(UP.values())
    assert found.depth_shares[0] == pytest.approx((12 / total, 71 / (total + 59), 71 / (total + 59)))
    text = str(found)
    assert "org/m at 50, 80 and 100 % of its training: 12 submodules" in text
    assert f"50 to 80 %: rank correlation within kind {expected.correlation:.3f}" in text
    assert "by kind: gained q (" in text and "by block: gained block 0 (" in text and "moved most: 0.q, times" in text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["checkpoints"] == [0.5, 0.8, 1.0]


def test_zero_norms_and_few_entries_move_too(tmp_path):
    """A norm from zero has no ratio, one that stays zero has 1; kinds of under 4 entries have no correlation."""
    a, b = {"0.q": 0.0, "0.k": 0.0, "0.v": 2.0}, {"0.q": 1.0, "0.k": 0.0, "0.v": 1.0}
    found = movement([measured(a, checkpoint=0.5), measured(b, checkpoint=1.0)])
    assert [moved.ratio for moved in found.submodules] == [None, 1.0, 1.0]
    assert found.drifts == (None,) and "too few entries" in str(found) and "from or to zero" in str(found)
    write_table(found.rows(), tmp_path / "t.parquet")
    nothing = {"0.q": 0.0}
    assert movement([measured(nothing, checkpoint=0.5), measured(nothing, checkpoint=1.0)]).scales == (1.0, 1.0)


def test_different_data_are_noted():
    """A movement between blueprints of different or unknown data says so."""
    one, other = measured(UP, checkpoint=0.5), measured(UP, checkpoint=1.0, data="b")
    assert movement([one, measured(UP, checkpoint=1.0)]).notes == ()
    assert "different data" in movement([one, other]).notes[0]
    assert "Not every blueprint says" in movement([one, replace(other, provenance={})]).notes[0]
    quantized = replace(one, training_checkpoint=1.0, submodules=tuple(replace(e, quantized=True) for e in one))
    assert "equally quantised" in movement([one, quantized]).notes[0]


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ([], BlueprintError, r"needs two checkpoints or more; there is 50 %"),
        ([measured(UP, checkpoint=0.5)], BlueprintError, r"blueprint 1 and blueprint 2 are both at 50 %.*--merge"),
        ([measured(UP, checkpoint=None)], BlueprintError, r"blueprint 2 does not say its training_checkpoint"),
        ([measured(UP, model_id="org/b")], MismatchError, r"their model_id is 'org/m' and 'org/b'"),
        ([measured({"0.q": 1.0})], MismatchError, r"cannot be compared: '0\.up'"),
        ([measured(UP, method="training")], MismatchError, r"one has norms of training batches"),
    ],
)
def test_what_is_no_movement_is_refused(others, error, message):
    """One checkpoint, one twice, none, another model, other submodules, another statistic."""
    with pytest.raises(error, match=message):
        movement([measured(UP, checkpoint=0.5), *others])


def test_digests_of_two_models_are_refused():
    """The same id is not enough where both know their model's structure."""
    one = replace(measured(UP, checkpoint=0.5), model_digest="sha256:1")
    with pytest.raises(MismatchError, match="model_digest is 'sha256:1' and 'sha256:2'"):
        movement([one, replace(measured(UP), model_digest="sha256:2")])
    assert movement([one, measured(UP)]).checkpoints == (0.5, 0.8)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Where a short training with the callback has left its three blueprints."""
    folder = tmp_path_factory.mktemp("run")
    examples = [
        {key: batch[key][i] for key in ("input_ids", "labels")}
        for batch in toy_batches(padding="none")
        for i in (0, 1)
    ]
    arguments = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.05,
    )
    trainer = Trainer(tiny_llama(layers=4), arguments, train_dataset=examples)
    trainer.add_callback(BlueprintCallback(trainer, every=2))
    trainer.train()
    return folder


def test_it_works_on_what_the_callback_writes(run_folder):
    """The folder of a training gives its movement, with a note of what its norms are; and they do not merge."""
    blueprints, _ = read_sources([run_folder])
    found = movement(blueprints)
    assert found.checkpoints == (0.5, 0.8, 1.0) and len(found.submodules) == 28 and None not in found.drifts
    assert any(moved.ratio != 1 for moved in found.submodules) and "training batches" in found.notes[0]
    merged, notes = merge_all(blueprints)
    assert merged == tuple(blueprints.values()) and len(notes) == 3


def test_a_measured_model_moves_from_its_untrained_self():
    """Blueprints of generate_blueprint at two checkpoints, on the same data, need no note."""
    sides = [
        generate_blueprint(
            tiny_llama(layers=4, seed=seed), toy_batches(), model_id="t", training_checkpoint=share, progress=False
        )
        for seed, share in ((0, 0.5), (1, 1.0))
    ]
    found = movement(sides)
    assert found.notes == () and len(found.rows()) == 28
    assert max(abs(math.log(moved.ratio)) for moved in found.submodules) > 0.01


# The verb


@pytest.fixture
def run():
    """Runs the verb with the words given."""
    app = typer.Typer()
    app.command()(VERBS[0])

    def call(*words):
        result = CliRunner().invoke(app, list(map(str, words)))
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
    assert run(*labs, "--out", out, "-q").stdout == f"{out}\n"
    answer = json.loads(run(*labs, "--json").stdout)
    assert answer["rows"] == aggregate(labs) and [s["examples"] for s in answer["sources"]] == [8, 8]
    assert "rows" not in json.loads(run(*labs, "--json", "--out", out).stdout)


def test_the_verb_skips_what_is_bad_when_told(run, labs, tmp_path):
    """Otherwise it stops at it, and nothing is written."""
    bad, out = tmp_path / "bad.json", tmp_path / "t.jsonl"
    bad.write_text("[]")
    with pytest.raises(FormatError, match="bad.json"):
        run(*labs, bad, "--out", out)
    assert not out.exists()
    result = run(*labs, bad, "--out", out, "--skip-bad")
    assert "warning: 1 of the sources skipped" in result.stderr and len(out.read_text().splitlines()) == 24
    assert list(json.loads(run(*labs, bad, "--skip-bad", "--json").stdout)["skipped"]) == [str(bad)]


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
    names = run(*labs, other, "--merge", folder, "-q").stdout.split()
    assert names == [str(folder / "blueprint-of_org_m-80.json"), str(folder / "blueprint-of_org_m-50.json")]
    assert sorted(read_sources(folder)[0]) == sorted(names), "the folder is a source itself"
    with pytest.raises(BlueprintError, match=r"no blueprint is written as \.yaml"):
        run(*labs, "--merge", tmp_path / "m.yaml")


def test_the_verb_overwrites_no_source(run, labs):
    """Neither with the table nor with the merged blueprint, under whatever spelling."""
    before = labs[0].read_bytes()
    for option in ("--out", "--merge"):
        with pytest.raises(BlueprintError, match="is one of the sources, and would be overwritten"):
            run(*labs, option, labs[0].parent / ".." / "labs" / labs[0].name)
    assert labs[0].read_bytes() == before


def test_the_verb_follows_a_training(run, run_folder, labs, tmp_path):
    """--movement tells of the folder of a training; with --merge of what is merged."""
    result = run(run_folder, "--movement")
    assert "at 50, 80 and 100 % of its training: 28 submodules" in result.stdout and "norm_100" in result.stdout
    answer = json.loads(run(run_folder, "--movement", "--json").stdout)
    assert answer["movement"]["checkpoints"] == [0.5, 0.8, 1.0] and "rows" not in answer
    assert len(run(run_folder, "--movement", "-q").stdout.split()) == 28
    early = measured(UP, checkpoint=0.5).save(tmp_path / "early.json")
    with pytest.raises(BlueprintError, match="both at 80 %"):
        run(*labs, early, "--movement")
    assert "at 50 and 80 %" in run(*labs, early, "--movement", "--merge", tmp_path / "merged").stdout


def test_aggregating_waits_for_no_tensor_library(labs, tmp_path):
    """A table of JSON files as CSV: without torch, transformers, datasets or scipy."""
    script = f"""
import sys
from peft_blueprint.aggregate import aggregate, write_table
from peft_blueprint import cli_aggregate
write_table(aggregate({list(map(str, labs))!r}), {str(tmp_path / "t.csv")!r})
print(sorted({{"torch", "transformers", "datasets", "scipy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
