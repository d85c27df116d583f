"""A third of `pale_nano`: every kind of layer, padded maps and stochastic depth; time goes by
layers."""

from ppvision.models.pale_transformer import PaleConfig

SMALL_PALE = PaleConfig(32, (1, 0, 1, 0), (2, 2, 4, 8), 0.05)
