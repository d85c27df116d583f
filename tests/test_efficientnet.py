"""EfficientNet-Lite and the reading of its published weights."""

import collections
import pickle
import struct

import numpy as np
import paddle
import pytest
from paddle import nn

import ppvision
from benchmark.sdn_boundary import multiply_adds, trained_size
from ppvision.deploy import Predictor, export_model
from ppvision.errors import WeightsError
from ppvision.models.efficientnet_lite import VARIANTS, ConvNorm, EfficientNetLite
from ppvision.zoo.torch_files import convert_to_paddle, read_pth

ZOO = ppvision.list_models("efficientnet*")


@pytest.mark.parametrize("name", ZOO)
def test_cards_tell_the_sizes(name):
    model, card = ppvision.create_model(name), ppvision.model_card(name)
    assert trained_size(model) == card.parameters
    assert round(multiply_adds(model, 224) / 1e9, 3) == card.gflops


def test_channels_are_multiples_of_eight_near_the_factor():
    found = {
        name: list(dict.fromkeys(channels for *_, channels in config.blocks))
        for name, config in VARIANTS.items()
    }
    assert found["efficientnet_lite0"] == [16, 24, 40, 80, 112, 192, 320]
    assert found["efficientnet_lite2"] == [16, 24, 48, 88, 120, 208, 352]  # times 1.1


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (5, 6)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_tensorflows(shape, kernel, stride):
    """Against a loop over the definition: out(p) reads from p * stride - total // 2 on."""
    paddle.seed(0)
    layer = ConvNorm(2, 3, kernel, stride, 1, act=False)
    layer.eval()
    x = np.random.default_rng(1).normal(size=(1, 2, *shape)).astype(np.float32)
    out = layer(paddle.to_tensor(x)).numpy()
    sizes = [-(-side // stride) for side in shape]
    assert out.shape == (1, 3, *sizes)
    befores = [
        max(0, (size - 1) * stride + kernel - side) // 2
        for side, size in zip(shape, sizes, strict=True)
    ]
    weight = layer.conv.weight.numpy().astype(np.float64)
    expected = np.zeros(out.shape)
    for i, j in np.ndindex(*sizes):
        for a, b in np.ndindex(kernel, kernel):
            y, z = i * stride - befores[0] + a, j * stride - befores[1] + b
            if 0 <= y < shape[0] and 0 <= z < shape[1]:
                expected[0, :, i, j] += weight[:, :, a, b] @ x[0, :, y, z].astype(np.float64)
    np.testing.assert_allclose(out, expected / np.sqrt(1 + 1e-3), atol=1e-5)


def test_every_parameter_gets_a_gradient_at_odd_sizes():
    paddle.seed(0)
    model = ppvision.create_model("efficientnet_lite0", num_classes=5, drop_path_rate=0.0)
    out = model(paddle.randn([2, 3, 69, 50]))
    assert out.shape == [2, 5]
    out.square().sum().backward()
    for path, parameter in model.named_parameters():
        if not parameter.stop_gradient:
            assert np.abs(parameter.grad.numpy()).max() > 0, path


def test_wrong_options():
    assert ppvision.create_model("efficientnet_lite0", num_classes=2, in_channels=1)
    for options in (
        dict(num_classes=-1),
        dict(in_channels=True),
        dict(drop_rate=1),
        dict(drop_path_rate="0.1"),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}:"):
            ppvision.create_model("efficientnet_lite2", **options)


def test_an_export_gives_the_models_numbers(tmp_path):
    paddle.seed(0)
    model = ppvision.create_model("efficientnet_lite2", num_classes=4)
    for layer in model.sublayers():  # statistics of one batch, so that nothing vanishes
        if isinstance(layer, nn.BatchNorm2D):
            layer._momentum = 0.0
    model(paddle.randn([4, 3, 64, 64]))
    model.eval()
    export_model(
        model,
        tmp_path / "m",
        input_shape=[None, 3, None, None],
        output_op="none",
        task="classification",
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 67, 58)).astype(np.float32)
    expected = model(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(Predictor(tmp_path / "m").run(x)[0], expected, rtol=1e-3, atol=1e-3)


# -- files of PyTorch -----------------------------------------------------------------------------


class _Global:
    """Pickled as the name of something that need not be installed."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _TorchPickler(pickle._Pickler):
    """Writes what `torch.save` wrote before 1.6: names of its functions, storages by key."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Tensor):
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            kind = "FloatStorage" if obj.array.dtype == np.float32 else "LongStorage"
            steps = tuple(s // obj.array.itemsize for s in obj.array.strides)
            self.write(pickle.MARK)
            self.write(pickle.MARK)
            for part in ("storage", _Global("torch", kind), obj.key, "cpu", obj.array.size):
                self.save(part)
            self.write(pickle.TUPLE + pickle.BINPERSID)
            for part in (0, obj.array.shape, steps, False, collections.OrderedDict()):
                self.save(part)
            self.write(pickle.TUPLE + pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class _Tensor:
    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array


def write_pth(path, tensors: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(head, file, protocol=2)
        keyed = {name: _Tensor(str(k), array) for k, (name, array) in enumerate(tensors.items())}
        _TorchPickler(file, protocol=2).dump(collections.OrderedDict(keyed))
        pickle.dump([tensor.key for tensor in keyed.values()], file, protocol=2)
        for array in tensors.values():
            file.write(struct.pack("<q", array.size) + array.tobytes(order="A"))


def test_tensors_come_out_of_a_pth(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "_conv_stem.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "_bn0.num_batches_tracked": np.array(7, np.int64),
        "_fc.weight": np.asfortranarray(rng.normal(size=(5, 4)).astype(np.float32)),
    }
    write_pth(tmp_path / "x.pth", tensors)
    found = read_pth(tmp_path / "x.pth")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
    ours = convert_to_paddle(found, EfficientNetLite.torch_names)
    assert ours.keys() == {"stem.conv.weight", "head.weight"}
    np.testing.assert_array_equal(ours["head.weight"], tensors["_fc.weight"].T)


def test_a_pth_cannot_run_code(tmp_path):
    with (tmp_path / "x.pth").open("wb") as file:
        for head in (1, 2, {}):
            pickle.dump(head, file, protocol=2)
        file.write(b"\x80\x02cos\nsystem\n(X\x05\x00\x00\x00touchtR.")
    with pytest.raises(WeightsError, match=r"os\.system"):
        read_pth(tmp_path / "x.pth")
