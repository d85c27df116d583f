"""The scores of the zoo's weights, at each width that the package holds.

    python -m ppvision data digit-scenes --output data/digit_scenes
    python -m ppvision data dsb2018 --border 2 --source stage1_train --output data/nuclei
    python -m ppvision data bccd --source BCCD --output data/bccd
    python benchmark/zoo_scores.py

(docs/training.md says where data/tiny-imagenet-100 comes from.) The same as `ppvision eval -c
CONFIG --model_path NAME --bits K`, on the whole val split of the config, which was not used for
training. Writes results/zoo_scores.csv: a row per score as it is measured. Those that are there
already stay; remove the rows of weights that have changed.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import add_rows, read_rows
from ppvision.environment import machine
from ppvision.quant.store.files import parse_manifest
from ppvision.tasks import open_job
from ppvision.zoo.cards import ZOO_WEIGHTS, WeightsCard

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results" / "zoo_scores.csv"
CONFIGS = {
    "pale_nano.tiny_imagenet_100": "classification/pale_nano_tiny_imagenet_100.yml",
    "ppyoloe_pale_nano.blood_cells": "detection/ppyoloe_pale_nano_bccd.yml",
    "segformer_pale_nano.digit_scenes": "segmentation/segformer_pale_nano_digit_scenes.yml",
    "segformer_pale_nano_sdn.nuclei": "segmentation/segformer_pale_nano_sdn_nuclei.yml",
}
SCORES = ("top1", "top5", "bbox_AP", "bbox_AP50", "mIoU", "BoundaryIoU", "BoundaryF3")
FIELDS = ("weights", "bits", "metric", "score", "bytes", "config", "machine")


def stored_bits(card: WeightsCard) -> list[int]:
    """The widths of weights, the highest first."""
    path = card.folder / card.file
    return sorted(parse_manifest(path.read_bytes(), str(path)).bits, reverse=True)


def bytes_of(card: WeightsCard, bits: int) -> int:
    """The bytes of the layers of codes up to a width."""
    layers = {path: int(path.stem[1:]) for path in card.folder.glob("w*.safetensors")}
    return sum(path.stat().st_size for path, width in layers.items() if width <= bits)


def scores_of(name: str, bits: int) -> Iterator[dict]:
    """The rows of weights at one width."""
    card = ZOO_WEIGHTS[name]
    job = open_job(ROOT / "configs" / CONFIGS[name])
    ((_, model),) = job.models(name, [bits])
    for tag, value in job.evaluate(model).by_tag().items():
        metric = tag.removeprefix("Evaluate/")
        if metric in SCORES:
            yield {
                "weights": name,
                "bits": bits,
                "metric": metric,
                "score": f"{value:.4f}",
                "bytes": bytes_of(card, bits),
                "config": CONFIGS[name],
                "machine": machine(),
            }


def order(row: dict) -> tuple:
    return row["weights"], -int(row["bits"]), SCORES.index(row["metric"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("ppvision").setLevel(logging.WARNING)
    for name in args.weights:
        for bits in stored_bits(ZOO_WEIGHTS[name]):
            done = {(row["weights"], int(row["bits"])) for row in read_rows(args.results)}
            if (name, bits) not in done:
                add_rows(args.results, list(scores_of(name, bits)), FIELDS, order, lambda rows: [])
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
