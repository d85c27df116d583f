"""Give an ONNX file readable names.

paddle2onnx 2.1 names values `p2o.pd_op.conv2d.3.0` and outputs `fetch_name_0`, keeps parameters as
nodes (`Constant`), adds a node without effect (`Identity`) after every addition, and writes no
metadata. Here the parameters become initialisers with the model's own names, nodes get names from
parameter and operator, outputs get names by their meaning, and the metadata have the content of
`deploy.yaml`.
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

# Names of free sizes of an image, by axis.
FREE_SIZES = ("batch", "channels", "height", "width")


def describe(**entries: object) -> dict[str, str]:
    """Return metadata: entries of `deploy.yaml` with information; values that are not text are
    JSON."""
    said = {key: value for key, value in entries.items() if value not in (None, [], {})}
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in said.items()}


def infer_output_shape(
    input_shape: Sequence[int | None],
    inputs: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
) -> list[int | str]:
    """Return the shape of an output: a number for a size that is always the same, and a name for a
    size that changes. If it equals a size of the input, the name is that of the input.

    Args:
        input_shape: input of the graph, `[B, C, H, W]`, None for a free size.
        inputs: input shapes with which the model ran.
        found: shape of the output for each of them.
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
    """Give an ONNX model its names; the computation does not change.

    Args:
        data: the content of the model's file.
        parameters: name in the graph -> name in the model.
        outputs: names of its outputs, in order.
        output_shapes: sizes of each output, with a name for a free size (`infer_output_shape`);
            None to keep those of the model.
        metadata: metadata of the model.

    Returns:
        The model.
    """
    import onnx  # only exports need it

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
    """Apply `name_onnx` to the `model.onnx` in a folder, with the parameters' names of `model`."""
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
    """Gives names that are all different."""

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
    """Yield the graphs of a branch or a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _rename(graph: "GraphProto", changed: Mapping[str, str]) -> None:
    """Rename values everywhere."""
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
    for node in graph.node:  # in the order of computation
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
    """Turn constants into initialisers, with the names of parameters if they are parameters."""
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
        # `onnx_integers` has named the tensors of a layer's integers.
        own = tensor.name if tensor.name.endswith(_OF_INTEGERS) else "constant"
        changed[tensor.name] = names.free(parameters.get(tensor.name, own))
    _rename(graph, changed)


def _drop_unused(graph: "GraphProto") -> None:
    """Remove nodes without effect on an output."""
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
    """Name nodes: `stages.0.norm/Add` for the node that adds the parameter `stages.0.norm.bias`,
    `Add_3` for a node without a parameter. The values of a node get its name."""
    # For a constant value: the layer from whose parameters it is computed.
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
