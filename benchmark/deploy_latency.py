"""Pale in Paddle Inference against ONNX Runtime and PyTorch, on the same CPU.

    pip install -r benchmark/requirements-torch.txt    # without it PyTorch is left out, with a line
    python benchmark/deploy_latency.py

exports pale_nano and pale_tiny (fresh weights: time does not depend on them) for one size and
batch, as our users get them, and runs the same weights by

    paddle      our exported folder, `ppvision.deploy.Predictor`: OpenVINO's engine
    onednn      the same folder with `use_onednn=True`
    onnx        the same network by paddle2onnx, ONNX Runtime
    torch       an independent implementation (`torch_pale.py`), eager
    compiled    the same under torch.compile

each in a process of its own, which waits while another one works: the engines take turns, one run
each a round, with a pause in between. Outputs are compared first. A row of
benchmark/results/deploy_latency.csv for each engine: median and 10th to 90th percentile of
milliseconds, the ratio of paddle's median to its own; memory of its process: the peak, which comes
while it loads, what it holds at the end, and what its imports alone take; and the limit:
multiply-adds over what a large float32 matrix product reaches on as many threads.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.turns import Worker, answer, end_afterwards, in_turn
from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts, here and in the workers

RESULTS = Path(__file__).with_name("results") / "deploy_latency.csv"
MODELS = ("pale_nano", "pale_tiny")
TASKS = {"classification": 224, "features": 512}
BATCHES, THREADS = (1, 8), (1, 2)
ENGINES = ("paddle", "onednn", "onnx", "torch", "compiled")
WARM_UP = 3
MATRIX = 2048  # rows and columns of the product that stands for the machine's peak
TOLERANCE = 1e-3  # of outputs, in relation to the largest
MEMORY = ("peak", "resident", "imports")


@dataclass(frozen=True)
class Case:
    """What is run: a model, a task and a batch."""

    model: str
    task: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.model}_{self.task}_{self.batch}"

    @property
    def shape(self) -> list[int]:
        return [self.batch, 3, TASKS[self.task], TASKS[self.task]]


# -- before ----------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path) -> None:
    """Export for both runtimes anew, and leave the weights for PyTorch."""
    import paddle

    import ppvision
    from ppvision.deploy import export_model

    paddle.seed(0)
    features = case.task == "features"
    model = ppvision.create_model(case.model, features_only=features)
    for name in ("paddle", "onnx"):
        export_model(
            model,
            folder / name,
            input_shape=case.shape,
            output_op="none",
            format=name,
            task=case.task,
        )
    sizes = {key: getattr(model.config, key) for key in ("channels", "depths", "num_heads")}
    (folder / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
    np.savez(folder / "weights.npz", **{k: v.numpy() for k, v in model.state_dict().items()})


def multiply_adds(case: Case) -> int:
    from ppvision.models import pale_transformer

    side, classes = TASKS[case.task], None if case.task == "features" else 1000
    config = pale_transformer.VARIANTS[case.model]
    return case.batch * pale_transformer.multiply_adds(config, side, side, num_classes=classes)


# -- an engine, in a process of its own ------------------------------------------------------------


def _runtime(engine: str, case: Case, folder: Path, threads: int) -> Callable:
    """`run(x) -> arrays` of an engine."""
    if engine in ("paddle", "onednn"):
        from ppvision.deploy import Predictor

        onednn = True if engine == "onednn" else None
        predictor = Predictor(folder / "paddle", threads=threads, use_onednn=onednn)
        if predictor.engine != ("onednn" if onednn else "openvino"):
            raise RuntimeError(f"{engine}: runs in {predictor.engine}; export it anew.")
        return predictor.run
    if engine == "onnx":
        return _onnx_session(folder / "onnx" / "model.onnx", threads)
    import torch

    from benchmark.torch_pale import Pale, load

    torch.set_num_threads(threads)
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    classes = None if case.task == "features" else 1000
    model = Pale(sizes["channels"], sizes["depths"], sizes["num_heads"], classes).eval()
    load(model, dict(np.load(folder / "weights.npz")))
    if engine == "compiled":
        model = torch.compile(model)

    def run(x: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = model(torch.from_numpy(x))
        return [y.numpy() for y in (found if isinstance(found, list) else [found])]

    return run


def _onnx_session(model: Path, threads: int) -> Callable:
    """ONNX Runtime as its users start it, in a process without Paddle."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options)
    (inputs,) = session.get_inputs()
    return lambda x: session.run(None, {inputs.name: x})


def _peak() -> Callable[[], list[np.ndarray]]:
    """One product of two large float32 matrices, by the library that Paddle calls."""
    import paddle

    a, b = paddle.rand([MATRIX, MATRIX]), paddle.rand([MATRIX, MATRIX])
    return lambda: [paddle.matmul(a, b).numpy()]


def work(engine: str, case: Case, folder: Path, threads: int) -> None:
    """A worker's side."""

    def make() -> Callable[[], list[np.ndarray]]:
        if engine == "peak":
            return _peak()
        x = np.random.default_rng(0).normal(size=case.shape).astype(np.float32)
        run = _runtime(engine, case, folder, threads)
        return lambda: run(x)

    modules = {"onnx": "onnxruntime", "torch": "torch", "compiled": "torch"}
    importlib.import_module(modules.get(engine, "ppvision.deploy"))
    answer(make)


def workers(engines: list[str], case: Case, folder: Path, threads: int) -> list[Worker]:
    """One for each engine."""
    shape = (case.model, case.task, case.batch)
    return [
        Worker(engine, __file__, (engine, *shape, folder, threads), threads) for engine in engines
    ]


# -- the table -------------------------------------------------------------------------------------


def check_outputs(made: list[Worker], folder: Path) -> None:
    """Raise unless every engine gives what the first one does."""
    found = {}
    for worker in made:
        path = folder / f"{worker.name}_out.npz"
        worker(f"save {path}")
        with np.load(path) as arrays:
            found[worker.name] = [arrays[name] for name in arrays.files]
        path.unlink()
    first, *others = found
    for other in others:
        for a, b in zip(found[first], found[other], strict=True):
            error = np.abs(a - b).max() / max(1.0, np.abs(a).max())
            if not error <= TOLERANCE:
                raise RuntimeError(f"{other} gives other numbers than {first}: {error:.3g}")


def measure(
    case: Case, engines: list[str], threads: int, folder: Path, repeats: int
) -> list[dict[str, object]]:
    """A row for each engine."""
    with end_afterwards(workers(engines, case, folder, threads)) as made:
        check_outputs(made, folder)
        times, last = in_turn(made, WARM_UP, repeats)
    with end_afterwards(workers(["peak"], case, folder, threads)) as (peak,):
        fastest = min(peak()["ms"] for _ in range(10))
    limit = fastest * multiply_adds(case) / MATRIX**3
    medians = {engine: float(np.median(values)) for engine, values in times.items()}
    rows = []
    for engine, values in times.items():
        low, high = np.percentile(values, [10, 90])
        rows.append(
            {
                "model": case.model,
                "task": f"{case.task} {TASKS[case.task]}",
                "batch": case.batch,
                "threads": threads,
                "engine": engine,
                "median_ms": f"{medians[engine]:.2f}",
                "p10_ms": f"{low:.2f}",
                "p90_ms": f"{high:.2f}",
                "paddle_over_it": f"{medians['paddle'] / medians[engine]:.3f}",
                **{f"{name}_mib": f"{last[engine][name]:.0f}" for name in MEMORY},
                "limit_ms": f"{limit:.2f}",
                "machine": machine(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of each case")
    parser.add_argument("--work_dir", type=Path, default=Path("output/deploy_latency"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table, a CSV file")
    args = parser.parse_args()
    from benchmark.runs import write_rows  # not at the top: it imports Paddle

    engines = list(ENGINES)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its two engines are left out (requirements-torch.txt)")
        engines = [name for name in engines if name not in ("torch", "compiled")]
    rows = []
    for model in args.models:
        for task in args.tasks:
            for batch in args.batches:
                case = Case(model, task, batch)
                folder = args.work_dir.resolve() / case.name
                folder.mkdir(parents=True, exist_ok=True)
                prepare(case, folder)
                for threads in args.threads:
                    rows += measure(case, engines, threads, folder, args.repeats)
                    for row in rows[-len(engines) :]:
                        shown = (
                            "engine",
                            "median_ms",
                            "paddle_over_it",
                            "peak_mib",
                            "resident_mib",
                        )
                        cells = "  ".join(f"{key} {row[key]}" for key in shown)
                        print(f"{case.name}, {threads} threads: {cells}", flush=True)
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    write_rows(args.results, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _engine, _model, _task, _batch, _folder, _threads = sys.argv[2:]
        work(_engine, Case(_model, _task, int(_batch)), Path(_folder), int(_threads))
    else:
        main()
