"""export_model: what it writes, the comparison inside, and what it leaves alone or behind."""

import hashlib
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from paddle import nn

from ppvision.deploy import ParityError, Predictor, export_model
from ppvision.deploy.run.engines import OnnxRuntime, open_runtime
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.task_table import softmax
from ppvision.deploy.run.transforms import Transforms
from ppvision.deploy.verify import parity, running
from ppvision.deploy.write.graph import write_graphs
from ppvision.errors import InputError
from ppvision.forms.paddle_private import trace_tables
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer
from ppvision.nn.semantic_diffusion import SemanticDiffusionPyramid
from tests.helpers.messages import raises_naming, warns_naming
from tests.helpers.small_pale import SMALL_PALE

NORMALIZE = {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Net(nn.Layer):
    """Logits `[B, K, H, W]` in a list, as PaddleSeg's models give them."""

    def __init__(self, classes=4):
        super().__init__()
        self.down = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2D(8)
        self.drop = nn.Dropout(0.5)
        self.up = nn.Conv2D(8, classes, 1)

    def forward(self, x):
        y = self.up(self.drop(nn.functional.relu(self.norm(self.down(x)))))
        y = nn.functional.interpolate(y, x.shape[2:], mode="bilinear")
        return [y, y * 2] if self.training else [y]


class Classifier(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(nn.functional.gelu(self.conv(x)).mean(axis=[2, 3]))


class Lies(Net):
    """Gives other numbers once it is traced."""

    def forward(self, x):
        (y,) = super().forward(x)
        return [y if paddle.in_dynamic_mode() else y * 1.25]


class OnlyMultiplesOf32(Net):
    def forward(self, x):
        if paddle.in_dynamic_mode():
            assert x.shape[2] % 32 == 0, "height is no multiple of 32"
        return super().forward(x)


class ChannelsLast(Net):
    """oneDNN cannot run a convolution with data_format NHWC (PADDLE 3.2)."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2D(3, 3, 3, padding=1, data_format="NHWC")

    def forward(self, x):
        return super().forward(self.last(x.transpose([0, 2, 3, 1])).transpose([0, 3, 1, 2]))


def eager(model, x):
    model.eval()
    with paddle.no_grad():
        out = model(paddle.to_tensor(x))
    return [o.numpy() for o in (out if isinstance(out, list) else [out])]


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def manifest(folder):
    return yaml.safe_load((folder / "deploy.yaml").read_text())


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(7)


FREE = ["batch", 3, "height", "width"]


def shapes_in_onnx(folder):
    """Of the inputs and outputs that an exported `model.onnx` declares."""
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    return {
        value.name: [n.dim_param or n.dim_value for n in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("output_op", ["argmax", "softmax", "none"])
@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_segmentation_runs_at_sizes_it_was_not_checked_on(tmp_path, format, output_op):
    model = Net()
    folder = export_model(
        model,
        tmp_path / "net",
        input_shape=[None, 3, None, None],
        output_op=output_op,
        format=format,
    )
    files = {"paddle": {"model.json", "model.pdiparams"}, "onnx": {"model.onnx"}}[format]
    clients = {"model.pdmodel"}  # for PaddleSeg's, by --all
    assert {p.name for p in folder.iterdir()} - clients == files | {"deploy.yaml"}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    if format == "onnx":
        name = {"argmax": "labels", "softmax": "scores", "none": "logits"}[output_op]
        sizes = ["batch", "height", "width"] if output_op == "argmax" else [*FREE[:1], 4, *FREE[2:]]
        assert shapes_in_onnx(folder) == {"x": FREE, name: sizes}
        assert read_manifest(folder).outputs == [name]
    for engine in ("native", "onednn") if format == "paddle" else ("native",):
        runtime = open_runtime(folder, format, threads=1, engine=engine)
        for shape in ((1, 3, 20, 33), (3, 3, 41, 16), (1, 3, 20, 33)):
            x = noise(*shape)
            (logits,) = eager(model, x)
            (out,) = runtime.run(x)
            if output_op == "argmax":
                assert out.dtype == np.int32
                assert np.array_equal(out, logits.argmax(axis=1))
            elif output_op == "softmax":
                assert np.allclose(out, softmax(logits), atol=1e-5)
            else:
                assert np.allclose(out, logits, atol=1e-5)


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_classification(tmp_path, format):
    model = Classifier()
    folder = export_model(
        model,
        tmp_path / "net",
        input_shape=[None, 3, 24, 24],
        format=format,
        task="classification",
        classes="abcde",
    )
    x = noise(4, 3, 24, 24)
    (out,) = open_runtime(folder, format).run(x)
    assert np.array_equal(out, eager(model, x)[0].argmax(axis=1))
    assert manifest(folder)["checked_shapes"] == [[1, 3, 24, 24], [2, 3, 24, 24]]


@pytest.fixture(scope="module")
def pale(tmp_path_factory):
    """pale_nano's features; weights large enough for every operator to matter."""
    paddle.seed(3)
    model = PaleTransformer(VARIANTS["pale_nano"], features_only=True)
    for parameter in model.parameters():
        if parameter.ndim == 4 and list(parameter.shape[2:]) == [1, 1]:
            parameter.set_value(parameter * 5)
    folder = export_model(
        model,
        tmp_path_factory.mktemp("pale") / "pale_nano",
        input_shape=[None, 3, None, None],
        output_op="none",
        task="features",
        transforms=[NORMALIZE],
    )
    return model, folder


@pytest.mark.parametrize("engine", ["native", "onednn"])
def test_pale_with_every_size_free(pale, engine):
    """Multiples of the pale size, sizes that need padding on one axis or both, other batches."""
    model, folder = pale
    runtime = open_runtime(folder, "paddle", engine=engine)
    for batch, height, width in (
        (1, 112, 137), (3, 97, 131), (2, 56, 56), (1, 224, 224), (1, 33, 5), (1, 56, 224),
    ):  # fmt: skip
        x = noise(batch, 3, height, width)
        expected, got = eager(model, x), runtime.run(x)
        assert len(expected) == len(got) == 4
        for a, b in zip(expected, got, strict=True):
            assert a.shape == b.shape
            assert np.abs(a).max() > 1
            assert parity.relative_error(a, b) < 1e-4


def test_pale_manifest(pale):
    written = manifest(pale[1])
    assert written["checked_shapes"] == [
        [1, 3, 97, 131], [2, 3, 97, 131], [1, 3, 112, 137], [2, 3, 112, 137],
    ]  # fmt: skip
    assert written["onednn"] is True
    assert written["task"] == "features"
    assert written["transforms"] == [NORMALIZE]
    assert 0 < written["max_error_to_eager"] < 1e-4


@pytest.mark.parametrize(
    "shape",
    [
        [1, 3, 64, None],
        pytest.param([None, 3, None, 50], marks=pytest.mark.all),
        pytest.param([2, 3, 64, 50], marks=pytest.mark.all),
    ],
)
def test_pale_with_some_sizes_fixed(tmp_path, shape):
    model = PaleTransformer(SMALL_PALE, num_classes=7)
    folder = export_model(
        model, tmp_path / "net", input_shape=shape, output_op="none", task="classification"
    )
    x = noise(*(given or free for given, free in zip(shape, (3, 3, 45, 71), strict=True)))
    (out,) = open_runtime(folder, "paddle").run(x)
    assert parity.relative_error(eager(model, x)[0], out) < 1e-4


def test_pale_in_onnx(tmp_path):
    model = PaleTransformer(SMALL_PALE, num_classes=7)
    folder = export_model(
        model,
        tmp_path / "net",
        input_shape=[None, 3, None, None],
        output_op="none",
        task="classification",
        format="onnx",
    )
    x = noise(2, 3, 50, 71)
    (out,) = OnnxRuntime(folder / "model.onnx").run(x)
    assert parity.relative_error(eager(model, x)[0], out) < 1e-4
    assert shapes_in_onnx(folder) == {"x": FREE, "logits": ["batch", 7]}
    import onnx

    content = onnx.load(folder / "model.onnx")
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in content.graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(tensors[name], parameter.numpy())
    nodes = [node.name for node in content.graph.node]
    assert {"merges.0.0/Conv", "head/MatMul"} <= set(nodes)
    assert len(set(nodes)) == len(nodes)
    assert not {"Constant", "Identity"} & {node.op_type for node in content.graph.node}


class PaleWithDifferences(nn.Layer):
    """Features of a small Pale with SDN."""

    def __init__(self):
        super().__init__()
        model = PaleTransformer(SMALL_PALE, features_only=True)
        self.pale = model
        self.diffusion = SemanticDiffusionPyramid(model.feat_channels, similarity="gaussian")
        for diffusion in self.diffusion.diffusions:  # they start at zero
            diffusion.fuse.weight.set_value(0.05 * paddle.randn(diffusion.fuse.weight.shape))

    def forward(self, x):
        return self.diffusion(self.pale(x))


@pytest.mark.parametrize("shape", [[None, 3, None, None], [2, 3, 50, 71]])
def test_forms_for_graphs_in_onnx(tmp_path, monkeypatch, shape):
    """SDN in the form for graphs; Pale as it is trained, which ONNX Runtime runs quickest."""
    model, formed = PaleWithDifferences(), []

    def write_noted(graph, *args):
        formed.extend(type(layer).__name__ for layer in graph.sublayers())
        write_graphs(graph, *args)

    monkeypatch.setattr("ppvision.deploy.write.export.write_graphs", write_noted)
    folder = export_model(
        model,
        tmp_path / "net",
        input_shape=shape,
        output_op="none",
        task="features",
        format="onnx",
    )
    named = [f"features_{place}" for place in range(4)]
    assert read_manifest(folder).outputs == named
    if None not in shape:
        assert shapes_in_onnx(folder)["features_1"] == [2, 64, 7, 9]
    assert "GraphPaleAttention" not in formed
    assert formed.count("GraphSemanticDifference") == 4
    x = noise(2, 3, 50, 71)
    outputs = OnnxRuntime(folder / "model.onnx").run(x)
    for expected, out in zip(eager(model, x), outputs, strict=True):
        assert parity.relative_error(expected, out) < 1e-4


def test_manifest_describes_the_files(tmp_path):
    folder = export_model(
        Net(),
        tmp_path / "digits",
        input_shape=(None, 3, None, None),
        transforms=[{"type": "Resize", "target_size": (40, 30)}, NORMALIZE],
        classes=["background", "one", "two", "three"],
    )
    written = manifest(folder)
    assert written["format_version"] == 2
    assert (written["program"], written["weights"]) == ("model.json", "model.pdiparams")
    assert written["earlier_format"] is False
    assert written["name"] == "digits"
    assert written["task"] == "segmentation"
    assert written["format"] == "paddle"
    assert written["input_shape"] == [None, 3, None, None]
    assert written["output_op"] == "argmax"
    assert written["bits"] == 32
    assert written["transforms"] == [{"type": "Resize", "target_size": [40, 30]}, NORMALIZE]
    assert written["classes"] == ["background", "one", "two", "three"]
    assert written["paddle_version"] == paddle.__version__
    assert written["max_error_to_eager"] < 1e-5
    assert set(written["files"]) == {"model.json", "model.pdiparams"}
    for name, entry in written["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_deployed_graph_holds_no_more_than_it_gives(tmp_path):
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    assert (folder / "model.json").read_text().count('"1.fetch"') == 1


def test_the_model_is_left_as_it_was(tmp_path):
    model = Net()
    model.train()
    model.norm.eval()  # a frozen BatchNorm in a model that is being trained
    modes = {name: layer.training for name, layer in model.named_sublayers(include_self=True)}
    names = {name: set(vars(layer)) for name, layer in model.named_sublayers(include_self=True)}
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    trainable = [p.stop_gradient for p in model.parameters()]
    export_model(model, tmp_path / "net", input_shape=[None, 3, None, None])

    layers = dict(model.named_sublayers(include_self=True))
    assert {name: layer.training for name, layer in layers.items()} == modes
    assert {name: set(vars(layer)) for name, layer in layers.items()} == names
    assert [p.stop_gradient for p in model.parameters()] == trainable
    for name, value in model.state_dict().items():
        assert np.array_equal(value.numpy(), weights[name])
    logits, doubled = model(paddle.to_tensor(noise(2, 3, 8, 8)))  # still trains
    (logits + doubled).mean().backward()
    assert model.up.weight.grad is not None


def test_modes_come_back_after_a_failure(tmp_path):
    model = Lies()
    model.train()
    model.norm.eval()
    model.forward_mode = None
    with pytest.raises(ParityError):
        export_model(model, tmp_path / "net", input_shape=[1, 3, 48, 48])
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("format", ["paddle", "onnx"])
@pytest.mark.parametrize("output_op", ["argmax", "none"])
def test_other_numbers_are_an_error_with_the_measured_figure(tmp_path, format, output_op):
    with pytest.raises(ParityError, match=r"\b0\.001\b") as caught:
        export_model(
            Lies(),
            tmp_path / "net",
            input_shape=[None, 3, None, None],
            format=format,
            output_op=output_op,
        )
    assert 0.05 < caught.value.error < 0.26
    assert f"{caught.value.error:.3g}" in str(caught.value)
    assert caught.value.tolerance == 1e-3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["paddle", "onnx"])
@pytest.mark.parametrize(
    ("output_op", "module", "wrong", "tokens"),
    [
        ("argmax", paddle, paddle.argmin, "classes logits"),
        ("softmax", nn.functional, nn.functional.log_softmax, "output 0 differs"),
    ],
)
def test_a_wrong_output_op_behind_right_logits(
    tmp_path, monkeypatch, format, output_op, module, wrong, tokens
):
    monkeypatch.setattr(module, output_op, wrong)
    with raises_naming(ParityError, *tokens.split()):
        export_model(
            Net(), tmp_path / "net", input_shape=[1, 3, 48, 48], output_op=output_op, format=format
        )
    assert list(tmp_path.iterdir()) == []


def _lie(monkeypatch, liar: str) -> None:
    """Paddle Inference gives other numbers with oneDNN only, or without it only."""

    def open_liar(folder, format, *, engine, **how):
        runtime = open_runtime(folder, format, engine=engine, **how)
        run = runtime.run
        runtime.run = lambda x: [(1.25 if engine == liar else 1) * out for out in run(x)]
        return runtime

    monkeypatch.setattr(running, "open_runtime", open_liar)


def test_other_numbers_without_onednn_are_an_error(tmp_path, monkeypatch):
    _lie(monkeypatch, "native")
    with raises_naming(ParityError, "Inference", "without", "oneDNN"):
        export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48], output_op="none")
    assert list(tmp_path.iterdir()) == []


def test_other_numbers_with_onednn_turn_it_off_aloud(tmp_path, monkeypatch):
    _lie(monkeypatch, "onednn")
    with warns_naming(UserWarning, "oneDNN", "differs", "with", "without"):
        folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48], output_op="none")
    assert manifest(folder)["onednn"] is False
    assert manifest(folder)["max_error_to_eager"] < 1e-3


def test_onednns_align_corners_fault_is_noticed(tmp_path):
    """Paddle's oneDNN kernel ignores `align_corners`; PaddleSeg's UPerNet and BiSeNet use it."""

    class Enlarges(Net):
        def forward(self, x):
            return nn.functional.interpolate(
                super().forward(x)[0], scale_factor=2, mode="bilinear", align_corners=True
            )

    with warns_naming(UserWarning, "with", "oneDNN", "differs"):
        folder = export_model(Enlarges(), tmp_path / "net", input_shape=[1, 3, None, 48])
    with warns_naming(UserWarning, "oneDNN", "numbers"):
        predictor = Predictor(folder)
    assert predictor.onednn is False
    with raises_naming(RuntimeError, "use_onednn", "gave"):
        Predictor(folder, use_onednn=True)


def test_untraceable_model(tmp_path):
    class Looks(Net):
        def forward(self, x):
            return [self.up(self.down(x)) * x.numpy().astype("float64").tolist()[0][0][0][0]]

    noted = [set(table) for table in trace_tables()]
    with pytest.raises(RuntimeError, match="traced"):
        export_model(Looks(), tmp_path / "net", input_shape=[None, 3, None, None])
    assert list(tmp_path.iterdir()) == []
    # What Paddle noted of the failed program would reach a later one at the same address.
    assert [set(table) for table in trace_tables()] == noted


def test_a_failed_export_keeps_the_earlier_one(tmp_path):
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ParityError):
        export_model(Lies(), folder, input_shape=[1, 3, 48, 48])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_failed_last_rename_keeps_the_earlier_export(tmp_path, monkeypatch):
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace, renamed = Path.replace, []

    def fail(path, target):
        renamed.append(path.name)
        if path.name == "final":
            raise OSError("no space")
        return replace(path, target)

    # Of a file system that cannot let folders change places.
    monkeypatch.setattr("ppvision.files._exchange", lambda new, folder: False)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="space"):
        export_model(Net(), folder, input_shape=[1, 3, 40, 40])
    assert "final" in renamed
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("where", ["before", "between"])
def test_what_a_killed_export_left_is_cleared(tmp_path, where):
    """Killed before its two renames, or between them, when the earlier export stands aside."""
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    left = tmp_path / ".net.ppvision-partial"
    (left / "final").mkdir(parents=True)
    (left / "final" / "model.json").write_text("half")
    if where == "between":
        folder.rename(left / "old")
    with pytest.raises(ParityError):
        export_model(Lies(), folder, input_shape=[1, 3, 48, 48])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_the_work_folder_has_one_name(tmp_path, monkeypatch):
    """So that the next export of the same folder finds what a killed one left."""
    used = []

    def killed(probes, raw, final, *arguments):
        used.append(final)
        raise KeyboardInterrupt

    monkeypatch.setattr("ppvision.deploy.write.export.compare", killed)
    with pytest.raises(KeyboardInterrupt):
        export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    assert used == [tmp_path / ".net.ppvision-partial" / "final"]
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced(tmp_path):
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    export_model(Net(6), folder, input_shape=[1, 3, 40, 40], format="onnx")
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "deploy.yaml"}
    assert manifest(folder)["input_shape"] == [1, 3, 40, 40]
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("files", [["notes.txt"], ["deploy.yaml", "notes.txt"], ["model.json"]])
def test_a_folder_with_other_files_is_not_touched(tmp_path, files):
    folder = tmp_path / "net"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("mine")
    with pytest.raises(FileExistsError, match="files"):
        export_model(Net(), folder, input_shape=[1, 3, 48, 48])
    assert {p.name: p.read_text() for p in folder.iterdir()} == dict.fromkeys(files, "mine")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "net").mkdir()
    folder = export_model(Net(), tmp_path / "net", input_shape=[1, 3, 48, 48])
    assert (folder / "deploy.yaml").is_file()


def test_sizes_that_the_model_does_not_take_are_named(tmp_path):
    with warns_naming(UserWarning, "97,", "131", "multiple", "32"):
        folder = export_model(
            OnlyMultiplesOf32(), tmp_path / "net", input_shape=[None, 3, None, None]
        )
    assert manifest(folder)["checked_shapes"][0] == [1, 3, 96, 128]


def test_a_model_that_runs_at_no_size(tmp_path):
    with raises_naming(ValueError, "input_shape=[None,", "tried"):
        export_model(Net(), tmp_path / "net", input_shape=[None, 5, None, None])


def test_onednn_that_cannot_run_is_said_aloud(tmp_path):
    with warns_naming(UserWarning, "with", "oneDNN", "run"):
        folder = export_model(ChannelsLast(), tmp_path / "net", input_shape=[None, 3, None, None])
    assert manifest(folder)["onednn"] is False


def test_a_comparison_that_cannot_fail_is_said_aloud(tmp_path):
    model = Net()
    model.up.weight.set_value(model.up.weight * 1e-6)
    model.up.bias.set_value(model.up.bias * 0)
    with warns_naming(UserWarning, "parity", "fail"):
        export_model(model, tmp_path / "net", input_shape=[1, 3, 48, 48])


def test_not_finite_models_are_refused(tmp_path):
    model = Net()
    model.up.bias.set_value(paddle.full([4], float("nan")))
    with pytest.raises(ValueError, match="finite"):
        export_model(model, tmp_path / "net", input_shape=[1, 3, 48, 48])


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({"input_shape": [3, 16, 16]}, "input_shape: [3, 16]"),
        ({"input_shape": [1, None, 16, 16]}, "input_shape: channels [1, None, 16]"),
        ({"input_shape": [1, 3, -1, 16]}, "input_shape: above -1,"),
        ({"input_shape": [1, 3, 16.0, 16]}, "input_shape: whole 16.0,"),
        ({"output_op": "sigmoid"}, "output_op: argmax, softmax, none, 'sigmoid'"),
        ({"format": "tflite"}, "format: paddle, onnx, 'tflite'"),
        ({"task": "detection"}, "task: segmentation, 'detection'"),
        ({"task": "features"}, "output_op: 'features' 'none'"),
        ({"task": "classification"}, "logits [B, K]"),
        ({"classes": ["a", "b"]}, "classes: 4"),
        ({"transforms": [{"type": "RandomBlur"}]}, "RandomBlur"),
        ({"transforms": [NORMALIZE], "input_shape": [1, 4, 16, 16]}, "transforms 3 channels, 4"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(tmp_path, arguments, tokens):
    with raises_naming(ValueError, *tokens.split()):
        export_model(Net(), tmp_path / "net", **{"input_shape": [1, 3, 48, 48], **arguments})
    assert list(tmp_path.iterdir()) == []


def test_argmax_of_one_class(tmp_path):
    with pytest.raises(ValueError, match="argmax"):
        export_model(Net(1), tmp_path / "net", input_shape=[1, 3, 48, 48])


def test_paddleseg_model(tmp_path):
    """A stock PaddleSeg network: a list of logits, odd sizes."""
    models = pytest.importorskip("paddleseg.models")
    model = models.FastSCNN(num_classes=4)
    folder = export_model(
        model, tmp_path / "net", input_shape=[None, 3, None, None], output_op="none"
    )
    x = noise(1, 3, 75, 90)
    (out,) = open_runtime(folder, "paddle").run(x)
    assert parity.relative_error(eager(model, x)[0], out) < 1e-5


# The rule itself.


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.5], [0.0, 0.25], 0.25),  # below 1 the difference counts as it is
        ([0.0, -8.0], [1.0, -8.0], 0.125),  # above 1, relative to the largest
        ([0.0, 1.0], [0.0, np.nan], np.inf),
        ([0.0, 1.0], [0.0, np.inf], np.inf),
        ([0.0, 1.0], [0.0], np.inf),
    ],
)
def test_relative_error(a, b, expected):
    assert parity.relative_error(np.array(a), np.array(b)) == expected


def test_classes_may_differ_only_in_ties():
    logits = np.array([[2.0, 2.0005, -1.0], [0.0, 1.0, 0.5]])  # [B, K]
    parity.check_classes(logits, np.array([1, 1]), 1e-3, "here")
    parity.check_classes(logits, np.array([0, 1]), 1e-3, "here")  # 2.0 against 2.0005
    with raises_naming(ParityError, "here", "1", "2"):
        parity.check_classes(logits, np.array([1, 2]), 1e-3, "here")
    with pytest.raises(ParityError, match="shape"):
        parity.check_classes(logits, np.array([[1, 1]]), 1e-3, "here")


def test_another_number_of_outputs():
    with raises_naming(ParityError, "here:", "2", "outputs"):
        parity.check_close([np.zeros(2)] * 2, [np.zeros(2)], 1e-3, "here")


def test_probes_have_the_magnitude_of_pictures():
    mean, std = 255 * np.array([0.4, 0.5, 0.6]), 255 * np.full(3, 0.25)
    picture, noise_ = parity.probe_batches((1, 3, 97, 131), mean, std)
    back = picture[0].transpose(1, 2, 0) * std + mean
    assert back.min() == pytest.approx(0, abs=1e-3)
    assert back.max() == pytest.approx(255, abs=1e-3)
    assert 0.9 < noise_.std() < 1.1
    (both,) = parity.probe_batches((3, 3, 97, 131), mean, std)
    assert np.array_equal(both, np.concatenate([picture, noise_, picture]))


@pytest.mark.parametrize("others", [{}, {"size_divisor": 32}, {"keep_ratio": True}], ids=str)
def test_a_size_that_no_picture_gets_is_refused(tmp_path, others):
    """Whatever a picture's size, Resize gives one other than the graph's."""
    net = paddle.nn.Conv2D(3, 2, 1)
    sizes = [{"type": "Resize", "target_size": [64, 60], **others}, NORMALIZE]
    made = Transforms(sizes)(np.zeros([60, 64, 3], np.uint8))[0].shape[1:]
    assert made == ((64, 64) if "size_divisor" in others else (60, 64))
    export_model(net, tmp_path / "same", input_shape=[1, 3, *made], transforms=sizes)
    where = {"input_shape": [1, 3, 96, None], "transforms": sizes}
    if "keep_ratio" in others:  # it depends on the picture
        export_model(net, tmp_path / "m", **where)
        return
    sizes = map(str, made)
    with raises_naming(InputError, "--input_shape", "96", *sizes, "target_size"):
        export_model(net, tmp_path / "m", **where)
    assert not (tmp_path / "m").exists()


def test_a_size_that_no_crop_has_is_refused(tmp_path):
    crop = [
        {"type": "ResizeByShort", "short_size": 30},
        {"type": "CenterCrop", "target_size": [24, 20]},
    ]
    net = paddle.nn.Sequential(paddle.nn.AdaptiveAvgPool2D(1), paddle.nn.Flatten())
    how = {"task": "classification", "transforms": [*crop, NORMALIZE]}
    with raises_naming(InputError, "input_shape", "30", "20", "24", "target_size"):
        export_model(net, tmp_path / "m", input_shape=[1, 3, 30, 30], output_op="softmax", **how)


def test_a_crop_is_refused_for_segmentation(tmp_path):
    crop = [{"type": "CenterCrop", "target_size": [8, 8]}]
    with pytest.raises(ValueError, match="CenterCrop"):
        export_model(
            paddle.nn.Conv2D(3, 2, 1), tmp_path / "m", input_shape=[1, 3, 8, 8], transforms=crop
        )
