"""Configured jobs, one folder per task; `job.py` has their contract."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppvision.configs import find_config
from ppvision.safe_yaml import drop_places
from ppvision.tasks.config import (
    apply_options,
    check_untagged,
    find_task,
    import_modules,
    read_yaml,
)
from ppvision.tasks.job import Job, apply_overrides
from ppvision.tasks.multibit.job import MultiBitJob
from ppvision.tasks.multibit.slim_config import read_slim_config

# The place of the class of each task. Only the class for the config is imported, because PaddleSeg
# and PaddleDetection may not be installed.
JOBS = {
    "classification": "ppvision.tasks.classification.job:Classification",
    "segmentation": "ppvision.tasks.segmentation.job:Segmentation",
    "detection": "ppvision.tasks.detection.job:Detection",
}


def open_job(
    config_path: str | Path,
    options: Sequence[str] = (),
    *,
    slim_config: str | Path | None = None,
    allow_download: bool = False,
    **overrides: Any,
) -> Job:
    """Read a config and build the job of its task.

    Args:
        config_path: YAML, or the name of a packaged config (`ppvision configs`).
        options: `--opts` entries, `a.b=value`.
        slim_config: a file that describes the quantisation (`ppvision.tasks.multibit.slim_config`);
            its keys replace the config's own `slim_config`.
        allow_download: download `pretrained` weights of PaddleSeg's and PaddleDetection's
            components if the config gives a URL.
        **overrides: `batch_size, iters, epochs, learning_rate`; None keeps the config's.

    Returns:
        The job of the task; with a `slim_config`, a `MultiBitJob` around it.

    Raises:
        ConfigError: the config cannot be read, or names something unknown.
        MissingPackageError: the package that the task needs is not installed.
    """
    config_path = find_config(config_path)
    content = read_yaml(config_path)
    if slim_config is not None:
        content["slim_config"] = read_slim_config(slim_config)
    apply_options(content, list(options))
    task = find_task(content, JOBS)
    import_modules(content.get("imports", []))
    module, name = JOBS[task].split(":")
    kind = getattr(importlib.import_module(module), name)
    if not kind.takes_tags:
        check_untagged(content)
    rest = apply_overrides(content, kind.override_keys, **overrides)
    job: Job = kind(content, config_path.stem, allow_download=allow_download, **rest)
    if "slim_config" in content:
        return MultiBitJob(job, drop_places(content["slim_config"]))
    return job
