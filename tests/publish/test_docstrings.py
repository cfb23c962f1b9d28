"""The examples in the docstrings of publishing."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["metadata", "method_comparison", "page", "plots", "run_card", "uniform_rank", "words"]
)
def test_the_examples_are_right(name):
    """They run and print what is written below them."""
    results = doctest.testmod(importlib.import_module(f"peft_blueprint.publish.{name}"))
    assert results.attempted and not results.failed
