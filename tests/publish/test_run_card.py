"""A run's cost, emissions and evaluation results in its model card."""

import html
import sys
from dataclasses import replace

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_blueprint.cli.program import main
from peft_blueprint.errors import BlueprintError
from peft_blueprint.publish.card_sections import as_text, marked, with_section
from peft_blueprint.publish.run_card import (
    SECTION,
    cost_section,
    emissions_of,
    eval_results,
    run_metadata,
    update_card,
    with_run_metadata,
)
from peft_blueprint.runs import absent, make_report, measured
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
INDEX = """model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: GSM8K, type: openai/gsm8k}
    metrics:
    - type: exact_match  # strict
      value: 0.51
"""


def without_carbon(**about):
    record = made_up_run(**about)
    return replace(record, totals={**record.totals, "carbon_grams": absent("no carbon factor")})


def put(card, record):
    return with_run_metadata(card, run_metadata(record))


def test_emissions_are_as_the_hub_reads_them():
    """Grams, source, training type, place and hardware; huggingface_hub reads them unchanged."""
    assert OURS == {
        "emissions": 2.707,
        "source": "peft-blueprint ledger, modelled: energy × 56 g CO2e/kWh, CodeCarbon 3.0.4, FRA, 2023",
        "training_type": "fine-tuning",
        "geographical_location": "FRA",
        "hardware_used": "NVIDIA L40S",
    }
    card, notes = put(PLAIN, made_up_run())
    data = ModelCard(card).data
    assert notes == [] and data.co2_eq_emissions == OURS and data.tags == ["lora"]
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


def test_known_fine_tuning_is_named():
    """By an adapter or a placement, or because the record says so; a pretraining's record may say that."""
    assert emissions_of(made_up_run(peft_config={"r": 16}))["training_type"] == "fine-tuning"
    assert emissions_of(made_up_run(training_type="pre-training"))["training_type"] == "pre-training"
    unknown = made_up_run()
    unknown = replace(unknown, about={k: v for k, v in unknown.about.items() if k not in ("peft_config", "placement")})
    assert "training_type" not in emissions_of(unknown)
    assert emissions_of(replace(unknown, totals={**unknown.totals, "carbon_grams": absent("none")})) is None


def test_results_are_as_the_hub_reads_them():
    """Each finite metric of the last evaluation, for its data set and PEFT's task."""
    run = made_up_run(held_out="openai/gsm8k", peft_config={"task_type": "CAUSAL_LM"})
    card, notes = put(PLAIN, run)
    loss, accuracy = ModelCard(card).data.eval_results
    last = run.points[-1].metrics
    assert notes == []
    assert loss == EvalResult(
        task_type="text-generation",
        dataset_type="openai/gsm8k",
        dataset_name="openai/gsm8k",
        metric_type="loss",
        metric_value=float(f"{last['eval_loss']:.6g}"),
        metric_name="eval_loss at step 600 (peft-blueprint)",
    )
    assert accuracy.metric_type == "accuracy" and ModelCard(card).data.model_name == "lora-r16"
    assert [result.dataset_name for result in eval_results(made_up_run(held_out="data/test.jsonl"))][0] == (
        "test.jsonl"
    )
    assert eval_results(made_up_run(held_out="a/b", peft_config={"task_type": "SEQ_CLS"}))[0].task_type == (
        "text-classification"
    )
    diverged = replace(run, points=(replace(run.points[-1], metrics={"eval_loss": float("nan")}),))
    assert eval_results(diverged) == eval_results(made_up_run()) == eval_results(made_up_run(held_out=3)) == []


def test_results_of_others_stay_beside_ours():
    """Twice is once; a later run replaces ours alone, and one without results removes them; comments stay."""
    plain = PLAIN.replace("tags:", INDEX + "tags:")
    run = without_carbon(held_out="openai/gsm8k")
    card, _ = put(plain, run)
    results = ModelCard(card).data.eval_results
    assert [result.metric_type for result in results] == ["exact_match", "loss", "accuracy"]
    assert "# strict" in card and put(card, run)[0] == card
    worse = replace(run, points=(replace(run.points[-1], metrics={"eval_loss": 9.0}),))
    values = [result.metric_value for result in ModelCard(put(card, worse)[0]).data.eval_results]
    assert values == [0.51, 9.0]
    assert ModelCard(put(card, without_carbon())[0]).data.to_dict() == ModelCard(plain).data.to_dict()
    alone, _ = put(PLAIN, run)
    assert put(alone, without_carbon())[0] == PLAIN


@pytest.mark.parametrize("index", ["3", "{a: b}", "[1]", "[{name: x}]", "[{results: [{}]}]"])
def test_an_odd_index_is_left_alone(index):
    """A note says so."""
    card = PLAIN.replace("tags:", f"model-index: {index}\ntags:")
    changed, notes = put(card, without_carbon(held_out="openai/gsm8k"))
    assert changed == card and "model-index in the card is not a list" in notes[0]


def test_the_rest_of_the_card_stays():
    """Adding, replacing and removing our figures keeps values, comments and line ends; removing restores the card."""
    card, _ = put(PLAIN, made_up_run())
    assert card.replace(card[card.index("co2_eq") : card.index("---\n# My")], "") == PLAIN
    below = card.replace("---\n# My", "# below\nlicense: mit\n---\n# My")
    again, _ = with_run_metadata(below, ModelCardData(co2_eq_emissions={**OURS, "emissions": 1.0}))
    assert ModelCard(again).data.co2_eq_emissions["emissions"] == 1.0
    assert again == below.replace("2.707", "1.0")
    assert "# below" in put(below, without_carbon())[0]
    assert put(card, without_carbon()) == (PLAIN, []) and put(PLAIN, without_carbon()) == (PLAIN, [])
    windows = PLAIN.replace("\n", "\r\n")
    assert put(put(windows, made_up_run())[0], without_carbon())[0] == windows


@pytest.mark.parametrize(
    "figure", ["12.5", "{emissions: 12.5, source: my own meter}", "{emissions: 3}", '"about 3 g"', "# ask Anna"]
)
@pytest.mark.parametrize("make", [made_up_run, without_carbon])
def test_a_figure_by_hand_is_never_touched(figure, make):
    """In any form; a note says so."""
    card = CARD.replace("{FIGURE}", figure)
    changed, notes = put(card, make())
    assert changed == card and "left as it is" in notes[0]


@pytest.mark.parametrize("card", ["", "# Only text\n", "\ufeff# Marked\r\n", "---\n---\ntext\n", "---\n# note\n---\n"])
def test_a_card_without_metadata_gets_some(card):
    """With the text after it unchanged."""
    changed, _ = put(card, made_up_run())
    assert ModelCard(changed.removeprefix("\ufeff")).data.co2_eq_emissions == OURS
    block = changed[changed.index("co2_eq_emissions") : changed.index("---", changed.index("co2_eq_emissions"))]
    assert changed.startswith("\ufeff") == card.startswith("\ufeff")
    assert changed.replace(block, "").endswith(card.removeprefix("\ufeff"))


def test_line_ends_of_an_old_macintosh_are_line_ends():
    """Its card has front matter too."""
    changed, _ = put(PLAIN.replace("\n", "\r"), made_up_run())
    assert changed.count("---") == 2 and "tags: [lora]" in changed.split("---")[1] and "\n" not in changed


def test_small_figures_stay_numbers():
    """1e-05 without a point would be text for some readers of YAML."""
    card, _ = with_run_metadata(PLAIN, ModelCardData(co2_eq_emissions={**OURS, "emissions": 1e-05}))
    assert ModelCard(card).data.co2_eq_emissions["emissions"] == 1e-05


@pytest.mark.parametrize("card", ["---\na: 1\n", "---\n- a\n---\n", "---\na: [\n---\n"])
def test_metadata_that_cannot_be_edited_is_an_error(card):
    """Not closed, no mapping, no YAML."""
    with pytest.raises(BlueprintError, match="front matter"):
        put(card, made_up_run())


def test_the_section_labels_every_figure_and_is_replaced_in_its_place():
    """Measured, modelled and absent in words; the text around it stays."""
    section = cost_section(make_report([without_carbon()]))
    assert "| time | 10 min 4 s | measured: wall clock |" in section
    assert "| FLOPs | 36.6 PFLOP | modelled: CostModel for 8 × 1024 tokens |" in section
    assert "| CO₂ equivalent | – | absent: no carbon factor |" in section
    first = with_section(PLAIN, marked(section, SECTION), SECTION)
    assert first.startswith(PLAIN) and first.count("## What it cost") == 1
    second = with_section(first + "\nMore of mine.\n", marked("## Other", SECTION), SECTION)
    assert second.startswith(PLAIN) and second.endswith("\nMore of mine.\n") and "What it cost" not in second


def test_names_from_a_record_cannot_leave_their_place():
    """No tag, cell, link, mark or line of Markdown comes from a name or a source."""
    name = "a|b\n# <script>x</script> [l](http://x.y) `c` --> <!-- peft-blueprint cost end -->"
    record = replace(made_up_run(name), totals={"seconds": measured(9.0, "clock | <b>")})
    section = cost_section(make_report([record, made_up_run("base")], baseline="base"))
    assert not set("<>`[]#") & set(section.replace("## What it cost", "").replace("&#", ""))
    rows = [line for line in section.splitlines() if line.startswith("| a&#124;b")]
    assert len(rows) == 1 and rows[0].count("|") == 9
    section = marked(section, SECTION)
    card = with_section(with_section(PLAIN, section, SECTION), section, SECTION)
    assert card.count("peft-blueprint cost end -->") == 1


def test_an_adapters_card_is_updated_where_it_is(tmp_path):
    """Twice to the same bytes, without a carbon figure only the section; a card is begun where there is none."""
    report = make_report([made_up_run()])
    (tmp_path / "README.md").write_text(PLAIN)
    path, notes = update_card(tmp_path, report, report.rows[0])
    once = path.read_bytes()
    update_card(tmp_path, report, report.rows[0])
    assert ["no license" in note for note in notes] == [True]
    assert path.read_bytes() == once and b"co2_eq_emissions" in once and b"Text of mine." in once
    bare = make_report([without_carbon()])
    update_card(tmp_path, bare, bare.rows[0])
    assert "co2_eq_emissions" not in path.read_text() and "no carbon factor" in path.read_text()
    (tmp_path / "new").mkdir()
    made = ModelCard(update_card(tmp_path / "new", report, report.rows[0])[0].read_text())
    assert made.data.base_model == "HuggingFaceTB/SmolLM2-135M" and made.data.library_name == "peft"
    with pytest.raises(BlueprintError, match="The folder .* does not exist"):
        update_card(tmp_path / "nowhere", report, report.rows[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "README.md cannot be read"),
        (b"---\na: [\n---\n", "is not YAML"),
        (b"<!-- peft-blueprint cost begin -->\n", "begins in line"),
    ],
)
def test_a_card_that_cannot_be_edited_stays_unchanged(tmp_path, content, message):
    """Bytes that are not text, broken YAML, broken marks."""
    (tmp_path / "README.md").write_bytes(content)
    report = make_report([made_up_run()])
    with pytest.raises(BlueprintError, match=message):
        update_card(tmp_path, report, report.rows[0])
    assert (tmp_path / "README.md").read_bytes() == content


def test_the_card_of_a_baseline_that_was_named_by_its_folder_is_its_own(tmp_path, monkeypatch):
    """Not the other run's, which is the only one that was given as a run."""
    made_up_run("base").save(tmp_path / "base")
    made_up_run("fast", speed=0.6).save(tmp_path / "fast")
    card = tmp_path / "base" / "adapter"
    card.mkdir()
    (card / "README.md").write_text("---\ntags: [lora]\n---\n# Mine\n")
    call = ["report", str(tmp_path / "fast"), "--baseline", str(tmp_path / "base"), "--card", str(card)]
    monkeypatch.setattr(sys, "argv", ["peft-blueprint", *call])
    with pytest.raises(SystemExit):
        main()
    text = (card / "README.md").read_text()
    assert "emissions: 2.707" in text and "emissions: 1.624" not in text  # base's and not fast's


def test_pefts_empty_template_is_replaced_by_a_card_that_is_filled_in(tmp_path):
    """Base model, license, data, hyperparameters and results; the Hub reads them, and no local path is left."""
    template = ModelCard.from_template(ModelCardData())
    template.data.base_model, template.data.tags = ".cache/base", ["base_model:adapter:.cache/base", "x"]
    template.text += "\n### Framework versions\n\n- PEFT 0.21.2"
    template.save(tmp_path / "README.md")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    record = made_up_run(
        model_id="/home/me/.cache/base",
        blueprint={"model_id": "HuggingFaceTB/SmolLM2-135M"},
        placement={"lora": {"model.layers.0.self_attn.q_proj": 16}},
        peft_config={"task_type": "CAUSAL_LM", "r": 16, "lora_dropout": 0.0},
        train="/home/me/train_set.jsonl",
        held_out="openai/gsm8k:main",
        train_config={"learning_rate": 1e-3},
    )
    report = make_report([record])
    path, notes = update_card(tmp_path, report, report.rows[0], license="apache-2.0")
    card, once = ModelCard(path.read_text()), path.read_text()
    assert notes == [] and card.data.base_model == "HuggingFaceTB/SmolLM2-135M" and card.data.license == "apache-2.0"
    assert (card.data.base_model_relation, card.data.library_name) == ("adapter", "peft")
    assert card.data.tags == ["base_model:adapter:HuggingFaceTB/SmolLM2-135M", "lora", "peft-blueprint", "x"]
    assert (card.data.pipeline_tag, card.data.datasets) == ("text-generation", ["openai/gsm8k"])
    assert card.data.eval_results[0].dataset_name == "openai/gsm8k"
    for text in ("`train_set.jsonl`", "| learning_rate | 0.001 |", "AutoPeftModelForCausalLM", "adapts 1 submodule,"):
        assert text in card.text
    last = record.points[-1].metrics
    assert f"| 600 | {record.losses[-1].metrics['loss']:#.4g} | {last['eval_loss']:#.4g} |" in card.text
    assert "More Information Needed" not in once and "/home" not in once and "&#95;" not in once
    update_card(tmp_path, report, report.rows[0])
    assert path.read_text() == once
    path.write_text(once.replace("A LoRA", "My LoRA").replace("base_model: Hugging", "base_model: .Hugging"))
    update_card(tmp_path, report, report.rows[0])
    again = ModelCard(path.read_text())
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text.replace("A LoRA", "My LoRA")


@pytest.mark.parametrize("text", ["a_b", "_a_", "a__b", "a_ b", "www.x.y", "http://x.y", "model.layers.0"])
def test_only_markdown_syntax_is_escaped(text):
    """Underscores within words and full stops stay."""
    plain = text in ("a_b", "model.layers.0")
    assert (as_text(text) == text) == plain and html.unescape(as_text(text)) == text
