"""The scripts that are one command of ppvision: which one. What it does is tested elsewhere, and
with the scripts' own process by --all (`tests/test_segmentation.py`, `tests/test_layered_tasks.py`;
of several processes by default)."""

import os
import shlex
import shutil
import subprocess

import pytest

from ppvision import cli
from tests.helpers.configs import ROOT
from tests.helpers.scripts import words_of

VERBS = {
    "train.sh": ("c.yml --iters 3", "train --config c.yml --do_eval --use_vdl --iters 3"),
    "eval.sh": ("c.yml --model_dir 'a b'", "eval --config c.yml --model_dir 'a b'"),
    "export.sh": (
        "c.yml --model_path w --input_shape 1 3 56 56",
        "export --config c.yml --model_path w --input_shape 1 3 56 56",
    ),
    "export_multibit.sh": (
        "c.yml 'my layers' --skip_eval",
        "export --config c.yml --model_path 'my layers' --skip_eval --bits 8 6 4 3 2",
    ),
    "predict.sh": (
        "model 'x y.png' --save_dir out",
        "predict --model_dir model --image_path 'x y.png' --save_dir out",
    ),
}


@pytest.mark.parametrize("script", VERBS)
def test_a_script_is_one_verb(script, tmp_path):
    given, expected = map(shlex.split, VERBS[script])
    assert words_of(tmp_path, script, *given) == ["-m", "ppvision", *expected]
    cli.build_parser().parse_args(expected)


def test_widths_that_are_named_are_those(tmp_path):
    words = words_of(tmp_path, "export_multibit.sh", "c.yml", "layers", "--bits", 4, 2)
    assert words[2:] == shlex.split("export --config c.yml --model_path layers --bits 4 2")


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", ["--nproc_per_node", "2", "--backend", "gloo"]), ("gpu", ["--devices", "0,1"])],
)
def test_several_processes_are_launched(device, backend, tmp_path):
    words = words_of(tmp_path, "train.sh", "c.yml", "--device", device, NPROC=2, LOG_DIR="logs")
    assert words == [
        *("-m", "ppvision.engine.launch", "--max_restart", "0", *backend, "--log_dir", "logs"),
        *(str(ROOT / "ppvision" / "__main__.py"), "train", "--config", "c.yml"),
        *("--do_eval", "--use_vdl", "--device", device),
    ]


@pytest.mark.parametrize(
    ("given", "logs"), [({}, "output/launch_logs/machine1"), ({"LOG_DIR": "l"}, "l")]
)
def test_several_machines_are_launched(given, logs, tmp_path):
    machines = {"NNODES": 2, "MASTER": "10.0.0.1:6170", "NODE_RANK": 1, "NPROC": 8}
    words = words_of(tmp_path, "train.sh", "c.yml", MAX_RESTART=3, **machines, **given)
    assert words[:-5] == [
        *("-m", "ppvision.engine.launch", "--max_restart", "3", "--nnodes", "2"),
        *("--master", "10.0.0.1:6170", "--rank", "1", "--nproc_per_node", "8"),
        *("--backend", "gloo", "--log_dir", logs, str(ROOT / "ppvision" / "__main__.py")),
    ]


def test_one_process_that_may_start_again_is_launched(tmp_path):
    words = words_of(tmp_path / "some", "train.sh", "c.yml", MAX_RESTART=2)
    assert words[:4] == ["-m", "ppvision.engine.launch", "--max_restart", "2"]
    assert words[4:8] == ["--nproc_per_node", "1", "--backend", "gloo"]
    words = words_of(tmp_path / "none", "train.sh", "c.yml", MAX_RESTART=0)
    assert words[:3] == ["-m", "ppvision", "train"]


def test_a_wrong_number_of_restarts_of_one_process_is_named(tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        words_of(tmp_path, "train.sh", "c.yml", MAX_RESTART="often")
    assert "MAX_RESTART: expected" in capfd.readouterr().err


WRONG = {
    "NNODES": ("two", "a number of machines"),
    "MASTER": ("10.0.0.1", "HOST:PORT"),
    "NODE_RANK": ("2", "0 to 1"),
    "NPROC": ("0", "a number of processes"),
    "MAX_RESTART": ("often", "a number of restarts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variables_are_named(name, tmp_path, capfd):
    given = {"NNODES": 2, "MASTER": "10.0.0.1:6170", "NODE_RANK": 1, name: WRONG[name][0]}
    with pytest.raises(subprocess.CalledProcessError):
        words_of(tmp_path, "train.sh", "c.yml", **given)
    said = capfd.readouterr().err
    assert f"{name}: expected" in said
    assert WRONG[name][1] in said


def test_the_dashboard(tmp_path):
    words = words_of(tmp_path, "dashboard.sh", "run a", "--port", 8040)
    assert words == ["-m", "ppvision.dashboard", "run a", "--port", "8040"]


# -- scripts/test.sh --matrix ------------------------------------------------------------------

_CHECK = """#!/usr/bin/env bash
echo "it says more"
[[ $PADDLE == 3.3.1 && $PYTHON == python3.12 ]] && { echo "it broke" >&2; exit 1; }
echo "wheel: Python ${PYTHON#python}.9, paddlepaddle $PADDLE, numpy 2.5.5: trained;" \\
    "30 configs; zoo in native"
"""
_SOME_PYTHON = """#!/usr/bin/env bash
echo "{version}"
"""


def run_matrix(folder, *words):
    """With stand-ins for the check and for Python 3.10 and 3.12; `python3.13` does not work."""
    scripts, programs = folder / "scripts", folder / "bin"
    for made in (scripts, programs):
        made.mkdir(exist_ok=True)
    for name in ("test.sh", "matrix.sh"):
        (scripts / name).write_text((ROOT / "scripts" / name).read_text())
    (scripts / "wheel_check.sh").write_text(_CHECK)
    for version, says in (("3.10", "3.10"), ("3.12", "3.12"), ("3.13", ""), ("3.11", "3.8")):
        path = programs / f"python{version}"
        path.write_text(_SOME_PYTHON.format(version=says))
        path.chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "PYENV_ROOT": str(folder), "HOME": "/none"}
    command = ["bash", str(scripts / "test.sh"), "--matrix", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_matrix_is_a_table(tmp_path):
    done = run_matrix(tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[2:] == [
        "| 3.10.9 | 3.2.2 | 2.5.5 | runs | native |",
        "| 3.10.9 | 3.3.1 | 2.5.5 | runs | native |",
        "| 3.11 | 3.2.2 | | not run: no such Python here | |",
        "| 3.11 | 3.3.1 | | not run: no such Python here | |",
        "| 3.12.9 | 3.2.2 | 2.5.5 | runs | native |",
        "| 3.12 | 3.3.1 | | fails | |",
        "| 3.13 | 3.2.2 | | not run: no such Python here | |",
        "| 3.13 | 3.3.1 | | not run: no such Python here | |",
    ]
    assert "it broke" in done.stderr
    done = run_matrix(tmp_path, "3.12:3.2.2", "3.10")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2 + 3
    done = run_matrix(tmp_path, "3.9")
    assert done.returncode == 2
    assert "got '3.9'" in done.stderr


def test_a_machine_without_a_card_is_told_so_before_anything_is_installed(tmp_path):
    found = tmp_path / "nvidia-smi"
    found.write_text("#!/bin/sh\nexit 9\n")  # what it does where the driver finds no card
    found.chmod(0o755)
    root = tmp_path / "project"
    (root / "scripts").mkdir(parents=True)
    script = shutil.copy(ROOT / "scripts" / "gpu_check.sh", root / "scripts")
    env = {key: value for key, value in os.environ.items() if key != "DEVICE"}
    run = subprocess.run(
        ["bash", script],
        capture_output=True,
        text=True,
        env={**env, "PATH": f"{tmp_path}:{env['PATH']}"},
        check=False,
    )
    # There is no scripts/setup.sh beside it that could have run.
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("gpu_check: expected a card")
