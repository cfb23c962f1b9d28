"""Run a recipe with TRL's SFTTrainer: the same YAML and the same plan, with TRL's preparation and loss.

    python recipes/qlora_trl.py recipes/qlora.yaml

Needs TRL (`pip install 'peft-blueprint[trl,quant]'`). The saved adapter loads with plain PEFT.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_blueprint.runs import Ledger


# isort: split
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # after peft_blueprint, which silences a warning of bitsandbytes on CPUs

from peft_blueprint.measure import get_pad_token_id
from peft_blueprint.train import (
    CheckpointAbove,
    Recipe,
    callbacks_of,
    initialize_adapters,
    keep_stdout_clean,
    prepare,
    skip_prompts,
    training_settings,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan, train and save; return the report that is printed and written to `report.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", help="a YAML file, such as recipes/qlora.yaml")
    recipe = Recipe.from_yaml(parser.parse_args(arguments).recipe, SFTConfig)

    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    settings = {"bf16": half, **training_settings(recipe), "max_length": recipe.max_length}
    settings.pop("remove_unused_columns")  # TRL replaces the columns with its own
    config = SFTConfig(**settings)
    if half and recipe.quantization:  # TRL holds adapters of a quantized model in bfloat16
        recipe = replace(recipe, workload={"adapter_dtype": "bfloat16", **recipe.workload})
    prepared = prepare(recipe, config)
    if prepared.learning_rate is not None:
        config.learning_rate = prepared.learning_rate
    if prepared.placement is not None:
        print(prepared.placement, file=sys.stderr)

    trainer = SFTTrainer(
        model=prepared.model,
        args=config,
        train_dataset=Dataset.from_list([dict(example) for example in prepared.examples]),
        processing_class=prepared.tokenizer,
        peft_config=prepared.config,  # a BlueprintConfig
        callbacks=[CheckpointAbove(), *callbacks_of(recipe)],
    )
    keep_stdout_clean(trainer)
    skip_prompts(trainer.model, recipe)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if not half:  # bfloat16 is slow on CPUs, and pairs badly with activations in float32
        for parameter in trained:
            parameter.data = parameter.data.float()
    initialization = initialize_adapters(trainer.model, recipe, prepared.rows, get_pad_token_id(prepared.tokenizer))
    with Ledger() as spent:
        trainer.train()
    trainer.save_model(recipe.output)

    report = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "learning_rate": config.learning_rate,
        "measure_seconds": sum(part["seconds"].value or 0.0 for part in (prepared.probe, initialization) if part),
        "train_seconds": spent.seconds,
        "peak_bytes": spent.peak_bytes,
        **prepared.predicted,
        "output": recipe.output,
    }
    text = json.dumps(report, indent=2)
    Path(recipe.output, "report.json").write_text(text + "\n")
    print(text)
    return report


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
