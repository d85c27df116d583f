"""Run a model and its export on the same inputs, and compare them by the rule of `parity`."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.deploy.run.engines import (
    ONE_PIXEL,
    Engine,
    enlarges,
    join_error_lines,
    name_engine,
)
from ppvision.deploy.run.manifest import FILES
from ppvision.deploy.run.task_table import TENSOR_TASKS, softmax
from ppvision.deploy.run.transforms import Normalize, Transforms
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.running import run_eagerly, run_graphs, run_in_openvino
from ppvision.errors import InputError
from ppvision.quant.packed import FixedActivation, IntegerRounding

_TRIALS = 8  # runs per probe that differ in their last digits
Probe = tuple[np.ndarray, list[np.ndarray]]  # an input and the model's outputs in eager mode


def make_eager_probes(
    model: nn.Layer, task: str, shape: Sequence[int | None], pipeline: Transforms
) -> list[Probe]:
    """Make inputs for the parity check, with the model's own outputs, at sizes that the model
    accepts.

    Args:
        model: in evaluation mode.
        task: one of `TENSOR_TASKS`; it decides which outputs are kept.
        shape: `[B, C, H, W]` of the export, None for any size.
        pipeline: its `Normalize` gives the images realistic magnitudes.

    Raises:
        ValueError: the model does not run at any of the sizes, or its outputs are not finite
            numbers in tensors.
    """
    mean, std = np.zeros(1), np.ones(1)
    for transform in pipeline.transforms:
        if isinstance(transform, Normalize):
            mean, std = 255 * transform.mean, 255 * transform.std
    failure: tuple[tuple[int, ...], Exception] | None = None
    for shapes in parity.probe_shapes(shape):
        inputs = [x for probed in shapes for x in parity.probe_batches(probed, mean, std)]
        try:
            outputs = [run_eagerly(model, x) for x in inputs]
        except Exception as error:  # a model may raise anything at a size that it does not accept
            failure = failure or (shapes[0], error)
            continue
        if failure is not None:
            warnings.warn(
                f"The model does not run on an input of {list(failure[0])} "
                f"({join_error_lines(failure[1])}); the export is checked on "
                f"{[list(s) for s in shapes]} only.",
                stacklevel=3,
            )
        arrays = [
            convert_to_arrays(output, task, x.shape)
            for x, output in zip(inputs, outputs, strict=True)
        ]
        return list(zip(inputs, arrays, strict=True))
    assert failure is not None  # there is at least one shape
    size, cause = failure
    raise InputError(
        f"model: expected one that runs on inputs of input_shape={shape}, but at every size tried "
        f"it failed; on {list(size)} it raised {join_error_lines(cause)}"
    ) from cause


def measure_rounding_error(model: nn.Layer, task: str, probes: Sequence[Probe]) -> float:
    """`measure_largest_move` of a model's outputs.

    Args:
        model: in evaluation mode.
        task: as of `make_eager_probes`.
        probes: from it.
    """
    return measure_largest_move(
        model, lambda x: convert_to_arrays(run_eagerly(model, x), task, x.shape), probes
    )


def measure_largest_move(
    model: nn.Layer,
    outputs_of: Callable[[np.ndarray], list[np.ndarray]],
    probes: Sequence[Probe],
) -> float:
    """Measure how far the outputs of a model with rounded activations move by themselves. This is
    the largest `parity.relative_error` over a few runs in which the image, and then also the input
    of each rounding, changes by the fraction `parity.LAST_DIGITS`.

    Args:
        model: the model with the layers that round.
        outputs_of: function that gives an image's outputs in eager mode.
        probes: images with their outputs.
    """
    random = np.random.default_rng(0)

    def move(x: np.ndarray) -> np.ndarray:
        noise = random.standard_normal(x.shape, dtype=np.float32)
        return (x * (1.0 + parity.LAST_DIGITS * noise)).astype(np.float32)

    def largest() -> float:
        worst = 0.0
        for x, eager in probes:
            for _ in range(_TRIALS):
                pairs = zip(eager, outputs_of(move(x)), strict=True)
                worst = max([worst, *(parity.relative_error(a, b) for a, b in pairs)])
        return worst

    of_picture = largest()
    # If the first layer rounds the image, its last digits have no further effect.
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: paddle.to_tensor(move(inputs[0].numpy())))
        for layer in model.sublayers(include_self=True)
        if isinstance(layer, (FixedActivation, IntegerRounding))
    ]
    try:
        return max(of_picture, largest()) if hooks else of_picture
    finally:
        for hook in hooks:
            hook.remove()


def convert_to_arrays(output: Any, task: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return a model's outputs for an input of `shape`: those that an export of the task keeps.

    Raises:
        InputError: the outputs are not finite numbers in tensors.
    """
    tensors = list(output) if isinstance(output, (list, tuple)) else [output]
    if not TENSOR_TASKS[task].every_output:
        tensors = tensors[:1]
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise InputError(
            f"model: expected a tensor or a list of tensors, got {type(output).__name__}. "
            "Wrap the model in a Layer that returns its logits."
        )
    arrays = [t.numpy() for t in tensors]
    if not all(np.isfinite(a).all() for a in arrays):
        raise InputError(
            f"model: gives numbers that are not finite for an input of {list(shape)}, so that "
            "nothing can be compared. Check its weights."
        )
    return arrays


def _warn_if_blind(probes: Sequence[Probe], tolerance: float) -> None:
    largest = max(np.abs(array).max() for _, arrays in probes for array in arrays)
    if largest <= tolerance:
        warnings.warn(
            f"The model's outputs are at most {largest:.3g}, below the parity bound {tolerance:.3g}"
            ": the comparison with eager mode cannot fail and shows nothing. Export trained "
            "weights.",
            stacklevel=3,
        )


def compare(
    probes: Sequence[Probe], raw: Path, final: Path, output_op: str, format: str, tolerance: float
) -> tuple[float, bool | None]:
    """Run an export on the probes in every engine for which it is made.

    Args:
        probes: from `make_eager_probes`.
        raw: folder with the graph up to the logits (or features).
        final: folder with the deployed graph, including `output_op`; equal to `raw` if that is
            none.
        output_op: "argmax", "softmax" or "none".
        format: "paddle" or "onnx".
        tolerance: the limit of the rule.

    Returns:
        The largest error of the logits, and whether oneDNN may run the export (None for ONNX). It
        may not if it fails or gives other numbers; a warning says so.

    Raises:
        ParityError: the error in any other engine is above the limit.
        RuntimeError: the graph does not run in any other engine.
    """
    _warn_if_blind(probes, tolerance)
    if format == "onnx":
        return _compare(probes, raw, final, output_op, format, tolerance, "native"), None
    worst = _compare(probes, raw, final, output_op, format, tolerance, "native")
    if enlarges(raw / FILES["paddle"].program) and all(
        max(x.shape[2:]) <= ONE_PIXEL for x, _ in probes
    ):
        warnings.warn(
            "oneDNN's kernels that enlarge feature maps fail on maps of one pixel, which images "
            f"of up to {ONE_PIXEL}x{ONE_PIXEL} may give. The export runs without oneDNN, which is "
            "slower on a CPU.",
            stacklevel=3,
        )
        return worst, False
    try:
        error = _compare(probes, raw, final, output_op, format, tolerance, "onednn")
    except (parity.ParityError, RuntimeError) as failure:
        # Some oneDNN kernels of Paddle have faults: bilinear enlargement with align_corners, NHWC.
        warnings.warn(
            f"{failure} The export runs without oneDNN, which is slower on a CPU.", stacklevel=3
        )
        return worst, False
    return max(worst, error), True


def compare_openvino(
    probes: Sequence[Probe], raw: Path, final: Path, output_op: str, tolerance: float
) -> float:
    """Like `compare`, for the graphs of OpenVINO, which runs in a separate process. Return the
    largest error.

    Raises:
        ParityError: above the bound.
        RuntimeError: OpenVINO does not run the graph, crashes, or takes too long.
    """
    return _compare(probes, raw, final, output_op, "paddle", tolerance, "openvino")


def _compare(
    probes: Sequence[Probe],
    raw: Path,
    final: Path,
    output_op: str,
    format: str,
    tolerance: float,
    engine: Engine,
) -> float:
    name, worst = name_engine(format, engine), 0.0
    folders = [raw] if final == raw else [raw, final]
    inputs = [x for x, _ in probes]
    if engine == "openvino":
        outputs = run_in_openvino(folders, inputs)
    else:
        outputs = run_graphs(folders, format, inputs, engine)
    for (x, eager), raw_outputs, final_outputs in zip(probes, outputs[0], outputs[-1], strict=True):
        where = f"{name}, input {list(x.shape)}"
        worst = max(worst, parity.check_close(eager, raw_outputs, tolerance, where))
        if output_op == "argmax":
            parity.check_classes(eager[0], final_outputs[0], tolerance, where)
        elif output_op == "softmax":
            parity.check_close([softmax(eager[0])], final_outputs, tolerance, where)
    return worst
