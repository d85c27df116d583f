"""Load weights into a model of the zoo, from any source and out of larger models.

`pretrained` is True, a tag, a name of the zoo, a file, or a URL with its sha256. Weights that do
not fit are adapted, and the log says so: the backbone is taken out of a whole model, a head for
other classes gets new weights, the first convolution is changed for other channels.
"""

import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
from paddle import nn

from ppvision.arguments import check_file, check_path
from ppvision.errors import (
    InputError,
    InputTypeError,
    MissingFileError,
    shorten,
    shorten_text,
    suggest_nearest,
)
from ppvision.files import compute_sha256
from ppvision.models.base import ZooModel
from ppvision.remote_cache import RemoteFolder
from ppvision.zoo.cards import PretrainedConfig, WeightsCard, find_card
from ppvision.zoo.registry import model_card
from ppvision.zoo.stored import read_stored
from ppvision.zoo.torch_files import convert_to_paddle, is_from_torch, read_pth
from ppvision.zoo.weights import RGB, assign_weights, read_weights, take_backbone

logger = logging.getLogger("ppvision")

_TORCH_SUFFIXES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Pretrained:
    """Weights that were found.

    Attributes:
        arrays: arrays by name.
        source: name of the source for messages.
        config: input of a model with these weights.
    """

    arrays: dict[str, np.ndarray]
    source: str
    config: PretrainedConfig


def find_pretrained(model: str, pretrained: bool | str | os.PathLike[str]) -> Pretrained:
    """Read the weights of `create_model(model, pretrained=...)`.

    Args:
        model: a model of the zoo.
        pretrained: True for the default weights; a tag or name of the zoo; a file: `.safetensors`,
            `.pdparams`, PyTorch's `.pth`, `.pt` or `.bin`, or a layered model's folder; or
            `https://HOST/PATH/FILE#sha256=HEX`, which is downloaded once into the cache folder. A
            name of the zoo has priority over a file.

    Raises:
        ValueError: there are no default weights or no such tag, the weights are of another model,
            or a URL has no sha256.
        FileNotFoundError: no such file.
        ImportError: the package of the zoo's weights is not installed.
        WeightsError: a file cannot be read, or is another one.
        TypeError: none of these.
    """
    config = model_card(model).config
    if isinstance(pretrained, bool):
        return _read_card(_default_card(model))
    if not isinstance(pretrained, str | os.PathLike):
        raise InputTypeError(
            "pretrained: expected True, False, a tag, a file or an address, got "
            f"{shorten(pretrained)}."
        )
    name = str(check_path(pretrained, "pretrained", "a tag, a file or an address"))
    name = pretrained if isinstance(pretrained, str) else name  # a path would lose `//`
    card = find_card(f"{model}.{name}") or find_card(name)
    if card is not None:
        if card.model != model:
            raise InputError(
                f"pretrained: expected weights for {model}, got {name} for {card.model}."
            )
        return _read_card(card)
    if re.match(r"[A-Za-z][\w+.-]*://", name):
        path, source, digest = _fetched(name)
    else:
        path = check_file(name, "pretrained", f"a tag of {model}, a file or an address")
        source, digest = name, None
    if not name or not path.exists():
        tags = [tag for c in model_card(model).weights.values() for tag in (c.tag, c.name)]
        raise MissingFileError(
            f"pretrained: expected a tag of {model}, a file or an address, got "
            f"{shorten_text(name, 200)!r}. {suggest_nearest(name, tags)}"
        )
    arrays = read_pth(path) if path.suffix in _TORCH_SUFFIXES else read_weights(path)
    if digest is None and path.is_file():
        digest = compute_sha256(path)
    # We do not know how images were prepared for a file's weights, nor their licence.
    return Pretrained(
        arrays, source, replace(config, licence="unknown", source=source, sha256=digest)
    )


def _default_card(model: str) -> WeightsCard:
    cards = model_card(model).weights.values()
    card = next((card for card in cards if card.default), None)
    if card is None:
        known = f" Tags: {', '.join(card.tag for card in cards)}." if cards else ""
        raise InputError(
            f"pretrained: the zoo has no default weights for {model}.{known} Pass a file: "
            f"create_model({model!r}, pretrained='FILE.safetensors')."
        )
    return card


def _read_card(card: WeightsCard) -> Pretrained:
    config = replace(card.config, source=card.name, sha256=card.sha256)
    return Pretrained(read_stored(card), card.name, config)


# -- from an address -------------------------------------------------------------------------------


def _fetched(address: str) -> tuple[Path, str, str]:
    """Return the copy of a file in the cache, its name for messages, and its sha256."""
    url, _, fragment = address.partition("#")
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    name = PurePosixPath(urlsplit(url).path).name
    if found is None or not name:
        raise InputError(
            "pretrained: expected an address of a file that ends in #sha256= and 64 hexadecimal "
            f"digits, got {shorten(address)}. `sha256sum FILE` prints them."
        )
    digest = found[1].lower()
    parts = urlsplit(url)
    folder = parts._replace(path=parts.path.removesuffix(name))
    remote = RemoteFolder(folder.geturl())
    shown = f"{remote.shown}/{name}"
    copy = remote.folder / f"{digest[:16]}-{name}"
    with remote.hold_lock():
        if not _has_sha256(copy, digest):
            remote.fetch(name, remote.length(name), digest)
            (remote.folder / name).replace(copy)
    return copy, shown, digest


def _has_sha256(path: Path, digest: str) -> bool:
    return path.is_file() and compute_sha256(path) == digest


# -- into the model --------------------------------------------------------------------------------


def load_pretrained(net: nn.Layer, found: Pretrained, *, keep_head: bool) -> list[str]:
    """Give a model the weights; it does not change unless they fit.

    Args:
        net: a model of the zoo.
        found: the weights.
        keep_head: use the number of classes of the weights' own head.

    Returns:
        Paths of the layers that start with fresh weights.

    Raises:
        WeightsError: one report of everything that does not fit.
    """
    if not isinstance(net, ZooModel):
        assign_weights(net, found.arrays, found.source)
        return []
    arrays = dict(found.arrays)
    if is_from_torch(arrays):
        arrays = convert_to_paddle(arrays, net.torch_names)
    arrays = take_backbone(net, arrays, found.source)
    _adapt_first_conv(net, arrays, found.source)
    fresh = _match_head(net, arrays, found.source, keep_head)
    unused = [f"{path}.*" for path in net.paths_not_built()]
    assign_weights(net, arrays, found.source, [f"{path}.*" for path in fresh], unused)
    if fresh:
        logger.warning("%s: starts untrained: %s", type(net).__name__, ", ".join(fresh))
    return fresh


def _adapt_first_conv(net: ZooModel, arrays: dict[str, np.ndarray], source: str) -> None:
    """Adapt the first convolution to other channels than RGB, like timm: one channel gets the sum
    of the three, so that a grey image gives the same result as in RGB. More channels repeat the
    three, scaled by 3 / channels, so that the outputs keep their size."""
    name = f"{net.first_conv}.weight"
    weight, own = arrays.get(name), net.state_dict()[name]
    if weight is None or weight.ndim != 4:
        return
    channels = own.shape[1]
    if weight.shape[1] == channels or weight.shape[1] != RGB:
        return
    if channels == 1:
        arrays[name] = weight.sum(axis=1, keepdims=True)
    else:
        repeated = np.tile(weight, (1, math.ceil(channels / RGB), 1, 1))[:, :channels]
        arrays[name] = repeated * np.asarray(RGB / channels, weight.dtype)
    logger.warning("%s: %s adapted from 3 input channels to %d", source, net.first_conv, channels)


def _match_head(
    net: ZooModel, arrays: dict[str, np.ndarray], source: str, keep_head: bool
) -> list[str]:
    """Adapt the head to the classes; return the paths of the layers that start with fresh
    weights."""
    weight = arrays.get(f"{net.classifier}.weight")
    classes = None if weight is None or weight.ndim != 2 else weight.shape[1]
    if classes is not None and net.num_classes and classes != net.num_classes:
        if keep_head:
            net.reset_classifier(classes)
        else:
            logger.warning(
                "%s: has %d classes, the model %d: its head is omitted",
                *(source, classes, net.num_classes),
            )
            for name in [n for n in arrays if n.startswith(f"{net.classifier}.")]:
                del arrays[name]
    # Whole layers after the stages may be missing, if the weights are those of a backbone. Parts of
    # a layer may not.
    own = net.state_dict()
    return [
        path
        for path in net.behind_stages
        if any(name.startswith(f"{path}.") for name in own)
        and not any(name.startswith(f"{path}.") for name in arrays)
    ]
