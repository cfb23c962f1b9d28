"""Log the gradient norms of what is trained, and write a blueprint at milestones of the training."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from accelerate.utils import DistributedType
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._files import require_writable
from .._text import format_names
from ..blueprint import Blueprint
from ..errors import BlueprintError
from ..measure import find_submodules, structure_digest, unwrap, versions


Detail = Literal["submodule", "kind"]
Part = Literal["adapter", "weight"]

PREFIX = "gradient_norm/"  # of the keys in the Trainer's log

_LOG = logging.getLogger(__name__)


class TrainedParameter(NamedTuple):
    """A parameter that takes a gradient, its submodule in the unwrapped model, and whether it belongs to an adapter."""

    submodule: str
    part: Part
    parameter: nn.Parameter


class BlueprintCallback(TrainerCallback):
    """Log the gradient norm of every trained submodule, and write a blueprint at milestones of the training.

    Add it to an existing Trainer: `trainer.add_callback(BlueprintCallback(trainer, every=50))`. Norms go through the
    Trainer's own `log`, so they reach the log history and every integration in `report_to`.

    A norm is that of the gradient the optimizer receives: accumulated over the batch, averaged over processes and, with
    `max_grad_norm`, clipped. Clipping scales all submodules alike, so their shares of `gradient_norm/total` remain. The
    Trainer's `grad_norm` is that total before clipping. All parameters trained for one submodule give one norm, under
    its name in the unwrapped model: LoRA's A and B with DoRA's magnitude, or the weight and its bias. With LoRA it is a
    norm over adapter weights, and A has no gradient while B is zero.

    A blueprint holds mean norms over the steps measured since the last milestone, or since training began or resumed.
    Its entries are adaptable submodules. Norms of other modules stand in its provenance, under `outside_submodules`.
    `examples` counts every measured batch as a full one. Steps with infinite or NaN norms are logged but not averaged.

    A measured step costs about one pass over the gradients and one device synchronization; other steps cost nothing.
    DDP and FSDP2 are supported: every process needs the callback, and the first writes the files.

    Args:
        trainer: the Trainer it is added to.
        every: steps between measurements. Milestones are measured besides.
        detail: "submodule", or "kind" for one logged norm for all `q_proj`, and so on, because hundreds of values fill
            a progress bar and `trainer_state.json`. Blueprints hold submodules in both cases.
        milestones: shares of the training in (0, 1] at which to write `blueprint-50.json`, and so on; `()` for none.
            That of 1 is written only if training reaches its last step.
        output_dir: folder for the blueprints; by default `output_dir` of the training arguments.

    Raises:
        BlueprintError: for invalid arguments, or if nothing that is trained can be measured. When training begins: if
            the folder cannot be written, or gradients cannot be read.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from peft_blueprint.testing import tiny_llama
        >>> trainer = Trainer(tiny_llama(), TrainingArguments("output"))
        >>> trainer.add_callback(BlueprintCallback(trainer, every=50, milestones=[0.5, 1.0]))
    """

    _due: dict[int, list[float]]  # step → shares of the training to write
    _pending: tuple[list[str], list[Tensor]] | None
    _window: _Window

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 50,
        detail: Detail = "submodule",
        milestones: Iterable[float] = (0.5, 0.8, 1.0),
        output_dir: str | Path | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise BlueprintError(
                f"trainer must be a Trainer, got {type(trainer).__name__}. Make the Trainer first, then call "
                "trainer.add_callback(BlueprintCallback(trainer))."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise BlueprintError(f"every must be a positive integer, got {every!r}.")
        if detail not in get_args(Detail):
            raise BlueprintError(f"detail must be one of {', '.join(get_args(Detail))}, got {detail!r}.")
        self.trainer = trainer
        self.every = every
        self.detail = detail
        self.milestones = tuple(sorted(set(milestones)))
        if outside := [share for share in self.milestones if not 0 < share <= 1]:
            raise BlueprintError(f"milestones must be in (0, 1], got {outside[0]}.")
        self.output_dir = Path(output_dir or trainer.args.output_dir or ".")
        self._find_trained()
        self._start()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find what is trained, and the steps of the milestones to come."""
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise BlueprintError(
                "FSDP version 1 flattens gradients, so they cannot be assigned to submodules. Use version 2: "
                "fsdp_config={'fsdp_version': 2}."
            )
        self._find_trained()
        self._start()
        for share in self.milestones:
            step = milestone_step(share, state.max_steps)
            if step > state.global_step:
                self._due.setdefault(step, []).append(share)
        if self._due and state.is_world_process_zero:
            require_writable(self.output_dir)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start computing the norms, if this step is to be measured."""
        step = state.global_step + 1
        if step % self.every and step not in self._due:
            return
        if self._fingerprint() != self._found_as:
            self._find_trained()
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None and not args.max_grad_norm:
            # without clipping, transformers 4.56 leaves fp16 gradients scaled until the optimizer's own step
            with contextlib.suppress(RuntimeError):  # already unscaled
                accelerator.unscale_gradients()
        read = [(name, p.grad) for name, _, p in self._trained if p.grad is not None]
        if not read:
            raise BlueprintError(
                f"None of the {len(self._trained)} trained parameters has a gradient before the optimizer step. "
                "DeepSpeed and layer-wise optimizers hide gradients: train without them, or without BlueprintCallback."
            )
        order, norms = start_norms([gradient for _, gradient in read])
        self._pending = [read[i][0] for i in order], norms

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the norms of a measured step, and write the blueprints that are due."""
        if self._pending is None:
            return
        names, norms = self._pending
        self._pending = None
        parts: dict[str, list[float]] = {entry.submodule: [] for entry in self._trained}
        for name, norm in zip(names, (norm for tensor in norms for norm in tensor.tolist()), strict=True):
            parts[name].append(norm)
        by_name = {name: math.hypot(*norms_of_one) for name, norms_of_one in parts.items()}
        self._window.add(state.global_step, by_name)

        should_log = control.should_log
        # not `self.trainer.log`: TRL's SFTTrainer adds its own averages to it and resets them
        Trainer.log(self.trainer, {PREFIX + name: value for name, value in self._to_log(by_name).items()})
        control.should_log = should_log  # `log` clears it, and the Trainer has not logged this step yet
        if state.global_step in self._due:
            for share in self._due.pop(state.global_step):
                if state.is_world_process_zero:
                    self._write(args, state, share)
            self._window = _Window()

    def _start(self) -> None:
        self._due, self._pending, self._window = {}, None, _Window()

    def _find_trained(self) -> None:
        accelerator = self.trainer.accelerator
        self._model = accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        self._trained = trained_parameters(self._model)
        self._parameters = tuple(self._model.parameters())
        self._found_as = self._fingerprint()
        self._submodules = {entry.name: entry for entry in find_submodules(self._model)}
        parts: dict[str, set[Part]] = defaultdict(set)
        for name, part, _ in self._trained:
            parts[name].add(part)
        self._gradient_of = {name: " and ".join(sorted(of_one)) for name, of_one in parts.items()}
        if not self._trained:
            raise BlueprintError(
                f"This {type(unwrap(self._model)).__name__} has no trainable parameters. Put an adapter on it with "
                "get_peft_model, or unfreeze it."
            )
        if self.milestones and not parts.keys() & self._submodules.keys():
            raise BlueprintError(
                f"A blueprint holds linear submodules, and only {format_names(sorted(parts))} is trained. Give "
                "milestones=() to log only."
            )

    def _fingerprint(self) -> tuple[list[bool], int]:
        """Return a value that changes with the set of trained parameters; faster than walking the modules."""
        optimizer = self.trainer.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        return [p.requires_grad for p in self._parameters], sum(len(group["params"]) for group in groups)

    def _to_log(self, norms: dict[str, float]) -> dict[str, float]:
        total = math.hypot(*norms.values())
        if self.detail == "kind":
            by_kind: dict[str, list[float]] = defaultdict(list)
            for name, norm in norms.items():
                submodule = self._submodules.get(name)
                kind = submodule.kind if submodule is not None else None
                by_kind[kind or name.rpartition(".")[2]].append(norm)
            norms = {kind: math.hypot(*of_kind) for kind, of_kind in by_kind.items()}
        return {**norms, "total": total}

    def _write(self, args: TrainingArguments, state: TrainerState, share: float) -> None:
        path = self.output_dir / f"blueprint-{100 * share:g}.json"
        try:
            self._blueprint(args, state, share).save(path)
        except BlueprintError as error:  # training is worth more than this file
            _LOG.warning("No blueprint at %g %% of the training: %s", 100 * share, error)

    def _blueprint(self, args: TrainingArguments, state: TrainerState, share: float) -> Blueprint:
        window, inner, means = self._window, unwrap(self._model), self._window.means()
        batch = state.train_batch_size if args.auto_find_batch_size else None
        examples = (batch or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size
        entries = tuple(
            replace(
                submodule,
                gradient_norm=means[name],
                examples=window.counts[name] * examples,
                extra={"gradient_of": self._gradient_of[name]},
            )
            for name, submodule in self._submodules.items()
            if name in means
        )
        if not entries:
            raise BlueprintError(f"no step since step {window.first} had finite norms. Lower the learning rate.")
        config = getattr(inner, "config", None)
        clipping = f"clipped to {args.max_grad_norm:g}" if args.max_grad_norm else "not clipped"
        parameter = self._trained[0].parameter
        return Blueprint(
            model_id=getattr(config, "_name_or_path", None) or type(inner).__name__,
            model_revision=getattr(config, "_commit_hash", None),
            model_digest=structure_digest(tuple(self._submodules.values())),
            training_checkpoint=share,
            submodules=entries,
            provenance={
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "method": "training",
                "statistic": "norm of the batch's gradient as the optimizer receives it, averaged over measured steps, "
                f"{clipping}; not a mean over examples",
                "gradients_of": sorted({self._gradient_of[entry.name] for entry in entries}),
                "checkpoint_of": "this training run",
                "steps_measured": window.steps,
                "steps_not_finite": window.not_finite,
                "first_step": window.first,
                "last_step": window.last,
                "max_steps": state.max_steps,
                "every": self.every,
                "examples_per_step": examples,
                "outside_submodules": {n: value for n, value in means.items() if n not in self._submodules},
                "seed": args.seed,
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "device": parameter.device.type,
                "versions": versions(),
            },
        )


@dataclass
class _Window:
    """Sums over the steps measured since the last milestone."""

    steps: int = 0
    not_finite: int = 0
    first: int | None = None
    last: int | None = None
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, step: int, norms: dict[str, float]) -> None:
        self.first, self.last = self.first or step, step
        if not all(math.isfinite(value) for value in norms.values()):
            self.not_finite += 1
            return
        self.steps += 1
        for name, value in norms.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / count for name, count in self.counts.items()}


def trained_parameters(model: nn.Module) -> tuple[TrainedParameter, ...]:
    """List every parameter that takes a gradient, with the submodule it is trained for.

    A module's weight and bias, its adapter's parameters, and the copy that PEFT trains in its place
    (`modules_to_save`) are listed under the module's name in the unwrapped model. Any other parameter is listed under
    its own name, such as `mlp.experts.gate_up_proj`.
    """
    inner = unwrap(model)
    paths = {id(parameter): path for path, parameter in inner.named_parameters()}
    found = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:  # a parameter outside the unwrapped model, as of a prompt encoder, keeps its path
            root, path = (inner, paths[id(parameter)]) if id(parameter) in paths else (model, path)
            found.append(TrainedParameter(*_owner(root, path.split(".")), parameter))
    return tuple(found)


def start_norms(gradients: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Compute the L2 norms of many tensors in a few calls, without waiting for the device.

    Args:
        gradients: tensors of any shape and dtype. For `DTensor`s, which every process must pass, the norms are those of
            the whole tensors.

    Returns:
        The order of the norms as indices into `gradients`, and the norms, float32, one tensor per device or mesh.
    """
    together: dict[Any, list[int]] = defaultdict(list)
    for i, gradient in enumerate(gradients):
        together[gradient.device_mesh if isinstance(gradient, DTensor) else gradient.device].append(i)
    norms = []
    for indices in together.values():
        stacked = torch.stack(torch._foreach_norm([gradients[i] for i in indices], 2, dtype=torch.float32))
        norms.append(stacked.full_tensor() if isinstance(stacked, DTensor) else stacked)
    return [i for indices in together.values() for i in indices], norms


def milestone_step(share: float, max_steps: int) -> int:
    """Return the first step at which this share of `max_steps` is done."""
    return max(1, math.ceil(round(share * max_steps, 6)))  # 0.07 · 100 is slightly above 7


def _owner(root: nn.Module, path: list[str]) -> tuple[str, Part]:
    """Return the name of the submodule that a parameter is trained for, and the part it belongs to."""
    owner: list[str] = []
    module: nn.Module = root
    for i, part in enumerate(path):
        if part in ("base_layer", "original_module") and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            pass
        elif isinstance(module, ParamWrapper):
            return _without_ending([*owner, module.parameter_name]), "adapter"
        elif isinstance(module, AuxiliaryTrainingWrapper) and part == "modules_to_save":
            copy = _owner(module.get_submodule(".".join(path[i : i + 2])), path[i + 2 :])
            return ".".join(filter(None, [*owner, copy[0]])), copy[1]
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return ".".join(owner), "adapter"
        else:
            owner.append(part)
        if i < len(path) - 1:
            module = module.get_submodule(part)
    return _without_ending(owner), "weight"


def _without_ending(path: list[str]) -> str:
    return ".".join(path[:-1] if path[-1] in ("weight", "bias") else path)
