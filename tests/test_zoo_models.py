"""Every model of the zoo, by the face that they share."""

import copy
import math

import numpy as np
import paddle
import pytest

import ppvision
from ppvision.models.base import ZooModel
from ppvision.zoo.factory import list_model_options

ZOO = ppvision.list_models()
# The large ones are slow, and show nothing that their small sister does not but for their sizes.
LARGE = ("pale_tiny", "pale_small", "pale_base")
MODELS = [pytest.param(n, marks=pytest.mark.all) if n in LARGE else n for n in ZOO]
BATCH, HEIGHT, WIDTH = 2, 37, 50


def create(name: str, **options) -> ZooModel:
    """Without stochastic depth, which may drop a branch for the whole batch."""
    rates = {key: 0.0 for key in ("drop_path_rate", "drop_rate") if key in list_model_options(name)}
    paddle.seed(0)
    return ppvision.create_model(name, **rates, **options)


def picture(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> paddle.Tensor:
    values = np.random.default_rng(0).normal(size=(BATCH, channels, height, width))
    return paddle.to_tensor(values.astype(np.float32))


def trained_size(model) -> int:
    return sum(int(np.prod(p.shape)) for p in model.parameters() if not p.stop_gradient)


@pytest.mark.parametrize("name", MODELS)
def test_cards_tell_the_sizes(name):
    model, card = ppvision.create_model(name), ppvision.model_card(name)
    assert isinstance(model, ZooModel)
    assert trained_size(model) == card.parameters
    assert model.pretrained_cfg.source is None
    assert model.pretrained_cfg.num_classes == model.num_classes == 1000
    assert len(model.pretrained_cfg.mean) == len(model.pretrained_cfg.std) == 3


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient_at_odd_sizes(name):
    model = create(name, num_classes=5)
    out = model(picture())
    assert out.shape == [BATCH, 5]
    out.square().sum().backward()
    for path, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            assert parameter.grad is not None, path
            # A bias of the keys shifts all scores of a query alike: softmax does not see it.
            assert ".key.2.bias" in path or np.abs(parameter.grad.numpy()).max() > 0, path


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_are_as_declared(name):
    model = ppvision.create_model(name, features_only=True)
    features = model(picture())
    assert len(features) == len(model.feature_info) == len(model.feat_channels)
    assert model.feature_info.channels() == model.feat_channels
    assert model.feature_info.reduction() == model.feat_strides
    for feature, channels, stride in zip(
        features, model.feat_channels, model.feat_strides, strict=True
    ):
        sizes = [math.ceil(HEIGHT / stride), math.ceil(WIDTH / stride)]
        assert feature.shape == [BATCH, channels, *sizes]
    for path in model.feature_info.module_name():
        assert path in dict(model.named_sublayers())
    sum(f.square().sum() for f in features).backward()
    for path, parameter in model.named_parameters():
        assert parameter.stop_gradient or parameter.grad is not None, path


@pytest.mark.parametrize("name", MODELS)
def test_some_feature_maps_are_the_same_and_the_rest_is_not_built(name):
    paddle.seed(0)
    whole = ppvision.create_model(name, features_only=True)
    part = ppvision.create_model(name, features_only=True, out_indices=(-3, -2))
    arrays = {key: t for key, t in whole.state_dict().items() if key in part.state_dict()}
    assert len(arrays) == len(part.state_dict()) < len(whole.state_dict())
    part.set_state_dict(arrays)
    whole.eval(), part.eval()
    expected = whole(picture())[-3:-1]
    found = part(picture())
    assert [f.shape[1] for f in found] == part.feat_channels == whole.feat_channels[-3:-1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_is_features_and_head(name):
    paddle.seed(0)
    model = ppvision.create_model(name, num_classes=7)
    model.eval()
    features = model.forward_features(picture())
    assert features.shape[:2] == [BATCH, model.num_features]
    pooled = model.forward_head(features, pre_logits=True)
    np.testing.assert_allclose(pooled.numpy(), features.numpy().mean((2, 3)), rtol=1e-5)
    logits = model(picture()).numpy()
    np.testing.assert_array_equal(model.forward_head(features).numpy(), logits)
    head = getattr(model, model.classifier)
    by_hand = pooled.numpy().astype(np.float64) @ head.weight.numpy() + head.bias.numpy()
    np.testing.assert_allclose(logits, by_hand, rtol=1e-4, atol=1e-4)
    model.reset_classifier(0)
    np.testing.assert_array_equal(model(picture()).numpy(), pooled.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_no_head_and_a_new_head(name):
    model = ppvision.create_model(name, num_classes=0)
    assert model(picture()).shape == [BATCH, model.num_features]
    assert not [key for key in model.state_dict() if key.startswith(f"{model.classifier}.")]
    model.reset_classifier(4)
    assert model.num_classes == model.pretrained_cfg.num_classes == 4
    assert model(picture()).shape == [BATCH, 4]
    fresh = ppvision.create_model(name, num_classes=4)
    assert model.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(name, channels):
    model = ppvision.create_model(name, in_channels=channels, num_classes=3)
    assert model(picture(channels)).shape == [BATCH, 3]
    config = model.pretrained_cfg
    assert config.input_size[0] == len(config.mean) == len(config.std) == channels
    rgb = ppvision.model_card(name).config
    if channels == 1:
        assert config.mean == pytest.approx([np.mean(rgb.mean)])
    else:
        assert config.std == (*rgb.std, *rgb.std[:2])


def test_whole_numbers_of_numpy_count():
    model = create("resnet20", num_classes=np.int64(5), in_channels=np.int32(2))
    assert model(picture(2)).shape == [BATCH, 5]
    model.reset_classifier(np.uint8(3))
    assert model(picture(2)).shape == [BATCH, 3]
    maps = create("resnet20", features_only=True, out_indices=np.array([0, 2]))
    assert maps.out_indices == (0, 2)
    assert create("resnet20", features_only=True, out_indices=(-2, -1)).out_indices == (1, 2)


@pytest.mark.parametrize("name", MODELS)
def test_weight_decay_spares_trained_norms_and_biases_only(name):
    model = create(name, num_classes=2)
    trained = {n for n, p in model.named_parameters() if not p.stop_gradient and p.ndim == 1}
    assert model.no_weight_decay() == trained


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_gives_the_same_gradients(name):
    plain = create(name, features_only=True)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    for model in (plain, again):
        paddle.seed(1)
        sum(f.square().mean() for f in model(picture())).backward()
    for (path, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        if not one.stop_gradient:
            np.testing.assert_allclose(
                other.grad.numpy(), one.grad.numpy(), rtol=1e-3, atol=1e-4, err_msg=path
            )
        else:  # statistics count one pass, not two
            np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_layer_groups_are_every_parameter_once_from_the_picture_on(name):
    model = ppvision.create_model(name)
    groups = model.layer_groups()
    names = [path for group in groups for path in group]
    assert sorted(names) == sorted(path for path, _ in model.named_parameters())
    assert all(groups)
    assert f"{model.first_conv}.weight" in groups[0]
    assert f"{model.classifier}.weight" in groups[-1]


@pytest.mark.parametrize("name", MODELS)
def test_frozen_stages_stay_as_they_are(name):
    """Inside of another model, whose train() reaches every layer."""
    net = create(name, features_only=True, frozen_stages=1)
    around = paddle.nn.Sequential(net)
    around.train()
    before = {path: tensor.numpy().copy() for path, tensor in net.state_dict().items()}
    optimizer = paddle.optimizer.AdamW(0.01, parameters=around.parameters())
    sum(f.square().mean() for f in around(picture())).backward()
    optimizer.step()
    changed = {
        path
        for path, tensor in net.state_dict().items()
        if not np.array_equal(tensor.numpy(), before[path])
    }
    groups = net.layer_groups()
    second = next(i for i, g in enumerate(groups) if net._declared[1].groups[0][-1] in g[-1])
    frozen = {path for group in groups[:second] for path in group}
    assert frozen
    assert not frozen & changed
    rest = {path for path in before if path not in frozen}
    assert rest - changed == {path for path in rest - changed if ".key.2.bias" in path}


@pytest.mark.parametrize("name", MODELS)
def test_what_follows_frozen_stages_is_trained_while_recomputing(name):
    net = create(name, num_classes=2, frozen_stages=1, recompute=True)
    net.train()
    net(picture()).square().sum().backward()
    missing = [n for n, p in net.named_parameters() if not p.stop_gradient and p.grad is None]
    assert not missing


def test_a_dropout_out_of_range():
    with pytest.raises(ValueError, match="drop_rate"):
        ppvision.create_model("efficientnet_lite0", drop_rate=2)


@pytest.mark.parametrize("name", MODELS)
def test_norms_in_evaluation_use_and_keep_their_statistics(name):
    net = create(name, num_classes=2, norm_eval=True)
    statistics = {k: t.numpy().copy() for k, t in net.state_dict().items() if "_mean" in k}
    net.train()
    net(picture()).sum().backward()
    assert statistics
    for path, before in statistics.items():
        np.testing.assert_array_equal(net.state_dict()[path].numpy(), before)
    norms = [n for n in net.sublayers() if isinstance(n, paddle.nn.BatchNorm2D)]
    assert all(np.abs(n.weight.grad.numpy()).max() > 0 for n in norms)  # still trained


@pytest.mark.parametrize(
    ("options", "token"),
    [
        (dict(num_classes=-1), "num_classes"),
        (dict(num_classes=True), "num_classes"),
        (dict(in_channels=0), "in_channels"),
        (dict(out_indices=(0, 1)), "features_only"),
        (dict(features_only=True, out_indices=(1, 0)), "out_indices"),
        (dict(features_only=True, out_indices=(0, 9)), "out_indices"),
        (dict(features_only=True, out_indices=()), "out_indices"),
        (dict(features_only=True, out_indices=2), "out_indices"),
        (dict(frozen_stages=9), "frozen_stages"),
        (dict(frozen_stages="2"), "frozen_stages"),
    ],
)
@pytest.mark.parametrize("name", ["pale_nano", "resnet20", "efficientnet_lite0"])
def test_wrong_options_are_named(name, options, token):
    with pytest.raises(ValueError, match=token):
        ppvision.create_model(name, **options)


def test_a_pyramid_has_no_head():
    model = ppvision.create_model("resnet20", features_only=True)
    with pytest.raises(ValueError, match="features_only"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="features_only"):
        model.forward_head(model(picture())[-1])


def test_flags_are_flags():
    with pytest.raises(TypeError, match="enable"):
        ppvision.create_model("resnet20").set_grad_checkpointing("no")
    with pytest.raises(TypeError, match="fused"):
        ppvision.create_model("pale_nano", fused="a")
