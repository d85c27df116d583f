"""`benchmark/torch_pale.py`: the same network as ours, at sizes that need padding as well."""

import numpy as np
import paddle
import pytest

pytest.importorskip("torch", reason="pip install -r benchmark/requirements-torch.txt")

import torch

from benchmark.torch_pale import Pale, load
from ppvision.models.pale_transformer import PaleConfig, PaleTransformer


@pytest.mark.parametrize("size", [(56, 84), (61, 33)])
@pytest.mark.parametrize("num_classes", [None, 5])
def test_same_outputs(size, num_classes):
    config = PaleConfig(8, (1, 1, 1, 1), (2, 2, 4, 4), 0.0, pale_size=3)
    paddle.seed(0)
    features = num_classes is None
    ours = PaleTransformer(config, num_classes=num_classes or 1, features_only=features)
    for norm in (n for n in ours.sublayers() if isinstance(n, paddle.nn.BatchNorm2D)):
        norm._mean.set_value(paddle.rand(norm._mean.shape))
        norm._variance.set_value(paddle.rand(norm._variance.shape) + 0.5)
    ours.eval()
    theirs = Pale(8, config.depths, config.num_heads, num_classes, size=3).eval()
    load(theirs, {name: value.numpy() for name, value in ours.state_dict().items()})
    x = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    with torch.inference_mode(), paddle.no_grad():
        found, expected = theirs(torch.from_numpy(x)), ours(paddle.to_tensor(x))
    pairs = zip(found, expected, strict=True) if features else [(found, expected)]
    for a, b in pairs:
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-5)
