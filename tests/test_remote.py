"""Servers that send what no server should: bytes over a socket, written here by hand."""

import contextlib
import http.server
import itertools
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ppvision import remote, remote_cache
from ppvision.errors import StorageError
from ppvision.quant import LayeredModelError, describe_layered
from ppvision.quant.store.fetching import FetchError, Remote
from ppvision.remote import NoAnswerError, RequestError, download_file, open_answer, read_pieces
from tests.helpers.alone import run_alone
from tests.helpers.measured import measure_download
from tests.helpers.messages import find_missing, raises_naming

MEGABYTE = b"x" * (1 << 20)
ROOM = 64 << 20  # bytes that an answer may take


@contextlib.contextmanager
def answering(*answers: bytes | Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers each connection with the next of `answers`, then the last again."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        number = 0
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            answer = answers[min(number, len(answers) - 1)]
            number += 1
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)


def answer_of(status: str, *headers: str, body: bytes = b"") -> bytes:
    return (
        "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode() + body
    )


def read_all(url: str) -> bytes:
    with open_answer("GET", url, "shown") as answer:
        return b"".join(read_pieces(answer, "shown"))


def moved(target: str, body: bytes = b"") -> bytes:
    return answer_of("302 Found", f"Location: {target}", body=body)


@pytest.mark.parametrize("target", ["/elsewhere", "elsewhere?a=b", "//{host}/x", "http://{host}/"])
def test_redirects_are_followed_with_and_without_a_host(target):
    good = answer_of("200 OK", "Content-Length: 4", body=b"good")
    with answering(good) as other:
        location = target.format(host=other.removeprefix("http://"))
        with answering(moved(location), good) as url:
            assert read_all(f"{url}/a") == b"good"


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        ("ftp://127.0.0.1/x", "redirect ftp"),
        ("file:///etc/passwd", "redirect file"),
        ("javascript:alert(1)", "redirect javascript"),
        ("http://[::1/x", "redirect address"),
        ("\xff", "more 5|address|reached"),
        ("/again", "5 redirects"),
        ("x" * 60_000 + ":y", "redirect|more 5|connection|answer"),
    ],
)
def test_redirects_that_are_not_followed(target, tokens):
    with answering(moved(target)) as url, pytest.raises(RequestError) as caught:
        read_all(url)
    message = str(caught.value)
    assert any(find_missing(message, *case.split()) == [] for case in tokens.split("|")), message
    assert len(message) < 1000


def endless(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(4096):  # 4 GiB, unless the client hangs up
            connection.sendall(piece)

    return answer


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (moved("/next"), MEGABYTE),
        (moved("/next").replace(b"Connection", b"Content-Length: 999999999\r\nA"), MEGABYTE),
        (b"HTTP/1.1 200 OK\r\n", b"A: " + b"x" * 60_000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nA: ", MEGABYTE),
        (b"HTTP/1.1 ", MEGABYTE),
        (b"", MEGABYTE),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", b"\x1f\x8b" * (1 << 19)),
    ],
    ids=["redirect", "long redirect", "headers", "header", "status", "garbage", "gzip"],
)  # fmt: skip
def test_answers_without_end_take_no_memory_and_end(head, piece):
    with answering(endless(head, piece)) as url:
        error, taken = run_alone(measure_download, url)
    assert error in ("RequestError", "NoAnswerError")
    assert taken < ROOM


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 5000, "1, 2", "²"])
def test_lengths_that_are_none(tmp_path, length):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: " + length.encode("latin-1") + b"\r\n\r\nabcd"
    with answering(answer) as url, contextlib.suppress(RequestError):
        download_file(url, tmp_path / "x", 100)
        assert (tmp_path / "x").read_bytes() == b"abcd"


def test_a_download_has_bounds(tmp_path, monkeypatch):
    target = tmp_path / "x"
    for head in ("Content-Length: 101", "X: y"):
        with (
            answering(answer_of("200 OK", head, body=b"x" * 101)) as url,
            raises_naming(RequestError, "100", "bytes"),
        ):
            download_file(url, target, 100)
    with (
        answering(answer_of("200 OK", "Content-Length: 99", body=b"x" * 50)) as url,
        raises_naming(NoAnswerError, "broke"),
    ):
        download_file(url, target, 100)
    with answering(answer_of("404 " + "x" * 5000)) as url, pytest.raises(RequestError) as caught:
        download_file(url, target, 100)
    assert "404" in str(caught.value)
    assert len(str(caught.value)) < 500
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with (
        answering(answer_of("200 OK", "Content-Length: 4", body=b"good")) as url,
        pytest.raises(StorageError),
    ):
        download_file(url, target, 100)


def test_a_manifest_that_is_packed_or_without_end():
    """Of a layered model: no more than a manifest may have is read."""
    packed = answer_of("200 OK", "Content-Encoding: gzip, gzip", body=b"\x1f\x8b" + bytes(1000))
    with answering(packed) as url, pytest.raises(LayeredModelError, match="gzip"):
        describe_layered(url)
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    with (
        answering(endless(head, b" " * (1 << 20))) as url,
        raises_naming(LayeredModelError, "most", "bytes"),
    ):
        describe_layered(url)


@pytest.mark.parametrize("code", [100, 102, 103])
def test_interim_answers_come_to_an_end(code):
    interim = f"HTTP/1.1 {code} Wait\r\nA: b\r\n\r\n".encode()
    with answering(endless(interim, interim * 1000)) as url, pytest.raises(FetchError) as caught:
        Remote(url).read("x", 100)
    assert "100 Continue" in str(caught.value) if code == 100 else str(code) in str(caught.value)


def test_an_interim_answer_is_skipped():
    good = answer_of("200 OK", "Content-Length: 4", body=b"good")
    with answering(b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + good) as url:
        assert read_all(url) == b"good"


def test_many_small_pieces_cost_no_more_than_a_few_large_ones(monkeypatch):
    pieces = itertools.repeat(b"x" * 40, 100_000)
    monkeypatch.setattr(remote_cache, "read_pieces", lambda answer, shown: pieces)
    with answering(answer_of("200 OK")) as url:
        start = time.process_time()
        assert Remote(url).read("x", 4_000_000) == b"x" * 4_000_000
    assert time.process_time() - start < 2  # one copy per piece takes ten times as long


# -- https -----------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path, monkeypatch):
    """Make an https server that redirects to an address: `secure(location) -> its own`."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate, "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with contextlib.ExitStack() as stack:

        def serve(location: str | None) -> str:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(location))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return f"https://localhost:{server.server_port}"

        yield serve


def _handler(location: str | None) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if location is None else 301)
            if location is not None:
                self.send_header("Location", location)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"good")

    return Handler


def test_https_does_not_lead_to_http(secure, tmp_path):
    good = answer_of("200 OK", "Content-Length: 4", body=b"good")
    asked = []

    def plain(connection: socket.socket) -> None:
        asked.append(1)
        connection.sendall(good)

    with answering(plain) as url:
        for address in (secure(url), secure(secure(url))):  # at once, and by way of https
            with raises_naming(RequestError, "plain", "http"):
                read_all(address)
            with raises_naming(LayeredModelError, "plain", "http"):
                describe_layered(address)
        assert asked == []
    assert read_all(secure(secure(None))) == b"good"


def test_http_may_lead_to_https(secure):
    with answering(moved(secure(None))) as url:
        assert read_all(url) == b"good"


def test_what_comes_back_from_https_by_http_is_refused(secure):
    """http to https to http: the address was safe in between, and is not any more."""
    with (
        answering(moved(secure("http://127.0.0.1:1/"))) as url,
        raises_naming(RequestError, "plain", "http"),
    ):
        read_all(url)


def test_a_server_that_is_silent(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUTS", (0.3, 0.3))
    stop = threading.Event()
    with answering(lambda connection: stop.wait(20)) as url:
        with pytest.raises(NoAnswerError, match="within"):
            read_all(url)
        stop.set()
