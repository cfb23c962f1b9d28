"""The training of a recipe, with its books: transformers' Trainer, the ledger, and the rule that may end it early.

Knows nothing of how the model was prepared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainingArguments

from ..data import Row, collate, make_batches
from ..measure import parameters_per_token
from ..runs import RESOURCES, Figure, Ledger, Point, RunRecord, carbon_factor, largest, modelled, total
from .checkpointing import CheckpointAbove
from .initialization import initialize_along_gradient
from .ledger_callback import LedgerCallback
from .recipe import Recipe, rule_of


HELD_OUT = "held_out_loss"
Spent = Mapping[str, Figure]

_AT_ONCE = 8  # examples, as in the probe


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        steps: optimizer steps.
        record: its books, as they stand in `run.json`.
        summary: the same in lines to print.
    """

    steps: int
    record: RunRecord
    summary: str


def train(
    model: PeftModel,
    rows: Sequence[Row],
    arguments: TrainingArguments,
    pad_token_id: int,
    *,
    held_out: Sequence[Row] = (),
    stop: Mapping[str, Any] | None = None,
    carbon: str | float | None = None,
) -> Trained:
    """Train with transformers' Trainer, keep books, and stop when it no longer pays, if asked to.

    Args:
        model: with its adapter.
        rows: to train on.
        arguments: of the Trainer.
        pad_token_id: what fills a batch.
        held_out: what the Trainer evaluates on, if its arguments say that it does.
        stop: `MarginalReturn`'s settings, with `metric` and `resource`; None for the whole length.
        carbon: see `carbon_factor`.

    Raises:
        BlueprintError: for settings that do not go together.
    """
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(held_out) or None,
        data_collator=partial(collate, pad_token_id=pad_token_id),
        callbacks=[CheckpointAbove()],
    )
    rule, options = rule_of(stop)
    books = LedgerCallback(trainer, stop=rule, carbon=carbon, **options)
    trainer.add_callback(books)
    trainer.train()
    return Trained(trainer.state.global_step, books.log.record(), books.summary())


def start(model: PeftModel, recipe: Recipe, rows: Sequence[Row], pad_token_id: int, *, progress: bool = True) -> Spent:
    """Begin the adapters along the gradient of the recipe's first `start_examples` rows, if it asks for that.

    Returns:
        What that spent; empty where there was nothing to do.
    """
    chosen = rows[: recipe.start_examples]
    if not chosen:
        return {}
    flops = modelled(4.0 * parameters_per_token(model)[0], "2 FLOP a weight forward, 2 backward")
    batches = make_batches(chosen, _AT_ONCE, pad_token_id)
    with Ledger(flops_per_token=flops, carbon=carbon_factor(recipe.carbon)) as ledger:
        initialize_along_gradient(model, batches, max_examples=len(chosen), seed=recipe.seed, progress=progress)
        ledger.add(sum(batch["input_ids"].numel() for batch in batches))
    return ledger.figures()


def with_ends(trained: Trained, before: float | None, after: float | None) -> RunRecord:
    """The record with the held-out losses from before and after, in nats per target token, as its evaluations where the
    Trainer made none.
    """
    record = trained.record
    if before is None or after is None or record.metric != "loss" or record.stopping is not None:
        return record
    spent = {name: figure.value for name, figure in record.totals.items() if figure.value is not None}
    ends = (Point(0, {}, {HELD_OUT: before}), Point(trained.steps, spent, {HELD_OUT: after}))
    return replace(record, metric=HELD_OUT, direction="minimize", points=ends)


def with_probe(record: RunRecord, probe: Spent, about: Mapping[str, Any], what: str = "probe") -> RunRecord:
    """The record with what the probe spent, or another act before training of that name, charged to the run: in its
    totals and from its first step on.
    """

    def charged(point: Point) -> Point:
        more = {name: value + (probe[name].value or 0.0) for name, value in point.spent.items() if name in added}
        return replace(point, spent={**point.spent, **more}) if point.step > 0 else point

    added = set(RESOURCES) & probe.keys()
    totals = {
        name: total((figure, probe[name])) if name in added else figure for name, figure in record.totals.items()
    }
    if probe:
        totals["peak_bytes"] = largest((record.totals["peak_bytes"], probe["peak_bytes"]))
        about = {**about, what: {key: figure.to_dict() for key, figure in probe.items()}}
    return replace(
        record,
        totals=totals,
        points=tuple(map(charged, record.points)),
        losses=tuple(map(charged, record.losses)),
        about={**record.about, **about},
    )
