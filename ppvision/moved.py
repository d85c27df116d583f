"""Modules that have moved: their earlier names still import, with a DeprecationWarning.

The table has the names that README, docs and scripts of version 0.1.0 show.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "ppvision.data.checks": "ppvision.data.check.segmentation",
    "ppvision.data.converters": "ppvision.data.convert",
    "ppvision.data.digit_scenes": "ppvision.data.convert.digit_scenes",
    "ppvision.engine.cpu_training": "ppvision.forms.cpu_training",
    "ppvision.quant.layered_layers": "ppvision.quant.train.layers",
    "ppvision.run_folder": "ppvision.engine.run_folder",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {now}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(now)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module ran under its new name, and keeps the spec of that name: the import system has
        # just set ours.
        module.__spec__ = module.__spec__.loader_state


def keep_earlier_names() -> None:
    """Make the earlier names importable. Further calls have no effect."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
