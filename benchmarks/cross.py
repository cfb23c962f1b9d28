"""Is it worth choosing submodules and examples for each other? The cross-influence matrix of SmolLM2-135M on GSM8K.

    python -m benchmarks cross --data FOLDER

Measures 64 training examples of at most 200 tokens and prints two tables: how near each matrix is to rank one (eq. 33),
and which share of it (eq. 34) is captured by the separate choice of submodules and examples, by the joint choice, and by
k^γ·q^δ (eq. 35). The last column is what no choice of that size passes. Every pair of k and q is there twice: as shares
of numbers, and as shares of adapters' parameters and of target tokens.
"""

from __future__ import annotations

import argparse

from peft_blueprint import measure_influence
from peft_blueprint.data import CrossInfluence
from peft_blueprint.measure import get_pad_token_id, make_batches

from . import setup


BATCH = 8
SHARES = ((0.2, 0.3), (0.1, 0.1), (0.3, 0.1))
QUICK = {"examples": 24, "length": 16}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--length", type=int, default=200, help="tokens of an example at most")


def main(options: argparse.Namespace) -> None:
    """Measure and print both tables."""
    found = _matrices(options)
    columns = ["matrix", "effective rank", "participation ratio", "R for 90 / 95 / 99 % of the squares"]
    rows = []
    for name, matrix in found.items():
        rank = matrix.low_rank()
        needed = " / ".join(str(rank.components_for(share)) for share in (0.9, 0.95, 0.99))
        effective = f"{rank.effective_rank:.1f} of {len(rank.singular_values)}"
        errors = [f"{rank.error(1):.3f}", f"{rank.independent_error:.3f}"]
        rows.append([name, effective, f"{rank.participation_ratio:.2f}", needed, *errors, rank.interactions])
    setup.print_table([*columns, "error, R = 1", "error if independent", "interactions beyond chance"], rows)
    print()
    rows = []
    for name, matrix in found.items():
        for k, q in SHARES:
            costs = {"submodule_costs": matrix.parameters, "example_costs": matrix.target_tokens}
            for what, settings in (("numbers", {}), ("parameters, tokens", costs)):
                chosen = matrix.select_jointly(k, q, **settings)
                shares = (chosen.independent, chosen.product, chosen.separate, chosen.share, chosen.bound)
                rows.append([name, f"{k}, {q}", what, *(f"{share:.2%}" for share in shares)])
    columns = ["matrix", "k, q", "shares of", "k^γ·q^δ", "product of shares", "separate", "joint", "bound"]
    setup.print_table(columns, rows)


def _matrices(options: argparse.Namespace) -> dict[str, CrossInfluence]:
    """Measure norms and alignments; return them raw and normalised, by name."""
    model, tokenizer = setup.load(options.quick)
    name = "numbers" if options.quick else "gsm8k"
    rows = setup.read_rows(name, options.data, "train", tokenizer, options.length, seed=0)[: options.examples]
    influence = measure_influence(model, make_batches(rows, BATCH, get_pad_token_id(tokenizer)))
    norms, alignments = (CrossInfluence.from_influence(influence, of) for of in ("norms", "alignments"))
    return {
        "norms": norms,
        "norms by kind": norms.normalize("kind"),
        "norms by example": norms.normalize("example"),
        "norms by kind and example": norms.normalize("kind").normalize("example"),
        "alignments": alignments,
        "alignments by kind": alignments.normalize("kind"),
    }
