import numpy as np
import paddle
import pytest
from paddle import nn

import ppvision
from ppvision.models.pale_transformer import (
    VARIANTS,
    PaleBlock,
    PaleConfig,
    PaleTransformer,
    multiply_adds,
)
from ppvision.nn import DropPath, PaleAttention
from ppvision.nn.pale_attention import device_has_fused_attention
from tests.helpers.messages import raises_naming
from tests.helpers.reference_pale import pale_block, pale_transformer

# From the paper's table (docs/pale.md): trainable parameters, with BatchNorm's statistics, and
# multiply-adds at 224.
SIZES = {
    "pale_tiny": (21_748_712, 21_781_736, 4_202_551_296),
    "pale_small": (48_308_200, 48_357_736, 8_977_204_224),
    "pale_base": (85_324_776, 85_390_824, 15_534_108_672),
}
ZOO = ppvision.list_models("pale*")


def count(parameters) -> int:
    return sum(int(np.prod(p.shape)) for p in parameters)


def counted_multiply_adds(model: nn.Layer, shape: list[int]) -> int:
    """Multiply-adds seen by hooks on every convolution, Linear and attention product."""
    total = 0

    def pointwise(layer, inputs, output):
        nonlocal total
        per_output = int(np.prod(layer.weight.shape[1:]))
        if isinstance(layer, nn.Linear):
            per_output = layer.weight.shape[0]
        total += int(np.prod(output.shape)) * per_output

    def products(layer, inputs, output):
        nonlocal total
        _, channels, height, width = inputs[0].shape
        rows, columns = layer.pale_size
        height, width = -(-height // rows) * rows, -(-width // columns) * columns
        for tokens in (rows * width, columns * height):  # each half: scores, then values
            total += 2 * height * width * tokens * channels // 2

    for layer in model.sublayers():
        if isinstance(layer, (nn.Conv2D, nn.Linear)):
            layer.register_forward_post_hook(pointwise)
        if isinstance(layer, PaleAttention):
            layer.register_forward_post_hook(products)
    model.eval()
    with paddle.no_grad():
        model(paddle.zeros(shape))
    return total


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    model = ppvision.create_model(name)
    trainable, everything, operations = SIZES[name]
    assert count(p for p in model.parameters() if not p.stop_gradient) == trainable
    assert count(model.parameters()) == everything
    assert multiply_adds(VARIANTS[name], 224, 224) == operations
    assert ppvision.model_card(name).parameters == trainable


def test_nano_is_small():
    trainable = count(p for p in ppvision.create_model("pale_nano").parameters() if p.trainable)
    assert 1_000_000 < trainable < 2_000_000
    assert trainable == ppvision.model_card("pale_nano").parameters


@pytest.mark.parametrize("size", [(224, 224), (112, 137)])
def test_formula_equals_what_layers_do(size):
    model = ppvision.create_model("pale_nano", num_classes=10)
    expected = multiply_adds(VARIANTS["pale_nano"], *size, num_classes=10)
    assert counted_multiply_adds(model, [1, 3, *size]) == expected


def upernet_multiply_adds(channels: tuple[int, ...], height: int, width: int) -> int:
    """UPerNet (512 channels, 150 classes) with its auxiliary head, as in mmsegmentation."""
    areas = [(height // s) * (width // s) for s in (4, 8, 16, 32)]
    width_ = 512
    total = sum(a * c * width_ for a, c in zip(areas[:3], channels[:3], strict=True))  # laterals
    total += sum(bins**2 * channels[3] * width_ for bins in (1, 2, 3, 6))  # pooled
    total += areas[3] * 9 * (channels[3] + 4 * width_) * width_  # pooling bottleneck
    total += sum(areas[:3]) * 9 * width_ * width_  # pyramid
    total += areas[0] * 9 * 4 * width_ * width_  # fusion
    total += areas[0] * width_ * 150
    total += areas[2] * 256 * (9 * channels[2] + 150)  # auxiliary head
    return total


def mask_rcnn_multiply_adds(channels: tuple[int, ...], height: int, width: int) -> int:
    """FPN, RPN, 1000 boxes and 100 masks, as in mmdetection's counting script."""
    areas = [(height // s) * (width // s) for s in (4, 8, 16, 32)]
    total = sum(a * c * 256 for a, c in zip(areas, channels, strict=True))
    total += sum(areas) * 9 * 256 * 256
    with_p6 = sum(areas) + -(-height // 64) * -(-width // 64)
    total += with_p6 * (9 * 256 * 256 + 256 * 3 + 256 * 12)
    total += 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 80 * 4))
    total += 100 * (4 * 14 * 14 * 9 * 256 * 256 + 14 * 14 * 4 * 256 * 256 + 28 * 28 * 256 * 80)
    return total


@pytest.mark.parametrize(
    ("name", "upernet", "mask_rcnn"),
    [("pale_tiny", 996, 306), ("pale_small", 1135, 432), ("pale_base", 1311, 595)],
)
def test_published_downstream_costs(name, upernet, mask_rcnn):
    config = VARIANTS[name]
    channels = config.stage_channels
    for published, head, size in (
        (upernet, upernet_multiply_adds, (512, 2048)),
        (mask_rcnn, mask_rcnn_multiply_adds, (800, 1280)),
    ):
        ours = multiply_adds(config, *size, num_classes=None) + head(channels, *size)
        assert ours / 1e9 == pytest.approx(published, rel=0.01)


def randomised(model: nn.Layer) -> nn.Layer:
    """Give every parameter and statistic a value that matters; evaluation mode."""
    rng = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        values = rng.normal(size=tensor.shape).astype("float32")
        if name.endswith("_variance"):
            values = np.abs(values) + 0.5
        elif tensor.ndim > 1:  # a variance of one where many inputs are summed
            fan_in = tensor.shape[0] if tensor.ndim == 2 else np.prod(tensor.shape[1:])
            values /= np.sqrt(fan_in)
        tensor.set_value(values)
    model.eval()
    return model


def assert_close(outputs: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for out, reference in zip(outputs, expected, strict=True):
        assert out.shape == reference.shape
        assert np.abs(reference).max() > 0.5
        # GELU by its tanh formula is 3e-5 off or more; float32 itself 2e-7.
        assert np.abs(out - reference).max() / np.abs(reference).max() < 1e-5


def test_block_equals_the_definition():
    block = randomised(PaleBlock(8, 4, (3, 2), 4, 0.0, mask_padding=True, fused=None))
    x = np.random.default_rng(1).normal(size=(2, 8, 7, 9))
    out = block(paddle.to_tensor(x, "float32")).numpy()
    assert_close(list(out), [pale_block(picture, block) for picture in x])


@pytest.mark.parametrize("features_only", [False, True])
def test_backbone_equals_the_definition(features_only):
    config = PaleConfig(8, (1, 1, 1, 1), (2, 2, 2, 2), 0.0, pale_size=3)
    model = randomised(PaleTransformer(config, num_classes=5, features_only=features_only))
    x = np.random.default_rng(2).normal(size=(3, 32, 40))
    out = model(paddle.to_tensor(x[None], "float32"))
    outputs = [o.numpy()[0] for o in (out if features_only else [out])]
    assert len(outputs) == (4 if features_only else 1)
    assert_close(outputs, pale_transformer(x, model))


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle has CUDA")
def test_fused_attention_is_not_taken_on_a_cpu():
    assert device_has_fused_attention() is False


# The larger two by --all: they are pale_tiny and pale_nano with more of the same blocks.
BY_SIZE = [
    pytest.param(name, marks=pytest.mark.all if name in ("pale_small", "pale_base") else ())
    for name in ZOO
]


@pytest.mark.parametrize("name", BY_SIZE)
def test_every_model_trains_one_step(name):
    """A gradient for every parameter at step 0, and none of them zero after one step."""
    paddle.seed(0)
    model = ppvision.create_model(name, num_classes=5, drop_path_rate=0.0)
    trainable = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.01, parameters=model.parameters())
    x, y = paddle.randn([2, 3, 70, 64]), paddle.to_tensor([1, 3])
    for step in range(2):
        nn.functional.cross_entropy(model(x), y).backward()
        without = [n for n, p in trainable if p.grad is None]
        assert not without
        if step == 1:
            # A bias of the keys shifts all scores of a query alike: softmax does not see it.
            zero = [n for n, p in trainable if not p.grad.numpy().any() and ".key.2.bias" not in n]
            assert not zero
        optimizer.step()
        optimizer.clear_grad()


@pytest.mark.parametrize("name", BY_SIZE)
def test_every_model_gives_features_of_odd_sizes(name):
    model = ppvision.create_model(name, features_only=True)
    model.eval()
    sizes = [(112, 137)] if name != "pale_nano" else [(511, 511), (112, 137), (1, 1), (33, 7)]
    for height, width in sizes:
        with paddle.no_grad():
            features = model(paddle.randn([1, 3, height, width]))
        for feature, channels, stride in zip(
            features, model.feat_channels, model.feat_strides, strict=True
        ):
            assert feature.shape == [1, channels, -(-height // stride), -(-width // stride)]
            assert np.isfinite(feature.numpy()).all()


def test_recompute_changes_memory_not_numbers(monkeypatch):
    from paddle.distributed.fleet import utils

    recomputed, original = [], utils.recompute

    def counted(function, *args):
        recomputed.append(function)
        return original(function, *args)

    monkeypatch.setattr(utils, "recompute", counted)
    results = []
    for recompute in (False, True):
        paddle.seed(7)
        model = ppvision.create_model(
            "pale_nano", num_classes=4, recompute=recompute, drop_path_rate=0.2
        )
        model.train()
        paddle.seed(8)
        x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 64, 64)), "float32")
        model(x).square().sum().backward()
        gradients = [p.grad.numpy() for p in model.parameters() if not p.stop_gradient]
        statistics = [p.numpy() for p in model.parameters() if p.stop_gradient]
        results.append(gradients + statistics)
    assert len(recomputed) == sum(VARIANTS["pale_nano"].depths)
    for plain, again in zip(*results, strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_rises_to_the_given_rate_and_rests_in_evaluation():
    model = ppvision.create_model("pale_tiny", drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 22))
    nano = ppvision.create_model("pale_nano", num_classes=3, drop_path_rate=0.5)
    x = paddle.randn([4, 3, 32, 32])
    nano.eval()
    np.testing.assert_array_equal(nano(x).numpy(), nano(x).numpy())
    nano.train()
    assert np.abs((nano(x) - nano(x)).numpy()).max() > 0


def test_drop_path_keeps_the_expectation_and_drops_whole_samples():
    paddle.seed(0)
    layer = DropPath(0.3)
    layer.train()
    kept = layer(paddle.ones([20_000, 2, 3])).numpy()
    assert (kept == kept[:, :1, :1]).all()  # one draw a sample
    values, counts = np.unique(kept[:, 0, 0], return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.7], rtol=1e-6)
    # The deviation of the mean is sqrt(0.3 / 0.7 / 20000) = 0.0046.
    assert kept.mean() == pytest.approx(1, abs=0.025)
    assert counts[0] / counts.sum() == pytest.approx(0.3, abs=0.02)


def test_drop_path_stands_on_both_branches():
    """Each sample of a block is one of four: attention kept or not, MLP kept or not."""
    paddle.seed(0)
    block = randomised(PaleBlock(8, 2, 3, 4, 0.5, mask_padding=True, fused=None))
    x = paddle.randn([1, 8, 4, 5])
    positioned = x + block.position(x)
    attended = positioned + 2 * block.attention(block.norm1(positioned))  # 2 = 1 / (1 - 0.5)
    expected = [
        *(positioned, positioned + 2 * block.mlp(block.norm2(positioned))),
        *(attended, attended + 2 * block.mlp(block.norm2(attended))),
    ]
    block.drop_path.train()  # BatchNorm stays in evaluation mode
    out = block(x.expand([64, -1, -1, -1])).numpy()
    nearest = np.stack([np.abs(out - e.numpy()).max(axis=(1, 2, 3)) for e in expected])
    assert nearest.min(axis=0).max() < 1e-3
    # 16 of 64 of each kind are expected, with a deviation of 3.5.
    assert np.bincount(nearest.argmin(axis=0), minlength=4).min() >= 4


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (dict(num_classes=-1), "num_classes:"),
        (dict(in_channels="three"), "in_channels:"),
        (dict(drop_path_rate=1.5), "drop_path_rate:"),
        (dict(pale_size=0), "pale_size"),
    ],
)
def test_wrong_options_say_what_was_expected(options, tokens):
    with raises_naming(ValueError, *tokens.split()):
        ppvision.create_model("pale_nano", **options)


def test_other_sizes_and_pale_sizes_build():
    config = PaleConfig(16, (1, 1, 1, 1), (2, 2, 2, 2), 0.0, pale_size=(4, 2))
    model = PaleTransformer(config, num_classes=2, in_channels=1)
    assert model(paddle.randn([2, 1, 50, 40])).shape == [2, 2]
    assert counted_multiply_adds(model, [1, 1, 50, 40]) == multiply_adds(
        config, 50, 40, num_classes=2, in_channels=1
    )
