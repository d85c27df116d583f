"""Time and memory of the semantic difference convolution, against its unfold form and a 3 x 3 one.

    python benchmark/sdn_operator.py

In eager mode, forward and backward, on one thread, the three in turn, median of many; memory is
what Paddle's allocator holds between forward and backward, and at its peak. Writes
benchmark/results/sdn_operator.csv.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.nn.semantic_diffusion import semantic_difference

RESULTS = Path(__file__).with_name("results") / "sdn_operator.csv"
# channels, side, batch: the levels of pale_nano at 224, and a wide map
SHAPES = ((32, 56, 4), (64, 28, 4), (128, 14, 4), (256, 7, 4), (256, 64, 1))
MIB = 2**20

memory = paddle.base.core


def unfold_form(u: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The same sum from nine-fold copies of both maps: [B, C, H, W] -> [B, O, H, W]."""
    batch, channels, height, width = u.shape
    differences = []
    for x in (u, v):
        bordered = F.pad(x, [1, 1, 1, 1], mode="replicate")
        neighbours = F.unfold(bordered, 3).reshape([batch, channels, 9, height, width])
        differences.append(neighbours - x.unsqueeze(2))
    of_u, of_v = differences
    weighted = paddle.rsqrt(1.0 + paddle.square(of_v)) * of_u  # [B, C, 9, H, W]
    return F.conv2d(
        weighted.reshape([batch, channels * 9, height, width]),
        weight.reshape([weight.shape[0], channels * 9, 1, 1]),
    )


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain 3x3 convolution": lambda u, v, weight: F.conv2d(u, weight, padding=1),
    "semantic difference, ours": lambda u, v, weight: semantic_difference(
        u, v, weight, "charbonnier"
    ),
    "semantic difference, unfold": unfold_form,
}


def measure(channels: int, side: int, batch: int, repeats: int) -> list[dict]:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Tensor:
        tensor = paddle.to_tensor(rng.normal(size=shape), dtype="float32")
        tensor.stop_gradient = False
        return tensor

    u, v = random(batch, channels, side, side), random(batch, channels, side, side)
    weight = random(channels, channels, 3, 3)
    times = {name: ([], []) for name in FORMS}
    kept, peak = {}, {}
    for _ in range(repeats):
        for name, form in FORMS.items():
            for tensor in (u, v, weight):
                tensor.clear_grad()
            before = memory.host_memory_stat_current_value("Allocated", 0)
            memory.host_memory_stat_reset_peak_value("Allocated", 0)
            start = time.perf_counter()
            y = form(u, v, weight)
            middle = time.perf_counter()
            kept[name] = memory.host_memory_stat_current_value("Allocated", 0) - before
            y.backward(y.detach())
            times[name][0].append(middle - start)
            times[name][1].append(time.perf_counter() - start)
            peak[name] = memory.host_memory_stat_peak_value("Allocated", 0) - before
            del y
    plain = next(iter(FORMS))
    return [
        {
            "form": name,
            "channels": channels,
            "side": side,
            "batch": batch,
            "forward_ms": f"{1e3 * np.median(forward):.2f}",
            "forward_backward_ms": f"{1e3 * np.median(both):.2f}",
            "times_plain": f"{np.median(np.array(both) / np.array(times[plain][1])):.2f}",
            "kept_mib": f"{kept[name] / MIB:.2f}",
            "peak_mib": f"{peak[name] / MIB:.2f}",
            "machine": machine(),
        }
        for name, (forward, both) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(*shape, args.repeats)]
    partial = args.results.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(args.results)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
