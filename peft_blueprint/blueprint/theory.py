"""The paper's formulas as functions of plain numbers.

Knows nothing of models or files. Equation numbers are those of "AI Progress Should Be Measured by
Capability-Per-Resource" (McCoy, Wu, Butzin-Dozier 2025); where its printed numbers differ from its own formulas, the
docstring says so. The cost's coefficients, alpha and beta in the paper, are `fixed_cost` and `variable_cost` here, so
that `alpha` only ever means the power-law exponent.
"""

import math
from dataclasses import dataclass

from ..errors import BlueprintError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BlueprintError(message)


def _require_share(name: str, value: float) -> None:
    _require(0 < value <= 1, f"{name}={value} is not a share: give a number above 0 and at most 1.")


def retained_mass(k: float, n: int, alpha: float) -> float:
    """Share of the total gradient norm held by the top k·n of n parameters under a power law, by the integral (eq. 7).

    ((kN)^(1−α) − 1) / (N^(1−α) − 1). For N = 10,000, α = 1.5, k = 0.1 this is 97.8 %; the paper's §4.1 prints
    "nearly 50 %" for that example.

    Args:
        k: fraction of the parameters, in (0, 1].
        n: number of parameters.
        alpha: exponent of the rank-size law ‖∇θ_(r)‖ ≈ C·r^−α, above 1.

    Raises:
        BlueprintError: for arguments outside these ranges, or fewer than one parameter in the top.
    """
    _require_share("k", k)
    _require(alpha > 1, f"alpha={alpha}: eq. 7 needs alpha > 1. Use retained_mass_exact for smaller exponents.")
    _require(k * n >= 1 and n > 1, f"k·n = {k * n:g} of n={n}: eq. 7 needs at least one parameter in the top.")
    return ((k * n) ** (1 - alpha) - 1) / (n ** (1 - alpha) - 1)


def retained_mass_exact(k: float, n: int, alpha: float) -> float:
    """Share of the total gradient norm held by the top round(k·n) of n parameters, by the sums of eq. 3 and 6.

    For N = 10,000, α = 1.5, k = 0.1 this is 98.3 %.

    Raises:
        BlueprintError: for k outside (0, 1], n below 1, or alpha not positive.
    """
    _require_share("k", k)
    _require(n >= 1 and alpha > 0, f"n={n}, alpha={alpha}: give n of at least 1 and a positive alpha.")
    top = max(1, round(k * n))
    head = math.fsum(r**-alpha for r in range(1, top + 1))
    return head / (head + math.fsum(r**-alpha for r in range(top + 1, n + 1)))


def gamma_from_alpha(alpha: float) -> float:
    """The concentration exponent γ = 1 − α/(1 + α) of appendix A.1's text.

    A heavier concentration (larger α) gives a smaller γ, as Δ_k ≈ k^γ·Δ_full requires. The example file in A.1 follows
    α/(1 + α) instead (1.47 → 0.60); `formats` recognises it and converts.

    Raises:
        BlueprintError: if alpha is not positive.
    """
    _require(alpha > 0, f"alpha={alpha} is not a power-law exponent: give a positive number.")
    return 1 - alpha / (1 + alpha)


def gain_per_cost(k: float, gamma: float, fixed_cost: float, variable_cost: float) -> float:
    """G(k) = k^γ / (fixed + variable·k), the performance-per-resource ratio up to a constant (eq. 12).

    Raises:
        BlueprintError: for k outside (0, 1] or costs that are not positive.
    """
    _require_share("k", k)
    _require_costs(gamma, fixed_cost, variable_cost)
    return k**gamma / (fixed_cost + variable_cost * k)


def k_star(gamma: float, fixed_cost: float, variable_cost: float) -> float:
    """The fraction k* that maximises G(k) (eq. 15), never above 1.

    k* = γ·fixed / (variable·(1 − γ)) is below 1 only if γ < variable/(fixed + variable) (eq. 16); otherwise G rises
    all the way and the best fraction is 1, which is what is returned then.

    Raises:
        BlueprintError: for gamma outside (0, 1) or costs that are not positive.
    """
    _require_costs(gamma, fixed_cost, variable_cost)
    return min(1.0, gamma * fixed_cost / (variable_cost * (1 - gamma)))


def _require_costs(gamma: float, fixed_cost: float, variable_cost: float) -> None:
    _require(0 < gamma < 1, f"gamma={gamma}: the paper's curve k^gamma needs gamma between 0 and 1.")
    _require(
        fixed_cost > 0 and variable_cost > 0,
        f"fixed_cost={fixed_cost}, variable_cost={variable_cost}: both must be positive.",
    )


@dataclass(frozen=True)
class PartialUpdate:
    """What Proposition B.1 says for given numbers: the best fraction, its ratio, and the ratio of a full update."""

    k: float
    gain_per_cost: float
    full_gain_per_cost: float

    @property
    def beats_full(self) -> bool:
        """Whether updating the fraction k gives strictly more per resource than updating everything."""
        return self.k < 1 and self.gain_per_cost > self.full_gain_per_cost


def partial_update(gamma: float, fixed_cost: float, variable_cost: float) -> PartialUpdate:
    """Check Proposition B.1: does some k < 1 beat a full update, and which is best?

    For fixed 1, variable 4, γ = 0.6 the answer is k* = 0.375 with G = 0.2221 against 0.2 (the paper's B.2 prints
    0.228, having rounded 0.375^0.6 = 0.5552 up to 0.57).

    Raises:
        BlueprintError: as `k_star`.
    """
    k = k_star(gamma, fixed_cost, variable_cost)
    return PartialUpdate(
        k,
        gain_per_cost(k, gamma, fixed_cost, variable_cost),
        gain_per_cost(1.0, gamma, fixed_cost, variable_cost),
    )


@dataclass(frozen=True)
class CombinedGain:
    """Parameter and data selection together (eq. 35): the share of the gain kept, and of the cost paid."""

    gain: float
    cost: float

    @property
    def ratio(self) -> float:
        """Gain per cost relative to using everything."""
        return self.gain / self.cost


def combined_gain(k: float, gamma: float, q: float, delta: float) -> CombinedGain:
    """The gain k^γ·q^δ at the cost k·q of a fraction k of the parameters trained on a fraction q of the data (B.5).

    For γ = 0.6, δ = 0.7, k = 0.2, q = 0.3: gain 0.3807·0.4305 = 0.1639, cost 0.06, ratio 2.73 (the paper prints 0.19
    and 3.17).

    Raises:
        BlueprintError: for k or q outside (0, 1].
    """
    _require_share("k", k)
    _require_share("q", q)
    return CombinedGain(gain=k**gamma * q**delta, cost=k * q)


def optimizer_bytes_saved(parameters: float, frozen_fraction: float, bytes_per_parameter: float = 12) -> float:
    """Bytes of optimizer state not held when a fraction of the parameters is frozen (§5).

    The default of 12 bytes is an fp32 master copy and two Adam moments: 80 % of 7 B parameters saves 67.2 GB.

    Raises:
        BlueprintError: for frozen_fraction outside [0, 1].
    """
    _require(0 <= frozen_fraction <= 1, f"frozen_fraction={frozen_fraction} is not a share between 0 and 1.")
    return parameters * frozen_fraction * bytes_per_parameter
