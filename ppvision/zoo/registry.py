"""The zoo's registry: it maps names to models, each with a card.

    @register_model(ModelCard(name="my_net", paper="...", parameters=..., gflops=..., recipe="..."))
    def my_net(*, num_classes=1000, in_channels=3, features_only=False, out_indices=None):
        return MyNet(...)

Then `create_model` knows the model, and if it has `features_only`, both plug-ins have it as a
backbone. Its options are those of the function's signature, which is used everywhere.
"""

import fnmatch
import inspect
from collections.abc import Callable
from functools import partial

from paddle import nn

from ppvision.arguments import check_flag, check_text
from ppvision.errors import InputError, shorten, suggest_nearest
from ppvision.zoo.cards import ZOO_WEIGHTS, ModelCard, WeightsCard
from ppvision.zoo.stored import is_here

BuildModel = Callable[..., nn.Layer]

_MODELS: dict[str, tuple[BuildModel, ModelCard]] = {}
_followers: dict[str, Callable[[str], None]] = {}


def register_model(card: ModelCard) -> Callable[[BuildModel], BuildModel]:
    """Decorator: register a function or a `functools.partial` of a class that builds a model, under
    `card.name`.

    Raises:
        ValueError: another model has this name.
    """

    def enter(build: BuildModel) -> BuildModel:
        known = _MODELS.get(card.name)
        if known is not None and _origin(known[0]) != _origin(build):
            raise InputError(
                f"register_model: {shorten(card.name)} is taken by {_origin(known[0])[0]}; "
                "expected a new name."
            )
        _MODELS[card.name] = (build, card)
        for follow in _followers.values():
            follow(card.name)
        return build

    return enter


def _origin(build: BuildModel) -> tuple[str, object]:
    """Return an identity of a builder that stays the same after a reload of its module."""
    function, options = (build.func, build.args) if isinstance(build, partial) else (build, ())
    return f"{function.__module__}.{function.__qualname__}", options


def follow_models(follow: Callable[[str], None]) -> None:
    """Call a function with the name of every model, also of those that are registered later. A
    module has one such function; after a reload, the new function replaces the earlier one."""
    _followers[follow.__module__] = follow
    for name in list(_MODELS):
        follow(name)


def _entry(name: str) -> tuple[BuildModel, ModelCard]:
    if check_text(name, "model", "a name of the zoo") not in _MODELS:
        raise InputError(
            f"model: expected a name of the zoo, got {shorten(name)}. "
            f"{suggest_nearest(name, _MODELS)}"
        )
    return _MODELS[name]


def find_builder(name: str) -> BuildModel:
    """Return the function that builds a model.

    Raises:
        ValueError: there is no such model; the message names the closest ones.
    """
    return _entry(name)[0]


def list_model_parameters(name: str) -> list[inspect.Parameter]:
    """Return the options of a model from its signature."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(find_builder(name)).parameters.values()
    return [p for p in parameters if p.kind in kinds]


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List the models of the zoo, sorted by name.

    Args:
        pattern: shell pattern that the names must match, such as `pale*`.
        pretrained: list weights instead of models, as `MODEL.TAG`: weights that come with ppvision,
            and weights whose package is installed.

    Raises:
        TypeError: `pattern` is not text, or `pretrained` is not True or False.
    """
    check_text(pattern, "pattern", "a shell pattern")
    if check_flag(pretrained, "pretrained"):
        here = [card.model_name for card in ZOO_WEIGHTS.values() if is_here(card)]
        return sorted(name for name in here if _matches(name, pattern))
    return sorted(fnmatch.filter(_MODELS, pattern))


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches, with its tag or without it."""
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.partition(".")[0]))


def model_card(name: str) -> ModelCard:
    """Return the card of a model: paper, size, recipe, licence, weights and scores.

    Raises:
        ValueError: there is no such model; the message names the closest ones.
    """
    return _entry(name)[1]


__all__ = [
    "BuildModel",
    "ModelCard",
    "WeightsCard",
    "find_builder",
    "follow_models",
    "list_model_parameters",
    "list_models",
    "model_card",
    "register_model",
]
