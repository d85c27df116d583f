"""A teacher's answers, and pictures that grow with the epochs."""

import json
import logging
import random
import shutil

import cv2
import numpy as np
import paddle
import pytest
import yaml
from safetensors.numpy import load_file

import ppvision as package
from ppvision.cli import run
from ppvision.data.augment import (
    CheckedCrop,
    MixBatch,
    RandomLargeCrop,
    RecordedFlip,
)
from ppvision.data.class_folders import ClassFolders
from ppvision.deploy import export_model
from ppvision.engine.run_folder import read_metrics
from ppvision.errors import ConfigError, DataError, InputError, WeightsError
from ppvision.tasks import open_job
from ppvision.tasks.classification import teacher
from ppvision.tasks.classification.teacher import (
    Teacher,
    distillation_loss,
    map_classes,
    merge_shares,
)
from ppvision.zoo.weights import save_weights
from tests.helpers.configs import ROOT, classification_config
from tests.helpers.messages import raises_naming

NORMALIZE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
SIDE = 16


@pytest.fixture
def eager(monkeypatch):
    """Teachers run in eager mode: exports take seconds."""

    def refuse(*arguments, **options):
        raise RuntimeError("not here")

    monkeypatch.setattr(teacher, "export_model", refuse)


def ppvision(*arguments) -> int:
    return run([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def five_classes(tmp_path_factory, crops):
    """Weights of a resnet20 whose answers over five classes differ from picture to picture."""
    paddle.seed(7)
    net = package.create_model("resnet20", num_classes=5)
    net.eval()
    paths = sorted((crops / "train").glob("*/*.png"))
    with paddle.no_grad():
        logits = net(paddle.to_tensor(np.concatenate([prepare(read_rgb(p)) for p in paths])))
    logits = logits.numpy()  # almost alike for all: the mean is taken off, the rest made large
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    scale = 2 / logits.std(0)
    arrays["head.weight"] = arrays["head.weight"] * scale  # [features, 5]
    arrays["head.bias"] = (arrays["head.bias"] - logits.mean(0)) * scale
    path = tmp_path_factory.mktemp("teacher") / "five.safetensors"
    save_weights(arrays, path)
    return path


def read_rgb(path) -> np.ndarray:
    return cv2.imread(str(path))[:, :, ::-1]


def prepare(picture, size=(SIDE, SIDE)) -> np.ndarray:
    """`[1, 3, H, W]`, as the configured teacher sees a picture."""
    x = cv2.resize(picture.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    x = (x / 255 - np.array(NORMALIZE["mean"])) / np.array(NORMALIZE["std"])
    return x.transpose(2, 0, 1)[None].astype(np.float32)


def zoo_teacher(weights, **options) -> dict:
    return {
        "type": "resnet20",
        "num_classes": 5,
        "weights": str(weights),
        "size": SIDE,
        **NORMALIZE,
        "classes": [3, [0, 4], 1],
        **options,
    }


def expected_answers(weights, paths, columns, size=(SIDE, SIDE)) -> np.ndarray:
    """`[N, 2, K]` by hand: eager, one picture after another, in float64 after the network."""
    net = package.create_model("resnet20", num_classes=5)
    package.load_weights(net, weights)
    net.eval()
    rows = []
    for path in paths:
        picture = read_rgb(path)
        for turned in (picture, picture[:, ::-1]):
            logits = net(paddle.to_tensor(prepare(turned, size))).numpy()[0].astype(np.float64)
            shares = np.exp(logits)
            ours = np.array([shares[group].sum() for group in columns])
            rows.append(np.log(ours / ours.sum()))
    return np.reshape(rows, (len(paths), 2, len(columns)))


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_the_loss_and_its_gradient_against_float64(temperature):
    rng = np.random.default_rng(3)
    student = rng.normal(size=(6, 5)) * 4
    answers = rng.dirichlet(np.ones(5) * 0.3, size=6)
    answers[0] = [0, 0, 1, 0, 0]  # shares of 0
    logits = paddle.to_tensor(student, "float32", stop_gradient=False)
    loss = distillation_loss(logits, paddle.to_tensor(answers, "float32"), temperature)
    loss.backward()
    scaled = student / temperature
    shares = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    expected = 0.0
    for q, p in zip(answers, shares, strict=True):
        expected += sum(a * np.log(a / b) for a, b in zip(q, p, strict=True) if a > 0) / 6
    assert float(loss) == pytest.approx(expected * temperature**2, rel=1e-5)
    gradient = temperature * (shares - answers) / 6
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-6)


def test_the_loss_is_zero_where_the_student_is_the_teacher():
    logits = np.random.default_rng(0).normal(size=(4, 3))
    shares = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
    loss = distillation_loss(paddle.to_tensor(logits), paddle.to_tensor(shares), 2.0)
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_a_job_adds_labels_and_teacher(classification_file, five_classes, eager):
    def change(config):
        config["teacher"] = zoo_teacher(five_classes, temperature=2.0, weight=0.3)
        config["loss"] = {"label_smoothing": 0.1, "mixup": 0.8}
        config["model"]["drop_path_rate"] = 0.0

    job = open_job(classification_file(change))
    job.prepare_training()
    images, targets, answers = job.batched([job.train_dataset[k] for k in (0, 13, 30, 7)])
    assert targets.shape == answers.shape == (4, 3)
    batch = [paddle.to_tensor(part) for part in (images, targets, answers)]
    job.model.eval()
    labels, taught = job.losses(job.model, batch)
    logits = job.model(batch[0]).numpy().astype(np.float64)
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert float(labels) == pytest.approx(-0.7 * (targets * log).sum(1).mean(), rel=1e-4)
    half = logits / 2
    log = half - np.log(np.exp(half).sum(1, keepdims=True))
    divergence = (answers * (np.log(np.maximum(answers, 1e-300)) - log)).sum(1).mean()
    assert float(taught) == pytest.approx(0.3 * 4 * divergence, rel=1e-3)
    del job.content["teacher"]  # the labels alone: as before


# -- answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_whole_picture_and_its_mirror(crops, five_classes, caplog):
    data = ClassFolders(crops / "train")
    columns = [[3], [0, 4], [1]]
    with caplog.at_level(logging.INFO, "ppvision"):
        found = Teacher(zoo_teacher(five_classes), data.classes).answers(data)
    expected = expected_answers(five_classes, [path for path, _ in data.samples], columns)
    assert found.shape == (36, 2, 3)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=4e-3, rtol=2e-3)
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 0.1  # a mirror is something else
    assert np.ptp(expected, axis=0).max() > 0.5  # and so are the pictures
    right = (expected[:, 0].argmax(1) == np.repeat([0, 1, 2], 12)).mean()
    assert f"first of 3 for {right:.1%} of 36 images" in caplog.text


def test_a_wide_teacher_sees_the_whole_picture(crops, five_classes, eager):
    data = ClassFolders(crops / "train")
    options = zoo_teacher(five_classes, size=[24, 16])
    found = Teacher(options, data.classes).answers(data)
    paths = [path for path, _ in data.samples]
    expected = expected_answers(five_classes, paths, [[3], [0, 4], [1]], (24, 16))
    np.testing.assert_allclose(found, expected, atol=4e-3, rtol=2e-3)


def test_the_mirrors_answer_goes_with_the_mirrored_picture(
    classification_file, five_classes, eager
):
    def change(config):
        config["teacher"] = zoo_teacher(five_classes)
        config["loss"] = {}
        config["train_dataset"]["transforms"] = [
            {"type": "RandomHorizontalFlip"},
            {"type": "Resize", "target_size": [28, 28]},
            {"type": "RandomHorizontalFlip", "prob": 0.3},
        ]

    job = open_job(classification_file(change))
    job.prepare_training()
    data = job.train_dataset
    turned = 0
    for k in range(36):
        random.seed(k)
        image, label, logits = data[k]
        picture = cv2.imread(str(data.samples[k][0]))[:, :, ::-1].transpose(2, 0, 1)
        mirrored = not np.array_equal(image, picture)
        if mirrored:
            np.testing.assert_array_equal(image, picture[:, :, ::-1])
        np.testing.assert_array_equal(logits, data.answers[k, int(mirrored)].astype(np.float32))
        assert label == data.samples[k][1]
        turned += mirrored
    assert 8 < turned < 28


def test_shares_of_classes_that_mean_one_of_ours_add_up():
    shares = np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
    found = np.exp(merge_shares(shares, [[3], [0, 1]]))
    np.testing.assert_allclose(found[0], [0.4 / 0.7, 0.3 / 0.7])
    assert np.isfinite(merge_shares(shares, [[3], [1, 2]])).all()  # all of them 0


# -- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def counted(eager, monkeypatch):
    """Pictures that teachers answered for, mirrors too."""
    seen = []
    merge = teacher.merge_shares

    def counting(shares, columns):
        seen.extend([None] * len(shares))
        return merge(shares, columns)

    monkeypatch.setattr(teacher, "merge_shares", counting)
    return seen


def test_answers_are_computed_once_and_anew_for_anything_else(
    crops, tmp_path, five_classes, counted
):
    shutil.copytree(crops / "train", tmp_path / "train")

    def answer(weights=five_classes, **options):
        counted.clear()
        data = ClassFolders(tmp_path / "train")
        found = Teacher(zoo_teacher(weights, **options), data.classes).answers(data)
        return np.array(found), len(counted)

    first, count = answer()
    assert count == 72
    again, count = answer()
    assert count == 0
    np.testing.assert_array_equal(first, again)
    assert answer(temperature=3.0, weight=0.1)[1] == 0  # are for training only
    for options in (
        {"size": 20},
        {"mean": [0.5]},
        {"interpolation": "LINEAR"},
        {"classes": [3, 0, 1]},
        {"classes": {"digit 1": 3, "digit 0": [4, 0], "digit 2": 1}},
    ):
        assert answer(**options)[1] == 72, options
    named = {"digit 0": 3, "digit 1": [0, 4], "digit 2": 1}
    assert answer(classes=named)[1] == 0  # the same mapping in other words
    arrays = load_file(five_classes)
    arrays["head.bias"] = arrays["head.bias"] + np.float32(1e-3)
    save_weights(arrays, tmp_path / "other.safetensors")
    assert answer(tmp_path / "other.safetensors")[1] == 72
    shutil.copy(five_classes, tmp_path / "moved.safetensors")
    assert answer(tmp_path / "moved.safetensors")[1] == 0
    changed = tmp_path / "train" / "digit 1" / "3.png"
    cv2.imwrite(str(changed), np.full((28, 28, 3), 99, np.uint8))
    other, count = answer()
    assert count == 72
    assert (other != first).any(axis=(1, 2)).nonzero()[0].tolist() == [
        [p for p, _ in ClassFolders(tmp_path / "train").samples].index(changed)
    ]


def test_a_zip_has_its_answers_wherever_it_lies(crops, tmp_path, five_classes, counted):
    from tests.helpers.zips import pack

    path = pack(crops / "train", tmp_path / "x.zip")
    data = ClassFolders(path)
    found = Teacher(zoo_teacher(five_classes), data.classes).answers(data)
    path.rename(tmp_path / "y.zip")
    counted.clear()
    moved = ClassFolders(tmp_path / "y.zip")
    Teacher(zoo_teacher(five_classes), data.classes).answers(moved)
    assert not counted
    folders = ClassFolders(crops / "train")
    unpacked = Teacher(zoo_teacher(five_classes), data.classes).answers(folders)
    np.testing.assert_array_equal(found, unpacked)


def test_an_interrupted_computation_goes_on(crops, five_classes, counted, monkeypatch):
    monkeypatch.setattr(teacher, "PART", 10)
    monkeypatch.setattr(teacher, "BATCH", 8)
    data = ClassFolders(crops / "train")
    whole = Teacher(zoo_teacher(five_classes), data.classes)
    read, reads = teacher.read_sample, []

    def failing(path, max_value):
        reads.append(path)
        if len(reads) == 25:
            raise KeyboardInterrupt
        return read(path, max_value)

    monkeypatch.setattr(teacher, "read_sample", failing)
    with pytest.raises(KeyboardInterrupt):
        whole.answers(data)
    counted.clear()
    found = whole.answers(data)
    assert len(counted) == 2 * (36 - 20)  # two parts of ten pictures were finished
    expected = expected_answers(
        five_classes, [path for path, _ in data.samples], [[3], [0, 4], [1]]
    )
    np.testing.assert_allclose(found, expected, atol=4e-3, rtol=2e-3)


def test_a_damaged_cache_is_computed_again(crops, tmp_path, five_classes, counted):
    data = ClassFolders(crops / "train")
    first = np.array(Teacher(zoo_teacher(five_classes), data.classes).answers(data))
    (path,) = (tmp_path / "cache" / "teacher").glob("*/answers.npy")
    assert path.stat().st_size < 128 + 36 * 2 * 3 * 2 + 1
    assert [p.name for p in sorted(path.parent.iterdir())] == ["answers.npy", "description.json"]
    path.write_bytes(path.read_bytes()[:-10])
    counted.clear()
    found = Teacher(zoo_teacher(five_classes), data.classes).answers(data)
    assert len(counted) == 72
    np.testing.assert_array_equal(found, first)


def test_a_second_process_waits_for_the_first(crops, tmp_path, five_classes, counted, monkeypatch):
    """The folder is held while the answers are not there; whoever held it then has them."""
    from contextlib import ExitStack

    from ppvision.files import lock_folder

    data = ClassFolders(crops / "train")
    first = Teacher(zoo_teacher(five_classes), data.classes).answers(data)
    (path,) = (tmp_path / "cache" / "teacher").glob("*/answers.npy")
    path.rename(tmp_path / "kept.npy")
    counted.clear()
    with ExitStack() as stack:
        stack.enter_context(lock_folder(path.parent, "held"))

        def finish(seconds):
            shutil.copy(tmp_path / "kept.npy", path)
            stack.close()

        monkeypatch.setattr(teacher.time, "sleep", finish)
        found = Teacher(zoo_teacher(five_classes), data.classes).answers(data)
    assert not counted
    np.testing.assert_array_equal(found, first)


def test_a_picture_that_does_not_decode_is_named(crops, tmp_path, five_classes, eager):
    shutil.copytree(crops / "train", tmp_path / "train")
    (tmp_path / "train" / "digit 2" / "4.png").write_bytes(b"nothing")
    data = ClassFolders(tmp_path / "train")
    with pytest.raises(DataError, match=r"2/4\.png"):
        Teacher(zoo_teacher(five_classes), data.classes).answers(data)


# -- the three kinds of teachers ------------------------------------------------------------------


SOURCE = '''
import paddle
import ppvision


class Odd(paddle.nn.Layer):
    """Gives a list, and cannot be traced."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        if not paddle.in_dynamic_mode():
            raise RuntimeError("not in a graph")
        return [self.net(x)]


def build():
    return ppvision.create_model("resnet20", num_classes=5)


def odd():
    return Odd(build())


def nothing():
    return 5


def broken():
    raise OSError("no such disk")
'''


def test_teachers_from_the_zoo_a_file_and_an_export_agree(crops, tmp_path, five_classes, caplog):
    data = ClassFolders(crops / "train")
    answers = {"zoo": Teacher(zoo_teacher(five_classes), data.classes).answers(data)}
    file = tmp_path / "teachers.py"
    file.write_text(SOURCE)
    options = {key: value for key, value in zoo_teacher(five_classes).items() if key != "type"}
    del options["num_classes"]
    of_file = options | {"file": f"{file}:build"}
    answers["file"] = Teacher(of_file, data.classes).answers(data)
    net = package.create_model("resnet20", num_classes=5)
    package.load_weights(net, five_classes)
    names = ["b", "c", "unused", "a", "b too"]
    transforms = [
        {"type": "Resize", "target_size": [SIDE, SIDE], "interp": "CUBIC"},
        {"type": "Normalize", **NORMALIZE},
    ]
    for output_op in ("none", "softmax"):
        export_model(
            net,
            tmp_path / output_op,
            input_shape=[None, 3, SIDE, SIDE],
            output_op=output_op,
            task="classification",
            transforms=transforms,
            classes=names,
        )
        exported = {
            "model_dir": str(tmp_path / output_op),
            "classes": {"digit 0": "a", "digit 1": ["b", "b too"], "digit 2": "c"},
        }
        answers[output_op] = Teacher(exported, data.classes).answers(data)
    assert len({id(a) for a in answers.values()}) == 4
    for found in answers.values():
        np.testing.assert_allclose(found, answers["zoo"], atol=4e-3, rtol=2e-3)


def test_a_layer_that_cannot_be_exported_answers_in_eager_mode(
    crops, tmp_path, five_classes, caplog
):
    data = ClassFolders(crops / "train")
    (tmp_path / "teachers.py").write_text(SOURCE)
    save_weights(
        {f"net.{name}": array for name, array in load_file(five_classes).items()},
        tmp_path / "odd.safetensors",
    )
    options = zoo_teacher(tmp_path / "odd.safetensors")
    del options["type"], options["num_classes"]
    options["file"] = f"{tmp_path / 'teachers.py'}:odd"
    with caplog.at_level(logging.WARNING, "ppvision"):
        found = Teacher(options, data.classes).answers(data)
    assert "cannot be exported" in caplog.text
    expected = expected_answers(
        five_classes, [path for path, _ in data.samples], [[3], [0, 4], [1]]
    )
    np.testing.assert_allclose(found, expected, atol=4e-3, rtol=2e-3)


def test_a_changed_file_is_another_teacher(crops, tmp_path, five_classes, counted):
    data = ClassFolders(crops / "train")
    file = tmp_path / "teachers.py"
    options = {key: value for key, value in zoo_teacher(five_classes).items() if key != "type"}
    del options["num_classes"]
    for text, count in ((SOURCE, 72), (SOURCE, 0), (SOURCE + "# another\n", 72)):
        file.write_text(text)
        counted.clear()
        Teacher(options | {"file": f"{file}:build"}, data.classes).answers(data)
        assert len(counted) == count


@pytest.mark.parametrize(
    ("function", "tokens"),
    [
        ("biuld", "'biuld' build"),
        ("nothing", "paddle.nn.Layer int"),
        ("broken", "OSError: disk"),
    ],
)
def test_files_that_are_wrong(tmp_path, five_classes, function, tokens):
    (tmp_path / "teachers.py").write_text(SOURCE)
    options = {"file": f"{tmp_path / 'teachers.py'}:{function}", "size": SIDE}
    with raises_naming(ConfigError, *tokens.split()):
        Teacher(options, ["a", "b"])
    with pytest.raises(ConfigError, match=r"absent\.py"):
        Teacher({"file": f"{tmp_path / 'absent.py'}:build", "size": SIDE}, ["a", "b"])


def test_teachers_that_do_not_fit(tmp_path, five_classes):
    names = ["digit 0", "digit 1", "digit 2"]
    with pytest.raises(WeightsError, match="shape"):
        Teacher(zoo_teacher(five_classes, num_classes=4), names)
    with raises_naming(ConfigError, "5", "3", "teacher.classes"):
        Teacher(zoo_teacher(five_classes, classes=None), names)
    net = package.create_model("resnet20", num_classes=3)
    for output_op, classes in (("softmax", ["digit 0", "digit 2", "digit 1"]), ("argmax", names)):
        export_model(
            net,
            tmp_path / output_op,
            input_shape=[1, 3, SIDE, SIDE],
            output_op=output_op,
            task="classification",
            classes=classes,
        )
    with raises_naming(ConfigError, "1", "2'", "1'"):
        Teacher({"model_dir": str(tmp_path / "softmax")}, names)
    with pytest.raises(ConfigError, match="argmax"):
        Teacher({"model_dir": str(tmp_path / "argmax")}, names)
    with pytest.raises(FileNotFoundError):
        Teacher({"model_dir": str(tmp_path / "absent")}, names)


# -- the mapping ----------------------------------------------------------------------------------

OURS, FOLDERS, THEIRS = ["cat", "dog"], ["n02", "n01"], ["pug", "tabby", "hound"]


@pytest.mark.parametrize(
    "mapping",
    [
        [1, [0, 2]],
        ["tabby", ["pug", 2]],
        {"dog": ["pug", "hound"], "cat": 1},
        {"n01": [0, 2], "n02": "tabby"},
    ],
)
def test_ways_to_map_classes(mapping, tmp_path):
    expected = [[1], [0, 2]]
    assert map_classes(mapping, OURS, FOLDERS, 3, THEIRS, "teacher") == expected
    path = tmp_path / "map.yml"
    path.write_text(yaml.safe_dump(mapping if isinstance(mapping, dict) else {"classes": mapping}))
    assert map_classes(str(path), OURS, FOLDERS, 3, THEIRS, "teacher") == expected


@pytest.mark.parametrize(
    ("mapping", "names", "tokens"),
    [
        ([1], THEIRS, "entry 2 1"),
        ([1, 3], THEIRS, "dog: 0 2 3"),
        ([1, -1], THEIRS, "dog: -1"),
        ([1, [0, 1]], THEIRS, "1 'cat' 'dog'"),
        ([1, "hond"], THEIRS, "class 'hond' hound"),
        ([1, "hound"], [], "'hound' name"),
        ({"cat": 1}, THEIRS, "found none 'dog'"),
        ({"cat": 1, "dog": 0, "cow": 2}, THEIRS, "'cow' 2"),
        ("absent.yml", THEIRS, "absent.yml"),
    ],
)
def test_mappings_that_are_wrong(mapping, names, tokens):
    with raises_naming(ConfigError, *tokens.split()):
        map_classes(mapping, OURS, FOLDERS, 3, names, "teacher")


# -- augmentation ---------------------------------------------------------------------------------


def samples(count: int, classes: int = 3) -> list:
    rng = np.random.default_rng(5)
    return [
        (
            rng.normal(size=(3, 4, 4)).astype(np.float32),
            np.int64(k % classes),
            (rng.normal(size=classes) * 3).astype(np.float32),
        )
        for k in range(count)
    ]


def test_mixup_mixes_softened_answers_as_it_mixes_labels():
    batch = samples(5)
    np.random.seed(4)
    images, targets, answers = MixBatch(3, mixup=1.0, temperature=2.0)(batch)
    kept = (targets[0, 0] - 0) if batch[4][1] != 0 else None
    assert kept is not None
    assert 0.05 < kept < 0.95
    for k in range(5):
        partner = batch[4 - k]
        np.testing.assert_allclose(
            images[k], kept * batch[k][0] + (1 - kept) * partner[0], atol=1e-5
        )
        shares = [np.exp(z.astype(np.float64) / 2) for z in (batch[k][2], partner[2])]
        a, b = (s / s.sum() for s in shares)
        np.testing.assert_allclose(answers[k], kept * a + (1 - kept) * b, atol=1e-6)
    np.random.seed(4)
    plain = MixBatch(3, mixup=1.0)([sample[:2] for sample in batch])
    np.testing.assert_array_equal(plain[0], images)  # the same draws with and without a teacher
    np.testing.assert_array_equal(plain[1], targets)


def test_flips_and_crops_draw_as_paddles():
    from paddle.vision import transforms as vision

    picture = np.random.default_rng(0).integers(0, 256, (40, 37, 3)).astype(np.uint8)
    pairs = (
        (RecordedFlip(0.4), vision.RandomHorizontalFlip(0.4)),
        (RandomLargeCrop(24, scale=(0.7, 1.0)), vision.RandomResizedCrop(24, scale=(0.7, 1.0))),
    )
    for ours, theirs in pairs:
        results = []
        for transform in (ours, theirs):
            random.seed(1)
            np.random.seed(1)
            results.append([transform(picture) for _ in range(20)])
        np.testing.assert_array_equal(*results)
        assert any((r != results[0][0]).any() for r in results[0])


@pytest.mark.parametrize("shape", [(40, 40), (20, 64), (64, 20), (30, 45)])
def test_random_crops_keep_seven_tenths_of_any_picture(shape, monkeypatch):
    from paddle.vision import transforms as vision

    picture = np.zeros((*shape, 3), np.uint8)
    kept = {}
    for kind in (RandomLargeCrop, vision.RandomResizedCrop):
        crop = kind(16, scale=(0.7, 1.0))
        shares = []
        for _ in range(200):
            _, _, height, width = crop._dynamic_get_param(picture)
            shares.append(height * width / (shape[0] * shape[1]))
        kept[kind] = min(shares)
        assert crop(picture).shape == (16, 16, 3)
    assert kept[RandomLargeCrop] > 0.68  # sides are whole pixels
    if max(shape) > 2 * min(shape):
        assert kept[vision.RandomResizedCrop] < 0.5


@pytest.mark.parametrize(
    ("spec", "side", "share"),
    [
        ({"type": "RandomCrop", "size": 28, "padding": 4}, 28, (24 / 28) ** 2),
        ({"type": "RandomCrop", "size": 28}, 32, (28 / 32) ** 2),
        ({"type": "RandomCrop", "size": [28, 30], "padding": [2, 6]}, 32, 22 * 24 / 32**2),
        ({"type": "RandomCrop", "size": 28}, 40, (28 / 40) ** 2),
        ({"type": "CenterCrop", "target_size": [30, 20]}, 32, 30 * 20 / 32**2),
    ],
)
def test_other_crops_are_refused_where_they_leave_too_little(spec, side, share):
    from ppvision.tasks.classification.config import build_taught_transform

    crop = build_taught_transform(spec)
    assert isinstance(crop, CheckedCrop)
    picture = np.zeros((side, side, 3), np.uint8)
    if share >= 0.7:
        assert crop(picture).shape[0] == 28
    else:
        with raises_naming(InputError, f"{share:.2f}", str(side)):
            crop(picture)


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda c: c["teacher"].pop("type"), "type model_dir file none"),
        (lambda c: c["teacher"].update(file="a.py:f"), "type file"),
        (
            lambda c: c["teacher"].update(type="resnet21"),
            "classes.yml: teacher.type: resnet20",
        ),
        (lambda c: c["teacher"].update(type=5), "teacher.type: text 5"),
        (lambda c: c["teacher"].update(num_clases=5), "'num_clases' num_classes"),
        (lambda c: c["teacher"].update(num_classes=0), "teacher.num_classes: whole"),
        (lambda c: c["teacher"].update(features_only=True), "'features_only'"),
        (lambda c: c["teacher"].pop("weights"), "weights type"),
        (lambda c: c["teacher"].pop("size"), "teacher: size"),
        (lambda c: c["teacher"].update(size=0), "classes.yml: teacher: Resize"),
        (lambda c: c["teacher"].update(size=[8]), "target_size"),
        (lambda c: c["teacher"].update(std=[0]), "std zeros"),
        (lambda c: c["teacher"].update(interpolation="RANDOM"), "interp"),
        (lambda c: c["teacher"].update(temperature=0), "temperature: finite 0"),
        (lambda c: c["teacher"].update(weight=1.5), "weight: number 0 1"),
        (lambda c: c["teacher"].update(weight="a"), "teacher.weight: number 'a'"),
        (lambda c: c["teacher"].update(classes=[]), "teacher.classes:"),
        (lambda c: c["teacher"].update(classes=[1, []]), "teacher.classes:"),
        (lambda c: c["teacher"].update(classes=[1, 2.5]), "teacher.classes:"),
        (lambda c: c["teacher"].update(classes=7), "teacher.classes:"),
        (lambda c: c.update(teacher=3), "teacher: keys values"),
        (lambda c: c.update(teacher={"file": "a.py", "size": 8}), "FILE.py:FUNCTION"),
        (
            lambda c: c.update(teacher={"model_dir": "x", "mean": [0.5]}),
            "mean model_dir deploy.yaml",
        ),
        (
            lambda c: c.update(teacher={"model_dir": "x", "weights": "y"}),
            "weights model_dir",
        ),
        (lambda c: c["loss"].update(cutmix=0.5), "classes.yml loss.cutmix: 0"),
        (
            lambda c: c["train_dataset"]["transforms"].insert(
                0, {"type": "RandomResizedCrop", "size": 24, "scale": [0.5, 1.0]}
            ),
            "classes.yml train_dataset.transforms.0: 0.7 0.5",
        ),
        (
            lambda c: c["train_dataset"]["transforms"].insert(
                0, {"type": "RandomResizedCrop", "size": 24}
            ),
            "transforms.0: scale 0.08",
        ),
        (
            lambda c: c["train_dataset"]["transforms"].insert(0, {"type": "RandomVerticalFlip"}),
            "RandomVerticalFlip teacher",
        ),
        (lambda c: c.update(sizes=[]), "classes.yml: sizes: pairs"),
        (lambda c: c.update(sizes=[[0.1, 16]]), "sizes: 0.0 upwards"),
        (lambda c: c.update(sizes=[[0.0, 16], [0.5, 20], [0.5, 24]]), "sizes:"),
        (lambda c: c.update(sizes=[[0.0, 16], [1.0, 20]]), "sizes: below 1"),
        (lambda c: c.update(sizes=[[0.0, 16.5]]), "sizes:"),
        (lambda c: c.update(sizes=32), "sizes:"),
    ],
)
def test_what_a_config_cannot_say(classification_file, five_classes, change, tokens):
    def both(config):
        config["teacher"] = zoo_teacher(five_classes)
        config["loss"] = {"mixup": 0.8}
        change(config)

    open_job(classification_file(lambda c: c.update(teacher=zoo_teacher(five_classes), loss={})))
    with raises_naming(ConfigError, *tokens.split()):
        open_job(classification_file(both))


def test_a_teacher_is_looked_at_before_anything_is_written(
    classification_file, five_classes, tmp_path, capsys
):
    config = classification_file(
        lambda c: c.update(teacher=zoo_teacher(tmp_path / "absent.safetensors"), loss={})
    )
    assert ppvision("train", "-c", config, "--save_dir", tmp_path / "run") == 1
    assert "absent.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_crop_that_is_too_small_is_refused_before_the_teacher_answers(
    crops, tmp_path, five_classes, counted, capsys
):
    config = taught_config(crops, five_classes)
    del config["sizes"]
    config["train_dataset"]["transforms"][0] = {"type": "RandomCrop", "size": 8}
    path = tmp_path / "taught.yml"
    path.write_text(yaml.safe_dump(config))
    assert ppvision("train", "-c", path, "--save_dir", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "train_dataset.transforms: RandomCrop: keeps" in said
    assert "could not be read" not in said
    assert not counted


def test_a_missing_class_gets_the_names_of_the_mapping():
    mapping = {"goldfish": 0, "bullfrog": 1}
    with raises_naming(ConfigError, "'alligator'", "bullfrog,", "goldfish."):
        map_classes(mapping, ["goldfish", "bullfrog", "alligator"], [], 5, (), "teacher")


# -- the run --------------------------------------------------------------------------------------


def taught_config(crops, weights) -> dict:
    config = classification_config(crops)
    config["teacher"] = zoo_teacher(weights, temperature=2.0, weight=0.7)
    config["sizes"] = [[0.0, 12], [0.5, 18], [0.8, 24]]
    config["iters"] = 18  # three epochs of six steps
    config["loss"] = {"label_smoothing": 0.1, "mixup": 0.8}
    config["train_dataset"]["transforms"] = [
        {"type": "RandomResizedCrop", "size": 24, "scale": [0.7, 1.0]},
        {"type": "RandomHorizontalFlip"},
        {"type": "RandAugment"},
        {"type": "Normalize"},
        {"type": "RandomErasing", "prob": 0.5},
    ]
    return config


def test_a_run_with_a_teacher_and_sizes_goes_on_to_the_same_end(
    crops, tmp_path, five_classes, eager
):
    """Stopped in the second epoch, whose pictures are not those of the first."""
    path = tmp_path / "taught.yml"
    path.write_text(yaml.safe_dump(taught_config(crops, five_classes)))
    flags = ("--do_eval", "--log_iters", 2, "--save_interval", 9, "--num_workers", 1)
    assert ppvision("train", "-c", path, "--save_dir", tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_18")
    arguments = ("train", "-c", path, "--save_dir", tmp_path / "cut", "--resume", "auto", *flags)
    assert ppvision(*arguments) == 0
    weights = [
        load_file(tmp_path / name / "checkpoints" / "step_18" / "model.safetensors")
        for name in ("whole", "cut")
    ]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)
    rows = [
        [row for row in read_metrics(tmp_path / name / "metrics.csv") if "cost" not in row[1]]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
    tags = {tag for _, tag, _ in rows[0]}
    assert {"Train/loss_0", "Train/loss_1", "Evaluate/top1"} <= tags


def test_sizes_change_between_epochs_and_at_no_other_time(crops, tmp_path, five_classes):
    path = tmp_path / "taught.yml"
    path.write_text(yaml.safe_dump(taught_config(crops, five_classes)))
    job = open_job(path)
    assert job.iters == 18
    from ppvision.engine.seeding import SeededBatches, SeededDataset

    data = SeededDataset(job.train_dataset, 0)
    sides = []
    for batch in SeededBatches(job.train_dataset, 6, 0, 4, 18):  # as after a resume at step 4
        shapes = {data[key][0].shape for key in batch}
        assert len(shapes) == 1
        sides.append(shapes.pop()[1:])
    # Epochs begin at 0, 1/3 and 2/3 of the training: 0.8 has not begun by then.
    assert sides == [(12, 12)] * 8 + [(18, 18)] * 6
    assert job.val_dataset[0][0].shape == (3, 24, 24)


def test_sizes_are_reached_by_means_over_areas(crops, classification_file):
    def change(config):
        config["sizes"] = [[0.0, 14], [0.5, 56]]
        config["train_dataset"]["transforms"] = [{"type": "Normalize"}]

    data = open_job(classification_file(change)).train_dataset
    data.set_epoch(0)
    image, _ = data[5]
    picture = cv2.imread(str(data.samples[5][0]))[:, :, ::-1] / 255
    means = picture.reshape(14, 2, 14, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(image.transpose(1, 2, 0), (means - 0.5) / 0.5, atol=1e-5)
    data.set_epoch(10)
    assert data[5][0].shape == (3, 56, 56)


def test_accumulation_counts_in_the_schedule(classification_file):
    def change(config):
        config |= {"accumulate": 3, "iters": 4, "sizes": [[0.0, 16], [0.5, 20]]}

    job = open_job(classification_file(change))  # 12 batches of 6 are two epochs of 36 pictures
    assert [job._side_at(epoch) for epoch in (0, 1)] == [16, 20]


def test_a_taught_once_qat_takes_a_step(crops, tmp_path, five_classes, eager):
    config = taught_config(crops, five_classes) | {"slim_config": {"bits": [8, 2]}, "iters": 2}
    path = tmp_path / "taught.yml"
    path.write_text(yaml.safe_dump(config))
    assert ppvision("train", "-c", path, "--save_dir", tmp_path / "run", "--log_iters", 1) == 0
    tags = {tag for _, tag, _ in read_metrics(tmp_path / "run" / "metrics.csv")}
    assert {"Train/loss_w8", "Train/loss_w2"} <= tags


def test_a_model_is_used_without_its_teacher(crops, tmp_path, five_classes):
    """Teacher and cache are for training only."""
    config = taught_config(crops, tmp_path / "absent.safetensors")
    path = tmp_path / "taught.yml"
    path.write_text(yaml.safe_dump(config))
    job = open_job(path)
    weights = tmp_path / "weights.pdparams"
    paddle.save(job.float_model.state_dict(), str(weights))
    common = ("-c", path, "--model_path", weights)
    assert ppvision("eval", *common) == 0
    out = tmp_path / "predicted"
    pictures = ("--image_path", crops / "val" / "digit 0", "--save_dir", out)
    assert ppvision("predict", *common, *pictures) == 0
    assert len(json.loads((out / "predictions.json").read_text())) == 7


def test_the_config_of_tiny_imagenet(tmp_path, monkeypatch):
    """On a stand-in for its data: classes, teacher and a step at each size."""
    from tests.helpers.zips import write_entries

    config = ROOT / "configs" / "classification" / "pale_nano_tiny_imagenet_100.yml"
    mapping = yaml.safe_load(config.read_text())["teacher"]["classes"]
    assert len(mapping) == 100
    # Both lists are sorted by the same ids.
    assert sorted(mapping) == list(mapping)
    assert sorted(mapping.values()) == list(mapping.values())
    assert all(0 <= number < 1000 for number in mapping.values())
    # Known places of ImageNet-1k's classes: goldfish, tabby, orange, seashore.
    known = {"n01443537": 1, "n02123045": 281, "n07747607": 950, "n09428293": 978}
    assert known.items() <= mapping.items()
    data = tmp_path / "data" / "tiny-imagenet-100"
    data.mkdir(parents=True)
    picture = cv2.imencode(".jpg", np.full((64, 64, 3), 99, np.uint8))[1].tobytes()
    for split in ("train", "val"):
        entries = {f"{split}/{folder}/{split}_1.JPEG": picture for folder in mapping}
        write_entries(data / f"{split}.zip", entries)
    (data / "classes.txt").write_text("".join(f"{folder} some thing\n" for folder in mapping))
    weights = tmp_path / "data" / "teachers" / "efficientnet_lite2.safetensors"
    net = package.create_model("efficientnet_lite2")
    save_weights({name: tensor.numpy() for name, tensor in net.state_dict().items()}, weights)
    monkeypatch.chdir(tmp_path)
    job = open_job(config, batch_size=2)
    assert job.teacher._columns == [[number] for number in mapping.values()]
    job.train_dataset.answers = np.zeros((100, 2, 100), np.float16)
    for epoch, side in ((0, 32), (23, 32), (24, 64), (59, 64)):
        job.train_dataset.set_epoch(epoch)
        batch = job.batched([job.train_dataset[0], job.train_dataset[99]])
        assert batch[0].shape == (2, 3, side, side)
    losses = job.losses(job.model, [paddle.to_tensor(part) for part in batch])
    assert np.isfinite([float(loss) for loss in losses]).all()
    assert job.val_dataset[7][0].shape == (3, 64, 64)
    assert job.val_dataset[7][1] == 7
    assert str(job.val_dataset.samples[0][0]).startswith("data/tiny-imagenet-100/val.zip: val/")
