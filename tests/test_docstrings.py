"""Examples in docstrings run as printed, and every public function and class has one."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import peft_blueprint
from tests import ROOMS


MODULES = [  # but programs, and the plugin that imports axolotl
    module.name
    for module in pkgutil.walk_packages(peft_blueprint.__path__, "peft_blueprint.")
    if not module.ispkg and not module.name.endswith(("axolotl", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    """Their output is as shown; of an error, its class."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert not found.failed


def is_record(value):
    """Whether a class is an error, or data alone: fields and properties, which the function that returns it shows."""
    methods = {name for name, member in vars(value).items() if callable(getattr(value, name)) and name[0] != "_"}
    is_data = dataclasses.is_dataclass(value) or issubclass(value, tuple)
    return issubclass(value, Exception) or (is_data and methods <= {"to_dict"})


@pytest.mark.parametrize("room", ["", *ROOMS, "testing"])
def test_public_names_resolve_and_have_an_example(room):
    """Functions, and classes that are more than a record; a record has a docstring."""
    module = importlib.import_module(f"peft_blueprint.{room}".rstrip("."))
    assert inspect.getdoc(module)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            text = inspect.getdoc(value) or ""
            assert "Example:" in text or (text and inspect.isclass(value) and is_record(value)), name
