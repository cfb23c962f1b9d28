"""What arms choose from, each part made when first asked for: data, model, costs, blueprints, and what weights alone say.

Knows models and measurements, and keeps what is dear in files. Knows nothing of what arms make of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.helpers import KappaTuneSelector
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint._files import write_atomically
from peft_blueprint.blueprint import ADAPTABLE, Submodule
from peft_blueprint.data import Row, make_batches, select_examples, train_briefly, with_adapters
from peft_blueprint.measure import empty_model, load_model, load_tokenizer, measure_influence
from peft_blueprint.place import CostModel, CoverGain, Structure, Workload
from recipes import smollm2

from .data import Data, in_batches, load, rows_of, steps_of, tokens_of
from .study import TASK, Study, digest


MEASURING = 1.04  # of a forward and backward pass of the frozen model, by RESULTS.md
SOURCES = ("gsm8k", "pubmedqa", "demo")
DIRECTIONS = 16  # kept of each mean gradient


@dataclass(frozen=True)
class Charge:
    """What was spent before training.

    Args:
        flops: of it.
        steps: its predicted time, in steps of all-linear LoRA.
    """

    flops: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.flops + other.flops, self.steps + other.steps)


class Ground:
    """A study's data and model.

    Args:
        study: its sizes.
        folder: with the data.
        cache: folder for what is measured.
    """

    def __init__(self, study: Study, folder: Path, cache: Path):
        self.study = study
        self.folder = folder
        self.cache = cache
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cached_property
    def model_path(self) -> str:
        """Of the model."""
        return str(smollm2.prepare()) if self.study.model is None else self.study.model

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return load_tokenizer(self.model_path)

    @functools.cached_property
    def data(self) -> Data:
        """Rows."""
        return load(self.study, self.folder, self.tokenizer)

    @functools.cached_property
    def structure(self) -> Structure:
        """Of the model, without its weights."""
        return Structure.of(empty_model(self.model_path))

    @functools.cached_property
    def costs(self) -> CostModel:
        """Of a step of this study."""
        load = Workload(
            batch_size=self.study.batch,
            length=self.study.length,
            dtype=self.study.dtype,
            rank=self.study.rank,
            attention=self.study.attention,
            device=self.device,
        )
        return CostModel(self.structure, load)

    @functools.cached_property
    def whole(self) -> int:
        """Parameters of LoRA on every linear layer."""
        return self.costs.all_linear().trainable

    @functools.cached_property
    def positions(self) -> float:
        """Of a training step on average, padding included: fewer than its examples at their greatest length."""
        steps = self.study.steps
        return tokens_of(steps_of(self.data.train, self.study.batch, steps, 0)) / steps

    @property
    def of_step(self) -> float:
        """Predicted time of a step of all-linear LoRA, as `CostModel.step_time` counts it."""
        return self.costs.step_time(self.costs.all_linear()) * self.positions

    def model(self, dtype: str | None = None, quantized: bool = False) -> Any:
        """A fresh copy, frozen, in evaluation mode."""
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantized else None
        model, _ = load_model(self.model_path, dtype or self.study.dtype, settings)
        model.set_attn_implementation(self.study.attention)
        return model.requires_grad_(False).eval()

    def batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Tensors on the device."""
        found = make_batches(rows, self.study.batch, self.data.pad)
        return [{key: value.to(self.device) for key, value in batch.items()} for batch in found]

    def entries(self, blueprint: str = TASK) -> tuple[Submodule, ...]:
        """A blueprint's, of what can be adapted."""
        return tuple(entry for entry in self.blueprint(blueprint) if entry.form in ADAPTABLE)

    @functools.cache  # noqa: B019  one ground lives as long as the process
    def blueprint(self, name: str = TASK) -> Blueprint:
        """Measured once, kept in a file; `name` as `Entry.blueprint` says it."""
        source, rows = self.measured(name)
        path = self._path("blueprint", [source, rows], ".json")
        if not path.exists():
            batches = make_batches(rows, self.study.batch, self.data.pad)
            settings: dict[str, Any] = {"model_id": "contest", "data": name, "progress": False}
            if source.startswith("after"):
                with with_adapters(self.model(), None, seed=0) as adapted:
                    train_briefly(
                        adapted,
                        self._warming(source),
                        steps=int(source.split()[1]),
                        batch_size=self.study.batch,
                        pad_token_id=self.data.pad,
                    )
                    found = generate_blueprint(adapted, batches, **settings)
            else:
                found = generate_blueprint(self.model(quantized=source == "nf4"), batches, **settings)
            found.save(path)
        return Blueprint.from_pretrained(path)

    def measured(self, name: str) -> tuple[str, list[Row]]:
        """What a blueprint's name stands for: how or on what it is measured, and the examples.

        Raises:
            SystemExit: for a name that stands for nothing.
        """
        source, _, number = (f"{TASK} x {self.study.measured}" if name == TASK else name).rpartition(" x ")
        if not number.isdigit() or not (source in (TASK, "nf4", *SOURCES) or source.startswith("after ")):
            raise SystemExit(
                f"{name!r} is no blueprint: write 'task x 8', 'pubmedqa x 64', 'nf4 x 64', 'after 5 x 64'."
            )
        if source in SOURCES and source != self.study.data:
            rows = rows_of(source, self.folder, "train", self.tokenizer, self.study.length, seed=0)
        else:
            rows = self.data.measured
        return (TASK if source in SOURCES else source), rows[: int(number)]

    @functools.cached_property
    def cover(self) -> CoverGain:
        """What the planner predicts of placements, by the study's own blueprint."""
        return CoverGain(self.entries(), [entry.adam_gain or 0.0 for entry in self.entries()])

    def charge(self, name: str) -> Charge:
        """What measuring a blueprint costs, and training before it where there is some."""
        source, rows = self.measured(name)
        spent = self.passes(rows, forward=MEASURING, backward=MEASURING)
        if source.startswith("after"):
            steps = int(source.split()[1])
            spent += Charge(self.costs.all_linear().flops * steps * self.positions, float(steps))
        return spent

    def passes(self, rows: Sequence[Row], forward: float, backward: float = 0.0, weights: float = 0.0) -> Charge:
        """So many passes of the frozen model over rows, and of its weights' gradients.

        Args:
            forward: passes.
            backward: of activations alone.
            weights: gradients of all linear weights, each as dear as a forward pass.
        """
        floor = self.costs.floor()
        flops = forward * floor.forward + backward * floor.backward + weights * floor.forward
        tokens = tokens_of(in_batches(rows, self.study.batch))
        share = flops / (floor.forward + floor.backward)
        return Charge(flops * tokens, share * self.costs.step_time(floor) * tokens / self.of_step)

    @functools.cached_property
    def directions(self) -> dict[str, Tensor]:
        """For every submodule the leading right singular vectors of its mean gradient, (at most `DIRECTIONS`, d_in)."""
        path = self._path("directions", [self.data.measured, DIRECTIONS], ".safetensors")
        if not path.exists():
            batches = make_batches(self.data.measured, self.study.batch, self.data.pad)
            found = measure_influence(self.model(), batches, sketch_size=None, projection_size=0, progress=False)
            vectors = {
                submodule.name: torch.linalg.svd(gradient, full_matrices=False).Vh[:DIRECTIONS].contiguous()
                for submodule, gradient in zip(found.submodules, found.sketches, strict=True)
            }
            beside = path.with_suffix(".part")
            save_file(vectors, beside)
            beside.replace(path)
        return load_file(path)

    @functools.cached_property
    def kappa(self) -> dict[str, float]:
        """By submodule its place in PEFT's KappaTune, the best first, as a score: minus the place."""

        def score() -> dict[str, float]:
            order = KappaTuneSelector(self.model("float32"), show_progress=False).get_best_targets()
            return {name: -float(i) for i, name in enumerate(order)}

        return self._of_weights("kappa", score)

    @functools.cached_property
    def spectrum(self) -> dict[str, float]:
        """Every weight's ratio of signal to noise, see `signal_to_noise`."""

        def score() -> dict[str, float]:
            weights = dict(self.model("float32").named_modules())
            return {entry.name: signal_to_noise(weights[entry.name].weight) for entry in self.structure_entries}

        return self._of_weights("spectrum", score)

    @functools.cached_property
    def structure_entries(self) -> tuple[Submodule, ...]:
        """All that can be adapted, without a measurement."""
        from peft_blueprint.measure import find_submodules

        return tuple(find_submodules(empty_model(self.model_path)))

    @property
    def of_weights(self) -> Charge:
        """What all singular values cost: about 4·m·n·min(m, n) operations each."""
        flops = sum(4.0 * a * b * min(a, b) for a, b in (e.shape[-2:] for e in self.structure_entries if e.shape))
        return Charge(flops, flops / self.of_step)

    @functools.cache  # noqa: B019
    def selected(self, method: str, share: float) -> tuple[tuple[int, ...], Charge]:
        """Which training examples a method keeps, and what choosing them cost."""
        path = self._path("selected", [method, share, self.data.train, self.data.measured], ".json")
        if not path.exists():
            found = select_examples(
                None if method == "random" else self.model(),
                self.data.train,
                fraction=share,
                method=method,  # type: ignore[arg-type]
                target=self.data.measured,
                deduplicate=False,
                batch_size=self.study.batch,
                max_length=self.study.length,
                progress=False,
            )
            record = {"indices": list(found.indices), "flops": found.report["cost"]["flops"]}
            write_atomically(path, json.dumps(record))
        known = json.loads(path.read_text())
        floor = self.costs.floor()
        tokens = known["flops"] / floor.flops
        return tuple(known["indices"]), Charge(known["flops"], tokens * self.costs.step_time(floor) / self.of_step)

    def _warming(self, source: str) -> list[Row]:
        return self.data.train[: int(source.split()[1]) * self.study.batch]

    def _of_weights(self, what: str, score: Callable[[], dict[str, float]]) -> dict[str, float]:
        path = self._path(what, [], ".json")
        if not path.exists():
            write_atomically(path, json.dumps(score()))
        return dict(json.loads(path.read_text()))

    def _path(self, what: str, about: Any, suffix: str) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / f"{what}-{digest([self.model_path, self.study.dtype, self.study.batch, about])}{suffix}"


def signal_to_noise(weight: Tensor) -> float:
    """Spectrum's ratio (Hartford et al. 2024, arXiv:2406.06623): summed singular values above the edge of the
    Marchenko-Pastur bulk over those below, over the largest.

    The edge is σ(1 + √β) with β the ratio of the sides, and σ the singular values' interquartile range over 1.349.
    """
    values = torch.linalg.svdvals(weight.detach().float())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    edge = sigma * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    noise = values[values <= edge].sum()
    smallest = values.max() * torch.finfo(values.dtype).eps
    return float(values[values > edge].sum() / noise.clamp_min(smallest) / values.max())
