"""Communication between the processes (ranks) of one training."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.errors import PpvisionError

Answer = TypeVar("Answer")


class RankLostError(PpvisionError, RuntimeError):
    """Another process of the training has ended, or the connection to it is lost."""


_CHUNK = 1 << 26  # bytes of a file per message


def _gather(value: object) -> list:
    """Return the value of each rank. Paddle pickles it, only between the processes of one
    training."""
    values: list = []
    paddle.distributed.all_gather_object(values, value)
    return values


def on_one_machine() -> bool:
    """Whether all ranks are on this machine, so that a signal to the launcher reaches all."""
    return os.environ.get("PADDLE_NNODES", "1") == "1"  # set by Paddle's launcher


def ask_first(question: Callable[[], Answer]) -> Answer:
    """Return rank 0's answer on every rank. Other ranks do not ask, because the files may be
    missing on their machine.

    Raises:
        PpvisionError: the error of rank 0, on every rank.
    """
    if paddle.distributed.get_world_size() == 1:
        return question()
    found: tuple[Answer | None, PpvisionError | None] = None, None
    if paddle.distributed.get_rank() == 0:
        try:
            found = question(), None
        except PpvisionError as error:
            found = None, error
    answer, error = _gather(found)[0]
    if error is not None:
        raise error
    return answer


def is_lost_rank(error: Exception) -> bool:
    """Whether gloo reports that the connection to another process has ended."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def average_over_ranks(numbers: dict[str, float]) -> dict[str, float]:
    """Return the means over all ranks; every rank calls it with the same names."""
    total = paddle.to_tensor(list(numbers.values()), "float64")
    paddle.distributed.all_reduce(total)
    means = (total / paddle.distributed.get_world_size()).tolist()
    return dict(zip(numbers, means, strict=True))


def _norm_statistics(model: nn.Layer) -> list[Tensor]:
    """Return running means and variances: those of BatchNorm, which Paddle keeps as parameters, and
    those of each trained width (`w4_mean`), which are buffers."""
    return [
        tensor
        for layer in model.sublayers(include_self=True)
        for held in (layer._parameters, layer._buffers)
        for name, tensor in held.items()
        if tensor is not None and name.endswith(("_mean", "_variance"))
    ]


@paddle.no_grad()
def average_statistics(*models: nn.Layer) -> None:
    """Set BatchNorm's running statistics to the mean over all ranks, on every rank.

    Without SyncBatchNorm each rank normalises with its own batch, and its running variance is the
    mean of the variances of such batches. The mean over ranks is the same mean over more batches.
    It does not contain the variance between batches, which no rank used.
    """
    tensors = [tensor for model in models for tensor in _norm_statistics(model)]
    if not tensors:
        return
    total = paddle.concat([tensor.astype("float64").flatten() for tensor in tensors])
    paddle.distributed.all_reduce(total)
    mean, start = total / paddle.distributed.get_world_size(), 0
    for tensor in tensors:
        part = mean[start : start + tensor.size]
        tensor.set_value(part.reshape(tensor.shape).astype(tensor.dtype))
        start += tensor.size


@contextmanager
def reach_folder(folder: Path, record: str) -> Iterator[Path]:
    """Give every rank a folder of rank 0: the folder itself if the rank's file system has it,
    otherwise a copy, which is removed at the end.

    Args:
        folder: path of the folder on rank 0, without sub-folders; every rank calls this function.
        record: name of the file that identifies the folder.
    """
    if paddle.distributed.get_world_size() == 1:
        yield folder
        return
    path = folder / record
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    found = _gather(digest)
    if all(other == found[0] for other in found):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ppvision-") as copied:
        _send_files(folder, Path(copied), write=digest != found[0])
        yield folder if digest == found[0] else Path(copied)


def _send_files(folder: Path, target: Path, write: bool) -> None:
    """Send files from rank 0 to all others; ranks with `write` keep them."""
    first = paddle.distributed.get_rank() == 0
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())} if first else {}
    for name, size in _gather(sizes)[0].items():
        content = np.fromfile(folder / name, np.uint8) if first else np.zeros(size, np.uint8)
        for start in range(0, size, _CHUNK):
            part = paddle.to_tensor(content[start : start + _CHUNK])
            paddle.distributed.broadcast(part, 0)
            content[start : start + _CHUNK] = part.numpy()
        if write:
            content.tofile(target / name)
