"""Combine the losses of all widths in a training of all widths.

`OnceQAT` accepts any function for it. We chose an equal mean, and distillation from the highest
width.
"""

import math
from collections.abc import Callable, Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.errors import InputError, shorten
from ppvision.quant.train.quanters import check_widths

# Maps a width, its losses and its logits `[B, K, ...]` (None if a model gives only losses) to the
# losses to minimise. In a step the widths come one after another, the highest first.
WeighLosses = Callable[[int, list[Tensor], Tensor | None], list[Tensor]]


class WeightedLosses:
    """The losses of a width times its weight and, if there are logits, a distillation loss.

    Args:
        bits: widths that are trained.
        weights: weight of each width's loss, in the order of `bits`. They are scaled to a mean of
            1, so that learning rate and decay keep their meaning. Default: equal weights.
        distillation: weight of the Kullback-Leibler divergence from the prediction of the highest
            width, in the loss of every other width. Default 0.

    Raises:
        ValueError: a value is out of its range.

    Attributes:
        weights: weight by width.
    """

    def __init__(
        self,
        bits: Sequence[int],
        weights: Sequence[float] | None = None,
        distillation: float = 0.0,
    ) -> None:
        widths = check_widths(bits)
        if not 0 <= distillation < math.inf:
            raise InputError(
                f"distillation: expected a number of at least 0, got {shorten(distillation)}."
            )
        weights = [1.0] * len(widths) if weights is None else list(weights)
        possible = len(weights) == len(widths) and min(weights) >= 0
        if not possible or not 0 < sum(weights) < math.inf:
            raise InputError(
                f"weights: expected a number of at least 0 for each of {list(bits)}, got "
                f"{shorten(weights)}."
            )
        order = sorted(range(len(weights)), key=lambda i: -list(bits)[i])
        share = len(weights) / sum(weights)
        self.weights = {k: weights[i] * share for k, i in zip(widths, order, strict=True)}
        self.distillation = distillation
        self._highest = widths[0]
        self._teacher: Tensor | None = None  # the highest width's logits in this step

    def __call__(self, bits: int, losses: list[Tensor], logits: Tensor | None) -> list[Tensor]:
        if self.distillation and logits is not None:
            if bits == self._highest:
                self._teacher = logits.detach()
            else:
                losses = [*losses, self.distillation * _divergence(logits, self._teacher)]
        return [self.weights[bits] * loss for loss in losses]


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence from the teacher's prediction, the mean over images
    and pixels.

    Shapes: `[B, K, ...]` both.
    """
    with paddle.amp.auto_cast(enable=False):
        teacher = F.log_softmax(teacher.astype("float32"), axis=1)
        student = F.log_softmax(logits.astype("float32"), axis=1)
        return (paddle.exp(teacher) * (teacher - student)).sum(axis=1).mean()
