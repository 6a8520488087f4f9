"""A file server on 127.0.0.1 that breaks in the ways servers break."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Served:
    """What is at one address.

    Attributes:
        faults: what happens to the next requests, one each, in order; then all is well.
            "drop" (half of it, then the connection closes), "500", "429", "404", "slow" (dribbles).
        ranges: whether Range is honoured.
        etag: None: neither ETag nor Last-Modified is sent.
    """

    content: bytes
    faults: list[str] = field(default_factory=list)
    ranges: bool = True
    etag: bool = True
    redirect: str = ""


@dataclass
class Server:
    """The running server: its address, what it serves by path, and what was asked of it."""

    url: str
    files: dict[str, Served]
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def mirror(self, prefix: str) -> list[str]:
        """The arguments that make a script take an address here: /HOST/PATH."""
        return ["--mirror", f"{prefix}={self.url}/{prefix.partition('://')[2]}"]

    def put(self, url: str, content: bytes, **how: object) -> Served:
        """Serve `content` where a mirrored `url` is looked for."""
        served = self.files[f"/{url.partition('://')[2]}"] = Served(content, **how)  # type: ignore[arg-type]
        return served


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        state: Server = self.server.state  # type: ignore[attr-defined]
        path = unquote(self.path)
        state.asked.append((path, self.headers.get("Range")))
        served = state.files.get(path)
        fault = served.faults.pop(0) if served and served.faults else ""
        if served is None or fault in ("404", "429", "500"):
            self.send_response(int(fault or 404))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.end_headers()
        else:
            self._send(served, fault)

    def _send(self, served: Served, fault: str) -> None:
        etag = f'"{hashlib.md5(served.content).hexdigest()}"'
        start, asked = 0, self.headers.get("Range")
        if asked and served.ranges and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(served.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(served.content)}")
            self.end_headers()
            return
        body = served.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
        if served.etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
        elif fault == "slow":
            self._dribble(body)
        else:
            self.wfile.write(body)

    def _dribble(self, body: bytes) -> None:
        step = max(len(body) // 200, 1)
        for at in range(0, len(body), step):
            try:
                self.wfile.write(body[at : at + step])
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = Server(f"http://127.0.0.1:{server.server_port}", {})
    server.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
