"""The form of PS-Attention for graphs: the same numbers as the layer that is trained."""

import numpy as np
import paddle
import pytest
from paddle import inference, nn

import ppvision
from benchmark.deploy_steps import Grouped, TokenLast
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.write.graph import trace, write_graphs
from ppvision.forms.pale import GraphPaleAttention, from_groups, pale_form, to_groups
from ppvision.models.pale_transformer import PaleTransformer
from ppvision.nn import PaleAttention
from tests.helpers.small_pale import SMALL_PALE

SIZES = [(7, 7), (14, 21), (16, 9), (8, 15), (3, 5), (1, 1), (20, 13), (1, 30)]


@pytest.fixture(autouse=True)
def seed():
    paddle.seed(3)


def fresh(channels=16, heads=4, pale_size=7, **settings) -> PaleAttention:
    """Weights, biases and statistics that are all different from their first values."""
    layer = PaleAttention(channels, heads, pale_size, **settings)
    generator = np.random.default_rng(0)
    for name, tensor in layer.state_dict().items():
        values = generator.normal(size=tensor.shape)
        positive = name.endswith("_variance")
        tensor.set_value((np.abs(values) + 0.5 if positive else values).astype("float32"))
    layer.eval()
    return layer


def noise(*shape):
    return paddle.to_tensor(np.random.default_rng(1).normal(size=shape).astype("float32"))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pale_size", [7, (3, 4), 2])
def test_same_numbers_as_the_layer(size, pale_size):
    layer, x = fresh(pale_size=pale_size), noise(2, 16, *size)
    with paddle.no_grad():
        expected = layer(x).numpy()
        found = GraphPaleAttention(layer)(x).numpy()
    assert np.abs(found - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("form", [TokenLast, Grouped])
def test_steps_of_the_benchmark_are_the_layer_too(form):
    layer, x = fresh(), noise(1, 16, 9, 14)
    with paddle.no_grad():
        expected, found = layer(x).numpy(), form(layer)(x).numpy()
    assert np.abs(found - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("length", range(1, 31))
@pytest.mark.parametrize("rows", [True, False])
def test_groups_are_interlaced_lines_and_go_back(length, rows):
    """Of a map whose values are places: every group holds each N-th line, and no other."""
    height, width = (length, 3) if rows else (3, length)
    count = -(-length // 7)
    line = np.arange(length)[:, None] if rows else np.arange(length)[None, :]
    places = np.broadcast_to(line, (height, width)).astype("float32")
    x = paddle.to_tensor(np.stack([places, 100 + places, 200 + places])[None])
    sets = to_groups(x, 7, rows)
    found = [group[..., 0] for part in sets for group in part.numpy()[0]]  # [s, O] each
    assert [list(group[:, 0]) for group in found] == [
        list(range(first, length, count)) for first in range(count)
    ]
    assert all((group == group[:, :1]).all() for group in found)
    assert np.array_equal(from_groups(sets, height, width, rows).numpy(), x.numpy())


def test_model_is_as_before_even_after_an_error():
    model = ppvision.create_model("pale_nano", num_classes=3)
    before = [(name, id(layer)) for name, layer in model.named_sublayers()]

    def fail():
        with pale_form(model):
            assert any(isinstance(layer, GraphPaleAttention) for layer in model.sublayers())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(name, id(layer)) for name, layer in model.named_sublayers()] == before


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("pale_size", [7, (3, 4), 2])
@pytest.mark.parametrize("heads", [2, 4])
def test_same_numbers_with_the_mask_inside_of_the_product(size, pale_size, heads):
    layer, x = fresh(pale_size=pale_size, heads=heads), noise(2, 16, *size)
    with paddle.no_grad():
        expected = layer(x).numpy()
        found = GraphPaleAttention(layer)._attend_at_any_size(x).numpy()
    assert np.abs(found - expected).max() <= 5e-5 * max(1, np.abs(expected).max())


def test_padding_gets_no_attention_however_low_the_scores_are():
    """Keys of padding have scores of their own, which must not count beside scores of -500."""
    layer, x = fresh(), noise(1, 16, 9, 9)
    layer.query[2].weight.set_value(paddle.zeros_like(layer.query[2].weight))
    layer.key[2].weight.set_value(0.1 * layer.key[2].weight)
    layer.query[2].bias.set_value(paddle.full([16], -125.0))
    layer.key[2].bias.set_value(paddle.full([16], 2.0))  # 4 channels of a head: -125 * 2 * 4 / 2
    with paddle.no_grad():
        expected, found = layer(x).numpy(), GraphPaleAttention(layer)._attend_at_any_size(x).numpy()
    assert np.abs(found - expected).max() <= 1e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("shape", [[None, 3, None, None], [1, 3, None, 50], [1, 3, 50, None]])
@pytest.mark.parametrize("features", [False, True])
def test_exported_at_any_size(tmp_path, shape, features):
    model = PaleTransformer(SMALL_PALE, num_classes=5, features_only=features)
    model.eval()
    task = "features" if features else "classification"
    folder = export_model(model, tmp_path / "net", input_shape=shape, output_op="none", task=task)
    predictors = [Predictor(folder, use_onednn=onednn) for onednn in (True, False)]
    for size in ((64, 96), (50, 50), (1, 7), (131, 33)):
        size = tuple(n or free for n, free in zip(shape[2:], size, strict=True))
        x = noise(2 if shape[0] is None else 1, 3, *size)
        with paddle.no_grad():
            expected = model(x) if features else [model(x)]
        for predictor in predictors:
            for one, other in zip(predictor.run(x.numpy()), expected, strict=True):
                bound = 1e-4 * max(1, np.abs(other.numpy()).max())
                assert np.abs(one - other.numpy()).max() <= bound


def test_padding_that_takes_part_keeps_the_layer():
    model = nn.Sequential(fresh(mask_padding=False))
    with pale_form(model):
        assert isinstance(model[0], PaleAttention)


@pytest.mark.parametrize("size", [64, 50])
def test_exported_and_eager_agree(tmp_path, size):
    """At a size without padding in the first stages, and at one that pads everywhere."""
    model = PaleTransformer(SMALL_PALE, num_classes=5)
    model.eval()
    folder = export_model(
        model,
        tmp_path / "net",
        input_shape=[None, 3, size, size],
        output_op="none",
        task="classification",
    )
    x = noise(2, 3, size, size)
    with paddle.no_grad():
        expected = model(x).numpy()
    for onednn in (True, False):
        (found,) = Predictor(folder, use_onednn=onednn).run(x.numpy())
        assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("kept_apart", [False, True])
@pytest.mark.parametrize("size", [(9, 14), (14, 9)], ids=str)
def test_runs_with_all_passes_of_onednn(tmp_path, size, kept_apart):
    """As other programs run it, which turn none off; also where the attention stays in parts, as on
    processors without AVX-512."""
    layer, x = fresh(), noise(1, 16, *size)
    graph = trace(GraphPaleAttention(layer), [None, 16, *size], "none", every_output=False)
    write_graphs(graph, {tmp_path: None}, "paddle")
    config = inference.Config(str(tmp_path / "model.json"), str(tmp_path / "model.pdiparams"))
    config.disable_glog_info()
    config.enable_mkldnn()
    if kept_apart:
        config.delete_pass("self_attention_fuse_pass")
    engine = inference.create_predictor(config)
    (name,) = engine.get_input_names()
    engine.get_input_handle(name).copy_from_cpu(x.numpy())
    engine.run()
    found = engine.get_output_handle(engine.get_output_names()[0]).copy_to_cpu()
    with paddle.no_grad():
        expected = layer(x).numpy()
    assert np.abs(found - expected).max() <= 2e-5 * max(1, np.abs(expected).max())
