"""Write files atomically: a new file beside the old one, moved into its place when it is complete."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import BlueprintError


_OPEN_FILES = Path("/proc/self/fd")


@contextmanager
def replacing(path: Path, expected: os.stat_result | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the `with` ends without an error; until then nobody sees it.

    It keeps owner, permissions and extended attributes of the file that it replaces. Folders above it are made. On Linux
    it has no name before it is whole, so a process that is killed leaves nothing beside `path`; elsewhere
    `remove_leftovers` removes it.

    Args:
        path: of the file.
        expected: status of the file that may be replaced; by default any.

    Raises:
        BlueprintError: if the folder cannot be made or written, or the file is not the `expected` one any more or cannot
            keep its owner; what was there is untouched.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, is_named = _open_new(part, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                if path.exists():
                    _keep_attributes(path, part if is_named else _OPEN_FILES / str(handle), expected is not None)
                if not is_named:
                    _name(handle, part)
            if expected is not None and not _is_still(path, expected):
                raise BlueprintError(
                    f"{path} was replaced or changed by another program meanwhile, and stays as that left it. Try again."
                )
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BlueprintError(
            f"{path} cannot be written: {error.strerror or error}. What was there is unchanged. Choose a folder you may "
            "write to."
        ) from error


def write_atomically(path: Path, content: str | bytes, expected: os.stat_result | None = None) -> None:
    """Write a file beside `path`, then move it there, so that a reader sees the old one or the new one.

    Raises:
        BlueprintError: as `replacing`.
    """
    with replacing(path, expected) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_leftovers(path: Path) -> None:
    """Remove what `replacing` left beside `path` in a process that was killed; nobody may be replacing it now."""
    leftover = re.compile(rf"\.{re.escape(path.name[:40])}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if leftover.fullmatch(name):
                path.with_name(name).unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raise BlueprintError now, rather than after the work, if nothing could be written to `folder`; makes nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise BlueprintError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error


def _open_new(part: Path, mode: int) -> tuple[int, bool]:
    """Create a file and return its handle, and whether it is named `part` already."""
    if hasattr(os, "O_TMPFILE") and _OPEN_FILES.exists():
        try:
            return os.open(part.parent, os.O_TMPFILE | os.O_RDWR, mode & 0o666), False
        except OSError:  # a file system without it
            pass
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode & 0o666), True


def _name(handle: int, part: Path) -> None:
    folder = os.open(part.parent, os.O_RDONLY)
    try:  # with a folder's handle os.link follows the link in /proc
        os.link(_OPEN_FILES / str(handle), part.name, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _keep_attributes(old: Path, new: Path, must_keep_owner: bool) -> None:
    status, own = old.stat(), new.stat()
    if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (own.st_uid, own.st_gid):
        try:
            os.chown(new, status.st_uid, status.st_gid)
        except PermissionError as error:
            if must_keep_owner:
                raise BlueprintError(
                    f"{old} belongs to user {status.st_uid} and group {status.st_gid}, which a file that you write anew "
                    "cannot. Copy it first, or let its owner do it."
                ) from error
    shutil.copystat(old, new)
    os.utime(new)


def _is_still(path: Path, expected: os.stat_result) -> bool:
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    keys = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    return all(getattr(status, key) == getattr(expected, key) for key in keys)
