"""What choosing examples does with wrong answers, and how well a cheap prediction ranks: SmolLM2-135M, nothing is trained.

    python -m benchmarks noise --data FOLDER --swapped [--sets SET ...] [--seeds 0 1 2] [--methods NAME ...] [--print]
    python -m benchmarks noise --data FOLDER --predictor

FOLDER as in benchmark_selection.py, whose pools and scores these are. --swapped: a fifth of the pool's answers are swapped
among themselves, the target's are not; the table says which share of what a method keeps is swapped. "iterative" trains
for a few steps between its rounds. Scores are kept in .cache/benchmark_selection/ as they come.
--predictor: 640 examples of GSM8K are measured once, with J(z) over the default placement's submodules and the alignment
with 24 others, and kept there too. Then random subsets are learnt from as `select_examples` does, and Spearman's rank
correlation is taken between predictions and what was measured of all other examples. Costs are shares of measuring every
example: of FLOPs by `scoring.Cost`, and of seconds as they were counted in that run, with learning among them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peft_blueprint.data import (
    Candidate,
    ExampleScorer,
    Pool,
    alignment_scores,
    find_rows,
    fit_predictor,
    get_pad_token_id,
    make_target,
    spearman,
    token_features,
)
from peft_blueprint.measure import parameters_per_token

from .placement import BATCH
from .selection import (
    CACHE,
    DEFAULT,
    LENGTHS,
    POOL,
    SEEDS,
    SHARES,
    WISHES,
    Contest,
    Draw,
    best_of,
    digest,
    shown,
)


SWAPPED = 0.2
METHODS = (*DEFAULT, "loss_low", "length_short", "coreset_k_centre")
SIZES, DRAWS = (64, 128, 256, 512), 5
MEASURED, LONGEST = 640, 128
SCALARS = {"model": 6, "tokens": 4}


def main() -> None:
    """Parse, measure what is missing, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K and PubMedQA")
    parser.add_argument("--swapped", action="store_true", help="how many wrong answers each method keeps")
    parser.add_argument("--predictor", action="store_true", help="how well predicted scores rank")
    parser.add_argument("--sets", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--methods", nargs="+", choices=list(WISHES), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--pool", type=int, help=f"examples: {POOL} to swap among, {MEASURED} to predict")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="of subsets to learn from")
    parser.add_argument("--print", action="store_true", dest="prints", help="of --swapped, measure nothing")
    options = parser.parse_args()
    if not options.swapped and not options.predictor:
        parser.error("choose --swapped, --predictor or both")

    if options.swapped:
        contest = Contest(options.data, options.pool or POOL)
        for name, found in swapped(contest, options.sets, options.methods, options.seeds, options.prints).items():
            report_swapped(name, found)
    if options.predictor:
        contest = Contest(options.data, options.pool or MEASURED)
        report_predictor(measured(contest), options.sizes)


def swapped(
    contest: Contest, sets: Sequence[str], methods: Sequence[str], seeds: Sequence[int], prints: bool
) -> dict[str, dict[tuple[str, float], list[float]]]:
    """By set, method and q the share of swapped answers in what is kept, one number a seed."""
    found: dict[str, dict[tuple[str, float], list[float]]] = {name: {} for name in sets}
    for seed in seeds:
        for name in sets:
            draw, wrong = with_swapped(contest.draw(name, seed), seed)
            for method in methods:
                for share in SHARES:
                    if prints and not contest.path(draw, method, seed, share).exists():
                        continue
                    start = time.perf_counter()
                    kept = best_of(contest.scores(draw, method, seed, share)["scores"], share)
                    part = len(wrong & set(kept)) / len(kept)
                    found[name].setdefault((method, share), []).append(part)
                    seconds = time.perf_counter() - start
                    print(f"{name} {method}@{share}#{seed}: {part:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def with_swapped(draw: Draw, seed: int) -> tuple[Draw, set[int]]:
    """A draw of which a fifth of the answers have gone each to the next of them, and which they are."""
    wrong = random.Random(seed).sample(range(len(draw.pool)), round(SWAPPED * len(draw.pool)))
    pool = list(draw.pool)
    for at, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        pool[at] = draw.pool[at] | {"completion": draw.pool[other]["completion"]}
    return replace(draw, pool=pool), set(wrong)


def report_swapped(name: str, found: dict[tuple[str, float], list[float]]) -> None:
    """One set's table."""
    print(f"\n{name}, {SWAPPED:.0%} of answers swapped: share of swapped ones among those kept\n")
    print(
        "| method | seeds | "
        + " | ".join(f"q = {share:g}" for share in SHARES)
        + " |\n"
        + "|---" * (2 + len(SHARES))
        + "|"
    )
    for method in dict.fromkeys(method for method, _ in found):
        parts = [found.get((method, share), []) for share in SHARES]
        cells = " | ".join(shown(part, ".3f") for part in parts)
        print(f"| {method} | {len(parts[0])} | {cells} |")


def measured(contest: Contest) -> dict[str, np.ndarray]:
    """Norms, alignments and features of a pool of GSM8K, with the tokens and seconds they took; kept between runs."""
    draw = contest.draw("gsm8k", 0, LONGEST)
    names = contest.placement.lora
    path = CACHE / f"predictor-{digest([draw.pool, draw.target, names, BATCH])}.npz"
    if not path.exists():
        pool, target = candidates(contest, draw.pool), candidates(contest, draw.target)
        work = ExampleScorer(contest.model, names, BATCH, get_pad_token_id(contest.bench.tokenizer), 0, None)
        aim = make_target(work.influence(target, projections=True), names)
        of_target = work.cost.measured_tokens

        def both(part: Sequence[Candidate]) -> np.ndarray:
            influence = work.influence(part, projections=True)
            norms = influence.norms[find_rows(influence, names)].double().square().sum(dim=0).sqrt().numpy()
            return np.stack([norms, alignment_scores(influence, aim)], axis=1)

        scores, of_scores = in_parts(work, both, pool, "measured")
        features, of_features = in_parts(work, lambda part: work.features(part).values, pool, "read")
        start = time.perf_counter()
        tokens = token_features([one.row for one in pool]).values
        found = {
            "norm": scores[:, 0],
            "alignment": scores[:, 1],
            "model": features,
            "tokens": tokens,
            "seconds": np.array([of_scores, of_features, time.perf_counter() - start]),
            "positions": np.array([work.cost.measured_tokens - of_target, work.cost.forward_tokens, of_target]),
            "parameters": np.array(parameters_per_token(contest.model, names)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        beside.replace(path)
    with np.load(path) as kept:
        return dict(kept)


def candidates(contest: Contest, examples: Sequence[dict[str, str]]) -> list[Candidate]:
    """As `select_examples` sees them."""
    pool = Pool(examples, contest.bench.tokenizer)
    return [one for i, example in pool if (one := pool.encode(i, example)) is not None]


def in_parts(
    work: ExampleScorer, score: Callable[[Sequence[Candidate]], np.ndarray], pool: Sequence[Candidate], what: str
) -> tuple[np.ndarray, float]:
    """Scores of a pool, some batches at a time as in `select_examples`, and the seconds."""
    start, found = time.perf_counter(), []
    for i in range(0, len(pool), 8 * BATCH):
        found.append(work.distribute(score, pool[i : i + 8 * BATCH]))
        spent = time.perf_counter() - start
        print(f"{what} {min(i + 8 * BATCH, len(pool))} of {len(pool)}, {spent:.0f} s", file=sys.stderr, flush=True)
    return np.concatenate(found), time.perf_counter() - start


def report_predictor(found: dict[str, Any], sizes: Sequence[int]) -> None:
    """Rank correlations by what is predicted, from what, and how many were measured."""
    n = len(found["norm"])
    print(f"\n{n} examples of GSM8K, {DRAWS} random subsets each; mean ± standard error over subsets\n")
    print(
        "| predicted | features | measured | rank correlation | its own estimate | FLOPs | seconds | chosen most often |"
    )
    print("|---" * 8 + "|")
    for what in ("norm", "alignment"):
        for features in SCALARS:
            for size in sizes:
                if size >= n:
                    raise SystemExit(f"Of {n} examples none is left to predict when {size} are measured.")
                runs = [of_subset(found, what, features, size, draw) for draw in range(DRAWS)]
                true, own = [run[0] for run in runs], [run[1] for run in runs]
                names = [run[3] for run in runs]
                flops, seconds = cost_of(found, what, features, size, statistics.median(run[2] for run in runs))
                print(
                    f"| {what} | {features} | {size} | {shown(true, '.3f')} | {shown(own, '.3f')} | {flops:.0%} | "
                    f"{seconds:.0%} | {statistics.mode(names)} |",
                    flush=True,
                )


def of_subset(
    found: dict[str, Any], what: str, features: str, size: int, seed: int
) -> tuple[float, float, float, str]:
    """The rank correlation on all others, the predictor's own estimate of it, the seconds of learning, and its name."""
    start = time.perf_counter()
    order = np.random.default_rng([seed, 1]).permutation(len(found[what]))
    known, others = np.sort(order[:size]), np.sort(order[size:])
    values, matrix = found[what], found[features]
    predictor = fit_predictor(
        matrix[known], values[known], scalars=range(SCALARS[features]), logarithmic=what == "norm", seed=seed
    )
    predicted = predictor.predict(matrix[others])
    seconds = time.perf_counter() - start
    return spearman(predicted, values[others]), predictor.rank_correlation, seconds, predictor.name


def cost_of(found: dict[str, Any], what: str, features: str, size: int, learning: float) -> tuple[float, float]:
    """Shares of measuring all, of FLOPs and seconds. An alignment has the target's measurement on both sides."""
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


if __name__ == "__main__":
    main()
