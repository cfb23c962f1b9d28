"""The entry point `peft-blueprint VERB`, and the table from exception to message, next command and exit status."""

from __future__ import annotations

import errno
import sys
import warnings
from dataclasses import dataclass

import typer

from ..errors import BlueprintError, DriftError, MismatchError
from . import compare, data, measure, place, publish, runs  # noqa: F401 (importing them registers their verbs)
from .output import say
from .verbs import PANELS, app


__all__ = ["app", "main"]

app.registered_commands.sort(key=lambda command: PANELS.index(str(command.rich_help_panel)))
_VERBS = {command.name for command in app.registered_commands}


_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Click's, or the copy that newer Typers carry


@dataclass(frozen=True)
class Failure:
    """How one class of exceptions ends the program.

    Args:
        kind: the class; the first line of the table that fits is taken.
        status: exit status: 1 when the answer is "no" or the machine is too small, 2 for bad use.
        next: the command that helps, if any; `{verb}` is the verb that failed.
    """

    kind: type[BaseException]
    status: int
    next: str | None = None


FAILURES = (
    Failure(_UsageError, 2, "peft-blueprint {verb} --help"),
    Failure(DriftError, 1, "peft-blueprint compare LOCAL PUBLISHED"),
    Failure(MismatchError, 2, "peft-blueprint show SOURCE"),
    Failure(BlueprintError, 2),
    Failure(ModuleNotFoundError, 2, "pip install 'peft-blueprint[quant,plots,data,energy,carbon,privacy]'"),
    Failure(MemoryError, 1, "peft-blueprint plan MODEL --vram 12GiB"),
    Failure(OSError, 2),
)


def main() -> None:
    """Run the program: an expected error becomes one line on stderr, and the exit status of `FAILURES`.

    Example:
        >>> from unittest import mock
        >>> with mock.patch("sys.argv", ["peft-blueprint", "show", "missing.json"]):
        ...     main()
        Traceback (most recent call last):
        SystemExit: 2
    """
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        status = _fail(error)
    sys.exit(status or 0)


def _fail(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader has gone, as `head` does
        sys.stderr.close()
        return 0
    is_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    kind = MemoryError if is_memory else type(error)
    failure = next((failure for failure in FAILURES if issubclass(kind, failure.kind)), None)
    if failure is None:
        raise error  # a fault of this package, whose traceback a bug report needs
    verb = next((word for word in sys.argv[1:] if word in _VERBS), "")
    say(f"error: {_message(error)}")
    if failure.next is not None:
        say(f"next: {failure.next.format(verb=verb).replace('  ', ' ')}")
    return failure.status


def _message(error: Exception) -> str:
    if isinstance(error, _UsageError):
        return str(error.format_message()).replace("Value error, ", "")  # type: ignore[attr-defined]  # pydantic's
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip() or type(error).__name__
