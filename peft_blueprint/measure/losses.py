"""Compute each example's own loss: the mean over its target tokens.

Covers the objectives of transformers' heads: next-token, per-token and sequence-to-sequence prediction, classification
and regression. One example at a time, it covers any loss that a model returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._text import first_line, shape_str
from ..errors import BlueprintError, MeasurementError
from .gradients import NUMBERS_AT_A_TIME
from .submodules import class_of, unwrap


LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Result = TypeVar("Result")

IGNORED = -100  # transformers' label of positions without a target
_WITH_ROWS = (Tensor, list, tuple)


NEXT_TOKEN, _SAME, _CLASSES, _NUMBERS = "the next token", "the token itself", "classes", "numbers"
_OWN = "known to the model alone"


class UnknownObjective(MeasurementError):
    """Only the model itself can compute its objective; measure its own loss, one example at a time."""


@dataclass
class Checks:
    """Facts about a model that checks of its first batch show; later measurements of the same model take them over.

    Args:
        form: the objective's, or None before the first batch.
        needs_cache: whether the model's loss is another without its cache of keys and values.
        examples_are_apart: whether examples were compared with the batch under `loss_fn`.
        grouped: by name of the module that holds them, whether its experts are measured in a batch's own pass.
        refused: by name of every layer that was checked, why it is not measured; None for those that are.

    Example:
        >>> from peft_blueprint import measure_influence
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> model, checks = tiny_llama(), Checks()
        >>> parts = [measure_influence(model, [batch], checks=checks, progress=False) for batch in toy_batches()]
        >>> checks.form
        'the next token'
    """

    form: str | None = None
    needs_cache: bool = False
    examples_are_apart: bool = False
    grouped: dict[str, bool] = field(default_factory=dict)
    refused: dict[str, str | None] = field(default_factory=dict)


class Objective:
    """Losses of single examples: those that the model itself returns, or `loss_fn`'s.

    A model's objective is not assumed. The loss that it returns for the first example is compared with the cross-entropy
    of the next token, of the token itself or of classes, and with the squared error. If exactly one agrees, it is
    computed for whole batches, without logits where there is no target. Otherwise the model's own loss is taken, one
    example at a time. The first example of a model whose code is not transformers' own does not stand for others, so
    all of the first batch are compared.

    Args:
        model: with or without adapters.
        loss_fn: replaces the model's own objective; `loss_fn(model, batch)` → (B,).
        checks: facts about the model; completed here.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> objective = Objective(tiny_llama())
        >>> [objective.losses(batch)[0].shape for batch in toy_batches()]
        [torch.Size([4]), torch.Size([4])]
        >>> objective.form
        'the next token'
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction | None = None, checks: Checks | None = None):
        self.model = model
        self.loss_fn = loss_fn
        self.checks = Checks() if checks is None else checks
        self._expected: float | None = None  # the first example's loss, until it is compared with the computed one

    @property
    def form(self) -> str | None:
        """The objective, None before the first batch."""
        return self.checks.form

    @property
    def is_own(self) -> bool:
        """Whether only the model can compute the losses, one example at a time."""
        return self.form == _OWN

    def use_own(self) -> None:
        """Take the model's own loss, one example at a time."""
        self.checks.form = _OWN

    def losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return losses (B,) in float32, with their graph, and numbers of target tokens (B,) of a batch.

        Args:
            batch: the model's inputs, and `labels` of shape (B, T) or (B,).

        Raises:
            MeasurementError: without targets, or if the model returns no loss.
        """
        losses, counts = zip(*self.map(batch, self.at_once), strict=True)
        return torch.cat(losses), torch.cat(counts)

    def map(self, batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Result]) -> list[Result]:
        """Call `run`, which calls `at_once`, with a batch, or with each of its examples if they must be alone."""
        self.find(batch)
        try:
            return [run(part) for part in (split_examples(batch) if self.is_own else [batch])]
        except UnknownObjective:  # learned in the first pass, which is repeated
            return [run(example) for example in split_examples(batch)]

    def at_once(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return losses (B,) and numbers of targets (B,) as `losses`, in one pass.

        Raises:
            UnknownObjective: if the batch's examples must be run alone, or the pass must be repeated for that reason.
        """
        if self.loss_fn is not None:
            losses = self.loss_fn(self.model, batch)
            if not isinstance(losses, Tensor) or losses.dim() != 1:
                found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
                raise MeasurementError(
                    f"loss_fn must return a tensor with one loss for each example, (B,), got {found}."
                )
            _require_graph(losses, "loss_fn")
            return losses.float(), _count_targets(batch, len(losses))
        self.find(batch)
        if self.is_own and count_examples(batch) == 1:
            own = _model_loss(self.model, batch, self.checks.needs_cache)
            if not self._is_expected(own[0]):
                self.checks.needs_cache, self._expected = True, None
                raise UnknownObjective(f"The pass must be repeated: {_name(self.model)} needs its cache.")
            return own
        known = None
        if not self.is_own and isinstance(batch.get("labels"), Tensor):
            try:
                known = self._known_losses(batch)
            except (BlueprintError, torch.OutOfMemoryError):
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if self._expected is None or isinstance(error, RuntimeError):
                    raise _failed(self.model, batch, error) from error
                # on the first batch: the model cannot do without labels
        if known is None or not self._is_expected(known[0]):
            self.use_own()
            raise UnknownObjective(f"The examples must be run alone: {_name(self.model)}'s objective is {self.form}.")
        return known

    def find(self, batch: Mapping[str, Any], in_lockstep: bool = False) -> None:
        """Find the objective on the first batch, without a gradient.

        Args:
            batch: as for `losses`.
            in_lockstep: make exactly one pass, as every process with a part of a sharded model does.

        Raises:
            MeasurementError: if the model returns no loss, or needs its examples alone and cannot have them.
        """
        if self.loss_fn is not None or self.form is not None:
            return
        if isinstance(batch.get("labels"), Tensor):
            _require_targets(_count_targets(batch, count_examples(batch))[:, None] > 0)
        is_one, has_rows = count_examples(batch) == 1, not _odd_rows(batch)
        is_known = in_lockstep or _is_transformers_own(unwrap(self.model))
        parts = islice(split_examples(batch), 1 if is_known else None) if has_rows else iter([batch])
        compared = _compared(self.model, next(parts))
        first, forms = compared.theirs, compared.agreeing
        for part in parts:
            forms = forms & _compared(self.model, part).agreeing
        self.checks.form = min(forms) if len(forms) == 1 else _OWN
        if self.is_own and not has_rows:
            known = ", ".join(f"{loss:.5g} ({form})" for form, loss in compared.known.items())
            raise MeasurementError(
                f"{_name(self.model)} returns the loss {first:.5g} for the first batch, which the library computes as "
                f"{known or 'nothing it knows'}. The model's own can be measured one example at a time, but of the "
                f"{count_examples(batch)} examples the batch has {_odd_rows(batch)} rows. Give batches of one example, or "
                "loss_fn(model, batch) -> losses (B,)."
            )
        if self.is_own and abs(first) < 1e-6 and not is_one and not in_lockstep:
            together = _compared(self.model, batch).theirs
            _require_apart(f"{_name(self.model)} gives a batch of {count_examples(batch)} examples", together, first)
        self._expected = None if in_lockstep or not has_rows else first

    def _known_losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if labels.dim() != 2:
            return _losses_of(_logits_of(self.model(**inputs)), labels).get(self.form or "")
        targets = labels[:, 1:] if self.form == NEXT_TOKEN else labels
        _require_targets(targets != IGNORED)
        if _is_encoder_decoder(self.model) and "decoder_input_ids" not in inputs:  # made by the model, of the labels
            return _losses_of(_logits_of(self.model(**batch)), labels).get(self.form or "")
        columns = (targets != IGNORED).any(dim=0).nonzero().flatten()
        logits = _logits_at(self.model, inputs, columns, labels.shape[1])
        if logits is None or logits.dim() != 3 or logits.shape[1] != len(columns):
            return None
        return _token_losses(logits, targets[:, columns.to(targets.device)])

    def _is_expected(self, losses: Tensor) -> bool:
        if self._expected is None:
            return True
        is_exact = next(self.model.parameters()).dtype == torch.float32
        if not _is_near(losses[0].item(), self._expected, 1e-3 if is_exact else 0.02):
            return False
        self._expected = None
        return True


def per_example_losses(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None = None
) -> tuple[Tensor, Tensor]:
    """Return losses (B,) in float32, with their graph, and numbers of target tokens (B,) of a batch.

    For several batches make one `Objective`, which compares with the model's own loss only once.

    Args:
        model: with or without adapters.
        batch: the model's inputs, and `labels` of shape (B, T) or (B,).
        loss_fn: replaces the model's own objective; `loss_fn(model, batch)` → (B,).

    Raises:
        MeasurementError: without targets, or if the model returns no loss.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> per_example_losses(tiny_llama(), toy_batches()[0])[0].shape
        torch.Size([4])
    """
    return Objective(model, loss_fn).losses(batch)


class _Comparison(NamedTuple):
    theirs: float  # the loss that the model returns
    known: dict[str, float]  # what it would be by each form that fits the output
    agreeing: set[str]


def _compared(model: nn.Module, batch: Mapping[str, Any]) -> _Comparison:
    with torch.no_grad():
        is_checkpointed = any(vars(m).get("gradient_checkpointing") is True and m.training for m in model.modules())
        output = _run(model, batch, caches=not is_checkpointed)
        loss, labels = _loss_of(model, output, batch), batch.get("labels")
        theirs = float(loss)
        # a part of its own, such as a load-balancing loss, may be small beside the rest
        has_more = not isinstance(labels, Tensor) or getattr(output, "aux_loss", None) is not None
        forms = {} if has_more else _losses_of(_logits_of(output), cast(Tensor, labels))
        known = {form: float((losses * counts).sum() / counts.sum()) for form, (losses, counts) in forms.items()}
    tolerance = 1e-4 if loss.dtype == torch.float32 else 2e-2
    agreeing = {form for form, mine in known.items() if abs(mine - theirs) <= tolerance * abs(theirs) + 1e-5}
    return _Comparison(theirs, known, agreeing)


def check_examples_are_apart(model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction) -> None:
    """Raise MeasurementError if the first example's loss changes when it is alone.

    Args:
        model: with or without adapters.
        batch: every value has a row for each example.
        loss_fn: as for `per_example_losses`.
    """
    alone = {key: value[:1] if isinstance(value, Tensor | list | tuple) else value for key, value in batch.items()}
    with torch.no_grad():
        [first, *others], [only] = (per_example_losses(model, rows, loss_fn)[0].tolist() for rows in (batch, alone))
    if others:
        _require_apart(f"loss_fn gives the first example of a batch of {1 + len(others)}", first, only)


def _require_apart(subject: str, together: float, alone: float) -> None:
    if not _is_near(together, alone):
        raise MeasurementError(
            f"{subject} the loss {together:.4g}, and {alone + 0:.4g} by itself: its losses depend on the other rows, as a "
            "contrastive loss does. That can only be measured for a whole batch at once, which experts, include='all' and "
            "layers whose rows are not the examples rule out. Use include='adaptable' where it is not in use, or a loss in "
            "which examples stand alone."
        )


def _is_near(loss: float, other: float, tolerance: float = 0.02) -> bool:
    return abs(loss - other) <= tolerance * abs(loss) + 1e-3  # room for half precision


def _model_loss(model: nn.Module, example: Mapping[str, Any], caches: bool) -> tuple[Tensor, Tensor]:
    counts = _count_targets(example, 1)
    _require_targets(counts[:, None] > 0)
    loss = _loss_of(model, _run(model, example, caches), example)
    _require_graph(loss, _name(model))
    return loss.float().reshape(1), counts


def _run(model: nn.Module, batch: Mapping[str, Any], caches: bool) -> Any:
    """Call a model. A cache is of no use, and a checkpointed layer that runs again would add to it once more."""
    has_cache = "use_cache" in inspect.signature(unwrap(model).forward).parameters
    try:
        return model(**{"use_cache": False} | dict(batch) if has_cache and not caches else batch)
    except (BlueprintError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if has_cache and caches and "use_cache" not in batch:  # layers that are shared cannot keep one
            return _run(model, batch, caches=False)
        raise _failed(model, batch, error) from error


def _failed(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> MeasurementError:
    shapes = ", ".join(f"{key} {shape_str(value.shape)}" for key, value in batch.items() if isinstance(value, Tensor))
    return MeasurementError(
        f"{_name(model)} failed on {shapes}: {first_line(error)}. Give what the model takes, or, if it computes no loss, "
        "loss_fn(model, batch) -> losses (B,)."
    )


def _loss_of(model: nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss in a model's output: an object with a loss, a mapping, or a tuple that begins with it."""
    loss = _part_of(output, "loss")
    if loss is None and not hasattr(output, "loss") and not isinstance(output, Mapping):
        [loss, *_] = [*_tensors_of(output), None]
        loss = loss if isinstance(loss, Tensor) and loss.dim() == 0 else None
    if loss is None:
        raise MeasurementError(
            f"The batch has {sorted(batch)}{'' if 'labels' in batch else ' and no labels'}, and {_name(model)} returned no "
            "loss for it. Add labels (-100 where there is no target), or give loss_fn(model, batch) -> losses (B,)."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise MeasurementError(
            f"{_name(model)} must return one number as its loss, got {found}. Give loss_fn(model, batch) -> losses (B,)."
        )
    return loss


def _logits_of(output: Any) -> Tensor | None:
    logits = _part_of(output, "logits")
    if logits is None:
        return next((tensor for tensor in _tensors_of(output) if tensor.dim() > 1), None)
    return logits if isinstance(logits, Tensor) else None


def _part_of(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output that is a tensor or a tuple."""
    parts = output if isinstance(output, list | tuple) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _require_graph(losses: Tensor, source: str) -> None:
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise MeasurementError(
            f"{source} returned losses without a graph: they were detached, computed under no_grad, or depend on no "
            "submodule that is measured. Return them with their graph."
        )


def _name(model: nn.Module) -> str:
    return class_of(unwrap(model)).__name__


def answer_positions(batch: Mapping[str, Any]) -> Tensor | None:
    """Mark every example's positions from the one that predicts its first target on, (examples, tokens).

    Positions before are prompt: with activated LoRA, adapters leave them out. None if labels are not by token.

    Example:
        >>> answer_positions({"labels": torch.tensor([[-100, -100, 5, -100, 6]])})
        tensor([[False,  True,  True,  True,  True]])
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    predicting = F.pad(labels[:, 1:] != IGNORED, (0, 1))
    return predicting.cummax(dim=1).values


def count_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of examples of a batch: rows of its labels, its tokens or its first tensor.

    Example:
        >>> count_examples({"labels": torch.zeros(3, 7)})
        3
    """
    named = [batch[key] for key in ("labels", "input_ids") if isinstance(batch.get(key), Tensor)]
    rows = [len(value) for value in (*named, *batch.values()) if isinstance(value, Tensor) and value.dim()]
    if 0 in rows[:1]:
        raise MeasurementError(f"A batch has no example: its first tensor has no rows, got {sorted(map(str, batch))}.")
    if not rows:
        raise MeasurementError(
            f"A batch needs a tensor with a row for each example, got {sorted(map(str, batch)) or 'nothing'}. Give "
            "tensors by name, not nested."
        )
    return rows[0]


def is_interleaved(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether images or sounds stand among a text's tokens, so that rows do not show whose they are."""
    values = [v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("labels", "attention_mask")]
    extra = [value for value in values if value.is_floating_point() and value.dim() > 1]
    settings = vars(getattr(unwrap(model), "config", None) or model)
    has_places = any(re.match(r"(image|video|audio|vision)\w*_token", key) for key in settings)
    return "input_ids" in batch and any(has_places or len(value) != count_examples(batch) for value in extra)


def start_of(batch: Mapping[str, Any], tokens: int = 16) -> Mapping[str, Any]:
    """Return the first tokens of a batch of text; one with other inputs, such as images, whole."""
    if any(isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 for v in batch.values()):
        return batch
    return {k: v[:, :tokens] if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in batch.items()}


def split_examples(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Split a batch into batches of one example.

    Raises:
        MeasurementError: if a value does not have one row for each example.

    Example:
        >>> [len(part["labels"]) for part in split_examples({"labels": torch.zeros(3, 7)})]
        [1, 1, 1]
    """
    examples = count_examples(batch)
    if examples == 1:
        yield batch
        return
    if odd := _odd_rows(batch):
        raise MeasurementError(
            f"A batch of {examples} examples has {odd} rows, so it is unknown which belong to which example. Give batches "
            "of one example."
        )
    for i in range(examples):
        yield {k: value[i : i + 1] if isinstance(value, _WITH_ROWS) else value for k, value in batch.items()}


def _odd_rows(batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of rows, by key, that are not the number of examples, of a batch of several."""
    examples = count_examples(batch)
    sizes = {key: _rows(value) for key, value in batch.items() if isinstance(value, _WITH_ROWS)}
    return {key: size for key, size in sizes.items() if size != examples and examples > 1}


def _rows(value: Any) -> int:
    return 0 if isinstance(value, Tensor) and not value.dim() else len(value)


def _losses_of(logits: Tensor | None, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return losses (B,) and numbers of targets (B,) by every form that logits and labels fit."""
    if logits is None:
        return {}
    if labels.dim() == 1 and logits.dim() == 2 and len(labels) == len(logits):
        is_number = logits.shape[1] == 1 or labels.is_floating_point()
        ones = torch.ones(len(labels), dtype=torch.long, device=logits.device)
        return {_NUMBERS if is_number else _CLASSES: (_sequence_losses(logits, labels), ones)}
    if labels.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != labels.shape or labels.is_floating_point():
        return {}
    if labels.max() >= logits.shape[2]:
        return {}
    pairs = {NEXT_TOKEN: (logits[:, :-1], labels[:, 1:]), _SAME: (logits, labels)}
    return {form: _token_losses(*pair) for form, pair in pairs.items() if (pair[1] != IGNORED).any(dim=1).all()}


def _logits_at(model: nn.Module, inputs: dict[str, Any], columns: Tensor, length: int) -> Tensor | None:
    """Return logits (B, columns, V), or None if the model returns none. The head is a large part of a small model, so it runs on these positions only.

    Uses `logits_to_keep` if the model has it, otherwise a hook on the head. Without a known head, cut afterwards.
    """
    base: Any = unwrap(model)
    known = inspect.signature(base.forward).parameters
    inputs = inputs | ({"use_cache": False} if "use_cache" in known else {})
    if "logits_to_keep" in known:
        return _logits_of(model(**inputs, logits_to_keep=columns))

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[1] == length:
            return args[0][:, columns], *args[1:]
        return None

    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    hook = head.register_forward_pre_hook(cut) if head is not None else None
    try:
        logits = _logits_of(model(**inputs))
    finally:
        if hook is not None:
            hook.remove()
    if logits is not None and logits.dim() == 3 and logits.shape[1] == length:
        return logits[:, columns.to(logits.device)]
    return logits


def _token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of every row over its targets. (B, T, V), (B, T) → (B,), (B,)."""
    targets = targets.to(logits.device)
    counts = _require_targets(targets != IGNORED)
    token_losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return token_losses.view_as(targets).sum(dim=1) / counts, counts


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of every row, 0 without a target, in the memory of the logits and their gradient.

    `F.cross_entropy` also keeps the log-softmax, and a float32 copy of half-precision logits. With a vocabulary of
    50,000 these dominate the peak memory of a small model. Here a few rows are computed at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V), (N,) → (N,) float32."""
        normalizers = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(_rows_at_a_time(logits))])
        ctx.save_for_backward(logits, targets, normalizers)
        chosen = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].float()
        return torch.where(targets == IGNORED, 0.0, normalizers - chosen)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Return the softmax, minus one at the target, times the row's weight."""
        logits, targets, normalizers = ctx.saved_tensors
        weights = torch.where(targets == IGNORED, 0.0, grad_outputs[0])
        gradient = torch.empty_like(logits)
        for i in range(0, len(logits), step := _rows_at_a_time(logits)):
            rows = slice(i, i + step)
            part = (logits[rows].float() - normalizers[rows, None]).exp_()
            part.scatter_add_(1, targets[rows].clamp_min(0)[:, None], part.new_full((len(part), 1), -1.0))
            gradient[rows] = part.mul_(weights[rows, None])
        return gradient, None


def _rows_at_a_time(logits: Tensor) -> int:
    return max(1, NUMBERS_AT_A_TIME // logits.shape[1])


def _sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of (B, C) logits, or squared errors for one output or floating-point labels."""
    labels = labels.to(logits.device)
    if logits.shape[1] == 1 or labels.is_floating_point():
        return F.mse_loss(logits.squeeze(1).float(), labels.float(), reduction="none")
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _require_targets(is_target: Tensor) -> Tensor:
    counts = is_target.sum(dim=1)
    without = (counts == 0).nonzero().flatten().tolist()
    if without:
        raise MeasurementError(
            f"Examples {without} of a batch of {len(counts)} have no target token: all their labels are -100, perhaps "
            "because the prompt fills the maximum length. Drop them, or raise the length."
        )
    return counts


def _count_targets(batch: Mapping[str, Any], examples: int) -> Tensor:
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2 and len(labels) == examples:
        return (labels != IGNORED).sum(dim=1)
    return torch.ones(examples, dtype=torch.long)


def _is_transformers_own(base: nn.Module) -> bool:
    """Return whether a model's forward is transformers' own, apart from accelerate's wrapper that fetches weights."""
    is_replaced = "forward" in vars(base) and "_hf_hook" not in vars(base)
    return class_of(base).__module__.startswith("transformers.") and not is_replaced


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(unwrap(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
