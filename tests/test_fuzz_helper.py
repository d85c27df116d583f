"""The bounds that tests of parsers use do fail where a parser breaks them."""

import random
import time

import pytest

from ppvision.errors import DataError
from tests.helpers.fuzz import FLOOR, call_within_bounds, mutate_bytes, mutate_document
from tests.helpers.messages import raises_naming

DOCUMENT = {"a": [1, 2, {"b": "c"}], "d": 0.5}


def _raise(error: Exception) -> None:
    raise error


def test_our_errors_and_results_pass():
    error = DataError("expected")
    assert call_within_bounds(lambda: _raise(error), size=1, case="x") is error
    assert call_within_bounds(lambda: 7, size=1, case="x") == 7


@pytest.mark.parametrize(
    "call",
    [
        lambda: _raise(KeyError("a")),
        lambda: _raise(RecursionError()),
        lambda: bytearray(FLOOR + 1),
        lambda: time.sleep(5),
    ],
)
def test_everything_else_fails(call):
    with raises_naming(AssertionError, "seed", "3"):
        call_within_bounds(call, size=1, case="seed 3", seconds=0.2)


def test_mutations_differ_and_repeat():
    for mutate, source in ((mutate_document, DOCUMENT), (mutate_bytes, b"some text\n" * 5)):
        made = [repr(mutate(source, random.Random(seed))) for seed in range(200)]
        assert made == [repr(mutate(source, random.Random(seed))) for seed in range(200)]
        assert len(set(made)) > 100
        assert sum(one == repr(source) for one in made) < 20
