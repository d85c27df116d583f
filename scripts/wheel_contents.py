"""Check that a wheel has the files of the project; scripts/release_check.sh runs this.

python scripts/wheel_contents.py dist/ppvision-0.1.0-py3-none-any.whl
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGED_CONFIGS = "ppvision/configs"


def expected() -> set[str]:
    """Return the files of the package in git, and the configs at their place in the package."""
    listed = subprocess.run(
        ["git", "ls-files", "ppvision", "configs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.replace("configs/", f"{PACKAGED_CONFIGS}/", 1) if line.startswith("configs/")
            else line for line in listed.stdout.splitlines()}  # fmt: skip


def main() -> None:
    (wheel,) = sys.argv[1:]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    described = {name for name in names if ".dist-info/" in name}
    found, wanted = names - described, expected()
    problems = [f"missing: {name}" for name in sorted(wanted - found)]
    problems += [f"not of the project: {name}" for name in sorted(found - wanted)]
    problems += [] if any(n.endswith("LICENSE") for n in described) else ["missing: LICENSE"]
    if problems:
        raise SystemExit(f"{wheel}: expected the files of the project.\n" + "\n".join(problems))
    print(f"{Path(wheel).name}: {len(found)} files, {Path(wheel).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
