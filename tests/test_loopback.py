"""The Hub on loopback, as the real client sees it. Run: pytest tests/test_loopback.py"""

import ast
import hashlib
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import peft_blueprint
from peft_blueprint import BlueprintError
from peft_blueprint.loopback import COMMIT, LoopbackHub, loopback_hub


# The client's own upload by LFS, with httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TEXT = b"one line\n"
CUT = "peer closed connection|IncompleteRead"  # httpx, requests
TENSORS = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def plain_client(monkeypatch):
    """The client carries no credentials but those named, uploads by LFS, and does not wait between its attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path):
    """A repository on disk: a card, a file in a folder, and a binary file."""
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (tmp_path / "model" / "sub" / "notes.txt").write_bytes(TEXT)
    (tmp_path / "model" / "model.safetensors").write_bytes(TENSORS)
    return tmp_path / "model"


@pytest.fixture
def hub(folder):
    """That folder as org/name."""
    with LoopbackHub({"org/name": folder}) as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_any")


def add(**files):
    return [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(api, operations, id="org/name", **wish):
    return api.create_commit(id, operations, commit_message=wish.pop("message", "a change"), **wish)


class Reply:
    """What is answered to one request, of which a client's library would hide a part."""

    def __init__(self, url, method="GET", body=None, token=None, **headers):
        address, _, path = url.removeprefix("http://").partition("/")
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.request(method, f"/{path}", body, headers)
            answer = connection.getresponse()
            self.status, self.headers, self.content = answer.status, answer.headers, answer.read()

    def followed(self, **headers):
        return Reply(self.headers["Location"], **headers) if self.status == 302 else self


def state(hub, id="org/name"):
    """All that a refused commit must leave alone."""
    repository = hub.repository(id)
    return dict(repository.refs), {ref: repository.files(ref) for ref in repository.refs}


def test_a_folder_is_listed_and_described(hub, api):
    """Names, sizes, digests and folders, as the client's own functions read them."""
    assert api.list_repo_files("org/name") == ["README.md", "model.safetensors", "sub/notes.txt"]
    top = {entry.path: entry for entry in api.list_repo_tree("org/name")}
    assert set(top) == {"README.md", "model.safetensors", "sub"} and not hasattr(top["sub"], "size")
    assert top["model.safetensors"].lfs.sha256 == sha256(TENSORS)
    assert [entry.path for entry in api.list_repo_tree("org/name", "sub")] == ["sub/notes.txt"]
    notes, sub = api.get_paths_info("org/name", ["sub/notes.txt", "sub", "none"])
    assert (notes.size, notes.lfs, sub.path) == (len(TEXT), None, "sub")
    info = api.model_info("org/name", files_metadata=True)
    assert (info.id, info.sha, info.private, len(info.siblings)) == ("org/name", COMMIT, False, 3)
    assert api.file_exists("org/name", "sub/notes.txt") and not api.file_exists("org/name", "none")
    assert api.repo_exists("org/name") and not api.repo_exists("org/none")
    assert [ref.target_commit for ref in api.list_repo_refs("org/name").branches] == [COMMIT]
    assert api.whoami()["name"] == "somebody"


def test_a_file_system_reads_from_it(hub):
    """Through fsspec: a listing, the end of a file, a missing file."""
    files = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    assert files.ls("org/name/sub", detail=False) == ["org/name/sub/notes.txt"]
    with files.open("org/name/model.safetensors", block_size=0) as file:
        assert file.read(300) == TENSORS[:300]
    assert files.cat_file("org/name/model.safetensors", start=-10) == TENSORS[-10:]
    assert not files.exists("org/name/none")


@pytest.mark.parametrize("redirect", [False, True])
def test_what_is_pushed_is_what_is_fetched(hub, api, tmp_path, redirect):
    """Text in the commit, a binary file by LFS to the storage, in a new repository; read back with and without the
    redirect, on which no token is shown."""
    hub.redirect_lfs = redirect
    assert str(api.create_repo("somebody/new", private=True)) == f"{hub.endpoint}/somebody/new"
    done = write(api, add(a_txt=TEXT, b_safetensors=TENSORS, empty_txt=b""), "somebody/new", message="two files")
    for name, content in {"a.txt": TEXT, "b.safetensors": TENSORS, "empty.txt": b""}.items():
        path = hf_hub_download(
            "somebody/new", name, endpoint=hub.endpoint, token="hf_any", cache_dir=tmp_path / f"{redirect}"
        )
        assert Path(path).read_bytes() == content and done.oid in path
    commits = hub.repository("somebody/new").commits()
    assert [commit.title for commit in commits] == ["two files", "initial commit"]
    assert commits[0].parent == commits[1].id and commits[0].id == done.oid
    assert commits[0].operations == (("file", "a.txt"), ("lfsFile", "b.safetensors"), ("file", "empty.txt"))
    storage = [request for request in hub.requests if request.path.startswith("/objects/")]
    assert [request.method for request in storage] == ["PUT", "GET"][: 1 + redirect]
    assert {request.authorization for request in storage} == {None}
    assert {r.authorization for r in hub.requests if r not in storage and "validate" not in r.path} == {
        "Bearer hf_any"
    }


def test_several_operations_are_one_commit(hub, api, folder):
    """Added, replaced, deleted, a folder deleted; the folder on disk stays as it was, and the first commit too."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = state(hub)[1]["main"]
    operations = [
        *add(new_txt=b"new", README_md=b"# Other\n"),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("sub/"),
    ]
    done = write(api, operations, message="title", commit_description="why\nand how")
    assert hub.repository("org/name").files() == {"new.txt": b"new", "README.md": b"# Other\n"}
    assert hub.repository("org/name").files(COMMIT) == first
    commit = hub.repository("org/name").commits()[0]
    assert (commit.id, commit.title, commit.description, commit.parent) == (done.oid, "title", "why\nand how", COMMIT)
    assert [commit.title for commit in api.list_repo_commits("org/name")] == ["title", "initial commit"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "late.txt").write_text("too late")
    assert "late.txt" not in hub.repository("org/name").files(COMMIT)


def test_what_is_unchanged_is_not_sent_again(hub, api):
    """The client learns what is there, text or not, and leaves it out; a known object goes nowhere."""
    same = add(model_safetensors=TENSORS, README_md=hub.repository("org/name").files()["README.md"])
    write(api, [*same, *add(copy_safetensors=TENSORS)])
    assert [operation._remote_oid == operation._local_oid for operation in same] == [True, True]
    assert not [request for request in hub.requests if request.method == "PUT"]
    assert hub.repository("org/name").files()["copy.safetensors"] == TENSORS


def test_the_same_history_has_the_same_ids(folder):
    """And another one has others."""

    def ids(content):
        with LoopbackHub({"org/name": folder}) as hub:
            hub.repository("org/name").commit({"a.txt": content, "b.bin": TENSORS})
            hub.repository("org/name").commit({"a.txt": None}, title="a title")
            return [commit.id for commit in hub.repository("org/name").commits()]

    assert ids(b"1") == ids(b"1") != ids(b"2")
    assert all(len(id) == 40 and set(id) <= set("0123456789abcdef") for id in ids(b"1"))


def test_a_pull_request_leaves_main_alone(hub, api, tmp_path):
    """It can be read, listed and committed to under refs/pr/N."""
    first = write(api, add(a_txt=b"1"), create_pr=True)
    second = write(api, add(b_txt=b"2"), create_pr=True)
    assert (first.pr_num, second.pr_revision) == (1, "refs/pr/2")
    assert first.pr_url == f"{hub.endpoint}/org/name/discussions/1"
    write(api, add(a_txt=b"3"), revision="refs/pr/1")
    assert "a.txt" not in hub.repository("org/name").files()
    assert hub.repository("org/name").files("refs/pr/1")["a.txt"] == b"3"
    wish = {"revision": "refs/pr/1", "endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    assert Path(hf_hub_download("org/name", "a.txt", **wish)).read_text() == "3"
    assert "b.txt" in api.list_repo_files("org/name", revision="refs/pr/2")
    refs = api.list_repo_refs("org/name", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]


def test_a_stale_parent_is_refused(hub, api):
    """When somebody else was faster, also in the last moment, nothing of the commit is there."""
    done = write(api, add(a_txt=b"1"), parent_commit=COMMIT)
    hub.meanwhile(lambda: hub.repository("org/name").commit({"other.txt": b"o", "a.txt": None}), "POST .*/commit/")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        write(api, add(a_txt=b"2"), parent_commit=done.oid)
    assert caught.value.response.status_code == 412
    files = hub.repository("org/name").files()
    assert files["other.txt"] == b"o" and "a.txt" not in files
    assert write(api, add(a_txt=b"2"), parent_commit=done.oid, create_pr=True).pr_num == 1
    assert hub.repository("org/name").commits("refs/pr/1")[0].parent == done.oid


@pytest.mark.parametrize(
    ("operations", "wish", "error", "message"),
    [
        ([CommitOperationDelete("none.txt")], {}, EntryNotFoundError, "A file with this name doesn't exist: none.txt"),
        ([CommitOperationDelete("none/")], {}, EntryNotFoundError, "A folder with this name doesn't exist"),
        (add(README_md=b"---\nbase_model: two words\n---\n"), {}, ValueError, '"base_model" with value "two words"'),
        (add(README_md=b"---\ndatasets:\n- a/b\n- a/b/c\n---\n"), {}, ValueError, 'with value "a/b/c" is not valid'),
        (add(README_md=b"---\ndatasets: [a, 'b c']\n---\n"), {}, ValueError, 'with value "b c" is not valid'),
        ([CommitOperationAdd("sub", TEXT)], {}, HfHubHTTPError, "sub/notes.txt cannot both be"),
        (add(a_txt=b"1"), {"revision": "none"}, RevisionNotFoundError, "Invalid rev id: none"),
        (add(a_txt=b"1"), {"revision": COMMIT}, HfHubHTTPError, "is a commit, not a branch"),
        (add(a_txt=b"1"), {"id": "org/none"}, RepositoryNotFoundError, "404 Client Error"),
    ],
)
def test_a_commit_that_cannot_be_changes_nothing(hub, api, operations, wish, error, message):
    """Refused in the Hub's words, though it came with an operation that could be."""
    before = state(hub)
    with pytest.raises(error, match=message):
        write(api, [CommitOperationAdd("good.safetensors", TENSORS), *operations], **wish)
    assert state(hub) == before


@pytest.mark.parametrize("card", ["", "# No front matter", "---\nbase_model: a/b\ndatasets: [c]\n---\n",
                                  "---\nbase_model:\n- a/b # why\n- 'c.d/e-f'\nlicense: mit\ndatasets: []\n---\n"])  # fmt: skip
def test_a_sound_card_is_taken(hub, api, card):
    """With and without front matter."""
    assert write(api, add(README_md=card.encode())).oid != COMMIT


def test_objects_are_checked(hub):
    """Bytes that are not those announced, or that nobody announced, are not kept; a pointer to nothing is refused."""
    git, oid, other = f"{hub.endpoint}/org/name.git/info/lfs/objects", *map(sha256, (TENSORS, b"\0"))

    def post(url, **content):
        return Reply(url, "POST", json.dumps(content), token="hf_any")

    wish = {"oid": other, "size": 1}
    said = json.loads(post(f"{git}/batch", operation="upload", objects=[wish, {"oid": "x", "size": 1}]).content)
    put, verify = (said["objects"][0]["actions"][name]["href"] for name in ("upload", "verify"))
    assert said["objects"][1]["error"] == {"code": 422, "message": "x is no sha256."}
    assert Reply(put, "PUT", b"1").status == 400
    assert Reply(f"{hub.storage}/objects/{oid}", "PUT", TENSORS).status == 403
    assert post(verify, **wish).status == 404
    assert Reply(put, "PUT", iter([b"", b"\0"])).status == 200, "in pieces, as of unknown length"
    assert post(verify, **wish).status == 200
    before = state(hub)
    for unknown in ("0" * 64, oid + "0"):
        lines = [{"key": "header", "value": {"summary": "s"}}]
        lines += [{"key": "lfsFile", "value": {"path": "a", "oid": unknown}}]
        body = "\n".join(map(json.dumps, lines))
        said = Reply(f"{hub.endpoint}/api/models/org/name/commit/main", "POST", body, token="hf_any")
        assert said.status == 400 and b"pointed to a file that does not exist" in said.content
    assert state(hub) == before


@pytest.mark.parametrize("body", [b"", b"not JSON", b'{"key": "file", "value": {}}', b"[]\n",
                                  b'{"key": "header", "value": {"summary": "s"}}\n{"key": "odd", "value": {}}'])  # fmt: skip
def test_a_malformed_commit_is_a_bad_request(hub, body):
    """Not the server's fault, and no commit."""
    before = state(hub)
    said = Reply(f"{hub.endpoint}/api/models/org/name/commit/main", "POST", body, token="hf_any")
    assert said.status == 400 and b"Invalid commit payload" in said.content
    assert state(hub) == before


def test_who_may_not_write_may_open_a_pull_request(hub, api):
    """And who may do nothing is told so; without a token there is no writing at all."""
    before = state(hub)
    hub.repository("org/name").writable = "pull requests"
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: Forbidden: pass `create_pr=1`"):
        write(api, add(a_txt=TEXT))
    with pytest.raises(RepositoryNotFoundError, match="401"):
        write(HfApi(endpoint=hub.endpoint, token=False), add(a_txt=TEXT))
    hub.repository("org/name").writable = "nothing"
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: Authorization error"):
        write(api, add(a_txt=TEXT), create_pr=True)
    assert state(hub) == before
    hub.repository("org/name").writable = "pull requests"
    assert write(api, add(a_txt=TEXT, b_bin=TENSORS), create_pr=True).pr_num == 1


def test_repositories_are_created_in_ones_own_namespaces(hub, api):
    """Once; in others not."""
    api.create_repo("org/second")
    with pytest.raises(HfHubHTTPError, match="(?s)409.*already created this model repo"):
        api.create_repo("org/second")
    assert api.create_repo("org/second", exist_ok=True).repo_id == "org/second"
    with pytest.raises(HfHubHTTPError, match='rights to create a model under the namespace "else"'):
        api.create_repo("else/third")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.endpoint, token=False).create_repo("org/third")
    assert hub.repositories == ["org/name", "org/second"]
    assert api.list_repo_files("org/second") == [".gitattributes"]


def test_private_and_gated_are_told_apart(folder, tmp_path):
    """Hidden, or there but closed; by who asks."""

    caches = (tmp_path / f"cache {i}" for i in itertools.count())

    def fetch(token):
        return hf_hub_download("org/name", "README.md", endpoint=hub.endpoint, token=token, cache_dir=next(caches))

    with LoopbackHub({"org/name": folder}, token="hf_right") as hub:
        assert fetch(False) and fetch("hf_right")
        repository = hub.repository("org/name")
        repository.private = True
        assert fetch("hf_right")
        for token in (False, "hf_wrong"):
            with pytest.raises(RepositoryNotFoundError, match="401"):
                fetch(token)
        repository.readable = False
        with pytest.raises(RepositoryNotFoundError, match="404"):
            fetch("hf_right")
        repository.private, repository.gated = False, True
        for token, status in ((False, "401"), ("hf_right", "403")):
            with pytest.raises(GatedRepoError, match=f"{status}(.|\n)*Access to model org/name is restricted"):
                fetch(token)
        assert HfApi(endpoint=hub.endpoint, token=False).model_info("org/name").gated == "manual"
        with pytest.raises(Exception, match="Invalid user token"):
            HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()


@pytest.mark.parametrize("redirect", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "sub/notes.txt"])
def test_ranges_are_honoured(hub, folder, name, redirect):
    """206 with the place of the part, 416 past the end, the whole for what is no single range; bytes are counted."""
    hub.redirect_lfs = redirect
    content = (folder / name).read_bytes()
    n, url = len(content), f"{hub.endpoint}/org/name/resolve/main/{name}"
    for wish, part in {"0-0": content[:1], "2-5": content[2:6], "5-": content[5:], "-4": content[-4:],
                       f"3-{n + 9}": content[3:], f"-{n + 9}": content}.items():  # fmt: skip
        said = Reply(url, Range=f"bytes={wish}").followed(Range=f"bytes={wish}")
        assert (said.status, said.content) == (206, part)
        start = content.index(part) if wish != "-4" else n - 4
        assert said.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{n}"
        assert (hub.requests[-1].sent, hub.requests[-1].range) == (len(part), f"bytes={wish}")
    for wish in (f"{n}-", f"{n}-{n + 5}", "-0"):
        said = Reply(url, Range=f"bytes={wish}").followed(Range=f"bytes={wish}")
        assert (said.status, said.headers["Content-Range"], said.content) == (416, f"bytes */{n}", b"")
    for wish in ("bytes=0-1,3-4", "bytes=-", "lines=1-2", "bytes=a-b"):
        assert Reply(url, Range=wish).followed(Range=wish).content == content
    hub.ignore_ranges = True
    said = Reply(url, Range="bytes=2-5").followed(Range="bytes=2-5")
    assert (said.status, said.content) == (200, content)


def test_the_redirect_says_what_it_leads_to(hub):
    """Digest, size and commit stand on the redirect itself; the storage takes no token."""
    hub.redirect_lfs = True
    said = Reply(f"{hub.endpoint}/org/name/resolve/main/model.safetensors", "HEAD")
    assert (said.status, said.headers["X-Repo-Commit"]) == (302, COMMIT)
    assert said.headers["X-Linked-ETag"] == f'"{sha256(TENSORS)}"'
    assert said.headers["X-Linked-Size"] == str(len(TENSORS))
    assert said.headers["Location"] == f"{hub.storage}/objects/{sha256(TENSORS)}"
    refused = said.followed(token="hf_any")
    assert refused.status == 400 and b"no token" in refused.content


@pytest.mark.parametrize("redirect", [False, True])
def test_a_cut_download_is_resumed(hub, tmp_path, monkeypatch, redirect):
    """The client asks for the rest; when the Hub then ignores the range, it begins anew. Always cut, it gives up."""
    hub.redirect_lfs = redirect
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what the client keeps

    def fetch(cache):
        return hf_hub_download("org/name", "model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path / cache)

    def fetch_patiently(cache):
        try:
            return fetch(cache)
        except OSError:  # huggingface_hub 0.34 resumes at the next call
            return fetch(cache)

    hub.cut(100_000, "GET .*(model.safetensors|objects)")
    assert Path(fetch_patiently("1")).read_bytes() == TENSORS
    assert [(r.status, r.sent) for r in hub.requests if r.sent > 1000] == [(200, 100_000), (206, 156_000)]
    hub.ignore_ranges = True
    hub.cut(100_000, "GET .*(model.safetensors|objects)")
    try:
        assert Path(fetch_patiently("2")).read_bytes() == TENSORS
    except OSError as error:  # 0.34 notices too late
        assert "Consistency check failed" in str(error)
    assert hub.requests[-1].sent == len(TENSORS)
    hub.cut(0, "GET .*(model.safetensors|objects)", times=None)
    with pytest.raises(Exception, match=CUT):
        fetch("3")


def test_a_cut_answer_to_a_commit_leaves_the_commit(hub, api):
    """As when the network fails after the Hub has done its work."""
    hub.cut(0, "POST .*/commit/")
    with pytest.raises(Exception, match=CUT):
        write(api, add(a_txt=TEXT))
    assert hub.repository("org/name").files()["a.txt"] == TEXT


def test_trouble_passes(hub, api, tmp_path):
    """A wished-for status as often as wished for, on the requests wished for."""
    hub.fail(503, "GET .*/resolve/", times=2)
    url = f"{hub.endpoint}/org/name/resolve/main/README.md"
    assert [Reply(url).status for _ in range(3)] == [503, 503, 200]
    hub.fail(503, "PUT", times=2, headers={"Retry-After": "0"})
    write(api, add(a_bin=b"\0other"))
    assert [r.status for r in hub.requests if r.method == "PUT"] == [503, 503, 200]
    before = state(hub)
    hub.fail(500, "POST .*/commit/")
    with pytest.raises(HfHubHTTPError, match="500"):
        write(api, add(a_txt=b"other"))
    assert state(hub) == before
    hub.fail(503, times=None)
    with pytest.raises(HfHubHTTPError, match="503"):
        api.model_info("org/name")


def test_what_it_does_not_speak_is_404(hub):
    """An unknown page, another kind of repository, Xet's tokens."""
    for path in ("", "api/none", "org/name/resolve/main/../../README.md", "datasets/org/name/resolve/main/README.md"):
        assert Reply(f"{hub.endpoint}/{path}", token="hf_any").status == 404, path
    assert Reply(f"{hub.endpoint}/api/models/org/name/xet-write-token/main", token="hf_any").status == 404
    assert Reply(f"{hub.endpoint}/api/models/org/name", "DELETE", token="hf_any").status == 404


def test_ignored_files_are_left_out(hub, api):
    """By the repository's own .gitignore, through preupload."""
    hub.repository("org/name").commit({".gitignore": b"# mine\n*.log\n/build/\n!keep.log\n"})
    names = ["a.log", "keep.log", "build/x.txt", "sub/b.log", "c.txt"]
    write(api, [CommitOperationAdd(name, TEXT) for name in names])
    assert {*hub.repository("org/name").files()} & {*names} == {"keep.log", "c.txt"}


def test_commits_at_the_same_time_are_all_there(hub, api):
    """None overwrites another."""
    threads = [threading.Thread(target=write, args=(api, [CommitOperationAdd(f"{i}.txt", TEXT)])) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"{i}.txt" for i in range(8)} <= hub.repository("org/name").files().keys()
    assert len(hub.repository("org/name").commits()) == 9


def test_nothing_outlives_the_with(folder):
    """Neither thread nor port, though a client says nothing and another does not listen."""
    before = set(threading.enumerate())
    (folder / "large.bin").write_bytes(bytes(20_000_000))
    begin = time.monotonic()
    with LoopbackHub({"org/name": folder}) as hub:
        address = ("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))
        silent, deaf = socket.create_connection(address), socket.create_connection(address)
        deaf.sendall(b"GET /org/name/resolve/main/large.bin HTTP/1.1\r\n\r\n")
        assert deaf.recv(10)
    assert time.monotonic() - begin < 10 and set(threading.enumerate()) == before
    silent.close()
    deaf.close()
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=1)


def test_cards_are_loaded_and_pushed(folder):
    """By ModelCard, whose endpoint is HF_ENDPOINT, read at import; without torch on the Hub's side."""
    script = (
        "import huggingface_hub\n"
        "from huggingface_hub import ModelCard\n"
        "if huggingface_hub.__version__.startswith('0.'):  # there it asks huggingface.co, whatever the endpoint\n"
        "    ModelCard.validate = lambda *_, **__: None\n"
        "card = ModelCard.load('org/name', token='hf_any')\n"
        "card.data.base_model = 'org/base'\n"
        "card.text += 'More.'\n"
        "card.push_to_hub('org/name', token='hf_any', commit_message='a card')\n"
        "card.data.base_model = 'not an id'\n"
        "try:\n"
        "    card.push_to_hub('org/name', token='hf_any')\n"
        "except ValueError as error:\n"
        "    assert 'base_model' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('taken')\n"
    )
    with LoopbackHub({"org/name": folder}) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(folder.parent / "home")}
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        assert b"base_model: org/base" in hub.repository("org/name").files()["README.md"]
        assert hub.repository("org/name").commits()[0].title == "a card"


def test_what_cannot_be_served_is_refused(folder):
    """A folder that is not there, an id that is none."""
    with pytest.raises(BlueprintError, match="none.* is no folder, to be served as org/name. Make it first"):
        LoopbackHub({"org/name": folder / "none"})
    with pytest.raises(BlueprintError, match="'a/b/c' is no repository id. Give one such as 'org/name'"):
        LoopbackHub({"a/b/c": folder})


def test_the_hub_needs_the_standard_library_alone():
    """So that it starts at once, wherever it is imported."""
    for module in ("loopback", "loopback_api", "loopback_state"):
        tree = ast.parse((Path(peft_blueprint.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= sys.stdlib_module_names
            elif isinstance(node, ast.ImportFrom):
                ours = node.level == 1 and node.module in ("errors", "loopback_api", "loopback_state")
                assert ours or node.module.partition(".")[0] in sys.stdlib_module_names


def test_the_short_form_yields_the_endpoint(folder, tmp_path):
    """A folder read live, at the commit named, from either module."""
    from peft_blueprint import loopback, testing

    assert testing.loopback_hub is loopback.loopback_hub and testing.COMMIT is COMMIT
    with loopback_hub({"org/name": folder}, user="me") as endpoint:
        for text in ("one", "two"):
            (folder / "README.md").write_text(text)
            path = hf_hub_download("org/name", "README.md", endpoint=endpoint, cache_dir=tmp_path / text)
            assert Path(path).read_text() == text and COMMIT in path
        assert HfApi(endpoint=endpoint, token="hf_any").whoami()["name"] == "me"
