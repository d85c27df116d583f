"""Killed runs go on as if nothing had happened; damaged checkpoints are refused."""

import csv
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppvision.engine.callbacks import Callback
from ppvision.engine.checkpoint import CheckpointError, list_checkpoints
from ppvision.engine.seeding import SeededBatches, SeededDataset
from ppvision.run_folder import read_metrics
from tests.conftest import ROOT
from tests.small_run import NoisyNumbers, build
from tests.test_segmentation import records

STEPS = 30
COSTS = ("Train/batch_cost", "Train/reader_cost")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "whole"
    build(folder, STEPS).fit()
    return folder


def numbers(folder) -> list:
    """What a run recorded, without its timings."""
    return [row for row in read_metrics(folder / "metrics.csv") if row[1] not in COSTS]


def assert_same_end(folder, expected) -> None:
    for name in ("model", "optimizer", "ema"):
        ours, theirs = (
            load_file(f / "checkpoints" / f"step_{STEPS}" / f"{name}.safetensors")
            for f in (folder, expected)
        )
        assert ours.keys() == theirs.keys()
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")
    assert numbers(folder) == numbers(expected)
    points = [(v.id, v.tag) for v in records(folder) if v.WhichOneof("one_value") == "value"]
    assert sorted(points) == sorted((s, t) for s, t, _ in read_metrics(folder / "metrics.csv"))


def start(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.small_run", str(folder), str(STEPS), "slow"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any(line == "training\n" for line in process.stdout)
    return process


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(uninterrupted, tmp_path):
    rng = random.Random(4)
    kills = 0
    while True:
        process = start(tmp_path / "run")
        if kills < 4:
            time.sleep(rng.uniform(0.05, 0.9))
            process.send_signal(signal.SIGKILL)
            kills += 1
        rest = process.communicate()[0]
        if "done" in rest:
            break
    assert kills >= 2
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_run_killed_in_the_middle_of_a_save(uninterrupted, tmp_path):
    """Stop a save after each of its files: the older checkpoint is what counts."""
    import ppvision.engine.checkpoint as checkpoint

    for after in (1, 2, 3):
        folder = tmp_path / str(after)
        saved, calls = checkpoint.save_weights, []

        def save_some(arrays, path, *, saved=saved, calls=calls, after=after):
            saved(arrays, path)
            calls.append(path)
            if len(calls) == 3 + after:  # 3 files a checkpoint: in the middle of the second one
                raise SystemExit("killed")

        checkpoint.save_weights = save_some
        try:
            with pytest.raises(SystemExit):
                build(folder, STEPS).fit()
        finally:
            checkpoint.save_weights = saved
        # A killed process cannot clean up: leave the rubbish that it would leave.
        rubbish = folder / "checkpoints" / ".step_6.partial"
        rubbish.mkdir(exist_ok=True)
        (rubbish / "model.safetensors").write_bytes(b"half")
        assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_3"]
        build(folder, STEPS, resume="auto").fit()
        assert_same_end(folder, uninterrupted)


def test_two_runs_with_one_seed_are_one(uninterrupted, tmp_path):
    build(tmp_path / "again", STEPS).fit()
    assert_same_end(tmp_path / "again", uninterrupted)
    build(tmp_path / "other", STEPS, seed=1).fit()
    assert numbers(tmp_path / "other") != numbers(uninterrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_offered(
    uninterrupted, tmp_path, name, damage
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoints" / f"step_{STEPS}" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-7])
    elif damage == "flipped":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    with pytest.raises(CheckpointError) as caught:
        build(folder, STEPS, resume="auto")
    assert name in str(caught.value)
    assert f"step_{STEPS - 3}" in str(caught.value)
    older = folder / "checkpoints" / f"step_{STEPS - 3}"
    build(folder, STEPS, resume=str(older)).fit()
    assert_same_end(folder, uninterrupted)


def test_a_checkpoint_of_another_model_is_refused(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    path = folder / "checkpoints" / f"step_{STEPS}" / "state.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CheckpointError, match=f"step_{STEPS}"):
        build(folder, STEPS, resume="auto")
    with pytest.raises(FileNotFoundError, match="step_27"):
        build(folder, STEPS, resume=str(tmp_path / "nowhere"))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    import ppvision.engine.checkpoint as checkpoint

    saved = checkpoint.save_weights

    def full(arrays, path):
        if "step_6" in str(path):
            raise OSError(28, "No space left on device", str(path))
        saved(arrays, path)

    monkeypatch.setattr(checkpoint, "save_weights", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "run", STEPS).fit()
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_3"]


def test_checkpoints_hold_no_pickle_and_only_as_many_as_wanted(uninterrupted):
    folder = uninterrupted / "checkpoints"
    assert [p.name for p in list_checkpoints(folder)] == ["step_24", "step_27", "step_30"]
    state = json.loads((folder / "step_30" / "state.json").read_text())
    assert state["step"] == 30
    arrays = {f"{n}.safetensors" for n in ("model", "optimizer", "ema")}
    assert set(state["files"]) == {*arrays, "config.yml"}
    assert {p.name for p in (folder / "step_30").iterdir()} == {*state["files"], "state.json"}
    assert (state["epoch"], state["batch"], state["batches_per_epoch"]) == (5, 0, 6)
    assert state["evaluated"] == 30
    assert state["best_score"] == max(
        value for _, tag, value in read_metrics(uninterrupted / "metrics.csv") if "Train" not in tag
    )


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    trainer = build(tmp_path / "run", STEPS)
    whole = trainer.compute_losses

    def poisoned(network, batch):
        losses = whole(network, batch)
        return [x * math.nan for x in losses] if trainer.progress.step == 5 else losses

    trainer.compute_losses = poisoned
    with pytest.raises(FloatingPointError, match=r"step 5, learning rate 0\.0"):
        trainer.fit()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) <= 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_does_not_read_stops_the_run_by_name(tmp_path, num_workers):
    trainer = build(tmp_path / "run", STEPS, num_workers=num_workers)

    class OneGone(NoisyNumbers):
        file_list = tuple((f"picture_{i}.jpg",) for i in range(26))

        def __getitem__(self, index):
            if index == 7:
                raise AttributeError("'NoneType' object has no attribute 'astype'")
            return super().__getitem__(index)

    trainer.dataset = OneGone()
    with pytest.raises(RuntimeError, match=r"picture_7\.jpg.*NoneType"):
        trainer.fit()


def test_every_step_trains_whatever_came_before_it(tmp_path, monkeypatch):
    """Evaluation, and whatever shows pictures, may leave the model in evaluation mode."""
    trainer = build(tmp_path / "run", 7)
    modes, whole = [], trainer.compute_losses

    def watched(network, batch):
        modes.append(network.training and all(layer.training for layer in network.sublayers()))
        return whole(network, batch)

    class LeavesEvaluationMode(Callback):
        def on_evaluate(self, step, scores):
            trainer.model.eval()

    trainer.compute_losses = watched
    trainer.callbacks.append(LeavesEvaluationMode())
    trainer.fit()
    assert modes == [True] * 7


def test_an_evaluation_that_fails_costs_no_steps(tmp_path):
    trainer = build(tmp_path / "run", STEPS)

    def fails(model):
        raise KeyError("no such option")

    trainer.evaluate = fails
    with pytest.raises(KeyError):
        trainer.fit()
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_3"]


def test_a_cut_record_does_not_block_a_resume(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS}")
    (record,) = (folder / "vdl").iterdir()
    record.write_bytes(record.read_bytes()[:-7])
    build(folder, STEPS, resume="auto").fit()
    assert_same_end(folder, uninterrupted)


def test_batches_are_those_of_paddle_and_go_on_anywhere():
    dataset = NoisyNumbers()
    stock = paddle.io.DistributedBatchSampler(dataset, 4, shuffle=True, drop_last=True)
    expected = [batch for _ in range(3) for batch in stock]
    ours = [[i for _, i in batch] for batch in SeededBatches(dataset, 4, 0, 0, 18)]
    assert ours == expected
    for begin in (1, 6, 7, 13):
        rest = [[i for _, i in batch] for batch in SeededBatches(dataset, 4, 0, begin, 18)]
        assert rest == expected[begin:]
    with pytest.raises(ValueError, match="batch_size=30"):
        SeededBatches(dataset, 30, 0, 0, 1)


def test_a_sample_does_not_depend_on_when_it_is_read():
    dataset = SeededDataset(NoisyNumbers(), seed=2)
    first = dataset[3, 5]["x"]
    random.random()
    np.random.normal(size=7)
    dataset[3, 6]
    np.testing.assert_array_equal(dataset[3, 5]["x"], first)
    assert not np.array_equal(dataset[4, 5]["x"], first)
