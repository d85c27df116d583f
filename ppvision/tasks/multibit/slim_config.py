"""The keys of `slim_config`, which describes the quantisation of a model in layers of bits.

This is the `slim_config` of a config (or the file of `--slim_config`) with all keys and defaults:

    slim_config:
      bits: [8, 6, 4, 3, 2]      # widths to train
      objective: mean            # or sandwich: the highest, the lowest, and one random other width
      weights: null              # weight of each width's loss, in the order of bits
      distillation: 0.0          # weight of the divergence from the highest width
      activations: false         # true: inputs of layers have as many bits; 8: always 8 bits
      steps: shared              # or per_width: a separate factor for every width
      types: {}                  # rules by type, such as Linear: {min_bits: 4}
      layers: {}                 # rules by path, such as backbone.stages.*: {min_bits: 3}

A rule has `bits` (the same at every width of the model), or `min_bits` and `max_bits`; it may have
`activations`. `float: true` keeps layers in float. The first layer, the output layers and SDN's
fusions stay at 8 bits unless `layers` names them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from paddle import nn

from ppvision.errors import shorten
from ppvision.quant.codes import MAX_BITS
from ppvision.quant.train.losses import WeightedLosses
from ppvision.quant.train.once_qat import OBJECTIVES, OnceQAT
from ppvision.quant.train.quanters import DEFAULT_BITS
from ppvision.safe_yaml import Located
from ppvision.schema import LEFT_OUT, Count, Place, number, one_of, refuse, text, whole
from ppvision.tasks.config import ConfigError, build_config, read_yaml

_OF_LOSSES = ("weights", "distillation")

Width = Annotated[int, whole(1, MAX_BITS)]


def _activations(value: Any, place: Place) -> bool | int:
    if not isinstance(value, bool) and value != MAX_BITS:
        raise refuse(value, place, "true, false or 8")
    return value


Activations = Annotated[bool | int, _activations]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for some layers.

    Attributes:
        bits: width of these layers at every width of the model.
        min_bits, max_bits: limits of the width of these layers.
        activations: whether the inputs of these layers are quantised; 8: to 8 bits at every width.
        float: keep these layers in float.
    """

    # None means that the key was omitted.
    bits: Width = LEFT_OUT
    min_bits: Width = LEFT_OUT
    max_bits: Width = LEFT_OUT
    activations: Activations = LEFT_OUT
    float: bool = False


LayerName = Annotated[str, text(described="a name (a number as a name in quotes)")]
Rules = Annotated[
    dict[LayerName, Rule], Count(described="a rule such as {min_bits: 4} under each name")
]


@dataclass(frozen=True, kw_only=True)
class SlimConfig:
    """The keys of a config's `slim_config`; see this module's docstring."""

    bits: Annotated[list[Width], Count(1, described="a list of widths such as [8, 4, 2]")] = field(
        default_factory=lambda: list(DEFAULT_BITS)
    )
    objective: Annotated[str, one_of(*OBJECTIVES)] = "mean"
    weights: (
        Annotated[list[Annotated[float, number(0)]], Count(described="a number for each of bits")]
        | None
    ) = None
    distillation: Annotated[float, number(0)] = 0.0
    activations: Activations = False
    steps: Literal["shared", "per_width"] = "shared"
    types: Rules = field(default_factory=dict)
    layers: Rules = field(default_factory=dict)


def read_slim_config(path: str | Path) -> Located:
    """Read the file of `--slim_config`: it has the keys above, at its top level or under
    `slim_config`.

    Raises:
        ConfigError: the file cannot be read, or names something unknown.
    """
    content = read_yaml(path)
    options = content.get("slim_config", content)
    check_slim_config(options)
    return options


def check_slim_config(options: object) -> None:
    """Raise `ConfigError` for an unknown key, type or value, with its place."""
    if not isinstance(options, dict):
        raise ConfigError(
            "config: slim_config: expected keys and values (slim_config: {} takes every default), "
            f"got {shorten(options)}."
        )
    build_config(SlimConfig, options, "slim_config")


def build_once_qat(model: nn.Layer, options: Mapping, ends: Sequence[str]) -> OnceQAT:
    """Put quanters into a model, for training at all widths.

    Args:
        model: a model in float with its initial weights; it is quantised in place.
        options: checked options of `slim_config`.
        ends: paths of the layers that read the image or give the result, which stay at 8 bits.

    Raises:
        ConfigError: a rule matches nothing, or widths are out of range.
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
