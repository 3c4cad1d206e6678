"""A stand-in for the hub on the loopback interface: as much of its HTTP as stock clients ask for, and its faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITES, READS = "hf_standInThatMayWrite", "hf_standInThatMayRead"
_LARGE = (".safetensors", ".parquet", ".bin")
_ROUTE = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit|branch)/([^/]+))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repository:
    """Files by path of each commit, and the commit of each branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Put files in; the new commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        content = {**before, **files}
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        for path, data in sorted(content.items()):
            digest.update(path.encode() + data)
        self.commits[digest.hexdigest()] = content
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()


@dataclass
class Fault:
    """What requests get in place of an answer, so many times.

    Args:
        method: of the requests.
        path: a regular expression found in their path.
        status: what is answered; None: the connection ends in the middle of the body.
        times: how often; None: always.
        headers: of the answer.
    """

    method: str
    path: str
    status: int | None
    times: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """Repositories, large files by SHA-256, faults to come, and every request that was made."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.uploaded: list[str] = []
        self.url = ""
        self.elsewhere = ""
        """The same by another name, since large files lie on another host."""

    def add(self, name: str, files: Mapping[str, bytes], kind: str = "models", **about: bool) -> str:
        """A repository with these files, or a further commit of one; the commit."""
        return self.repositories.setdefault((kind, name), Repository(**about)).commit(files)

    def forget(self) -> None:
        """Be as new, at the same place."""
        for each in (self.repositories, self.large, self.faults, self.requests, self.uploaded):
            each.clear()

    def asked(self, method: str, path: str) -> list[str]:
        """The paths of requests that were made."""
        return [each for done, each, _ in self.requests if done == method and re.search(path, each)]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def git_oid(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are kept."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        asked = urlsplit(self.path)
        self.path, self.query = unquote(asked.path), parse_qs(asked.query)
        self.body = self._body()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for fault in self.hub.faults:
            if fault.method == self.command and re.search(fault.path, self.path) and fault.times != 0:
                fault.times = None if fault.times is None else fault.times - 1
                self._fail(fault)
                return
        self._route()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _fail(self, fault: Fault) -> None:
        self.hub.requests.append((self.command, self.path, fault.status or 0))
        if fault.status is not None:
            self._send(fault.status, b'{"error": "stand-in"}', fault.headers, log=False)
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"the beginning")
        self.wfile.flush()
        self.close_connection = True

    def _route(self) -> None:
        if self.token not in ("", READS, WRITES):
            self._refuse(401, "")
        elif self.path.startswith("/large/"):
            self._large(self.path.removeprefix("/large/"))
        elif self.path == "/api/validate-yaml":
            self._json({"warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif found := _LFS.fullmatch(self.path):
            self._batch(found[1])
        elif found := _FILE.fullmatch(self.path):
            self._file("datasets" if found[1] else "models", found[2], found[3], found[4])
        elif found := _ROUTE.match(self.path):
            self._api(*found.groups(), rest=self.path[found.end() :].strip("/"))
        else:
            self._refuse(404, "")

    # what there is

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and self.token not in (READS, WRITES)):
            self._refuse(404 if self.token else 401, "RepoNotFound")
            return None
        if repository.gated and self.token != WRITES:
            self._refuse(403, "GatedRepo")
            return None
        return repository

    def _api(self, kind: str, name: str, action: str | None, revision: str | None, rest: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if action in ("preupload", "commit", "branch"):
            self._write(name, action, revision or "main")
            return
        commit = repository.branches.get(revision or "main", revision or "")
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if action == "tree":
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            self._json(_tree(files, rest, recursive=recursive))
        elif action == "paths-info":
            form = parse_qs(self.body.decode())
            wanted = form.get("paths") or json.loads(self.body or b"{}").get("paths", [])
            self._json([_entry(path, files[path]) for path in wanted if path in files])
        else:
            siblings = [{"rfilename": path} for path in files]
            told = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            self._json(told | {"gated": False, "disabled": False, "downloads": 0, "likes": 0})

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if path not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not path.endswith(_LARGE):
            self._send(200, data, headers | {"ETag": f'"{git_oid(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        headers |= {
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{oid}"',
            "Location": f"{self.hub.elsewhere}/large/{oid}",
        }
        self._send(302, b"", headers)

    def _large(self, oid: str) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.large[oid] = self.body
            self.hub.uploaded.append(oid)
            self._send(200, b"")
            return
        data = self.hub.large[oid]
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if ranged is None:
            self._send(200, data, {"ETag": f'"{oid}"'})
            return
        start, end = int(ranged[1]), int(ranged[2] or len(data) - 1) + 1
        self._send(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    # what is written

    def _may_write(self) -> bool:
        if self.token != WRITES:
            self._refuse(403 if self.token else 401, "")
        return self.token == WRITES

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._may_write():
            return
        name = f"{asked['organization']}/{asked['name']}"
        if ("models", name) in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repositories["models", name] = Repository(private=private)
        self.hub.add(name, {".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _write(self, name: str, action: str, branch: str) -> None:
        if not self._may_write():
            return
        repository = self.hub.repositories["models", name]
        files = repository.commits[repository.branches.get(branch, repository.branches["main"])]
        if action == "branch":
            repository.branches.setdefault(branch, repository.branches["main"])
            self._json({})
        elif action == "preupload":
            asked = json.loads(self.body)["files"]
            self._json({"files": [_mode(each["path"], files) for each in asked]})
        else:
            commit = self._commit(repository, branch)
            self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _commit(self, repository: Repository, branch: str) -> str:
        content = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content[value["path"]] = self.hub.large[value["oid"]]
        return repository.commit(content, branch)

    def _batch(self, name: str) -> None:
        if not self._may_write():
            return
        answers = []
        for each in json.loads(self.body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.elsewhere}/large/{each['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    # answers

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Code": code, "X-Error-Message": "stand-in"} if code else {}
        self._send(status, b'{"error": "stand-in"}', {**told, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None, *, log: bool = True) -> None:
        if log:
            self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    large = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)} | (
        large if path.endswith(_LARGE) else {}
    )


def _tree(files: Mapping[str, bytes], inside: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders of a folder, or of all below it."""
    start = f"{inside}/" if inside else ""
    below = [path for path in files if path.startswith(start)]
    folders = {
        path[: place.start()] for path in below for place in re.finditer("/", path) if place.start() >= len(start)
    }
    found = [_entry(path, files[path]) for path in below if recursive or "/" not in path[len(start) :]]
    found += [{"type": "directory", "path": each, "oid": "0" * 40, "size": 0}
              for each in sorted(folders) if recursive or "/" not in each[len(start) :]]  # fmt: skip
    return found


def _mode(path: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    is_large = path.endswith(_LARGE)
    data = files.get(path)
    oid = None if data is None else hashlib.sha256(data).hexdigest() if is_large else git_oid(data)
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}
