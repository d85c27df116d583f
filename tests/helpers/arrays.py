"""Weights as arrays, and a file that attacks whoever reads it."""

import os

import numpy as np
from paddle import nn


def arrays_of(model: nn.Layer) -> dict:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same(a: nn.Layer, b: nn.Layer) -> None:
    left, right = arrays_of(a), arrays_of(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


class Hostile:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)
