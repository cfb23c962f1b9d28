"""Resume work on a long stream: progress in one file, digests of the data, and the k best scores."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._files import replacing, require_writable
from .._processes import of_first_process
from ..errors import BlueprintError, FormatError, MismatchError


_HEADER = ("settings", "position", "digest", "notes")


class Progress:
    """Progress of a scan, in memory and optionally in a file that is replaced as a whole.

    Under several processes the first one reads and writes, and all see the same content.

    Args:
        path: file to continue from and to write; None keeps nothing.
        settings: JSON-compatible settings that a continued run must share.
        writes: whether this process writes.

    Raises:
        BlueprintError: if the file cannot be written.
        FormatError: if it is not a state file.
        MismatchError: if it was written under other settings.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None, writes: bool = True):
        self._path = path
        self.settings = json.loads(json.dumps(settings))
        self._writes = writes
        self.position = 0  # number of examples done
        self.digest = ""  # of these examples
        self.notes: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray] = {}
        if path is None:
            return
        found = of_first_process(_read(path) if writes else None)
        if isinstance(found, BlueprintError):
            raise found
        if found is None:
            return
        header, self.arrays = found
        theirs = header["settings"]
        if theirs != self.settings:
            keys = [key for key in {**theirs, **self.settings} if theirs.get(key) != self.settings.get(key)]
            changes = "; ".join(f"{key} was {theirs.get(key)!r} and is {self.settings.get(key)!r}" for key in keys)
            raise MismatchError(f"{path} holds the state of other work: {changes}. Give another path, or delete it.")
        self.position, self.digest, self.notes = header["position"], header["digest"], header["notes"]

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def add(self, example: Any) -> None:
        """Count one more example as done."""
        self.digest = extend_digest(self.digest, example) if self.is_kept else ""
        self.position += 1

    def save(self) -> None:
        """Replace the file.

        Raises:
            BlueprintError: if it cannot be written, or an example holds values that JSON cannot.
        """
        if self._path is None or not self._writes:
            return
        header = {name: getattr(self, name) for name in _HEADER}
        try:
            text = json.dumps(header).encode()
        except TypeError as error:
            raise BlueprintError(
                f"keep_state cannot store these examples: {error}. Use text, numbers and lists, or no keep_state."
            ) from error
        content = io.BytesIO()
        arrays: dict[str, Any] = {f"array_{key}": value for key, value in self.arrays.items()}
        np.savez(content, header=np.frombuffer(text, np.uint8), **arrays)
        with replacing(self._path) as file:
            file.write(content.getbuffer())


class TopK:
    """Keep the `count` highest scores of a stream, each with its position.

    Ties go to the earlier position. A position that is offered twice counts once, with its higher score. The result
    depends only on the scores offered, not on their order or on how often the stream was resumed.

    Args:
        count: how many to keep, at least 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise BlueprintError(f"count must be at least 1, got {count}.")
        self.count = count
        self._order: list[tuple[float, int]] = []  # (score, −position), the worst first
        self._kept: dict[int, tuple[float, Any]] = {}

    def __len__(self) -> int:
        return len(self._order)

    @property
    def next_out(self) -> int | None:
        """Position that the next better one replaces; None while there is room."""
        return -self._order[0][1] if len(self) == self.count else None

    def would_keep(self, score: float, index: int) -> bool:
        """Return whether `offer` would change the kept elements.

        Raises:
            BlueprintError: if the score is not finite or the position negative.
        """
        if not math.isfinite(score):
            raise BlueprintError(f"The score of element {index} must be finite, got {score}.")
        if index < 0:
            raise BlueprintError(f"A position must be at least 0, got {index}.")
        if index in self._kept:
            return score > self._kept[index][0]
        return len(self) < self.count or (score, -index) > self._order[0]

    def offer(self, score: float, index: int, payload: Any = None) -> bool:
        """Keep an element if it is among the best so far, and return whether it is.

        Args:
            score: higher is better.
            index: position in the stream, from 0.
            payload: kept with it; JSON-compatible if the state is stored.

        Raises:
            BlueprintError: if the score is not finite or the position negative.
        """
        if not self.would_keep(score, index):
            return False
        out = index if index in self._kept else self.next_out
        if out is not None:
            self.remove(out)
        bisect.insort(self._order, (score, -index))
        self._kept[index] = (score, payload)
        return True

    def score_of(self, index: int) -> float:
        """Return the score of a kept position."""
        return self._kept[index][0]

    def remove(self, index: int) -> None:
        """Forget a kept position and free its place."""
        score, _ = self._kept.pop(index)
        del self._order[bisect.bisect_left(self._order, (score, -index))]

    def ranked(self) -> list[tuple[int, float, Any]]:
        """Return (position, score, payload) of all that is kept, best first."""
        return [(-index, score, self._kept[-index][1]) for score, index in reversed(self._order)]

    def state(self) -> dict[str, Any]:
        """Return the content as JSON-compatible data."""
        return {"count": self.count, "kept": [list(one) for one in self.ranked()]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TopK:
        """Continue from the result of `state`.

        Raises:
            FormatError: if it is not a valid state.
        """
        try:
            best = cls(state["count"])
            for index, score, payload in state["kept"]:
                best.offer(score, index, payload)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"The kept top-k is not valid: {error}. Start anew.") from error
        if len(best) != len(state["kept"]):
            raise FormatError(
                f"The kept top-k is not valid: {len(state['kept'])} elements at {len(best)} positions. Start anew."
            )
        return best


def extend_digest(before: str, example: Any) -> str:
    """Return the digest of a stream with one more example, from the digest before it."""
    text = json.dumps(example, default=repr, sort_keys=True)
    return hashlib.sha256(f"{before}{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | BlueprintError | None:
    try:
        require_writable(path.parent)
    except BlueprintError as error:
        return BlueprintError(f"The state cannot be kept in {path}. {error}")
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            header = json.loads(found["header"].tobytes())
            arrays = {k.removeprefix("array_"): found[k] for k in found.files if k.startswith("array_")}
        if set(_HEADER) - set(header):
            raise ValueError(f"its header has {sorted(header)}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        return FormatError(f"{path} is not a state file to resume from: {error}. Give another path, or delete it.")
    return header, arrays
