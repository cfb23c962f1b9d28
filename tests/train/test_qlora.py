"""QLoRA by a recipe: planned within the device's memory, checkpointing that stops early, and TRL."""

import importlib.util
import json
import logging
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import Trainer, TrainingArguments

from peft_blueprint import BlueprintError, generate_blueprint
from peft_blueprint.measure import dtype_of, load_model, quantization_of
from peft_blueprint.testing import randomize_adapters, save_tiny_model, tiny_llama, toy_batches
from peft_blueprint.train.memory import CheckpointAbove, checkpoint_above, release_inputs
from peft_blueprint.train.recipe import Recipe
from peft_blueprint.train.run import available_memory, run_recipe
from tests import ROOT


RECIPES = ROOT / "recipes"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, data, and a blueprint of it."""
    folder = tmp_path_factory.mktemp("qlora")
    save_tiny_model(folder / "model", layers=4)
    rows = [{"prompt": f"{i % 7} {i % 5} 9", "completion": f" {i % 7} {i % 5}"} for i in range(32)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, _ = load_model(str(folder / "model"))
    generate_blueprint(model, toy_batches(8), progress=False).save(folder / "blueprint.json")
    return folder


def recipe(folder, tmp_path, **changes):
    """recipes/qlora.yaml for the tiny model, with changes; None takes a key out."""
    settings = YAML(typ="safe").load(RECIPES / "qlora.yaml")
    settings |= {
        "model": str(folder / "model"),
        "output": str(tmp_path / "out"),
        "max_length": 32,
        "probe_examples": 8,
    }
    settings |= {"train": str(folder / "data.jsonl"), "held_out": str(folder / "data.jsonl")}
    settings["training"]["max_steps"] = 3
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML 1.2
    return path


def loss_and_gradients(model, batch):
    """A step's loss, and the gradient of everything that is trained."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapted_above(layer=2):
    """A tiny model with adapters from a layer on, in training, asked for input gradients twice over."""
    targets = [f"model.layers.{i}.{name}" for i in range(layer, 4) for name in ("self_attn.q_proj", "mlp.down_proj")]
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(4), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return randomize_adapters(model).train()


def watched(model):
    """Whether each pass's output of the first block requires a gradient."""
    seen = []
    block = model.get_base_model().model.layers[0]
    block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    return seen


def test_checkpointing_stops_below_the_lowest_adapter_and_changes_no_gradient():
    """The first block's output takes no gradient, and loss and gradients are those without checkpointing."""
    [batch] = toy_batches(4)
    loss, gradients = loss_and_gradients(adapted_above(), batch)
    model = adapted_above()
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # only the last of such hooks can be undone by transformers itself
    assert checkpoint_above(model) >= 2  # and a third of transformers 5
    seen = watched(model)
    again, checkpointed = loss_and_gradients(model, batch)
    assert seen == [False] and again == pytest.approx(loss)
    assert gradients.keys() == checkpointed.keys() and len(gradients) == 8
    assert all(torch.allclose(gradients[name], checkpointed[name], atol=1e-6) for name in gradients)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    assert release_inputs(model) == 0


def test_checkpointing_of_activated_lora_keeps_its_inputs():
    """PEFT's offsets reach the second pass of every block: equal losses and gradients, twice."""
    [batch] = toy_batches(2, batch_size=2, padding="none", prompt=5)
    batch["input_ids"][:, 3:5] = torch.tensor([7, 8])
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
    model = randomize_adapters(get_peft_model(tiny_llama(), config)).train()
    loss, gradients = loss_and_gradients(model, batch)
    assert checkpoint_above(model) == 0
    for _ in range(2):
        again, checkpointed = loss_and_gradients(model, batch)
        assert again == pytest.approx(loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(checkpointed[name], gradient)


def test_a_trainer_that_checkpoints_stops_below_the_lowest_adapter(tmp_path):
    """Without the callback the Trainer sends every backward pass to the bottom; with it the losses are the same."""
    losses = {}
    for callbacks in ([], [CheckpointAbove()]):
        model = adapted_above()
        model.enable_input_require_grads()  # which transformers 5 does by itself
        seen = watched(model)
        settings = {"max_steps": 2, "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
        settings |= {"logging_steps": 1, "disable_tqdm": True, "output_dir": str(tmp_path), "learning_rate": 1e-2}
        rows = [{key: value[i] for key, value in batch.items()} for batch in toy_batches(8) for i in range(4)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing.*` is deprecated", FutureWarning)
            arguments = TrainingArguments(
                gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, **settings
            )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        assert any(seen) is not bool(callbacks)
        losses[bool(callbacks)] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_reentrant_checkpointing_is_refused():
    """It would leave adapters without gradients."""
    with pytest.raises(BlueprintError, match="use_reentrant=True"):
        checkpoint_above(adapted_above(), use_reentrant=True)


def test_the_qlora_recipe_runs_as_it_is_checked_in(folder, tmp_path, caplog):
    """Four bits, doubly quantized, checkpointed, within its budget; the log names features that a CPU lacks; plain PEFT loads it."""
    pytest.importorskip("bitsandbytes")
    with caplog.at_level(logging.WARNING, logger="peft_blueprint"):
        report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path)), progress=False)
    assert report.steps == 3 and 0 < report.placed < 28
    assert report.predicted_time <= 0.7 and 0 < report.gain_retained < 1
    assert report.predicted_bytes < available_memory()
    assert report.learning_rate == pytest.approx(1e-3 * report.learning_rate_scale)
    if not torch.cuda.is_available():
        assert [
            r.getMessage() for r in caplog.records if "paged_adamw_8bit is not available on a CPU" in r.getMessage()
        ]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and len(saved["target_modules"]) == report.placed
    assert saved["r"] > 16 and saved["lora_alpha"] == 2 * saved["r"]  # the parameters of rank 16 everywhere
    depths = {int(name.split(".")[2]) for name in saved["target_modules"]}
    assert min(depths) == report.lowest
    assert json.loads((tmp_path / "out" / "report.json").read_text())["lowest"] == report.lowest
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == report.placed


def test_memory_limits_the_placement(folder, tmp_path):
    """A limit between the smallest placement and all-linear LoRA is met."""
    settings = {"quantization": None, "training": {"max_steps": 1, "per_device_train_batch_size": 8}}
    settings |= {"base_learning_rate": None, "held_out": None}
    everything = run_recipe(
        Recipe.from_yaml(recipe(folder, tmp_path, placement="all-linear", **settings)), progress=False
    )
    limit = int(everything.predicted_bytes * 0.8)
    few = run_recipe(
        Recipe.from_yaml(recipe(folder, tmp_path, placement={"memory": limit}, **settings)), progress=False
    )
    assert everything.predicted_time == everything.gain_retained == 1 and everything.placed == 28
    assert few.predicted_bytes <= limit and 0 < few.placed < 28
    sidecar = json.loads((tmp_path / "out" / "blueprint_config.json").read_text())
    assert sidecar["budget"] == {"memory": limit} and sidecar["workload"]["batch_size"] == 8
    assert sidecar["workload"]["quantization"] is None and sidecar["workload"]["length"] < 32


def test_blocks_are_unfrozen_in_a_four_bit_model_and_share_the_base(folder, tmp_path):
    """Planned before loading, left out of quantisation, trained, released; the probe only checks."""
    pytest.importorskip("bitsandbytes")
    report = run_recipe(
        Recipe.from_yaml(
            recipe(
                folder,
                tmp_path,
                blueprint=str(folder / "blueprint.json"),
                placement={"mode": "lora+unfreeze", "num_modules": 4},
                base_learning_rate=None,
                share_base=True,
            )
        ),
        progress=False,
    )
    assert report.unfrozen >= 1 and report.placed == 4 and report.drift is not None
    assert report.loss_after < report.loss_before
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(saved["modules_to_save"]) == report.unfrozen


def test_without_adams_gain_the_rate_follows_from_the_ranks(folder, tmp_path):
    """An even placement has no predicted gain: the summed ranks name the rate."""
    pytest.importorskip("bitsandbytes")
    placement = {"rank_by": "even", "num_modules": 7, "ranks": "uniform", "memory": None}
    changes = {"held_out": None, "placement": placement, "probe_examples": 0, "start_examples": 0}
    report = run_recipe(Recipe.from_yaml(recipe(folder, tmp_path, **changes)), progress=False)
    assert report.learning_rate == pytest.approx(2e-3) and report.learning_rate_scale == pytest.approx(2)
    assert report.learning_rate_rule == "ranks"


def test_a_placement_may_do_without_any_measurement(folder, tmp_path):
    """rank_by: even with no probe and no blueprint."""
    settings = {"placement": {"rank_by": "even", "num_modules": 7}, "probe_examples": 0, "base_learning_rate": None}
    report = run_recipe(
        Recipe.from_yaml(recipe(folder, tmp_path, quantization=None, held_out=None, **settings)), progress=False
    )
    assert report.placed == 7 and report.learning_rate_scale is None


def test_computations_of_four_bit_weights_have_the_bases_dtype(folder, tmp_path):
    """bfloat16 is slow on CPUs: there float32 is taken, unless the recipe says otherwise."""
    on_cpu = not torch.cuda.is_available()
    assert (dtype_of("auto", True) is torch.float32) is on_cpu and dtype_of("auto", False) is None
    assert quantization_of(NF4, torch.float16)["bnb_4bit_compute_dtype"] is torch.float16
    given = quantization_of({**NF4, "bnb_4bit_compute_dtype": "bfloat16"}, torch.float32)
    assert given["bnb_4bit_compute_dtype"] == "bfloat16"


def test_trl_trains_the_same_recipe(folder, tmp_path):
    """SFTTrainer keeps the placement and stops below it; plain PEFT loads the saved adapter."""
    pytest.importorskip("bitsandbytes")
    spec = importlib.util.spec_from_file_location("qlora_trl", RECIPES / "qlora_trl.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    seen = []

    class Watching(script.CheckpointAbove):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            super().on_train_begin(args, state, control, model=model, **kwargs)
            seen.append(watched(model))

    script.CheckpointAbove = Watching
    placement = {"rank_by": "last", "coverage": "none", "num_modules": 7, "memory": None}
    settings = {"blueprint": str(folder / "blueprint.json"), "probe_examples": 0, "placement": placement}
    report = script.main([str(recipe(folder, tmp_path, **settings))])
    assert report["steps"] == 3 and len(report["losses"]) == 3 and report["lowest"] == 3
    assert report["measure_seconds"] > 0, "for beginning along the gradient"
    [requires_grad] = seen
    assert requires_grad and not any(requires_grad)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    depths = {int(name.split(".")[2]) for name in saved["target_modules"]}
    assert saved["peft_type"] == "LORA" and min(depths) == report["lowest"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == len(saved["target_modules"])
