"""Run paddle2onnx in a separate process, because a model that it cannot convert ends its
process."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ppvision.errors import EngineError, MissingPackageError
from ppvision.files import check_room

# From ONNX opset 17 on, LayerNorm is one operator.
_OPSET = 17

# The result comes through a pipe, so that a child whose parent was killed writes no file.
# `os._exit` skips Paddle's clean-up, which is not needed.
_CHILD = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
import paddle2onnx
# Without a file name: with one, paddle2onnx runs Polygraphy, which may install packages.
with open(int(sys.argv[2]), "wb") as pipe:
    for folder in sys.argv[4:]:
        data = paddle2onnx.export(
            folder + "/model.json",
            folder + "/model.pdiparams",
            save_file=None,
            opset_version=int(sys.argv[3]),
        )
        pipe.write(len(data).to_bytes(8, "little") + data)
os._exit(0)
"""


def convert_folders(folders: Sequence[Path], *, any_size: bool) -> None:
    """Replace Paddle's graph in each folder, `model.json` and `model.pdiparams`, by `model.onnx`.

    Args:
        folders: folders that `paddle.jit.save` wrote. One process converts all of them, because it
            takes seconds to start.
        any_size: whether height or width is free, for the advice in the error.

    Raises:
        EngineError: paddle2onnx cannot convert one; the message names the operator if paddle2onnx
            does.
        MissingPackageError: paddle2onnx is not installed.
    """
    if importlib.util.find_spec("paddle2onnx") is None:
        raise MissingPackageError(
            "An ONNX export needs paddle2onnx, which is not installed: pip install paddle2onnx"
        )
    with (
        tempfile.TemporaryFile() as log,
        # paddle2onnx leaves its temporary folder behind if it is aborted.
        tempfile.TemporaryDirectory(prefix="ppvision-") as scratch,
    ):
        data, code = _run_child(folders, log.fileno(), scratch)
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
        if code != 0:
            check_room(Path(scratch), Path(scratch))
    for folder in folders:
        length = int.from_bytes(data[:8], "little")
        converted, data = data[8 : 8 + length], data[8 + length :]
        if code != 0 or not converted:
            advice = "Export with format='paddle'."
            if any_size:
                advice = (
                    "Some operators are converted at a fixed size only: give height and width "
                    "(--input_shape 1 3 512 512, in Python input_shape=[1, 3, 512, 512]). Or "
                    "export with format='paddle'."
                )
            raise EngineError(
                f"paddle2onnx cannot convert this model: {_reason(said, code)} {advice}"
            )
        (folder / "model.onnx").write_bytes(converted)
        (folder / "model.json").unlink()
        (folder / "model.pdiparams").unlink()


def _run_child(folders: Sequence[Path], log: int, scratch: str) -> tuple[bytes, int]:
    """Return the output of the child, and how it ended: 0, an exit code, or a negative signal."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as pipe:
        arguments = [json.dumps(sys.path), str(write_end), str(_OPSET), *map(str, folders)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write_end,),
                env={**os.environ, "TMPDIR": scratch},
            )
        finally:
            os.close(write_end)
        try:
            return pipe.read(), process.wait()
        finally:
            if process.poll() is None:  # for example after Ctrl-C
                process.kill()
                process.wait()


def _reason(said: str, code: int) -> str:
    """Return paddle2onnx's error in one line."""
    errors = [
        match[1].strip()
        for line in said.splitlines()
        if (match := re.match(r"\[ERROR\]\[Paddle2ONNX\]\s*(.*)", line))
    ]
    named = [re.sub(r"^\[OP: (?:pd_op\.)?(\S+)\]", r"operator \1:", e) for e in errors]
    # The last line has no information: "There are unsupported features."
    if named:
        first = next((text for text in named if text.startswith("operator ")), named[0])
        return f"{first[:300].rstrip('.')}."
    if code == -signal.SIGKILL:
        return "its process was killed, perhaps because memory ran out."
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{lines[-1][:300].rstrip('.')}." if lines else f"it ended with code {code}."
