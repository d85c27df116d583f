"""paddle2onnx in processes that are forked from one that has imported it: that takes seconds."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ppvision.deploy.write import onnx

# Each line of its input is a request: the words of `onnx._CHILD`, where its output and its result
# go, and its folder for temporary files. It answers with the child's exit code.
_SERVER = """
import json, os, sys
import paddle2onnx
for line in sys.stdin:
    code, words, log, result, scratch = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        os.environ["TMPDIR"] = scratch
        pipe = os.open(result, os.O_WRONLY | os.O_CREAT)
        sys.argv = ["-c", words[0], str(pipe), *words[1:]]
        exec(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Converter:
    """Stands for `onnx._run_child`. The server starts with the first conversion."""

    def __init__(self) -> None:
        self.server: subprocess.Popen | None = None

    def __call__(self, folders: Sequence[Path], log: int, scratch: str) -> tuple[bytes, int]:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            atexit.register(self.close)
        words = [json.dumps(sys.path), str(onnx._OPSET), *map(str, folders)]
        result = Path(scratch, "converted")
        request = [onnx._CHILD, words, f"/proc/{os.getpid()}/fd/{log}", str(result), scratch]
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return (result.read_bytes() if result.exists() else b""), code

    def close(self) -> None:
        with self.server:
            self.server.stdin.close()
