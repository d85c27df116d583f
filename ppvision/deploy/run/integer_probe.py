"""Test whether the engine on this machine multiplies 8-bit integers without an error.

One small product, `integer_probe/model.pdmodel`, is run in OpenVINO and compared with whole numbers
in NumPy. Its sums are as large as sums in a network, so that the test detects an engine that adds
in 16 bits (on processors without VNNI). Scales are powers of two, so the result is exact.
"""

import functools
from pathlib import Path

import numpy as np

from ppvision.deploy.run.engines import join_error_lines, open_runtime
from ppvision.deploy.run.isolated import IsolatedRuntime
from ppvision.deploy.run.manifest import FILES

FOLDER = Path(__file__).parent / "integer_probe"
CHANNELS, SIDE = 64, 4
SCALE = 2.0**-7  # of a weight's code, and the step of the input's codes


def probe_weight() -> np.ndarray:
    """Return int8 `[64, 64, 1, 1]`, from -127 to 127; the first rows are all 127 and all -127."""
    places = np.arange(CHANNELS * CHANNELS).reshape(CHANNELS, CHANNELS, 1, 1)
    codes = (places * 37 + places // CHANNELS * 11) % 255 - 127
    codes[0], codes[1] = 127, -127
    return codes.astype(np.int8)


def probe_codes() -> np.ndarray:
    """Return codes of the input, `[1, 64, 4, 4]`, from 0 to 255; the first pixel is 255 in all
    channels."""
    places = np.arange(CHANNELS * SIDE * SIDE).reshape(1, CHANNELS, SIDE, SIDE)
    codes = places * 53 % 256
    codes[:, :, 0, 0] = 255
    return codes


def compute_expected_sums() -> np.ndarray:
    """Return int64 `[1, 64, 4, 4]`: the sums of products of whole numbers."""
    weight = probe_weight().astype(np.int64)[:, :, 0, 0]
    return np.einsum("oc,bchw->bohw", weight, probe_codes().astype(np.int64))


@functools.cache
def find_integer_fault(isolate: bool = False) -> str | None:
    """Return the problem with integers on this machine, or None. The test runs once per process.

    Args:
        isolate: run the test in a separate process.
    """
    x = (probe_codes() * SCALE).astype(np.float32)
    try:
        open_engine = IsolatedRuntime if isolate else open_runtime
        runtime = open_engine(
            FOLDER,
            "paddle",
            files=FILES["paddle"],
            threads=1,
            device="cpu",
            engine="openvino",
            bfloat16=False,
        )
        try:
            (found,) = runtime.run(x)
        finally:
            if isinstance(runtime, IsolatedRuntime):
                runtime.close()
    except Exception as error:  # Paddle raises many types of errors here
        return f"OpenVINO does not run a small product of integers ({join_error_lines(error)})"
    wrong = int((found.astype(np.float64) != compute_expected_sums() * SCALE**2).sum())
    if wrong:
        return f"{wrong} of {found.size} sums of a small product of integers are wrong"
    return None
