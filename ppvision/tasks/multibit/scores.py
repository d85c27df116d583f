"""Scores of a model at its widths."""

from collections.abc import Callable

import numpy as np
from paddle import nn

from ppvision.quant import OnceQAT


def score_by_width(
    model: nn.Layer, scores: Callable[[nn.Layer], dict[str, float]]
) -> dict[str, float]:
    """Evaluate a model; a once-QAT is evaluated at every width.

    Args:
        model: a once-QAT, whose width is restored afterwards, or a model at one width.
        scores: function that gives the scores of the model at its width, by tag.

    Returns:
        Scores by tag. For a once-QAT, each tag has the mean over the widths (the first tag decides
        which model is the best); then come the scores of each width: `Evaluate/mIoU_w4`.
    """
    if not isinstance(model, OnceQAT):
        return scores(model)
    before, found = model.bits, {}
    for k in model.widths:
        model.set_bits(k)
        found[k] = scores(model)
    model.set_bits(before)
    tags = [tag for tag in found[model.widths[0]] if all(tag in s for s in found.values())]
    means = {tag: float(np.mean([s[tag] for s in found.values()])) for tag in tags}
    return means | {f"{tag}_w{k}": s[tag] for k, s in found.items() for tag in tags}
