"""What each step from the layer as it is trained to the form in graphs brings, in Paddle Inference.

    python benchmark/deploy_steps.py

pale_tiny with fresh weights (time does not depend on them), 224 x 224. Forms of PS-Attention:

    trained      `ppvision.nn.PaleAttention`, channel-first
    token_last   groups token-last, for one operator an attention; query, key and value each a
                 depthwise convolution and two pointwise ones, for rows and columns
    grouped      the pointwise ones of query, key and value as one grouped convolution
    graph        the depthwise ones as one as well: `ppvision.forms.pale`

and, with the last one, oneDNN's passes: each of those that `PaddleRuntime` leaves out put back
(`+pass`), or one more left out (`-pass`). All take turns in one process, median of the rounds.
Writes benchmark/results/deploy_steps.csv.

    python benchmark/deploy_steps.py --any_size --models pale_nano pale_tiny --sides 224 512

The same of graphs whose height and width are free, run at these sides: the layer as it is trained,
and the form in graphs (`ppvision.forms.any_size`). Writes benchmark/results/any_size.csv.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ppvision.environment import machine, prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, inference
from tqdm import tqdm

import ppvision
from ppvision.deploy.run import engines
from ppvision.deploy.write.graph import trace, write_graphs
from ppvision.forms import pale

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results")
TOLERANCE = 1e-3  # of the logits, in relation to the largest


class TokenLast(pale.GraphPaleAttention):
    """Groups token-last; one convolution for each projection and half."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half, parts = x.shape[1] // 2, []
        for z, weight, bias in self._separate(x):
            parts.append([F.conv2d(z, weight[cut], bias[cut]) for cut in _halves(half)])
        return tuple(paddle.concat(part, axis=1) for part in zip(*parts, strict=True))

    def _separate(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of query, key and value: features behind BatchNorm, and the pointwise layer."""
        scale = (x.shape[1] // self.attention.num_heads) ** -0.5
        found = []
        for name in ("query", "key", "value"):
            depthwise, norm, pointwise = getattr(self.attention, name)
            factor = scale if name == "query" else 1.0
            found.append((norm(depthwise(x)), pointwise.weight * factor, pointwise.bias * factor))
        return found


class Grouped(TokenLast):
    """The same with one grouped pointwise convolution for each half."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, weights, biases = zip(*self._separate(x), strict=True)
        z = paddle.concat(features, axis=1)  # [B, 3C, H, W]
        return tuple(
            F.conv2d(
                z,
                paddle.concat([weight[cut] for weight in weights]),
                paddle.concat([bias[cut] for bias in biases]),
                groups=3,
            )
            for cut in _halves(x.shape[1] // 2)
        )


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)


FORMS = {
    "trained": None,
    "token_last": TokenLast,
    "grouped": Grouped,
    "graph": pale.GraphPaleAttention,
}
OF_ANY_SIZE = ("trained", "graph")  # the other forms want known sizes
PLACEMENT = "onednn_placement_pass"


@dataclass(frozen=True)
class Case:
    """What is run: a model on pictures of one size, in a graph of that size or of any."""

    model: str
    side: int
    any_size: bool
    batch: int


def settings(form: str, any_size: bool) -> dict[str, tuple[str, ...] | None]:
    """Passes that are left out, by the name of the setting; None is without oneDNN."""
    off = engines.ONEDNN_PASSES_OFF
    found: dict[str, tuple[str, ...] | None] = {"as deployed": off}
    if form == "graph" and not any_size:
        found |= {f"+{name}": tuple(p for p in off if p != name) for name in off}
        found[f"-{PLACEMENT}"] = (*off, PLACEMENT)
    return found | {"without oneDNN": None}


def export(form: str, folder: Path, case: Case) -> None:
    """The graph with one form of the attention."""
    paddle.seed(0)
    model = ppvision.create_model(case.model)
    model.eval()
    side = None if case.any_size else case.side
    shape = [case.batch, 3, side, side]
    kind = pale.GraphPaleAttention
    if FORMS[form] is not None:
        pale.GraphPaleAttention = FORMS[form]
    try:
        with pale.pale_form(model) if FORMS[form] else nullcontext():
            write_graphs(trace(model, shape, "none", every_output=False), {folder: None}, "paddle")
    finally:
        pale.GraphPaleAttention = kind


def runner(folder: Path, off: tuple[str, ...] | None, threads: int, x: np.ndarray) -> Callable:
    """What runs a graph once and gives its logits."""
    config = inference.Config(str(folder / "model.json"), str(folder / "model.pdiparams"))
    config.disable_glog_info()
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(threads)
    if off is None:
        config.disable_onednn()
    else:
        config.enable_onednn()
        for name in off:
            config.delete_pass(name)
    predictor = inference.create_predictor(config)
    entry = predictor.get_input_handle(predictor.get_input_names()[0])
    result = predictor.get_output_handle(predictor.get_output_names()[0])

    def run() -> np.ndarray:
        entry.reshape(x.shape)
        entry.copy_from_cpu(x)
        predictor.run()
        return result.copy_to_cpu()

    return run


def measure(case: Case, threads: int, rounds: int, work: Path) -> list[dict[str, object]]:
    """A row for each form and setting."""
    shape = (case.batch, 3, case.side, case.side)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    runs, outcome, expected = {}, {}, None
    for form in OF_ANY_SIZE if case.any_size else FORMS:
        folder = work / f"{form}_{case.model}_{case.side}_{case.batch}"
        if not folder.exists():
            export(form, folder, case)
        for name, off in settings(form, case.any_size).items():
            try:
                run = runner(folder, off, threads, x)
                found = run()
            except Exception as error:  # whatever Paddle raises for a pass that fails
                outcome[form, name] = f"fails: {type(error).__name__}"
                continue
            expected = found if expected is None else expected
            wrong = np.abs(found - expected).max() > TOLERANCE * max(1, np.abs(expected).max())
            outcome[form, name] = "other numbers" if wrong else "runs"
            runs[form, name] = run
    times = {key: [] for key in runs}
    for _ in tqdm(range(rounds), desc=f"{case}, {threads} threads", disable=None):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - start))
    medians = {key: float(np.median(values)) for key, values in times.items()}
    deployed = medians["graph", "as deployed"]
    return [
        {
            "model": case.model,
            "side": case.side,
            "batch": case.batch,
            "threads": threads,
            "form": form,
            "passes": name,
            "outcome": result,
            "median_ms": f"{medians[form, name]:.1f}" if (form, name) in medians else "",
            "over_deployed": (
                f"{medians[form, name] / deployed:.3f}" if (form, name) in medians else ""
            ),
            "machine": machine(),
        }
        for (form, name), result in outcome.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["pale_tiny"])
    parser.add_argument("--sides", type=int, nargs="+", default=[224])
    parser.add_argument("--any_size", action="store_true", help="graphs of free height and width")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--results", type=Path, help="default: see above")
    args = parser.parse_args()
    name = "any_size.csv" if args.any_size else "deploy_steps.csv"
    results, rows = args.results or RESULTS / name, []
    with tempfile.TemporaryDirectory() as work:
        for model, side, batch in itertools.product(args.models, args.sides, args.batches):
            for threads in args.threads:
                case = Case(model, side, args.any_size, batch)
                rows += measure(case, threads, args.rounds, Path(work))
                write_rows(results, rows)
    print(results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
