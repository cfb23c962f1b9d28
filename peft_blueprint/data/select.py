"""Choose which examples to train on: `select_examples` scores a dataset and keeps the best."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._options import from_keywords
from .._processes import process_rank
from .._text import format_names, is_inside
from ..errors import BlueprintError, MismatchError
from ..measure import LossFunction, find_submodules, get_pad_token_id, is_sharded, parameters_per_token, unwrap
from ..place import Placement
from .alignment import Target, alignment_scores, make_target
from .brief_training import Train, restore_afterwards, temporary_adapters, train_briefly
from .examples import Candidate, Example, Pool
from .features import MODEL_SCALARS, TOKEN_SCALARS, token_features
from .options import (
    ITERATIVE,
    MAX_FACILITY_POINTS,
    METHODS,
    MIN_MEASURED,
    Q_STAR,
    SCORE_COLUMNS,
    Method,
    SelectionOptions,
)
from .resume import Progress, extend_digest
from .scan import Choice, Scan, Scores
from .scoring import ExampleScorer, ScoreFunction, count_targets, random_scores
from .shallow import first_layers
from .share import DataShare, best_data_share
from .text_similarity import bm25


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_TARGET = "The target set is empty. Give target=…, a few dozen examples of the kind wanted."
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen examples, how they were chosen, and the cost of choosing.

    Args:
        indices: positions in the data, in its order.
        scores: of these, measured or predicted; for a coreset minus the place in the order of choice, for "random" keys.
        method: its name.
        settings: other options that mattered.
        report: `examples`, `usable`, `without_targets`, `duplicates`, `chosen`; `cost`, see `scoring.Cost`, summed over
            processes, with `share_of_measuring_all`: its FLOPs over those of measuring every example; and for predicted
            scores `predictor`, with its held-out rank correlation; with `fraction="q_star"` the `DataShare` found.
        fallbacks: deviations from the request, in words.
        all_scores: (examples,) of all examples, NaN where there is none; None for a stream or coreset.
        rows: the chosen examples of a stream; None for data that can be read again.

    Example:
        >>> selection = Selection((0, 2), (0.9, 0.8), "gradient_norm", settings={}, report={"examples": 3})
        >>> selection.apply([{"text": "a"}, {"text": "b"}, {"text": "c"}])
        [{'text': 'a'}, {'text': 'c'}]
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
        """Return the chosen examples in their order.

        Args:
            dataset: the data chosen from; not needed for a stream.
            with_scores: add the columns `selection_score` and `selection_index`, the position in the data.

        Returns:
            A `datasets.Dataset` if `dataset` is one, otherwise a list.

        Raises:
            BlueprintError: without a dataset where one is needed, or if it has these columns already.
            MismatchError: for a dataset of another length.
        """
        columns = dict(zip(SCORE_COLUMNS, (self.scores, self.indices), strict=True)) if with_scores else {}
        if dataset is None and self.rows is None:
            raise BlueprintError("apply needs the dataset that was chosen from: selection.apply(dataset).")
        if isinstance(dataset, Sized) and len(dataset) != self.report["examples"]:
            raise MismatchError(
                f"The selection is of {self.report['examples']} examples, the dataset has {len(dataset)}. Apply it to the "
                "data that was chosen from."
            )
        is_dataset = isinstance(dataset, Sized) and hasattr(dataset, "add_column")  # of the library datasets
        if is_dataset:
            _refuse_columns(set(columns) & set(dataset.column_names))
            chosen = dataset.select(list(self.indices))
            for name, values in columns.items():
                chosen = chosen.add_column(name, list(values))
            return chosen
        rows = [dict(row) for row in self._rows_of(dataset)]
        for i, row in enumerate(rows):
            _refuse_columns(columns.keys() & row.keys())
            row.update({name: values[i] for name, values in columns.items()})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible data, without the examples and the scores of those not chosen."""
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
            yield from self.rows or ()
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
    options: SelectionOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target: Iterable[Example] | None = None,
    placement: Placement | None = None,
    train: Train | None = None,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    **keywords: Any,
) -> Selection:
    """Choose examples to train on.

    Each method keeps the highest scores:

    - "random".
    - "predicted_norm", the paper's Algorithm 2: measure J(z) = ‖∇L(z)‖ of a small random subset, learn to predict it from
      cheap features, and predict it for all. "norm" measures all, "norm_low" keeps the lowest. Unusual examples have large
      gradients, and so has noise.
    - "alignment": the cosine of an example's gradient with the mean gradient of `target`, as in LESS (Xia et al. 2024,
      arXiv:2402.04333) without its warm-up, from sketches that are discarded batch by batch. "predicted_alignment"
      measures a few and predicts the others.
    - "loss", "loss_low", "length" (most target tokens), "length_short" and "bm25" (words shared with `target`): controls.
    - "coreset_k_centre" and "coreset_facility": examples whose gradient directions represent all; the latter takes at most
      50,000.
    - "iterative": choose, train briefly, measure again, and so on; by predicted alignment with a target, otherwise by
      predicted norm. The model is restored afterwards.

    A list or `datasets.Dataset` is scored whole; a stream in memory that grows with `count` alone, and with `small` where
    scores are predicted. Both give the same selection, with two exceptions: a predictor learns from about the first 1000
    examples of a stream; and a stream's near-duplicates are compared with the examples kept at the time. Under `torchrun` or
    `accelerate launch` call it on every process with all the data: the work is divided, and all choose the same.

    Args:
        model: as for `measure_influence`; None for methods that run no model ("random", "length", "bm25").
        dataset: examples, see `Pool`.
        options: see `SelectionOptions`, which also lists the keywords: fraction or count, method, and more.
        tokenizer: the model's; not needed for encoded examples.
        target: a few dozen examples of the kind wanted, in any of the data's forms. They should not be in the data.
        placement: of adapters; only gradients of the submodules it trains count. Or name them in `submodules`.
        train: `train(model, rows)` for "iterative", which trains the model on encoded rows in place; by default
            `train_steps` steps of LoRA on these submodules, or of the adapters that the model has.
        loss_fn: `loss_fn(model, batch)` → losses (B,), for an objective other than the model's own.
        progress: show a progress bar.
        **keywords: fields of `SelectionOptions`, on top of `options`.

    Raises:
        BlueprintError: for options out of range, a method that lacks a model or target or cannot take a stream, data
            without targets, or state that cannot be kept.
        MismatchError: for submodules that the model lacks, or kept state of other work or data.
        MeasurementError: for scores that are not finite, or if another process failed.

    Example:
        >>> from peft_blueprint.testing import tiny_llama
        >>> rows = [{"input_ids": [5 + i, 6, 7], "labels": [5 + i, 6, 7]} for i in range(20)]
        >>> selection = select_examples(tiny_llama(), rows, fraction=0.2, method="loss", progress=False)
        >>> len(selection.apply(rows))
        4
    """
    start = time.perf_counter()
    options = from_keywords(SelectionOptions, options, keywords)
    method = options.resolve_method(target is not None)
    pool = Pool(dataset, tokenizer, options.columns, options.max_length, requires_columns=True)
    check_request(options, method, model, target, placement, pool.length)
    count = options.resolve_count(pool.length)
    scan, targets, settings = open_scan(
        model, pool, options, method, tokenizer, target, placement, loss_fn, progress=progress, started=start
    )
    scorer = scan.scorer
    before = scorer.cost.seconds
    scores, rows, share = None, None, None
    if pool.is_stream:
        choice, examples = scan.choose_from_stream(build_score(scan, method, targets), method.sign, count)
        rows = tuple(examples)
    elif options.method == ITERATIVE:
        scores, choice = _choose_iteratively(scan, method, targets, count, train)
    else:
        by_words = method.measure == "bm25"
        scores = _score_by_words(scan, targets) if by_words else scan.score_all(build_score(scan, method, targets))
        if options.fraction == Q_STAR:
            share = _best_share(scan, scores, model)
            count = share.count
        choice = scan.choose(scores, method, count)
    all_scores = None
    if scores is not None and scores.values.ndim == 1:  # not a coreset's points
        all_scores = np.full(pool.length or 0, np.nan)
        all_scores[scores.indices] = scores.values
    scorer.cost.seconds = before + time.perf_counter() - start
    if len(choice.indices) < count:
        scan.note(_shortfall(count, choice, scan))
    for text in scan.fallbacks:
        _LOG.warning("%s", text)
    by_index = dict(sorted(zip(choice.indices, choice.scores, strict=True)))
    return Selection(
        indices=tuple(by_index),
        scores=tuple(by_index.values()),
        method=options.method,
        settings=settings,
        report=report_of(scan)
        | {"duplicates": choice.duplicates, "chosen": len(choice.indices)}
        | ({} if share is None else {"q_star": share.to_dict()}),
        fallbacks=tuple(scan.fallbacks),
        all_scores=all_scores,
        rows=rows,
    )


def open_scan(
    model: nn.Module | None,
    pool: Pool,
    options: SelectionOptions,
    method: Method,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Iterable[Example] | None,
    placement: Placement | None,
    loss_fn: LossFunction | None = None,
    *,
    progress: bool,
    started: float,
    **settings: Any,
) -> tuple[Scan, list[Candidate], dict[str, Any]]:
    """Open a pass over a pool, continued from the kept state.

    Args:
        model, pool, options, method, tokenizer, target, placement, loss_fn, progress: see `select_examples`.
        started: time of `time.perf_counter` that the cost counts from.
        **settings: further settings that a continued run must share.

    Returns:
        The pass, the encoded target, and the settings that mattered.
    """
    names, above = _trained_submodules(model, placement, options)
    targets = []
    if method.uses_target and target is not None:
        targets = _encode_target(Pool(target, tokenizer, options.columns, options.max_length))
    settings = _settings(options, method, names, targets) | settings
    rank = process_rank()
    state = _open_state(options, settings, pool, names, targets, model, writes=rank == 0)
    scorer = ExampleScorer(
        model=nn.Module() if model is None else model,
        submodules=names,
        batch_size=options.batch_size,
        pad_token_id=_pad_token_id(model, tokenizer),
        seed=options.seed,
        loss_fn=loss_fn,
        layers=None if model is None else options.scorer_layers,
    )
    scan = Scan(pool, scorer, state, options, progress, started)
    scan.fallbacks += state.notes.get("fallbacks", [])
    if above:
        scan.note(f"{above} submodules above the first {options.scorer_layers} layers do not count")
    if "cost" in state.notes:
        *tokens, scorer.cost.seconds = state.notes["cost"]
        if rank == 0:  # the tokens of all processes, counted once
            scorer.cost.forward_tokens, scorer.cost.measured_tokens = tokens
    if model is not None:
        with scorer.cut_model() as using:
            scorer.cost.parameters, scorer.cost.backward_parameters = parameters_per_token(using, names)
    return scan, targets, settings


def build_score(scan: Scan, method: Method, targets: Sequence[Candidate]) -> ScoreFunction:
    """Build the function that scores candidates by a method, with the scorer's model as it is now."""
    scorer, options = scan.scorer, scan.options
    if method.measure == "alignment":
        target = _measure_target(scan, targets)

        def align(candidates: Sequence[Candidate]) -> np.ndarray:
            return alignment_scores(scorer.influence(candidates, projections=True), target, options.similarity)

        score: ScoreFunction = align
    else:
        score = {
            "random": lambda candidates: random_scores(candidates, options.seed),
            "length": count_targets,
            "loss": scorer.losses,
            "norm": scorer.norms,
            "points": scorer.points,
        }[method.measure]
    if not method.is_predicted:
        return score

    def featurize(candidates: Sequence[Candidate]) -> np.ndarray:
        if options.features == "tokens":
            return token_features([one.row for one in candidates], seed=options.seed)
        return scorer.features(candidates)

    scalars = len(TOKEN_SCALARS if options.features == "tokens" else MODEL_SCALARS)
    return scan.learn(score, featurize, scalars, logarithmic=method.measure == "norm")


def _measure_target(scan: Scan, targets: Sequence[Candidate]) -> Target:
    """Measure the target, or take its measurement from an earlier run."""
    arrays, scorer = scan.progress.arrays, scan.scorer
    if "target" not in arrays:
        influence = scorer.influence(targets, projections=True)
        found = make_target(influence, scorer.submodules, scan.options.precondition)
        arrays |= {"target": found.directions.numpy(), "target_weights": found.weights.numpy()}
        arrays |= {"target_norm": np.array(found.norm), "target_rows": np.array(found.submodules)}
    return Target(
        submodules=tuple(arrays["target_rows"].tolist()),
        directions=torch.from_numpy(arrays["target"]),
        weights=torch.from_numpy(arrays["target_weights"]),
        norm=float(arrays["target_norm"]),
        seed=scorer.seed,
    )


def _best_share(scan: Scan, scores: Scores, model: nn.Module | None) -> DataShare:
    """Find q* from the scores and their cost relative to a training pass of the whole model."""
    assert model is not None  # which every method takes that q_star goes with
    forward, backward = parameters_per_token(model, scan.scorer.submodules)
    training = 2 * (forward + backward) * scan.progress.notes["tokens"]
    share = best_data_share(scores.values, scan.scorer.total_cost().flops / training, scan.options.epochs)
    for text in share.notes():
        scan.note(text)
    return share


def _choose_iteratively(
    scan: Scan, method: Method, targets: Sequence[Candidate], count: int, train: Train | None
) -> tuple[Scores, Choice]:
    """Choose, train on the choice, choose again with the trained model, and so on; restore the model.

    Returns:
        The last round's scores and choice.
    """
    scorer, options = scan.scorer, scan.options
    model = scorer.model
    # the `with` holds the only reference, so that an interrupt on its way out still ends it
    with (
        temporary_adapters(model, scorer.submodules, options.seed) if train is None else restore_afterwards(model)
    ) as trained:
        scorer.model = trained or model
        try:
            for step in range(options.iterations):
                scan.progress, scan.known = Progress(), {}
                scores = scan.score_all(build_score(scan, method, targets))
                choice = scan.choose(scores, method, count)
                if step == options.iterations - 1:
                    break
                rows = [scan.candidate(index).row for index in sorted(choice.indices)]
                if train is not None:
                    train(scorer.model, rows)
                    scan.note("the cost of train(model, rows) is not counted")
                    continue
                scorer.cost.trained_tokens += train_briefly(
                    scorer.model,
                    rows,
                    options.train_steps,
                    batch_size=options.batch_size,
                    pad_token_id=scorer.pad_token_id,
                    loss_fn=scorer.loss_fn,
                    seed=options.seed + step,
                )
        finally:
            scorer.model = model
    return scores, choice


def _score_by_words(scan: Scan, targets: Sequence[Candidate]) -> Scores:
    """Score every example by BM25 against the target's texts, or token ids where either came encoded."""
    found = [one for candidates, _ in scan.run(count_targets) for one in candidates]
    are_texts = all(isinstance(one.text, str) for one in (*found, *targets))
    queries, documents = ([c.text if are_texts else c.row["input_ids"] for c in part] for part in (targets, found))
    scores = bm25(queries, documents)
    if not scores.any():
        scan.note("no example shares a word with the target, so bm25 cannot rank them: the first were chosen")
    return Scores(np.array([one.index for one in found]), scores)


def check_request(
    options: SelectionOptions,
    method: Method,
    model: nn.Module | None,
    target: Iterable[Example] | None,
    placement: Placement | None,
    length: int | None,
    unit: str = "example",
) -> None:
    """Raise BlueprintError if a method lacks something it needs, or is given something it cannot use."""
    name = f"method={options.method!r}"
    if method.measure == "head_norm" and unit != "token":
        raise BlueprintError(f"{name} is of single tokens. Give filter_stream(…, unit='token'), or method='norm'.")
    if options.fraction == Q_STAR and not (method.adds_up and options.method != ITERATIVE):
        able = ", ".join(known for known, of in METHODS.items() if of.adds_up)
        raise BlueprintError(
            f"fraction='q_star' needs scores that add up and cost something: method {able}; got {name}. Give one of "
            "them, or a number."
        )
    if method.uses_target and target is None:
        raise BlueprintError(f"{name} needs a target. Give target=…, a few dozen examples of the kind wanted.")
    if method.uses_target and isinstance(target, Sized) and not len(target):
        raise BlueprintError(_EMPTY_TARGET)
    if method.uses_model and model is None:
        raise BlueprintError(f"{name} runs the model. Give one, not None.")
    if placement is not None and options.submodules is not None:
        raise BlueprintError("Give either a placement or submodules, not both.")
    if (placement is not None or options.submodules is not None) and not method.uses_model:
        raise BlueprintError(f"{name} measures no gradients. Give no placement and no submodules, or another method.")
    if length is None and (method.needs_all or options.method == ITERATIVE):
        raise BlueprintError(f"{name} cannot take a stream. Give a list or a datasets.Dataset, or another method.")
    if method.coreset == "facility" and length is not None and length > MAX_FACILITY_POINTS:
        raise BlueprintError(
            f"{name} compares every pair and takes at most {MAX_FACILITY_POINTS:,} examples, got {length:,}. Sample some "
            "first, or use coreset_k_centre."
        )
    if options.keep_state is not None and options.method in (ITERATIVE, "bm25"):
        raise BlueprintError(f"{name} cannot be resumed. Leave out keep_state.")
    if options.scorer_layers is not None and (not method.uses_model or options.method == ITERATIVE):
        raise BlueprintError(f"{name} does not score with a part of the model. Leave out scorer_layers.")
    if method.is_predicted and options.small < MIN_MEASURED:
        raise BlueprintError(f"small must be at least {MIN_MEASURED} for a prediction, got {options.small}.")


def _trained_submodules(
    model: nn.Module | None, placement: Placement | None, options: SelectionOptions
) -> tuple[tuple[str, ...] | None, int]:
    """Return the submodules whose gradients count, in the model's order, None for all; and how many the scorer lacks.

    Raises:
        MismatchError: for a name that the model lacks, no name at all, or names above the scorer's layers alone.
    """
    submodules, layers = options.submodules, options.scorer_layers
    if model is None or (placement is None and submodules is None):
        return None, 0
    every = [submodule.name for submodule in find_submodules(model)]
    wanted = set(submodules or ()) if placement is None else set(placement.lora)
    blocks = () if placement is None else placement.unfreeze
    empty = [block for block in blocks if not any(is_inside(name, block) for name in every)]
    missing = sorted(wanted - set(every)) + empty
    names = tuple(name for name in every if name in wanted or any(is_inside(name, block) for block in blocks))
    if missing or not names:
        raise MismatchError(
            f"{len(missing)} of {len(wanted) + len(blocks)} submodules are not in this model "
            f"({format_names(missing) or 'no names given'}). Its submodules are {format_names(every)}."
        )
    if layers is None:
        return names, 0
    with first_layers(model, layers):
        left = {submodule.name for submodule in find_submodules(model)}
    kept = tuple(name for name in names if name in left)
    if not kept:
        raise MismatchError(
            f"All {len(names)} submodules that count are above the first {layers} layers that score ({format_names(names)}). "
            "Increase scorer_layers, or leave out the placement and submodules."
        )
    return kept, len(names) - len(kept)


def _encode_target(pool: Pool) -> list[Candidate]:
    """Encode all examples of a target set.

    Raises:
        BlueprintError: if it is empty, or no example has a target token.
    """
    encoded = [pool.encode(index, example) for index, example in pool]
    found = [one for one in encoded if one is not None]
    if not encoded:
        raise BlueprintError(_EMPTY_TARGET)
    if not found:
        raise BlueprintError(
            "No example of the target set has a target token within max_length. Give others, or increase it."
        )
    return found


def _settings(
    options: SelectionOptions, method: Method, names: Sequence[str] | None, targets: Sequence[Candidate]
) -> dict[str, Any]:
    """Return the options that mattered."""
    used = ["count", "fraction", "deduplicate", "batch_size", "max_length", "seed"]
    used += ["small", "features"] if method.is_predicted else []
    used += ["similarity", "precondition"] if method.measure == "alignment" else []
    used += ["epochs"] if options.fraction == Q_STAR else []
    used += ["iterations"] if options.method == ITERATIVE else []
    used += ["scorer_layers"] if method.uses_model else []
    settings = {name: getattr(options, name) for name in used if getattr(options, name) is not None}
    if names is not None:
        settings["submodules"] = len(names)
    return settings | ({"targets": len(targets)} if targets else {})


def _open_state(
    options: SelectionOptions,
    settings: Mapping[str, Any],
    pool: Pool,
    names: Sequence[str] | None,
    targets: Sequence[Candidate],
    model: nn.Module | None,
    writes: bool,
) -> Progress:
    """Open the kept state, whose settings say what must be the same for the work to be continued."""
    if options.keep_state is None:
        return Progress()
    digest = ""
    for one in targets:
        digest = extend_digest(digest, one.row)
    identity = {
        **settings,
        "method": options.method,
        "examples": pool.length,
        "columns": dict(options.columns or {}),
        "submodule_names": list(names or ()),
        "target": digest,
        "model": None if model is None else _digest_model(model),
    }
    return Progress(Path(options.keep_state), identity, writes)


def _digest_model(model: nn.Module) -> str:
    """Return a digest of names, shapes and the first numbers of each weight, which differs after further training."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not (parameter.is_meta or is_sharded(parameter)):
            digest.update(parameter.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _pad_token_id(model: nn.Module | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is not None:
        return get_pad_token_id(tokenizer)
    config = None if model is None else getattr(unwrap(model), "config", None)
    return getattr(config, "pad_token_id", None) or 0


def report_of(scan: Scan) -> dict[str, Any]:
    """Return the counts and the cost of a pass, see `Selection.report`."""
    notes, examples = scan.progress.notes, scan.progress.position
    cost = scan.scorer.total_cost()
    without, tokens = notes.get("without_targets", 0), notes.get("tokens", 0)
    whole = cost.backward_flops(tokens)
    return {
        "examples": examples,
        "usable": examples - without,
        "without_targets": without,
        "tokens": tokens,
        "cost": cost.to_dict() | {"share_of_measuring_all": cost.flops / whole if whole else 0.0},
        **({"predictor": scan.predictor.to_dict()} if scan.predictor is not None else {}),
    }


def _shortfall(count: int, choice: Choice, scan: Scan) -> str:
    missing = f"{scan.progress.notes['without_targets']} of {scan.progress.position} have no target"
    text = f"{len(choice.indices)} examples were chosen instead of {count}: {missing}"
    return text + (f" and {choice.duplicates} are near-duplicates of others" if choice.duplicates else "")


def _refuse_columns(taken: Iterable[str]) -> None:
    if taken:
        raise BlueprintError(
            f"The examples have {format_names(sorted(taken))} already. Remove them, or add no scores."
        )
