"""Read energy counters, peak memory and carbon factors of this machine."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

from ..errors import BlueprintError, MeasurementError
from .quantity import Quantity, absent, is_finite_number, modelled


POWERCAP = Path("/sys/class/powercap")
CODECARBON = "codecarbon"
ENERGY_MIX = "data/private_infra/global_energy_mix.json"

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MARK = re.compile(rb"VmHWM:\s*(\d+) kB")
_PROCESS = -1  # in place of a GPU's index


class Meter(Protocol):
    """Counts energy. `name` describes the counter and its devices."""

    @property
    def name(self) -> str: ...

    def joules(self) -> float:
        """Return the energy used since the meter was made.

        Raises:
            MeasurementError: if the counter can no longer be read.
        """
        ...


class _CounterMeter:
    """Adds up counters that may wrap around or restart.

    Args:
        name: shown as the source of the energy.
        counters: functions that read a counter, each with the value at which it wraps around; None if a counter starts
            again only when its driver is reloaded.
        joules_per_unit: of the counters.
    """

    def __init__(
        self, name: str, counters: Iterable[tuple[Callable[[], float], float | None]], joules_per_unit: float
    ) -> None:
        self.name = name
        self._unit = joules_per_unit
        self._counters = tuple(counters)
        self._last = [read() for read, _ in self._counters]
        self._passed = 0.0

    def joules(self) -> float:
        for i, (read, limit) in enumerate(self._counters):
            now, last = read(), self._last[i]
            self._passed += now - last if now >= last else (limit or last) - last + now
            self._last[i] = now
        return self._passed * self._unit


def gpu_meter(gpus: Mapping[int, str] | None = None) -> Meter:
    """Return a meter of GPUs: the driver's counters on NVIDIA (Volta and later) and AMD, read with zeus.

    zeus needs `pip install peft-blueprint[energy]`. NVIDIA GPUs are found by UUID because zeus would take CUDA's
    indices for NVML's, which differ where GPUs of several kinds are in one machine, and because zeus does not read a
    CUDA_VISIBLE_DEVICES that holds UUIDs.

    Args:
        gpus: UUIDs such as `GPU-5ad1…` by torch's index; None for all GPUs.

    Raises:
        MeasurementError: without zeus or a driver, or if a GPU has no such counter.
    """
    try:
        zeus = importlib.import_module("zeus.device.gpu")
    except ImportError as error:
        raise MeasurementError("no GPU energy counter: pip install 'peft-blueprint[energy]'") from error
    try:
        if zeus.nvml_is_available():
            kind, nvml = "NVML", importlib.import_module("pynvml")
            indices = (
                range(nvml.nvmlDeviceGetCount())
                if gpus is None
                else [nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in gpus.values()]
            )
            devices = [importlib.import_module("zeus.device.gpu.nvidia").NVIDIAGPU(i) for i in indices]
        else:
            kind, found = "AMD SMI", zeus.get_gpus().gpus
            devices = [found[i] for i in (range(len(found)) if gpus is None else gpus)]
        if not devices or not all(device.supports_get_total_energy_consumption() for device in devices):
            raise MeasurementError(f"no GPU energy counter: {kind} has none for {_count(len(devices), 'GPU')}")
        counters = [(_guarded(device.get_total_energy_consumption), None) for device in devices]
        return _CounterMeter(f"{kind} energy counter, {_count(len(devices), 'GPU')}", counters, 1e-3)
    except MeasurementError:
        raise
    except Exception as error:  # each vendor's library has error classes of its own
        raise MeasurementError(f"no GPU energy counter: {error}") from error


def apple_meter(processes: int = 1) -> Meter:
    """Return a meter of an Apple silicon chip, its processor, GPU, neural engine and memory, read with zeus.

    Args:
        processes: number of processes on this machine; each counts an equal share.

    Raises:
        MeasurementError: without zeus, or on another machine.
    """
    try:
        zeus = importlib.import_module("zeus.device.soc.apple")
        if not zeus.apple_silicon_is_available():
            raise MeasurementError("no Apple silicon energy counter: pip install 'zeus[apple]'")
        chip = zeus.AppleSilicon()
    except ImportError as error:
        raise MeasurementError("no Apple silicon energy counter: pip install 'peft-blueprint[energy]'") from error
    except RuntimeError as error:
        raise MeasurementError(f"no Apple silicon energy counter: {error}") from error

    def millijoules() -> float:
        now = chip.get_total_energy_consumption()
        parts = (now.cpu_total_mj, now.gpu_mj, now.gpu_sram_mj, now.ane_mj, now.dram_mj)
        return sum(part for part in parts if part is not None)

    name = "Apple silicon energy counter" + _shared_by(processes)
    return _CounterMeter(name, [(_guarded(millijoules), None)], 1e-3 / processes)


def rapl_meter(folder: Path = POWERCAP, processes: int = 1) -> Meter:
    """Return a meter of the processors, and of the memory where it has its own counter (RAPL on Linux; Intel and AMD).

    Zones are `package-N` for a socket, and `dram` within it, which a package does not include. Zones within a package
    (`core`, `uncore`) and the whole platform (`psys`) would be counted twice and are left out. A counter wraps around
    after about 262 kJ, which a socket may use within half an hour: read it more often.

    This does not use zeus, which counts `psys` as one more processor and starts one process per counter to watch it
    wrap around; each imports the user's main module again, which needs a `__main__` guard that scripts may lack.

    Args:
        folder: where the zones are.
        processes: number of processes on this machine; each counts an equal share.

    Raises:
        MeasurementError: if there are no such zones, or they cannot be read.
    """
    names = {zone: _zone_name(zone) for zone in sorted(folder.glob("intel-rapl:*"))}
    packages = [zone for zone, name in names.items() if name.startswith("package")]
    memory = [
        zone
        for zone, name in names.items()
        if name == "dram" and any(zone.name.startswith(f"{package.name}:") for package in packages)
    ]
    if not packages:
        raise MeasurementError("no RAPL: the system has no energy counter of the processor")
    counters = [
        (lambda zone=zone: _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj"))
        for zone in packages + memory
    ]
    name = f"RAPL energy counter, {_count(len(packages), 'processor')}{' and memory' if memory else ''}"
    return _CounterMeter(name + _shared_by(processes), counters, 1e-6 / processes)


def find_meters(
    gpus: Mapping[int, str] | None = None, *, processes: int | None = None, folder: Path = POWERCAP
) -> tuple[list[Meter], list[str]]:
    """Return the meters that can be read on this machine, and the reasons why others cannot.

    If GPUs are used whose energy cannot be read, there is no meter at all: the energy of the processor alone would pass
    for the whole.

    Args:
        gpus: those in use, as in `gpu_meter`; empty for none, None for all.
        processes: number of processes on this machine; by default as the launcher says, or 1.
        folder: where RAPL's zones are.
    """
    meters: list[Meter] = []
    missing = []
    processes = processes or local_processes()
    if gpus is None or gpus:
        try:
            meters.append(gpu_meter(gpus))
        except MeasurementError as error:
            missing.append(str(error))
            if gpus:
                return [], missing
    try:
        meters.append(apple_meter(processes) if sys.platform == "darwin" else rapl_meter(folder, processes))
    except MeasurementError as error:
        missing.append(str(error))
    return meters, missing


def local_processes() -> int:
    """Return the number of processes of this run on this machine, as torchrun or accelerate set it; 1 without them."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):  # without the first, all are on one machine
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


class HighWater:
    """Reads peak memory since the last reading: of GPUs, from torch's allocator, or of this process, from Linux.

    Reading resets the system's mark, so all active readers share the value that one of them reads.

    Args:
        gpus: torch's indices; empty for the resident memory of this process.
    """

    def __init__(self, gpus: Sequence[int] = ()) -> None:
        self._places = tuple(gpus) or (_PROCESS,)
        self.missing = "nothing has run yet"  # why there is nothing to read; empty once there is
        self.source = "the process's resident memory"
        if gpus:
            self.source = f"torch's CUDA allocator, {_count(len(gpus), 'GPU')}"

    def start(self) -> None:
        """Start reading; where memory cannot be measured, set `missing` instead."""
        if _PROCESS in self._places and sys.platform != "linux":
            self.missing = "the peak of a process's memory can be read on Linux only"
            return
        _UNREAD[self] = {}
        try:
            self.take()
            self.missing = ""
        except (OSError, ValueError) as error:
            self.missing = f"the system does not allow resetting the peak of the process's memory ({error})"
            self.stop()

    def take(self) -> list[int]:
        """Return the peak in bytes since the last call, per GPU or of the process; empty if it cannot be measured."""
        if self not in _UNREAD:
            return []
        for place in {place for reader in _UNREAD for place in reader._places}:
            peak = _read_and_reset(place)
            for reader, marks in _UNREAD.items():
                if place in reader._places:
                    marks[place] = max(marks.get(place, 0), peak)
        marks = _UNREAD[self]
        _UNREAD[self] = {}
        return [marks[place] for place in self._places]

    def stop(self) -> None:
        """Stop reading."""
        _UNREAD.pop(self, None)


_UNREAD: weakref.WeakKeyDictionary[HighWater, dict[int, int]] = weakref.WeakKeyDictionary()


def carbon_factor(where: str | float | None) -> Quantity:
    """Return grams of CO2 equivalent per kWh of electricity.

    A country's factor is its yearly mean in CodeCarbon's data files (`pip install peft-blueprint[carbon]`). The files
    are read without importing CodeCarbon, which would query the network for the machine's location.

    Args:
        where: the grams, if you know them better; a country's three letters (ISO 3166-1 alpha-3, "DEU"); or None.

    Returns:
        A modelled quantity, because a factor is a mean over places and times; absent for None.

    Raises:
        BlueprintError: for a negative number or an unknown country; for a country if CodeCarbon is not installed or its
            files have another form.

    Example:
        >>> carbon_factor(45).source
        '45 g CO2e/kWh, as given'
    """
    if where is None:
        return absent("no carbon factor was given")
    if isinstance(where, str):
        return _of_country(where.strip().upper())
    if not is_finite_number(where) or where < 0:
        raise BlueprintError(
            f"carbon must be grams of CO2 equivalent per kWh (at least 0) or a country's three letters, got {where!r}."
        )
    return modelled(float(where), f"{where:g} g CO2e/kWh, as given")


def _of_country(country: str) -> Quantity:
    instead = "Or give the grams of CO2 equivalent per kWh as a number."
    spec = importlib.util.find_spec(CODECARBON)  # finds a package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise BlueprintError(
            f"A country's carbon factor needs CodeCarbon: pip install 'peft-blueprint[carbon]'. {instead}"
        )
    path, version = Path(spec.submodule_search_locations[0], ENERGY_MIX), f"CodeCarbon {metadata.version(CODECARBON)}"
    try:
        countries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(countries, dict):
            raise ValueError("not an object of countries")
    except (OSError, ValueError) as error:
        raise BlueprintError(f"{version} has no table of countries at {path}: {error}. {instead}") from error
    entry = countries.get(country)
    if not isinstance(entry, dict):
        raise BlueprintError(
            f"carbon={country!r} is not among the {len(countries)} countries of {version}. Give three letters, such as "
            f"DEU, FRA or USA. {instead}"
        )
    grams = entry.get("carbon_intensity")
    if not is_finite_number(grams) or grams < 0:
        raise BlueprintError(f"{version} has no carbon intensity of {country}, got {grams!r}. {instead}")
    year = f", {entry['year']}" if "year" in entry else ""
    return modelled(float(grams), f"{grams:g} g CO2e/kWh, {version}, {country}{year}")


def _guarded(read: Callable[[], float]) -> Callable[[], float]:
    def reading() -> float:
        try:
            return float(read())
        except Exception as error:  # each vendor's library has error classes of its own
            raise MeasurementError(f"the energy counter cannot be read: {error}") from error

    return reading


def _zone_name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise MeasurementError("no RAPL: only root may read its energy counter") from error
    except (OSError, ValueError) as error:
        raise MeasurementError(f"no RAPL: its energy counter cannot be read ({error})") from error


def _read_and_reset(place: int) -> int:
    """Return the peak in bytes of a GPU or the process, and reset it."""
    if place == _PROCESS:
        with open(_STATUS, "rb", buffering=0) as status, open(_CLEAR, "wb", buffering=0) as clear:
            mark = _MARK.search(status.read())
            if mark is None:
                raise ValueError(f"{_STATUS} has no VmHWM")
            clear.write(b"5")  # proc(5): resets VmHWM to the present resident memory
        return int(mark[1]) * 1024
    import torch

    peak = torch.cuda.max_memory_allocated(place)
    torch.cuda.reset_peak_memory_stats(place)
    return peak


def _shared_by(processes: int) -> str:
    return f", shared by {processes} processes" if processes > 1 else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
