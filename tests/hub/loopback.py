"""A Hub on 127.0.0.1 that the real `huggingface_hub` client reads from and commits to, and that fails on request.

Knows no blueprint and nothing outside the standard library; what it holds is in memory and ends with the `with`.
"""

from __future__ import annotations

import dataclasses
import functools
import http.server
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .api import Answer, Asked, World, answer, answer_storage, refused
from .state import COMMIT, Commit, Refusal, Repository


__all__ = ["COMMIT", "Commit", "LoopbackHub", "Repository", "Request", "loopback_hub"]


@dataclass(frozen=True)
class Request:
    """A request that was answered, or is being answered.

    Args:
        method: such as "GET".
        path: as it was sent, with its query.
        status: of the answer.
        received: bytes of its body.
        sent: bytes of the answer's body so far. A client that goes away early may have read less.
        range: the Range header.
        authorization: the Authorization header.
    """

    method: str
    path: str
    status: int
    received: int
    sent: int = 0
    range: str | None = None
    authorization: str | None = None


@contextmanager
def loopback_hub(
    repositories: Mapping[str, Path] = {}, token: str | None = None, gated: bool = False, user: str = "somebody"
) -> Iterator[str]:
    """Serve folders as repositories of a Hub on 127.0.0.1, for as long as the `with` lasts.

    Args:
        repositories: folder by repository id, `org/name`.
        token: when given, requests without it are answered 401, as for private repositories.
        gated: let the answer say that they are there and need permission, instead of what the Hub says of both private
            and missing ones.
        user: whose token it is.

    Yields:
        The endpoint, to be given as `endpoint=` or as `HF_ENDPOINT` (read at import) in a subprocess. Every repository
        has the branch `main`, at the commit `COMMIT`. `LoopbackHub` is the same with more to see and to set.
    """
    with LoopbackHub(repositories, token, user) as hub:
        for id in repositories:
            hub.repository(id).private = token is not None and not gated
            hub.repository(id).gated = token is not None and gated
        yield hub.endpoint


class LoopbackHub:
    """A Hub of model repositories on 127.0.0.1, to be used in a `with`.

    Anybody may read what is not private or gated; committing and creating need a token. Binary and large files go
    through LFS, never through Xet: set `HF_HUB_DISABLE_XET=1` where something is committed.

    Args:
        repositories: folder by repository id. A folder is read anew at every request, until something is committed to
            the repository; nothing is ever written to it.
        token: the only one that is right; None takes any.
        user: whose token it is, and the namespace in which this user may create repositories.
        organizations: further namespaces of that kind.
    """

    def __init__(
        self,
        repositories: Mapping[str, Path] = {},
        token: str | None = None,
        user: str = "somebody",
        organizations: Sequence[str] = ("org",),
    ) -> None:
        lock = threading.RLock()
        held = {id: Repository(id, lock, Path(folder)) for id, folder in repositories.items()}
        self._world = World(held, lock, token, user, tuple(organizations))
        self._troubles: list[_Trouble] = []
        self._log: list[Request] = []
        self._servers: list[tuple[_Server, threading.Thread]] = []

    def __enter__(self) -> LoopbackHub:
        addresses = []
        for serve in (answer, answer_storage):
            server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self, serve))
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            self._servers.append((server, thread))
            thread.start()
            addresses.append(f"http://127.0.0.1:{server.server_port}")
        self._world.endpoint, self._world.storage = addresses
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server, thread in self._servers:
            server.shutdown()
            thread.join()
            server.hang_up()
            server.server_close()  # waits for the threads that answer
        self._servers = []

    @property
    def endpoint(self) -> str:
        """To be given as `endpoint=` or as `HF_ENDPOINT` (read at import) in a subprocess."""
        return self._world.endpoint

    @property
    def storage(self) -> str:
        """The other address, which LFS files are sent to, and come from with `redirect_lfs`; it takes no token."""
        return self._world.storage

    @property
    def redirect_lfs(self) -> bool:
        """Whether requests for LFS files are redirected to `storage`, as the Hub does. False at first."""
        return self._world.redirect_lfs

    @redirect_lfs.setter
    def redirect_lfs(self, value: bool) -> None:
        self._world.redirect_lfs = value

    @property
    def ignore_ranges(self) -> bool:
        """Whether requests for a range are answered 200 with the whole file. False at first."""
        return self._world.ignore_ranges

    @ignore_ranges.setter
    def ignore_ranges(self, value: bool) -> None:
        self._world.ignore_ranges = value

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order in which they were answered."""
        with self._world.lock:
            return list(self._log)

    @property
    def repositories(self) -> list[str]:
        """The ids of those there are."""
        return list(self._world.repositories)

    def repository(self, id: str) -> Repository:
        """Return a repository by its id, to inspect and to set permissions; a new one if it did not exist.

        A new one holds `.gitattributes`, as on the Hub.
        """
        with self._world.lock:
            return self._world.repositories.setdefault(id, Repository(id, self._world.lock))

    def fail(self, status: int, path: str = "", times: int | None = 1, headers: Mapping[str, str] = {}) -> None:
        """Refuse the next requests, before anything is done.

        Args:
            status: such as 429, 500 or 503.
            path: a pattern to be found in "METHOD /path?query", such as "POST .*/commit/"; "" is in all.
            times: how many; None for always.
            headers: of the answer, such as `{"Retry-After": "1"}`.
        """
        self._troubles.append(_Trouble("fail", path, times, status=status, headers=headers))

    def cut(self, after: int, path: str = "", times: int | None = 1) -> None:
        """Cut the connection after that many bytes of the body of the next answers, where these have more.

        What was asked for is done by then: a commit whose answer is cut was made. For `path` and `times` see `fail`.
        """
        self._troubles.append(_Trouble("cut", path, times, after=after))

    def meanwhile(self, action: Callable[[], object], path: str = "", times: int | None = 1) -> None:
        """Do something just before the next requests are looked at, such as a commit by somebody else.

        For `path` and `times` see `fail`.
        """
        self._troubles.append(_Trouble("meanwhile", path, times, action=action))

    def _next_trouble(self, kind: str, line: str, length: int = 1) -> _Trouble | None:
        """The first trouble of a kind that is left for a request with a body of `length` bytes, counted as made."""
        with self._world.lock:
            for trouble in self._troubles:
                fits = trouble.kind == kind and trouble.after < length and re.search(trouble.path, line)
                if fits and trouble.times != 0:
                    trouble.times = None if trouble.times is None else trouble.times - 1
                    return trouble
        return None

    def _answer(self, serve: Callable[[World, Asked], Answer], asked: Asked, line: str) -> Answer:
        """The answer to a request, or the trouble that was wished for."""
        fail, meanwhile = self._next_trouble("fail", line), self._next_trouble("meanwhile", line)
        try:
            if meanwhile is not None:
                meanwhile.action()
            if fail is not None:
                raise Refusal(fail.status, "Trouble, as asked for.")
            return serve(self._world, asked)
        except Refusal as refusal:
            said = refused(refusal)
        except Exception as error:
            said = refused(Refusal(500, f"{type(error).__name__}: {error}"))
        return dataclasses.replace(said, headers={**said.headers, **(fail.headers if fail is not None else {})})


@dataclass
class _Trouble:
    kind: str
    path: str
    times: int | None
    status: int = 0
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    action: Callable[[], object] = lambda: None


class _Server(http.server.ThreadingHTTPServer):
    """A thread for every connection, all of which end with the server."""

    daemon_threads = False

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close connections to clients that do not read, or send nothing."""
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended by itself


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives its answer, so that none outlives the `with`

    def __init__(self, hub: LoopbackHub, serve: Callable[[World, Asked], Answer], *args: Any) -> None:
        self._hub, self._serve = hub, serve
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self._body()
        url, line = urlsplit(self.path), f"{self.command} {self.path}"
        wish, token = self.headers.get("Range"), self.headers.get("Authorization")
        agent = self.headers.get("User-Agent", "")
        asked = Asked(self.command, url.path, parse_qs(url.query), body, wish, token, agent)
        said = self._hub._answer(self._serve, asked, line)
        stop = said.blob.size if said.stop is None else said.stop
        log, lock = self._hub._log, self._hub._world.lock
        with lock:
            place = len(log)
            log.append(Request(self.command, self.path, said.status, len(body), 0, wish, token))
        self.send_response(said.status)
        for key, value in {**said.headers, "Content-Length": str(stop - said.start)}.items():
            self.send_header(key, re.sub(r"[^\x20-\x7e]", "?", value))
        try:
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = self._hub._next_trouble("cut", line, stop - said.start)
            for piece in said.blob.pieces(said.start, stop if cut is None else said.start + cut.after):
                with lock:  # before it is sent: whoever has read it finds it in the log
                    log[place] = dataclasses.replace(log[place], sent=log[place].sent + len(piece))
                self.wfile.write(piece)
        except OSError:
            pass  # the client has gone, or the Hub is closing

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)
