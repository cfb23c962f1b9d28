"""Write the section of a model card that describes a blueprint, and the card of a repository of blueprints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from ..blueprint import Blueprint, describe_k_star, file_name, norm_of, score_of
from ..errors import BlueprintError
from .card_sections import MAX_CHARACTERS, as_code, as_text, marked
from .metadata import add_metadata, is_dataset_id, is_hub_id


TAG = "gradient-blueprint"
MAX_ROWS = 20  # of a table, and of the parts of a statement


def card_section(
    blueprint: Blueprint,
    name: str,
    *,
    picture: str | None = None,
    by: str = "gradient_norm",
    top: int = 10,
    repo_id: str | None = None,
) -> str:
    """Describe a blueprint in Markdown: how to use it, the measurement, the largest submodules, the limits.

    The section is the same for the same record. Text from the record is escaped.

    Args:
        blueprint: the record.
        name: file name in the repository, `blueprint.json` or such as `blueprint-math-80.json`.
        picture: path of a picture in the repository.
        by: statistic to rank by within each kind.
        top: how many submodules to show; the first of every kind comes before the second of any.
        repo_id: repository that holds the file; by default the model's.

    Raises:
        BlueprintError: if `name` is not the name of a blueprint, or an entry lacks the statistic.
    """
    domain, checkpoint = _parse_file_name(name)
    scope = "".join((f" for {domain}" if domain else "", f" at {checkpoint} % of the training" if checkpoint else ""))
    parts = [
        f"## Gradient blueprint{scope}\n",
        f"[`{name}`]({name}) holds the gradient norm of each submodule of {as_code(blueprint.model_id)} on one kind of "
        "data, measured on the frozen model. It shows where LoRA or QLoRA adapters have the most to learn.\n",
        _usage(repo_id or blueprint.model_id, domain, checkpoint),
        _measured(blueprint),
        _domains(blueprint.provenance.get("domains")),
        _largest(blueprint, by, top),
        f"![Gradient norms by kind and layer]({quote(picture)})\n" if picture else "",
        _privacy(blueprint.provenance.get("privacy")),
        _limits(blueprint),
    ]
    return marked("\n".join(part for part in parts if part), section_name(name))


def section_name(name: str) -> str:
    """Return the name of the section of a blueprint's file, for `with_section`."""
    return f"{TAG} {name}"


def new_card(blueprint: Blueprint, repo_id: str) -> str:
    """Write the card of a repository that holds only blueprints, of another owner's model."""
    text = (
        f"# Gradient blueprints of {as_text(blueprint.model_id)}\n\n"
        f"Gradient norms of the submodules of {as_code(blueprint.model_id)}, one file for each kind of data. This "
        "repository holds no weights.\n"
    )
    is_other = is_hub_id(blueprint.model_id) and blueprint.model_id.lower() != repo_id.lower()
    base_model = blueprint.model_id if is_other else None
    return add_metadata(
        text, ModelCardData(tags=[TAG], base_model=base_model, datasets=datasets_of(blueprint) or None)
    )


def datasets_of(blueprint: Blueprint) -> list[str]:
    """Return the data sets in the provenance that have the form of an id on the Hub, without files and configurations."""
    data = blueprint.provenance.get("data")
    values = data.values() if isinstance(data, Mapping) else [data]
    texts = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    names = [name.strip().partition(":")[0] for text in texts if isinstance(text, str) for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if is_dataset_id(name)))


def _parse_file_name(name: str) -> tuple[str | None, str | None]:
    """Return domain and percentage."""
    parts = name.removesuffix(".json").split("-")[1:]
    percent = parts.pop() if parts and re.fullmatch(r"\d+(\.\d+)?", parts[-1]) else None
    domain = parts[0] if parts else None
    try:
        is_valid = name == file_name(domain, float(percent) / 100 if percent else None)
    except BlueprintError:
        is_valid = False
    if not is_valid:
        raise BlueprintError(
            f"A blueprint's file name must be blueprint.json, or such as blueprint-math.json, blueprint-80.json or "
            f"blueprint-math-80.json, got {name!r}."
        )
    return domain, percent


def _usage(repo_id: str, domain: str | None, checkpoint: str | None) -> str:
    repository = repo_id if is_hub_id(repo_id) else "org/model"
    chosen = f', domain="{domain}"' if domain else ""
    chosen += f", checkpoint={float(checkpoint) / 100:.15g}" if checkpoint else ""
    options = f" --domain {domain}" if domain else ""
    options += f" --checkpoint {float(checkpoint) / 100:.15g}" if checkpoint else ""
    return f"""```python
from peft_blueprint import Blueprint, BlueprintConfig  # pip install peft-blueprint
from peft import get_peft_model

blueprint = Blueprint.from_pretrained("{repository}"{chosen})
config = BlueprintConfig(blueprint=blueprint, task_type="CAUSAL_LM")
model = get_peft_model(model, config)  # a plain LoRA adapter, for any trainer
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
    rows = {
        "model": blueprint.model_id,
        "revision": blueprint.model_revision,
        "checkpoint": f"{blueprint.training_checkpoint * 100:.6g} % of the model's training",
        "measured": f"{len(blueprint)} entries at {blueprint.level} level, {kinds} kinds",
        "structure digest": blueprint.model_digest,
        "k*": describe_k_star(blueprint),
        "rank correlation of influence (Fisher) with gradient norm": _flat(
            blueprint.influence.get("rank_correlation")
        ),
        "data": _flat(provenance.get("data")),
        "merged from": f"{len(merged)} measurements" if isinstance(merged, list | tuple) else None,
        "command": provenance.get("command"),
        **{key: provenance.get(key) for key in ("method", "sketch_size", "dtype", "device", "seed")},
        "quantized": "yes" if provenance.get("quantized") is True else None,
        "created": provenance.get("created"),
        "versions": _flat(versions),
    }
    lines = [f"| {key.replace('_', ' ')} | {as_code(value)} |" for key, value in rows.items() if _is_value(value)]
    return "\n".join(["### Measurement\n", "| | |", "|---|---|", *lines, ""])


def _domains(domains: Any) -> str:
    if not isinstance(domains, Mapping):
        return ""
    rows = []
    for name, domain in list(domains.items())[:MAX_ROWS]:
        known = domain if isinstance(domain, Mapping) else {}
        values = (known.get(key) for key in ("examples", "tokens", "mean_loss", "data_digest"))
        rows.append(f"| {as_code(name)} | {' | '.join(_cell(value) for value in values)} |")
    if len(domains) > MAX_ROWS:
        rows.append(f"| and {len(domains) - MAX_ROWS} more | | | | |")
    head = ["| domain | examples | tokens | mean loss | data digest |", "|---|---:|---:|---:|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _largest(blueprint: Blueprint, by: str, top: int) -> str:
    ranks = blueprint.ranks(by)
    sizes: dict[str | None, int] = {}
    for entry in blueprint:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + 1
    chosen = sorted(blueprint, key=lambda entry: (ranks[entry.name], -score_of(entry, by)))[:top]
    has_gain = any(entry.adam_gain is not None for entry in chosen)
    laws: list[str] = []
    if blueprint.level != "submodule":  # as in the paper's example file
        laws = [law for law in ("alpha", "gamma", "k_star") if any(getattr(e, law) is not None for e in chosen)]
    columns = [
        blueprint.level,
        "gradient norm",
        "95 % interval",
        "rank in its kind",
        *(["Adam gain"] if has_gain else []),
    ]
    columns += [law.replace("_star", "*") for law in laws]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for entry in chosen:
        low_high = entry.norm_interval
        cells = [
            as_code(entry.name),
            f"{norm_of(entry):#.3g}",
            f"{low_high[0]:#.3g} to {low_high[1]:#.3g}" if low_high else "",
            f"{ranks[entry.name]} of {sizes[entry.kind]}" + (f" {as_code(entry.kind)}" if entry.kind else ""),
            *([_cell(entry.adam_gain)] if has_gain else []),
            *(_cell(getattr(entry, law)) for law in laws),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    title = f"### Largest by {by.replace('_', ' ')}\n"
    note = "The first of every kind, then the second of every kind, because norms of different kinds do not compare.\n"
    return "\n".join([title, note, *lines, ""])


def _privacy(statement: Any) -> str:
    shown = _flat(statement, "; ")
    return f"### Privacy\n\nFrom the record: {as_text(shown, 4 * MAX_CHARACTERS)}\n" if shown else ""


def _limits(blueprint: Blueprint) -> str:
    counts = {entry.examples for entry in blueprint if entry.examples is not None}
    sample = f"{max(counts)} example{'s' if max(counts) > 1 else ''}" if counts else "a sample"
    return f"""### Limits

- The norms are estimates from {sample} of this data, at this checkpoint of the model. They change with other data,
  other lengths and further training.
- Norms and ranks compare only within a kind of submodule.
- Before you use the blueprint on other data, measure a few of its examples and compare:
  `peft_blueprint.check_drift(local, blueprint)`.
- A large gradient does not prove that an adapter there trains better. Compare with an even spread of adapters.
"""


def _is_value(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and bool(value.strip()))


def _flat(value: Any, separator: str = ", ") -> str | None:
    """Return a nested value as one line; None if it is empty."""
    if isinstance(value, Mapping):
        pairs = ((key, _flat(item)) for key, item in list(value.items())[:MAX_ROWS])
        return separator.join(f"{str(key).replace('_', ' ')}: {item}" for key, item in pairs if item) or None
    if isinstance(value, list | tuple):
        return separator.join(item for item in map(_flat, value[:MAX_ROWS]) if item) or None
    return None if value is None else _shown(value)


def _cell(value: Any) -> str:
    """Return a table cell: a number, text as code, or nothing."""
    if not _is_value(value):
        return ""
    return as_code(value) if isinstance(value, str) else _shown(value)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
