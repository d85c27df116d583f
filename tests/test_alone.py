"""`run_alone`: memory is measured in a process of its own."""

import numpy as np
import pytest

from tests.helpers.alone import run_alone
from tests.helpers.measured import allocate

SIZE = 200 << 20


def test_the_peak_is_that_of_the_call_alone():
    """Also where the peak of this process is higher, from which `ru_maxrss` of a child begins."""
    np.ones(SIZE * 2, np.uint8).sum()
    # Linux counts pages per thread and adds them up now and then: some are missing.
    assert 0.95 * SIZE < run_alone(allocate, SIZE) < 1.2 * SIZE


def test_what_fails_there_fails_here():
    with pytest.raises(AssertionError, match="TypeError"):
        run_alone(allocate, "much")
