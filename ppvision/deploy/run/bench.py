"""Compare latency and memory of exported models."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision.console import track
from ppvision.deploy.run.engines import Engine
from ppvision.deploy.run.predictor import Predictor
from ppvision.tables import format_table

DEFAULT_SIZE = 224  # pixels, for an export of any height and width
WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """One line of the table.

    Attributes:
        name: the folder, or `eager`.
        median, low, high: milliseconds per batch: the median and the 10th and 90th percentile.
        engine: "openvino", "onednn" or "native" of Paddle Inference; None for the eager model and
            ONNX Runtime.
        precision: "float32", "bfloat16" or "int8"; None for the eager model.
        bytes: size of the weights and the graph; None for the eager model.
        load_seconds: time to open the model; None for the eager model.
    """

    name: str
    median: float
    low: float
    high: float
    engine: Engine | None
    precision: str | None
    bytes: int | None
    load_seconds: float | None = None


def bench_exported(
    folders: Sequence[str | Path],
    *,
    threads: int,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    repeats: int = 30,
    device: str = "cpu",
    precision: str = "auto",
    eager: nn.Layer | None = None,
) -> list[Latency]:
    """Time exported models, and an eager one if given, on the same random input.

    They run in turn in one loop, so that other load on the machine affects all of them equally.

    Args:
        folders: exported folders with the same input channels.
        threads: CPU threads of every exported model. The eager one has those of `OMP_NUM_THREADS`,
            which Paddle reads when it starts.
        batch: images at a time.
        size: height and width of the input; None for those of the export, or 224 if it accepts any
            size.
        repeats: timed runs of each.
        device: "cpu" or "gpu", of the exported models.
        precision: of the exported models; see `Predictor`.
        eager: a model in Python.

    Raises:
        FileNotFoundError, ValueError: a folder that `Predictor` refuses.
    """
    predictors, load_seconds = {}, {}
    for name in map(str, folders):
        start = time.perf_counter()
        predictors[name] = Predictor(name, threads=threads, device=device, precision=precision)
        load_seconds[name] = time.perf_counter() - start
    _, channels, *sides = next(iter(predictors.values())).manifest.input_shape
    assert channels is not None  # `deploy.yaml` always states the channels
    height, width = size or [side or DEFAULT_SIZE for side in sides]
    x = np.random.default_rng(0).normal(size=(batch, channels, height, width)).astype(np.float32)

    runs: dict[str, Callable[[], object]] = {
        name: partial(predictor.run, x) for name, predictor in predictors.items()
    }
    if eager is not None:
        eager.eval()
        tensor = paddle.to_tensor(x)

        def run_eager() -> object:
            with paddle.no_grad():
                out = eager(tensor)
                return (out[0] if isinstance(out, (list, tuple)) else out).numpy()

        runs = {"eager": run_eager, **runs}
    rows = []
    for name, values in _time_in_turn(runs, repeats).items():
        low, median, high = np.percentile(values, [10, 50, 90])
        predictor = predictors.get(name)
        files = [] if predictor is None else predictor.manifest.files.values()
        rows.append(
            Latency(
                name,
                median,
                low,
                high,
                None if predictor is None else predictor.engine,
                None if predictor is None else predictor.precision,
                None if predictor is None else sum(entry.bytes for entry in files),
                load_seconds.get(name),
            )
        )
    return rows


def time_arithmetic(
    exported: Sequence[tuple[str | Path, str]], *, threads: int = 1, repeats: int = 20
) -> list[float]:
    """Time exported models in given arithmetic, in turn, each with images of its own size.

    Args:
        exported: folders with their `precision` for `Predictor`.
        threads: CPU threads of each.
        repeats: timed runs of each.

    Returns:
        The medians in milliseconds per batch.
    """
    runs = {}
    with ExitStack() as opened:
        for number, (folder, precision) in enumerate(exported):
            predictor = Predictor(folder, threads=threads, precision=precision)
            opened.enter_context(predictor)
            batch, channels, *sides = predictor.manifest.input_shape
            shape = [batch or 1, channels or 3, *(side or DEFAULT_SIZE for side in sides)]
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            runs[str(number)] = partial(predictor.run, x)
        return [float(np.median(values)) for values in _time_in_turn(runs, repeats).values()]


def _time_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return milliseconds of each run, by name; other load affects all runs equally."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in track(range(WARM_UP + repeats), "bench", unit="round"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def format_latencies(rows: Sequence[Latency]) -> str:
    """Format the rows as a table; the last column is the first row's median divided by this
    row's."""
    cells = [
        (
            row.name,
            f"{row.median:.2f}",
            f"{row.low:.2f}..{row.high:.2f}",
            " ".join(filter(None, (row.engine, row.precision))) or None,
            None if row.bytes is None else f"{row.bytes:,}",
            f"{rows[0].median / row.median:.2f}",
        )
        for row in rows
    ]
    names = ("model", "median ms", "10..90 %", "engine", "bytes", "speed-up")
    peak = f"peak memory of this process {measure_peak_memory():,.0f} MiB"
    return f"{format_table([names, *cells], '<><<<<')}\n{peak}"


def measure_peak_memory() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
