"""Verbs that compare blueprints: `compare`, `drift`, `aggregate`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import blueprint as records
from .. import compare as comparing
from .. import measure
from .._files import require_writable
from ..compare import ProbeOptions
from ..errors import BlueprintError
from .output import Output, say
from .verbs import Only, Source, verb


if TYPE_CHECKING:
    from ..blueprint import Blueprint


_TOP = 20  # submodules of a movement that are shown


@verb(
    "Compare",
    examples=[
        "peft-blueprint compare one.json other.json",
        "peft-blueprint compare one.json org/model --top 5",
        "peft-blueprint compare groups.json other.json --model org/model",
        "peft-blueprint compare experts_math.json experts_law.json --experts 0.9",
    ],
)
def compare(
    first: Source,
    second: Source,
    output: Output,
    top: Annotated[int, typer.Option(min=0, help="Entries to show, largest change of rank first; 0 for all.")] = 20,
    model: Annotated[
        str | None,
        typer.Option(
            help="Expand groups or layers to the submodules of this model, a folder or Hub id; reads its config."
        ),
    ] = None,
    experts: Annotated[
        float | None,
        typer.Option(
            metavar="TOP_P",
            help="Compare single experts by layer: the fewest that hold this share of a layer's scores, such as 0.9.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="With --experts, score experts by token_share (default), gate_weight, adam_gain, …"),
    ] = None,
) -> None:
    """Compare two blueprints of one model: norms and ranks within each kind, or which experts two tasks share."""
    a, b = records.Blueprint.from_pretrained(first), records.Blueprint.from_pretrained(second)
    if experts is not None:
        _compare_experts(a, b, by or "token_share", experts, output)
        return
    if by is not None:
        raise BlueprintError("--by scores experts: give --experts, such as --experts 0.9, as well.")
    if model is not None:
        submodules = measure.find_submodules(measure.empty_model(model))
        a, b = a.expand(submodules), b.expand(submodules)
    records.require_same_names(a, b, "compared")
    ranks_a, ranks_b = a.ranks(), b.ranks()
    rows = [
        {
            "id": entry.name,
            "kind": entry.kind,
            "first": records.norm_of(entry),
            "second": records.norm_of(b[entry.name]),
            "rank_first": ranks_a[entry.name],
            "rank_second": ranks_b[entry.name],
        }
        for entry in a
    ]
    rows.sort(key=lambda row: -abs(row["rank_first"] - row["rank_second"]))  # type: ignore[operator]
    shown = rows[: top or None]
    output.answer(rows, shown, [str(row["id"]) for row in shown], f"{a.model_id} and {b.model_id}")


def _compare_experts(a: Blueprint, b: Blueprint, by: str, top_p: float, output: Output) -> None:
    found = comparing.compare_experts(a, b, by, top_p)
    rows = [
        {
            "layer": layer.layer,
            "experts": layer.experts,
            "first": len(layer.first),
            "second": len(layer.second),
            "shared": len(layer.shared),
            "jaccard": layer.jaccard,
            "chance": layer.chance,
            "correlation": layer.correlation,
        }
        for layer in found.layers
    ]
    title = (
        f"experts that hold {100 * top_p:g} % of {by}: Jaccard {found.jaccard:.3f} (by chance {found.chance:.3f}), rank "
        f"correlation {found.correlation:.3f}"
    )
    output.answer(found.to_dict(), rows, [f"{found.jaccard:.4f}"], title)


@verb("Compare", examples=["peft-blueprint drift local.json org/model"])
def drift(
    local: Source,
    published: Source,
    probing: Annotated[ProbeOptions, Only("domain")],
    output: Output,
    threshold: Annotated[
        float | None, typer.Option(help="Rank correlation below which the two have drifted apart; 0.85 by default.")
    ] = None,
) -> None:
    """Check whether a local blueprint agrees with a published one. Exit status 1 if it does not."""
    found = comparing.check_drift(
        records.Blueprint.from_pretrained(local),
        comparing.read_for_domain(published, probing.domain),
        threshold=comparing.DRIFT_THRESHOLD if threshold is None else threshold,
    )
    result = {
        "correlation": found.correlation,
        "interval": list(found.interval),
        "threshold": found.threshold,
        "drifted": found.drifted,
        "level": found.level,
        "by_kind": found.by_kind,
    }
    rows = [{"kind": kind, "correlation": value} for kind, value in found.by_kind.items()]
    title = (
        f"rank correlation within kind {found.correlation:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}], "
        f"{'below' if found.drifted else 'not below'} {found.threshold:g}"
    )
    output.answer(result, rows, [f"{found.correlation:.4f}"], title)
    raise typer.Exit(1 if found.drifted else 0)


@verb(
    "Compare",
    examples=[
        "peft-blueprint aggregate one.json other.json --out table.parquet",
        "peft-blueprint aggregate one.json other.json --merge merged.json",
        "peft-blueprint aggregate run --movement",
    ],
)
def aggregate(
    sources: Annotated[
        list[str],
        typer.Argument(help="Blueprints: files, or folders and repository ids, for all blueprints in them."),
    ],
    output: Output,
    out: Annotated[
        Path | None, typer.Option(help="Write a table, one row per entry: .csv, .json, .jsonl or .parquet.")
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Write the merged blueprint to a .json, .csv or .safetensors file, or several to a folder."),
    ] = None,
    movement: Annotated[
        bool, typer.Option("--movement", help="Show how norms moved between checkpoints of the model's training.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip sources that cannot be read.")] = False,
) -> None:
    """Collect many blueprints in one table, by model, checkpoint, source and domain; merge and compare them."""
    if out is not None:
        comparing.require_table_format(out)
        require_writable(out.parent)
    if merge is not None:
        require_writable(merge.parent)
    blueprints, skipped = comparing.read_sources(
        sources, on_error="skip" if skip_bad else "raise", progress=output.format == "table"
    )
    _require_none_is_a_source([] if out is None else [out], blueprints)
    if skipped:
        say(f"warning: {comparing.describe_skipped(skipped)}")
    written: list[str] = []
    notes: tuple[str, ...] = ()
    moving: Mapping[str, Blueprint] = blueprints
    if merge is not None:
        merged, notes = comparing.merge_all(blueprints)
        files = _files_for(merge, merged, notes)
        _require_none_is_a_source(files, blueprints)
        moving = {str(path): one for path, one in zip(files, merged, strict=True)}
    found = comparing.checkpoint_movement(moving) if movement else None
    if out is not None:
        written.append(str(comparing.write_table(comparing.aggregate(blueprints), out)))
    if merge is not None:
        written += [str(one.save(path)) for path, one in moving.items()]

    overview = [_overview(source, blueprint) for source, blueprint in blueprints.items()]
    data: dict[str, Any] = {"sources": overview, "skipped": skipped, "written": written}
    if merge is not None:
        data["notes"] = list(notes)
    if found is not None:
        data["movement"] = found.to_dict()
    if output.format == "json" and not (written or movement):
        data["rows"] = comparing.aggregate(blueprints)
    moved = [] if found is None else found.rows()
    bare = written or [str(row["id"]) for row in moved] or list(blueprints)
    title = f"{len(blueprints)} blueprints, {sum(map(len, blueprints.values()))} entries"
    output.answer(data, overview, bare, title)
    if output.format != "table":
        return
    if found is not None:
        top = [{key: value for key, value in row.items() if key != "model_id"} for row in moved[:_TOP]]
        which = f"\n\nThe {_TOP} that moved most:" if len(moved) > _TOP else ""
        output.answer(data, top, bare, f"\n{found}{which}")
    for note in notes:
        say(note)
    output.hint(f"Written to {', '.join(written)}." if written else "Next: write the table with --out table.csv")


def _overview(source: str, blueprint: Blueprint) -> dict[str, Any]:
    examples = {entry.examples for entry in blueprint}
    return {
        "source": source,
        "model_id": blueprint.model_id,
        "checkpoint": blueprint.training_checkpoint,
        "domain": comparing.join_unique(
            comparing.reference_of(part)[0] for part in comparing.parts_of(blueprint.provenance)
        ),
        "entries": len(blueprint),
        "level": blueprint.level,
        "examples": examples.pop() if len(examples) == 1 else None,
    }


def _files_for(path: Path, merged: Iterable[Blueprint], notes: Iterable[str]) -> list[Path]:
    """Name a file for every merged blueprint: `path` itself, or in that folder one by model and checkpoint."""
    merged = list(merged)
    if path.suffix in records.SUFFIXES and not path.is_dir():
        if len(merged) > 1:
            raise BlueprintError(
                f"--merge {path} is one file, but {len(merged)} blueprints remain after merging. {' '.join(notes)} Give "
                "a folder to write a file for each."
            )
        return [path]
    if path.suffix and not path.is_dir():
        raise BlueprintError(
            f"--merge {path}: a blueprint cannot be written as {path.suffix}. Give a name that ends in "
            f"{', '.join(records.SUFFIXES)}, or a folder."
        )
    files: list[Path] = []
    for blueprint in merged:
        model = re.sub(r"[^a-z0-9]+", "_", blueprint.model_id.lower())[-48:].strip("_")
        names = (f"of_{model}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, len(merged) + 2))))
        candidates = (path / records.file_name(name, blueprint.training_checkpoint) for name in names)
        files.append(next(file for file in candidates if file not in files))
    return files


def _require_none_is_a_source(files: Iterable[Path], sources: Iterable[str]) -> None:
    """Raise BlueprintError if a file to be written is one of the sources."""
    there = [path for path in files if path.exists()]
    for source in map(Path, sources if there else ()):
        for path in there:
            if source.exists() and path.samefile(source):
                raise BlueprintError(f"{path} is one of the sources and would be overwritten. Choose another name.")
