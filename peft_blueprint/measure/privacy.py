"""Release mean gradient norms with noise, or with a guarantee of differential privacy.

Under a guarantee OpenDP (extra `privacy`) calibrates and samples the noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from scipy import fft
from torch import Tensor

from ..blueprint import Submodule
from ..errors import BlueprintError, MeasurementError
from .losses import IGNORED, split_examples


SCALE_SHARE = 0.1  # of epsilon, for the norms' common scale
SCALES = np.logspace(-6, 6, 601)  # candidates for the scale, whatever the data; neighbours differ by 4.7 %
_LOG_PRIOR = -np.log1p(np.log10(SCALES) ** 2)  # gradient lengths are more often near 1 than near a million

_ROUNDING = 1 + 1e-6  # on sensitivities, for the rounding of float64 sums
_FLOOR = 0.1  # in sigmas; norms are positive, so smaller values are raised to it
_RELIABLE = 0.5

_STATEMENT = {
    "unit": "one example",
    "neighbours": "two data sets of the same number of examples that differ in the content of one",
    "covers": "everything in this file that depends on the examples, except the data's name and the command as typed; "
    "not the number of examples, which is public, and not the model's weights",
    "composition": "holds for every domain separately; for an example in several domains, or in other publications, "
    "epsilons and deltas add up",
}


@dataclass(frozen=True)
class Privacy:
    """How much a blueprint may reveal about single examples: some noise, or a guarantee.

    Give `noise`, which makes it harder to infer an example but guarantees nothing. Or give `epsilon` and `delta`: the
    release is then (ε, δ)-differentially private. If one example had been different, any conclusion from the file would
    have been about as likely, up to a factor e^ε and a probability δ.

    Args:
        noise: standard deviation of the Gaussian noise on each gradient norm, as a share of the mean norm of its kind.
        epsilon: privacy loss of the whole release of one data set; below 1 is strong, above 10 weak.
        delta: far below one over the number of examples.
        clip: bound on the L2 norm of an example's vector of norms over the submodules, J(z); longer vectors are scaled
            down to it. None scales every vector to length one, which needs no bound, preserves ranks best, and spends a
            tenth of epsilon on the norms' common scale. Take a number only from other data or from experience: a bound
            found by looking at these examples is not covered by the guarantee.

    Raises:
        BlueprintError: for neither or both, epsilon without delta, or a number out of its range.

    Example:
        >>> Privacy(epsilon=4.0, delta=1e-5).is_guaranteed
        True
    """

    noise: float = 0.0
    epsilon: float | None = None
    delta: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise BlueprintError(f"noise must be a number of at least 0, such as 0.1, got {self.noise}.")
        if self.noise and (self.epsilon is not None or self.delta is not None):
            raise BlueprintError(
                f"noise={self.noise} and epsilon={self.epsilon}, delta={self.delta}: a guarantee sets its own noise. "
                "Give one or the other."
            )
        if (self.epsilon is None) != (self.delta is None):
            raise BlueprintError(
                f"A guarantee needs both epsilon and delta, such as epsilon=4, delta=1e-5; got epsilon={self.epsilon} "
                f"and delta={self.delta}."
            )
        if self.epsilon is not None:
            if not 0 < self.epsilon < math.inf:
                raise BlueprintError(f"epsilon must be positive, such as 4, got {self.epsilon}.")
            if not 0 < (self.delta or 0) < 1:
                raise BlueprintError(f"delta must be in (0, 1), such as 1e-5, got {self.delta}.")
        elif not self.noise:
            raise BlueprintError("Privacy needs noise, or epsilon and delta. Give one, or leave privacy out.")
        if self.clip is not None and (self.epsilon is None or not 0 < self.clip < math.inf):
            raise BlueprintError(
                f"clip must be positive and needs epsilon and delta, got clip={self.clip}, epsilon={self.epsilon}."
            )

    @property
    def is_guaranteed(self) -> bool:
        """Whether epsilon and delta are given."""
        return self.epsilon is not None

    def require_library(self) -> None:
        """Raise BlueprintError if a guarantee is wanted and OpenDP is not installed."""
        if self.is_guaranteed:
            _opendp()


@lru_cache
def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Return the smallest σ for which OpenDP's Gaussian mechanism is (ε, δ)-differentially private.

    OpenDP samples exactly, on a lattice (Canonne, Kamath and Steinke 2020, arXiv:2004.00010), so that the noise has no
    floating-point artefacts an attacker could use (Mironov 2012, doi:10.1145/2382196.2382264). It accounts in
    zero-concentrated differential privacy and converts to (ε, δ). That σ is 2 to 11 % above the one that real numbers
    would need (Balle and Wang 2018, arXiv:1805.06530) for δ = 1e-5 and ε from 0.1 to 200.

    Args:
        epsilon: privacy loss, positive.
        delta: in (0, 1).
        sensitivity: largest L2 distance between the values of neighbouring data sets.

    Raises:
        BlueprintError: for a number out of its range, or without OpenDP.
    """
    Privacy(epsilon=epsilon, delta=delta)  # checks both
    if not 0 < sensitivity < math.inf:
        raise BlueprintError(f"sensitivity must be positive, got {sensitivity}.")
    dp = _opendp()

    def mechanism(sigma: float) -> Any:
        return dp.c.make_fix_delta(dp.c.make_zCDP_to_approxDP(_gaussian(sigma)), delta)

    try:
        return float(dp.binary_search_param(mechanism, d_in=float(sensitivity), d_out=(float(epsilon), float(delta))))
    except (dp.OpenDPException, ValueError) as error:
        raise BlueprintError(
            f"OpenDP cannot calibrate noise for epsilon={epsilon:g}, delta={delta:g} ({str(error).strip()}). Give an "
            "epsilon from 0.01 to 100 and a smaller delta than 0.1."
        ) from error


def choose_scale(lengths: np.ndarray, epsilon: float) -> float:
    """Choose one of `SCALES` near the median of lengths (n,), with ε-differential privacy.

    The score of a scale is minus the distance of the number of lengths up to it from n/2. One example moves the score
    by at most 1. A prior ∝ 1/(1 + log₁₀² scale) that depends on no data is added to the scores. OpenDP's noisy max
    chooses among them (permute-and-flip, McKenna and Sheldon 2020, arXiv:2010.12603).

    Example:
        >>> scale = choose_scale(np.linspace(1.0, 3.0, 1000), epsilon=5.0)
        >>> 1.5 < scale < 2.5
        True
    """
    dp = _opendp()
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.linf_distance(T=float)
    noisy_max = dp.m.make_noisy_max(*space, dp.max_divergence(), scale=2 * _ROUNDING / epsilon)
    return float(SCALES[noisy_max(scale_scores(lengths, epsilon).tolist())])


def scale_scores(lengths: np.ndarray, epsilon: float) -> np.ndarray:
    """Return the scores (601,) that `choose_scale` chooses by."""
    counts = np.searchsorted(np.sort(lengths), SCALES, side="right")
    return 2 / epsilon * _LOG_PRIOR - np.abs(counts - len(lengths) / 2)


def release(
    norms: np.ndarray,
    submodules: Sequence[Submodule],
    privacy: Privacy,
    generator: np.random.Generator | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return mean norms of one data set that may be published, and a statement about them.

    With a guarantee, every example's vector (n_sub,) is scaled to length one (or clipped to `clip`), and the mean over
    the n examples is released with Gaussian noise. Neighbouring means are at most √2·clip/n apart: for u, v ≥ 0 no
    longer than c, ‖u − v‖² = ‖u‖² + ‖v‖² − 2⟨u, v⟩ ≤ 2c², because ⟨u, v⟩ ≥ 0. The common scale, the median of the
    vectors' lengths, is chosen with a tenth of ε (`choose_scale`). Both parts add up to ε by basic composition. What
    follows uses released numbers alone: the means are denoised (`shrink`) and kept positive.

    The noise of a guarantee comes from the operating system's entropy through OpenDP. No seed is honoured, because
    anyone who knows the seed can subtract the noise. Two attacks remain possible: the time that a measurement takes, and
    whether it fails.

    Args:
        norms: (n_sub, n), one column an example; a column must depend on that example alone (see `one_by_one`).
        submodules: the rows, which with their order must not depend on the examples.
        privacy: noise, or epsilon and delta.
        generator: source of the noise without a guarantee; by default a new one.

    Returns:
        Norms (n_sub,) and the statement for the provenance.

    Raises:
        MeasurementError: for fewer than 2 examples, delta of 1/n or more, or norms that are negative or not finite.
        BlueprintError: for a generator with a guarantee, or a guarantee without OpenDP.

    Example:
        >>> from peft_blueprint.measure import find_submodules
        >>> from peft_blueprint.testing import tiny_llama
        >>> found = find_submodules(tiny_llama(layers=1))
        >>> means, statement = release(np.ones((len(found), 50)), found, Privacy(epsilon=4.0, delta=1e-5))
        >>> means.shape == (len(found),), statement["epsilon"]
        (True, 4.0)
    """
    norms = np.asarray(norms, dtype=float)
    _check(norms, submodules, privacy)
    if privacy.epsilon is None or privacy.delta is None:
        return _with_plain_noise(norms, submodules, privacy, generator or np.random.default_rng())
    if generator is not None:
        raise BlueprintError("The noise of a guarantee comes from the operating system. Leave the generator out.")
    examples = norms.shape[1]
    bound = 1.0 if privacy.clip is None else privacy.clip
    share = SCALE_SHARE if privacy.clip is None else 0.0
    sensitivity = math.sqrt(2) * bound / examples * _ROUNDING
    sigma = gaussian_sigma(privacy.epsilon * (1 - share), privacy.delta, sensitivity)
    noisy = np.array(_gaussian(sigma)(bounded(norms, privacy.clip).mean(axis=1).tolist()))
    reliability = _reliability(noisy, submodules, sigma)
    if reliability < _RELIABLE:
        warnings.warn(
            f"Under epsilon={privacy.epsilon:g} with {examples} examples only {reliability:.0%} of the variance between "
            "submodules of a kind is signal, the rest is noise: ranks mean little. Measure more examples, or allow a "
            "larger epsilon.",
            stacklevel=2,
        )
    statement = {
        "mechanism": f"Gaussian mechanism of OpenDP {metadata.version('opendp')}, zCDP converted to (epsilon, delta)",
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "clip": bound,
        "clip_chosen": "given" if privacy.clip is not None else "none: every example's vector is scaled to length 1",
        **_STATEMENT,
        "post_processing": "blockwise James-Stein shrinkage along depth, kept positive",
        "examples": examples,
        "sensitivity": sensitivity,
        "sigma": sigma,
        "reliability": reliability,
    }
    scale = 1.0
    if privacy.clip is None:
        scale = choose_scale(np.linalg.norm(norms, axis=0), privacy.epsilon * share)
        statement |= {
            "scale": scale,
            "scale_chosen": "median length, noisy max of 601 values from 1e-6 to 1e6",
            "scale_epsilon": privacy.epsilon * share,
        }
    return np.maximum(shrink(noisy, submodules, sigma), _FLOOR * sigma) * scale, statement


def bounded(norms: np.ndarray, clip: float | None) -> np.ndarray:
    """Scale columns (n_sub, n) down to length `clip`, or without it to length one; columns of zeros stay.

    Example:
        >>> bounded(np.array([[3.0], [4.0]]), clip=2.5).tolist()
        [[1.5], [2.0]]
    """
    lengths = np.linalg.norm(norms, axis=0)
    safe = np.where(lengths > 0, lengths, 1.0)
    return norms / safe if clip is None else norms * np.minimum(1.0, clip / safe)


def release_domains(
    parts: Mapping[str, tuple[Sequence[Submodule], np.ndarray]],
    rows: Sequence[Submodule],
    privacy: Privacy,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Release the norms of every domain separately, with one statement for all.

    Args:
        parts: by domain the measured submodules, and their norms (measured, n).
        rows: the released submodules. A row that no gradient of a domain reached counts as zero, because which rows
            those are depends on the examples.
        privacy: noise, or epsilon and delta, for each domain.

    Returns:
        By domain the norms of `rows`; and a statement, with the differences between domains under `domains`.
    """
    released, statements = {}, {}
    for domain, (measured, norms) in parts.items():
        found = {submodule.name: row for submodule, row in zip(measured, norms, strict=True)}
        nothing = np.zeros(norms.shape[1])
        whole = np.array([found.get(row.name, nothing) for row in rows])
        released[domain], statements[domain] = release(whole, rows, privacy)
    own = ("examples", "sensitivity", "sigma", "reliability", "scale")
    common = {key: value for key, value in next(iter(statements.values())).items() if key not in own}
    domains = {name or "data": {key: said[key] for key in own if key in said} for name, said in statements.items()}
    return released, {**common, "domains": domains}


def shrink(values: np.ndarray, submodules: Sequence[Submodule], sigma: float) -> np.ndarray:
    """Shrink differences between released norms (n_sub,) of a kind that the noise explains.

    Norms of neighbouring blocks are similar, while noise is independent. Each kind's norms, in the model's order, are
    transformed by an orthonormal cosine transform. Their mean stays. Each dyadic band c of m further coefficients is
    multiplied by max(0, 1 − m·σ²/‖c‖²), the positive-part James-Stein estimator in blocks (Cavalier and Tsybakov 2001,
    "Penalized blockwise Stein's method"). It uses released numbers and σ alone, so it costs no privacy.
    """
    shrunk = np.array(values, dtype=float)
    for rows in _rows_by_kind(submodules):
        coefficients = fft.dct(shrunk[rows], norm="ortho")
        start = 1
        while start < len(rows):
            band = coefficients[start : 2 * start]
            energy = float(band @ band)
            band *= max(0.0, 1 - band.size * sigma**2 / energy) if energy else 0.0
            start *= 2
        shrunk[rows] = fft.idct(coefficients, norm="ortho")
    return shrunk


def one_by_one(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield every example as a batch of its own, without its padding.

    In a batch, the longest example decides how much the others are padded, and so which of them are sketched and how
    their sums are rounded. A guarantee needs columns that depend on their own example alone. Facts about the model that
    a first pass shows, such as layers that are called twice, are taken not to depend on the example.
    """
    for batch in batches:
        for example in split_examples(batch):
            yield _without_padding(example)


def _opendp() -> Any:
    try:
        import opendp.prelude as dp
    except ImportError as error:
        raise BlueprintError(
            "A guarantee of differential privacy needs OpenDP. Run: pip install 'peft-blueprint[privacy]'"
        ) from error
    dp.enable_features("contrib")
    return dp


def _gaussian(sigma: float) -> Any:
    """Make the measurement that adds N(0, σ²) to every number of a list."""
    dp = _opendp()
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.l2_distance(T=float)
    return dp.m.make_gaussian(*space, scale=sigma)


def _with_plain_noise(
    norms: np.ndarray, submodules: Sequence[Submodule], privacy: Privacy, generator: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    means = norms.mean(axis=1)
    sigmas = np.empty(len(means))
    for rows in _rows_by_kind(submodules):
        sigmas[rows] = privacy.noise * means[rows].mean()
    noisy = np.maximum(means + sigmas * generator.standard_normal(len(means)), _FLOOR * sigmas)
    return noisy, {
        "mechanism": "Gaussian noise on every gradient norm",
        "noise": privacy.noise,
        "sigma_is": "noise times the mean norm of the submodule's kind",
        "guarantee": "none",
        "examples": norms.shape[1],
    }


def _check(norms: np.ndarray, submodules: Sequence[Submodule], privacy: Privacy) -> None:
    if norms.ndim != 2 or len(norms) != len(submodules) or not len(norms):
        raise MeasurementError(
            f"norms must be (submodules, examples), got shape {norms.shape} and {len(submodules)} submodules."
        )
    if not (np.isfinite(norms).all() and (norms >= 0).all()):
        raise MeasurementError("A norm is negative, infinite or NaN. Measure again before you publish.")
    examples = norms.shape[1]
    if examples < 2:
        raise MeasurementError(f"A release needs at least 2 examples, better hundreds, got {examples}.")
    if privacy.delta is not None and privacy.delta >= 1 / examples:
        raise MeasurementError(
            f"delta={privacy.delta:g} with {examples} examples would permit to publish one of them unchanged. Give a "
            f"delta far below 1/{examples}, such as {min(1e-5, 10.0 ** math.floor(-math.log10(examples) - 2)):g}."
        )


def _rows_by_kind(submodules: Sequence[Submodule]) -> list[list[int]]:
    kinds: dict[str | None, list[int]] = {}
    for i, submodule in enumerate(submodules):
        kinds.setdefault(submodule.kind, []).append(i)
    return list(kinds.values())


def _reliability(values: np.ndarray, submodules: Sequence[Submodule], sigma: float) -> float:
    """Return the share of variance within kinds that is not noise, in [0, 1]; 1 if no kind has two members."""
    groups = [values[rows] for rows in _rows_by_kind(submodules) if len(rows) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return max(0.0, 1 - sigma**2 * freedom / squares) if squares else float(not groups)


def _without_padding(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drop the positions that the mask hides, if all tensors with positions are known."""
    mask = example.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return example
    seen = mask[0] != 0
    long = {k: v for k, v in example.items() if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == len(seen)}
    labels = long.get("labels")
    hides_targets = labels is not None and bool((labels[0, ~seen] != IGNORED).any())
    if hides_targets or long.keys() - {"attention_mask", "input_ids", "labels", "position_ids", "token_type_ids"}:
        return example
    return {**example, **{key: value[:, seen] for key, value in long.items()}}
