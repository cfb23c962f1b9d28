"""Measure blueprints on validation data during training, and log the gradient norms of trained submodules."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from accelerate.utils import DistributedType
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .._files import require_writable
from .._options import from_keywords
from ..blueprint import Blueprint, file_name
from ..errors import BlueprintError, MeasurementError
from ..measure import Batch, GenerateOptions, LossFunction, find_submodules, generate_blueprint, unwrap
from ..runs import RunLog
from .joining import JoiningCallback


Detail = Literal["submodule", "kind"]
Part = Literal["adapter", "weight"]

PREFIX = "gradient_norm/"  # of the training norms in the Trainer's log
BLUEPRINT_PREFIX = "blueprint/"  # of a measured blueprint's figures there

_LOG = logging.getLogger(__name__)


class TrainedParameter(NamedTuple):
    """A parameter that takes a gradient, its submodule in the unwrapped model, and whether it belongs to an adapter."""

    submodule: str
    part: Part
    parameter: nn.Parameter


class BlueprintCallback(JoiningCallback):
    """Measure blueprints on validation data during training, and log the gradient norms of trained submodules.

    Add it as any callback: `SFTTrainer(..., callbacks=[BlueprintCallback()])`. It measures the model as
    `generate_blueprint` does at 50, 80 and 100 % of the planned steps (paper, §5) and after each evaluation, with
    intervals, alpha, gamma, k* and concentration. `blueprint-50.json` is the blueprint at half of `max_steps`. The same
    examples are measured every time: a random sample of `max_examples` of the Trainer's `eval_dataset`, collated once
    and kept in memory. The model, its gradients and the random state are left as they were. The Gini coefficient, the
    top share, gamma and k* go to the Trainer's own `log`, and so to every integration in `report_to`. An error in a
    measurement is a warning and never ends the run.

    Measuring an example costs 1.9 to 2.8 evaluations of it, and a blueprint about 3 CPU seconds once (SmolLM2-135M, one
    CPU thread). The number of measured examples is fixed, so the share of a validation's cost falls as its data grow: 64
    of 640 short examples are predicted to cost 29 % of their validation, 64 of 9,300 the 2 % of the paper (§5).

    With `every`, it also logs the gradient norm of every trained submodule. That norm is of the gradient the optimizer
    receives: accumulated over the batch, averaged over processes and, with `max_grad_norm`, clipped. Clipping scales all
    submodules alike, so their shares of `gradient_norm/total` remain. The Trainer's `grad_norm` is that total before
    clipping. All parameters trained for one submodule give one norm, under its name in the unwrapped model: LoRA's A and
    B with DoRA's magnitude, or the weight and its bias. With LoRA it is a norm over adapter weights, and A has no
    gradient while B is zero. A logged step costs about one pass over the gradients and one device synchronization.

    DDP and FSDP2 are supported: every process needs the callback, and the first writes the files.

    Args:
        trainer: the Trainer, to check the arguments at once; by default the one that the callback is added to.
        options: how to measure and summarize, see `GenerateOptions`; `max_examples` is 64 by default.
        eval_dataset: validation data in the form of the Trainer's, by default the Trainer's own. A mapping holds several
            domains: entries then get `domain_tags`, and the first one is the reference.
        milestones: shares of the planned steps in (0, 1] at which to measure; `()` for none. When the training is
            halted before 1, a blueprint of the last weights is written under the share that was done.
        at_evaluations: measure after each evaluation of the Trainer as well.
        every: steps between logged training norms; None for none.
        detail: "submodule", or "kind" for one logged norm for all `q_proj`, and so on, because hundreds of values fill
            a progress bar and `trainer_state.json`.
        output_dir: folder for the blueprints; by default `output_dir` of the training arguments.
        loss_fn: as for `generate_blueprint`, for an objective other than the model's own.
        **keywords: fields of `GenerateOptions`, such as `max_examples` and `model_id`.

    Raises:
        BlueprintError: for invalid arguments. When the Trainer is made or training begins: without validation data, or if
            `every` is given and nothing that is trained can be measured. When training begins: if the folder cannot be written, there are too few validation
            examples for the processes, or gradients cannot be read.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from peft_blueprint.testing import tiny_llama
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
        >>> callback = BlueprintCallback(milestones=[0.5, 1.0], max_examples=4)
        >>> arguments = TrainingArguments("output")
        >>> trainer = Trainer(tiny_llama(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    """

    _due: dict[int, list[float]]  # step → shares of the training to measure at
    _pending: tuple[list[str], list[Tensor]] | None  # names and norms of the step that is to be logged
    _domains: dict[str, list[Batch]]
    _files: dict[int, Path]  # step → blueprint of this run
    _measured_at: int | None
    _has_begun: bool

    def __init__(
        self,
        trainer: Trainer | None = None,
        options: GenerateOptions | None = None,
        *,
        eval_dataset: Any = None,
        milestones: Iterable[float] = (0.5, 0.8, 1.0),
        at_evaluations: bool = True,
        every: int | None = None,
        detail: Detail = "submodule",
        output_dir: str | Path | None = None,
        loss_fn: LossFunction | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(trainer)
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise BlueprintError(f"every must be a positive integer or None, got {every!r}.")
        if detail not in get_args(Detail):
            raise BlueprintError(f"detail must be one of {', '.join(get_args(Detail))}, got {detail!r}.")
        if "training_checkpoint" in keywords:
            raise BlueprintError("training_checkpoint is the share of the steps done: leave it out.")
        self.options = from_keywords(GenerateOptions, options, keywords, MeasurementError)
        self.at_evaluations = at_evaluations
        self.every = every
        self.detail = detail
        self.loss_fn = loss_fn
        self.milestones = tuple(sorted(set(milestones)))
        if outside := [share for share in self.milestones if not 0 < share <= 1]:
            raise BlueprintError(f"milestones must be in (0, 1], got {outside[0]}.")
        self._given: dict[str, Any] = {"eval_dataset": eval_dataset, "output_dir": output_dir}
        self.log: RunLog | None = (
            None  # a LedgerCallback of the same Trainer sets it, to count measuring as evaluating
        )
        self._start()
        if trainer is not None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        given = self._given["eval_dataset"]
        self.eval_dataset = trainer.eval_dataset if given is None else given
        if self.milestones and self.eval_dataset is None:
            raise BlueprintError(
                "A blueprint is measured on validation data, and the Trainer has none. Give eval_dataset=, or "
                "milestones=() to log training norms only."
            )
        self.output_dir = Path(self._given["output_dir"] or trainer.args.output_dir or ".")
        if self.every is not None:
            self._find_trained()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read the validation examples; find the trained parameters and the steps of the milestones to come."""
        super().on_train_begin(args, state, control)
        self._start()
        if self.every is not None:
            accelerator = self.trainer.accelerator
            if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
                raise BlueprintError(
                    "FSDP version 1 flattens gradients, so they cannot be assigned to submodules. Use version 2: "
                    "fsdp_config={'fsdp_version': 2}."
                )
            self._find_trained()
        for share in self.milestones:
            step = milestone_step(share, state.max_steps)
            if step > state.global_step:
                self._due.setdefault(step, []).append(share)
        is_evaluated = self.at_evaluations and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        if self.eval_dataset is not None and (self._due or is_evaluated):
            if state.is_world_process_zero:
                require_writable(self.output_dir)
            self._domains = self._read(state.train_batch_size or args.train_batch_size)
        if state.global_step and state.is_world_process_zero:
            self._files = self._of_this_run(state)
        self._has_begun = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start computing the training norms, if this step is to be logged."""
        if self.every is None or (state.global_step + 1) % self.every:
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
                "DeepSpeed and layer-wise optimizers hide gradients: train without them, or leave every out."
            )
        order, norms = start_norms([gradient for _, gradient in read])
        self._pending = [read[i][0] for i in order], norms

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the norms of a logged step, and measure the blueprints that are due."""
        if self._pending is not None:
            names, norms = self._pending
            self._pending = None
            parts: dict[str, list[float]] = {entry.submodule: [] for entry in self._trained}
            for name, norm in zip(names, (norm for tensor in norms for norm in tensor.tolist()), strict=True):
                parts[name].append(norm)
            by_name = {name: math.hypot(*norms_of_one) for name, norms_of_one in parts.items()}
            self._send({PREFIX + name: value for name, value in self._to_log(by_name).items()}, control)
        if state.global_step in self._due:
            self._measure(self._due.pop(state.global_step), state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure after an evaluation, once a step."""
        is_new = 0 < state.global_step != self._measured_at
        if self.at_evaluations and self._has_begun and self._domains and is_new:
            self._measure([state.global_step / state.max_steps], state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the last weights of a training that was halted, if the end was to be measured."""
        is_halted = 0 < state.global_step < state.max_steps and state.global_step != self._measured_at
        if is_halted and 1.0 in self.milestones and not args.load_best_model_at_end:
            self._measure([state.global_step / state.max_steps], state, control)
        self._has_begun = False
        self._domains = {}

    def checkpoints(self) -> tuple[Blueprint, ...]:
        """Return the blueprints that were measured nearest to the milestones, for a training that has ended.

        Milestones here are shares of the steps that were done, and `training_checkpoint` is set to the blueprint's
        share of these. Both differ from the planned shares in the files if the training was halted. Call it in the
        first process, which wrote the files.

        Raises:
            BlueprintError: if nothing was measured.
        """
        if not self._files:
            raise BlueprintError("No blueprint was measured. Call checkpoints() in the first process, after training.")
        last = max(self._files)
        steps = {min(self._files, key=lambda step: abs(step - share * last)) for share in self.milestones}
        return tuple(
            replace(Blueprint.from_pretrained(self._files[step]), training_checkpoint=round(step / last, 4))
            for step in sorted(steps)
        )

    def _start(self) -> None:
        self._due, self._pending, self._domains, self._files = {}, None, {}, {}
        self._measured_at, self._has_begun = None, False

    def _read(self, train_batch_size: int) -> dict[str, list[Batch]]:
        """Return this process's batches of every domain's validation examples."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        return {name: self._batches(dataset, train_batch_size, name) for name, dataset in sets.items()}

    def _batches(self, dataset: Any, train_batch_size: int, name: str) -> list[Batch]:
        args, count = self.trainer.args, self.options.max_examples
        try:
            known = range(len(dataset))
        except TypeError:  # a stream
            rows = list(islice(dataset, count))
        else:
            chosen = random.Random(self.options.seed).sample(known, min(len(known), count or len(known)))
            rows = [dataset[i] for i in sorted(chosen)]
        # a batch that fits a training step fits a measurement, which an evaluation's need not
        size = min(train_batch_size, args.per_device_eval_batch_size, len(rows) // args.world_size)
        if not size:
            raise BlueprintError(
                f"eval_dataset{f' {name!r}' * bool(name)} has {len(rows)} examples for {args.world_size} processes. Give "
                "at least one to each."
            )
        if args.world_size > 1:  # full batches alone, because accelerate fills others up with examples it has had
            rows = rows[: len(rows) // (size * args.world_size) * size * args.world_size]
        before, args.per_device_eval_batch_size = args.per_device_eval_batch_size, size
        try:
            with torch.random.fork_rng(devices=[]):
                return list(self.trainer.get_test_dataloader(rows))  # type: ignore[arg-type]
        finally:
            args.per_device_eval_batch_size = before

    def _of_this_run(self, state: TrainerState) -> dict[int, Path]:
        """Return the files of the training that is resumed, by step."""
        found = {}
        for path in self.output_dir.glob("blueprint-*.json"):
            with contextlib.suppress(BlueprintError):
                said = Blueprint.from_pretrained(path).provenance
                if said.get("max_steps") == state.max_steps and said.get("step", math.inf) <= state.global_step:
                    found[said["step"]] = path
        return found

    def _measure(self, shares: Sequence[float], state: TrainerState, control: TrainerControl) -> None:
        """Measure the model, write a file for each share of the planned steps, and log the concentration."""
        self._measured_at = state.global_step
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        try:
            with contextlib.nullcontext() if self.log is None else self.log.evaluating():
                measured = generate_blueprint(model, self._domains, self.options, loss_fn=self.loss_fn, progress=False)
            if state.is_world_process_zero:
                for share in (float(f"{share:.6g}") for share in shares):
                    about = {
                        "checkpoint_of": "this training run",
                        "step": state.global_step,
                        "max_steps": state.max_steps,
                    }
                    blueprint = replace(
                        measured, training_checkpoint=share, provenance={**measured.provenance, **about}
                    )
                    self._files[state.global_step] = blueprint.save(self.output_dir / file_name(checkpoint=share))
        except BlueprintError as error:  # training is worth more than this file
            _LOG.warning("No blueprint at step %d: %s", state.global_step, error)
            return
        self._send(_figures(measured), control)

    def _send(self, figures: dict[str, float], control: TrainerControl) -> None:
        should_log = control.should_log
        # not `self.trainer.log`: TRL's SFTTrainer adds its own averages to it and resets them
        with without_printing(self.trainer):
            Trainer.log(self.trainer, figures)
        control.should_log = should_log  # `log` clears it, and the Trainer may not have logged this step yet

    def _find_trained(self) -> None:
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        self._trained = trained_parameters(model)
        self._parameters = tuple(model.parameters())
        self._found_as = self._fingerprint()
        self._kinds = {entry.name: entry.kind for entry in find_submodules(model)}
        if not self._trained:
            raise BlueprintError(
                f"This {type(unwrap(model)).__name__} has no trainable parameters. Put an adapter on it with "
                "get_peft_model, or unfreeze it."
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
                by_kind[self._kinds.get(name) or name.rpartition(".")[2]].append(norm)
            norms = {kind: math.hypot(*of_kind) for kind, of_kind in by_kind.items()}
        return {**norms, "total": total}


@contextlib.contextmanager
def without_printing(trainer: Trainer) -> Iterator[None]:
    """Log to trackers and `log_history` alone, so that the console has one line a logging step."""
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    handler.callbacks = [one for one in callbacks if not isinstance(one, PrinterCallback | ProgressCallback)]
    try:
        yield
    finally:
        handler.callbacks = callbacks


def _figures(blueprint: Blueprint) -> dict[str, float]:
    """Return the figures of a blueprint for the Trainer's log."""
    found, tail = blueprint.concentration, blueprint.concentration.get("tail", {})
    figures = {name: found.get(name) for name in ("alpha", "gamma", "gamma_fit")}
    figures |= {name: tail.get(name, {}).get("value") for name in ("gini", "top_share", "effective_number")}
    figures["k_star"] = blueprint.costs.get("k_star")
    return {BLUEPRINT_PREFIX + name: float(value) for name, value in figures.items() if value is not None}


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
    """Compute the L2 norms of many tensors without waiting for the device.

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
        stacked = torch.stack([torch.linalg.vector_norm(gradients[i], dtype=torch.float32) for i in indices])
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
