"""PaddleSeg: importing this module adds the Pale backbones and repairs what is broken.

Afterwards `pale_nano`, `pale_tiny`, `pale_small` and `pale_base` are backbones like any other, for
PaddleSeg's own tools as well as for Python:

    model:
      type: UPerNet
      backbone: {type: pale_nano, in_channels: 3, drop_path_rate: 0.1}
      backbone_indices: [0, 1, 2, 3]
      channels: 64

and the shims of `ppvision.plugins.shims` are in force where this Paddle needs them. Importing it
again, or reloading it, changes nothing.
"""

try:
    import paddleseg.core  # noqa: F401  (shims repair its train())
    from paddleseg.cvlibs import manager
except ImportError as error:
    raise ImportError(
        f"ppvision.plugins.paddleseg needs PaddleSeg, which does not import ({error}); install it "
        "with: pip install --no-deps paddleseg==2.8.0"
    ) from error

from collections.abc import Callable

from paddle import nn

from ppvision.plugins import shims
from ppvision.zoo import create_model
from ppvision.zoo.weights import assign_weights, read_weights

# Weights of a classifier are welcome: they lack the pyramid's norms and bring a head.
MAY_MISS = ("feature_norms.*",)
MAY_BRING = ("norm.*", "head.*")
# So are those of a segmentation model: PaddleSeg keeps the backbone under this name.
WHOLE_MODEL = "backbone."


def _backbone(name: str) -> Callable[..., nn.Layer]:
    def build(
        in_channels: int = 3,
        pretrained: str | None = None,
        pale_size: int | tuple[int, int] | None = None,
        drop_path_rate: float | None = None,
        mask_padding: bool = True,
        fused: bool | None = None,
        recompute: bool = False,
    ) -> nn.Layer:
        net = create_model(
            name,
            features_only=True,
            in_channels=in_channels,
            pale_size=pale_size,
            drop_path_rate=drop_path_rate,
            mask_padding=mask_padding,
            fused=fused,
            recompute=recompute,
        )
        if pretrained is not None:
            arrays = read_weights(pretrained)
            if any(key.startswith(WHOLE_MODEL) for key in arrays):
                arrays = {
                    key.removeprefix(WHOLE_MODEL): array
                    for key, array in arrays.items()
                    if key.startswith(WHOLE_MODEL)
                }
            assign_weights(net, arrays, str(pretrained), MAY_MISS, MAY_BRING)
        return net

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as a PaddleSeg backbone: four feature maps at strides 4, 8, 16, 32.

    Args:
        in_channels: channels of the picture. Default 3.
        pretrained: `.safetensors` or `.pdparams` of the backbone, of the classifier or of a whole
            segmentation model, or the name of weights in the zoo. Default None: fresh weights.
        pale_size, drop_path_rate, mask_padding, fused, recompute: see `PaleTransformer`.

    Returns:
        A `PaleTransformer` with `feat_channels`.

    Raises:
        ValueError: an argument out of range, or weights that do not fit.
        FileNotFoundError: no such weights.
    """
    return build


def _register(name: str) -> Callable[..., nn.Layer]:
    known = manager.BACKBONES.components_dict.get(name)
    if known is not None and known.__module__ == __name__:
        return known  # imported before, and reloaded now
    if known is not None:
        raise ValueError(
            f"PaddleSeg backbone {name!r}: expected a free name, but {known.__module__} has "
            "registered it. Import only one of the two."
        )
    return manager.BACKBONES.add_component(_backbone(name))


pale_nano, pale_tiny, pale_small, pale_base = map(
    _register, ("pale_nano", "pale_tiny", "pale_small", "pale_base")
)
shims.apply(shims.PADDLESEG_SHIMS)

__all__ = ["pale_base", "pale_nano", "pale_small", "pale_tiny"]
