"""The paper's Stage 1 in small: pretraining halts by marginal return, and its three blueprints are on a Hub."""

import json
import sys

import pytest

from peft_blueprint import Blueprint
from peft_blueprint.compare import aggregate
from peft_blueprint.runs import RunRecord
from tests import ROOT
from tests.hub.loopback import LoopbackHub
from tests.hub_client import UPLOADING


sys.path.insert(0, str(ROOT / "recipes"))

pytestmark = UPLOADING

SIZES = {"steps": 20, "batch": 2, "length": 16, "hidden": 32, "layers": 2, "vocabulary": 300, "examples": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sums as GSM8K, and sentences as PubMedQA."""
    folder = tmp_path_factory.mktemp("data")
    sums = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}"} for i in range(200)]
    (folder / "gsm8k_train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    papers = {
        str(i): {"QUESTION": f"Does drug {i} help?", "CONTEXTS": [f"{i} patients took it."], "LONG_ANSWER": "It does."}
        for i in range(200)
    }
    (folder / "pubmedqa_ori_pqal.json").write_text(json.dumps(papers))
    return folder


def pretrain(data, output, *extra, **settings):
    """Run the recipe; 10 % of the budget would have to buy five times the loss, so the first check that can halts it."""
    import pretrain_marginal_return

    options = {**SIZES, "data": data, "output": output, "validation": 4, "worth": 5, **settings}
    return pretrain_marginal_return.main([*extra, *(f"--{name}={value}" for name, value in options.items())])


def test_a_halted_pretraining_publishes_three_blueprints(data, tmp_path, monkeypatch, capsys):
    """Model and blueprints over HTTP; a reader finds the last one, and `aggregate` all of them."""
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    with LoopbackHub(token="hf_mine") as hub:
        found = pretrain(data, tmp_path / "out", repo="org/tiny", endpoint=hub.endpoint)
        assert found["steps"] == 7 and found["reason"].startswith("Stopped at step 7")
        shares = [one["training_checkpoint"] for one in found["blueprints"]]
        assert shares == [0.4286, 0.8571, 1.0] and [one["step"] for one in found["blueprints"]] == [3, 6, 7]
        assert 0 < found["seconds_of_which"]["saving"] < found["totals"]["seconds"]["value"]
        assert found["optimizer_gb_hours"] > 0 and json.loads(capsys.readouterr().out) == found
        wish = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache", "token": False}
        last = Blueprint.from_pretrained("org/tiny", **wish)
        assert last.model_id == "org/tiny" and last.training_checkpoint == 1.0 and len(found["published"]) == 3
        assert set(last.submodules[0].domain_tags) == {"math", "bio"} and last.submodules[0].norm_interval
        early = Blueprint.from_pretrained("org/tiny", checkpoint=0.4286, **wish)
        assert early.provenance["step"] == 3 and early.provenance["max_steps"] == 20
        files = set(hub.repository("org/tiny").files())
        assert {"model.safetensors", "config.json", "tokenizer.json", "run.json", "blueprint-100.json"} <= files
    rows = aggregate([tmp_path / "out" / "model"])
    assert {row["training_checkpoint"] for row in rows} == {0.4286, 0.8571, 1.0}
    record = RunRecord.load(tmp_path / "out" / "model")
    assert record.stopping["stopped"] and record.points[-1].of_which["evaluating"] > 0


def test_a_decaying_rate_is_halted_on_request(data, tmp_path):
    """Otherwise it goes on to the end, with a shorter schedule proposed."""
    whole = pretrain(data, tmp_path / "whole", schedule="linear", examples=1)
    halted = pretrain(data, tmp_path / "halted", "--stop-in-decay", schedule="linear", examples=1)
    assert whole["steps"] == 20 and "Not stopped because the learning rate is falling" in whole["reason"]
    assert halted["steps"] == 7 and "The learning rate was falling" in halted["reason"]


def test_bad_sizes_and_folders_are_refused(data, tmp_path, capsys):
    """The error says which values are allowed."""
    with pytest.raises(SystemExit, match="has neither gsm8k_train.jsonl nor pubmedqa_ori_pqal.json"):
        pretrain(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="do not fill a block of 100000 tokens"):
        pretrain(data, tmp_path / "out", length=100000)
    with pytest.raises(SystemExit):
        pretrain(data, tmp_path / "out", steps=19)
    assert "--steps must be at least 20, got 19" in capsys.readouterr().err
