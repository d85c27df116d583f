"""The keys of a classification config, and building the objects that it names.

This is a config with all keys and their defaults:

    task: classification
    batch_size: 128                  # samples per batch and process
    epochs: 300                      # or iters: optimiser steps
    seed: 0
    accumulate: 1                    # batches whose mean gradient makes one step
    clip_norm: null                  # limit of the gradient's global norm
    ema_decay: 0.999                 # for the averaged weights (--use_ema)
    model: {type: pale_tiny, num_classes: 1000, ...}        # any model of the zoo, with its options
    train_dataset:
      root: data/imagenet/train      # has a sub-folder per class; or with list_path, the folder
                                     # of its paths; or a zip file, or a folder in a zip file:
                                     # data/train.zip//train
      list_path: null                # a file with `image class-number` lines
      max_value: null                # white in images of more than 8 bits per channel, such as 4095
      class_path: null               # a file with `folder name` lines, in the order of classes
      transforms: [...]              # those of `TRAIN_TRANSFORMS`, in this order
    val_dataset: {root: ..., transforms: [...]}             # those of `ppvision.deploy` only
    sizes: null                      # [[0.0, 48], [0.5, 64]]: training images are resized to 48x48
                                     # first, and to 64 x 64 from the first epoch that begins after
                                     # half of the training
    loss: {label_smoothing: 0.0, mixup: 0.0, cutmix: 0.0}
    optimizer: {type: AdamW, weight_decay: 0.0, layer_decay: null, ...}
    lr_scheduler: {learning_rate: ..., warmup_epochs: 0, warmup_start_lr: 0.0, end_lr: 0.0}
    teacher:                         # distillation (module `.teacher`); default: none
      type: efficientnet_lite2       # a model of the zoo, with its options (num_classes: 1000); or
      # model_dir: inference/teacher # a folder of `ppvision export --output_op softmax`; or
      # file: teachers.py:build      # your function without arguments that returns a Layer
      weights: teacher.safetensors   # for type (required) or file
      size: 260                      # of the teacher's images, or [width, height]. The whole image
                                     # is resized. model_dir has its own transforms
      mean: [0.5]                    # mean and std as in Normalize
      std: [0.5]
      interpolation: CUBIC           # as in Resize
      classes: null                  # the teacher's classes for each of ours: a list in our order
                                     # ([207, [281, 282]]), a mapping by our names ({dog: 207, cat:
                                     # [281, 282]}), or a YAML file with this mapping. Numbers, or
                                     # names if model_dir has them. null: the same classes
      temperature: 1.0               # the logits of both are divided by it
      weight: 0.5                    # of distillation in the loss; the labels have 1 - weight

With a teacher, random crops must keep at least 0.7 of the area, and CutMix is refused. The reason:
the answer of the teacher is for the whole image, or for its left-right mirror if
RandomHorizontalFlip mirrors it. Mixup mixes answers like labels. Transforms that change colours, or
that erase, rotate or move an image (RandAugment, ColorJitter, RandomErasing, RandomAffine, ...) are
allowed. The answer is then for the image without them.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import paddle
from paddle.vision import transforms as vision

from ppvision.data.augment import (
    KEPT_AREA,
    CheckedCrop,
    FittingCrop,
    RandAugment,
    RandomErasing,
    RandomLargeCrop,
    RecordedFlip,
)
from ppvision.deploy.run import transforms as deployed
from ppvision.errors import shorten, shorten_text, suggest_nearest
from ppvision.safe_yaml import Located
from ppvision.schema import LEFT_OUT, Place, between, number, one_of, refuse, whole
from ppvision.tasks.classification.teacher import (
    INPUT_KEYS,
    KEYS,
    SOURCES,
    TEMPERATURE,
    WEIGHT,
    make_teacher_transforms,
)
from ppvision.tasks.config import (
    ENGINE_CHECKS,
    ConfigError,
    build_config,
    check_components,
    check_keys,
    check_number,
    place_of,
)
from ppvision.tasks.multibit.slim_config import check_slim_config
from ppvision.zoo import list_models
from ppvision.zoo.factory import FEATURE_OPTIONS, list_model_options

# A teacher is not trained, and `weights` must fit it exactly.
_NOT_OF_A_TEACHER = (*FEATURE_OPTIONS, "pretrained", "frozen_stages", "norm_eval")
OPTIMIZERS = {
    name: getattr(paddle.optimizer, name) for name in ("AdamW", "Adam", "Momentum", "SGD")
}

# From Paddle: transforms that draw only from `random` and NumPy, which the engine seeds for every
# sample. Sizes, Normalize and registered transforms are those of deployment, so that an exported
# model gets the same input as in training.
_OF_PADDLE = (
    "ColorJitter",
    "Pad",
    "RandomAffine",
    "RandomHorizontalFlip",
    "RandomPerspective",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
)
TRAIN_TRANSFORMS: Mapping[str, Callable] = ChainMap(
    deployed.KNOWN,  # a registered transform is added here
    {name: getattr(vision, name) for name in _OF_PADDLE},
    {"RandAugment": RandAugment, "RandomCrop": FittingCrop, "RandomErasing": RandomErasing},
)


class _Deployed:
    """Wrap a transform of deployment for training, without the record for undoing it."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return self.transform(image)[0]


def build_transform(spec: dict) -> Any:
    """Build a transform from `{type: NAME, ...}`: `[H, W, 3]` -> `[H', W', 3]`."""
    options = {key: value for key, value in spec.items() if key != "type"}
    transform = TRAIN_TRANSFORMS[spec["type"]](**options)
    return _Deployed(transform) if spec["type"] in deployed.KNOWN else transform


def build_taught_transform(spec: dict) -> Any:
    """Like `build_transform`, for images whose teacher's answer is for the whole image."""
    options = {key: value for key, value in spec.items() if key != "type"}
    name = spec["type"]
    if name == "RandomHorizontalFlip":
        return RecordedFlip(**options)
    if name == "RandomResizedCrop":
        return RandomLargeCrop(**options)
    transform = build_transform(spec)
    if name == "CenterCrop":
        return CheckedCrop(transform, name, transform.transform.target_size[::-1])
    if name == "RandomCrop":
        padding = np.max(transform.padding or 0)  # one number, two or four
        return CheckedCrop(transform, name, tuple(transform.size), int(padding))
    return transform


# -- what the config may be ------------------------------------------------------------------------
# A default of None means that the key was omitted; null in a file is refused unless the type allows
# it.


def _below_one(value: Any, place: Place) -> float:
    if number(0)(value, place) >= 1:
        raise refuse(value, place, "a number below 1")
    return value


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in entry)
        and 0 <= entry[0] < 1
        and isinstance(entry[1], int)
        and entry[1] >= 1
    )


def _check_sizes(value: Any, place: Place) -> list[list[float]]:
    shares = [entry[0] for entry in value if _is_pair(entry)] if isinstance(value, list) else []
    if not shares or len(shares) < len(value) or shares[0] != 0 or shares != sorted(set(shares)):
        raise refuse(
            value,
            place,
            "pairs of a share of the training, from 0.0 upwards and below 1, and a side in pixels, "
            "such as [[0.0, 48], [0.5, 64]]",
        )
    return value


def _check_classes(value: Any, place: Place) -> Any:
    values = value.values() if isinstance(value, dict) else value
    if value is None or isinstance(value, str):
        return value
    fits = isinstance(value, dict | list) and len(value) > 0
    items = [i for v in values for i in (v if isinstance(v, list) else [v])] if fits else []
    known = all(isinstance(i, int | str) and not isinstance(i, bool) for i in items)
    if not fits or not known or any(v == [] for v in values):
        raise refuse(
            value,
            place,
            "the teacher's class (a number, a name, or a list of them) for each of ours, as a "
            "list, by our names, or in a YAML file",
        )
    return value


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    root: str
    list_path: str | None = None
    class_path: str | None = None
    max_value: Annotated[int, whole(1)] | None = None
    transforms: list[Any] = field(default_factory=list)  # see `_check_transforms`


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    label_smoothing: Annotated[float, number(0)] = 0.0
    mixup: Annotated[float, number(0)] = 0.0
    cutmix: Annotated[float, number(0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The arguments of an optimizer that a config may set; the task passes the others."""

    type: Annotated[str, one_of(*OPTIMIZERS)] = "AdamW"
    weight_decay: Annotated[float, number(0)] | None = None
    layer_decay: Annotated[float, number(0)] | None = None
    beta1: Annotated[float, _below_one] | None = None
    beta2: Annotated[float, _below_one] | None = None
    epsilon: Annotated[float, number(0)] | None = None
    momentum: Annotated[float, _below_one] | None = None
    use_nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    learning_rate: Annotated[float, number(0)]
    warmup_epochs: Annotated[int, whole(0)] = 0
    warmup_start_lr: Annotated[float, number(0)] = 0.0
    end_lr: Annotated[float, number(0)] = 0.0


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """All keys of a teacher except the options of a model of the zoo; see `_check_teacher`."""

    type: str = LEFT_OUT
    model_dir: str = LEFT_OUT
    file: str = LEFT_OUT
    weights: str = LEFT_OUT
    size: Any = None  # these are checked as options of Resize and Normalize
    mean: Any = None
    std: Any = None
    interpolation: str = LEFT_OUT
    classes: Annotated[Any, _check_classes] = None
    temperature: Annotated[float, between(0)] = TEMPERATURE
    weight: Annotated[float, number(0, 1)] = WEIGHT


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """The whole config; the docstring of this module explains each key."""

    model: dict[str, Any]  # see `_check_model`
    train_dataset: DatasetConfig
    batch_size: Annotated[int, ENGINE_CHECKS["batch_size"]]
    lr_scheduler: ScheduleConfig
    task: Literal["classification"] = "classification"
    imports: Any = ()  # imported earlier
    run: Any = None  # in a run folder's config.yml: the options of the run; not read
    iters: Annotated[int, ENGINE_CHECKS["iters"]] = LEFT_OUT
    epochs: Annotated[int, whole(1)] = LEFT_OUT
    seed: Annotated[int, ENGINE_CHECKS["seed"]] = 0
    accumulate: Annotated[int, ENGINE_CHECKS["accumulate"]] = 1
    clip_norm: Annotated[float, ENGINE_CHECKS["clip_norm"]] = LEFT_OUT
    ema_decay: Annotated[float, ENGINE_CHECKS["ema_decay"]] = 0.999
    slim_config: Any = None  # see `check_slim_config`
    val_dataset: DatasetConfig = LEFT_OUT
    sizes: Annotated[list[list[float]], _check_sizes] = LEFT_OUT
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: dict[str, Any] = LEFT_OUT  # see `_check_teacher`


def check_config(content: Located) -> ClassificationConfig:
    """Return the config with its defaults.

    Raises:
        ConfigError: a key, type or value is not valid for the task; the message has its place.
    """
    config = build_config(ClassificationConfig, content)
    if (config.iters is None) == (config.epochs is None):
        raise ConfigError("config: expected either iters or epochs, got both or none of them.")
    if "slim_config" in content:
        check_slim_config(content["slim_config"])
    for part in ("train_dataset", "val_dataset"):
        if part in content:
            _check_transforms(content[part].get("transforms", []), part)
    _check_model(content["model"])
    if "teacher" in content:
        _check_teacher(content["teacher"])
        _check_augmentation(content)
    _check_optimizer(content.get("optimizer", Located({}, {})))
    return config


def _check_optimizer(options: Located) -> None:
    """Check the arguments of the optimizer with that name."""
    passed = Located({"type": "AdamW"} | options, options.where)
    passed.pop("layer_decay", None)
    check_components(passed, OPTIMIZERS, "optimizer")


def _check_transforms(transforms: list, part: str) -> None:
    known = TRAIN_TRANSFORMS if part == "train_dataset" else deployed.KNOWN
    normalized = False
    for index, transform in enumerate(transforms):
        where = f"{part}.transforms.{index}"
        if not isinstance(transform, dict) or "type" not in transform:
            raise ConfigError(
                f"config: {where}: expected {{type: NAME, ...}}, got {shorten(transform)}."
            )
        name = transform["type"]
        named = isinstance(name, str)  # otherwise the check of components reports it
        if named and part == "val_dataset" and name in TRAIN_TRANSFORMS and name not in known:
            raise ConfigError(
                f"config{place_of(transform, 'type')}: {where}: {name} is for training; expected "
                f"one that gives the same each time: {', '.join(known)}."
            )
        check_components(transform, known, where)
        try:
            build_transform(transform)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = shorten_text(str(error), 300)
            raise ConfigError(
                f"config{place_of(transform, 'type')}: {where}: {name}: {text}"
            ) from error
        before = name not in deployed.KNOWN and name != "RandomErasing"  # these expect 0 to 255
        if (normalized and before) or (name == "RandomErasing" and not normalized):
            raise ConfigError(
                f"config{place_of(transform, 'type')}: {where}: expected {name} "
                f"{'before' if before else 'after'} Normalize. Change their order."
            )
        normalized |= name == "Normalize"


def _check_zoo_name(options: Located, part: str) -> None:
    name = options.get("type")
    if name not in list_models():
        raise ConfigError(
            f"config{options.place('type')}: {part}.type: got {shorten(name)}. "
            f"{suggest_nearest(str(name), list_models())}"
        )


def _check_model(options: Located) -> None:
    _check_zoo_name(options, "model")
    name = options["type"]
    known = [key for key in list_model_options(name) if key not in FEATURE_OPTIONS]
    check_keys(options, ["type", *known], "model")
    check_number(options, "num_classes", "model", low=1, whole=True)


def _check_teacher(options: Located) -> None:
    ours = {key: value for key, value in options.items() if key in KEYS}
    build_config(TeacherConfig, Located(ours, options.where), "teacher")
    named = [key for key in SOURCES if key in options]
    if len(named) != 1:
        raise ConfigError(
            f"config: teacher: expected one of {', '.join(SOURCES)}, got "
            f"{' and '.join(named) or 'none of them'}."
        )
    (source,) = named
    known: list[str] = [source, "classes", "temperature", "weight"]
    if source != "model_dir":
        known += ["weights", *INPUT_KEYS]
    if source == "type":
        _check_zoo_name(options, "teacher")
        known += [
            key for key in list_model_options(options["type"]) if key not in _NOT_OF_A_TEACHER
        ]
    if source == "file" and not options["file"].rpartition(":")[0].endswith(".py"):
        raise ConfigError(
            f"config{options.place('file')}: teacher.file: expected FILE.py:FUNCTION, got "
            f"{shorten(options['file'])}."
        )
    for key in options:  # a key of another kind of teacher gets its own message
        if key in KEYS and key not in known:
            raise ConfigError(
                f"config{options.place(key)}: teacher: {key} cannot be used with {source}"
                + (", whose deploy.yaml says it." if key in INPUT_KEYS else ".")
            )
    check_keys(options, known, "teacher")
    if source == "type" and "weights" not in options:
        raise ConfigError(
            f"config{options.place('type')}: teacher: expected weights with type, got none: an "
            "untrained teacher knows nothing."
        )
    check_number(options, "num_classes", "teacher", low=1, whole=True)
    if source != "model_dir":
        _check_input(options)


def _check_input(options: Located) -> None:
    if "size" not in options:
        raise ConfigError(
            "config: teacher: expected size, the size of the images that it sees; got none."
        )
    try:
        for transform in make_teacher_transforms(options):
            build_transform(transform)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config{options.place('size')}: teacher: {error}") from error


def _check_augmentation(content: Located) -> None:
    """Check the transforms and losses that a teacher allows."""
    loss = content.get("loss", Located({}, {}))
    if loss.get("cutmix", 0) > 0:
        raise ConfigError(
            f"config{loss.place('cutmix')}: loss.cutmix: expected 0 with a teacher, got "
            f"{shorten(loss['cutmix'])}. The teacher's answer is for the whole image, and a part "
            "of the image may not show it. Use mixup."
        )
    for index, transform in enumerate(content["train_dataset"].get("transforms", [])):
        where = f"train_dataset.transforms.{index}"
        name = transform["type"]
        if name == "RandomVerticalFlip":
            raise ConfigError(
                f"config{place_of(transform, 'type')}: {where}: {name} cannot be used with a "
                "teacher, whose answers are for the image and its left-right mirror. Remove it."
            )
        low = build_transform(transform).scale[0] if name == "RandomResizedCrop" else 1
        if low < KEPT_AREA:
            raise ConfigError(
                f"config{place_of(transform, 'scale')}: {where}: with a teacher, random crops "
                f"must keep at least {KEPT_AREA} of the area, because its answer is for the whole "
                f"image; got scale from {low}. Write scale: [{KEPT_AREA}, 1.0]."
            )
