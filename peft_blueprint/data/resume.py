"""Work on a long stream that may be killed: what is known so far, in one file that is replaced whole.

Knows neither what is counted nor what is kept; numbers are read without running anything that the file could hold.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._files import replacing, require_writable
from .._processes import of_first_process
from ..errors import BlueprintError, FormatError, MismatchError


class Progress:
    """What is known so far, in memory and, if there is a path, in a file.

    Under several processes the first one reads and writes, and all know the same.

    Args:
        path: of the file; what is there is continued. None keeps nothing.
        settings: what must be the same for the work to be continued, as JSON can hold it.
        writes: whether this process writes.

    Raises:
        BlueprintError: if nothing could be written there.
        FormatError: if there is a file that is not of this kind.
        MismatchError: if it is of work with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], writes: bool = True):
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._writes = writes
        self.position = 0  # elements that are done
        self.digest = ""  # of these
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
        if theirs != self._settings:
            keys = [key for key in {**theirs, **self._settings} if theirs.get(key) != self._settings.get(key)]
            said = "; ".join(f"{key} was {theirs.get(key)!r} and is {self._settings.get(key)!r}" for key in keys)
            raise MismatchError(f"{path} holds the state of other work: {said}. Give another path, or delete it.")
        self.position, self.digest, self.notes = header["position"], header["digest"], header["notes"]

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def add(self, element: Any) -> None:
        """One more element is done."""
        self.digest = next_digest(self.digest, element) if self.is_kept else ""
        self.position += 1

    def save(self) -> None:
        """Replace the file, whole.

        Raises:
            BlueprintError: if it cannot be written, or an element holds what JSON cannot.
        """
        if self._path is None or not self._writes:
            return
        header = {
            "settings": self._settings,
            "position": self.position,
            "digest": self.digest,
            "notes": self.notes,
        }
        try:
            text = json.dumps(header).encode()
        except TypeError as error:
            raise BlueprintError(
                f"The state cannot be kept: {error}. Give examples of texts, numbers and lists, or no keep_state."
            ) from error
        content = io.BytesIO()
        arrays: dict[str, Any] = {f"array_{key}": value for key, value in self.arrays.items()}
        np.savez(content, header=np.frombuffer(text, np.uint8), **arrays)
        with replacing(self._path) as file:
            file.write(content.getbuffer())


class Seen:
    """Whether some elements of a stream are those that were there before.

    Args:
        positions: of them.
        expected: their digest; None where it is to be found.
    """

    def __init__(self, positions: Sequence[int], expected: str | None = None):
        self._awaited = sorted(positions, reverse=True)
        self._expected = expected
        self._total = len(self._awaited)
        self.digest = ""  # of those that came by

    @property
    def is_waiting(self) -> bool:
        """Whether some have not come by."""
        return bool(self._awaited)

    def see(self, position: int, element: Any) -> None:
        """One more element of the stream, whether it counts or not.

        Raises:
            MismatchError: if it is the last of those that count, and they are others.
        """
        if not self._awaited or position != self._awaited[-1]:
            return
        self._awaited.pop()
        self.digest = next_digest(self.digest, element)
        if not self._awaited:
            self.check()

    def check(self) -> None:
        """Raise MismatchError if those that count were not all there, or are others."""
        if self._awaited or self._expected not in (None, self.digest):
            missing = f"{len(self._awaited)} of them are missing" if self._awaited else "they have changed"
            raise MismatchError(
                f"The {self._total} examples that were measured are not those of the kept state: {missing}. Give the same "
                "data in the same order, or start anew with another keep_state."
            )


def next_digest(before: str, element: Any) -> str:
    """The digest of a stream with one more element."""
    said = json.dumps(element, default=repr, sort_keys=True)
    return hashlib.sha256(f"{before}{said}".encode("utf-8", "surrogatepass")).hexdigest()


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
        if {"settings", "position", "digest", "notes"} - set(header):
            raise ValueError(f"its header has {sorted(header)}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        return FormatError(f"{path} holds no state to resume from: {error}. Give another path, or delete it.")
    return header, arrays
