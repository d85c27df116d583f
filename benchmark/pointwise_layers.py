"""Pointwise layers in Paddle Inference: 1x1 convolutions against Linear, by oneDNN setting.

Pale keeps features channel-first and writes every pointwise layer as a 1x1 Conv2D. Here the same
network, with the same weights, is exported a second time with every 1x1 Conv2D replaced by a Linear
on the transposed features, and both are timed under

    oneDNN, without matmul_add_act_fuse_pass   (what `ppvision.deploy` uses)
    oneDNN, with it                            (Linear becomes pd_op.fc, which has no oneDNN kernel)
    no oneDNN

All of them run in turn in one loop, so that whatever else the machine does meets all alike.

    python benchmark/pointwise_layers.py        # writes benchmark/results/pointwise_layers.csv
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, inference, nn

from ppvision.deploy.write.graph import trace, write_graphs
from ppvision.environment import count_usable_cpus, read_processor_name
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer

RESULTS = Path(__file__).with_name("results") / "pointwise_layers.csv"
RESHAPE_PASS = "operator_reshape_onednn_fuse_pass"  # fails on attention, off in every oneDNN run
FUSE_PASS = "matmul_add_act_fuse_pass"
WARM_UP = 3


class PointwiseLinear(nn.Layer):
    """The Linear that computes what a 1x1 convolution does: `[B, C, H, W]` -> `[B, D, H, W]`."""

    def __init__(self, conv: nn.Conv2D) -> None:
        super().__init__()
        outputs, inputs = conv.weight.shape[:2]
        self.linear = nn.Linear(inputs, outputs, bias_attr=None if conv.bias is not None else False)
        self.linear.weight.set_value(conv.weight.reshape([outputs, inputs]).t())
        if conv.bias is not None:
            self.linear.bias.set_value(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose([0, 2, 3, 1])).transpose([0, 3, 1, 2])


def with_linear(layer: nn.Layer) -> nn.Layer:
    """Replace every ungrouped 1x1 Conv2D below `layer`, in place."""
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.Conv2D) and child._kernel_size == [1, 1] and child._groups == 1:
            setattr(layer, name, PointwiseLinear(child))
        else:
            with_linear(child)
    return layer


def runner(folder: Path, threads: int, passes_off: tuple[str, ...] | None) -> Callable:
    """A function that runs the export; `passes_off` None means without oneDNN."""
    config = inference.Config(str(folder / "model.json"), str(folder / "model.pdiparams"))
    config.disable_glog_info()
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(threads)
    if passes_off is None:
        config.disable_onednn()
    else:
        config.enable_onednn()
        for name in passes_off:
            config.delete_pass(name)
    predictor = inference.create_predictor(config)
    handle = predictor.get_input_handle(predictor.get_input_names()[0])
    output = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(x: np.ndarray) -> np.ndarray:
        handle.copy_from_cpu(x)
        predictor.run()
        return output.copy_to_cpu()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="pale_tiny", choices=VARIANTS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    paddle.seed(0)
    model = PaleTransformer(VARIANTS[arguments.variant])
    settings = {
        "oneDNN": (RESHAPE_PASS, FUSE_PASS),
        "oneDNN, fuse pass on": (RESHAPE_PASS,),
        "no oneDNN": None,
    }
    model.eval()
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for pointwise in ("Conv2D 1x1", "Linear"):
            if pointwise == "Linear":
                with_linear(model)
            folder = Path(scratch) / pointwise.replace(" ", "_")
            # As the layers are written, without `ppvision.forms.pale`.
            shape = [1, 3, arguments.size, arguments.size]
            write_graphs(trace(model, shape, "none", every_output=False), {folder: None}, "paddle")
            for setting, passes_off in settings.items():
                runs[pointwise, setting] = runner(folder, arguments.threads, passes_off)

    x = np.random.default_rng(0).standard_normal((1, 3, arguments.size, arguments.size))
    x = x.astype("float32")
    times = {key: [] for key in runs}
    outputs = {}
    for number in range(WARM_UP + arguments.repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            outputs[key] = run(x)
            if number >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - start))
    reference = outputs["Conv2D 1x1", "no oneDNN"]
    for key, output in outputs.items():
        error = np.abs(output - reference).max() / max(1.0, np.abs(reference).max())
        if error > 1e-4:
            raise RuntimeError(f"{key}: not the same network, its output differs by {error:.3g}.")

    rows = [
        {
            "model": arguments.variant,
            "size": arguments.size,
            "batch": 1,
            "threads": arguments.threads,
            "pointwise": pointwise,
            "setting": setting,
            "median_ms": f"{statistics.median(values):.1f}",
            "min_ms": f"{min(values):.1f}",
            "max_ms": f"{max(values):.1f}",
            "repeats": arguments.repeats,
            "processor": read_processor_name(),
            "cores": count_usable_cpus(),
            "MKL_DEBUG_CPU_TYPE": os.environ.get("MKL_DEBUG_CPU_TYPE", ""),
            "paddle": paddle.__version__,
        }
        for (pointwise, setting), values in times.items()
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(arguments.output)
    for row in rows:
        print(f"{row['pointwise']:12}{row['setting']:24}{row['median_ms']:>8} ms")


if __name__ == "__main__":
    main()
