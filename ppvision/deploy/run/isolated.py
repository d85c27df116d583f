"""An engine in a separate process, which frees its memory when it is closed.

Paddle 3.2 keeps the memory of OpenVINO until the process ends. Here that process is a child: it
opens the engine, answers runs, and ends with the object that started it.

Arrays pass through pipes as `.npy` data, each after its length; nothing is unpickled.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import IO

import numpy as np

from ppvision.deploy.run.engines import Batch, Engine, ModelFiles, open_runtime
from ppvision.errors import EngineError

# `os._exit` skips the clean-up of Paddle and OpenVINO, which has nothing to do.
_CHILD = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print
from ppvision.deploy.run.isolated import serve
serve(json.loads(sys.argv[2]), sys.stdin.buffer, answers)
os._exit(0)
"""

_SECONDS_TO_END = 10


class IsolatedRuntime:
    """Like `PaddleRuntime` or `OnnxRuntime`, but in a child process.

    Args:
        folder: of an export.
        format: "paddle" or "onnx".
        files: names of the model's files in the folder.
        threads, device, engine, bfloat16, integers: see `open_runtime`.

    Raises:
        EngineError: the child does not start or does not open the engine.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        *,
        files: ModelFiles,
        threads: int | None,
        device: str,
        engine: Engine,
        bfloat16: bool,
        integers: bool = True,
    ) -> None:
        how = {
            "folder": str(folder),
            "format": format,
            "files": astuple(files),
            "threads": threads,
            "device": device,
            "engine": engine,
            "bfloat16": bfloat16,
            "integers": integers,
        }
        self._lock = threading.Lock()
        self._owner = os.getpid()
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, json.dumps(sys.path), json.dumps(how)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:  # for example no memory for another process
            raise EngineError(
                f"isolate: the engine's process could not be started ({error})."
            ) from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._questions, self._answers = process, process.stdin, process.stdout
        try:
            (said,) = self._receive()  # the child says that the engine is open
        except EngineError:
            self.close()
            raise
        self.input_shapes = json.loads(said.tobytes())

    def engine_objects(self) -> list[object]:
        """Return nothing, because the engine is not in this process."""
        return []

    def run(self, batch: Batch) -> list[np.ndarray]:
        """As `PaddleRuntime.run`.

        Raises:
            EngineError: the engine fails, its process has ended, or belongs to the process that
                this one was forked from.
        """
        if os.getpid() != self._owner:
            raise EngineError(
                "isolate: this engine belongs to the process that opened it. Make the Predictor in "
                "the process that uses it, after the fork."
            )
        named = {"": batch} if isinstance(batch, np.ndarray) else batch
        with self._lock:
            try:
                _send(self._questions, named)
            except (OSError, ValueError) as error:
                raise self._ended() from error
            return self._receive()

    def _receive(self) -> list[np.ndarray]:
        try:
            found = _read(self._answers)
        except (OSError, EOFError, ValueError) as error:
            raise self._ended() from error
        if "error" in found:
            raise EngineError(str(found["error"]))
        return list(found.values())

    def _ended(self) -> EngineError:
        code = self._process.poll()
        return EngineError(f"isolate: the engine's process has ended (exit code {code}).")

    def close(self) -> None:
        """End the process; a second call, or one in a forked child, does nothing."""
        if os.getpid() != self._owner:
            return
        for stream in (self._questions, self._answers):
            with contextlib.suppress(OSError):
                stream.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()


# -- the child's side ------------------------------------------------------------------------------


def serve(how: dict, questions: IO[bytes], answers: IO[bytes]) -> None:
    """Open an engine and answer runs until the questions end."""
    try:
        runtime = open_runtime(
            Path(how["folder"]),
            how["format"],
            files=ModelFiles(*how["files"]),
            threads=how["threads"],
            device=how["device"],
            engine=how["engine"],
            bfloat16=how["bfloat16"],
            integers=how["integers"],
        )
    except Exception as error:  # engines raise many types of errors
        _send(answers, {"error": np.array(f"{type(error).__name__}: {error}")})
        return
    shapes = json.dumps(getattr(runtime, "input_shapes", {})).encode()
    _send(answers, {"shapes": np.frombuffer(shapes, np.uint8)})
    while True:
        try:
            named = _read(questions)
        except EOFError:  # the parent has closed the pipe, or has ended
            return
        batch = named[""] if list(named) == [""] else named
        try:
            outputs = runtime.run(batch)
        except Exception as error:
            _send(answers, {"error": np.array(f"{type(error).__name__}: {error}")})
        else:
            _send(answers, {str(place): array for place, array in enumerate(outputs)})


def _send(stream: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    stream.write(len(arrays).to_bytes(8, "little"))
    for name, array in arrays.items():
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        encoded = name.encode()
        for part in (encoded, data.getbuffer()):
            stream.write(len(part).to_bytes(8, "little"))
            stream.write(part)
    stream.flush()


def _read(stream: IO[bytes]) -> dict[str, np.ndarray]:
    found = {}
    for _ in range(int.from_bytes(_exactly(stream, 8), "little")):
        name = _exactly(stream, int.from_bytes(_exactly(stream, 8), "little")).decode()
        data = _exactly(stream, int.from_bytes(_exactly(stream, 8), "little"))
        found[name] = np.load(io.BytesIO(data), allow_pickle=False)
    return found


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
