"""What of a measurement may be published: means over examples, with noise, and with a guarantee if one is wanted.

Pure functions on arrays of norms, beside the one that hands a measurement its examples one by one. Knows nothing of
models, files or of how a norm is measured.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import fft
from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr
from torch import Tensor

from ..blueprint import Submodule
from ..errors import BlueprintError, MeasurementError
from .losses import IGNORED, examples_of


SCALE_SHARE = 0.1  # of epsilon, for the norms' common scale
SCALES = np.logspace(-6, 6, 601)  # among which the scale is chosen, whatever the data; neighbours differ by 4.7 %
_PRIOR = 1 / (1 + np.log10(SCALES) ** 2)  # lengths of gradients are oftener near 1 than near a million

_BITS_BELOW_SIGMA = 10  # released means are multiples of a power of two, at least 2¹⁰ of them to a sigma
_FLOOR = 0.1  # in sigmas; what comes out below is set to it, since norms are positive
_RELIABLE = 0.5
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)

_TEXTS = {
    "unit": "one example",
    "neighbours": "two data sets of the same number of examples that differ in the content of one",
    "covers": "all that this file says of the examples, except what was typed in as the data's name and the command; "
    "not their number, which is taken to be public, and not the model's weights",
    "composition": "holds for every domain by itself; for an example in several domains, or in other publications, "
    "epsilons and deltas add up",
}


@dataclass(frozen=True)
class Privacy:
    """How much a blueprint may tell of single examples: some noise, or a guarantee.

    Either `noise`, which makes it harder to infer an example and guarantees nothing; or `epsilon` and `delta`, for which
    the release is (ε, δ)-differentially private: whatever is concluded from the file is about as likely, up to a
    factor e^ε and a probability δ, had one example been another.

    Args:
        noise: standard deviation of the Gaussian noise on each gradient norm, as a share of the mean norm of its kind.
        epsilon: of the whole release of one data set; below 1 strong, above 10 weak.
        delta: far below one over the number of examples; it must at least be below.
        clip: bound on the L2 norm of an example's vector of norms over the submodules, J(z); longer vectors are scaled
            down to it. None scales every vector to length one, which needs no bound, loses the fewest ranks, and learns
            the norms' common scale with a tenth of epsilon. Take a number only from other data or experience: one found
            by looking at these examples is not covered.

    Raises:
        BlueprintError: for neither or both, epsilon without delta, or a number out of its range.
    """

    noise: float = 0.0
    epsilon: float | None = None
    delta: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise BlueprintError(f"noise={self.noise} is no share of a norm: give a number from 0, such as 0.1.")
        if self.noise and (self.epsilon is not None or self.delta is not None):
            raise BlueprintError(
                f"noise={self.noise} and epsilon={self.epsilon}, delta={self.delta}: a guarantee sets its own noise. Give "
                "one or the other."
            )
        if (self.epsilon is None) != (self.delta is None):
            raise BlueprintError(
                f"epsilon={self.epsilon} and delta={self.delta}: a guarantee needs both, such as epsilon=4, delta=1e-5."
            )
        if self.epsilon is not None:
            if not 0 < self.epsilon < math.inf:
                raise BlueprintError(f"epsilon={self.epsilon} is no privacy loss: give a number above 0, such as 4.")
            if not 0 < (self.delta or 0) < 1:
                raise BlueprintError(
                    f"delta={self.delta} is no probability: give a small number above 0, such as 1e-5."
                )
        elif not self.noise:
            raise BlueprintError("Privacy says neither noise nor epsilon and delta: give one, or leave privacy out.")
        if self.clip is not None and (self.epsilon is None or not 0 < self.clip < math.inf):
            raise BlueprintError(
                f"clip={self.clip} with epsilon={self.epsilon}: a bound is a number above 0, and goes with epsilon and "
                "delta."
            )

    @property
    def is_guaranteed(self) -> bool:
        """Whether epsilon and delta are given."""
        return self.epsilon is not None


def gaussian_delta(epsilon: float, sigma: float, sensitivity: float = 1.0) -> float:
    """The smallest δ for which adding N(0, σ²) to every coordinate is (ε, δ)-differentially private.

    Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ), Balle and Wang 2018 (arXiv:1805.06530), theorem 8; computed without the
    difference of nearly equal numbers and without e^ε.

    Args:
        epsilon: from 0.
        sigma: standard deviation of the noise.
        sensitivity: Δ, how far apart in L2 norm neighbouring data sets' values are at most.
    """
    _require_positive(sigma=sigma, sensitivity=sensitivity)
    return math.exp(_log_delta(epsilon, sensitivity / (2 * sigma)))


def analytic_gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest σ for which adding N(0, σ²) to every coordinate is (ε, δ)-differentially private.

    Solves `gaussian_delta` = δ to 1e-10 of σ, from above. For every ε, where the classical √(2·ln(1.25/δ))·Δ/ε holds
    below 1 only and is larger.

    Raises:
        BlueprintError: unless epsilon and sensitivity are positive and delta is in (0, 1).
    """
    _require_positive(epsilon=epsilon, sensitivity=sensitivity)
    if not 0 < delta < 1:
        raise BlueprintError(f"delta={delta} is no probability: give a small number above 0, such as 1e-5.")
    target = math.log(delta)
    low = high = 0.0  # logarithms of Δ/2σ
    while _log_delta(epsilon, math.exp(low)) > target:
        low -= 1.0
    while _log_delta(epsilon, math.exp(high)) < target:
        high += 1.0
    root = brentq(lambda x: _log_delta(epsilon, math.exp(x)) - target, low, high, xtol=1e-13, rtol=1e-13)
    return sensitivity / (2 * math.exp(root)) * (1 + 2e-11)


def release(
    norms: np.ndarray,
    submodules: Sequence[Submodule],
    privacy: Privacy,
    generator: np.random.Generator | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Mean norms of one data set that may be published, and what to say of them.

    With a guarantee every example's vector (n_sub,) is scaled to length one (or clipped to `clip`), and the mean over
    the n examples is released with N(0, σ²) in every coordinate. Neighbouring means are at most √2·clip/n apart: for
    u, v ≥ 0 no longer than c, ‖u − v‖² = ‖u‖² + ‖v‖² − 2⟨u, v⟩ ≤ 2c², since ⟨u, v⟩ ≥ 0. The common scale, the median of
    the vectors' lengths, is chosen among `SCALES` by the exponential mechanism (McSherry and Talwar 2007) with a tenth
    of ε; both parts add up to ε by basic composition. What follows sees released numbers alone: the means are rounded,
    denoised (`shrink`) and kept positive.

    Not guarded against: attacks on floating-point arithmetic (Mironov 2012, doi:10.1145/2382196.2382264), of which the
    rounding to 2⁻¹⁰ σ takes the low bits but is no proof; the time a measurement took; that one failed. Noise comes
    from numpy's PCG64 seeded with 256 bits from the operating system, not from a cryptographic generator.

    Args:
        norms: (n_sub, n), one column an example; a column must depend on that example alone (see `one_by_one`).
        submodules: the rows, which with their order must not depend on the examples.
        privacy: what is wanted.
        generator: of the noise, for tests. By default a new one from the operating system's entropy: who knows the
            seed can subtract the noise, so that it is never recorded.

    Returns:
        Norms (n_sub,) and the statement for the provenance.

    Raises:
        MeasurementError: for fewer than 2 examples, delta from 1/n on, or norms that are no norms.
    """
    norms = np.asarray(norms, dtype=float)
    _check(norms, submodules, privacy)
    generator = generator or np.random.default_rng(np.random.SeedSequence(secrets.randbits(256)))
    if not privacy.is_guaranteed:
        return _with_plain_noise(norms, submodules, privacy, generator)
    assert privacy.epsilon is not None and privacy.delta is not None
    examples = norms.shape[1]
    bound = 1.0 if privacy.clip is None else privacy.clip
    share = SCALE_SHARE if privacy.clip is None else 0.0
    sensitivity = math.sqrt(2) * bound / examples
    sigma = analytic_gaussian_sigma(privacy.epsilon * (1 - share), privacy.delta, sensitivity)
    noisy = bounded(norms, privacy.clip).mean(axis=1) + sigma * generator.standard_normal(len(norms))
    step = 2.0 ** (math.floor(math.log2(sigma)) - _BITS_BELOW_SIGMA)
    rounded = np.rint(noisy / step) * step
    reliability = _reliability(rounded, submodules, sigma)
    scale = 1.0
    if privacy.clip is None:
        odds = scale_probabilities(np.linalg.norm(norms, axis=0), privacy.epsilon * share)
        scale = float(generator.choice(SCALES, p=odds))
    if reliability < _RELIABLE:
        warnings.warn(
            f"Under epsilon={privacy.epsilon:g} with {examples} examples only {reliability:.0%} of what differs between "
            "submodules of a kind is signal, the rest noise: ranks mean little. Measure more examples, or allow a "
            "larger epsilon.",
            stacklevel=2,
        )
    statement = {
        "mechanism": "analytic Gaussian mechanism (Balle and Wang 2018, arXiv:1805.06530)",
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "clip": bound,
        "clip_chosen": "given" if privacy.clip is not None else "none: every example's vector is scaled to length 1",
        **_TEXTS,
        "post_processing": "rounded, blockwise James-Stein shrinkage along depth, kept positive",
        "examples": examples,
        "sensitivity": sensitivity,
        "sigma": sigma,
        "reliability": reliability,
    }
    if privacy.clip is None:
        statement |= {
            "scale": scale,
            "scale_chosen": "median length, exponential mechanism on 601 values from 1e-6 to 1e6",
            "scale_epsilon": privacy.epsilon * share,
        }
    return np.maximum(shrink(rounded, submodules, sigma), _FLOOR * sigma) * scale, statement


def bounded(norms: np.ndarray, clip: float | None) -> np.ndarray:
    """Columns (n_sub, n) no longer than `clip`, or without it of length one; a column of zeros stays."""
    lengths = np.linalg.norm(norms, axis=0)
    safe = np.where(lengths > 0, lengths, 1.0)
    return norms / safe if clip is None else norms * np.minimum(1.0, clip / safe)


def scale_probabilities(lengths: np.ndarray, epsilon: float) -> np.ndarray:
    """Probability of each of `SCALES` under the exponential mechanism for the median of lengths (n,).

    The utility of a scale is minus how far the number of lengths up to it is from n/2. One example moves that number,
    and with it the utility, by at most 1, so that probabilities ∝ prior·exp(ε·utility/2) are ε-differentially private
    for any prior that no data made, here 1/(1 + log₁₀² scale).
    """
    counts = np.searchsorted(np.sort(lengths), SCALES, side="right")
    utility = -np.abs(counts - len(lengths) / 2)
    odds = _PRIOR * np.exp(epsilon / 2 * (utility - utility.max()))
    return odds / odds.sum()


def shrink(values: np.ndarray, submodules: Sequence[Submodule], sigma: float) -> np.ndarray:
    """Released norms (n_sub,) without such differences within a kind as the noise explains.

    Neighbouring blocks have similar norms and noise has no neighbours. So each kind's norms, in the model's order, are
    transformed by an orthonormal cosine transform; its mean stays, and each dyadic band c of m further coefficients is
    multiplied by max(0, 1 − m·σ²/‖c‖²), the positive-part James-Stein estimator in blocks (Cavalier and Tsybakov 2001,
    "Penalized blockwise Stein's method"). It uses released numbers and σ alone, and so costs no privacy.
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
    """Every example as a batch of its own, without its padding.

    In a batch, one example's length decides how much the others are padded, and with that which of them are sketched
    and how their sums are rounded. A guarantee needs a column that depends on its example alone. What a first pass shows
    of the model, such as which layers it calls twice, is taken to be the model's and not the example's.
    """
    for batch in batches:
        for example in examples_of(batch) if isinstance(batch, Mapping) else [batch]:
            yield _without_padding(example) if isinstance(example, Mapping) else example


def published(
    parts: Mapping[str, tuple[Sequence[Submodule], np.ndarray]],
    rows: Sequence[Submodule],
    privacy: Privacy,
    generator: np.random.Generator | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The released norms of every domain, each by itself, and one statement for all.

    Args:
        parts: by domain the submodules that were measured, and their norms (measured, n).
        rows: what is released. A row that no gradient of a domain reached counts as zero: which those are depends on the
            examples.
        privacy: what is wanted, of each domain.
        generator: as for `release`.

    Returns:
        By domain the norms of `rows`; what is common to the domains' statements, with what is not under `domains`.
    """
    released, statements = {}, {}
    for domain, (measured, norms) in parts.items():
        found = {submodule.name: i for i, submodule in enumerate(measured)}
        whole = np.zeros((len(rows), norms.shape[1]))
        for i, row in enumerate(rows):
            if row.name in found:
                whole[i] = norms[found[row.name]]
        released[domain], statements[domain] = release(whole, rows, privacy, generator)
    own = ("examples", "sensitivity", "sigma", "reliability", "scale")
    common = {key: value for key, value in next(iter(statements.values())).items() if key not in own}
    domains = {name or "data": {key: said[key] for key in own if key in said} for name, said in statements.items()}
    return released, {**common, "domains": domains}


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
            f"Norms of shape {norms.shape} and {len(submodules)} submodules do not pair: give (submodules, examples)."
        )
    if not (np.isfinite(norms).all() and (norms >= 0).all()):
        raise MeasurementError("Some norm is negative, infinite or NaN: measure again before anything is published.")
    examples = norms.shape[1]
    if examples < 2:
        raise MeasurementError(f"A mean over {examples} example is no aggregate. Measure at least 2, better hundreds.")
    if privacy.delta is not None and privacy.delta >= 1 / examples:
        raise MeasurementError(
            f"delta={privacy.delta:g} with {examples} examples would allow to publish one of them as it is: give a delta "
            f"far below 1/{examples}, such as {min(1e-5, 10.0 ** math.floor(-math.log10(examples) - 2)):g}."
        )


def _require_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise BlueprintError(f"{name}={value}: it must be a number above 0.")


def _log_delta(epsilon: float, a: float) -> float:
    """ln δ, for a = Δ/2σ. With b = ε/2a = εσ/Δ and φ(a − b) = e^ε·φ(a + b) theorem 8 becomes δ = φ(b − a)·(M(b − a) −
    M(b + a)), where M(x) = Φ(−x)/φ(x) is Mills' ratio, which falls from x to y by the integral of 1 − x·M(x).
    """
    b = epsilon / (2 * a)
    if b < a:
        shown = float(log_ndtr(a - b))
        return shown + math.log1p(-math.exp(float(epsilon + log_ndtr(-a - b)) - shown))
    if a < 0.25:
        x = b + a * _NODES
        fall = a * float(_WEIGHTS @ (1 - x * _mills(x)))
    else:
        fall = float(_mills(b - a) - _mills(b + a))
    return -((b - a) ** 2) / 2 - math.log(2 * math.pi) / 2 + math.log(max(fall, 5e-324))


def _mills(x: Any) -> Any:
    return math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))


def _rows_by_kind(submodules: Sequence[Submodule]) -> list[list[int]]:
    kinds: dict[str | None, list[int]] = {}
    for i, submodule in enumerate(submodules):
        kinds.setdefault(submodule.kind, []).append(i)
    return list(kinds.values())


def _reliability(values: np.ndarray, submodules: Sequence[Submodule], sigma: float) -> float:
    """Share of the variance within kinds that the noise does not explain, in [0, 1]; 1 where no kind has two members."""
    groups = [values[rows] for rows in _rows_by_kind(submodules) if len(rows) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return max(0.0, 1 - sigma**2 * freedom / squares) if squares else float(not groups)


def _without_padding(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """An example without the positions that its mask hides, where all that has positions is known."""
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
