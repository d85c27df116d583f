"""Where OpenVINO's time goes in a graph, by kind of layer.

    pip install openvino==2025.0.0          # in an environment of its own
    python benchmark/openvino_layers.py output/int8_attention/int8

2025.0 is the version inside Paddle 3.2.2, which has no profile of its own; it reads the same
`model.pdmodel`. One thread, float32 where the graph has no integers. A line is the median of
`--runs` of what all layers of a kind take in a run. A kernel `..._I8` or `..._i8` computes in
integers. Layers that hold a matrix product besides the fully connected ones ("Subgraph") are
attention; they are counted apart.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import openvino


def profile(folder: Path, runs: int) -> dict[tuple[str, str], tuple[int, float]]:
    """Number of layers and milliseconds, by kind of layer and kernel."""
    core = openvino.Core()
    options = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.read_model(folder / "model.pdmodel")
    request = core.compile_model(model, "CPU", options).create_infer_request()
    x = np.random.default_rng(0).standard_normal(tuple(model.inputs[0].shape)).astype(np.float32)
    taken, counts = defaultdict(list), Counter()
    for number in range(runs + 5):
        request.infer([x])
        if number < 5:  # the first ones are slower
            continue
        own: dict[tuple[str, str], float] = defaultdict(float)
        counts.clear()
        for layer in request.profiling_info:
            if layer.status.name != "EXECUTED":
                continue
            attends = layer.node_type == "Subgraph" and "matmul" in layer.node_name
            kind = "Attention" if attends else layer.node_type, layer.exec_type
            own[kind] += 1e3 * layer.real_time.total_seconds()
            counts[kind] += 1
        for kind, milliseconds in own.items():
            taken[kind].append(milliseconds)
    return {kind: (counts[kind], float(np.median(found))) for kind, found in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, help="with model.pdmodel")
    parser.add_argument("--runs", type=int, default=60, help="(60)")
    args = parser.parse_args()
    print(f"openvino {openvino.__version__}")
    for folder in args.folders:
        found = profile(folder, args.runs)
        print(f"{folder}: {sum(ms for _, ms in found.values()):.2f} ms")
        for (kind, kernel), (count, ms) in sorted(found.items(), key=lambda e: -e[1][1]):
            print(f"    {kind:30} {kernel:28} {count:5} {ms:8.2f}")


if __name__ == "__main__":
    main()
