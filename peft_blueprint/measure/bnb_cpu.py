"""4-bit weights on a CPU, kept in the form through which gradients pass.

On CPUs that multiply bfloat16, bitsandbytes (0.50) rearranges a 4-bit layer's weight in the first pass that it sees without
gradients in evaluation mode. From then on no gradient passes through the layer, not in training either and without a word,
and neither its values nor, where a row is no longer than a block of 64, its shape survive. Here layers are told not to,
and weights that were rearranged are put back; their scales stay rounded to bfloat16, as bitsandbytes left them.

Knows bitsandbytes' layers by their attributes. Knows nothing of what is computed with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


_SWITCH = "support_avx512bf16_for_cpu"  # whether a layer rearranges its weight


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Have no 4-bit layer rearrange its weight, for good, and put back what was rearranged.

    Returns:
        The layers that would have done so.
    """
    switched = [module for module in model.modules() if vars(module).get(_SWITCH)]
    for module in switched:
        setattr(module, _SWITCH, False)
        unpack(module.weight)
    return switched


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """`keep_unpacked` for a while."""
    switched = keep_unpacked(model)
    try:
        yield
    finally:
        for module in switched:
            setattr(module, _SWITCH, True)


def unpack(weight: Any) -> None:
    """Put a 4-bit weight that was rearranged back, in place; any other is left alone."""
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales: Tensor = state.absmax.T.float().reshape(-1)  # of one level: a second one is not made again
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax, weight.quant_state.nested = scales, False
