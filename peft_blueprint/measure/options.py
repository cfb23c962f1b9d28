"""Options of loading a model, of a measurement, and of the blueprint made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .._options import require_types
from ..blueprint import FIXED_COST, VARIABLE_COST, Level
from ..errors import MeasurementError


Include = Literal["adaptable", "all"]
Method = Literal["auto", "sketch", "exact"]

SKETCH_SIZE = 32
DAMPING = 0.1  # of each submodule's Fisher matrix, in mean eigenvalues
PROJECTION_SIZE = 251  # a prime, see `gradients.fold`


@dataclass(frozen=True)
class MeasureOptions:
    """How `measure_influence` measures.

    Raises:
        MeasurementError: for a value out of its range.

    Example:
        >>> MeasureOptions(method="exact").sketch_size
        32
    """

    max_examples: int | None = field(
        default=None, metadata={"help": "Number of examples to measure, over all processes; None for all."}
    )
    method: Method = field(
        default="auto",
        metadata={
            "help": "exact: exact norms, while statistics of the mean gradient stay estimates unless sketch_size is "
            "None. sketch: estimate norms from a sketch of every layer's input, at little more than the cost of the pass. auto: exact where it is nearly free, otherwise sketch."
        },
    )
    sketch_size: int | None = field(
        default=SKETCH_SIZE,
        metadata={
            "help": "Columns s of the sketch; a sketched norm has a relative error of at most sqrt(1/(2s)). None keeps "
            "whole mean gradients, in as much memory as the weights take in float32."
        },
    )
    projection_size: int = field(
        default=PROJECTION_SIZE,
        metadata={
            "help": "Numbers m kept of every example's gradient in every submodule, from which alignments are "
            "estimated; 4*m bytes each, best a prime. 0 keeps none."
        },
    )
    include: Include = field(
        default="adaptable",
        metadata={
            "help": "adaptable: weights that an adapter can be put on. all: embeddings, norms, biases and heads too."
        },
    )
    experts: bool = field(
        default=False,
        metadata={
            "help": "Measure every expert of fused experts as an entry of its own, and for each expert the share of tokens "
            "and the mean gate weight. No projections are kept."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sketches, projections and bootstrap resamples."})

    def __post_init__(self) -> None:
        require_types(self, type(self), MeasurementError)
        if self.max_examples is not None and self.max_examples < 1:
            raise MeasurementError(f"max_examples must be a positive integer or None, got {self.max_examples}.")
        for name, choices in (("method", Method), ("include", Include)):
            if getattr(self, name) not in get_args(choices):
                *others, last = get_args(choices)
                raise MeasurementError(f"{name} must be {', '.join(others)} or {last}, got {getattr(self, name)!r}.")
        if self.sketch_size is not None and self.sketch_size < 2:
            raise MeasurementError(
                f"sketch_size must be at least 2, or None to keep whole mean gradients, got {self.sketch_size}."
            )
        if self.sketch_size is None and self.method == "sketch":
            raise MeasurementError("method='sketch' needs a sketch_size, such as 32, got None.")
        if self.projection_size < 0:
            raise MeasurementError(f"projection_size must be at least 0, got {self.projection_size}.")


@dataclass(frozen=True)
class GenerateOptions(MeasureOptions):
    """How `generate_blueprint` measures and summarizes, and the blueprint's statements on its origin.

    Example:
        >>> GenerateOptions(bootstrap=200).max_examples
        64
    """

    max_examples: int | None = field(
        default=64,
        metadata={"help": "Number of examples to measure of each domain, over all processes; None for all."},
    )
    bootstrap: int = field(
        default=1000, metadata={"help": "Bootstrap resamples of the examples for the norms' 95 % intervals."}
    )
    fixed_cost: float = field(
        default=FIXED_COST, metadata={"help": "Cost of a frozen parameter, for k* (eq. 15); by default in bytes."}
    )
    variable_cost: float = field(
        default=VARIABLE_COST, metadata={"help": "Cost that training a parameter adds, in the unit of fixed_cost."}
    )
    level: Level = field(
        default="submodule",
        metadata={
            "help": "submodule; group for attention and feed-forward blocks as in the paper's example, with norms, intervals "
            "and exponents of all their members together; or layer."
        },
    )
    damping: float = field(
        default=DAMPING,
        metadata={
            "help": "Damping of the Fisher matrix that influence is computed with (appendix B.3), in mean eigenvalues of "
            "each submodule's matrix."
        },
    )
    digest_weights: bool = field(
        default=False,
        metadata={"help": "Write a digest of the weights' values, so that check_weights can compare them."},
    )
    model_id: str | None = field(
        default=None, metadata={"help": "Name of the model in the blueprint; by default the one it was loaded under."}
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the model in the blueprint; by default the commit it was loaded from."},
    )
    training_checkpoint: float = field(
        default=1.0, metadata={"help": "Share of the model's own training that was done, in (0, 1]; 1 when finished."}
    )
    data: str | Mapping[str, Any] | None = field(
        default=None, metadata={"help": "Name or description of the data, for the provenance."}
    )
    command: str | None = field(
        default=None, metadata={"help": "Command that reproduces the measurement, for the provenance."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in get_args(Level):
            raise MeasurementError(f"level must be submodule, group or layer, got {self.level!r}.")
        if not self.damping > 0:
            raise MeasurementError(f"damping must be positive, got {self.damping}.")


@dataclass(frozen=True)
class LoadOptions:
    """Which revision of a model is loaded, with which attention, and where to.

    Example:
        >>> LoadOptions(revision="v1.0").trust_remote_code
        False
    """

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code in the model's repository, for models that need it."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: eager, sdpa, flash_attention_2, …"}
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Device of the weights, such as cuda:1 or cpu; by default the first accelerator."},
    )
