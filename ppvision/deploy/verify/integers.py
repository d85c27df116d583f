"""Check whether a graph in integers computes the same as the model's integer layers.

Every export with integers has three checks:

1. Each product separately. It gets the same codes as in eager mode. OpenVINO's result may differ by
   `PRODUCT_TOLERANCE` of the largest output: sums are integers, and only scales and bias are
   applied in float.
2. The whole graph, by the rule of `parity` for rounded activations. An error in the last digit can
   move a value between two codes to the other code, so that errors spread through many layers.
3. Labels of the calibration images: at least the fraction `EQUAL_LABELS` equals eager mode.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn

from ppvision.deploy.run.engines import Batch
from ppvision.deploy.verify import parity
from ppvision.deploy.verify.running import run_eagerly
from ppvision.quant.packed import IntegerRounding, PackedLayer
from ppvision.quant.store.state import walk_layers

PRODUCT_TOLERANCE = 1e-5  # for one product, as a fraction of its largest output
EQUAL_LABELS = 0.995  # fraction of the pixels (or images) of the calibration


class Product(NamedTuple):
    """An integer layer in eager mode.

    Attributes:
        path, layer: the layer and its path.
        rounded: input of the layer after rounding.
        output: output of the layer for it.
    """

    path: str
    layer: PackedLayer
    rounded: np.ndarray
    output: np.ndarray


def capture_products(model: nn.Layer, x: Batch) -> list[Product]:
    """Return the integer layers of a model, in evaluation mode, that run on `x` (`[B, C, H, W]`, or
    a detector's inputs by name) and have one input."""
    found: dict[str, Product] = {}
    hooks = []

    def look(path: str, layer: nn.Layer) -> None:
        def hook(layer: nn.Layer, inputs: tuple, output: paddle.Tensor) -> None:
            if len(inputs) == 1 and path not in found:
                rounded = layer.activation(inputs[0])
                found[path] = Product(path, layer, rounded.numpy(), output.numpy())

        hooks.append(layer.register_forward_post_hook(hook))

    for path, _, _, layer in walk_layers(model):
        if isinstance(layer, PackedLayer) and isinstance(layer.activation, IntegerRounding):
            look(path, layer)
    try:
        run_eagerly(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def check_products(products: Sequence[Product], outputs: Sequence[np.ndarray]) -> float:
    """Compare each integer product with eager mode, on the codes of eager mode.

    Args:
        products: the result of `capture_products`.
        outputs: outputs of their graph (`ppvision.deploy.write.openvino.write_products`).

    Returns:
        The largest error, as a fraction of the product's largest output.

    Raises:
        ParityError: an error is above `PRODUCT_TOLERANCE`; the message has the layer's path.
    """
    worst = 0.0
    for (path, layer, _, eager), found in zip(products, outputs, strict=True):
        largest = max(float(np.abs(eager).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        error = float(np.abs(eager.astype(np.float64) - found).max(initial=0.0)) / largest
        if not error <= PRODUCT_TOLERANCE:
            raise parity.ParityError(
                f"{path} ({type(layer).__name__}): the product in integers differs from eager mode "
                f"by {error:.3g} of its largest output, allowed is {PRODUCT_TOLERANCE:.3g}, "
                "although both have the same codes.",
                error,
                PRODUCT_TOLERANCE,
            )
        worst = max(worst, error)
    return worst


def measure_equal_labels(
    eager: Sequence[np.ndarray], exported: Sequence[np.ndarray], tolerance: float
) -> float:
    """Return the fraction of labels that agree.

    Args:
        eager, exported: logits `[B, K, ...]` of the same images.
        tolerance: labels whose two highest eager logits are closer than this count as equal,
            because chance decides which one is higher.
    """
    agree = count = 0
    for a, b in zip(eager, exported, strict=True):
        same = a.argmax(axis=1) == b.argmax(axis=1)
        if a.shape[1] > 1:
            second, first = np.moveaxis(np.partition(a, -2, axis=1)[:, -2:], 1, 0)
            same |= first - second < tolerance * max(1.0, float(np.abs(a).max()))
        agree += int(same.sum())
        count += same.size
    return agree / count
