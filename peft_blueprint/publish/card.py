"""What a model card says of a blueprint: a section between two marks, which can be replaced, and a card's first lines.

Pure text. Knows nothing of the Hub; what comes from a record cannot leave its place in the section.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from peft_blueprint.blueprint import naming

from ..blueprint import Blueprint, norm_of, score_of
from ..errors import BlueprintError
from .metadata import line_end, with_metadata


TAG = "gradient-blueprint"
LONGEST = 400  # characters of one value of a record
MOST_ROWS = 20  # of a table, and of a statement's parts

_HUB_ID = re.compile(r"(?!.*(?:\.\.|--))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MARK = re.compile(r"<!--[ \t]*gradient-blueprint[ \t]+(\S+)[ \t]+(begin|end)[ \t]*-->")
_DATA_FILE = re.compile(r".*\.(?:jsonl?|csv|tsv|txt|md|parquet|arrow|gz|zst|zip|py|ya?ml)", re.IGNORECASE)
_SHOWN_AS_IS = re.compile(r"[A-Za-z0-9 .:/,=+@%'\"()\[\]{}#?!;*&~^$_-]+")
_ENTITIES = re.compile(r"[^\w\s,;%()/'=+.:-]|_|:(?=\S)|\.(?=[^\s\d])")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `org/name` of a repository on the Hub."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".git", "-", "."))


def card_section(
    blueprint: Blueprint,
    file_name: str,
    *,
    picture: str | None = None,
    by: str = "gradient_norm",
    top: int = 10,
    repo_id: str | None = None,
) -> str:
    """Markdown for a model card: what the blueprint is, how to use it, what was measured, the strongest submodules.

    The same for the same record. Whatever comes from the record is escaped.

    Args:
        blueprint: the record.
        file_name: of the file in the repository, `blueprint.json` or such as `blueprint-math-80.json`.
        picture: path of a picture in the repository.
        by: the statistic to rank by within each kind.
        top: how many submodules to show, the first of every kind before the second of any.
        repo_id: repository that holds the file; by default the model's.

    Raises:
        BlueprintError: if a file of a blueprint is not called so, or an entry lacks the statistic.
    """
    domain, checkpoint = _named_by(file_name)
    of = "".join((f" for {domain}" if domain else "", f" at {checkpoint} % of the training" if checkpoint else ""))
    parts = [
        f"<!-- gradient-blueprint {file_name} begin -->",
        f"## Gradient blueprint{of}\n",
        f"[`{file_name}`]({file_name}) says how strongly each submodule of {_code(blueprint.model_id)} is moved by data of "
        "one kind, measured on the frozen model, so that LoRA or QLoRA adapters can be put where they pay.\n",
        _usage(repo_id or blueprint.model_id, domain, checkpoint),
        _measured(blueprint),
        _domains(blueprint.provenance.get("domains")),
        _strongest(blueprint, by, top),
        f"![Gradient norms by kind and layer]({_path(picture)})\n" if picture else "",
        _privacy(blueprint.provenance.get("privacy")),
        _limits(blueprint),
        f"<!-- gradient-blueprint {file_name} end -->",
    ]
    return "\n".join(part for part in parts if part)


def with_section(card: str, section: str, file_name: str) -> str:
    """The card with the section of this file in the place of its former one, or at the end; all else to the byte.

    Raises:
        BlueprintError: if marks of sections in the card do not pair up; names the line.
    """
    newline = line_end(card)
    section = section.strip("\n").replace("\n", newline)
    span = _find(card, file_name)
    if span is not None:
        return card[: span[0]] + section + card[span[1] :]
    if not card.strip("\ufeff"):
        return f"{card}{section}{newline}"
    gap = newline if card.endswith(("\n", "\r")) else newline * 2
    return f"{card}{gap}{section}{newline}"


def without_section(card: str, file_name: str) -> str:
    """The card without the section of this file, its last line end and one empty line before it; all else to the byte.

    Raises:
        BlueprintError: if marks of sections in the card do not pair up; names the line.
    """
    span = _find(card, file_name)
    if span is None:
        return card
    newline = line_end(card)
    before, after = card[: span[0]], card[span[1] :]
    if (before == "" or before.endswith(newline)) and after.startswith(newline):
        after = after.removeprefix(newline)
        before = before.removesuffix(newline) if before.endswith(newline * 2) else before
    return before + after


def new_card(blueprint: Blueprint, repo_id: str) -> str:
    """The card of a repository that holds blueprints alone, of somebody else's model."""
    text = (
        f"# Gradient blueprints of {_text(blueprint.model_id)}\n\n"
        f"How strongly each submodule of {_code(blueprint.model_id)} is moved by data of a kind, one file for each kind of "
        "data. This repository holds no weights.\n"
    )
    is_other = is_hub_id(blueprint.model_id) and blueprint.model_id.lower() != repo_id.lower()
    return with_metadata(
        text, tags=[TAG], base_model=blueprint.model_id if is_other else None, datasets=datasets_of(blueprint)
    )


def datasets_of(blueprint: Blueprint) -> tuple[str, ...]:
    """Data sets named in the provenance that have the form of an id on the Hub; files are not data sets."""
    data = blueprint.provenance.get("data")
    named = data.values() if isinstance(data, Mapping) else [data]
    texts = [item for value in named for item in (value if isinstance(value, list | tuple) else [value])]
    names = [name.strip() for text in texts if isinstance(text, str) for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in names if is_hub_id(name) and not _DATA_FILE.fullmatch(name)))


def _named_by(file_name: str) -> tuple[str | None, str | None]:
    """Domain and percentage in a file's name."""
    parts = file_name.removesuffix(".json").split("-")[1:]
    percent = parts.pop() if parts and re.fullmatch(r"\d+(\.\d+)?", parts[-1]) else None
    domain = parts[0] if parts else None
    try:
        is_one = file_name == naming.file_name(domain, float(percent) / 100 if percent else None)
    except BlueprintError:
        is_one = False
    if not is_one:
        raise BlueprintError(
            f"{file_name!r} is no name for a blueprint in a repository: it is blueprint.json, or such as "
            "blueprint-math.json, blueprint-80.json or blueprint-math-80.json."
        )
    return domain, percent


def _find(card: str, file_name: str) -> tuple[int, int] | None:
    """Where the section of a file begins and ends; None if the card has none."""
    _named_by(file_name)
    found, opened = None, None
    seen: set[str] = set()
    for mark in _MARK.finditer(card):
        name, what = mark[1], mark[2]
        line = _line_of(card, mark.start())
        if what == "begin":
            if opened is not None:
                raise _unpaired(f"{opened[1]} begins in line {_line_of(card, opened.start())} and does not end", line)
            if name in seen:
                raise _unpaired(f"{name} begins a second time", line)
            opened = mark
            seen.add(name)
        else:
            if opened is None or opened[1] != name:
                raise _unpaired(f"{name} ends without having begun", line)
            if name == file_name:
                found = opened.start(), mark.end()
            opened = None
    if opened is not None:
        line = _line_of(card, opened.start())
        raise _unpaired(f"{opened[1]} begins in line {line} and does not end", card.count("\n") + 1)
    return found


def _unpaired(what: str, line: int) -> BlueprintError:
    return BlueprintError(
        f"In the model card the gradient-blueprint section of {what}, as line {line} shows. Restore or delete the marks "
        "<!-- gradient-blueprint FILE begin --> and <!-- gradient-blueprint FILE end --> so that each file has one pair."
    )


def _line_of(text: str, index: int) -> int:
    return len(re.findall(r"\r\n|\n|\r", text[:index])) + 1


def _usage(repo_id: str, domain: str | None, checkpoint: str | None) -> str:
    repository = repo_id if is_hub_id(repo_id) else "org/model"
    chosen = f', domain="{domain}"' if domain else ""
    chosen += f", checkpoint={float(checkpoint) / 100:.15g}" if checkpoint else ""
    options = f" --domain {domain}" if domain else ""
    options += f" --checkpoint {float(checkpoint) / 100:.15g}" if checkpoint else ""
    return f"""```python
from peft import get_peft_model
from peft_blueprint import Blueprint, BlueprintConfig  # pip install peft-blueprint

blueprint = Blueprint.from_pretrained("{repository}"{chosen})
config = BlueprintConfig(blueprint=blueprint, ranks="equal_parameters", r=16, task_type="CAUSAL_LM")
model = get_peft_model(model, config)  # a plain LoRA adapter: then any trainer
```

```console
$ peft-blueprint {"fetch" if options else "show"} {repository}{options}
```
"""


def _measured(blueprint: Blueprint) -> str:
    provenance = blueprint.provenance
    kinds = len({entry.kind for entry in blueprint})
    versions = provenance.get("versions")
    merged = provenance.get("merged")
    share = blueprint.training_checkpoint
    rows = {
        "model": blueprint.model_id,
        "revision": blueprint.model_revision,
        "checkpoint": None if share is None else f"{share * 100:.6g} % of the model's training",
        "measured": f"{len(blueprint)} entries at {blueprint.level} level, {kinds} kinds",
        "structure digest": blueprint.model_digest,
        "data": _flat(provenance.get("data")),
        "merged from": f"{len(merged)} measurements" if isinstance(merged, list | tuple) else None,
        "command": provenance.get("command"),
        **{key: provenance.get(key) for key in ("method", "sketch_size", "dtype", "device", "seed")},
        "quantized": "yes" if provenance.get("quantized") is True else None,
        "created": provenance.get("created"),
        "versions": _flat(versions),
    }
    lines = [f"| {key.replace('_', ' ')} | {_code(value)} |" for key, value in rows.items() if _is_value(value)]
    return "\n".join(["### What was measured\n", "| | |", "|---|---|", *lines, ""])


def _domains(domains: Any) -> str:
    if not isinstance(domains, Mapping):
        return ""
    rows = []
    for name, domain in list(domains.items())[:MOST_ROWS]:
        known = domain if isinstance(domain, Mapping) else {}
        values = (known.get(key) for key in ("examples", "tokens", "mean_loss", "data_digest"))
        rows.append(f"| {_code(name)} | {' | '.join(_number(value) for value in values)} |")
    if len(domains) > MOST_ROWS:
        rows.append(f"| and {len(domains) - MOST_ROWS} more | | | | |")
    head = ["| domain | examples | tokens | mean loss | data digest |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _strongest(blueprint: Blueprint, by: str, top: int) -> str:
    ranks = blueprint.ranks(by)
    sizes: dict[str | None, int] = {}
    for entry in blueprint:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + 1
    chosen = sorted(blueprint, key=lambda entry: (ranks[entry.name], -score_of(entry, by)))[:top]
    has_gain = any(entry.adam_gain is not None for entry in chosen)
    columns = ["submodule", "gradient norm", "95 % interval", "rank in its kind", *(["Adam gain"] if has_gain else [])]
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---:|---:|" + "---:|" * has_gain]
    for entry in chosen:
        low_high = entry.norm_interval
        cells = [
            _code(entry.name),
            f"{norm_of(entry):#.3g}",
            f"{low_high[0]:#.3g} to {low_high[1]:#.3g}" if low_high else "",
            f"{ranks[entry.name]} of {sizes[entry.kind]}" + (f" {_code(entry.kind)}" if entry.kind else ""),
            *([_number(entry.adam_gain)] if has_gain else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    title = f"### The strongest, by {by.replace('_', ' ')}\n"
    note = "The first of every kind, then the second of every kind: norms of different kinds do not compare.\n"
    return "\n".join([title, note, *lines, ""])


def _privacy(statement: Any) -> str:
    shown = _flat(statement, "; ")
    return f"### Privacy\n\nThe record says: {_text(shown, 4 * LONGEST)}\n" if shown else ""


def _limits(blueprint: Blueprint) -> str:
    counts = {entry.examples for entry in blueprint if entry.examples is not None}
    over = f"over {max(counts)} example{'s' if max(counts) > 1 else ''}" if counts else "over a sample"
    return f"""### Limits

- An estimate {over} of this data at this checkpoint of the model. Other data, other lengths and further training move it.
- Norms and ranks compare within a kind of submodule only.
- Before use on other data measure a few examples of it and compare: `peft_blueprint.check_drift(local, blueprint)`.
- A large gradient is no proof that an adapter there trains better. Compare with an even spread of adapters.
"""


def _is_value(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and bool(value.strip()))


def _flat(value: Any, between: str = ", ") -> str | None:
    """A value of any depth as one line; None if it says nothing."""
    if isinstance(value, Mapping):
        pairs = ((key, _flat(item)) for key, item in list(value.items())[:MOST_ROWS])
        return between.join(f"{str(key).replace('_', ' ')}: {item}" for key, item in pairs if item) or None
    if isinstance(value, list | tuple):
        return between.join(item for item in map(_flat, value[:MOST_ROWS]) if item) or None
    return None if value is None else _number_text(value)


def _number(value: Any) -> str:
    """A cell: a number, or what stands there instead."""
    return _code(_number_text(value)) if isinstance(value, str) else _number_text(value) if _is_value(value) else ""


def _number_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _code(value: Any) -> str:
    """A record's text as code: between backticks where that shows it as it is, else in HTML, all but letters escaped."""
    text = _one_line(str(value), LONGEST)
    if _SHOWN_AS_IS.fullmatch(text):
        return f"`{text}`"
    return f"<code>{_escaped(text)}</code>"


def _text(value: Any, longest: int = LONGEST) -> str:
    return _escaped(_one_line(str(value), longest))


def _escaped(text: str) -> str:
    return _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", text)


def _one_line(text: str, longest: int) -> str:
    """Without line ends, control characters and those that turn the direction of text; cut at `longest`."""
    shown = "".join(
        "\ufffd" if unicodedata.category(char) in ("Cf", "Cs", "Co") else char for char in text[: 4 * longest]
    )
    shown = " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in shown).split())
    shown = shown or "(empty)"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _path(path: str) -> str:
    """A path as the target of a link."""
    return re.sub(r"[^A-Za-z0-9._/-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), path)
