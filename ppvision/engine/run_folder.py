"""The folder of a run, `--save_dir`."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ppvision.errors import FolderInUseError, shorten
from ppvision.files import lock_folder, name_flag_errors, write_text
from ppvision.safe_yaml import format_yaml


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path
    _holders: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def config(self) -> Path:
        return self.root / "config.yml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def vdl(self) -> Path:
        return self.root / "vdl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def best_model(self) -> Path:
        return self.root / "best_model" / "model.pdparams"

    def check_new(self, resume: bool) -> None:
        """Raise, before anything is written, if the folder of a new run contains an older run.

        Files of a run that ended before its first checkpoint do not count as a run and are
        replaced.

        Raises:
            FolderInUseError: the folder contains files and the run is not resumed, or it is a file.
        """
        self._check_no_file()
        if not resume and self.root.exists() and not self._holds_a_start_only():
            raise FolderInUseError(
                f"save_dir: expected a new or empty folder, got {self.root}, which holds a run. "
                "Continue it (--resume auto), choose another one (--save_dir) or remove it."
            )

    def _check_no_file(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise FolderInUseError(
                f"save_dir: expected a folder, got {self.root}, which is a file. Name another one."
            )

    def _holds_a_start_only(self) -> bool:
        """Whether the folder has only files that a run writes before its first checkpoint."""
        paths = self.config, self.metrics, self.log, self.vdl, self.tensorboard, self.checkpoints
        before = {path.name for path in paths}
        # A killed run may have left partial files of these, and of its first checkpoint.
        found = {path.name for path in self.root.iterdir() if path.suffix != ".partial"}
        if not found <= before:
            return False
        if not self.checkpoints.exists():
            return True
        return all(path.suffix == ".partial" for path in self.checkpoints.iterdir())

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Lock the folder against a second run; make it if it does not exist.

        Inside the block, the same object may lock it again. If the folder was made here and is
        still empty when the block raises, it is removed.

        Raises:
            FolderInUseError: another process, or another object in this process, has locked it; or
                it is a file.
            StorageError: the folder cannot be made.
        """
        if self._holders:
            yield
            return
        busy = (
            f"save_dir: another process is training in {self.root}. Wait for it, stop it, or "
            "name another folder (--save_dir)."
        )
        named = "save_dir", self.root
        with name_flag_errors(*named):  # looking it up may fail: a name too long
            self._check_no_file()
            made = not self.root.exists()
        with lock_folder(self.root, busy, named):
            self._holders.append(True)
            try:
                yield
            except BaseException:
                if made:
                    with suppress(OSError):  # the folder is not empty
                        self.root.rmdir()
                raise
            finally:
                self._holders.pop()

    def open(self, config: dict) -> None:
        """Make the folder and write the resolved configuration.

        Raises:
            StorageError: the folder cannot be made or written.
        """
        with name_flag_errors("save_dir", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(self.config, format_yaml(config))


# Options of a run that do not change its numbers (`iters` is also in the config).
_NO_DIFFERENCE = {f"run.{key}" for key in ("log_iters", "save_interval", "keep_checkpoint_max")}
_NO_DIFFERENCE |= {f"run.{key}" for key in ("num_workers", "resume", "iters", "batch_size")}


def list_config_differences(before: dict, now: dict, where: str = "") -> list[str]:
    """Return one line `a.b: old -> new` for every changed value that affects the numbers."""
    lines = []
    for key in [*before, *(k for k in now if k not in before)]:
        path = f"{where}.{key}" if where else str(key)
        if path in _NO_DIFFERENCE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += list_config_differences(old, new, path)
        elif old != new:
            lines.append(f"{path}: {shorten(old)} -> {shorten(new)}")
    return lines


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """Return the rows `(step, tag, value)` of a `metrics.csv`; an incomplete last line is
    omitted."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((int(row["step"]), row["tag"], float(row["value"])))
            except (TypeError, ValueError):
                break  # the last line of a killed run may be incomplete
    return rows
