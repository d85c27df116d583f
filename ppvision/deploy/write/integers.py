"""Convert a float model into one whose exported graph multiplies 8-bit integers.

`export_model(..., int8=True)` calls this. The calibration images pass through the transforms of the
export, so that the network gets realistic inputs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ppvision.data.class_zip import ZipPath, read_sample
from ppvision.data.listing import list_images
from ppvision.deploy.run.engines import Batch
from ppvision.deploy.run.manifest import Calibration
from ppvision.deploy.verify.running import run_eagerly
from ppvision.errors import InputError, InputTypeError, shorten
from ppvision.forms.differences import central_form
from ppvision.forms.segformer import fold_head
from ppvision.quant.packed import IntegerRounding, PackedLayer
from ppvision.quant.ptq.integers import RULES, find_other_weights, quantize_to_integers
from ppvision.quant.ptq.sensitivity import PICTURES, measure_change
from ppvision.quant.store.state import walk_layers
from ppvision.quant.train.layers import WITH_WEIGHT

logger = logging.getLogger("ppvision")

CALIBRATION_PICTURES = 64  # number of images used, spread evenly; more gave no gain in our runs
DEFAULT_RULE = "error"

# Names of the rules in deploy.yaml.
_METHODS: dict[str, Any] = {
    "error": "minimum_error",
    "percentile": "percentile",
    "maximum": "maximum",
}
_MUCH_CHANGED = 0.2  # change of the outputs, as a fraction, that is worth a warning
_FEW_VALUES = 1e-6  # a calibration image whose values vary less has only one shade


@dataclass(frozen=True)
class IntegerOptions:
    """The options of an export with integers.

    Attributes:
        calibration: images: a folder, a list file, or paths (also in a zip); None for a model with
            integer layers.
        rule: rule for the steps of activations: "error", "percentile" or "maximum".
        keep_float: layers that stay in float: paths, and the number of further layers (those that
            lose most).
    """

    calibration: str | Path | Sequence[str | Path | ZipPath] | None = None
    rule: str = DEFAULT_RULE
    keep_float: Sequence[str | int] = ()


def make_integer_arguments(options: IntegerOptions | None) -> dict[str, Any]:
    """Return the arguments of `export_model` for these options."""
    if options is None:
        return {}
    return {
        "int8": True,
        "calibration": options.calibration,
        "calibration_rule": options.rule,
        "keep_float": options.keep_float,
    }


@dataclass(frozen=True)
class IntegerModel:
    """A model in integers, and information about it.

    Attributes:
        model: the model with integer layers.
        calibration: the entry for `deploy.yaml`.
        kept: paths of layers with a weight in float.
        pictures: the calibration images, a batch of one each, or empty.
    """

    model: nn.Layer
    calibration: Calibration
    kept: list[str]
    pictures: list[Batch]


def has_integers(model: nn.Layer) -> bool:
    """Whether products of a model can run in integers."""
    return any(isinstance(layer, IntegerRounding) for layer in model.sublayers())


def tell_engine(model: nn.Layer) -> str:
    """Return what it means for an export that OpenVINO does not run it."""
    if has_integers(model):
        return (
            "Only OpenVINO runs integers, so this export computes with the same codes in float, "
            "which is slower. Export without int8, or change the model."
        )
    return "The export runs with oneDNN instead of OpenVINO, which is slower."


def convert_to_integers(
    model: nn.Layer,
    calibration: str | Path | Sequence[str | Path | ZipPath] | None,
    shape: Sequence[int | None],
    prepare: Callable[[np.ndarray], Batch],
    *,
    run: Callable[[nn.Layer, Batch], object] = run_eagerly,
    rule: str = DEFAULT_RULE,
    keep_float: Sequence[str | int] | int = (),
    symmetric: bool = False,
    max_value: int | None = None,
) -> IntegerModel:
    """Make a model's products integer, or accept a model whose products are.

    Args:
        model: in evaluation mode, in float or with integer layers (`pack_model(integers=True)`).
        calibration: a folder or a list file of images, or a list of paths; None for a model with
            integer layers.
        shape: of the export, `[B, C, H, W]`.
        prepare: applies the export's transforms to an image `[H, W, 3]` and gives a batch of one
            (`[1, C, H, W]`, or a detector's inputs by name).
        run: runs the model, or a layer, on a batch, and returns the outputs.
        rule: rule for the steps of activations: "error", "percentile" or "maximum".
        keep_float: layers that stay in float: paths, and the number of further layers (those that
            lose most).
        symmetric: see `quantize_to_integers`.
        max_value: of images of more than 8 bits.

    Raises:
        ValueError: no calibration images for a float model; a size that is not known; an image
            that does not get the export's size; weights that are not finite; anything that
            `quantize_to_integers` refuses.
    """
    named, most_sensitive = _split(keep_float)
    if None in shape[2:]:
        raise InputError(
            f"int8: expected an input_shape with a known height and width, got {list(shape)}: "
            "OpenVINO, which runs the integers, takes graphs of one size. Pass "
            "--input_shape 1 3 H W (in Python input_shape=[1, 3, H, W])."
        )
    if rule not in RULES:
        raise InputError(f"calibration_rule: expected one of {', '.join(RULES)}, got {rule!r}.")
    if has_integers(model):
        if calibration is not None or keep_float:
            raise InputError(
                "calibration, keep_float: are for models in float; this one holds integers."
            )
        if kept := _layers_in_float(model):
            logger.info(f"int8: {len(kept)} layers stay in float: {', '.join(kept)}")
        return IntegerModel(model, Calibration(method="learned", pictures=0), kept, [])
    _check_finite(model)
    if calibration is None:
        raise InputError(
            "int8: expected calibration images for a model in float, got none. Pass a folder or "
            "a list file (calibration=..., --calibration), about 64 images like those to predict."
        )
    pictures = _read_pictures(calibration, shape, prepare, max_value)
    shows = [lambda shown, picture=picture: run(shown, picture) for picture in pictures]
    quantized = make_integer_layers(
        model,
        shows,
        rule=rule,
        keep_float=named,
        most_sensitive=most_sensitive,
        symmetric=symmetric,
    )
    kept = _layers_in_float(quantized)
    return IntegerModel(
        quantized, Calibration(method=_METHODS[rule], pictures=len(pictures)), kept, pictures
    )


def make_integer_layers(
    model: nn.Layer, shows: Sequence[Callable[[nn.Layer], object]], **options: Any
) -> nn.Layer:
    """Return the copy of a float model in integers that an export writes: with a folded SegFormer
    head, and with SDN's central differences as one convolution. The log says how far it is from
    float.

    Args:
        model, shows, options: those of `quantize_to_integers`.

    Raises:
        ValueError: see `quantize_to_integers`.
    """
    named = options.get("keep_float", ())
    model = fold_head(model, named)  # before its weights are rounded
    with central_form(model, named):
        quantized = quantize_to_integers(model, shows, **options)
        _tell_change(measure_change(model, quantized, shows), len(shows))
    return quantized


def _tell_change(change: float | None, pictures: int) -> None:
    """Say how far integers move the outputs, and warn if it is much."""
    if change is None:
        return
    logger.info(
        f"int8: on {min(pictures, PICTURES)} calibration images the outputs differ from those in "
        f"float by {100 * change:.3g}% (root of the mean square)"
    )
    if change > _MUCH_CHANGED:
        logger.warning(
            f"int8: integers change the outputs by {100 * change:.3g}%, so the score will be "
            "lower. Are the calibration images like those to predict? `keep_float` (--keep_float "
            "5) keeps the 5 layers that lose most in float; training with activations (docs/"
            "integers.md) loses least."
        )


def _split(keep_float: Sequence[str | int] | int) -> tuple[list[str], int]:
    """Split the paths and the number of further layers."""
    kept: Any = [keep_float] if type(keep_float) is int else keep_float
    entries = kept if isinstance(kept, (list, tuple)) else [None]
    if any(type(entry) not in (str, int) for entry in entries):
        raise InputTypeError(
            "keep_float: expected a list of layers' paths, or how many layers are to stay in "
            f"float, got {shorten(keep_float)}."
        )
    numbers = [k for k in kept if isinstance(k, int)]
    if any(number < 1 for number in numbers):
        raise InputError(f"keep_float: expected at least 1 layer, got {min(numbers)}.")
    return [k for k in kept if isinstance(k, str)], sum(numbers)


def _check_finite(model: nn.Layer) -> None:
    """Raise `InputError` for weights and statistics that are not finite. (A ReLU hides them,
    because it turns NaN into 0.)"""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(paddle.isfinite(tensor).all()):
            raise InputError(
                f"model: expected finite weights, got nan or infinity in {name}. Train them again."
            )


def _layers_in_float(model: nn.Layer) -> list[str]:
    known = [
        path
        for path, _, _, layer in walk_layers(model)
        if type(layer) in WITH_WEIGHT
        or (isinstance(layer, PackedLayer) and not isinstance(layer.activation, IntegerRounding))
    ]
    return [*known, *find_other_weights(model)]


def _read_pictures(
    calibration: str | Path | Sequence[str | Path | ZipPath],
    shape: Sequence[int | None],
    prepare: Callable[[np.ndarray], Batch],
    max_value: int | None,
) -> list[Batch]:
    """Read and transform at most `CALIBRATION_PICTURES` images, a batch of one each."""
    if shape[1] != 3:
        raise InputError(
            f"int8: expected an input_shape with 3 channels, as calibration images have, got "
            f"{shape[1]}. A model that was trained with steps of activations (slim_config, "
            "activations: 8) needs no images."
        )
    if isinstance(calibration, (str, Path)):
        paths: list[Path | ZipPath] = [p for p, _ in list_images(calibration, "calibration")]
    else:
        paths = _checked_paths(calibration)
    if not paths:
        raise InputError("calibration: expected at least one image, got none.")
    places = np.linspace(0, len(paths) - 1, min(len(paths), CALIBRATION_PICTURES)).astype(int)
    pictures, spread = [], 0.0
    for path in (paths[place] for place in dict.fromkeys(places.tolist())):
        batch = prepare(read_sample(path, max_value))
        image = batch if isinstance(batch, np.ndarray) else batch["image"]  # [1, C, H, W]
        if list(image.shape[1:]) != list(shape[1:]):
            raise InputError(
                f"calibration: {path} has {list(image.shape[1:])} after the transforms, expected "
                f"{list(shape[1:])} as in input_shape. Let the transforms end in that size "
                "(Resize, or ResizeByShort and CenterCrop), or take images of that size."
            )
        pictures.append(batch)
        spread = max(spread, float(np.ptp(image, axis=(2, 3)).max()))  # of each channel
    if spread < _FEW_VALUES:
        warn_of_one_shade()
    return pictures


def warn_of_one_shade() -> None:
    """Warn of a calibration whose images have one value per channel."""
    logger.warning(
        "calibration: every image is one single shade: the steps of activations will fit no real "
        "image. Use images like those to predict."
    )


def _checked_paths(calibration: Any) -> list[Path | ZipPath]:
    entries = calibration if isinstance(calibration, (list, tuple)) else [None]
    if not all(isinstance(entry, (str, Path, ZipPath)) for entry in entries):
        raise InputTypeError(
            "calibration: expected a folder, a list file or a list of paths, got "
            f"{shorten(calibration)}."
        )
    return [path if isinstance(path, ZipPath) else Path(path) for path in calibration]
