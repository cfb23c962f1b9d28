"""Run a study of placements: train its arms in order of worth, resume where a run ended, compare arms seed by seed.

    python -m benchmarks study benchmarks/studies/contest_bf16.yaml --data FOLDER [--processes 2] [--minutes 180]
    python -m benchmarks study benchmarks/studies/contest_bf16.yaml --report
    python -m benchmarks study benchmarks/studies/measuring.yaml --page docs/results/placement.md

A study names its data, sizes, arms and their order; FOLDER holds the data sets. A job is one arm at one learning rate
with one seed. Its record is appended to a log, and `--keep` moves the log into benchmarks/results/runs.parquet. A
killed run resumes, several processes share a study (one thread each on a CPU), and studies share what they have in
common. An arm fills its budget of trainable parameters from below. Its learning rate goes up and down a ladder of
factors of two until the best is inside, where the study asks for that. Losses do not depend on how busy a machine is,
seconds do: `--times` measures step times apart, all arms in turn in one process, as ratios within a round.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import subprocess
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_blueprint.compare import check_drift
from peft_blueprint.errors import BlueprintError

from ..setup import CACHE, own_command, own_environment, say
from .arms import Choice, Infeasible, choice_of, guess_of, rule_of
from .ground import Ground
from .page import insert, markdown
from .plan import TASK, UNTRAINED, Entry, Job, Schedule, Study
from .report import Report
from .store import LOG, STEP_TIME, Store, outcome
from .training import run, step_seconds


WAIT = 5.0  # seconds between two looks at what other processes have done
QUICK_STUDY = Path(__file__).parents[1] / "studies" / "quick.yaml"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add a study's options."""
    parser.add_argument("study", type=Path, nargs="?", help="YAML file, see benchmarks/studies")
    parser.add_argument("--log", type=Path, default=LOG, help=f"file of new records ({LOG})")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no job that would end later")
    parser.add_argument("--processes", type=int, default=1, help="that run jobs, one thread each")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of jobs' names, as --jobs shows them")
    parser.add_argument("--jobs", action="store_true", help="show finished jobs and the next one")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--times", type=int, metavar="ROUNDS", help="measure step times")
    parser.add_argument("--report", action="store_true", help="print the tables")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="with --report: draw loss against cost")
    parser.add_argument("--page", type=Path, metavar="MD", help="write a resampled study's numbers into a page")
    parser.add_argument("--keep", action="store_true", help="move the log into the archive")


def main(options: argparse.Namespace) -> None:
    """Follow the options; by default run the missing jobs."""
    if options.study is None and not options.quick:
        raise SystemExit("Give a study, such as benchmarks/studies/contest_demo.yaml, or --quick.")
    study = Study.read(QUICK_STUDY if options.quick else options.study)
    if options.quick:
        options.log = CACHE / "quick" / "runs.jsonl"
        options.log.unlink(missing_ok=True)
    store = Store(study, options.log)
    if options.keep:
        say(f"{store.keep()} records are in {store.archive}.")
    elif options.page:
        command = f"python -m benchmarks study {options.study} --page {options.page}"
        insert(options.page, study.name, markdown(Report(study, store.jobs(), store.step_times()), command))
    elif options.report:
        report = Report(study, store.jobs(), store.step_times())
        print(report.markdown())
        if options.picture:
            report.picture(options.picture)
    elif options.processes > 1:
        _run_processes(options)
    else:
        runner = Runner(without_retired(study, store), store, options.data)
        if options.jobs:
            runner.show(options.only)
        elif options.times:
            runner.times(options.times, options.only)
        else:
            runner.run(options.minutes, options.only, options.retry)
            if options.quick:
                print(Report(study, store.jobs(), {}).markdown())


def without_retired(study: Study, store: Store) -> Study:
    """Leave out arms that ran once and that no rule knows any more.

    Raises:
        SystemExit: for an unknown arm that never ran.
    """
    ran, retired = {job.entry.arm for job, _ in store.jobs()}, set()
    for entry in study.entries:
        try:
            rule_of(entry.arm)
        except SystemExit:
            if entry.arm not in ran:
                raise
            retired.add(entry.arm)
    if retired:
        say(f"Not run any more: {'; '.join(sorted(retired))}.")
    kept = (replace(phase, arms=tuple(e for e in phase.arms if e.arm not in retired)) for phase in study.order)
    return replace(study, order=tuple(kept))


def _run_processes(options: argparse.Namespace) -> None:
    """Run the same command several times, one thread each."""
    command, one_thread = own_command(options, "--processes", "1"), own_environment(OMP_NUM_THREADS="1")
    running = [subprocess.Popen(command, env=one_thread) for _ in range(options.processes)]
    if failed := [process.args for process in running if process.wait()]:
        raise SystemExit(f"{len(failed)} of {options.processes} processes failed.")


class Runner:
    """Runs a study's jobs in order.

    Args:
        study: the study to run.
        store: of records.
        data: folder of the data sets.
    """

    def __init__(self, study: Study, store: Store, data: Path, cache: Path = CACHE / "measured"):
        self.study = study
        self.store = store
        self.ground = Ground(study, data, cache)
        self.schedule = Schedule(study, self._outcome, self._guess, lambda arm: rule_of(arm).is_budgeted)
        self._retried: set[Job] = set()

    def run(self, minutes: float, only: str = "*", retry: bool = False) -> int:
        """Run missing jobs until none is left, or the time is up; return how many ran."""
        start, count = time.monotonic(), 0
        while True:
            job, lock = self._next(only, retry)
            if job is None:
                say("All jobs have run.")
                return count
            if lock is None:  # other processes run the rest, and more may follow from it
                time.sleep(WAIT)
                continue
            try:
                spent, needed = (time.monotonic() - start) / 60, self._minutes(job)
                if spent + needed > minutes:
                    say(f"{spent:.0f} of {minutes:g} minutes are spent; {job.label} needs about {needed:.1f} more.")
                    return count
                record = self._one(job)
            finally:
                lock.release()
            count += 1
            told = f" {record['loss']:.4f}" if record["status"] == "done" else f": {record.get('error', '')}"
            say(f"{count}, {(time.monotonic() - start) / 60:.0f} min: {job.label}: {record['status']}{told}")

    def show(self, only: str) -> None:
        """Print every job that is known to be wanted, with its loss or the minutes it needs."""
        total = 0.0
        for job in self._matching(only):
            record = self._record(job)
            total += 0 if record else self._minutes(job)
            state = f"by {total:6.0f} min" if record is None else f"{record['status']} {record.get('loss') or ''}"
            print(f"{state:30} {job.label}")
        print(f"about {total:.0f} minutes; ladders of learning rates and the closest arms add to them as they come")

    def times(self, rounds: int, only: str) -> None:
        """Record step times over the reference's, of every arm in turn; the first round warms up."""
        choices = {job.row: self._choice(job) for job in self.schedule.jobs() if job.entry.arm != UNTRAINED}
        reference = self._choice(Job(Entry(self.study.reference), None, 0, 0, self.study.steps))
        assert isinstance(reference, Choice)
        base = self.ground.model()
        for i in range(rounds + 1):
            for row, choice in choices.items():
                if isinstance(choice, Choice) and fnmatch.fnmatch(row, only):
                    of_all = step_seconds(self.ground, reference, base)
                    own = step_seconds(self.ground, choice, base)
                    if i:
                        ratio = round(own / of_all, 4)
                        self.store.append({"status": STEP_TIME, "row": row, "ratio": ratio, "round": i})
                    say(f"round {i} of {rounds}: {row} {own:.2f} s, {self.study.reference} {of_all:.2f} s")

    def _next(self, only: str, retry: bool) -> tuple[Job | None, FileLock | None]:
        """Return the first job to run, claimed; without a lock where other processes run all that are left."""
        taken = None
        for job in self._matching(only):
            if self._is_missing(job, retry):
                lock = self.store.claim(job, self._trained(job))
                if lock is not None and self._is_missing(job, retry):  # it was not run since
                    self._retried.add(job)
                    return job, lock
                if lock is None:
                    taken = job
                else:
                    lock.release()
        return taken, None

    def _is_missing(self, job: Job, retry: bool) -> bool:
        record = self._record(job)
        return record is None or (retry and record["status"] == "failed" and job not in self._retried)

    def _one(self, job: Job) -> dict[str, Any]:
        """Run a job and append what came of it, errors too."""
        choice = self._choice(job)
        if not isinstance(choice, Choice):
            return self.store.append({**choice, "job": asdict(job)})
        try:
            record = {**run(self.ground, job, choice), "agreement": self._agreement(job), "job": asdict(job)}
            return self.store.append(record)
        except Exception as error:  # whatever an arm's library raises is that arm's result
            return self.store.append({**failure(error), **_trained_by(choice), "job": asdict(job)})

    @functools.cache  # noqa: B019  one runner lives as long as the process
    def _choose(self, entry: Entry, budget: float | None) -> Choice | dict[str, Any]:
        """Return a choice, or a record of why there is none."""
        try:
            return choice_of(self.ground, entry, budget)
        except Infeasible as error:
            return {"status": "infeasible", "error": str(error)}
        except BlueprintError as error:  # such as a score that this blueprint does not have
            return {"status": "infeasible", "error": f"{type(error).__name__}: {error}"}
        except Exception as error:  # one arm that cannot be chosen does not stop others
            return failure(error)

    def _choice(self, job: Job) -> Choice | dict[str, Any]:
        return self._choose(Entry(job.entry.arm, job.entry.blueprint), job.budget)

    def _trained(self, job: Job) -> dict[str, Any] | None:
        choice = self._choice(job)
        return _trained_by(choice) if isinstance(choice, Choice) else None

    def _record(self, job: Job) -> dict[str, Any] | None:
        return self.store.get(job, self._trained(job))

    def _outcome(self, job: Job) -> float | None:
        return outcome(self._record(job))

    def _guess(self, entry: Entry, budget: float | None) -> int:
        choice = self._choose(Entry(entry.arm, entry.blueprint), budget)
        return guess_of(self.ground, entry, choice) if isinstance(choice, Choice) else 0

    def _agreement(self, job: Job) -> dict[str, float | None] | None:
        """Compare another blueprint, and its placement, with the study's own."""
        own = self._choose(Entry(job.entry.arm), job.budget)
        if job.entry.blueprint == TASK or not isinstance(own, Choice):
            return None
        ours, theirs = set(own.ranks), set((self._trained(job) or {}).get("ranks", ()))
        try:
            correlation = check_drift(self.ground.blueprint(job.entry.blueprint), self.ground.blueprint()).correlation
        except BlueprintError:  # too few submodules of a kind to correlate
            correlation = None
        return {"jaccard": len(ours & theirs) / len(ours | theirs), "correlation": correlation}

    def _minutes(self, job: Job) -> float:
        """Estimate a job at the speed of those that ran."""
        choice = self._choice(job)
        if not isinstance(choice, Choice):
            return 0.0
        study, costs = self.study, self.ground.costs
        done = [r for _, r in self.store.jobs() if r["status"] == "done" and r["flops"]]
        speed = sum(r["flops"] for r in done) / sum(r["seconds"] for r in done) if done else study.flops_per_second
        positions = 0.9 * study.batch * study.length  # of a batch, on average
        evaluated = (study.held_out + 2 * study.unrelated) * study.length
        flops = costs.cost(dict(choice.ranks), choice.whole).flops * positions * job.steps
        return (flops + costs.floor().forward * evaluated) / speed / 60

    def _matching(self, only: str) -> Iterator[Job]:
        return (job for job in self.schedule.jobs() if fnmatch.fnmatch(job.label, only))


def _trained_by(choice: Choice) -> dict[str, Any]:
    return {"ranks": dict(choice.ranks), "whole": list(choice.whole)}


def failure(error: Exception) -> dict[str, Any]:
    """Return the record of a job that an exception ended; call it while the exception is handled."""
    lines = traceback.format_exc().splitlines()[-8:]
    return {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": lines}
