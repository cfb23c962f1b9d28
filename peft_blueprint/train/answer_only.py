"""Train activated LoRA at the cost of the answers: prompts pass once through the frozen model, without gradient."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from .._text import format_names
from ..errors import BlueprintError
from ..measure import IGNORED, borrowed, disable_dropout, restored_attributes
from .invocation import Answer, Turns, find_answers
from .prompt_cache import Prompt, PromptCache, PromptStates, model_digest
from .target_head import causal_model_of, change_class, head_on_targets, shifted


Model = TypeVar("Model", bound=nn.Module)

CHUNK_TOKENS = 4096
_SHORTEST_SHARED = 16  # tokens that a batch's prompts must share to be computed apart
_ATTENTION = ("full_attention", "sliding_attention")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the loss, relative; 2 % in half precision
_FEW = 16  # targets, over which rounding errors average out; of fewer the tolerance is wider
_SETUP = "_answer_only"
_PEFT_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_is_full_backward_hook"),
    "_peft_gradient_checkpointing_forward_hooks",
)
_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


def answer_only(
    model: Model, *, turns: Turns = "last", chunk_tokens: int = CHUNK_TOKENS, cache: PromptCache | None = None
) -> Model:
    r"""Make training steps of activated LoRA skip gradients, adapters and head for prompts, in place.

    Adapters of activated LoRA (arXiv:2504.12397) act from the invocation tokens on, so a prompt's hidden states do not
    depend on them. PEFT computes prompts like answers. Here a step runs prompts once through the frozen base model
    without gradient, keeps their keys and values, and runs only invocation and answer tokens through adapters, backward
    pass and head. Loss and gradients are equal to PEFT's. Prompts that rows share, and beginnings that all prompts of a
    batch share, are computed once.

    It acts in training mode when labels are given: `model(**batch).loss`, the Trainer of transformers and TRL's
    SFTTrainer work unchanged. Evaluation, generation and saving are PEFT's, and so is the saved adapter. Trainers that
    read logits in place of a loss, as for DPO and GRPO, run as without it. The first training batch is checked: the
    loss of its shortest example must be the same with and without splitting.

    PEFT activates a row's last occurrence of the invocation tokens. Earlier targets (earlier turns of a chat) then get
    the base model's logits: they count in the mean loss, without a gradient, and a warning tells how many. `turns="every"` trains each turn of a chat
    as an answer of its own instead, which sees the base model's keys of earlier turns, as it will when served. Its
    gradients are those of PEFT on one example a turn. The conversation still passes through the base model once.

    Args:
        model: a `PeftModelForCausalLM` whose adapter has `alora_invocation_tokens`, see `find_invocation_tokens`. Its
            class becomes a subclass of itself.
        turns: "last" or "every", the answers of a row that are trained.
        chunk_tokens: number of prompt tokens in one pass.
        cache: keeps prompts' keys and values for later steps and epochs.

    Returns:
        The same model.

    Raises:
        BlueprintError: for an adapter other than activated LoRA, an encoder-decoder model, a model whose attention is
            not of keys and values, or weights trained on prompts too. When the model runs: for a row without invocation
            tokens, packed rows, rows longer than the context, and inputs that cannot be split.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8])
        >>> model = answer_only(get_peft_model(tiny_llama(), config)).train()
        >>> [batch] = toy_batches(2, batch_size=2, padding="none", prompt=5)
        >>> batch["input_ids"][:, 3:5] = torch.tensor([7, 8])
        >>> model(**batch).loss.requires_grad
        True
    """
    if not isinstance(model, PeftModelForCausalLM):
        raise BlueprintError(
            f"model must be a PeftModelForCausalLM, got {type(model).__name__}. Add an adapter with "
            'get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=…)).'
        )
    if turns not in ("last", "every"):
        raise BlueprintError(f"turns must be 'last' or 'every', got {turns!r}.")
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise BlueprintError(f"chunk_tokens must be a positive integer, got {chunk_tokens!r}.")
    base = causal_model_of(model)
    _require_splittable(base)
    _require_activated(model)
    if cache is not None and (active := _dropout_of(base)):
        raise BlueprintError(
            f"The base model drops out activations ({active}), so prompts' states differ from step to step and cannot be "
            "cached. Set its dropout to 0, or leave out the cache."
        )
    head_on_targets(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, variant in module.lora_variant.items():
                if type(variant) is ALoraLinearVariant:
                    module.lora_variant[name] = _AnswerVariant()
    setup = _Setup(turns, chunk_tokens, cache, model_digest(base) if cache is not None else "")
    setattr(model, _SETUP, setup)
    if not isinstance(model, _AnswerOnly):
        change_class(model, _AnswerOnly)
    return model


@dataclass
class _Setup:
    turns: Turns
    chunk_tokens: int
    cache: PromptCache | None
    digest: str
    is_checked: bool = False


class _Everywhere(list[int]):
    """Offsets of a pass in which every position is adapted."""


class _AnswerVariant(ALoraLinearVariant):
    """PEFT's variant, without masks where all positions or none are adapted."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **keywords: Any) -> Tensor:
        offsets = keywords.get("alora_offsets")
        if offsets is None and not torch.is_grad_enabled():
            return result
        if not isinstance(offsets, _Everywhere):
            return ALoraLinearVariant.forward(module, active_adapter, x, result, **keywords)
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        low = down(module.lora_dropout[active_adapter](x.to(down.weight.dtype)))
        return result + up(low) * module.scaling[active_adapter]


class _PrefixLayer(DynamicLayer):
    """Keys and values before the tokens of a pass. It stores nothing, so checkpointing can repeat the pass."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([before.to(own.device), own], dim=-2) for before, own in pairs)
        return keys, values


class _AnswerOnly:
    """Mixin of `PeftModelForCausalLM`."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        model: Any = self
        is_loss = model.training and torch.is_grad_enabled() and keywords.get("labels") is not None
        # an adapter that is switched off trains nothing; another adapter is PEFT's matter
        if args or not is_loss or not getattr(model.active_peft_config, "alora_invocation_tokens", None):
            return super().forward(*args, **keywords)  # type: ignore[misc]
        setup: _Setup = model._answer_only
        batch = _Batch.of(model, keywords)
        if not setup.is_checked:
            _check_first(model, batch)
            setup.is_checked = True
        return _forward(model, batch, setup)


@dataclass(frozen=True)
class _Batch:
    """A batch on the CPU, its answers, and the arguments that are passed on."""

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    answers: list[Answer]
    device: torch.device
    takes_positions: bool
    items: Any
    others: dict[str, Any]

    @classmethod
    def of(cls, model: Any, keywords: dict[str, Any]) -> _Batch:
        others = dict(keywords)
        ids, mask, labels = (others.pop(key, None) for key in ("input_ids", "attention_mask", "labels"))
        positions, targets = others.pop("position_ids", None), others.pop("shift_labels", None)
        items = others.pop("num_items_in_batch", None)
        if ids is None or ids.dim() != 2:
            raise BlueprintError(
                "answer_only needs input_ids of shape (rows, positions); it does not take embeddings."
            )
        unknown = [
            key
            for key, value in others.items()
            if (isinstance(value, Tensor) and value.dim() > 0) or key in ("past_key_values", "adapter_names")
        ]
        if unknown:
            raise BlueprintError(
                f"answer_only cannot split the inputs {format_names(unknown)}. Leave them out, without packing: it splits "
                "input_ids, attention_mask, position_ids and labels."
            )
        if mask is not None and mask.shape != ids.shape:
            raise BlueprintError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(mask.shape)}. "
                "answer_only takes no prepared mask."
            )
        base = model.get_base_model()
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        if positions is None:
            by_mask = any(
                isinstance(module, nn.Embedding) and "attention_mask" in inspect.signature(module.forward).parameters
                for module in base.modules()
            )
            count = real.long().cumsum(dim=1) - 1
            positions = count.clamp(min=0) if by_mask else torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        ids_cpu, real = ids.cpu(), real.cpu()
        wanted = (shifted(labels) if targets is None else targets).cpu()
        tokens = model.active_peft_config.alora_invocation_tokens
        batch = cls(
            ids_cpu,
            positions.expand_as(ids).cpu(),
            wanted,
            find_answers(ids_cpu, real, wanted, tokens, model._answer_only.turns),
            ids.device,
            takes_positions,
            items,
            others,
        )
        batch._require_positions(base, real)
        return batch

    def _require_positions(self, base: PreTrainedModel, real: Tensor) -> None:
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        longest = int(self.positions[real].max()) + 1
        if context and longest > context:
            row = int((self.positions * real).max(dim=1).values.argmax())
            raise BlueprintError(
                f"Example {row} of the batch has {longest} positions, more than the model's context of {context}. Cut its "
                "prompt, lower max_length, or leave it out."
            )
        steps = self.positions.diff(dim=1)[real[:, 1:] & real[:, :-1]]
        if not bool((steps == 1).all()):
            raise BlueprintError(
                "position_ids must rise by one from token to token. answer_only does not take packed rows: set "
                "packing=False and padding_free=False."
            )

    def prompt(self, answer: Answer) -> Prompt:
        """Return an answer's prompt, with targets inside it that no answer of the row covers."""
        where = slice(answer.first, answer.start)
        inert = self.targets[answer.row, where].clone()
        own = [other for other in self.answers if other.row == answer.row]
        if answer is not own[0]:
            inert[:] = IGNORED
        return Prompt(
            self.input_ids[answer.row, where],
            self.positions[answer.row, where],
            inert if bool((inert != IGNORED).any()) else None,
        )

    def alone(self, answer: Answer) -> _Batch:
        """Return a batch of one answer with its prompt, without other targets."""
        row, where = slice(answer.row, answer.row + 1), slice(answer.first, answer.until)
        targets = self.targets[row, where].clone()
        targets[:, : answer.start - answer.first] = IGNORED
        moved = Answer(0, 0, *(place - answer.first for place in (answer.start, answer.stop, answer.until)))
        return replace(
            self,
            input_ids=self.input_ids[row, where],
            positions=self.positions[row, where],
            targets=targets,
            answers=[moved],
            items=None,
            others={key: value for key, value in self.others.items() if key != "fused_lm_head"},
        )


def _forward(model: Any, batch: _Batch, setup: _Setup) -> Any:
    """Return the model's output for a batch, computed from its prompts' states."""
    base = causal_model_of(model)
    prompts = [batch.prompt(answer) for answer in batch.answers]
    is_fused = bool(batch.others.get("fused_lm_head"))
    inert = sum(int((prompt.targets != IGNORED).sum()) for prompt in prompts if prompt.targets is not None)
    if inert and (is_fused or any(p.requires_grad for p in _head_weights(base))):
        raise BlueprintError(
            f"{inert} targets of the batch come before its invocation tokens, where the adapter does not act. Mask them "
            'with -100 (completion_only_loss=True in TRL), or train every turn of a chat with turns="every".'
        )
    states = _states(base, prompts, setup)
    widths = [answer.stop - answer.start for answer in batch.answers]
    rows, width = len(widths), max(widths)
    input_ids, targets = torch.zeros(rows, width, dtype=torch.long), torch.full((rows, width), IGNORED)
    positions = torch.arange(width).repeat(rows, 1)
    for i, answer in enumerate(batch.answers):
        where = slice(answer.start, answer.stop)
        input_ids[i, : widths[i]] = batch.input_ids[answer.row, where]
        targets[i, : widths[i]] = batch.targets[answer.row, where]
        positions[i] += batch.positions[answer.row, answer.start]
    # padding behind a row's last token must not exceed a table of positions
    ends = torch.tensor([int(batch.positions[a.row, a.stop - 1]) for a in batch.answers])
    positions = torch.minimum(positions, ends[:, None])
    keywords = dict(batch.others)
    if batch.takes_positions:
        keywords["position_ids"] = positions.to(batch.device)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    cache = _prefix(states, lengths, base) if longest else None
    mask = None
    if len(set(lengths)) > 1:
        mask = torch.ones(rows, longest + width, dtype=torch.long)
        for i, length in enumerate(lengths):
            mask[i, : longest - length] = 0
        mask = mask.to(batch.device)
    losses = [one.loss for one in states if one.loss is not None]
    count: Any = batch.items
    if count is None and not is_fused:
        count = int((batch.targets != IGNORED).sum())
    if count is not None:
        keywords["num_items_in_batch"] = count
    wanted = targets.to(batch.device)
    hooked: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer | GradientCheckpointingLayer)]
    with ExitStack() as stack:
        # an error would leave PEFT's hooks behind; after a pass those for checkpointing stay until the backward pass
        stack.enter_context(restored_attributes(hooked, *_PEFT_HOOKS, after_errors_only=True))
        if cache is not None:
            stack.enter_context(_checkpointed_with(base, cache))
            keywords |= {"past_key_values": cache, "use_cache": False}
        outputs = super(_AnswerOnly, model).forward(
            input_ids=input_ids.to(batch.device),
            attention_mask=mask,
            labels=wanted,
            shift_labels=wanted,
            alora_offsets=_Everywhere([width] * rows),
            **keywords,
        )
        if hasattr(outputs, "past_key_values"):
            outputs.past_key_values = None
        if losses:
            outputs.loss = outputs.loss + torch.stack(losses).sum().to(outputs.loss.device) / count
        return outputs


def _states(base: PreTrainedModel, prompts: Sequence[Prompt], setup: _Setup) -> list[PromptStates]:
    """Return every prompt's states: from the cache, as the beginning of another prompt, or computed."""
    keys = [prompt.key(setup.digest) for prompt in prompts]
    found: dict[str, PromptStates] = {}
    missing: dict[str, Prompt] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        if key in found or key in missing:
            continue
        cached = setup.cache.get(key) if setup.cache is not None else None
        if cached is not None:
            found[key] = cached
        else:
            missing[key] = prompt
    longest_first = sorted(missing, key=lambda key: len(missing[key]), reverse=True)
    inside: dict[str, str] = {}
    for i, key in enumerate(longest_first):
        prompt = missing[key]
        if prompt.targets is None:
            whole = (other for other in longest_first[:i] if prompt.begins(missing[other]) and other not in inside)
            if other := next(whole, None):
                inside[key] = other
    alone = [key for key in longest_first if key not in inside and missing[key].targets is not None]
    together = [key for key in longest_first if key not in inside and missing[key].targets is None]
    with torch.no_grad(), _without_checkpointing(base):
        for group in [[key] for key in alone] + ([together] if together else []):
            computed = _compute(base, [missing[key] for key in group], setup.chunk_tokens)
            found.update(zip(group, computed, strict=True))
    torch.clear_autocast_cache()  # it holds weights that were cast without gradient
    for key, other in inside.items():
        found[key] = found[other].beginning(len(missing[key]))
    if setup.cache is not None:
        for key, prompt in missing.items():
            setup.cache.put(key, found[key], base, len(prompt))
    return [found[key] for key in keys]


def _compute(base: PreTrainedModel, prompts: Sequence[Prompt], chunk_tokens: int) -> list[PromptStates]:
    """Run prompts, longest first, through the base model in chunks; a common beginning runs once."""
    lengths = [len(prompt) for prompt in prompts]
    states: list[PromptStates | None] = [None] * len(prompts)
    cache, losses = DynamicCache(), []
    common = _common_length(prompts) if len(prompts) > 1 else 0
    start, rows = 0, 1 if common else len(prompts)
    while start < lengths[0]:
        if common and start == common:
            rows = len(prompts)
            cache.batch_repeat_interleave(rows)
        if start >= common:
            active = sum(length > start for length in lengths)
            for i in range(active, rows):
                states[i] = PromptStates.of(cache, i, lengths[i])
            if active < rows:
                cache.batch_select_indices(torch.arange(active))
            rows = active
        stop = min(start + max(1, chunk_tokens // rows), common if start < common else lengths[0])
        chunk = prompts[:rows]
        ids = torch.zeros(rows, stop - start, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for i, prompt in enumerate(chunk):
            part = prompt.input_ids[start:stop]
            ids[i, : len(part)], positions[i, : len(part)] = part, prompt.positions[start:stop]
        targets = chunk[0].targets
        losses.append(_pass(base, cache, ids, positions, None if targets is None else targets[None, start:stop]))
        start = stop
    own = [loss for loss in losses if loss is not None]
    for i in range(len(prompts)):
        if states[i] is None:
            states[i] = PromptStates.of(cache, i, lengths[i], torch.stack(own).sum() if own else None)
    done = [state for state in states if state is not None]
    layers = base.config.get_text_config().num_hidden_layers
    if lengths[0] and not 0 < len(done[0].layers) <= layers:
        raise BlueprintError(
            f"{type(base).__name__} does not keep its prompts' keys and values in a DynamicCache, so prompts cannot be "
            "split off. Train it without answer_only."
        )
    return done


def _pass(
    base: PreTrainedModel, cache: DynamicCache, input_ids: Tensor, positions: Tensor, targets: Tensor | None
) -> Tensor | None:
    """Run a chunk; return the sum of its targets' losses, if it has any."""
    device = _input_device(base)
    keywords: dict[str, Any] = {"input_ids": input_ids.to(device), "past_key_values": cache, "use_cache": True}
    backbone = base.base_model
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        keywords["position_ids"] = positions.to(device)
    if targets is None or not bool((targets != IGNORED).any()):
        backbone(**keywords)
        return None
    wanted = targets.to(device)
    loss: Tensor = base(**keywords, labels=wanted, shift_labels=wanted, num_items_in_batch=1).loss
    return loss


def _common_length(prompts: Sequence[Prompt]) -> int:
    """Return how many tokens at the start all prompts share, or 0 if too few to be worth a pass of their own."""
    shortest = min(len(prompt) for prompt in prompts)
    first = prompts[0]
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt.input_ids[:shortest] == first.input_ids[:shortest]
        same &= prompt.positions[:shortest] == first.positions[:shortest]
    length = int(same.long().cumprod(dim=0).sum())
    return length if length >= _SHORTEST_SHARED else 0


def _input_device(base: PreTrainedModel) -> torch.device:
    weight: Any = base.get_input_embeddings().weight
    device: torch.device = weight.device
    return device


def _prefix(states: Sequence[PromptStates], lengths: Sequence[int], base: PreTrainedModel) -> DynamicCache:
    """Collate prompts' states into one cache, padded on the left."""
    longest = max(lengths)
    device = _input_device(base)
    layers: list[Any] = []
    for index in range(max(len(one.layers) for one in states)):
        pair = []
        for part in (0, 1):
            known = next(one.layers[index][part] for one in states if one.layers)
            heads, _, size = known.shape
            where = known.device if known.device.type != "cpu" else device
            whole = torch.zeros(len(states), heads, longest, size, dtype=known.dtype, device=where)
            for i, (one, length) in enumerate(zip(states, lengths, strict=True)):
                if length:
                    whole[i, :, longest - length :] = one.layers[index][part]
            pair.append(whole)
        layers.append(_PrefixLayer(*pair))
    cache = DynamicCache()
    cache.layers = layers
    return cache


@contextmanager
def _without_checkpointing(base: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off, which would drop a cache."""
    on = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    with restored_attributes(on, "gradient_checkpointing"):
        for module in on:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield


@contextmanager
def _checkpointed_with(base: nn.Module, cache: DynamicCache) -> Iterator[None]:
    """Let checkpointed layers read the cache, which transformers takes from them."""
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    with restored_attributes(layers, "_gradient_checkpointing_func", "_can_checkpoint_with_cache"):
        for layer in layers:
            accepted = list(inspect.signature(layer.forward).parameters)
            name = next((name for name in _CACHE_NAMES if name in accepted), "past_key_values")
            place = accepted.index(name) if name in accepted else len(accepted)
            with_cache: Any = partial(_checkpoint, layer._gradient_checkpointing_func, cache, name, place)
            layer._gradient_checkpointing_func = with_cache
            layer._can_checkpoint_with_cache = True
        yield


def _checkpoint(checkpoint: Any, cache: DynamicCache, name: str, place: int, layer: Any, *args: Any) -> Any:
    """Call a checkpointed layer with the cache, by position where the model passes it so."""
    if len(args) > place:
        return checkpoint(layer, *args[:place], cache, *args[place + 1 :])
    return checkpoint(partial(layer, **{name: cache}), *args)


def _check_first(model: Any, batch: _Batch) -> None:
    """Compare the loss of the batch's shortest answer with PEFT's, to avoid training on wrong states.

    Warns of targets that train nothing.

    Raises:
        BlueprintError: if the losses differ.
    """
    _require_activated(model)
    total = int((batch.targets != IGNORED).sum())
    if inert := total - sum(int((batch.targets[a.row, a.start : a.stop] != IGNORED).sum()) for a in batch.answers):
        warnings.warn(
            f"{inert} of {total} targets of the first batch come before the last invocation tokens of their row, where the "
            "adapter does not act, and train nothing. Take invocation tokens that no answer contains, mask these targets "
            'with -100, or train every turn of a chat with turns="every".',
            stacklevel=4,
        )
    with_target = [a for a in batch.answers if bool((batch.targets[a.row, a.start : a.stop] != IGNORED).any())]
    if not with_target:
        return
    answer = min(with_target, key=lambda a: a.until - a.first)
    example = batch.alone(answer)
    keywords = dict(example.others)
    ids, wanted = example.input_ids.to(batch.device), example.targets.to(batch.device)
    if batch.takes_positions:
        keywords["position_ids"] = example.positions.to(batch.device)
    base = causal_model_of(model)
    with borrowed(model), _without_checkpointing(base), torch.no_grad():
        for module in model.modules():
            disable_dropout(module)
        split = float(_forward(model, example, replace(model._answer_only, cache=None)).loss)
        whole = super(_AnswerOnly, model).forward(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=wanted, shift_labels=wanted, **keywords
        )
        expected = float(whole.loss)
    few = max(1.0, _FEW / int((wanted != IGNORED).sum())) ** 0.5
    tolerance = _TOLERANCE.get(whole.logits.dtype, 0.02) * max(1.0, abs(expected)) * few
    if not abs(split - expected) <= tolerance:
        raise BlueprintError(
            f"The loss of {type(base).__name__} changes from {expected:.5f} to {split:.5f} when its prompt is split off: "
            "its attention or cache cannot be split. Train it without answer_only."
        )


def _require_splittable(base: PreTrainedModel) -> None:
    """Refuse models whose states are not keys and values of every token."""
    name, config = type(base).__name__, base.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION))
    if kinds or getattr(base, "_is_stateful", False):
        raise BlueprintError(
            f"{name} has layers of kind {format_names(kinds or ['recurrent'])}, whose cache cannot be split into prompt "
            "and answer. Train it without answer_only."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise BlueprintError(
            f"{name} attends in both directions, so prompts depend on answers. Train it without answer_only."
        )
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0):
        raise BlueprintError(
            f"{name} adds a loss on its routers over all tokens, prompts included. Set "
            "config.output_router_logits=False, or train it without answer_only."
        )


def _require_activated(model: PeftModelForCausalLM) -> None:
    """Refuse trained weights that act on prompts, whose states then depend on them."""
    config = model.active_peft_config
    if not getattr(config, "alora_invocation_tokens", None):
        raise BlueprintError(
            f"The adapter {model.active_adapter!r} is not an activated LoRA. Give its config "
            "alora_invocation_tokens=find_invocation_tokens(tokenizer)."
        )
    head = {id(parameter) for parameter in _head_weights(causal_model_of(model))}
    head -= {id(parameter) for parameter in causal_model_of(model).get_input_embeddings().parameters()}
    activated = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, variant in module.lora_variant.items():
                if isinstance(variant, ALoraLinearVariant):
                    parts = [part[name] for part in (module.lora_A, module.lora_B) if name in part]
                    activated |= {id(parameter) for part in parts for parameter in part.parameters()}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in activated | head
    ]
    if others:
        raise BlueprintError(
            f"{format_names(others)} are trained on prompts too, so prompts' states depend on them. Train only activated "
            "LoRA on linear layers: leave out modules_to_save, bias and target_parameters, or train without answer_only."
        )


def _head_weights(base: PreTrainedModel) -> list[nn.Parameter]:
    return list(base.get_output_embeddings().parameters())


def _dropout_of(base: PreTrainedModel) -> str:
    """Name a dropout of the base model that is above zero, or return an empty text."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and "lora_dropout" not in name:
            return f"{name} at {module.p}"
    rates = {key: value for key, value in vars(base.config).items() if key in ("attention_dropout", "attn_pdrop")}
    return next((f"{key} at {value}" for key, value in rates.items() if value), "")
