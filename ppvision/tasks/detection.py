"""Detection: PaddleDetection's architectures, data, losses and metrics under our engine.

Configs are PaddleDetection's (`ppvision.tasks.detection_config`). Training takes its data set, its
readers' transforms, its learning rate, optimizer and losses; scores are those of its `Trainer`.
"""

import contextlib
import fnmatch
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ppvision.data.coco_checks import check_coco
from ppvision.data.files import DataError
from ppvision.data.voc_checks import check_voc
from ppvision.deploy import Predictor
from ppvision.deploy.detection_export import export_detector
from ppvision.deploy.detections import Detections, detections_of
from ppvision.quant import OnceQAT
from ppvision.safe_yaml import Located, plain, yaml_text
from ppvision.tasks.config import ConfigError
from ppvision.tasks.detection_config import activate, check_config, components
from ppvision.tasks.detection_scores import Scores, coco_by_class, coco_means
from ppvision.tasks.detector_layer import DetectorLayer
from ppvision.tasks.pictures import detected, side_by_side
from ppvision.tasks.prediction import read_rgb
from ppvision.tasks.quantization import (
    ModelWithWidths,
    example_input,
    scores_by_width,
    without_paths,
)
from ppvision.zoo.weights import names_behind_sdn

# isort: split
from ppdet.core.workspace import create
from ppdet.data.reader import BatchCompose, Compose
from ppdet.data.source.category import get_categories
from ppdet.data.source.coco import COCODataSet
from ppdet.data.source.dataset import ImageFolder
from ppdet.data.source.voc import VOCDataSet
from ppdet.engine import Trainer
from ppdet.engine.callbacks import Callback
from ppdet.metrics import COCOMetric, VOCMetric

logger = logging.getLogger("ppvision")

EXAMPLE_SIDE = 128  # pixels of the picture that shows which layers run
EPOCH = "epoch_id"  # what PaddleDetection calls it in a batch
PICTURES = 4  # validation samples shown in the dashboard
SHOWN_SCORE = 0.3  # lowest of a box that is drawn in the dashboard
# Layers whose outputs are classes and boxes, in PaddleDetection's heads.
RESULT_LAYERS = ("*pred_cls*", "*pred_reg*", "*bbox_score*", "*bbox_delta*", "*rpn_rois_*")
RESULT_LAYERS += ("*mask_fcn_logits", "*retina_cls", "*retina_reg", "*fcos_head_cls")
RESULT_LAYERS += ("*fcos_head_reg", "*fcos_head_centerness")
TWO_STAGES = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")
# These go through pictures one by one, in a loop that a graph unrolls when it is written.
ONE_BY_ONE = (*TWO_STAGES, "RetinaNet")


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
        cfg.setdefault("map_type", "11point")
        for device in ("use_gpu", "use_npu", "use_mlu", "use_xpu"):
            cfg[device] = device == "use_gpu" and paddle.is_compiled_with_cuda()
        return cfg

    @property
    def batch_size(self) -> int:
        return self.content["TrainReader"].get("batch_size", 1)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimiser steps."""
        ranks = paddle.distributed.get_world_size()
        batches = len(self.train_dataset) // (self.batch_size * ranks)
        return max(1, batches // self.content.get("accumulate", 1))

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
    def _train_reader(self) -> object:
        self._activated()
        return create("TrainReader")

    @cached_property
    def train_dataset(self) -> Samples:
        return Samples(self._read_by(self._train_reader, "TrainDataset"))

    def _read_by(self, reader: object, part: str) -> paddle.io.Dataset:
        """One of the config's data sets, with a reader's transforms.

        PaddleDetection's readers have a loader of their own as well. It is not started: it would
        take random numbers beside our engine's, and hangs when a sample raises.
        """
        dataset = self._dataset(part)
        if part == "EvalDataset":
            dataset.allow_empty = True  # what is found where nothing is counts as well
        dataset.parse_dataset()
        dataset.set_transform(reader._sample_transforms)
        dataset.set_kwargs(**reader.kwargs)
        return dataset

    @property
    def example(self) -> dict[str, Tensor]:
        """A picture as the architectures take it."""
        sizes = paddle.full([1, 2], float(EXAMPLE_SIDE))
        image = example_input(3, EXAMPLE_SIDE)
        return {"image": image, "im_shape": sizes, "scale_factor": paddle.ones([1, 2])}

    @property
    def ends(self) -> Sequence[str]:
        reads = super().ends[0]
        names = [
            name for name, layer in self.float_model.named_sublayers() if not layer.sublayers()
        ]
        results = [n for n in names if any(fnmatch.fnmatch(n, known) for known in RESULT_LAYERS)]
        return [reads, *results]

    @property
    def slim_options(self) -> Mapping[str, object] | None:
        """Layers that PaddleDetection marks as not to be quantised stay in float where they do not
        learn: PP-YOLOE's `proj_conv` holds the numbers 0 to 16."""
        options = super().slim_options
        if options is None:
            return None
        if options.get("distillation"):
            raise ConfigError(
                "config: slim_config.distillation: a detector's losses are its own; expected 0."
            )
        fixed = {
            name: {"float": True}
            for name, layer in self.float_model.named_sublayers()
            if getattr(layer, "skip_quant", False)
            and all(p.stop_gradient for p in layer.parameters())
        }
        return {**options, "layers": fixed | dict(options.get("layers", {}))}

    @property
    def architecture(self) -> dict[str, object]:
        known = components()
        readers = ("TrainReader", "EvalReader", "TrainDataset", "EvalDataset", "TestDataset")
        training = ("LearningRate", "OptimizerBuilder", *readers, "TestReader")
        parts = {k: v for k, v in self.content.items() if k in known and k not in training}
        shared = ("architecture", "num_classes", "norm_type", "depth_mult", "width_mult")
        return {
            "task": "detection",
            "model": without_paths(
                parts | {k: self.content[k] for k in shared if k in self.content}
            ),
            "transforms": self._transforms(),
            "classes": list(self.class_names),
        }

    def fitting(
        self, arrays: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], list[str]]:
        """Also weights of the same model without SDN, which then starts as nothing."""
        return names_behind_sdn(self.float_model, arrays)

    @cached_property
    def class_names(self) -> list[str]:
        """Of the data set that evaluates, or that trains; empty where its file is not there."""
        part = "EvalDataset" if "EvalDataset" in self.content else "TrainDataset"
        dataset = self._dataset(part)
        voc = isinstance(dataset, VOCDataSet)
        path = dataset.get_label_list() if voc else dataset.get_anno()
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
        known: dict[str, list[str]] = {}
        for part in parts:
            part = {"train_dataset": "TrainDataset", "val_dataset": "EvalDataset"}[part]
            if part == "EvalDataset" and "EvalReader" not in self.content:
                raise ConfigError("config: detection: expected 'EvalReader' to evaluate, got none.")
            dataset = self._dataset(part)
            root = Path(dataset.dataset_dir or ".")
            if isinstance(dataset, (COCODataSet, VOCDataSet)) and not dataset.anno_path:
                raise ConfigError(f"config: {part}: expected anno_path, got none.")
            if isinstance(dataset, COCODataSet):
                files = Path(dataset.get_anno()), root / dataset.image_dir
                known[part] = check_coco(part, *files, self.content["num_classes"])
            elif isinstance(dataset, VOCDataSet):
                missing = {"gt_bbox", "gt_class", "difficult"} - set(dataset.data_fields)
                if not dataset.label_list or (part == "EvalDataset" and missing):
                    raise ConfigError(
                        f"config: {part}: expected label_list, and data_fields with gt_bbox, "
                        "gt_class and difficult to evaluate."
                    )
                files = root / dataset.anno_path, root / dataset.image_dir
                labels = root / dataset.label_list
                check_voc(part, *files, labels, self.content["num_classes"])
        if len(known) == 2 and known["TrainDataset"] != known["EvalDataset"]:
            raise DataError(
                "EvalDataset: expected the categories of TrainDataset, in the same order: "
                f"{known['TrainDataset']}, got {known['EvalDataset']}."
            )

    # -- train ---------------------------------------------------------------------------------

    def batched(self, samples: list[dict]) -> dict:
        epochs = [sample.pop(EPOCH) for sample in samples]
        return {**self._train_reader._batch_transforms(samples), EPOCH: epochs[0]}

    def losses(self, network: nn.Layer, batch: dict) -> list[Tensor]:
        """PaddleDetection's sum of all losses."""
        batch[EPOCH] = int(batch[EPOCH])
        return [network(batch)["loss"]]

    def scores(self, model: nn.Layer) -> dict[str, float]:
        """`evaluate`, by tag; of a once-QAT at every width."""
        return scores_by_width(model, lambda at_width: self.evaluate(at_width).by_tag())

    # -- evaluate ------------------------------------------------------------------------------

    def evaluate(self, model: nn.Layer) -> Scores:
        """Score a model on the EvalDataset by PaddleDetection's `Trainer`; each rank scores all.

        Args:
            model: of this job's architecture.

        Raises:
            ConfigError: no EvalDataset or EvalReader.
        """
        return self._scored(lambda trainer: model)

    def evaluate_exported(self, model_dir: str | Path, *, device: str = "cpu") -> Scores:
        """Score an exported model on the EvalDataset, through Paddle Inference.

        Raises:
            ConfigError: no EvalDataset or EvalReader, or an export of another task or number of
                classes.
        """
        predictor = Predictor(model_dir, threads=os.cpu_count(), device=device)
        manifest = predictor.manifest
        if (manifest.task, manifest.num_classes) != ("detection", self.content["num_classes"]):
            raise ConfigError(
                f"eval --model_dir: expected a detector of {self.content['num_classes']} classes, "
                f"got {manifest.task} of {manifest.num_classes} in {model_dir}."
            )
        if manifest.classes and self.class_names not in ([], manifest.classes):
            raise ConfigError(
                f"eval --model_dir: expected the classes of {model_dir}, {manifest.classes}, got "
                f"{self.class_names}."
            )
        return self._scored(lambda trainer: _Exported(predictor, trainer.dataset))

    def _scored(self, model_for: Callable[[Trainer], nn.Layer]) -> Scores:
        for part in ("EvalDataset", "EvalReader"):
            if part not in self.content:
                raise ConfigError(f"config: detection: expected {part!r} to evaluate, got none.")
        cfg = self._activated()
        with tempfile.TemporaryDirectory() as folder:
            cfg["output_eval"] = folder
            cfg["model"], cfg["TestDataset"] = _Nothing(), ImageFolder()
            trainer = Trainer(cfg, "test")  # which starts no loader
            reader = create("EvalReader")
            reader._batch_transforms.collate_batch &= self.content["metric"] != "VOC"
            trainer.mode, trainer.dataset = "eval", self._read_by(reader, "EvalDataset")
            trainer.loader = _Batches(trainer.dataset, reader)
            trainer.model = model_for(trainer)
            trainer._init_callbacks()
            trainer._init_metrics()
            trainer._nranks = 1  # each rank by itself: no gradients are to be exchanged
            kinds = ("bbox", "mask") if self._has_masks else ("bbox",)
            found = _Found(trainer, kinds, Path(folder))
            trainer.register_callbacks([found])
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' own table
                trainer.evaluate()
        return found.scores

    # -- predict -------------------------------------------------------------------------------

    def _transforms(self) -> list[dict]:
        """Of a picture to be predicted, PaddleDetection's."""
        reader = self.content["TestReader"]
        return [*reader.get("sample_transforms", []), *reader.get("batch_transforms", [])]

    @paddle.no_grad()
    def predict_image(self, model: nn.Layer, path: str | Path) -> Detections:
        """What a model finds in one picture, read as the TestReader says."""
        self._activated()
        reader, classes = self.content["TestReader"], self.content["num_classes"]
        read_rgb(path)  # says what is wrong with a picture that does not read
        sample = {"im_id": np.array([0]), "curr_iter": 0, "im_file": str(path)}
        sample = Compose(reader.get("sample_transforms", []), classes)(sample)
        batch = BatchCompose(reader.get("batch_transforms", []), classes)([sample])
        model.eval()
        found = model({key: paddle.to_tensor(batch[key]) for key in self.example})
        masks = found["mask"].numpy() if "mask" in found else None
        return detections_of(found["bbox"].numpy(), masks, self.class_names)

    def pictures(self, model: nn.Layer) -> dict[str, np.ndarray]:
        """Panels `objects | found` of fixed validation samples, by name."""
        dataset = self._dataset("EvalDataset")
        dataset.data_fields = ["image", "gt_bbox", "gt_class"]
        dataset.parse_dataset()
        chosen = np.linspace(0, len(dataset.roidbs) - 1, min(PICTURES, len(dataset.roidbs)))
        panels = {}
        for index in chosen.astype(int):
            sample = dataset.roidbs[index]
            image = read_rgb(sample["im_file"])
            count = len(sample.get("gt_bbox", []))
            truth = np.zeros((count, 6), np.float32)
            if count:
                truth[:, 0] = sample["gt_class"].reshape(-1)
                truth[:, 1] = 1.0
                truth[:, 2:] = sample["gt_bbox"]
            true = detections_of(truth, None, self.class_names)
            found = self.predict_image(model, sample["im_file"]).above(SHOWN_SCORE)
            panels[Path(sample["im_file"]).stem] = side_by_side(
                [detected(image, true), detected(image, found)]
            )
        return panels

    # -- export --------------------------------------------------------------------------------

    def export(
        self,
        model: nn.Layer,
        folder: str | Path,
        *,
        input_shape: list[int | None],
        output_op: str | None,
        model_format: str,
        bits: int = 32,
    ) -> Path:
        """Write the detector for deployment, NMS inside; see
        `ppvision.deploy.detection_export.export_detector`.

        Raises:
            ConfigError: an `output_op`, which is for logits, or two stages as ONNX.
        """
        if output_op is not None:
            raise ConfigError(
                f"export --output_op {output_op}: is for logits; a detector's graph ends in NMS. "
                "Leave it away."
            )
        architecture = self.content["architecture"]
        if model_format == "onnx" and architecture in TWO_STAGES:
            raise ConfigError(
                f"export --format onnx: expected a detector of one stage, got {architecture}, "
                "whose graph paddle2onnx 2.1 aborts on. Use --format paddle."
            )
        if architecture in ONE_BY_ONE and input_shape[0] not in (None, 1):
            raise ConfigError(
                f"export --input_shape: expected a batch of 1, got {input_shape[0]}: "
                f"{architecture} takes one picture at a time."
            )
        if input_shape[0] is None and (architecture in ONE_BY_ONE or model_format == "onnx"):
            logger.info(f"export: {architecture} takes one picture at a time: batch 1")
            input_shape = [1, *input_shape[1:]]
        return export_detector(
            DetectorLayer(model),
            folder,
            input_shape=input_shape,
            num_classes=self.content["num_classes"],
            format=model_format,
            transforms=self._transforms(),
            classes=self.class_names,
            bits=bits,
        )


class _Batches:
    """The batches of an evaluation, in order.

    Args:
        dataset: with a reader's transforms.
        reader: PaddleDetection's.
    """

    def __init__(self, dataset: paddle.io.Dataset, reader: object) -> None:
        self.dataset, self.batched = dataset, reader._batch_transforms
        self.batch_size = reader.batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[dict]:
        quiet = True if paddle.distributed.get_rank() else None
        for number in tqdm(range(len(self)), desc="eval", unit="batch", disable=quiet):
            start = number * self.batch_size
            places = range(start, min(start + self.batch_size, len(self.dataset)))
            try:
                batch = self.batched([self.dataset[place] for place in places])
            except (ValueError, TypeError, RuntimeError) as error:
                raise DataError(
                    f"EvalReader: samples {start} to {places[-1]} make no batch ({error}). Where "
                    "they differ in size, end with a Resize of one size, pad them (PadBatch), or "
                    "take batch_size 1; an EvalDataset needs no data_fields."
                ) from error
            yield {key: _as_tensors(value) for key, value in batch.items()}


def _as_tensors(value: object) -> object:
    """Arrays as tensors, also those in a list."""
    if isinstance(value, list):
        return [_as_tensors(item) for item in value]
    return paddle.to_tensor(value) if isinstance(value, np.ndarray) else value


class _Nothing(nn.Layer):
    """Stands for a model while PaddleDetection's `Trainer` is built."""

    def load_meanstd(self, transforms: list) -> None:
        """PaddleDetection tells its architectures so what normalises a picture."""


class _Exported(nn.Layer):
    """An exported detector in the place of an architecture.

    Args:
        predictor: of the export.
        dataset: parsed; has the files of the pictures.
    """

    def __init__(self, predictor: Predictor, dataset: paddle.io.Dataset) -> None:
        super().__init__()
        self.predictor = predictor
        self.files = {int(roidb["im_id"][0]): roidb["im_file"] for roidb in dataset.roidbs}

    def forward(self, batch: dict) -> dict[str, np.ndarray]:
        """What PaddleDetection's metrics take: rows `[N, 6]`, counts `[B]`, masks `[N, H, W]`."""
        found = [self.predictor(self.files[int(k)]) for k in batch["im_id"].numpy().reshape(-1)]
        rows = [np.column_stack([d.class_ids, d.scores, d.boxes]).astype(np.float32) for d in found]
        counts = np.array([len(d) for d in found], np.int32)
        outputs = {"bbox": np.concatenate(rows), "bbox_num": counts}
        if found[0].masks is not None:
            height, width = (max(d.masks.shape[axis] for d in found) for axis in (1, 2))
            # PaddleDetection cuts off what is -1, beyond a picture's edge.
            masks = np.full((counts.sum(), height, width), -1, np.int32)
            for end, d in zip(np.cumsum(counts), found, strict=True):
                masks[end - len(d) : end, : d.masks.shape[1], : d.masks.shape[2]] = d.masks
            outputs["mask"] = masks
        return outputs


class _Found(Callback):
    """Takes the scores of an evaluation before PaddleDetection's `Trainer` forgets them.

    Args:
        trainer: with one metric.
        kinds: of what is scored: "bbox", "mask".
        folder: where the metric leaves what it found as JSON.
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
    # In the order of the classes; the names beside them are off after a class without objects.
    results = iter(found.eval_results)
    by_class = []
    for scored, count in zip(found.class_score_poss, found.class_gt_counts, strict=True):
        missed = 0.0 if count else np.nan
        by_class.append(next(results)["ap"] if count and len(scored) else missed)
    return Scores({"bbox": {"mAP": float(found.get_map())}}, {"bbox": np.array(by_class)})
