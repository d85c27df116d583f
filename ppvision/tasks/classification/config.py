"""What a classification config may say, and building what it names.

The task's config in full, with what is taken for a key that is left out:

    task: classification
    batch_size: 128                  # samples per batch and process
    epochs: 300                      # or iters: optimiser steps
    seed: 0
    accumulate: 1                    # batches whose mean gradient makes one step
    clip_norm: null                  # bound of the gradient's global norm
    ema_decay: 0.999                 # of the averaged weights (--use_ema)
    model: {type: pale_tiny, num_classes: 1000, ...}        # any of the zoo, with its options
    train_dataset:
      root: data/imagenet/train      # a sub-folder per class; or with list_path, of its paths;
                                     # or a zip file, or a folder in one: data/train.zip//train
      list_path: null                # `picture class-number` lines
      max_value: null                # white in pictures of more than 8 bits a channel, such as 4095
      class_path: null               # `folder name` lines in the order of the classes
      transforms: [...]              # `TRAIN_TRANSFORMS`, in their order
    val_dataset: {root: ..., transforms: [...]}             # those of `ppvision.deploy` only
    sizes: null                      # [[0.0, 48], [0.5, 64]]: training pictures are resized to 48 x
                                     # 48 from the beginning, to 64 x 64 from the first epoch that
                                     # begins after half of the training
    loss: {label_smoothing: 0.0, mixup: 0.0, cutmix: 0.0}
    optimizer: {type: AdamW, weight_decay: 0.0, layer_decay: null, ...}
    lr_scheduler: {learning_rate: ..., warmup_epochs: 0, warmup_start_lr: 0.0, end_lr: 0.0}
    teacher:                         # distillation (`.teacher`, beside this module); left out: none
      type: efficientnet_lite2       # a model of the zoo, with its options (num_classes: 1000); or
      # model_dir: inference/teacher # a folder that `ppvision export --output_op softmax` wrote; or
      # file: teachers.py:build      # a function of yours, without arguments, that returns a Layer
      weights: teacher.safetensors   # of type (needed) or file
      size: 260                      # of the teacher's pictures, or [width, height]. The whole
                                     # picture is resized. model_dir has its own transforms
      mean: [0.5]                    # with std, as of Normalize
      std: [0.5]
      interpolation: CUBIC           # as of Resize
      classes: null                  # which of the teacher's classes ours are: a list in the order
                                     # of ours ([207, [281, 282]]), by our names ({dog: 207, cat:
                                     # [281, 282]}), or a YAML file with the latter; by number or,
                                     # of a model_dir that has them, by name. null: the same classes
      temperature: 1.0               # by which the logits of both are divided
      weight: 0.5                    # of the distillation in the loss; the labels have the rest

With a teacher, random crops keep at least 0.7 of the area and CutMix is refused: the teacher's
answer is of the whole picture, or of its left-right mirror where RandomHorizontalFlip mirrors it.
Mixup mixes answers as it mixes labels. What changes colours, erases, turns or moves a picture
(RandAugment, ColorJitter, RandomErasing, RandomAffine, ...) is allowed; the answer is then of the
picture without it.
"""

import math
from collections.abc import Callable

import numpy as np
import paddle
from paddle.vision import transforms as vision

from ppvision.data.augment import (
    KEPT_AREA,
    CheckedCrop,
    RandAugment,
    RandomErasing,
    RandomLargeCrop,
    RecordedFlip,
)
from ppvision.deploy.run import transforms as deployed
from ppvision.errors import shorten, shorten_text
from ppvision.safe_yaml import Located
from ppvision.tasks.classification.teacher import INPUT_KEYS, KEYS, SOURCES, teacher_transforms
from ppvision.tasks.config import (
    ConfigError,
    check_components,
    check_engine_keys,
    check_keys,
    check_number,
)
from ppvision.tasks.multibit.widths import check_slim_config
from ppvision.tasks.training import ENGINE_KEYS
from ppvision.zoo import list_models
from ppvision.zoo.factory import FEATURE_OPTIONS, model_options
from ppvision.zoo.registry import nearest

# A teacher is not trained, and `weights` must fit it as they are.
_NOT_OF_A_TEACHER = (*FEATURE_OPTIONS, "pretrained", "frozen_stages", "norm_eval")
_PARTS = {
    "model": None,  # checked against the zoo
    "train_dataset": ("root", "list_path", "class_path", "max_value", "transforms"),
    "val_dataset": ("root", "list_path", "class_path", "max_value", "transforms"),
    "loss": ("label_smoothing", "mixup", "cutmix"),
    "optimizer": None,
    "lr_scheduler": ("learning_rate", "warmup_epochs", "warmup_start_lr", "end_lr"),
    "teacher": None,  # its keys depend on what it is
}
TOP_LEVEL_KEYS = (*ENGINE_KEYS, "epochs", "sizes", *_PARTS)
OPTIMIZERS = {
    name: getattr(paddle.optimizer, name) for name in ("AdamW", "Adam", "Momentum", "SGD")
}
# What of their arguments a config may set; the task passes the rest.
OPTIMIZER_KEYS = ("type", "weight_decay", "layer_decay", "beta1", "beta2", "epsilon", "momentum")
OPTIMIZER_KEYS += ("use_nesterov",)

# Of Paddle those that draw from `random` and NumPy alone, which the engine seeds for every sample.
# Sizes and Normalize are deployment's, so that an exported model sees what was trained on.
TRAIN_TRANSFORMS = {
    name: getattr(vision, name)
    for name in (
        "ColorJitter",
        "Pad",
        "RandomAffine",
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandomPerspective",
        "RandomResizedCrop",
        "RandomRotation",
        "RandomVerticalFlip",
    )
} | {"RandAugment": RandAugment, "RandomErasing": RandomErasing, **deployed.KNOWN}


class _Deployed:
    """A transform of deployment among those of training: without what undoing it would need."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return self.transform(image)[0]


def build_transform(spec: dict) -> Callable[[np.ndarray], np.ndarray]:
    """A transform from `{type: NAME, ...}`: `[H, W, 3]` -> `[H', W', 3]`."""
    options = {key: value for key, value in spec.items() if key != "type"}
    transform = TRAIN_TRANSFORMS[spec["type"]](**options)
    return _Deployed(transform) if spec["type"] in deployed.KNOWN else transform


def build_taught_transform(spec: dict) -> Callable[[np.ndarray], np.ndarray]:
    """`build_transform` for pictures that a teacher has answered for as a whole."""
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


def check_config(content: Located) -> None:
    """Raise `ConfigError` for a key, type or value that the task does not take, with its place."""
    check_keys(content, TOP_LEVEL_KEYS)
    for key in ("model", "train_dataset", "batch_size", "lr_scheduler"):
        if key not in content:
            raise ConfigError(f"config: classification: expected {shorten(key)}, got none.")
    if ("iters" in content) == ("epochs" in content):
        raise ConfigError("config: expected either iters or epochs, got both or none of them.")
    for part, keys in _PARTS.items():
        if part in content:
            if not isinstance(content[part], dict):
                raise ConfigError(
                    f"config{content.place(part)}: {part}: expected keys and values, got "
                    f"{shorten(content[part])}."
                )
            check_keys(content[part], keys or content[part], part)
    check_engine_keys(content)
    if "slim_config" in content:
        check_slim_config(content["slim_config"])
    check_number(content, "epochs", low=1, whole=True)
    for key in ("label_smoothing", "mixup", "cutmix"):
        check_number(content.get("loss", {}), key, "loss", low=0)
    schedule = content["lr_scheduler"]
    if "learning_rate" not in schedule:
        raise ConfigError("config: lr_scheduler: expected learning_rate, got none.")
    for key in ("learning_rate", "warmup_start_lr", "end_lr"):
        check_number(schedule, key, "lr_scheduler", low=0)
    check_number(schedule, "warmup_epochs", "lr_scheduler", low=0, whole=True)
    for part in ("train_dataset", "val_dataset"):
        if part in content:
            _check_dataset(content[part], part)
    _check_model(content["model"])
    if "sizes" in content:
        _check_sizes(content)
    if "teacher" in content:
        _check_teacher(content["teacher"])
        _check_augmentation(content)
    _check_optimizer(content.get("optimizer", Located({}, {})))


def _check_optimizer(options: Located) -> None:
    check_keys(options, OPTIMIZER_KEYS, "optimizer")
    for key in ("weight_decay", "layer_decay", "beta1", "beta2", "epsilon", "momentum"):
        if options.get(key) is not None:
            check_number(options, key, "optimizer", low=0)
    for key in ("beta1", "beta2", "momentum"):
        if options.get(key) is not None and options[key] >= 1:
            raise ConfigError(
                f"config{options.place(key)}: optimizer.{key}: expected a number below 1, got "
                f"{shorten(options[key])}."
            )
    passed = Located({"type": "AdamW"} | options, options.where)
    passed.pop("layer_decay", None)
    check_components(passed, OPTIMIZERS, "optimizer")


def _check_dataset(options: Located, part: str) -> None:
    if not isinstance(options.get("root"), str):
        raise ConfigError(
            f"config{options.place('root')}: {part}: expected root, the folder of pictures, got "
            f"{shorten(options.get('root'))}."
        )
    for key in ("list_path", "class_path"):
        if not isinstance(options.get(key), str | None):
            raise ConfigError(
                f"config{options.place(key)}: {part}: expected {key} to be a file, got "
                f"{shorten(options[key])}."
            )
    if options.get("max_value") is not None:
        check_number(options, "max_value", part, low=1, whole=True)
    transforms = options.get("transforms", [])
    if not isinstance(transforms, list):
        raise ConfigError(
            f"config{options.place('transforms')}: {part}.transforms: expected a list, got "
            f"{shorten(transforms)}."
        )
    known = TRAIN_TRANSFORMS if part == "train_dataset" else deployed.KNOWN
    normalized = False
    for number, transform in enumerate(transforms):
        where = f"{part}.transforms.{number}"
        if not isinstance(transform, dict) or "type" not in transform:
            raise ConfigError(
                f"config: {where}: expected {{type: NAME, ...}}, got {shorten(transform)}."
            )
        name = transform["type"]
        named = isinstance(name, str)  # else the check of components says so
        if named and part == "val_dataset" and name in TRAIN_TRANSFORMS and name not in known:
            raise ConfigError(
                f"config{transform.place('type')}: {where}: {name} is for training; expected one "
                f"that gives the same each time: {', '.join(known)}."
            )
        check_components(transform, known, where)
        try:
            build_transform(transform)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = shorten_text(str(error), 300)
            raise ConfigError(
                f"config{transform.place('type')}: {where}: {name}: {text}"
            ) from error
        before = name not in deployed.KNOWN and name != "RandomErasing"  # these take 0 to 255
        if (normalized and before) or (name == "RandomErasing" and not normalized):
            raise ConfigError(
                f"config{transform.place('type')}: {where}: expected {name} "
                f"{'before' if before else 'behind'} Normalize. Change their order."
            )
        normalized |= name == "Normalize"


def _check_zoo_name(options: Located, part: str) -> None:
    name = options.get("type")
    if name not in list_models():
        raise ConfigError(
            f"config{options.place('type')}: {part}.type: got {shorten(name)}. "
            f"{nearest(str(name), list_models())}"
        )


def _check_model(options: Located) -> None:
    _check_zoo_name(options, "model")
    name = options["type"]
    known = [key for key in model_options(name) if key not in FEATURE_OPTIONS]
    check_keys(options, ["type", *known], "model")
    check_number(options, "num_classes", "model", low=1, whole=True)


def _check_sizes(content: Located) -> None:
    sizes = content["sizes"]
    fits = isinstance(sizes, list) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in entry)
        and 0 <= entry[0] < 1
        and isinstance(entry[1], int)
        and entry[1] >= 1
        for entry in sizes
    )
    shares = [entry[0] for entry in sizes] if fits else []
    if not shares or shares[0] != 0 or shares != sorted(set(shares)):
        raise ConfigError(
            f"config{content.place('sizes')}: sizes: expected pairs of a share of the training, "
            f"from 0.0 upwards and below 1, and a side in pixels, such as [[0.0, 48], [0.5, 64]]; "
            f"got {shorten(sizes)}."
        )


def _check_teacher(options: Located) -> None:
    named = [key for key in SOURCES if key in options]
    if len(named) != 1:
        raise ConfigError(
            f"config: teacher: expected one of {', '.join(SOURCES)}, got "
            f"{' and '.join(named) or 'none of them'}."
        )
    (source,) = named
    for key in (source, "weights", "interpolation"):
        if key in options and not isinstance(options[key], str):
            raise ConfigError(
                f"config{options.place(key)}: teacher.{key}: expected text, got "
                f"{shorten(options[key])}."
            )
    known: list[str] = [source, "classes", "temperature", "weight"]
    if source != "model_dir":
        known += ["weights", *INPUT_KEYS]
    if source == "type":
        _check_zoo_name(options, "teacher")
        known += [key for key in model_options(options["type"]) if key not in _NOT_OF_A_TEACHER]
    if source == "file" and not options["file"].rpartition(":")[0].endswith(".py"):
        raise ConfigError(
            f"config{options.place('file')}: teacher.file: expected FILE.py:FUNCTION, got "
            f"{shorten(options['file'])}."
        )
    for key in options:  # a key that another kind of teacher takes deserves to be told so
        if key in KEYS and key not in known:
            raise ConfigError(
                f"config{options.place(key)}: teacher: {key} does not go with {source}"
                + (", whose deploy.yaml says it." if key in INPUT_KEYS else ".")
            )
    check_keys(options, known, "teacher")
    if source == "type" and "weights" not in options:
        raise ConfigError(
            f"config{options.place('type')}: teacher: expected weights with type, got none: an "
            "untrained teacher knows nothing."
        )
    check_number(options, "num_classes", "teacher", low=1, whole=True)
    _check_shares(options)
    _check_classes(options)
    if source != "model_dir":
        _check_input(options)


def _check_shares(options: Located) -> None:
    for key, low in (("temperature", 0), ("weight", 0)):
        check_number(options, key, "teacher", low=low)
    if options.get("temperature", 1) == 0 or math.isinf(options.get("temperature", 1)):
        raise ConfigError(
            f"config{options.place('temperature')}: teacher.temperature: expected a finite number "
            f"above 0, got {shorten(options['temperature'])}."
        )
    if options.get("weight", 0) > 1:
        raise ConfigError(
            f"config{options.place('weight')}: teacher.weight: expected a share from 0 to 1, got "
            f"{shorten(options['weight'])}."
        )


def _check_classes(options: Located) -> None:
    mapping = options.get("classes")
    values = mapping.values() if isinstance(mapping, dict) else mapping
    if mapping is None or isinstance(mapping, str):
        return
    fits = isinstance(mapping, dict | list) and len(mapping) > 0
    items = [i for v in values for i in (v if isinstance(v, list) else [v])] if fits else []
    if (
        not fits
        or any(isinstance(i, bool) or not isinstance(i, int | str) for i in items)
        or (any(v == [] for v in values))
    ):
        raise ConfigError(
            f"config{options.place('classes')}: teacher.classes: expected the teacher's class (a "
            "number, a name, or a list of them) for each of ours, as a list, by our names, or in "
            f"a YAML file; got {mapping!r:.80}."
        )


def _check_input(options: Located) -> None:
    if "size" not in options:
        raise ConfigError("config: teacher: expected size, of the pictures it sees; got none.")
    try:
        for transform in teacher_transforms(options):
            build_transform(transform)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config{options.place('size')}: teacher: {error}") from error


def _check_augmentation(content: Located) -> None:
    """What the pictures of a teacher may go through."""
    loss = content.get("loss", Located({}, {}))
    if loss.get("cutmix", 0) > 0:
        raise ConfigError(
            f"config{loss.place('cutmix')}: loss.cutmix: expected 0 with a teacher, got "
            f"{shorten(loss['cutmix'])}: a part of a picture need not show what its answer, "
            "which is of "
            "the whole picture, says. Use mixup."
        )
    for number, transform in enumerate(content["train_dataset"].get("transforms", [])):
        where = f"train_dataset.transforms.{number}"
        name = transform["type"]
        if name == "RandomVerticalFlip":
            raise ConfigError(
                f"config{transform.place('type')}: {where}: {name} does not go with a teacher, "
                "whose answers are of the picture and its left-right mirror. Leave it out."
            )
        low = build_transform(transform).scale[0] if name == "RandomResizedCrop" else 1
        if low < KEPT_AREA:
            raise ConfigError(
                f"config{transform.place('scale')}: {where}: random crops keep at least "
                f"{KEPT_AREA} of the area with a teacher, whose answer is of the whole picture; "
                f"got scale from {low}. Write scale: [{KEPT_AREA}, 1.0]."
            )
