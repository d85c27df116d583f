"""ResNets: networks for quantisation and comparisons; they are not ideas of this project."""

from functools import partial

from paddle.vision.models.resnet import BasicBlock, BottleneckBlock

from ppvision.models.resnet import CifarResNet, ImageNetResNet
from ppvision.zoo.cards import ModelCard, PretrainedConfig
from ppvision.zoo.registry import register_model

PAPER = (
    "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, "
    "https://arxiv.org/abs/1512.03385"
)
_OWN_FILE = " (as paddle.vision.models has it; its weights and torchvision's fit, from a file)"

register_model(
    ModelCard(
        name="resnet20",
        paper=PAPER + " (section 4.2, shortcuts of option A)",
        parameters=334_072,
        gflops=1.987,
        recipe="benchmark/layered_cifar10.py (10 classes of 32 x 32: 269,722 parameters)",
        published="CIFAR-10 top-1 91.25",
        config=PretrainedConfig(input_size=(3, 32, 32), resize_short=None),
    )
)(partial(CifarResNet, 3))

register_model(
    ModelCard(
        name="resnet18",
        paper=PAPER + _OWN_FILE,
        parameters=11_689_512,
        gflops=1.814,
        recipe="configs/classification/resnet18_once_qat_imagenet.yml",
        published="ImageNet-1K top-1 72.12 (10 crops)",
    )
)(partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2)))

register_model(
    ModelCard(
        name="resnet50",
        paper=PAPER + _OWN_FILE,
        parameters=25_557_032,
        gflops=4.089,
        recipe="none here; give it a file of weights",
        published="ImageNet-1K top-1 77.15 (10 crops)",
    )
)(partial(ImageNetResNet, BottleneckBlock, (3, 4, 6, 3)))
