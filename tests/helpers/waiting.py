"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def wait_until(done: Callable[[], object]) -> None:
    end = time.time() + 120
    while not done():
        assert time.time() < end
        time.sleep(0.005)
