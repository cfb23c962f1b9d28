"""Blueprints that cannot be published: the reason is given, and nothing is half done."""

from dataclasses import replace

import pytest
from safetensors.numpy import save

from peft_blueprint import BlueprintError
from peft_blueprint.errors import MismatchError
from tests.hub.loopback import LoopbackHub
from tests.hub_client import UPLOADING
from tests.publishing import put


pytestmark = UPLOADING


def test_after_three_edits_in_between_it_gives_up(two_layers, model_hub):
    """The error has a fix, and nothing is half done."""
    repository, counter = model_hub.repository("tiny/llama"), iter(range(99))
    model_hub.meanwhile(lambda: repository.commit({"n": str(next(counter)).encode()}), "POST .*/commit/", times=None)
    with pytest.raises(BlueprintError, match="each of 3 attempts.*Nothing was published.*--create-pr"):
        put(two_layers, model_hub)
    assert "blueprint.json" not in repository.files()


def test_without_a_token_nothing_is_asked(two_layers, model_hub):
    """The message names the command; the Hub is not troubled."""
    with pytest.raises(BlueprintError, match="'tiny/llama' without a token.*hf auth login"):
        put(two_layers, model_hub, token=None)
    with pytest.raises(BlueprintError, match="without a token"):
        put(two_layers, model_hub, token=False)
    assert not model_hub.requests


def test_a_wrong_token_has_its_own_error(two_layers):
    """401: log in; nothing is made."""
    with LoopbackHub(token="hf_right") as hub:
        hub.repository("tiny/llama")
        with pytest.raises(BlueprintError, match=r"'tiny/llama' \(401\).*hf auth login"):
            put(two_layers, hub, token="hf_wrong")
        assert "blueprint.json" not in hub.repository("tiny/llama").files()
        assert put(two_layers, hub, token="hf_right")


@pytest.mark.parametrize(
    ("status", "where", "headers", "message"),
    [
        (401, "POST .*/commit/", {}, r"\(401\)\. Nothing was published.*hf auth login"),
        (403, "POST .*/commit/", {}, r"403.*Nothing was published.*--create-pr"),
        (404, "POST .*/commit/", {}, r"no repository 'tiny/llama'.*\(404\)"),
        (409, "POST .*/commit/", {}, r"\(409.*Try again"),
        (429, "GET .*/api/models/", {"Retry-After": "30"}, r"\(429\).*Try again in 30 seconds"),
        (500, "POST .*/commit/", {}, r"failed on a request.*500"),
        (503, "GET .*/api/models/", {}, r"failed on a request.*503"),
        (418, "POST .*/commit/", {}, r"refused a request about 'tiny/llama' \(418"),
    ],
)
def test_each_refusal_has_a_fix(two_layers, model_hub, status, where, headers, message):
    """Every message names the repository and a way out, and the repository is as it was."""
    before = model_hub.repository("tiny/llama").refs["main"]
    model_hub.fail(status, where, times=None, headers=headers)
    with pytest.raises(BlueprintError, match=message) as raised:
        put(two_layers, model_hub)
    assert "tiny/llama" in str(raised.value)
    assert model_hub.repository("tiny/llama").refs["main"] == before


def test_a_connection_cut_within_the_commit_is_found_out_by_publishing_again(two_layers, model_hub):
    """The Hub made the commit, its answer got lost: the message says that this may be so, and again makes no second."""
    model_hub.cut(5, "POST .*/commit/", times=None)
    with pytest.raises(BlueprintError, match="connection to the Hub failed on 'tiny/llama'.*Publish again"):
        put(two_layers, model_hub)
    made = len(model_hub.repository("tiny/llama").commits())
    assert put(two_layers, model_hub).endswith(model_hub.repository("tiny/llama").refs["main"])
    assert len(model_hub.repository("tiny/llama").commits()) == made == 3


def test_a_hub_that_cannot_be_reached_or_may_not_be_asked(two_layers, model_hub, monkeypatch):
    """The port is closed, or offline mode is on."""
    with LoopbackHub() as gone:
        pass
    with pytest.raises(BlueprintError, match="connection to the Hub failed on 'tiny/llama'.*Nothing was sent"):
        put(two_layers, gone)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BlueprintError, match="'tiny/llama' is out of reach: offline mode is on"):
        put(two_layers, model_hub)


def test_a_refused_repository_is_not_made(two_layers, model_hub):
    """Another's namespace; one that is taken and hidden; and a pull request to none."""
    with pytest.raises(BlueprintError, match="not write to 'stranger/maps'"):
        put(two_layers, model_hub, "stranger/maps")
    with pytest.raises(BlueprintError, match="no repository 'somebody/none'"):
        put(two_layers, model_hub, "somebody/none", create_pr=True)
    assert model_hub.repositories == ["tiny/llama"]
    hidden = model_hub.repository("somebody/hidden")
    hidden.private, hidden.readable = True, False
    with pytest.raises(BlueprintError, match="'somebody/hidden' is taken.*choose another name"):
        put(two_layers, model_hub, "somebody/hidden")


def test_an_unused_new_repository_is_named(two_layers, model_hub):
    """The commit fails after the repository was made: the message says that it stays, and again works."""
    model_hub.fail(500, "POST .*/commit/")
    with pytest.raises(BlueprintError, match="'somebody/maps' was created and stays"):
        put(two_layers, model_hub, "somebody/maps")
    put(two_layers, model_hub, "somebody/maps")
    assert "blueprint.json" in model_hub.repository("somebody/maps").files()


def test_a_gated_repository_is_explained(two_layers, model_hub):
    """Its files may not be read without permission."""
    repository = model_hub.repository("tiny/llama")
    repository.gated, repository.readable = True, False
    with pytest.raises(BlueprintError, match="'tiny/llama' needs permission"):
        put(two_layers, model_hub)


def test_local_errors_are_found_before_any_request(two_layers, model_hub):
    """A model that is a path, a repository that is none, a checkpoint that is another's, a data set that is none."""
    for model_id in ("/home/me/model", "./model", "llama", "a/b/c", "LlamaForCausalLM", "C:\\model", "org/na me"):
        with pytest.raises(
            BlueprintError, match="model_id must be an id on the Hub.*--model-id org/model.*dataclasses.replace"
        ):
            put(replace(two_layers, model_id=model_id), model_hub)
    with pytest.raises(BlueprintError, match="repo_id must be 'org/name', got 'maps'"):
        put(two_layers, model_hub, "maps")
    with pytest.raises(MismatchError, match=r"training_checkpoint=0.5, got 0.8"):
        put(replace(two_layers, training_checkpoint=0.5), model_hub, checkpoint=0.8)
    with pytest.raises(BlueprintError, match="data set must be 'org/name'.*'train.jsonl x'"):
        put(two_layers, model_hub, datasets=["train.jsonl x"])
    with pytest.raises(BlueprintError, match="index can hold blueprint.json only"):
        put(two_layers, model_hub, domain="math", in_index=True)
    assert not model_hub.requests


def test_another_models_repository_is_refused(two_layers, model_hub):
    """Unless it is declared a copy of the same model; then its card names the base model."""
    model_hub.repository("org/other").commit({"config.json": b"{}"})
    with pytest.raises(
        MismatchError, match=r"'org/other' holds a model \(config.json\).*'tiny/llama'.*allow_other_model"
    ):
        put(two_layers, model_hub, "org/other")
    put(two_layers, model_hub, "org/other", allow_other_model=True)
    assert "base_model: tiny/llama" in model_hub.repository("org/other").files()["README.md"].decode()


@pytest.mark.parametrize(
    "config, fits",
    [
        ('{"base_model_name_or_path": "tiny/llama"}', True),
        ('{"base_model_name_or_path": "org/base"}', False),
        ('{"base_model_name_or_path": null}', False),
        ("[]", False),
        ("{", False),
        ("", False),
    ],
)
def test_beside_an_adapter_of_the_model_it_is_published(two_layers, model_hub, config, fits):
    """Not beside another model's, or one that does not say whose it is."""
    weights = save({}, metadata={"format": "pt", "blueprint.json": "{}"})
    files = {"adapter_config.json": config.encode(), "adapter_model.safetensors": weights}
    model_hub.repository("org/adapter").commit(files)
    if fits:
        publication = put(two_layers, model_hub, "org/adapter", dry_run=True)
        assert "header of adapter_model.safetensors holds another blueprint" in str(publication)
        put(two_layers, model_hub, "org/adapter")
        assert "blueprint.json" in model_hub.repository("org/adapter").files()
    else:
        with pytest.raises(MismatchError, match="adapter_config.json.*one of its adapters"):
            put(two_layers, model_hub, "org/adapter")


def test_a_blueprint_of_another_model_is_not_overwritten(two_layers, model_hub):
    """Both digests are shown; replace=True does it. The same model measured again is an update."""
    put(two_layers, model_hub)
    other = replace(two_layers, model_digest="sha256:" + "0" * 64)
    with pytest.raises(MismatchError, match=f"(?s){two_layers.model_digest}.*{other.model_digest}.*replace=True"):
        put(other, model_hub)
    put(other, model_hub, replace=True)
    again = replace(other, provenance={**other.provenance, "seed": 7})
    put(again, model_hub, message="Measured again")
    assert [c.title for c in model_hub.repository("tiny/llama").commits()][:2] == [
        "Measured again",
        "Update gradient blueprint blueprint.json",
    ]


def test_another_file_of_that_name_is_not_overwritten(two_layers, model_hub):
    """Somebody's own blueprint.json, and somebody's own blueprint.png."""
    repository = model_hub.repository("tiny/llama")
    repository.commit({"blueprint.json": b"{}", "blueprint.png": b"a house"})
    with pytest.raises(BlueprintError, match="blueprint.json of 'tiny/llama' is not a valid blueprint"):
        put(two_layers, model_hub)
    repository.commit({"blueprint.json": None})
    put(two_layers, model_hub, picture=True)
    assert repository.files()["blueprint.png"] == b"a house"
    assert "blueprint.png" not in repository.files()["README.md"].decode()


def test_a_public_repository_does_not_pass_for_a_private_one(two_layers, model_hub):
    """private=True to one that exists and is public is an error, not a leak."""
    with pytest.raises(BlueprintError, match="'tiny/llama' exists and is public"):
        put(two_layers, model_hub, private=True)


def test_a_card_that_cannot_be_edited_is_left_alone(two_layers, model_hub):
    """Broken marks, broken YAML and binary content are errors before any commit."""
    repository = model_hub.repository("tiny/llama")
    for card, message in (
        (b"<!-- gradient-blueprint blueprint.json begin -->\n", "does not end"),
        (b"---\ntags: [\n---\n", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8"),
    ):
        before = repository.commit({"README.md": card}).id
        with pytest.raises(BlueprintError, match=message):
            put(two_layers, model_hub)
        assert repository.refs["main"] == before


def test_a_card_that_the_hub_refuses_is_explained(two_layers, model_hub):
    """The Hub checks front matter before the commit."""
    repository = model_hub.repository("tiny/llama")
    repository.commit({"README.md": b"---\nbase_model: not an id\n---\n"})
    with pytest.raises(
        BlueprintError, match="does not take the card of 'tiny/llama'.*not an id.*Nothing was published"
    ):
        put(two_layers, model_hub)
