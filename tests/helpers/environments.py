"""Environments of other programs, for tests that run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def environment(variable: str, requirements: list[str], folder: Path) -> Path:
    """The Python of an environment with these packages.

    Args:
        variable: of the environment; the path of that Python where somebody has one. Without it,
            the environment is made in `folder` by pip, which takes minutes.
        requirements: what pip installs.
        folder: a new one.
    """
    if given := os.environ.get(variable):
        return Path(given)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", *requirements]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        reason = made.stderr.strip().splitlines()[-1]
        pytest.skip(f"no environment with {' '.join(requirements)} (or set {variable}): {reason}")
    return python
