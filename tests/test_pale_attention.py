import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppvision.nn import PaleAttention, pale_merge, pale_partition
from tests.helpers.messages import raises_naming
from tests.helpers.reference_pale import pale_attention, parameters_of


def randomised(layer: PaleAttention, seed: int) -> PaleAttention:
    """Give every parameter and statistic a value that matters."""
    rng = np.random.default_rng(seed)
    for name, tensor in layer.state_dict().items():
        values = rng.normal(size=tensor.shape).astype("float32")
        tensor.set_value(np.abs(values) + 0.5 if name.endswith("_variance") else 0.5 * values)
    layer.eval()
    return layer


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    pale_size=st.integers(1, 9),
    axis=st.sampled_from([2, 3, -2, -1]),
)
@settings(max_examples=60, deadline=None)
def test_merge_is_the_inverse_of_partition(batch, channels, height, width, pale_size, axis):
    x = paddle.randn([batch, channels, height, width])
    groups = pale_partition(x, pale_size, axis)
    length, other = (height, width) if axis in (2, -2) else (width, height)
    assert groups.shape == [batch * -(-length // pale_size), channels, pale_size * other]
    back = pale_merge(groups, pale_size, axis, height, width)
    np.testing.assert_array_equal(back.numpy(), x.numpy())


def test_rows_of_a_group_are_interlaced():
    x = paddle.arange(6, dtype="float32").reshape([1, 1, 6, 1]).expand([1, 1, 6, 2])
    groups = pale_partition(x, 3, 2)  # 6 rows, 3 a pale: 2 groups
    assert groups.numpy()[:, 0, ::2].tolist() == [[0, 2, 4], [1, 3, 5]]
    columns = pale_partition(x.transpose([0, 1, 3, 2]), 2, 3)  # 6 columns, 2 a pale: 3 groups
    assert columns.numpy()[:, 0, :2].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "pale_size", "heads"),
    [
        (14, 14, 7, 2),  # nothing to pad
        (9, 13, 7, 4),  # both axes padded
        (15, 8, (3, 5), 2),  # rows and columns differ, columns padded
        (5, 3, 7, 2),  # smaller than one pale
        (1, 1, 2, 2),
    ],
)
def test_equals_the_definition(height, width, pale_size, heads, mask_padding):
    layer = randomised(PaleAttention(8, heads, pale_size, mask_padding=mask_padding), seed=height)
    x = np.random.default_rng(1).normal(size=(2, 8, height, width))
    out = layer(paddle.to_tensor(x.astype("float32"))).numpy()
    sizes = layer.pale_size
    expected = np.stack(
        [pale_attention(x_, parameters_of(layer), heads, sizes, mask_padding) for x_ in x]
    )
    error = np.abs(out - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_masking_matters_where_something_is_padded():
    masked = randomised(PaleAttention(8, 2, 7), seed=0)
    unmasked = PaleAttention(8, 2, 7, mask_padding=False)
    unmasked.set_state_dict(masked.state_dict())
    unmasked.eval()
    padded, whole = paddle.randn([1, 8, 9, 9]), paddle.randn([1, 8, 14, 14])
    assert np.abs((masked(padded) - unmasked(padded)).numpy()).max() > 1e-3
    np.testing.assert_allclose(masked(whole).numpy(), unmasked(whole).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(14, 14), (9, 13)])
def test_fused_attention_gives_the_same_numbers_and_gradients(size):
    plain = randomised(PaleAttention(32, 4, 7, fused=False), seed=3)
    fused = PaleAttention(32, 4, 7, fused=True)
    fused.set_state_dict(plain.state_dict())
    fused.eval()
    results = []
    for layer in (plain, fused):
        x = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 32, *size)), "float32")
        x.stop_gradient = False
        out = layer(x)
        (out**2).sum().backward()
        results.append((out.numpy(), x.grad.numpy()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        (dict(channels=8, num_heads=3), "num_heads even"),
        (dict(channels=10, num_heads=4), "channels: num_heads=4"),
        (dict(channels=8, num_heads=2, pale_size=0), "pale_size least 1"),
        (dict(channels=8, num_heads=2, pale_size=(7, -1)), "pale_size least 1"),
    ],
)
def test_wrong_options_say_what_was_expected(arguments, tokens):
    with raises_naming(ValueError, *tokens.split()):
        PaleAttention(**arguments)


def test_wrong_tensors_say_what_was_expected():
    with pytest.raises(ValueError, match="axis"):
        pale_partition(paddle.zeros([1, 1, 2, 2]), 1, 1)
    with raises_naming(ValueError, "[B,", "C,", "H,", "W]"):
        pale_partition(paddle.zeros([1, 2, 2]), 1, 2)
    with raises_naming(ValueError, "[B", "2,", "C,", "12]"):
        pale_merge(paddle.zeros([2, 1, 10]), 2, 2, 4, 6)
