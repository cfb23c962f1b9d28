"""Damaged and random files: every reader gives a sound blueprint or a BlueprintError."""

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_blueprint import Blueprint, BlueprintError, Submodule
from peft_blueprint.blueprint import from_dict, to_dict
from peft_blueprint.blueprint.header import parse_header
from tests.records import (
    from_arrays_bytes,
    from_csv,
    from_header_text,
    from_json,
    to_arrays_bytes,
    to_csv,
    to_header_text,
    to_json,
    with_metadata,
)


def seed():
    """A blueprint that uses most keys."""
    submodules = tuple(
        Submodule(
            f"model.layers.{i}.self_attn.{kind}",
            0.5 + i,
            kind=kind,
            depth=i,
            group=f"attn.{i}",
            shape=(4, 8),
            norm_interval=(0.25, 9.0),
            alignment=(0.5, -0.25),
            alpha=1.25,
            gamma=0.5,
            k_star=0.125,
            examples=8,
            domain_tags={"bio": 1.0, "law": 0.5},
        )
        for i in range(2)
        for kind in ("q_proj", "v_proj")
    )
    costs = {"fixed_cost": 2.0, "variable_cost": 3.0}
    return Blueprint("org/m", submodules, training_checkpoint=0.5, costs=costs, provenance={"seed": 0, "data": ["a"]})


SEED = seed()
RECORD = {key: value for key, value in to_dict(SEED).items() if key != "digest"}
PLAIN = json.dumps(RECORD)
READERS = {
    "JSON": (PLAIN.encode(), lambda data: from_json(text_of(data))),
    "JSON with a digest": (to_json(SEED).encode(), lambda data: from_json(text_of(data))),
    "CSV": (to_csv(SEED).encode(), lambda data: from_csv(text_of(data))),
    "a header": (to_header_text(SEED).encode(), lambda data: from_header_text(text_of(data))),
    "arrays": (to_arrays_bytes(SEED), from_arrays_bytes),
}

pytestmark = pytest.mark.filterwarnings("ignore:gamma of")
quick = settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
numbers = st.sampled_from([0, -0.0, -1, 1.5, 2**31, 2**63, -(2**63), 10**18, 10**300, 1e-320, 1e308, True, 0.1])
texts = st.sampled_from(["", "a", "#", ".#", "\0", "../a", "attn.0", "NaN", "😀", "1", "all", "sha256:"]) | st.text(
    max_size=4
)
junk = st.recursive(
    st.none() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(list(RECORD)), inner, max_size=3)
    ),
    max_leaves=6,
)


def text_of(data):
    """Bytes as the text that a reader of files would hand on, or nothing."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""


def read_or_refused(read, data):
    """Require a BlueprintError, or a blueprint that survives JSON."""
    try:
        blueprint = read(data)
    except BlueprintError as error:
        str(error).encode()
        return
    assert isinstance(blueprint, Blueprint) and from_json(to_json(blueprint)) == blueprint


def mutated(data, edits):
    """`data` with bits flipped, pieces taken out, doubled, swapped or put in, and its end cut off."""
    for kind, at, length, value in edits:
        at = int(at * len(data))
        before, piece, after = data[:at], data[at : at + length], data[at + length :]
        new = PIECES[value % len(PIECES)]
        data = (
            before
            + {
                "flip": bytes(byte ^ (1 << value % 8) for byte in piece[:1]) + piece[1:] + after,
                "drop": after,
                "double": piece + piece + after,
                "swap": after[:length] + piece + after[length:],
                "put": new + piece + after,
                "replace": new + after,
                "cut": piece,
            }[kind]
        )
    return data


PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"9" * 20,
    b"-",
    b"1e999",
    b"NaN",
    b"null",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\n",
]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "drop", "double", "swap", "put", "replace", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 20),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", READERS)
@quick
@given(edits=edits)
def test_a_damaged_file_is_read_or_refused(name, edits):
    """Bits flipped, pieces dropped, doubled, swapped, put in or cut off: a BlueprintError, or a sound blueprint."""
    data, read = READERS[name]
    read_or_refused(read, mutated(data, edits))


@quick
@given(tree=junk)
def test_any_json_is_read_or_refused(tree):
    """Random trees, as JSON, as columns, as an object."""
    text = json.dumps(tree)
    for read in (from_json, from_header_text, from_csv):
        read_or_refused(read, text)
    read_or_refused(from_dict, tree)


def paths_of(tree, path=()):
    """The way to every value of a tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths_of(value, (*path, key))


def changed(tree, path, value):
    """The tree with one value replaced, and with a key of its place exchanged if `value` is text."""
    if not path:
        return value
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    tree[path[0]] = changed(tree[path[0]], path[1:], value)
    if isinstance(tree, dict) and isinstance(value, str) and len(path) == 1:
        tree[value] = tree.pop(path[0])
    return tree


TREES = {
    "JSON": (RECORD, lambda tree: from_json(json.dumps(tree))),
    "an object": (RECORD, from_dict),
    "a header": (json.loads(to_header_text(SEED)), lambda tree: from_header_text(json.dumps(without_digest(tree)))),
    "arrays": (
        json.loads(parse_header(to_arrays_bytes(SEED), "it").metadata["blueprint.json"]),
        lambda tree: from_arrays_bytes(
            with_metadata(to_arrays_bytes(SEED), **{"blueprint.json": json.dumps(without_digest(tree))})
        ),
    ),
}


def without_digest(tree):
    return {key: value for key, value in tree.items() if key != "digest"} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("name", TREES)
@quick
@given(data=st.data())
def test_a_record_with_something_else_in_a_place_is_read_or_refused(name, data):
    """Any value or key of a sound record may be replaced by anything."""
    tree, read = TREES[name]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths_of(tree))))
        tree = changed(tree, path, data.draw(junk))
    read_or_refused(read, tree)


@quick
@given(rows=st.lists(st.lists(texts | numbers.map(str), max_size=6), max_size=4))
def test_any_table_is_read_or_refused(rows):
    """Columns of our names over cells of anything."""
    out = io.StringIO()
    csv.writer(out).writerows([["model_id", "id", "gradient_norm", "depth", "shape", "extra"], *rows])
    read_or_refused(from_csv, out.getvalue())
