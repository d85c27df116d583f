"""Asking servers: http and https, with bounds on what an answer may cost.

Redirects are followed by hand: `requests` reads the body of each, however long, and goes from
https to http without a word.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ppvision.errors import MissingPackageError, PpvisionError, StorageError, shorten_text

if TYPE_CHECKING:  # only addresses need it: the extra `remote`
    import requests

TIMEOUTS = (10.0, 30.0)  # seconds: to connect, and between two pieces of an answer
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 18


class RequestError(PpvisionError, ValueError):
    """A server that does not give what it should."""


class NoAnswerError(RequestError):
    """A server that does not answer, or whose answer breaks off."""


@contextmanager
def open_answer(
    method: str, url: str, shown: str, headers: dict[str, str] | None = None
) -> "Iterator[requests.Response]":
    """Ask a server; the body is not read yet, and comes as it is stored.

    Args:
        method: GET or HEAD.
        url: http or https.
        shown: the address in messages.
        headers: sent along.

    Yields:
        The answer, whatever its status; no redirect.

    Raises:
        NoAnswerError: no answer.
        RequestError: an address, an answer or a redirect that is not taken: to plain http from
            https, to another scheme, or one of more than 5.
        MissingPackageError: `requests` is not installed.
    """
    with _open_session() as session:
        # A compressed answer has neither the number of bytes that is known of a file, nor ranges
        # of them; and a small one can become any number of bytes.
        session.headers["Accept-Encoding"] = "identity"
        for _ in range(MAX_REDIRECTS + 1):
            with _ask(session, method, url, shown, headers) as answer:
                if answer.status_code not in _REDIRECTS or "Location" not in answer.headers:
                    encoding = answer.headers.get("Content-Encoding", "identity")
                    if encoding != "identity":
                        raise RequestError(
                            f"{shown}: expected the file as it is, got it as "
                            f"{shorten_text(encoding, 80)}. Switch compression off on the server."
                        )
                    yield answer
                    return
                url = _follow(url, answer.headers["Location"], shown)
    raise RequestError(
        f"{shown}: expected a file, got more than {MAX_REDIRECTS} redirects. Pass the address that "
        "they should lead to."
    )


def _open_session() -> "requests.Session":
    try:
        from ppvision.remote_session import BoundedSession
    except ImportError as error:
        raise MissingPackageError(
            "Files at a URL need requests and urllib3, which are not installed: "
            "pip install 'ppvision[remote]', or fetch the file and pass its path."
        ) from error
    return BoundedSession()


def _follow(url: str, location: str, shown: str) -> str:
    """The address of a redirect."""
    try:
        # HTTP's headers are latin-1; addresses in them are UTF-8 where servers do not quote them.
        target = urljoin(url, location.encode("latin-1").decode("utf-8"))
        scheme = urlsplit(target).scheme
    except ValueError as error:
        raise RequestError(f"{shown}: expected an answer, got a redirect to no address.") from error
    if scheme not in ("http", "https"):
        raise RequestError(
            f"{shown}: expected an answer, got a redirect to {shorten_text(scheme, 40)}://. "
            "Download the file yourself and pass its path."
        )
    if urlsplit(url).scheme == "https" and scheme == "http":
        raise RequestError(
            f"{shown}: expected https, got a redirect to plain http. Pass an address that stays "
            "with https."
        )
    return target


def _ask(
    session: "requests.Session", method: str, url: str, shown: str, headers: dict[str, str] | None
) -> "requests.Response":
    """Send a request; the exceptions of `requests` become ours."""
    import requests

    try:
        return session.request(
            method, url, headers=headers, stream=True, timeout=TIMEOUTS, allow_redirects=False
        )
    except requests.Timeout as error:
        raise NoAnswerError(
            f"{shown}: expected an answer within {TIMEOUTS[1]:g} s, got none. Try again later."
        ) from error
    except requests.ConnectionError as error:
        raise NoAnswerError(
            f"{shown}: the server cannot be reached ({_cause(error)}). Check the address and the "
            "network."
        ) from error
    except (requests.RequestException, ValueError) as error:
        text = shorten_text(str(error), 200)
        raise RequestError(f"{shown}: expected an answer, got {text}.") from error


def read_pieces(answer: "requests.Response", shown: str) -> Iterator[bytes]:
    """The body, as it comes. (`iter_content` waits for whole pieces, and loses one that the
    connection breaks in.)

    Raises:
        NoAnswerError: it ends too early.
    """
    import urllib3

    try:
        while piece := answer.raw.read1(_PIECE, decode_content=False):
            yield piece
    except urllib3.exceptions.HTTPError as error:
        raise NoAnswerError(f"{shown}: the connection broke ({_cause(error)}).") from error


def _cause(error: BaseException) -> str:
    """The innermost reason, without the addresses and objects that urllib3 wraps it in."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    text = str(getattr(error, "reason", None) or error)
    return shorten_text(text.rpartition(">: ")[2] or text, 200)


def download_file(url: str, target: Path, limit: int) -> None:
    """Write what is at an address to a file.

    Args:
        url: http or https.
        target: the file.
        limit: most bytes of it.

    Raises:
        RequestError: no such file, or more than `limit` bytes; `NoAnswerError` without an answer.
        StorageError: no room.
    """
    shown = shorten_text(url.partition("?")[0], 200)
    with open_answer("GET", url, shown) as answer:
        if answer.status_code != 200:
            raise RequestError(
                f"{shown}: expected the file, the server answers {answer.status_code} "
                f"{shorten_text(answer.reason or '', 80)}. Check the address."
            )
        announced = answer.headers.get("Content-Length", "0")
        expected = int(announced) if announced.isdecimal() and len(announced) < 20 else limit + 1
        total = 0
        with target.open("wb") as file:
            for piece in read_pieces(answer, shown):
                total += len(piece)
                if max(total, expected) > limit:
                    raise RequestError(f"{shown}: expected at most {limit} bytes, got more.")
                needed = max(len(piece), expected - total)
                if shutil.disk_usage(target.parent).free < needed:
                    raise StorageError(
                        errno.ENOSPC, f"{target}: {needed} bytes are needed, fewer are free"
                    )
                file.write(piece)
    if total < expected:
        raise NoAnswerError(f"{shown}: expected {expected} bytes, got {total}.")
