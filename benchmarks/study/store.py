"""Keep the records of all studies in one archive, so that a killed run resumes and several processes share a study."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from peft_blueprint._files import replacing

from ..setup import CACHE, RESULTS
from .plan import UNTRAINED, Entry, Job, Study, digest


ARCHIVE = RESULTS / "runs.parquet"
LOG = CACHE / "runs.jsonl"
STEP_TIME = "step time"  # status of a record that holds a measured ratio to the reference, not a job's result
NUMBERS = ("rate", "loss", "parameters", "modules", "flops", "step_time", "memory", "seconds", "ratio")

Record = dict[str, Any]


class Store:
    """Records of an archive, which is under version control, and of a log, which running processes append to.

    A record is found again by the study's sizes, its job and what it trains, so that studies share what they have in
    common, and a change of a rule or a blueprint leaves old records behind.

    Args:
        study: whose records are wanted.
        log: file of JSON lines.
        archive: Parquet; its column `record` has the JSON lines, the others are there to query.
    """

    def __init__(self, study: Study, log: Path = LOG, archive: Path = ARCHIVE):
        self.study = study
        self.log = log
        self.archive = archive
        self._known: dict[str, Record] = {}
        self._read = 0  # bytes of the log
        if archive.exists():
            self._add(pyarrow.parquet.read_table(archive, columns=["record"])["record"].to_pylist())

    def _add(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut short when its process was killed
                continue
            self._known[key_of(record)] = record

    def refresh(self) -> None:
        """Read what other processes have appended."""
        size = self.log.stat().st_size if self.log.exists() else 0
        if size < self._read:  # `keep` of another process has begun a new log
            self._read = 0
        if size == self._read:
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        self._add(whole.decode().splitlines())

    def get(self, job: Job, trained: Mapping[str, Any] | None) -> Record | None:
        """Return a job's record, or None if it has not run.

        Args:
            job: of the study.
            trained: its `ranks` and `whole`; None of an infeasible choice.
        """
        self.refresh()
        return self._known.get(key_of({"study": self.study.facts(), "job": asdict(job), **(trained or {})}))

    def append(self, record: Mapping[str, Any]) -> Record:
        """Append a record with the date and the study's sizes to the log."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        whole = {"created": now, **record, "study": self.study.facts()}
        line = json.dumps(whole, allow_nan=False)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.log.with_suffix(".lock")), self.log.open("ab+") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            cut = b"\n" if size and file.read(1) != b"\n" else b""  # a killed process left half a line
            file.write(cut + line.encode() + b"\n")
        self.refresh()
        return whole

    def claim(self, job: Job, trained: Mapping[str, Any] | None) -> FileLock | None:
        """Claim a job until the lock is released or the process ends; return None where another process has it."""
        key = key_of({"study": self.study.facts(), "job": asdict(job), **(trained or {})})
        folder = self.log.parent / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock

    def keep(self) -> int:
        """Move the log's records into the archive; return how many it holds."""
        with FileLock(self.log.with_suffix(".lock")):
            self.refresh()
            table = pyarrow.Table.from_pylist([_row_of(self._known[key]) for key in sorted(self._known)])
            with replacing(self.archive) as file:
                pyarrow.parquet.write_table(table, file, compression="zstd", compression_level=19)
            self.log.unlink(missing_ok=True)
            self._read = 0
        return len(self._known)

    def jobs(self) -> list[tuple[Job, Record]]:
        """Return the records of this study's arms at its sizes; of one job the newest."""
        self.refresh()
        found: dict[Job, Record] = {}
        arms = {Entry(UNTRAINED), *self.study.entries}
        for record in self._of_study():
            if record["status"] != STEP_TIME:
                job = Job.of(record["job"])
                if job.entry in arms and (job not in found or record["created"] >= found[job]["created"]):
                    found[job] = record
        return list(found.items())

    def step_times(self) -> dict[str, list[float]]:
        """Return measured step times over the reference's by row, one ratio a round."""
        found: dict[str, list[float]] = {}
        for record in self._of_study():
            if record["status"] == STEP_TIME:
                found.setdefault(record["row"], []).append(record["ratio"])
        return found

    def _of_study(self) -> Iterator[Record]:
        facts = self.study.facts()
        return (record for record in self._known.values() if record["study"] == facts)


def _row_of(record: Record) -> Record:
    """Return a record as a row of the archive."""
    study, job = record["study"], record.get("job", {})
    return {
        **{key: record[key] for key in ("created", "status")},
        **{key: study[key] for key in ("data", "dtype", "length", "batch", "steps")},
        "arm": job["entry"]["arm"] if job else record["row"],
        **{key: job.get(key) for key in ("budget", "octave", "seed")},
        **{key: record.get(key) for key in NUMBERS},
        "record": json.dumps(record),
    }


def key_of(record: Mapping[str, Any]) -> str:
    """Return a digest of a record's subject: sizes, job, and trained weights."""
    if record.get("status") == STEP_TIME:
        return digest([record["study"], record["row"], record["ratio"], record["created"], record.get("round")])
    return digest([record["study"], record["job"], record.get("ranks"), record.get("whole")])


def outcome(record: Mapping[str, Any] | None) -> float | None:
    """Return a job's loss as the schedule has it: infinite where it diverged, NaN where it failed or is infeasible."""
    if record is None:
        return None
    if record["status"] == "done":
        return float(record["loss"])
    return math.inf if record["status"] == "diverged" else math.nan
