"""Make integer layers from a trained float model, without training.

The steps of the layers' inputs come from images that pass through the float model (calibration).
`docs/integers.md` compares the rules.
"""

import difflib
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.console import ProgressLine
from ppvision.errors import InputError
from ppvision.nn import SemanticDifferenceConv2D
from ppvision.quant.integers import (
    CODES,
    INT8_LOW,
    WEIGHT_LIMIT,
    IntegerActivation,
    quantize_weight,
)
from ppvision.quant.packed import PackedLayer, copy_with_integers
from ppvision.quant.ptq.sensitivity import check_count, find_sensitive_layers
from ppvision.quant.sampling import ValueSample
from ppvision.quant.store.state import walk_layers
from ppvision.quant.train.layers import WITH_WEIGHT
from ppvision.quant.train.quanters import find_channel_axis

logger = logging.getLogger("ppvision")

Rule = Literal["error", "percentile", "maximum"]
RULES: tuple[Rule, ...] = ("error", "percentile", "maximum")
PERCENTILE = 99.99  # percentage of the values that "percentile" does not clip

# Values kept per layer: of one image, and of all.
_KEPT_OF_IMAGE = 4096
_KEPT_IN_ALL = 1 << 20
# In a very small range OpenVINO 2025.0 forgets a zero point that is neither 0 nor an end of the
# codes: sums were wrong with steps of up to 3e-8, and right from 1e-7 on.
_LEAST_STEP = 1e-6
_FRACTIONS = np.linspace(0.3, 1.0, 36)  # of the range without clipping, for "error"


def quantize_to_integers(
    model: nn.Layer,
    shows: Sequence[Callable[[nn.Layer], object]],
    *,
    rule: Rule = "error",
    keep_float: Sequence[str] = (),
    most_sensitive: int = 0,
    symmetric: bool = False,
) -> nn.Layer:
    """Copy a float model so that its products with weights are of 8-bit integers.

    Args:
        model: a model in float, in evaluation mode.
        shows: functions; each runs the model on an image or a batch.
        rule: rule for the steps of activations: "error" takes the range with the lowest squared
            error, "percentile" clips one value in 10,000, "maximum" clips nothing.
        keep_float: paths of layers that stay in float.
        most_sensitive: number of further layers that stay in float: those that lose most
            (`ppvision.quant.ptq.sensitivity`). `shows` must then return the outputs.
        symmetric: whether codes of activations are symmetric around zero, so that their zero point
            is 0. Maps without negative values then have half of the codes.

    Returns:
        The copy. Layers that no image reached (auxiliary heads) stay in float. The products of
        SDN's semantic difference convolutions do too, because they are of differences and not of
        the rounded input; their weights get 8 bits.

    Raises:
        ValueError: there is no image; the model has no layers that can be quantised; values are not
            finite; a path is not such a layer; or a number leaves no layer.
    """
    layers = {
        path: layer
        for path, _, _, layer in walk_layers(model)
        if type(layer) in WITH_WEIGHT and layer._parameters.get("weight") is not None
    }
    if unknown := [path for path in keep_float if path not in layers]:
        raise InputError(
            f"keep_float: expected paths of layers with a weight, got {unknown[0]}. "
            f"{_suggest_paths(unknown[0], list(layers))}"
        )
    if not shows:
        raise InputError("calibration: expected at least one image, got none.")
    guided = [path for path, layer in layers.items() if type(layer) is SemanticDifferenceConv2D]
    chosen = {path: layer for path, layer in layers.items() if path not in (*keep_float, *guided)}
    if layers and not chosen:
        raise InputError(
            f"keep_float: names all {len(layers)} layers that can become integers. Name fewer, or "
            "export without int8."
        )
    if most_sensitive:
        check_count(most_sensitive, len(chosen))  # before the work
    seen = observe_inputs(chosen, model, shows)
    activations = {
        path: found.activation(rule, symmetric) for path, found in seen.items() if found.count
    }
    weights = {
        path: quantize_weight(layer.weight.numpy(), find_channel_axis(layer))
        for path, layer in chosen.items()
        if path in activations
    }
    if not weights:
        raise InputError("model: expected layers with a weight that run, got none.")
    _tell_kept("which were named", [path for path in layers if path in keep_float])
    _tell_kept("but for their weights, since they multiply differences, which are floats", guided)
    _tell_kept("since integers know no such layer", find_other_weights(model))
    _tell_kept("since no image reaches them", [path for path in chosen if path not in weights])
    if most_sensitive:
        for path in find_sensitive_layers(model, weights, activations, shows, most_sensitive):
            del weights[path], activations[path]
    for path in guided:
        if path not in keep_float:
            layer = layers[path]
            weights[path] = quantize_weight(layer.weight.numpy(), find_channel_axis(layer))
    return copy_with_integers(model, weights, activations)


def _suggest_paths(unknown: str, known: Sequence[str]) -> str:
    """Return a sentence with the paths that may be meant: those that contain the last part of the
    unknown one, and those that are spelled alike; or else all."""
    end = unknown.rpartition(".")[2]
    inside = [path for path in known if path.startswith(f"{unknown}.") or end in path.split(".")]
    alike = inside or difflib.get_close_matches(unknown, known, n=3)
    if alike:
        return f"Did you mean {', '.join(alike[:8])}?"
    return f"The {len(known)} layers are: {', '.join(known)}."


def find_other_weights(model: nn.Layer) -> list[str]:
    """Return the paths of layers of other kinds, whose weights stay in float."""
    return [
        path
        for path, _, _, layer in walk_layers(model)
        if type(layer) not in WITH_WEIGHT
        and not isinstance(layer, PackedLayer)
        and any(weight is not None and weight.ndim > 1 for weight in layer._parameters.values())
    ]


def _tell_kept(why: str, paths: Sequence[str]) -> None:
    if paths:
        logger.info(f"int8: {len(paths)} layers stay in float, {why}: {', '.join(paths)}")


class Observed(ValueSample):
    """The observed values of a layer's input."""

    def __init__(self) -> None:
        super().__init__(_KEPT_OF_IMAGE, _KEPT_IN_ALL)

    def activation(self, rule: Rule, symmetric: bool = False) -> IntegerActivation:
        """Return the step and the lowest code by a rule."""
        small = self.high - self.low < CODES * _LEAST_STEP
        window = _symmetric_window if symmetric or (small and self.low < 0) else _window
        if self.high - self.low < np.finfo(np.float32).tiny:  # zeros, or nearly zeros
            return IntegerActivation(1.0, INT8_LOW if symmetric else 0)
        if rule == "maximum":
            return window(self.low, self.high)
        values = self.values.astype(np.float64)  # squares do not overflow
        if rule == "percentile":
            low, high = np.percentile(values, [100 - PERCENTILE, PERCENTILE])
            if low < 0 or high > 0:  # not if all but a few are 0
                return window(min(0.0, float(low)), max(0.0, float(high)))
            return window(self.low, self.high)
        best, least = None, np.inf
        for fraction in _FRACTIONS:
            tried = window(self.low * fraction, self.high * fraction)
            codes = np.clip(np.rint(values / tried.step), tried.low, tried.high)
            error = float(np.square(values - tried.step * codes).mean())
            if error <= least:  # for equal errors, the widest range
                best, least = tried, error
        return best


def _window(low: float, high: float) -> IntegerActivation:
    """Make 256 codes from `low` (at most 0) to `high` (at least 0); one of them is 0."""
    step = (high - low) / (CODES - 1)
    return IntegerActivation(step, round(low / step) if step else 0)


def _symmetric_window(low: float, high: float) -> IntegerActivation:
    """Make 256 codes, -128 to 127; the largest magnitude gets 127."""
    return IntegerActivation(max(-low, high) / WEIGHT_LIMIT, INT8_LOW)


def observe_inputs(
    layers: dict[str, nn.Layer], model: nn.Layer, shows: Sequence[Callable[[nn.Layer], object]]
) -> dict[str, Observed]:
    """Run a model on images, and observe the inputs of some layers."""
    seen = {path: Observed() for path in layers}

    def look(path: str) -> Callable[[nn.Layer, tuple], None]:
        def hook(layer: nn.Layer, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].astype("float32").numpy()
            if not np.isfinite(x).all():
                raise InputError(
                    f"calibration: the input of {path} holds nan or infinity. Check the weights "
                    "and the images."
                )
            seen[path].add(x)

        return hook

    hooks = [layer.register_forward_pre_hook(look(path)) for path, layer in layers.items()]
    try:
        with paddle.no_grad(), ProgressLine("calibration", len(shows)) as bar:
            for show in shows:
                show(model)
                bar.update()
    finally:
        for hook in hooks:
            hook.remove()
    return seen
