"""What the processes (ranks) of one training tell each other."""

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
    """Another process of the training, or the way to it, is gone."""


_CHUNK = 1 << 26  # bytes of a file that are sent at once


def _gather(value: object) -> list:
    """The value of each rank; pickled by Paddle, between the processes of one training only."""
    values: list = []
    paddle.distributed.all_gather_object(values, value)
    return values


def on_one_machine() -> bool:
    """Whether all ranks are here, and so get a signal to the launcher."""
    return os.environ.get("PADDLE_NNODES", "1") == "1"  # set by Paddle's launcher


def ask_first(question: Callable[[], Answer]) -> Answer:
    """What rank 0 answers, on every rank. Other ranks do not ask: they may be on a machine that
    lacks the files.

    Raises:
        PpvisionError: that of rank 0, on every rank.
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
    """Whether gloo says that the connection to another process has ended."""
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def average_over_ranks(numbers: dict[str, float]) -> dict[str, float]:
    """The means over all ranks; every rank calls it with the same names."""
    total = paddle.to_tensor(list(numbers.values()), "float64")
    paddle.distributed.all_reduce(total)
    means = (total / paddle.distributed.get_world_size()).tolist()
    return dict(zip(numbers, means, strict=True))


def _norm_statistics(model: nn.Layer) -> list[Tensor]:
    """Running means and variances: of BatchNorm, which Paddle keeps as parameters, and of each
    trained width (`w4_mean`), which are buffers."""
    return [
        tensor
        for layer in model.sublayers(include_self=True)
        for held in (layer._parameters, layer._buffers)
        for name, tensor in held.items()
        if tensor is not None and name.endswith(("_mean", "_variance"))
    ]


@paddle.no_grad()
def average_statistics(*models: nn.Layer) -> None:
    """Give BatchNorm's running statistics of all ranks their mean, on every rank.

    Without SyncBatchNorm each rank normalises by its own batch, and its running variance is the
    mean of the variances of such batches. The mean over ranks is the same over more batches, and
    does not contain the variance between batches, by which no rank normalised.
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
    """A folder of rank 0, for every rank: itself where it is on the rank's own file system as
    well, otherwise a copy, which goes at the end.

    Args:
        folder: flat, as rank 0 names it; every rank calls it.
        record: name of the file in it by which two folders are told apart.
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
    """From rank 0 to all others; those that `write` keep them."""
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
