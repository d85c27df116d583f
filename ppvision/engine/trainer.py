"""One short training loop."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import paddle
from paddle import Tensor, nn

from ppvision.engine.callbacks import Callback
from ppvision.engine.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ppvision.engine.seeding import (
    UNREADABLE,
    SeededBatches,
    SeededDataset,
    collate,
    seed_step,
)
from ppvision.run_folder import RunFolder

logger = logging.getLogger("ppvision")

PRECISIONS = ("fp32", "fp16", "bf16")
EMA_DECAY = 0.999  # PaddleSeg's

# As PaddleSeg's train(): additions and norms in half precision, interpolation in float32.
_AMP_WHITE = {"elementwise_add", "batch_norm", "sync_batch_norm"}
_AMP_BLACK = {"bilinear_interp_v2"}


class DataReadError(RuntimeError):
    """A sample that could not be read while training."""


@dataclass(frozen=True)
class TrainOptions:
    """How to run, apart from what is trained.

    Attributes:
        iters: optimiser steps in all.
        batch_size: samples per step and process.
        log_iters: steps between two log lines.
        save_interval: steps between two evaluations and checkpoints.
        keep_checkpoint_max: checkpoints to keep.
        num_workers: processes that read data; 0 reads in this one.
        seed: of samples and steps.
        precision: fp32, or fp16 / bf16 mixed precision (O1).
        use_ema: also average the weights, and evaluate the average.
        resume: `auto`, a checkpoint's folder, or None.
    """

    iters: int
    batch_size: int
    log_iters: int = 10
    save_interval: int = 1000
    keep_checkpoint_max: int = 3
    num_workers: int = 0
    seed: int = 0
    precision: str = "fp32"
    use_ema: bool = False
    resume: str | None = None


class Trainer:
    """Trains a model, evaluates it now and then, and keeps what a resume needs.

    Args:
        model: the network, without any data-parallel wrapper.
        optimizer: over its parameters.
        dataset: training samples.
        compute_losses: `(network, batch) -> losses`; their sum is minimised.
        evaluate: `(model) -> scores by tag`, the first of which decides the best model; None for no
            evaluation. Every rank calls it.
        folder: the run's.
        options: see `TrainOptions`.
    """

    def __init__(
        self,
        model: nn.Layer,
        optimizer: paddle.optimizer.Optimizer,
        dataset: paddle.io.Dataset,
        compute_losses: Callable[[nn.Layer, dict], Sequence[Tensor]],
        evaluate: Callable[[nn.Layer], dict[str, float]] | None,
        folder: RunFolder,
        options: TrainOptions,
    ) -> None:
        if options.precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {options.precision!r}."
            )
        self.model = model
        self.optimizer = optimizer
        self.dataset = dataset
        self.compute_losses = compute_losses
        self.evaluate = evaluate
        self.folder = folder
        if options.precision != "fp32" and paddle.get_device() == "cpu":
            # Paddle has no half-precision kernels for CPUs.
            logger.warning(f"precision: {options.precision} needs a GPU; training in fp32")
            options = replace(options, precision="fp32")
        self.options = options
        self.callbacks: list[Callback] = []
        self.rank = paddle.distributed.get_rank()
        self.ema = deepcopy(model) if options.use_ema else None
        self.progress = Progress()
        self.scaler = paddle.amp.GradScaler(
            enable=options.precision == "fp16", init_loss_scaling=1024
        )
        if options.resume is not None:
            self._resume(options.resume)
        self.batches = SeededBatches(
            dataset, options.batch_size, options.seed, self.progress.step, options.iters
        )

    def _resume(self, resume: str) -> None:
        path = find_checkpoint(self.folder.checkpoints, resume)
        if path is None:
            logger.info(f"resume: no checkpoint in {self.folder.checkpoints}; starting anew")
            return
        self.progress = load_checkpoint(path, self.model, self.optimizer, self.ema)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        logger.info(f"resume: going on from {path}, step {self.progress.step}")

    def fit(self) -> Progress:
        """Train to the last step.

        Returns:
            The best score and its step, among others.

        Raises:
            FloatingPointError: the loss is not finite.
            DataReadError: a sample could not be read; the message names it.
        """
        try:
            self._fit()
        finally:
            for callback in self.callbacks:
                callback.on_end()
        return self.progress

    def _fit(self) -> None:
        options = self.options
        network = self.model
        if paddle.distributed.get_world_size() > 1:
            network = paddle.DataParallel(self.model)
        loader = paddle.io.DataLoader(
            SeededDataset(self.dataset, options.seed),
            batch_sampler=self.batches,
            num_workers=options.num_workers,
            collate_fn=collate,
            return_list=True,
        )
        clock = time.perf_counter()
        for batch in loader:
            if isinstance(batch, dict) and UNREADABLE in batch:
                raise DataReadError(batch[UNREADABLE])
            read = time.perf_counter() - clock
            self.progress.step += 1
            step = self.progress.step
            numbers = self._step(network, batch)
            numbers["Train/reader_cost"] = read
            numbers["Train/batch_cost"] = time.perf_counter() - clock
            self._log(numbers)
            if step % options.save_interval == 0 or step == options.iters:
                self._evaluate_and_save()
            clock = time.perf_counter()

    def _log(self, numbers: dict[str, float]) -> None:
        """Every `log_iters` steps tell the callbacks the means since the last time."""
        progress = self.progress
        for tag, value in numbers.items():
            progress.sums[tag] = progress.sums.get(tag, 0.0) + value
        progress.summed += 1
        if progress.step % self.options.log_iters and progress.step != self.options.iters:
            return
        means = {tag: value / progress.summed for tag, value in progress.sums.items()}
        means["Train/lr"] = numbers["Train/lr"]
        self._tell("on_log", progress.step, means)
        progress.sums, progress.summed = {}, 0

    def _step(self, network: nn.Layer, batch: dict) -> dict[str, float]:
        self.model.train()  # evaluation and pictures leave it in evaluation mode
        seed_step(self.options.seed, self.progress.step, self.rank)
        with self._precision():
            losses = self.compute_losses(network, batch)
            loss = sum(losses)
        value = float(loss)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"loss: expected a finite number, got {value} at step {self.progress.step}, "
                f"learning rate {self.optimizer.get_lr():g}. Lower the learning rate, or look at "
                "the labels and the loss's settings."
            )
        rate = self.optimizer.get_lr()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        schedule = self.optimizer._learning_rate
        if isinstance(schedule, paddle.optimizer.lr.ReduceOnPlateau):
            schedule.step(loss)
        elif isinstance(schedule, paddle.optimizer.lr.LRScheduler):
            schedule.step()
        self.model.clear_gradients()
        if self.ema is not None:
            self._update_ema()
        numbers = {"Train/loss": value, "Train/lr": rate}
        if len(losses) > 1:
            numbers |= {f"Train/loss_{i}": float(part) for i, part in enumerate(losses)}
        return numbers

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[self.options.precision]
        return paddle.amp.auto_cast(
            level="O1", dtype=dtype, custom_white_list=_AMP_WHITE, custom_black_list=_AMP_BLACK
        )

    @paddle.no_grad()
    def _update_ema(self) -> None:
        decay = min(1 - 1 / (self.progress.step + 1), EMA_DECAY)
        source = self.model.state_dict()
        for name, average in self.ema.state_dict().items():
            if paddle.is_floating_point(average):
                average.set_value(average * decay + source[name] * (1 - decay))
            else:
                average.set_value(source[name])

    def _evaluate_and_save(self) -> None:
        # Saved before and after: an evaluation that fails must not cost the steps before it.
        if self.evaluate is not None:
            self._save()
            self._evaluate()
        self._save()

    def _evaluate(self) -> None:
        step = self.progress.step
        scores = dict(self.evaluate(self.model))
        best_of, score = self.model, next(iter(scores.values()))
        if self.ema is not None:
            averaged = self.evaluate(self.ema)
            scores |= {tag.replace("/", "/Ema_", 1): v for tag, v in averaged.items()}
            if next(iter(averaged.values())) > score:
                best_of, score = self.ema, next(iter(averaged.values()))
        if score > self.progress.best_score:
            self.progress.best_score, self.progress.best_step = float(score), step
            if self.rank == 0:
                self._save_best(best_of)
        self._tell("on_evaluate", step, scores)

    def _save(self) -> None:
        if self.rank != 0:
            return
        schedule = self.optimizer._learning_rate
        if isinstance(schedule, paddle.optimizer.lr.LRScheduler):
            self.progress.schedule = schedule.state_dict()
        self.progress.scaler = self.scaler.state_dict()
        save_checkpoint(
            self.folder.checkpoints,
            self.model,
            self.optimizer,
            self.progress,
            self.ema,
            self.options.keep_checkpoint_max,
        )

    def _save_best(self, model: nn.Layer) -> None:
        path = self.folder.best_model
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("model.partial.pdparams")
        paddle.save(model.state_dict(), str(partial))
        partial.replace(path)

    def _tell(self, event: str, step: int, numbers: dict[str, float]) -> None:
        if self.rank == 0:
            for callback in self.callbacks:
                getattr(callback, event)(step, numbers)


__all__ = ["PRECISIONS", "TrainOptions", "Trainer"]
