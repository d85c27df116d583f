"""Write an export for PaddleX 3: its file names, and the file `inference.yml` that it reads.

PaddleX uses `Global.model_name`, one of the names that it knows. The name decides which of its
readers opens the folder, the inputs of the graph, and whether oneDNN runs it. It does not describe
the network. This module follows PaddleX 3.7.2 (`paddlex/modules/*/model_list.py`,
`paddlex/inference/models/*/predictor.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppvision.deploy.run.engines import read_declared_inputs
from ppvision.deploy.run.manifest import FILES, PADDLEX_FILES, ModelFiles
from ppvision.deploy.write.clients import make_deploy_entry, make_infer_config
from ppvision.errors import InputError, shorten, suggest_nearest
from ppvision.safe_yaml import format_short_yaml

CONFIG = "inference.yml"

# Names of models, by module of PaddleX.
_SEGMENTATION = """
Deeplabv3-R101 Deeplabv3-R50 Deeplabv3_Plus-R101 Deeplabv3_Plus-R50 MaskFormer_small MaskFormer_tiny
OCRNet_HRNet-W18 OCRNet_HRNet-W48 PP-LiteSeg-B PP-LiteSeg-T SeaFormer_base SeaFormer_large
SeaFormer_small SeaFormer_tiny SegFormer-B0 SegFormer-B1 SegFormer-B2 SegFormer-B3 SegFormer-B4
SegFormer-B5
"""
_CLASSIFICATION = """
CLIP_vit_base_patch16_224 CLIP_vit_large_patch14_224 ConvNeXt_base_224 ConvNeXt_base_384
ConvNeXt_large_224 ConvNeXt_large_384 ConvNeXt_small ConvNeXt_tiny FasterNet-L FasterNet-M
FasterNet-S FasterNet-T0 FasterNet-T1 FasterNet-T2 MobileNetV1_x0_25 MobileNetV1_x0_5
MobileNetV1_x0_75 MobileNetV1_x1_0 MobileNetV2_x0_25 MobileNetV2_x0_5 MobileNetV2_x1_0
MobileNetV2_x1_5 MobileNetV2_x2_0 MobileNetV3_large_x0_35 MobileNetV3_large_x0_5
MobileNetV3_large_x0_75 MobileNetV3_large_x1_0 MobileNetV3_large_x1_25 MobileNetV3_small_x0_35
MobileNetV3_small_x0_5 MobileNetV3_small_x0_75 MobileNetV3_small_x1_0 MobileNetV3_small_x1_25
MobileNetV4_conv_large MobileNetV4_conv_medium MobileNetV4_conv_small MobileNetV4_hybrid_large
MobileNetV4_hybrid_medium PP-HGNetV2-B0 PP-HGNetV2-B1 PP-HGNetV2-B2 PP-HGNetV2-B3 PP-HGNetV2-B4
PP-HGNetV2-B5 PP-HGNetV2-B6 PP-HGNet_base PP-HGNet_small PP-HGNet_tiny PP-LCNetV2_base
PP-LCNetV2_large PP-LCNetV2_small PP-LCNet_x0_25 PP-LCNet_x0_25_textline_ori PP-LCNet_x0_35
PP-LCNet_x0_5 PP-LCNet_x0_75 PP-LCNet_x1_0 PP-LCNet_x1_0_doc_ori PP-LCNet_x1_0_table_cls
PP-LCNet_x1_0_textline_ori PP-LCNet_x1_5 PP-LCNet_x2_0 PP-LCNet_x2_5 ResNet101 ResNet101_vd
ResNet152 ResNet152_vd ResNet18 ResNet18_vd ResNet200_vd ResNet34 ResNet34_vd ResNet50 ResNet50_vd
StarNet-S1 StarNet-S2 StarNet-S3 StarNet-S4 SwinTransformer_base_patch4_window12_384
SwinTransformer_base_patch4_window7_224 SwinTransformer_large_patch4_window12_384
SwinTransformer_large_patch4_window7_224 SwinTransformer_small_patch4_window7_224
SwinTransformer_tiny_patch4_window7_224
"""
_BOXES = """
BlazeFace BlazeFace-FPN-SSH Cascade-FasterRCNN-ResNet50-FPN
Cascade-FasterRCNN-ResNet50-vd-SSLDv2-FPN CenterNet-DLA-34 CenterNet-ResNet50
Co-DINO-R50 Co-DINO-Swin-L Co-Deformable-DETR-R50 Co-Deformable-DETR-Swin-T DETR-R50 FCOS-ResNet50
FasterRCNN-ResNeXt101-vd-FPN FasterRCNN-ResNet101 FasterRCNN-ResNet101-FPN FasterRCNN-ResNet34-FPN
FasterRCNN-ResNet50 FasterRCNN-ResNet50-FPN FasterRCNN-ResNet50-vd-FPN
FasterRCNN-ResNet50-vd-SSLDv2-FPN FasterRCNN-Swin-Tiny-FPN PP-ShiTuV2_det PP-YOLOE-L_human
PP-YOLOE-L_vehicle PP-YOLOE-S_human PP-YOLOE-S_vehicle PP-YOLOE_plus-L PP-YOLOE_plus-M
PP-YOLOE_plus-S PP-YOLOE_plus-S_face PP-YOLOE_plus-X PP-YOLOE_plus_SOD-L PP-YOLOE_plus_SOD-S
PP-YOLOE_plus_SOD-largesize-L PicoDet-L PicoDet-M PicoDet-S PicoDet-XS PicoDet_LCNet_x2_5_face
RT-DETR-H RT-DETR-L RT-DETR-R18 RT-DETR-R50 RT-DETR-X YOLOX-L YOLOX-M YOLOX-N YOLOX-S YOLOX-T
YOLOX-X YOLOv3-DarkNet53 YOLOv3-MobileNetV3 YOLOv3-ResNet50_vd_DCN
"""  # without models for pages, whose boxes are filtered further, and for rotated boxes
_MASKS = """
Cascade-MaskRCNN-ResNet50-FPN Cascade-MaskRCNN-ResNet50-vd-SSLDv2-FPN Mask-RT-DETR-H
Mask-RT-DETR-L Mask-RT-DETR-M Mask-RT-DETR-S Mask-RT-DETR-X MaskRCNN-ResNeXt101-vd-FPN
MaskRCNN-ResNet101-FPN MaskRCNN-ResNet101-vd-FPN MaskRCNN-ResNet50 MaskRCNN-ResNet50-FPN
MaskRCNN-ResNet50-vd-FPN MaskRCNN-ResNet50-vd-SSLDv2-FPN
"""
NAMES = {
    "segmentation": _SEGMENTATION.split(),
    "classification": _CLASSIFICATION.split(),
    "detection": _BOXES.split(),
    "masks": _MASKS.split(),
}

# Parts of names of detectors to which PaddleX also gives `im_shape` (`build_to_batch`).
_WITH_SHAPE = ("DETR", "DINO", "RCNN", "YOLOv3", "CenterNet", "BlazeFace")

# The name for an architecture. The first name of a task is for all other architectures.
_DEFAULTS = {
    "segmentation": {
        "SegFormer": "SegFormer-B0",
        "DeepLabV3": "Deeplabv3-R50",
        "DeepLabV3P": "Deeplabv3_Plus-R50",
        "OCRNet": "OCRNet_HRNet-W18",
        "PPLiteSeg": "PP-LiteSeg-T",
    },
    "classification": {
        "resnet18": "ResNet18",
        "resnet34": "ResNet34",
        "resnet50": "ResNet50",
        "resnet101": "ResNet101",
        "resnet152": "ResNet152",
    },
    "detection": {
        "PPYOLOE": "PP-YOLOE_plus-S",
        "FCOS": "FCOS-ResNet50",
        "RetinaNet": "FCOS-ResNet50",  # PaddleX has no RetinaNet; it reads both in the same way
        "FasterRCNN": "FasterRCNN-ResNet50",
        "CascadeRCNN": "Cascade-FasterRCNN-ResNet50-FPN",
    },
    "masks": {
        "MaskRCNN": "MaskRCNN-ResNet50",
        "CascadeRCNN": "Cascade-MaskRCNN-ResNet50-FPN",
    },
}


def choose_default_name(kind: str, architecture: str) -> str:
    """Return the name under which PaddleX reads an architecture.

    Args:
        kind: segmentation, classification, detection, or masks for detectors with masks.
        architecture: name in PaddleSeg or PaddleDetection, or a model of the zoo.
    """
    names = _DEFAULTS[kind]
    return names.get(architecture, next(iter(names.values())))


def check_name(name: object, kind: str) -> str:
    """Check the name and return it.

    Raises:
        InputError: PaddleX does not know the name for such a model.
    """
    if name not in NAMES[kind]:
        raise InputError(
            f"paddlex_name: expected a name that PaddleX 3.7 knows for {kind}, got "
            f"{shorten(name)}. {suggest_nearest(str(name), NAMES[kind])}"
        )
    return str(name)


def check_format(format: str, max_value: int | None) -> None:
    """Raise `InputError` for arguments of an export that do not fit `paddlex_name`."""
    if format != "paddle":
        raise InputError(f"paddlex_name: expected format 'paddle' with it, got {shorten(format)}.")
    if max_value is not None:
        # PaddleX reads with `cv2.imread`, which reduces 16 bits to the upper 8.
        raise InputError(
            f"max_value: expected none with paddlex_name, since PaddleX reads 8 bits a channel; "
            f"got {max_value}. Export without --for paddlex."
        )


def check_inputs(name: str, program: Path) -> None:
    """Raise `InputError` unless a detector's graph has the inputs that PaddleX gives it."""
    wanted = {"image", "scale_factor"}
    wanted |= {"im_shape"} if any(part in name for part in _WITH_SHAPE) else set()
    taken = set(read_declared_inputs(program))
    if taken != wanted:
        other = "FasterRCNN-ResNet50" if "im_shape" in taken else "PP-YOLOE_plus-S"
        raise InputError(
            f"paddlex_name: under the name {name} PaddleX gives {', '.join(sorted(wanted))}; this "
            f"detector takes {', '.join(sorted(taken))}. Take a name that fits, such as {other}."
        )


# -- inference.yml ---------------------------------------------------------------------------------


def _refuse(what: str, task: str, instead: str) -> InputError:
    return InputError(
        f"transforms: {what} cannot be done by PaddleX for {task}; {instead} Change the config's "
        "validation transforms, or export without --for paddlex."
    )


# 1 / (255 * std) = 1: PaddleX always normalises images of these tasks; these values have no effect.
_NO_NORMALIZE = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255] * 3}


def _normalize(transform: Mapping[str, Any]) -> dict[str, list[float]]:
    half = [0.5, 0.5, 0.5]  # PaddleSeg's default
    given = {key: list(transform.get(key, half)) for key in ("mean", "std")}
    return {key: [float(n) for n in (3 * v if len(v) == 1 else v)] for key, v in given.items()}


_INTERPOLATIONS = {"CUBIC": "BICUBIC"}  # interpolations with another name in PaddleX than in OpenCV


def _interpolation(transform: Mapping[str, Any]) -> str:
    name = transform.get("interp", "LINEAR")
    return _INTERPOLATIONS.get(name, name)


def _in_order(transforms: Sequence[Mapping[str, Any]], known: Sequence[str], task: str) -> None:
    """Raise `InputError` unless all transforms are in `known`, in this order, at most once each."""
    kinds = [transform["type"] for transform in transforms]
    for kind in kinds:
        if not any(kind in group.split() for group in known):
            names = ", ".join(name for group in known for name in group.split())
            raise _refuse(kind, task, f"known are {names}.")
    places = [next(i for i, group in enumerate(known) if kind in group.split()) for kind in kinds]
    if places != sorted(set(places)):
        order = ", then ".join(" or ".join(group.split()) for group in known)
        raise _refuse(f"the order {', '.join(kinds)}", task, f"expected {order}, once each.")


def segmentation_transforms(transforms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert PaddleSeg's transforms to those of PaddleX's segmentation.

    Raises:
        InputError: PaddleX does not have a transform, or has another order.
    """
    _in_order(transforms, ("Resize", "Normalize"), "segmentation")
    steps, norm = [], _NO_NORMALIZE
    for transform in transforms:
        if transform["type"] == "Normalize":
            norm = _normalize(transform)
            continue
        # All values are written, because PaddleX's defaults differ from PaddleSeg's.
        steps.append(
            {
                "type": "Resize",
                "target_size": list(transform.get("target_size", (512, 512))),
                "keep_ratio": transform.get("keep_ratio", False),
                "size_divisor": transform.get("size_divisor"),
                "interp": _interpolation(transform),
            }
        )
    return [*steps, {"type": "Normalize", **norm}]


def classification_transforms(
    transforms: Sequence[Mapping[str, Any]], input_shape: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Convert PaddleSeg's transforms to those of PaddleX's classification, which always resizes.

    Raises:
        InputError: PaddleX does not have a transform, or has another order; or there is no resize
            and the height or width is free.
    """
    _in_order(transforms, ("Resize ResizeByShort", "CenterCrop", "Normalize"), "classification")
    by_type = {transform["type"]: transform for transform in transforms}
    steps = []
    if (by_short := by_type.get("ResizeByShort")) is not None:
        if by_short.get("max_size", 1e10) < 1e10:
            raise _refuse("ResizeByShort's max_size", "classification", "expected none.")
        steps.append({"ResizeImage": {"resize_short": by_short["short_size"]}})
    else:
        steps.append({"ResizeImage": _whole_resize(by_type.get("Resize"), input_shape)})
    if (crop := by_type.get("CenterCrop")) is not None:
        steps.append({"CropImage": {"size": list(crop["target_size"])}})
    norm = by_type.get("Normalize")
    norm = _NO_NORMALIZE if norm is None else _normalize(norm)
    return [*steps, {"NormalizeImage": norm}, {"ToCHWImage": None}]


def _whole_resize(
    resize: Mapping[str, Any] | None, input_shape: Sequence[int | None]
) -> dict[str, Any]:
    task = "classification"
    if resize is None:
        if None in input_shape[2:]:
            raise _refuse("no resize", task, "expected Resize or ResizeByShort.")
        return {"size": [input_shape[3], input_shape[2]]}
    for key in ("keep_ratio", "size_divisor"):
        if resize.get(key):
            raise _refuse(f"Resize's {key}", task, "expected none.")
    return {
        "size": list(resize.get("target_size", (512, 512))),
        "interpolation": _interpolation(resize),
    }


def _detection_steps(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert `Preprocess` of `infer_cfg.yml` for PaddleX: there `norm_type` none still subtracts
    the mean and divides by the deviation."""
    found = []
    for step in steps:
        if step["type"] == "NormalizeImage" and step["norm_type"] == "none":
            step = {**step, "norm_type": "mean_std", "mean": [0.0] * 3, "std": [1.0] * 3}
        found.append(dict(step))
    return found


def _classification_config(
    name: str,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    labels: Sequence[str],
) -> dict[str, Any]:
    return {
        "Global": {"model_name": name},
        "PreProcess": {"transform_ops": classification_transforms(transforms, input_shape)},
        "PostProcess": {"Topk": {"topk": 5, "label_list": list(labels)}},
    }


def _segmentation_config(
    name: str,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    labels: Sequence[str],
) -> dict[str, Any]:
    files, steps = PADDLEX_FILES, segmentation_transforms(transforms)
    entry = make_deploy_entry(files.program, str(files.weights), steps, input_shape, "argmax")
    return {"Global": {"model_name": name}, "Deploy": entry}


_CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {
    "segmentation": _segmentation_config,
    "classification": _classification_config,
}
# The final operator of the graph.
OUTPUT_OPS = {"segmentation": "argmax", "classification": "softmax"}


def make_paddlex_config(
    task: str,
    name: object,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Return `inference.yml` for a segmentation model or a classifier.

    Args:
        task: segmentation or classification.
        name: the model's name in PaddleX.
        transforms: of `deploy.yaml`, which are PaddleSeg's.
        input_shape: of the graph, `[B, C, H, W]`.
        labels: names of the classes.

    Raises:
        InputError: the task is another one, or PaddleX does not know the name or a transform.
    """
    if task not in _CONFIGS:
        raise InputError(f"paddlex_name: PaddleX has no task like {task}; expected none.")
    return _CONFIGS[task](check_name(name, task), transforms, input_shape, labels)


def make_paddlex_detector_config(
    name: object,
    architecture: str,
    metric: str,
    transforms: Sequence[Mapping[str, Any]],
    input_shape: Sequence[int | None],
    labels: Sequence[str],
    masks: bool,
) -> dict[str, Any]:
    """Return `inference.yml` for a detector; arguments as in `make_infer_config`.

    Raises:
        InputError: PaddleX does not know the name for a detector with, or without, masks.
    """
    checked = check_name(name, "masks" if masks else "detection")
    content = make_infer_config(architecture, metric, transforms, input_shape, labels, masks)
    content["Preprocess"] = _detection_steps(content["Preprocess"])
    return {"Global": {"model_name": checked}, **content}


# -- files -----------------------------------------------------------------------------------------


def name_for_paddlex(content: Mapping[str, object], folder: Path) -> ModelFiles:
    """Give an export's files PaddleX's names, write `inference.yml` next to them, and return the
    names."""
    ours = FILES["paddle"]
    for old in (ours.program, str(ours.weights), ours.earlier_program, ours.raw_program):
        path = folder / old
        if path.is_file():
            path.rename(folder / old.replace("model", "inference", 1))
    (folder / CONFIG).write_text(format_short_yaml(dict(content)), encoding="utf-8")
    own = (folder / PADDLEX_FILES.raw_program).is_file()
    return replace(PADDLEX_FILES, own_for_openvino=own)
