"""Write a resampled study as a page: one table of measured numbers, then each statement with its decision."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_blueprint._files import write_atomically

from .inference import LEVEL, MARGIN, Effect, effect_of, holm, levels
from .plan import EQUAL, TASK, Entry
from .report import Report, Row


CHOOSING = 0  # the seed that chooses learning rates, and is not reported
WORDS = {"license": "licence text", "pubmedqa": "PubMedQA", "gsm8k": "GSM8K"}


@dataclass(frozen=True)
class Statement:
    """A comparison that is decided, with its p-value after Holm's adjustment.

    Args:
        row: label of an arm.
        other: label of the arm that it is compared with.
        effect: on the held-out loss, over the seeds of the look.
        verdict: in words.
    """

    row: str
    other: str
    effect: Effect
    verdict: str


def told(entry: Entry) -> str:
    """Name an arm for readers.

    Example:
        >>> told(Entry("cover_gain x 30, along the gradient, as shipped", blueprint="equal"))
        'equal-weight cover, 30 adapters, along the gradient'
    """
    base, *modifiers = entry.arm.partition(" #")[0].split(", ")
    word, _, count = base.partition(" x ")
    known = {"cover_gain": "cover" if entry.blueprint in (TASK, EQUAL) else f"cover by {entry.blueprint}"}
    weights = {"cover_gain": {TASK: "measured ", EQUAL: "equal-weight "}.get(entry.blueprint, "")}
    parts = [weights.get(word, "") + known.get(word, word)]
    parts += [f"{count} adapters"] if count else []
    parts += [part for part in modifiers if part != "as shipped"]
    parts += [f"{entry.share:g} of the steps"] if entry.select == "random" else []
    return ", ".join(parts)


def effect(row: Row, other: Row, pool: int, seeds: Sequence[int], key: str = "losses") -> Effect | None:
    """Estimate a row's relative difference from another; None without two seeds in common.

    Args:
        row: of an arm.
        other: of the reference.
        pool: examples that tests are drawn from.
        seeds: that may count.
        key: "losses" of the held-out examples, or "training": every batch's loss before it is trained on.
    """
    shared = [s for s in seeds if s in (row.runs or {}) and s in (other.runs or {})]
    if len(shared) < 2:
        return None
    pairs = [(row.runs[s], other.runs[s]) for s in shared]  # type: ignore[index]
    if key == "training":
        if any(len(a[key]) != len(b[key]) or None in a[key] or None in b[key] for a, b in pairs):
            return None
        weights = [[1.0] * len(a[key]) for a, _ in pairs]
        pool = len(shared) * len(pairs[0][0][key])
    else:
        weights = [a["counts"] for a, _ in pairs]
    apart = [[x - y for x, y in zip(a[key], b[key], strict=True)] for a, b in pairs]
    reference = [statistics.fmean(b[key]) if key == "training" else b["loss"] for _, b in pairs]
    return effect_of(apart, weights, reference, pool)


def statements(report: Report, pool: int) -> list[Statement]:
    """Decide every comparison that the study names, at the last look that all of its arms have reached."""
    found: list[tuple[Row, Row, Effect, float]] = []
    looks = levels(report.study.looks)
    for label in report.study.compare:
        for other in report.named(label):
            for row in report.rows:
                if row is other or (row.label in report.study.compare[: report.study.compare.index(label)]):
                    continue
                seeds = [s for s in (row.runs or {}) if s in (other.runs or {}) and s != CHOOSING]
                reached = [look for look in looks if look <= len(seeds)]
                apart = effect(row, other, pool, seeds[: reached[-1]] if reached else seeds)
                if apart is not None:
                    found.append((row, other, apart, looks[reached[-1]] if reached else 0.0))
    adjusted = zip(holm([e.p_differs for *_, e, _ in found]), holm([e.p_equal() for *_, e, _ in found]), strict=True)
    return [
        Statement(told(row.entry), told(other.entry), one, verdict(one, level, *both))
        for (row, other, one, level), both in zip(found, adjusted, strict=True)
    ]


def verdict(one: Effect, level: float, p_differs: float, p_equal: float) -> str:
    """State the decisions at a look's level, 0 before the first look."""
    if not level:
        return "open: the first look has not been reached"
    if p_equal < level:
        return f"equal within {MARGIN:.1%}"
    if p_differs < level:
        return "lower" if one.mean < 0 else "higher"
    return "open"


def markdown(report: Report, command: str) -> str:
    """Return the page.

    Args:
        report: of a study with `resample`.
        command: that writes the page.

    Raises:
        SystemExit: for a study whose seeds share their examples.
    """
    study = report.study
    if not study.resample:
        raise SystemExit(f"{study.name} tests all seeds on the same examples. Use --report, or add resample: true.")
    rows = [row for row in report.rows if len(_reported(row)) > 1]
    if not rows or not report.reference:
        raise SystemExit(f"{study.name} has no arm with two seeds beside the first yet.")
    pool = max(i for row in rows for run in _reported(row).values() for i in run["tested"]) + 1
    newest = max(run["created"] for row in rows for run in _reported(row).values())[:10]
    text = [
        f"`{command}` writes this page from `benchmarks/results/runs.parquet`; the newest run is of {newest}.",
        f"SmolLM2-135M-Instruct, {study.data}, {study.dtype}, {study.steps} steps of {study.batch} examples of at most "
        f"{study.length} tokens; {study.held_out} test examples a seed, drawn from {pool:,}. Training and test examples "
        "and LoRA's first weights are fresh for every seed and the same for all arms of a seed. Seed 0 chose the "
        "learning rates and is not reported. Differences are relative, with 95 % intervals of paired t-tests.",
    ]
    columns = _columns(report, pool)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    text.append("\n".join(lines))
    looks = ", ".join(map(str, study.looks))
    text.append(
        f"Statements are made at looks after {looks} seeds, at levels that spend {LEVEL:g} over all looks as O'Brien and "
        f"Fleming do, adjusted for their number as Holm does. Two arms are equal where both one-sided tests exclude "
        f"{MARGIN:.1%}."
    )
    decided = statements(report, pool)
    text.append(
        "\n".join(
            f"- {one.row} against {one.other}: {_percent(one.effect)}, {one.effect.seeds} seeds: **{one.verdict}**."
            for one in decided
        )
        or "No two arms share two seeds yet."
    )
    return "\n\n".join(text) + "\n"


def insert(path: Path, name: str, text: str) -> None:
    """Replace the part of a page between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        SystemExit: for a page without these lines.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    page = path.read_text() if path.exists() else ""
    head, opened, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(
            f"{path} must be a page with the lines {start.strip()} and {end}, which the numbers go between."
        )
    write_atomically(path, f"{head}{start}\n{text}\n{closed}{tail}")


def _reported(row: Row) -> Mapping[int, Mapping[str, Any]]:
    return {seed: run for seed, run in (row.runs or {}).items() if seed != CHOOSING}


def _columns(report: Report, pool: int) -> dict[str, Any]:
    def minus(other: Row, key: str = "losses") -> Any:
        return lambda row: "–" if row is other else _percent(effect(row, other, pool, sorted(_reported(row)), key))

    [reference] = report.reference
    found: dict[str, Any] = {
        "arm": lambda row: told(row.entry),
        "adapters x rank": lambda row: _adapters(row),
        "seeds": lambda row: str(len(_reported(row))),
        "loss": lambda row: f"{statistics.fmean(run['loss'] for run in _reported(row).values()):.4f}",
        f"against {told(reference.entry)}": minus(reference),
        "in training": minus(reference, "training"),
    }
    for label in report.study.compare[1:]:
        found |= {f"against {told(other.entry)}": minus(other) for other in report.named(label)}
    if any(len(report.times.get(row.label, [])) for row in report.rows):
        found["step time"] = lambda row: _time(report.times.get(row.label, []), row is reference)
    peaks = {row.label: _peak(row) for row in report.rows}
    found["peak memory"] = lambda row: (
        f"{peaks[row.label] / peaks[reference.label]:.2f}" if peaks[row.label] and peaks[reference.label] else "–"
    )
    for name in (report.untrained or {}).get("unrelated", {}):
        found[f"{WORDS.get(name, name)} forgotten"] = lambda row, name=name: _forgotten(report, row, name)
    return found


def _adapters(row: Row) -> str:
    ranks = sorted(set(row.first["ranks"].values()))
    return f"{row.first['modules']} x {'–'.join(map(str, ranks[:: max(1, len(ranks) - 1)]))}"


def _peak(row: Row) -> float:
    return statistics.median([run["peak_bytes"] or 0 for run in _reported(row).values()] or [0])


def _time(found: Sequence[float], is_reference: bool) -> str:
    if is_reference or len(found) < 2:
        return "1" if is_reference else "–"
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _forgotten(report: Report, row: Row, name: str) -> str:
    assert report.untrained is not None
    return f"{statistics.fmean(run['unrelated'][name] for run in _reported(row).values()) - report.untrained['unrelated'][name]:+.3f}"


def _percent(found: Effect | None) -> str:
    if found is None:
        return "–"
    low, high = found.interval()
    return f"{found.mean:+.2%} [{low:+.2%}, {high:+.2%}]"
