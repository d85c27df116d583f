"""Tracing in Paddle's earlier program format (`model.pdmodel`), which OpenVINO reads."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import paddle
from paddle import Tensor
from paddle.base.layer_helper import LayerHelper
from paddle.pir_utils import DygraphOldIrGuard

# Tracing changes the whole process, so that one thread does it at a time.
_tracing = threading.RLock()
_depth = 0


def in_earlier_format() -> bool:
    """Whether operators are now put into a program of the earlier format: inside of
    `earlier_format`, while a model is traced and not run."""
    return _depth > 0 and not paddle.in_dynamic_mode()


def append_operator(
    kind: str,
    inputs: Mapping[str, Tensor],
    dtype: str | paddle.dtype | None = None,
    out: str = "Out",
    **attributes: object,
) -> Tensor:
    """Put an operator into the program that is traced (`in_earlier_format`).

    Args:
        kind: the operator, as the earlier format calls it ("matmul_v2").
        inputs: slot -> tensor.
        dtype: of the output. Default None: that of the first input.
        out: slot of the output.
        attributes: of the operator.

    Returns:
        The output; Paddle infers its shape.
    """
    helper = LayerHelper(kind)
    found = helper.create_variable_for_type_inference(
        dtype=dtype or next(iter(inputs.values())).dtype
    )
    helper.append_op(type=kind, inputs=dict(inputs), outputs={out: found}, attrs=attributes)
    return found


@contextmanager
def earlier_format() -> Iterator[None]:
    """Tracing gives a program in the format of before PIR."""
    global _depth
    with _tracing:
        # Paddle 3.2 moved these functions to C++, where they lost the earlier format.
        before = {name: getattr(paddle, name) for name in STAND_INS}
        with DygraphOldIrGuard():
            for name, function in STAND_INS.items():
                setattr(paddle, name, function)
            _depth += 1
            try:
                yield
            finally:
                _depth -= 1
                for name, function in before.items():
                    setattr(paddle, name, function)


def _matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: bool = False,
    transpose_y: bool = False,
    name: str | None = None,
) -> Tensor:
    return append_operator("matmul_v2", {"X": x, "Y": y}, trans_x=transpose_x, trans_y=transpose_y)


def _amax(x: Tensor, axis: int, keepdim: bool = False) -> Tensor:
    return append_operator("reduce_max", {"X": x}, dim=[axis], keep_dim=keepdim, reduce_all=False)


# Those of our layers' functions, and of PaddleSeg's OCRNet, that need one; OpenVINO knows these
# operators.
STAND_INS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "square": lambda x: x * x,
    "rsqrt": lambda x: append_operator("rsqrt", {"X": x}),
    "reciprocal": lambda x: 1.0 / x,
    "amax": _amax,
}
