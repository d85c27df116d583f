"""Time and memory of PS-Attention among its peers, from maps of 28 to 224 pixels a side.

    python benchmark/attention_scaling.py

Every attention has 64 channels, two heads and the same query, key, value and projection; only which
tokens meet differs:

    pale      `ppvision.nn.PaleAttention`, 7 interlaced rows and 7 interlaced columns
    stripes   7 contiguous rows and columns (CSWin)
    windows   7 x 7, shifted by 3 (Swin)
    global    all tokens

One picture in eager mode, as the engine trains on a CPU (`ppvision.forms.cpu_training`), one
thread, forward alone and with backward; the attentions take turns, a run each a round, median of
the rounds. Memory is what Paddle's allocator holds at most beyond the input and the weights. Global
attention is left out where its scores alone would take more than `MOST_SCORES`. Writes
benchmark/results/attention_scaling.csv and docs/images/attention_scaling.png. Growth is from the
map of half the side: of the time, and of the multiply-adds. `--profile` prints Paddle's table of
operators for PS-Attention's forward pass instead, at every side.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import matplotlib as mpl
import numpy as np
import paddle
from paddle import Tensor, nn, profiler
from tqdm import tqdm

from ppvision.forms.cpu_training import cpu_training
from ppvision.nn import PaleAttention
from ppvision.nn.pale_attention import SeparableConv, grouped_attention

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.attention_accuracy import GroupedAttention
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results") / "attention_scaling.csv"
IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "attention_scaling.png"
CHANNELS, HEADS, SIZE = 64, 2, 7
ROUNDS = {28: 30, 56: 20, 112: 8, 224: 5}  # by side
MIB = 2**20
MOST_SCORES = 4096 * MIB

memory = paddle.base.core


class GlobalAttention(nn.Layer):
    """Attention among all tokens. Shapes: `[B, C, H, W]` -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query = SeparableConv(CHANNELS)
        self.key = SeparableConv(CHANNELS)
        self.value = SeparableConv(CHANNELS)
        self.project = nn.Conv2D(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part(x).flatten(2) for part in (self.query, self.key, self.value))  # [B, C, HW]
        return self.project(grouped_attention(*parts, HEADS).reshape(x.shape))


ATTENTIONS = {
    "pale": partial(PaleAttention, CHANNELS, HEADS, SIZE, fused=False),
    "stripes": partial(GroupedAttention, CHANNELS, HEADS, "stripes", size=SIZE),
    "windows": partial(GroupedAttention, CHANNELS, HEADS, "windows", SIZE // 2, SIZE),
    "global": GlobalAttention,
}


def keys_of_a_token(kind: str, side: int) -> int:
    """How many keys each query meets, over a half of the channels and the other."""
    return {"windows": 2 * SIZE**2, "global": 2 * side**2}.get(kind, 2 * SIZE * side)


def multiply_adds(kind: str, side: int) -> int:
    """Pointwise layers `4hwC^2`, depthwise ones `27hwC`, the two products (`docs/pale.md`)."""
    pixels = side**2
    return pixels * CHANNELS * (4 * CHANNELS + 27 + keys_of_a_token(kind, side))


def scores_bytes(kind: str, side: int) -> int:
    """Of the scores of both halves in float32."""
    return 4 * side**2 * keys_of_a_token(kind, side) * HEADS // 2


def run(layer: nn.Layer, x: Tensor, backward: bool) -> tuple[float, float]:
    """Seconds and bytes of one run."""
    layer.clear_gradients()
    x.clear_grad()
    before = memory.host_memory_stat_current_value("Allocated", 0)
    memory.host_memory_stat_reset_peak_value("Allocated", 0)
    start = time.perf_counter()
    if backward:
        y = layer(x)
        y.backward(y.detach())
    else:
        with paddle.no_grad():
            layer(x)
    seconds = time.perf_counter() - start
    return seconds, memory.host_memory_stat_peak_value("Allocated", 0) - before


def measure(side: int, rounds: int) -> list[dict[str, object]]:
    """A row for each attention on maps of one size."""
    paddle.seed(0)
    layers = {
        kind: make() for kind, make in ATTENTIONS.items() if scores_bytes(kind, side) <= MOST_SCORES
    }
    x = paddle.randn([1, CHANNELS, side, side])
    x.stop_gradient = False
    found = {(kind, way): [] for kind in layers for way in ("forward", "forward_backward")}
    with cpu_training(*layers.values()):
        for number in tqdm(range(rounds + 1), desc=f"{side} a side", disable=None):
            for kind, way in found:
                measured = run(layers[kind], x, way != "forward")
                if number:  # the first warms up
                    found[kind, way].append(measured)
    rows = []
    for kind in layers:
        row = {"attention": kind, "side": side}
        for way in ("forward", "forward_backward"):
            seconds, peak = np.median(found[kind, way], axis=0)
            row |= {f"{way}_ms": f"{1e3 * seconds:.2f}", f"{way}_mib": f"{peak / MIB:.1f}"}
        rows.append(row | {"multiply_adds": multiply_adds(kind, side)})
    return rows


def add_growth(rows: list[dict[str, object]]) -> None:
    """How much more time each map takes than the one of half its side, and more multiply-adds."""
    known = {(row["attention"], row["side"]): row for row in rows}
    for row in rows:
        half = known.get((row["attention"], row["side"] // 2))
        for way in ("forward", "forward_backward"):
            grown = float(row[f"{way}_ms"]) / float(half[f"{way}_ms"]) if half else None
            row[f"{way}_growth"] = "" if half is None else f"{grown:.2f}"
        row["formula_growth"] = (
            "" if half is None else f"{row['multiply_adds'] / half['multiply_adds']:.2f}"
        )
        row["machine"] = machine()


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Time and memory against the side, both axes logarithmic."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, column, label in zip(
        panels,
        ("forward_backward_ms", "forward_backward_mib"),
        ("forward and backward, ms", "peak memory, MiB"),
        strict=True,
    ):
        for kind in ATTENTIONS:
            own = [row for row in rows if row["attention"] == kind]
            sides, values = [r["side"] for r in own], [float(r[column]) for r in own]
            panel.loglog(sides, values, marker="o", label=kind)
        panel.set_xticks(list(ROUNDS), [str(side) for side in ROUNDS])
        panel.minorticks_off()
        panel.set_xlabel("side of the map, pixels")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def profile(side: int) -> None:
    """Print the operators of four forward passes of PS-Attention, by time."""
    layer, x = ATTENTIONS["pale"](), paddle.randn([1, CHANNELS, side, side])
    with paddle.no_grad(), cpu_training(layer):
        layer(x)
        with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU]) as recorder:
            for _ in range(4):
                layer(x)
    print(f"{side} a side")
    recorder.summary(op_detail=False, thread_sep=False, time_unit="ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=list(ROUNDS), choices=ROUNDS)
    parser.add_argument("--rounds", type=int, help="default: 30 to 5, fewer for larger maps")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--profile", action="store_true", help="operators of PS-Attention")
    args = parser.parse_args()
    if args.profile:
        for side in args.sides:
            profile(side)
        return
    rows = [row for side in args.sides for row in measure(side, args.rounds or ROUNDS[side])]
    add_growth(rows)
    write_rows(args.results, rows)
    draw(rows, args.image)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
