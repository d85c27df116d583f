"""EfficientNet-Lite: teachers for distillation, and real ImageNet networks to quantise."""

from paddle import nn

from ppvision.models.efficientnet_lite import VARIANTS, EfficientNetLite
from ppvision.zoo.registry import ModelCard, register_model

PAPER = (
    "Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019, "
    "https://arxiv.org/abs/1905.11946 (the Lite form of its authors' code)"
)
# Parameters, multiply-adds of a 224 x 224 picture in 1e9, side of the pictures and published top-1.
_FIGURES = {
    "efficientnet_lite0": (4_652_008, 0.385, 224, 75.1),
    "efficientnet_lite2": (6_092_072, 0.577, 260, 77.6),
}


def _card(name: str) -> ModelCard:
    parameters, gflops, side, top1 = _FIGURES[name]
    return ModelCard(
        name=name,
        paper=PAPER,
        parameters=parameters,
        gflops=gflops,
        recipe="benchmark/efficientnet_weights.py converts its published ImageNet weights",
        published=f"ImageNet-1K top-1 {top1} at {side} x {side}",
    )


def _register(name: str) -> None:
    def build(*, num_classes: int = 1000, in_channels: int = 3) -> nn.Layer:
        return EfficientNetLite(VARIANTS[name], num_classes, in_channels)

    build.__qualname__ = build.__name__ = name
    register_model(_card(name))(build)


for _name in VARIANTS:
    _register(_name)
