import pickle
import shutil
from collections import OrderedDict

import numpy as np
import paddle
import pytest
from paddle import nn

import ppvision
from ppvision.zoo import cards
from ppvision.zoo.registry import ModelCard, register_model
from ppvision.zoo.stored import is_here
from ppvision.zoo.weights import WeightsError, read_weights, save_weights
from tests.helpers.arrays import Hostile, arrays_of, assert_same
from tests.helpers.messages import raises_naming

NAME = "segformer_pale_nano.digit_scenes"
ZOO = ppvision.list_models()  # now: tests register models of their own


def small() -> nn.Layer:
    return nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.Linear(5, 2))


def test_lists_by_pattern():
    assert ppvision.list_models("pale*") == ["pale_base", "pale_nano", "pale_small", "pale_tiny"]
    assert ppvision.list_models("*_tiny") == ["pale_tiny"]
    assert ppvision.list_models("resnet*") == ["resnet18", "resnet20", "resnet50"]
    assert ppvision.list_models("vgg*") == []


def test_a_wrong_name_or_option_names_the_nearest():
    with raises_naming(ValueError, "'pale_tinny'", "pale_tiny"):
        ppvision.create_model("pale_tinny")
    with raises_naming(ValueError, "'swin'", "efficientnet_lite0"):
        ppvision.model_card("swin")
    with raises_naming(TypeError, "'num_class'", "num_classes"):
        ppvision.create_model("pale_nano", num_class=3)


def test_a_taken_name_is_refused():
    def other(**options):
        return small()

    card = ModelCard("pale_nano", paper="", parameters=0, gflops=0.0, recipe="")
    with raises_naming(ValueError, "'pale_nano'", "PaleTransformer"):
        register_model(card)(other)


def test_cards_say_what_was_measured():
    for name in ZOO:
        card = ppvision.model_card(name)
        papers = {"pale": "2112.14000", "resnet": "1512.03385", "efficientnet": "1905.11946"}
        (paper,) = (number for start, number in papers.items() if name.startswith(start))
        assert paper in card.paper
        assert card.gflops > 0
        if name != "pale_nano":
            assert card.measured == "not trained here"
            assert "top-1" in card.published


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_weights_come_back_bit_for_bit(tmp_path, suffix):
    source, target = small(), small()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pdparams":
        paddle.save(source.state_dict(), str(path))
    else:
        save_weights(arrays_of(source), path)
    ppvision.load_weights(target, path)
    assert_same(source, target)


def test_half_precision_weights_are_widened(tmp_path):
    source, target = small(), small()
    save_weights(
        {k: v.astype(np.float16) for k, v in arrays_of(source).items()}, tmp_path / "h.safetensors"
    )
    ppvision.load_weights(target, tmp_path / "h.safetensors")
    for name, array in arrays_of(target).items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, arrays_of(source)[name], rtol=1e-3, atol=1e-6)


def test_one_report_of_all_that_does_not_fit_and_nothing_is_touched(tmp_path):
    arrays = arrays_of(small())
    arrays["0.weight"] = np.zeros((4, 3, 5, 5), np.float32)
    arrays["extra"] = arrays.pop("2.bias")
    save_weights(arrays, tmp_path / "bad.safetensors")
    target = small()
    before = arrays_of(target)
    with pytest.raises(WeightsError) as caught:
        ppvision.load_weights(target, tmp_path / "bad.safetensors")
    for part in (
        "missing (1):\n    2.bias",
        "unexpected (1):\n    extra",
        "0.weight: expected [4, 3, 3, 3], got [4, 3, 5, 5]",
        "allow_missing",
    ):
        assert part in str(caught.value)
    for name, array in arrays_of(target).items():
        np.testing.assert_array_equal(array, before[name])


def test_another_number_of_classes_has_its_own_advice(tmp_path):
    save_weights(arrays_of(paddle.nn.Linear(4, 3)), tmp_path / "three.safetensors")
    with pytest.raises(WeightsError) as caught:
        ppvision.load_weights(paddle.nn.Linear(4, 5), tmp_path / "three.safetensors")
    assert "`model: {backbone: {pretrained: NAME}}`" in str(caught.value)
    save_weights({"weight": np.zeros((4, 3), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError) as caught:  # a layer is missing: another model
        ppvision.load_weights(paddle.nn.Linear(4, 5), tmp_path / "part.safetensors")
    assert "backbone" not in str(caught.value)


def test_exceptions_are_named(tmp_path):
    arrays = arrays_of(small())
    arrays["head.weight"] = np.zeros(3, np.float32)
    del arrays["2.bias"]
    save_weights(arrays, tmp_path / "w.safetensors")
    target = small()
    ppvision.load_weights(
        target, tmp_path / "w.safetensors", allow_missing=["2.*"], allow_unexpected=["head.*"]
    )
    np.testing.assert_array_equal(target[0].weight.numpy(), arrays["0.weight"])


@pytest.mark.parametrize("place", ["value", "root"])
def test_a_pickle_cannot_run_code(tmp_path, place):
    marker = tmp_path / "ran"
    hostile = Hostile(marker)
    content = {"weight": hostile} if place == "value" else hostile
    path = tmp_path / "evil.pdparams"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match="system'"):
        read_weights(path)
    assert not marker.exists()


def test_files_that_are_no_weights(tmp_path):
    with raises_naming(FileNotFoundError, "absent.pdparams", "zoo"):
        read_weights(tmp_path / "absent.pdparams")
    whole = pickle.dumps(OrderedDict(weight=np.ones(1000, np.float32)))
    cases = {
        "cut.pdparams": whole[:-20],
        "empty.pdparams": b"",
        "text.pdparams": b"<html>not found</html>",
        "list.pdparams": pickle.dumps([1, 2]),
        "objects.pdparams": pickle.dumps({"a": np.array([None, "x"], dtype=object)}),
        "text_arrays.pdparams": pickle.dumps({"a": np.array(["a", "b"])}),
        "torch.pdparams": b"PK\x03\x04" + bytes(100),
        "parts.pdparams": pickle.dumps({"UnpackBigParamInfor@@": {"a": {"slices": ["a@0"]}}}),
        "optimizer.pdparams": pickle.dumps({"model": {"a": np.ones(2)}}),
        "cut.safetensors": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
        "empty.safetensors": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)


def test_one_pattern_is_one_pattern(tmp_path):
    save_weights({"unrelated": np.ones(1, np.float32)}, tmp_path / "w.safetensors")
    with raises_naming(WeightsError, "missing", "(8)"):
        ppvision.load_weights(
            small(), tmp_path / "w.safetensors", allow_missing="weigh*", allow_unexpected="un*"
        )


@pytest.mark.parametrize(
    "array",
    [
        np.ones(2, np.uint16),  # how Paddle keeps bfloat16
        np.ones(2, np.complex64),
        np.array([True, False]),
        np.array([1e300, 1.0]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_numbers_of_another_kind_are_refused_and_nothing_is_touched(tmp_path, array):
    target = small()
    before = arrays_of(target)
    arrays = {k: v + 1 for k, v in before.items()} | {"2.bias": array}
    path = tmp_path / "w.pdparams"
    path.write_bytes(pickle.dumps(arrays))
    with raises_naming(WeightsError, "type", "(1):", "2.bias"):
        ppvision.load_weights(target, path)
    for name, values in arrays_of(target).items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_protocol_of_paddle_save_is_read(tmp_path, protocol):
    source, target = small(), small()
    paddle.save(source.state_dict(), str(tmp_path / "m.pdparams"), protocol=protocol)
    ppvision.load_weights(target, tmp_path / "m.pdparams")
    assert_same(source, target)


NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_array_comes_back_as_it_was(tmp_path, protocol):
    arrays = {
        "none": np.zeros((0, 3), np.float32),
        "one number": np.array(3.0),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i2"),
        "strides": np.arange(16).reshape(4, 4)[:, ::2],
        "scalar": np.float32(1.5),
        **{kind: np.random.default_rng(0).integers(0, 2, (2, 3)).astype(kind) for kind in NUMBERS},
    }
    content = OrderedDict(arrays, pair=("its name", arrays["f4"]), same=arrays["f8"])
    (tmp_path / "m.pdparams").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_weights(tmp_path / "m.pdparams")
    assert list(found) == list(content)
    for name, array in {**arrays, "pair": arrays["f4"], "same": arrays["f8"]}.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == np.shape(array)
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_are_read_as_paddle_reads_them(tmp_path, protocol):
    path = str(tmp_path / "m.pdparams")
    tensors = {
        kind: paddle.to_tensor([[1.0, 0.0, 3.0]]).astype(kind)
        for kind in ("bool", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
    }
    tensors |= {"none": paddle.zeros([0, 3]), "one": paddle.to_tensor(2.0)}
    paddle.save(tensors, path, protocol=protocol)
    expected, found = paddle.load(path, return_numpy=True), read_weights(path)
    assert found.keys() == expected.keys() == tensors.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    paddle.save({"nested": [tensors["one"]], "a": tensors["float32"]}, path, protocol=protocol)
    with raises_naming(WeightsError, "list", "'nested'"):
        read_weights(path)


def test_safetensors_of_paddle_save_are_read(tmp_path):
    path = str(tmp_path / "m.pdparams")
    paddle.save({"a": paddle.arange(3)}, path, safetensors=True)
    np.testing.assert_array_equal(read_weights(path)["a"], [0, 1, 2])


@pytest.mark.parametrize("file", ["manifest.json", "w4.safetensors"])
def test_a_changed_file_of_the_zoo_is_refused(tmp_path, monkeypatch, file):
    folder = tmp_path / NAME
    shutil.copytree(cards.WEIGHTS_FOLDER / NAME, folder)
    data = bytearray((folder / file).read_bytes())
    data[-2] ^= 1
    (folder / file).write_bytes(data)
    monkeypatch.setattr(cards, "WEIGHTS_FOLDER", tmp_path)
    with raises_naming(WeightsError, file, "sha256"):
        read_weights(NAME)


def test_truncated_safetensors_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": np.ones(1000, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with raises_naming(WeightsError, "w.safetensors", "cut"):
        read_weights(path)


def test_nothing_half_written(tmp_path):
    class Unwritable:
        def __array__(self, *args, **kwargs):
            raise OSError("disk full")

    with raises_naming(OSError, "disk", "full"):
        save_weights({"a": Unwritable()}, tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_zoo_are_small_and_as_their_cards_say():
    shown = {
        name: card
        for model in ppvision.list_models()
        for name, card in ppvision.model_card(model).weights.items()
    }
    assert shown == cards.ZOO_WEIGHTS
    assert NAME in shown
    for name, card in shown.items():
        assert name == card.name
        files = [path for path in card.folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 4e6
        for text in (card.command, card.score, card.data, card.parts):
            assert text
        if not card.package:
            assert card.hours > 0
            limited = "ImageNet's terms for the initial weights" in card.config.licence
            assert limited == ("non-commercial" in card.initialised_from)
        if is_here(card):
            assert read_weights(name)  # checks the sha256


def test_all_names_of_weights_are_one():
    expected = read_weights(NAME)
    for alias in ("pale_nano_digit_scenes", "pale_nano.digit_scenes"):
        found = read_weights(alias)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_a_layered_model_is_read_as_float_weights_of_its_highest_width():
    from ppvision.quant import load_layered

    folder = cards.WEIGHTS_FOLDER / NAME
    found, expected = read_weights(folder), load_layered(folder, 8).state_dict
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_whole_model_for_a_backbone_is_refused_with_the_way_out(tmp_path):
    """A file, that is: of a name of the zoo the backbone is taken."""
    save_weights(read_weights(NAME), tmp_path / "whole.safetensors")
    net = ppvision.create_model("pale_nano")
    with raises_naming(WeightsError, "'backbone.':", "create_model(NAME,"):
        ppvision.load_weights(net, tmp_path / "whole.safetensors")
