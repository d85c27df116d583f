"""Run models in eager mode, and exported graphs in this process or in a separate one."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ppvision.deploy.run.engines import (
    Batch,
    Engine,
    fail_as,
    join_error_lines,
    name_engine,
    open_runtime,
)
from ppvision.errors import EngineError, PpvisionError

# Seconds for OpenVINO's comparison, including loading Paddle. The largest networks of
# benchmark/openvino_networks.py compile in a tenth of this.
TIME_LIMIT = 900

Outputs = list[list[list[np.ndarray]]]  # per folder, per input


@paddle.no_grad()
def run_eagerly(model: nn.Layer, batch: Batch) -> Any:
    """Return a model's outputs for a batch `[B, C, H, W]`, or a detector's for its inputs by
    name."""
    if isinstance(batch, np.ndarray):
        return model(paddle.to_tensor(batch))
    return model(**{name: paddle.to_tensor(array) for name, array in batch.items()})


def run_graphs(
    folders: Sequence[Path],
    format: str,
    inputs: Sequence[Batch],
    engine: Engine,
    *,
    bfloat16: bool = False,
) -> Outputs:
    """Run graphs on the same inputs.

    Args:
        folders: folders with the files of an export of `format`.
        format: "paddle" or "onnx".
        inputs: see `PaddleRuntime.run`.
        engine: engine for format "paddle".
        bfloat16: whether OpenVINO computes in bfloat16.

    Raises:
        EngineError: a graph does not load or does not run.
    """
    name = name_engine(format, engine)
    with fail_as(f"{name} does not load the exported graph"):
        runtimes = [
            open_runtime(folder, format, engine=engine, bfloat16=bfloat16) for folder in folders
        ]
    found: Outputs = [[] for _ in folders]
    for x in inputs:
        with fail_as(f"{name}, input {_shape_of(x)}: the exported graph does not run"):
            for outputs, runtime in zip(found, runtimes, strict=True):
                outputs.append(runtime.run(x))
    return found


def _shape_of(x: Batch) -> list[int]:
    return list((x if isinstance(x, np.ndarray) else next(iter(x.values()))).shape)


# `os._exit` skips the clean-up of Paddle and OpenVINO, which has nothing to do.
_CHILD = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what libraries print
from ppvision.deploy.verify.running import answer_parent
answer.write(answer_parent(sys.stdin.buffer.read(), sys.argv[2:]))
answer.flush()
os._exit(0)
"""


def run_in_openvino(
    folders: Sequence[Path],
    inputs: Sequence[Batch],
    limit: float = TIME_LIMIT,
    *,
    bfloat16: bool = False,
) -> Outputs:
    """`run_graphs` in OpenVINO, in a separate process.

    OpenVINO's compiler crashes on some networks. Paddle also keeps the memory of OpenVINO until the
    process ends; here the end of the process frees it.

    Args:
        limit: time limit in seconds.
        bfloat16: see `run_graphs`.

    Raises:
        EngineError: a graph does not load or run; the process cannot be started, crashed or took
            longer than `limit`.
        OSError: there is no space for its temporary folder next to the graphs.
    """
    question = {f"{i}": x for i, x in enumerate(inputs)}
    answer = _ask_child(folders, question | {"bfloat16": np.array([bfloat16])}, limit)
    return [
        [
            [answer[f"{folder}.{place}.{k}"] for k in range(int(answer[f"{folder}.{place}"]))]
            for place in range(len(inputs))
        ]
        for folder in range(len(folders))
    ]


def _ask_child(
    folders: Sequence[Path], question: Mapping[str, Batch], limit: float
) -> dict[str, np.ndarray]:
    name = name_engine("paddle", "openvino")
    # A killed process leaves its temporary files behind.
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as scratch:
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, json.dumps(sys.path), *map(str, folders)],
                input=_pack(question),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": scratch},
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{name} took more than {limit:.0f} s.") from error
        except OSError as error:  # for example no memory for another process
            raise EngineError(
                f"{name} could not be started ({join_error_lines(error)})."
            ) from error
    if child.returncode != 0:
        raise EngineError(f"{name} ended its process ({_end(child.returncode)}).")
    answer = _unpack(child.stdout)
    if "error" in answer:
        raise EngineError(str(answer["error"]))
    return answer


def time_in_openvino(
    folders: Sequence[Path],
    x: Batch,
    rounds: int,
    limit: float = TIME_LIMIT,
    *,
    bfloat16: Sequence[bool] = (),
) -> list[float]:
    """Return the milliseconds of a run of each graph on one thread: the median of `rounds`, run in
    turn.

    Args:
        folders: folders with the graphs.
        x: the input of all.
        rounds: timed runs of each.
        limit: time limit in seconds.
        bfloat16: whether OpenVINO computes each in bfloat16. Default: none.

    Raises:
        EngineError, OSError: see `run_in_openvino`.
    """
    flags = np.array(bfloat16 or [False] * len(folders))
    question = {"0": x, "rounds": np.array(rounds), "bfloat16": flags}
    answer = _ask_child(folders, question, limit)
    return answer["milliseconds"].tolist()


def answer_parent(packed: bytes, folders: Sequence[str]) -> bytes:
    """Answer in the child of `run_in_openvino`: return packed outputs for packed inputs, or an
    error."""
    given = _unpack(packed)
    rounds, bfloat16 = given.pop("rounds", None), given.pop("bfloat16").tolist()
    inputs: list[Batch] = []
    for place in range(len({key.partition(".")[0] for key in given})):
        prefix = f"{place}."
        named = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
        inputs.append(named or given[f"{place}"])
    if rounds is not None:
        try:
            paths = [Path(folder) for folder in folders]
            taken = time_graphs(paths, "paddle", inputs[0], int(rounds), bfloat16)
        except PpvisionError as error:
            return _pack({"error": np.array(str(error))})
        return _pack({"milliseconds": np.array(taken)})
    try:
        paths = [Path(folder) for folder in folders]
        outputs = run_graphs(paths, "paddle", inputs, "openvino", bfloat16=bfloat16[0])
    except PpvisionError as error:
        return _pack({"error": np.array(str(error))})
    answer: dict[str, Batch] = {}
    for i, by_input in enumerate(outputs):
        for j, arrays in enumerate(by_input):
            answer[f"{i}.{j}"] = np.array(len(arrays))
            answer.update({f"{i}.{j}.{k}": array for k, array in enumerate(arrays)})
    return _pack(answer)


def time_graphs(
    folders: Sequence[Path], format: str, x: Batch, rounds: int, bfloat16: Sequence[bool] = ()
) -> list[float]:
    """Like `time_in_openvino`, but in this process: format "paddle" in OpenVINO, "onnx" in ONNX
    Runtime."""
    with fail_as(f"{name_engine(format, 'openvino')} does not run the exported graph"):
        runtimes = [
            open_runtime(folder, format, engine="openvino", threads=1, bfloat16=flag)
            for folder, flag in zip(folders, bfloat16 or [False] * len(folders), strict=True)
        ]
        taken: list[list[float]] = [[] for _ in folders]
        for number in range(rounds + 1):
            for own, runtime in zip(taken, runtimes, strict=True):
                start = time.perf_counter()
                runtime.run(x)
                if number:  # the first run compiles
                    own.append(1e3 * (time.perf_counter() - start))
    return [float(np.median(own)) for own in taken]


def _pack(batches: Mapping[str, Batch]) -> bytes:
    """Pack as .npz; the entries of a mapping get the name `key.name`."""
    arrays: dict[str, np.ndarray] = {}
    for key, batch in batches.items():
        if isinstance(batch, np.ndarray):
            arrays[key] = batch
        else:
            arrays.update({f"{key}.{name}": array for name, array in batch.items()})
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's own says bool for any keyword
    return file.getvalue()


def _unpack(packed: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return dict(arrays)


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
