"""What every training run does around the engine, whatever its task."""

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

# Keys of a config that the engine reads, for every task.
ENGINE_KEYS = (
    *("task", "imports", "seed", "batch_size", "iters", "accumulate", "clip_norm"),
    *("ema_decay", "slim_config"),
    "run",  # in a run folder's config.yml, how it was run; not read
)


def count_steps(epochs: int, dataset: paddle.io.Dataset, content: dict) -> int:
    """Optimiser steps in so many passes over the data, on all ranks together; at least one."""
    batches = count_batches_per_epoch(
        len(dataset), content["batch_size"], paddle.distributed.get_world_size()
    )
    return max(1, epochs * batches // content.get("accumulate", 1))


def train_options(job: Job, **overrides: object) -> TrainOptions:
    """How to run, from a config's own keys and the command line; None keeps the config's.

    Raises:
        ValueError: a value out of its range.
    """
    keys = ("seed", "accumulate", "clip_norm", "ema_decay")
    found = {key: job.content[key] for key in keys if key in job.content}
    found |= {key: value for key, value in overrides.items() if value is not None}
    return TrainOptions(iters=job.iters, batch_size=job.batch_size, **found)


def check_data(job: Job, *parts: str, skip: bool) -> None:
    """Look at a job's data sets before they are used, or say that nobody did.

    Args:
        job: whose data sets they are.
        parts: `train_dataset`, `val_dataset`.
        skip: only say so.

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
    """Train as configured; returns the best score and its step.

    Args:
        job: what to train.
        folder: where the run goes.
        options: how to run.
        do_eval: score the model at every checkpoint, and keep the best.
        use_vdl: record for VisualDL.
        use_tensorboard: record for TensorBoard.
        histograms: with one of these, also the distributions of the weights at every checkpoint.
        device: cpu, gpu or gpu:N.
        model_path: weights to start from.
        skip_check: do not look at the data set first.
        callbacks: more of them, on rank 0.

    Raises:
        DataError, ConfigError, FolderInUseError, CheckpointError: before anything is written.
        TrainingStopped, FloatingPointError, DataReadError, ReaderError, StorageError: see
            `Trainer.fit`.
    """
    # Held from here on, so that what is read of it is what is then gone on from.
    with folder.hold_lock() if paddle.distributed.get_rank() == 0 else contextlib.nullcontext():
        trainer = _trainer(job, folder, options, do_eval, device, model_path, skip_check)
        # Nothing is written before all of this has been built.
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
    paddle.seed(options.seed)  # initial weights, the same on every rank
    if world > 1 and device.startswith("gpu"):
        nn.SyncBatchNorm.convert_sync_batchnorm(job.float_model)
    if model_path is not None:
        job.start_from(model_path)  # a checkpoint, where there is one, goes over it
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
    """Write the config, and let the trainer tell the dashboard of what happens."""
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
    """The single values of a config by path, but for data sets: numbers as floats, others as text.

    Of how it was run, what decides the result; without the `run/` before it. Paths have slashes:
    VisualDL's table leaves cells under names with dots empty.
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
