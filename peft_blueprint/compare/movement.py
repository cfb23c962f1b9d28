"""Show how a model's gradient norms moved while it was trained, from blueprints at several checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..blueprint import Blueprint, Submodule, norm_of, require_same_names
from ..errors import BlueprintError, MismatchError
from .drift import Drift, check_drift
from .merging import has_privacy, parts_of, reference_of


_Key = TypeVar("_Key", str, int)


@dataclass(frozen=True)
class Moved:
    """One submodule at every checkpoint.

    Args:
        name: of the entry.
        kind: its role.
        depth: of its block.
        norms: gradient norms, brought to one scale.
        ranks: within its kind, 1 for the largest.
        ratio: the last norm over the first, on that scale; 1 for one that kept its place among the others, None where
            a norm is zero.
        climbed: ranks gained from the first checkpoint to the last.
    """

    name: str
    kind: str | None
    depth: int | None
    norms: tuple[float, ...]
    ranks: tuple[int, ...]
    ratio: float | None
    climbed: int


@dataclass(frozen=True)
class Movement:
    """How the norms of one model's submodules moved over its training.

    Args:
        model_id: the model.
        checkpoints: shares of the training, ascending.
        scales: factor that brings the norms of each checkpoint to the first one's scale.
        submodules: in the order of the first blueprint.
        drifts: from each checkpoint to the next, see `check_drift`; None where every kind has too few entries.
        kind_shares: of the summed norm at every checkpoint, by kind.
        depth_shares: the same by block; entries outside of the blocks are left out of it.
        notes: caveats, a sentence each.
    """

    model_id: str
    checkpoints: tuple[float, ...]
    scales: tuple[float, ...]
    submodules: tuple[Moved, ...]
    drifts: tuple[Drift | None, ...]
    kind_shares: Mapping[str, tuple[float, ...]]
    depth_shares: Mapping[int, tuple[float, ...]]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A flat row per submodule, those that moved most first: `norm_50`, `rank_50`, …, `ratio`, `climbed`."""
        labels = [_percent(checkpoint) for checkpoint in self.checkpoints]
        return [
            {
                "model_id": self.model_id,
                "id": moved.name,
                "kind": moved.kind,
                "depth": moved.depth,
                **{f"norm_{label}": norm for label, norm in zip(labels, moved.norms, strict=True)},
                **{f"rank_{label}": rank for label, rank in zip(labels, moved.ranks, strict=True)},
                "ratio": moved.ratio,
                "climbed": moved.climbed,
            }
            for moved in sorted(self.submodules, key=_distance, reverse=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The movement as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        labels = [_percent(checkpoint) for checkpoint in self.checkpoints]
        lines = [
            f"{self.model_id} at {', '.join(labels[:-1])} and {labels[-1]} % of its training: "
            f"{len(self.submodules)} submodules, norms on the scale of {labels[0]} % "
            f"(times {', '.join(f'{scale:.3g}' for scale in self.scales)})"
        ]
        for start, end, drift in zip(labels, labels[1:], self.drifts, strict=False):
            found = "not known, too few entries of a kind"
            if drift is not None:
                found = f"{drift.correlation:.3f} [{drift.interval[0]:.3f}, {drift.interval[1]:.3f}]"
            lines.append(f"{start} to {end} %: rank correlation within kind {found}")
        lines.append(f"share of the summed norm by kind: {_gains(self.kind_shares)}")
        if self.depth_shares:
            lines.append(f"by block: {_gains({f'block {d}': shares for d, shares in self.depth_shares.items()})}")
        most = max(self.submodules, key=_distance)
        by = "from or to zero" if most.ratio is None else f"times {most.ratio:.3g}"
        lines.append(f"moved most: {most.name}, {by}, rank {most.ranks[0]} to {most.ranks[-1]} of its kind")
        return "\n".join([*lines, *self.notes])


def checkpoint_movement(blueprints: Mapping[str, Blueprint] | Iterable[Blueprint]) -> Movement:
    """Compare the norms of a model's submodules from one checkpoint of its training to the next.

    The size of the whole gradient changes over a training with the loss, the learning rate and clipping. Every
    checkpoint's norms are therefore multiplied by the ratio of the first one's geometric mean to their own, over the
    submodules whose norm is above zero at every checkpoint, as in `Blueprint.blend`. The movement of submodules
    relative to each other remains. Shares and ranks need no scale.

    Args:
        blueprints: of one model, two or more, each with its own `training_checkpoint`, in any order; by name, or
            numbered in messages. `BlueprintCallback` writes them.

    Raises:
        BlueprintError: for fewer than two, or the same checkpoint twice.
        MismatchError: if they are of different models or submodules.

    Example:
        >>> entries = (Submodule("attn.0", 2.0, kind="attn"), Submodule("ffn.0", 1.0, kind="ffn"))
        >>> early = Blueprint("org/model", entries, training_checkpoint=0.5, level="group")
        >>> entries = (Submodule("attn.0", 1.0, kind="attn"), Submodule("ffn.0", 2.0, kind="ffn"))
        >>> final = Blueprint("org/model", entries, level="group")
        >>> [(moved.name, round(moved.ratio, 3)) for moved in checkpoint_movement([early, final]).submodules]
        [('attn.0', 0.5), ('ffn.0', 2.0)]
    """
    named = (
        dict(blueprints)
        if isinstance(blueprints, Mapping)
        else {f"blueprint {i}": one for i, one in enumerate(blueprints, start=1)}
    )
    ordered = _ordered(named)
    first = ordered[0]
    norms = [{entry.name: norm_of(entry) for entry in one} for one in ordered]
    scales = _scales(norms)
    ranks = [one.ranks() for one in ordered]
    submodules = tuple(
        _moved(
            entry, [s * of[entry.name] for s, of in zip(scales, norms, strict=True)], [r[entry.name] for r in ranks]
        )
        for entry in first
    )
    return Movement(
        model_id=first.model_id,
        checkpoints=tuple(one.training_checkpoint for one in ordered),
        scales=scales,
        submodules=submodules,
        drifts=tuple(_drift(a, b) for a, b in zip(ordered, ordered[1:], strict=False)),
        kind_shares=_shares(first.submodules, norms, lambda entry: entry.kind or "other"),
        depth_shares=dict(sorted(_shares(first.submodules, norms, lambda entry: entry.depth).items())),
        notes=_notes(ordered),
    )


def _ordered(named: Mapping[str, Blueprint]) -> list[Blueprint]:
    """Sort the blueprints by checkpoint and check them against each other."""
    at: dict[float, str] = {}
    for name, one in named.items():
        already = at.setdefault(one.training_checkpoint, name)
        if already != name:
            raise BlueprintError(
                f"{already} and {name} are both at {_percent(one.training_checkpoint)} % of the training. Measure each "
                "checkpoint with its --training-checkpoint, such as 0.5, and merge those of different data (merge_all, "
                "or --merge)."
            )
    if len(named) < 2:
        only = ", ".join(f"{_percent(one.training_checkpoint)} %" for one in named.values())
        raise BlueprintError(f"A movement needs two checkpoints or more; there is {only or 'no blueprint'}.")
    first_name, first = next(iter(named.items()))
    for name, other in named.items():
        for what in ("model_id", "model_digest", "level"):
            mine, theirs = getattr(first, what), getattr(other, what)
            if mine != theirs and (what != "model_digest" or None not in (mine, theirs)):
                raise MismatchError(
                    f"{first_name} and {name} do not compare: their {what} is {mine!r} and {theirs!r}. Give checkpoints "
                    "of one model, measured under one --model-id, at one level."
                )
        require_same_names(first, other, "compared")
    return sorted(named.values(), key=lambda one: one.training_checkpoint)


def _scales(norms: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    positive = [name for name in norms[0] if all(of_one[name] > 0 for of_one in norms)]
    means = [math.fsum(math.log(of_one[name]) for name in positive) / max(len(positive), 1) for of_one in norms]
    return tuple(math.exp(means[0] - mean) for mean in means)


def _moved(entry: Submodule, norms: Sequence[float], ranks: Sequence[int]) -> Moved:
    return Moved(
        name=entry.name,
        kind=entry.kind,
        depth=entry.depth,
        norms=tuple(norms),
        ranks=tuple(ranks),
        ratio=norms[-1] / norms[0] if norms[0] > 0 and norms[-1] > 0 else (None if norms[0] != norms[-1] else 1.0),
        climbed=ranks[0] - ranks[-1],
    )


def _drift(a: Blueprint, b: Blueprint) -> Drift | None:
    try:
        return check_drift(b, a)
    except MismatchError:  # every kind has too few entries
        return None


def _shares(
    entries: Sequence[Submodule], norms: Sequence[Mapping[str, float]], key: Callable[[Submodule], _Key | None]
) -> dict[_Key, tuple[float, ...]]:
    members: dict[_Key, list[str]] = {}
    for entry in entries:
        of_entry = key(entry)
        if of_entry is not None:
            members.setdefault(of_entry, []).append(entry.name)
    totals = [math.fsum(of_one.values()) or 1.0 for of_one in norms]
    return {
        of_entry: tuple(
            math.fsum(of_one[n] for n in names) / total for of_one, total in zip(norms, totals, strict=True)
        )
        for of_entry, names in members.items()
    }


def _notes(ordered: Sequence[Blueprint]) -> tuple[str, ...]:
    notes = []
    data = [{reference_of(part)[1] for part in parts_of(one.provenance)} for one in ordered]
    if any(None in of_one for of_one in data):
        notes.append("Not every blueprint says what data it is of: part of the movement may be the data's.")
    elif any(of_one != data[0] for of_one in data):
        notes.append("The blueprints are of different data: part of the movement is the data's.")
    if any(map(has_privacy, ordered)):
        notes.append("Some of the norms carry privacy noise: part of the movement is noise.")
    quantized = [[entry.name for entry in one if entry.quantized] for one in ordered]
    if any(set(of_one) != set(quantized[0]) for of_one in quantized):
        notes.append("Not all blueprints are equally quantized: part of the movement may be that.")
    return tuple(notes)


def _distance(moved: Moved) -> tuple[float, int]:
    return math.inf if moved.ratio is None else abs(math.log(moved.ratio)), abs(moved.climbed)


def _gains(shares: Mapping[str, tuple[float, ...]], limit: int = 2) -> str:
    """Name the keys that gained and lost most, if one decimal shows the difference."""
    shown = {key: (f"{of_key[0]:.1%}", f"{of_key[-1]:.1%}") for key, of_key in shares.items()}
    moved = [key for key, (start, end) in shown.items() if start != end]
    moved.sort(key=lambda key: shares[key][0] - shares[key][-1])
    gained = [key for key in moved if shares[key][-1] > shares[key][0]][:limit]
    lost = [key for key in reversed(moved) if shares[key][-1] < shares[key][0]][:limit]
    said = [
        f"{word} {', '.join(f'{key} ({shown[key][0]} to {shown[key][1]})' for key in keys)}"
        for word, keys in (("gained", gained), ("lost", lost))
        if keys
    ]
    return "; ".join(said) or "unchanged"


def _percent(share: float) -> str:
    return f"{100 * share:g}"
