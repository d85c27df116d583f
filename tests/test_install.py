"""The two-command install: the pins against the packages' metadata, and the scripts' logic.

The scripts run against a stand-in for Python, which notes its arguments: nothing is downloaded.
`scripts/test.sh` itself is the test with the real one.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]


# -- the requirement files -----------------------------------------------------------------------


def requirement_lines(name: str) -> list[str]:
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in (ROOT / name).read_text().splitlines())
    return [line.strip() for line in lines if line.strip()]


def pins(name: str = "requirements.txt") -> dict[str, str]:
    return dict(line.split("==") for line in requirement_lines(name))


def overrides() -> list[Requirement]:
    return [Requirement(line) for line in requirement_lines("requirements/overrides.txt")]


def conflicts() -> dict[str, set[str]]:
    """{package: declared specifiers} that the pins do not satisfy, from installed metadata."""
    pinned = pins()
    found: dict[str, set[str]] = {}
    for name in pinned:
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
                continue
            key = canonicalize_name(wanted.name)
            if key not in pinned or not wanted.specifier.contains(pinned[key]):
                found.setdefault(key, set()).add(f"{name} wants {wanted.name}{wanted.specifier}")
    return found


def test_every_line_is_one_pinned_package() -> None:
    lines = requirement_lines("requirements.txt")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert len(pins()) == len(lines) > 80


LOCKS = ["requirements.txt", "requirements-gpu.txt"]
OTHERS = [(f"requirements/python{version}.txt", version) for version in ("3.10", "3.12", "3.13")]
LOCKS += [name for name, _ in OTHERS]


@pytest.mark.parametrize("name", LOCKS)
def test_no_index_addresses_and_no_machine_paths(name: str) -> None:
    text = (ROOT / name).read_text()
    addresses = re.findall(r"https?://\S+", text)
    # The one address is Paddle's install page, in a comment.
    assert len(addresses) == (name == "requirements-gpu.txt")
    assert all("paddlepaddle.org.cn/en/install" in address for address in addresses)
    assert not re.search(r"file://|/(home|root|tmp|opt|usr)/|--(extra-)?index|--find-links", text)


def test_the_gpu_file_differs_by_paddle_alone() -> None:
    cpu, gpu = pins(), pins("requirements-gpu.txt")
    assert gpu.pop("paddlepaddle-gpu") == cpu.pop("paddlepaddle")
    assert gpu == cpu


def test_the_named_requirements_are_met_by_the_pins() -> None:
    for name, version in [("requirements.txt", "3.11"), *OTHERS]:
        pinned, where = pins(name), {"python_version": version}
        for line in requirement_lines("requirements/requirements.in"):
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate(where):
                assert wanted.specifier.contains(pinned[wanted.name]), (name, line)


def test_uv_and_pip_have_the_same_overrides() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    theirs = [Requirement(line) for line in project["tool"]["uv"]["override-dependencies"]]
    assert set(theirs) == set(overrides())


def test_the_package_declares_what_is_pinned() -> None:
    """The ranges of pyproject.toml hold every lock, the packages that pip resolves for itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = list(project["dependencies"])
    for extra in ("dashboard", "onnx", "remote", "tensorboard"):
        declared += extras[extra]
    # uv resolves this one for every Python at once: an end that one of them cannot meet fails.
    # pip is no pin: it is what installs them.
    declared += [
        line for line in extras["paddle"] if line.partition("[")[0] not in {"ppvision", "pip"}
    ]
    for name, version in [("requirements.txt", "3.11"), *OTHERS]:
        pinned = pins(name)
        for line in declared:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"python_version": version}):
                key = canonicalize_name(wanted.name)
                assert wanted.specifier.contains(pinned[key]), (name, line)


def test_the_installed_versions_are_the_pinned_ones() -> None:
    """Otherwise all other tests speak about another set than the one that users get."""
    pinned = pins()
    if "paddlepaddle-gpu" in {d.name for d in metadata.distributions()}:
        pinned = pins("requirements-gpu.txt")
    installed = {name: metadata.version(name).partition("+")[0] for name in pinned}
    assert installed == pinned


def test_every_conflict_with_declared_requirements_has_an_override() -> None:
    assert set(conflicts()) == {"numpy", "opencv-python", "sklearn"}
    assert set(conflicts()) <= {requirement.name for requirement in overrides()}


def test_the_reasons_given_for_overrides_are_what_the_packages_declare() -> None:
    assert conflicts() == {
        "numpy": {"paddledet wants numpy<1.24"},
        "sklearn": {"paddledet wants sklearn==0.0"},
        "opencv-python": {
            "paddleslim wants opencv-python==4.6.0.66",
            "paddleseg wants opencv-python<=4.6.0",
            "paddledet wants opencv-python<=4.6.0",
        },
    }
    # paddleslim's own choice does not satisfy the other two.
    assert not Requirement("opencv-python<=4.6.0").specifier.contains("4.6.0.66")
    assert "numpy>=2.3.5" in metadata.requires("mlxtend")
    # Undeclared, hence named in requirements.in.
    declared = {canonicalize_name(Requirement(r).name) for r in metadata.requires("paddleslim")}
    assert "decorator" not in declared


def test_overrides_that_no_metadata_asks_for_rest_on_code() -> None:
    rest = {requirement.name for requirement in overrides()} - set(conflicts())
    assert rest == {"onnxoptimizer", "opencv-python-headless", "protobuf", "setuptools"}
    # Read, not imported: what protobuf 7 and setuptools 82 took away is still used.
    files = {
        "paddlepaddle": ("paddle/distributed/fleet/base/distributed_strategy.py", "f.label"),
        "paddleslim": ("paddleslim/common/load_model.py", "pkg_resources"),
        "paddledet": ("ppdet/model_zoo/model_zoo.py", "pkg_resources"),
    }
    for name, (file, text) in files.items():
        assert text in metadata.distribution(name).locate_file(file).read_text()


# -- the scripts ---------------------------------------------------------------------------------

STAND_IN = r"""#!/usr/bin/env bash
# A stand-in for Python: notes its arguments, makes an "environment" of a copy of itself.
set -euo pipefail
echo "$*" >>"$CALLS"
case "$*" in
  -c\ *version_info*) echo "${FAKE_VERSION:-3.11}" ;;
  --version) echo "Python ${FAKE_VERSION:-3.11}.4" ;;
  -m\ venv\ *) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  -m\ pip\ *-r\ *)
    echo "Collecting something"
    if [[ -n "${PIP_WAITS:-}" ]]; then touch "$CALLS.waiting" && sleep "$PIP_WAITS"; fi
    if [[ -n "${PIP_FAILS:-}" ]]; then echo "ERROR: $PIP_FAILS" && exit 1; fi
    ;;
  -m\ ruff\ *|-m\ mypy\ *) [[ "$*" != *"${CHECK_FAILS:-nothing}"* ]] ;;
esac
"""


_OURS = ("PYTHON", "REQUIREMENTS", "VENV", "VIRTUAL_ENV")  # what the scripts and venv read


class Project:
    """A folder with the real scripts, a short requirements.txt and a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        self.calls_file = folder / "calls"
        self.bin = folder / "bin"
        (self.root / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.sh", "test.sh"):
            shutil.copy(ROOT / "scripts" / name, self.root / "scripts")
        (self.root / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", self.root / ".ci")
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "requirements.txt").write_text("numpy==2.3.5\n")
        (self.root / "requirements-gpu.txt").write_text("numpy==2.3.5\n")
        (self.root / "requirements").mkdir()
        (self.root / "requirements" / "python3.12.txt").write_text("numpy==2.3.5\n")
        for name in ("python3.11", "python3"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)

    def start(
        self, script: str = "scripts/setup.sh", *arguments: str, **variables: str
    ) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if k not in _OURS}
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments],
            # Known already, or an AMD processor would be asked for it by Python.
            env={
                "MKL_DEBUG_CPU_TYPE": "5",
                **clean,
                "PATH": path,
                "CALLS": str(self.calls_file),
                **variables,
            },
            cwd=self.bin,  # any folder but the project's
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that a test can interrupt it as a terminal would
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        """What Python was asked to do since the last look, version questions left out."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.write_text("")
        return [line for line in lines if "version_info" not in line]

    def wait_for_pip(self) -> None:
        deadline = time.monotonic() + 30
        while not Path(f"{self.calls_file}.waiting").exists():
            assert time.monotonic() < deadline, "pip was never called"
            time.sleep(0.02)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if call.startswith("-m pip install")]


def test_setup_installs_the_pins_then_the_project(project: Project) -> None:
    code, output = project.run()
    assert code == 0, output
    made, pinned, editable = project.calls()
    assert made == f"-m venv {project.root}/.venv"
    assert "--no-deps" in pinned
    assert pinned.endswith(f"-r {project.root}/requirements.txt")
    assert "--no-deps --no-build-isolation" in editable
    assert editable.endswith(f"-e {project.root}")


def test_a_second_run_does_not_even_start_python(project: Project) -> None:
    project.run()
    project.calls()
    code, output = project.run()
    assert (code, output) == (0, "")
    assert not project.calls_file.read_text()


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_a_changed_file_installs_again_into_the_same_folder(project: Project, name: str) -> None:
    project.run()
    project.calls()
    with (project.root / name).open("a") as file:
        file.write("# changed\n")
    assert project.run()[0] == 0
    calls = project.calls()
    assert len(installs(calls)) == 2
    assert not any("venv /" in call for call in calls)
    project.run()
    assert project.calls() == []


def test_a_moved_project_installs_again(project: Project) -> None:
    project.run()
    project.calls()
    project.root = project.root.rename(project.root.parent / "moved")
    assert project.run()[0] == 0
    assert len(installs(project.calls())) == 2


def test_an_interrupted_setup_starts_again(project: Project) -> None:
    process = project.start(PIP_WAITS="60")
    project.wait_for_pip()
    (project.root / ".venv" / "half-copied").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    project.calls()

    code, output = project.run()
    assert code == 0
    assert "did not finish" in output
    assert not (project.root / ".venv" / "half-copied").exists()
    assert [call.split()[1] for call in project.calls()] == ["venv", "pip", "pip"]


def test_a_failed_pip_shows_why_and_is_not_taken_for_done(project: Project) -> None:
    code, output = project.run(PIP_FAILS="no space left")
    assert code == 1
    assert "ERROR: no space left" in output
    assert "run this again" in output
    assert project.run()[0] == 0


def test_of_two_setups_at_once_one_waits_and_finds_it_done(project: Project) -> None:
    first = project.start(PIP_WAITS="1")
    project.wait_for_pip()
    code, output = project.run()
    first.communicate(timeout=30)
    assert (first.returncode, code) == (0, 0)
    assert "waiting" in output
    assert len(installs(project.calls())) == 2  # the first one's


def test_another_python_is_refused_before_anything_is_made(project: Project) -> None:
    code, output = project.run(FAKE_VERSION="3.9")
    assert code == 1
    assert "expected Python 3.10 to 3.13" in output
    assert "got Python 3.9.4" in output
    assert "apt-get install python3.11" in output
    assert not (project.root / ".venv").exists()


def test_another_python_gets_its_own_pins_and_folder(project: Project) -> None:
    for variables in ({"PYTHON": "python3"}, {}):  # asked for, or the only one that is there
        code, output = project.run(FAKE_VERSION="3.12", VENV=f".venv-{len(variables)}", **variables)
        assert code == 0, output
        made, pinned, _ = project.calls()
        assert made == f"-m venv {project.root}/.venv-{len(variables)}"
        assert pinned.endswith(f"-r {project.root}/requirements/python3.12.txt")


def test_a_folder_of_another_python_is_not_mixed_with_it(project: Project) -> None:
    project.run()
    code, output = project.run(FAKE_VERSION="3.12", PYTHON="python3")
    assert code == 1
    assert "got a .venv made from requirements.txt" in output


def test_python3_serves_when_it_is_3_11(project: Project) -> None:
    (project.bin / "python3.11").write_text("#!/bin/sh\nexit 127\n")  # as pyenv's shims do
    assert project.run()[0] == 0


def test_the_gpu_file_is_remembered_and_not_mixed_with_the_other(project: Project) -> None:
    project.run(REQUIREMENTS="requirements-gpu.txt")
    assert any("requirements-gpu.txt" in call for call in project.calls())
    assert project.run() == (0, "")  # without naming it again
    code, output = project.run(REQUIREMENTS="requirements.txt")
    assert code == 1
    assert "expected requirements.txt, got a .venv made from requirements-gpu.txt" in output
    assert installs(project.calls()) == []


def test_an_environment_the_user_made_is_kept(project: Project) -> None:
    """That is how paddlepaddle-gpu gets in before the rest."""
    (project.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(project.bin / "python3", project.root / ".venv" / "bin" / "python")
    (project.root / ".venv" / "theirs").touch()
    assert project.run(REQUIREMENTS="requirements-gpu.txt")[0] == 0
    assert (project.root / ".venv" / "theirs").exists()
    assert len(installs(project.calls())) == 2


def test_a_requirements_file_that_is_not_there_is_named(project: Project) -> None:
    code, output = project.run(REQUIREMENTS="requirments.txt")
    assert code == 1
    assert "got 'requirments.txt'" in output


PYTEST = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20"


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_test_sh_lints_then_hands_its_arguments_to_pytest(project: Project, script: str) -> None:
    code, output = project.run(script, "-k", "one or two")
    assert code == 0, output
    lint, formatted, types, tests = project.calls()[3:]
    assert lint.startswith("-m ruff check")
    assert formatted.startswith("-m ruff format --check")
    assert types.startswith("-m mypy")
    assert tests == f"{PYTEST} -k one or two"


@pytest.mark.parametrize("step", ["ruff check", "ruff format", "mypy"])
def test_test_sh_stops_at_the_linter(project: Project, step: str) -> None:
    code, _ = project.run("scripts/test.sh", CHECK_FAILS=step)
    assert code == 1
    assert not any(call.startswith("-m pytest") for call in project.calls())


def test_all_installs_what_the_marked_tests_need(project: Project) -> None:
    for name, code in {
        "id": "echo 0",
        "apt-get": 'echo "apt-get $*" >>"$CALLS"',
    }.items():
        (project.bin / name).write_text(f"#!/bin/sh\n{code}\n")
        (project.bin / name).chmod(0o755)
    # Only the commands that the scripts use, so that an nginx of this machine is not seen.
    used = "bash cat cp cut dirname env flock grep mkdir mv rm sed sha256sum tail tee"
    for name in used.split(" "):
        (project.bin / name).symlink_to(shutil.which(name))
    code, output = project.run("scripts/test.sh", "--all", "-x", PATH=str(project.bin))
    assert code == 0, output
    calls = project.calls()
    assert any(call.startswith("apt-get install") and "nginx chromium" in call for call in calls)
    assert calls[-1] == f"{PYTEST} -m  -x"


# -- the wheel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [None, "https://example.org/v1/"])
def test_the_description_for_an_index_has_no_relative_link(tmp_path, files) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    script = (ROOT / "setup.py").read_text()
    assert script.count("\nFILES = None\n") == 1
    (tmp_path / "setup.py").write_text(script.replace("\nFILES = None\n", f"\nFILES = {files!r}\n"))
    (tmp_path / "ppvision").mkdir()
    (tmp_path / "ppvision" / "__init__.py").touch()
    build = (
        "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    text = (tmp_path / run.stdout.split()[-1] / "METADATA").read_text()
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", readme)
    relative = [link for link in links if not link.startswith("http")]
    assert any(link.endswith(".png") for link in relative)
    assert "Description-Content-Type: text/markdown" in text
    described = re.findall(r"\]\(([^)]+)\)", text)
    if files is None:
        assert described == [link for link in links if link not in relative]
        assert "docs/data.md" in text  # the text of its link
    else:
        assert described == [files + link if link in relative else link for link in links]
