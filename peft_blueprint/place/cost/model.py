"""Predict FLOPs, step time and bytes of training a placement, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from ..._text import format_names
from ...errors import MismatchError, PlacementError
from .prices import Columns, Indices, Mask, Price, keys_of_prompt, price_of, prices_of_adapters
from .structure import Structure
from .workload import FLOAT, Array, Workload


# FLOPs that take as long as moving one byte outside of large matrix products; a step's time is its FLOPs plus this
# many for each such byte. "cpu" lies between 4.5 and 22, the best fits for two series of steps of SmolLM2-135M in float32
# on two AVX2 cores; `python -m benchmarks cost` prints the constant that fits a machine. "cuda" has not been measured: an
# A100 does 312 TFLOP/s in bfloat16 and moves 2.0 TB/s, an H100 989 and 3.35, of which large products reach about a half
# and elementwise kernels four fifths.
FLOPS_PER_BYTE = {"cpu": 12.0, "cuda": 120.0}
MEASURED_DEVICES = ("cpu",)

_ADAM_FLOPS = 12  # of a fused step for a parameter


@dataclass(frozen=True)
class Cost:
    """Predicted cost of one training step. FLOPs and bytes moved are per token.

    Args:
        forward: FLOPs of the frozen model's forward pass, that of prompts and of a cached prefix included.
        backward: FLOPs of its backward pass through activations, down to the lowest trained submodule.
        adapters: FLOPs of the adapters' forward and backward passes.
        weight_gradients: FLOPs of the gradients of modules that are trained whole.
        optimizer: FLOPs of the optimizer's step.
        recomputation: FLOPs of the forward passes that gradient checkpointing repeats.
        moved: bytes read and written outside of large matrix products.
        moved_by_adapters: the part of `moved` that adapters cause.
        trainable: number of trainable parameters.
        lowest: depth of the lowest trained submodule; None if that is in no block, or nothing is trained.
        weights: bytes of the base model.
        added: bytes of adapters, and of PEFT's copies of modules that are trained whole.
        gradients: bytes of the trainable parameters' gradients.
        states: bytes of the optimizer's states, master weights included.
        activations: bytes kept from the forward to the backward pass, by the model's operations and by adapters.
        recomputed: bytes of the activations of the one block that gradient checkpointing recomputes at a time.
        logits: bytes of the loss over the vocabulary, at its peak.
        workspace: bytes of the largest layer's dequantized weight.
        prompts: bytes of the keys and values of prompts, with `Workload.answer_only`.
        prefix: bytes of the weights of the blocks below the lowest trained one, which a cache can replace.
        cache: bytes per token of data that a cache takes: of the hidden states below the lowest trained block or, with
            `answer_only`, of the keys and values of a prompt's token.
    """

    forward: float
    backward: float
    adapters: float
    weight_gradients: float
    optimizer: float
    recomputation: float
    moved: float
    moved_by_adapters: float
    trainable: int
    lowest: int | None
    weights: int
    added: int
    gradients: int
    states: int
    activations: int
    recomputed: int
    logits: int
    workspace: int
    prompts: int = 0
    prefix: int = 0
    cache: int = 0

    @property
    def flops(self) -> float:
        """FLOPs per token."""
        return (
            self.forward + self.backward + self.adapters + self.weight_gradients + self.optimizer + self.recomputation
        )

    @property
    def bytes(self) -> int:
        """Bytes at the peak of a step, with gradients held as under gradient accumulation.

        The sum of all parts, except that logits and the recomputed block are not held at the same time. The CUDA context
        and fragmentation are not counted.
        """
        held = (
            self.weights + self.added + self.gradients + self.states + self.activations + self.workspace + self.prompts
        )
        return held + max(self.logits, self.recomputed)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object of all numbers, with `flops` and `bytes`."""
        return asdict(self) | {"flops": self.flops, "bytes": self.bytes}


class CostModel:
    """Predict the costs of placements on one model for one workload.

    Args:
        structure: names and shapes of the model.
        workload: training step.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> structure = Structure.of(tiny_llama(layers=2))
        >>> costs = CostModel(structure, Workload())
        >>> costs.time_ratio(costs.all_linear())
        1.0
    """

    def __init__(self, structure: Structure, workload: Workload) -> None:
        self.structure = structure
        self.workload = workload
        constant = workload.flops_per_byte
        self.time_constant = FLOPS_PER_BYTE[workload.device] if constant is None else constant
        self._index = {part.name: i for i, part in enumerate(structure.parts)}
        self._under: dict[str, list[int]] = {}  # indices of the parts in each module, by its name
        for i, part in enumerate(structure.parts):
            for module in accumulate(part.name.split("."), "{}.{}".format):
                self._under.setdefault(module, []).append(i)
        self._columns = columns = Columns(structure.parts, workload)
        readers = {part.source: i for i, part in enumerate(structure.parts) if part.source >= 0}
        self._reader = np.array([readers[source] for source in range(len(readers))], dtype=np.int64)
        self._source_bytes = (columns.d_in * columns.visits)[self._reader] * workload.number * workload.trained_tokens
        self._sum_up()
        plain = replace(workload, answer_only=False, head_on_targets=False, epochs=1)
        reference = self if plain == workload else CostModel(structure, plain)
        self._reference_time = reference.step_time(reference.all_linear())

    def _sum_up(self) -> None:
        """Sum the frozen model's costs from the top, so that entry i covers all stages from i on; and by block for
        checkpointing.
        """
        structure, load, columns = self.structure, self.workload, self._columns
        operations, n, words = structure.operations, load.number, structure.vocabulary
        prices = Price(*np.reshape([price_of(operation, load) for operation in operations], (-1, 5)).T)
        at = np.array([operation.stage for operation in operations], dtype=np.int64)
        block = np.array([operation.block for operation in operations], dtype=np.int64)

        def from_the_top(of_parts: Array, of_operations: Array, of_head: float) -> Array:
            total = np.bincount(columns.stage, of_parts, structure.stages)
            total += np.bincount(at, of_operations, structure.stages)
            total[-1] += of_head
            return np.append(np.cumsum(total[::-1])[::-1], 0.0)

        # loss: the logits are copied to float32, their log-softmax is read and written; the gradient likewise
        product, copy = 2.0 * structure.head * words, words * (n + FLOAT) * (n != FLOAT)
        targets, is_head = load.target_share, np.array([part.form == "head" for part in structure.parts], dtype=bool)
        products = np.where(is_head, targets, 1.0) * columns.products
        self._forward = from_the_top(products, prices.forward, targets * (product + 5 * words))
        self._backward = from_the_top(products, prices.backward, targets * (product + 3 * words))
        self._moved_forward = from_the_top(
            columns.dequantized, prices.moved_forward, targets * (copy + 4 * FLOAT * words)
        )
        self._moved_backward = from_the_top(
            columns.dequantized, prices.moved_backward, targets * (copy + 5 * FLOAT * words)
        )
        # in float32: logits, log-softmax and its gradient, all held during the log-softmax's backward pass
        self._logits = int(load.trained_tokens * targets * words * 3 * FLOAT)
        self._workspace = int(columns.numel[columns.is_quantized].max(initial=0.0) * n)
        self._kept_at, self._kept_block = at, block
        self._kept = prices.kept * load.trained_tokens
        self._prompts = self._keys_per_token = 0
        self._of_prompts = 0.0, 0.0  # FLOPs and bytes moved per token of a prompt
        if load.answer_only:
            self._price_prompts()

        self._widths = np.array(structure.blocks, dtype=np.float64)
        self._block_top = np.full(len(self._widths), -1, dtype=np.int64)
        np.maximum.at(self._block_top, columns.block, columns.stage)
        np.maximum.at(self._block_top, block, at)
        self._block_top[0] = -2  # below every stage: nothing outside of blocks is recomputed
        self._block_forward = self._by_block(columns.block, columns.products) + self._by_block(block, prices.forward)
        self._block_moved = self._by_block(columns.block, columns.dequantized)
        self._block_moved += self._by_block(block, prices.moved_forward)
        self._is_last = columns.is_matrix & (columns.stage == self._block_top[columns.block])
        self._block_last = self._by_block(columns.block, columns.products * self._is_last)
        self._block_last[[operation.block for operation in operations if operation.weighted]] = 0.0

    def _price_prompts(self) -> None:
        """Price the prompts' forward pass without head and adapters, and the keys and values that remain of it."""
        load, operations = self.workload, self.structure.operations
        before = replace(load, length=load.prompt, prompt=0, answer_only=False)
        prices = Price(*np.reshape([price_of(operation, before) for operation in operations], (-1, 5)).T)
        columns = Columns(self.structure.parts, before)
        is_head = np.array([part.form == "head" for part in self.structure.parts], dtype=bool)
        self._of_prompts = (
            float(columns.products[~is_head].sum() + prices.forward.sum()),
            float(columns.dequantized.sum() + prices.moved_forward.sum()),
        )
        self._kept += before.tokens * np.array([keys_of_prompt(operation, load) for operation in operations])
        keys = sum(operation.keys for operation in operations if operation.kind == "attention")
        self._keys_per_token = 2 * keys * load.number
        self._prompts = self._keys_per_token * before.tokens

    def _by_block(self, block: Indices, values: Array) -> Array:
        """Sum values by block, those outside of blocks first."""
        return np.bincount(block, values, len(self._widths)).astype(np.float64)

    def cost(self, ranks: Mapping[str, int], unfrozen: Collection[str] = ()) -> Cost:
        """Predict the cost of a placement.

        Args:
            ranks: rank of each adapter, by its submodule's full name.
            unfrozen: names of modules that are trained whole; a block's name, such as `model.layers.3.mlp`, includes
                everything under it.

        Raises:
            MismatchError: for a name that the model does not have, or that takes no adapter.
            PlacementError: for a rank below 1, or an adapter inside a module that is trained whole.
        """
        adapted, rank = self._adapted(ranks)
        whole = self._whole(unfrozen)
        inside = [self.structure.parts[i].name for i in adapted if whole[i]]
        if inside:
            raise PlacementError(
                f"Adapters on {format_names(inside)} lie inside modules trained whole, {format_names(list(unfrozen))}. "
                "Remove the adapters, or do not unfreeze."
            )
        return self._cost(adapted, rank, whole)

    def all_linear(self) -> Cost:
        """Predict the cost of the reference: LoRA of the workload's rank on every linear layer and fused expert."""
        adapted = np.flatnonzero(self._columns.is_adaptable)
        rank = np.full(len(adapted), float(self.workload.rank))
        return self._cost(adapted, rank, np.zeros(len(self._index), dtype=bool))

    def full(self) -> Cost:
        """Predict the cost of training all weights in place, as full fine-tuning does; quantized ones unquantized.

        Example:
            >>> from peft_blueprint.testing import tiny_llama
            >>> structure = Structure.of(tiny_llama(layers=2))
            >>> costs = CostModel(structure, Workload(master_weights=True)).full()
            >>> costs.states / costs.trainable
            12.0
        """
        nothing = np.zeros(0, dtype=np.int64)
        return replace(self._cost(nothing, np.zeros(0), np.ones(len(self._index), dtype=bool)), added=0)

    def floor(self) -> Cost:
        """Predict the cost of a full forward and backward pass with nothing trained.

        Every placement that reaches the lowest layer costs that much before its own adapters.
        """
        nothing = np.zeros(len(self._index), dtype=bool)
        return self._cost(np.zeros(0, dtype=np.int64), np.zeros(0), nothing, to_the_bottom=True)

    @property
    def is_time_measured(self) -> bool:
        """Whether the time constant was measured on such a device."""
        return self.workload.flops_per_byte is not None or self.workload.device in MEASURED_DEVICES

    def time_ratio(self, cost: Cost) -> float:
        """Return the predicted step time over that of all-linear LoRA."""
        return self.step_time(cost) / self._reference_time

    def adapter_cost(self, name: str, rank: int) -> float:
        """Return the time that one adapter adds to a step, as a share of all-linear LoRA's step.

        Raises:
            MismatchError, PlacementError: as `cost`.
        """
        adapted, ranks = self._adapted({name: rank})
        price = prices_of_adapters(self._columns, adapted, ranks, np.ones(1, dtype=bool), self.workload)
        flops, moved = self._of_optimizer(
            self._columns.sizes_of_adapters(adapted, ranks), self.workload.adapter_number
        )
        flops += float(price.forward[0] + price.backward[0])
        moved += float(price.moved_forward[0] + price.moved_backward[0])
        return (flops + self.time_constant * moved) / self._reference_time

    def step_time(self, cost: Cost) -> float:
        """Return a step's time per token in FLOPs of a large matrix product, comparable between workloads of a device."""
        return cost.flops + self.time_constant * cost.moved

    def _adapted(self, ranks: Mapping[str, int]) -> tuple[Indices, Array]:
        try:
            adapted = np.fromiter(map(self._index.__getitem__, ranks), dtype=np.int64, count=len(ranks))
        except KeyError:
            self._refuse([name for name in ranks if name not in self._index], "are not in the model")
        rank = np.array(list(ranks.values()), dtype=np.float64)
        if not self._columns.is_adaptable[adapted].all():
            self._refuse(
                [n for n in ranks if not self._columns.is_adaptable[self._index[n]]], "take no adapter in the model"
            )
        if len(rank) and (rank.min() < 1 or (rank != np.floor(rank)).any()):
            wrong = {name: value for name, value in ranks.items() if value < 1 or value != int(value)}
            raise PlacementError(f"Ranks must be positive integers, got {wrong}.")
        return adapted, rank

    def _refuse(self, names: list[str], reason: str) -> None:
        raise MismatchError(
            f"{format_names(names)} {reason}, which has {format_names(self.structure.adaptable)} for adapters. Use full "
            "names, as find_submodules(model) returns them."
        )

    def _whole(self, unfrozen: Collection[str]) -> Mask:
        unknown = sorted(set(unfrozen) - self._under.keys())
        if unknown:
            self._refuse(unknown, "are not modules of the model")
        whole = np.zeros(len(self._index), dtype=bool)
        for name in unfrozen:
            whole[self._under[name]] = True
        return whole

    def _of_optimizer(self, tensors: Array, number: int) -> tuple[float, float]:
        """Return FLOPs and bytes moved per token by the optimizer's step, for tensors of these sizes.

        Gradients are read, states and master weights read and written; weights are written, and read without a master.
        """
        numel = float(tensors.sum())
        flops = (2 if self.workload.optimizer == "sgd" else _ADAM_FLOPS) * numel
        passes = 2 if self.workload.has_master(number) else 3
        moved = passes * numel * number + 2 * self.workload.state_bytes(tensors, number)
        return flops / self.workload.trained_tokens, moved / self.workload.trained_tokens

    def _cost(self, adapted: Indices, rank: Array, whole: Mask, to_the_bottom: bool = False) -> Cost:
        load, columns, stage = self.workload, self._columns, self._columns.stage
        trained = np.append(adapted, np.flatnonzero(whole))
        first = int(trained[np.argmin(stage[trained])]) if len(trained) else None
        lowest = self.structure.stages - 1 if first is None else int(stage[first])
        bottom, prefix = self._prefix_below(first)
        is_cached = load.epochs > 1 and not load.answer_only and bottom > 0
        if to_the_bottom or (first is not None and load.runs_to_the_bottom):
            lowest = bottom - 1 if is_cached else -1  # a cache ends the backward pass

        prices = prices_of_adapters(columns, adapted, rank, stage[adapted] > lowest, load)
        tensors, copied = columns.sizes_of_adapters(adapted, rank), columns.numel[whole]
        numbers = float(tensors.sum()), float(copied.sum())
        steps = self._of_optimizer(tensors, load.adapter_number), self._of_optimizer(copied, load.number)
        moved_by_adapters = float(prices.moved_forward.sum() + prices.moved_backward.sum())
        forward, moved, read = self._forward[0], self._moved_forward[0], 1 - 1 / load.epochs
        cache = self._keys_per_token if load.answer_only else int(self._widths[-1]) * load.number * (bottom > 0)
        if is_cached:  # the prefix is computed in one epoch and read in the others
            forward -= read * (forward - self._forward[bottom])
            moved -= read * (moved - self._moved_forward[bottom] - 2 * cache)
        moved = float(moved + self._moved_backward[lowest + 1]) + moved_by_adapters
        moved += steps[0][1] + steps[1][1] + 2 * load.number * numbers[1] / load.trained_tokens

        by_block = self._kept_for_backward(adapted, rank, whole, lowest)
        kept, recomputed, recomputation = float(by_block.sum()), 0.0, 0.0
        if load.checkpointing and lowest < self.structure.stages - 1:
            again = self._block_top >= lowest
            recomputed = float(by_block[again].max(initial=0.0))
            kept = float(by_block[0] + self._widths[again].sum() * load.number * load.trained_tokens)
            stops_early = again.copy()
            stops_early[columns.block[trained[self._is_last[trained]]]] = False
            by_adapters = self._by_block(columns.block[adapted], prices.forward)
            recomputation = float((self._block_forward - stops_early * self._block_last + by_adapters)[again].sum())
            by_adapters = self._by_block(columns.block[adapted], prices.moved_forward)
            moved += float((self._block_moved + by_adapters)[again].sum())

        share, prompts = load.trained_share, 1 - load.trained_share
        of_prompts = [prompts * (1 - read) * price for price in self._of_prompts]
        added = int(numbers[0] * load.adapter_number + numbers[1] * load.number)
        states = load.state_bytes(tensors, load.adapter_number) + load.state_bytes(copied, load.number)
        return Cost(
            forward=float(share * forward + of_prompts[0]),
            backward=float(share * self._backward[lowest + 1]),
            adapters=share * float(prices.forward.sum() + prices.backward.sum()),
            weight_gradients=share * float(columns.products[whole].sum()),
            optimizer=share * (steps[0][0] + steps[1][0]),
            recomputation=share * recomputation,
            moved=share * moved + of_prompts[1] + prompts * read * 2 * self._keys_per_token,
            moved_by_adapters=share * moved_by_adapters,
            trainable=int(numbers[0] + numbers[1]),
            lowest=None if first is None else self.structure.parts[first].depth,
            weights=int(np.where(whole, columns.numel * load.number, columns.stored).sum()),
            added=added,
            gradients=added,
            states=int(states),
            activations=int(kept),
            recomputed=int(recomputed),
            logits=self._logits,
            workspace=self._workspace,
            prompts=int(self._prompts),
            prefix=prefix,
            cache=cache,
        )

    def _prefix_below(self, first: int | None) -> tuple[int, int]:
        """Return the first stage of the block of the lowest trained part, and the bytes of the weights of those below.

        Both are 0 if no block lies below.
        """
        columns, count = self._columns, len(self._widths)
        block = count if first is None else int(columns.block[first])
        if first is not None and block == 0:  # outside of blocks: before the first, or after the last
            block = 1 if columns.stage[first] == 0 else count
        below = (columns.block > 0) & (columns.block < block)
        if not below.any():
            return 0, 0
        bottom = max(int(columns.stage[below].max()), int(self._block_top[block - 1])) + 1
        return bottom, int(columns.stored[below].sum())

    def _kept_for_backward(self, adapted: Indices, rank: Array, whole: Mask, lowest: int) -> Array:
        """Return bytes kept from the forward to the backward pass by block, those outside of blocks first.

        Operations above the lowest trained stage keep what `price_of` returns. An adapter keeps r numbers and its input,
        once for all adapters that read the same; if dtypes differ, PEFT casts the input for each adapter, and each keeps
        its copy. A module trained whole keeps its input, a norm its result. SDPA already keeps attention's output. The
        new copy of fused experts that an adapter on them makes is kept in full.
        """
        load, columns = self.workload, self._columns
        fused = columns.is_fused[adapted]
        read = np.zeros(len(self._source_bytes), dtype=bool)
        read[columns.source[adapted[fused]]] = True
        read[columns.source[whole & columns.is_matrix]] = True
        own = rank * load.adapter_number
        if load.is_mixed:
            own = own + columns.d_in[adapted] * load.adapter_number
        else:
            read[columns.source[adapted]] = True
        if load.attention == "sdpa":
            read &= ~(columns.reads_attention & (columns.stage - 1 > lowest))[self._reader]
        own = np.where(
            fused, columns.numel[adapted] * load.number, own * columns.visits[adapted] * load.trained_tokens
        )
        pairs = (
            (self._kept_block, self._kept * (self._kept_at > lowest)),
            (columns.block[self._reader], self._source_bytes * read),
            (columns.block[adapted], own),
            (columns.block, columns.numel * load.number * load.trained_tokens * (whole & columns.is_norm)),
        )
        return np.sum([self._by_block(block, values) for block, values in pairs], axis=0)
