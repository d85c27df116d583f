"""Write small artefacts of this version, for `tests/test_compat.py` of all later versions.

    python -m tests.compat.write_artefacts

writes `tests/compat/VERSION/`, with VERSION from `ppvision.__version__`. Run it from the root of a
checkout of the revision that the artefacts are to be of, on a CPU:

    version   revision that wrote them
    0.1.0     4a335d5

A folder that is there is never written again: it would then hold what the new code writes, and the
test would no longer say whether users' older files are read. When a format changes: raise the
version, run this script, keep the older folders, and add a row above.

Expected outputs come from the models in eager mode, not from the files that were written. They are
in `expected.npz`, `expected.json` (statistics of weights).
"""

import json
import shutil
import sys
import tempfile
from contextlib import chdir, suppress
from pathlib import Path

import numpy as np
import paddle
import yaml
from paddle import nn
from PIL import Image

import ppvision
from ppvision.data.digit_scenes import write_digit_scenes
from ppvision.deploy import export_model
from ppvision.engine.callbacks import Callback
from ppvision.plugins import paddledet  # noqa: F401 (registers PaddleDetection's components)
from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config
from ppvision.quant import OnceQAT, save_layered
from ppvision.quant.layered_layers import LayeredNorm
from ppvision.quant.layered_state import layered_state
from ppvision.quant.packed_layers import pack_model
from ppvision.run_folder import RunFolder
from ppvision.tasks import open_job
from ppvision.tasks.training import run_training, train_options
from ppvision.zoo import create_model
from ppvision.zoo.weights import read_weights, save_weights
from tests.compat.frozen import CLASSES, NORMALIZE, SmallNet, make_batch, make_picture
from tests.helpers.small_detectors import small_detector, write_detector

# isort: split
from ppdet.core import workspace
from ppdet.modeling.shape_spec import ShapeSpec

HERE = Path(__file__).parent
BITS = (8, 4, 2)
SIDE = 64  # pixels of scenes, and of the exports of one size
STEPS, STOP = 6, 3  # of the run: in all, and where it is interrupted


def main() -> None:
    """Write all artefacts of this version, or none."""
    final = HERE / ppvision.__version__
    if final.exists():
        sys.exit(f"{final} is there: artefacts are never written again. Raise the version.")
    paddle.set_device("cpu")
    arrays: dict[str, np.ndarray] = {}
    statistics: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=HERE) as work:
        folder = Path(work) / "artefacts"
        folder.mkdir()
        write_run(folder, arrays, statistics)
        write_segmentation(folder, arrays)
        once = trained_at_widths(SmallNet(), BITS)
        write_classification(folder, once, arrays)
        write_onnx_and_weights(folder, arrays)
        write_resnet(folder, arrays)
        write_detector_export(folder, arrays)
        np.savez_compressed(folder / "expected.npz", **arrays)
        write_expected(folder / "expected.json", statistics)
        folder.replace(final)


@paddle.no_grad()
def run_eager(model: nn.Layer, x: np.ndarray) -> np.ndarray:
    """The (first) output of a model in evaluation mode."""
    model.eval()
    out = model(paddle.to_tensor(x))
    return (out[0] if isinstance(out, list) else out).numpy()


def write_expected(path: Path, statistics: dict[str, dict[str, list[float]]]) -> None:
    """JSON, one line for each array."""
    parts = []
    for part, arrays in statistics.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in arrays.items()]
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


# -- a run folder ----------------------------------------------------------------------------------


class Interrupt(Callback):
    """Stops a run as Ctrl+C does, one step after its first checkpoint."""

    def on_log(self, step: int, numbers: dict[str, float]) -> None:
        if step == STOP + 1:
            raise KeyboardInterrupt


def write_run(folder: Path, arrays: dict[str, np.ndarray], statistics: dict) -> None:
    """`scenes/`: the data; `run/`: a run that stopped after its checkpoint of step 3.

    The config has relative paths, and the process works in `folder`: a checkpoint holds the
    sha256 of its config, so paths cannot be changed later.
    """
    with tempfile.TemporaryDirectory() as work, chdir(folder):
        scenes = Path(work) / "scenes"
        write_digit_scenes(scenes, count=8, val_count=2, size=SIDE, seed=5)
        Path("scenes").mkdir()
        for part in ("images", "labels", "classes.txt", "train.txt", "val.txt"):
            copy = shutil.copytree if (scenes / part).is_dir() else shutil.copy
            copy(scenes / part, Path("scenes") / part)
        config = Path(work) / "digits.yml"
        config.write_text(yaml.safe_dump(segmentation_config(), sort_keys=False))

        whole = Path(work) / "whole"
        train(config, whole)
        last = whole / "checkpoints" / f"step_{STEPS}"
        for part in ("model", "ema"):
            statistics[f"run.{part}"] = describe_weights(read_weights(last / f"{part}.safetensors"))
        with suppress(KeyboardInterrupt):
            train(config, Path("run"), Interrupt())

        job = open_job(config)
        best = job.load(Path("run/best_model/model.pdparams"))
        arrays["run.labels"] = job.predict_image(best, "scenes/" + first_picture())
        x = make_batch(1, 3, SIDE, SIDE)
        arrays["run.logits"] = run_eager(best, x)[..., ::5, ::5]  # every fifth pixel: a small file


def first_picture() -> str:
    """Of the validation scenes, relative to their folder."""
    return Path("scenes/val.txt").read_text().split()[0]


def segmentation_config() -> dict:
    """SegFormer over `compat_pale`, paths relative to the working directory."""
    normalize = {"type": "Normalize", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    dataset = {"type": "Dataset", "dataset_root": "scenes", "num_classes": 11}
    return {
        "task": "segmentation",
        "imports": ["tests.compat.frozen_pale"],
        "batch_size": 4,
        "iters": STEPS,
        "train_dataset": {
            **dataset,
            "mode": "train",
            "train_path": "scenes/train.txt",
            "transforms": [{"type": "RandomDistort"}, normalize],
        },
        "val_dataset": {
            **dataset,
            "mode": "val",
            "val_path": "scenes/val.txt",
            "transforms": [normalize],
        },
        "model": {
            "type": "SegFormer",
            "num_classes": 11,
            "embedding_dim": 8,
            "backbone": {"type": "compat_pale"},
        },
        # Some gradients are zero but for rounding, such as a key's bias in attention. Adam would
        # make them as large as the others, and another machine's rounding would then give other
        # weights. This epsilon keeps them small.
        "optimizer": {"type": "AdamW", "weight_decay": 0.01, "epsilon": 0.001},
        "lr_scheduler": {
            "type": "PolynomialDecay",
            "learning_rate": 0.01,
            "power": 1.0,
            "warmup_iters": 2,
            "warmup_start_lr": 0.001,
        },
        "loss": {"types": [{"type": "CrossEntropyLoss"}], "coef": [1]},
    }


def train(config: Path, folder: Path, *callbacks: Callback) -> None:
    job = open_job(config)
    options = train_options(job, log_iters=1, save_interval=STOP, use_ema=True)
    run_training(job, RunFolder(folder), options, do_eval=True, use_vdl=False, callbacks=callbacks)


def describe_weights(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Of each array mean, standard deviation and the first three values: a small part of it that
    still shows when any of it differs."""
    found = {}
    for name, array in sorted(arrays.items()):
        flat = array.astype(np.float64).reshape(-1)
        found[name] = [float(f"{v:.8g}") for v in (flat.mean(), flat.std(), *flat[:3])]
    return found


# -- exports ---------------------------------------------------------------------------------------


def write_segmentation(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """`segmentation/`: a Pale network at one size, with a graph for OpenVINO."""
    with chdir(folder), tempfile.TemporaryDirectory() as work:
        config = Path(work) / "digits.yml"
        config.write_text(yaml.safe_dump(segmentation_config(), sort_keys=False))
        job = open_job(config)
        model = job.load("run/best_model/model.pdparams")
        job.export(
            model,
            "segmentation",
            input_shape=[1, 3, SIDE, SIDE],
            output_op="none",
            model_format="paddle",
        )
        picture = Path(work) / "picture.png"
        Image.fromarray(make_picture(SIDE, SIDE)).save(picture)
        arrays["segmentation.labels"] = job.predict_image(model, picture).astype(np.uint8)
        x = make_batch(1, 3, SIDE, SIDE)
        arrays["segmentation.logits"] = run_eager(model, x)[..., ::5, ::5]
    assert (folder / "segmentation" / "model.pdmodel").exists()  # what OpenVINO reads


def trained_at_widths(net: nn.Layer, bits: tuple[int, ...]) -> OnceQAT:
    """A network with layered quanters; BatchNorm's statistics differ by width."""
    paddle.seed(1)
    once = OnceQAT(LayeredQAT(slim_quant_config(net, bits=bits)).quantize(net), bits=bits)
    once.train()
    once(paddle.to_tensor(make_batch(4, 3, 32, 32)))  # quanters take their steps from it
    rng = np.random.default_rng(1)
    for layer in once.sublayers():
        if isinstance(layer, LayeredNorm):
            for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
                if name.endswith("_mean"):  # small: large ones would leave ReLU nothing
                    tensor.set_value(rng.uniform(-0.2, 0.2, tensor.shape).astype(np.float32))
                elif name.endswith("_variance"):
                    tensor.set_value(rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32))
    once.eval()
    return once


def write_classification(folder: Path, once: OnceQAT, arrays: dict[str, np.ndarray]) -> None:
    """`layered/`, and of the same network `classification/` in float at any size, `packed/` with
    codes of 4 bits."""
    config = {"task": "classification", "transforms": [NORMALIZE], "classes": CLASSES}
    save_layered(once, folder / "layered", bits=BITS, config=config | {"model": "SmallNet"})
    state = layered_state(once.model, BITS)
    how = dict(task="classification", classes=CLASSES, transforms=[NORMALIZE])
    export_model(
        pack_model(SmallNet(), state, 8, codes=False),
        folder / "classification",
        input_shape=[None, 3, None, None],
        output_op="softmax",
        **how,
    )
    export_model(
        pack_model(SmallNet(), state, 4),
        folder / "packed",
        input_shape=[None, 3, 40, 40],
        output_op="none",
        bits=4,
        **how,
    )
    for k in BITS:
        once.set_bits(k)
        arrays[f"layered.logits_w{k}"] = run_eager(once, make_batch(2, 3, 40, 40))
    once.set_bits(8)
    picture = make_picture(33, 47) / 255.0
    x = ((picture - NORMALIZE["mean"]) / NORMALIZE["std"]).transpose(2, 0, 1)  # [3, H, W]
    arrays["classification.logits"] = run_eager(once, x[None].astype(np.float32))


def write_onnx_and_weights(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """`onnx/`, and the weights of the same network in both formats."""
    paddle.seed(2)
    net = SmallNet()
    export_model(
        net,
        folder / "onnx",
        input_shape=[None, 3, None, None],
        output_op="none",
        format="onnx",
        task="classification",
        classes=CLASSES,
        transforms=[NORMALIZE],
    )
    paddle.save(net.state_dict(), str(folder / "weights.pdparams"))
    save_weights(
        {k: v.numpy() for k, v in net.state_dict().items()}, folder / "weights.safetensors"
    )
    arrays["weights.logits"] = run_eager(net, make_batch(2, 3, 40, 40))


def write_resnet(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """`layered_resnet20/`: a model of the zoo, whose layers must keep their names."""
    paddle.seed(3)
    model = {"type": "resnet20", "num_classes": 5}
    once = trained_at_widths(create_model("resnet20", num_classes=5), (3, 2))
    config = {"task": "classification", "model": model, "transforms": [], "classes": CLASSES}
    save_layered(once, folder / "layered_resnet20", bits=(3, 2), config=config)
    for k in (3, 2):
        once.set_bits(k)
        arrays[f"layered_resnet20.logits_w{k}"] = run_eager(once, make_batch(2, 3, 32, 32))


@workspace.register
@workspace.serializable
class CompatBackbone(nn.Layer):
    """Three strided convolutions: strides 8, 16 and 32. `segmentation/` has the Pale blocks, whose
    graph would be the largest file of all here."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.LayerList(
            [nn.Conv2D(3, 8, 9, 8, 4), nn.Conv2D(8, 8, 3, 2, 1), nn.Conv2D(8, 8, 3, 2, 1)]
        )

    def forward(self, inputs: dict) -> list[paddle.Tensor]:
        features = [inputs["image"]]
        for stage in self.stages:
            features.append(nn.functional.relu(stage(features[-1])))
        return features[1:]

    @property
    def out_shape(self) -> list[ShapeSpec]:
        return [ShapeSpec(channels=8, stride=stride) for stride in (8, 16, 32)]


def write_detector_export(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """`detector/`: RetinaNet at one size."""
    with tempfile.TemporaryDirectory() as work:
        scenes = Path(work) / "scenes"
        write_digit_scenes(scenes, count=1, val_count=1, size=SIDE, seed=5)
        content = small_detector(scenes, "RetinaNet")
        del content["pale_nano"]
        content["RetinaNet"]["backbone"] = "CompatBackbone"
        content["FPN"] = {"out_channel": 8}
        feat = {"feat_in": 8, "feat_out": 8, "num_convs": 1}
        content["RetinaHead"] = {"conv_feat": feat, "nms": {"keep_top_k": 8}}
        paddle.seed(4)
        job = open_job(write_detector(Path(work) / "detector.yml", content))
        model = job.float_model
        # Untrained scores are all near 0.01. Larger weights spread them: the best 8 are then from
        # 0.45 to 0.66, far from the threshold and apart by more than rounding.
        head = model.head.retina_cls
        head.weight.set_value(head.weight * 500)
        job.export(
            model,
            folder / "detector",
            input_shape=[1, 3, SIDE, SIDE],
            output_op=None,
            model_format="paddle",
        )
        picture = Path(work) / "picture.png"
        Image.fromarray(make_picture(50, 70)).save(picture)
        found = job.predict_image(model, picture)
    assert len(found) >= 5, "the detector finds too little to compare"
    arrays["detector.boxes"] = found.boxes
    arrays["detector.scores"] = found.scores
    arrays["detector.class_ids"] = found.class_ids


if __name__ == "__main__":
    main()
