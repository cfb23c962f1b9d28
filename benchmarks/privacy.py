"""What a guarantee costs: how well a private release ranks submodules as the same examples do without noise.

    python -m benchmarks privacy --data FOLDER [--draws 20] [--epsilons 1 4 8] [--sizes 64 256 1024 4096]

FOLDER holds `gsm8k_train.jsonl`. SmolLM2-135M is measured once on 512 training examples of at most 160 tokens (five to ten
minutes on two cores), and the norms are kept beside the model. Every draw takes its examples from those, with replacement
unless it takes no more than there are, and its own noise. The numbers are Spearman's correlations within kind, pooled as
in `check_drift`, between what is released and the mean over the same examples: means over draws, and in brackets their
standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from peft_blueprint import measure_influence
from peft_blueprint.blueprint import Level, Submodule
from peft_blueprint.data import encode, make_batches, pad_token_of
from peft_blueprint.measure import (
    SCALE_SHARE,
    SCALES,
    Privacy,
    analytic_gaussian_sigma,
    bounded,
    empty_model,
    find_submodules,
    load_model,
    release,
    scale_probabilities,
)
from recipes import smollm2


NORMS = Path(".cache/gsm8k_norms.npz")
MEASURED, LENGTH = 512, 160
DELTA = 1e-5

# norms (n_sub, n), submodules, epsilon, noise → released norms (n_sub,)
Arm = Callable[[np.ndarray, Sequence[Submodule], float, np.random.Generator], np.ndarray]


def main() -> None:
    """Measure if need be, then print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with GSM8K; not needed once the norms are kept")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 4.0, 8.0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 4096])
    options = parser.parse_args()
    norms = kept_norms(options.data)
    submodules = find_submodules(empty_model(str(smollm2.prepare())))
    warnings.filterwarnings("ignore", message="Under epsilon", category=UserWarning)

    print(f"{norms.shape[1]} examples measured, {options.draws} draws, delta {DELTA:g}\n\n## Submodules\n")
    table(SUBMODULE_ARMS, norms, submodules, "submodule", options)
    print("\n## Groups\n")
    table(GROUP_ARMS, norms, submodules, "group", options)
    print("\n## The norms' common scale: how far off, median over draws\n")
    header("", [f"n = {size}" for size in options.sizes])
    for epsilon in options.epsilons:
        cells = [f"{scale_error(norms, size, epsilon, options.draws):.1%}" for size in options.sizes]
        print(f"| epsilon {epsilon:g} | {' | '.join(cells)} |")


def table(
    arms: dict[str, Arm],
    norms: np.ndarray,
    submodules: Sequence[Submodule],
    level: Level,
    options: argparse.Namespace,
) -> None:
    """A row an arm and epsilon, a column a number of examples."""
    header("release | epsilon", [f"n = {size}" for size in options.sizes])
    for name, arm in arms.items():
        for epsilon in options.epsilons:
            cells = []
            for size in options.sizes:
                draws = range(options.draws)
                found = [correlation(arm, norms, submodules, level, size, epsilon, draw) for draw in draws]
                error = statistics.stdev(found) / math.sqrt(len(draws))
                cells.append(f"{statistics.mean(found):.3f} ({error:.3f})")
            print(f"| {name} | {epsilon:g} | {' | '.join(cells)} |", flush=True)


def header(first: str, columns: Sequence[str]) -> None:
    """The head of a table in Markdown."""
    cells = [first, *columns]
    print(f"| {' | '.join(cells)} |\n|{'---|' * ' | '.join(cells).count('|')}---|")


def correlation(
    arm: Arm, norms: np.ndarray, submodules: Sequence[Submodule], level: Level, size: int, epsilon: float, draw: int
) -> float:
    """Of one release with the mean over the same examples; the same examples and noise for every arm."""
    chosen = sample(norms, size, draw)
    found = arm(chosen, submodules, epsilon, np.random.default_rng([1, draw]))
    truth = chosen.mean(axis=1)
    if level == "submodule":
        return pooled_spearman(found, truth, [str(submodule.kind) for submodule in submodules])
    groups = members_of(submodules)
    found = found if len(found) == len(groups) else summed(found, groups)
    return pooled_spearman(found, summed(truth, groups), [name.rpartition(".")[0] for name in groups])


def pooled_spearman(a: np.ndarray, b: np.ndarray, kinds: Sequence[str]) -> float:
    """Spearman's correlation within each kind, pooled with Fisher's z as `check_drift` does; 0 where one side is constant."""
    zs, weights = [], []
    for kind in sorted(set(kinds)):
        rows = [i for i, of in enumerate(kinds) if of == kind]
        x, y = (ranks - ranks.mean() for ranks in (stats.rankdata(values[rows]) for values in (a, b)))
        scale = math.sqrt((x @ x) * (y @ y))
        zs.append(math.atanh(min(max(x @ y / scale, -0.9999), 0.9999)) if scale else 0.0)
        weights.append(len(rows) - 3)
    return math.tanh(np.average(zs, weights=weights))


def members_of(submodules: Sequence[Submodule]) -> dict[str, list[int]]:
    """Rows by group."""
    members: dict[str, list[int]] = {}
    for i, submodule in enumerate(submodules):
        members.setdefault(submodule.group or submodule.name, []).append(i)
    return members


def summed(norms: np.ndarray, groups: dict[str, list[int]]) -> np.ndarray:
    """Norms (n_sub, …) of submodules as those of groups."""
    return np.array([np.linalg.norm(norms[rows], axis=0) for rows in groups.values()])


def sample(norms: np.ndarray, size: int, draw: int) -> np.ndarray:
    """(n_sub, size) columns, with replacement where there are not as many."""
    measured = norms.shape[1]
    return norms[:, np.random.default_rng([0, draw]).choice(measured, size, replace=size > measured)]


def as_released(
    norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
) -> np.ndarray:
    """The package's release."""
    return release(norms, submodules, Privacy(epsilon=epsilon, delta=DELTA), noise)[0]


def noisy(over_size: bool = False, quantile_clip: bool = False) -> Arm:
    """A release without shrinking: of coordinates as they are or over the root of their size, and of vectors of length
    one or clipped to a private median.
    """

    def arm(
        norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
    ) -> np.ndarray:
        sizes = np.array([math.prod(submodule.shape or ()) for submodule in submodules], dtype=float)
        weights = sizes**-0.5 if over_size else np.ones(len(sizes))
        weighted = norms * weights[:, None]
        clip = None
        if quantile_clip:
            odds = scale_probabilities(np.linalg.norm(weighted, axis=0), epsilon * SCALE_SHARE)
            clip = float(noise.choice(SCALES, p=odds))
        sensitivity = math.sqrt(2) * (clip or 1.0) / norms.shape[1]
        sigma = analytic_gaussian_sigma(epsilon * (1 - SCALE_SHARE), DELTA, sensitivity)
        means = bounded(weighted, clip).mean(axis=1) + sigma * noise.standard_normal(len(norms))
        return np.maximum(means / weights, 1e-9)

    return arm


def groups_first(
    norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
) -> np.ndarray:
    """The package's release of groups: every example's group norms, fewer coordinates under the same noise."""
    members = members_of(submodules)
    groups = [Submodule(name, kind=name.rpartition(".")[0]) for name in members]
    return as_released(summed(norms, members), groups, epsilon, noise)


def scale_error(norms: np.ndarray, size: int, epsilon: float, draws: int) -> float:
    """Of the privately chosen scale against the median of the same examples' lengths."""
    errors = []
    for draw in range(draws):
        lengths = np.linalg.norm(sample(norms, size, draw), axis=0)
        odds = scale_probabilities(lengths, epsilon * SCALE_SHARE)
        chosen = np.random.default_rng([2, draw]).choice(SCALES, p=odds)
        errors.append(abs(math.log(chosen / np.median(lengths))))
    return math.expm1(statistics.median(errors))


def kept_norms(folder: Path | None) -> np.ndarray:
    """(210, 512) norms, measured if they are not kept yet."""
    if NORMS.exists():
        with np.load(NORMS) as kept:
            return kept["norms"].astype(float)
    if folder is None:
        raise SystemExit(f"There is no {NORMS}: give --data a folder with gsm8k_train.jsonl to measure.")
    model, tokenizer = load_model(str(smollm2.prepare()), "float32")
    rows = [json.loads(line) for line in (folder / "gsm8k_train.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    examples = [{"prompt": f"{r['question']}\n", "completion": r["answer"]} for r in rows[: 3 * MEASURED]]
    batches = make_batches(encode(examples, tokenizer, LENGTH), 8, pad_token_of(tokenizer))
    found = measure_influence(model, batches, max_examples=MEASURED, projection_size=0)
    np.savez(NORMS, norms=found.norms.numpy(), names=np.array([s.name for s in found.submodules]))
    return found.norms.double().numpy()


SUBMODULE_ARMS: dict[str, Arm] = {
    "clipped to a private median": noisy(quantile_clip=True),
    "scaled to length one": noisy(),
    "the same, coordinates over the root of their size": noisy(over_size=True),
    "the package's: scaled to length one, shrunk": as_released,
}
GROUP_ARMS: dict[str, Arm] = {"submodules released, then summed": as_released, "groups released": groups_first}


if __name__ == "__main__":
    main()
