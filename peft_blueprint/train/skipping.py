"""What a recipe skips of a training step: the adapters' work on prompts, and layers below that no longer change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Protocol, TypeVar, get_type_hints

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .._options import check_fields
from ..errors import BlueprintError
from ..measure import Row
from .answer_only import answer_only
from .freezing import FreezeFromBelow
from .frozen_prefix import CacheFrozenPrefix
from .invocation import find_invocation_tokens
from .prompt_cache import PromptCache


_NOT_IN_A_FILE = ("return", "trainer", "workload")
Made = TypeVar("Made")

_ANSWER_ONLY = {"invocation": str, "turns": str, "cache": str | int, "folder": str}
_CALLBACKS: dict[str, type[FreezeFromBelow] | type[CacheFrozenPrefix]] = {
    "freeze_from_below": FreezeFromBelow,
    "cache_frozen_prefix": CacheFrozenPrefix,
}


class Skipping(Protocol):
    """The keys of a recipe that are read here."""

    answer_only: Mapping[str, Any] | None
    freeze_from_below: Mapping[str, Any] | None
    cache_frozen_prefix: Mapping[str, Any] | None
    lora: Mapping[str, Any]

    @property
    def mode(self) -> str:
        """As of the placement."""


def check_skipping(recipe: Skipping) -> None:
    """Check types, values, and whether keys contradict each other.

    Raises:
        BlueprintError: naming the key.
    """
    callbacks_of(recipe)
    if (given := recipe.answer_only) is None:
        return
    check_fields(_ANSWER_ONLY, given, "answer_only")
    if given.get("turns", "last") not in ("last", "every"):
        raise BlueprintError(f"answer_only: turns must be last or every, got {given['turns']!r}.")
    if "cache" in given:
        _naming("answer_only: cache", lambda: PromptCache(given["cache"]))
    elif "folder" in given:
        raise BlueprintError("answer_only: folder is where prompts are kept: give cache too, the bytes they may take.")
    if recipe.mode != "lora":
        raise BlueprintError(
            f"answer_only trains adapters that leave prompts alone, and mode: {recipe.mode} trains blocks on prompts too. "
            "Choose mode: lora, or leave answer_only out."
        )
    if "alora_invocation_tokens" in recipe.lora:
        raise BlueprintError("answer_only finds the invocation tokens: leave lora: alora_invocation_tokens out.")
    if recipe.cache_frozen_prefix is not None:
        raise BlueprintError(
            "answer_only and cache_frozen_prefix both keep states of earlier epochs: give one, such as answer_only: "
            "{cache: 4GiB}."
        )


def activation_of(recipe: Skipping, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the fields of `LoraConfig` that `answer_only` needs.

    Raises:
        BlueprintError: if the tokenizer has no invocation tokens, see `find_invocation_tokens`.
    """
    if recipe.answer_only is None:
        return {}
    find = partial(find_invocation_tokens, tokenizer, recipe.answer_only.get("invocation"))
    return {"alora_invocation_tokens": _naming("answer_only: invocation", find)}


def skip_prompts(model: PeftModel, recipe: Skipping) -> None:
    """Make the model's training steps skip prompts, if the recipe asks for it.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama
        >>> from peft_blueprint.train import Recipe
        >>> model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[7]))
        >>> skip_prompts(model, Recipe("org/model", "train.jsonl", "adapter", answer_only={"cache": "1GiB"}))
    """
    if (given := recipe.answer_only) is not None:
        cache = PromptCache(given["cache"], given.get("folder")) if "cache" in given else None
        answer_only(model, turns=given.get("turns", "last"), cache=cache)


def callbacks_of(recipe: Skipping) -> list[TrainerCallback]:
    """Return the callbacks that the recipe asks for.

    Raises:
        BlueprintError: for an unknown key or a wrong value.

    Example:
        >>> from peft_blueprint.train import Recipe
        >>> recipe = Recipe("org/model", "train.jsonl", "adapter", freeze_from_below={"schedule": "1:2"})
        >>> [type(callback).__name__ for callback in callbacks_of(recipe)]
        ['FreezeFromBelow']
    """
    callbacks: list[TrainerCallback] = []
    for key, callback in _CALLBACKS.items():
        if (given := getattr(recipe, key)) is not None:
            hints = get_type_hints(callback.__init__)
            check_fields({name: hint for name, hint in hints.items() if name not in _NOT_IN_A_FILE}, given, key)
            callbacks.append(_naming(key, partial(callback, **given)))
    return callbacks


def workload_of(recipe: Skipping, rows: Sequence[Row], length: int, epochs: float) -> dict[str, Any]:
    """Return the fields of `Workload` that follow from what is skipped.

    Args:
        recipe: the run.
        rows: training examples.
        length: of the workload's example, in tokens.
        epochs: passes over the data.
    """
    cached = recipe.cache_frozen_prefix is not None or "cache" in (recipe.answer_only or {})
    fields: dict[str, Any] = {"epochs": max(1, round(epochs))} if cached else {}
    if recipe.answer_only is not None:
        shares = [
            next(i for i, label in enumerate(row["labels"]) if label != -100) / len(row["labels"]) for row in rows
        ]
        fields |= {"answer_only": True, "prompt": min(length - 1, max(1, round(fmean(shares) * length)))}
    return fields


def _naming(key: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except BlueprintError as error:
        raise BlueprintError(f"{key}: {error}") from error
