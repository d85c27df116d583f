"""Processes that read data. None runs longer than the process that started it, and none reacts to a
signal for that process."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import util
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import paddle

from ppvision.engine.stopping import STOP_SIGNALS
from ppvision.errors import PpvisionError, shorten_text

Sample = TypeVar("Sample")

# Seconds to wait for readers that were asked to end. Then processes are killed, and a reading
# thread (without processes) is left to itself.
PATIENCE = 1.0

_BEGAN = time.time()

# Wakes the main thread of a worker whose parent has ended; a worker does not use it otherwise.
_PARENT_ENDED = signal.SIGUSR2

_CLOCK_TICK = 0.1  # seconds; times of files are those of the kernel's last tick, up to 10 ms ago

# Entries of the queue of a `BatchReader` other than batches.
_END, _WOKEN = object(), object()


class ReaderError(PpvisionError, RuntimeError):
    """A process that reads data has ended, or could not be started."""


# -- inside a worker ----------------------------------------------------------------------------


def _protect_worker(_: int = 0) -> None:
    """Prepare a process that reads data; call this first in it.

    Ctrl-C, a closed terminal and a cluster's manager signal the whole process group. The training
    process decides what to do, and stops its readers itself.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by `_started_workers`
    # If the parent has ended, this thread or Paddle's own loop ends the worker, depending on which
    # is first.
    parent, began = os.getppid(), time.time()
    signal.signal(_PARENT_ENDED, lambda *_: _end_orphan(began))
    util.Finalize(None, _free_memory_of_orphan, args=(parent, began), exitpriority=0)
    threading.Thread(target=_end_with_parent, args=(began,), daemon=True).start()


def _end_with_parent(began: float) -> None:
    multiprocessing.parent_process().join()
    # The main thread ends the process, so that it cannot put another batch into shared memory after
    # the last check there. While it waits in C, it does not react, but it also makes no batch.
    signal.pthread_kill(threading.main_thread().ident, _PARENT_ENDED)
    time.sleep(PATIENCE)
    _end_orphan(began)


def _end_orphan(began: float) -> None:
    _free_shared_memory(os.getpid(), began)
    os._exit(1)


def _free_memory_of_orphan(parent: int, began: float) -> None:
    if os.getppid() != parent:
        _free_shared_memory(os.getpid(), began)


def _free_shared_memory(worker: int, began: float) -> None:
    """Remove batches that a worker of Paddle's loader has put into shared memory and no process
    will read. They would stay until the machine restarts.

    Args:
        worker: process id of the worker.
        began: start time of the worker, or of the process that started it.
    """
    for path in Path("/dev/shm").glob(f"paddle_{worker}_*"):
        with contextlib.suppress(OSError):
            # Older ones may belong to another container that shares the memory and has its own
            # process ids.
            if path.stat().st_mtime >= began - _CLOCK_TICK:
                path.unlink()


LAUNCHER = "PPVISION_LAUNCHER"  # environment: process id of `ppvision.engine.launch`
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Let this process be killed when `ppvision.engine.launch`, which started it, is killed.

    Each rank has its own session. Without this, the ranks would continue to train and keep the
    run's folder locked.
    """
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# -- batches for training --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Empty:
    """Represents an array without elements, such as the boxes of an image without objects.

    Paddle's loader fails for such an array from a worker ("Tensor holds no memory").
    """

    shape: tuple[int, ...]
    dtype: np.dtype


def _replace_in(batch: object, replace: Callable[[object], object]) -> object:
    """Replace each entry of a batch, at any depth."""
    if isinstance(batch, Mapping):
        return {key: _replace_in(value, replace) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_replace_in(value, replace) for value in batch]
    return replace(batch)


def _pack_empty(value: object) -> object:
    if isinstance(value, np.ndarray | paddle.Tensor) and value.size == 0:
        array = np.asarray(value)
        return _Empty(array.shape, array.dtype)
    return value


def _unpack_empty(value: object) -> object:
    return paddle.to_tensor(np.zeros(value.shape, value.dtype)) if type(value) is _Empty else value


def _collate_packed(collate: Callable[[list], object], samples: list) -> object:
    return _replace_in(collate(samples), _pack_empty)


class BatchReader:
    """Gives the batches of a `paddle.io.DataLoader`; a context manager that leaves no worker
    behind.

    Paddle waits for a batch in C++, where Python cannot handle signals. Here a thread waits in C++,
    one batch at a time, and the caller waits in Python.

    Args:
        dataset, batch_sampler, collate_fn: as in `paddle.io.DataLoader`.
        num_workers: processes that read; 0 reads in a thread of this process.

    Raises:
        ReaderError: a worker could not be started, or has ended unexpectedly.
    """

    def __init__(
        self,
        dataset: paddle.io.Dataset,
        batch_sampler: paddle.io.BatchSampler,
        num_workers: int,
        collate_fn: Callable[[list], object],
    ) -> None:
        self._loader = paddle.io.DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate_packed, collate_fn) if num_workers else collate_fn,
            return_list=True,
            worker_init_fn=_protect_worker,
        )
        self._num_workers = num_workers
        self._workers: list[BaseProcess] = []
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        # Its `put` may interrupt a `get` or `put` of the same thread, for example in a signal
        # handler.
        self._found: queue.SimpleQueue = queue.SimpleQueue()
        self._iterator = None

    def __enter__(self) -> "BatchReader":
        with _started_workers(self._workers):
            self._iterator = iter(self._loader)
        device = paddle.get_device()
        self._thread = threading.Thread(target=self._read, args=(device,), daemon=True)
        self._thread.start()
        return self

    def _read(self, device: str) -> None:
        paddle.set_device(device)  # the device of this thread; batches are copied there
        while self._wanted.get():
            try:
                found = _replace_in(next(self._iterator), _unpack_empty)
            except StopIteration:
                found = _END
            except BaseException as error:  # raised again in the thread that waits for the batch
                found = _Failure(error)
            self._found.put(found)

    def __iter__(self) -> Iterator[object]:
        while True:
            self._wanted.put(True)
            found = self._found.get()
            if found is _END or found is _WOKEN:
                return
            if isinstance(found, _Failure):
                raise found.error
            yield found

    def wake(self) -> None:
        """End the iteration now, even while it waits. It is for a signal handler."""
        self._found.put(_WOKEN)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _deaf_to_children():
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        # Paddle's loader raises these. They are checked before we end the workers.
        code = _code_of_ended(self._workers) if isinstance(error, SystemError | RuntimeError) else 0
        self._wanted.put(False)
        if self._workers:
            # This asks the workers to end; afterwards Paddle does not treat their end as a failure.
            # The thread may do the same at the same time; then one of the two finds nothing to
            # close.
            with contextlib.suppress(Exception):
                self._iterator._try_shutdown_all(PATIENCE)
            _end_workers(self._workers)
        else:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():  # it is still reading a sample
                self._iterator._shutdown = True  # otherwise Paddle waits for it forever
        if code and not isinstance(error, PpvisionError):
            raise _worker_ended(code) from error


class _Failure:
    """An exception on its way from the thread to the caller that waits for a batch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextlib.contextmanager
def _started_workers(workers: list[BaseProcess]) -> Iterator[None]:
    """Add the processes that are started in the block to `workers`; end them if the block
    raises."""
    before = multiprocessing.active_children()
    # A signal would end a worker before it can ignore signals. So signals are delayed here.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # A worker must not collect this process's garbage: to destroy the queue of an earlier Paddle
    # loader, it would wait forever for a thread that exists only in this process.
    frozen_before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    except BaseException as error:
        _end_workers([child for child in multiprocessing.active_children() if child not in before])
        if isinstance(error, OSError):
            raise ReaderError(
                f"num_workers: a process that reads data could not be started "
                f"({error.strerror or error}). {_shared_memory()} Take --num_workers 0."
            ) from error
        raise
    finally:
        if not frozen_before:  # otherwise the caller froze it on purpose
            gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    workers += [child for child in multiprocessing.active_children() if child not in before]


@contextlib.contextmanager
def _deaf_to_children() -> Iterator[None]:
    """Raise nothing when a child process ends.

    After a worker has failed, Paddle's handler of SIGCHLD raises at the end of every other worker,
    wherever the main thread is. An error while we end the workers would leave some of them, and
    Python waits for its children at its end.
    """
    if threading.current_thread() is not threading.main_thread():  # it raises in the main one
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)  # None: not set in Python


def _end_workers(workers: Sequence[BaseProcess]) -> None:
    with _deaf_to_children():
        for worker in workers:
            worker.kill()
        for worker in workers:
            _wait_for(worker)
            _free_shared_memory(worker.pid, _BEGAN)


def _wait_for(worker: BaseProcess) -> None:
    """Wait for the end of a worker, until `multiprocessing` knows of it.

    A thread of the loader or of the pool may ask the system for the exit code at the same time. The
    system gives it once, so `join` returns here while only that thread has it.
    """
    worker.join()
    until = time.monotonic() + PATIENCE
    while worker.exitcode is None and time.monotonic() < until:
        time.sleep(0.01)
    worker.join()


def _code_of_ended(workers: Sequence[BaseProcess]) -> int:
    """Return the exit code of a worker that has failed, or 0. An ending process closes its pipes
    first, which is how the failure is noticed, so this waits a moment."""
    until = time.monotonic() + 5 * PATIENCE  # on a busy machine one second was not enough
    while workers:
        code = next((worker.exitcode for worker in workers if worker.exitcode), 0)
        if code or time.monotonic() > until:
            return code
        time.sleep(0.01)
    return 0


def _worker_ended(code: int) -> ReaderError:
    """Describe a worker that ended unexpectedly, by its exit code."""
    if code == -signal.SIGBUS:
        why = f"was stopped by SIGBUS: the shared memory is too small. {_shared_memory()}"
    elif code == -signal.SIGKILL:
        why = "was killed (SIGKILL), most likely because memory ran out."
    elif code < 0:
        why = f"was stopped by {signal.Signals(-code).name}."
    else:
        why = f"ended with exit code {code}."
    return ReaderError(
        f"num_workers: a process that reads data {why} Continue with --num_workers 0, which reads "
        "in the training process, or with fewer workers."
    )


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return f"There is no {folder} here."
    return (
        f"{folder} has {usage.total / 2**20:.0f} MiB, {usage.free / 2**20:.0f} of them free "
        "(docker run --shm-size=2g gives more)."
    )


# -- samples for an evaluation ---------------------------------------------------------------------

_read: Callable[[int], object] | None = None  # set in a worker


def _begin_worker(read: Callable[[int], object]) -> None:
    global _read
    _protect_worker()
    _read = read


def _read_in_worker(index: int) -> object:
    try:
        return _read(index)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception from a worker would break the pool
            text = shorten_text(str(error))
            raise ReaderError(f"{type(error).__name__}: {text}") from None
        raise


@contextlib.contextmanager
def read_in_order(
    read: Callable[[int], Sample], indices: Sequence[int], num_workers: int
) -> Iterator[Iterator[Sample]]:
    """Give `read(index)` for each index, in order; the workers end with the block.

    Args:
        read: function that gives values that can be pickled, such as NumPy arrays. It runs in
            forked processes, which see its objects in their current state.
        indices: the indices to read.
        num_workers: processes that read ahead; 0 reads in this process on demand.

    Yields:
        An iterator over the samples. It raises what `read` raises, and `ReaderError` where a worker
        could not be started, or has ended by itself.
    """
    if num_workers == 0 or not indices:
        yield map(read, indices)
        return
    with contextlib.closing(_read_ahead(read, indices, num_workers)) as samples:
        yield samples


def _read_ahead(
    read: Callable[[int], Sample], indices: Sequence[int], num_workers: int
) -> Iterator[Sample]:
    first, *others = indices
    workers: list[BaseProcess] = []
    with _started_workers(workers):
        pool = ProcessPoolExecutor(
            num_workers,
            # Forked, because data sets may not be picklable.
            mp_context=multiprocessing.get_context("fork"),
            initializer=_begin_worker,
            initargs=(read,),
        )
        waiting = deque([pool.submit(_read_in_worker, first)])  # the first task starts all of them
    try:
        for index in others:
            waiting.append(pool.submit(_read_in_worker, index))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise _worker_ended(_code_of_ended(workers)) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _end_workers(workers)
