"""`ppvision doctor`: every bad machine simulated, and some really broken."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ppvision.doctor import (
    EXPECTED,
    MAIN_JOB,
    PROBES,
    Environment,
    Finding,
    Probe,
    diagnose,
    exit_code,
    list_installed_packages,
    parse_probe,
    write_report,
)
from ppvision.environment import choose_fast_mkl, prefer_fast_mkl

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})


def good_environment() -> Environment:
    return Environment(
        executable="python",
        python=(3, 11, 9),
        packages={name: version for name, (version, _) in EXPECTED.items()},
        cpu_model="Some processor",
        cpu_vendor="GenuineIntel",
        cpu_flags=frozenset({"avx", "avx2", "amx_int8"}),
        cores=2,
        memory_total=16 * GIB,
        memory_available=12 * GIB,
        folder="/data",
        disk_free=100 * GIB,
        variables={},
        nvidia_device=False,
        probes={
            name: Probe(True, data={"error": 1e-7} if name in ("export", "oneDNN") else {})
            for name in PROBES
        },
    )


def with_packages(**versions: str | None) -> Environment:
    """The good environment with some versions changed, or taken out with None."""
    env = good_environment()
    packages = dict(env.packages)
    for name, version in versions.items():
        packages.pop(name.replace("_", "-"), None)
        if version is not None:
            packages[name.replace("_", "-")] = version
    return replace(env, packages=packages)


def with_probes(env: Environment, **probes: Probe) -> Environment:
    return replace(
        env, probes={**env.probes, **{name.replace("_", "-"): p for name, p in probes.items()}}
    )


def finding(env: Environment, name: str) -> Finding:
    (match,) = (item for item in diagnose(env) if item.name == name)
    return match


def problems(env: Environment) -> dict[str, str]:
    return {item.name: item.level for item in diagnose(env) if item.level != "ok"}


BROKEN = Probe(False, "ModuleNotFoundError: No module named 'x'")


def test_a_good_machine_has_only_ok_findings() -> None:
    findings = diagnose(good_environment())
    assert {item.level for item in findings} == {"ok"}
    assert all(item.found and not item.remedy for item in findings)
    assert exit_code(findings) == 0


def test_expected_versions_are_those_of_requirements_txt() -> None:
    text = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))
    assert {name: pins.get(name) for name in EXPECTED} == {
        name: version for name, (version, _) in EXPECTED.items()
    }
    assert {job for _, job in EXPECTED.values()} <= set(PROBES)
    assert set(MAIN_JOB) <= set(PROBES)


# (environment, the finding it must give, what `expected` and `remedy` must contain). None of these
# alone stops the main job: its own trials succeed.
WARNINGS = {
    "python 3.9": (
        replace(good_environment(), python=(3, 9, 1)),
        ("Python", "3.10 to 3.13", "python3.11"),
    ),
    "paddle 3.4.0": (
        with_packages(paddlepaddle="3.4.0"),
        ("paddlepaddle", "3.2.2", "'paddlepaddle==3.2.2'"),
    ),
    "numpy 2.4": (
        with_packages(numpy="2.4.0"),
        ("numpy", "below 2.4: int()", "'numpy==2.3.5'"),
    ),
    "numpy 2.10 is above 2.4": (
        with_packages(numpy="2.10.0rc1"),
        ("numpy", "below 2.4", "'numpy==2.3.5'"),
    ),
    "protobuf 7": (
        with_packages(protobuf="7.34.0"),
        ("protobuf", "fleet", "'protobuf==5.29.6'"),
    ),
    "protobuf 6": (
        with_packages(protobuf="6.33.6"),
        ("protobuf", "5.29.6, which ppvision was run with", "'protobuf==5.29.6'"),
    ),
    "setuptools 82": (
        with_packages(setuptools="82.0.0"),
        ("setuptools", "pkg_resources", "'setuptools==80.10.2'"),
    ),
    "setuptools 81": (
        with_packages(setuptools="81.0.0"),
        ("setuptools", "80.10.2, which ppvision was run with", "'setuptools==80.10.2'"),
    ),
    "opencv twice": (
        with_packages(opencv_python="4.10.0.84"),
        (
            "opencv-python-headless and opencv-python",
            "one of them",
            "uninstall --yes opencv-python-headless opencv-python && python -m pip install",
        ),
    ),
    "both paddles": (
        with_packages(paddlepaddle_gpu="3.2.2"),
        (
            "paddlepaddle and paddlepaddle-gpu",
            "one of them",
            "uninstall --yes paddlepaddle paddlepaddle-gpu; then",
        ),
    ),
    "another opencv": (
        with_packages(opencv_python="4.10.0.84", opencv_python_headless=None),
        ("opencv-python-headless", "4.14", "'opencv-python-headless=="),
    ),
    "no decorator": (with_packages(decorator=None), ("decorator", "once-QAT", "'decorator==")),
    "no pyzmq": (with_packages(pyzmq=None), ("pyzmq", "once-QAT", "'pyzmq==")),
    "paddleseg without metadata": (
        with_packages(paddleseg=None),
        ("paddleseg", "segmentation", "'paddleseg==2.8.0'"),
    ),
    "old processor": (
        replace(good_environment(), cpu_flags=frozenset({"sse2"})),
        ("CPU", "avx2", "newer"),
    ),
    "little memory": (
        replace(good_environment(), memory_available=GIB),
        ("memory", "2.0 GiB", "--batch_size"),
    ),
    "little space": (
        replace(good_environment(), disk_free=GIB - 1),
        ("disk", "1.0 GiB", "--save_dir"),
    ),
    "AMD without the variable": (
        replace(good_environment(), cpu_vendor="AuthenticAMD"),
        ("MKL_DEBUG_CPU_TYPE", "5", "export MKL_DEBUG_CPU_TYPE=5"),
    ),
    "CUDA build, no device": (
        with_probes(good_environment(), paddle=Probe(True, data={"cuda": True, "devices": 0})),
        ("GPU", "CUDA", "nvidia-smi"),
    ),
    "GPU, CPU build": (
        replace(good_environment(), nvidia_device=True),
        ("GPU", "paddlepaddle-gpu", "requirements-gpu.txt"),
    ),
    "no oneDNN": (
        with_probes(good_environment(), oneDNN=BROKEN),
        ("oneDNN", "works", "without it"),
    ),
    "no detection": (
        with_probes(good_environment(), detection=BROKEN),
        ("detection", "works", "requirements.txt"),
    ),
    "no VisualDL": (
        with_probes(good_environment(), dashboards=BROKEN),
        ("dashboards", "works", "without --use_vdl"),
    ),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_a_problem_beside_the_main_job_is_one_warning(case: str) -> None:
    env, (name, expected, remedy) = WARNINGS[case]
    assert problems(env) == {name: "warn"}
    item = finding(env, name)
    assert expected in item.expected
    assert remedy in item.remedy
    assert exit_code(diagnose(env)) == 0


# The extras that installed packages are for; their names are those of pyproject.toml.
@pytest.mark.parametrize(
    ("package", "job", "extra"),
    [
        ("onnxruntime", "ONNX", "onnx"),
        ("visualdl", "dashboards", "dashboard"),
        ("tensorboardx", "TensorBoard", "tensorboard"),
        ("requests", "remote", "remote"),
        ("urllib3", "remote", "remote"),
    ],
)
def test_remedies_without_a_checkout_are_extras(package: str, job: str, extra: str) -> None:
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
    env = with_probes(with_packages(**{package: None}), **{job: BROKEN})
    assert problems(env) == {package: "warn", job: "warn"}
    assert f"'{package}==" in finding(env, package).remedy
    env = replace(env, checkout=False)
    assert f"pip install 'ppvision[{extra}]'" in finding(env, package).remedy


def test_no_remedy_without_a_checkout_names_its_files() -> None:
    said = ""
    for env, _ in [*WARNINGS.values(), *FAILURES.values()]:
        said += "".join(item.remedy for item in diagnose(replace(env, checkout=False)))
    assert "pip install" in said
    assert not re.search(r"scripts/|requirements", said)


# (environment, every finding that is not ok)
FAILURES = {
    "no paddleseg": (
        with_probes(with_packages(paddleseg=None), segmentation=BROKEN),
        {"paddleseg": "fail", "segmentation": "fail"},
    ),
    "no scikit-learn": (
        with_probes(with_packages(scikit_learn=None), segmentation=BROKEN, detection=BROKEN),
        {"scikit-learn": "fail", "segmentation": "fail", "detection": "warn"},
    ),
    "numpy 2.4 and its TypeError": (
        with_probes(with_packages(numpy="2.4.6"), segmentation=BROKEN),
        {"numpy": "fail", "segmentation": "fail"},
    ),
    "no paddle": (
        with_probes(with_packages(paddlepaddle=None), **dict.fromkeys(MAIN_JOB, BROKEN)),
        {"paddlepaddle": "fail", "paddle": "fail", "segmentation": "fail", "export": "fail"},
    ),
    "export does not run": (
        with_probes(good_environment(), export=BROKEN),
        {"export": "fail"},
    ),
    "wrong numbers": (
        with_probes(good_environment(), export=Probe(True, data={"error": 0.02})),
        {"export": "fail"},
    ),
    "oneDNN gives NaN, which export refuses": (
        with_probes(good_environment(), oneDNN=Probe(True, data={"error": float("nan")})),
        {"oneDNN": "fail"},
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_exit_code_is_1_when_the_main_job_would_fail(case: str) -> None:
    env, expected = FAILURES[case]
    assert problems(env) == expected
    assert exit_code(diagnose(env)) == 1


def test_paddlepaddle_gpu_serves_as_paddlepaddle() -> None:
    env = with_packages(paddlepaddle=None, paddlepaddle_gpu="3.2.2")
    env = with_probes(env, paddle=Probe(True, data={"cuda": True, "devices": 2}))
    assert problems(env) == {}
    assert finding(env, "GPU").found == "2 usable"
    assert finding(env, "paddlepaddle").found == "3.2.2 (paddlepaddle-gpu)"


def test_the_variable_is_enough_on_amd() -> None:
    env = replace(
        good_environment(), cpu_vendor="AuthenticAMD", variables={"MKL_DEBUG_CPU_TYPE": "5"}
    )
    assert finding(env, "MKL_DEBUG_CPU_TYPE").level == "ok"
    env = replace(env, cpu_flags=env.cpu_flags | AVX512)
    assert finding(env, "MKL_DEBUG_CPU_TYPE").level == "warn"
    env = replace(env, variables={"MKL_DEBUG_CPU_TYPE": "7"})
    assert finding(env, "MKL_DEBUG_CPU_TYPE").level == "ok"


def test_mkl_is_told_of_avx512_where_all_of_it_is_there() -> None:
    assert choose_fast_mkl("AuthenticAMD", ["avx2", *AVX512]) == "7"
    assert choose_fast_mkl("AuthenticAMD", ["avx2", *(AVX512 - {"avx512vl"})]) == "5"
    assert choose_fast_mkl("GenuineIntel", AVX512) is None


def test_the_users_own_choice_for_mkl_stays(monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "vendor_id : AuthenticAMD\nflags: fpu")
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    prefer_fast_mkl()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    prefer_fast_mkl()
    assert os.environ.pop("MKL_DEBUG_CPU_TYPE") == "5"


def test_the_report_says_what_to_do_only_where_something_is_wrong() -> None:
    stream = io.StringIO()
    write_report(
        [Finding("a", "1"), Finding("b", "2", "3", "warn", "type this")],
        stream,
    )
    assert stream.getvalue().splitlines() == [
        "ok    a: 1",
        "warn  b: 2",
        "      expected: 3",
        "      do: type this",
        "",
        "Training, evaluating and exporting a segmentation model works here; 1 warning.",
    ]


def test_a_probe_answers_on_its_last_line_whatever_comes_before() -> None:
    answer = parse_probe(0, 'loading...\n{"ok": true, "detail": "", "data": {"error": 0.5}}\n', "")
    assert answer == Probe(True, "", {"error": 0.5})


@pytest.mark.parametrize(
    ("returncode", "stdout", "stderr", "said"),
    [
        (-11, "", "", "SIGSEGV"),
        (1, "", "Traceback\nImportError: broken\n\n", "code 1: ImportError: broken"),
        (3, "", "", "code 3: no message"),
        (0, "not an answer\n", "", "'not an answer'"),
        (0, "[1]\n", "", "'[1]'"),
        (0, "", "", "code 0"),
    ],
)
def test_a_probe_without_an_answer_says_how_it_ended(
    returncode: int, stdout: str, stderr: str, said: str
) -> None:
    probe = parse_probe(returncode, stdout, stderr)
    assert not probe.ok
    assert said in probe.detail


def write_metadata(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_installed_packages_reads_metadata_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metadata(tmp_path / "first", "Some_Package", "2.0")
    write_metadata(tmp_path / "second", "some-package", "1.0")
    (tmp_path / "first" / "leftover-1.0.dist-info").mkdir()  # pip was interrupted here
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert list_installed_packages() == {"some-package": "2.0"}


def run_python(*arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


DOCTOR = (
    "import sys; from ppvision.doctor import run_doctor; code = run_doctor(sys.stdout); "
    "assert 'paddle' not in sys.modules; sys.exit(code)"
)


def test_this_machine(tmp_path: Path) -> None:
    run = run_python("-c", DOCTOR, path=ROOT, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in PROBES:
        assert re.search(rf"^ok    {name}: works", run.stdout, flags=re.MULTILINE), run.stdout


def test_really_broken_packages_are_findings(tmp_path: Path) -> None:
    """A wrong version, an import that raises, one that crashes the interpreter."""
    broken = tmp_path / "broken"
    write_metadata(broken, "numpy", "2.4.1")
    for package, code in {
        "paddleseg": "raise ImportError('paddleseg is broken here')",
        "paddleslim": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "ppdet": "import sys; sys.exit('ppdet gives up')",
    }.items():
        (broken / package).mkdir()
        (broken / package / "__init__.py").write_text(code)
    run = run_python("-c", DOCTOR, path=broken, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == ""
    assert "numpy: 2.4.1" in run.stdout
    assert "fail  segmentation: ImportError: paddleseg is broken here" in run.stdout
    assert "warn  once-QAT: the interpreter was ended by SIGSEGV" in run.stdout
    assert "warn  detection: the interpreter stopped with code 1: ppdet gives up" in run.stdout
    assert "ok    export: works" in run.stdout


def test_a_broken_paddle_does_not_break_the_command(tmp_path: Path) -> None:
    (tmp_path / "paddle").mkdir()
    (tmp_path / "paddle" / "__init__.py").write_text("raise OSError('libmklml_intel.so is gone')")
    run = run_python("-m", "ppvision", "doctor", path=tmp_path, cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stdout + run.stderr
    for name in MAIN_JOB:
        assert f"fail  {name}: OSError: libmklml_intel.so is gone" in run.stdout
