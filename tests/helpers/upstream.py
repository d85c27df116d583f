"""Lines of the libraries that ppvision repairs."""

import importlib.util
from pathlib import Path

from ppvision.plugins.shims import Fault


def check_place(fault: Fault) -> None:
    """Assert that the installed package has the fault's code in the line that it names."""
    place, _, line = fault.place.partition(":")
    package, _, rest = place.partition("/")
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    lines = (folder / rest).read_text(encoding="utf-8").splitlines()
    assert fault.code in lines[int(line) - 1], f"{fault.place} is {lines[int(line) - 1]!r}"
    assert fault.reason
    assert fault.versions
    assert fault.until
