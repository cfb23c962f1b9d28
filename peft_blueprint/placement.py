"""Which submodules get an adapter and which blocks are unfrozen: a blueprint and a wish become a `Placement`.

A placement is names, with the reasons for them; the model is only asked whether they exist. Knows nothing of PEFT.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from .blueprint import Blueprint
from .entry import ADAPTABLE, Submodule, score_of, some
from .errors import PlacementError


if TYPE_CHECKING:
    from torch import nn

Mode = Literal["lora", "unfreeze", "lora+unfreeze"]
Coverage = Literal["none", "kind", "kind+depth"]
RankBy = Literal["gradient_norm", "adam_gain"]

DEFAULT_FRACTION = 0.2
_NAME_LISTS = ("lora", "unfreeze", "target_parameters")


@dataclass(frozen=True)
class Placement:
    """What is adapted, and why.

    Args:
        model_id: of the blueprint that it came from.
        lora: full names of the submodules that get an adapter, in the model's order; of a linear layer the module's,
            of fused experts the parameter's.
        unfreeze: full names of the modules that are trained whole.
        rank_by: the statistic that ranked them.
        coverage: over what they were spread.
        selector: the wish, such as `{"fraction": 0.2}`.
        candidates: how many submodules, or blocks, there were to choose from.
        target_parameters: those of `lora` that are parameters: experts that are fused into one.
        left_out: how many entries of the blueprint were no candidates: on embeddings, norms, biases, convolutions and
            heads no adapter is put.
    """

    model_id: str
    lora: tuple[str, ...]
    unfreeze: tuple[str, ...]
    rank_by: str
    coverage: str
    selector: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 0
    target_parameters: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Those of `lora` that are modules."""
        return tuple(name for name in self.lora if name not in self.target_parameters)

    def quantization_skip_modules(self, head: str = "lm_head") -> list[str]:
        """What to give `BitsAndBytesConfig(llm_int8_skip_modules=…)` so that the blocks to unfreeze are not quantised.

        The head is on the list because an explicit list replaces transformers' own, which has it.
        """
        return [head, *self.unfreeze]

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        lists = {name: list(getattr(self, name)) for name in _NAME_LISTS}
        return asdict(self) | lists | {"selector": dict(self.selector)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Placement:
        """The placement of such an object.

        Raises:
            PlacementError: if it is not one.
        """
        try:
            values = {"target_parameters": (), **data}
            return cls(**values | {name: tuple(values[name]) for name in _NAME_LISTS})
        except (TypeError, KeyError) as error:
            raise PlacementError(f"This is not a placement: {error}. It has the keys {some(list(data))}.") from error


def plan_placement(
    blueprint: Blueprint,
    model: nn.Module | None = None,
    *,
    mode: Mode = "lora",
    fraction: float | None = None,
    num_modules: int | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    rank_by: RankBy | None = None,
    coverage: Coverage = "kind+depth",
    unfreeze_blocks: int | None = None,
) -> Placement:
    """Choose submodules by a blueprint: cover first, rank second (line 3 of Algorithm 1 with coverage="none").

    Sorting all submodules by gradient norm crowds the adapters into few kinds and layers, which loses to an even
    spread of as many. So the choice is first spread over kinds of submodule and strata of depth, and the strongest is
    taken within each. When fewer than two per kind are asked for, only depth is covered.

    Only what an adapter can be put on is chosen, linear layers and fused experts; other entries, of a blueprint that
    was measured with `include="all"`, are left out and counted. Give at most one of the four selectors; without one,
    `fraction=0.2`.

    Args:
        blueprint: at submodule level, or at any level with `model`.
        model: checked against the blueprint, and used to expand groups or layers to its submodules.
        mode: "lora", "unfreeze" (whole attention and feed-forward blocks), or "lora+unfreeze".
        fraction: share of the submodules (or blocks, in mode "unfreeze"), in (0, 1].
        num_modules: how many.
        top_p: the fewest that hold this share of the summed score, in (0, 1]; within each stratum of the coverage. (In
            PEFT's KappaTune `top_p` is what `fraction` is here.)
        threshold: all whose score is at least this; coverage then has nothing to decide.
        rank_by: "gradient_norm" (the paper's) or "adam_gain"; by default the latter where the blueprint has it, since
            it fits Adam's step.
        coverage: "none" (the paper's rule: pooled), "kind", or "kind+depth".
        unfreeze_blocks: how many blocks, in mode "lora+unfreeze"; 1 by default.

    Raises:
        PlacementError: for two selectors, values out of range, or a choice that is empty.
        MismatchError: if the blueprint does not fit the model.
    """
    selector = _one_selector(fraction=fraction, num_modules=num_modules, top_p=top_p, threshold=threshold)
    if mode not in ("lora", "unfreeze", "lora+unfreeze"):
        raise PlacementError(f"mode={mode!r}: choose lora, unfreeze or lora+unfreeze.")
    if coverage not in ("none", "kind", "kind+depth"):
        raise PlacementError(f"coverage={coverage!r}: choose none, kind or kind+depth.")
    if unfreeze_blocks is not None and (mode != "lora+unfreeze" or unfreeze_blocks < 1):
        raise PlacementError(
            f"unfreeze_blocks={unfreeze_blocks} with mode={mode!r}: give at least 1, with mode='lora+unfreeze'."
        )
    if model is not None:
        from .submodules import check_fits, find_weights  # torch is needed only here

        blueprint = blueprint.expand(model)
        check_fits(blueprint, model)
        forms = {weight.name: weight.form for weight in find_weights(model)}  # a file from elsewhere may not say
        blueprint = replace(blueprint, submodules=tuple(replace(e, form=forms[e.name]) for e in blueprint))
    if blueprint.level != "submodule":
        raise PlacementError(
            f"The blueprint of {blueprint.model_id!r} speaks of {blueprint.level}s ({some(blueprint.names)}). Expand "
            "it onto the model first: blueprint.expand(model), or give plan_placement the model."
        )
    adaptable = tuple(entry for entry in blueprint if entry.form in ADAPTABLE)
    if not adaptable:
        found = ", ".join(sorted({entry.form for entry in blueprint}))
        raise PlacementError(
            f"No adapter can be put on any of the {len(blueprint)} entries of the blueprint of {blueprint.model_id!r} "
            f"({found}; {some(blueprint.names)}), only on linear layers and fused experts. Measure those, which "
            "generate_blueprint does by default."
        )
    left_out = len(blueprint) - len(adaptable)
    blueprint = replace(blueprint, submodules=adaptable)
    if rank_by is None:
        rank_by = "adam_gain" if all(e.adam_gain is not None for e in adaptable) else "gradient_norm"
    if rank_by not in ("gradient_norm", "adam_gain"):
        raise PlacementError(f"rank_by={rank_by!r}: choose gradient_norm or adam_gain.")

    unfreeze: tuple[str, ...] = ()
    candidates = len(blueprint)
    if mode != "lora":
        groups = blueprint.coarsen("group")
        wish = selector if mode == "unfreeze" else {"num_modules": unfreeze_blocks or 1}
        chosen_groups = _select(groups.submodules, wish, rank_by, coverage)
        unfreeze = tuple(name for group in chosen_groups for name in _modules_of(group.name, blueprint))
        candidates = len(groups) if mode == "unfreeze" else candidates
    lora: tuple[str, ...] = ()
    if mode != "unfreeze":
        free = [e for e in blueprint if not any(e.name == u or e.name.startswith(u + ".") for u in unfreeze)]
        if not free:
            raise PlacementError(f"Unfreezing {some(unfreeze)} leaves no submodule for LoRA. Unfreeze fewer blocks.")
        lora = tuple(entry.name for entry in _select(free, selector, rank_by, coverage))
    return Placement(
        model_id=blueprint.model_id,
        lora=lora,
        unfreeze=unfreeze,
        rank_by=rank_by,
        coverage=coverage,
        selector=selector,
        candidates=candidates,
        target_parameters=tuple(name for name in lora if blueprint[name].form == "experts"),
        left_out=left_out,
    )


def _one_selector(**wishes: float | None) -> dict[str, float]:
    given = {name: value for name, value in wishes.items() if value is not None}
    if len(given) > 1:
        raise PlacementError(f"{' and '.join(f'{k}={v}' for k, v in given.items())} are two selectors: give one.")
    name, value = next(iter(given.items()), ("fraction", DEFAULT_FRACTION))
    if name in ("fraction", "top_p") and not 0 < value <= 1:
        raise PlacementError(f"{name}={value} is not a share: give a number above 0 and at most 1.")
    if name == "num_modules" and (value != int(value) or value < 1):
        raise PlacementError(f"num_modules={value}: give a whole number of at least 1.")
    if name == "threshold" and not (value >= 0 and math.isfinite(value)):
        raise PlacementError(f"threshold={value}: give a number of at least 0.")
    return {name: value}


def _select(
    entries: Sequence[Submodule], selector: Mapping[str, float], rank_by: str, coverage: Coverage
) -> list[Submodule]:
    """The chosen entries, in their order."""
    scores = {entry.name: score_of(entry, rank_by) for entry in entries}

    def score(entry: Submodule) -> float:
        return scores[entry.name]

    [(name, value)] = selector.items()
    if name == "threshold":
        chosen = [entry for entry in entries if score(entry) >= value]
        if not chosen:
            raise PlacementError(f"No {rank_by} reaches threshold={value}; the largest is {max(scores.values()):.4g}.")
    elif name == "top_p":
        chosen = [e for stratum in _strata(entries, coverage) for e in _nucleus(stratum, value, score)]
    else:
        count = max(1, round(value * len(entries))) if name == "fraction" else int(value)
        if count > len(entries):
            raise PlacementError(f"num_modules={count}: the blueprint has only {len(entries)} to choose from.")
        chosen = _spread(entries, count, score, rank_by, coverage)
    names = {entry.name for entry in chosen}
    return [entry for entry in entries if entry.name in names]


def _spread(
    entries: Sequence[Submodule],
    count: int,
    score: Callable[[Submodule], float],
    rank_by: str,
    coverage: Coverage,
) -> list[Submodule]:
    """`count` entries: strata first, the strongest within each."""
    if coverage == "none":
        return sorted(entries, key=score, reverse=True)[:count]
    kinds = _by_kind(entries)
    if coverage == "kind+depth" and count < 2 * len(kinds):
        if rank_by == "gradient_norm":  # which compares within a kind only
            medians = {kind: statistics.median(map(score, members)) or 1.0 for kind, members in kinds.items()}
            return [
                max(stratum, key=lambda e: score(e) / medians[e.kind]) for stratum in _depth_strata(entries, count)
            ]
        return [max(stratum, key=score) for stratum in _depth_strata(entries, count)]
    chosen: list[Submodule] = []
    for members, share in zip(kinds.values(), _apportion(count, [len(m) for m in kinds.values()]), strict=True):
        if coverage == "kind":
            chosen += sorted(members, key=score, reverse=True)[:share]
        else:
            chosen += [max(stratum, key=score) for stratum in _depth_strata(members, share)]
    return chosen


def _nucleus(entries: Sequence[Submodule], share: float, score: Callable[[Submodule], float]) -> list[Submodule]:
    """The fewest entries that hold `share` of the summed score."""
    chosen: list[Submodule] = []
    held = 0.0
    wanted = share * math.fsum(map(score, entries)) * (1 - 1e-12)
    for entry in sorted(entries, key=score, reverse=True):
        if chosen and held >= wanted:
            break
        chosen.append(entry)
        held += score(entry)
    return chosen


def _strata(entries: Sequence[Submodule], coverage: Coverage, sixths: int = 6) -> list[Sequence[Submodule]]:
    if coverage == "none":
        return [entries]
    kinds = _by_kind(entries).values()
    if coverage == "kind":
        return list(kinds)
    return [stratum for members in kinds for stratum in _depth_strata(members, min(sixths, len(members)))]


def _by_kind(entries: Sequence[Submodule]) -> dict[str | None, list[Submodule]]:
    kinds: dict[str | None, list[Submodule]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def _depth_strata(entries: Sequence[Submodule], count: int) -> list[Sequence[Submodule]]:
    """`count` runs of neighbouring depth, as equal in number as can be."""
    ordered = sorted(entries, key=lambda e: math.inf if e.depth is None else e.depth)
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    return [ordered[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _apportion(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` seats in proportion to sizes, by largest remainder, never more than a size."""
    total = sum(sizes)
    seats = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for i in by_remainder[: count - sum(seats)]:
        seats[i] += 1
    return seats


def _modules_of(group: str, blueprint: Blueprint) -> list[str]:
    """What to unfreeze for a group: the module that holds just its members, or else the members themselves."""
    members = list(dict.fromkeys(_module_of(e) for e in blueprint if (e.group or e.name) == group))
    if len(members) == 1:
        return members
    holder = commonprefix([name + "." for name in members]).rpartition(".")[0]
    if any(name[len(holder) + 1 :].split(".")[0].isdigit() for name in members):  # a list, which cannot be unfrozen
        holder = holder.rpartition(".")[0]
    others = [e.name for e in blueprint if _module_of(e) not in members and e.name.startswith(holder + ".")]
    return members if others or not holder else [holder]


def _module_of(entry: Submodule) -> str:
    """The module that is trained whole for an entry: fused experts are a parameter of theirs."""
    return entry.name.rpartition(".")[0] if entry.form == "experts" else entry.name
