"""The examples in the docstrings of placing."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *(
            "budget",
            "config",
            "coverage",
            "gains",
            "hardware",
            "joint",
            "options",
            "planner",
            "ranks",
            "scores",
            "solver",
        ),
        *("learning_rate", "trainer_configs", "variants", "cost.model", "cost.structure", "cost.workload"),
    ],
)
def test_the_examples_are_right(name):
    """They run and print what is written below them."""
    results = doctest.testmod(importlib.import_module(f"peft_blueprint.place.{name}"))
    assert results.attempted and not results.failed
