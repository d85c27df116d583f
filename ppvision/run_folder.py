"""Folders that we write: a run's, `--save_dir`, and how a folder is replaced as a whole."""

import csv
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ppvision.safe_yaml import yaml_text


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def vdl(self) -> Path:
        return self.root / "vdl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best_model(self) -> Path:
        return self.root / "best_model" / "model.pdparams"

    def check_new(self, resume: bool) -> None:
        """Raise before anything is written if a new run would meet an older one.

        Raises:
            FileExistsError: the folder holds files and the run is not to be resumed.
        """
        if not resume and self.root.exists() and any(self.root.iterdir()):
            raise FileExistsError(
                f"save_dir: expected a new or empty folder, got {self.root}, which holds a run. "
                "Go on with it (--resume auto), name another one (--save_dir) or remove it."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made where it is not there, against a second run in it.

        Raises:
            FileExistsError: another process holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise FileExistsError(
                f"save_dir: another process is training in {self.root}. Wait for it, stop it, or "
                "name another folder (--save_dir)."
            ) from error
        try:
            yield
        finally:
            os.close(handle)

    def open(self, config: dict) -> None:
        """Make the folder and write the resolved configuration."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.config, yaml_text(config))


def write_text(path: Path, text: str) -> None:
    """Write a file beside its name, sync it, then rename it: never half a file under the name."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` for bytes."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_OLD = "old"  # where an earlier folder stands between the two renames that replace it


@contextmanager
def replacing_folder(
    folder: Path, may_be_replaced: Callable[[Path], bool], ours: str
) -> Iterator[Path]:
    """Yield a work folder; its `final` takes the name `folder` once the block has succeeded.

    It is called `.NAME.ppvision-partial`; what a killed run left there is removed.

    Args:
        folder: the new folder; resolved.
        may_be_replaced: of a folder that is there already.
        ours: what such a folder holds, for the error: "an earlier export".

    Raises:
        FileExistsError: the folder is there, and is not to be replaced.
    """
    work = folder.with_name(f".{folder.name}.ppvision-partial")
    _clear(work, folder)
    check_replaceable(folder, may_be_replaced, ours)
    final = work / "final"
    final.mkdir(parents=True)
    try:
        yield work
        if folder.exists():
            folder.replace(work / _OLD)
        final.replace(folder)
    finally:
        _clear(work, folder)


def check_replaceable(folder: Path, may_be_replaced: Callable[[Path], bool], ours: str) -> None:
    """Raise the `FileExistsError` of `replacing_folder`."""
    if folder.exists() and not may_be_replaced(folder):
        raise FileExistsError(
            f"folder: expected a new or empty folder, or {ours}, got {folder}, which "
            "holds other files. Name another one or remove it."
        )


def _clear(work: Path, folder: Path) -> None:
    """Remove a work folder. What it holds because it was to be replaced goes back."""
    old = work / _OLD
    if old.exists() and not folder.exists():
        old.replace(folder)
    shutil.rmtree(work, ignore_errors=True)


# How a run is run, without effect on what it computes (`iters` stands in the config as well).
_NO_DIFFERENCE = {f"run.{key}" for key in ("log_iters", "save_interval", "keep_checkpoint_max")}
_NO_DIFFERENCE |= {f"run.{key}" for key in ("num_workers", "resume", "iters", "batch_size")}


def config_differences(before: dict, now: dict, where: str = "") -> list[str]:
    """One line `a.b: old -> new` for every value that differs and matters to the numbers."""
    lines = []
    for key in [*before, *(k for k in now if k not in before)]:
        path = f"{where}.{key}" if where else str(key)
        if path in _NO_DIFFERENCE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_differences(old, new, path)
        elif old != new:
            lines.append(f"{path}: {old!r} -> {new!r}")
    return lines


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The rows `(step, tag, value)` of a `metrics.csv`; a line cut short at its end is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((int(row["step"]), row["tag"], float(row["value"])))
            except (TypeError, ValueError):
                break  # the last line of a run that was killed while writing it
    return rows
