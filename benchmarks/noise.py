"""Does choosing examples keep wrong answers, and how well does a cheap prediction rank? Nothing is trained.

    python -m benchmarks noise --data FOLDER [--only swapped|predictor] [--sets SET ...] [--seeds 0 1 2]

Pools and scores are those of the benchmark `selection`. "swapped": a fifth of the pool's answers are swapped among
themselves, the target's are not; the table says which share of what a method keeps is swapped. "predictor": 640 examples
of GSM8K are measured once, with J(z) over the placement's submodules and the alignment with 12 others, and kept. Then
random subsets are learnt from as `select_examples` does, and Spearman's rank correlation is taken between predictions
and what was measured of all other examples. Costs are shares of measuring every example: of FLOPs, and of seconds as
they were counted in that run, with learning among them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peft_blueprint.compare import spearman
from peft_blueprint.data import (
    Candidate,
    ExampleScorer,
    Pool,
    alignment_scores,
    find_rows,
    fit_predictor,
    make_target,
    token_features,
)
from peft_blueprint.measure import parameters_per_token

from . import setup
from .selection import BATCH, DEFAULT, POOL, SCORES, SEEDS, SHARES, WISHES, Contest, Draw, best_of
from .study.plan import digest


SWAPPED = 0.2
METHODS = (*DEFAULT, "loss_low", "length_short", "coreset_k_centre")
SIZES = (64, 128, 256, 512)
MEASURED, LONGEST = 640, 128
SCALARS = {"model": 6, "tokens": 4}
QUICK = {
    "sets": ["numbers"],
    "methods": ["random", "length"],
    "seeds": [0],
    "pool": 24,
    "sizes": [16],
    "draws": 1,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--only", choices=["swapped", "predictor"], help="by default both")
    parser.add_argument("--sets", nargs="+", default=["gsm8k", "pubmedqa"])
    parser.add_argument("--methods", nargs="+", choices=list(WISHES), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pool", type=int, help=f"examples: {POOL} to swap among, {MEASURED} to predict")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="of subsets to learn from")
    parser.add_argument("--draws", type=int, default=5, help="subsets of each size")


def main(options: argparse.Namespace) -> None:
    """Measure the missing parts, and print the tables."""
    if options.only != "predictor":
        contest = Contest(options.data, options.pool or POOL, quick=options.quick)
        for name in options.sets:
            print(f"\n{name}, {SWAPPED:.0%} of answers swapped: share of swapped ones among those kept\n")
            rows = (_swapped_row(contest, name, method, options.seeds) for method in options.methods)
            setup.print_table(["method", "seeds", *(f"q = {share:g}" for share in SHARES)], rows)
    if options.only != "swapped":
        contest = Contest(options.data, options.pool or MEASURED, quick=options.quick)
        found = _measured(contest, "numbers" if options.quick else "gsm8k")
        count = len(found["norm"])
        if max(options.sizes) >= count:
            raise SystemExit(f"--sizes must be below the {count} examples of the pool, got {max(options.sizes)}.")
        print(f"\n{count} examples, {options.draws} random subsets each; mean ± standard error over subsets\n")
        columns = ["predicted", "features", "measured", "rank correlation", "its own estimate", "FLOPs", "seconds"]
        setup.print_table([*columns, "chosen most often"], _predictor_rows(found, options.sizes, options.draws))


# ---- swapped answers


def _swapped_row(contest: Contest, name: str, method: str, seeds: Sequence[int]) -> list[str]:
    """Return a method's shares of swapped answers in what it keeps, by the share that is kept."""
    cells = []
    for share in SHARES:
        parts = []
        for seed in seeds:
            draw, wrong = with_swapped(contest.draw(name, seed), seed)
            kept = best_of(contest.scores(draw, method, seed, share)["scores"], share)
            parts.append(len(wrong & set(kept)) / len(kept))
        cells.append(setup.mean_and_error(parts, ".3f"))
    return [method, str(len(seeds)), *cells]


def with_swapped(draw: Draw, seed: int) -> tuple[Draw, set[int]]:
    """Give a fifth of the answers each to the next of them; return the draw and their positions."""
    wrong = random.Random(seed).sample(range(len(draw.pool)), round(SWAPPED * len(draw.pool)))
    pool = list(draw.pool)
    for at, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        pool[at] = draw.pool[at] | {"completion": draw.pool[other]["completion"]}
    return replace(draw, pool=pool), set(wrong)


# ---- predicted scores


def _measured(contest: Contest, name: str) -> dict[str, np.ndarray]:
    """Return norms, alignments and features of a pool, with the tokens and seconds they took; kept between runs."""
    draw = contest.draw(name, 0, LONGEST)
    names = contest.placement.lora
    path = SCORES / f"predictor-{digest([draw.pool, draw.target, names, BATCH])}.npz"
    if not path.exists():
        pool, target = _candidates(contest, draw.pool), _candidates(contest, draw.target)
        scorer = ExampleScorer(contest.model, names, BATCH, contest.ground.pad, 0, None)
        aim = make_target(scorer.influence(target, projections=True), names)
        of_target = scorer.cost.measured_tokens

        def both(part: Sequence[Candidate]) -> np.ndarray:
            influence = scorer.influence(part, projections=True)
            norms = influence.norms[find_rows(influence, names)].double().square().sum(dim=0).sqrt().numpy()
            return np.stack([norms, alignment_scores(influence, aim)], axis=1)

        scores, of_scores = _in_parts(scorer, both, pool)
        features, of_features = _in_parts(scorer, scorer.features, pool)
        start = time.perf_counter()
        tokens = token_features([one.row for one in pool])
        found = {
            "norm": scores[:, 0],
            "alignment": scores[:, 1],
            "model": features,
            "tokens": tokens,
            "seconds": np.array([of_scores, of_features, time.perf_counter() - start]),
            "positions": np.array([scorer.cost.measured_tokens - of_target, scorer.cost.forward_tokens, of_target]),
            "parameters": np.array(parameters_per_token(contest.model, names)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        beside.replace(path)
    with np.load(path) as kept:
        return dict(kept)


def _candidates(contest: Contest, examples: Sequence[setup.Example]) -> list[Candidate]:
    """Encode examples as `select_examples` does."""
    pool = Pool(examples, contest.ground.tokenizer)
    return [one for i, example in pool if (one := pool.encode(i, example)) is not None]


def _in_parts(
    scorer: ExampleScorer, score: Callable[[Sequence[Candidate]], np.ndarray], pool: Sequence[Candidate]
) -> tuple[np.ndarray, float]:
    """Return scores of a pool, some batches at a time as in `select_examples`, and the seconds."""
    start, found = time.perf_counter(), []
    for i in range(0, len(pool), 8 * BATCH):
        found.append(scorer.distribute(score, pool[i : i + 8 * BATCH]))
        setup.say(f"{min(i + 8 * BATCH, len(pool))} of {len(pool)}, {time.perf_counter() - start:.0f} s")
    return np.concatenate(found), time.perf_counter() - start


def _predictor_rows(found: dict[str, Any], sizes: Sequence[int], draws: int) -> Iterator[list[str]]:
    """Yield rank correlations by what is predicted, from what, and how many were measured."""
    for what in ("norm", "alignment"):
        for features in SCALARS:
            for size in sizes:
                runs = [_of_subset(found, what, features, size, draw) for draw in range(draws)]
                true, own, seconds, names = (list(column) for column in zip(*runs, strict=True))
                shares = _cost_of(found, what, features, size, statistics.median(seconds))
                ranked = [setup.mean_and_error(values, ".3f") for values in (true, own)]
                costs = [f"{share:.0%}" for share in shares]
                yield [what, features, str(size), *ranked, *costs, statistics.mode(names)]


def _of_subset(
    found: dict[str, Any], what: str, features: str, size: int, seed: int
) -> tuple[float, float, float, str]:
    """Return the rank correlation on all others, the predictor's own estimate, the seconds of learning, and its name."""
    start = time.perf_counter()
    order = np.random.default_rng([seed, 1]).permutation(len(found[what]))
    known, others = np.sort(order[:size]), np.sort(order[size:])
    values, matrix = found[what], found[features]
    predictor = fit_predictor(
        matrix[known], values[known], scalars=range(SCALARS[features]), logarithmic=what == "norm", seed=seed
    )
    predicted = predictor.predict(matrix[others])
    seconds = time.perf_counter() - start
    return float(spearman(predicted, values[others])), predictor.rank_correlation, seconds, predictor.name


def _cost_of(found: dict[str, Any], what: str, features: str, size: int, learning: float) -> tuple[float, float]:
    """Return shares of measuring all, of FLOPs and seconds. An alignment has the target's measurement on both sides."""
    part = size / len(found[what])
    positions, read, of_target = found["positions"].tolist()
    every, forward, by_tokens = found["seconds"].tolist()
    target = of_target if what == "alignment" else 0
    parameters, backward = found["parameters"].tolist()
    a_pass = parameters + backward
    flops = a_pass * (part * positions + target) + (parameters * read if features == "model" else 0)
    extra = every * target / positions
    seconds = part * every + extra + learning + (forward if features == "model" else by_tokens)
    return flops / (a_pass * (positions + target)), seconds / (every + extra)
