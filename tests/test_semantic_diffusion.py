"""The semantic difference convolution against loops in float64, its properties, its gradients."""

import functools

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.distributed.fleet.utils import recompute
from paddle.static import InputSpec

from ppvision.deploy import Predictor, export_model
from ppvision.forms.differences import (
    GraphSemanticDifference,
    difference_form,
    sum_of_differences,
)
from ppvision.nn import SemanticDifferenceConv2D, SemanticDiffusion, SemanticDiffusionPyramid
from ppvision.nn import semantic_diffusion as module
from ppvision.nn.semantic_diffusion import SIMILARITIES, semantic_difference
from tests.helpers import reference_sdn as reference
from tests.helpers.messages import raises_naming

NAMES = list(SIMILARITIES)
BOUNDED = [name for name in NAMES if name != "product"]  # whatever the guidance is
DECREASING = ("charbonnier", "gaussian", "perona_malik")


def maps(seed: int, *shapes, dtype="float64"):
    rng = np.random.default_rng(seed)
    found = [paddle.to_tensor(rng.normal(size=shape), dtype=dtype) for shape in shapes]
    for tensor in found:
        tensor.stop_gradient = False
    return found


def guide(v, name):
    return None if name == "none" else v


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "height", "width"),
    [(3, 5, 1, 4, 6), (4, 6, 2, 5, 3), (4, 4, 4, 3, 3), (2, 3, 1, 1, 1), (2, 2, 1, 1, 5)],
)
def test_equal_to_loops_in_float64(name, channels, outputs, groups, height, width):
    u, v, w = maps(
        0,
        (2, channels, height, width),
        (2, channels, height, width),
        (outputs, channels // groups, 3, 3),
    )
    expected = reference.semantic_difference(u.numpy(), v.numpy(), w.numpy(), name, groups)
    trained = semantic_difference(u, guide(v, name), w, name, groups)
    with paddle.no_grad():
        evaluated = semantic_difference(u, guide(v, name), w, name, groups)
    np.testing.assert_allclose(trained.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(evaluated.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name):
    u, v, w = maps(1, (2, 4, 3, 4), (2, 4, 3, 4), (4, 2, 3, 3))
    direction = maps(2, (2, 4, 3, 4))[0]

    def value() -> float:
        with paddle.no_grad():
            return float((semantic_difference(u, guide(v, name), w, name, 2) * direction).sum())

    (semantic_difference(u, guide(v, name), w, name, 2) * direction).sum().backward()
    rng = np.random.default_rng(3)
    for tensor in (u, w) if name == "none" else (u, v, w):
        gradient, numbers = tensor.grad.numpy().ravel(), tensor.numpy()
        assert np.abs(gradient).max() > 0.01
        for place in rng.choice(numbers.size, 20, replace=False):
            ends = []
            for step in (1e-6, -1e-6):
                moved = numbers.copy()
                moved.ravel()[place] += step
                tensor.set_value(moved)
                ends.append(value())
            tensor.set_value(numbers)
            assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_equal_those_of_plain_operations(name, groups):
    """The backward pass that keeps nothing against Paddle's own through the same sum."""
    u, v, w = maps(4, (2, 4, 5, 6), (2, 4, 5, 6), (6, 4 // groups, 3, 3))
    direction = maps(5, (2, 6, 5, 6))[0]
    wanted = [u, w] if name == "none" else [u, v, w]
    lean = semantic_difference(u, guide(v, name), w, name, groups)
    plain = module._sum_of_differences(u, guide(v, name), w, SIMILARITIES[name], groups)
    for ours, paddles in zip(
        paddle.grad([lean], wanted, [direction]),
        paddle.grad([plain], wanted, [direction]),
        strict=True,
    ):
        np.testing.assert_allclose(ours.numpy(), paddles.numpy(), atol=1e-12)


@pytest.mark.parametrize("constant", ["u", "v", "w"])
def test_what_is_not_trained_gets_no_gradient(constant):
    tensors = dict(zip("uvw", maps(6, (1, 2, 4, 4), (1, 2, 4, 4), (2, 2, 3, 3)), strict=True))
    tensors[constant].stop_gradient = True
    semantic_difference(*tensors.values(), "charbonnier").sum().backward()
    assert [name for name, t in tensors.items() if t.grad is None] == [constant]


def test_a_guidance_that_is_not_used_gets_no_gradient():
    u, v, w = maps(6, (1, 2, 4, 4), (1, 2, 4, 4), (2, 2, 3, 3))
    semantic_difference(u, v, w, "none").sum().backward()
    assert v.grad is None or not v.grad.numpy().any()


# -- the properties that define it -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_feature_gives_exactly_nothing(name):
    v, w = maps(7, (1, 3, 6, 5), (4, 3, 3, 3), dtype="float32")
    u = paddle.to_tensor(np.float32([0.1, -7.3, 1e6])).reshape([1, 3, 1, 1]).expand([1, 3, 6, 5])
    assert (semantic_difference(u, guide(v, name), w, name).numpy() == 0).all()


@pytest.mark.parametrize("name", [*DECREASING, "cosine", "none", "increasing"])
def test_a_constant_guidance_gives_the_central_difference_convolution(name):
    """conv(U) - (sum of W) U, by Paddle's convolution; nothing at all for `increasing`."""
    u, w = maps(8, (2, 3, 7, 5), (4, 3, 3, 3))
    v = paddle.full([2, 3, 7, 5], 0.7, "float64")
    y = semantic_difference(u, guide(v, name), w, name)
    bordered = F.pad(u, [1, 1, 1, 1], mode="replicate")
    total = w.sum(axis=[2, 3], keepdim=True)  # [O, C, 1, 1]
    expected = F.conv2d(bordered, w) - F.conv2d(u, total)
    if name == "increasing":
        expected = paddle.zeros_like(expected)
    np.testing.assert_allclose(y.numpy(), expected.numpy(), atol=1e-12)


@pytest.mark.parametrize("name", DECREASING)
def test_nothing_passes_a_huge_step_of_the_guidance(name):
    u, w = maps(9, (1, 2, 6, 8), (3, 2, 3, 3))
    v = paddle.zeros([1, 2, 6, 8], "float64")
    v[:, :, :, 4:] = 1e9
    before = semantic_difference(u, v, w, name).numpy()
    other = u.clone()
    other[:, :, :, 4:] = maps(10, (1, 2, 6, 4))[0] * 5
    after = semantic_difference(other, v, w, name).numpy()
    np.testing.assert_allclose(before[..., :4], after[..., :4], atol=1e-7)
    assert np.abs(before[..., 4:] - after[..., 4:]).max() > 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [1, 3])
def test_turning_all_of_it_turns_the_result(name, groups):
    u, v, w = maps(11, (2, 3, 5, 7), (2, 3, 5, 7), (3, 3 // groups, 3, 3))

    def turned(x):
        return paddle.to_tensor(np.rot90(x.numpy(), axes=(2, 3)).copy())

    y = semantic_difference(u, guide(v, name), w, name, groups)
    y_turned = semantic_difference(turned(u), guide(turned(v), name), turned(w), name, groups)
    np.testing.assert_allclose(turned(y).numpy(), y_turned.numpy(), atol=1e-12)


@pytest.mark.parametrize("length", [1e-20, 1e20, 1e37])
def test_cosine_of_vectors_of_any_length(length):
    """In float32, whose largest number is 3e38; short vectors count as zero, of one direction."""
    u, v, w = maps(20, (1, 3, 4, 5), (1, 3, 4, 5), (2, 3, 3, 3))
    expected = reference.semantic_difference(u.numpy(), v.numpy() * length, w.numpy(), "cosine", 1)
    u, v, w = (paddle.to_tensor(x.numpy() * k, "float32") for x, k in ((u, 1), (v, length), (w, 1)))
    v.stop_gradient = False
    y = semantic_difference(u, v, w, "cosine")
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-5)
    y.sum().backward()
    assert np.isfinite(v.grad.numpy()).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_none(name):
    u, v, w = maps(21, (0, 4, 5, 6), (0, 4, 5, 6), (6, 2, 3, 3))
    y = semantic_difference(u, guide(v, name), w, name, groups=2)
    assert y.shape == [0, 6, 5, 6]
    y.sum().backward()
    assert u.grad.shape == u.shape
    assert not w.grad.numpy().any()


# -- layers ----------------------------------------------------------------------------------------


def test_lambda_starts_at_one_is_learned_and_scales_the_guidance():
    layer = SemanticDifferenceConv2D(3, 4)
    assert float(F.softplus(layer.raw_lambda)) == pytest.approx(1, abs=1e-6)
    u, v = maps(12, (1, 3, 5, 5), (1, 3, 5, 5), dtype="float32")
    layer(u, v).square().sum().backward()
    assert float(layer.raw_lambda.grad.abs()) > 0
    layer.raw_lambda.set_value(paddle.to_tensor([np.log(np.expm1(2.5))], "float32"))
    expected = reference.semantic_difference(
        u.numpy(), v.numpy() / 2.5, layer.weight.numpy(), "gaussian", 1
    )
    np.testing.assert_allclose(layer(u, v).numpy(), expected, atol=1e-5)
    assert not hasattr(SemanticDifferenceConv2D(3, 4, similarity="cosine"), "raw_lambda")


@pytest.mark.parametrize("size", [(3, 2), (6, 8), (13, 11)])
def test_a_guidance_of_another_size_is_enlarged_bilinearly(size):
    layer = SemanticDifferenceConv2D(2, 2)
    u, v = maps(13, (1, 2, 6, 8), (1, 2, *size), dtype="float32")
    enlarged = F.interpolate(v, [6, 8], mode="bilinear", align_corners=False)
    np.testing.assert_allclose(layer(u, v).numpy(), layer(u, enlarged).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "guidance_channels"),
    [*((name, None) for name in BOUNDED), *((name, 5) for name in NAMES)],
)
@pytest.mark.parametrize("width", [None, 4])
def test_sdn_starts_as_nothing_and_trains_everything(name, guidance_channels, width):
    layer = SemanticDiffusion(6, guidance_channels, similarity=name, width=width)
    u, v = maps(14, (2, 6, 9, 7), (2, 5, 5, 4), dtype="float32")
    given = (u,) if guidance_channels is None else (u, v)
    y = layer(*given)
    np.testing.assert_array_equal(y.numpy(), u.numpy())

    rate, parameters = 0.1, [p for p in layer.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.SGD(rate, parameters)
    target = maps(15, y.shape, dtype="float32")[0]
    for step in range(2):
        optimizer.clear_grad()
        (layer(*given) * target).sum().backward()
        gradients = {n: p.grad for n, p in layer.named_parameters() if not p.stop_gradient}
        assert all(g is not None for g in gradients.values()), step
        optimizer.step()
    assert not [n for n, g in gradients.items() if not np.abs(g.numpy()).max() > 0]


def test_wide_features_are_reduced_inside():
    assert SemanticDiffusion(600).difference.in_channels == 512
    assert SemanticDiffusion(64, width=16).difference.weight.shape == [16, 16, 3, 3]
    assert SemanticDiffusion(64, groups=64).difference.weight.shape == [64, 1, 3, 3]


def test_a_pyramid_guides_each_level_by_the_next_and_the_last_by_itself():
    pyramid = SemanticDiffusionPyramid([4, 6, 8], [-1, 0], similarity="gaussian")
    assert pyramid.levels == [0, 2]
    fine, last = pyramid.diffusions
    assert (fine.guidance_channels, last.guidance_channels) == (6, None)
    for diffusion in pyramid.diffusions:
        diffusion.fuse.weight.set_value(paddle.rand(diffusion.fuse.weight.shape))
    pyramid.eval()
    features = maps(16, (1, 4, 8, 8), (1, 6, 4, 4), (1, 8, 2, 2), dtype="float32")
    result = pyramid(features)
    np.testing.assert_array_equal(result[1].numpy(), features[1].numpy())
    np.testing.assert_array_equal(result[0].numpy(), fine(features[0], features[1]).numpy())
    np.testing.assert_array_equal(result[2].numpy(), last(features[2]).numpy())
    assert SemanticDiffusionPyramid([4, 6, 8]).levels == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SemanticDiffusion(4), "none"),
        (lambda: SemanticDiffusion(4, 6), "gaussian"),
        (lambda: SemanticDiffusionPyramid([4, 6]).diffusions[0], "none"),
        (lambda: SemanticDiffusionPyramid([4], guidance="boundary").diffusions[0], "product"),
        (lambda: SemanticDiffusionPyramid([4], guidance="next_level").diffusions[0], "gaussian"),
        (lambda: SemanticDiffusionPyramid([4], similarity="cosine").diffusions[0], "cosine"),
    ],
)
def test_the_default_similarity_follows_from_the_guidance(make, expected):
    layer = make()
    assert layer.difference.similarity == expected
    assert (layer.guide is not None) == (expected in ("gaussian", "cosine"))


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (lambda: SemanticDifferenceConv2D(0, 2), "in_channels: whole number"),
        (lambda: SemanticDifferenceConv2D(4, 2, groups=3), "groups: divisor"),
        (
            lambda: SemanticDifferenceConv2D(4, 2, similarity="cos"),
            "similarity: charbonnier, 'cos'",
        ),
        (lambda: SemanticDifferenceConv2D(4, 2, similarity=["cosine"]), "similarity: ['cosine']"),
        (lambda: SemanticDiffusion(4, width=0), "width: whole number"),
        (lambda: SemanticDiffusion(0), "channels: whole number"),
        (lambda: SemanticDiffusion(4, 0), "guidance_channels: whole number"),
        (
            lambda: SemanticDifferenceConv2D(2, 2)(paddle.rand([1, 3, 4, 4])),
            "feature: [B, 2, [1, 3, 4]",
        ),
        (
            lambda: SemanticDiffusion(2, width=4)(paddle.rand([1, 3, 4, 4])),
            "feature: [B, 2, H, W]",
        ),
        (
            lambda: SemanticDiffusion(2, 5)(paddle.rand([1, 2, 4, 4]), paddle.rand([1, 6, 2, 2])),
            "guidance: [B, 5, H, W]",
        ),
        (lambda: SemanticDifferenceConv2D(2, 2)(paddle.rand([1, 2, 3, 3])), "guidance"),
        *(
            (
                lambda shape=shape: SemanticDifferenceConv2D(2, 2, similarity="cosine")(
                    paddle.rand([2, 2, 3, 3]), paddle.rand(shape)
                ),
                "guidance: [B, C, h, w] images",
            )
            for shape in ([2, 3, 3], [1, 2, 3, 3], [3, 2, 3, 3])
        ),
        (
            lambda: semantic_difference(*[paddle.rand([1, 1, 3, 3])] * 3, "gausian"),
            "charbonnier, 'gausian'",
        ),
        (
            lambda: SemanticDifferenceConv2D(2, 2)(
                paddle.rand([1, 2, 3, 3]), paddle.rand([1, 3, 3, 3])
            ),
            "guidance: 2 channels",
        ),
        (lambda: SemanticDiffusion(2, 3)(paddle.rand([1, 2, 3, 3])), "guidance: one"),
        (lambda: SemanticDiffusion(2, operator="conv"), "operator: difference"),
        (lambda: SemanticDiffusion(2, steps=0), "steps: whole number"),
        (lambda: SemanticDiffusion(2, similarity="product"), "product: guidance_channels"),
        (lambda: SemanticDiffusionPyramid([4], guidance="edges"), "guidance: next_level"),
        (lambda: SemanticDiffusionPyramid([4], guidance=["classes"]), "guidance: ['classes']"),
        (lambda: SemanticDiffusionPyramid([4], detach_guidance=True), "detach_guidance: none"),
        (lambda: SemanticDiffusionPyramid([4], guidance="classes"), "num_classes:"),
        (
            lambda: SemanticDiffusion(2)(paddle.rand([1, 2, 3, 3]), paddle.rand([1, 2, 3, 3])),
            "guidance: none",
        ),
        (lambda: SemanticDiffusionPyramid([4, 4], [2]), "levels: numbers 0 1"),
        (lambda: SemanticDiffusionPyramid([4, 4], [0, -2]), "levels: [0, 0] 2"),
        (lambda: SemanticDiffusionPyramid([4, 4], 0), "levels: list 0"),
        (lambda: SemanticDiffusionPyramid([4, 4], []), "levels: least one"),
        (lambda: SemanticDiffusionPyramid([4, 4])([paddle.rand([1, 4, 2, 2])]), "features: 2 maps"),
        (lambda: SemanticDiffusionPyramid([4])(paddle.rand([1, 4, 2, 2])), "features: 1 Tensor"),
    ],
)
def test_bad_input_is_named(make, tokens):
    with raises_naming(ValueError, *tokens.split()):
        make()


# -- forms to compare with -------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["classes", "boundary"])
def test_a_head_of_its_own_guides(guidance):
    """One step of one level by loops: class scores by their Bhattacharyya coefficient, boundaries
    by the chance that neither pixel is one."""
    pyramid = SemanticDiffusionPyramid(
        [4, 6], [0], guidance=guidance, num_classes=3, similarity="product"
    )
    (diffusion,) = pyramid.diffusions
    diffusion.fuse.weight.set_value(paddle.randn(diffusion.fuse.weight.shape))
    features = maps(30, (2, 4, 6, 4), (2, 6, 3, 2), dtype="float32")
    pyramid.eval()
    found = pyramid(features)
    np.testing.assert_array_equal(found[1].numpy(), features[1].numpy())
    assert pyramid.logits == []

    fine, coarse = (
        np.einsum("oc,bchw->bohw", score.weight.numpy()[:, :, 0, 0], x.numpy())
        + score.bias.numpy()[:, None, None]
        for score, x in zip(pyramid.guidance_head.scores, features, strict=True)
    )
    enlarged = F.interpolate(paddle.to_tensor(coarse), [6, 4], mode="bilinear").numpy()
    logits = (fine + enlarged).astype(np.float64)
    if guidance == "classes":
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        v = np.sqrt(chances)
    else:
        v = 1 - 1 / (1 + np.exp(-logits))
    u = features[0].numpy()
    y = reference.semantic_difference(u, v, diffusion.difference.weight.numpy(), "product", 1)
    y = np.maximum(y / np.sqrt(1 + 1e-5), 0)  # BatchNorm as it starts
    kernel = diffusion.fuse.weight.numpy()[:, :, 0, 0]
    expected = u + np.einsum("oc,bchw->bohw", kernel, np.concatenate([u, y], axis=1))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)

    pyramid.train()
    pyramid(features)
    assert [x.shape for x in pyramid.logits] == [[2, 3 if guidance == "classes" else 1, 6, 4]]


def test_a_detached_guidance_gives_no_gradient_to_what_it_is_made_from():
    for detach in (False, True):
        layer = SemanticDiffusion(4, 6, detach_guidance=detach)
        layer.fuse.weight.set_value(paddle.randn(layer.fuse.weight.shape))
        u, v = maps(31, (2, 4, 6, 4), (2, 6, 3, 2), dtype="float32")
        layer(u, v).square().sum().backward()
        assert (v.grad is None) == detach
        assert np.abs(layer.guide[0].weight.grad.numpy()).max() > 0


def test_two_steps_are_one_step_twice_with_the_same_guidance():
    once, twice = SemanticDiffusion(4, 6), SemanticDiffusion(4, 6, steps=2)
    once.fuse.weight.set_value(paddle.randn(once.fuse.weight.shape))
    twice.set_state_dict(once.state_dict())
    once.eval()
    twice.eval()
    u, v = maps(32, (2, 4, 6, 4), (2, 6, 3, 2), dtype="float32")
    np.testing.assert_array_equal(twice(u, v).numpy(), once(once(u, v), v).numpy())


@pytest.mark.parametrize(("channels", "guidance"), [(32, 64), (64, None), (256, None)])
@pytest.mark.parametrize("similarity", ["gaussian", "none"])
def test_the_equal_convolution_has_as_many_parameters(channels, guidance, similarity):
    def size(operator):
        layer = SemanticDiffusion(channels, guidance, similarity=similarity, operator=operator)
        return sum(p.size for p in layer.parameters() if not p.stop_gradient)

    one_more = 9 * channels + 2 + channels  # an output of the convolution and what follows
    assert abs(size("convolution") - size("difference")) <= one_more / 2


# -- memory, precision, export ---------------------------------------------------------------------


def test_training_keeps_no_maps_for_the_backward_pass():
    """Between forward and backward only the result, where plain operations keep dozens of maps."""
    u, v, w = maps(17, (1, 16, 48, 48), (1, 16, 48, 48), (16, 16, 3, 3), dtype="float32")
    one_map = u.numpy().nbytes
    stats, kept = paddle.base.core, {}
    for name, run in (
        ("lean", lambda: semantic_difference(u, v, w, "charbonnier")),
        ("plain", lambda: module._sum_of_differences(u, v, w, SIMILARITIES["charbonnier"], 1)),
    ):
        before = stats.host_memory_stat_current_value("Allocated", 0)
        y = run()
        kept[name] = (stats.host_memory_stat_current_value("Allocated", 0) - before) / one_map
        del y
    assert kept["lean"] < 1.2
    assert kept["plain"] > 15


def test_the_difference_is_computed_in_float32_under_amp(monkeypatch):
    """Squares of differences beyond 256 overflow float16. Paddle's CPU kernels know no float16, so
    the convolution is replaced by a record of what it is given."""
    seen = []
    monkeypatch.setattr(
        module.F, "conv2d", lambda x, w, groups: seen.append(x) or paddle.zeros([1, 2, 3, 3])
    )
    u, v = (paddle.to_tensor(np.random.rand(1, 2, 3, 3) * 900).astype("float16") for _ in "uv")
    with paddle.no_grad():
        semantic_difference(u, v, paddle.ones([2, 2, 3, 3]), "charbonnier")
    assert len(seen) == 8
    assert all(x.dtype == paddle.float16 and np.isfinite(x.numpy()).all() for x in seen)
    assert max(np.abs(x.numpy()).max() for x in seen) > 0


def in_float32(function):
    """A half precision kernel: computed in float32, then rounded."""

    def run(x, *others, **options):
        if x.dtype not in (paddle.float16, paddle.bfloat16):
            return function(x, *others, **options)
        given = (y.astype("float32") if isinstance(y, paddle.Tensor) else y for y in (x, *others))
        return function(*given, **options).astype(x.dtype)

    return run


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_backward_pass_under_amp(name, dtype, monkeypatch):
    """Features of half precision, weights of float32, as O1 has them: gradients come in the types
    of their tensors and are those of float32 but for rounding, where squares overflow float16.

    On a CPU `paddle.amp.auto_cast` changes nothing and Paddle has no kernels of half precision, so
    that they are put in: this shows what our code casts and when, not what a GPU's kernels do.
    """
    with pytest.warns(UserWarning, match="effect"), paddle.amp.auto_cast(dtype=dtype):
        assert paddle.matmul(paddle.ones([1, 1]), paddle.ones([1, 1])).dtype == paddle.float32
    for owner, operation in (
        *((F, "conv2d"), (F, "pad"), (paddle, "matmul")),
        *((paddle.Tensor, "__add__"), (paddle.Tensor, "__sub__")),
    ):
        monkeypatch.setattr(owner, operation, in_float32(getattr(owner, operation)))
    u, v, w, direction = maps(
        22, (2, 4, 6, 6), (2, 4, 6, 6), (6, 4, 3, 3), (2, 6, 6, 6), dtype="float32"
    )
    gradients = {}
    for kind in (dtype, "float32"):
        leaves = [(900 * x).astype(dtype).astype(kind).detach() for x in (u, v)] + [w.detach()]
        for leaf in leaves:
            leaf.stop_gradient = False
        y = semantic_difference(leaves[0], guide(leaves[1], name), leaves[2], name)
        y.backward(direction.astype(dtype).astype(kind))
        gradients[kind] = [x.grad for x in leaves if x.grad is not None]
        *of_features, of_weight = (str(g.dtype) for g in gradients[kind])
        assert set(of_features) == {f"paddle.{kind}"}
        assert of_weight == "paddle.float32"
    for half, full in zip(*gradients.values(), strict=True):
        half, full = half.astype("float32").numpy(), full.numpy()
        assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("name", ["charbonnier", "cosine"])
def test_gradients_under_recompute(name):
    """With Paddle's default, `use_reentrant=True`; its other way crashes on any BatchNorm."""
    u, v = maps(23, (2, 6, 8, 8), (2, 5, 4, 4), dtype="float32")
    layer = SemanticDiffusion(6, 5, similarity=name)
    layer.fuse.weight.set_value(paddle.randn(layer.fuse.weight.shape))
    found = []
    for run in (layer, functools.partial(recompute, layer)):
        layer.clear_gradients()
        u.clear_grad()
        v.clear_grad()
        run(u, v).square().sum().backward()
        found.append([x.grad.numpy() for x in (u, v, *layer.parameters()) if x.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        np.testing.assert_array_equal(recomputed, plain)


HEAD = {"guidance": "classes", "num_classes": 3}


class Enhanced(paddle.nn.Layer):
    """Two levels and a head, with nothing at zero."""

    def __init__(self, similarity: str, groups: int) -> None:
        super().__init__()
        self.first = paddle.nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.second = paddle.nn.Conv2D(8, 12, 3, stride=2, padding=1)
        options = HEAD if similarity == "product" else {}
        self.diffusion = SemanticDiffusionPyramid(
            [8, 12], similarity=similarity, groups=groups, **options
        )
        for diffusion in self.diffusion.diffusions:
            diffusion.fuse.weight.set_value(paddle.randn(diffusion.fuse.weight.shape))

    def forward(self, x):
        fine = F.relu(self.first(x))
        return self.diffusion([fine, F.relu(self.second(fine))])


@pytest.mark.parametrize(
    ("similarity", "groups"), [*((name, 1) for name in NAMES), ("charbonnier", 4)]
)
def test_export_with_free_sizes(similarity, groups, tmp_path):
    """`export_model` compares numbers itself, with and without oneDNN; here odd sizes once more."""
    paddle.seed(0)
    model = Enhanced(similarity, groups)
    model.eval()
    folder = export_model(
        model,
        tmp_path / "sdn",
        input_shape=[None, 3, None, None],
        task="features",
        output_op="none",
    )
    predictor = Predictor(folder, threads=1)
    for size in ((1, 3, 16, 16), (2, 3, 33, 7), (1, 3, 5, 61)):
        x = np.random.default_rng(0).normal(size=size).astype(np.float32)
        with paddle.no_grad():
            expected = model(paddle.to_tensor(x))
        for ours, eager in zip(predictor.run(x), expected, strict=True):
            np.testing.assert_allclose(ours, eager.numpy(), atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_central_differences_are_one_convolution_in_a_graph(groups):
    u, w = maps(19, (2, 3, 7, 5), (6, 3 // groups, 3, 3))
    expected = reference.semantic_difference(u.numpy(), u.numpy(), w.numpy(), "none", groups)
    found = module._central_difference(u, w, groups)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    found.sum().backward()
    assert (w.grad.numpy()[:, :, 1, 1] == 0).all()  # the centre still counts for nothing


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cosine", "none")])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [(7, 5), (1, 6), (4, 1), (1, 1)])
def test_the_form_of_a_graph(name, groups, size):
    u, v, w = maps(20, (2, 3, *size), (2, 3, *size), (6, 3 // groups, 3, 3))
    expected = reference.semantic_difference(u.numpy(), v.numpy(), w.numpy(), name, groups)
    of = module.OF_DIFFERENCES.get(name)
    found = sum_of_differences(u, v, w, of, groups)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    flat = sum_of_differences(paddle.full_like(u, 0.7), v, w, of, groups)
    assert (flat.numpy() == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_which_layers_take_the_form_of_a_graph(name):
    """All but two, as long as nobody changed them; afterwards all are as they were."""
    options = HEAD if name == "product" else {}
    model = SemanticDiffusionPyramid([4, 6, 8], similarity=name, **options)
    before = [(path, id(layer)) for path, layer in model.named_sublayers()]

    def count():
        with difference_form(model):
            return sum(isinstance(x, GraphSemanticDifference) for x in model.sublayers())

    fits = name not in ("cosine", "none")
    assert count() == (3 if fits else 0)
    hook = model.diffusions[1].difference.register_forward_post_hook(lambda *_: None)
    assert count() == (2 if fits else 0)
    hook.remove()
    assert [(path, id(layer)) for path, layer in model.named_sublayers()] == before


@pytest.mark.filterwarnings(
    "ignore:(Value|Tensor) do not have 'place'"
)  # Paddle's own backward pass
def test_training_in_a_traced_graph_equals_eager():
    u, v = maps(18, (1, 3, 6, 6), (1, 3, 3, 3), dtype="float32")
    layer = SemanticDifferenceConv2D(3, 4)
    traced = paddle.jit.to_static(
        layer,
        input_spec=[InputSpec([None, 3, None, None]), InputSpec([None, 3, None, None])],
        full_graph=True,
    )
    y = traced(u, v)
    y.square().sum().backward()
    found, found_w = u.grad.numpy(), layer.weight.grad.numpy()
    u.clear_grad()
    layer.clear_gradients()
    eager = SemanticDifferenceConv2D(3, 4)
    eager.set_state_dict(layer.state_dict())
    eager(u, v).square().sum().backward()
    np.testing.assert_allclose(found, u.grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(found_w, eager.weight.grad.numpy(), atol=1e-4)
