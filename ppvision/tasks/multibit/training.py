"""A training step at several widths: the forward pass of each, and which widths are drawn."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from paddle import Tensor, nn

from ppvision.quant import OnceQAT


def make_passes(
    once: OnceQAT, losses: Callable[[nn.Layer, object], Sequence[Tensor]]
) -> dict[str, Callable[[nn.Layer, object], Sequence[Tensor]]]:
    """Return the forward passes of a training step, one per width, the highest first.

    Args:
        once: the model.
        losses: function that gives the weighted losses of one forward pass.
    """

    def run(place: int, network: nn.Layer, batch: object) -> Sequence[Tensor]:
        once.train_at(once.drawn[place])
        return losses(network, batch)

    return {name: partial(run, place) for place, name in enumerate(once.names)}


def draw_widths(once: OnceQAT, seed: int, step: int) -> None:
    """Draw the widths of a step only from seed and step, so that they are equal on all ranks and
    after a resume."""
    once.draw(random.Random(f"{seed}/{step}"))
