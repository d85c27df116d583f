"""The contract of a configured job: the interface of a task, and the code that all tasks share.

A task (`segmentation/`, `classification/`, `detection/`) is a subclass of `Job`, in float and
without widths. `multibit.job.MultiBitJob` wraps a job whose config has a `slim_config`. The verbs
of the command line, `tasks.training` and `multibit` use only this contract.

A part is built at its first use. The order of first uses has no effect on the result: a part
depends only on the config and on the parts that its definition names.
"""

import copy
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.data.check.summary import DataSummary
from ppvision.data.class_zip import ZipPath
from ppvision.deploy import Predictor
from ppvision.deploy.write.integers import IntegerOptions
from ppvision.engine.trainer import ForwardPass
from ppvision.quant import describe_layered, load_layered
from ppvision.quant.codes import FLOAT_BITS
from ppvision.quant.packed import pack_model
from ppvision.quant.store.state import LayeredState
from ppvision.safe_yaml import Located
from ppvision.tasks.config import ConfigError
from ppvision.tasks.multibit.layered import (
    has_quanters,
    is_layered,
    open_layered_models,
)
from ppvision.tasks.prediction import Picture, predict_exported
from ppvision.zoo.cards import find_card
from ppvision.zoo.weights import WeightsError, assign_weights, read_weights

logger = logging.getLogger("ppvision")


class Scores(Protocol):
    """The result of an evaluation."""

    def by_tag(self) -> dict[str, float]:
        """Return `Evaluate/mIoU`, ...; the first score decides which model is the best."""

    def table(self, names: list[str]) -> str:
        """Format the scores as text; `names` are those of the classes, or empty for numbers."""


class Job(ABC):
    """One configured job.

    Args:
        name: name of the config.
        allow_download: download `pretrained` weights of PaddleSeg's and PaddleDetection's
            components if the config gives a URL. Default no.

    Attributes:
        name, allow_download: the arguments.
        content: the resolved config in plain values, as in a run folder's config.yml.
        task: name of the task in a config's `task`.
        takes_tags: whether its configs may have YAML tags (`!COCODataSet`).
        override_keys: the config's key (`a.b`) of each override that has one: `batch_size`,
            `learning_rate`, `iters`, `epochs`; see `apply_overrides`.
        evaluation_options: names of further arguments of `evaluate` and `evaluate_exported`.
        score_tags: tags of an evaluation; the first decides the best model.
        has_logits: whether a forward pass returns logits, which distillation needs.
    """

    task: ClassVar[str]
    takes_tags: ClassVar[bool] = False
    override_keys: ClassVar[Mapping[str, str]]
    evaluation_options: Sequence[str] = ()
    has_logits: bool = True

    if TYPE_CHECKING:  # a task has an attribute or a property

        @property
        def content(self) -> dict: ...

        @property
        def score_tags(self) -> Sequence[str]: ...

    def __init__(self, name: str, *, allow_download: bool = False) -> None:
        self.name = name
        self.allow_download = allow_download

    # -- what the config says ------------------------------------------------------------------

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Return the number of samples per batch and process."""

    @property
    @abstractmethod
    def iters(self) -> int:
        """Return the number of optimiser steps. If the config counts epochs, the training set is
        opened."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Return one name per class; empty if the data set is not on disk or has no names."""

    @property
    @abstractmethod
    def max_value(self) -> int | None:
        """Return the value of white in images of more than 8 bits per channel; see `read_picture`.
        None: 8 bits."""

    @property
    def architecture(self) -> dict[str, object]:
        """Return the description of a layered model: task, model, transforms and classes, without
        paths."""
        return {
            "task": self.task,
            "model": drop_paths(self.content["model"]),
            "transforms": (self.content.get("val_dataset") or {}).get("transforms", []),
            "classes": list(self.class_names),
        }

    # -- the model -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def float_model(self) -> nn.Layer:
        """Return the configured model in float; the same object at every call.

        Its initial weights come from Paddle's random generator at the first call.
        """

    @property
    def model(self) -> nn.Layer:
        """Return the trained model; the same object at every call. In float: `float_model`."""
        return self.float_model

    @property
    @abstractmethod
    def example(self) -> Tensor | dict[str, Tensor]:
        """Return an image `[1, C, H, W]` for the model, which shows which layers run."""

    @property
    def result_layers(self) -> Sequence[str] | None:
        """Return paths of the layers that give the result. None (default): layers with as many
        channels as the model's outputs."""
        return None

    @property
    def constant_layers(self) -> Sequence[str]:
        """Return paths of layers whose weights are constants of the architecture. Default: none."""
        return ()

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Return weights with the float model's names, and the layers without weights. Training may
        start without these."""
        return arrays, []

    def structure(self) -> nn.Layer:
        """Return a copy of the float model for `pack_model`: its layers with any weights."""
        return copy.deepcopy(self.float_model)

    # -- train ---------------------------------------------------------------------------------

    @abstractmethod
    def check_data(self, *parts: str) -> dict[str, DataSummary]:
        """Check every sample of `train_dataset` / `val_dataset`, the names in `parts`; return their
        contents.

        Raises:
            DataError: one report of all problems.
            ConfigError: the config does not have the part.
        """

    @property
    @abstractmethod
    def train_dataset(self) -> paddle.io.Dataset:
        """Return the training samples; the same object at every call."""

    @property
    @abstractmethod
    def batched(self) -> Callable[[list], object]:
        """Collate the samples of a batch."""

    @abstractmethod
    def make_optimizer(self, model: nn.Layer) -> paddle.optimizer.Optimizer:
        """Make the config's optimiser and schedule for the parameters of `model`, which has the
        layers of `float_model`."""

    @cached_property
    def optimizer(self) -> paddle.optimizer.Optimizer:
        """Return `make_optimizer` for `model`."""
        return self.make_optimizer(self.model)

    @abstractmethod
    def forward(self, network: nn.Layer, batch: Any) -> Any:
        """Run one forward pass on a batch of `batched`, as tensors.

        Args:
            network: `model`, also inside `paddle.DataParallel`.
            batch: batch of the pass.

        Returns:
            Logits `[B, K, ...]`, or a list of them; `predict` uses the first. Without `has_logits`,
            any input of `losses_of`.
        """

    @abstractmethod
    def losses_of(self, model: nn.Layer, outputs: Any, batch: Any) -> list[Tensor]:
        """Return the losses of a forward pass; their sum is minimised.

        Args:
            model: a model with the layers of `float_model`; it may compute losses itself.
            outputs: the result of `forward`.
            batch: batch of the same pass.
        """

    def losses(self, network: nn.Layer, batch: Any) -> list[Tensor]:
        """Return the losses of one forward pass; their sum is minimised. Arguments as in
        `forward`."""
        outputs = self.forward(network, batch)
        return self.losses_of(unwrap_parallel(network), outputs, batch)

    def make_passes(self) -> ForwardPass | dict[str, ForwardPass]:
        """Return the forward passes of a training step; see `engine.trainer.Trainer`. In float:
        one."""
        return self.losses

    def begin_step(self, seed: int, step: int) -> None:  # noqa: B027  (nothing in float)
        """Called before each training step, with the run's seed and the step from 1."""

    def prepare_training(self) -> None:  # noqa: B027  (most tasks need nothing)
        """Prepare the data once before the first step, for example with a teacher's answers. It is
        called on every rank, after all checks."""

    # -- evaluate ------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Layer, *, num_workers: int = 0) -> Scores:
        """Score a model on the val split; every rank calls it.

        Args:
            model: a model of `models`, or `model`.
            num_workers: processes that read images. Default 0: this one reads.

        A task also accepts its `evaluation_options`.
        """

    @abstractmethod
    def evaluate_exported(
        self, model_dir: str | Path, *, device: str = "cpu", precision: str = "auto"
    ) -> Scores:
        """Score an exported folder on the val split, through Paddle Inference.

        Args:
            model_dir: the folder.
            device: cpu (default) or gpu.
            precision: see `ppvision.deploy.Predictor`.

        A task also accepts its `evaluation_options`.

        Raises:
            ConfigError: the export has another task or other classes.
        """

    def calibration_pictures(self) -> Sequence[Path | ZipPath]:
        """Return images of the training set, in order, for the calibration of an export in
        integers.

        Raises:
            ConfigError: the task has no export in integers.
        """
        raise ConfigError(
            "export --int8: applies to segmentation and classification, got a config of "
            f"{self.task}."
        )

    def scores(self, model: nn.Layer, *, num_workers: int = 0) -> dict[str, float]:
        """Return the scores of `evaluate` by tag."""
        return self.evaluate(model, num_workers=num_workers).by_tag()

    @abstractmethod
    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Return panels `[H, W, 3]` uint8 RGB of fixed validation samples, by name."""

    # -- predict -------------------------------------------------------------------------------

    @abstractmethod
    def predict_image(self, model: nn.Layer, picture: Picture) -> object:
        """Return a model's prediction for one image, the same that `evaluate` would score.

        Args:
            model: a model of `models`, or `model`.
            picture: a path, or pixels `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the file cannot be read.
        """

    @property
    @abstractmethod
    def writer(self) -> Callable[..., list[str]]:
        """Return the task's function of `ppvision.tasks.prediction` that writes predictions, with
        options of the config."""

    def predict_to_folder(
        self,
        model: nn.Layer,
        image_path: str | Path,
        folder: str | Path,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Write the predictions of a model for images.

        Args:
            model: a model of `models`, or `model`.
            image_path: an image, a folder or a list file.
            folder: folder for the results.
            stopped: function that is called before every image; if it returns true, no further
                image is predicted. Default: never.

        Returns and raises: see `ppvision.tasks.prediction.predict_to_folder`.
        """
        return self.writer(
            lambda path, image: self.predict_image(model, image),
            image_path,
            folder,
            stopped=stopped,
            max_value=self.max_value,
        )

    def predict_exported_to_folder(
        self,
        predictor: Predictor,
        image_path: str | Path,
        folder: str | Path,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Write the predictions of an exported folder, whose deploy.yaml says how it predicts.

        Args:
            predictor: predictor of the folder.
            image_path, folder, stopped: see `predict_to_folder`.

        Returns and raises: see `ppvision.tasks.prediction.predict_exported`.
        """
        return predict_exported(predictor, image_path, folder, stopped=stopped)

    # -- export --------------------------------------------------------------------------------

    @abstractmethod
    def export(
        self,
        model: nn.Layer,
        folder: str | Path,
        *,
        input_shape: list[int | None],
        output_op: str | None,
        model_format: str,
        bits: int = FLOAT_BITS,
        integers: IntegerOptions | None = None,
        paddlex_name: str | None = None,
    ) -> Path:
        """Write a model for deployment, and compare the export with it.

        Args:
            model: a model of `load_float` or `pack_model`.
            folder: folder of the export.
            input_shape: `[N, C, H, W]`, None for sizes that may change.
            output_op: final operator added after the logits; None for the task's own.
            model_format: "paddle" or "onnx".
            bits: width of the model's codes. Default 32: none.
            integers: options for 8-bit integer products. Default None: products stay in float.
            paddlex_name: also write PaddleX's files, with this name of PaddleX. Default None: no
                files for PaddleX.

        Returns:
            The folder.

        Raises:
            ConfigError: the task cannot export this.
            ParityError: the export gives other numbers than the model.
        """

    @property
    @abstractmethod
    def paddlex_name(self) -> str:
        """Return the name under which PaddleX reads an export of this model."""

    # -- open weights --------------------------------------------------------------------------

    def start_from(self, model_path: str | Path) -> None:
        """Give the model initial weights for a training.

        Args:
            model_path: a file, a folder or a name of the zoo; see `read_weights`.

        Raises:
            ConfigError: the weights are those of a model with quanters.
            WeightsError: they do not fit.
        """
        self.start_from_arrays(read_float_weights(model_path), model_path)

    def start_from_arrays(self, arrays: Mapping[str, np.ndarray], model_path: str | Path) -> None:
        """Like `start_from`, for arrays that were read already; `model_path` is for messages."""
        arrays, absent = self.fitting(arrays)
        new = [f"{name}.*" for name in absent]
        assign_weights(self.float_model, arrays, str(model_path), allow_missing=new)
        if absent:
            logger.info(f"weights: {model_path} has no {', '.join(absent)}: it starts untrained")

    def load_arrays(self, arrays: Mapping[str, np.ndarray], model_path: str | Path) -> None:
        """Give the float model the weights of a trained one; `model_path` is for messages.

        Raises:
            WeightsError: they do not fit, or layers are missing.
        """
        _, absent = self.fitting(arrays)
        if absent:
            raise WeightsError(
                f"{model_path}: expected weights of {', '.join(absent)} as well, got those of a "
                "model without SDN, which would be untrained. Train with them (train "
                "--model_path), or take the config that they were trained with."
            )
        assign_weights(self.float_model, arrays, str(model_path))

    def models(
        self, model_path: str | Path, bits: Sequence[int] | None = None
    ) -> Iterator[tuple[int, nn.Layer]]:
        """Yield the model with weights from a file, the zoo or a layered model, at one width after
        another. Use each before the next is requested.

        Args:
            model_path: float weights, or a layered model's folder or URL. A `MultiBitJob` also
                accepts a checkpoint of once-QAT, and quantises float weights without training.
            bits: widths. Default None: all existing widths.

        Yields:
            The width and the model. The width is 32 for a model in float. Without `bits`, a name of
            the zoo gives one model: the highest width of its layered model.

        Raises:
            ConfigError: widths are given for a model in float.
            WeightsError, LayeredModelError: they do not fit, or cannot be read.
        """
        if bits:
            model_path = _with_widths(model_path)
        if is_layered(model_path):
            yield from open_layered_models(self.structure, model_path, bits)
            return
        self.load_arrays(read_float_weights(model_path), model_path)
        if bits:
            raise ConfigError(
                f"--bits {' '.join(map(str, bits))}: expected a model with widths: a layered "
                "model, or a checkpoint of once-QAT with its slim_config. This one is in float."
            )
        width = _highest_width(model_path)
        if width != FLOAT_BITS:
            logger.info(f"{model_path}: weights of {width} bits, the highest width in the zoo")
        yield width, self.float_model

    def load(self, model_path: str | Path, bits: int | None = None) -> nn.Layer:
        """Return the model at one width, by default the highest; see `models`."""
        _, model = next(self.models(model_path, None if bits is None else [bits]))
        return model

    def load_float(self, model_path: str | Path) -> nn.Layer:
        """Return the model for an export without codes. If it has widths, the highest is used as
        float weights.

        Raises:
            as `models`.
        """
        if not is_layered(model_path):
            return self.load(model_path)
        state = self.state(model_path)
        return pack_model(self.structure(), state, state.held_bits, codes=False)

    def state(self, model_path: str | Path, bits: int | None = None) -> LayeredState:
        """Return the model split into layers of bits; arguments as in `load`.

        Raises:
            ConfigError: the model is in float.
        """
        model_path = _with_widths(model_path)
        if is_layered(model_path):
            return load_layered(model_path, bits).state
        self.load_arrays(read_float_weights(model_path), model_path)
        raise ConfigError(
            f"{model_path}: expected a model with widths: a layered model, or weights and a "
            "slim_config (--slim_config). This one is in float."
        )


def _with_widths(model_path: str | Path) -> str | Path:
    """Return the layered model of a name in the zoo, or the given path; an existing file has
    priority."""
    card = None if os.path.exists(model_path) else find_card(str(model_path))
    if card is None or not (card.folder / "manifest.json").is_file():
        return model_path
    return card.folder


def _highest_width(model_path: str | Path) -> int:
    """Return the width of the weights of `read_weights`: 32 for a file in float."""
    folder = _with_widths(model_path)
    return max(describe_layered(folder).bits) if is_layered(folder) else FLOAT_BITS


def read_float_weights(model_path: str | Path) -> Mapping[str, np.ndarray]:
    """Apply `read_weights` for a job in float.

    Raises:
        ConfigError: the weights are those of a model with quanters.
    """
    arrays = read_weights(model_path)
    if has_quanters(arrays):
        raise ConfigError(
            f"config: expected slim_config with {model_path}, which was trained by once-QAT, "
            "got none. Pass the run folder's config.yml, or --slim_config with the file it was "
            "trained with."
        )
    return arrays


def apply_overrides(
    content: Located,
    keys: Mapping[str, str],
    *,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    iters: int | None = None,
    epochs: int | None = None,
) -> dict[str, object]:
    """Write overrides into a config before its task reads it.

    Args:
        content: the config; changed in place.
        keys: `Job.override_keys` of its task.
        batch_size, learning_rate, iters, epochs: None (default) keeps the config's.

    Returns:
        The overrides without a key in the task's configs, by name. The constructor accepts them.
    """
    overrides = {
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "iters": iters,
        "epochs": epochs,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    lengths = {"iters", "epochs"}
    if lengths <= keys.keys() and lengths & given.keys():
        # Two keys for one length: a config has one of them.
        for name in lengths:
            content.pop(keys[name], None)
        if "epochs" in given:
            given.pop("iters", None)
    for name, value in given.items():
        if name not in keys:
            continue
        *parents, last = keys[name].split(".")
        node = content
        for parent in parents:
            node = node.setdefault(parent, Located({}, {}))
        if isinstance(node, dict):  # otherwise the check of the config reports it
            node[last] = value
    return {name: value for name, value in given.items() if name not in keys}


def unwrap_parallel(network: nn.Layer) -> nn.Layer:
    """Return the model inside a data-parallel wrapper, or the network itself."""
    return network._layers if isinstance(network, paddle.DataParallel) else network


def drop_paths(node: object) -> object:
    """Return a part of a config without the initial weights of the training."""
    if isinstance(node, dict):
        return {key: drop_paths(v) for key, v in node.items() if key != "pretrained"}
    return [drop_paths(item) for item in node] if isinstance(node, list) else node


def make_example_input(channels: int, side: int) -> Tensor:
    """Return an image of noise `[1, channels, side, side]`."""
    generator = np.random.default_rng(0)
    return paddle.to_tensor(generator.normal(size=[1, channels, side, side]).astype(np.float32))
