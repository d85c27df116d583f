"""Configs of small jobs, and where the repository is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def small_config(scenes: Path) -> dict:
    """A small Pale under a small SegFormer head; no weights, no random augmentation."""
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
            "backbone": {"type": "two_blocks", "drop_path_rate": 0.1},
        },
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.001, "power": 1.0},
        "loss": {"types": [{"type": "CrossEntropyLoss"}], "coef": [1]},
        "imports": ["tests.helpers.two_blocks"],
    }


def classification_config(crops: Path) -> dict:
    """A small Pale on 3 digits, with every kind of augmentation."""
    last = [{"type": "Resize", "target_size": [24, 24]}, {"type": "Normalize"}]
    return {
        "task": "classification",
        "batch_size": 6,
        "iters": 6,
        "model": {"type": "two_blocks", "num_classes": 3, "pale_size": 3},
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
        "imports": ["tests.helpers.two_blocks"],
    }
