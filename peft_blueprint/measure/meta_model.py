"""A model without its weights: names and shapes from a config alone, for planning before any download.

Knows nothing of blueprints or costs.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..errors import BlueprintError


def empty_model(source: str | PretrainedConfig, *, revision: str | None = None) -> nn.Module:
    """The model of a config, on the meta device: every name and shape, no weight.

    Args:
        source: a config, or where to read one: a folder or a repository on the Hub, of which only `config.json` is read.
        revision: branch, tag or commit of a repository.

    Returns:
        A model of the class that the config names, or a causal language model where it names none.

    Raises:
        BlueprintError: if there is no config, or transformers has no model for it.
    """
    config = source if isinstance(source, PretrainedConfig) else _config(source, revision)
    names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    try:
        with torch.device("meta"):
            if names:
                model = getattr(transformers, names[0])._from_config(config)
            else:
                model = AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        raise BlueprintError(
            f"transformers {transformers.__version__} builds no model from this {type(config).__name__} "
            f"({str(error).splitlines()[0]}). Load the model yourself and give it instead of its config."
        ) from error
    return model


def _config(source: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise BlueprintError(
            f"There is no model config in {source!r}: {str(error).strip().splitlines()[0]} Give a folder with a "
            "config.json, or a repository id such as 'org/model'."
        ) from error
