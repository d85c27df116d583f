"""Download files over HTTP into the cache folder.

A file with known sha256 is downloaded once (`RemoteFolder`): after a broken connection the download
continues where it stopped, and the result has that sha256 or is not used. Other files are
downloaded whole (`fetch_file`), and stay if the caller accepts them.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit, urlunsplit

from ppvision.console import ProgressLine
from ppvision.errors import StorageError, shorten_text
from ppvision.files import compute_sha256, find_cache_folder, name_flag_errors, replace_file
from ppvision.remote import NoAnswerError, RequestError, download_file, open_answer, read_pieces

if TYPE_CHECKING:
    import requests

logger = logging.getLogger("ppvision")

ATTEMPTS = 5  # connections for one file, while each one gives more bytes


class FetchError(RequestError):
    """A server gives a wrong answer; `status` is that of the answer, if there is one."""

    status: int | None = None


class UnreachableError(FetchError):
    """A server does not answer, or has an internal error: cached files may be sufficient."""


class _BrokenError(Exception):
    """An answer ended too early; the rest can be requested."""


def is_url(path_or_url: object) -> bool:
    """Whether this is a URL of any scheme."""
    return isinstance(path_or_url, str) and bool(re.match(r"[A-Za-z][\w+.-]*://", path_or_url))


def find_cached_folder(room: str, url: str) -> Path:
    """Return the place of a URL in the cache: `<room>/<hash of the URL>` in `find_cache_folder()`.
    It may not exist yet."""
    return find_cache_folder() / room / hashlib.sha256(url.encode()).hexdigest()[:32]


def fetch_file(url: str, target: Path, limit: int, accept: Callable[[Path], None]) -> None:
    """Download a file of which only the URL is known.

    Args:
        url: http or https.
        target: its place in the cache; the folder is made.
        limit: largest number of bytes.
        accept: function that is called with the downloaded file before it gets its name; it may
            change the file, or raise.

    Raises:
        RequestError: there is no such file, or it has more than `limit` bytes.
        StorageError: there is no disk space.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target) as partial:
        download_file(url, partial, limit)
        accept(partial)


class RemoteFolder:
    """A folder on a server, and its copy in the cache.

    Args:
        url: URL of the folder, http or https. A query (`?token=...`) is sent for every file.

    Attributes:
        folder: the copy, see `find_cached_folder`.
        shown: the URL without user name, password and query, for messages.

    Raises:
        FetchError: the URL has another scheme, or no host.
    """

    # Attributes of the class: the sub-folder of the cache, and the errors for a wrong or missing
    # answer.
    room: ClassVar[str] = "layered"  # earlier versions kept all files there
    refused: ClassVar[type[FetchError]] = FetchError
    unreachable: ClassVar[type[UnreachableError]] = UnreachableError

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise self.refused(f"{url}: expected an address ({error}).") from error
        if parts.scheme not in ("http", "https") or not host:
            raise self.refused(
                f"{url}: expected http://HOST/PATH or https://HOST/PATH, got {parts.scheme}://. "
                "Fetch the folder by other means and pass its path."
            )
        self._parts = parts._replace(path=parts.path.rstrip("/"), fragment="")
        self.shown = self._shown("")
        self.folder = find_cached_folder(self.room, urlunsplit(self._parts))

    def _url(self, name: str) -> str:
        return urlunsplit(self._parts._replace(path=f"{self._parts.path}/{name}"))

    def _shown(self, name: str) -> str:
        host = self._parts.netloc.rpartition("@")[2]
        path = f"{self._parts.path}/{name}" if name else self._parts.path
        return f"{self._parts.scheme}://{host}{path}"

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Lock the copy against other processes; wait if another process has locked it."""
        with name_flag_errors("PPVISION_CACHE", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waiting for another process that fetches it", self.shown)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @property
    def previous(self) -> Path:
        """Return the folder of the earlier complete set of files while a newer set is
        downloaded."""
        return self.folder / "previous"

    def set_aside(self, names: Iterable[str]) -> None:
        """Keep files as `previous`; they are taken from there if they are still the same."""
        work = self.folder / "previous.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name in names:
            if (self.folder / name).is_file():
                shutil.copy2(self.folder / name, work / name)
        shutil.rmtree(self.previous, ignore_errors=True)
        work.replace(self.previous)

    def tidy(self, files: Mapping[str, tuple[int, str]]) -> None:
        """Remove `previous`, and files in the copy that differ from these.

        Args:
            files: bytes and sha256 by name.
        """
        shutil.rmtree(self.previous, ignore_errors=True)
        for name, (size, sha256) in files.items():
            if not _is(self.folder / name, size, sha256):
                (self.folder / name).unlink(missing_ok=True)

    def read(self, name: str, limit: int) -> bytes:
        """Download a small file into memory.

        Raises:
            UnreachableError: the server does not answer, or has an internal error.
            FetchError: the answer is not the file, or has more than `limit` bytes.
        """
        data = bytearray()  # `bytes` would be copied for each of many small parts
        with self._answer("GET", name) as answer:
            try:
                for piece in read_pieces(answer, self._shown(name)):
                    data += piece
                    if len(data) > limit:
                        raise self.refused(
                            f"{self._shown(name)}: expected at most {limit} bytes, got more. Check "
                            "the address."
                        )
            except NoAnswerError as error:
                raise self.unreachable(str(error)) from error
        return bytes(data)

    def has(self, name: str) -> bool:
        """Whether the server has a file.

        Raises:
            FetchError: the answer is unclear.
        """
        try:
            with self._answer("HEAD", name):
                return True
        except FetchError as error:
            if error.status in (403, 404, 410):
                return False
            if error.status in (405, 501):  # the server has no HEAD: the download will tell
                return True
            raise

    def length(self, name: str) -> int:
        """Return the size of a file as the server announces it.

        Raises:
            FetchError: the server does not announce it.
        """
        with self._answer("HEAD", name) as answer:
            length = answer.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise self.refused(
                f"{self._shown(name)}: expected a Content-Length, got {length[:40]!r}. Fetch the "
                "file by other means and pass its path."
            )
        return int(length)

    def fetch(self, name: str, size: int, sha256: str) -> None:
        """Make sure that a file is in the copy; it is not downloaded if it exists already.

        Args:
            name: name of the file.
            size: number of its bytes.
            sha256: its sha256.

        Raises:
            UnreachableError: the server does not answer, has an internal error, or a broken
                connection could not be continued. The downloaded part is kept for the next call.
            FetchError: the file is not the expected one.
            OSError: the disk is full, for one.
        """
        target = self.folder / name
        if _is(target, size, sha256):
            return
        if _is(self.previous / name, size, sha256):
            shutil.copy2(self.previous / name, target)
            return
        # The name has the sha256, so that a partial file of another version is not continued.
        partial = self.folder / f"{name}.{sha256[:16]}.partial"
        for old in self.folder.glob(f"{name}.*.partial*"):
            if not old.name.startswith(partial.name):
                old.unlink()
        try:
            resumed = self._load(name, partial, size)
            if resumed and not _is(partial, size, sha256):
                logger.warning(
                    "%s: the parts do not fit together; downloading again", self._shown(name)
                )
                _drop(partial)
                self._load(name, partial, size)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(
                error.errno, f"cache: could not write {partial} ({reason})"
            ) from error
        if not _is(partial, size, sha256):
            _drop(partial)
            raise self.refused(
                f"{self._shown(name)}: expected sha256 {sha256}, got another file of {size} bytes: "
                "it was changed on the server. If it is being published just now, try again later; "
                "else tell its owner."
            )
        partial.replace(target)
        _drop(partial)

    def _load(self, name: str, partial: Path, size: int) -> bool:
        """Download a file over as many connections as needed; return whether it came in parts."""
        free = shutil.disk_usage(self.folder).free
        there = partial.stat().st_size if partial.exists() else 0
        if size - there > free:
            raise StorageError(errno.ENOSPC, f"{size - there} bytes are needed, {free} are free")
        resumed = there > 0
        for left in range(ATTEMPTS - 1, -1, -1):
            before = partial.stat().st_size if partial.exists() else 0
            try:
                self._receive(name, partial, size)
                return resumed
            except _BrokenError as error:
                there = partial.stat().st_size if partial.exists() else 0
                if not left or there <= before:
                    raise self.unreachable(str(error)) from error
                logger.warning("%s Continuing from byte %d.", error, there)
                resumed = True
        raise AssertionError("the last attempt returns or raises")

    def _receive(self, name: str, partial: Path, size: int) -> None:
        """Download a file, or its missing part, over one connection."""
        start = partial.stat().st_size if partial.exists() else 0
        if start == size:
            return
        if start > size:
            _drop(partial)
            start = 0
        with self._answer("GET", name, _range_headers(partial, start)) as answer:
            if answer.status_code == 200:
                start = 0  # all was requested, or the server ignores ranges or has another file now
            if not start or _goes_on(answer, start, size):
                self._check_length(answer, name, size - start)
                _validator(partial).write_text(_validator_of(answer), encoding="ascii")
                self._write(answer, name, partial, start, size)
                return
        _drop(partial)  # the server does not have this range
        self._receive(name, partial, size)

    def _check_length(self, answer: "requests.Response", name: str, expected: int) -> None:
        length = answer.headers.get("Content-Length")
        if length is not None and length != str(expected):
            raise self.refused(
                f"{self._shown(name)}: expected {expected} bytes, the server announces "
                f"{length}. It was changed or not yet published as a whole: try again "
                "later, or tell its owner."
            )

    def _write(
        self, answer: "requests.Response", name: str, partial: Path, start: int, size: int
    ) -> None:
        """Append an answer's body to the first `start` bytes of a partial file."""
        progress = ProgressLine(name, size, "B", start=start)
        there = start
        with progress, partial.open("ab" if start else "wb") as file:
            try:
                for piece in read_pieces(answer, self._shown(name)):
                    there += len(piece)
                    if there > size:
                        raise self.refused(f"{self._shown(name)}: expected {size} bytes, got more.")
                    file.write(piece)
                    progress.update(len(piece))
            except NoAnswerError as error:
                raise _BrokenError(str(error)) from error
        if there < size:
            raise _BrokenError(f"{self._shown(name)}: expected {size} bytes, got {there}.")

    @contextmanager
    def _answer(
        self, method: str, name: str, headers: dict[str, str] | None = None
    ) -> "Iterator[requests.Response]":
        """Request a file; the body is not read yet. The status is 200 (with a range also 206,
        416)."""
        shown, known = self._shown(name), (200, 206, 416) if headers else (200,)
        try:
            with open_answer(method, self._url(name), shown, headers) as answer:
                if answer.status_code not in known:
                    kind = self.unreachable if answer.status_code >= 500 else self.refused
                    error = kind(
                        f"{shown}: expected the file, the server answers {answer.status_code} "
                        f"{shorten_text(answer.reason or '', 80)}. Check the address, or whether "
                        "all of it is published."
                    )
                    error.status = answer.status_code
                    raise error
                yield answer
        except NoAnswerError as error:
            raise self.unreachable(str(error)) from error
        except FetchError:  # an error of ours
            raise
        except RequestError as error:
            raise self.refused(str(error)) from error


def _validator(partial: Path) -> Path:
    """Return the file with the ETag or date of a partial file."""
    return partial.with_name(partial.name + ".validator")


def _validator_of(answer: "requests.Response") -> str:
    etag = answer.headers.get("ETag", "")
    if etag.startswith("W/"):  # a weak ETag does not mean that bytes are equal
        etag = ""
    text = etag or answer.headers.get("Last-Modified", "")
    return text if text.isascii() and text.isprintable() else ""


def _range_headers(partial: Path, start: int) -> dict[str, str] | None:
    if not start:
        return None
    headers = {"Range": f"bytes={start}-"}
    validator = _validator(partial)
    if validator.exists() and (text := validator.read_text(encoding="ascii")):
        headers["If-Range"] = text
    return headers


def _goes_on(answer: "requests.Response", start: int, size: int) -> bool:
    """Whether an answer contains the rest from `start`."""
    found = answer.headers.get("Content-Range", "")
    return answer.status_code == 206 and found == f"bytes {start}-{size - 1}/{size}"


def _is(path: Path, size: int, sha256: str) -> bool:
    """Whether a file exists with these bytes."""
    return path.is_file() and path.stat().st_size == size and compute_sha256(path) == sha256


def _drop(partial: Path) -> None:
    for path in (partial, _validator(partial)):
        path.unlink(missing_ok=True)
