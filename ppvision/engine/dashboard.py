"""Write the records of a run: for VisualDL, which needs a browser, and to `metrics.csv`."""

import argparse
import csv
import errno
import http
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np

from ppvision.console import show
from ppvision.engine.dashboard_arguments import add_dashboard_arguments
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.errors import (
    EngineError,
    InputError,
    MissingFileError,
    MissingPackageError,
    PpvisionError,
    shorten,
    shorten_text,
)
from ppvision.files import write_text

CHECK_LIVE = "/alive"  # where VisualDL answers 204
HISTOGRAM_BUCKETS = 30


class Dashboard:
    """Writes a run's numbers and images. A resumed run drops records after its checkpoint.

    Args:
        folder: the run's folder.
        use_vdl: also write a VisualDL record (one file; the server shows only the newest of a
            folder).
        use_tensorboard: also write records for TensorBoard.
        start_step: records of an earlier run after this step are dropped.
        evaluated: like `start_step`, for all tags except `Train/...`: an interrupted evaluation is
            repeated. Default: `start_step`.
    """

    def __init__(
        self,
        folder: RunFolder,
        use_vdl: bool,
        start_step: int = 0,
        evaluated: int | None = None,
        use_tensorboard: bool = False,
    ) -> None:
        evaluated = start_step if evaluated is None else evaluated
        # Before any file is opened, because a package may be missing.
        vdl = _vdl_records() if use_vdl else None
        tensorboard = _tensorboard_records() if use_tensorboard else None

        def kept(step: int, tag: str) -> bool:
            return step <= (start_step if tag.startswith("Train/") else evaluated)

        rows = [row for row in read_metrics(folder.metrics) if kept(row[0], row[1])]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "tag", "value"))
        writer.writerows((step, tag, repr(value)) for step, tag, value in rows)
        write_text(folder.metrics, text.getvalue())
        self._file = folder.metrics.open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._vdl = None if vdl is None else vdl.open_records(folder.vdl, kept)
        self._tensorboard = None
        if tensorboard is not None:
            self._tensorboard = tensorboard.TensorBoardRecords(folder.tensorboard, start_step)
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._csv.writerow((step, tag, repr(float(value))))
        if self._vdl is not None:
            self._vdl.add_scalar(_shown(tag), float(value), step)
        if self._tensorboard is not None:
            self._tensorboard.scalar(tag, float(value), step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """`image` is `[H, W, 3]` uint8 RGB."""
        if self._vdl is not None:
            self._vdl.add_image(_shown(tag), image, step)
        if self._tensorboard is not None:
            self._tensorboard.image(tag, image, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Write a histogram of any number of values."""
        if self._vdl is not None:
            self._vdl.add_histogram(_shown(tag), values.ravel(), step, buckets=HISTOGRAM_BUCKETS)
        if self._tensorboard is not None:
            self._tensorboard.histogram(tag, values, step, HISTOGRAM_BUCKETS)

    def text(self, tag: str, text: str) -> None:
        if self._vdl is not None:
            self._vdl.add_text(tag, text, 0)
        if self._tensorboard is not None:
            self._tensorboard.text(tag, text)

    def settings(self, values: dict[str, float | int | str], scores: list[str]) -> None:
        """Write the run's row for the page that compares settings: `values`, and the last point of
        each scalar in `scores`."""
        if self._vdl is not None:
            self._vdl.add_hparams(values, scores)
        if self._tensorboard is not None:
            self._tensorboard.settings(values)

    def flush(self) -> None:
        self._file.flush()
        if self._vdl is not None:
            self._vdl._get_file_writer().flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        if self._vdl is not None:
            self._vdl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _shown(tag: str) -> str:
    """Replace percent signs, because VisualDL's page cannot request a tag that contains one."""
    return tag.replace("%", "percent")


def _vdl_records() -> ModuleType:
    """Import `ppvision.engine.vdl_records`, whose package is not part of the core.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from ppvision.engine import vdl_records
    except ImportError as error:
        raise MissingPackageError(
            "Records for VisualDL need visualdl, which does not load here "
            f"({shorten_text(str(error), 200)}): pip install 'ppvision[dashboard]', or omit "
            "--use_vdl; metrics.csv has the same numbers."
        ) from error
    return vdl_records


def _tensorboard_records() -> ModuleType:
    """Import the module `tensorboard_records`, whose package is not part of the core.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from ppvision.engine import tensorboard_records
    except ImportError as error:
        raise MissingPackageError(
            "Records for TensorBoard need tensorboardX, which does not load here "
            f"({shorten_text(str(error), 200)}): pip install tensorboardX, or omit --logger "
            "tensorboard; metrics.csv has the same numbers."
        ) from error
    return tensorboard_records


def write_comparison(folder: Path, rows: dict[str, dict[str, object]]) -> None:
    """Write rows for VisualDL's page that compares settings; see `vdl_records.write_comparison`."""
    _vdl_records().write_comparison(folder, rows)


def find_vdl_folders(runs: list[Path]) -> list[Path]:
    """Return the VisualDL folders of runs.

    Raises:
        FileNotFoundError: a run has none.
    """
    folders = []
    for run in runs:
        found = sorted(p.parent for p in Path(run).rglob("vdlrecords.*"))
        if not found:
            raise MissingFileError(
                f"dashboard: expected a run folder with VisualDL records, got {run}. "
                "Train with --use_vdl."
            )
        folders += found
    return list(dict.fromkeys(folders))


def find_free_port(host: str = "127.0.0.1", first: int | None = None) -> int:
    """Return a port on which no program listens.

    Args:
        host: to listen on.
        first: first port to try; then the next ones are tried. Default: any.

    Raises:
        InputError: the host is not an address of this machine, the port needs other rights, or 100
            ports are in use.
    """
    ports = [0] if first is None else range(first, min(first + _PORTS, 65536))
    for port in ports:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as probe:
                # A port that a program has just closed counts as free, as for VisualDL.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
                return probe.getsockname()[1]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or error
                raise InputError(
                    f"dashboard: cannot listen on {shorten(host)}, port {port} ({reason}). Pass "
                    "another --host or --port."
                ) from error
    raise InputError(
        f"dashboard: expected a free port from {first} on, {len(ports)} are taken. Pass another "
        "--port."
    )


_PORTS = 100  # number of ports that are tried
_START_SECONDS = 60


def main() -> None:
    """`python -m ppvision.dashboard RUN...`: VisualDL over several runs, until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="ppvision.dashboard",
        description=main.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_dashboard_arguments(parser)
    args = parser.parse_args()
    try:
        code = serve_runs(args.runs, args.host, args.port, args.public_path)
    except PpvisionError as error:
        sys.exit(f"ppvision: {error}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def serve_runs(runs: list[Path], host: str, port: int | None, public_path: str) -> int:
    """Show runs in VisualDL until VisualDL ends or is stopped.

    Args:
        runs: folders of the runs.
        host, port: where to listen; None for any free port.
        public_path: path of the pages.

    Returns:
        VisualDL's exit code.

    Raises:
        PpvisionError: a folder has no record, or no address is free.
    """
    _vdl_records()  # the server is in the same package
    folders = find_vdl_folders(runs)
    free = find_free_port(host, port)
    if port not in (None, free):
        show(f"port {port} is taken by another program: taking {free}")
    return _serve(folders, host, free, public_path)


def _serve(folders: list[Path], host: str, port: int, public_path: str) -> int:
    """Run VisualDL until it ends or a signal ends this process; it never runs longer than this
    process.

    Raises:
        EngineError: another program answers at its address, or no program does.
    """
    # VisualDL names a run by its given path: `RUN/vdl`, relative to the folder of the runs.
    folders = [folder.resolve() for folder in folders]
    base = os.path.commonpath([folder.parent.parent for folder in folders])
    names = [os.path.relpath(folder, base) for folder in folders]
    command = [sys.executable, "-m", "visualdl.server.app", "--host", host, "--port", str(port)]
    command += ["--public-path", public_path, "--disable-telemetry", "--logdir", *names]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with subprocess.Popen(command, cwd=base) as server:
        try:
            # Without a port VisualDL would not end, because it waits for an answer at its address.
            if _wait_for_answer(server, host, port):
                shown = f"[{host}]" if ":" in host else host
                where = "" if public_path == "/app" else public_path
                show(f"VisualDL: http://{shown}:{port}{where} (Ctrl+C stops it)")
            return server.wait()
        finally:
            server.terminate()
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for_answer(server: subprocess.Popen, host: str, port: int) -> bool:
    """Whether VisualDL answers; False if it has ended."""
    # A server that listens on all addresses is asked on this one.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    end = time.monotonic() + _START_SECONDS
    while server.poll() is None:
        connection = http.client.HTTPConnection(host, port, timeout=5)
        try:
            connection.request("GET", CHECK_LIVE)
            if connection.getresponse().status == http.HTTPStatus.NO_CONTENT:
                return True
            raise EngineError(
                f"dashboard: another program has taken {host}:{port} just now. Try again, or pass "
                "another --port."
            )
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() > end:
                raise EngineError(
                    f"dashboard: VisualDL does not answer at {host}:{port} after "
                    f"{_START_SECONDS} s ({error})."
                ) from error
            time.sleep(0.2)
        finally:
            connection.close()
    return False
