"""Progress bars that cost nothing, and take no lock, when they are switched off."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any


class _NoBar:
    """Stand in for `tqdm`, which takes a lock that all processes share even with `disable=True`."""

    def __init__(self, iterable: Iterable[Any] = ()) -> None:
        self.iterable = iterable

    def __iter__(self) -> Any:
        return iter(self.iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        """Do nothing."""


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool, **settings: Any) -> Any:
    """Return `tqdm` over an iterable, or to update by hand; an object without output and lock if it is not shown.

    Args:
        iterable: to go over; None to call `update`.
        show: whether there is a bar.
        **settings: for `tqdm`: `total`, `desc`, `unit`, ….

    Example:
        >>> [item for item in progress_bar([1, 2], show=False)]
        [1, 2]
    """
    if not show:
        return _NoBar(iterable if iterable is not None else ())
    from tqdm.auto import tqdm

    return tqdm(iterable, **settings)
