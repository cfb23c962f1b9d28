"""Work on a long stream that may be killed: what is known so far, in one file that is replaced whole.

Knows neither what is counted nor what is kept; numbers are read without running anything that the file could hold.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .distributed import of_first_process
from .errors import BlueprintError, FormatError, MismatchError
from .files import replacing


class Progress:
    """What is known so far, in memory and, if there is a path, in a file.

    Under several processes the first one reads and writes, and all know the same.

    Args:
        path: of the file; what is there is continued. None keeps nothing.
        settings: what must be the same for the work to be continued, as JSON can hold it.
        writes: whether this process writes.

    Raises:
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


def next_digest(before: str, element: Any) -> str:
    """The digest of a stream with one more element."""
    said = json.dumps(element, default=repr, sort_keys=True)
    return hashlib.sha256(f"{before}{said}".encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | BlueprintError | None:
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
