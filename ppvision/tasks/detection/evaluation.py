"""Evaluate a detector by PaddleDetection's `Trainer`, with its own metrics.

The `Trainer` has the metrics. The batches are ours, because its loader hangs when a sample raises.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ppvision.console import track
from ppvision.deploy import Predictor
from ppvision.engine.reading import read_in_order
from ppvision.errors import DataError, shorten_text
from ppvision.tasks.detection.scores import Scores, average_coco_by_class, name_coco_means

# isort: split
from ppdet.data.source.dataset import ImageFolder
from ppdet.engine import Trainer
from ppdet.engine.callbacks import Callback
from ppdet.metrics import COCOMetric, VOCMetric


def evaluate_by_trainer(
    cfg: dict,
    model: nn.Layer,
    dataset: paddle.io.Dataset,
    reader: Any,
    kinds: Sequence[str],
    num_workers: int = 0,
) -> Scores:
    """Score a detector on a data set.

    Args:
        cfg: PaddleDetection's global config, active for this job.
        model: an architecture, or a replacement (`ExportedDetector`).
        dataset: parsed data set with the reader's transforms.
        reader: PaddleDetection's EvalReader.
        kinds: kinds of scores: "bbox", "mask".
        num_workers: processes that read images; 0 reads in this one.

    Raises:
        DataError: samples do not form a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        cfg["output_eval"] = folder
        cfg["model"], cfg["TestDataset"] = _Nothing(), ImageFolder()
        trainer = Trainer(cfg, "test")  # in this mode it starts no loader
        reader._batch_transforms.collate_batch &= cfg["metric"] != "VOC"
        trainer.mode, trainer.dataset, trainer.model = "eval", dataset, model
        trainer._init_callbacks()
        trainer._init_metrics()
        trainer._nranks = 1  # each rank separately, because no gradients are exchanged
        found = _Found(trainer, kinds, Path(folder))
        trainer.register_callbacks([found])
        batches = _Batches(dataset, reader)
        with (
            read_in_order(batches.read, range(len(batches)), num_workers) as batches.found,
            contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints its own table
        ):
            trainer.loader = batches
            trainer.evaluate()
    assert found.scores is not None  # set at the end of the evaluation
    return found.scores


class ExportedDetector(nn.Layer):
    """An exported detector instead of an architecture.

    Args:
        predictor: predictor of the export.
        dataset: parsed data set with the files of the images.
    """

    def __init__(self, predictor: Predictor, dataset: paddle.io.Dataset) -> None:
        super().__init__()
        self.predictor = predictor
        self.files = {int(roidb["im_id"][0]): roidb["im_file"] for roidb in dataset.roidbs}

    def forward(self, batch: dict) -> dict[str, np.ndarray]:
        """Return the input of PaddleDetection's metrics: rows `[N, 6]`, counts `[B]`, masks `[N, H,
        W]`."""
        found = [self.predictor(self.files[int(k)]) for k in batch["im_id"].numpy().reshape(-1)]
        rows = [np.column_stack([d.class_ids, d.scores, d.boxes]).astype(np.float32) for d in found]
        counts = np.array([len(d) for d in found], np.int32)
        outputs = {"bbox": np.concatenate(rows), "bbox_num": counts}
        if found[0].masks is not None:
            height, width = (max(d.masks.shape[axis] for d in found) for axis in (1, 2))
            # PaddleDetection cuts off values of -1, beyond an image's edge.
            masks = np.full((counts.sum(), height, width), -1, np.int32)
            for end, d in zip(np.cumsum(counts), found, strict=True):
                masks[end - len(d) : end, : d.masks.shape[1], : d.masks.shape[2]] = d.masks
            outputs["mask"] = masks
        return outputs


class _Batches:
    """The batches of an evaluation, in order.

    Args:
        dataset: data set with a reader's transforms.
        reader: PaddleDetection's.
    """

    def __init__(self, dataset: paddle.io.Dataset, reader: Any) -> None:
        self.dataset, self.batched = dataset, reader._batch_transforms
        self.batch_size = reader.batch_size
        self.found: Iterator[dict] = iter(())  # results of `read`, one batch after another

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def read(self, number: int) -> dict:
        """Read one batch as arrays."""
        start = number * self.batch_size
        places = range(start, min(start + self.batch_size, len(self.dataset)))
        try:
            return self.batched([self.dataset[place] for place in places])
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"EvalReader: samples {start} to {places[-1]} do not form a batch "
                f"({shorten_text(str(error))}). If their sizes differ, end with a Resize of "
                "one size, pad them (PadBatch), or take batch_size 1; an EvalDataset needs no "
                "data_fields."
            ) from error

    def __iter__(self) -> Iterator[dict]:
        hidden = paddle.distributed.get_rank() > 0
        for batch in track(self.found, "eval", len(self), "batch", hidden=hidden):
            yield {key: _as_tensors(value) for key, value in batch.items()}


def _as_tensors(value: object) -> object:
    """Convert arrays to tensors, also arrays in a list."""
    if isinstance(value, list):
        return [_as_tensors(item) for item in value]
    return paddle.to_tensor(value) if isinstance(value, np.ndarray) else value


class _Nothing(nn.Layer):
    """Represents a model while PaddleDetection's `Trainer` is built."""

    def load_meanstd(self, transforms: list) -> None:
        """Accept the normalisation of images, which PaddleDetection gives to architectures."""


class _Found(Callback):
    """Takes the scores of an evaluation before PaddleDetection's `Trainer` deletes them.

    Args:
        trainer: a trainer with one metric.
        kinds: kinds of scores: "bbox", "mask".
        folder: folder with the metric's results as JSON.
    """

    def __init__(self, trainer: Trainer, kinds: Sequence[str], folder: Path) -> None:
        super().__init__(trainer)
        self.kinds = kinds
        self.folder = folder
        self.scores: Scores | None = None

    def on_epoch_end(self, status: dict) -> None:
        (metric,) = self.model._metrics
        voc = isinstance(metric, VOCMetric)
        self.scores = _voc_scores(metric) if voc else self._coco_scores(metric)

    def _coco_scores(self, metric: COCOMetric) -> Scores:
        truth = COCO(metric.anno_file)
        means, by_class = {}, {}
        for kind in self.kinds:
            found = self.folder / f"{kind}.json"
            if not found.exists():  # nothing was found in any image
                means[kind] = dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
                counted = [truth.getAnnIds(catIds=[k], iscrowd=False) for k in truth.getCatIds()]
                by_class[kind] = np.array([0.0 if objects else np.nan for objects in counted])
                continue
            means[kind] = name_coco_means(metric.get_results()[kind])
            again = COCOeval(truth, truth.loadRes(str(found)), "segm" if kind == "mask" else kind)
            again.evaluate()
            again.accumulate()
            by_class[kind] = average_coco_by_class(again)
        return Scores(means, by_class)


def _voc_scores(metric: VOCMetric) -> Scores:
    found = metric.detection_map
    # In the order of the classes; the printed names are wrong after a class without objects.
    results = iter(found.eval_results)
    by_class = []
    for scored, count in zip(found.class_score_poss, found.class_gt_counts, strict=True):
        missed = 0.0 if count else np.nan
        by_class.append(next(results)["ap"] if count and len(scored) else missed)
    return Scores({"bbox": {"mAP": float(found.get_map())}}, {"bbox": np.array(by_class)})
