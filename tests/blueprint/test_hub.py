"""Blueprints fetched over HTTP by the real client, from a Hub on loopback."""

import gzip
import http.server
import json
import re
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace

import pytest

from peft_blueprint import Blueprint, BlueprintError
from peft_blueprint.blueprint import find_blueprints, replace_metadata, translated_hub_errors
from peft_blueprint.errors import FormatError
from peft_blueprint.publish import publish
from tests.hub.loopback import loopback_hub
from tests.hub.state import COMMIT
from tests.hub_client import adapters_placed
from tests.records import to_header_text


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
    """Once downloaded, a commit stays the same when the Hub changes."""
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
            with pytest.raises(BlueprintError, match="no repository 'org/name' that you may see.*hf auth"):
                Blueprint.from_pretrained("org/name", token=token, **wish)
        assert Blueprint.from_pretrained("org/name", token="hf_secret", **wish) == blueprint
    with loopback_hub({"org/name": folder}, token="hf_secret", gated=True) as endpoint:
        with pytest.raises(BlueprintError, match="'org/name' needs permission.*hf auth login"):
            Blueprint.from_pretrained("org/name", endpoint=endpoint, cache_dir=tmp_path / "other")


def test_offline_it_comes_from_the_cache(blueprint, folder, tmp_path, monkeypatch):
    """After one download it works with local_files_only and without a Hub; before, the error says what is missing."""
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
        ("org/none", {}, "no repository 'org/none'.*no such file or folder exists here. Check the name"),
        ("none", {}, "no repository 'none'.*no such file or folder exists here"),
        ("org/name", {"revision": "v9"}, "'org/name' has no revision 'v9'"),
        ("org/empty", {}, "'org/empty' has no blueprint.json.*peft-blueprint generate"),
        ("org/name/too/deep", {}, "'org/name/too/deep' is not a repository id.*no such file or folder exists here"),
        ("org/na me", {}, "'org/na me' is not a repository id"),
        ("./none/at/all", {}, "none/at/all' is not a repository id"),
        ("folder/none.json", {}, "No blueprint found at folder/none.json"),
    ],
)
def test_missing_repositories_are_named_with_a_fix(folder, tmp_path, source, wish, message):
    """Repository, revision, file and path, each in its own words."""
    (tmp_path / "empty").mkdir()
    with loopback_hub({"org/name": folder, "org/empty": tmp_path / "empty"}) as endpoint:
        with pytest.raises(BlueprintError, match=message):
            Blueprint.from_pretrained(source, endpoint=endpoint, cache_dir=tmp_path / "cache", **wish)


def test_another_file_of_that_name_is_a_format_error(folder, tmp_path):
    """A repository's broken file is refused like one on disk."""
    (folder / "blueprint.json").write_text('{"model_id": "m"')
    with loopback_hub({"org/name": folder}) as endpoint:
        with pytest.raises(FormatError, match="not valid JSON"):
            Blueprint.from_pretrained("org/name", endpoint=endpoint, cache_dir=tmp_path / "cache")


def test_a_folder_of_that_name_goes_first(blueprint, folder, tmp_path, monkeypatch):
    """A folder on disk makes no request."""
    monkeypatch.chdir(tmp_path)
    blueprint.save(tmp_path / "org" / "name" / "blueprint.json")
    with loopback_hub({}) as endpoint:
        assert Blueprint.from_pretrained("org/name", endpoint=endpoint) == blueprint


def test_a_config_takes_a_repository_id(folder, tmp_path):
    """BlueprintConfig(blueprint="org/name") in a process whose Hub is HF_ENDPOINT, through get_peft_model."""
    with loopback_hub({"org/name": folder}) as endpoint:
        assert len(adapters_placed("org/name", endpoint, tmp_path / "home")) == 5


# ------------------------------------------------------------------------------------------ checkpoints


def save_checkpoints(blueprint, folder, *names):
    """Write blueprints of checkpoints, `blueprint-50.json` and so on."""
    for name in names:
        share = float(name.rpartition(".")[0].rpartition("-")[2]) / 100
        replace(blueprint, training_checkpoint=share).save(folder / name)


def test_without_a_final_one_the_latest_checkpoint_is_read(blueprint, tmp_path, recwarn):
    """From the Hub, its cache and a folder, beside a model without a blueprint; a warning unless it is of 100 %."""
    folder = tmp_path / "repository"
    model_file(folder / "model.safetensors", None)
    save_checkpoints(blueprint, folder, "blueprint-50.json", "blueprint-80.json", "blueprint-math-90.json")
    with loopback_hub({"org/name": folder}) as endpoint:
        wish = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        for source, known in (("org/name", wish), ("org/name", wish | {"local_files_only": True}), (folder, {})):
            with pytest.warns(
                UserWarning, match="has no blueprint.json. blueprint-80.json was .* at 80 % of the training"
            ):
                assert Blueprint.from_pretrained(source, **known).training_checkpoint == 0.8
            if known is wish:
                assert Blueprint.from_pretrained(source, checkpoint=0.5, **known).training_checkpoint == 0.5
        with pytest.warns(UserWarning, match="has no blueprint-math.json. blueprint-math-90.json"):
            assert Blueprint.from_pretrained("org/name", domain="math", **wish).training_checkpoint == 0.9
        with pytest.raises(BlueprintError, match="has no blueprint-law.json"):
            Blueprint.from_pretrained("org/name", domain="law", **wish)
        with pytest.raises(BlueprintError, match="has no blueprint-60.json"):
            Blueprint.from_pretrained("org/name", checkpoint=0.6, **wish)
        recwarn.clear()
        save_checkpoints(blueprint, folder, "blueprint-100.safetensors")
        assert Blueprint.from_pretrained("org/name", **wish).training_checkpoint == 1.0
        assert Blueprint.from_pretrained(folder).training_checkpoint == 1.0
        blueprint.save(folder / "blueprint.json")
        assert Blueprint.from_pretrained("org/name", **wish) == blueprint == Blueprint.from_pretrained(folder)
        assert not recwarn.list


def test_all_blueprints_of_a_repository_are_found(blueprint, tmp_path):
    """With that of the model's header; offline those that were read before."""
    folder = tmp_path / "repository"
    model_file(folder / "model.safetensors", blueprint)
    model_file(folder / "sub" / "model.safetensors", None)
    save_checkpoints(blueprint, folder, "blueprint-100.json", "blueprint-50.json", "blueprint-50.csv")
    save_checkpoints(blueprint, folder / "sub", "blueprint-20.json")
    with loopback_hub({"org/name": folder}) as endpoint:
        wish = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        assert find_blueprints("org/name", **wish) == ["blueprint.json", "blueprint-50.json", "blueprint-100.json"]
        assert find_blueprints("org/name", subfolder="sub", **wish) == ["blueprint-20.json"]
        Blueprint.from_pretrained("org/name", checkpoint=0.5, **wish)
        offline = find_blueprints("org/name", local_files_only=True, **wish)
        assert offline == ["blueprint.json", "blueprint-50.json"]
        with pytest.raises(BlueprintError, match="no repository 'org/none'"):
            find_blueprints("org/none", **wish)


# ------------------------------------------------------------------------------------------ subfolders and adapters


def model_file(path, blueprint):
    """A safetensors file without tensors that carries a blueprint, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(b"{}      ").to_bytes(8, "little") + b"{}      ")
    if blueprint is not None:
        replace_metadata(path, {"blueprint.json": to_header_text(blueprint)}, progress=False)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "blueprint.json"])
def test_a_subfolders_blueprint_is_its_own(blueprint, tmp_path, name):
    """In a header or beside; online, from the cache of a branch or commit, and not that of the root or another folder."""
    folders = {"": "root", "one": "first", "two/deep": "second"}
    for folder, model_id in folders.items():
        path = tmp_path / "repository" / folder / name
        own = replace(blueprint, model_id=model_id)
        if name == "blueprint.json":
            own.save(path)
        else:
            model_file(path, own)
    with loopback_hub({"org/name": tmp_path / "repository"}) as endpoint:
        wish = {"endpoint": endpoint, "cache_dir": tmp_path / "cache"}
        for known in ({}, {"local_files_only": True}, {"revision": COMMIT}):
            for folder, model_id in folders.items():
                where = {"subfolder": folder} if folder else {}
                assert Blueprint.from_pretrained("org/name", **where, **wish, **known).model_id == model_id
        for spelling in ("two/deep/", "./two/deep", "two//deep"):
            assert Blueprint.from_pretrained("org/name", subfolder=spelling, **wish).model_id == "second"
        with pytest.raises(BlueprintError, match="has no"):
            Blueprint.from_pretrained("org/name", subfolder="three", **wish)
    assert Blueprint.from_pretrained(tmp_path / "repository", subfolder="two/deep").model_id == "second"


@pytest.mark.parametrize("beside", [None, "model.safetensors"])
def test_an_adapters_header_is_read(blueprint, tmp_path, beside):
    """From a folder and from the Hub, also beside a model without a blueprint."""
    model_file(tmp_path / "adapter_model.safetensors", blueprint)
    if beside:
        model_file(tmp_path / beside, None)
    found = Blueprint.from_pretrained(tmp_path / "adapter_model.safetensors")
    assert found.names == blueprint.names and Blueprint.from_pretrained(tmp_path) == found
    with loopback_hub({"org/adapter": tmp_path}) as endpoint:
        assert Blueprint.from_pretrained("org/adapter", endpoint=endpoint, cache_dir=tmp_path / "cache") == found


# ------------------------------------------------------------------------------------------ hostile and broken hubs


@contextmanager
def answering(respond):
    """An HTTP server on loopback that gives every request to a function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                respond(self)
            except OSError:
                pass  # the client has gone

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answer(handler, status, body=b"", **headers):
    handler.send_response(status)
    for key, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"\0")
        handler.wfile.flush()
        time.sleep(0.05)


def large(handler):
    if "model" in handler.path:
        answer(handler, 404, X_Error_Code="EntryNotFound")
    else:
        answer(handler, 200, b"{}", Content_Length=str(300 * 10**6), ETag="a" * 40, X_Repo_Commit=COMMIT)


def login_page(handler):
    answer(handler, 200, b"<html>Log in</html>", Content_Type="text/html; charset=utf-8")


def compressed(handler):
    answer(handler, 200, gzip.compress(bytes(10**7)), Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (drip, "did not deliver the blueprint of 'org/name' within 2 seconds"),
        (large, "300,000,000 bytes; at most .* was not downloaded"),
        (login_page, "answered with a page.*login page"),
        (compressed, "compressed .gzip."),
        (lambda handler: answer(handler, 429, Retry_After="86400"), "limits requests .* in 86400 seconds"),
    ],
    ids=["a byte now and then", "a large file", "a login page", "compressed", "wait for a day"],
)
def test_a_hostile_hub_costs_little(respond, message, tmp_path, monkeypatch):
    """Size, expansion, waiting and total time are bounded, and said."""
    monkeypatch.setattr("peft_blueprint.blueprint.hub.MAX_SECONDS", 2.0)
    start = time.monotonic()
    with answering(respond) as endpoint:
        with pytest.raises(BlueprintError, match=message):
            Blueprint.from_pretrained("org/name", endpoint=endpoint, cache_dir=tmp_path / "cache", token=False)
    assert time.monotonic() - start < 10
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000


@pytest.mark.parametrize(
    "body",
    [
        *(b"{}", b"[]", b'"x"', b"null", b'{"id": "org/name", "sha": 3}'),
        b'{"id": "org/name", "sha": "a", "siblings": [{"rfilename": []}]}',
    ],
)
def test_an_answer_of_an_unknown_form_publishes_nothing(body, two_layers, plain_client):
    """The client of the Hub trusts it, and raises any error."""
    with answering(lambda handler: answer(handler, 200, body)) as endpoint:
        with pytest.raises(BlueprintError, match="answered about 'org/name' in an unknown form.*HF_ENDPOINT"):
            publish(two_layers, "org/name", endpoint=endpoint, token="hf_any")


@pytest.mark.parametrize("name", ["model.safetensors", "blueprint.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"file": 1}'])
def test_a_spoilt_cache_is_read_anew(blueprint, tmp_path, name, content):
    """A pinned revision does not fail for ever because a write was cut."""
    if name == "blueprint.json":
        blueprint.save(tmp_path / "repository" / name)
    else:
        model_file(tmp_path / "repository" / name, blueprint)
    cache = tmp_path / "cache"
    with loopback_hub({"org/name": tmp_path / "repository"}) as endpoint:
        wish = {"endpoint": endpoint, "cache_dir": cache, "revision": COMMIT}
        first = Blueprint.from_pretrained("org/name", **wish)
        kept = list((cache / "assets").rglob("*.json"))
        kept += [] if content else list(cache.rglob("blueprint.json"))
        assert kept
        for path in kept:
            path.resolve().write_text(content)
        assert Blueprint.from_pretrained("org/name", **wish) == first


# ------------------------------------------------------------------------------------------ secrets

SECRET = "s3cret-t0ken-of-mine"


@pytest.mark.parametrize(
    "wish",
    [
        {"token": f"{SECRET}\n"},
        {"token": f"{SECRET}\nX-Other: 1"},
        {"token": f"hf_{SECRET}\r\n"},
        {"endpoint": f"http://me:{SECRET}@127.0.0.1:9"},
        {"endpoint": f"http://{SECRET}@127.0.0.1:9"},
    ],
    ids=str,
)
def test_no_message_holds_a_secret(tmp_path, wish):
    """Including the chained exceptions that a traceback shows."""
    with pytest.raises(BlueprintError) as error:
        Blueprint.from_pretrained("org/name", **{"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path} | wish)
    assert SECRET not in "".join(traceback.format_exception_only(error.value))
    behind, shown = error.value, []
    while behind is not None:
        shown.append(str(behind))
        behind = behind.__cause__ or (None if behind.__suppress_context__ else behind.__context__)
    assert SECRET not in "".join(shown)


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError, ConnectionError])
def test_errors_that_quote_a_token_are_translated(kind, monkeypatch):
    """Of any class that the client raises, in publishing too."""
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    for text in ("Bearer abcdef", "https://me:abcdef@hub", "it is of-the-environment", "hf_abcdef", "given-one"):
        with pytest.raises(BlueprintError) as error, translated_hub_errors("org/name", token="given-one"):
            raise kind(f"refused: {text}")
        assert not re.search("abcdef|of-the-env|given-one", str(error.value))


def test_a_page_instead_of_json_is_an_error():
    """As a proxy or a captive portal gives it to the client's own requests."""
    with pytest.raises(BlueprintError, match="'org/name'|answered with a page, not with JSON"):
        with translated_hub_errors("org/name"):
            json.loads("<html>")


def test_a_token_that_http_does_not_take_is_an_error_in_words(hub, plain_client):
    """The client would raise a UnicodeEncodeError before it asks anything."""
    with pytest.raises(BlueprintError, match="token or address for 'org/name' has characters") as error:
        Blueprint.from_pretrained("org/name", endpoint=hub.endpoint, token="hf_\N{GREEK SMALL LETTER MU}x")
    assert "hf_" not in str(error.value)
