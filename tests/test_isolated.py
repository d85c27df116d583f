"""`Predictor(isolate=True)`: an engine in a process of its own."""

import numpy as np
import pytest
from paddle import nn

from ppvision.deploy import Predictor, export_model
from ppvision.errors import EngineError
from tests.helpers.alone import read_resident, run_alone
from tests.helpers.measured import measure_engine


@pytest.fixture(scope="module")
def isolated_net(tmp_path_factory):
    net = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2D(4, 2, 1))
    folder = tmp_path_factory.mktemp("isolated") / "net"
    return export_model(net, folder, input_shape=[1, 3, 40, 40], output_op="none")


def test_an_isolated_engine_gives_the_same_and_ends(isolated_net):
    x = np.random.default_rng(0).standard_normal((1, 3, 40, 40)).astype(np.float32)
    with Predictor(isolated_net, threads=1) as predictor:
        expected = predictor.run(x)[0]
    with Predictor(isolated_net, threads=1, isolate=True) as predictor:
        np.testing.assert_array_equal(predictor.run(x)[0], expected)
    with pytest.raises(EngineError, match="closed"):
        predictor.run(x)


def test_an_isolated_engine_takes_no_memory_of_the_process(isolated_net):
    """1.5 MiB were measured, and 29 MiB for an engine of the process itself."""
    isolated, own = (
        run_alone(measure_engine, str(isolated_net), isolate) for isolate in (True, False)
    )
    assert isolated < 8 << 20 < 16 << 20 < own


@pytest.mark.all
def test_two_hundred_isolated_engines_leave_the_memory_of_the_parent(isolated_net):
    Predictor(isolated_net, threads=1, isolate=True).close()
    before = read_resident()
    for _ in range(200):
        Predictor(isolated_net, threads=1, isolate=True).close()
    assert read_resident() < 1.05 * before


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
