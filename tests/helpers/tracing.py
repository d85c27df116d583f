"""Paddle traces a model for an export; here without two things that it does over and over.

- It keeps what it has translated of Python by the bound method, an object of one call. So each
  export translates every `forward` of its model anew: a quarter of the export's time. The results
  differ in nothing but their globals and the object that they are bound to, which are those of each
  call here too.
- In the earlier format it reads the source files of the whole stack for a warning that names one
  line (`math_op_patch`): a sixth of the time. Here it reads no source.
"""

import inspect
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from paddle.base.layers import math_op_patch
from paddle.jit.dy2static.program_translator import FunctionCache


@contextmanager
def quick_tracing() -> Iterator[None]:
    """Translate each function once while the block runs."""
    known: dict[types.CodeType, types.FunctionType] = {}
    translate = FunctionCache._convert

    def convert(self: FunctionCache, function: types.FunctionType) -> types.FunctionType:
        function = inspect.unwrap(function)
        if function.__closure__ is not None:  # also of `super()`
            return translate(self, function)
        if function.__code__ not in known:
            known[function.__code__] = translate(self, function)
        # As the file does that Paddle writes the translation into, when it is run.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return _with_globals_of(function, known[function.__code__])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FunctionCache, "_convert", convert)
        without_source = types.SimpleNamespace(stack=lambda: inspect.stack(context=0)[1:])
        patch.setattr(math_op_patch, "inspect", without_source)
        yield


def _with_globals_of(
    function: types.FunctionType, translated: types.FunctionType
) -> types.FunctionType:
    """A copy of what a function was translated into, as Paddle makes it: with the function's
    globals of now."""
    own = {k: v for k, v in function.__globals__.items() if not k.startswith("__")}
    copy = types.FunctionType(
        translated.__code__,
        {**translated.__globals__, **own},
        translated.__name__,
        translated.__defaults__,
        translated.__closure__,
    )
    copy.__kwdefaults__ = translated.__kwdefaults__
    return copy
