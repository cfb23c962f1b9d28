"""`targets --probe` runs Algorithm 1 in one command; `--domain` reaches every verb that reads a blueprint to place by."""

import json
import re
from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, generate_blueprint, plan_placement
from peft_blueprint.data import read_examples
from peft_blueprint.measure import encode, load_model, make_batches
from peft_blueprint.testing import save_tiny_model


WISH = ("--num-modules", 5, "--coverage", "none", "--rank-by", "gradient_norm")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A model, data, and the model's published blueprint of two domains."""
    folder = tmp_path_factory.mktemp("shop")
    model, tokenizer = load_model(str(save_tiny_model(folder / "model", layers=6)))
    rows = [{"prompt": f"{i % 7} {i % 5} 9", "completion": f"{i % 7} {i % 5}"} for i in range(24)]
    (folder / "local.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = encode(rows, tokenizer)
    published = generate_blueprint(model, make_batches(encoded, 8, 0), model_id=str(folder / "model"), progress=False)
    tags = [{"general": 1.0, "bio": 30.0 if entry.depth == 5 else 1.0} for entry in published]
    entries = [replace(e, domain_tags=t) for e, t in zip(published, tags, strict=True)]
    replace(published, submodules=tuple(entries)).save(folder / "blueprint.json")
    return folder


def placed(run, *words):
    """The names that a command prints."""
    status, out, err = run(*words, "--format", "quiet")
    assert status == 0, err
    return out.split(), err


def test_targets_with_a_probe_are_those_of_the_blend(run, shop, tmp_path):
    """The flags reach the probe and the blend; the blended blueprint is written, and the agreement said on stderr."""
    words = ("--probe", shop / "local.jsonl", "--probe-examples", 8, "--blend-weight", 0.25, "--no-rescale")
    names, err = placed(run, "targets", shop / "blueprint.json", *WISH, *words, "--out", tmp_path / "blend.json")
    model, tokenizer = load_model(str(shop / "model"))
    rows = encode(read_examples(str(shop / "local.jsonl"), limit=8), tokenizer)
    probe = generate_blueprint(model, make_batches(rows, 8, 0), progress=False)
    by_hand = Blueprint.from_pretrained(shop / "blueprint.json").blend(probe, 0.25, rescale=False)
    wish = {"num_modules": 5, "coverage": "none", "rank_by": "gradient_norm"}
    assert names == list(plan_placement(by_hand, **wish).lora)
    written = Blueprint.from_pretrained(tmp_path / "blend.json")
    assert [e.gradient_norm for e in written] == pytest.approx([e.gradient_norm for e in by_hand], rel=1e-4)
    assert written.provenance["blend"]["with"]["data"] == str(shop / "local.jsonl")
    assert "Rank correlation of the probe with the blueprint: " in err and "not below 0.85" in err


def test_a_placement_has_one_learning_rate(run, shop):
    """The same for reading and for another trainer."""
    _, out, err = run("targets", shop / "blueprint.json", "--num-modules", 5)
    _, printed, _ = run("targets", shop / "blueprint.json", "--num-modules", 5, "--for", "axolotl")
    [scale] = re.findall(r"alpha / r: ([\d.]+) times all-linear LoRA's, by Adam's gain", " ".join((out + err).split()))
    assert f"about {scale} times" in printed


@pytest.mark.parametrize("verb", ["targets", "plan"])
def test_a_domain_is_placed_by_its_own_norms(run, shop, verb):
    """One tag, or weights of several."""
    published = Blueprint.from_pretrained(shop / "blueprint.json")
    wish = {"num_modules": 5, "coverage": "none", "rank_by": "gradient_norm"}
    source = ("targets", shop / "blueprint.json") if verb == "targets" else ("plan", shop / "model")
    more = () if verb == "targets" else ("--blueprint", shop / "blueprint.json", "--quantization", "none")
    found = {
        domain: placed(run, *source, *WISH, *more, "--domain", domain)[0] for domain in ("bio", "general=99,bio=1")
    }
    assert set(found["bio"]) == set(plan_placement(published.for_domain("bio"), **wish).lora)
    mixed = published.for_domain({"general": 99, "bio": 1})
    assert set(found["general=99,bio=1"]) == set(plan_placement(mixed, **wish).lora) != set(found["bio"])


def test_drift_is_of_the_domain(run, shop, tmp_path):
    """A probe that equals the published norms of one domain."""
    Blueprint.from_pretrained(shop / "blueprint.json").for_domain("bio").save(tmp_path / "local.json")
    words = ("drift", tmp_path / "local.json", shop / "blueprint.json", "--format", "json")
    of_domain, of_all = (json.loads(run(*words, *more)[1])["correlation"] for more in (("--domain", "bio"), ()))
    assert of_domain > 0.999 > of_all


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("targets", "blueprint.json", "--blend-weight", 0.2), "need local examples: give --probe"),
        (("targets", "blueprint.json", "--domain", "law"), "no domain tag 'law'"),
        (("targets", "blueprint.json", "--domain", "bio=x"), "domain must be a tag, or weights"),
        (("targets", "blueprint.json", "--probe", "none.jsonl"), "none.jsonl"),
        (("plan", "model", "--domain", "bio"), "give one with --blueprint"),
        (("select-data", "model", "--data", "local.jsonl", "--out", "o.jsonl", "--domain", "bio"), "give --blueprint"),
    ],
)
def test_options_that_need_a_probe_or_a_blueprint_are_refused(run, shop, monkeypatch, words, message):
    """In one line, with status 2."""
    monkeypatch.chdir(shop)
    status, _, err = run(*words)
    assert status == 2 and message in err
