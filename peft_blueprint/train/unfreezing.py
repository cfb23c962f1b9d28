"""Unfrozen blocks without a second copy of them: what PEFT keeps of the base model for them is given back.

Knows PEFT's wrapper of whole modules, and nothing of how blocks were chosen.
"""

from __future__ import annotations

from itertools import chain

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .._text import format_names
from ..errors import PlacementError


def share_base(model: nn.Module, adapter_name: str = "default") -> int:
    """Let the trained copy of every unfrozen block stand for the frozen original as well, and release the original.

    PEFT's `modules_to_save`, which is how blocks are unfrozen, trains a copy and keeps the block it was copied from.
    Call this once, after `get_peft_model` or `PeftModel.from_pretrained`; the trained parameters stay the same objects,
    so an optimizer that has them is still right. Training, saving, loading, resuming and merging are as before.

    What it costs: `disable_adapter()` then no longer gives the base model back in these blocks but the trained ones,
    and so does `unload()`. Do not use it where the model with its adapter switched off is the reference, as in DPO or
    GRPO without a model or an adapter for it. An adapter that is added later starts from these blocks as they are then,
    and marked as trainable: if it is a reference, `model.set_requires_grad("ref", False)` keeps it out of optimizers.

    Args:
        model: with the adapter on it, whatever else it is wrapped in.
        adapter_name: of the adapter whose blocks are meant.

    Returns:
        Bytes released: of the originals' parameters and buffers, without those that something else still uses, such as
        a head tied to the embedding. 0 when it was done before.

    Raises:
        PlacementError: if the model has no unfrozen blocks, this adapter has none, or another adapter's copies already
            stand for the originals.
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if not wrappers:
        raise PlacementError(
            f"This {type(model).__name__} has no unfrozen blocks: nothing to release. Unfreeze some with "
            'BlueprintConfig(mode="lora+unfreeze") or PEFT\'s modules_to_save.'
        )
    own = {name: module for name, module in wrappers.items() if adapter_name in module.modules_to_save}
    if not own:
        known = sorted({adapter for module in wrappers.values() for adapter in module.modules_to_save})
        raise PlacementError(
            f"The adapter {adapter_name!r} has no unfrozen blocks in this {type(model).__name__}; {format_names(known)} has. "
            "Name that one."
        )
    taken = {
        name: adapter
        for name, module in own.items()
        for adapter, copy in module.modules_to_save.items()
        if adapter != adapter_name and copy is module.original_module
    }
    if taken:
        raise PlacementError(
            f"In {format_names(list(taken))} the blocks of the adapter {next(iter(taken.values()))!r} already stand for the "
            f"originals, so those of {adapter_name!r} cannot. Keep both copies."
        )
    before = _held(model)
    for module in own.values():
        module.original_module = module.modules_to_save[adapter_name]
    return before - _held(model)


def _held(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared storage counted once."""
    storages = {}
    for tensor in chain(model.parameters(), model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
