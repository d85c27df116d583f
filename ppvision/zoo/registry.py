"""The zoo's register: names to models, each with a card."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from paddle import nn

from ppvision.errors import InputError, InputTypeError, shorten, shorten_text

BuildModel = Callable[..., nn.Layer]


@dataclass(frozen=True)
class WeightsCard:
    """One file of weights: what it is, how it came about and what it scored.

    Attributes:
        model: the model of the zoo that it is for.
        file: name inside the package's `zoo/weights` folder.
        sha256: of the file.
        parts: what it holds beside that model.
        data: what it was trained on.
        command: the command that made it.
        hours: how long that took, on `machine`.
        machine: processor and core count.
        score: what was measured, and on what.
    """

    model: str
    file: str
    sha256: str
    parts: str
    data: str
    command: str
    hours: float
    machine: str
    score: str


@dataclass(frozen=True)
class ModelCard:
    """What there is to know about a model before using it.

    Attributes:
        name: as `create_model` takes it.
        paper: title, venue and address.
        parameters: trainable ones, 1000 classes.
        gflops: multiply-adds of one 224 x 224 picture, in 1e9 (the unit of the papers).
        recipe: how to train it: a config's path, or what is known.
        licence: of the code and of the weights.
        published: scores that the paper reports; none of them was measured here.
        measured: what this project measured, or "not trained here".
        weights: weights that come with the package, by name.
    """

    name: str
    paper: str
    parameters: int
    gflops: float
    recipe: str
    licence: str = "Apache-2.0"
    published: str = "none"
    measured: str = "not trained here"
    weights: dict[str, WeightsCard] = field(default_factory=dict)


_MODELS: dict[str, tuple[BuildModel, ModelCard]] = {}


def nearest(name: str, known: Iterable[object]) -> str:
    """`Did you mean ...?` for the closest of `known`, or all of them."""
    names = sorted(map(str, known))  # a user's own keys may be numbers
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {shorten_text(', '.join(names)) or 'none'}."


def register_model(card: ModelCard) -> Callable[[BuildModel], BuildModel]:
    """Decorator: enter a function that builds a model under `card.name`.

    Raises:
        ValueError: the name is taken by another function.
    """

    def enter(build: BuildModel) -> BuildModel:
        known = _MODELS.get(card.name)
        if known is not None and known[0].__qualname__ != build.__qualname__:
            raise InputError(
                f"register_model: {shorten(card.name)} is taken by {known[0].__module__}."
                f"{known[0].__qualname__}; expected a new name."
            )
        _MODELS[card.name] = (build, card)
        return build

    return enter


def _entry(name: str) -> tuple[BuildModel, ModelCard]:
    if name not in _MODELS:
        raise InputError(
            f"model: expected a name of the zoo, got {shorten(name)}. "
            f"{nearest(name, list(_MODELS))}"
        )
    return _MODELS[name]


def list_models(pattern: str = "*") -> list[str]:
    """Names in the zoo that match a shell pattern such as `pale*`, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_card(name: str) -> ModelCard:
    """The card of a model.

    Raises:
        ValueError: no such model; the message names the closest ones.
    """
    return _entry(name)[1]


def model_options(name: str) -> list[str]:
    """Names of the options that `create_model` takes for a model."""
    parameters = inspect.signature(_entry(name)[0]).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def create_model(name: str, **options: object) -> nn.Layer:
    """Build a model of the zoo, with fresh weights.

    Args:
        name: see `list_models`.
        **options: the model's own; for Pale `num_classes=1000, features_only=False,
            in_channels=3, pale_size=7, drop_path_rate, mask_padding=True, fused=None,
            recompute=False` (see `PaleTransformer`).

    Raises:
        ValueError: no such model, an option's value out of range.
        TypeError: no such option; the message names the closest ones.
    """
    build, _ = _entry(name)
    known = model_options(name)
    for option in options:
        if option not in known:
            raise InputTypeError(
                f"create_model({shorten(name)}): expected options among {', '.join(known)}; got "
                f"{shorten(option)}. {nearest(option, known)}"
            )
    return build(**options)
