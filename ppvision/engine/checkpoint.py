"""Checkpoints: complete or not there, and without pickle.

checkpoints/step_N/
    model.safetensors       every parameter and statistic
    optimizer.safetensors   every moment, under the name of its parameter in the model
    ema.safetensors         the averaged model, when there is one
    config.yml              the resolved config of the run
    state.json              step, epoch and batch, schedule, loss scaling, best score, and the
                            files' sha256
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
import yaml
from paddle import nn

from ppvision.run_folder import sync_folder, write_text
from ppvision.zoo.weights import WeightsError, assign_weights, read_weights, save_weights


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another model."""


@dataclass
class Progress:
    """Where a run stands, beside its arrays.

    After `step` steps, `batch` batches of epoch `epoch` (from 0) are done. What follows a
    checkpoint (evaluation, pictures) last came to its end at step `evaluated`. `sums` of
    the last `summed` steps wait for the next log line.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches_per_epoch: int = 0
    evaluated: int = 0
    best_score: float = -1.0
    best_step: int = -1
    schedule: dict = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)
    sums: dict = field(default_factory=dict)
    summed: int = 0


def arrays_of(layer: nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def _optimizer_arrays(
    model: nn.Layer, optimizer: paddle.optimizer.Optimizer
) -> dict[str, np.ndarray]:
    """Moments under `sublayer.path|moment`: Paddle's own keys hold process-wide counters."""
    paths = {p.name: path for path, p in model.named_parameters()}
    arrays = {}
    for key, value in optimizer.state_dict().items():
        if not isinstance(value, paddle.Tensor):
            continue
        name = max((n for n in paths if key.startswith(n + "_")), key=len, default=None)
        if name is None:
            raise CheckpointError(f"optimizer: expected a moment of a parameter, got {key!r}.")
        arrays[f"{paths[name]}|{key[len(name) + 1 :]}"] = value.numpy()
    return arrays


def save_checkpoint(
    folder: Path,
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    progress: Progress,
    ema: nn.Layer | None,
    keep: int,
    config: dict,
) -> Path:
    """Write `folder/step_N`: everything beside it first, then renamed; then drop the oldest.

    Args:
        folder: the run's `checkpoints`.
        model, optimizer, progress, ema: what a resume needs.
        keep: checkpoints to keep, at least 1.
        config: written beside them.

    Raises:
        OSError: the disk is full, for one; nothing of the new checkpoint is left, the older ones
            are as they were, and the message names the newest.
    """
    final = folder / f"step_{progress.step}"
    partial = folder / f".step_{progress.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_parts(partial, model, optimizer, progress, ema, config)
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            older = [str(path) for path in list_checkpoints(folder)]
            rest = f"Complete is {older[-1]}" if older else "There is no older one"
            raise OSError(
                error.errno,
                f"checkpoint: could not write {final} ({error.strerror or error}). {rest}. Make "
                "room, then go on with --resume auto",
            ) from error
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _write_parts(
    folder: Path,
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    progress: Progress,
    ema: nn.Layer | None,
    config: dict,
) -> None:
    parts = {"model": arrays_of(model), "optimizer": _optimizer_arrays(model, optimizer)}
    if ema is not None:
        parts["ema"] = arrays_of(ema)
    for name, arrays in parts.items():
        save_weights(arrays, folder / f"{name}.safetensors")
    write_text(folder / "config.yml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
    _write_state(folder, hashes, progress)


def _write_state(folder: Path, hashes: dict[str, str], progress: Progress) -> None:
    state = {"format": 1, "files": hashes, **vars(progress)}
    write_text(folder / "state.json", json.dumps(state, indent=2))


def update_progress(path: Path, progress: Progress) -> None:
    """Write the progress of a checkpoint anew, such as the score of an evaluation since."""
    files = json.loads((path / "state.json").read_text(encoding="utf-8"))["files"]
    _write_state(path, files, progress)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _read_state(path: Path) -> dict:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = state["files"]
        for name, expected in files.items():
            found = hashlib.sha256((path / name).read_bytes()).hexdigest()
            if found != expected:
                raise CheckpointError(f"{path / name}: expected sha256 {expected}, got {found}.")
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error}).") from error
    return state


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: `auto` takes the newest, None when there is none.

    Raises:
        FileNotFoundError: a path that is not there.
    """
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not path.is_dir():
        near = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise FileNotFoundError(
            f"resume: expected `auto` or a checkpoint's folder, got {resume!r}. "
            f"In {folder}: {near}."
        )
    return path


def read_config(path: Path) -> dict:
    """The config that a checkpoint was written under; empty where it has none."""
    file = path / "config.yml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}


def load_checkpoint(
    path: Path, model: nn.Layer, optimizer: paddle.optimizer.Optimizer, ema: nn.Layer | None
) -> Progress:
    """Put a checkpoint into a model, its optimizer and its averaged copy.

    Raises:
        CheckpointError: damaged, or of another model or optimizer.
    """
    try:
        state = _read_state(path)
    except CheckpointError as error:
        older = [p.name for p in list_checkpoints(path.parent) if p != path]
        raise CheckpointError(
            f"{error} Go on from another one: "
            + (f"--resume {path.parent / older[-1]}" if older else "there is none.")
        ) from error
    try:
        assign_weights(model, read_weights(path / "model.safetensors"), str(path))
        if ema is not None:
            if "ema.safetensors" not in state["files"]:
                raise CheckpointError(f"{path}: expected averaged weights (--use_ema), got none.")
            assign_weights(ema, read_weights(path / "ema.safetensors"), f"{path} (ema)")
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    names = {path_: p.name for path_, p in model.named_parameters()}
    moments = {}
    for key, array in read_weights(path / "optimizer.safetensors").items():
        parameter, moment = key.rsplit("|", 1)
        if parameter not in names:
            raise CheckpointError(
                f"{path}: optimizer holds {parameter!r}, which the model has not."
            )
        moments[f"{names[parameter]}_{moment}"] = paddle.to_tensor(array)
    if state["schedule"]:
        moments["LR_Scheduler"] = state["schedule"]
    with warnings.catch_warnings():
        # Paddle says this of every LinearWarmup, whose inner schedule it restores afterwards.
        warnings.filterwarnings("ignore", message="There are some unused values in state_dict")
        optimizer.set_state_dict(moments)
    known = Progress.__dataclass_fields__
    return Progress(**{k: v for k, v in state.items() if k in known})
