"""Every shim for PaddleDetection: the fault is there without it, and gone with it."""

import importlib

import numpy as np
import paddle
import pytest

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppdet.metrics import json_results
from ppdet.modeling.assigners.atss_assigner import ATSSAssigner
from ppdet.modeling.heads import cascade_head

import ppvision.plugins.paddledet  # noqa: F401  (applies the shims)
from ppvision.plugins import shims
from ppvision.plugins.shims import PADDLEDET_SHIMS as SHIMS
from tests.helpers.upstream import check_place

# What PaddleDetection and pycocotools call in Paddle and NumPy.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]

target = importlib.import_module("ppdet.modeling.proposal_generator.target")


@pytest.fixture
def unshimmed():
    shims.remove(SHIMS)
    yield
    shims.apply(SHIMS)


@pytest.mark.parametrize("name", SHIMS)
def test_fault_is_present_without_the_shim_and_gone_with_it(unshimmed, name):
    shim = SHIMS[name]
    assert shim.fault_present()
    assert shims.apply({name: shim}) == [name]
    assert shims.apply({name: shim}) == []
    assert not shim.fault_present()
    assert shims.remove({name: shim}) == [name]
    assert shim.fault_present()


@pytest.mark.parametrize("name", SHIMS)
def test_the_fault_is_where_the_shim_says(name):
    check_place(SHIMS[name].fault)


def test_importing_the_plugin_applies_all():
    assert shims.list_active_shims(SHIMS) == list(SHIMS)


def test_removing_leaves_nothing(unshimmed):
    assert cascade_head.paddle is paddle
    assert json_results.strip_mask.__module__ == "ppdet.metrics.json_results"
    assert not hasattr(json_results.strip_mask, "__wrapped__")


def test_paddle_is_paddle_but_for_concat():
    theirs = cascade_head.paddle
    assert theirs is not paddle
    assert theirs.nn is paddle.nn
    scalars = [paddle.to_tensor(2, "int32"), paddle.to_tensor([3], "int64")]
    assert theirs.concat(scalars).tolist() == [2, 3]
    x = np.arange(6.0).reshape(2, 3)
    both = theirs.concat([paddle.to_tensor(x)] * 2, axis=1)
    np.testing.assert_array_equal(both.numpy(), np.concatenate([x, x], axis=1))


def test_atss_gives_each_anchor_its_box():
    """Two boxes; for each an anchor of its own and two that overlap it too little."""
    anchors = [
        [left + across, left + down, left + across + 8, left + down + 8]
        for left in (0.0, 20.0)
        for across, down in ((0, 0), (5, 0), (0, 6))
    ]
    boxes = paddle.to_tensor([anchors[0], anchors[3]])
    labels, assigned, scores, _ = ATSSAssigner(topk=3, num_classes=3)(
        paddle.to_tensor(anchors),
        [6],
        gt_labels=paddle.to_tensor([[[1], [2]]], dtype="int32"),
        gt_bboxes=boxes.unsqueeze(0),
        pad_gt_mask=paddle.ones([1, 2, 1]),
        bg_index=3,
    )
    assert labels.tolist() == [[1, 3, 3, 2, 3, 3]]
    np.testing.assert_array_equal(assigned[0].numpy()[[0, 3]], boxes.numpy())
    np.testing.assert_array_equal(scores[0].numpy()[[0, 3]], [[0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_are_rasterised_like_their_polygon(compressed):
    """A rectangle on the borders of pixels, in boxes of its own size, larger and shifted."""
    from pycocotools import mask as coco

    mask = np.zeros((24, 30), np.uint8)
    mask[4:16, 8:20] = 1
    polygon = [[8.0, 4.0, 20.0, 4.0, 20.0, 16.0, 8.0, 16.0]]
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    segment = {"size": [24, 30], "counts": np.diff([0, *edges, flat.size]).tolist()}
    if compressed:
        segment = coco.encode(np.asfortranarray(mask))
    for box in ([8, 4, 20, 16], [2, 4, 26, 16], [8, 4, 14, 10], [0, 0, 24, 24]):
        box = np.float32(box)
        found = target.rasterize_polygons_within_box(segment, box, 12)
        expected = target.rasterize_polygons_within_box(polygon, box, 12)
        np.testing.assert_array_equal(found.numpy(), expected.numpy(), err_msg=str(box))


def test_run_lengths_keep_holes():
    """A ring, which no polygon of COCO's can be: each cell by the pixel under its middle."""
    mask = np.zeros((12, 12), np.uint8)
    mask[2:10, 2:10] = 1
    mask[4:8, 4:8] = 0
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    segment = {"size": [12, 12], "counts": np.diff([0, *edges, flat.size]).tolist()}
    found = target.rasterize_polygons_within_box(segment, np.float32([2, 2, 10, 10]), 8)
    np.testing.assert_array_equal(found.numpy(), mask[2:10, 2:10])


def test_masks_of_nothing_and_of_something():
    bboxes, masks = np.float32([[1, 0.9, 0, 0, 2, 2]]), np.ones((1, 2, 2), np.int32)
    found = json_results.get_seg_res(masks, bboxes, [0, 1], [[7], [8]], {1: 5})
    assert [(f["image_id"], f["category_id"]) for f in found] == [(8, 5)]


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 0], [0, 0], [1, 0, 0, 3]])
def test_masks_beside_pictures_of_nothing(order):
    """Each picture's masks are those that it has alone; a row of score 0 stands for nothing."""
    from ppdet.modeling.post_process import MaskPostProcess

    random = np.random.default_rng(0)
    rows, masks, alone = [], [], []
    for count in order:
        own = np.zeros((count, 6), np.float32)
        own[:, 1] = random.uniform(0.2, 1, count)
        own[:, 2:4] = random.uniform(0, 8, (count, 2))
        own[:, 4:] = own[:, 2:4] + random.uniform(4, 8, (count, 2))
        cells = random.uniform(0, 1, (count, 4, 4)).astype(np.float32)
        masks += list(cells)
        rows += list(own) if count else [np.float32([0, 0, 0, 0, 1, 1])]
        if count:
            whole = [paddle.to_tensor(x) for x in (cells, own, np.int32([count]))]
            alone += list(MaskPostProcess()(*whole, paddle.full([1, 2], 16)).numpy())
        else:
            alone.append(np.zeros((16, 16)))
    cells = np.stack(masks) if masks else np.full((1, 1, 1), -1, np.float32)
    counts = np.int32([max(1, count) for count in order])
    inputs = [paddle.to_tensor(x) for x in (cells, np.stack(rows), counts)]
    found = MaskPostProcess()(*inputs, paddle.full([len(order), 2], 16)).numpy()
    np.testing.assert_array_equal(found, np.stack(alone))


def test_regions_without_a_size_are_those_of_a_point():
    from ppdet.modeling.heads.roi_extractor import RoIAlign

    feature = paddle.arange(64, dtype="float32").reshape([1, 1, 8, 8])
    align = RoIAlign(resolution=2, spatial_scale=1.0, aligned=True)
    regions = paddle.to_tensor([[3.5, 2.5, 3.5, 2.5], [1.0, 1.0, 5.0, 5.0]])
    flat, whole = align([feature], [regions], paddle.to_tensor([2], "int32")).numpy()
    assert np.allclose(flat, 2 * 8 + 3, atol=0.1)  # the pixel whose middle is there
    without = paddle.vision.ops.roi_align(
        feature, regions[1:], paddle.to_tensor([1], "int32"), 2, 1.0, aligned=True
    )
    np.testing.assert_array_equal(whole, without[0].numpy())
