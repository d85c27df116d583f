"""Parameter groups and learning rates of common vision recipes."""

import paddle
from paddle import nn

from ppvision.errors import InputError, shorten


def make_parameter_groups(
    model: nn.Layer, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Make groups for a Paddle optimiser: no decay on norms and biases, lower rates for earlier
    layers.

    Args:
        model: any model. Its `no_weight_decay()` and `layer_groups()` are used if it has them, like
            every model of the zoo. Layer-wise decay needs the second.
        weight_decay: decay of parameters with two or more axes that the model does not exclude.
            Parameters with one axis (norms, biases) have none.
        layer_decay: factor of the learning rate from one group of layers to the one before it, in
            (0, 1], or None for one rate. The head has the full rate, the stem the lowest.

    Returns:
        One dictionary per decay and rate, with `params`, `weight_decay`, `learning_rate` (a factor
        of the optimiser's).

    Raises:
        ValueError: a value out of its range, or layer-wise decay for a model without groups.

    Source of layer-wise decay: BEiT (Bao et al., 2022); numbered as CSWin does.
    """
    if weight_decay < 0 or (layer_decay is not None and not 0 < layer_decay <= 1):
        raise InputError(
            "optimizer: expected weight_decay of at least 0 and layer_decay in (0, 1], got "
            f"{shorten(weight_decay)} and {shorten(layer_decay)}."
        )
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    steps = _steps_from_the_head(model) if layer_decay is not None else {}
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:
            continue
        decays = parameter.ndim > 1 and name not in excluded
        decay = float(weight_decay) if decays else 0.0
        rate = 1.0 if layer_decay is None else layer_decay ** steps[name]
        group = groups.setdefault(
            (decay, rate), {"params": [], "weight_decay": decay, "learning_rate": rate}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _steps_from_the_head(model: nn.Layer) -> dict[str, int]:
    """Return the number of layer groups between each parameter and the head."""
    if not hasattr(model, "layer_groups"):
        raise InputError(
            "optimizer: layer_decay needs a model with layer_groups, as those of the zoo have, got "
            f"{type(model).__name__}. Omit layer_decay."
        )
    groups = model.layer_groups()
    return {name: len(groups) - 1 - i for i, group in enumerate(groups) for name in group}


def make_cosine_schedule(
    iters: int,
    warmup: int,
    *,
    learning_rate: float,
    warmup_start_lr: float = 0.0,
    end_lr: float = 0.0,
) -> paddle.optimizer.lr.LRScheduler:
    """Make a cosine schedule from `learning_rate` to `end_lr`, after a linear warm-up of `warmup`
    steps.

    Raises:
        ValueError: the warm-up is as long as the training, or rates are out of order.
    """
    if not 0 <= warmup < iters:
        raise InputError(
            f"lr_scheduler: expected a warm-up shorter than the training of {iters} steps, got "
            f"{warmup}. Lower warmup_epochs."
        )
    if not 0 <= warmup_start_lr <= learning_rate or not 0 <= end_lr <= learning_rate:
        raise InputError(
            "lr_scheduler: expected warmup_start_lr and end_lr between 0 and learning_rate, got "
            f"{shorten(warmup_start_lr)}, {shorten(end_lr)} and {shorten(learning_rate)}."
        )
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(learning_rate, iters - warmup, end_lr)
    if warmup == 0:
        return cosine
    return paddle.optimizer.lr.LinearWarmup(cosine, warmup, warmup_start_lr, learning_rate)
