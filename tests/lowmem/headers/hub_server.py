"""A server that speaks the hub's routes for one repository, and counts what it sends."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves a folder as the repository `owner/model`."""

    def __init__(self, folder: Path, *, serves_ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.serves_ranges = folder, serves_ranges
        self.sent_bytes: Counter[str] = Counter()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = sorted(self.server.folder.iterdir())
            listed = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files]
            self._send(200, json.dumps(listed).encode(), with_body=with_body)
            return
        is_known = parts[:3] == ["owner", "model", "resolve"] and parts[3] in ("main", COMMIT)
        file = self.server.folder / parts[-1]
        if not is_known or not file.is_file():
            code = "EntryNotFound" if parts[:2] == ["owner", "model"] else "RepoNotFound"
            self._send(404, b"", with_body=with_body, **{"X-Error-Code": code})
            return
        size = file.stat().st_size
        wanted = self.headers.get("Range")
        if wanted is None or not self.server.serves_ranges:
            body = file.read_bytes() if with_body and file.suffix != ".safetensors" else b""
            self._send(200, body, with_body=with_body, length=size, name=file.name)
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        with file.open("rb") as source:
            source.seek(first)
            body = source.read(last - first + 1)
        self._send(206, body, with_body=with_body, name=file.name, **{"Content-Range": f"bytes {first}-{last}/{size}"})

    def _send(
        self, status: int, body: bytes, *, with_body: bool, name: str = "", length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{name or "none"}-1"'}
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if with_body:
            self.server.sent_bytes[name] += len(body)
            self.wfile.write(body)


@contextmanager
def serving(folder: Path, *, serves_ranges: bool = True) -> Iterator[HubServer]:
    """Serve a folder for a while."""
    server = HubServer(folder, serves_ranges=serves_ranges)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
