"""The measurement: every example's gradient norm in every submodule, from one forward and one backward pass.

Each submodule's output passes through an identity that keeps the input and, in the backward pass, computes the
statistics and lets both go. No weight needs a gradient, so frozen and 4-bit weights are measured alike, and the weight
gradients' share of the backward pass is saved. Knows nothing of files or of what the numbers are for.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import gradients
from .entry import Submodule, some
from .errors import MeasurementError, MismatchError
from .losses import LossFunction, per_example_losses
from .submodules import find_submodules, linear_modules, unwrap
from .taps import prepared, tapped


Batch = Mapping[str, Tensor]

_FP16_LOSS_SCALE = 2.0**14


@dataclass(frozen=True, eq=False)
class Influence:
    """What one pass over some examples measured. All tensors are on the CPU.

    Args:
        submodules: the rows, without statistics.
        norms: (submodules, examples) float32; the L2 norm of the gradient of one example's mean token loss in one
            submodule. The paper's cross-influence tensor (eq. 32) at the level of submodules.
        losses: (examples,) float32; mean over an example's own target tokens, in nats.
        target_tokens: (examples,) int64.
        sketches: for every submodule the mean over examples of its gradient times Ω, (d_out, s) float32; the mean
            gradient itself where d_in ≤ 2·sketch_size.
        sketch_size: s; None where the mean gradients are kept whole.
        seed: of Ω.
        tokens: input positions read, padding included.
        unmeasured: (name, reason) of every linear submodule that is not among the rows.
        data_digest: `sha256:…` of the token ids and labels, in order.
    """

    submodules: tuple[Submodule, ...]
    norms: Tensor
    losses: Tensor
    target_tokens: Tensor
    sketches: tuple[Tensor, ...]
    sketch_size: int | None
    seed: int
    tokens: int
    unmeasured: tuple[tuple[str, str], ...]
    data_digest: str

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.norms.shape[1]

    @property
    def row_norms(self) -> tuple[Tensor, ...]:
        """For every submodule the norms of the mean gradient's rows, (d_out,)."""
        return tuple(torch.linalg.vector_norm(sketch, dim=1) for sketch in self.sketches)

    @property
    def mean_gradient_norms(self) -> Tensor:
        """(submodules,) norm of the mean gradient over these examples; an estimate where it is sketched."""
        return torch.stack([torch.linalg.vector_norm(sketch) for sketch in self.sketches])

    @property
    def signal_norms(self) -> Tensor:
        """(submodules,) norm of the expected gradient, without the bias that the noise of B examples adds.

        ‖E g‖² ≈ (B·‖ḡ‖² − mean‖g_b‖²)/(B − 1), 0 where that is negative; NaN for a single example, which cannot tell
        signal from noise.
        """
        return self._signal_squares().clamp_min(0).sqrt()

    @property
    def noise_scales(self) -> Tensor:
        """(submodules,) tr(Σ)/‖E g‖² in examples (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

        About the batch size from which on a larger batch stops helping. Infinite where no signal was seen.
        """
        n = self.examples
        noise = (self.norms.square().mean(dim=1) - self.mean_gradient_norms.square()) * n / (n - 1 or float("nan"))
        return noise.clamp_min(0) / self._signal_squares().clamp_min(0)

    @property
    def example_norms(self) -> Tensor:
        """(examples,) J(z), the gradient norm over all submodules together (eq. 27)."""
        return torch.linalg.vector_norm(self.norms, dim=0)

    @staticmethod
    def merge(parts: Sequence["Influence"]) -> "Influence":
        """Join measurements of different examples on one model; nothing is lost, since sketches add.

        Raises:
            MismatchError: if submodules, sketch size or seed differ.
        """
        first = parts[0]
        for part in parts[1:]:
            names, others = [s.name for s in first.submodules], [s.name for s in part.submodules]
            if names != others or (first.sketch_size, first.seed) != (part.sketch_size, part.seed):
                raise MismatchError(
                    f"These measurements do not merge: {len(names)} submodules, sketch size {first.sketch_size}, seed "
                    f"{first.seed}, and {len(others)} submodules, sketch size {part.sketch_size}, seed {part.seed}. "
                    "Measure with the same model and settings."
                )
        total = sum(part.examples for part in parts)
        digest = hashlib.sha256("".join(part.data_digest for part in parts).encode()).hexdigest()
        return replace(
            first,
            norms=torch.cat([part.norms for part in parts], dim=1),
            losses=torch.cat([part.losses for part in parts]),
            target_tokens=torch.cat([part.target_tokens for part in parts]),
            sketches=tuple(
                torch.stack([part.sketches[i] * (part.examples / total) for part in parts]).sum(dim=0)
                for i in range(len(first.submodules))
            ),
            tokens=sum(part.tokens for part in parts),
            data_digest=f"sha256:{digest}" if len(parts) > 1 else first.data_digest,
        )

    def _signal_squares(self) -> Tensor:
        n = self.examples
        squares = n * self.mean_gradient_norms.square() - self.norms.square().mean(dim=1)
        return squares / (n - 1 or float("nan"))


def measure_influence(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    max_examples: int | None = None,
    loss_fn: LossFunction | None = None,
    sketch_size: int | None = 64,
    seed: int = 0,
    progress: bool = True,
) -> Influence:
    """Measure every example's gradient norm in every linear submodule, in one pass.

    The loss of an example is the mean over its own target tokens, so an example weighs the same however long it is;
    examples do not mix. Packed rows count as one example each. The model's weights are not touched, its training flags
    and `requires_grad` are restored, dropout is off, and gradient checkpointing is used where it was enabled.

    Args:
        model: a transformers model, or a `PeftModel` around one; frozen, trainable or quantised with bitsandbytes, in
            fp32, bf16 or fp16.
        batches: mappings as the model takes them, with `labels` (-100 where there is no target); a
            `DataLoader` will do.
        max_examples: stop after so many.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        sketch_size: columns of the sketch of the mean gradient; its relative error is at most √(1/(2·size)). None
            keeps the mean gradients whole, exact, in as much memory as the weights take in fp32.
        seed: of the sketch.
        progress: show a progress bar.

    Returns:
        Norms (submodules, examples) with losses and sketches.

    Raises:
        MeasurementError: without data, targets or measurable submodules, or if a norm is not finite.
    """
    if max_examples is not None and max_examples < 1:
        raise MeasurementError(f"max_examples={max_examples} leaves nothing to measure: give at least 1, or None.")
    submodules = find_submodules(model)
    modules = dict(linear_modules(model))
    if not submodules:
        raise MeasurementError(
            f"{type(unwrap(model)).__name__} has no linear submodules to measure; give a transformers model."
        )
    recorder = _Recorder(submodules, sketch_size, seed)
    losses, target_tokens, norms = [], [], []
    tokens, digest = 0, hashlib.sha256()
    with ExitStack() as stack:
        stack.enter_context(prepared(model))
        for index, submodule in enumerate(submodules):
            stack.enter_context(tapped(modules[submodule.name], index, recorder.record))
        bar = stack.enter_context(tqdm(total=max_examples, unit="example", desc="Measuring", disable=not progress))
        for batch in _take(batches, max_examples, next(model.parameters()).device):
            batch_norms, batch_losses, batch_tokens = _measure_batch(model, batch, recorder, loss_fn)
            norms.append(batch_norms)
            losses.append(batch_losses)
            target_tokens.append(batch_tokens)
            tokens += next(iter(batch.values())).shape[:2].numel()
            for key in sorted(batch.keys() & {"input_ids", "labels"}):
                digest.update(batch[key].cpu().numpy().tobytes())
            bar.update(len(batch_losses))
    if not norms:
        raise MeasurementError("There is nothing to measure: the batches are empty. Give at least one example.")

    measured = [i for i in range(len(submodules)) if i not in recorder.unmeasured]
    if not measured:
        reasons = sorted(set(recorder.unmeasured.values()))
        raise MeasurementError(f"None of the {len(submodules)} linear submodules could be measured: {reasons}.")
    matrix = torch.cat(norms, dim=1)[measured]
    kept = tuple(submodules[i] for i in measured)
    broken = [s.name for s, row in zip(kept, matrix, strict=True) if not torch.isfinite(row).all()]
    if broken:
        raise MeasurementError(
            f"The gradient of {some(broken)} is infinite or NaN for some example. Look for NaN in the weights or the "
            "data; with float16 weights, load the model in bfloat16 or float32 instead."
        )
    others = [name for name in modules if name not in {s.name for s in submodules}]
    return Influence(
        submodules=kept,
        norms=matrix,
        losses=torch.cat(losses),
        target_tokens=torch.cat(target_tokens),
        sketches=tuple(recorder.sketch(i) / matrix.shape[1] for i in measured),
        sketch_size=sketch_size,
        seed=seed,
        tokens=tokens,
        unmeasured=tuple((submodules[i].name, reason) for i, reason in sorted(recorder.unmeasured.items()))
        + tuple((name, "an output or classification head") for name in others),
        data_digest=f"sha256:{digest.hexdigest()}",
    )


class _Recorder:
    """Holds the statistics of a pass: norms of the present batch, sketches of all."""

    def __init__(self, submodules: Sequence[Submodule], sketch_size: int | None, seed: int):
        self.submodules = submodules
        self.sketch_size = sketch_size
        self.seed = seed
        self.unmeasured: dict[int, str] = {}
        self.repeated: set[int] = set()  # submodules that are called several times in a pass: their gradients add up
        self._sketches: dict[int, Tensor] = {}
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor | None] = {}
        self.begin(0, 1.0)

    def begin(self, examples: int, loss_scale: float) -> None:
        """Forget the batch at hand, if any, and expect one of so many examples."""
        self.examples, self.loss_scale = examples, loss_scale
        self._norms: dict[int, Tensor] = {}
        self._batch_sketches: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._shared = _SharedInput(torch.empty(0))

    def record(self, index: int, inputs: Tensor, output_gradient: Tensor) -> None:
        """Statistics of one call of one submodule: X (…, d_in) and dY (…, d_out)."""
        d_out, d_in = self.submodules[index].shape or (0, 0)
        dtype = gradients.statistics_dtype(output_gradient)
        if not self._shared.holds(inputs):
            self._shared = _SharedInput(inputs)
        shared = self._shared
        if shared.x is None:
            rows = gradients.by_example(inputs, self.examples)
            shared.x = None if rows is None else rows.to(dtype)
        dy = gradients.by_example(output_gradient, self.examples)
        if shared.x is None or dy is None:
            self.unmeasured[index] = f"its {tuple(inputs.shape)} input does not say which example a row belongs to"
            return
        dy = (dy.float() / self.loss_scale).to(dtype) if self.loss_scale != 1 else dy.to(dtype)
        x = shared.x

        if index in self.repeated:
            gradient = gradients.per_example_gradients(x, dy).float()
            self._gradients[index] = self._gradients[index] + gradient if index in self._gradients else gradient
        elif index in self._norms:
            self.repeated.add(index)  # the batch is measured again, now adding this submodule's gradients up
        elif gradients.prefers_gram(x.shape[1], d_in, d_out, gram_is_known=shared.gram is not None):
            if shared.gram is None:
                shared.gram = gradients.gram(x)
            self._norms[index] = gradients.gram_norms(shared.gram, dy)
        else:
            self._norms[index] = gradients.materialised_norms(x, dy)

        if shared.sketch is None:
            matrix = self._matrix(d_in, x)
            shared.sketch = x if matrix is None else x @ matrix
        sketch = gradients.sketched_gradient(shared.sketch, dy)
        self._batch_sketches[index] = self._batch_sketches[index] + sketch if index in self._batch_sketches else sketch

    def norms(self) -> Tensor:
        """(submodules, examples) of the batch, after the backward pass; zeros for what no gradient reached."""
        for index, gradient in self._gradients.items():
            self._norms[index] = torch.linalg.vector_norm(gradient, dim=(1, 2))
        zeros = torch.zeros(self.examples)
        return torch.stack([self._norms[i].cpu() if i in self._norms else zeros for i in range(len(self.submodules))])

    def commit(self) -> None:
        """Keep the batch: add its sketches to those of the batches before."""
        for index, sketch in self._batch_sketches.items():
            self._sketches[index] = self._sketches[index] + sketch if index in self._sketches else sketch
        for index in range(len(self.submodules)):
            if index not in self._norms:
                self.unmeasured.setdefault(index, "no gradient reached it: the loss does not depend on its output")

    def sketch(self, index: int) -> Tensor:
        """(d_out, s), the sum over all examples."""
        return self._sketches[index].cpu()

    def _matrix(self, d_in: int, like: Tensor) -> Tensor | None:
        key = (d_in, like.device, like.dtype)
        if key not in self._matrices:
            matrix = gradients.sketch_matrix(d_in, self.sketch_size, self.seed)
            self._matrices[key] = None if matrix is None else matrix.to(like)
        return self._matrices[key]


class _SharedInput:
    """What layers with the same input (q, k and v; gate and up) compute once: X, XXᵀ and XΩ.

    The tensor itself is held, so its address cannot be taken by another.
    """

    def __init__(self, inputs: Tensor):
        self.inputs = inputs
        self.x: Tensor | None = None
        self.gram: Tensor | None = None
        self.sketch: Tensor | None = None

    def holds(self, inputs: Tensor) -> bool:
        """Whether `inputs` is the very same memory."""
        mine = self.inputs
        return (
            inputs.data_ptr() == mine.data_ptr()
            and inputs.shape == mine.shape
            and inputs.stride() == mine.stride()
            and inputs.dtype == mine.dtype
            and inputs.device == mine.device
        )


def _measure_batch(
    model: nn.Module, batch: Batch, recorder: _Recorder, loss_fn: LossFunction | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms, losses and target tokens from one forward and backward pass.

    The pass is made again if a submodule turns out to be called twice in it, or float16 overflows.
    """
    scale = _FP16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    while True:
        repeated = set(recorder.repeated)
        losses, tokens = per_example_losses(model, batch, loss_fn)
        recorder.begin(len(losses), scale)
        (losses.sum() * scale).backward()
        if recorder.repeated != repeated:
            continue
        norms = recorder.norms()
        if scale > 1 and not torch.isfinite(norms).all():
            scale /= 4
            continue
        recorder.commit()
        return norms, losses.detach().float().cpu(), tokens.cpu()


def _take(batches: Iterable[Batch], max_examples: int | None, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches on the model's device, cut off after `max_examples`."""
    left = max_examples
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise MeasurementError(
                f"A batch is a mapping with labels, not a {type(batch).__name__}. For a single batch, give [batch]."
            )
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        yield {key: value[:left].to(device) for key, value in tensors.items()}
        if left is not None:
            left -= min(left, len(next(iter(tensors.values()))))
            if left == 0:
                return
