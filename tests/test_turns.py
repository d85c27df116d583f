"""`benchmark/turns.py` and the benchmarks that it drives, on small cases."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmark import deploy_latency, training_step
from benchmark.turns import Worker, end_afterwards, in_turn
from tests.helpers.messages import raises_naming

SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import numpy as np
from benchmark.turns import answer

def make():
    print("a library's greeting")
    if sys.argv[2] == "fails":
        raise SystemExit(3)
    held = np.ones(int(sys.argv[2]) << 20, np.uint8)
    return lambda: [held[:3] * 2]

answer(make)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.turns.PAUSE", 0.0)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_workers_answer_in_turn_and_end(script, tmp_path):
    made = [Worker("small", script, [1], 1), Worker("large", script, [301], 1)]
    with end_afterwards(made):
        made[0](f"save {tmp_path / 'out.npz'}")
        times, last = in_turn(made, 1, 3)
    assert [len(times[name]) for name in ("small", "large")] == [3, 3]
    assert all(ms >= 0 for values in times.values() for ms in values)
    for name in ("peak", "resident"):
        assert 250 < last["large"][name] - last["small"][name] < 350  # MiB; 300 more are held
    assert abs(last["large"]["imports"] - last["small"]["imports"]) < 50
    with np.load(tmp_path / "out.npz") as arrays:
        assert [arrays[name].tolist() for name in arrays.files] == [[2, 2, 2]]
    assert all(worker.process.poll() is not None for worker in made)


def test_a_worker_that_ends_is_an_error(script):
    ended = raises_naming(RuntimeError, "broken:", "3")
    with end_afterwards([Worker("broken", script, ["fails"], 1)]) as (worker,), ended:
        worker()


def rows_of(module, monkeypatch, results: Path, *flags: object) -> list[dict[str, str]]:
    arguments = [module.__name__, "--results", results, "--repeats", 1, "--threads", 1, *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    monkeypatch.setattr("benchmark.turns.PAUSE", 0.0)
    module.main()
    with results.open() as file:
        return list(csv.DictReader(file))


def test_training_step(monkeypatch, tmp_path):
    flags = ("--models", "pale_nano", "--forms", "plain", "engine", "--side", 32, "--batch", 1)
    rows = rows_of(training_step, monkeypatch, tmp_path / "results.csv", *flags)
    assert [row["form"] for row in rows] == ["plain", "engine"]
    for row in rows:
        assert float(row["p10_ms"]) <= float(row["median_ms"]) <= float(row["p90_ms"])
        assert row["over_torch"] == ""
        assert "cores" in row["machine"]


@pytest.mark.all
def test_deploy_latency(monkeypatch, tmp_path):
    monkeypatch.setattr(deploy_latency, "ENGINES", ("paddle", "onednn", "onnx"))
    flags = ("--models", "pale_nano", "--tasks", "classification", "--batches", 1)
    flags += ("--work_dir", tmp_path / "work")
    rows = rows_of(deploy_latency, monkeypatch, tmp_path / "results.csv", *flags)
    assert [row["engine"] for row in rows] == ["paddle", "onednn", "onnx"]
    paddle, *others = (float(row["median_ms"]) for row in rows)
    assert float(rows[0]["paddle_over_it"]) == 1
    for row, other in zip(rows[1:], others, strict=True):
        assert float(row["paddle_over_it"]) == pytest.approx(paddle / other, rel=0.01)
    assert all(float(row["limit_ms"]) > 0 for row in rows)
