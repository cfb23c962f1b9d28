"""The measurement: every example's gradient norm in every submodule, from one forward and one backward pass.

Each linear layer's output passes through an identity that, in the backward pass, computes the statistics from what was
kept of the input. No weight needs a gradient, so frozen and 4-bit weights are measured alike, and the weight gradients'
share of the backward pass is saved. What is not linear shows its gradient one example at a time. Knows nothing of files
or of what the numbers are for.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._text import format_names
from ..blueprint import PROJECTION_SIZE, SKETCH_SIZE, Include, Method, Submodule
from ..errors import MeasurementError
from .distributed import Findings, Processes, reshard
from .hooks import prepared, streamed, tapped
from .influence import Influence
from .losses import (
    LossFunction,
    UnknownObjective,
    check_examples_are_apart,
    count_examples,
    examples_of,
    is_interleaved,
    is_models_own,
    own_loss,
    per_example_losses,
)
from .recorder import Recorder
from .submodules import Weight, find_submodules, find_weights, is_sharded, named, structure_digest, unwrap, without_ddp


Batch = Mapping[str, Any]
_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

FP16_LOSS_SCALE = 2.0**14


def measure_influence(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    max_examples: int | None = None,
    method: Method = "auto",
    sketch_size: int | None = SKETCH_SIZE,
    projection_size: int = PROJECTION_SIZE,
    include: Include = "adaptable",
    submodules: Collection[str] | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
    reduce: bool = True,
) -> Influence:
    """Measure every example's gradient norm in every submodule, in one pass.

    The loss of an example is the mean over its own target tokens, so an example weighs the same however long it is;
    examples do not mix. Packed rows count as one example each. The model's weights are not touched, its training flags
    and `requires_grad` are restored, dropout is off, and gradient checkpointing is used where it was enabled.

    A batch is measured at once where its rows say which example they belong to. One example at a time are measured:
    what is not a linear layer (fused experts, and all that `include="all"` adds), models with experts, batches of text
    with images or sound, and objectives that only the model itself knows.

    Under `torchrun` or `accelerate launch` call it on every process, each with its own shard of the data: each returns
    the measurement of all shards together, examples in the order of ranks. The model may be whole on each process, in
    DDP or not, or sharded by FSDP2, where a process with fewer batches waits for the others with idle passes. A model
    that accelerate spreads over devices, the CPU's memory or a disk (`device_map`) is measured where it is; gradient
    checkpointing then keeps the fetched weights from piling up until the backward pass.

    Args:
        model: a transformers model, or a `PeftModel` around one; frozen, trainable or quantised with bitsandbytes, in
            fp32, bf16 or fp16.
        batches: mappings as the model takes them, with what its loss needs: `labels` (-100 where there is no target),
            as a rule. A `DataLoader` will do.
        max_examples: stop after so many; shared out evenly among processes that measure together.
        method: "exact" norms; "sketch", which keeps of every input only its projection on `sketch_size` directions,
            and costs little more than the pass itself; or "auto", exact where that is nearly free (layers with short
            inputs, or wide beside the number of tokens), else sketched.
        sketch_size: columns of the sketch, s. A sketched norm's relative error is at most √(1/(2s)), less the more
            directions the gradient has; `Influence.norm_errors` says how much. None keeps the mean gradients whole, in
            as much memory as the weights take in fp32, and makes "auto" exact.
        projection_size: m, numbers kept of every example's gradient in every submodule, 4·m bytes each, from which
            follows how examples and submodules agree (`Influence.alignments`); best a prime. 0 keeps none.
        include: "adaptable", the weights that an adapter may be put on, or "all".
        submodules: names of those to measure, of the ones that are included; by default all. The backward pass ends at
            the first of them, so that later ones alone cost less.
        loss_fn: `loss_fn(model, batch)` → losses (B,) of the batch's B examples, for an objective other than the
            model's own. It may call the model several times, on several rows an example too. Where an example's loss
            depends on other rows of the batch (contrastive), its norm is that of the summed losses' gradient through its
            own rows, and the batch can only be measured at once.
        seed: of the sketch and the projections.
        progress: show a progress bar, of the first process.
        reduce: unite the measurements of several processes. False gives each process its own, of up to `max_examples`
            examples; use it to measure on one process alone, while the others do something else (but not with a model
            that is sharded over all of them).

    Returns:
        Norms (submodules, examples) with their errors, losses, sketches and projections.

    Raises:
        MeasurementError: without data, targets or measurable submodules, if a norm is not finite, or if another process
            failed or measured the same data.
        MismatchError: for names that the model does not have.
    """
    _check_options(max_examples, include)
    model = without_ddp(model)
    processes = Processes(model, reduce)
    weights = {weight.name: weight for weight in find_weights(model)}
    rows = named(find_submodules(model, include), submodules)
    plan = _Plan.of(rows, weights)
    if not plan.tapped and not plan.streamed:
        raise MeasurementError(
            f"{type(unwrap(model)).__name__} has no linear submodules to measure; give a transformers model."
        )
    recorder = Recorder(rows, method, sketch_size, projection_size, seed)
    with processes.telling_errors():
        own = _find(model, batches, plan, recorder, loss_fn, processes, processes.share(max_examples), progress)
    settings = (structure_digest(rows), include, method, sketch_size, projection_size, seed)
    found = processes.united(own, settings)
    if not found.examples:
        raise MeasurementError("There is nothing to measure: the batches are empty. Give at least one example.")

    unmeasured = {i: why for i, why in recorder.unmeasured().items() if i not in found.sketches} | plan.unmeasured
    measured = [i for i in range(len(rows)) if i not in unmeasured]
    if not measured:
        reasons = sorted(set(unmeasured.values()))
        raise MeasurementError(f"None of the {len(rows)} submodules could be measured: {reasons}.")
    matrix = found.norms[measured]
    kept = tuple(rows[i] for i in measured)
    broken = [s.name for s, row in zip(kept, matrix, strict=True) if not torch.isfinite(row).all()]
    if broken:
        raise MeasurementError(
            f"The gradient of {format_names(broken)} is infinite or NaN for some example. Look for NaN in the weights or the "
            "data; with float16 weights, load the model in bfloat16 or float32 instead."
        )
    known = weights.keys() if submodules is not None else {row.name for row in rows}
    return Influence(
        submodules=kept,
        norms=matrix,
        norm_errors=found.errors[measured],
        projections=found.projections if len(measured) == len(rows) else found.projections[measured],
        losses=found.losses,
        target_tokens=found.target_tokens,
        sketches=tuple(found.sketches[i] / found.examples for i in measured),
        sketch_size=sketch_size,
        seed=seed,
        method=method,
        tokens=found.tokens,
        unmeasured=tuple((rows[i].name, reason) for i, reason in sorted(unmeasured.items()))
        + tuple((w.name, _left_out(w)) for w in weights.values() if w.name not in known),
        data_digest=found.data_digest,
    )


def _find(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: "_Plan",
    recorder: Recorder,
    loss_fn: LossFunction | None,
    processes: Processes,
    max_examples: int | None,
    progress: bool,
) -> Findings:
    """What this process's batches show of all rows."""
    parts: list[_Part] = []
    tokens, digest = 0, hashlib.sha256()
    reshard(model)
    with ExitStack() as stack:
        stack.enter_context(prepared(model))
        stack.callback(reshard, model)  # before `prepared` puts back what it froze
        for index, weight in plan.tapped.items():
            stack.enter_context(tapped(weight.module, index, recorder.keep, recorder.record))
        rows, parameters = tuple(plan.streamed), tuple(plan.streamed.values())

        def record(i: int, gradient: Tensor) -> None:
            recorder.record_gradient(rows[i], gradient.mT if parameters[i].is_transposed else gradient)

        stack.enter_context(streamed([(weight.module, weight.parameter) for weight in parameters], record))
        is_quiet = not progress or processes.rank > 0
        bar = stack.enter_context(tqdm(total=max_examples, unit="example", desc="Measuring", disable=is_quiet))
        measuring = _Measuring(model, recorder, loss_fn, plan.one_at_a_time, processes)
        device = device_of(model)
        for batch in processes.started(take_examples(batches, max_examples, device), device):
            for part in measuring.batch(batch):
                parts.append(part)
                bar.update(part[0].shape[1])
            tokens += batch["input_ids"].numel() if "input_ids" in batch else 0
            for key in sorted(key for key, value in batch.items() if isinstance(value, Tensor)):
                digest.update(batch[key].cpu().flatten().view(torch.uint8).numpy().tobytes())
        while processes.idles():
            measuring.idle_pass()
    unreached = recorder.unmeasured()
    nothing = torch.empty(len(recorder.submodules), 0)
    no_projections = torch.empty(*nothing.shape, recorder.projection_size)
    norms, errors, projections, losses, target_tokens = zip(
        (nothing, nothing, no_projections, torch.empty(0), torch.empty(0, dtype=torch.long)), *parts, strict=True
    )
    return Findings(
        norms=torch.cat(norms, dim=1),
        errors=torch.cat(errors, dim=1),
        projections=torch.cat(projections, dim=1),
        losses=torch.cat(losses),
        target_tokens=torch.cat(target_tokens),
        sketches={i: recorder.sketch(i) for i in range(len(recorder.submodules)) if i not in unreached},
        tokens=tokens,
        data_digest=f"sha256:{digest.hexdigest()}",
    )


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model wants its inputs, or None where hooks of its own move them, because its weights are offloaded."""
    is_elsewhere = any(
        p.is_meta or is_sharded(p) and p.device.type != p.device_mesh.device_type for p in model.parameters()
    )
    return None if is_elsewhere else next(model.parameters()).device


@dataclass(frozen=True)
class _Plan:
    """How every row is measured: tapped, or by its parameter's gradient."""

    tapped: dict[int, Weight]
    streamed: dict[int, Weight]
    unmeasured: dict[int, str]
    one_at_a_time: bool

    @classmethod
    def of(cls, submodules: Sequence[Submodule], weights: Mapping[str, Weight]) -> "_Plan":
        others = [i for i, s in enumerate(submodules) if s.form not in ("linear", "head")]
        quantized = {i: "quantised, and not a linear layer" for i in others if submodules[i].quantized}
        return cls(
            tapped={i: weights[s.name] for i, s in enumerate(submodules) if i not in others},
            streamed={i: weights[submodules[i].name] for i in others if i not in quantized},
            unmeasured=quantized,
            # experts see an example's tokens in no order that would say whose they are
            one_at_a_time=len(others) > len(quantized) or any("experts." in name for name in weights),
        )


class _Measuring:
    """Passes over batches. What they teach about the model (which layers are called twice, say) holds for the rest."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        loss_fn: LossFunction | None,
        one_at_a_time: bool,
        processes: Processes,
    ):
        self.model = model
        self.processes = processes
        self.recorder = recorder
        self.loss_fn = loss_fn
        self.one_at_a_time = one_at_a_time
        self.is_own_objective = False
        self.is_asked = False  # whether it was seen what the losses are
        self.scale = FP16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0

    def batch(self, batch: Batch) -> Iterator[_Part]:
        """Norms and errors (submodules, B'), projections (submodules, B', m), losses and target tokens (B',) of a batch,
        whole or example by example.
        """
        self._ask(batch)
        if not self.one_at_a_time and not is_interleaved(self.model, batch):
            measured = self._pass(batch)
            if measured is not None:
                yield measured
                return
            self.one_at_a_time = True
        for example in examples_of(batch):
            if self.loss_fn is not None and not self.is_asked and not self.processes.is_in_step:
                check_examples_are_apart(self.model, batch, self.loss_fn)
                self.is_asked = True
            measured = self._pass(example)
            assert measured is not None
            yield measured

    def idle_pass(self) -> None:
        """A pass that is not recorded, along with other processes' passes over a sharded model."""
        batch = self.processes.idle_batch
        assert batch is not None
        self._ask(batch)
        self.recorder.begin(count_examples(batch))
        try:
            self._losses(batch)[0].sum().backward()
        except UnknownObjective:
            self.is_own_objective = True

    def _ask(self, batch: Batch) -> None:
        """Before the first pass: whether the losses known here are the model's."""
        if self.loss_fn is None and not self.is_asked:
            # of a sharded model one process alone cannot ask
            self.is_own_objective = not is_models_own(self.model, batch, may_ask=not self.processes.is_in_step)
            self.one_at_a_time = self.one_at_a_time or self.is_own_objective
            self.is_asked = True

    def _pass(self, batch: Batch) -> _Part | None:
        """One forward and one backward pass, or None where the examples of a batch cannot be told apart in it.

        Made again if a submodule turns out to be called twice in it, or float16 overflows.
        """
        recorder, scale = self.recorder, self.scale
        examples = count_examples(batch)
        lengths = {value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1}
        while True:
            repeated = set(recorder.repeated)
            recorder.is_mixed = False
            recorder.begin(examples, lengths, scale)
            try:
                with self.processes.step(UnknownObjective):
                    losses, tokens = self._losses(batch)
                    if len(losses) != examples:
                        raise MeasurementError(
                            f"loss_fn returned {len(losses)} losses for a batch of {examples} examples (the rows of its "
                            "first tensor): it must return one an example."
                        )
                    (losses.sum() * scale).backward()
            except UnknownObjective:
                self.is_own_objective = True
                if examples > 1:
                    return None
                continue
            if recorder.is_mixed:
                return None
            if recorder.repeated != repeated:
                continue
            norms, errors, projections = recorder.finish()
            if scale > 1 and not torch.isfinite(norms).all():
                scale /= 4
                continue
            recorder.commit()
            return norms, errors, projections, losses.detach().float().cpu(), tokens.cpu()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return (
            own_loss(self.model, batch)
            if self.is_own_objective
            else per_example_losses(self.model, batch, self.loss_fn)
        )


def _check_options(max_examples: int | None, include: str) -> None:
    if max_examples is not None and max_examples < 1:
        raise MeasurementError(f"max_examples={max_examples} leaves nothing to measure: give at least 1, or None.")
    if include not in get_args(Include):
        raise MeasurementError(f"include={include!r}: choose adaptable or all.")


def _left_out(weight: Weight) -> str:
    if weight.form == "head":
        return "an output or classification head; include='all' measures it"
    return f"not adaptable ({weight.form}); include='all' measures it"


def take_examples(
    batches: Iterable[Batch], max_examples: int | None, device: torch.device | None
) -> Iterator[dict[str, Any]]:
    """Batches on the model's device, cut off after `max_examples`."""
    left = max_examples
    for batch in batches:
        if left == 0:
            return
        if not isinstance(batch, Mapping):
            raise MeasurementError(
                f"A batch is a mapping with labels, not a {type(batch).__name__}. For a single batch, give [batch]."
            )
        examples = count_examples(batch)
        taken = examples if left is None else min(left, examples)
        yield {
            key: _cut(value, taken, examples).to(device) if isinstance(value, Tensor) else _cut(value, taken, examples)
            for key, value in batch.items()
        }
        if left is not None:
            left -= taken
            if left == 0:
                return


def _cut(value: Any, taken: int, examples: int) -> Any:
    """The first rows, of what has a row for every example."""
    has_rows = isinstance(value, Tensor | list | tuple) and len(value) == examples
    return value[:taken] if has_rows and taken < examples else value
