"""Read a study from YAML and put its jobs in order: learning rates that bracket the best, then further seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from peft_blueprint._options import from_mapping
from peft_blueprint.errors import BlueprintError


UNTRAINED = "untrained"
EQUAL = "equal"  # a blueprint in which every submodule weighs the same, so that nothing is measured
TASK = "task"  # a blueprint of the study's own data, of as many examples as it measures
FORMAT = 1  # of records; raise it with a change that bears on results
FURTHEST = 5  # octaves from the guess
# what bears on every result, under the keys of the archive; the second tuple only where it is not the default
_FACTS = "data model dtype length batch steps warm_up rank rate measured held_out few every unrelated".split()
_FACTS_IF_CHANGED = ("spare", "attention", "resample", "test_from_train", "budgets_of")


@dataclass(frozen=True)
class Entry:
    """An arm, with the variations around it.

    Args:
        arm: a name as `arms.rule_of` reads it.
        blueprint: what it is measured on: `task`, `equal`, or a source and a number of examples, such as `nf4 x 64`.
        select: a method of `select_examples`, or None to train on everything.
        share: of the examples kept, and of the steps trained on them.
        stop: archived runs only: stopped early by the reference's curve.
    """

    arm: str
    blueprint: str = TASK
    select: str | None = None
    share: float = 1.0
    stop: bool = False

    @property
    def label(self) -> str:
        """The name in tables."""
        parts = [self.arm if self.blueprint == TASK else f"{self.arm} [{self.blueprint}]"]
        parts += [f"{self.select} {self.share:g}"] if self.select else []
        return " + ".join([*parts, *(["stop"] if self.stop else [])])

    @property
    def family(self) -> Entry:
        """The entry whose learning rate this one takes: the first draw (of `random #2`), by the study's own blueprint."""
        return Entry(**asdict(self) | {"arm": self.arm.partition(" #")[0], "blueprint": TASK})


@dataclass(frozen=True)
class Job:
    """One arm, one learning rate, one seed.

    Args:
        entry: the arm.
        budget: trainable parameters as a share of all-linear's; None where the arm has its own.
        octave: the learning rate is the study's times two to this power.
        seed: of the order of the data and of the adapters' first weights.
        steps: of the optimizer.
    """

    entry: Entry
    budget: float | None
    octave: int
    seed: int
    steps: int

    @property
    def row(self) -> str:
        """The name of the table's row: all jobs of one arm at one budget."""
        return row_label(self.entry.label, self.budget)

    @property
    def label(self) -> str:
        """The name in lists and logs."""
        return f"{self.row} 2^{self.octave:+d} seed {self.seed}"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Job:
        """Read what `asdict` made."""
        return cls(**{**data, "entry": Entry(**data["entry"])})


@dataclass(frozen=True)
class Phase:
    """Jobs that follow each other.

    Args:
        arms: the arms to run.
        budgets: at which shares of all-linear's parameters.
        rates: "guess" for one learning rate; "best" for a ladder of at least three, extended until the best is inside;
            or octaves to try.
        seeds: run at the best learning rate so far, except the first seed.
        closest: add this many arms of the lowest loss so far, at each budget.
    """

    arms: tuple[Entry, ...] = ()
    budgets: tuple[float, ...] = ()
    rates: Literal["guess", "best"] | tuple[int, ...] = "guess"
    seeds: tuple[int, ...] = (0,)
    closest: int = 0


@dataclass(frozen=True)
class Study:
    """What is run, at which size.

    Args:
        name: of the results.
        data: a data set, as `setup.read_examples` names it.
        order: phases, the most valuable first.
        model: a folder or an id; None for SmolLM2-135M, "tiny" for a tiny random model.
        dtype: of the model.
        attention: "sdpa", or "eager", which is faster for short examples in bfloat16 on a CPU.
        length: tokens of an example at most; longer ones are left out.
        batch: examples of a step.
        steps: of the optimizer.
        pool: training examples; None for those of one pass.
        warm_up: steps of a rising learning rate, which then falls linearly.
        rank: of all-linear LoRA.
        rate: learning rate of octave 0.
        measured: examples of a blueprint; none of them is trained on.
        held_out: test examples of the final loss.
        few: of these, the examples of the curve.
        every: steps between two points of the curve.
        unrelated: examples of each unrelated text.
        spare: training examples of the curve that nothing else uses; 0 takes the first `few` test examples.
        resample: whether every seed has training and test examples of its own, the same for all arms, and weights A of
            LoRA that follow from the seed and the module's name. The first seed chooses learning rates and is not
            reported.
        test_from_train: training examples that a resampled study tests on instead.
        compare: labels of arms that every arm is compared with, the reference first.
        budgets_of: what budgets are shares of: the parameters of LoRA on all linear layers, or the model's.
        looks: numbers of seeds after which a resampled study decides; the last is the planned number.
        flops_per_second: of the machine, for estimates before anything was measured.
    """

    name: str
    data: str
    order: tuple[Phase, ...] = ()
    model: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    length: int = 100
    batch: int = 8
    steps: int = 30
    pool: int | None = None
    warm_up: int = 3
    rank: int = 16
    rate: float = 2e-3
    measured: int = 64
    held_out: int = 64
    few: int = 12
    every: int = 6
    unrelated: int = 8
    spare: int = 0
    resample: bool = False
    test_from_train: int = 0
    compare: tuple[str, ...] = ("all-linear",)
    budgets_of: Literal["all-linear", "model"] = "all-linear"
    looks: tuple[int, ...] = (8, 16, 28)
    flops_per_second: float = 60e9

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All arms that are named, in order."""
        return tuple(dict.fromkeys(entry for phase in self.order for entry in phase.arms))

    @property
    def examples(self) -> int:
        """Training examples."""
        return self.pool or self.steps * self.batch

    @property
    def reference(self) -> str:
        """The label of the arm that others are compared with first."""
        return self.compare[0]

    def facts(self) -> dict[str, Any]:
        """What bears on every result."""
        usual = {f.name: f.default for f in fields(self)}
        own = {name: getattr(self, name) for name in _FACTS}
        own |= {name: value for name in _FACTS_IF_CHANGED if (value := getattr(self, name)) != usual[name]}
        return {**own, "examples": self.examples, "format": FORMAT}

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a YAML file, whose `groups` name lists of arms for its phases.

        Raises:
            SystemExit: for a file that cannot be read, unknown keys or values of a wrong type.
        """
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SystemExit(f"Cannot read {path}: {error}. Examples: benchmarks/studies.") from None
        if not isinstance(data, dict) or not {"data", "order"} <= set(data):
            raise SystemExit(f"{path} must be a mapping with the keys data and order. Examples: benchmarks/studies.")
        groups = data.pop("groups", {})
        phases = data.pop("order")
        try:
            study = from_mapping(cls, {"name": path.stem, **data}, str(path))
            return replace(study, order=tuple(_phase(phase, groups, f"{path}, order") for phase in phases))
        except BlueprintError as error:
            raise SystemExit(str(error)) from None


def _phase(data: Mapping[str, Any], groups: Mapping[str, Any], where: str) -> Phase:
    arms = _entries(data.get("arms", []), groups) if isinstance(data, dict) else []
    entries = tuple(from_mapping(Entry, arm, where) for arm in arms)
    return replace(from_mapping(Phase, {**data, "arms": []} if arms else data, where), arms=entries)


def _entries(wanted: Any, groups: Mapping[str, Any]) -> list[Any]:
    """Expand the names of groups; an arm is a mapping, or text where nothing is varied around it."""
    if isinstance(wanted, list):
        return [entry for one in wanted for entry in _entries(one, groups)]
    if isinstance(wanted, str) and wanted in groups:
        return _entries(groups[wanted], groups)
    return [{"arm": wanted} if isinstance(wanted, str) else wanted]


def row_label(label: str, budget: float | None) -> str:
    """Name an arm at a budget."""
    return label if budget is None else f"{label} at {budget:.0%}"


def digest(value: Any) -> str:
    """Return a short digest of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ---- the order of jobs

# the loss of a job that ran, infinite where it diverged, NaN where it failed or is infeasible; None where it did not run
Outcome = Callable[[Job], float | None]


def next_octaves(tried: Mapping[int, float], guess: int) -> list[int]:
    """Return octaves to try next: the guess, both its neighbours, then on beyond the edge at which the best is.

    Args:
        tried: loss by octave; infinite where training diverged, NaN where the arm failed, which ends the ladder.
        guess: where to begin.

    Example:
        >>> next_octaves({-1: 0.8, 0: 0.7, 1: 0.6}, guess=0)
        [2]
    """
    if guess not in tried:
        return [guess]
    if any(map(math.isnan, tried.values())):
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
    """Return the octave of the lowest mean loss over the seeds that two octaves share, or None.

    Only octaves that ran with the first seed count. Sharing seeds keeps one lucky seed from deciding.

    Args:
        losses: by octave and seed; NaN where the arm failed.
    """
    known = {k: {s: x for s, x in of.items() if not math.isnan(x)} for k, of in losses.items()}
    first = sorted((k for k in known if 0 in known[k]), key=lambda k: known[k][0])

    def mean(octave: int, other: int) -> float:
        return fmean(known[octave][seed] for seed in known[octave].keys() & known[other].keys())

    def better(best: int, other: int) -> int:
        return other if mean(other, best) < mean(best, other) else best

    return reduce(better, first) if first else None


class Schedule:
    """A study's jobs, as far as they follow from finished jobs.

    Args:
        study: the study to run.
        outcome: of a job.
        guess: the octave at which an arm's ladder begins, for an entry at a budget.
        is_budgeted: whether an arm fills a budget, or has its own size.
    """

    def __init__(
        self,
        study: Study,
        outcome: Outcome,
        guess: Callable[[Entry, float | None], int],
        is_budgeted: Callable[[str], bool],
    ):
        self.study = study
        self.outcome = outcome
        self.guess = guess
        self.is_budgeted = is_budgeted
        self.seeds = sorted({seed for phase in study.order for seed in phase.seeds})

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs that ran and those that are next in each ladder, seed by seed within a phase, each once."""
        seen: set[Job] = set()
        for job in chain([Job(Entry(UNTRAINED), None, 0, 0, 0)], self._in_order()):
            if job not in seen:
                seen.add(job)
                yield job

    def best(self, entry: Entry, budget: float | None) -> int | None:
        """Return the octave of the lowest loss; None where none ran with the first seed."""
        tried = self._tried(entry.family, budget)
        losses: dict[int, dict[int, float]] = {k: {} for k in tried}
        for octave, seed in product(tried, self.seeds):
            if (loss := self.outcome(self._job(entry.family, budget, octave, seed))) is not None:
                losses[octave][seed] = loss
        return best_octave(losses)

    def _in_order(self) -> Iterator[Job]:
        for phase in self.study.order:
            for budget in phase.budgets or (None,):
                for seed, entry in product(phase.seeds, self._entries(phase, budget)):
                    own = budget if self.is_budgeted(entry.arm) else None
                    yield from self._of(entry, own, seed, phase.rates)

    def _entries(self, phase: Phase, budget: float | None) -> list[Entry]:
        """Return a phase's arms, with the closest so far; archived ways to stop are not run any more."""
        losses = {}
        for entry in self.study.entries if phase.closest else ():
            own = budget if self.is_budgeted(entry.arm) else None
            octave = self.best(entry, own)
            if octave is not None and entry not in phase.arms and entry.family == entry:
                losses[entry] = self.outcome(self._job(entry, own, octave, 0)) or math.inf
        closest = sorted((e for e in losses if math.isfinite(losses[e])), key=lambda e: losses[e])
        return [entry for entry in (*phase.arms, *closest[: phase.closest]) if not entry.stop]

    def _of(self, entry: Entry, budget: float | None, seed: int, rates: str | tuple[int, ...]) -> Sequence[Job]:
        if seed or entry.family != entry:
            octave = self.best(entry, budget)
            octaves = [self.guess(entry.family, budget) if octave is None else octave]
        elif isinstance(rates, tuple):
            octaves = list(rates)
        elif rates == "guess":
            octaves = [self.guess(entry, budget)]
        else:
            tried = self._tried(entry, budget)
            octaves = [*tried, *next_octaves(tried, self.guess(entry, budget))]
        return [self._job(entry, budget, k, seed) for k in octaves]

    def _tried(self, entry: Entry, budget: float | None) -> dict[int, float]:
        """Return losses by octave of those that ran with the first seed."""
        guess = self.guess(entry, budget)
        near = sorted(range(guess - FURTHEST - 1, guess + FURTHEST + 2), key=lambda k: abs(k - guess))
        found = {k: self.outcome(self._job(entry, budget, k, 0)) for k in near}
        return {k: loss for k, loss in found.items() if loss is not None}

    def _job(self, entry: Entry, budget: float | None, octave: int, seed: int) -> Job:
        return Job(entry, budget, octave, seed, max(1, round(self.study.steps * entry.share)))
