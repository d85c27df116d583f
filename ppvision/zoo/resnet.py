"""ResNets: networks to quantise, not ideas of this project."""

from paddle import nn
from paddle.vision import models

from ppvision.errors import InputError, shorten
from ppvision.models.resnet import CifarResNet
from ppvision.zoo.registry import ModelCard, register_model

PAPER = (
    "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, "
    "https://arxiv.org/abs/1512.03385"
)


@register_model(
    ModelCard(
        name="resnet20",
        paper=PAPER + " (section 4.2, shortcuts of option A)",
        parameters=334_072,
        gflops=1.987,
        recipe="benchmark/layered_cifar10.py (10 classes of 32 x 32: 269,722 parameters)",
        published="CIFAR-10 top-1 91.25",
    )
)
def resnet20(*, num_classes: int = 1000, in_channels: int = 3) -> nn.Layer:
    return CifarResNet(3, num_classes, in_channels)


@register_model(
    ModelCard(
        name="resnet18",
        paper=PAPER + " (as paddle.vision.models has it, whose weights fit)",
        parameters=11_689_512,
        gflops=1.814,
        recipe="configs/classification/resnet18_once_qat_imagenet.yml",
        published="ImageNet-1K top-1 72.12 (10 crops)",
    )
)
def resnet18(*, num_classes: int = 1000) -> nn.Layer:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(
            f"num_classes: expected a whole number of at least 1, got {shorten(num_classes)}."
        )
    return models.resnet18(num_classes=num_classes)
