"""Blueprints committed over HTTP by the real client, to a Hub on loopback."""

import base64
import json
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint import file_name
from peft_blueprint.publish.commit import Publication, prepare
from tests.hub.loopback import LoopbackHub
from tests.hub_client import UPLOADING
from tests.publishing import CARD, put
from tests.records import from_json, to_header_text, to_json


pytestmark = UPLOADING


def writes(hub):
    """Requests that change something."""
    return [r for r in hub.requests if r.method in ("POST", "PUT", "DELETE") and "validate-yaml" not in r.path]


def test_one_commit_has_all_files(two_layers, model_hub):
    """The record, its picture and the card, on top of the commit that was read; the person's text is to the byte."""
    before = model_hub.repository("tiny/llama").refs["main"]
    url = put(two_layers, model_hub, picture=True)
    newest, second, *_ = model_hub.repository("tiny/llama").commits()
    assert second.id == newest.parent == before
    assert sorted(path for _, path in newest.operations) == ["README.md", "blueprint.json", "blueprint.png"]
    assert (
        url == f"{model_hub.endpoint}/tiny/llama/commit/{newest.id}"
        and newest.title == "Add gradient blueprint blueprint.json"
    )
    files = model_hub.repository("tiny/llama").files()
    assert from_json(files["blueprint.json"].decode()) == two_layers
    assert files["blueprint.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert "license: mit  # as the data\n" in card and "\n# My model\n\nA person wrote this.\n\n<!-- gradient-" in card
    assert yaml.safe_load(card.split("---\n")[1]) == {"license": "mit", "tags": ["gradient-blueprint"]}
    assert "(blueprint.png)" in card and "base_model" not in card


def test_published_blueprints_are_read_again(two_layers, model_hub, tmp_path):
    """Blueprint.from_pretrained gives the same record."""
    put(two_layers, model_hub)
    assert Blueprint.from_pretrained("tiny/llama", endpoint=model_hub.endpoint, cache_dir=tmp_path) == two_layers


def test_nothing_is_sent_twice(two_layers, model_hub, caplog):
    """Publishing again makes no commit, says so, and gives the commit that has it; also by dry run."""
    url = put(two_layers, model_hub, picture=True)
    before = len(writes(model_hub))
    with caplog.at_level(logging.WARNING):
        assert put(two_layers, model_hub, picture=True) == url
    assert "tiny/llama has this blueprint already: nothing was sent" in caplog.text
    assert len(writes(model_hub)) == before
    plan = put(two_layers, model_hub, picture=True, dry_run=True)
    assert plan.is_unchanged and "nothing to send" in str(plan)


def test_a_dry_run_sends_nothing(two_layers, model_hub):
    """It shows sizes and the change to the card, and needs no token; a stranger's card cannot steer the terminal."""
    model_hub.repository("tiny/llama").commit({"README.md": CARD.encode() + b"\x1b[2Jhello\n"})
    plan = put(two_layers, model_hub, dry_run=True, token=False)
    assert isinstance(plan, Publication) and not writes(model_hub)
    size = len(to_json(two_layers).encode())
    shown = str(plan)
    assert f"blueprint.json  {size:,} bytes" in shown and "+- gradient-blueprint" in shown
    assert "-license" not in shown and "\x1b" not in shown
    assert put(two_layers, model_hub, "somebody/other", dry_run=True).creates_repository
    assert "somebody/other" not in model_hub.repositories


def test_an_own_repository_is_created(two_layers, model_hub):
    """Somebody else's model: a private repository with a card that names the base model and the data."""
    measured = replace(
        two_layers, provenance={**two_layers.provenance, "data": "openai/gsm8k, train.jsonl, my/notes.csv"}
    )
    put(measured, model_hub, "somebody/maps", private=True)
    assert model_hub.repository("somebody/maps").private
    card = model_hub.repository("somebody/maps").files()["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "tags": ["gradient-blueprint"],
        "base_model": "tiny/llama",
        "datasets": ["openai/gsm8k"],
    }
    assert "# Gradient blueprints of tiny/llama" in card
    assert 'Blueprint.from_pretrained("somebody/maps")' in card
    assert len(model_hub.repository("somebody/maps").commits()) == 2, "the Hub's own, and one"


def test_domains_and_checkpoints_stand_side_by_side(two_layers, model_hub):
    """Each has its file and its section; publishing one leaves the others' alone, and the data sets add up."""
    put(two_layers, model_hub, domain="math", datasets=["openai/gsm8k"])
    put(two_layers, model_hub, domain="code", checkpoint=0.8, datasets=["bigcode/the-stack"])
    put(two_layers, model_hub)
    before = model_hub.repository("tiny/llama").files()
    louder = replace(two_layers, submodules=tuple(replace(e, median_norm=1.0) for e in two_layers))
    put(louder, model_hub, domain="math", datasets=[])
    files = model_hub.repository("tiny/llama").files()
    assert {n for n in files if n.startswith("blueprint")} == {
        "blueprint.json", "blueprint-math.json", "blueprint-code-80.json"}  # fmt: skip
    assert from_json(files["blueprint-code-80.json"].decode()).training_checkpoint == 0.8
    assert {n for n in files if files[n] != before[n]} == {"blueprint-math.json"}
    card = files["README.md"].decode()
    assert card.count("<!-- gradient-blueprint ") == 6
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["openai/gsm8k", "bigcode/the-stack"]


@pytest.mark.parametrize(
    ("domain", "checkpoint", "name"),
    [
        (None, None, "blueprint.json"),
        ("math", None, "blueprint-math.json"),
        (None, 0.8, "blueprint-80.json"),
        ("math", 0.07, "blueprint-math-7.json"),
        ("a.b_c", 0.125, "blueprint-a.b_c-12.5.json"),
        (None, 1, "blueprint-100.json"),
    ],
)
def test_files_are_named_by_domain_and_percentage(domain, checkpoint, name):
    """blueprint[-DOMAIN][-PERCENT].json"""
    assert file_name(domain, checkpoint) == name


@pytest.mark.parametrize(
    "domain", ["../x", "a/b", "", "Math", "a-b", "80", "12.5", ".", "..", "a..b", "a\n", "é", "x" * 65]
)
def test_a_domain_that_could_be_a_path_or_a_number_is_refused(domain):
    """No way out of the folder, and no name that reads as a percentage."""
    with pytest.raises(BlueprintError, match="domain must be"):
        file_name(domain)


@pytest.mark.parametrize("checkpoint", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_checkpoint_is_a_share(checkpoint):
    """Above 0 and at most 1."""
    with pytest.raises(BlueprintError, match=r"checkpoint must be in \(0, 1\]"):
        file_name(None, checkpoint)


def test_a_pull_request_leaves_the_branch_alone(two_layers, model_hub):
    """To a repository one may not write to; without create_pr the message says so."""
    repository = model_hub.repository("tiny/llama")
    repository.writable = "pull requests"
    before = dict(repository.refs)
    with pytest.raises(BlueprintError, match=r"not write to 'tiny/llama' \(403.*Nothing was published.*--create-pr"):
        put(two_layers, model_hub)
    assert repository.refs == before
    url = put(two_layers, model_hub, create_pr=True)
    assert url == f"{model_hub.endpoint}/tiny/llama/discussions/1"
    assert repository.refs["main"] == before["main"] and "blueprint.json" in repository.files("refs/pr/1")


def test_an_edit_in_between_is_kept(two_layers, model_hub):
    """Somebody saves the card while ours is made: everything is read anew; after three times it is given up."""
    edited = CARD + "And this, just now.\n"
    repository = model_hub.repository("tiny/llama")
    model_hub.meanwhile(lambda: repository.commit({"README.md": edited.encode()}), "POST .*/commit/")
    put(two_layers, model_hub)
    card = repository.files()["README.md"].decode()
    assert "And this, just now.\n\n<!-- gradient-blueprint blueprint.json begin" in card
    assert len([r for r in model_hub.requests if "/commit/" in r.path]) == 2


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_persons_text_around_the_section_stays(two_layers, model_hub, line_end):
    """Text below the section, added by hand, is where it was after an update; line ends too."""
    repository = model_hub.repository("tiny/llama")
    repository.commit({"README.md": CARD.replace("\n", line_end).encode()})
    put(two_layers, model_hub)
    below = f"Below, by hand.{line_end}".encode()
    repository.commit({"README.md": repository.files()["README.md"] + below})
    first = repository.files()["README.md"]
    louder = replace(
        two_layers,
        submodules=tuple(replace(e, gradient_norm=2 * e.gradient_norm, norm_interval=None) for e in two_layers),
    )
    put(louder, model_hub)
    second = repository.files()["README.md"]
    begin, end = b"<!-- gradient-blueprint blueprint.json begin -->", b"<!-- gradient-blueprint blueprint.json end -->"
    assert first != second
    assert first.split(begin)[0] == second.split(begin)[0] and first.split(end)[1] == second.split(end)[1]
    assert second.endswith(below) and (line_end == "\n" or b"\n" not in second.replace(b"\r\n", b""))


def test_an_index_takes_the_blueprint_and_keeps_the_rest(two_layers, model_hub):
    """in_index: two keys more in its metadata, all else as it was to the byte; renewed with every update from then on."""
    repository = model_hub.repository("tiny/llama")
    with pytest.raises(BlueprintError, match="no model.safetensors.index.json.*peft-blueprint embed"):
        put(two_layers, model_hub, in_index=True)
    index = {"metadata": {"total_size": 12}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    text = json.dumps(index, indent=2) + "\n"
    repository.commit({"model.safetensors.index.json": text.encode()})
    put(two_layers, model_hub)
    assert repository.files()["model.safetensors.index.json"].decode() == text
    put(two_layers, model_hub, in_index=True)
    written = repository.files()["model.safetensors.index.json"].decode()
    first = json.loads(written)["metadata"].pop("blueprint.json")
    bare = json.loads(written)
    assert bare["metadata"].pop("blueprint.version") == "1"
    bare["metadata"].pop("blueprint.json")
    assert json.dumps(bare, indent=2) + "\n" == text
    put(replace(two_layers, provenance={"seed": 7}), model_hub)
    assert json.loads(repository.files()["model.safetensors.index.json"])["metadata"]["blueprint.json"] != first


def test_a_stale_header_is_noted(two_layers, model_hub):
    """Readers ask the model's own header first: if it holds another blueprint, the publisher learns so."""
    tensors = {"a.weight": np.zeros((2, 2), np.float32)}
    metadata = {"blueprint.version": "1", "blueprint.json": to_header_text(two_layers)}
    model_hub.repository("tiny/llama").commit({"model.safetensors": save(tensors, metadata)})
    assert not put(two_layers, model_hub, dry_run=True).notes
    plan = put(replace(two_layers, provenance={"seed": 7}), model_hub, dry_run=True)
    assert "header of model.safetensors holds another blueprint" in str(plan) and "peft-blueprint embed" in str(plan)
    assert not put(two_layers, model_hub, dry_run=True, domain="math").notes


def test_arrays_go_beside_when_asked_for(two_layers, model_hub):
    """Exact arrays as safetensors, through LFS, in the same commit; from then on they are renewed."""
    repository = model_hub.repository("tiny/llama")
    put(two_layers, model_hub, with_arrays=True)
    assert ("lfsFile", "blueprint.safetensors") in repository.commits()[0].operations
    louder = replace(
        two_layers,
        submodules=tuple(replace(e, gradient_norm=2 * e.gradient_norm, norm_interval=None) for e in two_layers),
    )
    put(louder, model_hub)
    assert ("lfsFile", "blueprint.safetensors") in repository.commits()[0].operations


def test_a_picture_that_cannot_be_drawn_is_left_out_with_a_word(two_layers, model_hub, caplog, monkeypatch):
    """Without matplotlib, and for entries without kind or depth, everything else is published."""
    bare = replace(two_layers, submodules=tuple(replace(e, kind=None) for e in two_layers))
    assert put(bare, model_hub, picture=True, dry_run=True).files.keys() == {"blueprint.json", "README.md"}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    put(two_layers, model_hub, picture=True)
    assert "No picture. Pictures need matplotlib" in caplog.text
    assert "blueprint.png" not in model_hub.repository("tiny/llama").files()


def test_prepare_only_reads(two_layers, model_hub):
    """No option makes it send a request that changes the Hub."""
    plan = prepare(two_layers, "tiny/llama", endpoint=model_hub.endpoint, token=False)
    assert {request.method for request in model_hub.requests} <= {"GET", "HEAD"}
    assert plan.parent_commit == model_hub.repository("tiny/llama").refs["main"] and plan.previous_card == CARD
    assert base64.b64encode(plan.files["blueprint.png"])


def test_a_blueprint_publishes_itself(two_layers, tmp_path):
    """`push_to_hub` publishes it, and `from_pretrained` reads it again."""
    with LoopbackHub(token="hf_right") as hub:
        settings = {"endpoint": hub.endpoint, "token": "hf_right"}
        shown = two_layers.push_to_hub("org/blueprints", dry_run=True, picture=False, **settings)
        assert "blueprint.json" in str(shown) and not hub.repositories
        url = two_layers.push_to_hub("org/blueprints", picture=False, **settings)
        assert url.startswith(f"{hub.endpoint}/org/blueprints/commit/")
        assert two_layers.from_pretrained("org/blueprints", cache_dir=tmp_path, **settings) == two_layers


@pytest.mark.parametrize(
    "command",
    ["generate org/m --data ~/mine/a.jsonl", "generate org/m --data /secret/b.jsonl", "generate C:\\mine\\c"],
)
def test_local_paths_are_pointed_out(two_layers, model_hub, command):
    """Before the provenance becomes public; ids and addresses do not count as files."""
    told = replace(two_layers, provenance={"command": command, "data": "openai/gsm8k", "see": "https://a.org/b/c"})
    [note] = prepare(told, "org/other", endpoint=model_hub.endpoint, picture=False).notes
    assert "files of this machine" in note and "gsm8k" not in note and "a.org" not in note
    plain = replace(told, provenance={"command": "generate org/m --data a.jsonl", "see": "https://a.org/b/c"})
    assert not prepare(plain, "org/other", endpoint=model_hub.endpoint, picture=False).notes
