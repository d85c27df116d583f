"""The contract of a configured job: what a task says of itself, and what all tasks share.

A task (`segmentation/`, `classification/`, `detection/`) is a subclass of `Job`, in float and
without widths. `multibit.job.MultiBitJob` wraps one whose config has a `slim_config`. The verbs of
the command line, `tasks.training` and `multibit` know a job by this contract alone.

A part is built at its first use. The order of first uses has no effect on what is built: a part
depends on the config and on the parts that its definition names, never on which of them exist.
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
    """What an evaluation found."""

    def by_tag(self) -> dict[str, float]:
        """`Evaluate/mIoU`, ...; the first decides which model is the best."""

    def table(self, names: list[str]) -> str:
        """The scores as text; `names` of the classes, or empty for numbers."""


class Job(ABC):
    """One configured job.

    Args:
        name: of the config.
        allow_download: fetch the `pretrained` weights of PaddleSeg's and PaddleDetection's
            components where the config gives an address. Default no.

    Attributes:
        name, allow_download: the same.
        content: the resolved config, plain, as a run folder's config.yml keeps it.
        task: its name in a config's `task`.
        takes_tags: whether its configs may have YAML tags (`!COCODataSet`).
        override_keys: the config's key (`a.b`) of each override that has one: `batch_size`,
            `learning_rate`, `iters`, `epochs`; see `apply_overrides`.
        evaluation_options: names of what `evaluate` and `evaluate_exported` take beyond the model.
        score_tags: of an evaluation; the first decides the best model.
        has_logits: whether a forward pass gives logits, which distillation compares.
    """

    task: ClassVar[str]
    takes_tags: ClassVar[bool] = False
    override_keys: ClassVar[Mapping[str, str]]
    evaluation_options: Sequence[str] = ()
    has_logits: bool = True

    if TYPE_CHECKING:  # an attribute or a property, as a task needs

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
        """Samples per batch and process."""

    @property
    @abstractmethod
    def iters(self) -> int:
        """Optimiser steps. Where the config counts epochs, the training set is opened."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """One for each class; empty where the data set is not on disk or does not name them."""

    @property
    @abstractmethod
    def max_value(self) -> int | None:
        """White in images of more than 8 bits per channel; see `read_picture`. None: 8 bits."""

    @property
    def architecture(self) -> dict[str, object]:
        """What a layered model says of what it is: task, model, transforms and classes, no
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
        """The configured model in float; the same object at every call.

        Its first weights come from Paddle's random generator at the first call.
        """

    @property
    def model(self) -> nn.Layer:
        """What is trained; the same object at every call. In float: `float_model`."""
        return self.float_model

    @property
    @abstractmethod
    def example(self) -> Tensor | dict[str, Tensor]:
        """An image `[1, C, H, W]` as the model takes it, to see which layers run."""

    @property
    def result_layers(self) -> Sequence[str] | None:
        """Paths of the layers that give the result. None (default): those that have as many
        channels as the model's outputs."""
        return None

    @property
    def constant_layers(self) -> Sequence[str]:
        """Paths of layers whose weights are constants of the architecture. Default: none."""
        return ()

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Weights under the float model's names, and the layers that they have nothing for.
        Training may start without these."""
        return arrays, []

    def structure(self) -> nn.Layer:
        """A copy of the float model for `pack_model`: its layers, whatever their weights."""
        return copy.deepcopy(self.float_model)

    # -- train ---------------------------------------------------------------------------------

    @abstractmethod
    def check_data(self, *parts: str) -> dict[str, DataSummary]:
        """Look at every sample of `train_dataset` / `val_dataset`, the names in `parts`; says what
        is in each.

        Raises:
            DataError: one report of everything that is wrong.
            ConfigError: a part that the config does not have.
        """

    @property
    @abstractmethod
    def train_dataset(self) -> paddle.io.Dataset:
        """Training samples; the same object at every call."""

    @property
    @abstractmethod
    def batched(self) -> Callable[[list], object]:
        """Puts the samples of a batch together."""

    @abstractmethod
    def make_optimizer(self, model: nn.Layer) -> paddle.optimizer.Optimizer:
        """The config's optimiser and schedule over the parameters of `model`, which has the layers
        of `float_model`."""

    @cached_property
    def optimizer(self) -> paddle.optimizer.Optimizer:
        """`make_optimizer` of `model`."""
        return self.make_optimizer(self.model)

    @abstractmethod
    def forward(self, network: nn.Layer, batch: Any) -> Any:
        """One forward pass over what `batched` made, as tensors.

        Args:
            network: `model`, also inside `paddle.DataParallel`.
            batch: of the pass.

        Returns:
            Logits `[B, K, ...]`, or a list of them whose first is what `predict` takes. Without
            `has_logits`, anything that `losses_of` takes.
        """

    @abstractmethod
    def losses_of(self, model: nn.Layer, outputs: Any, batch: Any) -> list[Tensor]:
        """The losses of a forward pass; their sum counts.

        Args:
            model: with the layers of `float_model`; it may compute losses itself.
            outputs: of `forward`.
            batch: of the same pass.
        """

    def losses(self, network: nn.Layer, batch: Any) -> list[Tensor]:
        """The losses of one forward pass; their sum counts. Arguments as of `forward`."""
        outputs = self.forward(network, batch)
        return self.losses_of(unwrap_parallel(network), outputs, batch)

    def make_passes(self) -> ForwardPass | dict[str, ForwardPass]:
        """The forward passes of a training step; see `engine.trainer.Trainer`. In float: one."""
        return self.losses

    def begin_step(self, seed: int, step: int) -> None:  # noqa: B027  (nothing in float)
        """Called before each training step, with the run's seed and the step from 1."""

    def prepare_training(self) -> None:  # noqa: B027  (most tasks need nothing)
        """What the data need once before the first step, such as a teacher's answers. Called on
        every rank, after all that can refuse."""

    # -- evaluate ------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Layer, *, num_workers: int = 0) -> Scores:
        """Score a model on the val split, on every rank at once.

        Args:
            model: one that `models` gives, or `model`.
            num_workers: processes that read images. Default 0: this one reads.

        A task takes its `evaluation_options` as well.
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

        A task takes its `evaluation_options` as well.

        Raises:
            ConfigError: an export of another task or of other classes.
        """

    def calibration_pictures(self) -> Sequence[Path | ZipPath]:
        """Images of the training set, in its order: what an export in integers is calibrated on.

        Raises:
            ConfigError: a task whose export has no integers.
        """
        raise ConfigError(
            "export --int8: applies to segmentation and classification, got a config of "
            f"{self.task}."
        )

    def scores(self, model: nn.Layer, *, num_workers: int = 0) -> dict[str, float]:
        """`evaluate`, by tag."""
        return self.evaluate(model, num_workers=num_workers).by_tag()

    @abstractmethod
    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Panels `[H, W, 3]` uint8 RGB of fixed validation samples, by name."""

    # -- predict -------------------------------------------------------------------------------

    @abstractmethod
    def predict_image(self, model: nn.Layer, picture: Picture) -> object:
        """What a model predicts for one image, as `evaluate` would score it.

        Args:
            model: one that `models` gives, or `model`.
            picture: a path, or pixels `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: a file that does not read.
        """

    @property
    @abstractmethod
    def writer(self) -> Callable[..., list[str]]:
        """The task's function of `ppvision.tasks.prediction` that writes predictions, with what the
        config says of it."""

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
            model: one that `models` gives, or `model`.
            image_path: an image, a folder or a list file.
            folder: where results go.
            stopped: asked before every image; when true, no further one is predicted. Default:
                never.

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
        """Write the predictions of an exported folder, which says by itself how it predicts.

        Args:
            predictor: of the folder.
            image_path, folder, stopped: as of `predict_to_folder`.

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
            model: one that `load_float` or `pack_model` gives.
            folder: the export's.
            input_shape: `[N, C, H, W]`, None for what may change.
            output_op: final operator added after the logits; None for the task's own.
            model_format: "paddle" or "onnx".
            bits: width of the model's codes. Default 32: none.
            integers: how products become 8-bit integers. Default None: they stay in float.
            paddlex_name: write PaddleX's files too, under this name of its own. Default None: not.

        Returns:
            The folder.

        Raises:
            ConfigError: what the task cannot export.
            ParityError: the export gives other numbers than the model.
        """

    @property
    @abstractmethod
    def paddlex_name(self) -> str:
        """The name under which PaddleX reads an export of this model."""

    # -- open weights --------------------------------------------------------------------------

    def start_from(self, model_path: str | Path) -> None:
        """Give the model weights to train from.

        Args:
            model_path: a file, a folder or a name of the zoo; see `read_weights`.

        Raises:
            ConfigError: weights of a model with quanters.
            WeightsError: they do not fit.
        """
        self.start_from_arrays(read_float_weights(model_path), model_path)

    def start_from_arrays(self, arrays: Mapping[str, np.ndarray], model_path: str | Path) -> None:
        """`start_from` for arrays that were read already; `model_path` is for messages."""
        arrays, absent = self.fitting(arrays)
        new = [f"{name}.*" for name in absent]
        assign_weights(self.float_model, arrays, str(model_path), allow_missing=new)
        if absent:
            logger.info(f"weights: {model_path} has no {', '.join(absent)}: it starts untrained")

    def load_arrays(self, arrays: Mapping[str, np.ndarray], model_path: str | Path) -> None:
        """Give the float model the weights of a trained one; `model_path` is for messages.

        Raises:
            WeightsError: they do not fit, or lack layers.
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
        """The model with weights from a file, the zoo or a layered model, at one width after
        another; each is to be used before the next is asked for.

        Args:
            model_path: float weights, or a layered model's folder or URL. A `MultiBitJob` also
                takes a checkpoint of once-QAT, and quantises float weights as they are.
            bits: widths. Default None: all that there are.

        Yields:
            The width and the model. The width is 32 for a model in float. Without `bits`, a name of
            the zoo gives one model: the highest width of its layered model.

        Raises:
            ConfigError: widths of a model in float.
            WeightsError, LayeredModelError: they do not fit, or do not read.
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
        """The model at one width, by default the highest; see `models`."""
        _, model = next(self.models(model_path, None if bits is None else [bits]))
        return model

    def load_float(self, model_path: str | Path) -> nn.Layer:
        """The model for an export without codes: of one with widths the highest, as float weights.

        Raises:
            as `models`.
        """
        if not is_layered(model_path):
            return self.load(model_path)
        state = self.state(model_path)
        return pack_model(self.structure(), state, state.held_bits, codes=False)

    def state(self, model_path: str | Path, bits: int | None = None) -> LayeredState:
        """The model taken apart into layers of bits; arguments as of `load`.

        Raises:
            ConfigError: a model in float.
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
    """The layered model of a name in the zoo, or else the given path; an existing file wins."""
    card = None if os.path.exists(model_path) else find_card(str(model_path))
    if card is None or not (card.folder / "manifest.json").is_file():
        return model_path
    return card.folder


def _highest_width(model_path: str | Path) -> int:
    """The width of the weights that `read_weights` gives: 32 for a file in float."""
    folder = _with_widths(model_path)
    return max(describe_layered(folder).bits) if is_layered(folder) else FLOAT_BITS


def read_float_weights(model_path: str | Path) -> Mapping[str, np.ndarray]:
    """`read_weights` for a job in float.

    Raises:
        ConfigError: weights of a model with quanters.
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
    """Write overrides into a config, before its task sees it.

    Args:
        content: the config; changed in place.
        keys: `Job.override_keys` of its task.
        batch_size, learning_rate, iters, epochs: None (default) keeps the config's.

    Returns:
        The overrides for which the task's configs have no key, by name. Its constructor takes them.
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
        # Two keys for one length: a config holds one of them.
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
        if isinstance(node, dict):  # else the check of the config says what it is
            node[last] = value
    return {name: value for name, value in given.items() if name not in keys}


def unwrap_parallel(network: nn.Layer) -> nn.Layer:
    """The model inside a data-parallel wrapper, or the network itself."""
    return network._layers if isinstance(network, paddle.DataParallel) else network


def drop_paths(node: object) -> object:
    """Part of a config without the weights that training began with."""
    if isinstance(node, dict):
        return {key: drop_paths(v) for key, v in node.items() if key != "pretrained"}
    return [drop_paths(item) for item in node] if isinstance(node, list) else node


def make_example_input(channels: int, side: int) -> Tensor:
    """An image of noise `[1, channels, side, side]`."""
    generator = np.random.default_rng(0)
    return paddle.to_tensor(generator.normal(size=[1, channels, side, side]).astype(np.float32))
