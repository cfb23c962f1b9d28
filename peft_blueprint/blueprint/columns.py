"""The record's JSON object with one list per statistic in place of one object per entry, and back, without loss.

Names are told by what they share, columns that say the same throughout or per kind of name once, and γ, k* and depth by
what they follow from, where they do exactly. Knows nothing of files and of where the object is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._text import format_names
from ..errors import BlueprintError, FormatError
from .schema import ENTRY_KEYS
from .theory import gamma_from_alpha, k_star


MAX_ENTRIES = 100_000
_MAX_CHARACTERS = 50_000_000  # of all names together
_MAX_DEPTH = 16  # numbers in one name

_NUMBERED = re.compile(r"([^0-9]*)(0|[1-9][0-9]{0,8})(?![0-9])", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+")
_BLOCK = re.compile(r"(?:^|\.)(0|[1-9][0-9]{0,8})(?=\.|$)")


def to_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a blueprint with `layers` as columns.

    `layers` becomes an object: `names`, see `_short_names`; `columns`, for each key of the entries one of
    - a list, with null where an entry has no such key;
    - `{"all": value}`, the same for all;
    - `{"each": [...]}`, the same for all entries whose names differ in numbers alone, in the order of their first;
      `#` in a text stands for the entry's depth;
    - `{"from": …}`: `name` (the depth), `alpha` (γ), `costs` (k*);
    - `{"pairs": [...]}`, pairs in one list;
    - `{"tags": {tag: column}}`;
    and `others`, what else single entries have, by their index.

    Raises:
        FormatError: for more than `MAX_ENTRIES` entries.
    """
    layers = record["layers"]
    if len(layers) > MAX_ENTRIES:
        raise FormatError(f"{len(layers):,} entries are too many for columns; at most {MAX_ENTRIES:,} are read.")
    names = [entry["id"] for entry in layers]
    known: dict[str, list[Any]] = {}
    for key in ENTRY_KEYS:
        values = [entry.get(key) for entry in layers]
        if any(value is not None for value in values):
            known[key] = values
    context = _Context(names, record.get("costs"), known)
    others = {
        str(index): other
        for index, entry in enumerate(layers)
        if (other := {k: v for k, v in entry.items() if k != "id" and (k not in ENTRY_KEYS or v is None)})
    }
    packed = {
        "names": _short_names(names),
        "columns": {key: _pack(key, values, context) for key, values in known.items()},
        **({"others": others} if others else {}),
    }
    return {**record, "layers": packed}


def from_columns(data: Any) -> Any:
    """The JSON object of a blueprint from one with columns; any other value as it is.

    Raises:
        FormatError: if its columns do not go together, or hold too much.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
        return data
    packed = data["layers"]
    names = _long_names(packed.get("names"))
    columns = _require(packed.get("columns", {}), dict, "columns")
    if not columns.keys() <= set(ENTRY_KEYS):
        raise FormatError(
            f"there are columns that this package does not know: {format_names(sorted(columns.keys() - set(ENTRY_KEYS)))}."
        )
    known: dict[str, list[Any]] = {}
    context = _Context(names, data.get("costs"), known)
    for key in sorted(
        columns, key=lambda key: (key == "k_star", key == "gamma", key != "depth")
    ):  # what follows, last
        known[key] = _unpack(key, columns[key], context)
    layers: list[dict[str, Any]] = [{"id": name} for name in names]
    for key in columns:
        for entry, value in zip(layers, known[key], strict=True):
            if value is not None:
                entry[key] = value
    for index, other in _require(packed.get("others", {}), dict, "others").items():
        if not index.isdecimal() or len(index) > 9 or int(index) >= len(layers):
            raise FormatError(f"others of the columns names entry {index[:20]!r} of {len(layers)}.")
        layers[int(index)].update(_require(other, dict, "others"))
    return {**data, "layers": layers}


def k_star_of(gamma: Any, costs: Any) -> float | None:
    """k* under a record's costs; None where the formula has none."""
    fixed, variable = (
        costs.get(key) if isinstance(costs, Mapping) else None for key in ("fixed_cost", "variable_cost")
    )
    if not (_is_positive(gamma) and _is_positive(fixed) and _is_positive(variable)):
        return None
    try:
        return k_star(gamma, fixed, variable)  # type: ignore[arg-type]
    except (BlueprintError, ArithmeticError):
        return None


class _Context:
    """What columns are told by: the names, the costs and the columns so far."""

    def __init__(self, names: Sequence[str], costs: Any, known: Mapping[str, list[Any]]) -> None:
        self.names = names
        self.costs = costs
        self.known = known
        templates: dict[str, int] = {}
        self.template_of = [templates.setdefault(_NUMBER.sub("#", name), len(templates)) for name in names]
        self.templates = len(templates)

    def depths(self) -> list[int | None]:
        """The first number between dots of every name."""
        found = (_BLOCK.search(name) for name in self.names)
        return [None if block is None else int(block[1]) for block in found]

    def gammas(self) -> list[float | None]:
        """γ of every α that has one."""
        return [gamma_from_alpha(a) if _is_positive(a) else None for a in self.column("alpha")]

    def k_stars(self) -> list[float | None]:
        """k* of every γ that has one, under the record's costs."""
        return [k_star_of(g, self.costs) for g in self.column("gamma")]

    def column(self, key: str) -> list[Any]:
        """A column that is known already, or nothing but unknowns."""
        return self.known.get(key, [None] * len(self.names))


def _derived(key: str, context: _Context) -> tuple[str, list[Any]] | None:
    """What a column may follow from, and what it is then."""
    if key == "depth":
        return "name", context.depths()
    if key == "gamma":
        return "alpha", context.gammas()
    return ("costs", context.k_stars()) if key == "k_star" else None


def _pack(key: str, values: list[Any], context: _Context) -> Any:
    if key == "domain_tags":
        tags = sorted({tag for value in values for tag in value or ()})
        return {"tags": {tag: _pack("", [(value or {}).get(tag) for value in values], context) for tag in tags}}
    derived = _derived(key, context)
    if derived is not None and _same(derived[1], values):
        return {"from": derived[0]}
    if all(_same(value, values[0]) for value in values) and values[0] is not None:
        return {"all": values[0]}
    depths = context.column("depth")
    general = [_with_hash(value, depth) for value, depth in zip(values, depths, strict=True)]
    each: list[Any] = [None] * context.templates
    for index, value in zip(reversed(context.template_of), reversed(general), strict=True):
        each[index] = value
    packed = {"each": each}
    if len(each) < len(values) and _same(_unpack(key, packed, context), values):
        return packed
    if key == "norm_interval":
        return {"pairs": [number for value in values for number in value or (None, None)]}
    return values


def _unpack(key: str, packed: Any, context: _Context) -> list[Any]:
    count = len(context.names)
    if isinstance(packed, list):
        return _of_length(packed, count, key)
    if not isinstance(packed, dict) or len(packed) != 1:
        raise FormatError(f"the column {key[:40]!r} is neither a list nor an object with one key.")
    ((how, value),) = packed.items()
    if how == "all":
        return [value] * count
    if how == "each":
        each = _of_length(_require(value, list, key), context.templates, key)
        depths = context.column("depth")
        return [_without_hash(each[i], depth) for i, depth in zip(context.template_of, depths, strict=True)]
    if how == "pairs":
        numbers = _of_length(_require(value, list, key), 2 * count, key)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [None if low is None and high is None else [low, high] for low, high in pairs]
    if how == "tags" and key == "domain_tags":
        if len(_require(value, dict, key)) * count > 20 * MAX_ENTRIES:
            raise FormatError(f"{len(value):,} domain tags of {count:,} entries are too many.")
        columns = {tag: _unpack(tag, column, context) for tag, column in value.items()}
        return [
            {tag: column[i] for tag, column in columns.items() if column[i] is not None} or None for i in range(count)
        ]
    derived = _derived(key, context)
    if how == "from" and derived is not None and value == derived[0]:
        return derived[1]
    raise FormatError(f"the column {key[:40]!r} is told by {how[:40]!r}, which this package does not know.")


def _with_hash(value: Any, depth: Any) -> Any:
    end = f".{depth}"
    return f"{value[: -len(end)]}.#" if isinstance(value, str) and value.endswith(end) else value


def _without_hash(value: Any, depth: Any) -> Any:
    return f"{value[:-1]}{depth}" if isinstance(value, str) and len(value) <= 1024 and value.endswith(".#") else value


# ------------------------------------------------------------------------------------------ names


def _short_names(names: Sequence[str]) -> dict[str, Any]:
    """Names by what they share: `runs`, and `blocks` that runs refer to.

    A run is a list of items: a text, the name itself; or `[prefix, start, stop, block]`, which stands for prefix, number
    and ending for every number from start to before stop and every ending in the block with that index, itself a run.
    """
    blocks: dict[str, tuple[int, list[Any]]] = {}

    def run_of(endings: Sequence[str], depth: int) -> list[Any]:
        items: list[Any] = []
        position = 0
        while position < len(endings):
            found = _NUMBERED.match(endings[position]) if depth < _MAX_DEPTH else None
            if found is None:
                items.append(endings[position])
                position += 1
                continue
            head, end = found[0], position
            inner = []
            while end < len(endings) and (same := _NUMBERED.match(endings[end])) is not None and same[0] == head:
                inner.append(endings[end][len(head) :])
                end += 1
            index = block_of(inner, depth)
            prefix, number = found[1], int(found[2])
            last = items[-1] if items and isinstance(items[-1], list) else None
            if last is not None and last[0] == prefix and last[2] == number and last[3] == index:
                last[2] += 1
            else:
                items.append([prefix, number, number + 1, index])
            position = end
        return items

    def block_of(endings: Sequence[str], depth: int) -> int:
        run = run_of(endings, depth + 1)
        return blocks.setdefault(repr(run), (len(blocks), run))[0]

    runs = run_of(names, 0)
    return {"runs": runs, "blocks": [run for _, run in blocks.values()]}


def _long_names(packed: Any) -> list[str]:
    names = _require(packed, dict, "names")
    blocks = _require(names.get("blocks", []), list, "blocks")
    left = _MAX_CHARACTERS

    def walk(run: Any, prefix: str, limit: int, depth: int) -> Iterator[str]:
        """Every name of a run; a block refers to earlier ones only, so that there is an end."""
        nonlocal left
        for item in _require(run, list, "runs"):
            left -= len(prefix) + 1
            if left < 0 or depth > _MAX_DEPTH:
                raise FormatError("names are too many or too long.")
            if isinstance(item, str):
                left -= len(item)
                yield prefix + item
                continue
            if not isinstance(item, list) or [type(part) for part in item] != [str, int, int, int]:
                raise FormatError("names must be texts and lists of a text and three whole numbers.")
            start, stop, block = item[1:]
            if not (0 <= start < stop <= 10**9 and 0 <= block < limit and blocks[block]):
                raise FormatError(f"names go from {start} to {stop} over block {block} of {len(blocks)}.")
            for number in range(start, stop):
                yield from walk(blocks[block], f"{prefix}{item[0]}{number}", block, depth + 1)

    found: list[str] = []
    for name in walk(names.get("runs"), "", len(blocks), 0):
        found.append(name)
        if len(found) > MAX_ENTRIES:
            raise FormatError(f"there are more than {MAX_ENTRIES:,} names.")
    return found


def _require(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise FormatError(f"{what[:40]} of the columns must be {'a list' if kind is list else 'an object'}.")
    return value


def _of_length(values: list[Any], count: int, key: str) -> list[Any]:
    if len(values) != count:
        raise FormatError(f"the column {key[:40]!r} has {len(values):,} values where there should be {count:,}.")
    return values


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _same(a: Any, b: Any) -> bool:
    """Equal and, but for 1 and 1.0, written alike: not True and 1, nor 0.0 and −0.0."""
    return a == b and repr(a) == repr(b)
