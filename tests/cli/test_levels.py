"""`coarsen`, and `--model` where a blueprint of groups or layers is expanded again."""

import json

import pytest

from peft_blueprint import Blueprint
from peft_blueprint.testing import save_tiny_model


@pytest.fixture
def shop(blueprint, tmp_path, monkeypatch):
    """A blueprint, that of its groups as `coarsen` writes it, and its model."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", layers=12)
    blueprint.save("blueprint.json")
    blueprint.coarsen("group").save("by_hand.json")
    return tmp_path


@pytest.mark.parametrize("level", ["group", "layer"])
def test_coarsen_writes_the_form_of_the_papers_example(run, shop, level):
    """Entries attn.0, ffn.0, … with α, γ, k* and intervals, as the method returns them."""
    status, out, err = run("coarsen", "blueprint.json", "--level", level, "--out", "coarse.json")
    assert status == 0 and "Next: peft-blueprint targets coarse.json --model" in err
    coarse = Blueprint.from_pretrained("coarse.json")
    assert coarse == Blueprint.from_pretrained("blueprint.json").coarsen(level)
    first = json.loads((shop / "coarse.json").read_text())["layers"][0]
    assert first["id"] == {"group": "attn.0", "layer": "layer.0"}[level] and first["id"] in out
    assert {"gradient_norm", "alpha", "gamma", "k_star", "norm_interval"} <= first.keys()
    status, out, _ = run("coarsen", "blueprint.json", "--level", level, "--format", "json")
    assert json.loads(out)["layers"][0] == first


def test_a_coarse_file_needs_the_model_and_is_placed_on_it(run, shop):
    """`targets` and `compare` ask for it, and read its config alone."""
    (shop / "model" / "model.safetensors").unlink()
    status, _, err = run("targets", "by_hand.json")
    assert status == 2 and "give the model, on the command line as --model" in err
    status, out, _ = run("targets", "by_hand.json", "--model", "model", "--num-modules", 6, "--format", "quiet")
    assert status == 0 and len(out.split()) == 6 and all(name.startswith("model.layers.") for name in out.split())
    assert run("compare", "by_hand.json", "blueprint.json")[0] == 2
    status, out, _ = run("compare", "by_hand.json", "blueprint.json", "--model", "model", "--format", "json")
    rows = {row["id"]: row for row in json.loads(out)}
    expected = Blueprint.from_pretrained("by_hand.json")["attn.3"].gradient_norm / 2
    assert rows["model.layers.3.self_attn.q_proj"]["first"] == pytest.approx(expected)


def test_data_are_selected_by_the_submodules_of_a_coarse_file(run, shop):
    """It is expanded to the model's submodules, of which some are placed."""
    (shop / "rows.jsonl").write_text("".join(f'{{"prompt": "1 {i}", "completion": "{i} 7"}}\n' for i in range(4)))
    words = ("select-data", "model", "--data", "rows.jsonl", "--count", 2, "--method", "norm", "--out", "out.jsonl")
    status, _, err = run(*words, "--blueprint", "by_hand.json", "--placement-fraction", 0.1)
    assert status == 0, err
    assert len((shop / "out.jsonl").read_text().splitlines()) == 2


def test_a_group_is_unfrozen_whole(run, shop):
    """The strongest groups of a coarse file are the blocks that `--mode unfreeze` takes."""
    coarse = sorted(Blueprint.from_pretrained("by_hand.json"), key=lambda entry: -entry.gradient_norm)[:3]
    wish = ("--mode", "unfreeze", "--num-modules", 3, "--rank-by", "gradient_norm", "--coverage", "none")
    status, out, _ = run("targets", "by_hand.json", "--model", "model", *wish, "--format", "quiet")
    parts = {"attn": "self_attn", "ffn": "mlp"}
    assert status == 0
    assert set(out.split()) == {f"model.layers.{entry.depth}.{parts[entry.kind]}" for entry in coarse}
