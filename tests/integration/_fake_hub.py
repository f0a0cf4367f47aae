"""A Hugging Face Hub of datasets and models on the loopback, with the few routes that the client libraries call.

repos = {"ann/cats": Repo({"main": {"data/train-00000-of-00001.parquet": b"…"}})}
with serve(repos) as hub:
    subprocess.run(…, env=hub.env(home))
    hub.requests  # what was asked for: ["GET /api/datasets/ann/cats", …]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Files by branch; a branch's commit follows from its files, so that changing them makes a new one."""

    branches: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, branch: str) -> str:
        files = self.branches[branch]
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()

    def resolve(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or commit; None if there is none."""
        for branch, files in self.branches.items():
            if revision in (branch, self.commit(branch)):
                return self.commit(branch), files
        return None


@dataclass
class FakeHub:
    """What a test sees of the server."""

    url: str
    requests: list[str] = field(default_factory=list)

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a child process that takes this for the Hub, with caches of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | more


@contextmanager
def serve(repos: Mapping[str, Repo]) -> Iterator[FakeHub]:
    """Serve `repos` on a free port of the loopback until the block ends."""

    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
        Handler.repos, Handler.seen = repos, hub.requests
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    repos: Mapping[str, Repo] = {}
    seen: list[str] = []  # noqa: RUF012 - each server has a class of its own
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.seen.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(found[1], found[2], found[3] or "", recursive="recursive=true" in self.path.lower())
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            self._paths_info(found[1], found[2], body)
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.repos.get(name)
        if repo is None:
            # As the Hub does: who may not know gets the same answer as for what isn't there.
            self._refuse(401, "RepoNotFound")
            return None
        found = repo.resolve(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound")
        return found

    def _info(self, name: str, revision: str) -> None:
        if (found := self._files(name, revision)) is not None:
            commit, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"id": name, "sha": commit, "private": False, "siblings": siblings, "tags": [], "downloads": 0})

    def _tree(self, name: str, revision: str, under: str, recursive: bool) -> None:
        if (found := self._files(name, revision)) is None:
            return
        _, files = found
        prefix = f"{under}/" if under else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if not inside:
            return self._refuse(404, "EntryNotFound")
        folders = {
            prefix + "/".join(path.removeprefix(prefix).split("/")[:depth])
            for path in inside
            for depth in range(1, path.removeprefix(prefix).count("/") + 1)
            if recursive or depth == 1
        }
        listed = [path for path in inside if recursive or "/" not in path.removeprefix(prefix)]
        self._json([_folder(path) for path in sorted(folders)] + [_entry(path, files[path]) for path in listed])

    def _paths_info(self, name: str, revision: str, body: bytes) -> None:
        if (found := self._files(name, revision)) is None:
            return
        _, files = found
        asked = json.loads(body)["paths"]
        answer = [_entry(path, files[path]) for path in asked if path in files]
        answer += [_folder(path) for path in asked if any(one.startswith(path + "/") for one in files)]
        self._json(answer)

    def _file(self, name: str, revision: str, path: str) -> None:
        if (found := self._files(name, revision)) is None:
            return
        commit, files = found
        if self.repos[name].gated:
            return self._refuse(403, "GatedRepo", commit)
        if path not in files:
            return self._refuse(404, "EntryNotFound", commit)
        data, status, extra = files[path], 200, {}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            extra = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self._send(status, data, {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes", **extra})

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(status, b"{}", headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
