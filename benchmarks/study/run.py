"""What should the library recommend? Every rule for placing adapters on equal terms, as a study says.

    python -m benchmarks study benchmarks/studies/contest_gsm8k.yaml --data FOLDER [--budget-minutes 180] [--report]

A study (benchmarks/studies) names its data, sizes, arms and their order; FOLDER holds the data sets. Every job, one arm at
one learning rate with one seed, has a result file of its own under --out, named by a digest of all that bears on it, so
that a run that was killed goes on where it was, on the same machine or another, and studies share what they have in
common; several processes may run one study, a thread each (OMP_NUM_THREADS=1) on a CPU. An arm fills its budget of
trainable parameters from below. Its learning rate goes up and down a ladder of factors of two until the best is not at
an edge, at least three of them; where the ladder begins is told by Adam's first step, from a blueprint, also for arms
that are not charged for one. --report makes one JSON of all result files and from that alone the tables, which it
prints and puts where README.md and RESULTS.md quote them; it may be asked for while another process is running jobs.
--keep puts all result files into one archive, benchmarks/results/runs.jsonl.gz, and --restore takes from it those whose
arms choose the same here, so that a study goes on in another clone. Losses do not depend on how busy a machine is,
seconds do: --times measures step times apart, all arms in turn in one process, as ratios within a round; in the tables
they stand beside what the cost model predicts.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

from peft_blueprint._files import write_atomically
from peft_blueprint.errors import BlueprintError

from .quoting import requoted
from .report import markdown, picture
from .results import Store, outcome, summary
from .schedule import Schedule
from .study import TASK, UNTRAINED, Entry, Job, Study


OUT = Path(".cache/contest/runs")
WAIT = 5.0  # seconds between two looks at what other processes have done
RESULTS = Path(__file__).parents[1] / "results"
ARCHIVE = RESULTS / "runs.jsonl.gz"
DOCUMENTS = [Path(__file__).parents[2] / name for name in ("README.md", "RESULTS.md")]
# PEFT asks transformers a question that is about to be renamed
NOISE = "`is_gradient_checkpointing` is deprecated"


def main() -> None:
    """Parse, and run, list, time or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML, as in benchmarks/studies")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with the data sets")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of result files; by default {OUT}")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no job that would end later")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default a GPU if there is one")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of jobs' names, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show what has run, and what is next")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--report", action="store_true", help="write JSON, picture and quotes, and print the tables")
    parser.add_argument("--times", type=int, metavar="ROUNDS", help="measure step times in so many rounds")
    parser.add_argument("--keep", action="store_true", help=f"put the result files into {ARCHIVE.name}")
    parser.add_argument("--restore", action="store_true", help=f"take result files from {ARCHIVE.name}")
    options = parser.parse_args()

    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore", NOISE, FutureWarning)
    logging.disable_progress_bar()
    study = Study.read(options.study)
    store = Store(options.out, study)
    if options.report:
        report(study, store, RESULTS, DOCUMENTS)
        return
    if options.keep:
        say(f"{store.keep(ARCHIVE)} results are in {ARCHIVE}.")
        return
    runner = Runner(study, store, options.data)
    runner.require(options.device)
    if options.restore:
        say(f"{runner.restore(ARCHIVE)} results were restored.")
        return
    if options.list:
        runner.show(options.only)
    elif options.times:
        runner.times(options.times, options.only)
    else:
        runner.run(options.budget_minutes, options.only, options.retry)


def report(study: Study, store: Store, folder: Path, documents: Sequence[Path] = ()) -> dict[str, Any]:
    """The summary, written; its tables printed from what was written, and put where documents quote the study.

    Raises:
        SystemExit: if the summary that is there tells of more jobs.
    """
    from .catalogue import arm_of

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{study.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {"jobs": 0, "times": {}}
    times = before["times"] | (json.loads(store.times.read_text()) if store.times.exists() else {})
    found = summary(study, store.all(), times, lambda arm: arm_of(arm).is_budgeted)
    if before["jobs"] > found["jobs"]:
        raise SystemExit(
            f"{path} tells of {before['jobs']} jobs, and {store.folder} has results of {found['jobs']}: the rest would be lost. Give "
            f"the folder that has them as --out, or remove {path.name} to begin anew."
        )
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    read = json.loads(path.read_text())
    print(markdown(read))
    if study.report == "contest":
        picture(read, path.with_suffix(".png"))
    for document in documents:
        write_atomically(document, requoted(document.read_text(), read))
    return found


class Runner:
    """Runs a study's jobs, first things first.

    Args:
        study: what is wanted.
        store: where results are.
        data: folder of the data sets.
    """

    def __init__(self, study: Study, store: Store, data: Path):
        from .ground import Ground

        self.study = study
        self.store = store
        self.ground = Ground(study, data, store.folder.parent / "measured")
        self.schedule = Schedule(study, self._outcome, self._guess, self._is_budgeted, self._stop_share)

    def require(self, device: str | None) -> None:
        """Raise `SystemExit` unless the device is there, and every arm of the study."""
        from .catalogue import arm_of

        if device == "cuda" and self.ground.device != "cuda":
            raise SystemExit("There is no GPU here that torch can use: leave --device out, or say cpu.")
        for entry in self.study.entries:
            arm_of(entry.arm)

    def run(self, minutes: float, only: str = "*", retry: bool = False) -> int:
        """Run what is missing until it is done or the time is up. Returns how many ran."""
        start, count = time.monotonic(), 0
        again: set[Path] = set()
        while True:
            job, lock = self._next(only, retry, again)
            if job is None:
                say("All that is wanted has run.")
                return count
            if lock is None:  # other processes run what is left, and more may come of it
                time.sleep(WAIT)
                continue
            spent, needed = (time.monotonic() - start) / 60, self._minutes(job)
            if spent + needed > minutes:
                say(
                    f"{spent:.0f} of {minutes:g} minutes are spent, and {job.label} would take about {needed:.1f} more."
                )
                lock.release()
                return count
            try:
                record = self._one(job)
            finally:
                lock.release()
            count += 1
            loss = f" {record['loss']:.4f}" if record["status"] == "done" else f": {record.get('error', '')}"
            say(f"{count}, {(time.monotonic() - start) / 60:.0f} min: {job.label}: {record['status']}{loss}")

    def _next(self, only: str, retry: bool, again: set[Path]) -> tuple[Job | None, FileLock | None]:
        """The first job that has no result and that no other process runs, claimed; without a claim where all that are
        left are run by others; None where nothing is left.
        """
        taken = None
        for job in self._matching(only):
            if self._is_missing(job, retry, again):
                lock = self.store.claim(self._path(job))
                if lock is not None:
                    return job, lock
                taken = job
        return taken, None

    def restore(self, archive: Path) -> int:
        """Take an archive's results of this study that are not here, where an arm trains the same as it did there.

        Returns:
            How many.
        """
        from .catalogue import ARMS

        count = 0
        for record in self.store.archived(archive):
            job = Job.of(record["job"])
            choice = self._choice(job) if job.entry.arm in ARMS and "ranks" in record else {}
            is_same = not isinstance(choice, dict) and dict(choice.ranks) == record["ranks"]
            if is_same and list(choice.whole) == record["whole"] and self.store.read(self._path(job)) is None:
                self.store.write(self._path(job), job, record)
                count += 1
        return count

    def show(self, only: str) -> None:
        """Every job that is known to be wanted, with its loss or the minutes it should take."""
        total = 0.0
        for job in self._matching(only):
            record = self.store.read(self._path(job))
            total += 0 if record else self._minutes(job)
            state = f"by {total:6.0f} min" if record is None else f"{record['status']} {record.get('loss') or ''}"
            print(f"{state:30} {job.label}")
        print(
            f"about {total:.0f} minutes for these; ladders of learning rates and the closest arms add theirs as they come"
        )

    def times(self, rounds: int, only: str) -> None:
        """Step times over the reference's, of every arm in turn; the first round warms up."""
        from .job import step_seconds

        rows: dict[str, Job] = {}
        for job in self.schedule.jobs():
            name = job.entry.label + ("" if job.budget is None else f" at {job.budget:.0%}")
            if fnmatch.fnmatch(name, only) and job.entry.arm != UNTRAINED and not isinstance(self._choice(job), dict):
                rows.setdefault(name, job)
        reference = Job(Entry(self.study.reference), None, 0, 0, self.study.steps)
        base = self.ground.model()
        path = self.store.times
        ratios: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        for i in range(rounds + 1):
            for name, job in rows.items():
                of_all = step_seconds(self.ground, self._choice(reference), base)
                own = step_seconds(self.ground, self._choice(job), base)
                if i:
                    ratios.setdefault(name, []).append(round(own / of_all, 4))
                    write_atomically(path, json.dumps(ratios))
                say(f"round {i} of {rounds}: {name} {own:.2f} s, {self.study.reference} {of_all:.2f} s")

    def _one(self, job: Job) -> dict[str, Any]:
        """Run a job, and write what came of it, errors too."""
        from .job import run

        choice = self._choice(job)
        record: dict[str, Any]
        if isinstance(choice, dict):
            record = choice
        else:
            try:
                record = run(self.ground, job, choice)
                record |= {"agreement": self._agreement(job), "stopped_by": self._stopped if job.entry.stop else None}
                json.dumps(record, allow_nan=False)  # what cannot be written is found here
            except Exception as error:  # whatever an arm's library raises is that arm's result
                record = {**failure(error), "ranks": dict(choice.ranks), "whole": list(choice.whole)}
        self.store.write(self._path(job), job, record)
        return record

    @functools.cache  # noqa: B019  one runner lives as long as the process
    def _choose(self, entry: Entry, budget: float | None) -> Any:
        """A choice, or a record of why there is none; the same for all that is only selected or stopped otherwise."""
        from .arms import Infeasible
        from .catalogue import choice_of

        try:
            return choice_of(self.ground, entry, budget)
        except Infeasible as error:
            return {"status": "infeasible", "error": str(error)}
        except BlueprintError as error:  # a score that this blueprint does not carry, say
            return {"status": "infeasible", "error": f"{type(error).__name__}: {error}"}
        except Exception as error:  # that one arm cannot be chosen is no reason not to run others
            return failure(error)

    def _choice(self, job: Job) -> Any:
        return self._choose(Entry(job.entry.arm, job.entry.blueprint), job.budget)

    @functools.cache  # noqa: B019
    def _path(self, job: Job) -> Path:
        choice = self._choice(job)
        return self.store.path(job, {"none": True} if isinstance(choice, dict) else choice.to_dict())

    def _outcome(self, job: Job) -> float | None:
        return outcome(self.store.read(self._path(job)))

    def _guess(self, entry: Entry, budget: float | None) -> int:
        from .catalogue import guess_of

        choice = self._choose(Entry(entry.arm, entry.blueprint), budget)
        return 0 if isinstance(choice, dict) else guess_of(self.ground, entry.arm, choice)

    def _is_budgeted(self, arm: str) -> bool:
        from .catalogue import arm_of

        return arm_of(arm).is_budgeted

    @property
    def _stopped(self) -> tuple[float, str] | None:
        """At which share of the steps the reference might have ended, and what says so; None until it has run."""
        from .job import stop_share

        reference = Entry(self.study.reference)
        octave = self.schedule.best(reference, None)
        untrained = self.store.read(self._path(Job(Entry(UNTRAINED), None, 0, 0, 0)))
        if octave is None or untrained is None or untrained["status"] != "done":
            return None
        record = self.store.read(self._path(Job(reference, None, octave, 0, self.study.steps)))
        assert record is not None
        return stop_share([*untrained["curve"], *record["curve"]], self.study.steps)

    def _stop_share(self) -> float | None:
        found = self._stopped
        return None if found is None else found[0]

    def _agreement(self, job: Job) -> dict[str, float | None] | None:
        """Of a blueprint and what was placed by it with the study's own."""
        from peft_blueprint.compare import check_drift

        if job.entry.blueprint == TASK:
            return None
        own = self._choose(Entry(job.entry.arm), job.budget)
        if isinstance(own, dict):
            return None
        ours, theirs = set(own.ranks), set(self._choice(job).ranks)
        try:
            drift = check_drift(self.ground.blueprint(job.entry.blueprint), self.ground.blueprint())
        except BlueprintError:  # a model with too few submodules of a kind to correlate
            return {"jaccard": len(ours & theirs) / len(ours | theirs), "correlation": None}
        return {"jaccard": len(ours & theirs) / len(ours | theirs), "correlation": drift.correlation}

    def _minutes(self, job: Job) -> float:
        """That a job should take, at the speed of those that ran."""
        from .arms import cost_of

        choice = self._choice(job)
        if isinstance(choice, dict):
            return 0.0
        done = [r for _, r in self.store.all() if r["status"] == "done" and r["flops"] and r["device"]]
        speed = self.study.flops_per_second
        if done:
            speed = sum(r["flops"] for r in done) / sum(r["seconds"] for r in done)
        study = self.study
        forward = self.ground.costs.floor().forward
        positions = 0.9 * study.batch * study.length  # of a batch, on average
        evaluated = (study.held_out + 2 * study.unrelated) * study.length
        return (cost_of(self.ground, choice).flops * positions * job.steps + forward * evaluated) / speed / 60

    def _matching(self, only: str) -> Iterator[Job]:
        return (job for job in self.schedule.jobs() if fnmatch.fnmatch(job.label, only))

    def _is_missing(self, job: Job, retry: bool, again: set[Path]) -> bool:
        """Whether a job has no result; one that failed loses it, once, if it is to run again."""
        path = self._path(job)
        record = self.store.read(path)
        if record is not None and record["status"] == "failed" and retry and path not in again:
            again.add(path)
            self.store.forget(path)
            return True
        return record is None


def failure(error: Exception) -> dict[str, Any]:
    """The record of a job that an exception ended; to be called while it is handled."""
    said = traceback.format_exc().splitlines()[-8:]
    return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": said}


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
