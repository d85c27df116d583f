"""Predictor: pictures in, predictions at the picture's own size out; and broken folders."""

import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import paddle
import pytest
import yaml
from paddle import nn

from ppvision.deploy import Classification, Predictor, export_model
from ppvision.deploy.run import engines
from ppvision.deploy.run.task_table import softmax
from ppvision.deploy.run.transforms import Transforms
from ppvision.errors import InputError, InputTypeError, ManifestError, MissingFileError
from tests.helpers.alone import run_alone
from tests.helpers.measured import measure_predictions
from tests.helpers.messages import raises_naming, warns_naming

NORMALIZE = {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
LETTERBOX = [
    {"type": "ResizeByLong", "long_size": 61},
    {"type": "Padding", "target_size": [64, 64]},
    NORMALIZE,
]
STRETCH = [{"type": "Resize", "target_size": [40, 32]}, NORMALIZE]


def net(classes=5):
    """A few convolutions whose classes form regions, not specks."""
    paddle.seed(11)
    return nn.Sequential(
        nn.Conv2D(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2D(8, classes, 5, padding=2)
    )


def picture(height, width, seed=0):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(output_op=..., ...)` exports the net once for each set of arguments."""
    done = {}

    def export(model=net, **arguments):
        arguments = {"input_shape": [None, 3, None, None], "transforms": STRETCH, **arguments}
        key = (model, repr(sorted(arguments.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("export") / "net"
            done[key] = export_model(model(), folder, **arguments)
        return done[key]

    return export


@pytest.mark.parametrize("transforms", [STRETCH, LETTERBOX, [NORMALIZE]], ids=str)
@pytest.mark.parametrize("format", ["paddle", "onnx"])
@pytest.mark.parametrize("output_op", ["none", "softmax", "argmax"])
def test_equals_paddleseg(exported, tmp_path, output_op, format, transforms):
    """The label map of PaddleSeg's own inference, from the same file and network."""
    infer = pytest.importorskip("paddleseg.core.infer")
    seg = pytest.importorskip("paddleseg.transforms")
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), picture(77, 50)[..., ::-1])
    folder = exported(output_op=output_op, format=format, transforms=transforms)
    ours = Predictor(folder, threads=1)(path)

    compose = seg.Compose(
        [getattr(seg, t["type"])(**{k: v for k, v in t.items() if k != "type"}) for t in transforms]
    )
    data = compose({"img": str(path), "gt_fields": []})
    model = net()
    x = paddle.to_tensor(data["img"][None])
    with paddle.no_grad():
        pred, logits = infer.inference(lambda x: [model(x)], x, trans_info=data["trans_info"])
        if output_op == "argmax":
            classes = model(x).argmax(axis=1, keepdim=True, dtype="int32")
            pred = infer.reverse_transform(classes, data["trans_info"], mode="nearest")
    theirs = pred.numpy()[0, 0]
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape == (77, 50)
    assert len(np.unique(theirs)) > 1
    second, first = np.sort(logits.numpy()[0], axis=0)[-2:]
    assert ((ours == theirs) | (first - second < 1e-4)).all()
    assert (ours == theirs).mean() > 0.999


def test_array_and_file_agree(exported, tmp_path):
    predictor = Predictor(exported())
    rgb = picture(33, 47)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    assert np.array_equal(predictor(rgb), predictor(tmp_path / "a.png"))
    assert np.array_equal(predictor(rgb), predictor(str(tmp_path / "a.png")))
    assert not np.array_equal(predictor(rgb), predictor(rgb[..., ::-1].copy()))  # RGB, not BGR


@pytest.mark.parametrize("output_op", ["none", "argmax"])
def test_many_classes_need_more_than_a_byte(exported, output_op):
    folder = exported(lambda: net(257), output_op=output_op, transforms=[])
    assert Predictor(folder)(np.zeros((9, 9, 3), np.uint8)).dtype == np.int32


def test_list_in_its_order_whatever_the_batches(exported, monkeypatch):
    predictor = Predictor(exported(transforms=[NORMALIZE]))
    images = [picture(20 + 4 * (i % 3), 30, seed=i) for i in range(8)]
    alone = [predictor(image) for image in images]
    batches = []
    run = predictor._opened.runtime.run
    monkeypatch.setattr(
        predictor._opened.runtime, "run", lambda x: batches.append(len(x)) or run(x)
    )
    together = predictor(images, batch_size=2)
    assert sorted(batches) == [1, 1, 2, 2, 2]  # 3, 3 and 2 pictures of each size
    assert isinstance(together, list)
    for image, a, b in zip(images, alone, together, strict=True):
        assert a.shape == image.shape[:2]
        assert np.array_equal(a, b)
    assert predictor([]) == []


def test_fixed_batch_is_filled_up(exported):
    one = Predictor(exported())
    four = Predictor(exported(input_shape=[4, 3, 32, 40]))
    images = [picture(30, 20, seed=i) for i in range(6)]
    for a, b in zip(one(images), four(images), strict=True):
        assert np.array_equal(a, b)


def classifier():
    paddle.seed(5)
    return nn.Sequential(
        nn.Conv2D(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("output_op", ["argmax", "softmax", "none"])
def test_classification(exported, output_op):
    folder = exported(
        classifier, task="classification", output_op=output_op, classes=["ant", "bee", "cat"]
    )
    image = picture(30, 44, seed=2)
    result = Predictor(folder)(image)
    x, _ = Transforms(STRETCH)(image)
    with paddle.no_grad():
        expected = softmax(classifier()(paddle.to_tensor(x[None])).numpy())[0]
    assert isinstance(result, Classification)
    assert result.class_id == expected.argmax()
    assert result.name == ["ant", "bee", "cat"][result.class_id]
    if output_op == "argmax":
        assert result.probabilities is None
    else:
        assert result.probabilities.shape == (3,)
        assert np.allclose(result.probabilities, expected, atol=1e-5)


def test_without_class_names(exported):
    result = Predictor(exported(classifier, task="classification"))(picture(9, 9))
    assert result.name is None


def test_features(exported):
    class Two(nn.Layer):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2D(3, 4, 2, 2), nn.Conv2D(4, 6, 2, 2)

        def forward(self, x):
            a = self.a(x)
            return [a, self.b(a)]

    folder = exported(Two, task="features", output_op="none")
    first, second = Predictor(folder)(picture(50, 60))
    assert first.shape == (4, 16, 20)
    assert second.shape == (6, 8, 10)


# Pictures.


def test_grey_and_transparent_files(exported, tmp_path):
    predictor = Predictor(exported())
    rgb = picture(21, 34)
    grey = rgb[..., 0].copy()
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert np.array_equal(predictor(tmp_path / "grey.png"), predictor(np.stack([grey] * 3, -1)))
    alpha = np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 9, np.uint8)])
    cv2.imwrite(str(tmp_path / "alpha.png"), alpha)
    assert np.array_equal(predictor(tmp_path / "alpha.png"), predictor(rgb))


@pytest.mark.parametrize(
    ("image", "tokens"),
    [
        (np.zeros((5, 5, 3), np.float32), "uint8 [H, W, 3] float32 [5, 5, 3]"),
        (np.zeros((5, 5), np.uint8), "numpy.stack uint8 [5, 5]"),
        (np.zeros((5, 5, 4), np.uint8), "image[..., :3] uint8 [5, 5, 4]"),
        (np.zeros((2, 5, 5, 3), np.uint8), "list [2, 5, 5, 3]"),
        (np.zeros((0, 5, 3), np.uint8), "uint8 [0, 5, 3]"),
        (7, "int"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_arrays_that_are_no_pictures(exported, image, tokens):
    with raises_naming(ValueError, *tokens.split()):
        Predictor(exported())(image)


def test_arrays_in_any_order_of_memory(exported):
    predictor, rgb = Predictor(exported()), picture(20, 30)
    wide, read_only = np.zeros((60, 90, 3), np.uint8), rgb.copy()
    wide[::3, ::3], read_only.flags.writeable = rgb, False
    expected = predictor(rgb)
    for same in (
        np.asfortranarray(rgb),
        wide[::3, ::3],
        rgb[::-1, ::-1].copy()[::-1, ::-1],
        rgb[..., ::-1].copy()[..., ::-1],
        read_only,
        rgb.view(np.recarray),
        np.dstack([rgb, rgb[..., 0]])[..., :3],
        np.frombuffer(b"x" + rgb.tobytes(), np.uint8, offset=1).reshape(rgb.shape),
    ):
        before = same.copy()
        assert np.array_equal(predictor(same), expected)
        assert np.array_equal(same, before)


def test_arrays_have_the_limit_of_files(exported, monkeypatch):
    """A view can have any number of pixels, and the transforms make all of them."""
    huge = np.broadcast_to(np.uint8(0), (2**20, 2**20, 3))
    with pytest.raises(ValueError, match="PPVISION_MAX_PIXELS"):
        Predictor(exported())(huge)
    monkeypatch.setenv("PPVISION_MAX_PIXELS", "100")
    assert Predictor(exported())(picture(10, 10)).shape == (10, 10)
    with raises_naming(ValueError, "100", "10x11"):
        Predictor(exported())(picture(11, 10))


class NoPath:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path

    def __repr__(self):
        return f"NoPath({self.path!r})"


@pytest.mark.parametrize(
    "path",
    [NoPath(3), NoPath(b"x"), "a\0b", "\ud800"],
    ids=[
        "number",
        "bytes",
        "zero",
        "surrogate",
    ],  # repr() of NoPath differs from process to process
)
def test_paths_that_are_none(exported, path):
    with pytest.raises((InputError, InputTypeError), match="image"):
        Predictor(exported())(path)


def test_files_that_are_no_pictures(exported, tmp_path):
    predictor = Predictor(exported())
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        predictor(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with raises_naming(ValueError, "text.png", "image"):
        predictor(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        predictor(tmp_path)


def test_a_picture_that_misses_the_fixed_size(exported):
    predictor = Predictor(exported(input_shape=[1, 3, 24, 24], transforms=[NORMALIZE]))
    assert predictor(picture(24, 24)).shape == (24, 24)
    with raises_naming(ValueError, "24]", "float32", "25]"):
        predictor(picture(24, 25))


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 8, 8), np.float64),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((1, 4, 8, 8), np.float32),
        np.zeros((0, 3, 8, 8), np.float32),
        [[1.0]],
    ],
    ids=["float64", "three axes", "four channels", "empty", "list"],
)
def test_batches_that_do_not_fit(exported, batch):
    with raises_naming(ValueError, "float32", "[None,", "3,", "None]"):
        Predictor(exported()).run(batch)


def test_run_gives_the_raw_output(exported):
    x = np.random.default_rng(0).standard_normal((2, 3, 11, 17)).astype("float32")
    (out,) = Predictor(exported(output_op="none")).run(x)
    with paddle.no_grad():
        assert np.allclose(out, net()(paddle.to_tensor(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize("own", [None, 0.25])
def test_paddles_flag_is_changed_for_the_first_run_alone(exported, monkeypatch, own):
    """Its deletion of tensors; a value that somebody has set stays."""
    flag, seen = "FLAGS_eager_delete_tensor_gb", []
    before = paddle.get_flags([flag])
    predictor = Predictor(exported(task="segmentation"), use_onednn=False)
    graph, run = (
        predictor._opened.runtime._predictor,
        type(predictor._opened.runtime._predictor).run,
    )
    monkeypatch.setattr(
        predictor._opened.runtime,
        "_predictor",
        SimpleNamespace(run=lambda: (seen.append(paddle.get_flags([flag])[flag]), run(graph))),
    )
    batch = np.zeros((1, 3, 48, 48), np.float32)
    try:
        if own is not None:
            paddle.set_flags({flag: own})
        predictor.run(batch)
        predictor.run(batch)
        after = paddle.get_flags([flag])[flag]
    finally:
        paddle.set_flags(before)
    assert seen == ([0.008, 0.0] if own is None else [own, own])
    assert after == (0.0 if own is None else own)


def test_other_channels_have_run_but_no_pictures(exported):
    folder = exported(lambda: nn.Conv2D(4, 2, 1), input_shape=[None, 4, None, None], transforms=[])
    predictor = Predictor(folder)
    assert predictor.run(np.zeros((1, 4, 6, 6), np.float32))[0].shape == (1, 6, 6)
    with raises_naming(ValueError, "4", "channels"):
        predictor(picture(6, 6))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_batch_size(exported, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        Predictor(exported())([picture(5, 5)], batch_size=batch_size)


# Folders.


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported(), tmp_path / "moved")


def test_a_copied_folder_works(copy, exported):
    image = picture(20, 20)
    assert np.array_equal(Predictor(copy)(image), Predictor(exported())(image))


@pytest.mark.parametrize("name", ["deploy.yaml", "model.json", "model.pdiparams"])
def test_missing_files(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Predictor(copy)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="export_model"):
        Predictor(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["model.json", "model.pdiparams"])
def test_truncated_files(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-7])
    with raises_naming(ValueError, name, str(len(content)), str(len(content) - 7)):
        Predictor(copy)


@pytest.mark.parametrize("name", ["model.json", "model.pdiparams"])
def test_flipped_bits(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with raises_naming(ValueError, name, "sha256"):
        Predictor(copy)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda m: m.update(format_version=99), "format_version 1 2, 99"),
        (lambda m: m.update(checked_shapes=[]), "checked_shapes: list []"),
        (
            lambda m: m.update(checked_shapes=[[1, 3, 8]]),
            "checked_shapes.0: [1, 3, 8]",
        ),
        (lambda m: m.update(openvino=0), "openvino: true false, 0"),
        (lambda m: m.update(onednn="yes"), "onednn: true false, 'yes'"),
        (lambda m: m.pop("transforms"), "transforms, none"),
        (lambda m: m.update(extra=1), "deploy.yaml 'extra'"),
        (lambda m: m.update(task="painting"), "task: segmentation, 'painting'"),
        (lambda m: m.update(format=["paddle"]), "format: onnx, ['paddle']"),
        (lambda m: m.update(input_shape=[1, 3]), "input_shape"),
        (lambda m: m.update(num_classes="x"), "num_classes: whole 'x'"),
        (lambda m: m.update(num_classes=None), "num_classes: whole None"),
        (lambda m: m.update(num_classes=0), "num_classes: whole 0"),
        (lambda m: m.update(task="features"), "output_op: none features"),
        (lambda m: m.update(classes=["one"]), "classes: 5 ['one']"),
        (lambda m: m.update(classes="abcde"), "classes: list 'abcde'"),
        (lambda m: m["files"].pop("model.json"), "files: model.json"),
        (lambda m: m.update(transforms=[{"type": "RandomBlur"}]), "RandomBlur"),
    ],
)
def test_changed_manifest(copy, change, tokens):
    path = copy / "deploy.yaml"
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    with raises_naming(ValueError, *tokens.split()):
        Predictor(copy)


@pytest.mark.parametrize("text", ["", "[1, 2", "plain", "\x00", "!!python/name:os.system x"])
def test_a_manifest_that_is_none(copy, text):
    (copy / "deploy.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"deploy\.yaml"):
        Predictor(copy)


# Engines.


class ChannelsLast(nn.Layer):
    """oneDNN cannot run a convolution with data_format NHWC (Paddle 3.2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3, padding=1, data_format="NHWC")

    def forward(self, x):
        return self.conv(x.transpose([0, 2, 3, 1])).transpose([0, 3, 1, 2])


@pytest.mark.filterwarnings("ignore:Paddle Inference with oneDNN")
def test_falls_back_from_onednn_aloud(exported):
    folder = exported(ChannelsLast)
    description = folder / "deploy.yaml"
    assert "onednn: false" in description.read_text()  # known since the export; and found here:
    description.write_text(description.read_text().replace("onednn: false", "onednn: true"))
    with warns_naming(UserWarning, "without", "oneDNN"):
        predictor = Predictor(folder)
    assert predictor.onednn is False
    assert predictor(picture(9, 12)).shape == (9, 12)
    with pytest.raises(RuntimeError, match="use_onednn"):
        Predictor(folder, use_onednn=True)
    assert Predictor(folder, use_onednn=False).onednn is False  # not tried, nothing to say


class Enlarging(nn.Layer):
    """A map of a quarter and of a 32nd of the picture's side, the latter enlarged."""

    def __init__(self):
        super().__init__()
        paddle.seed(2)
        self.fine = nn.Conv2D(3, 8, 7, stride=4, padding=3)
        self.coarse = nn.Sequential(nn.Conv2D(8, 8, 3, 4, 1), nn.ReLU(), nn.Conv2D(8, 8, 3, 2, 1))
        self.head = nn.Conv2D(16, 2, 1)

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.coarse(fine)
        size = paddle.shape(fine)[2:]
        coarse = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
        return self.head(paddle.concat([fine, coarse], axis=1))


@pytest.mark.parametrize("side", [16, 32, 33, 64, 65])
def test_pictures_that_shrink_to_one_pixel(exported, side):
    """oneDNN's enlargement of one pixel would write beyond its memory."""
    folder = exported(Enlarging, output_op="none", transforms=[])
    predictor, model = Predictor(folder, threads=1), Enlarging()
    assert predictor.onednn
    x = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    with paddle.no_grad():
        expected = model(paddle.to_tensor(x)).numpy()
    for _ in range(2):
        np.testing.assert_allclose(predictor.run(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("change", ["another export", "gone"])
def test_a_folder_that_changes_after_it_was_opened(exported, tmp_path, change):
    """The engine for small pictures is opened when one comes, which must be of the same export."""
    layers = (nn.Conv2D(3, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2))
    how = {"input_shape": [None, 3, None, None], "transforms": [NORMALIZE]}
    folder = export_model(nn.Sequential(*layers), tmp_path / "net", **how)
    predictor = Predictor(folder, use_onednn=True)
    expected = predictor(picture(64, 64))
    if change == "gone":
        shutil.rmtree(folder)
    else:
        export_model(nn.Conv2D(3, 4, 3, padding=1), folder, **how)
    with pytest.raises((ManifestError, MissingFileError)):
        predictor(picture(2, 2))
    assert np.array_equal(predictor(picture(64, 64)), expected)


def test_onednn_is_used_where_it_runs(exported):
    assert Predictor(exported()).onednn is True
    assert Predictor(exported(), use_onednn=False).onednn is False
    onnx = exported(format="onnx")
    assert Predictor(onnx).onednn is False
    with pytest.raises(ValueError, match="CPU"):
        Predictor(onnx, use_onednn=True)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has CUDA")
@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_no_gpu_here(exported, format):
    with pytest.raises(ValueError, match="'gpu'"):
        Predictor(exported(format=format), device="gpu")


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({"device": "tpu"}, "device: cpu, gpu, 'tpu'"),
        ({"threads": 0}, "threads: 0"),
        ({"threads": "2"}, "threads: '2'"),
        ({"threads": 1.5}, "threads: 1.5"),
        ({"threads": True}, "threads: True"),
    ],
)
def test_arguments_that_do_not_fit(exported, arguments, tokens):
    with raises_naming(ValueError, *tokens.split()):
        Predictor(exported(), **arguments)


@pytest.mark.parametrize("use_onednn", [False, True])
def test_threads_reach_paddle_inference(exported, monkeypatch, use_onednn):
    threads, create = [], engines.inference.create_predictor

    def see(config):
        threads.append(config.cpu_math_library_num_threads())
        return create(config)

    monkeypatch.setattr(engines.inference, "create_predictor", see)
    for wanted in (2, 3):
        Predictor(exported(), threads=wanted, use_onednn=use_onednn)
    assert threads == [2, 3]


def test_threads_reach_onnx_runtime(exported):
    for wanted in (2, 3):
        predictor = Predictor(exported(format="onnx"), threads=wanted)
        options = predictor._opened.runtime._session.get_session_options()
        assert options.intra_op_num_threads == wanted


@pytest.mark.parametrize("format", ["paddle", "onnx"])
def test_memory_does_not_grow(exported, format):
    """1000 calls, ever new sizes. Between call 200 and 1000 only oneDNN's cache of compiled
    kernels, which is limited, still fills (20 MiB were measured); a leaked 100 x 100 picture of
    float32 logits a call would be 150 MiB."""
    folder = exported(output_op="none", transforms=[NORMALIZE], format=format)
    assert run_alone(measure_predictions, str(folder), 1000, 200) / 2**20 < 60
