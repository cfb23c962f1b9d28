"""A study as one YAML says it: data, sizes, arms, and in which order they are run.

Plain frozen records. Knows nothing of models, or of what an arm does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml


UNTRAINED = "untrained"
TASK = "task"  # a blueprint of the study's own data, of as many examples as it measures
FORMAT = 1  # of result files; a change that bears on results raises it


@dataclass(frozen=True)
class Entry:
    """An arm, with what is varied around it.

    Args:
        arm: a name among `arms.ARMS`.
        blueprint: what it is measured on: `task`, or a source and a number of examples, such as `nf4 x 64`.
        select: a method of `select_examples`, or None to train on everything.
        share: of the examples that are kept, and of the steps that they are trained for.
        stop: whether training ends where the reference's curve says that little more is to be had.
    """

    arm: str
    blueprint: str = TASK
    select: str | None = None
    share: float = 1.0
    stop: bool = False

    @property
    def label(self) -> str:
        """As tables say it."""
        parts = [self.arm if self.blueprint == TASK else f"{self.arm} [{self.blueprint}]"]
        parts += [f"{self.select} {self.share:g}"] if self.select else []
        return " + ".join([*parts, *(["stop"] if self.stop else [])])

    @property
    def family(self) -> Entry:
        """The entry whose learning rate this one takes: the first draw (of `random #2`), by the study's own blueprint."""
        return Entry(**asdict(self) | {"arm": self.arm.partition(" #")[0], "blueprint": TASK})


@dataclass(frozen=True)
class Job:
    """One arm, one learning rate, one seed: what is run at once.

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
    def label(self) -> str:
        """For people and for file names."""
        share = "" if self.budget is None else f" at {self.budget:g}"
        return f"{self.entry.label}{share} 2^{self.octave:+d} seed {self.seed}"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Job:
        """From `asdict`."""
        return cls(**{**data, "entry": Entry(**data["entry"])})


@dataclass(frozen=True)
class Phase:
    """Some jobs that follow each other.

    Args:
        arms: what is run.
        budgets: at which shares of all-linear's parameters.
        rates: "guess", the one learning rate that is expected to do; or "best", as many on a ladder as it takes for the
            best not to be at an edge, and at least three.
        seeds: at the best learning rate so far, where they are not the first seed.
        closest: besides `arms` so many of the lowest loss so far, at each budget.
    """

    arms: tuple[Entry, ...] = ()
    budgets: tuple[float, ...] = ()
    rates: Literal["guess", "best"] = "guess"
    seeds: tuple[int, ...] = (0,)
    closest: int = 0


@dataclass(frozen=True)
class Study:
    """What is run, at which size.

    Args:
        name: of the results.
        data: "gsm8k", "pubmedqa", "demo", or "jsonl" for FOLDER/train.jsonl and FOLDER/test.jsonl of prompts and
            completions.
        report: which tables: "contest", "transfer" or "multiplication".
        model: a folder or an id; None for SmolLM2-135M.
        dtype: of the model.
        attention: "sdpa", or "eager", which is faster for short examples in bfloat16 on a CPU.
        length: tokens of an example at most; longer ones are left out.
        batch: examples of a step.
        steps: of the optimizer, on as many examples of the pool.
        pool: training examples; None for those of one pass.
        warm_up: steps of a rising learning rate, which then falls linearly.
        rank: of all-linear LoRA.
        rate: learning rate of octave 0.
        measured: examples of a blueprint, none of which is trained on.
        held_out: test examples of the final loss.
        few: of them those of the curve.
        every: steps between two points of the curve.
        unrelated: examples of each unrelated text.
        spare: training examples that nothing else uses, of the curve; 0 takes the first `few` of the test's.
        reference: the arm that others are compared with.
        default: the arm that is the library's default.
        flops_per_second: of the machine, for estimates before anything was measured.
        order: what is run, first things first.
    """

    name: str
    data: str
    order: tuple[Phase, ...]
    report: Literal["contest", "transfer", "multiplication"] = "contest"
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
    reference: str = "all-linear"
    default: str = "planner, as shipped"
    flops_per_second: float = 60e9
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All that are named, in order."""
        return tuple(dict.fromkeys(entry for phase in self.order for entry in phase.arms))

    @property
    def examples(self) -> int:
        """That are trained on, if all are."""
        return self.pool or self.steps * self.batch

    def facts(self) -> dict[str, Any]:
        """What bears on every result."""
        ours = (
            "data",
            "model",
            "dtype",
            "length",
            "batch",
            "steps",
            "warm_up",
            "rank",
            "rate",
            "measured",
            "held_out",
        )
        own = {name: getattr(self, name) for name in (*ours, "few", "every", "unrelated")}
        for name in ("spare", "attention"):  # as they were results keep their names
            own |= {name: value} if (value := getattr(self, name)) != _USUAL[name] else {}
        return {**own, "examples": self.examples, "format": FORMAT}

    @classmethod
    def read(cls, path: Path) -> Study:
        """From a YAML, whose `groups` name lists of arms that phases may ask for.

        Raises:
            SystemExit: for keys that there are not, or a file that is no study.
        """
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SystemExit(f"{path} cannot be read: {error}. See benchmarks/studies.") from None
        if not isinstance(data, dict) or not {"data", "order"} <= set(data):
            raise SystemExit(f"{path} is no study: it needs data and order. See benchmarks/studies.")
        groups = data.pop("groups", {})
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SystemExit(f"{path} has unknown keys {unknown}; a study may have {', '.join(sorted(known))}.")
        for f in fields(cls):
            value = data.get(f.name, f.default)
            if type(f.default) in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise SystemExit(f"{path} says {f.name}: {value!r}, which is no number; {f.default} is usual.")
        order = tuple(_phase(phase, groups, path) for phase in data.pop("order"))
        return cls(**{"name": path.stem, **data}, order=order)


_USUAL = {f.name: f.default for f in fields(Study)}


def digest(value: Any) -> str:
    """Short, of what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _phase(data: Mapping[str, Any], groups: Mapping[str, Any], path: Path) -> Phase:
    known = {f.name for f in fields(Phase)}
    if unknown := sorted(set(data) - known):
        raise SystemExit(f"{path} has a phase with {unknown}; one may have {', '.join(sorted(known))}.")
    wanted = data.get("arms", [])
    arms = [one for name in ([wanted] if isinstance(wanted, str) else wanted) for one in _entries(name, groups)]
    own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Phase(**own | {"arms": tuple(arms)})


def _entries(wanted: Any, groups: Mapping[str, Any]) -> list[Entry]:
    if isinstance(wanted, str) and wanted in groups:
        return [entry for one in groups[wanted] for entry in _entries(one, groups)]
    return [Entry(wanted) if isinstance(wanted, str) else Entry(**wanted)]
