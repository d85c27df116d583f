"""One short training loop."""

import contextlib
import errno
import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import paddle
from paddle import Tensor, nn

from ppvision.engine.callbacks import Callback
from ppvision.engine.checkpoint import (
    Progress,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_config,
    save_checkpoint,
    set_aside,
    update_progress,
)
from ppvision.engine.ranks import (
    RankLostError,
    ask_first,
    average_over_ranks,
    average_statistics,
    is_lost_rank,
    on_one_machine,
    reach_folder,
)
from ppvision.engine.reading import BatchReader
from ppvision.engine.run_folder import RunFolder, list_config_differences
from ppvision.engine.seeding import (
    UNREADABLE,
    SeededBatches,
    SeededDataset,
    collate,
    sample_name,
    seed_batch,
)
from ppvision.engine.stopping import (
    SAME_REQUEST,
    SAME_REQUEST_OF_RANKS,
    StopRequest,
    TrainingStopped,
)
from ppvision.errors import (
    DivergenceError,
    FolderInUseError,
    InputError,
    PpvisionError,
    StorageError,
)
from ppvision.files import replace_file
from ppvision.forms.cpu_training import cpu_training
from ppvision.forms.paddle_private import collate_samples
from ppvision.precision import normalize_precision
from ppvision.schema import between, check_values, one_of, whole

logger = logging.getLogger("ppvision")

PRECISIONS = ("fp32", "fp16", "bf16")

# As in PaddleSeg's train(): additions and norms in half precision, interpolation in float32.
_AMP_WHITE = {"elementwise_add", "batch_norm", "sync_batch_norm"}
_AMP_BLACK = {"bilinear_interp_v2"}

# `(network, batch) -> losses`; their sum is minimised.
ForwardPass = Callable[[nn.Layer, object], Sequence[Tensor]]

_ONLY = ""  # the name of a forward pass if it is the only one

# Logged unchanged; for other numbers, the mean since the last line is logged.
_LATEST = ("Train/lr", "Train/grad_norm")

_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's quota, is full


class DataReadError(PpvisionError, RuntimeError):
    """A sample could not be read during the training."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training that do not depend on the task.

    Attributes:
        iters: total number of optimiser steps.
        batch_size: samples per batch and process.
        accumulate: batches whose mean gradient makes one step.
        clip_norm: limit of the gradient's global norm, or None.
        log_iters: steps between two log lines.
        save_interval: steps between two evaluations and checkpoints.
        keep_checkpoint_max: checkpoints to keep.
        num_workers: processes that read data; 0 reads in the training process.
        seed: seed of samples and steps.
        precision: fp32, or fp16 / bf16 mixed precision (O1); also as float32, float16, bfloat16.
        use_ema: whether to average the weights and also evaluate the average.
        ema_decay: fraction of the running average kept at each step. Default: PaddleSeg's.
        resume: `auto`, the folder of a checkpoint, or None.

    Raises:
        ValueError: a value out of its range.
    """

    iters: Annotated[int, whole(1)]
    batch_size: Annotated[int, whole(1)]
    accumulate: Annotated[int, whole(1)] = 1
    clip_norm: Annotated[float, between(0)] | None = None
    log_iters: Annotated[int, whole(1)] = 10
    save_interval: Annotated[int, whole(1)] = 1000
    keep_checkpoint_max: Annotated[int, whole(1)] = 3
    num_workers: Annotated[int, whole(0)] = 0
    seed: Annotated[int, whole(0)] = 0
    precision: Annotated[str, one_of(*PRECISIONS)] = "fp32"
    use_ema: bool = False
    ema_decay: Annotated[float, between(0, 1)] = 0.999
    resume: str | None = None

    def __post_init__(self) -> None:
        # The dataclass is frozen; its own __init__ sets fields in this way too.
        object.__setattr__(self, "precision", normalize_precision(self.precision))
        check_values(self)


class Trainer:
    """Trains a model, evaluates it at intervals, and writes checkpoints for a resume.

    The constructor changes no file: it only reads the checkpoint of `options.resume`. `fit` does
    the rest.

    Args:
        model: the network, without any data-parallel wrapper.
        optimizer: optimizer of its parameters.
        dataset: training samples.
        compute_losses: one forward pass, or several by name. Several run one after another, each
            with its own backward pass, so that memory contains one at a time. The mean of their
            losses is minimised, and each is logged as `Train/loss_<name>`.
        evaluate: `(model) -> scores by tag`, the first of which decides the best model; None for no
            evaluation. Every rank calls it.
        folder: the run's folder.
        options: see `TrainOptions`.
        config: config of the run. Every checkpoint contains it, and a resume compares it.
        batched: function that collates samples. Default: Paddle's own.
        before_step: function that is called before each step with its number, from 1.

    Raises:
        ValueError: there are too few samples for one batch, or two options clip the gradient.
        CheckpointError: see `load_checkpoint`.
    """

    def __init__(
        self,
        model: nn.Layer,
        optimizer: paddle.optimizer.Optimizer,
        dataset: paddle.io.Dataset,
        compute_losses: ForwardPass | Mapping[str, ForwardPass],
        evaluate: Callable[[nn.Layer], dict[str, float]] | None,
        folder: RunFolder,
        options: TrainOptions,
        config: dict | None = None,
        batched: Callable[[list], object] = collate_samples,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        if options.clip_norm is not None and optimizer._grad_clip is not None:
            raise InputError(
                "clip_norm: the optimiser clips already (grad_clip_cfg). Use only one of them."
            )
        self.model = model
        self.optimizer = optimizer
        self.dataset = dataset
        self.compute_losses = compute_losses
        self.evaluate = evaluate
        self.folder = folder
        self.config = config or {}
        self.batched = batched
        self.before_step = before_step
        if options.precision != "fp32" and paddle.get_device() == "cpu":
            # Paddle has no half-precision kernels for CPUs.
            logger.warning(f"precision: {options.precision} needs a GPU; training in fp32")
            options = replace(options, precision="fp32")
        self.options = options
        self.callbacks: list[Callback] = []
        self.rank = paddle.distributed.get_rank()
        self.ranks = paddle.distributed.get_world_size()
        self.ema = deepcopy(model) if options.use_ema else None
        self.progress = Progress()
        self._saved_step = -1  # step of the newest checkpoint in this folder
        self._found: list[Path] | None = None  # checkpoints in the folder at a resume
        self._kept_step = 0  # later checkpoints belong to an abandoned course of the run
        self._stop = StopRequest()
        self._agreed_signal = 0  # the signal that stops all ranks after this step
        self.scaler = paddle.amp.GradScaler(
            enable=options.precision == "fp16", init_loss_scaling=1024
        )
        if options.resume is not None:
            self._resume(options.resume)
        self.batches = self._batches(self.progress.step, options.iters)
        self._tell_of_other_data()

    def _batches(self, start: int, stop: int) -> SeededBatches:
        """Return the batches of steps `start` to `stop`."""
        options, k = self.options, self.options.accumulate
        return SeededBatches(self.dataset, options.batch_size, options.seed, start * k, stop * k)

    def _resume(self, resume: str) -> None:
        if self.rank == 0:
            self._found = list_checkpoints(self.folder.checkpoints)
        path, ours = ask_first(partial(self._find_checkpoint, resume))
        if path is None:
            logger.info(f"resume: no checkpoint in {self.folder.checkpoints}; starting a new run")
            return
        with reach_folder(path, "state.json") as reached:
            self.progress = load_checkpoint(reached, self.model, self.optimizer, self.ema)
            before = read_config(reached)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        logger.info(f"resume: continuing from {path}, step {self.progress.step}")
        if ours:
            self._saved_step = self.progress.step
        self._kept_step = self.progress.step - (not ours)
        self._tell_of_another_config(before)

    def _find_checkpoint(self, resume: str) -> tuple[Path | None, bool]:
        """Return the checkpoint to continue from, and whether it is in this folder."""
        checkpoints = self.folder.checkpoints
        path = find_checkpoint(checkpoints, resume)
        return path, path is not None and path.parent.resolve() == checkpoints.resolve()

    def _set_later_ones_aside(self) -> None:
        """Continue from the checkpoint that was read; the folder is locked.

        Raises:
            FolderInUseError: the checkpoints have changed since then.
        """
        if self._found is None:
            return
        if list_checkpoints(self.folder.checkpoints) != self._found:
            raise FolderInUseError(
                f"resume: another process has changed {self.folder.checkpoints} since this one "
                "began. Start again."
            )
        if self.progress.step >= self.options.iters:
            return  # no further step will be made
        moved = set_aside(self.folder.checkpoints, self._kept_step)
        self._found = None  # only once per trainer
        if moved:
            logger.info(
                f"resume: later checkpoints are set aside: {', '.join(map(str, moved))}; "
                "remove them if you do not need them"
            )

    def _tell_of_another_config(self, before: dict) -> None:
        if not before:
            return
        for line in list_config_differences(before, self._recorded_config()):
            logger.warning(f"resume: the config differs from the checkpoint's: {line}")
        steps = before.get("run", {}).get("iters")
        schedule = self.optimizer._learning_rate
        if steps != self.options.iters and not isinstance(schedule, float):
            logger.warning(
                f"resume: the learning rate was scheduled for {steps} steps and continues from "
                f"{self.optimizer.get_lr():g}; it is not stretched to {self.options.iters}. For "
                "another schedule start a new run from the weights (--model_path)"
            )

    def _recorded_config(self) -> dict:
        return self.config | {"run": asdict(self.options)}

    def _tell_of_other_data(self) -> None:
        before, now = self.progress.batches_per_epoch, self.batches.per_epoch
        names = [sample_name(self.dataset, index) for index in range(len(self.dataset))]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        changed = None
        if before not in (0, now):
            changed = (
                f"an epoch had {before} batches and has {now} now (other data, batch size or "
                "number of processes)"
            )
        elif self.progress.data not in ("", digest):
            changed = "the training samples are others than before, or in another order"
        if changed:
            logger.warning(
                f"resume: {changed}: the run continues, but differs from an uninterrupted one"
            )
        self.progress.batches_per_epoch, self.progress.data = now, digest

    def fit(self) -> Progress:
        """Train to the last step.

        SIGINT, SIGTERM and SIGHUP end training after the current step; a second signal ends the
        process at once (one within `SAME_REQUEST` seconds counts as the first). This applies in the
        main thread only, and only to signals that the program neither ignores nor handles itself.
        Afterwards the earlier handling of signals is restored.

        Returns:
            The progress, with the best score and its step.

        Raises:
            TrainingStopped: a signal came, and a checkpoint of the last complete step is written.
                A resume repeats an evaluation that it interrupted.
            FloatingPointError: the loss or the gradient is not finite. A checkpoint of the state
                before is written, and the message names it and the batch's files.
            DataReadError: a sample could not be read; the message names it.
            ReaderError: a process that reads data has ended.
            FolderInUseError: another process trains in the folder.
            StorageError: a checkpoint, an image or a number could not be written; the message
                names the checkpoint to continue from.
            RankLostError: another process of the training has ended (seen with gloo).
        """
        self._stop = StopRequest(SAME_REQUEST if self.ranks == 1 else SAME_REQUEST_OF_RANKS)
        self._agreed_signal = 0
        with self.folder.hold_lock() if self.rank == 0 else contextlib.nullcontext():
            try:
                if self.rank == 0:
                    self._set_later_ones_aside()
                models = (self.model,) if self.ema is None else (self.model, self.ema)
                with cpu_training(*models), self._stop:
                    self._fit()
            except BaseException as error:
                # A full disk causes another error when files are closed: the first error is shown.
                with contextlib.suppress(OSError):
                    self._end()
                if isinstance(error, OSError) and not isinstance(error, FolderInUseError):
                    raise StorageError(error.errno, self._with_advice(error)) from error
                if isinstance(error, Exception) and self.ranks > 1 and self._stop.number:
                    # Another rank stopped first, in an evaluation, while this one waited for it.
                    raise self._stopped() from error
                if isinstance(error, Exception) and is_lost_rank(error):
                    raise RankLostError(
                        "another process of this training has ended, on this machine or another "
                        "one; its log (workerlog) says why. Start all of them again with "
                        "--resume auto"
                    ) from error
                raise
            self._end()
        return self.progress

    def _end(self) -> None:
        for callback in self.callbacks:
            callback.on_end()

    def _with_advice(self, error: OSError) -> str:
        what = error.strerror or str(error)
        if error.filename:
            what = f"{error.filename}: {what}"
        first = "Make room" if error.errno in _FULL else "Mend that"
        found = list_checkpoints(self.folder.checkpoints)
        if not found:
            return f"{what}. No checkpoint is complete yet. {first}, then start again"
        return f"{what}. Complete is {found[-1]}. {first}, then go on with --resume auto"

    def _fit(self) -> None:
        options = self.options
        network = self.model
        if self.ranks > 1:
            network = paddle.DataParallel(self.model)
        self._tell("on_begin", self.progress.step)
        if self._evaluation_is_owed:
            self._save_and_evaluate()
        reader = BatchReader(
            SeededDataset(self.dataset, options.seed),
            self.batches,
            options.num_workers,
            partial(collate, batched=self.batched),
        )
        with reader:
            if self.ranks == 1:  # several ranks agree on a step, and wait for the batch
                self._stop.call(reader.wake)
            self._take_steps(network, reader)
        if self.progress.step < options.iters:
            self._save_and_stop()

    def _take_steps(self, network: nn.Layer, reader: BatchReader) -> None:
        """Train to the last step, or until a signal."""
        options = self.options
        waiting, read = [], 0.0
        clock = began = time.perf_counter()
        for batch in reader:
            if isinstance(batch, dict) and UNREADABLE in batch:
                raise DataReadError(batch[UNREADABLE])
            read += time.perf_counter() - clock
            waiting.append(batch)
            if len(waiting) == options.accumulate:
                self.progress.step += 1
                numbers = self._step(network, waiting)
                numbers["Train/reader_cost"] = read
                numbers["Train/batch_cost"] = time.perf_counter() - began
                self._tell("on_step", self.progress.step)
                self._log(numbers)
                if self._is_due(options.save_interval):
                    self._save_and_evaluate()
                if self._stop_signal:
                    return
                waiting, read = [], 0.0
                began = time.perf_counter()
            clock = time.perf_counter()

    # -- stopping ------------------------------------------------------------------------------

    @property
    def _stop_signal(self) -> int:
        """Return the signal that stops the run after this step, equal on all ranks; 0 for none."""
        return self._agreed_signal if self.ranks > 1 else self._stop.number

    def _save_and_stop(self) -> None:
        if self.progress.step > 0 and self._saved_step != self.progress.step:
            self._save(self.options.keep_checkpoint_max)
            self._tell("on_save", self.progress.step)
        if self.ranks > 1:
            paddle.distributed.barrier()  # the launcher stops rank 0 when another rank ends
        raise self._stopped()

    def _stopped(self) -> TrainingStopped:
        step = self.progress.step
        path = self.folder.checkpoints / f"step_{step}" if step > 0 else None
        return TrainingStopped(self._stop_signal or self._stop.number, step, path)

    def _is_due(self, interval: int) -> bool:
        return self.progress.step % interval == 0 or self.progress.step == self.options.iters

    def _log(self, numbers: dict[str, float]) -> None:
        """Every `log_iters` steps, give the callbacks the means since the last time."""
        progress = self.progress
        latest = {tag: numbers.pop(tag) for tag in _LATEST if tag in numbers}
        for tag, value in numbers.items():
            progress.sums[tag] = progress.sums.get(tag, 0.0) + value
        progress.summed += 1
        if not self._is_due(self.options.log_iters):
            return
        means = {tag: value / progress.summed for tag, value in progress.sums.items()}
        if self.ranks > 1:
            means = average_over_ranks(means)
        self._tell("on_log", progress.step, means | latest)
        progress.sums, progress.summed = {}, 0

    # -- one step ------------------------------------------------------------------------------

    def _step(self, network: nn.Layer, batches: list) -> dict[str, float]:
        """Forward and backward over the batches, then one update."""
        self.model.train()  # evaluation and images have set evaluation mode
        if self.before_step is not None:
            self.before_step(self.progress.step)
        statistics = [tensor.clone() for tensor in _statistics(self.model)]
        passes = self.compute_losses
        if not isinstance(passes, Mapping):
            passes = {_ONLY: passes}
        share = 1 / (len(passes) * len(batches))
        numbers: dict[str, float] = {"Train/loss": 0.0}
        for k, batch in enumerate(batches):
            number = (self.progress.step - 1) * len(batches) + k
            for name, forward in passes.items():
                seed_batch(self.options.seed, number, self.rank)  # equal for all passes
                last = k == len(batches) - 1 and name == next(reversed(passes))
                with self._gradients_exchanged(network, last):
                    losses = self._forward(network, batch, forward)
                    loss = sum(losses)
                    value = float(loss)
                    self._check_finite("loss", value, statistics)
                    self.scaler.scale(loss if share == 1 else loss * share).backward()
                numbers["Train/loss"] += value * share
                for tag, part in _parts(name, value, losses).items():
                    numbers[tag] = numbers.get(tag, 0.0) + part / len(batches)
        norm = self._clip()
        numbers["Train/grad_norm"] = norm
        if not self.scaler.is_enable():  # it skips a step that overflows
            self._check_finite("gradient norm", norm, statistics)
        numbers["Train/lr"] = self.optimizer.get_lr()
        self._update(loss)
        return numbers

    def _forward(self, network: nn.Layer, batch: object, forward: ForwardPass) -> Sequence[Tensor]:
        with self._precision():
            return forward(network, batch)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.options.precision == "fp32":
            return contextlib.nullcontext()
        dtype = {"fp16": "float16", "bf16": "bfloat16"}[self.options.precision]
        return paddle.amp.auto_cast(
            level="O1", dtype=dtype, custom_white_list=_AMP_WHITE, custom_black_list=_AMP_BLACK
        )

    @staticmethod
    def _gradients_exchanged(network: nn.Layer, last: bool) -> contextlib.AbstractContextManager:
        """Exchange data-parallel gradients once per step, in its last backward pass."""
        if last or not isinstance(network, paddle.DataParallel):
            return contextlib.nullcontext()
        return network.no_sync()

    def _clip(self) -> float:
        """Clip the gradient; return its global norm before clipping.

        The norm is computed at every step, because a ReLU can hide a NaN from the loss.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.options.clip_norm is not None:
            return float(nn.utils.clip_grad_norm_(parameters, self.options.clip_norm))
        with paddle.no_grad():
            squares = [p.grad.astype("float32").square().sum() for p in parameters]
            return math.sqrt(float(paddle.stack(squares).sum())) if squares else 0.0

    def _update(self, loss: Tensor) -> None:
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

    @paddle.no_grad()
    def _update_ema(self) -> None:
        decay = min(1 - 1 / (self.progress.step + 1), self.options.ema_decay)
        source, copied = self.model.state_dict(), _not_averaged(self.model)
        for name, average in self.ema.state_dict().items():
            if paddle.is_floating_point(average) and name not in copied:
                average.set_value(average * decay + source[name] * (1 - decay))
            else:
                average.set_value(source[name])

    def _check_finite(self, what: str, value: float, statistics: list[Tensor]) -> None:
        """Stop all ranks together if the number is not finite on one of them: save the state before
        this step, then raise an error with the details that help to find the cause. Here the ranks
        also agree on a signal that one of them received."""
        step = self.progress.step
        report = None
        if not math.isfinite(value):
            keys = [key for batch in self._batches(step - 1, step) for key in batch]
            report = (value, [sample_name(self.dataset, index) for _, index in keys])
        reports = [report]
        if self.ranks > 1:
            flags = paddle.to_tensor([0 if report is None else 1, self._stop.number])
            paddle.distributed.all_reduce(flags, paddle.distributed.ReduceOp.MAX)
            bad, self._agreed_signal = flags.tolist()
            if not bad:
                return
            reports = []
            paddle.distributed.all_gather_object(reports, report)
        found = [report for report in reports if report is not None]
        if not found:
            return
        state = self._state_before(step, statistics)
        if self.ranks > 1:
            paddle.distributed.barrier()  # the launcher stops rank 0 when another rank ends
        names = "\n  ".join(name for _, names in found for name in names)
        raise DivergenceError(
            f"{what}: expected a finite number, got {found[0][0]} at step {step}, learning rate "
            f"{self.optimizer.get_lr():g}. {state} Lower the learning rate, bound the gradient "
            f"(clip_norm), or look at these samples and their labels:\n  {names}"
        )

    def _state_before(self, step: int, statistics: list[Tensor]) -> str:
        """Save the state before `step`; return a text that says where."""
        self.model.clear_gradients()
        for tensor, before in zip(_statistics(self.model), statistics, strict=True):
            tensor.set_value(before)  # the forward pass has changed BatchNorm's statistics
        self.progress.step = step - 1
        finite = all(bool(paddle.isfinite(p).all()) for p in self.model.parameters())
        if self.ranks > 1:  # BatchNorm's statistics differ, and either all ranks save or none
            finite = average_over_ranks({"finite": float(finite)})["finite"] == 1
        if not finite:
            return "The weights before it are not finite either: go on from an older checkpoint."
        self._save(keep=None)
        path = self.folder.checkpoints / f"step_{step - 1}"
        return f"The state before it: {path} (--resume {path} repeats the step)."

    # -- scores and checkpoints ----------------------------------------------------------------

    def _save_and_evaluate(self) -> None:
        # Saved first, so that a failing evaluation does not lose the steps before it.
        path = self._save(self.options.keep_checkpoint_max)
        self._tell("on_save", self.progress.step)
        if self.ranks > 1 and self._agreed_signal:
            self._save_and_stop()
        if self.evaluate is not None:
            # An evaluation may take long, and a resume repeats it. Ranks on another machine do not
            # get the signal; they agree on it in the next step.
            here = on_one_machine()
            with self._stop.interrupt_at_once(self._stopped) if here else contextlib.nullcontext():
                self._evaluate()
        self.progress.evaluated = self.progress.step
        if path is not None:
            update_progress(path, self.progress)

    @property
    def _evaluation_is_owed(self) -> bool:
        """Whether the run was stopped between a checkpoint and the end of its evaluation."""
        progress = self.progress
        due = progress.step > 0 and self._is_due(self.options.save_interval)
        return due and progress.evaluated < progress.step

    def _evaluate(self) -> None:
        step = self.progress.step
        scores = dict(self.evaluate(self.model))
        if not scores:
            raise InputError(
                "evaluation: expected scores, got none: nothing in the validation set counts. "
                f"Training has reached step {step}. Correct the validation set, then continue with "
                "--resume."
            )
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

    def _save(self, keep: int | None = None) -> Path | None:
        """Write a checkpoint on rank 0, unless there is one of this step; `keep` as in
        `save_checkpoint`."""
        progress = self.progress
        if self._saved_step != progress.step and self.ranks > 1:
            # All ranks continue with what is saved, as they do after a resume.
            average_statistics(self.model, *([] if self.ema is None else [self.ema]))
            if progress.sums:
                # The numbers for the next log line are those of all ranks: each rank gets them at a
                # resume.
                progress.sums = average_over_ranks(progress.sums)
        known, self._saved_step = self._saved_step == progress.step, progress.step
        if self.rank != 0:
            return None
        if known:
            return self.folder.checkpoints / f"step_{progress.step}"
        done = progress.step * self.options.accumulate
        progress.epoch, progress.batch = divmod(done, progress.batches_per_epoch)
        schedule = self.optimizer._learning_rate
        if isinstance(schedule, paddle.optimizer.lr.LRScheduler):
            progress.schedule = schedule.state_dict()
        progress.scaler = self.scaler.state_dict()
        return save_checkpoint(
            self.folder.checkpoints,
            self.model,
            self.optimizer,
            progress,
            self.ema,
            keep,
            self._recorded_config(),
        )

    def _save_best(self, model: nn.Layer) -> None:
        path = self.folder.best_model
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as partial_path:
                paddle.save(model.state_dict(), str(partial_path))
        except OSError as error:
            raise StorageError(
                error.errno, f"best model: could not write {path} ({error})"
            ) from error

    def _tell(self, event: str, *arguments: object) -> None:
        if self.rank == 0:
            for callback in self.callbacks:
                getattr(callback, event)(*arguments)


def _parts(name: str, value: float, losses: Sequence[Tensor]) -> dict[str, float]:
    """Return the losses to log in addition to the total: of each pass, or each of several
    losses."""
    if name != _ONLY:
        return {f"Train/loss_{name}": value}
    if len(losses) == 1:
        return {}
    return {f"Train/loss_{i}": float(part) for i, part in enumerate(losses)}


def _not_averaged(model: nn.Layer) -> set[str]:
    """Return tensors that layers set and do not learn (`not_averaged`)."""
    return {
        f"{path}.{name}"
        for path, layer in model.named_sublayers()
        for name in getattr(layer, "not_averaged", ())
    }


def _statistics(model: nn.Layer) -> list[Tensor]:
    """Return the tensors that a forward pass changes: buffers, and BatchNorm's statistics, which
    Paddle keeps as parameters."""
    kept = ("_mean", "_variance")
    layers = [layer._parameters for layer in model.sublayers()]
    return [*model.buffers(), *(held[name] for held in layers for name in kept if name in held)]


__all__ = ["PRECISIONS", "TrainOptions", "Trainer"]
