"""`LedgerCallback`, one callback to add: what a run spends and gains, in its log and its record, and when it should stop.

For transformers' Trainer and those made of it, TRL's say. The books themselves are `run_log.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._files import require_writable
from ..errors import BlueprintError
from ..runs import Direction, Figure, Ledger, MarginalReturn, RunLog, absent, carbon_factor, direction_of
from .run_facts import facts_of, modelled_flops
from .token_counter import Counted, Passes, is_compiled, per_token


PREFIX = "ledger/"  # of the figures in the log
STATE_KEY = "peft_blueprint.ledger"  # in trainer_state.json's stateful_callbacks
COUNTED_STEP = 2  # of a training: what is set up lazily in the first step is out of the way

_NO_METRICS = ("_runtime", "_per_second", "_jit_compilation_time", "_model_preparation_time", "epoch")


class LedgerCallback(TrainerCallback):
    """Keeps a ledger of a training, and stops it when it no longer pays, if asked to.

    Add it to a trainer that is there, as in `trainer.add_callback(LedgerCallback(trainer))`, or with
    `stop=MarginalReturn()`: at the Trainer's logging and evaluation steps its figures go to whatever `report_to` names,
    as `ledger/seconds` and so on, and at every evaluation and save and at the end `run.json` is written, from which
    `peft-blueprint report` reads.

    Tokens are input positions that the model is given in training, padding included. FLOPs are these times what the
    second step takes per token, counted by torch.utils.flop_counter; where that sees nothing, under
    torch.compile say, the cost model's. The figure's source has both. Evaluating and saving count as spent, in seconds
    and energy, and are in the record by themselves; the FLOPs and tokens of evaluations are not counted.

    With a rule, every evaluation is a check of it, in all processes with the first one's decision. The state goes with
    the Trainer's checkpoints and comes back when training is resumed from one, whatever
    `restore_callback_states_from_checkpoint` says. Keeping the books never ends a training: what goes wrong there is a
    warning.

    Args:
        trainer: the Trainer it is added to.
        stop: the rule; None to keep books only.
        metric: what counts, with or without "eval_"; by default `metric_for_best_model`, else "eval_loss". "loss" is
            the training loss, checked whenever it is logged; without a rule and evaluations it is the default.
        direction: whether a lower or a higher metric is better; by default as `greater_is_better` says if the metric is
            `metric_for_best_model`, else the rule's or what the name suggests.
        resource: what counts as spent, one of `figures.RESOURCES`.
        carbon: grams of CO2e per kWh, or a country's three letters, see `carbon_factor`.
        watts: of a device, from which energy is modelled where no meter is.
        name: of the run, for reports; by default the folder's.
        output_dir: where `run.json` goes; by default `output_dir` of the training arguments.

    Raises:
        BlueprintError: for bad values, and for a rule that has no evaluations; when training begins, if the folder
            cannot be written or nothing counts the resource; after the first evaluation, if it has not the metric.
    """

    def __init__(
        self,
        trainer: Trainer,
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
        if not isinstance(trainer, Trainer):
            raise BlueprintError(
                f"LedgerCallback needs the trainer, not {type(trainer).__name__}: make the trainer first, then "
                "trainer.add_callback(LedgerCallback(trainer))."
            )
        self.trainer = trainer
        self.stop = stop
        self.metric = _metric_of(trainer.args, metric, stop)
        self.output_dir = Path(output_dir or trainer.args.output_dir or ".")
        self._settings: dict[str, Any] = {
            "metric": self.metric,
            "direction": direction or _direction_of(trainer.args, self.metric, stop),
            "resource": resource,
            "stop": stop,
            "name": name or self.output_dir.resolve().name or "run",
        }
        self._carbon, self._watts = carbon_factor(carbon), watts
        self._fresh: dict[str, Any] | None = None
        self._passes = Passes()
        self._begin()
        self._fresh = None if stop is None else stop.state_dict()

    @property
    def log(self) -> RunLog:
        """The books of the training that runs, or of the last."""
        return self._log

    def summary(self) -> str:
        """What was spent and gained so far, in lines to print."""
        return self._log.summary()

    def _begin(self) -> None:
        """New books; the rule as it was when it was given."""
        self._passes.detach()
        self._passes = Passes()
        if self.stop is not None and self._fresh is not None:
            self.stop.load_state_dict(self._fresh)
        on_gpus = self.trainer.args.device.type == "cuda"
        ledger = Ledger(watts=self._watts, carbon=self._carbon, gpus=on_gpus)
        self._log = RunLog(**self._settings, ledger=ledger)
        self._log.output_dir = self.output_dir  # whether it can be written is asked when training begins
        self._pending: dict[str, float] = {}
        self._per_token: Figure | None = None
        self._steps = 0
        self._counted: Counted | None = None
        self._has_begun = False
        self._is_noted = False
        self._is_refused = False
        self._mark = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the books, or go on with those of the checkpoint."""
        self._begin()
        if state.is_world_process_zero:
            require_writable(self.output_dir)
        log, books = self._log, state.stateful_callbacks.get(STATE_KEY)  # type: ignore[union-attr]
        if books is not None and state.global_step:
            with log.keeping("what was spent before the resumption"):
                log.load_state_dict(books["log"])
                if books["flops_per_token"] is not None:
                    self._set_per_token(Figure.from_dict(books["flops_per_token"]))
        with log.keeping("what is known of the model"):
            log.about |= facts_of(self._model(), args)
        with log.keeping("tokens"):
            self._passes.attach(self.trainer.model_wrapped)
        log.ledger.start()
        log.settle()
        if self.stop is not None and log.resource not in ("tokens", "flops"):  # these are known with the first step
            log.require_resource()
        self._has_begun = True
        self._mark = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send what the last step left to be logged; count FLOPs in one step."""
        if self._is_refused:
            self._refuse_metric()
        if self._pending:
            self._send(control)
        self._steps += 1
        if self._steps == COUNTED_STEP and (self._per_token is None or self._per_token.how != "measured"):
            with self._log.keeping("counted FLOPs"):
                if not self._is_unseen():
                    self._passes.start_counting()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting: all micro-batches of the step went by, and what was generated for them, as TRL's GRPO does."""
        if self._passes.is_counting:
            self._stop_counting()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step's tokens; add up where the Trainer logs, evaluates or saves."""
        if tokens := self._passes.take():
            self._log.step(tokens)
        if self._per_token is None:
            self._model_flops()
        if self._counted is not None and self._per_token is not None:
            self._set_per_token(per_token(self._counted, self._per_token, state.global_step))
            self._counted = None
        if not self._is_noted:
            self._is_noted = True
            self._note_optimizer()
        self._add_up(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up where the Trainer logs, evaluates or saves."""
        self._add_up(args, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the training loss; check the rule if that is its metric. With the Trainer's last words send the totals."""
        if not self._has_begun or not logs:
            return
        if "train_loss" in logs:  # in on_train_end trackers have ended their runs
            self._log.settle()
            self._pending = self._figures()
            self._send(control)
        if "loss" not in logs:
            return
        rate = _learning_rate(self.trainer)
        self._log.note_loss(float(logs["loss"]), step=state.global_step, learning_rate=rate)
        if self.metric == "loss":
            self._check({"loss": float(logs["loss"])}, state, control)
        self._mark = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a point of the record of it, and check the rule."""
        if not self._has_begun:
            return
        self._log.seconds["evaluating"] += time.perf_counter() - self._mark
        found = {
            key: float(value)
            for key, value in (metrics or {}).items()
            if isinstance(value, int | float) and not key.endswith(_NO_METRICS)
        }
        self._check(found, state, control)
        is_of_evaluations = self.stop is not None and self.metric != "loss"
        # the evaluation of another data set at this step may still bring it
        self._is_refused = is_of_evaluations and not any(self.metric in point.metrics for point in self._log.points)
        self._send(control)
        self._mark = time.perf_counter()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no counter of energy go round unseen in a long evaluation."""
        if self._has_begun:
            with self._log.keeping("the meters"):
                self._log.ledger.look_if_due()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record."""
        self._log.seconds["saving"] += time.perf_counter() - self._mark
        self._log.save()
        self._mark = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the books: the last figures, the record, and a line in the log."""
        self._passes.detach()
        self._note_optimizer()
        self._has_begun = False
        self._log.finish()

    def _add_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """In every process alike: what the Trainer itself decides from steps and epochs, it decides in all of them."""
        is_scheduled = control.should_log or control.should_evaluate
        if is_scheduled or (control.should_save and _saves_now(args, state, control)):
            self._log.settle()
            if is_scheduled:
                self._pending = self._figures()
        if is_scheduled or control.should_save:
            self._store(state)
        self._mark = time.perf_counter()

    def _check(self, metrics: Mapping[str, float], state: TrainerState, control: TrainerControl) -> None:
        progress = min(1.0, state.global_step / state.max_steps) if state.max_steps > 0 else None
        decision = self._log.evaluate(
            metrics, step=state.global_step, learning_rate=_learning_rate(self.trainer), progress=progress
        )
        self._pending = self._figures()
        if decision is not None:
            said = {"marginal_return": decision.ratio, "threshold": decision.threshold, "below": decision.below}
            self._pending |= {PREFIX + key: value for key, value in said.items() if value is not None}
            if decision.stop:
                control.should_training_stop = True
        self._store(state)

    def _store(self, state: TrainerState) -> None:
        """Put the books where the Trainer's next checkpoint takes them from."""
        flops = None if self._per_token is None else self._per_token.to_dict()
        books = {"log": self._log.state_dict(), "flops_per_token": flops}
        state.stateful_callbacks[STATE_KEY] = books  # type: ignore[index, call-overload]

    def _figures(self) -> dict[str, float]:
        return {PREFIX + name: value for name, value in self._log.spent().items()}

    def _send(self, control: TrainerControl) -> None:
        """Log what is pending. Not in the event of a logging step itself: TRL's trainers would take their own averages
        into this record, and have none left for the loss's.
        """
        figures, self._pending = self._pending, {}
        should_log = control.should_log
        if figures:
            self.trainer.log(figures)
        control.should_log = should_log  # logging takes it back

    def _refuse_metric(self) -> None:
        point = self._log.points[-1]
        raise BlueprintError(
            f"The evaluation of step {point.step} has no {self.metric!r}, by which MarginalReturn is to judge; it has "
            f"{', '.join(sorted(point.metrics)) or 'no metric'}. Give LedgerCallback(metric=...) one of these."
        )

    def _stop_counting(self) -> None:
        with self._log.keeping("counted FLOPs"):
            self._counted = self._passes.stop_counting()

    def _note_optimizer(self) -> None:
        if self.trainer.optimizer is not None:
            self._log.note_optimizer(self.trainer.optimizer)

    def _is_unseen(self) -> bool:
        """Whether FLOPs run where the counter does not see them: compiled, or in other threads or processes."""
        args = self.trainer.args
        return args.n_gpu > 1 or self.trainer.is_deepspeed_enabled or is_compiled(self.trainer.model_wrapped)

    def _model_flops(self) -> None:
        """The cost model's FLOPs per token, from the shape of the last micro-batch."""
        shape = self._passes.shape
        if shape is None:
            why = (
                "the model is given no input_ids" if self._passes.calls else "the model was not called by its forward"
            )
            self._set_per_token(absent(f"no tokens were seen: {why}"))
            return
        figure = absent("no model of the costs")
        with self._log.keeping("modelled FLOPs"):
            figure = modelled_flops(self._model(), *shape)
        self._set_per_token(figure)

    def _set_per_token(self, figure: Figure) -> None:
        self._per_token = figure
        self._log.ledger.flops_per_token = figure

    def _model(self) -> nn.Module:
        model: nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        return model


def _metric_of(args: TrainingArguments, metric: str | None, stop: MarginalReturn | None) -> str:
    is_evaluated = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    if metric is None and not is_evaluated:
        if stop is not None:
            raise BlueprintError(
                "MarginalReturn judges by evaluations, and eval_strategy is 'no'. Set eval_strategy='steps' and eval_steps "
                "in the training arguments, or give LedgerCallback(metric='loss') to judge by the training loss."
            )
        return "loss"
    if metric == "loss":
        return metric
    name = metric or args.metric_for_best_model or "eval_loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def _direction_of(args: TrainingArguments, metric: str, stop: MarginalReturn | None) -> Direction | None:
    best = args.metric_for_best_model
    if best is not None and args.greater_is_better is not None and metric in (best, f"eval_{best}"):
        return "maximize" if args.greater_is_better else "minimize"
    return None if stop is not None else direction_of(metric)


def _saves_now(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
    """Whether the save that is due is one of the schedule, which all processes know; a signal may reach one alone."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    on_step = strategy == "steps" and state.save_steps > 0 and state.global_step % state.save_steps == 0
    return on_step or strategy == "epoch" or state.global_step >= state.max_steps


def _learning_rate(trainer: Trainer) -> float | None:
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    return float(groups[0]["lr"]) if groups else None
