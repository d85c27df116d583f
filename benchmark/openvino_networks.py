"""Which networks Paddle Inference's OpenVINO runs, and with which error: every one is tried.

    python benchmark/openvino_networks.py                    # all that the table has not yet
    python benchmark/openvino_networks.py seg:FCN zoo:*      # some; a star stands for any letters

Each network is built with random weights and the BatchNorm statistics of a noise batch, traced in
the earlier program format, and run on one picture in OpenVINO and in eager mode. The error is the
rule's of parity, max|a-b| / max(1, max|a|); of a detector, of boxes and scores before NMS. Each has
a process of its own and a time limit, since OpenVINO's compiler crashes on one of them. What an
export does besides (both formats hold the same weights, oneDNN) is not done here.

Writes benchmark/results/openvino_networks.csv, row by row; what it has is not tried again.
Columns:

    traced  whether the network has a program in the earlier format
    runs    whether OpenVINO runs it with the numbers of eager mode (error of at most 1e-3)
    reason  why not
"""

import argparse
import fnmatch
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmark.paddleseg_compatibility import MODELS, build_model
from benchmark.runs import add_row, read_rows
from ppvision.environment import machine

TABLE = ROOT / "benchmark" / "results" / "openvino_networks.csv"
FIELDS = ("network", "traced", "runs", "error", "reason", "machine")
TIME_LIMIT = 600.0  # seconds for one network, on a machine with other work
# Pixels of the picture; LeNet takes one grey channel.
SIDES = {"seg": 64, "sdn": 64, "vision": 128, "zoo": 64, "det": 64, "trunk": 64}
SIDES |= {"vision:LeNet": 28, "vision:alexnet": 224, "vision:googlenet": 224}

VISION = (
    "LeNet",
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11",
)
ZOO = ("efficientnet_lite0", "efficientnet_lite2", "pale_nano", "pale_tiny", "resnet18", "resnet20")
# Of SegFormer over pale_nano; each has its own arithmetic.
SDN = ("charbonnier", "cosine", "gaussian", "increasing", "none", "perona_malik")
DETECTORS = ("FCOS", "RetinaNet", "YOLOv3", "FasterRCNN", "MaskRCNN", "CascadeRCNN")
TRUNKS = ("FasterRCNN",)  # backbone and neck of a detector that does not run whole
# The same heads over convolutions, and backbones of PaddleSeg's.
OTHER_BACKBONES = {
    **{
        f"{name} r18": (name, {"type": "ResNet18_vd"})
        for name in ("DeepLabV3P", "FCN", "PSPNet", "SegFormer", "MobileSeg", "PPLiteSeg", "OCRNet")
    },
    "UPerNet r18": ("UPerNet", {"type": "ResNet18_vd"}),
    "SegFormer mit_b0": ("SegFormer", {"type": "MixVisionTransformer_B0"}),
    "PPLiteSeg stdc1": ("PPLiteSeg", {"type": "STDC1"}),
    "OCRNet hrnet18": ("OCRNet", {"type": "HRNet_W18"}),
    "SegNeXt mscan_t": ("SegNeXt", {"type": "MSCAN_T"}),
}


def networks() -> list[str]:
    """Names of all networks: `kind:name`, of PaddleSeg with ` own` where the class is tried over
    the backbone that it was written for."""
    own = [f"seg:{name} own" if case.own else f"seg:{name}" for name, case in MODELS.items()]
    return [
        *(f"zoo:{name}" for name in ZOO),
        *(f"vision:{name}" for name in VISION),
        *own,
        *(f"seg:{name}" for name in OTHER_BACKBONES),
        *(f"sdn:{name}" for name in SDN),
        *(f"det:{name}" for name in DETECTORS),
        *(f"trunk:{name}" for name in TRUNKS),
    ]


def build(name: str):
    """The network, in training mode; a detector with its own layer around it."""
    kind, _, title = name.partition(":")
    if kind == "zoo":
        import ppvision

        return ppvision.create_model(title, num_classes=5)
    if kind == "vision":
        import paddle

        return getattr(paddle.vision.models, title)(num_classes=5)
    if kind == "det":
        from ppvision.tasks.detection.layer import DetectorLayer

        return DetectorLayer(_detector(title))
    if kind == "trunk":
        return _trunk(_detector(title))
    import ppvision.plugins.paddleseg  # backbones, and repairs

    if kind == "sdn":
        return _with_diffusion(title)
    if title in OTHER_BACKBONES:
        return build_model(*OTHER_BACKBONES[title])
    return build_model(title)


def _with_diffusion(similarity: str):
    import paddle
    from paddleseg.cvlibs import manager

    pale = manager.BACKBONES["pale_nano"]()
    backbone = {"type": "SemanticDiffusionBackbone", "backbone": pale, "similarity": similarity}
    model = build_model("SegFormer", backbone)
    for diffusion in model.backbone.diffusion.diffusions:
        weight = diffusion.fuse.weight  # SDN starts as nothing
        weight.set_value(0.05 * paddle.randn(weight.shape))
    return model


def _detector(architecture: str):
    from ppvision.data.convert.digit_scenes import write_digit_scenes
    from ppvision.tasks import open_job
    from tests.helpers.small_detectors import small_detector, write_detector

    with tempfile.TemporaryDirectory() as folder:
        write_digit_scenes(Path(folder), count=4, val_count=2, size=SIDES["det"], seed=0)
        config = write_detector(
            Path(folder) / "job.yml", small_detector(Path(folder), architecture)
        )
        return open_job(config).float_model


def _trunk(detector):
    """The layers of a PaddleDetection model before its heads."""
    from paddle import nn

    class Trunk(nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone, self.neck = detector.backbone, detector.neck

        def forward(self, x):
            return self.neck(self.backbone({"image": x}))

    return Trunk()


def try_network(name: str, say: Callable[[dict[str, object]], None]) -> None:
    """Build, trace and run one network.

    Args:
        name: of `networks`.
        say: is told more and more of the row, so that a crash leaves what was found before.
    """
    import paddle

    from ppvision.deploy.verify.detection_parity import check_raw
    from ppvision.deploy.verify.parity import FLOAT_TOLERANCE, relative_error
    from ppvision.deploy.verify.running import run_graphs
    from ppvision.deploy.write.openvino import check_operators
    from ppvision.errors import EngineError

    paddle.seed(0)
    kind = name.partition(":")[0]
    side = SIDES.get(name, SIDES[kind])
    model = build(name)
    shape = [1, 1 if name == "vision:LeNet" else 3, side, side]
    random = np.random.default_rng(0)
    noise = lambda batch: random.normal(size=[batch, *shape[1:]]).astype("float32")  # noqa: E731
    inputs: dict[str, np.ndarray] = {"x": noise(1)}
    if kind == "det":
        whole = {
            "im_shape": np.full((1, 2), side, "float32"),
            "scale_factor": np.ones((1, 2), "float32"),
        }
        inputs = {"image": noise(1), **whole}
    else:
        _settle(model, paddle.to_tensor(noise(4)))
    model.eval()
    with paddle.no_grad():
        outputs = model(*(paddle.to_tensor(x) for x in inputs.values()))
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    eager = [x.numpy() for x in (outputs[-2:] if kind == "det" else outputs[:1])]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write(model, shape, Path(folder), detector=kind == "det")
        except EngineError as error:
            say({"traced": "no", "runs": "no", "reason": _reason(error)})
            return
        say({"traced": "yes"})
        batch = inputs if kind == "det" else inputs["x"]
        try:
            check_operators((Path(folder) / "model.pdmodel").read_bytes())
            ((found,),) = run_graphs([Path(folder)], "paddle", [batch], "openvino")
        except RuntimeError as error:
            say({"traced": "yes", "runs": "no", "reason": _reason(error)})
            return
    row = {"traced": "yes", "runs": "yes", "reason": ""}
    try:
        if kind == "det":
            error = check_raw(eager, found, FLOAT_TOLERANCE, "OpenVINO")
        else:
            error = relative_error(eager[0], found[0])
    except RuntimeError as failure:
        say({**row, "runs": "no", "reason": _reason(failure)})
        return
    if error > FLOAT_TOLERANCE:
        row |= {"runs": "no", "reason": "other numbers than in eager mode"}
    say({**row, "error": f"{error:.1e}"})


def _write(model, shape: Sequence[int], folder: Path, *, detector: bool) -> None:
    """The graph for OpenVINO with weights of its own, up to the first output, or to a detector's
    boxes and scores."""
    from ppvision.deploy.write.graph import save_graph, trace, trace_detector
    from ppvision.deploy.write.openvino import slim_serialized_program
    from ppvision.forms.differences import difference_form
    from ppvision.forms.earlier_format import earlier_format
    from ppvision.forms.tokens import token_form

    way = model.in_graphs() if detector else nullcontext()
    with way, token_form(model), difference_form(model), earlier_format():
        if detector:
            graph = trace_detector(model, shape)
            outputs = graph.forward.concrete_program.outputs[-2:]
        else:
            graph = trace(model, shape, "none", every_output=False)
            outputs = None
        save_graph(graph, str(folder / "model"), outputs)
    program = folder / "model.pdmodel"
    program.write_bytes(slim_serialized_program(program.read_bytes()))


def _settle(model, x) -> None:
    """Give BatchNorm the statistics of a batch, where the network runs in training mode."""
    import paddle

    norms = [x for x in model.sublayers() if isinstance(x, paddle.nn.BatchNorm2D)]
    momenta = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 0.0
    model.train()
    # Some want more than one pixel for a norm, or a label: statistics stay 0 and 1.
    with suppress(Exception), paddle.no_grad():
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm._momentum = momentum


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"... {said[-300:].partition(' ')[2]}"


def _work(name: str, connection) -> None:
    """A process that tries one network and sends its row."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    try:
        try_network(name, connection.send)
    except Exception as error:  # whatever a network raises is the finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        said = f"{type(error).__name__}: {_reason(error)} ({place})"
        connection.send({"traced": "no", "runs": "no", "reason": f"in eager mode, {said}"})
    connection.close()
    os._exit(0)


def attempt(name: str, limit: float = TIME_LIMIT) -> dict[str, object]:
    """The row of a network, tried in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ppvision.deploy.write.openvino"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, object] = {**dict.fromkeys(FIELDS, ""), "network": name, "machine": machine()}
    try:
        while mine.poll(limit):
            row |= mine.recv()
    except EOFError:
        process.join()
        if not row["runs"]:
            row |= {"runs": "no", "reason": f"its process ended with exit code {process.exitcode}"}
    else:
        process.kill()
        process.join()
        row |= {"runs": "no", "reason": f"took more than {limit:.0f} s"}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=["*"])
    parser.add_argument(
        "--output", type=Path, default=TABLE, help="the table (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    known = networks()
    order = {name: place for place, name in enumerate(known)}
    chosen = [n for n in known if any(fnmatch.fnmatch(n, p) for p in options.networks)]
    if not chosen:
        parser.error(f"expected names of networks, got {' '.join(options.networks)}")
    done = {row["network"] for row in read_rows(options.output)}
    for name in chosen:
        if name not in done:
            row = attempt(name)
            print(", ".join(str(value) for value in row.values() if value), flush=True)
            by_place = lambda row: order.get(row["network"], len(order))  # noqa: E731
            add_row(options.output, row, FIELDS, by_place, lambda rows: [])


if __name__ == "__main__":
    main()
