"""Do two small samples agree on where the gradient is? Of the same data, and of different data.

    python -m benchmarks drift --data FOLDER [--examples 64] [--sets NAME ...]

Measures SmolLM2-135M once on each data set, then correlates ranks within kind between random samples of 8, 16, 32, …
examples, up to half of what was measured, disjoint where the data are the same. The drift threshold belongs between what
the same data gives and what other data gives.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import combinations

import torch

from peft_blueprint import Blueprint, Influence, check_drift, measure_influence
from peft_blueprint.measure import get_pad_token_id, make_batches

from . import setup


SIZES = (8, 16, 32, 64, 128)
DRAWS = 20
QUICK = {"examples": 16, "length": 16, "sets": ["numbers"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--sets", nargs="+", default=["demo", "code", "gsm8k", "pubmedqa"])


def main(options: argparse.Namespace) -> None:
    """Measure every data set, then print a table of correlations: mean [least, greatest] over draws."""
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
