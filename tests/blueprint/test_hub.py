"""Blueprints fetched over HTTP by the real client, from a Hub on loopback."""

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.errors import FormatError
from tests.hub.loopback import loopback_hub
from tests.hub.state import COMMIT
from tests.hub_client import adapters_placed


pytestmark = pytest.mark.usefixtures("no_token_of_mine")


@pytest.fixture
def folder(blueprint, tmp_path):
    """The files of a repository."""
    return blueprint.save(tmp_path / "repository" / "blueprint.json").parent


def test_a_blueprint_is_fetched_by_its_repository_id(blueprint, folder, tmp_path):
    """From main, or from a commit; the same record that was published."""
    with loopback_hub({"org/name": folder}) as endpoint:
        for revision in (None, "main", COMMIT):
            fetched = Blueprint.from_pretrained(
                "org/name", revision=revision, endpoint=endpoint, cache_dir=tmp_path / str(revision)
            )
            assert fetched == blueprint
    assert (tmp_path / COMMIT / "models--org--name" / "snapshots" / COMMIT / "blueprint.json").exists()


def test_a_pinned_commit_is_kept(blueprint, folder, tmp_path):
    """Once downloaded, a commit is the same for good, whatever the Hub holds by then."""
    with loopback_hub({"org/name": folder}) as endpoint:
        pinned = {"revision": COMMIT, "endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        Blueprint.from_pretrained("org/name", **pinned)
        (folder / "blueprint.json").write_text("something else")
        assert Blueprint.from_pretrained("org/name", **pinned) == blueprint


def test_a_private_repository_needs_its_token(blueprint, folder, tmp_path):
    """With the token it is read; without, or gated, the message says how to get in."""
    with loopback_hub({"org/name": folder}, token="hf_secret") as endpoint:
        wish = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        for token in (None, False, "hf_wrong"):
            with pytest.raises(BlueprintError, match="no repository 'org/name' on the Hub that you may see.*hf auth"):
                Blueprint.from_pretrained("org/name", token=token, **wish)
        assert Blueprint.from_pretrained("org/name", token="hf_secret", **wish) == blueprint
    with loopback_hub({"org/name": folder}, token="hf_secret", gated=True) as endpoint:
        with pytest.raises(BlueprintError, match="'org/name' needs permission.*hf auth login"):
            Blueprint.from_pretrained("org/name", endpoint=endpoint, cache_dir=tmp_path / "other")


def test_offline_it_comes_from_the_cache(blueprint, folder, tmp_path, monkeypatch):
    """After one download neither local_files_only nor a dead Hub is in the way; before, the message says so."""
    wish = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(BlueprintError, match="'org/name' is not in the cache.*[Gg]o online once, or give a file"):
        Blueprint.from_pretrained("org/name", local_files_only=True, **wish)
    with loopback_hub({"org/name": folder}) as endpoint:
        Blueprint.from_pretrained("org/name", endpoint=endpoint, **wish)
    assert Blueprint.from_pretrained("org/name", local_files_only=True, **wish) == blueprint
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    assert Blueprint.from_pretrained("org/name", endpoint=endpoint, **wish) == blueprint  # nobody listens there now
    with pytest.raises(BlueprintError, match="'org/other' is not in the cache and the Hub cannot be reached"):
        Blueprint.from_pretrained("org/other", endpoint=endpoint, **wish)


@pytest.mark.parametrize(
    ("source", "wish", "message"),
    [
        ("org/none", {}, "no repository 'org/none'.*no such file or folder here. Check the name"),
        ("none", {}, "no repository 'none'.*no such file or folder here"),
        ("org/name", {"revision": "v9"}, "'org/name' has no revision 'v9'"),
        ("org/empty", {}, "'org/empty' publishes no blueprint.json.*peft-blueprint generate"),
        ("org/name/too/deep", {}, "'org/name/too/deep' is not a repository id.*no such file or folder here"),
        ("org/na me", {}, "'org/na me' is not a repository id"),
        ("./none/at/all", {}, "none/at/all' is not a repository id"),
        ("folder/none.json", {}, "no blueprint at folder/none.json"),
    ],
)
def test_what_is_not_there_is_named_with_a_way_out(folder, tmp_path, source, wish, message):
    """Repository, revision, file and path, each in its own words."""
    (tmp_path / "empty").mkdir()
    with loopback_hub({"org/name": folder, "org/empty": tmp_path / "empty"}) as endpoint:
        with pytest.raises(BlueprintError, match=message):
            Blueprint.from_pretrained(source, endpoint=endpoint, cache_dir=tmp_path / "cache", **wish)


def test_what_is_no_blueprint_there_is_a_format_error(folder, tmp_path):
    """A repository's broken file is refused like one on disk."""
    (folder / "blueprint.json").write_text('{"model_id": "m"')
    with loopback_hub({"org/name": folder}) as endpoint:
        with pytest.raises(FormatError, match="not valid JSON"):
            Blueprint.from_pretrained("org/name", endpoint=endpoint, cache_dir=tmp_path / "cache")


def test_a_folder_of_that_name_goes_first(blueprint, folder, tmp_path, monkeypatch):
    """What is on disk is not looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    blueprint.save(tmp_path / "org" / "name" / "blueprint.json")
    with loopback_hub({}) as endpoint:
        assert Blueprint.from_pretrained("org/name", endpoint=endpoint) == blueprint


def test_a_config_takes_a_repository_id(folder, tmp_path):
    """BlueprintConfig(blueprint="org/name") in a process whose Hub is HF_ENDPOINT, through get_peft_model."""
    with loopback_hub({"org/name": folder}) as endpoint:
        assert len(adapters_placed("org/name", endpoint, tmp_path / "home")) == 5
