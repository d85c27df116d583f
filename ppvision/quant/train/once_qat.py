"""One training for every width.

Source: arXiv 2212.05326 (see `ppvision.quant.codes`): the source weights are trained for all
precisions together. We chose to train all widths at every step, and as an alternative the sandwich
rule (Yu and Huang, ICCV 2019).
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paddle import Tensor, nn

from ppvision.errors import EngineError, InputError, shorten
from ppvision.quant.train.layers import LayeredLayer, set_bits
from ppvision.quant.train.losses import WeighLosses, WeightedLosses
from ppvision.quant.train.quanters import DEFAULT_BITS, check_widths

OBJECTIVES = ("mean", "sandwich")

Losses = Callable[[list[Tensor], dict, dict], Sequence[Tensor]]


class OnceQAT(nn.Layer):
    """A quantised model that is trained at all of its widths.

    In evaluation it is the model at one width; `set_bits` chooses the width. In training, a forward
    pass runs the widths of a step one after another and returns the outputs of all.
    `loss_computation`, which PaddleSeg's own `train()` calls, separates them. Our engine runs each
    width separately (`train_at`) and adds the gradients, so memory holds one width at a time.
    Models that recompute layers in the backward pass need our engine: with all widths in one graph
    the layers would be recomputed at another width.

    Args:
        model: a model with layered quanters (`ppvision.plugins.paddleslim.LayeredQAT`).
        bits: widths to train; the quanters must know them. Default 8, 6, 4, 3, 2.
        objective: "mean" (default): every width at every step. "sandwich": the highest, the lowest
            and one random other width at every step.
        weigh: a function that turns the losses of a width into those to add up. Its arguments are
            the width, its losses and its logits `[B, K, ...]` (None if the model returns only
            losses). Default: `WeightedLosses` of `weights` and `distillation`.
        weights, distillation: see `ppvision.quant.train.losses.WeightedLosses`; not with `weigh`.
        losses: a function of the logits, the losses and the batch. PaddleSeg's trainer uses it to
            apply the losses of a config if the model does not do it itself. Default: PaddleSeg's
            function, which `ppvision.plugins.paddleseg` provides (`stock_losses`).

    Raises:
        ValueError: the model has no quanters, they do not know a width, a value is out of its
            range, or `weigh` is used with `weights` or `distillation`.
    """

    # The default of `losses`; `ppvision.plugins.paddleseg` sets it. PaddleSeg's users build
    # `OnceQAT(model, bits)` and train it with PaddleSeg's own trainer.
    stock_losses: Losses | None = None

    def __init__(
        self,
        model: nn.Layer,
        bits: Sequence[int] = DEFAULT_BITS,
        *,
        objective: str = "mean",
        weigh: WeighLosses | None = None,
        weights: Sequence[float] | None = None,
        distillation: float = 0.0,
        losses: Losses | None = None,
    ) -> None:
        super().__init__()
        self.widths = check_widths(bits)
        _check_quanters(model, self.widths)
        if objective not in OBJECTIVES:
            raise InputError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {shorten(objective)}."
            )
        if weigh is not None and (weights is not None or distillation):
            raise InputError(
                "weigh: expected it without weights and distillation, got both. Give "
                "weigh=WeightedLosses(bits, weights, distillation), or a function that calls it."
            )
        self.weigh = weigh or WeightedLosses(bits, weights, distillation)
        self.apply_losses = losses
        self.model = model
        self.objective = objective
        self.bits = self.widths[0]
        self._alone: int | None = None
        self._ran: tuple[int, ...] = ()  # widths of the last forward pass in training
        self._draws = random.Random(0)
        self.drawn = self.widths  # widths of the step
        self.draw(self._draws)
        set_bits(model, self.bits)

    def set_bits(self, bits: int) -> None:
        """Set the width for evaluation; it may be any from the lowest to the highest width.

        An untrained width uses the statistics of the next higher trained width.
        """
        low, high = self.widths[-1], self.widths[0]
        if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
            raise InputError(f"bits: expected {low} to {high}, got {shorten(bits)}.")
        self.bits = bits
        set_bits(self.model, bits)

    def draw(self, chance: random.Random) -> None:
        """Choose the widths of the next training step (`drawn`), the highest first."""
        if self.objective == "sandwich" and len(self.widths) > 2:
            self.drawn = self.widths[0], chance.choice(self.widths[1:-1]), self.widths[-1]

    def train_at(self, bits: int | None) -> None:
        """Let forward passes in training run only one width, until the next call; None: all widths.

        A backward pass that computes layers again (recompute) must run before the next call.
        """
        self._alone = bits
        if bits is not None:
            self.set_bits(bits)

    @contextlib.contextmanager
    def alone(self, bits: int) -> Iterator[None]:
        """Apply `train_at` in the block, and restore the earlier setting."""
        before = self.bits
        self.train_at(bits)
        try:
            yield
        finally:
            self.train_at(None)
            self.set_bits(before)

    def forward(self, *inputs: object, **named: object) -> object:
        """In evaluation, return the model's output at the current width. In training, return a list
        of outputs, the highest width first. If the model gives its losses by name, like
        PaddleDetection's, return one dictionary: `loss`, the mean over the widths of the results of
        `weigh`, and `loss_w8`, `loss_w4`, ..."""
        if not self.training:
            return self.model(*inputs, **named)
        if self._alone is not None:
            self._ran = (self._alone,)
            return self.model(*inputs, **named)
        self.draw(self._draws)
        self._ran = self.drawn
        before, outputs = self.bits, list[Any]()
        for bits in self._ran:
            self.set_bits(bits)
            found = self.model(*inputs, **named)
            outputs += found if isinstance(found, (list, tuple)) else [found]
        self.set_bits(before)
        return self._one_dict(outputs) if isinstance(outputs[0], dict) else outputs

    def _one_dict(self, outputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses for PaddleDetection's trainer: `loss`, the mean, then that of each
        width."""
        losses = [found["loss"] for found in outputs]
        pairs = zip(self._ran, losses, strict=True)
        total = sum(sum(self.weigh(k, [loss], None)) for k, loss in pairs) / len(losses)
        names = [f"loss_{name}" for name in self.names]
        return {"loss": total, **dict(zip(names, losses, strict=True))}

    @property
    def names(self) -> list[str]:
        """Return names of the widths of a step, equal at every step: `w8`, `w4`, ...; `random` for
        a drawn width."""
        if self.objective == "mean" or len(self.widths) < 3:
            return [f"w{k}" for k in self.drawn]
        return [f"w{self.widths[0]}", "random", f"w{self.widths[-1]}"]

    def load_meanstd(self, transforms: Sequence[dict]) -> None:
        """Accept the normalisation of images, which PaddleDetection's trainer gives to
        architectures."""
        self.model.load_meanstd(transforms)

    def loss_computation(
        self, logits_list: Sequence[Tensor], losses: dict, data: dict
    ) -> list[Tensor]:
        """Return the losses of all widths from the outputs of a training pass; their sum is
        minimised.

        Args:
            logits_list: the output of `forward`.
            losses: PaddleSeg's losses, with `types` and `coef`.
            data: the batch.
        """
        size = len(logits_list) // len(self._ran)
        total = []
        for number, bits in enumerate(self._ran):
            logits = list(logits_list[number * size : (number + 1) * size])
            total += [loss / len(self._ran) for loss in self._losses(bits, logits, losses, data)]
        return total

    def _losses(self, bits: int, logits: list[Tensor], losses: dict, data: dict) -> list[Tensor]:
        if hasattr(self.model, "loss_computation"):
            found = self.model.loss_computation(logits, losses, data)
        elif (apply := self.apply_losses or OnceQAT.stock_losses) is not None:
            found = apply(logits, losses, data)
        else:
            raise EngineError(
                "OnceQAT: expected a model with loss_computation, OnceQAT(..., losses=FUNCTION), "
                "or PaddleSeg's losses: import ppvision.plugins.paddleseg."
            )
        return self.weigh(bits, list(found), logits[0])


def _check_quanters(model: nn.Layer, widths: tuple[int, ...]) -> None:
    layers = [layer for layer in model.sublayers() if isinstance(layer, LayeredLayer)]
    quanters = [q for q in (layer.weight_quanter for layer in layers) if q is not None]
    if not quanters:
        raise InputError(
            f"OnceQAT: expected a model with layered quanters, found none in "
            f"{type(model).__name__}. Quantise it first: LayeredQAT(config).quantize(model)."
        )
    for quanter in quanters:
        known = quanter.range.trained
        missing = set(widths) - set(known)
        if missing:
            raise InputError(
                f"bits: expected widths that the quanters know ({list(known)}), got "
                f"{sorted(missing)} as well. Give LayeredWeightQuanter the same bits."
            )
