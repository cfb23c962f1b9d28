"""A YAML becomes a trained adapter with a report."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from peft_blueprint import BlueprintError, generate_blueprint
from peft_blueprint.cli import main
from peft_blueprint.data import read_examples
from peft_blueprint.measure import encode, get_pad_token_id, load_model, make_batches
from peft_blueprint.runs.record import RunRecord
from peft_blueprint.testing import save_tiny_model
from peft_blueprint.train.recipe import Recipe
from peft_blueprint.train.run import held_out_loss, run_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, and data whose answers repeat their questions."""
    folder = tmp_path_factory.mktemp("recipe")
    save_tiny_model(folder / "model", layers=6)
    rows = [{"prompt": f"{i % 7} {i % 5} 9", "completion": f"{i % 7} {i % 5}"} for i in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, tmp_path, **changes):
    """A small recipe as a file."""
    settings = {
        "model": str(folder / "model"),
        "train": str(folder / "data.jsonl"),
        "held_out": str(folder / "data.jsonl"),
        "output": str(tmp_path / "out"),
        "probe_examples": 8,
        "max_length": 32,
        "placement": {"fraction": 0.25},
        "lora": {"r": 4},
        "training": {"max_steps": 8, "learning_rate": 0.02, "per_device_train_batch_size": 8},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings | changes))  # JSON is YAML 1.2
    return path


def test_a_recipe_trains_saves_and_reports(folder, tmp_path):
    """The loss falls, the report matches the saved adapter, and the adapter reloads to the same loss."""
    report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path)), progress=False)
    assert report.loss_after < report.loss_before and report.steps == 8 and report.placed == 10
    assert report.train_seconds > 0 and report.drift is None
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["loss_after"] == report.loss_after and saved["trainable_parameters"] == report.trainable_parameters
    record = RunRecord.load(tmp_path / "out")
    assert [point.metrics["held_out_loss"] for point in record.points] == [report.loss_before, report.loss_after]
    assert all(0 < point.metrics["held_out_loss_stderr"] < 1 for point in record.points)
    assert record.points[-1].step == 8 and record.about["probe"]["tokens"]["value"] > 0
    for name in ("tokens", "flops"):  # the probe is charged to the run
        of_training = record.totals[name].value - record.about["probe"][name]["value"]
        assert 0 < of_training < record.totals[name].value == pytest.approx(record.points[-1].spent[name])
    assert len(record.about["placement"]["lora"]) == 10 and record.stopping is None
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    _, tokenizer = load_model(str(folder / "model"))
    rows = encode(read_examples(str(folder / "data.jsonl")), tokenizer, 32)
    again = held_out_loss(model, make_batches(rows, 8, get_pad_token_id(tokenizer)), progress=False)
    assert again == pytest.approx(report.loss_after, rel=1e-4)


@pytest.mark.parametrize("form", ["json", "quiet"])
def test_the_verb_prints_nothing_but_the_result_on_stdout(folder, tmp_path, capfd, monkeypatch, form):
    """One JSON value, with bars and a line a logging step on stderr; or the adapter's folder, and no lines."""
    path = recipe(folder, tmp_path, training={"max_steps": 2, "logging_steps": 1, "eval_strategy": "epoch"})
    monkeypatch.setattr("sys.argv", ["peft-blueprint", "train", str(path), "--format", form])
    with pytest.raises(SystemExit, match="0"):
        main()
    out, err = capfd.readouterr()
    if form == "json":
        assert json.loads(out)["steps"] == 2
    else:
        assert out == f"{tmp_path / 'out'}\n"
    assert ("step 1: loss " in err and "eval_loss " in err) is (form == "json")


def test_a_published_blueprint_is_checked_and_blended(folder, tmp_path):
    """With a blueprint in the recipe, the report has the drift; all-linear ignores both."""
    model, tokenizer = load_model(str(folder / "model"))
    rows = encode(read_examples(str(folder / "data.jsonl")), tokenizer, 32)
    generate_blueprint(model, make_batches(rows, 8, 0), progress=False).save(tmp_path / "published.json")
    blended = run_recipe(
        Recipe.from_yaml(recipe(folder, tmp_path, blueprint=str(tmp_path / "published.json"))), progress=False
    )
    assert blended.drift > 0.5
    everything = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, placement="all-linear")), progress=False)
    assert everything.placed == 42 and everything.drift is None


def test_a_recipe_blends_the_domain_as_it_says(folder, tmp_path):
    """The saved blueprint is that of the domain, blended with its weight, by uncertainty and without a scale."""
    model, tokenizer = load_model(str(folder / "model"))
    rows = encode(read_examples(str(folder / "data.jsonl")), tokenizer, 32)
    batches = {"law": make_batches(rows[:8], 8, 0), "bio": make_batches(rows[8:16], 8, 0)}
    published = generate_blueprint(model, batches, progress=False)
    published.save(tmp_path / "published.json")
    options = {"domain": {"law": 1, "bio": 3}, "blend_weight": 0.25, "by_uncertainty": True, "rescale": False}
    more = {"drift_threshold": -1, "training": {"max_steps": 1}, "held_out": None}
    run_recipe(
        Recipe.from_yaml(recipe(folder, tmp_path, blueprint=str(tmp_path / "published.json"), **options, **more)),
        progress=False,
    )
    saved = json.loads((tmp_path / "out" / "blueprint_config.json").read_text())["blueprint"]
    blend = saved["provenance"]["blend"]
    assert (blend["weight"], blend["by_uncertainty"], blend["scale"]) == (0.25, True, 1.0)
    assert saved["provenance"]["domain_weights"] == {"law": 0.25, "bio": 0.75}
    probe = generate_blueprint(model, make_batches(rows[:8], 8, 0), progress=False)
    expected = published.for_domain({"law": 1, "bio": 3}).blend(probe, 0.25, by_uncertainty=True, rescale=False)
    norms = [entry["gradient_norm"] for entry in saved["layers"]]
    assert norms == pytest.approx([entry.gradient_norm for entry in expected], rel=1e-3)


def test_a_recipe_may_quantise_the_base(folder, tmp_path):
    """QLoRA: 4-bit weights, adapters where the blueprint says, also on a CPU."""
    pytest.importorskip("bitsandbytes")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, quantization=quantization)), progress=False)
    assert report.loss_after < report.loss_before and report.placed == 10


def test_adapters_may_be_initialized_along_the_gradient(folder, tmp_path, capsys):
    """The loss before is the base model's, that after is lower than from a random A, and the cost is charged to the run."""
    plain = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path)), progress=False)
    begun = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, start_examples=16)))
    assert begun.loss_before == plain.loss_before and begun.loss_after < plain.loss_after
    record = RunRecord.load(tmp_path / "out")
    own = {name: record.about[name]["tokens"]["value"] for name in ("probe", "start")}
    assert own["start"] > own["probe"] > 0
    assert "16/16" in capsys.readouterr().err, "no other number of examples"
    of_training = record.totals["tokens"].value - sum(own.values())
    assert 0 < of_training < record.totals["tokens"].value
    seconds = sum(record.about[name]["seconds"]["value"] for name in own)
    assert begun.measure_seconds == pytest.approx(seconds)


def test_a_recipe_may_stop_when_training_no_longer_pays(folder, tmp_path):
    """At a constant learning rate the rule ends the run on a plateau, and the record says why."""
    training = {"max_steps": 60, "learning_rate": 0.02, "lr_scheduler_type": "constant", "eval_steps": 2}
    changes = {"training": {**training, "eval_strategy": "steps"}, "stop": {"worth": 0.2, "resource": "tokens"}}
    report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, **changes)), progress=False)
    record = RunRecord.load(tmp_path / "out")
    assert report.steps < 60 and record.stopping["stopped"] and record.stopping["step"] == report.steps
    assert (record.metric, record.resource, record.points[0].step) == ("eval_loss", "tokens", 0)


def test_a_recipe_skips_prompts_and_frozen_layers(folder, tmp_path):
    """The adapter is PEFT's activated LoRA, trained alike with a cache; frozen layers no longer change."""
    training = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.02}
    settings = {"placement": "all-linear", "training": training}

    def trained(**changes):
        report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, **settings, **changes)), progress=False)
        return report, load_file(tmp_path / "out" / "adapter_model.safetensors")

    report, _ = trained(answer_only={"invocation": "9"})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["alora_invocation_tokens"]) == 1
    cached, _ = trained(answer_only={"invocation": "9", "cache": "1MiB"})
    assert cached.loss_after == pytest.approx(report.loss_after, rel=1e-3) and report.loss_after < report.loss_before
    assert cached.predicted_time < report.predicted_time < 1
    _, frozen = trained(freeze_from_below={"schedule": "1:3"}, cache_frozen_prefix={"budget": "1MiB"})
    _, longer = trained(freeze_from_below={"schedule": "2:3"}, cache_frozen_prefix={"budget": "1MiB"})
    whole, _ = trained()
    assert whole.predicted_time == 1 and whole.steps == 24
    assert any(frozen[name].ne(longer[name]).any() for name in frozen if ".layers.0." in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at-all"}, "'nowhere/at-all' cannot be loaded"),
        ({"train": "nothing.jsonl"}, "nothing.jsonl"),
        ({"columns": {"prompt": "frage"}}, "must have the columns prompt and completion"),
        ({"max_length": 3}, "None of 64 examples has a target within 3 tokens"),
        ({"output": __file__}, "cannot be written: Not a directory"),
        ({"answer_only": {}}, "answer_only: invocation: The tokenizer has no chat template"),
        ({"answer_only": {"invocation": "77"}}, r"Example 0 .* has no invocation tokens"),
        ({"probe_examples": 0}, "probe_examples: 0 needs a blueprint, or placement: rank_by: even"),
        ({"blueprint": "missing.json"}, "missing.json"),
        ({"training": {"eval_strategy": "sometimes"}}, "training: TrainingArguments refuses these settings"),
    ],
)
def test_a_run_that_cannot_begin_says_why_and_writes_nothing(folder, tmp_path, changes, message, monkeypatch):
    """Each mistake is named, and no half-made output is left."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BlueprintError, match=message):
        run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, **changes)), progress=False)
    assert not (tmp_path / "out").exists()


def test_only_completions_last_messages_and_texts_are_targets(folder):
    """Prompt tokens carry no label; a text is all target; the end-of-text token is learned."""
    _, tokenizer = load_model(str(folder / "model"))
    [row] = encode([{"prompt": "1 2", "completion": "3 4"}], tokenizer)
    assert row["labels"][:2] == [-100, -100] and row["labels"][2:] == row["input_ids"][2:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id and len(row["input_ids"]) == 5
    [row] = encode([{"text": "1 2 3"}], tokenizer)
    assert row["labels"] == row["input_ids"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    [row] = encode(
        [{"messages": [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]}], tokenizer
    )
    assert [label for label in row["labels"] if label != -100] == tokenizer("3", add_special_tokens=False)["input_ids"]


def test_padding_is_masked_and_no_target():
    """Shorter rows are padded on the right."""
    [batch] = make_batches([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [5]}], 2, 0)
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 6, 7], [5, -100, -100]]))
