"""The books of one run: what it spent, what that brought, and whether to go on; for any training loop.

One process or several that torch.distributed has brought together. Knows no Trainer and no PEFT.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from .._files import require_writable
from .._processes import of_first_process, process_count
from ..errors import BlueprintError, FormatError
from .figures import RESOURCES, UNITS, Figure, absent, across_processes
from .ledger import Ledger
from .record import RUN_FILE, Direction, Point, RunRecord, direction_of
from .stopping import Decision, MarginalReturn


TIME_BETWEEN_SAVES = 1000  # times what writing the record takes, before an evaluation writes it again
MOST_LOSSES = 4096  # entries of the training log that are kept; beyond it every second goes

_LOG = logging.getLogger(__name__)


class RunLog:
    """Keeps a run's ledger and its evaluations, asks the rule whether to stop, and writes `run.json`.

    In a loop of your own, under accelerate or torchrun or alone:

        log = RunLog("pretraining", metric="loss", stop=MarginalReturn(), output_dir="run")
        with log:
            for step, batch in enumerate(batches, 1):
                ...  # forward, backward, optimizer.step()
                log.step(tokens=batch["input_ids"].numel())
                if step % 100 == 0:
                    decision = log.evaluate(evaluate(model), step=step, progress=step / steps)
                    if decision is not None and decision.stop:
                        break

    Every process gives its own tokens to `step`, and every process must call `evaluate`, `settle` and the end of the
    `with`: there they add up what they spent, and there the first process's decision becomes that of all. It alone
    writes. Keeping the books never ends a run: what goes wrong there is said in a warning, and the run goes on.

    Args:
        name: of the run, for reports.
        metric: what counts, a name in what `evaluate` is given.
        direction: whether a lower or a higher metric is better; by default the rule's, else what the name suggests.
        resource: what counts as spent, one of `figures.RESOURCES`.
        stop: the rule; without it nothing is decided.
        ledger: of this process; by default one with all meters there are. Tokens and FLOPs come from `step`.
        output_dir: where the record goes; without it nothing is written.
        about: what else the record should say; see `RunRecord`.

    Raises:
        BlueprintError: for an unknown resource or direction, a rule with the other direction, no name or metric, or a
            folder that cannot be written.
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
        check_resource(resource)
        if stop is not None and not isinstance(stop, MarginalReturn):
            raise BlueprintError(f"stop={stop!r} is no rule: give a MarginalReturn, or None.")
        if stop is not None and direction not in (None, stop.direction):
            raise BlueprintError(
                f"direction={direction!r} of {metric!r} and MarginalReturn(direction={stop.direction!r}) do not agree: "
                "give both the same."
            )
        self.metric = metric
        self.resource = resource
        self.stop = stop
        self.direction: Direction = direction or (stop.direction if stop is not None else direction_of(metric))
        self.name = name
        self.output_dir = None if output_dir is None else Path(output_dir)
        if self.output_dir is not None:
            require_writable(self.output_dir)
        self.ledger = Ledger() if ledger is None else ledger
        self.about: dict[str, Any] = dict(about or {})
        self.decision: Decision | None = None  # the last
        self.stopped_at: int | None = None
        self.seconds = {"evaluating": 0.0, "saving": 0.0}  # among those spent
        self.points: list[Point] = []
        self.losses: list[Point] = []
        self._totals: dict[str, Figure] = {}
        self._warned: set[str] = set()
        self._next_save = 0.0
        self._said: dict[int, tuple[Point, dict[str, Any]]] = {}  # with the point, so that its id stays its own
        self.record()  # a wrong direction should not wait

    def __enter__(self) -> RunLog:
        self.ledger.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:  # the other processes may not come to add up
            self.ledger.pause()
            self.save()

    def step(self, tokens: int = 0, flops: float | None = None) -> None:
        """Count what this process was given since the last call; a few microseconds.

        Args:
            tokens: input positions, padding included.
            flops: floating-point operations, if they are known better than tokens times the ledger's FLOPs per token.
        """
        self.ledger.add(tokens=tokens, flops=flops)

    def note_optimizer(self, optimizer: Optimizer) -> None:
        """Count the bytes of an optimizer's states; after its first step."""
        with self.keeping("the bytes of the optimizer's states"):
            self.ledger.note_optimizer(optimizer)

    def note_loss(self, loss: float, *, step: int, learning_rate: float | None = None) -> None:
        """Keep an entry of the training log, with what had been spent when the processes last added up."""
        self.losses.append(Point(step, self.spent(), {"loss": float(loss)}, learning_rate))
        if len(self.losses) > MOST_LOSSES:
            del self.losses[-2::-2]
            self._said.clear()

    def settle(self) -> dict[str, Figure]:
        """What all processes have spent by now, from the run's beginning, resumptions included; of every process."""
        own: dict[str, Figure] | None = None
        with self.keeping("what was spent"):
            own = self.ledger.figures()
        parts = _everyones(own)
        if all(part is not None for part in parts):
            self._totals = across_processes(parts)
        return self._totals

    def totals(self) -> dict[str, Figure]:
        """What all processes had spent when they last added up."""
        return dict(self._totals)

    def spent(self) -> dict[str, float]:
        """The same as numbers, without what is absent."""
        return {name: figure.value for name, figure in self._totals.items() if figure.value is not None}

    def evaluate(
        self,
        metrics: float | Mapping[str, float],
        *,
        step: int,
        learning_rate: float | None = None,
        progress: float | None = None,
    ) -> Decision | None:
        """Take in an evaluation, and decide.

        Several of one step, of one data set each say, make one point of the record; the one with the metric decides. Of
        step 0, of the untrained model, nothing is to be decided.

        Args:
            metrics: the metric, or several by name.
            step: optimizer steps done.
            learning_rate: at this step.
            progress: share of the planned steps that is done, in [0, 1].

        Returns:
            The decision, the same in every process; None without a rule, or without the metric among `metrics`.

        Raises:
            BlueprintError: if the step is before the last; in every process, if nothing counts the resource here, with
                those that are counted.
        """
        given = metrics if isinstance(metrics, Mapping) else {self.metric: metrics}
        found = {name: float(value) for name, value in given.items()}
        if self.points and step < self.points[-1].step:
            raise BlueprintError(
                f"step={step} was evaluated after step {self.points[-1].step}. Give the optimizer steps done since the "
                "run began; after a resumption load its state."
            )
        self.settle()
        if self.points and self.points[-1].step == step:
            found = {**self.points.pop().metrics, **found}
        self.points.append(Point(step, self.spent(), found, learning_rate))
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
        if last is not None and (now is None or now < last):  # a meter failed, say; all processes see the same
            with self.keeping(f"decisions by {self.resource}"):
                raise BlueprintError(f"{last:g} had been spent at the last check, and {now} is counted now")
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
        is_over = progress is not None and progress >= 1  # nothing is left to stop
        if decision.stop and self.stopped_at is None and not is_over:
            self.stopped_at = step
            if _is_first():
                _LOG.warning("%s: %s", self.name, decision.reason)
        return decision

    def require_resource(self) -> None:
        """Raise BlueprintError if nothing counts the resource here; names those that are counted."""
        figure = self._totals.get(self.resource)
        if figure is None or figure.value is None:
            there = [name for name in RESOURCES if name in self.spent()]
            why = f" ({figure.source})" if figure is not None and figure.source else ""
            raise BlueprintError(
                f"resource={self.resource!r} is absent here{why}, so that no return on it can be told. Counted are "
                f"{', '.join(there) or 'none'}: give one of them, or what makes it known (LedgerCallback's watts=, carbon=)."
            )

    def finish(self) -> RunRecord:
        """Add up for the last time, stop the clock, write the record, and say in the log what the run came to."""
        self.ledger.pause()
        self.settle()
        self.save()
        if _is_first():
            _LOG.info("%s", "; ".join(line.strip() for line in self.summary().splitlines()))
        return self.record()

    def record(self) -> RunRecord:
        """The run so far."""
        stopping = None
        if self.stop is not None:
            said = {} if self.decision is None else self.decision.to_dict()
            stopped = {"stopped": self.stopped_at is not None, "step": self.stopped_at}
            stopping = {**said, "settings": self.stop.settings(), **stopped}
        return RunRecord(
            name=self.name,
            metric=self.metric,
            direction=self.direction,
            resource=self.resource,
            totals={name: self._totals.get(name) or absent("not counted yet") for name in UNITS},
            points=tuple(self.points),
            losses=tuple(self.losses),
            stopping=stopping,
            about={**self.about, "seconds_of_which": dict(self.seconds)},
        )

    def save(self, folder: str | Path | None = None) -> None:
        """Write `run.json` whole or not at all, in the first process; a folder that cannot be written is a warning.

        Evaluations write it too, unless that would take more than a thousandth of the time.
        """
        start = time.perf_counter()
        target = self.output_dir if folder is None else Path(folder)
        if target is not None and _is_first():
            with self.keeping(f"{target / RUN_FILE}"):
                target.mkdir(parents=True, exist_ok=True)
                self.record().save(target / RUN_FILE)
        end = time.perf_counter()
        self._next_save = end + TIME_BETWEEN_SAVES * (end - start)

    def summary(self) -> str:
        """What the run spent and brought, a line for each figure, with its label and its source."""
        head = self.name
        values = [(p.step, p.metrics[self.metric]) for p in self.points if self.metric in p.metrics]
        if values:
            head += (
                f": {self.metric} {values[0][1]:.4g} at step {values[0][0]}, {values[-1][1]:.4g} at {values[-1][0]}"
            )
        lines = [head]
        for name in UNITS:
            figure = self._totals.get(name) or absent("not counted yet")
            amount = "–" if figure.value is None else f"{figure.value:,.4g} {UNITS[name]}"
            lines.append(f"  {name}: {amount} ({figure.how}{': ' if figure.source else ''}{figure.source})")
        for what, seconds in self.seconds.items():
            lines.append(f"  of which {what}: {seconds:,.4g} s (measured)")
        if self.decision is not None:
            lines.append(f"  {'stopped' if self.stopped_at is not None else 'not stopped'}: {self.decision.reason}")
            if self.decision.proposal:
                lines.append(f"  proposal: {self.decision.proposal}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as a JSON object: totals of all processes when they last added up."""
        return {
            "metric": self.metric,
            "resource": self.resource,
            "totals": {name: figure.to_dict() for name, figure in self._totals.items()},
            "points": self._dicts(self.points),
            "losses": self._dicts(self.losses),
            "seconds": dict(self.seconds),
            "decision": None if self.decision is None else self.decision.to_dict(),
            "stop": None if self.stop is None else self.stop.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there, in every process, however many there are now.

        Raises:
            FormatError: if it is no such state; nothing is changed then.
        """
        try:
            totals = {name: Figure.from_dict(figure) for name, figure in state["totals"].items() if name in UNITS}
            points = [Point.from_dict(point) for point in state["points"]]
            losses = [Point.from_dict(point) for point in state["losses"]]
            seconds = {name: float(state["seconds"][name]) for name in self.seconds}
            decision = None if state["decision"] is None else Decision(**state["decision"])
            rule = state["stop"]
            if totals and totals.keys() != UNITS.keys():
                raise ValueError(f"totals of {', '.join(totals)}")
            judged = [state.get(name, getattr(self, name)) for name in ("metric", "resource")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"This is no state of a RunLog ({type(error).__name__}: {error}). Take one from RunLog.state_dict()."
            ) from error
        if judged != [self.metric, self.resource]:
            _LOG.warning("%s was judged by %s per %s; the rule begins anew", self.name, *judged)
        elif self.stop is not None and rule is not None:
            self.stop.load_state_dict(rule)
        if _is_first():  # of the others, each begins at nought, so that nothing counts twice
            anew = {"optimizer_bytes": absent("no optimizer was noted")} if process_count() > 1 else {}
            figures = {name: figure.to_dict() for name, figure in (totals | anew).items()}
            self.ledger.load_state_dict({"figures": figures})
        elif "tokens" in totals and totals["tokens"].value is not None:
            self.ledger.add()  # none yet, which is not the same as absent
        self._totals = totals
        self.points, self.losses, self.seconds, self.decision = points, losses, seconds, decision

    def _dicts(self, points: list[Point]) -> list[dict[str, Any]]:
        """Points as JSON objects, each made once: of a long run there are thousands."""
        return [self._said.setdefault(id(point), (point, point.to_dict()))[1] for point in points]

    @contextmanager
    def keeping(self, what: str) -> Iterator[None]:
        """Let an error in here end nothing: it is said once in a warning."""
        try:
            yield
        except Exception as error:  # hours of training are worth more than their books
            if what not in self._warned:
                self._warned.add(what)
                _LOG.warning("The books of %s lack %s: %s: %s", self.name, what, type(error).__name__, error)


def check_resource(name: str) -> None:
    """Raise BlueprintError unless it is a resource that adds up while a run goes on."""
    if name not in RESOURCES:
        raise BlueprintError(f"resource={name!r} is not known: give one of {', '.join(RESOURCES)}.")


def _of_first(act: Callable[[], Any]) -> Any:
    """What the first process finds, on all; an error of its is raised on all."""
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


def _everyones(own: dict[str, Figure] | None) -> list[Any]:
    """What each process says, by rank."""
    if process_count() == 1:
        return [own]
    said: list[Any] = [None] * process_count()
    dist.all_gather_object(said, own)
    return said


def _is_first() -> bool:
    return process_count() == 1 or dist.get_rank() == 0
