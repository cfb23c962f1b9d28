"""Check that a blueprint belongs to the model whose tensors are stored under given names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from .._text import format_names, shape_str
from ..blueprint import Blueprint, Submodule
from ..errors import MismatchError


Shape = tuple[int, ...]
Tensors = Mapping[str, tuple[str, Shape] | None]  # dtype and shape by name, None where not known

_PLAIN = ("F64", "F32", "F16", "BF16")  # not quantized: the stored shape is the weight's
_ENDINGS = (".weight", "", ".qweight", ".weight_packed", "_blocks")  # those of GPTQ and AWQ, compressed-tensors, MXFP4
_OF_PEFT = "base_model.model."  # before the names of every method's tensors
_ADAPTER = re.compile(
    r"(?:base_model\.model\.)?(.+?)\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.|$)"
)
_EXPERT = re.compile(r"^(.*?\.\d+\.).*\bexperts\.\d+\.")
_BLOCK = re.compile(r"^.*?\.\d+\.")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def check_stored(blueprint: Blueprint, tensors: Tensors, source: str, is_adapter: bool = False) -> bool:
    """Require that a model's stored tensors include every entry of a blueprint, in the same shape.

    A prefix such as `model.` may be missing or extra on one side; a weight may be stored transposed, quantized, or as
    one tensor per expert; embeddings, heads and biases may have another number of rows. A blueprint of groups or layers
    must have no more blocks than the model. An adapter's file must not adapt only modules that the blueprint's model
    lacks, as far as the blueprint shows.

    Args:
        blueprint: at any level.
        tensors: dtype and shape by name; None for unknown ones.
        source: file or folder named in error messages.
        is_adapter: whether the tensors are an adapter's; known anyway if they are named as PEFT's tuners name them.

    Returns:
        Whether the names show that it fits; False for an adapter on none of the blueprint's modules, as of prompts.

    Raises:
        MismatchError: naming both sides.

    Example:
        >>> blueprint = Blueprint("org/model", (Submodule("layers.0.q_proj", 1.0, shape=(8, 4)),))
        >>> check_stored(blueprint, {"model.layers.0.q_proj.weight": ("BF16", (8, 4))}, "model.safetensors")
        True
    """
    if blueprint.level != "submodule":
        _check_depth(blueprint, tensors, source)
        return True
    lora = {found[1] for name in tensors if (found := _ADAPTER.match(name))}
    adapted = lora or {name.removeprefix(_OF_PEFT) for name in tensors if name.startswith(_OF_PEFT)}
    if adapted or is_adapter:
        wanted = set(blueprint.names)  # an adapter on experts has the name of the module that holds them
        wanted |= {entry.name.rpartition(".")[0] for entry in blueprint if entry.form == "experts"}
        modules = adapted | {parent for name in adapted - lora for parent in _parents(name)}
        if any(_without_prefix(name, wanted) for name in modules):
            return True
        if adapted and not any(_may_be_unmeasured(name, wanted) for name in adapted):
            raise _mismatch(blueprint, blueprint.names, sorted(adapted), source, "adapts")
        return False
    experts = {found[1] for name in tensors if (found := _EXPERT.match(name))}
    renamed = min(
        _renamings(blueprint, tensors), key=lambda rename: len(_missing(blueprint, tensors, experts, rename))
    )
    missing = _missing(blueprint, tensors, experts, renamed)
    if missing:
        raise _mismatch(blueprint, missing, list(tensors), source, "stores")
    for entry in blueprint:
        stored = _stored(entry, tensors, renamed)
        found_shape = tensors[stored] if stored is not None else None
        if entry.shape is None or found_shape is None or found_shape[0] not in _PLAIN:
            continue
        if not entry.fits(found_shape[1], in_any_order=True):
            raise MismatchError(
                f"{entry.name!r} is {shape_str(entry.shape)} in the blueprint of {blueprint.model_id!r}, and "
                f"{stored!r} is {shape_str(found_shape[1])} in {source}: it is a blueprint of another size of the model. "
                "Use this model's own, or give check=False to write it all the same."
            )
    return True


Rename = Callable[[str], str]


def _renamings(blueprint: Blueprint, tensors: Tensors) -> list[Rename]:
    """Return ways to add or remove a prefix of every name that fit the first entry or the last."""
    prefixes, extras = {""}, set()
    for name in (blueprint.names[0], blueprint.names[-1]):
        for ending in _ENDINGS:
            wanted = name + ending
            for stored in tensors:
                if stored.endswith("." + wanted):
                    prefixes.add(stored.removesuffix(wanted))
                elif wanted.endswith("." + stored):
                    extras.add(wanted.removesuffix(stored))
        if (block := _BLOCK.match(name)) is not None:  # for experts, which are stored under other names
            for stored in tensors:
                if (other := _BLOCK.match(stored)) is not None:
                    if other[0].endswith("." + block[0]):
                        prefixes.add(other[0].removesuffix(block[0]))
                    elif block[0].endswith("." + other[0]):
                        extras.add(block[0].removesuffix(other[0]))
    added = [lambda name, prefix=prefix: prefix + name for prefix in sorted(prefixes)]
    return [*added, *(lambda name, extra=extra: name.removeprefix(extra) for extra in sorted(extras))]


def _missing(blueprint: Blueprint, tensors: Tensors, experts: set[str], rename: Rename) -> list[str]:
    missing = []
    for entry in blueprint:
        if _stored(entry, tensors, rename) is None:
            block = _BLOCK.match(rename(entry.name))
            if entry.form != "experts" or block is None or block[0] not in experts:
                missing.append(entry.name)
    return missing


def _stored(entry: Submodule, tensors: Tensors, rename: Rename) -> str | None:
    """Return the name under which an entry's weight is stored."""
    return next((name for ending in _ENDINGS if (name := rename(entry.name) + ending) in tensors), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _may_be_unmeasured(adapted: str, names: set[str]) -> bool:
    """Return whether an adapted module can be of the model whose measured modules have these names, none of them it.

    It cannot if it is in no block of theirs, or beside some of them.
    """
    parents = {parent for name in names for parent in _parents(name)}
    is_in_block = _NUMBER.search(adapted) is not None
    shared = [name for name in _parents(adapted) if _without_prefix(name, parents)]
    if is_in_block and not any(_NUMBER.search(name + ".") for name in shared):
        return False
    return not shared or not _without_prefix(shared[-1], {name.rpartition(".")[0] for name in names})


def _without_prefix(name: str, wanted: Iterable[str]) -> bool:
    return any(name == other or name.endswith("." + other) or other.endswith("." + name) for other in wanted)


def _check_depth(blueprint: Blueprint, tensors: Tensors, source: str) -> None:
    depths = [int(number[1]) for number in map(_NUMBER.search, tensors) if number is not None]
    deepest = max(
        (int(entry.name.rpartition(".")[2]) for entry in blueprint if entry.name[-1:].isdecimal()), default=-1
    )
    if depths and deepest > max(depths):
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} has block {deepest}, and the last in {source} is "
            f"{max(depths)}. Use a blueprint of this model, or give check=False to write it all the same."
        )


def _mismatch(
    blueprint: Blueprint, missing: Sequence[str], stored: Sequence[str], source: str, verb: str
) -> MismatchError:
    return MismatchError(
        f"The blueprint of {blueprint.model_id!r} does not fit {source}: {len(missing)} of its {len(blueprint)} entries "
        f"are not there ({format_names(missing)}); it {verb} {format_names(stored) or 'nothing'}. "
        "Use a blueprint of this model, give a sharded "
        "model's folder rather than one shard, or give check=False to write it all the same."
    )
