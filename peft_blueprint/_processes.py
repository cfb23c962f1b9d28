"""Count torch.distributed's processes and exchange Python objects between them.

These are torch.distributed's own collectives. Those of accelerate.utils return this process's value alone where
accelerate finds no `LOCAL_RANK`, or no accelerator and no `PartialState(cpu=True)`, even in an initialized group.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def process_count() -> int:
    """Return the number of processes; 1 if torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_first_process(value: Any) -> Any:
    """Return the value of the first process on every process, each of which must call this."""
    values = [value]
    if process_count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def of_every_process(value: Any) -> list[Any]:
    """Return the values of all processes by rank, on every process, each of which must call this."""
    values = [value] * process_count()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
