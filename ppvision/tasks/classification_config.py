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
      root: data/imagenet/train      # a sub-folder per class; or with list_path, of its paths
      list_path: null                # `picture class-number` lines
      max_value: null                # white in pictures of more than 8 bits a channel, such as 4095
      transforms: [...]              # `TRAIN_TRANSFORMS`, in their order
    val_dataset: {root: ..., transforms: [...]}             # those of `ppvision.deploy` only
    loss: {label_smoothing: 0.0, mixup: 0.0, cutmix: 0.0}
    optimizer: {type: AdamW, weight_decay: 0.0, layer_decay: null, ...}
    lr_scheduler: {learning_rate: ..., warmup_epochs: 0, warmup_start_lr: 0.0, end_lr: 0.0}
"""

from collections.abc import Callable

import numpy as np
import paddle
from paddle.vision import transforms as vision

from ppvision.data.augment import RandAugment, RandomErasing
from ppvision.deploy import transforms as deployed
from ppvision.errors import shorten
from ppvision.safe_yaml import Located
from ppvision.tasks.config import (
    ConfigError,
    check_components,
    check_engine_keys,
    check_keys,
    check_number,
)
from ppvision.tasks.quantization import check_slim_config
from ppvision.tasks.training import ENGINE_KEYS
from ppvision.zoo import list_models
from ppvision.zoo.registry import model_options, nearest

_PARTS = {
    "model": None,  # checked against the zoo
    "train_dataset": ("root", "list_path", "max_value", "transforms"),
    "val_dataset": ("root", "list_path", "max_value", "transforms"),
    "loss": ("label_smoothing", "mixup", "cutmix"),
    "optimizer": None,
    "lr_scheduler": ("learning_rate", "warmup_epochs", "warmup_start_lr", "end_lr"),
}
TOP_LEVEL_KEYS = (*ENGINE_KEYS, "epochs", *_PARTS)
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
    _check_optimizer(content.get("optimizer", Located({}, {})))


def _check_optimizer(options: Located) -> None:
    check_keys(options, OPTIMIZER_KEYS, "optimizer")
    for key in ("weight_decay", "layer_decay", "beta1", "beta2", "epsilon", "momentum"):
        if options.get(key) is not None:
            check_number(options, key, "optimizer", low=0)
    passed = Located({"type": "AdamW"} | options, options.where)
    passed.pop("layer_decay", None)
    check_components(passed, OPTIMIZERS, "optimizer")


def _check_dataset(options: Located, part: str) -> None:
    if not isinstance(options.get("root"), str):
        raise ConfigError(
            f"config{options.place('root')}: {part}: expected root, the folder of pictures, got "
            f"{shorten(options.get('root'))}."
        )
    if not isinstance(options.get("list_path"), str | None):
        raise ConfigError(
            f"config{options.place('list_path')}: {part}: expected list_path to be a file, got "
            f"{shorten(options['list_path'])}."
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
        if part == "val_dataset" and name in TRAIN_TRANSFORMS and name not in known:
            raise ConfigError(
                f"config{transform.place('type')}: {where}: {name} is for training; expected one "
                f"that gives the same each time: {', '.join(known)}."
            )
        check_components(transform, known, where)
        try:
            build_transform(transform)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"config{transform.place('type')}: {where}: {name}: {error}"
            ) from error
        before = name not in deployed.KNOWN and name != "RandomErasing"  # these take 0 to 255
        if (normalized and before) or (name == "RandomErasing" and not normalized):
            raise ConfigError(
                f"config{transform.place('type')}: {where}: expected {name} "
                f"{'before' if before else 'behind'} Normalize. Change their order."
            )
        normalized |= name == "Normalize"


def _check_model(options: Located) -> None:
    name = options.get("type")
    if name not in list_models():
        raise ConfigError(
            f"config{options.place('type')}: model.type: got {shorten(name)}. "
            f"{nearest(str(name), list_models())}"
        )
    known = [key for key in model_options(name) if key != "features_only"]
    check_keys(options, ["type", *known], "model")
    check_number(options, "num_classes", "model", low=1, whole=True)
