"""Verbs in the test's process, scripts in their own, and what a run recorded."""

import os
import subprocess

from visualdl.proto import record_pb2
from visualdl.reader.record_reader import RecordReader

from ppvision.cli import run


def ppvision(*arguments) -> int:
    return run([str(a) for a in arguments])


def shell(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command],
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=500,
    )


def records(run_folder) -> list:
    (path,) = (run_folder / "vdl").glob("vdlrecords.*")
    stored = [record_pb2.Record.FromString(data) for data in RecordReader(str(path)).get_all()]
    return [value for record in stored for value in record.values]
