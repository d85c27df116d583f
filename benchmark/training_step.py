"""A training step of Pale on a CPU, in Paddle and in PyTorch.

    pip install -r benchmark/requirements-torch.txt    # without it PyTorch is left out, with a line
    python benchmark/training_step.py

Forward, backward and AdamW at 224 x 224, eager, fresh weights, in these forms:

    plain           as Paddle trains by default
    contiguous      and transpositions that write their result at once
    convolutions    and quicker biases, pointwise and small depthwise convolutions
    layers          and LayerNorm by BatchNorm's kernels, q, k and v by one depthwise convolution
    engine          and the allocator keeps its memory: what `ppvision train` does on a CPU
    to_static       as `engine`, with the network in a graph (which has Paddle's own convolutions)
    torch           an independent implementation (`torch_pale.py`)

each in a process of its own; they take turns, one step each a round. A row of
benchmark/results/training_step.csv for each: median and 10th to 90th percentile of milliseconds,
the ratio to PyTorch's median, peak memory of its process. `--profile` prints Paddle's table of
operators of the `engine` form instead.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.turns import Worker, answer, end_afterwards, in_turn
from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

RESULTS = Path(__file__).with_name("results") / "training_step.csv"
MODELS = ("pale_nano", "pale_tiny")
FORMS = ("plain", "contiguous", "convolutions", "layers", "engine", "to_static", "torch")
SIDE, CLASSES, THREADS = 224, 1000, (1, 2)
WARM_UP = 3

Step = Callable[[], list[np.ndarray]]

_lasting = ExitStack()  # what a form changes, for as long as the process lives


def paddle_step(form: str, name: str, batch: int, side: int) -> Step:
    """One step, which returns the loss."""
    import paddle
    import paddle.nn.functional as F

    import ppvision
    from ppvision.forms.cpu_training import (
        contiguous_transpositions,
        keep_freed_memory,
        quick_convolutions,
        quick_norms,
        shared_projections,
    )

    order = FORMS.index(form)
    if order >= FORMS.index("contiguous"):
        _lasting.enter_context(contiguous_transpositions())
    paddle.seed(0)
    model = ppvision.create_model(name, num_classes=CLASSES, drop_path_rate=0.0)
    if order >= FORMS.index("convolutions"):
        _lasting.enter_context(quick_convolutions(model))
    if order >= FORMS.index("layers"):
        _lasting.enter_context(quick_norms(model))
        _lasting.enter_context(shared_projections(model))
    if order >= FORMS.index("engine"):
        keep_freed_memory()
    network = paddle.jit.to_static(model, full_graph=True) if form == "to_static" else model
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters())
    x = paddle.randn([batch, 3, side, side])
    y = paddle.randint(0, CLASSES, [batch])

    def step() -> list[np.ndarray]:
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return [loss.numpy()]

    return step


def torch_step(sizes: dict, batch: int, side: int) -> Step:
    """The same in PyTorch."""
    import torch
    import torch.nn.functional as F

    from benchmark.torch_pale import Pale

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = Pale(sizes["channels"], sizes["depths"], sizes["num_heads"], CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x, y = torch.randn(batch, 3, side, side), torch.randint(0, CLASSES, (batch,))

    def step() -> list[np.ndarray]:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach().numpy()]

    return step


def profile(step: Step) -> None:
    """Print the operators of four steps, by time."""
    from paddle import profiler

    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU]) as recorder:
        for _ in range(4):
            step()
    recorder.summary(op_detail=False, thread_sep=False, time_unit="ms")


def measure(
    name: str, batch: int, side: int, threads: int, forms: list[str], repeats: int
) -> list[dict[str, object]]:
    """A row for each form."""
    from ppvision.environment import machine
    from ppvision.models.pale_transformer import VARIANTS

    config = VARIANTS[name]
    sizes = {key: getattr(config, key) for key in ("channels", "depths", "num_heads")}
    shared = (name, batch, side, json.dumps(sizes))  # so that PyTorch's process needs no Paddle
    made = [Worker(form, __file__, (form, *shared), threads) for form in forms]
    with end_afterwards(made):
        times, last = in_turn(made, WARM_UP, repeats)
    medians = {form: float(np.median(values)) for form, values in times.items()}
    rows = []
    for form, values in times.items():
        low, high = np.percentile(values, [10, 90])
        row = {
            "model": name,
            "batch": batch,
            "threads": threads,
            "form": form,
            "median_ms": f"{medians[form]:.1f}",
            "p10_ms": f"{low:.1f}",
            "p90_ms": f"{high:.1f}",
            "over_torch": f"{medians[form] / medians['torch']:.2f}" if "torch" in medians else "",
            "peak_mib": f"{last[form]['peak']:.0f}",
            "machine": machine(),
        }
        rows.append(row)
        shown = ("form", "median_ms", "over_torch", "peak_mib")
        cells = "  ".join(f"{key} {row[key]}" for key in shown)
        print(f"{name}, batch {batch}, {threads} threads: {cells}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=SIDE, help="of the pictures, in pixels")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--profile", action="store_true", help="operators of the first model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table, a CSV file")
    args = parser.parse_args()
    if args.profile:
        profile(paddle_step("engine", args.models[0], args.batch, args.side))
        return
    from benchmark.runs import write_rows  # not at the top: it imports Paddle

    forms = list(args.forms)
    if "torch" in forms and importlib.util.find_spec("torch") is None:
        print("torch is not installed: it is left out (requirements-torch.txt)")
        forms.remove("torch")
    rows = []
    for name in args.models:
        for threads in args.threads:
            rows += measure(name, args.batch, args.side, threads, forms, args.repeats)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    write_rows(args.results, rows)


def work(form: str, name: str, batch: str, side: str, sizes: str) -> None:
    """A worker's side."""
    if form == "torch":
        answer(lambda: torch_step(json.loads(sizes), int(batch), int(side)))
    else:
        answer(lambda: paddle_step(form, name, int(batch), int(side)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
