"""Several processes that measure together: in step where the model is sharded over them, and their findings as one.

Every process measures its own examples. Uses torch.distributed as it finds it initialised, by `torchrun`, `accelerate
launch` or by hand. Knows nothing of how an example is measured.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._processes import process_count
from ..errors import MeasurementError
from .influence import joined_digest
from .submodules import is_sharded


@dataclass(frozen=True, eq=False)
class Findings:
    """What was measured of all rows, before it is an `Influence`.

    Args:
        norms: (rows, examples) float32, zeros in rows that no gradient reached.
        errors: (rows, examples) float32.
        projections: (rows, examples, m) float32.
        losses: (examples,) float32.
        target_tokens: (examples,) int64.
        sketches: by row the sum over examples (d_out, s) float32, of the rows that a gradient reached.
        tokens: input positions read.
        data_digest: of what the model was given.
    """

    norms: Tensor
    errors: Tensor
    projections: Tensor
    losses: Tensor
    target_tokens: Tensor
    sketches: Mapping[int, Tensor]
    tokens: int
    data_digest: str

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.norms.shape[1]


class Processes:
    """The processes of one measurement. Alone, each method does nothing and returns what it was given.

    Args:
        model: without its DDP wrapper.
        reduce: unite what the processes find. On a model that is sharded they stay in step in any case.

    Raises:
        MeasurementError: for a model that is distributed in a way that cannot be measured.
    """

    def __init__(self, model: nn.Module, reduce: bool):
        self.count = process_count()
        self.rank = dist.get_rank() if self.count > 1 else 0
        self.reduces = reduce and self.count > 1
        self.is_in_step = _is_fully_sharded(model) and self.count > 1
        self.is_inside_pass = False  # of a sharded model, where processes wait for each other's weights
        self.idle_batch: Mapping[str, Any] | None = None
        self._is_over = False  # one process failed and all know

    def share(self, max_examples: int | None) -> int | None:
        """This process's share of a number of examples, as even as can be."""
        if max_examples is None or not self.reduces:
            return max_examples
        return max_examples // self.count + (self.rank < max_examples % self.count)

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Tell the other processes of an error in here, in the place of what they expect next, and let it pass.

        Not of one inside a pass over a sharded model: there the others wait for weights, until this process ends.
        """
        try:
            yield
        except Exception as error:
            if (self.reduces or self.is_in_step) and not self._is_over and not self.is_inside_pass:
                self._exchange(None, f"{type(error).__name__}: {error}")
            raise

    def started(
        self, batches: Iterator[Mapping[str, Any]], device: torch.device | None
    ) -> Iterable[Mapping[str, Any]]:
        """The batches as they are. On a sharded model, learn of one to idle on, another process's if there is none here."""
        if not self.is_in_step:
            return batches
        first = next(batches, None)
        has_some = self._exchange(first is not None)
        self.idle_batch = first
        if any(has_some) and not all(has_some):
            giver = has_some.index(True)
            given = self._exchange(_moved(first, torch.device("cpu")) if first and self.rank == giver else None)[giver]
            self.idle_batch = first or _moved(given, device)
        return batches if first is None else chain([first], batches)

    @contextmanager
    def step(self, harmless: type[Exception]) -> Iterator[None]:
        """One pass of this process. On a sharded model it begins when every process has one to make, or idles.

        A `harmless` error ends the pass of all processes alike.
        """
        if self.is_in_step:
            self._exchange(True)
            self.is_inside_pass = True
        try:
            yield
        except harmless:
            self.is_inside_pass = False
            raise
        self.is_inside_pass = False

    def idles(self) -> bool:
        """Asked by a process that is done, before every pass of the others: whether to make an idle one with them."""
        return self.is_in_step and any(self._exchange(False))

    def united(self, own: Findings, settings: tuple[Any, ...]) -> Findings:
        """What all processes found, in the order of their ranks and the same on each.

        Args:
            own: what this process found.
            settings: what must be the same everywhere, such as the rows' digest and the sketch's seed.

        Raises:
            MeasurementError: if another process failed, has other settings or measured the same data.
        """
        if not self.reduces:
            return own
        shapes = {row: tuple(sketch.shape) for row, sketch in own.sketches.items()}
        nothing = own.norms.new_empty(0, own.examples)
        small = replace(own, norms=nothing, errors=nothing, projections=nothing, sketches={})
        said = self._exchange((settings, shapes, small))
        self._is_over = True  # from here on all processes see the same and fail alike
        parts: list[Findings] = [part for _, _, part in said]
        self._check_settings([theirs for theirs, _, _ in said])
        self._check_data(parts)
        columns = torch.cat([own.norms[..., None], own.errors[..., None], own.projections], dim=2)
        columns = self._gathered(columns, [part.examples for part in parts])
        every_shape = {row: shape for _, theirs, _ in said for row, shape in theirs.items()}
        return Findings(
            norms=columns[..., 0].contiguous(),
            errors=columns[..., 1].contiguous(),
            projections=columns[..., 2:].contiguous(),
            losses=torch.cat([part.losses for part in parts]),
            target_tokens=torch.cat([part.target_tokens for part in parts]),
            sketches={row: self._sum(own.sketches.get(row), every_shape[row]) for row in sorted(every_shape)},
            tokens=sum(part.tokens for part in parts),
            data_digest=joined_digest([part.data_digest for part in parts if part.examples]),
        )

    def _exchange(self, value: Any, error: str | None = None) -> list[Any]:
        """What every process says, by rank; if one says that it failed, an error on those that did not."""
        said: list[tuple[str | None, Any]] = [(None, None)] * self.count
        dist.all_gather_object(said, (error, value))
        failed = {rank: message for rank, (message, _) in enumerate(said) if message is not None}
        if failed:
            self._is_over = True
            if error is None:
                first = min(failed)
                raise MeasurementError(
                    f"Process {first} of {self.count} failed, and the others stop with it: {failed[first]}"
                )
        return [value for _, value in said]

    def _check_settings(self, settings: list[tuple[Any, ...]]) -> None:
        for rank, theirs in enumerate(settings):
            if theirs != settings[0]:
                raise MeasurementError(
                    f"Process 0 measures with {settings[0]} and process {rank} with {theirs}: give every process the "
                    "same model and settings."
                )

    def _check_data(self, parts: list[Findings]) -> None:
        seen: dict[str, int] = {}
        for rank, part in enumerate(parts):
            other = seen.setdefault(part.data_digest, rank) if part.examples else rank
            if other != rank:
                raise MeasurementError(
                    f"Processes {other} and {rank} measured the same {part.examples} examples. Give each its own "
                    "shard (accelerator.prepare(dataloader), or a DistributedSampler), or measure in each by itself "
                    "with reduce=False."
                )

    def _gathered(self, columns: Tensor, widths: list[int]) -> Tensor:
        """(rows, own examples, n) → (rows, all examples, n), by way of tensors of one width."""
        device = _meeting_device()
        padded = torch.zeros(columns.shape[0], max(widths), columns.shape[2], device=device)
        padded[:, : columns.shape[1]] = columns
        everyones = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(everyones, padded)
        return torch.cat([theirs[:, :width].cpu() for theirs, width in zip(everyones, widths, strict=True)], dim=1)

    def _sum(self, own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros(shape) if own is None else own.clone()
        total = total.to(_meeting_device())
        dist.all_reduce(total)
        return total.cpu()


def reshard(model: nn.Module) -> None:
    """Put the weights of a fully sharded model back in their shards.

    A forward pass alone leaves some whole, and what is set on those does not last.
    """
    for module in model.modules():
        if _is_fsdp_module(module):
            module.reshard()  # type: ignore[operator]


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model; an error for other ways to split a model's weights."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise MeasurementError(
            "The model is wrapped in FullyShardedDataParallel, which flattens the weights of many submodules into one. "
            "Shard it with torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate's configuration), or "
            "measure before wrapping it."
        )
    sharded = any(_is_fsdp_module(module) for module in model.modules())
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            continue
        placements = parameter.placements
        if not sharded or sum(not placement.is_replicate() for placement in placements) > 1:
            raise MeasurementError(
                f"{name!r} is split over processes as {placements}, which is tensor parallelism: each sees a part "
                "of every gradient. Load the model for measuring with FSDP2 or device_map='auto' instead."
            )
    return sharded


def _is_fsdp_module(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _meeting_device() -> torch.device:
    """Where the processes' backend takes tensors from: the CPU if it can, else this process's accelerator."""
    takes_cpu = "gloo" in str(dist.get_backend()) or not torch.accelerator.is_available()
    return (None if takes_cpu else torch.accelerator.current_accelerator()) or torch.device("cpu")


def _moved(batch: Mapping[str, Any], device: torch.device | None) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) and device else value for key, value in batch.items()}
