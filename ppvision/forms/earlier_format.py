"""Trace models in Paddle's earlier program format (`model.pdmodel`), the only one that OpenVINO
reads.

Paddle 3.2 moved some functions to C++ (`matmul`, `sigmoid`, `maximum` ...), where they no longer
support this format. OpenVINO's reader of Paddle's programs also lacks operators (`prelu`, `unbind`
...), and computes one of them wrongly in some cases. `STAND_INS` has a replacement for each of
these functions, made of operators that OpenVINO knows. While a model is traced, they replace
Paddle's functions wherever a module has them: Paddle itself, PaddleSeg, PaddleDetection, our
modules and the user's. They also replace methods of a traced tensor.
"""

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.forms.paddle_private import find_private

Variable = find_private("Variable")  # a tensor in a program of the earlier format
_C_OPS = find_private("_C_ops")  # the functions that Paddle moved to C++

# Tracing changes the whole process, so only one thread may trace at a time.
_tracing = threading.RLock()
_depth = 0


def in_earlier_format() -> bool:
    """Whether operators are now added to a program of the earlier format. This is true inside
    `earlier_format` while a model is traced, not while it runs."""
    return _depth > 0 and not paddle.in_dynamic_mode()


def append_operator(
    kind: str,
    inputs: Mapping[str, Tensor],
    dtype: str | paddle.dtype | None = None,
    out: str = "Out",
    **attributes: object,
) -> Tensor:
    """Add an operator to the program that is traced (`in_earlier_format`).

    Args:
        kind: name of the operator in the earlier format ("matmul_v2").
        inputs: slot -> tensor.
        dtype: type of the output. Default None: that of the first input.
        out: slot of the output.
        attributes: attributes of the operator.

    Returns:
        The output; Paddle infers its shape.
    """
    helper = find_private("LayerHelper")(kind)
    found = helper.create_variable_for_type_inference(
        dtype=dtype or next(iter(inputs.values())).dtype
    )
    helper.append_op(type=kind, inputs=dict(inputs), outputs={out: found}, attrs=attributes)
    return found


@contextmanager
def earlier_format() -> Iterator[None]:
    """Let `paddle.jit.to_static` trace models into programs of the earlier format in the block.

    Afterwards everything is restored, also after an exception. A nested block changes nothing more.
    The change affects the whole process, like Paddle's own switch of formats: another thread that
    enters waits until this one has left. Threads that compute in eager mode use Paddle's own
    functions, because a replacement calls these unless a program is traced. But, as with any
    tracing in Paddle, no other thread may compute while a model is traced.
    """
    global _depth
    with _tracing:
        if _depth:
            yield
            return
        changed: list[tuple[Any, str, object]] = []
        with find_private("DygraphOldIrGuard")():
            _depth += 1
            try:
                _put_in(changed)
                yield
            finally:
                _depth -= 1
                for holder, name, value in reversed(changed):
                    setattr(holder, name, value)


def _put_in(changed: list[tuple[Any, str, object]]) -> None:
    """Install the replacements, and store each holder, name and earlier value in `changed`."""

    def change(holder: Any, name: str, value: object) -> None:
        changed.append((holder, name, vars(holder)[name]))
        setattr(holder, name, value)

    table: dict[int, object] = {}  # by identity: `from paddle import matmul` is found too
    for path, stand_in in STAND_INS.items():
        *_, name = path.split(".")
        for holder in (paddle, paddle.tensor, _C_OPS):
            original = functools.reduce(
                lambda x, key: getattr(x, key, None), path.split("."), holder
            )
            if original is not None:
                table[id(original)] = _with_original(original, stand_in)
        method = vars(Variable).get(name)
        if callable(method):  # `Variable.shape` is a property
            change(Variable, name, _with_original(method, stand_in))
    for module in list(sys.modules.values()):
        # Code in eager mode calls the functions in C++.
        if isinstance(module, ModuleType) and module is not _C_OPS:
            for name, value in list(vars(module).items()):
                if id(value) in table:
                    change(module, name, table[id(value)])
    for name in _ARITHMETIC:
        change(Variable, name, _with_promotion(vars(Variable)[name]))
    change(Variable, "__invert__", _with_original(vars(Variable)["__invert__"], _bitwise_not))
    nms = _C_OPS.multiclass_nms3
    change(_C_OPS, "multiclass_nms3", _with_original(nms, _multiclass_nms))


# Other names of the arguments in Paddle 3.2.
_ALIASES = {"input": "x", "other": "y", "dim": "axis"}


def _with_original(original: Any, stand_in: Callable) -> Callable:
    """Make a function that calls `stand_in` while a program is traced, and `original` otherwise or
    if the result is NotImplemented."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        if in_earlier_format():
            known = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
            found = stand_in(*args, **known)
            if found is not NotImplemented:
                return found
        return original(*args, **kwargs)

    # Paddle does not look into functions of its own modules for branches that depend on tensors.
    choose.__module__ = "paddle.tensor.math"
    return choose


def _with_promotion(original: Callable) -> Callable:
    """Make an operator of `Variable` that accepts whole numbers together with floats, like Paddle's
    tensors and unlike the earlier format."""

    def combine(x: Tensor, y: object) -> object:
        if in_earlier_format():
            x, y = _promoted(x, y)
        return original(x, y)

    combine.__module__ = "paddle.tensor.math"
    return combine


_ARITHMETIC = (
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__rtruediv__",
    "__div__",
    "__rdiv__",
)


def _promoted(x: Any, y: Any) -> tuple[Any, Any]:
    if isinstance(x, Variable) and isinstance(y, Variable):
        fractions = paddle.is_floating_point(x), paddle.is_floating_point(y)
        if fractions == (True, False):
            return x, y.astype(x.dtype)
        if fractions == (False, True):
            return x.astype(y.dtype), y
    return x, y


# -- what Paddle moved to C++ ----------------------------------------------------------------------


def _unary(kind: str, dtype: str | None = None) -> Callable[..., Tensor]:
    return lambda x, name=None, out=None: append_operator(kind, {"X": x}, dtype)


def _binary(kind: str, dtype: str | None = None) -> Callable[..., Tensor]:
    def combine(x: Tensor, y: Any, name: str | None = None, out: None = None) -> Tensor:
        if not isinstance(y, Tensor | Variable):
            y = paddle.full([1], y, x.dtype)
        x, y = _promoted(x, y)
        return append_operator(kind, {"X": x, "Y": y}, dtype, axis=-1)

    return combine


def _reduction(kind: str, dtype: str | None = None) -> Callable[..., Tensor]:
    def reduce(
        x: Tensor,
        axis: int | Sequence[int] | None = None,
        keepdim: bool = False,
        name: str | None = None,
        out: None = None,
    ) -> Tensor:
        everything = axis is None or axis == []
        axes = [0] if everything else _as_list(axis)
        return append_operator(
            kind, {"X": x}, dtype, dim=axes, keep_dim=keepdim, reduce_all=everything
        )

    return reduce


def _sum(
    x: Tensor,
    axis: int | Sequence[int] | None = None,
    dtype: str | paddle.dtype | None = None,
    keepdim: bool = False,
    name: str | None = None,
    out: None = None,
) -> Tensor:
    if dtype is not None:
        x = paddle.cast(x, dtype)
    return _reduction("reduce_sum")(x, axis, keepdim)


def _argmax(
    x: Tensor,
    axis: int | None = None,
    keepdim: bool = False,
    dtype: str | paddle.dtype = "int64",
    name: str | None = None,
) -> Tensor:
    flat = axis is None
    whole = append_operator(
        "arg_max", {"X": x}, "int64", axis=0 if flat else axis, keepdims=keepdim, flatten=flat
    )
    return whole if str(dtype).endswith("int64") else paddle.cast(whole, dtype)


def _gelu(x: Tensor, approximate: bool | str = False, name: str | None = None) -> Tensor:
    return append_operator("gelu", {"X": x}, approximate=approximate in (True, "tanh"))


def _softplus(
    x: Tensor, beta: float = 1.0, threshold: float = 20.0, name: str | None = None
) -> Tensor:
    return append_operator("softplus", {"X": x}, beta=float(beta), threshold=float(threshold))


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: bool = False,
    transpose_y: bool = False,
    name: str | None = None,
    out: None = None,
) -> Tensor:
    return append_operator("matmul_v2", {"X": x, "Y": y}, trans_x=transpose_x, trans_y=transpose_y)


def _bmm(x: Tensor, y: Tensor, name: str | None = None, out: None = None) -> Tensor:
    return _matmul(x, y)


def _roll(x: Tensor, shifts: Any, axis: Any = None, name: str | None = None) -> Tensor:
    axes = [] if axis is None else _as_list(axis)
    return append_operator("roll", {"X": x}, shifts=_as_list(shifts), axis=axes)


def _expand_as(x: Tensor, y: Tensor, name: str | None = None) -> Tensor:
    return append_operator("expand_as_v2", {"X": x, "Y": y}, target_shape=list(y.shape))


def _triangle(lower: bool) -> Callable[..., Tensor]:
    def cut(x: Tensor, diagonal: int = 0, name: str | None = None, out: None = None) -> Tensor:
        return append_operator("tril_triu", {"X": x}, diagonal=diagonal, lower=lower)

    return cut


def _logsumexp(
    x: Tensor, axis: Any = None, keepdim: bool = False, name: str | None = None, out: None = None
) -> Tensor:
    largest = paddle.amax(x, axis, True)
    total = paddle.log(paddle.sum(paddle.exp(x - largest), axis=axis, keepdim=True)) + largest
    return total if keepdim else paddle.squeeze(total, axis)


def _sign(x: Tensor, name: str | None = None, out: None = None) -> Tensor:
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def _isnan(x: Tensor, name: str | None = None) -> Tensor:
    return x != x


def _isfinite(x: Tensor, name: str | None = None) -> Tensor:
    nothing = x - x  # NaN if x is not finite
    return nothing == nothing


def _isinf(x: Tensor, name: str | None = None) -> Tensor:
    return paddle.logical_and(x == x, paddle.logical_not(_isfinite(x)))


def _multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    counts: Tensor | None,
    score_threshold: float,
    nms_top_k: int,
    keep_top_k: int,
    nms_threshold: float,
    normalized: bool,
    nms_eta: float,
    background_label: int,
) -> tuple[Tensor, Tensor, Tensor]:
    helper = find_private("LayerHelper")("multiclass_nms3")
    types = {"Out": boxes.dtype, "Index": "int32", "NmsRoisNum": "int32"}
    outputs = {
        slot: helper.create_variable_for_type_inference(dtype=dtype)
        for slot, dtype in types.items()
    }
    inputs = {"BBoxes": boxes, "Scores": scores}
    if counts is not None:
        inputs["RoisNum"] = counts
    attributes = {
        "score_threshold": float(score_threshold),
        "nms_top_k": int(nms_top_k),
        "keep_top_k": int(keep_top_k),
        "nms_threshold": float(nms_threshold),
        "normalized": bool(normalized),
        "nms_eta": float(nms_eta),
        "background_label": int(background_label),
    }
    helper.append_op(type="multiclass_nms3", inputs=inputs, outputs=outputs, attrs=attributes)
    return outputs["Out"], outputs["Index"], outputs["NmsRoisNum"]


# -- what OpenVINO computes wrongly ----------------------------------------------------------------


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    padding_algorithm: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One with a single column of outputs takes every column, and keeps the first.

    OpenVINO 2025.0 takes wrong rows for a convolution of one channel per group whose stride is 1
    from row to row and larger from column to column, if its output has one column.
    """
    strides = [stride] * 2 if isinstance(stride, int) else list(stride)
    channels_first = kwargs.get("data_format", "NCHW") == "NCHW"
    flat = len(x.shape) == 4 and channels_first and padding_algorithm == "EXPLICIT"
    if not flat or weight.shape[1] != 1 or strides[0] != 1 or strides[1] == 1:
        return NotImplemented
    every = find_private("_conv_nd")(
        x, weight, bias, [1, 1], padding, padding_algorithm, *args, **kwargs
    )  # [B, C, H', columns]
    if not 0 < every.shape[3] <= strides[1]:
        return NotImplemented
    return paddle.slice(every, [3], [0], [1])


# -- what OpenVINO lacks ---------------------------------------------------------------------------


def _constant_of(value: int | list[int], name: str) -> Any:
    """Return an attribute of the constant that represents numbers, such as `reshape`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(paddle.to_tensor(value, "int32"), name)


class _Size(int):
    """A number instead of a tensor `[]` with one size. Numbers computed from it have this type
    too."""

    def astype(self, dtype: Any) -> Any:
        return self if "int" in str(dtype) else paddle.full([], int(self), dtype)

    def __getattr__(self, name: str) -> Any:
        return _constant_of(int(self), name)


def _keeping(name: str) -> Callable[[int, Any], Any]:
    of_numbers = getattr(int, name)

    def combine(self: int, other: Any) -> Any:
        found = of_numbers(self, other)
        return _Size(found) if type(found) is int else found

    return combine


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod"):
    setattr(_Size, f"__{_name}__", _keeping(f"__{_name}__"))


class _Sizes(list):
    """Numbers instead of the tensor of `paddle.shape`: arithmetic is per entry, and methods of a
    tensor give a constant."""

    def astype(self, dtype: Any) -> Any:
        return self if "int" in str(dtype) else paddle.to_tensor(list(self), dtype)

    def __getattr__(self, name: str) -> Any:
        return _constant_of([int(n) for n in self], name)

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return _Sizes(found) if isinstance(place, slice) else found

    def _combine(self, other: Any, function: Callable[[int, int], int]) -> "_Sizes":
        others = other if isinstance(other, list | tuple) else [other] * len(self)
        return _Sizes(function(a, b) for a, b in zip(self, others, strict=True))

    def __mul__(self, other: Any) -> "_Sizes":
        return self._combine(other, lambda a, b: a * b)

    def __add__(self, other: Any) -> "_Sizes":
        return self._combine(other, lambda a, b: a + b)

    def __floordiv__(self, other: Any) -> "_Sizes":
        return self._combine(other, lambda a, b: a // b)

    __rmul__, __radd__ = __mul__, __add__


def _shape(x: Tensor, name: str | None = None) -> Any:
    """Return numbers if they are known: loops over a tensor become loops of Python."""
    sizes = list(x.shape)
    return _Sizes(map(_Size, sizes)) if all(n >= 0 for n in sizes) else NotImplemented


def _numel(x: Tensor, name: str | None = None) -> Any:
    if any(n < 0 for n in x.shape):
        return NotImplemented
    return paddle.full([], math.prod(x.shape), "int64")


def _abs(x: Tensor, name: str | None = None) -> Tensor:
    return paddle.maximum(x, -x)


def _log_of(base: float) -> Callable[..., Tensor]:
    return lambda x, name=None: paddle.log(x) * (1.0 / math.log(base))


def _unbind(x: Tensor, axis: int = 0) -> Any:
    if x.shape[axis] < 0:
        return NotImplemented
    axis = axis % len(x.shape)
    parts = [paddle.slice(x, [axis], [i], [i + 1]) for i in range(x.shape[axis])]
    return [paddle.squeeze(part, axis) for part in parts]


def _argsort(
    x: Tensor,
    axis: int = -1,
    descending: bool = False,
    stable: bool = False,
    name: str | None = None,
) -> Any:
    return _sorted(x, axis, descending, 1)


def _sort(
    x: Tensor,
    axis: int = -1,
    descending: bool = False,
    stable: bool = False,
    name: str | None = None,
) -> Any:
    return _sorted(x, axis, descending, 0)


def _sorted(x: Tensor, axis: int, descending: bool, place: int) -> Any:
    if x.shape[axis] < 0:
        return NotImplemented
    return paddle.topk(x, x.shape[axis], axis=axis, largest=descending)[place]


def _var(
    x: Tensor,
    axis: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    name: str | None = None,
    correction: float = 1,
    out: None = None,
) -> Any:
    axes = list(range(len(x.shape))) if axis is None or axis == [] else _as_list(axis)
    sizes = [x.shape[i] for i in axes]
    if any(n < 0 for n in sizes):
        return NotImplemented
    if unbiased is not None:
        correction = int(unbiased)
    centred = x - paddle.mean(x, axes, True)
    total = paddle.sum(centred * centred, axes, keepdim=keepdim)
    return total * (1.0 / (math.prod(sizes) - correction))


def _std(
    x: Tensor,
    axis: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    name: str | None = None,
) -> Any:
    variance = _var(x, axis, unbiased, keepdim)
    return variance if variance is NotImplemented else paddle.sqrt(variance)


def _einsum(equation: str, *operands: Tensor) -> Any:
    """Einsum of two tensors without repeated letters: `"bnd,bmd->bnm"`."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    unlike = all(len(set(term)) == len(term) for term in (*letters, result))
    if not arrow or len(letters) != 2 or "." in equation or not unlike:
        return NotImplemented
    a, b = letters
    x, y = operands
    lone = [c for c in a + b if left.count(c) == 1 and c not in result]
    size = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}
    if lone or sum(n < 0 for n in size.values()):
        return NotImplemented
    batch = [c for c in a if c in b and c in result]
    shared = [c for c in a if c in b and c not in result]
    of_x, of_y = ([c for c in own if c not in other] for own, other in ((a, b), (b, a)))
    sizes = lambda term: [size[c] for c in term]  # noqa: E731
    count = lambda term: math.prod(sizes(term))  # noqa: E731
    x = paddle.transpose(x, [a.index(c) for c in batch + of_x + shared])
    y = paddle.transpose(y, [b.index(c) for c in batch + shared + of_y])
    x = paddle.reshape(x, [*sizes(batch), count(of_x), count(shared)])
    y = paddle.reshape(y, [*sizes(batch), count(shared), count(of_y)])
    found = batch + of_x + of_y
    z = paddle.reshape(_matmul(x, y), sizes(found))
    return paddle.transpose(z, [found.index(c) for c in result])


def _diag(x: Tensor, offset: int = 0, padding_value: float = 0, name: str | None = None) -> Any:
    if len(x.shape) != 1 or x.shape[0] < 0 or offset:
        return NotImplemented
    n = x.shape[0]
    # OpenVINO reads no constants of bool.
    inside = paddle.assign(np.eye(n, dtype="float32")) > 0.5
    rows = paddle.expand(paddle.unsqueeze(x, 1), [n, n])
    return paddle.where(inside, rows, paddle.full([n, n], padding_value, x.dtype))


def _bitwise_not(x: Tensor, out: None = None, name: str | None = None) -> Any:
    return paddle.logical_not(x) if x.dtype == paddle.bool else NotImplemented


def _prelu(x: Tensor, weight: Tensor, data_format: str = "NCHW", name: str | None = None) -> Any:
    if not data_format.startswith("NC"):
        return NotImplemented
    if weight.shape[0] != 1:
        weight = paddle.reshape(weight, [1, -1] + [1] * (len(x.shape) - 2))
    return F.relu(x) - weight * F.relu(-x)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.9,
    eps: float = 1e-5,
    data_format: str = "NCHW",
    name: str | None = None,
) -> Any:
    if not data_format.startswith("NC"):
        return NotImplemented
    axes = list(range(2, len(x.shape)))
    centred = x - paddle.mean(x, axes, True)
    y = centred * paddle.rsqrt(paddle.mean(centred * centred, axes, True) + eps)
    shape = [1, -1] + [1] * len(axes)
    if weight is not None:
        y = y * paddle.reshape(weight, shape)
    return y if bias is None else y + paddle.reshape(bias, shape)


def _log_softmax(x: Tensor, axis: int = -1, dtype: Any = None, name: str | None = None) -> Tensor:
    if dtype is not None:
        x = x.astype(dtype)
    return x - _logsumexp(x, axis, True)


def _pixel_shuffle(
    x: Tensor, upscale_factor: int, data_format: str = "NCHW", name: str | None = None
) -> Any:
    _, channels, height, width = x.shape
    if data_format != "NCHW" or height < 0 or width < 0:
        return NotImplemented
    r = upscale_factor
    channels //= r * r
    x = paddle.reshape(x, [-1, channels, r, r, height, width])
    x = paddle.transpose(x, [0, 1, 4, 2, 5, 3])  # [B, C, H, r, W, r]
    return paddle.reshape(x, [-1, channels, height * r, width * r])


def _channel_shuffle(
    x: Tensor, groups: int, data_format: str = "NCHW", name: str | None = None
) -> Any:
    _, channels, height, width = x.shape
    if data_format != "NCHW" or height < 0 or width < 0:
        return NotImplemented
    x = paddle.reshape(x, [-1, groups, channels // groups, height, width])
    x = paddle.transpose(x, [0, 2, 1, 3, 4])
    return paddle.reshape(x, [-1, channels, height, width])


def _unfold(
    x: Tensor,
    kernel_sizes: Any,
    strides: Any = 1,
    paddings: Any = 0,
    dilations: Any = 1,
    name: str | None = None,
) -> Tensor:
    """Unfold by a depthwise convolution that selects each place of the window."""
    kernel = [kernel_sizes] * 2 if isinstance(kernel_sizes, int) else list(kernel_sizes)
    channels, places = x.shape[1], math.prod(kernel)
    picks = np.eye(places, dtype="float32").reshape(places, 1, *kernel)
    weight = paddle.assign(np.tile(picks, (channels, 1, 1, 1)))
    if isinstance(paddings, list | tuple) and len(paddings) == 4:
        top, left, bottom, right = paddings
        paddings = [top, bottom, left, right]
    found = F.conv2d(x, weight, None, strides, paddings, dilations, channels)
    return paddle.flatten(found, 2)


def _selu(
    x: Tensor,
    scale: float = 1.0507009873554804934193349852946,
    alpha: float = 1.6732632423543772848170429916717,
    name: str | None = None,
) -> Tensor:
    return F.elu(x, alpha) * scale


def _masked_fill(x: Tensor, mask: Tensor, value: Any, name: str | None = None) -> Tensor:
    if not isinstance(value, Variable):
        value = paddle.full([1], value, x.dtype)
    return paddle.where(mask, value.astype(x.dtype), x)


# Paddle's functions, by name below `paddle`, and their replacements. Functions without a dot are
# also methods of tensors.
STAND_INS: dict[str, Callable[..., Any]] = {
    # Moved to C++. The operator has the same or another name in the earlier format.
    "matmul": _matmul,
    "bmm": _bmm,
    "multiply": _binary("elementwise_mul"),
    "maximum": _binary("elementwise_max"),
    "minimum": _binary("elementwise_min"),
    "greater_than": _binary("greater_than", "bool"),
    "logical_and": _binary("logical_and", "bool"),
    "logical_or": _binary("logical_or", "bool"),
    "logical_xor": _binary("logical_xor", "bool"),
    "logical_not": _unary("logical_not", "bool"),
    "amax": _reduction("reduce_max"),
    "amin": _reduction("reduce_min"),
    "all": _reduction("reduce_all", "bool"),
    "any": _reduction("reduce_any", "bool"),
    "cos": _unary("cos"),
    "floor": _unary("floor"),
    "log": _unary("log"),
    "rsqrt": _unary("rsqrt"),
    "sigmoid": _unary("sigmoid"),
    "sin": _unary("sin"),
    "sqrt": _unary("sqrt"),
    "expand_as": _expand_as,
    "roll": _roll,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
    # Also moved, and OpenVINO lacks the operator.
    "isfinite": _isfinite,
    "isinf": _isinf,
    "isnan": _isnan,
    "logsumexp": _logsumexp,
    "sign": _sign,
    # OpenVINO lacks the operator.
    "abs": _abs,
    "argsort": _argsort,
    "bitwise_not": _bitwise_not,
    "diag": _diag,
    "einsum": _einsum,
    "log10": _log_of(10),
    "log1p": lambda x, name=None: paddle.log(x + 1.0),
    "log2": _log_of(2),
    "masked_fill": _masked_fill,
    "numel": _numel,
    "reciprocal": lambda x, name=None: 1.0 / x,
    "shape": _shape,
    "sort": _sort,
    "square": lambda x, name=None: x * x,
    "std": _std,
    "tan": lambda x, name=None: paddle.sin(x) / paddle.cos(x),
    "unbind": _unbind,
    "var": _var,
    "nn.functional.celu": lambda x, alpha=1.0, name=None: F.elu(x * (1.0 / alpha), 1.0) * alpha,
    "nn.functional.channel_shuffle": _channel_shuffle,
    "nn.functional.hardtanh": lambda x, min=-1.0, max=1.0, name=None: paddle.clip(x, min, max),
    "nn.functional.instance_norm": _instance_norm,
    "nn.functional.log_sigmoid": lambda x, name=None: -F.softplus(-x),
    "nn.functional.log_softmax": _log_softmax,
    "nn.functional.mish": lambda x, name=None: x * F.tanh(F.softplus(x)),
    "nn.functional.pixel_shuffle": _pixel_shuffle,
    "nn.functional.prelu": _prelu,
    "nn.functional.selu": _selu,
    "nn.functional.softsign": lambda x, name=None: x / (paddle.abs(x) + 1.0),
    "nn.functional.unfold": _unfold,
    # OpenVINO computes it wrongly.
    "nn.functional.conv._conv_nd": _convolution,
}

# Functions that Paddle 3.3 also moved to C++. Earlier versions add their own operators to a
# program.
if tuple(map(int, paddle.__version__.split(".")[:2])) >= (3, 3):
    STAND_INS |= {
        "argmax": _argmax,
        "ceil": _unary("ceil"),
        "exp": _unary("exp"),
        "round": _unary("round"),
        "sum": _sum,
        "tanh": _unary("tanh"),
        "nn.functional.gelu": _gelu,
        "nn.functional.softplus": _softplus,
        "nn.functional.tanh": _unary("tanh"),
    }
