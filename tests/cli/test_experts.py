"""Blueprints of thousands of single experts: files, `show`, `compare --experts`, pictures."""

import json
import time

import pytest

from peft_blueprint import Blueprint, plan_placement
from peft_blueprint.blueprint import from_header_text, to_dict, to_header_text
from tests.mixtures import blueprint_of_experts


LAYERS, EXPERTS = 3, 16


@pytest.fixture(scope="module")
def math():
    return blueprint_of_experts(LAYERS, EXPERTS)


@pytest.fixture(scope="module")
def files(math, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    law = blueprint_of_experts(LAYERS, EXPERTS, seed=1)
    return math.save(folder / "math.json"), law.save(folder / "law.json")


def test_thousands_of_experts_are_quick_to_write_read_show_and_place(run, tmp_path):
    many = blueprint_of_experts(layers=12, experts=128)  # a quarter of Qwen3-30B-A3B
    start = time.process_time()
    assert Blueprint.from_pretrained(many.save(tmp_path / "many.csv"))[many.names[-1]] == many.submodules[-1]
    assert from_header_text(to_header_text(to_dict(many)))["layers"][-1]["token_share"] is not None
    assert run("show", tmp_path / "many.csv")[1].count(".mlp.experts") == 12
    placement = plan_placement(many, experts=0.1)
    assert len({name.split(".")[5] for name in placement.lora if ".layers.3.mlp.experts." in name}) == 13
    assert time.process_time() - start < 10  # a fifth of that on an idle core


def test_show_summarizes_experts_by_layer(run, files, math):
    status, out, _ = run("show", files[0], "--by", "token_share")
    lines = [line for line in out.splitlines() if ".mlp.experts" in line]
    assert status == 0 and len(lines) == LAYERS and "experts by token_share" in out
    shares = {e.name: e.token_share for e in math if e.name.startswith("model.layers.2.mlp") and "down" in e.name}
    largest = max(shares, key=shares.get)
    assert f"{largest.split('.')[5]} ({shares[largest]:.1%})" in lines[2]
    _, out, _ = run("show", files[0], "--by", "token_share", "--top", "3")
    assert sum(".mlp.experts." in line for line in out.splitlines()) == 3


def test_compares_experts_of_two_tasks(run, files):
    status, out, _ = run("compare", *files, "--experts", "0.9", "--format", "json")
    found = json.loads(out)
    assert status == 0 and len(found["layers"]) == LAYERS and 0 < found["jaccard"] < 1
    assert abs(found["jaccard"] - found["chance"]) < 0.3  # drawn independently
    status, out, _ = run("compare", *files, "--experts", "0.9", "--by", "adam_gain")
    assert status == 0 and "hold 90 % of adam_gain" in out
    status, _, error = run("compare", *files, "--by", "adam_gain")
    assert status and "give --experts" in error


def test_draws_layers_by_experts(run, files, math, tmp_path):
    pytest.importorskip("matplotlib")
    from peft_blueprint.publish import plot_experts

    assert run("show", files[0], "--picture", tmp_path / "experts.png", "--by", "token_share")[0] == 0
    assert (tmp_path / "experts.png").stat().st_size > 5_000
    law = Blueprint.from_pretrained(files[1])
    one, two = plot_experts(math, by="adam_gain"), plot_experts(math, law, top_p=0.5)
    assert one.axes[0].images[0].get_array().shape == (LAYERS, EXPERTS)
    assert len(two.axes) == 3  # two panels and the colour bar
    assert len(two.axes[0].collections[0].get_paths()) > 0
