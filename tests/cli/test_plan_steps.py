"""`plan` with prompts, data and epochs: the table of computations, and the learning rate."""

import json

import pytest

from peft_blueprint.testing import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer, and data of which eight tokens of twelve are prompt."""
    folder = tmp_path_factory.mktemp("plan")
    save_tiny_model(folder / "model", layers=4)
    row = {"prompt": "1 2 3 4 5 6 7 8 ", "completion": "9 10 11"}
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return folder


def planned(run, *words):
    status, out, err = run("plan", *words, "--format", "json")
    assert status == 0, err
    return json.loads(out)


def test_the_datas_prompt_share_prices_answer_only_adapters(run, folder):
    """Length and share come from the data; time and memory are told with and without, and with caches."""
    found = planned(run, folder / "model", "--data", folder / "data.jsonl", "--epochs", 3)
    assert 0.5 < found["prompt_share"] < 0.8
    variants = {(one["adapters"], one["name"]): one for one in found["variants"]}
    for adapters in ("all-linear", "placement"):
        whole, answers = variants[adapters, "all positions"], variants[adapters, "answer only"]
        cached = variants[adapters, "answer only, prompts cached"]
        assert cached["time"] < answers["time"] < whole["time"] and answers["memory"] < whole["memory"]
        assert cached["cache"] > 0
    status, out, _ = run("plan", folder / "model", "--data", folder / "data.jsonl", "--epochs", 3)
    assert status == 0 and "4 examples of at most" in out and "of the tokens are prompt" in out
    assert "answer only, prompts cached" in out and "an example" in out


def test_more_epochs_cost_less_each(run, folder):
    options = (folder / "model", "--keep", 0.7, "--rank", 8)
    once, often = (planned(run, *options, "--epochs", epochs)["placement"]["cost"] for epochs in (1, 20))
    assert often["time"] < once["time"] and often["lowest"] >= once["lowest"]


def test_the_learning_rate_says_its_rule(run, folder):
    """By ranks without a blueprint; `targets` tells it too."""
    found = planned(run, folder / "model", "--base-learning-rate", "1e-3")["learning_rate"]
    assert found["rule"] == "ranks" and found["value"] == pytest.approx(1e-3 * found["scale"])
    _, out, _ = run("plan", folder / "model", "--base-learning-rate", "1e-3")
    assert "Learning rate: " in out and "summed ranks" in out


def test_refused_options(run, folder):
    for words, message in (
        (("--prompt", 4, "--data", folder / "data.jsonl"), "both set the prompt's length"),
        (("--prompt", 64, "--length", 64), "from 0 to 63"),
        (("--base-learning-rate", 0), "positive learning rate"),
    ):
        status, _, err = run("plan", folder / "model", *words)
        assert status and message in err
