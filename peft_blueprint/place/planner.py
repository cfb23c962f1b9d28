"""From a blueprint, a model's costs and a wish to a `Placement`.

The wish is a selector (a share, a number), a budget (bytes, step time, parameters), or a share of the gain to keep at
the least cost. Of the model only names and shapes are asked; it may be on the meta device. Knows nothing of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

from .._text import format_names
from ..blueprint import ADAPTABLE, Blueprint, Submodule
from ..errors import PlacementError
from .budget import Budget
from .choosing import Choosing, Wish
from .cost import DTYPES, CostModel, Structure, Workload
from .options import Coverage, Mode, RankBy, Ranks
from .placement import Placement
from .search import Choice


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def plan_placement(
    blueprint: Blueprint | None,
    model: nn.Module | PretrainedConfig | None = None,
    *,
    budget: Budget | str | Mapping[str, Any] | None = None,
    keep: float | None = None,
    mode: Mode = "lora",
    fraction: float | None = None,
    num_modules: int | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    rank_by: RankBy | None = None,
    per_cost: bool = False,
    coverage: Coverage = "kind+depth",
    unfreeze_blocks: int | None = None,
    rank: int | None = None,
    ranks: Ranks | None = None,
    workload: Workload | None = None,
    seed: int = 0,
) -> Placement:
    """Choose submodules by a blueprint: cover first, rank second (line 3 of Algorithm 1 with coverage="none").

    Sorting all submodules by gradient norm crowds the adapters into few kinds and layers, which loses to an even
    spread of as many. So the choice covers the model: by default each adapter is put where it adds most to what those
    before it cover in depth and kind, weighted by Adam's gain (`redundancy.CoverGain`). By any other score the choice
    is first spread over kinds of submodule and strata of depth, and the strongest is taken within each; when fewer than
    two per kind are asked for, only depth is covered.

    Under a budget, or with `keep`, the depth at which the backward pass stops is chosen too: nothing is placed below
    it, so that neither time nor memory is spent there.

    Only what an adapter can be put on is chosen, linear layers and fused experts; other entries, of a blueprint that
    was measured with `include="all"`, are left out and counted. Give at most one of the four selectors, or a budget or
    `keep` or both. Without any it is a seventh of the submodules, about one to a block, where their adapters cover the model
    with all-linear's parameters, which is the default wherever Adam's gain is known; else `keep=0.95`; and where no costs
    are known, for whole blocks and with another coverage `fraction=0.2`.

    Args:
        blueprint: at submodule level, or at any level with `model`; None, with a model, to place evenly without any
            measurement.
        model: checked against the blueprint, used to expand groups or layers to its submodules, and for what a
            placement costs. It may be on the meta device; a transformers config will do too. Without it costs come from
            the blueprint's shapes, which tell time and parameters, not memory.
        budget: what may be spent, see `Budget.of`: "12GiB" at the peak of a step, "0.7x" of all-linear LoRA's step
            time, "2M parameters", "42 modules", several with commas, or a mapping. Of what fits, the choice with the
            largest predicted gain.
        keep: share of all-linear LoRA's predicted gain to keep, in (0, 1], at the least step time.
        mode: "lora", "unfreeze" (whole attention and feed-forward blocks), or "lora+unfreeze".
        fraction: share of the submodules (or blocks, in mode "unfreeze"), in (0, 1].
        num_modules: how many.
        top_p: the fewest that hold this share of the summed score, in (0, 1]; within each stratum of the coverage. (In
            PEFT's KappaTune `top_p` is what `fraction` is here.)
        threshold: all whose score is at least this; coverage then has nothing to decide.
        rank_by: one of `scores.SCORES`, "cover_gain" or "set_gain". By default "cover_gain" where the blueprint has
            Adam's gain, for adapters by a share, a number, a budget or `keep` with the default coverage; for blocks, by
            other selectors or with another coverage "adam_gain"; and "gradient_norm", the paper's, without that gain.
        per_cost: rank by the score over the step time that an adapter there takes.
        coverage: "none" (the paper's rule: pooled), "kind", or "kind+depth".
        unfreeze_blocks: how many blocks, in mode "lora+unfreeze"; 1 by default.
        rank: of the adapters, or of the all-linear LoRA they are compared with; 16 where nothing is said, and 8, 4, 2
            or 1 where a budget of parameters would else leave few adapters.
        ranks: "uniform"; "equal_parameters", raised until the placement has as many parameters as LoRA of `rank` on every
            linear layer, which costs next to no time; or "influence", higher where the score is, `rank` on average. By
            default equal parameters for adapters whose rank and parameters nobody limits, else uniform.
        workload: batch, length, dtype, quantisation, optimizer and so on that costs are predicted for; by default that
            of a loaded model, see `workload_of`, with `Workload`'s batch of 8 examples of 512 tokens.
        seed: of rank_by="random".

    Raises:
        PlacementError: for wishes that contradict each other, values out of range, a choice that is empty, or a budget
            that nothing meets, with the smallest that works.
        MismatchError: if the blueprint does not fit the model.
    """
    _check_choice("mode", mode, get_args(Mode))
    _check_choice("coverage", coverage, get_args(Coverage))
    _check_choice("ranks", ranks or "uniform", get_args(Ranks))
    if unfreeze_blocks is not None and (mode != "lora+unfreeze" or unfreeze_blocks < 1):
        raise PlacementError(
            f"unfreeze_blocks={unfreeze_blocks} with mode={mode!r}: give at least 1, with mode='lora+unfreeze'."
        )
    if rank is not None and rank < 1:
        raise PlacementError(f"rank={rank} is no rank: give at least 1.")
    selectors = {"fraction": fraction, "num_modules": num_modules, "top_p": top_p, "threshold": threshold}
    wish = Wish.of(budget, keep, selectors)

    whole, structure = fitted(blueprint, model)
    entries = tuple(entry for entry in whole if entry.form in ADAPTABLE)
    if rank_by is None:
        is_covering = mode == "lora" and coverage == "kind+depth" and top_p is None and threshold is None
        rank_by = "even" if blueprint is None else default_rank_by(entries, is_covering)
    _check_choice("rank_by", rank_by, get_args(RankBy))
    workload = workload or workload_of(model)
    if rank is not None:
        workload = replace(workload, rank=rank)
    costs = None if structure is None else CostModel(structure, workload)
    _check_costs_are_known(wish, per_cost, costs, model is not None, whole.model_id)
    is_free = rank is None and ranks is None and costs is not None and mode == "lora"
    is_limited = wish.budget is not None and wish.budget.parameters is not None
    if ranks is None:
        ranks = "equal_parameters" if is_free and not is_limited else "uniform"
    wish = wish.or_default(
        knows_costs=costs is not None and mode == "lora" and coverage == "kind+depth",
        is_sparse=rank_by == "cover_gain" and ranks == "equal_parameters",
    )
    choosing = Choosing(entries, rank_by, per_cost, coverage, ranks, workload.rank, costs, seed)
    if is_free and is_limited:
        choosing.lower_ranks(wish)

    blocks: Choice | None = None
    if mode != "lora":
        blocks = choosing.blocks(wish if mode == "unfreeze" else Wish({"num_modules": unfreeze_blocks or 1}))
    unfreeze = () if blocks is None else choosing.modules_of(blocks.units)
    adapters = None if mode == "unfreeze" else choosing.adapters(wish, unfreeze)
    chosen = adapters or blocks
    assert chosen is not None
    lora = () if adapters is None else adapters.units
    return Placement(
        model_id=whole.model_id,
        lora=tuple(entry.name for entry in lora),
        unfreeze=unfreeze,
        rank_by=f"{rank_by} per cost" if per_cost else rank_by,
        coverage=coverage,
        selector=wish.to_dict(),
        candidates=len(entries) if mode != "unfreeze" else len(choosing.members),
        target_parameters=tuple(entry.name for entry in lora if entry.form == "experts"),
        left_out=len(whole) - len(entries),
        rank=choosing.rank_of(lora) if rank is not None or wish.budget is not None or ranks != "uniform" else None,
        ranks=choosing.ranks_of(lora) if ranks == "influence" else {},
        learning_rate_scale=choosing.learning_rate_scale(lora) if not unfreeze else None,
        kept=chosen.gain,
        cost=chosen.costs,
        facts={entry.name: choosing.facts(entry) for entry in lora},
        alternatives=tuple({**other.costs, "kept": other.gain} for other in choosing.alternatives),
    )


def default_rank_by(entries: Sequence[Submodule], is_covering: bool = False) -> RankBy:
    """What ranks entries when nobody says: what they cover of Adam's gain, or that gain itself, where all carry it, else
    the paper's gradient norm.
    """
    if any(entry.adam_gain is None for entry in entries):
        return "gradient_norm"
    return "cover_gain" if is_covering and any(entry.adam_gain for entry in entries) else "adam_gain"


def fitted(blueprint: Blueprint | None, model: Any) -> tuple[Blueprint, Structure | None]:
    """The blueprint at submodule level, checked against the model, and what is known of the model for its costs.

    Raises:
        PlacementError: if the two do not make a list of submodules with at least one that can be adapted.
        MismatchError: if the blueprint does not fit the model.
    """
    if blueprint is None and model is None:
        raise PlacementError("There is nothing to place by: give a blueprint, or a model (its config will do).")
    structure: Structure | None = None
    if model is not None:
        from ..measure import check_fits, find_submodules, find_weights

        model = as_module(model)
        structure = Structure.of(model)
        if blueprint is None:
            blueprint = _without_measurement(model, find_submodules(model))
        blueprint = blueprint.expand(find_submodules(model))
        check_fits(blueprint, model)
        forms = {weight.name: weight.form for weight in find_weights(model)}  # a file from elsewhere may not say
        blueprint = replace(blueprint, submodules=tuple(replace(e, form=forms[e.name]) for e in blueprint))
    assert blueprint is not None
    if blueprint.level != "submodule":
        raise PlacementError(
            f"The blueprint of {blueprint.model_id!r} speaks of {blueprint.level}s ({format_names(blueprint.names)}). Expand "
            "it onto the model first: blueprint.expand(find_submodules(model)), or give plan_placement the model."
        )
    adaptable = [entry for entry in blueprint if entry.form in ADAPTABLE]
    if not adaptable:
        forms_found = ", ".join(sorted({entry.form for entry in blueprint}))
        raise PlacementError(
            f"No adapter can be put on any of the {len(blueprint)} entries of the blueprint of {blueprint.model_id!r} "
            f"({forms_found}; {format_names(blueprint.names)}), only on linear layers and fused experts. Measure those, which "
            "generate_blueprint does by default."
        )
    if structure is None and all(entry.shape is not None for entry in adaptable):
        structure = Structure.of_blueprint(blueprint)
    return blueprint, structure


def as_module(model: Any) -> Any:
    """A config as a model without weights; a model as it is."""
    from torch import nn

    if isinstance(model, nn.Module):
        return model
    from ..measure import empty_model  # a door to the floor above, where transformers is

    return empty_model(model)


def _without_measurement(model: Any, found: Sequence[Submodule]) -> Blueprint:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Blueprint(model_id=name, submodules=tuple(replace(entry, gradient_norm=1.0) for entry in found))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise PlacementError(f"{name}={value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}.")


def _check_costs_are_known(wish: Wish, per_cost: bool, costs: Any, has_model: bool, model_id: str) -> None:
    if costs is None and (wish.is_priced or per_cost):
        raise PlacementError(
            f"What a placement on {model_id!r} costs cannot be said: its blueprint has no shapes. Give plan_placement "
            "the model, or its config."
        )
    if wish.budget is not None and wish.budget.memory is not None and not has_model:
        raise PlacementError(
            f"The budget {wish.budget} needs the model, or its config, since a blueprint says nothing of the rest of the "
            "memory: plan_placement(blueprint, model, budget=…)."
        )


def workload_of(model: Any, **settings: Any) -> Workload:
    """A training step of a loaded model: its dtype, quantisation, device and gradient checkpointing, and what is given.

    Args:
        model: as it is to be trained; on the meta device, or a config, it says nothing.
        **settings: `Workload`'s fields; they count before what the model says.

    Raises:
        PlacementError: for settings that are none, or an unknown value.
    """
    from torch import nn

    from ..measure import find_weights, is_quantized

    known = {f.name for f in fields(Workload)}
    if unknown := [name for name in settings if name not in known]:
        raise PlacementError(f"A workload has no {format_names(unknown)}; it has {', '.join(sorted(known))}.")
    if not isinstance(model, nn.Module):
        return Workload(**settings)
    tensors = [weight.tensor for weight in find_weights(model)]
    if all(tensor.is_meta for tensor in tensors):
        return Workload(**settings)
    quantized: Any = next((tensor for tensor in tensors if is_quantized(tensor)), None)
    plain = next((tensor for tensor in tensors if not is_quantized(tensor)), None)
    found: dict[str, Any] = {
        "device": "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu",
        "checkpointing": any(vars(module).get("gradient_checkpointing") is True for module in model.modules()),
    }
    if plain is not None and (dtype := str(plain.dtype).removeprefix("torch.")) in DTYPES:
        found["dtype"] = dtype
    if type(quantized).__name__ == "Params4bit" and quantized.quant_state is not None:
        found |= {"quantization": quantized.quant_state.quant_type, "double_quant": bool(quantized.quant_state.nested)}
    elif quantized is not None:
        found["quantization"] = "int8" if type(quantized).__name__ == "Int8Params" else "nf4"
    return Workload(**{**found, **settings})
