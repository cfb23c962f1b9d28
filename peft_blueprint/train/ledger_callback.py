"""`LedgerCallback`: record costs and gains of a Trainer's run, and stop it when it no longer pays."""

from __future__ import annotations

import datetime
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from .._files import require_writable
from .._processes import process_count
from .._text import format_names
from ..blueprint import to_dict
from ..errors import BlueprintError
from ..measure import unwrap, versions
from ..place import BlueprintConfig, Cost, CostModel, Placement, Structure, workload_of
from ..runs import (
    Direction,
    Ledger,
    MarginalReturn,
    Quantity,
    RunLog,
    absent,
    carbon_factor,
    counted_flops,
    measured,
    modelled,
)
from .blueprint_callback import BlueprintCallback, trained_parameters, without_printing
from .joining import JoiningCallback


PREFIX = "ledger/"  # of the entries in the Trainer's log
STATE_KEY = "peft_blueprint.ledger"  # in trainer_state.json's stateful_callbacks
TRAINING = ("loss", "reward")  # metrics of training itself
COUNTED_STEP = 2  # the first step also includes lazy initialization

_LOG = logging.getLogger(__name__)
_LEAST_SEEN = 0.5  # of the modelled FLOPs; below it the counter has missed kernels
_NO_METRICS = ("_runtime", "_per_second", "_jit_compilation_time", "_model_preparation_time", "epoch")
# Arguments of transformers and TRL that are recorded.
_ARGUMENTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps"),
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_liger_kernel", "seed", "data_seed"),
    *("eval_strategy", "eval_steps", "logging_steps", "save_steps", "metric_for_best_model", "greater_is_better"),
    *("max_length", "packing", "padding_free", "completion_only_loss", "assistant_only_loss", "loss_type"),
)


class LedgerCallback(JoiningCallback):
    """Keeps a ledger of a training run and, with a rule, stops the run when it no longer pays.

    Add it as any callback: `SFTTrainer(..., callbacks=[LedgerCallback()])`. Its quantities go to the trackers in
    `report_to` as `ledger/seconds` and so on, at the Trainer's logging and evaluation steps. `run.json`, which
    `peft-blueprint report` reads, is written at evaluations, saves and the end.

    Tokens are the model's input positions in training, padding included. FLOPs are tokens times the FLOPs per token of
    the second step, counted by torch.utils.flop_counter; where that sees nothing, for example under torch.compile, the
    cost model's. The quantity's source has both. Evaluating and saving count in seconds and energy, and are recorded
    separately; the tokens and FLOPs of evaluations do not count.

    With a rule, every evaluation is a check, and all processes follow the first one's decision. Which checks can stop
    the run under its learning rate schedule is logged when training begins. The state is saved in the Trainer's
    checkpoints and restored from them, whatever `restore_callback_states_from_checkpoint` says. An error in the
    bookkeeping is a warning and never ends the run.

    Args:
        trainer: the Trainer, to check the arguments at once; by default the one that the callback is added to.
        stop: the rule; None only keeps the record.
        metric: the metric to judge by, with or without "eval_"; by default `metric_for_best_model`, otherwise
            "eval_loss", or "eval_reward" of a Trainer with reward functions such as GRPO's and RLOO's. "loss" and
            "reward" are those of training, checked whenever they are logged: the defaults without evaluations, though a
            rule judges by "loss" only where it is asked to.
        direction: whether a lower or a higher metric is better; by default as `greater_is_better` says for
            `metric_for_best_model`, otherwise the rule's, otherwise higher for all but losses and errors.
        resource: the resource to judge by, one of `RESOURCES`.
        carbon: grams of CO2e per kWh, or a country's three letters; see `carbon_factor`.
        watts: power of a device, to model energy where there is no meter.
        name: of the run, for reports; by default the folder's.
        output_dir: folder of `run.json`; by default the training arguments' `output_dir`.

    Raises:
        BlueprintError: for bad values, and for a rule without evaluations, at the latest when the Trainer is made or
            training begins; then also if the folder cannot be written or the resource is absent; after the first
            evaluation, if it lacks the metric.

    Example:
        >>> import tempfile, transformers
        >>> from peft_blueprint.testing import tiny_llama
        >>> arguments = transformers.TrainingArguments(tempfile.mkdtemp(), report_to="none")
        >>> trainer = transformers.Trainer(tiny_llama(), arguments, callbacks=[LedgerCallback(carbon=56)])
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        stop: MarginalReturn | None = None,
        metric: str | None = None,
        direction: Direction | None = None,
        resource: str = "seconds",
        carbon: str | float | None = None,
        watts: float | None = None,
        name: str | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__(trainer)
        if stop is not None and not isinstance(stop, MarginalReturn):
            raise BlueprintError(f"stop must be a MarginalReturn or None, got {stop!r}.")
        self.stop = stop
        self._given: dict[str, Any] = {
            "metric": metric,
            "direction": direction,
            "output_dir": output_dir,
            "name": name,
        }
        self._resource = resource
        self._carbon, self._watts = carbon_factor(carbon), watts
        self._fresh: dict[str, Any] | None = None
        self._counter = TokenCounter()
        if trainer is not None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        given, args = self._given, trainer.args
        self.metric = _metric_of(trainer, given["metric"], self.stop)
        self.output_dir = Path(given["output_dir"] or args.output_dir or ".")
        self._settings: dict[str, Any] = {
            "metric": self.metric,
            "direction": given["direction"] or _direction_of(args, self.metric),
            "resource": self._resource,
            "stop": self.stop,
            "name": given["name"] or self.output_dir.resolve().name or "run",
        }
        self._detach_after(trainer)
        self._begin()
        self._fresh = None if self.stop is None else self.stop.state_dict()

    @property
    def log(self) -> RunLog:
        """Log of the current or last training run.

        Raises:
            BlueprintError: if the callback was not added to a Trainer yet.
        """
        if self._trainer is None:
            raise BlueprintError(f"{type(self).__name__} keeps no log before it is added to a Trainer.")
        return self._log

    def summary(self) -> str:
        """Return the costs and gains so far, as lines to print."""
        return self.log.summary()

    def _detach_after(self, trainer: Trainer) -> None:
        """Take the counter off the model when training ends by an error or interrupt, which callbacks do not learn of.

        Of a training that has begun already, an interrupt between these methods leaves it on until the next one.
        """

        def guard(method: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(method)
            def guarded(*args: Any, **kwargs: Any) -> Any:
                try:
                    try:
                        return method(*args, **kwargs)
                    except BaseException:
                        self._counter.detach()
                        raise
                except BaseException:  # an interrupt may end the first one
                    self._counter.detach()
                    raise

            return guarded

        parts = ("training_step", "get_batch_samples", "evaluate", "_save_checkpoint")
        for name in parts if trainer.is_in_train else ("train",):
            if method := getattr(trainer, name, None):
                setattr(trainer, name, guard(method))

    def _begin(self) -> None:
        """Start a new log, with the rule in its initial state."""
        self._counter.detach()
        self._counter = TokenCounter()
        if self.stop is not None and self._fresh is not None:
            self.stop.load_state_dict(self._fresh)
        on_gpus = self.trainer.args.device.type == "cuda"
        ledger = Ledger(watts=self._watts, carbon=self._carbon, gpus=on_gpus)
        self._log = RunLog(**self._settings, ledger=ledger)
        self._log.output_dir = self.output_dir  # checked when training begins
        self._pending: dict[str, float] = {}
        self._logged: dict[str, Any] = {}
        self._per_token: Quantity | None = None
        self._steps = 0
        self._counted: Counted | None = None
        self._has_begun = False
        self._is_noted = False
        self._lacks_metric = False
        self._set_mark()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start a log, or continue that of the checkpoint."""
        super().on_train_begin(args, state, control)
        self._begin()
        if state.is_world_process_zero:
            require_writable(self.output_dir)
        log, saved = self._log, state.stateful_callbacks.get(STATE_KEY)  # type: ignore[union-attr]
        if saved is not None and state.global_step:
            with log.guarded("the totals before the resumption"):
                log.load_state_dict(saved["log"])
                if saved["flops_per_token"] is not None:
                    self._set_per_token(Quantity.from_dict(saved["flops_per_token"]))
        with log.guarded("the facts about the model"):
            log.about |= facts_of(self._model(), args)
            if (held_out := _dataset_name(self.trainer.eval_dataset)) is not None:
                log.about["held_out"] = held_out
        with log.guarded("tokens"):
            self._counter.attach(self.trainer.model_wrapped)
        for other in self.trainer.callback_handler.callbacks:
            if isinstance(other, BlueprintCallback):
                other.log = log
        log.ledger.start()
        log.settle()
        if self.stop is not None and log.resource not in ("tokens", "flops"):  # counted from the first step
            log.require_resource()
        if self.stop is not None and state.is_world_process_zero:
            with log.guarded("a forecast of the stopping rule"):
                _LOG.warning("%s: %s", log.name, self.stop.forecast(self._planned_rates(args, state)))
        self._has_begun = True
        self._set_mark()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the pending figures of the last step; start counting FLOPs in `COUNTED_STEP`."""
        if self._lacks_metric:
            point = self._log.points[-1]
            raise BlueprintError(
                f"The evaluation at step {point.step} lacks the metric {self.metric!r} that MarginalReturn needs; it has "
                f"{', '.join(sorted(point.metrics)) or 'none'}. Give LedgerCallback(metric=...) one of these."
            )
        if self._pending:
            self._send(control)
        self._steps += 1
        if self._steps == COUNTED_STEP and (self._per_token is None or self._per_token.how != "measured"):
            with self._log.guarded("counted FLOPs"):
                if not self._is_unseen():
                    self._counter.start_counting()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop counting after all micro-batches of the step, and generation for them as in TRL's GRPO."""
        if self._counter.is_counting:
            with self._log.guarded("counted FLOPs"):
                self._counted = self._counter.stop_counting()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the tokens of the step; add up where the Trainer logs, evaluates or saves."""
        if tokens := self._counter.take():
            self._log.step(tokens)
        if self._per_token is None:
            self._model_flops()
        if self._counted is not None and self._per_token is not None:
            self._set_per_token(_flops_per_token(self._counted, self._per_token, state.global_step))
            self._counted = None
        if not self._is_noted:
            self._is_noted = True
            self._note_optimizer()
        self._add_up(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add up where the Trainer logs, evaluates or saves."""
        self._add_up(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Record the training loss and check the rule if it is the metric; log the totals with the Trainer's summary."""
        if not self._has_begun or not logs:
            return
        if "train_loss" in logs:  # the summary; in on_train_end trackers have closed their runs
            self._log.settle()
            self._pending = self._spent()
            self._send(control)
        # TRL 0.22 has an evaluation's averages, such as rewards, in the log alone
        self._logged = {key: value for key, value in logs.items() if key.startswith("eval_")}
        if "loss" not in logs:
            return
        rate = _learning_rate(self.trainer)
        self._log.note_loss(float(logs["loss"]), step=state.global_step, learning_rate=rate)
        if self.metric in TRAINING and isinstance(logs.get(self.metric), int | float):
            self._check({self.metric: float(logs[self.metric])}, state, control)
        self._set_mark()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Record the evaluation and check the rule."""
        if not self._has_begun:
            return
        self._log.seconds["evaluating"] += self._since_mark()
        found = {
            key: float(value)
            for key, value in {**self._logged, **(metrics or {})}.items()
            if isinstance(value, int | float) and not key.endswith(_NO_METRICS)
        }
        self._check(found, state, control)
        needs_metric = self.stop is not None and self.metric not in TRAINING
        # the evaluation of another data set at this step may still have it
        self._lacks_metric = needs_metric and not any(self.metric in point.metrics for point in self._log.points)
        self._send(control)
        self._set_mark()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read the meters once a minute, so that no energy counter wraps around unseen in a long evaluation."""
        if self._has_begun:
            with self._log.guarded("the meters"):
                self._log.ledger.look_if_due()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the record."""
        self._log.seconds["saving"] += self._since_mark()
        with self._log.saving():
            self._log.save()
        self._set_mark()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add up for the last time, write the record and log its summary."""
        self._counter.detach()
        self._note_optimizer()
        self._has_begun = False
        self._log.finish()

    def _add_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Add up where the schedule logs, evaluates or saves, which all processes do at the same step."""
        is_scheduled = control.should_log or control.should_evaluate
        if is_scheduled or (control.should_save and _saves_now(args, state, control)):
            self._log.settle()
            if is_scheduled:
                self._pending = self._spent()
        if is_scheduled or control.should_save:
            self._store(state)
        self._set_mark()

    def _check(self, metrics: Mapping[str, float], state: TrainerState, control: TrainerControl) -> None:
        progress = min(1.0, state.global_step / state.max_steps) if state.max_steps > 0 else None
        decision = self._log.evaluate(
            metrics, step=state.global_step, learning_rate=_learning_rate(self.trainer), progress=progress
        )
        self._pending = self._spent()
        if decision is not None:
            logged = {"marginal_return": decision.ratio, "threshold": decision.threshold, "below": decision.below}
            self._pending |= {PREFIX + key: value for key, value in logged.items() if value is not None}
            if decision.stop:
                control.should_training_stop = True
        self._store(state)

    def _set_mark(self) -> None:
        """Remember that the time until now is accounted for."""
        self._mark = time.perf_counter() - sum(self._log.seconds.values())

    def _since_mark(self) -> float:
        """Return the seconds since the mark without those that were counted as evaluating or saving meanwhile."""
        return time.perf_counter() - sum(self._log.seconds.values()) - self._mark

    def _store(self, state: TrainerState) -> None:
        """Put the state where the Trainer's next checkpoint takes it from."""
        flops = None if self._per_token is None else self._per_token.to_dict()
        saved = {"log": self._log.state_dict(), "flops_per_token": flops}
        state.stateful_callbacks[STATE_KEY] = saved  # type: ignore[index, call-overload]

    def _spent(self) -> dict[str, float]:
        return {PREFIX + name: value for name, value in self._log.spent().items()}

    def _send(self, control: TrainerControl) -> None:
        """Log the pending figures, outside the logging event: TRL's trainers add their averages to the next record only."""
        pending, self._pending = self._pending, {}
        should_log = control.should_log
        if pending:
            with without_printing(self.trainer):
                self.trainer.log(pending)
        control.should_log = should_log  # `Trainer.log` resets it

    def _note_optimizer(self) -> None:
        if self.trainer.optimizer is not None:
            self._log.note_optimizer(self.trainer.optimizer)

    def _is_unseen(self) -> bool:
        """Whether FLOPs are invisible to the counter: compiled, or in other threads or processes."""
        args = self.trainer.args
        return args.n_gpu > 1 or self.trainer.is_deepspeed_enabled or is_compiled(self.trainer.model_wrapped)

    def _model_flops(self) -> None:
        """Take the cost model's FLOPs per token, for the shape of the last micro-batch."""
        if self._counter.shape is None:
            why = "its inputs have no input_ids" if self._counter.calls else "its forward was not called"
            return self._set_per_token(absent(f"no tokens of the model were seen: {why}"))
        per_token = absent("the cost model failed")
        with self._log.guarded("modelled FLOPs"):
            per_token = modelled_flops(self._model(), *self._counter.shape)
        self._set_per_token(per_token)

    def _set_per_token(self, per_token: Quantity) -> None:
        self._per_token = per_token
        self._log.ledger.flops_per_token = per_token

    def _planned_rates(self, args: TrainingArguments, state: TrainerState) -> list[float | None]:
        """Return the learning rate at each check to come; None for a schedule that is not a function of the step."""
        strategy = args.logging_strategy if self.metric in TRAINING else args.eval_strategy
        every: float = state.logging_steps if self.metric in TRAINING else state.eval_steps
        if str(getattr(strategy, "value", strategy)) == "epoch":
            every = state.max_steps / max(1, state.num_train_epochs)
        scheduler: Any = self.trainer.lr_scheduler
        scheduler = getattr(scheduler, "scheduler", scheduler)  # within Accelerate's
        factors = getattr(scheduler, "lr_lambdas", None)
        count = int(state.max_steps / every) if every else 0
        if not factors:
            return [None] * count
        return [scheduler.base_lrs[0] * factors[0](round(i * every)) for i in range(1, count + 1)]

    def _model(self) -> nn.Module:
        model: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        return model


def _metric_of(trainer: Trainer, metric: str | None, stop: MarginalReturn | None) -> str:
    args = trainer.args
    own = "reward" if getattr(trainer, "reward_funcs", None) else "loss"
    if metric is None and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        if stop is not None and own == "loss":
            raise BlueprintError(
                "MarginalReturn needs evaluations, but eval_strategy is 'no'. Set eval_strategy='steps' and eval_steps in "
                "the training arguments, or use LedgerCallback(metric='loss') to judge by the training loss."
            )
        return own
    if metric in TRAINING:
        return str(metric)
    name = metric or args.metric_for_best_model or own
    return name if name.startswith("eval_") else f"eval_{name}"


def _direction_of(args: TrainingArguments, metric: str) -> Direction | None:
    best = args.metric_for_best_model
    if best is not None and args.greater_is_better is not None and metric in (best, f"eval_{best}"):
        return "maximize" if args.greater_is_better else "minimize"
    return None


def _saves_now(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
    """Whether the schedule asks for this save; a save after a signal may be due in one process only."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    on_step = strategy == "steps" and state.save_steps > 0 and state.global_step % state.save_steps == 0
    return on_step or strategy == "epoch" or state.global_step >= state.max_steps


def _learning_rate(trainer: Trainer) -> float | None:
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    return float(groups[0]["lr"]) if groups else None


def _dataset_name(data: Any) -> str | None:
    """Return the name under which `datasets.load_dataset` loaded a data set; None for files and data made in memory."""
    if isinstance(data, Mapping):
        names = {_dataset_name(one) for one in data.values()}
        return names.pop() if len(names) == 1 else None
    info = getattr(data, "info", None)
    name, builder = getattr(info, "dataset_name", None), getattr(info, "builder_name", None)
    return name if isinstance(name, str) and name != builder else None  # the builder of files is "json", "csv", …


class Counted(NamedTuple):
    """Floating-point operations of a stretch of training, and its tokens."""

    flops: float
    tokens: int


class TokenCounter:
    """Counts the input positions, and for a while the FLOPs, of a model's training passes.

    A call counts if the model is in training mode and gradients are enabled, so evaluations and the passes of a
    reference model do not. Positions are those of `input_ids`, otherwise of `inputs_embeds`, otherwise of a first
    argument of integers, padding included; other inputs count nothing. It does not wait for the device.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None  # (batch, length) of the last pass
        self.calls = 0
        self._tokens = 0
        self._taken = 0
        self._handle: RemovableHandle | None = None
        self._stack: ExitStack | None = None
        self._flops: Any = None
        self._from = 0

    @property
    def is_counting(self) -> bool:
        """Whether FLOPs are being counted."""
        return self._stack is not None

    def attach(self, model: nn.Module) -> None:
        """Watch the calls of a module: the one that the loop calls, for example a DDP or compiled wrapper."""
        self.detach()
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook and stop counting FLOPs."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def take(self) -> int:
        """Return the tokens since the last call."""
        new, self._taken = self._tokens - self._taken, self._tokens
        return new

    def start_counting(self) -> None:
        """Start counting the FLOPs of this process."""
        self._stack, self._from = ExitStack(), self._tokens
        self._flops = self._stack.enter_context(counted_flops())

    def stop_counting(self) -> Counted | None:
        """Return the FLOPs and tokens since `start_counting`; None if either is zero."""
        if self._stack is None:
            return None
        self._stack.close()
        self._stack = None
        flops, tokens = float(self._flops.total), self._tokens - self._from
        return Counted(flops, tokens) if flops > 0 and tokens > 0 else None

    def _see(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.calls += 1
            shape = _shape_of(args, kwargs)
            if shape is not None:
                self.shape = shape
                self._tokens += shape[0] * shape[1]


def _flops_per_token(counted: Counted, model: Quantity, step: int) -> Quantity:
    """Return the counted FLOPs per token, or the modelled ones if the counter saw less than half of them.

    The counter sees matrix products, convolutions and attention among torch's own operations and no other kernel.
    """
    seen = counted.flops / counted.tokens
    source = f"torch.utils.flop_counter, measured once in step {step} ({seen:.4g} per token"
    if model.value is None:
        return measured(seen, f"{source})")
    if seen < _LEAST_SEEN * model.value:
        note = f"{model.source} ({model.value:.4g} per token)"
        return modelled(model.value, f"{note}; torch.utils.flop_counter saw only {seen:.4g}, so not all kernels")
    return measured(seen, f"{source}; {model.source} gives {model.value:.4g})")


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs this module or one inside, which hides the operations from the counter."""
    optimized = torch._dynamo.OptimizedModule
    return any(isinstance(m, optimized) or m._compiled_call_impl is not None for m in model.modules())


def _shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (batch, length) of a model's inputs."""
    ids = kwargs.get("input_ids")
    if not (isinstance(ids, Tensor) and ids.dim()):
        embeds, first = kwargs.get("inputs_embeds"), args[0] if args else None
        if isinstance(embeds, Tensor) and embeds.dim() > 2:
            ids = embeds[..., 0]
        elif isinstance(first, Tensor) and first.dim() and not (first.is_floating_point() or first.is_complex()):
            ids = first
        else:
            return None
    return ids.shape[0], ids.numel() // max(1, ids.shape[0])


def facts_of(model: nn.Module, arguments: TrainingArguments | None = None) -> dict[str, Any]:
    """Describe a run before it begins, as a JSON object.

    Args:
        model: the model to train, without wrappers such as DDP.
        arguments: training arguments, if a Trainer trains it.

    Returns:
        `model_id`, `created`, `train_config`, `peft_config`, `placement`, `blueprint`, `versions`, `system`, `seed`,
        `trainable_parameters`, `total_parameters` and `adapter_bytes`, as far as they apply.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> facts_of(tiny_llama())["trainable_parameters"] > 0
        True
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    trained = [p for p in model.parameters() if p.requires_grad]
    facts: dict[str, Any] = {
        "model_id": getattr(config, "_name_or_path", None) or type(inner).__name__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "system": _system(),
        "trainable_parameters": sum(p.numel() for p in trained),
        "total_parameters": _total_parameters(model),
        "adapter_bytes": sum(p.numel() * p.element_size() for p in trained),
        "placement": {"lora": ranks_of(model), "unfreeze": _unfrozen(model)},
    }
    if revision := getattr(config, "_commit_hash", None):
        facts["model_revision"] = revision
    if arguments is not None:
        known = arguments.to_dict()
        facts["train_config"] = {name: known[name] for name in _ARGUMENTS if known.get(name) is not None}
        facts["train_config"]["processes"] = arguments.world_size
        facts["seed"] = arguments.seed
    if isinstance(model, PeftModel):
        adapter = model.peft_config[model.active_adapter]
        if isinstance(adapter, BlueprintConfig):
            given, record = adapter.blueprint, adapter.record
            if given is not None:
                facts["blueprint"] = to_dict(record) if record is not None and record.digest == given else given
            if isinstance(adapter.placement, Placement):
                chosen_by = {"rank_by": adapter.placement.rank_by, "coverage": adapter.placement.coverage}
                facts["placement"] |= chosen_by
            adapter = adapter.to_lora_config()
        facts["peft_config"] = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.to_dict().items()}
    return facts


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the ranks of the active LoRA adapters, by their submodules' names in the unwrapped model."""
    inner = unwrap(model)
    found: dict[str, int] = {}
    for path, module in inner.named_modules():
        if not isinstance(module, LoraLayer) or not isinstance(module, BaseTunerLayer):
            continue
        names = [part for part in path.split(".") if part != "base_layer"]
        name = ".".join([*names, module.parameter_name] if isinstance(module, ParamWrapper) else names)
        rank = sum(int(module.r[adapter]) for adapter in module.active_adapters if adapter in module.r)
        if rank:
            found[name] = rank
    return found


def modelled_flops(model: nn.Module, batch_size: int, length: int) -> Quantity:
    """Model the FLOPs per token of a training step.

    Covers LoRA adapters and submodules that are trained whole. If anything else is trained, the result is that of a
    pass through the whole model, without the adapters' own operations.

    Args:
        model: the model to train, without wrappers.
        batch_size: examples of a micro-batch.
        length: tokens of an example, padding included.

    Returns:
        The quantity; absent if the cost model cannot read the model.
    """
    step = workload_of(model, batch_size=max(1, batch_size), length=max(1, length), padded=batch_size > 1)
    if ranks := ranks_of(model):
        step = replace(step, rank=max(ranks.values()))
    try:
        cost, note = _cost(CostModel(Structure.of(unwrap(model)), step), model, ranks)
    except BlueprintError as error:
        return absent(f"the cost model cannot read this {type(unwrap(model)).__name__}: {error}")
    return modelled(cost.flops, f"CostModel for {batch_size} × {length} tokens{note}")


def _cost(costs: CostModel, model: nn.Module, ranks: Mapping[str, int]) -> tuple[Cost, str]:
    known = {part.name for part in costs.structure.parts}
    whole, other = set(), set()
    for name, part, _ in trained_parameters(model):
        if part == "adapter":
            other |= set() if name in ranks else {name}
        else:
            own = {name} & known or {n for n in known if n.startswith(f"{name}.")}
            whole |= own
            other |= set() if own else {name}
    if not other:
        adapters = {name: rank for name, rank in ranks.items() if name not in whole}
        return costs.cost(adapters, whole), ""
    return costs.floor(), f", leaving out the training of {format_names(sorted(other))}"


def _unfrozen(model: nn.Module) -> list[str]:
    """Return the modules that PEFT trains whole; none for a model without PEFT."""
    if not isinstance(model, PeftModel):
        return []
    return sorted({name for name, part, _ in trained_parameters(model) if part == "weight"})


def _total_parameters(model: nn.Module) -> int:
    """Count the weights of base model and adapters, unpacking those held in 4 bits."""
    if isinstance(model, PeftModel):
        return int(model.get_nb_trainable_parameters()[1])
    return sum(p.numel() for p in model.parameters())


def _system() -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "devices": [platform.processor() or platform.machine()],
    }
    if torch.cuda.is_available():
        found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found
