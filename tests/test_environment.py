"""What a run says of where it ran, and how many processors a process may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppvision import environment
from ppvision.environment import count_usable_cpus, find_git_revision, read_cpu_shares
from tests.helpers.configs import ROOT


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_version_2_takes_the_limits_of_all_groups_above(tmp_path):
    write(tmp_path / "a" / "b", cpu__max="max 100000")
    write(tmp_path / "a", cpu__max="150000 100000")
    write(tmp_path, cpu__max="400000 100000")
    assert sorted(read_cpu_shares(tmp_path, ["0::/a/b"])) == [1.5, 4.0]
    assert read_cpu_shares(tmp_path, ["0::/"]) == [4.0]


def test_in_a_container_the_path_is_the_hosts(tmp_path):
    write(tmp_path, cpu__max="50000 100000")
    assert read_cpu_shares(tmp_path, ["0::/docker/0123abcd"]) == [0.5]


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path, controllers):
    base = tmp_path / controllers
    write(base / "docker" / "x", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(base / "docker", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    groups = ["4:memory:/docker/x", f"3:{controllers}:/docker/x", "1:name=systemd:/", "0::/"]
    assert read_cpu_shares(tmp_path, groups) == [2.5]


@pytest.mark.parametrize(
    "text", ["", "max", "max 100000", "0 100000", "x y", "100000", "1 0", "-1 1"]
)
def test_what_is_no_limit(tmp_path, text):
    write(tmp_path, cpu__max=text)
    assert read_cpu_shares(tmp_path, ["0::/"]) == []
    assert read_cpu_shares(tmp_path / "absent", ["0::/", "", "x", "1:cpu:/../.."]) == []


@pytest.mark.parametrize(
    ("shares", "expected"), [([], 8), ([1.5], 2), ([0.1], 1), ([99], 8), ([3, 2], 2)]
)
def test_the_least_limit_counts_rounded_up(monkeypatch, shares, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(environment, "read_cpu_shares", lambda root, groups: shares)
    assert count_usable_cpus() == expected


def test_affinity_is_seen():
    first = min(os.sched_getaffinity(0))
    code = "from ppvision.environment import count_usable_cpus; print(count_usable_cpus())"
    command = ["taskset", "-c", str(first), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "1\n"


def test_nothing_else_counts_processors():
    """One function decides: `os.cpu_count` knows neither affinity nor containers."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("ppvision", "benchmark", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh")
        and any(word in path.read_text(encoding="utf-8") for word in ("cpu_count", "$(nproc)"))
    ]
    assert found == ["ppvision/environment.py"]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("a = 1\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    return package.parent


def test_a_tracked_folder_has_the_revision(checkout):
    revision = git(checkout, "rev-parse", "HEAD")
    assert find_git_revision(checkout / "package") == revision
    (checkout / "package" / "code.py").write_text("a = 2\n")
    assert find_git_revision(checkout / "package") == f"{revision} with changes"


def test_a_folder_that_somebody_elses_project_encloses_has_none(checkout, tmp_path):
    inside = checkout / ".venv" / "site-packages" / "package"
    inside.mkdir(parents=True)
    (inside / "code.py").write_text("")
    assert find_git_revision(inside) == "not a git checkout"
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    assert find_git_revision(outside) == "not a git checkout"
