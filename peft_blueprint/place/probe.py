"""Probe a model on local data, check the published blueprint against it, and blend the two (Algorithm 1, lines 1, 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from .._options import from_keywords
from ..blueprint import Blueprint
from ..compare import Drift, ProbeOptions, check_drift, reconcile
from ..errors import BlueprintError
from ..measure import Batch, LossFunction, find_submodules, generate_blueprint, load_tokenizer, unwrap


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = {"completion", "messages", "text"}  # keys of examples that need a tokenizer


@dataclass(frozen=True)
class Probed:
    """A published blueprint after a look at local data.

    Args:
        blueprint: to place by: the blend, or the probe alone.
        probe: measured on the local data.
        drift: agreement of probe and published blueprint; None without a published one.
    """

    blueprint: Blueprint
    probe: Blueprint
    drift: Drift | None


def probe_blueprint(
    model: nn.Module,
    probe: Iterable[Batch] | Blueprint,
    published: Blueprint | None = None,
    options: ProbeOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    data: str | Mapping[str, Any] | None = None,
    reduce: bool = True,
    progress: bool = True,
    **keywords: Any,
) -> Probed:
    """Measure a probe, check the published blueprint for drift, and blend the two as `reconcile` does.

    Args:
        model: as for `measure_influence`; adapters that are active on it count as part of it.
        probe: batches or examples, as for `measure_influence`, of which `probe_examples` are measured; or a blueprint that
            was measured on them.
        published: the blueprint that came with the model. Without it the probe is the blueprint.
        options: domain, size of the probe, drift check and blend.
        tokenizer: the model's, for examples with text; by default found by the model's name.
        loss_fn: objective other than the model's own, see `measure_influence`.
        seed: of the measurement.
        data: name of the local data, for the provenance.
        reduce: combine the measurements of several processes, see `measure_influence`.
        progress: show progress bars.
        **keywords: fields of `ProbeOptions`, on top of `options`.

    Raises:
        BlueprintError: for a domain without a published blueprint, options or examples that cannot be used, or blueprints
            that do not fit the model.
        DriftError: under `drift_policy="error"`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = tiny_llama()
        >>> published = generate_blueprint(model, toy_batches(), progress=False)
        >>> probed = probe_blueprint(model, toy_batches(seed=1), published, probe_examples=4, progress=False)
        >>> probed.probe.submodules[0].examples, probed.blueprint.provenance["blend"]["weight"]
        (4, 0.5)
    """
    options = from_keywords(ProbeOptions, options, keywords)
    if not isinstance(probe, Blueprint):
        if options.probe_examples == 0:
            raise BlueprintError("probe_examples=0 leaves nothing to measure: give at least 1, or no probe.")
        if tokenizer is None:
            tokenizer, probe = _find_tokenizer(model, probe)
        probe = generate_blueprint(
            model,
            probe,
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            max_examples=options.probe_examples,
            seed=seed,
            data=data,
            reduce=reduce,
            progress=progress,
        )
    submodules = find_submodules(model)
    if published is None:
        if options.domain is not None:
            raise BlueprintError(
                f"domain={options.domain!r} chooses among the domains of a published blueprint: give one, or leave domain "
                "out."
            )
        return Probed(probe.expand(submodules), probe, None)
    if options.domain is not None:
        published = published.for_domain(options.domain)
    published = published.expand(submodules)
    blended = reconcile(
        published,
        probe.expand(submodules),
        weight=options.blend_weight,
        policy=options.drift_policy,
        threshold=options.drift_threshold,
        by_uncertainty=options.by_uncertainty,
        rescale=options.rescale,
    )
    return Probed(blended, probe, check_drift(probe, published, threshold=options.drift_threshold))


def _find_tokenizer(
    model: nn.Module, examples: Iterable[Batch]
) -> tuple[PreTrainedTokenizerBase | None, Iterable[Batch]]:
    """Return the tokenizer that the examples need, None if they are encoded, and the examples from the first on."""
    if isinstance(examples, Iterator):
        first = next(examples, None)
        examples = examples if first is None else chain([first], examples)
    else:
        first = next(iter(examples), None) if hasattr(examples, "__getitem__") else None
    if not isinstance(first, Mapping) or "input_ids" in first or _TEXTS.isdisjoint(first):
        return None, examples
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    if not name:
        raise BlueprintError(
            f"The probe's examples are texts, and this {type(unwrap(model)).__name__} has no name to find its tokenizer by. "
            "Encode them: probe=peft_blueprint.measure.encode(examples, tokenizer)."
        )
    return load_tokenizer(name), examples
