"""Every shim: the fault is there without it, and with it the numbers are those of a reference.

The references are written from the definitions, in NumPy and float64, one pixel at a time where
that is clearest.
"""

import operator
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

import paddleseg.core
from paddleseg.cvlibs import manager
from paddleseg.models.decoupled_segnet import SqueezeBodyEdge
from paddleseg.models.pointrend import PointHead, calculate_uncertainty
from paddleseg.models.sfnet import AlignedModule
from paddleseg.utils import metrics

import ppvision.plugins.paddleseg  # noqa: F401  (applies the shims)
from ppvision.plugins import shims
from ppvision.plugins.shims import PADDLESEG_SHIMS as SHIMS
from ppvision.plugins.shims import Fault, Shim
from tests.helpers.upstream import check_place

N, C, H, W = 2, 3, 9, 10
IGNORED = 255

# Paddle says so of `x.max()` and `paddle.min(x)` when they are called from a function of PaddleSeg.
max_and_min_warn = pytest.mark.filterwarnings("ignore:\\s*Non compatible API")


@pytest.fixture
def unshimmed():
    shims.remove(SHIMS)
    yield
    shims.apply(SHIMS)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def _logits(rng, channels=C, height=H, width=W):
    return rng.standard_normal((N, channels, height, width)).astype(np.float32)


def _labels(rng, classes=C, height=H, width=W):
    labels = rng.integers(0, classes, (N, height, width))
    labels[:, :2] = IGNORED
    return labels


def _loss(name, inputs, **options):
    """A loss and the gradient of its first input."""
    tensors = [
        tuple(map(paddle.to_tensor, x)) if isinstance(x, tuple) else paddle.to_tensor(x)
        for x in inputs
    ]
    first = tensors[0][0] if isinstance(tensors[0], tuple) else tensors[0]
    first.stop_gradient = False
    value = manager.LOSSES[name](**options)(*tensors)
    value.backward()
    assert np.isfinite(first.grad.numpy()).all()
    assert np.abs(first.grad.numpy()).sum() > 0
    return float(value)


def _softmax(x, axis):
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _pixels(logits, labels):
    """(probabilities [C], label) of every pixel that counts."""
    probabilities = _softmax(logits, 1)
    for n, y, x in np.ndindex(labels.shape):
        if labels[n, y, x] != IGNORED:
            yield probabilities[n, :, y, x], int(labels[n, y, x])


# Faults. -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIMS)
def test_fault_is_present_without_the_shim_and_gone_with_it(unshimmed, name):
    shim = SHIMS[name]
    assert shim.fault_present()
    code = shim.function().__code__
    assert shims.apply({name: shim}) == [name]
    assert shims.apply({name: shim}) == []
    if name != "train-log":  # its probe tries Paddle, not the function; tested below
        assert not shim.fault_present()
    assert shims.list_active_shims(SHIMS) == [name]
    assert shims.remove({name: shim}) == [name]
    assert shim.function().__code__ is code
    assert shims.list_active_shims(SHIMS) == []


@pytest.mark.parametrize("name", SHIMS)
def test_the_fault_is_where_the_shim_says(name):
    check_place(SHIMS[name].fault)


def test_importing_the_plugin_applies_all():
    assert shims.list_active_shims(SHIMS) == list(SHIMS)


def _sound(x):
    return paddle.concat([x, x])


def _broken_otherwise(x):
    return x.no_such_method()


def _no_operation(x):
    return x


THIS = __name__
NOWHERE = Fault("nowhere", "", "", "", "")


def test_no_fault_no_shim():
    code = _sound.__code__
    shim = {"sound": Shim(f"{THIS}:_sound", lambda: _sound(paddle.zeros([1])), NOWHERE)}
    assert shims.apply(shim) == []
    assert _sound.__code__ is code


def test_another_error_is_not_taken_for_the_fault():
    shim = {
        "x": Shim(
            f"{THIS}:_broken_otherwise", lambda: _broken_otherwise(paddle.zeros([1])), NOWHERE
        )
    }
    with pytest.raises(AttributeError, match="no_such_method"):
        shims.apply(shim)


def test_a_fault_that_the_rewriting_does_not_reach_is_an_error():
    def probe():
        raise TypeError

    with pytest.raises(RuntimeError, match="_no_operation"):
        shims.apply({"x": Shim(f"{THIS}:_no_operation", probe, NOWHERE)})


def test_probes_draw_no_random_numbers(unshimmed):
    paddle.seed(11)
    expected = paddle.rand([4]).numpy()
    paddle.seed(11)
    shims.apply(SHIMS)
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), expected)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
@pytest.mark.parametrize(
    ("left", "right"),
    [("int64", "float32"), ("float32", "int32"), ("bool", "float32"), ("int64", "bool")],
)
def test_arithmetic_is_numpys(name, left, right):
    a, b = np.array([0, 1, 3]).astype(left), np.array([1, 2, 1]).astype(right)
    out = shims.Operations.arithmetic(name, paddle.to_tensor(a), paddle.to_tensor(b))
    np.testing.assert_allclose(out.numpy(), getattr(operator, name)(a, b))


def test_operations_leave_sound_input_to_paddle():
    x = paddle.to_tensor([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(
        shims.Operations.concat([x, x], axis=1).numpy(), paddle.concat([x, x], axis=1).numpy()
    )
    assert shims.Operations.first([7, 8]) == 7
    assert shims.Operations.first(x).tolist() == [1.0, 2.0]
    assert float(shims.Operations.first(np.array(5.0))) == 5.0
    joined = shims.Operations.concat([paddle.to_tensor(2), paddle.to_tensor(3, dtype="int32")])
    assert joined.tolist() == [2, 3]


# Numbers. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5]])
def test_cross_entropy(rng, weight):
    logits, labels = _logits(rng), _labels(rng)
    w = np.ones(C) if weight is None else np.array(weight)
    pixels = list(_pixels(logits, labels))
    expected = -sum(w[y] * np.log(p[y]) for p, y in pixels) / sum(w[y] for _, y in pixels)
    assert _loss("CrossEntropyLoss", (logits, labels), weight=weight) == pytest.approx(expected)


def test_cross_entropy_of_the_hardest_pixels(rng):
    logits, labels = _logits(rng), _labels(rng)
    hardest = sorted((-np.log(p[y]) for p, y in _pixels(logits, labels)), reverse=True)
    kept = int(0.25 * labels.size)
    value = _loss("CrossEntropyLoss", (logits, labels), top_k_percent_pixels=0.25)
    assert value == pytest.approx(np.mean(hardest[:kept]))


def test_distill_cross_entropy(rng):
    student, teacher, labels = _logits(rng), _logits(rng), _labels(rng)
    pairs = zip(_pixels(student, labels), _pixels(teacher, labels), strict=True)
    expected = np.mean([-(t * np.log(s)).sum() for (s, _), (t, _) in pairs])
    value = _loss("DistillCrossEntropyLoss", (student, teacher, labels))
    assert value == pytest.approx(expected)


def _hard_pixels(pixels, thresh, min_kept):
    """Negative logarithms of the pixels that online hard example mining keeps."""
    own = sorted(p[y] for p, y in pixels)
    limit = max(thresh, own[min(len(own), min_kept) - 1])
    return [-np.log(p) for p in own if p < limit]


@pytest.mark.parametrize("thresh", [0.05, 0.6])
def test_ohem_cross_entropy(rng, thresh):
    logits, labels = _logits(rng), _labels(rng)
    hard = _hard_pixels(list(_pixels(logits, labels)), thresh, 30)
    value = _loss("OhemCrossEntropyLoss", (logits, labels), thresh=thresh, min_kept=30)
    assert value == pytest.approx(np.mean(hard), rel=1e-3)  # the loss adds 1e-5 to the share kept


def test_ohem_edge_attention(rng):
    logits, labels = _logits(rng), _labels(rng)
    edges = rng.random((N, 1, H, W)).astype(np.float32)
    on_edge = np.where(edges[:, 0] > 0.5, labels, IGNORED)
    hard = _hard_pixels(list(_pixels(logits, on_edge)), 0.3, 10)
    options = {"edge_threshold": 0.5, "thresh": 0.3, "min_kept": 10}
    value = _loss("OhemEdgeAttentionLoss", ((logits, edges), labels), **options)
    assert value == pytest.approx(np.mean(hard))


def test_point_cross_entropy(rng):
    labels = _labels(rng)
    rows, columns = rng.integers(0, H, (N, 12)), rng.integers(0, W, (N, 12))
    logits = rng.standard_normal((N, C, 12)).astype(np.float32)
    points = np.stack([(columns + 0.5) / W, (rows + 0.5) / H], -1).astype(np.float32)
    at_points = np.stack([labels[n][rows[n], columns[n]] for n in range(N)])[:, None]
    expected = np.mean([-np.log(p[y]) for p, y in _pixels(logits[:, :, None], at_points)])
    value = _loss("PointCrossEntropyLoss", ((logits, points), labels))
    assert value == pytest.approx(expected)


def test_relax_boundary(rng):
    """Any class within one pixel counts as right; its share is divided by their number."""
    logits, labels = _logits(rng)[:1], _labels(rng)[:1]
    probabilities = _softmax(logits, 1)[0]
    total, ignored = 0.0, 0
    for y, x in np.ndindex(H, W):
        near = labels[0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        classes = sorted(set(near.ravel().tolist()) - {IGNORED})
        if classes:
            total -= np.log(probabilities[classes, y, x].sum())
        else:
            ignored += 1
    expected = total / (H * W - ignored + 1)
    assert ignored
    assert _loss("RelaxBoundaryLoss", (logits, labels)) == pytest.approx(expected)


def test_rmi_compares_masked_labels_and_probabilities(rng, monkeypatch):
    logits, labels = _logits(rng, height=12, width=12), _labels(rng, height=12, width=12)
    loss = manager.LOSSES["RMILoss"](num_classes=C)
    seen = []
    monkeypatch.setattr(loss, "rmi_lower_bound", lambda *inputs: seen.extend(inputs))
    loss(paddle.to_tensor(logits), paddle.to_tensor(labels))
    valid = (labels != IGNORED)[:, None]
    one_hot = np.stack([labels == c for c in range(C)], 1)
    np.testing.assert_array_equal(seen[0].numpy(), one_hot)
    expected = valid / (1 + np.exp(-logits.astype(np.float64))) + 1e-6
    np.testing.assert_allclose(seen[1].numpy(), expected, rtol=1e-5)


def _gradient_magnitude(x):
    """Of `[H, W]` after a triangle filter of radius 4, divided by the largest of all maps."""

    def along(x, kernel):
        return np.apply_along_axis(lambda line: np.correlate(line, kernel, "valid"), -1, x)

    def smooth(x):
        kernel = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
        widths = [(0, 0)] * 3
        reflected = np.pad(np.pad(x, [*widths, (1, 1)], "edge"), [*widths, (4, 4)], "reflect")
        return along(np.concatenate([reflected[..., :4], x, reflected[..., -4:]], -1), kernel)

    x = smooth(smooth(x).swapaxes(2, 3)).swapaxes(2, 3)
    difference = np.array([-0.5, 0, 0.5])
    zero = [(0, 0)] * 3 + [(1, 1)]
    across = along(np.pad(x, zero), difference)
    down = along(np.pad(x.swapaxes(2, 3), zero), difference).swapaxes(2, 3)
    magnitude = np.sqrt(across**2 + down**2 + 1e-6)
    return magnitude / magnitude.max()


@max_and_min_warn
def test_dual_task(rng):
    logits, labels = _logits(rng, height=16, width=16), _labels(rng, height=16, width=16)
    mask = (labels != IGNORED)[:, None]
    paddle.seed(2)
    value = _loss("DualTaskLoss", (logits, labels))
    paddle.seed(2)
    uniform = paddle.rand(logits.shape).numpy().astype(np.float64)
    gumbel = -np.log(1e-10 - np.log(uniform + 1e-10))
    predicted = _gradient_magnitude(_softmax((logits * mask + gumbel) / 0.5, 1))
    # An ignored pixel counts as class 0 where edges are found, and not at all in the mean.
    actual = np.stack([np.where(mask[:, 0], labels, 0) == c for c in range(C)], 1)
    difference = np.abs(predicted - _gradient_magnitude(actual.astype(np.float64))) * mask
    assert value == pytest.approx(difference.mean(), rel=1e-4)


def test_calculate_area(rng):
    predicted, labels = rng.integers(0, C, (N, H, W)), _labels(rng)
    found = metrics.calculate_area(paddle.to_tensor(predicted), paddle.to_tensor(labels), C)
    valid = labels != IGNORED
    expected = [
        [((predicted == c) & (labels == c)).sum() for c in range(C)],
        [((predicted == c) & valid).sum() for c in range(C)],
        [(labels == c).sum() for c in range(C)],
    ]
    np.testing.assert_array_equal([area.numpy() for area in found], expected)


class _Tiny(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.classify = paddle.nn.Conv2D(3, 2, 1)

    def forward(self, x):
        return [self.classify(x)]


class _Pictures(paddle.io.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        picture = np.full((3, 4, 4), index, np.float32)
        return {"img": picture, "label": np.zeros((4, 4), np.int64)}


def _train(folder):
    seen = []

    def loss(logits, labels):
        seen.append(logits.square().mean())
        return seen[-1]

    net = _Tiny()
    optimizer = paddle.optimizer.Momentum(0.01, parameters=net.parameters())
    paddleseg.core.train(
        net,
        _Pictures(),
        optimizer=optimizer,
        save_dir=str(folder),
        iters=2,
        batch_size=2,
        log_iters=2,
        losses={"types": [loss], "coef": [1.0]},
    )
    return [float(x) for x in seen]


def test_train_fails_at_its_log_line_without_the_shim(unshimmed, tmp_path):
    with pytest.raises(IndexError):
        _train(tmp_path)


def test_train_logs_the_mean_loss(tmp_path, monkeypatch):
    lines = []
    module = sys.modules["paddleseg.core.train"]
    monkeypatch.setattr(module.logger, "info", lines.append)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    losses = _train(tmp_path)
    assert any(f"iter: 2/2, loss: {np.mean(losses):.4f}" in line for line in lines)
    assert (tmp_path / "iter_2" / "model.pdparams").is_file()


@pytest.mark.parametrize("make", [lambda: AlignedModule(2, 1), lambda: SqueezeBodyEdge(2)])
def test_flow_warp_moves_by_the_flow(rng, make):
    """`flow / size` is added to coordinates that run from -1 to 1 over `size - 1` pixels."""
    x = _logits(rng, 2)
    right, down = 2, 1  # pixels
    flow = np.empty((N, 2, H, W), np.float32)
    flow[:, 0], flow[:, 1] = right * 2 * W / (W - 1), down * 2 * H / (H - 1)
    size = paddle.shape(paddle.to_tensor(x))[2:]
    out = make().flow_warp(paddle.to_tensor(x), paddle.to_tensor(flow), size).numpy()
    np.testing.assert_allclose(out[:, :, :-down, :-right], x[:, :, down:, right:], atol=1e-5)


@max_and_min_warn
def test_point_rend_takes_the_most_uncertain_pixels(rng):
    logits = _logits(rng)
    head = SimpleNamespace(subdivision_num_points=paddle.to_tensor(7, dtype="int32"))
    found, points = PointHead.get_points_test(head, paddle.to_tensor(logits), calculate_uncertainty)
    first_two = np.sort(logits, axis=1)[:, -2:]  # uncertainty: second best minus best logit
    margin = (first_two[:, 1] - first_two[:, 0]).reshape(N, -1)
    for n in range(N):
        expected = np.argsort(margin[n])[:7]
        np.testing.assert_array_equal(found.numpy()[n], expected)
        np.testing.assert_allclose(
            points.numpy()[n],
            np.stack([(expected % W + 0.5) / W, (expected // W + 0.5) / H], -1),
            atol=1e-6,
        )


def test_repaired_functions_export(rng, tmp_path):
    """to_static reads a function's source: it must find the repaired one."""
    net = AlignedModule(2, 1)
    net.eval()
    low, high = (paddle.to_tensor(_logits(rng, 2)) for _ in range(2))
    expected = net([low, high]).numpy()
    spec = [paddle.static.InputSpec([N, 2, H, W], name=name) for name in ("low", "high")]
    graph = paddle.jit.to_static(net, input_spec=[spec], full_graph=True)
    paddle.jit.save(graph, str(tmp_path / "net"))
    found = paddle.jit.load(str(tmp_path / "net"))(low, high)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
