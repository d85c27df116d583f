"""`scripts/train_weights.sh`: one piece of a long training."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.configs import ROOT

# Stands for Python: writes down what it was called with, and trains as long as the test says.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@" >"$CALLS"
trap 'echo stopped >>"$CALLS"; exit 143' TERM
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE"
"""


@pytest.fixture
def train(tmp_path):
    scripts, programs = tmp_path / "scripts", tmp_path / "bin"
    scripts.mkdir()
    programs.mkdir()
    (scripts / "setup.sh").write_text("")  # would install
    source = ROOT / "scripts" / "train_weights.sh"
    (scripts / "train_weights.sh").write_text(source.read_text())
    (programs / "python").write_text(PYTHON)
    (programs / "python").chmod(0o755)

    def run(*arguments, **environment) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        defaults = {"CALLS": str(calls), "TENTHS": "1", "CODE": "0", "PPVISION_RUNS": "/runs"}
        given = {**os.environ, **defaults, **environment}
        given["PATH"] = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(scripts / "train_weights.sh"), *arguments],
            env={key: value for key, value in given.items() if value},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


def test_a_piece_goes_on_in_the_runs_folder_on_one_thread(train):
    code, _, call = train("configs/classification/some_net.yml", "--use_ema")
    assert code == 0
    assert call[0] == "OMP_NUM_THREADS=1"
    assert call[1:4] == ["-m", "ppvision", "train"]
    assert " ".join(call[4:]) == (
        "--config configs/classification/some_net.yml --save_dir /runs/some_net --resume auto "
        "--device cpu --do_eval --use_ema"
    )


def test_time_that_is_over_is_told_from_a_failure(train):
    code, error, call = train("a.yml", PIECE="0.5s", TENTHS="50", NAME="other")
    assert code == 75
    assert "Run the same command again" in error
    assert call[-1] == "stopped"  # by SIGTERM
    assert "/runs/other" in call
    code, error, _ = train("a.yml", CODE="3")
    assert code == 3
    assert "again" not in error


def test_what_it_needs(train):
    code, error, call = train("a.yml", PPVISION_RUNS="")
    assert (code, call) == (1, [])
    assert "PPVISION_RUNS" in error
    code, error, _ = train()
    assert code == 2
    assert "train_weights.sh CONFIG" in error


def test_the_shown_command_names_a_config_that_is_there():
    text = (ROOT / "configs/classification/pale_nano_tiny_imagenet_100.yml").read_text()
    (named,) = [w for w in text.split() if w.startswith("configs/") and w.endswith(".yml")]
    assert Path(ROOT / named).is_file()
