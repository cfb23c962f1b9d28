"""The Hub's protocol as a function from request to answer, on repositories in memory and without sockets."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from .state import (
    REPOSITORY_ID,
    Blob,
    Refusal,
    Repository,
    card_errors,
    description,
    is_ignored,
    is_large,
    listing,
    parse_commit,
)


DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class World:
    """The Hub's repositories and behaviour; see `LoopbackHub`."""

    repositories: dict[str, Repository]
    lock: threading.RLock
    token: str | None = None
    user: str = "somebody"
    organizations: tuple[str, ...] = ()
    ignore_ranges: bool = False
    redirect_lfs: bool = False
    endpoint: str = ""
    storage: str = ""
    objects: dict[str, Blob] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a request says; `path` is not unquoted, `range`, `authorization` and `agent` are headers."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]] = field(default_factory=dict)
    body: bytes = b""
    range: str | None = None
    authorization: str | None = None
    agent: str = ""

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; Refusal if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(400, "The body is no JSON object.")
        return value

    def flag(self, name: str) -> bool:
        """Whether a parameter of the query is on."""
        return self.query.get(name, ["0"])[-1].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    """An answer: a status, headers, and the bytes of a blob from `start` up to `stop` (None: its end)."""

    blob: Blob = Blob(b"", lfs=False)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None


def answer(world: World, asked: Asked) -> Answer:
    """Answer a request to the Hub.

    Raises:
        Refusal: if what was asked for is not there, not allowed or not understood.
    """
    for methods, pattern, route in ROUTES:
        match = pattern.fullmatch(asked.path)
        if match is not None and asked.method in methods.split():
            with world.lock:
                return route(world, asked, {key: unquote(value or "") for key, value in match.groupdict().items()})
    raise Refusal(404, f"Sorry, we can't find the page you are looking for: {asked.method} {asked.path}")


def answer_storage(world: World, asked: Asked) -> Answer:
    """Answer a request to the storage behind the Hub: a GET or PUT of an object by its sha256, without a token.

    Raises:
        Refusal: if it is not there, was not announced, is not what its name says, or a token is shown.
    """
    oid = asked.path.rpartition("/")[2]
    if asked.authorization is not None:
        raise Refusal(400, "Only one auth mechanism allowed: the storage takes signed addresses, no token.")
    with world.lock:
        if asked.method == "PUT":
            if oid not in world.promised:
                raise Refusal(403, f"Nobody announced an upload of {oid}.")
            if hashlib.sha256(asked.body).hexdigest() != oid or len(asked.body) != world.promised[oid]:
                raise Refusal(400, f"These {len(asked.body)} bytes are not the {world.promised[oid]} of sha256 {oid}.")
            world.objects[oid] = Blob(asked.body, lfs=True)
            return Answer()
        if oid not in world.objects or asked.method == "POST":
            raise Refusal(403 if asked.method == "POST" else 404, f"No object {oid}.")
        return _part(world.objects[oid], asked, {"ETag": f'"{oid}"'}, world.ignore_ranges)


def refused(refusal: Refusal) -> Answer:
    """A refusal as the Hub sends it: headers for the client to branch on, and the message twice."""
    headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
    said = _said({"error": refusal.message}, refusal.status)
    return Answer(said.blob, said.status, {**said.headers, **headers})


Fields = Mapping[str, str]


def _resolve(world: World, asked: Asked, at: Fields) -> Answer:
    """A file of a revision, or where its storage is."""
    repository = _seek(world, asked, at["id"], "read")
    commit = repository.resolve(at["revision"])
    blob = repository.tree(commit).get(at["path"])
    if blob is None:
        said = refused(Refusal(404, "Entry not found", "EntryNotFound"))
        return Answer(said.blob, said.status, {**said.headers, "X-Repo-Commit": commit})
    headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit}
    if blob.lfs:
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if world.redirect_lfs:
            world.objects[blob.sha256] = blob
            headers |= {"Location": f"{world.storage}/objects/{blob.sha256}", "Accept-Ranges": "bytes"}
            return Answer(Blob(b"Found. Redirecting to the storage.", lfs=False), 302, headers)
    return _part(blob, asked, headers, world.ignore_ranges)


def _whoami(world: World, asked: Asked, at: Fields) -> Answer:
    if not _knows(world, asked):
        raise Refusal(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in world.organizations]
    role = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
    return _said({"type": "user", "id": "0", "name": world.user, "fullname": world.user, "orgs": organizations,
                  "auth": role})  # fmt: skip


def _create(world: World, asked: Asked, at: Fields) -> Answer:
    wish = asked.json()
    if not _knows(world, asked):
        raise Refusal(401, "Invalid username or password.")
    namespace = wish.get("organization") or world.user
    id = f"{namespace}/{wish.get('name')}"
    if wish.get("type", "model") != "model" or not REPOSITORY_ID.fullmatch(id):
        raise Refusal(400, f"{id} is not a name for a model repository.")
    if namespace not in (world.user, *world.organizations):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    said = {"url": f"{world.endpoint}/{id}", "name": id, "id": id}
    if id in world.repositories:
        return _said({**said, "error": "You already created this model repo"}, 409)
    world.repositories[id] = repository = Repository(id, world.lock)
    repository.private = bool(wish.get("private")) or wish.get("visibility") == "private"
    return _said(said)


def _validate_card(world: World, asked: Asked, at: Fields) -> Answer:
    errors = [{"message": message} for message in card_errors(str(asked.json().get("content", "")))]
    return _said({"errors": errors, "warnings": []}, 400 if errors else 200)


def _info(world: World, asked: Asked, at: Fields) -> Answer:
    repository = _seek(world, asked, at["id"])
    commit = repository.resolve(at.get("revision") or "main")
    siblings: list[dict[str, Any]] = []
    for path, blob in repository.tree(commit).items():
        siblings.append({"rfilename": path})
        if asked.flag("blobs"):
            siblings[-1] |= {"size": blob.size, "blobId": blob.git_id}
            if blob.lfs:
                siblings[-1]["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return _said(
        {
            "_id": "0",
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.id.partition("/")[0],
            "sha": commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }  # fmt: skip
    )


def _tree(world: World, asked: Asked, at: Fields) -> Answer:
    repository = _seek(world, asked, at["id"])
    tree = repository.tree(at["revision"])
    entries = listing(tree, at["path"], asked.flag("recursive"))
    if at["path"] and not entries:
        raise Refusal(404, f"{at['path']} does not exist on {at['revision']}", "EntryNotFound")
    return _said(entries)


def _paths(world: World, asked: Asked, at: Fields) -> Answer:
    tree = _seek(world, asked, at["id"]).tree(at["revision"])
    wish = asked.json()["paths"] if asked.body.startswith(b"{") else parse_qs(asked.body.decode()).get("paths", [])
    found = [description(path, tree[path]) for path in wish if path in tree]
    return _said(found + [entry for entry in listing(tree, recursive=True)
                          if entry["type"] == "directory" and entry["path"] in wish])  # fmt: skip


def _refs(world: World, asked: Asked, at: Fields) -> Answer:
    repository = _seek(world, asked, at["id"])
    refs: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, commit in repository.refs.items():
        of_pr = name.startswith("refs/pr/")
        ref = {"name": name.removeprefix("refs/pr/"), "ref": name if of_pr else f"refs/heads/{name}"}
        refs["pullRequests" if of_pr else "branches"].append({**ref, "targetCommit": commit})
    return _said(refs)


def _commits(world: World, asked: Asked, at: Fields) -> Answer:
    history = _seek(world, asked, at["id"]).commits(at["revision"])
    return _said(
        [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.description,
                "date": DATE,
                "authors": [{"user": world.user}],
            }
            for commit in history
        ]  # fmt: skip
    )


def _preupload(world: World, asked: Asked, at: Fields) -> Answer:
    """Return how each file is to be sent, and whether it is there already."""
    repository = _seek(world, asked, at["id"], "write")
    _require_right(repository, at["revision"], asked.flag("create_pr"))
    tree, wish = repository.tree(at["revision"]), asked.json()
    rules = wish.get("gitIgnore") or (tree[".gitignore"].read().decode() if ".gitignore" in tree else "")
    files = []
    for file in wish["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        files.append({"path": path, "uploadMode": "lfs" if is_large(path, sample, file["size"]) else "regular",
                      "shouldIgnore": is_ignored(path, rules), "oid": tree[path].etag if path in tree else None})  # fmt: skip
    return _said({"files": files, "commitOid": repository.resolve(at["revision"])})


def _batch(world: World, asked: Asked, at: Fields) -> Answer:
    """Where each LFS file is to be sent; nowhere when it is there."""
    repository = _seek(world, asked, at["id"], "write")
    _require_right(repository, "", create_pr=True)
    objects = []
    for wish in asked.json()["objects"]:
        oid, size = wish["oid"], wish["size"]
        objects.append({"oid": oid, "size": size})
        if not re.fullmatch("[0-9a-f]{64}", oid):
            objects[-1]["error"] = {"code": 422, "message": f"{oid} is no sha256."}
        elif oid not in world.objects and repository.find_object(oid) is None:
            world.promised[oid] = size
            verify = f"{world.endpoint}/{repository.id}.git/info/lfs/objects/verify"
            objects[-1]["actions"] = {"upload": {"href": f"{world.storage}/objects/{oid}"}, "verify": {"href": verify}}
    return _said({"transfer": "basic", "objects": objects})


def _verify(world: World, asked: Asked, at: Fields) -> Answer:
    _seek(world, asked, at["id"], "write")
    wish = asked.json()
    blob = world.objects.get(wish["oid"])
    if blob is None or blob.size != wish["size"]:
        raise Refusal(404, f"No object {wish['oid']} of {wish['size']} bytes was uploaded.")
    return _said({})


def _commit(world: World, asked: Asked, at: Fields) -> Answer:
    repository, create_pr = _seek(world, asked, at["id"], "write"), asked.flag("create_pr")
    _require_right(repository, at["revision"], create_pr)
    header, sent = parse_commit(asked.body)
    operations = []
    for kind, value in sent:
        content = value.get("content")
        if kind == "lfsFile":
            blob = world.objects.get(value["oid"]) or repository.find_object(value["oid"])
            if blob is None:
                text = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise Refusal(400, f"{text} Offending file: - {value['path']}")
            content = blob.read()
        operations.append((kind, value["path"], content))
    title, parent = header["summary"], header.get("parentCommit")
    commit = repository.apply(operations, title, header.get("description", ""), at["revision"], parent, create_pr)
    address = "https://huggingface.co" if "hf_hub/0." in asked.agent else world.endpoint  # 0.34 parses no other
    url = f"{address}/{repository.id}/commit/{commit.id}"
    said = {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}
    if create_pr:
        number = max(int(ref.removeprefix("refs/pr/")) for ref in repository.refs if ref.startswith("refs/pr/"))
        said["pullRequestUrl"] = f"{world.endpoint}/{repository.id}/discussions/{number}"
    return _said(said)


_MODEL = r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)"
_REVISION = r"(?P<revision>refs/(?:pr|heads)/[^/]+|[^/]+)"
_GIT = r"/(?P<id>[^/]+(?:/[^/]+)?)\.git/info/lfs/objects"
Route = Callable[[World, Asked, Fields], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = [
    (methods, re.compile(pattern), route)
    for methods, pattern, route in (
        ("GET HEAD", rf"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/{_REVISION}/(?P<path>.+)", _resolve),
        ("GET", r"/api/whoami-v2", _whoami),
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/validate-yaml", _validate_card),
        ("GET", rf"{_MODEL}/tree/{_REVISION}(?:/(?P<path>.+))?", _tree),
        ("POST", rf"{_MODEL}/paths-info/{_REVISION}", _paths),
        ("GET", rf"{_MODEL}/refs", _refs),
        ("GET", rf"{_MODEL}/commits/{_REVISION}", _commits),
        ("POST", rf"{_MODEL}/preupload/{_REVISION}", _preupload),
        ("POST", rf"{_GIT}/batch", _batch),
        ("POST", rf"{_GIT}/verify", _verify),
        ("POST", rf"{_MODEL}/commit/{_REVISION}", _commit),
        ("GET", rf"{_MODEL}/revision/{_REVISION}", _info),
        ("GET", _MODEL, _info),
    )
]


def _said(value: object, status: int = 200) -> Answer:
    return Answer(Blob(json.dumps(value).encode(), lfs=False), status, {"Content-Type": "application/json"})


def _part(blob: Blob, asked: Asked, headers: Mapping[str, str], ignore: bool) -> Answer:
    """A blob, or the range of it that was asked for (RFC 9110, section 14): one, in bytes; others are ignored."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.range or "")
    if match is None or ignore or asked.method == "HEAD" or match[0] == "bytes=-":
        return Answer(blob, headers=headers)
    size = blob.size
    start, stop = max(0, size - int(match[2] or 0)), size
    if match[1]:
        start, stop = int(match[1]), min(size, int(match[2] or size) + 1)
    if start >= stop:
        return Answer(status=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    return Answer(blob, 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, start, stop)


def _seek(world: World, asked: Asked, id: str, act: str = "look") -> Repository:
    """Return the repository for a user who may "look", "read" its files, or "write"; otherwise raise the Hub's refusal."""
    repository = world.repositories.get(id)
    known = _knows(world, asked, "GatedRepo" if repository is not None and repository.gated else "RepoNotFound")
    if repository is None or (repository.private and not (known and repository.readable)):
        if known:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")
    if act == "read" and repository.gated and not (known and repository.readable):
        text = f"Access to model {id} is restricted" + (" and you are not in the authorized list." if known else ".")
        raise Refusal(403 if known else 401, text, "GatedRepo")
    if act == "write" and not known:
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")  # what the client makes of a 401 by https
    return repository


def _knows(world: World, asked: Asked, code: str = "") -> bool:
    """Whether a token was shown; a wrong one is refused."""
    if asked.authorization is None:
        return False
    if world.token is not None and asked.authorization != f"Bearer {world.token}":
        raise Refusal(401, "Invalid username or password.", code)
    return True


def _require_right(repository: Repository, revision: str, create_pr: bool) -> None:
    """Raise Refusal unless the user may commit to that revision, or make a pull request."""
    if repository.writable == "nothing":
        raise Refusal(403, "Authorization error.")
    if repository.writable == "pull requests" and not (create_pr or revision.startswith("refs/pr/")):
        raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
