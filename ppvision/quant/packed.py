"""Layers with packed codes: the model at one width, for export.

In an exported graph the codes are bytes. A few operations unpack them, and Paddle Inference folds
these operations into a float weight once, when it loads the graph. A code is cut into fields of 4,
2 and 1 bits. Layers share a table for each field, with what each byte is worth:

    w = step (sum over fields f of table_f[byte] + 1/2)

Source: layered codes, see `ppvision.quant.codes`. We chose unpacking by a table: folding shifts and
masks of integers is several times slower. The fields are our choice too: see `pack_fields`.
"""

import copy
import functools
from collections.abc import Mapping

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.errors import InputError
from ppvision.nn.semantic_diffusion import advise_on_guidance
from ppvision.quant.codes import FLOAT_BITS, MAX_BITS, check_codes
from ppvision.quant.integers import (
    CODES,
    INT8_LOW,
    LAYERED_BITS,
    WEIGHT_LIMIT,
    IntegerActivation,
    IntegerWeight,
    align,
)
from ppvision.quant.store.state import (
    LayeredActivation,
    LayeredState,
    LayeredWeight,
    extract_state,
    walk_layers,
)
from ppvision.quant.train.layers import (
    NORMS,
    LayeredLayer,
    LayeredNorm,
    become,
)
from ppvision.quant.train.quanters import (
    LayeredActivationQuanterLayer,
    round_to_nearest,
    rounding_range,
)

_FIELDS = (4, 2, 1)  # bits of a code that lie together, so that a byte has no bit left over


def _split_width(bits: int) -> list[tuple[int, int]]:
    """Return the fields of a code: how many bits, and how many lower bits follow. The highest field
    comes first."""
    fields, below = [], bits
    while below:
        size = next(size for size in _FIELDS if size <= below)
        below -= size
        fields.append((size, below))
    return fields


def pack_fields(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Pack codes into bytes, field by field.

    A layered model stores planes of single bits (`ppvision.quant.codes`), so that every width is a
    prefix. A graph has one width, and unpacks fewer, larger fields in less time: 4 bits in one
    lookup per byte and not in four.

    Args:
        codes: codes of width `bits`, of any shape, in the order of rows.
        bits: 1 to 8.

    Returns:
        For each field uint8 `[ceil(count * size / 8)]`. The first code of a byte has its highest
        bits, and bits beyond the last code are 0.
    """
    flat = check_codes(codes, bits).reshape(-1).view(np.uint8)
    packed = []
    for size, below in _split_width(bits):
        part = (flat >> below) & (2**size - 1)
        per_byte = 8 // size
        part = np.pad(part, (0, -len(part) % per_byte)).reshape(-1, per_byte)
        shifts = np.arange(8 - size, -1, -size, dtype=np.uint8)
        packed.append(np.bitwise_or.reduce(part << shifts, axis=1))
    return packed


class _Tables:
    """Tables that the layers of a model share in a graph."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, bool], Tensor] = {}

    def of(self, bits: int) -> list[Tensor]:
        """Return for each field of a code int8 `[256, codes per byte]`: what a byte is worth."""
        fields = _split_width(bits)
        return [self._find(size, below, below + size == bits) for size, below in fields]

    def _find(self, size: int, below: int, signed: bool) -> Tensor:
        key = size, below, signed
        if key not in self._known:
            byte = np.arange(256)[:, None]  # [256, 1]
            worth = (byte >> np.arange(8 - size, -1, -size)) & (2**size - 1)  # [256, 8 / size]
            if signed:  # two's complement
                worth = np.where(worth >= 2 ** (size - 1), worth - 2**size, worth)
            self._known[key] = paddle.to_tensor((worth << below).astype(np.int8))
        return self._known[key]


_PACKED_NAMES = ("unpacked", "codes", "cell")
_FIELD_NAMES = ("packed_", "table_")  # a number follows


class PackedLayer:
    """The common part of packed layers; it comes before the class that it changes.

    Args:
        layer: the layer to replace, in float or with quanters.
        weight: the weight at its width.
        activation: the rounding of its input, or None.
        tables: tables that the layers of a model share; None: a graph gets the float weight, not
            codes.

    Attributes:
        model_bits: width of the layer's model; 32 if a graph gets float weights.
        axis: axis of the weight's channels.
    """

    def __init__(
        self,
        layer: nn.Layer,
        weight: LayeredWeight | IntegerWeight,
        activation: nn.Layer | None,
        tables: _Tables | None,
    ) -> None:
        nn.Layer.__init__(self)
        become(self, layer)
        del self._parameters["weight"]
        self._sub_layers.clear()
        self.activation = activation
        self._shape = list(weight.codes.shape)
        self.axis = weight.axis
        self.register_buffer("unpacked", paddle.to_tensor(weight.dequantize()))
        self._in_graph = tables is not None
        self.model_bits = FLOAT_BITS
        if tables is not None:
            self._hold(weight, tables)

    def _hold(self, weight: LayeredWeight, tables: _Tables) -> None:
        """Store the tensors from which a graph computes the weight."""
        cell = align(weight.cell(), len(self._shape), self.axis)
        self.register_buffer("cell", paddle.to_tensor(cell))
        fields = pack_fields(weight.codes, weight.held_bits)
        for number, (packed, table) in enumerate(
            zip(fields, tables.of(weight.held_bits), strict=True)
        ):
            self.register_buffer(f"packed_{number}", paddle.to_tensor(packed))
            self.register_buffer(f"table_{number}", table)

    @property
    def packed(self) -> list[Tensor]:
        """Return the bytes of each field of the codes."""
        # By getattr: while a graph is traced, Paddle gives the graph's tensors there.
        return [getattr(self, name) for name in self._buffers if name.startswith("packed_")]

    @property
    def kind(self) -> type[nn.Layer]:
        """Return the class of the float layer."""
        return type(self).__bases__[1]

    @property
    def weight(self) -> Tensor:
        if paddle.in_dynamic_mode() or not self._in_graph:
            return self.unpacked  # eager mode does not unpack at every call
        return (self._codes_in_graph() + 0.5) * self.cell

    def in_float(self) -> nn.Layer:
        """Return the float layer with the same weight, without rounding."""
        layer = object.__new__(self.kind)
        nn.Layer.__init__(layer)
        become(layer, self)
        layer._sub_layers.clear()
        layer._buffers.clear()
        layer._parameters["weight"] = self.unpacked
        return layer

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """In a graph, return int8 codes of the weight's shape, and the value of code 1: float32
        with as many axes, channels on `axis`."""
        codes = 2.0 * self._codes_in_graph() + 1.0  # cell centres at half the scale
        return codes.astype("int8"), 0.5 * self.cell

    def _codes_in_graph(self) -> Tensor:
        """Return float codes of the weight's shape, unpacked by operations of a graph."""
        count = int(np.prod(self._shape))
        codes = None
        for number, packed in enumerate(self.packed):
            table = getattr(self, f"table_{number}").astype("float32")
            worth = F.embedding(packed.astype("int32"), table).reshape([-1])  # [bytes * per byte]
            if worth.shape[0] > count:
                worth = worth[:count]
            codes = worth if codes is None else codes + worth
        return codes.reshape(self._shape)

    @paddle.jit.not_to_static  # it would replace `super()` by that of the object's own class
    def forward(self, x: Tensor, *others: object, **named: object) -> Tensor:
        if self.activation is not None:
            x = self.activation(x)
        return super().forward(x, *others, **named)


class IntegerLayer(PackedLayer):
    """A packed layer whose codes are plain 8-bit integers (`ppvision.quant.integers`)."""

    def _hold(self, weight: IntegerWeight, tables: _Tables) -> None:
        cell = align(weight.scale, len(self._shape), self.axis)
        self.register_buffer("codes", paddle.to_tensor(weight.codes))
        self.register_buffer("cell", paddle.to_tensor(cell))

    @property
    def weight(self) -> Tensor:
        if paddle.in_dynamic_mode() or not self._in_graph:
            return self.unpacked
        return self.codes.astype("float32") * self.cell

    def integer_weight(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.cell


@functools.cache
def _packed(kind: type[nn.Layer], form: type[PackedLayer] = PackedLayer) -> type[nn.Layer]:
    """Return the packed form of the class of a float layer or of its layered replacement."""
    if issubclass(kind, LayeredLayer):
        order = kind.__mro__
        kind = order[order.index(LayeredLayer) + 1]
    prefix = form.__name__.removesuffix("Layer")
    return type(f"{prefix}{kind.__name__}", (form, kind), {})


_FLOAT_NORMS = {layered: kind for kind, layered in NORMS.items()}


class FixedActivation(nn.Layer):
    """Rounds to the codes of one width: the form of `LayeredActivationQuanter` for export.

    Args:
        activation: steps and widths.
        bits: width of the model.
    """

    def __init__(self, activation: LayeredActivation, bits: int) -> None:
        super().__init__()
        step, width = activation.at(bits)
        self.low, self.high = rounding_range(width, activation.signed)
        self.register_buffer("step", paddle.to_tensor(np.float32(step)))

    def forward(self, x: Tensor) -> Tensor:
        return self.step * paddle.clip(round_to_nearest(x / self.step), self.low, self.high)


class IntegerRounding(nn.Layer):
    """Rounds to 256 codes, and contains the stored tensors of a graph in integers.

    Args:
        activation: step and lowest code.
        clip: lowest and highest valid code, for fewer than 8 bits. Default None: all 256.

    Attributes:
        scale: `[1]`, 127 steps: the magnitude for `quantize_linear`.
        zero: `[1]`, the code of 0 as an 8-bit integer (the zero point).
        low, high: the lowest and highest code as 8-bit integers.
        limits: the values of `clip` if fewer than 256 codes are valid; None: all are.
    """

    def __init__(self, activation: IntegerActivation, clip: tuple[int, int] | None = None) -> None:
        super().__init__()
        low, high = clip or (activation.low, activation.high)
        zero = INT8_LOW - activation.low  # the lowest of the 256 codes becomes the lowest of int8
        step = activation.step
        self.low, self.high = low + zero, high + zero
        self.limits = None if high - low == CODES - 1 else (low * step, high * step)
        scale = np.float32([step * WEIGHT_LIMIT])
        self.register_buffer("scale", paddle.to_tensor(scale))
        self.register_buffer("zero", paddle.to_tensor(np.float32([zero])))

    def forward(self, x: Tensor) -> Tensor:
        step = self.scale / float(WEIGHT_LIMIT)
        codes = paddle.clip(round_to_nearest(x / step) + self.zero, self.low, self.high)
        return step * (codes - self.zero)


def pack_model(
    model: nn.Layer,
    state: LayeredState,
    bits: int,
    *,
    codes: bool = True,
    integers: bool = False,
) -> nn.Layer:
    """Put a width's weights into a model, in place.

    Args:
        model: a model in float or with quanters, of the same architecture as the state.
        state: state of the model.
        bits: width.
        codes: whether a graph traced from it contains packed codes (default), or float weights with
            the same values.
        integers: whether products can run in integers: activations are rounded to 8-bit codes, and
            weights have at most 7 bits (`ppvision.quant.integers`).

    Returns:
        The model, in evaluation mode. Its float tensors are those of the state too.

    Raises:
        ValueError: the state does not have the width; the model does not have a layer or tensor, or
            has it with another type or shape; or `integers` is used for a state without
            activations.
    """
    state.check_bits(bits)
    if integers and not state.activations:
        raise InputError(
            "integers: expected steps of activations in the layered model, got none. Train or pack "
            "it with `activations: 8` (without training: pack --ptq --activations 8)."
        )
    statistics = state.statistics_at(bits)
    tables, waiting = _Tables() if codes else None, dict(state.weights)
    activations = _roundings(state.activations, bits, integers)
    for path, parent, name, layer in walk_layers(model):
        if path in waiting:
            weight, activation = waiting.pop(path).at(bits), activations.pop(path, None)
            if isinstance(activation, IntegerRounding):
                weight = weight.at_width(min(weight.held_bits, LAYERED_BITS))
            if isinstance(layer, PackedLayer):  # already packed under another path
                continue
            own = layer._parameters.get("weight")
            if own is None or list(own.shape) != list(weight.codes.shape):
                raise InputError(
                    f"{path}: expected a layer with a weight {list(weight.codes.shape)}, got "
                    f"{layer}. The layered model belongs to another architecture."
                )
            packed = _packed(type(layer))(layer, weight, activation, tables)
            packed.model_bits = bits if codes else FLOAT_BITS
            parent._sub_layers[name] = packed
        elif type(layer) in _FLOAT_NORMS:
            parent._sub_layers[name] = _plain_norm(layer)
        elif isinstance(layer, LayeredActivationQuanterLayer) and path in activations:
            parent._sub_layers[name] = activations.pop(path)
    if waiting or activations:
        raise InputError(
            f"model: expected layers {', '.join([*waiting, *activations][:5])}, which it does not "
            "have. The layered model belongs to another architecture."
            f"{advise_on_guidance([], [*waiting])}"
        )
    _assign(model, {**state.floats, **statistics})
    model.eval()
    return model


def _roundings(
    activations: Mapping[str, LayeredActivation], bits: int, integers: bool
) -> dict[str, nn.Layer]:
    """Return the rounding of the layers' inputs at a width, by path.

    Inputs with the same codes share one rounding. So layers that read the same map can round it
    once (`ppvision.forms.tokens`), and a graph with shared rounding has the same stored tensors as
    one without.
    """
    make = _integer_rounding if integers else FixedActivation
    made: dict[tuple[float, int, bool], nn.Layer] = {}
    found = {}
    for path, activation in activations.items():
        codes = (*activation.at(bits), activation.signed)
        if codes not in made:
            made[codes] = make(activation, bits)
        found[path] = made[codes]
    return found


def _integer_rounding(activation: LayeredActivation, bits: int) -> IntegerRounding:
    """Make a `FixedActivation` with 8-bit codes for any width: the steps are the same, and codes
    that the width does not have are clipped."""
    step, width = activation.at(bits)
    low, high = rounding_range(width, activation.signed)
    window = IntegerActivation(step, INT8_LOW if activation.signed else 0)
    return IntegerRounding(window, None if width == MAX_BITS else (low, high))


def copy_with_integers(
    model: nn.Layer,
    weights: Mapping[str, IntegerWeight],
    activations: Mapping[str, IntegerActivation],
) -> nn.Layer:
    """Copy a float model so that its layers multiply 8-bit integers.

    Args:
        model: a model in float.
        weights: weights by the path of their layer.
        activations: roundings of the layers' inputs, by the same paths. The products of a layer
            without one stay in float.

    Returns:
        The copy, in evaluation mode.
    """
    copied, tables = copy.deepcopy(model), _Tables()
    # As in `_roundings`: layers that read the same map share the codes.
    roundings = {activation: IntegerRounding(activation) for activation in activations.values()}
    for path, parent, name, layer in walk_layers(copied):
        if path in weights and not isinstance(layer, PackedLayer):
            rounding = roundings[activations[path]] if path in activations else None
            form = _packed(type(layer), IntegerLayer)
            parent._sub_layers[name] = form(layer, weights[path], rounding, tables)
            parent._sub_layers[name].model_bits = MAX_BITS
    copied.eval()
    return copied


def find_packed_bits(model: nn.Layer) -> int:
    """Return the width of the codes in a model (rules may give layers other widths); 32 without
    codes."""
    packed = (layer for layer in model.sublayers() if isinstance(layer, PackedLayer))
    return next((layer.model_bits for layer in packed), FLOAT_BITS)


def copy_packed(model: nn.Layer, bits: int) -> nn.Layer:
    """Apply `pack_model` to a copy of a model with quanters."""
    widths = {
        k for layer in model.sublayers() if isinstance(layer, LayeredNorm) for k in layer.trained
    }
    for layer in model.sublayers():
        if hasattr(layer, "range"):
            widths |= set(layer.range.trained)
    state = extract_state(model, tuple(sorted(widths, reverse=True)))
    return pack_model(copy.deepcopy(model), state, bits)


def _plain_norm(layer: LayeredNorm) -> nn.Layer:
    """Return the BatchNorm that a layered one replaced."""
    norm = object.__new__(_FLOAT_NORMS[type(layer)])
    nn.Layer.__init__(norm)
    become(norm, layer)
    norm._buffers.clear()
    return norm


def _assign(model: nn.Layer, arrays: dict[str, np.ndarray]) -> None:
    """Put float tensors into a packed model: all of them, and no others."""
    own = {k: v for k, v in model.state_dict().items() if not _is_packed(model, k)}
    wrong = [k for k in own.keys() | arrays.keys() if k not in own or k not in arrays]
    wrong += [k for k in own.keys() & arrays.keys() if list(own[k].shape) != list(arrays[k].shape)]
    if wrong:
        raise InputError(
            "model: expected the tensors of the layered model; missing there, unknown or of "
            f"another shape: {', '.join(sorted(wrong)[:8])}. It belongs to another architecture."
        )
    for name, tensor in own.items():
        tensor.set_value(arrays[name])


def _is_packed(model: nn.Layer, name: str) -> bool:
    """Whether a tensor belongs to the unpacking of codes."""
    path, _, last = name.rpartition(".")
    layer = model
    for part in path.split(".") if path else []:
        layer = layer._sub_layers[part]
    if isinstance(layer, (FixedActivation, IntegerRounding)):
        return True
    return isinstance(layer, PackedLayer) and (
        last in _PACKED_NAMES or last.startswith(_FIELD_NAMES)
    )
