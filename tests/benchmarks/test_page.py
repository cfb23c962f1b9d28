"""A study's page states only conclusions that its seeds support; on simulated records."""

import math

import numpy as np
import pytest

from benchmarks.study.inference import Effect, effect_of, levels, spent
from benchmarks.study.page import insert, markdown, statements, told
from benchmarks.study.plan import Entry, Job, Phase, Study
from benchmarks.study.report import Report


EQUAL = Entry("cover_gain x 30, as shipped", blueprint="equal")
MEASURED = Entry("cover_gain x 30, as shipped")
WHOLE = Entry("all-linear")
POOL, HELD_OUT, STEPS = 1000, 50, 4


def simulated(apart: dict[Entry, float], seeds: int, noise: float = 0.002) -> list:
    """Runs whose losses are about 1 and lie relatively apart, with noise of each run and of each example."""
    draw, runs = np.random.default_rng(0), []
    for seed in range(seeds + 1):
        examples = draw.normal(1.0, 0.2, HELD_OUT)
        tested = draw.choice(POOL, HELD_OUT, replace=False)
        for entry, mean in apart.items():
            own = 9.0 if seed == 0 else mean + draw.normal(0, noise)  # the first seed would spoil everything
            losses = examples + own + draw.normal(0, noise, HELD_OUT)
            record = {"status": "done", "created": "2026-01-02", "losses": losses.tolist(), "counts": [10] * HELD_OUT}
            record |= {"loss": float(losses.mean()), "training": [1.0 + own] * STEPS, "tested": tested.tolist()}
            record |= {"ranks": {"a": 16}, "whole": [], "modules": 1, "unrelated": {}, "peak_bytes": 2**30}
            runs.append((Job(entry, None, 0, seed, STEPS), record))
    return runs


def report_of(apart: dict[Entry, float], seeds: int, **changes) -> Report:
    sizes = {"resample": True, "looks": (8, 16), "steps": STEPS, "compare": ("all-linear", EQUAL.label)}
    study = Study("s", "gsm8k", (Phase(tuple(apart)),), **sizes)
    runs = simulated(apart, seeds, **changes)
    return Report(study, runs, {"all-linear": [], EQUAL.label: [0.8, 0.81, 0.79]})


def test_the_interval_covers_and_counts_the_pool():
    """95 of 100 simulated studies contain the truth, about; a small pool widens it."""
    draw, misses = np.random.default_rng(1), 0
    for _ in range(400):
        pool = draw.normal(0.01, 0.05, 400)
        tests = [draw.choice(pool, 40, replace=False) for _ in range(20)]
        apart = [one + draw.normal(0, 0.01) for one in tests]
        low, high = effect_of(apart, [[1] * 40] * 20, [1.0] * 20, pool=400).interval()
        misses += not low <= 0.01 <= high
    assert 2 <= misses <= 24, misses
    wide, narrow = (effect_of(apart, [[1] * 40] * 20, [1.0] * 20, pool).error for pool in (40, 4000))
    assert wide > 1.2 * narrow


def test_looks_spend_the_level_late():
    """Nearly all of it is left for the last look; together they keep a simulated wrong statement below 5 %."""
    assert sum(levels([8, 16, 28]).values()) == pytest.approx(spent(1.0)) == pytest.approx(0.05)
    draw, wrong = np.random.default_rng(2), 0
    for _ in range(1000):
        values = draw.normal(0, 1, 28)
        for look, level in levels([8, 16, 28]).items():
            part = values[:look]
            if Effect(part.mean(), part.std(ddof=1) / math.sqrt(look), look).p_differs < level:
                wrong += 1
                break
    assert wrong <= 62, wrong


def test_equal_different_and_open_comparisons():
    """Statements are of the last look that was reached, without the seed that chose the learning rates."""
    apart = {WHOLE: 0.0, EQUAL: 0.05, MEASURED: 0.05}
    found = {(one.row, one.other): one for one in statements(report_of(apart, 16), POOL)}
    cover, measured = told(EQUAL), told(MEASURED)
    assert found[cover, "all-linear"].verdict == found[measured, "all-linear"].verdict == "higher"
    assert found[cover, "all-linear"].effect.mean == pytest.approx(0.05, abs=0.003)
    assert found[measured, cover].verdict == "equal within 0.3%"
    early = statements(report_of(apart, 5), POOL)
    assert {one.verdict for one in early} == {"open: the first look has not been reached"}
    assert [one.effect.seeds for one in statements(report_of(apart, 15), POOL)] == [8] * 3
    noisy = statements(report_of(apart | {EQUAL: 0.0}, 8, noise=0.03), POOL)
    assert "open" in {one.verdict for one in noisy}


def test_the_page_has_measured_numbers_alone(tmp_path):
    """With an interval on each difference; it replaces its own part of a file and nothing else."""
    study = report_of({WHOLE: 0.0, EQUAL: 0.05}, 8)
    text = markdown(study, "python -m benchmarks study s.yaml")
    [row] = [line for line in text.splitlines() if line.startswith("| equal-weight cover, 30 adapters")]
    assert "0.80 (" in row and "| 8 |" in row and "[+4." in row and "| 1.00 |" in row
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n<!-- s -->\nold\n<!-- end of s -->\nThe end.\n")
    insert(path, "s", text)
    insert(path, "s", text)
    assert path.read_text() == f"# Title\n\n<!-- s -->\n\n{text}\n<!-- end of s -->\nThe end.\n"
    with pytest.raises(SystemExit, match="must be a page with the lines <!-- t -->"):
        insert(path, "t", text)
    shared = Report(Study("s", "gsm8k"), study.runs, {})
    with pytest.raises(SystemExit, match="tests all seeds on the same examples"):
        markdown(shared, "")
