"""Record the costs and gains of one run, as a file that reports read."""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .._files import write_atomically
from .._options import from_mapping
from ..blueprint import read_text
from ..errors import BlueprintError, FormatError
from .quantity import UNITS, Direction, Quantity, absent, measured, modelled


RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
SCHEMA_VERSION = 1
MAX_BYTES = 256 * 2**20  # a long run logs every step

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FALLING = re.compile(r"(loss|perplexity|error|error_rate|bits_per_\w+|(?<![a-z])(?:ppl|wer|cer|r?mse|mae|nll))$")
# Entries that the Trainer logs with an evaluation and that are not metrics of the model.
_TOKENS = ("num_input_tokens_seen", "num_tokens", "eval_num_tokens")  # transformers', and TRL's
_TIMINGS = re.compile(
    r"_(runtime|num_tokens|(samples|steps|tokens)_per_second|jit_compilation_time|model_preparation_time)$"
)

if TYPE_CHECKING:
    Numbers = Mapping[str, float]
else:
    Numbers = Mapping[str, float | None]  # a number that was not finite is null in a file


@dataclass(frozen=True)
class Point:
    """An evaluation, or an entry of the training log.

    Args:
        step: optimizer steps done.
        spent: amounts spent since the run began, by name and in the unit of `UNITS`.
        metrics: by name; a number that is not finite becomes NaN.
        learning_rate: at this step.
        of_which: seconds of evaluating and saving since the run began, a part of `spent["seconds"]`.
    """

    step: int
    spent: Numbers = field(default_factory=dict)
    metrics: Numbers = field(default_factory=dict)
    learning_rate: float | None = None
    of_which: Numbers = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_step(self.step)
        for name in ("spent", "metrics", "of_which"):
            values = getattr(self, name)
            if not all(map(_is_finite, values.values())):
                finite = {key: value if _is_finite(value) else math.nan for key, value in values.items()}
                object.__setattr__(self, name, finite)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return dict(vars(self))


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Args:
        name: shown in reports.
        metric: the metric to judge by, a key of the points' metrics.
        direction: whether a lower or a higher metric is better.
        resource: the resource to judge by, a name in `UNITS`.
        totals: amounts that the whole run spent.
        points: evaluations, by rising step; one of step 0 is of the untrained model.
        losses: the training log, with the metric "loss".
        stopping: the last decision (`Decision.to_dict`), the rule's settings, and whether and when it stopped.
        about: further facts: model_id, created, train_config, peft_config, placement, blueprint, versions, system,
            trainable_parameters, total_parameters, adapter_bytes.

    Raises:
        FormatError: for an empty name or metric, an unknown direction or resource, or steps that fall.

    Example:
        >>> record = RunRecord("a", "loss", "minimize", "seconds", points=(Point(9, {"seconds": 6.0}, {"loss": 2.1}),))
        >>> RunRecord.load(record.save("run")) == record
        True
        >>> record.total("energy_kwh").how
        'absent'
    """

    name: str
    metric: str
    direction: Direction
    resource: str
    totals: Mapping[str, Quantity] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    losses: tuple[Point, ...] = ()
    stopping: Mapping[str, Any] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "metric"):
            if not getattr(self, name):
                raise FormatError(f"{name} must not be empty.")
        if self.direction not in get_args(Direction):
            raise FormatError(f"direction must be one of {', '.join(get_args(Direction))}, got {self.direction!r}.")
        if self.resource not in UNITS:
            raise FormatError(f"resource must be one of {', '.join(UNITS)}, got {self.resource!r}.")
        for name in ("points", "losses"):
            steps = [point.step for point in getattr(self, name)]
            fall = next((i for i in range(1, len(steps)) if steps[i] < steps[i - 1]), None)
            if fall is not None:
                raise FormatError(f"{name} must have rising steps, got {steps[fall]} after {steps[fall - 1]}.")

    def total(self, resource: str) -> Quantity:
        """Return the amount of a resource that was spent; absent if the record does not have it."""
        return self.totals.get(resource) or absent("not in the record")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "totals": {name: quantity.to_dict() for name, quantity in self.totals.items()},
            "points": [point.to_dict() for point in self.points],
            "losses": [point.to_dict() for point in self.losses],
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "The run record") -> RunRecord:
        """Read what `to_dict` returned; unknown keys are ignored.

        Args:
            data: untrusted JSON.
            where: file named in errors.

        Raises:
            FormatError: for anything else; names the key.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise FormatError(
                f"{where}: schema_version must be {SCHEMA_VERSION}, got {version!r}. Update peft-blueprint if it is "
                "higher; otherwise this is not a run record."
            )
        return from_mapping(cls, data, where, FormatError, ignore_unknown=True)

    def save(self, path: str | Path) -> Path:
        """Write the record atomically, as `path`, or as `run.json` in it if it is a folder or has no `.json`.

        Values in `about` and `stopping` that JSON does not know are written as text, numbers that are not finite as
        null.

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
        """Read a run from `run.json`, from a folder with it, or from a Trainer's output folder without it.

        A Trainer's `trainer_state.json`, in the folder or its newest checkpoint, gives the evaluations and losses by
        step; `total_flos` counts as modelled FLOPs, and other resources are absent.

        Raises:
            BlueprintError: if there is no such file.
            FormatError: if the file is broken; names the file and the key.
        """
        file = _file_of(Path(path))
        data = _parsed(file)
        if isinstance(data, Mapping) and "log_history" in data:
            return _from_trainer(data, file)
        return cls.from_dict(data, str(file))


def direction_of(metric: str) -> Direction:
    """Guess from a metric's name whether lower values are better: they are for losses and errors.

    Example:
        >>> direction_of("eval_loss"), direction_of("eval_accuracy")
        ('minimize', 'maximize')
    """
    return "minimize" if _FALLING.search(metric.lower()) else "maximize"


def jsonable(value: Any) -> Any:
    """Convert a value to plain JSON: sets sorted, enumerations by value, other objects as text, NaN as null.

    Example:
        >>> jsonable({"targets": {"v_proj", "q_proj"}, "loss": float("nan")})
        {'targets': ['q_proj', 'v_proj'], 'loss': None}
    """
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
    """Find the file with most information on a run: its record, or the newest state of its Trainer."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise BlueprintError(
            f"No run found at {path}. Give a folder with {RUN_FILE}, as LedgerCallback writes it, or with "
            f"{STATE_FILE}."
        )
    checkpoints = {int(found[1]): child for child in path.iterdir() if (found := _CHECKPOINT.fullmatch(child.name))}
    newest_first = [checkpoints[step] for step in sorted(checkpoints, reverse=True)]
    for name in (RUN_FILE, STATE_FILE):
        for folder in (path, *newest_first):
            if (folder / name).is_file():
                return folder / name
    raise BlueprintError(
        f"{path} and its checkpoints hold neither {RUN_FILE} nor {STATE_FILE}. Train with "
        "SFTTrainer(..., callbacks=[LedgerCallback()]), or give the Trainer's output folder."
    )


def _parsed(file: Path) -> Any:
    text = read_text(file, MAX_BYTES, "run record")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{file} is not valid JSON ({error.msg}, line {error.lineno}, column {error.colno}) and may be truncated. "
            "Restore it, or leave this run out."
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{file} cannot be read as JSON ({type(error).__name__}). Restore it, or leave this run out."
        ) from error


@dataclass(frozen=True)
class _Entry:
    """An entry of `log_history` without its metrics, which have any name."""

    step: int
    learning_rate: float | None = None
    train_runtime: float | None = None

    def __post_init__(self) -> None:
        _require_step(self.step)


@dataclass(frozen=True)
class _TrainerState:
    """The parts of a `trainer_state.json` that make a record."""

    log_history: tuple[_Entry, ...]
    global_step: int = 0
    total_flos: float | None = None

    def __post_init__(self) -> None:
        _require_step(self.global_step)


def _from_trainer(data: Mapping[str, Any], file: Path) -> RunRecord:
    """Convert a Trainer's state to a record; see `RunRecord.load`."""
    state = from_mapping(_TrainerState, data, str(file), FormatError, ignore_unknown=True)
    entries = list(zip(state.log_history, data["log_history"], strict=True))
    last = max([state.global_step, *(entry.step for entry, _ in entries)])
    flops = _positive(state.total_flos)
    points, losses = [], []
    for entry, logged in sorted(entries, key=lambda pair: pair[0].step):
        spent = {} if flops is None or not last else {"flops": flops * entry.step / last}
        if (tokens := _tokens(logged)) is not None:
            spent["tokens"] = tokens
        numbers = {key: value for key, value in logged.items() if _is_number(value)}
        metrics = {k: v for k, v in numbers.items() if k.startswith("eval_") and not _TIMINGS.search(k)}
        if metrics:
            points.append(Point(entry.step, spent, metrics, entry.learning_rate))
        if "loss" in numbers:
            losses.append(Point(entry.step, spent, {"loss": numbers["loss"]}, entry.learning_rate))
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    metric = "eval_loss" if "eval_loss" in names or not names else names[0]
    totals = {name: absent(f"not in {STATE_FILE}") for name in UNITS}
    seconds = next((value for entry, _ in reversed(entries) if (value := _positive(entry.train_runtime))), None)
    if seconds is not None:
        totals["seconds"] = measured(seconds, "the Trainer's train_runtime since its last start, with evaluations")
    if flops is not None:
        totals["flops"] = modelled(flops, "the Trainer's total_flos, spread evenly over the steps")
    counts = [count for logged in (data, *data["log_history"]) if (count := _tokens(logged)) is not None]
    if counts:
        totals["tokens"] = measured(max(counts), "the Trainer's count")
    folder = file.parent.parent if _CHECKPOINT.fullmatch(file.parent.name) else file.parent
    return RunRecord(
        name=folder.resolve().name or STATE_FILE,
        metric=metric,
        direction=direction_of(metric),
        resource="flops" if flops is not None else "tokens" if counts else "seconds",
        totals=totals,
        points=tuple(points),
        losses=tuple(losses),
        about=_adapter(file.parent) or _adapter(folder),
    )


def _adapter(folder: Path) -> dict[str, Any]:
    """Read the facts about the model from an adapter's config beside the state; empty without one."""
    file = folder / "adapter_config.json"
    config = _parsed(file) if file.is_file() else None
    if not isinstance(config, Mapping):
        return {}
    return {"peft_config": dict(config), "model_id": config.get("base_model_name_or_path")}


def _require_step(step: int) -> None:
    if not 0 <= step < 2**63:
        raise FormatError(f"step must be at least 0 and below 2^63, got {str(step)[:40]}.")


def _is_finite(value: float | None) -> bool:
    try:
        return value is not None and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _tokens(logged: Mapping[str, Any]) -> float | None:
    return next((count for key in _TOKENS if (count := _positive(logged.get(key)))), None)


def _positive(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value < 1e300 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
