"""A `python` for shell scripts that starts at once: each is forked from one process, which has
imported Paddle. A new process takes seconds for that.

    with serve_python(folder) as programs:      # a folder with `python` and `ppvision`, for PATH

Each has its own memory, working folder, environment, streams, signals and exit code, as a new
process has. It takes `-m MODULE`, `-c CODE`, `-` and a file.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.waiting import wait_until

# What PATH has as `python`. It sends its words, folder and variables with its streams, then passes
# signals on until it gets the exit code. If it is killed, the other end of the socket is closed.
_CLIENT = """#!{python} -ISs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
words = {words} + sys.argv[1:]
request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
sys.exit((server.recv(1) or b"\\1")[0])
"""


@contextlib.contextmanager
def serve_python(folder: Path) -> Iterator[Path]:
    """Write the programs into a new folder and serve them while the block runs."""
    folder.mkdir(parents=True)
    address = f"{folder}/socket"
    for name, words in (("python", []), ("python3", []), ("ppvision", ["-m", "ppvision"])):
        program = _CLIENT.format(python=sys.executable, address=address, words=words)
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.forked_python", address]
    with subprocess.Popen(command) as server:
        try:
            wait_until(lambda: os.path.exists(address) or server.poll() is not None)
            yield folder
        finally:
            server.kill()  # SIGTERM makes Paddle print a trace


# -- the server ------------------------------------------------------------------------------------


def main() -> None:
    from ppvision.environment import prefer_fast_mkl

    prefer_fast_mkl()
    import ppvision.cli
    import ppvision.zoo  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes between
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1] + ".new")
        server.listen()
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    """Run one program in a child, pass signals to it, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb", buffering=0) as file:
        request = b""
        while len(request) < int.from_bytes(head, "big"):
            request += file.read(int.from_bytes(head, "big") - len(request))
    program = os.fork()
    if program == 0:
        client.close()
        _run(*json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(program)
    watched = [ended, client]
    while ended not in select.select(watched, [], [])[0]:
        number = client.recv(1)
        os.kill(program, number[0] if number else signal.SIGTERM)
        if not number:
            watched.remove(client)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.send(bytes([status if status >= 0 else 128 - status]))
    os._exit(0)


def _run(words: list[str], folder: str, variables: dict[str, str], streams: list[int]) -> None:
    """What a new Python does with these words; ends the process."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    code: object = 0
    try:
        _start(words)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


def _start(words: list[str]) -> None:
    first, *rest = words
    sys.path.insert(0, str(Path(first).parent.absolute()) if first[0] != "-" else os.getcwd())
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        code = rest.pop(0) if first == "-c" else sys.stdin.read()
        sys.argv = [first, *rest]
        main_module = type(sys)("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(code, first, "exec"), vars(main_module))
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
