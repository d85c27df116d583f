"""Send requests to http and https servers, with limits on their answers.

This module follows redirects itself: `requests` reads the body of each, however long, and silently
goes from https to http.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ppvision.errors import MissingPackageError, PpvisionError, StorageError, shorten_text

if TYPE_CHECKING:  # only URLs need it: the extra `remote`
    import requests

TIMEOUTS = (10.0, 30.0)  # seconds to connect, and between two parts of an answer
MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 18


class RequestError(PpvisionError, ValueError):
    """A server gives a wrong answer."""


class NoAnswerError(RequestError):
    """A server does not answer, or its answer is incomplete."""


@contextmanager
def open_answer(
    method: str, url: str, shown: str, headers: dict[str, str] | None = None
) -> "Iterator[requests.Response]":
    """Send a request; the body is not read yet, and is not decompressed.

    Args:
        method: GET or HEAD.
        url: http or https.
        shown: the URL in messages.
        headers: headers of the request.

    Yields:
        The answer with any status, but not a redirect.

    Raises:
        NoAnswerError: the server does not answer.
        RequestError: a URL, an answer or a redirect is refused: from https to plain http, to
            another scheme, or after more than 5 redirects.
        MissingPackageError: `requests` is not installed.
    """
    with _open_session() as session:
        # A compressed answer does not have the known size of a file, and no ranges; and a small one
        # can expand to any size.
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
    """Return the URL of a redirect."""
    try:
        # HTTP's headers are latin-1; URLs in them are UTF-8 if servers do not quote them.
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
    """Send a request; convert the exceptions of `requests` to ours."""
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
    """Yield parts of the body as they arrive. (`iter_content` waits for whole parts, and loses a
    part if the connection breaks in it.)

    Raises:
        NoAnswerError: the body ends too early.
    """
    import urllib3

    try:
        while piece := answer.raw.read1(_PIECE, decode_content=False):
            yield piece
    except urllib3.exceptions.HTTPError as error:
        raise NoAnswerError(f"{shown}: the connection broke ({_cause(error)}).") from error


def _cause(error: BaseException) -> str:
    """Return the innermost reason, without the URLs and objects that urllib3 adds."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    text = str(getattr(error, "reason", None) or error)
    return shorten_text(text.rpartition(">: ")[2] or text, 200)


def download_file(url: str, target: Path, limit: int) -> None:
    """Download a URL to a file.

    Args:
        url: http or https.
        target: the file.
        limit: largest number of bytes.

    Raises:
        RequestError: there is no such file, or it has more than `limit` bytes; `NoAnswerError`
            without an answer.
        StorageError: there is no disk space.
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
