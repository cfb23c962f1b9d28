"""The section of a model card and its front matter, as text. Run: pytest tests/test_card.py"""

import re
from contextlib import suppress
from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.errors import FormatError
from peft_blueprint.publish.card import (
    card_section,
    datasets_of,
    is_hub_id,
    new_card,
    with_metadata,
    with_section,
    without_section,
)


FILE = "blueprint.json"
BEGIN, END = (f"<!-- gradient-blueprint {FILE} {what} -->" for what in ("begin", "end"))
HOSTILE = (
    "a|b",
    "a`b``c",
    "<script>alert(1)</script>",
    "--> <!-- gradient-blueprint blueprint.json end -->",
    "<!-- gradient-blueprint blueprint.json begin -->",
    "two\nlines\r\n\r\n# a heading\n---\n",
    "[link](https://example.org) ![x](y) https://example.org www.example.org",
    "```\nout of the fence",
    '") or __import__("os").system("x") #',
    "\u202eright to left\u2066 \x00\x1b[2J\ud800\u2028\x85",
    "&lt;b&gt;",
    "x" * 10_000,
)


def made(blueprint, text):
    """A record in which a stranger wrote `text` wherever there is room for text."""
    first, *others = blueprint.submodules
    wishes = (
        {"model_id": text},
        {"model_revision": text},
        {"model_digest": text},
        {"submodules": (replace(first, name=text), *others)},
        {"submodules": (replace(first, kind=text), *others)},
        {
            "provenance": {
                "data": {text: [text, {"deep": text}]},
                "command": text,
                "created": text,
                "method": text,
                "versions": {text: text},
                "domains": {text: {"examples": text, "tokens": 3, "mean_loss": 1.5, "data_digest": text}},
                "privacy": {"statement": text, text: text},
            }
        },
    )
    for wish in wishes:
        with suppress(FormatError):  # some text is refused where a record is made
            blueprint = replace(blueprint, **wish)
    return blueprint


def test_the_section_says_what_was_measured_on_what(blueprint):
    """Model, revision, checkpoint, data, command, versions, the strongest with interval and rank, and the limits."""
    known = replace(
        blueprint,
        model_revision="c0ffee",
        training_checkpoint=0.8,
        provenance={
            **blueprint.provenance,
            "data": "openai/gsm8k",
            "command": "peft-blueprint generate tiny/llama --data openai/gsm8k",
            "privacy": {"statement": "norms are clipped", "epsilon": 1.5},
        },
    )
    section = card_section(known, "blueprint-math-80.json", picture="blueprint-math-80.png", repo_id="me/maps")
    domain = known.provenance["domains"]["data"]
    for said in (
        'Blueprint.from_pretrained("me/maps", domain="math", checkpoint=0.8)',
        "$ peft-blueprint fetch me/maps --domain math --checkpoint 0.8",
        "| model | `tiny/llama` |",
        "| revision | `c0ffee` |",
        "| checkpoint | `80 % of the model's training` |",
        "| measured | `84 entries at submodule level, 7 kinds` |",
        "| command | `peft-blueprint generate tiny/llama --data openai/gsm8k` |",
        f"torch: {known.provenance['versions']['torch']}",
        f"| `data` | {domain['examples']} | {domain['tokens']} | {domain['mean_loss']:.4g} | `{domain['data_digest']}` |",
        "(blueprint-math-80.png)",
        "### Privacy\n\nThe record says: statement: norms are clipped; epsilon: 1.5",
        f"over {domain['examples']} examples",
        "no proof that an adapter there trains better",
    ):
        assert said in section, said
    assert section == card_section(known, "blueprint-math-80.json", picture="blueprint-math-80.png", repo_id="me/maps")
    assert 'Blueprint.from_pretrained("tiny/llama")' in card_section(known, FILE)
    assert "Privacy" not in card_section(blueprint, FILE)


def test_the_strongest_are_the_first_of_every_kind(blueprint):
    """Norms of different kinds do not compare: rank 1 of each of the seven kinds stands before any rank 2."""
    section = card_section(blueprint, FILE, top=9)
    rows = re.findall(
        r"^\| `(model\.\S+)` \| (\S+) \| (\S+) to (\S+) \| (\d+) of 12 `(\w+)` \| (\S+) \|$", section, re.M
    )
    assert [row[4] for row in rows] == ["1"] * 7 + ["2"] * 2
    for name, norm, low, high, rank, kind, gain in rows:
        entry = blueprint[name]
        assert float(norm) == pytest.approx(entry.gradient_norm, rel=0.01) and blueprint.ranks()[name] == int(rank)
        assert float(low) == pytest.approx(entry.norm_interval[0], rel=0.01) and kind == entry.kind
        assert float(high) == pytest.approx(entry.norm_interval[1], rel=0.01)
        assert float(gain) == pytest.approx(entry.adam_gain, rel=0.01)
    assert "by adam gain" in card_section(blueprint, FILE, by="adam_gain")
    with pytest.raises(BlueprintError, match="no statistic 'beauty'"):
        card_section(blueprint, FILE, by="beauty")


def test_the_papers_bare_record_has_a_section():
    """Ids and norms alone: no interval, no gain, no provenance, and nothing made up for them."""
    bare = Blueprint(model_id="org/m", submodules=(Submodule("attn.0", 1.0), Submodule("ffn.0", 2.0)), level="group")
    section = card_section(bare, FILE)
    assert "| `ffn.0` | 2.00 |  | 1 of 2 |\n| `attn.0` | 1.00 |  | 2 of 2 |" in section
    assert "Adam" not in section and "None" not in section


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_in_its_place(blueprint, text):
    """No line more than an honest record has, the same number of cells in every row, no HTML, no link, no mark."""
    honest, hostile = (
        card_section(made(replace(blueprint, model_revision="x", model_digest="x"), t), FILE) for t in ("honest", text)
    )
    assert hostile.count("\n") == honest.count("\n") and len(hostile.splitlines()) == len(honest.splitlines())
    for one, other in zip(honest.splitlines(), hostile.splitlines(), strict=True):
        if one.startswith("|"):
            assert other.count("|") == one.count("|")
        assert re.findall(r"^(?:#+|```|---|- |\| )", one) == re.findall(r"^(?:#+|```|---|- |\| )", other)
    outside = re.sub(r"`[^`\n]*`", "", hostile)
    assert not re.search(r"<(?!/?code>|!-- gradient-blueprint blueprint\.json (?:begin|end) -->)", outside)
    assert not re.search(r"https?://|www\.", outside) and "](http" not in outside
    assert hostile.count("<!--") == hostile.count("-->") == 2
    hostile.encode()
    assert "\x1b" not in hostile and "\u202e" not in hostile and len(hostile) < len(honest) + 20 * 4_000
    card = with_section("above\n", hostile, FILE)
    assert without_section(card, FILE) == "above\n"


def test_a_record_of_odd_types_does_not_stop_it(blueprint):
    """Provenance is anybody's: what is of another type than expected is left out or shown as it is."""
    for odd in (None, 3, [1, [2]], {"a": {"b": None}}, "text", True):
        keys = ("data", "command", "versions", "domains", "privacy", "merged", "created", "method", "seed")
        assert BEGIN in card_section(replace(blueprint, provenance=dict.fromkeys(keys, odd)), FILE)
    many = {f"d{i}": {} for i in range(500)}
    assert "and 480 more" in card_section(replace(blueprint, provenance={"domains": many}), FILE)


@pytest.mark.parametrize(
    "name", ["x.json", "../blueprint.json", "blueprint-.json", "blueprint.json -->", "blueprint", ""]
)
def test_a_file_that_is_not_called_so_is_refused(blueprint, name):
    """The marks hold the file's name, so that it must be one."""
    for act in (lambda: card_section(blueprint, name), lambda: with_section("", "", name)):
        with pytest.raises(BlueprintError, match="no name for a blueprint in a repository"):
            act()


texts = st.text(st.sampled_from("ab#-|`<!> \n\r\t\ufeff\u2028é"), max_size=30)


@given(above=texts, below=texts, first=texts, second=texts)
@example(above="\ufeff", below="", first="", second="")
@example(above="a\r\n", below="\r\nb", first="x", second="y")
def test_every_byte_outside_the_section_stays(above, below, first, second):
    """Replacing a section changes what is between the marks; appending one changes nothing before it."""
    marked = [f"{BEGIN}\n{text.replace(chr(13), '')}\n{END}" for text in (first, second)]
    card = with_section(above, marked[0], FILE)
    assert card.startswith(above)
    card += below
    changed = with_section(card, marked[1], FILE)
    assert changed.split(BEGIN)[0] == card.split(BEGIN)[0] and changed.split(END)[1] == card.split(END)[1]
    assert with_section(changed, marked[1], FILE) == changed
    assert with_section(changed, marked[0], FILE) == card


@given(above=texts)
def test_taking_a_section_out_is_the_way_back(above):
    """But for a line end that the last line now has."""
    section = f"{BEGIN}\nx\n{END}"
    back = without_section(with_section(above, section, FILE), FILE)
    assert back.startswith(above) and back[len(above) :] in ("", "\n", "\r", "\r\n")
    if above.endswith("\n") and not above.endswith("\r\n"):
        assert back[len(above) :] in ("", "\r"), "a card of mixed line ends may keep one"
    assert without_section(above, FILE) == above


def test_line_ends_are_the_cards_own(blueprint):
    """A card with CRLF gets a section with CRLF, and keeps it."""
    card = with_section("# A\r\n", card_section(blueprint, FILE), FILE)
    assert "\n" not in card.replace("\r\n", "")
    assert with_section(card, card_section(blueprint, FILE), FILE) == card
    assert without_section(card, FILE) == "# A\r\n"


def test_sections_of_several_files_live_side_by_side(blueprint):
    """Each is found by its own name, though one's is part of the other's."""
    names = ("blueprint.json", "blueprint-math.json", "blueprint-math-80.json")
    card = "# A\n"
    for name in names:
        card = with_section(card, card_section(blueprint, name), name)
    for name in names:
        assert with_section(card, card_section(blueprint, name), name) == card
    for name in names:
        card = without_section(card, name)
    assert card == "# A\n"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (f"a\n{BEGIN}\nb\n", "begins in line 2 and does not end"),
        (f"a\n\n{END}\n", "ends without having begun, as line 3"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}", "begins a second time, as line 3"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", "begins in line 1 and does not end, as line 2"),
        (f"{BEGIN}\r\n<!-- gradient-blueprint blueprint-x.json begin -->\r\n{END}", "begins in line 1.*line 2"),
        (f"{BEGIN}\n<!-- gradient-blueprint blueprint-x.json end -->\n{END}\n", "blueprint-x.json ends.*line 2"),
        ("<!-- gradient-blueprint blueprint-x.json begin -->\n", "blueprint-x.json begins in line 1"),
    ],
)
def test_broken_marks_are_an_error_that_says_where(card, message):
    """Nothing is guessed, of another file's marks neither."""
    for act in (lambda: with_section(card, f"{BEGIN}{END}", FILE), lambda: without_section(card, FILE)):
        with pytest.raises(BlueprintError, match=message):
            act()


def fronted(inner):
    return f"---\n{inner}---\n# A\n"


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("", "tags:\n- t\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags:\n", "tags: [t]\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: ~  # none\n", "tags: [t]  # none\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: a  # mine\n", "tags: [a, t]  # mine\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: a, b # mine\n", "tags: # mine\n- a, b\n- t\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: [a, 'b', ] # x\n", "tags: [a, 'b', t, ] # x\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: []\n", "tags: [t]\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: [ # x\n]\n", "tags: [t # x\n]\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags: [\n  a, # x\n  b # y\n]\n", "tags: [\n  a, # x\n  b, t # y\n]\nbase_model: o/m\ndatasets:\n- d/s\n"),
        (
            "tags:\n- a # x\n# y\nlicense: mit\n",
            "tags:\n- a # x\n- t\n# y\nlicense: mit\nbase_model: o/m\ndatasets:\n- d/s\n",
        ),
        ("tags:\n  - a\n\n  - b\n", "tags:\n  - a\n\n  - b\n  - t\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags:\n- t\nbase_model: x/y\n", "tags:\n- t\nbase_model: x/y\ndatasets:\n- d/s\n"),
        ("tags: t\nbase_model: [x/y]\n", "tags: t\nbase_model: [x/y, o/m]\ndatasets:\n- d/s\n"),
        ("base_model:\n- o/m\ntags: [t]\n", "base_model:\n- o/m\ntags: [t]\ndatasets:\n- d/s\n"),
        ("datasets: 'd/s' # one\ntags: [t]\nbase_model: m\n", "datasets: 'd/s' # one\ntags: [t]\nbase_model: m\n"),
        ("{license: mit}\n", "{license: mit, tags: [t], base_model: o/m, datasets: [d/s]}\n"),
        ("{}\n", "{tags: [t], base_model: o/m, datasets: [d/s]}\n"),
        ("  a: 1\n  tags:\n  - b\n", "  a: 1\n  tags:\n  - b\n  - t\n  base_model: o/m\n  datasets:\n  - d/s\n"),
        ("a: |+\n  x\n\n# end\n", "a: |+\n  x\n\n# end\ntags:\n- t\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("tags:\n- |\n  a\nb: 1\n", "tags:\n- |\n  a\n- t\nb: 1\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ("# only a comment\n", "# only a comment\ntags:\n- t\nbase_model: o/m\ndatasets:\n- d/s\n"),
        ('"tags": ["a"]\n', '"tags": ["a", t]\nbase_model: o/m\ndatasets:\n- d/s\n'),
    ],
)
def test_front_matter_is_added_to_as_text(inner, wanted):
    """Comments, order, quotes and spaces stay; a base model that a person gave wins; CRLF stays CRLF."""
    wish = {"tags": ["t"], "base_model": "o/m", "datasets": ["d/s"]}
    assert with_metadata(fronted(inner), **wish) == fronted(wanted)
    assert with_metadata(fronted(wanted), **wish) == fronted(wanted), "twice is once"
    crlf = [fronted(text).replace("\n", "\r\n") for text in (inner, wanted)]
    assert with_metadata(crlf[0], **wish) == crlf[1]


def test_front_matter_is_begun_where_there_is_none():
    """Before everything, with the card's own line ends, after a byte order mark."""
    assert with_metadata("# A\n", tags=["t"]) == "---\ntags:\n- t\n---\n\n# A\n"
    assert with_metadata("# A\r\n", tags=["t"]) == "---\r\ntags:\r\n- t\r\n---\r\n\r\n# A\r\n"
    assert with_metadata("\ufeff# A\n", tags=["t"]) == "\ufeff---\ntags:\n- t\n---\n\n# A\n"
    assert with_metadata("\ufeff---\na: 1\n---\n", tags=["t"]) == "\ufeff---\na: 1\ntags:\n- t\n---\n"
    assert with_metadata("", tags=["t"]) == "---\ntags:\n- t\n---\n"
    assert with_metadata("# A\n", tags=[]) == "# A\n"
    assert with_metadata("", tags=["no"], license="1.0", library_name="a: b") == (
        '---\nlicense: "1.0"\nlibrary_name: "a: b"\ntags:\n- "no"\n---\n'
    )
    assert with_metadata("---\nlicense: mit\n---\n", tags=[], license="gpl") == "---\nlicense: mit\n---\n"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\ntags: [a\n---\n", "not YAML .*line"),
        ("---\n- a\n---\n", "not a mapping"),
        ("---\ntags: [a]\n", "begins in line 1 with --- and no line --- ends it"),
        ("\n\n---\ntags: [a]\n", "begins in line 3"),
        ("---\na: !!python/object:os.system x\n---\n", "not YAML"),
        ("---\na: 2024-99-99\n---\n", "not YAML"),
        ("---\ntags: &t [a]\nother: *t\n---\n", "t cannot be added to tags.*by hand"),
        ("---\ntags: {a: b}\n---\n", "t cannot be added to tags"),
        ("---\na: &a [1]\nb: [" + "*a, " * 20 + "]\n---\n", "more than 16 YAML aliases"),
        ("---\na: " + "[" * 100_000 + "\n---\n", "deeper than 40"),
    ],
)
def test_front_matter_that_cannot_be_added_to_is_an_error(card, message):
    """Rather than a guess, or a change to what is there."""
    with pytest.raises(BlueprintError, match=message):
        with_metadata(card, tags=["t"])


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.text(st.characters(codec="utf-8"), max_size=8)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", min_size=1), v, max_size=3)
)
mappings = st.dictionaries(st.sampled_from(["tags", "datasets", "base_model", "license", "x"]), values, max_size=5)


@settings(max_examples=50)
@given(mapping=mappings, flow=st.booleans(), indent=st.sampled_from([2, 4]), newline=st.sampled_from(["\n", "\r\n"]))
def test_what_was_there_reads_as_before(mapping, flow, indent, newline):
    """Whatever YAML: the new reads as the old with the additions, and no line's text is gone; or it is an error."""
    inner = yaml.safe_dump(mapping, default_flow_style=flow, indent=indent, sort_keys=False, allow_unicode=True)
    if re.search(r"^---|^\.\.\.|\r|\u2028|\u2029|\x85", inner, re.M):
        return
    card = fronted(inner).replace("\n", newline)
    before = yaml.safe_load(inner)
    try:
        after = with_metadata(card, tags=["t"], datasets=["d/s"])
    except BlueprintError:
        assert any(not isinstance(mapping.get(key, []), list) for key in ("tags", "datasets"))
        return
    found = yaml.safe_load(after.split(f"---{newline}")[1])
    for key, value in (("tags", "t"), ("datasets", "d/s")):
        old = before.get(key)
        wanted = old if isinstance(old, list) else [] if old is None else [old]
        assert repr(found.pop(key)) == repr([*wanted, *([] if value in wanted else [value])])
        before.pop(key, None)
    assert repr(found) == repr(before)
    assert after.endswith(f"---{newline}# A{newline}")


def test_the_card_of_a_repository_of_blueprints_alone(blueprint):
    """Tag, base model and data sets in front; it does not name itself as its base."""
    measured = replace(blueprint, provenance={"data": {"a": "openai/gsm8k", "b": ["org/set", "train.jsonl"]}})
    card = new_card(measured, "me/maps")
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "tags": ["gradient-blueprint"],
        "base_model": "tiny/llama",
        "datasets": ["openai/gsm8k", "org/set"],
    }
    assert "base_model" not in new_card(measured, "Tiny/Llama")
    assert "base_model" not in new_card(replace(measured, model_id="<b>\n"), "me/maps")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("openai/gsm8k", ("openai/gsm8k",)),
        ("openai/gsm8k, org/x, openai/gsm8k", ("openai/gsm8k", "org/x")),
        ("data/train.jsonl", ()),
        ("/data/train, ./a/b, ../x, ~/x/y, gsm8k, a/b/c", ()),
        (None, ()),
        (3, ()),
    ],
)
def test_data_sets_are_what_has_the_form_of_an_id(blueprint, data, found):
    """Files and paths are not."""
    assert datasets_of(replace(blueprint, provenance={"data": data})) == found
    assert all(map(is_hub_id, found))
