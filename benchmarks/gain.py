"""Which prediction of a placement's gain ranks placements as their losses do?

    python -m benchmarks gain --data FOLDER

The losses below are those of a first trial: SmolLM2-135M on GSM8K in bfloat16, answer tokens only, examples of at most 170
tokens, batches of 8, LoRA of rank 16, 30 steps of AdamW at the better of the learning rates that were tried, one seed. The
placements are made again from their rules on a blueprint of GSM8K, as `benchmark_placement.py` measures it with FOLDER.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from peft_blueprint import Submodule
from peft_blueprint.blueprint import norm_of
from peft_blueprint.place import CoverGain, SetGain, by_kind

from .placement import Bench


Entries = Sequence[Submodule]
SIXTHS = [range(i, i + 5) for i in range(0, 30, 5)]
TENTHS = [range(i, i + 3) for i in range(0, 30, 3)]


def gain_of(entry: Submodule) -> float:
    """Adam's first-order gain, which every entry of this blueprint has."""
    return entry.adam_gain or 0.0


def of_each_kind(entries: Entries, take: Callable[[Entries], Entries]) -> list[Submodule]:
    """What a rule takes of every kind."""
    return [entry for members in by_kind(entries).values() for entry in take(members)]


def one_in_each(runs: Sequence[range], best: Callable[[Entries], Submodule]) -> Callable[[Entries], Entries]:
    """One entry of every run of layers."""
    return lambda entries: [best([e for e in entries if e.depth in run]) for run in runs]


def strongest(entries: Entries) -> Submodule:
    """By norm."""
    return max(entries, key=norm_of)


def weakest(entries: Entries) -> Submodule:
    """By norm."""
    return min(entries, key=norm_of)


def layers(low: int, high: int) -> Callable[[Entries], Entries]:
    """All linear layers of some blocks."""
    return lambda entries: [e for e in entries if e.depth is not None and low <= e.depth < high]


def pooled(entries: Entries) -> Entries:
    """The largest norms, of whatever kind, with a fifth of all-linear LoRA's parameters."""
    left = 0.2 * sum(sum(e.shape or ()) for e in entries)
    taken = []
    for entry in sorted(entries, key=norm_of, reverse=True):
        left -= sum(entry.shape or ())
        if left < 0:
            break
        taken.append(entry)
    return taken


# placement, its rule, loss at 30 steps
TRIED: list[tuple[str, Callable[[Entries], Entries], float]] = [
    ("all-linear", lambda entries: entries, 0.746),
    ("strongest in each kind and sixth", lambda e: of_each_kind(e, one_in_each(SIXTHS, strongest)), 0.746),
    ("every fifth layer of each kind", lambda e: of_each_kind(e, lambda members: members[2::5]), 0.747),
    ("weakest in each kind and sixth", lambda e: of_each_kind(e, one_in_each(SIXTHS, weakest)), 0.751),
    ("strongest fifth of each kind", lambda e: of_each_kind(e, lambda m: sorted(m, key=norm_of)[-6:]), 0.759),
    ("strongest, pooled", pooled, 0.766),
    ("largest Adam gain in each tenth", one_in_each(TENTHS, lambda e: max(e, key=gain_of)), 0.771),
    ("upper half, all linear", layers(15, 30), 0.783),
    ("middle six layers", layers(12, 18), 0.792),
    ("first six layers", layers(0, 6), 0.797),
    ("weakest fifth of each kind", lambda e: of_each_kind(e, lambda m: sorted(m, key=norm_of)[:6]), 0.820),
    ("last six layers", layers(24, 30), 0.886),
]


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K")
    entries = list(Bench(parser.parse_args().data).blueprint)
    gains = [gain_of(entry) for entry in entries]
    models: dict[str, Callable[[Entries], float]] = {
        "cover gain of adam_gain (`kept`)": of_names(CoverGain(entries, gains)),
        "cover gain of signal_norm": of_names(CoverGain(entries, [e.signal_norm or 0.0 for e in entries])),
        "cover gain, all alike": of_names(CoverGain(entries, [1.0] * len(entries))),
        "summed adam_gain": lambda chosen: sum(map(gain_of, chosen)) / sum(gains),
        "set gain (empirical Fisher)": of_names(SetGain(entries)),
        "number of adapters": lambda chosen: len(chosen) / len(entries),
    }
    losses = [loss for _, _, loss in TRIED]
    chosen = [list(rule(entries)) for _, rule, _ in TRIED]
    print("| placement | adapters | loss | " + " | ".join(models) + " |")
    print("|---" * (3 + len(models)) + "|")
    for (name, _, loss), some in zip(TRIED, chosen, strict=True):
        print(f"| {name} | {len(some)} | {loss:.3f} | " + " | ".join(f"{m(some):.2f}" for m in models.values()) + " |")
    ranks = [spearmanr([-model(some) for some in chosen], losses).statistic for model in models.values()]
    print("| *Spearman correlation with the loss* | | | " + " | ".join(f"**{rank:.2f}**" for rank in ranks) + " |")


def of_names(gain: CoverGain | SetGain) -> Callable[[Entries], float]:
    """A gain of entries, which it knows by their names."""
    return lambda chosen: gain.of([entry.name for entry in chosen])


if __name__ == "__main__":
    main()
