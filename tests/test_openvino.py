"""The graph for OpenVINO: the same numbers as the blocks that are trained, and what stands beside
it in an export."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from paddle import nn

import ppvision
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.engines import has_openvino, open_runtime
from ppvision.deploy.verify import comparison, running
from ppvision.deploy.write import openvino
from ppvision.deploy.write.openvino import write_openvino_programs
from ppvision.forms import earlier_format
from ppvision.forms.paddle_private import parse_program
from ppvision.forms.tokens import (
    TokenPaleBlock,
    from_token_groups,
    to_map,
    to_token_groups,
    to_tokens,
    token_form,
)
from ppvision.models.pale_transformer import PaleBlock, PaleTransformer
from ppvision.nn.semantic_diffusion import SIMILARITIES, SemanticDiffusionPyramid
from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config
from ppvision.quant import OnceQAT, save_layered
from ppvision.quant.packed import PackedLayer, pack_model
from ppvision.quant.store.state import extract_state
from tests.helpers.folders import check_unchanged
from tests.helpers.messages import raises_naming, warns_naming
from tests.helpers.small_pale import SMALL_PALE

SIZES = [(7, 7), (14, 21), (16, 9), (8, 15), (3, 5), (1, 1), (20, 13), (1, 30)]
needs_openvino = pytest.mark.skipif(
    not has_openvino(), reason="this build of Paddle has no OpenVINO"
)


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(3)


def randomised(layer):
    """Weights, biases and statistics that are all different from their first values."""
    generator = np.random.default_rng(0)
    for name, tensor in layer.state_dict().items():
        values = generator.normal(size=tensor.shape)
        positive = name.endswith("_variance")
        tensor.set_value((np.abs(values) + 0.5 if positive else values).astype("float32"))
    layer.eval()
    return layer


def noise(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def small(**settings):
    model = PaleTransformer(SMALL_PALE, **{"num_classes": 5, **settings})
    model.eval()
    return model


def blocks_in_token_form(model):
    return sum(isinstance(layer, TokenPaleBlock) for layer in model.sublayers())


def exported(folder, model=None, **settings):
    how = {"input_shape": [None, 3, 50, 64], "output_op": "none", "task": "classification"}
    return export_model(model or small(), folder, **{**how, **settings})


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An export as `exported` makes it: `(model, folder)`. Nothing changes it."""
    paddle.seed(3)
    model = small()
    folder = exported(tmp_path_factory.mktemp("openvino") / "net", model)
    yield from ((model, f) for f in check_unchanged(folder))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pale_size", [7, (3, 4), 2])
def test_same_numbers_as_the_block(size, pale_size):
    block = randomised(PaleBlock(16, 4, pale_size, 4, 0.0, True, None))
    x = paddle.to_tensor(noise(2, 16, *size))
    with paddle.no_grad():
        expected, found = block(x).numpy(), TokenPaleBlock(block)(x).numpy()
    assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("length", range(1, 31))
@pytest.mark.parametrize("rows", [True, False])
def test_groups_are_interlaced_lines_and_go_back(length, rows):
    """Of a map whose values are places: every group holds each N-th line, and no other."""
    height, width = (length, 3) if rows else (3, length)
    count = -(-length // 7)
    line = np.arange(length)[:, None] if rows else np.arange(length)[None, :]
    places = np.broadcast_to(line, (height, width)).astype("float32")
    x = paddle.to_tensor(np.stack([places, 100 + places], axis=-1)[None, :, :, None])
    sets = to_token_groups(x, 7, rows)  # [1, s, G, W, 1, 2] or [1, H, s, G, 1, 2]
    axis = 2 if rows else 3
    found = [
        sorted(set(np.take(part.numpy()[..., 0], g, axis=axis).reshape(-1)))
        for part in sets
        for g in range(part.shape[axis])
    ]
    assert found == [list(range(first, length, count)) for first in range(count)]
    assert np.array_equal(from_token_groups(sets, rows).numpy(), x.numpy())


def test_tokens_and_maps():
    x = noise(2, 5, 3, 4)
    tokens = to_tokens(paddle.to_tensor(x))
    assert np.array_equal(tokens.numpy(), x.reshape(2, 5, 12).transpose(0, 2, 1))
    assert np.array_equal(to_map(tokens, 3, 4).numpy(), x)


def test_model_is_as_before_even_after_an_error():
    model = small()
    before = [(name, id(layer)) for name, layer in model.named_sublayers()]

    def fail():
        with token_form(model):
            assert blocks_in_token_form(model) == sum(SMALL_PALE.depths)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(name, id(layer)) for name, layer in model.named_sublayers()] == before


def test_padding_that_takes_part_keeps_the_block():
    model = small(mask_padding=False)
    with token_form(model):
        assert blocks_in_token_form(model) == 0


class DoubledBlock(PaleBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer, inputs, output):
    return 2 * output


def as_doubled(block):
    block.__class__ = DoubledBlock


def with_forward_of_its_own(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


# What somebody may have changed in a block of theirs.
CHANGES = {
    "a subclass": as_doubled,
    "a hook": lambda block: block.register_forward_post_hook(doubled),
    "its own forward": with_forward_of_its_own,
    "another forward of a convolution": lambda block: with_forward_of_its_own(
        block.attention.key[2]
    ),
    "a hook of its attention": lambda block: block.attention.register_forward_post_hook(doubled),
    "a hook of a convolution": lambda block: block.attention.key[0].register_forward_post_hook(
        doubled
    ),
    "another activation": lambda block: block.mlp.__setitem__("1", nn.ReLU()),
    "no bias": lambda block: block.mlp.__setitem__("2", nn.Conv2D(32, 8, 1, bias_attr=False)),
    "3x3 in the MLP": lambda block: block.mlp.__setitem__("0", nn.Conv2D(8, 32, 3, padding=1)),
    "a norm without weight": lambda block: block.attention.value.__setitem__(
        "1", nn.BatchNorm2D(8, weight_attr=False)
    ),
    "a bias more": lambda block: block.attention.query.__setitem__(
        "0", nn.Conv2D(8, 8, 3, padding=1, groups=8)
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_blocks_are_exported_as_they_are(tmp_path, change):
    """With the numbers of the changed block, in whatever engine knows it."""
    block = PaleBlock(8, 2, 7, 4, 0.0, True, None)
    CHANGES[change](block)
    model = nn.Sequential(nn.Conv2D(3, 8, 3, stride=2, padding=1), randomised(block))
    model.eval()
    with token_form(model):
        assert blocks_in_token_form(model) == 0
    with warnings.catch_warnings():
        # Their trained form may hold what OpenVINO, or oneDNN, does not know.
        warnings.filterwarnings("ignore", message="(?s).*, which is slower")
        folder = exported(tmp_path / "net", model, task="features", input_shape=[1, 3, 32, 50])
        predictor = Predictor(folder)
    x = noise(1, 3, 32, 50)
    with paddle.no_grad():
        expected = model(paddle.to_tensor(x)).numpy()
    (found,) = predictor.run(x)
    assert np.abs(found - expected).max() <= 1e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("shape", [[1, 3, None, 32], [1, 3, 32, None]], ids=str)
def test_no_graph_of_free_sizes(shape, tmp_path):
    how = {"raw": tmp_path, "final": tmp_path, "every_output": False}
    assert not write_openvino_programs(small(), shape, "none", **how)
    assert list(tmp_path.iterdir()) == []


@needs_openvino
@pytest.mark.parametrize("output_op", ["none", "softmax", "argmax"])
def test_the_quickest_engine_needs_no_flag(net, tmp_path, monkeypatch, output_op):
    model, folder = net
    if output_op != "none":
        folder = exported(tmp_path / "net", model, output_op=output_op)
    monkeypatch.chdir(tmp_path)  # where OpenVINO would leave what it compiles
    predictor = Predictor(folder, threads=1)
    assert predictor.engine == "openvino"
    assert predictor.onednn is False
    for batch in (1, 3, 1):
        x = noise(batch, 3, 50, 64)
        with paddle.no_grad():
            expected = model(paddle.to_tensor(x)).numpy().astype("float64")
        if output_op == "argmax":
            expected = expected.argmax(axis=1)
        elif output_op == "softmax":
            expected = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
        (found,) = predictor.run(x)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5
    assert {path.name for path in tmp_path.iterdir()} <= {"net"}
    held = {"deploy.yaml", "model.json", "model.pdiparams", "model.pdmodel"}
    assert {path.name for path in folder.iterdir()} == held


@needs_openvino
def test_features(tmp_path):
    model = small(features_only=True, num_classes=5)
    folder = exported(tmp_path / "net", model, task="features", input_shape=[2, 3, 64, 96])
    x = noise(2, 3, 64, 96)
    with paddle.no_grad():
        expected = [feature.numpy() for feature in model(paddle.to_tensor(x))]
    predictor = Predictor(folder)
    assert predictor.engine == "openvino"
    for one, other in zip(predictor.run(x), expected, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * max(1, np.abs(other).max())


@needs_openvino
def test_onednn_and_plain_kernels_stay_a_choice(net):
    folder, x = net[1], noise(1, 3, 50, 64)
    (expected,) = Predictor(folder).run(x)
    for use_onednn, engine in ((True, "onednn"), (False, "native")):
        predictor = Predictor(folder, use_onednn=use_onednn)
        assert predictor.engine == engine
        assert np.abs(predictor.run(x)[0] - expected).max() <= 1e-5


@needs_openvino
def test_free_sizes_and_onnx_have_no_graph_for_it(tmp_path):
    for name, settings in (
        ("free", {"input_shape": [1, 3, None, None]}),
        ("onnx", {"format": "onnx"}),
    ):
        folder = exported(tmp_path / name, **settings)
        assert not (folder / "model.pdmodel").exists()
        assert yaml.safe_load((folder / "deploy.yaml").read_text())["openvino"] is None
        assert Predictor(folder).engine == {"free": "onednn", "onnx": None}[name]


@needs_openvino
def test_weights_of_a_layered_model(net, tmp_path, monkeypatch):
    """The graph for OpenVINO runs with each width's weights, and is opened once for each."""
    folder, other = net[1], small()
    layered = OnceQAT(LayeredQAT(slim_quant_config(other)).quantize(other))
    layered.train()  # statistics of every width
    layered(paddle.to_tensor(noise(4, 3, 50, 64)))
    layered.eval()
    save_layered(layered, tmp_path / "layered", bits=(8, 4), config={"type": "pale_nano"})
    x = noise(1, 3, 50, 64)
    opened = []

    def open_counted(*args, **how):
        opened.append(how["engine"])
        return open_runtime(*args, **how)

    monkeypatch.setattr("ppvision.deploy.run.predictor.open_runtime", open_counted)
    predictor = Predictor(folder, layered=tmp_path / "layered")
    for bits in (8, 4, 8, 4):
        predictor.set_bits(bits)
        assert (predictor.engine, predictor.bits) == ("openvino", bits)
        other = Predictor(folder, layered=tmp_path / "layered", bits=bits, use_onednn=True)
        assert np.abs(predictor.run(x)[0] - other.run(x)[0]).max() <= 1e-5
    assert opened.count("openvino") == 2  # Paddle would keep the memory of each
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="TMPDIR"):
        predictor.set_bits(8)
    assert (predictor.engine, predictor.bits) == ("openvino", 4)
    assert np.abs(predictor.run(x)[0] - other.run(x)[0]).max() <= 1e-5


@needs_openvino
def test_packed_codes(tmp_path):
    """They are unpacked when the graph is loaded, as for oneDNN, from the same file."""
    bits, net = 3, small()
    layered = OnceQAT(LayeredQAT(slim_quant_config(net, bits=(8, 3))).quantize(net), (8, 3))
    layered.train()
    layered(paddle.to_tensor(noise(4, 3, 50, 64)))
    layered.eval()
    model = pack_model(small(), extract_state(layered.model, (8, 3)), bits)
    folder = exported(tmp_path / "net", model, bits=bits)
    predictor, x = Predictor(folder), noise(2, 3, 50, 64)
    assert predictor.engine == "openvino"
    with paddle.no_grad():
        expected = model(paddle.to_tensor(x)).numpy()
    assert np.abs(predictor.run(x)[0] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    packed = [layer for layer in model.sublayers() if isinstance(layer, PackedLayer)]
    codes = sum(part.size for layer in packed for part in layer.packed)
    assert 0 < codes < (folder / "model.pdiparams").stat().st_size < 1.5 * codes


@needs_openvino
@pytest.mark.parametrize("similarity", list(SIMILARITIES))
def test_semantic_diffusion(tmp_path, similarity):
    class Network(nn.Layer):
        def __init__(self):
            super().__init__()
            self.fine = nn.Conv2D(3, 8, 3, stride=2, padding=1)
            self.coarse = nn.Conv2D(8, 6, 3, stride=2, padding=1)
            self.block = PaleBlock(8, 2, 7, 2, 0.0, True, None)
            of_classes = {"guidance": "classes", "num_classes": 3}  # a product takes nothing else
            options = of_classes if similarity == "product" else {}
            self.diffusion = SemanticDiffusionPyramid([8, 6], similarity=similarity, **options)

        def forward(self, x):
            fine = self.block(self.fine(x))
            return self.diffusion([fine, self.coarse(fine)])

    model = Network()
    for diffusion in model.diffusion.diffusions:
        diffusion.fuse.weight.set_value(noise(*diffusion.fuse.weight.shape))  # they start at zero
    model.eval()
    folder = exported(tmp_path / "net", model, task="features", input_shape=[1, 3, 64, 97])
    predictor, x = Predictor(folder), noise(1, 3, 64, 97)
    assert predictor.engine == "openvino"
    with paddle.no_grad():
        expected = [feature.numpy() for feature in model(paddle.to_tensor(x))]
    for one, other in zip(predictor.run(x), expected, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * max(1, np.abs(other).max())


@needs_openvino
@pytest.mark.parametrize(
    "output_op", ["none", pytest.param("argmax", marks=pytest.mark.openvino_process)]
)
def test_other_networks_run_in_it_too(tmp_path, output_op):
    model = randomised_classifier()
    folder = exported(tmp_path / "net", model, output_op=output_op, input_shape=[1, 3, 64, 64])
    predictor, x = Predictor(folder), noise(1, 3, 64, 64)
    assert predictor.engine == "openvino"
    with paddle.no_grad():
        expected = model(paddle.to_tensor(x)).numpy()
    if output_op == "argmax":
        expected = expected.argmax(axis=1)
    assert np.abs(predictor.run(x)[0] - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def randomised_classifier():
    model = ppvision.create_model("resnet20", num_classes=5)
    model.eval()
    return model


class Small(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 5, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mean([2, 3])


ENDS = {
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "a hang": ("import time; time.sleep(60)", "took 1 s"),
    "an exit": ("import os; os._exit(3)", "code 3"),
}


@pytest.mark.openvino_process
@needs_openvino
@pytest.mark.parametrize("end", list(ENDS))
def test_a_crash_or_a_hang_turns_it_off_aloud(tmp_path, monkeypatch, end):
    code, reason = ENDS[end]
    monkeypatch.setattr(running, "_CHILD", code)
    monkeypatch.setattr(running.run_in_openvino, "__defaults__", (1.0,))
    model = Small()
    model.eval()
    with warns_naming(UserWarning, *reason.split(), "oneDNN", "instead"):
        folder = exported(tmp_path / "net", model, input_shape=[1, 3, 16, 16])
    assert not (folder / "model.pdmodel").exists()
    assert yaml.safe_load((folder / "deploy.yaml").read_text())["openvino"] is False
    assert Predictor(folder).engine == "onednn"


@needs_openvino
def test_a_lacked_operator_is_named(tmp_path):
    class Unpooling(Small):
        def forward(self, x):
            x, places = nn.functional.max_pool2d(self.conv(x), 2, return_mask=True)
            return nn.functional.max_unpool2d(x, places, 2).mean([2, 3])

    model = Unpooling()
    model.eval()
    with warns_naming(UserWarning, "unpool", "oneDNN"):
        exported(tmp_path / "net", model, input_shape=[1, 3, 16, 16])


@pytest.mark.openvino_process
@needs_openvino
def test_an_export_does_not_open_it_in_its_own_process(tmp_path, monkeypatch):
    engines = []

    def open_noted(*args, engine, **how):
        engines.append(engine)
        return open_runtime(*args, engine=engine, **how)

    monkeypatch.setattr(running, "open_runtime", open_noted)
    model = Small()
    model.eval()
    folder = exported(tmp_path / "net", model, input_shape=[1, 3, 16, 16])
    assert set(engines) == {"native", "onednn"}
    assert (folder / "model.pdmodel").exists()


@needs_openvino
def test_graph_holds_nothing_idle(net):
    """Every variable is of an operator, and no operator has what no run reads."""
    program = parse_program((net[1] / "model.pdmodel").read_bytes())
    (block,) = program.blocks
    slots = [slot for op in block.ops for slot in (*op.inputs, *op.outputs)]
    assert all(slot.arguments for slot in slots)
    assert {variable.name for variable in block.vars} == {n for s in slots for n in s.arguments}
    attributes = {attribute.name for op in block.ops for attribute in op.attrs}
    assert "axis" in attributes
    assert not {name for name in attributes if name.startswith("op_")}


@pytest.mark.openvino_process
@needs_openvino
def test_other_numbers_turn_it_off_aloud(tmp_path, monkeypatch):
    run = comparison.run_in_openvino
    lie = lambda *args: [[[1.25 * out for out in x] for x in graph] for graph in run(*args)]  # noqa: E731
    monkeypatch.setattr(comparison, "run_in_openvino", lie)
    model = randomised(small())
    with warns_naming(UserWarning, "OpenVINO", "differs", "oneDNN"):
        folder = exported(tmp_path / "net", model)
    assert not (folder / "model.pdmodel").exists()
    assert yaml.safe_load((folder / "deploy.yaml").read_text())["openvino"] is False
    assert Predictor(folder).engine == "onednn"


@needs_openvino
def test_what_cannot_be_traced_turns_it_off_aloud(tmp_path, monkeypatch):
    def fail(*args, **settings):
        raise TypeError("no such operator")

    monkeypatch.setitem(earlier_format.STAND_INS, "matmul", fail)
    with warns_naming(UserWarning, "TypeError:", "such", "operator).", "oneDNN"):
        folder = exported(tmp_path / "net")
    assert yaml.safe_load((folder / "deploy.yaml").read_text())["openvino"] is False
    assert Predictor(folder).engine == "onednn"
    assert {path.name for path in folder.iterdir()} == {
        "deploy.yaml", "model.json", "model.pdiparams",
    }  # fmt: skip
    assert paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2])).shape == [2, 2]


@needs_openvino
def test_a_full_disk_is_no_fault_of_the_model(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(openvino, "_write", full)
    with raises_naming(OSError, "space", "left"):
        exported(tmp_path / "net")
    assert not (tmp_path / "net").exists()


@needs_openvino
def test_other_engines_need_no_folder_for_temporary_files(net, tmp_path, monkeypatch):
    folder, x = net[1], noise(1, 3, 50, 64)
    expected = Predictor(folder).run(x)[0]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with warns_naming(UserWarning, "OpenVINO", "FileNotFoundError"):
        predictor = Predictor(folder)
    assert predictor.engine == "onednn"
    assert np.abs(predictor.run(x)[0] - expected).max() <= 1e-5
    assert np.abs(Predictor(folder, use_onednn=False).run(x)[0] - expected).max() <= 1e-5


@needs_openvino
def test_falls_back_aloud_where_it_fails_at_load(net, monkeypatch):
    def open_broken(folder, format, *, engine, **how):
        if engine == "openvino":
            raise ValueError("no plugin")
        return open_runtime(folder, format, engine=engine, **how)

    monkeypatch.setattr("ppvision.deploy.run.predictor.open_runtime", open_broken)
    with warns_naming(UserWarning, "without", "OpenVINO"):
        predictor = Predictor(net[1])
    assert predictor.engine == "onednn"


@needs_openvino
def test_its_graph_is_verified(net, tmp_path):
    folder = Path(shutil.copytree(net[1], tmp_path / "net"))
    path = folder / "model.pdmodel"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with raises_naming(ValueError, "model.pdmodel:", "bytes,", "incomplete"):
        Predictor(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.pdmodel"):
        Predictor(folder)


def test_exports_of_before_still_run(tmp_path):
    """A description of version 1 without the key, which was added to it later."""
    folder = exported(tmp_path / "net", input_shape=[1, 3, None, None])
    description = folder / "deploy.yaml"
    content = yaml.safe_load(description.read_text())
    for key in ("program", "weights", "earlier_format", "openvino"):
        content.pop(key)
    description.write_text(yaml.safe_dump(content | {"format_version": 1}))
    assert Predictor(folder).engine == "onednn"
