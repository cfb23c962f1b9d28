"""Shared fixtures: measurements made once per session, and Hubs on loopback."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from hypothesis import Phase, settings

from peft_blueprint import Blueprint, generate_blueprint
from peft_blueprint.testing import tiny_llama, toy_batches
from tests.hub.loopback import LoopbackHub
from tests.hub_client import TENSORS, TEXT
from tests.publishing import CARD


# A busy machine is no failure, and to explain one at length takes minutes.
settings.register_profile("ours", deadline=None, phases=set(Phase) - {Phase.explain})
settings.load_profile("ours")


torch.set_num_threads(1)  # tiny matrices gain nothing from more; the end-to-end test takes all


@pytest.fixture(scope="session")
def blueprint() -> Blueprint:
    """A blueprint of the twelve-layer tiny Llama."""
    return generate_blueprint(tiny_llama(layers=12), toy_batches(), model_id="tiny/llama", progress=False)


@pytest.fixture(scope="session")
def two_layers(blueprint):
    """Two layers of it."""
    return replace(blueprint, submodules=blueprint.submodules[:14])


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Where a short training with the callback has left its three blueprints."""
    from transformers import Trainer, TrainingArguments  # few tests need it, and it takes seconds

    from peft_blueprint.train.blueprint_callback import BlueprintCallback

    folder = tmp_path_factory.mktemp("run")
    batches = toy_batches(padding="none")
    examples = [{key: batch[key][i] for key in ("input_ids", "labels")} for batch in batches for i in (0, 1)]
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(folder, max_steps=10, per_device_train_batch_size=2, learning_rate=0.05, **quiet)
    trainer = Trainer(tiny_llama(layers=4), arguments, train_dataset=examples, eval_dataset=examples)
    trainer.add_callback(BlueprintCallback(trainer))
    trainer.train()
    return folder


@pytest.fixture
def no_token_of_mine(monkeypatch):
    """The tests' requests carry no credentials but those that they name."""
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def plain_client(no_token_of_mine, monkeypatch):
    """Without Xet, offline mode and waiting between attempts as well."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path):
    """A repository on disk: a card, a file in a folder, and a binary file."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "model" / "sub" / "notes.txt").write_bytes(TEXT)
    (tmp_path / "model" / "model.safetensors").write_bytes(TENSORS)
    return tmp_path / "model"


@pytest.fixture
def hub(folder):
    """A Hub with that folder as org/name."""
    with LoopbackHub({"org/name": folder}) as hub:
        yield hub


@pytest.fixture
def api(hub):
    """The client of that Hub."""
    return HfApi(endpoint=hub.endpoint, token="hf_any")


@pytest.fixture
def model_hub():
    """A Hub with the repository of the tiny Llama, which has a card."""
    with LoopbackHub() as hub:
        hub.repository("tiny/llama").commit({"README.md": CARD.encode(), "config.json": b"{}"})
        yield hub


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("peft_blueprint.runs.ledger.time.perf_counter", lambda: Clock.now)
    return Clock
