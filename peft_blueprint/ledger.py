"""What a piece of work spent: seconds and peak memory, measured or said to be absent.

Measures the process and its accelerator; knows nothing of models.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Spent:
    """Filled in when the work is done.

    Args:
        seconds: wall-clock time.
        peak_bytes: the most memory held at once: of the accelerator if there is one, else of the whole process (on
            Linux); None where it cannot be measured.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def ledger() -> Iterator[Spent]:
    """Measure what happens inside the `with`."""
    spent = Spent()
    can_measure = _reset_peak()
    start = time.perf_counter()
    try:
        yield spent
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.seconds = time.perf_counter() - start
        spent.peak_bytes = _peak() if can_measure else None


def _reset_peak() -> bool:
    """Start the peak anew; whether that could be done."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset VmHWM to the present resident size
    except OSError:
        return False
    return True


def _peak() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
