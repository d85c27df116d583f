"""Write and read VisualDL's record files. Only this module needs its package."""

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
    """Open a writer for a new record file, which first gets the kept records of the previous file.

    Raises:
        OSError: there is no space for the new file; the old one does not change.
    """
    aside = folder / "unfinished"
    if aside.exists():  # from a run that was killed in the lines below
        shutil.rmtree(aside)
    earlier = sorted(folder.glob("vdlrecords.*"))
    # Only the newest file: it contains the records of the others, and should have replaced them.
    records = [
        record
        for path in earlier[-1:]
        for record in _points(path)
        if all(kept(value.id, value.tag) for value in record.values)
    ]
    # VisualDL's default name counts seconds: a resume within one second would append to the old
    # file.
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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that the file exists
        writer = LogWriter(logdir=str(folder), file_name=name)
        writer._get_file_writer()
    return writer


def _points(path: Path) -> list[record_pb2.Record]:
    """Return the records of a file up to the first incomplete one (of a killed run), without texts
    and settings, which every start of a run writes again."""
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
    """Write rows for VisualDL's page that compares settings; they replace earlier rows.

    Args:
        folder: gets a sub-folder for each row.
        rows: rows by name. The first column of each is its setting; other columns with numbers are
            its results.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, row in rows.items():
        (key, value), *others = row.items()
        found = {column: float(number) for column, number in others}
        with LogWriter(logdir=str(folder / name)) as writer:
            writer.add_hparams({key: value}, list(found))
            for column, number in found.items():
                writer.add_scalar(column, number, 0)
