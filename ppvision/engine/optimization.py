"""Parameter groups and learning rates of the usual vision recipes."""

import re

import paddle
from paddle import nn

from ppvision.errors import InputError


def parameter_groups(
    model: nn.Layer, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Groups for a Paddle optimiser: no decay on norms and biases, a rate that falls with depth.

    Args:
        model: any model. Layer-wise decay needs `stages` of blocks with `merges` before them, as
            the Pale Transformer has them.
        weight_decay: of everything with two axes or more. What has one axis (norms, biases) has
            none.
        layer_decay: factor of the learning rate from one block to the one before it, in (0, 1], or
            None for one rate. The head has the full rate, the patch embedding the lowest.

    Returns:
        One dictionary per decay and rate, with `params`, `weight_decay`, `learning_rate` (a factor
        of the optimiser's).

    Raises:
        ValueError: a value out of its range, or layer-wise decay of a model without such stages.

    Source of layer-wise decay: BEiT (Bao et al., 2022); numbered as CSWin does.
    """
    if weight_decay < 0 or (layer_decay is not None and not 0 < layer_decay <= 1):
        raise InputError(
            "optimizer: expected weight_decay of at least 0 and layer_decay in (0, 1], got "
            f"{weight_decay!r} and {layer_decay!r}."
        )
    starts = _block_starts(model) if layer_decay is not None else [0]
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:
            continue
        decay = float(weight_decay) if parameter.ndim > 1 else 0.0
        rate = 1.0
        if layer_decay is not None:
            rate = layer_decay ** (starts[-1] + 1 - _depth(name, starts))
        group = groups.setdefault(
            (decay, rate), {"params": [], "weight_decay": decay, "learning_rate": rate}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _block_starts(model: nn.Layer) -> list[int]:
    """Blocks before each stage, and in all."""
    stages = getattr(model, "stages", None)
    if stages is None:
        raise InputError(
            f"optimizer: layer_decay needs a model with stages of blocks, got "
            f"{type(model).__name__}. Leave layer_decay away."
        )
    starts = [0]
    for stage in stages:
        starts.append(starts[-1] + len(stage))
    return starts


def _depth(name: str, starts: list[int]) -> int:
    """0 for the patch embedding, 1 to n for blocks, n + 1 for norms and head behind them. A merge
    between two stages has the depth of the block behind it."""
    if found := re.match(r"stages\.(\d+)\.(\d+)\.", name):
        return starts[int(found[1])] + int(found[2]) + 1
    if found := re.match(r"merges\.(\d+)\.", name):
        stage = int(found[1])
        return starts[stage] + 1 if stage else 0
    return starts[-1] + 1


def cosine_with_warmup(
    iters: int,
    warmup: int,
    *,
    learning_rate: float,
    warmup_start_lr: float = 0.0,
    end_lr: float = 0.0,
) -> paddle.optimizer.lr.LRScheduler:
    """A cosine from `learning_rate` to `end_lr`, behind a linear rise over `warmup` steps.

    Raises:
        ValueError: warm-up as long as the training, or rates out of order.
    """
    if not 0 <= warmup < iters:
        raise InputError(
            f"lr_scheduler: expected a warm-up shorter than the training of {iters} steps, got "
            f"{warmup}. Lower warmup_epochs."
        )
    if not 0 <= warmup_start_lr <= learning_rate or not 0 <= end_lr <= learning_rate:
        raise InputError(
            "lr_scheduler: expected warmup_start_lr and end_lr between 0 and learning_rate, got "
            f"{warmup_start_lr!r}, {end_lr!r} and {learning_rate!r}."
        )
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(learning_rate, iters - warmup, end_lr)
    if warmup == 0:
        return cosine
    return paddle.optimizer.lr.LinearWarmup(cosine, warmup, warmup_start_lr, learning_rate)
