"""How good are sketched norms? Beside exact ones of the same examples.

    python -m benchmarks sketch --data FOLDER [--set gsm8k] [--examples 64] [--sizes 16 32 64]

For every size of the sketch: Spearman's correlation of ranks within kind between sketched and exact submodule norms; the
relative error of single norms (one example in one submodule), measured and as the sketch itself predicts it; the error
of submodule means and of J(z); signal norms; and how much of the mean gradient's energy its leading directions hold, as
the sketch says and as the whole mean gradient does. Before that, the tails of the exact norms over submodules, and of
the entries of single mean gradients.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from peft_blueprint import Blueprint, Influence, check_drift, measure_influence
from peft_blueprint.measure import entries_report, get_pad_token_id, make_batches, normalize_within, tail_report

from . import setup


RANKS = (4, 8, 15)
QUICK = {"examples": 8, "length": 16, "sizes": [16], "set": "numbers"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=160, help="tokens of an example at most")
    parser.add_argument("--set", default="demo", help="data set")
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--seeds", type=int, default=1, help="of Ω, for every size")


def main(options: argparse.Namespace) -> None:
    """Measure exactly, then with every size, and print the figures."""
    model, tokenizer = setup.load(options.quick)
    rows = setup.read_rows(options.set, options.data, "train", tokenizer, options.length, seed=0)[: options.examples]
    batches = list(make_batches(rows, 8, get_pad_token_id(tokenizer)))
    exact = measure_influence(model, batches, method="exact", sketch_size=None)
    print(
        f"{options.set}, {exact.examples} examples, at most {options.length} tokens, {len(exact.submodules)} submodules"
    )
    print(f"energy of the mean gradient in its leading directions, whole: {_energies(exact)}")
    norms = exact.norms.mean(dim=1).tolist()
    print(f"\ntail of the norms over submodules:\n{tail_report(norms)}")
    within = normalize_within(norms, [submodule.kind for submodule in exact.submodules])
    print(f"\nof the norms over their kind's mean:\n{tail_report(within)}")
    for submodule, gradient in list(zip(exact.submodules, exact.sketches, strict=True))[3::70]:
        print(f"\nof the entries of the mean gradient of {submodule.name}:\n{entries_report(gradient.numpy())}")
    for size in options.sizes:
        for seed in range(options.seeds):
            sketch = measure_influence(model, batches, method="sketch", sketch_size=size, seed=seed)
            print(f"\ns = {size}, seed {seed}")
            _report(exact, sketch)


def _report(exact: Influence, sketch: Influence) -> None:
    """Print one size's figures."""
    drift = check_drift(_blueprint_of(sketch), _blueprint_of(exact), draws=2)
    by_kind = ", ".join(f"{kind} {value:.3f}" for kind, value in sorted(drift.by_kind.items()))
    print(f"  rank correlation within kind: {drift.correlation:.4f} ({by_kind})")
    single = sketch.norms / exact.norms - 1
    print(f"  one example, one submodule: relative error {_rms(single):.4f} (root mean square), predicted ", end="")
    print(f"{_rms(sketch.norm_errors):.4f}; mean {single.mean():+.4f}, worst {single.abs().max():.3f}")
    means = sketch.norms.mean(dim=1) / exact.norms.mean(dim=1) - 1
    print(f"  means of submodules: {_rms(means):.4f}, worst {means.abs().max():.3f}")
    influence = sketch.example_norms / exact.example_norms - 1
    ranks = torch.stack([t.argsort().argsort().float() for t in (sketch.example_norms, exact.example_norms)])
    print(f"  J(z): {_rms(influence):.4f}; rank correlation over examples {torch.corrcoef(ranks)[0, 1]:.4f}")
    is_seen = (exact.signal_norms > 0) & (sketch.signal_norms > 0)
    signals = (sketch.signal_norms / exact.signal_norms - 1)[is_seen]
    print(f"  signal norms: {_rms(signals):.4f} over {len(signals)} submodules")
    print(f"  energy in the leading directions, by the sketch: {_energies(sketch)}", flush=True)


def _energies(influence: Influence) -> str:
    """Format the mean and least share over submodules, for several ranks."""
    shares = {rank: influence.singular_energy(rank) for rank in RANKS}
    return ", ".join(f"top {rank}: {share.mean():.4f} (least {share.min():.4f})" for rank, share in shares.items())


def _blueprint_of(influence: Influence) -> Blueprint:
    means = zip(influence.submodules, influence.norms.mean(dim=1).tolist(), strict=True)
    return Blueprint("model", tuple(replace(entry, gradient_norm=mean) for entry, mean in means))


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
