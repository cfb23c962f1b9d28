"""The number of torch.distributed processes, and a value shared from the first."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def process_count() -> int:
    """How many processes torch.distributed has brought together; 1 where it was not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_first_process(value: Any) -> Any:
    """What the first process gives, on all of them; every process must ask."""
    said = [value]
    if process_count() > 1:
        dist.broadcast_object_list(said, src=0)
    return said[0]
