"""Find which share of a model's parameters a part of it has, and which share pays best to update (eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BlueprintError
from .entry import ADAPTABLE, Submodule, norm_of


if TYPE_CHECKING:
    from .blueprint import Blueprint

# bytes a parameter: frozen, 2 for bfloat16; trained, 14 more for its gradient, a float32 copy and two Adam moments (§5)
FIXED_COST = 2.0
VARIABLE_COST = 14.0

KEY = "k_star"  # of a blueprint's costs
_ENDINGS = {"k": "", "submodules": "_submodules", "gain": "_gain", "ratio": "_ratio"}


def parameter_share(part: Sequence[Submodule], whole: Sequence[Submodule]) -> float | None:
    """Return the share of the parameters of `whole` that `part` has; None if a shape is unknown.

    Example:
        >>> entries = [Submodule("q", 1.0, shape=(8, 8)), Submodule("up", 1.0, shape=(24, 8))]
        >>> parameter_share(entries[:1], entries)
        0.25
    """
    if not whole or any(entry.shape is None for entry in whole):
        return None
    return sum(map(_size, part)) / sum(map(_size, whole))


@dataclass(frozen=True)
class BestShare:
    """The share of a model whose update gives the most per resource: k* of the whole model.

    Args:
        k: share of the parameters, (0, 1]; of the submodules where shapes are unknown.
        submodules: share of the submodules, those with the largest gradient norms.
        gain: share of the summed gradient norm that they hold, Δ_k/Δ_full.
        ratio: their gain per cost over that of a full update, G(k)/G(1), at least 1.
    """

    k: float
    submodules: float
    gain: float
    ratio: float

    @property
    def is_interior(self) -> bool:
        """Whether a part of the model gives strictly more per resource than all of it (Proposition B.1)."""
        return self.submodules < 1

    def to_costs(self) -> dict[str, float]:
        """Return the keys under which a blueprint's `costs` hold it."""
        return {f"{KEY}{end}": getattr(self, name) for name, end in _ENDINGS.items()}


def best_share(blueprint: Blueprint) -> BestShare:
    """Find the share k* that maximises gain per cost R(k) = Δ_k / C(k) (eq. 8) on the measured curve.

    Δ_k is the gradient norm that the largest submodules hold, in the order of Algorithm 1, line 3; C(k) = fixed +
    variable·k (eq. 10) by the blueprint's `costs`, with k their share of the parameters. Without costs, a parameter
    takes 2 bytes frozen and 14 more trained. Eq. 15 needs a power law k^γ for Δ_k; the measured curve does without, as B.1
    allows for any concave one. If gain per cost rises up to the full update, k* is 1.

    Only linear layers and fused experts count, unless the blueprint has none.

    Raises:
        BlueprintError: if every gradient norm is zero, or the costs are not positive numbers.

    Example:
        >>> from peft_blueprint import Blueprint
        >>> entries = tuple(Submodule(f"{i}", 2.0 ** -i, shape=(4, 4)) for i in range(8))
        >>> best = best_share(Blueprint("org/model", entries))
        >>> best.k, round(best.gain, 2), round(best.ratio, 2)
        (0.25, 0.75, 2.19)
    """
    costs = [blueprint.costs.get("fixed_cost", FIXED_COST), blueprint.costs.get("variable_cost", VARIABLE_COST)]
    for value in costs:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise BlueprintError(
                f"fixed_cost and variable_cost of {blueprint.model_id!r} must be positive numbers, got {costs}. Measure "
                "the blueprint again."
            )
    fixed, variable = costs
    entries = [entry for entry in blueprint if entry.form in ADAPTABLE] or list(blueprint)
    total = math.fsum(map(norm_of, entries))
    if not total:
        raise BlueprintError(
            f"Every gradient norm of {blueprint.model_id!r} is zero, so no share pays best. Measure the blueprint again."
        )
    ranked = sorted(entries, key=norm_of, reverse=True)
    has_sizes = all(entry.shape is not None for entry in entries)
    sizes = [float(_size(entry)) if has_sizes else 1.0 for entry in ranked]
    parameters = math.fsum(sizes)
    best, k, gain = BestShare(1.0, 1.0, 1.0, 1.0), 0.0, 0.0
    for count, (entry, size) in enumerate(zip(ranked[:-1], sizes, strict=False), start=1):
        k, gain = k + size / parameters, gain + norm_of(entry) / total
        ratio = gain * (fixed + variable) / (fixed + variable * k)
        if ratio > best.ratio * (1 + 1e-12):
            best = BestShare(min(k, 1.0), count / len(ranked), min(gain, 1.0), ratio)
    return best


def k_star_of(blueprint: Blueprint) -> float:
    """Return k* of the whole model: the share of its parameters that the file recommends, or else `best_share` finds.

    Raises:
        BlueprintError: if the file's is not in (0, 1], or as `best_share`.

    Example:
        >>> from peft_blueprint import Blueprint
        >>> k_star_of(Blueprint("org/model", (Submodule("q", 1.0),), costs={"k_star": 0.2}))
        0.2
    """
    value = blueprint.costs.get(KEY)
    if value is None:
        return best_share(blueprint).k
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise BlueprintError(
            f"k_star among the costs of {blueprint.model_id!r} must be in (0, 1], got {value!r}. Measure the blueprint "
            "again."
        )
    return float(value)


def _size(entry: Submodule) -> int:
    return math.prod(entry.shape or ())
