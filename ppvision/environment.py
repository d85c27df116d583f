"""Describe the environment of a run: machine, versions, revision of the code."""

import math
import os
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddleseg", "paddledet", "paddleslim", "numpy")


_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def choose_fast_mkl(vendor: str, flags: Collection[str]) -> str | None:
    """Return the `MKL_DEBUG_CPU_TYPE` with which Paddle's MKL is fastest.

    Args:
        vendor, flags: of the processor, with the names of /proc/cpuinfo.

    Returns:
        7 (AVX-512) or 5 (AVX2) on AMD processors, where MKL takes slow generic kernels unless told
        otherwise (docs/design.md); None where it chooses well by itself.
    """
    if vendor != "AuthenticAMD":
        return None
    return "7" if _AVX512.issubset(flags) else "5"


def prefer_fast_mkl() -> None:
    """Set `MKL_DEBUG_CPU_TYPE` unless the user has set it. MKL reads it once, when Paddle
    starts."""
    kind = choose_fast_mkl(_cpu_table().get("vendor_id", ""), read_cpu_flags())
    if kind is not None and not os.environ.get("MKL_DEBUG_CPU_TYPE"):
        os.environ["MKL_DEBUG_CPU_TYPE"] = kind


def _cpu_table() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo for the last processor; empty if there is no such
    file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_cpu_flags() -> frozenset[str]:
    """Return the features of the processor with the names of /proc/cpuinfo; empty if not known."""
    return frozenset(_cpu_table().get("flags", "").split())


def read_processor_name() -> str:
    """Return the name of the processor from the system."""
    return _cpu_table().get("model name") or platform.processor() or platform.machine()


def count_usable_cpus() -> int:
    """Return how many processors this process may use. Its affinity (`taskset`) and its container's
    share of time (`docker run --cpus 1.5` counts as 2) limit the number; it is at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        count = os.cpu_count() or 1
    shares = read_cpu_shares(Path("/sys/fs/cgroup"), _own_groups())
    return max(1, min([count, *map(math.ceil, shares)]))


def _own_groups() -> list[str]:
    """Return the lines of /proc/self/cgroup; none if the system has no control groups."""
    try:
        return Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def read_cpu_shares(root: Path, groups: list[str]) -> list[float]:
    """Return the processor time that each control group with a limit allows a process, in
    processors.

    Args:
        root: where the groups are mounted.
        groups: `number:controllers:path` of each. Version 2 has one, without controllers.
    """
    shares = []
    for group in groups:
        _, controllers, path = [*group.split(":", 2), "", ""][:3]
        if controllers == "":
            base, read = root, _read_version_2
        elif "cpu" in controllers.split(","):
            base, read = root / controllers, _read_version_1
            if not base.is_dir():
                base = root / "cpu"
        else:
            continue
        # In a container the mounted root is the container's group, but the path is that of the
        # machine.
        place = base / path.strip("/")
        inside = [place, *place.parents] if place.is_dir() else [base]
        for folder in inside:
            if folder == base or base in folder.parents:
                quota, period = read(folder)
                if quota > 0 and period > 0:
                    shares.append(quota / period)
    return shares


def _read_version_2(folder: Path) -> tuple[int, int]:
    """Return the microseconds per period and the period; 0 without a limit."""
    quota, _, period = _read_word(folder / "cpu.max").partition(" ")
    return _whole(quota), _whole(period)


def _read_version_1(folder: Path) -> tuple[int, int]:
    """As `_read_version_2`."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quota, period = (_whole(_read_word(folder / name)) for name in names)
    return quota, period


def _read_word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0  # "max" and -1: no limit


def machine() -> str:
    """Return the name of the processor and the number of usable cores, for records of
    measurements."""
    return f"{read_processor_name()}, {count_usable_cpus()} cores"


def find_git_revision(folder: Path = Path(__file__).parent) -> str:
    """Return the commit of the checkout that `folder` belongs to, with a mark if files differ from
    it.

    A folder inside a checkout that does not track it, such as the site-packages of an environment
    in a project, belongs to no checkout.
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
    """Return machine, Python, packages and revision by name."""
    from importlib import metadata  # not at the top, because `ppvision --help` does not need it

    found = {"machine": machine(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"ppvision revision": find_git_revision()}
