"""What several test files measure once."""

import pytest
import torch
from hypothesis import Phase, settings

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.testing import tiny_llama, toy_batches


# A busy machine is no failure, and to explain one at length takes minutes.
settings.register_profile("ours", deadline=None, phases=set(Phase) - {Phase.explain})
settings.load_profile("ours")


torch.set_num_threads(1)  # tiny matrices gain nothing from more; the end-to-end test takes all


@pytest.fixture(scope="session")
def blueprint() -> Blueprint:
    """A blueprint of the twelve-layer tiny Llama."""
    return generate_blueprint(tiny_llama(layers=12), toy_batches(), model_id="tiny/llama", progress=False)
