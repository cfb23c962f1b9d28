"""A blueprint as the short text in a header, one list per statistic."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_blueprint import Blueprint, BlueprintError, Submodule
from peft_blueprint.blueprint import from_dict, to_dict
from peft_blueprint.blueprint.header_text import from_columns, to_columns
from peft_blueprint.blueprint.theory import gamma_from_alpha, k_star
from peft_blueprint.errors import FormatError
from tests.random_blueprints import PAPER, blueprints, junk
from tests.records import from_header_text, from_json, rounded, to_header_text


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


def test_json_alone_reads_a_header():
    """`json.loads` gives one plain list per statistic, the names spelled out."""
    full = large(2)
    layers = json.loads(to_header_text(full))["layers"]
    assert layers["id"] == list(full.names) and layers["kind"] == [entry.kind for entry in full]
    assert layers["gradient_norm"] == [float(f"{entry.gradient_norm:.3e}") for entry in full]
    assert layers["shape"] == [list(entry.shape) for entry in full]
    assert layers["domain_tags"]["general"] == [1.0] * 14


@settings(max_examples=30)
@given(blueprints, st.integers(1, 17))
def test_a_header_text_is_the_rounded_blueprint(blueprint, digits):
    """Reading gives exactly what `rounded` says, in printable ASCII; writing that again gives the same text."""
    text = to_header_text(blueprint, digits)
    short = from_header_text(text)
    assert short == rounded(blueprint, digits) and text.isascii() and text.isprintable()
    assert to_header_text(short, digits) == text


def test_rounding_keeps_four_digits_and_leaves_out_alignments():
    """Four digits; no alignments and medians; a note of the full record's digest."""
    full = large(2)
    short = from_header_text(to_header_text(full))
    first = short[full.names[0]]
    assert first.gradient_norm == 0.1235 and first.alignment is None and first.median_norm is None
    assert first.gamma == float(f"{full[full.names[0]].gamma:.3e}")
    note = {"digits": 4, "digest": to_dict(full)["digest"]}
    assert short.provenance == {"data": "GSM8K", "seed": 0, "rounded": note}
    assert short.names == full.names and [e.shape for e in short] == [e.shape for e in full]
    with pytest.raises(BlueprintError, match="digits must be from 1 to 17, got 0"):
        to_header_text(full, 0)


@pytest.mark.filterwarnings("ignore:gamma of")
def test_the_papers_example_and_coarser_levels_round_trip(blueprint):
    """A.1 at group level with its k*, and a measured blueprint at every level."""
    paper = from_json(PAPER)
    short = from_header_text(to_header_text(paper))
    assert short.names == paper.names and [e.k_star for e in short] == [e.k_star for e in paper]
    assert [e.domain_tags for e in short] == [e.domain_tags for e in paper]
    for level in ("submodule", "group", "layer"):
        coarse = blueprint.coarsen(level)
        assert from_header_text(to_header_text(coarse)) == rounded(coarse)


@pytest.mark.parametrize("blocks, tags, limit", [(30, 1, 40_000), (80, 1, 100_000)])
def test_it_fits_into_the_first_read(blocks, tags, limit):
    """The 560 submodules of a model of 80 blocks take less than the 100 kB read at first."""
    assert len(json.dumps(to_header_text(large(blocks, tags)))) < limit


def test_a_changed_text_is_refused():
    """The digest of the rounded record is in the text."""
    text = to_header_text(large(1))
    with pytest.raises(FormatError, match="header of x.*changed after it was written"):
        from_header_text(text.replace("0.1235", "0.1236"), "header of x")
    assert from_header_text("  " + text + "   ") == from_header_text(text)


def packed(**layers):
    return json.dumps({"schema_version": 1, "model_id": "m", "layers": layers})


IDS = ["a.0", "a.1", "a.2"]
HOSTILE = {
    "no ids": (packed(), "id of layers must be a list"),
    "a short list": (packed(id=IDS, gradient_norm=[1, 2]), "'gradient_norm' has 2 values, and there are 3 ids"),
    "no list": (packed(id=IDS, gradient_norm={"all": 3}), "gradient_norm of layers must be a list"),
    "an unknown list": (packed(id=IDS, x=[3, 3, 3]), "does not know: 'x'"),
    "no norm": (packed(id=IDS, alpha=[1, 1, 1]), "'a.0'.*no gradient_norm"),
    "short tags": (packed(id=IDS, domain_tags={"law": [1.0]}), "'law' has 1 values, and there are 3 ids"),
    "others of nobody": (packed(id=IDS, others={"7": {}}), "names entry '7' of 3"),
    "arrays elsewhere": (packed(id=IDS, arrays=[]), "blueprint.safetensors"),
}


@pytest.mark.parametrize("text, message", HOSTILE.values(), ids=HOSTILE)
def test_lists_that_do_not_fit_together_are_refused(text, message):
    """Each is a FormatError that names the source."""
    with pytest.raises(FormatError, match=f"(?s)that header.*{message}"):
        from_header_text(text, "that header")


lists = st.lists(st.just(1.0) | junk, max_size=3)
tags = st.dictionaries(st.text(max_size=3), lists | junk, max_size=2)


@given(
    st.fixed_dictionaries(
        {"id": st.just(["a", "b"]) | lists},
        optional={"gradient_norm": lists, "depth": lists | junk, "domain_tags": tags | junk, "others": junk},
    )
)
def test_any_columns_are_a_blueprint_or_a_format_error(layers):
    """Any columns; no other exception is raised."""
    text = json.dumps({"schema_version": 1, "model_id": "m", "layers": layers})
    try:
        from_header_text(text)
    except FormatError:
        return
