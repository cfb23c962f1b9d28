"""Result files, one a job, and the summary of a study's: all that its tables need, and no more.

Pure but for reading and writing files. Knows nothing of models, or of how tables look.
"""

from __future__ import annotations

import datetime
import gzip
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_blueprint._files import write_atomically

from .schedule import best_octave
from .study import UNTRAINED, Entry, Job, Study, digest


TIMES = "times-"
# of a row, from its first seed's record at the best learning rate
_OF_BEST = ("rate", "parameters", "modules", "lowest", "examples", "flops", "charged_flops", "step_time", "time")
_MORE_OF_BEST = ("kept", "charged_time", "memory", "peak_bytes", "seconds", "agreement", "stopped_by")
_OF_SEED = ("loss", "losses", "curve", "unrelated", "accuracy")


class Store:
    """Result files, which studies of the same facts share.

    Args:
        folder: of all studies.
        study: whose facts are part of every file's name.
    """

    def __init__(self, folder: Path, study: Study):
        self.folder = folder
        self.study = study
        self._known: dict[Path, dict[str, Any]] = {}

    @property
    def times(self) -> Path:
        """Where step times over all-linear's are, by row, one ratio a round."""
        return self.folder / f"{TIMES}{digest(self.study.facts())}.json"

    def path(self, job: Job, choice: Mapping[str, Any]) -> Path:
        """Named by what the job is, and a digest of all that bears on its result."""
        name = re.sub(r"[^\w.+-]+", "_", job.label)
        return self.folder / f"{name}-{digest([self.study.facts(), asdict(job), choice])}.json"

    def read(self, path: Path) -> dict[str, Any] | None:
        """A record, or None if the job has not run."""
        if path not in self._known and path.exists():
            self._known[path] = json.loads(path.read_text())
        return self._known.get(path)

    def write(self, path: Path, job: Job, record: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        whole = {"created": now, **record, "job": asdict(job), "study": self.study.facts()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(whole, allow_nan=False))
        self._known[path] = whole

    def claim(self, path: Path) -> FileLock | None:
        """The right to run a job, until it is released or the process ends; None where another process has it."""
        lock = FileLock(self.folder.parent / "claims" / path.with_suffix(".lock").name)
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        if path.exists():  # another process has just run it
            lock.release()
            return None
        return lock

    def keep(self, archive: Path) -> int:
        """Put every study's results into one file, one a line, with those that it has and the folder has not.

        Returns:
            How many it has.
        """
        lines = {path.name: path.read_text() for path in self.folder.glob("*.json") if not path.name.startswith(TIMES)}
        if archive.exists():
            ours = {_identity(json.loads(line)) for line in lines.values()}
            with gzip.open(archive, "rt") as file:
                older = [line.strip() for line in file]
            lines |= {line: line for line in older if _identity(json.loads(line)) not in ours}
        text = "".join(lines[name] + "\n" for name in sorted(lines))
        write_atomically(archive, gzip.compress(text.encode(), mtime=0))
        return len(lines)

    def archived(self, archive: Path) -> list[dict[str, Any]]:
        """An archive's results of this study's sizes.

        Raises:
            SystemExit: if there is no such archive.
        """
        if not archive.exists():
            raise SystemExit(f"There is no {archive}: --keep makes it from the result files of a run.")
        with gzip.open(archive, "rt") as file:
            records = [json.loads(line) for line in file]
        return [record for record in records if record["study"] == self.study.facts()]

    def forget(self, path: Path) -> None:
        """So that a job runs again."""
        self._known.pop(path, None)
        path.unlink()

    def all(self) -> list[tuple[Job, dict[str, Any]]]:
        """Every record of this study's arms at its present sizes; of one job the newest."""
        found: dict[Job, dict[str, Any]] = {}
        arms = {Entry(UNTRAINED), *self.study.entries}
        for path in sorted(self.folder.glob("*.json")):
            record = self.read(path) if not path.name.startswith(TIMES) else None
            if record is not None and record.get("study") == self.study.facts():
                job = Job.of(record["job"])
                if job.entry in arms and (job not in found or record["created"] >= found[job]["created"]):
                    found[job] = record
        return list(found.items())


def _identity(record: Mapping[str, Any]) -> str:
    """What a result is of: sizes, job, and what was trained."""
    return digest([record["study"], record["job"], record.get("ranks"), record.get("whole")])


def outcome(record: Mapping[str, Any] | None) -> float | None:
    """A job's loss as the schedule wants it: infinite where it diverged, NaN where it failed or cannot be."""
    if record is None:
        return None
    if record["status"] == "done":
        return float(record["loss"])
    return math.inf if record["status"] == "diverged" else math.nan


def summary(
    study: Study,
    records: Sequence[tuple[Job, Mapping[str, Any]]],
    times: Mapping[str, Any],
    is_budgeted: Callable[[str], bool] = lambda arm: True,
) -> dict[str, Any]:
    """What the report is made from.

    Args:
        study: whose they are.
        records: every job's.
        times: step times over all-linear's by row, one ratio a round.
        is_budgeted: whether an arm fills a budget, or has its own size.
    """
    by_row: dict[tuple[Entry, float | None], list[tuple[Job, Mapping[str, Any]]]] = {}
    for job, record in records:
        by_row.setdefault((job.entry, job.budget), []).append((job, record))
    rows = [_row(study, entry, budget, runs) for (entry, budget), runs in by_row.items() if entry.arm != UNTRAINED]
    order = {entry: i for i, entry in enumerate(study.entries)}
    names = {entry.label: order[entry] for entry in study.entries}
    rows.sort(key=lambda row: (row["budget"] is not None, -(row["budget"] or 0), names.get(row["label"], len(names))))
    untrained = next((record for job, record in records if job.entry.arm == UNTRAINED), None)
    done = next((record for _, record in records if record["status"] == "done"), None)
    return {
        "study": study.name,
        "facts": study.facts(),
        "about": dict(study.about),
        "kind": study.report,
        "reference": study.reference,
        "default": study.default,
        "device": None if done is None else done["device"],
        "versions": None if done is None else done["versions"],
        "jobs": len(records),
        "created": max((record["created"] for _, record in records), default=None),
        "counts": [] if done is None else done["counts"],
        "untrained": None if untrained is None else {key: untrained.get(key) for key in _OF_SEED},
        "rows": rows,
        "times": dict(times),
        "not_run": _not_run(study, {(row["label"], row["budget"]) for row in rows}, is_budgeted),
    }


def _not_run(study: Study, ran: set[tuple[str, float | None]], is_budgeted: Callable[[str], bool]) -> list[str]:
    """What the study asks for, at each budget, and has no record of."""
    wanted = [
        (entry.label, budget if is_budgeted(entry.arm) else None)
        for phase in study.order
        for budget in phase.budgets or (None,)
        for entry in phase.arms
        if entry.arm != UNTRAINED
    ]
    missing: dict[str, list[float]] = {}
    for label, budget in (one for one in dict.fromkeys(wanted) if one not in ran):
        missing.setdefault(label, []).extend([] if budget is None else [budget])
    return [
        f"{label} at {', '.join(f'{one:.0%}' for one in sorted(budgets, reverse=True))}" if budgets else label
        for label, budgets in missing.items()
    ]


def _row(
    study: Study, entry: Entry, budget: float | None, runs: Sequence[tuple[Job, Mapping[str, Any]]]
) -> dict[str, Any]:
    """One arm at one budget, at its own best learning rate."""
    runs = _alike(runs)
    first = {job.octave: outcome(record) for job, record in runs if job.seed == 0}
    known = {k: v for k, v in first.items() if v is not None and math.isfinite(v)}
    done = [(job, loss) for job, record in runs if (loss := outcome(record)) is not None]
    own = {"arm": entry.arm, "label": entry.label, "entry": asdict(entry), "budget": budget}
    tried = {f"{study.rate * 2.0**k:.3g}": known.get(k) for k in sorted(first)}
    if not known:
        status, error = runs[0][1]["status"], runs[0][1].get("error")
        if status == "done":  # a further seed, taken up before the first
            status, error = "begun", "not yet with the first seed"
        return {**own, "status": status, "error": error, "tried": tried, "seeds": {}}
    best = best_octave({k: {job.seed: loss for job, loss in done if job.octave == k} for k in known})
    assert best is not None
    at_best = {job.seed: (job, record) for job, record in runs if job.octave == best and record["status"] == "done"}
    job, record = at_best[0]
    return {
        **own,
        "status": "done",
        "steps": job.steps,
        "tried": tried,
        "is_inside": best - 1 in first and best + 1 in first,
        **{key: record.get(key) for key in (*_OF_BEST, *_MORE_OF_BEST)},
        "ranks": sorted(set(record["ranks"].values())),
        "seeds": {str(seed): {key: at_best[seed][1].get(key) for key in _OF_SEED} for seed in sorted(at_best)},
    }


def _alike(runs: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[tuple[Job, Mapping[str, Any]]]:
    """Those that train what the newest trains, for as long: a change of a rule or a blueprint leaves old ones behind.

    A run that failed before it was known what it trains is not asked.
    """

    def what(job: Job, record: Mapping[str, Any]) -> tuple[Any, Any, int]:
        return record.get("ranks"), record.get("whole"), job.steps

    known = [(job, record) for job, record in runs if record["status"] != "failed" or "ranks" in record]
    newest = max(known or runs, key=lambda one: one[1]["created"])
    return [one for one in runs if what(*one) == what(*newest)]
