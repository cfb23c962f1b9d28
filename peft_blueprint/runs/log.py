"""Keep the record of a running training loop: costs, gains, and whether to go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import require_writable
from .._options import from_mapping
from .._processes import of_every_process, of_first_process, process_count, process_rank
from ..errors import BlueprintError, FormatError
from .ledger import GB, Ledger
from .quantity import RESOURCES, UNITS, Direction, Quantity, absent, across_processes, format_number, format_quantity
from .record import RUN_FILE, Point, RunRecord, direction_of
from .report import WINDOW
from .stopping import Decision, MarginalReturn


if TYPE_CHECKING:
    from torch.optim import Optimizer

TIME_BETWEEN_SAVES = 1000  # times the time of one save, before an evaluation saves again
MOST_LOSSES = 4096  # entries kept of the training log; beyond that every second one is dropped

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    metric: str
    resource: str
    totals: Mapping[str, Quantity]
    points: tuple[Point, ...]
    losses: tuple[Point, ...]
    seconds: Mapping[str, float]
    decision: Decision | None
    stop: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        if self.totals and self.totals.keys() != UNITS.keys():
            raise FormatError(f"totals must be {', '.join(UNITS)}, got {', '.join(self.totals)}.")


class RunLog:
    """Keeps a ledger and the evaluations of a run, asks the rule whether to stop, and writes `run.json`.

    With several processes, each passes its own tokens to `step`, and all must call `evaluate`, `settle` and the end of
    the `with`, where they add up their costs and take over the first process's decision. Only the first process
    writes. An error in the bookkeeping is a warning and never ends the run.

    Args:
        name: of the run, for reports.
        metric: the metric to judge by, a name in the metrics given to `evaluate`.
        direction: whether a lower or a higher metric is better; by default the rule's, otherwise guessed from the name.
        resource: the resource to judge by, one of `RESOURCES`.
        stop: the rule; without it nothing is decided.
        ledger: of this process; by default one with all meters. Tokens and FLOPs come from `step`.
        output_dir: folder of the record; without it nothing is written.
        about: further facts for the record; see `RunRecord`.

    Raises:
        BlueprintError: for an unknown resource or direction, a rule with the other direction, an empty name or metric,
            or a folder that cannot be written.

    Example:
        In your own loop, also under accelerate or torchrun:

        >>> batches = [[5, 6, 7, 8]] * 9
        >>> log = RunLog("pretraining", stop=MarginalReturn(), output_dir="run")
        >>> with log:
        ...     for step, batch in enumerate(batches, 1):
        ...         pass  # forward, backward, optimizer.step()
        ...         log.step(tokens=len(batch))
        ...         if step % 3 == 0:
        ...             with log.evaluating():
        ...                 loss = 3 / step
        ...             decision = log.evaluate(loss, step=step, progress=step / len(batches))
        ...             with log.saving():
        ...                 pass  # torch.save(model.state_dict(), "model.pt")
        ...             if decision is not None and decision.stop:
        ...                 break
        >>> log.record().totals["tokens"].value
        36.0
    """

    def __init__(
        self,
        name: str,
        *,
        metric: str = "loss",
        direction: Direction | None = None,
        resource: str = "seconds",
        stop: MarginalReturn | None = None,
        ledger: Ledger | None = None,
        output_dir: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if resource not in RESOURCES:
            raise BlueprintError(f"resource must be one of {', '.join(RESOURCES)}, got {resource!r}.")
        if stop is not None and not isinstance(stop, MarginalReturn):
            raise BlueprintError(f"stop must be a MarginalReturn or None, got {stop!r}.")
        if stop is not None and stop.direction is not None and direction not in (None, stop.direction):
            raise BlueprintError(
                f"direction={direction!r} of {metric!r} and MarginalReturn(direction={stop.direction!r}) must be equal."
            )
        self.metric = metric
        self.resource = resource
        self.stop = stop
        self.direction: Direction = direction or (stop and stop.direction) or direction_of(metric)
        if stop is not None:
            stop.direction = self.direction
        self.name = name
        self.output_dir = None if output_dir is None else Path(output_dir)
        if self.output_dir is not None:
            require_writable(self.output_dir)
        self.ledger = Ledger() if ledger is None else ledger
        self.about: dict[str, Any] = dict(about or {})
        self.decision: Decision | None = None  # the last
        self.stopped_at: int | None = None
        self.seconds = {"evaluating": 0.0, "saving": 0.0}  # included in the run's seconds
        self.points: list[Point] = []
        self.losses: list[Point] = []
        self._totals: dict[str, Quantity] = {}
        self._of_which = dict(self.seconds)  # at the last `settle`, the longest of all processes
        self._warned: set[str] = set()
        self._next_save = 0.0
        self._dicts: dict[int, tuple[Point, dict[str, Any]]] = {}  # the point is kept so that its id is not reused
        self.record()  # raises for a bad direction, name or metric

    def __enter__(self) -> RunLog:
        self.ledger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:  # the other processes may not reach the exchange
            self.ledger.pause()
            self.save()

    def step(self, tokens: int = 0, flops: float | None = None) -> None:
        """Count the work of this process since the last call; takes microseconds.

        Args:
            tokens: input positions, padding included.
            flops: floating-point operations, instead of tokens times the ledger's FLOPs per token.
        """
        self.ledger.add(tokens=tokens, flops=flops)

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """Count the bytes of an optimizer's states; call it after the first step."""
        with self.guarded("the optimizer's bytes"):
            self.ledger.note_optimizer(optimizer)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time inside the `with` as evaluating, which is a part of the run's seconds and energy."""
        with self._timed("evaluating"):
            yield

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time inside the `with` as saving checkpoints, which is a part of the run's seconds and energy.

        Saving thus raises ΔΓ between two checks, unless the resource is counted in tokens or FLOPs (paper, §3).

        Example:
            >>> log = RunLog("pretraining", ledger=Ledger(meters=[]))
            >>> with log, log.saving():
            ...     pass  # torch.save(model.state_dict(), "model.pt")
            >>> 0 < log.seconds["saving"] <= log.ledger.seconds
            True
        """
        with self._timed("saving"):
            yield

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start
            with self.guarded("the meters"):
                self.ledger.look_if_due()

    def note_loss(self, loss: float, *, step: int, learning_rate: float | None = None) -> None:
        """Add an entry of the training log, with the totals of the last `settle`."""
        self.losses.append(Point(step, self.spent(), {"loss": float(loss)}, learning_rate))
        if len(self.losses) > MOST_LOSSES:
            del self.losses[-2::-2]
            self._dicts.clear()

    def settle(self) -> dict[str, Quantity]:
        """Add up what all processes have spent since the run began, with resumptions; every process must call it."""
        own: dict[str, Quantity] | None = None
        with self.guarded("totals"):
            own = self.ledger.quantities()
        parts, seconds = zip(*of_every_process((own, dict(self.seconds))), strict=True)
        self._of_which = {part: max(of_one[part] for of_one in seconds) for part in self.seconds}
        if None not in parts:
            self._totals = across_processes(parts)
        return self._totals

    def totals(self) -> dict[str, Quantity]:
        """Return the totals of all processes at the last `settle`."""
        return dict(self._totals)

    def spent(self) -> dict[str, float]:
        """Return the values of the totals that are not absent."""
        return {name: quantity.value for name, quantity in self._totals.items() if quantity.value is not None}

    def evaluate(
        self,
        metrics: float | Mapping[str, float],
        *,
        step: int,
        learning_rate: float | None = None,
        progress: float | None = None,
    ) -> Decision | None:
        """Add an evaluation and decide.

        Evaluations of one step, for example of several data sets, make one point; the one with the metric decides. At
        step 0, for the untrained model, nothing is decided.

        Args:
            metrics: the metric, or several by name.
            step: optimizer steps done.
            learning_rate: at this step.
            progress: share of the planned steps done, in [0, 1].

        Returns:
            The decision, the same in every process; None without a rule or without the metric.

        Raises:
            BlueprintError: if the step decreases; in every process, if the resource is absent.
        """
        given = metrics if isinstance(metrics, Mapping) else {self.metric: metrics}
        found = {name: float(value) for name, value in given.items()}
        if self.points and step < self.points[-1].step:
            raise BlueprintError(
                f"step must not decrease, got {step} after {self.points[-1].step}. Count optimizer steps since the run "
                "began; after a resumption load its state."
            )
        self.settle()
        if self.points and self.points[-1].step == step:
            found = {**self.points.pop().metrics, **found}
        self.points.append(Point(step, self.spent(), found, learning_rate, self._of_which))
        value = given.get(self.metric)
        decision = None
        if self.stop is not None and value is not None and step > 0:
            decision = self._decide(self.stop, float(value), step, learning_rate, progress)
        if time.perf_counter() >= self._next_save:
            self.save()
        return decision

    def _decide(
        self, rule: MarginalReturn, value: float, step: int, learning_rate: float | None, progress: float | None
    ) -> Decision | None:
        now, last = self.spent().get(self.resource), rule.last_resource
        if last is not None and (now is None or now < last):  # a meter failed, for example; the same in all processes
            with self.guarded(f"decisions by {self.resource}"):
                raise BlueprintError(f"it fell from {last:g} at the last check to {now}")
            return None

        def ask() -> Decision:
            self.require_resource()
            return rule.check(
                self.spent()[self.resource], value, step=step, learning_rate=learning_rate, progress=progress
            )

        decision, state = _of_first(lambda: (ask(), rule.state_dict()))
        if not _is_first():
            rule.load_state_dict(state)
        self.decision = decision
        is_over = progress is not None and progress >= 1  # there is nothing left to stop
        if decision.stop and self.stopped_at is None and not is_over:
            self.stopped_at = step
            if _is_first():
                _LOG.warning("%s: %s", self.name, decision.reason)
        return decision

    def require_resource(self) -> None:
        """Raise BlueprintError if the resource is absent; the message names those that are counted."""
        quantity = self._totals.get(self.resource)
        if quantity is None or quantity.value is None:
            counted = ", ".join(name for name in RESOURCES if name in self.spent())
            why = f" ({quantity.source})" if quantity is not None and quantity.source else ""
            raise BlueprintError(
                f"resource={self.resource!r} is absent{why}. Use one of {counted or 'none'}, or give what it needs, such "
                "as LedgerCallback's watts= and carbon=."
            )

    def finish(self) -> RunRecord:
        """Stop the clock, add up for the last time, write the record, and log the summary."""
        self.ledger.pause()
        self.settle()
        self.save()
        if _is_first():
            _LOG.info("%s", "; ".join(line.strip() for line in self.summary().splitlines()))
        return self.record()

    def record(self) -> RunRecord:
        """Return the record of the run so far."""
        stopping = None
        if self.stop is not None:
            decision = {} if self.decision is None else self.decision.to_dict()
            stopped = {"stopped": self.stopped_at is not None, "step": self.stopped_at}
            stopping = {**decision, "settings": self.stop.settings(), **stopped}
        return RunRecord(
            name=self.name,
            metric=self.metric,
            direction=self.direction,
            resource=self.resource,
            totals={name: self._totals.get(name) or absent("not counted yet") for name in UNITS},
            points=tuple(self.points),
            losses=tuple(self.losses),
            stopping=stopping,
            about={**self.about, "seconds_of_which": dict(self.seconds), **self._optimizer_share()},
        )

    def save(self, folder: str | Path | None = None) -> None:
        """Write `run.json` atomically, in the first process; a folder that cannot be written is a warning.

        Evaluations write it too, as long as that takes at most a thousandth of the time.
        """
        start = time.perf_counter()
        target = self.output_dir if folder is None else Path(folder)
        if target is not None and _is_first():
            with self.guarded(f"{target / RUN_FILE}"):
                target.mkdir(parents=True, exist_ok=True)
                self.record().save(target / RUN_FILE)
        end = time.perf_counter()
        self._next_save = end + TIME_BETWEEN_SAVES * (end - start)

    def summary(self) -> str:
        """Return the run's gain and costs, with one line per quantity, its label and its source."""
        head = self.name
        values = [(p.step, p.metrics[self.metric]) for p in self.points if self.metric in p.metrics]
        if values:
            head += (
                f": {self.metric} {values[0][1]:.4g} at step {values[0][0]}, {values[-1][1]:.4g} at {values[-1][0]}"
            )
        lines = [head]
        for name in UNITS:
            total = self._totals.get(name) or absent("not counted yet")
            source = f": {total.source}" if total.source else ""
            lines.append(f"  {name}: {format_quantity(total.value, name, digits=4)} ({total.how}{source})")
        last = self._shares_of_last_window()
        for part, seconds in self.seconds.items():
            share = f", {last[part]:.1%} of the last window" if last else ""
            lines.append(f"  of these {part}: {format_quantity(seconds, 's', digits=4)}{share} (measured)")
        for gb_hours in self._optimizer_share().values():
            lines.append(
                f"  optimizer states: {format_number(gb_hours)} GB·h (modelled: their bytes times the seconds)"
            )
        if self.decision is not None:
            lines.append(f"  {'stopped' if self.stopped_at is not None else 'not stopped'}: {self.decision.reason}")
            if self.decision.proposal:
                lines.append(f"  proposal: {self.decision.proposal}")
        return "\n".join(lines)

    def _shares_of_last_window(self) -> dict[str, float]:
        """Return the shares of evaluating and saving in the seconds between the last evaluations; empty for too few."""
        points = [point for point in self.points if "seconds" in point.spent and point.of_which][-WINDOW:]
        elapsed = points[-1].spent["seconds"] - points[0].spent["seconds"] if points else 0.0
        if not elapsed > 0:
            return {}
        return {part: (points[-1].of_which[part] - points[0].of_which[part]) / elapsed for part in self.seconds}

    def _optimizer_share(self) -> dict[str, float]:
        """Return the optimizer states' part of the memory that is held over time, in GB·h; empty if it is not known."""
        spent = self.spent()
        if not {"optimizer_bytes", "seconds"} <= spent.keys():
            return {}
        return {"optimizer_gb_hours": spent["optimizer_bytes"] / GB * spent["seconds"] / 3600}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs as a JSON object, with the totals of the last `settle`."""
        return {
            "metric": self.metric,
            "resource": self.resource,
            "totals": {name: total.to_dict() for name, total in self._totals.items()},
            "points": self._as_dicts(self.points),
            "losses": self._as_dicts(self.losses),
            "seconds": dict(self.seconds),
            "decision": None if self.decision is None else self.decision.to_dict(),
            "stop": None if self.stop is None else self.stop.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`; every process must call it, however many there are now.

        Raises:
            FormatError: for anything else; nothing changes then.
        """
        loaded = from_mapping(_State, state, "The state of RunLog", FormatError)
        if (loaded.metric, loaded.resource) != (self.metric, self.resource):
            before = f"{loaded.metric} per {loaded.resource}"
            _LOG.warning("%s was judged by %s before; the stopping rule starts again", self.name, before)
        elif self.stop is not None and loaded.stop is not None:
            self.stop.load_state_dict(loaded.stop)
        totals = dict(loaded.totals)
        if totals and _is_first():  # the other processes start at zero, so that nothing counts twice
            own = {"optimizer_bytes": absent("no optimizer was noted")} if process_count() > 1 else {}
            self.ledger.load_state_dict({"quantities": {name: q.to_dict() for name, q in (totals | own).items()}})
        elif totals and totals["tokens"].value is not None:
            self.ledger.add()  # zero tokens, which is not the same as absent
        self._totals, self.decision = totals, loaded.decision
        self.points, self.losses = list(loaded.points), list(loaded.losses)
        self.seconds |= {name: seconds for name, seconds in loaded.seconds.items() if name in self.seconds}

    def _as_dicts(self, points: list[Point]) -> list[dict[str, Any]]:
        """Convert points to JSON objects, each once: a long run has thousands."""
        return [self._dicts.setdefault(id(point), (point, point.to_dict()))[1] for point in points]

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn an error in the `with` into one warning, because bookkeeping must not end a training run."""
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                _LOG.warning(
                    "%s continues without %s in its record: %s: %s", self.name, what, type(error).__name__, error
                )


def _of_first(act: Callable[[], Any]) -> Any:
    """Return the first process's result in all processes; its error is raised in all of them."""
    found: Any = None
    error: BlueprintError | None = None
    if _is_first():
        try:
            found = act()
        except BlueprintError as raised:
            error = raised
    found, error = of_first_process((found, error))
    if error is not None:
        raise error
    return found


def _is_first() -> bool:
    return process_rank() == 0
