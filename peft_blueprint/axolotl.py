"""A plugin for axolotl: it plans adapters, starts them along the gradient and keeps a ledger, from axolotl's own YAML.

    plugins:
      - peft_blueprint.axolotl.BlueprintPlugin
    peft_blueprint:
      blueprint: org/model   # file, folder or Hub id; without one, adapters are spread evenly
      fraction: 0.2          # any option of `plan_placement`
      start_examples: 64     # examples whose gradient initializes the adapters; 0 for LoRA's random initialization
      stop: {}               # options of `MarginalReturn`; leave it out to keep the record only
      carbon: FRA

Run through the plugin manager of axolotl 0.19; the tests replace it by a class with the same hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import Trainer, TrainerCallback

from ._options import from_mapping
from .blueprint import Blueprint
from .errors import PlacementError
from .measure import empty_model
from .place import PlacementOptions, plan_placement, trainer_config
from .train import CheckpointAbove, LedgerCallback, initialize_along_gradient, stopping_rule


_OWN = ("blueprint", "start_examples", "stop", "carbon")
_PLACED = ("lora_target_modules", "lora_target_linear", "lora_target_parameters", "lora_modules_to_save")


class BlueprintArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    peft_blueprint: dict[str, Any] | None = None


class BlueprintPlugin(BasePlugin):
    """Place adapters, initialize them and keep the run's ledger in a training with axolotl."""

    def get_input_args(self) -> str:
        """Return the class whose keys axolotl's configuration may have."""
        return f"{__name__}.{BlueprintArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Write the placement into the configuration, before axolotl validates it.

        Raises:
            PlacementError: for an unknown key, another adapter, targets given by hand, or a placement that cannot be
                planned.
        """
        given = _settings(cfg)
        if (cfg.get("adapter") or "lora") not in ("lora", "qlora"):
            raise PlacementError(f"adapter must be lora or qlora with peft_blueprint, got {cfg['adapter']}.")
        if taken := [name for name in _PLACED if cfg.get(name)]:
            raise PlacementError(f"peft_blueprint sets {taken[0]}: leave it out, or leave out the plugin.")
        if start := given.get("start_examples"):
            if not isinstance(start, int) or isinstance(start, bool) or start < 0:
                raise PlacementError(f"start_examples must be an integer of at least 0, got {start!r}.")
            if cfg.get("deepspeed") or cfg.get("fsdp_config"):
                raise PlacementError("start_examples needs whole weights: leave it out with DeepSpeed and FSDP.")
        stopping_rule(given.get("stop"))
        source = given.get("blueprint")
        rest = {key: value for key, value in given.items() if key not in _OWN}
        rest.setdefault("r", cfg.get("lora_r"))
        placement = plan_placement(
            None if source is None else Blueprint.from_pretrained(source),
            empty_model(cfg["base_model"]),
            from_mapping(PlacementOptions, rest, "peft_blueprint", PlacementError),
        )
        written = yaml.safe_load(trainer_config(placement, "axolotl", lora_alpha=cfg.get("lora_alpha")))
        for key in written.keys() - {"base_model", "adapter"}:
            if key != "lora_dropout" or cfg.get(key) is None:
                cfg[key] = written[key]
        cfg["adapter"] = cfg.get("adapter") or "lora"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Initialize fresh adapters along the gradient of the first examples that the run will train on."""
        count = _settings(cfg).get("start_examples") or 0
        if not count or cfg.get("lora_model_dir") or cfg.get("resume_from_checkpoint"):
            return
        with torch.random.fork_rng():
            batches = trainer.get_train_dataloader()
            initialize_along_gradient(trainer.model, batches, max_examples=count, seed=trainer.args.seed)  # type: ignore[arg-type]

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Trainer) -> list[TrainerCallback]:
        """Return the ledger, with its stopping rule, and the callback that ends checkpointing below the lowest adapter."""
        given = _settings(cfg)
        rule, options = stopping_rule(given.get("stop"))
        return [CheckpointAbove(), LedgerCallback(trainer, stop=rule, carbon=given.get("carbon"), **options)]


def _settings(cfg: Any) -> Mapping[str, Any]:
    given = cfg.get("peft_blueprint") or {}
    if not isinstance(given, Mapping):
        raise PlacementError(f"peft_blueprint must be a mapping such as {{fraction: 0.2}}, got {given!r}.")
    return dict(given)
