"""The verb `aggregate`: many blueprints into one table, merged where they can be, and how norms moved in training.

A thin shell round `aggregate`, `merging` and `movement`; knows nothing of what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .._files import require_writable
from ..blueprint import SUFFIXES, Blueprint, file_name
from ..compare import aggregate as table_of
from ..compare import joined, merge_all, parts_of, read_sources, reference_of, skipped_in_words, write_table, writer_of
from ..errors import BlueprintError
from .output import AsJson, Quiet, print_answer, say


_TOP = 20  # submodules of a movement that are shown


def aggregate(
    sources: Annotated[
        list[str], typer.Argument(help="Blueprints: files, folders, or repository ids on the Hub; any number.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the table, a row per entry: .csv, .json, .jsonl or .parquet.")
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Write what merges into one: a .json, .csv or .safetensors file, or a folder for several."),
    ] = None,
    movement: Annotated[
        bool, typer.Option("--movement", help="Say how norms moved between checkpoints of the model's training.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Go on without sources that cannot be read.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring many blueprints into one table, by model, checkpoint, source and domain; merge them, compare them."""
    if out is not None:
        writer_of(out)
        require_writable(out.parent)
    if merge is not None:
        require_writable(merge.parent)
    blueprints, skipped = read_sources(
        sources, on_error="skip" if skip_bad else "raise", progress=not (quiet or as_json)
    )
    _require_none_is_a_source([] if out is None else [out], blueprints)
    if skipped:
        say(f"warning: {skipped_in_words(skipped)}")
    written: list[str] = []
    notes: tuple[str, ...] = ()
    moving: Mapping[str, Blueprint] = blueprints
    if merge is not None:
        merged, notes = merge_all(blueprints)
        files = _files_for(merge, merged, notes)
        _require_none_is_a_source(files, blueprints)
        moving = {str(path): one for path, one in zip(files, merged, strict=True)}
    found = _movement(moving) if movement else None
    if out is not None:
        written.append(str(write_table(table_of(blueprints), out)))
    if merge is not None:
        written += [str(one.save(path)) for path, one in moving.items()]

    overview = [_overview(source, blueprint) for source, blueprint in blueprints.items()]
    data: dict[str, Any] = {"sources": overview, "skipped": skipped, "written": written}
    if merge is not None:
        data["notes"] = list(notes)
    if found is not None:
        data["movement"] = found.to_dict()
    if as_json and not (written or movement):
        data["rows"] = table_of(blueprints)
    moved = [] if found is None else found.rows()
    bare = written or [str(row["id"]) for row in moved] or list(blueprints)
    title = f"{len(blueprints)} blueprints, {sum(map(len, blueprints.values()))} entries"
    print_answer(data, overview, as_json, quiet, bare, title)
    if as_json or quiet:
        return
    if found is not None:
        top = [{key: value for key, value in row.items() if key != "model_id"} for row in moved[:_TOP]]
        which = f"\n\nThe {_TOP} that moved most:" if len(moved) > _TOP else ""
        print_answer(data, top, as_json, quiet, bare, f"\n{found}{which}")
    for note in notes:
        say(note)
    if written:
        say(f"Written to {', '.join(written)}.")
    else:
        say("Next: the table in a file, with --out table.csv")


def _movement(blueprints: Mapping[str, Blueprint]) -> Any:
    from ..compare import checkpoint_movement

    return checkpoint_movement(blueprints)


def _overview(source: str, blueprint: Blueprint) -> dict[str, Any]:
    examples = {entry.examples for entry in blueprint}
    return {
        "source": source,
        "model_id": blueprint.model_id,
        "checkpoint": blueprint.training_checkpoint,
        "domain": joined(reference_of(part)[0] for part in parts_of(blueprint.provenance)),
        "entries": len(blueprint),
        "level": blueprint.level,
        "examples": examples.pop() if len(examples) == 1 else None,
    }


def _files_for(path: Path, merged: Iterable[Blueprint], notes: Iterable[str]) -> list[Path]:
    """A file for every merged blueprint: `path`, or in the folder that it is, by model and checkpoint."""
    merged = list(merged)
    if path.suffix in SUFFIXES and not path.is_dir():
        if len(merged) > 1:
            raise BlueprintError(
                f"{path} is one file, and {len(merged)} blueprints remain after merging. {' '.join(notes)} Give a folder "
                "to have a file for each."
            )
        return [path]
    if path.suffix and not path.is_dir():
        raise BlueprintError(
            f"{path}: no blueprint is written as {path.suffix}. Give a name that ends in {', '.join(SUFFIXES)}, or a "
            "folder."
        )
    files: list[Path] = []
    for blueprint in merged:
        model = re.sub(r"[^a-z0-9]+", "_", blueprint.model_id.lower())[-48:].strip("_")
        names = (f"of_{model}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, len(merged) + 2))))
        candidates = (path / file_name(name, blueprint.training_checkpoint) for name in names)
        files.append(next(file for file in candidates if file not in files))
    return files


def _require_none_is_a_source(files: Iterable[Path], sources: Iterable[str]) -> None:
    """Raise BlueprintError if a file that is to be written is one of those that were read."""
    there = [path for path in files if path.exists()]
    for source in map(Path, sources if there else ()):
        for path in there:
            if source.exists() and path.samefile(source):
                raise BlueprintError(f"{path} is one of the sources, and would be overwritten. Choose another name.")


VERBS = (aggregate,)
