"""The verbs on a small job, in this process and through the shell scripts."""

import csv
import json
import logging
import re

import cv2
import numpy as np
import paddle
import pytest
from paddleseg.core import evaluate as stock_evaluate
from PIL import Image
from safetensors.numpy import load_file

from ppvision.data.check.segmentation import DataError
from ppvision.data.listing import list_images, list_labels
from ppvision.data.pictures import read_picture
from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import read_metrics
from ppvision.tasks import open_job
from ppvision.tasks.pictures import (
    BOUNDARY,
    IGNORED,
    WRONG,
    WRONG_FAR,
    draw_errors,
    draw_overlay,
    draw_panel,
    save_prediction,
)
from ppvision.tasks.prediction import predict_to_folder
from ppvision.tasks.segmentation.scores import Scoring
from tests.helpers.arrays import arrays_of
from tests.helpers.configs import ROOT, small_config
from tests.helpers.messages import raises_naming
from tests.helpers.verbs import ppvision, records, shell


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """A run of 6 steps: `(config, run folder)`."""
    import yaml

    folder = tmp_path_factory.mktemp("trained")
    config = folder / "job.yml"
    config.write_text(yaml.safe_dump(small_config(scenes)))
    code = ppvision(
        *("train", "-c", config, "--save_dir", folder / "run", "--do_eval", "--use_vdl"),
        *("--log_iters", 2, "--save_interval", 3, "--use_ema"),
    )
    assert code == 0
    return config, folder / "run"


def read_label(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_run_folder_holds_what_the_contract_names(trained):
    _, folder = trained
    assert {p.name for p in folder.iterdir()} == {
        *("config.yml", "metrics.csv", "log.txt", "vdl", "checkpoints", "best_model"),
    }
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_3", "step_6"]
    assert (folder / "best_model" / "model.pdparams").is_file()


def test_csv_and_visualdl_hold_the_same_numbers(trained):
    _, folder = trained
    rows = read_metrics(folder / "metrics.csv")
    tags = {tag for _, tag, _ in rows}
    assert tags >= {
        *("Train/loss", "Train/lr", "Train/batch_cost", "Train/reader_cost"),
        *("Evaluate/mIoU", "Evaluate/Acc", "Evaluate/Ema_mIoU", "Evaluate/BoundaryIoU"),
        *("Evaluate/BoundaryF3", "Evaluate/BoundaryF5", "Evaluate/BoundaryF9"),
        *("Evaluate/TrimapIoU", "Evaluate/Ema_BoundaryIoU"),
    }
    assert [step for step, tag, _ in rows if tag == "Train/loss"] == [2, 4, 6]
    seen = [(v.id, v.tag, v.value) for v in records(folder) if v.WhichOneof("one_value") == "value"]
    assert len(seen) == len(rows)
    for (step, tag, value), (vdl_step, vdl_tag, vdl_value) in zip(rows, seen, strict=True):
        assert (step, tag) == (vdl_step, vdl_tag)
        assert vdl_value == pytest.approx(value, rel=1e-6)


def test_pictures_are_in_visualdl(trained):
    _, folder = trained
    images = [v for v in records(folder) if v.WhichOneof("one_value") == "image"]
    assert {v.id for v in images} == {3, 6}
    assert len(images) == 4  # 2 validation samples, twice
    decoded = cv2.imdecode(np.frombuffer(images[0].image.encoded_image_string, np.uint8), 1)
    assert decoded.shape == (56, 4 * 56 + 3 * 4, 3)


def test_a_second_run_into_the_same_folder_is_refused(trained, capsys):
    config, folder = trained
    before = (folder / "metrics.csv").read_bytes()
    assert ppvision("train", "-c", config, "--save_dir", folder) == 1
    assert "holds a run" in capsys.readouterr().err
    assert (folder / "metrics.csv").read_bytes() == before


def test_resume_goes_on_and_doubles_no_point(trained, tmp_path):
    config, folder = trained
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step_6")
    arguments = ("--do_eval", "--use_vdl", "--log_iters", 2, "--save_interval", 3, "--use_ema")
    code = ppvision("train", "-c", config, "--save_dir", copy, "--resume", "auto", *arguments)
    assert code == 0
    assert [p.name for p in list_checkpoints(copy / "checkpoints")] == ["step_3", "step_6"]
    points = [(step, tag) for step, tag, _ in read_metrics(copy / "metrics.csv")]
    assert len(points) == len(set(points))
    in_vdl = [(v.id, v.tag) for v in records(copy) if v.WhichOneof("one_value") == "value"]
    assert sorted(in_vdl) == sorted(points)
    # As without the interruption, to the bit: drop path, RandomDistort and pictures included.
    for name in ("model", "ema", "optimizer"):
        whole, again = (
            load_file(run / "checkpoints" / "step_6" / f"{name}.safetensors")
            for run in (folder, copy)
        )
        assert whole.keys() == again.keys()
        for key, array in whole.items():
            np.testing.assert_array_equal(again[key], array, err_msg=f"{name} {key}")
    costs = ("Train/batch_cost", "Train/reader_cost")
    rows = [
        [row for row in read_metrics(run / "metrics.csv") if row[1] not in costs]
        for run in (folder, copy)
    ]
    assert rows[0] == rows[1]


def test_given_weights_are_the_start_also_with_resume_auto(trained, tmp_path, capsys):
    """As the quickstart does it: `--model_path W --resume auto` into a new folder."""
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    losses = []
    for name, flags in (("plain", ()), ("auto", ("--resume", "auto"))):
        arguments = ("--save_dir", tmp_path / name, "--iters", 1, "--model_path", weights)
        assert ppvision("train", "-c", config, *arguments, *flags) == 0
        assert f"starting from {weights}" in capsys.readouterr().err
        losses.append(
            [v for _, t, v in read_metrics(tmp_path / name / "metrics.csv") if t[-4:] == "loss"]
        )
    assert losses[0] == losses[1]
    assert ppvision("train", "-c", config, "--save_dir", tmp_path / "no", "--iters", 1) == 0
    fresh = [v for _, t, v in read_metrics(tmp_path / "no" / "metrics.csv") if t[-4:] == "loss"]
    assert fresh != losses[0]


def test_a_run_that_cannot_start_leaves_nothing(config_file, tmp_path):
    config, folder = config_file(), tmp_path / "run"
    assert ppvision("train", "-c", config, "--save_dir", folder, "--batch_size", 100) == 1
    assert ppvision("train", "-c", config, "--save_dir", folder, "--resume", tmp_path / "no") == 1
    assert not folder.exists()


def test_a_runs_own_config_is_a_config(trained, capsys):
    _, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    assert ppvision("eval", "-c", folder / "config.yml", "--model_path", weights) == 0


def test_eval_equals_paddlesegs_and_a_count_by_hand(trained, scenes, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    assert ppvision("eval", "-c", config, "--model_path", weights) == 0
    printed = float(re.search(r"^mIoU (\S+)", capsys.readouterr().out, re.M)[1])
    job = open_job(config)
    model = job.load(weights)
    stock = stock_evaluate(model, job.builder.val_dataset, print_detail=False)[0]
    assert printed == pytest.approx(stock, abs=5e-5)

    confusion = np.zeros((11, 11), np.int64)
    for line in (scenes / "val.txt").read_text().splitlines():
        image, label = (scenes / name for name in line.split())
        x = (read_picture(image) / 255.0 - 0.5) / 0.5
        with paddle.no_grad():
            logits = model(paddle.to_tensor(x.transpose(2, 0, 1)[None], "float32"))[0]
        for truth, guess in zip(
            read_label(label).ravel(), logits.numpy().argmax(1).ravel(), strict=True
        ):
            confusion[truth, guess] += 1
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    expected = np.mean(np.diag(confusion) / np.maximum(union, 1))
    assert printed == pytest.approx(expected, abs=5e-5)


def test_augmented_and_sliding_evaluation(trained, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    common = ("eval", "-c", config, "--model_path", weights)
    assert ppvision(*common, "--aug_eval", "--scales", 0.75, 1.0, "--flip_horizontal") == 0
    assert ppvision(*common, "--is_slide", "--crop_size", 40, 40, "--stride", 20, 20) == 0
    assert ppvision(*common, "--is_slide") == 1
    assert "--crop_size W H and --stride W H" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(trained):
    config, folder = trained
    target = folder.parent / "inference"
    weights = folder / "best_model" / "model.pdparams"
    assert ppvision("export", "-c", config, "--model_path", weights, "--save_dir", target) == 0
    return target


def test_exported_eval_and_predict_agree_with_eager(trained, exported, scenes, tmp_path, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    tables = []
    for how in (("--model_path", weights), ("--model_dir", exported)):
        capsys.readouterr()
        assert ppvision("eval", "-c", config, *how) == 0
        tables.append(capsys.readouterr().out.strip().splitlines()[-2:])
        images = ("--image_path", scenes / "val.txt", "--save_dir", tmp_path / how[0])
        assert ppvision("predict", "-c", config, *how, *images) == 0
    assert tables[0] == tables[1]
    eager, deployed = (tmp_path / "--model_path", tmp_path / "--model_dir")
    names = sorted(p.relative_to(eager) for p in eager.rglob("*.png"))
    assert "BoundaryIoU 0." in " ".join(tables[0])
    assert len(names) == 6  # an overlay, a class map and a comparison of 2 scenes
    for name in names:
        assert (eager / name).read_bytes() == (deployed / name).read_bytes()
    report = json.loads((deployed / "predictions.json").read_text())
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-4) for shares in report.values())


def test_an_export_of_other_classes_is_refused(
    trained, exported, config_file, copied_scenes, capsys
):
    def change(config):
        config["test_config"] = {"is_slide": True, "crop_size": [40, 40], "stride": [20, 20]}

    assert ppvision("eval", "-c", config_file(change), "--model_dir", exported) == 1
    assert "Use --model_path" in capsys.readouterr().err

    (copied_scenes / "classes.txt").unlink()

    def more(config):
        config.update(small_config(copied_scenes))
        config["model"]["num_classes"] = 12
        for part in ("train_dataset", "val_dataset"):
            config[part]["num_classes"] = 12

    assert ppvision("eval", "-c", config_file(more), "--model_dir", exported) == 1
    assert "expected a segmentation model of 12 classes" in capsys.readouterr().err


def test_data_sets_that_renumber_their_labels(config_file, scenes, tmp_path, capsys):
    """ADE20K's class subtracts 1 from its labels; both ways to evaluate have to."""
    root = tmp_path / "ade"
    for split, name in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for line in (scenes / f"{split}.txt").read_text().splitlines():
            image, label = (scenes / part for part in line.split())
            (root / "images" / name / image.name).write_bytes(image.read_bytes())
            numbers = Image.fromarray(read_label(label) + 1)
            numbers.save(root / "annotations" / name / label.name)

    def change(config):
        config["model"]["num_classes"] = 150
        for part in ("train_dataset", "val_dataset"):
            config[part] = {
                "type": "ADE20K",
                "dataset_root": str(root),
                "mode": config[part]["mode"],
                "transforms": config[part]["transforms"],
            }

    config, run = config_file(change), tmp_path / "run"
    flags = ("--iters", 1, "--save_interval", 1, "--do_eval")
    assert ppvision("train", "-c", config, "--save_dir", run, *flags) == 0
    weights = run / "best_model" / "model.pdparams"
    export = ("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "m")
    assert ppvision(*export, "--input_shape", 1, 3, 56, 56) == 0
    capsys.readouterr()
    tables = []
    for how in (("--model_path", weights), ("--model_dir", tmp_path / "m")):
        assert ppvision("eval", "-c", config, *how) == 0
        tables.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert tables[0] == tables[1]

    (root / "images" / "training" / "000002.jpg").write_bytes(b"junk")
    assert ppvision("train", "-c", config, "--save_dir", tmp_path / "bad") == 1
    assert "000002.jpg" in capsys.readouterr().err
    gone = ("--opts", f"train_dataset.dataset_root={tmp_path}/gone")
    assert ppvision("train", "-c", config, "--save_dir", tmp_path / "bad", *gone) == 1
    assert "does not download data sets" in capsys.readouterr().err


def test_predict_names_what_does_not_decode_and_goes_on(exported, scenes, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    good = scenes / "images" / "val" / "000000.jpg"
    (folder / "good.jpg").write_bytes(good.read_bytes())
    (folder / "bad.jpg").write_bytes(good.read_bytes()[:200])
    code = ppvision(
        *("predict", "--model_dir", exported, "--image_path", folder),
        *("--save_dir", tmp_path / "out"),
    )
    assert code == 1
    assert "bad.jpg" in capsys.readouterr().err
    assert (tmp_path / "out" / "overlay" / "good.png").is_file()


def test_lists_of_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="--image_path"):
        list_images(tmp_path / "absent")
    with raises_naming(ValueError, "--image_path:", "images,", "none"):
        list_images(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("a.JPG", "deep/b.png", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    assert [name for _, name in list_images(tmp_path)] == ["a", "deep/b"]
    (tmp_path / "list.txt").write_text("deep/b.png deep/label.png\n\na.JPG\n")
    assert [name for _, name in list_images(tmp_path / "list.txt")] == ["deep/b", "a"]


@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_lists_with_labels_behind_other_separators(separator, tmp_path):
    pairs = (("a, b.jpg", "a.png"), ("c.jpg", "c.png"))
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{separator.join(pair)}\n" for pair in pairs))
    for image, _ in pairs:
        (tmp_path / image).write_bytes(b"")
    expected = {tmp_path / image: tmp_path / label for image, label in pairs}
    assert [found for found, _ in list_images(path)] == list(expected)
    assert list_labels(path) == expected


def test_an_exported_model_compares_as_the_config_says(
    exported, config_file, scenes, tmp_path, monkeypatch
):
    """deploy.yaml does not hold the ignored label: 255, unless a config is given that names one."""
    seen = []
    monkeypatch.setattr(
        "ppvision.tasks.prediction.predict_to_folder",
        lambda *_, ignore_index, **__: seen.append(ignore_index) or [],
    )

    def change(config):
        config["val_dataset"]["ignore_index"] = 7

    where = ("--image_path", scenes / "val.txt", "--save_dir", tmp_path / "out")
    for config in ((), ("-c", config_file(change))):
        assert ppvision("predict", "--model_dir", exported, *config, *where) == 0
    assert seen == [255, 7]


def test_class_maps_of_more_than_256_classes(tmp_path):
    image = np.zeros((2, 3, 3), np.uint8)
    for name, classes in (("few", [0, 1, 255]), ("many", [0, 1, 300])):
        prediction = np.array([classes, classes])
        save_prediction(image, prediction, tmp_path, name)
        np.testing.assert_array_equal(read_label(tmp_path / "labels" / f"{name}.png"), prediction)
        assert (tmp_path / "overlay" / f"{name}.png").is_file()


def test_labels_without_a_boundary_are_warned_of(caplog, monkeypatch):
    """A strip of ignored pixels between two classes; touching classes, or one alone, are fine."""
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)
    label = np.zeros((20, 20), np.int64)
    label[:, 10:] = 1
    strip = label.copy()
    strip[:, 8:12] = 255
    for truth, warned in ((strip, True), (label, False), (np.zeros_like(label), False)):
        caplog.clear()
        scoring = Scoring(2, 255)
        scoring.update(label, truth)
        assert np.isnan(scoring.scores().boundary["TrimapIoU"]) == (truth is not label)
        assert ("2 classes, no two of which touch" in caplog.text) is warned


def test_the_table_says_that_its_means_differ():
    """Class 2 occurs nowhere: 0 in PaddleSeg's mean, left out of those along boundaries."""
    label = np.zeros((20, 20), np.int64)
    label[:, 10:] = 1
    for classes, noted in ((2, False), (3, True)):
        scoring = Scoring(classes, 255)
        scoring.update(label, label)
        scores = scoring.scores()
        assert (scores.miou, scores.boundary["BoundaryIoU"]) == (pytest.approx(2 / classes), 1.0)
        note = "-: not in the mean; in mIoU (PaddleSeg's) an absent class counts as 0"
        assert (note in scores.table([]).splitlines()) is noted


def test_results_stay_in_their_folder_and_apart(exported, scenes, tmp_path):
    """Absolute and upward names in a list, and two pictures of one stem."""
    source = (scenes / "images" / "val" / "000000.jpg").read_bytes()
    for name in ("own/p.png", "lists/a.jpg", "lists/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(source)
    text = f"{tmp_path}/own/p.png\n../own/p.png\na.jpg\r\na.png\n"
    (tmp_path / "lists" / "list.txt").write_text(text)
    names = [name for _, name in list_images(tmp_path / "lists" / "list.txt")]
    assert len(set(names)) == 4
    assert names[2:] == ["a_jpg", "a_png"]
    code = ppvision(
        *("predict", "--model_dir", exported, "--image_path", tmp_path / "lists" / "list.txt"),
        *("--save_dir", tmp_path / "out"),
    )
    assert code == 0
    assert (tmp_path / "own" / "p.png").read_bytes() == source
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["p.png"]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8


def test_bad_data_is_found_before_the_first_step(config_file, copied_scenes, tmp_path):
    folder = copied_scenes
    label = folder / "labels" / "train" / "000003.png"
    Image.fromarray(np.full((56, 56), 40, np.uint8)).save(label)

    def change(config):
        for part, name in (("train_dataset", "train"), ("val_dataset", "val")):
            config[part] |= {
                "dataset_root": str(folder),
                f"{name}_path": str(folder / f"{name}.txt"),
            }

    path = config_file(change)
    with pytest.raises(DataError, match=r"000003\.png"):
        open_job(path).check_data("train_dataset")
    assert ppvision("train", "-c", path, "--save_dir", tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config_file, tmp_path, capsys):
    def change(config):
        config["lr_scheduler"]["learning_rate"] = 1e30

    code = ppvision("train", "-c", config_file(change), "--save_dir", tmp_path / "run")
    assert code == 1
    assert "expected a finite number" in capsys.readouterr().err


def test_half_precision_on_a_cpu_says_that_it_is_off(config_file, tmp_path, capsys):
    arguments = ("--save_dir", tmp_path / "run", "--iters", 1, "--precision", "bf16")
    assert ppvision("train", "-c", config_file(), *arguments) == 0
    assert "bf16 needs a GPU; training in fp32" in capsys.readouterr().err


def test_wrong_usage_says_what_was_expected(config_file, trained, tmp_path, capsys):
    config, folder = trained
    for arguments, message in (
        (("train", "-c", tmp_path / "absent.yml"), "found none at"),
        (("train", "-c", config, "--device", "gpu"), "requirements-gpu.txt"),
        (("eval", "-c", config, "--model_path", tmp_path / "absent.pdparams"), "expected a file"),
        (("eval", "-c", config, "--model_dir", tmp_path), "deploy.yaml"),
        (
            (
                "train",
                "-c",
                config,
                "--save_dir",
                tmp_path / "r",
                "--model_path",
                folder / "config.yml",
            ),
            "config.yml",
        ),
        (
            ("train", "-c", config, "--batch_size", 100, "--save_dir", tmp_path / "q"),
            "Lower --batch",
        ),
    ):
        assert ppvision(*arguments) == 1
        assert message in capsys.readouterr().err


def test_panels():
    image = np.full((2, 3, 3), 200, np.uint8)
    label = np.array([[0, 1, 255], [0, 1, 1]])
    prediction = np.array([[0, 1, 1], [1, 1, 0]])
    wrong = draw_errors(image, label, prediction, 255)
    assert wrong[1, 0].tolist() == list(WRONG)  # beside the other class
    assert wrong[1, 2].tolist() == list(WRONG)  # at the picture's edge, which counts as well
    assert wrong[0, 2].tolist() == list(IGNORED)
    assert wrong[0, 0].tolist() == list(BOUNDARY)  # right, and the next class follows
    assert wrong[0, 1].tolist() == [164, 164, 164]
    assert draw_overlay(image, np.ones((2, 3), int))[0, 0].tolist() == [
        164,
        100,
        100,
    ]  # half dark red
    assert draw_panel(image, label, prediction, 255).shape == (2, 4 * 3 + 3 * 4, 3)


def test_errors_near_and_far_from_the_boundary():
    """A square of 100 x 100: Boundary IoU looks 3 pixels deep, so does the bright red."""
    image = np.full((100, 100, 3), 200, np.uint8)
    label = np.repeat(np.arange(100) >= 50, 100).reshape(100, 100).astype(int)  # halves
    found = draw_errors(image, label, 1 - label, 255)
    assert (found[:, 0] == WRONG).all()  # the picture's edge
    found = found[:, 50]
    for near in (slice(0, 3), slice(47, 53), slice(97, 100)):
        assert (found[near] == WRONG).all()
    for far in (slice(3, 47), slice(53, 97)):
        assert (found[far] == WRONG_FAR).all()
    right = draw_errors(image, label, label, 255)
    assert (right[49] == BOUNDARY).all()  # one pixel wide
    assert (np.delete(right, 49, axis=0) == 164).all()  # else the picture in grey
    assert (draw_panel(image, label, label, 255)[49, 2 * 104 : 3 * 104 - 4] == BOUNDARY).all()


def test_comparisons_with_the_labels_of_a_list(copied_scenes, tmp_path, caplog, monkeypatch):
    scenes = copied_scenes
    lines = (scenes / "train.txt").read_text().splitlines()
    path = scenes / "some.txt"
    path.write_text(f"{lines[0]}\n{lines[1].split()[0]} no_label.png\n{lines[2].split()[0]}\n")
    truth = {scenes / a: scenes / b for a, b in (line.split() for line in lines)}
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)

    def predict(folder, **options):
        return predict_to_folder(
            lambda p, _: read_label(truth[p]), path, tmp_path / folder, [], **options
        )

    assert predict("with") == []  # a label that is missing is no failed prediction
    assert "no comparison" in caplog.text
    assert "no_label.png" in caplog.text
    (compared,) = (tmp_path / "with" / "compared").rglob("*.png")
    assert compared.stem == (scenes / lines[0].split()[0]).stem
    right = np.asarray(Image.open(compared))[:, -56:].reshape(-1, 3).tolist()
    assert list(WRONG) not in right
    assert list(WRONG_FAR) not in right
    assert len(list((tmp_path / "with" / "overlay").rglob("*.png"))) == 3
    caplog.clear()
    assert predict("few", num_classes=1) == []  # other classes than the model's
    assert "expected classes from 0 to 0 and 255, got" in caplog.text
    assert not (tmp_path / "few" / "compared").exists()
    assert predict("without", ignore_index=None) == []
    assert not (tmp_path / "without" / "compared").exists()


@pytest.mark.all  # by default: two machines, and two processes of a classifier
@pytest.mark.parametrize("kind", ["once_qat", "plain", "sdn"])
def test_two_processes_train_as_one(kind, config_file, tmp_path):
    """Data-parallel over gloo: equal weights on both ranks, and rank 0 alone writes."""

    def change(config):
        config["imports"].append("tests.helpers.report_weights")
        if kind == "once_qat":  # a width drawn by chance, and parameters that a width leaves alone
            options = {"objective": "sandwich", "activations": True, "steps": "per_width"}
            config["slim_config"] = {"bits": [8, 4, 3, 2], **options}
        if kind == "sdn":
            inner = config["model"]["backbone"]
            sdn = {"type": "SemanticDiffusionBackbone", "similarity": "gaussian"}
            config["model"]["backbone"] = sdn | {"backbone": inner}

    done = shell(
        *("bash", ROOT / "scripts" / "train.sh", config_file(change)),
        *("--save_dir", tmp_path / "run", "--iters", 3, "--batch_size", 2, "--save_interval", 3),
        NPROC=2,
        LOG_DIR=tmp_path / "logs",
        PYTHONPATH=ROOT,
        PPVISION_REPORT=tmp_path / "report",
    )
    logs = "\n".join(p.read_text() for p in (tmp_path / "logs").glob("workerlog.*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    ranks = [np.load(tmp_path / f"report.{rank}.npz") for rank in (0, 1)]
    assert set(ranks[0]) == set(ranks[1])
    assert not np.array_equal(ranks[0]["|batch"], ranks[1]["|batch"])  # each has its own samples
    compared = [name for name in ranks[0] if "|" not in name]
    assert len(compared) > 100
    assert any("diffusion" in name for name in compared) is (kind == "sdn")
    assert any("log_scale" in name for name in compared) is (kind == "once_qat")
    for name in compared:
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name])
    assert len(list((tmp_path / "run" / "vdl").iterdir())) == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["tag"] == "Train/loss"]
    assert steps == ["3"]


@pytest.mark.all
def test_the_scripts_export_and_predict(trained, scenes, tmp_path):
    """`tests/test_scripts.py` has which verb each script is."""
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    done = shell(
        *("bash", ROOT / "scripts" / "export.sh", config, "--model_path", weights),
        *("--save_dir", tmp_path / "m", "--input_shape", 1, 3, 56, 56),
    )
    assert done.returncode == 0, done.stderr
    done = shell("bash", ROOT / "scripts" / "eval.sh", config, "--model_dir", tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout
    picture = scenes / "images" / "val" / "000001.jpg"
    done = shell(
        *("bash", ROOT / "scripts" / "predict.sh", tmp_path / "m", picture),
        *("--save_dir", tmp_path / "p"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "overlay" / "000001.png").is_file()


def test_one_seed_gives_one_start(config_file):
    weights = []
    for seed in (5, 5, 6):
        job = open_job(config_file())
        paddle.seed(seed)
        weights.append(arrays_of(job.builder.model)["linear_pred.weight"])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
