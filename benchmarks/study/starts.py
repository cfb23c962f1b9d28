"""From a choice to a model that trains: adapters and how they begin, or modules trained whole.

Knows PEFT's methods. Knows nothing of how the choice was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import set_seed

from peft_blueprint.train import initialize_along_gradient

from .arms import GRADIENT, Choice
from .ground import Charge, Ground


SCALING = 2  # alpha over rank, of every adapter
LOOKS = 20  # at the measured examples, before EVA is given up
_OF_PEFT = "base_model.model."


@dataclass(frozen=True)
class Ready:
    """A model about to be trained.

    Args:
        model: with gradients where it is trained.
        factors: on the learning rate, by submodule; 1 for others.
        ahead: further factor on that of every B.
        is_whole: whether weights of the model itself are trained.
        charge: what the start took, where that is only known by doing it.
    """

    model: nn.Module
    factors: Mapping[str, float]
    ahead: float
    is_whole: bool
    charge: Charge

    @property
    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: parameters with a factor on their learning rate."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            factor = self.factors.get(_module_of(name), 1.0) * (self.ahead if ".lora_B." in name else 1.0)
            by_factor.setdefault(factor, []).append(parameter)
        return [{"params": some, "factor": factor} for factor, some in by_factor.items()]


def ready(ground: Ground, choice: Choice, steps: int, seed: int, base: nn.Module | None = None) -> Ready:
    """A fresh model as a choice wants it.

    Args:
        ground: where models come from.
        choice: what is trained.
        steps: that it will be trained for, which AdaLoRA wants to know.
        seed: of the adapters' first weights.
        base: a model to use instead of a fresh one; adapters change it.
    """
    is_mixed = bool(choice.whole) and ground.study.dtype != "float32"  # weights in half precision miss small steps
    model = base if base is not None else ground.model("float32" if is_mixed else None)
    set_seed(seed)
    charge = Charge()
    if choice.whole:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name == w or name.startswith(w + ".") for w in choice.whole))
    elif choice.ranks:
        model, charge = _adapted(ground, choice, model, steps)
    return Ready(model.train(), choice.factors, choice.ahead, bool(choice.whole), charge)


def _adapted(ground: Ground, choice: Choice, model: Any, steps: int) -> tuple[Any, Charge]:
    if choice.start == "adalora":
        return get_peft_model(model, _adalora(choice, steps)), Charge()
    if choice.start == "eva":
        config = lora(choice, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))  # every rank stays as it is
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        batches = ground.batches(ground.data.measured)
        passes = count(1)

        def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
            if next(passes) > LOOKS * len(batches):
                raise RuntimeError(
                    f"EVA's directions have not converged after {LOOKS} looks at the measured examples."
                )
            return model(**inputs)

        initialize_lora_eva_weights(adapted, batches, forward_fn=forward, show_progress_bar=False)
        looks = (next(passes) - 1) / len(batches)
        once = ground.passes(ground.data.measured, forward=1)  # is charged already
        return adapted, Charge(once.flops * (looks - 1), once.steps * (looks - 1))
    if choice.start == "lora_ga":
        config = lora(choice, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def look() -> None:
            for batch in ground.batches(ground.data.measured):
                model(**batch).loss.backward()

        model.enable_input_require_grads()  # PEFT counts passes with hooks that want a gradient to go through
        preprocess_loraga(model, config, look)
        model.disable_input_require_grads()
        return get_peft_model(model, config), Charge()
    adapted = get_peft_model(model, lora(choice))
    if choice.start == "directions":
        begin_in(adapted, ground.directions)
    if choice.start.startswith(GRADIENT):
        batches, examples = ground.batches(ground.data.measured), int(choice.start.removeprefix(GRADIENT))
        initialize_along_gradient(adapted, batches, max_examples=examples, progress=False)
    return adapted, Charge()


def lora(choice: Choice, **settings: Any) -> LoraConfig:
    """PEFT's config, every adapter with the same scaling."""
    usual = max(set(choice.ranks.values()), key=list(choice.ranks.values()).count)
    others = {name: rank for name, rank in choice.ranks.items() if rank != usual}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=SCALING * usual,
        target_modules=list(choice.ranks),
        rank_pattern=others,
        alpha_pattern={name: SCALING * rank for name, rank in others.items()},
        **settings,
    )


def _adalora(choice: Choice, steps: int) -> AdaLoraConfig:
    """Begins at the choice's rank and prunes to two thirds of it, between a sixth and two thirds of the steps."""
    rank = max(choice.ranks.values())
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=rank,
        target_r=max(1, round(2 * rank / 3)),
        tinit=steps // 6,
        tfinal=steps // 3,
        total_step=max(2, steps),
        lora_alpha=SCALING * rank,
        target_modules=list(choice.ranks),
    )


@torch.no_grad()
def begin_in(model: nn.Module, directions: Mapping[str, Tensor]) -> None:
    """Put the leading rows of A along given directions, each as long as PEFT's random rows are on average, 1/√3."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            rows = directions[_module_of(name)][: len(parameter)]
            parameter[: len(rows)] = (rows / 3**0.5).to(parameter)


def _module_of(parameter: str) -> str:
    """The submodule that an adapter's parameter belongs to."""
    return parameter.removeprefix(_OF_PEFT).partition(".lora_")[0]
