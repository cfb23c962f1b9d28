"""When a run no longer pays: the marginal-return rule, dPsi/dGamma over a moving window, as a pure state machine.

Is told a resource and a metric at every evaluation, and says whether to go on, and why. Knows nothing of loops, models,
or torch; whoever calls it measures, and does what it says.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from ..errors import BlueprintError, FormatError, MismatchError
from .schedule import Shorter, phase, shorter
from .stopping_words import Found, Side, proposal_of, reason_of
from .trend import Trend, trend, windows


__all__ = ["Decision", "Direction", "MarginalReturn"]

Direction = Literal["minimize", "maximize"]

TENTH = 0.1  # of the budget: the next piece of it that a run has to earn
_ROUNDING = 1e-9  # relative, of sums of a resource
_TOLERATED = 2.5  # tenths at the threshold's rate that a shorter schedule may lose: 0.5 % of a metric, by default


@dataclass(frozen=True)
class Decision:
    """What one check found.

    Args:
        stop: whether to stop now.
        ratio: the window's marginal return: improvement of the metric per unit of the resource, negative if the metric
            got worse; None as long as there are too few evaluations.
        error: its standard error.
        threshold: what it is compared with, in the same unit; None if it is not known yet.
        below: how many checks in a row it was below, this one included.
        expected: the improvement that the next 10 % of the budget would buy at that rate; 10 % of what was spent so
            far, where no budget is known.
        reason: all that in words.
        proposal: a shorter schedule in words, where the learning rate is falling and the metric has stopped paying.
        proposed_progress: the share of the schedule that would have done.
    """

    stop: bool
    ratio: float | None
    error: float | None
    threshold: float | None
    below: int
    expected: float | None
    reason: str
    proposal: str | None = None
    proposed_progress: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


class _Point(NamedTuple):
    """One evaluation; `gain` is the metric with its sign turned so that higher is better."""

    resource: float
    gain: float
    step: int | None
    learning_rate: float | None
    progress: float | None


class MarginalReturn:
    """Stops a run whose metric no longer improves enough for what it spends.

    At every check a line is laid through the last `window` evaluations; its slope is the marginal return. A check counts
    as below if, with 90 % confidence, the slope is below the threshold; after `patience` such checks in a row the run
    stops. Where noise leaves it open on which side of the threshold the slope is, the window is widened, up to all
    evaluations, until it is clear; where it never is, the check does not count, and the reason says so. On a curve that
    flattens, a wider window shows a steeper slope than the present one, so that widening stops later, never sooner.

    The learning rate, if it is told, is heeded. While it rises, checks do not count. While it falls, a flat curve is no
    reason to stop, since the fall itself still lowers the loss: the run is never stopped then, and after `patience`
    checks below, a shorter schedule is proposed. Where it is steady, or not told, the run is stopped.

    A metric that is nan or infinite is not used; after `patience` such checks in a row the run is stopped, whatever the
    learning rate does. A check at which nothing was spent since the last does not count, and changes nothing.

    Without `threshold` it is so chosen that the next 10 % of the budget has to improve the metric by `worth` of its
    present value: where returns diminish, a run that is stopped loses at most that for every tenth that was left. The
    present value serves better than the gain so far, which counts the fall of the first steps: of a model trained from
    nothing it would ask so much that it stops in the middle. A metric that may pass nought wants a threshold.

    Nothing can be told before 10 % of the budget is spent, nor of what comes after a plateau: a metric that stands still,
    or gets worse, for as long as window and patience last is stopped, though it might have improved again later.

    Args:
        direction: whether a lower or a higher metric is better.
        threshold: eta, in units of the metric per unit of the resource.
        worth: used without a threshold.
        budget: of the resource, for the whole run. Without it, it is told from `progress`; without that either, 10 % of
            what was spent so far stands for 10 % of the budget.
        window: evaluations that a line is laid through, from 3.
        patience: checks in a row.

    Raises:
        BlueprintError: for bad values.
    """

    def __init__(
        self,
        *,
        direction: Direction = "minimize",
        threshold: float | None = None,
        worth: float = 0.002,
        budget: float | None = None,
        window: int = 5,
        patience: int = 3,
    ) -> None:
        if direction not in get_args(Direction):
            raise BlueprintError(f"direction={direction!r} is not known: give minimize or maximize.")
        if threshold is not None and not math.isfinite(threshold):
            raise BlueprintError(f"threshold={threshold} is no number: give metric per unit of the resource, or None.")
        if not (math.isfinite(worth) and worth > 0):
            raise BlueprintError(f"worth={worth} is no share of the metric: give a number above 0, as 0.001.")
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise BlueprintError(f"budget={budget} is none: give an amount of the resource above 0, or None.")
        for name, value, least in (("window", window, 3), ("patience", patience, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BlueprintError(
                    f"{name}={value!r} is no number of evaluations: give a whole number from {least}."
                )
        self.direction: Direction = direction
        self.threshold = threshold
        self.worth = worth
        self.budget = budget
        self.window = window
        self.patience = patience
        self._points: list[_Point] = []
        self._below = 0
        self._lost = 0

    def settings(self) -> dict[str, Any]:
        """What it was made with, as keyword arguments; a budget that was filled in later is among them."""
        names = ("direction", "threshold", "worth", "budget", "window", "patience")
        return {name: getattr(self, name) for name in names}

    @property
    def last_resource(self) -> float | None:
        """What had been spent at the last check that was taken in."""
        return self._points[-1].resource if self._points else None

    def check(
        self,
        resource: float,
        metric: float,
        *,
        step: int | None = None,
        learning_rate: float | None = None,
        progress: float | None = None,
    ) -> Decision:
        """Take in an evaluation, and decide.

        Args:
            resource: spent since the run began, of whatever counts: seconds, FLOPs, tokens, joules.
            metric: the evaluation's.
            step: of training; for the words.
            learning_rate: at this step.
            progress: share of the planned steps that is done, in [0, 1].

        Raises:
            BlueprintError: if the resource goes backwards, or a number other than the metric is not finite or out of
                its range. What was taken in before is untouched.
        """
        self._require(resource, learning_rate, progress)
        last = self._points[-1] if self._points else None
        if last is not None and resource == last.resource:
            return self._decide(last, "idle")
        rate = None if learning_rate is None else float(learning_rate)
        done = None if progress is None else float(progress)
        point = _Point(float(resource), self._signed(float(metric)), step, rate, done)
        if not math.isfinite(metric):
            self._lost += 1
            return self._decide(point, "lost")
        self._lost = 0
        self._points.append(point)
        return self._decide(point, "counted")

    def _require(self, resource: float, learning_rate: float | None, progress: float | None) -> None:
        if not (math.isfinite(resource) and resource >= 0):
            raise BlueprintError(
                f"The resource is {resource}: give what was spent since the run began, as a number from 0."
            )
        if self._points and resource < self._points[-1].resource:
            raise BlueprintError(
                f"The resource went back, from {self._points[-1].resource:g} to {resource:g}. Give what was spent since "
                "the run began, not since the last check; after a resumption load its state, or begin a new "
                "MarginalReturn."
            )
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise BlueprintError(f"learning_rate={learning_rate} is none: give a number from 0, or None.")
        if progress is not None and not 0 <= progress <= 1:
            raise BlueprintError(f"progress={progress} is no share of the planned steps: give 0 to 1, or None.")

    def _decide(self, point: _Point, how: Literal["counted", "idle", "lost"]) -> Decision:
        points = self._points
        x, y = [p.resource for p in points], [p.gain for p in points]
        tenth, is_of_budget = self._tenth(point)
        threshold = self._threshold(tenth)
        found: Trend | None = None
        side: Side = "open"
        shortest = self._shortest(x, tenth)
        now = phase([p.learning_rate for p in points[-shortest:]])
        is_early = is_of_budget and point.resource < tenth * (1 - _ROUNDING)
        if threshold is not None and len(points) >= self.window and not is_early:
            found, side = _first_clear(x, y, shortest, threshold)
        if how == "counted":
            self._below = self._below + 1 if side == "below" and now != "rising" else 0
        is_flat = self._below >= self.patience
        stop = self._lost >= self.patience if how == "lost" else is_flat and now != "falling"
        best = max(range(len(y)), key=y.__getitem__) if y else None
        said = Found(
            how=how,
            stop=stop,
            phase=now,
            side=side,
            trend=found,
            threshold=threshold,
            tenth=tenth,
            is_of_budget=is_of_budget,
            below=self._below,
            lost=self._lost,
            patience=self.patience,
            window=self.window,
            checks=len(points),
            metric=self._signed(point.gain),
            at=_place(point, len(points)),
            best=None if best is None else f"{self._signed(y[best]):.4g} at {_place(points[best], best + 1)}",
            is_best=best == len(y) - 1,
        )
        less = self._shorter(found, threshold, tenth) if is_flat and now == "falling" else None
        return Decision(
            stop=stop,
            ratio=None if found is None else found.slope,
            error=None if found is None else found.error,
            threshold=threshold,
            below=self._below,
            expected=None if found is None else found.slope * tenth,
            reason=reason_of(said),
            proposal=None if less is None else proposal_of(less, said),
            proposed_progress=None if less is None else less.share,
        )

    def _tenth(self, point: _Point) -> tuple[float, bool]:
        """A tenth of the budget, and whether a budget is known."""
        if self.budget is not None:
            return TENTH * self.budget, True
        if point.progress:
            return TENTH * point.resource / point.progress, True
        return TENTH * point.resource, False

    def _shortest(self, x: list[float], tenth: float) -> int:
        """Evaluations of the shortest window: `window`, or as many as the last tenth of the budget has."""
        since = (x[-1] if x else 0.0) - tenth * (1 - _ROUNDING)
        within = next((i for i in range(len(x) - 1, -1, -1) if x[i] <= since), 0)
        return max(self.window, len(x) - within)

    def _threshold(self, tenth: float) -> float | None:
        if self.threshold is not None:
            return self.threshold
        if tenth <= 0 or not self._points:
            return None
        # a metric that stands at nought is worth nothing, which is below the least number there is
        return max(self.worth * abs(self._points[-1].gain) / tenth, sys.float_info.min)

    def _shorter(self, found: Trend | None, threshold: float | None, tenth: float) -> Shorter | None:
        told = [
            (p.progress, p.learning_rate, p.gain)
            for p in self._points
            if p.progress is not None and p.learning_rate is not None
        ]
        if found is None or threshold is None or not told:
            return None
        progress, rates, gains = zip(*told, strict=True)
        return shorter(
            progress,
            rates,
            gains,
            judged_by=self.window + self.patience - 1,
            tolerance=max(0.0, threshold) * _TOLERATED * tenth,
            noise=found.noise,
        )

    def _signed(self, value: float) -> float:
        return value if self.direction == "maximize" else -value

    def state_dict(self) -> dict[str, Any]:
        """All it has taken in, as a JSON object; a machine that loads it decides as this one would."""
        return {
            "direction": self.direction,
            "below": self._below,
            "lost": self._lost,
            "points": [list(point) for point in self._points],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another machine was. Settings are not in a state: they stay this machine's own.

        Raises:
            FormatError: if it is no such state; this machine is then untouched.
            MismatchError: if the other was told that the other direction is better.
        """
        try:
            direction, below, lost = state["direction"], state["below"], state["lost"]
            points = [_Point(*(None if value is None else float(value) for value in row)) for row in state["points"]]  # type: ignore[arg-type]
            points = [p._replace(step=None if p.step is None else int(p.step)) for p in points]
            is_sound = all(math.isfinite(p.resource) and math.isfinite(p.gain) for p in points)
            is_sound &= all(a.resource < b.resource for a, b in zip(points, points[1:], strict=False))
            is_sound &= all(type(count) is int and count >= 0 for count in (below, lost))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"This is no state of a MarginalReturn ({type(error).__name__}: {error}). Give what state_dict() gave."
            ) from error
        if not is_sound:
            raise FormatError(
                "This is no state of a MarginalReturn: its numbers are not finite, its resource does not rise, or its "
                "counts are none. Give what state_dict() gave."
            )
        if direction != self.direction:
            raise MismatchError(
                f"The state is of a run with direction={direction!r}, and this one has {self.direction!r}. Make it with "
                "the same."
            )
        self._points, self._below, self._lost = points, below, lost


def _first_clear(x: list[float], y: list[float], shortest: int, threshold: float) -> tuple[Trend, Side]:
    """The shortest window whose slope is clearly on one side of the threshold, or the widest, which leaves it open."""
    for points in windows(shortest, len(x)):
        found = trend(x, y, points)
        if found.slope + found.margin < threshold:
            return found, "below"
        if found.slope - found.margin >= threshold:
            return found, "above"
    return found, "open"


def _place(point: _Point, number: int) -> str:
    return f"check {number}" if point.step is None else f"step {point.step}"
