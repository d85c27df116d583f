"""Export a model to a folder that Paddle Inference or ONNX Runtime runs."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import paddle
from paddle import nn

from ppvision.arguments import check_choice, check_flag, check_layer, check_utf8
from ppvision.console import ProgressLine
from ppvision.data.listing import holds_only
from ppvision.deploy.run import manifest as manifests
from ppvision.deploy.run.composition import list_graph_parameters
from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.precision import find_usable_flags
from ppvision.deploy.run.task_table import TENSOR_TASKS
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.clients import check_in_paddlex
from ppvision.deploy.verify.comparison import (
    Probe,
    compare,
    compare_openvino,
    convert_to_arrays,
    make_eager_probes,
    measure_rounding_error,
)
from ppvision.deploy.verify.running import run_eagerly
from ppvision.deploy.write.bfloat16_check import check_in_bfloat16
from ppvision.deploy.write.clients import make_deploy_entry, write_client_program
from ppvision.deploy.write.graph import trace, write_graphs
from ppvision.deploy.write.integer_check import check_in_integers
from ppvision.deploy.write.integers import (
    DEFAULT_RULE,
    IntegerModel,
    convert_to_integers,
    has_integers,
    tell_engine,
)
from ppvision.deploy.write.onnx_integers import write_integer_marks
from ppvision.deploy.write.onnx_names import (
    describe,
    finish_onnx,
    infer_output_shape,
)
from ppvision.deploy.write.openvino import (
    write_float_program,
    write_openvino_programs,
)
from ppvision.deploy.write.paddlex import (
    OUTPUT_OPS,
    check_format,
    make_paddlex_config,
    name_for_paddlex,
)
from ppvision.errors import InputError, InputTypeError, shorten
from ppvision.files import replace_file, replace_folder, resolve_new_folder, sync_files
from ppvision.forms.differences import difference_form
from ppvision.forms.integers import float_form
from ppvision.forms.pale import pale_form
from ppvision.forms.same_padding import same_padding_form
from ppvision.forms.segformer import head_form
from ppvision.forms.tokens import count_changed_blocks
from ppvision.quant.packed import FixedActivation, find_packed_bits

logger = logging.getLogger("ppvision")

_OUTPUT_OPS = list(dict.fromkeys(op for task in TENSOR_TASKS.values() for op in task.output_ops))


def export_model(
    model: nn.Layer,
    folder: str | Path,
    *,
    input_shape: Sequence[int | None],
    output_op: str = "argmax",
    format: str = "paddle",
    transforms: Sequence[Mapping[str, Any]] = (),
    classes: Sequence[str] = (),
    task: str = "segmentation",
    name: str | None = None,
    bits: int = 32,
    max_value: int | None = None,
    int8: bool = False,
    calibration: str | Path | Sequence[str | Path] | None = None,
    calibration_rule: str = DEFAULT_RULE,
    keep_float: Sequence[str | int] | int = (),
    paddlex_name: str | None = None,
) -> Path:
    """Write a model for deployment, and compare the written graph with the model.

    Args:
        model: accepts `[B, C, H, W]`, float32. It returns a tensor of logits (`[B, K]` for
            classification, `[B, K, H, W]` for segmentation) or a list. Of a list, the export uses
            the first entry (as in PaddleSeg); for task "features" it uses all. The model is traced
            in evaluation mode. Its own mode, parameters and buffers do not change.
        folder: the new folder. A folder that `export_model` wrote is replaced after the new export
            is complete. Any other folder with files is an error.
        input_shape: `[B, C, H, W]`. None for a batch, height or width that may change. Give the
            size if you know it: a fixed size runs faster.
        output_op: final operator of the graph, over the class axis: "argmax" (int32), "softmax" or
            "none".
        format: "paddle" (`model.json`, `model.pdiparams`) or "onnx" (`model.onnx`; needs
            paddle2onnx and onnxruntime).
        transforms: transforms of the validation data, as in a config of PaddleSeg. `Predictor`
            applies them. Only those of `ppvision.deploy.run.transforms` are possible.
        classes: names of the K classes, or empty.
        task: "segmentation", "classification" or "features" (with `output_op` "none").
        name: name of the model in `deploy.yaml`. Default: the name of the folder.
        bits: bit-width of the weights: 32, or the width of the model's packed codes
            (`ppvision.quant.packed`). The tolerance for packed codes is a tenth of that for float,
            and larger if activations are rounded (see `parity`).
        max_value: the value that becomes 255 in images of more than 8 bits per channel, as in the
            training data. It is written into `deploy.yaml`. Default None: `Predictor` refuses such
            images.
        int8: compute with 8-bit integers (docs/integers.md). A float model gets 8-bit weights and
            activations from `calibration`. A model with integer layers (`pack_model(...,
            integers=True)`) is used as it is. Height and width must be fixed. With format "onnx":
            QuantizeLinear and DequantizeLinear around each product, zero points of 0.
        calibration: images for `int8`: a folder, a list file or a list of paths. 64 of them are
            used.
        calibration_rule: rule that chooses the step sizes of the activations: "error" (least
            squared error), "percentile" or "maximum".
        keep_float: layers that stay in float with `int8`: a list of paths, or a number N for the N
            layers that lose most accuracy (`ppvision.quant.ptq.sensitivity`). A list may contain
            both.
        paddlex_name: name of the model in PaddleX. The folder then has the file names of PaddleX,
            which can run it too. Examples: "SegFormer-B0" (segmentation, with `output_op` "argmax")
            and "ResNet18" (classification, with "softmax"). Default None: our own file names.

    Returns:
        The folder. Its `deploy.yaml` describes the export: bytes and sha256 of every file, and the
        largest measured difference from eager mode.

    Raises:
        ValueError: an argument does not fit, or deployment cannot reproduce a transform.
        FileExistsError: `folder` contains files that are not an export.
        ParityError: the written graph gives other numbers than the model.
        RuntimeError: tracing, conversion or the first run failed; the cause is attached.
        After an error `folder` has no new files, and an older export is unchanged.

    The check (`ppvision.deploy.verify.parity`) runs the graph in Paddle Inference with and without
    oneDNN, or in ONNX Runtime. If height and width may change, it uses two odd sizes. If the batch
    may change, it uses one and two images. If oneDNN fails or gives other numbers, a warning and
    `deploy.yaml` say so, and `Predictor` does not use oneDNN. With a fixed height and width the
    export also has a graph for OpenVINO (`ppvision.deploy.write.openvino`). A separate process runs
    it. An unknown operator, a crash or other numbers are reported in the same way.
    """
    shape = check_shape(input_shape)
    for argument, value, known in (
        ("task", task, list(TENSOR_TASKS)),
        ("output_op", output_op, _OUTPUT_OPS),
        ("format", format, manifests.FORMATS),
    ):
        check_choice(value, argument, known)
    kind = TENSOR_TASKS[task]
    if output_op not in kind.output_ops:
        raise InputError(
            f"output_op: expected {' or '.join(map(repr, kind.output_ops))} for task {task!r}, got "
            f"{shorten(output_op)}."
        )
    check_layer(model)
    classes = check_class_names(classes)
    manifests.check_name(name)
    manifests.check_max_value(max_value)
    pipeline = kind.build_transforms(transforms)
    specs = json.loads(json.dumps(list(transforms), default=float))
    if pipeline.transforms and shape[1] != 3:
        raise InputError(
            f"input_shape: transforms are for images of 3 channels, got {shape[1]}. "
            "Omit them and prepare the input yourself (Predictor.run)."
        )
    check_sizes(shape, pipeline.find_output_size())

    paddlex = None
    if paddlex_name is not None:
        paddlex = make_paddlex_config(task, paddlex_name, specs, shape, classes)
        check_format(format, max_value)
        _check_output_for_paddlex(task, output_op)
    check_packed(model, bits)
    check_integer_arguments(model, int8, format, calibration, keep_float, calibration_rule)
    folder = check_folder(folder)
    replacing = replace_folder(folder, may_be_replaced, "an earlier export", "save_dir")
    line = ProgressLine("export", 5 if int8 else 4, "step")
    with use_evaluation_mode(model), replacing as work, line:
        integers = None
        if int8:
            line.update(0, "calibrate")
            integers = convert_to_integers(
                model,
                calibration,
                shape,
                lambda image: pipeline(image)[0][None],
                rule=calibration_rule,
                keep_float=keep_float,
                symmetric=format == "onnx",  # TensorRT accepts no other
                max_value=max_value,
            )
            model, bits = integers.model, find_packed_bits(integers.model)
            line.update(1)
        line.update(0, "run the model")
        probes = make_eager_probes(model, task, shape, pipeline)
        kind.check_logits(probes[0][1][0], output_op, classes)

        line.update(1, "trace and write")
        final = raw = work / "final"
        parts: dict[Path, list[int] | None] = {final: None}
        if output_op != "none":
            raw = work / "raw"
            parts = {raw: [0], final: [1]}
        with use_graph_forms(model, format), write_integer_marks(model, format, parts):
            graph = trace(model, shape, output_op, every_output=kind.every_output)
            write_graphs(graph, parts, format)
        num_classes = probes[0][1][0].shape[1] if kind.has_classes else None
        outputs: list[str] = []
        if format == "onnx":
            outputs = kind.name_outputs(output_op, len(probes[0][1]))
            said = describe(
                name=folder.name if name is None else name,
                task=task,
                output_op=output_op,
                input_shape=shape,
                transforms=specs,
                num_classes=num_classes,
                classes=classes,
                bits=bits,
                max_value=max_value,
            )
            shapes = _output_shapes(probes, shape, output_op)
            finish_onnx(model, final, outputs=outputs, output_shapes=shapes, metadata=said)
        tolerance = parity.FLOAT_TOLERANCE if bits == 32 else parity.PACKED_TOLERANCE
        if integers is not None:
            tolerance = max(parity.FLOAT_TOLERANCE, 2 * measure_rounding_error(model, task, probes))
        elif any(isinstance(layer, FixedActivation) for layer in model.sublayers()):
            tolerance = max(tolerance, 2 * measure_rounding_error(model, task, probes))
        line.update(1, "compare")
        error, onednn = compare(probes, raw, final, output_op, format, tolerance)
        line.update(1, "OpenVINO")
        of_openvino, openvino = None, None
        if format == "paddle" and has_openvino():
            of_openvino, openvino = _with_openvino(
                model, probes, raw, final, shape, output_op, task, tolerance
            )
        checked = bfloat16 = None
        if integers is not None:
            checked = _check_in_integers(integers, probes, raw, task, tolerance, openvino, format)
        elif openvino and kind.has_classes and "amx_bf16" in find_usable_flags():
            bfloat16 = check_in_bfloat16(
                raw,
                probes[0][0].shape,
                lambda x: convert_to_arrays(run_eagerly(model, x), task, x.shape),
                tolerance,
            )

        parameters = name_parameters(model, final, format, bits)
        files, deploy = manifests.FILES[format], None
        if paddlex is not None:
            check_in_paddlex(probes, final, output_op, tolerance, paddlex)
            files = name_for_paddlex(paddlex, final)
        elif (format, output_op) == ("paddle", kind.client_op) and not int8:
            # Independent of oneDNN's result: the clients' own run is compared.
            with use_graph_forms(model, format):
                served = write_client_program(model, shape, probes, final, tolerance)
            if served:
                assert files.weights is not None  # because the format is "paddle"
                program = files.earlier_program
                deploy = make_deploy_entry(program, files.weights, specs, shape, output_op)
        earlier_format = (final / files.earlier_program).is_file()
        manifests.Manifest(
            name=folder.name if name is None else name,
            task=task,
            format=format,
            program=files.program,
            weights=files.weights,
            earlier_format=earlier_format,
            input_shape=shape,
            output_op=output_op,
            transforms=specs,
            num_classes=num_classes,
            classes=classes,
            bits=bits,
            files=manifests.describe_files(final, manifests.list_file_names(files, earlier_format)),
            max_error_to_eager=max(error, of_openvino or 0.0),
            checked_shapes=[list(shape) for shape in dict.fromkeys(x.shape for x, _ in probes)],
            onednn=onednn,
            paddle_version=paddle.__version__,
            parameters=parameters,
            openvino=openvino,
            max_value=max_value,
            outputs=outputs,
            Deploy=deploy,
            paddlex_name=paddlex_name,
            activations=None if integers is None else 8,
            int8=checked,
            bfloat16=bfloat16,
            calibration=None if integers is None else integers.calibration,
            keep_float=[] if integers is None else integers.kept,
        ).write(final)
        sync_files(final)
        line.update(1, "")
    return folder


def _output_shapes(
    probes: Sequence[Probe], input_shape: Sequence[int | None], output_op: str
) -> list[list[int | str]]:
    """Return the shape of every output of the graph; see `infer_output_shape`."""
    inputs = [x.shape for x, _ in probes]
    shapes = [[a.shape for a in arrays] for _, arrays in probes]
    if output_op == "argmax":
        shapes = [[(batch, *sizes) for batch, _, *sizes in own] for own in shapes]
    return [infer_output_shape(input_shape, inputs, own) for own in zip(*shapes, strict=True)]


def _with_openvino(
    model: nn.Layer,
    probes: Sequence[Probe],
    raw: Path,
    final: Path,
    shape: Sequence[int | None],
    output_op: str,
    task: str,
    tolerance: float,
) -> tuple[float | None, bool | None]:
    """Write the graphs for OpenVINO next to the others, and compare them.

    Returns:
        The largest error, and whether OpenVINO may run the export. It may not if it cannot run it
        (it does not know every operator) or gives other numbers; a warning says so. None if there
        is nothing to try.
    """
    every_output = TENSOR_TASKS[task].every_output
    error = None
    try:
        if not write_openvino_programs(
            model, shape, output_op, raw, final, every_output=every_output
        ):
            return None, None
        error = compare_openvino(probes, raw, final, output_op, tolerance)
    except RuntimeError as failure:  # a ParityError too
        changed = count_changed_blocks(model)
        why = (
            f" ({changed} of its Pale blocks keep the form that is trained, which OpenVINO seldom "
            "takes: padding without a mask, or parts changed since.)"
        )
        warnings.warn(
            f"{failure}{why if changed else ''} {tell_engine(model)}",
            stacklevel=3,
        )
    if error is None:
        (final / manifests.FILES["paddle"].earlier_program).unlink(missing_ok=True)
    return error, error is not None


def _check_output_for_paddlex(task: str, output_op: str) -> None:
    """Raise `InputError` if the `output_op` does not fit `paddlex_name`."""
    if output_op != OUTPUT_OPS[task]:
        raise InputError(
            f"output_op: expected {OUTPUT_OPS[task]!r}, which PaddleX takes for {task}, got "
            f"{shorten(output_op)}."
        )


def check_integer_arguments(
    model: nn.Layer,
    int8: bool,
    format: str,
    calibration: object,
    keep_float: object,
    calibration_rule: str,
) -> None:
    """Raise `InputError` for arguments that exclude each other."""
    check_flag(int8, "int8")
    ruled = calibration_rule != DEFAULT_RULE
    if not int8 and (calibration is not None or keep_float or ruled):
        raise InputError("calibration, calibration_rule, keep_float: expected int8=True with them.")
    if not int8 and has_integers(model):
        raise InputError("model: it has integer layers; expected int8=True.")


def _check_in_integers(
    integers: IntegerModel,
    probes: Sequence[Probe],
    raw: Path,
    task: str,
    tolerance: float,
    openvino: bool | None,
    format: str,
) -> manifests.PrecisionCheck:
    """Return the entry `int8` of `deploy.yaml`."""
    if format == "paddle" and not openvino:
        return manifests.PrecisionCheck(passed=False)
    model, shape = integers.model, list(probes[0][0].shape)

    def write_float(folder: Path) -> None:
        if format == "paddle":
            write_float_program(model, shape, folder)
            return
        with float_form(model), use_graph_forms(model, format):
            graph = trace(model, shape, "none", every_output=True)
            write_graphs(graph, {folder: None}, format)

    return check_in_integers(
        integers,
        raw,
        [x for x, _ in probes],
        outputs_of=lambda x: convert_to_arrays(
            run_eagerly(model, x), task, cast(np.ndarray, x).shape
        ),
        labels_of=(lambda outputs: outputs[0]) if TENSOR_TASKS[task].has_classes else None,
        write_float=write_float,
        tolerance=tolerance,
        format=format,
    )


def record_scores(folder: Path, metric: str, score: float, float_score: float) -> None:
    """Write the effect of integers on the score into `deploy.yaml`.

    Args:
        folder: an export with integers.
        metric: name of the metric.
        score, float_score: score of the integers, and of the model in float.

    Raises:
        ValueError: the export is in float.
    """
    manifest = manifests.read_manifest(folder)
    if manifest.int8 is None:
        raise InputError(
            f"record_scores: expected an export with integers, got one in float, {folder}. Export "
            "it with int8=True."
        )
    scored = replace(manifest.int8, metric=metric, score=score, float_score=float_score)
    with replace_file(folder / manifests.NAME) as partial:
        text = manifests.format_manifest(replace(manifest, int8=scored))
        partial.write_text(text, encoding="utf-8")


def name_parameters(model: nn.Layer, folder: Path, format: str, bits: int) -> dict[str, str]:
    """Return the model's name of each parameter of a float graph, for `Predictor(layered=...)`."""
    if format != "paddle" or bits != 32:
        return {}
    paths = {tensor.name: path for path, tensor in model.state_dict().items()}
    program = folder / manifests.FILES["paddle"].program
    found = {name: paths.get(name) for name in list_graph_parameters(program)}
    # Float weights that are computed from codes are buffers (`ppvision.quant.packed`).
    return {
        name: f"{path.removesuffix('.unpacked')}.weight" if path.endswith(".unpacked") else path
        for name, path in found.items()
        if path is not None
    }


def check_shape(input_shape: Sequence[int | None]) -> list[int | None]:
    """Return `[B, C, H, W]` in the form for `deploy.yaml`.

    Raises:
        InputError: another type or size.
    """
    shape = list(input_shape) if isinstance(input_shape, (list, tuple)) else []
    sizes = [n for n in shape if n is not None]
    positive = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    if len(shape) != 4 or shape[1] is None or not positive:
        raise InputError(
            "input_shape: expected [B, C, H, W], whole numbers above 0 with None for a batch, "
            "height or width that may be any (not for the channels), got "
            f"{shorten(shape or input_shape)}."
        )
    manifests.check_input_shape(shape)
    return shape


def check_sizes(shape: Sequence[int | None], made: tuple[int, int] | None) -> None:
    """Raise `InputError` for an export that could not accept any image.

    Args:
        shape: of the export, `[B, C, H, W]`.
        made: (height, width) that its transforms give every image; None if it depends on the image.
    """
    if made is None or all(n in (None, own) for n, own in zip(shape[2:], made, strict=True)):
        return
    height, width = made
    wanted = [*shape[:2], height, width]
    words = " ".join(map(str, wanted))
    raise InputError(
        f"input_shape: expected height and width {height} {width}, which the transforms give every "
        f"image, got {shape[2]} {shape[3]}. Pass --input_shape {words} (in Python "
        f"input_shape={wanted}), or change target_size of the transforms. To prepare inputs "
        "yourself (Predictor.run), omit the transforms."
    )


def check_folder(folder: str | Path) -> Path:
    """Return the resolved folder of an export.

    Raises:
        InputTypeError, InputError, StorageError: the path is not that of a folder that can be made,
            or is not UTF-8, which Paddle cannot open.
    """
    path = resolve_new_folder(folder)
    check_utf8(path, "folder")
    return path


def check_class_names(classes: Sequence[str]) -> list[str]:
    """Return names of classes; numbers become text.

    Raises:
        InputTypeError, InputError: not a list, or entries that `deploy.yaml` cannot contain.
    """
    if isinstance(classes, bytes) or not isinstance(classes, (Sequence, np.ndarray)):
        raise InputTypeError(f"classes: expected a list of names, got {shorten(classes)}.")
    names = [
        # Python does not write numbers of more than 4300 digits; no class has such a name.
        str(label) if isinstance(label, (int, float, np.number)) and abs(label) < 2**63 else label
        for label in classes
    ]
    manifests.check_classes(names)
    return names


def check_packed(model: nn.Layer, bits: int) -> None:
    """Raise `ValueError` unless `bits` is the width of the model's codes, or 32 without codes."""
    held = find_packed_bits(model)
    if not isinstance(bits, int) or bits != held:
        raise InputError(
            f"bits: expected {held}, which the model's weights have, got {shorten(bits)}. "
            "LayeredQAT(config).convert(model, bits) gives codes of another width."
        )


@contextmanager
def use_evaluation_mode(model: nn.Layer) -> Iterator[None]:
    """Set evaluation mode during the block, and restore the mode of each sublayer afterwards."""
    before = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training


@contextmanager
def use_graph_forms(model: nn.Layer, format: str) -> Iterator[None]:
    """Put our layers into the forms for graphs of Paddle Inference or ONNX Runtime during the
    block.

    ONNX Runtime runs attention in the trained form as fast as in the form for tokens, and a fifth
    faster than in the form for Paddle Inference (docs/performance.md).
    """
    own = pale_form(model) if format == "paddle" else same_padding_form(model)
    with own, difference_form(model), head_form(model):
        yield


def may_be_replaced(folder: Path) -> bool:
    return holds_only(folder, manifests.KNOWN_FILES, manifests.NAME)
