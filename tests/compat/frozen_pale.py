"""A very small Pale Transformer as a backbone of PaddleSeg's, `compat_pale`; a config names this
module under `imports`.

`pale_nano` has 2 million weights, and a run folder holds them five times; this one has 8,640.
Never change anything here: checkpoints were written with these widths and names.
"""

from paddle import nn
from paddleseg.cvlibs import manager

from ppvision.models.pale_transformer import PaleConfig, PaleTransformer

# The narrowest one: in both halves of the channels one head. Two blocks are enough: at 64 pixels
# the first stage holds several pales and the second pads its map of 8 x 8.
CONFIG = PaleConfig(channels=4, depths=(1, 1, 0, 0), num_heads=(2, 2, 2, 2), drop_path_rate=0.1)


@manager.BACKBONES.add_component
def compat_pale(in_channels: int = 3, pretrained: str | None = None) -> nn.Layer:
    """Feature maps at strides 4, 8, 16, 32. PaddleSeg passes `pretrained`; there are no weights."""
    return PaleTransformer(CONFIG, features_only=True, in_channels=in_channels)
