"""The verbs `select-data`, which chooses what to train on, and `cross-influence`, which chooses submodules with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import compare as comparing
from .. import data as selecting
from .. import measure, place
from .._files import require_writable
from .._text import format_names
from ..compare import ProbeOptions
from ..data import SelectionOptions
from ..errors import BlueprintError
from ..measure import LoadOptions
from .output import Output, say
from .verbs import NF4, Columns, Dtype, In4Bit, Model, Only, Split, parse_pairs, verb


_Unit = Literal["example", "block", "token"]
_TRIED = 100  # examples written for a trial before any is scored; one of a stream


@verb(
    "Data",
    examples=[
        "peft-blueprint select-data org/model --data train.jsonl --fraction 0.3 --out chosen.jsonl",
        "peft-blueprint select-data org/model --data train.jsonl --fraction q_star --method norm --epochs 3 "
        "--out chosen.jsonl",
        "peft-blueprint select-data org/model --data train.jsonl --count 4 --method bm25 --target few.jsonl "
        "--out chosen.jsonl",
        "peft-blueprint select-data org/model --data train.jsonl --unit token --fraction 0.5 --method head_norm "
        "--out masked.jsonl",
    ],
)
def select_data(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Examples: a file such as train.jsonl, or a Hub data set: ID or ID:CONFIG.")
    ],
    out: Annotated[Path, typer.Option(help="File for the chosen examples: .jsonl, .csv or .parquet.")],
    options: SelectionOptions,
    probing: Annotated[ProbeOptions, Only("domain")],
    loading: LoadOptions,
    output: Output,
    columns: Columns = "",
    target: Annotated[
        str | None, typer.Option(help="Examples of the wanted kind, for alignment and bm25: a file or a data set.")
    ] = None,
    target_examples: Annotated[int, typer.Option(min=1, help="Number of them to use.")] = 64,
    split: Split = "train",
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Stream the data in constant memory; a --fraction is then of the examples seen so far."
        ),
    ] = False,
    unit: Annotated[
        _Unit,
        typer.Option(
            help="Choose examples; blocks of --max-length tokens; or target tokens, with other labels masked."
        ),
    ] = "example",
    pack: Annotated[
        bool, typer.Option("--pack", help="Join documents and cut them into full blocks, for --unit block or token.")
    ] = False,
    scorer: Annotated[
        str | None, typer.Option(help="Score with this model, a smaller one, instead of the one to train.")
    ] = None,
    blueprint: Annotated[
        str | None, typer.Option(help="Use only the gradients of the submodules that this blueprint places.")
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
    """Choose examples, blocks or tokens to train on. Under torchrun or accelerate launch, the processes share the work."""
    if placement_fraction is not None and blueprint is None:
        raise BlueprintError("--placement-fraction needs the blueprint to place by: give --blueprint.")
    if probing.domain is not None and blueprint is None:
        raise BlueprintError("--domain chooses among the domains of a blueprint: give --blueprint.")
    selecting.require_format(out)
    _require_distinct(
        {"--out": out, "--keep-state": options.keep_state},
        {"--data": data, "--target": target, "--blueprint": blueprint},
    )
    require_writable(out.parent)
    is_filtered = unit == "token" or (stream and options.fraction is not None)
    if is_filtered and out.suffix != ".jsonl":
        raise BlueprintError(f"--out must end in .jsonl, which is written as the data is read, got {out}.")
    if pack and unit == "example":
        raise BlueprintError("--pack joins documents before they are cut into blocks: give --unit block or token.")
    if with_scores and unit == "token":
        raise BlueprintError(
            "--with-scores needs one score a row, and the rows of --unit token have none. Leave it out."
        )
    if not is_filtered or options.count is not None:
        options.resolve_count(None if stream else 1)
    names = parse_pairs(columns)
    selecting.require_columns(names)
    rank, _ = measure.join_processes()
    table = selecting.read_table(data, split=split, stream=stream)
    present = table.column_names
    selecting.require_columns(names, present)
    options = replace(options, columns=names)
    pool, tokenizer = table, None
    if unit == "block" or pack:
        tokenizer = measure.load_tokenizer(model, loading)
        pool = selecting.cut_blocks(table, tokenizer, size=options.max_length, pack=pack, columns=names)
        present = pool.column_names
    taken = set(selecting.SCORE_COLUMNS) & set(present) if with_scores else set()
    if taken:
        raise BlueprintError(
            f"--with-scores adds {format_names(selecting.SCORE_COLUMNS)}, but {data!r} already has "
            f"{format_names(sorted(taken))}. Leave out --with-scores, or rename them in the data."
        )
    if unit != "token":
        first = range(0) if stream else range(min(len(pool), _TRIED))
        trial = islice(pool, 1) if stream else table.select(first) if pool is table else [pool[i] for i in first]
        selecting.require_storable(out, trial)
    tokenizer = tokenizer or measure.load_tokenizer(model, loading)
    wanted = None if target is None else list(islice(selecting.read_table(target, split=split), target_examples))
    loaded = None
    if options.resolve_method(wanted is not None).uses_model:
        loaded, own = measure.load_model(
            scorer or model,
            dtype,
            NF4 if load_in_4bit else None,
            loading if scorer is None else replace(loading, revision=None),
        )
        if scorer is not None and unit != "example":
            tokenizer = tokenizer or measure.load_tokenizer(model, loading)
            _require_one_vocabulary(own, tokenizer, scorer, model)
        tokenizer = tokenizer or own
    tokenizer = tokenizer or measure.load_tokenizer(model, loading)
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "target": wanted,
        "placement": None
        if blueprint is None
        else _placement(scorer or model, blueprint, placement_fraction, probing),
        "progress": output.progress,
    }
    if is_filtered:
        kind: Literal["example", "token"] = "token" if unit == "token" else "example"
        found = selecting.filter_stream(loaded, pool, options, unit=kind, with_scores=with_scores, **settings)
        if rank:
            for _ in found:
                pass
        else:
            selecting.continue_table(out, found, found.resumed)
        report = found.report
        if rank:
            return
        title = f"{report['kept']} of {report['units']} {unit}s by {options.method}"
        _answer(output, out, found.fallbacks, {"method": options.method, "report": report}, _rows(report), title)
        return
    selection = selecting.select_examples(loaded, pool, options, **settings)
    if rank:
        return
    selecting.write_table(out, selection.apply(None if stream else pool, with_scores))
    title = f"{len(selection)} of {selection.report['examples']} {unit}s by {options.method}"
    rows = _rows(selection.report, selection.scores)
    _answer(output, out, selection.fallbacks, selection.to_dict(), rows, title)


@verb(
    "Data",
    examples=[
        "peft-blueprint cross-influence org/model --data train.jsonl --block 8 --k 0.2 --q 0.5 --out blocks.safetensors"
    ],
)
def cross_influence(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Examples: a file such as train.jsonl, or a Hub data set: ID or ID:CONFIG.")
    ],
    loading: LoadOptions,
    output: Output,
    k: Annotated[float, typer.Option(help="Share of the submodules to choose, of their parameters.")] = 0.2,
    q: Annotated[float, typer.Option(help="Share of the data to choose, of its examples.")] = 0.3,
    block: Annotated[int, typer.Option(min=1, help="Examples of a block of data; 1 to choose single examples.")] = 8,
    statistic: Annotated[
        Literal["norms", "block_norms"],
        typer.Option(help="Sum of the examples' gradient norms, or norm of the sum of a block's gradients."),
    ] = "norms",
    normalize: Annotated[
        bool,
        typer.Option("--normalize", help="Divide by the mean of each kind of submodule, as kinds do not compare."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File for the matrix, which holds values of single blocks.")] = None,
    columns: Columns = "",
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(min=2, help="Number of examples to read; all by default.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.")] = 512,
    dtype: Dtype = "auto",
    load_in_4bit: In4Bit = False,
) -> None:
    """Choose submodules and blocks of data for each other: the paper's cross-influence (eq. 32 to 35)."""
    if out is not None:
        require_writable(out.parent)
        _require_distinct({"--out": out}, {"--data": data})
    examples = selecting.read_examples(data, parse_pairs(columns), split=split, limit=limit)
    loaded, tokenizer = measure.load_model(model, dtype, NF4 if load_in_4bit else None, loading)
    rows = measure.encode(examples, tokenizer, max_length)
    batches = measure.make_batches(rows, block, measure.get_pad_token_id(tokenizer))
    matrix = selecting.CrossInfluence.from_blocks(loaded, batches, 1, statistic)
    if normalize:
        matrix = matrix.normalize("kind")
    chosen = matrix.select_jointly(k, q, submodule_costs=matrix.parameters, example_costs=matrix.sizes)
    if out is not None:
        matrix.save(out)
    shares = {"submodules": chosen.submodules, "blocks": chosen.examples}
    table = [
        {"what": "captured share", "value": f"{chosen.share:.1%} of at most {chosen.bound:.1%}"},
        {"what": "chosen separately", "value": f"{chosen.separate:.1%}"},
        {"what": "k^γ · q^δ", "value": f"{chosen.independent:.1%} (γ = {chosen.gamma:.3f}, δ = {chosen.delta:.3f})"},
        *({"what": name, "value": format_names(list(map(str, found)), 6)} for name, found in shares.items()),
    ]
    title = f"{len(chosen.submodules)} of {len(matrix.names)} submodules, {len(chosen.examples)} of {len(matrix.examples)} blocks"
    content = chosen.to_dict() | {"written": None if out is None else str(out)}
    output.answer(content, table, list(chosen.submodules), title)
    if out is not None:
        output.hint(f"Written to {out}. Read it with data.CrossInfluence.load.")


def _answer(
    output: Output,
    out: Path,
    notes: Sequence[str],
    content: Mapping[str, Any],
    rows: list[dict[str, Any]],
    title: str,
) -> None:
    for said in notes:
        say(f"note: {said}")
    output.answer({**content, "written": str(out)}, rows, [str(out)], title)
    output.hint(f"Written to {out}.")


def _require_one_vocabulary(scoring: Any, training: Any, scorer: str, model: str) -> None:
    """Raise BlueprintError if the rows of token ids that a scorer chooses would be others to the model to train."""
    if scoring.get_vocab() != training.get_vocab():
        raise BlueprintError(
            f"Blocks and tokens are written as token ids, and the tokenizers of {scorer!r} and {model!r} differ. Score with "
            "a model of the same tokenizer, or with --scorer-layers of this one, or choose examples."
        )


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


def _placement(model: str, blueprint: str, fraction: float | None, probing: ProbeOptions) -> Any:
    record = comparing.read_for_domain(blueprint, probing.domain)
    config = None if record.level == "submodule" else measure.empty_model(model)  # to expand groups or layers
    return place.plan_placement(record, config, fraction=fraction)


def _rows(report: Mapping[str, Any], scores: Sequence[float] = ()) -> list[dict[str, Any]]:
    shown = [key for key in ("without_targets", "duplicates", "share", "rows") if key in report]
    rows = [{"what": key.replace("_", " "), "value": report[key]} for key in shown]
    if scores:
        rows.append({"what": "scores", "value": f"{min(scores):.4g} to {max(scores):.4g}"})
    if "predictor" in report:
        found = report["predictor"]
        low, high = found["interval"]
        said = f"{found['rank_correlation']:.2f} [{low:.2f}, {high:.2f}], {found['name']}"
        rows.append({"what": "held-out rank correlation", "value": said})
    if "q_star" in report:
        best = report["q_star"]
        rows.append({"what": "q*", "value": f"{100 * best['q']:.3g} %, with {100 * best['gain']:.3g} % of the scores"})
        rows.append({"what": "gain per cost over all of the data, unscored", "value": best["ratio"]})
        rows.append({"what": "exponent of the data, delta", "value": best["delta"]})
        rows.append({"what": "cost of scoring over training, an example", "value": best["scoring_cost"]})
    rows.append({"what": "seconds", "value": report["cost"]["seconds"]})
    if report["cost"]["flops"]:
        rows.append({"what": "FLOPs", "value": float(report["cost"]["flops"])})
        rows.append({"what": "share of measuring all", "value": report["cost"]["share_of_measuring_all"]})
    return rows
