"""What is run next: a study's order, learning rates that go on until the best is not at an edge, seeds for the closest.

Pure: what is known so far comes in, jobs come out. Knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain, product
from statistics import fmean

from .study import UNTRAINED, Entry, Job, Phase, Study


# the loss of a job that ran, infinite where it diverged, NaN where it failed or cannot be; None where it did not run
Outcome = Callable[[Job], float | None]
# the octave of the learning rate that is expected to do, for an entry at a budget
Guess = Callable[[Entry, float | None], int]

FURTHEST = 5  # octaves from the guess


def next_octaves(tried: Mapping[int, float], guess: int) -> list[int]:
    """Octaves to try after these: the guess, both its neighbours, then on beyond the edge at which the best is.

    Args:
        tried: loss by octave; infinite where training diverged, NaN where the arm failed, which ends the ladder.
        guess: where to begin.
    """
    if guess not in tried:
        return [guess]
    if any(math.isnan(loss) for loss in tried.values()):
        return []
    if missing := [k for k in (guess + 1, guess - 1) if k not in tried]:
        return missing
    if all(map(math.isinf, tried.values())):
        following = [min(tried) - 1]
    else:
        best = min(tried, key=lambda k: (tried[k], abs(k - guess)))
        following = [k for k in (best - 1, best + 1) if k not in tried]
    return [k for k in following if abs(k - guess) <= FURTHEST]


def best_octave(losses: Mapping[int, Mapping[int, float]]) -> int | None:
    """The learning rate with the lowest loss, or the lowest mean of those seeds that it shares with another, so that one
    lucky seed does not choose where there are more.

    Args:
        losses: by octave and seed; NaN where the arm failed.

    Returns:
        Its octave; None where nothing ran with the first seed.
    """
    known = {k: {s: x for s, x in of.items() if not math.isnan(x)} for k, of in losses.items()}
    first = sorted((k for k in known if 0 in known[k]), key=lambda k: known[k][0])
    if not first:
        return None

    def mean(octave: int, other: int) -> float:
        return fmean(known[octave][seed] for seed in known[octave].keys() & known[other].keys())

    return reduce(lambda best, other: other if mean(other, best) < mean(best, other) else best, first)


class Schedule:
    """A study's jobs, as far as they are known from what has run.

    Args:
        study: what is wanted.
        outcome: of a job.
        guess: where a ladder of learning rates begins.
        is_budgeted: whether an arm fills a budget, or has its own size.
        stop_share: share of the reference's steps at which to stop; None as long as that is not known.
    """

    def __init__(
        self,
        study: Study,
        outcome: Outcome,
        guess: Guess,
        is_budgeted: Callable[[str], bool],
        stop_share: Callable[[], float | None],
    ):
        self.study = study
        self.outcome = outcome
        self.guess = guess
        self.is_budgeted = is_budgeted
        self.stop_share = stop_share
        self.seeds = sorted({seed for phase in study.order for seed in phase.seeds})

    def jobs(self) -> Iterator[Job]:
        """All that are known to be wanted, in order and each once: those that ran, and those that are next in each ladder.

        One at a time, since saying what a job is may take a measurement.
        """
        seen: set[Job] = set()
        for job in chain([Job(Entry(UNTRAINED), None, 0, 0, 0)], self._in_order()):
            if job not in seen:
                seen.add(job)
                yield job

    def _in_order(self) -> Iterator[Job]:
        for phase in self.study.order:
            for budget in phase.budgets or (None,):
                for entry in self._entries(phase, budget):
                    own = budget if self.is_budgeted(entry.arm) else None
                    for seed in phase.seeds:
                        yield from self._of(entry, own, seed, phase.rates)

    def best(self, entry: Entry, budget: float | None) -> int | None:
        """The octave of the lowest loss; None where none ran with the first seed."""
        losses = {k: {0: loss} for k, loss in self._tried(entry.family, budget).items()}
        for octave, seed in product(losses, self.seeds):
            job = self._job(entry.family, budget, octave, seed)
            if job is not None and (loss := self.outcome(job)) is not None:
                losses[octave][seed] = loss
        return best_octave(losses)

    def _entries(self, phase: Phase, budget: float | None) -> list[Entry]:
        if not phase.closest:
            return list(phase.arms)
        losses = {}
        for entry in self.study.entries:
            own = budget if self.is_budgeted(entry.arm) else None
            octave = self.best(entry, own)
            if octave is not None and entry not in phase.arms and entry.family == entry:
                job = self._job(entry, own, octave, 0)
                loss = None if job is None else self.outcome(job)
                losses[entry] = math.inf if loss is None else loss
        closest = sorted((e for e in losses if math.isfinite(losses[e])), key=lambda e: losses[e])
        return [*phase.arms, *closest[: phase.closest]]

    def _of(self, entry: Entry, budget: float | None, seed: int, rates: str) -> Sequence[Job]:
        if seed or entry.family != entry:
            octave = self.best(entry, budget)
            if octave is None:  # nothing of its family ran yet
                octave = self.guess(entry.family, budget)
            octaves = [octave]
        elif rates == "guess":
            octaves = [self.guess(entry, budget)]
        else:
            tried = self._tried(entry, budget)
            octaves = [*tried, *next_octaves(tried, self.guess(entry, budget))]
        return [job for k in octaves if (job := self._job(entry, budget, k, seed)) is not None]

    def _tried(self, entry: Entry, budget: float | None) -> dict[int, float]:
        """Losses by octave, with the first seed, of those that ran."""
        guess = self.guess(entry, budget)
        near = sorted(range(guess - FURTHEST - 1, guess + FURTHEST + 2), key=lambda k: abs(k - guess))
        jobs = {k: self._job(entry, budget, k, 0) for k in near}
        found = {k: self.outcome(job) for k, job in jobs.items() if job is not None}
        return {k: loss for k, loss in found.items() if loss is not None}

    def _job(self, entry: Entry, budget: float | None, octave: int, seed: int) -> Job | None:
        share = self.stop_share() if entry.stop else 1.0
        if share is None:
            return None
        return Job(entry, budget, octave, seed, max(1, round(self.study.steps * entry.share * share)))
