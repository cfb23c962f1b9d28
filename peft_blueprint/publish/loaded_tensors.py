"""Translate names in a model's files into the names that the model has once transformers has loaded it."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedModel

from .._text import first_line
from ..blueprint import Blueprint
from ..errors import BlueprintError
from ..measure import empty_model
from .stored_tensors import Shape, Tensors


def as_loaded(blueprint: Blueprint, tensors: Tensors, folder: Path) -> tuple[Blueprint, Tensors]:
    """Return a blueprint and stored tensors, both under the names of the loaded model.

    Files may spell, split or stack weights otherwise than the model, and hold a tied weight once. transformers registers
    the conversions for each class; the class is the one that the folder's `config.json` names.

    Args:
        blueprint: of the model, perhaps measured with another version of transformers.
        tensors: dtype and shape by name; None for unknown ones.
        folder: with the model's `config.json`; code in it is not run.

    Raises:
        BlueprintError: if transformers cannot build the model.

    Example:
        >>> import tempfile
        >>> from peft_blueprint.blueprint import Submodule
        >>> from peft_blueprint.testing import tiny_mixtral
        >>> stored = {f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight": ("F32", (32, 24)) for i in range(4)}
        >>> blueprint = Blueprint("org/model", (Submodule("model.layers.0.mlp.experts.down_proj", 1.0),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tiny_mixtral().save_pretrained(folder)
        ...     blueprint, loaded = as_loaded(blueprint, stored, Path(folder))
        >>> loaded["model.layers.0.mlp.experts.down_proj"]
        ('F32', (4, 32, 24))
    """
    try:
        model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # a model's class may raise anything for a config that does not suit it
        raise BlueprintError(f"transformers cannot build a model from {folder}: {first_line(error)}.") from error
    names = _LoadedNames(cast(PreTrainedModel, model))
    return names.of_blueprint(blueprint), names.of_tensors(tensors)


class _LoadedNames:
    """The conversions of a model's class, which may remember the names that they were asked for before."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = model.base_model_prefix + "."
        self._shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        conversions = _conversions_of(model)
        self._renamings = [conversion for conversion in conversions if not hasattr(conversion, "operations")]
        self._converters = [conversion for conversion in conversions if hasattr(conversion, "operations")]
        places = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            places[id(parameter)].append(name)
        self._tied = [names for names in places.values() if len(names) > 1]
        self._computed = self._shapes.keys() & set(getattr(model, "_keys_to_ignore_on_save", None) or ())

    def of_tensors(self, tensors: Tensors) -> Tensors:
        """Return tensors by their names in the model; converted ones have the shape of the model's parameter."""
        loaded: dict[str, tuple[str, Shape] | None] = dict.fromkeys(self._computed)
        for stored in sorted(tensors):  # transformers' order, on which some conversions depend
            names, is_converted = self._names(stored)
            for name in names:
                found = tensors[stored]
                if found is not None and is_converted:
                    found = found[0], self._shapes.get(name, found[1])
                loaded[name] = found
        for names in self._tied:
            held = next((name for name in names if name in loaded), None)
            loaded |= dict.fromkeys(names, loaded[held]) if held is not None else {}
        return loaded

    def of_blueprint(self, blueprint: Blueprint) -> Blueprint:
        """Return a blueprint with its entries renamed."""
        entries = (dataclasses.replace(entry, name=self._entry(entry.name)) for entry in blueprint)
        return dataclasses.replace(blueprint, submodules=tuple(entries))

    def _entry(self, name: str) -> str:
        for ending in (".weight", ""):
            (loaded, *_), _ = self._names(name + ending)
            if loaded in self._shapes:
                return loaded.removesuffix(ending)
        return name

    def _names(self, stored: str) -> tuple[list[str], bool]:
        """Return the names of a stored tensor in the model, and whether it is more than renamed."""
        name = stored
        for conversion in self._renamings:
            name, _ = conversion.rename_source_key(name)
        for converter in self._converters:
            converted, pattern = converter.rename_source_key(name)
            if pattern is not None and (self._spelled(converted) in self._shapes or stored not in self._shapes):
                first, *_ = targets = converter.target_patterns
                return [self._spelled(converted.replace(first, target)) for target in targets], True
        known = self._spelled(name)
        return [known if known in self._shapes or stored not in self._shapes else stored], False

    def _spelled(self, name: str) -> str:
        """Return a name as the model has it, with or without the prefix of its base model."""
        spellings = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((spelling for spelling in spellings if spelling in self._shapes), name)


def _conversions_of(model: PreTrainedModel) -> list[Any]:
    """Return transformers' operations on stored tensors, in its order; converters have `operations`, renamings do not."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return [_Renaming(getattr(model, "_checkpoint_conversion_mapping", {}))]
    return list(get_model_conversion_mapping(model))


@dataclasses.dataclass(frozen=True)
class _Renaming:
    """The renaming of a class in transformers 4: the first pattern that is found is replaced."""

    replacements: dict[str, str]

    def rename_source_key(self, name: str) -> tuple[str, str | None]:
        found = ((re.subn(pattern, new, name), pattern) for pattern, new in self.replacements.items())
        return next(((renamed, pattern) for (renamed, count), pattern in found if count), (name, None))
