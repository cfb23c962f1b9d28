"""Compute the layers below the lowest trained one once per example, and read their result from a cache afterwards."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._text import format_names
from ..errors import BlueprintError
from ..measure import is_sharded, restored_attributes, unwrap
from ..place import Budget
from .state_store import StateDtype, StateStore


DEFAULT_BUDGET = "8GiB"

# Tensors that a layer may be given beside its hidden states: they depend on positions and padding alone.
_OF_POSITIONS = ("attention_mask", "causal_mask", "position_ids", "cache_position")
_ROTARY = "position_embeddings"  # also position_embeddings_global and position_embeddings_local
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")
# RoPE whose frequencies depend on the longest row of the batch
_ROPE_OF_THE_BATCH = ("dynamic", "longrope", "su")
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")

_LOG = logging.getLogger(__name__)


@dataclass
class CacheStatistics:
    """Counts and bytes of a cache since it was made.

    Args:
        rows_read: rows of training batches that began with cached states.
        rows_computed: rows whose lower layers were computed, from the embeddings or from a lower cached depth.
        examples: number of examples in the cache.
        refused: number of times that an example was not stored, because the budget or the disk was full.
        bytes: size of the cache.
        lowest: number of layers that the cache replaces.
    """

    rows_read: int
    rows_computed: int
    examples: int
    refused: int
    bytes: int
    lowest: int


@dataclass
class _Pass:
    """One training batch on its way through the lower layers."""

    keys: list[bytes]
    spans: list[slice]  # of a row's tokens, without padding
    positions: list[bytes]
    depths: list[int]  # layers that a row's states have passed
    lowest: int
    cached: list[Tensor | None]
    hidden: Tensor | None = None
    requires_grad: bool = False  # of the embeddings' output
    is_check: bool = False


class PrefixCache(ExitStack):
    """Cache of the hidden states below the lowest trained layer; made by `cache_frozen_prefix`.

    Use it as a context manager, or call `close`, to have the model as it was.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["layers.3.mlp.up_proj"])).train()
        >>> with PrefixCache(model, budget=2**20) as cache:
        ...     for batch in toy_batches():
        ...         model(**batch).loss.backward()
        >>> cache.lowest, cache.statistics.rows_computed
        (3, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        dtype: StateDtype = "auto",
        folder: str | Path | None = None,
        allow_empty: bool = False,
    ) -> None:
        super().__init__()
        self.model = unwrap(model)
        self._name, self._stack = _find_stack(self.model)
        self._decoder = self.model.get_submodule(self._name.rpartition(".")[0])
        self._signature = inspect.signature(self._decoder.forward)
        self._of_layer = inspect.signature(self._stack[0].forward)
        _check_model(self.model)
        if self.lowest == 0 and not allow_empty:
            raise BlueprintError(
                "Layer 0 is trained, so nothing below it can be cached. Place adapters from a higher layer on, freeze the "
                "lower ones (FreezeFromBelow), or give allow_empty=True."
            )
        self.store = StateStore(budget, dtype, folder)
        self._pass: _Pass | None = None
        self._changes: tuple[Any, ...] | None = None
        self._state_dtype: torch.dtype | None = None
        self._extra_outputs = -1  # of a layer, after the hidden states; -1 if it returns a bare tensor
        self._is_checked = self._is_closed = False
        self._rows_read = self._rows_computed = 0
        self._homes: dict[nn.Module, torch.device] = {}  # of offloaded layers
        self._replaced = [(module, vars(module).get("forward")) for module in (self._decoder, *self._stack)]
        self._original: Callable[..., Any] = self._decoder.forward
        self._layers: list[Callable[..., Any]] = [layer.forward for layer in self._stack]
        for _ in range(2):  # the second goes on where an interrupt ended the first
            self.callback(self._remove)
        try:
            self._decoder.forward = self._forward
            for i, layer in enumerate(self._stack):
                layer.forward = self._layer_forward(i)
        except BaseException:
            self.close()
            raise

    @property
    def lowest(self) -> int:
        """Number of layers at the bottom that have no trained parameter."""
        trained = (i for i, layer in enumerate(self._stack) if any(p.requires_grad for p in layer.parameters()))
        return next(trained, len(self._stack))

    @property
    def statistics(self) -> CacheStatistics:
        """Statistics of the cache so far."""
        return CacheStatistics(
            rows_read=self._rows_read,
            rows_computed=self._rows_computed,
            examples=len(self.store),
            refused=self.store.refused,
            bytes=self.store.used,
            lowest=self.lowest,
        )

    def offload(self) -> int:
        """Move the lower layers to the CPU; they return when a batch needs them, such as one of an evaluation.

        Returns:
            Bytes of weights that left their device; 0 on a CPU.

        Raises:
            BlueprintError: for 8-bit layers of bitsandbytes, whose weights stay on the GPU, and for layers that
                accelerate moves itself.
        """
        moved = 0
        for layer in self._stack[: self.lowest]:
            if layer in self._homes:
                continue
            if any(type(p).__name__ == "Int8Params" for p in layer.parameters()):
                raise BlueprintError("bitsandbytes keeps 8-bit weights on their GPU. Use 4 bits, or do not offload.")
            if any("_hf_hook" in vars(module) for module in layer.modules()):
                raise BlueprintError(
                    "accelerate's hooks place these layers already (device_map). Load the model on one device, or do not "
                    "offload."
                )
            device = next(layer.parameters()).device
            if device.type == "cpu":
                continue
            moved += sum(p.nbytes for p in layer.parameters())
            self._homes[layer] = device
            layer.to("cpu")
        return moved

    def restore(self) -> None:
        """Move offloaded layers back to their device."""
        for layer, device in self._homes.items():
            layer.to(device)
        self._homes.clear()

    def close(self) -> None:
        """Remove the cache from the model, bring offloaded layers back and delete the file."""
        super().close()

    def _remove(self) -> None:
        if self._is_closed:
            return
        self.restore()
        for module, forward in self._replaced:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
        self.store.close()
        self._is_closed = True

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder: in training with lower layers from the cache, otherwise as it was."""
        self._pass = None  # an interrupted pass may have left it
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        current = self._begin(given)
        if current is None:
            self.restore()
            return self._original(*args, **kwargs)
        if any(depth < current.lowest for depth in current.depths):
            self.restore()
        needs_check = not self._is_checked
        random = _random_states(self._decoder) if needs_check else None
        kwargs["use_cache"] = False
        with self._running(current):
            output = self._original(*args, **kwargs)
        if needs_check:
            assert random is not None
            self._check(current, output, random, args, kwargs)
            self._is_checked = True
        return output

    @contextmanager
    def _running(self, current: _Pass) -> Iterator[None]:
        """Send a batch through the layers, without gradient checkpointing where nothing is to be recomputed."""
        without = self._stack if current.is_check else self._stack[: current.lowest]
        checkpointed = [layer for layer in without if getattr(layer, "gradient_checkpointing", False)]
        with restored_attributes(checkpointed, "gradient_checkpointing"):
            for layer in checkpointed:
                layer.gradient_checkpointing = False  # type: ignore[assignment]
            try:
                self._pass = current
                yield
            finally:
                self._pass = None

    def _begin(self, given: Mapping[str, Any]) -> _Pass | None:
        """Find a batch's rows in the cache; None for a pass that the cache has no part in."""
        if not (self._decoder.training and torch.is_grad_enabled()):
            return None
        config = self.model.config
        if any(given.get(name) or (name not in given and getattr(config, name, False)) for name in _OUTPUTS):
            return None
        changes = self._find_changes()
        if changes is None:
            return None
        lowest = self.lowest
        if lowest == 0:
            return None
        _check_call(given)
        _check_dropout(self._decoder, self._stack, lowest)
        if self._changes != changes:
            if len(self.store):
                _LOG.warning("The weights below layer %d changed: the cache of hidden states starts anew", lowest)
            self.store.clear()
            self._changes = changes
        return self._rows(given, lowest)

    def _find_changes(self) -> tuple[Any, ...] | None:
        """Return a value that changes with the frozen weights; None while adapters among them are switched off."""
        lowest = self.lowest
        found: list[Any] = [m.weight._version for m in self._decoder.modules() if isinstance(m, nn.Embedding)]
        for layer in self._stack[:lowest]:
            for module in layer.modules():
                if isinstance(module, BaseTunerLayer):
                    if module.disable_adapters:
                        return None
                    found.append((tuple(module.active_adapters), tuple(module.merged_adapters)))
        # a layer more may freeze at any time, so that versions are compared as far up as both reach
        versions = [sum(p._version for p in layer.parameters()) for layer in self._stack[:lowest]]
        before = self._changes
        if before is not None and before[0] == versions[: len(before[0])] and len(before[0]) < len(versions):
            self._changes = (versions, found)  # frozen further up, and unchanged below
        return versions, found

    def _rows(self, given: Mapping[str, Any], lowest: int) -> _Pass:
        ids = given["input_ids"].detach().cpu()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        spans = _spans(ids if mask is None else mask.detach().cpu(), has_mask=mask is not None)
        if (
            positions is None
            and any(span.start for span in spans)
            and not _reads_positions_off_the_mask(self._decoder)
        ):
            raise BlueprintError(
                "A batch is padded on the left without position_ids, so a row's positions depend on the batch and its "
                "hidden states cannot be cached. Pad on the right (tokenizer.padding_side = 'right'), or give "
                "position_ids = attention_mask.cumsum(-1) - 1."
            )
        placed = None if positions is None else positions.detach().cpu().expand(len(ids), -1)
        keys, digests, depths, cached = [], [], [], []
        for row, span in enumerate(spans):
            own = b"" if placed is None else _digest(_checked_positions(placed[row, span]))
            key = _digest(ids[row, span])
            entry = self.store.entry(key)
            if entry is not None and entry.positions != own:
                raise BlueprintError(
                    "An example came with other position_ids than before, so they depend on the batch and its hidden "
                    "states cannot be cached. Let positions start at 0 in every row, or train without the cache."
                )
            keys.append(key)
            digests.append(own)
            depths.append(0 if entry is None else min(entry.depth, lowest))
            cached.append(None if entry is None or entry.depth > lowest else self.store.get(key))
        # an entry from further up, left over after a layer below was trained again, is of no use
        depths = [0 if states is None else depth for depth, states in zip(depths, cached, strict=True)]
        computed = sum(depth < lowest for depth in depths)
        self._rows_computed += computed
        self._rows_read += len(depths) - computed
        return _Pass(keys, spans, digests, depths, lowest, cached)

    def _layer_forward(self, index: int) -> Callable[..., Any]:
        """Return the `forward` of a layer: its own on the rows that need it below the lowest trained layer."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = self._pass
            if current is None or index >= current.lowest:
                return self._layers[index](*args, **kwargs)
            return self._through(index, current, args, kwargs)

        return forward

    def _through(self, index: int, current: _Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._of_layer.bind_partial(*args, **kwargs)
        name, first = next(iter(given.arguments.items()))
        if index == 0:
            _check_layer_inputs({key: value for key, value in given.arguments.items() if key != name})
            current.hidden, current.requires_grad = _with_rows(first, current, self._state_dtype), first.requires_grad
        hidden = current.hidden
        assert hidden is not None
        rows = [row for row, depth in enumerate(current.depths) if depth <= index]
        if rows:
            hidden = current.hidden = self._compute(index, hidden, rows, name, given)
        if index == current.lowest - 1:
            if not current.is_check:
                self._record(current, hidden)
            # reentrant checkpointing above needs an input that requires a gradient, if the embeddings' output did
            hidden.requires_grad_(current.requires_grad)
        return hidden if self._extra_outputs < 0 else (hidden, *[None] * self._extra_outputs)

    def _compute(
        self, index: int, hidden: Tensor, rows: list[int], name: str, given: inspect.BoundArguments
    ) -> Tensor:
        """Run one lower layer on some rows of a batch; return the hidden states of all rows."""
        count = len(hidden)
        is_whole = len(rows) == count
        chosen = torch.tensor(rows, device=hidden.device)

        def of_rows(value: Any) -> Any:
            is_by_row = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count > 1
            return value.index_select(0, chosen) if is_by_row and not is_whole else value

        taken = inspect.BoundArguments(self._of_layer, given.arguments.copy())
        for key, value in taken.arguments.items():
            taken.arguments[key] = tree_map(of_rows, value)
        taken.arguments[name] = hidden if is_whole else hidden.index_select(0, chosen)
        with torch.no_grad():
            output = self._layers[index](*taken.args, **taken.kwargs)
        made = output
        if isinstance(output, tuple):
            made, *others = output
            if any(isinstance(other, Tensor) for other in tree_flatten(others)[0]):
                raise BlueprintError(
                    f"{self._name}.{index} returns tensors beside its hidden states, which the cache does not hold. Train "
                    "without it."
                )
            self._extra_outputs = len(others)
        if not isinstance(made, Tensor) or made.shape[1:] != hidden.shape[1:]:
            raise BlueprintError(
                f"{self._name}.{index} must return hidden states of its input's shape, got "
                f"{tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__}. Train without the cache."
            )
        self._state_dtype = made.dtype
        if is_whole:
            return made
        hidden = hidden.to(made.dtype, copy=hidden.dtype == made.dtype and hidden is given.arguments[name])
        hidden[chosen] = made
        return hidden

    def _record(self, current: _Pass, hidden: Tensor) -> None:
        for row, (key, span) in enumerate(zip(current.keys, current.spans, strict=True)):
            if current.depths[row] < current.lowest and span.stop > span.start:
                self.store.put(key, hidden[row, span], current.lowest, current.positions[row])

    def _check(
        self,
        recorded: _Pass,
        output: Any,
        random: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run the first batch again from its states, wholly and every other row, and compare the decoder's outputs.

        Raises:
            BlueprintError: if the outputs differ, because something beside the hidden states passes the lower layers.
        """
        made = recorded.hidden
        assert made is not None
        expected = output[0].detach()
        for step in (1, 2):
            depths = [recorded.lowest if row % step == 0 else 0 for row in range(len(made))]
            cached = [made[row, span].cpu() if depths[row] else None for row, span in enumerate(recorded.spans)]
            again = _Pass(
                recorded.keys, recorded.spans, recorded.positions, depths, recorded.lowest, cached, is_check=True
            )
            with torch.no_grad(), _replayed_random(random), self._running(again):
                found = self._original(*args, **kwargs)[0]
            tolerance = 64 * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max()))
            for row, span in enumerate(recorded.spans):
                if not torch.allclose(found[row, span], expected[row, span], rtol=0.0, atol=tolerance):
                    self.store.clear()
                    raise BlueprintError(
                        f"{type(self.model).__name__} computes other outputs from the hidden states below layer "
                        f"{recorded.lowest} than from the start, so more than these pass its layers. Train without the "
                        "cache."
                    )


def cache_frozen_prefix(
    model: nn.Module,
    *,
    budget: int | str = DEFAULT_BUDGET,
    dtype: StateDtype = "auto",
    folder: str | Path | None = None,
    allow_empty: bool = False,
) -> PrefixCache:
    """Compute the layers below the lowest trained one once per example; later epochs read their result from a cache.

    Nothing below the lowest trained layer changes in training. So the hidden states that enter it are the same in every
    epoch. In training mode, `model(**batch)` stores them at an example's first visit, and later begins there: with
    `dtype="auto"`, losses and gradients are those without the cache. Rows of a batch that are not cached are computed
    alone. Evaluation and generation are unchanged. Works with transformers' Trainer (see `CacheFrozenPrefix`), TRL's
    SFTTrainer and an own loop.

    An example is recognized by its tokens, and padding on the right is left out, so that shuffling and other batches
    make no difference. When layers freeze later, the cache moves up with them: states stored so far are carried on from
    where they are. When weights below change, the cache starts anew. The first batch is checked by running it again
    from its own states.

    Each process of a distributed run has its own cache and finds in it the examples it saw itself; FSDP is refused.

    Args:
        model: causal language model with its adapter, possibly wrapped.
        budget: bytes, or text such as "8GiB", that the cache's file may take. Later examples are computed.
        dtype: of stored states: "auto" for those of the model; "bfloat16"; or "int8", about half of bfloat16's size.
        folder: where the file is created; by default the system's folder for temporary files. It vanishes at the end.
        allow_empty: accept a model whose first layer is trained; the cache then begins when that layer is frozen.

    Returns:
        The cache, to be closed when training ends; a context manager.

    Raises:
        BlueprintError: for an encoder-decoder or sharded model, one without a stack of layers, RoPE that depends on the
            batch, or a trained first layer. When training: for dropout below, left padding without `position_ids`,
            packed rows, inputs other than tokens, and layers that take more than hidden states.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["layers.3.mlp.up_proj"])).train()
        >>> with cache_frozen_prefix(model, budget="1MiB") as cache:
        ...     for epoch in range(2):
        ...         for batch in toy_batches():
        ...             model(**batch).loss.backward()
        >>> cache.lowest, cache.statistics.rows_read
        (3, 8)
    """
    return PrefixCache(model, _bytes_of(budget), dtype, folder, allow_empty)


class CacheFrozenPrefix(TrainerCallback):
    """Cache the frozen prefix of a Trainer's model during training, see `cache_frozen_prefix`.

    Add it to any Trainer: `callbacks=[CacheFrozenPrefix("8GiB")]`. With `FreezeFromBelow` the cache grows upwards. A
    resumed run fills the cache anew in its first epoch.

    Args:
        budget, dtype, folder: see `cache_frozen_prefix`.
        offload: move the lower layers to the CPU from the second epoch on, if the whole epoch was stored. Evaluations
            bring them back for as long as they take.

    Example:
        >>> callback = CacheFrozenPrefix("1GiB", dtype="int8")
    """

    def __init__(
        self,
        budget: int | str = DEFAULT_BUDGET,
        dtype: StateDtype = "auto",
        folder: str | Path | None = None,
        offload: bool = False,
    ) -> None:
        _bytes_of(budget)
        self.budget, self.dtype, self.folder, self.is_offloading = budget, dtype, folder, offload
        self.cache: PrefixCache | None = None
        self.statistics: CacheStatistics | None = None
        self._depth = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the cache."""
        if self.cache is not None:  # an interrupted training left it
            self.cache.close()
        self.cache = cache_frozen_prefix(
            kwargs["model"], budget=self.budget, dtype=self.dtype, folder=self.folder, allow_empty=True
        )
        if self.cache.lowest == 0:
            _LOG.warning("Layer 0 is trained: the cache of the frozen prefix begins when it is frozen")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Offload the lower layers, if every example of the last epoch is stored at their depth."""
        cache = self.cache
        if cache is None or not self.is_offloading:
            return
        if self._depth == cache.lowest > 0 and len(cache.store) and not cache.store.refused:
            cache.offload()
        self._depth = cache.lowest

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the cache, and keep its statistics."""
        if self.cache is None:
            return
        self.statistics = self.cache.statistics
        self.cache.close()
        self.cache = None
        _LOG.info("Cache of the frozen prefix: %s", self.statistics)


def _bytes_of(budget: int | str) -> int:
    if isinstance(budget, str):
        limits = Budget.of(budget).limits
        if list(limits) != ["memory"]:
            raise BlueprintError(f"budget must be bytes, such as '8GiB', got {budget!r}.")
        return int(limits["memory"])
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise BlueprintError(f"budget must be a positive number of bytes or text such as '8GiB', got {budget!r}.")
    return budget


def _find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of a causal model's stack of layers, and the stack."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise BlueprintError(
            f"{type(model).__name__} is an encoder-decoder: its decoder's inputs are not tokens alone. The cache is for "
            "causal language models."
        )
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise BlueprintError(f"The cache is for transformers' causal language models, got {type(model).__name__}.")
    if any(is_sharded(p) for p in model.parameters()):
        raise BlueprintError("The cache does not support FSDP, whose layers gather their weights. Use DDP.")
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
    }
    sizes = {name: sum(p.numel() for p in stack.parameters()) for name, stack in stacks.items()}
    if not sizes or not max(sizes.values()):
        raise BlueprintError(f"{type(model).__name__} has no stack of layers whose states could be cached.")
    name = max(sizes, key=sizes.__getitem__)
    if len({type(layer).__name__ for layer in stacks[name]}) > 1:
        raise BlueprintError(
            f"{type(model).__name__} has layers of different classes in {name}. Train without the cache."
        )
    return name, stacks[name]


def _check_model(model: nn.Module) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config  # type: ignore[operator]
    name = type(model).__name__
    for attribute in ("rope_parameters", "rope_scaling"):
        text = str(getattr(config, attribute, None) or {})
        found = [kind for kind in _ROPE_OF_THE_BATCH if f"'{kind}'" in text]
        if found:
            raise BlueprintError(
                f"{name} has RoPE of type {found[0]!r}, whose frequencies depend on the longest row of a batch, so "
                "hidden states cannot be cached."
            )
    if getattr(config, "num_kv_shared_layers", 0):
        raise BlueprintError(f"{name} shares keys and values between layers, which the cache does not hold.")
    if getattr(config, "output_router_logits", False):
        raise BlueprintError(
            f"{name} adds a loss over the routers of all layers, which the cache leaves out. Set "
            "config.output_router_logits = False, or train without the cache."
        )


def _check_call(given: Mapping[str, Any]) -> None:
    """Require tokens, their mask and positions, and nothing else that reaches the layers."""
    allowed = {"input_ids", "attention_mask", "position_ids", *_OF_THE_LOSS}
    others = [
        key
        for key, value in given.items()
        if key not in allowed and any(isinstance(v, Tensor) for v in _leaves(value))
    ]
    if given.get("input_ids") is None or others:
        raise BlueprintError(
            f"The cache recognizes an example by its input_ids, and the model was given {format_names(others) or 'none'}. "
            "Train without the cache."
        )
    if given.get("past_key_values") is not None:
        raise BlueprintError("The cache needs whole examples, and the model was given past_key_values.")
    packing = [key for key in ("cu_seq_lens_q", "seq_idx") if given.get(key) is not None]
    if packing:
        raise BlueprintError(f"The batch is packed ({packing[0]}), and {_WHY_NOT_PACKED}.")
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise BlueprintError(
            "attention_mask must have the shape (examples, tokens), with 0 for padding. Train without the cache for other "
            "masks."
        )


_WHY_NOT_PACKED = "an example's hidden states then depend on its neighbours; set packing=False and padding_free=False"


def _leaves(value: Any) -> list[Any]:
    return tree_flatten(value)[0]


def _check_layer_inputs(given: Mapping[str, Any]) -> None:
    """Require that a layer takes hidden states, and otherwise only arguments that follow from positions and padding."""
    others = [
        key
        for key, value in given.items()
        for inner, part in (value.items() if key == "kwargs" else [(key, value)])
        if inner not in (*_OF_POSITIONS, *_OF_THE_LOSS)
        and not inner.startswith(_ROTARY)
        and any(isinstance(leaf, Tensor) for leaf in _leaves(part))
    ]
    if others:
        raise BlueprintError(
            f"The model's layers take {format_names(others)} beside hidden states, which the cache does not hold. Train "
            "without it."
        )


def _check_dropout(decoder: nn.Module, stack: nn.ModuleList, lowest: int) -> None:
    """Require that nothing below is random."""
    prefix = [("", decoder), *((n, m) for n, m in decoder.named_children() if m is not stack)]
    prefix += [(f"{i}.{name}", m) for i, layer in enumerate(stack[:lowest]) for name, m in layer.named_modules()]
    for name, module in prefix:
        if not module.training:
            continue
        own = vars(module)
        rate = own.get("p") if isinstance(module, nn.modules.dropout._DropoutNd) else None
        rates = [rate, *(value for key, value in own.items() if "drop" in key and isinstance(value, float))]
        found = [value for value in rates if value]
        if found:
            raise BlueprintError(
                f"Dropout of {found[0]:g} below layer {lowest} ({name or type(decoder).__name__}) makes its hidden states "
                "differ from epoch to epoch. Set the model's dropout to 0, or that of frozen adapters (lora_dropout)."
            )
    embeddings = [m for m in decoder.modules() if isinstance(m, nn.Embedding)]
    if any(getattr(module, "neftune_noise_alpha", None) for module in embeddings):
        raise BlueprintError("NEFTune adds noise to the embeddings in every epoch. Leave neftune_noise_alpha out.")
    if any(p.requires_grad for module in embeddings for p in module.parameters()):
        raise BlueprintError("The embeddings are trained, so nothing above them can be cached. Freeze them.")


def _spans(mask: Tensor, has_mask: bool) -> list[slice]:
    """Return the tokens of each row without padding."""
    if not has_mask:
        return [slice(0, mask.shape[1])] * len(mask)
    spans = []
    for row in mask.bool():
        held = row.nonzero().flatten()
        start, stop = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 0)
        if stop - start != len(held):
            raise BlueprintError("attention_mask has gaps within a row; the cache needs padding at the ends alone.")
        spans.append(slice(start, stop))
    return spans


def _checked_positions(positions: Tensor) -> Tensor:
    if bool((positions.diff() <= 0).any()):
        raise BlueprintError(f"position_ids start again within a row, as for packed examples, and {_WHY_NOT_PACKED}.")
    return positions


def _digest(numbers: Tensor) -> bytes:
    return hashlib.blake2b(numbers.to(torch.int64).contiguous().numpy().tobytes(), digest_size=16).digest()


def _reads_positions_off_the_mask(decoder: nn.Module) -> bool:
    """Return whether positions count a row's own tokens, as OPT's learned positions do."""
    embedding = getattr(decoder, "embed_positions", None)
    return isinstance(embedding, nn.Module) and "attention_mask" in inspect.signature(embedding.forward).parameters


def _with_rows(hidden: Tensor, current: _Pass, dtype: torch.dtype | None) -> Tensor:
    """Return a batch's embeddings with the rows that are cached in place of theirs."""
    hidden = hidden.detach().to(hidden.dtype if dtype is None else dtype, copy=True)
    for row, states in enumerate(current.cached):
        if states is not None:
            hidden[row, current.spans[row]] = states.to(hidden.device, hidden.dtype, non_blocking=True)
    return hidden


def _random_states(module: nn.Module) -> dict[str, Any]:
    devices = {p.device for p in module.parameters() if p.is_cuda}
    return {"cpu": torch.get_rng_state(), "cuda": {d: torch.cuda.get_rng_state(d) for d in devices}}


@contextmanager
def _replayed_random(states: Mapping[str, Any]) -> Iterator[None]:
    """Draw the same random numbers again, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=list(states["cuda"]), device_type="cuda"):
        torch.set_rng_state(states["cpu"])
        for device, state in states["cuda"].items():
            torch.cuda.set_rng_state(state, device)
        yield
