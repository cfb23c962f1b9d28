"""Is it worth choosing submodules and examples for each other? The cross-influence matrix of SmolLM2-135M on GSM8K.

    python -m benchmarks cross --data FOLDER

Measures 64 training examples of at most 200 tokens, answers as targets, keeps the matrices in `.cache/`, and prints two tables in Markdown:
how near each is to rank one (eq. 33), and which share of it (eq. 34) is captured by the separate choice of submodules and
examples, by the joint choice, and by k^γ·q^δ (eq. 35). The last column is what no choice of that size passes. Every pair
of k and q is there twice: as shares of numbers, and as shares of adapters' parameters and of target tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from peft_blueprint.data import CrossInfluence, Of, make_batches, pad_token_of
from peft_blueprint.measure import load_model, measure_influence
from recipes import smollm2

from .placement import BATCH, MEASURED, Bench


CACHE = Path(".cache")
LENGTH = 200
SHARES = ((0.2, 0.3), (0.1, 0.1), (0.3, 0.1))


def matrices(bench: Bench) -> dict[str, CrossInfluence]:
    """Norms and alignments, raw and normalised, by name."""
    paths = {of: CACHE / f"gsm8k_cross_{of}.safetensors" for of in get_args(Of)}
    if not all(path.exists() for path in paths.values()):
        model, tokenizer = load_model(str(smollm2.prepare()), "float32")
        batches = make_batches(bench.rows("train", 0, LENGTH)[:MEASURED], BATCH, pad_token_of(tokenizer))
        influence = measure_influence(model, batches)
        for of, path in paths.items():
            CrossInfluence.from_influence(influence, of).save(path)
    norms, alignments = (CrossInfluence.load(paths[of]) for of in get_args(Of))
    return {
        "norms": norms,
        "norms by kind": norms.normalised_by("kind"),
        "norms by example": norms.normalised_by("example"),
        "norms by kind and example": norms.normalised_by("kind").normalised_by("example"),
        "alignments": alignments,
        "alignments by kind": alignments.normalised_by("kind"),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K")
    found = matrices(Bench(parser.parse_args().data))
    print(
        "| matrix | effective rank | participation ratio | R for 90 / 95 / 99 % of the squares | error, R = 1 | ",
        end="",
    )
    print("error if independent | interactions beyond chance |\n" + "|---" * 7 + "|")
    for name, matrix in found.items():
        rank = matrix.low_rank()
        needed = " / ".join(str(rank.components_for(share)) for share in (0.9, 0.95, 0.99))
        print(
            f"| {name} | {rank.effective_rank:.1f} of {len(rank.singular_values)} | {rank.participation_ratio:.2f} | ",
            end="",
        )
        print(f"{needed} | {rank.error(1):.3f} | {rank.independent_error:.3f} | {rank.interactions} |")
    print("\n| matrix | k, q | shares of | k^γ·q^δ | product of shares | separate | joint | bound |")
    print("|---" * 8 + "|")
    for name, matrix in found.items():
        for k, q in SHARES:
            costs = {"submodule_costs": matrix.parameters, "example_costs": matrix.target_tokens}
            for what, options in (("numbers", {}), ("parameters, tokens", costs)):
                chosen = matrix.joint(k, q, **options)
                shares = (chosen.independent, chosen.product, chosen.separate, chosen.share, chosen.bound)
                print(f"| {name} | {k}, {q} | {what} | " + " | ".join(f"{share:.2%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
