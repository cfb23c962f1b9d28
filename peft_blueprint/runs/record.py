"""What one run gained and spent: its evaluations, its training log, its totals, as one file that reports read.

Knows nothing of models, trainers or how anything was measured; torch is not imported.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .._files import write_atomically
from ..blueprint import read_text
from ..errors import BlueprintError, FormatError
from .figures import UNITS, Figure


Direction = Literal["minimize", "maximize"]

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
SCHEMA_VERSION = 1
MAX_BYTES = 256 * 2**20  # a long run logs every step

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FALLING = re.compile(r"(loss|perplexity|error|error_rate|bits_per_\w+|(?<![a-z])(?:ppl|wer|cer|r?mse|mae|nll))$")
# What the Trainer logs with an evaluation that is no metric of the model.
_TOKENS = ("num_input_tokens_seen", "num_tokens", "eval_num_tokens")  # transformers', and TRL's
_TIMINGS = re.compile(
    r"_(runtime|num_tokens|(samples|steps|tokens)_per_second|jit_compilation_time|model_preparation_time)$"
)


@dataclass(frozen=True)
class Point:
    """An evaluation, or an entry of the training log.

    Args:
        step: optimizer steps done.
        spent: what had been spent by then, from the run's beginning, by name and in the unit of `UNITS`.
        metrics: by name; NaN where one was not finite.
        learning_rate: at this step.
    """

    step: int
    spent: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `from_dict` reads it."""
        return {
            "step": self.step,
            "spent": dict(self.spent),
            "metrics": dict(self.metrics),
            "learning_rate": self.learning_rate,
        }

    @classmethod
    def from_dict(cls, data: Any, place: str = "point") -> Point:
        """The inverse of `to_dict`.

        Raises:
            FormatError: if it is not such a mapping; names the place.
        """
        fields = _mapping(data, place)
        rate = fields.get("learning_rate")
        return cls(
            step=_count(fields.get("step"), f"{place}.step"),
            spent=_numbers(fields.get("spent") or {}, f"{place}.spent"),
            metrics=_numbers(fields.get("metrics") or {}, f"{place}.metrics"),
            learning_rate=None if rate is None else _number(rate, f"{place}.learning_rate"),
        )


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Args:
        name: what the report calls it.
        metric: the one that counts, a key of the points' metrics.
        direction: whether a smaller or a larger metric is better.
        resource: the one that counts, a name of `figures.UNITS`.
        totals: what the whole run spent, each labelled.
        points: the evaluations, by rising step; one of step 0 is of the untrained model.
        losses: the training log, with the metric "loss".
        stopping: the last decision (`stopping.Decision.to_dict`), the rule's settings, whether and when it stopped.
        about: whatever else is known: model_id, created, train_config, peft_config, placement, blueprint, versions,
            system, trainable_parameters, total_parameters, adapter_bytes.

    Raises:
        FormatError: for an unknown direction or resource, or steps that fall.
    """

    name: str
    metric: str
    direction: Direction
    resource: str
    totals: Mapping[str, Figure] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    losses: tuple[Point, ...] = ()
    stopping: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise FormatError(f"direction is {self.direction!r}: give one of {', '.join(get_args(Direction))}.")
        if self.resource not in UNITS:
            raise FormatError(f"resource is {self.resource!r}: give one of {', '.join(UNITS)}.")
        for name in ("points", "losses"):
            steps = [point.step for point in getattr(self, name)]
            fall = next((i for i in range(1, len(steps)) if steps[i] < steps[i - 1]), None)
            if fall is not None:
                raise FormatError(
                    f"{name}[{fall}] is of step {steps[fall]} and stands after one of step {steps[fall - 1]}. Give them "
                    "by rising step."
                )

    def total(self, resource: str) -> Figure:
        """What was spent of a resource; absent if the record does not say."""
        return self.totals.get(resource) or Figure(None, "absent", "not in the record")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; `from_dict` reads it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "metric": self.metric,
            "direction": self.direction,
            "resource": self.resource,
            "totals": {name: figure.to_dict() for name, figure in self.totals.items()},
            "points": [point.to_dict() for point in self.points],
            "losses": [point.to_dict() for point in self.losses],
            "stopping": None if self.stopping is None else dict(self.stopping),
            "about": dict(self.about),
        }

    @classmethod
    def from_dict(cls, data: Any) -> RunRecord:
        """The inverse of `to_dict`.

        Raises:
            FormatError: if it is not such a mapping; names the place.
        """
        fields = _mapping(data, "the record")
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"schema_version is {version!r}, and {SCHEMA_VERSION} is read here. Update peft-blueprint if it is "
                "higher; else it is no record of a run."
            )
        stopping = fields.get("stopping")
        return cls(
            name=_text(fields.get("name"), "name"),
            metric=_text(fields.get("metric"), "metric"),
            direction=_text(fields.get("direction"), "direction"),  # type: ignore[arg-type]
            resource=_text(fields.get("resource"), "resource"),
            totals={
                name: _figure(value, f"totals.{name}")
                for name, value in _mapping(fields.get("totals") or {}, "totals").items()
            },
            points=_points(fields.get("points"), "points"),
            losses=_points(fields.get("losses"), "losses"),
            stopping=None if stopping is None else _mapping(stopping, "stopping"),
            about=_mapping(fields.get("about") or {}, "about"),
        )

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all, as `path`, or as `run.json` in it if it is a folder or has no `.json`.

        What is no JSON in `about` and `stopping` is written as its text; a number that is not finite as null.

        Returns:
            The file.

        Raises:
            BlueprintError: if it cannot be written.
        """
        path = Path(path)
        if path.is_dir() or path.suffix != ".json":
            path = path / RUN_FILE
        text = json.dumps(jsonable(self.to_dict()), indent=1, allow_nan=False)
        write_atomically(path, text + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a run: `run.json` or a folder with it, or what the Trainer left without one.

        From a Trainer's `trainer_state.json`, in the folder or in its newest checkpoint, come the evaluations and the
        losses by step; `total_flos` counts as modelled FLOPs, and all else that was spent is absent.

        Raises:
            BlueprintError: if there is nothing of the kind.
            FormatError: if the file is broken; names it and the place.
        """
        file = _file_of(Path(path))
        data = _parsed(file)
        try:
            if isinstance(data, Mapping) and "log_history" in data:
                return _from_trainer(data, file)
            return cls.from_dict(data)
        except FormatError as error:
            raise FormatError(f"{file}: {error}") from error


def direction_of(metric: str) -> Direction:
    """Whether a smaller or a larger value of a metric is better, by its name: smaller for losses and errors."""
    return "minimize" if _FALLING.search(metric.lower()) else "maximize"


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: sets in order, enumerations by value, the rest as text; NaN as null."""
    if isinstance(value, enum.Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(jsonable(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    return str(value)


def _file_of(path: Path) -> Path:
    """The file that says most of a run: its record, or the newest state of its trainer."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise BlueprintError(
            f"There is no run at {path}. Give a folder with {RUN_FILE}, as LedgerCallback writes it, or with "
            f"{STATE_FILE}."
        )
    checkpoints = {int(found[1]): child for child in path.iterdir() if (found := _CHECKPOINT.fullmatch(child.name))}
    newest_first = [checkpoints[step] for step in sorted(checkpoints, reverse=True)]
    for name in (RUN_FILE, STATE_FILE):
        for folder in (path, *newest_first):
            if (folder / name).is_file():
                return folder / name
    raise BlueprintError(
        f"{path} holds no run: neither {RUN_FILE} nor {STATE_FILE}, nor a checkpoint with one. Train with "
        "trainer.add_callback(LedgerCallback(trainer)), or give the Trainer's output folder."
    )


def _parsed(file: Path) -> Any:
    text = read_text(file, MAX_BYTES)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{file} is not valid JSON ({error.msg}, line {error.lineno}, column {error.colno}): it may be cut short. "
            "Restore it, or leave this run out."
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{file} cannot be read as JSON ({type(error).__name__}). Restore it, or leave it out."
        ) from error


def _from_trainer(state: Mapping[str, Any], file: Path) -> RunRecord:
    """A record of what a Trainer's state says: see `RunRecord.load`."""
    history = state["log_history"]
    if not isinstance(history, list):
        raise FormatError(f"log_history is {type(history).__name__}, not a list of what was logged.")
    entries = [_mapping(entry, f"log_history[{i}]") for i, entry in enumerate(history)]
    steps = [_count(entry.get("step"), f"log_history[{i}].step") for i, entry in enumerate(entries)]
    last = max([*steps, _count(state.get("global_step") or 0, "global_step")], default=0)
    flops = _positive(state.get("total_flos"))
    points, losses = [], []
    for step, entry in sorted(zip(steps, entries, strict=True), key=lambda pair: pair[0]):
        spent: dict[str, float] = {} if flops is None or not last else {"flops": flops * step / last}
        tokens = next((count for key in _TOKENS if (count := _positive(entry.get(key)))), None)
        if tokens is not None:
            spent["tokens"] = tokens
        rate = _number(entry["learning_rate"], "learning_rate") if entry.get("learning_rate") is not None else None
        metrics = {
            key: _number(value, key)
            for key, value in entry.items()
            if key.startswith("eval_") and _is_number(value) and not _TIMINGS.search(key)
        }
        if metrics:
            points.append(Point(step, spent, metrics, rate))
        if _is_number(entry.get("loss")):
            losses.append(Point(step, spent, {"loss": _number(entry["loss"], "loss")}, rate))
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    metric = "eval_loss" if "eval_loss" in names or not names else names[0]
    totals = {name: Figure(None, "absent", f"not in {STATE_FILE}") for name in UNITS}
    seconds = next((value for e in reversed(entries) if (value := _positive(e.get("train_runtime")))), None)
    if seconds is not None:
        totals["seconds"] = Figure(
            seconds, "measured", "the Trainer's train_runtime since its last start, evaluations included"
        )
    if flops is not None:
        totals["flops"] = Figure(flops, "modelled", "the Trainer's total_flos; spread evenly over the steps")
    known_tokens = [count for entry in (*entries, state) for key in _TOKENS if (count := _positive(entry.get(key)))]
    if known_tokens:
        totals["tokens"] = Figure(max(known_tokens), "measured", "the Trainer's count")
    folder = file.parent.parent if _CHECKPOINT.fullmatch(file.parent.name) else file.parent
    return RunRecord(
        name=folder.resolve().name or STATE_FILE,
        metric=metric,
        direction=direction_of(metric),
        resource="flops" if flops is not None else "tokens" if known_tokens else "seconds",
        totals=totals,
        points=tuple(points),
        losses=tuple(losses),
        about=_adapter(file.parent) or _adapter(folder),
    )


def _adapter(folder: Path) -> dict[str, Any]:
    """What an adapter's config beside the state says of the model; empty without one."""
    file = folder / "adapter_config.json"
    config = _parsed(file) if file.is_file() else None
    if not isinstance(config, Mapping):
        return {}
    return {"peft_config": dict(config), "model_id": config.get("base_model_name_or_path")}


def _points(data: Any, place: str) -> tuple[Point, ...]:
    if data is None:
        return ()
    if not isinstance(data, list):
        raise FormatError(f"{place} is {_shown(data)}, not a list.")
    return tuple(Point.from_dict(item, f"{place}[{i}]") for i, item in enumerate(data))


def _figure(data: Any, place: str) -> Figure:
    try:
        return Figure.from_dict(_mapping(data, place))
    except (BlueprintError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{place} is {_shown(data)}, no figure with value and label ({error}).") from error


def _mapping(data: Any, place: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise FormatError(f"{place} is {_shown(data)}, not an object with names and values.")
    return dict(data)


def _numbers(data: Any, place: str) -> dict[str, float]:
    return {name: _number(value, f"{place}.{name}") for name, value in _mapping(data, place).items()}


def _number(value: Any, place: str) -> float:
    """A number; null and what no double has room for as NaN."""
    if value is None:
        return math.nan
    if not _is_number(value):
        raise FormatError(f"{place} is {_shown(value)}, not a number.")
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _count(value: Any, place: str) -> int:
    number = _number(value, place)
    if math.isnan(number) or number < 0 or number != int(number):
        raise FormatError(f"{place} is {_shown(value)}, not a whole number from 0.")
    return int(number)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise FormatError(f"{place} is {_shown(value)}, not a text.")
    return value


def _positive(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value < 1e300 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return "missing" if value is None else ascii(value)[:60]
