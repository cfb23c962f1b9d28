"""Editing the front matter of a model card."""

import re
import time

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_blueprint import BlueprintError
from peft_blueprint.publish.metadata import add_metadata, is_hub_id


WISH = {"tags": ["t"], "base_model": "o/m", "datasets": ["d/s"]}
NEW = "base_model: o/m\ndatasets:\n- d/s\n"


def added(card, **values):
    return add_metadata(card, ModelCardData(**values))


def fronted(inner):
    return f"---\n{inner}---\n# A\n"


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("", f"{NEW}tags:\n- t\n"),
        ("tags:\n", f"tags:\n- t\n{NEW}"),
        ("tags: [a, 'b'] # x\n", f"tags: [a, 'b', t] # x\n{NEW}"),
        ("tags:\n- a # x\n# y\nlicense: mit\n", f"tags:\n- t\n- a # x\n# y\nlicense: mit\n{NEW}"),
        ("tags:\n  - a\n\n  - b\n", "tags:\n  - a\n\n  - b\n  - t\nbase_model: o/m\ndatasets:\n  - d/s\n"),
        ("tags:\n- t\nbase_model: x/y\n", "tags:\n- t\nbase_model: x/y\ndatasets:\n- d/s\n"),
        ("tags: t\nbase_model: [x/y]\n", "tags: t\nbase_model: [x/y, o/m]\ndatasets:\n- d/s\n"),
        ("base_model:\n- o/m\ntags: [t]\n", "base_model:\n- o/m\ntags: [t]\ndatasets:\n- d/s\n"),
        ("datasets: 'd/s' # one\ntags: [t]\nbase_model: m\n", "datasets: 'd/s' # one\ntags: [t]\nbase_model: m\n"),
        ("{license: mit}\n", "{license: mit, base_model: o/m, datasets: [d/s], tags: [t]}\n"),
        ("a: |+\n  x\n\n# end\n", f"a: |+\n  x\n\n# end\n{NEW}tags:\n- t\n"),
        ("# only a comment\n", f"# only a comment\n{NEW}tags:\n- t\n"),
        ('"tags": ["a"]\n', f'"tags": ["a", t]\n{NEW}'),
        ("x: 1e-05\nlanguage: no\ntags: [t]\n", f"x: 1e-05\nlanguage: no\ntags: [t]\n{NEW}"),
    ],
)
def test_values_are_added_and_the_rest_stays(inner, wanted):
    """Comments, order, quotes and number formats stay; a base model that is already there wins; CRLF stays CRLF."""
    assert added(fronted(inner), **WISH) == fronted(wanted)
    assert added(fronted(wanted), **WISH) == fronted(wanted), "twice is once"
    crlf = [fronted(text).replace("\n", "\r\n") for text in (inner, wanted)]
    assert added(crlf[0], **WISH) == crlf[1]


@pytest.mark.parametrize(
    ("inner", "tags"),
    [
        ("tags: ~  # none\n", ["t"]),
        ("tags: a, b # mine\n", ["a, b", "t"]),
        ("tags: [ # x\n]\n", ["t"]),
        ("tags: [\n  a, # x\n  b # y\n]\n", ["a", "t", "b"]),
        ("  a: 1 # first\n  tags:\n  - b\n", ["b", "t"]),
        ("tags:\n- |\n  a\nb: 1\n", ["a\n", "t"]),
        ("tags: &t [a] # shared\n", ["a", "t"]),
    ],
)
def test_no_comment_is_lost(inner, tags):
    """Even where the YAML must be written in another form."""
    card = added(fronted(inner), tags=["t"])
    assert ModelCard(card, ignore_metadata_errors=True).data.to_dict()["tags"] == tags
    assert all(card.count(comment) == 1 for comment in re.findall("# .*", inner)) and card.endswith("---\n# A\n")


def test_missing_front_matter_is_created():
    """Before everything, with the card's own line ends, after a byte order mark."""
    assert added("# A\n", tags=["t"]) == "---\ntags:\n- t\n---\n\n# A\n"
    assert added("# A\r\n", tags=["t"]) == "---\r\ntags:\r\n- t\r\n---\r\n\r\n# A\r\n"
    assert added("\ufeff# A\n", tags=["t"]) == "\ufeff---\ntags:\n- t\n---\n\n# A\n"
    assert added("\ufeff---\na: 1\n---\n", tags=["t"]) == "\ufeff---\na: 1\ntags:\n- t\n---\n"
    assert added("", tags=["t"]) == "---\ntags:\n- t\n---\n"
    assert added("# A\n") == "# A\n"
    assert added("---\nlicense: mit\n---\n", license="gpl") == "---\nlicense: mit\n---\n"


def test_added_text_stays_text():
    """Values that some YAML reader takes for a number or a boolean are quoted."""
    card = added("", tags=["no", "1e3"], license="1.0", library_name="a: b")
    assert ModelCard(card).data.to_dict() == {"tags": ["no", "1e3"], "license": "1.0", "library_name": "a: b"}
    assert "'no'" in card and "'1.0'" in card


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\ntags: [a\n---\n", "not YAML .*line 3 of the card"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\ntags: [a]\n", "begins in line 1 with --- and no line --- ends it"),
        ("\n\n---\ntags: [a]\n", "begins in line 3"),
        ("---\na: !!python/object:os.system x\n---\n", "not YAML"),
        ("---\na: 2024-99-99\n---\n", "not YAML"),
        ("---\na: 1\na: 2\n---\n", "duplicate key"),
        ("---\ntags: &t [a]\nother: *t\n---\n", r"cannot be changed without.*Add by hand: {'tags': \['t'\]}"),
        ("---\ntags: {a: b}\n---\n", "tags in the card's front matter must be a list, got a mapping"),
        ("---\na: &a [1]\nb: [" + "*a, " * 20 + "]\n---\n", "more than 16 YAML aliases"),
        ("---\na: " + "[" * 100_000 + "\n---\n", "deeper than 40"),
        ("---\na: " + "x" * 1_000_000 + "\n---\n", "1,000,004 characters"),
    ],
)
def test_front_matter_that_cannot_be_edited_is_an_error(card, message):
    """Rather than a guess or a change to other values; and within a second or so."""
    start = time.monotonic()
    with pytest.raises(BlueprintError, match=message):
        added(card, tags=["t"])
    assert time.monotonic() - start < 5


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.text(st.characters(codec="utf-8"), max_size=8)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", min_size=1), v, max_size=3)
)
mappings = st.dictionaries(st.sampled_from(["tags", "datasets", "base_model", "license", "x"]), values, max_size=5)


@settings(max_examples=100, deadline=None)
@given(mapping=mappings, flow=st.booleans(), indent=st.sampled_from([2, 4]), newline=st.sampled_from(["\n", "\r\n"]))
def test_other_values_read_as_before(mapping, flow, indent, newline):
    """For any YAML the result reads as the old values with the additions, or it is an error."""
    inner = yaml.safe_dump(mapping, default_flow_style=flow, indent=indent, sort_keys=False, allow_unicode=True)
    if re.search(r"^---|^\.\.\.|\r|\u2028|\u2029|\x85", inner, re.M):
        return
    card = fronted(inner).replace("\n", newline)
    before = yaml.safe_load(inner)
    try:
        after = added(card, tags=["t"], datasets=["d/s"])
    except BlueprintError:
        assert any(isinstance(mapping.get(key), dict) for key in ("tags", "datasets"))
        return
    found = yaml.safe_load(after.split(f"---{newline}")[1])
    for key, value in (("tags", "t"), ("datasets", "d/s")):
        old = before.get(key)
        wanted = old if isinstance(old, list) else [] if old is None else [old]
        assert repr(found.pop(key)) == repr([*wanted, *([] if value in wanted else [value])])
        before.pop(key, None)
    assert repr(found) == repr(before)
    assert after.endswith(f"---{newline}# A{newline}")


@pytest.mark.parametrize("text", ["", "a", "a/b/c", "../a", "~/a", "a/b\n", " a/b", "é/b", "a/" + "b" * 97, "a/b.git"])
def test_other_texts_are_not_ids_on_the_hub(text):
    """A path, one word, letters that the Hub does not take."""
    assert not is_hub_id(text) and is_hub_id("org/my-model_2.5")
