"""Identify weights by their path, and open a layered model at its widths, without quanters."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from paddle import nn

from ppvision.quant import load_layered
from ppvision.quant.packed import pack_model
from ppvision.remote_cache import is_url


def has_quanters(names: Iterable[str]) -> bool:
    """Whether tensors of these names come from a model with quanters."""
    return any(".weight_quanter." in name for name in names)


def is_layered(model_path: str | Path) -> bool:
    """Whether a path is a layered model: a folder or a URL. Other weights are files."""
    return is_url(str(model_path)) or Path(model_path).is_dir()


def open_layered_models(
    structure: Callable[[], nn.Layer], model_path: str | Path, bits: Sequence[int] | None = None
) -> Iterator[tuple[int, nn.Layer]]:
    """Yield a layered model at one width after another.

    Args:
        structure: function that gives a new copy of the model for each width, with any weights.
        model_path: folder or URL of the layered model.
        bits: widths. Default None: all trained widths whose files exist.

    Yields:
        The width and the model.

    Raises:
        LayeredModelError: it cannot be read.
        ValueError: the width does not exist, or the model has another architecture.
    """
    loaded = load_layered(model_path, max(bits) if bits else None)
    held = [k for k in loaded.state.bits if k <= loaded.bits]
    if loaded.bits not in held:  # files are missing: the highest existing width is first
        held.insert(0, loaded.bits)
    for k in bits or held:
        yield k, pack_model(structure(), loaded.state, k)
