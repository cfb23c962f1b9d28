"""`Influence`, what one measurement found: every example's gradient norm in every submodule, with the mean gradients'
sketches, and what follows from them.

Several measurements of different examples are one: statistics merge. Knows nothing of models or of how it was measured.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..blueprint import Submodule
from ..errors import BlueprintError, MeasurementError, MismatchError


@dataclass(frozen=True, eq=False)
class Influence:
    """What one pass over some examples measured. All tensors are on the CPU.

    Args:
        submodules: the rows, without statistics.
        norms: (submodules, examples) float32; the L2 norm of the gradient of one example's mean token loss in one
            submodule. The paper's cross-influence tensor (eq. 32) at the level of submodules. Where it is sketched its
            square is unbiased; the norm itself is then low by a share of half its squared relative error.
        norm_errors: (submodules, examples) float32; the predicted relative standard error of each norm as an estimate
            of that example's, 0 where it is exact.
        projections: (submodules, examples, m) float32, every example's gradient, or its sketch, projected on m numbers.
            Inner products between examples of one submodule estimate those of their gradients without bias, with a
            standard error of at most about √(2/sketch_size + 2/m) of the product of norms, and less the more directions
            the gradients have. The sketch's part of it is common to gradients of the same directions. m is 0 if none
            were kept. A gradient of no more than m numbers is here itself, in some order.
        losses: (examples,) float32; mean over an example's own target tokens, in nats.
        target_tokens: (examples,) int64.
        sketches: for every submodule the mean over examples of its gradient times Ω, (d_out, s) float32; the mean
            gradient itself where d_in ≤ 2·sketch_size. A parameter's leading dimensions count as rows.
        sketch_size: s; None where the mean gradients are kept whole.
        seed: of Ω.
        method: how the norms were measured, "exact", "sketch" or "auto".
        tokens: input positions read, padding included; 0 where the model reads none.
        unmeasured: (name, reason) of every weight that is not among the rows.
        data_digest: `sha256:…` of what the model was given, in order.
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

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.norms.shape[1]

    @property
    def row_norms(self) -> tuple[Tensor, ...]:
        """For every submodule the norms of the mean gradient's rows, (d_out,)."""
        return tuple(torch.linalg.vector_norm(sketch, dim=1) for sketch in self.sketches)

    @property
    def mean_gradient_norms(self) -> Tensor:
        """(submodules,) norm of the mean gradient over these examples; an estimate where it is sketched."""
        return torch.stack([torch.linalg.vector_norm(sketch) for sketch in self.sketches])

    @property
    def signal_norms(self) -> Tensor:
        """(submodules,) norm of the expected gradient, without the bias that the noise of B examples adds.

        ‖E g‖² ≈ (B·‖ḡ‖² − mean‖g_b‖²)/(B − 1), 0 where that is negative; NaN for a single example, which cannot tell
        signal from noise.
        """
        return self._signal_squares().clamp_min(0).sqrt()

    @property
    def noise_scales(self) -> Tensor:
        """(submodules,) tr(Σ)/‖E g‖² in examples (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

        About the batch size from which on a larger batch stops helping. Infinite where no signal was seen.
        """
        n = self.examples
        noise = (self.norms.square().mean(dim=1) - self.mean_gradient_norms.square()) * n / (n - 1 or float("nan"))
        return noise.clamp_min(0) / self._signal_squares().clamp_min(0)

    @property
    def example_norms(self) -> Tensor:
        """(examples,) J(z), the gradient norm over all submodules together (eq. 27)."""
        return torch.linalg.vector_norm(self.norms, dim=0)

    @property
    def alignments(self) -> Tensor:
        """(submodules, examples) C, how much each example's gradient agrees with the other examples' mean gradient.

        C[i, b] = ⟨g_b, mean of g_b′ over b′ ≠ b⟩, estimated from projections. The example itself is left out of the
        mean, so that its noise does not count as agreement: C[i, b] is without bias for ⟨g_b, E g⟩, and its mean over
        examples for ‖E g‖², which `signal_norms` estimates as well. To first order a small gradient step on submodule
        i lowers example b's loss in proportion to C[i, b]. NaN for a single example.

        Raises:
            MeasurementError: if no projections were kept.
        """
        if not self.projections.shape[2]:
            raise MeasurementError("There are no projections to align. Measure with projection_size=251.")
        sums = self.projections.sum(dim=1, keepdim=True)
        products = (self.projections * sums).sum(dim=2) - self.projections.square().sum(dim=2)
        return products / (self.examples - 1 or float("nan"))

    def singular_energy(self, rank: int, rows: Sequence[int] | None = None) -> Tensor:
        """(submodules,) share of the mean gradient's energy ‖ḡ‖² that its `rank` leading left directions hold.

        From a sketch, each column of GΩ is projected on the leading directions of the others, so that directions fitted
        to noise earn nothing; an estimate from below, since they come from s − 1 columns (Halko et al. 2011,
        arXiv:0909.4061, on what such directions miss). Exact where the mean gradient is kept whole. Of all submodules,
        or of some rows.

        Raises:
            MeasurementError: for a rank below 1, or not below the sketch's size.
        """
        return torch.stack(
            [self._energy(index, rank) for index in (range(len(self.submodules)) if rows is None else rows)]
        )

    def shows_rank(self, row: int, rank: int) -> bool:
        """Whether a submodule's sketch has columns enough for directions of this rank."""
        return rank >= 1 and (not self._is_sketched(row) or rank < self.sketches[row].shape[1])

    def left_directions(self, rank: int) -> tuple[Tensor, ...]:
        """For every submodule the `rank` leading left singular vectors of the mean gradient, (d_out, ≤ rank).

        They span what B learns first in a LoRA adapter ΔW = BA.

        Raises:
            MeasurementError: for a rank below 1, or not below the sketch's size.
        """
        for index in range(len(self.submodules)):
            self._check_rank(index, rank)
        return tuple(torch.linalg.svd(sketch, full_matrices=False).U[:, :rank] for sketch in self.sketches)

    @staticmethod
    def merge(parts: Sequence["Influence"]) -> "Influence":
        """Join measurements of different examples on one model; nothing is lost, since sketches add.

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

    def _check_rank(self, index: int, rank: int) -> None:
        columns = self.sketches[index].shape[1]
        if not self.shows_rank(index, rank):
            raise MeasurementError(
                f"rank={rank}: the sketch of {self.submodules[index].name!r} has {columns} columns, which show ranks from "
                f"1 to {columns - 1}. Measure with sketch_size={max(2 * rank, 2)}."
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


def joined_digest(digests: Sequence[str]) -> str:
    """The digest of data in several parts, from the parts' digests in order; of one part its own."""
    if len(digests) == 1:
        return digests[0]
    return f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()}"


COLUMNS = 16  # of the factor that a blueprint holds


def alignment_factor(alignments: ArrayLike, columns: int = COLUMNS) -> np.ndarray:
    """What a blueprint keeps of the alignments C (submodules n, examples B): U (n, ≤ columns) with UUᵀ ≈ Q = CCᵀ/B.

    Q is the second moment of the scores over examples, uncentred as an empirical Fisher matrix. U's first column is the
    mean over examples s = C·1/B, and it is exact: the basis of the examples is turned so that one direction is the
    constant one. The others are the leading principal components of C − s·1ᵀ, so that they hold the covariance: Q − ssᵀ.
    Rows are brought to one size before the components are taken, for submodules of large gradients would otherwise be
    all that is kept. An aggregate over examples; no example's own value is in it.

    Args:
        alignments: C, as `Influence.alignments`.
        columns: at most so many.

    Raises:
        BlueprintError: if C is no matrix of finite numbers.
    """
    matrix = np.asarray(alignments, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Alignments are a matrix (submodules, examples) of finite numbers, not of shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} that are not finite. Measure at least two examples."
        )
    means = matrix.mean(axis=1)
    sizes = np.sqrt(np.square(matrix).mean(axis=1, keepdims=True))
    sizes[sizes == 0] = 1.0
    centred = (matrix - means[:, None]) / (sizes * math.sqrt(matrix.shape[1]))
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(columns - 1, int((values > 1e-6).sum()))
    left = left[:, :kept] * np.sign(
        left[np.abs(left[:, :kept]).argmax(axis=0), range(kept)]
    )  # one sign for all machines
    return np.concatenate([means[:, None], sizes * left * values[:kept]], axis=1)
