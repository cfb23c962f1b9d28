"""One callback records a run and stops it when it no longer pays.

Run: pytest tests/train/test_ledger_callback.py
"""

import json
import logging

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainerCallback

from peft_blueprint import BlueprintConfig, BlueprintError
from peft_blueprint.errors import FormatError
from peft_blueprint.publish.run_card import run_metadata
from peft_blueprint.runs.ledger import Ledger, counted_flops
from peft_blueprint.runs.log import RunLog
from peft_blueprint.runs.quantity import UNITS, modelled
from peft_blueprint.runs.record import RunRecord
from peft_blueprint.runs.stopping import MarginalReturn
from peft_blueprint.testing import save_tiny_model, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit, toy_batches
from peft_blueprint.train import ledger_callback as module
from peft_blueprint.train.blueprint_callback import BlueprintCallback
from peft_blueprint.train.ledger_callback import LedgerCallback
from tests.accounts import LENGTH, At, end, logged, lora, make_trainer, rows, train
from tests.fused import needs_fused


STEP = 4 * LENGTH  # tokens


def never_enough(**settings):
    """A rule that no improvement satisfies: it stops at its fourth check."""
    return MarginalReturn(**{"threshold": 1e9, "window": 3, "patience": 2} | settings)


def test_figures_go_to_the_log_where_the_trainer_logs_or_evaluates(tmp_path, capsys):
    """At those steps and no other, rising, with everything that is counted here; the console shows none of them."""
    trainer, callback = train(tmp_path, arguments={"disable_tqdm": True})
    out = capsys.readouterr().out
    assert "'loss'" in out and "eval_loss" in out and "ledger/" not in out
    found = logged(trainer)
    assert sorted(found) == [2, 4, 5, 6, 8, 10]
    assert [found[step]["tokens"] for step in found] == [step * STEP for step in found]
    for name in ("seconds", "device_hours", "flops", "tokens"):
        values = [found[step][name] for step in found]
        assert values == sorted(values) and values[0] > 0, name
    assert all({"peak_bytes", "optimizer_bytes"} <= found[step].keys() <= UNITS.keys() for step in found)
    record = RunRecord.load(tmp_path)
    assert [point.step for point in record.points] == [2, 4, 6, 8, 10]
    assert [point.step for point in record.losses] == [5, 10]
    assert [p.spent["tokens"] for p in record.points] == [p.step * STEP for p in record.points]
    assert all(point.metrics.keys() == {"eval_loss"} for point in record.points)
    assert all(point.learning_rate == 1e-3 for point in (*record.points, *record.losses))
    assert (record.metric, record.direction, record.resource) == ("eval_loss", "minimize", "seconds")
    assert record.totals.keys() == UNITS.keys() and record.totals["tokens"].how == "measured"
    assert record.about["seconds_of_which"]["evaluating"] > 0
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    counts = [state["step"] for state in trainer.optimizer.state.values()]
    states = sum(2 * p.numel() * 4 for p in trained) + sum(c.numel() * c.element_size() for c in counts)
    assert record.totals["optimizer_bytes"].value == states, "AdamW's two, and the count of steps"
    lines = callback.summary().splitlines()
    assert lines[0].startswith(f"{tmp_path.name}: eval_loss") and len(lines) >= 1 + len(UNITS)
    assert all(any(how in line for how in ("measured", "modelled", "absent")) for line in lines[1:])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tokens_are_the_models_inputs_in_training(accumulation, tmp_path):
    """Padding included, every micro-batch of a step, and no token of an evaluation."""
    arguments = {"gradient_accumulation_steps": accumulation, "max_steps": 3, "eval_steps": 1}
    _, callback = train(tmp_path, arguments=arguments)
    assert callback.log.totals()["tokens"].value == 3 * accumulation * STEP


def test_the_trainers_own_log_is_as_without_it(tmp_path):
    """The same losses at the same steps, and the same weights at the end."""

    def losses(trainer):
        ours = [record for record in trainer.state.log_history if "ledger/seconds" not in record]
        return [(r["step"], *(r.get(name, 0.0) for name in ("loss", "eval_loss", "grad_norm"))) for r in ours]

    plain = make_trainer(tmp_path, logging_steps=1)
    plain.train()
    trainer, _ = train(tmp_path, arguments={"logging_steps": 1})
    for mine, theirs in zip(losses(trainer), losses(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for mine, theirs in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def flops_by_hand(model):
    """Of a micro-batch, as torch counts them."""
    (batch,) = toy_batches(4, LENGTH, 4, padding="none")
    model.train()
    with counted_flops() as counter:
        model(**batch).loss.backward()
    return counter.total


@pytest.mark.parametrize("accumulation", [1, 2])
def test_flops_are_counted_once_by_torch(accumulation, tmp_path):
    """In the second step, all micro-batches of it; the source says what the cost model reckons."""
    arguments = {"max_steps": 3, "gradient_accumulation_steps": accumulation}
    _, callback = train(tmp_path, arguments=arguments)
    flops = callback.log.totals()["flops"]
    assert flops.how == "measured" and flops.value == flops_by_hand(lora()) * 3 * accumulation
    assert "measured once in step 2" in flops.source and "CostModel for 4 × 12 tokens gives" in flops.source


@needs_fused
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_flops_of_a_mixture_are_those_of_the_experts_that_run(implementation):
    """Two of four, by the counter and by the cost model, however transformers computes them."""
    model = tiny_mixtral(2)
    model.set_experts_implementation(implementation)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)).train()
    ids = torch.arange(1, 33).repeat(2, 1)
    with counted_flops() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counter.total / 64 == pytest.approx(module.modelled_flops(model, 2, 32).value, rel=0.05)


def test_where_nothing_is_seen_flops_are_modelled(tmp_path, monkeypatch):
    """Under torch.compile the counter is not asked; where it misses most, its count is not taken. Both say so."""
    _, measured = train(tmp_path, arguments={"max_steps": 3})
    monkeypatch.setattr(module, "is_compiled", lambda model: True)
    _, compiled = train(tmp_path, arguments={"max_steps": 3})
    figure = compiled.log.totals()["flops"]
    assert figure.how == "modelled" and figure.source.startswith("CostModel for 4 × 12 tokens")
    assert figure.value == pytest.approx(measured.log.totals()["flops"].value, rel=0.5)
    monkeypatch.setattr(module, "is_compiled", lambda model: False)
    monkeypatch.setattr(
        module.TokenCounter, "stop_counting", lambda self: self._stack.close() or module.Counted(48.0, 48)
    )
    _, blind = train(tmp_path, arguments={"max_steps": 3})
    said = blind.log.totals()["flops"]
    assert (said.how, said.value) == ("modelled", figure.value) and "saw only 1, so not all kernels" in said.source


def test_one_step_alone_is_modelled(tmp_path):
    """FLOPs are counted in the second step only."""
    _, callback = train(tmp_path, arguments={"max_steps": 1, "eval_steps": 1})
    assert callback.log.totals()["flops"].how == "modelled"


def test_other_models_have_a_ledger_too(tmp_path):
    """Trained whole: an encoder-decoder, and a vision transformer, which has no tokens."""
    _, callback = train(tmp_path, tiny_llama(2), arguments={"max_steps": 2})
    record = RunRecord.load(tmp_path)
    assert "CostModel" in record.totals["flops"].source and "without" not in record.totals["flops"].source
    assert record.about["placement"] == {"lora": {}, "unfreeze": []} and "peft_config" not in record.about
    assert record.about["trainable_parameters"] == record.about["total_parameters"]

    _, callback = train(tmp_path, tiny_t5(), arguments={"max_steps": 2})
    assert callback.log.totals()["tokens"].value == 2 * STEP

    images = [{"pixel_values": torch.randn(3, 16, 16), "labels": 1} for _ in range(4)]
    trainer = make_trainer(tmp_path, tiny_vit(), max_steps=2, eval_dataset=images)
    trainer.train_dataset = images
    trainer.add_callback(callback := LedgerCallback(trainer))
    trainer.train()
    totals = callback.log.totals()
    assert totals["tokens"].how == totals["flops"].how == "absent" and totals["seconds"].value > 0


def test_the_record_describes_the_run(blueprint, tmp_path):
    """Placement with ranks, the blueprint, plain LoRA settings, arguments, versions, seed, counts and bytes."""
    config = BlueprintConfig(blueprint=blueprint, num_modules=5, r=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(12), config)
    train(tmp_path, model, arguments={"max_steps": 1, "seed": 7})
    about = RunRecord.load(tmp_path).about
    assert set(about["placement"]["lora"]) == set(config.selection) and about["placement"]["unfreeze"] == []
    assert set(about["placement"]["lora"].values()) == {2}
    assert about["peft_config"]["peft_type"] == "LORA" and about["peft_config"]["r"] == 2
    assert about["blueprint"]["model_id"] == blueprint.model_id
    assert about["train_config"]["per_device_train_batch_size"] == 4 and about["seed"] == 7
    assert about["trainable_parameters"] * 4 == about["adapter_bytes"] > 0
    assert about["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert about["versions"]["torch"] and about["system"]["threads"] == torch.get_num_threads()
    assert about["created"] and about["model_id"] == "LlamaForCausalLM"
    json.dumps(about, allow_nan=False)


@pytest.mark.parametrize(
    ("source", "name"), [("folder", "my_data"), ("file", None), ("memory", None), ("two", None), ("twice", "my_data")]
)
def test_the_record_names_the_held_out_data_where_it_has_a_name(source, name, tmp_path):
    """And so an evaluation's results can go into `model-index`, which needs the data set's name."""
    folder = tmp_path / "my_data"
    folder.mkdir()
    lines = [json.dumps({key: value.tolist() for key, value in row.items()}) + "\n" for row in rows(4)]
    (folder / "test.jsonl").write_text("".join(lines))
    place = {"split": "test", "cache_dir": str(tmp_path / "cache")}
    named = load_dataset(str(folder), **place)
    file = load_dataset("json", data_files={"test": str(folder / "test.jsonl")}, **place)
    data = {
        "folder": named.map(lambda row: row),
        "file": file,
        "memory": rows(4),
        "two": {"a": named, "b": file},
        "twice": {"a": named, "b": named},
    }[source]
    train(tmp_path / "run", arguments={"max_steps": 2, "eval_dataset": data})
    record = RunRecord.load(tmp_path / "run")
    assert record.about.get("held_out") == name
    results = run_metadata(record).to_dict().get("model-index")
    assert (results is None) if name is None else results[0]["results"][0]["dataset"]["name"] == name


def test_it_stops_when_nothing_pays(tmp_path, caplog):
    """At the check at which the rule says so; the reason is logged once, and is in the record and the figures."""
    with caplog.at_level(logging.INFO, "peft_blueprint"):
        trainer, callback = train(tmp_path, stop=never_enough(), resource="tokens")
    assert trainer.state.global_step == 8
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and "has 5 checks in this run and can stop it at check 4." in said[0]
    assert "at step 8" in said[1] and callback.log.decision.reason in said[1]
    record = RunRecord.load(tmp_path)
    assert (record.stopping["stopped"], record.stopping["step"]) == (True, 8)
    assert record.stopping["reason"] == callback.log.decision.reason
    assert record.stopping["settings"]["threshold"] == 1e9 and record.resource == "tokens"
    assert logged(trainer)[8]["below"] == 2 and logged(trainer)[8]["threshold"] == 1e9
    totals = [
        record.getMessage() for record in caplog.records if "tokens: 384 tokens (measured" in record.getMessage()
    ]
    assert len(totals) == 1, "the run's totals, in one line"


@pytest.mark.parametrize(
    ("schedule", "stop_in_decay", "steps", "says"),
    [
        ("linear", False, 20, "cannot stop it. While the learning rate falls"),
        ("linear", True, 8, "can stop it at checks 4 to 9."),
        ("cosine", False, 20, "cannot stop it. While the learning rate falls"),
        ("cosine", True, 8, "can stop it at checks 4 to 9."),
        ("inverse_sqrt", True, 8, "can stop it at checks 4 to 9."),
        ("constant", False, 8, "can stop it at checks 4 to 9."),
        ("reduce_lr_on_plateau", False, 8, "can stop it at checks 4 to 9. The schedule is not known beforehand"),
    ],
)
def test_the_effect_of_a_rule_under_a_schedule_is_logged_once_at_the_start(
    schedule, stop_in_decay, steps, says, tmp_path, caplog
):
    """Before the first step; and it does so."""
    rule = never_enough(stop_in_decay=stop_in_decay)
    arguments = {"lr_scheduler_type": schedule, "max_steps": 20}
    trainer, _ = train(tmp_path, arguments=arguments, stop=rule, resource="tokens")
    said = [r.getMessage() for r in caplog.records if "checks in this run" in r.getMessage()]
    assert len(said) == 1 and f"MarginalReturn has 10 checks in this run and {says}" in said[0]
    assert trainer.state.global_step == steps


def test_too_few_evaluations_to_stop_are_logged_at_the_start(tmp_path, caplog):
    """As with one evaluation an epoch; the training loss counts its own checks."""
    train(tmp_path, arguments={"eval_strategy": "epoch"}, stop=MarginalReturn())
    assert "has 5 checks in this run and cannot stop it. With window=5 and patience=3" in caplog.text
    arguments = {"eval_strategy": "no", "logging_steps": 1, "eval_dataset": None}
    train(tmp_path, arguments=arguments, metric="loss", stop=MarginalReturn())
    assert "has 10 checks in this run and can stop it at checks 7 to 9." in caplog.text


def test_it_goes_on_while_it_pays(tmp_path):
    """A rule that anything satisfies is asked at every evaluation and stops nothing."""
    trainer, callback = train(tmp_path, stop=MarginalReturn(threshold=-1e9, window=3, patience=1))
    assert trainer.state.global_step == 10 and callback.log.stopped_at is None
    record = RunRecord.load(tmp_path)
    assert (
        record.stopping["stopped"] is False and record.stopping["below"] == 0 and record.stopping["ratio"] is not None
    )


def test_the_training_loss_may_be_the_metric(tmp_path):
    """If it is asked for by name, at every logging step; evaluations are then not needed."""
    arguments = {"eval_strategy": "no", "logging_steps": 1, "eval_dataset": None}
    trainer, _ = train(tmp_path, arguments=arguments, metric="loss", stop=never_enough(), resource="flops")
    assert trainer.state.global_step == 4
    assert [p.step for p in RunRecord.load(tmp_path).points] == [1, 2, 3, 4]
    trainer, _ = train(tmp_path, arguments=arguments)
    assert RunRecord.load(tmp_path).metric == "loss", "there is no other"


def test_direction_is_the_trainers(tmp_path):
    """As greater_is_better has it, also of a rule; a rule with the other is refused; a given one counts before both."""
    accuracy = {"metric_for_best_model": "accuracy"}
    assert LedgerCallback(make_trainer(tmp_path, **accuracy)).log.direction == "maximize"
    assert LedgerCallback(make_trainer(tmp_path, **accuracy)).metric == "eval_accuracy"
    assert LedgerCallback(make_trainer(tmp_path), metric="perplexity").log.direction == "minimize"
    with pytest.raises(BlueprintError, match="'maximize'.*'eval_accuracy'.*'minimize'.*must be equal"):
        LedgerCallback(make_trainer(tmp_path, **accuracy), stop=MarginalReturn(direction="minimize"))
    stop = MarginalReturn()
    assert LedgerCallback(make_trainer(tmp_path, **accuracy), stop=stop).log.direction == stop.direction == "maximize"
    assert LedgerCallback(make_trainer(tmp_path, **accuracy), direction="minimize").log.direction == "minimize"


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_a_rule_judges_a_reward_by_itself_and_wants_it_high(tmp_path, is_evaluated):
    """The reward of an evaluation, or of training where there are none; TRL 0.22 has it in the log alone."""

    class Rewarded(Trainer):
        reward_funcs = [len]

        def log(self, logs, *others):
            prefix = "eval_" if "eval_loss" in logs else ""
            more = {f"{prefix}reward": self.state.global_step / 8} if {"loss", "eval_loss"} & set(logs) else {}
            super().log({**logs, **more}, *others)

    arguments = {"logging_steps": 1, "eval_strategy": "steps" if is_evaluated else "no", "eval_steps": 1}
    arguments["max_steps"] = 4
    callback = LedgerCallback(stop=MarginalReturn(), resource="tokens")
    with pytest.raises(BlueprintError, match="LedgerCallback keeps no log before it is added to a Trainer"):
        callback.log  # noqa: B018
    make_trainer(tmp_path, cls=Rewarded, callbacks=[callback], **arguments).train()
    record = RunRecord.load(tmp_path)
    assert (record.metric, record.direction) == ("eval_reward" if is_evaluated else "reward", "maximize")
    assert [point.metrics[record.metric] for point in record.points] == [0.125, 0.25, 0.375, 0.5]
    assert record.stopping["settings"]["direction"] == "maximize" and callback.log.decision.points is None  # too few


@pytest.mark.parametrize("way", ["callbacks", "add_callback", "class"])
def test_the_trainer_need_not_be_given(tmp_path, way):
    """However the callback is added, it keeps the run's record, and leaves no hook on the model after an error."""
    given = {"class": LedgerCallback, "callbacks": LedgerCallback()}.get(way)
    trainer = make_trainer(tmp_path, callbacks=[given] * (given is not None), max_steps=1, eval_strategy="no")
    if way == "add_callback":
        trainer.add_callback(LedgerCallback())
    trainer.train()
    assert RunRecord.load(tmp_path).total("tokens").value > 0
    trainer.data_collator = None
    with pytest.raises(TypeError):
        trainer.train()
    assert not trainer.model._forward_pre_hooks


def test_a_callback_outside_a_trainer_says_how_to_add_it(tmp_path):
    """Whether it is asked for its Trainer, or a loop other than a Trainer's calls it."""
    arguments = make_trainer(tmp_path).args
    with pytest.raises(BlueprintError, match=r"has no Trainer yet. Add it: Trainer\(..., callbacks="):
        LedgerCallback().trainer  # noqa: B018
    with pytest.raises(BlueprintError, match=r"found no Trainer. Pass it: LedgerCallback\(trainer=trainer\)"):
        LedgerCallback().on_train_begin(arguments, None, None)


def test_wrong_arguments_are_errors_before_training(tmp_path):
    """The error names the given and the allowed values."""
    trainer = make_trainer(tmp_path)
    with pytest.raises(BlueprintError, match="trainer must be a Trainer, got PeftModelForCausalLM.*add_callback"):
        LedgerCallback(lora())
    with pytest.raises(BlueprintError, match="resource must be one of seconds, .*, got 'gpus'"):
        LedgerCallback(trainer, resource="gpus")
    with pytest.raises(BlueprintError, match="resource must be one of .*, got 'peak_bytes'"):
        LedgerCallback(trainer, resource="peak_bytes")
    with pytest.raises(BlueprintError, match="stop must be a MarginalReturn or None, got 3"):
        LedgerCallback(trainer, stop=3)
    with pytest.raises(BlueprintError, match="eval_strategy is 'no'.*metric='loss'"):
        LedgerCallback(make_trainer(tmp_path, eval_strategy="no"), stop=MarginalReturn())
    with pytest.raises(BlueprintError, match="direction must be one of minimize, maximize, got 'up'"):
        LedgerCallback(trainer, direction="up")
    with pytest.raises(BlueprintError, match="watts"):
        LedgerCallback(trainer, watts=-1)
    with pytest.raises(BlueprintError, match="carbon"):
        LedgerCallback(trainer, carbon=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(BlueprintError, match="cannot be written.*Choose another folder"):
        train(tmp_path, output_dir=tmp_path / "file" / "sub")


def test_an_unusable_metric_or_resource_is_an_error_at_once(tmp_path):
    """A resource that nothing counts, before the first step; a metric that is not there, after one evaluation."""
    with pytest.raises(BlueprintError, match="'carbon_grams' is absent .*Use one of seconds, device_hours") as found:
        train(tmp_path, stop=MarginalReturn(), resource="carbon_grams")
    assert "watts=" in str(found.value)
    with pytest.raises(BlueprintError, match="step 2 lacks the metric 'eval_f1'.*it has eval_loss"):
        train(tmp_path, stop=MarginalReturn(direction="maximize"), metric="f1")
    _, callback = train(tmp_path, metric="f1", direction="maximize")
    assert [point.step for point in callback.log.points] == [2, 4, 6, 8, 10], "without a rule it is not needed"


def test_several_evaluation_sets_make_one_point(tmp_path):
    """The rule is asked by the set whose metric it has, whichever comes first."""
    for metric in ("a_loss", "b_loss"):
        sets = {"a": rows(2), "b": rows(4)}
        _, callback = train(tmp_path, arguments={"eval_dataset": sets}, metric=metric, stop=MarginalReturn())
        assert [point.step for point in callback.log.points] == [2, 4, 6, 8, 10]
        assert all(point.metrics.keys() == {"eval_a_loss", "eval_b_loss"} for point in callback.log.points)
        assert callback.log.decision is not None


def test_books_that_fail_end_nothing(tmp_path, monkeypatch, caplog):
    """The meters, the model's facts and the file: the training goes on, and each is warned of once."""

    def broken(*args, **kwargs):
        raise OSError("the meter is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "quantities", broken)
        patch.setattr(module, "facts_of", broken)
        patch.setattr(module, "modelled_flops", broken)
        trainer, _ = train(tmp_path)
    assert trainer.state.global_step == 10
    said = [record.getMessage() for record in caplog.records if "continues without" in record.getMessage()]
    assert len(said) == 3 and all("OSError: the meter is gone" in message for message in said)
    caplog.clear()
    monkeypatch.setattr(RunRecord, "save", broken)
    train(tmp_path)
    assert len([r for r in caplog.records if "run.json in its record: OSError" in r.getMessage()]) == 1


def test_it_leaves_nothing_behind_and_begins_anew(tmp_path):
    """No hook stays on the model; a second training has its own books, and the rule its own start."""
    trainer, callback = train(tmp_path, stop=never_enough(), resource="tokens")
    assert not trainer.model._forward_pre_hooks
    first = callback.log.totals()["tokens"].value
    trainer.train()
    assert trainer.state.global_step == 8 and callback.log.totals()["tokens"].value == first
    trainer.evaluate()
    assert len(callback.log.points) == 4, "an evaluation afterwards is none of the training's"


def test_an_early_end_by_another_callback_is_not_a_stop_of_the_rule(tmp_path):
    """The record is still written."""
    train(tmp_path, None, At(3, end), stop=MarginalReturn())
    record = RunRecord.load(tmp_path)
    assert record.totals["tokens"].value == 3 * STEP and record.stopping["stopped"] is False


def test_trackers_get_the_last_figures_before_they_close(tmp_path):
    """The totals come before on_train_end, in which trackers end their runs, and after it comes nothing."""
    events = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            events.append(logs)

        def on_train_end(self, args, state, control, **kwargs):
            events.append("end")

    train(tmp_path, None, Tracker())
    assert events[-1] == "end" and events[-2]["ledger/tokens"] == 10 * STEP


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # TRL's
def test_trl_keeps_its_own_averages(tmp_path):
    """SFTTrainer empties its averages into the next record: the loss's has them all the same, at every step, and neither
    callback takes them.
    """
    from trl import SFTConfig, SFTTrainer

    def sft(with_books):
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        folder = save_tiny_model(tmp_path / "model")
        data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
        trainer = SFTTrainer(
            lora(),
            arguments,
            train_dataset=data,
            eval_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        callback = LedgerCallback(trainer)
        if with_books:
            trainer.add_callback(callback)
            trainer.add_callback(BlueprintCallback(trainer, every=1, milestones=()))
        trainer.train()
        return trainer, callback

    plain, _ = sft(False)
    trainer, callback = sft(True)
    names = [sorted(r) for r in plain.state.log_history if "loss" in r]
    assert [sorted(r) for r in trainer.state.log_history if "loss" in r] == names
    assert "mean_token_accuracy" in names[0]
    assert callback.log.totals()["tokens"].value == 4 * STEP and callback.log.totals()["flops"].how == "measured"
    assert set(logged(trainer)) == {1, 2, 3, 4} and len(callback.log.points) == 2
    assert set(logged(trainer, "blueprint/")) == {2, 4} and list(tmp_path.rglob("blueprint-50.json"))


def test_an_own_loop_has_the_same_ledger(tmp_path):
    """Without a Trainer: totals, decisions and a state that another loop goes on from; an error leaves a record."""

    def log_of(folder):
        ledger = Ledger(flops_per_token=modelled(2.0, "assumed"), meters=[])
        return RunLog("own", metric="loss", stop=never_enough(), resource="flops", ledger=ledger, output_dir=folder)

    log = log_of(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt), log:
        for step in (1, 2):
            log.step(tokens=100)
            assert not log.evaluate(3.0 - step, step=step, progress=step / 10).stop
        raise KeyboardInterrupt
    assert [p.spent["flops"] for p in RunRecord.load(tmp_path / "a").points] == [200, 400]
    rest = log_of(tmp_path / "b")
    rest.load_state_dict(json.loads(json.dumps(log.state_dict())))
    with rest:
        for step in (3, 4):
            rest.step(tokens=100)
            decision = rest.evaluate({"loss": 3.0 - step, "other": 1.0}, step=step, progress=step / 10)
    assert decision.stop and rest.stopped_at == 4 and rest.evaluate({"other": 2.0}, step=4) is None
    assert RunRecord.load(tmp_path / "b").totals["tokens"].value == 400
    assert "stopped: " in rest.summary() and "flops: 800 FLOP (modelled: " in rest.summary()
    with pytest.raises(BlueprintError, match="step must not decrease, got 3 after 4"):
        rest.evaluate(1.0, step=3)
    with pytest.raises(FormatError, match="The state of RunLog: metric is missing"):
        rest.load_state_dict({"points": []})
