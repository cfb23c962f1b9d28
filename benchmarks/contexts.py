"""Which contexts does a card hold? Predicted memory and step time of a 7 B model, by what of a step is computed.

    python -m benchmarks contexts [--cards 12 24] [--lengths 4096 16384] [--prompt-share 0.84] [--epochs 3]

The model is on the meta device, in the shape of Mistral-7B: 32 layers, 4096 features, 8 of 32 heads with keys and values,
32,000 tokens. One example a step, gradient checkpointing that stops below the lowest adapter, paged 8-bit AdamW. All
figures are predicted; the time constant of CUDA was not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import MistralConfig, PretrainedConfig

from peft_blueprint.measure import empty_model
from peft_blueprint.place import Structure, Variant, Workload, plan_placement, step_variants

from . import setup


GIB, RESERVE = 2**30, 1.0  # GiB of a card for the CUDA context and the allocator's fragmentation
QUICK = {"layers": 2, "lengths": [256]}


@dataclass(frozen=True)
class Row:
    """One way to train with one length of context.

    Args:
        length: tokens of an example.
        weights: "bfloat16" or "nf4".
        variant: the computation, and its predicted cost.
    """

    length: int
    weights: str
    variant: Variant

    @property
    def gib(self) -> float:
        """Memory at the peak of a step, in GiB."""
        return (self.variant.memory or 0) / GIB

    def fits(self, card: float) -> bool:
        """Whether a card of this many GiB holds it, with `RESERVE` left for the CUDA context."""
        return self.gib <= card - RESERVE


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's options."""
    parser.add_argument("--cards", type=float, nargs="+", default=[12, 24], help="GiB of the cards")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="tokens of an example")
    parser.add_argument(
        "--prompt-share", type=float, default=0.84, help="of the tokens; PubMedQA with contexts has 0.84"
    )
    parser.add_argument("--epochs", type=int, default=3, help="over which caches are averaged")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")


def main(options: argparse.Namespace) -> None:
    """Predict, and print a table."""
    rows = list(
        predictions(
            options.lengths, options.prompt_share, options.epochs, options.layers, not options.no_checkpointing
        )
    )
    cards = [f"{card:g} GiB card" for card in options.cards]
    checkpointing = "without" if options.no_checkpointing else "with"
    print(
        f"7 B shape, 1 example a step, prompt share {options.prompt_share:.0%}, {checkpointing} gradient checkpointing"
    )
    print("All figures are predicted. Time is relative to all-linear LoRA at all positions.\n")
    setup.print_table(
        ["tokens", "weights", "adapters", "computed", "time", "GiB", *cards],
        [
            [
                row.length,
                row.weights,
                row.variant.adapters,
                row.variant.name,
                f"{row.variant.time:.2f}",
                f"{row.gib:.1f}",
                *("fits" if row.fits(card) else "–" for card in options.cards),
            ]
            for row in rows
        ],
    )


def predictions(
    lengths: Sequence[int], prompt_share: float, epochs: int = 3, layers: int = 32, checkpointing: bool = True
) -> Iterator[Row]:
    """Predict every variant for every length, with bfloat16 and nf4 weights."""
    model = empty_model(seven_b(layers))
    structure = Structure.of(model)
    for length in lengths:
        for quantization in (None, "nf4"):
            load = Workload(
                batch_size=1,
                length=length,
                prompt=round(prompt_share * length),
                quantization=quantization,
                checkpointing=checkpointing,
                optimizer="paged_adamw_8bit",
                padded=False,
                input_gradients=False,
                epochs=epochs,
            )
            placement = plan_placement(None, model, fraction=1 / 7, ranks="equal_parameters", workload=load)
            upper = {
                part.name: load.rank
                for part in structure.parts
                if part.name in structure.adaptable and (part.depth or 0) >= layers // 2
            }
            found = list(step_variants(structure, load, placement))
            found += [
                replace(variant, adapters="upper half")
                for variant in step_variants(structure, load, upper)
                if variant.adapters == "placement"
            ]
            for variant in found:
                yield Row(length, quantization or "bfloat16", variant)


def seven_b(layers: int = 32) -> PretrainedConfig:
    """Return the shape of Mistral-7B."""
    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=None,
    )
