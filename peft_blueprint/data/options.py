"""Define the options of `select_examples` and the table of methods to choose from."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import BlueprintError


Precondition = Literal["none", "adam", "blocks"]
Similarity = Literal["cosine", "dot"]
FeatureKind = Literal["model", "tokens"]

ITERATIVE = "iterative"
Q_STAR = "q_star"
DEFAULT_METHOD = "random"  # no method was found to win at the same total cost
SCORE_COLUMNS = ("selection_score", "selection_index")
MIN_MEASURED = 16  # the fewest examples that a predictor can learn from
MAX_FACILITY_POINTS = 50_000  # facility location compares every pair

_MINIMA = {
    "small": 1,
    "epochs": 1,
    "iterations": 1,
    "train_steps": 1,
    "batch_size": 1,
    "state_every": 1,
    "max_length": 2,  # the first token has no prediction, so a shorter example has no target
    "seed": 0,
}


@dataclass(frozen=True)
class Method:
    """A way to score examples.

    Args:
        measure: quantity behind the score: "random", "length", "loss", "norm", "alignment", "points", "bm25" or
            "head_norm", which is of single tokens.
        sign: 1 to keep the highest scores, -1 to keep the lowest.
        is_predicted: measure a few examples and predict the others.
        coreset: algorithm that chooses among points, "k_centre" or "facility".
    """

    measure: str
    sign: int = 1
    is_predicted: bool = False
    coreset: str | None = None

    @property
    def uses_model(self) -> bool:
        """Whether scoring runs the model."""
        return self.measure not in ("random", "length", "bm25")

    @property
    def uses_target(self) -> bool:
        """Whether scoring compares with target examples."""
        return self.measure in ("alignment", "bm25")

    @property
    def needs_all(self) -> bool:
        """Whether all examples must be read before one is scored or chosen."""
        return self.coreset is not None or self.measure == "bm25"

    @property
    def adds_up(self) -> bool:
        """Whether scores are gains that add up over examples and the highest are kept, as q* needs."""
        return self.measure in ("norm", "alignment", "loss") and self.sign > 0

    @property
    def scores_tokens(self) -> bool:
        """Whether it can score single target tokens."""
        return not self.needs_all and self.measure != "length"


METHODS: Mapping[str, Method] = {
    "random": Method("random"),
    "predicted_norm": Method("norm", is_predicted=True),
    "predicted_alignment": Method("alignment", is_predicted=True),
    "norm": Method("norm"),
    "norm_low": Method("norm", sign=-1),
    "alignment": Method("alignment"),
    "loss": Method("loss"),
    "loss_low": Method("loss", sign=-1),
    "length": Method("length"),
    "length_short": Method("length", sign=-1),
    "bm25": Method("bm25"),
    "head_norm": Method("head_norm"),
    "coreset_k_centre": Method("points", coreset="k_centre"),
    "coreset_facility": Method("points", coreset="facility"),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SelectionOptions:
    """Options of `select_examples`; each field's help text describes it.

    Raises:
        BlueprintError: for an unknown method or choice, or a number out of range.

    Example:
        >>> options = SelectionOptions(fraction=0.3, method="loss")
        >>> options.resolve_count(50)
        15
    """

    fraction: float | Literal["q_star"] | None = _option(
        None,
        "Share of the examples to keep, in (0, 1]; or q_star, the share with the most summed score per cost of scoring and "
        "training (eq. 31), not for a stream.",
    )
    count: int | None = _option(None, "Number of examples to keep, instead of a fraction.")
    epochs: int = _option(
        1, "Epochs of training on the kept examples; q_star weighs their cost against that of scoring."
    )
    method: str = _option(DEFAULT_METHOD, f"How to score examples: {', '.join(METHODS)} or {ITERATIVE}.")
    columns: Mapping[str, str] | None = _option(
        None, "The data's own names of the columns prompt, completion, messages or text."
    )
    submodules: Sequence[str] | None = _option(
        None, "Names of the submodules whose gradients count, instead of a placement; all by default."
    )
    small: int = _option(64, "Number of examples to measure for a prediction.")
    features: FeatureKind = _option(
        "model",
        "Features that scores are predicted from: one forward pass of the model, which costs about half of measuring "
        "and ranks better, or the tokens alone.",
    )
    scorer_layers: int | None = _option(
        None, "Score with the model's first layers, final norm and head alone: cheaper, and less like the whole model."
    )
    similarity: Similarity = _option("cosine", "Similarity of an example's gradient with the target's.")
    precondition: Precondition = _option("none", "Preconditioning of the alignment, by submodule.")
    iterations: int = _option(2, "Rounds of the method iterative, with training in between.")
    train_steps: int = _option(16, "LoRA steps between two rounds, of batch_size examples each.")
    deduplicate: bool = _option(True, "Skip near-duplicates of chosen examples.")
    keep_state: str | Path | None = _option(
        None, "File that a killed run resumes from, to exactly the same selection; it stays when the run is done."
    )
    state_every: int = _option(1024, "Examples between two writes of the state file.")
    batch_size: int = _option(8, "Examples in a batch.")
    max_length: int = _option(512, "Tokens of an example; longer ones are cut.")
    seed: int = _option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        for name, least in _MINIMA.items():
            object.__setattr__(self, name, require_integer(name, getattr(self, name), least))
        for name in ("count", "scorer_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, require_integer(name, getattr(self, name), 1))
        if self.fraction is not None and self.fraction != Q_STAR:
            share: Any = self.fraction
            is_number = isinstance(share, Real) and not isinstance(share, bool)
            if not is_number or not 0 < share <= 1:
                raise BlueprintError(
                    f"fraction must be a number in (0, 1], got {share!r}; or 'q_star', the share with the most gain per cost."
                )
            object.__setattr__(self, "fraction", float(share))
        require_choice("method", self.method, [*METHODS, ITERATIVE])
        require_choice("features", self.features, get_args(FeatureKind))
        require_choice("similarity", self.similarity, get_args(Similarity))
        require_choice("precondition", self.precondition, get_args(Precondition))
        if isinstance(self.submodules, str):
            raise BlueprintError(f"submodules must be a list of names, got {self.submodules!r}.")

    def resolve_method(self, has_target: bool) -> Method:
        """Return the method by its name; "iterative" scores by predicted alignment with a target, or predicted norm."""
        if self.method == ITERATIVE:
            return METHODS["predicted_alignment" if has_target else "predicted_norm"]
        return METHODS[self.method]

    def resolve_count(self, length: int | None) -> int:
        """Return the number of examples to choose, at most; a fraction is rounded down, to at least one.

        Args:
            length: of the data; None for a stream.

        Raises:
            BlueprintError: for both or neither of fraction and count, or a fraction of a stream.
        """
        if (self.fraction is None) == (self.count is None):
            raise BlueprintError(f"Give either fraction or count, got fraction={self.fraction}, count={self.count}.")
        if self.count is not None:
            return self.count
        if length is None:
            raise BlueprintError(
                "A stream has no known length to take a fraction of. Give count=…, or use filter_stream."
            )
        if isinstance(self.fraction, str):
            return length
        assert self.fraction is not None
        return max(1, int(self.fraction * length + 1e-9))


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise BlueprintError if an option is not one of its choices."""
    if value not in choices:
        raise BlueprintError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def require_integer(name: str, value: object, least: int) -> int:
    """Return an option as an integer; raise BlueprintError if it is not one, or less than `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BlueprintError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).") from None
    if number < least:
        raise BlueprintError(f"{name} must be at least {least}, got {number}.")
    return number
