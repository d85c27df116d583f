"""ONNX exports in integers: what the graph holds, what runs it, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.manifest import PrecisionCheck, read_manifest
from ppvision.deploy.run.precision import choose_precision
from ppvision.deploy.write.onnx_integers import quantize_onnx
from ppvision.errors import EngineError
from ppvision.forms.marked_integers import MarkedRounding, Marks
from ppvision.quant.packed import pack_model
from ppvision.quant.store.state import extract_state

onnx = pytest.importorskip("onnx", reason="pip install paddle2onnx")
pytest.importorskip("onnxruntime", reason="pip install onnxruntime")

SIDE = 16
TRANSFORMS = [{"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]


class Net(nn.Layer):
    """Every kind of layer that can hold integers; enough weights that they make the file."""

    def __init__(self):
        super().__init__()
        paddle.seed(1)
        self.stem = nn.Conv2D(3, 64, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2D(64)
        self.grouped = nn.Conv2D(64, 64, 3, padding=2, dilation=2, groups=4)
        self.left = nn.Conv2D(64, 64, 1)
        self.right = nn.Conv2D(64, 64, 3, padding=1)
        self.up = nn.Conv2DTranspose(64, 32, 2, stride=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = nn.functional.gelu(self.grouped(x))
        x = self.left(x) + self.right(x)  # both round the same map alike
        return 50 * self.head(self.up(x).mean(axis=[2, 3]))


LAYERS = ("stem", "grouped", "left", "right", "up", "head")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    random = np.random.default_rng(0)
    for number in range(6):
        coarse = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (SIDE, SIDE)))
    return folder


def export(model, folder, **others):
    arguments = {
        "input_shape": [1, 3, SIDE, SIDE],
        "task": "classification",
        "output_op": "softmax",
        "transforms": TRANSFORMS,
        "format": "onnx",
        "int8": True,
    }
    return export_model(model, folder, **(arguments | others))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pictures):
    return export(Net(), tmp_path_factory.mktemp("export") / "net-int8", calibration=pictures)


@pytest.fixture(scope="module")
def graph(exported):
    return onnx.load(exported / "model.onnx")


def test_deploy_yaml_says_what_is_in_the_folder(exported):
    manifest = read_manifest(exported)
    assert (manifest.format, manifest.activations, manifest.bits) == ("onnx", 8, 8)
    assert manifest.calibration.pictures == 6
    checked = manifest.int8
    assert checked.passed
    assert checked.engine == "onnxruntime"
    assert checked.equal_labels == 1.0
    assert checked.milliseconds > 0
    assert checked.float_milliseconds > 0


def test_weights_are_int8_with_a_scale_per_channel(graph):
    assert next(o.version for o in graph.opset_import if not o.domain) >= 17
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    weights = [
        node
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays
    ]
    assert len(weights) == len(LAYERS)
    model = Net()
    expected = {tuple(getattr(model, name).weight.shape) for name in LAYERS}
    shapes = set()
    for node in weights:
        codes, scale, zero = (arrays[name] for name in node.input)
        (axis,) = (a.i for a in node.attribute if a.name == "axis")
        assert codes.dtype == np.int8
        assert scale.shape == zero.shape == (codes.shape[axis],)
        assert not zero.any()
        assert (scale > 0).all()
        assert np.abs(codes.astype(int)).max() == 127
        shapes.add(codes.shape)
    assert shapes == expected
    large = [a for a in arrays.values() if a.dtype == np.float32 and a.size > 64]
    large += [n for n in graph.graph.node if n.op_type == "Constant" and n.ByteSize() > 1000]
    assert large == []  # no weight is left in float


def test_inputs_are_rounded_as_tensorrt_wants_it(graph):
    """int8, one scale, a zero point of 0, each codes straight back to float; a map that two layers
    read is rounded once."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    rounding = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounding) == len(LAYERS) - 1
    readers = {name: node for node in graph.graph.node for name in node.input}
    for node in rounding:
        _, scale, zero = node.input
        assert arrays[scale].shape == arrays[zero].shape == ()
        assert (arrays[zero].dtype, int(arrays[zero])) == (np.int8, 0)
        back = readers[node.output[0]]
        assert back.op_type == "DequantizeLinear"
        assert list(back.input[1:]) == [scale, zero]


def test_the_file_is_about_a_quarter(exported, tmp_path):
    as_float = export(Net(), tmp_path / "float", int8=False)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (exported, as_float)]
    assert sizes[0] < 0.33 * sizes[1]  # a small network: names and nodes count


def test_every_precision_gives_the_same_classes(exported, pictures):
    found = {}
    for name in ("int8", "float32"):
        with Predictor(exported, precision=name, threads=1) as predictor:
            assert predictor.precision == name
            assert predictor.engine is None
            found[name] = [predictor(path).probabilities for path in sorted(pictures.iterdir())]
    np.testing.assert_allclose(found["int8"], found["float32"], atol=1e-3)


def test_a_process_of_its_own_runs_integers(exported, pictures):
    path = next(pictures.iterdir())
    with Predictor(exported, precision="int8", isolate=True) as predictor:
        found = predictor(path).probabilities
    with Predictor(exported, precision="int8") as predictor:
        np.testing.assert_allclose(found, predictor(path).probabilities, atol=1e-5)


def test_auto_by_processor_and_time(exported):
    manifest = read_manifest(exported)
    quick = PrecisionCheck(passed=True, milliseconds=1.0, float_milliseconds=2.0)
    slow = PrecisionCheck(passed=True, milliseconds=2.0, float_milliseconds=1.0)
    failed = replace(quick, passed=False)
    vnni = {"avx512_vnni"}
    for checked, flags, expected in (
        (quick, vnni, "int8"),
        (quick, {"avx2"}, "float32"),
        (slow, vnni, "float32"),
        (failed, vnni, "float32"),
    ):
        held = replace(manifest, int8=checked)
        assert choose_precision("auto", held, flags, has_openvino=False)[0] == expected
    assert choose_precision("int8", manifest, {"avx2"}, has_openvino=False)[0] == "int8"


@pytest.mark.parametrize("bits", [4, *(pytest.param(k, marks=pytest.mark.all) for k in (8, 7, 2))])
def test_widths_of_a_layered_model(bits, tmp_path):
    """Codes of any width, the middles of their cells, as int8."""
    slim = pytest.importorskip("ppvision.plugins.paddleslim")
    model = Net()
    config = slim.slim_quant_config(model, bits=[8, 7, 4, 2], activations=8)
    quantized = slim.LayeredQAT(config).quantize(model)
    quantized.train()
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal((8, 3, SIDE, SIDE)), "float32")
    quantized(x)  # sets the steps
    state = extract_state(quantized, (8, 7, 4, 2))
    packed = pack_model(Net(), state, bits, integers=True)
    folder = export(packed, tmp_path / "net", bits=bits)
    manifest = read_manifest(folder)
    assert (manifest.bits, manifest.activations) == (bits, 8)
    assert manifest.int8.passed
    held = onnx.load(folder / "model.onnx").graph.initializer
    arrays = [onnx.numpy_helper.to_array(t) for t in held if t.name.endswith(".codes")]
    assert len(arrays) == len(LAYERS)
    width = min(bits, 7)
    for codes in arrays:
        assert (codes % 2 == 1).all()  # 2q + 1
        assert np.abs(codes.astype(int)).max() < 2**width
    with paddle.no_grad():
        eager = nn.functional.softmax(packed(x[:1]), axis=1).numpy()
    with Predictor(folder, precision="int8", threads=1) as predictor:
        np.testing.assert_allclose(predictor.run(x[:1].numpy())[0], eager, atol=0.01)


_OPENVINO = """
import json, sys
import numpy as np
import openvino
given = np.load(sys.argv[2])
core = openvino.Core()
config = {"INFERENCE_PRECISION_HINT": "f32"}
compiled = core.compile_model(core.read_model(sys.argv[1]), "CPU", config)
found = [compiled(x)[0] for x in given["x"]]
kinds = [n.get_rt_info()["runtimePrecision"].astype(str) for n in
         compiled.get_runtime_model().get_ops() if "layerType" in n.get_rt_info()
         and n.get_rt_info()["layerType"].astype(str) == "Convolution"]
np.savez(sys.argv[3], found=np.stack(found))
print(json.dumps(kinds))
"""


@pytest.mark.all
def test_standalone_openvino_agrees(exported, pictures, tmp_path):
    """The package of its own (`pip install openvino`), in a process of its own: Paddle has another
    one inside. It runs the convolutions in integers."""
    pytest.importorskip("openvino", reason="pip install openvino")
    with Predictor(exported, precision="float32", threads=1) as predictor:
        x = np.stack(
            [
                predictor._transforms(cv2.imread(str(p))[..., ::-1])[0][None]
                for p in sorted(pictures.iterdir())
            ]
        ).astype(np.float32)
        expected = np.stack([predictor.run(one)[0] for one in x])
    np.savez(tmp_path / "given.npz", x=x)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _OPENVINO,
            str(exported / "model.onnx"),
            str(tmp_path / "given.npz"),
            str(tmp_path / "found.npz"),
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    found = np.load(tmp_path / "found.npz")["found"]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    kinds = json.loads(done.stdout.splitlines()[-1])
    assert kinds
    assert set(kinds) <= {"i8", "u8", "I8", "U8"}


# -- what paddle2onnx may not do -------------------------------------------------------------------


def test_a_mark_in_another_operator_is_refused(tmp_path):
    """Or an input would be multiplied by a number in place of being rounded."""
    mark = onnx.numpy_helper.from_array(np.float32([3.0]), "mark")
    nodes = [
        onnx.helper.make_node("Constant", [], ["mark"], value=mark),
        onnx.helper.make_node("Div", ["x", "mark"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    onnx.save(model, tmp_path / "model.onnx")
    marks = Marks(roundings={"mark": MarkedRounding(np.float32(0.1), 0, None)})
    with pytest.raises(EngineError, match="Div"):
        quantize_onnx(tmp_path / "model.onnx", marks)


class Same(nn.Layer):
    def __init__(self):
        super().__init__()
        paddle.seed(2)
        self.wide = nn.Conv2D(3, 8, 3, padding="SAME", dilation=2)
        self.even = nn.Conv2D(8, 8, 4, padding="same", stride=2, dilation=3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(nn.functional.relu(self.even(self.wide(x))).mean([2, 3]))


@pytest.mark.parametrize("integers", [False, True], ids=["float", "int8"])
def test_same_padding_with_dilation(tmp_path, pictures, integers):
    """Paddle ignores the dilation; the graph has to say so. The export compares the two."""
    model = Same()
    model.eval()
    kept = [list(model.wide._dilation), list(model.even._dilation)]
    more = {"int8": True, "calibration": pictures} if integers else {}
    folder = export_model(
        model,
        tmp_path / "same",
        input_shape=[1, 3, SIDE, SIDE],
        task="classification",
        format="onnx",
        transforms=TRANSFORMS,
        **more,
    )
    assert [list(model.wide._dilation), list(model.even._dilation)] == kept
    convolutions = [
        node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == "Conv"
    ]
    assert len(convolutions) == 2
    for node in convolutions:
        (dilations,) = [list(a.ints) for a in node.attribute if a.name == "dilations"] or [[1, 1]]
        assert dilations == [1, 1]
    if integers:
        assert read_manifest(folder).int8.passed
