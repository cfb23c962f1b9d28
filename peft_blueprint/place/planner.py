"""Plan a placement: from a blueprint, a model's costs and options to a `Placement`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

from .._options import from_keywords
from .._text import format_names
from ..blueprint import ADAPTABLE, Blueprint, Submodule, split_expert
from ..errors import PlacementError
from ..measure import check_fits, empty_model, find_submodules, find_weights, unwrap
from .cost import CostModel, Structure, Workload, workload_of
from .experts import DEFAULT_EXPERTS, choose_experts, expert_entries, expert_shares
from .options import PlacementOptions, RankBy
from .placement import Placement
from .ranks import serving_note
from .search import Choice
from .solver import PlacementSolver, Selector


def plan_placement(
    blueprint: Blueprint | None,
    model: nn.Module | PretrainedConfig | None = None,
    options: PlacementOptions | None = None,
    *,
    workload: Workload | None = None,
    **keywords: Any,
) -> Placement:
    """Choose where adapters go: cover the model first, rank by score second.

    Sorting all submodules by gradient norm (line 3 of Algorithm 1; `coverage="none"` here) crowds the adapters into a
    few kinds and layers and ends with a higher loss than an even spread of as many. By default each adapter goes where
    it adds most to the coverage of depth and kind by those before it, weighted by Adam's gain (`CoverGain`). With any
    other score the choice is spread over kinds of submodule and strata of depth, and the largest score is taken within
    each.

    A budget or `keep` also chooses the depth at which the backward pass stops: nothing is placed below it, so neither
    time nor memory is spent there.

    Only linear layers and fused experts are chosen. Other entries, of a blueprint measured with `include="all"`, are
    left out and counted.

    Args:
        blueprint: at submodule level, or at any level with `model`; None, with a model, to place evenly.
        model: checked against the blueprint, used to expand groups or layers to its submodules and to predict costs. It
            may be on the meta device; a transformers config will do too. Without it costs come from the blueprint's
            shapes, which give time and parameters but not memory.
        options: see `PlacementOptions`.
        workload: training step that costs are predicted for; by default that of a loaded model, see `workload_of`, with
            `Workload`'s batch of 8 examples of 512 tokens.
        **keywords: fields of `PlacementOptions`, on top of `options`.

    Raises:
        PlacementError: for options that contradict each other, values out of range, an empty choice, or a budget that
            nothing meets, with the smallest that works.
        MismatchError: if the blueprint does not fit the model.

    Example:
        >>> from peft_blueprint import plan_placement
        >>> from peft_blueprint.testing import tiny_llama
        >>> placement = plan_placement(None, tiny_llama(layers=4), num_modules=4)
        >>> len(placement.lora), placement.rank_by
        (4, 'even')
    """
    options = from_keywords(PlacementOptions, options, keywords, PlacementError)
    whole, structure = _prepare(blueprint, model)
    adaptable = tuple(entry for entry in whole if entry.form in ADAPTABLE)
    experts = _experts_of(adaptable, options)
    names = {entry.name for entry in experts}
    entries = tuple(entry for entry in adaptable if entry.name not in names) or adaptable
    workload = workload or workload_of(model)
    if options.r is not None:
        workload = replace(workload, rank=options.r)
    costs = None if structure is None else CostModel(structure, workload)
    selector = Selector.of(options, None if blueprint is None else whole)
    _check_costs_are_known(selector, options.per_cost, costs, model is not None, whole.model_id)

    places_adapters_only = options.mode == "lora"
    is_rank_free = options.r is None and options.ranks is None and costs is not None and places_adapters_only
    limits_parameters = selector.budget is not None and selector.budget.parameters is not None
    covers = places_adapters_only and options.coverage == "kind+depth"
    resolved = replace(
        options,
        rank_by=options.rank_by or ("even" if blueprint is None else _default_rank_by(entries, options, covers)),
        ranks=options.ranks or ("equal_parameters" if is_rank_free and not limits_parameters else "uniform"),
        r=workload.rank,
    )
    default = Selector().or_default(
        has_costs=costs is not None and covers,
        is_sparse=resolved.rank_by == "cover_gain" and resolved.ranks == "equal_parameters",
    )
    selector = selector if selector.size or selector.needs_costs else default
    solver = PlacementSolver(entries, resolved, costs)
    has_budget_alone = selector.budget is not None and selector.keep is None and selector.best is None
    is_filled = bool(experts) and options.experts is None and has_budget_alone
    if not is_filled and (experts or options.experts is not None):
        solver.experts = _chosen_experts(experts, options)
    if is_rank_free and limits_parameters and not experts:
        solver.lower_rank(selector)

    blocks: Choice | None = None
    if not places_adapters_only:
        size = Selector({"num_modules": options.unfreeze_blocks or 1})
        blocks = solver.blocks(selector if options.mode == "unfreeze" else size)
    unfreeze = () if blocks is None else solver.modules_of(blocks.units)
    adapters: Choice | None = None
    if options.mode != "unfreeze":
        is_alone = len(names) == len(adaptable)
        adapters = Choice((), {}, 0.0) if is_alone else solver.adapters(default if is_filled else selector, unfreeze)
        if is_filled and selector.budget is not None:
            adapters = solver.add_experts(adapters, selector, _by_share(experts, options))
        elif is_alone:
            adapters = Choice((), solver.price((), ()), solver.gain_of(solver.experts))
            if selector.budget is not None and selector.budget.exceeded(adapters.costs):
                raise PlacementError(
                    f"experts={options.experts} need more than the budget {selector.budget}. Leave experts out, or raise it."
                )
    chosen = adapters or blocks
    assert chosen is not None
    lora = () if adapters is None else adapters.units
    rank, ranks = solver.rank_of(lora), solver.ranks_of(lora) | solver.expert_ranks()
    placed = {entry.name for entry in (*lora, *solver.experts)}
    return Placement(
        model_id=whole.model_id,
        lora=tuple(entry.name for entry in adaptable if entry.name in placed),
        unfreeze=unfreeze,
        rank_by=f"{resolved.rank_by} per cost" if options.per_cost or options.best else str(resolved.rank_by),
        coverage=options.coverage,
        selector=selector.to_dict() | ({} if options.experts is None else {"experts": options.experts}),
        candidates=len(solver.members) if options.mode == "unfreeze" else len(adaptable),
        target_parameters=tuple(e.name for e in adaptable if e.name in placed and e.form in ("experts", "expert")),
        left_out=len(whole) - len(adaptable),
        rank=rank if placed else None,
        ranks={name: own for name, own in ranks.items() if resolved.ranks == "score" or own != rank},
        learning_rate_scale=None if unfreeze else solver.learning_rate_scale(lora),
        gain_retained=chosen.gain,
        is_gain_measured=blueprint is not None and solver.is_gain_known,
        gain_per_cost=solver.ratio,
        notes=tuple(filter(None, (*solver.notes, *_unmeasured_time(selector, costs), serving_note(ranks.values())))),
        cost=chosen.costs,
        full_training=_full_training(costs),
        shares=solver.shares(lora, unfreeze, adaptable),
        details={entry.name: solver.details_of(entry) for entry in (*lora, *solver.experts)},
        alternatives=tuple({**other.costs, "gain_retained": other.gain} for other in solver.alternatives),
    )


def _experts_of(entries: Sequence[Submodule], options: PlacementOptions) -> list[Submodule]:
    """Return the weights of single experts that are chosen by expert, not like other submodules."""
    return expert_entries(entries, is_fused=options.experts is None) if options.mode == "lora" else []


def _chosen_experts(entries: Sequence[Submodule], options: PlacementOptions) -> tuple[Submodule, ...]:
    wish = DEFAULT_EXPERTS if options.experts is None else options.experts
    chosen = choose_experts(entries, wish, options.experts_by)
    found = ((entry, split_expert(entry.name)) for entry in entries)
    return tuple(entry for entry, e in found if e is not None and e.number in chosen[e.container])


def _by_share(entries: Sequence[Submodule], options: PlacementOptions) -> list[list[Submodule]]:
    """Return the weights of each expert, experts with the largest share of their layer's score first."""
    weights: dict[tuple[str, int], list[Submodule]] = {}
    for entry in entries:
        if (expert := split_expert(entry.name)) is not None:
            weights.setdefault((expert.container, expert.number), []).append(entry)
    shares = expert_shares(entries, options.experts_by)
    return sorted(weights.values(), key=lambda own: -_share_of(own[0], shares))


def _share_of(entry: Submodule, shares: Mapping[str, Mapping[int, float]]) -> float:
    expert = split_expert(entry.name)
    assert expert is not None
    return shares[expert.container][expert.number]


def _unmeasured_time(selector: Selector, costs: CostModel | None) -> tuple[str, ...]:
    """Say so where a choice by step time rests on a constant that was not measured on the device."""
    limits = {} if selector.budget is None else selector.budget.limits
    if costs is None or costs.is_time_measured or not (selector.best or selector.keep or "time" in limits):
        return ()
    return (
        f"The time constant of {costs.workload.device} is an estimate; `python -m benchmarks cost` measures it, for "
        "Workload(flops_per_byte=…).",
    )


def _full_training(costs: CostModel | None) -> dict[str, float]:
    """Return the costs of full fine-tuning that a placement is compared with, where the whole model is known."""
    if costs is None or not costs.structure.is_whole:
        return {}
    full = costs.full()
    return {"time": costs.time_ratio(full), "parameters": full.trainable, "optimizer_state": full.states}


def _default_rank_by(entries: Sequence[Submodule], options: PlacementOptions, covers: bool) -> RankBy:
    """Return Adam's gain, or its coverage by adapters, if all entries carry it; otherwise the paper's gradient norm."""
    if any(entry.adam_gain is None for entry in entries):
        return "gradient_norm"
    is_counted = options.top_p is None and options.threshold is None
    return "cover_gain" if covers and is_counted and any(entry.adam_gain for entry in entries) else "adam_gain"


def _prepare(blueprint: Blueprint | None, model: Any) -> tuple[Blueprint, Structure | None]:
    """Return the blueprint at submodule level, checked against the model, and the structure that costs need."""
    if blueprint is None and model is None:
        raise PlacementError("plan_placement needs a blueprint, or a model (its config will do) to place evenly.")
    structure: Structure | None = None
    if model is not None:
        model = as_module(model)
        structure = Structure.of(model, blueprint)
        found = find_submodules(model)
        blueprint = (_without_measurement(model, found) if blueprint is None else blueprint).expand(found)
        check_fits(blueprint, model)
        forms = {weight.name: weight.form for weight in find_weights(model)}  # other writers' files may lack them
        forms |= dict.fromkeys(
            refused_by_peft(model, [n for n, form in forms.items() if form == "linear"]), "parameter"
        )
        blueprint = replace(blueprint, submodules=tuple(replace(e, form=forms.get(e.name, e.form)) for e in blueprint))
    assert blueprint is not None
    if blueprint.level != "submodule":
        raise PlacementError(
            f"The blueprint of {blueprint.model_id!r} lists {blueprint.level}s ({format_names(blueprint.names)}), not "
            "submodules. Expand it with blueprint.expand(find_submodules(model)), or give the model, on the command line "
            "as --model."
        )
    adaptable = [entry for entry in blueprint if entry.form in ADAPTABLE]
    if not adaptable:
        forms_found = ", ".join(sorted({entry.form for entry in blueprint}))
        raise PlacementError(
            f"The blueprint of {blueprint.model_id!r} has no linear layer or fused experts among its "
            f"{len(blueprint)} entries ({forms_found}; {format_names(blueprint.names)}), and adapters go on no others. "
            "Measure again with generate_blueprint's defaults."
        )
    if structure is None and all(entry.shape is not None for entry in adaptable):
        structure = Structure.of_blueprint(blueprint)
    return blueprint, structure


def refused_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules on which PEFT itself refuses LoRA, such as `out_proj` of a Mamba.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> refused_by_peft(tiny_llama(), ["model.layers.0.mlp.up_proj"])
        []
    """
    from peft import LoraConfig, LoraModel

    def is_refused(name: str) -> bool:
        try:
            LoraModel._check_target_module_compatiblity(cast(Any, None), config, base, name.rpartition(".")[2])
        except ValueError:
            return True
        return False

    base, config = unwrap(model), LoraConfig()
    return [name for name in names if is_refused(name)]


def as_module(model: Any) -> nn.Module:
    """Return a model as it is, and a config as a model on the meta device."""
    return model if isinstance(model, nn.Module) else empty_model(model)


def _without_measurement(model: nn.Module, found: Sequence[Submodule]) -> Blueprint:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Blueprint(model_id=name, submodules=tuple(replace(entry, gradient_norm=1.0) for entry in found))


def _check_costs_are_known(
    selector: Selector, per_cost: bool, costs: CostModel | None, has_model: bool, model_id: str
) -> None:
    if costs is None and (selector.needs_costs or per_cost):
        raise PlacementError(
            f"Costs on {model_id!r} are unknown: its blueprint has no shapes. Give plan_placement the model, or its config."
        )
    if selector.needs_memory and not has_model:
        wish = f"best={selector.best!r}" if selector.best == "gain_per_gb_hour" else f"The budget {selector.budget}"
        raise PlacementError(
            f"{wish} needs the model, or its config: a blueprint does not tell the rest of the "
            "memory. Call plan_placement(blueprint, model, budget=…)."
        )
