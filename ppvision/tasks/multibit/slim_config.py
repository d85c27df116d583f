"""What `slim_config` says: how a model is quantised in layers.

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

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from paddle import nn

from ppvision.errors import shorten
from ppvision.quant.train.once_qat import OBJECTIVES, OnceQAT
from ppvision.quant.train.quanters import DEFAULT_BITS
from ppvision.safe_yaml import Located
from ppvision.tasks.config import ConfigError, check_keys, check_number, read_yaml
from ppvision.zoo.registry import nearest

KEYS = ("bits", "objective", "weights", "distillation", "activations", "steps", "types", "layers")
_DEFAULTS = {"activations": False, "bits": list(DEFAULT_BITS), "weights": None}
_OF_ONCE_QAT = ("objective", "weights", "distillation")


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
    objective = {key: options.pop(key) for key in _OF_ONCE_QAT if key in options}
    bits = options.get("bits", DEFAULT_BITS)
    try:
        config = slim_quant_config(model, ends=tuple(ends), **options)
        quantized = LayeredQAT(config).quantize(model, inplace=True)
        return OnceQAT(quantized, bits, **objective)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error
