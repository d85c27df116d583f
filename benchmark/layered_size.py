"""What a layered model and its exports weigh, and what they cost to load and to run.

    python benchmark/layered_size.py

quantises pale_tiny and ResNet-50 (fresh weights: bytes and time do not depend on their values; all
widths from 8 to 2, every layer), and writes benchmark/results/layered_size.csv, a row for each
width: bytes of the layered model up to it and of its export's weights, both over what all tensors
at their own width and all float tensors take; the graph's bytes; files that the next width needs;
latency over that of the float export, in the same round; seconds to load, of the export and of
a width that `Predictor` composes, over the float export's. All in the engine that `Predictor`
takes by itself.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.vision.models import resnet50

import ppvision
from ppvision.deploy import Predictor, export_model
from ppvision.environment import count_usable_cpus, machine
from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config
from ppvision.quant import OnceQAT, load_layered, save_layered
from ppvision.quant.packed import pack_model
from ppvision.quant.store.state import LayeredState, extract_state

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import read_rows, write_rows

RESULTS = Path(__file__).with_name("results") / "layered_size.csv"
BITS = (8, 6, 4, 3, 2)
SIDE = 224
NETWORKS: dict[str, Callable[[], nn.Layer]] = {
    "pale_tiny": lambda: ppvision.create_model("pale_tiny", num_classes=1000),
    "resnet50": lambda: resnet50(num_classes=1000),
}


def ideal_bytes(state: LayeredState, bits: int) -> int:
    """Every weight at its own width, to the byte, and every float tensor of all widths."""
    codes = sum(-(-w.codes.size * w.width(bits) // 8) for w in state.weights.values())
    steps = sum(w.step.nbytes for w in state.weights.values())
    statistics_ = sum(a.nbytes for of in state.statistics.values() for a in of.values())
    return codes + steps + statistics_ + sum(a.nbytes for a in state.floats.values())


def count_export_bytes(state: LayeredState, bits: int) -> int:
    """The same with the statistics of one width, as an export has them."""
    others = sum(a.nbytes for k, of in state.statistics.items() for a in of.values())
    return (
        ideal_bytes(state, bits)
        - others
        + sum(a.nbytes for a in state.statistics_at(bits).values())
    )


def count_layer_bytes(folder: Path, bits: int) -> int:
    """The manifest and the files up to a width."""
    loaded = load_layered(folder, bits)
    return sum(size for _, size in loaded.opened)


def new_files(folder: Path, bits: int) -> int:
    """Files that `bits` needs and the next narrower precision does not."""
    if bits == min(BITS):
        return 0
    names = [{name for name, _ in load_layered(folder, k).opened} for k in (bits - 1, bits)]
    return len(names[1] - names[0])


def seconds(load: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        load()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def latencies(predictors: dict[str, Predictor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after another in every round."""
    x = np.random.default_rng(0).normal(size=[1, 3, SIDE, SIDE]).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for number in range(5 + repeats):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor.run(x)
            if number >= 5:
                times[name].append(time.perf_counter() - start)
    return times


def measure(network: str, work: Path, repeats: int) -> list[dict[str, object]]:
    """The rows of one network."""
    paddle.seed(0)
    model = NETWORKS[network]()
    model.eval()
    how = {
        "input_shape": [1, 3, SIDE, SIDE],
        "output_op": "none",
        "task": "classification",
    }
    in_float = export_model(model, work / "float", **how)
    example = paddle.to_tensor(np.zeros([1, 3, SIDE, SIDE], np.float32))
    config = slim_quant_config(model, bits=BITS, ends=end_layers(model, example))
    once = OnceQAT(LayeredQAT(config).quantize(model), BITS)
    state = extract_state(once.model, BITS)
    layers = save_layered(state, work / "layered", bits=BITS, config={"model": network})
    exports = {
        k: export_model(pack_model(NETWORKS[network](), state, k), work / f"w{k}", bits=k, **how)
        for k in BITS
    }
    threads = count_usable_cpus()
    predictors = {"float": Predictor(in_float, threads=threads)}
    predictors |= {str(k): Predictor(folder, threads=threads) for k, folder in exports.items()}
    times = latencies(predictors, repeats)
    float_load = seconds(lambda: Predictor(in_float, threads=threads), 5)
    rows = []
    for k, folder in exports.items():
        weights, graph = (folder / name for name in ("model.pdiparams", "model.json"))
        ratio = statistics.median(a / b for a, b in zip(times[str(k)], times["float"], strict=True))
        in_graph = seconds(lambda f=folder: Predictor(f, threads=threads), 3)
        composed = seconds(
            lambda b=k: Predictor(in_float, threads=threads, layered=layers, bits=b), 3
        )
        rows.append(
            {
                "network": network,
                "bits": k,
                "layered_bytes": count_layer_bytes(layers, k),
                "layered_over_ideal": f"{count_layer_bytes(layers, k) / ideal_bytes(state, k):.4f}",
                "new_files": new_files(layers, k),
                "export_bytes": weights.stat().st_size,
                "export_over_ideal": f"{weights.stat().st_size / count_export_bytes(state, k):.4f}",
                "graph_bytes": graph.stat().st_size,
                "engine": predictors[str(k)].engine,
                "latency_over_float": f"{ratio:.3f}",
                "float_load_s": f"{float_load:.2f}",
                "load_s_over_float": f"{in_graph - float_load:.2f}",
                "composed_load_s_over_float": f"{composed - float_load:.2f}",
                "machine": machine(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows of others stay")
    parser.add_argument("--repeats", type=int, default=40, help="timed runs of each export")
    args = parser.parse_args()
    rows = {network: [] for network in NETWORKS}
    for row in read_rows(args.results):
        rows[row["network"]].append(row)
    for network in args.networks:
        with tempfile.TemporaryDirectory() as work:
            rows[network] = measure(network, Path(work), args.repeats)
        write_rows(args.results, [row for of in rows.values() for row in of])
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
