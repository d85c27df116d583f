"""Processes that read data, for training and for an evaluation."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import paddle
import pytest

from ppvision.data.convert.digit_scenes import write_digit_scenes
from ppvision.engine.reading import BatchReader, ReaderError, _end_workers, read_in_order
from ppvision.engine.seeding import SeededBatches, SeededDataset, collate, count_batches_per_epoch
from ppvision.errors import DataError, PpvisionError
from ppvision.tasks import open_job
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming
from tests.helpers.small_detectors import small_detector, write_detector
from tests.helpers.small_run import NoisyNumbers, build
from tests.helpers.waiting import wait_until


def squared(index: int) -> np.ndarray:
    time.sleep(0.001 * (7 - index % 7))  # not in the order in which they are asked for
    return np.full(3, index**2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_samples_come_in_order_and_workers_go(workers):
    before = multiprocessing.active_children()
    with read_in_order(squared, range(5, 40), workers) as samples:
        first = next(samples)
        assert len(multiprocessing.active_children()) == len(before) + workers
        found = [int(sample[0]) for sample in (first, *samples)]
    assert found == [k**2 for k in range(5, 40)]
    assert multiprocessing.active_children() == before
    with read_in_order(squared, [], workers) as samples:
        assert list(samples) == []


def test_they_are_read_elsewhere():
    with read_in_order(lambda index: os.getpid(), range(9), 2) as samples:
        assert os.getpid() not in set(samples)


class _Odd(Exception):
    """It cannot be made again from what it says."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"odd: {first} {second}")


@pytest.mark.parametrize(
    ("error", "expected"), [(DataError("no. 3"), DataError), (_Odd(3, 4), ReaderError)]
)
def test_an_error_arrives(error, expected):
    def read(index):
        if index == 3:
            raise error
        return index

    with pytest.raises(expected, match="3"), read_in_order(read, range(9), 2) as samples:
        list(samples)
    wait_until(lambda: multiprocessing.active_children() == [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_ends_is_reported(number):
    def read(index):
        if index == 3:
            os.kill(os.getpid(), number)
        return index

    name = {signal.SIGKILL: "SIGKILL", signal.SIGBUS: "/dev/shm"}[number]
    with raises_naming(ReaderError, name, "--num_workers", "0"):  # noqa: SIM117
        with read_in_order(read, range(9), 2) as samples:
            list(samples)
    assert multiprocessing.active_children() == []


def test_a_worker_is_known_to_have_ended_where_another_thread_asks_too(monkeypatch):
    """The system tells one thread, here the other one, which needs a moment to go on."""
    ask, told = os.waitpid, threading.Event()

    def ask_slowly(pid, options):
        found = ask(pid, options)
        if found[0] and threading.current_thread() is not threading.main_thread():
            told.set()
            time.sleep(0.2)
        return found

    monkeypatch.setattr(os, "waitpid", ask_slowly)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    thread = threading.Thread(target=worker.join)
    thread.start()
    worker.kill()
    assert told.wait(30)
    _end_workers([worker])
    assert multiprocessing.active_children() == []
    thread.join()


class _Garbage:
    """It can be collected only; `seen` has the process that did so."""

    seen: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        self.seen.append(os.getpid())


def test_workers_do_not_destroy_what_is_garbage_in_their_parent():
    """Of an earlier loader that would wait for a thread that a worker does not have."""

    def read(index):
        gc.collect()
        return list(_Garbage.seen)

    gc.unfreeze()  # as in a program that never froze anything; tests/conftest.py did
    gc.collect()
    gc.disable()
    try:
        _Garbage.seen.clear()
        _Garbage()
        with read_in_order(read, range(6), 2) as samples:
            assert list(samples) == [[]] * 6
        assert gc.get_freeze_count() == 0
        gc.collect()
    finally:
        gc.enable()
        gc.freeze()
    assert _Garbage.seen == [os.getpid()]


def test_signals_of_the_group_do_not_reach_workers():
    def read(index):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        return index

    with read_in_order(read, range(6), 2) as samples:
        assert list(samples) == list(range(6))


class Killed(NoisyNumbers):
    """A worker that ends in the middle of the run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __getitem__(self, index: int) -> dict:
        if index == 7:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Paddle's
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_training_reports_a_worker_that_ends(tmp_path, number):
    trainer = build(tmp_path / "run", 30, num_workers=2)
    trainer.dataset = Killed(number)
    trainer.batches = trainer._batches(0, 30)
    name = {signal.SIGKILL: "SIGKILL", signal.SIGBUS: "/dev/shm"}[number]
    with raises_naming(ReaderError, name, "--num_workers", "0"):
        trainer.fit()
    assert multiprocessing.active_children() == []


def test_no_worker_is_left_where_the_end_of_each_raises():
    """As Paddle's handler does once a worker has failed; a process with a child would not end."""

    def fail(number: int, frame: object) -> None:
        raise SystemError("a child ended")

    dataset = SeededDataset(NoisyNumbers(), seed=0)
    batches = SeededBatches(dataset, batch_size=4, seed=0, start=0, stop=8)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(ReaderError, match="SIGKILL"):  # noqa: PT012, SIM117
            with BatchReader(dataset, batches, 2, collate) as reader:
                next(iter(reader))
                signal.signal(signal.SIGCHLD, fail)
                os.kill(reader._workers[0].pid, signal.SIGKILL)
                time.sleep(10)
        assert signal.getsignal(signal.SIGCHLD) is fail
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert multiprocessing.active_children() == []


class Odd(NoisyNumbers):
    """Samples with more than the network takes."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.more = more

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(index) | self.more


def read_batches(dataset: SeededDataset, workers: int) -> list[dict]:
    batches = SeededBatches(dataset, batch_size=4, seed=0, start=0, stop=3)
    with BatchReader(dataset, batches, workers, collate) as reader:
        return list(reader)


def test_arrays_without_a_number_come_out_of_workers():
    """The boxes of a picture without objects, of which Paddle's loader makes an error."""
    more = {"boxes": np.zeros((0, 4), np.float32), "classes": np.zeros((2, 0), np.int64)}
    more |= {"nested": {"masks": [np.zeros(0, np.uint8), np.ones(2)]}, "name": "a.png"}
    dataset = SeededDataset(Odd(**more), seed=0)
    here, elsewhere = (read_batches(dataset, workers) for workers in (0, 2))
    assert len(here) == len(elsewhere) == 3
    for first, second in zip(here, elsewhere, strict=True):
        assert first["name"] == second["name"] == ["a.png"] * 4
        pairs = [(first[key], second[key]) for key in ("x", "boxes", "classes")]
        pairs += zip(first["nested"]["masks"], second["nested"]["masks"], strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize(
    ("kind", "workers"), [("uint32", 0), ("uint32", 2), ("U5", 2), ("complex128", 0)]
)
def test_a_type_that_paddle_does_not_take_is_named(tmp_path, kind, workers):
    trainer = build(tmp_path / "run", 3, num_workers=workers)
    trainer.dataset = Odd(more=np.zeros(2, kind))
    trainer.batches = trainer._batches(0, 3)
    with raises_naming(PpvisionError, f"{np.dtype(kind)},", "[4,", "2]:"):
        trainer.fit()
    assert multiprocessing.active_children() == []


_SMALL_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from tests.helpers import small_run
from ppvision.errors import PpvisionError

class Large(small_run.NoisyNumbers):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"z": np.zeros(2**20, np.float32)}

trainer = small_run.build(Path(sys.argv[1]), 6, num_workers=2)
trainer.dataset = Large()
trainer.batches = trainer._batches(0, 6)
try:
    trainer.fit()
except PpvisionError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("options", ["size=6m", "nr_inodes=1"])
def test_small_shared_memory_is_named(tmp_path, options):
    """A /dev/shm of its own; needs the right to mount."""
    script = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$0" -W ignore -c "$1" "$2"'
    command = ["unshare", "-m", "bash", "-c", script, sys.executable, _SMALL_MEMORY]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root: unshare, mount")
    done = subprocess.run(
        [*command, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert "ReaderError" in done.stdout, done.stdout + done.stderr
    assert "/dev/shm" in done.stdout
    assert "--num_workers 0" in done.stdout
    assert "Make room" not in done.stdout


def test_training_leaves_no_thread_and_no_process(tmp_path):
    def threads() -> set:
        return {thread for thread in threading.enumerate() if thread.is_alive()}

    for workers in (0, 2):
        before = threads()
        build(tmp_path / str(workers), 6, num_workers=workers).fit()
        until = time.monotonic() + 30
        while threads() - before:
            assert time.monotonic() < until, threads() - before
            time.sleep(0.01)
        assert multiprocessing.active_children() == []


# -- evaluation ------------------------------------------------------------------------------------


def _watched(monkeypatch, module: str) -> list[int]:
    """The workers that an evaluation asks for."""
    import importlib

    part = importlib.import_module(module)
    whole, asked = part.read_in_order, []

    def read(function, indices, num_workers):
        asked.append(num_workers)
        return whole(function, indices, num_workers)

    monkeypatch.setattr(part, "read_in_order", read)
    return asked


def test_a_segmentation_is_scored_alike(config_file, monkeypatch):
    job = open_job(config_file())
    asked = _watched(monkeypatch, "ppvision.tasks.segmentation.job")
    scores = [job.scores(job.model, num_workers=workers) for workers in (0, 2)]
    assert scores[0] == scores[1]
    assert asked == [0, 2]


def test_a_classification_is_scored_alike(classification_file, monkeypatch):
    job = open_job(classification_file())
    asked = _watched(monkeypatch, "ppvision.tasks.classification.job")
    scores = [job.scores(job.model, num_workers=workers) for workers in (0, 2)]
    assert scores[0] == scores[1]
    assert asked == [0, 2]


def test_a_detection_is_scored_alike(tmp_path, monkeypatch):
    write_digit_scenes(tmp_path / "scenes", count=2, val_count=5, size=56, seed=3)
    config = small_detector(tmp_path / "scenes", "YOLOv3")
    job = open_job(write_detector(tmp_path / "job.yml", config))
    asked = _watched(monkeypatch, "ppvision.tasks.detection.evaluation")
    scores = [job.scores(job.model, num_workers=workers) for workers in (0, 2)]
    assert scores[0] == scores[1]
    assert asked == [0, 2]


# -- lengths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_has_the_batches_of_paddles_sampler(ranks):
    for samples in range(1, 40):
        for batch_size in (1, 2, 5, 8):
            dataset = [None] * samples
            sampler = paddle.io.DistributedBatchSampler(
                dataset, batch_size, num_replicas=ranks, rank=0, shuffle=True, drop_last=True
            )
            assert count_batches_per_epoch(samples, batch_size, ranks) == len(list(sampler))


def test_training_goes_by_the_same_number():
    assert (
        SeededBatches(NoisyNumbers(), 5, 0, 0, 1).per_epoch
        == count_batches_per_epoch(26, 5, 1)
        == 5
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_epochs_are_counted_without_a_look_at_the_pictures(config_file, monkeypatch, ranks):
    from ppvision.tasks.segmentation import job as segmentation

    def looked(*_: object, **__: object) -> None:
        raise AssertionError("the data set was checked")

    monkeypatch.setattr(segmentation, "check_segmentation_list", looked)
    monkeypatch.setattr(paddle.distributed, "get_world_size", lambda: ranks)
    config = config_file(lambda c: c["train_dataset"].update(train_path="nowhere.txt"))
    open_job(config, epochs=3)  # nothing is read yet
    job = open_job(config_file(), epochs=3)
    assert job.iters == {1: 3 * 3, 2: 3 * 1}[ranks]  # 12 scenes, 4 a batch and rank
    assert job.content["iters"] == job.iters
