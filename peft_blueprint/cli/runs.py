"""The verb `report`: what runs gained for what they spent, as a table, a page, JSON, Markdown or in a model card.

Knows nothing of how runs are compared or drawn; torch is not waited for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .._files import require_writable, write_atomically
from ..errors import BlueprintError
from ..publish import ABSENT, NAMES, headline, number, per, quantity, score, stopping_words, times
from ..runs import RESOURCES, WINDOW, Report, Row, RunRecord, make_report
from .output import Quiet, print_answer, say


STDOUT = "-"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders with run.json, such files, or a Trainer's output folders.")
    ],
    baseline: Annotated[str | None, typer.Option(help="Run to compare with: its name, or its folder.")] = None,
    resource: Annotated[
        str | None, typer.Option(help=f"What counts as spent: {', '.join(RESOURCES)}; by default as the runs say.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What counts as gained; by default as the runs say.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Evaluations that the last ratio is taken over.")] = WINDOW,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained page there (needs matplotlib).")
    ] = None,
    as_json: Annotated[
        str | None,
        typer.Option(
            "--json", help="Write results in the form of PEFT's method_comparison: FILE, folder, or - to print."
        ),
    ] = None,
    markdown: Annotated[str | None, typer.Option(help="Write Markdown: FILE, or - to print.")] = None,
    card: Annotated[
        Path | None, typer.Option(help="Folder of an adapter: put the cost into its README.md and its metadata.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Report what runs gained for what they spent, beside each other."""
    if as_json == STDOUT and markdown == STDOUT:
        raise BlueprintError("--json - and --markdown - both print to the same place. Give one of them a file.")
    for path in (html, *(Path(text) for text in (as_json, markdown) if text not in (None, STDOUT))):
        if path is not None:
            require_writable(path if path.is_dir() else path.parent)
    records, named = _read(runs, baseline)
    found = make_report(records, baseline=named, resource=resource, metric=metric, window=window)
    of_card = None if card is None else _row_of(card, runs, found, baseline)
    for note in found.notes:
        say(f"note: {note}")

    if html is not None:
        from ..publish import save_page

        save_page(found, html)
        say(f"Written to {html}.")
    if as_json is not None:
        _give_json(found, as_json)
    if markdown is not None:
        from ..publish import cost_section

        _give(cost_section(found), markdown)
    if card is not None and of_card is not None:
        from ..publish import update_card

        path, notes = update_card(card, found, of_card)
        for note in notes:
            say(f"note: {note}")
        say(f"Written to {path}.")
    if STDOUT not in (as_json, markdown):
        _show(found, quiet)


def _read(paths: Sequence[Path], baseline: str | None) -> tuple[list[RunRecord], str | None]:
    """The runs under names of their own, and the baseline's; a baseline that is a folder is read too."""
    records = _distinct([RunRecord.load(path) for path in paths], paths)
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
    records = _distinct([RunRecord.load(path), *records], [path, *paths])
    return records, records[0].name


def _distinct(records: Sequence[RunRecord], paths: Sequence[Path]) -> list[RunRecord]:
    """Runs of one name are called by their paths."""
    names = [record.name for record in records]
    return [
        record if names.count(record.name) == 1 else replace(record, name=str(path))
        for record, path in zip(records, paths, strict=True)
    ]


def _row_of(folder: Path, paths: Sequence[Path], report: Report, baseline: str | None) -> Row:
    """The run that an adapter's folder is of: the one read from there, else the only one but for the baseline."""
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
        f"--card {folder}: which of the runs {', '.join(row.name for row in report.rows)} made this adapter cannot be told. "
        "Give that run alone, with --baseline for another."
    )


def _give_json(report: Report, target: str) -> None:
    """One result to a file or to print; of several a folder with a file each, as PEFT's tools read them, or a list."""
    from ..publish import method_comparison_json

    results = [method_comparison_json(row, report) for row in report.rows]
    path = Path(target)
    if target == STDOUT or (path.suffix == ".json" and not path.is_dir()):
        _give(_dumped(results[0] if len(results) == 1 else results), target)
        return
    taken: set[str] = set()
    for result in results:
        stem = re.sub(r"[^\w.-]+", "--", str(result["run_info"]["experiment_name"])).strip("-.")[:120] or "run"
        name = next(n for i in range(len(results)) if (n := f"{stem}{f'-{i + 1}' if i else ''}.json") not in taken)
        taken.add(name)
        write_atomically(path / name, _dumped(result))
    say(f"Written to {path}: {', '.join(sorted(taken))}.")


def _give(text: str, target: str) -> None:
    if target == STDOUT:
        print(text, end="")
        return
    write_atomically(Path(target), text)
    say(f"Written to {target}.")


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _show(report: Report, quiet: bool) -> None:
    """The table, then the totals' labels and the decisions in words."""
    has_base, several = report.baseline is not None, len(report.rows) > 1
    rows = []
    for row in report.rows:
        cells = {
            "run": escape(row.name) + (" (baseline)" if row.is_baseline else ""),
            report.metric: score(row.metric),
            NAMES[report.resource]: quantity(row.spent.value, report.resource),
            "label": row.spent.how,
            "gain": score(row.gain),
            f"gain {per(report.resource)}": number(row.per_resource),
            f"last window {per(report.resource)}": number(row.ratio),
        }
        if has_base:
            cells["of the baseline's"] = times(row.relative)
            cells["to the baseline's metric"] = quantity(row.to_baseline, report.resource)
            cells[f"{report.metric} at its budget"] = score(row.at_budget)
        if several:
            cells["front"] = {True: "yes", False: "no", None: ABSENT}[row.on_front]
        rows.append(cells)
    bare = [f"{row.name}\t{row.metric}\t{row.spent.value}" for row in report.rows]
    print_answer(None, rows, False, quiet, bare, headline(report))
    if quiet:
        return
    totals = [{"spent": NAMES[name], **{row.name: _total(row, name) for row in report.rows}} for name in NAMES]
    print_answer(None, totals, False, False, [], "\nWhat was spent, and how that is known")
    for row in report.rows:
        words = " ".join(stopping_words(row))
        if words:
            print(f"\n{row.name}: {words}")


def _total(row: Row, name: str) -> str:
    figure = row.record.total(name)
    return figure.how if figure.value is None else f"{quantity(figure.value, name)} ({figure.how})"


VERBS: tuple[Callable[..., None], ...] = (report,)
