"""A small HTTP server of one folder, that can be told to misbehave."""

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves `folder` under `/models/tiny`, with ranges.

    Attributes:
        requests: method and name of each request, `Range` and `If-Range` where sent.
        breaks: by name, the numbers of bytes after which its next answers break off.
        statuses: by name, the status to answer with.
        redirects: by name, where to send the client.
        ranges: whether to understand `Range`.
        heads: whether to understand `HEAD`.
        etag: "strong", "weak" or None; `dated`: whether to send Last-Modified.
        lengths: whether to send Content-Length; without it the connection's end ends a body.
        extra: bytes behind each body.
        hangs: names to never answer, from then on silent.
        encoding: Content-Encoding to claim.
    """

    daemon_threads = True
    block_on_close = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, ...]] = []
        self.breaks: dict[str, list[int]] = {}
        self.statuses: dict[str, int] = {}
        self.redirects: dict[str, str] = {}
        self.ranges = self.heads = self.dated = self.lengths = True
        self.etag: str | None = "strong"
        self.extra = b""
        self.hangs: set[str] = set()
        self.closing = threading.Event()
        self.encoding: str | None = None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up as they like."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/tiny"

    def loaded(self) -> list[str]:
        """Names asked for by GET since the last call, without the manifest."""
        found = [r[1] for r in self.requests if r[0] == "GET" and r[1] != "manifest.json"]
        self.requests.clear()
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server, name = self.server, self.path.partition("?")[0].removeprefix("/models/tiny/")
        sent = [self.headers[key] for key in ("Range", "If-Range") if self.headers[key]]
        server.requests.append((self.command, name, *sent))
        if name in server.hangs:
            server.closing.wait(20)
            return
        if name in server.redirects:
            self._end(302, {"Location": server.redirects[name]})
            return
        path = server.folder / name
        if name in server.statuses or not path.is_file():
            self._end(server.statuses.get(name, 404), {})
        elif self.command == "HEAD" and not server.heads:
            self._end(405, {})
        else:
            self._send(name, path.read_bytes())

    def _end(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def _validators(self, data: bytes) -> dict[str, str]:
        headers, digest = {}, hashlib.sha256(data).hexdigest()[:8]
        if self.server.etag:
            headers["ETag"] = ("W/" if self.server.etag == "weak" else "") + f'"{digest}"'
        if self.server.dated:
            headers["Last-Modified"] = f"date of {digest}"
        return headers

    def _send(self, name: str, data: bytes) -> None:
        server, status, headers = self.server, 200, self._validators(data)
        start = self._start(headers)
        if start:
            status = 206 if start < len(data) else 416
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        data += server.extra
        if server.lengths:
            headers["Content-Length"] = str(len(data))
        else:
            headers["Connection"] = "close"
        if server.encoding:
            headers["Content-Encoding"] = server.encoding
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = server.breaks.get(name)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[: cuts.pop(0)] if cuts else data)
            if cuts is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
        if cuts is not None or not server.lengths:
            self.close_connection = True

    def _start(self, validators: dict[str, str]) -> int:
        """The first byte to send."""
        wanted, condition = self.headers["Range"], self.headers["If-Range"]
        if not wanted or not self.server.ranges:
            return 0
        if condition and condition not in validators.values():
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[FileServer]:
    """A server in a thread."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        stop(server)
        thread.join()


def stop(server: FileServer) -> None:
    """From here on, connections are refused."""
    server.closing.set()
    server.shutdown()
    server.server_close()
