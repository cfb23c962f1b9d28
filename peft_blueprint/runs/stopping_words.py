"""What the marginal-return rule found, in words.

Is given a finished judgement; knows nothing of how it was come to.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .schedule import Phase, Shorter
from .trend import Trend


Side = Literal["below", "above", "open"]

_ALIKE = 0.02  # shares that are shown as one


class Found(NamedTuple):
    """One check, judged.

    Args:
        how: whether the evaluation was taken in, nothing was spent since the last, or the metric is not finite.
        stop: whether to stop.
        phase: what the learning rate does.
        side: of the threshold on which the slope is; "open" if noise is too great to tell, or evaluations too few.
        trend: of the window; None with too few evaluations.
        threshold: eta.
        tenth: 10 % of the budget, in units of the resource.
        is_of_budget: false if no budget is known, and it is 10 % of what was spent.
        below: checks in a row below the threshold.
        lost: checks in a row without a finite metric.
        patience: checks in a row that stop a run.
        window: evaluations a judgement takes.
        checks: evaluations so far.
        metric: the last.
        at: where it was, as "step 60".
        best: the best so far, with where it was, as "1.2 at step 40"; None if there is none.
        is_best: whether the last is the best.
    """

    how: Literal["counted", "idle", "lost"]
    stop: bool
    phase: Phase
    side: Side
    trend: Trend | None
    threshold: float | None
    tenth: float
    is_of_budget: bool
    below: int
    lost: int
    patience: int
    window: int
    checks: int
    metric: float
    at: str
    best: str | None
    is_best: bool


def reason_of(found: Found) -> str:
    """Why the run is stopped, or goes on."""
    if found.how == "lost":
        return _of_lost(found)
    if found.trend is None or found.threshold is None:
        said = (
            f"{found.checks} evaluations so far: too early to tell; it takes {found.window}, and 10 % of the budget."
        )
    else:
        said = _of_return(found, found.trend, found.threshold)
    if found.how == "idle":
        return f"Nothing was spent since the last check: it is not counted. {said}"
    return said


def proposal_of(shorter: Shorter, found: Found) -> str:
    """What a shorter schedule would be, and how sure that is."""
    if shorter.highest - shorter.lowest < _ALIKE:
        sure = "All that fits the curve so far agrees on it"
    else:
        sure = f"What fits the curve so far says {shorter.lowest:.0%} to {shorter.highest:.0%}"
    best = "" if found.is_best or found.best is None else f" The best was {found.best}."
    return (
        f"A schedule of the same shape over {shorter.share:.0%} of the planned steps would do about as well. {sure}; it "
        f"cannot see what the rest of the decay brings, so try it before relying on it.{best}"
    )


def _of_lost(found: Found) -> str:
    best = "" if found.best is None else f" The best was {found.best}."
    if found.stop:
        return (
            f"Stopped at {found.at}: the metric is {found.metric} for the {_th(found.lost)} check in a row, so training "
            f"has diverged.{best} Go back to a checkpoint from then, with a lower learning rate."
        )
    return f"The metric is {found.metric} at {found.at}: it is not used.{best}"


def _of_return(found: Found, trend: Trend, threshold: float) -> str:
    budget = "the next 10 % of the budget" if found.is_of_budget else "another 10 % of what was spent"
    was = "was" if found.stop else "is"
    share = f" ({abs(trend.slope * found.tenth / found.metric):.2%} of the metric)" if found.metric else ""
    buys = (
        f"{budget} {was} expected to buy {trend.slope * found.tenth:.3g} ± {trend.error * found.tenth:.2g}{share}, where "
        f"{threshold * found.tenth:.3g} would be worth it"
    )
    over = f"Over the last {trend.points} evaluations the metric improved by {_rate(trend.slope, trend.error)}"
    if trend.slope < 0:
        over = f"Over the last {trend.points} evaluations the metric got worse, by {_rate(-trend.slope, trend.error)}"
    best = "" if found.is_best else f" The best was {found.best}."
    if found.side == "open":
        return f"{over}. Noise is too great to tell whether that is below the threshold of {threshold:.3g}: {buys}."
    if found.side == "above":
        return f"{over}, above the threshold of {threshold:.3g}: {buys}."
    count = f"below the threshold of {threshold:.3g}"
    if found.phase == "rising":
        return f"{over}, {count}; but the learning rate is rising, so it does not count."
    count = f"{count} for the {_th(found.below)} check in a row"
    if found.stop:
        return f"Stopped at {found.at}. {over}, {count}; {buys}.{best}"
    if found.below < found.patience:
        return f"{over}, {count} of {found.patience}; {buys}.{best}"
    return (
        f"{over}, {count}; {buys}. Not stopped, because the learning rate is falling, under which a plateau is expected "
        f"and the last of the fall still lowers a loss.{best}"
    )


def _rate(slope: float, error: float) -> str:
    return f"{slope:.3g} ± {error:.2g} per unit of the resource"


def _th(count: int) -> str:
    return f"{count}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(count % 10 if count % 100 not in (11, 12, 13) else 0, 'th') }"
