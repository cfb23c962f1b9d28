"""The formulas of the paper as functions of plain numbers.

Equation numbers are those of "AI Progress Should Be Measured by Capability-Per-Resource" (McCoy, Wu, Butzin-Dozier
2025); where its printed numbers differ from its own formulas, the docstring gives both. The cost's coefficients, alpha
and beta in the paper, are `fixed_cost` and `variable_cost` here, because `alpha` is the power-law exponent.
"""

import math
from dataclasses import dataclass

from ..errors import BlueprintError


# bytes a parameter: frozen, 2 for bfloat16; trained, 14 more for its gradient, a float32 copy and two Adam moments (§5)
FIXED_COST = 2.0
VARIABLE_COST = 14.0

_MOST_STEPS, _CONVERGED = 100_000, 1e-13  # of an alternation


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BlueprintError(message)


def _require_share(name: str, value: float) -> None:
    _require(0 < value <= 1, f"{name} must be in (0, 1], got {value}.")


def retained_mass(k: float, n: int, alpha: float) -> float:
    """Return the share of the gradient norm in the top k·n of n parameters under a power law, by the integral (eq. 7).

    ((kN)^(1−α) − 1) / (N^(1−α) − 1). For N = 10,000, α = 1.5, k = 0.1 this is 97.8 %; the paper's §4.1 prints
    "nearly 50 %" for that example.

    Args:
        k: fraction of the parameters, in (0, 1].
        n: number of parameters.
        alpha: exponent of the rank-size law ‖∇θ_(r)‖ ≈ C·r^−α, above 1.

    Raises:
        BlueprintError: for arguments outside these ranges, or fewer than one parameter in the top.

    Example:
        >>> round(retained_mass(0.1, 10_000, alpha=1.5), 3)
        0.978
    """
    _require_share("k", k)
    _require(
        alpha > 1, f"alpha must be above 1 for eq. 7, got {alpha}. Use retained_mass_exact for smaller exponents."
    )
    _require(k * n >= 1 and n > 1, f"k·n must be at least 1 and n above 1 for eq. 7, got k·n={k * n:g}, n={n}.")
    return ((k * n) ** (1 - alpha) - 1) / (n ** (1 - alpha) - 1)


def retained_mass_exact(k: float, n: int, alpha: float) -> float:
    """Return the share of the gradient norm in the top round(k·n) of n parameters, by the sums of eq. 3 and 6.

    For N = 10,000, α = 1.5, k = 0.1 this is 98.3 %.

    Raises:
        BlueprintError: for k outside (0, 1], n below 1, or alpha not positive.

    Example:
        >>> round(retained_mass_exact(0.1, 10_000, alpha=1.5), 3)
        0.983
    """
    _require_share("k", k)
    _require(n >= 1 and alpha > 0, f"n must be at least 1 and alpha positive, got n={n}, alpha={alpha}.")
    top = max(1, round(k * n))
    head = math.fsum(r**-alpha for r in range(1, top + 1))
    return head / (head + math.fsum(r**-alpha for r in range(top + 1, n + 1)))


def gamma_from_alpha(alpha: float) -> float:
    """Return the concentration exponent γ = 1 − α/(1 + α) of appendix A.1's text.

    A heavier concentration (larger α) gives a smaller γ, as Δ_k ≈ k^γ·Δ_full requires. The example file in A.1 follows
    α/(1 + α) instead (1.47 → 0.60); `from_dict` recognizes and converts it.

    Raises:
        BlueprintError: if alpha is not positive.

    Example:
        >>> gamma_from_alpha(1.0)
        0.5
    """
    _require(alpha > 0, f"alpha, a power-law exponent, must be positive, got {alpha}.")
    return 1 - alpha / (1 + alpha)


def gain_per_cost(k: float, gamma: float, fixed_cost: float, variable_cost: float) -> float:
    """Return G(k) = k^γ / (fixed + variable·k), the gain per cost up to a constant (eq. 12).

    Raises:
        BlueprintError: for k outside (0, 1] or costs that are not positive.

    Example:
        >>> round(gain_per_cost(0.375, 0.6, fixed_cost=1, variable_cost=4), 4)
        0.2221
    """
    _require_share("k", k)
    _require_costs(gamma, fixed_cost, variable_cost)
    return k**gamma / (fixed_cost + variable_cost * k)


def k_star(gamma: float, fixed_cost: float, variable_cost: float) -> float:
    """Return the fraction k* that maximizes G(k) (eq. 15), at most 1.

    k* = γ·fixed / (variable·(1 − γ)) is below 1 only if γ < variable/(fixed + variable) (eq. 16); otherwise G rises up
    to the best fraction 1.

    Raises:
        BlueprintError: for gamma outside (0, 1) or costs that are not positive.

    Example:
        >>> round(k_star(0.6, fixed_cost=1, variable_cost=4), 3)
        0.375
    """
    _require_costs(gamma, fixed_cost, variable_cost)
    return min(1.0, gamma * fixed_cost / (variable_cost * (1 - gamma)))


def _require_costs(gamma: float, fixed_cost: float, variable_cost: float) -> None:
    _require(0 < gamma < 1, f"gamma must be in (0, 1), got {gamma}.")
    _require(
        fixed_cost > 0 and variable_cost > 0,
        f"fixed_cost and variable_cost must be positive, got {fixed_cost} and {variable_cost}.",
    )


@dataclass(frozen=True)
class PartialUpdate:
    """The best fraction of Proposition B.1, its gain per cost, and that of a full update."""

    k: float
    gain_per_cost: float
    full_gain_per_cost: float

    @property
    def beats_full(self) -> bool:
        """Whether updating the fraction k gives strictly more per resource than updating everything."""
        return self.k < 1 and self.gain_per_cost > self.full_gain_per_cost


def partial_update(gamma: float, fixed_cost: float, variable_cost: float) -> PartialUpdate:
    """Find the best fraction of Proposition B.1 and compare it with a full update.

    For fixed 1, variable 4, γ = 0.6 the answer is k* = 0.375 with G = 0.2221 against 0.2 (the paper's B.2 prints
    0.228, having rounded 0.375^0.6 = 0.5552 up to 0.57).

    Raises:
        BlueprintError: as `k_star`.

    Example:
        >>> partial_update(0.6, fixed_cost=1, variable_cost=4).beats_full
        True
    """
    k = k_star(gamma, fixed_cost, variable_cost)
    return PartialUpdate(
        k,
        gain_per_cost(k, gamma, fixed_cost, variable_cost),
        gain_per_cost(1.0, gamma, fixed_cost, variable_cost),
    )


@dataclass(frozen=True)
class CombinedGain:
    """Shares of gain and cost of parameter and data selection together (eq. 35)."""

    gain: float
    cost: float

    @property
    def ratio(self) -> float:
        """Gain per cost relative to using everything."""
        return self.gain / self.cost


def combined_gain(k: float, gamma: float, q: float, delta: float) -> CombinedGain:
    """Return the gain k^γ·q^δ and cost k·q of training a fraction k of the parameters on a fraction q of the data.

    For γ = 0.6, δ = 0.7, k = 0.2, q = 0.3: gain 0.3807·0.4305 = 0.1639, cost 0.06, ratio 2.73 (the paper prints 0.19
    and 3.17).

    Raises:
        BlueprintError: for k or q outside (0, 1].

    Example:
        >>> round(combined_gain(0.2, 0.6, q=0.3, delta=0.7).ratio, 2)
        2.73
    """
    _require_share("k", k)
    _require_share("q", q)
    return CombinedGain(gain=k**gamma * q**delta, cost=k * q)


def q_star(delta: float, fixed_cost: float, variable_cost: float) -> float:
    """Return the fraction q* of the data that maximizes q^δ / (fixed + variable·q) (eq. 30 and 31), at most 1.

    The same optimum as `k_star`, for the data: `fixed_cost` of choosing, per example of all the data, and
    `variable_cost` of training on one. Above δ = variable/(fixed + variable), all the data give the most per cost.

    Raises:
        BlueprintError: for delta outside (0, 1) or costs that are not positive.

    Example:
        >>> round(q_star(0.4, fixed_cost=1, variable_cost=3), 3)
        0.222
    """
    _require(0 < delta < 1, f"delta must be in (0, 1), got {delta}.")
    return k_star(delta, fixed_cost, variable_cost)


@dataclass(frozen=True)
class JointCost:
    """Cost of training a share k of the parameters on a share q of the data (eq. 36); without `pairs`, eq. 37.

    Args:
        fixed: α'', independent of the trained parameters and of the data.
        parameters: β''·N, of training all parameters, independent of the data: memory of optimizer states.
        examples: γ''·M, of processing all data, independent of the trained parameters: passes of the frozen model.
        pairs: η''·N·M, of training all parameters on all data, beside these.

    Raises:
        BlueprintError: if a cost is negative or not finite, or `fixed` is 0.

    Example:
        >>> JointCost(fixed=1, parameters=4, examples=3).of(0.5, 1.0)
        6.0
    """

    fixed: float
    parameters: float = 0.0
    examples: float = 0.0
    pairs: float = 0.0

    def __post_init__(self) -> None:
        costs = (self.fixed, self.parameters, self.examples, self.pairs)
        _require(
            all(0 <= cost < math.inf for cost in costs) and self.fixed > 0,
            f"Costs must be finite and not negative, and fixed above 0, got {self}.",
        )

    def of(self, k: float, q: float) -> float:
        """Return the cost of a share k of the parameters on a share q of the data."""
        return self.fixed + self.parameters * k + self.examples * q + self.pairs * k * q


@dataclass(frozen=True)
class JointUpdate:
    """The best pair of fractions, its gain per cost, and that of all parameters on all data."""

    k: float
    q: float
    gain_per_cost: float
    full_gain_per_cost: float

    @property
    def ratio(self) -> float:
        """Gain per cost over that of all parameters on all data, at least 1."""
        return self.gain_per_cost / self.full_gain_per_cost


def joint_update(gamma: float, delta: float, cost: JointCost) -> JointUpdate:
    """Find the fractions k and q that maximize k^γ·q^δ (eq. 35) over the joint cost (eq. 36).

    In log k and log q the logarithm of the cost is a log-sum-exp, which is convex, so the ratio has one maximum.
    Alternation finds it: for a given q the best k is that of eq. 15, with the terms of q alone as the fixed cost.

    Raises:
        BlueprintError: for gamma or delta outside (0, 1).

    Example:
        >>> best = joint_update(0.3, 0.4, JointCost(fixed=1, parameters=4, examples=3))
        >>> round(best.k, 3), round(best.q, 3), round(best.ratio, 3)
        (0.25, 0.444, 1.145)
    """
    for name, value in (("gamma", gamma), ("delta", delta)):
        _require(0 < value < 1, f"{name} must be in (0, 1), got {value}.")

    def best(exponent: float, fixed: float, variable: float) -> float:
        return k_star(exponent, fixed, variable) if variable > 0 else 1.0

    k, q = 1.0, 1.0
    for _ in range(_MOST_STEPS):
        before = k, q
        k = best(gamma, cost.fixed + cost.examples * q, cost.parameters + cost.pairs * q)
        q = best(delta, cost.fixed + cost.parameters * k, cost.examples + cost.pairs * k)
        if max(abs(k / before[0] - 1), abs(q / before[1] - 1)) < _CONVERGED:
            break
    return JointUpdate(k, q, k**gamma * q**delta / cost.of(k, q), 1 / cost.of(1, 1))


def optimizer_bytes_saved(parameters: float, frozen_fraction: float, bytes_per_parameter: float = 12) -> float:
    """Return the bytes of optimizer state saved by freezing a fraction of the parameters (§5).

    The default of 12 bytes is an fp32 master copy and two Adam moments: 80 % of 7 B parameters saves 67.2 GB.

    Raises:
        BlueprintError: for frozen_fraction outside [0, 1].

    Example:
        >>> optimizer_bytes_saved(7e9, 0.8)
        67200000000.0
    """
    _require(0 <= frozen_fraction <= 1, f"frozen_fraction must be in [0, 1], got {frozen_fraction}.")
    return parameters * frozen_fraction * bytes_per_parameter
