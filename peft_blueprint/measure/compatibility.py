"""Whether a blueprint is of the model at hand: by names and shapes always, by id and revision, by its weights on request.

Reads a model; never changes it. Knows nothing of where the blueprint came from.
"""

import hashlib
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from .._text import format_names, shape_str
from ..blueprint import Blueprint
from ..errors import MismatchError
from .submodules import find_submodules, find_weights, is_quantized, is_sharded, structure_digest, unwrap


WEIGHTS_DIGEST = "weights_digest"  # in a blueprint's provenance
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_fits(blueprint: Blueprint, model: nn.Module) -> None:
    """Require that every entry of a blueprint is a submodule of the model, of the same shape.

    Warns where it fits and is still of another model: one with more submodules, under another repository's id, or at
    another revision.

    Raises:
        MismatchError: if an entry is not in the model, or of another shape there.
    """
    shapes = {weight.name: weight.shape for weight in find_weights(model)}
    missing = [entry.name for entry in blueprint if entry.name not in shapes]
    if missing:
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} does not fit this {type(unwrap(model)).__name__}: "
            f"{len(missing)} of its {len(blueprint)} entries are not in the model ({format_names(missing)}), which has "
            f"{format_names(list(shapes)) or 'no weights'}. Use a blueprint of this model, or measure one with "
            "generate_blueprint(model, batches)."
        )
    for entry in blueprint:
        if entry.shape is not None and entry.shape != shapes[entry.name]:
            raise MismatchError(
                f"{entry.name!r} is {shape_str(entry.shape)} in the blueprint of {blueprint.model_id!r} and "
                f"{shape_str(shapes[entry.name])} in this model: it is a blueprint of another size of it. Use this model's own, "
                "or measure one with generate_blueprint(model, batches)."
            )
    _warn_of_another_model(blueprint, model)


def weights_digest(model: nn.Module) -> str:
    """`sha256:…` over the names, shapes and values of what an adapter can be put on.

    Values count as float32, so that a model held in bfloat16 and the same model held in float32 agree.

    Raises:
        MismatchError: if the weights are quantised, sharded or not there, and their values so not known.
    """
    digest = hashlib.sha256()
    adaptable = {submodule.name for submodule in find_submodules(model)}
    for weight in sorted((w for w in find_weights(model) if w.name in adaptable), key=lambda w: w.name):
        values = weight.tensor
        if is_quantized(values) or is_sharded(values) or values.is_meta:
            raise MismatchError(
                f"The weight of {weight.name!r} is quantised, sharded or not loaded, so that its values cannot be compared. "
                "Load the model whole, in float32, bfloat16 or float16."
            )
        digest.update(f"{weight.name} {shape_str(weight.shape)}\n".encode())
        digest.update(values.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def check_weights(blueprint: Blueprint, model: nn.Module) -> None:
    """Require that a model's weights are those that the blueprint was measured on.

    Raises:
        MismatchError: if they are others, or the blueprint does not say.
    """
    written = blueprint.provenance.get(WEIGHTS_DIGEST)
    if not isinstance(written, str):
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} has no {WEIGHTS_DIGEST} in its provenance. Measure it with "
            "generate_blueprint(..., digest_weights=True) to have its weights compared."
        )
    found = weights_digest(model)
    if found != written:
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} was measured on other weights ({written[:23]}…) than this model's "
            f"({found[:23]}…). Load the revision that it names ({blueprint.model_revision}), or measure this one."
        )


def _warn_of_another_model(blueprint: Blueprint, model: nn.Module) -> None:
    submodules = find_submodules(model)
    if blueprint.level == "submodule" and blueprint.model_digest not in (None, structure_digest(submodules)):
        known = set(blueprint.names)
        others = [submodule.name for submodule in submodules if submodule.name not in known]
        warnings.warn(
            f"The blueprint of {blueprint.model_id!r} is of a model with other submodules than this one"
            f"{f', which also has {format_names(others)}: nothing will be placed there' if others else ''}. Measure this model to "
            "have all of it.",
            stacklevel=3,
        )
    config = getattr(unwrap(model), "config", None)
    name, revision = getattr(config, "_name_or_path", "") or "", getattr(config, "_commit_hash", None)
    if not _is_repository(name) or not _is_repository(blueprint.model_id):
        return  # a folder's name says nothing of what is in it
    if name != blueprint.model_id:
        warnings.warn(
            f"The blueprint is of {blueprint.model_id!r}, and this model is {name!r}. If one was trained from the other, "
            "ask check_drift with a probe of a few examples whether it still holds.",
            stacklevel=3,
        )
    elif None not in (revision, blueprint.model_revision) and revision != blueprint.model_revision:
        warnings.warn(
            f"The blueprint of {name!r} is of its revision {blueprint.model_revision}, and this model is revision "
            f"{revision}. Load that one, or ask check_drift with a probe of a few examples whether it still holds.",
            stacklevel=3,
        )


def _is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()
