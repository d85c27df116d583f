"""How much of `predict` on a folder of photographs is the model.

    python benchmark/predict_pipeline.py --photographs data/camvid/images/val

pale_tiny as a classifier at 224 x 224 (fresh weights: time does not depend on them), and pale_nano
under a SegFormer head on the photographs as they are (the zoo's small weights: of fresh ones the
maps of classes are noise, which PNG compresses slowest), both exported. The first 200 photographs
(again from the first where there are fewer) are read, predicted and written as `ppvision predict
--model_dir` does it, on two threads, some at a time, in turn with as many runs of the graph alone.
Medians of two figures: the share of the time in which the graph does not run, and how much longer
a picture takes than a run alone (reading and writing take cores from a run as well). Writes
benchmark/results/predict_pipeline.csv.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

import ppvision
from ppvision.data.pictures import read_picture
from ppvision.deploy import Predictor, export_model
from ppvision.tasks.prediction import classify_to_folder, predict_to_folder

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results") / "predict_pipeline.csv"
COUNT, AT_A_TIME, THREADS = 200, 20, 2
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

    backbone = ppvision.create_model("pale_nano", features_only=True)
    model: nn.Layer = SegFormer(backbone=backbone, num_classes=11, embedding_dim=128)
    ppvision.load_weights(model, "segformer_pale_nano.digit_scenes")
    return export_model(model, folder, input_shape=[1, 3, *size], transforms=[NORMALIZE])


CASES = {
    "pale_tiny classifier, 224": (classifier, classify_to_folder),
    "pale_nano SegFormer, whole": (segmenter, predict_to_folder),
}


def copy_photographs(photographs: Path, folder: Path, count: int, at_a_time: int) -> list[Path]:
    """Folders of `at_a_time` photographs, `count` together."""
    found = sorted(p for p in photographs.rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
    if not found:
        raise SystemExit(f"--photographs: expected JPEG or PNG files, found none in {photographs}.")
    for number in range(count):
        source = found[number % len(found)]
        part = folder / f"{number // at_a_time:03d}"
        part.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part / f"{number:03d}{source.suffix}")
    return sorted(folder.iterdir())


def runs(predictor: Predictor, count: int) -> float:
    """Seconds of a run of the graph, alone and one after another."""
    x = np.random.default_rng(0).normal(size=predictor.manifest.input_shape).astype(np.float32)
    start = time.perf_counter()
    for _ in range(count):
        predictor.run(x)
    return (time.perf_counter() - start) / count


def pipeline(
    predictor: Predictor, to_folder: Callable, folder: Path, out: Path
) -> tuple[float, float]:
    """Seconds of a folder's pictures, and of them those in which the graph ran."""
    inside = 0.0
    run = predictor._run  # that every picture goes through

    def timed(*inputs: object) -> list[np.ndarray]:
        nonlocal inside
        start = time.perf_counter()
        found = run(*inputs)
        inside += time.perf_counter() - start
        return found

    predictor._run = timed
    start = time.perf_counter()
    failures = to_folder(lambda _, image: predictor(image), folder, out, [])
    seconds = time.perf_counter() - start
    predictor._run = run
    if failures:
        raise SystemExit(failures[0])
    return seconds, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--at_a_time", type=int, default=AT_A_TIME)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folders = copy_photographs(
            args.photographs, Path(work) / "photographs", args.count, args.at_a_time
        )
        size = read_picture(sorted(folders[0].iterdir())[0]).shape[:2]
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CASES}
        predictors = {
            name: Predictor(make(Path(work) / f"model{place}", size), threads=THREADS)
            for place, (name, (make, _)) in enumerate(CASES.items())
        }
        for predictor in predictors.values():
            runs(predictor, min(5, args.at_a_time))  # warms up
        for folder in tqdm(folders, disable=None):
            count = len(list(folder.iterdir()))
            for name, (_, to_folder) in CASES.items():
                once = runs(predictors[name], count)
                seconds, inside = pipeline(predictors[name], to_folder, folder, Path(work) / "out")
                found[name].append((seconds / count, 1 - inside / seconds, seconds / count / once))
    rows = []
    for name, measured in found.items():
        seconds, outside, over_alone = np.median(measured, axis=0)
        rows.append(
            {
                "case": name,
                "photographs": args.count,
                "pixels": f"{size[1]}x{size[0]}",
                "threads": THREADS,
                "images_per_second": f"{1 / seconds:.1f}",
                "share_outside_of_the_model": f"{outside:.3f}",
                "over_the_graph_alone": f"{over_alone:.2f}",
                "machine": machine(),
            }
        )
    write_rows(args.results, rows)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
