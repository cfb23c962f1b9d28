"""Energy is read where there is a meter, and otherwise the reason is given. Run: pytest tests/runs/test_meters.py"""

import subprocess
import sys
import types

import pytest

from peft_blueprint.errors import MeasurementError
from peft_blueprint.runs.meters import apple_meter, find_meters, gpu_meter, local_processes, rapl_meter


ONE, TWO = {0: "GPU-b"}, {0: "GPU-b", 1: "GPU-a"}  # CUDA's order is not NVML's


class FakeGpu:
    """A GPU as zeus shows it; several stand for one device if they have one index."""

    counters = {}  # mJ by index
    broken = False
    old = False

    def __init__(self, index):
        self.index = index

    def supports_get_total_energy_consumption(self):
        return not self.old

    def get_total_energy_consumption(self):
        if self.broken:
            raise KeyError("the driver is gone")
        return self.counters[self.index]


@pytest.fixture
def zeus(monkeypatch):
    """A stand-in for zeus and NVML with two NVIDIA GPUs; returns the GPUs' class."""

    class Gpu(FakeGpu):
        counters = {0: 5_000_000, 1: 1_000}

    uuids = ["GPU-a", "GPU-b"]

    def module(name, **content):
        made = types.ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("zeus.device.gpu", nvml_is_available=lambda: True)
    module("zeus.device.gpu.nvidia", NVIDIAGPU=Gpu)
    module(
        "pynvml",
        nvmlDeviceGetCount=lambda: len(Gpu.counters),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetIndex=uuids.index,
    )
    return Gpu


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


def test_gpus_count_from_when_the_meter_was_made(zeus):
    """Millijoules since the driver was loaded become joules since then, of the GPUs in use, found by UUID."""
    both, one = gpu_meter(), gpu_meter(ONE)
    assert both.joules() == 0
    zeus.counters |= {0: 5_002_000, 1: 1_500}
    assert both.joules() == 2.5
    assert one.joules() == 0.5
    assert both.joules() == 2.5, "reading changes nothing"
    assert both.name == gpu_meter(TWO).name == "NVML energy counter, 2 GPUs"
    assert one.name == "NVML energy counter, 1 GPU"


def test_a_counter_goes_on_when_the_driver_was_reloaded(zeus):
    """A counter that starts again takes nothing away."""
    meter = gpu_meter(ONE)
    zeus.counters[1] = 4_000
    assert meter.joules() == 3
    zeus.counters[1] = 1_000
    assert meter.joules() == 4


def test_amd_gpus_are_found_by_index(zeus, monkeypatch):
    """zeus orders them as torch does."""
    module = sys.modules["zeus.device.gpu"]
    monkeypatch.setattr(module, "nvml_is_available", lambda: False)
    module.get_gpus = lambda: types.SimpleNamespace(gpus=[zeus(0), zeus(1)])
    meter = gpu_meter({1: "GPU-unknown"})
    zeus.counters[1] += 2_000
    assert (meter.joules(), meter.name) == (2, "AMD SMI energy counter, 1 GPU")


def test_gpus_without_a_counter_have_no_meter(zeus):
    """Old GPUs have none, an unknown GPU cannot be found, and a driver may fail at any time."""
    with pytest.raises(MeasurementError, match="no GPU energy counter: 'GPU-of-another' is not in list"):
        gpu_meter({0: "GPU-of-another"})
    meter = gpu_meter(ONE)
    zeus.broken = True
    with pytest.raises(MeasurementError, match="cannot be read: 'the driver is gone'"):
        meter.joules()
    zeus.old = True
    with pytest.raises(MeasurementError, match="no GPU energy counter: NVML has none for 2 GPUs"):
        gpu_meter()
    zeus.counters.clear()
    with pytest.raises(MeasurementError, match="NVML has none for 0 GPUs"):
        gpu_meter()


def test_without_zeus_the_extra_is_named(monkeypatch):
    """For GPUs and for Apple silicon."""
    for name in ("zeus.device.gpu", "zeus.device.soc.apple"):
        monkeypatch.setitem(sys.modules, name, None)
    for meter in (gpu_meter, apple_meter):
        with pytest.raises(MeasurementError, match=r"pip install 'peft-blueprint\[energy\]'"):
            meter()


def test_the_installed_zeus_starts_nothing_and_survives_a_machine_without_meters(tmp_path):
    """No output, no process and no torch; the reasons are those of a machine without GPU and RAPL."""
    script = (
        "import multiprocessing, sys; from pathlib import Path; from peft_blueprint.runs.meters import *\n"
        "import importlib; import zeus.device.gpu, zeus.device.soc.apple\n"
        "zeus.device.gpu.nvml_is_available = zeus.device.gpu.amdsmi_is_available = lambda: False\n"
        f"meters, why = find_meters({{0: 'GPU-a'}}, folder=Path({str(tmp_path)!r})); assert not meters and len(why) == 1\n"
        f"meters, why = find_meters(folder=Path({str(tmp_path)!r})); assert not meters and len(why) == 2, why\n"
        "assert not multiprocessing.active_children() and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_apple_silicon_counts_each_part_of_the_chip_once(monkeypatch):
    """Clusters and cores are within the processor's total; parts that a chip lacks are left out."""
    used = {
        "cpu_total_mj": 0,
        "gpu_mj": 0,
        "gpu_sram_mj": None,
        "ane_mj": 0,
        "dram_mj": 0,
        "performance_cluster_mj": [7],
    }

    class Chip:
        def get_total_energy_consumption(self):
            return types.SimpleNamespace(**used)

    zeus = types.ModuleType("zeus.device.soc.apple")
    zeus.apple_silicon_is_available = lambda: True
    zeus.AppleSilicon = Chip
    monkeypatch.setitem(sys.modules, "zeus.device.soc.apple", zeus)
    monkeypatch.setattr(sys, "platform", "darwin")
    (meter,), missing = find_meters({}, processes=2)
    used |= {"cpu_total_mj": 1000, "gpu_mj": 2000, "ane_mj": 300, "dram_mj": 700}
    assert meter.joules() == pytest.approx(2)
    assert (meter.name, missing) == ("Apple silicon energy counter, shared by 2 processes", [])
    zeus.apple_silicon_is_available = lambda: False
    assert find_meters({}) == ([], ["no Apple silicon energy counter: pip install 'zeus[apple]'"])


def test_rapl_counts_packages_and_their_memory_once(tmp_path):
    """Zones within a package, the whole platform, and a second interface to the package are left out."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 100)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 100)
    door = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    meter = rapl_meter(tmp_path)
    for counter in (package, core, memory, platform, door):
        counter.write_text("400100")
    assert meter.joules() == pytest.approx(0.8)
    assert meter.name == "RAPL energy counter, 1 processor and memory"


def test_rapl_wraps_around(tmp_path):
    """A counter that has passed its end counts on, each time it does."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000, limit=1_000_000)
    meter = rapl_meter(tmp_path)
    expected = 0
    for value, passed in ((100_000, 200_000), (950_000, 850_000), (50_000, 100_000), (50_000, 0)):
        package.write_text(str(value))
        expected += passed
        assert meter.joules() == pytest.approx(expected / 1e6)


def test_processes_share_the_energy_of_the_processor(tmp_path, monkeypatch):
    """Each of four that a launcher started takes a quarter, so that their sum is the machine's."""
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert local_processes() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    (meter,), _ = find_meters({}, folder=tmp_path)
    package.write_text("400000")
    assert meter.joules() == pytest.approx(0.1)
    assert meter.name.endswith("shared by 4 processes")


def test_a_counter_for_root_only_is_absent_with_the_reason(tmp_path, monkeypatch):
    """Since 2020 the kernel shows RAPL's counter to root only."""
    zone(tmp_path, "intel-rapl:0", "package-0")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    read_text = type(tmp_path).read_text
    monkeypatch.setattr(
        type(tmp_path), "read_text", lambda p, *a, **k: refuse(p) if p.name == "energy_uj" else read_text(p, *a, **k)
    )
    assert find_meters({}, folder=tmp_path) == ([], ["no RAPL: only root may read its energy counter"])


def test_a_meter_that_vanishes_is_an_error(tmp_path):
    """No number is made up for it."""
    package = zone(tmp_path, "intel-rapl:0", "package-0")
    meter = rapl_meter(tmp_path)
    package.unlink()
    with pytest.raises(MeasurementError, match="cannot be read"):
        meter.joules()


def test_all_meters_of_the_machine_are_found(zeus, tmp_path):
    """Both for a GPU run, RAPL alone where no GPU is used, and the reason where one is missing."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    names = [meter.name for meter in find_meters(ONE, folder=tmp_path)[0]]
    assert names == ["NVML energy counter, 1 GPU", "RAPL energy counter, 1 processor"]
    assert [meter.name for meter in find_meters({}, folder=tmp_path)[0]] == ["RAPL energy counter, 1 processor"]
    assert len(find_meters(folder=tmp_path)[0]) == 2, "all GPUs"
    meters, missing = find_meters(ONE, folder=tmp_path / "nothing")
    assert len(meters) == 1
    assert missing == ["no RAPL: the system has no energy counter of the processor"]


def test_the_processor_does_not_pass_for_the_whole(zeus, tmp_path):
    """Without the GPUs' energy, the processor's alone does not count as measured."""
    zone(tmp_path, "intel-rapl:0", "package-0")
    zeus.old = True
    assert find_meters(ONE, folder=tmp_path) == ([], ["no GPU energy counter: NVML has none for 1 GPU"])
