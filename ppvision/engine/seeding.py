"""Seeds with which a resumed run repeats its random numbers.

The data loader reads ahead, so the state of the global generators at a checkpoint does not tell
which samples were drawn. Therefore every sample is seeded from (seed, epoch, index), and every
batch of a step from (seed, batch, rank). Functions that mix the samples of a batch (mixup) draw
when the batch is collated, directly after its last sample, and so repeat as well.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import paddle

from ppvision.errors import InputError, shorten_text
from ppvision.forms.paddle_private import collate_samples


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed from any numbers; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_batch(seed: int, batch: int, rank: int = 0) -> None:
    """Seed Paddle's generators (dropout, stochastic depth) for one batch of one rank."""
    paddle.seed(derive_seed(seed, batch, rank))


def sample_name(dataset: paddle.io.Dataset, index: int) -> str:
    """Return a name of sample `index` for messages: its file, or its number if it has no file.

    The file is the first entry of `dataset.file_list[index]` (PaddleSeg) or of
    `dataset.samples[index]`.
    """
    files = getattr(dataset, "file_list", None) or getattr(dataset, "samples", None)
    return str(files[index][0]) if files else f"sample {index}"


UNREADABLE = "ppvision: unreadable sample"


@dataclass(frozen=True)
class UnreadableSample:
    """Represents a sample that raised while it was read.

    Paddle's loader hangs forever if a sample raises in the thread that reads ahead. So the error is
    passed as a value, and the trainer raises it.
    """

    message: str


def collate(samples: list, batched: Callable[[list], object] = collate_samples) -> object:
    """Collate samples to a batch. If a sample is unreadable, or samples do not fit together, the
    batch is `{UNREADABLE: message}`.

    Args:
        samples: samples of one batch.
        batched: function that collates them. Default: Paddle's own.
    """
    problem = next((s.message for s in samples if isinstance(s, UnreadableSample)), None)
    if problem is None:
        try:
            batch = batched(samples)
            problem = _find_strange_array(batch)
            if problem is None:
                return batch
        except Exception as error:  # a function of the user may raise anything
            shapes = sorted({str(list(array.shape)) for s in samples for array in _arrays(s)})
            problem = (
                f"train_dataset: the samples of a batch do not fit together: "
                f"{type(error).__name__}: {shorten_text(str(error))}. Their shapes: "
                f"{shorten_text(', '.join(shapes))}. Bring all to one size (Resize, or a crop with "
                "padding, last among the transforms)."
            )
    # The loader needs an array in every batch.
    return {UNREADABLE: problem, "none": np.zeros(1, np.float32)}


# Types that Paddle's loader converts to tensors.
_TYPES = "bool, float16, float32, float64, int8, int16, int32, int64, uint8, uint16"
_DTYPES = {np.dtype(name) for name in _TYPES.split(", ")}


def _find_strange_array(batch: object) -> str | None:
    """Describe an array that Paddle's loader cannot pass on; the loader itself would end without a
    message."""
    if isinstance(batch, np.ndarray) and batch.dtype not in _DTYPES:
        return (
            f"train_dataset: a sample holds an array of type {batch.dtype}, shape "
            f"{list(batch.shape)}: expected one of {_TYPES}, in this machine's byte order. Convert "
            "it in the data set or as the last of the transforms."
        )
    if not isinstance(batch, Mapping | list | tuple):
        return None
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((found for part in parts if (found := _find_strange_array(part))), None)


def _arrays(sample: object) -> list[np.ndarray]:
    parts = sample.values() if isinstance(sample, dict) else sample
    return [part for part in parts if isinstance(part, np.ndarray) and part.ndim]


class SeededDataset(paddle.io.Dataset):
    """A data set whose samples do not depend on the time or the process in which they are read.

    It is indexed by `(epoch, index)`, the entries of `SeededBatches`. If the data set has a method
    `set_epoch`, it is called with the epoch before each sample.
    """

    def __init__(self, dataset: paddle.io.Dataset, seed: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> object:
        epoch, index = key
        value = derive_seed(self.seed, epoch, index)
        random.seed(value)
        np.random.seed(value)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        try:
            return self.dataset[index]
        except Exception as error:  # a data set or transform may raise anything
            return UnreadableSample(
                f"train_dataset: sample {index} ({sample_name(self.dataset, index)}) could not be "
                f"read: {type(error).__name__}: {shorten_text(str(error))}"
            )

    def __len__(self) -> int:
        return len(self.dataset)


def count_batches_per_epoch(samples: int, batch_size: int, ranks: int) -> int:
    """Return the number of batches of one rank in one pass over the data.

    The data are divided as in `paddle.io.DistributedBatchSampler`: ranks that lack a sample take
    one from the start, and an incomplete last batch is dropped.
    """
    return -(-samples // ranks) // batch_size


class SeededBatches(paddle.io.BatchSampler):
    """The batches `start` to `stop` of one rank, over as many epochs as needed.

    The order is that of `paddle.io.DistributedBatchSampler` (shuffled, incomplete last batch
    dropped), which PaddleSeg uses: with seed 0 both give the same batches.

    Raises:
        ValueError: there are fewer samples than one batch on every rank needs.
    """

    def __init__(
        self, dataset: paddle.io.Dataset, batch_size: int, seed: int, start: int, stop: int
    ) -> None:
        self.sampler = paddle.io.DistributedBatchSampler(
            dataset, batch_size=batch_size, shuffle=True, drop_last=True
        )
        self.per_epoch = count_batches_per_epoch(len(dataset), batch_size, self.sampler.nranks)
        if self.per_epoch == 0:
            raise InputError(
                f"train_dataset: expected at least batch_size={batch_size} samples for each of "
                f"{self.sampler.nranks} process(es), got {len(dataset)}. Lower --batch_size."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        number = self.start
        while number < self.stop:
            epoch, skip = divmod(number, self.per_epoch)
            self.sampler.set_epoch((self.seed + epoch) % 2**32)
            for position, batch in enumerate(self.sampler):
                if position < skip:
                    continue
                yield [(epoch, index) for index in batch]
                number += 1
                if number == self.stop:
                    return
