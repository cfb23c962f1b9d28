"""JSON from strangers: parsed within limits, and without what it cannot mean.

Knows nothing of blueprints; torch is not imported.
"""

from __future__ import annotations

import json
import math
from typing import Any

from .errors import FormatError


def loads(text: str, source: str = "the text") -> Any:
    """Parse JSON, refusing NaN, numbers beyond a double's range and a key twice in one object.

    Raises:
        FormatError: if it is not such JSON; names `source`.
    """
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{source} is not valid JSON ({error.msg}, line {error.lineno} of {text.count(chr(10)) + 1}): "
            "it may be cut short or not a blueprint at all."
        ) from error
    except RecursionError as error:
        raise FormatError(f"{source} is nested too deeply to be a blueprint.") from error
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error


def _parse(text: str) -> Any:
    return json.loads(
        text,
        parse_constant=_refuse_number,
        parse_float=lambda digits: float(digits) if math.isfinite(float(digits)) else _refuse_number(digits),
        parse_int=lambda digits: int(digits) if len(digits) <= 308 else _refuse_number(digits[:20] + "…"),
        object_pairs_hook=_unique_keys,
    )


def _refuse_number(digits: str) -> Any:
    raise FormatError(f"it holds {digits}, which is no measurement. Measure the blueprint again.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise FormatError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object.")
    return result
