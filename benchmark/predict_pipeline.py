"""How much of `predict` on a folder of photographs is the model.

    python benchmark/predict_pipeline.py --photographs data/camvid/images/val

Fresh weights (time does not depend on them): pale_tiny as a classifier at 224 x 224, and pale_nano
under a SegFormer head on the photographs as they are, both exported. The first 200 photographs
(again from the first where there are fewer) are read, predicted and written as `ppvision predict
--model_dir` does it, on two threads. The share outside of the model is what is left of the time
when that of as many runs of the graph, alone and one after another, is taken away. The rounds of
both take turns; medians. Writes benchmark/results/predict_pipeline.csv.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")  # before Paddle starts

import numpy as np
import paddle
from paddle import nn

import ppvision
from ppvision.deploy import Predictor, export_model
from ppvision.environment import machine
from ppvision.tasks.prediction import classify_to_folder, predict_to_folder, read_rgb

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results") / "predict_pipeline.csv"
COUNT, THREADS, ROUNDS = 200, 2, 3
NORMALIZE = {"type": "Normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def classifier(folder: Path, size: tuple[int, int]) -> Path:
    paddle.seed(0)
    return export_model(
        ppvision.create_model("pale_tiny"),
        folder,
        input_shape=[1, 3, 224, 224],
        output_op="softmax",
        task="classification",
        transforms=[{"type": "Resize", "target_size": [224, 224]}, NORMALIZE],
    )


def segmenter(folder: Path, size: tuple[int, int]) -> Path:
    from paddleseg.models import SegFormer

    import ppvision.plugins.paddleseg  # repairs it for Paddle 3

    paddle.seed(0)
    backbone = ppvision.create_model("pale_nano", features_only=True)
    model: nn.Layer = SegFormer(backbone=backbone, num_classes=11, embedding_dim=128)
    return export_model(model, folder, input_shape=[1, 3, *size], transforms=[NORMALIZE])


CASES = {
    "pale_tiny classifier, 224": (classifier, classify_to_folder),
    "pale_nano SegFormer, whole": (segmenter, predict_to_folder),
}


def copied(photographs: Path, folder: Path, count: int) -> Path:
    """A folder of `count` photographs."""
    found = sorted(p for p in photographs.rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
    if not found:
        raise SystemExit(f"--photographs: expected JPEG or PNG files, found none in {photographs}.")
    folder.mkdir()
    for number in range(count):
        source = found[number % len(found)]
        shutil.copyfile(source, folder / f"{number:03d}{source.suffix}")
    return folder


def alone(predictor: Predictor, runs: int) -> float:
    """Seconds of one run of the graph."""
    x = np.random.default_rng(0).normal(size=predictor.manifest.input_shape).astype(np.float32)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        predictor.run(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = copied(args.photographs, Path(work) / "photographs", args.count)
        size = read_rgb(sorted(folder.iterdir())[0]).shape[:2]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
        predictors = {
            name: Predictor(make(Path(work) / f"model{place}", size), threads=THREADS)
            for place, (name, (make, _)) in enumerate(CASES.items())
        }
        for _ in range(args.rounds):
            for name, (_, to_folder) in CASES.items():
                predictor = predictors[name]
                once = alone(predictor, min(20, args.count))
                start = time.perf_counter()
                failures = to_folder(
                    lambda _, image, run=predictor: run(image), folder, Path(work) / "out", []
                )
                seconds = time.perf_counter() - start
                if failures:
                    raise SystemExit(failures[0])
                found[name].append((seconds, 1 - args.count * once / seconds))
    rows = []
    for name, measured in found.items():
        seconds, outside = np.median(measured, axis=0)
        rows.append(
            {
                "case": name,
                "photographs": args.count,
                "pixels": f"{size[1]}x{size[0]}",
                "threads": THREADS,
                "images_per_second": f"{args.count / seconds:.1f}",
                "share_outside_of_the_model": f"{outside:.3f}",
                "machine": machine(),
            }
        )
    write_rows(args.results, rows)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
