"""Keep 4-bit weights on a CPU in the layout through which gradients pass.

On CPUs that multiply bfloat16, bitsandbytes 0.50 repacks the weight of a 4-bit layer in its first pass in evaluation mode
without gradients. From then on no gradient passes through the layer, in training either, and without a warning. Its values
change, and so does its shape if a row is no longer than a block of 64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


_REPACKS = "support_avx512bf16_for_cpu"  # attribute of a layer that repacks its weight


def disable_cpu_repack(model: nn.Module) -> list[nn.Module]:
    """Stop all 4-bit layers from repacking their weights, and undo it where it has happened.

    Scales of a repacked weight stay rounded to bfloat16, as bitsandbytes left them.

    Returns:
        The layers that would have repacked.

    Example:
        >>> from peft_blueprint.testing import quantize, tiny_llama
        >>> layers = disable_cpu_repack(quantize(tiny_llama(layers=1), "nf4"))
        >>> len(layers)
        7
    """
    switched = [module for module in model.modules() if vars(module).get(_REPACKS)]
    for module in switched:
        setattr(module, _REPACKS, False)
        undo_cpu_repack(module.weight)
    return switched


def undo_cpu_repack(weight: Any) -> None:
    """Restore a repacked 4-bit weight in place; leave any other unchanged."""
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales: Tensor = state.absmax.T.float().reshape(-1)  # of one level: a second one is not restored
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax, weight.quant_state.nested = scales, False
