"""Provide what a study's arms choose from, each made when first asked for: data, model, costs, blueprints, selections."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.helpers import KappaTuneSelector
from torch import Tensor
from transformers import set_seed

from peft_blueprint import Blueprint, BlueprintConfig, Placement, generate_blueprint, plan_placement, select_examples
from peft_blueprint.blueprint import ADAPTABLE, Submodule
from peft_blueprint.data import temporary_adapters, train_briefly
from peft_blueprint.measure import Row, empty_model, get_pad_token_id, load_model, load_tokenizer, make_batches
from peft_blueprint.place import CostModel, CoverGain, Structure, Workload

from .. import setup
from .plan import EQUAL, TASK, Study, digest


MEASURING = 1.04  # of a forward and backward pass of the frozen model, by docs/results/measuring.md
SOURCES = ("gsm8k", "pubmedqa", "demo")
DECISIONS = ("yes", "no", "maybe")  # PubMedQA's
OTHER = {
    "gsm8k": "pubmedqa",
    "pubmedqa": "gsm8k",
    "pubmedqa with contexts": "gsm8k",
    "demo": "gsm8k",
}  # unrelated text beside a study's own
LICENSE = Path(__file__).parents[2] / "LICENSE"


@dataclass(frozen=True)
class Data:
    """What the jobs of one seed read.

    Args:
        measured: rows for blueprints and initialisations, the same for all seeds.
        train: as many rows as one pass has.
        test: rows of the final loss.
        tested: their indices among all that could be.
        spare: training rows of the curve that nothing else uses.
        unrelated: rows by name, to measure forgetting.
        questions: prompts that end where a decision is due, with the index of the right option.
        options: the first token of each decision.
    """

    measured: list[Row]
    train: list[Row]
    test: list[Row]
    tested: tuple[int, ...]
    spare: list[Row]
    unrelated: dict[str, list[Row]]
    questions: list[tuple[list[int], int]] = field(default_factory=list)
    options: list[int] = field(default_factory=list)


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
        folder: of the data sets.
        cache: folder of measurements.
    """

    def __init__(self, study: Study, folder: Path, cache: Path):
        self.study = study
        self.folder = folder
        self.cache = cache
        self.device = setup.device()

    @functools.cached_property
    def model_path(self) -> str:
        """Folder or id of the model."""
        is_own = self.study.model in (None, "tiny")
        return setup.model_folder(self.study.model == "tiny") if is_own else str(self.study.model)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return load_tokenizer(self.model_path)

    @functools.cached_property
    def pad(self) -> int:
        """The padding token."""
        return get_pad_token_id(self.tokenizer)

    @functools.cache  # noqa: B019  one ground lives as long as the process
    def rows(self, split: setup.Split) -> list[Row]:
        """All rows of the study's length, in an order that is the same on every call."""
        study = self.study
        seed = 0 if split == "train" else 1
        return setup.read_rows(study.data, self.folder, split, self.tokenizer, study.length, seed)

    @functools.cache  # noqa: B019
    def data_of(self, seed: int) -> Data:
        """The rows of a seed: the same for all, or its own where the study resamples.

        Raises:
            SystemExit: if there are too few examples of at most the study's length.
        """
        study = self.study
        train, test = self.rows("train"), self.rows("test")
        fixed = study.measured + study.spare if study.resample else study.measured + study.examples + study.spare
        if study.resample:
            test = test + train[max(fixed, len(train) - study.test_from_train) :]
            train = train[: max(fixed, len(train) - study.test_from_train)]
        wanted = {"training": (train, fixed + study.examples * study.resample), "test": (test, study.held_out)}
        for what, (rows, number) in wanted.items():
            if len(rows) < number:
                raise SystemExit(
                    f"{study.data} has {len(rows)} {what} examples of at most {study.length} tokens, and {study.name} "
                    f"needs {number}. Raise its length, or lower its steps, pool, measured, spare or held_out."
                )
        measured, spare = train[: study.measured], train[fixed - study.spare : fixed]
        trained: Sequence[int] = range(study.measured, study.measured + study.examples)
        tested: Sequence[int] = range(study.held_out)
        if study.resample:
            draw = random.Random(seed)
            trained = draw.sample(range(fixed, len(train)), study.examples)
            tested = draw.sample(range(len(test)), study.held_out)
        tests = [test[i] for i in tested]
        return Data(
            measured=measured,
            spare=spare,
            train=[train[i] for i in trained],
            test=tests,
            tested=tuple(tested),
            unrelated=self._unrelated,
            **self._decisions(tests),
        )

    @functools.cached_property
    def _unrelated(self) -> dict[str, list[Row]]:
        study = self.study
        ids = self.tokenizer(" ".join(LICENSE.read_text().split()), add_special_tokens=False)["input_ids"]
        pieces = [ids[i : i + study.length] for i in range(0, len(ids) - 1, study.length)][: study.unrelated]
        found = {"license": [{"input_ids": part, "labels": list(part)} for part in pieces if len(part) > 1]}
        other = OTHER.get(study.data)
        if other is not None and (self.folder / setup.FILES[other]["test"]).exists():
            rows = setup.read_rows(other, self.folder, "test", self.tokenizer, study.length, seed=1)
            found[other] = rows[: study.unrelated]
        return {name: rows for name, rows in found.items() if rows}

    def _decisions(self, tests: Sequence[Row]) -> dict[str, Any]:
        """Return PubMedQA's questions, each cut before its last decision."""
        if not self.study.data.startswith("pubmedqa"):
            return {}
        options = [self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in DECISIONS]
        questions = []
        for row in tests:
            ids = row["input_ids"]
            at = next((at for at in range(len(ids) - 1, 0, -1) if ids[at] in options), None)
            if at is not None:
                questions.append((ids[:at], options.index(ids[at])))
        return {"questions": questions, "options": options}

    # ---- model and costs

    def model(self, dtype: str | None = None, quantized: bool = False) -> Any:
        """Load a fresh copy, frozen, in evaluation mode."""
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantized else None
        model, _ = load_model(self.model_path, dtype or self.study.dtype, settings)
        model.set_attn_implementation(self.study.attention)
        return model.requires_grad_(False).eval()

    def batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        """Collate rows into batches on the device."""
        return [setup.on_device(part, self.pad) for part in setup.in_batches(rows, self.study.batch)]

    @functools.cached_property
    def shell(self) -> Any:
        """The model without its weights."""
        return empty_model(self.model_path)

    @functools.cached_property
    def workload(self) -> Workload:
        """A step of this study."""
        study = self.study
        return Workload(
            batch_size=study.batch,
            length=study.length,
            dtype=study.dtype,
            rank=study.rank,
            attention=study.attention,
            device=self.device,
        )

    @functools.cached_property
    def costs(self) -> CostModel:
        """The cost model of a step."""
        return CostModel(Structure.of(self.shell), self.workload)

    @functools.cached_property
    def whole(self) -> int:
        """Parameters of LoRA on every linear layer."""
        return self.costs.all_linear().trainable

    @functools.cached_property
    def budgeted(self) -> int:
        """Parameters that budgets are shares of."""
        of_model = sum(parameter.numel() for parameter in self.shell.parameters())
        return of_model if self.study.budgets_of == "model" else self.whole

    @functools.cached_property
    def positions(self) -> float:
        """Positions of a training step on average, padding included."""
        study = self.study
        return setup.tokens_of(setup.random_batches(self.data_of(0).train, study.batch, 0, study.steps)) / study.steps

    @property
    def of_step(self) -> float:
        """Predicted time of a step of all-linear LoRA, as `CostModel.step_time` counts it."""
        return self.costs.step_time(self.costs.all_linear()) * self.positions

    def passes(self, rows: Sequence[Row], forward: float, backward: float = 0.0, weights: float = 0.0) -> Charge:
        """Charge for passes of the frozen model over rows.

        Args:
            rows: of the passes.
            forward: number of forward passes.
            backward: number of backward passes through activations alone.
            weights: number of gradients of all linear weights, each as expensive as a forward pass.
        """
        floor = self.costs.floor()
        flops = forward * floor.forward + backward * floor.backward + weights * floor.forward
        tokens = setup.tokens_of(setup.in_batches(rows, self.study.batch))
        share = flops / (floor.forward + floor.backward)
        return Charge(flops * tokens, share * self.costs.step_time(floor) * tokens / self.of_step)

    # ---- blueprints and placements

    @functools.cache  # noqa: B019
    def blueprint(self, name: str = TASK) -> Blueprint:
        """Measure a blueprint once and keep it in a file; `name` as `Entry.blueprint` has it."""
        if name == EQUAL:
            whole = self.blueprint()
            return replace(whole, submodules=tuple(replace(entry, adam_gain=1.0) for entry in whole))
        source, rows = self.measured(name)
        path = self._path("blueprint", [source, rows], ".json")
        if not path.exists():
            batches = make_batches(rows, self.study.batch, self.pad)
            settings: dict[str, Any] = {"model_id": self.model_path, "progress": False}
            if source.startswith("after "):
                steps = int(source.split()[1])
                warming = self.data_of(0).train[: steps * self.study.batch]
                with temporary_adapters(self.model(), None, seed=0) as adapted:
                    train_briefly(adapted, warming, steps=steps, batch_size=self.study.batch, pad_token_id=self.pad)
                    found = generate_blueprint(adapted, batches, **settings)
            else:
                found = generate_blueprint(self.model(quantized=source == "nf4"), batches, **settings)
            found.save(path)
        return Blueprint.from_pretrained(path)

    def measured(self, name: str) -> tuple[str, list[Row]]:
        """Return how or on what a named blueprint is measured, and the rows.

        Raises:
            SystemExit: for an unknown name.
        """
        source, _, number = (f"{TASK} x {self.study.measured}" if name == TASK else name).rpartition(" x ")
        if not number.isdigit() or not (source in (TASK, "nf4", *SOURCES) or source.startswith("after ")):
            raise SystemExit(
                f"Unknown blueprint {name!r}. Write 'task x 8', 'pubmedqa x 64', 'nf4 x 64' or 'after 5 x 64'."
            )
        rows = self.data_of(0).measured
        if source in SOURCES and source != self.study.data:
            rows = setup.read_rows(source, self.folder, "train", self.tokenizer, self.study.length, seed=0)
        return (TASK if source in SOURCES else source), rows[: int(number)]

    def charge(self, name: str) -> Charge:
        """Charge for measuring a blueprint, and for training before it where there is some."""
        if name == EQUAL:
            return Charge()
        source, rows = self.measured(name)
        spent = self.passes(rows, forward=MEASURING, backward=MEASURING)
        if source.startswith("after"):
            steps = int(source.split()[1])
            spent += Charge(self.costs.all_linear().flops * steps * self.positions, float(steps))
        return spent

    @functools.cache  # noqa: B019
    def plan(self, blueprint: str | None = TASK, **options: Any) -> Placement:
        """Plan a placement for this study's steps, by a blueprint or without one."""
        found = None if blueprint is None else self.blueprint(blueprint)
        return plan_placement(found, self.shell, workload=self.workload, **{"r": self.study.rank, **options})

    def adapted(self, placement: Placement, seed: int = 0) -> Any:
        """Load a fresh model with a placement's adapters."""
        set_seed(seed)
        rank = placement.rank or self.study.rank
        config = BlueprintConfig(placement=placement, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
        return get_peft_model(self.model(), config).train()  # type: ignore[arg-type]

    @functools.cached_property
    def entries(self) -> tuple[Submodule, ...]:
        """What can be adapted, as the study's own blueprint has it."""
        return tuple(entry for entry in self.blueprint() if entry.form in ADAPTABLE)

    @functools.cached_property
    def cover(self) -> CoverGain:
        """The predicted gain of placements, by the study's own blueprint."""
        return CoverGain(self.entries, [entry.adam_gain or 0.0 for entry in self.entries])

    # ---- scores of weights, and selections

    @functools.cache  # noqa: B019
    def weight_scores(self, method: str) -> dict[str, float]:
        """Score submodules by their weights alone, the best highest: "KappaTune" (PEFT's) or "Spectrum"."""

        def score() -> dict[str, float]:
            model = self.model("float32")
            if method == "KappaTune":
                order = KappaTuneSelector(model, show_progress=False).get_best_targets()
                return {name: -float(i) for i, name in enumerate(order)}
            weights = dict(model.named_modules())
            return {entry.name: signal_to_noise(weights[entry.name].weight) for entry in self.entries}

        return setup.kept(self._path(method, [], ".json"), score)

    @property
    def of_weights(self) -> Charge:
        """Charge for all singular values: about 4·m·n·min(m, n) operations each."""
        flops = sum(4.0 * a * b * min(a, b) for a, b in (e.shape[-2:] for e in self.entries if e.shape))
        return Charge(flops, flops / self.of_step)

    @functools.cache  # noqa: B019
    def selected(self, method: str, share: float, seed: int = 0) -> tuple[tuple[int, ...], Charge]:
        """Choose training examples, and charge for it."""
        data = self.data_of(seed)

        def choose() -> dict[str, Any]:
            found = select_examples(
                None if method == "random" else self.model(),
                data.train,
                fraction=share,
                method=method,  # type: ignore[arg-type]
                target=data.measured,
                deduplicate=False,
                batch_size=self.study.batch,
                max_length=self.study.length,
                progress=False,
            )
            return {"indices": list(found.indices), "flops": found.report["cost"]["flops"]}

        known = setup.kept(self._path("selected", [method, share, data.train, data.measured], ".json"), choose)
        floor = self.costs.floor()
        tokens = known["flops"] / floor.flops
        return tuple(known["indices"]), Charge(known["flops"], tokens * self.costs.step_time(floor) / self.of_step)

    def _path(self, what: str, about: Any, suffix: str) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / f"{what}-{digest([self.model_path, self.study.dtype, self.study.batch, about])}{suffix}"


def signal_to_noise(weight: Tensor) -> float:
    """Return Spectrum's ratio (Hartford et al. 2024, arXiv:2406.06623): summed singular values above the edge of the
    Marchenko-Pastur bulk over those below, over the largest.

    The edge is σ(1 + √β) with β the ratio of the sides, and σ the singular values' interquartile range over 1.349.

    Args:
        weight: (d_out, d_in).
    """
    values = torch.linalg.svdvals(weight.detach().float())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    edge = sigma * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    noise = values[values <= edge].sum()
    smallest = values.max() * torch.finfo(values.dtype).eps
    return float(values[values > edge].sum() / noise.clamp_min(smallest) / values.max())
