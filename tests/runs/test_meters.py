"""Energy is read where there is a meter, and where there is none it is said why. Run: pytest tests/test_meters.py"""

import sys
import types

import pytest

from peft_blueprint.errors import MeasurementError
from peft_blueprint.runs.meters import NvmlMeter, RaplMeter, energy_meters, find_meters, local_processes


class FakeNvml(types.ModuleType):
    """NVML with two GPUs, in the words that nvidia-ml-py has for it."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken=""):
        super().__init__("pynvml")
        self.counters = {"GPU-a": 5_000_000, "GPU-b": 1_000}  # mJ
        self.broken = broken

    def nvmlInit(self):
        self._fail("init")

    def nvmlDeviceGetCount(self):
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, i):
        return list(self.counters)[i]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.counters:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._fail("energy")
        return self.counters[handle]

    def _fail(self, what):
        if self.broken == what:
            raise self.NVMLError(f"{what} is not supported")


@pytest.fixture
def nvml(monkeypatch):
    """A fake NVML in place of the module."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher has started these tests."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def zone(folder, path, name, energy=0, limit=1_000_000):
    """A zone as the kernel shows it, with its counter in microjoules."""
    made = folder / path
    made.mkdir()
    (made / "name").write_text(f"{name}\n")
    (made / "energy_uj").write_text(f"{energy}\n")
    (made / "max_energy_range_uj").write_text(f"{limit}\n")
    return made / "energy_uj"


def test_nvml_counts_from_when_the_meter_was_made(nvml):
    """Millijoules since the driver was loaded become joules since then, of the GPUs that are asked for."""
    both, one = NvmlMeter(), NvmlMeter(["GPU-b"])
    assert both.joules() == 0
    nvml.counters.update({"GPU-a": 5_002_000, "GPU-b": 1_500})
    assert both.joules() == 2.5
    assert one.joules() == 0.5
    assert both.joules() == 2.5, "reading changes nothing"
    assert both.name == "NVML energy counter, 2 GPUs"
    assert one.name == "NVML energy counter, 1 GPU"


def test_nvml_counts_on_when_the_driver_was_loaded_anew(nvml):
    """A counter that begins again takes nothing away."""
    meter = NvmlMeter(["GPU-a"])
    nvml.counters["GPU-a"] = 5_003_000
    assert meter.joules() == 3
    nvml.counters["GPU-a"] = 1_000
    assert meter.joules() == 4


@pytest.mark.parametrize(("broken", "message"), [("init", "init is not"), ("energy", "no NVML energy counter")])
def test_nvml_that_does_not_answer_is_no_meter(nvml, broken, message):
    """Old GPUs have no counter, containers no driver: both are said."""
    nvml.broken = broken
    with pytest.raises(MeasurementError, match=message):
        NvmlMeter()


def test_without_nvml_there_is_no_meter(monkeypatch):
    """The module may be missing; a GPU may be one that NVML does not see."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MeasurementError, match="pip install nvidia-ml-py"):
        NvmlMeter()
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with pytest.raises(MeasurementError, match="Not Found"):
        NvmlMeter(["GPU-of-AMD"])
    fake.counters.clear()
    with pytest.raises(MeasurementError, match="sees no GPU"):
        NvmlMeter()


def test_rapl_counts_packages_and_their_memory_once(tmp_path):
    """What lies within a package, the whole platform, and the same package by another door are left out."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 100)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 100)
    door = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    meter = RaplMeter(tmp_path)
    for counter in (package, core, memory, platform, door):
        counter.write_text("400100")
    assert meter.joules() == pytest.approx(0.8)
    assert meter.name == "RAPL energy counter, 1 processor and memory"


def test_rapl_goes_round(tmp_path):
    """A counter that has passed its end counts on, each time it does."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000, limit=1_000_000)
    meter = RaplMeter(tmp_path)
    expected = 0
    for value, passed in ((100_000, 200_000), (950_000, 850_000), (50_000, 100_000), (50_000, 0)):
        package.write_text(str(value))
        expected += passed
        assert meter.joules() == pytest.approx(expected / 1e6)


def test_processes_share_what_the_processor_uses(tmp_path, monkeypatch):
    """Each of four that a launcher started takes a quarter, so that their sum is the machine's."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert local_processes() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    (meter,) = energy_meters((), folder=tmp_path)
    package.write_text("400000")
    assert meter.joules() == pytest.approx(0.1)
    assert meter.name.endswith("shared by 4 processes")


def test_what_may_not_be_read_is_absent_and_said(tmp_path, monkeypatch):
    """Since 2020 the kernel shows RAPL's counter to root only."""
    zone(tmp_path, "intel-rapl:0", "package-0")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    read_text = type(tmp_path).read_text
    monkeypatch.setattr(
        type(tmp_path), "read_text", lambda p, *a, **k: refuse(p) if p.name == "energy_uj" else read_text(p, *a, **k)
    )
    assert find_meters((), folder=tmp_path) == ([], ["no RAPL: its energy counter may be read by root only"])


def test_a_meter_that_vanishes_says_so(tmp_path):
    """No number is made up for it."""
    package = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = RaplMeter(tmp_path)
    package.unlink()
    with pytest.raises(MeasurementError, match="cannot be read"):
        meter.joules()


def test_all_meters_that_there_are(nvml, tmp_path):
    """Both for a GPU run, RAPL alone where no GPU is used, and nothing without either."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    names = [meter.name for meter in energy_meters(["GPU-a"], folder=tmp_path)]
    assert names == ["NVML energy counter, 1 GPU", "RAPL energy counter, 1 processor"]
    assert [meter.name for meter in energy_meters((), folder=tmp_path)] == ["RAPL energy counter, 1 processor"]
    assert len(energy_meters(folder=tmp_path)) == 2, "all GPUs that NVML sees"
    meters, missing = find_meters(["GPU-a"], folder=tmp_path / "nothing")
    assert len(meters) == 1
    assert missing == ["no RAPL: the system shows no processor's energy counter"]


def test_the_processor_does_not_pass_for_the_whole(nvml, tmp_path):
    """If the GPUs' energy cannot be read, the processor's alone is no measurement of the run."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    nvml.broken = "energy"
    assert find_meters(["GPU-a"], folder=tmp_path) == ([], ["no NVML energy counter: energy is not supported"])
