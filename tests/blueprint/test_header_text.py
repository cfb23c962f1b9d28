"""The record as a short text, and as columns. Run: pytest tests/test_compact.py"""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_blueprint import Blueprint, BlueprintError, Submodule
from peft_blueprint.blueprint.columns import from_columns, to_columns
from peft_blueprint.blueprint.formats import from_json
from peft_blueprint.blueprint.header_text import from_header_text, rounded, to_header_text
from peft_blueprint.blueprint.schema import from_dict, to_dict
from peft_blueprint.blueprint.slots import escaped
from peft_blueprint.blueprint.theory import gamma_from_alpha, k_star
from peft_blueprint.errors import FormatError
from tests.random_blueprints import PAPER, blueprints, junk


LINEAR = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]


def large(blocks: int, tags: int = 1) -> Blueprint:
    """A blueprint of a Llama with every statistic, its numbers like measured ones in length."""
    entries = []
    for depth in range(blocks):
        for index, path in enumerate(LINEAR):
            x = 0.123456789 * (1 + (depth * 7 + index) % 97)
            gamma = gamma_from_alpha(x / 3)
            entries.append(
                Submodule(
                    f"model.layers.{depth}.{path}",
                    gradient_norm=x,
                    kind=path.split(".")[1],
                    depth=depth,
                    group=f"{'attn' if index < 4 else 'ffn'}.{depth}",
                    shape=(8192, 8192 + 1024 * index),
                    median_norm=x * 0.9,
                    norm_interval=(x * 0.8, x * 1.21),
                    signal_norm=x / 7,
                    noise_scale=x * 31,
                    weight_norm=x * 177,
                    adam_gain=x / 77,
                    weight_gradient=x * 13,
                    singular_energy=0.9 / (1 + index),
                    alignment=(x, -x, x / 3),
                    alpha=x / 3,
                    alpha_error=x / 99,
                    gamma=gamma,
                    k_star=k_star(gamma, 0.1, 0.7),
                    examples=64,
                    domain_tags={"general": 1.0, **{f"tag{t}": x / (3 + t) for t in range(tags)}},
                )
            )
    costs = {"fixed_cost": 0.1, "variable_cost": 0.7}
    return Blueprint("org/model", tuple(entries), costs=costs, provenance={"data": "GSM8K", "seed": 0})


@settings(max_examples=30)
@given(blueprints)
def test_columns_lose_nothing(blueprint):
    """Any record comes back equal from columns that went through JSON: names with numbers, gaps, unknown keys."""
    record = json.loads(json.dumps(to_dict(blueprint)))
    again = from_columns(json.loads(json.dumps(to_columns(record))))
    assert again == record and from_dict(again) == blueprint


@given(st.lists(st.text("ab.01_", max_size=9).map("a".__add__), min_size=1, max_size=12, unique=True))
def test_names_of_any_pattern_come_back_in_order(names):
    """Templates are found where there are some, and any other names are kept."""
    blueprint = Blueprint("m", tuple(Submodule(name, 1.0) for name in names))
    assert from_dict(from_columns(to_columns(to_dict(blueprint)))).names == tuple(names)


@settings(max_examples=30)
@given(blueprints, st.integers(1, 17))
def test_a_header_text_is_the_rounded_blueprint(blueprint, digits):
    """Reading gives exactly what `rounded` says, in printable ASCII; writing that again gives the same text."""
    text = to_header_text(blueprint, digits)
    short = from_header_text(text)
    assert short == rounded(blueprint, digits) and text.isascii() and text.isprintable()
    assert to_header_text(short, digits) == text


def test_what_rounding_keeps_and_what_it_leaves_out():
    """Four digits; γ and k* follow from the rounded α; no alignments and medians; a note of the full record's digest."""
    full = large(2)
    short = from_header_text(to_header_text(full))
    first = short[full.names[0]]
    assert first.gradient_norm == 0.1235 and first.alignment is None and first.median_norm is None
    assert first.gamma == gamma_from_alpha(first.alpha) and first.k_star == k_star(first.gamma, 0.1, 0.7)
    note = {"digits": 4, "digest": to_dict(full)["digest"]}
    assert short.provenance == {"data": "GSM8K", "seed": 0, "rounded": note}
    assert short.names == full.names and [e.shape for e in short] == [e.shape for e in full]
    with pytest.raises(BlueprintError, match="digits=0"):
        to_header_text(full, 0)


@pytest.mark.filterwarnings("ignore:gamma of")
def test_the_papers_example_and_coarser_levels_round_trip(blueprint):
    """A.1 at group level with its k*, and a measured blueprint at every level."""
    paper = from_json(PAPER)
    short = from_header_text(to_header_text(paper))
    assert replace(short, provenance={}) == paper
    for level in ("submodule", "group", "layer"):
        coarse = blueprint.coarsen(level)
        assert from_header_text(to_header_text(coarse)) == rounded(coarse)


@pytest.mark.parametrize("blocks, tags, limit", [(30, 1, 25_000), (115, 2, 95_000)])
def test_it_fits_into_the_first_read(blocks, tags, limit):
    """210 submodules take less than 25 kB in a header, 805 with three domain tags less than the 100 kB read at first."""
    assert len(escaped(to_header_text(large(blocks, tags)))) < limit


def test_experts_are_named_once():
    """Two numbers in a name cost no more than one: 48 blocks of 128 experts take 40 bytes of names."""
    names = [f"model.layers.{d}.mlp.experts.{e}.up_proj" for d in range(48) for e in range(128)]
    packed = to_columns(to_dict(Blueprint("m", tuple(Submodule(name, 1.0) for name in names))))["layers"]
    assert len(json.dumps(packed["names"])) < 120 and packed["columns"] == {"gradient_norm": {"all": 1.0}}


def test_a_changed_text_is_refused():
    """The digest of the rounded record is in the text."""
    text = to_header_text(large(1))
    with pytest.raises(FormatError, match="header of x.*changed after it was written"):
        from_header_text(text.replace("0.1235", "0.1236"), "header of x")
    assert from_header_text("  " + text + "   ") == from_header_text(text)


def packed(**layers):
    return json.dumps({"schema_version": 1, "model_id": "m", "layers": layers})


NAMES = {"runs": [["a.", 0, 3, 0]], "blocks": [[""]]}
HOSTILE = {
    "no names": (packed(), "names of the columns must be an object"),
    "names without end": (packed(names={"runs": [["a", 0, 1, 0]], "blocks": [[["a", 0, 1, 0]]]}), "over block 0 of 1"),
    "too many names": (packed(names={"runs": [["a", 0, 10**9, 0]], "blocks": [[""]]}), "more than 100,000 names"),
    "a bomb": (
        packed(names={"runs": [["a", 0, 999, 9]], "blocks": [["", ""]] + [[["b", 0, 999, i]] * 99 for i in range(9)]}),
        "more than 100,000 names",
    ),
    "long names": (packed(names={"runs": [["a" * 10**5, 0, 9**5, 0]], "blocks": [["", ""]]}), "too many or too long"),
    "a short column": (packed(names=NAMES, columns={"gradient_norm": [1, 2]}), "has 2 values where there should be 3"),
    "an unknown way": (packed(names=NAMES, columns={"gradient_norm": {"sum": 3}}), "told by 'sum'"),
    "an unknown column": (packed(names=NAMES, columns={"x": {"all": 3}}), "does not know: 'x'"),
    "no norm": (packed(names=NAMES, columns={"alpha": {"all": 1}}), "'a.0'.*no gradient_norm"),
    "too many tags": (
        packed(
            names={"runs": [["a", 0, 10**5, 0]], "blocks": [[""]]},
            columns={"domain_tags": {"tags": {str(i): {"all": 1} for i in range(99)}}},
        ),
        "99 domain tags",
    ),
    "others of nobody": (packed(names=NAMES, others={"7": {}}), "names entry '7' of 3"),
    "arrays elsewhere": (packed(names=NAMES, arrays=[]), "blueprint.safetensors"),
}


@pytest.mark.parametrize("text, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_columns_are_refused_at_once(text, message):
    """Each is a FormatError that names the source, within two seconds."""
    started = time.process_time()
    with pytest.raises(FormatError, match=f"(?s)that header.*{message}"):
        from_header_text(text, "that header")
    assert time.process_time() - started < 2


ways = st.dictionaries(st.sampled_from(["all", "each", "from", "pairs", "tags"]), junk, max_size=2)
columns = st.dictionaries(st.sampled_from(["gradient_norm", "depth", "gamma", "k_star", "domain_tags"]), ways | junk)
runs = st.lists(st.just("a") | st.just(["b.", 0, 2, 0]) | junk, max_size=3)
names = st.fixed_dictionaries({"runs": runs, "blocks": st.lists(runs, max_size=2)})


@given(st.fixed_dictionaries({"names": names | junk, "columns": columns | junk}, optional={"others": junk}))
def test_any_columns_are_a_blueprint_or_a_format_error(layers):
    """Whatever stands in their place: nothing else is raised."""
    text = json.dumps({"schema_version": 1, "model_id": "m", "layers": layers})
    try:
        from_header_text(text)
    except FormatError:
        return
