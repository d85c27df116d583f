"""Trace a model into a static graph, and write the graph as a PIR or ONNX file."""

import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import paddle
from paddle import Tensor, nn
from paddle.static import InputSpec

from ppvision.deploy.write.onnx import convert_folders
from ppvision.errors import EngineError, StorageError
from ppvision.files import find_disk_error, make_storage_error
from ppvision.forms.paddle_private import short_stacks, trace_tables

INPUT_NAME = "x"
DETECTOR_INPUTS = ("image", "im_shape", "scale_factor")


class ModelGraph(nn.Layer):
    """Returns the model's outputs and, unless `output_op` is none, the result of the final
    operator."""

    def __init__(self, model: nn.Layer, output_op: str, every_output: bool) -> None:
        super().__init__()
        self.model = model
        self.output_op = output_op
        self.every_output = every_output

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.model(x)
        if not isinstance(outputs, (list, tuple)):
            outputs = [outputs]
        if self.every_output:
            return list(outputs)
        logits = outputs[0]
        if self.output_op == "none":
            return [logits]
        return [logits, _final_op(logits, self.output_op)]


def _final_op(logits: Tensor, output_op: str) -> Tensor:
    """Apply a graph's final operator to its logits, over axis 1: "argmax" (int32) or "softmax"."""
    if output_op == "argmax":
        return paddle.argmax(logits, axis=1, dtype="int32")
    return nn.functional.softmax(logits, axis=1)


class _DetectorGraph(nn.Layer):
    """Returns all outputs of a detector."""

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, im_shape: Tensor, scale_factor: Tensor) -> list[Tensor]:
        return self.model(image, im_shape, scale_factor)


def trace(
    model: nn.Layer, input_shape: Sequence[int | None], output_op: str, *, every_output: bool
) -> nn.Layer:
    """Trace `model`, which must be in evaluation mode, for inputs of `input_shape`.

    Returns:
        A layer for `write_graphs`. Its outputs: the logits, or with `every_output` all that the
        model gives; then, for "argmax" and "softmax", the result of `output_op` over axis 1.

    Raises:
        RuntimeError: the model cannot be traced; the cause is attached.
    """
    graph = ModelGraph(model, output_op, every_output)
    graph.eval()
    return _traced(graph, [InputSpec(list(input_shape), "float32", name=INPUT_NAME)])


def trace_detector(model: nn.Layer, input_shape: Sequence[int | None]) -> nn.Layer:
    """Trace a detector, which must be in evaluation mode.

    Args:
        model: takes `image`, `im_shape`, `scale_factor` (`ppvision.deploy.write.detection_export`).
        input_shape: of `image`.

    Raises:
        RuntimeError: it cannot be traced; the cause is attached.
    """
    graph = _DetectorGraph(model)
    graph.eval()
    shapes = (list(input_shape), [input_shape[0], 2], [input_shape[0], 2])
    specs = [
        InputSpec(shape, "float32", name=name)
        for name, shape in zip(DETECTOR_INPUTS, shapes, strict=True)
    ]
    return _traced(graph, specs)


class Products(nn.Layer):
    """Parallel layers; each has its own input and output.

    Args:
        layers: with one input and one output.
    """

    def __init__(self, layers: Sequence[nn.Layer]) -> None:
        super().__init__()
        self.layers = nn.LayerList(layers)
        self.eval()

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._run(inputs)

    @paddle.jit.not_to_static  # the loop unrolls
    def _run(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def trace_products(products: Products, shapes: Sequence[Sequence[int]]) -> nn.Layer:
    """Trace `products` for inputs of these shapes, called `x0`, `x1`, and so on."""
    specs = [
        InputSpec(list(shape), "float32", name=f"x{place}") for place, shape in enumerate(shapes)
    ]
    return paddle.jit.to_static(products, input_spec=[specs], full_graph=True)


def _traced(graph: nn.Layer, specs: list[InputSpec]) -> nn.Layer:
    graph = paddle.jit.to_static(graph, input_spec=specs, full_graph=True)
    recorded = [set(table) for table in trace_tables()]
    try:
        with warnings.catch_warnings(), short_stacks():
            # ones_like and similar functions ask a traced tensor for its device, but it has none.
            warnings.filterwarnings("ignore", message="(Value|Tensor) do not have 'place'")
            # A detector's `_, x = topk(...)` in only one branch.
            warnings.filterwarnings("ignore", message="Return results has maybe unbound local")
            # Paddle's own arange, in the earlier format.
            warnings.filterwarnings("ignore", message=r"The Attr\(force_cpu\) of Op")
            graph.forward.concrete_program  # noqa: B018 (traces, and keeps the result)
    except Exception as error:
        # Paddle deletes its notes on a program when the program is complete. If tracing fails, a
        # later program with the same hash (its address) would get the notes.
        for table, known in zip(trace_tables(), recorded, strict=True):
            for key in set(table) - known:
                del table[key]
        if (number := find_disk_error(error)) is not None:  # Paddle writes generated code to files
            raise make_storage_error(number, Path(tempfile.gettempdir())) from error
        if isinstance(error, OSError) and error.filename is not None:
            raise StorageError(
                f"The model cannot be traced: {os.fsdecode(error.filename)} cannot be opened "
                f"({error.strerror}). Paddle writes the code that it makes below HOME and TMPDIR; "
                "set them to folders that can be written."
            ) from error
        raise EngineError(
            f"The model cannot be traced into a static graph: {error}\n"
            "Read sizes from x.shape, use whole-number arithmetic (//, %), and branch on nothing "
            "but sizes and settings."
        ) from error
    return graph


def write_graphs(graph: nn.Layer, parts: Mapping[Path, Sequence[int] | None], format: str) -> None:
    """Write a traced graph, whole or reduced to some of its outputs.

    Args:
        graph: from `trace` or `trace_detector`.
        parts: folder -> places of the outputs to keep, or None for all. Folders are made when
            missing.
        format: "paddle" writes `model.json` and `model.pdiparams`, "onnx" writes `model.onnx`.

    Raises:
        EngineError: paddle2onnx cannot convert it.
        MissingPackageError: paddle2onnx is not installed.
    """
    for folder, outputs in parts.items():
        save_graph(graph, str(folder / "model"), None if outputs is None else list(outputs))
    if format == "onnx":
        sizes = graph.forward.function_spec.input_spec[0].shape[2:]
        convert_folders(list(parts), any_size=any(n is None or n < 0 for n in sizes))
        return
    for folder in parts:
        program = folder / "model.json"
        program.write_text(slim_program(program.read_text(encoding="utf-8")), encoding="utf-8")


def slim_program(text: str) -> str:
    """Remove from a program (PIR, as JSON) what no run reads: the layer of each operator, and which
    outputs have no gradient. This is two fifths of its bytes."""
    content = json.loads(text)
    for region in content["program"]["regions"]:
        _slim_region(region)
    return json.dumps(content, separators=(",", ":"))


def _slim_region(region: dict) -> None:
    for block in region["blocks"]:
        for op in block["ops"]:
            if op["#"] == "p":  # a parameter, whose attributes have no names
                continue
            op["A"] = [entry for entry in op.get("A", []) if entry["N"] != "struct_name"]
            op["OA"] = []
            for inner in op.get("regions", []):  # of a branch or a loop
                _slim_region(inner)


def save_graph(graph: nn.Layer, prefix: str, outputs: list | None) -> None:
    """Call `paddle.jit.save` without unused inputs, which it refuses: a detector's sizes may be
    unused."""
    specs = list(graph.forward.function_spec.input_spec)
    for kept in range(len(specs), 0, -1):
        for chosen in itertools.combinations(specs[1:], kept - 1):
            try:
                paddle.jit.save(graph, prefix, input_spec=[specs[0], *chosen], output_spec=outputs)
                return
            except ValueError as error:
                if "not involved" not in str(error) or kept == 1:
                    raise
