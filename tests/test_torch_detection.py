"""`benchmark/gpu/detection_networks.py` and its losses: the same as PaddleDetection's."""

import numpy as np
import paddle
import pytest

pytest.importorskip("torch", reason="pip install -r benchmark/requirements-torch.txt")
pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

import torch

from benchmark.gpu.detection_losses import Targets, detection_losses
from benchmark.gpu.detection_networks import from_paddle, ppyoloe_pale_nano, to_paddle
from ppvision.tasks import open_job
from tests.helpers.configs import ROOT
from tests.helpers.small_detectors import WARNINGS

pytestmark = WARNINGS

CONFIG = ROOT / "configs" / "detection" / "ppyoloe_pale_nano_bccd.yml"
SIZE = (96, 128)  # the coarsest map has as many places as ATSS has candidates, and some more
STATIC_EPOCHS = 13  # of the config


@pytest.fixture(scope="module")
def pair():
    """PaddleDetection's network with random weights everywhere, and the twin with the same."""
    job = open_job(CONFIG, ["pale_nano.drop_path_rate=0.0"])
    paddle.seed(0)
    theirs = job.float_model
    random = np.random.default_rng(0)
    for name, value in theirs.state_dict().items():
        if "pred_" in name and name.endswith("weight"):
            value.set_value(random.normal(0, 0.02, value.shape).astype(np.float32))
        if name.endswith(("_mean", "_variance")):
            value.set_value(random.uniform(0.5, 1.0, value.shape).astype(np.float32))
    ours = ppyoloe_pale_nano(3)
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    found = ours.load_state_dict(from_paddle(arrays), strict=False)
    assert not found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    return theirs, ours


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).normal(size=(2, 3, *SIZE)).astype(np.float32)


def test_weights_there_and_back(pair):
    theirs, ours = pair
    expected = {name: value.numpy() for name, value in theirs.state_dict().items()}
    found = to_paddle(ours.state_dict())
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_same_boxes_and_scores(pair, picture):
    theirs, ours = pair
    theirs.eval(), ours.eval()
    theirs.yolo_head.exclude_nms = True
    try:
        with paddle.no_grad():
            scale = paddle.ones([2, 2])
            found = theirs({"image": paddle.to_tensor(picture), "scale_factor": scale})
    finally:
        theirs.yolo_head.exclude_nms = False
    with torch.inference_mode():
        boxes, scores = ours.yolo_head.boxes(ours(torch.from_numpy(picture)))
    np.testing.assert_allclose(boxes.numpy(), found["bbox"].numpy(), atol=1e-3)
    expected = found["bbox_num"].numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)
    assert np.ptp(boxes.numpy(), axis=1).min() > 1  # the boxes differ


@pytest.mark.parametrize("epoch", [STATIC_EPOCHS - 1, STATIC_EPOCHS])
def test_same_losses_and_gradients(pair, picture, epoch):
    """Three objects that overlap, beside a picture with one."""
    theirs, ours = pair
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0] = [(5.3, 8.1, 60.7, 71.2), (20.6, 15.4, 85.1, 90.9), (90.2, 40.3, 118.4, 66.6)]
    boxes[1, 0] = (31.7, 22.2, 70.3, 61.8)
    classes = np.array([[0, 2, 1], [1, 0, 0]])
    real = np.array([[1, 1, 1], [1, 0, 0]], bool)
    theirs.train(), ours.train()
    expected = theirs(
        {
            "image": paddle.to_tensor(picture),
            "gt_class": paddle.to_tensor(classes[..., None].astype(np.int32)),
            "gt_bbox": paddle.to_tensor(boxes),
            "pad_gt_mask": paddle.to_tensor(real[..., None].astype(np.float32)),
            "epoch_id": epoch,
        }
    )
    expected["loss"].backward()
    targets = Targets(torch.from_numpy(boxes), torch.from_numpy(classes), torch.from_numpy(real))
    raw = ours(torch.from_numpy(picture))
    static = torch.tensor(epoch < STATIC_EPOCHS)
    found = detection_losses(ours.yolo_head, raw, targets, static=static)
    found["loss"].backward()
    for name, value in found.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-4), name
        assert value.item() > 0
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    compared = to_paddle(gradients)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert name not in compared, name
            continue
        wanted = parameter.grad.numpy()
        np.testing.assert_allclose(
            compared[name], wanted, atol=1e-4 * np.abs(wanted).max() + 1e-7, err_msg=name
        )
    theirs.clear_gradients()
    ours.zero_grad()
