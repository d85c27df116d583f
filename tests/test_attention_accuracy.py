"""The three groupings of `benchmark/attention_accuracy.py`, against loops over their definition."""

import csv

import numpy as np
import paddle
import pytest

from benchmark.attention_accuracy import (
    ATTENTIONS,
    SIZE,
    GroupedAttention,
    add_run,
    build,
)
from ppvision.nn import PaleAttention

HEADS = 4


def members(kind: str, shift: int, side: int) -> list[tuple[set, set]]:
    """For each of the two halves of the channels, which positions each position attends to."""
    positions = [(y, x) for y in range(side) for x in range(side)]
    groups = side // SIZE

    def window(y, x):
        return (y - shift) % side // SIZE, (x - shift) % side // SIZE

    def same(a, b, half):
        if kind == "pale":
            return a[half] % groups == b[half] % groups
        if kind == "stripes":
            return a[half] // SIZE == b[half] // SIZE
        # Shifted windows hold what met by the wrap-around apart.
        wrapped = [(q < shift) == (r < shift) for q, r in zip(a, b, strict=True)]
        apart = not all(wrapped) and shift
        return window(*a) == window(*b) and not apart

    return [{a: {b for b in positions if same(a, b, half)} for a in positions} for half in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "shift"), [("pale", 0), ("stripes", 0), ("windows", 0), ("windows", 2)]
)
def test_attention_against_loops(kind, shift):
    paddle.seed(0)
    layer = GroupedAttention(8, HEADS, kind, shift).eval()
    x = paddle.randn([1, 8, 8, 8])
    query, key, value = (
        part(x)[0].numpy().astype(np.float64) for part in (layer.query, layer.key, layer.value)
    )
    out = np.zeros((8, 8, 8))
    allowed = members(kind, shift, 8)
    for head in range(HEADS):
        channels = slice(2 * head, 2 * head + 2)
        half = 0 if head < HEADS // 2 else 1
        for (y, x_), others in allowed[half].items():
            others = sorted(others)
            scores = np.array(
                [query[channels, y, x_] @ key[channels, v, u] / np.sqrt(2) for v, u in others]
            )
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[channels, y, x_] = sum(
                w * value[channels, v, u] for w, (v, u) in zip(weights, others, strict=True)
            )
    expected = layer.project(paddle.to_tensor(out[None], "float32"))
    np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), atol=1e-5)


def test_pale_is_the_librarys_and_all_agree_on_one_window():
    paddle.seed(1)
    layers = {kind: GroupedAttention(8, HEADS, kind, 2) for kind in ATTENTIONS}
    library = PaleAttention(8, HEADS, SIZE, fused=False)
    for layer in (*layers.values(), library):
        layer.set_state_dict(library.state_dict())
        layer.eval()
    x = paddle.randn([2, 8, 12, 8])
    np.testing.assert_allclose(layers["pale"](x).numpy(), library(x).numpy(), atol=1e-5)
    for side in (2, 4):  # 2: padded, and the padding masked
        x = paddle.randn([2, 8, side, side])
        for layer in layers.values():
            np.testing.assert_allclose(layer(x).numpy(), library(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_networks_start_alike(kind):
    first, model = build("pale", 3), build(kind, 3)
    for a, b in zip(first.parameters(), model.parameters(), strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    shifts = [b.attention.shift for stage in model.stages for b in stage]
    assert shifts == [0, 2, 0, 2, 0, 0]


def test_results_are_ordered_and_summed_up(tmp_path):
    path = tmp_path / "results" / "table.csv"
    for kind, seed, top1 in (("stripes", 0, 0.5), ("pale", 1, 0.7), ("pale", 0, 0.6)):
        row = {"attention": kind, "seed": seed, "top1": top1, "loss": 1 - top1}
        add_run(path, row | {"epochs": 1, "images": 9, "minutes": 2, "machine": "m"})
    with path.open() as file:
        rows = [(r["attention"], r["seed"], float(r["top1"])) for r in csv.DictReader(file)]
    assert rows[:3] == [("pale", "0", 0.6), ("pale", "1", 0.7), ("stripes", "0", 0.5)]
    assert rows[3] == ("pale", "mean", 0.65)
    assert rows[4][2] == pytest.approx(0.1 / np.sqrt(2), abs=1e-4)
    assert len(rows) == 5
