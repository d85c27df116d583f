"""Signals and kills: a run stops where it can go on, and nothing of it stays behind."""

import contextlib
import itertools
import multiprocessing
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml

from ppvision.cli import run
from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.reading import _protect_worker
from ppvision.engine.stopping import SAME_REQUEST, STOP_SIGNALS, TrainingStopped
from tests.helpers import small_run
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming
from tests.helpers.run_ends import STEPS, assert_same_end
from tests.helpers.small_run import NoisyNumbers, build

PATIENCE = 60  # seconds; ten times what it takes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping") / "whole"
    build(folder, STEPS).fit()
    return folder


@pytest.fixture(scope="module", autouse=True)
def server():
    """A process that has imported Paddle, and forks: a start of Paddle takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.small_run"])
    yield context
    forkserver._forkserver._stop()


def _start(words: list[str], output: Path, ignored: list[int]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in any program
    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = words
    sys.exit(small_run.main())


class Run:
    """`small_run` in a session of its own, as a terminal or a cluster's manager holds it."""

    def __init__(self, folder: Path, words: tuple[str, ...], ignored: list[int]) -> None:
        output = folder.with_name(f"output {time.monotonic_ns()}")
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_start, args=(["small_run", str(folder), str(STEPS), *words], output, ignored)
        )
        self.process.start()
        self.output = output

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def workers(self) -> list[int]:
        lines = [line.split()[1:] for line in self.text.splitlines() if "workers " in line]
        return [int(pid) for line in lines for pid in line]

    def until(self, word: str) -> None:
        """Wait for a line that begins with `word`, which must come."""
        until = time.monotonic() + PATIENCE
        while not any(line.startswith(word) for line in self.text.splitlines()):
            assert self.process.is_alive(), self.text
            assert time.monotonic() < until, self.text
            time.sleep(0.01)

    def send(self, number: int, *, group: bool = True) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """Its exit code: negative for a signal that killed it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.text
        return self.process.exitcode


@contextlib.contextmanager
def running(folder: Path, *words: str, ignored: list[int] = ()) -> Iterator[Run]:
    ours = Run(folder, words, list(ignored))
    try:
        yield ours
    finally:
        ours.process.kill()
        ours.process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ours.process.pid, signal.SIGKILL)
        ours.process.close()


def lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def assert_ended(pids: list[int]) -> None:
    until = time.monotonic() + PATIENCE
    while any(map(lives, pids)):
        assert time.monotonic() < until, f"still there: {[p for p in pids if lives(p)]}"
        time.sleep(0.02)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    found = list_checkpoints(folder / "checkpoints")
    return int(found[-1].name[5:]) if found else 0


@pytest.mark.parametrize(
    ("kills", "stops"), [(3, 2), pytest.param(30, 10, marks=pytest.mark.all)], ids=["few", "many"]
)
def test_kills_and_signals_at_any_moment_change_no_bit(uninterrupted, tmp_path, kills, stops):
    """Each start follows at once, and the workers of the run before it end by themselves."""
    rng = random.Random(8)
    folder = tmp_path / "run"
    numbers = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    rng.shuffle(numbers)
    workers: list[int] = []
    ends = 0
    for number in numbers:
        if newest(folder) == STEPS:  # it came to its end: once more
            shutil.rmtree(folder)
        with running(folder, "slow", "workers") as ours:
            ours.until("training")
            # A step takes 40 ms: kills are at least a checkpoint apart as often as not.
            time.sleep(rng.uniform(0.0, 0.5))
            with contextlib.suppress(ProcessLookupError):  # it came to its end just now
                ours.send(number, group=number == signal.SIGTERM)
            code = ours.end()
        assert "another process" not in ours.text
        if "done" in ours.text:
            ends += 1
            continue
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 143), ours.text
        if code == 143:
            assert "go on with --resume auto" in ours.text or "start again" in ours.text
        workers += ours.workers
    with running(folder, "workers") as ours:
        assert ours.end() == 0, ours.text
    assert ends <= len(numbers) // 4
    assert workers
    assert_ended(workers)
    assert_same_end(folder, uninterrupted)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.all)]
)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(uninterrupted, tmp_path, number):
    """Sent to the whole group, twice: a terminal's Ctrl-C, `timeout`, a cluster's manager."""
    with running(tmp_path / "run", "slow", "workers") as ours:
        ours.until("workers")
        time.sleep(0.2)
        ours.send(number)
        ours.send(number, group=False)
        assert ours.end() == 128 + number, ours.text
    step = newest(tmp_path / "run")
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {step}; go on with --resume auto" in ours.text
    assert_ended(ours.workers)
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "words",
    [["stuck=sample", "workers"], pytest.param(["stuck=sample"], marks=pytest.mark.all)],
)
def test_a_signal_does_not_wait_for_a_sample(uninterrupted, tmp_path, words):
    with running(tmp_path / "run", *words) as ours:
        ours.until("stuck")
        time.sleep(0.3)  # steps before that sample
        ours.send(signal.SIGTERM)
        assert ours.end() == 143, ours.text
    assert_ended(ours.workers)
    assert newest(tmp_path / "run") not in (0, STEPS)
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_signal_does_not_wait_for_an_evaluation(uninterrupted, tmp_path):
    with running(tmp_path / "run", "stuck=evaluation", "workers") as ours:
        ours.until("stuck")
        ours.send(signal.SIGTERM)
        assert ours.end() == 143, ours.text
    assert "after step 3; go on" in ours.text
    build(tmp_path / "run", STEPS, resume="auto").fit()  # which owes that evaluation
    assert_same_end(tmp_path / "run", uninterrupted)


def test_a_second_signal_ends_at_once(uninterrupted, tmp_path):
    with running(tmp_path / "run", "stuck=step", "workers") as ours:
        ours.until("stuck")
        ours.send(signal.SIGTERM)
        time.sleep(SAME_REQUEST + 0.5)
        assert ours.process.is_alive()
        ours.send(signal.SIGTERM)
        assert ours.end() == -signal.SIGTERM  # which a shell calls 143
    assert newest(tmp_path / "run") == 3
    assert_ended(ours.workers)
    build(tmp_path / "run", STEPS, resume="auto").fit()
    assert_same_end(tmp_path / "run", uninterrupted)


def test_what_is_ignored_stays_ignored(uninterrupted, tmp_path):
    """As `nohup` leaves it."""
    with running(tmp_path / "run", "slow", "workers", ignored=[signal.SIGHUP]) as ours:
        ours.until("workers")
        ours.send(signal.SIGHUP)
        assert ours.end() == 0, ours.text
    assert_same_end(tmp_path / "run", uninterrupted)


def test_the_readers_of_a_killed_trainer_end(tmp_path):
    with running(tmp_path / "run", "stuck=sample", "workers") as ours:
        ours.until("stuck")
        ours.until("workers")
        assert len(ours.workers) == 2
        ours.send(signal.SIGKILL, group=False)
        ours.end()
        assert_ended(ours.workers)
        if Path("/dev/shm").is_dir():  # nor does their memory stay
            names = [p.name for p in Path("/dev/shm").iterdir()]
            assert not [n for n in names for pid in ours.workers if n.startswith(f"paddle_{pid}_")]


def _write_without_end(ready) -> None:
    """A worker that puts one batch after another into shared memory."""
    _protect_worker()
    for number in itertools.count():
        Path(f"/dev/shm/paddle_{os.getpid()}_{number}").touch()
        time.sleep(1e-4)
        if number == 50:
            ready.send(os.getpid())


def _start_writers(ready) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        context.Process(target=_write_without_end, args=(ready,)).start()
    time.sleep(PATIENCE)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_no_batch_comes_after_the_last_look(server):
    here, there = server.Pipe()
    parent = server.Process(target=_start_writers, args=(there,))
    parent.start()
    workers = [here.recv() for _ in range(2)]
    parent.kill()
    parent.join()
    assert_ended(workers)
    assert not [path for pid in workers for path in Path("/dev/shm").glob(f"paddle_{pid}_*")]


def signalled(trainer, step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""
    whole = trainer._step

    def stepped(network, batches):
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return whole(network, batches)

    trainer._step = stepped


@pytest.mark.parametrize("workers", [0, 2])
def test_python_gets_an_exception_and_its_handlers_back(uninterrupted, tmp_path, workers):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    trainer = build(tmp_path / "run", STEPS, num_workers=workers)
    signalled(trainer, 4, signal.SIGINT)
    with raises_naming(TrainingStopped, "SIGINT", "step", "4") as caught:
        trainer.fit()
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.signal_number == signal.SIGINT
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoints" / "step_4"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    again = build(tmp_path / "run", STEPS, resume="auto", num_workers=workers)
    assert again.progress.step == 4
    again.fit()
    assert_same_end(tmp_path / "run", uninterrupted)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_the_programs_own_handler_is_left_alone(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer = build(tmp_path / "run", 6)
        signalled(trainer, 2, signal.SIGTERM)
        assert trainer.fit().step == 6
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_another_thread_trains_without_handlers(tmp_path):
    found = []
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def fit() -> None:
        trainer = build(tmp_path / "run", 6)
        whole = trainer._step

        def stepped(network, batches):
            found.append([signal.getsignal(number) for number in STOP_SIGNALS])
            return whole(network, batches)

        trainer._step = stepped
        trainer.fit()

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join(PATIENCE)
    assert found == [before] * 6
    assert newest(tmp_path / "run") == 6


def test_a_signal_before_the_first_step_leaves_no_run_to_go_on_from(tmp_path):
    trainer = build(tmp_path / "run", STEPS)
    whole, sent = NoisyNumbers.__getitem__, []

    def killed(self, index):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(0.5)
        return whole(self, index)

    trainer.dataset = type("Killed", (NoisyNumbers,), {"__getitem__": killed})()
    trainer.batches = trainer._batches(0, STEPS)
    with raises_naming(TrainingStopped, "SIGTERM", "first", "again") as caught:
        trainer.fit()
    assert caught.value.checkpoint is None
    build(tmp_path / "run", 3).fit()  # without --resume


def test_the_command_line_ends_with_128_and_the_signal(config_file, tmp_path, monkeypatch, capsys):
    from ppvision.engine.trainer import Trainer

    whole = Trainer._step

    def stepped(self, network, batches):
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, network, batches)

    monkeypatch.setattr(Trainer, "_step", stepped)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    command = ["train", "-c", str(config_file()), "--save_dir", str(tmp_path / "run"), "--iters"]
    try:
        assert run([*command, "4", "--num_workers", "1"]) == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    path = tmp_path / "run" / "checkpoints" / "step_2"
    assert lines == [
        f"ppvision: stopped by SIGTERM after step 2; go on with --resume auto ({path})"
    ]
    monkeypatch.undo()
    assert run([*command, "4", "--resume", "auto"]) == 0
    assert newest(tmp_path / "run") == 4


@pytest.mark.all
@pytest.mark.parametrize("what", ["closed", "Ctrl-C"])
def test_a_terminal(config_file, tmp_path, what):
    config, folder = config_file(lambda c: c.update(iters=5000)), tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-m", "ppvision", "train", "-c", str(config)]
    command += ["--save_dir", str(folder), "--num_workers", "1", "--save_interval", "2"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, command)
    text = b""
    while newest(folder) < 2:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 4096)
    if what == "closed":
        os.close(terminal)
    else:
        os.write(terminal, b"\x03")
        with contextlib.suppress(OSError):  # it ends with its last process
            while True:
                text += os.read(terminal, 4096)
        os.close(terminal)
        assert text.count(b"go on with --resume auto") == 1
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (129 if what == "closed" else 130)


def launched(config: Path, folder: Path, *flags: object) -> subprocess.Popen:
    """Two ranks, as scripts/train.sh starts them."""
    command = [
        *(sys.executable, "-m", "ppvision.engine.launch"),
        *("--nproc_per_node", 2, "--backend", "gloo", "--log_dir", folder.with_name("logs")),
        *(ROOT / "ppvision" / "__main__.py", "train", "--config", config, "--save_dir", folder),
        *flags,
    ]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(launcher: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == launcher:
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.all),
        pytest.param(signal.SIGHUP, marks=pytest.mark.all),
    ],
)
def test_two_ranks_stop_at_one_step(classification_file, tmp_path, number):
    def change(config: dict) -> None:
        config["iters"] = 5000
        config["batch_size"] = 2
        config["model"] = {"type": "resnet20", "num_classes": 3}

    config, folder = classification_file(change), tmp_path / "run"
    launcher = launched(config, folder, "--num_workers", 1, "--save_interval", 2)
    try:
        until = time.monotonic() + 4 * PATIENCE
        while not list_checkpoints(folder / "checkpoints"):
            assert time.monotonic() < until
            assert launcher.poll() is None, launcher.communicate()[0]
            time.sleep(0.1)
        ranks = ranks_of(launcher.pid)
        assert len(ranks) == 2
        launcher.send_signal(number)
        text, _ = launcher.communicate(timeout=2 * PATIENCE)
    finally:
        launcher.kill()
    assert_ended(ranks)
    logs = "\n".join(p.read_text() for p in sorted((tmp_path / "logs").glob("workerlog.*")))
    if number == signal.SIGKILL:
        assert launcher.returncode == -signal.SIGKILL
    else:
        assert launcher.returncode == 128 + number, text
        assert "ppvision: stopped by SIGTERM after step" in logs, logs
        assert f"step_{newest(folder)})" in logs
    step = newest(folder)
    content = yaml.safe_load((folder / "config.yml").read_text())
    assert content["iters"] == 5000
    flags = ("--num_workers", 1, "--iters", step + 2, "--resume", "auto")
    again = launched(config, folder, *flags)  # at once
    text, _ = again.communicate(timeout=4 * PATIENCE)
    logs = "\n".join(p.read_text() for p in sorted((tmp_path / "logs").glob("workerlog.*")))
    assert again.returncode == 0, text + logs
    assert newest(folder) == step + 2
