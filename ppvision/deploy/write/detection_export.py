"""Export a detector to a folder that Paddle Inference or ONNX Runtime runs."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import paddle
from paddle import nn

from ppvision.arguments import check_choice
from ppvision.console import ProgressLine
from ppvision.deploy.run import manifest as manifests
from ppvision.deploy.run.detection_transforms import DetectionTransforms, Inputs
from ppvision.deploy.run.engines import (
    Engine,
    fail_as,
    has_openvino,
    join_error_lines,
    name_engine,
    open_runtime,
)
from ppvision.deploy.run.nms import suppress
from ppvision.deploy.run.task_table import TASKS
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.clients import run_like_paddlex, unfit_for_paddlex
from ppvision.deploy.verify.comparison import measure_largest_move
from ppvision.deploy.verify.detection_parity import (
    Bounds,
    check_found,
    check_raw,
    scores_with_nothing,
)
from ppvision.deploy.verify.running import run_eagerly, run_in_openvino
from ppvision.deploy.write.clients import (
    make_infer_config,
    write_client_detector,
    write_infer_config,
)
from ppvision.deploy.write.export import (
    check_class_names,
    check_folder,
    check_integer_arguments,
    check_packed,
    check_shape,
    check_sizes,
    may_be_replaced,
    name_parameters,
    use_evaluation_mode,
    use_graph_forms,
)
from ppvision.deploy.write.graph import trace_detector, write_graphs
from ppvision.deploy.write.integer_check import check_in_integers
from ppvision.deploy.write.integers import (
    DEFAULT_RULE,
    IntegerModel,
    convert_to_integers,
    tell_engine,
)
from ppvision.deploy.write.onnx_names import describe, finish_onnx
from ppvision.deploy.write.openvino import write_float_detector, write_openvino_detector
from ppvision.deploy.write.paddlex import (
    check_format,
    check_inputs,
    make_paddlex_detector_config,
    name_for_paddlex,
)
from ppvision.errors import InputError, PpvisionError
from ppvision.files import replace_folder, sync_files
from ppvision.quant.packed import FixedActivation, find_packed_bits

RAW = 2  # outputs before NMS: boxes and scores
_SCALES = ((1.0, 1.0), (0.5, 0.8))  # scales of the compared images: height, width


class Detector(Protocol):
    """A detector as a layer of tensors (`ppvision.tasks.detection.layer.DetectorLayer`)."""

    model: nn.Layer  # PaddleDetection's model
    bounds: Bounds

    def eval(self) -> None:
        """See `paddle.nn.Layer`."""

    def with_model(self, model: nn.Layer) -> "Detector":
        """Return the same layer around another model of the architecture."""

    def choose(self, boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """Apply its NMS to boxes and scores; return rows `[N, 6]` and counts `[B]`."""

    def in_graphs(self) -> AbstractContextManager[None]:
        """Return a context for the changes that tracing needs."""

    def __call__(
        self, image: paddle.Tensor, im_shape: paddle.Tensor, scale_factor: paddle.Tensor
    ) -> list[paddle.Tensor]:
        """Return rows `[N, 6]` of class, score and box, counts `[B]`, masks `[N, H, W]` if there
        are any, and boxes and scores before NMS."""


def export_detector(
    model: Detector,
    folder: str | Path,
    *,
    input_shape: Sequence[int | None],
    num_classes: int,
    format: str = "paddle",
    transforms: Sequence[Mapping[str, Any]] = (),
    classes: Sequence[str] = (),
    name: str | None = None,
    bits: int = 32,
    max_value: int | None = None,
    architecture: str = "",
    metric: str = "COCO",
    paddlex_name: str | None = None,
    int8: bool = False,
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_rule: str = DEFAULT_RULE,
    keep_float: Sequence[str] = (),
) -> Path:
    """Write a detector with its NMS for deployment, and compare the written graph with the model.

    A one-stage detector with a known height and width and batch 1 also gets a graph for OpenVINO,
    which ends in boxes and scores. `deploy.yaml` describes the NMS after it, and `Predictor` runs
    this NMS.

    Args:
        model: the detector as a layer of tensors.
        folder, input_shape, format, name, bits, max_value, int8, calibration, calibration_rule,
            keep_float: see `ppvision.deploy.export_model`. `int8` is for one stage and batch 1.
        num_classes: number of classes C.
        transforms: PaddleDetection's transforms for prediction; `Predictor` applies them.
        classes: names of the C classes, or empty.
        architecture, metric: PaddleDetection's names, for its clients (`infer_cfg.yml`).
        paddlex_name: name of the model in PaddleX, such as "PP-YOLOE_plus-S". The folder then has
            the file names of PaddleX, which can run it too. Default None: our own file names.

    Returns:
        The folder.

    Raises:
        as `export_model`. The rule of comparison: `ppvision.deploy.verify.detection_parity`.
    """
    shape = check_shape(input_shape)
    check_choice(format, "format", manifests.FORMATS)
    classes = check_class_names(classes)
    manifests.check_name(name)
    manifests.check_max_value(max_value)
    pipeline = DetectionTransforms(transforms)
    check_sizes(shape, pipeline.find_output_size())
    if paddlex_name is not None:
        check_format(format, max_value)
    check_packed(model, bits)
    check_integer_arguments(model, int8, format, calibration, keep_float, calibration_rule)
    if int8 and shape[0] != 1:
        raise InputError(
            f"int8: expected input_shape with a batch of 1, got {shape[0]}: a detector's graph for "
            "OpenVINO, which runs the integers, takes one image at a time."
        )
    folder = check_folder(folder)
    replacing = replace_folder(folder, may_be_replaced, "an earlier export", "save_dir")
    line = ProgressLine("export", 4 if int8 else 3, "step")
    with use_evaluation_mode(model), replacing as work, line:
        integers = None
        if int8:
            line.update(0, "calibrate")
            integers = convert_to_integers(
                model.model,
                calibration,
                shape,
                lambda image: {k: v[None] for k, v in pipeline(image).items()},
                run=lambda shown, inputs: run_eagerly(model.with_model(shown), inputs),
                rule=calibration_rule,
                keep_float=keep_float,
                max_value=max_value,
            )
            model, bits = model.with_model(integers.model), find_packed_bits(integers.model)
            model.eval()
            line.update(1)
        line.update(0, "run the model")
        probes = _probes(model, shape, pipeline)
        if int8 and _has_two_stages(probes):
            raise InputError(
                "int8: expected a detector of one stage: OpenVINO, which runs the integers, does "
                "not know the operators that choose regions."
            )
        specs = json.loads(json.dumps(list(transforms), default=float))
        labels = classes or [str(k) for k in range(num_classes)]  # clients look up each label
        described = architecture, metric, specs, shape, labels, len(probes[0][1]) - RAW == 3
        paddlex = None
        if paddlex_name is not None:
            paddlex = make_paddlex_detector_config(paddlex_name, *described)
        raw, final = work / "raw", work / "final"
        line.update(1, "trace and write")
        with model.in_graphs(), use_graph_forms(model.model, format):
            graph = trace_detector(model, shape)
            kept = range(len(probes[0][1]) - RAW)
            write_graphs(graph, {raw: None, final: kept}, format)
        outputs: list[str] = []
        if format == "onnx":
            outputs = TASKS["detection"].name_outputs("nms", len(kept))
            said = describe(
                name=folder.name if name is None else name,
                task="detection",
                output_op="nms",
                input_shape=shape,
                transforms=specs,
                num_classes=num_classes,
                classes=classes,
                bits=bits,
                max_value=max_value,
            )
            # The number of boxes depends on the image.
            shapes = [None] * len(kept)
            finish_onnx(model.model, final, outputs=outputs, output_shapes=shapes, metadata=said)
        tolerance = parity.FLOAT_TOLERANCE if bits == 32 else parity.PACKED_TOLERANCE
        if integers is not None or _rounds(model.model):
            least = tolerance if integers is None else parity.FLOAT_TOLERANCE
            tolerance = max(least, 2 * _rounding_error(model, probes))
        rule = _Rule(model.bounds, tolerance, model.choose if int8 else None)
        line.update(1, "compare")
        error, onednn = _compare_engines(probes, raw, final, format, rule)
        of_openvino, openvino, nms = None, None, None
        if format == "paddle" and has_openvino() and not _has_two_stages(probes):
            of_openvino, openvino, nms = _with_openvino(model, probes, final, shape, rule)
        checked = None
        if integers is not None:
            checked = _check_integers(model, integers, probes, final, tolerance, openvino)
        parameters = name_parameters(model.model, final, format, bits)
        files = manifests.FILES[format]
        if paddlex is not None and paddlex_name is not None:
            check_inputs(paddlex_name, final / files.program)
            _check_in_paddlex(probes, final, model.bounds, tolerance, paddlex_name)
            files = name_for_paddlex(paddlex, final)
        elif format == "paddle":
            if not int8:
                with model.in_graphs(), use_graph_forms(model.model, format):
                    write_client_detector(model, shape, probes, final, model.bounds, tolerance)
            write_infer_config(make_infer_config(*described), final)
            own = (final / files.raw_program).is_file()
            files = replace(files, own_for_openvino=own)
        earlier_format = (final / files.earlier_program).is_file()
        manifests.Manifest(
            name=folder.name if name is None else name,
            task="detection",
            format=format,
            program=files.program,
            weights=files.weights,
            earlier_format=earlier_format,
            openvino=openvino,
            nms=nms,
            input_shape=shape,
            output_op="nms",
            transforms=specs,
            num_classes=num_classes,
            classes=classes,
            bits=bits,
            files=manifests.describe_files(final, manifests.list_file_names(files, earlier_format)),
            max_error_to_eager=max(error, of_openvino or 0.0),
            checked_shapes=[list(s) for s in dict.fromkeys(x["image"].shape for x, _ in probes)],
            onednn=onednn,
            paddle_version=paddle.__version__,
            parameters=parameters,
            max_value=max_value,
            outputs=outputs,
            paddlex_name=paddlex_name,
            activations=None if integers is None else 8,
            int8=checked,
            calibration=None if integers is None else integers.calibration,
            keep_float=[] if integers is None else integers.kept,
        ).write(final)
        sync_files(final)
        line.update(1, "")
    return folder


Probe = tuple[Inputs, list[np.ndarray]]  # inputs, and the model's outputs in eager mode


@dataclass(frozen=True)
class _Rule:
    """The comparison of an engine's outputs with eager mode.

    Attributes:
        bounds: limits of NMS.
        tolerance: limit for boxes and scores.
        choose: NMS for a model with integers. The engine's NMS is compared with this one on the
            engine's own boxes and scores. (Rounded boxes move so far that NMS in eager mode may
            keep other boxes.) None: the found objects are compared with those of eager mode.
    """

    bounds: Bounds
    tolerance: float
    choose: Callable[[np.ndarray, np.ndarray], list[np.ndarray]] | None

    def check(self, eager: list[np.ndarray], raw: list[np.ndarray], where: str) -> float:
        """Compare boxes and scores before NMS."""
        return check_raw(eager[-RAW:], raw, self.tolerance, where)

    def check_found(
        self, eager: list[np.ndarray], raw: list[np.ndarray], found: list[np.ndarray], where: str
    ) -> int:
        """Compare the results of NMS; return the number of boxes."""
        expected = eager[:-RAW] if self.choose is None else self.choose(*raw)
        return check_found(expected, found, self.bounds, self.tolerance, where)


@paddle.no_grad()
def _probes(
    model: Detector, shape: Sequence[int | None], pipeline: DetectionTransforms
) -> list[Probe]:
    """Make inputs at sizes that the model accepts, multiples of its strides, with its own
    outputs."""
    mean, std = pipeline.normalize
    failure = None
    for shapes in list(parity.probe_shapes(shape))[-3 if None not in shape[2:] else -2 :]:
        inputs = []
        for probed in shapes:
            images = parity.probe_batches(probed, mean, std)
            for image, scale in zip(images, _SCALES, strict=False):
                batch, _, height, width = image.shape
                inputs.append(
                    {
                        "image": image,
                        "im_shape": np.full((batch, 2), (height, width), np.float32),
                        "scale_factor": np.full((batch, 2), scale, np.float32),
                    }
                )
        try:
            found = [model(**{k: paddle.to_tensor(v) for k, v in x.items()}) for x in inputs]
        except Exception as error:  # a model may raise anything at a size that it does not accept
            failure = failure or error
            continue
        arrays = [[tensor.numpy() for tensor in outputs] for outputs in found]
        if not all(np.isfinite(a).all() for outputs in arrays for a in outputs):
            raise InputError(
                "model: gives numbers that are not finite, so that nothing can be compared. Check "
                "its weights."
            )
        return list(zip(inputs, arrays, strict=True))
    assert failure is not None  # there is at least one size
    raise InputError(
        f"model: expected one that runs on inputs of input_shape={list(shape)}; it raised "
        f"{join_error_lines(failure)}"
    ) from failure


def _rounds(model: nn.Layer) -> bool:
    return any(isinstance(layer, FixedActivation) for layer in model.sublayers())


def _rounding_error(model: Detector, probes: Sequence[Probe]) -> float:
    """Apply `measure_largest_move` to boxes and scores."""
    worst = 0.0
    for inputs, eager in probes:

        def raw(image: np.ndarray, inputs: Inputs = inputs) -> list[np.ndarray]:
            return _raw_outputs(model, {**inputs, "image": image})

        probe = inputs["image"], eager[-RAW:]
        worst = max(worst, measure_largest_move(model.model, raw, [probe]))
    return worst


def _raw_outputs(model: Detector, inputs: Inputs) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in run_eagerly(model, inputs)[-RAW:]]


def _check_integers(
    model: Detector,
    integers: IntegerModel,
    probes: Sequence[Probe],
    final: Path,
    tolerance: float,
    openvino: bool | None,
) -> manifests.PrecisionCheck:
    """Return the entry `int8` of `deploy.yaml`."""
    if not openvino:
        return manifests.PrecisionCheck(passed=False)
    shape = probes[0][0]["image"].shape
    return check_in_integers(
        replace(integers, model=model),
        final,
        [inputs for inputs, _ in probes],
        outputs_of=lambda inputs: _raw_outputs(model, cast(Inputs, inputs)),
        labels_of=lambda raw: scores_with_nothing(raw[1], model.bounds),
        write_float=lambda folder: write_float_detector(model, shape, folder),
        tolerance=tolerance,
    )


def _compare_engines(
    probes: Sequence[Probe], raw: Path, final: Path, format: str, rule: _Rule
) -> tuple[float, bool | None]:
    """Return the largest error before NMS, and whether oneDNN may run the export (None for ONNX).

    The deployed graph is a part of the whole graph. It runs in the engine for which it is made.
    """
    how = format, rule
    if format == "onnx":
        return _compare(probes, [raw, final], *how, "native"), None
    worst = _compare(probes, [raw], *how, "native")
    try:
        error = _compare(probes, [raw, final], *how, "onednn")
    except (parity.ParityError, RuntimeError) as failure:
        warnings.warn(
            f"{failure} The export runs without oneDNN, which is slower on a CPU.", stacklevel=3
        )
        return max(worst, _compare(probes, [raw, final], *how, "native")), False
    return max(worst, error), True


def _has_two_stages(probes: Sequence[Probe]) -> bool:
    """Whether NMS selects from boxes of proposals, which are not in the order of the images."""
    return probes[0][1][-1].ndim == 2


def _with_openvino(
    model: Detector,
    probes: Sequence[Probe],
    final: Path,
    shape: Sequence[int | None],
    rule: _Rule,
) -> tuple[float | None, bool | None, manifests.Nms | None]:
    """Write the graph for OpenVINO next to the others, and compare it.

    Returns:
        The largest error, whether OpenVINO may run the export (None if there is nothing to try),
        and the NMS after its graph.
    """
    try:
        with model.in_graphs():
            nms = write_openvino_detector(model, model.model, shape, final)
        if nms is None:
            return None, None, None
        return _compare_openvino(probes, final, nms, rule), True, nms
    except RuntimeError as failure:  # a ParityError too
        warnings.warn(
            f"{failure} {tell_engine(model)}",
            stacklevel=3,
        )
    (final / manifests.FILES["paddle"].raw_program).unlink(missing_ok=True)
    return None, False, None


def _check_in_paddlex(
    probes: Sequence[Probe], final: Path, bounds: Bounds, tolerance: float, name: str
) -> None:
    """Compare the graph, run like PaddleX, with the model.

    Raises:
        EngineError: the graph does not run, or finds other objects.
    """
    try:
        found = run_like_paddlex(final, [inputs for inputs, _ in probes], name)
        for (inputs, eager), outputs in zip(probes, found, strict=True):
            where = f"As PaddleX runs it, input {list(inputs['image'].shape)}"
            check_found(eager[:-RAW], outputs, bounds, tolerance, where)
    except PpvisionError as error:
        raise unfit_for_paddlex(error, name) from error


def _compare_openvino(
    probes: Sequence[Probe], final: Path, nms: manifests.Nms, rule: _Rule
) -> float:
    (found,) = run_in_openvino([final], [inputs for inputs, _ in probes])
    worst = 0.0
    for (inputs, eager), raw in zip(probes, found, strict=True):
        boxes, scores = raw
        where = f"{name_engine('paddle', 'openvino')}, input {list(inputs['image'].shape)}"
        worst = max(worst, rule.check(eager, raw, where))
        rule.check_found(eager, raw, suppress(boxes, scores, nms), where)
    return worst


def _compare(
    probes: Sequence[Probe],
    folders: Sequence[Path],
    format: str,
    rule: _Rule,
    engine: Engine,
) -> float:
    name, worst, boxes = name_engine(format, engine), 0.0, 0
    with fail_as(f"{name} does not load the exported graph"):
        runtimes = [open_runtime(folder, format, engine=engine) for folder in folders]
    for inputs, eager in probes:
        where = f"{name}, input {list(inputs['image'].shape)}"
        with fail_as(f"{where}: the exported graph does not run"):
            outputs, *kept = (runtime.run(inputs) for runtime in runtimes)
        worst = max(worst, rule.check(eager, outputs[-RAW:], where))
        for found in (outputs[:-RAW], *kept):
            boxes += rule.check_found(eager, outputs[-RAW:], found, where)
    if not boxes:
        warnings.warn(
            "The detector finds nothing in the images of the comparison: only boxes and scores "
            "before NMS were compared.",
            stacklevel=4,
        )
    return worst
