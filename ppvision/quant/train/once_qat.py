"""One training for every width.

Source: arXiv 2212.05326 (see `ppvision.quant.codes`): the source weights are trained for all
precisions together. An equal mean of the losses is our choice; so are its alternatives, the
sandwich rule (Yu and Huang, ICCV 2019) and distillation from the highest width.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.errors import EngineError, InputError, shorten
from ppvision.quant.train.layers import LayeredLayer, set_bits
from ppvision.quant.train.quanters import DEFAULT_BITS, checked_widths

OBJECTIVES = ("mean", "sandwich")

Losses = Callable[[list[Tensor], dict, dict], Sequence[Tensor]]


class OnceQAT(nn.Layer):
    """A quantised model that is trained at all of its widths.

    In evaluation it is the model at one width, `set_bits`. In training a forward pass runs the
    widths of a step one after another and gives the outputs of all; `loss_computation`, which
    PaddleSeg's own `train()` calls, takes them apart. Our engine runs each width by itself
    (`train_at`) and adds up gradients, so that memory holds one width at a time. Models that
    recompute layers in the backward pass need the latter: with all widths in one graph they would
    be recomputed at another one.

    Args:
        model: with layered quanters (`ppvision.plugins.paddleslim.LayeredQAT`).
        bits: widths to train, of those that the quanters know. Default 8, 6, 4, 3, 2.
        objective: "mean" (default): every width at every step; "sandwich": the highest, the lowest
            and one of the others, drawn anew for every step.
        weights: what each width's loss counts, in the order of `bits`; scaled to a mean of 1, so
            that learning rate and decay keep their meaning. Default: all alike.
        distillation: what the Kullback-Leibler divergence from the highest width's prediction
            counts in the loss of every other width. Default 0.

    Raises:
        ValueError: no quanters, a width that they do not know, a value out of its range.
    """

    # How PaddleSeg applies a config's losses to logits, for models that do not do it themselves;
    # `ppvision.plugins.paddleseg` puts it here.
    stock_losses: Losses | None = None

    def __init__(
        self,
        model: nn.Layer,
        bits: Sequence[int] = DEFAULT_BITS,
        *,
        objective: str = "mean",
        weights: Sequence[float] | None = None,
        distillation: float = 0.0,
    ) -> None:
        super().__init__()
        self.widths = checked_widths(bits)
        _check_quanters(model, self.widths)
        if objective not in OBJECTIVES:
            raise InputError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {shorten(objective)}."
            )
        if not 0 <= distillation < math.inf:
            raise InputError(
                f"distillation: expected a number of at least 0, got {shorten(distillation)}."
            )
        weights = [1.0] * len(self.widths) if weights is None else list(weights)
        possible = len(weights) == len(self.widths) and min(weights) >= 0
        if not possible or not 0 < sum(weights) < math.inf:
            raise InputError(
                f"weights: expected a number of at least 0 for each of {list(bits)}, got "
                f"{shorten(weights)}."
            )
        order = sorted(range(len(weights)), key=lambda i: -list(bits)[i])
        share = len(weights) / sum(weights)
        self.weights = {k: weights[i] * share for k, i in zip(self.widths, order, strict=True)}
        self.model = model
        self.objective, self.distillation = objective, distillation
        self.bits = self.widths[0]
        self._alone: int | None = None
        self._teacher: list[Tensor] = []  # in a list: as an attribute it would become a buffer
        self._ran: tuple[int, ...] = ()  # widths of the last forward pass in training
        self._draws = random.Random(0)
        self.drawn = self.widths  # of the step
        self.draw(self._draws)
        set_bits(model, self.bits)

    def set_bits(self, bits: int) -> None:
        """The width to work at in evaluation; any from the lowest of the widths to the highest.

        An untrained width in between takes the statistics of the next trained one above.
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
        """Let forward passes in training run one width only, until told otherwise; None: all.

        A backward pass that computes layers again (recompute) has to happen before the next call.
        """
        self._alone = bits
        if bits is not None:
            self.set_bits(bits)

    @contextlib.contextmanager
    def alone(self, bits: int) -> Iterator[None]:
        """`train_at` inside; afterwards as before."""
        before = self.bits
        self.train_at(bits)
        try:
            yield
        finally:
            self.train_at(None)
            self.set_bits(before)

    def forward(self, *inputs: object, **named: object) -> object:
        """In evaluation what the model gives at the present width; in training a list of outputs,
        those of the highest width first, then of the next. Of a model that gives its losses by
        name, as PaddleDetection's do, one dictionary: `loss`, the weighted mean over the widths,
        and `loss_w8`, `loss_w4`, ..."""
        if not self.training:
            return self.model(*inputs, **named)
        if self._alone is not None:
            self._ran = (self._alone,)
            return self.model(*inputs, **named)
        self.draw(self._draws)
        self._ran = self.drawn
        before, outputs = self.bits, []
        for bits in self._ran:
            self.set_bits(bits)
            found = self.model(*inputs, **named)
            outputs += found if isinstance(found, (list, tuple)) else [found]
        self.set_bits(before)
        return self._one_dict(outputs) if isinstance(outputs[0], dict) else outputs

    def _one_dict(self, outputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What PaddleDetection's trainer takes: `loss`, the mean, then each width's."""
        losses = [found["loss"] for found in outputs]
        pairs = zip(self._ran, losses, strict=True)
        total = sum(self.weights[k] * loss for k, loss in pairs) / len(losses)
        names = [f"loss_{name}" for name in self.names]
        return {"loss": total, **dict(zip(names, losses, strict=True))}

    @property
    def names(self) -> list[str]:
        """Of the widths of a step, the same at every step: `w8`, `w4`, ...; `random` for one that
        is drawn."""
        if self.objective == "mean" or len(self.widths) < 3:
            return [f"w{k}" for k in self.drawn]
        return [f"w{self.widths[0]}", "random", f"w{self.widths[-1]}"]

    def load_meanstd(self, transforms: Sequence[dict]) -> None:
        """PaddleDetection's trainer tells its architectures so what normalises a picture."""
        self.model.load_meanstd(transforms)

    def loss_computation(
        self, logits_list: Sequence[Tensor], losses: dict, data: dict
    ) -> list[Tensor]:
        """The losses of all widths in the outputs of a training pass, whose sum counts.

        Args:
            logits_list: what `forward` gave.
            losses: PaddleSeg's, with `types` and `coef`.
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
        elif OnceQAT.stock_losses is not None:
            found = OnceQAT.stock_losses(logits, losses, data)
        else:
            raise EngineError(
                "OnceQAT: expected a model with loss_computation, or PaddleSeg's losses: import "
                "ppvision.plugins.paddleseg."
            )
        return self.weighted(bits, list(found), logits[0])

    def weighted(self, bits: int, losses: list[Tensor], logits: Tensor) -> list[Tensor]:
        """A width's losses times its weight, and the distillation from the highest width.

        Args:
            bits: the width; the highest comes before the others.
            losses: of the task.
            logits: `[B, K, ...]`.
        """
        if self.distillation:
            if bits == self.widths[0]:
                self._teacher = [logits.detach()]
            else:
                losses = [*losses, self.distillation * _divergence(logits, *self._teacher)]
        return [self.weights[bits] * loss for loss in losses]


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's prediction, the mean over pictures and pixels.

    Shapes: `[B, K, ...]` both.
    """
    with paddle.amp.auto_cast(enable=False):
        teacher = F.log_softmax(teacher.astype("float32"), axis=1)
        student = F.log_softmax(logits.astype("float32"), axis=1)
        return (paddle.exp(teacher) * (teacher - student)).sum(axis=1).mean()


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
