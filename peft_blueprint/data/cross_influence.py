"""`CrossInfluence`: how strongly each example moves each submodule, as a matrix that can be kept, looked into and chosen
from, parameters together with data.

The arithmetic is in `joint` and `lowrank`. Knows nothing of models, or of how a choice is trained. Equation numbers are the paper's
(`theory`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from .._text import format_names
from ..errors import BlueprintError, FormatError, MeasurementError, MismatchError
from ..measure import normalise_within
from .cross_file import By, Of, read_matrix, write_matrix
from .joint import JointSelection, Side, best_pairs, exponent, require_share, separately, upper_bound
from .lowrank import LowRank, low_rank


if TYPE_CHECKING:
    from ..measure import Influence


@dataclass(frozen=True, eq=False)
class CrossInfluence:
    """The cross-influence matrix T (eq. 32) at the level of submodules.

    The entries are norms of gradients, as in the paper, unless asked otherwise. Sums of norms say how much is moved, not
    where to: two examples that pull apart count twice, and a wrong label counts much. The alignments say the latter: to
    first order the loss falls in proportion to their sum over S and D when submodules S step along examples D's gradient.
    Those of examples that harm are negative and count against, and shares may pass 1. They are noisier: of few examples
    what is captured of them is partly chance. Norms are the default since they are the paper's, positive, of one example
    each, and mergeable; neither is shown to choose better.

    Args:
        values: (submodules, examples) float32, read-only.
        names: of the submodules.
        kinds: of the submodules, where known.
        depths: of the submodules, where known.
        examples: (examples,) int64; what each is called, such as its position in the data set.
        of: "norms", or "alignments" for `Influence.alignments`.
        losses: (examples,) float32 in nats, where known.
        target_tokens: (examples,) int64, where known; a cost of examples.
        parameters: (submodules,) int64, where known; a cost of submodules.
        normalised: by what the values were divided, in order.
        data_digest: of the data, as the measurement has it.

    Raises:
        MeasurementError: for no submodule, no example, or values that are not finite, or negative norms.
        MismatchError: if lengths differ, or a name or id is there twice.
    """

    values: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str | None, ...]
    depths: tuple[int | None, ...]
    examples: np.ndarray
    of: Of = "norms"
    losses: np.ndarray | None = None
    target_tokens: np.ndarray | None = None
    parameters: np.ndarray | None = None
    normalised: tuple[By, ...] = ()
    data_digest: str = ""

    def __post_init__(self) -> None:
        if not np.issubdtype(np.asarray(self.examples).dtype, np.integer):
            raise MismatchError("Examples are called by whole numbers, such as positions in the data set.")
        for name, given in self._arrays.items():
            if given is not None:
                array = np.array(given, dtype=np.float32 if name in ("values", "losses") else np.int64)
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        if self.values.ndim != 2 or not self.values.size:
            raise MeasurementError(
                f"Values of shape {self.values.shape} are no matrix of submodules and examples. Measure at least one."
            )
        rows, columns = self.values.shape
        wrong = ~np.isfinite(self.values) | (self.values < 0 if self.of == "norms" else False)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise MeasurementError(
                f"{self.names[row] if row < len(self.names) else row!r} has {self.values[row, column]} of example "
                f"{column}, and {int(wrong.sum())} of {self.values.size} values are not finite or negative norms. Measure "
                "again, without the examples that overflow."
            )
        by_columns = ("examples", "losses", "target_tokens")
        lengths = {"names": len(self.names), "kinds": len(self.kinds), "depths": len(self.depths)}
        lengths |= {name: array.size for name, array in self._arrays.items() if array is not None and name != "values"}
        for name, length in lengths.items():
            if length != (columns if name in by_columns else rows):
                raise MismatchError(f"{length} {name} and {rows} × {columns} values do not pair: give one each.")
        if len(set(self.names)) < rows or len(np.unique(self.examples)) < columns:
            raise MismatchError(
                f"{rows} submodules have {len(set(self.names))} names, and {columns} examples "
                f"{len(np.unique(self.examples))} ids. Give each its own, such as positions in the whole data set."
            )

    @classmethod
    def from_influence(
        cls, influence: Influence, of: Of = "norms", examples: Sequence[int] | None = None
    ) -> CrossInfluence:
        """The matrix of one measurement.

        Args:
            influence: what `measure_influence` gives.
            of: "norms" or "alignments".
            examples: what each example is called; by default its position in the measurement.

        Raises:
            MeasurementError: if the values are not finite; for alignments of one example, or without projections.
            MismatchError: if the ids do not pair with the examples.
        """
        if of not in get_args(Of):
            raise BlueprintError(f"There is no {of!r} to choose by: norms or alignments.")
        if of == "alignments" and influence.examples < 2:
            raise MeasurementError("One example agrees with no other. Measure at least two for alignments.")
        shapes = [submodule.shape for submodule in influence.submodules]
        return cls(
            values=(influence.norms if of == "norms" else influence.alignments).numpy(),
            names=tuple(submodule.name for submodule in influence.submodules),
            kinds=tuple(submodule.kind for submodule in influence.submodules),
            depths=tuple(submodule.depth for submodule in influence.submodules),
            examples=np.arange(influence.examples) if examples is None else np.asarray(examples),
            of=of,
            losses=influence.losses.numpy(),
            target_tokens=influence.target_tokens.numpy(),
            parameters=np.array([math.prod(s) for s in shapes if s is not None]) if None not in shapes else None,
            data_digest=influence.data_digest,
        )

    @staticmethod
    def merge(parts: Sequence[CrossInfluence]) -> CrossInfluence:
        """Join norms of different examples on the same submodules, in this order. Normalise after, not before.

        Raises:
            MismatchError: if the submodules differ, ids are there twice, or the parts are alignments, which are against
                the mean of their own part: merge the `Influence`s then.
        """
        if not parts:
            raise MeasurementError("There are no parts to merge: give at least one.")
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            if part.of != "norms" or part.normalised:
                raise MismatchError(
                    f"Values of {part.of}, normalised by {', '.join(part.normalised) or 'nothing'}, do not merge. Merge "
                    "the measurements with Influence.merge, or normalise after merging."
                )
            if part.names != first.names:
                raise MismatchError(
                    f"These matrices do not merge: {len(first.names)} submodules ({format_names(first.names, 2)}) and "
                    f"{len(part.names)} ({format_names(part.names, 2)}). Measure with the same model and settings."
                )
        from ..measure import joined_digest

        return replace(
            first,
            values=np.concatenate([part.values for part in parts], axis=1),
            examples=np.concatenate([part.examples for part in parts]),
            losses=_joined([part.losses for part in parts]),
            target_tokens=_joined([part.target_tokens for part in parts]),
            data_digest=joined_digest([part.data_digest for part in parts]),
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all. It holds values of single examples: it is not for publishing.

        Raises:
            BlueprintError: if it cannot be written; what was there before is untouched.
        """
        record = {
            "names": self.names,
            "kinds": self.kinds,
            "depths": self.depths,
            "of": self.of,
            "normalised": self.normalised,
            "data_digest": self.data_digest,
        }
        write_matrix(Path(path), {k: array for k, array in self._arrays.items() if array is not None}, record)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> CrossInfluence:
        """Read what `save` wrote; its shapes are looked at before its numbers.

        Raises:
            BlueprintError: if there is no such file, or it cannot be read.
            FormatError: if it is no such file, of another version, cut short, or holds what cannot be.
        """
        try:
            return cls(**read_matrix(Path(path)))
        except (MeasurementError, MismatchError) as error:
            raise FormatError(f"{path}: {error}") from error

    def normalised_by(self, by: By) -> CrossInfluence:
        """The values over the mean absolute value of their kind, or of their example; several in turn.

        By kind, since norms of different kinds do not compare as they stand. By example, so that each counts alike,
        whatever its length and loss: what is left is which submodules it moves.

        Raises:
            BlueprintError: for anything else to normalise by.
        """
        values = self.values.astype(float)
        if by == "kind":
            means = np.abs(values).mean(axis=1)
            scales = (normalise_within(means, self.kinds) / np.where(means > 0, means, 1.0))[:, None]
        elif by == "example":
            means = np.abs(values).mean(axis=0)
            scales = 1 / np.where(means > 0, means, 1.0)
        else:
            raise BlueprintError(f"There is nothing called {by!r} to normalise by: kind or example.")
        return replace(self, values=values * scales, normalised=(*self.normalised, by))

    @property
    def submodule_totals(self) -> np.ndarray:
        """(submodules,) sums over examples."""
        return self.values.sum(axis=1, dtype=float)

    @property
    def example_totals(self) -> np.ndarray:
        """(examples,) sums over submodules."""
        return self.values.sum(axis=0, dtype=float)

    def low_rank(self, shuffles: int = 20, seed: int = 0) -> LowRank:
        """Singular values and what follows from them (eq. 33), see `joint.low_rank`.

        Raises:
            MeasurementError: for a single example.
            BlueprintError: for a matrix of zeros.
        """
        return low_rank(self._matrix(), shuffles, seed)

    def captured_share(self, submodules: Sequence[str], examples: Sequence[int]) -> float:
        """Share of the whole matrix in which some submodules and some examples meet (eq. 34).

        Args:
            submodules: names.
            examples: ids.

        Raises:
            BlueprintError: for a name or id that is not there, or if the whole does not have a positive sum.
        """
        rows = _positions(submodules, self.names, "submodules")
        columns = _positions(examples, self.examples.tolist(), "examples")
        return float(self.values[np.ix_(rows, columns)].sum(dtype=float)) / self._total()

    def separate(
        self, k: float, q: float, *, submodule_costs: ArrayLike | None = None, example_costs: ArrayLike | None = None
    ) -> float:
        """Captured by the submodules of the largest sums with the examples of the largest sums; arguments as `joint`."""
        rows, columns, matrix = *self._sides(k, q, submodule_costs, example_costs), self._matrix()
        return float(matrix[np.ix_(*separately(matrix, rows, columns))].sum()) / self._total()

    def exponents(
        self, *, submodule_costs: ArrayLike | None = None, example_costs: ArrayLike | None = None
    ) -> tuple[float, float]:
        """γ and δ of eq. 35, fitted to the curves of retained mass of submodules and of examples.

        Raises:
            MeasurementError: for a single example.
            BlueprintError: if the whole does not have a positive sum.
        """
        self._sides(1.0, 1.0, submodule_costs, example_costs)
        self._matrix()
        return exponent(self.submodule_totals, submodule_costs), exponent(self.example_totals, example_costs)

    def independent(
        self, k: float, q: float, *, submodule_costs: ArrayLike | None = None, example_costs: ArrayLike | None = None
    ) -> float:
        """k^γ·q^δ (eq. 35), what would be captured if parameters and data were independent; arguments as `joint`."""
        require_share("k", k)
        require_share("q", q)
        gamma, delta = self.exponents(submodule_costs=submodule_costs, example_costs=example_costs)
        return k**gamma * q**delta

    def joint(
        self,
        k: float,
        q: float,
        *,
        submodule_costs: ArrayLike | None = None,
        example_costs: ArrayLike | None = None,
        starts: int = 8,
        seed: int = 0,
    ) -> JointSelection:
        """Submodules and examples chosen for each other, by alternation from several starts (`joint.settle`).

        Each step takes the best of one side for what is chosen of the other, until nothing changes. The result captures
        at least what the separate choice does, and is no worse than any one step can make it; that it is the best is not
        guaranteed, and `bound` says how far from it it may be.

        Args:
            k: share of submodules, of their number or of their summed cost.
            q: share of examples, likewise.
            submodule_costs: (submodules,) positive, such as `parameters` or times of a step.
            example_costs: (examples,) positive, such as `target_tokens`.
            starts: random ones, beside the separate choice and the leading singular vectors.
            seed: of the random starts.

        Raises:
            BlueprintError: for shares outside (0, 1], costs that do not pair or are not positive, or if the whole does
                not have a positive sum.
            MeasurementError: for a single example.
        """
        rows, columns, matrix = *self._sides(k, q, submodule_costs, example_costs), self._matrix()
        total = self._total()
        gamma, delta = self.exponents(submodule_costs=submodule_costs, example_costs=example_costs)
        found = best_pairs(matrix, rows, columns, starts, seed)
        best = max(found.values(), key=lambda pair: pair.total)
        alone = separately(matrix, rows, columns)
        return JointSelection(
            submodules=tuple(self.names[i] for i in best.rows),
            examples=tuple(self.examples[best.columns].tolist()),
            share=best.total / total,
            separate=float(matrix[np.ix_(*alone)].sum()) / total,
            product=float(matrix[alone[0]].sum() * matrix[:, alone[1]].sum()) / total**2,
            independent=k**gamma * q**delta,
            bound=upper_bound(matrix, rows, columns) / total,
            gamma=gamma,
            delta=delta,
            k=k,
            q=q,
            iterations=len(best.history),
            starts=tuple((name, pair.total / total) for name, pair in found.items()),
        )

    def summary(self) -> str:
        """Some lines for people: what is in it, and its low-rank structure."""
        by = f", by {' and '.join(self.normalised)}" if self.normalised else ""
        rows, columns = self.values.shape
        return f"{self.of} of {rows} submodules × {columns} examples{by}\n{self.low_rank().summary()}"

    def to_dict(self) -> dict[str, Any]:
        """What `summary` says and the sums by submodule, for a file; nothing of a single example."""
        return {
            "of": self.of,
            "normalised": list(self.normalised),
            "submodules": len(self.names),
            "examples": len(self.examples),
            "data_digest": self.data_digest,
            "submodule_shares": dict(zip(self.names, (self.submodule_totals / self._total()).tolist(), strict=True)),
            "low_rank": self.low_rank().to_dict(),
        }

    @property
    def _arrays(self) -> dict[str, np.ndarray | None]:
        return {
            "values": self.values,
            "examples": self.examples,
            "losses": self.losses,
            "target_tokens": self.target_tokens,
            "parameters": self.parameters,
        }

    def _matrix(self) -> np.ndarray:
        """The values in double precision, of examples among which there is something to choose."""
        if self.values.shape[1] < 2:
            raise MeasurementError("There is one example, and nothing to choose among. Measure two or more.")
        return self.values.astype(float)

    def _total(self) -> float:
        total = float(self.values.sum(dtype=float))
        if not total > 0:
            raise BlueprintError(
                f"The {self.of} of {self.values.shape[1]} examples sum to {total:.3g}, so that there is nothing to capture "
                "a share of. Check the data; of alignments, measure more examples."
            )
        return total

    def _sides(
        self, k: float, q: float, submodule_costs: ArrayLike | None, example_costs: ArrayLike | None
    ) -> tuple[Side, Side]:
        rows, columns = self.values.shape
        return Side(rows, k, submodule_costs, "submodules"), Side(columns, q, example_costs, "examples")


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if len(known) == len(arrays) else None


def _positions(chosen: Sequence[Any], known: Sequence[Any], what: str) -> list[int]:
    """Sorted positions of names or ids, each once."""
    index = {one: i for i, one in enumerate(known)}
    missing = [one for one in chosen if one not in index]
    if missing:
        raise BlueprintError(
            f"{len(missing)} of {len(chosen)} {what} ({format_names([str(one) for one in missing])}) are not among the {len(known)} "
            f"here ({format_names([str(one) for one in known])})."
        )
    return sorted({index[one] for one in chosen})
