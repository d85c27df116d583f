"""Small detectors of every architecture, on digit-scenes."""

from pathlib import Path

import pytest
import yaml

from tests.helpers.configs import ROOT
from tests.helpers.verbs import ppvision

SIDE = 64  # pixels

# What PaddleDetection, pycocotools and Paddle's tracing call: a test module's `pytestmark`.
WARNINGS = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:Skip loading for"),
    pytest.mark.filterwarnings("ignore:The detector finds nothing"),
]

BASES = ROOT / "configs" / "detection" / "_base_"

# Base file, numbers of the feature maps, and what makes it small.
ARCHITECTURES = {
    "FasterRCNN": ("faster_rcnn_fpn", [0, 1, 2, 3], {"TwoFCHead": {"out_channel": 32}}),
    "MaskRCNN": (
        "mask_rcnn_fpn",
        [0, 1, 2, 3],
        {"TwoFCHead": {"out_channel": 32}, "MaskFeat": {"out_channel": 16}},
    ),
    "CascadeRCNN": ("cascade_rcnn_fpn", [0, 1, 2, 3], {"CascadeTwoFCHead": {"out_channel": 32}}),
    "RetinaNet": ("retinanet_fpn", [1, 2, 3], {"RetinaHead": {"conv_feat": {"num_convs": 1}}}),
    "FCOS": ("fcos_fpn", [1, 2, 3], {"FCOSHead": {"fcos_feat": {"num_convs": 1}}}),
    "YOLOv3": (
        "ppyoloe_pan",
        [1, 2, 3],
        {
            "width_mult": 0.125,
            # As many candidates as the coarsest map has points.
            "PPYOLOEHead": {
                "static_assigner": {"name": "ATSSAssigner", "topk": 4},
                "static_assigner_epoch": 1,  # the other assigner follows
            },
        },
    ),
}
_TARGETS = {
    "YOLOv3": {"PadGT": {}},
    "FCOS": {
        "Gt2FCOSTarget": {
            "object_sizes_boundary": [16, 32, 64, 128],
            "center_sampling_radius": 1.5,
            "downsample_ratios": [8, 16, 32, 64, 128],
            "norm_reg_targets": True,
        }
    },
}


def small_detector(scenes: Path, architecture: str, *, sdn: bool = False) -> dict:
    """A config of a small Pale under one of `ARCHITECTURES`, tags as `{"!NAME": {...}}`."""
    base, levels, small = ARCHITECTURES[architecture]
    half = [0.5, 0.5, 0.5]
    read = [
        {"Decode": {}},
        {"Resize": {"target_size": [SIDE, SIDE], "keep_ratio": False}},
        {"NormalizeImage": {"mean": half, "std": half}},
        {"Permute": {}},
    ]
    fields = ["image", "gt_bbox", "gt_class", "is_crowd"]
    fields += ["gt_poly"] if architecture == "MaskRCNN" else []

    def dataset(split: str, **options: object) -> dict:
        return {
            "dataset_dir": str(scenes),
            "image_dir": "images",
            "anno_path": f"annotations/instances_{split}.json",
            **options,
        }

    config = {
        "task": "detection",
        "imports": ["tests.helpers.two_blocks"],
        "_BASE_": [str(BASES / f"{base}.yml")],
        "num_classes": 10,
        "metric": "COCO",
        "epoch": 2,
        architecture: {"backbone": "SemanticDiffusionBackbone" if sdn else "two_blocks"},
        "two_blocks": {"return_idx": levels},
        **small,
        "TrainDataset": {"!COCODataSet": dataset("train", data_fields=fields)},
        "EvalDataset": {"!COCODataSet": dataset("val")},
        "TrainReader": {
            "sample_transforms": [read[0], {"RandomFlip": {"prob": 0.5}}, *read[1:]],
            "batch_transforms": [_TARGETS.get(architecture, {"PadBatch": {"pad_to_stride": 32}})],
            "batch_size": 4,
            "shuffle": True,
            "drop_last": True,
            "collate_batch": architecture in _TARGETS,
        },
        "EvalReader": {"sample_transforms": read, "batch_size": 2},
        "TestReader": {"sample_transforms": read},
        "LearningRate": {
            "base_lr": 0.002,
            "schedulers": [
                {"!PiecewiseDecay": {"gamma": 0.1, "milestones": [8]}},
                {"!LinearWarmup": {"start_factor": 0.5, "steps": 2}},
            ],
        },
        "OptimizerBuilder": {"optimizer": {"type": "AdamW", "weight_decay": 0.01}},
    }
    if architecture.endswith("RCNN"):
        config["FPN"] = {"out_channel": 32}
    if sdn:
        config["SemanticDiffusionBackbone"] = {"backbone": "two_blocks", "similarity": "gaussian"}
    return config


class _Dumper(yaml.SafeDumper):
    """YAML without anchors; `{"!NAME": {...}}` becomes a tag."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _mapping(dumper: _Dumper, node: dict) -> yaml.Node:
    if len(node) == 1 and next(iter(node)).startswith("!"):
        ((tag, options),) = node.items()
        return dumper.represent_mapping(tag, options)
    return dumper.represent_dict(node)


_Dumper.add_representer(dict, _mapping)


def write_detector(path: Path, config: dict) -> Path:
    """Write a config with its tags."""
    path.write_text(yaml.dump(config, Dumper=_Dumper, sort_keys=False))
    return path


def train(config: Path, run: Path, *options: object) -> int:
    return ppvision(
        *("train", "-c", config, "--save_dir", run, "--eval", "--log_iters", 1, *options)
    )


def best(run: Path) -> Path:
    return run / "best_model" / "model.pdparams"
