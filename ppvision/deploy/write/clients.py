"""Write the files that PaddleSeg's and PaddleDetection's own clients need in addition to the graph.

`deploy/python/infer.py` and the C++ programs of both read a description: PaddleSeg's read the entry
`Deploy` of `deploy.yaml`, PaddleDetection's read `infer_cfg.yml`. On a CPU they cannot run a
`model.json` (`ppvision.deploy.verify.clients`). They can run the same graph in the earlier format,
`model.pdmodel`, which is in the same folder and uses the same weights.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from ppvision.deploy.run.manifest import FILES
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.clients import run_like_clients
from ppvision.deploy.verify.detection_parity import Bounds, check_found
from ppvision.deploy.write.graph import trace, trace_detector
from ppvision.deploy.write.openvino import write_earlier_program
from ppvision.errors import PpvisionError
from ppvision.forms.earlier_format import earlier_format
from ppvision.safe_yaml import format_short_yaml

logger = logging.getLogger("ppvision")

INFER_CONFIG = "infer_cfg.yml"
_PROGRAM = FILES["paddle"].earlier_program
_WEIGHTS = str(FILES["paddle"].weights)


def write_client_program(
    model: nn.Layer,
    input_shape: Sequence[int | None],
    probes: Sequence[tuple[np.ndarray, list[np.ndarray]]],
    folder: Path,
    tolerance: float,
) -> bool:
    """Make sure that an export of classes has a `model.pdmodel` that clients run.

    Args:
        model: in evaluation mode, in the form for graphs of Paddle Inference.
        input_shape: of the graph, `[B, C, H, W]`.
        probes: inputs, and the model's outputs in eager mode.
        folder: a folder with `model.pdiparams`, and with a `model.pdmodel` if OpenVINO has one.
        tolerance: the bound of `ppvision.deploy.verify.parity`.

    Returns:
        Whether there is one; if not, the log says why.
    """
    was_there = (folder / _PROGRAM).is_file()
    try:
        if not was_there:
            with earlier_format():
                graph = trace(model, input_shape, "argmax", every_output=False)
                result = graph.forward.concrete_program.outputs[1]
                write_earlier_program(graph, [result], folder)
        inputs = [x for x, _ in probes]
        found = run_like_clients(folder / _PROGRAM, folder / _WEIGHTS, inputs)
        for (x, eager), (classes,) in zip(probes, found, strict=True):
            where = f"As PaddleSeg's client runs it, input {list(x.shape)}"
            parity.check_classes(eager[0], classes, tolerance, where)
    except PpvisionError as error:
        _tell("PaddleSeg", error)
        if not was_there:
            (folder / _PROGRAM).unlink(missing_ok=True)
        return False
    return True


def write_client_detector(
    model: nn.Layer,
    input_shape: Sequence[int | None],
    probes: Sequence[tuple[Mapping[str, np.ndarray], list[np.ndarray]]],
    folder: Path,
    bounds: Bounds,
    tolerance: float,
) -> bool:
    """Like `write_client_program`, for a detector with its NMS.

    Args:
        model: a detector as a layer of tensors, in the way that is to be traced.
        probes: inputs by name, and outputs; the last two outputs are boxes and scores before NMS.
        bounds: limits of its NMS.
    """
    try:
        if not (folder / _PROGRAM).is_file():
            with earlier_format():
                graph = trace_detector(model, input_shape)
                *kept, _, _ = graph.forward.concrete_program.outputs
                write_earlier_program(graph, kept, folder)
        inputs = [x for x, _ in probes]
        found = run_like_clients(folder / _PROGRAM, folder / _WEIGHTS, inputs)
        for (x, eager), outputs in zip(probes, found, strict=True):
            where = f"As PaddleDetection's client runs it, input {list(x['image'].shape)}"
            check_found(eager[:-2], outputs, bounds, tolerance, where)
    except PpvisionError as error:
        _tell("PaddleDetection", error)
        (folder / _PROGRAM).unlink(missing_ok=True)
        return False
    return True


def _tell(reader: str, error: PpvisionError) -> None:
    logger.info(f"export: {reader}'s own clients cannot run this export on a CPU ({error})")


def make_deploy_entry(
    program: str,
    weights: str,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    output_op: str,
) -> dict[str, object]:
    """Return the entry `Deploy` of `deploy.yaml` in the form of PaddleSeg's `tools/export.py`.

    Args:
        program, weights: names of the files.
        transforms: of `deploy.yaml`, which are PaddleSeg's.
        input_shape: of the graph, `[B, C, H, W]`.
        output_op: "argmax" or "softmax".
    """
    return {
        "model": program,
        "params": weights,
        "transforms": [dict(transform) for transform in transforms],
        "input_shape": list(input_shape),
        "output_op": output_op,
        "output_dtype": "int32" if output_op == "argmax" else "float32",
    }


# By part of an architecture's name: the name that clients use, and the smallest number of operators
# that TensorRT runs together (`ppdet/engine/export_utils.py` of PaddleDetection 2.6).
_ARCHITECTURES = {
    "PPYOLOE": ("PPYOLOE", 3),
    "YOLO": ("YOLO", 3),
    "RCNN": ("RCNN", 40),
    "RetinaNet": ("RetinaNet", 40),
    "FCOS": ("FCOS", 16),
}
_DRAWN = 0.5  # lowest score of a box that a client draws, PaddleDetection's default


def make_infer_config(
    architecture: str,
    metric: str,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    labels: Sequence[str],
    masks: bool,
) -> dict[str, Any]:
    """Return the content of PaddleDetection's `infer_cfg.yml` for a detector.

    Args:
        architecture: PaddleDetection's name of the architecture.
        metric: COCO or VOC.
        transforms: those of `deploy.yaml`, which are PaddleDetection's.
        input_shape: of the images, `[B, C, H, W]`.
        labels: names of the classes.
        masks: whether the graph gives masks.
    """
    known = (entry for part, entry in _ARCHITECTURES.items() if part in architecture)
    name, operators = next(known, (architecture, 3))
    content: dict[str, object] = {
        "mode": "paddle",
        "draw_threshold": _DRAWN,
        "metric": metric,
        "use_dynamic_shape": None in input_shape[2:],
        "arch": name,
        "min_subgraph_size": operators,
        "Preprocess": list_preprocess_steps(transforms),
        "label_list": list(labels),
    }
    return {**content, "mask": True} if masks else content


def list_preprocess_steps(transforms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a reader's transforms in the form of `Preprocess` in `infer_cfg.yml`.

    For some arguments the clients have no defaults, for others they have other defaults than the
    readers; so all are written.
    """
    defaults: dict[str, dict[str, Any]] = {
        "Resize": {"interp": 1},
        "NormalizeImage": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "is_scale": True,
            "norm_type": "mean_std",
        },
    }
    steps = []
    for transform in transforms:
        ((name, options),) = transform.items()
        options = {**defaults.get(name, {}), **(options or {})}
        if name == "Resize":
            size = options["target_size"]
            options["target_size"] = [size, size] if isinstance(size, int) else list(size)
            options["keep_ratio"] = bool(options["keep_ratio"])
        if name == "PadBatch":
            # `PadStride` of the clients; PaddleDetection treats a negative stride as none.
            name, options = "PadStride", {"stride": max(0, options.get("pad_to_stride", 0))}
        if name != "Decode":  # the clients read the image themselves
            steps.append({"type": name, **options})
    return steps


def write_infer_config(content: Mapping[str, object], folder: Path) -> None:
    """Write `infer_cfg.yml` into an export's folder."""
    (folder / INFER_CONFIG).write_text(format_short_yaml(dict(content)), encoding="utf-8")
