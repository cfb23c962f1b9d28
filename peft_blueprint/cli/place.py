"""The verbs that place: where adapters go, in whose words, and what is made of an adapter for servers.

Knows nothing of how things are measured or trained; torch is waited for only by verbs that read tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..blueprint import Blueprint
from ..errors import PlacementError
from ..place import Coverage, Placement, Trainer, trainer_config
from .output import AsJson, Quiet, Source, print_answer


if TYPE_CHECKING:
    from ..place import Mode, RankBy, Ranks


def targets(
    source: Source,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the submodules; by default what keeps 0.95 of the gain.")
    ] = None,
    num_modules: Annotated[int | None, typer.Option(help="How many submodules.")] = None,
    top_p: Annotated[float | None, typer.Option(help="The fewest that hold this share of the score.")] = None,
    threshold: Annotated[float | None, typer.Option(help="All whose score reaches this.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="'0.7x' of all-linear's step time, '2M parameters', '42 modules', or several.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the predicted gain to keep at the least cost.")] = None,
    rank_by: Annotated[str | None, typer.Option(help="By default cover_gain where it can be told.")] = None,
    ranks: Annotated[
        str | None, typer.Option(help="uniform, equal_parameters (with all-linear's), or influence.")
    ] = None,
    coverage: Annotated[Coverage, typer.Option(help="What to spread the choice over.")] = "kind+depth",
    mode: Annotated[str, typer.Option(help="lora, unfreeze (whole blocks) or lora+unfreeze.")] = "lora",
    trainer: Annotated[
        Trainer | None, typer.Option("--for", help="Print that trainer's own configuration, to be pasted.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA's rank: with --for, --budget or --ranks.")] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="LoRA's alpha, with --for; twice the rank.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: .png, .svg or .pdf (needs matplotlib).")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print where adapters would go: names for `target_modules` of any LoRA trainer (and `target_parameters`)."""
    if trainer is None and (alpha is not None or (rank is not None and budget is None and ranks is None)):
        raise PlacementError(
            "--rank and --alpha stand in a trainer's configuration: say which one, as --for peft; --rank also with "
            "--budget or --ranks influence."
        )
    from ..place import plan_placement  # which waits for torch

    blueprint = Blueprint.from_pretrained(source)
    placement = plan_placement(
        blueprint,
        mode=cast("Mode", mode),
        fraction=fraction,
        num_modules=num_modules,
        top_p=top_p,
        threshold=threshold,
        budget=budget,
        keep=keep,
        rank=rank,
        ranks=cast("Ranks | None", ranks),
        rank_by=cast("RankBy | None", rank_by),
        coverage=coverage,
    )
    if picture:
        from ..publish import plot_blueprint, save_plot

        save_plot(plot_blueprint(blueprint, placement), picture)
    if trainer is not None:
        text = trainer_config(placement, trainer, r=rank, lora_alpha=alpha)
        if as_json:
            print_answer({"trainer": trainer, "config": text}, [], True, quiet, [], "")
        else:
            print(text, end="")
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
    title = (
        f"{len(placement.lora)} adapters and {len(placement.unfreeze)} unfrozen modules of {placement.candidates} "
        f"by {placement.rank_by}, spread over {placement.coverage}"
    )
    print_answer(placement.to_dict(), chosen, as_json, quiet, [*placement.lora, *placement.unfreeze], title)


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of all; by default the adapter's largest.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a LoRA adapter with one rank for all, for servers that ignore rank patterns (vLLM, llama.cpp)."""
    from ..publish import export_uniform_lora

    written = str(export_uniform_lora(adapter, out, rank=rank))
    print_answer({"written": written}, [{"written": written}], as_json, quiet, [written], f"{adapter} with one rank")


def _facts(placement: Placement, name: str) -> dict[str, Any]:
    known = placement.facts.get(name, {})
    return {
        "kind": known.get("kind"),
        "layer": known.get("depth"),
        placement.rank_by: known.get("score"),
        **({"rank": placement.ranks[name]} if name in placement.ranks else {}),
        **({"k* rank": known["k_star_rank"]} if "k_star_rank" in known else {}),
    }


VERBS: tuple[Callable[..., None], ...] = (targets, export)
