"""BlueprintCallback measures validation data, and logs the norms of the gradients that the optimizer receives."""

import math
import os
import socket
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import distributed, multiprocessing
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_blueprint import Blueprint, BlueprintConfig, BlueprintError, LedgerCallback, generate_blueprint
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.runs import RunLog
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


def rows(examples=8, seed=0):
    """Toy examples, one mapping each."""
    return [
        {key: value[0] for key, value in batch.items()} for batch in toy_batches(examples, batch_size=1, seed=seed)
    ]


HELD_OUT = rows(12, seed=1)


def make_trainer(model, folder, **arguments):
    """A Trainer that sees all eight examples in every step, with plain gradient descent."""
    held_out = arguments.pop("eval_dataset", HELD_OUT)
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
    arguments = TrainingArguments(str(folder), **settings | arguments)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=held_out)


def train(model, folder, *others, arguments=None, **settings):
    """Train with the callback, and with others before it. Returns the trainer and its log's figures by step."""
    trainer = make_trainer(model, folder, **arguments or {})
    for other in others:
        trainer.add_callback(other)
    trainer.add_callback(BlueprintCallback(trainer, **settings))
    trainer.train()
    return trainer, figures(trainer)


def figures(trainer, prefix="gradient_norm/"):
    """Step → name → figure, from the log history."""
    found = {}
    for record in trainer.state.log_history:
        ours = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
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
def test_figures_are_the_norms_of_the_optimizers_gradients(make, accumulation, tmp_path):
    """At every step, clipped, with one or two micro-batches, they equal those of an ordinary loop."""
    arguments = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    _, logged = train(make(), tmp_path, arguments={"max_steps": 4, **arguments}, every=1, milestones=())
    for step, expected in by_hand(make(), 4).items():
        total = logged[step].pop("total")
        assert logged[step] == pytest.approx(expected, rel=1e-4)
        assert total == pytest.approx(math.hypot(*expected.values()), rel=1e-4)
        assert total <= 1 + 1e-4, "clipped"


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


def test_every_nth_step_is_logged_and_no_other(tmp_path, monkeypatch):
    """Other steps, and runs without `every`, compute no norm."""
    calls = []
    monkeypatch.setattr(module, "start_norms", lambda gradients: calls.append(1) or start_norms(gradients))
    _, logged = train(lora(), tmp_path, every=4, milestones=())
    assert list(logged) == [4, 8] and len(calls) == 2
    _, logged = train(lora(), tmp_path, milestones=[0.45], max_examples=2)
    assert not logged and len(calls) == 2 and [p.name for p in tmp_path.glob("*.json")] == ["blueprint-45.json"]


def test_the_training_is_as_without_it(tmp_path):
    """The same losses at the same steps under dropout, the same evaluations, and the same weights at the end."""

    def trainer_of(callback):
        model = lora(lora_dropout=0.3)
        settings = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "per_device_train_batch_size": 3}
        trainer = make_trainer(model, tmp_path, **settings)
        if callback:
            trainer.add_callback(BlueprintCallback(trainer, every=1, max_examples=5))
        trainer.train()
        return trainer

    def log_of(trainer):
        names = ("loss", "eval_loss", "grad_norm")
        found = [{k: v for k, v in r.items() if k in ("step", *names)} for r in trainer.state.log_history]
        return [record for record in found if len(record) > 1]

    plain, measured = trainer_of(False), trainer_of(True)
    for mine, theirs in zip(log_of(measured), log_of(plain), strict=True):
        assert mine == pytest.approx(theirs)
    assert [record["step"] for record in log_of(plain)] == [2, 4, 4, 6, 8, 8, 10, 10]
    for mine, theirs in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Keep(TrainerCallback):
    """Keeps the weights at some steps."""

    def __init__(self, *steps):
        self.steps, self.states = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.states[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}


def test_milestones_agree_with_generate_blueprint(tmp_path):
    """Three files with every statistic, equal to a measurement of the kept weights on the validation data."""
    kept, model = Keep(5, 8, 10), full()
    trainer, _ = train(model, tmp_path / "run", kept, max_examples=None, model_id="org/m", bootstrap=50)
    assert sorted(p.name for p in (tmp_path / "run").glob("*")) == [f"blueprint-{p}.json" for p in (100, 50, 80)]
    collated = [trainer.data_collator(HELD_OUT[i : i + 8]) for i in (0, 8)]
    for share, step in ((0.5, 5), (0.8, 8), (1.0, 10)):
        saved = Blueprint.from_pretrained(tmp_path / "run" / f"blueprint-{share * 100:.0f}.json")
        model.load_state_dict(kept.states[step])
        expected = generate_blueprint(
            model, collated, model_id="org/m", bootstrap=50, max_examples=None, progress=False
        )
        assert saved.training_checkpoint == share and saved.names == expected.names and saved.model_id == "org/m"
        for entry, other in zip(saved, expected, strict=True):
            assert entry.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5) and entry.examples == 12
            assert entry.norm_interval == pytest.approx(other.norm_interval, rel=1e-4)
            assert (entry.alpha, entry.gamma, entry.k_star) == pytest.approx((other.alpha, other.gamma, other.k_star))
        assert saved.concentration["tail"]["gini"]["value"] == pytest.approx(
            expected.concentration["tail"]["gini"]["value"]
        )
        said = saved.provenance
        assert (said["step"], said["max_steps"], said["checkpoint_of"]) == (step, 10, "this training run")
    shown = figures(trainer, "blueprint/")
    assert list(shown) == [5, 8, 10]
    assert shown[10]["gini"] == saved.concentration["tail"]["gini"]["value"] and shown[10]["k_star"] > 0


def test_evaluations_are_measured_once_a_step_on_the_same_examples(tmp_path, monkeypatch):
    """Between the milestones too, on the batches of the first time; several evaluated sets are the domains."""
    calls = []

    def generate(model, domains, *args, **kwargs):
        calls.append(domains)
        return generate_blueprint(model, domains, *args, **kwargs)

    monkeypatch.setattr(module, "generate_blueprint", generate)
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    sets = {"math": HELD_OUT, "code": rows(3, seed=2)}
    trainer, _ = train(full(), tmp_path, arguments={**evaluating, "eval_dataset": sets}, max_examples=6)
    assert list(figures(trainer, "blueprint/")) == [3, 5, 6, 8, 9, 10] and len(calls) == 6
    assert all(domains is calls[0] for domains in calls)
    assert {name: sum(len(b["labels"]) for b in batches) for name, batches in calls[0].items()} == {
        "math": 6,
        "code": 3,
    }
    saved = Blueprint.from_pretrained(tmp_path / "blueprint-90.json")
    assert set(saved.submodules[0].domain_tags) == {"math", "code"} and saved.submodules[0].examples == 6
    trainer, _ = train(full(), tmp_path / "off", arguments=evaluating, milestones=[0.3], at_evaluations=False)
    assert [p.name for p in (tmp_path / "off").glob("*.json")] == ["blueprint-30.json"]


def test_measured_examples_are_a_random_sample_in_batches_that_fit_training(tmp_path):
    """Drawn over the whole set, by the seed; a stream gives its first; an evaluation's large batches are not used."""

    def measured(dataset, **settings):
        trainer = make_trainer(full(), tmp_path, per_device_train_batch_size=2, eval_dataset=dataset)
        callback = BlueprintCallback(trainer, max_examples=5, **settings)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        batches = callback._domains[""]
        assert [len(batch["labels"]) for batch in batches] == [2, 2, 1] and trainer.args.eval_batch_size == 8
        return [ids.tolist() for batch in batches for ids in batch["input_ids"]]

    many = [{"input_ids": torch.tensor([i, 1, 2]), "labels": torch.tensor([i, 1, 2])} for i in range(90)]
    ids = [row[0] for row in measured(many)]
    assert max(ids) > 20 and ids == [row[0] for row in measured(many)] == sorted(ids)
    assert ids != [row[0] for row in measured(many, seed=1)]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(many)

    assert [row[0] for row in measured(Stream())] == [0, 1, 2, 3, 4]


def test_a_halted_run_keeps_its_last_weights_and_renames_its_checkpoints(tmp_path):
    """Files have the planned share; `checkpoints` has the shares that were reached."""
    stop = At(6, end=lambda state, control: setattr(control, "should_training_stop", True))
    trainer = make_trainer(full(), tmp_path, eval_strategy="steps", eval_steps=1)
    callback = BlueprintCallback(trainer, max_examples=4)
    trainer.add_callback(stop)
    trainer.add_callback(callback)
    trainer.train()
    assert Blueprint.from_pretrained(tmp_path / "blueprint-60.json").training_checkpoint == 0.6
    found = callback.checkpoints()
    assert [(one.training_checkpoint, one.provenance["step"]) for one in found] == [(0.5, 3), (0.8333, 5), (1.0, 6)]
    trainer, _ = train(full(), tmp_path / "plain", stop, max_examples=4)
    assert sorted(p.name for p in (tmp_path / "plain").glob("*.json")) == ["blueprint-50.json", "blueprint-60.json"]
    trainer, _ = train(full(), tmp_path / "open", stop, max_examples=4, milestones=[0.5])
    assert [p.name for p in (tmp_path / "open").glob("*.json")] == ["blueprint-50.json"]


def test_measuring_counts_as_evaluating_in_a_ledger(tmp_path):
    """Whichever callback was added first."""
    for order in (1, -1):
        trainer = make_trainer(full(), tmp_path, eval_strategy="steps", eval_steps=5, max_steps=5)
        measuring, keeping = BlueprintCallback(trainer, max_examples=4), LedgerCallback(trainer)
        for callback in (measuring, keeping)[::order]:
            trainer.add_callback(callback)
        seconds = []
        evaluating = RunLog.evaluating

        @contextmanager
        def timed(self, evaluating=evaluating, seconds=seconds):
            before = self.seconds["evaluating"]
            with evaluating(self):
                yield
            seconds.append(self.seconds["evaluating"] - before)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunLog, "evaluating", timed)
            trainer.train()
        spent = keeping.log.seconds["evaluating"]
        assert len(seconds) == 3 and sum(seconds) < spent < keeping.log.ledger.seconds


def test_a_placement_by_blueprint_is_reported(blueprint, tmp_path):
    """The log has a BlueprintConfig's targets and no others; the file has all submodules of the unwrapped model."""
    model = get_peft_model(tiny_llama(12), BlueprintConfig(blueprint=blueprint, num_modules=5, r=2))
    _, logged = train(model, tmp_path, arguments={"max_steps": 2}, every=1, milestones=[1], max_examples=4)
    selection = set(model.peft_config["default"].selection)
    assert len(selection) == 5 and set(logged[1]) == {*selection, "total"}
    assert Blueprint.from_pretrained(tmp_path / "blueprint-100.json").names == blueprint.names
    assert logged[1]["total"] > 0, "B has a gradient from the first step"


def test_by_kind_squares_add(tmp_path):
    """detail='kind': the norm of all q_proj together, and so on, and of other trained modules."""
    _, one = train(full(), tmp_path, arguments={"max_steps": 1}, every=1, milestones=())
    _, other = train(full(), tmp_path, arguments={"max_steps": 1}, every=1, detail="kind", milestones=())
    assert set(other[1]) == {*(entry.kind for entry in find_submodules(tiny_llama(2)))} | {
        *("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm", "total")
    }
    q_proj = [one[1][f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)]
    assert other[1]["q_proj"] == pytest.approx(math.hypot(*q_proj))
    assert other[1]["total"] == pytest.approx(one[1]["total"])


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
    """Its norm is logged from the next step."""
    model = lora(1, target_modules=["q_proj"])
    norm = model.get_base_model().model.norm.weight
    head = At(2, end=lambda state, control: norm.requires_grad_())
    _, logged = train(model, tmp_path, head, arguments={"max_steps": 4}, every=1, milestones=())
    assert "model.norm" not in logged[2] and logged[3]["model.norm"] > 0


def test_a_measurement_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    """Training goes on, and the other milestones are measured."""
    steps = []

    def generate(model, *args, **kwargs):
        steps.append(1)
        if len(steps) == 1:
            model.model.norm.weight.data.fill_(math.nan)
        try:
            return generate_blueprint(model, *args, **kwargs)
        finally:
            model.model.norm.weight.data.fill_(1.0)

    monkeypatch.setattr(module, "generate_blueprint", generate)
    trainer, _ = train(full(), tmp_path, arguments={"max_steps": 4}, milestones=[0.5, 1], max_examples=4)
    assert trainer.state.global_step == 4 and list(figures(trainer, "blueprint/")) == [4]
    assert [p.name for p in tmp_path.glob("*.json")] == ["blueprint-100.json"]
    assert "No blueprint at step 2: The gradient of" in caplog.text


def test_one_process_writes(tmp_path):
    """Not the others, which log as the Trainer itself does there."""

    class Second(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    trainer, logged = train(lora(), tmp_path, Second(), every=5, max_examples=4)
    assert list(logged) == [5, 10] and not list(tmp_path.glob("*.json"))
    assert list(figures(trainer, "blueprint/")) == [5, 8, 10]


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT 0.20, of a model without a name
def test_resumed_training_goes_on_where_it_was(tmp_path):
    """Milestones passed before are left alone, and are among the checkpoints at the end."""
    stop = At(6, end=lambda state, control: setattr(control, "should_training_stop", True))
    saving = {"save_strategy": "steps", "save_steps": 6}
    train(lora(), tmp_path, stop, arguments=saving, milestones=[0.5], max_examples=4)
    trainer = make_trainer(lora(), tmp_path, **saving)
    callback = BlueprintCallback(trainer, max_examples=4, every=1)
    trainer.add_callback(callback)
    passed = (tmp_path / "blueprint-50.json").read_text()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert list(figures(trainer)) == [7, 8, 9, 10]
    assert (tmp_path / "blueprint-50.json").read_text() == passed
    assert [one.provenance["step"] for one in callback.checkpoints()] == [5, 8, 10]


def test_errors_for_bad_values_name_allowed_ones(tmp_path):
    """Before training, with the value and the allowed ones."""
    trainer = make_trainer(lora(), tmp_path)
    with pytest.raises(BlueprintError, match="every must be a positive integer or None, got 0"):
        BlueprintCallback(trainer, every=0)
    with pytest.raises(BlueprintError, match="every must be a positive integer or None, got 0.5"):
        BlueprintCallback(trainer, every=0.5)
    for share in (0, 1.5, math.nan):
        with pytest.raises(BlueprintError, match=r"milestones must be in \(0, 1\], got"):
            BlueprintCallback(trainer, milestones=[share])
    with pytest.raises(BlueprintError, match="detail must be one of submodule, kind, got 'layer'"):
        BlueprintCallback(trainer, detail="layer")
    with pytest.raises(BlueprintError, match="must be a Trainer, got LlamaForCausalLM.*add_callback"):
        BlueprintCallback(tiny_llama(1))
    with pytest.raises(BlueprintError, match="unknown|max_example"):
        BlueprintCallback(trainer, max_example=3)
    with pytest.raises(BlueprintError, match="training_checkpoint is the share of the steps done: leave it out"):
        BlueprintCallback(trainer, training_checkpoint=0.5)
    without = make_trainer(lora(), tmp_path, eval_dataset=None)
    with pytest.raises(BlueprintError, match=r"the Trainer has none. Give eval_dataset=, or milestones=\(\)"):
        BlueprintCallback(without)
    with pytest.raises(BlueprintError, match="No blueprint was measured"):
        BlueprintCallback(without, milestones=()).checkpoints()
    (tmp_path / "file").write_text("")
    trainer.add_callback(BlueprintCallback(trainer, output_dir=tmp_path / "file" / "sub"))
    with pytest.raises(BlueprintError, match="cannot be written.*Choose another folder"):
        trainer.train()
    empty = make_trainer(lora(), tmp_path, eval_dataset=[])
    empty.add_callback(BlueprintCallback(empty))
    with pytest.raises(BlueprintError, match="eval_dataset has 0 examples for 1 processes"):
        empty.train()


def test_missing_gradients_are_an_error(tmp_path):
    """A frozen model; gradients that are hidden."""
    frozen = tiny_llama(1).requires_grad_(False)
    with pytest.raises(BlueprintError, match="This LlamaForCausalLM has no trainable parameters.*get_peft_model"):
        BlueprintCallback(make_trainer(frozen, tmp_path), every=1)
    frozen.lm_head.requires_grad_()
    _, logged = train(frozen, tmp_path, arguments={"max_steps": 1}, every=1, milestones=())
    assert set(logged[1]) == {"lm_head", "total"}
    take_away = At(1, before=lambda model: model.zero_grad())
    with pytest.raises(BlueprintError, match="None of the 28 trained parameters has a gradient"):
        train(lora(), tmp_path, take_away, every=1, milestones=())


def test_shares_become_steps():
    """The first step at which the share is done, however a product of floats rounds."""
    assert [milestone_step(share, 10) for share in (0.01, 0.5, 0.75, 0.8, 1)] == [1, 5, 8, 8, 10]
    assert milestone_step(0.07, 100) == 7 and milestone_step(1.0, 3) == 3


def test_norms_of_many_dtypes_at_once():
    """In float32 for gradients of any dtype, because a norm in half precision may overflow."""
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
