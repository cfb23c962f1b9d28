"""Verbs that place adapters: `targets` by a blueprint, `plan` for a card or a budget, `export` for servers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import compare as comparing
from .. import data as reading
from .. import measure, place, publish
from .._files import require_writable
from ..compare import ProbeOptions
from ..errors import PlacementError
from ..measure import LoadOptions
from ..place import PlacementOptions
from .output import Output, say
from .verbs import NF4, Columns, Dtype, In4Bit, Only, Picture, Source, Split, parse_pairs, verb


if TYPE_CHECKING:
    from torch import nn

    from ..blueprint import Blueprint
    from ..place import Placement


Trainer = Annotated[
    Literal["peft", "trl", "axolotl", "llamafactory", "unsloth", "swift"] | None,
    typer.Option("--for", help="Print the placement as a configuration of this trainer."),
]


@verb(
    "Place",
    examples=[
        "peft-blueprint targets blueprint.json",
        "peft-blueprint targets blueprint.json --fraction 0.2 --format quiet",
        "peft-blueprint targets blueprint.json --fraction k_star",
        "peft-blueprint targets blueprint.json --for llamafactory --rank 8",
        "peft-blueprint targets blueprint.json --probe train.jsonl --drift-policy refresh --out blended.json",
    ],
)
def targets(
    source: Source,
    options: PlacementOptions,
    probing: ProbeOptions,
    loading: LoadOptions,
    output: Output,
    probe: Annotated[
        str | None,
        typer.Option(help="Local examples to probe the model on: a file such as train.jsonl, or a Hub data set."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the model to probe; by default the blueprint's. Without --probe only its config is "
            "read, for a blueprint of groups or layers."
        ),
    ] = None,
    columns: Columns = "",
    split: Split = "train",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a probed example; longer ones are cut.")] = 512,
    dtype: Dtype = "auto",
    load_in_4bit: In4Bit = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the blueprint that the placement uses, with the domain and the probe applied."),
    ] = None,
    trainer: Trainer = None,
    alpha: Annotated[
        int | None,
        typer.Option(min=1, help="LoRA's alpha at --rank, with --for; every adapter keeps alpha / r. Default: 2 r."),
    ] = None,
    picture: Picture = None,
) -> None:
    """Print where adapters go: names for `target_modules` of any LoRA trainer (and `target_parameters`)."""
    if alpha is not None and trainer is None:
        raise PlacementError("--alpha is part of a trainer's configuration: choose one, for example --for peft.")
    if probe is None and probing != ProbeOptions(domain=probing.domain):
        raise PlacementError("--blend-weight, --drift-policy and the like need local examples: give --probe.")
    if out is not None:
        require_writable(out if out.is_dir() else out.parent)
    blueprint = comparing.read_for_domain(source, probing.domain)
    loaded: nn.Module | None = None
    if probe is not None:
        quantization = NF4 if load_in_4bit else None
        loaded, tokenizer = measure.load_model(model or blueprint.model_id, dtype, quantization, loading)
        examples = reading.read_examples(probe, parse_pairs(columns), split=split, limit=probing.probe_examples)
        rows = measure.encode(examples, tokenizer, max_length)
        batches = measure.make_batches(rows, 8, measure.get_pad_token_id(tokenizer))
        blueprint = _probed(blueprint, loaded, batches, probing, options.seed, probe, output)
    elif model is not None:
        loaded = measure.empty_model(model, revision=loading.revision)
    placement = place.plan_placement(blueprint, loaded, options=options)
    if out is not None:
        say(f"Written to {blueprint.save(out)}.")
    if picture:
        publish.save_plot(publish.plot_blueprint(blueprint, placement), picture)
    if trainer is not None:
        _print_config(placement, trainer, alpha, options.r or place.DEFAULT_RANK, output)
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
    if not placement.unfreeze and trainer is None:
        rate = _learning_rate(placement, 1.0, options.r)
        output.hint(f"Learning rate at the same alpha / r: {rate.reason}.")


@verb(
    "Place",
    examples=[
        "peft-blueprint plan org/model --vram 12GiB",
        "peft-blueprint plan org/model --blueprint org/model --budget 0.7x --for axolotl",
        "peft-blueprint plan org/model --mode unfreeze --fraction 0.2 --master-weights",
        "peft-blueprint plan org/model --blueprint org/model --delta 0.4 --scoring-cost 0.1",
        "peft-blueprint plan org/model --length 400 --prompt 336 --epochs 3",
    ],
)
def plan(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model; only its config is read.")],
    options: Annotated[
        PlacementOptions,
        Only(
            *("mode", "fraction", "num_modules", "budget", "keep", "best", "overhead"),
            *("r", "ranks", "rank_by", "coverage", "fused"),
        ),
    ],
    output: Output,
    probing: Annotated[ProbeOptions, Only("domain")],
    blueprint: Annotated[
        str | None,
        typer.Option(help="File, folder or Hub id of its blueprint; without one, adapters are spread evenly."),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 12GiB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Part of it to reserve for the CUDA context and fragmentation.")
    ] = "1GiB",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in an example; with --data at most.")] = 1024,
    prompt: Annotated[
        int, typer.Option(min=0, help="Of these, tokens before the first target: answer-only adapters are priced.")
    ] = 0,
    data: Annotated[
        str | None, typer.Option(help="Training examples, to take the length and the share of prompt tokens from.")
    ] = None,
    columns: Columns = "",
    split: Split = "train",
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data, with the frozen prefix cached from the second on.")
    ] = 1,
    base_learning_rate: Annotated[
        float | None, typer.Option(help="Rate that suits LoRA on every linear layer; the placement's is predicted.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Data type of unquantized weights and of activations.")] = "bfloat16",
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
    delta: Annotated[
        float | None,
        typer.Option(
            help="Exponent of the data's gain q^delta, which `select-data --fraction q_star` prints: also choose the share q "
            "of the data, and the placement for it."
        ),
    ] = None,
    scoring_cost: Annotated[
        float | None,
        typer.Option(
            help="Cost of scoring an example over that of training on it once; by default of its exact norms."
        ),
    ] = None,
    trainer: Trainer = None,
    picture: Picture = None,
) -> None:
    """Show what fits a GPU or a budget: a placement for each quantization and checkpointing, and the one to take."""
    if picture is not None and blueprint is None:
        raise PlacementError("--picture draws a blueprint: give one with --blueprint.")
    if probing.domain is not None and blueprint is None:
        raise PlacementError("--domain chooses among the domains of a blueprint: give one with --blueprint.")
    limits = _limits(vram, reserve, options.budget)
    record = None if blueprint is None else comparing.read_for_domain(blueprint, probing.domain)
    about = ""
    if data is not None:
        if prompt:
            raise PlacementError(
                f"--prompt {prompt} and --data {data} both set the prompt's length: give one of them."
            )
        length, prompt, about = _prompt_share(model, data, columns, split, length)
    workload = place.Workload(
        batch_size=batch_size,
        length=length,
        prompt=prompt,
        epochs=epochs,
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
    chosen = place.recommend_setting(settings)
    load = replace(
        workload, quantization=chosen.quantization, checkpointing=chosen.checkpointing, input_gradients=False
    )
    joint: place.JointPlan | None = None
    if delta is not None:
        joint = place.plan_jointly(
            record,
            measure.empty_model(model),
            replace(options, budget=limits or None),
            data=delta,
            scoring_cost=scoring_cost,
            workload=load,
        )
    elif scoring_cost is not None:
        raise PlacementError(f"--scoring-cost {scoring_cost:g} needs --delta, the exponent of the data's gain.")
    placement = chosen.placement if joint is None else joint.placement
    assert placement is not None
    if picture is not None and record is not None:
        publish.save_plot(publish.plot_blueprint(record, placement), picture)
    if trainer is not None:
        _print_config(placement, trainer, None, workload.rank, output)
        return
    rows = [_row(setting, setting is chosen, dtype) for setting in settings]
    variants = place.step_variants(place.Structure.of(measure.empty_model(model)), load, placement)
    rate = None if base_learning_rate is None else _learning_rate(placement, base_learning_rate)
    found = {
        "model": model,
        "settings": [setting.to_dict() for setting in settings],
        "placement": placement.to_dict(),
        "variants": [variant.to_dict() for variant in variants],
        "prompt_share": prompt / length,
        **({} if rate is None else {"learning_rate": rate.to_dict()}),
        **({} if joint is None else {"joint": joint.to_dict()}),
    }
    limit = f" within {place.Budget.of(limits)}" if limits else ""
    title = f"{model}: LoRA against rank {workload.rank} on every linear layer, {batch_size} x {length} tokens a step{limit}"
    output.answer(found, rows, [*placement.lora, *placement.unfreeze], title)
    if output.format == "table":
        print(placement)
        if prompt or epochs > 1:
            about = about or f"{prompt / length:.0%} of the tokens are prompt."
            title = f"\n{about} Predicted by the parts of a step that are computed:"
            output.answer({}, [_variant_row(variant) for variant in variants], [], title)
        if rate is not None:
            print(f"Learning rate: {rate}.")
        if joint is not None:
            print(f"Jointly with the data: {joint}")
    output.hint(
        "All figures are predicted; step times, and gain over step time, are relative to LoRA on every linear layer in "
        "the first setting. With "
        "checkpointing, use peft_blueprint.train.CheckpointAbove: otherwise the backward pass runs to the bottom."
    )


def _prompt_share(model: str, data: str, columns: str, split: str, longest: int) -> tuple[int, int, str]:
    """Return the longest example's tokens, the prompt's share of it, and a sentence about the data."""
    tokenizer = measure.load_tokenizer(model)
    rows = measure.encode(reading.read_examples(data, parse_pairs(columns), split=split), tokenizer, longest)
    length = max(len(row["input_ids"]) for row in rows)
    tokens = sum(len(row["labels"]) for row in rows)
    targets = sum(label != measure.IGNORED for row in rows for label in row["labels"])
    share = 1 - targets / tokens
    about = f"{data}: {len(rows)} examples of at most {length} tokens; {share:.0%} of the tokens are prompt."
    return length, min(round(share * length), length - 1), about


def _learning_rate(placement: Placement, base: float, rank: int | None = None) -> place.LearningRate:
    rule: Literal["ranks", "adam_gain"] = "ranks" if placement.learning_rate_scale is None else "adam_gain"
    return place.learning_rate_for(placement, base=base, rank=rank or place.DEFAULT_RANK, rule=rule)


def _variant_row(variant: place.Variant) -> dict[str, Any]:
    return {
        "adapters": variant.adapters,
        "computed": variant.name,
        "step time": f"{variant.time:.2f}",
        "memory": "" if variant.memory is None else place.format_cost("memory", variant.memory),
        "cache": place.format_cost("memory", variant.cache) + " an example" if variant.cache else "",
    }


@verb("Place", examples=["peft-blueprint export adapter served", "peft-blueprint export adapter served --for vllm"])
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    output: Output,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of every target; by default the adapter's largest.")
    ] = None,
    server: Annotated[
        Literal["vllm", "sglang", "tgi", "lorax", "llama.cpp", "ollama"] | None,
        typer.Option("--for", help="Add the zeros that this server needs, and print the commands that start it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of the base model, whose config is read for --for; by default the adapter's."
        ),
    ] = None,
) -> None:
    """Write a LoRA adapter with one rank everywhere, for servers that ignore rank patterns."""
    if server is None:
        if model is not None:
            raise PlacementError(f"--model {model} is for the zeros that a server needs: choose one with --for.")
        written = str(publish.export_uniform_lora(adapter, out, rank=rank))
        output.answer({"written": written}, [{"written": written}], [written], f"{adapter} with one rank")
        return
    served = publish.export_for_server(adapter, out, server, model=model, rank=rank)
    path = str(served.path)
    rows = [{"written": path, "rank": served.rank, "modules of zeros": len(served.added)}]
    output.answer(served.to_dict(), rows, [path], f"{adapter} for {server}")
    if output.format == "table":
        print("\n".join(served.commands))
    for note in served.notes:
        output.hint(note)


def _probed(
    published: Blueprint, model: nn.Module, batches: Any, probing: ProbeOptions, seed: int, data: str, output: Output
) -> Blueprint:
    """Return the blend of a published blueprint with a probe on local data, and say how well the two agree."""
    found = place.probe_blueprint(
        model,
        batches,
        published,
        comparing.probe_options(probing, domain=None),
        seed=seed,
        data=data,
        progress=output.progress,
    )
    if found.drift is not None:
        low, high = found.drift.interval
        say(
            f"Rank correlation of the probe with the blueprint: {found.drift.correlation:.3f} [{low:.3f}, {high:.3f}], "
            f"{'below' if found.drift.drifted else 'not below'} {found.drift.threshold:g}."
        )
    return found.blueprint


def _print_config(placement: Placement, trainer: Any, alpha: int | None, rank: int, output: Output) -> None:
    """Print a trainer's configuration, in which every adapter has the scaling alpha / rank."""
    own = None if alpha is None else alpha * (placement.rank or rank) / rank
    text = place.trainer_config(placement, trainer, lora_alpha=own)
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
