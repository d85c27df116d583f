"""What the scripts of the repository run, without the process that loads Paddle."""

import os
import subprocess
from pathlib import Path

from tests.helpers.configs import ROOT

# Stands for Python: writes down its words.
_PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$WORDS"
"""


def words_of(folder: Path, script: str, *words: object, **environment: object) -> list[str]:
    """The words behind `python` in the last command of a script.

    Args:
        folder: a new one, for a copy of the script.
        script: below `scripts/`; it sources `setup.sh`, which would install.
        words: of its command line.
        environment: variables.
    """
    scripts, programs, told = folder / "scripts", folder / "bin", folder / "words"
    for made in (scripts, programs):
        made.mkdir(parents=True)
    (scripts / script).write_text((ROOT / "scripts" / script).read_text())
    (scripts / "setup.sh").write_text(f'ppvision_root="{ROOT}"\nexport PATH="{programs}:$PATH"\n')
    (programs / "python").write_text(_PYTHON)
    (programs / "python").chmod(0o755)
    given = {key: str(value) for key, value in environment.items()}
    subprocess.run(
        ["bash", str(scripts / script), *map(str, words)],
        env={**os.environ, **given, "WORDS": str(told)},
        check=True,
        timeout=60,
    )
    return told.read_text().split("\0")[:-1]
