"""What a run shows: VisualDL for people with a browser, `metrics.csv` for those without."""

import argparse
import csv
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from visualdl import LogWriter
from visualdl.proto import record_pb2
from visualdl.reader.record_reader import RecordReader

from ppvision.run_folder import RunFolder, read_metrics


class Dashboard:
    """Writes a run's numbers and pictures; a resumed run drops what came after its checkpoint.

    Args:
        folder: the run's.
        use_vdl: also write a VisualDL record (one file; the server shows only the newest of a
            folder).
        start_step: what an earlier run from here recorded after this step is dropped.
    """

    def __init__(self, folder: RunFolder, use_vdl: bool, start_step: int = 0) -> None:
        kept = [row for row in read_metrics(folder.metrics) if row[0] <= start_step]
        self._file = folder.metrics.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._csv.writerow(("step", "tag", "value"))
        self._csv.writerows((step, tag, repr(value)) for step, tag, value in kept)
        self._vdl = _open_vdl(folder.vdl, start_step) if use_vdl else None
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._csv.writerow((step, tag, repr(float(value))))
        if self._vdl is not None:
            self._vdl.add_scalar(tag.replace("%", "percent"), float(value), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """`image` is `[H, W, 3]` uint8 RGB."""
        if self._vdl is not None:
            self._vdl.add_image(tag.replace("%", "percent"), image, step)

    def text(self, tag: str, text: str) -> None:
        if self._vdl is not None:
            self._vdl.add_text(tag, text, 0)

    def flush(self) -> None:
        self._file.flush()
        if self._vdl is not None:
            self._vdl._get_file_writer().flush()

    def close(self) -> None:
        self._file.close()
        if self._vdl is not None:
            self._vdl.close()


def _open_vdl(folder: Path, start_step: int) -> LogWriter:
    """A writer into one new record file that takes over earlier ones up to `start_step`."""
    earlier = sorted(folder.glob("vdlrecords.*"))
    records = [record for path in earlier for record in _read_records(path)]
    # Its own default name counts seconds: a resume within one second would add to the old file.
    writer = LogWriter(logdir=str(folder), file_name=f"vdlrecords.{time.time_ns()}.log")
    for record in records:
        if all(0 < value.id <= start_step for value in record.values):  # 0: texts, written anew
            writer._get_file_writer().add_record(record)
    for path in earlier:
        path.unlink()
    return writer


def _read_records(path: Path) -> list[record_pb2.Record]:
    """The records of a file, up to the first one that a killed run has cut short."""
    records = []
    for data in RecordReader(str(path)).get_all():
        try:
            records.append(record_pb2.Record.FromString(data))
        except DecodeError:
            break
    return records


def vdl_folders(runs: list[Path]) -> list[Path]:
    """The VisualDL folders of runs.

    Raises:
        FileNotFoundError: a run without one.
    """
    folders = []
    for run in runs:
        found = sorted(p.parent for p in Path(run).rglob("vdlrecords.*"))
        if not found:
            raise FileNotFoundError(
                f"dashboard: expected a run folder with VisualDL records, got {run}. "
                "Train with --use_vdl."
            )
        folders += found
    return list(dict.fromkeys(folders))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """`python -m ppvision.dashboard RUN...`: VisualDL over several runs, until it is stopped."""
    parser = argparse.ArgumentParser(prog="ppvision.dashboard", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be seen from elsewhere")
    parser.add_argument("--port", type=int, help="a free one")
    args = parser.parse_args()
    try:
        folders = vdl_folders(args.runs)
    except FileNotFoundError as error:
        sys.exit(str(error))
    port = args.port or free_port()
    print(f"VisualDL: http://{args.host}:{port} (Ctrl+C stops it)", flush=True)
    command = [sys.executable, "-m", "visualdl.server.app", "--host", args.host]
    command += ["--port", str(port), "--logdir", *map(str, folders)]
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main()
