"""Measure a model on data and summarize the measurement as a `Blueprint`."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._options import from_keywords
from .._processes import of_first_process, process_count
from ..blueprint import (
    ADAPTABLE,
    FIXED_COST,
    VARIABLE_COST,
    Blueprint,
    Level,
    Submodule,
    best_share,
    norm_of,
    split_expert,
)
from ..errors import MeasurementError
from ..runs import Ledger, modelled
from .batches import Batch, Example, as_batches
from .compatibility import WEIGHTS_DIGEST, weights_digest
from .fisher import FisherInfluence, fisher_influence
from .influence import Influence
from .losses import LossFunction
from .measurement import measure_influence
from .options import GenerateOptions, MeasureOptions
from .privacy import Privacy, one_by_one, release_domains
from .submodules import (
    Weight,
    class_of,
    dequantized_weight,
    find_submodules,
    find_weights,
    is_conv1d,
    parameters_per_token,
    structure_digest,
    top_k_of,
    unwrap,
)
from .summary import concentration, rows_by_unit, summarize, summarize_units, unit_norms, weight_gradient


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPENT = ("seconds", "tokens", "flops", "peak_bytes", "energy_joules")  # cost of the measurement, for the provenance


def generate_blueprint(
    model: nn.Module,
    batches: Iterable[Batch | Example] | Mapping[str, Iterable[Batch | Example]],
    options: GenerateOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_fn: LossFunction | None = None,
    privacy: Privacy | None = None,
    progress: bool = True,
    reduce: bool = True,
    **keywords: Any,
) -> Blueprint:
    """Measure a model on data and return the blueprint. A local probe is a blueprint of a few examples.

    Args:
        model: as for `measure_influence`.
        batches: batches with `labels`, or examples, as for `measure_influence`; or those of several domains by name. The first domain is the reference, and
            every entry gets `domain_tags`: each domain's norm over the reference's.
        options: how to measure and summarize, see `GenerateOptions`.
        tokenizer: the model's, for examples with text.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        privacy: publish norms with noise, or with a guarantee of differential privacy. Of the examples the blueprint
            then holds nothing else but their number. Each domain is released separately. Under a guarantee, examples
            are measured one at a time.
        progress: show progress bars.
        reduce: under `torchrun` or `accelerate launch` combine the processes' measurements, so that every process
            returns the same blueprint, see `measure_influence`.
        **keywords: fields of `GenerateOptions`.

    Raises:
        MeasurementError: without data or targets, if a norm is not finite, or for too few examples for `privacy`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> blueprint = generate_blueprint(tiny_llama(), toy_batches(), max_examples=8, progress=False)
        >>> len(blueprint), blueprint["model.layers.0.mlp.up_proj"].examples
        (28, 8)
    """
    options = from_keywords(GenerateOptions, options, keywords, MeasurementError)
    domains = batches if isinstance(batches, Mapping) else {"": batches}
    if not domains:
        raise MeasurementError("The mapping of domains is empty: give batches, or a mapping of names to batches.")
    is_guaranteed = privacy is not None and privacy.is_guaranteed
    if privacy is not None:
        privacy.require_library()  # before the expensive part
    measuring = {f.name: getattr(options, f.name) for f in fields(MeasureOptions)}
    if privacy is not None:
        measuring["projection_size"] = 0
    flops = modelled(4.0 * parameters_per_token(model)[0], "2 FLOP a weight forward, 2 backward")
    with Ledger(flops_per_token=flops) as ledger:
        influences = {
            name: measure_influence(
                model,
                one_by_one(as_batches(model, domain, tokenizer=tokenizer, loss_fn=loss_fn))
                if is_guaranteed
                else domain,
                MeasureOptions(**measuring),
                tokenizer=tokenizer,
                loss_fn=loss_fn,
                progress=progress,
                reduce=reduce,
            )
            for name, domain in domains.items()
        }
        ledger.add(sum(part.tokens for part in influences.values()))
    processes = process_count() if reduce else 1
    agreement: dict[str, Any] = {}
    if privacy is None:
        reference, influence = next(iter(influences.items()))
        entries = _with_weights(summarize(influence, options), model, influence)
        found = None
        if influence.examples > 1 and influence.projections.shape[2]:
            found = fisher_influence(influence, options.damping)
            entries = _with_influence(entries, found)
        if options.level != "submodule":
            entries = summarize_units(entries, influence, options.level, options)
        if found is not None:
            units = rows_by_unit(influence.submodules, options.level)
            norms = torch.tensor([norm_of(entry) for entry in entries], dtype=torch.double)
            agreement = found.of_units(list(units.values())).to_dict(norms, [entry.kind for entry in entries])
        if reference:
            entries = _with_tags(entries, {name: _means(part, options.level) for name, part in influences.items()})
        spent = {name: figure.to_dict() for name, figure in ledger.quantities().items() if name in SPENT}
        measured = {
            **_measured(influences),
            **({"estimates": estimated} if (estimated := influence.estimates) else {}),
            "projection_size": 0 if options.experts else options.projection_size,
            "bootstrap": options.bootstrap,
            **({"experts_per_token": top_k_of(model)} if options.experts and top_k_of(model) else {}),
            "spent": of_first_process(spent) if processes > 1 else spent,
        }
    else:
        entries, measured = _released(influences, model, options, privacy, processes)
        if options.level != "submodule":
            entries = Blueprint("model", entries).coarsen(options.level).submodules
    config = getattr(unwrap(model), "config", None)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parameter = next(model.parameters())
    costs: dict[str, Any] = {"fixed_cost": options.fixed_cost, "variable_cost": options.variable_cost}
    if (options.fixed_cost, options.variable_cost) == (FIXED_COST, VARIABLE_COST):
        costs["unit"] = "bytes per parameter"
    blueprint = Blueprint(
        model_id=options.model_id or getattr(config, "_name_or_path", None) or class_of(unwrap(model)).__name__,
        model_revision=options.model_revision or getattr(config, "_commit_hash", None),
        model_digest=structure_digest(find_submodules(model)),
        training_checkpoint=options.training_checkpoint,
        submodules=entries,
        level=options.level,
        concentration=concentration(entries),
        influence=agreement,
        costs=costs,
        provenance={
            "created": of_first_process(created) if processes > 1 else created,
            **({"command": options.command} if options.command else {}),
            **(
                {"data": options.data if isinstance(options.data, str) else dict(options.data)} if options.data else {}
            ),
            **measured,
            "method": options.method,
            "sketch_size": options.sketch_size,
            "seed": options.seed,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "quantized": any(entry.quantized for entry in entries),
            "device": parameter.device.type,
            **({"processes": processes} if processes > 1 else {}),
            "versions": versions(),
            **({WEIGHTS_DIGEST: weights_digest(model)} if options.digest_weights else {}),
        },
    )
    return replace(blueprint, costs=costs | best_share(blueprint).to_costs())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a measurement depends on, for a provenance.

    Example:
        >>> sorted(versions())[:3]
        ['peft', 'peft-blueprint', 'python']
    """
    found = {"python": platform.python_version()}
    for package in ("peft", "peft-blueprint", "torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _measured(influences: Mapping[str, Influence]) -> dict[str, Any]:
    """Describe the data for the provenance."""
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
    influences: Mapping[str, Influence], model: nn.Module, options: MeasureOptions, privacy: Privacy, processes: int
) -> tuple[tuple[Submodule, ...], dict[str, Any]]:
    """Make entries and provenance from released norms, the model and the numbers of examples alone.

    Noise is drawn once: all processes take the release of the first.
    """
    reference, influence = next(iter(influences.items()))
    # under a guarantee, the rows must not depend on which of them the examples reached
    measurable = [
        row
        for row in find_submodules(model, options.include, options.experts)
        if row.form in ("linear", "head") or not row.quantized
    ]
    rows = measurable if privacy.is_guaranteed else list(influence.submodules)
    parts = {name: (part.submodules, part.norms.double().numpy()) for name, part in influences.items()}
    norms, statement = release_domains(parts, rows, privacy)
    if processes > 1:
        norms, statement = of_first_process((norms, statement))
    means = {
        name: dict(zip((row.name for row in rows), values.tolist(), strict=True)) for name, values in norms.items()
    }
    entries = [replace(row, gradient_norm=means[reference][row.name], examples=influence.examples) for row in rows]
    counts = {name or "data": {"examples": part.examples} for name, part in influences.items()}
    completed = _with_weights(entries, model)
    return _with_tags(completed, means) if reference else completed, {"domains": counts, "privacy": statement}


def _with_weights(
    entries: Sequence[Submodule], model: nn.Module, influence: Influence | None = None
) -> tuple[Submodule, ...]:
    """Add the norm of every weight and, given the measurement, its product with the gradient if it is adaptable."""
    weights = {weight.name: weight for weight in find_weights(model)}
    gradient_rows = influence.row_norms if influence is not None else ()
    fused: dict[str, np.ndarray | None] = {}  # row norms of all experts of a parameter
    completed = []
    for i, entry in enumerate(entries):
        expert = split_expert(entry.name) if entry.form == "expert" else None
        if expert is None:
            rows = _row_norms(weights[entry.name])
        else:
            if expert.parameter not in fused:
                fused = {expert.parameter: _row_norms(weights[expert.parameter])}
            of_all, count = fused[expert.parameter], (entry.shape or (1,))[0]
            rows = None if of_all is None else of_all[expert.number * count :][:count]
        if rows is None:
            completed.append(entry)
            continue
        entry = replace(entry, weight_norm=float(np.linalg.norm(rows)))
        if gradient_rows and entry.form in ADAPTABLE:
            entry = replace(entry, weight_gradient=weight_gradient(rows, gradient_rows[i].double().numpy()))
        completed.append(entry)
    return tuple(completed)


@torch.no_grad()
def _row_norms(weight: Weight) -> np.ndarray | None:
    """Return the norms of a weight's rows, (d_out,), or None if it cannot be dequantized.

    All leading dimensions are rows, as in a gradient.
    """
    found = dequantized_weight(weight.module, weight.parameter)
    if found is None:
        return None
    values = found.float()
    if weight.is_transposed or (weight.form == "linear" and is_conv1d(weight.module)):
        values = values.mT
    rows = values.flatten(0, -2) if values.dim() > 1 else values[:, None]
    return torch.linalg.vector_norm(rows, dim=1).double().cpu().numpy()


def _with_influence(entries: Sequence[Submodule], found: FisherInfluence) -> tuple[Submodule, ...]:
    sizes = zip(found.influences.tolist(), found.mismatches.tolist(), strict=True)
    return tuple(
        replace(entry, influence=own, influence_mismatch=mismatch)
        for entry, (own, mismatch) in zip(entries, sizes, strict=True)
    )


def _means(influence: Influence, level: Level) -> dict[str, float]:
    units = rows_by_unit(influence.submodules, level)
    return dict(zip(units, unit_norms(influence, units).mean(dim=1).tolist(), strict=True))


def _with_tags(entries: Sequence[Submodule], means: Mapping[str, Mapping[str, float]]) -> tuple[Submodule, ...]:
    """Add `domain_tags`: every domain's mean norm over the entry's own."""
    return tuple(
        replace(
            entry,
            domain_tags={
                domain: norms[entry.name] / norm_of(entry) if norm_of(entry) else 1.0
                for domain, norms in means.items()
                if entry.name in norms
            },
        )
        for entry in entries
    )
