"""Callbacks after a training step: log lines, numbers and images."""

import logging
from collections.abc import Callable

import numpy as np
from paddle import nn

from ppvision.console import FILE_ONLY, ProgressLine, is_verbose
from ppvision.engine.dashboard import Dashboard

logger = logging.getLogger("ppvision")


class Callback:
    """Gets events of a run; every method is optional. Only rank 0 has callbacks."""

    def on_begin(self, step: int) -> None:
        """Called once, before the first step; `step` steps are done already."""

    def on_step(self, step: int) -> None:
        """Called after every step."""

    def on_log(self, step: int, numbers: dict[str, float]) -> None:
        """Called every `log_iters` steps; `numbers` by tag are means since the last line."""

    def on_evaluate(self, step: int, scores: dict[str, float]) -> None:
        """Called after every evaluation with `scores` by tag."""

    def on_save(self, step: int) -> None:
        """Called after every checkpoint, before its evaluation."""

    def on_end(self) -> None:
        """Called once at the end, also if the run stops with an error."""


class ProgressLog(Callback):
    """Shows a progress line with the newest loss and score, and writes all numbers to the log.

    Args:
        total: steps of the run.
        batch_size: samples per step, over all processes.
    """

    def __init__(self, total: int, batch_size: int) -> None:
        self.total = total
        self.batch_size = batch_size
        # If the log is shown, it contains everything that this line would show.
        self._line = ProgressLine("train", total, "step", hidden=is_verbose())
        self._loss, self._score = "", ""

    def on_begin(self, step: int) -> None:
        self._line = ProgressLine("train", self.total, "step", start=step, hidden=is_verbose())
        self._line.__enter__()

    def on_step(self, step: int) -> None:
        self._line.update()

    def on_log(self, step: int, numbers: dict[str, float]) -> None:
        cost = numbers["Train/batch_cost"]
        minutes, seconds = divmod(round((self.total - step) * cost), 60)
        left = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"  # hours may exceed 24
        logger.info(
            f"[TRAIN] iter: {step}/{self.total}, loss: {numbers['Train/loss']:.4f}, "
            f"lr: {numbers['Train/lr']:.6f}, batch_cost: {cost:.4f} s, "
            f"reader_cost: {numbers['Train/reader_cost']:.4f} s, "
            f"ips: {self.batch_size / max(cost, 1e-9):.2f} samples/s, time left: {left}",
            extra=FILE_ONLY,
        )
        self._loss = f"loss {numbers['Train/loss']:.4f}"
        self._show_newest()

    def on_evaluate(self, step: int, scores: dict[str, float]) -> None:
        line = ", ".join(f"{tag.split('/')[-1]}: {value:.4f}" for tag, value in scores.items())
        logger.info(f"[EVAL] iter: {step}/{self.total}, {line}", extra=FILE_ONLY)
        tag, score = next(iter(scores.items()))
        self._score = f"{tag.split('/')[-1]} {score:.4f}"
        self._show_newest()
        self._line.write_line()

    def on_end(self) -> None:
        self._line.close()

    def _show_newest(self) -> None:
        self._line.update(0, ", ".join(filter(None, (self._loss, self._score))))


class DashboardLog(Callback):
    """Writes the same numbers to `metrics.csv` and VisualDL, and images of fixed validation
    samples.

    Args:
        dashboard: the dashboard that gets them.
        pictures: function that gives panels `[H, W, 3]` uint8 RGB by name, or None for no images.
        weights: model whose weights get a histogram at every checkpoint, or None for no histograms.
    """

    def __init__(
        self,
        dashboard: Dashboard,
        pictures: Callable[[], dict[str, np.ndarray]] | None,
        weights: nn.Layer | None = None,
    ) -> None:
        self.dashboard = dashboard
        self.pictures = pictures
        self.weights = weights

    def on_save(self, step: int) -> None:
        if self.weights is not None:
            for name, parameter in self.weights.named_parameters():
                self.dashboard.histogram(f"Weights/{name}", parameter.numpy(), step)
            self.dashboard.flush()

    def on_log(self, step: int, numbers: dict[str, float]) -> None:
        self._scalars(step, numbers)

    def on_evaluate(self, step: int, scores: dict[str, float]) -> None:
        if self.pictures is not None:
            for name, panel in self.pictures().items():
                self.dashboard.image(f"Evaluate/{name}", panel, step)
        self._scalars(step, scores)

    def _scalars(self, step: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            self.dashboard.scalar(tag, value, step)
        self.dashboard.flush()

    def on_end(self) -> None:
        self.dashboard.close()
