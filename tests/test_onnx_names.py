"""Names in ONNX files, on small graphs made by hand. test_deploy_export.py has those of exports."""

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="comes with paddle2onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ppvision import __version__
from ppvision.deploy.write.onnx_names import describe, infer_output_shape, name_onnx, name_outputs


def constant(name, values):
    tensor = numpy_helper.from_array(np.asarray(values))
    return helper.make_node("Constant", [], [name], value=tensor)


def made(nodes, outputs):
    """A model of the input `x`, `[?, 2]`."""
    graph = helper.make_graph(
        nodes,
        "PaddlePaddle Graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["DynamicDimension.0", 2])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", "cols"]) for n in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def linear():
    """`relu(x @ w + b) + 1`, with what paddle2onnx adds."""
    return made(
        [
            constant("linear_0.w_0", np.arange(6, dtype=np.float32).reshape(2, 3)),
            constant("linear_0.b_0", np.array([1, -9, 2], np.float32)),
            constant("p2o.full.0", np.array([1, 3], np.int64)),
            constant("p2o.full.1", np.float32(1)),
            constant("p2o.full.2", np.float32(5)),
            helper.make_node("Identity", ["p2o.full.0"], ["auto.cast.0"]),
            helper.make_node("MatMul", ["x", "linear_0.w_0"], ["p2o.matmul.0"]),
            helper.make_node("Reshape", ["linear_0.b_0", "auto.cast.0"], ["p2o.reshape.0"]),
            helper.make_node("Add", ["p2o.matmul.0", "p2o.reshape.0"], ["p2o.add.0"]),
            helper.make_node("Identity", ["p2o.add.0"], ["p2o.add.1"]),
            helper.make_node("Relu", ["p2o.add.1"], ["p2o.relu.0"]),
            helper.make_node("Relu", ["p2o.relu.0"], ["p2o.relu.1"]),
            helper.make_node("Add", ["p2o.relu.1", "p2o.full.1"], ["p2o.add.2"]),
            helper.make_node("Add", ["p2o.relu.1", "p2o.full.2"], ["p2o.unused"]),
            helper.make_node("Identity", ["p2o.add.2"], ["fetch_name_0"]),
        ],
        ["fetch_name_0"],
    )


NAMES = {"linear_0.w_0": "head.fc.weight", "linear_0.b_0": "head.fc.bias"}


def named(model, **options):
    how = {
        "parameters": NAMES,
        "outputs": ["logits"],
        "output_shapes": [["batch", 3]],
        "metadata": {},
        **options,
    }
    return onnx.load_from_string(name_onnx(model.SerializeToString(), **how))


def test_names():
    found = named(linear())
    assert {t.name for t in found.graph.initializer} == {
        *("head.fc.weight", "head.fc.bias", "constant", "constant_1")
    }
    assert [(node.name, list(node.output)) for node in found.graph.node] == [
        ("head.fc/MatMul", ["head.fc/MatMul"]),
        ("head.fc/Reshape", ["head.fc/Reshape"]),
        ("head.fc/Add", ["head.fc/Add"]),
        ("Relu", ["Relu"]),
        ("Relu_1", ["Relu_1"]),
        ("Add", ["logits"]),
    ]
    sizes = [
        [n.dim_param or n.dim_value for n in value.type.tensor_type.shape.dim]
        for value in (*found.graph.input, *found.graph.output)
    ]
    assert sizes == [["batch", 2], ["batch", 3]]
    assert (found.producer_name, found.producer_version) == ("ppvision", __version__)


def test_it_computes_the_same():
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    before, after = (
        ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (linear(), named(linear()))
    )
    np.testing.assert_array_equal(before, after)
    assert np.ptp(before) > 1


def test_branches_use_the_names_outside():
    """A graph inside of a node names values of the one around it."""

    def branch(name, source):
        node = helper.make_node("Mul", [source, "scale_0.w_0"], [name])
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2])
        return helper.make_graph([node], name, [], [output])

    model = made(
        [
            constant("scale_0.w_0", np.float32(3)),
            constant("p2o.full.0", np.float32(0)),
            helper.make_node("Identity", ["x"], ["p2o.cast.0"]),
            helper.make_node("ReduceMax", ["p2o.cast.0"], ["p2o.max.0"], keepdims=0),
            helper.make_node("Greater", ["p2o.max.0", "p2o.full.0"], ["p2o.greater.0"]),
            helper.make_node(
                "If",
                ["p2o.greater.0"],
                ["fetch_name_0"],
                then_branch=branch("then", "p2o.cast.0"),
                else_branch=branch("else", "x"),
            ),
        ],
        ["fetch_name_0"],
    )
    after = named(model, parameters={"scale_0.w_0": "scale"}, output_shapes=[None])
    assert "scale" in {t.name for t in after.graph.initializer}
    for sign in (1, -1):
        x = sign * np.ones((2, 2), np.float32)
        (found,) = ReferenceEvaluator(after).run(None, {"x": x})
        np.testing.assert_array_equal(found, 3 * x)


def test_metadata():
    said = describe(name="mine", classes=["a", "b"], transforms=[], bits=32, max_value=None)
    assert said == {"name": "mine", "classes": '["a", "b"]', "bits": "32"}
    found = named(linear(), metadata=said)
    assert {entry.key: entry.value for entry in found.metadata_props} == said
    assert json.loads(said["classes"]) == ["a", "b"]
    assert found.graph.name == "mine"


def test_names_of_outputs():
    assert name_outputs("segmentation", "argmax", 1) == ["labels"]
    assert name_outputs("classification", "softmax", 1) == ["scores"]
    assert name_outputs("features", "none", 2) == ["features_0", "features_1"]
    assert name_outputs("detection", "nms", 2) == ["boxes", "counts"]


@pytest.mark.parametrize(
    ("input_shape", "found", "expected"),
    [
        ([1, 3, 8, 8], [(1, 4, 8, 8), (1, 4, 8, 8)], [1, 4, 8, 8]),
        ([None, 3, None, None], [(1, 4, 9, 7), (2, 4, 6, 5)], ["batch", 4, "height", "width"]),
        ([None, 3, None, None], [(1, 4, 3, 2), (2, 4, 2, 2)], ["batch", 4, "size_2", 2]),
        ([1, 3, None, 7], [(1, 9), (1, 9)], [1, 9]),
    ],
)
def test_shapes_of_outputs(input_shape, found, expected):
    sizes = [(1, 3, 9, 7), (2, 3, 6, 5)]
    inputs = [
        tuple(
            size if known is None else known for known, size in zip(input_shape, own, strict=True)
        )
        for own in sizes
    ]
    assert infer_output_shape(input_shape, inputs, found) == expected
