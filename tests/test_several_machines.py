"""Launchers as scripts/train.sh starts them on two machines, here on one: over gloo, each in a
folder of its own, so that the second has no file of the run."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppvision.engine import launch
from ppvision.engine.checkpoint import list_checkpoints
from tests.helpers.configs import ROOT
from tests.helpers.scripts import words_of

PATIENCE = 300  # seconds


def write_config(classification_file) -> Path:
    def change(config: dict) -> None:
        config["imports"].append("tests.helpers.report_ranks")
        config["batch_size"] = 2
        config["model"] = {"type": "resnet20", "num_classes": 3}

    return classification_file(change)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def machine(folder: Path, config: Path, port: int, rank: int, *flags: object) -> subprocess.Popen:
    """A launcher of one process, which starts again twice at most."""
    here = folder / f"machine{rank}"
    here.mkdir(parents=True, exist_ok=True)
    tries = len(list(folder.glob("words*")))
    words = words_of(
        *(folder / f"words{tries}", "train.sh", config, "--save_dir", "run", *flags),
        NNODES=2,
        MASTER=f"localhost:{port}",  # a name, as Slurm and Kubernetes give: Paddle takes only IPs
        NODE_RANK=rank,
        NPROC=1,
        MAX_RESTART=2,
        LOG_DIR="logs",
    )
    with (folder / f"machine{rank}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PPVISION_REPORT": str(folder / "report")},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def what_they_said(folder: Path) -> str:
    logs = [*folder.glob("*.log"), *folder.glob("machine*/logs/workerlog.*")]
    return "\n".join(f"{path}:\n{path.read_text()}" for path in logs)


def wait_for_both(folder: Path, machines: list[subprocess.Popen]) -> None:
    try:
        codes = [launcher.wait(PATIENCE) for launcher in machines]
    finally:
        for launcher in machines:
            launcher.kill()
    assert codes == [0, 0], what_they_said(folder)


def train(folder: Path, config: Path, *flags: object) -> None:
    port = free_port()
    wait_for_both(folder, [machine(folder, config, port, rank, *flags) for rank in (0, 1)])


def reports(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(folder / f"report.{rank}.npz")) for rank in (0, 1)]


def test_two_machines_train_one_model(classification_file, tmp_path):
    config = write_config(classification_file)
    train(tmp_path, config, "--iters", 3, "--save_interval", 3)
    assert not (tmp_path / "machine1" / "run").exists()
    first, second = reports(tmp_path)
    saved = load_file(tmp_path / "machine0/run/checkpoints/step_3/model.safetensors")
    statistics = [name for name in saved if name.endswith(("_mean", "_variance"))]
    assert len(statistics) == 2 * 19  # resnet20: a norm behind each of its 19 convolutions
    for name in saved:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_array_equal(first[name], saved[name], err_msg=name)
        own = np.float64([first[f"own|{name}"], second[f"own|{name}"]])
        if name in statistics:
            assert not np.array_equal(*own), name  # each rank has seen its own batches
            np.testing.assert_allclose(saved[name], own.mean(0), rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_array_equal(*own, err_msg=name)


@pytest.mark.all
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_is_lost_and_comes_back(classification_file, tmp_path, lost):
    """The launcher that stays starts again by itself, and both go on from the last checkpoint: all
    ends as if nothing had happened."""
    config = write_config(classification_file)
    flags = ("--iters", 40, "--save_interval", 2, "--keep_checkpoint_max", 50)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, config, *flags)
    port = free_port()
    machines = [machine(broken, config, port, rank, *flags) for rank in (0, 1)]
    checkpoints = broken / "machine0" / "run" / "checkpoints"
    until = time.monotonic() + PATIENCE
    while len(list_checkpoints(checkpoints)) < 2:
        assert time.monotonic() < until, what_they_said(broken)
        time.sleep(0.1)
    machines[lost].kill()
    machines[lost].wait()
    assert len(list_checkpoints(checkpoints)) < 20, "it was done before"
    stays = broken / f"machine{1 - lost}.log"
    while "continues from the newest checkpoint" not in stays.read_text():
        assert time.monotonic() < until, what_they_said(broken)
        time.sleep(0.1)
    machines[lost] = machine(broken, config, port, lost, *flags, "--resume", "auto")
    wait_for_both(broken, machines)
    logs = what_they_said(broken)
    assert "resume: continuing from run/checkpoints/step_" in logs
    for before, after in zip(reports(whole), reports(broken), strict=True):
        for name in before:
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.all
def test_a_signal_to_one_machine_stops_both_for_good(classification_file, tmp_path):
    config, port = write_config(classification_file), free_port()
    flags = ("--iters", 5000, "--save_interval", 2)
    machines = [machine(tmp_path, config, port, rank, *flags) for rank in (0, 1)]
    checkpoints = tmp_path / "machine0" / "run" / "checkpoints"
    until = time.monotonic() + PATIENCE
    while not list_checkpoints(checkpoints):
        assert time.monotonic() < until, what_they_said(tmp_path)
        time.sleep(0.1)
    machines[1].terminate()
    try:
        codes = [launcher.wait(PATIENCE) for launcher in machines]
    finally:
        for launcher in machines:
            launcher.kill()
    assert codes == [143, 143], what_they_said(tmp_path)
    assert "continues from the newest checkpoint" not in what_they_said(tmp_path)


@pytest.mark.parametrize(
    "words", [["--master", "train-0:6170"], ["--master=train-0:6170"]], ids=["two", "one"]
)
def test_the_master_is_asked_for_until_its_name_is_known(monkeypatch, words):
    asked = []

    def look_up(host: str) -> str:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return "10.0.0.7"

    monkeypatch.setattr(launch, "_ASK_EVERY", 0)
    monkeypatch.setattr(socket, "gethostbyname", look_up)
    assert launch.resolve_master([*words, "x.py"]) == ["--master", "10.0.0.7:6170", "x.py"]
    assert asked == ["train-0"] * 3
    etcd = ["--master", "etcd://train-0:2379", "x.py"]
    assert launch.resolve_master(etcd) == etcd


def test_a_master_without_an_address_is_an_error(monkeypatch):
    def look_up(host: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(launch, "_KNOWN_AFTER", 0)
    monkeypatch.setattr(socket, "gethostbyname", look_up)
    words = ["--nnodes", "2", "--master", "tarin-0:6170", "x.py"]
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    with pytest.raises(SystemExit, match="'tarin-0'"):
        launch.main()
