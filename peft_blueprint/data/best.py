"""The best few of a stream of any length: a bounded heap whose content can be stored, resumed and merged.

Knows numbers and positions, and nothing of what they say. The standard library alone.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BlueprintError, FormatError


class Best:
    """The `count` highest scores of all that were offered, each with the position of what it is of.

    Among equal scores the earlier position comes first. A position that is offered again counts once, with the highest
    of its scores. So what is kept depends only on what was offered: not on the order, on how often a stream was resumed,
    or on how it was divided among processes whose parts are then merged. Memory grows with `count` alone, time by
    log(count) an offer; a kept position whose score rises costs `count`.

    Args:
        count: how many to keep, at least 1.

    Raises:
        BlueprintError: for a count below 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise BlueprintError(f"count={count} keeps nothing: give a number from 1.")
        self.count = operator.index(count)
        self._heap: list[tuple[float, int]] = []  # (score, −position), the worst first
        self._kept: dict[int, tuple[float, Any]] = {}
        self._offered = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def offered(self) -> int:
        """How many offers were made in all, repeated ones included."""
        return self._offered

    @property
    def threshold(self) -> float:
        """The lowest score that is kept, below which nothing is taken; −∞ until `count` are there."""
        return self._heap[0][0] if len(self._heap) == self.count else -math.inf

    @property
    def last(self) -> int | None:
        """The position that the next better one takes the place of; None until `count` are there."""
        return -self._heap[0][1] if len(self._heap) == self.count else None

    def takes(self, score: float, index: int) -> bool:
        """Whether this offer would change what is kept; for what is dear to find out only of those that matter.

        Raises:
            BlueprintError: as `offer`.
        """
        score, index = _checked(score, index)
        if index in self._kept:
            return score > self._kept[index][0]
        return len(self._heap) < self.count or (score, -index) > self._heap[0]

    def offer(self, score: float, index: int, payload: Any = None) -> bool:
        """Keep this one if it is among the best so far.

        Args:
            score: higher is better.
            index: the position in the stream, from 0; it names the element.
            payload: kept beside it; such as JSON can hold, if the state is to be stored.

        Returns:
            Whether it changed what is kept.

        Raises:
            BlueprintError: if the score is not finite or the position negative.
        """
        score, index = _checked(score, index)
        self._offered += 1
        if not self.takes(score, index):
            return False
        if index in self._kept:
            self._heap.remove((self._kept[index][0], -index))
            heapq.heapify(self._heap)
            heapq.heappush(self._heap, (score, -index))
        elif len(self._heap) < self.count:
            heapq.heappush(self._heap, (score, -index))
        else:
            _, worst = heapq.heapreplace(self._heap, (score, -index))
            del self._kept[-worst]
        self._kept[index] = (score, payload)
        return True

    def score_of(self, index: int) -> float:
        """The score of a position that is kept."""
        return self._kept[index][0]

    def remove(self, index: int) -> None:
        """Keep a position no longer, and leave its place free."""
        score, _ = self._kept.pop(index)
        self._heap.remove((score, -index))
        heapq.heapify(self._heap)

    def indices(self) -> list[int]:
        """The positions that are kept, in the order of the stream."""
        return sorted(self._kept)

    def ranked(self) -> list[tuple[int, float, Any]]:
        """(position, score, payload) of what is kept, the best first."""
        return [(-index, score, self._kept[-index][1]) for score, index in sorted(self._heap, reverse=True)]

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON can hold it if it can hold the payloads; the same for the same content."""
        kept = [[index, score, payload] for index, score, payload in self.ranked()]
        return {"count": self.count, "offered": self._offered, "kept": kept}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Best:
        """The selection that said `state`, to be continued.

        Raises:
            FormatError: if it is no such state.
        """
        try:
            best = cls(state["count"])
            for index, score, payload in state["kept"]:
                best.offer(score, index, payload)
            best._offered = operator.index(state["offered"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"This is no state of a selection: {error}. Start it anew.") from error
        if len(best) != len(state["kept"]) or best._offered < len(best):
            raise FormatError(
                f"This is no state of a selection: {len(state['kept'])} kept, {len(best)} of them different, of "
                f"{best._offered} offered and at most {best.count}. Start it anew."
            )
        return best

    @staticmethod
    def merge(parts: Sequence[Best]) -> Best:
        """What one selection would keep that had been offered all that the parts were.

        Raises:
            BlueprintError: without parts, or if they do not keep equally many.
        """
        counts = sorted({part.count for part in parts})
        if len(counts) != 1:
            raise BlueprintError(f"Selections of {counts} elements do not merge: give one or more of equal counts.")
        merged = Best(counts[0])
        for part in parts:
            for index, score, payload in part.ranked():
                merged.offer(score, index, payload)
        merged._offered = sum(part._offered for part in parts)
        return merged


def _checked(score: float, index: int) -> tuple[float, int]:
    value, position = float(score), operator.index(index)
    if not math.isfinite(value):
        raise BlueprintError(f"The score of element {position} is {value}; scores must be finite. Leave it out.")
    if position < 0:
        raise BlueprintError(f"Position {position} is before the beginning: count the stream's elements from 0.")
    return value, position
