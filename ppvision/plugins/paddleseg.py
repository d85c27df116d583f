"""PaddleSeg: the import of this module adds the zoo's backbones and repairs faults.

Afterwards every model of the zoo (`ppvision list`) is a backbone like any other, for PaddleSeg's
own tools and in Python. A model that is registered later also becomes a backbone:

    model:
      type: UPerNet
      backbone: {type: pale_nano, in_channels: 3, drop_path_rate: 0.1}
      backbone_indices: [0, 1, 2, 3]
      channels: 64

`SemanticDiffusionBackbone` puts SDN after any of them, or after one of PaddleSeg's own:

    backbone:
      type: SemanticDiffusionBackbone
      backbone: {type: ResNet50_vd, output_stride: 8}

The shims of `ppvision.plugins.shims` are applied if this Paddle needs them. Lists of images are
read as in a training with `ppvision` (`ppvision.plugins.paddleseg_data`). A transform of
`ppvision.deploy.register_transform` is also a transform of PaddleSeg's configs.
`ppvision.data.pictures` reads images and label maps: a file that is cut off or damaged is an error
with its name. A data set whose images have more than 8 bits per channel states the value of white:

    train_dataset: {type: Dataset, max_value: 4095, ...}

A second import or a reload changes nothing.
"""

from ppvision.errors import MissingPackageError, shorten

try:
    from paddleseg.core.train import loss_computation  # (shims repair its train())
    from paddleseg.cvlibs import builder, manager
    from paddleseg.datasets import ade, eg1800, supervisely
    from paddleseg.transforms import Compose
except ImportError as error:
    raise MissingPackageError(
        f"ppvision.plugins.paddleseg needs PaddleSeg, which does not import ({error}); install it "
        "with: pip install --no-deps paddleseg==2.8.0"
    ) from error

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.data.pictures import read_label, read_like_opencv
from ppvision.deploy.run import transforms as deployed
from ppvision.errors import InputError
from ppvision.nn import SemanticDiffusionPyramid
from ppvision.nn.semantic_diffusion import GUIDANCES, OPERATORS, SIMILARITIES
from ppvision.plugins import paddleseg_data, reading, shims
from ppvision.quant.train.once_qat import OnceQAT
from ppvision.zoo.factory import create_model, find_model_signature
from ppvision.zoo.registry import follow_models

_NOT_OF_A_BACKBONE = ("num_classes", "features_only")


def _backbone(name: str) -> Callable[..., nn.Layer]:
    def build(**options: object) -> nn.Layer:
        return create_model(name, features_only=True, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as a PaddleSeg backbone: its feature maps, from the finest.

    Args:
        **options: those of `create_model({name!r}, ...)`, except those of the head. PaddleSeg's
            builder reads their names from the signature.

    Returns:
        The model, with `feat_channels`.

    Raises:
        as `create_model`.
    """
    own = find_model_signature(name)
    build.__signature__ = own.replace(
        parameters=[p for p in own.parameters.values() if p.name not in _NOT_OF_A_BACKBONE]
    )
    return build


class SemanticDiffusionBackbone(nn.Layer):
    """SDN after a backbone: its feature maps, sharper at class boundaries, for any head.

    Args:
        backbone: a backbone of PaddleSeg or of ppvision with an attribute `feat_channels`.
        levels: numbers of the feature maps to enhance; negative numbers count from the coarsest.
            Default None: all. Choose only levels that the head reads: others cost time without
            effect, and in data-parallel training Paddle waits for their gradients.
        similarity: see `ppvision.nn.SemanticDiffusionPyramid`. Default None: `none` (central
            differences) unless `guidance` is given.
        groups: groups of the semantic difference convolutions. Default 1.
        width: channels inside them; see `ppvision.nn.SemanticDiffusion`.
        in_channels: channels of the image; PaddleSeg's builder passes them to the backbone.
        guidance: see `ppvision.nn.SemanticDiffusionPyramid`. With `classes` or `boundary`, a model
            from PaddleSeg's builder also returns the logits of the guidance's head in training, as
            the last entry. The config must name a loss for them.
        num_classes: classes of the guidance `classes`; PaddleSeg's builder uses those of the model.
        operator, steps, detach_guidance: see `ppvision.nn.SemanticDiffusion`.

    Attributes:
        feat_channels: channels of the backbone's feature maps.

    Raises:
        ValueError: the backbone is missing, has no `feat_channels` or was built for other
            `in_channels`; or a level does not exist.

    Source: SDN, NeurIPS 2022 (`ppvision.nn.semantic_diffusion`).
    """

    def __init__(
        self,
        backbone: nn.Layer,
        levels: Sequence[int] | None = None,
        similarity: Literal[tuple(SIMILARITIES)] | None = None,
        groups: int = 1,
        width: int | None = None,
        in_channels: int | None = None,
        guidance: Literal[tuple(GUIDANCES)] | None = None,
        num_classes: int | None = None,
        operator: Literal[tuple(OPERATORS)] = "difference",
        steps: int = 1,
        detach_guidance: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Layer):
            raise InputError(
                f"SemanticDiffusionBackbone: expected a backbone, got {shorten(backbone)}. In "
                "YAML: backbone: {type: NAME}."
            )
        if not hasattr(backbone, "feat_channels"):
            raise InputError(
                "SemanticDiffusionBackbone: expected a backbone that names its feat_channels, got "
                f"{type(backbone).__name__}. Set that attribute to the channels of its outputs."
            )
        first = next((m for m in backbone.sublayers() if isinstance(m, nn.Conv2D)), None)
        if None not in (in_channels, first) and first._in_channels != in_channels:
            raise InputError(
                f"in_channels: got {in_channels}, but the {type(backbone).__name__} inside takes "
                f"{first._in_channels}. Set in_channels there."
            )
        self.backbone = backbone
        self.feat_channels = list(backbone.feat_channels)
        self.diffusion = SemanticDiffusionPyramid(
            self.feat_channels,
            levels,
            guidance=guidance,
            num_classes=num_classes,
            similarity=similarity,
            groups=groups,
            width=width,
            operator=operator,
            steps=steps,
            detach_guidance=detach_guidance,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.diffusion(self.backbone(x))


def add_guidance_logits(model: nn.Layer) -> None:
    """Make a model also return the logits of the guidance's head in training.

    They follow the model's own logits and have the size of the image. The model has a
    `SemanticDiffusionBackbone`. If its guidance has no head, nothing changes.

    Args:
        model: a model with PaddleSeg's interface: it returns a list of logits. PaddleSeg's builder
            calls this function itself.
    """
    pyramids = [x for x in model.sublayers() if isinstance(x, SemanticDiffusionPyramid)]

    def add(layer: nn.Layer, inputs: tuple, outputs: list[Tensor]) -> list[Tensor]:
        size = inputs[0].shape[2:]
        found = [logits for pyramid in pyramids for logits in pyramid.logits]
        for pyramid in pyramids:
            pyramid.logits = []  # values of a step are not copied with the model
        return [*outputs, *(F.interpolate(x, size, mode="bilinear") for x in found)]

    if any(pyramid.guidance != "next_level" for pyramid in pyramids):
        model.register_forward_post_hook(add)


def _hand_on(build: Callable[[object, dict], object]) -> Callable:
    """Pass `in_channels` and the classes to the inner backbone: PaddleSeg builds it first and sets
    `in_channels` only for the outer one, and a backbone does not know the classes of its model."""

    def is_sdn(cfg: object) -> bool:
        return isinstance(cfg, dict) and cfg.get("type") == SemanticDiffusionBackbone.__name__

    @functools.wraps(build)
    def build_component(self: object, cfg: dict) -> object:
        inner = cfg.get("backbone")
        if is_sdn(cfg) and isinstance(inner, dict) and cfg.get("in_channels") is not None:
            cfg = cfg | {"backbone": {"in_channels": cfg["in_channels"], **inner}}
        if not is_sdn(inner):
            return build(self, cfg)
        if inner.get("guidance") == "classes" and "num_classes" in cfg:
            cfg = cfg | {"backbone": {"num_classes": cfg["num_classes"], **inner}}
        model = build(self, cfg)
        add_guidance_logits(model)
        return model

    build_component.hands_on = True
    return build_component


def _read_first(compose: Callable[[object, dict], dict]) -> Callable[[object, dict], dict]:
    """Replaces the reading in PaddleSeg's `Compose`, which reads only entries that are still
    paths."""

    @functools.wraps(compose)
    def __call__(self: object, data: dict) -> dict:
        if isinstance(data.get("img"), str):
            pixels = read_like_opencv(data["img"], self.read_flag, max_value=self.max_value)
            data["img"] = pixels.astype("float32")
        if isinstance(data.get("label"), str):
            data["label"] = read_label(data["label"])
        return compose(self, data)

    __call__.reads_first = True
    return __call__


def _keep_max_value(dataset: object, max_value: int) -> None:
    dataset.transforms.max_value = max_value


def _read_strictly() -> None:
    if not hasattr(Compose.__call__, "reads_first"):
        Compose.max_value = None  # until a data set sets it
        Compose.__call__ = _read_first(Compose.__call__)
    reading.read_strictly(ade, eg1800, supervisely, labels=True)
    for dataset in manager.DATASETS.components_dict.values():
        # These two read images themselves, and have images of 8 bits.
        if dataset.__module__ not in (eg1800.__name__, supervisely.__name__):
            reading.accept_max_value(dataset, _keep_max_value)


def _register(component: Callable[..., nn.Layer]) -> Callable[..., nn.Layer]:
    name = component.__name__
    known = manager.BACKBONES.components_dict.get(name)
    if known is not None and known.__module__ == __name__:
        return known  # imported before, and reloaded now
    if known is not None:
        raise InputError(
            f"PaddleSeg backbone {shorten(name)}: expected a free name, but {known.__module__} has "
            "registered it. Import only one of the two."
        )
    return manager.BACKBONES.add_component(component)


def _register_model(name: str) -> None:
    """Register a model of the zoo as a backbone, and make it an attribute of this module."""
    if "features_only" in find_model_signature(name).parameters:
        globals()[name] = _register(_backbone(name))


class _Deployed:
    """Applies a registered transform to PaddleSeg's dictionary."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, data: dict) -> dict:
        data["img"], _ = self.transform(data["img"])  # [H, W, 3]: the label keeps its size
        return data


def _register_transform(name: str) -> None:
    """Add a transform of `ppvision.deploy.register_transform` to PaddleSeg's transforms."""

    @functools.wraps(deployed.KNOWN[name], updated=())
    def build(**options: object) -> _Deployed:
        return _Deployed(deployed.KNOWN[name](**options))

    build.is_deployed = True
    known = manager.TRANSFORMS.components_dict
    if name in known and not hasattr(known[name], "is_deployed"):
        raise InputError(
            f"register_transform: PaddleSeg has a transform {shorten(name)}; expected a name of "
            "your own. Rename the class."
        )
    known[name] = build


follow_models(_register_model)
deployed.follow_transforms(_register_transform)
SemanticDiffusionBackbone = _register(SemanticDiffusionBackbone)


def compute_stock_losses(logits: list[Tensor], losses: dict, data: dict) -> list[Tensor]:
    """Apply the losses of a config to a list of logits, as PaddleSeg's train() does.

    Args:
        logits: `[B, K, H, W]` each.
        losses: `types` and `coef`, one entry per logits.
        data: a batch with `label` and, if the data set has edges, `edge`.
    """
    edges = data["edge"].astype("int64") if "edge" in data else None
    return loss_computation(
        logits_list=logits, labels=data["label"].astype("int64"), edges=edges, losses=losses
    )


OnceQAT.stock_losses = staticmethod(compute_stock_losses)
if not hasattr(builder.Builder.build_component, "hands_on"):
    builder.Builder.build_component = _hand_on(builder.Builder.build_component)
_read_strictly()
shims.apply(shims.PADDLESEG_SHIMS)
paddleseg_data.read_alike()

__all__ = ["SemanticDiffusionBackbone"]
