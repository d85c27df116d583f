"""Compute BatchNorm's statistics again, from images of any size.

Rounded weights change the inputs of norms, so every width needs its own statistics. Without
training they come from images that pass through the model. The input of a norm depends on all norms
before it. So the images pass through the network together: each waits at every norm until all have
arrived, and continues with the statistics of all of them, as in a training batch. They cannot be
one batch, because images may differ in size. We chose this.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor, nn

IN_STEP = 32  # largest number of images at a time, because all their maps are in memory


def estimate_statistics(norms: Sequence[nn.Layer], shows: Sequence[Callable[[], object]]) -> None:
    """Give norms the mean and variance of all their inputs.

    Args:
        norms: BatchNorm layers of a model at one width. A norm without input (in an auxiliary
            head), or with a single value per channel, keeps its statistics.
        shows: functions; each runs the model on one image, in evaluation mode. They run in threads,
            one at a time. More than `IN_STEP` images are split into groups of nearly equal size,
            and the statistics are averaged.

    Raises:
        the errors of `shows`; the statistics are then partly new.
    """
    totals: dict[int, _Moments] = {}
    groups = -(-len(shows) // IN_STEP)
    for group in range(groups):
        _InStep(norms, totals).run(shows[group::groups])
    for norm in norms:
        if id(norm) in totals:
            totals[id(norm)].give(norm)


@dataclass
class _Moments:
    """The sums over images of the mean and the mean square, `[C]` each, in float64."""

    mean: np.ndarray
    square: np.ndarray
    pictures: int
    values: int  # per channel

    @classmethod
    def of(cls, norm: nn.Layer, x: Tensor) -> "_Moments":
        channels = x.ndim - 1 if norm._data_format[-1] == "C" else 1
        axes = [axis for axis in range(x.ndim) if axis != channels]
        x = x.astype("float32")
        mean = x.mean(axis=axes, keepdim=True)
        variance = paddle.square(x - mean).mean(axis=axes).numpy().astype(np.float64)
        mean = mean.numpy().astype(np.float64).ravel()
        return cls(mean, variance + mean**2, 1, x.size // len(mean))

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.mean + other.mean,
            self.square + other.square,
            self.pictures + other.pictures,
            self.values + other.values,
        )

    def give(self, norm: nn.Layer) -> None:
        if self.values < 2:
            return
        mean = self.mean / self.pictures
        variance = np.maximum(self.square / self.pictures - mean**2, 0.0)
        norm._mean.set_value(mean.astype(np.float32))
        norm._variance.set_value(variance.astype(np.float32))


class _Stopped(Exception):
    """Ends the threads of the other images when one has failed."""


class _InStep:
    """One group of images on its way through the network.

    A thread runs only while it holds the lock of `turn`, so only one does at any time.
    """

    def __init__(self, norms: Sequence[nn.Layer], totals: dict[int, _Moments]) -> None:
        self.norms = norms
        self.totals = totals
        self.turn = threading.Condition()
        self.running = 0  # images that have not passed yet
        self.waiting: list[tuple[nn.Layer, _Moments]] = []
        self.passed = 0  # number of times that the waiting threads continued
        self.error: BaseException | None = None

    def run(self, shows: Sequence[Callable[[], object]]) -> None:
        threads = [threading.Thread(target=self._show, args=[show], daemon=True) for show in shows]
        self.running = len(threads)
        hooks = [norm.register_forward_pre_hook(self._arrive) for norm in self.norms]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # for example an interrupt
            with self.turn:
                self.error = error
                self.turn.notify_all()
            raise
        finally:
            for hook in hooks:
                hook.remove()
        if self.error is not None:
            raise self.error

    def _show(self, show: Callable[[], object]) -> None:
        with self.turn:
            try:
                if self.error is None:
                    with paddle.no_grad():
                        show()
            except _Stopped:
                pass
            except BaseException as error:
                self.error = error
            self.running -= 1
            if self.error is not None:
                self.turn.notify_all()
            else:
                self._go_on_if_all_wait()

    def _arrive(self, norm: nn.Layer, inputs: tuple) -> None:
        """Wait before a norm until all other images have reached it."""
        self.waiting.append((norm, _Moments.of(norm, inputs[0])))
        passed = self.passed
        self._go_on_if_all_wait()
        self.turn.wait_for(lambda: self.passed != passed or self.error is not None)
        if self.error is not None:
            raise _Stopped

    def _go_on_if_all_wait(self) -> None:
        if not self.waiting or len(self.waiting) < self.running:
            return
        here: dict[int, _Moments] = {}
        for norm, moments in self.waiting:
            here[id(norm)] = here[id(norm)] + moments if id(norm) in here else moments
        for norm in {id(norm): norm for norm, _ in self.waiting}.values():
            moments = here[id(norm)]
            moments.give(norm)
            before = self.totals.get(id(norm))
            self.totals[id(norm)] = moments if before is None else before + moments
        self.waiting.clear()
        self.passed += 1
        self.turn.notify_all()
