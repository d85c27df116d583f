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
result, and SDN's fusions stay at the highest width unless `layers` names them.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.quant.once_qat import OBJECTIVES, OnceQAT
from ppvision.quant.packed_layers import pack_model
from ppvision.quant.quanters import DEFAULT_BITS
from ppvision.tasks.config import ConfigError, Located, check_keys, check_number, read_yaml
from ppvision.zoo.registry import nearest

KEYS = ("bits", "objective", "weights", "distillation", "activations", "steps", "types", "layers")
_OF_ONCE_QAT = ("objective", "weights", "distillation")
FLOAT_BITS = 32  # what a model without quantisation is said to have


def read_slim_config(path: str | Path) -> Located:
    """The file of `--slim_config`: the keys above, at its top or under `slim_config`.

    Raises:
        ConfigError: it does not read, or names something unknown.
    """
    content = read_yaml(path)
    options = content.get("slim_config", content) if "slim_config" in content else content
    check_slim_config(options)
    return options


def check_slim_config(options: object) -> None:
    """Raise `ConfigError` for a key, type or value that is not known, with its place."""
    if not isinstance(options, dict):
        raise ConfigError(f"config: slim_config: expected keys and values, got {options!r}.")
    check_keys(options, KEYS, "slim_config")
    check_number(options, "distillation", "slim_config", low=0)
    for key, known in (("objective", OBJECTIVES), ("steps", ("shared", "per_width"))):
        if key in options and options[key] not in known:
            place = options.place(key) if isinstance(options, Located) else ""
            raise ConfigError(
                f"config{place}: slim_config.{key}: got {options[key]!r}. "
                f"{nearest(str(options[key]), list(known))}"
            )
    for key in ("types", "layers"):
        rules = options.get(key, {})
        if not isinstance(rules, dict) or not all(isinstance(r, dict) for r in rules.values()):
            raise ConfigError(
                f"config: slim_config.{key}: expected a rule such as {{min_bits: 4}} under each "
                f"name, got {rules!r}."
            )


def once_qat(model: nn.Layer, options: Mapping, example: Tensor) -> OnceQAT:
    """A model with quanters, ready to be trained at all widths.

    Args:
        model: in float, with the weights to start from; quantised in place.
        options: of `slim_config`, checked.
        example: a picture `[1, C, H, W]` that the model takes; tells which layers are its ends.

    Raises:
        ConfigError: a rule that matches nothing, widths out of range.
    """
    from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config

    options = dict(options)
    objective = {key: options.pop(key) for key in _OF_ONCE_QAT if key in options}
    bits = options.get("bits", DEFAULT_BITS)
    try:
        config = slim_quant_config(model, ends=end_layers(model, example), **options)
        quantized = LayeredQAT(config).quantize(model, inplace=True)
        return OnceQAT(quantized, bits, **objective)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error


def has_quanters(names: Sequence[str]) -> bool:
    """Whether tensors of these names come from a model with quanters."""
    return any(".weight_quanter." in name for name in names)


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
        with once.alone(once.drawn[place]):
            return losses(network, batch)

    if once.objective == "mean":
        return {f"w{k}": partial(run, place) for place, k in enumerate(once.drawn)}
    names = [f"w{once.widths[0]}", "random", f"w{once.widths[-1]}"]
    return {name: partial(run, place) for place, name in enumerate(names)}


def draw_widths(once: OnceQAT, seed: int, step: int) -> None:
    """Draw the widths of a step from seed and step alone: the same on all ranks, and in a resume."""
    once.draw(random.Random(f"{seed}/{step}"))


def scores_by_width(
    once: OnceQAT, scores: Callable[[nn.Layer], dict[str, float]]
) -> dict[str, float]:
    """An evaluation at every width.

    Returns:
        The mean over the widths under each tag (the first decides which model is the best), then
        every width's own: `Evaluate/mIoU_w4`.
    """
    before, found = once.bits, {}
    for k in once.widths:
        once.set_bits(k)
        found[k] = scores(once)
    once.set_bits(before)
    tags = [tag for tag in found[once.widths[0]] if all(tag in s for s in found.values())]
    means = {tag: float(np.mean([s[tag] for s in found.values()])) for tag in tags}
    return means | {f"{tag}_w{k}": s[tag] for k, s in found.items() for tag in tags}


# -- models at their widths ------------------------------------------------------------------------


def at_widths(
    model: nn.Layer, layered: object | None, bits: Sequence[int] | None
) -> Iterator[tuple[int, nn.Layer]]:
    """A model at one width after another; each is to be used before the next is asked for.

    Args:
        model: in float or a OnceQAT.
        layered: a loaded layered model for it, or None.
        bits: the widths; None for all that it was trained at.

    Raises:
        ConfigError: widths of a model that has none.
    """
    if layered is not None:
        held = [k for k in layered.state.bits if k <= layered.state.held_bits]
        for k in bits or held:
            yield k, pack_model(copy.deepcopy(model), layered.state, k)
    elif isinstance(model, OnceQAT):
        for k in bits or model.widths:
            model.set_bits(k)
            yield k, model
    elif bits:
        raise ConfigError(
            f"--bits {' '.join(map(str, bits))}: expected a model with widths: a layered model, or "
            "a checkpoint of once-QAT with its slim_config. This one is in float."
        )
    else:
        yield FLOAT_BITS, model


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
