"""A small Hub on this machine: the part of its HTTP interface that downloads use, and (fake_hub_writes.py) uploads.

Repositories are dictionaries of files, one a commit. Large files are redirected to another host name, as the real one
redirects to its storage. Faults are switched on by a test, for the requests whose path holds a word."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub_writes import Writes

LARGE = (".safetensors", ".bin", ".parquet")  # files that the real Hub keeps in its storage
LARGE_BYTES = 10_000_000  # of any other
INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?$")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(tree|paths-info)/([^/]+)(?:/(.+))?$")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Fault:
    word: str  # in the requests it strikes, as in: GET /api/models/acme/tiny
    status: int = 0  # answered instead; -1: nothing is, and the connection is cut
    cut_at: int = -1  # or: bytes of the body that are sent before the connection is cut
    times: int = 10**6
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    lost: bool = False  # or: it is done, and the connection is cut instead of an answer
    hold: threading.Event | None = None  # what is waited for before that


@dataclass
class Request:
    method: str
    path: str
    host: str
    range: str
    authorization: str


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # "models/org/name" -> commit -> files
    heads: dict[str, str] = field(default_factory=dict)  # what `main` stands for
    tags: dict[str, str] = field(default_factory=dict)  # revision -> commit
    answers: dict[str, dict] = field(default_factory=dict)  # repository -> what a hostile Hub says instead
    gated: dict[str, str] = field(default_factory=dict)  # repository -> the token that it asks for
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    users: dict[str, str] = field(default_factory=dict)  # token -> whose it is
    orgs: list[str] = field(default_factory=list)  # that they all belong to
    role: str = "write"  # of the tokens
    private: set[str] = field(default_factory=set)
    created: list[str] = field(default_factory=list)  # repositories
    committed: list[tuple[str, list[str]]] = field(default_factory=list)  # repository, the files that were sent
    spoils: str = ""  # a file that a commit keeps with other bytes than were sent
    objects: dict[str, bytes] = field(default_factory=dict)  # in the storage, by sha256
    stored_bytes: int = 0
    collections: dict[str, dict] = field(default_factory=dict)
    next_collection: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files_now(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][self.heads[repo]]

    @staticmethod
    def is_large(path: str, size: int) -> bool:
        return path.endswith(LARGE) or size > LARGE_BYTES

    @property
    def writes(self) -> list[Request]:
        return [one for one in self.log if one.method not in ("GET", "HEAD")]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Move `main` to a new commit with just these files."""
        sha = hashlib.sha1(repr(sorted((k, hashlib.sha256(v).digest()) for k, v in files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[sha] = dict(files)
        self.heads[repo] = sha
        return sha

    def files_sent(self) -> list[str]:
        """Paths of the requests for a file's content, without the answers that only point to the storage."""
        asked = [r.path for r in self.log if r.method == "GET" and not r.path.startswith("/api/")]
        return [path for path in asked if path.startswith("/stored/") or not path.endswith(LARGE)]

    def strike(self, asked: str) -> Fault | None:
        for fault in self.faults:
            if fault.word in asked and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def entry(path: str, data: bytes) -> dict:
    """A file as the tree lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if Hub.is_large(path, len(data)):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found


def listing(files: dict[str, bytes]) -> dict[str, dict]:
    """Files and the folders they are in."""
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    found = {path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders}
    return found | {path: entry(path, data) for path, data in files.items()}


def sibling(path: str, data: bytes) -> dict:
    """The same file as the repository's description lists it."""
    found = entry(path, data)
    lfs = {"lfs": {"sha256": found["lfs"]["oid"], **found["lfs"]}} if "lfs" in found else {}
    return {"rfilename": path, "blobId": found["oid"], "size": len(data), **lfs}


class Handler(Writes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms behind its headers
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(self.received())

    def do_PUT(self) -> None:
        self.answer(self.received())

    def do_DELETE(self) -> None:
        self.answer()

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        get = self.headers.get
        self.hub.log.append(Request(self.command, path, get("Host", ""), get("Range", ""), get("Authorization", "")))
        fault = self.hub.strike(f"{self.command} {path}")
        self.lost = fault if fault and fault.lost else None
        if fault and fault.hold and not fault.lost:
            fault.hold.wait()
        if fault and fault.status < 0:
            self.close_connection = True
        elif fault and fault.status:
            gated = fault.status == 403 and not fault.text
            self.error(fault.status, "GatedRepo" if gated else "", fault.headers, fault.text)
        elif self.write(path, body):
            pass
        elif path.startswith("/stored/"):
            self.send(self.stored(path.rpartition("/")[2]), cut_at=fault.cut_at if fault else -1)
        elif found := INFO.match(path):
            self.info(*found.groups())
        elif found := TREE.match(path):
            self.tree(*found.groups(), body.decode())
        elif found := FILE.match(path):
            self.file(*found.groups(), cut_at=fault.cut_at if fault else -1)
        else:
            self.error(404)

    def files(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after the answer that the real Hub gives."""
        hub = self.hub
        token = self.headers.get("Authorization", "")[7:]
        if repo not in hub.repos or (repo in hub.private and token not in hub.users):
            self.error(401, "RepoNotFound")
        elif hub.gated.get(repo) and self.headers.get("Authorization") != f"Bearer {hub.gated[repo]}":
            self.error(401, "GatedRepo")
        else:
            sha = hub.heads[repo] if revision in (None, "main") else hub.tags.get(revision, revision)
            if sha in hub.repos[repo]:
                return sha, hub.repos[repo][sha]
            self.error(404, "RevisionNotFound")
        return None

    def info(self, kind: str, name: str, revision: str | None) -> None:
        if found := self.files(f"{kind}/{name}", revision):
            sha, files = found
            siblings = [sibling(p, d) for p, d in files.items()]
            about = {
                "id": name,
                "sha": sha,
                "private": f"{kind}/{name}" in self.hub.private,
                "gated": False,
                "disabled": False,
                "tags": [],
            }
            about |= {"downloads": 0, "likes": 0, "siblings": siblings}
            self.json(about | self.hub.answers.get(f"{kind}/{name}", {}))

    def tree(self, kind: str, name: str, what: str, revision: str, folder: str | None, body: str) -> None:
        found = self.files(f"{kind}/{name}", revision)
        if not found:
            return
        everything = listing(found[1])
        if what == "paths-info":
            self.json([everything[path] for path in parse_qs(body).get("paths", []) if path in everything])
            return
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{folder}/" if folder else ""
        below = {p: e for p, e in everything.items() if p.startswith(prefix)}
        if below:
            self.json([e for p, e in below.items() if deep or "/" not in p.removeprefix(prefix)])
        else:
            self.error(404, "EntryNotFound")

    def file(self, dataset: str | None, name: str, revision: str, path: str, cut_at: int) -> None:
        found = self.files(f"{'datasets' if dataset else 'models'}/{name}", revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            self.error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        elif path.endswith(LARGE):
            oid = hashlib.sha256(files[path]).hexdigest()
            where = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/stored/{oid}"
            linked = {"Location": where, "X-Linked-Size": str(len(files[path])), "X-Linked-Etag": f'"{oid}"'}
            self.send(b"", 302, {"X-Repo-Commit": sha, **linked})
        else:
            tag = {"ETag": f'"{entry(path, files[path])["oid"]}"', "X-Repo-Commit": sha}
            self.send(files[path], headers=tag, cut_at=cut_at)

    def stored(self, oid: str) -> bytes:
        every = (data for commits in self.hub.repos.values() for files in commits.values() for data in files.values())
        return next(data for data in every if hashlib.sha256(data).hexdigest() == oid)

    def json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, headers={"Content-Type": "application/json"})

    def error(self, status: int, code: str = "", headers: dict[str, str] | None = None, text: str = "") -> None:
        said = json.dumps({"error": text}).encode() if text else b""
        self.send(said, status, {**({"X-Error-Code": code} if code else {}), **(headers or {})})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, cut_at: int = -1) -> None:
        """The whole, or what Range asks for; with cut_at, less than was announced, and the connection is closed."""
        if self.lost:
            if self.lost.hold:
                self.lost.hold.wait()
            self.close_connection = True
            return
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if status == 200 else None
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status, cut_at = data[first : last + 1], 206, max(-1, cut_at - first) if cut_at >= 0 else -1
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut_at < 0 else data[:cut_at])
        if cut_at >= 0:
            self.close_connection = True


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
