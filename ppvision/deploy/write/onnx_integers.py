"""ONNX graphs that multiply integers: QuantizeLinear and DequantizeLinear around products.

The form is the one that ONNX Runtime, OpenVINO and TensorRT turn into integer products ("QDQ"):

    weight   int8, a scale per output channel, no zero point -> DequantizeLinear -> layer
    input    QuantizeLinear -> DequantizeLinear -> layer, one scale per tensor, int8

Bias and everything else stay in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from paddle import nn

from ppvision.deploy.run.manifest import FILES
from ppvision.deploy.write.graph import Products, save_graph, trace_products
from ppvision.deploy.write.onnx import convert_folders
from ppvision.errors import EngineError
from ppvision.forms.marked_integers import MarkedRounding, Marks, marked_form
from ppvision.forms.same_padding import same_padding_form
from ppvision.quant.integers import IntegerWeight

if TYPE_CHECKING:  # installed with paddle2onnx, and not needed for other formats
    from onnx import GraphProto, NodeProto, TensorProto


@contextmanager
def write_integer_marks(model: nn.Layer, format: str, folders: Iterable[Path]) -> Iterator[None]:
    """Put the integers of a model's layers into the ONNX graphs that the block writes.

    Args:
        model: in evaluation mode, with integer layers or without.
        format: format of the graphs. For "paddle" nothing is done.
        folders: folders that get a `model.onnx`.

    Raises:
        EngineError: see `quantize_onnx`.
    """
    if format != "onnx":
        yield
        return
    with marked_form(model) as marks:
        yield
    if marks.weights:
        for folder in folders:
            quantize_onnx(folder / FILES["onnx"].program, marks)


def quantize_onnx(path: Path, marks: Marks) -> None:
    """Put integers into a graph that paddle2onnx made of a model in `marked_form`.

    Args:
        path: file of the graph, opset 13 or newer; it is replaced.
        marks: marks of the form. Marks of layers that are not in the graph are ignored.

    Raises:
        EngineError: a mark has another form than expected.
    """
    import onnx

    model = onnx.load(path)
    nodes = _without_identities(model.graph)
    found = _Rewritten(marks)
    for node in nodes:
        found.add(node)
    found.check()
    del model.graph.node[:]
    model.graph.node.extend(found.nodes)
    model.graph.initializer.extend(found.tensors)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class _Rewritten:
    """A graph that grows node by node, with integers instead of the marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._rounded: dict[tuple[str, str], str] = {}  # rounded inputs, by input and mark
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._held: set[str] = set()

    def add(self, node: "NodeProto") -> None:
        """Add the next node, in the graph's order."""
        marks = self._marks
        if node.op_type == "Constant" and node.output[0] in marks.weights:
            self._add_weight(node.output[0], marks.weights[node.output[0]])
        elif node.op_type == "Constant" and node.output[0] in marks.roundings:
            self._add_scales(node.output[0], marks.roundings[node.output[0]])
        elif node.op_type == "Mul" and (mark := _first(node.input, marks.roundings)):
            (x,) = (name for name in node.input if name != mark)
            self._add_rounding(x, mark, node.output[0])
        else:
            self.nodes.append(node)

    def check(self) -> None:
        """Raise `EngineError` if a node reads a mark that was removed."""
        for node in self.nodes:
            if (mark := _first(node.input, self._marks.roundings)) is not None:
                raise EngineError(
                    f"paddle2onnx cannot convert this model in integers: it wrote the rounding of "
                    f"an input as {node.op_type} ({mark}), expected Mul. Export with "
                    "format='paddle'."
                )

    def _add_weight(self, name: str, weight: IntegerWeight) -> None:
        # A channel of zeros has a scale of 0, but engines divide by scales.
        dead = weight.scale == 0
        scale = np.where(dead, np.float32(1), weight.scale)
        alive = np.moveaxis(weight.codes, weight.axis, -1) * ~dead
        codes = np.moveaxis(alive.astype(np.int8), -1, weight.axis)
        inputs = [
            self._hold(f"{name}.codes", np.ascontiguousarray(codes)),
            self._hold(f"{name}.scale", scale.astype(np.float32)),
            self._hold(f"{name}.zero", np.zeros(len(scale), np.int8)),
        ]
        self._append("DequantizeLinear", inputs, name, axis=weight.axis)

    def _add_scales(self, mark: str, rounding: MarkedRounding) -> None:
        self._hold(f"{mark}.step", np.array(rounding.step, np.float32))
        self._hold(f"{mark}.zero", np.array(rounding.zero, np.int8))
        if rounding.clip is not None:
            for name, value in zip(("low", "high"), rounding.clip, strict=True):
                self._hold(f"{mark}.{name}", np.array(value, np.float32))

    def _add_rounding(self, x: str, mark: str, output: str) -> None:
        if (x, mark) in self._rounded:  # layers that read the same map share its rounding
            self._append("Identity", [self._rounded[x, mark]], output)
            return
        self._rounded[x, mark] = output
        if self._marks.roundings[mark].clip is not None:
            self._append("Clip", [x, f"{mark}.low", f"{mark}.high"], f"{output}.clipped")
            x = f"{output}.clipped"
        ends = [f"{mark}.step", f"{mark}.zero"]
        self._append("QuantizeLinear", [x, *ends], f"{output}.codes")
        self._append("DequantizeLinear", [f"{output}.codes", *ends], output)

    def _append(self, kind: str, inputs: Sequence[str], output: str, **attributes: int) -> None:
        from onnx import helper

        node = helper.make_node(kind, inputs, [output], name=f"{output}.{kind}", **attributes)
        self.nodes.append(node)

    def _hold(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self._held:
            self._held.add(name)
            self.tensors.append(numpy_helper.from_array(array, name))
        return name


def _first(names: Iterable[str], known: Iterable[str]) -> str | None:
    return next((name for name in names if name in known), None)


def _without_identities(graph: "GraphProto") -> "list[NodeProto]":
    """Remove nodes that change nothing, of which paddle2onnx writes many: engines need a
    DequantizeLinear directly before its layer. Nodes that give outputs of the graph stay."""
    from onnx import AttributeProto

    if any(a.type == AttributeProto.GRAPH for node in graph.node for a in node.attribute):
        return list(graph.node)  # a branch or a loop may read them
    results = {output.name for output in graph.output}
    known: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = known.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in results:
            known[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    return kept


def write_onnx_products(
    layers: Sequence[nn.Layer], shapes: Sequence[Sequence[int]], folder: Path
) -> None:
    """Like `ppvision.deploy.write.openvino.write_products`, but for ONNX."""
    products = Products(layers)
    with same_padding_form(products), write_integer_marks(products, "onnx", [folder]):
        save_graph(trace_products(products, shapes), str(folder / "model"), None)
        convert_folders([folder], any_size=False)
