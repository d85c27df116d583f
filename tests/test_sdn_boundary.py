"""`benchmark/sdn_boundary.py`: its control, its counts, and one run from config to row."""

import csv

import numpy as np
import paddle
import pytest

from benchmark import sdn_boundary
from benchmark.sdn_boundary import (
    FIELDS,
    VARIANTS,
    Case,
    PlainConvBackbone,
    add_row,
    full,
    multiply_adds,
    order,
    stage,
    summary,
    trained_size,
)
from ppvision import create_model
from ppvision.models.pale_transformer import VARIANTS as PALE
from ppvision.models.pale_transformer import multiply_adds as published_count
from ppvision.nn import SemanticDiffusion
from ppvision.plugins.paddleseg import SemanticDiffusionBackbone, pale_nano


def test_the_plain_convolution_has_as_many_parameters_and_starts_as_nothing():
    sdn = SemanticDiffusionBackbone(pale_nano(), similarity="gaussian")
    plain = PlainConvBackbone(pale_nano())
    assert trained_size(plain) == pytest.approx(trained_size(sdn), rel=0.002)
    for enhanced in plain.diffusion.diffusions:
        assert isinstance(enhanced, SemanticDiffusion)
        assert enhanced.guide is None
    plain.eval()
    x = paddle.rand([1, 3, 40, 56])
    for mine, without in zip(plain(x), plain.backbone(x), strict=True):
        np.testing.assert_array_equal(mine.numpy(), without.numpy())


def test_multiply_adds_equal_the_count_from_the_papers_table():
    assert multiply_adds(create_model("pale_nano"), 224) == published_count(
        PALE["pale_nano"], 224, 224
    )


def test_multiply_adds_of_sdn_by_hand():
    class Net(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.sdn = SemanticDiffusion(3, similarity="gaussian")

        def forward(self, x):
            return self.sdn(x)

    assert multiply_adds(SemanticDiffusionBackbone(pale_nano()), 32) > multiply_adds(
        pale_nano(), 32
    )
    side, c = 8, 3
    difference, fusion = 8 * c * c * side**2, 2 * c * c * side**2
    assert multiply_adds(Net(), side) == difference + fusion + 9 * c * c * (side // 2) ** 2


def test_stages_and_the_full_matrix():
    assert [case.variant for case in stage(1)] == list(VARIANTS)
    second = stage(2)
    assert len(set(second)) == len(second) == 2 * 4 * 3 + 2 * 2 * 3
    assert len(set(full())) == 2 * 2 * len(VARIANTS) * 3
    assert {*stage(1), *second} <= set(full())


@pytest.mark.all
def test_a_run_from_config_to_row(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sdn_boundary.DATA, "camvid", (scenes.name, 11))
    monkeypatch.setattr(sdn_boundary, "CROP", 56)
    case = Case("camvid", "pale_nano", "plain_conv", 3)
    row = sdn_boundary.run(case, scenes.parent, tmp_path / "work", 2)
    again = sdn_boundary.run(case, scenes.parent, tmp_path / "work", 2)  # it was at its end
    assert row == again
    assert 0 <= float(row["BoundaryIoU"]) <= 1
    path = tmp_path / "results.csv"
    add_row(path, row, FIELDS, order, summary)
    add_row(path, row | {"seed": 1, "mIoU": "0.5"}, FIELDS, order, summary)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["seed"] for r in rows] == ["1", "3", "mean", "std"]
    assert float(rows[2]["mIoU"]) == pytest.approx((0.5 + float(row["mIoU"])) / 2, abs=1e-4)
