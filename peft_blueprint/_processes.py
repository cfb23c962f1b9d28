"""Count torch.distributed's processes and exchange Python objects between them.

These are torch.distributed's own collectives. Those of accelerate.utils return this process's value alone where
accelerate finds no `LOCAL_RANK`, or no accelerator and no `PartialState(cpu=True)`, even in an initialized group.
"""

from __future__ import annotations

import sys
from typing import Any


def process_count() -> int:
    """Return the number of processes; 1 if torch.distributed is not initialized."""
    dist = _initialized()
    return 1 if dist is None else int(dist.get_world_size())


def process_rank() -> int:
    """Return this process's rank; 0 if torch.distributed is not initialized."""
    dist = _initialized()
    return 0 if dist is None else int(dist.get_rank())


def of_first_process(value: Any) -> Any:
    """Return the first process's value on every process; every process must call this."""
    values = [value]
    if process_count() > 1:
        _initialized().broadcast_object_list(values, src=0)
    return values[0]


def of_every_process(value: Any) -> list[Any]:
    """Return the values of all processes by rank, on every process; every process must call this."""
    values = [value] * process_count()
    if len(values) > 1:
        _initialized().all_gather_object(values, value)
    return values


def _initialized() -> Any:
    """Return torch.distributed if a process group exists; a process that did not import it has none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
