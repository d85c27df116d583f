"""A signal ends a command, whatever Paddle does with signals."""

import signal
import subprocess
import sys

# A process that has the verbs' device set, says what SIGTERM does in C, and waits.
CODE = """
import ctypes, sys
from ppvision.cli.opening import set_device
set_device("cpu")

class Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("rest", ctypes.c_byte * 256)]

action = Action()
assert ctypes.CDLL(None).sigaction(15, None, ctypes.byref(action)) == 0
print(action.handler or 0, flush=True)
sys.stdin.read()
"""


def test_paddles_handler_is_gone():
    """By it a process that was told to end while it took memory would wait for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert int(process.stdout.readline()) == signal.SIG_DFL
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
