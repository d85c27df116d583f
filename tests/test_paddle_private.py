"""`ppvision/forms/paddle_private.py`: a test that fails names what Paddle moved."""

import ast
import functools
import importlib.util
import inspect
import pkgutil
import re
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.io.dataloader.dataloader_iter import _DataLoaderIterMultiProcess as many_processes
from paddle.quantization import QAT, QuantConfig
from paddle.quantization.factory import QuanterFactory

import ppvision
from ppvision.errors import EngineError
from ppvision.forms import paddle_private as private
from ppvision.forms.earlier_format import append_operator, earlier_format

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ppvision"


def make_parallel(layer: nn.Layer) -> paddle.DataParallel:
    with warnings.catch_warnings():  # it is one process
        warnings.simplefilter("ignore")
        return paddle.DataParallel(layer)


# How to make an object of each class in `private.ATTRIBUTES`.
MADE = {
    "nn.Layer": nn.Layer,
    "nn.Conv2D": lambda: nn.Conv2D(2, 4, 3),
    "nn.BatchNorm2D": lambda: nn.BatchNorm2D(2),
    "nn.LayerNorm": lambda: nn.LayerNorm(2),
    "nn.GELU": nn.GELU,
    "DataParallel": lambda: make_parallel(nn.Linear(1, 1)),
    "optimizer.Optimizer": lambda: paddle.optimizer.SGD(parameters=nn.Linear(1, 1).parameters()),
    "quantization.QAT": lambda: QAT(QuantConfig(None, None)),
    "quantization.QuantConfig": lambda: QuantConfig(None, None),
    "quantization.factory.QuanterFactory": lambda: QuanterFactory,
    "io.dataloader.dataloader_iter._DataLoaderIterMultiProcess": lambda: many_processes,
}


@pytest.mark.parametrize("name", private.PLACES)
def test_paddle_has_it(name):
    try:
        assert private.find_private(name) is not None
    except EngineError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("kind", private.ATTRIBUTES)
def test_paddles_objects_have_their_attributes(kind):
    made = MADE[kind]()
    moved = [name for name in private.ATTRIBUTES[kind] if not hasattr(made, name)]
    assert not moved, f"paddle.{kind}: {', '.join(moved)} moved"


def is_installed(place: str) -> bool:
    return importlib.util.find_spec(place.split(".")[0]) is not None


@pytest.mark.parametrize("place", private.OVERRIDDEN)
def test_libraries_call_the_methods_that_ours_override(place):
    module, _, name = place.partition(":")
    if not is_installed(place):
        pytest.skip(f"{module} is not installed")
    found = importlib.import_module(module)
    source = inspect.getsource(found)
    for method in private.OVERRIDDEN[place]:
        assert method in vars(getattr(found, name)), f"{place}.{method} moved"
        assert f"self.{method}(" in source, f"{place}.{method} is never called"


def test_a_part_that_moved_is_named(monkeypatch):
    moved = ("paddle.no_module:thing", "paddle.nn:no_thing")
    monkeypatch.setitem(private.PLACES, "thing", moved)
    with pytest.raises(EngineError, match=r"paddle\.no_module\.thing"):
        private.find_private("thing")


def test_a_later_place_counts(monkeypatch):
    places = ("paddle.no_module:Linear", "paddle.nn:Linear")
    monkeypatch.setitem(private.PLACES, "at two places", places)
    assert private.find_private("at two places") is nn.Linear


# -- what each function does -----------------------------------------------------------------------


def test_parameters_are_written_and_read(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.int64([4, 5])}
    private.write_parameters(
        tmp_path / "p", {name: paddle.to_tensor(array) for name, array in arrays.items()}
    )
    found = {name: paddle.zeros([1]) for name in arrays}
    private.read_parameters(tmp_path / "p", found)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)


def test_tracing_notes_what_the_tables_hold():
    before = [len(table) for table in private.trace_tables()]
    layer = paddle.jit.to_static(
        nn.Linear(2, 2), input_spec=[paddle.static.InputSpec([1, 2])], full_graph=True
    )
    assert layer.forward.concrete_program is not None
    assert [len(table) for table in private.trace_tables()] == before  # forgotten when complete


def _noted_lines() -> list[int]:
    """How many lines Paddle notes for each operator of a graph that it traces."""
    layer = paddle.jit.to_static(
        nn.Linear(2, 2), input_spec=[paddle.static.InputSpec([1, 2])], full_graph=True
    )
    program = layer.forward.concrete_program.main_program
    return [len(op.callstack) for op in program.global_block().ops if op.callstack]


def test_operators_are_traced_with_one_line_of_their_stack():
    whole = traceback.extract_stack
    here = []
    other = threading.Thread(target=lambda: here.append(traceback.extract_stack()))
    with private.short_stacks():
        short = _noted_lines()
        other.start()
        other.join()
    assert traceback.extract_stack is whole
    assert short
    assert set(short) == {2}  # a place and its line of source
    assert len(here[0]) > 1  # another thread has its whole stack
    assert min(_noted_lines()) > 2
    with pytest.raises(RuntimeError), private.short_stacks():
        raise RuntimeError
    assert traceback.extract_stack is whole


def test_the_earlier_format_takes_operators_and_is_parsed(tmp_path):
    class Doubled(nn.Linear):
        def forward(self, x):
            x = x + self.bias
            return append_operator("scale", {"X": x}, scale=2.0, bias=0.0)

    with earlier_format():
        graph = paddle.jit.to_static(
            Doubled(2, 2), input_spec=[paddle.static.InputSpec([1, 2], name="x")], full_graph=True
        )
        paddle.jit.save(graph, str(tmp_path / "model"))
    program = private.parse_program((tmp_path / "model.pdmodel").read_bytes())
    scales = [op for op in program.blocks[0].ops if op.type == "scale"]
    factors = [a.f for op in scales for a in op.attrs if a.name == "scale"]
    assert 2.0 in factors


def test_boxes_are_selected():
    boxes = paddle.to_tensor([[[0.0, 0, 4, 4], [0, 0, 4, 5], [8, 8, 9, 9]]])
    scores = paddle.to_tensor([[[0.9, 0.8, 0.7]]])
    rows, places, counts = private.select_boxes(boxes, scores, None, 0.1, 3, 3, 0.5, True, 1.0, -1)
    np.testing.assert_allclose(rows[:, 1].numpy(), [0.9, 0.7])
    assert places.flatten().tolist() == [0, 2]
    assert counts.tolist() == [2]


def test_norms_and_values_are_paddles():
    assert isinstance(nn.BatchNorm2D(1), private.find_private("_BatchNormBase"))
    with paddle.static.program_guard(paddle.static.Program()):
        paddle.enable_static()
        try:
            value = paddle.static.data("x", [1])
        finally:
            paddle.disable_static()
    assert isinstance(value, private.find_private("Value"))


# -- nothing private of Paddle anywhere else -------------------------------------------------------

# Private attributes of other libraries; who uses them guards them.
OF_OTHERS = {
    "ppvision/forms/segformer.py": {"_batch_norm", "_conv", "_relu"},  # PaddleSeg's ConvBNReLU
    "ppvision/engine/dashboard.py": {"_get_file_writer"},  # VisualDL
    "ppvision/engine/vdl_records.py": {"_get_file_writer"},  # VisualDL
    "ppvision/plugins/paddleslim.py": {"_remove_call_hook"},
    "ppvision/plugins/paddledet_data.py": {"_sample_empty"},
    "ppvision/plugins/shims/paddledet.py": {"_gen_proposal", "_get_infer_cfg_and_input_spec"},
    "ppvision/tasks/detection/evaluation.py": {
        "_batch_transforms",
        "_init_callbacks",
        "_init_metrics",
        "_metrics",
    },
    "ppvision/tasks/detection/job.py": {"_batch_transforms", "_sample_transforms"},
    "ppvision/tasks/segmentation/job.py": {"_build_default_checker"},
}
PRIVATE_MODULES = re.compile(
    r"paddle\.(base|pir|jit\.(pir_)?dy2static|_C_ops|nn\.layer|io\.dataloader)\b"
)


@functools.cache
def trees() -> dict[str, ast.AST]:
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "paddle_private.py"
    }


def test_private_modules_are_imported_here_only():
    found = []
    for place, tree in trees().items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found += [f"{place}: {name}" for name in names if PRIVATE_MODULES.match(name)]
    assert found == []


# -- what our classes override ---------------------------------------------------------------------

LIBRARIES = {"paddle", "paddleseg", "ppdet", "paddleslim"}
MODULES = [module.name for module in pkgutil.walk_packages(ppvision.__path__, "ppvision.")]


def find_overrides(owner: type) -> set[tuple[str, str]]:
    """Private methods of a library's classes that `owner` has too: `module:Class`, method."""
    above = [(c, str(getattr(c, "__module__", ""))) for c in owner.__mro__[1:]]
    return {
        (f"{module}:{c.__qualname__}", name)
        for name, value in vars(owner).items()
        if re.match(r"_[a-z]", name) and inspect.isroutine(value)
        for c, module in above
        if module.split(".")[0] in LIBRARIES and name in vars(c)
    }


def test_an_override_is_found():
    class Crop(paddle.vision.transforms.RandomCrop):
        def _get_param(self, *_): ...
        def _own(self): ...

    owner = "paddle.vision.transforms.transforms:RandomCrop"
    assert find_overrides(Crop) == {(owner, "_get_param")}


def test_every_override_of_a_private_method_is_listed():
    """Of the classes at the head of our modules; the next test looks into functions too."""
    found, looked_at = set(), 0
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # of an extra
            missing = error.__cause__ or error
            if str(missing.name).split(".")[0] == "ppvision":
                raise
            continue
        for owner in vars(module).values():
            if inspect.isclass(owner) and owner.__module__ == name:
                looked_at += 1
                found |= find_overrides(owner)
    assert looked_at > 100
    listed = {(place, name) for place, names in private.OVERRIDDEN.items() for name in names}
    assert found == {(place, name) for place, name in listed if is_installed(place)}


def test_every_private_method_of_a_base_class_that_is_called_is_listed():
    """`super()._name` needs a base class that has it: one of ours, or one that is listed."""
    listed = {name for names in private.OVERRIDDEN.values() for name in names}
    listed.add("_read_status")  # of Python's http.client; test_remote.py looks at it
    found = []
    for place, tree in trees().items():
        for node in ast.walk(tree):
            called = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "super()"
            if called and re.match(r"_[a-z]", node.attr) and node.attr not in listed:
                defined = sum(count_definitions(other, node.attr) for other in trees().values())
                if defined < 2:  # once here, and not in a base class of ours
                    found.append(f"{place}:{node.lineno}: {node.attr}")
    assert found == []


def count_definitions(tree: ast.AST, name: str) -> int:
    return sum(isinstance(n, ast.FunctionDef) and n.name == name for n in ast.walk(tree))


def own_names(tree: ast.AST) -> set[str]:
    """Private names that a module of ours defines: functions, and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Attribute):
                        names.add(part.attr)
                    elif isinstance(part, ast.Name):
                        names.add(part.id)
    return names


def test_every_private_attribute_of_paddle_is_listed():
    """What is neither defined in ppvision nor of Python or another library has to be listed."""
    ours = set().union(*(own_names(tree) for tree in trees().values()))
    listed = {
        n for table in (private.ATTRIBUTES, private.OVERRIDDEN) for ns in table.values() for n in ns
    }
    of_python = {"_exit", "_getframe", "_is_text_encoding", "_replace"}
    found = []
    for place, tree in trees().items():
        known = ours | listed | of_python | OF_OTHERS.get(place, set())
        for node in ast.walk(tree):
            is_private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
            if is_private and node.attr not in known:
                found.append(f"{place}:{node.lineno}: {node.attr}")
    assert found == []
