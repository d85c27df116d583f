"""VisualDL's record files: the one module that writes and reads them, and needs its package."""

import contextlib
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError
from visualdl import LogWriter
from visualdl.proto import record_pb2
from visualdl.reader.record_reader import RecordReader

from ppvision.errors import StorageError


def open_records(folder: Path, kept: Callable[[int, str], bool]) -> LogWriter:
    """A writer into one new record file that takes over what is kept of the one before it.

    Raises:
        OSError: no room for the new file; the old one is as it was.
    """
    aside = folder / "unfinished"
    if aside.exists():  # of a run killed in the lines below
        shutil.rmtree(aside)
    earlier = sorted(folder.glob("vdlrecords.*"))
    # Only the newest: it took over what the others held, and should have replaced them.
    records = [
        record
        for path in earlier[-1:]
        for record in _points(path)
        if all(kept(value.id, value.tag) for value in record.values)
    ]
    # Its own default name counts seconds: a resume within one second would add to the old file.
    name = f"vdlrecords.{time.time_ns()}.log"
    copy = LogWriter(logdir=str(aside), file_name=name)
    for record in records:
        copy._get_file_writer().add_record(record)
    copy.close()
    if records:
        # VisualDL prints its write errors and continues.
        if len(_points(aside / name)) != len(records):
            raise StorageError(f"dashboard: could not write {aside / name}: is the disk full?")
        (aside / name).rename(folder / name)
    shutil.rmtree(aside)
    for path in earlier:
        path.unlink()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that the file exists
        writer = LogWriter(logdir=str(folder), file_name=name)
        writer._get_file_writer()
    return writer


def _points(path: Path) -> list[record_pb2.Record]:
    """The records of a file, up to the first one that a killed run has cut short; without texts and
    settings, which every start of a run writes again."""
    records = []
    for data in RecordReader(str(path)).get_all():
        try:
            record = record_pb2.Record.FromString(data)
        except DecodeError:
            break
        if not {v.WhichOneof("one_value") for v in record.values} & {"text", "hparam", "meta_data"}:
            records.append(record)
    return records


def write_comparison(folder: Path, rows: dict[str, dict[str, object]]) -> None:
    """Rows for VisualDL's page that compares settings, instead of what stood there.

    Args:
        folder: gets a sub-folder for each row.
        rows: by name; the first column of each is its setting, the others that are numbers are what
            came of it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, row in rows.items():
        (key, value), *others = row.items()
        found = {column: float(number) for column, number in others}
        with LogWriter(logdir=str(folder / name)) as writer:
            writer.add_hparams({key: value}, list(found))
            for column, number in found.items():
                writer.add_scalar(column, number, 0)
