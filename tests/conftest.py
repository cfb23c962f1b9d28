"""What several test files measure once."""

import pytest
from hypothesis import settings

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.testing import tiny_llama, toy_batches


settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def blueprint() -> Blueprint:
    """A blueprint of the twelve-layer tiny Llama."""
    return generate_blueprint(tiny_llama(layers=12), toy_batches(), model_id="tiny/llama", progress=False)
