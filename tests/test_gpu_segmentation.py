"""The PyTorch twin of PaddleSeg's SegFormer over Pale with SDN, and its trainings on a GPU."""

import json

import cv2
import numpy as np
import paddle
import pytest

pytest.importorskip("torch", reason="pip install -r benchmark/requirements-torch.txt")
pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

import torch
from paddleseg.cvlibs import manager
from paddleseg.models import SegFormer as PaddleSegFormer
from paddleseg.utils import metrics

from benchmark.gpu import segmentation_results
from benchmark.gpu.convert import to_ppvision
from benchmark.gpu.segmentation import boundary_loss
from benchmark.gpu.segmentation_networks import (
    EMBEDDING,
    FORMS,
    PALE,
    SegFormer,
    multiply_adds,
    start_forms,
)
from benchmark.gpu.segmentation_pictures import (
    Augmentation,
    Table,
    compose_scenes,
    cut,
    draw,
    pack_digits,
)
from benchmark.gpu.segmentation_scores import Scoring
from benchmark.sdn_boundary import multiply_adds as paddle_multiply_adds
from benchmark.sdn_boundary import trained_size
from ppvision.data.convert.digit_scenes import write_digit_scenes
from ppvision.metrics import BoundaryFScore, BoundaryIoU
from ppvision.models.pale_transformer import PaleConfig, PaleTransformer
from ppvision.plugins.paddleseg import SemanticDiffusionBackbone, add_guidance_logits

CLASSES = 3
TINY = (8, (1, 1, 1, 1), (2, 2, 4, 4))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PALE, "tiny", TINY)


def in_torch(form: str) -> SegFormer:
    """With nothing at zero, and statistics that are not those of the start."""
    torch.manual_seed(0)
    model = SegFormer(CLASSES, form, "tiny", 3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def in_paddle(form: str) -> paddle.nn.Layer:
    backbone = PaleTransformer(PaleConfig(*TINY, 0.0, pale_size=3), features_only=True)
    options = FORMS[form]
    if options is not None:
        backbone = SemanticDiffusionBackbone(backbone, num_classes=CLASSES, **options)
    model = PaddleSegFormer(CLASSES, backbone, EMBEDDING)
    add_guidance_logits(model)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_same_logits(form, tiny):
    theirs, ours = in_torch(form), in_paddle(form)
    ours.set_state_dict(to_ppvision(theirs.state_dict(), ours))
    assert sum(p.numel() for p in theirs.parameters()) == trained_size(ours)
    assert multiply_adds(theirs.eval(), 64, 64) == paddle_multiply_adds(ours, 64)
    x = np.random.default_rng(0).normal(size=(2, 3, 61, 93)).astype(np.float32)
    ours.eval()
    with torch.inference_mode(), paddle.no_grad():
        (expected,) = ours(paddle.to_tensor(x))
        found = theirs.eval()(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)
    theirs.dropout = ours.dropout.p = 0.0
    ours.train()
    with torch.no_grad(), paddle.no_grad():
        expected = [y.numpy() for y in ours(paddle.to_tensor(x))]
        found = [y for y in theirs.train()(torch.from_numpy(x)) if y is not None]
    assert len(found) == len(expected) == 1 + ("guidance" in (FORMS[form] or {}))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-3)


def test_sdn_starts_as_nothing(tiny):
    """The same numbers as without SDN, for the same backbone and head."""
    model, plain = in_torch("classes"), in_torch("none")
    start_forms(model)
    state = {k.replace("backbone.backbone.", "backbone."): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: v for k, v in state.items() if k in plain.state_dict()})
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        np.testing.assert_array_equal(model.eval()(x).numpy(), plain.eval()(x).numpy())


def test_same_scores():
    rng = np.random.default_rng(0)
    ours = [BoundaryIoU(4), BoundaryFScore(4, tolerances=(3,))]
    scoring = Scoring(4, torch.device("cpu"))
    areas = np.zeros((3, 4), np.int64)
    for height, width in ((40, 57), (150, 133)):
        # Blobs, so that there are boundaries and insides; class 3 occurs in no label.
        fields = rng.normal(size=(2, 2, height // 4 + 1, width // 4 + 1, 4)).astype(np.float32)
        maps = np.stack(
            [[cv2.resize(f, (width, height)).argmax(-1) for f in pair] for pair in fields]
        )
        pred, label = maps[:, 0], np.minimum(maps[:, 1], 2)
        label[:, :7, -9:] = 255
        label[:, height // 2, 3:20] = 255
        for metric in ours:
            metric.update(pred, label)
        scoring.update(torch.from_numpy(pred), torch.from_numpy(label.astype(np.uint8)))
        tensors = [paddle.to_tensor(x.astype(np.int64)) for x in (pred, label)]
        areas += np.stack([a.numpy() for a in metrics.calculate_area(*tensors, 4)])
    expected = {k: v for m in ours for k, v in m.compute().items() if not k.startswith("class")}
    expected["mIoU"] = metrics.mean_iou(*map(paddle.to_tensor, areas))[1]
    found = scoring.compute()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(float(expected[name]), abs=1e-6), name


def pairs(sizes) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for height, width in sizes:
        image = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (width, height))
        found.append((image, (image[:, :, 0] // 64).astype(np.uint8)))
    return found


@pytest.mark.parametrize("turn", [False, True])
def test_batches_are_what_opencv_makes_of_the_pictures(turn):
    data = pairs([(30, 41), (64, 50), (20, 90)])
    table = Table(data, torch.device("cpu"))
    crop = (40, 40) if turn else (40, 56)
    how = Augmentation(crop, (0.5, 2.0), jitter=0.0, hue=False, turn=turn)
    numbers = draw(table, how, 12, 1, np.random.default_rng(3))[0]
    images, labels = (x.numpy() for x in cut(table, numbers, how))
    for row, image, label in zip(numbers.numpy(), images, labels, strict=True):
        index, scale, top, left, mirror, upside, turned = row[:7]
        picture, classes = data[int(index)]
        height, width = (int(np.round(np.float32(n) * scale)) for n in classes.shape)
        picture = cv2.resize(picture.astype(np.float32), (width, height))
        # Nearest by pixel centres, where OpenCV's own takes corners.
        rows = np.floor((np.arange(height) + 0.5) * len(classes) / height).astype(int)
        across = np.floor((np.arange(width) + 0.5) * classes.shape[1] / width).astype(int)
        classes = classes[rows[:, None], across]
        down, right = (max(0, c - n) for c, n in zip(crop, (height, width), strict=True))
        picture = np.pad(picture, ((0, down), (0, right), (0, 0)), constant_values=127.5)
        classes = np.pad(classes, ((0, down), (0, right)), constant_values=255)
        y, x = (
            int(place * (n - c + 1))
            for place, n, c in zip((top, left), classes.shape, crop, strict=True)
        )
        expected = picture[y : y + crop[0], x : x + crop[1]]
        classes = classes[y : y + crop[0], x : x + crop[1]]
        flips = [axis for axis, flip in enumerate((upside, mirror)) if flip]
        expected, classes = np.flip(expected, flips), np.flip(classes, flips)
        if turned:
            expected, classes = expected.transpose(1, 0, 2), classes.T
        np.testing.assert_allclose(image, expected.transpose(2, 0, 1), atol=0.6)
        assert (label != classes).mean() < 0.01  # rounding at a tie


def test_scenes_are_those_of_the_converter(tmp_path):
    write_digit_scenes(tmp_path / "written", count=2, val_count=3, size=64, seed=5)
    pack_digits(tmp_path / "digits.npz")
    for split, count in (("train", 2), ("val", 3)):
        found = compose_scenes(tmp_path / "digits.npz", split, count, 5, size=64, processes=1)
        for number, (image, label) in enumerate(found):
            name = f"{split}/{number:06d}"
            written = cv2.imread(str(tmp_path / "written" / "images" / f"{name}.jpg"))
            np.testing.assert_array_equal(image, written[:, :, ::-1])
            classes = cv2.imread(str(tmp_path / "written" / "labels" / f"{name}.png"), -1)
            np.testing.assert_array_equal(label, classes)


def test_tables_hold_every_run_once_and_their_means(tmp_path):
    row = {
        "data": "nuclei",
        "form": "none",
        "init": "scratch",
        "steps": 2,
        "batch": 4,
        "BoundaryIoU": 0.5,
        "BoundaryF3": 0.6,
        "crop": [8, 8],
        "seconds": 1.0,
        "parameters": 7,
        "multiply_adds": 9,
        "gpu": "a GPU",
        "ema": False,
        "curve_columns": ["step", "seconds", "mIoU", "BoundaryIoU", "BoundaryF3"],
        "curve": [[1, 0.5, 0.1, 0.1, 0.1], [2, 1.0, 0.2, 0.2, 0.2]],
    }
    rows = [row | {"seed": seed, "mIoU": value} for seed, value in ((1, 0.3), (0, 0.9), (0, 0.1))]
    rows += [row | {"seed": 0, "mIoU": 0.4, "form": "sdn", "init": "pretrained"}]
    rows += [row | {"seed": 0, "mIoU": 0.8, "ema": True}]  # final weights
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    runs = segmentation_results.read_runs([source])
    assert [(run["form"], run["seed"], run["mIoU"]) for run in runs] == [
        ("sdn", 0, 0.4),
        ("none", 0, 0.1),
        ("none", 1, 0.3),
    ]
    found = segmentation_results.table(runs)
    assert [(r["seed"], r["mIoU"]) for r in found[3:]] == [("mean", "0.2000"), ("std", "0.1414")]
    assert [p["mIoU"] for p in segmentation_results.curves(runs[1:])] == [0.1, 0.2, 0.1, 0.2]


def test_draws_every_picture_once_before_one_comes_again():
    table = Table(pairs([(8, 8)] * 6), torch.device("cpu"))
    how = Augmentation((8, 8))
    numbers = draw(table, how, 3, 4, np.random.default_rng(0)).reshape(12, -1).numpy()
    assert sorted(numbers[:6, 0]) == sorted(numbers[6:, 0]) == list(range(6))
    again = draw(table, how, 3, 4, np.random.default_rng(0)).reshape(12, -1).numpy()
    np.testing.assert_array_equal(numbers, again)


def test_the_loss_of_boundaries_weighs_both_kinds_alike():
    label = torch.zeros(1, 20, 20, dtype=torch.int64)
    label[:, :, 10:] = 1
    label[:, 15:] = 255
    edge = torch.zeros(1, 15, 20)
    edge[:, :, 8:12] = 1.0
    logits = torch.randn(1, 20, 20, generator=torch.Generator().manual_seed(0))
    share = 4 / 20
    losses = -2 * (
        edge * torch.log(torch.sigmoid(logits[:, :15])) * (1 - share)
        + (1 - edge) * torch.log(torch.sigmoid(-logits[:, :15])) * share
    )
    assert float(boundary_loss(logits, label)) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_runs_end_to_end_on_a_cpu(tmp_path, tiny, monkeypatch):
    """Two data sets' worth of plumbing: packed, trained in two lanes, scored, saved."""
    from benchmark.gpu import segmentation
    from benchmark.gpu.segmentation_pictures import pack

    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = []
        for number, (image, label) in enumerate(pairs([(40, 48)] * count)):
            name = f"{split}/{number}"
            cv2.imwrite(str(tmp_path / "set" / f"{name}i.png"), image[:, :, ::-1])
            cv2.imwrite(str(tmp_path / "set" / f"{name}l.png"), np.minimum(label, 2))
            lines.append(f"{name}i.png {name}l.png")
        (tmp_path / "set" / f"{split}.txt").write_text("\n".join(lines))
    pack(tmp_path / "set", tmp_path / "nuclei.zip")
    monkeypatch.setattr(
        segmentation,
        "SegFormer",
        lambda classes, form, pale_size: SegFormer(classes, form, "tiny", 3),
    )
    runs = [
        {"data": "nuclei", "form": "classes", "init": "scratch", "steps": 2, "batch": 2},
        {"data": "nuclei", "form": "none", "steps": 2, "batch": 2, "ema": True, "save": "kept"},
        {"data": "nuclei", "form": "none", "seed": 1, "steps": 2, "batch": 2, "ema": True},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    weights = tmp_path / "classifier.pt"
    torch.save(SegFormer(3, "none", "tiny", 3).pale.state_dict(), weights)
    arguments = [
        *("--runs", tmp_path / "runs.json", "--data", tmp_path, "--output", tmp_path / "out"),
        *("--weights", weights, "--device", "cpu", "--lanes", 2, "--crop", 32, "--seconds", 120),
        *("--scratch", tmp_path / "scratch"),
    ]
    monkeypatch.setattr("sys.argv", ["segmentation.py", *map(str, arguments)])
    segmentation.main()
    lines = (tmp_path / "out/segmentation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {(row["form"], row["seed"], row["init"]) for row in rows} == {
        ("classes", 0, "scratch"),
        ("none", 0, "pretrained"),
        ("none", 1, "pretrained"),
    }
    for row in rows:
        assert row["steps"] == 2
        assert 0 <= row["mIoU"] <= 1
        assert row["curve"][-1][0] == 2
    model = in_paddle("none")
    to_ppvision(torch.load(tmp_path / "out/kept_none.pt", weights_only=True), model)


def test_every_form_is_of_our_plugin():
    assert manager.BACKBONES["SemanticDiffusionBackbone"] is SemanticDiffusionBackbone
    assert set(FORMS) > {"none", "convolution", "central", "sdn", "classes", "classes_finest"}
