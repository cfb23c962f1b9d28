"""Arithmetic on single entries: sharing a unit's statistics out, scaling two sides to one, merging several.

What `Blueprint`'s own methods do to each entry. Knows nothing of whole blueprints.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import MismatchError
from .entry import Z95, Submodule, norm_of


# statistics that do not follow from several blueprints' summaries
NOT_COMBINED: dict[str, Any] = dict.fromkeys(("adam_gain", "weight_gradient", "singular_energy", "alignment"))


def even_share(unit: Submodule, member: Submodule, count: int) -> Submodule:
    """`member` with its part of the statistics of a unit of `count` members."""
    root = math.sqrt(count)
    return replace(
        unit,
        name=member.name,
        kind=member.kind,
        depth=member.depth,
        group=member.group,
        shape=member.shape,
        form=member.form,
        quantized=member.quantized,
        gradient_norm=norm_of(unit) / root,
        norm_interval=None
        if unit.norm_interval is None
        else (unit.norm_interval[0] / root, unit.norm_interval[1] / root),
        median_norm=None if unit.median_norm is None else unit.median_norm / root,
        signal_norm=None if unit.signal_norm is None else unit.signal_norm / root,
        weight_norm=None,
        adam_gain=None if unit.adam_gain is None else unit.adam_gain / count,
        weight_gradient=None if unit.weight_gradient is None else unit.weight_gradient / count,
        singular_energy=None,
        alignment=None if unit.alignment is None else tuple(value / count for value in unit.alignment),
    )


def total_of(values: Sequence[float | None]) -> float | None:
    """The sum, or None if one is not known."""
    return None if None in values else math.fsum(value or 0.0 for value in values)


def common_scale(
    mine: Sequence[Submodule], others: Mapping[str, Submodule], value: Callable[[Submodule], float]
) -> float:
    """The ratio of geometric means of a statistic of the same entries on two sides."""
    pairs = [(value(m), value(others[m.name])) for m in mine]
    logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
    return math.exp(statistics.fmean(logs)) if logs else 1.0


def inverse_variance(weight: float, mine: Submodule, other: Submodule, scale: float) -> float:
    """`weight` times the inverse variance of each side's norm; `weight` itself where one is not known."""
    if not mine.norm_error or not other.norm_error:
        return weight
    precision, other_precision = weight / mine.norm_error**2, (1 - weight) / (scale * other.norm_error) ** 2
    return precision / (precision + other_precision)


def merge_entries(entries: Sequence[Submodule]) -> Submodule:
    """One entry from several of the same submodule, weighted by their numbers of examples.

    Raises:
        MismatchError: if one does not say how many examples it is over.
    """
    counts = [entry.examples for entry in entries]
    if any(not count for count in counts):
        raise MismatchError(f"{entries[0].name!r} does not say how many examples it is over, so it cannot be merged.")
    total = sum(count or 0 for count in counts)
    shares = [(count or 0) / total for count in counts]
    norm = math.fsum(share * norm_of(entry) for share, entry in zip(shares, entries, strict=True))
    errors = [entry.norm_error for entry in entries]
    interval = None
    if all(error is not None for error in errors):
        half = Z95 * math.hypot(*(share * (error or 0.0) for share, error in zip(shares, errors, strict=True)))
        interval = (max(0.0, norm - half), norm + half)
    tags = set.intersection(*(set(entry.domain_tags) for entry in entries))
    return replace(
        entries[0],
        gradient_norm=norm,
        norm_interval=interval,
        examples=total,
        domain_tags={
            tag: math.fsum(s * norm_of(e) * e.domain_tags[tag] for s, e in zip(shares, entries, strict=True)) / norm
            if norm
            else entries[0].domain_tags[tag]
            for tag in sorted(tags)
        },
        median_norm=None,
        signal_norm=None,
        noise_scale=None,
        **NOT_COMBINED,
        alpha=None,
        alpha_error=None,
        gamma=None,
        k_star=None,
    )
