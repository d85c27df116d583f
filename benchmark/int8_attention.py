"""Both products of attention in 8-bit integers: tried in the graph of integers, and timed.

    python benchmark/int8_attention.py --work_dir output/int8_attention

What it found is in docs/notes/int8_attention.md. The network gets random weights and is calibrated
on noise. Five graphs are written for OpenVINO: `float`; `int8`, as an export has it, whose products
of attention are in float; and that with query, key, value and attention weights rounded to 8 bits
too: in front of the products (`scores`: the first one alone; `both`), or query, key and value where
they are projected, before they are put into groups (`early`). They run in turn in one process, and
a line is the median of many rounds, with the median of a round's time over that of `float` and of
`int8`. One product is compared with sums of whole numbers in NumPy first.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from ppvision import create_model
from ppvision.deploy.run.engines import open_runtime
from ppvision.deploy.run.precision import find_usable_flags
from ppvision.deploy.write.graph import trace
from ppvision.environment import machine
from ppvision.forms import tokens
from ppvision.forms.differences import difference_form
from ppvision.forms.earlier_format import earlier_format
from ppvision.forms.integers import GraphRounding, float_form, integer_form
from ppvision.forms.tokens import token_form
from ppvision.quant.integers import CODES, INT8_LOW, WEIGHT_LIMIT, IntegerActivation
from ppvision.quant.packed import IntegerRounding
from ppvision.quant.ptq.integers import quantize_to_integers

KINDS = ("scores", "both", "early")
# Attention weights are 0 to 1, so their 256 codes need no calibration.
OF_WEIGHTS = IntegerActivation(1 / (CODES - 1), 0)
_attention, _pointwise = tokens._attention, tokens._pointwise


class Sites:
    """The places of a network where query, key or value are rounded, in the order in which a pass
    meets them. A pass in eager mode makes the steps, of the largest magnitudes; then a graph has
    them in the same order.

    Args:
        kind: one of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.roundings: list[GraphRounding] = []
        self.of_weights = GraphRounding(IntegerRounding(OF_WEIGHTS))
        self._place = 0

    def round(self, x: Tensor) -> Tensor:
        if paddle.in_dynamic_mode():
            step = float(x.abs().max()) / WEIGHT_LIMIT
            rounding = IntegerRounding(IntegerActivation(step, INT8_LOW))
            self.roundings.append(GraphRounding(rounding))
            return x
        self._place += 1
        return self.roundings[(self._place - 1) % len(self.roundings)](x)

    def round_weights(self, weights: Tensor) -> Tensor:
        return weights if paddle.in_dynamic_mode() else self.of_weights(weights)

    def multiply(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of `[G, heads, T, d]` with rounded factors."""
        late = self.kind != "early"
        if late:
            query, key = self.round(query), self.round(key)
        weights = F.softmax(paddle.matmul(query, key, transpose_y=True), axis=-1)
        if self.kind == "both":
            value = self.round(value)
        if self.kind != "scores":
            weights = self.round_weights(weights)
        return paddle.matmul(weights, value)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rows: bool, following: nn.Layer
    ) -> Tensor:
        """`ppvision.forms.tokens._attention`."""
        order = [0, 2, 4, 1, 3, 5] if rows else [0, 3, 4, 1, 2, 5]
        back = [0, 3, 1, 4, 2, 5] if rows else [0, 3, 4, 1, 2, 5]
        parts = [z.transpose(order) for z in (query, key, value)]
        _, count, heads, *lines, depth = parts[0].shape
        flat = [-1, heads, lines[0] * lines[1], depth]
        out = tokens._round(self.multiply(*(z.reshape(flat) for z in parts)), following)
        return out.reshape([-1, count, heads, *lines, depth]).transpose(back)

    def project(self, x: Tensor, layer: nn.Conv2D, *factor: float) -> Tensor:
        """`ppvision.forms.tokens._pointwise`; query, key and value come with a factor."""
        out = _pointwise(x, layer, *factor)
        return self.round(out) if factor else out


@contextmanager
def attention_in_integers(model: nn.Layer, sites: Sites) -> Iterator[None]:
    """The form for tokens with rounded factors of attention."""
    tokens._attention = sites.attend
    # So that their tensors are found when the graph is saved.
    model.roundings = nn.LayerList([*sites.roundings, sites.of_weights])
    if sites.kind == "early":
        tokens._pointwise = sites.project
    try:
        yield
    finally:
        tokens._attention, tokens._pointwise = _attention, _pointwise
        del model.roundings


def write(model: nn.Layer, shape: list[int], folder: Path, form: Callable) -> Path:
    forms = form(model), token_form(model), difference_form(model), integer_form(model)
    with ExitStack() as stack:
        for entered in (*forms, earlier_format()):
            stack.enter_context(entered)
        graph = trace(model, shape, "none", every_output=True)
        paddle.jit.save(graph, str(folder / "model"))
    return folder


@contextmanager
def as_it_is(_: nn.Layer) -> Iterator[None]:
    yield


def write_all(name: str, side: int, work: Path) -> dict[str, Path]:
    """The folders by kind."""
    paddle.seed(0)
    model = create_model(name, num_classes=1000)
    model.eval()
    random, shape = np.random.default_rng(0), [1, 3, side, side]
    pictures = [random.standard_normal(shape).astype(np.float32) for _ in range(2)]
    shows = [lambda shown, x=x: shown(paddle.to_tensor(x)) for x in pictures]
    integers = quantize_to_integers(model, shows, rule="maximum")
    folders = {
        "float": write(integers, shape, work / "float", float_form),
        "int8": write(integers, shape, work / "int8", as_it_is),
    }
    for kind in KINDS:
        sites = Sites(kind)
        with attention_in_integers(integers, sites), paddle.no_grad(), token_form(integers):
            shows[0](integers)
        with attention_in_integers(integers, sites):
            folders[kind] = write(integers, shape, work / kind, as_it_is)
    return folders


# -- one product, in whole numbers -----------------------------------------------------------------


class Attention(nn.Layer):
    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    @paddle.jit.not_to_static
    def _multiply(self, x: Tensor) -> Tensor:
        query, key, value = (x[:, k] for k in range(3))  # [G, heads, T, d] each
        return self.sites.multiply(query, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x)


def check_product(work: Path) -> float:
    """The largest difference of `both` from NumPy, in parts of the largest output."""
    x = np.random.default_rng(1).standard_normal((1, 3, 2, 98, 32)).astype(np.float32)
    sites = Sites("both")
    layer = Attention(sites)
    layer.eval()
    with paddle.no_grad():
        layer(paddle.to_tensor(x))
    with attention_in_integers(layer, sites):
        folder = write(layer, list(x.shape), work / "product", as_it_is)
    found = open_runtime(folder, "paddle", engine="openvino", threads=1).run(x)[0]
    steps = [float(form.rounding.scale) / WEIGHT_LIMIT for form in sites.roundings]
    codes = [
        np.clip(np.floor(x[:, k] / np.float32(s) + np.float32(0.5)), -128, 127).astype(np.int64)
        for k, s in enumerate(steps)
    ]
    scores = steps[0] * steps[1] * (codes[0] @ codes[1].swapaxes(-1, -2))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = np.rint(255 * weights / weights.sum(axis=-1, keepdims=True)).astype(np.int64)
    expected = steps[2] / 255 * (weights @ codes[2])
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -- time ------------------------------------------------------------------------------------------

_CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from ppvision.deploy.run.engines import open_runtime
folders, side, rounds = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
runtimes = [open_runtime(Path(f), "paddle", engine="openvino", threads=1) for f in folders]
x = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
outputs, taken = [runtime.run(x)[0].tolist() for runtime in runtimes], []
for _ in range(rounds):
    row = []
    for runtime in runtimes:
        start = time.perf_counter()
        runtime.run(x)
        row.append(1e3 * (time.perf_counter() - start))
    taken.append(row)
print("ANSWER", json.dumps([taken, outputs]))
"""


def measure(folders: dict[str, Path], side: int, rounds: int) -> None:
    """Print a line for each kind."""
    command = [sys.executable, "-W", "ignore", "-c", _CHILD]
    command += [json.dumps([str(folder) for folder in folders.values()]), str(side), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    taken, outputs = (np.array(a) for a in json.loads(answer.removeprefix("ANSWER ")))
    order = list(folders)
    to_int8, to_float = (taken / taken[:, [order.index(k)]] for k in ("int8", "float"))
    print("kind     ms      over float  over int8  correlation with float")
    for place, kind in enumerate(order):
        alike = np.corrcoef(outputs[0].ravel(), outputs[place].ravel())[0, 1]
        print(
            f"{kind:8} {np.median(taken[:, place]):6.2f}  {np.median(to_float[:, place]):10.3f}  "
            f"{np.median(to_int8[:, place]):9.3f}  {alike:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the graphs")
    parser.add_argument("--network", default="pale_tiny", help="of Pale (pale_tiny)")
    parser.add_argument("--side", type=int, default=224, help="of the picture, in pixels (224)")
    parser.add_argument("--rounds", type=int, default=60, help="of all graphs in turn (60)")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    flags = sorted(f for f in find_usable_flags() if "vnni" in f or "amx" in f)
    print(f"{machine()}, {', '.join(flags)}; {args.network} at {args.side}, one thread")
    print(f"one attention against NumPy's integers: {check_product(args.work_dir):.1e}")
    start = time.monotonic()
    folders = write_all(args.network, args.side, args.work_dir)
    print(f"graphs written in {time.monotonic() - start:.0f} s", flush=True)
    measure(folders, args.side, args.rounds)


if __name__ == "__main__":
    main()
