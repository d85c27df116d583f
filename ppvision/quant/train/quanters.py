"""Quanters for layered models, as factories of `paddle.quantization`.

Source: layered codes, arXiv 2212.05326 (see `ppvision.quant.codes`); learned steps and their
gradient: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153. We chose
    cells instead of rounding, the initial step, and learning the logarithm of the step.

A quanter works at every width: `set_bits` sets the current one. `min_bits` and `max_bits` limit the
width of a layer; a layer with both at 8 keeps 8 bits at every width of the model.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer
from paddle.quantization import BaseQuanter
from paddle.quantization.factory import QuanterFactory

from ppvision.errors import InputError, shorten
from ppvision.quant.codes import MAX_BITS, check_bits, code_range
from ppvision.quant.sampling import ValueSample

DEFAULT_BITS = (8, 6, 4, 3, 2)

# -- widths ----------------------------------------------------------------------------------------


class _Range:
    """The widths of one layer for the trained widths of the model.

    Attributes:
        trained: trained widths of the model, the highest first.
        widths: the layer's widths at those, the highest first, each once.
    """

    def __init__(self, bits: Sequence[int], min_bits: int, max_bits: int) -> None:
        self.trained = check_widths(bits)
        check_bits("min_bits", min_bits)
        check_bits("max_bits", max_bits)
        if min_bits > max_bits:
            raise InputError(f"min_bits: expected at most max_bits ({max_bits}), got {min_bits}.")
        self.low, self.high = min_bits, max_bits
        self.widths = tuple(sorted({self.width(k) for k in self.trained}, reverse=True))

    def width(self, bits: int) -> int:
        """Return the layer's width if the model is at `bits`."""
        return min(max(bits, self.low), self.high)

    def row(self, bits: int) -> int:
        """Return the place of a width in `widths`; an untrained width has the place of the next
        higher trained one."""
        return max((i for i, width in enumerate(self.widths) if width >= bits), default=0)


# -- steps to start from ---------------------------------------------------------------------------

# Steps that are tried, as fractions of the largest magnitude divided by half of the codes: 1 clips
# nothing.
_SHARES = np.geomspace(0.04, 1.1, 40).astype(np.float32)
_BLOCK = 1 << 22  # number of weights per block
_MUCH_CLIPPED = 0.03  # fraction of weights beyond the range of their codes


def find_initial_steps(weight: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Find steps of the widest codes that are good for all widths.

    For each channel this minimises the sum over the widths of the squared error, divided by the
    lowest error that this width could have with its own step. (The best step for 8 bits only would
    leave most 2-bit codes unused.)

    Args:
        weight: float `[channels, N]`.
        widths: the widths. The step is that of the widest.

    Returns:
        float32 `[channels]`. A channel of zeros has the median of the others; all zeros give 0.
    """
    top = max(widths)
    largest = np.abs(weight).max(axis=1, initial=0.0)  # [channels]
    steps = np.zeros(len(weight), np.float32)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        steps[block] = _best_steps(weight[block], largest[block] / (1 << (top - 1)), widths)
    alive = largest > 0
    if alive.any():
        steps[~alive] = np.median(steps[alive])
    return steps


def _best_steps(weight: np.ndarray, whole: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Apply `find_initial_steps` to a few channels; `whole` are the steps without clipping."""
    top = max(widths)
    weight = weight.astype(np.float32)
    unit = np.where(whole > 0, whole, 1.0).astype(np.float32)
    scaled = weight / unit[:, None]
    errors = np.empty((len(widths), len(_SHARES), len(weight)), np.float64)
    for column, share in enumerate(_SHARES):
        for row, bits in enumerate(widths):
            low, high = code_range(bits)
            cell = share * np.float32(2 ** (top - bits))
            codes = np.clip(np.floor(scaled / cell), low, high)
            errors[row, column] = np.square(scaled - cell * (codes + 0.5)).sum(axis=1)
    least = np.maximum(errors.min(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    best = (errors / least).sum(axis=0).argmin(axis=0)  # [channels]
    return np.where(whole > 0, unit * _SHARES[best], 0.0).astype(np.float32)


def find_rounding_step(values: np.ndarray, bits: int, signed: bool) -> float:
    """Find the step with the lowest squared error for values that are rounded to `bits` bits.

    Args:
        values: floats of any shape.
        bits: width.
        signed: whether the codes are -2^(bits-1) to 2^(bits-1) - 1, or 0 to 2^bits - 1.

    Returns:
        The step; 1 if all values are zero.
    """
    values = values.astype(np.float32).reshape(-1)
    largest = np.abs(values).max(initial=0.0)
    if largest == 0:
        return 1.0
    low, high = rounding_range(bits, signed)
    steps = _SHARES * largest / max(high, 1)
    errors = [
        np.square(values - step * np.clip(np.rint(values / step), low, high)).sum()
        for step in steps
    ]
    return float(steps[int(np.argmin(errors))])


def rounding_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the lowest and highest code of activations."""
    return code_range(bits) if signed else (0, (1 << bits) - 1)


# -- weights ---------------------------------------------------------------------------------------


def find_channel_axis(layer: nn.Layer) -> int:
    """Return the axis of a layer's weight for its output channels (of a group, if transposed)."""
    return 1 if isinstance(layer, (nn.Linear, nn.Conv2DTranspose)) else 0


class _CellCentres(PyLayer):
    """Map weights to the centres of their cells; the backward pass is straight-through.

    With u = w / s and q = clip(floor(u)), the result is `r s (q + 1/2)`. Inside the range the
    gradient of the weight passes. The gradient of the step is that of LSQ: `q + 1/2 - u` inside and
    `q + 1/2` outside. It stores only its inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, step: Tensor, scale: Tensor, learning: Tensor, bits: int
    ) -> Tensor:
        """`step`, `scale` and `learning` (a factor of the gradients of both) have the axes of the
        weight."""
        ctx.save_for_backward(weight, step, scale, learning)
        ctx.bits = bits
        return step * scale * (_cells(weight, step, bits)[1] + 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, scale, learning = ctx.saved_tensor()
        low, high = code_range(ctx.bits)
        u, q = _cells(weight, step, ctx.bits)
        inside = paddle.logical_and(u >= low, u < high + 1).astype(gradient.dtype)
        axes = [axis for axis, size in enumerate(step.shape) if size == 1]
        passed = gradient * scale
        of_step = (passed * (q + 0.5 - u * inside)).sum(axis=axes, keepdim=True)
        of_scale = (gradient * step * (q + 0.5)).sum(axis=axes, keepdim=True)
        alive = (step > 0).astype(step.dtype)
        gradients = (
            passed * (inside * alive + (1.0 - alive)),
            learning * of_step,
            learning * of_scale,
            learning,  # a constant
        )
        return _of_trained((weight, step, scale, learning), gradients)


def _of_trained(
    inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients in the form for PyLayer: None for an input without gradient."""
    pairs = zip(inputs, gradients, strict=True)
    return tuple(None if x.stop_gradient else gradient for x, gradient in pairs)


def _cells(weight: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return `w / s` and the codes, as floats; zeros if the step is 0."""
    low, high = code_range(bits)
    alive = step > 0
    u = paddle.where(
        alive, weight / paddle.where(alive, step, paddle.ones_like(step)), 0.0 * weight
    )
    return u, paddle.clip(paddle.floor(u), low, high)


def _step_name(widths: tuple[int, ...]) -> str:
    return "initial_step_" + "_".join(map(str, widths))


class LayeredWeightQuanterLayer(BaseQuanter):
    """Weights at the current width; their codes are the first bits of the widest codes.

    See `LayeredWeightQuanter` for the arguments; `layer` is the layer with the quantised `weight`.

    Attributes:
        initial_step: `[channels]`, step of the widest codes at the start of the training. 0: a
            layer of zeros.
        settling: `[1]`, 1 for a layer that started at zero: its steps follow its weights.
        log_scale: `[channels]`, learned: the step is `initial_step * exp(log_scale)`. So it is
            always positive. An optimiser that normalises gradients (Adam) changes a step in
            proportion to its size, and weight decay pulls it back to its initial value.
        log_widths: `[widths * channels]`, learned, only with `steps="per_width"`: a factor of the
            step for each width.
    """

    def __init__(
        self,
        layer: nn.Layer,
        bits: Sequence[int] = DEFAULT_BITS,
        min_bits: int = 1,
        max_bits: int = MAX_BITS,
        steps: str = "shared",
    ) -> None:
        super().__init__()
        self.range = _Range(bits, min_bits, max_bits)
        if steps not in ("shared", "per_width"):
            raise InputError(f"steps: expected shared or per_width, got {shorten(steps)}.")
        self.axis = find_channel_axis(layer)
        self.widths = self.range.widths
        self.top_bits = self.widths[0]
        self.bits = self.range.trained[0]
        weight = _rows(layer.weight, self.axis)
        zeros = nn.initializer.Constant(0.0)
        self.log_scale = self.create_parameter([len(weight)], default_initializer=zeros)
        self._step_name = _step_name(self.widths)
        self.register_buffer(self._step_name, paddle.zeros([len(weight)]))
        if steps == "per_width":
            self.log_widths = self.create_parameter(
                [len(self.widths) * len(weight)], default_initializer=zeros
            )
        self._set_initial(weight)
        self._starts_at_zero = not np.any(weight)
        self.register_buffer("settling", paddle.full([1], float(self._starts_at_zero)))

    def _set_initial(self, weight: np.ndarray) -> None:
        """Set the initial steps for a weight `[channels, N]`."""
        steps = find_initial_steps(weight, self.widths)
        self.initial_step.set_value(steps)
        if not hasattr(self, "log_widths"):
            return
        factors = []
        for bits in self.widths:  # the factor with the lowest squared error, close to 1
            cell = steps[:, None] * 2.0 ** (self.top_bits - bits)
            low, high = code_range(bits)
            codes = np.clip(np.floor(weight / np.where(cell > 0, cell, 1)), low, high)
            centres = cell * (codes + 0.5)
            power = np.square(centres).sum(axis=1)
            factor = (weight * centres).sum(axis=1) / np.where(power > 0, power, 1)
            factors.append(np.where(factor > 0.1, factor, 1.0))
        self.log_widths.set_value(np.log(np.concatenate(factors)).astype(np.float32))

    @property
    def initial_step(self) -> Tensor:
        """Return `[channels]`. In a state dict its name contains the layer's widths, so that a
        checkpoint with other widths does not fit, because its steps mean other cells."""
        return self._buffers[self._step_name]

    @property
    def not_averaged(self) -> tuple[str, ...]:
        """Return tensors that an average of weights copies, because they are set and not
        learned."""
        return self._step_name, "settling"

    def _settle(self, weight: np.ndarray) -> None:
        """Let the steps of a layer that started at zero follow its weights `[channels, N]`.

        The weights grow by a factor of a thousand. Steps from the first weights would clip all
        later ones, and clipped weights have no gradient.
        """
        reach = self.steps() * np.float32(2 ** (self.top_bits - 1))
        if (np.abs(weight) > reach[:, None]).mean() > _MUCH_CLIPPED:
            self._set_initial(weight)
            self.log_scale.set_value(np.zeros(len(weight), np.float32))

    def set_bits(self, bits: int) -> None:
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight at the current width, in its own shape."""
        if self._starts_at_zero and self.training and float(self.settling):
            self._settle(_rows(weight, self.axis))
        bits = self.range.width(self.bits)
        with paddle.amp.auto_cast(enable=False):
            cell = 2.0 ** (self.top_bits - bits)
            step = paddle.exp(self.log_scale) * self.initial_step * cell  # [channels]
            learning = self._learning(step.detach(), cell, weight.size, bits)
            shape = [1] * weight.ndim
            shape[self.axis] = -1
            factors = (x.reshape(shape) for x in (step, self._scale(bits), learning))
            return _CellCentres.apply(weight.astype("float32"), *factors, bits)

    def _learning(self, step: Tensor, cell: float, size: int, bits: int) -> Tensor:
        """Return `[channels]`: the factor of a step's gradient, `1 / (sqrt(N) (2^(bits-1) s)^2)`.

        Under SGD, the corresponding factor for scaling a channel's N weights together is 1 / |w|^2.
        The range of the codes represents the size of the weights, so this factor has the same order
        at every width. LSQ's own factor, 1 / (sqrt(N 2^(bits-1)) s^2) for a logarithm, is 1000
        times larger at 8 bits: with it the steps diverged under SGD with momentum. A step below the
        initial one counts as the initial one; otherwise shrinking steps would shrink faster and
        faster.
        """
        per_channel = size // len(step)
        largest = paddle.maximum(step, self.initial_step * cell) * 2.0 ** (bits - 1)
        alive = (step > 0).astype("float32") / math.sqrt(per_channel)
        return alive / paddle.clip(largest, min=1e-15).square()

    def _scale(self, bits: int) -> Tensor:
        """Return `[channels]`: the width's factor of the centres."""
        if not hasattr(self, "log_widths"):
            return paddle.ones_like(self.initial_step)
        rows = self.log_widths.reshape([len(self.widths), -1])
        return paddle.exp(rows[self.range.row(bits)])

    def steps(self) -> np.ndarray:
        """Return float32 `[channels]`: the steps of the widest codes."""
        return (paddle.exp(self.log_scale) * self.initial_step).numpy()

    def width_scales(self) -> np.ndarray | None:
        """Return float32 `[widths, channels]` with `steps="per_width"`, otherwise None."""
        if not hasattr(self, "log_widths"):
            return None
        return paddle.exp(self.log_widths).numpy().reshape(len(self.widths), -1)

    # What `BaseQuanter` asks for.

    def scales(self) -> Tensor:
        return paddle.to_tensor(self.steps() * 2.0 ** (self.top_bits - self.range.width(self.bits)))

    def zero_points(self) -> Tensor:
        return paddle.full_like(self.initial_step, -0.5)

    def quant_axis(self) -> int:
        return self.axis

    def bit_length(self) -> int:
        return self.range.width(self.bits)


class LayeredWeightQuanter(QuanterFactory):
    """Makes the quanter of a layer's weight, for example for `SlimQuantConfig(weight=...)`.

    Args:
        bits: widths to train, each 1 to 8. Default 8, 6, 4, 3, 2.
        min_bits, max_bits: lowest and highest width of the layer. Default 1, 8.
        steps: "shared" (default): one learned step per channel. "per_width": in addition, one
            learned factor per channel and width. In both cases the codes are nested.

    Source: see the module.
    """

    def __init__(
        self,
        bits: Sequence[int] = DEFAULT_BITS,
        *,
        min_bits: int = 1,
        max_bits: int = MAX_BITS,
        steps: str = "shared",
    ) -> None:
        super().__init__(bits=check_widths(bits), min_bits=min_bits, max_bits=max_bits, steps=steps)

    def _get_class(self) -> type[BaseQuanter]:
        return LayeredWeightQuanterLayer


def _rows(weight: Tensor, axis: int) -> np.ndarray:
    """Return the weight as `[channels, N]`, float32."""
    array = np.moveaxis(weight.astype("float32").numpy(), axis, 0)
    return array.reshape(len(array), -1)


# -- activations -----------------------------------------------------------------------------------

# Values kept for the initial steps: of one batch, and of all (4 MiB).
_KEPT_OF_BATCH = 1 << 16
_KEPT_IN_ALL = 1 << 20


def round_to_nearest(x: Tensor) -> Tensor:
    """Round to the nearest whole number, halves upwards; any shape.

    `paddle.round` is not used, because its oneDNN kernel would take most of the time of an exported
    model.
    """
    return paddle.floor(x + 0.5)


class _Rounding(PyLayer):
    """Round to whole steps; the backward pass is straight-through, with LSQ's gradient of the
    step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, learning: Tensor, low: int, high: int) -> Tensor:
        """`learning` is a factor of the step's gradient."""
        ctx.save_for_backward(x, step, learning)
        ctx.low, ctx.high = low, high
        return step * paddle.clip(round_to_nearest(x / step), low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, learning = ctx.saved_tensor()
        u = x / step
        q = paddle.clip(round_to_nearest(u), ctx.low, ctx.high)
        inside = paddle.logical_and(u >= ctx.low, u <= ctx.high).astype(gradient.dtype)
        of_step = (gradient * (q - u * inside)).sum().reshape(step.shape)
        gradients = gradient * inside, learning * of_step, learning
        return _of_trained((x, step, learning), gradients)


class LayeredActivationQuanterLayer(BaseQuanter):
    """Rounds activations at the current width, with a learned step per width.

    The first training batch, or `calibrate`, sets the initial steps and whether codes have a sign.

    Attributes:
        initial_step: `[widths]`, 0 until they are set.
        log_scale: `[widths]`, learned, as in `LayeredWeightQuanterLayer`.
        signed: `[1]`, 1 if a negative value was seen.
    """

    def __init__(
        self,
        layer: nn.Layer,
        bits: Sequence[int] = DEFAULT_BITS,
        min_bits: int = 1,
        max_bits: int = MAX_BITS,
    ) -> None:
        super().__init__()
        self.range = _Range(bits, min_bits, max_bits)
        self.bits = self.range.trained[0]
        count = len(self.range.widths)
        zeros = nn.initializer.Constant(0.0)
        self.log_scale = self.create_parameter([count], default_initializer=zeros)
        self._step_name = _step_name(self.range.widths)
        self.register_buffer(self._step_name, paddle.zeros([count]))
        self.register_buffer("signed", paddle.zeros([1]))
        self.calibrating = False
        self._seen = ValueSample(_KEPT_OF_BATCH, _KEPT_IN_ALL)
        self._is_set: bool | None = None  # not known yet

    @property
    def initial_step(self) -> Tensor:
        """Return `[widths]`; its name in a state dict is as in `LayeredWeightQuanterLayer`."""
        return self._buffers[self._step_name]

    @property
    def not_averaged(self) -> tuple[str, ...]:
        """Return tensors that an average of weights copies, because they are set once and not
        learned."""
        return self._step_name, "signed"

    @property
    def saw_nothing(self) -> bool:
        """Whether no image of the calibration reached this quanter."""
        return self.calibrating and not len(self._seen)

    def set_bits(self, bits: int) -> None:
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self._see(x)
            return x
        if not self._has_steps():
            if not self.training:
                raise InputError(
                    f"{self.full_name()}: the steps of this activation are not set. Train a step, "
                    "or calibrate (pack --ptq --calibration DIR)."
                )
            self._see(x)
            self.finish_calibration()
        bits = self.range.width(self.bits)
        row = self.range.row(bits)
        with paddle.amp.auto_cast(enable=False):
            step = paddle.exp(self.log_scale[row]) * self.initial_step[row]
            step = step * 2.0 ** max(0, self.range.widths[row] - bits)  # an untrained width
            low, high = rounding_range(bits, bool(self.signed))
            largest = max(high, 1) * paddle.maximum(step.detach(), self.initial_step[row])
            learning = 1.0 / (math.sqrt(x.size) * largest.square())  # as for weights
            return _Rounding.apply(x.astype("float32"), step, learning, low, high).astype(x.dtype)

    def _has_steps(self) -> bool:
        if not self._is_set:
            self._is_set = bool(float(self.initial_step.abs().sum()) > 0)
        return self._is_set

    def _see(self, x: Tensor) -> None:
        values = x.detach().astype("float32").numpy()
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.full_name()}: expected finite activations, got nan or infinity. Check the "
                "weights and the images."
            )
        self._seen.add(values)

    def finish_calibration(self) -> None:
        """Set the steps from the values seen since the start; every rank gets those of rank 0.

        Raises:
            ValueError: no values were seen.
        """
        self.calibrating = False
        if not len(self._seen):
            raise InputError(
                f"{self.full_name()}: expected activations to calibrate with, got none."
            )
        seen, self._seen = self._seen, ValueSample(_KEPT_OF_BATCH, _KEPT_IN_ALL)
        signed = seen.low < 0
        steps = [find_rounding_step(seen.values, bits, signed) for bits in self.range.widths]
        self.signed.set_value(np.array([signed], np.float32))
        self.initial_step.set_value(np.array(steps, np.float32))
        if paddle.distributed.get_world_size() > 1:
            paddle.distributed.broadcast(self.signed, 0)
            paddle.distributed.broadcast(self.initial_step, 0)
        self._is_set = True

    def steps(self) -> np.ndarray:
        """Return float32 `[widths]`."""
        return (paddle.exp(self.log_scale) * self.initial_step).numpy()

    # What `BaseQuanter` asks for.

    def scales(self) -> Tensor:
        return paddle.to_tensor(self.steps()[self.range.row(self.bit_length())])

    def zero_points(self) -> Tensor:
        return paddle.zeros([1])

    def quant_axis(self) -> None:
        return None

    def bit_length(self) -> int:
        return self.range.width(self.bits)


class LayeredActivationQuanter(QuanterFactory):
    """Makes the quanter of a layer's input, for example for `SlimQuantConfig(activation=...)`.

    Args:
        bits, min_bits, max_bits: see `LayeredWeightQuanter`.

    Source: LSQ (see the module). We chose one step per width.
    """

    def __init__(
        self,
        bits: Sequence[int] = DEFAULT_BITS,
        *,
        min_bits: int = 1,
        max_bits: int = MAX_BITS,
    ) -> None:
        super().__init__(bits=check_widths(bits), min_bits=min_bits, max_bits=max_bits)

    def _get_class(self) -> type[BaseQuanter]:
        return LayeredActivationQuanterLayer


def check_widths(bits: Sequence[int]) -> tuple[int, ...]:
    """Return widths, the highest first.

    Raises:
        ValueError: there is none, one occurs twice, or one is not from 1 to 8.
    """
    widths = tuple(bits) if isinstance(bits, (list, tuple)) else None
    if not widths:
        raise InputError(f"bits: expected a list of widths such as [8, 4, 2], got {shorten(bits)}.")
    for width in widths:
        check_bits("bits", width)
    if len(set(widths)) != len(widths):
        raise InputError(f"bits: expected each width once, got {list(widths)}.")
    return tuple(sorted(widths, reverse=True))
