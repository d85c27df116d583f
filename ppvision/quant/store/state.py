"""A model split into the parts that all widths share and the parts of each width.

Files of layers store a `LayeredState`, and packed layers are made from it. It contains plain arrays
by name and needs no Paddle layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from paddle import nn
from paddle.quantization import BaseQuanter

from ppvision.errors import InputError, shorten
from ppvision.quant.codes import (
    dequantize_codes,
    downsample_codes,
    pack_codes,
    quantize_codes,
)
from ppvision.quant.train.layers import LayeredLayer, LayeredNorm
from ppvision.quant.train.quanters import LayeredActivationQuanterLayer


@dataclass(frozen=True)
class LayeredWeight:
    """The codes of one weight.

    Attributes:
        codes: int8, of the weight's shape, `held_bits` wide.
        held_bits: number of available bits of the codes.
        top_bits: width of the widest codes, to which `step` belongs.
        low_bits: the layer's width at the model's lowest width.
        axis: axis of the channels.
        step: float32 `[channels]`; 0 for a weight of zeros.
        widths: trained widths of the layer, the highest first.
        scales: float32 `[widths, channels]`, factors of the centres; None for 1.
    """

    codes: np.ndarray
    held_bits: int
    top_bits: int
    low_bits: int
    axis: int
    step: np.ndarray
    widths: tuple[int, ...]
    scales: np.ndarray | None = None

    def width(self, bits: int) -> int:
        """The layer's width while the model is at `bits`."""
        return min(max(bits, self.low_bits), self.top_bits)

    def at(self, bits: int) -> "LayeredWeight":
        """Return the same weight with only the codes that the model needs at `bits`.

        Raises:
            ValueError: fewer bits are available.
        """
        width = self.width(bits)
        if width > self.held_bits:
            raise InputError(f"bits: expected at most {self.held_bits} that are there, got {bits}.")
        return self.at_width(width)

    def at_width(self, width: int) -> "LayeredWeight":
        """Return the same weight with the first `width` bits of its codes."""
        codes = downsample_codes(self.codes, self.held_bits, width)
        return replace(self, codes=codes, held_bits=width)

    def cell(self) -> np.ndarray:
        """Return float32 `[channels]`: step of the available codes, times their scale."""
        step = self.step * np.float32(2.0 ** (self.top_bits - self.held_bits))
        if self.scales is None:
            return step
        above = [row for row, width in enumerate(self.widths) if width >= self.held_bits]
        return step * self.scales[above[-1]]

    def dequantize(self) -> np.ndarray:
        """Return float32 of the weight's shape: the centre of every cell."""
        return dequantize_codes(self.codes, self.cell(), self.held_bits, self.held_bits, self.axis)

    def pack(self) -> np.ndarray:
        """Return uint8 `[held_bits, ceil(count / 8)]`: the planes of the codes."""
        return pack_codes(self.codes, self.held_bits)


@dataclass(frozen=True)
class LayeredActivation:
    """The rounding of a layer's input.

    Attributes:
        steps: float32 `[widths]`.
        widths: trained widths, the highest first.
        low_bits, top_bits: limits of the layer's width.
        signed: whether codes have a sign.
    """

    steps: np.ndarray
    widths: tuple[int, ...]
    low_bits: int
    top_bits: int
    signed: bool

    def at(self, bits: int) -> tuple[float, int]:
        """Return step and width if the model is at `bits`. An untrained width covers the range of
        the next higher trained width with fewer steps."""
        width = min(max(bits, self.low_bits), self.top_bits)
        row = max((i for i, known in enumerate(self.widths) if known >= width), default=0)
        return float(self.steps[row]) * 2.0 ** max(0, self.widths[row] - width), width


@dataclass(frozen=True)
class LayeredState:
    """A model at all widths up to `held_bits`.

    Attributes:
        bits: trained widths, the highest first.
        held_bits: the highest available width.
        weights: by the path of their layer.
        floats: all other tensors, by the float model's names.
        statistics: statistics of BatchNorm for each trained width, by the float model's names.
        activations: roundings, by the path of the layer that has the input.
    """

    bits: tuple[int, ...]
    held_bits: int
    weights: Mapping[str, LayeredWeight]
    floats: Mapping[str, np.ndarray]
    statistics: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    activations: Mapping[str, LayeredActivation] = field(default_factory=dict)

    def check_bits(self, bits: int) -> None:
        """Raise `ValueError` for a width that is not available."""
        low = min(self.bits)
        whole = isinstance(bits, (int, np.integer)) and not isinstance(bits, bool)
        if not whole or not low <= bits <= self.held_bits:
            raise InputError(f"bits: expected {low} to {self.held_bits}, got {shorten(bits)}.")

    def statistics_at(self, bits: int) -> Mapping[str, np.ndarray]:
        """Return BatchNorm's statistics of the width, or of the next higher trained width."""
        return self.statistics.get(min(k for k in self.bits if k >= bits), {})

    def state_dict(self, bits: int) -> dict[str, np.ndarray]:
        """Return the float model's tensors at a width.

        Raises:
            ValueError: the width is not available.
        """
        self.check_bits(bits)
        weights = {
            f"{path}.weight": weight.at(bits).dequantize() for path, weight in self.weights.items()
        }
        return {**self.floats, **self.statistics_at(bits), **weights}


def extract_state(model: nn.Layer, bits: tuple[int, ...]) -> LayeredState:
    """Split a model with layered quanters.

    Args:
        model: the result of `LayeredQAT.quantize`; for a `OnceQAT`, its `model`.
        bits: trained widths, the highest first.

    Raises:
        ValueError: steps of activations are not set, or weights are not finite.
    """
    weights, activations = {}, {}
    statistics: dict[int, dict[str, np.ndarray]] = {k: {} for k in bits}
    floats = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for path, _, _, layer in walk_layers(model):
        if isinstance(layer, LayeredLayer) and layer.weight_quanter is not None:
            weights[path] = _layered_weight(path, layer, bits)
            del floats[f"{path}.weight"]
        elif isinstance(layer, LayeredNorm):
            for k in bits:
                for name in ("_mean", "_variance"):
                    own = name if k == layer.trained[0] else f"w{k}{name}"
                    statistics[k][f"{path}.{name}"] = floats[f"{path}.{own}"]
            for name in [
                f"{path}.w{k}{n}" for k in layer.trained[1:] for n in ("_mean", "_variance")
            ]:
                floats.pop(name)
            for name in ("_mean", "_variance"):
                floats.pop(f"{path}.{name}")
        elif isinstance(layer, LayeredActivationQuanterLayer):
            activations[path.removesuffix(".activation_quanter")] = _layered_activation(path, layer)
    quanters = tuple(
        f"{path}." for path, _, _, layer in walk_layers(model) if isinstance(layer, BaseQuanter)
    )
    floats = {name: array for name, array in floats.items() if not name.startswith(quanters)}
    return LayeredState(bits, bits[0], weights, floats, statistics, activations)


def _layered_weight(path: str, layer: LayeredLayer, bits: tuple[int, ...]) -> LayeredWeight:
    quanter = layer.weight_quanter
    step = quanter.steps()
    weight = layer._parameters["weight"].astype("float32").numpy()
    shape = [1] * weight.ndim
    shape[quanter.axis] = -1
    aligned = step.reshape(shape)
    # Divided in float32, as in training; otherwise a weight on a border may be in the next cell.
    cells = np.divide(weight, aligned, out=np.zeros_like(weight), where=aligned > 0)
    try:
        codes = quantize_codes(cells, 1.0, quanter.top_bits)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return LayeredWeight(
        codes=codes,
        held_bits=quanter.top_bits,
        top_bits=quanter.top_bits,
        low_bits=quanter.range.width(bits[-1]),
        axis=quanter.axis,
        step=step,
        widths=quanter.widths,
        scales=quanter.width_scales(),
    )


def _layered_activation(path: str, layer: LayeredActivationQuanterLayer) -> LayeredActivation:
    steps = layer.steps()
    if not (steps > 0).all():
        raise InputError(
            f"{path}: the steps of this activation are not set. Train a step, or calibrate (pack "
            "--ptq --calibration DIR)."
        )
    own = layer.range
    return LayeredActivation(
        steps, own.widths, own.widths[-1], own.widths[0], bool(float(layer.signed))
    )


def walk_layers(model: nn.Layer, prefix: str = "") -> Iterator[tuple[str, nn.Layer, str, nn.Layer]]:
    """Yield for every sublayer its path, its parent, its name there, and the layer. A layer in two
    places is yielded twice."""
    for name, layer in list(model._sub_layers.items()):
        if layer is not None:
            yield f"{prefix}{name}", model, name, layer
            yield from walk_layers(layer, f"{prefix}{name}.")
