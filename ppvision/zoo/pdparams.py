"""Read `.pdparams`, Paddle's files of weights, without pickle.

A `.pdparams` is a pickle: a program for a small stack machine that may call any function. Refusing
functions does not make Python's unpickler safe: NumPy's own array builders trust the sizes and
types in the file (162 bytes crash the process), and one memo index can allocate gigabytes. So this
module has its own machine. It knows the operations that `paddle.save` writes (protocols 2 to 4, and
5), calls no function, and builds each array itself after checking that type, shape and number of
bytes agree.

Formats: Lib/pickletools.py of CPython; `ndarray.__reduce__` and `dtype.__reduce__` of NumPy.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ppvision.errors import WeightsError, shorten

# Types of arrays by NumPy's code. Paddle stores bfloat16 as u2.
_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_MAX_AXES = 32
_MAX_SIDE = 1 << 40
# An operation of one byte can make an object of 64 bytes and an entry of the memo, 200 bytes
# in all. 300,000 of them are 60 MB; a model of 2,000 tensors takes 60,000.
_FREE_OPERATIONS = 300_000
_BYTES_PER_OPERATION = 128
_MAX_NAME = 100  # characters of a function's name; allowed functions have shorter names
_MAX_INTEGER = 16  # bytes


class _Mark:
    """The operation MARK on the stack."""


_MARK = _Mark()


@dataclass(frozen=True)
class _Function:
    """A function that a file may name."""

    name: str


@dataclass
class _Type:
    """A NumPy type: `dtype`'s arguments, then its state."""

    code: str
    order: str = "<"
    built: bool = False


@dataclass
class _EmptyArray:
    """The result of `_reconstruct`. After its state is read, `array` replaces it."""

    array: np.ndarray | None = None


_RECONSTRUCT, _SCALAR, _FROM_BUFFER = map(_Function, ("_reconstruct", "scalar", "_frombuffer"))
_NDARRAY, _DTYPE = _Function("ndarray"), _Function("dtype")
_ORDERED_DICT, _ENCODE = _Function("OrderedDict"), _Function("encode")
_TUPLE, _BYTES = _Function("tuple"), _Function("bytes")

_FUNCTIONS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("collections", "OrderedDict"): _ORDERED_DICT,
    ("_codecs", "encode"): _ENCODE,  # protocol 2 writes bytes in this way
}
# NumPy moved these from numpy.core to numpy._core; in Python 2 builtins was __builtin__.
for _package in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_package}.multiarray", "_reconstruct"] = _RECONSTRUCT
    _FUNCTIONS[f"{_package}.multiarray", "scalar"] = _SCALAR
    _FUNCTIONS[f"{_package}.numeric", "_frombuffer"] = _FROM_BUFFER
for _package in ("builtins", "__builtin__"):
    _FUNCTIONS[_package, "tuple"] = _TUPLE
    _FUNCTIONS[_package, "bytes"] = _BYTES


def _is(value: object, *expected: object) -> bool:
    """Whether a tuple holds these plain values. (`==` would compare arrays one by one.)"""
    return (
        isinstance(value, tuple)
        and len(value) == len(expected)
        and all(type(v) is type(e) and v == e for v, e in zip(value, expected, strict=True))
    )


def _require(fits: bool, expected: str, got: object) -> None:
    if not fits:
        raise WeightsError(
            f"expected {expected}, got {got if isinstance(got, str) else shorten(got)}. The file "
            "is damaged or was not written by paddle.save: fetch it again."
        )


def load_pdparams(data: bytes) -> object:
    """Read the content of a `.pdparams` file: arrays, numbers, text, bytes, None, and tuples, lists
    and dicts of them.

    Args:
        data: the content of the file. The result takes at most nine times its bytes, or 64 MiB.

    Raises:
        WeightsError: the file is incomplete, damaged, or has other content; the message does not
            name the file.
    """
    return _Machine(data).run()


class _Machine:
    """One pass over a file.

    Values are `Any`: `_require` checks them, which a type checker does not follow.

    Args:
        data: the content of the file.
    """

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.place = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.operations = _FREE_OPERATIONS + len(data) // _BYTES_PER_OPERATION
        # Number of bytes that may still be made: protocol 2 makes bytes from text, then an array
        # from them. So one part of the file cannot become many arrays.
        self.left = 2 * len(data)

    def run(self) -> object:
        while (code := self.take(1)[0]) != _STOP:
            operation: Any = _OPERATIONS.get(code)
            _require(operation is not None, "arrays and plain containers", f"operation {code}")
            self.spend_operations(1)
            operation(self)
        return self.pop()

    def spend_operations(self, count: int) -> None:
        self.operations -= count
        if self.operations < 0:
            raise WeightsError(
                "expected the operations of a file of weights, got far more of them. Do not use "
                "this file."
            )

    def spend_bytes(self, count: int) -> None:
        self.left -= count
        _require(self.left >= 0, "each array with bytes of its own", "bytes that many arrays share")

    # -- reading -----------------------------------------------------------------------------------

    def take(self, count: int) -> memoryview:
        _require(count <= len(self.data) - self.place, "a whole file", "one that is cut short")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str) -> int:
        """Read a number; `form` is its format for `struct`."""
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def text(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(
                f"expected text as UTF-8, got other bytes ({error.reason})."
            ) from error

    def line(self) -> str:
        for end in range(self.place, min(self.place + _MAX_NAME + 1, len(self.data))):
            if self.data[end] == 0x0A:
                text = self.text(end - self.place)
                self.place = end + 1
                return text
        raise WeightsError(f"expected a name of at most {_MAX_NAME} characters, got a longer one.")

    # -- the stack ---------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        _require(bool(self.stack), "a value", "none")
        value = self.stack.pop()
        _require(value is not _MARK, "a value", "a mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise WeightsError("expected a mark, got none. The file is damaged: fetch it again.")

    def pop_some(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def top(self, kind: type) -> Any:
        value = self.stack[-1] if self.stack else None
        _require(isinstance(value, kind), f"a {kind.__name__}", f"a {type(value).__name__}")
        return value

    # -- operations --------------------------------------------------------------------------------

    def protocol(self) -> None:
        found = self.take(1)[0]
        _require(found <= 5, "pickle protocol 2 to 5", found)

    def long(self) -> None:
        size = self.take(1)[0]
        _require(size <= _MAX_INTEGER, f"integers of at most {_MAX_INTEGER} bytes", size)
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def python2_text(self, form: str) -> None:
        """Read text of Python 2, which was bytes: `paddle.load` decodes it as latin-1."""
        self.push(str(self.take(self.number(form)), "latin-1"))

    def set_items(self, flat: list[Any]) -> None:
        content = self.top(dict)
        _require(len(flat) % 2 == 0, "keys with values", "a key without")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Keys of other types can be nested endlessly, or made to collide.
            _require(isinstance(key, str), "text as keys", f"a {type(key).__name__}")
            content[key] = value

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def put(self, index: int) -> None:
        _require(bool(self.stack), "a value to remember", "none")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        _require(index in self.memo, "a value that was remembered", f"number {index}")
        value = self.memo[index]
        filled = isinstance(value, _EmptyArray) and value.array is not None
        self.push(value.array if filled else value)

    def name(self, module: Any, name: Any) -> None:
        fits = isinstance(module, str) and isinstance(name, str)
        _require(fits, "a function by name", "another value")
        found = _FUNCTIONS.get((module, name))
        if found is None:
            raise WeightsError(
                f"expected arrays and plain containers only, found {shorten(f'{module}.{name}')}, "
                "which would run code. Do not use this file; ask its author for safetensors."
            )
        self.push(found)

    def reduce(self) -> None:
        """Call a function on its arguments."""
        function, arguments = self.pop_some(2)
        _require(isinstance(function, _Function), "a function", f"a {type(function).__name__}")
        _require(isinstance(arguments, tuple), "arguments", f"a {type(arguments).__name__}")
        make: Any
        make, expected = _MADE_BY.get(function, (None, ()))
        _require(make is not None, "a call", f"a call of {function.name}")
        fits = len(arguments) in expected
        _require(fits, f"arguments of {function.name}", f"{len(arguments)} of them")
        self.push(make(self, *arguments))

    def build(self) -> None:
        """Set the state of the object below it on the stack."""
        target, state = self.pop_some(2)
        if isinstance(target, _Type):
            self.build_type(target, state)
            self.push(target)
            return
        fits = isinstance(target, _EmptyArray) and target.array is None
        _require(fits, "an array or its type, once", f"a {type(target).__name__}")
        fits = isinstance(state, tuple) and len(state) == 5 and _is(state[:1], 1)
        _require(fits, "the state of an array", f"a {type(state).__name__}")
        _, shape, kind, fortran, content = state
        _require(type(fortran) in (bool, int), "an order", fortran)
        target.array = self.array(content, kind, shape, "F" if fortran else "C")
        self.push(target.array)

    # -- arrays ------------------------------------------------------------------------------------

    def make_type(self, code: Any, align: Any, copy: Any) -> _Type:
        fits = isinstance(code, str) and code in _TYPES
        _require(fits, "numbers", f"type {shorten(code)}")
        return _Type(code)

    @staticmethod
    def build_type(target: _Type, state: Any) -> None:
        fits = isinstance(state, tuple) and len(state) == 8 and not target.built
        # version, order, no fields, size and alignment from the code, no flags
        fits = fits and any(
            _is(state, 3, order, None, None, None, -1, -1, 0) for order in ("<", ">", "|")
        )
        _require(fits, "the state of a number's type", f"a {type(state).__name__}")
        target.order, target.built = state[1], True

    def make_array(self, kind: Any, shape: Any, code: Any) -> _EmptyArray:
        fits = kind is _NDARRAY and _is(shape, 0)
        _require(fits, "an array that its state fills", "another")
        return _EmptyArray()

    def from_buffer(self, content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        fits = isinstance(order, str) and order in ("C", "F")
        _require(fits, "order C or F", order)
        return self.array(content, kind, shape, order)

    def scalar(self, kind: Any, content: Any) -> np.ndarray:
        return self.array(content, kind, (), "C")

    def array(self, content: Any, kind: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
        """Make a separate array in this machine's byte order."""
        _require(isinstance(kind, _Type), "a type of numbers", f"a {type(kind).__name__}")
        # Python 2 wrote numbers as text.
        if isinstance(content, str):
            content = self.encode(content, "latin1")
        _require(isinstance(content, memoryview), "bytes", f"a {type(content).__name__}")
        fits = isinstance(shape, tuple) and len(shape) <= _MAX_AXES
        fits = fits and all(type(n) is int and 0 <= n < _MAX_SIDE for n in shape)
        _require(fits, "a shape", shape)
        dtype = np.dtype(f"{kind.order}{kind.code}")
        # Also for an empty array: NumPy refuses a shape whose other axes are beyond 2^63.
        fits = math.prod(n for n in shape if n) * dtype.itemsize < 1 << 62
        needed = math.prod(shape) * dtype.itemsize
        fits = fits and needed == len(content)
        _require(fits, f"{needed} bytes for {shorten(shape)} of {dtype}", f"{len(content)} bytes")
        self.spend_bytes(needed)
        flat = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
        return flat.reshape(shape, order=order)

    # -- the other functions -----------------------------------------------------------------------

    def encode(self, text: Any, encoding: Any) -> memoryview:
        fits = isinstance(text, str) and isinstance(encoding, str) and encoding == "latin1"
        _require(fits, "bytes written as latin1 text", f"a {type(text).__name__}")
        self.spend_bytes(len(text))
        try:
            return memoryview(text.encode("latin1"))
        except UnicodeEncodeError as error:
            raise WeightsError("expected bytes written as latin1 text, got other text.") from error

    def make_tuple(self, content: Any) -> tuple:
        _require(isinstance(content, tuple), "a tuple", f"a {type(content).__name__}")
        return content

    def make_bytes(self) -> memoryview:
        """Make empty bytes, as protocol 2 writes them."""
        return memoryview(b"")

    def make_dict(self, pairs: Any = ()) -> dict:
        """Make a dict of nothing, or (Python 2) of a list of pairs."""
        fits = isinstance(pairs, (list, tuple))
        fits = fits and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
        _require(fits, "pairs of key and value", f"a {type(pairs).__name__}")
        self.spend_operations(len(pairs))
        self.push({})
        self.set_items([item for pair in pairs for item in pair])
        return self.pop()


# Functions, with their builder and number of arguments.
_MADE_BY: dict[_Function, tuple[Callable, tuple[int, ...]]] = {
    _RECONSTRUCT: (_Machine.make_array, (3,)),
    _DTYPE: (_Machine.make_type, (3,)),
    _FROM_BUFFER: (_Machine.from_buffer, (4,)),
    _SCALAR: (_Machine.scalar, (2,)),
    _ENCODE: (_Machine.encode, (2,)),
    _TUPLE: (_Machine.make_tuple, (1,)),
    _BYTES: (_Machine.make_bytes, (0,)),
    _ORDERED_DICT: (_Machine.make_dict, (0, 1)),
}

_STOP = ord(".")
# Operations by their byte, named as in pickletools.
_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.protocol,  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: a hint for buffers
    ord("("): lambda m: m.push(_MARK),  # MARK
    ord("N"): lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    ord("K"): lambda m: m.push(m.number("<B")),  # BININT1
    ord("M"): lambda m: m.push(m.number("<H")),  # BININT2
    ord("J"): lambda m: m.push(m.number("<i")),  # BININT
    0x8A: _Machine.long,  # LONG1
    ord("G"): lambda m: m.push(m.number(">d")),  # BINFLOAT
    0x8C: lambda m: m.push(m.text(m.number("<B"))),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.push(m.text(m.number("<I"))),  # BINUNICODE
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),  # BINUNICODE8
    ord("U"): lambda m: m.python2_text("<B"),  # SHORT_BINSTRING
    ord("T"): lambda m: m.python2_text("<I"),  # BINSTRING
    ord("C"): lambda m: m.push(m.take(m.number("<B"))),  # SHORT_BINBYTES
    ord("B"): lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),  # BINBYTES8
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    ord(")"): lambda m: m.push(()),  # EMPTY_TUPLE
    0x85: lambda m: m.push(tuple(m.pop_some(1))),  # TUPLE1
    0x86: lambda m: m.push(tuple(m.pop_some(2))),  # TUPLE2
    0x87: lambda m: m.push(tuple(m.pop_some(3))),  # TUPLE3
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    ord("]"): lambda m: m.push([]),  # EMPTY_LIST
    ord("a"): lambda m: m.append([m.pop()]),  # APPEND
    ord("e"): lambda m: m.append(m.pop_to_mark()),  # APPENDS
    ord("}"): lambda m: m.push({}),  # EMPTY_DICT
    ord("s"): lambda m: m.set_items(m.pop_some(2)),  # SETITEM
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),  # SETITEMS
    ord("q"): lambda m: m.put(m.number("<B")),  # BINPUT
    ord("r"): lambda m: m.put(m.number("<I")),  # LONG_BINPUT
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    ord("h"): lambda m: m.get(m.number("<B")),  # BINGET
    ord("j"): lambda m: m.get(m.number("<I")),  # LONG_BINGET
    ord("c"): lambda m: m.name(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.name(*m.pop_some(2)),  # STACK_GLOBAL
    ord("R"): _Machine.reduce,  # REDUCE
    ord("b"): _Machine.build,  # BUILD
}
