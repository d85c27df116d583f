"""What a run ran on: machine, versions, revision of the code."""

import os
import platform
import subprocess
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddleseg", "paddledet", "paddleslim", "numpy")


_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def fast_mkl(vendor: str, flags: Collection[str]) -> str | None:
    """The `MKL_DEBUG_CPU_TYPE` under which Paddle's MKL is fastest.

    Args:
        vendor, flags: of the processor, as /proc/cpuinfo calls them.

    Returns:
        7 (AVX-512) or 5 (AVX2) on AMD processors, where MKL takes slow generic kernels unless told
        otherwise (docs/design.md); None where it chooses well by itself.
    """
    if vendor != "AuthenticAMD":
        return None
    return "7" if _AVX512.issubset(flags) else "5"


def prefer_fast_mkl() -> None:
    """Set `MKL_DEBUG_CPU_TYPE` where the user has not. MKL reads it once, as Paddle starts."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    pairs = (line.partition(":") for line in lines)
    table = {name.strip(): value.strip() for name, _, value in pairs}
    kind = fast_mkl(table.get("vendor_id", ""), table.get("flags", "").split())
    if kind is not None and not os.environ.get("MKL_DEBUG_CPU_TYPE"):
        os.environ["MKL_DEBUG_CPU_TYPE"] = kind


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Processor and core count, as they stand beside a figure."""
    return f"{processor()}, {os.cpu_count()} cores"


def git_revision(folder: Path = Path(__file__).parent) -> str:
    """The commit of the checkout that `folder` belongs to, marked when files differ from it.

    A folder inside of a checkout that does not track it, such as an environment's site-packages
    in somebody's project, belongs to none.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    revision = git("rev-parse", "HEAD")
    if revision is None or not git("ls-files", "--", "."):
        return "not a git checkout"
    return f"{revision} with changes" if git("status", "--porcelain", "-uno") else revision


def describe_environment() -> dict[str, str]:
    """Machine, Python, packages and revision, by name."""
    found = {"machine": machine(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"ppvision revision": git_revision()}
