"""Write files and folders completely or not at all, and by one process at a time.

A file or folder gets its final name once its content is complete and on the disk. Until then it is
next to its final place, under a temporary name (`NAME.partial`, `.NAME.ppvision-partial`). The
remains of a killed process block no other process, because a lock ends with its process.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ppvision.arguments import check_path
from ppvision.errors import (
    FolderInUseError,
    InputError,
    PpvisionError,
    StorageError,
    shorten,
    shorten_text,
)

# -- reading ---------------------------------------------------------------------------------------


def compute_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits. (`hashlib.file_digest` needs Python
    3.11.)"""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb") as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


# -- locks -----------------------------------------------------------------------------------------

# Descriptors of the locks that this process holds. `flock` belongs to the open file, which a fork
# copies: a worker of a data loader that outlives its killed trainer would keep the trainer's lock.
_lock_descriptors: set[int] = set()


def _forget_locks_in_child() -> None:
    """Close this process's copies of the parent's locks; the parent keeps its locks."""
    while _lock_descriptors:
        os.close(_lock_descriptors.pop())


os.register_at_fork(after_in_child=_forget_locks_in_child)


@contextmanager
def lock_folder(folder: Path, busy: str, named: tuple[str, Path] | None = None) -> Iterator[None]:
    """Lock a folder against every other process; make it if it does not exist.

    The lock leaves no file behind. It ends with the process, however the process ends. Child
    processes do not inherit it.

    Args:
        folder: the folder to lock.
        busy: message of the error when another process holds it.
        named: the flag that the folder comes from and the path to show, for the error when it
            cannot be made; None leaves the system's error as it is.

    Raises:
        FolderInUseError: another process (or another part of this one) holds it.
        StorageError: with `named`: it cannot be made.
    """
    with contextlib.nullcontext() if named is None else name_flag_errors(*named):
        handle = _open_and_lock(folder, busy)
    _lock_descriptors.add(handle)
    try:
        yield
    finally:
        if handle in _lock_descriptors:  # not true in a child that was forked inside the block
            _lock_descriptors.remove(handle)
            os.close(handle)


def _open_and_lock(folder: Path, busy: str) -> int:
    while True:
        was_there = os.path.exists(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # the last process that locked it removed it just now
            continue
        except OSError:  # for example too many open files
            if not was_there:
                with contextlib.suppress(OSError):  # another program has written into it
                    folder.rmdir()
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held the lock may have removed or renamed the folder before we got
            # the lock.
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError as error:
            os.close(handle)
            raise FolderInUseError(busy) from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


# A partial file is abandoned if nobody wrote to it for this many seconds.
ABANDONED_AFTER = 3600
# The name of a partial file contains the file, the process and the thread.
_PARTIAL = re.compile(r".\.\d+-[0-9a-f]+\.partial$", re.DOTALL)
# The name of the work folder, from the name of the folder to be made.
_WORK = re.compile(r"\.(.+)\.ppvision-partial", re.DOTALL)
NAME_BYTES = 255  # of a file's name, on the usual file systems

# -- files -----------------------------------------------------------------------------------------


@contextmanager
def replace_file(path: Path, *, sweep: bool = True) -> Iterator[Path]:
    """Yield a path next to `path`; the file that the block writes there takes the name `path`.

    It is synced first, so that after a power loss either the old or the new file is there. After an
    error the partial file is removed.

    Args:
        path: the new file; its folder is there.
        sweep: whether to remove files that killed writers of `path` have left; this lists the
            folder. Pass False for many files in one locked folder, after `remove_partials`.
    """
    # Two processes or threads may write the same file of a cache: each uses its own name.
    end = f".{os.getpid()}-{threading.get_ident():x}.partial"
    partial = path.with_name(_shorten(path.name, NAME_BYTES - len(end)) + end)
    if sweep:
        _remove_abandoned(path)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove partial files of processes that were killed while they wrote `path`."""
    latest = time.time() - ABANDONED_AFTER
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it just now
            if partial.stat().st_mtime < latest:
                partial.unlink()


def _shorten(name: str, count: int) -> str:
    """Return the start of a name: whole characters, at most `count` bytes."""
    while len(os.fsencode(name)) > count:
        name = name[:-1]
    return name


def remove_partials(folder: Path) -> None:
    """Remove partial files of killed writers in a folder and below it. The caller holds the
    lock."""
    for path in folder.rglob("*.partial"):
        if _PARTIAL.search(path.name):
            path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as `replace_file` does."""
    with replace_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `replace_file` does."""
    write_bytes(path, text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Write the files of a folder to the disk. A full disk may be reported only then."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


# -- the disk --------------------------------------------------------------------------------------

_NO_ROOM = {
    errno.ENOSPC: "the disk is full. Make room, or name a folder on another disk",
    errno.EDQUOT: "the quota on this disk is used up. Make room, or name a folder on another disk",
    errno.EFBIG: "a file would be larger than the system allows. Raise the limit (ulimit -f), or "
    "name a folder on a disk that takes larger files",
}
_DISK_ERRORS = {*_NO_ROOM, errno.EROFS, errno.EIO, errno.ESTALE}


@contextmanager
def name_storage_errors(target: Path, folder: Path) -> Iterator[None]:
    """Raise errors of the disk inside the block as a `StorageError` that names `target`.

    Libraries report a full disk as some other error, or only when the file is read later. So after
    any error, a test write shows whether the disk is full.

    Args:
        target: the file or folder that the block makes, for the message.
        folder: where the block writes.

    Raises:
        StorageError: the disk is full, or refused to read or write; the cause is attached.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if (number := _number_of_disk_error(error, folder)) is None:
            raise
        raise make_storage_error(number, target) from error


@contextmanager
def name_flag_errors(flag: str, folder: Path) -> Iterator[None]:
    """Raise errors of the system inside the block, which makes a folder, as a `StorageError` that
    says which flag named the folder.

    Raises:
        StorageError: the cause is attached.
    """
    try:
        yield
    except PpvisionError:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise make_storage_error(error.errno, folder) from error
        raise StorageError(
            f"{flag}: expected a folder that can be written, got {shorten_text(str(folder), 200)} "
            f"({error.strerror or error}). Name another one."
        ) from error


@contextmanager
def name_read_errors(path: str | Path) -> Iterator[None]:
    """Raise errors of the system inside the block, which reads a file or folder, as a
    `StorageError` that names the file.

    Raises:
        StorageError: no right to read it, too many open files, a device that failed; the cause is
            attached.
    """
    try:
        yield
    except PpvisionError:
        raise
    except OSError as error:
        shown = path if error.filename is None else os.fsdecode(error.filename)
        raise StorageError(
            f"{shown}: cannot be read ({error.strerror or error}). Check the path and its rights."
        ) from error


def check_room(target: Path, folder: Path) -> None:
    """Raise `StorageError` if the disk of `folder` is full: the output of a library for `target`
    may then be incomplete without an error."""
    if (number := _find_no_room(folder)) is not None:
        raise make_storage_error(number, target)


def _number_of_disk_error(error: Exception, folder: Path) -> int | None:
    """Return the system's error number if the disk caused an error in a block that writes `folder`,
    or None."""
    if (number := find_disk_error(error)) is not None:
        return number
    if (
        isinstance(error, OSError)
        and not isinstance(error, PpvisionError)
        and error.errno is not None
    ):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if any(name.startswith(str(folder)) for name in named):
            return error.errno
    return _find_no_room(folder, _LITTLE_ROOM)


def find_disk_error(error: BaseException | None) -> int | None:
    """Return the system's number of a disk error among an exception and its causes, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def make_storage_error(number: int, target: Path) -> StorageError:
    """Return the error for a disk that refused to write `target`; `number` is the system's
    (`errno`).

    For a file in a work folder the message names the final folder, which the user knows.
    """
    for path in (target, *target.parents):
        if made := _WORK.fullmatch(path.name):
            target = path.with_name(made[1])
            break
    advice = f": {_NO_ROOM[number]}" if number in _NO_ROOM else ""
    return StorageError(number, f"could not write {target} ({os.strerror(number)}){advice}.")


# Bytes. If something has failed and not even these fit, the disk is the cause: a library that
# writes a file in one piece leaves it empty, and the free space unchanged.
_LITTLE_ROOM = 2**20


def _find_no_room(folder: Path, size: int = 2**16) -> int | None:
    """Return the number of the error when `size` more bytes are written in `folder`, or None."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            files = (path for path in folder.rglob("*") if path.is_file())
            if any(path.stat().st_size >= limit for path in files):
                return errno.EFBIG
    probe = folder / f".{os.getpid()}.ppvision-probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(min(size, limit) if limit > 0 else size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in _NO_ROOM else None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


# -- folders ---------------------------------------------------------------------------------------


def resolve_new_folder(value: object, argument: str = "folder") -> Path:
    """Return the path of a folder to be made, without links and `..`; `argument` is its name in
    errors.

    Raises:
        InputTypeError: no path.
        InputError: the path of no folder that can be made.
        StorageError: the system cannot follow it.
    """
    folder = check_path(value, argument, "the path of a folder")
    with name_flag_errors(argument, folder):
        try:
            folder = folder.resolve()
        except RuntimeError as error:  # Python 3.11 raises it for links that lead to each other
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if not folder.name:
        raise InputError(
            f"{argument}: expected the path of a new folder, got {shorten(str(folder))}."
        )
    return folder


_OLD = "old"  # name of the earlier folder between the two renames that replace it


@contextmanager
def replace_folder(
    folder: Path, may_be_replaced: Callable[[Path], bool], ours: str, flag: str = "folder"
) -> Iterator[Path]:
    """Yield a work folder; its `final` takes the name `folder` once the block has succeeded.

    It is called `.NAME.ppvision-partial`, and locked: a second process that would write the same
    folder is refused. What a killed process left there is removed.

    Args:
        folder: the new folder; resolved.
        may_be_replaced: whether an existing folder may be replaced.
        ours: what a replaceable folder contains, for the error: "an earlier export".
        flag: the flag that names the folder, for the error when it cannot be made.

    Raises:
        FolderInUseError: the folder is there, and is not to be replaced; or another process is
            writing it; or something else has the work folder's name.
        StorageError: the folder cannot be made; the disk is full, or refused to write.
    """
    work = folder.with_name(f".{folder.name}.ppvision-partial")
    if os.path.islink(work) or (os.path.exists(work) and not os.path.isdir(work)):
        # Through a link, another program's files would be removed as the remains of a killed
        # process.
        raise FolderInUseError(
            f"{flag}: expected nothing but a folder of ours at {work}, got a link or a file. "
            "Remove it, or name another folder."
        )
    if os.path.ismount(folder):
        raise StorageError(
            f"{flag}: expected a folder that can be renamed, got {folder}, where a disk is mounted."
            " Name a folder inside it."
        )
    busy = f"folder: another process is writing {folder}. Wait for it, or name another folder."
    with name_storage_errors(folder, work), lock_folder(work, busy, (flag, folder)):
        _empty_work(work, folder)
        try:
            check_replaceable(folder, may_be_replaced, ours)
            # Checked here again: when the work folder is empty, the disk has room.
            with name_storage_errors(folder, work):
                final = work / "final"
                final.mkdir()
                yield work
                if not _exchange(final, folder):
                    if folder.exists():
                        folder.replace(work / _OLD)
                    final.replace(folder)
                sync_folder(folder.parent)
        finally:
            _empty_work(work, folder)
            shutil.rmtree(work, ignore_errors=True)


_AT_CURRENT_FOLDER, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def _exchange(new: Path, folder: Path) -> bool:
    """Exchange two folders in one step, so that after a kill either the old or the new one has the
    name. Return False if `folder` does not exist or the file system cannot do it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or not folder.exists():
        return False
    paths = os.fsencode(new), os.fsencode(folder)
    return rename(_AT_CURRENT_FOLDER, paths[0], _AT_CURRENT_FOLDER, paths[1], _RENAME_EXCHANGE) == 0


def check_replaceable(folder: Path, may_be_replaced: Callable[[Path], bool], ours: str) -> None:
    """Raise the `FolderInUseError` of `replace_folder`."""
    with name_flag_errors("folder", folder):
        is_taken = folder.exists() and not may_be_replaced(folder)
    if is_taken:
        raise FolderInUseError(
            f"folder: expected a new or empty folder, or {ours}, got {folder}, which "
            "holds other files. Name another one or remove it."
        )


def _empty_work(work: Path, folder: Path) -> None:
    """Empty a work folder. If it contains the folder that was being replaced, move that back."""
    old = work / _OLD
    if old.exists() and not folder.exists():
        old.replace(folder)
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def create_folder(output: str | Path) -> Iterator[Path]:
    """Yield a folder next to `output` that takes its name once the block has ended without error.

    Until then it is called `.NAME.ppvision-partial`, and locked; what a killed run left there is
    removed.

    Raises:
        FolderInUseError: `output` exists and is not an empty folder, or another process is
            writing it.
    """
    target = resolve_new_folder(output, "output")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        held = "which holds files" if target.is_dir() else "which is a file"
        raise FolderInUseError(
            f"output: expected a new or empty folder, got {output}, {held}. "
            "Name another one or remove it."
        )
    is_empty = lambda path: path.is_dir() and not any(path.iterdir())  # noqa: E731
    with replace_folder(target, is_empty, "an empty one", "output") as work:
        yield work / "final"


def find_cache_folder() -> Path:
    """Return `$PPVISION_CACHE`, or `ppvision` in the user's cache folder (`$XDG_CACHE_HOME`, by
    default `~/.cache`). The folder may not exist yet."""
    own = os.environ.get("PPVISION_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppvision"
