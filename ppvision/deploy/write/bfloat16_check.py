"""Check whether an export may run in bfloat16, and write the result into `deploy.yaml`.

Only processors with `amx_bf16` multiply bfloat16 faster than float32, so only there the check runs,
and only there `Predictor(precision="auto")` uses its result.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ppvision.deploy.run.manifest import PrecisionCheck
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.integers import EQUAL_LABELS, measure_equal_labels
from ppvision.deploy.verify.running import run_in_openvino, time_in_openvino
from ppvision.errors import EngineError

logger = logging.getLogger("ppvision")

INPUTS = 16  # inputs of noise on which labels are compared
_ROUNDS = 10  # timed runs in bfloat16 and in float32, in turn


def check_in_bfloat16(
    raw: Path,
    shape: Sequence[int],
    outputs_of: Callable[[np.ndarray], list[np.ndarray]],
    tolerance: float,
) -> PrecisionCheck:
    """Compare a graph in bfloat16 with eager mode in float32, and time it against float32.

    Args:
        raw: folder with the graph of the model's outputs for OpenVINO; the first output has scores
            of classes `[B, K, ...]`.
        shape: of an input, `[B, C, H, W]`.
        outputs_of: function that gives the model's outputs in eager mode.
        tolerance: labels whose two highest scores are closer than this count as equal.

    Returns:
        The result. `passed` is False if OpenVINO fails, if fewer labels than `EQUAL_LABELS` are
        equal, or if bfloat16 takes longer than float32.
    """
    generator = np.random.default_rng(0)
    inputs = [generator.normal(size=shape).astype(np.float32) for _ in range(INPUTS)]
    try:
        eager = [outputs_of(x) for x in inputs]
        (found,) = run_in_openvino([raw], inputs, bfloat16=True)
        taken = time_in_openvino([raw, raw], inputs[0], _ROUNDS, bfloat16=[True, False])
    except EngineError as error:
        warnings.warn(
            f"bfloat16: {error} precision='auto' therefore does not use it for this export.",
            stacklevel=3,
        )
        return PrecisionCheck(passed=False, engine="openvino")
    pairs = list(zip(eager, found, strict=True))
    worst = max(parity.relative_error(a, b) for pair in pairs for a, b in zip(*pair, strict=True))
    share = measure_equal_labels([a[0] for a, _ in pairs], [b[0] for _, b in pairs], tolerance)
    passed = share >= EQUAL_LABELS and taken[0] < taken[1]
    logger.info(
        f"bfloat16: {100 * share:.2f}% of the labels as in float32, {taken[0]:.2f} ms per run on "
        f"one thread, float {taken[1]:.2f} ms: precision='auto' "
        f"{'uses' if passed else 'does not use'} it"
    )
    return PrecisionCheck(
        passed=passed,
        engine="openvino",
        max_error=worst,
        equal_labels=share,
        milliseconds=taken[0],
        float_milliseconds=taken[1],
    )
