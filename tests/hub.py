"""A stand-in for the Hugging Face Hub: a server on this machine with the few pages that
huggingface_hub asks for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class FakeHub:
    """What the server has, and what it does wrong."""

    url: str = ""
    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    """`some/model` or `datasets/some/data` -> commit -> files."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    """(repository, branch or tag) -> commit."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Name of a file -> how many times other bytes than promised are sent."""
    dying: Counter[str] = field(default_factory=Counter)
    """Name of a file -> how many times the connection ends after half of it."""
    stalling: dict[str, threading.Event] = field(default_factory=dict)
    """Name of a file -> set once half of it is sent, after which nothing more comes."""
    sent: Counter[str] = field(default_factory=Counter)
    """Name of a file -> bytes of it that were sent."""
    asked: list[str] = field(default_factory=list)
    """Every request."""

    def put(self, repository: str, files: Files, branch: str = "main") -> str:
        """A new commit; returns its hash."""
        commit = hashlib.sha1(repr((repository, sorted(files.items()))).encode()).hexdigest()
        self.repositories.setdefault(repository, {})[commit] = files
        self.branches[repository, branch] = commit
        return commit


def is_large(name: str) -> bool:
    """Whether the Hub keeps a file apart from git, under its SHA-256."""
    return name.endswith((".safetensors", ".bin", ".parquet"))


def etag(name: str, content: bytes) -> str:
    """What the Hub calls a file's content: its SHA-256, or git's name for it."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        if path.startswith("api/"):
            self.about(path.removeprefix("api/").removeprefix("models/"))
        elif "/resolve/" in path:
            repository, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repository, revision, name)
        else:
            self.no("RepoNotFound")

    def about(self, path: str) -> None:
        repository, _, rest = path.partition("/tree/" if "/tree/" in path else "/revision/")
        found = self.commit(repository, rest or "main")
        if found is None:
            return
        commit, files = found
        if "/tree/" in path:
            value: Any = [
                {"type": "file", "path": name, "size": len(c), "oid": etag(name, c)}
                | ({"lfs": {"oid": etag(name, c), "size": len(c), "pointerSize": 1}}
                   if is_large(name) else {})
                for name, c in files.items()
            ]  # fmt: skip
        else:
            value = {
                "id": repository.removeprefix("datasets/"),
                "sha": commit,
                "siblings": [
                    {"rfilename": name, "size": len(c), "blobId": etag(name, c)}
                    | ({"lfs": {"sha256": etag(name, c), "size": len(c), "pointerSize": 1}}
                       if is_large(name) else {})
                    for name, c in files.items()
                ],
            }  # fmt: skip
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def commit(self, repository: str, revision: str) -> tuple[str, Files] | None:
        commits = self.hub.repositories.get(repository)
        if commits is None:
            return self.no("RepoNotFound")
        commit = self.hub.branches.get((repository, revision), revision)
        return (commit, commits[commit]) if commit in commits else self.no("RevisionNotFound")

    def file(self, repository: str, revision: str, name: str) -> None:
        found = self.commit(repository, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self.no("EntryNotFound", commit)
            return
        content = files[name]
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag(name, content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.send(name, content[start:])

    def send(self, name: str, content: bytes) -> None:
        hub = self.hub
        if hub.damaged[name] > 0:
            hub.damaged[name] -= 1
            content = bytes(255 - byte for byte in content)
        stops = hub.dying[name] > 0 or name in hub.stalling
        part = content[: len(content) // 2] if stops else content
        hub.sent[name] += len(part)
        self.wfile.write(part)
        self.wfile.flush()
        if name in hub.stalling:
            hub.stalling[name].set()
            self.rfile.read(1)  # until the other side is gone
        elif hub.dying[name] > 0:
            hub.dying[name] -= 1
        self.close_connection = self.close_connection or stops

    def no(self, code: str, commit: str = "") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A server, for as long as the block lasts."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
