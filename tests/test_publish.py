"""Blueprints committed over HTTP by the real client, to a Hub on loopback. Run: pytest tests/test_publish.py"""

import base64
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.compact import to_header_text
from peft_blueprint.errors import MismatchError
from peft_blueprint.formats import from_json, to_json
from peft_blueprint.loopback import LoopbackHub
from peft_blueprint.naming import file_name
from peft_blueprint.publish import Publication, prepare, publish


# the client uploads in a way that its own HTTP library now frowns on
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: mit  # as the data\n---\n# My model\n\nA person wrote this.\n"


@pytest.fixture(autouse=True)
def as_somebody(monkeypatch):
    """No token of mine, no Xet, and no waiting between the client's attempts."""
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture(scope="module")
def blueprint(blueprint):
    """Two layers of the tiny Llama's."""
    return replace(blueprint, submodules=blueprint.submodules[:14])


@pytest.fixture
def hub():
    """A Hub with the model's repository, which has a card."""
    with LoopbackHub() as hub:
        hub.repository("tiny/llama").commit({"README.md": CARD.encode(), "config.json": b"{}"})
        yield hub


def put(blueprint, hub, repo_id="tiny/llama", **wishes):
    return publish(blueprint, repo_id, **{"token": "hf_mine", "endpoint": hub.endpoint, "picture": False, **wishes})


def writes(hub):
    """Requests that change something."""
    return [r for r in hub.requests if r.method in ("POST", "PUT", "DELETE") and "validate-yaml" not in r.path]


def test_one_commit_has_all_files(blueprint, hub):
    """The record, its picture and the card, on top of the commit that was read; the person's text is to the byte."""
    before = hub.repository("tiny/llama").refs["main"]
    url = put(blueprint, hub, picture=True)
    newest, second, *_ = hub.repository("tiny/llama").commits()
    assert second.id == newest.parent == before
    assert sorted(path for _, path in newest.operations) == ["README.md", "blueprint.json", "blueprint.png"]
    assert (
        url == f"{hub.endpoint}/tiny/llama/commit/{newest.id}"
        and newest.title == "Add gradient blueprint blueprint.json"
    )
    files = hub.repository("tiny/llama").files()
    assert from_json(files["blueprint.json"].decode()) == blueprint
    assert files["blueprint.png"].startswith(b"\x89PNG")
    card = files["README.md"].decode()
    assert "license: mit  # as the data\n" in card and "\n# My model\n\nA person wrote this.\n\n<!-- gradient-" in card
    assert yaml.safe_load(card.split("---\n")[1]) == {"license": "mit", "tags": ["gradient-blueprint"]}
    assert "(blueprint.png)" in card and "base_model" not in card


def test_what_was_published_is_read_again(blueprint, hub, tmp_path):
    """Blueprint.from_pretrained gives the same record."""
    put(blueprint, hub)
    assert Blueprint.from_pretrained("tiny/llama", endpoint=hub.endpoint, cache_dir=tmp_path) == blueprint


def test_nothing_is_sent_twice(blueprint, hub, caplog):
    """Publishing again makes no commit, says so, and gives the commit that has it; also by dry run."""
    url = put(blueprint, hub, picture=True)
    before = len(writes(hub))
    with caplog.at_level(logging.WARNING):
        assert put(blueprint, hub, picture=True) == url
    assert "tiny/llama holds this blueprint already: nothing was sent" in caplog.text
    assert len(writes(hub)) == before
    plan = put(blueprint, hub, picture=True, dry_run=True)
    assert plan.is_unchanged and "nothing to send" in str(plan)


def test_a_dry_run_sends_nothing(blueprint, hub):
    """It shows sizes and the change to the card, and needs no token; a stranger's card cannot steer the terminal."""
    hub.repository("tiny/llama").commit({"README.md": CARD.encode() + b"\x1b[2Jhello\n"})
    plan = put(blueprint, hub, dry_run=True, token=False)
    assert isinstance(plan, Publication) and not writes(hub)
    size = len(to_json(blueprint).encode())
    shown = str(plan)
    assert f"blueprint.json  {size:,} bytes" in shown and "+- gradient-blueprint" in shown
    assert "-license" not in shown and "\x1b" not in shown
    assert put(blueprint, hub, "somebody/other", dry_run=True).creates_repository
    assert "somebody/other" not in hub.repositories


def test_a_repository_of_ones_own_is_made(blueprint, hub):
    """Somebody else's model: a private repository with a card that names the base model and the data."""
    measured = replace(
        blueprint, provenance={**blueprint.provenance, "data": "openai/gsm8k, train.jsonl, my/notes.csv"}
    )
    put(measured, hub, "somebody/maps", private=True)
    assert hub.repository("somebody/maps").private
    card = hub.repository("somebody/maps").files()["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "tags": ["gradient-blueprint"],
        "base_model": "tiny/llama",
        "datasets": ["openai/gsm8k"],
    }
    assert "# Gradient blueprints of tiny/llama" in card
    assert 'Blueprint.from_pretrained("somebody/maps")' in card
    assert len(hub.repository("somebody/maps").commits()) == 2, "the Hub's own, and one"


def test_domains_and_checkpoints_stand_side_by_side(blueprint, hub):
    """Each has its file and its section; publishing one leaves the others' alone, and the data sets add up."""
    put(blueprint, hub, domain="math", datasets=["openai/gsm8k"])
    put(blueprint, hub, domain="code", checkpoint=0.8, datasets=["bigcode/the-stack"])
    put(blueprint, hub)
    before = hub.repository("tiny/llama").files()
    louder = replace(blueprint, submodules=tuple(replace(e, median_norm=1.0) for e in blueprint))
    put(louder, hub, domain="math", datasets=[])
    files = hub.repository("tiny/llama").files()
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
    with pytest.raises(BlueprintError, match="is no name of a domain"):
        file_name(domain)


@pytest.mark.parametrize("checkpoint", [0, -1, 1.5, float("nan"), float("inf")])
def test_a_checkpoint_is_a_share(checkpoint):
    """Above 0 and at most 1."""
    with pytest.raises(BlueprintError, match="is no share of the training"):
        file_name(None, checkpoint)


def test_a_pull_request_leaves_the_branch_alone(blueprint, hub):
    """To a repository one may not write to; without create_pr the message says so."""
    repository = hub.repository("tiny/llama")
    repository.writable = "pull requests"
    before = dict(repository.refs)
    with pytest.raises(BlueprintError, match=r"not write to 'tiny/llama' \(403.*Nothing was published.*--create-pr"):
        put(blueprint, hub)
    assert repository.refs == before
    url = put(blueprint, hub, create_pr=True)
    assert url == f"{hub.endpoint}/tiny/llama/discussions/1"
    assert repository.refs["main"] == before["main"] and "blueprint.json" in repository.files("refs/pr/1")


def test_an_edit_in_between_is_kept(blueprint, hub):
    """Somebody saves the card while ours is made: everything is read anew; after three times it is given up."""
    edited = CARD + "And this, just now.\n"
    repository = hub.repository("tiny/llama")
    hub.meanwhile(lambda: repository.commit({"README.md": edited.encode()}), "POST .*/commit/")
    put(blueprint, hub)
    card = repository.files()["README.md"].decode()
    assert "And this, just now.\n\n<!-- gradient-blueprint blueprint.json begin" in card
    assert len([r for r in hub.requests if "/commit/" in r.path]) == 2


def test_after_three_edits_in_between_it_gives_up(blueprint, hub):
    """With what to do, and nothing half done."""
    repository, counter = hub.repository("tiny/llama"), iter(range(99))
    hub.meanwhile(lambda: repository.commit({"n": str(next(counter)).encode()}), "POST .*/commit/", times=None)
    with pytest.raises(BlueprintError, match="each of the 3 times.*Nothing was published.*--create-pr"):
        put(blueprint, hub)
    assert "blueprint.json" not in repository.files()


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_persons_text_around_the_section_stays(blueprint, hub, line_end):
    """Text below the section, added by hand, is where it was after an update; line ends too."""
    repository = hub.repository("tiny/llama")
    repository.commit({"README.md": CARD.replace("\n", line_end).encode()})
    put(blueprint, hub)
    below = f"Below, by hand.{line_end}".encode()
    repository.commit({"README.md": repository.files()["README.md"] + below})
    first = repository.files()["README.md"]
    louder = replace(blueprint, submodules=tuple(replace(e, gradient_norm=2 * e.gradient_norm) for e in blueprint))
    put(louder, hub)
    second = repository.files()["README.md"]
    begin, end = b"<!-- gradient-blueprint blueprint.json begin -->", b"<!-- gradient-blueprint blueprint.json end -->"
    assert first != second
    assert first.split(begin)[0] == second.split(begin)[0] and first.split(end)[1] == second.split(end)[1]
    assert second.endswith(below) and (line_end == "\n" or b"\n" not in second.replace(b"\r\n", b""))


def test_without_a_token_nothing_is_asked(blueprint, hub):
    """The message names the command; the Hub is not troubled."""
    with pytest.raises(BlueprintError, match="'tiny/llama' without a token.*hf auth login"):
        put(blueprint, hub, token=None)
    with pytest.raises(BlueprintError, match="without a token"):
        put(blueprint, hub, token=False)
    assert not hub.requests


def test_a_wrong_token_is_told_apart(blueprint):
    """401: log in; nothing is made."""
    with LoopbackHub(token="hf_right") as hub:
        hub.repository("tiny/llama")
        with pytest.raises(BlueprintError, match=r"'tiny/llama' \(401\).*hf auth login"):
            put(blueprint, hub, token="hf_wrong")
        assert "blueprint.json" not in hub.repository("tiny/llama").files()
        assert put(blueprint, hub, token="hf_right")


@pytest.mark.parametrize(
    ("status", "where", "headers", "message"),
    [
        (401, "POST .*/commit/", {}, r"\(401\)\. Nothing was published.*hf auth login"),
        (403, "POST .*/commit/", {}, r"403.*Nothing was published.*--create-pr"),
        (404, "POST .*/commit/", {}, r"no repository 'tiny/llama'.*\(404\)"),
        (409, "POST .*/commit/", {}, r"\(409.*Try again"),
        (429, "GET .*/api/models/", {"Retry-After": "30"}, r"\(429\).*Try again in 30 seconds"),
        (500, "POST .*/commit/", {}, r"fault of its own.*500"),
        (503, "GET .*/api/models/", {}, r"fault of its own.*503"),
        (418, "POST .*/commit/", {}, r"refused what was asked of 'tiny/llama' \(418"),
    ],
)
def test_each_refusal_says_what_to_do(blueprint, hub, status, where, headers, message):
    """Every message names the repository and a way out, and the repository is as it was."""
    before = hub.repository("tiny/llama").refs["main"]
    hub.fail(status, where, times=None, headers=headers)
    with pytest.raises(BlueprintError, match=message) as raised:
        put(blueprint, hub)
    assert "tiny/llama" in str(raised.value)
    assert hub.repository("tiny/llama").refs["main"] == before


def test_a_connection_cut_within_the_commit_is_found_out_by_publishing_again(blueprint, hub):
    """The Hub made the commit, its answer got lost: the message says that this may be so, and again makes no second."""
    hub.cut(5, "POST .*/commit/", times=None)
    with pytest.raises(BlueprintError, match="connection to the Hub failed over 'tiny/llama'.*Publish again"):
        put(blueprint, hub)
    made = len(hub.repository("tiny/llama").commits())
    assert put(blueprint, hub).endswith(hub.repository("tiny/llama").refs["main"])
    assert len(hub.repository("tiny/llama").commits()) == made == 3


def test_a_hub_that_cannot_be_reached_or_may_not_be_asked(blueprint, hub, monkeypatch):
    """Nobody listens; or offline mode is on."""
    with LoopbackHub() as gone:
        pass
    with pytest.raises(BlueprintError, match="connection to the Hub failed over 'tiny/llama'.*Nothing was sent"):
        put(blueprint, gone)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BlueprintError, match="'tiny/llama' is out of reach: offline mode is on"):
        put(blueprint, hub)


def test_a_refused_repository_is_not_made(blueprint, hub):
    """Another's namespace; one that is taken and hidden; and a pull request to none."""
    with pytest.raises(BlueprintError, match="not write to 'stranger/maps'"):
        put(blueprint, hub, "stranger/maps")
    with pytest.raises(BlueprintError, match="no repository 'somebody/none'"):
        put(blueprint, hub, "somebody/none", create_pr=True)
    assert hub.repositories == ["tiny/llama"]
    hidden = hub.repository("somebody/hidden")
    hidden.private, hidden.readable = True, False
    with pytest.raises(BlueprintError, match="'somebody/hidden' is taken.*choose another name"):
        put(blueprint, hub, "somebody/hidden")


def test_a_repository_that_was_made_for_nothing_is_told_of(blueprint, hub):
    """The commit fails after the repository was made: the message says that it stays, and again works."""
    hub.fail(500, "POST .*/commit/")
    with pytest.raises(BlueprintError, match="'somebody/maps' was made and stays"):
        put(blueprint, hub, "somebody/maps")
    put(blueprint, hub, "somebody/maps")
    assert "blueprint.json" in hub.repository("somebody/maps").files()


def test_a_gated_repository_is_explained(blueprint, hub):
    """Its files may not be read without permission."""
    repository = hub.repository("tiny/llama")
    repository.gated, repository.readable = True, False
    with pytest.raises(BlueprintError, match="'tiny/llama' needs permission"):
        put(blueprint, hub)


def test_what_is_wrong_here_is_found_before_anything_is_asked(blueprint, hub):
    """A model that is a path, a repository that is none, a checkpoint that is another's, a data set that is none."""
    for model_id in ("/home/me/model", "./model", "llama", "a/b/c", "LlamaForCausalLM", "C:\\model", "org/na me"):
        with pytest.raises(BlueprintError, match="no id on the Hub.*--model-id org/model.*dataclasses.replace"):
            put(replace(blueprint, model_id=model_id), hub)
    with pytest.raises(BlueprintError, match="'maps' is no repository"):
        put(blueprint, hub, "maps")
    with pytest.raises(MismatchError, match=r"training_checkpoint=0.5.*0.8"):
        put(replace(blueprint, training_checkpoint=0.5), hub, checkpoint=0.8)
    with pytest.raises(BlueprintError, match="'train.jsonl x' is no data set"):
        put(blueprint, hub, datasets=["train.jsonl x"])
    with pytest.raises(BlueprintError, match="An index holds one blueprint"):
        put(blueprint, hub, domain="math", in_index=True)
    assert not hub.requests


def test_another_models_repository_is_refused(blueprint, hub):
    """Unless it is said to be a copy of the same model; then its card names the base model."""
    hub.repository("org/other").commit({"config.json": b"{}"})
    with pytest.raises(
        MismatchError, match=r"'org/other' holds a model \(config.json\).*'tiny/llama'.*allow_other_model"
    ):
        put(blueprint, hub, "org/other")
    put(blueprint, hub, "org/other", allow_other_model=True)
    assert "base_model: tiny/llama" in hub.repository("org/other").files()["README.md"].decode()


def test_a_blueprint_of_another_model_is_not_overwritten(blueprint, hub):
    """Both digests are shown; replace=True does it. The same model measured again is an update."""
    put(blueprint, hub)
    other = replace(blueprint, model_digest="sha256:" + "0" * 64)
    with pytest.raises(MismatchError, match=f"(?s){blueprint.model_digest}.*{other.model_digest}.*replace=True"):
        put(other, hub)
    put(other, hub, replace=True)
    again = replace(other, provenance={**other.provenance, "seed": 7})
    put(again, hub, message="Measured again")
    assert [c.title for c in hub.repository("tiny/llama").commits()][:2] == [
        "Measured again",
        "Update gradient blueprint blueprint.json",
    ]


def test_a_file_of_that_name_that_is_no_blueprint_is_not_overwritten(blueprint, hub):
    """Somebody's own blueprint.json, and somebody's own blueprint.png."""
    repository = hub.repository("tiny/llama")
    repository.commit({"blueprint.json": b"{}", "blueprint.png": b"a house"})
    with pytest.raises(BlueprintError, match="blueprint.json of 'tiny/llama' is no blueprint"):
        put(blueprint, hub)
    repository.commit({"blueprint.json": None})
    put(blueprint, hub, picture=True)
    assert repository.files()["blueprint.png"] == b"a house"
    assert "blueprint.png" not in repository.files()["README.md"].decode()


def test_a_public_repository_does_not_pass_for_a_private_one(blueprint, hub):
    """private=True to one that exists and is public is an error, not a leak."""
    with pytest.raises(BlueprintError, match="'tiny/llama' exists and is public"):
        put(blueprint, hub, private=True)


def test_a_card_that_cannot_be_edited_is_left_alone(blueprint, hub):
    """Broken marks, broken YAML, bytes that are no text: an error, and no commit."""
    repository = hub.repository("tiny/llama")
    for card, message in (
        (b"<!-- gradient-blueprint blueprint.json begin -->\n", "does not end"),
        (b"---\ntags: [\n---\n", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8"),
    ):
        before = repository.commit({"README.md": card}).id
        with pytest.raises(BlueprintError, match=message):
            put(blueprint, hub)
        assert repository.refs["main"] == before


def test_a_card_that_the_hub_refuses_is_explained(blueprint, hub):
    """The Hub checks front matter before the commit."""
    repository = hub.repository("tiny/llama")
    repository.commit({"README.md": b"---\nbase_model: not an id\n---\n"})
    with pytest.raises(
        BlueprintError, match="does not take the card of 'tiny/llama'.*not an id.*Nothing was published"
    ):
        put(blueprint, hub)


def test_an_index_takes_the_blueprint_and_keeps_the_rest(blueprint, hub):
    """in_index: two keys more in its metadata, all else as it was to the byte; renewed with every update from then on."""
    repository = hub.repository("tiny/llama")
    with pytest.raises(BlueprintError, match="no model.safetensors.index.json.*peft-blueprint embed"):
        put(blueprint, hub, in_index=True)
    index = {"metadata": {"total_size": 12}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    text = json.dumps(index, indent=2) + "\n"
    repository.commit({"model.safetensors.index.json": text.encode()})
    put(blueprint, hub)
    assert repository.files()["model.safetensors.index.json"].decode() == text
    put(blueprint, hub, in_index=True)
    written = repository.files()["model.safetensors.index.json"].decode()
    first = json.loads(written)["metadata"].pop("blueprint.json")
    bare = json.loads(written)
    assert bare["metadata"].pop("blueprint.version") == "1"
    bare["metadata"].pop("blueprint.json")
    assert json.dumps(bare, indent=2) + "\n" == text
    put(replace(blueprint, provenance={"seed": 7}), hub)
    assert json.loads(repository.files()["model.safetensors.index.json"])["metadata"]["blueprint.json"] != first


def test_a_stale_header_is_told_of(blueprint, hub):
    """Readers ask the model's own header first: if it holds another blueprint, the publisher learns so."""
    tensors = {"a.weight": np.zeros((2, 2), np.float32)}
    metadata = {"blueprint.version": "1", "blueprint.json": to_header_text(blueprint)}
    hub.repository("tiny/llama").commit({"model.safetensors": save(tensors, metadata)})
    assert not put(blueprint, hub, dry_run=True).notes
    plan = put(replace(blueprint, provenance={"seed": 7}), hub, dry_run=True)
    assert "header of model.safetensors holds another blueprint" in str(plan) and "peft-blueprint embed" in str(plan)
    assert not put(blueprint, hub, dry_run=True, domain="math").notes


def test_arrays_go_beside_when_asked_for(blueprint, hub):
    """Exact arrays as safetensors, through LFS, in the same commit; from then on they are renewed."""
    repository = hub.repository("tiny/llama")
    put(blueprint, hub, with_arrays=True)
    assert ("lfsFile", "blueprint.safetensors") in repository.commits()[0].operations
    louder = replace(blueprint, submodules=tuple(replace(e, gradient_norm=2 * e.gradient_norm) for e in blueprint))
    put(louder, hub)
    assert ("lfsFile", "blueprint.safetensors") in repository.commits()[0].operations


def test_a_picture_that_cannot_be_drawn_is_left_out_with_a_word(blueprint, hub, caplog, monkeypatch):
    """Without matplotlib, and for entries without kind or depth, everything else is published."""
    bare = replace(blueprint, submodules=tuple(replace(e, kind=None) for e in blueprint))
    assert put(bare, hub, picture=True, dry_run=True).files.keys() == {"blueprint.json", "README.md"}
    for module in ("matplotlib.figure", "matplotlib.patches"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    put(blueprint, hub, picture=True)
    assert "There is no picture. Pictures need matplotlib" in caplog.text
    assert "blueprint.png" not in hub.repository("tiny/llama").files()


def test_prepare_only_reads(blueprint, hub):
    """No request that changes something, whatever is asked for."""
    plan = prepare(blueprint, "tiny/llama", endpoint=hub.endpoint, token=False)
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert plan.parent_commit == hub.repository("tiny/llama").refs["main"] and plan.previous_card == CARD
    assert base64.b64encode(plan.files["blueprint.png"])
