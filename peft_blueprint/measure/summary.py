"""Statistics of a measurement: an `Influence` summarized as the entries and the concentration of a blueprint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..blueprint import ADAPTABLE, Blueprint, Level, Submodule, gamma_from_alpha, k_star, norm_of, unit_of
from ..errors import BlueprintError, MeasurementError
from .concentration import FRACTIONS, fit_gamma, fit_rank_exponent, normalize_within, retained_mass_curve, tail_report
from .influence import Influence
from .options import GenerateOptions


ENERGY_RANK = 16  # rank whose share of the gradient's energy is `singular_energy`, a common rank of LoRA
FACTOR_COLUMNS = 16  # of the alignment factor that a blueprint holds


def summarize(influence: Influence, options: GenerateOptions | None = None) -> tuple[Submodule, ...]:
    """Summarize every row of a measurement as an entry, with all statistics except those that need the weight.

    Args:
        influence: norms (submodules, examples) and sketches.
        options: `bootstrap` resamples, `fixed_cost` and `variable_cost` for k*.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> influence = measure_influence(tiny_llama(), toy_batches(), progress=False)
        >>> summarize(influence)[0].examples
        8
    """
    options = options or GenerateOptions()
    norms = influence.norms.double().numpy()
    intervals = bootstrap_intervals(norms, options.bootstrap, influence.seed)
    signals, scales = influence.signal_norms.tolist(), influence.noise_scales.tolist()
    adaptable = [i for i, submodule in enumerate(influence.submodules) if submodule.form in ADAPTABLE]
    shown = [i for i in adaptable if influence.shows_rank(i, ENERGY_RANK) and influence.submodules[i].form != "expert"]
    energies = dict(zip(shown, influence.singular_energy(ENERGY_RANK, shown).tolist(), strict=True)) if shown else {}
    alignments = _rounded_factor(influence)
    row_norms = influence.row_norms
    prompt, prompt_adam = (_as_shares(x) for x in (influence.prompt_shares, influence.prompt_adam_shares))
    routing = _routing(influence)
    entries = []
    for i, submodule in enumerate(influence.submodules):
        rows = row_norms[i].double().numpy()
        is_adaptable = submodule.form in ADAPTABLE
        entries.append(
            replace(
                submodule,
                signal_norm=signals[i] if math.isfinite(signals[i]) else None,
                noise_scale=scales[i] if math.isfinite(scales[i]) else None,
                adam_gain=adam_gain(rows, submodule.shape[-1]) if submodule.shape and is_adaptable else None,
                singular_energy=min(energies[i], 1.0) if i in energies else None,
                prompt_share=prompt[i],
                prompt_adam_share=prompt_adam[i],
                token_share=routing[i][0],
                gate_weight=routing[i][1],
                alignment=alignments[i] if alignments else None,
                examples=influence.examples,
                **_of_norms(norms[i], intervals[i]),
                **_of_rows(rows, options),
            )
        )
    return tuple(entries)


def _as_shares(values: Tensor) -> list[float | None]:
    """Return shares in [0, 1], None for NaN."""
    return [None if math.isnan(value) else min(max(value, 0.0), 1.0) for value in values.tolist()]


def _routing(influence: Influence) -> list[list[float | None]]:
    """Return each row's share of tokens and mean gate weight over examples; None where they are not known."""
    if influence.routing is None:
        return [[None, None]] * len(influence.submodules)
    means = influence.routing.double().mean(dim=1).tolist()
    return [[None if math.isnan(value) else value for value in row] for row in means]


def rows_by_unit(submodules: Sequence[Submodule], level: Level) -> dict[str, list[int]]:
    """Return the indices of every group's or layer's members by its name."""
    units: dict[str, list[int]] = {}
    for i, submodule in enumerate(submodules):
        units.setdefault(unit_of(submodule, level), []).append(i)
    return units


def unit_norms(influence: Influence, units: Mapping[str, Sequence[int]]) -> Tensor:
    """Return each example's gradient norm over all members of a group or layer, (units, examples) float64."""
    return torch.stack(
        [torch.linalg.vector_norm(influence.norms[list(rows)].double(), dim=0) for rows in units.values()]
    )


def summarize_units(
    entries: Sequence[Submodule], influence: Influence, level: Level, options: GenerateOptions
) -> tuple[Submodule, ...]:
    """Summarize groups or layers: entries as `Blueprint.coarsen` makes them, with statistics of the measurement itself.

    Norms, medians and intervals are those of the examples' gradients over all members, and exponents are fitted to the
    members' rows together.

    Args:
        entries: of the submodules, in the order of the measurement.
        influence: norms (submodules, examples) and sketches.
        level: "group" or "layer".
        options: as for `summarize`.
    """
    units = rows_by_unit(influence.submodules, level)
    costs = {"fixed_cost": options.fixed_cost, "variable_cost": options.variable_cost}
    coarse = Blueprint("model", tuple(entries), costs=costs).coarsen(level)
    norms = unit_norms(influence, units).numpy()
    intervals = bootstrap_intervals(norms, options.bootstrap, influence.seed)
    row_norms = influence.row_norms
    completed = []
    for i, (entry, members) in enumerate(zip(coarse, units.values(), strict=True)):
        statistics = _of_norms(norms[i], intervals[i]) | _of_rows(
            np.concatenate([row_norms[row].double().numpy() for row in members]), options
        )
        prompt, prompt_adam = _as_shares(torch.tensor(influence.prompt_share(members)))
        completed.append(replace(entry, prompt_share=prompt, prompt_adam_share=prompt_adam, **statistics))
    return tuple(completed)


def _of_norms(norms: np.ndarray, interval: np.ndarray) -> dict[str, Any]:
    """Return mean, median and interval of one entry's norms, (examples,)."""
    mean = float(norms.mean())
    low, high = map(float, interval)
    return {
        "gradient_norm": mean,
        "median_norm": float(np.median(norms)),
        # few resamples may miss the mean itself
        "norm_interval": (min(low, mean), max(high, mean)) if len(norms) > 1 else None,
    }


def _of_rows(row_norms: np.ndarray, options: GenerateOptions) -> dict[str, Any]:
    """Return the exponents that the norms of the mean gradient's rows follow, and k*."""
    fit = fit_rank_exponent(row_norms)
    gamma = gamma_from_alpha(fit.exponent) if fit else None
    return {
        "alpha": fit.exponent if fit else None,
        "alpha_error": fit.error if fit else None,
        "gamma": gamma,
        "k_star": k_star(gamma, options.fixed_cost, options.variable_cost) if gamma else None,
    }


def adam_gain(row_norms: np.ndarray, d_in: int) -> float:
    """Return the expected L1 norm of the gradient that a row of a freshly initialized LoRA A gives its column of B.

    Adam moves every entry by about the learning rate, whatever the size of its gradient. A first step therefore lowers
    the loss by the learning rate times this L1 norm, where plain gradient descent goes by the L2 norm. The gradient of
    B is G·a. PEFT draws a from U(−1/√d_in, 1/√d_in), of variance 1/(3·d_in), so an entry is about normal and
    E‖G·a‖₁ = √(2/(3π·d_in))·Σ_o‖G_o‖. For rank r and scaling α/r multiply by α.

    Args:
        row_norms: (d_out,) norms of the mean gradient's rows.
        d_in: features of the input.
    """
    return float(math.sqrt(2 / (3 * math.pi * d_in)) * row_norms.sum())


def weight_gradient(weight_rows: np.ndarray, gradient_rows: np.ndarray) -> float:
    """Estimate Σ|w·ḡ| over the entries of a weight from the norms of rows: (2/π)·Σ_o‖w_o‖·‖ḡ_o‖.

    Exact in expectation if the entries of the weight and of the mean gradient are independent of each other within each
    row, and normal with mean zero: E|w| = √(2/π)·‖w_o‖/√d_in, and likewise E|ḡ|.

    Args:
        weight_rows: (d_out,) norms of the weight's rows.
        gradient_rows: (d_out,) norms of the mean gradient's rows.
    """
    return float(2 / math.pi * (weight_rows * gradient_rows).sum())


def bootstrap_intervals(norms: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return 95 % percentile bootstrap intervals of the means over examples.

    Args:
        norms: (submodules, examples).
        resamples: number of resamples of the examples.
        seed: seed of the resamples.

    Returns:
        (submodules, 2): lower and upper ends.
    """
    examples = norms.shape[1]
    counts = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=resamples)
    return np.percentile(norms @ (counts.T / examples), [2.5, 97.5], axis=1).T


def alignment_factor(alignments: ArrayLike, columns: int = FACTOR_COLUMNS) -> np.ndarray:
    """Factor the second moment of alignments C (submodules n, examples B): U (n, ≤ columns) with UUᵀ ≈ Q = CCᵀ/B.

    Q is uncentred, like an empirical Fisher matrix. The first column of U is the mean over examples s = C·1/B, exactly:
    the basis of the examples is rotated so that one direction is the constant one. The other columns are the leading
    principal components of C − s·1ᵀ, so they hold the covariance Q − ssᵀ. Rows are scaled to one size before the
    components are taken; otherwise submodules with large gradients would crowd out the rest. U is an aggregate over
    examples and holds no single example's value.

    Args:
        alignments: C, see `Influence.alignments`.
        columns: maximum number of columns.

    Raises:
        BlueprintError: if C is not a matrix of finite numbers.

    Example:
        >>> alignment_factor([[1.0, 3.0], [2.0, 2.0]])[:, 0]
        array([2., 2.])
    """
    matrix = np.asarray(alignments, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise BlueprintError(
            f"Alignments must be a matrix (submodules, examples) of finite numbers, got shape {matrix.shape} with "
            f"{int((~np.isfinite(matrix)).sum())} that are not finite. Measure at least two examples."
        )
    means = matrix.mean(axis=1)
    sizes = np.sqrt(np.square(matrix).mean(axis=1, keepdims=True))
    sizes[sizes == 0] = 1.0
    centred = (matrix - means[:, None]) / (sizes * math.sqrt(matrix.shape[1]))
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    count = min(columns - 1, int((values > 1e-6).sum()))
    left = left[:, :count]
    left = left * np.sign(left[np.abs(left).argmax(axis=0), range(count)])  # the same sign on every machine
    return np.concatenate([means[:, None], sizes * left * values[:count]], axis=1)


def concentration(entries: Sequence[Submodule]) -> dict[str, Any]:
    """Describe how the gradient norm is distributed over adaptable submodules (over all if none is adaptable).

    `gamma_fit` is the exponent of the measured curve with its residual; `alpha` and `gamma` follow the paper's
    power-law route, for comparison. `tail` says how concentrated the norms are and whether they follow a power law.
    `tail_within_kinds` says the same of norms divided by the mean of their kind, which compare across kinds.

    Raises:
        MeasurementError: if every norm is zero.
    """
    entries = [entry for entry in entries if entry.form in ADAPTABLE] or entries
    norms = [norm_of(entry) for entry in entries]
    if not sum(norms):
        raise MeasurementError("Every gradient norm is zero: the loss does not depend on the model. Check the labels.")
    fractions = [k for k in FRACTIONS if k * len(norms) >= 1]  # below one submodule the curve is only interpolated
    mass = retained_mass_curve(norms, fractions)
    found: dict[str, Any] = {"fractions": fractions, "retained_mass": mass}
    if mass[1:]:  # a single submodule has no curve to fit
        found["gamma_fit"], found["gamma_fit_residual"] = fit_gamma(fractions, mass)
    fit = fit_rank_exponent(norms)
    if fit:
        found |= {"alpha": fit.exponent, "alpha_error": fit.error, "alpha_tail": fit.n}
        found["gamma"] = gamma_from_alpha(fit.exponent)
    kinds = [entry.kind for entry in entries]
    resamples = min(500, max(100, 2_000_000 // len(norms)))  # fewer of very many submodules, to limit the memory
    found["tail"] = tail_report(norms, resamples=resamples).to_dict()
    if len(set(kinds)) > 1:
        found["tail_within_kinds"] = tail_report(normalize_within(norms, kinds), resamples=resamples).to_dict()
    return found


def _rounded_factor(influence: Influence) -> list[tuple[float, ...]]:
    """Return a row of the alignment factor for every submodule, to 6 digits; no rows without alignments."""
    if influence.examples < 2 or not influence.projections.shape[2]:
        return []
    factor = alignment_factor(influence.alignments.numpy())
    return [tuple(float(f"{value:.6g}") for value in row) for row in factor]
