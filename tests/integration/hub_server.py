"""A Hugging Face hub of one model on loopback: the URLs, headers and redirects that huggingface_hub's client relies on.

As the hub does: the tree in pages (``/api/models/…/tree/<commit>``), small files from ``/…/resolve/<commit>/…`` itself,
with git's name for an ETag, large ones from another place that it redirects to, with their SHA-256 (``X-Linked-Etag``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PAGE = 3


@dataclass
class Hub:
    """What the server gives, and what it was asked."""

    repository: str
    commit: str
    files: dict[str, bytes]
    token: str = ""
    """What requests have to carry; empty for a public model."""
    served: dict[str, bytes] = field(default_factory=dict)
    """By file, other bytes than the commit has: what a bad mirror gives."""
    before_weights: Callable[[], object] = lambda: None
    """Runs when the first bytes of a large file were sent and the others were not."""
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def elsewhere(self) -> str:
        """The same server by another name: the client follows redirects within one host before it looks at headers."""
        return self.url.replace("127.0.0.1", "localhost")

    @property
    def uri(self) -> str:
        return f"hf://{self.repository}@{self.commit}"

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def etag(self, name: str) -> str:
        data = self.files[name]
        if self.is_large(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    def tree(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = [{"type": "directory", "path": "onnx", "oid": "0" * 40, "size": 0}]
        for name, data in self.files.items():
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": "1" * 40}
            if self.is_large(name):
                entry["lfs"] = {"oid": self.etag(name), "size": len(data), "pointerSize": 134}
            else:
                entry["oid"] = self.etag(name)
            entries.append(entry)
        return entries


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        of = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.of, urlsplit(self.path)
        hub.asked.append((self.command, url.path))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}" and "/cdn/" not in url.path:
            self._answer(401, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif url.path.startswith(f"/api/models/{hub.repository}/tree/"):
            self._tree(url.path.rpartition("/")[2], int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif url.path.startswith(f"/{hub.repository}/resolve/"):
            commit, _, name = url.path.removeprefix(f"/{hub.repository}/resolve/").partition("/")
            self._resolve(commit, name)
        elif url.path.startswith("/cdn/"):
            self._large(url.path.removeprefix("/cdn/"))
        else:
            self._answer(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})

    def _tree(self, commit: str, cursor: int) -> None:
        hub = self.of
        if commit != hub.commit:
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            return
        entries, after = hub.tree(), cursor + PAGE
        link = f'<{hub.url}{urlsplit(self.path).path}?cursor={after}>; rel="next"' if after < len(entries) else ""
        body = json.dumps(entries[cursor:after]).encode()
        self._answer(200, body, {"Content-Type": "application/json", **({"Link": link} if link else {})})

    def _resolve(self, commit: str, name: str) -> None:
        hub = self.of
        if commit != hub.commit or name not in hub.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{hub.etag(name)}"'}
        if hub.is_large(name):
            linked = {"X-Linked-Etag": f'"{hub.etag(name)}"', "X-Linked-Size": str(len(hub.files[name]))}
            self._answer(
                302, b"", {**headers, **linked, "ETag": '"pointer"', "Location": f"{hub.elsewhere}/cdn/{name}"}
            )
        else:
            self._answer(200, hub.served.get(name, hub.files[name]), headers)

    def _large(self, name: str) -> None:
        data = self.of.served.get(name, self.of.files[name])
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:1000])
            self.of.before_weights()
            with contextlib.suppress(ConnectionError):  # whoever asked may be dead by now
                self.wfile.write(data[1000:])

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
