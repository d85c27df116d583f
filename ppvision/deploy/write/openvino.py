"""Write the graph for Paddle Inference's OpenVINO engine, in addition to the one for oneDNN.

Paddle's wheels for x86 contain OpenVINO's CPU plugin, and Paddle Inference gives a whole graph to
it (`Config.enable_openvino_engine`). It reads only Paddle's earlier program format,
`model.pdmodel`. The weights are those of `model.pdiparams`, byte for byte, also packed codes. So an
export contains the graph twice and its weights once. (An export of a detector contains the graph
three times: OpenVINO's NMS crashes on some detectors, so `model.raw.pdmodel` ends before it.)

A network gets such a graph if its height and width are known and it can be traced in that format
(`ppvision.forms.earlier_format`); benchmark/results/openvino_networks.csv lists such networks. The
format cannot express sizes that are read from a tensor. Pale blocks are in the form for tokens
(`ppvision.forms.tokens`).
"""

import re
import tempfile
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from pathlib import Path

import paddle
from google.protobuf.message import Message
from paddle import Tensor, nn

from ppvision.deploy.run.engines import join_error_lines
from ppvision.deploy.run.manifest import FILES, Nms
from ppvision.deploy.write.graph import (
    Products,
    save_graph,
    trace,
    trace_detector,
    trace_products,
)
from ppvision.errors import EngineError, InputError
from ppvision.files import name_storage_errors
from ppvision.forms.differences import difference_form
from ppvision.forms.earlier_format import earlier_format
from ppvision.forms.integers import float_form, integer_form
from ppvision.forms.paddle_private import parse_program
from ppvision.forms.segformer import head_form
from ppvision.forms.tokens import token_form
from ppvision.quant.packed import FixedActivation


def write_openvino_programs(
    model: nn.Layer,
    input_shape: Sequence[int | None],
    output_op: str,
    raw: Path,
    final: Path,
    *,
    every_output: bool,
) -> bool:
    """Write `model.pdmodel` next to each `model.pdiparams` of an export.

    Args:
        model: in evaluation mode.
        input_shape: of the graph, `[B, C, H, W]`.
        output_op: "argmax", "softmax" or "none".
        raw: folder with the graph up to the logits (or features).
        final: folder with the deployed graph, including `output_op`; equal to `raw` if that is
            none.
        every_output: whether to keep all outputs of the model.

    Returns:
        Whether they were written. They are not for a free height or width.

    Raises:
        RuntimeError: the model cannot be traced in the earlier format, its weights come out in
            another order, or OpenVINO lacks an operator; the cause is attached.
        OSError: a file cannot be written.
    """
    if None in input_shape[2:]:
        return False
    with _as_engine_error(), _forms(model), earlier_format():
        graph = trace(model, input_shape, output_op, every_output=every_output)
        if raw == final:
            _write(graph, None, final)
        else:
            logits, result = graph.forward.concrete_program.outputs
            _write(graph, [logits], raw)
            _write(graph, [result], final)
    return True


def write_openvino_detector(
    model: nn.Layer, network: nn.Layer, input_shape: Sequence[int | None], folder: Path
) -> Nms | None:
    """Write `model.raw.pdmodel` of a one-stage detector, up to its boxes and scores, next to the
    `model.pdiparams` of an export; and `model.pdmodel` with its NMS, for other programs.

    Args:
        model: see `export_detector`; in the state for tracing.
        network: PaddleDetection's network inside it.
        input_shape: of the images, `[B, C, H, W]`.
        folder: folder with the deployed graph.

    Returns:
        The NMS after it. None if nothing was written: for a batch other than 1, or a free height or
        width.

    Raises:
        RuntimeError: see `write_openvino_programs`; or the NMS is of another kind.
    """
    if input_shape[0] != 1 or None in input_shape[2:]:
        return None
    with _as_engine_error(), _forms(network), earlier_format():
        graph = trace_detector(model, input_shape)
        program = graph.forward.concrete_program
        *kept, boxes, scores = program.outputs
        if not any(isinstance(layer, FixedActivation) for layer in network.sublayers()):
            write_earlier_program(graph, kept, folder)  # because other programs do not run integers
        nms = _find_nms(program.main_program, boxes, scores)
        _write(graph, [boxes, scores], folder, FILES["paddle"].raw_program)
    return nms


@contextmanager
def _forms(model: nn.Layer) -> Iterator[None]:
    """Put our layers into the forms for this graph. The forms of integers come last, because the
    other forms contain integer layers too."""
    with token_form(model), difference_form(model), head_form(model), integer_form(model):
        yield


def _find_nms(program: paddle.static.Program, boxes: Tensor, scores: Tensor) -> Nms:
    """Return the settings of the operator that selects from boxes and scores."""
    kinds = [op for op in program.global_block().ops if op.type == "multiclass_nms3"]
    if len(kinds) != 1 or kinds[0].attr("nms_eta") != 1.0:
        raise InputError("expected one NMS of many classes, with a fixed threshold")
    (op,) = kinds
    if [*op.input("BBoxes"), *op.input("Scores")] != [boxes.name, scores.name]:
        raise InputError("expected that NMS gets boxes and scores as the model gives them")
    limits = {name: op.attr(name) for name in ("nms_top_k", "keep_top_k", "background_label")}
    known = {name: None if value < 0 else value for name, value in limits.items()}
    return Nms(
        # Attributes are float32: 0.01 is 0.009999999776.
        score_threshold=float(f"{op.attr('score_threshold'):.7g}"),
        iou_threshold=float(f"{op.attr('nms_threshold'):.7g}"),
        candidates=known["nms_top_k"],
        kept=known["keep_top_k"],
        normalized=op.attr("normalized"),
        background=known["background_label"],
    )


@contextmanager
def _as_engine_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise  # for example a full disk, which is not a fault of the model
    except Exception as error:  # tracing may raise anything
        raise EngineError(f"The model has no graph for OpenVINO ({_reason(error)}).") from error


def write_float_program(model: nn.Layer, input_shape: Sequence[int], folder: Path) -> None:
    """Write a graph of a model with integer layers, up to the logits, that computes in float. The
    time of the integers is compared with it. `folder` is made, with `model.pdmodel` and its own
    weights."""
    with float_form(model), _forms(model), earlier_format():
        graph = trace(model, input_shape, "none", every_output=True)
        paddle.jit.save(graph, str(folder / "model"))


def write_float_detector(model: nn.Layer, input_shape: Sequence[int], folder: Path) -> None:
    """Like `write_float_program` for a detector (see `export_detector`), up to its boxes and
    scores."""
    with float_form(model), _forms(model), earlier_format():
        graph = trace_detector(model, input_shape)
        *_, boxes, scores = graph.forward.concrete_program.outputs
        save_graph(graph, str(folder / "model"), [boxes, scores])


def write_products(
    layers: Sequence[nn.Layer], shapes: Sequence[Sequence[int]], folder: Path
) -> None:
    """Write a graph in which each integer layer is separate, with its own input and output, in the
    given order: `x0`, `x1`, and so on."""
    products = Products(layers)
    with integer_form(products), earlier_format():
        paddle.jit.save(trace_products(products, shapes), str(folder / "model"))
    program = folder / FILES["paddle"].earlier_program
    program.write_bytes(slim_serialized_program(program.read_bytes()))


def _reason(error: Exception) -> str:
    """Return the end of an error message of tracing, without the lines of code before it."""
    named = [line for line in str(error).splitlines() if re.match(r"\s*\w+Error: ", line)]
    return named[-1].strip() if named else join_error_lines(error)


def _write(
    graph: nn.Layer,
    outputs: list[object] | None,
    folder: Path,
    name: str = FILES["paddle"].earlier_program,
) -> None:
    program = write_earlier_program(graph, outputs, folder, name)
    try:
        check_operators(program.read_bytes())
    except EngineError:
        program.unlink()
        raise


def write_earlier_program(
    graph: nn.Layer,
    outputs: list[object] | None,
    folder: Path,
    name: str = FILES["paddle"].earlier_program,
) -> Path:
    """Write a graph that was traced in the earlier format next to the `model.pdiparams` of an
    export.

    Args:
        graph: result of `trace` or `trace_detector` inside `earlier_format`.
        outputs: the outputs to keep; None for all.
        folder: of the export.
        name: of the file. Default `model.pdmodel`.

    Returns:
        Its path.

    Raises:
        InputError: the weights of the two formats differ.
    """
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as work,
        name_storage_errors(folder, Path(work)),
    ):
        prefix = Path(work) / "model"
        save_graph(graph, str(prefix), outputs)
        weights = (folder / "model.pdiparams").read_bytes()
        if prefix.with_suffix(".pdiparams").read_bytes() != weights:
            raise InputError("the weights of the two formats differ")
        program = slim_serialized_program(prefix.with_suffix(".pdmodel").read_bytes())
    (folder / name).write_bytes(program)
    return folder / name


# Operators of the earlier format that OpenVINO's reader in Paddle 3.2 does not know. (It only says
# that it cannot convert the model.) Operators with a replacement in `ppvision.forms.earlier_format`
# are listed too, for the arguments that the replacement does not take.
LACKED = frozenset(
    {
        "argsort", "atan", "bitwise_not", "brelu", "celu", "channel_shuffle", "conv3d", "cumprod",
        "diag_v2", "distribute_fpn_proposals", "einsum", "erf", "fold", "index_sample",
        "instance_norm", "isfinite_v2", "isinf_v2", "isnan_v2", "kron", "log1p", "log2",
        "log_softmax", "logsigmoid", "logsumexp", "maxout", "mish", "pixel_shuffle", "prelu",
        "put_along_axis", "reciprocal", "selu", "sign", "size", "softsign", "square", "tan",
        "unbind", "unfold", "uniform_random", "unpool",
    }
)  # fmt: skip


def check_operators(program: bytes) -> None:
    """Raise `EngineError` for a serialised program with operators that OpenVINO does not know."""
    description = parse_program(program)
    kinds = {op.type for block in description.blocks for op in block.ops}
    if lacked := sorted(kinds & LACKED):
        raise EngineError(f"OpenVINO does not know {', '.join(lacked)}")


# A run does not need these. While a program is read, memory holds several copies of each, and
# together they take more memory than the weights of many models.
_IDLE_ATTRIBUTES = {"op_callstack", "op_device", "op_namescope", "op_role", "op_role_var"}
_IDLE_OUTPUTS = {"XShape"}  # needed only for gradients of reshapes


def slim_serialized_program(program: bytes) -> bytes:
    """Return a serialised program without idle attributes, idle outputs and empty slots."""
    description = parse_program(program)
    for block in description.blocks:
        used: set[str] = set()
        for op in block.ops:
            _keep(op.attrs, lambda attribute: attribute.name not in _IDLE_ATTRIBUTES)
            _undilate(op)
            _keep(op.inputs, lambda slot: slot.arguments)
            _keep(op.outputs, lambda slot: slot.arguments and slot.parameter not in _IDLE_OUTPUTS)
            used.update(name for slot in (*op.inputs, *op.outputs) for name in slot.arguments)
        _keep(block.vars, lambda variable: variable.name in used)  # noqa: B023 (called at once)
    return description.SerializeToString()


def _undilate(op: Message) -> None:
    """Remove the dilation of convolutions with padding "same": Paddle ignores it there, OpenVINO
    does not."""
    attributes = {attribute.name: attribute for attribute in op.attrs}
    padding = attributes.get("padding_algorithm")
    if "dilations" in attributes and padding is not None and padding.s == "SAME":
        dilations = attributes["dilations"].ints
        dilations[:] = [1] * len(dilations)


def _keep(repeated: MutableSequence[Message], wanted: Callable[[Message], object]) -> None:
    """Remove the unwanted entries of a repeated field."""
    kept = [item for item in repeated if wanted(item)]
    del repeated[:]
    repeated.extend(kept)
