"""The most memory held since one last looked: of GPUs, or of the process; for any number of readers at once.

Reading sets the system's own mark back, so that all readers there are share what is read. Knows nothing of what is held.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MARK = re.compile(rb"VmHWM:\s*(\d+) kB")
_PROCESS = -1  # in place of a GPU's index


class HighWater:
    """Reads the marks of some GPUs, as torch's allocator keeps them, or of the process's resident memory, as Linux does.

    Args:
        gpus: torch's indices of those to read; empty for the process.
    """

    def __init__(self, gpus: Sequence[int] = ()) -> None:
        self._places = tuple(gpus) or (_PROCESS,)
        self.missing = "nothing has run yet"  # why there is nothing to read; empty once there is
        self.source = "the process's resident memory"
        if gpus:
            self.source = f"torch's CUDA allocator, {len(gpus)} GPU{'s' * (len(gpus) > 1)}"

    def start(self) -> None:
        """Count from now on; nothing where it cannot be measured, which `missing` says then."""
        if _PROCESS in self._places and sys.platform != "linux":
            self.missing = "the peak of a process's memory can be read on Linux only"
            return
        _WAITING[self] = {}
        try:
            self.take()
            self.missing = ""
        except (OSError, ValueError) as error:
            self.missing = f"the system does not let the peak of the process's memory be set back ({error})"
            self.stop()

    def take(self) -> list[int]:
        """The most bytes since the last call, of each GPU or of the process; empty if it cannot be measured."""
        if self not in _WAITING:
            return []
        for place in {place for reader in _WAITING for place in reader._places}:
            peak = _read_and_set_back(place)
            for reader, marks in _WAITING.items():
                if place in reader._places:
                    marks[place] = max(marks.get(place, 0), peak)
        marks = _WAITING[self]
        _WAITING[self] = {}
        return [marks[place] for place in self._places]

    def stop(self) -> None:
        """Count no longer."""
        _WAITING.pop(self, None)


_WAITING: weakref.WeakKeyDictionary[HighWater, dict[int, int]] = weakref.WeakKeyDictionary()  # marks not yet taken


def _read_and_set_back(place: int) -> int:
    """Bytes."""
    if place == _PROCESS:
        with open(_STATUS, "rb", buffering=0) as status, open(_CLEAR, "wb", buffering=0) as clear:
            mark = _MARK.search(status.read())
            if mark is None:
                raise ValueError(f"{_STATUS} has no VmHWM")
            clear.write(b"5")  # proc(5): sets VmHWM back to what is resident now
        return int(mark[1]) * 1024
    peak = torch.cuda.max_memory_allocated(place)
    torch.cuda.reset_peak_memory_stats(place)
    return peak
