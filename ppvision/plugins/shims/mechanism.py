"""Repairs for code written before Paddle had 0-D tensors and strict type promotion.

PaddleSeg 2.8 and PaddleDetection 2.6 fail in some places on Paddle 3, mostly for one of these
reasons:

    mask * coef                a tensor meets one of another type                    TypeError
    paddle.concat(scalars)     0-D tensors are concatenated                          ValueError
    losses[0].numpy()[0]       a 0-D array or tensor is indexed                      IndexError
    F.one_hot(label * mask)    class numbers arrive as floats, once the first is repaired

A shim is applied only if its probe finds the fault: the probe runs the faulty function once on a
tiny input. `remove` undoes it. There are three kinds:

    Replacement    one function of a module or class makes way for another one
    Shim           one function gets new code in which exactly these operations go through
                   `Operations`: for long functions that fail in one line in the middle
    ConcatShim     the modules of a package find `Operations.concat` as `paddle.concat`
"""

import ast
import functools
import importlib
import inspect
import linecache
import operator
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.errors import EngineError
from ppvision.forms.paddle_private import find_private

# Errors of a probe that show the fault. Other errors are not hidden.
FAULTS = (TypeError, ValueError, IndexError)

# A tensor, in eager mode or in a graph that is traced for export.
_TENSOR = (Tensor, find_private("Value"))


def _rank(x: Tensor) -> int:
    """Return 0 for bool, 1 for integers, 2 for floats, 3 for complex numbers."""
    if x.dtype == paddle.bool:
        return 0
    return 3 if paddle.is_complex(x) else 2 if paddle.is_floating_point(x) else 1


class Operations:
    """The operations with the meaning of the old code; each is Paddle's own if Paddle allows it."""

    @staticmethod
    def arithmetic(name: str, left: object, right: object) -> object:
        """Compute `left (+ - * /) right`; bool becomes integer, integer becomes float, as in NumPy.

        `name` is the name of the function in `operator`.

        Paddle 2 converted the right operand to the type of the left one. In `RelaxBoundaryLoss`
        this cut logarithms to whole numbers; we do not repeat this.
        """
        if isinstance(left, _TENSOR) and isinstance(right, _TENSOR):
            if _rank(left) < _rank(right):
                left = left.astype(right.dtype)
            elif _rank(right) < _rank(left):
                right = right.astype(left.dtype)
            elif _rank(left) == 1 and left.dtype != right.dtype:
                left, right = left.astype("int64"), right.astype("int64")
        return getattr(operator, name)(left, right)

    @staticmethod
    def concat(x: Iterable[Tensor], axis: int = 0, **options: object) -> Tensor:
        """Compute `paddle.concat`; 0-D tensors count as 1-D, integers of two sizes become int64."""
        x = [item.reshape([1]) if item.ndim == 0 else item for item in x]
        if {item.dtype for item in x} == {paddle.int32, paddle.int64}:
            x = [item.astype("int64") for item in x]
        return paddle.concat(x, axis, **options)

    @staticmethod
    def first(x: object) -> object:
        """Compute `x[0]`; a 0-D tensor or array is its own first element."""
        if isinstance(x, (*_TENSOR, np.ndarray)) and x.ndim == 0:
            return x
        return x[0]

    @staticmethod
    def one_hot(x: Tensor, *args: object, **options: object) -> Tensor:
        """Compute `F.one_hot`; whole numbers in float type count as class numbers."""
        return F.one_hot(x.astype("int64"), *args, **options)


_OPERATIONS = "_ppvision_operations"  # the name under which repaired code finds `Operations`
_OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv"}


class _Rewriter(ast.NodeTransformer):
    """Redirects the faulty kinds of operation of a function to `Operations`."""

    def __init__(self) -> None:
        self.count = 0

    def _call(self, name: str, node: ast.AST, args: list, keywords: list | None = None) -> ast.Call:
        self.count += 1
        function = ast.Attribute(ast.Name(_OPERATIONS, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(function, args, keywords or []), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = _OPERATORS.get(type(node.op))
        if name is None:
            return node
        return self._call("arithmetic", node, [ast.Constant(name), node.left, node.right])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called in ("paddle.concat", "F.one_hot"):
            return self._call(called.split(".")[-1], node, node.args, node.keywords)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        index = node.slice
        if isinstance(node.ctx, ast.Load) and isinstance(index, ast.Constant) and index.value == 0:
            return self._call("first", node, [node.value])
        return node


def repair_code(function: FunctionType) -> CodeType:
    """Return the code of `function` with its faulty kinds of operation redirected to `Operations`.

    Raises:
        RuntimeError: its source is not available, or contains none of the operations.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise EngineError(
            f"{function.__module__}.{function.__qualname__} needs a repair on this Paddle, but its "
            "source is not installed. Install the package with its .py files."
        ) from error
    tree = ast.parse(source)
    tree.body[0].decorator_list = []
    rewriter = _Rewriter()
    repaired = ast.unparse(ast.fix_missing_locations(rewriter.visit(tree)))
    if not rewriter.count or function.__code__.co_freevars:
        raise EngineError(
            f"{function.__module__}.{function.__qualname__} fails on this Paddle in a way that its "
            "shim does not cover. Please report the versions that `ppvision doctor` prints."
        )
    # Tracebacks, and to_static in an export, find the repaired source under this name.
    name = f"<{function.__module__}.{function.__qualname__}, repaired by ppvision>"
    linecache.cache[name] = (len(repaired), None, repaired.splitlines(keepends=True), name)
    module = compile(repaired, name, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    return code.replace(co_qualname=function.__code__.co_qualname)


@dataclass(frozen=True)
class Fault:
    """The reason for a shim, and until when it is needed.

    Attributes:
        place: `file:line` in the installed package.
        code: the code of that line.
        reason: why it fails.
        versions: versions with the fault, as far as we tried.
        until: when the shim can be removed.
    """

    place: str
    code: str
    reason: str
    versions: str
    until: str


@dataclass(frozen=True)
class Shim:
    """One repair.

    Attributes:
        target: `module:function` or `module:Class.method`.
        probe: runs the target on a tiny input, and raises one of `FAULTS` if the fault exists.
        fault: the upstream fault.
    """

    target: str
    probe: Callable[[], object]
    fault: Fault

    def function(self) -> FunctionType:
        """Return the function that the shim repairs."""
        module, _, name = self.target.partition(":")
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        return inspect.unwrap(found)

    def fault_present(self) -> bool:
        """Whether the target fails in its current state.

        The user does not notice this test: warnings of the target are not shown, and the state of
        the random numbers does not change.
        """
        random_state = paddle.get_rng_state()
        try:
            with warnings.catch_warnings(), paddle.no_grad():
                warnings.simplefilter("ignore")
                self.probe()
        except FAULTS:
            return True
        finally:
            paddle.set_rng_state(random_state)
        return False

    def put_in(self) -> Callable[[], None]:
        """Repair the target; return a function that undoes the repair."""
        function = self.function()
        code, before = repair_code(function), function.__code__
        function.__globals__[_OPERATIONS] = Operations
        function.__code__ = code
        return functools.partial(setattr, function, "__code__", before)


class _Paddle:
    """Paddle with another `concat`."""

    concat = staticmethod(Operations.concat)

    def __getattr__(self, name: str) -> object:
        return getattr(paddle, name)


@dataclass(frozen=True)
class ConcatShim(Shim):
    """Repairs `paddle.concat` of 0-D tensors in all modules of a package; `target` is its name."""

    def put_in(self) -> Callable[[], None]:
        modules = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith(f"{self.target}.") and getattr(module, "paddle", None) is paddle
        ]
        tolerant = _Paddle()
        for module in modules:
            module.paddle = tolerant

        def take_out() -> None:
            for module in modules:
                module.paddle = paddle

        return take_out


@dataclass(frozen=True)
class Replacement(Shim):
    """Replaces a function of a module, or a method of a class, by another one.

    Attributes:
        new: makes the new function from the old one.
    """

    new: Callable[[Callable], Callable]

    def put_in(self) -> Callable[[], None]:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        old = getattr(owner, name)
        setattr(owner, name, functools.wraps(old)(self.new(old)))
        return functools.partial(setattr, owner, name, old)


_in_force: dict[str, Callable[[], None]] = {}  # functions that undo the applied shims


def apply(shims: dict[str, Shim]) -> list[str]:
    """Apply the shims whose fault is present and return their names; a second call changes
    nothing."""
    applied = []
    for name, shim in shims.items():
        if name not in _in_force and shim.fault_present():
            _in_force[name] = shim.put_in()
            applied.append(name)
    return applied


def remove(shims: dict[str, Shim]) -> list[str]:
    """Undo the applied shims and return their names."""
    removed = [name for name in shims if name in _in_force]
    for name in reversed(removed):
        _in_force.pop(name)()
    return removed


def list_active_shims(shims: dict[str, Shim]) -> list[str]:
    """Return the names of the applied shims."""
    return [name for name in shims if name in _in_force]
