"""Does ranking by gradient norm stand for ranking by Fisher-preconditioned influence (appendix B.3)?

    python -m benchmarks influence --data FOLDER [--examples 64] [--sets gsm8k pubmedqa] [--dampings 0.01 0.1 1 10]

For every data set and damping: Spearman's correlation of the two rankings over all submodules and within kinds, each
with a 95 % bootstrap interval over examples; the cosine between a submodule's mean gradient and the preconditioned one,
median and 95 % of submodules; the summed mismatch over the summed influence; and what the top fifth by gradient norm
loses of the summed influence beside the bound of eq. 26. Then the same with one damping, in the unit of a
gradient's square, for all submodules; how well each ranking repeats on disjoint halves of the examples; how far the
default's projections are from long ones; and the CPU time of influence over that of the pass that it is made of.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_blueprint import Influence, measure_influence
from peft_blueprint.compare import spearman
from peft_blueprint.measure import PROJECTION_SIZE, FisherInfluence, fisher_influence, get_pad_token_id, make_batches
from peft_blueprint.measure.fisher import natural_gradient, within_kinds

from . import setup


LONG = 4093  # numbers of a long projection
K = 0.2
HALVES = 20  # random splits of the examples
QUICK = {"examples": 8, "length": 16, "sets": ["numbers"], "dampings": [0.1], "draws": 4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--sets", nargs="+", default=["gsm8k", "pubmedqa"])
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.01, 0.1, 1, 10])
    parser.add_argument("--draws", type=int, default=100, help="bootstrap draws")


def main(options: argparse.Namespace) -> None:
    """Measure every data set with default and with long projections, and print the tables."""
    model, tokenizer = setup.load(options.quick)
    found: dict[str, dict[int, Influence]] = {}
    costs = []
    for name in options.sets:
        rows = setup.read_rows(name, options.data, "train", tokenizer, options.length, seed=0)
        batches = list(make_batches(rows[: options.examples], 8, get_pad_token_id(tokenizer)))
        found[name] = {}
        for size in (PROJECTION_SIZE, LONG):
            before = time.process_time()
            measured = measure_influence(model, batches, projection_size=size, progress=False)
            passed = time.process_time() - before
            found[name][size] = _compact(measured)
            if size == PROJECTION_SIZE:
                seconds = [_seconds(measured) for _ in range(3)]
                costs.append([name, f"{passed:.1f}", f"{statistics.median(seconds):.2f}"])
                costs[-1].append(f"{statistics.median(seconds) / passed:.1%}")
        setup.say(f"{name}: {found[name][LONG].examples} examples, loss {found[name][LONG].losses.mean():.2f}")
    columns = ["data", "damping", "all submodules", "within kinds", "cosine", "Σε / Σ influence"]
    columns += ["lost at 20 %", "bound"]
    table = [
        _row(name, sizes[LONG], damping, options.draws)
        for name, sizes in found.items()
        for damping in options.dampings
    ]
    setup.print_table(columns, table)
    print("\nOne λ for all submodules, over their mean eigenvalue:")
    shared = [(name, sizes[LONG], d) for name, sizes in found.items() for d in (*options.dampings, 1000)]
    setup.print_table(["data", "damping", "all submodules", "within kinds"], (_shared_row(*row) for row in shared))
    print(f"\nTwo disjoint halves of the examples, damping {options.dampings[0]}, within kinds:")
    setup.print_table(
        ["data", "gradient norm", "influence"],
        ([name, *_repeats(sizes[LONG], options.dampings[0])] for name, sizes in found.items()),
    )
    print(f"\nProjections on {PROJECTION_SIZE} numbers against {LONG}: rank correlation of influence")
    setup.print_table(
        ["data", "damping", "all submodules", "within kinds", "influence, median ratio"],
        (_projected_row(name, sizes, d) for name, sizes in found.items() for d in options.dampings),
    )
    print()
    setup.print_table(["data", "pass, CPU s", "influence, CPU s", "ratio"], costs)


def _row(name: str, influence: Influence, damping: float, draws: int) -> list[Any]:
    whole = fisher_influence(influence, damping)
    figures = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        drawn = torch.randint(influence.examples, (influence.examples,), generator=generator)
        norms = influence.norms[:, drawn].double().mean(dim=1)
        figures.append(_agreements(fisher_influence(influence, damping, drawn).influences, norms, influence))
    setup.say(f"{name}, damping {damping:g}")
    found = _agreements(whole.influences, influence.norms.double().mean(dim=1), influence)
    ends = np.percentile(figures, [2.5, 97.5], axis=0)
    shown = [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, (low, high) in zip(found, ends.T, strict=True)]
    mismatch = float(whole.mismatches.sum() / (whole.scale * whole.influences.sum()))
    most, lost = whole.bound(K)
    return [name, f"{damping:g}", *shown, _cosines(whole), f"{mismatch:.2f}", f"{lost:.1%}", f"{most:.0%}"]


def _cosines(found: FisherInfluence) -> str:
    """Return the cosine between gradient and preconditioned gradient: median [2.5 %, 97.5 %] over submodules."""
    natural = found.scale * found.influences
    products = (found.mean_gradient_norms**2 + natural**2 - found.mismatches**2) / 2
    low, middle, high = np.percentile(products / (found.mean_gradient_norms * natural), [2.5, 50, 97.5])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _compact(influence: Influence) -> Influence:
    """Return the same gradients in as many coordinates as there are examples: inner products stay, draws are quick."""
    return replace(influence, projections=torch.linalg.qr(influence.projections.mT, mode="r").R.mT)


def _agreements(influences: Tensor, norms: Tensor, influence: Influence) -> tuple[float, float]:
    """Return correlations of ranks over all submodules and within kinds."""
    kinds = [submodule.kind for submodule in influence.submodules]
    return float(spearman(influences, norms)), within_kinds(influences, norms, kinds)


def _shared_row(name: str, influence: Influence, damping: float) -> list[Any]:
    """Correlate with influence under the same λ in every submodule."""
    squares = influence.norms.double().square().mean(dim=1)
    eigenvalues = squares / influence.examples  # mean over those that the examples can make positive
    sizes = torch.stack(
        [
            natural_gradient(gradients.double(), damping * float(eigenvalues.mean() / own)).norm()
            for gradients, own in zip(influence.projections, eigenvalues, strict=True)
        ]
    )
    found = _agreements(sizes, influence.norms.double().mean(dim=1), influence)
    return [name, f"{damping:g}", *(f"{value:+.3f}" for value in found)]


def _repeats(influence: Influence, damping: float) -> list[str]:
    """Correlate each ranking between disjoint halves, mean [least, greatest] over splits."""
    kinds = [submodule.kind for submodule in influence.submodules]
    by_norm, by_influence = [], []
    for draw in range(HALVES):
        order = torch.randperm(influence.examples, generator=torch.Generator().manual_seed(draw))
        halves = order[: influence.examples // 2], order[influence.examples // 2 :]
        a, b = (fisher_influence(influence, damping, half).influences for half in halves)
        by_influence.append(within_kinds(a, b, kinds))
        a, b = (influence.norms[:, half].double().mean(dim=1) for half in halves)
        by_norm.append(within_kinds(a, b, kinds))
    return [_spread(values) for values in (by_norm, by_influence)]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f} [{min(values):+.3f}, {max(values):+.3f}]"


def _projected_row(name: str, sizes: dict[int, Influence], damping: float) -> list[Any]:
    short, long = (fisher_influence(sizes[size], damping).influences for size in (PROJECTION_SIZE, LONG))
    over_all, within = _agreements(short, long, sizes[LONG])
    return [name, f"{damping:g}", f"{over_all:+.3f}", f"{within:+.3f}", f"{(short / long).median():.2f}"]


def _seconds(influence: Influence) -> float:
    before = time.process_time()
    fisher_influence(influence)
    return time.process_time() - before
