"""Which examples to train on: `select_examples` scores a data set in one of several ways and keeps the best.

The face of choosing data. Knows nothing of files but the one that lets it resume.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import nn

from .._processes import process_count
from .._text import format_names
from ..errors import BlueprintError, MismatchError
from ..measure import LossFunction, parameters_per_token
from ..place import Placement
from .alignment import Precondition, Similarity
from .brief_training import Train
from .methods import ITERATIVE, FeatureKind, Maker, iterate, lexical_scores
from .pool import Candidate, Example, Pool
from .resume import Progress, next_digest
from .scan import Picked, Scan
from .scoring import Work
from .selection_checks import (
    EMPTY_TARGET,
    check_wish,
    digest_of_model,
    encoded,
    method_of,
    names_of,
    padding_of,
    wanted_of,
)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_METHOD = "random"  # none was found to win at the same total cost

_LOG = logging.getLogger(__name__)
_SCORE, _INDEX = "selection_score", "selection_index"


@dataclass(frozen=True, eq=False)
class Selection:
    """Which examples were chosen, how, and what that cost.

    Args:
        indices: positions in the data, in its order.
        scores: of these, as they were measured or predicted; for a coreset minus the order of choice, for "random" keys.
        method: its name.
        settings: what else was asked for.
        report: `examples`, `usable`, `without_targets`, `duplicates`, `chosen`; `cost`, see `scoring.Cost`, summed over
            processes, with `share_of_measuring_all`: its FLOPs over those of measuring every example; and where scores
            were predicted `predictor`, with its held-out rank correlation.
        fallbacks: what was done otherwise than asked, in words.
        all_scores: (examples,) of all of what is no stream, NaN where there is none; None of a stream or coreset.
        rows: the chosen examples of a stream; None of what can be read again.
    """

    indices: tuple[int, ...]
    scores: tuple[float, ...]
    method: str
    settings: Mapping[str, Any]
    report: Mapping[str, Any]
    fallbacks: tuple[str, ...] = ()
    all_scores: np.ndarray | None = field(default=None, repr=False)
    rows: tuple[Example, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, dataset: Any = None, with_scores: bool = False) -> Any:
        """The chosen examples, in their order.

        Args:
            dataset: what was chosen from; not needed for a stream.
            with_scores: add the columns `selection_score` and `selection_index`, the position in the data.

        Returns:
            Of a `datasets.Dataset` another, made by its `select`; otherwise a list.

        Raises:
            BlueprintError: without a data set where one is needed, or if it has these columns already.
            MismatchError: for a data set of another length.
        """
        columns: dict[str, list[Any]] = {}
        if with_scores:
            columns = {_SCORE: list(self.scores), _INDEX: list(self.indices)}
        if dataset is None and self.rows is None:
            raise BlueprintError("Give the data set that was chosen from: selection.apply(dataset).")
        if dataset is not None and isinstance(dataset, Sized):
            expected = self.report["examples"]
            if len(dataset) != expected:
                raise MismatchError(
                    f"The selection is of {expected} examples and this data set has {len(dataset)}. Apply it to the data "
                    "that was chosen from."
                )
        if dataset is not None and _is_dataset(dataset):
            taken = set(columns) & set(dataset.column_names)
            if taken:
                raise BlueprintError(
                    f"The data set has {format_names(sorted(taken))} already. Remove it, or add no scores."
                )
            chosen = dataset.select(list(self.indices))
            for name, values in columns.items():
                chosen = chosen.add_column(name, values)
            return chosen
        rows = [dict(row) for row in self._rows_of(dataset)]
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                if name in row:
                    raise BlueprintError(f"The examples have {name!r} already. Remove it, or add no scores.")
                row[name] = value
        return rows

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; scores of examples that were not chosen, and the examples themselves, are left out."""
        return {
            "method": self.method,
            "indices": list(self.indices),
            "scores": list(self.scores),
            "settings": dict(self.settings),
            "report": dict(self.report),
            "fallbacks": list(self.fallbacks),
        }

    def _rows_of(self, dataset: Any) -> Iterator[Example]:
        if dataset is None:
            assert self.rows is not None
            yield from self.rows
        elif isinstance(dataset, Sized):
            yield from (dataset[index] for index in self.indices)  # type: ignore[index]
        else:
            stream, at = iter(dataset), 0
            for index in self.indices:
                found = next(islice(stream, index - at, None), None)
                if found is None:
                    raise MismatchError(f"The stream ends before example {index}. Apply it to the data chosen from.")
                at = index + 1
                yield found


def select_examples(
    model: nn.Module | None,
    dataset: Iterable[Example],
    *,
    fraction: float | None = None,
    count: int | None = None,
    method: str = DEFAULT_METHOD,
    tokenizer: PreTrainedTokenizerBase | None = None,
    columns: Mapping[str, str] | None = None,
    target: Iterable[Example] | None = None,
    placement: Placement | None = None,
    submodules: Sequence[str] | None = None,
    small: int = 64,
    features: FeatureKind = "model",
    similarity: Similarity = "cosine",
    precondition: Precondition = "none",
    iterations: int = 2,
    train: Train | None = None,
    train_steps: int = 16,
    loss_fn: LossFunction | None = None,
    deduplicate: bool = True,
    keep_state: str | Path | None = None,
    state_every: int = 1024,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Choose examples to train on.

    Methods, each of which keeps the highest scores:

    - "random".
    - "predicted_norm", the paper's Algorithm 2: measure J(z) = ‖∇L(z)‖ of a small random subset, learn to predict it from
      cheap features, predict it of all. "norm" measures all, and "norm_low" keeps the lowest. What is unusual
      has large gradients, noise among it.
    - "alignment": the cosine of an example's gradient with the mean gradient of `target`, as in LESS (Xia et al. 2024,
      arXiv:2402.04333) but without its warm-up, from sketches that are forgotten batch by batch. "predicted_alignment"
      measures a few and predicts the others.
    - "loss", "loss_low", "length" (most target tokens) and "length_short", "bm25" (words in common with `target`):
      controls.
    - "coreset_k_centre" and "coreset_facility": examples whose gradients' directions stand for all; the latter of at most
      50,000.
    - "iterative": choose, train briefly, measure again in the state so reached, and so on; by predicted alignment where
      there is a target, else by predicted norm. The model is given back as it was.

    A list or `datasets.Dataset` is scored whole; a stream in memory that grows with `count` alone, and with `small` where
    scores are predicted. Both give the same, but for two things: examples to learn from are drawn from a stream's first
    1000 or so; and its near-duplicates are told from what is kept at the time, so that where one example is much like two
    that are not like each other, another may be chosen. Under `torchrun` or `accelerate launch` call it on every process,
    each with all the data: the work is divided, and all choose the same.

    Args:
        model: as for `measure_influence`; None for methods that ask no model ("random", "length", "bm25") on examples
            that are encoded, or with a tokenizer.
        dataset: examples, see `candidates.Pool`.
        fraction: q, the share to keep, (0, 1]; of what is no stream.
        count: or how many.
        method: see above.
        tokenizer: the model's; not needed for encoded examples.
        columns: what the data calls `prompt`, `completion`, `messages` or `text`.
        target: a few examples of what is wanted, in any of the data's forms; a few dozen. None of them should be in the
            data, where it would match itself.
        placement: of adapters; gradients are then those of the submodules that it trains.
        submodules: or their names.
        small: how many examples to measure for a prediction.
        features: what predictions are made from: "model", one forward pass over all, which alone costs about half of what
            measuring all does and ranks better; or "tokens", the text alone.
        similarity: "cosine" or "dot".
        precondition: of alignment, by submodule: "none", "adam" or "blocks", see `aligning.target_of`.
        iterations: rounds of choosing of "iterative".
        train: its `train(model, rows)`, which trains the model on encoded rows, in place; by default `train_steps` steps
            of LoRA on these submodules, or of the adapters that the model has.
        train_steps: of those, of `batch_size` examples each.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        deduplicate: pass over near-duplicates of what is chosen, see `lexical.NearDuplicates`.
        keep_state: a file from which a run that was killed is resumed, to exactly the same selection; it stays when all
            is done, and answers the same question again at once.
        state_every: examples after which it is written.
        batch_size: rows of a batch.
        max_length: tokens of an example; what is beyond is cut off.
        seed: of all that is drawn.
        progress: show a progress bar.

    Raises:
        BlueprintError: for an unknown method, both or neither of fraction and count, a fraction outside (0, 1], a missing
            target, submodules for a method that asks no model, no data or none with targets, too many for
            "coreset_facility", a stream where all must be known at once, or state that cannot be kept.
        MismatchError: for submodules that the model lacks, or kept state of other work or data.
        MeasurementError: for scores that are not finite, or if another process failed.
    """
    start = time.perf_counter()
    chosen = method_of(method, target is not None)
    pool = Pool(dataset, tokenizer, columns, max_length, requires_columns=True)
    check_wish(
        chosen,
        method,
        has_model=model is not None,
        has_target=target is not None,
        has_submodules=placement is not None or submodules is not None,
        length=pool.length,
        is_kept=keep_state is not None,
        numbers={
            "small": small,
            "iterations": iterations,
            "train_steps": train_steps,
            "batch_size": batch_size,
            "state_every": state_every,
        },
        seed=seed,
        features=features,
    )
    if chosen.uses_target and isinstance(target, Sized) and not len(target):
        raise BlueprintError(EMPTY_TARGET)
    wanted = wanted_of(pool.length, fraction, count)
    names = names_of(model, placement, submodules)
    aims = encoded(Pool(target, tokenizer, columns, max_length)) if chosen.uses_target and target is not None else []
    settings = {
        "count": None if count is None else wanted,
        "fraction": None if fraction is None else float(fraction),
        "submodules": None if names is None else len(names),
        "small": small if chosen.is_predicted else None,
        "features": features if chosen.is_predicted else None,
        "similarity": similarity if chosen.measure == "alignment" else None,
        "precondition": precondition if chosen.measure == "alignment" else None,
        "targets": len(aims) or None,
        "iterations": iterations if method == ITERATIVE else None,
        "deduplicate": deduplicate,
        "batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    rank = dist.get_rank() if process_count() > 1 else 0
    identity = {
        **settings,
        "method": method,
        "examples": pool.length,
        "columns": dict(columns or {}),
        "submodule_names": list(names or ()),
        "target": _digest_of(aims),
        "model": digest_of_model(model) if keep_state is not None and model is not None else None,
    }
    state = Progress(None if keep_state is None else Path(keep_state), identity, writes=rank == 0)
    work = Work(
        nn.Module() if model is None else model, names, batch_size, padding_of(model, tokenizer), seed, loss_fn
    )
    scan = Scan(pool, work, state, state_every, progress, start)
    scan.fallbacks += state.notes.get("fallbacks", [])
    if "cost" in state.notes:
        *tokens, work.cost.seconds = state.notes["cost"]
        if rank == 0:  # of all processes, counted once
            work.cost.forward_tokens, work.cost.measured_tokens = tokens
    if model is not None:
        work.cost.parameters, work.cost.backward = parameters_per_token(model, names)
    before = work.cost.seconds
    maker = Maker(scan, chosen, aims, similarity, precondition, features, small)
    all_scores, rows = None, None
    if pool.is_stream:
        picked, best = scan.best_of_stream(maker.scorer(), chosen.sign, wanted, deduplicate)
        payloads = {index: payload for index, _, payload in best.ranked()}
        rows = tuple(payloads[index] for index in sorted(payloads))
    else:
        if method == ITERATIVE:
            assert model is not None
            scored, picked = iterate(maker, model, wanted, deduplicate, iterations, train, train_steps)
        elif chosen.measure == "bm25":
            scored = lexical_scores(scan, aims)
            picked = scan.pick(scored, chosen, wanted, deduplicate, seed)
        else:
            scored = scan.every_score(maker.scorer())
            picked = scan.pick(scored, chosen, wanted, deduplicate, seed)
        if scored.values.ndim == 1:
            assert pool.length is not None
            all_scores = np.full(pool.length, np.nan)
            all_scores[scored.indices] = scored.values
    work.cost.seconds = before + time.perf_counter() - start
    if len(picked.indices) < wanted:
        scan.note(_shortfall(wanted, picked, scan))
    for said in scan.fallbacks:
        _LOG.warning("%s", said)
    scores = dict(zip(picked.indices, picked.scores, strict=True))
    return Selection(
        indices=tuple(sorted(scores)),
        scores=tuple(scores[index] for index in sorted(scores)),
        method=method,
        settings=settings,
        report=_report(scan, picked),
        fallbacks=tuple(scan.fallbacks),
        all_scores=all_scores,
        rows=rows,
    )


def _report(scan: Scan, picked: Picked) -> dict[str, Any]:
    notes, examples = scan.progress.notes, scan.progress.position
    cost = scan.work.total_cost()
    whole = cost.passes_of(notes["tokens"])
    return {
        "examples": examples,
        "usable": examples - notes["without_targets"],
        "without_targets": notes["without_targets"],
        "duplicates": picked.duplicates,
        "chosen": len(picked.indices),
        "tokens": notes["tokens"],
        "cost": cost.to_dict() | {"share_of_measuring_all": cost.flops / whole if whole else 0.0},
        **({"predictor": scan.predictor.to_dict()} if scan.predictor is not None else {}),
    }


def _shortfall(wanted: int, picked: Picked, scan: Scan) -> str:
    left = f"{scan.progress.notes['without_targets']} of {scan.progress.position} examples have no target"
    if picked.duplicates:
        left += f" and {picked.duplicates} are near-duplicates of others"
    return f"{wanted} examples were asked for and {len(picked.indices)} chosen, all that there are: {left}"


def _digest_of(candidates: Sequence[Candidate]) -> str:
    digest = ""
    for one in candidates:
        digest = next_digest(digest, one.row)
    return digest


def _is_dataset(dataset: Any) -> bool:
    from datasets import Dataset

    return isinstance(dataset, Dataset)
