"""Write the card of a trained adapter from its run's record: metadata for the Hub, quick start and training details."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..runs import STDERR, Point, RunRecord, error_at
from .card_sections import as_code, as_text, one_line
from .metadata import Metadata, add_metadata, edit_metadata, is_dataset_id, is_hub_id, read_metadata
from .words import ABSENT, format_score, hyperparameters, model_name


MAX_EVALUATIONS = 12  # rows of the table of results
TASKS = {  # the Hub's task by PEFT's
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

_ADAPTER_TAG = "base_model:adapter:"
# what PEFT's save_pretrained adds below its template
_PEFT_ENDING = re.compile(r"\s*(## Training procedure\n.*?)?(### Framework versions\s+)?(- [^\n]*\s*)*", re.DOTALL)


def base_model_id(record: RunRecord) -> str | None:
    """Return the base model's id on the Hub; that of the blueprint if the run loaded a local folder; None if unknown."""
    blueprint = record.about.get("blueprint")
    said = blueprint.get("model_id") if isinstance(blueprint, Mapping) else None
    for name in (record.about.get("model_id"), said):
        if isinstance(name, str) and is_hub_id(name) and not Path(name).exists():
            return name
    return None


def adapter_metadata(record: RunRecord, license: str | None = None) -> ModelCardData:
    """Return the metadata by which the Hub lists an adapter under its base model, as far as the record has them."""
    base, config = base_model_id(record), _config(record)
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base and config else None,
        datasets=[name for key in ("train", "held_out") if (name := _dataset(record, key))] or None,
        library_name="peft" if config else None,
        license=license,
        pipeline_tag=TASKS.get(str(config.get("task_type"))),
    )


def with_adapter_metadata(card: str, record: RunRecord, license: str | None = None) -> str:
    """Add the metadata that a card lacks, and replace a base model that is a local folder.

    Raises:
        BlueprintError: if the front matter is not a YAML mapping, or cannot be changed safely.
    """
    additions = adapter_metadata(record, license).to_dict()
    return edit_metadata(card, _fill, additions) if additions else card


def _fill(metadata: Metadata, additions: Mapping[str, Any]) -> None:
    base, present = additions.get("base_model"), metadata.get("base_model")
    if base and isinstance(present, str) and not is_hub_id(present):
        metadata["base_model"] = base
        tags = metadata.get("tags")
        for i, tag in enumerate(tags) if isinstance(tags, list) else ():
            if tag == f"{_ADAPTER_TAG}{present}":
                tags[i] = f"{_ADAPTER_TAG}{base}"  # type: ignore[index]
    for key, value in additions.items():
        if metadata.get(key) is None:
            metadata[key] = value


def is_unfilled(card: str) -> bool:
    """Return whether a card is the template that PEFT saves with an adapter, with nothing filled in."""
    body = card.partition("\n---\n")[2].strip() if card.startswith("---") else card.strip()
    template = ModelCard.from_template(ModelCardData()).text.strip()
    return body.startswith(template) and _PEFT_ENDING.fullmatch(body[len(template) :]) is not None


def new_adapter_card(record: RunRecord, folder: Path, former: str = "") -> str:
    """Write a card without its training section: metadata, title, one sentence, quick start.

    Args:
        record: the run that made the adapter.
        folder: of the adapter.
        former: card whose tags are kept.
    """
    base, config = base_model_id(record), _config(record)
    name = one_line(folder.resolve().name or record.name)
    shown = f"[{base}](https://huggingface.co/{base})" if base else as_code(model_name(record) or "its base model")
    kind = "A LoRA adapter for" if config else "A version of"
    blocks = [f"# {as_text(name)}", f"{kind} {shown}{_trained_on(record)}.{_placed(record)}"]
    if config:
        blocks += ["## Quick start", f"```python\n{_quick_start(name, folder, config)}\n```"]
    card = "\n\n".join(blocks) + "\n"
    tags = read_metadata(former).get("tags") if former else None
    kept = [str(tag) for tag in tags if not str(tag).startswith(_ADAPTER_TAG)] if isinstance(tags, list) else []
    if config:
        kept += [tag for tag in ("lora", "peft-blueprint") if tag not in kept]
        kept += [f"{_ADAPTER_TAG}{base}"] if base else []
    return add_metadata(card, ModelCardData(tags=sorted(kept) or None)) if kept else card


def training_section(record: RunRecord) -> str:
    """Describe in Markdown how a run trained: data, hyperparameters, results at each evaluation, versions.

    Example:
        >>> about = {"train": "openai/gsm8k", "train_config": {"learning_rate": 1e-3}}
        >>> print(training_section(RunRecord("lora", "eval_loss", "minimize", "seconds", about=about)))
        ## Training
        <BLANKLINE>
        Training data: [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k).
        <BLANKLINE>
        | hyperparameter | value |
        |---|---|
        | learning_rate | 0.001 |
    """
    blocks = ["## Training"]
    data = {"Training data": "train", "Held-out data": "held_out"}
    if lines := [f"{name}: {shown}." for name, key in data.items() if (shown := _data(record, key))]:
        blocks.append(" ".join(lines))
    if settings := hyperparameters(record):
        rows = [f"| {as_text(name)} | {as_text(value)} |" for name, value in settings.items()]
        blocks.append("\n".join(["| hyperparameter | value |", "|---|---|", *rows]))
    if record.points:
        blocks += ["### Results", "\n".join(_results(record))]
    versions = record.about.get("versions")
    if isinstance(versions, Mapping) and versions:
        said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        blocks.append(f"Versions: {as_text(said)}.")
    return "\n\n".join(blocks)


def _results(record: RunRecord) -> list[str]:
    """Return a table of at most `MAX_EVALUATIONS` evaluations, with the first and the last."""
    points = record.points
    if len(points) > MAX_EVALUATIONS:
        last = len(points) - 1
        points = tuple(points[round(i * last / (MAX_EVALUATIONS - 1))] for i in range(MAX_EVALUATIONS))
    names = list(dict.fromkeys(name for point in points for name in point.metrics if not name.endswith(STDERR)))
    lines = [f"| {' | '.join(['step', 'training loss', *map(as_text, names)])} |", "|---:" * (len(names) + 2) + "|"]
    for point in points:
        cells = [f"{point.step:,}", _training_loss(record, point)]
        cells += [format_score(point.metrics.get(name), error_at(point, name)) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _training_loss(record: RunRecord, point: Point) -> str:
    """Return the last training loss that was logged up to an evaluation."""
    logged = [p.metrics["loss"] for p in record.losses if p.step <= point.step and "loss" in p.metrics]
    return format_score(logged[-1]) if logged and math.isfinite(logged[-1]) else ABSENT


def _quick_start(name: str, folder: Path, config: Mapping[str, Any]) -> str:
    of_causal = str(config.get("task_type")) == "CAUSAL_LM"
    cls = "AutoPeftModelForCausalLM" if of_causal else "AutoPeftModel"
    lines = [f"from peft import {cls}", "", f"adapter = {json.dumps(name)}  # this folder, or its id on the Hub"]
    lines.append(f"model = {cls}.from_pretrained(adapter)")
    if of_causal and (folder / "tokenizer_config.json").exists():
        lines[1:1] = ["from transformers import AutoTokenizer"]
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            'inputs = tokenizer("Your prompt", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))",
        ]
    return "\n".join(lines)


def _placed(record: RunRecord) -> str:
    placement, blueprint = record.about.get("placement"), record.about.get("blueprint")
    lora = placement.get("lora") if isinstance(placement, Mapping) else None
    if not isinstance(lora, Mapping) or not lora:
        return ""
    chosen = ", chosen with a gradient blueprint" if isinstance(blueprint, Mapping | str) and blueprint else ""
    return f" It adapts {len(lora)} submodule{'s' if len(lora) > 1 else ''}{chosen}."


def _trained_on(record: RunRecord) -> str:
    shown = _data(record, "train")
    return f", trained on {shown}" if shown else ""


def _data(record: RunRecord, key: str) -> str:
    """Return a data set as a link, or the name of a file as code; empty if unknown."""
    source = record.about.get(key)
    if not isinstance(source, str) or not source.strip():
        return ""
    if name := _dataset(record, key):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return as_code(re.split(r"[/\\]", source.rstrip("/\\"))[-1])


def _dataset(record: RunRecord, key: str) -> str | None:
    """Return the id of a data set on the Hub, without its configuration; None for a file."""
    source = record.about.get(key)
    name = source.partition(":")[0] if isinstance(source, str) else ""
    return name if is_dataset_id(name) and not Path(name).exists() else None


def _config(record: RunRecord) -> Mapping[str, Any]:
    config = record.about.get("peft_config")
    return config if isinstance(config, Mapping) else {}
