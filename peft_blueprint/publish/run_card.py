"""Write a run's cost and results into its model card: a section, emissions and evaluation results."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .._files import write_atomically
from ..errors import BlueprintError
from ..runs import STDERR, UNITS, Report, Row, RunRecord, format_number, format_quantity
from .adapter_card import TASKS, is_unfilled, new_adapter_card, training_section, with_adapter_metadata
from .card_sections import MAX_CHARACTERS, as_text, marked, one_line, with_section
from .metadata import Metadata, edit_metadata, is_dataset_id, read_metadata
from .words import (
    ABSENT,
    RESOURCE_NAMES,
    describe_run,
    describe_stop,
    format_labelled,
    format_multiple,
    format_rate,
    format_score,
    parts_of,
    per_unit,
    rate,
)


CARD_FILE = "README.md"
SECTION = "peft-blueprint cost"
EMISSIONS = "co2_eq_emissions"
INDEX = "model-index"
SOURCE = "peft-blueprint"  # begins the source of our emissions, and ends the name of our metrics

_COUNTRY = re.compile(r"CodeCarbon [^,;]+, ([A-Z]{3})\b")


def cost_section(report: Report, row: Row | None = None) -> str:
    """Describe a run's gain and cost in Markdown, with a label for every figure, and compare the runs.

    The section is the same for the same records. Text from a record is escaped.

    Args:
        report: of one run or several.
        row: the run that the card belongs to; by default the only one. Without it there is only the table of runs.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(60.0, "clock")})
        >>> print(cost_section(make_report([run])).split("\\n\\n")[1])
        lora was not evaluated, so its gain is unknown. It spent 60 s (measured).
    """
    row = report.rows[0] if row is None and len(report.rows) == 1 else row
    longest = 4 * MAX_CHARACTERS
    blocks = ["## What it cost"]
    if row is not None:
        blocks.append(as_text(describe_run(row, report)))
        lines = ["| resource | amount | source |", "|---|---:|---|"]
        for name in UNITS:
            total = row.record.total(name)
            source = f": {as_text(total.source)}" if total.source else ""
            amount = "; ".join([format_quantity(total.value, name), *parts_of(row.record, name)])
            lines.append(f"| {RESOURCE_NAMES[name]} | {amount} | {total.how}{source} |")
        blocks.append("\n".join(lines))
        if row.ratio is not None:
            rate = format_rate(row.ratio, report)
            blocks.append(
                f"Over the last {row.window} evaluations {as_text(report.metric)} improved by {as_text(rate)}."
            )
        blocks += [as_text(said, longest) for said in describe_stop(row)]
    if len(report.rows) > 1:
        blocks.append("\n".join(_table(report)))
    if report.notes:
        blocks.append("\n".join(f"- {as_text(note, longest)}" for note in report.notes))
    return "\n\n".join(blocks) + "\n"


def update_card(folder: str | Path, report: Report, row: Row, *, license: str | None = None) -> tuple[Path, list[str]]:
    """Describe a run in the `README.md` of its adapter: how it trained, its cost, and metadata for the Hub.

    The description is one marked section, which a later call replaces. A card that is missing, or PEFT's template with
    nothing filled in, is written anew with a quick start. In any other card the text around the section stays.

    Metadata are the base model, with which the Hub lists the adapter in the model's tree, library, task, data sets,
    emissions and evaluation results. Values that the card has already stay, but for a base model that is a local folder.

    Args:
        folder: of the adapter.
        report: the runs.
        row: the run that made the adapter.
        license: of the adapter, as the Hub names it, such as "apache-2.0".

    Returns:
        The file, and notes for its owner.

    Raises:
        BlueprintError: if there is no such folder, or the card cannot be read, edited or written; it stays as it was.

    Example:
        >>> import tempfile
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(60.0, "clock")})
        >>> report = make_report([run])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, notes = update_card(folder, report, report.rows[0])
        ...     path.read_text().splitlines()[5]
        '## Training'
    """
    path = Path(folder) / CARD_FILE
    if not path.parent.is_dir():
        raise BlueprintError(
            f"The folder {path.parent} does not exist. Give the folder that the adapter was saved in."
        )
    try:
        card = path.read_bytes().decode() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise BlueprintError(f"{path} cannot be read as UTF-8 text: {error}. Correct the file.") from error
    record, changed = row.record, card
    if not card.strip() or is_unfilled(card):
        changed = new_adapter_card(record, path.parent, card)
    changed, notes = with_run_metadata(with_adapter_metadata(changed, record, license), run_metadata(record))
    section = f"{training_section(record)}\n\n{cost_section(report, row)}"
    changed = with_section(changed, marked(section, SECTION), SECTION)
    metadata = read_metadata(changed)
    if not metadata.get("license"):
        notes.append("The card names no license. Give one, such as --license apache-2.0, or add it to the metadata.")
    if not metadata.get("base_model"):
        notes.append("The base model's id on the Hub is unknown: add base_model to the card's metadata.")
    if not path.exists() or changed != card:
        write_atomically(path, changed)
    return path, notes


def run_metadata(record: RunRecord) -> ModelCardData:
    """Return a run's emissions and evaluation results as the Hub reads them, as far as the record has them."""
    results = eval_results(record)
    return ModelCardData(
        model_name=one_line(record.name) if results else None,
        eval_results=results or None,
        co2_eq_emissions=emissions_of(record),
    )


def with_run_metadata(card: str, data: ModelCardData) -> tuple[str, list[str]]:
    """Put a run's metadata into a card in place of its former ones; figures from elsewhere are left alone.

    Args:
        card: text of a `README.md`.
        data: from `run_metadata`; our own values that it lacks are removed.

    Returns:
        The card, and notes for its owner.

    Raises:
        BlueprintError: if the front matter is not a YAML mapping, or cannot be changed safely.
    """
    notes = []
    metadata = read_metadata(card)
    if EMISSIONS in metadata and not _is_our_emissions(metadata[EMISSIONS]):
        notes.append(f"{EMISSIONS} in the card is not from {SOURCE} and was left as it is.")
    if not _is_index(metadata.get(INDEX)):
        notes.append(f"{INDEX} in the card is not a list of models with results and was left as it is.")
    return edit_metadata(card, _replace_ours, data.to_dict()), notes


def _replace_ours(metadata: Metadata, additions: Mapping[str, Any]) -> None:
    emissions = additions.get(EMISSIONS)
    present: Any = metadata.get(EMISSIONS)
    if emissions and EMISSIONS not in metadata:
        metadata[EMISSIONS] = emissions
    elif emissions and _is_our_emissions(present):
        for key in present.keys() - emissions.keys():
            del present[key]
        present.update(emissions)
    elif _is_our_emissions(present):
        del metadata[EMISSIONS]
    if not _is_index(metadata.get(INDEX)):
        return
    models = metadata.get(INDEX) or []
    for model in models:
        for result in model["results"]:
            _drop(result["metrics"], _is_our_metric)
        _drop(model["results"], lambda result: not result["metrics"])
    _drop(models, lambda model: not model["results"])
    if INDEX in additions and models:
        models[0]["results"].extend(additions[INDEX][0]["results"])
    elif INDEX in additions:
        metadata[INDEX] = additions[INDEX]
    elif INDEX in metadata and not models:
        del metadata[INDEX]


def _drop(items: list[Any], is_unwanted: Callable[[Any], bool]) -> None:
    for i in reversed(range(len(items))):
        if is_unwanted(items[i]):
            del items[i]


def _is_our_emissions(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("source", "")).startswith(SOURCE)


def _is_our_metric(metric: Any) -> bool:
    return isinstance(metric, Mapping) and str(metric.get("name", "")).endswith(f"({SOURCE})")


def _is_index(value: Any) -> bool:
    """Return whether a card's `model-index` has the Hub's form, or is empty."""
    return value is None or (
        isinstance(value, list)
        and all(isinstance(model, Mapping) and isinstance(model.get("results"), list) for model in value)
        and all(
            isinstance(result, Mapping) and isinstance(result.get("metrics"), list)
            for model in value
            for result in model["results"]
        )
    )


def emissions_of(record: RunRecord) -> dict[str, Any] | None:
    """Return a run's `co2_eq_emissions` in grams, with source, place and hardware; None if its carbon is absent.

    See "Displaying carbon emissions for your model" in the Hub's documentation.
    """
    carbon, about = record.total("carbon_grams"), record.about
    if carbon.value is None:
        return None
    entry: dict[str, Any] = {
        "emissions": float(f"{carbon.value:.4g}"),
        "source": f"{SOURCE} ledger, {carbon.how}" + (f": {one_line(carbon.source)}" if carbon.source else ""),
    }
    has_adapter = about.get("peft_config") or about.get("placement")
    training = about.get("training_type") or ("fine-tuning" if has_adapter else None)
    if training in ("pre-training", "fine-tuning"):
        entry["training_type"] = training
    country = _COUNTRY.search(carbon.source)
    place = about.get("geographical_location") or (country[1] if country else None)
    if isinstance(place, str) and place.strip():
        entry["geographical_location"] = one_line(place)
    system = about.get("system")
    devices = system.get("devices") if isinstance(system, Mapping) else None
    if isinstance(devices, list | tuple) and devices:
        counts = Counter(map(str, devices))
        entry["hardware_used"] = one_line(", ".join(f"{n} × {name}" if n > 1 else name for name, n in counts.items()))
    return entry


def eval_results(record: RunRecord) -> list[EvalResult]:
    """Return the metrics of a run's last evaluation; none if `about["held_out"]` does not name its data set.

    That is an id on the Hub, or a file; only a file's name is published. The task follows from PEFT's `task_type`;
    by default it is text generation.
    """
    dataset = record.about.get("held_out")
    if not record.points or not isinstance(dataset, str) or not dataset.strip():
        return []
    hub_id = dataset.partition(":")[0]
    name = one_line(hub_id if is_dataset_id(hub_id) else re.split(r"[/\\]", dataset)[-1])
    adapter = record.about.get("peft_config")
    task = adapter.get("task_type") if isinstance(adapter, Mapping) else None
    last = record.points[-1]
    return [
        EvalResult(
            task_type=TASKS.get(str(task), "text-generation"),
            dataset_type=name,
            dataset_name=name,
            metric_type=one_line(metric.removeprefix("eval_").removeprefix("held_out_")),
            metric_value=float(f"{value:.6g}"),
            metric_name=f"{one_line(metric)} at step {last.step} ({SOURCE})",
        )
        for metric, value in last.metrics.items()
        if math.isfinite(value) and not metric.endswith(STDERR)
    ]


def _table(report: Report) -> list[str]:
    has_baseline = report.baseline is not None
    resource, spent = report.resource, RESOURCE_NAMES[report.resource]
    columns = ["run", report.metric, spent, "gain", f"gain {per_unit(report)}"]
    columns += ["relative to baseline", f"{spent} to the baseline's {report.metric}"] if has_baseline else []
    columns.append("on the Pareto front")
    lines = [f"| {' | '.join(map(as_text, columns))} |", "|---" + "|---:" * (len(columns) - 2) + "|---|"]
    for row in report.rows:
        cells = [
            row.name + (" (baseline)" if row.is_baseline else ""),
            format_score(row.metric, row.error),
            format_labelled(row.spent, resource),
            format_score(row.gain),
            format_number(rate(row.per_resource, report)),
        ]
        cells += [format_multiple(row.relative), format_quantity(row.to_baseline, resource)] if has_baseline else []
        cells.append({True: "yes", False: "no", None: ABSENT}[row.on_front])
        lines.append(f"| {' | '.join(map(as_text, cells))} |")
    return lines
