"""The section of a model card that describes a blueprint, and its place in the card."""

import re
from contextlib import suppress
from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint import describe_k_star
from peft_blueprint.blueprint.entry import Submodule
from peft_blueprint.errors import FormatError
from peft_blueprint.publish.card import card_section, datasets_of, new_card, section_name
from peft_blueprint.publish.card_sections import marked, with_section
from peft_blueprint.publish.metadata import is_hub_id


FILE = "blueprint.json"
NAME = section_name(FILE)
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


def test_the_section_names_the_measurement_and_its_data(blueprint):
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
        "### Privacy\n\nFrom the record: statement: norms are clipped; epsilon: 1.5",
        f"from {domain['examples']} examples",
        "does not prove that an adapter there trains better",
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
    with pytest.raises(BlueprintError, match="by must be one of.*got 'beauty'"):
        card_section(blueprint, FILE, by="beauty")


def test_the_papers_bare_record_has_a_section():
    """Ids and norms alone: no interval, no gain, no provenance, and nothing made up for them."""
    bare = Blueprint(model_id="org/m", submodules=(Submodule("attn.0", 1.0), Submodule("ffn.0", 2.0)), level="group")
    section = card_section(bare, FILE)
    assert "| `ffn.0` | 2.00 |  | 1 of 2 |\n| `attn.0` | 1.00 |  | 2 of 2 |" in section
    assert "Adam" not in section and "None" not in section


def test_a_record_of_groups_shows_the_keys_of_the_papers_example(blueprint):
    """Exponents and the recommended fraction of each block, and how far influence agrees with gradient norms."""
    groups = blueprint.coarsen("group")
    section = card_section(groups, FILE, top=2)
    assert "| group | gradient norm | 95 % interval | rank in its kind | Adam gain | alpha | gamma | k* |" in section
    entry = max((e for e in groups if e.kind == "attn"), key=lambda e: e.gradient_norm)
    assert f"| `{entry.name}` |" in section
    assert f"| {entry.alpha:.4g} | {entry.gamma:.4g} | {entry.k_star:.4g} |\n" in section
    assert "rank correlation of influence" not in section
    rho = blueprint.influence["rank_correlation"]
    share = describe_k_star(blueprint)
    assert share.startswith(f"{100 * blueprint.costs['k_star']:.3g} % of parameters (")
    assert f"| k* | `{share}` |" in card_section(blueprint, FILE)
    assert f"| rank correlation of influence (Fisher) with gradient norm | `{rho:.4g}` |" in card_section(
        blueprint, FILE
    )


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
    card = with_section("above\n", hostile, NAME)
    assert with_section(card, marked("x", NAME), NAME) == f"above\n\n{BEGIN}\nx\n{END}\n"


def test_a_record_of_odd_types_does_not_stop_it(blueprint):
    """Values of an unexpected type in a provenance are left out or shown as they are."""
    for odd in (None, 3, [1, [2]], {"a": {"b": None}}, "text", True):
        keys = ("data", "command", "versions", "domains", "privacy", "merged", "created", "method", "seed")
        assert BEGIN in card_section(replace(blueprint, provenance=dict.fromkeys(keys, odd)), FILE)
    many = {f"d{i}": {} for i in range(500)}
    assert "and 480 more" in card_section(replace(blueprint, provenance={"domains": many}), FILE)


@pytest.mark.parametrize(
    "name", ["x.json", "../blueprint.json", "blueprint-.json", "blueprint.json -->", "blueprint", ""]
)
def test_a_file_with_another_name_is_refused(blueprint, name):
    """The marks contain the file's name, so it must be a blueprint's."""
    with pytest.raises(BlueprintError, match="file name must be blueprint.json"):
        card_section(blueprint, name)


texts = st.text(st.sampled_from("ab#-|`<!> \n\r\t\ufeff\u2028é"), max_size=30)


@given(above=texts, below=texts, first=texts, second=texts)
@example(above="\ufeff", below="", first="", second="")
@example(above="a\r\n", below="\r\nb", first="x", second="y")
def test_every_byte_outside_the_section_stays(above, below, first, second):
    """Replacing a section changes only the text between the marks; appending one keeps all before it."""
    sections = [marked(text.replace("\r", ""), NAME) for text in (first, second)]
    card = with_section(above, sections[0], NAME)
    assert card.startswith(above)
    card += below
    changed = with_section(card, sections[1], NAME)
    assert changed.split(BEGIN)[0] == card.split(BEGIN)[0] and changed.split(END)[1] == card.split(END)[1]
    assert with_section(changed, sections[1], NAME) == changed
    assert with_section(changed, sections[0], NAME) == card


def test_line_ends_are_the_cards_own(blueprint):
    """A card with CRLF gets a section with CRLF, and keeps it."""
    card = with_section("# A\r\n", card_section(blueprint, FILE), NAME)
    assert "\n" not in card.replace("\r\n", "")
    assert with_section(card, card_section(blueprint, FILE), NAME) == card


def test_sections_of_several_files_are_side_by_side(blueprint):
    """Each is found by its own name, though one's is part of the other's; so is the section on a run's cost."""
    names = ("blueprint.json", "blueprint-math.json", "blueprint-math-80.json")
    sections = {section_name(name): card_section(blueprint, name) for name in names}
    sections["peft-blueprint cost"] = marked("## What it cost", "peft-blueprint cost")
    card = "# A\n"
    for name, section in sections.items():
        card = with_section(card, section, name)
    assert all(card.count(section) == 1 for section in sections.values())
    for name, section in sections.items():
        assert with_section(card, section, name) == card
        assert with_section(card, marked("new", name), name) == card.replace(section, marked("new", name))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (f"a\n{BEGIN}\nb\n", "begins in line 2 and does not end"),
        (f"a\n\n{END}\n", "ends in line 3 without a beginning"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}", "begins a second time in line 3"),
        (f"{BEGIN}\n{BEGIN}\n{END}\n", "begins in line 2 inside the section of line 1"),
        (
            f"{BEGIN}\r\n<!-- gradient-blueprint blueprint-x.json begin -->\r\n{END}",
            "blueprint-x.json' begins in line 2",
        ),
        (f"{BEGIN}\n<!-- gradient-blueprint blueprint-x.json end -->\n{END}\n", "blueprint-x.json' ends in line 2"),
        ("<!-- gradient-blueprint blueprint-x.json begin -->\n", "blueprint-x.json' begins in line 1"),
        ("<!-- peft-blueprint cost begin -->\n", "'peft-blueprint cost' begins in line 1 and does not end"),
    ],
)
def test_broken_marks_are_an_error_that_says_where(card, message):
    """Also if the marks are another section's."""
    with pytest.raises(BlueprintError, match=message):
        with_section(card, marked("", NAME), NAME)


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
        ("openai/gsm8k", ["openai/gsm8k"]),
        ("openai/gsm8k, org/x, openai/gsm8k", ["openai/gsm8k", "org/x"]),
        ("openai/gsm8k:main, qiaojin/PubMedQA:pqa_labeled", ["openai/gsm8k", "qiaojin/PubMedQA"]),
        ("data/train.jsonl", []),
        ("/data/train, ./a/b, ../x, ~/x/y, gsm8k, a/b/c, é/b, -a/b, a/b.git, a/b--c", []),
        (None, []),
        (3, []),
    ],
)
def test_data_sets_are_ids_on_the_hub(blueprint, data, found):
    """Files and paths are not."""
    assert datasets_of(replace(blueprint, provenance={"data": data})) == found
    assert all(map(is_hub_id, found))
