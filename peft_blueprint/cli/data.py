"""The verb `select-data`: which examples of a data set to train on, written to a file.

Knows nothing of how examples are scored; torch is waited for only when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .._files import require_writable
from .._text import format_names
from ..blueprint import Blueprint
from ..data import read_table, require_format, require_holds, write_table
from ..errors import BlueprintError
from .output import AsJson, Quiet, pairs_of, print_answer, say


if TYPE_CHECKING:
    from ..data import Selection
    from ..place import Placement

_TRIED = 100  # examples that are written for a trial before any is scored; of a stream one

# as in selection.py, which waits for torch
SCORES = ("selection_score", "selection_index")

# as in aligning.py and selection_methods.py, which wait for torch
Precondition = Literal["none", "adam", "blocks"]
Similarity = Literal["cosine", "dot"]
FeatureKind = Literal["model", "tokens"]


def select_data(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[str, typer.Option(help="Examples: a JSON-lines, CSV or Parquet file or a Hub data set.")],
    out: Annotated[Path, typer.Option(help="Where to write the chosen: .jsonl, .csv or .parquet.")],
    fraction: Annotated[float | None, typer.Option(help="Share of the examples to keep, (0, 1].")] = None,
    count: Annotated[int | None, typer.Option(help="Or how many.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="random, predicted_norm (Algorithm 2), norm, norm_low, alignment, predicted_alignment, loss, loss_low, "
            "length, length_short, bm25, coreset_k_centre, coreset_facility or iterative."
        ),
    ] = "random",
    target: Annotated[
        str | None, typer.Option(help="A few examples of what is wanted, for alignment and bm25: a file or data set.")
    ] = None,
    target_examples: Annotated[int, typer.Option(min=1, help="How many of them to use.")] = 64,
    columns: Annotated[str, typer.Option(help="What the data calls things: prompt=question,completion=answer.")] = "",
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.")] = "train",
    stream: Annotated[
        bool, typer.Option(help="Read the data as it is gone through, in constant memory; with --count.")
    ] = False,
    blueprint: Annotated[
        str | None, typer.Option(help="Only gradients of the submodules that a placement by this blueprint trains.")
    ] = None,
    placement_fraction: Annotated[
        float | None, typer.Option(help="Share of the submodules of that placement; as `targets` has it by default.")
    ] = None,
    small: Annotated[int, typer.Option(min=1, help="Examples to measure for a prediction.")] = 64,
    features: Annotated[FeatureKind, typer.Option(help="What predictions are made from.")] = "model",
    similarity: Annotated[Similarity, typer.Option(help="With the target's gradient.")] = "cosine",
    precondition: Annotated[Precondition, typer.Option(help="Of alignment, by submodule.")] = "none",
    deduplicate: Annotated[bool, typer.Option(help="Pass over near-duplicates of what is chosen.")] = True,
    with_scores: Annotated[bool, typer.Option(help="Write the columns selection_score and selection_index.")] = False,
    keep_state: Annotated[
        Path | None, typer.Option(help="File from which a run that was killed is resumed by the same command.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, float16.")] = "auto",
    load_in_4bit: Annotated[bool, typer.Option(help="Quantise the weights to NF4 (needs bitsandbytes).")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose examples to train on. Under torchrun or accelerate launch, the processes share the work."""
    if placement_fraction is not None and blueprint is None:
        raise BlueprintError("--placement-fraction is of a placement by a blueprint: give one with --blueprint.")
    require_format(out)
    _require_own(
        {"--out": out, "--keep-state": keep_state}, {"--data": data, "--target": target, "--blueprint": blueprint}
    )
    require_writable(out.parent)

    from ..data import method_of, require_columns, select_examples, wanted_of
    from ..measure import join_processes, load_model, load_tokenizer

    wanted_of(None if stream else 1, fraction, count)
    names = pairs_of(columns)
    require_columns(names)
    rank, _ = join_processes()
    table = read_table(data, split=split, stream=stream)
    there = table.column_names
    require_columns(names, there)
    taken = set(SCORES) & set(there) if with_scores else set()
    if taken:
        raise BlueprintError(
            f"--with-scores writes {format_names(SCORES)}, and the data {data!r} has {format_names(sorted(taken))} already. Leave out "
            "--with-scores, or rename them in the data."
        )
    require_holds(out, islice(table, 1) if stream else table.select(range(min(len(table), _TRIED))))
    aims = None if target is None else list(islice(read_table(target, split=split), target_examples))
    if method_of(method, target is not None).uses_model:
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if load_in_4bit else None
        loaded, tokenizer = load_model(model, dtype, quantization)
    else:
        loaded, tokenizer = None, load_tokenizer(model)
    selection = select_examples(
        loaded,
        table,
        fraction=fraction,
        count=count,
        method=method,
        tokenizer=tokenizer,
        columns=names,
        target=aims,
        placement=None if blueprint is None else _placement(blueprint, placement_fraction),
        small=small,
        features=features,
        similarity=similarity,
        precondition=precondition,
        deduplicate=deduplicate,
        keep_state=keep_state,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        progress=not quiet,
    )
    if rank:
        return
    write_table(out, selection.apply(None if stream else table, with_scores))
    report = selection.to_dict() | {"written": str(out)}
    for said in selection.fallbacks:
        say(f"note: {said}")
    title = f"{len(selection)} of {selection.report['examples']} examples by {method}"
    print_answer(report, _rows(selection), as_json, quiet, [str(out)], title)
    if not (as_json or quiet):
        say(f"Written to {out}.")


def _require_own(written: Mapping[str, Path | None], read: Mapping[str, str | None]) -> None:
    """Raise BlueprintError where a file to be written is a folder, or one that is read, or another to be written."""
    seen = {Path(source).resolve(): f"{option} {source}" for option, source in read.items() if source is not None}
    for option, path in written.items():
        if path is None:
            continue
        if path.is_dir():
            raise BlueprintError(f"{option} {path} is a folder. Name a file in it.")
        if other := seen.get(path.resolve()):
            raise BlueprintError(f"{option} {path} is the file of {other}, which would be lost. Choose another file.")
        seen[path.resolve()] = f"{option} {path}"


def _placement(blueprint: str, fraction: float | None) -> Placement:
    from ..place import plan_placement

    return plan_placement(Blueprint.from_pretrained(blueprint), fraction=fraction)


def _rows(selection: Selection) -> list[dict[str, Any]]:
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


VERBS: tuple[Callable[..., None], ...] = (select_data,)
