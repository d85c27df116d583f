"""A run's folder, `--save_dir`."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ppvision.errors import FolderInUseError
from ppvision.files import lock_folder, write_text
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
            raise FolderInUseError(
                f"save_dir: expected a new or empty folder, got {self.root}, which holds a run. "
                "Go on with it (--resume auto), name another one (--save_dir) or remove it."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made where it is not there, against a second run in it.

        Raises:
            FileExistsError: another process holds it.
        """
        busy = (
            f"save_dir: another process is training in {self.root}. Wait for it, stop it, or "
            "name another folder (--save_dir)."
        )
        with lock_folder(self.root, busy):
            yield

    def open(self, config: dict) -> None:
        """Make the folder and write the resolved configuration."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.config, yaml_text(config))


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
