"""Layered quantization in a configured job: what `slim_config` says, and a model at its widths.

A config's `slim_config` (or the file of `--slim_config`), with what is taken for a key left out:

    slim_config:
      bits: [8, 6, 4, 3, 2]      # widths to train
      objective: mean            # or sandwich: the highest, the lowest, one of the others by chance
      weights: null              # what each width's loss counts, in the order of bits
      distillation: 0.0          # of every width from the highest
      activations: false         # whether the inputs of layers are quantised as well
      steps: shared              # or per_width: a factor of its own for every width
      types: {}                  # rules by type, such as Linear: {min_bits: 4}
      layers: {}                 # rules by path, such as backbone.stages.*: {min_bits: 3}

A rule: `bits` (the same at every width of the model), or `min_bits` and `max_bits`; `activations`;
`float: true` leaves layers as they are. The layer that reads the picture, those that give the
result, and SDN's fusions stay at 8 bits unless `layers` names them.
"""

import copy
import logging
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.errors import EngineError, shorten
from ppvision.quant import load_layered
from ppvision.quant.codes import FLOAT_BITS
from ppvision.quant.packed import pack_model
from ppvision.quant.store.fetching import is_url
from ppvision.quant.store.state import LayeredState, layered_state
from ppvision.quant.train.losses import WeightedLosses
from ppvision.quant.train.once_qat import OBJECTIVES, OnceQAT
from ppvision.quant.train.quanters import DEFAULT_BITS
from ppvision.safe_yaml import Located
from ppvision.tasks.config import ConfigError, check_keys, check_number, read_yaml
from ppvision.zoo.registry import nearest
from ppvision.zoo.weights import WeightsError, assign_weights, read_weights

logger = logging.getLogger("ppvision")

KEYS = ("bits", "objective", "weights", "distillation", "activations", "steps", "types", "layers")
_DEFAULTS = {"activations": False, "bits": list(DEFAULT_BITS), "weights": None}
_OF_LOSSES = ("weights", "distillation")


def read_slim_config(path: str | Path) -> Located:
    """The file of `--slim_config`: the keys above, at its top or under `slim_config`.

    Raises:
        ConfigError: it does not read, or names something unknown.
    """
    content = read_yaml(path)
    options = content.get("slim_config", content)
    check_slim_config(options)
    return options


def check_slim_config(options: object) -> None:
    """Raise `ConfigError` for a key, type or value that is not known, with its place."""
    if not isinstance(options, dict):
        raise ConfigError(
            "config: slim_config: expected keys and values (slim_config: {} takes every default), "
            f"got {shorten(options)}."
        )
    check_keys(options, KEYS, "slim_config")
    check_number(options, "distillation", "slim_config", low=0)
    if math.isinf(options.get("distillation", 0.0)):
        raise ConfigError("config: slim_config.distillation: expected a finite number, got inf.")
    for key, kinds, what in (
        ("activations", bool, "true or false"),
        ("bits", list, "a list of widths such as [8, 4, 2]"),
        ("weights", list | None, "a number for each of bits"),
    ):
        value = options.get(key, _DEFAULTS[key])
        numbers = value if isinstance(value, list) else []
        if not isinstance(value, kinds) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)
            for n in numbers
        ):
            place = options.place(key) if isinstance(options, Located) else ""
            raise ConfigError(
                f"config{place}: slim_config.{key}: expected {what}, got {shorten(value)}."
            )
    for key, known in (("objective", OBJECTIVES), ("steps", ("shared", "per_width"))):
        if key in options and options[key] not in known:
            place = options.place(key) if isinstance(options, Located) else ""
            raise ConfigError(
                f"config{place}: slim_config.{key}: got {shorten(options[key])}. "
                f"{nearest(str(options[key]), list(known))}"
            )
    for key in ("types", "layers"):
        rules = options.get(key, {})
        if not isinstance(rules, dict) or not all(
            isinstance(name, str) and isinstance(rule, dict) for name, rule in rules.items()
        ):
            raise ConfigError(
                f"config: slim_config.{key}: expected a rule such as {{min_bits: 4}} under each "
                f"name (a number as a name in quotes), got {shorten(rules)}."
            )


def once_qat(model: nn.Layer, options: Mapping, ends: Sequence[str]) -> OnceQAT:
    """A model with quanters, ready to be trained at all widths.

    Args:
        model: in float, with the weights to start from; quantised in place.
        options: of `slim_config`, checked.
        ends: paths of the layers that read the picture or give the result, which stay at 8 bits.

    Raises:
        ConfigError: a rule that matches nothing, widths out of range.
    """
    from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config

    options = dict(options)
    objective = options.pop("objective", OBJECTIVES[0])
    weighing = {key: options.pop(key) for key in _OF_LOSSES if key in options}
    bits = options.get("bits", DEFAULT_BITS)
    try:
        config = slim_quant_config(model, ends=tuple(ends), **options)
        quantized = LayeredQAT(config).quantize(model, inplace=True)
        weigh = WeightedLosses(bits, **weighing)
        return OnceQAT(quantized, bits, objective=objective, weigh=weigh)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error


def has_quanters(names: Sequence[str]) -> bool:
    """Whether tensors of these names come from a model with quanters."""
    return any(".weight_quanter." in name for name in names)


def is_layered(model_path: str | Path) -> bool:
    """Whether it is to be read as a layered model: a folder or a URL, where weights are a file."""
    return is_url(str(model_path)) or Path(model_path).is_dir()


# -- training --------------------------------------------------------------------------------------


def passes(
    once: OnceQAT, losses: Callable[[nn.Layer, object], Sequence[Tensor]]
) -> dict[str, Callable[[nn.Layer, object], Sequence[Tensor]]]:
    """The forward passes of a training step, one a width, the highest first.

    Args:
        once: the model.
        losses: of one forward pass of it, already weighted.
    """

    def run(place: int, network: nn.Layer, batch: object) -> Sequence[Tensor]:
        once.train_at(once.drawn[place])
        return losses(network, batch)

    return {name: partial(run, place) for place, name in enumerate(once.names)}


def draw_widths(once: OnceQAT, seed: int, step: int) -> None:
    """Draw the widths of a step from seed and step alone: alike on all ranks and in a resume."""
    once.draw(random.Random(f"{seed}/{step}"))


def scores_by_width(
    model: nn.Layer, scores: Callable[[nn.Layer], dict[str, float]]
) -> dict[str, float]:
    """An evaluation; of a once-QAT at every width.

    Returns:
        Scores by tag. Of a once-QAT the mean over the widths under each tag (the first decides
        which model is the best), then every width's own: `Evaluate/mIoU_w4`.
    """
    if not isinstance(model, OnceQAT):
        return scores(model)
    before, found = model.bits, {}
    for k in model.widths:
        model.set_bits(k)
        found[k] = scores(model)
    model.set_bits(before)
    tags = [tag for tag in found[model.widths[0]] if all(tag in s for s in found.values())]
    means = {tag: float(np.mean([s[tag] for s in found.values()])) for tag in tags}
    return means | {f"{tag}_w{k}": s[tag] for k, s in found.items() for tag in tags}


# -- models at their widths ------------------------------------------------------------------------


class ModelWithWidths(ABC):
    """The part of a job that knows about widths; the rest of the job says what the model is.

    A job without `slim_config` has `model = float_model`; with it, `model` is a `OnceQAT` around
    the same layers.
    """

    content: dict
    class_names: list[str]

    @property
    @abstractmethod
    def float_model(self) -> nn.Layer:
        """The configured model without quanters; the same object at every call."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """A picture `[1, C, H, W]` that the model takes."""

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Weights to start training from, under the float model's names, and the layers that they
        may lack."""
        return arrays, []

    @property
    def ends(self) -> Sequence[str]:
        """Paths of the layers that read the picture or give the result."""
        from ppvision.plugins.paddleslim import end_layers

        return end_layers(self.float_model, self.example)

    @property
    def slim_options(self) -> Mapping[str, object] | None:
        """How the model is quantised; None for a job in float."""
        return self.content.get("slim_config")

    @property
    def architecture(self) -> dict[str, object]:
        """What a layered model says of what it is: task, model, transforms and classes, no
        paths."""
        return {
            "task": self.content.get("task", "segmentation"),
            "model": without_paths(self.content["model"]),
            "transforms": (self.content.get("val_dataset") or {}).get("transforms", []),
            "classes": list(self.class_names),
        }

    def prepare_training(self) -> None:  # noqa: B027  (most jobs need nothing)
        """What the data need once before the first step."""

    @cached_property
    def model(self) -> nn.Layer:
        options = self.slim_options
        if options is None:
            return self.float_model
        return once_qat(self.float_model, options, self.ends)

    def start_from(self, model_path: str | Path) -> None:
        """Give the model weights to train from: a float model's, before quanters take their first
        steps from them, or those of a once-QAT that was trained before.

        Raises:
            WeightsError: they do not fit.
        """
        arrays = read_weights(model_path)
        if has_quanters(arrays):
            self._check_quanters_wanted(model_path)
            assign_weights(self.model, arrays, str(model_path))
            return
        arrays, absent = self.fitting(arrays)
        new = [f"{name}.*" for name in absent]
        assign_weights(self.float_model, arrays, str(model_path), allow_missing=new)
        if absent:
            logger.info(f"weights: {model_path} has no {', '.join(absent)}: it starts untrained")

    def _check_quanters_wanted(self, model_path: str | Path) -> None:
        if "slim_config" not in self.content:
            raise ConfigError(
                f"config: expected slim_config with {model_path}, which was trained by once-QAT, "
                "got none. Pass the run folder's config.yml, or --slim_config with the file it was "
                "trained with."
            )

    def models(
        self, model_path: str | Path, bits: Sequence[int] | None = None
    ) -> Iterator[tuple[int, nn.Layer]]:
        """The model with weights from a file, the zoo or a layered model, at one width after
        another; each is to be used before the next is asked for.

        Args:
            model_path: float weights, a checkpoint of once-QAT, or a layered model's folder or URL.
                Float weights with a `slim_config` are quantised as they are, without any training.
            bits: widths; None for all that it was trained at.

        Yields:
            The width, 32 for a model in float, and the model.

        Raises:
            ConfigError: widths of a model in float.
            WeightsError, LayeredModelError: they do not fit, or do not read.
        """
        if is_layered(model_path):
            loaded = load_layered(model_path, max(bits) if bits else None)
            held = [k for k in loaded.state.bits if k <= loaded.bits]
            if loaded.bits not in held:  # files are missing: the highest that is there comes first
                held.insert(0, loaded.bits)
            for k in bits or held:
                yield k, pack_model(self.structure(), loaded.state, k)
            return
        self._load(model_path)
        if isinstance(self.model, OnceQAT):
            for k in bits or self.model.widths:
                self.model.set_bits(k)
                yield k, self.model
        elif bits:
            raise ConfigError(
                f"--bits {' '.join(map(str, bits))}: expected a model with widths: a layered "
                "model, or a checkpoint of once-QAT with its slim_config. This one is in float."
            )
        else:
            yield FLOAT_BITS, self.model

    def load(self, model_path: str | Path, bits: int | None = None) -> nn.Layer:
        """The model at one width, by default the highest; see `models`."""
        _, model = next(self.models(model_path, None if bits is None else [bits]))
        return model

    def state(self, model_path: str | Path, bits: int | None = None) -> LayeredState:
        """The model taken apart into layers; arguments as of `load`.

        Raises:
            ConfigError: a model in float.
        """
        if is_layered(model_path):
            return load_layered(model_path, bits).state
        self._load(model_path)
        if not isinstance(self.model, OnceQAT):
            raise ConfigError(
                f"{model_path}: expected a model with widths: a layered model, or weights and a "
                "slim_config (--slim_config). This one is in float."
            )
        return layered_state(self.model.model, self.model.widths)

    def load_float(self, model_path: str | Path) -> nn.Layer:
        """The model for an export without codes: of one with widths the highest, as float weights.

        Raises:
            as `models`.
        """
        if not is_layered(model_path) and "slim_config" not in self.content:
            return self.load(model_path)
        state = self.state(model_path)
        return pack_model(self.structure(), state, state.held_bits, codes=False)

    def structure(self) -> nn.Layer:
        """A copy of the model for `pack_model`: its layers, whatever their weights."""
        built = vars(self).get("model")  # quanters are not made for this
        return copy.deepcopy(built.model if isinstance(built, OnceQAT) else self.float_model)

    def _load(self, model_path: str | Path) -> None:
        arrays = read_weights(model_path)
        if has_quanters(arrays):
            self._check_quanters_wanted(model_path)
            assign_weights(self.model, arrays, str(model_path))
            return
        if isinstance(vars(self).get("model"), OnceQAT):
            raise EngineError(
                f"{model_path}: expected float weights before the model has its quanters, whose "
                "steps come from them. Open the job anew."
            )
        _, absent = self.fitting(arrays)
        if absent:
            raise WeightsError(
                f"{model_path}: expected weights of {', '.join(absent)} as well, got those of a "
                "model without SDN, which would be untrained. Train with them (train "
                "--model_path), or take the config that they were trained with."
            )
        assign_weights(self.float_model, arrays, str(model_path))
        if "slim_config" in self.content:
            logger.info(f"quantization: {model_path} is in float: quantised without any training")


def without_paths(node: object) -> object:
    """Part of a config without the weights that training began with."""
    if isinstance(node, dict):
        return {key: without_paths(v) for key, v in node.items() if key != "pretrained"}
    return [without_paths(item) for item in node] if isinstance(node, list) else node


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as aligned columns; floats with four digits."""

    def shown(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def example_input(channels: int, side: int) -> Tensor:
    """A picture of noise `[1, channels, side, side]`."""
    generator = np.random.default_rng(0)
    return paddle.to_tensor(generator.normal(size=[1, channels, side, side]).astype(np.float32))
