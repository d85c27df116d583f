"""Earlier names of modules still import, and say where the module is now."""

import importlib
import subprocess
import sys

import pytest

from ppvision.moved import MOVED


@pytest.mark.parametrize("earlier", MOVED)
def test_an_earlier_name_is_the_same_module(earlier):
    sys.modules.pop(earlier, None)
    now = importlib.import_module(MOVED[earlier])
    with pytest.deprecated_call(match=MOVED[earlier]):
        module = importlib.import_module(earlier)
    assert module is now
    assert (module.__name__, module.__spec__.name) == (MOVED[earlier], MOVED[earlier])


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        importlib.import_module("ppvision.data.nothing")


def test_the_warning_names_the_line_that_imports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import ppvision\nfrom ppvision.data.checks import check_pairs\n")
    shown = subprocess.run(
        [sys.executable, "-W", "always", script], capture_output=True, text=True, check=True
    )
    assert f"{script}:2: DeprecationWarning: ppvision.data.checks is now" in shown.stderr
