"""PaddleDetection with SDN behind its backbones."""

import importlib

import numpy as np
import paddle
import pytest

from tests.helpers.messages import raises_naming

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

import ppdet.modeling  # noqa: F401  (registers the detectors)
from ppdet.core import workspace
from ppdet.core.workspace import create, load_config

import ppvision.plugins.paddledet as plugin
from ppvision.zoo.weights import read_weights


@pytest.fixture
def config(tmp_path):
    """Read a PaddleDetection config: `config(options)` of SDN over a ResNet, or a whole `text`;
    leaves its global state as it was."""
    before = {key: value for key, value in workspace.global_config.items() if key != "filename"}
    # A config is merged into the dictionaries of registered classes.
    inside = {key: dict(value) for key, value in before.items() if isinstance(value, dict)}

    def read(options: str = "", text: str | None = None):
        path = tmp_path / "job.yml"
        path.write_text(
            text
            or "SemanticDiffusionBackbone:\n  backbone: ResNet\n"
            f"{options}"
            "ResNet: {depth: 18, return_idx: [0, 1, 2, 3], freeze_at: -1, norm_type: bn}\n"
            "FPN: {out_channel: 16}\n"
        )
        return load_config(str(path))

    yield read
    workspace.global_config.clear()
    workspace.global_config.update(before)
    for key, content in inside.items():
        before[key].clear()
        before[key].update(content)


def test_sdn_without_options_has_central_differences(config):
    config()
    for diffusion in create("SemanticDiffusionBackbone").diffusion.diffusions:
        assert diffusion.difference.similarity == "none"
        assert diffusion.guide is None


def test_sdn_behind_a_stock_backbone_and_in_front_of_a_stock_neck(config):
    config("  levels: [0, -1]\n  similarity: gaussian\n")
    backbone = create("SemanticDiffusionBackbone")
    inner = backbone.backbone
    assert type(inner).__name__ == "ResNet"
    assert backbone.out_shape == inner.out_shape
    assert backbone.diffusion.levels == [0, 3]
    assert backbone.diffusion.diffusions[0].difference.similarity == "gaussian"

    backbone.eval()
    picture = {"image": paddle.rand([2, 3, 64, 96])}
    for enhanced, plain in zip(backbone(picture), inner(picture), strict=True):
        np.testing.assert_array_equal(enhanced.numpy(), plain.numpy())  # it starts as nothing

    for diffusion in backbone.diffusion.diffusions:
        diffusion.fuse.weight.set_value(0.1 * paddle.randn(diffusion.fuse.weight.shape))
    features = backbone(picture)
    shapes = backbone.out_shape
    assert [f.shape[1] for f in features] == [shape.channels for shape in shapes]
    assert not np.array_equal(features[0].numpy(), inner(picture)[0].numpy())
    np.testing.assert_array_equal(features[1].numpy(), inner(picture)[1].numpy())

    neck = create("FPN", input_shape=shapes)
    backbone.train()
    sum(f.mean() for f in neck(backbone(picture))).backward()
    for diffusion in backbone.diffusion.diffusions:
        assert np.abs(diffusion.difference.weight.grad.numpy()).max() > 0
    assert np.abs(inner.sublayers()[1].parameters()[0].grad.numpy()).max() > 0


RETINANET = """
architecture: RetinaNet
num_classes: 3
RetinaNet: {backbone: SemanticDiffusionBackbone, neck: FPN, head: RetinaHead}
SemanticDiffusionBackbone: {backbone: ResNet, levels: [0, 1, 2]}
ResNet: {depth: 18, return_idx: [1, 2, 3], freeze_at: -1, norm_type: bn}
FPN:
  out_channel: 16
  spatial_scales: [0.125, 0.0625, 0.03125]
  extra_stage: 2
  has_extra_convs: true
  use_c5: false
RetinaHead:
  conv_feat: {name: RetinaFeat, feat_in: 16, feat_out: 16, num_convs: 1, norm_type: null}
  anchor_generator: {name: RetinaAnchorGenerator, strides: [8.0, 16.0, 32.0, 64.0, 128.0]}
  bbox_assigner: {name: MaxIoUAssigner, positive_overlap: 0.5, negative_overlap: 0.4}
  nms: {name: MultiClassNMS, nms_top_k: 100, keep_top_k: 10, score_threshold: 0.0001}
"""


@pytest.mark.filterwarnings(r"ignore:\s*Non compatible API")  # PaddleDetection's own calls
def test_a_whole_detector_trains_and_predicts(config):
    """RetinaNet."""
    cfg = config(text=RETINANET)
    paddle.seed(0)
    model = create(cfg.architecture)
    model.train()
    boxes = paddle.to_tensor([[10.0, 10.0, 60.0, 70.0], [50.0, 40.0, 120.0, 110.0]])
    batch = {
        "image": paddle.rand([2, 3, 128, 128]),
        "im_shape": paddle.full([2, 2], 128.0),
        "scale_factor": paddle.ones([2, 2]),
        "gt_bbox": [boxes] * 2,
        "gt_class": [paddle.to_tensor([[0], [2]], dtype="int32")] * 2,
    }
    optimizer = paddle.optimizer.SGD(0.01, model.parameters())
    for _ in range(2):  # in the first step only what follows SDN's zero weights learns
        optimizer.clear_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert np.isfinite(float(loss))
    for diffusion in model.backbone.diffusion.diffusions:
        assert np.abs(diffusion.difference.weight.grad.numpy()).max() > 0
    first = model.backbone.backbone.sublayers()[1].parameters()[0]
    assert np.abs(first.grad.numpy()).max() > 0
    model.eval()
    assert model(batch)["bbox"].shape[1] == 6


def test_a_level_that_is_not_there(config):
    config("  levels: [4]\n")
    with raises_naming(ValueError, "levels:", "0", "3"):
        create("SemanticDiffusionBackbone")


def test_import_again_registers_once():
    before = workspace.global_config["SemanticDiffusionBackbone"]
    importlib.reload(plugin)
    assert workspace.global_config["SemanticDiffusionBackbone"] is before


def test_a_foreign_component_of_the_same_name_is_refused(monkeypatch):
    known = workspace.global_config["SemanticDiffusionBackbone"]
    monkeypatch.setattr(known, "pymodule", importlib.import_module("json"))
    with raises_naming(ValueError, "free", "name", "json"):
        importlib.reload(plugin)


# -- Pale backbones --------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [1, 2, 3]])
def test_pale_in_front_of_a_stock_neck(config, indices):
    scales = [0.25 / 2**i for i in indices]
    config(
        text=f"pale_nano: {{return_idx: {indices}, drop_path_rate: 0.0}}\n"
        f"FPN: {{out_channel: 16, spatial_scales: {scales}}}\n"
    )
    backbone = create("pale_nano")
    shapes = backbone.out_shape
    assert [s.stride for s in shapes] == [4 * 2**i for i in indices]
    backbone.eval()
    x = paddle.rand([2, 3, 64, 96])
    features = backbone({"image": x})
    assert [list(f.shape) for f in features] == [
        [2, s.channels, 64 // s.stride, 96 // s.stride] for s in shapes
    ]
    for feature, index in zip(features, indices, strict=True):
        np.testing.assert_array_equal(feature.numpy(), backbone.net(x)[index].numpy())
    neck = create("FPN", input_shape=shapes)
    backbone.train()
    sum(f.mean() for f in neck(backbone({"image": x}))).backward()
    first = backbone.net.sublayers()[0].parameters()[0]
    assert np.abs(first.grad.numpy()).max() > 0


def test_pale_from_the_zoos_weights_of_a_whole_model(config):
    config(text="pale_nano: {pretrained: pale_nano_digit_scenes}\n")
    weights = {k: v.numpy() for k, v in create("pale_nano").net.state_dict().items()}
    card = read_weights("pale_nano_digit_scenes")
    for name, array in weights.items():
        np.testing.assert_array_equal(array, card[f"backbone.{name}"], err_msg=name)


def test_feature_maps_by_the_other_name():
    # Not by `create`: what a config sets stays in PaddleDetection's workspace.
    pale_nano = plugin.pale_nano
    assert [shape.stride for shape in pale_nano(out_indices=[1, 3]).out_shape] == [8, 32]
    with raises_naming(ValueError, "pale_nano:", "out_indices:", "0", "3"):
        pale_nano(out_indices=[3, 1])
    with raises_naming(ValueError, "out_indices", "return_idx"):
        pale_nano(out_indices=[1], return_idx=[1])


@pytest.mark.parametrize("indices", ["[]", "[4]", "[2, 1]", "[1, 1]", "[-1]"])
def test_feature_maps_that_are_not_there(config, indices):
    config(text=f"pale_nano: {{return_idx: {indices}}}\n")
    with raises_naming(ValueError, "pale_nano:", "return_idx:", "0", "3"):
        create("pale_nano")
