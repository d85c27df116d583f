"""What the boundary metrics add to the time of an evaluation, on pictures of 512 x 512.

    python benchmark/boundary_evaluation.py -c CONFIG --model_dir EXPORTED

Takes the config's val split, enlarged or shrunk to 512 x 512, and an exported model (the fastest
evaluation there is, so the largest share). Plain evaluation is prediction and PaddleSeg's counts;
reading the pictures is left out. Prints the medians, and adds nothing to any file.
"""

import argparse
import time

import cv2
import numpy as np

from ppvision.data.pictures import read_picture
from ppvision.deploy import Predictor
from ppvision.environment import machine
from ppvision.tasks import open_job
from ppvision.tasks.segmentation.scores import Scoring

SIDE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", required=True)
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--opts", nargs="+", default=[])
    args = parser.parse_args()
    job = open_job(args.config, args.opts)
    dataset = job.builder.val_dataset
    predictor = Predictor(args.model_dir, threads=args.threads)
    scoring = Scoring(dataset.num_classes, dataset.ignore_index)
    boundaries, scoring.boundaries = scoring.boundaries, []
    times = {"predict": [], "areas": [], **{type(m).__name__: [] for m in boundaries}}

    def timed(name: str, action, *values: object) -> object:
        start = time.perf_counter()
        result = action(*values)
        times[name].append(1e3 * (time.perf_counter() - start))
        return result

    for index in range(len(dataset)):
        image = cv2.resize(read_picture(dataset.file_list[index][0]), (SIDE, SIDE))
        label = np.asarray(dataset[index]["label"]).squeeze()
        label = cv2.resize(label, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        prediction = timed("predict", predictor, image)
        timed("areas", scoring.update, prediction, label)
        for metric in boundaries:
            timed(type(metric).__name__, metric.update, prediction, label)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    whole = np.array(times["predict"]) + np.array(times["areas"])
    ours = sum(np.array(times[type(m).__name__]) for m in boundaries)
    miou = scoring.scores().miou
    print(f"{machine()}, {args.threads} threads, {len(dataset)} pictures, mIoU {miou:.3f}")
    print("median ms: " + ", ".join(f"{name} {value:.1f}" for name, value in medians.items()))
    print(f"boundary metrics add {100 * float(np.median(ours / whole)):.1f}% to plain evaluation")


if __name__ == "__main__":
    main()
