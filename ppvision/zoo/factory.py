"""`create_model`: a model of the zoo, with or without weights."""

import inspect
import os
from dataclasses import replace
from typing import cast

import numpy as np

from ppvision.arguments import check_count, check_flag, check_text
from ppvision.errors import InputError, InputTypeError, shorten, suggest_nearest
from ppvision.models.base import ZooModel
from ppvision.zoo.cards import find_card
from ppvision.zoo.pretrained import find_pretrained, load_pretrained
from ppvision.zoo.registry import find_builder, list_model_parameters, list_models, model_card

# Options of a classifier or backbone that a plug-in or a configuration sets.
FEATURE_OPTIONS = ("features_only", "out_indices")


def create_model(
    name: str,
    *,
    pretrained: bool | str | os.PathLike[str] | None = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    **options: object,
) -> ZooModel:
    """Build a model of the zoo.

        net = create_model("pale_nano", pretrained=True, num_classes=11)
        net = create_model("pale_nano", pretrained="digit_scenes", features_only=True)
        net = create_model("resnet50", pretrained="resnet50.pth", in_channels=1)

    Args:
        name: a name that `list_models` returns. `NAME.TAG` with `pretrained=True` selects the
            weights TAG.
        pretrained: False or None: fresh weights. True: the default weights. Or a tag, a name of
            weights in the zoo, a file, or a URL with its sha256 (`find_pretrained`). From a whole
            model, the backbone is used.
        frozen_stages: stages that are not trained (`ZooModel.freeze`): -1 for none, 0 for the stem,
            k for the stem and the first k stages.
        norm_eval: keep the running statistics of BatchNorm fixed in training.
        **options: the model's own (`list_model_options`). All models of the zoo have
            `num_classes=1000` (0: no head), `in_channels=3`, `features_only=False` (True: the model
            returns a list of feature maps instead of logits), `out_indices=None` (which feature
            maps) and `recompute=False`. Without `num_classes`, a pretrained classifier has the
            number of classes of its weights. With another number, the head gets fresh weights. A
            classifier also uses the options that its weights were trained with
            (`pretrained_cfg.options`), unless you pass them. If `in_channels` is not 3, the first
            convolution of pretrained weights is adapted.

    Returns:
        The model. Its `pretrained_cfg` describes the input that it expects. (A model registered by
        other code may be another `nn.Layer` with fewer attributes.)

    Raises:
        ValueError: no such model, or the value of an option is out of range; see
            `find_pretrained`.
        TypeError: no such option; the message names the closest ones.
        WeightsError: the weights do not fit.
    """
    model, tag = split_name(name)
    known = find_model_signature(model).parameters
    for option, value in [*options.items()]:
        if option not in known:
            raise InputTypeError(
                f"create_model({shorten(name)}): expected options among {', '.join(known)}; got "
                f"{shorten(option)}. {suggest_nearest(option, known)}"
            )
        if isinstance(value, np.integer):
            options[option] = value = int(value)
        if isinstance(known[option].default, bool):
            check_flag(value, option)
        elif isinstance(value, int) and not isinstance(value, bool):
            check_count(value, option, least=-(2**31))  # Paddle's sizes have 32 bits
    check_flag(norm_eval, "norm_eval")
    if tag is not None and pretrained is True:
        pretrained = tag
    if pretrained is None or pretrained is False:
        found = None
    else:
        found = find_pretrained(model, pretrained)
    config, fresh = model_card(model).config, True
    if found is not None:
        config = found.config
        if not options.get("features_only"):
            options = {**config.options, **options}
    net = find_builder(model)(**options)
    if found is not None:
        keep_head = "num_classes" not in options
        fresh = bool(load_pretrained(net, found, keep_head=keep_head))
    if isinstance(net, ZooModel):
        # A new head has no names of classes.
        classes = () if fresh or not net.num_classes else config.classes
        config = config.for_channels(net.in_channels)
        net.pretrained_cfg = replace(config, num_classes=net.num_classes, classes=classes)
        net.freeze(frozen_stages)
        if norm_eval:
            net.freeze_norms()
    elif frozen_stages != -1 or norm_eval:
        raise InputError(
            f"create_model({shorten(name)}): frozen_stages and norm_eval need a ZooModel, got "
            f"{type(net).__name__}."
        )
    return cast(ZooModel, net)


def split_name(name: str) -> tuple[str, str | None]:
    """Return model and tag of `MODEL`, `MODEL.TAG` or an alias.

    Raises:
        ValueError: the name is none of these. The message names the closest ones, or explains how
            to use a whole model.
    """
    card = find_card(check_text(name, "model", "a name of the zoo"))
    if card is None:
        model, _, tag = name.partition(".")
        if tag and model in list_models():
            tags = [c.tag for c in model_card(model).weights.values()]
            raise InputError(
                f"model: {model} has no weights {shorten(tag)}. {suggest_nearest(tag, tags)}"
            )
        find_builder(name)  # the error names the closest ones
        return name, None
    if name == card.name and card.architecture != card.model:
        raise InputError(
            f"model: {name} is a whole model, which Predictor({name!r}) and --model_path take. Its "
            f"backbone: create_model({card.model!r}, pretrained={card.tag!r})."
        )
    return card.model, card.tag


def find_model_signature(name: str) -> inspect.Signature:
    """Return the keyword options of `create_model(name, ...)`: the model's own, then those of every
    model."""
    common = inspect.signature(create_model).parameters.values()
    own = list_model_parameters(name)
    shared = [p for p in common if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)])


def list_model_options(name: str) -> list[str]:
    """Return names of the options of `create_model` for a model."""
    return list(find_model_signature(name).parameters)
