"""What a piece of work spent: a running tally of time, tokens, operations, memory, energy and carbon.

Every figure says whether it was measured, modelled or is absent. Measures this process and its devices; knows nothing of
models, of what was gained, or of other processes, and asks nothing of the network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from ..errors import BlueprintError, FormatError, MeasurementError
from .figures import UNITS, Figure, absent, largest, measured, modelled, total, weakest
from .memory import HighWater
from .meters import Meter, find_meters, local_processes


GB = 10**9
JOULES_PER_KWH = 3.6e6
LOOK_EVERY = 60.0  # seconds after which `add` looks by itself


@dataclass
class _Tally:
    """What was counted since the start, or since the run was resumed."""

    seconds: float = 0.0
    tokens: int | None = None
    tokens_to_price: int = 0
    flops: Figure | None = None
    peak_bytes: int | None = None
    byte_seconds: float = 0.0
    joules: float = 0.0
    optimizer_bytes: int | None = None


class Ledger:
    """Counts what is spent between `start` and `pause`, or inside a `with`; several may run at once.

    Every step, `add` counts tokens, and does no more than that. Memory and meters are looked at when figures are asked
    for, at a pause, and once a minute by `add`, so that no counter of energy goes round unseen; without waiting for the
    device, but at a pause. `memory_gb_hours` sums the peak since the last look times the time since then, and is never
    too low.

    Under several processes each has its ledger and counts its own part: its GPU, and of the processors' energy an equal
    share.

    Args:
        devices: how many this process occupies. By default the visible GPUs, under torchrun or accelerate the process's
            own, and 1 on a CPU. If there are more, those on which it holds most are taken to be its own.
        flops_per_token: what a token costs: of CostModel (`Cost.flops`), or measured once by `counted_flops`. May be
            set later, and then counts for all tokens since the start.
        watts: of a device, for a model of the energy where there is no meter.
        carbon: grams of CO2 equivalent per kWh, as `carbon_factor` gives it.
        meters: of energy; by default those that there are.
        gpus: whether the visible GPUs are what works here; False for work on the CPU of a machine that has some.

    Raises:
        BlueprintError: for bad values.
    """

    def __init__(
        self,
        *,
        devices: int | None = None,
        flops_per_token: Figure | None = None,
        watts: float | None = None,
        carbon: Figure | None = None,
        meters: Sequence[Meter] | None = None,
        gpus: bool = True,
    ) -> None:
        if devices is not None and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
            raise BlueprintError(f"devices={devices!r} is no number of devices: give a whole number from 1.")
        if watts is not None and (
            isinstance(watts, bool) or not isinstance(watts, int | float) or not 0 < watts < math.inf
        ):
            raise BlueprintError(f"watts={watts!r} is no power: give a device's watts, above 0.")
        for name, figure in (("flops_per_token", flops_per_token), ("carbon", carbon)):
            if figure is not None and not isinstance(figure, Figure):
                raise BlueprintError(f"{name}={figure!r} does not say how it came about: give a Figure.")
        visible = torch.cuda.device_count() if gpus else 0
        own = 1 if local_processes() > 1 else visible
        self.devices = devices or max(1, own)
        self.flops_per_token = flops_per_token or absent("nothing says what a token costs")
        self.watts = watts
        self.carbon = carbon or absent("no carbon factor: nothing says where the electricity comes from")
        self._gpu_count = min(self.devices, visible)
        self._gpus: list[int] = []  # torch's indices, found at the start
        self._memory = HighWater()
        self._meters = None if meters is None else list(meters)
        self._meters_read = 0.0
        self._no_meter = "no meter of energy was given"
        self._running = False
        self._last_look = 0.0
        self._before: dict[str, Figure] = {}  # of the run that is resumed
        self._tally = _Tally()

    def start(self) -> Ledger:
        """Begin, or go on after a pause; nothing if it runs already."""
        if self._running:
            return self
        if self._gpu_count and not self._gpus:
            torch.cuda.init()
            self._gpus = _own_gpus(self._gpu_count)
            self._memory = HighWater(self._gpus)
        if self._meters is None:
            uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in self._gpus]
            self._meters, missing = find_meters(uuids)
            self._no_meter = "; ".join(missing)
        self._wait()
        self._memory.start()
        self._read_meters()
        self._running = True
        self._last_look = time.perf_counter()
        return self

    def pause(self) -> None:
        """Wait for the device, count what was spent so far, and no more until `start`."""
        if self._running:
            self._wait()
            self.look()
            self._running = False
            self._memory.stop()

    def __enter__(self) -> Ledger:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.pause()

    def add(self, tokens: int = 0, flops: float | Figure | None = None) -> None:
        """Count a step; at any time, also in a pause.

        Args:
            tokens: that went through the model, padding included if it did.
            flops: of the step, in place of those of its tokens; a bare number counts as modelled.

        Raises:
            BlueprintError: for less than nothing.
        """
        tokens = int(tokens)
        if tokens < 0:
            raise BlueprintError(f"tokens={tokens} cannot be spent: give a number from 0.")
        if flops is not None and not isinstance(flops, Figure) and not float(flops) >= 0:
            raise BlueprintError(f"flops={flops} cannot be spent: give a number from 0.")
        self._tally.tokens = tokens + (self._tally.tokens or 0)
        if flops is None:
            self._tally.tokens_to_price += tokens
        else:
            of_step = flops if isinstance(flops, Figure) else modelled(float(flops), "as given for each step")
            self._tally.flops = of_step if self._tally.flops is None else total((self._tally.flops, of_step))
        self.look_if_due()

    def look_if_due(self) -> None:
        """Look, if the last time is a minute ago: for long work in which nothing is added, so that no counter of energy
        goes round unseen.
        """
        if self._running and time.perf_counter() - self._last_look > LOOK_EVERY:
            self.look()

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the bytes that an optimizer's states take in this process; after its first step, when they are there.

        Of a tensor in parts (sharded, quantised) what lies here is counted; what several parameters share, once.
        """
        tensors = {id(tensor): tensor for tensor in _tensors_in(optimizer.state)}
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._tally.optimizer_bytes = max(held, self._tally.optimizer_bytes or 0)

    def look(self) -> None:
        """Count the time since the last look, with its memory and energy; nothing in a pause. Waits for no device."""
        if not self._running:
            return
        now = time.perf_counter()
        elapsed, self._last_look = now - self._last_look, now
        self._tally.seconds += elapsed
        peaks = self._memory.take()
        if peaks:
            self._tally.peak_bytes = max(self._tally.peak_bytes or 0, *peaks)
            self._tally.byte_seconds += sum(peaks) * elapsed
        self._tally.joules += self._read_meters()

    @property
    def seconds(self) -> float:
        """Wall-clock time, without pauses."""
        return self.figures()["seconds"].value or 0.0

    @property
    def peak_bytes(self) -> int | None:
        """The most memory held at once: on the fullest of the GPUs if there are any, else by the whole process (on
        Linux); None where it cannot be measured.
        """
        value = self.figures()["peak_bytes"].value
        return None if value is None else int(value)

    def figures(self) -> dict[str, Figure]:
        """All that was spent so far, by the names of `figures.UNITS` and in their units."""
        self.look()
        own = self._own()
        if not self._before:
            return own
        return {name: self._since_the_beginning(name, own[name]) for name in UNITS}

    def totals(self) -> dict[str, float]:
        """The values of those figures that are there."""
        return {name: figure.value for name, figure in self.figures().items() if figure.value is not None}

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far, as a JSON object."""
        return {"figures": {name: figure.to_dict() for name, figure in self.figures().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there, in place of what was counted here.

        Raises:
            FormatError: if it is not what `state_dict` gave.
        """
        figures = state.get("figures") if isinstance(state, Mapping) else None
        if not isinstance(figures, Mapping) or figures.keys() != UNITS.keys():
            found = ", ".join(map(str, figures)) if isinstance(figures, Mapping) else f"no figures but {state!r:.100}"
            raise FormatError(
                f"A ledger's state has the figures {', '.join(UNITS)}, and this has {found}. Give what "
                "Ledger.state_dict returned."
            )
        before = {name: Figure.from_dict(figures[name]) for name in UNITS}
        self.look()
        self._tally = _Tally()
        self._before = before

    def _since_the_beginning(self, name: str, own: Figure) -> Figure:
        before = self._before[name]
        if name == "optimizer_bytes":
            there = [figure for figure in (before, own) if figure.value is not None]
            return largest(there or [own])
        has_begun = self._tally.tokens is not None if name in ("tokens", "flops") else self._tally.seconds > 0
        if not has_begun:
            return before
        return (largest if name == "peak_bytes" else total)((before, own))

    def _own(self) -> dict[str, Figure]:
        """All that was spent since the start, or since the run was resumed."""
        energy = self._energy()
        memory = peak = absent(self._memory.missing or "nothing was counted yet")
        if self._tally.peak_bytes is not None:
            memory = measured(self._tally.byte_seconds / GB / 3600, f"{self._memory.source}, peaks between looks")
            of_which = ", the fullest" if len(self._gpus) > 1 else ""
            peak = measured(self._tally.peak_bytes, f"{self._memory.source}{of_which}")
        tokens = absent("none were counted") if self._tally.tokens is None else measured(self._tally.tokens, "counted")
        states = absent("no optimizer was noted")
        if self._tally.optimizer_bytes is not None:
            states = measured(self._tally.optimizer_bytes, "the optimizer's state tensors")
        return {
            "seconds": measured(self._tally.seconds, "clock"),
            "device_hours": measured(self._tally.seconds * self.devices / 3600, f"clock, {self._of_devices()}"),
            "tokens": tokens,
            "flops": self._operations(),
            "memory_gb_hours": memory,
            "energy_joules": energy,
            "carbon_grams": _carbon_of(energy, self.carbon),
            "peak_bytes": peak,
            "optimizer_bytes": states,
        }

    def _operations(self) -> Figure:
        per_token = self.flops_per_token
        if self._tally.tokens is None:
            return absent("no tokens were counted")
        if not self._tally.tokens_to_price and self._tally.flops is not None:
            return self._tally.flops
        of_tokens = per_token
        if per_token.value is not None:
            of_tokens = Figure(per_token.value * self._tally.tokens_to_price, per_token.how, per_token.source)
        return of_tokens if self._tally.flops is None else total((self._tally.flops, of_tokens))

    def _energy(self) -> Figure:
        if self._meters:
            missing = f"; without the processor: {self._no_meter}" if self._gpus and self._no_meter else ""
            return measured(self._tally.joules, " and ".join(meter.name for meter in self._meters) + missing)
        if self.watts is not None:
            joules = self.watts * self.devices * self._tally.seconds
            return modelled(
                joules, f"{self.watts:g} W for {self._of_devices()}{' each' * (self.devices > 1)}, as given"
            )
        return absent(self._no_meter)

    def _of_devices(self) -> str:
        return f"{self.devices} device{'s' * (self.devices > 1)}"

    def _read_meters(self) -> float:
        """Joules since the last time. A meter that fails ends no training: there is none from then on."""
        try:
            now = sum(meter.joules() for meter in self._meters or ())
        except MeasurementError as error:
            self._meters, self._no_meter = [], f"the meter failed: {error}"
            return 0.0
        passed, self._meters_read = now - self._meters_read, now
        return passed

    def _wait(self) -> None:
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)


class CountedFlops:
    """What `counted_flops` counts."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    @property
    def total(self) -> int:
        """Floating-point operations so far."""
        return int(self._counter.get_total_flops())

    def per_token(self, tokens: int) -> Figure:
        """The same for one of the tokens they were spent on, for `Ledger(flops_per_token=...)`."""
        if tokens < 1:
            raise BlueprintError(f"{self.total} FLOPs were counted for tokens={tokens}: give a number from 1.")
        return measured(self.total / tokens, "torch.utils.flop_counter, one measurement")


@contextmanager
def counted_flops() -> Iterator[CountedFlops]:
    """Count the floating-point operations of what runs inside the `with`, by `torch.utils.flop_counter`.

    It sees matrix products, convolutions and attention, a multiplication and an addition as two; on CPUs too, where
    torch's own table lacks attention. It does not see compiled code, nor operations it has no formula for, such as
    products with 4-bit weights. What runs inside is slower: count one step, not all.
    """
    aten = torch.ops.aten
    of_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=of_cpu) as counter:
        yield CountedFlops(counter)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products: the scores, and their sum of values. Shapes are (batch, heads, length, width)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Five products: the scores again, and the gradients of scores, values, queries and keys."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (3 * width + 2 * value[-1])


def _carbon_of(energy: Figure, factor: Figure) -> Figure:
    if energy.value is None or factor.value is None:
        return absent("; ".join(figure.source for figure in (energy, factor) if figure.value is None))
    grams = energy.value / JOULES_PER_KWH * factor.value
    return Figure(grams, weakest((energy.how, factor.how)), f"{energy.source}; {factor.source}")


def _own_gpus(count: int) -> list[int]:
    """So many of the visible GPUs: first those on which this process holds most, then its current one."""
    current = torch.cuda.current_device()
    by_use = sorted(range(torch.cuda.device_count()), key=lambda i: (-torch.cuda.memory_allocated(i), i != current))
    return sorted(by_use[:count])


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors in nested lists and mappings, and within tensors that are made of others."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _tensors_in([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors_in(item)
