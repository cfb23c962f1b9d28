"""Every example in a docstring of the room runs as printed. Run: pytest tests/measure/test_docstrings.py"""

import doctest
import importlib
import pkgutil

import pytest

from peft_blueprint import measure


NAMES = [module.name for module in pkgutil.iter_modules(measure.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_run(name):
    """Their output is as shown."""
    assert doctest.testmod(importlib.import_module(f"peft_blueprint.measure.{name}")).failed == 0
