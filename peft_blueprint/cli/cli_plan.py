"""The verb `plan`: what a placement on a model would cost and keep, before any weight is downloaded.

Reads a model's config and, if there is one, a blueprint. Knows nothing of how costs are predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..blueprint import Blueprint
from ..errors import PlacementError
from ..place import Budget, Coverage, Trainer, shown, trainer_config
from .output import AsJson, Quiet, print_answer, say


def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    blueprint: Annotated[
        str | None, typer.Option(help="File, folder or repository id of its blueprint; without, placed evenly.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of the card, such as 12GiB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Of it for the CUDA context and what the allocator cannot use.")
    ] = "1GiB",
    budget: Annotated[
        str | None, typer.Option(help="'0.7x' of all-linear's step time, '2M parameters', '42 modules', or several.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the predicted gain to keep at the least cost.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of an example.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of unquantised weights and activations.")] = "bfloat16",
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4, int8 or none; by default none and nf4 are tried.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="By default both are tried.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit or sgd.")
    ] = "adamw",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA on every linear layer.")] = 16,
    ranks: Annotated[
        str, typer.Option(help="equal_parameters with that, uniform, or influence: higher where the score is.")
    ] = "equal_parameters",
    rank_by: Annotated[str | None, typer.Option(help="By default cover_gain where it can be told.")] = None,
    coverage: Annotated[Coverage, typer.Option(help="What to spread the choice over.")] = "kind+depth",
    device: Annotated[str, typer.Option(help="cuda or cpu: their constants of time differ.")] = "cuda",
    trainer: Annotated[
        Trainer | None, typer.Option("--for", help="Print that trainer's own configuration, to be pasted.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: .png, .svg or .pdf (needs matplotlib).")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what fits a card or a budget: for each quantisation and checkpointing a placement, and the one to take."""
    from ..measure import empty_model
    from ..place import Workload, recommended, what_fits

    limits = _limits(vram, reserve, budget)
    if picture is not None and blueprint is None:
        raise PlacementError("--picture draws a blueprint: give one with --blueprint.")
    record = None if blueprint is None else Blueprint.from_pretrained(blueprint)
    settings = what_fits(
        record,
        empty_model(model),
        limits or None,  # type: ignore[arg-type]
        Workload(batch_size=batch_size, length=length, dtype=dtype, optimizer=optimizer, device=device, rank=rank),
        quantizations=(None, "nf4") if quantization is None else (None if quantization == "none" else quantization,),
        checkpointings=(False, True) if checkpointing is None else (checkpointing,),
        keep=keep,
        rank=rank,
        ranks=ranks,
        rank_by=rank_by,
        coverage=coverage,
    )
    taken = recommended(settings)
    placement = taken.placement
    assert placement is not None
    if picture is not None:
        from ..publish import plot_blueprint, save_plot

        assert record is not None
        save_plot(plot_blueprint(record, placement), picture)
    if trainer is not None:
        print(trainer_config(placement, trainer), end="")
        return
    rows = [
        {
            "": "take this" if setting is taken else "",
            "weights": setting.quantization or dtype,
            "checkpointing": "yes" if setting.checkpointing else "no",
            "all-linear": shown("memory", setting.all_linear),
            **(
                {"fits": "nothing"}
                if setting.placement is None
                else {
                    "fits": f"{len(setting.placement.lora)} adapters",
                    "memory": shown("memory", setting.placement.cost["memory"]),
                    "lowest layer": setting.placement.cost.get("lowest"),
                    "step time": round(setting.time or 0.0, 3),
                    "gain kept": f"{setting.placement.kept:.0%}",
                }
            ),
        }
        for setting in settings
    ]
    data = {"model": model, "settings": [setting.to_dict() for setting in settings], "placement": placement.to_dict()}
    limit = f" within {Budget.of(limits)}" if limits else ""
    title = f"{model}: LoRA against rank {rank} on every linear layer, {batch_size} x {length} tokens a step{limit}"
    print_answer(data, rows, as_json, quiet, placement.lora, title)
    if not (as_json or quiet):
        print(placement)
        say(
            "All of it is predicted, step times as shares of LoRA on every linear layer in the first setting. With "
            "checkpointing, use peft_blueprint.train.CheckpointAbove, or the backward pass runs to the bottom."
        )


def _limits(vram: str | None, reserve: str, budget: str | None) -> dict[str, float]:
    limits: dict[str, float] = {} if budget is None else Budget.of(budget).limits
    if vram is not None:
        if "memory" in limits:
            raise PlacementError(f"--vram {vram} and --budget {budget} both limit the memory: give one of them.")
        card, kept = Budget.of({"memory": vram}).memory or 0, Budget.of({"memory": reserve}).memory or 0
        if kept >= card:
            raise PlacementError(f"--reserve {reserve} leaves nothing of --vram {vram}. Give a smaller one.")
        limits["memory"] = card - kept
    return limits


VERBS = (plan,)
