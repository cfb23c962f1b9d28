"""The whole flow on the real SmolLM2-135M, briefly. Leave it out with -m 'not slow'."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from ruamel.yaml import YAML

from tests import ROOT


sys.path.insert(0, str(ROOT / "recipes"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights():
    """The model as a folder, from the installed package's weights."""
    pytest.importorskip("gguf")
    import smollm2

    try:
        metadata.distribution(smollm2.PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: {smollm2.INSTALL}")
    torch.set_num_threads(os.cpu_count() or 1)
    yield smollm2.prepare(ROOT / smollm2.FOLDER)
    torch.set_num_threads(1)


def test_norms_on_real_weights_agree_with_autograd(weights):
    """Two examples of different length, all 210 submodules: each to 3e-4, on average to 3e-5; sketched, as predicted.

    On tiny models 1e-4 holds throughout. Here tokens' contributions nearly cancel in some layers, and the Gram form, whose
    terms are squares, loses digits there: 1.2e-4 at worst was measured (docs/results/measuring.md).
    """
    from peft_blueprint import measure_influence
    from peft_blueprint.measure import collate, encode, load_model

    model, tokenizer = load_model(str(weights), "float32")
    examples = [
        {"prompt": "def add(a, b):", "completion": " Return the sum of a and b."},
        {
            "prompt": "def split(text, separator=None):",
            "completion": " Return the words of a text, split at a separator.",
        },
    ]
    rows = encode(examples, tokenizer)
    batches = [collate(rows, tokenizer.pad_token_id)]
    influence = measure_influence(model, batches, method="exact", progress=False)
    assert len(influence.submodules) == 210
    others = [name for name, _ in influence.unmeasured]
    assert len(others) == 62 and all("norm" in name for name in others[1:]) and others[0] == "model.embed_tokens"
    sketch = measure_influence(model, batches, method="sketch", progress=False)
    off = (sketch.norms / influence.norms - 1).square().mean().sqrt()
    assert 0 < off < 2 * sketch.norm_errors.square().mean().sqrt() < 0.3
    errors = []
    for column, row in enumerate(rows):
        model.zero_grad()
        model(**collate([row], tokenizer.pad_token_id)).loss.backward()
        for i, submodule in enumerate(influence.submodules):
            expected = model.get_submodule(submodule.name).weight.grad.norm()
            errors.append(float(abs(influence.norms[i, column] / expected - 1)))
    assert max(errors) < 3e-4 and sum(errors) / len(errors) < 3e-5


def test_the_recipe_trains_a_real_model_that_plain_peft_reloads(weights, tmp_path):
    """The demo's recipe for two steps: the loss falls, and a process without this package computes the same loss."""
    import stdlib_docs
    from peft_blueprint.measure import encode, load_model, make_batches
    from peft_blueprint.measure.submodules import find_submodules
    from peft_blueprint.train import Recipe, run_recipe

    settings = YAML(typ="safe").load(ROOT / "recipes" / "stdlib_docs.yaml")
    for split, count in (("train", 8), ("held_out", 4)):
        examples = stdlib_docs.examples(split)[:count]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
        settings[split] = str(tmp_path / f"{split}.jsonl")
    settings |= {"model": str(weights), "output": str(tmp_path / "out"), "blueprint": None}
    settings |= {"probe_examples": 4, "start_examples": 4}
    settings["training"] |= {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML 1.2
    report = run_recipe(Recipe.from_yaml(tmp_path / "recipe.yaml"), progress=False)
    assert report.placed == 30 and 0.8 < report.gain_retained < 1 and report.predicted_time < 0.9
    all_linear = 16 * sum(sum(s.shape) for s in find_submodules(load_model(str(weights), "float32")[0]))
    assert 0.5 * all_linear < report.trainable_parameters <= all_linear and report.loss_after < report.loss_before

    import demo

    _, tokenizer = load_model(str(weights), "float32")
    held_out = encode(stdlib_docs.examples("held_out")[:4], tokenizer, settings["max_length"])
    torch.save(make_batches(held_out, 8, tokenizer.pad_token_id), tmp_path / "batches.pt")
    command = [sys.executable, "-c", demo.RELOAD, report.output, str(tmp_path / "batches.pt")]
    reloaded = float(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    assert reloaded == pytest.approx(report.loss_after, abs=1e-3)


def test_the_demo_lets_two_trainings_take_their_steps_in_turn(tmp_path, monkeypatch, capsys):
    """On the same batches in either order; with medians, spread, processor time and FLOPs."""
    import demo
    from peft_blueprint.testing import save_tiny_model
    from peft_blueprint.train import Recipe

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1 2 3", "completion": f"{i} 5 6"}) + "\n" for i in range(9)))
    training = {"max_steps": 5, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    recipe = Recipe(
        str(save_tiny_model(tmp_path / "model")),
        str(data),
        str(tmp_path / "placed"),
        held_out=str(data),
        probe_examples=4,
        training=training,
        dtype="float32",
    )
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    everything = Recipe(**{**vars(recipe), "placement": "all-linear", "output": str(tmp_path / "all")})
    trainings = [demo.Training(recipe, "placed"), demo.Training(everything, "all")]
    steps = []
    step = demo.Training.step
    monkeypatch.setattr(
        demo.Training, "step", lambda self, batch: (steps.append((self.log.name, batch)), step(self, batch))
    )
    demo.train_in_turn(trainings)
    assert [name for name, _ in steps] == ["placed", "all", "all", "placed"] * 2 + ["placed", "all"]
    for (_, one), (_, other) in zip(steps[::2], steps[1::2], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    records = [training.finish() for training in trainings]
    demo.report(*trainings, records, reloaded=trainings[0].losses[-1].mean)
    results = json.loads((tmp_path / "report.json").read_text())
    for name in ("seconds of a step", "processor seconds of a step"):
        assert all(0 < results[key][name]["low"] <= results[key][name]["high"] for key in ("by_blueprint", "ratio"))
    assert 0 < results["ratio"]["TFLOP of a step"] < 1 and "seconds of a step" in capsys.readouterr().out
    assert results["difference"]["standard_error"] > 0 and (tmp_path / "report.html").exists()
    charged, whole = records[0].about["probe"]["flops"]["value"], records[0].totals["flops"].value
    steps = 5e12 * results["by_blueprint"]["TFLOP of a step"]
    assert charged > 0 and whole == pytest.approx(charged + steps)
    assert [point.step for point in records[0].points] == [0, 4, 5] and len(records[0].losses) == 5
    assert "license: apache-2.0" in (tmp_path / "placed" / "README.md").read_text()
