"""Our 8-bit integers against those of ONNX Runtime and of OpenVINO with NNCF, on the same CPU.

    python -m venv output/rivals-venv
    output/rivals-venv/bin/pip install nncf==3.4.0 openvino==2026.4.1 onnxruntime==1.32.0 \\
        onnx==1.23.2
    python benchmark/integer_rivals.py --work_dir output/rivals --pictures PHOTOGRAPHS \\
        --rivals_python output/rivals-venv/bin/python
    python benchmark/integer_rivals.py --work_dir output/rivals --time \\
        --rivals_python output/rivals-venv/bin/python

(The rivals have an environment of their own: they need packages that ppvision does not.) The first
run makes the files, some minutes; what is there already stays. From one network with the same
weights:

    paddle        our folders, float and integers: `export`, `export --int8`; OpenVINO inside of
                  Paddle Inference
    onnxruntime   `export --format onnx`, and `quantize_static` of it: QDQ, per channel
    openvino      the same ONNX file, and `nncf.quantize` of it

The weights are random, because time does not depend on them, but for EfficientNet-Lite0 (PYTHONPATH
has its package, see benchmark/integer_scores.py; `--models` can leave it out). All integers are
calibrated on the same 64 pictures of the folder, by each program's own defaults. On 16 others the
outputs are compared with those of our float folder: `same_labels` is the share of equal classes, of
pixels or pictures, `error` the root mean square of the difference over that of the outputs.

`--time` runs what the first run made: each file in a process of its own, which waits while another
one works, one run each a round. Rows of integer_rivals.csv in the folder of results: `ms` is the
median of a file's rounds; `over_our_int8` and `over_float` are the medians of a round's time over
that of our integers and over that of the same program in float. `bytes` are those of all files,
graphs included.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
# Neither ppvision nor Paddle here: this file also runs in the rivals' environment.
from benchmark.turns import PAUSE, Worker, answer, end_afterwards, in_turn

if TYPE_CHECKING:
    from benchmark.integer_latency import Network

RESULTS = Path(__file__).with_name("results") / "integer_rivals.csv"
TRAINED = "efficientnet_lite0"  # with weights of ImageNet, so that its labels mean something
MODELS = ("pale_nano", "pale_tiny", "resnet50", "segformer_pale_nano", TRAINED)
PACKAGES = {"paddle": "paddlepaddle", "onnxruntime": "onnxruntime", "openvino": "openvino"}
ARITHMETICS = ("float32", "int8")
OURS = "paddle int8"
CALIBRATED, COMPARED = 64, 16  # pictures
WARM_UP, ROUNDS = 2, 12
FIELDS = ("model", "input", "program", "version", "arithmetic", "threads", "ms", "over_our_int8")
FIELDS += ("over_float", "bytes", "same_labels", "error", "rounds", "machine")
KEY = ("model", "program", "arithmetic", "threads", "machine")  # of a row

Run = Callable[[np.ndarray], Sequence[np.ndarray]]


# -- the files -------------------------------------------------------------------------------------


def file_of(folder: Path, program: str, arithmetic: str) -> Path:
    """What a program opens: a folder of ours, an ONNX file, or one of OpenVINO's own."""
    if program == "paddle":
        return folder / f"paddle-{arithmetic}"
    if arithmetic == "float32":
        return folder / "onnx" / "model.onnx"
    return folder / ("onnxruntime-int8.onnx" if program == "onnxruntime" else "openvino-int8.xml")


def bytes_of(path: Path) -> int:
    """Of a folder, or of a file and of its weights beside it (OpenVINO's `.bin`)."""
    files = path.iterdir() if path.is_dir() else (path, path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in files if file.is_file())


def split_pictures(pictures: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Those for calibration and others on which outputs are compared, both spread evenly.

    Raises:
        ValueError: fewer than two.
    """
    if len(pictures) < 2:
        raise ValueError(f"--pictures: expected at least 2 pictures, got {len(pictures)}.")
    comparing = _spread(pictures, min(COMPARED, len(pictures) // 2))
    rest = [picture for picture in pictures if picture not in comparing]
    return _spread(rest, CALIBRATED), comparing


def _spread(values: Sequence[Path], count: int) -> list[Path]:
    places = np.linspace(0, len(values) - 1, min(len(values), count)).astype(int)
    return [values[place] for place in places]


def write_pictures(pictures: Sequence[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """The middle of each, as large as the network's pictures.

    Args:
        pictures: of any size.
        size: height and width in pixels.
        folder: is made.

    Returns:
        PNG files.
    """
    import cv2

    from ppvision.data.pictures import read_picture
    from ppvision.data.writing import write_picture

    folder.mkdir(exist_ok=True)
    written = []
    for number, path in enumerate(pictures):
        picture = read_picture(path)
        scale = max(size[0] / picture.shape[0], size[1] / picture.shape[1])
        height, width = (
            max(s, round(scale * n)) for s, n in zip(size, picture.shape, strict=False)
        )
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        written.append(folder / f"{number:03}.png")
        write_picture(written[-1], picture[top : top + size[0], left : left + size[1]])
    return written


def write_inputs(path: Path, calibrating: Sequence[Path], comparing: Sequence[Path]) -> None:
    """The pictures as the networks take them: arrays `[N, 3, H, W]` of both names."""
    from benchmark.integer_latency import NORMALIZE
    from ppvision.data.pictures import read_picture
    from ppvision.deploy.run.transforms import Transforms

    transforms = Transforms(NORMALIZE)
    read = {"calibrating": calibrating, "comparing": comparing}
    arrays = {k: np.stack([transforms(read_picture(p))[0] for p in v]) for k, v in read.items()}
    np.savez(path, **arrays)


def network_of(name: str) -> "Network":
    """The network, of integer_latency.py or the one with weights."""
    from benchmark.integer_latency import NETWORKS, Network
    from ppvision import create_model

    if name == TRAINED:
        return Network(lambda: create_model(name, pretrained=True))
    return NETWORKS[name]


def prepare(name: str, folder: Path, pictures: Sequence[Path], rivals_python: Path) -> None:
    """Make a network's files, as far as they are missing, and compare their outputs."""
    network = network_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = folder / "inputs.npz"
    calibrating, comparing = (
        write_pictures(chosen, network.size, folder / kind)
        for kind, chosen in zip(("calibrating", "comparing"), split_pictures(pictures), strict=True)
    )
    if not inputs.is_file():
        write_inputs(inputs, calibrating, comparing)
    export_missing(network, folder, calibrating)
    for program in ("onnxruntime", "openvino"):
        target = file_of(folder, program, "int8")
        if not target.is_file():
            source = file_of(folder, program, "float32")
            words = ("--quantize", program, source, target, inputs)
            subprocess.run(
                [str(rivals_python), "-W", "ignore", __file__, *map(str, words)], check=True
            )
            print(f"{name}: {target.name}", flush=True)
    agreements = folder / "agreement.json"
    if not agreements.is_file():
        found = compare(folder, rivals_python)
        agreements.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{name}: {json.dumps(found)}", flush=True)


def export_missing(network: "Network", folder: Path, calibrating: Sequence[Path]) -> None:
    """Our folders and the ONNX file, all with the same weights."""
    import paddle

    from benchmark.integer_latency import export_network
    from ppvision.deploy.write.integers import IntegerOptions

    exports = [
        (file_of(folder, "paddle", "float32"), "paddle", None),
        (file_of(folder, "paddle", "int8"), "paddle", IntegerOptions(calibrating)),
        (file_of(folder, "onnxruntime", "float32").parent, "onnx", None),
    ]
    missing = [how for how in exports if not (how[0] / "deploy.yaml").is_file()]
    if not missing:
        return
    paddle.seed(0)
    model = network.build()
    model.eval()
    for target, kind, integers in missing:
        export_network(network, model, target, 1, integers=integers, model_format=kind)
        print(target, flush=True)


def quantize(program: str, source: str, target: str, inputs: str) -> None:
    """Write a rival's integers, in the rivals' environment.

    Args:
        program: of PACKAGES.
        source: an ONNX file.
        target: ONNX, or OpenVINO's XML.
        inputs: of `write_inputs`.
    """
    with np.load(inputs) as arrays:
        batches = list(arrays["calibrating"][:, None])  # of one picture
    if program == "onnxruntime":
        _quantize_with_onnxruntime(source, target, batches)
    else:
        _quantize_with_nncf(source, target, batches)


def _quantize_with_onnxruntime(source: str, target: str, batches: Sequence[np.ndarray]) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        """Of the calibration pictures, as `quantize_static` takes them."""

        def __init__(self, name: str) -> None:
            self._feeds = iter([{name: batch} for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    # What ONNX Runtime advises before; all sizes are known, so symbols (sympy) are not needed.
    ready = f"{target}.ready"
    quant_pre_process(source, ready, skip_symbolic_shape=True)
    name = onnx.load(ready).graph.input[0].name
    quantize_static(ready, target, Reader(name), quant_format=QuantFormat.QDQ, per_channel=True)
    Path(ready).unlink()


def _quantize_with_nncf(source: str, target: str, batches: Sequence[np.ndarray]) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    # Without `model_type=TRANSFORMER`, whose SmoothQuant harms these random weights: the error of
    # pale_nano's outputs was 0.52 with it and 0.11 without (NNCF 3.4.0, 16 pictures).
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    openvino.save_model(quantized, target)


# -- a program, in a process of its own ------------------------------------------------------------


def open_program(program: str, arithmetic: str, path: Path, threads: int) -> Run:
    """`run(x) -> outputs`, `x` of `[1, 3, H, W]`."""
    if program == "paddle":
        from ppvision.deploy import Predictor

        predictor = Predictor(path, precision=arithmetic, threads=threads)
        if (predictor.engine, predictor.precision) != ("openvino", arithmetic):
            raise RuntimeError(f"{path}: runs as {predictor.precision} in {predictor.engine}.")
        return predictor.run
    if program == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options)
        (first,) = session.get_inputs()
        return lambda x: session.run(None, {first.name: x})
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # on AMX it would take bfloat16 for what is not integer
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda x: [np.array(y) for y in request.infer(x).values()]


def work(program: str, arithmetic: str, path: str, threads: str, inputs: str, which: str) -> None:
    """A worker's side.

    Args:
        program, arithmetic, path, threads: see `open_program`.
        inputs: of `write_inputs`.
        which: "first" runs one picture, "all" those that are compared, one after another.
    """

    def make() -> Callable[[], Sequence[np.ndarray]]:
        run = open_program(program, arithmetic, Path(path), int(threads))
        with np.load(inputs) as arrays:
            pictures = arrays["comparing"]
        if which == "first":
            return lambda: run(pictures[:1])
        return lambda: [np.concatenate([run(x)[0] for x in pictures[:, None]])]

    answer(make)


def make_worker(
    folder: Path, program: str, arithmetic: str, threads: int, which: str, rivals_python: Path
) -> Worker:
    path = file_of(folder, program, arithmetic)
    words = (program, arithmetic, path, threads, folder / "inputs.npz", which)
    python = sys.executable if program == "paddle" else rivals_python
    # Threads of OpenMP and of ONNX Runtime spin for a while after a run; one thread does not.
    pause = PAUSE if threads > 1 else 0.0
    name = f"{program} {arithmetic}"
    return Worker(name, __file__, words, threads, python=python, pause=pause)


# -- are the outputs alike? ------------------------------------------------------------------------


def compare(folder: Path, rivals_python: Path) -> dict[str, dict[str, float]]:
    """`same_labels` and `error` of every program and arithmetic, by its worker's name."""
    outputs: dict[str, np.ndarray] = {}
    for program in PACKAGES:
        for arithmetic in ARITHMETICS:
            worker = make_worker(folder, program, arithmetic, 1, "all", rivals_python)
            with end_afterwards([worker]) as (one,):
                path = folder / "outputs.npz"
                one(f"save {path}")
                with np.load(path) as arrays:
                    outputs[one.name] = arrays[arrays.files[0]]
                path.unlink()
    expected = outputs["paddle float32"]
    return {name: difference(found, expected) for name, found in outputs.items()}


def difference(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far outputs `[N, K, ...]` are from others.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise ValueError(
            f"outputs: expected finite ones of {expected.shape}, got {found.shape}, "
            f"{'finite' if np.isfinite(found).all() else 'not finite'}."
        )
    same = (found.argmax(1) == expected.argmax(1)).mean()
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
    return {"same_labels": round(float(same), 4), "error": round(float(error), 5)}


# -- the table -------------------------------------------------------------------------------------


def versions(rivals_python: Path) -> dict[str, str]:
    """Of each program, with NNCF's behind OpenVINO's."""
    ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    found = {}
    for program, package in PACKAGES.items():
        python = sys.executable if program == "paddle" else rivals_python
        asked = [str(python), "-c", ask, package]
        found[program] = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    asked = [str(rivals_python), "-c", ask, "nncf"]
    nncf = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    found = {program: version.strip() for program, version in found.items()}
    return found | {"openvino": f"{found['openvino']}, NNCF {nncf}"}


def make_rows(
    times: Mapping[str, Sequence[float]], agreements: Mapping[str, Mapping[str, float]]
) -> list[dict[str, object]]:
    """A row of each worker: what its times say, and how its outputs agree.

    Args:
        times: milliseconds of each worker's runs, by round.
        agreements: of `compare`.
    """
    taken = {name: np.array(values) for name, values in times.items()}
    rows = []
    for name, values in taken.items():
        program, arithmetic = name.split(" ")
        in_float = taken[f"{program} float32"]
        rows.append(
            {
                "program": program,
                "arithmetic": arithmetic,
                "ms": f"{np.median(values):.2f}",
                "over_our_int8": f"{np.median(values / taken[OURS]):.3f}",
                "over_float": f"{np.median(values / in_float):.3f}",
                "rounds": len(values),
                **agreements[name],
            }
        )
    return rows


def measure(
    name: str, folder: Path, threads: int, rounds: int, rivals_python: Path
) -> list[dict[str, object]]:
    """A row for each program and arithmetic."""
    from benchmark.integer_latency import UNITS
    from ppvision.deploy.run.precision import find_usable_flags
    from ppvision.environment import machine

    agreements = json.loads((folder / "agreement.json").read_text(encoding="utf-8"))
    kinds = [(program, arithmetic) for program in PACKAGES for arithmetic in ARITHMETICS]
    made = [make_worker(folder, *kind, threads, "first", rivals_python) for kind in kinds]
    with end_afterwards(made) as workers:
        times, _ = in_turn(workers, WARM_UP, rounds)
    known = versions(rivals_python)
    with np.load(folder / "inputs.npz") as arrays:
        shape = (1, *arrays["comparing"].shape[1:])
    units = ", ".join(unit for unit in UNITS if unit in find_usable_flags())
    return [
        {
            **row,
            "model": name,
            "input": "x".join(map(str, shape)),
            "version": known[row["program"]],
            "threads": threads,
            "bytes": bytes_of(file_of(folder, row["program"], row["arithmetic"])),
            "machine": f"{machine()}, {units}",
        }
        for row in make_rows(times, agreements)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the files")
    parser.add_argument("--rivals_python", type=Path, required=True, help="of their environment")
    parser.add_argument("--pictures", type=Path, help="folder of photographs, to make the files")
    parser.add_argument("--time", action="store_true", help="measure files that are there")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.time and args.pictures is None:
        parser.error("--pictures: expected a folder of photographs to make the files, or --time.")
    work_dir = args.work_dir.resolve()
    if not args.time:
        from ppvision.data.listing import find_pictures

        pictures = find_pictures(args.pictures)
        for name in args.models:
            prepare(name, work_dir / name, pictures, args.rivals_python)
        return
    from benchmark.runs import replace_rows  # not at the top: it imports Paddle

    for name in args.models:
        if not (work_dir / name / "agreement.json").is_file():
            print(f"{name}: left out, {work_dir / name} is not complete (run without --time)")
            continue
        for threads in args.threads:
            how = (threads, args.rounds, args.rivals_python)
            rows = measure(name, work_dir / name, *how)
            replace_rows(args.results, rows, KEY)
            for row in rows:
                print(*(f"{key} {row[key]}" for key in FIELDS[:-1]), sep="  ", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    elif sys.argv[1:2] == ["--quantize"]:
        quantize(*sys.argv[2:])
    else:
        main()
