"""Every example in a docstring of the room runs as printed. Run: pytest tests/data/test_docstrings.py"""

import doctest
import importlib
import pkgutil

import pytest

from peft_blueprint import data


NAMES = [module.name for module in pkgutil.iter_modules(data.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_run(name):
    """Their output is as shown."""
    assert doctest.testmod(importlib.import_module(f"peft_blueprint.data.{name}")).failed == 0
