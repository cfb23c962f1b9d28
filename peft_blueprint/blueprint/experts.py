"""Names of single experts: `model.layers.3.mlp.experts.17.gate_up_proj` is number 17 of a fused parameter."""

from __future__ import annotations

import re
from typing import NamedTuple


_EXPERT = re.compile(
    r"(?P<container>(?:.+\.)?(?!shared)\w*experts?)\.(?P<number>\d+)\.(?P<weight>[^.].*)", re.IGNORECASE
)
_CONTAINER = re.compile(r"(?P<container>(?:.+\.)?(?!shared)\w*experts?)\.(?P<weight>[^.]+)", re.IGNORECASE)


class ExpertName(NamedTuple):
    """The parts of an expert's name: the weight's name without the number, as of a fused parameter, and the number."""

    parameter: str
    number: int

    @property
    def container(self) -> str:
        """Name of the module that holds all experts, `model.layers.3.mlp.experts`."""
        match = _CONTAINER.match(self.parameter)
        assert match is not None
        return match["container"]


def split_expert(name: str) -> ExpertName | None:
    """Split the name of one expert's weight, fused or in a list of modules; None for any other name.

    Example:
        >>> split_expert("model.layers.3.mlp.experts.17.gate_up_proj")
        ExpertName(parameter='model.layers.3.mlp.experts.gate_up_proj', number=17)
        >>> split_expert("model.layers.3.mlp.experts.gate_up_proj") is None
        True
    """
    match = _EXPERT.fullmatch(name)
    return None if match is None else ExpertName(f"{match['container']}.{match['weight']}", int(match["number"]))


def name_expert(parameter: str, number: int) -> str | None:
    """Return the name of one expert of a fused parameter; None if the parameter is not held by a module of experts.

    Example:
        >>> name_expert("model.layers.3.mlp.experts.gate_up_proj", 17)
        'model.layers.3.mlp.experts.17.gate_up_proj'
    """
    match = _CONTAINER.fullmatch(parameter)
    return None if match is None else f"{match['container']}.{number}.{match['weight']}"
