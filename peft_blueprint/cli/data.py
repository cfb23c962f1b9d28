"""The verb `select-data`: choose the examples of a data set to train on, and write them to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import blueprint as records
from .. import data as selecting
from .. import measure, place
from .._files import require_writable
from .._text import format_names
from ..data import SelectionOptions
from ..errors import BlueprintError
from .output import Output, say
from .verbs import NF4, Columns, Dtype, In4Bit, Model, parse_pairs, verb


_TRIED = 100  # examples written for a trial before any is scored; one of a stream


@verb(
    "Data",
    examples=[
        "peft-blueprint select-data org/model --data train.jsonl --fraction 0.3 --out chosen.jsonl",
        "peft-blueprint select-data org/model --data train.jsonl --count 4 --method bm25 --target few.jsonl "
        "--out chosen.jsonl",
    ],
)
def select_data(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Examples: a file such as train.jsonl, or a Hub data set: ID or ID:CONFIG.")
    ],
    out: Annotated[Path, typer.Option(help="File for the chosen examples: .jsonl, .csv or .parquet.")],
    options: SelectionOptions,
    output: Output,
    columns: Columns = "",
    target: Annotated[
        str | None, typer.Option(help="Examples of the wanted kind, for alignment and bm25: a file or a data set.")
    ] = None,
    target_examples: Annotated[int, typer.Option(min=1, help="Number of them to use.")] = 64,
    split: Annotated[str, typer.Option(help="Split of a data set on the Hub.")] = "train",
    stream: Annotated[
        bool, typer.Option("--stream", help="Stream the data in constant memory; with --count.")
    ] = False,
    blueprint: Annotated[
        str | None, typer.Option(help="Use the gradients of those submodules alone that this blueprint places.")
    ] = None,
    placement_fraction: Annotated[
        float | None, typer.Option(help="Share of the submodules in that placement; the default is that of `targets`.")
    ] = None,
    with_scores: Annotated[
        bool, typer.Option("--with-scores", help="Add the columns selection_score and selection_index.")
    ] = False,
    dtype: Dtype = "auto",
    load_in_4bit: In4Bit = False,
) -> None:
    """Choose examples to train on. Under torchrun or accelerate launch, the processes share the work."""
    if placement_fraction is not None and blueprint is None:
        raise BlueprintError("--placement-fraction needs the blueprint to place by: give --blueprint.")
    selecting.require_format(out)
    _require_distinct(
        {"--out": out, "--keep-state": options.keep_state},
        {"--data": data, "--target": target, "--blueprint": blueprint},
    )
    require_writable(out.parent)
    options.resolve_count(None if stream else 1)
    names = parse_pairs(columns)
    options = replace(options, columns=names)
    selecting.require_columns(names)
    rank, _ = measure.join_processes()
    table = selecting.read_table(data, split=split, stream=stream)
    present = table.column_names
    selecting.require_columns(names, present)
    taken = set(selecting.SCORE_COLUMNS) & set(present) if with_scores else set()
    if taken:
        raise BlueprintError(
            f"--with-scores adds {format_names(selecting.SCORE_COLUMNS)}, but {data!r} already has "
            f"{format_names(sorted(taken))}. Leave out --with-scores, or rename them in the data."
        )
    selecting.require_storable(out, islice(table, 1) if stream else table.select(range(min(len(table), _TRIED))))
    wanted = None if target is None else list(islice(selecting.read_table(target, split=split), target_examples))
    if options.resolve_method(wanted is not None).uses_model:
        loaded, tokenizer = measure.load_model(model, dtype, NF4 if load_in_4bit else None)
    else:
        loaded, tokenizer = None, measure.load_tokenizer(model)
    selection = selecting.select_examples(
        loaded,
        table,
        options,
        tokenizer=tokenizer,
        target=wanted,
        placement=None if blueprint is None else _placement(blueprint, placement_fraction),
        progress=output.progress,
    )
    if rank:
        return
    selecting.write_table(out, selection.apply(None if stream else table, with_scores))
    for said in selection.fallbacks:
        say(f"note: {said}")
    title = f"{len(selection)} of {selection.report['examples']} examples by {options.method}"
    output.answer(selection.to_dict() | {"written": str(out)}, _rows(selection), [str(out)], title)
    output.hint(f"Written to {out}.")


def _require_distinct(written: Mapping[str, Any], read: Mapping[str, str | None]) -> None:
    """Raise BlueprintError if a file to be written is a folder, a file that is read, or another file to be written."""
    seen = {Path(source).resolve(): f"{flag} {source}" for flag, source in read.items() if source is not None}
    for flag, name in written.items():
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            raise BlueprintError(f"{flag} {path} is a folder. Name a file in it.")
        if other := seen.get(path.resolve()):
            raise BlueprintError(f"{flag} {path} would overwrite the file of {other}. Choose another file.")
        seen[path.resolve()] = f"{flag} {path}"


def _placement(blueprint: str, fraction: float | None) -> Any:
    return place.plan_placement(records.Blueprint.from_pretrained(blueprint), fraction=fraction)


def _rows(selection: Any) -> list[dict[str, Any]]:
    report = selection.report
    rows = [{"what": key.replace("_", " "), "value": report[key]} for key in ("without_targets", "duplicates")]
    if selection.scores:
        rows.append({"what": "scores", "value": f"{min(selection.scores):.4g} to {max(selection.scores):.4g}"})
    if "predictor" in report:
        found = report["predictor"]
        low, high = found["interval"]
        said = f"{found['rank_correlation']:.2f} [{low:.2f}, {high:.2f}], {found['name']}"
        rows.append({"what": "held-out rank correlation", "value": said})
    rows.append({"what": "seconds", "value": report["cost"]["seconds"]})
    if report["cost"]["flops"]:
        rows.append({"what": "FLOPs", "value": float(report["cost"]["flops"])})
        rows.append({"what": "share of measuring all", "value": report["cost"]["share_of_measuring_all"]})
    return rows
