"""The Pale Transformers of the zoo and their cards."""

from functools import partial

from ppvision.models.pale_transformer import VARIANTS, PaleTransformer, multiply_adds
from ppvision.zoo.cards import ZOO_WEIGHTS, ModelCard
from ppvision.zoo.registry import register_model

PAPER = (
    "Wu, Wu, Tan, Guo: Pale Transformer: A General Vision Transformer Backbone with Pale-Shaped "
    "Attention. AAAI 2022, https://arxiv.org/abs/2112.14000"
)
_PUBLISHED = {
    "pale_tiny": "ImageNet-1K top-1 83.4; ADE20K UPerNet mIoU 50.4 (single scale), 51.2 (multi); "
    "COCO Mask R-CNN 1x AP 47.4 box, 42.7 mask",
    "pale_small": "ImageNet-1K top-1 84.3; ADE20K UPerNet mIoU 51.2 (single scale), 52.2 (multi); "
    "COCO Mask R-CNN 1x AP 48.4 box, 43.7 mask",
    "pale_base": "ImageNet-1K top-1 84.9; ADE20K UPerNet mIoU 52.2 (single scale), 53.0 (multi); "
    "COCO Mask R-CNN 1x AP 49.3 box, 44.2 mask",
}
_PARAMETERS = {
    "pale_nano": 1_978_600,
    "pale_tiny": 21_748_712,
    "pale_small": 48_308_200,
    "pale_base": 85_324_776,
}


def _card(name: str) -> ModelCard:
    nano = name == "pale_nano"
    scores = [card.score for card in ZOO_WEIGHTS.values() if card.model == name]
    return ModelCard(
        name=name,
        paper=PAPER + (" (this width and depth are ours)" if nano else ""),
        parameters=_PARAMETERS[name],
        gflops=round(multiply_adds(VARIANTS[name], 224, 224) / 1e9, 3),
        recipe="configs/classification/pale_nano_tiny_imagenet_100.yml"
        if nano
        else f"configs/segmentation/upernet_{name}_ade20k_512x512_160k.yml",
        published="none" if nano else _PUBLISHED[name],
        measured="; ".join(scores) or "not trained here",
    )


for _name, _config in VARIANTS.items():
    # The options of the model are those of PaleTransformer's constructor; they are written there
    # only.
    register_model(_card(_name))(partial(PaleTransformer, _config))
