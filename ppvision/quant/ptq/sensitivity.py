"""Find the layers that lose most in integers, so that they can stay in float.

One layer at a time is in integers, and all others are in float. The outputs for a few calibration
images are compared with those of the float model. We chose this measure, although others are
cheaper, because it shows how far one layer moves the result.

- The error of a layer's own output does not show the effect of later layers: a norm or a softmax
  may remove it, and a residual sum may hide it.
- A product with gradients (like the Hessian-weighted errors of post-training methods) needs fewer
  passes, but rounding is not a small change for the layers that we look for.

The number of passes is the number of layers times `PICTURES`, in eager mode. Errors of several
layers together differ from their sum. Removing the worst layers one after another would need N
times as many passes, so it is not done.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.console import ProgressLine
from ppvision.errors import InputError
from ppvision.quant.integers import IntegerActivation, IntegerWeight
from ppvision.quant.packed import PackedLayer, copy_with_integers
from ppvision.quant.store.state import walk_layers

logger = logging.getLogger("ppvision")

PICTURES = 8  # number of images used, spread evenly


def find_sensitive_layers(
    model: nn.Layer,
    weights: Mapping[str, IntegerWeight],
    activations: Mapping[str, IntegerActivation],
    shows: Sequence[Callable[[nn.Layer], object]],
    count: int,
) -> list[str]:
    """Return paths of the layers that lose most, the worst first; the log says how much.

    Args:
        model: in float, in evaluation mode.
        weights, activations: those of its layers in integers, by path.
        shows: functions; each runs the model on an image and returns the outputs.
        count: number of layers.

    Raises:
        ValueError: `count` is below 1 or leaves no layer; or the outputs cannot be compared.
    """
    check_count(count, len(weights))
    errors = measure_layer_errors(model, weights, activations, shows)
    ordered = sorted(errors, key=errors.get, reverse=True)
    worst = [f"{path} ({100 * errors[path]:.3g}%)" for path in ordered[:count]]
    logger.info(
        f"int8: {count} layers stay in float, because each of them, alone in integers, changes the "
        f"outputs most: {', '.join(worst)}. The next would be {ordered[count]} "
        f"({100 * errors[ordered[count]]:.3g}%)."
    )
    return ordered[:count]


def check_count(count: int, layers: int) -> None:
    """Raise `InputError` if not 1 to `layers` - 1 layers are to stay in float."""
    if not 1 <= count < layers:
        raise InputError(
            f"keep_float: expected a number from 1 to {layers - 1}, got {count}. At least one of "
            f"the {layers} layers has to become integers."
        )


def measure_change(
    model: nn.Layer, other: nn.Layer, shows: Sequence[Callable[[nn.Layer], object]]
) -> float | None:
    """Measure how far the outputs of another model are from those of a model: root of the mean
    square, as a fraction of that of the model's outputs.

    Args:
        model, other: in evaluation mode.
        shows: see `find_sensitive_layers`; at most `PICTURES` are used.

    Returns:
        The change; None if it is not known, because `shows` returns no outputs, the outputs are
        zeros, or the two have other sizes (the boxes of a detector after NMS).
    """
    moved = size = 0.0
    for show in _spread(shows):
        a, b = _outputs(show, model), _outputs(show, other)
        if a.shape != b.shape:
            return None
        moved += float(np.square(a - b).sum())
        size += float(np.square(a).sum())
    return (moved / size) ** 0.5 if size else None


def _spread(shows: Sequence[Callable[[nn.Layer], object]]) -> list[Callable[[nn.Layer], object]]:
    """Return at most `PICTURES` of them, spread evenly."""
    places = np.linspace(0, len(shows) - 1, min(len(shows), PICTURES)).astype(int)
    return [shows[place] for place in dict.fromkeys(places.tolist())]


def measure_layer_errors(
    model: nn.Layer,
    weights: Mapping[str, IntegerWeight],
    activations: Mapping[str, IntegerActivation],
    shows: Sequence[Callable[[nn.Layer], object]],
) -> dict[str, float]:
    """Measure how far the outputs move while only one layer is in integers: root of the mean
    square, as a fraction of that of the outputs in float.

    Args:
        model, weights, activations, shows: see `find_sensitive_layers`.

    Returns:
        The error by path.
    """
    shows = _spread(shows)
    # In the copy every layer is the model's own, except the tested one.
    copied = copy_with_integers(model, weights, activations)
    in_float = {path: layer for path, _, _, layer in walk_layers(model)}
    found = [
        (path, parent, name, layer)
        for path, parent, name, layer in walk_layers(copied)
        if isinstance(layer, PackedLayer)
    ]
    for path, parent, name, _ in found:
        parent._sub_layers[name] = in_float[path]
    expected = [_outputs(show, copied) for show in shows]
    size = sum(float(np.square(a).sum()) for a in expected)
    errors = {}
    with ProgressLine("sensitivity", len(found)) as bar:
        for path, parent, name, layer in found:
            parent._sub_layers[name] = layer
            moved = 0.0
            for show, a in zip(shows, expected, strict=True):
                b = _outputs(show, copied)
                if a.shape != b.shape:
                    raise InputError(
                        "keep_float: expected paths of layers, got a number: this model gives "
                        "outputs of other sizes once they are rounded, which cannot be compared."
                    )
                moved += float(np.square(a - b).sum())
            parent._sub_layers[name] = in_float[path]
            errors[path] = (moved / size) ** 0.5 if size else 0.0
            bar.update()
    return errors


@paddle.no_grad()
def _outputs(show: Callable[[nn.Layer], object], model: nn.Layer) -> np.ndarray:
    """Return all output numbers of a model in one row, in float64."""
    arrays = [t.numpy().astype(np.float64).reshape(-1) for t in _tensors(show(model))]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
