"""Measure every example's gradient norm in every submodule, in one forward and backward pass per batch.

The output of each linear layer passes through an identity whose backward computes the statistics. No weight needs a
gradient, so frozen and 4-bit weights are measured alike, and the backward pass skips the weights' gradients. Weights of
other kinds show their gradient one example at a time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._options import from_keywords
from .._progress import progress_bar
from .._text import format_names
from ..blueprint import Submodule, split_expert
from ..errors import MeasurementError
from .batches import Batch, Example, count_ahead, input_device, take_examples
from .borrowing import restored
from .distributed import ExampleStatistics, Processes, RawMeasurement, reshard
from .experts import Stack, groupable, hook_experts, stacks_of
from .hooks import disable_dropout, hook_gradients, hook_output, measurement_mode
from .influence import Influence
from .losses import (
    NEXT_TOKEN,
    Checks,
    LossFunction,
    Objective,
    UnknownObjective,
    answer_positions,
    check_examples_are_apart,
    count_examples,
    is_interleaved,
    split_examples,
    start_of,
)
from .options import MeasureOptions
from .recorder import Recorder
from .submodules import (
    Weight,
    find_submodules,
    find_weights,
    named_modules,
    require_model,
    select_submodules,
    structure_digest,
    top_k_of,
    unwrap,
    without_ddp,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FP16_LOSS_SCALE = 2.0**14
_SAME_EVERYWHERE = ("include", "method", "sketch_size", "projection_size", "experts", "seed")


@torch.inference_mode(False)
def measure_influence(
    model: nn.Module,
    batches: Iterable[Batch | Example],
    options: MeasureOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    submodules: Collection[str] | None = None,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    reduce: bool = True,
    checks: Checks | None = None,
    **keywords: Any,
) -> Influence:
    """Measure every example's gradient norm in every submodule, in one pass.

    The loss of an example is the mean over its own target tokens, so every example has the same weight, however long it
    is. Packed rows count as one example each. The weights do not change. Training flags and `requires_grad` are
    restored. Dropout is off, and gradient checkpointing is used if it was enabled.

    A batch is measured in one pass if its rows say which example they belong to. Examples are measured one at a time
    for weights that are not linear layers (fused experts, and everything that `include="all"` adds), models with
    experts, text with images or sound, and objectives that only the model itself can compute.

    Under `torchrun` or `accelerate launch` call it on every process, each with its own shard of the data. Each returns
    the measurement of all shards, examples in the order of ranks. The model may be replicated, with or without DDP, or
    sharded by FSDP2, where a process with fewer batches joins the others' passes with idle ones. A model that
    accelerate spreads over devices, CPU memory or disk (`device_map`) is measured in place. Gradient checkpointing then
    keeps the fetched weights from piling up until the backward pass.

    Args:
        model: a transformers model, or a `PeftModel` around one; frozen, trainable or quantized with bitsandbytes, in
            float32, bfloat16 or float16.
        batches: mappings of the model's inputs and `labels` (-100 where there is no target), such as a `DataLoader`; or
            examples, such as a `datasets.Dataset`, with text or token ids, see `encode_one`. They are cut at 512 tokens
            and measured 8 at a time.
        options: how to measure, see `MeasureOptions`.
        tokenizer: the model's, for examples with text.
        submodules: names of the submodules to measure, among those that `include` selects; all by default. The backward
            pass stops at the first of them, so measuring only late ones is cheaper.
        loss_fn: `loss_fn(model, batch)` → losses (B,) of the batch's B examples, for an objective other than the
            model's own. It may call the model several times, and on several rows per example. If an example's loss
            depends on other rows of the batch (contrastive), its norm is that of the summed losses' gradient through
            its own rows, and the batch can only be measured in one pass.
        progress: show a progress bar on the first process.
        reduce: combine the measurements of several processes. With False each process returns its own, of up to
            `max_examples` examples. Use it to measure on one process while the others do something else, but not with
            a model that is sharded over all of them.
        checks: from an earlier measurement of this model by the same objective, which is then not checked again.
        **keywords: fields of `MeasureOptions`.

    Returns:
        Norms (submodules, examples) with their errors, losses, sketches and projections.

    Raises:
        MeasurementError: without data, targets or measurable submodules, if a norm is not finite, or if another process
            failed or measured the same data.
        MismatchError: for names that the model does not have.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> influence = measure_influence(tiny_llama(), toy_batches(), method="exact", progress=False)
        >>> influence.norms.shape
        torch.Size([28, 8])
    """
    options = from_keywords(MeasureOptions, options, keywords, MeasurementError)
    require_model(model)
    model = without_ddp(model)
    processes = Processes(model, reduce)
    weights = {weight.name: weight for weight in find_weights(model)}
    if options.experts:
        options = replace(options, projection_size=0)
    rows = select_submodules(find_submodules(model, options.include, options.experts), submodules)
    plan = _Plan.of(rows, weights)
    if not plan.by_output and not plan.by_gradient and not plan.stacks:
        raise MeasurementError(
            f"{type(unwrap(model)).__name__} has no linear submodules to measure; give a transformers model."
        )
    recorder = Recorder(rows, options, plan.stacks)
    with processes.share_errors():
        passes = _Passes(model, recorder, Objective(model, loss_fn, checks), processes, plan.one_at_a_time)
        share = processes.share(options.max_examples)
        taken = take_examples(model, batches, share, tokenizer=tokenizer, loss_fn=loss_fn)
        reshard(model)
        with measurement_mode(model):
            total = count_ahead(batches, share, are_texts=tokenizer is not None) if progress else None
            own = _measure(taken, plan, passes, total, progress)
    settings = (structure_digest(rows), *(getattr(options, name) for name in _SAME_EVERYWHERE))
    found = processes.combine(own, settings)
    if not found.examples:
        raise MeasurementError("The batches are empty. Give at least one example.")

    unmeasured = {i: why for i, why in recorder.unmeasured().items() if i not in found.sketches} | plan.unmeasured
    measured = [i for i in range(len(rows)) if i not in unmeasured]
    if not measured:
        reasons = sorted(set(unmeasured.values()))
        raise MeasurementError(f"None of the {len(rows)} submodules could be measured: {reasons}.")
    norms, errors, projections, routing, losses, target_tokens = found.statistics
    norms = norms[measured]
    measured_rows = tuple(rows[i] for i in measured)
    broken = [s.name for s, row in zip(measured_rows, norms, strict=True) if not torch.isfinite(row).all()]
    if broken:
        raise MeasurementError(
            f"The gradient of {format_names(broken)} is infinite or NaN for some example. Look for NaN in the weights "
            "or the data; with float16 weights, load the model in bfloat16 or float32 instead."
        )
    wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if wrong:
        raise MeasurementError(
            f"The loss of examples {wrong[:5]} of {len(losses)} is infinite or NaN. Look at their labels, and for NaN in the "
            "weights or the data."
        )
    known = {row.name for row in rows} | {stack.weight.name for stack in plan.stacks}
    known = known | weights.keys() if submodules is not None else known
    return Influence(
        submodules=measured_rows,
        norms=norms,
        norm_errors=errors[measured],
        projections=projections if len(measured) == len(rows) else projections[measured],
        routing=routing[measured] if options.experts else None,
        losses=losses,
        target_tokens=target_tokens,
        sketches=tuple(found.sketches[i] / found.examples for i in measured),
        answer_sketches=tuple(
            found.answer_sketches[i] / found.examples if i in found.answer_sketches else None for i in measured
        ),
        sketch_size=options.sketch_size,
        seed=options.seed,
        method=options.method,
        tokens=found.tokens,
        unmeasured=tuple((rows[i].name, reason) for i, reason in sorted(unmeasured.items()))
        + tuple((w.name, _left_out(w)) for w in weights.values() if w.name not in known),
        data_digest=found.data_digest,
    )


def _measure(
    batches: Iterator[Batch], plan: _Plan, passes: _Passes, total: int | None, progress: bool
) -> RawMeasurement:
    """Measure all rows on this process's batches."""
    model, recorder, processes = passes.model, passes.recorder, passes.processes
    routing = 2 if recorder.experts.options.experts else 0
    parts = [ExampleStatistics.empty(len(recorder.submodules), recorder.projection_size, routing)]
    tokens, digest = 0, hashlib.sha256()
    with ExitStack() as stack:
        stack.callback(reshard, model)  # before `measurement_mode` unfreezes the weights
        for index, weight in plan.by_output.items():
            hook_output(weight.module, index, recorder.keep, recorder.record, recorder.called, recorder.refused)
        grouped = groupable(plan.stacks, passes.checks.grouped)
        stack.enter_context(hook_experts(dict(named_modules(model)), grouped, recorder.experts, top_k_of(model)))
        others = {i: each.weight for i, each in enumerate(plan.stacks) if i not in grouped}
        passes.one_at_a_time |= bool(others)
        rows = (*plan.by_gradient, *others)
        parameters = (*plan.by_gradient.values(), *others.values())

        def record(i: int, gradient: Tensor) -> None:
            gradient = gradient.mT if parameters[i].is_transposed else gradient
            (recorder.record_gradient if i < len(plan.by_gradient) else recorder.experts.record_gradient)(
                rows[i], gradient
            )

        stack.enter_context(hook_gradients([(weight.module, weight.parameter) for weight in parameters], record))
        is_quiet = not progress or processes.rank > 0
        bar = stack.enter_context(progress_bar(show=not is_quiet, total=total, unit="example", desc="Measuring"))
        batches = iter(processes.with_idle_batch(batches, input_device(model)))
        passes.find_in_lockstep()
        for batch in batches:
            for part in passes.measure(batch):
                parts.append(part)
                bar.update(len(part.losses))
            tokens += batch["input_ids"].numel() if "input_ids" in batch else 0
            for key in sorted(key for key, value in batch.items() if isinstance(value, Tensor)):
                digest.update(batch[key].cpu().flatten().view(torch.uint8).numpy().tobytes())
        while processes.must_idle():
            passes.idle()
    sketches = recorder.sketches()
    for i in recorder.refused:
        sketches.pop(i, None)
    return RawMeasurement(
        statistics=ExampleStatistics.concatenate(parts),
        sketches=sketches,
        answer_sketches={i: sketch for i in sketches if (sketch := recorder.answer_sketch(i)) is not None},
        tokens=tokens,
        data_digest=f"sha256:{digest.hexdigest()}",
    )


@dataclass(frozen=True)
class _Plan:
    """How every row is measured: by its layer's output, by its parameter's gradient, or not at all (and why)."""

    by_output: dict[int, Weight]
    by_gradient: dict[int, Weight]
    stacks: tuple[Stack, ...]
    unmeasured: dict[int, str]
    one_at_a_time: bool

    @classmethod
    def of(cls, submodules: Sequence[Submodule], weights: Mapping[str, Weight]) -> _Plan:
        others = [i for i, s in enumerate(submodules) if s.form not in ("linear", "head", "expert")]
        quantized = {
            i: "quantized, and not a linear layer"
            for i, s in enumerate(submodules)
            if s.quantized and s.form not in ("linear", "head")
        }
        return cls(
            by_output={i: weights[s.name] for i, s in enumerate(submodules) if s.form in ("linear", "head")},
            by_gradient={i: weights[submodules[i].name] for i in others if i not in quantized},
            stacks=stacks_of(submodules, weights),
            unmeasured=quantized,
            # experts in lists receive tokens in an order that does not say which example they belong to
            one_at_a_time=any(i not in quantized for i in others)
            or any(weight.form == "linear" and split_expert(name) is not None for name, weight in weights.items()),
        )


@dataclass
class _Passes:
    """Passes over batches. Facts about the model that a pass shows, such as layers called twice, hold for later ones."""

    model: nn.Module
    recorder: Recorder
    objective: Objective
    processes: Processes
    one_at_a_time: bool

    @property
    def checks(self) -> Checks:
        """Facts about the model, known before and after this measurement."""
        return self.objective.checks

    def measure(self, batch: Batch) -> Iterator[ExampleStatistics]:
        """Measure a batch in one pass or one example at a time."""
        self.objective.find(batch)
        self._refuse_uncalled(batch)
        self.one_at_a_time = self.one_at_a_time or self.objective.is_own
        if not self.one_at_a_time and not is_interleaved(self.model, batch):
            measured = self._pass(batch)
            if measured is not None:
                yield measured
                return
            self.one_at_a_time = True
        for example in split_examples(batch):
            loss_fn = self.objective.loss_fn
            if loss_fn is not None and not self.checks.examples_are_apart and not self.processes.in_lockstep:
                check_examples_are_apart(self.model, batch, loss_fn)
                self.checks.examples_are_apart = True
            measured = self._pass(example)
            assert measured is not None
            yield measured

    def _refuse_uncalled(self, batch: Batch) -> None:
        """Refuse layers that the model calls in evaluation mode, in which it is measured, but not in training mode."""
        if self.processes.in_lockstep:
            return
        names = {i: s.name for i, s in enumerate(self.recorder.submodules) if s.form in ("linear", "head")}
        known = self.checks.refused
        if not known.keys() >= set(names.values()):
            rows = {i for i, name in names.items() if "experts." not in name}  # which tokens reach, perhaps at random
            uncalled = rows - self._calls(batch, rows, training=True)
            if uncalled:
                uncalled &= self._calls(batch, set(), training=False)
            reason = "training uses its weight without calling it, so an adapter would have no effect"
            known |= {name: reason if i in uncalled else None for i, name in names.items()}
        self.recorder.refused |= {i: why for i, name in names.items() if (why := known[name]) is not None}

    def _calls(self, batch: Batch, otherwise: set[int], training: bool) -> set[int]:
        """Return the rows whose layers a pass calls over the start of the first example, or `otherwise` if it fails."""
        called, loss_fn = self.recorder.called, self.objective.loss_fn
        called.clear()
        with restored(self.model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.train(training)
            for module in self.model.modules():
                disable_dropout(module)
            try:
                example = start_of(next(split_examples(batch)))
                self.model(**example) if loss_fn is None else loss_fn(self.model, example)
            except Exception:  # models may need more than a start; the measurement itself does not
                return otherwise
        return set(called)

    def find_in_lockstep(self) -> None:
        """Find the objective of a model that is sharded over processes, which needs all of them for its pass."""
        if self.processes.idle_batch is not None:
            with self.processes.step(UnknownObjective):
                self.objective.find(self.processes.idle_batch, in_lockstep=True)
            if not self.processes.all_have(self.objective.form):
                self.objective.use_own()

    def idle(self) -> None:
        """Make a pass that is not recorded, because other processes make one over a sharded model."""
        assert self.processes.idle_batch is not None
        batch = self.processes.idle_batch
        if self.objective.is_own:
            batch = next(split_examples(batch))
        self.recorder.begin(count_examples(batch))
        with suppress(UnknownObjective):
            self.objective.at_once(batch)[0].sum().backward()

    def _pass(self, batch: Batch) -> ExampleStatistics | None:
        """Make a forward and a backward pass; return None if the examples of the batch cannot be told apart.

        The pass is repeated if a submodule turns out to be called twice in it, or float16 overflows.
        """
        recorder = self.recorder
        scale = FP16_LOSS_SCALE if next(self.model.parameters()).dtype == torch.float16 else 1.0
        examples = count_examples(batch)
        lengths = {value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1}
        answers = answer_positions(batch) if self.objective.form == NEXT_TOKEN else None
        mask = batch.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        while True:
            repeated = set(recorder.repeated)
            recorder.is_mixed = recorder.experts.is_mixed = False
            recorder.begin(examples, lengths, scale, answers, mask)
            try:
                with self.processes.step(UnknownObjective):
                    losses, tokens = self.objective.at_once(batch)
                    if len(losses) != examples:
                        raise MeasurementError(
                            f"loss_fn must return one loss an example, got {len(losses)} losses for a batch of "
                            f"{examples} examples (the rows of its first tensor)."
                        )
                    if losses.requires_grad:  # otherwise they depend on no row
                        (losses.sum() * scale).backward()
            except UnknownObjective:
                if examples > 1:
                    return None
                continue
            recorder.refuse_repeated()
            if recorder.is_mixed or recorder.experts.is_mixed:
                return None
            if recorder.repeated != repeated:
                continue
            norms, errors, projections, routing = recorder.finish()
            if scale > 1 and not torch.isfinite(norms).all():
                scale /= 4
                continue
            recorder.commit()
            return ExampleStatistics(norms, errors, projections, routing, losses.detach().float().cpu(), tokens.cpu())


def _left_out(weight: Weight) -> str:
    if weight.form == "head":
        return "an output or classification head; include='all' measures it"
    return f"not adaptable ({weight.form}); include='all' measures it"
