"""From model and data to a `Blueprint`: measure once, then summarise. A local probe is the same act with fewer
examples.

Knows nothing of files; what it writes down about the run goes into the blueprint's provenance.
"""

import datetime
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn

from .._processes import of_first_process, process_count
from ..blueprint import (
    ADAPTABLE,
    PROJECTION_SIZE,
    SKETCH_SIZE,
    Blueprint,
    Include,
    Method,
    Submodule,
    gamma_from_alpha,
    k_star,
    norm_of,
)
from ..errors import MeasurementError
from ..runs import Ledger, modelled
from .compatibility import WEIGHTS_DIGEST, weights_digest
from .concentration import FRACTIONS, fit_gamma, fit_rank_exponent, normalise_within, retained_mass_curve, tail_report
from .influence import Influence, alignment_factor
from .losses import LossFunction
from .measurement import Batch, measure_influence
from .privacy import Privacy, one_by_one, published
from .submodules import (
    Weight,
    class_of,
    dequantized_weight,
    find_submodules,
    find_weights,
    is_conv1d,
    parameters_per_token,
    structure_digest,
    unwrap,
)


# Bytes per parameter: a bf16 weight is there in any case; training it adds a bf16 gradient, an fp32 master copy and
# two Adam moments (the paper's 12 bytes, §5).
FIXED_COST = 2.0
VARIABLE_COST = 14.0

RANK = 16  # of `singular_energy`, a usual one of LoRA
SPENT = ("seconds", "tokens", "flops", "peak_bytes", "energy_joules")  # on a measurement, for the provenance


def generate_blueprint(
    model: nn.Module,
    batches: Iterable[Batch] | Mapping[str, Iterable[Batch]],
    *,
    max_examples: int | None = 64,
    model_id: str | None = None,
    model_revision: str | None = None,
    training_checkpoint: float | None = None,
    data: str | Mapping[str, Any] | None = None,
    command: str | None = None,
    method: Method = "auto",
    sketch_size: int | None = SKETCH_SIZE,
    projection_size: int = PROJECTION_SIZE,
    include: Include = "adaptable",
    loss_fn: LossFunction | None = None,
    bootstrap: int = 1000,
    fixed_cost: float = FIXED_COST,
    variable_cost: float = VARIABLE_COST,
    seed: int = 0,
    progress: bool = True,
    reduce: bool = True,
    privacy: Privacy | None = None,
    digest_weights: bool = False,
) -> Blueprint:
    """Measure a blueprint of a model on data.

    Args:
        model: as for `measure_influence`.
        batches: batches with `labels`; or several domains' by name, of which the first is the reference and the others
            become `domain_tags`.
        max_examples: of each domain, of all processes together.
        model_id: defaults to the name the model was loaded under.
        model_revision: defaults to the commit the model was loaded from, where that is known.
        training_checkpoint: share of the model's own training that was done, (0, 1].
        data: what the data is, for the provenance: a name, or a mapping with more.
        command: what a person types to get the same.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        method: "exact", "sketch" or "auto", see `measure_influence`.
        sketch_size: columns of the sketch, see there.
        projection_size: numbers an example and submodule, see there; 0 leaves `alignment` out.
        include: "adaptable" or "all", see there.
        bootstrap: resamples of the examples behind `norm_interval`.
        fixed_cost: of a frozen parameter, for k* (eq. 15); by default bytes.
        variable_cost: what training a parameter adds, in the same unit.
        seed: of the sketch and the bootstrap.
        progress: show progress bars.
        reduce: under `torchrun` or `accelerate launch` unite the processes' measurements, so that each has the same
            blueprint, see `measure_influence`.
        privacy: publish norms with noise, or with a guarantee of differential privacy, and nothing else that depends on
            the examples but their number. Each domain is released by itself. Under a guarantee examples are measured one
            by one.
        digest_weights: bind the blueprint to the weights' values too, by a digest in the provenance.

    Raises:
        MeasurementError: without data or targets, if a norm is not finite, or for too few examples for `privacy`.
    """
    domains = batches if isinstance(batches, Mapping) else {"": batches}
    if not domains:
        raise MeasurementError("There are no domains to measure: give batches, or a mapping of names to batches.")
    flops = modelled(4.0 * parameters_per_token(model)[0], "2 FLOP a weight forward, 2 backward")
    with Ledger(flops_per_token=flops) as ledger:
        influences = {
            name: measure_influence(
                model,
                one_by_one(of_domain) if privacy is not None and privacy.is_guaranteed else of_domain,
                max_examples=max_examples,
                method=method,
                sketch_size=sketch_size,
                projection_size=projection_size if privacy is None else 0,
                include=include,
                loss_fn=loss_fn,
                seed=seed,
                progress=progress,
                reduce=reduce,
            )
            for name, of_domain in domains.items()
        }
        ledger.add(sum(part.tokens for part in influences.values()))
    processes = process_count() if reduce else 1
    if privacy is None:
        reference, influence = next(iter(influences.items()))
        entries = summarise(influence, bootstrap=bootstrap, fixed_cost=fixed_cost, variable_cost=variable_cost)
        entries = _with_weights(entries, model, influence)
        if reference:
            entries = _with_tags(entries, {name: _means(part) for name, part in influences.items()})
        spent = {name: figure.to_dict() for name, figure in ledger.figures().items() if name in SPENT}
        measured = _measured(influences) | {"projection_size": projection_size, "bootstrap": bootstrap}
        measured["spent"] = of_first_process(spent) if processes > 1 else spent
    else:
        entries, measured = _released(influences, model, include, privacy, processes)
    config = getattr(unwrap(model), "config", None)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parameter = next(model.parameters())
    return Blueprint(
        model_id=model_id or getattr(config, "_name_or_path", None) or class_of(unwrap(model)).__name__,
        model_revision=model_revision or getattr(config, "_commit_hash", None),
        model_digest=structure_digest(find_submodules(model)),
        training_checkpoint=training_checkpoint,
        submodules=entries,
        concentration=concentration(entries),
        costs={"fixed_cost": fixed_cost, "variable_cost": variable_cost}
        | ({"unit": "bytes per parameter"} if (fixed_cost, variable_cost) == (FIXED_COST, VARIABLE_COST) else {}),
        provenance={
            "created": of_first_process(created) if processes > 1 else created,
            **({"command": command} if command else {}),
            **({"data": data if isinstance(data, str) else dict(data)} if data else {}),
            **measured,
            "method": method,
            "sketch_size": sketch_size,
            "seed": seed,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "quantized": any(entry.quantized for entry in entries),
            "device": parameter.device.type,
            **({"processes": processes} if processes > 1 else {}),
            "versions": versions(),
            **({WEIGHTS_DIGEST: weights_digest(model)} if digest_weights else {}),
        },
    )


def summarise(
    influence: Influence,
    *,
    bootstrap: int = 1000,
    fixed_cost: float = FIXED_COST,
    variable_cost: float = VARIABLE_COST,
) -> tuple[Submodule, ...]:
    """Every row of a measurement as an entry with its statistics, all but those that need the weight.

    Args:
        influence: norms (submodules, examples) and sketches.
        bootstrap: resamples of the examples for `norm_interval`.
        fixed_cost: of a frozen parameter, for k*.
        variable_cost: what training a parameter adds.
    """
    norms = influence.norms.double().numpy()
    intervals = bootstrap_intervals(norms, bootstrap, influence.seed)
    signals, scales = influence.signal_norms.tolist(), influence.noise_scales.tolist()
    adaptable = [i for i, submodule in enumerate(influence.submodules) if submodule.form in ADAPTABLE]
    shown = [i for i in adaptable if influence.shows_rank(i, RANK)]
    energies = dict(zip(shown, influence.singular_energy(RANK, shown).tolist(), strict=True)) if shown else {}
    alignments = _alignments(influence)
    entries = []
    for i, submodule in enumerate(influence.submodules):
        rows = influence.row_norms[i].double().numpy()
        fit = fit_rank_exponent(rows)
        gamma = gamma_from_alpha(fit.exponent) if fit else None
        is_adaptable = submodule.form in ADAPTABLE
        entries.append(
            replace(
                submodule,
                gradient_norm=float(norms[i].mean()),
                median_norm=float(np.median(norms[i])),
                norm_interval=(float(intervals[i, 0]), float(intervals[i, 1])) if influence.examples > 1 else None,
                signal_norm=signals[i] if math.isfinite(signals[i]) else None,
                noise_scale=scales[i] if math.isfinite(scales[i]) else None,
                adam_gain=adam_gain(rows, submodule.shape[-1]) if submodule.shape and is_adaptable else None,
                singular_energy=min(energies[i], 1.0) if i in energies else None,
                alignment=alignments[i] if alignments else None,
                alpha=fit.exponent if fit else None,
                alpha_error=fit.error if fit else None,
                gamma=gamma,
                k_star=k_star(gamma, fixed_cost, variable_cost) if gamma else None,
                examples=influence.examples,
            )
        )
    return tuple(entries)


def adam_gain(row_norms: np.ndarray, d_in: int) -> float:
    """Expected L1 norm of the gradient that one row of a freshly initialised LoRA A gives its column of B.

    Adam moves every entry by about the learning rate whatever its gradient's size, so that a first step lowers the
    loss by the learning rate times this L1 norm, where plain gradient descent would go by the L2 norm. B's gradient
    is G·a; PEFT draws a from U(−1/√d_in, 1/√d_in), of variance 1/(3·d_in), so that an entry is about normal and
    E‖G·a‖₁ = √(2/(3π·d_in))·Σ_o‖G_o‖. For rank r and scaling α/r multiply by α.

    Args:
        row_norms: (d_out,) norms of the mean gradient's rows.
        d_in: features of the input.
    """
    return float(math.sqrt(2 / (3 * math.pi * d_in)) * row_norms.sum())


def weight_gradient(weight_rows: np.ndarray, gradient_rows: np.ndarray) -> float:
    """Σ|w·ḡ| over the entries of a weight, estimated from the norms of rows: (2/π)·Σ_o‖w_o‖·‖ḡ_o‖.

    Exact in expectation if within each row the weights and the mean gradient's entries are independent of each other,
    and normal with mean zero: E|w| = √(2/π)·‖w_o‖/√d_in, and likewise E|ḡ|.

    Args:
        weight_rows: (d_out,) norms of the weight's rows.
        gradient_rows: (d_out,) norms of the mean gradient's rows.
    """
    return float(2 / math.pi * (weight_rows * gradient_rows).sum())


def bootstrap_intervals(norms: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """95 % percentile bootstrap intervals of the means over examples. (submodules, examples) → (submodules, 2)."""
    examples = norms.shape[1]
    counts = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=resamples)
    return np.percentile(norms @ (counts.T / examples), [2.5, 97.5], axis=1).T


def concentration(entries: Sequence[Submodule]) -> dict[str, Any]:
    """How the gradient norm is distributed over submodules: the measured curve, and what exponents say of it.

    `gamma_fit` is the exponent of the measured curve with its residual; `alpha` and `gamma` follow the paper's
    power-law route and are there to be compared. `tail` says how concentrated the norms are and whether they follow a
    power law at all, and `tail_within_kinds` the same of the norms over their kind's mean, which compare across kinds.
    All of it is over what an adapter can be put on, where there is such a thing.
    """
    entries = [entry for entry in entries if entry.form in ADAPTABLE] or entries
    norms = [norm_of(entry) for entry in entries]
    if not sum(norms):
        raise MeasurementError("Every gradient norm is zero: the loss does not depend on the model. Check the labels.")
    fractions = [k for k in FRACTIONS if k * len(norms) >= 1]  # below one submodule the curve is only interpolated
    mass = retained_mass_curve(norms, fractions)
    # a single submodule has no curve to fit
    curve = dict(zip(("gamma_fit", "gamma_fit_residual"), fit_gamma(fractions, mass), strict=True)) if mass[1:] else {}
    fit = fit_rank_exponent(norms)
    kinds = [entry.kind for entry in entries]
    resamples = min(500, max(100, 2_000_000 // len(norms)))  # of very many submodules fewer, for the memory
    within = normalise_within(norms, kinds)
    return {
        "fractions": fractions,
        "retained_mass": mass,
        **curve,
        **(
            {
                "alpha": fit.exponent,
                "alpha_error": fit.error,
                "alpha_tail": fit.n,
                "gamma": gamma_from_alpha(fit.exponent),
            }
            if fit
            else {}
        ),
        "tail": tail_report(norms, resamples=resamples).to_dict(),
        **({"tail_within_kinds": tail_report(within, resamples=resamples).to_dict()} if len(set(kinds)) > 1 else {}),
    }


def _alignments(influence: Influence) -> list[tuple[float, ...]]:
    """A row of the factor for every submodule, to 6 digits; none where nothing can be said of it."""
    if influence.examples < 2 or not influence.projections.shape[2]:
        return []
    factor = alignment_factor(influence.alignments.numpy())
    return [tuple(float(f"{value:.6g}") for value in row) for row in factor]


def _measured(influences: Mapping[str, Influence]) -> dict[str, Any]:
    """What the provenance says of the data."""
    return {
        "domains": {
            name or "data": {
                "examples": part.examples,
                "tokens": part.tokens,
                "target_tokens": int(part.target_tokens.sum()),
                "mean_loss": float(part.losses.mean()),
                "data_digest": part.data_digest,
                "norm_error": float(part.norm_errors.mean()),
            }
            for name, part in influences.items()
        },
        "unmeasured": len(next(iter(influences.values())).unmeasured),
    }


def _released(
    influences: Mapping[str, Influence], model: nn.Module, include: Include, privacy: Privacy, processes: int
) -> tuple[tuple[Submodule, ...], dict[str, Any]]:
    """Entries, and what the provenance says of the data: from released norms, the model and numbers of examples alone.

    Noise is drawn once: of several processes the first one's release is everyone's.
    """
    reference, influence = next(iter(influences.items()))
    # which rows there are must not depend on which of them the examples reached
    every = [row for row in find_submodules(model, include) if row.form in ("linear", "head") or not row.quantized]
    rows = every if privacy.is_guaranteed else list(influence.submodules)
    parts = {name: (part.submodules, part.norms.double().numpy()) for name, part in influences.items()}
    norms, statement = published(parts, rows, privacy)
    if processes > 1:
        norms, statement = of_first_process((norms, statement))
    means = {name: dict(zip((r.name for r in rows), of.tolist(), strict=True)) for name, of in norms.items()}
    count = influence.examples
    entries = [replace(row, gradient_norm=means[reference][row.name], examples=count) for row in rows]
    counts = {name or "data": {"examples": part.examples} for name, part in influences.items()}
    completed = _with_weights(entries, model)
    return _with_tags(completed, means) if reference else completed, {"domains": counts, "privacy": statement}


def _with_weights(
    entries: Sequence[Submodule], model: nn.Module, influence: Influence | None = None
) -> tuple[Submodule, ...]:
    """With the weight's norm, and given the measurement its product with the gradient where an adapter could be."""
    weights = {weight.name: weight for weight in find_weights(model)}
    gradient_rows = influence.row_norms if influence is not None else ()
    completed = []
    for i, entry in enumerate(entries):
        rows = _row_norms(weights[entry.name])
        entry = replace(entry, weight_norm=float(np.linalg.norm(rows)))
        if gradient_rows and entry.form in ADAPTABLE:
            entry = replace(entry, weight_gradient=weight_gradient(rows, gradient_rows[i].double().numpy()))
        completed.append(entry)
    return tuple(completed)


@torch.no_grad()
def _row_norms(weight: Weight) -> np.ndarray:
    """(d_out,) norms of a weight's rows, of the dequantised weight for 4- and 8-bit layers; all leading dimensions are
    rows, as in a gradient.
    """
    values = dequantized_weight(weight.module, weight.parameter).float()
    if weight.is_transposed or (weight.form == "linear" and is_conv1d(weight.module)):
        values = values.mT
    rows = values.flatten(0, -2) if values.dim() > 1 else values[:, None]
    return torch.linalg.vector_norm(rows, dim=1).double().cpu().numpy()


def _means(influence: Influence) -> dict[str, float]:
    means = influence.norms.double().mean(dim=1).tolist()
    return dict(zip((submodule.name for submodule in influence.submodules), means, strict=True))


def _with_tags(entries: Sequence[Submodule], means: Mapping[str, Mapping[str, float]]) -> tuple[Submodule, ...]:
    """With every domain's mean norm over the entry's own."""
    return tuple(
        replace(
            entry,
            domain_tags={
                domain: of[entry.name] / norm_of(entry) if norm_of(entry) else 1.0
                for domain, of in means.items()
                if entry.name in of
            },
        )
        for entry in entries
    )


def versions() -> dict[str, str]:
    """Of Python and of what a measurement depends on, for a provenance."""
    packages = ("peft-blueprint", "peft", "torch", "transformers")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}
