"""The run of a recipe with TRL's SFTTrainer: the same YAML, the same plan, TRL's own preparation and loss.

    python recipes/qlora_trl.py recipes/qlora.yaml

Needs TRL (`pip install 'peft-blueprint[trl,quant]'`). The adapter that it saves loads with plain PEFT.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_blueprint.data import pad_token_of
from peft_blueprint.runs import Ledger
from peft_blueprint.train import CheckpointAbove, Recipe, prepare, start, training_settings


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan, train and save; returns what is printed and written to `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", help="a YAML file, such as recipes/qlora.yaml")
    recipe = Recipe.from_yaml(parser.parse_args(arguments).recipe)

    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    settings = {"bf16": half, **training_settings(recipe), "max_length": recipe.max_length}
    settings.pop("remove_unused_columns")  # TRL replaces the columns by its own
    config = SFTConfig(**settings)
    if half and recipe.quantization:  # TRL holds adapters of a quantised model in bfloat16
        recipe = replace(recipe, workload={"adapter_dtype": "bfloat16", **recipe.workload})
    prepared = prepare(recipe, config)
    if prepared.learning_rate is not None:
        config.learning_rate = prepared.learning_rate
    if prepared.plan.placement is not None:
        print(prepared.plan.placement)

    trainer = SFTTrainer(
        model=prepared.model,
        args=config,
        train_dataset=Dataset.from_list([dict(example) for example in prepared.examples]),
        processing_class=prepared.tokenizer,
        peft_config=prepared.config,  # a BlueprintConfig
        callbacks=[CheckpointAbove()],
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not half:  # bfloat16 is slow on CPUs, and pairs badly with activations in float32
        for parameter in trained:
            parameter.data = parameter.data.float()
    started = start(trainer.model, recipe, prepared.rows, pad_token_of(prepared.tokenizer))
    with Ledger() as spent:
        trainer.train()
    trainer.save_model(recipe.output)

    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "learning_rate": config.learning_rate,
        "measure_seconds": sum(figures["seconds"].value or 0.0 for figures in (prepared.probe, started) if figures),
        "train_seconds": spent.seconds,
        "peak_bytes": spent.peak_bytes,
        "predicted_bytes": prepared.plan.memory,
        "predicted_time": prepared.plan.time,
        "kept": prepared.plan.kept,
        "lowest": prepared.plan.lowest,
        "output": recipe.output,
    }
    text = json.dumps(report, indent=2)
    Path(recipe.output, "report.json").write_text(text + "\n")
    print(text)
    return report


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
