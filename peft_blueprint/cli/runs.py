"""Verbs about runs: `train` one recipe, `report` gains and costs of runs, `env` for a bug report."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import publish as publishing
from .. import runs as running
from .. import train as training
from .._files import require_writable, write_atomically
from ..errors import BlueprintError
from ..runs import RESOURCES
from .output import Output, say
from .verbs import verb


if TYPE_CHECKING:
    from ..runs import Report, Row, RunRecord


STDOUT = "-"


@verb(
    "Runs",
    examples=[
        "peft-blueprint train recipe.yaml --override training.max_steps=2",
    ],
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")],
    output: Output,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Set a key of the recipe, such as training.max_steps=2; may be repeated."
        ),
    ] = None,
) -> None:
    """Run a recipe: probe, check drift, place, train, evaluate, save the adapter and its model card."""
    read = training.Recipe.from_yaml(recipe, overrides=override or ())
    report = asdict(training.run_recipe(read, progress=output.progress))
    found = running.make_report([running.RunRecord.load(report["output"])])
    publishing.update_card(report["output"], found, found.rows[0])
    rows = [{"what": key.replace("_", " "), "value": value} for key, value in report.items()]
    output.answer(report, rows, [report["output"]], f"The run of {recipe}")


@verb(
    "Runs",
    examples=[
        "peft-blueprint report all-linear blueprint --baseline all-linear",
        "peft-blueprint report all-linear blueprint --html report.html",
        "peft-blueprint report all-linear blueprint --results results/",
        "peft-blueprint report blueprint --card blueprint",
    ],
)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders with run.json, such files, or a Trainer's output folders.")
    ],
    output: Output,
    baseline: Annotated[str | None, typer.Option(help="Run to compare with: its name, or its folder.")] = None,
    resource: Annotated[
        str | None, typer.Option(help=f"Resource to compare by: {', '.join(RESOURCES)}; by default the runs' own.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare by; by default the runs' own.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Evaluations in the window of the recent gain.")] = 5,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page there (needs matplotlib).")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Write results for PEFT's method_comparison to a .json file or a folder."),
    ] = None,
    markdown: Annotated[
        str | None, typer.Option(help="Write a Markdown section to a file; - prints it instead of the table.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="Folder of an adapter: describe the run in its README.md and its metadata.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the adapter, for --card, such as apache-2.0.")
    ] = None,
) -> None:
    """Compare the gains and costs of runs."""
    if markdown == STDOUT and output.format == "json":
        raise BlueprintError("--markdown - and --format json both print to stdout: name a file for one of them.")
    for path in (html, results, None if markdown in (None, STDOUT) else Path(str(markdown))):
        if path is not None:
            require_writable(path if path.is_dir() else path.parent)
    records, named = _read(runs, baseline)
    found = running.make_report(records, baseline=named, resource=resource, metric=metric, window=window)
    of_card = None if card is None else _row_of(card, runs, found, baseline)
    for note in found.notes:
        say(f"note: {note}")

    if html is not None:
        publishing.save_page(found, html)
        say(f"Written to {html}.")
    if results is not None:
        say(f"Written to {_write_results(found, results)}.")
    if markdown is not None and markdown != STDOUT:
        write_atomically(Path(markdown), publishing.cost_section(found))
        say(f"Written to {markdown}.")
    if card is not None and of_card is not None:
        written, notes = publishing.update_card(card, found, of_card, license=license)
        for note in notes:
            say(f"note: {note}")
        say(f"Written to {written}.")
    if markdown == STDOUT:
        print(publishing.cost_section(found), end="")
    else:
        _show(found, output)


@verb("Runs", examples=["peft-blueprint env"])
def env(output: Output) -> None:
    """Print versions and hardware, for a bug report."""
    import torch  # only this verb asks for it

    packages = (
        *("peft-blueprint", "peft", "transformers", "torch", "accelerate", "datasets", "huggingface_hub"),
        *("safetensors", "scipy", "bitsandbytes", "matplotlib", "deepspeed", "trl"),
    )
    found: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["CUDA or ROCm"] = ", ".join(gpus) or "none"
    xpus = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    found["XPU"] = f"{', '.join(xpus)}; not tested" if xpus else "none"
    has_mps = torch.backends.mps.is_available()
    found["MPS"] = "available; not tested, taken only with --device mps" if has_mps else "none"
    found["DeepSpeed"] = "ZeRO 1 and 2: supported; ZeRO 3: trains, and measuring and starting are refused"
    rows = [{"what": key, "value": value} for key, value in found.items()]
    output.answer(found, rows, [f"{key} {value}" for key, value in found.items()], "Environment")


def _read(paths: Sequence[Path], baseline: str | None) -> tuple[list[RunRecord], str | None]:
    """The runs under names of their own, and the baseline's; a baseline that is a folder is read too."""
    records = _distinct([running.RunRecord.load(path) for path in paths], paths)
    names = [record.name for record in records]
    if baseline is None or baseline in names:
        return records, baseline
    path = Path(baseline)
    if not path.exists():
        raise BlueprintError(
            f"The baseline {baseline!r} is neither the name of a run nor a folder. The runs are {', '.join(names)}."
        )
    same = next((i for i, given in enumerate(paths) if given.resolve() == path.resolve()), None)
    if same is not None:
        return records, names[same]
    records = _distinct([running.RunRecord.load(path), *records], [path, *paths])
    return records, records[0].name


def _distinct(records: Sequence[RunRecord], paths: Sequence[Path]) -> list[RunRecord]:
    """Name runs of one name by their paths below the folder that they share."""
    names = [record.name for record in records]
    same = [path.resolve() for record, path in zip(records, paths, strict=True) if names.count(record.name) > 1]
    shared = os.path.commonpath([path.parent for path in same]) if same else ""
    return [
        record if names.count(record.name) == 1 else replace(record, name=os.path.relpath(path.resolve(), shared))
        for record, path in zip(records, paths, strict=True)
    ]


def _row_of(folder: Path, paths: Sequence[Path], report: Report, baseline: str | None) -> Row:
    """Return the run that made an adapter: the one read from its folder, otherwise the only one beside the baseline."""
    rows = report.rows[-len(paths) :]
    if len(report.rows) > len(paths):  # the baseline's folder, which is not among the runs
        rows, paths = report.rows, [Path(baseline or ""), *paths]
    inside = [
        row
        for row, path in zip(rows, paths, strict=True)
        if folder.resolve() in (path.resolve(), *path.resolve().parents) or path.resolve() in folder.resolve().parents
    ]
    others = [row for row in report.rows if not row.is_baseline]
    for candidates in (inside, others, list(report.rows)):
        if len(candidates) == 1:
            return candidates[0]
    raise BlueprintError(
        f"--card {folder}: several runs ({', '.join(row.name for row in report.rows)}) may have made this adapter. "
        "Give that run alone, with --baseline for another."
    )


def _results(report: Report) -> list[dict[str, Any]]:
    return [publishing.method_comparison_json(row, report) for row in report.rows]


def _write_results(report: Report, path: Path) -> str:
    """Write one result to a `.json` file, several to it as a list, or each to a file of a folder, as PEFT's tools read."""
    results = _results(report)
    if path.suffix == ".json" and not path.is_dir():
        write_atomically(path, _dumped(results[0] if len(results) == 1 else results))
        return str(path)
    taken: set[str] = set()
    for result in results:
        stem = re.sub(r"[^\w.-]+", "--", str(result["run_info"]["experiment_name"])).strip("-.")[:120] or "run"
        name = next(n for i in range(len(results)) if (n := f"{stem}{f'-{i + 1}' if i else ''}.json") not in taken)
        taken.add(name)
        write_atomically(path / name, _dumped(result))
    return f"{path}: {', '.join(sorted(taken))}"


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _show(report: Report, output: Output) -> None:
    """Print the table, then the totals with their labels and the stopping decisions."""
    words = publishing
    per = words.per_unit(report)
    rows = []
    for row in report.rows:
        cells = {
            "run": row.name + (" (baseline)" if row.is_baseline else ""),
            report.metric: words.format_score(row.metric, row.error),
            words.RESOURCE_NAMES[report.resource]: running.format_quantity(row.spent.value, report.resource),
            "label": row.spent.how,
            "gain": words.format_score(row.gain),
            f"gain {per}": running.format_number(words.rate(row.per_resource, report)),
            f"recent gain {per}": running.format_number(words.rate(row.ratio, report)),
        }
        if report.baseline is not None:
            cells["relative to baseline"] = words.format_multiple(row.relative)
            cells["to reach baseline's end"] = running.format_quantity(row.to_baseline, report.resource)
            cells[f"{report.metric} at baseline's cost"] = words.format_score(row.at_budget)
        if len(report.rows) > 1:
            cells["Pareto front"] = {True: "yes", False: "no", None: words.ABSENT}[row.on_front]
        rows.append(cells)
    bare = [f"{row.name}\t{row.metric}\t{row.spent.value}" for row in report.rows]
    results = _results(report) if output.format == "json" else None
    output.answer(results, rows, bare, words.headline(report))
    if output.format != "table":
        return
    totals = [
        {"spent": name, **{row.name: _total(row, resource) for row in report.rows}}
        for resource, name in words.RESOURCE_NAMES.items()
    ]
    output.answer(None, totals, [], "\nCosts, and how each is known")
    for row in report.rows:
        if said := " ".join(words.describe_stop(row)):
            print(f"\n{row.name}: {said}")


def _total(row: Row, resource: str) -> str:
    total = row.record.total(resource)
    if total.value is None:
        return total.how
    return "; ".join(
        [f"{running.format_quantity(total.value, resource)} ({total.how})", *publishing.parts_of(row.record, resource)]
    )
