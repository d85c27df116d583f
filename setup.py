"""Puts `configs/` into the wheel, as `ppvision/configs`, and a README without relative links. All
else stands in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# Where a browser finds the files of this version, with a slash at the end. None: not published yet.
FILES = None


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ppvision" / "configs"
            shutil.copytree(ROOT / "configs", target, dirs_exist_ok=True)


def describe(readme: str, files: str | None) -> str:
    """README.md for a package index, which knows no file beside it.

    Args:
        readme: the text.
        files: goes before each relative address. None: pictures are left out, and of a link
            stays its text.
    """
    relative = r"\((?!https?://|#)([^)\s]+)\)"
    if files is not None:
        return re.sub(r"\]" + relative, rf"]({files}\1)", readme)
    readme = re.sub(r"!\[[^]]*\]" + relative + r"\n*", "", readme)
    return re.sub(r"\[([^]]+)\]" + relative, r"\1", readme)


setup(
    cmdclass={"build_py": BuildWithConfigs},
    long_description=describe((ROOT / "README.md").read_text(encoding="utf-8"), FILES),
    long_description_content_type="text/markdown",
)
