"""Which PEFT can call the copy of an attention block that it trains whole."""

import inspect

import pytest
from peft.utils import ModulesToSaveWrapper


needs_peft_020 = pytest.mark.skipif(
    "x" in inspect.signature(ModulesToSaveWrapper.forward).parameters,
    reason="before PEFT 0.20, an unfrozen attention block cannot be called with keywords alone",
)
