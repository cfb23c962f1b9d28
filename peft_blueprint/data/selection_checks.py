"""What may be asked when examples are to be chosen: each wish is checked before anything is measured.

Knows nothing of how examples are scored.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, get_args

import torch
from torch import nn

from .._text import format_names
from ..errors import BlueprintError, MismatchError
from ..measure import find_submodules, is_sharded, unwrap
from ..place import Placement
from .coresets import MOST_POINTS
from .examples import pad_token_of
from .methods import ITERATIVE, FeatureKind
from .pool import Candidate, Pool
from .predictor import MEASURED
from .scoring import METHODS, Method


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


EMPTY_TARGET = "The target set is empty: give target=…, a few dozen examples of what is wanted."


def method_of(name: str, has_target: bool) -> Method:
    """A method by its name; "iterative" takes predicted alignment where there is a target, else predicted norms.

    Raises:
        BlueprintError: for an unknown name.
    """
    if name == ITERATIVE:
        return METHODS["predicted_alignment" if has_target else "predicted_norm"]
    if name not in METHODS:
        raise BlueprintError(f"There is no method {name!r}: choose from {', '.join([*METHODS, ITERATIVE])}.")
    return METHODS[name]


def check_wish(
    method: Method,
    name: str,
    *,
    has_model: bool,
    has_target: bool,
    has_submodules: bool,
    length: int | None,
    is_kept: bool,
    numbers: Mapping[str, int],
    seed: int,
    features: str,
) -> None:
    """Raise BlueprintError for what a method lacks or cannot do, for options out of range."""
    if method.uses_target and not has_target:
        raise BlueprintError(f"method={name!r} needs examples of what is wanted: give target=…, a few dozen of them.")
    if method.uses_model and not has_model:
        raise BlueprintError(f"method={name!r} asks the model: give one, not None.")
    if has_submodules and not method.uses_model:
        raise BlueprintError(
            f"method={name!r} uses no gradients, and hence no submodules: give no placement and no submodules, or take "
            "another method."
        )
    if length is None and (method.needs_all or name == ITERATIVE):
        raise BlueprintError(
            f"method={name!r} must know all examples at once, and this is a stream. Give a list or a datasets.Dataset, or "
            "take another method."
        )
    if method.coreset == "facility" and length is not None and length > MOST_POINTS:
        raise BlueprintError(
            f"method={name!r} looks at every pair of examples, and takes at most {MOST_POINTS:,}, not {length:,}. Choose "
            "some first, by chance or by score, or take coreset_k_centre."
        )
    if is_kept and name in (ITERATIVE, "bm25"):
        raise BlueprintError(f"method={name!r} cannot be resumed: give no keep_state.")
    if whole("seed", seed) < 0:
        raise BlueprintError(f"seed={seed}: give a whole number from 0.")
    for option, value in numbers.items():
        if whole(option, value) < 1:
            raise BlueprintError(f"{option}={value}: give at least 1.")
    if method.is_predicted and numbers["small"] < MEASURED:
        raise BlueprintError(
            f"small={numbers['small']} examples are too few to learn from: measure at least {MEASURED}."
        )
    if features not in get_args(FeatureKind):
        raise BlueprintError(f"features={features!r}: choose from {', '.join(get_args(FeatureKind))}.")


def whole(option: str, value: object) -> int:
    """A whole number.

    Raises:
        BlueprintError: if it is none, such as 2.5, True or a text.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise BlueprintError(
            f"{option}={value!r} is a {type(value).__name__} and no whole number: give one, such as 1000."
        ) from error


def wanted_of(length: int | None, fraction: float | None, count: int | None) -> int:
    """How many examples to choose: of a fraction the whole part, and at least one.

    Args:
        length: of the data; None of a stream.
        fraction: q, (0, 1].
        count: or how many.

    Raises:
        BlueprintError: for both or neither, one out of range, or a fraction of a stream.
    """
    if (fraction is None) == (count is None):
        raise BlueprintError(f"fraction={fraction}, count={count}: give one of the two.")
    if count is not None:
        wanted = whole("count", count)
        if wanted < 1:
            raise BlueprintError(f"count={count} keeps nothing: give at least 1.")
        return wanted
    if isinstance(fraction, bool) or not isinstance(fraction, Real):
        raise BlueprintError(
            f"fraction={fraction!r} is a {type(fraction).__name__} and no share to keep: give a number above 0, and 1 at "
            "most."
        )
    if not 0 < fraction <= 1:
        raise BlueprintError(f"fraction={fraction} is not a share to keep: give one above 0, and 1 at most.")
    if length is None:
        raise BlueprintError("A stream has no known length to take a fraction of: give count=… instead.")
    return max(1, int(float(fraction) * length + 1e-9))


def names_of(
    model: nn.Module | None, placement: Placement | None, submodules: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The submodules whose gradients count, in the model's order; None for all.

    Raises:
        BlueprintError: for both a placement and names, or for none at all.
        MismatchError: for a name that the model lacks.
    """
    if placement is None and submodules is None:
        return None
    if placement is not None and submodules is not None:
        raise BlueprintError("Both a placement and submodules were given: give one of the two.")
    if isinstance(submodules, str):
        raise BlueprintError(f"submodules={submodules!r} is one name: give a list, [{submodules!r}].")
    if model is None:
        raise BlueprintError("Submodules were given and no model that has them: give the model.")
    every = [submodule.name for submodule in find_submodules(model)]
    wanted = set(submodules or ()) if placement is None else set(placement.lora)
    blocks = () if placement is None else placement.unfreeze
    empty = [block for block in blocks if not any(_is_in(name, block) for name in every)]
    missing = sorted(wanted - set(every)) + empty
    names = tuple(name for name in every if name in wanted or any(_is_in(name, block) for block in blocks))
    if missing or not names:
        raise MismatchError(
            f"{len(missing)} of {len(wanted) + len(blocks)} submodules are not in this model "
            f"({format_names(missing) or 'none was named'}), which has {format_names(every)}. Give a placement made for this model, or "
            "names of its submodules."
        )
    return names


def encoded(pool: Pool) -> list[Candidate]:
    """All examples of a small set that have a target.

    Raises:
        BlueprintError: if there are none, or none has.
    """
    found, given = [], 0
    for index, example in pool:
        given = index + 1
        if (one := pool.candidate(index, example)) is not None:
            found.append(one)
    if not given:
        raise BlueprintError(EMPTY_TARGET)
    if not found:
        raise BlueprintError(
            "No example of the target set has a target token within the maximum length. Give others, or raise max_length."
        )
    return found


def padding_of(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id that fills a batch; it is masked out in any case."""
    if tokenizer is not None:
        return pad_token_of(tokenizer)
    config = None if model is None else getattr(unwrap(model), "config", None)
    return getattr(config, "pad_token_id", None) or 0


def digest_of_model(model: nn.Module) -> str:
    """Tells a model from another, and from itself trained further, by names, shapes and the first numbers of each weight
    that is there.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not (parameter.is_meta or is_sharded(parameter)):
            digest.update(parameter.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _is_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")
