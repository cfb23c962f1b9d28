"""Find which share of a model's parameters a part of it has, and which share pays best to update (eq. 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BlueprintError
from .entry import ADAPTABLE, Submodule, norm_of
from .theory import FIXED_COST, VARIABLE_COST


if TYPE_CHECKING:
    from .blueprint import Blueprint

KEY = "k_star"  # of a blueprint's costs


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
    """The share that gives the most gain per cost: k* of a model's parameters, or q* of the data.

    Args:
        share: k* or q*, by size: of the parameters, of the examples.
        items: share of the number of submodules or examples, those with the largest values.
        gain: share of the summed values that they hold, Δ_k/Δ_full.
        ratio: their gain per cost over that of all, G(k)/G(1), at least 1.

    Example:
        >>> BestShare(share=0.4, items=0.5, gain=0.8, ratio=1.3).is_interior
        True
    """

    share: float
    items: float
    gain: float
    ratio: float

    @property
    def is_interior(self) -> bool:
        """Whether a part gives strictly more per cost than all of it (Proposition B.1)."""
        return self.items < 1

    def to_costs(self) -> dict[str, float]:
        """Return the keys under which a blueprint's `costs` hold it."""
        return {
            KEY: self.share,
            f"{KEY}_submodules": self.items,
            f"{KEY}_gain": self.gain,
            f"{KEY}_ratio": self.ratio,
        }


def best_prefix(
    values: ArrayLike, fixed_cost: float, variable_cost: float, sizes: ArrayLike | None = None
) -> BestShare:
    """Find how many of the largest values give the most of their sum per cost (eq. 8), on the measured curve.

    Maximizes G(k) = (share of the sum) / (fixed + variable·k). Eq. 15 needs a power law k^γ for the share; the measured
    curve does without, as B.1 allows for any concave one. If G rises up to all values, the share is 1.

    Args:
        values: (n,) not negative, such as gradient norms.
        fixed_cost: cost of each unit of size, whether it is chosen or not.
        variable_cost: further cost of each that is chosen.
        sizes: (n,) positive; 1 each by default.

    Raises:
        BlueprintError: for no value, values that are negative, not finite or all zero, or costs that are not positive.

    Example:
        >>> best = best_prefix([8, 4, 2, 1, 1], fixed_cost=1, variable_cost=4)
        >>> best.share, best.gain, round(best.ratio, 2)
        (0.4, 0.75, 1.44)
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise BlueprintError(
            f"values must be finite, not negative and not all zero, got {array.size} from "
            f"{array.min(initial=0):g} to {array.max(initial=0):g}."
        )
    for cost in (fixed_cost, variable_cost):
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < math.inf:
            raise BlueprintError(
                f"fixed_cost and variable_cost must be positive numbers, got {fixed_cost!r} and {variable_cost!r}."
            )
    order = np.argsort(-array, kind="stable")
    weights = np.ones(array.size) if sizes is None else np.asarray(sizes, dtype=float)
    k, gain = (np.cumsum(part[order]) for part in (weights, array / array.max()))
    k, gain = k / k[-1], gain / gain[-1]
    ratio = gain * (fixed_cost + variable_cost) / (fixed_cost + variable_cost * k)
    at = int(np.argmax(ratio >= ratio.max() * (1 - 1e-12)))
    if ratio[at] <= 1 + 1e-12:
        at = array.size - 1
    return BestShare(float(k[at]), (at + 1) / array.size, float(gain[at]), float(ratio[at]))


def best_share(blueprint: Blueprint) -> BestShare:
    """Find k* of the whole model: the share of its parameters whose update gives the most per resource (eq. 8).

    The gain is the gradient norm that the largest submodules hold, in the order of Algorithm 1, line 3, and the cost
    fixed + variable·k (eq. 10) for a share k of the parameters, by the blueprint's `costs`: without these 2 bytes for a
    frozen parameter and 14 more for a trained one. Where shapes are unknown, submodules are counted instead. Only linear
    layers and fused experts count, unless the blueprint has none.

    Raises:
        BlueprintError: if every gradient norm is zero, or the costs are not positive numbers.

    Example:
        >>> from peft_blueprint import Blueprint
        >>> entries = tuple(Submodule(f"{i}", 2.0 ** -i, shape=(4, 4)) for i in range(8))
        >>> best = best_share(Blueprint("org/model", entries))
        >>> best.share, round(best.gain, 2), round(best.ratio, 2)
        (0.25, 0.75, 2.19)
    """
    entries = [entry for entry in blueprint if entry.form in ADAPTABLE] or list(blueprint)
    has_sizes = all(entry.shape is not None for entry in entries)
    try:
        return best_prefix(
            [norm_of(entry) for entry in entries],
            blueprint.costs.get("fixed_cost", FIXED_COST),
            blueprint.costs.get("variable_cost", VARIABLE_COST),
            [_size(entry) for entry in entries] if has_sizes else None,
        )
    except BlueprintError as error:
        raise BlueprintError(
            f"k* of {blueprint.model_id!r} cannot be found from its gradient norms and costs: {error}"
        ) from error


def k_star_of(blueprint: Blueprint) -> float:
    """Return k* of the whole model: the share of its parameters that the file recommends, or that `best_share` finds.

    Raises:
        BlueprintError: if the file's is not in (0, 1], or as `best_share`.

    Example:
        >>> from peft_blueprint import Blueprint
        >>> k_star_of(Blueprint("org/model", (Submodule("q", 1.0),), costs={"k_star": 0.2}))
        0.2
    """
    value = blueprint.costs.get(KEY)
    if value is None:
        return best_share(blueprint).share
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise BlueprintError(
            f"k_star among the costs of {blueprint.model_id!r} must be in (0, 1], got {value!r}. Measure the blueprint "
            "again."
        )
    return float(value)


def _size(entry: Submodule) -> int:
    return math.prod(entry.shape or ())


def describe_k_star(blueprint: Blueprint) -> str:
    """Describe k* of the whole model; an empty text where the file has none.

    Example:
        >>> from peft_blueprint import Blueprint
        >>> entries = (Submodule("q", 1.0, shape=(8, 8)), Submodule("up", 1.0, shape=(24, 8)))
        >>> costs = {"k_star": 0.25, "k_star_submodules": 0.5, "k_star_ratio": 1.2}
        >>> describe_k_star(Blueprint("org/model", entries, costs=costs))
        '25 % of parameters (50 % of submodules, 1.20 times the gain per cost of all)'
    """
    k, submodules, ratio = (blueprint.costs.get(f"{KEY}{name}") for name in ("", "_submodules", "_ratio"))
    if not isinstance(k, int | float):
        return ""
    has_sizes = all(entry.shape is not None for entry in blueprint)  # otherwise entries are counted
    text = f"{100 * k:.3g} % of {'parameters' if has_sizes else f'{blueprint.level}s'}"
    if isinstance(submodules, int | float) and isinstance(ratio, int | float):
        text += f" ({100 * submodules:.3g} % of {blueprint.level}s, {ratio:.2f} times the gain per cost of all)"
    return text
