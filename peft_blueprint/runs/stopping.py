"""Decide when a training run no longer pays, by the marginal return over a moving window."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from .._options import from_mapping
from ..errors import BlueprintError, FormatError, MismatchError
from .quantity import Direction
from .trend import Phase, Shorter, Trend, phase, shorter, trend, windows


TENTH = 0.1  # of the budget: the next piece of it that a run has to earn

_ROUNDING = 1e-9  # relative, of sums of a resource
_TOLERATED = 2.5  # tenths at the threshold's rate that a shorter schedule may lose: by default 0.5 % of the metric
_ALIKE = 0.02  # shares of a schedule shown as one

Side = Literal["below", "above", "open"]


@dataclass(frozen=True)
class Decision:
    """Result of one check.

    Args:
        stop: whether to stop now.
        ratio: marginal return of the window: improvement of the metric per unit of the resource, negative if the metric
            got worse; None for too few evaluations.
        error: standard error of the ratio.
        threshold: smallest ratio that pays, in the same unit; None if it is not known yet.
        below: consecutive checks below the threshold, including this one.
        expected: improvement that the next 10 % of the budget would buy at this ratio; 10 % of the resource spent so
            far if no budget is known.
        reason: the decision in words.
        proposal: a shorter schedule in words, if the learning rate is falling and the metric has stopped paying.
        proposed_progress: share of the schedule that would have been enough.
        points: evaluations that the ratio is taken over, the window or more; None for too few.
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
    points: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


class _Point(NamedTuple):
    """One evaluation; `gain` is the metric with its sign chosen so that higher is better."""

    resource: float
    gain: float
    step: int | None
    learning_rate: float | None
    progress: float | None


class _Return(NamedTuple):
    """The marginal return at a check, and the threshold that it is compared with."""

    fit: Trend | None  # of the window; None for too few evaluations
    side: Side  # of the threshold; "open" if noise is too large to tell
    threshold: float | None
    phase: Phase  # of the learning rate
    tenth: float  # of the budget, in units of the resource
    has_budget: bool
    shortest: int  # evaluations in the shortest window


@dataclass(frozen=True)
class _State:
    direction: Direction
    below: int
    lost: int
    points: tuple[_Point, ...]

    def __post_init__(self) -> None:
        numbers = [number for point in self.points for number in point if number is not None]
        if not all(map(math.isfinite, numbers)) or min(self.below, self.lost) < 0:
            raise FormatError("its numbers must be finite and its counts at least 0.")
        if any(a.resource >= b.resource for a, b in zip(self.points, self.points[1:], strict=False)):
            raise FormatError("the resource must rise from point to point.")


class MarginalReturn:
    """Stops a run whose metric no longer improves enough for the resource it spends.

    At every check a line is fitted to the last `window` evaluations, or to those of the last 10 % of the budget if they
    are more; its slope is the marginal return. The check is below if the slope is below the threshold with 90 %
    confidence; after `patience` such checks in a row the run stops. If noise leaves open on which side of the threshold
    the slope is, the window is widened, up to all evaluations. If it stays open, the check does not count. On a
    flattening curve a wider window has a steeper slope, so widening only stops later. The decision says so: `points` and
    `reason` have the evaluations that were taken.

    The learning rate matters, if it is given. While it rises, checks do not count. While it falls, the run is not
    stopped, because the decay itself still lowers the loss; after `patience` checks below, a shorter schedule is
    proposed instead. `stop_in_decay` stops it all the same. While the rate is steady or unknown, the run is stopped.
    `forecast` tells what that means for a schedule, before the run.

    A metric that is NaN or infinite is not used; after `patience` such checks in a row the run is stopped, whatever the
    learning rate does. A check at which nothing was spent since the last one has no effect.

    Without `threshold`, the next 10 % of the budget has to improve the metric by `worth` times its present value. Where
    returns diminish, stopping then loses at most that much for every tenth of the budget that was left. A metric that
    may cross zero needs a threshold.

    Nothing is decided before 10 % of the budget is spent. A metric that stands still or gets worse for as long as window
    and patience last is stopped, even if it would have improved again later.

    Args:
        direction: whether a lower or a higher metric is better. By default a run's log sets it by its metric: higher for
            a reward or accuracy, lower for a loss; a rule alone takes lower.
        threshold: in units of the metric per unit of the resource.
        worth: share of the metric, used without a threshold.
        budget: of the resource for the whole run. Without it, it is estimated from `progress`; without that either,
            10 % of the resource spent so far stands for 10 % of the budget.
        window: smallest number of evaluations in a fit, at least 3.
        patience: number of checks in a row.
        stop_in_decay: whether to stop while the learning rate falls, as it does to the end in transformers' default
            schedule. The run then misses the gain of the rest of the decay.

    Raises:
        BlueprintError: for bad values.

    Example:
        >>> rule = MarginalReturn(patience=1)
        >>> decisions = [rule.check(seconds, 2.0, progress=seconds / 100) for seconds in range(10, 60, 10)]
        >>> [decision.stop for decision in decisions]
        [False, False, False, False, True]
    """

    def __init__(
        self,
        *,
        direction: Direction | None = None,
        threshold: float | None = None,
        worth: float = 0.002,
        budget: float | None = None,
        window: int = 5,
        patience: int = 3,
        stop_in_decay: bool = False,
    ) -> None:
        if direction not in (None, *get_args(Direction)):
            raise BlueprintError(f"direction must be 'minimize', 'maximize' or None, got {direction!r}.")
        if threshold is not None and not math.isfinite(threshold):
            raise BlueprintError(
                f"threshold must be finite (metric per unit of the resource) or None, got {threshold}."
            )
        if not (math.isfinite(worth) and worth > 0):
            raise BlueprintError(f"worth must be a positive share of the metric such as 0.002, got {worth}.")
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise BlueprintError(f"budget must be a positive amount of the resource or None, got {budget}.")
        for name, value, least in (("window", window, 3), ("patience", patience, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BlueprintError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if not isinstance(stop_in_decay, bool):
            raise BlueprintError(f"stop_in_decay must be True or False, got {stop_in_decay!r}.")
        self.direction: Direction | None = direction
        self.threshold = threshold
        self.worth = worth
        self.budget = budget
        self.window = window
        self.patience = patience
        self.stop_in_decay = stop_in_decay
        self._points: list[_Point] = []
        self._below = 0
        self._lost = 0

    def settings(self) -> dict[str, Any]:
        """Return the settings as keyword arguments, with a budget that was set later."""
        names = ("direction", "threshold", "worth", "budget", "window", "patience", "stop_in_decay")
        return {name: getattr(self, name) for name in names}

    @property
    def last_resource(self) -> float | None:
        """Resource spent at the last check that counted."""
        return self._points[-1].resource if self._points else None

    def forecast(self, rates: Sequence[float | None]) -> str:
        """Describe which checks of a planned run can stop it, in one to three sentences.

        Args:
            rates: learning rate at each planned check, at equal distances; None where it is not known beforehand.

        Example:
            >>> rates = [1e-3 * (1 - i / 20) for i in range(1, 21)]
            >>> MarginalReturn().forecast(rates).split(". ")[0]
            'MarginalReturn has 20 checks in this run and cannot stop it'
            >>> MarginalReturn(stop_in_decay=True).forecast(rates)
            'MarginalReturn has 20 checks in this run and can stop it at checks 7 to 19.'
        """
        tenth = TENTH * len(rates)
        earliest = max(self.window, math.ceil(tenth - _ROUNDING))
        shortest = max(self.window, math.floor(tenth + _ROUNDING) + 1)
        first = earliest + self.patience - 1
        below, stops, is_held = 0, [], False
        for number in range(earliest, len(rates)):  # after the last check there is nothing left to stop
            now = phase(rates[max(0, number - shortest) : number])
            below = 0 if now == "rising" else below + 1
            if below < self.patience:
                continue
            if now == "falling" and not self.stop_in_decay:
                is_held = True
            else:
                stops.append(number)
        can = f"can stop it at {_spans(stops)}" if stops else "cannot stop it"
        parts = [f"MarginalReturn has {len(rates)} checks in this run and {can}."]
        if len(rates) <= first:
            parts.append(
                f"With window={self.window} and patience={self.patience} the first check that can is the "
                f"{_ordinal(first)}, and the last one comes too late: evaluate more often."
            )
        if is_held:
            parts.append(
                "While the learning rate falls it only proposes a shorter schedule. To stop then too, pass "
                "MarginalReturn(stop_in_decay=True)."
            )
        elif not stops and len(rates) > first:
            parts.append("Checks do not count while the learning rate rises.")
        elif stops and None in rates and not self.stop_in_decay:
            parts.append(
                "The schedule is not known beforehand: while the learning rate falls, the run is not stopped."
            )
        if shortest > self.window:
            parts.append(f"window={self.window} is widened to the {shortest} checks of the last 10 % of the budget.")
        return " ".join(parts)

    def check(
        self,
        resource: float,
        metric: float,
        *,
        step: int | None = None,
        learning_rate: float | None = None,
        progress: float | None = None,
    ) -> Decision:
        """Add an evaluation and decide.

        Args:
            resource: spent since the run began: seconds, FLOPs, tokens or joules.
            metric: of the evaluation.
            step: of training; named in the reason.
            learning_rate: at this step.
            progress: share of the planned steps done, in [0, 1].

        Raises:
            BlueprintError: if the resource decreases, or a number other than the metric is out of range. Nothing
                changes then.
        """
        if not (math.isfinite(resource) and resource >= 0):
            raise BlueprintError(f"resource must be at least 0, counted since the run began, got {resource}.")
        if self._points and resource < self._points[-1].resource:
            raise BlueprintError(
                f"resource decreased from {self._points[-1].resource:g} to {resource:g}. Give the total since the run "
                "began; after a resumption load the rule's state, or make a new MarginalReturn."
            )
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise BlueprintError(f"learning_rate must be at least 0 or None, got {learning_rate}.")
        if progress is not None and not 0 <= progress <= 1:
            raise BlueprintError(f"progress must be a share of the planned steps in [0, 1] or None, got {progress}.")
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

    def _decide(self, point: _Point, how: Literal["counted", "idle", "lost"]) -> Decision:
        found = self._marginal_return(point)
        if how == "counted":
            self._below = self._below + 1 if found.side == "below" and found.phase != "rising" else 0
        is_flat = self._below >= self.patience
        is_held = found.phase == "falling" and not self.stop_in_decay
        stop = self._lost >= self.patience if how == "lost" else is_flat and not is_held
        less = self._shorter(found) if is_flat and is_held else None
        fit = found.fit
        return Decision(
            stop=stop,
            ratio=None if fit is None else fit.slope,
            error=None if fit is None else fit.error,
            threshold=found.threshold,
            below=self._below,
            expected=None if fit is None else fit.slope * found.tenth,
            reason=self._reason_of_lost(point, stop) if how == "lost" else self._reason(point, found, how, stop),
            proposal=None if less is None else _proposal(less) + self._best(),
            proposed_progress=None if less is None else less.share,
            points=None if fit is None else fit.points,
        )

    def _marginal_return(self, point: _Point) -> _Return:
        tenth, has_budget = self._tenth(point)
        threshold = self._threshold(tenth)
        x, y = [p.resource for p in self._points], [p.gain for p in self._points]
        shortest = self._shortest(x, tenth)
        now = phase([p.learning_rate for p in self._points[-shortest:]])
        is_early = has_budget and point.resource < tenth * (1 - _ROUNDING)
        fit: Trend | None = None
        side: Side = "open"
        if threshold is not None and len(x) >= self.window and not is_early:
            fit, side = _first_clear(x, y, shortest, threshold)
        return _Return(fit, side, threshold, now, tenth, has_budget, shortest)

    def _tenth(self, point: _Point) -> tuple[float, bool]:
        """Return a tenth of the budget, and whether a budget is known."""
        if self.budget is not None:
            return TENTH * self.budget, True
        if point.progress:
            return TENTH * point.resource / point.progress, True
        return TENTH * point.resource, False

    def _shortest(self, x: list[float], tenth: float) -> int:
        """Return the length of the shortest window: `window`, or the evaluations of the last tenth of the budget."""
        since = (x[-1] if x else 0.0) - tenth * (1 - _ROUNDING)
        within = next((i for i in range(len(x) - 1, -1, -1) if x[i] <= since), 0)
        return max(self.window, len(x) - within)

    def _threshold(self, tenth: float) -> float | None:
        if self.threshold is not None:
            return self.threshold
        if tenth <= 0 or not self._points:
            return None
        # a metric of zero is worth nothing, but the threshold must stay positive
        return max(self.worth * abs(self._points[-1].gain) / tenth, sys.float_info.min)

    def _shorter(self, found: _Return) -> Shorter | None:
        known = [
            (p.progress, p.learning_rate, p.gain)
            for p in self._points
            if p.progress is not None and p.learning_rate is not None
        ]
        if found.fit is None or found.threshold is None or not known:
            return None
        return shorter(
            *zip(*known, strict=True),
            judged_by=self.window + self.patience - 1,
            tolerance=max(0.0, found.threshold) * _TOLERATED * found.tenth,
            noise=found.fit.noise,
        )

    def _signed(self, value: float) -> float:
        return value if self.direction == "maximize" else -value

    def _reason_of_lost(self, point: _Point, stop: bool) -> str:
        metric, at = self._signed(point.gain), self._place(point)
        best = self._best(even_if_last=True)
        if not stop:
            return f"The metric is {metric} at {at} and is not used.{best}"
        return (
            f"Stopped at {at}: the metric is {metric} for the {_ordinal(self._lost)} check in a row, so training has "
            f"diverged.{best} Return to a checkpoint from then, with a lower learning rate."
        )

    def _reason(self, point: _Point, found: _Return, how: str, stop: bool) -> str:
        idle = "Nothing was spent since the last check, so it does not count. " if how == "idle" else ""
        fit, threshold, tenth = found.fit, found.threshold, found.tenth
        if fit is None or threshold is None:
            return (
                f"{idle}Too early to decide after {len(self._points)} evaluation{'s' * (len(self._points) != 1)}: "
                f"{self.window} and 10 % of the budget are needed."
            )
        did = "improved by" if fit.slope >= 0 else "got worse by"
        wider = ""
        if fit.points > self.window:
            why = "because of noise" if fit.points > found.shortest else "to the last 10 % of the budget"
            wider = f" (window={self.window}, widened {why})"
        over = (
            f"{idle}Over the last {fit.points} evaluations{wider} the metric {did} {abs(fit.slope):.3g} ± {fit.error:.2g} "
            "per unit of the resource"
        )
        below = f"below the threshold of {threshold:.3g}"
        if found.side == "below" and found.phase == "rising":
            return f"{over}, {below}; this does not count because the learning rate is rising."
        metric = self._signed(point.gain)
        share = f" ({abs(fit.slope * tenth / metric):.2%} of the metric)" if metric else ""
        buys = (
            f"{'the next 10 % of the budget' if found.has_budget else 'another 10 % of the resource spent so far'} "
            f"{'was' if stop else 'is'} expected to improve it by {fit.slope * tenth:.3g} ± {fit.error * tenth:.2g}{share}; "
            f"the threshold asks for {threshold * tenth:.3g}"
        )
        if found.side == "open":
            return f"{over}. Noise is too large to tell whether that is {below}: {buys}."
        if found.side == "above":
            return f"{over}, above the threshold of {threshold:.3g}: {buys}."
        below = f"{below} for the {_ordinal(self._below)} check in a row"
        if stop:
            missed = " The learning rate was falling: the rest of its decay is missed." * (found.phase == "falling")
            return f"Stopped at {self._place(point)}. {over}, {below}; {buys}.{missed}{self._best()}"
        if self._below < self.patience:
            return f"{over}, {below} of {self.patience}; {buys}.{self._best()}"
        return (
            f"{over}, {below}; {buys}. Not stopped because the learning rate is falling: a plateau is expected then, and "
            f"the end of the decay still lowers a loss.{self._best()}"
        )

    def _best(self, even_if_last: bool = False) -> str:
        """Name the best evaluation in a sentence; empty if it is the last one."""
        if not self._points:
            return ""
        i = max(range(len(self._points)), key=lambda i: self._points[i].gain)
        if i == len(self._points) - 1 and not even_if_last:
            return ""
        return f" The best was {self._signed(self._points[i].gain):.4g} at {self._place(self._points[i], i + 1)}."

    def _place(self, point: _Point, number: int | None = None) -> str:
        return f"check {number or len(self._points)}" if point.step is None else f"step {point.step}"

    def state_dict(self) -> dict[str, Any]:
        """Return all evaluations as a JSON object; a rule that loads it decides as this one would."""
        return {
            "direction": self.direction or "minimize",
            "below": self._below,
            "lost": self._lost,
            "points": [list(point) for point in self._points],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`. Settings are not part of it.

        Raises:
            FormatError: for anything else; nothing changes then.
            MismatchError: if the state was recorded with the other direction.
        """
        loaded = from_mapping(_State, state, "The state of MarginalReturn", FormatError)
        if loaded.direction != (self.direction or "minimize"):
            raise MismatchError(
                f"The state of MarginalReturn has direction={loaded.direction!r}, this rule has {self.direction!r}. "
                "Make the rule with the same direction."
            )
        self._points, self._below, self._lost = list(loaded.points), loaded.below, loaded.lost


def _first_clear(x: list[float], y: list[float], shortest: int, threshold: float) -> tuple[Trend, Side]:
    """Return the shortest window whose slope is clearly on one side of the threshold, otherwise the widest."""
    for points in windows(shortest, len(x)):
        fit = trend(x, y, points)
        if fit.slope + fit.margin < threshold:
            return fit, "below"
        if fit.slope - fit.margin >= threshold:
            return fit, "above"
    return fit, "open"


def _proposal(found: Shorter) -> str:
    sure = "All curves that fit so far agree"
    if found.highest - found.lowest >= _ALIKE:
        sure = f"The curves that fit so far give {found.lowest:.0%} to {found.highest:.0%}"
    return (
        f"A schedule of the same shape over {found.share:.0%} of the planned steps would do about as well. {sure}. They "
        "cannot show the effect of the rest of the decay, so try it before you rely on it."
    )


def _spans(numbers: Sequence[int]) -> str:
    """Shorten rising numbers of checks: `checks 7 to 9, 15`."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] < n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] > n + 1]
    spans = [f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True)]
    return f"check{'s' * (len(numbers) > 1)} {', '.join(spans)}"


def _ordinal(count: int) -> str:
    return f"{count}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(count % 10 if count % 100 not in (11, 12, 13) else 0, 'th') }"
