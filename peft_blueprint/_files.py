"""Files written whole or not at all: beside the old one, then moved into its place.

Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import BlueprintError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the `with` ends without an error; until then nobody sees it.

    It keeps the permissions of the file that it replaces. Folders above it are made.

    Raises:
        BlueprintError: if the folder cannot be made or written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BlueprintError(
            f"{path} cannot be written: {error.strerror}. Choose a folder you may write to."
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, then move it there, so that a reader sees the old one or the new one.

    Raises:
        BlueprintError: if the folder cannot be made or written.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def require_writable(folder: Path) -> None:
    """Raise BlueprintError now, rather than after the work, if nothing could be written to `folder`; makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise BlueprintError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
