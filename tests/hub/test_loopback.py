"""The Hub on loopback, as the real client reads it. Run: pytest tests/test_loopback.py"""

import itertools
import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
)

from peft_blueprint import BlueprintError
from tests.hub.loopback import COMMIT, LoopbackHub, loopback_hub
from tests.hub_client import CUT, TENSORS, TEXT, Reply, sha256


pytestmark = pytest.mark.usefixtures("plain_client")


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


def test_private_and_gated_repositories_have_different_errors(folder, tmp_path):
    """Hidden, or visible but closed, depending on the user."""

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
    """206 with the range, 416 past the end, the whole file for several ranges; bytes are counted."""
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


def test_the_redirect_describes_its_target(hub):
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


def test_unknown_addresses_are_404(hub):
    """An unknown page, another kind of repository, Xet's tokens."""
    for path in ("", "api/none", "org/name/resolve/main/../../README.md", "datasets/org/name/resolve/main/README.md"):
        assert Reply(f"{hub.endpoint}/{path}", token="hf_any").status == 404, path
    assert Reply(f"{hub.endpoint}/api/models/org/name/xet-write-token/main", token="hf_any").status == 404
    assert Reply(f"{hub.endpoint}/api/models/org/name", "DELETE", token="hf_any").status == 404


def test_thread_and_port_end_with_the_block(folder):
    """Also while one client sends nothing and another does not read."""
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


def test_invalid_repositories_are_refused(folder):
    """A folder that is not there, an id that is none."""
    with pytest.raises(BlueprintError, match="none.* is no folder, to be served as org/name. Make it first"):
        LoopbackHub({"org/name": folder / "none"})
    with pytest.raises(BlueprintError, match="'a/b/c' is no repository id. Give one such as 'org/name'"):
        LoopbackHub({"a/b/c": folder})


def test_the_short_form_yields_the_endpoint(folder, tmp_path):
    """A folder is read live, at the commit named."""
    with loopback_hub({"org/name": folder}, user="me") as endpoint:
        for text in ("one", "two"):
            (folder / "README.md").write_text(text)
            path = hf_hub_download("org/name", "README.md", endpoint=endpoint, cache_dir=tmp_path / text)
            assert Path(path).read_text() == text and COMMIT in path
        assert HfApi(endpoint=endpoint, token="hf_any").whoami()["name"] == "me"
