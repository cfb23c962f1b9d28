"""Merge blueprints whose norms are means over different examples of one model, and note why others are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .._text import format_names
from ..blueprint import Blueprint
from ..errors import BlueprintError


class _Group(NamedTuple):
    """Properties that blueprints must share to merge; the notes use these names."""

    model_id: str
    training_checkpoint: float
    level: str
    model_digest: str | None
    submodules: frozenset[str]
    quantized: frozenset[str]


_UNSURE = ("model_revision", "weights_digest")  # where one side may not know
_Named = tuple[str, Blueprint]


def merge_all(blueprints: Mapping[str, Blueprint]) -> tuple[tuple[Blueprint, ...], tuple[str, ...]]:
    """Merge blueprints where possible, weighted by examples as in `Blueprint.merge`, and leave the others unchanged.

    Blueprints merge if they have the same model id and digest, checkpoint, level, submodules and quantization, and do
    not differ in revision or weights' digest. Different domains merge too, into the mean over all examples. Data count
    once: a blueprint whose data digests are all among another's is left out, and so is a copy. (A digest covers all
        examples
    of a blueprint in order: 64 and 128 examples of one file have two digests, and only a note warns of it.)

    Blueprints with privacy noise never merge. They keep no data digest, so that the same data could count twice, for
    which the guarantees of two releases add up. And their norms, which are bounded, shrunk and kept positive, are
    biased by an error that merging does not average away.

    Args:
        blueprints: by names that the notes use.

    Returns:
        The blueprints, in the order of their first parts; one that did not merge is the object given. And notes, a
        sentence or two each.

    Raises:
        BlueprintError: if there are none, or they have no names.

    Example:
        >>> from peft_blueprint import Submodule
        >>> one = Blueprint("org/m", (Submodule("layers.0.q_proj", 1.0, examples=10),))
        >>> merged, notes = merge_all({"one": one, "same": one})
        >>> len(merged), len(notes)
        (1, 2)
    """
    if not isinstance(blueprints, Mapping):
        got = type(blueprints).__name__
        raise BlueprintError(
            f"blueprints must be a mapping from names to blueprints, got {got}: {{'file.json': blueprint}}."
        )
    if not blueprints:
        raise BlueprintError("Merging needs at least one blueprint.")
    order = {name: i for i, name in enumerate(blueprints)}
    notes: list[str] = []
    kept: list[tuple[int, Blueprint]] = []
    groups: dict[_Group, list[_Named]] = {}
    digests: dict[str, str] = {}
    for name, blueprint in blueprints.items():
        reason = _why_apart(blueprint)
        if reason is None:
            groups.setdefault(_group_of(blueprint), []).append((name, blueprint))
        elif (first := digests.setdefault(blueprint.digest, name)) != name:
            notes.append(f"{name} is the same as {first} and counts once.")
        else:
            kept.append((order[name], blueprint))
            notes.append(f"{name} is not merged: {reason}.")
    for named in groups.values():
        for of_one_model in _by_weights(named, notes):
            for part in _by_data(of_one_model, notes):
                kept.append((min(order[name] for name, _ in part), _merged(part, notes)))
    notes += _differences(groups)
    return tuple(blueprint for _, blueprint in sorted(kept, key=lambda pair: pair[0])), tuple(dict.fromkeys(notes))


def parts_of(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the provenances of a merged blueprint's parts, or a blueprint's own in a list.

    Example:
        >>> parts_of({"data": "math.jsonl"})
        [{'data': 'math.jsonl'}]
    """
    merged = provenance.get("merged")
    if not isinstance(merged, Sequence) or not merged or not all(isinstance(part, Mapping) for part in merged):
        return [provenance]
    return [leaf for part in merged for leaf in parts_of(part)]


def has_privacy(blueprint: Blueprint) -> bool:
    """Return whether a blueprint, or a part of a merged one, carries privacy noise."""
    return any(part.get("privacy") for part in (blueprint.provenance, *parts_of(blueprint.provenance)))


def reference_of(part: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return name and data digest of a measurement's first domain, which its norms are over; None where unknown.

    Example:
        >>> reference_of({"domains": {"math": {"data_digest": "sha256:1"}}})
        ('math', 'sha256:1')
    """
    domains = part.get("domains")
    if not isinstance(domains, Mapping) or not domains:
        return None, None
    name = next(iter(domains))
    of_domain = domains[name]
    digest = of_domain.get("data_digest") if isinstance(of_domain, Mapping) else None
    return name, digest if isinstance(digest, str) else None


def _group_of(blueprint: Blueprint) -> _Group:
    return _Group(
        blueprint.model_id,
        blueprint.training_checkpoint,
        blueprint.level,
        blueprint.model_digest,
        frozenset(blueprint.names),
        frozenset(entry.name for entry in blueprint if entry.quantized),
    )


def _why_apart(blueprint: Blueprint) -> str | None:
    """Return why a blueprint merges with no other, or None."""
    parts = parts_of(blueprint.provenance)
    if has_privacy(blueprint):
        return (
            "its norms carry privacy noise and are not the means over its examples, and it keeps no data digest that "
            "would show whether another is of the same data"
        )
    if any(part.get("blend") for part in (blueprint.provenance, *parts)):
        return "it is a blend of two blueprints, whose norms are not means over its examples"
    if not all(reference_of(part)[1] for part in parts):
        return (
            "it has no data digest, which would show whether another is of the same data; if you know that it is not, "
            "use Blueprint.merge"
        )
    missing = [entry.name for entry in blueprint if not entry.examples]
    return f"{format_names(missing)} has no number of examples" if missing else None


def _data_of(blueprint: Blueprint) -> frozenset[str]:
    digests = (reference_of(part)[1] for part in parts_of(blueprint.provenance))
    return frozenset(digest for digest in digests if digest)


def _by_weights(named: Sequence[_Named], notes: list[str]) -> list[list[_Named]]:
    """Group blueprints of the same weights; one that fits several groups is not merged."""
    found: list[list[_Named]] = []
    for name, blueprint in sorted(named, key=lambda pair: _unsure_of(pair[1]).count(None)):
        fitting = [members for members in found if not any(_clash(blueprint, other) for _, other in members)]
        same = [members for members in fitting if _unsure_of(members[0][1]) == _unsure_of(blueprint)]
        if same or len(fitting) == 1:
            (same or fitting)[0].append((name, blueprint))
            continue
        if fitting:
            notes.append(
                f"{name} is not merged: it could be of the weights of {' or '.join(m[0][0] for m in fitting)}."
            )
        for members in found if not fitting else ():
            notes.append(f"{name} is not merged with {members[0][0]}: {_clash(blueprint, members[0][1])}.")
        found.append([(name, blueprint)])
    return found


def _clash(one: Blueprint, other: Blueprint) -> str | None:
    for what, mine, theirs in zip(_UNSURE, _unsure_of(one), _unsure_of(other), strict=True):
        if mine is not None and theirs is not None and mine != theirs:
            return f"{what} {mine} is not {theirs}"
    return None


def _by_data(named: Sequence[_Named], notes: list[str]) -> list[list[_Named]]:
    """Group blueprints without common data; one whose data is all in another is left out, and other overlaps are not merged."""
    together: list[_Named] = []
    apart: list[list[_Named]] = []
    for name, blueprint in sorted(named, key=lambda pair: -len(_data_of(pair[1]))):
        data = _data_of(blueprint)
        common = [(other, _data_of(of_other)) for other, of_other in together if data & _data_of(of_other)]
        if not common:
            together.append((name, blueprint))
        elif data <= common[0][1]:
            notes.append(f"{name} is of the same data as {common[0][0]} and counts once.")
        else:
            apart.append([(name, blueprint)])
            notes.append(
                f"{name} is not merged: part of its data is in {format_names([other for other, _ in common])} too."
            )
    names = {name for name, _ in together}
    return [[(name, blueprint) for name, blueprint in named if name in names], *apart]


def _unsure_of(blueprint: Blueprint) -> tuple[Any, Any]:
    return blueprint.model_revision, blueprint.provenance.get("weights_digest")


def _merged(cluster: Sequence[_Named], notes: list[str]) -> Blueprint:
    names, blueprints = zip(*cluster, strict=True)
    if len(blueprints) == 1:
        return blueprints[0]
    merged = Blueprint.merge(blueprints)
    known = [_unsure_of(blueprint) for blueprint in blueprints]
    for i, what in enumerate(_UNSURE):
        silent = [name for name, values in zip(names, known, strict=True) if values[i] is None]
        if 0 < len(silent) < len(names):
            notes.append(f"{format_names(silent)} has no {what}; taken to be that of the others.")
    weights = next((digest for _, digest in known if digest is not None), None)
    if weights is not None:
        merged = replace(merged, provenance={**merged.provenance, "weights_digest": weights})
    examples = max(entry.examples or 0 for entry in merged)
    notes.append(f"{format_names(names)} are merged into one of {examples} examples.")
    called = [part.get("data") for blueprint in blueprints for part in parts_of(blueprint.provenance)]
    twice = [data for data in dict.fromkeys(c for c in called if isinstance(c, str)) if called.count(data) > 1]
    if twice:
        notes.append(
            f"Several of them name the data {format_names(twice)}: if they share examples, those count twice."
        )
    return merged


def _differences(groups: Iterable[_Group]) -> list[str]:
    """Return a note for every model with several groups: in which properties they differ."""
    by_model: dict[str, list[_Group]] = {}
    for group in groups:
        by_model.setdefault(group.model_id, []).append(group)
    said = []
    for model_id, of_model in by_model.items():
        differing = [what for what in _Group._fields if len({getattr(group, what) for group in of_model}) > 1]
        if differing:
            shown = [_shown(what, [getattr(group, what) for group in of_model]) for what in differing]
            said.append(f"Blueprints of {model_id!r} are not merged: they differ in {' and '.join(shown)}.")
    return said


def _shown(what: str, values: Sequence[Any]) -> str:
    if what == "quantized":
        return "quantized submodules"
    if what == "submodules":
        return f"submodules ({', '.join(dict.fromkeys(str(len(names)) for names in values))} of them)"
    return f"{what} ({', '.join(dict.fromkeys('unknown' if v is None else str(v) for v in values))})"
