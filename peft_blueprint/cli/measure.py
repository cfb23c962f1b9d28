"""Verbs that measure: `generate` a blueprint of a model on data, `show` one, `coarsen` it to groups or layers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import blueprint as records
from .. import compare as comparing
from .. import data as reading
from .. import measure, publish
from .._files import require_writable
from ..errors import BlueprintError
from ..measure import GenerateOptions, LoadOptions
from .output import TOP, Output, ranked
from .verbs import NF4, Columns, Dtype, In4Bit, Model, Picture, Source, Split, Without, parse_pairs, verb


@verb(
    "Measure",
    examples=[
        "peft-blueprint generate org/model --data train.jsonl --columns prompt=question,completion=answer",
        "peft-blueprint generate org/model --data math=train.jsonl --data law=other.jsonl --device cpu --out domains.json",
    ],
)
def generate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(
            help="Examples: a file such as train.jsonl, or a Hub data set (ID or ID:CONFIG); NAME=FILE for several domains."
        ),
    ],
    options: Annotated[GenerateOptions, Without("data", "command")],
    loading: LoadOptions,
    output: Output,
    out: Annotated[Path, typer.Option(help="Where to write: .json, .csv, .safetensors or a folder.")] = Path(
        "blueprint.json"
    ),
    columns: Columns = "",
    split: Split = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example; longer ones are cut.")] = 512,
    dtype: Dtype = "auto",
    load_in_4bit: In4Bit = False,
    noise: Annotated[
        float, typer.Option(min=0, help="Add Gaussian noise, as a share of a kind's mean norm; not a guarantee.")
    ] = 0.0,
    dp_epsilon: Annotated[float | None, typer.Option(help="Publish with differential privacy, such as 4.")] = None,
    dp_delta: Annotated[float | None, typer.Option(help="Its delta, far below 1 / number of examples.")] = None,
    dp_clip: Annotated[
        float | None, typer.Option(help="Bound on an example's norm, from other data; by default all count alike.")
    ] = None,
) -> None:
    """Measure a blueprint of a model on data. Under torchrun or accelerate launch, every process takes its share."""
    privacy = _privacy(noise, dp_epsilon, dp_delta, dp_clip)
    domains = _domains(data)
    require_writable(out if out.is_dir() else out.parent)
    rank, processes = measure.join_processes()
    names = parse_pairs(columns)
    examples = {
        name: reading.read_examples(source, names, split=split, limit=options.max_examples)[rank::processes]
        for name, source in domains.items()
    }
    loaded, tokenizer = measure.load_model(model, dtype, NF4 if load_in_4bit else None, loading)
    pad = measure.get_pad_token_id(tokenizer)
    batches = {
        name: measure.make_batches(measure.encode(rows, tokenizer, max_length), batch_size, pad)
        for name, rows in examples.items()
    }
    options = replace(
        options,
        model_id=options.model_id or model,
        model_revision=options.model_revision or loading.revision,
        data=", ".join(data),
        command=shlex.join(["peft-blueprint", *sys.argv[1:]]),
    )
    blueprint = measure.generate_blueprint(
        loaded,
        batches if "" not in batches else batches[""],
        options,
        privacy=privacy,
        progress=output.progress,
    )
    if rank:
        return
    written = blueprint.save(out)
    output.blueprint(blueprint, "gradient_norm", 10, bare=[str(written)])
    output.hint(f"Written to {written}. Next: peft-blueprint targets {written}")


@verb(
    "Measure",
    examples=[
        "peft-blueprint show blueprint.json",
        "peft-blueprint show org/model --by adam_gain --top 5",
        "peft-blueprint show domains.json --domain math=1,law=3",
    ],
)
def show(
    source: Source,
    output: Output,
    by: Annotated[
        str, typer.Option(help="Statistic to sort by: gradient_norm, gamma, k_star, domain_tags.bio, …")
    ] = "gradient_norm",
    top: Annotated[
        int | None, typer.Option(min=0, help="Number of entries, 0 for all; by default 20, or experts by layer.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Show another of its domains, or a mixture such as math=1,law=3.")
    ] = None,
    picture: Picture = None,
) -> None:
    """Show a blueprint: its model, how concentrated the gradient is, and its strongest submodules."""
    blueprint = comparing.read_for_domain(source, domain)
    if picture:
        has_experts = any(records.split_expert(entry.name) for entry in blueprint)
        draw = publish.plot_experts if has_experts else publish.plot_blueprint
        publish.save_plot(draw(blueprint, by=by), picture)
    output.blueprint(
        blueprint,
        by,
        top,
        bare=[entry.name for entry in ranked(blueprint, by)[: (TOP if top is None else top) or None]],
    )


@verb(
    "Measure",
    examples=[
        "peft-blueprint coarsen blueprint.json",
        "peft-blueprint coarsen org/model --level layer --out layers.json",
    ],
)
def coarsen(
    source: Source,
    output: Output,
    level: Annotated[
        Literal["group", "layer"],
        typer.Option(help="group for attention, cross-attention and feed-forward blocks; layer for whole layers."),
    ] = "group",
    out: Annotated[
        Path | None, typer.Option(help="Also write it to this file: .json, .csv, .safetensors or a folder.")
    ] = None,
) -> None:
    """Sum a blueprint up to attention and feed-forward blocks, the form of the paper's example, or to layers."""
    blueprint = records.Blueprint.from_pretrained(source).coarsen(level)
    bare = [str(blueprint.save(out))] if out is not None else list(blueprint.names)
    output.blueprint(blueprint, "gradient_norm", 20, bare=bare)
    if out is not None:
        output.hint(f"Written to {bare[0]}. Next: peft-blueprint targets {bare[0]} --model {blueprint.model_id}")


def _privacy(noise: float, epsilon: float | None, delta: float | None, clip: float | None) -> Any:
    if not noise and (epsilon, delta, clip) == (None, None, None):
        return None
    return measure.Privacy(noise, epsilon, delta, clip)


def _domains(data: Sequence[str]) -> dict[str, str]:
    named = {
        name if found else "": source if found else item
        for item in data
        for name, found, source in [item.partition("=")]
    }
    if len(named) != len(data) or (len(data) > 1 and "" in named):
        raise BlueprintError(f"--data {' --data '.join(data)}: name every domain once, for example --data bio=FILE.")
    return named
