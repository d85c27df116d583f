"""Classification: its data, its verbs, its resume and its two processes."""

import json
import math

import cv2
import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppvision.cli import run
from ppvision.data.class_folders import ClassFolders
from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.errors import DataError
from ppvision.tasks import open_job
from ppvision.tasks.classification.config import TRAIN_TRANSFORMS, build_transform
from ppvision.tasks.config import ConfigError
from ppvision.tasks.multibit.job import MultiBitJob
from ppvision.tasks.training import count_steps, run_training, train_options
from ppvision.zoo import create_model
from tests.helpers.configs import ROOT, classification_config
from tests.helpers.messages import raises_naming
from tests.helpers.verbs import records, shell


def ppvision(*arguments) -> int:
    return run([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, crops):
    """A run of 6 steps: `(config, run folder)`."""
    import yaml

    folder = tmp_path_factory.mktemp("trained")
    config = folder / "classes.yml"
    config.write_text(yaml.safe_dump(classification_config(crops)))
    code = ppvision(
        *("train", "-c", config, "--save_dir", folder / "run", "--do_eval", "--use_vdl"),
        *("--log_iters", 2, "--save_interval", 3, "--use_ema", "--histograms"),
    )
    assert code == 0
    return config, folder / "run"


# -- data -----------------------------------------------------------------------------------------


def test_folders_are_classes_in_sorted_order(crops):
    dataset = ClassFolders(crops / "train")
    assert dataset.classes == ["digit 0", "digit 1", "digit 2"]
    assert len(dataset) == 36
    image, label = dataset[13]
    path, expected = dataset.samples[13]
    assert (label, expected) == (1, 1)
    picture = cv2.imread(str(path))
    np.testing.assert_array_equal(image, picture[:, :, ::-1].transpose(2, 0, 1))
    assert image.dtype == np.float32


def test_a_list_gives_the_same_as_folders(crops, tmp_path):
    folders = ClassFolders(crops / "train")
    lines = [f"{path.relative_to(crops)} {label}" for path, label in folders.samples]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    listed = ClassFolders(crops, list_path=tmp_path / "train.txt")
    assert listed.samples == folders.samples  # names with spaces too
    assert listed.classes == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("zero\none\ntwo\nthree\n")
    named = ClassFolders(crops, list_path=tmp_path / "train.txt")
    assert named.classes == ["zero", "one", "two", "three"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("train/digit 0/0.png\n", "list.txt:1: `image class-number`"),
        ("a.png 1\nb.png -1\n", "list.txt:2:"),
        ("a.png one\n", "list.txt:1: 'a.png one'"),
        ("\n", "list.txt none"),
        ("a.png 7\n", "list.txt: classes.txt 2, 7"),
    ],
)
def test_lists_that_are_wrong(crops, tmp_path, text, tokens):
    (tmp_path / "list.txt").write_text(text)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with raises_naming(DataError, *tokens.split()):
        ClassFolders(crops, list_path=tmp_path / "list.txt")


def test_folders_that_are_wrong(crops, tmp_path):
    with pytest.raises(DataError, match="absent"):
        ClassFolders(tmp_path / "absent")
    with pytest.raises(DataError, match="above"):
        ClassFolders(crops / "train" / "digit 0")
    with raises_naming(DataError, "2", "3"):
        ClassFolders(crops / "train", num_classes=2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with raises_naming(DataError, "1", "2", "b"):
        ClassFolders(tmp_path)


def test_pictures_are_checked_before_the_first_step(crops, tmp_path, classification_file, capsys):
    import shutil

    shutil.copytree(crops / "train", tmp_path / "train")
    broken = tmp_path / "train" / "digit 1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = classification_file(lambda c: c["train_dataset"].update(root=str(tmp_path / "train")))
    assert ppvision("train", "-c", config, "--save_dir", tmp_path / "run") == 1
    assert str(broken) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_classes_for_validation_are_refused(crops, tmp_path, classification_file):
    import shutil

    shutil.copytree(crops / "val", tmp_path / "val")
    (tmp_path / "val" / "digit 1").rename(tmp_path / "val" / "digit 7")
    config = classification_file(lambda c: c["val_dataset"].update(root=str(tmp_path / "val")))
    with raises_naming(ConfigError, "1,", "7"):
        open_job(config).check_data("train_dataset", "val_dataset")


# -- the verbs ------------------------------------------------------------------------------------


def test_what_a_run_leaves(trained):
    _, folder = trained
    rows = read_metrics(folder / "metrics.csv")
    assert [step for step, tag, _ in rows if tag == "Train/loss"] == [2, 4, 6]
    assert {tag for _, tag, _ in rows} >= {
        *("Evaluate/top1", "Evaluate/top5", "Evaluate/loss", "Evaluate/Ema_top1"),
        *("Train/grad_norm", "Train/lr"),
    }
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_3", "step_6"]
    kinds = {}
    for value in records(folder):
        kinds.setdefault(value.WhichOneof("one_value"), set()).add((value.id, value.tag))
    assert {(3, "Evaluate/samples"), (6, "Evaluate/samples")} == kinds["image"]
    assert {tag for _, tag in kinds["text"]} == {"config", "environment"}
    assert (6, "Weights/head.weight") in kinds["histogram"]
    assert len(kinds["hparam"]) == 1


def test_the_score_is_that_of_a_loop_over_the_pictures(trained, crops, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    assert ppvision("eval", "-c", config, "--model_path", weights) == 0
    out = capsys.readouterr().out
    job = open_job(config)
    model = job.load(weights)
    model.eval()
    hits, losses = 0, []
    for digit in range(3):
        for path in sorted((crops / "val" / f"digit {digit}").iterdir()):
            picture = cv2.resize(cv2.imread(str(path))[:, :, ::-1].astype(np.float32), (24, 24))
            x = ((picture / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
            logits = model(paddle.to_tensor(x, "float32")).numpy()[0].astype(np.float64)
            hits += int(logits.argmax() == digit)
            losses.append(
                np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[digit]
            )
    assert f"top1 {hits / 21:.4f}" in out
    assert f"top5 1.0000  loss {np.mean(losses):.4f}" in out
    assert "digit 2" in out
    best = max(v for _, tag, v in read_metrics(folder / "metrics.csv") if tag.endswith("top1"))
    assert best == pytest.approx(hits / 21)


@pytest.fixture(scope="module")
def exports(trained):
    """Of the best model, by the operator that ends the graph."""
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    export = ("export", "-c", config, "--model_path", weights, "--save_dir")
    made = {op: folder.parent / op for op in ("softmax", "argmax")}
    assert ppvision(*export, made["softmax"], "--output_op", "softmax") == 0
    assert ppvision(*export, made["argmax"]) == 0  # the default
    return made


def test_exported_and_eager_agree(trained, exports, crops, tmp_path, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_path", weights) == 0
    eager = capsys.readouterr().out.splitlines()[-5:]
    assert eager[-1].startswith("top1")
    assert ppvision("eval", "-c", config, "--model_dir", exports["softmax"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == eager
    pictures = crops / "val" / "digit 1"
    assert (
        ppvision(
            *("predict", "-c", config, "--model_path", weights, "--image_path", pictures),
            *("--save_dir", tmp_path / "eager"),
        )
        == 0
    )
    for output_op in ("softmax", "argmax"):
        assert (
            ppvision(
                *("predict", "--model_dir", exports[output_op], "--image_path", pictures),
                *("--save_dir", tmp_path / f"from_{output_op}"),
            )
            == 0
        )
    a, b, c = (
        json.loads((tmp_path / name / "predictions.json").read_text())
        for name in ("eager", "from_softmax", "from_argmax")
    )
    assert len(a) == 7
    assert a.keys() == b.keys() == c.keys()
    for path in a:
        assert a[path]["class"] == b[path]["class"] == c[path]["class"]
        assert a[path]["class"] == f"digit {a[path]['class_id']}"
        assert a[path]["probability"] == pytest.approx(b[path]["probability"], abs=1e-4)
        assert sum(a[path]["top5"].values()) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "eager" / "overlay" / "0.png").is_file()


def test_an_argmax_export_invents_no_scores(trained, exports, capsys):
    config, folder = trained
    capsys.readouterr()
    assert ppvision("eval", "-c", config, "--model_dir", exports["argmax"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "no top5, no loss" in last
    best = max(v for _, tag, v in read_metrics(folder / "metrics.csv") if tag.endswith("top1"))
    assert last.startswith(f"top1 {best:.4f}")


def test_a_validation_folder_that_lacks_a_class_is_refused(trained, crops, tmp_path, capsys):
    """The classes behind it would get other numbers."""
    import shutil

    config, folder = trained
    shutil.copytree(crops / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "digit 1")
    weights = folder / "best_model" / "model.pdparams"
    root = f"val_dataset.root={tmp_path / 'val'}"
    assert ppvision("eval", "-c", config, "--model_path", weights, "--opts", root) == 1
    assert "the model has 3, and" in capsys.readouterr().err


def test_training_pictures_of_different_sizes_stop_the_run(crops, tmp_path, classification_file):
    import shutil

    shutil.copytree(crops / "train", tmp_path / "train")
    for path in (tmp_path / "train" / "digit 0").iterdir():
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (40, 30)))

    def change(config):
        config["train_dataset"] = {"root": str(tmp_path / "train"), "transforms": []}

    job = open_job(classification_file(change))
    with raises_naming(RuntimeError, "28,", "28]", "30,", "40]"):
        run_training(
            job, RunFolder(tmp_path / "run"), train_options(job), do_eval=False, use_vdl=False
        )


def test_flags_of_segmentation_are_refused(trained, capsys):
    config, folder = trained
    weights = folder / "best_model" / "model.pdparams"
    assert ppvision("eval", "-c", config, "--model_path", weights, "--aug_eval") == 1
    assert "--aug_eval: segmentation only" in capsys.readouterr().err


def test_a_run_cut_in_an_epoch_goes_on_to_the_same_end(trained, tmp_path):
    """With mixup, CutMix, RandAugment, erasing and stochastic depth."""
    import shutil

    config, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    arguments = ("--do_eval", "--use_vdl", "--log_iters", 2, "--save_interval", 3, "--use_ema")
    assert (
        ppvision(
            *("train", "-c", config, "--save_dir", tmp_path / "run", "--resume", "auto"),
            *arguments,
            "--histograms",
        )
        == 0
    )
    for name in ("model", "ema", "optimizer"):
        a, b = (
            load_file(f / "checkpoints" / "step_6" / f"{name}.safetensors")
            for f in (folder, tmp_path / "run")
        )
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    timings = ("Train/batch_cost", "Train/reader_cost")
    ours, theirs = (
        [row for row in read_metrics(f / "metrics.csv") if row[1] not in timings]
        for f in (tmp_path / "run", folder)
    )
    assert ours == theirs
    kinds = ("value", "image", "histogram")
    points = [
        sorted((v.id, v.tag) for v in records(f) if v.WhichOneof("one_value") in kinds)
        for f in (tmp_path / "run", folder)
    ]
    assert points[0] == points[1]


def test_pictures_of_different_sizes_are_named(crops, tmp_path, classification_file):
    import shutil

    shutil.copytree(crops / "val", tmp_path / "val")
    path = tmp_path / "val" / "digit 0" / "1.png"
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (40, 30)))

    def change(config):
        config["val_dataset"] = {"root": str(tmp_path / "val"), "transforms": []}

    job = open_job(classification_file(change))
    with raises_naming(ConfigError, "28x28", "40x30"):
        job.evaluate(job.model)


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda c: c.update(epoch=3), "classes.yml: 'epoch'"),
        (lambda c: c.update(epochs=3), "iters epochs, both"),
        (lambda c: c.pop("iters"), "iters both none"),
        (lambda c: c["model"].update(type="pale_nona"), "classes.yml:5): pale_nano"),
        (
            lambda c: c["model"].update(pale_sise=7),
            "model: 'pale_sise' pale_size",
        ),
        (
            lambda c: c["train_dataset"].update(rot="x"),
            "train_dataset: 'rot' root",
        ),
        (lambda c: c["train_dataset"]["transforms"][0].update(type="RandomCrob"), "RandomCrop"),
        (
            lambda c: c["train_dataset"]["transforms"][1].update(magnitud=3),
            "RandAugment 'magnitud'",
        ),
        (lambda c: c["train_dataset"]["transforms"][1].update(magnitude=30), "magnitude 0 10"),
        (
            lambda c: c["val_dataset"]["transforms"].insert(0, {"type": "RandAugment"}),
            "RandAugment val_dataset",
        ),
        (lambda c: c["optimizer"].update(learning_rate=1), "optimizer: 'learning_rate'"),
        (
            lambda c: c["optimizer"].update(beta1="a"),
            "optimizer.beta1: number 'a'",
        ),
        (
            lambda c: c["loss"].update(mixup="lots"),
            "classes.yml: loss.mixup: number 'lots'",
        ),
        (lambda c: c["model"].update(num_classes="3"), "model.num_classes: whole '3'"),
        (lambda c: c["train_dataset"].update(root=5), "train_dataset.root: text, 5"),
        (
            lambda c: c.update(accumulate=0),
            "classes.yml: accumulate: whole 0",
        ),
        (lambda c: c.update(imports=5), "imports: module 5"),
        (lambda c: c["lr_scheduler"].update(warmup_epochs=0.5), "warmup_epochs: whole 0.5"),
        (lambda c: c["optimizer"].update(type="AdamV"), "optimizer.type: Adam AdamW"),
        (lambda c: c["optimizer"].update(momentum=0.9), "AdamW 'momentum'"),
        (
            lambda c: c["train_dataset"]["transforms"].append({"type": "RandAugment"}),
            "transforms.5: RandAugment before Normalize",
        ),
        (
            lambda c: c["train_dataset"]["transforms"].insert(0, {"type": "RandomErasing"}),
            "transforms.0: RandomErasing after Normalize",
        ),
        (lambda c: c["loss"].update(smoothing=0.9), "'smoothing' label_smoothing"),
        (lambda c: c["lr_scheduler"].pop("learning_rate"), "learning_rate"),
        (lambda c: c.update(batch_size=0), "batch_size: whole 0"),
        (lambda c: c.update(loss=3), "loss: keys values, 3"),
    ],
)
def test_what_a_config_cannot_say(classification_file, change, tokens):
    with raises_naming(ConfigError, *tokens.split()):
        open_job(classification_file(change))


def test_values_out_of_range(classification_file):
    for change, token in (
        (lambda c: c["loss"].update(label_smoothing=1.5), "label_smoothing"),
        (lambda c: c["optimizer"].update(layer_decay=2), "layer_decay"),
        (lambda c: c["lr_scheduler"].update(warmup_epochs=9), "warm-up"),
        (lambda c: c["lr_scheduler"].update(end_lr=1), "end_lr"),
    ):
        job = open_job(classification_file(change))
        with pytest.raises(ValueError, match=token):
            _ = job.batched, job.optimizer


# Tiny-ImageNet's classes have names of their own: tests/test_distillation.py.
SHIPPED = sorted(
    path for path in ROOT.glob("configs/classification/*.yml") if "tiny_imagenet" not in path.stem
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path, tmp_path, plain_weights):
    """On a stand-in for its data: one step of training where the model is small."""
    count = 1000 if "imagenet" in path.stem else 10
    for split in ("train", "val"):
        for k in range(count):
            folder = tmp_path / split / f"{k:04d}"
            folder.mkdir(parents=True)
            picture = np.full((40, 36, 3), k % 256, np.uint8)
            if k < 4 or count == 10:
                cv2.imwrite(str(folder / "0.png"), picture[:32, :32] if count == 10 else picture)
            else:
                (folder / "0.png").symlink_to(tmp_path / split / "0000" / "0.png")
    roots = [f"{s}_dataset.root={tmp_path / s}" for s in ("train", "val")]
    job = open_job(path, roots, batch_size=2)
    assert path.read_text().startswith("#")
    groups = job.optimizer._param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, job.content["optimizer"]["weight_decay"]}
    image, target = job.batched([job.train_dataset[0], job.train_dataset[1]])
    size = 224 if "imagenet" in path.stem else 32
    assert image.shape == (2, 3, size, size)
    assert target.sum(1) == pytest.approx(1, abs=1e-5)
    task_job = job.float_job if isinstance(job, MultiBitJob) else job
    assert task_job.val_dataset[0][0].shape == (3, size, size)
    assert np.isfinite(image).all()
    if "imagenet" in path.stem:
        assert "Not run here" in path.read_text()
        return
    (loss,) = job.losses(job.model, [paddle.to_tensor(image), paddle.to_tensor(target)])
    assert math.isfinite(float(loss))


def test_resnet18_on_imagenet_is_quantised_at_4_3_and_2_bits(tmp_path):
    """Its config, a forward pass at each width, and the ends at 8 bits."""
    for split in ("train", "val"):
        for k in range(2):
            folder = tmp_path / split / str(k)
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), np.full((30, 40, 3), k, np.uint8))
    options = [f"{s}_dataset.root={tmp_path / s}" for s in ("train", "val")]
    config = ROOT / "configs/classification/resnet18_once_qat_imagenet.yml"
    job = open_job(config, [*options, "model.num_classes=2"], batch_size=2)
    model = job.model
    assert model.widths == (4, 3, 2)
    x = paddle.randn([1, 3, 64, 64])
    model.eval()
    outputs = []
    for bits in model.widths:
        model.set_bits(bits)
        outputs.append(model(x).numpy())
        assert outputs[-1].shape == (1, 2)
    assert not np.array_equal(outputs[0], outputs[-1])
    widths = {
        path: layer.weight_quanter.bit_length()
        for path, layer in model.model.named_sublayers()
        if getattr(layer, "weight_quanter", None) is not None
    }
    assert {path for path, bits in widths.items() if bits == 8} == {"conv1", "fc"}
    assert set(widths.values()) == {8, 2}
    model.train()
    with model.alone(2):
        (loss,) = job.losses(model, [x, paddle.full([1, 2], 0.5)])
    assert math.isfinite(float(loss))


def test_epochs_and_accumulation_make_steps(crops):
    dataset = ClassFolders(crops / "train")  # 36 pictures
    assert count_steps(3, dataset, {"batch_size": 8}) == 12
    assert count_steps(3, dataset, {"batch_size": 8, "accumulate": 4}) == 3
    assert count_steps(1, dataset, {"batch_size": 36, "accumulate": 4}) == 1


@pytest.mark.parametrize("name", sorted(TRAIN_TRANSFORMS))
def test_training_transforms_repeat_with_the_engines_seeds(name):
    """They draw from `random` and NumPy alone; Paddle's generators are not seeded for a sample."""
    import random

    needed = {
        "Pad": {"padding": 3},
        "RandomCrop": {"size": 20},
        "RandomResizedCrop": {"size": 24},
        "RandomAffine": {"degrees": 20, "translate": [0.2, 0.2], "scale": [0.8, 1.2], "shear": 5},
        "RandomRotation": {"degrees": 20},
        "ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        "Resize": {"target_size": [20, 24]},
        "ResizeByLong": {"long_size": 20},
        "ResizeByShort": {"short_size": 20},
        "Padding": {"target_size": [50, 50]},
        "CenterCrop": {"target_size": [20, 16]},
        "RandomErasing": {"prob": 1.0},
    }
    transform = build_transform({"type": name, **needed.get(name, {})})
    picture = np.random.default_rng(0).integers(0, 256, (32, 30, 3)).astype(np.uint8)
    if name == "RandomErasing":
        picture = picture.astype(np.float32)
    results = []
    for _ in range(2):
        paddle.seed(len(results))  # must not matter
        random.seed(3)
        np.random.seed(3)
        results.append([transform(picture.copy()) for _ in range(6)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    if name.startswith("Rand") or name == "ColorJitter":
        first = results[0][0]
        assert any(r.shape != first.shape or (r != first).any() for r in results[0])


# -- two processes --------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_doubled_batch(classification_file, tmp_path):
    """BatchNorm's statistics fixed, no stochastic depth, no mixup, SGD with momentum: equal to
    1e-5. 21 validation pictures on 2 ranks: the scores are those of all."""

    def change(config):
        config["imports"].append("tests.helpers.report_weights")
        config["model"]["drop_path_rate"] = 0.0
        config["loss"] = {"label_smoothing": 0.1}
        config["optimizer"] = {"type": "Momentum", "momentum": 0.9, "weight_decay": 1e-4}
        config["lr_scheduler"] = {"learning_rate": 0.02}
        config["iters"] = 5

    config = classification_file(change)
    for name, processes, batch in (("two", 2, 3), ("one", 1, 6)):
        done = shell(
            *("bash", ROOT / "scripts" / "train.sh", config, "--save_dir", tmp_path / name),
            *("--batch_size", batch, "--log_iters", 1),
            NPROC=processes,
            LOG_DIR=tmp_path / "logs",
            PYTHONPATH=ROOT,
            PPVISION_REPORT=tmp_path / f"report_{name}",
            PPVISION_FREEZE=1,
        )
        logs = "\n".join(p.read_text() for p in (tmp_path / "logs").glob("workerlog.*"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
    first, second = (np.load(tmp_path / f"report_two.{rank}.npz") for rank in (0, 1))
    whole = np.load(tmp_path / "report_one.0.npz")
    fresh = create_model("two_blocks", num_classes=3)
    for name, parameter in fresh.named_parameters():
        if parameter.stop_gradient:
            continue
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], whole[name], atol=1e-5, rtol=0)
    rows = {name: read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")}
    compared = ("Train/loss", "Evaluate/top1", "Evaluate/top5", "Evaluate/loss", "Train/grad_norm")
    for tag in compared:
        a, b = ([v for _, t, v in rows[name] if t == tag] for name in ("one", "two"))
        assert len(a) == (5 if tag.startswith("Train") else 1)
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=tag)
    losses = [v for _, t, v in rows["one"] if t == "Train/loss"]
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.all  # by default: one process, and two ranks that are stopped
def test_a_loss_that_is_not_finite_on_rank_1_stops_both_with_a_checkpoint(
    classification_file, tmp_path
):
    config = classification_file(lambda c: c["imports"].append("tests.helpers.poisoned_rank"))
    done = shell(
        *("bash", ROOT / "scripts" / "train.sh", config, "--save_dir", tmp_path / "run"),
        *("--batch_size", 3, "--log_iters", 2),
        NPROC=2,
        LOG_DIR=tmp_path / "logs",
        PYTHONPATH=ROOT,
    )
    assert done.returncode != 0
    logs = [(tmp_path / "logs" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    for log in logs:
        assert "loss: expected a finite number, got nan at step 3" in log, log
        assert log.count(".png") == 3  # rank 1's batch, on both
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_2"]


def test_a_model_without_its_data_set(classification_file, crops, tmp_path, capsys):
    """Packing, predicting and exporting need no picture of the set."""

    def moved(config: dict) -> None:
        for part in ("train_dataset", "val_dataset"):
            config[part]["root"] = str(tmp_path / "gone")
        config["slim_config"] = {"bits": [8, 2]}

    config = classification_file(moved)
    job = open_job(config)
    assert list(job.example.shape) == [1, 3, 24, 24]
    weights, layers = tmp_path / "float.pdparams", tmp_path / "layers"
    paddle.save(job.float_model.state_dict(), str(weights))
    common = ("-c", config, "--model_path")
    assert ppvision("pack", *common, weights, "--output", layers, "--ptq") == 0
    out = tmp_path / "predicted"
    pictures = ("--image_path", crops / "val" / "digit 0", "--save_dir", out)
    assert ppvision("predict", *common, layers, *pictures) == 0
    assert len(json.loads((out / "predictions.json").read_text())) == 7
    assert "numbers are used instead" in capsys.readouterr().err
    assert ppvision("eval", *common, layers) == 1
    assert "expected a folder of images" in capsys.readouterr().err
