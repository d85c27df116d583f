"""The work of a training run around the engine, for every task."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import paddle
from paddle import nn

from ppvision.console import move_log
from ppvision.engine.callbacks import Callback, DashboardLog, ProgressLog
from ppvision.engine.checkpoint import Progress
from ppvision.engine.dashboard import Dashboard
from ppvision.engine.run_folder import RunFolder
from ppvision.engine.seeding import count_batches_per_epoch
from ppvision.engine.trainer import Trainer, TrainOptions
from ppvision.environment import describe_environment
from ppvision.tasks.job import Job

logger = logging.getLogger("ppvision")

# Keys of a config for the engine, in every task.
ENGINE_KEYS = (
    *("task", "imports", "seed", "batch_size", "iters", "accumulate", "clip_norm"),
    *("ema_decay", "slim_config"),
    "run",  # in a run folder's config.yml: the options of the run; not read
)


def count_steps(epochs: int, dataset: paddle.io.Dataset, content: dict) -> int:
    """Return the optimiser steps in a number of passes over the data, on all ranks together; at
    least one."""
    batches = count_batches_per_epoch(
        len(dataset), content["batch_size"], paddle.distributed.get_world_size()
    )
    return max(1, epochs * batches // content.get("accumulate", 1))


def train_options(job: Job, **overrides: object) -> TrainOptions:
    """Make the options of a run from the config's keys and the command line; None keeps the
    config's value.

    Raises:
        ValueError: a value out of its range.
    """
    keys = ("seed", "accumulate", "clip_norm", "ema_decay")
    found = {key: job.content[key] for key in keys if key in job.content}
    found |= {key: value for key, value in overrides.items() if value is not None}
    return TrainOptions(iters=job.iters, batch_size=job.batch_size, **found)


def check_data(job: Job, *parts: str, skip: bool) -> None:
    """Check a job's data sets before their use, or log that they are not checked.

    Args:
        job: the job with the data sets.
        parts: `train_dataset`, `val_dataset`.
        skip: do not check; only log this.

    Raises:
        DataError, ConfigError: see `Job.check_data`.
    """
    if skip:
        logger.warning(
            f"{', '.join(parts)}: not checked (--skip_check): a damaged image or a wrong label "
            "is found when it is read, or not at all"
        )
        return
    job.check_data(*parts)


def run_training(
    job: Job,
    folder: RunFolder,
    options: TrainOptions,
    *,
    do_eval: bool,
    use_vdl: bool,
    use_tensorboard: bool = False,
    histograms: bool = False,
    device: str = "cpu",
    model_path: str | Path | None = None,
    skip_check: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Progress:
    """Train as configured; return the best score and its step.

    Args:
        job: the job to train.
        folder: folder of the run.
        options: options of the run.
        do_eval: score the model at every checkpoint, and keep the best.
        use_vdl: write records for VisualDL.
        use_tensorboard: write records for TensorBoard.
        histograms: with one of these, also record histograms of the weights at every checkpoint.
        device: cpu, gpu or gpu:N.
        model_path: initial weights.
        skip_check: do not check the data set first.
        callbacks: further callbacks, on rank 0.

    Raises:
        DataError, ConfigError, FolderInUseError, CheckpointError: before anything is written.
        TrainingStopped, FloatingPointError, DataReadError, ReaderError, StorageError: see
            `Trainer.fit`.
    """
    # Locked from here on, so that the checkpoint does not change between reading and continuing.
    with folder.hold_lock() if paddle.distributed.get_rank() == 0 else contextlib.nullcontext():
        trainer = _trainer(job, folder, options, do_eval, device, model_path, skip_check)
        # All of this is built before anything is written.
        _open_folder(job, trainer, do_eval, use_vdl, use_tensorboard, histograms, callbacks)
        return trainer.fit()


def _trainer(
    job: Job,
    folder: RunFolder,
    options: TrainOptions,
    do_eval: bool,
    device: str,
    model_path: str | Path | None,
    skip_check: bool,
) -> Trainer:
    rank, world = paddle.distributed.get_rank(), paddle.distributed.get_world_size()
    if rank == 0:
        folder.check_new(options.resume is not None)
        check_data(job, "train_dataset", *(["val_dataset"] if do_eval else []), skip=skip_check)
    paddle.seed(options.seed)  # initial weights are equal on every rank
    if world > 1 and device.startswith("gpu"):
        nn.SyncBatchNorm.convert_sync_batchnorm(job.float_model)
    if model_path is not None:
        job.start_from(model_path)  # a checkpoint, if there is one, replaces them
        logger.info(f"weights: starting from {model_path}")
    return Trainer(
        job.model,
        job.optimizer,
        job.train_dataset,
        job.make_passes(),
        partial(job.scores, num_workers=options.num_workers) if do_eval else None,
        folder,
        options,
        job.content,
        job.batched,
        partial(job.begin_step, options.seed),
    )


def _open_folder(
    job: Job,
    trainer: Trainer,
    do_eval: bool,
    use_vdl: bool,
    use_tensorboard: bool,
    histograms: bool,
    callbacks: Sequence[Callback],
) -> None:
    """Write the config, and connect the trainer to the dashboard."""
    rank, world = trainer.rank, trainer.ranks
    folder, options, model = trainer.folder, trainer.options, trainer.model
    if rank == 0:
        folder.open(job.content | {"run": asdict(options)})
        move_log(folder.log)
    if world > 1:
        paddle.distributed.barrier()
    if rank == 0:
        progress = trainer.progress
        dashboard = Dashboard(folder, use_vdl, progress.step, progress.evaluated, use_tensorboard)
        _describe(dashboard, job, folder, options, do_eval)
        per_step = options.batch_size * options.accumulate * world
        trainer.callbacks += [
            ProgressLog(options.iters, per_step),
            DashboardLog(
                dashboard,
                partial(job.pictures, model) if do_eval and (use_vdl or use_tensorboard) else None,
                model if histograms else None,
            ),
            *callbacks,
        ]
    job.prepare_training()


def _describe(
    dashboard: Dashboard, job: Job, folder: RunFolder, options: TrainOptions, do_eval: bool
) -> None:
    environment = describe_environment()
    dashboard.text("config", "```\n" + folder.config.read_text(encoding="utf-8") + "\n```")
    dashboard.text("environment", "\n".join(f"{k}: {v}  " for k, v in environment.items()))
    scores = list(job.score_tags) if do_eval else []
    if do_eval and options.use_ema:
        scores += [tag.replace("/", "/Ema_", 1) for tag in job.score_tags]
    values = flatten_settings(job.content) | flatten_settings({"run": asdict(options)})
    dashboard.settings(values, [*scores, "Train/loss"])


_NO_SETTINGS = {"task", "train_dataset", "val_dataset", "test_config", "imports"}
_NO_SETTINGS |= {"teacher/classes"}
_NO_SETTINGS |= {"TrainDataset", "EvalDataset", "TestDataset"}
_NO_SETTINGS |= {"run/log_iters", "run/save_interval", "run/keep_checkpoint_max"}
_NO_SETTINGS |= {"run/num_workers", "run/resume"}


def flatten_settings(content: dict, where: str = "") -> dict[str, float | str]:
    """Return the single values of a config by path, except data sets: numbers as floats, others as
    text.

    Of the options of the run, only those that affect the result are included, without `run/` before
    them. Paths have slashes, because VisualDL's table shows empty cells for names with dots.
    """
    values: dict[str, float | str] = {}
    for key, value in content.items():
        path = f"{where}/{key}" if where else str(key)
        if path in _NO_SETTINGS:
            continue
        if isinstance(value, dict):
            values |= flatten_settings(value, path)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                values |= flatten_settings({str(number): item}, path)
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            values[path.removeprefix("run/")] = float(value) if number else str(value)
    return values
