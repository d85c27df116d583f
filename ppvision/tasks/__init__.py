"""Configured jobs, one module a task."""

from pathlib import Path

from ppvision.tasks.config import (
    apply_options,
    check_untagged,
    import_modules,
    read_yaml,
    task_of,
)
from ppvision.tasks.multibit.widths import read_slim_config


def open_job(
    config_path: str | Path,
    options: list[str] = (),
    *,
    slim_config: str | Path | None = None,
    allow_download: bool = False,
    **overrides: object,
):
    """Read a config and build the job of its task.

    Args:
        config_path: YAML.
        options: `--opts` entries, `a.b=value`.
        slim_config: a file that says how to quantise (`ppvision.tasks.multibit.widths`); its keys
            go in the place of the config's own `slim_config`.
        allow_download: fetch the `pretrained` weights of PaddleSeg's and PaddleDetection's
            components where the config gives an address.
        **overrides: `batch_size, iters, epochs, learning_rate`; None keeps the config's.

    Raises:
        ConfigError: a config that does not read, or that names something unknown.
    """
    content = read_yaml(config_path)
    if slim_config is not None:
        content["slim_config"] = read_slim_config(slim_config)
    apply_options(content, list(options))
    task = task_of(content)
    import_modules(content.get("imports", []))
    if task == "detection":
        from ppvision.tasks.detection.job import Detection as Job
    else:
        check_untagged(content)
        if task == "classification":
            from ppvision.tasks.classification.job import Classification as Job
        else:
            from ppvision.tasks.segmentation.job import Segmentation as Job
    if task != "classification":  # whose weights are files and names of the zoo
        overrides["allow_download"] = allow_download
    return Job(content, Path(config_path).stem, **overrides)
