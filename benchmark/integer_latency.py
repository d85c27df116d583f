"""What integers bring: milliseconds, bytes, seconds to load and memory of exported folders.

    python benchmark/integer_latency.py --work_dir output/integers   # all, an hour or more
    python benchmark/integer_latency.py --work_dir output/integers --models resnet50 --threads 1

Each network is exported in float, in integers, and with packed codes of 4 and 2 bits in integers
(random weights, calibrated on noise: time does not depend on them) and opened in processes of its
own, one for each folder and arithmetic. The processes run in turn, one picture or batch each, so
that whatever else the machine does meets all of them alike; with more than one thread each waits
until the threads of the one before sleep. A row is the median of many. `ratio` is the median of a
round's time over float32's in the same engine, OpenVINO. Detectors take one picture at a time,
their NMS included. Rows go to benchmark/results/integer_latency.csv.
"""

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmark.runs import replace_rows
from benchmark.turns import PAUSE
from ppvision import create_model, export_model
from ppvision.data.writing import write_picture
from ppvision.deploy.run.precision import find_usable_flags
from ppvision.deploy.write.integers import IntegerOptions
from ppvision.environment import machine
from ppvision.quant.packed import pack_model
from ppvision.quant.store.state import LayeredState, extract_state
from ppvision.quant.train.quanters import LayeredActivationQuanterLayer
from ppvision.tasks import open_job
from ppvision.tasks.job import Job

RESULTS = Path(__file__).parent / "results" / "integer_latency.csv"
FIELDS = ["model", "input", "arithmetic", "engine", "threads", "batch", "ms", "ratio", "bytes"]
FIELDS += ["load_s", "memory_mb", "rounds", "machine"]
KEY = ("model", "arithmetic", "threads", "batch", "machine")  # of a row

NORMALIZE = [{"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]
WIDTHS = (4, 2)  # of packed codes
DETECTOR = Path(__file__).parents[1] / "configs" / "detection" / "ppyoloe_pale_nano_bccd.yml"
UNITS = ("avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")


def _classifier(name: str) -> Callable[[], nn.Layer]:
    return lambda: create_model(name, num_classes=1000)


def _segmenter(similarity: str | None = None) -> Callable[[], nn.Layer]:
    """Of SegFormer, with SDN of this similarity; None: without."""

    def build() -> nn.Layer:
        from paddleseg.models import SegFormer

        import ppvision.plugins.paddleseg  # noqa: F401  (registers)
        from ppvision.plugins.paddleseg import SemanticDiffusionBackbone

        backbone = create_model("pale_nano", features_only=True)
        if similarity is not None:
            backbone = SemanticDiffusionBackbone(backbone, similarity=similarity)
        return SegFormer(num_classes=19, backbone=backbone, embedding_dim=256)

    return build


@functools.cache
def _detection_job() -> Job:
    return open_job(DETECTOR)


def _detector() -> nn.Layer:
    return copy.deepcopy(_detection_job().float_model)


@dataclass(frozen=True)
class Network:
    """What is measured.

    Attributes:
        build: makes it, in float.
        size: height and width of the picture, in pixels.
        task: of `export_model`, or "detection".
    """

    build: Callable[[], nn.Layer]
    size: tuple[int, int] = (224, 224)
    task: str = "classification"


NETWORKS = {
    "pale_nano": Network(_classifier("pale_nano")),
    "pale_tiny": Network(_classifier("pale_tiny")),
    "resnet50": Network(_classifier("resnet50")),
    "segformer_pale_nano": Network(_segmenter(), (512, 512), "segmentation"),
    "segformer_pale_nano_central": Network(_segmenter("none"), (512, 512), "segmentation"),
    "segformer_pale_nano_sdn": Network(_segmenter("gaussian"), (512, 512), "segmentation"),
    "ppyoloe_pale_nano": Network(_detector, (256, 320), "detection"),
}


def export_all(name: str, batch: int, work: Path) -> dict[str, Path]:
    """The folders of a network: "float32", "int8", "w4", "w2"; one that is there already stays."""
    network = NETWORKS[name]
    kinds = ("float32", "int8", *(f"w{bits}" for bits in WIDTHS))
    folders = {kind: work / f"{name}-{kind}-b{batch}" for kind in kinds}
    missing = [kind for kind in kinds if not (folders[kind] / "deploy.yaml").is_file()]
    if not missing:
        return folders
    paddle.seed(0)
    model = network.build()
    model.eval()
    with tempfile.TemporaryDirectory(dir=work) as noise:
        random, shape = np.random.default_rng(0), (*network.size, 3)
        for number in range(4):
            write_picture(Path(noise) / f"{number}.png", random.integers(0, 256, shape, np.uint8))
        for kind, options in (("float32", None), ("int8", IntegerOptions(noise))):
            if kind in missing:
                export_network(network, model, folders[kind], batch, integers=options)
    widths = [bits for bits in WIDTHS if f"w{bits}" in missing]
    state = make_state(network, model) if widths else None
    for bits in widths:
        packed = pack_model(network.build(), state, bits, integers=True)
        export_network(network, packed, folders[f"w{bits}"], batch, bits, IntegerOptions())
    return folders


def export_network(
    network: Network,
    model: nn.Layer,
    folder: Path,
    batch: int,
    bits: int = 32,
    integers: IntegerOptions | None = None,
    model_format: str = "paddle",
) -> None:
    """Export a network's model, without an operator after its outputs.

    Args:
        network: what is known of it.
        model: with its layers.
        folder: of the export.
        batch: pictures of the graph.
        bits, integers: see `Job.export`.
        model_format: "paddle" or "onnx".
    """
    shape = [batch, 3, *network.size]
    if network.task == "detection":
        how = {"output_op": None, "model_format": model_format, "bits": bits, "integers": integers}
        _detection_job().export(model, folder, input_shape=shape, **how)
        return
    export_model(
        model,
        folder,
        input_shape=shape,
        task=network.task,
        output_op="none",
        transforms=NORMALIZE,
        bits=bits,
        format=model_format,
        int8=integers is not None,
        calibration=None if integers is None else integers.calibration,
    )


def make_state(network: Network, model: nn.Layer) -> LayeredState:
    """A float model at `WIDTHS`, the inputs of its layers at 8 bits, without training."""
    from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config

    layers = {}
    noise = np.random.default_rng(0).standard_normal((1, 3, *network.size)).astype(np.float32)
    x: object = paddle.to_tensor(noise)
    if network.task == "detection":
        job = _detection_job()
        x = {
            "image": x,
            "im_shape": paddle.to_tensor([[float(side) for side in network.size]]),
            "scale_factor": paddle.ones([1, 2]),
        }
        layers = {path: {"float": True} for path in job.constant_layers}
        ends = (end_layers(model, job.example)[0], *job.result_layers)
    else:
        ends = end_layers(model, x)
    how = {"bits": list(WIDTHS), "activations": 8, "layers": layers, "ends": ends}
    quantized = LayeredQAT(slim_quant_config(model, **how)).quantize(model)
    quantized.eval()
    quanters = [q for q in quantized.sublayers() if isinstance(q, LayeredActivationQuanterLayer)]
    for quanter in quanters:
        quanter.calibrating = True
    with paddle.no_grad():
        quantized(x)
    for quanter in quanters:
        quanter.finish_calibration()
    return extract_state(quantized, WIDTHS)


# -- processes that run in turn --------------------------------------------------------------------

_CHILD = """
import json, sys, time
import numpy as np
folder, precision, threads, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.stdout
from ppvision.deploy import Predictor
def memory():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
before, start = memory(), time.perf_counter()
predictor = Predictor(folder, precision=precision, threads=threads)
x = np.random.default_rng(0).standard_normal(predictor.manifest.input_shape).astype(np.float32)
predictor.run(x)
said = {"load_s": time.perf_counter() - start, "memory_mb": memory() - before}
said |= {"engine": predictor.engine, "precision": predictor.precision}
print("ANSWER", json.dumps(said), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    predictor.run(x)
    print("ANSWER", time.perf_counter() - start, flush=True)
"""


class Worker:
    """A process that holds one predictor and runs it when asked."""

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        self._pause = PAUSE if threads > 1 else 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _CHILD, str(folder), precision, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.said: dict[str, object] = json.loads(self._answer())

    def _answer(self) -> str:
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return line.removeprefix("ANSWER ")
        raise SystemExit(f"a process ended with code {self._process.wait()}")

    def run(self) -> float:
        """Seconds of one run."""
        time.sleep(self._pause)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def measure(
    name: str, folders: dict[str, Path], threads: int, batch: int, seconds: float
) -> list[dict[str, object]]:
    """A row for each arithmetic."""
    # What a row is called, its folder, and what `Predictor` is asked for.
    wanted = [("float32", "float32", "float32"), ("int8", "int8", "int8")]
    wanted += [(f"int8, {bits}-bit codes", f"w{bits}", "int8") for bits in WIDTHS]
    if "amx_bf16" in find_usable_flags():
        wanted.insert(1, ("bfloat16", "float32", "bfloat16"))
    workers = {
        kind: Worker(folders[where], precision, threads) for kind, where, precision in wanted
    }
    taken: dict[str, list[float]] = {kind: [] for kind in workers}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken["float32"]) < 5:
        for kind, worker in workers.items():
            taken[kind].append(worker.run())
    rows = []
    units = ", ".join(unit for unit in UNITS if unit in find_usable_flags())
    for kind, where, _ in wanted:
        worker = workers[kind]
        worker.close()
        ratios = np.array(taken[kind]) / np.array(taken["float32"])
        height, width = NETWORKS[name].size
        rows.append(
            {
                "model": name,
                "input": f"{batch}x3x{height}x{width}",
                "arithmetic": kind,
                "engine": worker.said["engine"],
                "threads": threads,
                "batch": batch,
                "ms": round(1e3 * float(np.median(taken[kind])), 2),
                "ratio": round(float(np.median(ratios)), 3),
                "bytes": sum(f.stat().st_size for f in folders[where].iterdir()),
                "load_s": round(worker.said["load_s"], 2),
                "memory_mb": round(worker.said["memory_mb"]),
                "rounds": len(taken[kind]),
                "machine": f"{machine()}, {units}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the exported folders")
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        for batch in args.batches:
            if batch > 1 and NETWORKS[name].task == "detection":
                print(f"{name}: a detector takes one picture at a time, no batch of {batch}")
                continue
            folders = export_all(name, batch, args.work_dir)
            for threads in args.threads:
                rows = measure(name, folders, threads, batch, args.seconds)
                replace_rows(args.results, rows, KEY)
                for row in rows:
                    print({k: row[k] for k in FIELDS[:-1]}, flush=True)


if __name__ == "__main__":
    main()
