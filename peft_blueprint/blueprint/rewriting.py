"""A large file written anew beside itself with another beginning, and moved into its place; a lock while that goes on.

Knows nothing of what is in the file.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from io import FileIO
from pathlib import Path

from ..errors import BlueprintError


# Bytes copied at once. Through memory is as fast as `cp`: what follows another beginning stands elsewhere in its pages,
# where copy_file_range, which moves whole pages or shares them, is slower.
_CHUNK = 1 << 20


def lock(file: FileIO, path: Path) -> None:
    """Keep other processes from taking this lock on the file until it is closed.

    Raises:
        BlueprintError: if one has it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlueprintError(f"{path} is being written by another process. Try again when it is done.") from error
    except OSError:  # a file system without locks
        return
    if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        raise BlueprintError(f"{path} was replaced by another process just now. Try again.")


def rewrite(file: FileIO, part: Path, path: Path, skipped: int, head: bytes, progress: bool) -> None:
    """Give `path` another beginning: `head` for its first `skipped` bytes; what follows is copied as it is.

    Args:
        file: `path`, opened for reading without a buffer.
        part: the file to write beside, which is not there yet.
        path: what it is moved to when it is complete and on the disk; permissions stay.
        skipped: bytes that `head` replaces.
        head: the new beginning.
        progress: whether to show a bar.

    Raises:
        BlueprintError: if the disk has no room for both.
        OSError: if it cannot be written; `path` is unchanged then, and `part` gone.
    """
    status = os.fstat(file.fileno())
    count = status.st_size - skipped
    free = shutil.disk_usage(path.parent).free
    if free < len(head) + count:
        raise BlueprintError(
            f"{path} is written anew beside itself, which takes {len(head) + count:,} bytes; its disk has {free:,} free. "
            "Make room first."
        )
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as target:
            _write_all(target, head)
            file.seek(skipped)
            _copy(file, target, count, f"Rewriting {path.name}", progress)
            os.fsync(target.fileno())
        os.chmod(part, stat.S_IMODE(status.st_mode))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _copy(source: FileIO, target: FileIO, count: int, what: str, progress: bool) -> None:
    """`count` bytes from one file to another."""
    from tqdm import tqdm

    buffer = memoryview(bytearray(min(_CHUNK, count)))
    with tqdm(total=count, unit="B", unit_scale=True, desc=what, disable=not progress) as bar:
        while count:
            copied = source.readinto(buffer[: min(_CHUNK, count)])
            if not copied:
                raise OSError("it became shorter while it was copied")
            _write_all(target, buffer[:copied])
            count -= copied
            bar.update(copied)


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
