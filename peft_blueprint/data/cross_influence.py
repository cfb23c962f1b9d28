"""Choose submodules and examples together, from the matrix of how strongly each example moves each submodule.

Equation numbers are the paper's.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from scipy.stats import entropy

from .._files import write_atomically
from .._options import from_mapping
from .._text import format_names
from ..blueprint import loads
from ..errors import BlueprintError, FormatError, MeasurementError, MismatchError
from ..measure import (
    FRACTIONS,
    Batch,
    Influence,
    as_batches,
    fit_gamma,
    joined_digest,
    measure_influence,
    normalize_within,
)
from .examples import Example
from .options import require_choice, require_integer


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


Statistic = Literal["norms", "alignments", "block_norms"]
Axis = Literal["kind", "example"]

_VERSION = "1"
_VERSION_KEY = "cross_influence.version"
_JSON_KEY = "cross_influence.json"
_DTYPES = {
    "values": "F32",
    "examples": "I64",
    "losses": "F32",
    "target_tokens": "I64",
    "parameters": "I64",
    "sizes": "I64",
}
_LEADING = 4  # singular vectors that a search starts from, with either sign
_ROUNDING = 1 + 1e-12  # tolerance of comparisons


@dataclass(frozen=True)
class LowRank:
    """Low-rank structure of a matrix (eq. 33), from its singular values.

    Args:
        singular_values: in descending order.
        effective_rank: exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007, "The
            effective rank: a measure of effective dimensionality"), from 1 to their number.
        participation_ratio: (Σσ²)²/Σσ⁴, the same idea with squares, which small values hardly enter.
        independent_error: relative Frobenius error of the outer product of row and column sums over the total, which the
            matrix equals if rows and columns are independent. At least `error(1)`.
        interactions: number of leading singular values of that product's residual above the 95th percentile of those
            with every row shuffled (parallel analysis: Horn 1965, doi:10.1007/BF02289447): patterns of rows with columns
            beyond chance. None if not computed.
    """

    singular_values: tuple[float, ...]
    effective_rank: float
    participation_ratio: float
    independent_error: float
    interactions: int | None = None

    def captured(self, components: int) -> float:
        """Return the share of the sum of squares that the first components hold."""
        return 1 - self.error(components) ** 2

    def error(self, components: int) -> float:
        """Return the relative Frobenius error of the first components, the least of any matrix of that rank.

        Raises:
            BlueprintError: for a number of components out of range.
        """
        if not 0 <= components <= len(self.singular_values):
            raise BlueprintError(f"components must be from 0 to {len(self.singular_values)}, got {components}.")
        squares = np.square(self.singular_values)
        return float(np.sqrt(squares[components:].sum() / squares.sum()))

    def components_for(self, share: float) -> int:
        """Return the fewest components that hold a share of the sum of squares.

        Raises:
            BlueprintError: for a share outside (0, 1].
        """
        _require_share("share", share)
        held = np.cumsum(np.square(self.singular_values))
        return int(np.searchsorted(held, share * held[-1] / _ROUNDING)) + 1

    def summary(self) -> str:
        """Return three lines of text."""
        n = len(self.singular_values)
        held = ", ".join(f"{self.components_for(share)} for {share:.0%}" for share in (0.9, 0.95, 0.99))
        beyond = "" if self.interactions is None else f"; {self.interactions} interactions beyond chance"
        return (
            f"effective rank {self.effective_rank:.1f} of {n}, participation ratio {self.participation_ratio:.2f}\n"
            f"components that hold the squares: {held}\n"
            f"relative error {self.error(1):.3f} with one component, {self.independent_error:.3f} if independent{beyond}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data."""
        return asdict(self)


@dataclass(frozen=True)
class JointSelection:
    """Submodules and examples chosen for each other, compared with other choices of the same size.

    Args:
        submodules: names, in the order of the matrix.
        examples: ids, in the order of the matrix.
        share: captured of the whole matrix (eq. 34).
        separate: captured if submodules and examples are each chosen by their own sums.
        product: share of the separately chosen submodules over all examples, times that of the examples over all
            submodules: `separate` if the two were independent (the 80 % × 90 % of §4.4).
        independent: k^γ·q^δ (eq. 35) with exponents fitted to the two curves of retained mass.
        bound: no choice within these shares captures more.
        gamma: γ.
        delta: δ.
        k: share of submodules asked for, of their number or cost.
        q: share of examples asked for.
        iterations: steps that raised the share from the best start, its first pair included.
        starts: share reached from each start, by its name.
    """

    submodules: tuple[str, ...]
    examples: tuple[int, ...]
    share: float
    separate: float
    product: float
    independent: float
    bound: float
    gamma: float
    delta: float
    k: float
    q: float
    iterations: int
    starts: tuple[tuple[str, float], ...]

    def summary(self) -> str:
        """Return three lines of text."""
        reached = sum(share >= self.share * (1 - 1e-9) for _, share in self.starts)
        return (
            f"{len(self.submodules)} submodules and {len(self.examples)} examples (k = {self.k:g}, q = {self.q:g}) capture "
            f"{self.share:.2%} of at most {self.bound:.2%}\n"
            f"chosen separately {self.separate:.2%}, product of the two shares {self.product:.2%}, k^{self.gamma:.3f} · "
            f"q^{self.delta:.3f} = {self.independent:.2%}\n"
            f"converged after {self.iterations} steps, from {reached} of {len(self.starts)} starts"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data, with the ids of the chosen examples."""
        return asdict(self) | {"starts": dict(self.starts)}


@dataclass(frozen=True)
class _Header:
    """Fields of a `CrossInfluence` beside its arrays, as its file's header holds them."""

    names: tuple[str, ...]
    kinds: tuple[str | None, ...]
    depths: tuple[int | None, ...]
    statistic: Statistic
    normalized: tuple[Axis, ...]
    data_digest: str


@dataclass(frozen=True, eq=False)
class CrossInfluence:
    """The cross-influence matrix T (eq. 32) by submodule and example, or by submodule and block of data (§4.4).

    Its entries are gradient norms as in the paper, or alignments with the mean gradient. Sums of norms say how much is
    moved, not where to: two examples that pull apart count twice, and a wrong label counts much. To first order the loss
    falls in proportion to the sum of alignments over S and D when submodules S step along the gradient of examples D. Those
    of harmful examples are negative, and shares may exceed 1. They are noisier, partly chance for few examples. Norms are
    the default because they are the paper's, positive and mergeable; neither is shown to choose better.

    Args:
        values: (submodules, examples) float32, read-only.
        names: of the submodules.
        kinds: of the submodules, where known.
        depths: of the submodules, where known.
        examples: (examples,) int64 ids, such as positions in the dataset.
        statistic: "norms"; "alignments" for `Influence.alignments`; or "block_norms", the norm of the sum of a block's
            gradients, see `from_blocks`.
        losses: (examples,) float32 in nats, where known.
        target_tokens: (examples,) int64, where known; a cost of examples.
        parameters: (submodules,) int64, where known; a cost of submodules.
        sizes: (examples,) int64, the number of examples of each block where columns are blocks; a cost of blocks.
        normalized: axes the values were normalized along, in order.
        data_digest: of the data, from the measurement.

    Raises:
        MeasurementError: without submodules or examples, or for values that are not finite or negative norms.
        MismatchError: if lengths differ, or a name or id is repeated.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> matrix = CrossInfluence.from_influence(measure_influence(tiny_llama(), toy_batches(), progress=False))
        >>> chosen = matrix.select_jointly(k=0.3, q=0.5)
        >>> len(chosen.submodules), len(chosen.examples)
        (8, 4)
    """

    values: np.ndarray
    names: tuple[str, ...]
    kinds: tuple[str | None, ...]
    depths: tuple[int | None, ...]
    examples: np.ndarray
    statistic: Statistic = "norms"
    losses: np.ndarray | None = None
    target_tokens: np.ndarray | None = None
    parameters: np.ndarray | None = None
    sizes: np.ndarray | None = None
    normalized: tuple[Axis, ...] = ()
    data_digest: str = ""

    def __post_init__(self) -> None:
        if not np.issubdtype(np.asarray(self.examples).dtype, np.integer):
            raise MismatchError("Ids of examples must be integers, such as positions in the dataset.")
        for name, dtype in _DTYPES.items():
            if getattr(self, name) is not None:
                array = np.array(getattr(self, name), dtype=np.float32 if dtype == "F32" else np.int64)
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        if self.values.ndim != 2 or not self.values.size:
            raise MeasurementError(f"values must be a matrix (submodules, examples), got shape {self.values.shape}.")
        rows, columns = self.values.shape
        wrong = ~np.isfinite(self.values) | (self.values < 0 if self.statistic != "alignments" else False)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise MeasurementError(
                f"{int(wrong.sum())} of {self.values.size} values are not finite or negative norms, the first "
                f"{self.values[row, column]} in row {row}, column {column}. Measure again without examples that overflow."
            )
        expected = dict.fromkeys(("names", "kinds", "depths", "parameters"), rows)
        expected |= dict.fromkeys(("examples", "losses", "target_tokens", "sizes"), columns)
        for name, length in expected.items():
            given = getattr(self, name)
            if given is not None and len(given) != length:
                raise MismatchError(
                    f"{name} must have length {length} for {rows} × {columns} values, got {len(given)}."
                )
        if len(set(self.names)) < rows or len(np.unique(self.examples)) < columns:
            raise MismatchError(
                f"Names and ids must be unique; {rows} submodules have {len(set(self.names))} names, {columns} examples "
                f"{len(np.unique(self.examples))} ids."
            )

    @classmethod
    def from_influence(
        cls, influence: Influence, statistic: Statistic = "norms", examples: Sequence[int] | None = None
    ) -> CrossInfluence:
        """Take the matrix from one measurement.

        Args:
            influence: result of `measure_influence`.
            statistic: "norms" or "alignments".
            examples: ids; positions in the measurement by default.

        Raises:
            MeasurementError: if values are not finite, or for alignments of one example or without projections.
            MismatchError: if the ids do not match the examples.
        """
        require_choice("statistic", statistic, ["norms", "alignments"])
        if statistic == "alignments" and influence.examples < 2:
            raise MeasurementError("Alignments need at least two examples, got one.")
        shapes = [submodule.shape for submodule in influence.submodules]
        return cls(
            values=(influence.norms if statistic == "norms" else influence.alignments).numpy(),
            names=tuple(submodule.name for submodule in influence.submodules),
            kinds=tuple(submodule.kind for submodule in influence.submodules),
            depths=tuple(submodule.depth for submodule in influence.submodules),
            examples=np.arange(influence.examples) if examples is None else np.asarray(examples),
            statistic=statistic,
            losses=influence.losses.numpy(),
            target_tokens=influence.target_tokens.numpy(),
            parameters=np.array([math.prod(s) for s in shapes if s is not None]) if None not in shapes else None,
            data_digest=influence.data_digest,
        )

    @classmethod
    def from_blocks(
        cls,
        model: nn.Module,
        batches: Iterable[Batch | Example],
        batches_per_block: int,
        statistic: Statistic = "norms",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **keywords: Any,
    ) -> CrossInfluence:
        """Measure a stream of data block by block, in memory of one column a block.

        Consecutive batches make a block; the last may hold fewer. An entry is the sum over the block's examples of their
        gradient norms ("norms"), as if `coarsen` had been called, or the norm of the sum of their gradients
        ("block_norms"), in which gradients that pull apart cancel; it is at most the former. The latter is estimated from
        sketches where `measure_influence` keeps no whole mean gradient.

        Args:
            model: as for `measure_influence`.
            batches: as for `measure_influence`; a stream is read once.
            batches_per_block: number of batches of a block; examples are put in batches of 8.
            statistic: "norms" or "block_norms".
            tokenizer: the model's, for examples with text.
            **keywords: of `measure_influence`, such as `submodules` or `sketch_size`.

        Returns:
            The matrix by submodule and block, with ids from 0.

        Raises:
            MeasurementError: as `measure_influence`, or without data.
            BlueprintError: for a number of batches below 1.

        Example:
            >>> from peft_blueprint.testing import tiny_llama, toy_batches
            >>> matrix = CrossInfluence.from_blocks(tiny_llama(), toy_batches(examples=12), batches_per_block=2)
            >>> matrix.values.shape, matrix.sizes.tolist()
            ((28, 2), [8, 4])
        """
        require_choice("statistic", statistic, ["norms", "block_norms"])
        count = require_integer("batches_per_block", batches_per_block, 1)
        stream = iter(as_batches(model, batches, tokenizer=tokenizer))
        parts: list[CrossInfluence] = []
        options = {"projection_size": 0, "progress": False} | keywords
        while part := list(itertools.islice(stream, count)):
            found = measure_influence(model, part, **options)
            block = cls.from_influence(found).coarsen([len(parts)] * found.examples)
            if statistic == "block_norms":
                norms = found.mean_gradient_norms.numpy()[:, None] * found.examples
                block = replace(block, values=norms, statistic=statistic)
            parts.append(block)
        if not parts:
            raise MeasurementError("batches is empty. Give at least one batch.")
        return cls.merge(parts)

    def coarsen(self, blocks: Sequence[int]) -> CrossInfluence:
        """Sum the columns of each block of data: a gradient summary map (§4.4).

        Sums over blocks are those over their examples, so that shares of whole blocks do not change. A choice among
        blocks is a choice of examples in which some come only together; it captures at most as much. Give `sizes` as
        `example_costs`, so that a share of the data is one of its examples.

        Args:
            blocks: (examples,) number of the block of every example, such as its shard, document or domain.

        Returns:
            The matrix by submodule and block, blocks in the order of their numbers, which are its ids.

        Raises:
            MismatchError: if the numbers are not integers, or not as many as the examples.

        Example:
            >>> matrix = CrossInfluence([[1.0, 2.0, 4.0]], ("q_proj",), (None,), (None,), [7, 8, 9])
            >>> matrix.coarsen([0, 1, 0]).values.tolist()
            [[5.0, 2.0]]
        """
        numbers = np.asarray(blocks)
        if numbers.shape != self.examples.shape or not np.issubdtype(numbers.dtype, np.integer):
            raise MismatchError(
                f"blocks must be {len(self.examples)} integers, one for each example, got shape {numbers.shape} of "
                f"{numbers.dtype}."
            )
        ids, places = np.unique(numbers, return_inverse=True)
        sizes = np.ones(len(numbers), dtype=np.int64) if self.sizes is None else self.sizes
        membership = np.zeros((len(numbers), len(ids)))
        membership[np.arange(len(numbers)), places] = 1.0
        counts = sizes @ membership
        return replace(
            self,
            values=self.values.astype(float) @ membership,
            examples=ids,
            losses=None if self.losses is None else (self.losses * sizes) @ membership / counts,
            target_tokens=None if self.target_tokens is None else self.target_tokens @ membership,
            sizes=counts,
        )

    @staticmethod
    def merge(parts: Sequence[CrossInfluence]) -> CrossInfluence:
        """Join norms of different examples or blocks on the same submodules, in this order. Normalize afterwards.

        Raises:
            MismatchError: if the submodules differ, ids repeat, or the parts are alignments, which depend on the mean of
                their own part: merge the `Influence`s instead.
        """
        if not parts:
            raise MeasurementError("merge needs at least one part.")
        first = parts[0]
        for part in parts if len(parts) > 1 else ():
            if part.statistic == "alignments" or part.statistic != first.statistic or part.normalized:
                raise MismatchError(
                    f"Only norms of one kind that are not normalized merge, got {part.statistic} normalized by "
                    f"{', '.join(part.normalized) or 'nothing'}. Use Influence.merge, or normalize after merging."
                )
            if part.names != first.names:
                raise MismatchError(
                    f"Parts must have the same submodules, got {len(first.names)} ({format_names(first.names, 2)}) and "
                    f"{len(part.names)} ({format_names(part.names, 2)}). Measure with the same model and settings."
                )
        return replace(
            first,
            values=np.concatenate([part.values for part in parts], axis=1),
            examples=np.concatenate([part.examples for part in parts]),
            losses=_concatenate([part.losses for part in parts]),
            target_tokens=_concatenate([part.target_tokens for part in parts]),
            sizes=_concatenate([part.sizes for part in parts]),
            data_digest=joined_digest([part.data_digest for part in parts]),
        )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file atomically. It holds values of single examples, so do not publish it.

        Raises:
            BlueprintError: if it cannot be written; an existing file stays as it was.
        """
        arrays = {name: np.ascontiguousarray(array) for name in _DTYPES if (array := getattr(self, name)) is not None}
        header = {name: getattr(self, name) for name in _Header.__dataclass_fields__}
        metadata = {_VERSION_KEY: _VERSION, _JSON_KEY: json.dumps(header, separators=(",", ":"))}
        write_atomically(Path(path), safetensors.numpy.save(arrays, metadata))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> CrossInfluence:
        """Read a file written by `save`.

        Raises:
            BlueprintError: if the file does not exist or cannot be read.
            FormatError: if it is not a valid file of this version.
        """
        if not Path(path).is_file():
            raise BlueprintError(f"The file {path} does not exist. Write one with CrossInfluence.save.")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
                unknown = {name: dtype for name, dtype in dtypes.items() if dtype != _DTYPES.get(name)}
                arrays = {name: file.get_tensor(name) for name in dtypes} if not unknown else {}
        except OSError as error:
            raise BlueprintError(f"{path} cannot be read: {error.strerror or error}.") from error
        except SafetensorError as error:
            raise FormatError(f"{path} is not a valid safetensors file: {error}.") from error
        version = metadata.get(_VERSION_KEY)
        if version != _VERSION or _JSON_KEY not in metadata:
            found = "no version" if version is None else f"version {version[:20]!r}"
            raise FormatError(f"{path} must be a cross-influence file of version {_VERSION}, got {found}.")
        header = from_mapping(_Header, loads(metadata[_JSON_KEY], str(path)), str(path), FormatError)
        if unknown or {"values", "examples"} - dtypes.keys():
            raise FormatError(f"{path} must hold arrays of {_DTYPES}, got {str(dtypes):.200}.")
        try:
            return cls(**vars(header), **arrays)
        except (MeasurementError, MismatchError) as error:
            raise FormatError(f"{path}: {error}") from error

    def normalize(self, by: Axis) -> CrossInfluence:
        """Divide the values by the mean absolute value of their kind, or of their example; call repeatedly for both.

        By kind, because norms of different kinds do not compare. By example, so that each counts alike at any length
        and loss, and what remains is which submodules it moves.

        Raises:
            BlueprintError: for another axis.
        """
        require_choice("by", by, get_args(Axis))
        values = self.values.astype(float)
        means = np.abs(values).mean(axis=1 if by == "kind" else 0)
        divisors = np.where(means > 0, means, 1.0)
        if by == "kind":
            scales = (normalize_within(means, self.kinds) / divisors)[:, None]
        else:
            scales = 1 / divisors
        return replace(self, values=values * scales, normalized=(*self.normalized, by))

    @property
    def submodule_totals(self) -> np.ndarray:
        """(submodules,) sums over examples."""
        return self.values.sum(axis=1, dtype=float)

    @property
    def example_totals(self) -> np.ndarray:
        """(examples,) sums over submodules."""
        return self.values.sum(axis=0, dtype=float)

    def low_rank(self, shuffles: int = 20, seed: int = 0) -> LowRank:
        """Analyse the low-rank structure (eq. 33), see `analyse_low_rank`.

        Raises:
            MeasurementError: for a single example.
            BlueprintError: for a matrix of zeros.
        """
        return analyse_low_rank(self._matrix(), shuffles, seed)

    def captured_share(self, submodules: Sequence[str], examples: Sequence[int]) -> float:
        """Return the share of the whole matrix where some submodules and examples meet (eq. 34).

        Args:
            submodules: names.
            examples: ids.

        Raises:
            BlueprintError: for an unknown name or id, or if the whole does not have a positive sum.
        """
        rows = _positions(submodules, self.names, "submodules")
        columns = _positions(examples, self.examples.tolist(), "examples")
        return _sum(self.values.astype(float), rows, columns) / self._total()

    def exponents(
        self, *, submodule_costs: ArrayLike | None = None, example_costs: ArrayLike | None = None
    ) -> tuple[float, float]:
        """Fit γ and δ of eq. 35 to the curves of retained mass of submodules and of examples.

        Raises:
            MeasurementError: for a single example.
            BlueprintError: if the whole does not have a positive sum.
        """
        self._matrix()
        self._total()
        rows, columns = self._budgets(1.0, 1.0, submodule_costs, example_costs)
        return fit_exponent(self.submodule_totals, rows.costs), fit_exponent(self.example_totals, columns.costs)

    def select_jointly(
        self,
        k: float,
        q: float,
        *,
        submodule_costs: ArrayLike | None = None,
        example_costs: ArrayLike | None = None,
        starts: int = 8,
        seed: int = 0,
    ) -> JointSelection:
        """Choose submodules and examples for each other, by alternation from several starts.

        Each step takes the best of one side for the current choice of the other, until nothing changes (`alternate`). The
        result captures at least as much as the separate choice. It may not be the best there is; `bound` says how far from
        it at most.

        Args:
            k: share of submodules, of their number or of their summed cost.
            q: share of examples, likewise.
            submodule_costs: (submodules,) positive, such as `parameters` or step times.
            example_costs: (examples,) positive, such as `target_tokens`.
            starts: number of random starts, beside the separate choice and the leading singular vectors.
            seed: of the random starts.

        Raises:
            BlueprintError: for shares outside (0, 1], costs that are not positive or of another length, or if the whole
                does not have a positive sum.
            MeasurementError: for a single example.
        """
        matrix = self._matrix()
        rows, columns = self._budgets(k, q, submodule_costs, example_costs)
        gamma, delta = self.exponents(submodule_costs=submodule_costs, example_costs=example_costs)
        total = self._total()
        found = search_pairs(matrix, rows, columns, starts, seed)
        best = max(found.values(), key=lambda pair: pair.total)
        alone = rows.choose(matrix.sum(axis=1)), columns.choose(matrix.sum(axis=0))
        return JointSelection(
            submodules=tuple(self.names[i] for i in best.rows),
            examples=tuple(self.examples[best.columns].tolist()),
            share=best.total / total,
            separate=_sum(matrix, *alone) / total,
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
        """Return a few lines of text: the matrix and its low-rank structure."""
        by = f", normalized by {' and '.join(self.normalized)}" if self.normalized else ""
        rows, columns = self.values.shape
        unit = "examples" if self.sizes is None else f"blocks of {self.sizes.min()} to {self.sizes.max()} examples"
        return f"{self.statistic} of {rows} submodules × {columns} {unit}{by}\n{self.low_rank().summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and the shares of submodules as JSON-compatible data, without single examples."""
        return {
            "statistic": self.statistic,
            "normalized": list(self.normalized),
            "submodules": len(self.names),
            "examples": len(self.examples),
            "data_digest": self.data_digest,
            "submodule_shares": dict(zip(self.names, (self.submodule_totals / self._total()).tolist(), strict=True)),
            "low_rank": self.low_rank().to_dict(),
        }

    def _matrix(self) -> np.ndarray:
        """Return the values in double precision; raise MeasurementError for a single example."""
        if self.values.shape[1] < 2:
            raise MeasurementError("Choosing needs at least two examples, got 1. Measure more.")
        return self.values.astype(float)

    def _total(self) -> float:
        total = float(self.values.sum(dtype=float))
        if not total > 0:
            raise BlueprintError(
                f"The {self.statistic} of {self.values.shape[1]} examples must have a positive sum, got {total:.3g}. Check "
                "the data; for alignments, measure more examples."
            )
        return total

    def _budgets(
        self, k: float, q: float, submodule_costs: ArrayLike | None, example_costs: ArrayLike | None
    ) -> tuple[Budget, Budget]:
        rows, columns = self.values.shape
        return Budget(rows, k, submodule_costs, "submodules"), Budget(columns, q, example_costs, "examples")


class Budget:
    """How many rows or columns may be chosen: a share of their number, or of their summed cost.

    Args:
        n: number of rows or columns.
        share: in (0, 1]. Of the number it is rounded, to at least one; of the cost it is not exceeded.
        costs: (n,) positive; None for the number.
        what: for error messages, such as "submodules".

    Raises:
        BlueprintError: for a share outside (0, 1], costs that are not positive or of another length, or if nothing is
            cheap enough.
    """

    def __init__(self, n: int, share: float, costs: ArrayLike | None = None, what: str = "elements"):
        _require_share(f"the share of {what}", share)
        self.count = None if costs is not None else max(1, round(share * n))
        self.costs = np.ones(n) if costs is None else np.asarray(costs, dtype=float)
        if self.costs.shape != (n,) or not (np.isfinite(self.costs).all() and (self.costs > 0).all()):
            raise BlueprintError(f"Costs must be {n} positive numbers, one for each of the {what}.")
        self.limit = float(self.count if self.count is not None else share * self.costs.sum()) * _ROUNDING
        if self.costs.min() > self.limit:
            raise BlueprintError(
                f"A share of {share} of the cost of {n} {what} is {self.limit:.4g}, but the cheapest costs "
                f"{self.costs.min():.4g}. Give a larger share."
            )

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Return sorted positions of the largest scores; exactly `count` of them, of either sign.

        Under a budget of cost: the largest scores per cost that fit, or the single largest if that is more; at least half of
        the maximum. Scores that are not positive are left out, unless there are no others. Ties go to the earlier position.
        """
        if self.count is not None:
            return np.sort(np.argsort(-scores, kind="stable")[: self.count])
        fits = np.flatnonzero(self.costs <= self.limit)
        alone = fits[scores[fits].argmax()]
        taken, left = [], self.limit
        for one in np.argsort(-scores / self.costs, kind="stable"):
            if scores[one] > 0 and self.costs[one] <= left:
                taken.append(one)
                left -= self.costs[one]
        if not taken or scores[taken].sum() < scores[alone]:
            return np.array([alone])
        return np.sort(np.array(taken))

    def bound(self, scores: np.ndarray) -> float:
        """Return an upper bound of the sum that can be chosen, fractions allowed."""
        if self.count is not None:
            return float(np.sort(scores)[-self.count :].sum())
        order = np.argsort(-scores / self.costs)
        costs = self.costs[order]
        parts = (self.limit - (np.cumsum(costs) - costs)).clip(0, costs) / costs
        return float((scores[order].clip(min=0) * parts).sum())


@dataclass(frozen=True, eq=False)
class Pair:
    """Sorted positions of rows and columns chosen for each other, and the total where they meet after each step."""

    rows: np.ndarray
    columns: np.ndarray
    history: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum of the entries where they meet."""
        return self.history[-1]


def alternate(
    matrix: np.ndarray,
    rows: Budget,
    columns: Budget,
    chosen_columns: np.ndarray,
    chosen_rows: np.ndarray | None = None,
) -> Pair:
    """Alternate between the best rows for the chosen columns and the best columns for the chosen rows.

    With f(S, D) = Σ_{i∈S, j∈D} T_ij, the rows' sums over a fixed D are their scores, and the rows of the largest scores
    maximize f. Under a budget of cost the greedy choice may be worse than the present one, which then stays. A step is
    taken only if it raises f by more than rounding, so the alternation ends, at a local maximum: start from several.
    `chosen_rows` are only taken if the best rows for `chosen_columns` are no better.
    """
    scores = matrix[:, chosen_columns].sum(axis=1)
    picks = [rows.choose(scores)] if chosen_rows is None else [chosen_rows, rows.choose(scores)]
    pair = [max(picks, key=lambda pick: float(scores[pick].sum())), chosen_columns]
    history = [float(scores[pair[0]].sum())]
    least = 1e-12 * float(np.abs(matrix).sum())
    unchanged = 0
    for side in itertools.cycle((1, 0)):
        scores = matrix.take(pair[1 - side], axis=1 - side).sum(axis=1 - side)
        pick = (rows, columns)[side].choose(scores)
        if scores[pick].sum() > history[-1] + least:
            pair[side], unchanged = pick, 0
            history.append(float(scores[pick].sum()))
        elif unchanged:
            break
        else:
            unchanged = 1
    return Pair(np.sort(pair[0]), np.sort(pair[1]), tuple(history))


def search_pairs(matrix: np.ndarray, rows: Budget, columns: Budget, starts: int = 8, seed: int = 0) -> dict[str, Pair]:
    """Alternate from several starts and return the pair that each reaches, by the start's name.

    Starts are the separate choice of the rows and columns with the largest sums (so that no result is worse), the columns
    where the leading singular vectors are largest or smallest, and random columns.

    Raises:
        BlueprintError: for a negative number of random starts.
    """
    if starts < 0:
        raise BlueprintError(f"starts must be at least 0, got {starts}.")
    first = {"separate": matrix.sum(axis=0)}
    for number, vector in enumerate(np.linalg.svd(matrix, full_matrices=False)[2][:_LEADING], start=1):
        first |= {f"component +{number}": vector, f"component -{number}": -vector}
    rng = np.random.default_rng(seed)
    first |= {f"random {number}": rng.permutation(matrix.shape[1]).astype(float) for number in range(1, starts + 1)}
    by_sums = {"separate": rows.choose(matrix.sum(axis=1))}
    return {
        name: alternate(matrix, rows, columns, columns.choose(scores), by_sums.get(name))
        for name, scores in first.items()
    }


def upper_bound(matrix: np.ndarray, rows: Budget, columns: Budget) -> float:
    """Return a total that no pair exceeds: the best rows if each could have its own columns, or the other way round."""
    by_rows = rows.bound(np.array([columns.bound(row) for row in matrix]))
    return min(by_rows, columns.bound(np.array([rows.bound(column) for column in matrix.T])))


def fit_exponent(scores: np.ndarray, costs: ArrayLike = 1.0) -> float:
    """Fit the exponent γ of the share that the top k of some scores hold, ≈ k^γ (eq. 35).

    The top are the largest per cost, and k is the share of the cost; without costs this is `retained_mass_curve`. Fractions
    below one element are left out. With negative scores the curve exceeds 1, and the exponent says less.

    Args:
        scores: (n,) with a positive sum.
        costs: (n,) positive, or the same for all.
    """
    prices = np.broadcast_to(np.asarray(costs, dtype=float), scores.shape)
    order = np.argsort(-scores / prices, kind="stable")
    mass = np.concatenate([[0.0], np.cumsum(scores[order])]) / scores.sum()
    spent = np.concatenate([[0.0], np.cumsum(prices[order])]) / prices.sum()
    fractions = [k for k in FRACTIONS if k * len(scores) >= 1]
    return fit_gamma(fractions, np.interp(fractions, spent, mass))[0]


def analyse_low_rank(matrix: np.ndarray, shuffles: int = 20, seed: int = 0) -> LowRank:
    """Analyse the low-rank structure of a matrix (n, m) by its singular values; n·m·min(n, m) operations a shuffle.

    Raises:
        BlueprintError: for a negative number of shuffles, or a matrix of zeros.
    """
    if shuffles < 0:
        raise BlueprintError(f"shuffles must be at least 0, got {shuffles}.")
    matrix = np.asarray(matrix, dtype=float)
    values = np.linalg.svd(matrix, compute_uv=False)
    squares = np.square(values)
    if not squares.sum():
        raise BlueprintError("A matrix of zeros has no structure. Check the data.")
    total = matrix.sum()
    residual = matrix - np.outer(matrix.sum(axis=1), matrix.sum(axis=0)) / total if total else matrix
    return LowRank(
        singular_values=tuple(values.tolist()),
        effective_rank=float(np.exp(entropy(values))),
        participation_ratio=float(squares.sum() ** 2 / np.square(squares).sum()),
        independent_error=float(np.sqrt(np.square(residual).sum() / squares.sum())),
        interactions=_count_beyond_chance(residual, 1e-9 * values[0], shuffles, seed) if shuffles else None,
    )


def _count_beyond_chance(matrix: np.ndarray, least: float, shuffles: int, seed: int) -> int:
    """Count leading singular values above `least` and the 95th percentile of those with shuffled rows."""
    rng = np.random.default_rng(seed)
    drawn = [np.linalg.svd(rng.permuted(matrix, axis=1), compute_uv=False) for _ in range(shuffles)]
    values = np.linalg.svd(matrix, compute_uv=False)
    is_above = (values > np.percentile(drawn, 95, axis=0)) & (values > least)
    return int(np.logical_and.accumulate(is_above).sum())


def _sum(matrix: np.ndarray, rows: ArrayLike, columns: ArrayLike) -> float:
    return float(matrix[np.ix_(rows, columns)].sum())  # type: ignore[arg-type]


def _concatenate(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [array for array in arrays if array is not None]
    return np.concatenate(known) if len(known) == len(arrays) else None


def _positions(chosen: Sequence[Any], known: Sequence[Any], what: str) -> list[int]:
    """Return the sorted distinct positions of names or ids."""
    index = {one: i for i, one in enumerate(known)}
    missing = [one for one in chosen if one not in index]
    if missing:
        raise BlueprintError(
            f"{len(missing)} of {len(chosen)} {what} are unknown: {format_names(list(map(str, missing)))}. The matrix has "
            f"{len(known)}: {format_names(list(map(str, known)))}."
        )
    return sorted({index[one] for one in chosen})


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise BlueprintError(f"{name} must be in (0, 1], got {value}.")
