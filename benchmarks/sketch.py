"""How good sketched norms are, beside exact ones of the same examples.

    python -m benchmarks sketch [--examples 64] [--data FOLDER --set GSM8K] [--sizes 16 32 64]

For every size of the sketch: Spearman's correlation of ranks within kind between sketched and exact submodule norms; the
relative error of single norms (one example in one submodule), measured and as the sketch itself predicts it; the error
of submodule means and of J(z); signal norms; and how much of the mean gradient's energy its leading directions hold, as
the sketch says and as the whole mean gradient does. Before that, what the exact norms' tails are, over submodules and
over the entries of single mean gradients.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch

from peft_blueprint import Blueprint, Influence, check_drift, measure_influence
from peft_blueprint.data import encode, make_batches, pad_token_of
from peft_blueprint.measure import entries_report, load_model, normalise_within, tail_report
from recipes import smollm2

from .drift import data_sets


RANKS = (4, 8, 15)


def main() -> None:
    """Measure exactly, then with every size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--data", type=Path, help="folder with more data sets")
    parser.add_argument("--set", default="docstrings")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, default=1, help="of Ω, for every size")
    options = parser.parse_args()

    model, tokenizer = load_model(str(smollm2.prepare()), "float32")
    examples = data_sets(options.data)[options.set]
    random.Random(0).shuffle(examples)
    rows = encode(examples[: 2 * options.examples], tokenizer, options.max_length)
    batches = list(make_batches(rows, 8, pad_token_of(tokenizer)))
    exact = measure_influence(model, batches, max_examples=options.examples, method="exact", sketch_size=None)
    print(
        f"{options.set}, {exact.examples} examples, at most {options.max_length} tokens, {len(exact.submodules)} submodules"
    )
    print("energy of the mean gradient in its leading directions, whole: " + energies(exact))
    norms = exact.norms.mean(dim=1).tolist()
    print(f"\ntail of the norms over submodules:\n{tail_report(norms)}")
    within = normalise_within(norms, [submodule.kind for submodule in exact.submodules])
    print(f"\nof the norms over their kind's mean:\n{tail_report(within)}")
    for submodule, gradient in list(zip(exact.submodules, exact.sketches, strict=True))[3::70]:
        print(f"\nof the entries of the mean gradient of {submodule.name}:\n{entries_report(gradient.numpy())}")
    for size in options.sizes:
        for seed in range(options.seeds):
            sketch = measure_influence(
                model, batches, max_examples=options.examples, method="sketch", sketch_size=size, seed=seed
            )
            print(f"\ns = {size}, seed {seed}", flush=True)
            report(exact, sketch)


def report(exact: Influence, sketch: Influence) -> None:
    """One size's figures."""
    drift = check_drift(blueprint_of(sketch), blueprint_of(exact), draws=2)
    by_kind = ", ".join(f"{kind} {value:.3f}" for kind, value in sorted(drift.by_kind.items()))
    print(f"  rank correlation within kind: {drift.correlation:.4f} ({by_kind})")
    single = sketch.norms / exact.norms - 1
    print(
        f"  one example, one submodule: relative error {rms(single):.4f} (root mean square), predicted "
        f"{rms(sketch.norm_errors):.4f}; mean {single.mean():+.4f}, worst {single.abs().max():.3f}"
    )
    means = sketch.norms.mean(dim=1) / exact.norms.mean(dim=1) - 1
    print(f"  means of submodules: {rms(means):.4f}, worst {means.abs().max():.3f}")
    influence = sketch.example_norms / exact.example_norms - 1
    ranks = torch.stack([t.argsort().argsort().float() for t in (sketch.example_norms, exact.example_norms)])
    print(f"  J(z): {rms(influence):.4f}; rank correlation over examples {torch.corrcoef(ranks)[0, 1]:.4f}")
    is_seen = (exact.signal_norms > 0) & (sketch.signal_norms > 0)
    signals = (sketch.signal_norms / exact.signal_norms - 1)[is_seen]
    print(f"  signal norms: {rms(signals):.4f} over {len(signals)} submodules")
    print("  energy in the leading directions, by the sketch: " + energies(sketch))


def energies(influence: Influence) -> str:
    """Mean and least share over submodules, for several ranks."""
    shares = {rank: influence.singular_energy(rank) for rank in RANKS}
    return ", ".join(f"top {rank}: {share.mean():.4f} (least {share.min():.4f})" for rank, share in shares.items())


def blueprint_of(influence: Influence) -> Blueprint:
    """Norms alone."""
    means = zip(influence.submodules, influence.norms.mean(dim=1).tolist(), strict=True)
    return Blueprint("SmolLM2-135M", tuple(replace(entry, gradient_norm=mean) for entry, mean in means))


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    main()
