"""What several tests share: a small data set and a small job on it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppvision.data.convert.digit_scenes import load_digits, write_digit_scenes
from ppvision.data.writing import write_picture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def openvino_here(request, monkeypatch):
    """Exports compare OpenVINO in the test's own process: to start another takes seconds each
    time. Tests of that process are marked `openvino_process`."""
    if request.node.get_closest_marker("openvino_process"):
        return
    for name in ("ppvision.deploy.verify.comparison", "ppvision.deploy.write.detection_export"):
        if name in sys.modules:  # not loaded for tests without exports
            monkeypatch.setattr(sys.modules[name], "run_in_openvino", _run_in_openvino)


def _run_in_openvino(folders, inputs):
    from ppvision.deploy.verify.running import run_graphs

    return run_graphs(folders, "paddle", inputs, "openvino")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Digit-scenes of 56 x 56: 12 for training, 4 for validation."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_digit_scenes(folder, count=12, val_count=4, size=56, seed=3)
    return folder


def small_config(scenes: Path) -> dict:
    """pale_nano under a small SegFormer head; no weights, no random augmentation."""
    normalize = {"type": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    dataset = {"type": "Dataset", "dataset_root": str(scenes), "num_classes": 11}
    return {
        "task": "segmentation",
        "batch_size": 4,
        "iters": 6,
        "train_dataset": {
            **dataset,
            "mode": "train",
            "train_path": str(scenes / "train.txt"),
            "transforms": [{"type": "RandomDistort"}, normalize],
        },
        "val_dataset": {
            **dataset,
            "mode": "val",
            "val_path": str(scenes / "val.txt"),
            "transforms": [normalize],
        },
        "model": {
            "type": "SegFormer",
            "num_classes": 11,
            "embedding_dim": 16,
            "backbone": {"type": "pale_nano", "drop_path_rate": 0.1},
        },
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.001, "power": 1.0},
        "loss": {"types": [{"type": "CrossEntropyLoss"}], "coef": [1]},
    }


@pytest.fixture
def config_file(tmp_path, scenes):
    """Write a config: `config_file(change)`, where `change` edits the dictionary in place."""

    def write(change=lambda config: None) -> Path:
        config = small_config(scenes)
        change(config)
        path = tmp_path / "job.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def crops(tmp_path_factory) -> Path:
    """Class folders of digits 0 to 2: 12 pictures each for training, 7 for validation, 28 x 28."""
    folder = tmp_path_factory.mktemp("data") / "crops"
    for split, count in (("train", 12), ("val", 7)):
        tiles, classes = load_digits(split)
        for digit in range(3):
            target = folder / split / f"digit {digit}"
            target.mkdir(parents=True)
            for number, tile in enumerate(tiles[classes == digit][:count]):
                write_picture(target / f"{number}.png", np.repeat(tile[..., None], 3, axis=2))
    return folder


def classification_config(crops: Path) -> dict:
    """pale_nano on 3 digits, with every kind of augmentation."""
    last = [{"type": "Resize", "target_size": [24, 24]}, {"type": "Normalize"}]
    return {
        "task": "classification",
        "batch_size": 6,
        "iters": 6,
        "model": {"type": "pale_nano", "num_classes": 3, "pale_size": 3},
        "train_dataset": {
            "root": str(crops / "train"),
            "transforms": [
                {"type": "RandomCrop", "size": 28, "padding": 2},
                {"type": "RandAugment"},
                *last,
                {"type": "RandomErasing", "prob": 0.5},
            ],
        },
        "val_dataset": {"root": str(crops / "val"), "transforms": last},
        "loss": {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        "optimizer": {"type": "AdamW", "weight_decay": 0.05, "layer_decay": 0.9},
        "lr_scheduler": {"learning_rate": 1e-3},
    }


@pytest.fixture
def classification_file(tmp_path, crops):
    """`config_file` for classification."""

    def write(change=lambda config: None) -> Path:
        config = classification_config(crops)
        change(config)
        path = tmp_path / "classes.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    return write
