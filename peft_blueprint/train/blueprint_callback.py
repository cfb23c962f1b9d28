"""What training shows of a blueprint by itself: gradient norms of what is trained, logged and written at milestones.

`BlueprintCallback` reads the gradients that are there anyway. It runs no pass of its own and knows nothing of the data.
"""

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
from ..blueprint import Blueprint, Submodule
from ..errors import BlueprintError
from ..measure import find_submodules, structure_digest, unwrap, versions


Detail = Literal["submodule", "kind"]
Part = Literal["adapter", "weight"]

PREFIX = "gradient_norm/"  # of the figures in the log

_LOG = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A parameter that is trained: whose it is, in the unwrapped model, and whether it is an adapter's."""

    name: str
    part: Part
    parameter: nn.Parameter


class BlueprintCallback(TrainerCallback):
    """Logs the gradient norm of every submodule that is trained, and writes a blueprint at milestones of the training.

    Add it to a trainer that is there, as in `trainer.add_callback(BlueprintCallback(trainer, every=50))`: figures are
    sent with the Trainer's own `log`, so that they reach the log history and whatever `report_to` names.

    A figure is the norm of what the optimizer is given: of the batch's accumulated gradient, averaged over processes
    and, if `max_grad_norm` is set, as it is in `TrainingArguments` by default, already clipped. Clipping scales all
    submodules alike, so that their shares of `gradient_norm/total` remain; the Trainer's `grad_norm` is that total from
    before. All that is trained for one submodule makes one figure, under its name in the unwrapped model: LoRA's A and
    B together, and DoRA's magnitude; or the weight and its bias. With LoRA it is thus a norm over adapters, and A has
    no gradient as long as B is zero.

    A blueprint's norms are means over the steps measured since the milestone before, or since training began or was
    resumed. It has the submodules an adapter can be put on; norms of other modules are in its provenance, under
    `outside_submodules`. Its `examples` are those of the measured batches, each counted as a full one. A step whose
    norms are not finite is logged and left out of the means.

    On other steps nothing is done. On a measured one, which costs about a pass over the gradients, the device is waited
    for once. DDP and FSDP2 are understood; every process must have the callback, and the first writes the files.

    Args:
        trainer: the Trainer it is added to.
        every: steps from one measurement to the next. Steps that reach a milestone are measured besides.
        detail: "submodule", or "kind" for one figure for all `q_proj` and so on: hundreds of figures are much for a
            progress bar, and stay in the checkpoints' `trainer_state.json`. Blueprints have submodules in any case.
        milestones: shares of the training, in (0, 1], at which `blueprint-50.json` and so on are written. That of 1 is
            written only if training reaches its last step. Empty for none.
        output_dir: where they go; by default `output_dir` of the training arguments.

    Raises:
        BlueprintError: for bad values; if nothing is trained, or nothing that a blueprint could name; when training
            begins, if the folder cannot be written or the gradients are kept where they cannot be read.
    """

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
                f"BlueprintCallback needs the trainer, not {type(trainer).__name__}: make the trainer first, then "
                "trainer.add_callback(BlueprintCallback(trainer))."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise BlueprintError(f"every={every!r} is no number of steps: give a whole number from 1.")
        if detail not in get_args(Detail):
            raise BlueprintError(f"detail={detail!r} is not known: give one of {', '.join(get_args(Detail))}.")
        self.trainer = trainer
        self.every = every
        self.detail = detail
        self.milestones = tuple(sorted(set(milestones)))
        for share in self.milestones:
            if not 0 < share <= 1:
                raise BlueprintError(
                    f"milestones={self.milestones} holds {share}, which is no share of the training: give numbers "
                    "above 0 and at most 1."
                )
        self.output_dir = Path(output_dir or trainer.args.output_dir or ".")
        self._due: dict[int, list[float]] = {}
        self._pending: tuple[list[str], list[Tensor]] | None = None
        self._window = _Window()
        self._find()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what is trained, and which milestones are still to come."""
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise BlueprintError(
                "FSDP's first version cuts gradients into pieces that no longer say whose they are. Use its second: "
                "fsdp_config={'fsdp_version': 2}."
            )
        self._find()
        self._pending, self._window, self._due = None, _Window(), {}
        for share in self.milestones:
            step = milestone_step(share, state.max_steps)
            if step > state.global_step:
                self._due.setdefault(step, []).append(share)
        if self._due and state.is_world_process_zero:
            require_writable(self.output_dir)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start computing the norms, if this step is to be measured."""
        step = state.global_step + 1
        if step % self.every and step not in self._due:
            return
        if self._fingerprint() != self._found_as:
            self._find()
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None and not args.max_grad_norm:
            # without clipping, transformers 4.56 leaves fp16 gradients scaled until the optimizer's own step
            with contextlib.suppress(RuntimeError):  # they are unscaled already
                accelerator.unscale_gradients()
        names, gradients = [], []
        for name, _, parameter in self._trained:
            if parameter.grad is not None:
                names.append(name)
                gradients.append(parameter.grad)
        if not gradients:
            raise BlueprintError(
                f"None of the {len(self._trained)} parameters that are trained has a gradient before the optimizer's "
                "step: DeepSpeed and layer-wise optimizers keep gradients to themselves. Train without them, or "
                "without BlueprintCallback."
            )
        order, norms = start_norms(gradients)
        self._pending = [names[i] for i in order], norms

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the norms of a measured step, and write what is due."""
        if self._pending is None:
            return
        names, norms = self._pending
        self._pending = None
        by_name: dict[str, list[float]] = {name: [] for name, _, _ in self._trained}
        for name, norm in zip(names, (norm for part in norms for norm in part.tolist()), strict=True):
            by_name[name].append(norm)
        figures = {name: math.hypot(*norms_of_one) for name, norms_of_one in by_name.items()}
        self._window.add(state.global_step, figures)

        should_log = control.should_log
        # not `self.trainer.log`: TRL's SFTTrainer empties its own averages into whatever goes through that
        Trainer.log(self.trainer, {PREFIX + name: value for name, value in self._figures_to_log(figures).items()})
        control.should_log = should_log  # logging takes it back, and the Trainer's own record of this step is to come
        if state.global_step in self._due:
            for share in self._due.pop(state.global_step):
                if state.is_world_process_zero:
                    self._write(args, state, share)
            self._window = _Window()

    def _find(self) -> None:
        """What is trained, and the submodules it belongs to."""
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        self._trained = trained_parameters(model)
        self._model = model
        self._parameters = tuple(model.parameters())
        self._found_as = self._fingerprint()
        self._submodules = {entry.name: entry for entry in find_submodules(model)}
        self._parts: dict[str, set[Part]] = defaultdict(set)
        for name, part, _ in self._trained:
            self._parts[name].add(part)
        if not self._trained:
            raise BlueprintError(
                f"No parameter of this {type(unwrap(model)).__name__} is trained, so that there is no gradient to "
                "read. Put an adapter on it with get_peft_model, or unfreeze it."
            )
        if self.milestones and not self._parts.keys() & self._submodules.keys():
            raise BlueprintError(
                f"None of what is trained ({format_names(sorted(self._parts))}) is a linear submodule, so that no "
                "blueprint could be written. Give milestones=() to log only."
            )

    def _fingerprint(self) -> tuple[list[bool], int]:
        """What changes when other parameters are trained than before; far quicker than to walk the model."""
        optimizer = self.trainer.optimizer
        groups = [] if optimizer is None else optimizer.param_groups
        return [p.requires_grad for p in self._parameters], sum(len(group["params"]) for group in groups)

    def _figures_to_log(self, figures: dict[str, float]) -> dict[str, float]:
        total = math.hypot(*figures.values())
        if self.detail == "kind":
            by_kind: dict[str, list[float]] = defaultdict(list)
            for name, value in figures.items():
                by_kind[self._kind_of(name)].append(value)
            figures = {kind: math.hypot(*values) for kind, values in by_kind.items()}
        return {**figures, "total": total}

    def _kind_of(self, name: str) -> str:
        submodule = self._submodules.get(name)
        return submodule.kind if submodule is not None and submodule.kind else name.rpartition(".")[2]

    def _write(self, args: TrainingArguments, state: TrainerState, share: float) -> None:
        path = self.output_dir / f"blueprint-{100 * share:g}.json"
        try:
            self._blueprint(args, state, share).save(path)
        except BlueprintError as error:  # hours of training are worth more than this file
            _LOG.warning("No blueprint at %g %% of the training: %s", 100 * share, error)

    def _blueprint(self, args: TrainingArguments, state: TrainerState, share: float) -> Blueprint:
        window, inner = self._window, unwrap(self._model)
        means = window.means()
        entries = [
            self._entry(submodule, means[name], window.counts[name] * _examples_per_step(args, state))
            for name, submodule in self._submodules.items()
            if name in means
        ]
        if not entries:
            raise BlueprintError(f"no step since step {window.first} had finite norms. Lower the learning rate.")
        config = getattr(inner, "config", None)
        clipping = f"clipped to {args.max_grad_norm:g}" if args.max_grad_norm else "not clipped"
        return Blueprint(
            model_id=getattr(config, "_name_or_path", None) or type(inner).__name__,
            model_revision=getattr(config, "_commit_hash", None),
            model_digest=structure_digest(tuple(self._submodules.values())),
            training_checkpoint=share,
            submodules=tuple(entries),
            provenance={
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "method": "training",
                "statistic": "mean over the measured steps of the norm of the batch's gradient as the optimizer is "
                f"given it, {clipping}; not a mean over examples",
                "gradients_of": sorted({self._label(entry.name) for entry in entries}),
                "checkpoint_of": "this training run",
                "steps_measured": window.steps,
                "steps_not_finite": window.not_finite,
                "first_step": window.first,
                "last_step": window.last,
                "max_steps": state.max_steps,
                "every": self.every,
                "examples_per_step": _examples_per_step(args, state),
                "outside_submodules": {n: value for n, value in means.items() if n not in self._submodules},
                "seed": args.seed,
                "dtype": str(self._trained[0].parameter.dtype).removeprefix("torch."),
                "device": self._trained[0].parameter.device.type,
                "versions": versions(),
            },
        )

    def _entry(self, submodule: Submodule, mean: float, examples: int) -> Submodule:
        return replace(
            submodule, gradient_norm=mean, examples=examples, extra={"gradient_of": self._label(submodule.name)}
        )

    def _label(self, name: str) -> str:
        return " and ".join(sorted(self._parts[name]))


@dataclass
class _Window:
    """Sums over the steps measured since the last milestone."""

    steps: int = 0
    not_finite: int = 0
    first: int | None = None
    last: int | None = None
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, step: int, figures: dict[str, float]) -> None:
        self.first, self.last = self.first or step, step
        if not all(math.isfinite(value) for value in figures.values()):
            self.not_finite += 1
            return
        self.steps += 1
        for name, value in figures.items():
            self.sums[name] += value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / count for name, count in self.counts.items()}


def trained_parameters(model: nn.Module) -> tuple[Trained, ...]:
    """Every parameter of a model that takes a gradient, with the submodule it is trained for.

    A module's weight and bias go by its name in the unwrapped model, and so does all that an adapter adds to it;
    copies that PEFT trains instead of a module (`modules_to_save`) go by that module's name. Any other parameter goes
    by its own, such as `mlp.experts.gate_up_proj`.
    """
    inner = unwrap(model)
    paths = {id(parameter): path for path, parameter in inner.named_parameters()}
    found = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:  # what is not in the unwrapped model, a prompt encoder say, keeps its own path
            root, path = (inner, paths[id(parameter)]) if id(parameter) in paths else (model, path)
            found.append(Trained(*_owner(root, path.split(".")), parameter))
    return tuple(found)


def start_norms(gradients: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """L2 norms of many tensors in a few calls, without waiting for the device.

    Args:
        gradients: of any shapes and dtypes, also `DTensor`s, whose norms are of the whole. With these every process
            must take part.

    Returns:
        The order in which the norms come, as indices of `gradients`; and the norms, float32, a tensor for each device
        or mesh.
    """
    together: dict[Any, list[int]] = defaultdict(list)
    for i, gradient in enumerate(gradients):
        together[gradient.device_mesh if isinstance(gradient, DTensor) else gradient.device].append(i)
    norms = []
    for indices in together.values():
        of_these = torch.stack(torch._foreach_norm([gradients[i] for i in indices], 2, dtype=torch.float32))
        norms.append(of_these.full_tensor() if isinstance(of_these, DTensor) else of_these)
    return [i for indices in together.values() for i in indices], norms


def milestone_step(share: float, max_steps: int) -> int:
    """The first step at which this share of `max_steps` is done."""
    return max(1, math.ceil(round(share * max_steps, 6)))  # 0.07 · 100 is a little more than 7


def _owner(root: nn.Module, path: list[str]) -> tuple[str, Part]:
    """The name of the submodule that a parameter is trained for, and whether it is part of an adapter."""
    owner: list[str] = []
    module: nn.Module = root
    for i, part in enumerate(path):
        if part in ("base_layer", "original_module") and isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            pass
        elif isinstance(module, ParamWrapper):
            return _name([*owner, module.parameter_name]), "adapter"
        elif isinstance(module, AuxiliaryTrainingWrapper) and part == "modules_to_save":
            copy = _owner(module.get_submodule(".".join(path[i : i + 2])), path[i + 2 :])
            return ".".join(filter(None, [*owner, copy[0]])), copy[1]
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return ".".join(owner), "adapter"
        else:
            owner.append(part)
        if i < len(path) - 1:
            module = module.get_submodule(part)
    return _name(owner), "weight"


def _name(path: list[str]) -> str:
    return ".".join(path[:-1] if path[-1] in ("weight", "bias") else path)


def _examples_per_step(args: TrainingArguments, state: TrainerState) -> int:
    batch = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
    return int((batch or args.train_batch_size) * args.gradient_accumulation_steps * args.world_size)
