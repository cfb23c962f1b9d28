"""Verbs that place adapters: `targets` by a blueprint, `plan` for a card or a budget, `export` for servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import blueprint as records
from .. import measure, place, publish
from ..errors import PlacementError
from ..place import PlacementOptions
from .output import Output
from .verbs import Only, Picture, Source, verb


if TYPE_CHECKING:
    from ..place import Placement


Trainer = Annotated[
    Literal["peft", "trl", "axolotl", "llamafactory", "unsloth"] | None,
    typer.Option("--for", help="Print the configuration of that trainer, to be pasted."),
]


@verb(
    "Place",
    examples=[
        "peft-blueprint targets blueprint.json",
        "peft-blueprint targets blueprint.json --fraction 0.2 --format quiet",
        "peft-blueprint targets blueprint.json --fraction k_star",
        "peft-blueprint targets blueprint.json --for llamafactory --rank 8",
    ],
)
def targets(
    source: Source,
    options: PlacementOptions,
    output: Output,
    trainer: Trainer = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="LoRA's alpha with --for; twice the rank.")] = None,
    picture: Picture = None,
) -> None:
    """Print where adapters go: names for `target_modules` of any LoRA trainer (and `target_parameters`)."""
    if alpha is not None and trainer is None:
        raise PlacementError("--alpha is part of a trainer's configuration: choose one, for example --for peft.")
    blueprint = records.Blueprint.from_pretrained(source)
    placement = place.plan_placement(blueprint, options=options)
    if picture:
        publish.save_plot(publish.plot_blueprint(blueprint, placement), picture)
    if trainer is not None:
        _print_config(placement, trainer, alpha, output)
        return
    chosen = [
        {
            "id": name,
            "as": "adapter on a parameter" if name in placement.target_parameters else "adapter",
            **_facts(placement, name),
        }
        for name in placement.lora
    ]
    chosen += [{"id": name, "as": "unfrozen"} for name in placement.unfreeze]
    bare = [*placement.lora, *placement.unfreeze]
    output.answer(placement.to_dict(), chosen, bare, f"{placement.model_id}: {placement.summary()}")
    for note in placement.notes:
        output.hint(note)


@verb(
    "Place",
    examples=[
        "peft-blueprint plan org/model --vram 12GiB",
        "peft-blueprint plan org/model --blueprint org/model --budget 0.7x --for axolotl",
        "peft-blueprint plan org/model --mode unfreeze --fraction 0.2 --master-weights",
    ],
)
def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    options: Annotated[
        PlacementOptions,
        Only(
            *("mode", "fraction", "num_modules", "budget", "keep", "best", "overhead"),
            *("r", "ranks", "rank_by", "coverage"),
        ),
    ],
    output: Output,
    blueprint: Annotated[
        str | None,
        typer.Option(help="File, folder or Hub id of its blueprint; without one, adapters are spread evenly."),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 12GiB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Part of it for the CUDA context and what the allocator cannot use.")
    ] = "1GiB",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in an example.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Data type of unquantised weights and of activations.")] = "bfloat16",
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8 or none; by default none and nf4 are tried.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing; by default both are tried."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit or sgd.")
    ] = "adamw",
    master_weights: Annotated[
        bool,
        typer.Option("--master-weights", help="Mixed precision: a float32 copy and states of trained 2-byte weights."),
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu: their time constants differ.")] = "cuda",
    flops_per_byte: Annotated[
        float | None, typer.Option(help="Time constant that `python -m benchmarks cost` measured on that device.")
    ] = None,
    trainer: Trainer = None,
    picture: Picture = None,
) -> None:
    """Show what fits a GPU or a budget: a placement for each quantisation and checkpointing, and the one to take."""
    if picture is not None and blueprint is None:
        raise PlacementError("--picture draws a blueprint: give one with --blueprint.")
    limits = _limits(vram, reserve, options.budget)
    record = None if blueprint is None else records.Blueprint.from_pretrained(blueprint)
    workload = place.Workload(
        batch_size=batch_size,
        length=length,
        dtype=dtype,
        optimizer=optimizer,
        master_weights=master_weights,
        device=device,
        flops_per_byte=flops_per_byte,
        rank=options.r or 16,
    )
    settings = place.plan_settings(
        record,
        measure.empty_model(model),
        replace(options, budget=limits or None),
        workload=workload,
        quantizations=None if quantization is None else (None if quantization == "none" else quantization,),
        checkpointings=(False, True) if checkpointing is None else (checkpointing,),
    )
    placement = place.recommend_setting(settings).placement
    assert placement is not None
    if picture is not None and record is not None:
        publish.save_plot(publish.plot_blueprint(record, placement), picture)
    if trainer is not None:
        _print_config(placement, trainer, None, output)
        return
    rows = [_row(setting, setting.placement is placement, dtype) for setting in settings]
    data = {"model": model, "settings": [setting.to_dict() for setting in settings], "placement": placement.to_dict()}
    limit = f" within {place.Budget.of(limits)}" if limits else ""
    title = f"{model}: LoRA against rank {workload.rank} on every linear layer, {batch_size} x {length} tokens a step{limit}"
    output.answer(data, rows, [*placement.lora, *placement.unfreeze], title)
    if output.format == "table":
        print(placement)
    output.hint(
        "All figures are predicted; step times, and gain over step time, are relative to LoRA on every linear layer in "
        "the first setting. With "
        "checkpointing, use peft_blueprint.train.CheckpointAbove: otherwise the backward pass runs to the bottom."
    )


@verb("Place", examples=["peft-blueprint export adapter served"])
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    output: Output,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of every target; by default the adapter's largest.")
    ] = None,
) -> None:
    """Write a LoRA adapter with one rank everywhere, for servers that ignore rank patterns (vLLM, llama.cpp)."""
    written = str(publish.export_uniform_lora(adapter, out, rank=rank))
    output.answer({"written": written}, [{"written": written}], [written], f"{adapter} with one rank")


def _print_config(placement: Placement, trainer: Any, alpha: int | None, output: Output) -> None:
    text = place.trainer_config(placement, trainer, lora_alpha=alpha)
    if output.format == "json":
        output.answer({"trainer": trainer, "config": text}, [], [], "")
    else:
        print(text, end="")


def _facts(placement: Placement, name: str) -> dict[str, Any]:
    known = placement.details.get(name, {})
    return {
        "kind": known.get("kind"),
        "layer": known.get("depth"),
        placement.rank_by: known.get("score"),
        "rank": placement.ranks.get(name, placement.rank or place.DEFAULT_RANK),
        **({"k* rank": known["k_star_rank"]} if "k_star_rank" in known else {}),
    }


def _row(setting: Any, is_recommended: bool, dtype: str) -> dict[str, Any]:
    placement = setting.placement
    fitting = (
        {"fits": "nothing"}
        if placement is None
        else {
            "fits": f"{len(placement.lora)} adapters" if placement.lora else f"{len(placement.unfreeze)} blocks",
            **{
                f"of {name}": f"{100 * share:.3g} %" for name, share in placement.shares.items() if name != "trainable"
            },
            "memory": place.format_cost("memory", placement.cost["memory"]),
            "lowest layer": placement.cost.get("lowest"),
            "step time": round(setting.time or 0.0, 3),
            "gain retained": f"{placement.gain_retained:.0%}" if placement.is_gain_measured else "not measured",
            "gain per cost": (
                round(placement.gain_retained / setting.time, 3) if placement.is_gain_measured else "not measured"
            ),
        }
    )
    return {
        "": "recommended" if is_recommended else "",
        "weights": setting.quantization or dtype,
        "checkpointing": "yes" if setting.checkpointing else "no",
        "all-linear": place.format_cost("memory", setting.all_linear),
        **fitting,
    }


def _limits(vram: str | None, reserve: str, budget: Any) -> dict[str, float]:
    limits: dict[str, float] = {} if budget is None else place.Budget.of(budget).limits
    if vram is None:
        return limits
    if "memory" in limits:
        raise PlacementError(f"--vram {vram} and --budget {budget} both limit the memory: give one of them.")
    card, kept = place.Budget.of({"memory": vram}).memory or 0, place.Budget.of({"memory": reserve}).memory or 0
    if kept >= card:
        raise PlacementError(f"--reserve {reserve} leaves nothing of --vram {vram}: reserve less.")
    return {**limits, "memory": card - kept}
