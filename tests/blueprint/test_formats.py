"""The record as JSON and CSV: exact both ways, with clear errors."""

import csv
import errno
import io
import json
import os
import resource
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_blueprint import Blueprint, BlueprintConfig, BlueprintError, Submodule
from peft_blueprint.blueprint.theory import gamma_from_alpha
from peft_blueprint.compare import aggregate, write_table
from peft_blueprint.errors import FormatError
from peft_blueprint.measure import find_submodules
from peft_blueprint.testing import tiny_llama
from tests.random_blueprints import PAPER, blueprints, junk, texts
from tests.records import from_csv, from_json, to_csv, to_json


@given(blueprints)
def test_json_and_csv_round_trips_are_exact(blueprint):
    """Every field comes back equal from either form: zeros, unknowns, unicode, tags and keys we do not know."""
    assert from_json(to_json(blueprint)) == blueprint
    assert from_csv(to_csv(blueprint)) == blueprint


@settings(max_examples=30)
@given(blueprint=blueprints, suffix=st.sampled_from(["json", "csv"]))
def test_files_round_trip_too(tmp_path_factory, blueprint, suffix):
    """Also with other line ends and encodings."""
    path = tmp_path_factory.mktemp("files") / f"blueprint.{suffix}"
    assert blueprint.save(path) == path
    assert Blueprint.from_pretrained(path) == blueprint


def test_zero_is_a_value_and_not_an_absence():
    """A zero norm, depth 0, a tag of 0.0 and a scalar's empty shape are written, in JSON and in CSV."""
    entry = Submodule(
        "a", 0.0, depth=0, signal_norm=0.0, examples=0, domain_tags={"bio": 0.0}, shape=(), form="parameter"
    )
    blueprint = Blueprint("m", (entry,), extra={"x-none": None, "x-zero": 0})
    assert {"depth": 0, "gradient_norm": 0.0}.items() <= json.loads(to_json(blueprint))["layers"][0].items()
    for again in (from_json(to_json(blueprint)), from_csv(to_csv(blueprint))):
        assert again == blueprint and again["a"].depth == 0 and again["a"].signal_norm == 0.0


def test_keys_that_this_version_does_not_know_are_kept():
    """Unknown keys of a later minor version are kept."""
    record = {"model_id": "m", "rights": ["all"], "layers": [{"id": "a", "gradient_norm": 1, "hessian": {"top": 3}}]}
    blueprint = from_json(json.dumps(record))
    assert blueprint.extra == {"rights": ["all"]} and blueprint["a"].extra == {"hessian": {"top": 3}}
    assert json.loads(to_json(blueprint)).items() >= {"rights": ["all"]}.items()
    assert from_csv(to_csv(blueprint))["a"].extra == {"hessian": {"top": 3}}


# ------------------------------------------------------------------------------------------ the paper's own file


def test_the_papers_example_loads_with_a_warning_about_gamma(tmp_path):
    """A.1 is read at group level; its gamma is converted to the text's formula, and the warning names the entries."""
    (tmp_path / "a1.json").write_text(PAPER)
    with pytest.warns(UserWarning, match=r"'attn.0', 'ffn.0', 'attn.1' follows alpha/\(1 \+ alpha\)"):
        blueprint = Blueprint.from_pretrained(tmp_path / "a1.json")
    assert blueprint.level == "group" and blueprint.training_checkpoint == 0.8
    assert [e.gamma for e in blueprint] == [gamma_from_alpha(a) for a in (1.47, 1.12, 1.5)]
    assert blueprint["ffn.0"].domain_tags == {"general": 1.0, "bio": 0.68, "legal": 0.5}
    assert (blueprint["attn.1"].gradient_norm, blueprint["attn.1"].k_star) == (0.045, 0.13)


def test_the_papers_example_round_trips_and_warns_once(recwarn):
    """Converted values are written in the text's convention, which loads without a warning."""
    blueprint = from_json(PAPER)
    assert len(recwarn) == 1
    assert from_json(to_json(blueprint)) == blueprint == from_csv(to_csv(blueprint))
    assert len(recwarn) == 1
    right = PAPER.replace("0.60", "0.405").replace("0.53", "0.472")
    assert [e.gamma for e in from_json(right.replace('1.50, "gamma": 0.405', '1.50, "gamma": 0.4'))][0] == 0.405
    assert len(recwarn) == 1


@pytest.mark.filterwarnings("ignore:gamma of")
def test_the_papers_example_expands_and_places_adapters():
    """Its three groups become 4 + 3 + 4 submodules of a Llama, which BlueprintConfig adapts."""
    blueprint = from_json(PAPER)
    expanded = blueprint.expand(find_submodules(tiny_llama()))
    assert len(expanded) == 11 and expanded.level == "submodule"
    assert expanded["model.layers.0.mlp.up_proj"].gradient_norm == pytest.approx(0.033 / 3**0.5)
    assert expanded["model.layers.1.self_attn.q_proj"].domain_tags["legal"] == 0.8
    assert from_json(to_json(expanded)) == expanded
    config = BlueprintConfig(blueprint=blueprint, fraction=1.0, r=2)
    model = get_peft_model(tiny_llama(), config)
    assert set(config.selection) == set(expanded.names)
    assert sum(name.endswith("lora_A") for name, _ in model.named_modules()) == 11


# ------------------------------------------------------------------------------------------ bad input


def record(**changes):
    """The JSON of a small blueprint with keys of its second entry changed, or of the top with `top_…`."""
    data = {"model_id": "m", "layers": [{"id": "a", "gradient_norm": 1.0}, {"id": "b", "gradient_norm": 2.0}]}
    data |= {key.removeprefix("top_"): value for key, value in changes.items() if key.startswith("top_")}
    if "top_layers" not in changes:
        data["layers"][1] |= {key: value for key, value in changes.items() if not key.startswith("top_")}
    return json.dumps(data)


BAD_JSON = {
    "not JSON": ("model: m\n", "not valid JSON.*not a blueprint at all"),
    "empty": ("", "not valid JSON"),
    "truncated": (PAPER[:200], "not valid JSON.*line 7 of 7.*cut short"),
    "newer schema": (record(top_schema_version=99), "schema_version 99.*reads up to 1.*pip install --upgrade"),
    "odd schema": (record(top_schema_version="1"), "schema_version is '1'"),
    "NaN": (record(gradient_norm=float("nan")), "holds NaN.*[Mm]easure"),
    "Infinity": (record(gradient_norm=float("inf")), "holds Infinity.*[Mm]easure"),
    "infinity in digits": (record().replace("2.0", "2e999"), "beyond a double's range.*[Mm]easure"),
    "a whole number beyond all": (record().replace("2.0", "9" * 400), "holds 9999.*[Mm]easure"),
    "more digits than Python reads": (record().replace("2.0", "9" * 5000), "holds 9999.*[Mm]easure"),
    "a key twice": (record().replace('"id": "b"', '"id": "b", "id": "c"'), "'id' appears twice"),
    "a list": ("[1, 2]", "JSON object with model_id and layers, not a list"),
    "no layers": ('{"model_id": "m", "weights": []}', "needs the keys model_id and layers.*'model_id', 'weights'"),
    "no model_id": (record(top_model_id=None), "needs the keys model_id and layers"),
    "empty layers": (record(top_layers=[]), "no entries.*at least one"),
    "layers as an object": (record(top_layers={}), "layers of the blueprint must be a list, not an object"),
    "an entry as text": (record(top_layers=["a"]), 'Entry 0 of layers must be an object with a text id, not "a"'),
    "an entry without id": (record(id=None), "Entry 1 of layers"),
    "a name twice": (record(id="a"), "names 'a' twice.*keep one"),
    "no norm": (record(gradient_norm=None), "'b'.*no gradient_norm"),
    "negative norm": (record(gradient_norm=-1), "'b'.*gradient_norm=-1.*not negative.*[Mm]easure"),
    "negative alpha": (record(alpha=-2, gamma=0.5), "'b'.*alpha=-2.*not negative"),
    "negative gamma": (record(gamma=-0.5), "'b'.*gamma=-0.5.*not negative"),
    "negative tag": (record(domain_tags={"bio": -1}), r"'b'.*domain_tags\['bio'\]=-1"),
    "interval the wrong way": (record(norm_interval=[2, 1]), "'b'.*norm_interval"),
    "bool for a number": (record(gradient_norm=True), "gradient_norm of 'b' must be a number, not true or false true"),
    "text for a norm": (record(gradient_norm="2"), "gradient_norm of 'b' must be a number, not text \"2\""),
    "fraction for a depth": (record(depth=1.5), "depth of 'b' must be a whole number"),
    "number for a kind": (record(kind=3), "kind of 'b' must be text, not a whole number 3"),
    "list for tags": (record(domain_tags=["bio"]), "domain_tags of 'b' must be an object"),
    "text in tags": (record(domain_tags={"bio": "high"}), "domain_tags of 'b' must be numbers"),
    "three for an interval": (record(norm_interval=[1, 2, 3]), "norm_interval of 'b' must be two numbers"),
    "an unknown form": (record(form="conv"), "form of 'b' is 'conv'; it must be one of linear, experts"),
    "text in a shape": (record(shape=["1", 2]), "shape of 'b' must be a whole number"),
    "an unknown level": (record(top_level="head"), "level is 'head'.*submodule, group or layer"),
    "checkpoint as text": (record(top_training_checkpoint="all"), "training_checkpoint of the blueprint"),
    "deep nesting": ('{"layers":' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("text, message", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_refused_by_name(tmp_path, text, message):
    """Each is a FormatError that names the file and the fault."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=f"(?s)bad.json.*{message}"):
        Blueprint.from_pretrained(path)


BAD_CSV = {
    "no columns": ("hello\nworld\n", "needs the columns model_id, id and gradient_norm"),
    "empty": ("", "needs the columns"),
    "two models": ("model_id,id,gradient_norm\nm,a,1\nn,a,2\n", "several models.*'m', 'n'.*Keep one model's rows"),
    "text for a norm": ("model_id,id,gradient_norm\nm,a,high\n", "'high' in column gradient_norm"),
    "NaN": ("model_id,id,gradient_norm\nm,a,NaN\n", "holds NaN"),
    "no norm": ("model_id,id,gradient_norm\nm,a,\n", "'a'.*no gradient_norm"),
    "a short row": ("model_id,id,gradient_norm\nm\n", "Entry 0 of layers"),
    "metadata of another kind": ("model_id,id,gradient_norm,metadata\nm,a,1,3\n", "metadata.*an object"),
    "extra of another kind": ("model_id,id,gradient_norm,extra\nm,a,1,[3]\n", "extra.*an object"),
    "deep nesting": ("model_id,id,gradient_norm,alpha\nm,a,1," + "[" * 100_000, "column alpha is not a value"),
}


@pytest.mark.parametrize("text, message", BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv_is_refused_by_name(tmp_path, text, message):
    """As for JSON."""
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode())
    with pytest.raises(FormatError, match=f"(?s)bad.csv.*{message}"):
        Blueprint.from_pretrained(path)


def test_a_csv_of_three_columns_is_enough():
    """A spreadsheet with model_id, id and gradient_norm is a blueprint, its level read off its ids."""
    blueprint = from_csv("model_id,id,gradient_norm\nm,attn.0,1.5\nm,ffn.0,0\n")
    assert blueprint.level == "group" and [e.gradient_norm for e in blueprint] == [1.5, 0.0]


def test_binary_and_missing_files(tmp_path):
    """A binary file is a FormatError, a missing one a BlueprintError that says how to make one."""
    (tmp_path / "weights.json").write_bytes(b"\x80\x81\xff\x00")
    with pytest.raises(FormatError, match="weights.json is not text .* byte 0"):
        Blueprint.from_pretrained(tmp_path / "weights.json")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BlueprintError, match="No blueprint found at .*json.*peft-blueprint generate"):
            Blueprint.from_pretrained(missing)


near = st.fixed_dictionaries(
    {
        "model_id": st.just("m") | junk,
        "layers": st.lists(
            st.fixed_dictionaries({"id": texts, "gradient_norm": st.floats()}, optional={"alpha": junk, "shape": junk})
            | junk,
            max_size=3,
        )
        | junk,
    },
    optional={"schema_version": junk, "level": junk, "provenance": junk},
)


@pytest.mark.filterwarnings("ignore:gamma of")
@settings(max_examples=200)
@given(st.one_of(near.map(json.dumps), junk.map(json.dumps), st.text(string.punctuation + string.digits + "eaN \n")))
def test_any_text_is_a_blueprint_or_a_format_error(text):
    """Any text is a blueprint that can be written again, or a FormatError."""
    try:
        blueprint = from_json(text)
    except FormatError:
        return
    assert from_json(to_json(blueprint)) == blueprint


@given(st.text('m1,.\n\r"{}[]:-eN\0', max_size=60))
def test_any_table_is_a_blueprint_or_a_format_error(rows):
    """The same for CSV with any cells and quotes."""
    try:
        blueprint = from_csv("model_id,id,gradient_norm,extra,shape\n" + rows)
    except FormatError:
        return
    assert from_csv(to_csv(blueprint)) == blueprint


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("fails", ["the write", "the move"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails):
    """On a full disk the old file stays alone, and the error gives the reason."""
    path = from_json(record()).save(tmp_path)
    before = path.read_bytes()

    def no_room(*_):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails == "the move":
        monkeypatch.setattr(os, "replace", no_room)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(BlueprintError, match="blueprint.json cannot be written: File too large.*Choose"):
            from_json(record(gradient_norm=9)).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["blueprint.json"]


def test_values_beyond_json_are_an_error_and_write_nothing(tmp_path):
    """NaN or an object in the provenance is a FormatError that names the model, not half a file."""
    for value in (float("nan"), object()):
        blueprint = Blueprint("org/m", (Submodule("a", 1.0),), provenance={"lr": value})
        for name in ("b.json", "b.csv"):
            with pytest.raises(FormatError, match="'org/m' cannot be written"):
                blueprint.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask):
    """A temporary file is private; the file that takes its place follows the umask."""
    old = os.umask(umask)
    try:
        path = from_json(record()).save(tmp_path / "new" / "blueprint.csv")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''-x", "'plain", "=cmd|' /C calc'!A0", "a=b", "'"]
)
def test_no_cell_of_a_csv_is_a_formula(text, tmp_path):
    """In a blueprint and in a table; and the blueprint's CSV is read back unchanged."""
    entry = Submodule(text, 1.0, kind=text, group=text, domain_tags={text: 1.0})
    blueprint = Blueprint(text, (entry,))
    path = blueprint.save(tmp_path / "b.csv")
    assert Blueprint.from_pretrained(path) == blueprint
    write_table([{**row, text: text} for row in aggregate({text: blueprint})], tmp_path / "t.csv")
    for file in (path, tmp_path / "t.csv"):
        cells = [cell for row in csv.reader(io.StringIO(file.read_text())) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
        assert any(text in cell for cell in cells)
