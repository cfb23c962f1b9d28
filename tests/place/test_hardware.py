"""Settings that fit a device, and the verb `plan`, which needs no weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from peft_blueprint import Blueprint, Placement, plan_placement
from peft_blueprint.cli.program import app
from peft_blueprint.errors import PlacementError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.place.cost import Workload
from peft_blueprint.place.hardware import plan_settings, recommend_setting
from peft_blueprint.testing import tiny_llama
from tests.hub.loopback import loopback_hub


def test_settings_are_tried_and_the_most_gain_per_time_is_recommended():
    """Without checkpointing and quantization where memory allows; otherwise with the setting that fits."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    load = Workload(batch_size=4, length=256)
    plenty = plan_settings(None, config, budget={"memory": "4GiB"}, workload=load)
    assert [(s.quantization, s.checkpointing) for s in plenty] == [
        (None, False),
        (None, True),
        ("nf4", False),
        ("nf4", True),
    ]
    assert recommend_setting(plenty) is plenty[0] and plenty[1].time > plenty[0].time
    least = min(setting.all_linear for setting in plenty)
    short = plan_settings(None, config, budget={"memory": least}, workload=load)
    assert recommend_setting(short).checkpointing
    for setting in short:
        if setting.placement is not None:
            assert setting.placement.cost["memory"] <= least
    with pytest.raises(PlacementError, match="Nothing fits in any setting.*too small"):
        recommend_setting(plan_settings(None, config, budget={"memory": 1000}, workload=load))


@pytest.fixture
def folder(tmp_path):
    """A model's config without any weight, and a blueprint of it."""
    model = tiny_llama(layers=6)
    model.config.save_pretrained(tmp_path / "model")
    entries = tuple(replace(e, gradient_norm=1.0, adam_gain=1.0 + i % 3) for i, e in enumerate(find_submodules(model)))
    Blueprint("org/m", entries).save(tmp_path / "blueprint.json")
    return tmp_path


def plan(*words):
    """Return the answer of `peft-blueprint plan`."""
    return CliRunner().invoke(app, ["plan", *map(str, words)], catch_exceptions=False)


def test_plan_reads_a_config_alone(folder):
    """All settings in a table, the one to take, and the placement; as JSON and as bare names too."""
    found = plan(folder / "model", "--vram", "40MiB", "--reserve", "20MiB", "--length", 64)
    for part in ("recommended", "nf4", "bfloat16", "within 20 MiB", "_proj", "not measured"):
        assert part in found.stdout, part
    answer = json.loads(plan(folder / "model", "--keep", 0.5, "--format", "json").stdout)
    assert len(answer["settings"]) == 4 and answer["placement"]["rank_by"] == "even"
    names = plan(folder / "model", "--keep", 0.5, "--format", "quiet").stdout.split()
    assert names == answer["placement"]["lora"]


def test_plan_goes_by_a_blueprint_and_keeps_its_budget(folder, tmp_path):
    """With one setting asked for; in a trainer's words; with a picture."""
    words = (folder / "model", "--blueprint", folder / "blueprint.json", "--budget", "0.7x", "--quantization", "none")
    answer = json.loads(
        plan(*words, "--no-checkpointing", "--format", "json", "--picture", tmp_path / "plan.png").stdout
    )
    [setting] = answer["settings"]
    assert answer["placement"]["rank_by"] == "cover_gain per cost" and setting["time"] <= 0.7 and setting["fits"]
    assert (tmp_path / "plan.png").stat().st_size > 1000
    text = plan(*words, "--no-checkpointing", "--for", "llamafactory", "--rank", 8).stdout
    assert "lora_target" in text and "lora_rank: 8" in text


@pytest.mark.parametrize("vram", ["24GiB", "2GiB", "1070MiB"])
def test_a_plan_for_a_card_takes_no_more_than_pays(folder, vram):
    """With a blueprint the most gain per step time, without one the default's size, as far as it fits."""
    config = tiny_llama(layers=6).config
    words = (folder / "model", "--vram", vram, "--format", "json", "--length", 64)
    unmeasured = json.loads(plan(*words).stdout)
    assert len(unmeasured["placement"]["lora"]) <= 6 and unmeasured["placement"]["is_gain_measured"] is False
    assert "not measured" in plan(folder / "model", "--vram", vram, "--length", 64).stdout.replace("\n", " ")
    measured = json.loads(plan(*words, "--blueprint", folder / "blueprint.json").stdout)
    found = measured["placement"]
    assert found["is_gain_measured"] and 0 < len(found["lora"]) < 42
    assert "not measured" not in plan(*words[:3], "--blueprint", folder / "blueprint.json").stdout
    record, load = Blueprint.from_pretrained(folder / "blueprint.json"), Workload(batch_size=1, length=64)
    for fraction in (0.1, 0.3, 0.6, 1.0):
        other = plan_placement(record, config, fraction=fraction, ranks="equal_parameters", workload=load)
        assert found["gain_retained"] / found["cost"]["time"] >= other.gain_retained / other.cost["time"] - 1e-9


def test_plan_chooses_a_share_of_the_data_too(folder):
    """With the exponent of its gain: the placement is then the one for that share."""
    words = (folder / "model", "--blueprint", folder / "blueprint.json", "--device", "cpu", "--length", 64)
    words = (*words, "--quantization", "none", "--no-checkpointing")
    answer = json.loads(plan(*words, "--delta", 0.3, "--scoring-cost", 0.1, "--format", "json").stdout)
    joint = answer["joint"]
    assert 0 < joint["q"] < 1 and joint["placement"] == answer["placement"]
    assert joint["gain_per_cost"] >= max(joint["placement_alone"], joint["data_alone"]) > 1
    text = plan(*words, "--delta", 0.3, "--scoring-cost", 0.1).stdout
    assert f"{100 * joint['q']:.3g} % of the data" in text and "placement alone" in text


def test_plan_maximises_gain_per_cost_on_request(folder):
    """Without any budget; also with an own time constant."""
    words = (folder / "model", "--blueprint", folder / "blueprint.json", "--best", "gain_per_cost", "--length", 64)
    answer = json.loads(plan(*words, "--format", "json").stdout)["placement"]
    assert answer["selector"] == {"best": "gain_per_cost"} and answer["gain_per_cost"] > 1
    assert any("time constant of cuda is an estimate" in note for note in answer["notes"])
    own = json.loads(plan(*words, "--flops-per-byte", 100, "--format", "json").stdout)["placement"]
    assert not own["notes"] and own["cost"]["time"] != answer["cost"]["time"]


def test_freezing_four_fifths_of_7_billion_parameters_saves_67_gigabytes(tmp_path):
    """The paper's section 5: 12 bytes for each frozen parameter, read off the plan."""
    seven = LlamaConfig(architectures=["LlamaForCausalLM"], intermediate_size=11680)  # 32 layers of width 4096
    seven.save_pretrained(tmp_path)
    words = (tmp_path, "--mode", "unfreeze", "--fraction", 0.205, "--master-weights", "--quantization", "none")
    answer = json.loads(plan(*words, "--no-checkpointing", "--format", "json").stdout)["placement"]
    full, own = answer["full_training"], answer["cost"]
    assert full["parameters"] == pytest.approx(7e9, rel=1e-3)
    frozen = full["parameters"] - own["parameters"]
    assert full["optimizer_state"] - own["optimizer_state"] == 12 * frozen == pytest.approx(67.2e9, rel=0.02)
    assert answer["shares"]["trainable"] == own["parameters"] / full["parameters"]
    assert f"{12e-9 * frozen:.1f} GB less than for all 7 billion parameters" in str(Placement.from_dict(answer))
    row = plan(*words, "--no-checkpointing").stdout
    assert "13 blocks" in row and "of parameters" in row


def test_plan_reads_a_repository_on_the_hub(folder):
    """Only its config is fetched: there is nothing else to fetch."""
    script = "from peft_blueprint.cli import main; main()"
    with loopback_hub({"org/model": folder / "model"}) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache")}
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            script,
            "plan",
            "org/model",
            "--keep",
            "0.5",
            "--format",
            "quiet",
        ]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == plan(folder / "model", "--keep", 0.5, "--format", "quiet").stdout.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vram", "1KiB", "--reserve", "1B"), "Nothing fits in any setting"),
        (("--vram", "12GiB", "--reserve", "13GiB"), "leaves nothing of --vram 12GiB"),
        (("--vram", "12GiB", "--budget", "8GiB"), "both limit the memory"),
        (("--vram", "a lot"), "Cannot read 'a lot'"),
        (("--picture", "x.png"), "give one with --blueprint"),
        (("--scoring-cost", "0.1"), "needs --delta"),
        (("--quantization", "gptq"), "quantization='gptq'"),
        (("--optimizer", "lion"), "optimizer='lion'"),
    ],
)
def test_wishes_that_cannot_be_met_are_named(folder, words, message):
    """Each in one line."""
    with pytest.raises(PlacementError, match=message):
        plan(folder / "model", *words)
