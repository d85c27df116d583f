"""Download weights from a URL once, and only on request, into the cache folder."""

import errno
import logging
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ppvision.errors import StorageError, WeightsError, shorten_text
from ppvision.remote import RequestError
from ppvision.remote_cache import fetch_file, find_cached_folder
from ppvision.zoo.weights import read_weights

logger = logging.getLogger("ppvision")

MAX_BYTES = 8 << 30  # bytes of weights, packed or not; the largest published ones have 5 GB
# An archive of weights is about as large as the weights. It may unpack to this many times its own
# bytes, or to this many bytes if that is more.
_MAX_RATIO, _FREE_BYTES = 10, 64 << 20
_MAX_MEMBERS = 1000  # members of an archive; PaddleSeg's have one or two
_PIECE = 1 << 20
_UNPACK = "If you trust it, unpack it yourself and give the file's path."
# PaddleDetection's name for the server of its weights.
_PPDET, _PPDET_SERVER = "ppdet://", "https://paddledet.bj.bcebos.com/"


def fetch_weights(url: str, allow_download: bool) -> Path:
    """Return the file of weights of a URL, from the cache or by a download.

    From an archive (tar, zip), only its one `.pdparams` is unpacked. Only files that can be read as
    weights are cached. A cached file that cannot be read any more is downloaded again.

    Args:
        url: http, https, or PaddleDetection's `ppdet://`.
        allow_download: whether a download is allowed.

    Raises:
        WeightsError: a download is not allowed, the server does not answer, or the answer contains
            no weights.
        StorageError: there is no disk space.
    """
    shown = shorten_text(url.partition("?")[0], 200)
    if url.startswith(_PPDET):
        url = _PPDET_SERVER + url.removeprefix(_PPDET)
    target = find_cached_folder("pretrained", url) / "model.pdparams"
    if target.is_file():
        try:
            _check_reads(target, shown)
            return target
        except WeightsError as error:
            if not allow_download:
                raise WeightsError(
                    f"{error} It was fetched earlier, into {target}. Delete that file, or pass "
                    "--allow_download to fetch it again."
                ) from error
            logger.warning(str(error))
    if not allow_download:
        raise WeightsError(
            f"pretrained: {shown} is a URL. ppvision downloads only with --allow_download. "
            "Pass it, or give the path of the file."
        )
    logger.info(f"pretrained: fetching {shown} into {target.parent}")
    try:
        fetch_file(url, target, MAX_BYTES, partial(_accept, shown))
    except RequestError as error:
        raise WeightsError(f"pretrained: {error}") from error
    return target


def _accept(shown: str, path: Path) -> None:
    """Extract the weights from the downloaded file, if there are any."""
    _unpack(path, shown)
    try:
        _check_reads(path, shown)
    except WeightsError as error:
        raise WeightsError(
            f"{error} Check the address in a browser, or fetch the weights yourself and give the "
            "file's path."
        ) from error


def _check_reads(path: Path, shown: str) -> None:
    """Raise `WeightsError` if a file cannot be read as weights."""
    try:
        read_weights(path)
    except WeightsError as error:
        reason = shorten_text(str(error).removeprefix(f"{path}: "), 300)
        raise WeightsError(
            f"pretrained: {shown}: expected a file of weights, got one that does not read "
            f"({reason.removesuffix('.')})."
        ) from error


def _unpack(path: Path, shown: str) -> None:
    """Replace an archive by the weights in it; other files do not change."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip and not tarfile.is_tarfile(path):
        return
    unpacked = path.with_name(f"{path.name}.unpacked")
    limit = min(MAX_BYTES, max(_MAX_RATIO * path.stat().st_size, _FREE_BYTES))
    try:
        with _weights_in(path, is_zip, shown, limit) as source, unpacked.open("wb") as target:
            _copy(source, target, shown, limit)
        unpacked.replace(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise WeightsError(
            f"pretrained: {shown}: the archive is cut off or damaged "
            f"({shorten_text(str(error), 200)}). Fetch it again."
        ) from error
    finally:
        unpacked.unlink(missing_ok=True)


@contextmanager
def _weights_in(path: Path, is_zip: bool, shown: str, limit: int) -> Iterator[IO[bytes]]:
    archive: Any  # two types with different names for the same
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as archive:
        found, total = [], 0
        for number, member in enumerate(archive.infolist() if is_zip else archive):
            name, size = (
                (member.filename, member.file_size) if is_zip else (member.name, member.size)
            )
            total += size  # of all: a packed tar is read through this one
            if total > limit:
                raise _too_large(shown, limit)
            if number >= _MAX_MEMBERS:
                raise WeightsError(
                    f"pretrained: {shown}: expected an archive with one file of weights, got one "
                    f"with more than {_MAX_MEMBERS} members. {_UNPACK}"
                )
            regular = is_zip or member.isreg()
            own = not PurePosixPath(name).name.startswith("._")  # macOS adds such files
            if regular and own and name.endswith(".pdparams"):
                found.append(member)
        if len(found) != 1:
            raise WeightsError(
                f"pretrained: {shown}: expected an archive with one .pdparams, got {len(found)}. "
                f"{_UNPACK}"
            )
        yield archive.open(found[0]) if is_zip else archive.extractfile(found[0])


def _too_large(shown: str, limit: int) -> WeightsError:
    return WeightsError(
        f"pretrained: {shown}: expected an archive that unpacks to at most {limit} bytes, got one "
        f"that unpacks to more, which no archive of weights of its size does. {_UNPACK}"
    )


def _copy(source: IO[bytes], target: IO[bytes], shown: str, limit: int) -> None:
    """Copy at most `limit` bytes, whatever sizes the archive states."""
    total = 0
    while piece := source.read(_PIECE):
        total += len(piece)
        if total > limit:
            raise _too_large(shown, limit)
        if shutil.disk_usage(Path(target.name).parent).free < len(piece):
            raise StorageError(errno.ENOSPC, f"pretrained: not enough disk space for {target.name}")
        target.write(piece)
