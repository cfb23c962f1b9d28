"""What a model card says of a run's cost: a section between two marks, and `co2_eq_emissions` in the metadata.

Pure text but for `update_card`; what a person wrote stays to the byte. Knows nothing of pages or terminals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._files import write_atomically
from ..errors import BlueprintError
from ..runs import UNITS, Figure, Report, Row, RunRecord
from .card import is_hub_id
from .metadata import line_end, with_metadata
from .words import NAMES, labelled, quantity, rate, score, sentence, stopping_words, times


CARD_FILE = "README.md"
KEY = "co2_eq_emissions"
SOURCE = "peft-blueprint"  # begins the source of every figure that is ours
LONGEST = 300  # characters of a text from a record

_MARK = re.compile(r"<!--[ \t]*peft-blueprint[ \t]+cost[ \t]+(begin|end)[ \t]*-->")
_FRONT = re.compile(
    r"(\ufeff?\s*---[ \t]*(?:\r\n|\n|\r))(.*?)(?:(?<=[\r\n])|^)(?=---[ \t]*(?:[\r\n]|\Z))", re.DOTALL | re.MULTILINE
)
_COUNTRY = re.compile(r"CodeCarbon [^,;]+, ([A-Z]{3})\b")
# All that could begin a tag, a link, an emphasis or a cell of Markdown.
_SPECIAL = re.compile(r"[^\w\s,;%()/'=+.:×–₂⁻-]|_|:(?=\S)|\.(?=[^\s\d])")


def cost_section(report: Report, row: Row | None = None) -> str:
    """Markdown: what was gained for what was spent, every figure with its label, and the runs beside each other.

    The same for the same records. Whatever comes from a record is escaped.

    Args:
        report: of one run or several.
        row: the run that the card is of; by default the only one. With none and several runs only the table is given.
    """
    row = report.rows[0] if row is None and len(report.rows) == 1 else row
    parts = ["## What it cost", ""]
    if row is not None:
        parts += [_text(sentence(row, report)), "", "| | | how it came about |", "|---|---:|---|"]
        for name in UNITS:
            figure = row.record.total(name)
            source = f": {_text(figure.source)}" if figure.source else ""
            parts.append(f"| {NAMES[name]} | {quantity(figure.value, name)} | {figure.how}{source} |")
        parts.append("")
        if row.ratio is not None:
            parts += [
                f"Over the last {row.window} evaluations {_text(report.metric)} improved by "
                f"{_text(rate(row.ratio, report.unit))}.",
                "",
            ]
        parts += [item for said in stopping_words(row) for item in (_text(said, 4 * LONGEST), "")]
    if len(report.rows) > 1:
        parts += [*_table(report), ""]
    parts += [f"- {_text(note, 4 * LONGEST)}" for note in report.notes]
    if report.notes:
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def with_cost_section(card: str, section: str) -> str:
    """The card with this section between its marks, in the place of the former one or at the end.

    Raises:
        BlueprintError: if the marks in the card do not pair up; names the line.
    """
    newline = line_end(card)
    body = f"<!-- peft-blueprint cost begin -->\n{section.strip()}\n<!-- peft-blueprint cost end -->"
    body = body.replace("\n", newline)
    marks = list(_MARK.finditer(card))
    if [mark[1] for mark in marks] == ["begin", "end"]:
        return card[: marks[0].start()] + body + card[marks[1].end() :]
    if marks:
        line = card[: marks[-1].start()].count("\n") + 1
        raise BlueprintError(
            f"The marks of the section on cost do not pair up in the model card, as line {line} shows: there are "
            f"{', '.join(mark[1] for mark in marks)}, where one begin and one end belong. Restore or delete the marks "
            "<!-- peft-blueprint cost begin --> and <!-- peft-blueprint cost end -->."
        )
    if not card.strip("\ufeff"):
        return f"{card}{body}{newline}"
    gap = newline if card.endswith(("\n", "\r")) else newline * 2
    return f"{card}{gap}{body}{newline}"


def emissions_of(record: RunRecord) -> dict[str, Any] | None:
    """`co2_eq_emissions` as the Hub reads it: grams, from what, where and on what; None without a figure of carbon.

    See "Displaying carbon emissions for your model" in the Hub's documentation.
    """
    figure = record.total("carbon_grams")
    if figure.value is None:
        return None
    about = record.about
    training = about.get("training_type") or (
        "fine-tuning" if about.get("peft_config") or about.get("placement") else None
    )
    entry: dict[str, Any] = {
        "emissions": float(f"{figure.value:.4g}"),
        "source": f"{SOURCE} ledger, {figure.how}" + (f": {_one_line(figure.source)}" if figure.source else ""),
    }
    if training in ("pre-training", "fine-tuning"):
        entry["training_type"] = training
    place = record.about.get("geographical_location") or _country(figure)
    if isinstance(place, str) and place.strip():
        entry["geographical_location"] = _one_line(place)
    hardware = _hardware(record)
    return entry | ({"hardware_used": hardware} if hardware else {})


def with_emissions(card: str, entry: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """The card with this under `co2_eq_emissions`, or without a former figure of ours; a person's own is left alone.

    Args:
        card: text of a `README.md`, its line ends as they are.
        entry: from `emissions_of`; None to take away what is ours.

    Returns:
        The card, and what a person should know of it, if anything.

    Raises:
        BlueprintError: if the front matter is no YAML mapping, or nothing can be put there without changing the rest.
    """
    with_metadata(card, tags=())  # what cannot be read is said there
    newline = line_end(card)
    found = _FRONT.match(card)
    begin, text = (None, "") if found is None else (found.start(2), found[2])
    old = _loaded(text)
    present = old.get(KEY)
    if KEY in old and not _is_ours(present):
        return card, f"{KEY} in the card is not from {SOURCE} and was left as it is."
    if entry is None and KEY not in old:
        return card, None
    block = (
        "" if entry is None else yaml.safe_dump({KEY: dict(entry)}, sort_keys=False, allow_unicode=True, width=4096)
    )
    changed = _replaced(text, KEY in old, block.replace("\n", newline), newline)
    rest = {key: value for key, value in old.items() if key != KEY}
    now = None if changed is None else _loaded(changed)
    if now is None or now.pop(KEY, None) != (None if entry is None else dict(entry)) or repr(now) != repr(rest):
        raise BlueprintError(
            f"{KEY} cannot be changed in the card's front matter without changing what a person wrote there. Write its "
            "keys on lines of their own, as `key: value`, or add it by hand."
        )
    assert changed is not None
    if begin is None:
        mark = "\ufeff" if card.startswith("\ufeff") else ""
        body = card.removeprefix(mark)
        gap = newline if body.strip() and not body.startswith(newline) else ""
        return f"{mark}---{newline}{changed}---{newline}{gap}{body}", None
    return card[:begin] + changed + card[begin + len(text) :], None


def update_card(folder: str | Path, report: Report, row: Row) -> tuple[Path, list[str]]:
    """Put the section and the emissions of a run into the `README.md` of a folder; one is begun if there is none.

    Returns:
        The file, and notes for the person.

    Raises:
        BlueprintError: if there is no such folder, the card cannot be read or edited, or cannot be written; it is
            untouched then.
    """
    path = Path(folder) / CARD_FILE
    if not path.parent.is_dir():
        raise BlueprintError(f"There is no folder {path.parent}. Give the folder that the adapter was saved in.")
    try:
        card = path.read_bytes().decode() if path.exists() else _new_card(row)
    except (OSError, UnicodeDecodeError) as error:
        raise BlueprintError(f"{path} cannot be read as UTF-8 text: {error}. Correct the file.") from error
    changed, note = with_emissions(with_cost_section(card, cost_section(report, row)), emissions_of(row.record))
    if not path.exists() or changed != card:
        write_atomically(path, changed)
    return path, [note] if note else []


def _new_card(row: Row) -> str:
    about = row.record.about
    model = about.get("model_id")
    base = model if isinstance(model, str) and is_hub_id(model) else None
    library = "peft" if about.get("peft_config") else None
    return with_metadata(f"# {_text(row.name)}\n", tags=(), base_model=base, library_name=library)


def _table(report: Report) -> list[str]:
    has_base = report.baseline is not None
    spent = NAMES[report.resource]
    columns = ["run", report.metric, spent, "gain", "gain per resource"]
    columns += ["of the baseline's", f"{spent} to the baseline's end"] if has_base else []
    lines = [
        f"| {' | '.join(map(_text, [*columns, 'on the front']))} |",
        "|---" + "|---:" * (len(columns) - 1) + "|---|",
    ]
    for row in report.rows:
        cells = [
            row.name + (" (baseline)" if row.is_baseline else ""),
            score(row.metric),
            labelled(row.spent, report.resource),
            score(row.gain),
            rate(row.per_resource, report.unit),
        ]
        cells += [times(row.relative), quantity(row.to_baseline, report.resource)] if has_base else []
        cells.append({True: "yes", False: "no", None: "–"}[row.on_front])
        lines.append(f"| {' | '.join(map(_text, cells))} |")
    return lines


def _replaced(text: str, is_there: bool, block: str, newline: str) -> str | None:
    """The YAML with the block in the place of the key, or at the end; None where it is not written in lines."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
        return None
    indent = " " * (root.start_mark.column if root is not None else 0)
    block = "".join(indent + line for line in block.splitlines(keepends=True))
    if not is_there or root is None:
        return text + ("" if not text or text.endswith(("\n", "\r")) else newline) + block
    key, value = next(pair for pair in root.value if pair[0].value == KEY)
    while isinstance(value, yaml.CollectionNode) and not value.flow_style and value.value:
        value = value.value[-1][1] if isinstance(value, yaml.MappingNode) else value.value[-1]
    start = key.start_mark.index - len(indent)
    rest = re.search(r"\r\n|\n|\r", text[value.end_mark.index :])
    end = len(text) if rest is None else value.end_mark.index + rest.end()
    return text[:start] + block + text[end:]


def _loaded(text: str) -> dict[Any, Any]:
    return yaml.safe_load(text) or {}


def _is_ours(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("source", "")).startswith(SOURCE)


def _country(figure: Figure) -> str | None:
    """The country whose mix of power the factor is of, where its source says so."""
    found = _COUNTRY.search(figure.source)
    return found[1] if found else None


def _hardware(record: RunRecord) -> str | None:
    system = record.about.get("system")
    devices = system.get("devices") if isinstance(system, Mapping) else None
    if not isinstance(devices, list | tuple) or not devices:
        return None
    named = dict.fromkeys(map(str, devices))
    counts = {name: sum(str(device) == name for device in devices) for name in named}
    return _one_line(", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items()))


def _text(value: str, longest: int = LONGEST) -> str:
    """Text from a record as Markdown shows it: on one line, nothing in it that means something."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", _one_line(value, longest))


def _one_line(value: str, longest: int = LONGEST) -> str:
    shown = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
