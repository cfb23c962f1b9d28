"""What does a privacy guarantee cost? How well a private release ranks submodules as the same examples do without noise.

    python -m benchmarks privacy --data FOLDER [--draws 20] [--epsilons 1 4 8] [--sizes 64 256 1024 4096]

SmolLM2-135M is measured once on 512 training examples of GSM8K of at most 160 tokens (five to ten minutes on two cores),
and the norms are kept in `.cache/benchmarks/`. Every draw takes its examples from those, with replacement unless it takes
no more than there are, and its own noise. The numbers are Spearman's correlations within kind, pooled as in
`check_drift`, between what is released and the mean over the same examples: means ± standard errors over draws.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from peft_blueprint import measure_influence
from peft_blueprint.blueprint import Submodule
from peft_blueprint.measure import (
    SCALE_SHARE,
    Privacy,
    bounded,
    choose_scale,
    empty_model,
    find_submodules,
    gaussian_sigma,
    get_pad_token_id,
    make_batches,
    release,
)

from . import setup


DELTA = 1e-5
QUICK = {"examples": 32, "length": 16, "draws": 2, "epsilons": [4.0], "sizes": [32]}

# norms (submodules, examples), submodules, epsilon, noise → released norms (submodules,) or (groups,)
Arm = Callable[[np.ndarray, Sequence[Submodule], float, np.random.Generator], np.ndarray]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=512, help="measured")
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 4.0, 8.0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 4096], help="examples of a draw")


def main(options: argparse.Namespace) -> None:
    """Measure if need be, then print three tables."""
    norms = _kept_norms(options)
    submodules = find_submodules(empty_model(setup.model_folder(options.quick)))
    warnings.filterwarnings("ignore", message="Under epsilon", category=UserWarning)
    sizes = [f"n = {size}" for size in options.sizes]
    print(f"{norms.shape[1]} examples measured, {options.draws} draws, delta {DELTA:g}")
    for title, arms in (("Submodules", SUBMODULE_ARMS), ("Groups", GROUP_ARMS)):
        print(f"\n## {title}\n")
        rows = (
            [name, f"{epsilon:g}", *(_cell(arm, norms, submodules, title, n, epsilon, options) for n in options.sizes)]
            for name, arm in arms.items()
            for epsilon in options.epsilons
        )
        setup.print_table(["release", "epsilon", *sizes], rows)
    print("\n## The norms' common scale: relative error, median over draws\n")
    errors = (
        [f"{epsilon:g}", *(f"{_scale_error(norms, size, epsilon, options.draws):.1%}" for size in options.sizes)]
        for epsilon in options.epsilons
    )
    setup.print_table(["epsilon", *sizes], errors)


def _cell(
    arm: Arm,
    norms: np.ndarray,
    submodules: Sequence[Submodule],
    title: str,
    size: int,
    epsilon: float,
    options: argparse.Namespace,
) -> str:
    """Format the correlation of releases with the mean over the same examples, the same for every arm."""
    found = []
    groups = _members_of(submodules)
    for draw in range(options.draws):
        chosen = _sample(norms, size, draw)
        released = arm(chosen, submodules, epsilon, np.random.default_rng([1, draw]))
        truth, kinds = chosen.mean(axis=1), [str(submodule.kind) for submodule in submodules]
        if title == "Groups":
            released = released if len(released) == len(groups) else _summed(released, groups)
            truth, kinds = _summed(truth, groups), [name.rpartition(".")[0] for name in groups]
        found.append(_pooled_spearman(released, truth, kinds))
    return setup.mean_and_error(found, ".3f")


def _pooled_spearman(a: np.ndarray, b: np.ndarray, kinds: Sequence[str]) -> float:
    """Pool Spearman's correlations within kinds with Fisher's z, as `check_drift` does; 0 where one side is constant."""
    zs, weights = [], []
    for kind in sorted(set(kinds)):
        rows = [i for i, of in enumerate(kinds) if of == kind]
        x, y = (ranks - ranks.mean() for ranks in (stats.rankdata(values[rows]) for values in (a, b)))
        scale = math.sqrt((x @ x) * (y @ y))
        zs.append(math.atanh(min(max(x @ y / scale, -0.9999), 0.9999)) if scale else 0.0)
        weights.append(max(1, len(rows) - 3))
    return math.tanh(np.average(zs, weights=weights))


def _members_of(submodules: Sequence[Submodule]) -> dict[str, list[int]]:
    """Return rows by group."""
    members: dict[str, list[int]] = {}
    for i, submodule in enumerate(submodules):
        members.setdefault(submodule.group or submodule.name, []).append(i)
    return members


def _summed(norms: np.ndarray, groups: dict[str, list[int]]) -> np.ndarray:
    """Return norms (submodules, …) as those of groups."""
    return np.array([np.linalg.norm(norms[rows], axis=0) for rows in groups.values()])


def _sample(norms: np.ndarray, size: int, draw: int) -> np.ndarray:
    """Draw (submodules, size) columns, with replacement where there are not as many."""
    measured = norms.shape[1]
    return norms[:, np.random.default_rng([0, draw]).choice(measured, size, replace=size > measured)]


def _scale_error(norms: np.ndarray, size: int, epsilon: float, draws: int) -> float:
    """Return the privately chosen scale's error against the median of the same examples' lengths."""
    errors = []
    for draw in range(draws):
        lengths = np.linalg.norm(_sample(norms, size, draw), axis=0)
        errors.append(abs(math.log(choose_scale(lengths, epsilon * SCALE_SHARE) / np.median(lengths))))
    return math.expm1(statistics.median(errors))


def _kept_norms(options: argparse.Namespace) -> np.ndarray:
    """Return (submodules, examples) norms, measured if they are not kept yet."""
    path = setup.CACHE / f"norms-{'quick' if options.quick else 'gsm8k'}-{options.examples}-{options.length}.npy"
    if not path.exists():
        model, tokenizer = setup.load(options.quick)
        name = "numbers" if options.quick else "gsm8k"
        rows = setup.read_rows(name, options.data, "train", tokenizer, options.length, seed=0)[: options.examples]
        batches = make_batches(rows, 8, get_pad_token_id(tokenizer))
        np.save(path, measure_influence(model, batches, projection_size=0).norms.double().numpy())
    return np.load(path)  # type: ignore[no-any-return]


# ---- arms


def _as_released(
    norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
) -> np.ndarray:
    """The package's release."""
    return release(norms, submodules, Privacy(epsilon=epsilon, delta=DELTA))[0]


def _noisy(over_size: bool = False, quantile_clip: bool = False) -> Arm:
    """A release without shrinking.

    Args:
        over_size: whether coordinates are divided by the root of their size.
        quantile_clip: whether vectors are clipped to a private median instead of scaled to length one.
    """

    def arm(
        norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
    ) -> np.ndarray:
        sizes = np.array([math.prod(submodule.shape or ()) for submodule in submodules], dtype=float)
        weights = sizes**-0.5 if over_size else np.ones(len(sizes))
        weighted = norms * weights[:, None]
        clip = choose_scale(np.linalg.norm(weighted, axis=0), epsilon * SCALE_SHARE) if quantile_clip else None
        sensitivity = math.sqrt(2) * (clip or 1.0) / norms.shape[1]
        sigma = gaussian_sigma(epsilon * (1 - SCALE_SHARE), DELTA, sensitivity)
        means = bounded(weighted, clip).mean(axis=1) + sigma * noise.standard_normal(len(norms))
        return np.maximum(means / weights, 1e-9)

    return arm


def _groups_first(
    norms: np.ndarray, submodules: Sequence[Submodule], epsilon: float, noise: np.random.Generator
) -> np.ndarray:
    """The package's release of groups: every example's group norms, fewer coordinates under the same noise."""
    members = _members_of(submodules)
    groups = [Submodule(name, kind=name.rpartition(".")[0]) for name in members]
    return _as_released(_summed(norms, members), groups, epsilon, noise)


SUBMODULE_ARMS: dict[str, Arm] = {
    "clipped to a private median": _noisy(quantile_clip=True),
    "scaled to length one": _noisy(),
    "the same, coordinates over the root of their size": _noisy(over_size=True),
    "the package's: scaled to length one, shrunk": _as_released,
}
GROUP_ARMS: dict[str, Arm] = {"submodules released, then summed": _as_released, "groups released": _groups_first}
