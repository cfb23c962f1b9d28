"""BlueprintCallback logs the norms of the gradients that the optimizer receives."""

import json
import math
import os
import socket
from collections import defaultdict

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import distributed, multiprocessing
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_blueprint import Blueprint, BlueprintConfig, BlueprintError
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import tiny_gpt2, tiny_llama, toy_batches
from peft_blueprint.train import blueprint_callback as module
from peft_blueprint.train.blueprint_callback import BlueprintCallback, milestone_step, start_norms, trained_parameters
from tests.accounts import At


RATE = 0.05


def lora(layers=2, **settings):
    """A tiny Llama with LoRA, B drawn at random so that A has a gradient too."""
    settings = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **settings}
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(layers), LoraConfig(task_type="CAUSAL_LM", **settings))


def full(layers=2):
    """A tiny Llama, trained in full."""
    return tiny_llama(layers).train()


def make_trainer(model, folder, **arguments):
    """A Trainer that sees all eight examples in every step, with plain gradient descent."""
    rows = [{key: value[0] for key, value in batch.items()} for batch in toy_batches(batch_size=1)]
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return Trainer(model, TrainingArguments(str(folder), **settings | arguments), train_dataset=rows)


def train(model, folder, *others, arguments=None, **settings):
    """Train with the callback, and with others before it. Returns the trainer and its log's figures by step."""
    trainer = make_trainer(model, folder, **arguments or {})
    for other in others:
        trainer.add_callback(other)
    trainer.add_callback(BlueprintCallback(trainer, **settings))
    trainer.train()
    return trainer, figures(trainer)


def figures(trainer):
    """Step → name → figure, from the log history."""
    found = {}
    for record in trainer.state.log_history:
        ours = {k.removeprefix("gradient_norm/"): v for k, v in record.items() if k.startswith("gradient_norm/")}
        if ours:
            assert record["step"] not in found, "one record a step"
            found[record["step"]] = ours
    return found


def by_hand(model, steps, max_norm=1.0):
    """Step → submodule → norm, from an ordinary training loop over the same data."""
    model.train()
    (batch,) = toy_batches(batch_size=8)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    found = {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        squares = defaultdict(float)
        for name, parameter in parameters.items():
            owner = name.removeprefix("base_model.model.").split(".lora_")[0]
            owner = owner.removesuffix(".weight").removesuffix(".bias")
            squares[owner] += float(parameter.grad.double().square().sum())
        found[step] = {name: math.sqrt(square) for name, square in squares.items()}
        optimizer.step()
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [lora, full])
def test_figures_are_the_norms_of_what_the_optimizer_is_given(make, accumulation, tmp_path):
    """At every step, clipped, with one or two micro-batches, they equal those of an ordinary loop."""
    arguments = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    _, logged = train(make(), tmp_path, arguments={"max_steps": 4, **arguments}, every=1, milestones=[0.5])
    for step, expected in by_hand(make(), 4).items():
        total = logged[step].pop("total")
        assert logged[step] == pytest.approx(expected, rel=1e-4)
        assert total == pytest.approx(math.hypot(*expected.values()), rel=1e-4)
        assert total <= 1 + 1e-4, "clipped"
    saved = Blueprint.from_pretrained(tmp_path / "blueprint-50.json")
    assert {entry.examples for entry in saved} == {16}, "two steps of eight"


@pytest.mark.parametrize("unscaled_before", [True, False])
def test_fp16_gradients_are_unscaled(unscaled_before, tmp_path, monkeypatch):
    """Also without clipping, whether or not the Trainer unscaled them; the optimizer step does not unscale twice."""
    trainer = make_trainer(lora(), tmp_path, max_steps=3, max_grad_norm=0.0)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def unscale(optimizer=None):
        scaler.unscale_(trainer.optimizer.optimizer)

    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscale)
    monkeypatch.setattr(trainer, "_get_grad_norm", lambda *args, **kwargs: None, raising=False)
    if unscaled_before:
        monkeypatch.setattr(trainer, "_get_grad_norm", lambda *args, **kwargs: unscale(), raising=False)
    trainer.add_callback(BlueprintCallback(trainer, every=1, milestones=()))
    if unscaled_before and not hasattr(Trainer, "_get_grad_norm"):
        pytest.skip("this transformers never does")
    trainer.train()
    for step, expected in by_hand(lora(), 3, max_norm=None).items():
        assert {k: v for k, v in figures(trainer)[step].items() if k != "total"} == pytest.approx(expected, rel=1e-4)


def test_every_nth_step_is_measured_and_no_other(tmp_path, monkeypatch):
    """Multiples of n and the steps of milestones; nothing is computed on others."""
    calls = []
    monkeypatch.setattr(module, "start_norms", lambda gradients: calls.append(1) or start_norms(gradients))
    _, logged = train(lora(), tmp_path, every=4, milestones=())
    assert list(logged) == [4, 8] and len(calls) == 2
    _, logged = train(lora(), tmp_path, every=4, milestones=(0.45, 1))
    assert list(logged) == [4, 5, 8, 10] and len(calls) == 6
    assert not list(tmp_path.glob("blueprint-50.json")) and list(tmp_path.glob("blueprint-45.json"))


def test_the_trainers_own_log_is_as_without_it(tmp_path):
    """The same losses at the same steps: logging from a callback takes no record of the Trainer's away."""

    def losses(trainer):
        return {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}

    plain = make_trainer(lora(), tmp_path, logging_steps=2)
    plain.train()
    trainer, logged = train(lora(), tmp_path, arguments={"logging_steps": 2}, every=1)
    assert losses(trainer) == pytest.approx(losses(plain)) and list(losses(plain)) == [2, 4, 6, 8, 10]
    assert len(logged) == 10 and all("epoch" in record for record in trainer.state.log_history)


def test_milestones_are_blueprints_of_the_steps_since_the_one_before(tmp_path):
    """Three files that load, with their share of the training, and means of the figures that were logged."""
    model = lora()
    trainer, logged = train(model, tmp_path / "run", every=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("*")) == [f"blueprint-{p}.json" for p in (100, 50, 80)]
    known = {entry.name: entry for entry in find_submodules(tiny_llama(2))}
    for share, steps in ((0.5, (2, 4, 5)), (0.8, (6, 8)), (1.0, (10,))):
        saved = Blueprint.from_pretrained(tmp_path / "run" / f"blueprint-{share * 100:.0f}.json")
        assert saved.training_checkpoint == share and list(saved.names) == list(known)
        for entry in saved:
            expected = known[entry.name]
            for field in ("kind", "depth", "group", "shape"):
                assert getattr(entry, field) == getattr(expected, field)
            mean = sum(logged[step][entry.name] for step in steps) / len(steps)
            assert entry.gradient_norm == pytest.approx(mean) and entry.examples == 8 * len(steps)
            assert entry.extra == {"gradient_of": "adapter"}
        said = saved.provenance
        assert (said["first_step"], said["last_step"], said["steps_measured"]) == (steps[0], steps[-1], len(steps))
        assert said["method"] == "training" and said["gradients_of"] == ["adapter"] and said["max_steps"] == 10
        assert "clipped to 1" in said["statistic"] and said["outside_submodules"] == {} and said["versions"]["torch"]


def test_a_placement_by_blueprint_is_what_is_reported(blueprint, tmp_path):
    """A BlueprintConfig's targets and no others, and the file fits the unwrapped model."""
    model = get_peft_model(tiny_llama(12), BlueprintConfig(blueprint=blueprint, num_modules=5, r=2))
    _, logged = train(model, tmp_path, arguments={"max_steps": 2}, every=1, milestones=[1])
    selection = set(model.peft_config["default"].selection)
    assert len(selection) == 5 and set(logged[1]) == {*selection, "total"}
    assert set(Blueprint.from_pretrained(tmp_path / "blueprint-100.json").names) == selection
    assert logged[1]["total"] > 0, "B has a gradient from the first step"


def test_by_kind_squares_add(tmp_path):
    """detail='kind': the norm of all q_proj together, and so on; the file has submodules all the same."""
    _, one = train(full(), tmp_path, arguments={"max_steps": 1}, every=1)
    _, other = train(full(), tmp_path, arguments={"max_steps": 1}, every=1, detail="kind")
    assert set(other[1]) == {*(entry.kind for entry in find_submodules(tiny_llama(2)))} | {
        *("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm", "total")
    }
    q_proj = [one[1][f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)]
    assert other[1]["q_proj"] == pytest.approx(math.hypot(*q_proj))
    assert other[1]["total"] == pytest.approx(one[1]["total"])
    assert len(Blueprint.from_pretrained(tmp_path / "blueprint-100.json")) == 14


def test_other_trained_modules_are_logged_and_stand_in_the_provenance(tmp_path):
    """Norms and embeddings are logged, and stand in the file's provenance rather than among its entries."""
    _, logged = train(full(), tmp_path, arguments={"max_steps": 1}, every=1, milestones=[1])
    saved = Blueprint.from_pretrained(tmp_path / "blueprint-100.json")
    outside = saved.provenance["outside_submodules"]
    assert set(outside) >= {"model.embed_tokens", "model.norm", "model.layers.1.input_layernorm", "lm_head"}
    assert {**outside, **{e.name: e.gradient_norm for e in saved}, "total": logged[1]["total"]} == logged[1]


def names_of(model):
    return [f"{name} {part}" for name, part, _ in trained_parameters(model)]


def test_names_are_those_of_the_unwrapped_model():
    """LoRA's matrices, DoRA's magnitude, copies, a whole block's copy, biases, other methods: nothing is left out."""
    config = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.0.mlp.down_proj", "lm_head"]}
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    copies = ["model.layers.0.mlp.down_proj weight", "lm_head weight"]
    assert names_of(lora(1, **config)) == [f"{q} adapter"] * 2 + [f"{up} adapter"] * 2 + copies
    assert names_of(lora(1, use_dora=True, **config)) == [f"{q} adapter"] * 3 + [f"{up} adapter"] * 3 + copies
    block = lora(1, target_modules=["up_proj"], modules_to_save=["self_attn"])
    parts = [f"model.layers.0.self_attn.{p}_proj weight" for p in "qkvo"]
    assert names_of(block) == [*parts, f"{up} adapter", f"{up} adapter"]
    by_parameter = lora(1, target_modules=[], target_parameters=["mlp.up_proj.weight"])
    assert names_of(by_parameter) == [f"{up} adapter"] * 2
    assert names_of(lora(1, target_modules=["q_proj"], trainable_token_indices=[1])) == [
        "model.embed_tokens adapter",
        f"{q} adapter",
        f"{q} adapter",
    ]
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    assert names_of(get_peft_model(tiny_llama(1), ia3)) == [f"{q} adapter"]
    gpt2 = LoraConfig(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    attention = "transformer.h.0.attn.c_attn"
    assert set(names_of(get_peft_model(tiny_gpt2(1), gpt2))) == {f"{attention} adapter", f"{attention} weight"}
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert names_of(get_peft_model(tiny_llama(1), prompt)) == ["prompt_encoder.default.embedding weight"]
    assert len(names_of(full())) == len(list(full().parameters()))


def test_a_module_unfrozen_during_training_is_reported_from_then_on(tmp_path):
    """Its mean is over the steps it was measured in."""
    model = lora(1, target_modules=["q_proj"])
    norm = model.get_base_model().model.norm.weight
    head = At(2, end=lambda state, control: norm.requires_grad_())
    _, logged = train(model, tmp_path, head, arguments={"max_steps": 4}, every=1, milestones=[1])
    assert "model.norm" not in logged[2] and logged[3]["model.norm"] > 0
    said = Blueprint.from_pretrained(tmp_path / "blueprint-100.json").provenance["outside_submodules"]
    assert said == {"model.norm": pytest.approx((logged[3]["model.norm"] + logged[4]["model.norm"]) / 2)}


def test_a_step_without_finite_norms_is_in_no_mean(tmp_path, caplog):
    """It is logged and counted; if there is no other, there is no file, a warning, and training goes on."""

    def spoil(model):
        next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)

    spoiled = [At(2, before=spoil), At(3, before=spoil)]
    arguments = {"max_steps": 3, "learning_rate": 0.0}
    trainer, logged = train(lora(), tmp_path, *spoiled, arguments=arguments, every=1, milestones=[0.6, 1])
    assert logged[2]["total"] == math.inf and trainer.state.global_step == 3
    saved = Blueprint.from_pretrained(tmp_path / "blueprint-60.json")
    assert saved.provenance["steps_measured"] == 1 and saved.provenance["steps_not_finite"] == 1
    assert all(entry.gradient_norm == pytest.approx(logged[1][entry.name]) for entry in saved)
    assert not (tmp_path / "blueprint-100.json").exists()
    assert "No blueprint at 100 % of the training: no step since step 3 had finite norms" in caplog.text


def test_an_early_end_writes_nothing_false(tmp_path):
    """Stopped at step 6 of 10, only the first half has a file."""
    stop = At(6, end=lambda state, control: setattr(control, "should_training_stop", True))
    trainer, _ = train(lora(), tmp_path, stop, every=1)
    assert trainer.state.global_step == 6
    assert [path.name for path in tmp_path.glob("*.json")] == ["blueprint-50.json"]


def test_one_process_writes(tmp_path):
    """Not the others, which log as the Trainer itself does there."""

    class Second(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    _, logged = train(lora(), tmp_path, Second(), every=5)
    assert list(logged) == [5, 8, 10] and not list(tmp_path.glob("*.json"))


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT 0.20, of a model without a name
def test_resumed_training_goes_on_where_it_was(tmp_path):
    """Milestones passed before are left alone; the next one's mean is over the steps since the resumption."""
    stop = At(6, end=lambda state, control: setattr(control, "should_training_stop", True))
    saving = {"save_strategy": "steps", "save_steps": 6}
    train(lora(), tmp_path, stop, arguments=saving, every=1)
    first = (tmp_path / "blueprint-50.json").read_text()
    (tmp_path / "blueprint-50.json").write_text("as it was")
    trainer = make_trainer(lora(), tmp_path, **saving)
    trainer.add_callback(BlueprintCallback(trainer, every=1))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert list(figures(trainer)) == list(range(1, 11)), "the log history goes on"
    assert (tmp_path / "blueprint-50.json").read_text() == "as it was"
    said = Blueprint.from_pretrained(tmp_path / "blueprint-80.json").provenance
    assert (said["first_step"], said["last_step"]) == (7, 8)
    assert json.loads(first)["provenance"]["last_step"] == 5
    assert (tmp_path / "blueprint-100.json").exists()


def test_bad_values_say_what_to_give(tmp_path):
    """Before training, with the value and what would do."""
    trainer = make_trainer(lora(), tmp_path)
    with pytest.raises(BlueprintError, match="every must be a positive integer, got 0"):
        BlueprintCallback(trainer, every=0)
    with pytest.raises(BlueprintError, match="every must be a positive integer, got 0.5"):
        BlueprintCallback(trainer, every=0.5)
    for share in (0, 1.5, math.nan):
        with pytest.raises(BlueprintError, match=r"milestones must be in \(0, 1\], got"):
            BlueprintCallback(trainer, milestones=[share])
    with pytest.raises(BlueprintError, match="detail must be one of submodule, kind, got 'layer'"):
        BlueprintCallback(trainer, detail="layer")
    with pytest.raises(BlueprintError, match="must be a Trainer, got LlamaForCausalLM.*add_callback"):
        BlueprintCallback(tiny_llama(1))
    (tmp_path / "file").write_text("")
    trainer.add_callback(BlueprintCallback(trainer, output_dir=tmp_path / "file" / "sub"))
    with pytest.raises(BlueprintError, match="cannot be written.*Choose another folder"):
        trainer.train()


def test_without_gradients_to_read_the_error_says_so(tmp_path):
    """A frozen model; only a head; gradients that are hidden."""
    frozen = tiny_llama(1).requires_grad_(False)
    with pytest.raises(BlueprintError, match="This LlamaForCausalLM has no trainable parameters.*get_peft_model"):
        BlueprintCallback(make_trainer(frozen, tmp_path))
    frozen.lm_head.requires_grad_()
    with pytest.raises(BlueprintError, match=r"only 'lm_head' is trained.*milestones=\(\)"):
        BlueprintCallback(make_trainer(frozen, tmp_path))
    _, logged = train(frozen, tmp_path, arguments={"max_steps": 1}, every=1, milestones=())
    assert set(logged[1]) == {"lm_head", "total"}
    take_away = At(1, before=lambda model: model.zero_grad())
    with pytest.raises(BlueprintError, match="None of the 28 trained parameters has a gradient"):
        train(lora(), tmp_path, take_away, every=1)


def test_shares_become_steps():
    """The first step at which the share is done, however a product of floats rounds."""
    assert [milestone_step(share, 10) for share in (0.01, 0.5, 0.75, 0.8, 1)] == [1, 5, 8, 8, 10]
    assert milestone_step(0.07, 100) == 7 and milestone_step(1.0, 3) == 3


def test_norms_of_many_dtypes_at_once():
    """In float32 whatever the gradients are: a norm of half-precision numbers need not be one."""
    gradients = [torch.full((300, 300), 250.0, dtype=torch.float16), torch.ones(5, dtype=torch.bfloat16)]
    order, norms = start_norms(gradients)
    assert order == [0, 1] and torch.cat(norms).tolist() == pytest.approx([75000.0, math.sqrt(5)], rel=1e-3)


def sharded_norms(rank, port, file):
    """In one of two processes: norms of gradients that are cut, whole, and not distributed at all."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    a, b = torch.arange(12.0).view(4, 3), torch.arange(7.0)
    cut, whole = distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Replicate()])
    order, norms = start_norms([cut, b, whole])
    torch.save((order, norms), f"{file}.{rank}")
    distributed.destroy_process_group()


def test_sharded_gradients_have_the_norm_of_the_whole(tmp_path):
    """On every process, as FSDP2 cuts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(sharded_norms, (port, str(tmp_path / "norms")), nprocs=2)
    whole = [float(torch.arange(12.0).norm()), float(torch.arange(7.0).norm()), float(torch.arange(7.0).norm())]
    for rank in (0, 1):
        order, norms = torch.load(tmp_path / f"norms.{rank}")
        assert order == [0, 2, 1] and torch.cat(norms).tolist() == pytest.approx(whole)
