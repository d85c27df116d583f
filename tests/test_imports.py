"""What importing costs a server, and that imports inside the package only point down."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.rooms import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ppvision"

# -- what a server loads ---------------------------------------------------------------------------

# By a program that predicts from an exported folder: no exporter, no quanter, no HTTP of ours, no
# training code. Names without a dot count only where Paddle itself has not loaded them.
UNWANTED = {
    "ppvision.deploy.verify",
    "ppvision.deploy.write",
    "ppvision.engine",
    "ppvision.forms.any_size",
    "ppvision.forms.cpu_training",
    "ppvision.forms.differences",
    "ppvision.forms.exchange",
    "ppvision.forms.pale",
    "ppvision.forms.tokens",
    "ppvision.models",
    "ppvision.nn",
    "ppvision.plugins",
    "ppvision.quant",
    "ppvision.remote",
    "ppvision.tasks",
    "ppvision.zoo",
    "PIL",
    "http",
    "jinja2",
    "matplotlib",
    "onnxruntime",
    "paddleseg",
    "paddleslim",
    "pkg_resources",
    "ppdet",
    "requests",
    "scipy",
    "tqdm",
    "urllib3",
    "visualdl",
    "xml",
    "yaml",  # read when a folder is opened
}

FACES = {
    "deploy": "from ppvision.deploy import Predictor",
    "ppvision": "import ppvision; ppvision.Predictor",
}

LOADED_AFTER_PADDLE = """
import json, sys
import paddle
before = set(sys.modules)
{}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(statements: str) -> list[str]:
    """Names of the modules that a fresh process loads for `statements`, after Paddle's own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED_AFTER_PADDLE.format(statements)],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("face", FACES)
def test_a_server_loads_nothing_that_it_does_not_run(face):
    loaded = loaded_by(FACES[face])
    assert "ppvision.deploy.run.predictor" in loaded
    found = [name for name in loaded if any(f"{name}.".startswith(f"{u}.") for u in UNWANTED)]
    assert found == []


def test_the_other_names_of_deploy_are_imported_when_they_are_asked_for():
    loaded = loaded_by("from ppvision import deploy; deploy.ParityError")
    assert "ppvision.deploy.verify.parity" in loaded
    assert not any(name.startswith("ppvision.deploy.write") for name in loaded)


# -- the order of the rooms ------------------------------------------------------------------------

# Upwards, but never while the module is being imported: in a function, or for type checkers.
LATER = {
    ("ppvision", "ppvision.deploy.run"): "names of the Python face, for type checkers",
    ("ppvision", "ppvision.deploy.write"): "names of the Python face, for type checkers",
    ("ppvision", "ppvision.zoo"): "names of the Python face, for type checkers",
    ("ppvision.deploy", "ppvision.deploy.verify"): "ParityError, for type checkers",
    ("ppvision.deploy", "ppvision.deploy.write"): "export_model, for type checkers",
    ("ppvision.deploy.run", "ppvision.quant"): "Predictor(layered=...)",
    ("ppvision.deploy.run", "ppvision.deploy.run.zoo_folder"): "Predictor(NAME)",
    ("ppvision.deploy.run", "ppvision.zoo"): "Predictor(NAME)",
    ("ppvision.models", "ppvision.zoo"): "PretrainedConfig, for type checkers",
}

# Who may import the libraries that the plug-ins adapt.
LIBRARIES = {
    "paddleseg": {"ppvision.plugins", "ppvision.tasks"},
    "ppdet": {"ppvision.plugins", "ppvision.tasks"},
    "paddleslim": {"ppvision.plugins"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """What a module imports by absolute names, and whether it does so while it is imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: expected absolute imports only"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    yield (inner if inner in MODULES else child.module), at_once
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            ):
                yield from visit(child, False)
            else:
                yield from visit(child, at_once)

    yield from visit(ast.parse(MODULES[module].read_text(encoding="utf-8")), True)


def packages_of(module: str) -> set[str]:
    """The packages around a module, whose `__init__` runs before it."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def test_every_module_has_a_room():
    """A new module or folder directly in `ppvision/` needs its place in `ROOMS`."""
    homeless = [m for m in MODULES if m != "ppvision" and room_of(m) == "ppvision"]
    assert homeless == []
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_imports_only_point_down():
    wrong, used = [], set()
    for module in MODULES:
        room = room_of(module)
        for target, at_once in imports_of(module):
            if target.split(".")[0] != "ppvision":
                continue
            upwards = (room, room_of(target))
            if ROOMS.index(upwards[1]) <= ROOMS.index(room):
                continue
            if at_once or upwards not in LATER:
                wrong.append(f"{module} imports {target}")
            used.add(upwards)
    assert wrong == []
    assert used == set(LATER), "an exception that nobody needs any more"


def test_only_the_plugins_and_tasks_know_the_libraries():
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        for target, _ in imports_of(module)
        if (library := target.split(".")[0]) in LIBRARIES
        and room_of(module) not in LIBRARIES[library]
    ]
    assert wrong == []


def test_no_circle():
    """Nothing imports, while it is imported, what needs it to be complete."""
    needs: dict[str, set[str]] = {}
    for module in MODULES:
        found = {t for t, at_once in imports_of(module) if at_once and t in MODULES}
        around = set().union(*map(packages_of, found)) - packages_of(module) - {module}
        needs[module] = (found | around) - packages_of(module)
    done: set[str] = set()

    def look(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(needs[module]):
                look(other, (*path, module))
            done.add(module)

    for module in MODULES:
        look(module, ())


# -- tests -----------------------------------------------------------------------------------------


def test_no_test_imports_a_test():
    """What several tests need is in `tests/helpers/`, also for the code that they run elsewhere."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = re.findall(r"(?:from|import) (\S+)|(tests\.\w+):\w", node.value)
                names = ["".join(pair) for pair in names]
            else:
                continue
            if any(name.startswith("tests.test_") for name in names):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
