"""Compare a local blueprint with the published one, by ranks within each kind, and reconcile the two."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..blueprint import Z95, Blueprint, Level, Submodule, norm_of, require_same_names
from ..errors import BlueprintError, DriftError, MismatchError


Policy = Literal["warn", "error", "refresh", "coarsen"]

# On SmolLM2-135M two samples of 16 examples of the same data correlate at 0.90 to 0.99 on average, of different data at
# 0.75 to 0.88; RESULTS.md, "Drift", has the table. The two overlap: near the threshold, probe more examples.
DRIFT_THRESHOLD = 0.85

_SMALLEST_KIND = 4  # entries; Fisher's z has variance 1/(n − 3)
_COARSER: dict[Level, Level] = {"submodule": "group", "group": "layer"}


@dataclass(frozen=True)
class Drift:
    """The rank correlation of two blueprints.

    Args:
        correlation: Spearman's, within each kind, pooled over kinds with Fisher's z.
        interval: 95 %; from the entries' own confidence intervals where both blueprints have them, otherwise from
            the number of entries.
        by_kind: Spearman's correlation of every kind with at least 4 entries.
        threshold: below which the local blueprint counts as drifted.
        level: of the comparison.
    """

    correlation: float
    interval: tuple[float, float]
    by_kind: dict[str, float]
    threshold: float
    level: Level

    @property
    def drifted(self) -> bool:
        """Whether the correlation is below the threshold."""
        return self.correlation < self.threshold


def check_drift(
    local: Blueprint,
    published: Blueprint,
    *,
    threshold: float = DRIFT_THRESHOLD,
    draws: int = 300,
    seed: int = 0,
) -> Drift:
    """Correlate the ranks of a local probe with those of a published blueprint, kind by kind.

    The two are compared at the coarser of their levels. The interval covers the error from the limited
    number of examples: each draw takes every norm from its own confidence interval and computes the correlation again.

    Args:
        local: a probe on your own data.
        published: the blueprint that came with the model.
        threshold: see `Drift`.
        draws: for the interval.
        seed: of the draws.

    Raises:
        MismatchError: if they do not name the same submodules, or no kind has 4 entries.

    Example:
        >>> entries = tuple(Submodule(f"attn.{i}", 1.0 + i, kind="attn") for i in range(4))
        >>> published = Blueprint("org/model", entries, level="group")
        >>> check_drift(replace(published, submodules=entries[::-1]), published).by_kind
        {'attn': 1.0}
    """
    local, published = _to_one_level(local, published)
    require_same_names(local, published, "compared")
    theirs = {entry.name: entry for entry in published}
    kinds: dict[str, list[tuple[Submodule, Submodule]]] = {}
    for entry in local:
        kinds.setdefault(entry.kind or "all", []).append((entry, theirs[entry.name]))
    usable = {kind: pairs for kind, pairs in sorted(kinds.items()) if len(pairs) >= _SMALLEST_KIND}
    if not usable:
        raise MismatchError(
            f"No kind of submodule has {_SMALLEST_KIND} entries (there are {len(local)} in {len(kinds)} kinds), too "
            "few to correlate ranks. Measure at submodule level, on all layers."
        )
    norms = {kind: np.array([[norm_of(a), norm_of(b)] for a, b in pairs]).T for kind, pairs in usable.items()}
    by_kind = {kind: float(spearman(*pair)) for kind, pair in norms.items()}
    weights = [len(pairs) - 3 for pairs in usable.values()]
    z = float(_pooled_z(list(by_kind.values()), weights))
    spread = _spread_of_z(usable, norms, weights, draws, seed)
    return Drift(
        correlation=math.tanh(z),
        interval=(math.tanh(z - Z95 * spread), math.tanh(z + Z95 * spread)),
        by_kind=by_kind,
        threshold=threshold,
        level=local.level,
    )


def reconcile(
    published: Blueprint,
    local: Blueprint,
    *,
    weight: float = 0.5,
    policy: Policy = "warn",
    threshold: float = DRIFT_THRESHOLD,
) -> Blueprint:
    """Blend two blueprints unless the published one has drifted: lines 1 and 2 of Algorithm 1 with a check between.

    Args:
        published: the blueprint that came with the model.
        local: a probe on your own data, at submodule level.
        weight: of the published one in the blend.
        policy: for drifted blueprints. `warn` blends them all the same; `error` raises; `refresh` returns the probe;
            `coarsen` blends groups, or otherwise whole layers, at the first level where the two agree, gives each
            submodule its share of its group's norm, and returns the probe if they agree at no level.
        threshold: see `Drift`.

    Raises:
        DriftError: under the policy `error`.
        BlueprintError: for an unknown policy.
    """
    if policy not in ("warn", "error", "refresh", "coarsen"):
        raise BlueprintError(f"policy must be warn, error, refresh or coarsen, got {policy!r}.")
    drift = check_drift(local, published, threshold=threshold)
    published = published.expand(local.submodules)
    if not drift.drifted:
        return published.blend(local, weight)
    said = (
        f"The blueprint of {published.model_id!r} does not fit this data: the rank correlation with a local probe is "
        f"{drift.correlation:.2f} [{drift.interval[0]:.2f}, {drift.interval[1]:.2f}], below {threshold:.2f}."
    )
    if policy == "error":
        raise DriftError(f"{said} Use policy='refresh' for the probe alone, or measure more examples.")
    warnings.warn(f"{said} Policy: {policy}.", stacklevel=2)
    if policy == "warn":
        return published.blend(local, weight)
    if policy == "coarsen":
        level = drift.level
        while level in _COARSER:
            level = _COARSER[level]
            try:
                agreed = not check_drift(local.coarsen(level), published.coarsen(level), threshold=threshold).drifted
            except MismatchError:  # too few units at this level to tell
                break
            if agreed:
                return published.coarsen(level).blend(local.coarsen(level), weight).expand(local.submodules)
    return replace(local, provenance={**local.provenance, "instead_of": dict(published.provenance)})


def _to_one_level(a: Blueprint, b: Blueprint) -> tuple[Blueprint, Blueprint]:
    order: list[Level] = ["submodule", "group", "layer"]
    level = order[max(order.index(a.level), order.index(b.level))]
    return a.coarsen(level), b.coarsen(level)


def spearman(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Return Spearman's correlation along the last axis, with mean ranks for ties; 0 where one side is constant.

    `scipy.stats.spearmanr` takes one pair at a time, 30 times as long for all draws of a bootstrap.

    Example:
        >>> float(spearman([1, 2, 3], [10, 20, 15]))
        0.5
    """
    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (stats.rankdata(v, axis=-1) for v in (a, b)))
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return (x * y).sum(axis=-1) / np.where(scale > 0, scale, 1)


def _pooled_z(correlations: Sequence[float] | Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the mean of Fisher's z over kinds, weighted by the inverse of its variance 1/(n − 3)."""
    clipped = np.clip(correlations, -0.9999, 0.9999)
    return np.average(np.arctanh(clipped), axis=0, weights=weights)


def _spread_of_z(
    pairs: dict[str, list[tuple[Submodule, Submodule]]],
    norms: dict[str, np.ndarray],
    weights: Sequence[float],
    draws: int,
    seed: int,
) -> float:
    """Return the standard deviation of the pooled z under the entries' errors, or without them of its sampling.

    1.06/(n − 3) is the variance of z for Spearman's correlation (Fieller, Hartley and Pearson 1957).
    """
    errors = {
        kind: np.array([[a.norm_error, b.norm_error] for a, b in of_kind], dtype=float).T  # None becomes NaN
        for kind, of_kind in pairs.items()
    }
    if any(np.isnan(error).any() for error in errors.values()):
        return math.sqrt(1.06 / sum(weights))
    generator = np.random.default_rng(seed)
    drawn = [generator.normal(norms[kind], errors[kind], size=(draws, *norms[kind].shape)) for kind in pairs]
    return float(np.std(_pooled_z([spearman(draw[:, 0], draw[:, 1]) for draw in drawn], weights)))
