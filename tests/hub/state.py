"""Repositories of a Hub as plain data: files, commits, branches and pull requests, in memory.

A refusal carries the Hub's status, code and message.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import RLock
from typing import Any, Literal

from peft_blueprint.errors import BlueprintError


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10 * 1024 * 1024  # bytes, from which the Hub takes no file in the commit itself
SAMPLE = 512  # bytes of a file that tell text from binary
PIECE = 64 * 1024
REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


class Refusal(Exception):
    """A request the Hub does not grant: an HTTP status, the code that clients branch on (or ""), and a sentence."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    """The content of a file: bytes, or a file on disk that is read when it is asked for.

    Args:
        source: the bytes, or where they are.
        lfs: kept beside the repository under its sha256, as binary and large files are.
    """

    source: bytes | Path
    lfs: bool

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""
        if isinstance(self.source, bytes):
            return self._held_sha256
        size = self.size
        if size < LARGE:
            return _sha256_of(self.source)
        return _sha256_of_unchanged(self.source, size, self.source.stat().st_mtime_ns)

    @functools.cached_property
    def _held_sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    @property
    def pointer(self) -> bytes:
        """Return the pointer that git holds in place of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def git_id(self) -> str:
        """Return git's id of the content, or of the pointer of an LFS file."""
        content = self.pointer if self.lfs else self.read()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """Return the file's name in the client's cache: the sha256 of an LFS file, git's id of another."""
        return self.sha256 if self.lfs else self.git_id

    def read(self) -> bytes:
        """All of it."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, at most 64 KiB at a time."""
        if isinstance(self.source, bytes):
            for place in range(start, stop, PIECE):
                yield self.source[place : min(place + PIECE, stop)]
            return
        with self.source.open("rb") as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                start += len(piece)
                yield piece


@dataclass(frozen=True)
class Commit:
    """One step of a repository's history.

    Args:
        id: 40 hex digits; the same history has the same ids.
        title: first line of its message.
        description: the rest of its message.
        parent: id of the commit before it; None for the first.
        operations: (kind, path) in the order sent; a kind is "file", "lfsFile", "deletedFile" or "deletedFolder".
    """

    id: str
    title: str
    description: str = ""
    parent: str | None = None
    operations: tuple[tuple[str, str], ...] = ()


class Repository:
    """A model repository: its history, who may see it, and who may write to it. All attributes may be set at any time.

    Attributes:
        id: such as "org/name".
        private: hidden from all but `user`.
        gated: there for all to see, its files only for those who were granted access.
        readable: whether the user who shows the token has access to it, when it is private or gated.
        writable: what that user may commit: "all", only "pull requests", or "nothing".
        refs: id of the last commit by branch and pull request ("main", "refs/pr/1").
    """

    def __init__(self, id: str, lock: RLock, folder: Path | None = None) -> None:
        if not REPOSITORY_ID.fullmatch(id):
            raise BlueprintError(f"{id!r} is no repository id. Give one such as 'org/name'.")
        if folder is not None and not folder.is_dir():
            raise BlueprintError(f"{folder} is no folder, to be served as {id}. Make it first.")
        self.id = id
        self.private = False
        self.gated = False
        self.readable = True
        self.writable: Literal["all", "pull requests", "nothing"] = "all"
        self.refs: dict[str, str] = {}
        self._lock = lock
        self._folder = folder
        self._commits: dict[str, Commit] = {}
        self._trees: dict[str, dict[str, Blob]] = {}
        if folder is None:
            rule = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
            self._add("main", "initial commit", "", None, (("file", ".gitattributes"),), {".gitattributes": rule})
        else:
            self._commits[COMMIT] = Commit(COMMIT, "initial commit")
            self.refs["main"] = COMMIT

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path, of a branch, a pull request or a commit."""
        return {path: blob.read() for path, blob in self.tree(revision).items()}

    def commits(self, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        with self._lock:
            found = [self._commits[self.resolve(revision)]]
            while (parent := found[-1].parent) is not None:
                found.append(self._commits[parent])
            return found

    def commit(
        self,
        changes: Mapping[str, bytes | None],
        title: str = "a change",
        description: str = "",
        revision: str = "main",
    ) -> Commit:
        """Commit as somebody else, past all permissions: content by path, None for a file to delete."""
        operations = [
            ("deletedFile", path, None)
            if content is None
            else (("lfsFile" if is_large(path, content[:SAMPLE], len(content)) else "file"), path, content)
            for path, content in changes.items()
        ]
        return self.apply(operations, title, description, revision)

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, a pull request or a commit.

        Raises:
            Refusal: if there is none.
        """
        name = revision.removeprefix("refs/heads/")
        if name not in self.refs and revision not in self._commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.refs.get(name, revision)

    def tree(self, revision: str = "main") -> dict[str, Blob]:
        """The files of a revision by path, sorted; read from the folder for as long as nothing was committed to it."""
        with self._lock:
            commit = self.resolve(revision)
            if self._folder is not None and commit == COMMIT:
                return _scan(self._folder)
            return dict(self._trees[commit])

    def find_object(self, sha256: str) -> Blob | None:
        """An LFS file of any commit by its digest."""
        trees = [*self._trees.values(), self.tree(COMMIT) if self._folder is not None else {}]
        return next((blob for tree in trees for blob in tree.values() if blob.lfs and blob.sha256 == sha256), None)

    def apply(
        self,
        operations: Iterable[tuple[str, str, bytes | None]],
        title: str,
        description: str = "",
        revision: str = "main",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> Commit:
        """Commit, all of it or nothing.

        Args:
            operations: (kind, path, content) as in `Commit.operations`; content is None where something is deleted.
            title: first line of the message.
            description: the rest.
            revision: the branch or pull request to move; with `create_pr` the one to begin from.
            parent: commit id that `revision` must be at, when given; with `create_pr` the one to begin from.
            create_pr: leave the branch alone and make a pull request `refs/pr/N`.

        Raises:
            Refusal: if the revision is unknown or a commit's id, the parent is stale, a path cannot be or is not there.
        """
        with self._lock:
            head = self.resolve(revision)
            name = revision.removeprefix("refs/heads/")
            if create_pr:
                head = head if parent is None else self.resolve(parent)
                name = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in self.refs)}"
            elif name not in self.refs:
                raise Refusal(400, f"{revision} is a commit, not a branch. Commit to a branch.")
            elif parent is not None and parent != head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            held = {path: Blob(blob.read(), blob.lfs) for path, blob in self.tree(head).items()}
            tree, done = dict(held), []
            for kind, path, content in operations:
                _change(tree, kind, path, content)
                done.append((kind, path))
            if self._folder is not None:  # from now on the first commit's files are those of this moment
                self._trees[COMMIT], self._folder = held, None
            return self._add(name, title, description, head, tuple(done), tree)

    def _add(
        self,
        ref: str,
        title: str,
        description: str,
        parent: str | None,
        operations: tuple[tuple[str, str], ...],
        tree: Mapping[str, Blob],
    ) -> Commit:
        content = [[path, blob.lfs, blob.sha256] for path, blob in sorted(tree.items())]
        text = json.dumps([self.id, ref, title, description, parent, operations, content])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, description, parent, operations)
        self._commits[commit.id], self._trees[commit.id] = commit, dict(sorted(tree.items()))
        self.refs[ref] = commit.id
        return commit


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether a file is kept by LFS: by its suffix, above 10 MiB, or if it is binary; never if it is empty."""
    if size == 0:
        return False
    if size > LARGE or b"\0" in sample or path.endswith((".safetensors", ".bin", ".gguf", ".pt", ".parquet")):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # the sample may end within a character
    except UnicodeDecodeError:
        return True
    return False


def is_ignored(path: str, rules: str) -> bool:
    """Whether a `.gitignore` with plain patterns, comments and negations leaves a file out."""
    ignored = False
    for rule in filter(None, (line.strip() for line in rules.splitlines() if not line.startswith("#"))):
        pattern = rule.removeprefix("!").rstrip("/").lstrip("/")
        parts = path.split("/")
        above = {"/".join(parts[: i + 1]) for i in range(len(parts))}
        names = above if "/" in rule.rstrip("/") else above | set(parts)
        if any(fnmatch(name, pattern) for name in names):
            ignored = not rule.startswith("!")
    return ignored


def listing(tree: Mapping[str, Blob], folder: str = "", recursive: bool = False) -> list[dict[str, Any]]:
    """Files and folders in a folder ("" for the top) in the Hub's words; with `recursive` also those further down."""
    prefix = f"{folder}/" if folder else ""
    inside = {path[len(prefix) :]: (path, blob) for path, blob in tree.items() if path.startswith(prefix)}
    folders = {
        "/".join(parts[: i + 1]) for parts in (name.split("/") for name in inside) for i in range(len(parts) - 1)
    }
    entries = [
        {"type": "directory", "oid": hashlib.sha1(f"{prefix}{name}".encode()).hexdigest(), "size": 0,
         "path": prefix + name}
        for name in folders if recursive or "/" not in name
    ]  # fmt: skip
    entries += [description(path, blob) for name, (path, blob) in inside.items() if recursive or "/" not in name]
    return sorted(entries, key=lambda entry: str(entry["path"]))


def description(path: str, blob: Blob) -> dict[str, Any]:
    """A file in the Hub's words."""
    entry: dict[str, Any] = {"type": "file", "oid": blob.git_id, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def card_errors(card: str) -> list[str]:
    """Return the Hub's errors about the ids that a model card's front matter names as `base_model` and `datasets`."""
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", card, re.DOTALL | re.MULTILINE)
    errors = []
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        place = re.search(rf"^{key}:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", front[1] if front else "", re.MULTILINE)
        for text in re.split(r"(?:^|\n)[ \t]*-[ \t]|,", place[1].strip().strip("[]")) if place else ():
            value = text.split(" #")[0].strip().strip("\"'")
            if value and not REPOSITORY_ID.fullmatch(value):
                errors.append(
                    f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    return errors


def parse_commit(lines: bytes) -> tuple[dict[str, str], list[tuple[str, dict[str, Any]]]]:
    """The header and the (kind, value) operations of a commit sent as one JSON object a line.

    Raises:
        Refusal: if it is none, or has no header with a summary.
    """
    try:
        items = [(item["key"], item["value"]) for item in map(json.loads, lines.splitlines())]
        (key, header), *operations = items
        for kind, value in operations:
            if kind == "file":
                value["content"] = base64.b64decode(value["content"], validate=True)
            if kind not in ("file", "lfsFile", "deletedFile", "deletedFolder") or not isinstance(value["path"], str):
                raise ValueError(f"unknown key {kind!r}")
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Refusal(400, f"Invalid commit payload: {error}.") from None
    if key != "header" or not header.get("summary"):
        raise Refusal(400, "Invalid commit payload: no header with a summary.")
    return header, operations


def _change(tree: dict[str, Blob], kind: str, path: str, content: bytes | None) -> None:
    """One operation on a tree, in place."""
    if any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise Refusal(400, f"Invalid path: {path!r}.")
    if kind == "deletedFolder":
        gone = [other for other in tree if other.startswith(path.rstrip("/") + "/")]
    elif kind == "deletedFile":
        gone = [path] if path in tree else []
    else:
        assert content is not None
        if kind == "file" and len(content) > LARGE:
            raise Refusal(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}.")
        below = [other for other in tree if other.startswith(f"{path}/") or path.startswith(f"{other}/")]
        if below:
            raise Refusal(400, f"{path} and {below[0]} cannot both be: one would be a folder and a file.")
        tree[path] = Blob(content, lfs=kind == "lfsFile")
        return
    if not gone:
        raise Refusal(404, f"A {kind[7:].lower()} with this name doesn't exist: {path}", "EntryNotFound")
    for other in gone:
        del tree[other]


def _scan(folder: Path) -> dict[str, Blob]:
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            path = file.relative_to(folder).as_posix()
            with file.open("rb") as head:
                sample = head.read(SAMPLE)
            found[path] = Blob(file, is_large(path, sample, file.stat().st_size))
    return found


def _sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@functools.lru_cache(maxsize=256)
def _sha256_of_unchanged(file: Path, size: int, changed: int) -> str:
    return _sha256_of(file)
