"""Hold one measurement as an `Influence`: gradient norms by submodule and example, sketches, and derived statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blueprint import Submodule
from ..errors import MeasurementError, MismatchError
from .options import SKETCH_SIZE


# statistics of an entry that are made of the mean gradient
_OF_THE_MEAN_GRADIENT = (
    "signal_norm",
    "noise_scale",
    "adam_gain",
    "weight_gradient",
    "prompt_share",
    "prompt_adam_share",
    "singular_energy",
    "alpha",
    "gamma",
    "k_star",
)


@dataclass(frozen=True, eq=False)
class Influence:
    """Statistics of one pass over some examples. All tensors are on the CPU. Measurements of different examples merge.

    Args:
        submodules: the rows, without statistics.
        norms: (submodules, examples) float32; the L2 norm of the gradient of one example's mean token loss in one
            submodule; the paper's cross-influence tensor (eq. 32) at the level of submodules. The square of a sketched
            norm is unbiased, so the norm itself is too low by half its squared relative error.
        norm_errors: (submodules, examples) float32; predicted relative standard error of each norm, 0 where it is
            exact.
        projections: (submodules, examples, m) float32, every example's gradient, or its sketch, projected on m numbers.
            Inner products between examples of one submodule estimate those of their gradients without bias. Their
            standard error is at most about √(2/sketch_size + 2/m) of the product of norms, and smaller the more
            directions the gradients have. The sketch's part of it is common to gradients of the same directions. m is 0
            if none were kept. A gradient of at most m numbers is kept whole, in some order.
        losses: (examples,) float32; mean over an example's own target tokens, in nats.
        target_tokens: (examples,) int64.
        sketches: mean over examples of the gradient times Ω, (d_out, s) float32, of every submodule; the mean gradient
            itself where d_in ≤ 2·sketch_size. A parameter's leading dimensions count as rows.
        sketch_size: s; None if the mean gradients are kept whole.
        seed: seed of Ω.
        method: "exact", "sketch" or "auto".
        tokens: number of input positions read, padding included; 0 if the model reads no tokens.
        unmeasured: (name, reason) of every weight that is not among the rows.
        data_digest: `sha256:…` of the model's inputs, in order.
        answer_sketches: the part of every sketch that comes from positions from the first prediction of a target on;
            None, or empty, where positions are not known: models that predict no next token, vectors, experts.
        routing: (submodules, examples, 2) float32, of rows of experts: share of the example's routing choices that fall on
            the expert, and mean over its tokens of the router's weight (ESFT, arXiv:2407.01906); NaN where it
            is not known. None if experts were not measured.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> parts = [measure_influence(tiny_llama(), [batch], progress=False) for batch in toy_batches()]
        >>> influence = Influence.merge(parts)
        >>> influence.norms.shape, influence.examples, influence.submodules[0].name
        (torch.Size([28, 8]), 8, 'model.layers.0.self_attn.q_proj')
    """

    submodules: tuple[Submodule, ...]
    norms: Tensor
    norm_errors: Tensor
    projections: Tensor
    losses: Tensor
    target_tokens: Tensor
    sketches: tuple[Tensor, ...]
    sketch_size: int | None
    seed: int
    method: str
    tokens: int
    unmeasured: tuple[tuple[str, str], ...]
    data_digest: str
    answer_sketches: tuple[Tensor | None, ...] = ()
    routing: Tensor | None = None

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.norms.shape[1]

    @property
    def row_norms(self) -> tuple[Tensor, ...]:
        """Norms of the mean gradient's rows, (d_out,) of every submodule."""
        return tuple(torch.linalg.vector_norm(sketch, dim=1) for sketch in self.sketches)

    @property
    def mean_gradient_norms(self) -> Tensor:
        """Norm of the mean gradient over these examples, (submodules,); an estimate where it is sketched."""
        return torch.stack([torch.linalg.vector_norm(sketch) for sketch in self.sketches])

    @property
    def prompt_shares(self) -> Tensor:
        """Share of each mean gradient that arrives through prompt positions, (submodules,); NaN where not known.

        With G = P + A, the parts of prompt and answer positions, ⟨P, G⟩/‖G‖². Shares of prompt and answer sum to one;
        one of them is negative where the parts oppose each other. Answer-only adapters (activated LoRA) have A alone.
        """
        return torch.tensor([self.prompt_share([row])[0] for row in range(len(self.submodules))])

    @property
    def prompt_adam_shares(self) -> Tensor:
        """Share of each submodule's Adam gain that answer-only adapters lose, (submodules,); NaN where not known.

        1 − Σ_o‖A_o‖/Σ_o‖G_o‖ over rows o, see `adam_gain` of a blueprint. Negative where answers alone gain more.
        """
        return torch.tensor([self.prompt_share([row])[1] for row in range(len(self.submodules))])

    def prompt_share(self, rows: Sequence[int] | None = None) -> tuple[float, float]:
        """Return the shares of gradient and Adam's gain of some submodules together, such as those of a kind or layer.

        Args:
            rows: indices of submodules; by default all whose positions are known.

        Returns:
            As `prompt_shares` and `prompt_adam_shares`; NaN if positions are not known in one of the rows.

        Example:
            >>> from peft_blueprint import measure_influence
            >>> from peft_blueprint.testing import tiny_llama, toy_batches
            >>> influence = measure_influence(tiny_llama(), toy_batches(), progress=False)
            >>> late = [i for i, s in enumerate(influence.submodules) if s.depth == 3]
            >>> 0 < influence.prompt_share(late)[0] < influence.prompt_share()[0] < 1
            True
        """
        answers = self.answer_sketches or (None,) * len(self.submodules)
        if rows is None:
            rows = [row for row, answer in enumerate(answers) if answer is not None]
        inner = squares = gain = answer_gain = 0.0
        for row in rows:
            answer, whole = answers[row], self.sketches[row]
            if answer is None:
                return float("nan"), float("nan")
            inner += float((answer * whole).sum())
            squares += float(whole.square().sum())
            width = max(1, self.submodules[row].d_in) ** 0.5
            gain += float(torch.linalg.vector_norm(whole, dim=1).sum()) / width
            answer_gain += float(torch.linalg.vector_norm(answer, dim=1).sum()) / width
        if not squares:
            return float("nan"), float("nan")
        return 1 - inner / squares, 1 - answer_gain / gain

    @property
    def signal_norms(self) -> Tensor:
        """Norm of the expected gradient, (submodules,), without the bias that the noise of B examples adds.

        ‖E g‖² ≈ (B·‖ḡ‖² − mean‖g_b‖²)/(B − 1), 0 where that is negative; NaN for a single example.
        """
        return self._signal_squares().clamp_min(0).sqrt()

    @property
    def noise_scales(self) -> Tensor:
        """Gradient noise scale tr(Σ)/‖E g‖² in examples, (submodules,) (McCandlish et al. 2018, arXiv:1812.06162, A.1).

        About the batch size above which a larger batch stops helping. Infinite if there is no measurable signal.
        """
        n = self.examples
        noise = (self.norms.square().mean(dim=1) - self.mean_gradient_norms.square()) * n / (n - 1 or float("nan"))
        return noise.clamp_min(0) / self._signal_squares().clamp_min(0)

    @property
    def estimates(self) -> list[str]:
        """Names of the entries' statistics that come from sketches in some row; none if all are exact.

        `method="exact"` makes the norms exact. The mean gradient is whole where d_in ≤ 2·sketch_size, or everywhere with
        `sketch_size=None`; elsewhere its norm has a relative standard error of up to √(1/(2·sketch_size)), and
        `signal_norm` and `noise_scale`, which are differences, of more.
        """
        names: list[str] = []
        if self.norm_errors.any():
            names += ["gradient_norm", "median_norm", "norm_interval"]
        if any(self._is_sketched(row) for row in range(len(self.submodules))):
            names += _OF_THE_MEAN_GRADIENT
        if self.projections.shape[2] and not all(map(self._is_projected_whole, self.submodules)):
            names += ["influence", "influence_mismatch"]
        return names

    @property
    def example_norms(self) -> Tensor:
        """Gradient norm J(z) over all submodules together, (examples,) (eq. 27)."""
        return torch.linalg.vector_norm(self.norms, dim=0)

    @property
    def alignments(self) -> Tensor:
        """Inner products C of each example's gradient with the others' mean gradient, (submodules, examples).

        C[i, b] = ⟨g_b, mean of g_b′ over b′ ≠ b⟩, estimated from projections. The example itself is left out of the
        mean, so that its noise does not count as agreement. C[i, b] estimates ⟨g_b, E g⟩ without bias, and its mean
        over examples ‖E g‖², as `signal_norms` does. To first order a small gradient step on submodule i lowers example
        b's loss in proportion to C[i, b]. NaN for a single example.

        Raises:
            MeasurementError: if no projections were kept.
        """
        if not self.projections.shape[2]:
            raise MeasurementError(
                "Alignments need projections, and none were measured. Measure with projection_size=251."
            )
        sums = self.projections.sum(dim=1, keepdim=True)
        products = (self.projections * sums).sum(dim=2) - self.projections.square().sum(dim=2)
        return products / (self.examples - 1 or float("nan"))

    def singular_energy(self, rank: int, rows: Sequence[int] | None = None) -> Tensor:
        """Return the share of the mean gradient's energy ‖ḡ‖² in its `rank` leading left directions, (submodules,).

        From a sketch, each column of GΩ is projected on the leading directions of the others, so that directions fitted
        to noise count for nothing. This estimates from below, because the directions come from s − 1 columns (Halko et
        al. 2011, arXiv:0909.4061). Exact where the mean gradient is kept whole.

        Args:
            rank: number of directions.
            rows: indices of submodules; all by default.

        Raises:
            MeasurementError: for a rank below 1, or of the sketch's size or more.
        """
        return torch.stack(
            [self._energy(index, rank) for index in (range(len(self.submodules)) if rows is None else rows)]
        )

    def shows_rank(self, row: int, rank: int) -> bool:
        """Return whether a submodule's sketch has enough columns for this rank."""
        return rank >= 1 and (not self._is_sketched(row) or rank < self.sketches[row].shape[1])

    def left_directions(self, rank: int) -> tuple[Tensor, ...]:
        """Return the `rank` leading left singular vectors of every mean gradient, (d_out, ≤ rank).

        B of a LoRA adapter ΔW = BA learns in their span first.

        Raises:
            MeasurementError: for a rank below 1, or of the sketch's size or more.
        """
        for index in range(len(self.submodules)):
            self._check_rank(index, rank)
        return tuple(torch.linalg.svd(sketch, full_matrices=False).U[:, :rank] for sketch in self.sketches)

    @staticmethod
    def merge(parts: Sequence[Influence]) -> Influence:
        """Merge measurements of different examples on one model, without loss, because sketches add.

        Raises:
            MismatchError: if submodules, sketch size, projection size or seed differ.
        """
        first = parts[0]
        for part in parts[1:]:
            names, others = [s.name for s in first.submodules], [s.name for s in part.submodules]
            if names != others or first._settings != part._settings:
                raise MismatchError(
                    f"These measurements do not merge: {len(names)} submodules, {first._settings}, and {len(others)} "
                    f"submodules, {part._settings}. Measure with the same model and settings."
                )
        total = sum(part.examples for part in parts)
        return replace(
            first,
            norms=torch.cat([part.norms for part in parts], dim=1),
            norm_errors=torch.cat([part.norm_errors for part in parts], dim=1),
            projections=torch.cat([part.projections for part in parts], dim=1),
            losses=torch.cat([part.losses for part in parts]),
            target_tokens=torch.cat([part.target_tokens for part in parts]),
            sketches=tuple(
                torch.stack([part.sketches[i] * (part.examples / total) for part in parts]).sum(dim=0)
                for i in range(len(first.submodules))
            ),
            answer_sketches=_merged_answers(parts, total),
            routing=_merged_routing(parts),
            tokens=sum(part.tokens for part in parts),
            data_digest=joined_digest([part.data_digest for part in parts]),
        )

    @property
    def _settings(self) -> str:
        return f"sketch size {self.sketch_size}, projection size {self.projections.shape[2]}, seed {self.seed}"

    def _signal_squares(self) -> Tensor:
        n = self.examples
        squares = n * self.mean_gradient_norms.square() - self.norms.square().mean(dim=1)
        return squares / (n - 1 or float("nan"))

    def _is_sketched(self, index: int) -> bool:
        return self.sketches[index].shape[1] != self.submodules[index].d_in

    def _is_projected_whole(self, submodule: Submodule) -> bool:
        is_narrow = submodule.d_in <= 2 * (self.sketch_size or SKETCH_SIZE)
        return is_narrow and (submodule.parameters or 0) <= self.projections.shape[2]

    def _check_rank(self, index: int, rank: int) -> None:
        columns = self.sketches[index].shape[1]
        if not self.shows_rank(index, rank):
            raise MeasurementError(
                f"rank must be from 1 to {columns - 1}, because the sketch of {self.submodules[index].name!r} has {columns} "
                f"columns, got {rank}. Measure with sketch_size={max(2 * rank, 2)}."
            )

    def _energy(self, index: int, rank: int) -> Tensor:
        self._check_rank(index, rank)
        sketch = self.sketches[index]
        if not self._is_sketched(index):
            squares = torch.linalg.svdvals(sketch).square()
            return squares[:rank].sum() / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
        columns = torch.linalg.qr(sketch, mode="r").R.double()  # the same inner products in at most s dimensions
        outer = torch.einsum("ij,kj->jik", columns, columns)
        leading = torch.linalg.eigh(outer.sum(dim=0) - outer).eigenvectors[:, :, -rank:]  # of all columns but the jth
        held = torch.einsum("jir,ij->jr", leading, columns).square().sum()
        return (held / columns.square().sum().clamp_min(torch.finfo(torch.double).tiny)).float()


def _merged_answers(parts: Sequence[Influence], total: int) -> tuple[Tensor | None, ...]:
    """Return the mean of every row's answer sketches, where each part has one."""
    rows = zip(*(part.answer_sketches or (None,) * len(part.submodules) for part in parts), strict=True)
    merged: list[Tensor | None] = []
    for row in rows:
        known = [
            sketch * (part.examples / total) for sketch, part in zip(row, parts, strict=True) if sketch is not None
        ]
        merged.append(torch.stack(known).sum(dim=0) if len(known) == len(parts) else None)
    return tuple(merged)


def _merged_routing(parts: Sequence[Influence]) -> Tensor | None:
    known = [part.routing for part in parts if part.routing is not None]
    return torch.cat(known, dim=1) if len(known) == len(parts) else None


def joined_digest(digests: Sequence[str]) -> str:
    """Combine the digests of several parts of the data, in order; a single digest stays.

    Example:
        >>> joined_digest(["sha256:1"]), joined_digest(["sha256:1", "sha256:2"])[:7]
        ('sha256:1', 'sha256:')
    """
    if len(digests) == 1:
        return digests[0]
    return f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()}"
