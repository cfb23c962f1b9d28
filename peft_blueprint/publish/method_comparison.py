"""A run in the form of the results of PEFT's `method_comparison`, so that their tools read it.

What is not known is null; our own figures stand under the key `peft_blueprint`. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runs import Point, Report, Row, RunRecord, jsonable


_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_ACCURACIES = ("eval_accuracy", "accuracy", "eval_mean_token_accuracy")


def method_comparison_json(row: Row, report: Report) -> dict[str, Any]:
    """A run's result as `method_comparison/MetaMathQA/results/*.json` of huggingface/peft have it.

    Its `valid accuracy` and `test accuracy` are filled from metrics called accuracy only. Every metric, figure and label
    is under `peft_blueprint`. `train samples` counts every batch as a full one.

    Returns:
        A JSON object with `run_info`, `train_info`, `meta_info` and `peft_blueprint`.
    """
    record, about = row.record, row.record.about
    seconds = record.total("seconds").value
    peak = record.total("peak_bytes").value
    result = {
        "run_info": {
            "created_at": about.get("created"),
            "total_time": seconds,
            "experiment_name": record.name,
            "peft_branch": None,
            "train_config": {"model_id": about.get("model_id"), **_mapping(about.get("train_config"))},
            "peft_config": _peft_config(record),
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
            "package_info": _packages(_mapping(about.get("versions"))),
            "system_info": _system(_mapping(about.get("system"))),
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
    found: dict[str, Any] = jsonable(result)
    return found


def _metrics(record: RunRecord) -> list[dict[str, Any]]:
    """An entry for each evaluation, and a last one for the end of the training, as PEFT's have it."""
    batch = _batch(_mapping(record.about.get("train_config")))
    entries = [
        {
            "step": point.step,
            "valid accuracy": next((point.metrics[name] for name in _ACCURACIES if name in point.metrics), None),
            "train loss": _loss_at(record, point.step),
            "train samples": None if batch is None else batch * point.step,
            "elapsed time": point.spent.get("seconds"),
        }
        for point in record.points
    ]
    known: list[Point] = [*record.points, *record.losses]
    last = max((point.step for point in known), default=0)
    test = next((p.metrics["test_accuracy"] for p in reversed(record.points) if "test_accuracy" in p.metrics), None)
    tokens = record.total("tokens").value
    end = {
        "step": last,
        "test accuracy": test,
        "train loss": _loss_at(record, last),
        "train samples": None if batch is None else batch * last,
        "train total tokens": None if tokens is None else int(tokens),
    }
    return [*entries, end]


def _loss_at(record: RunRecord, step: int) -> float | None:
    """The last training loss that was logged by then."""
    return next((p.metrics["loss"] for p in reversed(record.losses) if p.step <= step and "loss" in p.metrics), None)


def _batch(config: Mapping[str, Any]) -> int | None:
    """Examples of an optimizer step; None if it is not known."""
    product = 1
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "processes"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        product *= value
    return product


def _peft_config(record: RunRecord) -> dict[str, Any] | None:
    """The adapter's, with the `peft_type` that PEFT's own reader asks for; None if nothing is known of one."""
    config = _mapping(record.about.get("peft_config"))
    lora = _mapping(_mapping(record.about.get("placement")).get("lora"))
    if not config and not lora:
        return None
    return {"peft_type": "LORA" if lora else None, **config}


def _train_time(seconds: float | None, about: Mapping[str, Any]) -> float | None:
    """Without evaluating and saving; None if these are not known."""
    parts = _mapping(about.get("seconds_of_which"))
    if seconds is None or not all(isinstance(parts.get(name), int | float) for name in ("evaluating", "saving")):
        return None
    return max(0.0, seconds - float(parts["evaluating"]) - float(parts["saving"]))


def _packages(versions: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _PACKAGES:
        found |= {f"{name}-version": versions.get(name), f"{name}-commit-hash": None}
    return found


def _system(system: Mapping[str, Any]) -> dict[str, Any]:
    devices = system.get("devices")
    first = devices[0] if isinstance(devices, list | tuple) and devices else None
    known = {name: system.get(name) for name in ("system", "release", "version", "machine", "processor")}
    return known | {"accelerator": system.get("accelerator") or first, "platform": system.get("platform")}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
