"""Freeze adapters from below during training, by a schedule or by their marginal return."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ..errors import BlueprintError
from ..measure import disable_dropout, unwrap
from ..place import CostModel, Structure, Workload, workload_of
from .blueprint_callback import TrainedParameter, trained_parameters
from .frozen_prefix import CacheFrozenPrefix
from .joining import JoiningCallback


STATE_KEY = "peft_blueprint.frozen_below"  # in trainer_state.json's stateful_callbacks
STRATA = 8

_LOG = logging.getLogger(__name__)


def freeze_below(model: nn.Module, depth: int, optimizer: Any = None) -> tuple[str, ...]:
    """Freeze everything trained in the layers below a depth, and release its gradients and optimizer states.

    A frozen adapter acts as it does in evaluation: its dropout is set to 0. Parameters stay in the optimizer's groups,
    which skip a parameter without a gradient, so that a checkpoint taken afterwards still loads into a new optimizer.
    Modules outside of layers, such as a head, are left as they are.

    Args:
        model: with adapters or unfrozen blocks, possibly wrapped.
        depth: the layers 0 to `depth` - 1 are frozen.
        optimizer: torch's, bitsandbytes' or the one that accelerate prepared.

    Returns:
        Names of the submodules that were trained until now.

    Raises:
        BlueprintError: for a depth that leaves nothing trained.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(layers=4), LoraConfig(target_modules=["up_proj"]))
        >>> freeze_below(model, 2)
        ('model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj')
    """
    trained = trained_parameters(model)
    _require_rest(trained, depth)
    below = [entry for entry in trained if _is_below(entry, depth)]
    for entry in below:
        entry.parameter.requires_grad_(False)
        entry.parameter.grad = None
    for name, module in unwrap(model).named_modules():
        layer = _depth_in(name)
        if isinstance(module, LoraLayer) and layer is not None and layer < depth:
            for dropout in module.lora_dropout.values():
                disable_dropout(dropout)
    if optimizer is not None:
        _release(optimizer, [entry.parameter for entry in below])
    return tuple(dict.fromkeys(entry.submodule for entry in below))


class FreezeFromBelow(JoiningCallback):
    """Freeze adapters from the bottom up, so that later epochs cost less; with `CacheFrozenPrefix` far less.

    By a schedule, `"1:10, 2:20"` freezes the layers below 10 after the first epoch and those below 20 after the second.

    Without one, it decides at the end of every epoch by marginal return (the paper's ΔΨ/ΔΓ, section 3, for each part of
    the model). The layers are divided into strata. A step is predicted to lower the loss by Σ η·‖g‖₁ over the parameters
    (steepest descent with a step of η in every coordinate, as Adam's nearly is; arXiv:1802.04434), where the gradient
    norms are means over the epoch. The lowest trained stratum is frozen if its gain for each second that freezing it
    saves is below `threshold` times the rest's gain for each second of its step; then the next one is compared. At
    threshold 1 that is the rule that raises the total gain per second. Times are the cost model's. Gradient noise counts
    as gain, for all strata alike.

    Norms are read from the gradients that the optimizer receives. With DDP, give `ddp_find_unused_parameters=True`,
    because DDP otherwise waits for the gradients of frozen parameters. FSDP and DeepSpeed are refused.

    Args:
        schedule: text, or a mapping of epochs to layers; None to decide by marginal return.
        trainer: the Trainer, to check the schedule at once; by default the one that the callback is added to.
        threshold: see above; higher freezes earlier. Only without a schedule.
        strata: number of parts that the layers are divided into. Only without a schedule.
        every: steps between measurements of the gradients. Only without a schedule.
        workload: training step for the cost model; by default read off the model and the training arguments.

    Raises:
        BlueprintError: for a schedule that cannot be read, goes down, or leaves nothing trained.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import Trainer, TrainingArguments
        >>> from peft_blueprint.testing import tiny_llama
        >>> model = get_peft_model(tiny_llama(layers=4), LoraConfig(target_modules=["up_proj"]))
        >>> trainer = Trainer(model, TrainingArguments("output"), callbacks=[FreezeFromBelow("1:2, 2:3")])
    """

    def __init__(
        self,
        schedule: str | Mapping[float, int] | None = None,
        *,
        trainer: Trainer | None = None,
        threshold: float = 1.0,
        strata: int = STRATA,
        every: int = 10,
        workload: Workload | None = None,
    ) -> None:
        super().__init__(trainer)
        for name, value in (("strata", strata), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BlueprintError(f"{name} must be a positive integer, got {value!r}.")
        if not threshold > 0:
            raise BlueprintError(f"threshold must be a positive number, got {threshold!r}.")
        self.schedule = None if schedule is None else read_schedule(schedule)
        self.threshold, self.strata, self.every = threshold, strata, every
        self.depth = 0
        self._workload = workload
        self._sums: dict[int, torch.Tensor] = {}  # parameter's id → summed η·‖g‖₁
        self._costs: CostModel | None = None
        if trainer is not None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        for depth in (self.schedule or {}).values():
            _require_rest(trained_parameters(self._model), depth)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze the layers that a resumed run had frozen already."""
        super().on_train_begin(args, state, control)
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise BlueprintError(
                f"FreezeFromBelow does not support {accelerator.distributed_type.value}, which shards gradients and "
                "states when training begins. Use DDP."
            )
        if accelerator.num_processes > 1 and not args.ddp_find_unused_parameters:
            raise BlueprintError(
                "DDP waits for the gradients of frozen adapters. Set ddp_find_unused_parameters=True in the training "
                "arguments."
            )
        self.depth, self._sums = 0, {}
        if not state.global_step:
            return
        saved = state.stateful_callbacks.get(STATE_KEY)  # type: ignore[union-attr]
        self._freeze(self._due(state) if self.schedule is not None else int(saved or 0), state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add up the gradient norms of a measured step."""
        if self.schedule is not None or (state.global_step + 1) % self.every:
            return
        groups = [] if self.trainer.optimizer is None else self.trainer.optimizer.param_groups
        for group in groups:
            taken = [p for p in group["params"] if p.grad is not None]
            if not taken:
                continue
            for parameter in taken:
                gain = float(group["lr"]) * torch.linalg.vector_norm(parameter.grad, 1, dtype=torch.float32)
                held = self._sums.get(id(parameter))
                self._sums[id(parameter)] = gain if held is None else held + gain

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Freeze by the schedule or, at an epoch's last step, by the marginal return.

        A checkpoint of this step is written afterwards, and holds the decision.
        """
        if self.schedule is not None:
            self._freeze(self._due(state), state)
        elif math.isclose(state.epoch or 0.0, round(state.epoch or 0.0), abs_tol=1e-6):
            self._judge(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide by marginal return, if the data has no length that tells the epoch's last step."""
        self._judge(state)

    def _judge(self, state: TrainerState) -> None:
        if self._sums:
            self._freeze(self._decide(), state)
            self._sums = {}

    @property
    def _model(self) -> nn.Module:
        return cast(nn.Module, self.trainer.model)

    def _due(self, state: TrainerState) -> int:
        assert self.schedule is not None
        return max((depth for epoch, depth in self.schedule.items() if (state.epoch or 0) >= epoch - 1e-6), default=0)

    def _freeze(self, depth: int, state: TrainerState) -> None:
        if depth <= self.depth:
            return
        self.depth = depth
        frozen = freeze_below(self._model, depth, self.trainer.optimizer)
        state.stateful_callbacks[STATE_KEY] = depth  # type: ignore[index, call-overload]
        if state.is_world_process_zero:
            _LOG.info("Froze %d submodules below layer %d at epoch %.2f", len(frozen), depth, state.epoch or 0)

    def _decide(self) -> int:
        """Return the depth below which to freeze, by the rule above."""
        trained = trained_parameters(self._model)
        depths = [_depth_of(entry) for entry in trained]
        gains = [float(self._sums.get(id(entry.parameter), 0.0)) for entry in trained]
        top = max((depth for depth in depths if depth is not None), default=0)
        size = -(-(top + 1) // self.strata)
        ranks, unfrozen = _placement_of(trained)
        costs = self._cost_model()

        def time_above(depth: int) -> float:
            kept = {name: rank for name, rank in ranks.items() if (_depth_in(name) or 0) >= depth}
            whole = [name for name in unfrozen if (_depth_in(name) or 0) >= depth]
            return costs.step_time(costs.cost(kept, whole))

        chosen = self.depth
        for edge in range(size * (1 + min((d for d in depths if d is not None), default=0) // size), top + 1, size):
            inside = [d is not None and chosen <= d < edge for d in depths]
            above = [d is None or d >= edge for d in depths]
            gain = sum(value for value, is_in in zip(gains, inside, strict=True) if is_in)
            rest = sum(value for value, is_in in zip(gains, above, strict=True) if is_in)
            after = time_above(edge)
            saved = time_above(chosen) - after
            if saved <= 0 or gain * after >= self.threshold * rest * saved:
                break
            chosen = edge
        return chosen

    def _cost_model(self) -> CostModel:
        if self._costs is None:
            args, model = self.trainer.args, unwrap(self._model)
            callbacks = self.trainer.callback_handler.callbacks
            is_cached = any(isinstance(callback, CacheFrozenPrefix) for callback in callbacks)
            load = self._workload or workload_of(
                model,
                batch_size=args.per_device_train_batch_size,
                # from the second epoch on, all of the prefix is cached: its share of the first tends to 0
                epochs=10**6 if is_cached else 1,
            )
            self._costs = CostModel(Structure.of(model), load)
        return self._costs


def read_schedule(schedule: str | Mapping[float, int]) -> dict[float, int]:
    """Read a schedule of freezing, `"1:10, 2:20"` or `{1: 10, 2: 20}`: epochs and the layers below which to freeze.

    Raises:
        BlueprintError: if it cannot be read, or layers do not rise with epochs.

    Example:
        >>> read_schedule("1:10, 2.5:20")
        {1.0: 10, 2.5: 20}
    """
    form = "write epochs and layers as '1:10, 2:20': below layer 10 after epoch 1, below 20 after epoch 2"
    pairs: Iterable[Any] = (
        [part.split(":") for part in schedule.split(",")] if isinstance(schedule, str) else schedule.items()
    )
    try:
        read = sorted((float(epoch), int(depth)) for epoch, depth in pairs)
    except (TypeError, ValueError) as error:
        raise BlueprintError(f"schedule={schedule!r} cannot be read; {form}.") from error
    if not read or any(epoch <= 0 or depth < 1 for epoch, depth in read):
        raise BlueprintError(f"schedule={schedule!r} needs positive epochs and layers; {form}.")
    for (_, lower), (epoch, depth) in zip(read, read[1:], strict=False):
        if depth <= lower:
            raise BlueprintError(
                f"schedule={schedule!r} goes from layer {lower} to {depth} at epoch {epoch:g}: layers must rise."
            )
    return dict(read)


def _placement_of(trained: Iterable[TrainedParameter]) -> tuple[dict[str, int], list[str]]:
    """Return the ranks of adapters, and the modules trained whole, as the cost model takes them."""
    shapes: dict[str, list[int]] = defaultdict(list)
    whole = []
    for entry in trained:
        if entry.part == "weight":
            whole.append(entry.submodule)
        elif entry.parameter.dim() > 1:
            shapes[entry.submodule].append(min(entry.parameter.shape))
    return {name: min(sizes) for name, sizes in shapes.items()}, list(dict.fromkeys(whole))


def _require_rest(trained: tuple[TrainedParameter, ...], depth: int) -> None:
    if trained and all(_is_below(entry, depth) for entry in trained):
        raise BlueprintError(
            f"Freezing below layer {depth} would leave nothing trained: the highest trained layer is "
            f"{max(_depth_of(entry) or 0 for entry in trained)}. Choose a lower layer."
        )


def _release(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Delete the optimizer's states of these parameters, paged ones of bitsandbytes included."""
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    released = [optimizer.state.pop(parameter, {}) for parameter in parameters]
    pages = getattr(optimizer, "page_mng", None)
    if pages is not None:
        freed = {id(value) for state in released for value in state.values()}
        pages.paged_tensors = [tensor for tensor in pages.paged_tensors if id(tensor) not in freed]


def _is_below(entry: TrainedParameter, depth: int) -> bool:
    own = _depth_of(entry)
    return own is not None and own < depth


def _depth_of(entry: TrainedParameter) -> int | None:
    return _depth_in(entry.submodule)


def _depth_in(name: str) -> int | None:
    """Return the index of a module's layer; None outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
