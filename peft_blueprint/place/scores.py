"""Scores that rank submodules, from measured statistics, and controls that use no measurement.

Each score is a function from entries to numbers; a larger number gets an adapter sooner.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .._text import format_names
from ..blueprint import Submodule, score_of
from ..errors import BlueprintError


Score = Callable[[Sequence[Submodule]], np.ndarray]

_LARGEST = sys.float_info.max  # instead of infinity, where a score overflows
_SMALLEST_NOISE_SCALE = 1e-12  # examples


def score(entries: Sequence[Submodule], by: str, *, seed: int = 0, costs: ArrayLike | None = None) -> np.ndarray:
    """Return the score of each entry, (n,).

    Args:
        entries: to choose from. Some scores depend on all of them: `within_kind` on the kinds' means, `even` on the range
            of depth.
        by: a name in `SCORES`.
        seed: of `random`.
        costs: (n,) positive costs to divide the scores by.

    Raises:
        BlueprintError: for an unknown score, entries without the statistic, or costs that are not positive or not one an
            entry.

    Example:
        >>> from peft_blueprint import Submodule
        >>> score([Submodule("a", 2.0), Submodule("b", 3.0)], "gradient_norm", costs=[1.0, 2.0]).tolist()
        [2.0, 1.5]
    """
    _check_known(by)
    with np.errstate(over="ignore"):
        values = np.minimum(random(entries, seed) if by == "random" else SCORES[by](entries), _LARGEST)
    if costs is None:
        return values
    prices = np.asarray(costs, dtype=float)
    if prices.shape != values.shape:
        raise BlueprintError(f"costs must have one number an entry, got {prices.size} for {values.size} entries.")
    wrong = [entry.name for entry, price in zip(entries, prices, strict=True) if not 0 < price < math.inf]
    if wrong:
        raise BlueprintError(f"costs must be positive and finite, and those of {format_names(wrong)} are not.")
    with np.errstate(over="ignore"):
        return np.minimum(values / prices, _LARGEST)


def comparable_across_kinds(by: str) -> bool:
    """Whether a score compares across kinds of submodule, or only within a kind.

    Gradient norms, also when divided by a weight's norm or number of parameters, and shares of their energy depend on
    the shapes and on the size of activations in a kind. Ratios to the kind's own mean or noise, changes of the loss in
    nats (`weight_gradient`, and `adam_gain` per learning rate) and the controls compare.

    Raises:
        BlueprintError: for an unknown score.
    """
    _check_known(by)
    return by not in _WITHIN_KIND_ONLY


def gradient_norm(entries: Sequence[Submodule]) -> np.ndarray:
    """Mean over examples b of ‖g_b‖, the norm of one example's gradient: the paper's ranking (Algorithm 1, line 3)."""
    return _statistic(entries, "gradient_norm")


def within_kind(entries: Sequence[Submodule]) -> np.ndarray:
    """The gradient norm over its mean in the entry's kind, which makes kinds comparable; 0 where that mean is 0."""
    norms = gradient_norm(entries)
    _, index = np.unique([str(entry.kind) for entry in entries], return_inverse=True)
    means = np.bincount(index, norms) / np.bincount(index)
    return norms / np.where(means > 0, means, 1.0)[index]


def per_root_parameter(entries: Sequence[Submodule]) -> np.ndarray:
    """The gradient norm over √(number of parameters): about the root mean square of the gradient's entries."""
    missing = [entry.name for entry in entries if entry.shape is None]
    if missing:
        raise BlueprintError(
            f"{format_names(missing)} have no shape, which per_root_parameter needs. Measure the blueprint with "
            "generate_blueprint, or expand it onto the model."
        )
    sizes = np.array([math.prod(entry.shape or ()) for entry in entries], dtype=float)
    return gradient_norm(entries) / np.sqrt(sizes)


def relative_gradient_norm(entries: Sequence[Submodule]) -> np.ndarray:
    """The gradient norm over the weight's norm, ‖g‖/‖w‖: the inverse of the trust ratio that LARS scales a layer's step
    by (You et al. 2017, arXiv:1708.03888, eq. 6). 0 for a weight of zeros.
    """
    norms, weights = gradient_norm(entries), _statistic(entries, "weight_norm")
    return np.divide(norms, weights, out=np.zeros_like(norms), where=weights > 0)


def signal_norm(entries: Sequence[Submodule]) -> np.ndarray:
    """‖E g‖, the norm of the mean gradient, estimated without bias: the part that examples agree on."""
    return _statistic(entries, "signal_norm")


def signal_to_noise(entries: Sequence[Submodule]) -> np.ndarray:
    """‖E g‖²/tr(Σ), the inverse of the noise scale (McCandlish et al. 2018, arXiv:1812.06162, eq. 2.8); 0 where no signal
    was seen, whose noise scale is infinite.
    """
    entries = list(entries)
    is_silent = np.array([entry.noise_scale is None and entry.signal_norm == 0 for entry in entries], dtype=bool)
    ratios = np.zeros(len(entries))
    scales = _statistic([entry for entry, silent in zip(entries, is_silent, strict=True) if not silent], "noise_scale")
    ratios[~is_silent] = 1 / np.maximum(scales, _SMALLEST_NOISE_SCALE)
    return ratios


def influence(entries: Sequence[Submodule]) -> np.ndarray:
    """‖(F + λI)⁻¹ḡ‖, the size of the mean gradient preconditioned by the submodule's empirical Fisher matrix (appendix B.3,
    eq. 24). Large where gradients are small, because F grows with their square.
    """
    return _statistic(entries, "influence")


def weight_gradient(entries: Sequence[Submodule]) -> np.ndarray:
    """Σ|w·ḡ| over a weight's entries: the first-order change of the loss if each entry were removed by itself (Lee et al.
    2019, SNIP, arXiv:1810.02340, eq. 5, on the mean gradient; Molchanov et al. 2019, arXiv:1906.10771, eq. 8, has its
    square).
    """
    return _statistic(entries, "weight_gradient")


def singular_energy(entries: Sequence[Submodule]) -> np.ndarray:
    """‖E g‖·√p, where p is the share of the mean gradient's energy in its leading singular directions: the part of the
    signal that an adapter of that rank can follow at first.
    """
    return signal_norm(entries) * np.sqrt(_statistic(entries, "singular_energy"))


def adam_gain(entries: Sequence[Submodule]) -> np.ndarray:
    """E‖G·a‖₁, the expected L1 norm of the gradient that one row a of a new LoRA A gives its column of B.

    Adam's first step has the same size in every entry, so a first step of rank r lowers the loss by lr·α·E‖G·a‖₁; r and
    α are common to all submodules and left out.
    """
    return _statistic(entries, "adam_gain")


def random(entries: Sequence[Submodule], seed: int = 0) -> np.ndarray:
    """Control: uniform in [0, 1), the same for the same seed and number of entries."""
    return np.random.default_rng(seed).random(len(entries))


def even(entries: Sequence[Submodule]) -> np.ndarray:
    """Control: 1 for the entry in the middle by depth, falling evenly to 0 on both sides.

    Applied to the entries of one stratum, its maximum is the stratum's middle, which gives an even spread over strata.
    Applied to a whole model it prefers the middle layers. With an even number of entries the earlier of the two middle
    ones scores 1.
    """
    n = len(entries)
    middle = (n - 1) // 2
    values = np.empty(n)
    values[_by_depth(entries)] = 1 - np.abs(np.arange(n) - middle) / max(n - 1 - middle, 1)
    return values


def first(entries: Sequence[Submodule]) -> np.ndarray:
    """Control: shallow first, from 1 towards 0 with increasing depth."""
    return 1 / (1 + _depths(entries))


def last(entries: Sequence[Submodule]) -> np.ndarray:
    """Control: deep first; the depth, counted from 1."""
    return 1 + _depths(entries)


SCORES: dict[str, Score] = {
    "gradient_norm": gradient_norm,
    "within_kind": within_kind,
    "per_root_parameter": per_root_parameter,
    "relative_gradient_norm": relative_gradient_norm,
    "signal_norm": signal_norm,
    "signal_to_noise": signal_to_noise,
    "influence": influence,
    "weight_gradient": weight_gradient,
    "singular_energy": singular_energy,
    "adam_gain": adam_gain,
    "random": random,
    "even": even,
    "first": first,
    "last": last,
}
CONTROLS = ("random", "even", "first", "last")  # scores that use no measurement
_WITHIN_KIND_ONLY = (
    "gradient_norm",
    "per_root_parameter",
    "relative_gradient_norm",
    "signal_norm",
    "influence",
    "singular_energy",
)


def _check_known(by: str) -> None:
    if by not in SCORES:
        raise BlueprintError(f"rank_by must be one of {', '.join(SCORES)}, got {by!r}.")


def _statistic(entries: Sequence[Submodule], name: str) -> np.ndarray:
    missing = [entry.name for entry in entries if getattr(entry, name) is None]
    if missing:
        how = _NEEDS.get(name, "generate_blueprint")
        raise BlueprintError(
            f"{len(missing)} of {len(entries)} entries have no {name} ({format_names(missing)}). Measure the blueprint again with "
            f"{how}, or rank by gradient_norm."
        )
    return np.array([score_of(entry, name) for entry in entries], dtype=float)


_NEEDS = {
    "signal_norm": "generate_blueprint on at least two examples",
    "noise_scale": "generate_blueprint on at least two examples",
    "influence": "generate_blueprint on at least two examples and a projection_size above 0",
    "singular_energy": "generate_blueprint and a sketch_size above 16",
}


def _depths(entries: Sequence[Submodule]) -> np.ndarray:
    """Depths from 0; entries without one, such as embeddings, count as shallowest."""
    return np.array([0 if entry.depth is None else entry.depth for entry in entries], dtype=float)


def _by_depth(entries: Sequence[Submodule]) -> np.ndarray:
    """Positions of the entries from shallow to deep; entries of one depth keep their order."""
    return np.argsort(_depths(entries), kind="stable")
