"""A tiny model with layered quanters, and how two states are compared."""

import hashlib
import json
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config
from ppvision.quant import OnceQAT
from ppvision.quant.store.state import LayeredState
from ppvision.quant.train.layers import LayeredNorm

BITS = (8, 6, 4, 3, 2)
CONFIG = {"type": "Tiny", "widths": [6, 9], "norm": {"eps": 1e-5}, "bias": None, "deep": False}


def tiny_net() -> nn.Layer:
    """float32 `[B, 2, H, W]` to `[B, 3]`; counts of weights that bytes do not divide."""
    return nn.Sequential(
        nn.Conv2D(2, 5, 3, padding=1),
        nn.BatchNorm2D(5),
        nn.ReLU(),
        nn.Conv2D(5, 7, 3),
        nn.BatchNorm2D(7),
        nn.AdaptiveAvgPool2D(1),
        nn.Flatten(),
        nn.Linear(7, 3),
    )


def tiny_once_qat(seed: int = 0, steps: str = "shared", activations: bool = True) -> OnceQAT:
    """Its first layer stays at 8 bits, its last at 4 or more; statistics differ by width."""
    paddle.seed(seed)
    net = tiny_net()
    layers = {"0": {"bits": 8}, "7": {"min_bits": 4}}
    config = slim_quant_config(net, steps=steps, activations=activations, layers=layers)
    model = OnceQAT(LayeredQAT(config).quantize(net))
    rng = np.random.default_rng(seed)
    model.train()
    model(paddle.to_tensor(rng.normal(size=(4, 2, 8, 8)).astype(np.float32)))
    for layer in model.sublayers():
        if isinstance(layer, LayeredNorm):
            tensors = [layer._parameters["_mean"], layer._parameters["_variance"]]
            for tensor in [*tensors, *layer._buffers.values()]:
                tensor.set_value(rng.uniform(0.5, 2, tensor.shape).astype(np.float32))
    model.eval()
    return model


def assert_same(found: LayeredState, whole: LayeredState, bits: int) -> None:
    """`found` is `whole` up to a width, bit for bit."""
    assert (found.bits, found.held_bits) == (whole.bits, bits)
    assert found.weights.keys() == whole.weights.keys()
    for path, weight in found.weights.items():
        expected = whole.weights[path].at(bits)
        for name in ("held_bits", "top_bits", "low_bits", "axis", "widths"):
            assert getattr(weight, name) == getattr(expected, name), (path, name)
        same_array(weight.codes, expected.codes)
        same_array(weight.step, expected.step)
        assert (weight.scales is None) == (expected.scales is None)
        if weight.scales is not None:
            same_array(weight.scales, expected.scales)
    assert found.activations.keys() == whole.activations.keys()
    for path, activation in found.activations.items():
        expected = whole.activations[path]
        for name in ("widths", "low_bits", "top_bits", "signed"):
            assert getattr(activation, name) == getattr(expected, name), (path, name)
        same_array(activation.steps, expected.steps)
    same_arrays(found.floats, whole.floats)
    assert {k for k, v in found.statistics.items() if v} == {
        k for k, v in whole.statistics.items() if v
    }
    for width, arrays in found.statistics.items():
        same_arrays(arrays, whole.statistics.get(width, {}))


def same_arrays(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        same_array(array, expected[name])


def same_array(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder: Path, content: dict) -> None:
    """With the sha256 that fits."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def update_entry(folder: Path, name: str) -> None:
    """Let the manifest have a file's bytes and sha256 as they are."""
    content, data = read_manifest(folder), (folder / name).read_bytes()
    content["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, content)
