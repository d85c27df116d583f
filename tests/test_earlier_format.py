"""Tracing in the earlier program format: what stands for Paddle's functions gives their numbers,
and everything is as before afterwards."""

import sys
import threading

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.base.framework import Variable
from paddle.base.proto import framework_pb2
from paddle.static import InputSpec

from ppvision.deploy.run.engines import PaddleRuntime, has_openvino
from ppvision.deploy.write.openvino import slim_serialized_program
from ppvision.forms.earlier_format import (
    STAND_INS,
    append_operator,
    earlier_format,
    in_earlier_format,
)

A = (2, 4, 6, 6)  # the shape of x


def ones_in(function):
    """Whole numbers from a bool, which a graph gives back as such."""
    return lambda *args: function(*args).astype("float32")


def square_of(x):
    return x[0, 0]


def over_channels(x):
    return x.mean([0, 2, 3])  # [4]


def whole_numbers(x):
    """Fractions in eager mode, where only repaired models may mix them (`plugins.shims`)."""
    sizes = paddle.shape(x)[::-1].reshape([1, 4, 1, 1])
    return sizes if in_earlier_format() else sizes.astype("float32")


def sizes_as_tensors(x, y):
    """As PaddleSeg's GINet and PointRend use them."""
    _, channels, height, width = paddle.shape(x)
    count = (height * width).astype("float32")
    by_concat = paddle.concat([(channels // 2).reshape([1]), paddle.shape(x)[2:].reshape([2])])
    return paddle.divide(x, count) + y.reshape([-1, channels, height, width]) + by_concat.sum()


# Function -> what is computed with it, of x and y; each is traced and run by Paddle and OpenVINO.
CASES = {
    "matmul": lambda x, y: paddle.matmul(x, y, transpose_y=True),
    "bmm": lambda x, y: paddle.bmm(x.flatten(0, 1), y.flatten(0, 1)),
    "multiply": lambda x, y: paddle.multiply(x, y) + x.multiply(y),
    "maximum": lambda x, y: paddle.maximum(x, y),
    "minimum": lambda x, y: x.minimum(y),
    "greater_than": ones_in(lambda x, y: paddle.greater_than(x, y)),
    "logical_and": ones_in(lambda x, y: paddle.logical_and(x > 0, y > 0)),
    "logical_or": ones_in(lambda x, y: paddle.logical_or(x > 0, y > 0)),
    "logical_xor": ones_in(lambda x, y: paddle.logical_xor(x > 0, y > 0)),
    "logical_not": ones_in(lambda x, y: paddle.logical_not(x > 0)),
    "amax": lambda x, y: paddle.amax(x, [1, 2], True) + x.amax(-1, keepdim=True),
    "amin": lambda x, y: x.amin(axis=1),
    "all": ones_in(lambda x, y: paddle.all(x > -1, axis=1)),
    "any": ones_in(lambda x, y: (x > 1).any(axis=[2, 3], keepdim=True)),
    "cos": lambda x, y: paddle.cos(x),
    "floor": lambda x, y: paddle.floor(3 * x),
    "log": lambda x, y: (x * x + 0.1).log(),
    "rsqrt": lambda x, y: paddle.rsqrt(x * x + 0.1),
    "sigmoid": lambda x, y: x.sigmoid() + F.sigmoid(y),
    "sin": lambda x, y: x.sin(),
    "sqrt": lambda x, y: paddle.sqrt(x * x),
    "expand_as": lambda x, y: paddle.expand_as(x[:, :1], y) * 1.0,
    "roll": lambda x, y: paddle.roll(x, [1, -2], [2, 3]) + x.roll(1, 1),
    "tril": lambda x, y: paddle.tril(square_of(x), -1),
    "triu": lambda x, y: square_of(x).triu(1),
    "isfinite": ones_in(lambda x, y: paddle.isfinite(x / F.relu(y))),
    "isinf": ones_in(lambda x, y: paddle.isinf(x / F.relu(y))),
    "isnan": ones_in(lambda x, y: paddle.isnan(paddle.log(x))),
    "logsumexp": lambda x, y: paddle.logsumexp(x, 1) + x.logsumexp([1], keepdim=True)[:, 0],
    "sign": lambda x, y: paddle.sign(F.relu(x) - F.relu(-y)),
    "abs": lambda x, y: paddle.abs(x) + y.abs(),
    "argsort": lambda x, y: paddle.argsort(x, 1).astype("float32"),
    "bitwise_not": ones_in(lambda x, y: paddle.logical_and(~(x > 0), paddle.bitwise_not(y > 0))),
    "diag": lambda x, y: paddle.diag(over_channels(x)),
    "einsum": lambda x, y: paddle.einsum("bchw,bdhw->bcd", x, y),
    "log10": lambda x, y: paddle.log10(x * x + 0.1),
    "log1p": lambda x, y: paddle.log1p(x * x),
    "log2": lambda x, y: paddle.log2(x * x + 0.1),
    "masked_fill": lambda x, y: paddle.masked_fill(x, y > 0, 0.5),
    "numel": lambda x, y: x * paddle.numel(y).astype("float32"),
    "reciprocal": lambda x, y: paddle.reciprocal(x * x + 0.1),
    "shape": lambda x, y: F.interpolate(x, paddle.shape(y)[2:] * 2, mode="nearest"),
    "sort": lambda x, y: paddle.sort(x, 1, descending=True),
    "square": lambda x, y: x.square(),
    "std": lambda x, y: paddle.std(x, [2, 3], keepdim=True),
    "tan": lambda x, y: paddle.tan(0.5 * x),
    "unbind": lambda x, y: paddle.unbind(x, 1)[2] + y.unbind(-3)[0],
    "var": lambda x, y: paddle.var(x, 1, unbiased=False),
    "nn.functional.celu": lambda x, y: F.celu(x, 0.7),
    "nn.functional.channel_shuffle": lambda x, y: F.channel_shuffle(x, 2),
    "nn.functional.hardtanh": lambda x, y: F.hardtanh(x, -0.5, 0.7),
    "nn.functional.instance_norm": lambda x, y: F.instance_norm(
        x, weight=over_channels(x), bias=over_channels(y)
    ),
    "nn.functional.log_sigmoid": lambda x, y: F.log_sigmoid(x),
    "nn.functional.log_softmax": lambda x, y: F.log_softmax(x, 1),
    "nn.functional.mish": lambda x, y: F.mish(x),
    "nn.functional.pixel_shuffle": lambda x, y: F.pixel_shuffle(x, 2),
    "nn.functional.prelu": lambda x, y: F.prelu(x, over_channels(y))
    + F.prelu(x, over_channels(y)[:1]),
    "nn.functional.selu": lambda x, y: F.selu(x),
    "nn.functional.softsign": lambda x, y: F.softsign(x),
    "nn.functional.unfold": lambda x, y: F.unfold(x, [3, 2], [2, 1], [1, 0, 1, 1], 1),
    "nn.functional.conv._conv_nd": lambda x, y: (
        F.conv2d(x[:, :1], y[:1, :1, :3, :5], stride=[1, 2], padding=[1, 0])
        + F.conv2d(x[:, :2], y[:, :1, :3, :5], stride=[1, 3], padding=[1, 0], groups=2)
    ),
}
# And what is not a function.
OTHERS = {
    "whole numbers and fractions": lambda x, y: y / whole_numbers(x),
    "sizes as tensors": sizes_as_tensors,
    "same padding": lambda x, y: F.conv2d(
        x, paddle.ones([3, 4, 3, 3]), padding="SAME", dilation=2, stride=2
    )
    + F.conv2d(x, paddle.ones([3, 4, 3, 3]), padding=2, dilation=2, stride=2),
}


class Several(nn.Layer):
    """A sum, then what each of some functions gives."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.one = self.create_parameter([1], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x, y):
        y = y * self.one  # a program without parameters is not written
        outputs = [x + y]  # every input is of use
        for name in self.names:
            outputs.append({**CASES, **OTHERS}[name](x, y))
        return outputs


def values():
    random = np.random.default_rng(0)
    return [random.normal(size=A).astype("float32") for _ in "xy"]


def write_program(layer, folder):
    specs = [InputSpec(A, "float32", name) for name in "xy"]
    with earlier_format():
        traced = paddle.jit.to_static(layer, input_spec=specs, full_graph=True)
        paddle.jit.save(traced, str(folder / "model"))
    program = folder / "model.pdmodel"
    program.write_bytes(slim_serialized_program(program.read_bytes()))


def test_each_has_a_case():
    assert set(CASES) == set(STAND_INS)


# Paddle's own remark at every call of its sort.
@pytest.mark.filterwarnings(r"ignore:\s*Non compatible API")
@pytest.mark.parametrize(
    "engine",
    [
        "native",
        pytest.param(
            "openvino",
            marks=pytest.mark.skipif(not has_openvino(), reason="no OpenVINO in this Paddle"),
        ),
    ],
)
def test_same_numbers_as_paddles_functions(tmp_path, engine):
    x, y = values()
    names = [*CASES, *OTHERS]
    layer = Several(names)
    layer.eval()
    with np.errstate(all="ignore"):
        expected = [out.numpy() for out in layer(paddle.to_tensor(x), paddle.to_tensor(y))]
    write_program(layer, tmp_path)
    runtime = PaddleRuntime(tmp_path / "model.pdmodel", tmp_path / "model.pdiparams", engine=engine)
    found = runtime.run({"x": x, "y": y})
    wrong = {
        name: (one.shape, other.shape)
        for name, one, other in zip(["sum", *names], expected, found, strict=True)
        if one.shape != other.shape or not np.allclose(one, other, 1e-5, 1e-5)
    }
    assert not wrong


def test_same_padding_knows_no_dilation(tmp_path):
    write_program(Several(["same padding"]), tmp_path)
    program = framework_pb2.ProgramDesc.FromString((tmp_path / "model.pdmodel").read_bytes())
    found = [
        (attributes["padding_algorithm"].s, list(attributes["dilations"].ints))
        for op in program.blocks[0].ops
        if "conv" in op.type and (attributes := {a.name: a for a in op.attrs})
    ]
    assert found == [("SAME", [1, 1]), ("EXPLICIT", [2, 2])]


def named_values():
    """Everything that a module of Paddle's or ours names, and every attribute of `Variable`."""
    holders = {name: vars(module) for name, module in list(sys.modules.items()) if module}
    return {
        (holder, name): value
        for holder, names in {**holders, "Variable": vars(Variable)}.items()
        if holder.startswith(("paddle", "ppdet", "ppvision", "Variable"))
        for name, value in names.items()
    }


def find_changes(before):
    after = named_values()
    return {key for key, value in before.items() if after.get(key) is not value}


@pytest.mark.parametrize("end", [None, KeyError])
def test_everything_is_as_before(tmp_path, end):
    write_program(Several(["matmul"]), tmp_path)  # loads what tracing loads
    before, gone = named_values(), None
    try:
        with earlier_format():
            changed = find_changes(before)
            write_program(Several(["matmul", "sigmoid"]), tmp_path)  # nested
            assert find_changes(before) == changed
            if end:
                raise end
    except KeyError as error:
        gone = error
    assert (gone is not None) == (end is not None)
    assert {
        ("paddle", "matmul"),
        ("paddle.tensor.math", "maximum"),
        ("paddle.nn.functional", "sigmoid"),
        ("paddle.nn.functional.activation", "prelu"),
        ("paddle._C_ops", "multiclass_nms3"),
        ("Variable", "sigmoid"),
        ("Variable", "__truediv__"),
    } <= changed
    assert ("paddle._C_ops", "matmul") not in changed
    assert not find_changes(before)


def test_inside_eager_mode_has_paddles_functions():
    x = paddle.to_tensor([[4.0]])
    assert not in_earlier_format()
    with earlier_format():
        assert not in_earlier_format()
        assert paddle.rsqrt(x).item() == 0.5
        assert paddle.matmul.__module__ == "paddle.tensor.math"


def test_another_thread_waits():
    entered, seen = threading.Event(), []

    def enter():
        with earlier_format():
            entered.set()
            seen.append(paddle.matmul)

    other = threading.Thread(target=enter)
    with earlier_format():
        other.start()
        assert not entered.wait(0.2)
        ours = paddle.matmul
    other.join(30)
    assert entered.is_set()
    assert seen != [ours]
    assert paddle.matmul not in (ours, *seen)


def test_an_operator_of_the_callers_own(tmp_path):
    class Rounding(Several):
        def forward(self, x, y):
            assert in_earlier_format()
            return [
                append_operator("cast", {"X": x}, "int32", in_dtype=5, out_dtype=2),
                y * self.one,
            ]

    write_program(Rounding([]), tmp_path)
    x, y = values()
    runtime = PaddleRuntime(tmp_path / "model.pdmodel", tmp_path / "model.pdiparams")
    found, _ = runtime.run({"x": x, "y": y})
    assert found.dtype == np.int32
    assert np.array_equal(found, x.astype("int32"))
