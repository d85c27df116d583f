"""What several tests share: a small data set and a small job on it."""

from pathlib import Path

import pytest
import yaml

from ppvision.data.digit_scenes import write_digit_scenes

ROOT = Path(__file__).resolve().parents[1]


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
