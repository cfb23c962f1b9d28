"""A tiny model and a made-up blueprint of it, for tests of planning."""

from dataclasses import replace

from peft_blueprint import Blueprint
from peft_blueprint.measure.submodules import find_submodules
from peft_blueprint.testing import tiny_llama


def measured(model, gains=None, **more):
    """A blueprint of a model with these gains in its order, or 1, 2, 3, …."""
    entries = find_submodules(model)
    gains = gains or range(1, len(entries) + 1)
    return Blueprint(
        "org/m",
        tuple(
            replace(e, gradient_norm=float(g), adam_gain=float(g), signal_norm=1.0, weight_norm=1.0, **more)
            for e, g in zip(entries, gains, strict=True)
        ),
    )


LLAMA = tiny_llama(layers=6)
BLUEPRINT = measured(LLAMA)
