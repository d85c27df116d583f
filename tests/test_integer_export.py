"""Exports that multiply integers: what is written, what runs, and what is refused."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver

import ppvision
from ppvision.data.convert.digit_scenes import load_digits
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run import integer_probe, precision
from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.integer_probe import compute_expected_sums, find_integer_fault, probe_codes
from ppvision.deploy.run.manifest import Manifest, PrecisionCheck, read_manifest
from ppvision.deploy.run.precision import (
    choose_precision,
    find_integer_doubt,
    find_integer_unit,
    find_usable_flags,
)
from ppvision.deploy.write import bfloat16_check, integer_check
from ppvision.deploy.write.integers import tell_engine
from ppvision.errors import EngineError, InputError, MissingFileError, PpvisionError
from ppvision.forms.paddle_private import parse_program
from ppvision.models.pale_transformer import PaleTransformer
from ppvision.quant import OnceQAT
from ppvision.quant.packed import pack_model
from ppvision.quant.ptq.integers import quantize_to_integers
from ppvision.quant.store.state import extract_state
from tests.helpers.messages import raises_naming
from tests.helpers.small_pale import SMALL_PALE
from tests.helpers.write_integer_probe import write_probe

SIDE = 32
WIDTHS = (8, 4, 2)
LAYERS = ["stem", "depthwise", "point", "head"]
TRANSFORMS = [{"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]
VNNI = frozenset({"avx2", "avx512_vnni"})

needs_integers = pytest.mark.skipif(
    not has_openvino() or find_integer_unit(find_usable_flags()) is None,
    reason="no OpenVINO, or a processor without VNNI",
)


class Net(nn.Layer):
    def __init__(self, classes=4):
        super().__init__()
        paddle.seed(1)
        self.stem = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2D(8)
        self.depthwise = nn.Conv2D(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2D(8, 16, 1)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.stem(x)))
        x = nn.functional.gelu(self.point(self.depthwise(x)))
        return 20 * self.head(x.mean(axis=[2, 3]))


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
        "int8": True,
    }
    return export_model(model, folder, **(arguments | others))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pictures):
    return export(Net(), tmp_path_factory.mktemp("export") / "net-int8", calibration=pictures)


# -- the folder ------------------------------------------------------------------------------------


@needs_integers
def test_deploy_yaml_says_what_is_in_the_folder(exported):
    manifest = read_manifest(exported)
    assert (manifest.activations, manifest.bits, manifest.openvino) == (8, 8, True)
    assert manifest.calibration.pictures == 6
    assert manifest.calibration.method == "minimum_error"
    assert manifest.keep_float == []
    checked = manifest.int8
    assert checked.passed
    assert checked.engine == "openvino"
    assert checked.equal_labels == 1.0
    assert checked.milliseconds > 0
    assert checked.float_milliseconds > 0


@needs_integers
@pytest.mark.parametrize("integers_ms", [1.0, 3.0])
def test_the_log_says_what_integers_change_and_whether_they_pay(
    tmp_path, pictures, caplog, monkeypatch, integers_ms
):
    monkeypatch.setattr(integer_check, "time_in_openvino", lambda *arguments: [integers_ms, 2.0])
    with caplog.at_level("INFO", "ppvision"):
        export(Net(), tmp_path / "net", calibration=pictures)
    (change,) = re.findall(r"6 calibration images .* in float by (\S+)%", caplog.text)
    assert 0 < float(change) < 5
    assert "loses least" not in caplog.text
    assert ("use a float export" in caplog.text) == (integers_ms > 2)


class Doubled(nn.Conv2D):
    """A layer of the user's, which integers do not know."""

    def forward(self, x):
        return 2 * super().forward(x)


class Odd(nn.Layer):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2D(3, 8, 3, padding="SAME", dilation=2)
        self.doubled = Doubled(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(nn.functional.relu(self.doubled(self.wide(x))).mean([2, 3]))


@needs_integers
def test_same_padding_with_dilation_and_layers_of_the_users(tmp_path, pictures, caplog):
    """Paddle ignores the dilation there; OpenVINO does not, unless the graph says so."""
    with caplog.at_level("INFO", "ppvision"):
        folder = export(Odd(), tmp_path / "odd", calibration=pictures)
    assert read_manifest(folder).int8.passed
    assert read_manifest(folder).keep_float == ["doubled"]
    assert "doubled" in caplog.text


@needs_integers
def test_integers_that_failed_their_check_run_with_a_warning(exported, tmp_path, caplog):
    folder = shutil.copytree(exported, tmp_path / "failed")
    described = (folder / "deploy.yaml").read_text()
    assert described.count("passed: true") == 1
    (folder / "deploy.yaml").write_text(described.replace("passed: true", "passed: false"))
    with Predictor(folder, precision="int8", threads=1) as predictor:
        assert predictor.precision == "int8"
    assert "check of the integers failed" in caplog.text


def test_integers_without_openvino_are_named(pictures):
    model = Net()
    assert "int8" not in tell_engine(model)
    quantized = quantize_to_integers(model, [lambda m: m(paddle.ones([1, 3, SIDE, SIDE]))])
    assert "int8" in tell_engine(quantized)


def test_doubts_of_integers(manifest):
    failed = replace(manifest, int8=PrecisionCheck(passed=False))
    assert "check" in find_integer_doubt(failed, VNNI)
    assert find_integer_doubt(replace(manifest, int8=PrecisionCheck(passed=True)), VNNI) is None
    assert "VNNI" in find_integer_doubt(manifest, {"avx2"})


@needs_integers
def test_codes_are_bytes(exported, tmp_path):
    as_float = export(Net(), tmp_path / "float", int8=False)
    sizes = [
        read_manifest(folder).files["model.pdiparams"].bytes for folder in (exported, as_float)
    ]
    assert sizes[0] < sizes[1]


@needs_integers
def test_both_precisions_give_the_same_classes(exported, pictures):
    found = {}
    for name in ("int8", "float32"):
        with Predictor(exported, precision=name, threads=1) as predictor:
            assert predictor.precision == name
            assert predictor.engine == ("openvino" if name == "int8" else "onednn")
            paths = sorted(pictures.iterdir())
            found[name] = [predictor(path).probabilities for path in paths]
    np.testing.assert_allclose(found["int8"], found["float32"], atol=0.02)


@needs_integers
def test_auto_takes_integers_and_says_so(exported, caplog):
    with caplog.at_level("INFO", "ppvision"), Predictor(exported, threads=1) as predictor:
        assert predictor.precision == "int8"
    assert "int8, since" in caplog.text


@needs_integers
def test_auto_takes_float_where_integers_are_wrong(exported, monkeypatch, caplog):
    monkeypatch.setattr(
        "ppvision.deploy.run.predictor.find_integer_fault", lambda isolate: "7 are wrong"
    )
    with caplog.at_level("INFO", "ppvision"), Predictor(exported, threads=1) as predictor:
        assert predictor.precision == "float32"
    assert "7 are wrong" in caplog.text


@needs_integers
def test_a_limit_of_the_instruction_set_is_obeyed(exported, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with Predictor(exported, threads=1) as predictor:
        assert predictor.precision == "float32"


def test_int8_of_a_float_folder_is_refused(tmp_path):
    folder = export(Net(), tmp_path / "float", int8=False)
    with pytest.raises(InputError, match="--int8"):
        Predictor(folder, precision="int8")
    with pytest.raises(InputError, match="precision"):
        Predictor(folder, precision="int4")
    with pytest.raises(InputError, match="OpenVINO"):
        Predictor(folder, precision="bf16", use_onednn=True)


@needs_integers
def test_layers_that_stay_in_float(tmp_path, pictures):
    """By name, and one more that is looked for."""
    folder = export(Net(), tmp_path / "net", calibration=pictures, keep_float=["head", 1])
    kept = read_manifest(folder).keep_float
    assert len(kept) == 2
    assert "head" in kept


@needs_integers
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_widths_of_a_layered_model(bits, tmp_path, pictures):
    """Weights of each width, activations of 8 bits: the exported folder gives eager's classes."""
    slim = pytest.importorskip("ppvision.plugins.paddleslim")
    model = Net()
    config = slim.slim_quant_config(model, bits=[8, 4, 2], activations=8)
    quantized = slim.LayeredQAT(config).quantize(model)
    quantized.train()
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal((8, 3, SIDE, SIDE)), "float32")
    quantized(x)  # sets the steps
    state = extract_state(quantized, (8, 4, 2))
    packed = pack_model(Net(), state, bits, integers=True)
    folder = export(packed, tmp_path / "net", bits=bits)
    manifest = read_manifest(folder)
    assert (manifest.bits, manifest.activations) == (bits, 8)
    assert manifest.calibration.method == "learned"
    assert manifest.int8.passed
    with paddle.no_grad():
        eager = nn.functional.softmax(packed(x[:1]), axis=1).numpy()
    with Predictor(folder, precision="int8", threads=1) as predictor:
        np.testing.assert_allclose(predictor.run(x[:1].numpy())[0], eager, atol=0.01)


@pytest.mark.skipif(not has_openvino(), reason="no OpenVINO")
@pytest.mark.parametrize("integers", [True, False])
def test_query_key_and_value_that_round_alike(integers, tmp_path):
    """They read one map and get the same steps. The graph for OpenVINO rounds it once, and has to
    have the stored tensors of the other graph. (Packed codes with rounding in float have it too.)
    """
    slim = pytest.importorskip("ppvision.plugins.paddleslim")
    paddle.seed(0)
    model = PaleTransformer(SMALL_PALE, num_classes=4)
    config = slim.slim_quant_config(model, bits=[8, 4], activations=8)
    quantized = slim.LayeredQAT(config).quantize(model)
    quantized.train()
    x = np.random.default_rng(3).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
    quantized(paddle.to_tensor(x))  # sets the steps
    state = extract_state(quantized, (8, 4))
    packed = pack_model(PaleTransformer(SMALL_PALE, num_classes=4), state, 4, integers=integers)
    attention = packed.stages[0][0].attention
    assert attention.query[0].activation is attention.value[0].activation
    assert attention.query[0].activation is not attention.project.activation
    folder = export(packed, tmp_path / "net", bits=4, output_op="none", int8=integers)
    manifest = read_manifest(folder)
    assert manifest.openvino
    program = parse_program((folder / "model.pdmodel").read_bytes())
    kinds = [op.type for op in program.blocks[0].ops]
    blocks = sum(path.endswith("attention.query.0") for path in state.activations)
    assert blocks == 2
    if integers:  # one for query, key and value of each block; two for its projection, per branch
        assert kinds.count("quantize_linear") == len(state.activations) - 2 * blocks + blocks
    with paddle.no_grad():
        eager = packed(paddle.to_tensor(x[:1])).numpy()
    with Predictor(folder, precision="int8" if integers else "float32", threads=1) as predictor:
        found = predictor.run(x[:1])[0]
    largest = max(1.0, np.abs(eager).max())
    assert np.abs(found - eager).max() / largest <= max(1e-3, manifest.max_error_to_eager)


@needs_integers
@pytest.mark.parametrize("batch", [4, None])
def test_any_batch_is_checked_on_the_pictures(batch, tmp_path, pictures):
    """Six pictures do not fill two batches of four."""
    folder = export(
        Net(), tmp_path / "net", calibration=pictures, input_shape=[batch, 3, SIDE, SIDE]
    )
    checked = read_manifest(folder).int8
    assert checked.passed
    assert checked.equal_labels == 1.0


def test_a_layered_model_without_steps_is_refused():
    slim = pytest.importorskip("ppvision.plugins.paddleslim")
    model = Net()
    quantized = slim.LayeredQAT(slim.slim_quant_config(model, bits=[8, 4])).quantize(model)
    state = extract_state(quantized, (8, 4))
    with pytest.raises(InputError, match="activations"):
        pack_model(Net(), state, 8, integers=True)


# -- trained at several widths --------------------------------------------------------------------


class DigitNet(nn.Layer):
    """Learns four digits in seconds."""

    def __init__(self):
        super().__init__()
        paddle.seed(1)
        self.layers = nn.Sequential(
            *(nn.Conv2D(3, 16, 3, stride=2, padding=1), nn.BatchNorm2D(16), nn.ReLU()),
            *(nn.Conv2D(16, 32, 3, stride=2, padding=1), nn.BatchNorm2D(32), nn.ReLU()),
            *(nn.Conv2D(32, 32, 3, stride=2, padding=1, groups=4), nn.BatchNorm2D(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 4)),
        )

    def forward(self, x):
        return self.layers(x)


class InkNet(nn.Layer):
    """Learns in seconds which pixels are ink, and of a high or a low digit."""

    def __init__(self):
        super().__init__()
        paddle.seed(1)
        self.down = nn.Sequential(
            *(nn.Conv2D(3, 16, 3, stride=2, padding=1), nn.BatchNorm2D(16), nn.ReLU()),
            *(nn.Conv2D(16, 32, 3, stride=2, padding=1), nn.BatchNorm2D(32), nn.GELU()),
        )
        self.wide = nn.Conv2D(32, 32, 3, padding=4, dilation=4, groups=4)
        self.up = nn.Conv2DTranspose(32, 16, 4, stride=4)
        self.near = nn.Conv2D(3, 16, 3, padding=1)
        self.head = nn.Conv2D(32, 3, 1)

    def forward(self, x):
        far = nn.functional.relu(self.up(nn.functional.gelu(self.wide(self.down(x)))))
        return self.head(paddle.concat([far, nn.functional.relu(self.near(x))], axis=1))


def _digits(part):
    """0 to 3, `[n, 3, 32, 32]` from -1 to 1, and the classes."""
    tiles, classes = load_digits(part)
    tiles, classes = tiles[classes < 4], classes[classes < 4]
    tiles = np.pad(tiles, [(0, 0), (2, 2), (2, 2)]).astype(np.float32) / 127.5 - 1
    return np.repeat(tiles[:, None], 3, axis=1), classes.astype(np.int64)


def _inks(part):
    """The same pictures, and of each pixel: 0, nothing; 1, ink of a 0 or 1; 2, of a 2 or 3."""
    x, classes = _digits(part)
    return x, (x[:, 0] > 0) * (1 + (classes > 1))[:, None, None]


def accuracy(labels, truth):
    return float((labels == truth).mean())


def mean_iou(labels, truth):
    both = [((labels == k) & (truth == k)).sum() for k in range(3)]
    either = [((labels == k) | (truth == k)).sum() for k in range(3)]
    return float(np.mean(np.divide(both, either)))


# The network, its data, and the score with the least that shows that it learned.
TRAINED = {
    "classification": (DigitNet, _digits, accuracy, 0.7),  # of four classes
    "segmentation": (InkNet, _inks, mean_iou, 0.4),  # nothing but background: below 0.34
}


@pytest.fixture(
    scope="module",
    params=[
        ("classification", 8),
        ("segmentation", 8),
        pytest.param(("classification", True), marks=pytest.mark.all),
        pytest.param(("segmentation", True), marks=pytest.mark.all),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def trained(request):
    """A small network after 20 steps of once-QAT, inputs of layers at 8 bits (or at as many as the
    weights): its task, the model, and held-out pictures with their labels."""
    slim = pytest.importorskip("ppvision.plugins.paddleslim")
    task, activations = request.param
    network, data, _, _ = TRAINED[task]
    (x, y), held_out = data("train"), data("val")
    model = network()
    config = slim.slim_quant_config(model, bits=WIDTHS, activations=activations)
    once = OnceQAT(slim.LayeredQAT(config).quantize(model), WIDTHS)
    once.train()
    optimizer = paddle.optimizer.AdamW(0.01, parameters=once.parameters())
    random = np.random.default_rng(0)
    for _ in range(20):
        chosen = random.choice(len(x), 48)
        pictures, labels = paddle.to_tensor(x[chosen]), paddle.to_tensor(y[chosen])
        for bits in WIDTHS:
            with once.alone(bits):
                nn.functional.cross_entropy(once(pictures), labels, axis=1).backward()
        optimizer.step()
        optimizer.clear_grad()
    once.eval()
    return task, once, *held_out


@needs_integers
@pytest.mark.parametrize("bits", WIDTHS)
def test_once_qat_scores_in_integers_as_in_eager_mode(bits, trained, tmp_path):
    """What was trained, at each width, against the graph in integers. At 8 bits the graph has the
    first 7 of each weight's code."""
    task, once, x, truth = trained
    network, _, score, least = TRAINED[task]
    once.set_bits(bits)
    with paddle.no_grad():
        eager = once(paddle.to_tensor(x)).numpy().argmax(axis=1)
    state = extract_state(once.model, WIDTHS)
    packed = pack_model(network(), state, bits, integers=True)
    folder = export(packed, tmp_path / "net", bits=bits, output_op="none", task=task)
    assert read_manifest(folder).int8.passed
    with Predictor(folder, precision="int8", threads=1) as predictor:
        found = np.concatenate([predictor.run(one[None])[0].argmax(axis=1) for one in x])
    assert (found == eager).mean() >= 0.995
    scores = [score(labels, truth) for labels in (eager, found)]
    assert abs(scores[0] - scores[1]) <= 0.005 + 1e-9  # half a point
    assert scores[0] > least  # there is something to lose


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "tokens"),
    [
        ({}, "int8: calibration --calibration"),
        ({"calibration": []}, "calibration: image none"),
        (
            {"calibration": "PICTURES", "input_shape": [1, 3, None, None]},
            "input_shape height width",
        ),
        ({"calibration": "PICTURES", "input_shape": [1, 3, 48, 48]}, "calibration: transforms"),
        (
            {"calibration": "PICTURES", "calibration_rule": "mean"},
            "calibration_rule: percentile, 'mean'",
        ),
        ({"calibration": "PICTURES", "keep_float": ["haed"]}, "keep_float: haed. head?"),
        ({"calibration": "PICTURES", "int8": False}, "int8=True"),
        ({"calibration": "PICTURES", "int8": "yes"}, "int8: True False, 'yes'"),
        ({"calibration": "PICTURES", "keep_float": "head"}, "keep_float: paths, 'head'"),
        ({"calibration": "PICTURES", "keep_float": True}, "keep_float: many True"),
        ({"calibration": "PICTURES", "keep_float": ["head", 1.5]}, "keep_float: paths, 1.5]"),
        ({"calibration": "PICTURES", "keep_float": 0}, "keep_float least 1"),
        ({"calibration": "PICTURES", "keep_float": 4}, "keep_float 1 3"),
        ({"calibration": "PICTURES", "keep_float": LAYERS}, "keep_float: names all"),
        (
            {"calibration": "PICTURES", "input_shape": [1, 1, SIDE, SIDE]},
            "input_shape: transforms 3 channels, 1",
        ),
        ({"calibration": 3}, "calibration: folder, paths 3"),
        ({"calibration": [np.zeros((SIDE, SIDE, 3), np.uint8)]}, "calibration: folder, [array"),
        ({"calibration": b"pictures"}, "calibration: folder, b'pictures'"),
    ],
)
def test_what_is_refused(changed, tokens, tmp_path, pictures):
    changed = {k: pictures if v == "PICTURES" else v for k, v in changed.items()}
    with raises_naming((InputError, TypeError), *tokens.split()):
        export(Net(), tmp_path / "net", **changed)
    assert not (tmp_path / "net").exists()


def _a_text(path):
    path.write_bytes(b"no picture")


def _half_a_picture(path):
    data = cv2.imencode(".png", np.zeros((SIDE, SIDE, 3), np.uint8))[1].tobytes()
    path.write_bytes(data[: len(data) // 2])


def _sixteen_bits(path):
    cv2.imwrite(str(path), np.full((SIDE, SIDE, 3), 4000, np.uint16))


def _a_pixel(path):
    cv2.imwrite(str(path), np.zeros((1, 1, 3), np.uint8))


def _nothing(path):
    """An empty folder."""


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (_nothing, "calibration: images none"),
        (_a_text, "0.png decode"),
        (_half_a_picture, "0.png cut"),
        (_sixteen_bits, "max_value"),
        (_a_pixel, "calibration: transforms"),
    ],
)
def test_pictures_that_calibrate_nothing_are_named(make, tokens, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder / "0.png")
    with raises_naming(PpvisionError, *tokens.split()):
        export(Net(), tmp_path / "net", calibration=folder)
    assert not (tmp_path / "net").exists()


def test_pictures_that_are_gone_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="gone"):
        export(Net(), tmp_path / "net", calibration=tmp_path / "gone")
    (tmp_path / "list.txt").write_text("gone.png 3\n")
    with pytest.raises(PpvisionError, match=r"gone\.png"):
        export(Net(), tmp_path / "net", calibration=tmp_path / "list.txt")


@pytest.mark.parametrize("mean", [[0.5, 0.5, 0.5], [0.485, 0.456, 0.406]])
def test_pictures_of_one_shade_are_warned_of(mean, tmp_path, caplog):
    transforms = [{"type": "Normalize", "mean": mean, "std": [0.229, 0.224, 0.225]}]
    path = tmp_path / "grey.png"
    cv2.imwrite(str(path), np.full((SIDE, SIDE, 3), 128, np.uint8))
    with caplog.at_level("WARNING", "ppvision"):
        export(Net(), tmp_path / "net", calibration=[path], transforms=transforms)
    assert "one single shade" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["point.weight", "head.bias", "norm.weight", "norm._variance"])
def test_weights_that_are_not_finite_are_refused(name, value, tmp_path, pictures):
    """By name, and also where the ReLU after them turns NaN into 0."""
    model = Net()
    array = model.state_dict()[name].numpy()
    array.reshape(-1)[0] = value
    model.state_dict()[name].set_value(array)
    with raises_naming(InputError, name, "nan", "infinity"):
        export(model, tmp_path / "net", calibration=pictures)


# -- which precision -------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return read_manifest(export(Net(), tmp_path / "float", int8=False))


def test_auto_by_folder_and_processor(manifest):
    integers = replace(manifest, activations=8, openvino=True)
    choose = lambda m, flags, has=True: choose_precision("auto", m, flags, has)[0]  # noqa: E731
    assert choose(manifest, VNNI) == "float32"
    assert choose(integers, VNNI) == "int8"
    assert choose(integers, {"avx2"}) == "float32"
    assert choose(integers, VNNI, has=False) == "float32"
    assert choose(replace(integers, openvino=False), VNNI) == "float32"


def test_bfloat16_is_never_taken_blindly(manifest):
    checked = replace(manifest, openvino=True, bfloat16=PrecisionCheck(passed=True))
    assert choose_precision("auto", checked, {"amx_bf16"}, True)[0] == "bfloat16"
    assert choose_precision("auto", checked, VNNI, True)[0] == "float32"
    unchecked = replace(checked, bfloat16=None)
    assert choose_precision("auto", unchecked, {"amx_bf16"}, True)[0] == "float32"


@needs_integers
@pytest.mark.parametrize("quicker", [True, False])
def test_bfloat16_is_checked_where_the_processor_has_it(quicker, tmp_path, monkeypatch, caplog):
    """As on a processor with `amx_bf16`; without it OpenVINO computes the same, more slowly."""
    folder = tmp_path / "net"
    assert read_manifest(export(Net(), folder, int8=False)).bfloat16 is None
    monkeypatch.setattr("ppvision.deploy.write.export.find_usable_flags", lambda: {"amx_bf16"})
    times = [1.0, 2.0] if quicker else [2.0, 1.0]
    monkeypatch.setattr(bfloat16_check, "time_in_openvino", lambda *_, **__: times)
    with caplog.at_level("INFO", "ppvision"):
        checked = read_manifest(export(Net(), folder, int8=False)).bfloat16
    assert checked.passed is quicker
    assert 1e-5 < checked.max_error < 0.05
    assert checked.equal_labels >= 0.995
    assert (checked.milliseconds, checked.float_milliseconds) == tuple(times)
    assert "labels" in caplog.text
    with caplog.at_level("WARNING", "ppvision"):
        predictor = Predictor(folder, precision="bfloat16")
    assert predictor.precision == "bfloat16"
    assert ("amx_bf16" in caplog.text) == ("amx_bf16" not in find_usable_flags())


def test_other_labels_in_bfloat16_do_not_pass(tmp_path, monkeypatch):
    outputs = [np.float32([[0.0, 1.0]])]
    monkeypatch.setattr(bfloat16_check, "run_in_openvino", lambda *_, **__: [[outputs] * 16])
    monkeypatch.setattr(bfloat16_check, "time_in_openvino", lambda *_, **__: [1.0, 2.0])
    eager = iter([[np.float32([[1.0, 0.0]])]] + [outputs] * 15)
    found = bfloat16_check.check_in_bfloat16(tmp_path, [1, 3, 4, 4], lambda x: next(eager), 1e-3)
    assert not found.passed
    assert found.equal_labels == 15 / 16


def test_flags_are_cut_by_the_limit(monkeypatch):
    monkeypatch.setattr(precision, "read_cpu_flags", lambda: {"amx_int8", "avx512_vnni", "avx2"})
    for limit, unit in (("AVX2", None), ("AVX512_CORE_VNNI", "VNNI"), ("ALL", "AMX")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert find_integer_unit(find_usable_flags()) == unit


# -- the look at the machine -----------------------------------------------------------------------


def test_the_probe_is_what_the_script_writes(tmp_path):
    write_probe(tmp_path)
    kinds = []
    for folder in (tmp_path, integer_probe.FOLDER):  # names in it have counters
        program = parse_program((folder / "model.pdmodel").read_bytes())
        kinds.append([op.type for op in program.blocks[0].ops])
    assert kinds[0] == kinds[1]
    weights = [(f / "model.pdiparams").read_bytes() for f in (tmp_path, integer_probe.FOLDER)]
    assert weights[0] == weights[1]


def test_the_probe_saturates_16_bits():
    """Or it could not show that an engine adds in 16 bits."""
    assert np.abs(compute_expected_sums()).max() > 32767
    assert probe_codes().max() == 255


@needs_integers
def test_integers_are_right_here():
    assert find_integer_fault() is None


@pytest.mark.skipif(not has_openvino(), reason="no OpenVINO")
def test_the_probe_finds_an_engine_that_adds_in_16_bits():
    code = "from ppvision.deploy.run.integer_probe import *; print(find_integer_fault())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "are wrong" in done.stdout


def test_an_engine_that_is_missing_is_a_fault(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise EngineError("no plugin")

    monkeypatch.setattr(integer_probe, "open_runtime", fail)
    assert "no plugin" in find_integer_fault.__wrapped__()


@needs_integers
def test_stock_quanters_of_paddleslim(tmp_path):
    """`docs/paddleslim.md`: a model that PaddleSlim's own quanters trained, in integers: the
    classes of its simulation."""
    slim = pytest.importorskip("paddleslim.quant")
    quanters = pytest.importorskip("paddleslim.quant.quanters")
    (train, train_classes), (val, val_classes) = (_digits(part) for part in ("train", "val"))
    config = slim.SlimQuantConfig(activation=None, weight=None)
    config.add_type_config(
        [nn.Conv2D, nn.Linear],
        activation=FakeQuanterWithAbsMaxObserver(moving_rate=0.9),
        weight=quanters.FakeQuanterChannelWiseAbsMaxObserver(),
    )
    example = paddle.to_tensor(train[:2])
    quantized = slim.SlimQAT(config).quantize(DigitNet(), inplace=False, inputs=example)
    quantized.train()
    optimizer = paddle.optimizer.AdamW(0.01, parameters=quantized.parameters())
    random = np.random.default_rng(0)
    for _ in range(20):
        chosen = random.choice(len(train), 48)
        x, y = paddle.to_tensor(train[chosen]), paddle.to_tensor(train_classes[chosen])
        nn.functional.cross_entropy(quantized(x), y).backward()
        optimizer.step()
        optimizer.clear_grad()
    quantized.eval()
    paddle.save(quantized.state_dict(), str(tmp_path / "model.pdparams"))
    with paddle.no_grad():
        simulated = quantized(paddle.to_tensor(val)).numpy().argmax(1)
    assert (simulated == val_classes).mean() > 0.8  # it has learned

    net = DigitNet()
    ppvision.load_weights(net, tmp_path / "model.pdparams", allow_unexpected=["*_quanter.*"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, image in enumerate(train[:16]):
        tile = ((image + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)
        cv2.imwrite(str(pictures / f"{number}.png"), tile)
    folder = export(net, tmp_path / "net", calibration=pictures, input_shape=[None, 3, SIDE, SIDE])
    assert read_manifest(folder).int8.passed
    with Predictor(folder, precision="int8", threads=1) as predictor:
        found = predictor.run(val)[0].argmax(1)
    assert (found == simulated).mean() > 0.97
