"""Segmentation: PaddleSeg's builder, data, losses and metrics in our engine."""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import paddle

# This import registers components and applies repairs; it reports a missing PaddleSeg.
from ppvision.console import track
from ppvision.environment import count_usable_cpus
from ppvision.forms.paddle_private import collate_samples
from ppvision.plugins.paddleseg import compute_stock_losses

# isort: split
from paddleseg.core import infer
from paddleseg.cvlibs import Config, SegBuilder, manager
from paddleseg.transforms import Compose

from ppvision.data.check.segmentation import check_pairs, check_segmentation_list
from ppvision.data.check.summary import DataSummary
from ppvision.data.pictures import read_picture
from ppvision.data.text import read_names
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.write.integers import IntegerOptions, make_integer_arguments
from ppvision.deploy.write.paddlex import choose_default_name
from ppvision.engine.reading import read_in_order
from ppvision.errors import shorten, shorten_text, suggest_nearest
from ppvision.plugins.libraries import load_safely, wrap_errors
from ppvision.safe_yaml import Located, drop_places
from ppvision.tasks.config import (
    ConfigError,
    check_components,
    check_engine_keys,
    check_keys,
    check_number,
    place_of,
)
from ppvision.tasks.job import Job, make_example_input, unwrap_parallel
from ppvision.tasks.multibit.slim_config import check_slim_config
from ppvision.tasks.pictures import draw_panel
from ppvision.tasks.prediction import (
    Picture,
    predict_exported,
    predict_to_folder,
    read_pixels,
)
from ppvision.tasks.segmentation.scores import BOUNDARY_SCORES, Scores, Scoring
from ppvision.tasks.training import ENGINE_KEYS, count_steps
from ppvision.zoo.weights import rename_for_sdn

logger = logging.getLogger("ppvision")

# Keys at the top level of a config: those of the engine, and PaddleSeg's own.
TOP_LEVEL_KEYS = (
    *ENGINE_KEYS,
    "train_dataset",
    "val_dataset",
    "optimizer",
    "lr_scheduler",
    "loss",
    "model",
    "test_config",
)
PICTURES = 4  # validation samples shown in the dashboard
# Options for the prediction in an evaluation, from PaddleSeg's `evaluate`.
EXAMPLE_SIDE = 128  # pixels of the image that shows which layers run
_WINDOW = ("is_slide", "crop_size", "stride")
_AUGMENTED = ("aug_eval", "scales", "flip_horizontal", "flip_vertical")


class _CheckedConfig(Config):
    """PaddleSeg's Config around a dictionary that was read and checked already."""

    def __init__(self, content: dict) -> None:
        self.dic = content
        try:
            self._build_default_checker().apply_all_rules(self)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"config: {shorten_text(str(error))}") from error


class Segmentation(Job):
    """One configured job.

    Args:
        content: a config in PaddleSeg's format, read, merged and overridden
            (`ppvision.tasks.open_job`).
        name: name of the config.
        epochs: passes over the training data, instead of the config's `iters`. Default None.
        allow_download: download `pretrained` weights of PaddleSeg's components from a URL.

    Raises:
        ConfigError: PaddleSeg does not know a name; the message has the nearest valid one.
    """

    task = "segmentation"
    override_keys: ClassVar[Mapping[str, str]] = {
        "batch_size": "batch_size",
        "iters": "iters",
        "learning_rate": "lr_scheduler.learning_rate",
    }
    evaluation_options = (*_AUGMENTED, *_WINDOW)
    score_tags = ("Evaluate/mIoU", "Evaluate/Acc", *(f"Evaluate/{n}" for n in BOUNDARY_SCORES))

    def __init__(
        self,
        content: Located,
        name: str,
        *,
        epochs: int | None = None,
        allow_download: bool = False,
    ) -> None:
        super().__init__(name, allow_download=allow_download)
        check_keys(content, TOP_LEVEL_KEYS)
        _name_optimizer(content.get("optimizer"))
        self._check_components(content)
        self._check_test_config(content.get("test_config") or {})
        self.config = _CheckedConfig(drop_places(content))
        self.builder = SegBuilder(self.config)
        self._epochs = epochs

    @cached_property
    def content(self) -> dict:
        """Return the resolved config in plain values; with `epochs`, its `iters` are the steps of
        these epochs."""
        if self._epochs is None:
            return self.config.dic
        return self.config.dic | {"iters": self.iters}

    @staticmethod
    def _check_components(content: Located) -> None:
        registers = {
            "train_dataset": (manager.DATASETS, manager.TRANSFORMS),
            "val_dataset": (manager.DATASETS, manager.TRANSFORMS),
            "model": (manager.MODELS, manager.BACKBONES, manager.LOSSES),
            "loss": (manager.LOSSES,),
            "optimizer": (manager.OPTIMIZERS,),
        }
        for part in (*registers, "lr_scheduler", "test_config"):
            if part in content and not isinstance(content[part], dict):
                raise ConfigError(
                    f"config{content.place(part)}: {part}: expected keys and values, got "
                    f"{shorten(content[part])}."
                )
        for part, kinds in registers.items():
            if part in content:
                check_number(content[part], "max_value", part, low=1, whole=True)
                known = {k: v for kind in kinds for k, v in kind.components_dict.items()}
                check_components(content[part], known, part)
        check_engine_keys(content)
        if "slim_config" in content:
            check_slim_config(content["slim_config"])
        for part in ("train_dataset", "val_dataset"):
            _check_transforms(content.get(part, {}), part)
        check_keys(content.get("loss", {}), ("types", "coef"), "loss")
        _check_schedule(content.get("lr_scheduler"))
        _check_clipping(content.get("optimizer", {}))

    @staticmethod
    def _check_test_config(options: dict) -> None:
        check_keys(options, (*_WINDOW, *_AUGMENTED), "test_config")
        if options.get("is_slide") and not (options.get("crop_size") and options.get("stride")):
            raise ConfigError(
                "is_slide: expected crop_size and stride (width, height) as well "
                "(--crop_size W H and --stride W H)."
            )
        if not options.get("is_slide") and (options.get("crop_size") or options.get("stride")):
            raise ConfigError("crop_size, stride: expected is_slide with them (--is_slide).")
        scaled = [k for k in ("scales", "flip_horizontal", "flip_vertical") if options.get(k)]
        if scaled and not options.get("aug_eval"):
            raise ConfigError(f"{', '.join(scaled)}: expected aug_eval with them (--aug_eval).")

    @cached_property
    def class_names(self) -> list[str]:
        """Return names from `classes.txt` in the data set's folder, one per line; empty if there is
        none.

        Raises:
            ConfigError: the number of names differs from that of the classes.
        """
        cfg = self.config.val_dataset_cfg or self.config.train_dataset_cfg
        path = Path(cfg.get("dataset_root", "")) / "classes.txt"
        if not path.is_file():
            logger.warning(f"class names: no {path}; numbers are used instead")
            return []
        names = read_names(path)
        count = self.config.model_cfg.get("num_classes") or cfg.get("num_classes")
        if len(names) != count:
            raise ConfigError(f"{path}: expected {count} names, one per line, got {len(names)}.")
        return names

    @property
    def max_value(self) -> int | None:
        """Return the `max_value` of the data set for images of more than 8 bits per channel; see
        `read_picture`."""
        cfg = self.config.val_dataset_cfg or self.config.train_dataset_cfg
        return cfg.get("max_value")

    def check_data(self, *parts: str) -> dict[str, DataSummary]:
        """Check every image and label of `train_dataset` / `val_dataset` before their use.

        Returns:
            The contents of each part.

        Raises:
            DataError: one report of all problems.
        """
        found = {}
        for part in parts:
            cfg = self._check_place(part)
            if cfg["type"] == "Dataset":
                checked = check_segmentation_list(
                    cfg[f"{cfg['mode']}_path"],
                    cfg["dataset_root"],
                    cfg["num_classes"],
                    ignore_index=cfg.get("ignore_index", 255),
                    separator=cfg.get("separator", " "),
                    max_value=cfg.get("max_value"),
                )
            else:
                pairs = getattr(self.builder, part).file_list
                checked = check_pairs(f"{part} ({cfg['type']})", pairs, cfg.get("max_value"))
            found[part] = DataSummary(
                checked["images"],
                checked["sizes"],
                "pixels",
                checked.get("class_pixels"),
                ignored=checked.get("ignored_pixels", 0),
            )
        return found

    def _check_place(self, part: str) -> dict:
        """Return the config of `train_dataset` or `val_dataset`, which must name its files."""
        cfg = getattr(self.config, f"{part}_cfg")
        if not cfg:
            raise ConfigError(f"config: expected a {part}, got none.")
        if cfg["type"] == "Dataset":
            mode = cfg.get("mode")
            if f"{mode}_path" not in cfg:
                raise ConfigError(
                    f"config: {part}: expected mode train, val or test and its list file "
                    f"(train_path, ...), got mode {shorten(mode)}."
                )
            return cfg
        # PaddleSeg's own data sets would start a download if the folder does not exist.
        root = cfg.get("dataset_root")
        if root is None or not Path(root).is_dir():
            raise ConfigError(
                f"config: {part}: expected dataset_root, the folder of {cfg['type']}, got "
                f"{shorten(root)}, which does not exist. ppvision does not download data sets."
            )
        return cfg

    def _built(self, part: str) -> Any:
        """Build a part of the config by PaddleSeg's builder; the same object at every call."""
        with load_safely(self.allow_download), wrap_errors(f"config: {part}"):
            return getattr(self.builder, part)

    # -- the model -----------------------------------------------------------------------------

    @property
    def float_model(self) -> paddle.nn.Layer:
        return self._built("model")

    @property
    def example(self) -> paddle.Tensor:
        channels = self.config.train_dataset_cfg.get("img_channels", 3)
        return make_example_input(channels, EXAMPLE_SIDE)

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Read weights, also those of the same model without SDN; SDN then starts without
        effect."""
        return rename_for_sdn(self.float_model, arrays)

    # -- train ---------------------------------------------------------------------------------

    @cached_property
    def iters(self) -> int:
        if self._epochs is None:
            return self.config.iters
        self._check_place("train_dataset")
        return count_steps(self._epochs, self.train_dataset, self.config.dic)

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    def make_optimizer(self, model: paddle.nn.Layer) -> paddle.optimizer.Optimizer:
        # A separate builder, because PaddleSeg's uses the parameters of its own model, and the
        # steps of the schedule in its config.
        builder = SegBuilder(_CheckedConfig(self.content))
        vars(builder)["model"] = model
        with wrap_errors("config: optimizer"):
            return builder.optimizer

    @property
    def train_dataset(self) -> paddle.io.Dataset:
        return self._built("train_dataset")

    @property
    def batched(self) -> Callable[[list], object]:
        return collate_samples

    def forward(self, network: paddle.nn.Layer, batch: dict) -> list[paddle.Tensor]:
        images = batch["img"]
        if getattr(unwrap_parallel(network), "data_format", "NCHW") == "NHWC":
            images = images.transpose([0, 2, 3, 1])
        with wrap_errors("training step"):
            return network(images)

    def losses_of(
        self, model: paddle.nn.Layer, outputs: list[paddle.Tensor], batch: dict
    ) -> list[paddle.Tensor]:
        """Return the losses as in PaddleSeg's train(): the model's own, or those of the config on
        its logits."""
        losses = self._built("loss")
        with wrap_errors("training step"):
            if hasattr(model, "loss_computation"):
                return model.loss_computation(outputs, losses, batch)
            return compute_stock_losses(outputs, losses, batch)

    # -- evaluate ------------------------------------------------------------------------------

    def evaluate(self, model: paddle.nn.Layer, *, num_workers: int = 0, **how: object) -> Scores:
        """Score a model on the val split like PaddleSeg's own evaluation, and along boundaries.

        Args:
            model: a model with PaddleSeg's interface: it returns a list of logits.
            num_workers: processes that read images; 0 reads in this one.
            **how: `aug_eval, scales, flip_horizontal, flip_vertical, is_slide, crop_size, stride`;
                they have priority over the config's `test_config`.
        """
        options = self.config.test_config | {k: v for k, v in how.items() if v is not None}
        self._check_test_config(options)
        augmented = options.pop("aug_eval", False)
        if not augmented:
            options = {k: v for k, v in options.items() if k in _WINDOW}
        dataset = self._built("val_dataset")
        model.eval()

        def predict(sample: dict) -> tuple[np.ndarray, np.ndarray]:
            run = infer.aug_inference if augmented else infer.inference
            with paddle.no_grad(), wrap_errors("evaluation"):
                prediction, _ = run(
                    model,
                    paddle.to_tensor(sample["img"][None]),  # [1, 3, H, W]
                    trans_info=sample["trans_info"],
                    **options,
                )
            return prediction.numpy()[0, 0], np.asarray(sample["label"]).squeeze()

        return self._scored(dataset.__getitem__, predict, num_workers)

    def _scored(
        self,
        read: Callable[[int], Any],
        predict: Callable[[Any], tuple[np.ndarray, np.ndarray]],
        num_workers: int = 0,
    ) -> Scores:
        """Return the scores of `predict(read(index)) -> prediction, label` on the val split, over
        all ranks; `num_workers` processes read."""
        dataset = self._built("val_dataset")
        scoring = Scoring(dataset.num_classes, dataset.ignore_index)
        rank, world = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
        mine = range(rank, len(dataset), world)
        with read_in_order(read, mine, num_workers) as samples:
            for sample in track(samples, "eval", len(mine), hidden=rank > 0):
                scoring.update(*predict(sample))
        scoring.add_other_ranks()
        return scoring.scores()

    def calibration_pictures(self) -> list[Path]:
        return [Path(image) for image, *_ in self.train_dataset.file_list]

    def evaluate_exported(
        self, model_dir: str | Path, *, device: str = "cpu", precision: str = "auto", **how: object
    ) -> Scores:
        """Score an exported model on the val split, through Paddle Inference.

        Raises:
            ConfigError: a sliding window or several scales are requested, which an export cannot
                do, or the export has another task or number of classes.
        """
        options = self.config.test_config | {k: v for k, v in how.items() if v is not None}
        if options.get("aug_eval") or options.get("is_slide"):
            raise ConfigError(
                "eval --model_dir: an exported model predicts whole images as deploy.yaml says; "
                "expected no aug_eval or is_slide (flags or test_config). Use --model_path."
            )
        predictor = Predictor(
            model_dir, threads=count_usable_cpus(), device=device, precision=precision
        )
        dataset = self._built("val_dataset")
        manifest = predictor.manifest
        if (manifest.task, manifest.num_classes) != (self.task, dataset.num_classes):
            raise ConfigError(
                f"eval --model_dir: expected a segmentation model of {dataset.num_classes} "
                f"classes, got {manifest.task} of {manifest.num_classes} in {model_dir}."
            )

        def predict(index: int) -> tuple[np.ndarray, np.ndarray]:
            return predictor(dataset.file_list[index][0]), self._label(index)

        return self._scored(lambda index: index, predict)

    def _label(self, index: int) -> np.ndarray:
        """Return the label map `[H, W]` of a val sample, with the class numbers of its data set
        class."""
        return np.asarray(self._built("val_dataset")[index]["label"]).squeeze()

    # -- predict -------------------------------------------------------------------------------

    def predict_image(self, model: paddle.nn.Layer, picture: Picture) -> np.ndarray:
        """Return the classes `[H, W]` of one image, exactly those that `evaluate` would score.

        Args:
            model: a model with PaddleSeg's interface: it returns a list of logits.
            picture: a path, or pixels `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the file cannot be read.
        """
        channels = self.config.val_dataset_cfg.get("img_channels", 3)
        image = read_pixels(picture, self.max_value)
        if channels == 1:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        # Already RGB and float32, as after reading and conversion of a path in Compose.
        transforms = Compose(self._built("val_transforms"), to_rgb=False, img_channels=channels)
        options = self.config.test_config
        window = {k: options[k] for k in _WINDOW if k in options}
        model.eval()
        with paddle.no_grad(), wrap_errors("prediction"):
            data = transforms({"img": image.astype(np.float32)})
            prediction, _ = infer.inference(
                model,
                paddle.to_tensor(data["img"][None]),  # [1, 3, H, W]
                trans_info=data["trans_info"],
                **window,
            )
        return prediction.numpy()[0, 0]

    @property
    def writer(self) -> Callable[..., list[str]]:
        return partial(
            predict_to_folder,
            class_names=self.class_names,
            ignore_index=self._ignore_index,
            num_classes=self.config.val_dataset_cfg.get("num_classes"),
        )

    def predict_exported_to_folder(
        self,
        predictor: Predictor,
        image_path: str | Path,
        folder: str | Path,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        return predict_exported(
            predictor, image_path, folder, ignore_index=self._ignore_index, stopped=stopped
        )

    @property
    def _ignore_index(self) -> int | None:
        """Return the label of pixels that do not count; None if label files cannot be compared."""
        dataset = self.config.val_dataset_cfg
        # Another type may renumber the classes of its label files (ADE20K).
        if dataset.get("type", "Dataset") != "Dataset":
            return None
        return dataset.get("ignore_index", 255)

    def pictures(self, model: paddle.nn.Layer) -> dict[str, np.ndarray]:
        """Return panels `input | label | prediction | errors` of fixed validation samples, by
        name."""
        dataset = self._built("val_dataset")
        files = getattr(dataset, "file_list", [])
        chosen = np.linspace(0, len(files) - 1, min(PICTURES, len(files))).astype(int)
        panels = {}
        for index in chosen:
            image_path = files[index][0]
            image = read_picture(image_path, max_value=self.max_value)
            prediction = self.predict_image(model, image)
            panels[Path(image_path).stem] = draw_panel(
                image, self._label(index), prediction, dataset.ignore_index
            )
        return panels

    # -- export --------------------------------------------------------------------------------

    def export(
        self,
        model: paddle.nn.Layer,
        folder: str | Path,
        *,
        input_shape: list[int | None],
        output_op: str | None,
        model_format: str,
        bits: int = 32,
        integers: IntegerOptions | None = None,
        paddlex_name: str | None = None,
    ) -> Path:
        """Write the model for deployment; see `ppvision.deploy.export_model`."""
        return export_model(
            model,
            folder,
            input_shape=input_shape,
            output_op=output_op or "argmax",
            format=model_format,
            transforms=self.config.val_dataset_cfg.get("transforms", []),
            classes=self.class_names,
            task=self.task,
            bits=bits,
            max_value=self.max_value,
            paddlex_name=paddlex_name,
            **make_integer_arguments(integers),
        )

    @property
    def paddlex_name(self) -> str:
        return choose_default_name("segmentation", self.content["model"]["type"])


# -- checking what PaddleSeg does not --------------------------------------------------------------


def _check_transforms(options: dict, part: str) -> None:
    transforms = options.get("transforms") or []
    if not isinstance(transforms, list):
        raise ConfigError(
            f"config{place_of(options, 'transforms')}: {part}.transforms: expected a list, got "
            f"{shorten(transforms)}."
        )
    for number, transform in enumerate(transforms):
        if not isinstance(transform, dict) or "type" not in transform:
            raise ConfigError(
                f"config: {part}.transforms.{number}: expected {{type: NAME, ...}}, got "
                f"{shorten(transform)}."
            )


def _check_schedule(options: Located | None) -> None:
    if options is None:
        return
    schedules = {
        name: value
        for name, value in vars(paddle.optimizer.lr).items()
        if inspect.isclass(value) and issubclass(value, paddle.optimizer.lr.LRScheduler)
    }
    if "type" not in options:
        raise ConfigError("config: lr_scheduler: expected type, got none.")
    for key in ("learning_rate", "end_lr", "warmup_start_lr"):
        check_number(options, key, "lr_scheduler", low=0)
    schedule = Located(options, options.where)
    for key in ("warmup_iters", "warmup_start_lr"):  # PaddleSeg's own
        schedule.pop(key, None)
    check_components(schedule, schedules, "lr_scheduler")


def _name_optimizer(options: Located | None) -> None:
    """Convert old names that PaddleSeg's builder also accepts: `sgd`, `adam`, SGD with
    `momentum`."""
    if not isinstance(options, dict):
        return
    old = options.get("type")
    if not isinstance(old, str):
        return  # the check of components reports it
    name = {"sgd": "SGD", "adam": "Adam"}.get(old, old)
    if name == "SGD" and "momentum" in options:
        name = "Momentum"
    if name != old:
        options["type"] = name


def _check_clipping(optimizer: dict) -> None:
    options = optimizer.get("grad_clip_cfg")
    if not isinstance(options, dict):
        return
    kinds = ("ClipGradByGlobalNorm", "ClipGradByNorm", "ClipGradByValue")
    name = options.get("name")
    if name not in kinds:
        raise ConfigError(
            f"config{place_of(options, 'name')}: optimizer.grad_clip_cfg.name: got "
            f"{shorten(name)}. {suggest_nearest(str(name), list(kinds))}"
        )
    known = ["name", *inspect.signature(getattr(paddle.nn, name)).parameters]
    check_keys(options, known, "optimizer.grad_clip_cfg")
