"""Experiments of many runs: shared out among processes, resumed, their results in one table."""

import csv
import fcntl
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ppvision.engine.callbacks import Callback
from ppvision.errors import FolderInUseError
from ppvision.files import lock_folder, write_text

Rows = list[dict[str, object]]


@contextmanager
def claim_run(path: Path) -> Iterator[bool]:
    """Whether the run that this lock file stands for is ours, and no other process's, inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def record_time(folder: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Add the time spent inside to the file `seconds` of a run's folder, whatever ends it."""
    before, start = spent(folder), clock()
    try:
        yield
    finally:
        if folder.exists():
            write_text(folder / "seconds", str(before + clock() - start))


class ProcessorClock(Callback):
    """Keeps the processor's time behind a run's newest checkpoint in the file `seconds` of its
    folder. What a killed run did after that checkpoint is done again, and counts once.

    Args:
        folder: the run's. To be made right before training begins or goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = spent(folder) - time.process_time()

    def on_save(self, step: int) -> None:
        write_text(self.folder / "seconds", str(self.before + time.process_time()))


def spent(folder: Path) -> float:
    """The seconds that a run has taken so far, in all its parts."""
    path = folder / "seconds"
    return float(path.read_text()) if path.exists() else 0.0


def read_rows(path: Path) -> Rows:
    """The rows of a results file, without a summary of runs (whose `seed` is a word)."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("seed", "0").isdigit()]


def mean_and_spread(rows: Rows, keys: Sequence[str], scores: Sequence[str]) -> Rows:
    """Mean and standard deviation (of the sample) over seeds, as rows whose `seed` says which.

    Args:
        rows: of runs, those that differ by their seed alone one behind another.
        keys: columns that tell kinds of runs apart.
        scores: columns of numbers.
    """
    result = []
    for kind, group in itertools.groupby(rows, key=lambda row: tuple(row[k] for k in keys)):
        mine = list(group)
        if len(mine) < 2:
            continue
        for name, of in (("mean", statistics.mean), ("std", statistics.stdev)):
            values = {score: f"{of(float(row[score]) for row in mine):.4f}" for score in scores}
            result.append({**dict(zip(keys, kind, strict=True)), "seed": name, **values})
    return result


def write_rows(path: Path, rows: Rows) -> None:
    """A results file of one measurement, whole or not at all."""
    write_text(path, _csv_text(list(rows[0]), rows))


def replace_rows(path: Path, rows: Rows, key: Sequence[str]) -> None:
    """Put rows in the place of those of the same case; the others stay.

    Args:
        path: of the table.
        rows: with all its columns.
        key: the columns that tell cases apart.
    """
    held = {tuple(str(row[k]) for k in key): row for row in [*read_rows(path), *rows]}
    write_rows(path, list(held.values()))


def _csv_text(fields: Sequence[str], rows: Rows) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def add_row(
    path: Path,
    row: dict[str, object],
    fields: Sequence[str],
    order: Callable[[dict], object],
    summary: Callable[[Rows], Rows],
) -> None:
    """`add_rows` of one row."""
    add_rows(path, [row], fields, order, summary)


def add_rows(
    path: Path,
    new: Rows,
    fields: Sequence[str],
    order: Callable[[dict], object],
    summary: Callable[[Rows], Rows],
) -> None:
    """Add a run, order the table, compute the summary anew; two processes may do so at once.

    Args:
        path: of the table.
        new: the rows of the run; all of them appear together.
        fields: the columns.
        order: the key to sort the runs by.
        summary: rows that follow the runs.
    """
    with _table_held(path):
        rows = read_rows(path)
        rows += [{key: str(value) for key, value in row.items()} for row in new]
        rows.sort(key=order)
        write_text(path, _csv_text(fields, rows + summary(rows)))


@contextmanager
def _table_held(path: Path) -> Iterator[None]:
    """Hold the folder of a table, once no other process holds it."""
    held = ExitStack()
    while True:
        try:
            held.enter_context(lock_folder(path.parent, f"{path.parent}: in use"))
            break
        except FolderInUseError:
            time.sleep(0.05)
    with held:
        yield
