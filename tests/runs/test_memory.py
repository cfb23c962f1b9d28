"""Peaks are seen by all ledgers that run, on GPUs and without. Run: pytest tests/runs/test_memory.py"""

import mmap

import pytest
import torch

from peft_blueprint.runs import ledger as ledger_module
from peft_blueprint.runs import meters as meters_module
from peft_blueprint.runs.ledger import GB, Ledger
from peft_blueprint.runs.quantity import measured


MIB = 2**20


def occupy(size):
    """Hold this many bytes of new pages, which an allocator might not use, for a moment."""
    with mmap.mmap(-1, size) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1


def test_memory_is_the_peak_between_looks(clock, monkeypatch):
    """Gigabyte-hours sum each stretch's peak times its length; the peak is the largest of all."""
    marks = iter([9e9, 2e9, 4e9, 1e9])
    monkeypatch.setattr(meters_module, "_read_and_reset", lambda place: next(marks, 1e9))
    with Ledger(meters=[]) as spent:  # what was there before the start, 9 GB, does not count
        clock.now += 3600
        spent.look()
        clock.now += 1800
    assert spent.totals()["memory_gb_hours"] == pytest.approx(2 + 2)
    assert spent.peak_bytes == 4e9


def test_memory_that_was_held_is_seen():
    """64 MiB more than before, and gone again in the next stretch."""
    with Ledger(meters=[]) as before:
        pass
    with Ledger(meters=[]) as spent:
        occupy(64 * MIB)
    assert spent.peak_bytes >= before.peak_bytes + 48 * MIB
    with Ledger(meters=[]) as after:
        pass
    assert after.peak_bytes < spent.peak_bytes - 32 * MIB
    assert "resident" in spent.quantities()["peak_bytes"].source


def test_ledgers_within_each_other_do_not_disturb():
    """The inner one resets the system's peak, and the outer one keeps the peak from before and inside."""
    with Ledger(meters=[]) as outer:
        occupy(96 * MIB)
        with Ledger(meters=[]) as inner:
            occupy(32 * MIB)
    assert outer.peak_bytes > inner.peak_bytes + 32 * MIB


def test_memory_that_cannot_be_measured_is_absent(monkeypatch, tmp_path):
    """Where a container does not allow a reset, the peak is absent with a reason."""
    monkeypatch.setattr(meters_module, "_CLEAR", tmp_path / "no" / "clear_refs")
    with Ledger(meters=[]) as spent:
        pass
    assert spent.peak_bytes is None
    assert "does not allow resetting" in spent.quantities()["memory_gb_hours"].source


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs with current and peak bytes, as torch reports them."""

    class Properties:
        uuid = "5ad1"

    class Gpus:
        held, peak = [0, 8, 5], [10 * GB, 30 * GB, 20 * GB]
        waited_for = []

    cuda = {
        "device_count": lambda: 3,
        "init": lambda: None,
        "current_device": lambda: 0,
        "memory_allocated": lambda i: Gpus.held[i],
        "max_memory_allocated": lambda i: Gpus.peak[i],
        "reset_peak_memory_stats": lambda i: None,
        "synchronize": lambda i: Gpus.waited_for.append(i),
        "get_device_properties": lambda i: Properties,
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Gpus.waited_for.clear()
    return Gpus


def test_gpus_are_counted(gpus, clock):
    """All visible ones: memory is summed for gigabyte-hours, the fullest counts for the peak."""
    with Ledger(meters=[]) as spent:
        clock.now += 3600
        gpus.waited_for.clear()
        spent.look()
        assert gpus.waited_for == []
    assert gpus.waited_for == [0, 1, 2]
    quantities = spent.quantities()
    assert quantities["device_hours"].value == 3
    assert quantities["memory_gb_hours"] == measured(60, "torch's CUDA allocator, 3 GPUs, peaks between readings")
    assert quantities["peak_bytes"] == measured(30 * GB, "torch's CUDA allocator, 3 GPUs, the fullest")


@pytest.mark.parametrize(
    ("held", "processes", "devices", "own"),
    [([0, 8, 5], 1, 2, [1, 2]), ([0, 8, 5], 3, None, [1]), ([0, 0, 0], 3, None, [0]), ([0, 0, 0], 1, None, [0, 1, 2])],
)
def test_a_process_counts_its_own_gpus(gpus, clock, monkeypatch, held, processes, devices, own):
    """Among several processes the one it holds memory on, else its current one; so that no GPU is counted twice."""
    gpus.held = held
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with Ledger(meters=[], devices=devices) as spent:
        clock.now += 3600
    assert gpus.waited_for[-len(own) :] == own
    assert spent.totals()["device_hours"] == len(own)
    assert spent.totals()["memory_gb_hours"] == sum(gpus.peak[i] for i in own) / GB


def test_the_gpus_meters_are_asked_for(gpus, monkeypatch):
    """By UUID, for any order in CUDA_VISIBLE_DEVICES; a missing meter of the processor is named."""

    class Meter:
        name = "a fake meter"

        def joules(self):
            return 0.0

    asked = []
    monkeypatch.setattr(ledger_module, "find_meters", lambda gpus: asked.append(gpus) or ([Meter()], ["no RAPL"]))
    with Ledger() as spent:
        pass
    assert asked == [{0: "GPU-5ad1", 1: "GPU-5ad1", 2: "GPU-5ad1"}]
    assert spent.quantities()["energy_joules"] == measured(0, "a fake meter; without the processor: no RAPL")
