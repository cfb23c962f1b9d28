"""Measure with several processes: in lockstep if the model is sharded over them, with the results combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .._processes import of_every_process, process_count, process_rank
from ..errors import MeasurementError
from .influence import joined_digest
from .submodules import is_sharded


class ExampleStatistics(NamedTuple):
    """Statistics of some examples in all rows; zeros in rows that no gradient reached.

    Args:
        norms: (rows, examples) float32.
        errors: (rows, examples) float32, relative errors of the norms.
        projections: (rows, examples, m) float32.
        routing: (rows, examples, 2) float32, share of tokens and mean weight of the router, NaN where they are not known;
            (rows, examples, 0) if they are not measured.
        losses: (examples,) float32.
        target_tokens: (examples,) int64.
    """

    norms: Tensor
    errors: Tensor
    projections: Tensor
    routing: Tensor
    losses: Tensor
    target_tokens: Tensor

    @classmethod
    def empty(cls, rows: int, projection_size: int, routing: int) -> ExampleStatistics:
        """Return the statistics of no examples."""
        empty = torch.empty(rows, 0)
        projections, routed = torch.empty(rows, 0, projection_size), torch.empty(rows, 0, routing)
        return cls(empty, empty, projections, routed, empty[0], torch.empty(0, dtype=torch.long))

    @classmethod
    def concatenate(cls, parts: Iterable[ExampleStatistics]) -> ExampleStatistics:
        """Join the statistics of different examples."""
        norms, errors, projections, routing, *by_example = zip(*parts, strict=True)
        by_row = (torch.cat(tensors, dim=1) for tensors in (norms, errors, projections, routing))
        return cls(*by_row, *(torch.cat(tensors) for tensors in by_example))


@dataclass(frozen=True, eq=False)
class RawMeasurement:
    """The measurement of one process, or of all, from which an `Influence` is made.

    Args:
        statistics: of every example.
        sketches: sum over examples (d_out, s) float32, by index of the rows that a gradient reached.
        answer_sketches: the part of each that comes from answer positions, where these are known.
        tokens: number of input positions read.
        data_digest: digest of the model's inputs.
    """

    statistics: ExampleStatistics
    sketches: Mapping[int, Tensor]
    answer_sketches: Mapping[int, Tensor]
    tokens: int
    data_digest: str

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.statistics.losses)


class Processes:
    """The processes of one measurement. With a single process, every method returns its argument unchanged.

    Args:
        model: without its DDP wrapper.
        reduce: combine the processes' measurements. With a sharded model they run in lockstep in any case.

    Raises:
        MeasurementError: for a model that is distributed in a way that cannot be measured.
    """

    def __init__(self, model: nn.Module, reduce: bool):
        self.count = process_count()
        self.rank = process_rank() if self.count > 1 else 0
        self.reduces = reduce and self.count > 1
        self.in_lockstep = _is_fully_sharded(model) and self.count > 1
        self.is_inside_pass = False  # of a sharded model, where processes wait for each other's weights
        self.idle_batch: Mapping[str, Any] | None = None
        self._is_over = False  # a process failed and all have learned of it

    def share(self, max_examples: int | None) -> int | None:
        """Return this process's share of a number of examples, as even as possible."""
        if max_examples is None or not self.reduces:
            return max_examples
        return max_examples // self.count + (self.rank < max_examples % self.count)

    @contextmanager
    def share_errors(self) -> Iterator[None]:
        """Send an error raised in the block to the other processes, at their next exchange, and re-raise it.

        An error inside a pass over a sharded model is not sent: there the others wait for weights until this process
        ends.
        """
        try:
            yield
        except Exception as error:
            if (self.reduces or self.in_lockstep) and not self._is_over and not self.is_inside_pass:
                self._exchange(None, f"{type(error).__name__}: {error}")
            raise

    def with_idle_batch(
        self, batches: Iterator[Mapping[str, Any]], device: torch.device | None
    ) -> Iterable[Mapping[str, Any]]:
        """Return the batches; for a sharded model first set `idle_batch`, another process's if there are none here."""
        if not self.in_lockstep:
            return batches
        first = next(batches, None)
        has_some = self._exchange(first is not None)
        self.idle_batch = first
        if any(has_some) and not all(has_some):
            giver = has_some.index(True)
            sent = _moved(first, torch.device("cpu")) if first and self.rank == giver else None
            received = self._exchange(sent)[giver]
            self.idle_batch = first or _moved(received, device)
        return batches if first is None else chain([first], batches)

    @contextmanager
    def step(self, harmless: type[Exception]) -> Iterator[None]:
        """Run one pass. With a sharded model, wait until every process starts a pass or idles.

        An error of class `harmless` ends the pass on all processes alike.
        """
        if self.in_lockstep:
            self._exchange(True)
            self.is_inside_pass = True
        try:
            yield
        except harmless:
            self.is_inside_pass = False
            raise
        self.is_inside_pass = False

    def all_have(self, value: Any) -> bool:
        """Return whether this value is the same on all processes, which call this together."""
        return len(set(self._exchange(value))) == 1

    def must_idle(self) -> bool:
        """Return to a process that has finished whether others start another pass, for which it must make an idle one."""
        return self.in_lockstep and any(self._exchange(False))

    def combine(self, own: RawMeasurement, settings: tuple[Any, ...]) -> RawMeasurement:
        """Combine the measurements of all processes, in the order of ranks; the result is the same on each.

        Args:
            own: measurement of this process.
            settings: what must be the same everywhere, such as the digest of the rows and the sketch's seed.

        Raises:
            MeasurementError: if another process failed, has other settings or measured the same data.
        """
        if not self.reduces:
            return own
        shapes = {row: tuple(sketch.shape) for row, sketch in own.sketches.items()}
        summary = (settings, own.examples, own.tokens, own.data_digest)
        received = self._exchange((summary, shapes, own.statistics, set(own.answer_sketches)))
        self._is_over = True  # from here on all processes see the same values and fail alike
        summaries = [theirs for theirs, *_ in received]
        for rank, (theirs, examples, _, digest) in enumerate(summaries):
            if theirs != summaries[0][0]:
                raise MeasurementError(
                    f"Process 0 measures with {summaries[0][0]} and process {rank} with {theirs}: give every process "
                    "the same model and settings."
                )
            same = [other for other in range(rank) if summaries[other][1] and summaries[other][3] == digest]
            if examples and same:
                raise MeasurementError(
                    f"Processes {same[0]} and {rank} measured the same {examples} examples. Give each its own shard "
                    "(accelerator.prepare(dataloader), or a DistributedSampler), or measure in each separately with "
                    "reduce=False."
                )
        all_shapes = {row: shape for _, theirs, *_ in received for row, shape in theirs.items()}
        answers = [known for (_, examples, *_), _, _, known in received if examples]  # an empty process knows of none
        with_answers = set.intersection(*answers) if answers else set()
        return RawMeasurement(
            statistics=ExampleStatistics.concatenate(theirs for _, _, theirs, _ in received),
            sketches={row: sum_over_processes(own.sketches.get(row), all_shapes[row]) for row in sorted(all_shapes)},
            answer_sketches={
                row: sum_over_processes(own.answer_sketches.get(row), all_shapes[row]) for row in sorted(with_answers)
            },
            tokens=sum(tokens for _, _, tokens, _ in summaries),
            data_digest=joined_digest([digest for _, examples, _, digest in summaries if examples]),
        )

    def _exchange(self, value: Any, error: str | None = None) -> list[Any]:
        """Return the values of all processes by rank; raise on the others if a process sends an error."""
        received = of_every_process((error, value))
        failed = {rank: message for rank, (message, _) in enumerate(received) if message is not None}
        if failed:
            self._is_over = True
            if error is None:
                first = min(failed)
                raise MeasurementError(f"Process {first} of {self.count} failed, so the others stop: {failed[first]}")
        return [value for _, value in received]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of a fully sharded model.

    A forward pass alone leaves some gathered, and attributes set on those are lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_fully_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 holds the model; raise for other ways to split its weights."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise MeasurementError(
            "The model is wrapped in FullyShardedDataParallel, which flattens the weights of many submodules into one. "
            "Shard it with torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate's configuration), or "
            "measure before wrapping it."
        )
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise MeasurementError(
            "DeepSpeed's ZeRO stage 3 has partitioned the model's weights. Measure before deepspeed.initialize, with stage 2, "
            "or shard the model with torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate's configuration)."
        )
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        placements = parameter.placements
        if not sharded or sum(not placement.is_replicate() for placement in placements) > 1:
            raise MeasurementError(
                f"{name!r} is split over processes as {placements}, which is tensor parallelism: each process sees a "
                "part of every gradient. Load the model for measuring with FSDP2 or device_map='auto' instead."
            )
    return sharded


def sum_over_processes(own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Sum a float32 tensor over processes and return it on the CPU; every process must call this.

    The sum is taken on the CPU if their backend can, otherwise on this process's accelerator.

    Args:
        own: this process's part; None for zeros.
        shape: of the tensor.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ...     sum_over_processes(torch.ones(2), (2,)).tolist()
        ...     torch.distributed.destroy_process_group()
        [1.0, 1.0]
    """
    on_cpu = "gloo" in str(dist.get_backend()) or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    total = (torch.zeros(shape) if own is None else own.clone()).to(device)
    dist.all_reduce(total)
    return total.cpu()


def _moved(batch: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) and device else value for key, value in batch.items()}
