"""Write and read checkpoints: each is complete or does not exist, and contains no pickle.

checkpoints/step_N/
    model.safetensors       every parameter and statistic
    optimizer.safetensors   every moment, under the name of its parameter in the model
    ema.safetensors         the averaged model, when there is one
    config.yml              the resolved config of the run
    state.json              step, epoch and batch, schedule, loss scaling, best score, and the
                            files' sha256
"""

import hashlib
import itertools
import json
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision.errors import (
    MissingFileError,
    PpvisionError,
    StorageError,
    WeightsError,
    shorten,
    shorten_text,
)
from ppvision.files import sync_folder, write_text
from ppvision.safe_yaml import drop_places, format_yaml, load_yaml
from ppvision.zoo.weights import assign_weights, read_weights, save_weights


class CheckpointError(PpvisionError, ValueError):
    """A checkpoint is incomplete, damaged or of another model."""


@dataclass
class Progress:
    """Progress of a run, without its arrays.

    After `step` steps, `batch` batches of epoch `epoch` (from 0) are done. The work after a
    checkpoint (evaluation, images) was last completed at step `evaluated`. `sums` of the last
    `summed` steps are for the next log line.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches_per_epoch: int = 0
    data: str = ""  # digest of the samples' names, in their order
    evaluated: int = 0
    best_score: float = -1.0
    best_step: int = -1
    schedule: dict = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)
    sums: dict = field(default_factory=dict)
    summed: int = 0


def collect_arrays(layer: nn.Layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def _optimizer_arrays(
    model: nn.Layer, optimizer: paddle.optimizer.Optimizer
) -> dict[str, np.ndarray]:
    """Return moments with keys `sublayer.path|moment`, because Paddle's own keys contain
    process-wide counters."""
    paths = {p.name: path for path, p in model.named_parameters()}
    arrays = {}
    for key, value in optimizer.state_dict().items():
        if not isinstance(value, paddle.Tensor):
            continue
        name = max((n for n in paths if key.startswith(n + "_")), key=len, default=None)
        if name is None:
            raise CheckpointError(
                f"optimizer: expected a moment of a parameter, got {shorten(key)}."
            )
        arrays[f"{paths[name]}|{key[len(name) + 1 :]}"] = value.numpy()
    return arrays


def save_checkpoint(
    folder: Path,
    model: nn.Layer,
    optimizer: paddle.optimizer.Optimizer,
    progress: Progress,
    ema: nn.Layer | None,
    keep: int | None,
    config: dict,
) -> Path:
    """Write `folder/step_N`, and remove the oldest checkpoints.

    A temporary folder gets all files first; then it gets the final name.

    Args:
        folder: the run's `checkpoints`.
        model, optimizer, progress, ema: the state that a resume needs.
        keep: checkpoints to keep, at least 1; None keeps all.
        config: the config, written to the same folder.

    Raises:
        OSError: for example, the disk is full, or there is a checkpoint of this step (see
            `set_aside`). The new checkpoint is removed, and older ones do not change.
    """
    final = folder / f"step_{progress.step}"
    partial = folder / f".step_{progress.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_parts(partial, model, optimizer, progress, ema, config)
        sync_folder(partial)
        partial.replace(final)
        sync_folder(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            error.errno, f"checkpoint: could not write {final} ({reason})"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if keep is not None:
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
    parts = {"model": collect_arrays(model), "optimizer": _optimizer_arrays(model, optimizer)}
    if ema is not None:
        parts["ema"] = collect_arrays(ema)
    for name, arrays in parts.items():
        save_weights(arrays, folder / f"{name}.safetensors")
    write_text(folder / "config.yml", format_yaml(config))
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
    _write_state(folder, hashes, type(optimizer).__name__, progress)


def _write_state(folder: Path, hashes: dict[str, str], optimizer: str, progress: Progress) -> None:
    state = {"format": 1, "files": hashes, "optimizer": optimizer, **vars(progress)}
    write_text(folder / "state.json", json.dumps({"sha256": _digest(state), **state}, indent=2))


def _digest(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def update_progress(path: Path, progress: Progress) -> None:
    """Update the progress of a checkpoint, for example with the score of a later evaluation."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _write_state(path, state["files"], state["optimizer"], progress)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def set_aside(folder: Path, step: int) -> list[Path]:
    """Move the checkpoints after `step` to `folder/abandoned`: a run that continues from an older
    checkpoint gives other weights, and `--resume auto` must not return to the later ones.

    Returns:
        Their new paths: `step_40`, or `step_40.2`, ... if one was abandoned before.
    """
    moved = []
    # The newest first: after a kill during the moves, the remaining checkpoints belong to one
    # course of training.
    for path in reversed(list_checkpoints(folder)):
        if int(path.name[5:]) > step:
            aside = folder / "abandoned"
            aside.mkdir(exist_ok=True)
            names = itertools.chain([path.name], (f"{path.name}.{k}" for k in itertools.count(2)))
            target = next(aside / name for name in names if not (aside / name).exists())
            moved.append(path.replace(target))
    return moved


def _read_state(path: Path) -> dict:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        expected = state.pop("sha256")
        if _digest(state) != expected:
            raise CheckpointError(f"{path / 'state.json'}: was changed (its sha256 differs).")
        for name, wanted in state["files"].items():
            found = hashlib.sha256((path / name).read_bytes()).hexdigest()
            if found != wanted:
                raise CheckpointError(f"{path / name}: expected sha256 {wanted}, got {found}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a complete checkpoint ({error}).") from error
    return state


def _newest_intact(folder: Path, before: Path) -> Path | None:
    """Return the newest checkpoint older than `before` that is complete and unchanged."""
    older = [path for path in list_checkpoints(folder) if path != before]
    if re.fullmatch(r"step_\d+", before.name):
        older = [path for path in older if int(path.name[5:]) < int(before.name[5:])]
    for path in reversed(older):
        try:
            _read_state(path)
        except CheckpointError:
            continue
        return path
    return None


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint for `--resume`: `auto` means the newest, or None if there is none.

    Raises:
        FileNotFoundError: the path does not exist.
    """
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not path.is_dir():
        near = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise MissingFileError(
            f"resume: expected `auto` or a checkpoint's folder, got "
            f"{shorten_text(str(resume), 200)!r}. In {folder}: {near}."
        )
    return path


def read_config(path: Path) -> dict:
    """Return the config of a checkpoint; empty if it has none."""
    file = path / "config.yml"
    return (
        drop_places(load_yaml(file.read_text(encoding="utf-8"), str(file))) if file.exists() else {}
    )


def load_checkpoint(
    path: Path, model: nn.Layer, optimizer: paddle.optimizer.Optimizer, ema: nn.Layer | None
) -> Progress:
    """Load a checkpoint into a model, its optimizer and its averaged copy.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model or optimizer.
    """
    try:
        state = _read_state(path)
    except CheckpointError as error:
        older = _newest_intact(path.parent, path)
        advice = "There is no older one that is intact."
        if older is not None:
            advice = f"Go on from the newest intact one before it: --resume {older}"
        raise CheckpointError(f"{error} {advice}") from error
    if state["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path}: expected the state of {type(optimizer).__name__}, got that of "
            f"{state['optimizer']}. Resume with the optimizer it was written with, or start a new "
            f"run from its weights: --model_path {path / 'model.safetensors'}"
        )
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
                f"{path}: optimizer holds {shorten(parameter)}, which the model does not have."
            )
        moments[f"{names[parameter]}_{moment}"] = paddle.to_tensor(array)
    if state["schedule"]:
        moments["LR_Scheduler"] = state["schedule"]
    with warnings.catch_warnings():
        # Paddle warns so for every LinearWarmup, whose inner schedule it restores afterwards.
        warnings.filterwarnings("ignore", message="There are some unused values in state_dict")
        optimizer.set_state_dict(moments)
    known = Progress.__dataclass_fields__
    return Progress(**{k: v for k, v in state.items() if k in known})
