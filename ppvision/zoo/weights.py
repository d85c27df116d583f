"""Reading and writing weights: strict, and without executing anything.

Files are safetensors, or Paddle's `.pdparams`, which is a pickle: it is read by an unpickler that
knows arrays and plain containers only.
"""

import fnmatch
import hashlib
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from paddle import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ppvision.errors import MissingFileError, WeightsError
from ppvision.files import write_bytes
from ppvision.nn import SemanticDiffusionPyramid
from ppvision.zoo.registry import WeightsCard, nearest

WEIGHTS_FOLDER = Path(__file__).parent / "weights"

# The package's own weights; benchmark/train_small_weights.py writes each file and its card.
ZOO_WEIGHTS: dict[str, WeightsCard] = {
    path.stem: WeightsCard(**json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(WEIGHTS_FOLDER.glob("*.json"))
}


# What a .pdparams written by paddle.save may name: arrays, their types, and ordered dicts.
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def _latin1(text: object, encoding: object) -> bytes:
    """`_codecs.encode` as pickle protocol 2 uses it for bytes, and nothing else."""
    if not isinstance(text, str) or encoding != "latin1":
        raise WeightsError(f"expected bytes written as latin1 text, got encoding {encoding!r}.")
    return text.encode("latin1")


_ALLOWED_GLOBALS["_codecs", "encode"] = _latin1


def _numpy_builder(module: str, name: str) -> object | None:
    """numpy's own array builders, whichever private module this numpy keeps them in."""
    known = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "scalar": np.float64(0).__reduce__()[0],
        "_frombuffer": np.empty(1).__reduce_ex__(5)[0],
    }
    if name in known and module.startswith(("numpy.core.", "numpy._core.")):
        return known[name]
    return None


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        found = _ALLOWED_GLOBALS.get((module, name)) or _numpy_builder(module, name)
        if found is None:
            raise WeightsError(
                f"expected arrays and plain containers only, found {module}.{name}, which would "
                "run code. Do not use this file; ask its author for safetensors."
            )
        return found


def read_pdparams(path: str | Path) -> dict[str, np.ndarray]:
    """Read a `.pdparams` file without executing what it may name.

    Returns:
        Arrays by parameter name.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not a pickle of arrays by name, or cut short.
    """
    data = Path(path).read_bytes()
    try:
        content = _ArraysOnly(io.BytesIO(data)).load()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # a hostile or cut pickle can raise anything
        raise WeightsError(
            f"{path}: expected a .pdparams file as paddle.save writes it, got one that does not "
            f"read ({type(error).__name__}). It may be cut short: fetch it again."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected arrays by name, got a {type(content).__name__}.")
    content = {k: v for k, v in content.items() if k != "StructuredToParameterName@@"}
    arrays = {}
    for name, value in content.items():
        # Paddle pickles a tensor as (its name, its array).
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if not isinstance(name, str) or not isinstance(value, np.ndarray) or value.dtype == object:
            raise WeightsError(
                f"{path}: expected arrays by name, got {type(value).__name__} under {name!r}. "
                "A checkpoint with an optimizer is not a file of weights."
            )
        arrays[name] = value
    return arrays


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name from safetensors, `.pdparams`, or the name of weights in the zoo.

    Raises:
        FileNotFoundError: neither a file nor a name in the zoo.
        WeightsError: a file that does not read, or whose sha256 is not the card's.
    """
    card = ZOO_WEIGHTS.get(str(path))
    if card is not None:
        path = WEIGHTS_FOLDER / card.file
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != card.sha256:
            raise WeightsError(
                f"{path}: expected sha256 {card.sha256}, got {found}. Install ppvision again."
            )
    path = Path(path)
    if (path / "manifest.json").is_file():
        raise WeightsError(
            f"{path}: expected a file of weights, got a layered model, which `eval`, `predict` and "
            "`export` take. Training starts from a checkpoint or float weights."
        )
    if not path.is_file():
        raise MissingFileError(
            f"weights: expected a file or a name of the zoo, got {str(path)!r}. "
            + nearest(path.name, list(ZOO_WEIGHTS))
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(str(path))
        except TypeError as error:
            raise WeightsError(
                f"{path}: expected arrays of a type that NumPy has ({error}). Save it as float32."
            ) from error
        except (SafetensorError, ValueError, KeyError) as error:
            raise WeightsError(
                f"{path}: expected safetensors, got a file that does not read ({error}). "
                "It may be cut short: fetch it again."
            ) from error
    return read_pdparams(path)


def save_weights(arrays: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write arrays by name as safetensors: beside the file first, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({k: np.asarray(v, order="C") for k, v in arrays.items()}))


def load_weights(
    net: nn.Layer,
    path: str | Path,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Load weights into a model; everything must fit, but for what is allowed by name.

    Args:
        net: the model. It is not touched unless everything fits.
        path: `.safetensors`, `.pdparams`, or the name of weights in the zoo.
        allow_missing: shell patterns of the model's names that the file need not hold.
        allow_unexpected: shell patterns of the file's names that the model need not have.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: a file that does not read; or one report of every missing, unexpected and
            wrongly shaped or typed entry.
    """
    assign_weights(net, read_weights(path), str(path), allow_missing, allow_unexpected)


def assign_weights(
    net: nn.Layer,
    arrays: Mapping[str, np.ndarray],
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """`load_weights` for arrays that are read already; `source` names them in errors."""
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
                # Paddle keeps bfloat16 as uint16, whose numbers mean nothing as they are.
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
        lines.append(
            "Build the model that the file was saved from, or name what may differ with "
            "allow_missing and allow_unexpected."
        )
        raise WeightsError("\n".join(lines))
    for name, array in fitting.items():
        own[name].set_value(array)


# A classifier lacks the pyramid's norms and brings a head.
_MAY_MISS, _MAY_BRING = ("feature_norms.*",), ("norm.*", "head.*")
# PaddleSeg and PaddleDetection keep a whole model's backbone under this name.
_BACKBONE = "backbone."


def assign_backbone(net: nn.Layer, pretrained: str | Path) -> None:
    """Give a backbone the weights of a backbone, a classifier, or a whole segmentation model or
    detector.

    Args:
        net: a model of the zoo that gives features.
        pretrained: as of `read_weights`.

    Raises:
        FileNotFoundError, WeightsError: see `read_weights`, `assign_weights`.
    """
    arrays = read_weights(pretrained)
    if any(name.startswith(_BACKBONE) for name in arrays):
        arrays = {
            name.removeprefix(_BACKBONE): array
            for name, array in arrays.items()
            if name.startswith(_BACKBONE)
        }
    assign_weights(net, arrays, str(pretrained), _MAY_MISS, _MAY_BRING)


def names_behind_sdn(
    model: nn.Layer, arrays: Mapping[str, np.ndarray]
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """Weights of a model without SDN, under the names that they have in the same model with it.

    Args:
        model: whose `SemanticDiffusionBackbone` wraps the backbone that the weights are for.
        arrays: by name; those that hold anything of SDN stay as they are.

    Returns:
        The arrays, and the names of the layers that they hold nothing of: SDN's.
    """
    own, absent = model.state_dict(), []
    for name, layer in model.named_sublayers():
        outer, new = f"{name}.", f"{name}.diffusion"
        # Not by the wrapper's own class: a reload of this module makes another one.
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
