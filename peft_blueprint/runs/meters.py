"""Meters of energy: NVML's counter of each GPU, and RAPL's of the processor and its memory.

Knows nothing of what the energy is spent on; torch is not imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import MeasurementError


POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """What counts energy. `name` says which counter of which devices it is."""

    @property
    def name(self) -> str: ...

    def joules(self) -> float:
        """Energy since the meter was made.

        Raises:
            MeasurementError: if the counter can no longer be read.
        """
        ...


class NvmlMeter:
    """The energy counters of NVIDIA GPUs, which the driver keeps (Volta and later).

    Args:
        gpus: their UUIDs, as in `GPU-5ad1…`; None for all that NVML sees.

    Raises:
        MeasurementError: without NVML or its Python module, or if a GPU has no such counter.
    """

    def __init__(self, gpus: Sequence[str] | None = None) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise MeasurementError("no NVML: its Python module is missing (pip install nvidia-ml-py)") from error
        try:
            self._nvml.nvmlInit()
            if gpus is None:
                count = self._nvml.nvmlDeviceGetCount()
                self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            else:
                self._handles = [self._nvml.nvmlDeviceGetHandleByUUID(gpu) for gpu in gpus]
        except self._nvml.NVMLError as error:
            raise MeasurementError(f"no NVML: {error}") from error
        if not self._handles:
            raise MeasurementError("no NVML: it sees no GPU")
        self.name = f"NVML energy counter, {_count(len(self._handles), 'GPU')}"
        self._counters = [_Counter(lambda handle=handle: self._read(handle)) for handle in self._handles]

    def joules(self) -> float:
        """Energy of these GPUs since the meter was made, whoever used them.

        Raises:
            MeasurementError: if NVML no longer answers.
        """
        return sum(counter.passed() for counter in self._counters) / 1e3

    def _read(self, handle: Any) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # mJ since the driver was loaded
        except self._nvml.NVMLError as error:
            raise MeasurementError(f"no NVML energy counter: {error}") from error


class RaplMeter:
    """The energy counters of the processors, and of the memory where it has its own (Linux; Intel and AMD).

    The zones are those that the kernel's documentation of powercap describes: `package-N` for a socket, `dram` within
    it, which a package does not include. What lies within a package (`core`, `uncore`), and the whole platform
    (`psys`), which includes it, would be counted twice and are left out.

    A counter starts anew after about 262 kJ, which a socket may use within half an hour: read it more often.

    Args:
        folder: where the zones are.
        processes: of how many on this machine this is one. Each takes an equal share, so that their sum is right.

    Raises:
        MeasurementError: if there are no such zones, or they may not be read.
    """

    def __init__(self, folder: Path = POWERCAP, processes: int = 1) -> None:
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _zone_name(zone) is not None]
        packages = [zone for zone in zones if str(_zone_name(zone)).startswith("package")]
        memory = [
            z for z in zones if _zone_name(z) == "dram" and any(z.name.startswith(f"{p.name}:") for p in packages)
        ]
        if not packages:
            raise MeasurementError("no RAPL: the system shows no processor's energy counter")
        self._share = 1 / processes
        self._counters = [
            _Counter(lambda zone=zone: _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj"))
            for zone in packages + memory
        ]
        self.name = f"RAPL energy counter, {_count(len(packages), 'processor')}{' and memory' if memory else ''}"
        if processes > 1:
            self.name += f", shared by {processes} processes"

    def joules(self) -> float:
        """This process's share of the machine's energy since the meter was made, whoever used it.

        Raises:
            MeasurementError: if a counter can no longer be read.
        """
        return sum(counter.passed() for counter in self._counters) * self._share / 1e6


def energy_meters(
    gpus: Sequence[str] | None = None, *, processes: int | None = None, folder: Path = POWERCAP
) -> list[Meter]:
    """The meters that can be read here; none if there are none. As `find_meters`."""
    return find_meters(gpus, processes=processes, folder=folder)[0]


def find_meters(
    gpus: Sequence[str] | None = None, *, processes: int | None = None, folder: Path = POWERCAP
) -> tuple[list[Meter], list[str]]:
    """The meters that can be read here, and why others cannot.

    If GPUs are used whose energy cannot be read, there is no meter at all: what the processor uses beside them would
    pass for the whole.

    Args:
        gpus: UUIDs of those in use; empty for none, None for all that NVML sees.
        processes: of how many on this machine this is one; by default as the launcher says, or 1.
        folder: where RAPL's zones are.
    """
    meters: list[Meter] = []
    missing = []
    if gpus is None or gpus:
        try:
            meters.append(NvmlMeter(gpus))
        except MeasurementError as error:
            missing.append(str(error))
            if gpus:
                return [], missing
    try:
        meters.append(RaplMeter(folder, processes or local_processes()))
    except MeasurementError as error:
        missing.append(str(error))
    return meters, missing


def local_processes() -> int:
    """How many processes on this machine do one work together, as torchrun or accelerate told this one."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):  # without the first, all are on one machine
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


class _Counter:
    """What has passed since it was made on a counter that starts anew at `limit`, or at any time without one."""

    def __init__(self, read: Any, limit: int | None = None) -> None:
        self._read, self._limit = read, limit
        self._last, self._passed = read(), 0

    def passed(self) -> int:
        now = self._read()
        if now >= self._last:
            self._passed += now - self._last
        elif self._limit is not None:
            self._passed += self._limit - self._last + now
        else:
            self._passed += now  # the driver was loaded anew
        self._last = now
        return self._passed


def _zone_name(zone: Path) -> str | None:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return None


def _read(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise MeasurementError("no RAPL: its energy counter may be read by root only") from error
    except (OSError, ValueError) as error:
        raise MeasurementError(f"no RAPL: its energy counter cannot be read ({error})") from error


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
