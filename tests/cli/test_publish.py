"""Blueprints travel from the command line: embedded, published, fetched, used. Run: pytest tests/test_cli_publish.py"""

import json
import os
import subprocess
import sys

import pytest

from peft_blueprint import Blueprint
from peft_blueprint.testing import tiny_llama
from tests.hub.loopback import LoopbackHub
from tests.hub_client import adapters_placed
from tests.records import from_header_text, to_header_text


@pytest.fixture
def model(tmp_path):
    """The folder of a model in one file."""
    tiny_llama(layers=12).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def file(blueprint, tmp_path):
    """The blueprint of that model."""
    return blueprint.save(tmp_path / "blueprint.json")


@pytest.fixture
def cli(tmp_path):
    """Runs the program in a process of its own, with a Hub if one is given; returns status, stdout and stderr."""

    def run(*words, hub=None, token=None):
        environment = os.environ | {
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9",
            **({"HF_TOKEN": token} if token else {}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "peft_blueprint.cli", *map(str, words)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_embed_extract_and_remove_work_on_a_models_files(blueprint, model, file, cli):
    """In, shown, written out, and out again; the second removal answers no."""
    rounded = from_header_text(to_header_text(blueprint))
    status, out, err = cli("embed", model, file, "--format", "quiet")
    assert (status, out.split(), err) == (0, [str(model / "model.safetensors")], "")
    status, out, _ = cli("extract", model, "--format", "json")
    assert (status, json.loads(out)["digest"]) == (0, rounded.digest)
    status, out, _ = cli("extract", model, "--out", "again.csv", "--format", "quiet")
    assert (status, Blueprint.from_pretrained(model.parent / out.strip())) == (0, rounded)
    assert cli("remove", model, "--format", "quiet")[:2] == (0, f"{model / 'model.safetensors'}\n")
    assert cli("remove", model)[0] == 1
    status, _, err = cli("extract", model)
    assert status == 2 and "carries no blueprint" in err and "peft-blueprint embed" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embed", "none", "blueprint.json"), "none"),
        (("embed", "model", "none.json"), "No blueprint found at none.json"),
        (("publish", "blueprint.json", "org/model"), "'tiny/llama'|token"),
        (("publish", "blueprint.json", "not a repository"), "not a repository"),
        (("fetch", "org/none"), "'org/none'"),
        (("fetch", "blueprint.json", "--domain", "../x"), "../x"),
    ],
)
def test_wrong_words_are_answered_in_one_line(model, file, cli, words, message):
    """Status 2, the thing by name, on stderr."""
    import re

    status, out, err = cli(*words)
    assert (status, out) == (2, "")
    assert re.search(message, err) and "Traceback" not in err, err


def test_published_by_one_process_and_used_by_another(blueprint, file, tmp_path, cli):
    """A lab publishes; somebody places adapters by repository id, with plain PEFT functions; the card tells them how."""
    with LoopbackHub(token="hf_right") as hub:
        status, out, err = cli("publish", file, "org/blueprints", "--dry-run", hub=hub, token="hf_right")
        assert status == 0 and "blueprint.json" in out and "gradient-blueprint" in out, err
        assert not hub.repositories, "nothing was sent"
        status, out, err = cli("publish", file, "org/blueprints", "--format", "quiet", hub=hub, token="hf_right")
        assert status == 0 and out.startswith(hub.endpoint) and "/commit/" in out, err
        status, out, err = cli("fetch", "org/blueprints", "--out", "fetched.json", "--format", "quiet", hub=hub)
        assert (status, out) == (0, "fetched.json\n"), err
        assert Blueprint.from_pretrained(tmp_path / "fetched.json") == blueprint
        assert len(adapters_placed("org/blueprints", hub.endpoint, tmp_path / "other")) == 5


def test_a_pull_request_and_a_domain_from_the_command_line(file, cli):
    """To a repository of somebody else's, under its own name."""
    with LoopbackHub(token="hf_right") as hub:
        hub.repository("tiny/llama").writable = "pull requests"
        words = ("publish", file, "tiny/llama", "--domain", "math", "--format", "quiet", "--no-picture")
        status, _, err = cli(*words, hub=hub, token="hf_right")
        assert status == 2 and "--create-pr" in err
        status, out, err = cli(*words, "--create-pr", hub=hub, token="hf_right")
        assert status == 0 and "/discussions/1" in out, err
