"""What a model card says of a run's cost. Run: pytest tests/test_report_card.py"""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from peft_blueprint.errors import BlueprintError
from peft_blueprint.publish.run_card import cost_section, emissions_of, update_card, with_cost_section, with_emissions
from peft_blueprint.runs.figures import absent, measured
from peft_blueprint.runs.report import make_report
from tests.made_up_runs import made_up_run


CARD = """---
# mine
base_model: HuggingFaceTB/SmolLM2-135M  # the base
co2_eq_emissions: {FIGURE}
tags: [lora]
---
# My adapter

Text of mine.
"""
PLAIN = CARD.replace("co2_eq_emissions: {FIGURE}\n", "")
OURS = emissions_of(made_up_run())


def without_carbon():
    record = made_up_run()
    return replace(record, totals={**record.totals, "carbon_grams": absent("no carbon factor")})


def test_emissions_are_as_the_hub_reads_them():
    """Grams, source, training type, place and hardware; they come back from huggingface_hub as they were."""
    assert OURS == {
        "emissions": 2.707,
        "source": "peft-blueprint ledger, modelled: energy × 56 g CO2e/kWh, CodeCarbon 3.0.4, FRA, 2023",
        "training_type": "fine-tuning",
        "geographical_location": "FRA",
        "hardware_used": "NVIDIA L40S",
    }
    card, note = with_emissions(PLAIN, OURS)
    data = ModelCard(card).data
    assert note is None and data.co2_eq_emissions == OURS and data.tags == ["lora"]
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


def test_what_a_person_wrote_stays_to_the_byte():
    """Adding, replacing and taking away ours leaves the rest, its comments too; taking away gives the first card back."""
    card, _ = with_emissions(PLAIN, OURS)
    assert card.replace(card[card.index("co2_eq") : card.index("---\n# My")], "") == PLAIN
    again, _ = with_emissions(card, {**OURS, "emissions": 1.0})
    assert ModelCard(again).data.co2_eq_emissions["emissions"] == 1.0
    assert with_emissions(again, None) == (PLAIN, None) and with_emissions(PLAIN, None) == (PLAIN, None)
    windows = PLAIN.replace("\n", "\r\n")
    assert with_emissions(with_emissions(windows, OURS)[0], None)[0] == windows


@pytest.mark.parametrize(
    "figure", ["12.5", "{emissions: 12.5, source: my own meter}", "{emissions: 3}", '"about 3 g"']
)
@pytest.mark.parametrize("entry", [OURS, None])
def test_a_figure_by_hand_is_never_touched(figure, entry):
    """Whatever its form; a note says so."""
    card = CARD.replace("{FIGURE}", figure)
    changed, note = with_emissions(card, entry)
    assert changed == card and "left as it is" in note


@pytest.mark.parametrize("card", ["", "# Only text\n", "\ufeff# Marked\r\n", "---\n---\ntext\n", "---\n# note\n---\n"])
def test_a_card_without_metadata_gets_some(card):
    """With the text after it as it was."""
    changed, _ = with_emissions(card, OURS)
    assert ModelCard(changed.removeprefix("\ufeff")).data.co2_eq_emissions == OURS
    block = changed[changed.index("co2_eq_emissions") : changed.index("---", changed.index("co2_eq_emissions"))]
    assert changed.startswith("\ufeff") == card.startswith("\ufeff")
    assert changed.replace(block, "").endswith(card.removeprefix("\ufeff"))


def test_small_figures_stay_numbers():
    """1e-05 without a point would be a text in YAML."""
    card, _ = with_emissions(PLAIN, {**OURS, "emissions": 1e-05})
    assert ModelCard(card).data.co2_eq_emissions["emissions"] == 1e-05


@pytest.mark.parametrize("card", ["---\n{a: 1}\n---\n", "---\na: 1\n", "---\n- a\n---\n", "---\na: [\n---\n"])
def test_metadata_that_cannot_be_edited_is_left_with_an_error(card):
    """In one line, not closed, no mapping, no YAML."""
    with pytest.raises(BlueprintError, match="front matter"):
        with_emissions(card, OURS)


def test_the_section_labels_every_figure_and_is_replaced_in_its_place():
    """Measured, modelled and absent in words; the text around it stays."""
    section = cost_section(make_report([without_carbon()]))
    assert "| time | 10 min 4 s | measured: wall clock |" in section
    assert "| FLOPs | 36.6 PFLOP | modelled: CostModel for 8 × 1024 tokens |" in section
    assert "| CO₂ equivalent | – | absent: no carbon factor |" in section
    first = with_cost_section(PLAIN, section)
    assert first.startswith(PLAIN) and first.count("## What it cost") == 1
    second = with_cost_section(first + "\nMore of mine.\n", "## Other\n")
    assert second.startswith(PLAIN) and second.endswith("\nMore of mine.\n") and "What it cost" not in second
    with pytest.raises(BlueprintError, match="do not pair up in the model card, as line 9 shows"):
        with_cost_section(PLAIN + "<!-- peft-blueprint cost begin -->\n", section)


def test_names_from_a_record_cannot_leave_their_place():
    """No tag, cell, link, mark or line of Markdown comes from a name or a source."""
    name = "a|b\n# <script>x</script> [l](http://x.y) `c` --> <!-- peft-blueprint cost end -->"
    record = replace(made_up_run(name), totals={"seconds": measured(9.0, "clock | <b>")})
    section = cost_section(make_report([record, made_up_run("base")], baseline="base"))
    assert not set("<>`[]#") & set(section.replace("## What it cost", "").replace("&#", ""))
    rows = [line for line in section.splitlines() if line.startswith("| a&#124;b")]
    assert len(rows) == 1 and rows[0].count("|") == 9
    assert with_cost_section(with_cost_section(PLAIN, section), section).count("peft-blueprint cost end -->") == 1


def test_an_adapters_card_is_updated_where_it_is(tmp_path):
    """Twice to the same bytes, without a carbon figure only the section; a card is begun where there is none."""
    report = make_report([made_up_run()])
    (tmp_path / "README.md").write_text(PLAIN)
    path, notes = update_card(tmp_path, report, report.rows[0])
    once = path.read_bytes()
    update_card(tmp_path, report, report.rows[0])
    assert notes == [] and path.read_bytes() == once and b"co2_eq_emissions" in once
    bare = make_report([without_carbon()])
    update_card(tmp_path, bare, bare.rows[0])
    assert "co2_eq_emissions" not in path.read_text() and "no carbon factor" in path.read_text()
    (tmp_path / "new").mkdir()
    made = ModelCard(update_card(tmp_path / "new", report, report.rows[0])[0].read_text())
    assert made.data.base_model == "HuggingFaceTB/SmolLM2-135M" and made.data.library_name == "peft"
    with pytest.raises(BlueprintError, match="There is no folder"):
        update_card(tmp_path / "nowhere", report, report.rows[0])


def test_a_card_that_is_no_text_stays_as_it_is(tmp_path):
    """And the error names it."""
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    report = make_report([made_up_run()])
    with pytest.raises(BlueprintError, match="README.md cannot be read"):
        update_card(tmp_path, report, report.rows[0])
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
