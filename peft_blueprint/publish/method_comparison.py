"""Convert a run to a result of PEFT's `method_comparison`, so that its tools read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..runs import Report, Row, RunRecord, jsonable


_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_ACCURACIES = ("eval_accuracy", "accuracy", "eval_mean_token_accuracy")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


def method_comparison_json(row: Row, report: Report) -> dict[str, Any]:
    """Return a run's result in the form of `method_comparison/MetaMathQA/results/*.json` of huggingface/peft.

    Unknown values are null. `valid accuracy` and `test accuracy` come only from metrics that are called accuracy; all
    metrics, figures and labels are under the key `peft_blueprint`. `train samples` counts every batch as a full one.

    Returns:
        A JSON object with `run_info`, `train_info`, `meta_info` and `peft_blueprint`.

    Example:
        >>> from peft_blueprint.runs import RunRecord, make_report, measured
        >>> run = RunRecord("lora", "eval_loss", "minimize", "seconds", totals={"seconds": measured(60.0, "clock")})
        >>> report = make_report([run])
        >>> method_comparison_json(report.rows[0], report)["run_info"]["total_time"]
        60.0
    """
    record, about = row.record, row.record.about
    seconds, peak = record.total("seconds").value, record.total("peak_bytes").value
    versions, system = _mapping(about.get("versions")), _mapping(about.get("system"))
    devices = system.get("devices")
    result = {
        "run_info": {
            "created_at": about.get("created"),
            "total_time": seconds,
            "experiment_name": record.name,
            "peft_branch": None,
            "train_config": {"model_id": about.get("model_id"), **_mapping(about.get("train_config"))},
            "peft_config": _peft_config(about),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": None if peak is None else int(peak),
            "accelerator_memory_reserved_99th": None,
            "train_time": _train_time(seconds, about),
            "file_size": about.get("adapter_bytes"),
            "num_trainable_params": about.get("trainable_parameters"),
            "num_total_params": about.get("total_parameters"),
            "status": "success",
            "metrics": _metrics(record),
        },
        "meta_info": {
            "model_info": {"sha": about.get("model_revision"), "created_at": None},
            "dataset_info": {},
            "package_info": {
                key: value
                for name in _PACKAGES
                for key, value in ((f"{name}-version", versions.get(name)), (f"{name}-commit-hash", None))
            },
            "system_info": {
                **{name: system.get(name) for name in ("system", "release", "version", "machine", "processor")},
                "accelerator": system.get("accelerator")
                or (devices[0] if isinstance(devices, list | tuple) and devices else None),
                "platform": system.get("platform"),
            },
            "pytorch_info": None,
        },
        "peft_blueprint": {
            **{key: value for key, value in report.to_dict().items() if key != "runs"},
            "run": row.to_dict(),
            "points": [point.to_dict() for point in record.points],
            "stopping": record.stopping,
            "placement": about.get("placement"),
        },
    }
    converted: dict[str, Any] = jsonable(result)
    return converted


def _metrics(record: RunRecord) -> list[dict[str, Any]]:
    """Return an entry for each evaluation, and a last one for the end of the training, as in PEFT's files."""
    config = _mapping(record.about.get("train_config"))
    sizes: list[Any] = [config.get(name) for name in _BATCH]
    batch = math.prod(sizes) if all(type(size) is int for size in sizes) else None
    last = max((point.step for point in (*record.points, *record.losses)), default=0)
    tokens = record.total("tokens").value
    accuracies = [point.metrics["test_accuracy"] for point in record.points if "test_accuracy" in point.metrics]

    def at(step: int) -> dict[str, Any]:
        losses = [p.metrics["loss"] for p in record.losses if p.step <= step and "loss" in p.metrics]
        return {
            "step": step,
            "train loss": losses[-1] if losses else None,
            "train samples": None if batch is None else batch * step,
        }

    evaluations = [
        at(point.step)
        | {
            "valid accuracy": next((point.metrics[name] for name in _ACCURACIES if name in point.metrics), None),
            "elapsed time": point.spent.get("seconds"),
        }
        for point in record.points
    ]
    end = {
        "test accuracy": accuracies[-1] if accuracies else None,
        "train total tokens": None if tokens is None else int(tokens),
    }
    return [*evaluations, at(last) | end]


def _peft_config(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the adapter's config with the `peft_type` that PEFT's reader needs; None without an adapter."""
    config = _mapping(about.get("peft_config"))
    lora = _mapping(_mapping(about.get("placement")).get("lora"))
    return {"peft_type": "LORA" if lora else None, **config} if config or lora else None


def _train_time(seconds: float | None, about: Mapping[str, Any]) -> float | None:
    """Return the seconds without evaluating and saving; None if those are unknown."""
    parts = _mapping(about.get("seconds_of_which"))
    others = [parts.get(name) for name in ("evaluating", "saving")]
    if seconds is None or not all(isinstance(part, int | float) for part in others):
        return None
    return max(0.0, seconds - math.fsum(others))  # type: ignore[arg-type]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
