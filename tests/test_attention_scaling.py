"""The comparison of how attentions grow: what it counts, and that it runs to its table."""

import csv

import numpy as np
import paddle
import pytest

from benchmark import attention_scaling as scaling


@pytest.mark.parametrize("kind", list(scaling.ATTENTIONS))
def test_every_attention_meets_as_many_keys_as_the_formula_says(kind):
    """A change of one pixel moves the outputs of exactly the tokens that meet it."""
    side = 28
    paddle.seed(0)
    layer = scaling.ATTENTIONS[kind]()
    layer.eval()
    for part in (layer.query, layer.key, layer.value):
        weight = np.zeros(part[0].weight.shape, np.float32)
        weight[:, :, 1, 1] = 1.0  # a convolution that does not look around
        part[0].weight.set_value(weight)
    layer.project.weight.set_value(
        np.eye(scaling.CHANNELS, dtype=np.float32)[:, :, None, None]  # halves stay apart
    )
    x = np.random.default_rng(0).normal(size=(1, scaling.CHANNELS, side, side)).astype("float32")
    changed = x.copy()
    changed[:, :, 9, 12] += 1.0
    with paddle.no_grad():
        before, after = layer(paddle.to_tensor(x)), layer(paddle.to_tensor(changed))
    moved = (before != after).numpy()[0]  # [C, H, W]
    half = scaling.CHANNELS // 2
    met = sum(int(part.any(axis=0).sum()) for part in (moved[:half], moved[half:]))
    assert met == scaling.keys_of_a_token(kind, side)


def test_a_table_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS", {28: 1, 56: 1})
    monkeypatch.setattr(scaling, "MOST_SCORES", scaling.scores_bytes("pale", 56))
    table, image = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    monkeypatch.setattr(
        "sys.argv", ["", "--sides", "28", "56", "--results", str(table), "--image", str(image)]
    )
    scaling.main()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    found = [(row["attention"], int(row["side"])) for row in rows]
    assert found == [(kind, 28) for kind in scaling.ATTENTIONS] + [
        (kind, 56) for kind in ("pale", "stripes", "windows")
    ]
    pale = [row for row in rows if row["attention"] == "pale"]
    per_pixel = [4 * 64 + 27 + 14 * side for side in (28, 56)]
    assert float(pale[1]["formula_growth"]) == pytest.approx(
        4 * per_pixel[1] / per_pixel[0], abs=0.01
    )
    assert image.read_bytes()[:4] == b"\x89PNG"
