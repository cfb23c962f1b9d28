"""The Hub on loopback, as the real client commits to it. Run: pytest tests/test_loopback_commits.py"""

import json
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.loopback import COMMIT, LoopbackHub
from tests.hub_client import CUT, TENSORS, TEXT, UPLOADING, Reply, in_another_process, sha256


pytestmark = UPLOADING


def add(**files):
    return [CommitOperationAdd(name.replace("_", "."), content) for name, content in files.items()]


def write(api, operations, id="org/name", **wish):
    return api.create_commit(id, operations, commit_message=wish.pop("message", "a change"), **wish)


def state(hub, id="org/name"):
    """All that a refused commit must leave alone."""
    repository = hub.repository(id)
    return dict(repository.refs), {ref: repository.files(ref) for ref in repository.refs}


@pytest.mark.parametrize("redirect", [False, True])
def test_pushed_files_are_fetched_unchanged(hub, api, tmp_path, redirect):
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


def test_unchanged_files_are_not_sent_again(hub, api):
    """The client leaves out unchanged files, text or binary; a known object is not uploaded."""
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
    """Only announced bytes are kept; a pointer to a missing file is refused."""
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


def test_without_write_access_a_pull_request_can_be_opened(hub, api):
    """Without write access the answer is 403, without a token 401."""
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


def test_repositories_are_created_in_the_users_namespaces(hub, api):
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
        in_another_process(script, hub.endpoint, folder.parent / "home")
        assert b"base_model: org/base" in hub.repository("org/name").files()["README.md"]
        assert hub.repository("org/name").commits()[0].title == "a card"
