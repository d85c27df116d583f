"""`Predictor(isolate=True)`: an engine in a process of its own."""

import numpy as np
import pytest
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.errors import EngineError


@pytest.fixture(scope="module")
def isolated_net(tmp_path_factory):
    net = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2D(4, 2, 1))
    folder = tmp_path_factory.mktemp("isolated") / "net"
    return export_model(net, folder, input_shape=[1, 3, 40, 40], output_op="none")


def resident() -> int:
    """Of this process, in kilobytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_an_isolated_engine_gives_the_same_and_its_memory_back(isolated_net):
    x = np.random.default_rng(0).standard_normal((1, 3, 40, 40)).astype(np.float32)
    with Predictor(isolated_net, threads=1) as predictor:
        expected = predictor.run(x)[0]
    for _ in range(2):  # what only the first costs
        Predictor(isolated_net, threads=1, isolate=True).close()
    before = resident()
    for _ in range(3):
        with Predictor(isolated_net, threads=1, isolate=True) as predictor:
            np.testing.assert_array_equal(predictor.run(x)[0], expected)
    assert resident() < 1.05 * before
    with pytest.raises(EngineError, match="closed"):
        predictor.run(x)


@pytest.mark.all
def test_two_hundred_isolated_engines_leave_the_memory_of_the_parent(isolated_net):
    Predictor(isolated_net, threads=1, isolate=True).close()
    before = resident()
    for _ in range(200):
        Predictor(isolated_net, threads=1, isolate=True).close()
    assert resident() < 1.05 * before


def test_an_isolated_engine_that_is_killed_is_an_error(isolated_net):
    x = np.zeros((1, 3, 40, 40), np.float32)
    with Predictor(isolated_net, threads=1, isolate=True) as predictor:
        predictor._opened.runtime._process.kill()
        with pytest.raises(EngineError, match="ended"):
            predictor.run(x)


def test_an_isolated_engine_says_what_is_wrong(isolated_net):
    with Predictor(isolated_net, threads=1, isolate=True) as predictor:
        with pytest.raises(EngineError):
            predictor._opened.runtime.run({"nothing": np.zeros(3, np.float32)})
        assert predictor.run(np.zeros((1, 3, 40, 40), np.float32))
