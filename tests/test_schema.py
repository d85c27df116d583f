"""The checker of our own formats: types, ranges, places, the nearest key."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from ppvision.safe_yaml import load_yaml
from ppvision.schema import (
    Count,
    Place,
    SchemaError,
    between,
    build,
    check_of,
    check_values,
    number,
    one_of,
    text,
    whole,
)
from tests.helpers.messages import raises_naming


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: Annotated[int, whole(1, 8)]
    shape: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: Annotated[float, between(0, 1)] = 0.5
    weight: Annotated[float, number(0)] | None = None
    flag: bool = False
    inner: Inner | None = None
    sizes: Annotated[list[Annotated[int, whole(1)]], Count(1, 3)] = field(
        default_factory=lambda: [1]
    )
    rules: dict[Annotated[str, text(4)], Inner] = field(default_factory=dict)
    rest: Any = None


def read(document: str) -> Outer:
    return build(Outer, load_yaml(document, "job.yml"), "top")


def test_values_defaults_and_inner_dataclasses():
    found = read("name: a\nweight: 2\ninner: {width: 3}\nrules: {x: {width: 1, shape: linear}}\n")
    expected = Outer(
        name="a", weight=2, inner=Inner(width=3), rules={"x": Inner(width=1, shape="linear")}
    )
    assert found == expected
    assert (found.rate, found.flag, found.sizes) == (0.5, False, [1])
    assert build(Outer, {"name": "a", "weight": None}) == Outer(name="a")


@pytest.mark.parametrize(
    ("document", "line", "message"),
    [
        ("nam: a\n", "1", "top: expected only known keys, got 'nam'. Did you mean name?"),
        ("rate: 0.1\n", "", "top: expected name, got none"),
        ("name: 1\n", "1", "top.name: expected text, got 1"),
        ("name: a\nflag: 1\n", "2", "top.flag: expected true or false, got 1"),
        ("name: a\n\nrate: 1\n", "3", "top.rate: expected a finite number above 0 and below 1"),
        ("name: a\nrate: .nan\n", "2", "top.rate: expected a finite number"),
        ("name: a\nweight: true\n", "2", "top.weight: expected a number of at least 0, got True"),
        ("name: a\nweight: .inf\n", "2", "top.weight: expected a number of at least 0, got inf"),
        ("name: a\ninner:\n  width: 9\n", "3", "top.inner.width: expected a whole number from 1"),
        ("name: a\ninner: {widht: 9}\n", "2", "got 'widht'. Did you mean width?"),
        ("name: a\ninner:\n- 1\n", "2", "top.inner: expected keys and values, got [1]"),
        ("name: a\nsizes: []\n", "2", "top.sizes: expected a list of 1 to 3 entries, got []"),
        ("name: a\nsizes:\n- 1\n- 1.0\n", "2", "top.sizes.1: expected a whole number of at least"),
        (
            "name: a\nrules:\n  abcde: {}\n",
            "3",
            "expected text of at most 4 characters, got 'abcde'",
        ),
        ("name: a\nrules:\n  abc:\n    shape: linear\n", "3", "top.rules.abc: expected width, got"),
        (
            "name: a\ninner: {width: 1, shape: cosin}\n",
            "2",
            "top.inner.shape: expected one of cosine, linear, got 'cosin'. Did you mean cosine?",
        ),
    ],
)
def test_errors_name_line_path_expected_and_found(document, line, message):
    with pytest.raises(SchemaError) as caught:
        read(document)
    assert message in str(caught.value)
    assert caught.value.line == (f"job.yml:{line}" if line else "")
    assert caught.value.sentence[-1] in ".?"


def test_long_values_are_shortened():
    for document in ({"name": ["x" * 10**6]}, {"x" * 10**6: 1}, {"name": {"a": 10**9}}):
        with pytest.raises(SchemaError) as caught:
            build(Outer, document)
        assert len(str(caught.value)) < 400


def test_ints_are_no_floats_of_another_type():
    check = check_of(Annotated[int, one_of(8)])
    for value in (8.0, True, "8"):
        with raises_naming(SchemaError, "one", "8,"):
            check(value, Place())
    assert math.isfinite(build(Outer, {"name": "a", "weight": 10**300}).weight)


def test_an_annotation_that_says_too_little_is_refused():
    for annotation in (int, float, int | str, tuple[int, int]):
        with raises_naming(TypeError, "says", "value"):
            check_of(annotation)


def test_a_dataclass_made_in_python_can_be_checked():
    check_values(Outer(name="a"))
    with raises_naming(SchemaError, "rate:", "finite"):
        check_values(Outer(name="a", rate=2))


def test_it_loads_nothing_heavy():
    code = "import sys, ppvision.schema; print({'paddle', 'numpy', 'cv2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
