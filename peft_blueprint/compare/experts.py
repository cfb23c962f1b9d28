"""Compare the experts of two blueprints: which ones two tasks share, and how their ranking drifts, layer by layer."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..blueprint import Blueprint, expert_scores, top_p_experts
from ..errors import MismatchError
from .drift import spearman


@dataclass(frozen=True)
class LayerOverlap:
    """The experts of one layer in two blueprints.

    Args:
        layer: name of the module that holds the experts.
        first: the fewest experts that hold the share `top_p` of the first blueprint's scores, the largest first.
        second: those of the second blueprint.
        experts: number of experts in the layer.
        correlation: Spearman's, of the scores of all experts; 0 where one side is constant.
    """

    layer: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    experts: int
    correlation: float

    @property
    def shared(self) -> tuple[int, ...]:
        """Experts in both sets, in ascending order."""
        return tuple(sorted(set(self.first) & set(self.second)))

    @property
    def jaccard(self) -> float:
        """Number of shared experts over the number in either set; 1 for two empty sets."""
        return _jaccard(len(self.shared), len(self.first), len(self.second))

    @property
    def chance(self) -> float:
        """Expected Jaccard index of two random sets of these sizes."""
        a, b = len(self.first), len(self.second)
        counts = np.arange(max(0, a + b - self.experts), min(a, b) + 1)
        likelihoods = stats.hypergeom.pmf(counts, self.experts, a, b)
        return float(sum(p * _jaccard(int(n), a, b) for n, p in zip(counts, likelihoods, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self) | {"shared": self.shared, "jaccard": self.jaccard, "chance": self.chance}


@dataclass(frozen=True)
class ExpertOverlap:
    """The experts of two blueprints, by layer.

    Args:
        layers: in the model's order.
        by: statistic that scores an expert.
        top_p: share of a layer's scores that the compared sets hold.
    """

    layers: tuple[LayerOverlap, ...]
    by: str
    top_p: float

    @property
    def jaccard(self) -> float:
        """Mean Jaccard index over layers."""
        return statistics.fmean(layer.jaccard for layer in self.layers)

    @property
    def chance(self) -> float:
        """Mean over layers of the index that random sets of the same sizes have."""
        return statistics.fmean(layer.chance for layer in self.layers)

    @property
    def correlation(self) -> float:
        """Mean over layers of the rank correlation."""
        return statistics.fmean(layer.correlation for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "by": self.by,
            "top_p": self.top_p,
            "jaccard": self.jaccard,
            "chance": self.chance,
            "correlation": self.correlation,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def compare_experts(first: Blueprint, second: Blueprint, by: str = "token_share", top_p: float = 0.9) -> ExpertOverlap:
    """Compare which experts two blueprints of one model rank highest, as ESFT compares tasks (arXiv:2407.01906).

    Args:
        first: blueprint of single experts, as `generate_blueprint(experts=True)` measures it, on one kind of data.
        second: likewise, on another kind.
        by: statistic that scores an expert, see `expert_scores`. Of another domain of a blueprint, `for_domain` keeps
            "gradient_norm" alone.
        top_p: share of a layer's scores that the compared sets hold, (0, 1].

    Raises:
        MismatchError: if a blueprint has no single experts, or the two name different ones.
        BlueprintError: for another statistic, one that an expert lacks, or `top_p` outside (0, 1].

    Example:
        >>> from peft_blueprint.blueprint import Submodule
        >>> def of(*shares):
        ...     names = [f"layers.0.mlp.experts.{i}.up_proj" for i in range(len(shares))]
        ...     pairs = zip(names, shares, strict=True)
        ...     return Blueprint("org/model", tuple(Submodule(n, 1.0, token_share=share) for n, share in pairs))
        >>> found = compare_experts(of(0.6, 0.3, 0.1, 0.0), of(0.6, 0.1, 0.3, 0.0))
        >>> found.layers[0].shared, round(found.jaccard, 3), round(found.chance, 3)
        ((0,), 0.333, 0.389)
    """
    scores = [expert_scores(blueprint, by) for blueprint in (first, second)]
    for blueprint, found in zip((first, second), scores, strict=True):
        if not found:
            raise MismatchError(
                f"The blueprint of {blueprint.model_id!r} has no single experts. Measure it with "
                "generate_blueprint(model, batches, experts=True)."
            )
    names = [{container: set(experts) for container, experts in found.items()} for found in scores]
    if names[0] != names[1]:
        differing = sorted(
            layer for layer in names[0].keys() | names[1].keys() if names[0].get(layer) != names[1].get(layer)
        )
        raise MismatchError(
            f"The blueprints of {first.model_id!r} and {second.model_id!r} name different experts in {len(differing)} "
            f"layers, such as {differing[0]!r}. Measure both on the same model."
        )
    layers = []
    for layer, of_first in scores[0].items():
        of_second = scores[1][layer]
        layers.append(
            LayerOverlap(
                layer=layer,
                first=top_p_experts(of_first, top_p),
                second=top_p_experts(of_second, top_p),
                experts=len(of_first),
                correlation=float(spearman(list(of_first.values()), [of_second[expert] for expert in of_first])),
            )
        )
    return ExpertOverlap(tuple(layers), by, top_p)


def _jaccard(shared: int, a: int, b: int) -> float:
    return shared / (a + b - shared) if a + b else 1.0
