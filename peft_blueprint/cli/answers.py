"""A blueprint as the answer of a verb: its strongest entries as a table, or all of it as JSON.

Knows no verb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..blueprint import Blueprint, score_of, to_dict
from .output import print_answer


def show_blueprint(blueprint: Blueprint, by: str, top: int, as_json: bool, quiet: bool, bare: Sequence[str]) -> None:
    """Print a blueprint's `top` entries by a statistic, or all of it as JSON, or the lines `bare` alone."""
    ranked = sorted(blueprint, key=lambda entry: -score_of(entry, by))[: top or None]
    rows = [
        {
            "id": entry.name,
            "kind": entry.kind,
            "gradient_norm": entry.gradient_norm,
            "95 %": "–".join(f"{x:.3g}" for x in entry.norm_interval) if entry.norm_interval else None,
            "signal_norm": entry.signal_norm,
            "adam_gain": entry.adam_gain,
        }
        for entry in ranked
    ]
    title = f"{blueprint.model_id}: {len(blueprint)} {blueprint.level}s{_concentration(blueprint)}"
    if len(ranked) < len(blueprint):
        title += f"; the {len(ranked)} strongest by {by}"
    print_answer(to_dict(blueprint), rows, as_json, quiet, bare, title)


def _concentration(blueprint: Blueprint) -> str:
    """How concentrated the norms are within kinds, and what law they follow, where the file says so."""
    known = blueprint.concentration
    gamma = f", gamma_fit {known['gamma_fit']:.3f}" if "gamma_fit" in known else ""
    tail = known.get("tail_within_kinds") or known.get("tail")
    if not isinstance(tail, Mapping) or "gini" not in tail:
        return gamma
    gini = tail["gini"]
    return f"{gamma}, Gini {gini['value']:.2f} [{gini['low']:.2f}, {gini['high']:.2f}], tail: {tail['verdict']}"
