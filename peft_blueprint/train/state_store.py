"""Keep hidden states of examples in a memory-mapped file, within a byte budget."""

from __future__ import annotations

import mmap
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from .._text import first_line
from ..errors import BlueprintError


StateDtype = Literal["auto", "bfloat16", "int8"]

BLOCK = 64  # features that share a scale in 8 bits
_SCALE_BYTES = 2


@dataclass
class Entry:
    """Where an example's states lie.

    Args:
        offset: first byte in the file.
        tokens: number of tokens.
        depth: number of layers that these states have passed.
        positions: digest of the position ids that they were computed with.
    """

    offset: int
    tokens: int
    depth: int
    positions: bytes


class StateStore:
    """Hidden states by key, in a file that is memory-mapped to read and ends with this object.

    Nothing is evicted: an epoch visits every example once, so that replacing one entry by another cannot raise the
    number of hits.

    Args:
        budget: bytes that the file may take.
        dtype: "auto" stores states as they are, which is exact. "bfloat16" rounds float32 states. "int8" stores a
            byte for each feature, and a bfloat16 scale for each 64 (absolute maximum, as in arXiv:2110.02861): an error
            of at most 1/127 of the largest feature of the 64.
        folder: where the file is created; by default the system's folder for temporary files.

    Raises:
        BlueprintError: for an unknown dtype, or a folder that cannot be written or has less space than the budget.

    Example:
        >>> store = StateStore(budget=2**20)
        >>> store.put(b"key", torch.ones(3, 8), depth=2)
        True
        >>> store.get(b"key").shape, store.used
        (torch.Size([3, 8]), 96)
    """

    def __init__(self, budget: int, dtype: StateDtype = "auto", folder: str | Path | None = None) -> None:
        if dtype not in get_args(StateDtype):
            raise BlueprintError(f"dtype must be one of {', '.join(get_args(StateDtype))}, got {dtype!r}.")
        where = Path(folder or tempfile.gettempdir())
        try:
            free = shutil.disk_usage(where).free
            self._file = tempfile.TemporaryFile(prefix="frozen-prefix-", dir=where)
        except OSError as error:
            raise BlueprintError(f"The cache folder {where} cannot be used: {first_line(error)}.") from error
        if free < budget:
            self._file.close()
            raise BlueprintError(
                f"The cache may take {budget:,} bytes, and {where} has {free:,} free. Give a smaller budget, or another "
                "folder."
            )
        weakref.finalize(self, self._file.close)
        self.budget = budget
        self.dtype = dtype
        self.used = 0
        self.refused = 0
        self._entries: dict[bytes, Entry] = {}
        self._mapped = mmap.mmap(-1, 1)
        self._stored: torch.dtype | None = None  # of the states as they are given

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: bytes) -> Entry | None:
        """Return where a key's states are; None if they are not stored."""
        return self._entries.get(key)

    def put(self, key: bytes, states: Tensor, depth: int, positions: bytes = b"") -> bool:
        """Store states, in place of earlier ones of the same key.

        Args:
            key: digest of the example's content.
            states: (tokens, features), of one dtype and width in all calls.
            depth: number of layers that they have passed.
            positions: digest of their position ids.

        Returns:
            Whether they are stored; not if the budget, or the disk, is full.
        """
        self._stored = self._stored or states.dtype
        packed = self._pack(states.detach())
        entry = self._entries.get(key)
        offset = self.used if entry is None else entry.offset
        if entry is None and self.used + len(packed) > self.budget:
            self.refused += 1
            return False
        self._entries.pop(key, None)  # until its bytes are whole
        try:
            self._file.seek(offset)
            self._file.write(packed)
            self._file.flush()
        except OSError:  # the disk is full
            self.refused += 1
            return False
        self._width = states.shape[-1]
        self._entries[key] = Entry(offset, len(states), depth, positions)
        self.used = max(self.used, offset + len(packed))
        return True

    def get(self, key: bytes) -> Tensor:
        """Return a key's states: (tokens, features), in the dtype they were given in, on the CPU.

        Raises:
            KeyError: if they are not stored.
        """
        entry = self._entries[key]
        if len(self._mapped) < self.used:
            self._mapped = mmap.mmap(self._file.fileno(), self.used)
        assert self._stored is not None
        numbers = entry.tokens * self._width
        if self.dtype != "int8":
            kept = self._stored if self.dtype == "auto" else torch.bfloat16
            read = torch.frombuffer(self._mapped, dtype=kept, count=numbers, offset=entry.offset)
            return read.reshape(entry.tokens, self._width).to(self._stored, copy=True)
        padded = entry.tokens * _blocks(self._width)
        raw = torch.frombuffer(
            self._mapped, dtype=torch.uint8, count=padded * (BLOCK + _SCALE_BYTES), offset=entry.offset
        )
        scales = raw[: padded * _SCALE_BYTES].clone().view(torch.bfloat16).float()
        values = raw[padded * _SCALE_BYTES :].view(torch.int8).reshape(padded, BLOCK) * scales[:, None]
        return values.reshape(entry.tokens, -1)[:, : self._width].to(self._stored)

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
        self.used = self.refused = 0

    def close(self) -> None:
        """Forget all entries and give the file's space back."""
        self.clear()
        self._mapped = mmap.mmap(-1, 1)
        self._file.close()

    def _pack(self, states: Tensor) -> bytes:
        if self.dtype != "int8":
            kept = states if self.dtype == "auto" else states.to(torch.bfloat16)
            return kept.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        tokens, width = states.shape
        blocks = torch.nn.functional.pad(states.float(), (0, _blocks(width) * BLOCK - width)).reshape(-1, BLOCK)
        scales = (blocks.abs().amax(dim=1) / 127).to(torch.bfloat16)
        divisors = scales.float().clamp(min=torch.finfo(torch.bfloat16).tiny)[:, None]
        rounded = (blocks / divisors).round().clamp(-127, 127).to(torch.int8)
        parts = (scales.cpu().view(torch.uint8), rounded.cpu().view(torch.uint8))
        return b"".join(part.numpy().tobytes() for part in parts)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)
