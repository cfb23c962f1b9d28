"""State of a running measurement: tensors saved from each layer's input, and the statistics made of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from ..blueprint import Submodule
from . import gradients
from .experts import ExpertRecorder, Stack
from .options import SKETCH_SIZE, MeasureOptions


class Recorder:
    """Collect norms of the current batch and sketches of all batches.

    The forward pass calls `keep` with each layer's input and saves the returned tensors. The backward pass calls
    `record` with those and the gradient of the layer's output.

    Args:
        submodules: the rows.
        options: method, sketch size, projection size and seed.
        stacks: the fused parameters whose experts are rows.
    """

    def __init__(self, submodules: Sequence[Submodule], options: MeasureOptions, stacks: Sequence[Stack] = ()):
        self.submodules = submodules
        self.projection_size = options.projection_size
        self._fold = (
            partial(gradients.fold, size=self.projection_size, seed=options.seed) if self.projection_size else None
        )
        self.method = options.method
        self.sketch_size = options.sketch_size
        self.seed = options.seed
        self.called: set[int] = set()  # submodules whose layers were called since this was last cleared
        self.refused: dict[int, str] = {}  # reasons for submodules that turned out not to be measurable
        self.repeated: set[int] = set()  # submodules called several times in a pass: their gradients are summed
        self.is_mixed = False  # the rows of a layer do not say which example they belong to
        self._example_first: set[int] = set()  # layers known to take (examples, tokens, features)
        self._sketches: dict[int, Tensor] = {}
        self._answer_sketches: dict[int, Tensor] = {}
        self._without_answers: set[int] = set()  # submodules whose positions are not known in some batch
        self._matrices: dict[tuple[int, int | None, torch.device, torch.dtype], Tensor | None] = {}
        self.experts = ExpertRecorder(submodules, options, stacks, self._matrix)
        self.begin(0)

    def begin(
        self,
        examples: int,
        lengths: Collection[int] = (),
        loss_scale: float = 1.0,
        answers: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Discard the current batch, if any, and start one of so many examples, of one of these lengths.

        `answers`, (examples, tokens), marks positions from each example's first prediction of a target on; `mask` those
        that are not padding.
        """
        self.examples, self.lengths, self.loss_scale, self.answers = examples, lengths, loss_scale, answers
        self.experts.begin(examples, lengths, loss_scale, mask)
        self._batch_answers: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._errors: dict[int, Tensor] = {}
        self._batch_sketches: dict[int, Tensor] = {}
        self._products: dict[int, Tensor] = {}
        self._projections: dict[int, Tensor] = {}
        self._shared = _SharedInput(torch.empty(0), None)

    def keep(self, index: int, inputs: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        """Choose what to save of an input X (…, d_in): "whole" X, its "sketch" XΩ, or "gram", XΩ and the Gram matrix."""
        if not self._shared.holds(inputs):
            rows = gradients.by_example(inputs, self.examples, self.lengths)
            self._shared = _SharedInput(inputs, None if rows is None else rows.to(gradients.statistics_dtype(rows)))
        shared = self._shared
        if shared.x is None or self._may_be_turned(index, inputs):
            self.is_mixed = True
            return "nothing", ()
        how = self._how(index, shared.x, shared.gram is not None)
        if how == "whole":
            return how, (shared.x,)
        if shared.sketch is None:
            matrix = self._matrix(shared.x.shape[2], shared.x, self.sketch_size)
            shared.sketch = shared.x if matrix is None else shared.x @ matrix
        if how == "sketch":
            return how, (shared.sketch,)
        if shared.gram is None:
            shared.gram = gradients.gram(shared.x)
        return how, (shared.sketch, shared.gram)

    def record(self, index: int, how: str, kept: tuple[Tensor, ...], output_gradient: Tensor) -> None:
        """Record one call of a submodule, from the saved part of its input and dY (…, d_out)."""
        dy = gradients.by_example(output_gradient, self.examples, self.lengths)
        if how == "nothing" or dy is None:
            self.is_mixed = True
            return
        kept = tuple(tensor.to(dy.device) for tensor in kept)
        dy = self._unscaled(dy, kept[0].dtype)
        d_in = self.submodules[index].d_in
        if index in self._norms:
            self.repeated.add(index)  # the batch is measured again, now summing this submodule's gradients
        self._record_answers(index, kept[0], dy)
        narrow = self._narrowed(kept[0], d_in)
        fold = self._fold if narrow is kept[0] else None  # otherwise the projections are made of another product
        if index in self.repeated:
            product = gradients.per_example_gradients(kept[0], dy).float()
            self._add_product(index, product)
            projections = None if fold is None else gradients.folded(product, fold)
        elif how == "gram":
            self._norms[index] = gradients.gram_norms(kept[1], dy)
            self._batch_sketches[index], projections = gradients.summed(kept[0], dy, fold)
        else:
            self._norms[index], self._errors[index], total, projections = gradients.materialized(
                kept[0], dy, d_in, fold
            )
            self._batch_sketches[index] = self._sketched(total, d_in)
        if self._fold is not None and fold is None:
            _, projections = gradients.summed(narrow, dy, self._fold)
        self._add_projections(index, projections)

    def record_gradient(self, index: int, gradient: Tensor) -> None:
        """Record a parameter's gradient for a single example; (…, d_in), or (d,) as (d, 1)."""
        rows = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[:, None]
        product = self._unscaled(rows[None], gradients.statistics_dtype(gradient))
        if index in self._norms:
            self.repeated.add(index)
        self._add_projections(index, None if self._fold is None else self._fold(product.flatten(1)))
        if index in self.repeated:
            self._add_product(index, product.float())
        else:
            self._norms[index], _ = gradients.norms_of(product, rows.shape[1])
            self._batch_sketches[index] = self._sketched(product[0], rows.shape[1])

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return norms and relative errors (submodules, examples), projections (submodules, examples, m) and routing
        (submodules, examples, 2) of a batch.

        Call it after the backward pass. Rows that no gradient reached are zero.
        """
        for index, product in self._products.items():
            d_in = self.submodules[index].d_in
            self._norms[index], self._errors[index] = gradients.norms_of(product, d_in)
            self._batch_sketches[index] = self._sketched(product.sum(dim=0), d_in)
        self._shared = _SharedInput(torch.empty(0), None)
        projections = self._matrix_of(self._projections, self.projection_size)
        norms, errors = self._matrix_of(self._norms), self._matrix_of(self._errors)
        return norms, errors, projections, self.experts.fill(norms, errors)

    def commit(self) -> None:
        """Accept the batch: add its sketches to those of earlier batches."""
        self.experts.commit()
        for index, sketch in self._batch_sketches.items():
            self._sketches[index] = self._sketches[index] + sketch if index in self._sketches else sketch
            part = self._batch_answers.get(index)
            if part is None:
                self._without_answers.add(index)
            else:
                known = self._answer_sketches.get(index)
                self._answer_sketches[index] = part if known is None else known + part

    def refuse_repeated(self) -> None:
        """Refuse fused experts that a pass calls several times, whose gradients sum."""
        for stack in self.experts.repeated:
            rows = self.experts.stacks[stack].rows.values()
            self.refused |= dict.fromkeys(rows, "the model calls these experts several times in a pass")

    def unmeasured(self) -> dict[int, str]:
        """Return the reason by index for rows that no gradient reached."""
        reason = (
            "no gradient reached it: the loss does not depend on its output, or the model reads it without calling it"
        )
        return dict.fromkeys(set(range(len(self.submodules))) - self.sketches().keys(), reason) | self.refused

    def sketches(self) -> dict[int, Tensor]:
        """Return the sketches summed over all examples, (d_out, s), by row; zeros for an expert that no token visits."""
        found = {i: sketch.cpu() for i, sketch in self._sketches.items()} | self.experts.sketches()
        return found | self.experts.unvisited(found)

    def answer_sketch(self, index: int) -> Tensor | None:
        """Return the part of a row's sketch that comes from answer positions; None where positions were not known."""
        found = None if index in self._without_answers else self._answer_sketches.get(index)
        return None if found is None else found.cpu()

    def _record_answers(self, index: int, kept: Tensor, dy: Tensor) -> None:
        """Sketch the part of the batch's gradient that comes from answer positions."""
        if self.answers is None or index in self.repeated or dy.shape[:2] != self.answers.shape:
            return
        chosen = self.answers.to(dy.device)
        total = gradients.sketched_gradient(kept[chosen][None], dy[chosen][None])
        self._batch_answers[index] = self._sketched(total.to(kept.dtype), self.submodules[index].d_in)

    def _matrix_of(self, values: dict[int, Tensor], *width: int) -> Tensor:
        """Stack values as (submodules, examples, …) and move them to the CPU at once, which waits for a device only once."""
        zeros = torch.zeros(self.examples, *width, device=next(iter(values.values())).device if values else None)
        return torch.stack([values.get(i, zeros).to(zeros.device) for i in range(len(self.submodules))]).cpu()

    def _may_be_turned(self, index: int, inputs: Tensor) -> bool:
        """Return whether a layer may take tokens first, which a batch of as many examples as tokens does not show."""
        if self.examples == 1 or inputs.dim() == 2:
            return False
        if inputs.shape[1] != self.examples:
            self._example_first.add(index)
        return index not in self._example_first

    def _how(self, index: int, x: Tensor, gram_is_known: bool) -> str:
        _, tokens, d_in = x.shape
        d_out = (self.submodules[index].shape or (0,))[0]
        is_whole = self.method == "exact" or self.sketch_size is None or d_in <= 2 * self.sketch_size
        if index in self.repeated:
            return "whole" if is_whole else "sketch"
        if is_whole:
            return "gram" if gradients.prefers_gram(tokens, d_in, d_out, gram_is_known) else "whole"
        assert self.sketch_size is not None
        if self.method == "auto" and gradients.gram_is_nearly_free(tokens, d_in, d_out, self.sketch_size):
            return "gram"
        return "sketch"

    def _unscaled(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return gradient.to(dtype) if self.loss_scale == 1 else (gradient.float() / self.loss_scale).to(dtype)

    def _add_product(self, index: int, product: Tensor) -> None:
        self._products[index] = self._products[index] + product if index in self._products else product

    def _add_projections(self, index: int, projections: Tensor | None) -> None:
        if projections is not None:
            known = index in self._projections
            self._projections[index] = self._projections[index] + projections if known else projections

    def _narrowed(self, kept: Tensor, d_in: int) -> Tensor:
        """Return XΩ for the projections, also where X itself was saved; X where d_in is small."""
        if self._fold is None or kept.shape[2] != d_in:
            return kept
        matrix = self._matrix(d_in, kept, self.sketch_size or SKETCH_SIZE)
        return kept if matrix is None else kept @ matrix

    def _sketched(self, total: Tensor, d_in: int) -> Tensor:
        """Sketch a summed gradient (d_out, d_in); return a sketch unchanged."""
        matrix = self._matrix(d_in, total, self.sketch_size) if total.shape[1] == d_in else None
        return (total if matrix is None else total @ matrix).float()

    def _matrix(self, d_in: int, like: Tensor, size: int | None) -> Tensor | None:
        key = (d_in, size, like.device, like.dtype)
        if key not in self._matrices:
            matrix = gradients.sketch_matrix(d_in, size, self.seed)
            self._matrices[key] = None if matrix is None else matrix.to(like)
        return self._matrices[key]


class _SharedInput:
    """Values that layers with the same input (q, k and v; gate and up) compute once: X by example, XXᵀ and XΩ.

    It holds the tensor itself, so that no other tensor can take its address.
    """

    def __init__(self, inputs: Tensor, x: Tensor | None):
        self.inputs = inputs
        self.version = inputs._version
        self.x = x
        self.gram: Tensor | None = None
        self.sketch: Tensor | None = None

    def holds(self, inputs: Tensor) -> bool:
        """Return whether `inputs` is the same memory, unchanged."""
        mine = self.inputs
        return (
            inputs.data_ptr() == mine.data_ptr()
            and inputs._version == self.version
            and inputs.shape == mine.shape
            and inputs.stride() == mine.stride()
            and inputs.dtype == mine.dtype
            and inputs.device == mine.device
        )
