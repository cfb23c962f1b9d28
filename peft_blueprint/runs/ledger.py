"""Count the cost of a piece of work: time, tokens, operations, memory, energy and carbon."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._options import from_mapping
from ..errors import BlueprintError, FormatError, MeasurementError
from .meters import HighWater, Meter, find_meters, local_processes
from .quantity import UNITS, Quantity, absent, is_finite_number, largest, measured, modelled, total, weakest


if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.flop_counter import FlopCounterMode

GB = 10**9
JOULES_PER_KWH = 3.6e6
LOOK_EVERY = 60.0  # seconds after which `add` reads memory and meters


@dataclass
class _Tally:
    """Counts since the start, or since the run was resumed."""

    seconds: float = 0.0
    tokens: int | None = None
    tokens_to_price: int = 0
    flops: Quantity | None = None
    peak_bytes: int | None = None
    byte_seconds: float = 0.0
    joules: float = 0.0
    optimizer_bytes: int | None = None


@dataclass(frozen=True)
class _State:
    quantities: Mapping[str, Quantity]

    def __post_init__(self) -> None:
        if self.quantities.keys() != UNITS.keys():
            raise FormatError(f"quantities must be {', '.join(UNITS)}, got {', '.join(self.quantities) or 'none'}.")


class Ledger:
    """Counts the resources spent between `start` and `pause`, or inside a `with`; several ledgers may run at once.

    `add` counts the tokens of a step and does little else. Memory and meters are read when quantities are asked for, at
    a pause, and once a minute by `add`, so that no energy counter wraps around unseen. Only a pause waits for the
    device. `memory_gb_hours` sums the peak since the last reading times the time since then, so it is an upper bound.

    With several processes each has its own ledger and counts its own part: its GPU, and an equal share of the energy of
    the processors. Nothing is asked of the network.

    Args:
        devices: number of devices this process occupies. By default the visible GPUs, one GPU under torchrun or
            accelerate, and 1 on a CPU. If more GPUs are visible, those with most of this process's memory are counted.
        flops_per_token: cost of a token, from CostModel (`Cost.flops`) or measured once by `counted_flops`. May be set
            later, and then counts for all tokens since the start.
        watts: power of a device, to model energy where there is no meter.
        carbon: grams of CO2 equivalent per kWh, from `carbon_factor`.
        meters: energy meters; by default those that `find_meters` returns.
        gpus: whether the visible GPUs are used; False for work on the CPU of a machine with GPUs.

    Raises:
        BlueprintError: for bad values.

    Example:
        >>> with Ledger(flops_per_token=modelled(6e9, "6 × parameters"), meters=[]) as ledger:
        ...     ledger.add(tokens=4096)
        >>> ledger.quantities()["flops"].how
        'modelled'
    """

    def __init__(
        self,
        *,
        devices: int | None = None,
        flops_per_token: Quantity | None = None,
        watts: float | None = None,
        carbon: Quantity | None = None,
        meters: Sequence[Meter] | None = None,
        gpus: bool = True,
    ) -> None:
        if devices is not None and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
            raise BlueprintError(f"devices must be a positive integer, got {devices!r}.")
        if watts is not None and not (is_finite_number(watts) and watts > 0):
            raise BlueprintError(f"watts must be a positive number, got {watts!r}.")
        for name, quantity in (("flops_per_token", flops_per_token), ("carbon", carbon)):
            if quantity is not None and not isinstance(quantity, Quantity):
                raise BlueprintError(f"{name} must be a Quantity, got {quantity!r}. Use measured(…) or modelled(…).")
        visible = _count_visible_gpus() if gpus else 0
        own = 1 if local_processes() > 1 else visible
        self.devices = devices or max(1, own)
        self.flops_per_token = flops_per_token or absent("the cost of a token is not known")
        self.watts = watts
        self.carbon = carbon or absent("no carbon factor was given")
        self._gpu_count = min(self.devices, visible)
        self._gpus: list[int] = []  # torch's indices, found at the start
        self._memory = HighWater()
        self._meters = None if meters is None else list(meters)
        self._meters_read = 0.0
        self._no_meter = "" if meters else "no energy meter was given"
        self._running = False
        self._last_look = 0.0
        self._before: dict[str, Quantity] = {}  # of the run that is resumed
        self._tally = _Tally()

    def start(self) -> Ledger:
        """Start counting, or continue after a pause; no effect while running."""
        if self._running:
            return self
        if self._gpu_count and not self._gpus:
            self._gpus = _own_gpus(self._gpu_count)
            self._memory = HighWater(self._gpus)
        if self._meters is None:
            self._meters, missing = find_meters(_uuids_of(self._gpus))
            self._no_meter = "; ".join(missing)
        self._wait()
        self._memory.start()
        self._read_meters()
        self._running = True
        self._last_look = time.perf_counter()
        return self

    def pause(self) -> None:
        """Wait for the device, count, and stop counting until `start`."""
        if self._running:
            self._wait()
            self.look()
            self._running = False
            self._memory.stop()

    def __enter__(self) -> Ledger:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.pause()

    def add(self, tokens: int = 0, flops: float | Quantity | None = None) -> None:
        """Count a step, also during a pause.

        Args:
            tokens: input positions of the model, padding included.
            flops: of the step, instead of `flops_per_token` times its tokens; a plain number counts as modelled.

        Raises:
            BlueprintError: for a negative number.
        """
        tokens = int(tokens)
        if tokens < 0:
            raise BlueprintError(f"tokens must be at least 0, got {tokens}.")
        if flops is not None and not isinstance(flops, Quantity) and not float(flops) >= 0:
            raise BlueprintError(f"flops must be at least 0, got {flops}.")
        self._tally.tokens = tokens + (self._tally.tokens or 0)
        if flops is None:
            self._tally.tokens_to_price += tokens
        else:
            of_step = flops if isinstance(flops, Quantity) else modelled(float(flops), "as given for each step")
            self._tally.flops = of_step if self._tally.flops is None else total((self._tally.flops, of_step))
        self.look_if_due()

    def look_if_due(self) -> None:
        """Call `look` if the last reading is a minute old; for long work that calls no `add`."""
        if self._running and time.perf_counter() - self._last_look > LOOK_EVERY:
            self.look()

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the bytes of an optimizer's states in this process; call it after the optimizer's first step.

        For sharded and quantized tensors the local parts count; tensors that parameters share count once.
        """
        tensors = {id(tensor): tensor for tensor in _tensors_in(optimizer.state)}
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._tally.optimizer_bytes = max(held, self._tally.optimizer_bytes or 0)

    def look(self) -> None:
        """Count time, memory and energy since the last reading; no effect in a pause. Does not wait for the device."""
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
        """Wall-clock time without pauses."""
        return self.quantities()["seconds"].value or 0.0

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory: of the fullest GPU, otherwise of the process (on Linux); None where it cannot be measured."""
        value = self.quantities()["peak_bytes"].value
        return None if value is None else int(value)

    def quantities(self) -> dict[str, Quantity]:
        """Return everything spent so far, by the names in `UNITS` and in their units."""
        self.look()
        own = self._own()
        if not self._before:
            return own
        return {name: self._since_the_beginning(name, own[name]) for name in UNITS}

    def totals(self) -> dict[str, float]:
        """Return the values of the quantities that are not absent."""
        return {name: quantity.value for name, quantity in self.quantities().items() if quantity.value is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts so far as a JSON object."""
        return {"quantities": {name: quantity.to_dict() for name, quantity in self.quantities().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`, in place of the counts so far.

        Raises:
            FormatError: for anything else; nothing changes then.
        """
        before = dict(from_mapping(_State, state, "The ledger's state", FormatError).quantities)
        self.look()
        self._tally = _Tally()
        self._before = before

    def _since_the_beginning(self, name: str, own: Quantity) -> Quantity:
        before = self._before[name]
        if name == "optimizer_bytes":
            there = [quantity for quantity in (before, own) if quantity.value is not None]
            return largest(there or [own])
        has_begun = self._tally.tokens is not None if name in ("tokens", "flops") else self._tally.seconds > 0
        if not has_begun:
            return before
        return (largest if name == "peak_bytes" else total)((before, own))

    def _own(self) -> dict[str, Quantity]:
        """Return everything spent since the start, or since the run was resumed."""
        energy = self._energy()
        memory = peak = absent(self._memory.missing or "nothing has been counted yet")
        if self._tally.peak_bytes is not None:
            memory = measured(self._tally.byte_seconds / GB / 3600, f"{self._memory.source}, peaks between readings")
            which = ", the fullest" if len(self._gpus) > 1 else ""
            peak = measured(self._tally.peak_bytes, f"{self._memory.source}{which}")
        tokens = (
            absent("no tokens were counted") if self._tally.tokens is None else measured(self._tally.tokens, "counted")
        )
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

    def _operations(self) -> Quantity:
        per_token = self.flops_per_token
        if self._tally.tokens is None:
            return absent("no tokens were counted")
        if not self._tally.tokens_to_price and self._tally.flops is not None:
            return self._tally.flops
        of_tokens = per_token
        if per_token.value is not None:
            of_tokens = Quantity(per_token.value * self._tally.tokens_to_price, per_token.how, per_token.source)
        return of_tokens if self._tally.flops is None else total((self._tally.flops, of_tokens))

    def _energy(self) -> Quantity:
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
        """Return the joules since the last reading. A meter that fails is dropped, and the run continues."""
        try:
            now = sum(meter.joules() for meter in self._meters or ())
        except MeasurementError as error:
            self._meters, self._no_meter = [], f"the meter failed: {error}"
            return 0.0
        passed, self._meters_read = now - self._meters_read, now
        return passed

    def _wait(self) -> None:
        if self._gpus:
            import torch

            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)


class CountedFlops:
    """Result of `counted_flops`."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    @property
    def total(self) -> int:
        """Floating-point operations counted so far."""
        return int(self._counter.get_total_flops())

    def per_token(self, tokens: int) -> Quantity:
        """Return the operations per token, for `Ledger(flops_per_token=...)`."""
        if tokens < 1:
            raise BlueprintError(f"tokens must be at least 1, got {tokens}.")
        return measured(self.total / tokens, "torch.utils.flop_counter, one measurement")


@contextmanager
def counted_flops() -> Iterator[CountedFlops]:
    """Count the floating-point operations inside the `with`, using `torch.utils.flop_counter`.

    Matrix products, convolutions and attention are counted, a multiplication and an addition as two operations. That
    includes attention on CPUs and the grouped products of experts, which torch's own table lacks. Compiled code and operations without a formula, such as products
    with 4-bit weights, are not. Counting is slow: count one step, not all.

    Example:
        >>> import torch
        >>> with counted_flops() as counted:
        ...     _ = torch.ones(4, 4) @ torch.ones(4, 4)
        >>> counted.total
        128
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    further = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    grouped = (aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback")  # as far as this version has them
    further |= {getattr(ops, name): _grouped_flops for ops, name in grouped if hasattr(ops, name)}
    with FlopCounterMode(display=False, custom_mapping=further) as counter:
        yield CountedFlops(counter)


def _grouped_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a product of groups, which are along a dimension of one or both: (E, M, K) or (M, K), (E, K, N) or (K, N)."""
    experts = left[0] if len(left) == len(right) == 3 else 1
    return 2 * experts * left[-2] * left[-1] * right[-1]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Count two products: the scores and the weighted values. Shapes are (batch, heads, length, width)."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count five products: the scores again, and the gradients of scores, values, queries and keys."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (3 * width + 2 * value[-1])


def _carbon_of(energy: Quantity, factor: Quantity) -> Quantity:
    if energy.value is None or factor.value is None:
        return absent("; ".join(quantity.source for quantity in (energy, factor) if quantity.value is None))
    grams = energy.value / JOULES_PER_KWH * factor.value
    return Quantity(grams, weakest((energy.how, factor.how)), f"{energy.source}; {factor.source}")


def _count_visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _own_gpus(count: int) -> list[int]:
    """Choose `count` visible GPUs: first those with most of this process's memory, then its current one."""
    import torch

    torch.cuda.init()
    current = torch.cuda.current_device()
    by_use = sorted(range(torch.cuda.device_count()), key=lambda i: (-torch.cuda.memory_allocated(i), i != current))
    return sorted(by_use[:count])


def _uuids_of(gpus: Sequence[int]) -> dict[int, str]:
    """Return GPUs' UUIDs, as NVML spells them, by torch's index."""
    if not gpus:
        return {}
    import torch

    return {i: f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in gpus}


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in nested lists and mappings, and within tensors made of others."""
    from torch import Tensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
