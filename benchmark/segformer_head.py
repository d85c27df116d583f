"""What a folded head of SegFormer is worth (`ppvision/forms/segformer.py`).

    python benchmark/segformer_head.py --work_dir output/segformer_head

`pale_nano` under SegFormer (256 channels, 19 classes, fresh weights): exports of 512 x 512 in
float32 and in 8-bit integers, in OpenVINO, and forward and backward of 8 crops of 128 x 128 in
eager mode with `cpu_training`; each with the head as PaddleSeg computes it ("joined") and in our
form ("folded"). The two take turns, exports in processes of their own, the training in one. Writes
benchmark/results/segformer_head.csv: medians, and the median of the ratios of one turn each.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import paddle

from benchmark.integer_latency import NETWORKS, Worker, export_network
from benchmark.runs import replace_rows
from ppvision.data.writing import write_picture
from ppvision.deploy.write.integers import IntegerOptions
from ppvision.forms import cpu_training as training

RESULTS = Path(__file__).with_name("results") / "segformer_head.csv"
NETWORK = NETWORKS["segformer_pale_nano"]
BATCH, CROP = 8, 128
KEY = ("what", "threads")

Turn = Callable[[], float]  # runs once, and returns the seconds


@contextmanager
def joined_heads() -> Iterator[None]:
    """Leave the heads as PaddleSeg computes them."""
    write = "ppvision.deploy.write"
    with (
        mock.patch(f"{write}.export.head_form", _no_form),
        mock.patch(f"{write}.openvino.head_form", _no_form),
        mock.patch(f"{write}.integers.fold_head", lambda model, named=(): model),
        mock.patch.object(training, "quick_heads", _no_form),
    ):
        yield


def _no_form(*args: object, **named: object) -> AbstractContextManager[None]:
    return nullcontext()


HEADS = {"joined": joined_heads, "folded": nullcontext}


@contextmanager
def export_turns(arithmetic: str, threads: int, work: Path) -> Iterator[dict[str, Turn]]:
    """A process for each head during the block; exports that are there already stay."""
    workers: dict[str, Worker] = {}
    for head, changed in HEADS.items():
        folder = work / f"{head}-{arithmetic}"
        if not (folder / "deploy.yaml").is_file():
            paddle.seed(0)
            model = NETWORK.build()
            model.eval()
            integers = IntegerOptions(make_pictures(work)) if arithmetic == "int8" else None
            with changed():
                export_network(NETWORK, model, folder, 1, integers=integers)
        workers[head] = Worker(folder, arithmetic, threads)
        if workers[head].said["engine"] != "openvino":
            raise SystemExit(f"{folder}: expected OpenVINO, got {workers[head].said['engine']}")
    yield {head: worker.run for head, worker in workers.items()}
    for worker in workers.values():
        worker.close()


def make_pictures(work: Path) -> Path:
    """Four pictures of noise, to calibrate with."""
    folder = work / "noise"
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(4):
        pixels = random.integers(0, 256, (*NETWORK.size, 3), np.uint8)
        write_picture(folder / f"{number}.png", pixels)
    return folder


def training_turns() -> dict[str, Turn]:
    """Forward and backward of one model."""
    paddle.seed(0)
    model = NETWORK.build()
    model.train()
    images = paddle.randn([BATCH, 3, CROP, CROP])

    def turn(changed: Callable[[], AbstractContextManager[None]]) -> float:
        with changed(), training.cpu_training(model):
            start = time.perf_counter()
            (scores,) = model(images)
            (scores * scores).mean().backward()
            model.clear_gradients()
            return time.perf_counter() - start

    return {head: lambda changed=changed: turn(changed) for head, changed in HEADS.items()}


def measure(what: str, threads: int, turns: dict[str, Turn], seconds: float) -> dict[str, object]:
    """A row of the table."""
    for turn in turns.values():
        turn()
    taken: dict[str, list[float]] = {head: [] for head in turns}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken["folded"]) < 5:
        for head, turn in turns.items():
            taken[head].append(turn())
    ratios = np.array(taken["folded"]) / np.array(taken["joined"])
    return {
        "what": what,
        "threads": threads,
        **{f"{head}_ms": f"{1e3 * np.median(times):.1f}" for head, times in taken.items()},
        "ratio": f"{np.median(ratios):.3f}",
        "rounds": len(ratios),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="for the exported folders")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for threads in args.threads:
        for arithmetic in ("float32", "int8"):
            with export_turns(arithmetic, threads, args.work_dir) as turns:
                row = measure(f"export {arithmetic}", threads, turns, args.seconds)
            replace_rows(args.results, [row], KEY)
            print(row, flush=True)
    # Eager kernels take all cores of the process.
    row = measure("training step", len(os.sched_getaffinity(0)), training_turns(), args.seconds)
    replace_rows(args.results, [row], KEY)
    print(row, flush=True)


if __name__ == "__main__":
    main()
