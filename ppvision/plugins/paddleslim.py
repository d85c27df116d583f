"""PaddleSlim: `LayeredQAT` puts quanters into a model, as a `SlimQuantConfig` or our YAML says."""

import fnmatch
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import paddle
from paddle import nn

from ppvision.errors import MissingPackageError, shorten

try:
    from paddleslim.quant import SlimQAT, SlimQuantConfig
except ImportError as error:
    raise MissingPackageError(
        "Quantization needs PaddleSlim: pip install --no-deps paddleslim==2.6.0"
    ) from error

from ppvision.errors import InputError
from ppvision.forms.paddle_private import find_private
from ppvision.nn import SemanticDifferenceConv2D, SemanticDiffusion
from ppvision.quant.codes import MAX_BITS
from ppvision.quant.store.state import walk_layers
from ppvision.quant.train.layers import NORMS, WITH_WEIGHT, LayeredLayer, LayeredNorm
from ppvision.quant.train.quanters import (
    DEFAULT_BITS,
    LayeredActivationQuanter,
    LayeredWeightQuanter,
    LayeredWeightQuanterLayer,
    check_widths,
)

logger = logging.getLogger("ppvision")

# -- PaddleSlim's own way in -----------------------------------------------------------------------


class LayeredQAT(SlimQAT):
    """PaddleSlim's QAT, for layered quanters.

    In addition to SlimQAT, it supports Conv2DTranspose, SDN's operator and BatchNorm (with
    statistics per width). It leaves layers of your own subclasses to `add_qat_layer_mapping`. It
    needs an example input only if the config has constraints.

    Args:
        q_config: with `LayeredWeightQuanter` and `LayeredActivationQuanter` as factories, by type,
            name or layer. `slim_quant_config` makes one from YAML.
    """

    def __init__(self, q_config: SlimQuantConfig) -> None:
        super().__init__(q_config)
        for source, target in (WITH_WEIGHT | NORMS).items():
            if source not in self._config._customized_qat_layer_mapping:
                self._config.add_qat_layer_mapping(source, target)

    def quantize(
        self, model: nn.Layer, inplace: bool = False, inputs: object | None = None
    ) -> nn.Layer:
        """Put quanters into a copy of the model, or into the model itself.

        Args:
            model: the float model.
            inplace: change the model itself. Default: change a copy.
            inputs: an example input, needed only if the config has constraints.

        The log names layers with weights that stay in float.

        Raises:
            ValueError: constraints need inputs; a constraint fuses a convolution with its
                BatchNorm, which has statistics per width here; a layer has two names; or there is
                nothing to quantise.
        """
        if self._config.constraints and inputs is None:
            raise InputError(
                "inputs: the config has constraints, which PaddleSlim applies to a traced model. "
                "Expected an example input, got none."
            )
        widths = sorted({k for factory in self._factories() for k in factory.kwargs["bits"]})
        for norm in NORMS:
            if widths and norm not in self._config._type2config:
                self._config.add_type_config(norm, weight=LayeredWeightQuanter(widths))
        shared = _names_of_shared(model)
        quantized = super().quantize(model, inplace=inplace, inputs=inputs)
        layers = quantized.sublayers()
        if not any(isinstance(layer, LayeredLayer) for layer in layers):
            itself = type(model) in WITH_WEIGHT
            raise InputError(
                f"quantize: expected a layer that the config names in {type(model).__name__}, "
                f"found none. Known types: {', '.join(t.__name__ for t in WITH_WEIGHT)}."
                + (" A model that is one layer goes into nn.Sequential." if itself else "")
            )
        for layer in layers:
            if not isinstance(layer, LayeredLayer) and _has_quanter(layer):
                raise InputError(
                    f"quantize: expected constraints that leave layers as they are, but one made "
                    f"{type(layer).__name__}, whose codes cannot be stored in layers."
                )
        in_float = dict(_in_float(quantized))
        _check_shared(shared, list(in_float))
        left = [f"{path} ({type(layer).__name__})" for path, layer in in_float.items()]
        if left:
            logger.info(f"quantization: left in float: {', '.join(left)}")
        return quantized

    def _factories(self) -> Iterator[LayeredWeightQuanter]:
        config = self._config
        known = [config.global_config, *config._type2config.values()]
        known += [*config._prefix2config.values(), *config._layer2config.values()]
        for single in known:
            if single is not None and isinstance(single.weight, LayeredWeightQuanter):
                yield single.weight

    def _analysis_model(self, model: nn.Layer, inputs: object | None) -> object:
        """Trace the graph if constraints need it. Statistics do not change, and no hooks stay if
        PaddleSlim's tracer does not understand the model."""
        if not self._config.constraints:
            return None
        from paddleslim.core.graph_tracer import _remove_call_hook

        modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
        model.eval()
        try:
            with paddle.no_grad():
                return super()._analysis_model(model, inputs)
        finally:
            _remove_call_hook(model)
            for layer, training in modes:
                layer.training = training

    def convert(self, model: nn.Layer, bits: int) -> nn.Layer:
        """Return a copy with packed codes of one width instead of quanters, for export.

        Args:
            model: a model that `quantize` returned, trained or not.
            bits: width, 1 to 8.
        """
        from ppvision.quant.packed import copy_packed

        return copy_packed(model, bits)


def _names_of_shared(model: nn.Layer) -> list[list[str]]:
    """Return all paths of each layer with a weight that is in several places."""
    places: dict[int, list[str]] = {}
    for path, parent in model.named_sublayers(include_self=True):
        for name, layer in parent._sub_layers.items():
            if type(layer) in WITH_WEIGHT:
                places.setdefault(id(layer), []).append(f"{path}.{name}" if path else name)
    return [names for names in places.values() if len(names) > 1]


def _check_shared(shared: list[list[str]], in_float: Sequence[str]) -> None:
    """Refuse layers in several places, because PaddleSlim replaces a layer in only one of them."""
    for names in shared:
        if 0 < len(set(names) & set(in_float)) < len(names):
            raise InputError(
                f"quantize: expected every layer under one name, got one as {' and '.join(names)}. "
                "Keep it under one name and call that twice."
            )


def _has_quanter(layer: nn.Layer) -> bool:
    return any(isinstance(child, LayeredWeightQuanterLayer) for child in layer.children())


def _in_float(model: nn.Layer) -> Iterator[tuple[str, nn.Layer]]:
    """Yield layers with a weight without a quanter, and norms without statistics per width."""
    for path, _, _, layer in walk_layers(model):
        # nn.BatchNorm is Paddle's older class.
        norm = isinstance(layer, (find_private("_BatchNormBase"), nn.BatchNorm))
        weights = [p for p in layer._parameters.values() if p is not None and p.ndim > 1]
        ours = LayeredLayer | LayeredNorm | LayeredWeightQuanterLayer
        if (norm or weights) and not isinstance(layer, ours):
            yield path, layer


# -- YAML ------------------------------------------------------------------------------------------

_RULE_KEYS = ("bits", "min_bits", "max_bits", "activations", "float")


def slim_quant_config(
    model: nn.Layer,
    *,
    bits: list[int] | tuple[int, ...] = DEFAULT_BITS,
    activations: bool | Literal[8] = False,
    steps: str = "shared",
    types: Mapping[str, Mapping] | None = None,
    layers: Mapping[str, Mapping] | None = None,
    ends: tuple[str, ...] = (),
) -> SlimQuantConfig:
    """Translate `slim_config` into PaddleSlim's config, with an entry per layer.

    Args:
        model: the float model whose layers the config names.
        bits: widths to train. Default 8, 6, 4, 3, 2.
        activations: whether to quantise the inputs of layers too. True: with as many bits as the
            weights. 8: with 8 bits at every width, as integers in a deployed graph need. Default
            False.
        steps: see `LayeredWeightQuanter`.
        types: rules by type of layer, such as `{"Linear": {"min_bits": 4}}`.
        layers: rules by path of layer, with `*` and `?` (`backbone.stages.*`). If several match,
            the most specific one (most literal characters) wins. A rule by path has priority over
            all rules by type.
        ends: paths of layers that stay at 8 bits unless `layers` names them: the layer that reads
            the image and the layers that give the result (`end_layers`). The fusions of SDN also
            stay at 8 bits. Default: none.

    A rule has `bits` (the same at every width), or `min_bits` and `max_bits`. It may have
    `activations`. `float: true` keeps the layer in float.

    Raises:
        ValueError: a type or key is unknown, a rule by path matches no layer, or a width is out of
            range.
    """
    widths = check_widths(bits)
    types, layers = dict(types or {}), dict(layers or {})
    names = {kind.__name__: kind for kind in WITH_WEIGHT}
    for name in types:
        if name not in names:
            raise InputError(
                f"slim_config: types: expected one of {', '.join(names)}, got {shorten(name)}."
            )
    paths = {path: layer for path, layer in model.named_sublayers() if type(layer) in WITH_WEIGHT}
    for pattern in layers:
        if not fnmatch.filter(paths, pattern) and not fnmatch.filter(paths, f"{pattern}.*"):
            raise InputError(
                f"slim_config: layers: {shorten(pattern)} matches no layer. There are, for "
                f"example, {', '.join(list(paths)[:5])}."
            )
    fusions = {
        f"{path}.fuse"
        for path, layer in model.named_sublayers()
        if isinstance(layer, SemanticDiffusion)
    }
    config = SlimQuantConfig(activation=None, weight=None)
    for path, layer in paths.items():
        rule = dict(types.get(type(layer).__name__, {}))
        if path in fusions or path in ends:
            rule = {"bits": MAX_BITS}
        rule = _most_specific(layers, path, rule)
        if type(layer) is SemanticDifferenceConv2D:
            # It multiplies differences of its input, so a rounded input would not give integers.
            rule = {"activations": False, **rule}
        factories = _factories_of(rule, widths, activations, steps, path)
        if factories is None:
            continue
        weight, activation = factories
        config.add_layer_config(layer, activation=activation, weight=weight)
        if path in ends and weight.kwargs["min_bits"] < MAX_BITS:
            logger.warning(
                f"quantization: {path} reads the image or gives the result; a rule under layers "
                "gives it another width than 8 bits"
            )
    for norm in NORMS:
        config.add_type_config(norm, weight=LayeredWeightQuanter(widths))
    return config


def _most_specific(layers: Mapping[str, Mapping], path: str, otherwise: dict) -> dict:
    """Return the rule for a path; a pattern applies to a layer and to all layers inside it."""
    found = [p for p in layers if fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path, f"{p}.*")]
    if not found:
        return otherwise
    best = max(found, key=lambda pattern: len(pattern) - sum(map(pattern.count, "*?[")))
    return dict(layers[best])


def _factories_of(
    rule: Mapping,
    widths: tuple[int, ...],
    activations: bool | Literal[8],
    steps: str,
    path: str,
) -> tuple[LayeredWeightQuanter, LayeredActivationQuanter | None] | None:
    """Make the quanters of weight and activation by a rule; None for a layer that stays in
    float."""
    unknown = [key for key in rule if key not in _RULE_KEYS]
    switches = [rule[key] for key in ("activations", "float") if key in rule]
    unknown += [s for s in switches if not isinstance(s, bool) and s != MAX_BITS]
    if unknown or ("bits" in rule and {"min_bits", "max_bits"} & rule.keys()):
        raise InputError(
            f"slim_config: the rule for {path}: expected bits, or min_bits and max_bits, "
            f"activations (true, false or 8), float (true or false); got {shorten(dict(rule))}."
        )
    for key in ("bits", "min_bits", "max_bits"):
        width = rule.get(key, MAX_BITS)
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_BITS:
            raise InputError(
                f"slim_config: the rule for {path}: {key}: expected 1 to {MAX_BITS}, got "
                f"{shorten(width)}."
            )
    if rule.get("float"):
        return None
    low, high = rule.get("min_bits", 1), rule.get("max_bits", MAX_BITS)
    if "bits" in rule:
        low = high = rule["bits"]
    weight = LayeredWeightQuanter(widths, min_bits=low, max_bits=high, steps=steps)
    wanted = rule.get("activations", activations)
    if not wanted:
        return weight, None
    if wanted is not True:
        low = high = MAX_BITS
    return weight, LayeredActivationQuanter(widths, min_bits=low, max_bits=high)


def end_layers(model: nn.Layer, example: paddle.Tensor) -> tuple[str, ...]:
    """Find the layer that reads the image and the layers that give the result; return their paths.

    The first is the layer that runs first. For each output of the model, the last layer that runs
    with as many channels as the output follows. Layers with as many channels that do not run in
    evaluation (auxiliary heads) are included. If no layer has as many channels, it is the last
    layer that runs.

    Args:
        model: a model that accepts `example` in evaluation mode.
        example: float32 `[B, C, H, W]`.
    """
    ran: list[str] = []
    paths = {path: layer for path, layer in model.named_sublayers() if type(layer) in WITH_WEIGHT}

    def note(path: str) -> object:
        return lambda layer, inputs: ran.append(path)

    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in paths.items()]
    modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        with paddle.no_grad():
            outputs = model(example)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, training in modes:
            layer.training = training
    if not ran:
        return ()
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    counts = {x.shape[1] for x in outputs if isinstance(x, paddle.Tensor) and x.ndim > 1}
    same = [path for path in ran if _channels(paths[path]) in counts]
    ends = [ran[0], *(same[-len(outputs) :] or ran[-1:])]
    ends += [p for p, layer in paths.items() if p not in ran and _channels(layer) in counts]
    return tuple(dict.fromkeys(ends))


def _channels(layer: nn.Layer) -> int:
    if isinstance(layer, nn.Linear):
        return layer.weight.shape[1]
    if isinstance(layer, nn.Conv2DTranspose):
        return layer.weight.shape[1] * layer._groups
    return layer.weight.shape[0]
