"""Options and records as dataclasses: from keywords, and from untrusted mappings.

A room's options are one frozen dataclass whose fields carry `metadata={"help": …}`. The Python functions, the command
line and YAML files all read that class, so that a default or a help text stands in one place.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import repeat
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ._text import format_names, shortened
from .errors import BlueprintError


Record = TypeVar("Record")

_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
    "NoneType": "nothing",
}


def from_keywords(
    cls: type[Record],
    options: Record | None,
    keywords: Mapping[str, Any],
    error: type[BlueprintError] = BlueprintError,
) -> Record:
    """Apply keywords on top of an options record, `cls()` by default.

    Raises:
        BlueprintError: of class `error`, for a keyword that is not a field of `cls`, or `options` of another class.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     fraction: float = 0.2
        >>> from_keywords(Options, None, {"fraction": 0.5})
        Options(fraction=0.5)
    """
    if options is not None and not isinstance(options, cls):
        raise error(
            f"options must be {cls.__name__}, got {type(options).__name__}. Pass {cls.__name__}(…) or keywords."
        )
    _require_keys(keywords, cls.__name__, error, [f.name for f in fields(cls) if f.init])  # type: ignore[arg-type]
    return replace(cls() if options is None else options, **keywords)  # type: ignore[type-var]


def from_mapping(
    cls: type[Record],
    data: Any,
    where: str,
    error: type[BlueprintError] = BlueprintError,
    *,
    ignore_unknown: bool = False,
) -> Record:
    """Validate untrusted JSON or YAML data as a dataclass, without converting types (`"0.2"` is not a number).

    Args:
        data: a mapping with the fields of `cls`; nested dataclasses are mappings too, tuples are lists.
        where: file or key named in error messages.
        error: class of the errors raised; errors of its subclasses that `cls` raises keep their class.
        ignore_unknown: whether unknown keys, also of nested dataclasses, are left out, for files that a later version may have written.

    Raises:
        BlueprintError: of class `error`, naming the first key that is unknown, missing or of the wrong type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     fraction: float = 0.2
        >>> from_mapping(Options, {"fraction": "0.5"}, "recipe.yaml")
        Traceback (most recent call last):
        peft_blueprint.errors.BlueprintError: recipe.yaml: fraction must be a number, got '0.5' (text).
    """
    if not isinstance(data, Mapping):
        raise error(f"{where} must be a mapping, got {_shown(data)}.")
    if not ignore_unknown:
        _require_known_keys(cls, data, where, error)
    return _validated(_adapter(cls), data, where, error)  # type: ignore[arg-type]


def check_fields(
    types: Mapping[str, Any], data: Any, where: str, error: type[BlueprintError] = BlueprintError
) -> None:
    """Validate untrusted data that becomes another library's arguments later.

    Args:
        types: type of every known key, as from `typing.get_type_hints`.
        data: a mapping with some of these keys.
        where: file or key named in error messages.
        error: class of the errors raised.

    Raises:
        BlueprintError: of class `error`, naming the first key that is unknown or of the wrong type.

    Example:
        >>> check_fields({"lr": float}, {"lr": "fast"}, "recipe.yaml: training")
        Traceback (most recent call last):
        peft_blueprint.errors.BlueprintError: recipe.yaml: training: lr must be a number, got 'fast' (text).
    """
    from pydantic import TypeAdapter
    from typing_extensions import TypedDict

    if not isinstance(data, Mapping):
        raise error(f"{where} must be a mapping, got {_shown(data)}.")
    _require_keys(data, where, error, list(types))
    given = TypedDict("given", {key: types[key] for key in data}, total=False)  # type: ignore[misc]
    given.__pydantic_config__ = {"arbitrary_types_allowed": True}  # type: ignore[attr-defined]
    _validated(TypeAdapter(given), data, where, error)


def require_types(record: Any, cls: type, error: type[BlueprintError] = BlueprintError) -> None:
    """Check the fields of `cls` in a record made by keywords: text, numbers, flags and choices; other types pass.

    Raises:
        BlueprintError: of class `error`, naming the field, the expected and the given value.

    Example:
        >>> from types import SimpleNamespace
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     fraction: float | None = None
        >>> require_types(SimpleNamespace(fraction="0.2"), Options)
        Traceback (most recent call last):
        peft_blueprint.errors.BlueprintError: fraction must be a number, got '0.2' (text).
    """
    for name, kinds in _simple_types(cls).items():
        value = getattr(record, name)
        if value is None and type(None) in kinds:
            continue
        is_flag = isinstance(value, bool) or type(value).__name__ == "bool_"  # NumPy's
        if any(is_flag if kind is bool else isinstance(value, kind) and not is_flag for kind in kinds):
            continue
        expected = " or ".join(dict.fromkeys(_EXPECTED[kind] for kind in kinds if kind in _EXPECTED))
        raise error(f"{name} must be {expected}, got {_shown(value)}.")


_SIMPLE = {str: str, int: Integral, float: Real, bool: bool, type(None): type(None)}
_EXPECTED: dict[type, str] = {str: "text", Integral: "a whole number", Real: "a number", bool: "true or false"}


@functools.cache
def _simple_types(cls: type) -> dict[str, tuple[type, ...]]:
    """Return what `isinstance` accepts for every field of plain types; fields of other types are left out."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [str if get_origin(part) is Literal else part for part in parts]
        if all(kind in _SIMPLE for kind in kinds):
            found[name] = tuple(_SIMPLE[kind] for kind in kinds)
    return found


@functools.cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's arguments, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _require_known_keys(hint: Any, data: Any, where: str, error: type[BlueprintError], path: str = "") -> None:
    """Raise for a key that a dataclass lacks, also one inside lists, mappings and options; wrong types pass."""
    if not isinstance(data, Mapping | list | tuple):
        return
    if get_origin(hint) in (Union, UnionType):
        fitting = [part for part in get_args(hint) if _may_be(part, data)]
        if len(fitting) == 1:
            _require_known_keys(fitting[0], data, where, error, path)
        return
    inside: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(data, Mapping):
        hints = _hints(hint)
        _require_keys(data, f"{where}: {path}" if path else where, error, list(hints))
        inside = ((hints[key], key, value) for key, value in data.items())
    elif _may_be(hint, data) and (parts := get_args(hint)):
        if isinstance(data, Mapping):
            inside = ((parts[1], key, value) for key, value in data.items())
        else:
            each = repeat(parts[0]) if get_origin(hint) is not tuple or Ellipsis in parts else iter(parts)
            inside = ((part, i, value) for i, (part, value) in enumerate(zip(each, data, strict=False)))
    for part, key, value in inside:
        _require_known_keys(part, value, where, error, f"{path}.{key}" if path else str(key))


def _may_be(hint: Any, data: Any) -> bool:
    """Return whether a mapping or a list may be of this type."""
    kind = get_origin(hint) or hint
    if not isinstance(kind, type):
        return False
    if isinstance(data, Mapping):
        return is_dataclass(kind) or issubclass(kind, Mapping)
    return issubclass(kind, Sequence) and not issubclass(kind, str)


def _require_keys(data: Mapping[Any, Any], where: str, error: type[BlueprintError], known: list[str]) -> None:
    unknown = [str(key) for key in data if key not in known]
    if known and unknown:
        close = difflib.get_close_matches(unknown[0], known, 1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise error(f"{where} has no option {format_names(unknown)}. {hint}Options: {', '.join(known)}.")


def _validated(adapter: Any, data: Any, where: str, error: type[BlueprintError]) -> Any:
    from pydantic import ValidationError

    try:
        return adapter.validate_json(json.dumps(data), strict=True)
    except (TypeError, ValueError, RecursionError) as failed:
        if not isinstance(failed, ValidationError):
            raise error(f"{where} must hold text, numbers, lists and mappings alone: {failed}.") from failed
        first = failed.errors(include_url=False)[0]
        key = _key(first, data)
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, BlueprintError):
            kind = type(raised) if isinstance(raised, error) else error
            raise kind(": ".join(filter(None, (where, key, str(raised))))) from None
        raise error(f"{where}: {_sentence(first, key or 'it')}.") from None


def _key(first: Mapping[str, Any], data: Any) -> str:
    """Return the path of one pydantic error in the data, without the types that its location also names."""
    names = []
    for part in first["loc"]:
        is_index = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if is_index or isinstance(data, Mapping) and part in data:
            names.append(shortened(part))
            data = data[part]
    if first["type"] == "missing":
        names.append(shortened(first["loc"][-1]))
    return ".".join(names)


def _sentence(first: Mapping[str, Any], key: str) -> str:
    """Word one pydantic error: the key, the expected and the given value."""
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return f"{key} is missing"
    if kind == "unexpected_keyword_argument":
        return f"{key} is not a known key"
    got = _shown(first["input"])
    if kind == "literal_error":
        return f"{key} must be one of {context['expected'].replace(' or ', ', ')}, got {got}"
    expected = {
        "float_type": "a number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "string_type": "text",
        "bool_type": "true or false",
        "mapping_type": "a mapping",
        "dict_type": "a mapping",
        "dataclass_type": "a mapping",
        "tuple_type": "a list",
        "list_type": "a list",
    }.get(kind)
    if expected is not None:
        return f"{key} must be {expected}, got {got}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message}, got {got}"


def _shown(value: Any) -> str:
    text = repr(value)
    kind = _KINDS.get(type(value).__name__, type(value).__name__)
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({kind})" if value is not None else "nothing"
