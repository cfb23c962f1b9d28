"""A published blueprint costs one request and no tensor, and is there offline."""

import json
import shutil
from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint.header import FIRST_READ, read_metadata
from peft_blueprint.errors import FormatError
from peft_blueprint.publish.embedding import embed
from peft_blueprint.testing import tiny_llama
from tests.hub.loopback import COMMIT, LoopbackHub
from tests.records import from_header_text, to_header_text


pytestmark = pytest.mark.usefixtures("no_token_of_mine")


@pytest.fixture(scope="module")
def rounded(blueprint):
    """The record as a header holds it."""
    return from_header_text(to_header_text(blueprint))


@pytest.fixture(scope="module")
def whole(blueprint, tmp_path_factory):
    """The folder of a model in one file, with its blueprint in the header."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_llama(layers=12).save_pretrained(folder)
    embed(blueprint, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def sharded(blueprint, tmp_path_factory):
    """The folder of a model in shards, with its blueprint in the index."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_llama(layers=12).save_pretrained(folder, max_shard_size="200kB")
    assert (folder / "model.safetensors.index.json").exists()
    embed(blueprint, folder, progress=False)
    return folder


@pytest.fixture
def hub(whole, sharded, tmp_path):
    """A Hub with a model in one file, one in shards, one without, and a folder for the client's cache."""
    plain = tmp_path / "plain"
    tiny_llama(layers=12).save_pretrained(plain)
    with LoopbackHub({"org/whole": whole, "org/sharded": sharded, "org/plain": plain}) as hub:
        yield hub


def wish(hub, tmp_path):
    return {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}


def asked(hub):
    return [(request.method, request.path.rpartition("/")[2], request.status) for request in hub.requests]


def test_a_header_costs_one_request_and_no_tensor(rounded, whole, hub, tmp_path):
    """One range of 100 kB, before the tensors; the record equals that on disk."""
    assert Blueprint.from_pretrained("org/whole", **wish(hub, tmp_path)) == rounded
    [request] = hub.requests
    assert (request.method, request.status, request.range) == ("GET", 206, f"bytes=0-{FIRST_READ - 1}")
    assert request.sent <= FIRST_READ < (whole / "model.safetensors").stat().st_size
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_an_index_costs_two(rounded, hub, tmp_path):
    """The first finds no single file."""
    assert Blueprint.from_pretrained("org/sharded", **wish(hub, tmp_path)) == rounded
    assert asked(hub) == [("GET", "model.safetensors", 404), ("GET", "model.safetensors.index.json", 206)]


def test_beside_it_is_found_exactly(blueprint, hub, tmp_path):
    """Without one in header or index, the files beside are read: JSON, then tensors."""
    for name in ("blueprint.json", "blueprint.safetensors"):
        folder = blueprint.save(tmp_path / name.replace(".", "-") / name).parent
        shutil.copy(tmp_path / "plain" / "model.safetensors", folder)
        with LoopbackHub({"org/beside": folder}) as other:
            assert Blueprint.from_pretrained("org/beside", **wish(other, tmp_path / name)) == blueprint
            assert asked(other)[-1] == ("GET", name, 200)
            count = len(other.requests)
            pinned = Blueprint.from_pretrained("org/beside", revision=COMMIT, **wish(other, tmp_path / name))
            assert pinned == blueprint and len(other.requests) - count <= (name != "blueprint.json"), (
                "two 404s are remembered"
            )


def test_several_side_by_side_are_asked_for_by_name(blueprint, tmp_path):
    """A domain or checkpoint is read from its own file; a missing one is named."""
    math = replace(blueprint, training_checkpoint=0.5)
    blueprint.save(tmp_path / "all" / "blueprint.json")
    math.save(tmp_path / "all" / "blueprint-math-50.json")
    with LoopbackHub({"org/all": tmp_path / "all"}) as hub:
        settings = wish(hub, tmp_path)
        assert Blueprint.from_pretrained("org/all", domain="math", checkpoint=0.5, **settings) == math
        assert all("blueprint-math-50.json" in request.path for request in hub.requests)
        with pytest.raises(BlueprintError, match="'org/all' has no blueprint-law.json"):
            Blueprint.from_pretrained("org/all", domain="law", **settings)
        with pytest.raises(BlueprintError, match="domain"):
            Blueprint.from_pretrained("org/all", domain="../../etc/passwd", **settings)
    assert Blueprint.from_pretrained(tmp_path / "all", domain="math", checkpoint=0.5) == math


def test_a_folder_gives_the_exact_file_first(blueprint, rounded, whole, tmp_path):
    """Beside before header, since on disk it costs nothing."""
    assert Blueprint.from_pretrained(whole) == Blueprint.from_pretrained(whole / "model.safetensors") == rounded
    shutil.copytree(whole, tmp_path / "copy")
    blueprint.save(tmp_path / "copy")
    assert Blueprint.from_pretrained(tmp_path / "copy") == blueprint


def test_a_commit_is_read_once_and_a_branch_offline(rounded, hub, tmp_path, monkeypatch):
    """A pinned commit makes no second request; a branch is checked again, and comes from the cache offline."""
    settings = wish(hub, tmp_path)
    assert Blueprint.from_pretrained("org/whole", **settings) == rounded
    commit = COMMIT
    assert Blueprint.from_pretrained("org/whole", revision=commit, **settings) == rounded
    assert len(hub.requests) == 1
    assert Blueprint.from_pretrained("org/whole", **settings) == rounded
    assert len(hub.requests) == 2
    assert Blueprint.from_pretrained("org/whole", local_files_only=True, **settings) == rounded
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Blueprint.from_pretrained("org/whole", **settings) == rounded
    with pytest.raises(BlueprintError, match="'org/sharded' is not in the cache"):
        Blueprint.from_pretrained("org/sharded", **settings)
    assert len(hub.requests) == 2


def test_a_dead_hub_leaves_the_cache(rounded, whole, tmp_path, monkeypatch):
    """As offline, without being told."""
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    with LoopbackHub({"org/whole": whole}) as hub:
        settings = wish(hub, tmp_path)
        Blueprint.from_pretrained("org/whole", **settings)
    assert Blueprint.from_pretrained("org/whole", **settings) == rounded
    with pytest.raises(BlueprintError, match="'org/other' is not in the cache and the Hub cannot be reached"):
        Blueprint.from_pretrained("org/other", **settings)


def test_private_repositories_take_a_token(rounded, whole, tmp_path):
    """As for any file of theirs."""
    with LoopbackHub({"org/whole": whole}, token="hf_right") as hub:
        hub.repository("org/whole").private = True
        settings = wish(hub, tmp_path)
        with pytest.raises(BlueprintError, match="no repository 'org/whole' that you may see"):
            Blueprint.from_pretrained("org/whole", token=False, **settings)
        assert Blueprint.from_pretrained("org/whole", token="hf_right", **settings) == rounded


def test_redirects_and_servers_without_ranges_send_no_more(rounded, whole, hub, tmp_path):
    """Large files come from elsewhere, and a server may ignore the range: we hang up after 100 kB."""
    hub.redirect_lfs = True
    assert Blueprint.from_pretrained("org/whole", **wish(hub, tmp_path)) == rounded
    hub.redirect_lfs, hub.ignore_ranges = False, True
    assert Blueprint.from_pretrained("org/whole", **wish(hub, tmp_path / "other")) == rounded


def test_a_header_that_is_longer_takes_a_second_request(blueprint, tmp_path):
    """With a blueprint that does not fit into 100 kB all of it is read, and no tensor still."""
    tiny_llama(layers=12).save_pretrained(tmp_path / "long")
    path = tmp_path / "long" / "model.safetensors"
    wide = replace(blueprint, provenance=dict(blueprint.provenance) | {"note": "x" * 2 * FIRST_READ})
    with pytest.warns(UserWarning, match="second request"):
        embed(wide, path, progress=False)
    with LoopbackHub({"org/long": tmp_path / "long"}) as hub:
        found = Blueprint.from_pretrained("org/long", **wish(hub, tmp_path))
        assert found == from_header_text(read_metadata(path)["blueprint.json"])
        assert len(hub.requests) == 2
        assert sum(request.sent for request in hub.requests) < path.stat().st_size


def test_an_index_whose_metadata_stands_last_is_read_whole(rounded, sharded, tmp_path):
    """Other tools write an index in another order."""
    folder = tmp_path / "last"
    shutil.copytree(sharded, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index = {"weight_map": index["weight_map"] | {f"filler.{i}": "x" * 200 + ".safetensors" for i in range(600)}} | {
        "metadata": index["metadata"]
    }
    path.write_text(json.dumps(index))
    with LoopbackHub({"org/last": folder}) as hub:
        assert Blueprint.from_pretrained("org/last", **wish(hub, tmp_path)) == rounded
        assert [request.status for request in hub.requests] == [404, 206, 206]


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-40], lambda text: text.replace("0", "9")], ids=["cut", "changed"]
)
def test_a_spoilt_one_is_refused(blueprint, tmp_path, spoil):
    """Its digest, or its form, does not agree."""
    from peft_blueprint.blueprint.header import replace_metadata

    tiny_llama(layers=12).save_pretrained(tmp_path / "spoilt")
    replace_metadata(
        tmp_path / "spoilt" / "model.safetensors", {"blueprint.json": spoil(to_header_text(blueprint))}, progress=False
    )
    with LoopbackHub({"org/spoilt": tmp_path / "spoilt"}) as hub:
        with pytest.raises(FormatError, match="model.safetensors of org/spoilt"):
            Blueprint.from_pretrained("org/spoilt", **wish(hub, tmp_path))


def test_a_hub_in_trouble_is_an_error(hub, tmp_path, monkeypatch):
    """A server error names the repository and a fix; a busy server is asked again."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail(500, times=None)
    with pytest.raises(BlueprintError, match="(?s)The Hub failed on a request about .org/whole.*Try again later"):
        Blueprint.from_pretrained("org/whole", **wish(hub, tmp_path))


def test_a_connection_that_is_always_cut_is_an_error(blueprint, tmp_path, monkeypatch):
    """Cut again and again inside a file beside the model: our error, with nothing half read."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    folder = blueprint.save(tmp_path / "beside" / "blueprint.json").parent
    with LoopbackHub({"org/beside": folder}) as hub:
        hub.cut(1000, "GET .*blueprint.json", times=None)
        with pytest.raises(BlueprintError, match="connection to the Hub failed on .org/beside"):
            Blueprint.from_pretrained("org/beside", **wish(hub, tmp_path))
