"""Detection: PaddleDetection's architectures, data, losses and metrics under our engine.

Configs are PaddleDetection's (`ppvision.tasks.detection_config`). Training takes its data set, its
readers' transforms, its learning rate, optimizer and losses; scores are those of its `Trainer`.
"""

import contextlib
import io
import logging
import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ppvision.data.coco_checks import check_coco
from ppvision.quant import OnceQAT
from ppvision.safe_yaml import Located, plain, yaml_text
from ppvision.tasks.config import ConfigError
from ppvision.tasks.detection_config import activate, check_config
from ppvision.tasks.detection_scores import Scores, coco_by_class, coco_means
from ppvision.tasks.quantization import ModelWithWidths, example_input, scores_by_width

# isort: split
from ppdet.core.workspace import create
from ppdet.data.source.category import get_categories
from ppdet.data.source.coco import COCODataSet
from ppdet.engine import Trainer
from ppdet.engine.callbacks import Callback
from ppdet.metrics import COCOMetric, VOCMetric

logger = logging.getLogger("ppvision")

EXAMPLE_SIDE = 128  # pixels of the picture that shows which layers run
EPOCH = "epoch_id"  # what PaddleDetection calls it in a batch


class Samples(paddle.io.Dataset):
    """A data set of PaddleDetection's, read and transformed, whose files have names.

    Args:
        dataset: parsed, with its transforms.

    Attributes:
        samples: `(path,)` of each.
    """

    def __init__(self, dataset: paddle.io.Dataset) -> None:
        super().__init__()
        self.dataset = dataset
        self.samples = [(roidb["im_file"],) for roidb in dataset.roidbs] * dataset.repeat
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Some transforms end after so many epochs."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**self.dataset[index], EPOCH: np.int64(self.epoch)}

    def __len__(self) -> int:
        return len(self.dataset)


class Detection(ModelWithWidths):
    """One configured job (`ppvision.tasks.training.Job`, and the other verbs).

    Args:
        content: the config, read and merged (`ppvision.tasks.open_job`).
        name: of the config.
        batch_size, iters, learning_rate, epochs: override the config's. `iters` ends training
            early; the learning rate is that of the config's epochs.

    Raises:
        ConfigError: an unknown key, component, transform or argument, with the nearest valid name
            and its place.
    """

    def __init__(
        self,
        content: Located,
        name: str,
        *,
        batch_size: int | None = None,
        iters: int | None = None,
        learning_rate: float | None = None,
        epochs: int | None = None,
    ) -> None:
        for value, path in (
            (batch_size, ("TrainReader", "batch_size")),
            (learning_rate, ("LearningRate", "base_lr")),
        ):
            if value is not None:
                content.setdefault(path[0], Located({}, {}))[path[1]] = value
        if epochs is not None:
            content["epoch"] = epochs
        check_config(content)
        self.name = name
        self.located = content
        self.content = plain(content)
        self._iters = iters

    # -- what the config names -----------------------------------------------------------------

    @property
    def score_tags(self) -> tuple[str, ...]:
        if self.content["metric"] == "VOC":
            return ("Evaluate/bbox_mAP",)
        kinds = ("bbox", "mask") if self._has_masks else ("bbox",)
        return tuple(f"Evaluate/{kind}_{name}" for kind in kinds for name in ("AP", "AP50", "AP75"))

    @property
    def _has_masks(self) -> bool:
        return bool(self.content.get(self.content["architecture"], {}).get("mask_head"))

    @property
    def config_text(self) -> str:
        """The resolved config as PaddleDetection reads it, tags and all."""
        return yaml_text(self.located)

    def _activated(self) -> dict:
        """PaddleDetection's global config, ours from now on."""
        cfg = activate(self.located, self.name)
        cfg.setdefault("worker_num", 0)
        cfg.setdefault("log_iter", 50)
        cfg.setdefault("snapshot_epoch", 1)
        for device in ("use_gpu", "use_npu", "use_mlu", "use_xpu"):
            cfg[device] = device == "use_gpu" and paddle.is_compiled_with_cuda()
        return cfg

    @property
    def batch_size(self) -> int:
        return self.content["TrainReader"].get("batch_size", 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        ranks = paddle.distributed.get_world_size()
        return max(1, len(self.train_dataset) // (self.batch_size * ranks))

    @property
    def iters(self) -> int:
        return self._iters or self.content["epoch"] * self.steps_per_epoch

    @cached_property
    def float_model(self) -> nn.Layer:
        cfg = self._activated()
        model = create(cfg.architecture)
        model.load_meanstd(cfg["TestReader"]["sample_transforms"])
        return model

    @cached_property
    def optimizer(self) -> paddle.optimizer.Optimizer:
        model = self.model.model if isinstance(self.model, OnceQAT) else self.model
        self._activated()
        rate = create("LearningRate")(self.steps_per_epoch)
        return create("OptimizerBuilder")(rate, model)

    @cached_property
    def _reader(self) -> object:
        """PaddleDetection's reader over its data set; its transforms alone are used."""
        self._activated()
        return create("TrainReader")(create("TrainDataset")(), 0)

    @cached_property
    def train_dataset(self) -> Samples:
        return Samples(self._reader.dataset)

    @property
    def example(self) -> dict[str, Tensor]:
        """A picture as the architectures take it."""
        sizes = paddle.full([1, 2], float(EXAMPLE_SIDE))
        image = example_input(3, EXAMPLE_SIDE)
        return {"image": image, "im_shape": sizes, "scale_factor": paddle.ones([1, 2])}

    @cached_property
    def class_names(self) -> list[str]:
        """Of the data set that evaluates, or that trains; empty where its file is not there."""
        part = "EvalDataset" if "EvalDataset" in self.content else "TrainDataset"
        dataset = self._dataset(part)
        path = dataset.get_anno()
        if path is None or not Path(path).is_file():
            logger.warning(f"class names: no {path}; classes go by number")
            return []
        _, names = get_categories(self.content["metric"], path)
        return [str(name) for name in names.values()]

    def _dataset(self, part: str) -> paddle.io.Dataset:
        if part not in self.content:
            raise ConfigError(f"config: detection: expected {part!r}, got none.")
        self._activated()
        return create(part)()

    def check_data(self, *parts: str) -> None:
        """Check annotations and pictures of `train_dataset` / `val_dataset`.

        Raises:
            DataError: one report of everything that is wrong.
        """
        for part in parts:
            part = {"train_dataset": "TrainDataset", "val_dataset": "EvalDataset"}[part]
            dataset = self._dataset(part)
            if isinstance(dataset, COCODataSet):
                images = Path(dataset.dataset_dir) / dataset.image_dir
                check_coco(part, Path(dataset.get_anno()), images, self.content["num_classes"])

    # -- train ---------------------------------------------------------------------------------

    def batched(self, samples: list[dict]) -> dict:
        epochs = [sample.pop(EPOCH) for sample in samples]
        return {**self._reader._batch_transforms(samples), EPOCH: epochs[0]}

    def losses(self, network: nn.Layer, batch: dict) -> list[Tensor]:
        """PaddleDetection's sum of all losses."""
        batch[EPOCH] = int(batch[EPOCH])
        return [network(batch)["loss"]]

    def scores(self, model: nn.Layer) -> dict[str, float]:
        """`evaluate`, by tag; of a once-QAT at every width."""
        return scores_by_width(model, lambda at_width: self.evaluate(at_width).by_tag())

    # -- evaluate ------------------------------------------------------------------------------

    def evaluate(self, model: nn.Layer) -> Scores:
        """Score a model on the EvalDataset by PaddleDetection's `Trainer`.

        Args:
            model: of this job's architecture.

        Raises:
            ConfigError: no EvalDataset or EvalReader.
        """
        for part in ("EvalDataset", "EvalReader"):
            if part not in self.content:
                raise ConfigError(f"config: detection: expected {part!r} to evaluate, got none.")
        cfg = self._activated()
        with tempfile.TemporaryDirectory() as folder:
            cfg["output_eval"] = folder
            cfg["model"] = model
            trainer = Trainer(cfg, "eval")
            found = _Found(trainer, Path(folder))
            trainer.register_callbacks([found])
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' own table
                trainer.evaluate()
        return found.scores


class _Found(Callback):
    """Takes the scores of an evaluation before PaddleDetection's `Trainer` forgets them.

    Args:
        trainer: with one metric.
        folder: where the metric leaves what it found as JSON.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        super().__init__(trainer)
        self.folder = folder
        self.scores: Scores | None = None

    def on_epoch_end(self, status: dict) -> None:
        (metric,) = self.model._metrics
        voc = isinstance(metric, VOCMetric)
        self.scores = _voc_scores(metric) if voc else self._coco_scores(metric)

    def _coco_scores(self, metric: COCOMetric) -> Scores:
        truth = COCO(metric.anno_file)
        kinds = ["bbox"] + ["mask"] * hasattr(self.model.model, "mask_head")
        means, by_class = {}, {}
        for kind in kinds:
            found = self.folder / f"{kind}.json"
            if not found.exists():  # nothing was found in any picture
                means[kind] = dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
                by_class[kind] = np.zeros(len(truth.getCatIds()))
                continue
            means[kind] = coco_means(metric.get_results()[kind])
            again = COCOeval(truth, truth.loadRes(str(found)), "segm" if kind == "mask" else kind)
            again.evaluate()
            again.accumulate()
            by_class[kind] = coco_by_class(again)
        return Scores(means, by_class)


def _voc_scores(metric: VOCMetric) -> Scores:
    found = metric.detection_map
    by_name = {result["class"]: result["ap"] for result in found.eval_results}
    counted = zip(found.classes, found.class_gt_counts, strict=True)
    by_class = [by_name.get(name, 0.0 if count else np.nan) for name, count in counted]
    return Scores({"bbox": {"mAP": float(found.get_map())}}, {"bbox": np.array(by_class)})
