"""Check that a blueprint belongs to a model: by names, shapes, id and revision, and on request by weights."""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from .._text import format_names, shape_str
from ..blueprint import Blueprint, split_expert
from ..errors import MismatchError
from .submodules import find_submodules, find_weights, is_quantized, is_sharded, structure_digest, unwrap


WEIGHTS_DIGEST = "weights_digest"  # in a blueprint's provenance
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_fits(blueprint: Blueprint, model: nn.Module) -> None:
    """Require that every entry of a blueprint is a submodule of the model with the same shape.

    Embeddings, heads and biases may have another number of rows: a resized vocabulary, where no adapter goes.

    Warns if the blueprint fits but the model has other submodules too, another repository id or another revision.

    Raises:
        MismatchError: if an entry is missing in the model or has another shape.

    Example:
        >>> from peft_blueprint import Submodule
        >>> from peft_blueprint.testing import tiny_llama
        >>> check_fits(Blueprint("org/m", (Submodule("model.layers.0.self_attn.q_proj", 1.0),)), tiny_llama())
    """
    shapes = {weight.name: weight.shape for weight in find_weights(model)}
    for entry in blueprint:  # of single experts
        expert = split_expert(entry.name) if entry.form == "expert" else None
        if expert is not None and expert.number < shapes.get(expert.parameter, (0,))[0]:
            shapes[entry.name] = shapes[expert.parameter][1:]
    missing = [entry.name for entry in blueprint if entry.name not in shapes]
    if missing:
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} does not fit this {type(unwrap(model)).__name__}: "
            f"{len(missing)} of its {len(blueprint)} entries are not in the model ({format_names(missing)}), which has "
            f"{format_names(list(shapes)) or 'no weights'}. Use a blueprint of this model, or measure one with "
            "generate_blueprint(model, batches)."
        )
    for entry in blueprint:
        if entry.shape is not None and not entry.fits(shapes[entry.name]):
            raise MismatchError(
                f"{entry.name!r} is {shape_str(entry.shape)} in the blueprint of {blueprint.model_id!r} and "
                f"{shape_str(shapes[entry.name])} in this model, which has another size. Use this model's own blueprint, or "
                "measure one with generate_blueprint(model, batches)."
            )
    _warn_of_another_model(blueprint, model)


def weights_digest(model: nn.Module) -> str:
    """Return `sha256:…` over the names, shapes and values of adaptable weights.

    Values are converted to float32, so that a model in bfloat16 and the same model in float32 agree.

    Raises:
        MismatchError: if a weight is quantized, sharded or not loaded.
    """
    digest = hashlib.sha256()
    adaptable = {submodule.name for submodule in find_submodules(model)}
    for weight in sorted((w for w in find_weights(model) if w.name in adaptable), key=lambda w: w.name):
        values = weight.tensor
        if is_quantized(values) or is_sharded(values) or values.is_meta:
            raise MismatchError(
                f"The weight of {weight.name!r} is quantized, sharded or not loaded, so its values cannot be compared. Load "
                "the whole model in float32, bfloat16 or float16."
            )
        digest.update(f"{weight.name} {shape_str(weight.shape)}\n".encode())
        digest.update(values.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def check_weights(blueprint: Blueprint, model: nn.Module) -> None:
    """Require that the blueprint was measured on a model's weights.

    Raises:
        MismatchError: if it was measured on others, or holds no digest of the weights.

    Example:
        >>> from peft_blueprint import generate_blueprint
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = tiny_llama(layers=1)
        >>> blueprint = generate_blueprint(model, toy_batches(examples=2), digest_weights=True, progress=False)
        >>> check_weights(blueprint, model)
    """
    written = blueprint.provenance.get(WEIGHTS_DIGEST)
    if not isinstance(written, str):
        raise MismatchError(
            f"The blueprint of {blueprint.model_id!r} has no {WEIGHTS_DIGEST} in its provenance. Measure it with "
            "generate_blueprint(..., digest_weights=True)."
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
            f"The blueprint of {blueprint.model_id!r} was measured on a model with other submodules than this one"
            f"{f', which also has {format_names(others)}: nothing will be placed there' if others else ''}. Measure this "
            "model to cover all of it.",
            stacklevel=3,
        )
    config = getattr(unwrap(model), "config", None)
    name, revision = getattr(config, "_name_or_path", "") or "", getattr(config, "_commit_hash", None)
    if not _is_repository(name) or not _is_repository(blueprint.model_id):
        return  # the name of a folder does not identify a model
    if name != blueprint.model_id:
        warnings.warn(
            f"The blueprint is of {blueprint.model_id!r}, but this model is {name!r}. If one was trained from the other, "
            "measure a probe of a few examples and compare with check_drift.",
            stacklevel=3,
        )
    elif None not in (revision, blueprint.model_revision) and revision != blueprint.model_revision:
        warnings.warn(
            f"The blueprint of {name!r} is of revision {blueprint.model_revision}, but this model is of revision "
            f"{revision}. Load that one, or measure a probe of a few examples and compare with check_drift.",
            stacklevel=3,
        )


def _is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()
