"""Check an export with integers before the folder appears, and write the results into
`deploy.yaml`. The rules: `ppvision.deploy.verify.integers`."""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from paddle import nn

from ppvision.deploy.run.engines import Batch
from ppvision.deploy.run.manifest import PrecisionCheck
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.integers import (
    EQUAL_LABELS,
    capture_products,
    check_products,
    measure_equal_labels,
)
from ppvision.deploy.verify.running import (
    Outputs,
    run_graphs,
    run_in_openvino,
    time_graphs,
    time_in_openvino,
)
from ppvision.deploy.write.integers import IntegerModel
from ppvision.deploy.write.onnx_integers import write_onnx_products
from ppvision.deploy.write.openvino import write_products
from ppvision.errors import EngineError

logger = logging.getLogger("ppvision")

_ROUNDS = 10  # timed runs of the integers and of float, in turn


class _Engine(NamedTuple):
    """The engine for the integers of a format.

    Attributes:
        name: its name in `deploy.yaml`.
        run, time: see `run_in_openvino` and `time_in_openvino`.
        write_products: see `ppvision.deploy.write.openvino.write_products`.
    """

    name: Literal["openvino", "onnxruntime"]
    run: Callable[[Sequence[Path], Sequence[Batch]], Outputs]
    time: Callable[[Sequence[Path], Batch, int], list[float]]
    write_products: Callable[[Sequence[nn.Layer], Sequence[Sequence[int]], Path], None]


_ENGINES = {
    # Looked up by name at the call, because tests replace these functions.
    "paddle": _Engine(
        "openvino",
        lambda folders, inputs: run_in_openvino(folders, inputs),
        lambda folders, x, rounds: time_in_openvino(folders, x, rounds),
        write_products,
    ),
    "onnx": _Engine(
        "onnxruntime",
        lambda folders, inputs: run_graphs(folders, "onnx", inputs, "native"),
        lambda folders, x, rounds: time_graphs(folders, "onnx", x, rounds),
        write_onnx_products,
    ),
}


def check_in_integers(
    integers: IntegerModel,
    raw: Path,
    probes: Sequence[Batch],
    *,
    outputs_of: Callable[[Batch], list[np.ndarray]],
    labels_of: Callable[[list[np.ndarray]], np.ndarray] | None,
    write_float: Callable[[Path], None],
    tolerance: float,
    format: str = "paddle",
) -> PrecisionCheck:
    """Compare an export's integers with eager mode, and time them against float.

    Args:
        integers: the model with integers.
        raw: folder with the graph of the model's outputs, for the engine.
        probes: inputs of the graph's size. The first is used for the single products and for
            timing. All are compared if there are no calibration images.
        outputs_of: function that gives the model's outputs in eager mode, in the graph's order.
        labels_of: function that gives scores of classes `[B, K, ...]` from outputs; None for a
            model without classes.
        write_float: writes the same graph in float into a new folder.
        tolerance: labels whose two highest scores are closer than this count as equal.
        format: format of the graphs: "paddle" runs in OpenVINO, "onnx" in ONNX Runtime.

    Returns:
        The results. `passed` is False, with a warning, if an engine fails, a product differs, or
        too few labels are equal.
    """
    first, engine = probes[0], _ENGINES[format]
    try:
        _check_products(integers, first, raw.parent / "products", engine)
        inputs = fill_batches(integers.pictures, count_pictures(first)) or probes
        eager = [outputs_of(x) for x in inputs]
        (found,) = engine.run([raw], inputs)
        worst = max(
            parity.relative_error(a, b)
            for ours, theirs in zip(eager, found, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        share = None
        if labels_of is not None:
            ours, theirs = ([labels_of(o) for o in side] for side in (eager, found))
            share = measure_equal_labels(ours, theirs, tolerance)
        as_float = raw.parent / "float"
        write_float(as_float)
        taken = engine.time([raw, as_float], first, _ROUNDS)
    except (parity.ParityError, EngineError) as error:
        warnings.warn(
            f"{error} precision='auto' therefore does not use the integers of this export.",
            stacklevel=3,
        )
        return PrecisionCheck(passed=False, engine=engine.name)
    passed = share is None or share >= EQUAL_LABELS
    if share is not None and not passed:
        warnings.warn(
            f"In integers {100 * (1 - share):.2f}% of the labels of the calibration images "
            f"differ from eager mode, allowed are {100 * (1 - EQUAL_LABELS):.1f}%. "
            "precision='auto' therefore does not use the integers of this export.",
            stacklevel=3,
        )
    logger.info(
        f"int8: {taken[0]:.2f} ms per run on one thread, float {taken[1]:.2f} ms "
        f"({taken[0] / taken[1]:.2f} of it)"
        + ("" if taken[0] < taken[1] else ". Float is not slower here: use a float export.")
    )
    return PrecisionCheck(
        passed=passed,
        engine=engine.name,
        max_error=worst,
        equal_labels=share,
        milliseconds=taken[0],
        float_milliseconds=taken[1],
    )


def _check_products(integers: IntegerModel, x: Batch, folder: Path, engine: "_Engine") -> None:
    products = capture_products(integers.model, x)
    shapes = [list(product.rounded.shape) for product in products]
    engine.write_products([product.layer for product in products], shapes, folder)
    named = {f"x{place}": product.rounded for place, product in enumerate(products)}
    check_products(products, engine.run([folder], [named])[0][0])


def count_pictures(batch: Batch) -> int:
    """Return the number of images of a batch, or of a detector's inputs."""
    return len(batch if isinstance(batch, np.ndarray) else next(iter(batch.values())))


def fill_batches(pictures: Sequence[Batch], batch: int) -> list[Batch]:
    """Join batches of one image to batches of the graph's size; fill the last batch with copies of
    its last image."""
    groups = [list(pictures[k : k + batch]) for k in range(0, len(pictures), batch)]
    return [_joined(group + group[-1:] * (batch - len(group))) for group in groups]


def _joined(batches: Sequence[Any]) -> Batch:
    if isinstance(batches[0], np.ndarray):
        return np.concatenate(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
