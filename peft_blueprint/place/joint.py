"""Plan how many submodules and how much of the data to train, together (eq. 35 and 36)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from numpy.typing import ArrayLike

from .._options import from_keywords
from ..blueprint import Blueprint, best_prefix, q_star
from ..errors import PlacementError
from .cost import CostModel, Structure, Workload, workload_of
from .options import PlacementOptions
from .placement import Placement
from .planner import as_module, plan_placement


_MOST_STEPS = 20  # of the alternation, which converged within 5 wherever it was tried

# costs of fixed and of each share of the data → best share of the data, and the share of their gain that it has
DataGain = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class JointPlan:
    """A placement and a share of the data, chosen for each other. All shares and ratios are predicted.

    Args:
        placement: where adapters go, or which blocks are trained.
        q: share of the examples, those with the largest scores; 1 if choosing some costs more than it saves.
        gain: share of the gain of all candidates on all data (eq. 35).
        cost: share of their cost, that of scoring the examples included unless q is 1.
        scoring_cost: cost of scoring an example, over that of training on it once with all candidates.
        placement_alone: gain per cost of the best placement on all data, over that of all candidates on all data.
        data_alone: the same of all candidates on the best share of the data, at least 1.
    """

    placement: Placement
    q: float
    gain: float
    cost: float
    scoring_cost: float
    placement_alone: float
    data_alone: float

    @property
    def gain_per_cost(self) -> float:
        """Gain per cost over that of all candidates on all data."""
        return self.gain / self.cost

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self) | {"placement": self.placement.to_dict(), "gain_per_cost": self.gain_per_cost}

    def __str__(self) -> str:
        """Two lines: the two shares, and the predicted result."""
        data = f"{100 * self.q:.3g} % of the data" if self.q < 1 else "all data: scoring them costs more than it saves"
        unmeasured = "" if self.placement.is_gain_measured else " The placement's gain is not measured."
        return (
            f"{self.placement.summary()}; {data}\n"
            f"{100 * self.gain:.3g} % of the gain at {100 * self.cost:.3g} % of the cost: {self.gain_per_cost:.2f} times the gain "
            f"per cost of all candidates on all data (placement alone {self.placement_alone:.2f}, data alone "
            f"{self.data_alone:.2f}).{unmeasured}"
        )


def plan_jointly(
    blueprint: Blueprint | None,
    model: Any,
    options: PlacementOptions | None = None,
    *,
    data: float | ArrayLike,
    scoring_cost: float | None = None,
    workload: Workload | None = None,
    **keywords: Any,
) -> JointPlan:
    """Choose the submodules to train and the share of the data to train on, for the most gain per cost of both.

    The gain is that of the placement times that of the data (eq. 35), which assumes that the two are independent;
    `CrossInfluence.select_jointly` measures how far they are. The cost is that of eq. 36 as the cost model predicts it:
    scoring all data, and for each example that is kept the passes of the frozen model and the adapters' own. Each
    choice is the best for the other, in turn. Without a choice of data nothing is scored, so q is 1 unless a part of
    the data beats that.

    Args:
        blueprint: as for `plan_placement`.
        model: as for `plan_placement`.
        options: as for `plan_placement`, without a size: `best` and `budget`, mode and so on.
        data: exponent δ of the data's gain q^δ (eq. 29), in (0, 1); or (examples,) scores that are not negative, such as
            gradient norms, whose curve of retained mass is then the gain.
        scoring_cost: cost of scoring an example, over that of training on it once with all candidates; by default of a
            forward and backward pass of the frozen model, as exact gradient norms take.
        workload: as for `plan_placement`; its `epochs` train on data that was scored once.
        **keywords: fields of `PlacementOptions`, on top of `options`.

    Raises:
        PlacementError: as `plan_placement`, or for a scoring cost that is not positive.
        BlueprintError: for an exponent outside (0, 1), or scores that are negative, not finite or all zero.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> plan = plan_jointly(None, tiny_llama(layers=4), data=0.3, scoring_cost=0.1)
        >>> 0 < plan.q < 1 and plan.gain_per_cost >= max(plan.placement_alone, plan.data_alone)
        True
    """
    options = from_keywords(PlacementOptions, options, keywords, PlacementError)
    objective = options.best or "gain_per_cost"
    options = replace(options, best=objective)
    model = as_module(model)
    workload = workload or workload_of(model)
    everything = plan_placement(
        blueprint, model, replace(options, best=None, overhead=0.0, budget=None, fraction=1.0), workload=workload
    )
    whole = everything.cost["time"]
    scoring = _scoring_cost(model, workload, whole) if scoring_cost is None else scoring_cost
    if not 0 < scoring < float("inf"):
        raise PlacementError(f"scoring_cost must be a positive number, got {scoring_cost}.")
    fixed = (options.overhead + scoring / workload.epochs) * whole
    best_data = _data_gain(data)

    def plan(overhead: float) -> Placement:
        return plan_placement(blueprint, model, replace(options, overhead=overhead / whole), workload=workload)

    def cost(placement: Placement, q: float) -> float:
        time = (fixed if q < 1 else options.overhead * whole) + q * placement.cost["time"]
        return time * placement.cost["memory"] if objective == "gain_per_gb_hour" else time

    def build(placement: Placement, q: float, of_data: float) -> JointPlan:
        gain = (placement.gain_retained or 0.0) * of_data
        return JointPlan(placement, q, gain, cost(placement, q) / cost(everything, 1.0), scoring, 1.0, 1.0)

    alone = build(plan(options.overhead * whole), 1.0, 1.0)
    q, of_data = best_data(fixed, whole)
    of_data_alone = build(everything, q, of_data)
    joint: JointPlan | None = None
    for _ in range(_MOST_STEPS):
        placement = plan(fixed / q)
        q, of_data = best_data(fixed, placement.cost["time"])
        found = build(placement, q, of_data)
        if joint is not None and found.gain_per_cost <= joint.gain_per_cost * (1 + 1e-9):
            break
        joint = found
    best = alone if joint is None or joint.gain_per_cost <= alone.gain_per_cost else joint
    return replace(best, placement_alone=alone.gain_per_cost, data_alone=max(1.0, of_data_alone.gain_per_cost))


def _scoring_cost(model: Any, workload: Workload, whole: float) -> float:
    """Return the step time of a forward and backward pass with nothing trained, over that of all candidates."""
    costs = CostModel(Structure.of(model), replace(workload, epochs=1))
    return costs.time_ratio(costs.floor()) / whole


def _data_gain(data: float | ArrayLike) -> DataGain:
    if isinstance(data, int | float):
        delta = float(data)

        def by_exponent(fixed: float, variable: float) -> tuple[float, float]:
            q = q_star(delta, fixed, variable)
            return q, q**delta

        return by_exponent

    def by_scores(fixed: float, variable: float) -> tuple[float, float]:
        best = best_prefix(data, fixed, variable)
        return best.share, best.gain

    return by_scores
