"""The record as a short text for a model file's header: rounded, then written without loss as columns.

Knows nothing of files; `columns` says what is where in the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from ..errors import BlueprintError, FormatError
from .blueprint import Blueprint
from .columns import from_columns, k_star_of, to_columns
from .entry import NUMBERS, Submodule
from .schema import DIGEST, from_dict, to_dict
from .strict_json import loads
from .theory import gamma_from_alpha


VERSION_KEY = "blueprint.version"  # beside the text, in the same metadata
VERSION = "1"  # of how the text is laid out

_ROUNDED = (*NUMBERS, "alpha_error", "gamma")


def to_header_text(blueprint: Blueprint, digits: int = 4) -> str:
    """The blueprint, `rounded`, as JSON in printable ASCII; about 80 bytes for a submodule with one domain tag.

    Raises:
        BlueprintError: for digits outside 1 to 17.
        FormatError: if what was added to it by hand is not JSON.
    """
    return _dumps(to_columns(to_dict(rounded(blueprint, digits))))


def from_header_text(text: str, source: str = "the header") -> Blueprint:
    """The blueprint that `to_header_text` wrote, or that `blueprint.json` holds.

    Raises:
        FormatError: if it is not JSON, not a blueprint, or was changed (by its digest); names `source`.
    """
    record = loads(text, source)
    if has_arrays(record):
        raise FormatError(
            f"{source} is that of a blueprint.safetensors, whose numbers are its tensors: read that file."
        )
    try:
        return from_dict(from_columns(record))
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def has_arrays(record: Any) -> bool:
    """Whether the JSON in a safetensors file is a blueprint whose numbers are that file's tensors, see `arrays`."""
    return isinstance(record, dict) and isinstance(record.get("layers"), dict) and "arrays" in record["layers"]


def require_version(metadata: Mapping[str, Any], source: str) -> None:
    """Raise FormatError if the text beside these keys is laid out in a way that a later version of this package reads."""
    version = metadata.get(VERSION_KEY, VERSION)
    if version != VERSION:
        raise FormatError(
            f"{source} has {VERSION_KEY} {str(version)[:20]!r}, and this package reads {VERSION}: "
            "pip install --upgrade peft-blueprint."
        )


def rounded(blueprint: Blueprint, digits: int = 4) -> Blueprint:
    """The blueprint with `digits` significant digits, without what takes much room and little part in placing.

    Left out are the entries' alignments, medians and keys that this version does not know. γ and k* follow from the
    rounded α and costs where they followed before. `provenance["rounded"]` says the digits and the digest of the full
    record; what is as short already is returned as it is.

    Raises:
        BlueprintError: for digits outside 1 to 17.
    """
    if not 1 <= digits <= 17:
        raise BlueprintError(f"digits={digits}: give 1 to 17 significant digits; a double has no more.")
    short = replace(
        blueprint,
        submodules=tuple(_rounded_entry(entry, blueprint.costs, digits) for entry in blueprint.submodules),
        concentration=_rounded(blueprint.concentration, digits),
    )
    if short == blueprint and "rounded" in blueprint.provenance:
        return blueprint
    note = {"digits": digits, "digest": to_dict(blueprint)[DIGEST]}
    return replace(short, provenance={**blueprint.provenance, "rounded": note})


def _rounded_entry(entry: Submodule, costs: Mapping[str, Any], digits: int) -> Submodule:
    short = {key: _rounded(getattr(entry, key), digits) for key in _ROUNDED}
    short["median_norm"] = None
    if entry.gamma is not None and entry.alpha and entry.gamma == gamma_from_alpha(entry.alpha):
        short["gamma"] = gamma_from_alpha(short["alpha"])
    if entry.k_star is not None and entry.k_star == k_star_of(entry.gamma, costs):
        short["k_star"] = k_star_of(short["gamma"], costs)
    return replace(
        entry,
        **short,
        norm_interval=_rounded(entry.norm_interval, digits),
        alignment=None,
        domain_tags=_rounded(entry.domain_tags, digits),
        extra={},
    )


def _rounded(value: Any, digits: int) -> Any:
    """With every float in it rounded; but for one that would become infinite."""
    if isinstance(value, float):
        short = float(f"{value:.{digits - 1}e}")
        return short if math.isfinite(short) else value
    if isinstance(value, tuple):
        return tuple(_rounded(item, digits) for item in value)
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    return {key: _rounded(item, digits) for key, item in value.items()} if isinstance(value, Mapping) else value


def _dumps(value: Any) -> str:
    """JSON without spaces, floats in the fewest characters."""
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{json.dumps(str(key))}:{_dumps(item)}' for key, item in value.items())}}}"
    return f"[{','.join(map(_dumps, value))}]" if isinstance(value, list | tuple) else json.dumps(value)


def _shortest(value: float) -> str:
    """The shorter of 0.0001234 and 1234e-7, which are read as the same double."""
    plain = repr(value)
    if not value:
        return plain
    sign, digits, exponent = Decimal(plain).normalize().as_tuple()
    scientific = f"{'-' * sign}{''.join(map(str, digits))}e{exponent}"
    return scientific if len(scientific) < len(plain) else plain
