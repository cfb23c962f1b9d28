"""Check every key of a record, a blueprint's JSON object, and compute its digest.

A record is the object of the paper's appendix A.1 (`model_id`, `training_checkpoint`, `layers` with `id`,
`gradient_norm`, `alpha`, `gamma`, `k_star`, `domain_tags`) with further keys beside.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from reprlib import repr as short
from typing import Any, cast, get_args

from .._text import format_names
from ..errors import FormatError
from .entry import MAX_ALIGNMENT, MAX_DIMENSIONS, MAX_TAGS, NUMBERS, Form, Level, Submodule, check_text, level_of_ids
from .theory import gamma_from_alpha


SCHEMA_VERSION = 1
DIGEST = "digest"  # of the record itself
OF_MEASURING = ("created", "command", "spent", "versions")  # in the provenance: when and how it was measured
# An entry's keys except its id, the paper's first
_PAPER_KEYS = ("gradient_norm", "alpha", "gamma", "k_star", "domain_tags")
ENTRY_KEYS = (
    *_PAPER_KEYS,
    *(f.name for f in fields(Submodule) if f.name not in (*_PAPER_KEYS, "name", "extra")),
)
TOP_KEYS = (
    "model_id",
    "training_checkpoint",
    "level",
    "model_revision",
    "model_digest",
    "concentration",
    "influence",
    "costs",
    "provenance",
)
_KNOWN_KEYS = frozenset(("id", *ENTRY_KEYS))
MAX_ENTRIES = 100_000
MAX_PATH = 4096  # characters of a model_id, which may be a folder
MAX_GRID = 10**8  # kinds × blocks², the work of some selections
_MOST = {"shape": MAX_DIMENSIONS, "alignment": MAX_ALIGNMENT, "domain_tags": MAX_TAGS}
# where numbers of the summaries may lie
_SUMMARY_RANGES = {
    "concentration": {"alpha": (0, math.inf), "gamma": (0, 1), "gamma_fit": (0, math.inf)},
    "costs": {
        "k_star": (0, 1),
        "k_star_submodules": (0, 1),
        "fixed_cost": (0, math.inf),
        "variable_cost": (0, math.inf),
    },
}
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_SHOWN = json.JSONEncoder(default=repr)
_GAMMA_TOLERANCE = 0.006  # the paper's example has two digits


def record_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Build the record and its digest from the fields of a `Blueprint`, without unknown statistics."""
    top = {key: _plain(fields[key]) for key in TOP_KEYS}
    record = {
        "schema_version": SCHEMA_VERSION,
        **{key: value for key, value in top.items() if _is_known(value)},
        **fields["extra"],
        "layers": [entry_to_dict(entry) for entry in fields["submodules"]],
    }
    return {"schema_version": SCHEMA_VERSION, DIGEST: content_digest(record), **record}


def content_digest(record: Mapping[str, Any]) -> str:
    """Return `sha256:…` over a record without its `digest`, the same for any layout of the JSON.

    Date, command, cost and versions in the provenance do not count, so that two measurements of one model on the same
    data and seed have one digest where their numbers agree.

    The order of keys, white space and whether a whole number is written 1 or 1.0 do not count; the order of entries
    does.

    Raises:
        FormatError: if the object is not JSON: NaN, an array.
    """
    found = hashlib.sha256()
    try:
        content = {key: value for key, value in record.items() if key != DIGEST}
        if isinstance(origin := content.get("provenance"), Mapping):
            content["provenance"] = {key: value for key, value in origin.items() if key not in OF_MEASURING}
        for piece in _canonical(content):
            found.update(piece.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"The blueprint of {record.get('model_id')!r} cannot be written as JSON: {error}. Give finite numbers, text, "
            "lists and dicts."
        ) from error
    return f"sha256:{found.hexdigest()}"


def fields_of(data: Any) -> dict[str, Any]:
    """Check a record and return the fields of its `Blueprint`.

    Raises:
        FormatError: naming the key or entry that is wrong.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"A blueprint is a JSON object with model_id and layers, not {_type(data)}.")
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"schema_version is {short(version)}; it must be a whole number from 1.")
    if version > SCHEMA_VERSION:
        raise FormatError(
            f"This blueprint has schema_version {short(version)}, and this package reads up to {SCHEMA_VERSION}: "
            "pip install --upgrade peft-blueprint."
        )
    layers = _take(data, "layers", list, "the blueprint")
    if layers is None or data.get("model_id") is None:
        raise FormatError(
            "A blueprint needs the keys model_id and layers; this object has "
            f"{format_names([str(key)[:80] for key in data]) or 'none'}."
        )
    if len(layers) > MAX_ENTRIES:
        raise FormatError(f"This blueprint has {len(layers):,} layers; at most {MAX_ENTRIES:,} are read. Coarsen it.")
    names = {key: _take(data, key, str, "the blueprint") for key in ("model_id", "model_revision", "model_digest")}
    for key, name in names.items():
        if name is not None:
            check_text(name, key, MAX_PATH)
    entries = tuple(_entry_from_dict(entry, index) for index, entry in enumerate(layers))
    _check_grid(entries)
    _check_summaries(data)
    _check_digest(data)
    checkpoint = _take(data, "training_checkpoint", float, "the blueprint")
    level = _take(data, "level", str, "the blueprint") or level_of_ids(entry.name for entry in entries)
    if level not in ("submodule", "group", "layer"):
        raise FormatError(f"level is {short(level)}; it must be submodule, group or layer.")
    return dict(
        model_id=names["model_id"],
        submodules=entries if "schema_version" in data else _in_the_papers_gamma(entries),
        training_checkpoint=1.0 if checkpoint is None else checkpoint,
        level=cast(Level, level),
        model_revision=names["model_revision"],
        model_digest=names["model_digest"],
        **{
            key: _take(data, key, dict, "the blueprint") or {}
            for key in ("concentration", "influence", "costs", "provenance")
        },
        extra={k: v for k, v in data.items() if k not in (*TOP_KEYS, DIGEST, "layers", "schema_version")},
    )


def _check_summaries(data: Mapping[str, Any]) -> None:
    for key, ranges in _SUMMARY_RANGES.items():
        summary = data.get(key)
        summary = summary if isinstance(summary, Mapping) else {}
        for name, (low, high) in ranges.items():
            value = summary.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
                expected = f"between {low} and {high}" if high < math.inf else f"at least {low}"
                raise FormatError(
                    f"{name} in the {key} of {data.get('model_id')!r} must be {expected}, got {_shown(value)}. Measure the "
                    "blueprint again."
                )


def entry_to_dict(entry: Submodule) -> dict[str, Any]:
    """Build the JSON object of one entry."""
    values = {key: _plain(getattr(entry, key)) for key in ENTRY_KEYS}
    if entry.form == "linear":
        del values["form"]  # the default of readers
    return {"id": entry.name, **{k: v for k, v in values.items() if _is_known(v)}, **entry.extra}


def _entry_from_dict(data: Any, index: int) -> Submodule:
    if not isinstance(data, Mapping) or not isinstance(data.get("id"), str):
        raise FormatError(f"Entry {index} of layers must be an object with a text id, not {_shown(data)}.")
    check_text(data["id"], f"the id of entry {index} of layers")
    where = repr(data["id"])
    for key, most in _MOST.items():
        value = data.get(key)
        if isinstance(value, list | dict) and len(value) > most:  # before it is copied
            raise FormatError(
                f"{key} of {where} has {len(value):,} items; at most {most} are read. Leave the others out."
            )
    numbers = {key: _take(data, key, float, where) for key in NUMBERS}
    tags = _take(data, "domain_tags", dict, where) or {}
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in tags.values()):
        raise FormatError(f"domain_tags of {where} must be numbers, not {_shown(tags)}.")
    return Submodule(
        name=data["id"],
        **numbers,
        kind=_take(data, "kind", str, where),
        group=_take(data, "group", str, where),
        depth=_take(data, "depth", int, where),
        examples=_take(data, "examples", int, where),
        quantized=_take(data, "quantized", bool, where) or False,
        shape=_numbers(data, "shape", int, where),
        form=_form(data, where),
        norm_interval=_numbers(data, "norm_interval", float, where, count=2),
        alignment=_numbers(data, "alignment", float, where),
        domain_tags=dict(tags),
        extra={k: v for k, v in data.items() if k not in _KNOWN_KEYS},
    )


def _in_the_papers_gamma(entries: tuple[Submodule, ...]) -> tuple[Submodule, ...]:
    """Convert γ = α/(1 + α), as in A.1's example, to 1 − α/(1 + α), as in its text.

    For files without a `schema_version`; those with one follow the text.
    """
    converted, names = [], []
    for entry in entries:
        if entry.alpha is not None and entry.alpha > 0 and entry.gamma is not None:
            text = gamma_from_alpha(entry.alpha)
            fits_text, fits_example = (abs(entry.gamma - g) <= _GAMMA_TOLERANCE for g in (text, 1 - text))
            if fits_example and not fits_text:
                names.append(entry.name)
                entry = replace(entry, gamma=text)
        converted.append(entry)
    if names:
        warnings.warn(
            f"gamma of {format_names(names)} follows alpha/(1 + alpha), as the example in the paper's appendix A.1 does; "
            "it was converted to the 1 - alpha/(1 + alpha) of its text.",
            stacklevel=2,
        )
    return tuple(converted)


def _take(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    if value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise FormatError(
                f"{key} of {where} is beyond a double's range: {_shown(value)}. Measure it again."
            ) from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{key} of {where} must be {_NAMES[kind]}, not {_type(value)} {_shown(value)}.")
    return value


def _numbers(data: Mapping[str, Any], key: str, kind: type, where: str, count: int | None = None) -> Any:
    value = _take(data, key, list, where)
    if value is None:
        return None
    if value and kind is float and set(map(type, value)) == {float} and count in (None, len(value)):
        return tuple(value)
    numbers = tuple(_take({key: item}, key, kind, where) for item in value)
    if None in numbers or (len(value) != count if count else not value and kind is float):  # [] is a scalar's shape
        raise FormatError(f"{key} of {where} must be {'two ' if count else ''}numbers, not {_shown(value)}.")
    return numbers


def _form(data: Mapping[str, Any], where: str) -> Form:
    shape = data.get("shape")
    default = "parameter" if isinstance(shape, list) and len(shape) < 2 else "linear"  # a norm or a bias
    form = _take(data, "form", str, where) or default
    if form not in get_args(Form):
        raise FormatError(f"form of {where} is {short(form)}; it must be one of {', '.join(get_args(Form))}.")
    return cast(Form, form)


_NAMES = {
    str: "text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _type(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    shown = ""
    for piece in _SHOWN.iterencode(value):  # only as much as is shown
        shown += piece
        if len(shown) > 80:
            break
    return shown[:80]


def _check_digest(data: Mapping[str, Any]) -> None:
    written = _take(data, DIGEST, str, "the blueprint")
    if written is not None and written != (found := content_digest(data)):
        raise FormatError(
            f"This blueprint was changed after it was written: its digest says {written[:23]}…, its content has "
            f"{found[:23]}…. Get it again from where it came; if the change is yours, remove the key digest."
        )


def _canonical(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the compact JSON of an object with sorted keys, in a piece for every entry of `layers`."""
    for count, key in enumerate(sorted(record)):
        yield f"{',' if count else '{'}{_CANONICAL.encode(key)}:"
        value = record[key]
        if key == "layers" and isinstance(value, list):
            for index, entry in enumerate(value):
                yield f"{',' if index else '['}{_CANONICAL.encode(_in_floats(entry))}"
            yield "]" if value else "[]"
        else:
            yield _CANONICAL.encode(_in_floats(value))
    yield "}" if record else "{}"


def _check_grid(entries: tuple[Submodule, ...]) -> None:
    blocks = max((entry.depth or 0 for entry in entries), default=0) + 1
    kinds = len({entry.kind for entry in entries})
    if kinds * blocks**2 > MAX_GRID:
        raise FormatError(
            f"This blueprint has {kinds:,} kinds and {blocks:,} blocks, more than any model: kinds × blocks² may "
            f"be at most {MAX_GRID:,}. Measure it again."
        )


def _in_floats(value: Any) -> Any:
    """Return a value with every whole number that a double holds as a double."""
    if type(value) is float or type(value) is str:
        return value
    if isinstance(value, Mapping):
        return {key: _in_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) is float else _in_floats(item) for item in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and abs(value) <= 2**53 else value


def _is_known(value: Any) -> bool:
    """Return whether a value is written; readers take a missing key to be None, false or empty."""
    return not (value is None or value is False or value == {})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
