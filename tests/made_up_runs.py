"""Made-up runs that look like real ones: falling losses with a little noise, and their costs."""

import math
import random

from peft_blueprint.runs.quantity import UNITS, absent, measured, modelled
from peft_blueprint.runs.record import Point, RunRecord


KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def made_up_run(name="lora-r16", *, evaluations=12, step=50, speed=1.0, end=1.35, pace=3.0, seed=0, **about):
    """A run of `evaluations` after that of the untrained model, whose loss goes from 2.31 to about `end`.

    Args:
        speed: seconds of a step.
        pace: how soon the loss comes down.
    """
    noise = random.Random(seed)
    points, losses = [], []
    for i in range(evaluations + 1):
        at = i * step
        done = (1 - math.exp(-pace * i / evaluations)) / (1 - math.exp(-pace))
        loss = 2.31 - (2.31 - end) * done + (noise.gauss(0, 0.006) if i else 0)
        spent = {
            "seconds": at * speed,
            "tokens": at * 8192.0,
            "flops": at * speed * 6.1e13,
            "energy_joules": at * speed * 290,
        }
        spent["device_hours"], spent["carbon_grams"] = at * speed / 3600, at * speed * 290 / 3.6e6 * 56
        points.append(Point(at, spent, {"eval_loss": loss, "eval_accuracy": 0.3 + (2.31 - loss) / 4}, 2e-4))
        if i:
            losses.append(Point(at, spent, {"loss": loss + noise.gauss(0.03, 0.03)}))
    last = points[-1].spent
    totals = {name: absent("no meter of it here") for name in UNITS} | {
        "seconds": measured(last["seconds"] + 4, "wall clock"),
        "device_hours": measured(last["device_hours"], "wall clock × 1 device"),
        "tokens": measured(last["tokens"], "input positions, padding included"),
        "flops": modelled(last["flops"], "CostModel for 8 × 1024 tokens"),
        "energy_joules": measured(last["energy_joules"], "NVML energy counter, 1 GPU"),
        "carbon_grams": modelled(last["carbon_grams"], "energy × 56 g CO2e/kWh, CodeCarbon 3.0.4, FRA, 2023"),
        "peak_bytes": measured(9.4e9 + speed * 2e9, "torch.cuda.max_memory_allocated"),
    }
    return RunRecord(
        name=name,
        metric="eval_loss",
        direction="minimize",
        resource="seconds",
        totals=totals,
        points=tuple(points),
        losses=tuple(losses),
        about={
            "model_id": "HuggingFaceTB/SmolLM2-135M",
            "created": "2025-03-04T09:12:44+00:00",
            "versions": {"peft": "0.21.0", "transformers": "5.2.0", "torch": "2.13.0"},
            "system": {"platform": "Linux-6.8-x86_64", "devices": ["NVIDIA L40S"]},
            "train_config": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "processes": 1},
            "peft_config": {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"]},
            "trainable_parameters": 1_843_200,
            "total_parameters": 136_358_208,
            "adapter_bytes": 7_372_800,
            **about,
        },
    )


def placement_of(layers=30, rank=16):
    """A placement on the later half of the layers, ranks differing by kind."""
    lora = {
        f"model.layers.{depth}.{kind}": rank if kind.startswith("mlp") else rank // 2
        for depth in range(layers // 2, layers)
        for kind in KINDS[1:]
    }
    return {"lora": lora, "unfreeze": []}
