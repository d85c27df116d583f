"""Read and write weights strictly, and without executing anything.

Files are safetensors, or Paddle's `.pdparams`, which is a pickle: it is read without pickle
(`ppvision.zoo.pdparams`).
"""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from paddle import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ppvision.arguments import check_file, check_layer, check_path, check_patterns
from ppvision.errors import MissingFileError, WeightsError, shorten, shorten_text, suggest_nearest
from ppvision.files import name_read_errors, write_bytes
from ppvision.models.base import ZooModel
from ppvision.nn import SemanticDiffusionPyramid
from ppvision.nn.semantic_diffusion import advise_on_guidance
from ppvision.safe_tensors import header_fits
from ppvision.zoo.cards import find_card, list_weights_names
from ppvision.zoo.pdparams import load_pdparams
from ppvision.zoo.stored import read_stored

logger = logging.getLogger("ppvision")

RGB = 3  # channels of an image, unless weights have other channels
_ZIP = b"PK\x03\x04"
# Entries that paddle.save adds to the arrays: its own names of parameters, and the parts of large
# arrays.
_NAME_TABLE = "StructuredToParameterName@@"
_IN_PARTS = "UnpackBigParamInfor@@"


def read_pdparams(path: str | Path) -> dict[str, np.ndarray]:
    """Read a `.pdparams` file without executing functions that it names.

    Returns:
        Arrays by parameter name.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not a pickle of arrays by name, or incomplete.
    """
    return _parse_pdparams(Path(path).read_bytes(), path)


def _parse_pdparams(data: bytes, path: str | Path) -> dict[str, np.ndarray]:
    try:
        content = load_pdparams(data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected arrays by name, got a {type(content).__name__}.")
    if _IN_PARTS in content:
        raise WeightsError(
            f"{path}: expected whole arrays, got some in parts of 1 GiB, as paddle.save writes "
            "them with protocol 2 or 3. Save it again with protocol=4, or as safetensors."
        )
    content.pop(_NAME_TABLE, None)
    arrays = {}
    for name, value in content.items():
        # Paddle pickles a tensor as (name, array).
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if not isinstance(value, np.ndarray):
            raise WeightsError(
                f"{path}: expected arrays by name, got {type(value).__name__} under "
                f"{shorten(name)}. A checkpoint with an optimizer is not a file of weights."
            )
        arrays[name] = value
    return arrays


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read arrays by name from safetensors, `.pdparams`, a layered model's folder (its highest
    existing width, as float arrays), or the name of weights in the zoo.

    Raises:
        FileNotFoundError: neither a file nor a name in the zoo.
        ImportError: the package of the zoo's weights is not installed.
        WeightsError: a file cannot be read, or its sha256 differs from the card's.
    """
    expected = "a file or a name of the zoo"
    card = find_card(str(check_path(path, "weights", expected)))
    if card is not None:
        return read_stored(card)
    with name_read_errors(path := check_file(path, "weights", expected)):
        return _read_file(path)


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if (path / "manifest.json").is_file():
        from ppvision.quant.store.model import load_layered

        return load_layered(path).state_dict
    if not path.is_file():
        raise MissingFileError(
            "weights: expected a file or a name of the zoo, got "
            f"{shorten_text(str(path), 200)!r}. "  # the end of a path is most informative
            + suggest_nearest(path.name, list_weights_names())
        )
    with path.open("rb") as file:
        start = file.read(len(_ZIP) + 8)
    if path.suffix == ".safetensors" or start[8:9] == b"{":  # paddle.save has safetensors=True
        return _read_safetensors(path, start)
    if start.startswith(_ZIP):
        raise WeightsError(
            f"{path}: expected weights of Paddle, got a zip file, as PyTorch writes. Convert it to "
            "safetensors with Paddle's names."
        )
    return read_pdparams(path)


def _read_safetensors(path: Path, start: bytes) -> dict[str, np.ndarray]:
    if not header_fits(start, path.stat().st_size):
        raise WeightsError(
            f"{path}: expected safetensors, got a file whose header does not fit it. It may be cut "
            "short: fetch it again."
        )
    try:
        return load_file(str(path))
    except TypeError as error:
        raise WeightsError(
            f"{path}: expected arrays of a type that NumPy has ({error}). Save it as float32."
        ) from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{path}: expected safetensors, got a file that does not read "
            f"({shorten(str(error))}). It may be cut short: fetch it again."
        ) from error


def save_weights(arrays: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write arrays by name as safetensors, first to a temporary file, which is then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({k: np.asarray(v, order="C") for k, v in arrays.items()}))


def load_weights(
    net: nn.Layer,
    path: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Load weights into a model. All names and shapes must fit, except those you allow.

    Args:
        net: the model. It does not change unless everything fits.
        path: `.safetensors`, `.pdparams`, a layered model, or the name of weights in the zoo. If
            the weights belong to a whole model and `net` is a model of the zoo, `net` gets the
            backbone; the log says so.
        allow_missing: shell patterns of names in the model that may be missing in the file.
        allow_unexpected: shell patterns of names in the file that may be missing in the model.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file cannot be read, or names, shapes or types do not fit; one report
            lists all of them.
        TypeError: an argument has another type.
    """
    check_layer(net, "net")
    allow_missing = check_patterns(allow_missing, "allow_missing")
    allow_unexpected = check_patterns(allow_unexpected, "allow_unexpected")
    arrays = read_weights(path)
    if isinstance(net, ZooModel) and find_card(str(path)) is not None:
        arrays = take_backbone(net, arrays, str(path))
    assign_weights(net, arrays, str(path), allow_missing, allow_unexpected)


def take_backbone(
    net: ZooModel, arrays: dict[str, np.ndarray], source: str
) -> dict[str, np.ndarray]:
    """Return the arrays of the model out of those of a model that contains it.

    PaddleSeg's prefix is `backbone.`, PaddleDetection's is `backbone.net.`, and SDN adds another
    `backbone.`. The prefix is the place of the model's first convolution.
    """
    first = f"{net.first_conv}.weight"
    if first in arrays:
        return arrays
    prefixes = sorted((n.removesuffix(first) for n in arrays if n.endswith(f".{first}")), key=len)
    # Several layers of another architecture may have the name of our first convolution; the shape
    # identifies the right one.
    own = net.state_dict()[first].shape
    fitting = [p for p in prefixes if _may_be(arrays[f"{p}{first}"], own)]
    if not fitting and len(prefixes) != 1:
        return arrays  # none, or another architecture: the report of the mismatch says so
    prefixes = fitting or prefixes
    if len(prefixes) > 1:
        raise WeightsError(
            f"{source}: expected weights of one {type(net).__name__}, found several: "
            f"{', '.join(p.removesuffix('.') for p in prefixes)}."
        )
    prefix = prefixes[0]
    taken = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    logger.warning(
        "%s: took the backbone out of a whole model: %d arrays under %r, left %d others",
        *(source, len(taken), prefix, len(arrays) - len(taken)),
    )
    return taken


def _may_be(weight: np.ndarray, own: list[int]) -> bool:
    """Whether this is a first convolution `[out, in, k, k]` of this shape, for RGB or for the
    channels of the model."""
    shape = [*weight.shape]
    return shape in (own, [own[0], RGB, *own[2:]])


def assign_weights(
    net: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Apply `load_weights` to arrays that were read already; `source` names them in errors."""
    own = net.state_dict()

    def unless(names: list[str], patterns: Sequence[str]) -> list[str]:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)]

    missing = unless([n for n in own if n not in arrays], allow_missing)
    unexpected = unless([n for n in arrays if n not in own], allow_unexpected)
    shapes = [
        f"{n}: expected {list(own[n].shape)}, got {list(a.shape)}"
        for n, a in arrays.items()
        if n in own and list(own[n].shape) != list(a.shape)
    ]
    kinds, fitting = [], {}
    for name, array in arrays.items():
        if name in own:
            wanted = own[name].numpy().dtype
            if array.dtype.kind != wanted.kind:
                # Paddle stores bfloat16 as uint16; its numbers cannot be used directly.
                hint = " (bfloat16?)" if array.dtype == np.uint16 else ""
                kinds.append(f"{name}: expected {wanted}, got {array.dtype}{hint}")
                continue
            with np.errstate(over="ignore"):
                fitting[name] = array.astype(wanted)
            if not np.array_equal(np.isfinite(fitting[name]), np.isfinite(array)):
                kinds.append(f"{name}: numbers beyond {wanted}")
    if missing or unexpected or shapes or kinds:
        groups = (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
            ("wrong type", kinds),
        )
        lines = [f"{source} does not fit {type(net).__name__}:"]
        for title, items in groups:
            if items:
                lines.append(f"  {title} ({len(items)}):")
                lines += [f"    {item}" for item in items[:8]]
                if len(items) > 8:
                    lines.append(f"    ... and {len(items) - 8} more")
        advice = (
            "Build the model that the file was saved from, or name what may differ with "
            "allow_missing and allow_unexpected."
        )
        whole = [name for name in arrays if missing and name.endswith(f".{missing[0]}")]
        if whole:
            prefix = whole[0].removesuffix(missing[0])
            advice = (
                f"It contains this model inside another one, under {shorten(prefix)}: "
                "create_model(NAME, pretrained=...) takes it out."
            )
        elif shapes and not (missing or unexpected or kinds):
            # All layers exist, so this is most often a head for another number of classes.
            advice += (
                " If only the number of classes differs, give only the backbone these weights: "
                "`model: {backbone: {pretrained: NAME}}` in a segmentation config."
            )
        lines.append(advice + advise_on_guidance(missing, unexpected))
        raise WeightsError("\n".join(lines))
    for name, array in fitting.items():
        own[name].set_value(array)


def rename_for_sdn(
    model: nn.Layer, arrays: Mapping[str, np.ndarray]
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """Rename weights of a model without SDN to the names in the same model with SDN.

    Args:
        model: model whose `SemanticDiffusionBackbone` wraps the backbone of the weights.
        arrays: arrays by name; arrays that contain weights of SDN are not changed.

    Returns:
        The arrays, and the names of the layers without weights: those of SDN.
    """
    own, absent = model.state_dict(), []
    for name, layer in model.named_sublayers():
        outer, new = f"{name}.", f"{name}.diffusion"
        # Not by the wrapper's own class, because a reload of its module makes another class.
        wrapper = isinstance(getattr(layer, "diffusion", None), SemanticDiffusionPyramid)
        if wrapper and not any(key.startswith(f"{new}.") for key in arrays):
            absent.append(new)
            arrays = {
                f"{outer}backbone.{key.removeprefix(outer)}"
                if key.startswith(outer) and key not in own
                else key: array
                for key, array in arrays.items()
            }
    return arrays, absent
