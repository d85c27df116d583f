"""Names in an ONNX file, for people and programs that read it.

paddle2onnx 2.1 calls values `p2o.pd_op.conv2d.3.0` and outputs `fetch_name_0`, keeps parameters as
nodes (`Constant`), adds a node that does nothing (`Identity`) after every addition, and says
nothing of the model. Here the parameters become initialisers under the model's own names, nodes are
called after parameter and operator, outputs after what they are, and the metadata hold what
`deploy.yaml` holds.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paddle import nn

from ppvision import __version__
from ppvision.deploy.run.manifest import FILES

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

# Names of the sizes of an image that are free, by their place.
FREE_SIZES = ("batch", "channels", "height", "width")


def describe(**entries: object) -> dict[str, str]:
    """Metadata: entries of `deploy.yaml` that say something, what is no text as JSON."""
    said = {key: value for key, value in entries.items() if value not in (None, [], {})}
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in said.items()}


def infer_output_shape(
    input_shape: Sequence[int | None],
    inputs: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> list[int | str]:
    """The shape of an output: a number for what is the same at every size that the graph takes, and
    for what is not a name, that of the input's size where the two are equal.

    Args:
        input_shape: of the graph, `[B, C, H, W]`, None for a free one.
        inputs: shapes that the model ran on.
        found: the output's shape for each.
    """
    free = [place for place, size in enumerate(input_shape) if size is None]
    shape: list[int | str] = []
    for axis, sizes in enumerate(zip(*found, strict=True)):
        alike = (p for p in free if all(x[p] == n for x, n in zip(inputs, sizes, strict=True)))
        name = next((FREE_SIZES[place] for place in alike), None)
        if name is None and len(set(sizes)) > 1:
            name = f"size_{axis}"
        shape.append(sizes[0] if name is None else name)
    return shape


def name_onnx(
    data: bytes,
    *,
    parameters: Mapping[str, str],
    outputs: Sequence[str],
    output_shapes: Sequence[Sequence[int | str] | None],
    metadata: Mapping[str, str],
) -> bytes:
    """Give an ONNX model its names; what it computes stays as it is.

    Args:
        data: the model, as a file holds it.
        parameters: name in the graph -> name in the model.
        outputs: names of its outputs, in order.
        output_shapes: sizes of each, a name for a free one (`infer_output_shape`); None to leave
            what the model says.
        metadata: what it says of itself.

    Returns:
        The model.
    """
    import onnx  # of use to exports alone

    model = onnx.load_from_string(data)
    graph = model.graph
    names = _Names(_reserved(graph, outputs))
    _skip_identities(graph)
    _take_constants(graph, parameters, names)
    _drop_unused(graph)
    _name_nodes(graph, set(parameters.values()), names)
    _rename(graph, {o.name: name for o, name in zip(graph.output, outputs, strict=True)})
    for value in graph.input:
        _set_free_sizes(value)
    for value, shape in zip(graph.output, output_shapes, strict=True):
        if shape is not None:
            _set_shape(value, shape)
    graph.name = metadata.get("name", "ppvision")
    model.producer_name, model.producer_version = "ppvision", __version__
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def finish_onnx(
    model: nn.Layer,
    folder: Path,
    *,
    outputs: Sequence[str],
    output_shapes: Sequence[Sequence[int | str] | None],
    metadata: Mapping[str, str],
) -> None:
    """`name_onnx` for the `model.onnx` in a folder, with the parameters' names in `model`."""
    path = folder / FILES["onnx"].program
    parameters = {tensor.name: name for name, tensor in model.state_dict().items()}
    named = name_onnx(
        path.read_bytes(),
        parameters=parameters,
        outputs=outputs,
        output_shapes=output_shapes,
        metadata=metadata,
    )
    path.write_bytes(named)


class _Names:
    """Names that are all different."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._numbers: Counter[str] = Counter()

    def free(self, wanted: str) -> str:
        name = wanted
        while name in self._taken:
            self._numbers[wanted] += 1
            name = f"{wanted}_{self._numbers[wanted]}"
        self._taken.add(name)
        return name


def _reserved(graph: "GraphProto", outputs: Sequence[str]) -> set[str]:
    return {value.name for value in graph.input} | set(outputs)


def _graphs_inside(node: "NodeProto") -> Iterator["GraphProto"]:
    """Of a branch or a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _rename(graph: "GraphProto", changed: Mapping[str, str]) -> None:
    """Call values by other names, wherever they are named."""
    for node in graph.node:
        node.input[:] = [changed.get(name, name) for name in node.input]
        node.output[:] = [changed.get(name, name) for name in node.output]
        for inner in _graphs_inside(node):
            _rename(inner, changed)
    for value in (*graph.output, *graph.value_info, *graph.initializer):
        value.name = changed.get(value.name, value.name)


_OF_INTEGERS = (".codes", ".scale", ".step", ".zero")  # ends of names in `onnx_integers`


def _skip_identities(graph: "GraphProto") -> None:
    """Remove nodes that return their input unchanged. Nodes stay if they return an input of the
    graph, or a value a second time, as an output."""
    given = {value.name for value in graph.output}
    made = {name for node in graph.node for name in node.output}
    for node in reversed(graph.node):
        if node.op_type == "Identity" and node.output[0] in given:
            (before,), (after,) = node.input, node.output
            if before in made and before not in given:
                _rename(graph, {before: after})  # now its input is its own output
                given.add(before)
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:  # in the order of their computation
        if node.op_type == "Identity" and node.input[0] == node.output[0]:
            continue
        if node.op_type == "Identity" and node.output[0] not in given:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    _replace_nodes(graph, kept)
    _rename(graph, source)


def _replace_nodes(graph: "GraphProto", kept: Sequence["NodeProto"]) -> None:
    copies = [type(node).FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)


def _take_constants(graph: "GraphProto", parameters: Mapping[str, str], names: _Names) -> None:
    """Make constants initialisers, under the names of parameters where they are such."""
    kept, changed = [], {}
    for node in graph.node:
        if node.op_type != "Constant" or node.attribute[0].name != "value":
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
    _replace_nodes(graph, kept)
    for tensor in graph.initializer:
        # `onnx_integers` has named what belongs to a layer's integers.
        own = tensor.name if tensor.name.endswith(_OF_INTEGERS) else "constant"
        changed[tensor.name] = names.free(parameters.get(tensor.name, own))
    _rename(graph, changed)


def _drop_unused(graph: "GraphProto") -> None:
    """Remove what gives nothing to an output."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in wanted for name in node.output):
            wanted |= _read_by(node)
            kept.append(node)
    _replace_nodes(graph, kept[::-1])
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _read_by(node: "NodeProto") -> set[str]:
    inner = [n for graph in _graphs_inside(node) for n in graph.node]
    outputs = [v.name for graph in _graphs_inside(node) for v in graph.output]
    return set(node.input).union(outputs, *map(_read_by, inner))


def _name_nodes(graph: "GraphProto", parameters: set[str], names: _Names) -> None:
    """`stages.0.norm/Add` for what adds the parameter `stages.0.norm.bias`, `Add_3` for what has no
    parameter; a node's values are called after it."""
    # The layer whose parameters a constant value is made of.
    layers = {
        tensor.name: tensor.name.rpartition(".")[0] if tensor.name in parameters else ""
        for tensor in graph.initializer
    }
    given = {value.name for value in graph.output}
    changed: dict[str, str] = {}
    for node in graph.node:
        layer = next((layers[name] for name in node.input if layers.get(name)), "")
        node.name = names.free(f"{layer}/{node.op_type}" if layer else node.op_type)
        if node.input and all(name in layers for name in node.input if name):
            layers.update(dict.fromkeys(node.output, layer))
        for place, name in enumerate(node.output):
            if name and name not in given:
                changed[name] = f"{node.name}:{place}" if place else node.name
    _rename(graph, changed)


def _set_free_sizes(value: "ValueInfoProto") -> None:
    """Name the free sizes of an input."""
    for name, size in zip(FREE_SIZES, value.type.tensor_type.shape.dim, strict=False):
        if not size.HasField("dim_value"):
            size.dim_param = name


def _set_shape(value: "ValueInfoProto", shape: Sequence[int | str]) -> None:
    sizes = value.type.tensor_type.shape
    del sizes.dim[:]
    for size in shape:
        if isinstance(size, str):
            sizes.dim.add().dim_param = size
        else:
            sizes.dim.add().dim_value = size
