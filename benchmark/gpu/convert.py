"""Weights that a GPU training wrote, as weights of ppvision.

    python -m benchmark.gpu.convert out/pale_nano_tiny_imagenet_100.pt \\
        configs/classification/pale_nano_tiny_imagenet_100.yml --output weights.safetensors
    ppvision eval -c configs/classification/pale_nano_tiny_imagenet_100.yml \\
        --model_path weights.safetensors

The config's model says what there must be: every array of it is found in the file and fits. Needs
PyTorch (benchmark/requirements-torch.txt).
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import numpy as np
import torch
from paddle import nn
from torch import Tensor

from benchmark.torch_pale import torch_name
from ppvision.tasks import open_job
from ppvision.zoo.weights import assign_weights, save_weights

_BATCH_NORM = {"_mean": "running_mean", "_variance": "running_var"}
NameOf = Callable[[str], str]


def name_in_torch(name: str, backbone: str) -> str:
    """The PyTorch twin's name of an array of ppvision's.

    Args:
        name: of the array.
        backbone: what names of the Pale Transformer begin with in both, such as `backbone.`; empty
            where the whole model is one. Other names differ in BatchNorm's statistics alone.
    """
    if name.startswith(backbone):
        return backbone + torch_name(name.removeprefix(backbone))
    path, _, last = name.rpartition(".")
    return f"{path}.{_BATCH_NORM.get(last, last)}"


def to_ppvision(
    state: Mapping[str, Tensor], model: nn.Layer, name_of: NameOf | None = None
) -> dict[str, np.ndarray]:
    """Arrays for a model out of the state dict of its PyTorch twin.

    Args:
        state: of the twin.
        model: of ppvision, or of PaddleSeg or PaddleDetection with one of its backbones.
        name_of: the twin's name of an array; default `name_in_torch`, with the place of the Pale
            Transformer found by its first convolution.

    Returns:
        An array for every name of the model. Linear is turned, as Paddle has it; a Linear becomes a
        1x1 convolution where the model has one.

    Raises:
        ValueError: a name of the model that the state dict lacks, one of the state dict that is not
            used, or shapes that differ.
    """
    own = model.state_dict()
    if name_of is None:
        first = next((n for n in own if re.search(r"(^|\.)merges\.0\.0\.weight$", n)), None)
        if first is None:
            raise ValueError("convert: expected a model with a Pale Transformer in it, found none.")
        backbone = first.removesuffix("merges.0.0.weight")
        name_of = lambda name: name_in_torch(name, backbone)  # noqa: E731
    linear = {
        f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)
    }
    names = {name: name_of(name) for name in own}
    missing = sorted(theirs for theirs in names.values() if theirs not in state)
    unused = sorted({n for n in state if not n.endswith("num_batches_tracked")} - {*names.values()})
    if missing or unused:
        raise ValueError(
            f"convert: expected the arrays of {type(model).__name__}; missing: {missing[:10]}; not "
            f"used: {unused[:10]}."
        )
    arrays = {}
    for name, theirs in names.items():
        array = state[theirs].detach().float().cpu().numpy()
        shape = tuple(own[name].shape)
        if name in linear:
            array = array.T
        elif array.ndim == 2 and len(shape) == 4:
            array = array[:, :, None, None]
        if array.shape != shape:
            raise ValueError(f"convert: {name}: expected {shape}, got {array.shape}.")
        arrays[name] = np.ascontiguousarray(array)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="a .pt file")
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--opts", nargs="*", default=[], help="for the config")
    args = parser.parse_args()
    model = open_job(args.config, args.opts).float_model
    arrays = to_ppvision(torch.load(args.weights, weights_only=True), model)
    assign_weights(model, arrays, str(args.weights))
    save_weights(arrays, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
