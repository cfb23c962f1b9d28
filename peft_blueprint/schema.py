"""The record as a JSON object: every key checked on the way in, what is not known left out on the way out.

The object is that of the paper's appendix A.1 (`model_id`, `training_checkpoint`, `layers` with `id`, `gradient_norm`,
`alpha`, `gamma`, `k_star`, `domain_tags`) with further keys beside. Knows nothing of text or files.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, cast, get_args

from .blueprint import Blueprint
from .entry import NUMBERS, Form, Submodule, level_of_ids, some
from .errors import FormatError
from .theory import gamma_from_alpha


SCHEMA_VERSION = 1
DIGEST = "digest"  # of a blueprint's own content
# An entry's keys but the id, the paper's first. A file spells `name` and `extra` otherwise.
_PAPER_KEYS = ("gradient_norm", "alpha", "gamma", "k_star", "domain_tags")
ENTRY_KEYS = (
    *_PAPER_KEYS,
    *(f.name for f in fields(Submodule) if f.name not in (*_PAPER_KEYS, "name", "extra")),
)
_TOP_KEYS = tuple(f.name for f in fields(Blueprint) if f.name not in ("submodules", "extra"))
_GAMMA_TOLERANCE = 0.006  # the paper's example prints two digits


def to_dict(blueprint: Blueprint) -> dict[str, Any]:
    """The JSON object of a blueprint with its own digest; statistics that are not known are left out."""
    top = {key: _plain(getattr(blueprint, key)) for key in _TOP_KEYS}
    record = {
        "schema_version": SCHEMA_VERSION,
        **{key: value for key, value in top.items() if _is_known(value)},
        **blueprint.extra,
        "layers": [entry_to_dict(entry) for entry in blueprint.submodules],
    }
    return {"schema_version": SCHEMA_VERSION, DIGEST: content_digest(record), **record}


def content_digest(record: Mapping[str, Any]) -> str:
    """`sha256:…` over a blueprint's JSON object without its `digest`; the same however the JSON is laid out.

    The order of keys, white space and whether a whole number is written 1 or 1.0 do not count; the order of entries does.

    Raises:
        FormatError: if the object is not JSON: NaN, an array.
    """
    try:
        text = json.dumps(
            _in_floats({key: value for key, value in record.items() if key != DIGEST}),
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"The blueprint of {record.get('model_id')!r} cannot be written as JSON: {error}. Give finite numbers, text, "
            "lists and dicts."
        ) from error
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def from_dict(data: Any) -> Blueprint:
    """A checked blueprint from a JSON object.

    Raises:
        FormatError: naming the key or entry that is wrong.
    """
    if not isinstance(data, Mapping):
        raise FormatError(f"A blueprint is a JSON object with model_id and layers, not {_type(data)}.")
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FormatError(f"schema_version is {version!r}; it must be a whole number from 1.")
    if version > SCHEMA_VERSION:
        raise FormatError(
            f"This blueprint has schema_version {version}, and this package reads up to {SCHEMA_VERSION}: "
            "pip install --upgrade peft-blueprint."
        )
    _check_digest(data)
    layers = _take(data, "layers", list, "the blueprint")
    if layers is None or data.get("model_id") is None:
        raise FormatError(
            f"A blueprint needs the keys model_id and layers; this object has {some(list(data)) or 'none'}."
        )
    entries = tuple(_entry_from_dict(entry, index) for index, entry in enumerate(layers))
    level = _take(data, "level", str, "the blueprint") or level_of_ids(entry.name for entry in entries)
    if level not in ("submodule", "group", "layer"):
        raise FormatError(f"level is {level!r}; it must be submodule, group or layer.")
    return Blueprint(
        model_id=_take(data, "model_id", str, "the blueprint"),
        submodules=entries if "schema_version" in data else _in_the_papers_gamma(entries),
        training_checkpoint=_take(data, "training_checkpoint", float, "the blueprint"),
        level=level,
        model_revision=_take(data, "model_revision", str, "the blueprint"),
        model_digest=_take(data, "model_digest", str, "the blueprint"),
        **{key: _take(data, key, dict, "the blueprint") or {} for key in ("concentration", "costs", "provenance")},
        extra={k: v for k, v in data.items() if k not in (*_TOP_KEYS, DIGEST, "layers", "schema_version")},
    )


def entry_to_dict(entry: Submodule) -> dict[str, Any]:
    """The JSON object of one entry."""
    values = {key: _plain(getattr(entry, key)) for key in ENTRY_KEYS}
    if entry.form == "linear":
        del values["form"]  # what a reader takes it to be without
    return {"id": entry.name, **{k: v for k, v in values.items() if _is_known(v)}, **entry.extra}


def _entry_from_dict(data: Any, index: int) -> Submodule:
    if not isinstance(data, Mapping) or not isinstance(data.get("id"), str):
        raise FormatError(f"Entry {index} of layers must be an object with a text id, not {_shown(data)}.")
    where = repr(data["id"])
    numbers = {key: _take(data, key, float, where) for key in (*NUMBERS, "alpha_error", "gamma")}
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
        extra={k: v for k, v in data.items() if k != "id" and k not in ENTRY_KEYS},
    )


def _in_the_papers_gamma(entries: tuple[Submodule, ...]) -> tuple[Submodule, ...]:
    """A.1's example computes γ as α/(1 + α), its text as 1 − α/(1 + α): read both, keep the text's.

    Not asked of files with a `schema_version`, which are ours and follow the text.
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
            f"gamma of {some(names)} follows alpha/(1 + alpha), as the example in the paper's appendix A.1 does; "
            "its text says 1 - alpha/(1 + alpha), which is what is kept.",
            stacklevel=2,
        )
    return tuple(converted)


def _take(data: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = data.get(key)
    if value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{key} of {where} must be {_NAMES[kind]}, not {_type(value)} {_shown(value)}.")
    return value


def _numbers(data: Mapping[str, Any], key: str, kind: type, where: str, count: int | None = None) -> Any:
    value = _take(data, key, list, where)
    if value is None:
        return None
    numbers = tuple(_take({key: item}, key, kind, where) for item in value)
    if None in numbers or len(value) != count and (count or not value):
        raise FormatError(f"{key} of {where} must be {'two ' if count else ''}numbers, not {_shown(value)}.")
    return numbers


def _form(data: Mapping[str, Any], where: str) -> Form:
    form = _take(data, "form", str, where) or "linear"
    if form not in get_args(Form):
        raise FormatError(f"form of {where} is {form!r}; it must be one of {', '.join(get_args(Form))}.")
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
    return json.dumps(value, default=repr)[:80]


def _check_digest(data: Mapping[str, Any]) -> None:
    written = _take(data, DIGEST, str, "the blueprint")
    if written is not None and written != (found := content_digest(data)):
        raise FormatError(
            f"This blueprint was changed after it was written: its digest says {written[:23]}…, its content has "
            f"{found[:23]}…. Get it again from where it came; if the change is yours, remove the key digest."
        )


def _in_floats(value: Any) -> Any:
    """With every whole number that a double holds as a double."""
    if isinstance(value, Mapping):
        return {key: _in_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_floats(item) for item in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and abs(value) <= 2**53 else value


def _is_known(value: Any) -> bool:
    """What is left out of a file is what a reader takes to be None, false or empty; a zero is written."""
    return not (value is None or value is False or value == {})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
