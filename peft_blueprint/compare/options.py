"""Options that adapt a published blueprint to local data: domain, probe, drift check and blend; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .._options import require_types
from ..blueprint import Blueprint, domain_weights
from ..errors import BlueprintError, FormatError


Policy = Literal["warn", "error", "refresh", "coarsen"]

# On SmolLM2-135M two samples of 16 examples of the same data correlate at 0.90 to 0.99 on average, of different data at
# 0.75 to 0.88; docs/results/transfer.md has the table. The two overlap: near the threshold, probe more examples.
DRIFT_THRESHOLD = 0.85


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class ProbeOptions:
    """How a published blueprint and a probe on local data become the blueprint to place by (Algorithm 1, lines 1 and 2).

    Not frozen, because `BlueprintConfig` inherits the fields. Each field's help is in its metadata.

    Raises:
        BlueprintError: for an unknown policy, or a value out of range.

    Example:
        >>> ProbeOptions(domain={"math": 0.5, "code": 0.5}).blend_weight
        0.5
    """

    domain: str | Mapping[str, float] | None = _option(
        None,
        "Domain of the blueprint to use, such as bio; or weights over several, math=0.5,code=0.5. Default: the one that "
        "its norms are of.",
    )
    probe_examples: int = _option(32, "Examples of the local probe; 0 for no probe, given a blueprint.")
    blend_weight: float = _option(0.5, "Weight of the published blueprint in the blend, in [0, 1].")
    by_uncertainty: bool = _option(
        False, "Weight each entry also by the inverse variance of its two norms, so that uncertain norms count less."
    )
    rescale: bool = _option(
        True,
        "Bring the probe's norms to the size of the blueprint's before the blend; otherwise the blend is the paper's plain "
        "sum.",
    )
    drift_policy: Policy = _option(
        "warn",
        "What to do if the probe disagrees with the blueprint: warn and blend, error, refresh (the probe alone), or coarsen "
        "(blend groups or layers).",
    )
    drift_threshold: float = _option(
        DRIFT_THRESHOLD, "Rank correlation of probe and blueprint below which they disagree, in [-1, 1]."
    )

    def __post_init__(self) -> None:
        require_types(self, ProbeOptions, BlueprintError)
        if self.domain is not None:
            domain_weights(self.domain)
        if self.probe_examples < 0:
            raise BlueprintError(f"probe_examples must be at least 0, got {self.probe_examples}.")
        if not 0 <= self.blend_weight <= 1:
            raise BlueprintError(f"blend_weight must be in [0, 1], got {self.blend_weight}.")
        if self.drift_policy not in get_args(Policy):
            *others, last = get_args(Policy)
            raise BlueprintError(f"drift_policy must be {', '.join(others)} or {last}, got {self.drift_policy!r}.")
        if not -1 <= self.drift_threshold <= 1:
            raise BlueprintError(f"drift_threshold must be in [-1, 1], got {self.drift_threshold}.")


def probe_options(record: ProbeOptions, **changes: Any) -> ProbeOptions:
    """Return the options of a record that inherits them, such as a recipe, with changes.

    Example:
        >>> probe_options(ProbeOptions(domain="bio"), domain=None) == ProbeOptions()
        True
    """
    return ProbeOptions(**{f.name: getattr(record, f.name) for f in fields(ProbeOptions)} | changes)


def read_for_domain(source: str | Path, domain: str | Mapping[str, float] | None, **kwargs: Any) -> Blueprint:
    """Read a blueprint from a file, a folder or the Hub, for one domain or a mixture of several.

    A domain with a file of its own, as `publish(domain=…)` writes it beside others, is read from there. Otherwise, and for
    weights, the norms are those of the main blueprint's `domain_tags`.

    Args:
        source: see `Blueprint.from_pretrained`.
        domain: see `ProbeOptions`; None for the main blueprint as it is.
        **kwargs: of `Blueprint.from_pretrained`: `revision`, `checkpoint`, `token`, ….

    Raises:
        BlueprintError: as `Blueprint.from_pretrained`, and `MismatchError` for a domain without a file or tag.

    Example:
        >>> import tempfile
        >>> from peft_blueprint import Submodule
        >>> blueprint = Blueprint("org/model", (Submodule("attn.0", 2.0, domain_tags={"bio": 0.5}),), level="group")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_for_domain(blueprint.save(folder), "bio")["attn.0"].gradient_norm
        1.0
    """
    if isinstance(domain, str) and "=" not in domain and not Path(source).is_file():
        try:
            return Blueprint.from_pretrained(source, domain=domain, **kwargs)
        except FormatError:
            raise
        except BlueprintError:  # no such file, or the name cannot be one: it may be a tag
            pass
    blueprint = Blueprint.from_pretrained(source, **kwargs)
    return blueprint if domain is None else blueprint.for_domain(domain)
