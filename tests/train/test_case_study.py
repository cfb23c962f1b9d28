"""The paper's case study runs from a published blueprint to the filled-in report, on a tiny model."""

import json
import random
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_blueprint import generate_blueprint
from peft_blueprint.runs import RunRecord
from peft_blueprint.testing import save_tiny_model, tiny_llama, toy_batches
from tests import ROOT
from tests.hub.loopback import LoopbackHub


sys.path.insert(0, str(ROOT / "recipes"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A tiny model that knows numbers and the three answers; questions whose context ends in the answer's number."""
    folder = tmp_path_factory.mktemp("shop")
    save_tiny_model(folder / "model", layers=4)
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(90)), "yes", "no", "maybe"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    draw, records = random.Random(0), {}
    for i in range(80):
        answer = draw.randrange(3)
        numbers = [str(draw.randrange(9, 90)) for _ in range(6)]
        contexts = [" ".join(numbers[:3]), " ".join([str(answer)] * 3 + numbers)]
        decision = ("yes", "no", "maybe")[answer]
        records[str(i)] = {"QUESTION": "1 2 3", "CONTEXTS": contexts, "LONG_ANSWER": "4", "final_decision": decision}
    (folder / "pubmedqa_ori_pqal.json").write_text(json.dumps(records))
    tests = {str(i): "yes" for i in range(0, 80, 2)}
    (folder / "pubmedqa_test_ground_truth.json").write_text(json.dumps(tests))
    blueprint = generate_blueprint(
        tiny_llama(layers=4), {"math": toy_batches(), "bio": toy_batches(seed=1)}, model_id="org/model", progress=False
    )
    (folder / "org" / "model").mkdir(parents=True)
    blueprint.save(folder / "org" / "model")
    return folder


def settings(shop, output, **more):
    """The command line of a run that takes seconds."""
    options = {"data": shop, "model": shop / "model", "output": output, "probe": 8, "pool": 24, "validation": 8}
    options |= {"test": 16, "steps": 8, "checks": 4, "max-length": 32, "watts": 20, "published": 4} | more
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_the_whole_path_fills_in_the_papers_template(shop, tmp_path, monkeypatch, capsys):
    """From the Hub over probe, drift, placement, selection and stopping to accuracy, Γ, carbon and the last window."""
    import pubmedqa

    with LoopbackHub({"org/model": shop / "org" / "model"}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        found = pubmedqa.main(settings(shop, tmp_path / "out", blueprint="org/model", domain="math=1,bio=3"))
    out = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() in out
    for entry in (
        "accuracy on 16 test questions",
        "macro-F1",
        "carbon",
        "final (Ψ, Γ)",
        "last window: ΔΨ/ΔΓ",
        "drift",
    ):
        assert entry.lower() in out.lower(), entry
    assert "not finite" not in out and "–" not in out.split("last window")[1].split("\n")[0]
    record = RunRecord.load(tmp_path / "out" / "blueprint")
    assert record.stopping["settings"]["window"] == 3 and record.about["examples"] == 12
    assert record.points[0].metrics["test_accuracy"] >= 0 <= record.points[-1].metrics["test_macro_f1"]
    parts = [record.about[name]["flops"]["value"] for name in ("probe", "selection")]
    assert min(parts) > 0 and record.total("flops").value > sum(parts)
    assert record.total("carbon_grams").value > 0 and record.total("carbon_grams").how == "modelled"
    saved = json.loads((tmp_path / "out" / "blueprint" / "blueprint_config.json").read_text())
    assert saved["blueprint"]["provenance"]["domain_weights"] == {"math": 0.25, "bio": 0.75}
    assert saved["blueprint"]["provenance"]["blend"] and list(saved["placement"]["lora"]) == found["placement"]["lora"]
    assert [run["name"] for run in found["loss"]["runs"]] == ["blueprint", "all-linear"]
    assert found["loss"]["runs"][0]["ratio"] is not None


def test_without_a_blueprint_one_is_measured_first(shop, tmp_path):
    """And without the comparison there is one run."""
    import pubmedqa

    words = settings(shop, tmp_path, steps=2, checks=2, select="random")
    found = pubmedqa.main([*words, "--no-compare"])
    assert (tmp_path / "blueprint.json").exists() and len(found["score"]["runs"]) == 1
    with pytest.raises(SystemExit, match="ask for 428, --test for 16. Ask for fewer"):
        pubmedqa.main(settings(shop, tmp_path, pool=416))
    with pytest.raises(SystemExit, match="not found. Give the folder"):
        pubmedqa.main(settings(shop, tmp_path, data=tmp_path))


def test_contexts_are_cut_before_the_answer(shop):
    """The prompt keeps its question and its end; the example fits."""
    from transformers import AutoTokenizer

    import pubmedqa

    tokenizer = AutoTokenizer.from_pretrained(shop / "model")
    record = {"QUESTION": "1 2 3", "CONTEXTS": ["5 6"] * 40, "final_decision": "no"}
    example = pubmedqa.as_example(record, tokenizer, 32)
    assert example["completion"] == " no" and example["prompt"].startswith("Question: 1 2 3\nContext: 5 6 5 6")
    assert example["prompt"].endswith("\nAnswer (yes, no or maybe):")
    assert 28 <= len(tokenizer(example["prompt"] + example["completion"])["input_ids"]) <= 31
    whole = pubmedqa.as_example(replace_contexts(record, ["5 6"]), tokenizer, 32)
    assert "Context: 5 6\nAnswer" in whole["prompt"]


def replace_contexts(record, contexts):
    return record | {"CONTEXTS": contexts}


def test_the_decision_is_the_likeliest_answer_at_the_first_target():
    """Among the three answers only; F1 counts hits, misses and false alarms."""
    import pubmedqa

    logits = torch.zeros(2, 4, 9)
    logits[0, 1, [7, 3]] = torch.tensor([2.0, 9.0])  # 3 is no answer
    logits[1, 2, 8] = 1.0
    labels = torch.tensor([[-100, -100, 6, 2], [-100, -100, -100, 7]])
    assert pubmedqa.decide(logits, labels, [6, 7, 8]).tolist() == [1, 2]
    assert pubmedqa.macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx((2 / 3 + 2 / 3) / 2)
