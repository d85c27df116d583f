"""One registration, one list of options: what the zoo has, both frameworks have."""

import inspect
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest

from tests.helpers.messages import raises_naming

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")
pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from paddleseg.cvlibs import manager
from ppdet.core import workspace

import ppvision
import ppvision.plugins.paddledet as detection
import ppvision.plugins.paddleseg as segmentation
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer
from ppvision.models.resnet import CifarResNet
from ppvision.safe_yaml import Located
from ppvision.tasks.classification.config import _check_model
from ppvision.tasks.config import ConfigError, check_components
from ppvision.zoo import registry
from ppvision.zoo.cards import ModelCard
from ppvision.zoo.factory import list_model_options

ZOO = ppvision.list_models()
SMALL = [name for name in ZOO if name not in ("pale_small", "pale_base", "pale_tiny")]


@pytest.mark.parametrize("name", SMALL)
def test_every_model_is_a_backbone_of_both(name):
    paddle.seed(0)
    x = paddle.rand([1, 3, 64, 64])
    net = manager.BACKBONES[name](in_channels=3, out_indices=[0, 1])
    features = net(x)
    assert [f.shape[1] for f in features] == net.feat_channels
    assert getattr(segmentation, name) is manager.BACKBONES[name]

    backbone = workspace.create(name)
    assert isinstance(backbone, getattr(detection, name))
    shapes = backbone.out_shape
    features = backbone({"image": x})
    assert [f.shape[1] for f in features] == [s.channels for s in shapes]
    assert [64 // f.shape[2] for f in features] == [s.stride for s in shapes]


@pytest.mark.parametrize("name", ZOO)
def test_options_are_those_of_the_model(name):
    own = set(list_model_options(name))
    of_seg = set(inspect.signature(manager.BACKBONES[name]).parameters)
    of_det = set(workspace.global_config[name].schema)
    assert of_seg == own - {"num_classes", "features_only"}
    assert of_det == own - {"num_classes", "features_only"} | {"return_idx"}
    assert {"pretrained", "frozen_stages", "norm_eval", "recompute"} <= of_seg & of_det


@pytest.fixture
def forget():
    """Take models out of all registers again."""
    names = []
    yield names.append
    for name in names:
        registry._MODELS.pop(name, None)
        manager.BACKBONES.components_dict.pop(name, None)
        workspace.global_config.pop(name, None)
        for module in (segmentation, detection):
            vars(module).pop(name, None)


def register(name: str, build) -> None:
    card = ModelCard(name=name, paper="none", parameters=1, gflops=1.0, recipe="none")
    ppvision.zoo.register_model(card)(build)


def test_a_model_registered_later_is_there_at_once(forget):
    forget("my_net")
    register("my_net", partial(CifarResNet, 1))
    net = manager.BACKBONES["my_net"](frozen_stages=0)
    assert net.stem.weight.stop_gradient
    assert [s.stride for s in workspace.create("my_net").out_shape] == [1, 2, 4]
    assert ppvision.create_model("my_net", num_classes=2)(paddle.rand([1, 3, 8, 8])).shape == [1, 2]


def test_a_model_without_feature_maps_is_no_backbone(forget):
    def plain_net(*, num_classes: int = 10) -> paddle.nn.Layer:
        return paddle.nn.Linear(3, num_classes)

    forget("plain_net")
    register("plain_net", plain_net)
    assert "plain_net" not in manager.BACKBONES.components_dict
    assert "plain_net" not in workspace.global_config
    assert ppvision.create_model("plain_net", num_classes=2).weight.shape == [3, 2]


def test_a_new_option_of_pale_is_written_once(forget):
    """In the model's constructor: the zoo, both plug-ins and the configurations follow."""

    class WithOption(PaleTransformer):
        def __init__(self, config, *, head_scale: float = 1.0, **options) -> None:
            super().__init__(config, **options)
            self.head_scale = head_scale

    own = inspect.signature(WithOption).parameters["head_scale"]
    options = inspect.signature(PaleTransformer).parameters.values()
    WithOption.__signature__ = inspect.Signature([*options, own])

    forget("pale_new")
    register("pale_new", partial(WithOption, VARIANTS["pale_nano"]))
    of_seg = inspect.signature(manager.BACKBONES["pale_new"]).parameters["head_scale"]
    of_det = inspect.signature(detection.pale_new.__init__).parameters["head_scale"]
    for found in (of_seg, of_det):  # what their checkers go by
        assert (found.default, found.annotation) == (1.0, float)
    assert workspace.global_config["pale_new"].schema["head_scale"].default == 1.0
    assert ppvision.create_model("pale_new", head_scale=2.0).head_scale == 2.0
    assert manager.BACKBONES["pale_new"](head_scale=3.0).head_scale == 3.0
    workspace.global_config["pale_new"]["head_scale"] = 4.0
    assert workspace.create("pale_new").net.head_scale == 4.0
    _check_model({"type": "pale_new", "head_scale": 5.0})
    check_components({"type": "pale_new", "head_scale": 5.0}, {**manager.BACKBONES.components_dict})
    with raises_naming(ConfigError, "'head_scal'.", "head_scale"):
        _check_model(Located({"type": "pale_new", "head_scal": 5.0}, {}))
    with raises_naming(TypeError, "'head_scal'.", "head_scale"):
        ppvision.create_model("pale_new", head_scal=2.0)


def test_options_of_pale_stand_in_the_model_only():
    own = ("mask_padding", "pale_size")  # `recompute`, `in_channels`, ...: other models have these
    model = {"models/pale_transformer.py", "nn/pale_attention.py"}
    arithmetic = {"forms/pale.py", "forms/tokens.py"}  # read what a built layer holds
    package = Path(ppvision.__file__).parent
    for option in own:
        found = {
            path.relative_to(package).as_posix()
            for path in package.rglob("*.py")
            if option in path.read_text(encoding="utf-8")
        }
        assert found <= model | arithmetic, option


def test_pretrained_is_an_option_of_both(forget):
    name = "pale_nano.digit_scenes"
    expected = ppvision.create_model("pale_nano", pretrained=True, features_only=True).state_dict()
    workspace.global_config["pale_nano"]["pretrained"] = name
    try:
        of_det = workspace.create("pale_nano").net.state_dict()
    finally:
        workspace.global_config["pale_nano"]["pretrained"] = False
    of_seg = manager.BACKBONES["pale_nano"](pretrained=name).state_dict()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(of_seg[key].numpy(), tensor.numpy())
        np.testing.assert_array_equal(of_det[key].numpy(), tensor.numpy())
