"""Filter a stream in constant memory: keep the examples, blocks or target tokens of the highest scores so far."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import nn

from .._options import from_keywords
from ..errors import BlueprintError
from ..measure import IGNORED
from ..place import Placement
from .examples import Candidate, Example, Pool
from .features import SIZE
from .options import ITERATIVE, METHODS, SCORE_COLUMNS, Method, SelectionOptions, require_choice
from .scan import Scan
from .scoring import ScoreFunction, random_scores
from .select import build_score, check_request, open_scan, report_of
from .tokens import HEAD_SCALARS, head_features, only_target, spread, target_positions


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FilterUnit = Literal["example", "token"]
_DROPPED_BITS = 11  # of a score's 32: the bins are 0.02 % wide


class RunningTop:
    """Count the values of a stream in bins, and return which are among the highest share so far.

    Bins are ranges of numbers in single precision, about 0.02 % wide. Memory is 16 bytes for each bin in use, of which a
    factor of two between values takes 4096: for any number of values at most 32 MB, and seldom more than 1 MB.

    Args:
        bins: (n,) int64 in ascending order, of an earlier run.
        counts: (n,) int64, of these.
    """

    def __init__(self, bins: Sequence[int] | np.ndarray = (), counts: Sequence[int] | np.ndarray = ()):
        self.bins = np.array(bins, dtype=np.int64)
        self.counts = np.array(counts, dtype=np.int64)

    def keep(self, values: np.ndarray, share: float) -> np.ndarray:
        """Count values, and return which are in the highest `share` of all counted, or in its lowest bin. (n,) → (n,)"""
        found = _bin_of(values)
        bins, places = np.unique(np.concatenate([self.bins, found]), return_inverse=True)
        weights = np.concatenate([self.counts, np.ones(len(found), dtype=np.int64)])
        counts = np.zeros(len(bins), dtype=np.int64)
        np.add.at(counts, places, weights)
        self.bins, self.counts = bins, counts
        if not len(found):
            return np.zeros(0, dtype=bool)
        above = np.cumsum(counts[::-1])
        lowest = bins[::-1][np.searchsorted(above, max(1, round(share * int(above[-1]))))]
        return np.asarray(found >= lowest)


class FilteredStream:
    """The rows of a stream that are kept, scored as they are read. It can be iterated over once.

    Args:
        scan: pass over the stream.
        score: candidates → (n,), or (n, width) for tokens; the higher the sooner kept.
        share: to keep.
        unit: "example" or "token".
        with_scores: add the columns `selection_score` and `selection_index` to examples.

    Attributes:
        resumed: number of rows that an earlier run yielded, which are not yielded again.

    Example:
        >>> from peft_blueprint.testing import tiny_llama, toy_batches
        >>> rows = [{key: batch[key][i].tolist() for key in batch} for batch in toy_batches() for i in range(4)]
        >>> stream = filter_stream(tiny_llama(), rows, method="loss", fraction=0.5, progress=False)
        >>> len(list(stream)) < 8, stream.report["examples"]
        (True, 8)
    """

    def __init__(self, scan: Scan, score: ScoreFunction, share: float, unit: FilterUnit, with_scores: bool):
        self._scan = scan
        self._score = score
        self._share = share
        self._unit = unit
        self._with_scores = with_scores
        self._before = scan.scorer.cost.seconds
        notes = scan.progress.notes
        for name in ("rows", "seen", "kept"):
            notes.setdefault(name, 0)
        self.resumed: int = notes["rows"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows kept: examples as they came; or, of tokens, `input_ids` and `labels` with others masked."""
        progress, notes = self._scan.progress, self._scan.progress.notes
        top = RunningTop(progress.arrays.get("bins", ()), progress.arrays.get("counts", ()))

        def keep() -> None:
            progress.arrays |= {"bins": top.bins, "counts": top.counts}

        for candidates, values in self._scan.run(self._score, keep):
            is_seen = np.ones(len(values), dtype=bool) if values.ndim == 1 else _targets(candidates, values.shape[1])
            is_kept = np.zeros_like(is_seen)
            is_kept[is_seen] = top.keep(values[is_seen], self._share)
            notes["seen"] += int(is_seen.sum())
            notes["kept"] += int(is_kept.sum())
            kept = is_kept if values.ndim == 1 else is_kept.any(axis=1)
            notes["rows"] += int(kept.sum())
            for i in np.flatnonzero(kept).tolist():
                yield self._row(candidates[i], values[i], is_kept[i])
        cost = self._scan.scorer.cost
        cost.seconds = self._before + time.perf_counter() - self._scan.started

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Deviations from the request, in words."""
        return tuple(self._scan.fallbacks)

    @property
    def report(self) -> dict[str, Any]:
        """Counts so far, as of `Selection.report`: `units` are the examples or target tokens scored, `kept` those kept.

        `share` is that of the units; `rows` counts the rows yielded, by earlier runs too.
        """
        notes = self._scan.progress.notes
        return report_of(self._scan) | {
            "unit": self._unit,
            "units": notes["seen"],
            "kept": notes["kept"],
            "share": notes["kept"] / notes["seen"] if notes["seen"] else 0.0,
            "rows": notes["rows"],
        }

    def _row(self, one: Candidate, value: Any, is_kept: Any) -> dict[str, Any]:
        if self._unit == "token":
            labels = [label if kept else IGNORED for label, kept in zip(one.row["labels"], is_kept, strict=False)]
            return {"input_ids": one.row["input_ids"], "labels": labels}
        scores = dict(zip(SCORE_COLUMNS, (float(value), one.index), strict=True)) if self._with_scores else {}
        if taken := scores.keys() & one.example.keys():
            raise BlueprintError(
                f"The examples have {', '.join(sorted(taken))} already. Remove them, or add no scores."
            )
        return dict(one.example) | scores


def filter_stream(
    model: nn.Module | None,
    dataset: Iterable[Example],
    options: SelectionOptions | None = None,
    *,
    unit: FilterUnit = "example",
    tokenizer: PreTrainedTokenizerBase | None = None,
    target: Iterable[Example] | None = None,
    placement: Placement | None = None,
    with_scores: bool = False,
    progress: bool = True,
    **keywords: Any,
) -> FilteredStream:
    """Keep a share of a stream in constant memory: of its examples, its blocks, or its target tokens.

    Examples are scored in chunks as they come. One is kept if its score is in the highest `fraction` of all scores so far,
    its own chunk included, so that the share that is kept tends to the fraction. What came early was compared with less,
    so shuffle data whose kind changes along the way. With `keep_state` a killed run yields the rows after those that the
    state counts (`FilteredStream.resumed`).

    With `unit="token"` each target is scored alone, by the gradient of its own loss, and the labels of the others become
    -100; rows without a target left are dropped. The norm of a token's gradient has two costs:

    - "norm", "norm_low" and "alignment" are exact, and take a forward and backward pass for each token.
    - "head_norm" is the norm in the head's weight alone, exact from one forward pass for all tokens. "loss", "loss_low"
      and "random" cost the same or less. "predicted_norm" and "predicted_alignment" measure one token of each of `small`
      examples, and predict the others from one forward pass (Algorithm 2 of the paper, on tokens).

    Args:
        model: as for `select_examples`.
        dataset: examples, as a list or a stream; for blocks, what `cut_blocks` returns.
        options: `fraction` and others of `SelectionOptions`. Near-duplicates are not looked for.
        unit: "example" or "token".
        tokenizer: the model's; not needed for encoded examples.
        target: as for `select_examples`.
        placement: as for `select_examples`.
        with_scores: add the columns `selection_score` and `selection_index` to examples.
        progress: show a progress bar.
        **keywords: fields of `SelectionOptions`, on top of `options`.

    Returns:
        An iterable of rows, and a report that grows with them.

    Raises:
        BlueprintError: without a fraction, for a method that compares all examples, or as `select_examples`.
        MismatchError: as `select_examples`.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> rows = [[5 + i, 6 + 3 * i, 7 + 2 * i, 90 - i] for i in range(20)]
        >>> stream = ({"input_ids": row, "labels": row} for row in rows)
        >>> kept = filter_stream(tiny_llama(), stream, unit="token", fraction=0.5, method="head_norm", progress=False)
        >>> sum(label != -100 for row in kept for label in row["labels"])
        30
    """
    started = time.perf_counter()
    options = from_keywords(SelectionOptions, options, keywords)
    require_choice("unit", unit, get_args(FilterUnit))
    method = options.resolve_method(target is not None)
    share = options.fraction
    if not isinstance(share, float) or options.count is not None:
        raise BlueprintError(
            f"A stream is filtered by a fraction in (0, 1], got fraction={share}, count={options.count}. Give fraction=…, "
            "or choose a count with select_examples."
        )
    _check_method(options, method, unit, with_scores)
    pool = Pool(dataset, tokenizer, options.columns, options.max_length, requires_columns=True)
    check_request(options, method, model, target, placement, None, unit)
    scan, targets, _ = open_scan(
        model, pool, options, method, tokenizer, target, placement, progress=progress, started=started, filtered=unit
    )
    build = _build_token_score if unit == "token" else build_score
    score = build(scan, method, targets)
    signed: ScoreFunction = score if method.sign > 0 else lambda candidates: -score(candidates)
    return FilteredStream(scan, signed, share, unit, with_scores)


def _check_method(options: SelectionOptions, method: Method, unit: FilterUnit, with_scores: bool) -> None:
    if unit == "token" and (not method.scores_tokens or options.method == ITERATIVE):
        known = ", ".join(name for name, one in METHODS.items() if one.scores_tokens)
        raise BlueprintError(f"Tokens cannot be scored by method={options.method!r}. Choose from {known}.")
    if unit == "token" and with_scores:
        raise BlueprintError("Rows of tokens have no single score. Leave out with_scores.")
    if unit == "token" and options.features == "tokens" and method.is_predicted:
        raise BlueprintError("Single tokens are predicted from the model's features. Use features='model'.")


def _build_token_score(scan: Scan, method: Method, targets: Sequence[Candidate]) -> ScoreFunction:
    """Build the function that scores every target of candidates, (n, max_length)."""
    scorer, options, width = scan.scorer, scan.options, scan.options.max_length

    def features(candidates: Sequence[Candidate], size: int) -> np.ndarray:
        with scorer.cut_model() as model:
            found, tokens = head_features(model, scorer.batches(candidates), size=size, seed=options.seed)
        scorer.cost.forward_tokens += tokens
        rows = np.zeros((len(candidates), width, len(HEAD_SCALARS) + size))
        at = 0
        for part in found:
            rows[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        return rows

    if method.measure in ("loss", "head_norm"):
        column = HEAD_SCALARS.index("loss" if method.measure == "loss" else "log head gradient")
        is_log = method.measure == "head_norm"

        def read(candidates: Sequence[Candidate]) -> np.ndarray:
            values = features(candidates, 0)[:, :, column]
            return np.where(_targets(candidates, width), np.exp(values), 0.0) if is_log else values

        return read
    if method.measure == "random":
        return lambda candidates: np.stack(
            [np.random.default_rng([options.seed, one.index]).random(width) for one in candidates]
        )
    exact = build_score(scan, METHODS[method.measure], targets)

    def measure(candidates: Sequence[Candidate]) -> np.ndarray:
        alone = [only_target(one, position) for one in candidates for position in target_positions(one)]
        return spread(candidates, exact(alone).tolist(), width)

    if not method.is_predicted:
        return measure

    def drawn(candidates: Sequence[Candidate]) -> list[int]:
        rolls = random_scores(candidates, options.seed + 1)
        return [
            (found := target_positions(one))[int(roll * len(found))]
            for one, roll in zip(candidates, rolls, strict=True)
        ]

    def measure_one(candidates: Sequence[Candidate]) -> np.ndarray:
        return exact([only_target(one, position) for one, position in zip(candidates, drawn(candidates), strict=True)])

    def featurize_one(candidates: Sequence[Candidate]) -> np.ndarray:
        return features(candidates, SIZE)[np.arange(len(candidates)), drawn(candidates)]

    scan.learn(measure_one, featurize_one, len(HEAD_SCALARS), logarithmic=method.measure == "norm")
    predictor = scan.predictor
    scan.known = {}  # the measurements are of single tokens
    if predictor is None:
        return measure

    def predict(candidates: Sequence[Candidate]) -> np.ndarray:
        is_target = _targets(candidates, width)
        found = np.zeros(is_target.shape)
        found[is_target] = predictor.predict(features(candidates, SIZE)[is_target])
        return found

    return predict


def _targets(candidates: Sequence[Candidate], width: int) -> np.ndarray:
    """Return which positions are targets, (candidates, width)."""
    found = np.zeros((len(candidates), width), dtype=bool)
    for row, one in zip(found, candidates, strict=True):
        row[target_positions(one)] = True
    return found


def _bin_of(values: np.ndarray) -> np.ndarray:
    """Return the bins of numbers, in the numbers' order."""
    bits = values.astype(np.float32).view(np.uint32)
    ordered = np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> _DROPPED_BITS).astype(np.int64)
