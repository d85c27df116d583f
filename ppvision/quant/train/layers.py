"""Layers that run at the current width, into which quanters are put.

A layered layer is of a subclass of the layer that it replaces, with the same parameters and names,
the same options and the same forward pass. Only `weight` differs: it gives the quantised weight. So
a checkpoint of the float model fits, and two lines below can quantise every layer that reads
`self.weight`.
"""

import copy
from typing import TYPE_CHECKING

import paddle
from paddle import Tensor, nn
from paddle.quantization.config import SingleLayerConfig

from ppvision.errors import EngineError, InputError
from ppvision.nn import SemanticDifferenceConv2D
from ppvision.quant.train.quanters import (
    LayeredActivationQuanter,
    LayeredActivationQuanterLayer,
    LayeredWeightQuanter,
    LayeredWeightQuanterLayer,
)

# The parts before a class of Paddle; a type checker sees them as layers.
if TYPE_CHECKING:
    from paddle.nn import Layer as _Mixin
else:
    _Mixin = object


def become(new: nn.Layer, layer: nn.Layer) -> None:
    """Give `new`, of a subclass of `layer`'s class, all attributes of `layer`."""
    held = {"_parameters", "_buffers", "_sub_layers", "_non_persistable_buffer_names_set"}
    for name, value in vars(layer).items():
        vars(new)[name] = copy.copy(value) if name in held else value


class LayeredLayer(_Mixin):
    """The common part of layered layers; it comes before the class that it changes.

    Args:
        layer: the layer to replace.
        q_config: an object with `weight` and `activation`, factories or None, from PaddleSlim.

    Raises:
        ValueError: the quanters are of another kind, with only one width; there is a quanter for
            activations but none for the weight; or the weight is computed from other parameters
            (`weight_norm`).
    """

    def __init__(self, layer: nn.Layer, q_config: SingleLayerConfig) -> None:
        _check_quanters(layer, q_config)
        nn.Layer.__init__(self)
        become(self, layer)
        self.weight_quanter = q_config.weight and q_config.weight._instance(layer)
        self.activation_quanter = q_config.activation and q_config.activation._instance(layer)

    @property
    def weight(self) -> Tensor:
        weight = self._parameters["weight"]
        if self.weight_quanter is None:
            return weight
        try:
            return self.weight_quanter(weight)
        except AttributeError as error:  # otherwise Paddle's Layer would look for a float `weight`
            raise EngineError(f"{self.full_name()}: {error}") from error

    @paddle.jit.not_to_static  # it would replace `super()` by that of the object's own class
    def forward(self, x: Tensor, *others: object, **named: object) -> Tensor:
        if self.activation_quanter is not None:
            x = self.activation_quanter(x)
        return super().forward(x, *others, **named)


def _check_quanters(layer: nn.Layer, q_config: SingleLayerConfig) -> None:
    weight, activation = q_config.weight, q_config.activation
    kinds = LayeredWeightQuanter | None, LayeredActivationQuanter | None
    alone = weight is None and activation is not None
    if alone or not isinstance(weight, kinds[0]) or not isinstance(activation, kinds[1]):
        raise InputError(
            f"{layer.full_name()}: expected LayeredWeightQuanter as weight, and "
            "LayeredActivationQuanter or None as activation; got "
            f"{type(weight).__name__} and {type(activation).__name__}."
        )
    if layer._parameters.get("weight") is None:
        raise InputError(
            f"{layer.full_name()}: expected a weight of its own, got one that is computed from "
            "others (weight_norm, spectral_norm). Leave the layer in float, or remove the norm."
        )


class LayeredConv2D(LayeredLayer, nn.Conv2D):
    """Conv2D, also grouped and depthwise."""


class LayeredConv2DTranspose(LayeredLayer, nn.Conv2DTranspose):
    """Conv2DTranspose, with one step per output channel of a group."""


class LayeredLinear(LayeredLayer, nn.Linear):
    """Linear."""


class LayeredSemanticDifferenceConv2D(LayeredLayer, SemanticDifferenceConv2D):
    """SDN's operator; its quanter for activations is for u."""


class LayeredNorm(_Mixin):
    """BatchNorm with statistics for each trained width; its weight and bias are shared.

    The statistics of the highest width keep their names, `_mean` and `_variance`; the others are
    buffers, `w4_mean` and so on. An untrained width uses those of the next higher trained width.

    Args:
        layer: the layer to replace.
        q_config: its `weight`, a `LayeredWeightQuanter`, has the widths.
    """

    def __init__(self, layer: nn.Layer, q_config: SingleLayerConfig) -> None:
        nn.Layer.__init__(self)
        become(self, layer)
        self.trained = q_config.weight.kwargs["bits"]
        self.bits = self.trained[0]
        for bits in self.trained[1:]:
            for name in ("_mean", "_variance"):
                start = layer._parameters[name].detach().clone()
                self.register_buffer(f"w{bits}{name}", start)

    def set_bits(self, bits: int) -> None:
        self.bits = min((k for k in self.trained if k >= bits), default=self.trained[0])

    def statistics(self, name: str) -> Tensor:
        """Return `_mean` or `_variance` of the current width, `[channels]`."""
        if self.bits == self.trained[0]:
            return self._parameters[name]
        return self._buffers[f"w{self.bits}{name}"]

    @property
    def _mean(self) -> Tensor:
        return self.statistics("_mean")

    @property
    def _variance(self) -> Tensor:
        return self.statistics("_variance")


class LayeredBatchNorm1D(LayeredNorm, nn.BatchNorm1D):
    """BatchNorm1D."""


class LayeredBatchNorm2D(LayeredNorm, nn.BatchNorm2D):
    """BatchNorm2D."""


class LayeredSyncBatchNorm(LayeredNorm, nn.SyncBatchNorm):
    """SyncBatchNorm (GPU only: Paddle has no CPU kernel for it)."""


WITH_WEIGHT: dict[type[nn.Layer], type[nn.Layer]] = {
    nn.Conv2D: LayeredConv2D,
    nn.Conv2DTranspose: LayeredConv2DTranspose,
    nn.Linear: LayeredLinear,
    SemanticDifferenceConv2D: LayeredSemanticDifferenceConv2D,
}
NORMS: dict[type[nn.Layer], type[nn.Layer]] = {
    nn.BatchNorm1D: LayeredBatchNorm1D,
    nn.BatchNorm2D: LayeredBatchNorm2D,
    nn.SyncBatchNorm: LayeredSyncBatchNorm,
}


def set_bits(model: nn.Layer, bits: int) -> None:
    """Set the width of all quanters and norms of a model."""
    with_widths = LayeredNorm | LayeredWeightQuanterLayer | LayeredActivationQuanterLayer
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, with_widths):
            layer.set_bits(bits)
