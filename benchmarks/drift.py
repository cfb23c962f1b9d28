"""Do two small samples agree on where the gradient is? Of the same data, and of different data.

    python -m benchmarks drift --data FOLDER [--examples 64] [--sets NAME ...]
    python -m benchmarks drift --simulate [--pairs 600]

Measures SmolLM2-135M once on each data set, then correlates ranks within kind between random samples of 8, 16, 32, …
examples, up to half of what was measured, disjoint where the data are the same. The drift threshold belongs between what
the same data gives and what other data gives.

With `--simulate`, measures nothing: counts how often the 95 % interval of `check_drift` covers the mean correlation, over
random pairs of blueprints with and without intervals of their norms.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch

from peft_blueprint import Blueprint, Influence, check_drift, measure_influence
from peft_blueprint.blueprint import Z95, Submodule
from peft_blueprint.compare import spearman
from peft_blueprint.measure import get_pad_token_id, make_batches

from . import setup


SIZES = (8, 16, 32, 64, 128)
DRAWS = 20
LAWS = ((0.0, 0.0), (0.6, 0.0), (0.95, 0.0), (0.0, 0.7), (0.6, 0.2), (0.95, 0.2), (0.95, 0.5))
SHAPES = ((2, 4), (7, 4), (2, 6), (7, 6), (2, 12), (7, 12), (2, 30), (7, 30))
QUICK = {"examples": 16, "length": 16, "sets": ["numbers"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--sets", nargs="+", default=["demo", "code", "gsm8k", "pubmedqa"])
    parser.add_argument("--simulate", action="store_true", help="simulate the coverage of intervals instead")
    parser.add_argument("--pairs", type=int, default=600, help="simulated pairs of blueprints for each law")


def main(options: argparse.Namespace) -> None:
    """Measure every data set, then print a table of correlations: mean [least, greatest] over draws."""
    if options.simulate:
        simulate(options.pairs)
        return
    sizes = [size for size in SIZES if 2 * size <= options.examples]
    model, tokenizer = setup.load(options.quick)
    influences: dict[str, Influence] = {}
    for name in options.sets:
        rows = setup.read_rows(name, options.data, "train", tokenizer, options.length, seed=0)
        batches = make_batches(rows[: options.examples], 8, get_pad_token_id(tokenizer))
        found = influences[name] = measure_influence(model, batches)
        error = "" if found.norm_errors is None else f", norms ± {found.norm_errors.mean():.3f}"
        setup.say(f"{name}: {found.examples} examples, loss {found.losses.mean():.2f}{error}")
    rows = []
    for a, b in [(name, name) for name in influences] + list(combinations(influences, 2)):
        draws = [_correlations(influences[a], influences[b], size) for size in sizes]
        label = f"{a}, two samples" if a == b else f"{a} against {b}"
        rows.append([label, *(f"{statistics.mean(c):.3f} [{min(c):.3f}, {max(c):.3f}]" for c in draws)])
    setup.print_table(["rank correlation within kind", *(f"n = {size}" for size in sizes)], rows)


def simulate(pairs: int) -> None:
    """Print how often intervals cover, by kinds, entries a kind, and law: true correlation and error of a norm."""
    head = [
        "kinds × entries",
        *(f"ρ {rho:g}, " + (f"error {error:g}" if error else "no intervals") for rho, error in LAWS),
    ]
    rows = []
    for kinds, entries in SHAPES:
        shares = [coverage(kinds, entries, rho, error, pairs) for rho, error in LAWS]
        rows.append([f"{kinds} × {entries}", *(f"{share:.3f}" for share in shares)])
    setup.print_table(head, rows)
    setup.say(f"The standard error of a share is {(0.95 * 0.05 / pairs) ** 0.5:.3f}.")


def coverage(kinds: int, entries: int, rho: float, error: float, pairs: int) -> float:
    """Return the share of intervals that cover the mean correlation.

    Args:
        kinds: of submodules.
        entries: of each kind.
        rho: correlation of the true norms, which are normal with a standard deviation of 0.1 around 1.
        error: standard error of every measured norm, in standard deviations of the true ones. Pairs are measured again
            with it. If it is 0, norms have no intervals, and pairs are drawn again from their law.
        pairs: number of simulated pairs.
    """
    generator = np.random.default_rng([kinds, entries, round(100 * rho), round(100 * error)])
    law = 0.01 * np.array([[1, rho], [rho, 1]])

    def draw(count: int) -> np.ndarray:
        return 1 + generator.multivariate_normal([0, 0], law, size=(count, kinds, entries))

    def mean_correlation(norms: np.ndarray) -> float:  # (draws, kinds, entries, 2); kinds of one size count equally
        return float(spearman(norms[..., 0], norms[..., 1]).mean())

    expected = None if error else mean_correlation(draw(4000))
    covered = 0
    for truth in draw(pairs):
        again = truth + 0.1 * error * generator.standard_normal((400, *truth.shape))
        target = mean_correlation(again[1:]) if expected is None else expected
        low, high = check_drift(*_blueprints(again[0], 0.1 * error), draws=300).interval
        covered += low <= target <= high
    return covered / pairs


def _blueprints(norms: np.ndarray, error: float) -> tuple[Blueprint, Blueprint]:
    """Return both sides of norms (kinds, entries, 2), with intervals if there is an error."""
    half = Z95 * error
    one, other = (
        Blueprint(
            "model",
            tuple(
                Submodule(
                    f"{kind}.{i}", norm, kind=str(kind), norm_interval=(norm - half, norm + half) if error else None
                )
                for kind, own in enumerate(np.clip(norms[..., side], half, None))
                for i, norm in enumerate(own.tolist())
            ),
        )
        for side in (0, 1)
    )
    return one, other


def _correlations(a: Influence, b: Influence, size: int) -> list[float]:
    """Return drift correlations of random samples of `size` examples."""
    found = []
    for draw in range(DRAWS):
        order = torch.randperm(a.examples, generator=torch.Generator().manual_seed(draw))
        mine, others = order[:size], order[-size:]
        found.append(check_drift(_sample(a, mine), _sample(b, others), draws=2).correlation)
    return found


def _sample(influence: Influence, columns: torch.Tensor) -> Blueprint:
    """Return a blueprint of some of the measured examples, with norms alone."""
    means = influence.norms[:, columns].mean(dim=1).tolist()
    entries = zip(influence.submodules, means, strict=True)
    return Blueprint("model", tuple(replace(entry, gradient_norm=mean) for entry, mean in entries))
