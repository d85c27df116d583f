"""Parameter groups and schedules, by values worked out by hand."""

import math

import paddle
import pytest

from ppvision.engine.optimization import make_cosine_schedule, make_parameter_groups
from ppvision.zoo import create_model
from tests.helpers.messages import raises_naming


@pytest.fixture(scope="module")
def model():
    return create_model("pale_nano", num_classes=4)  # 1, 2, 2, 1 blocks


def rates(groups, model) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (g["weight_decay"], g["learning_rate"]) for g in groups for p in g["params"]
    }


def test_norms_and_biases_do_not_decay(model):
    found = rates(make_parameter_groups(model, 0.05), model)
    trainable = {name for name, p in model.named_parameters() if not p.stop_gradient}
    assert set(found) == trainable
    assert found["head.weight"] == (0.05, 1.0)
    assert found["head.bias"] == (0.0, 1.0)
    assert found["stages.0.0.mlp.0.weight"] == (0.05, 1.0)
    assert found["stages.0.0.norm1.weight"] == (0.0, 1.0)
    assert found["stages.0.0.attention.query.1.weight"] == (0.0, 1.0)  # BatchNorm


def test_rates_fall_with_depth(model):
    found = rates(make_parameter_groups(model, 0.05, 0.5), model)
    for name, steps_from_the_head in (
        ("head.weight", 0),
        ("norm.weight", 0),
        ("stages.3.0.mlp.2.weight", 1),
        ("merges.3.0.weight", 1),
        ("stages.2.1.norm1.bias", 2),
        ("stages.2.0.norm1.bias", 3),
        ("merges.2.0.bias", 3),
        ("stages.1.0.mlp.0.weight", 5),
        ("merges.1.0.weight", 5),
        ("stages.0.0.mlp.0.weight", 6),
        ("merges.0.0.weight", 7),
    ):
        assert found[name][1] == 0.5**steps_from_the_head, name


def test_every_model_of_the_zoo_has_groups():
    model = create_model("efficientnet_lite0", num_classes=4)  # 16 blocks
    found = rates(make_parameter_groups(model, 0.05, 0.5), model)
    for name, steps in (
        ("head.weight", 0),
        ("top.conv.weight", 0),
        ("blocks.15.project.conv.weight", 1),
        ("blocks.0.depthwise.conv.weight", 16),
        ("stem.conv.weight", 17),
    ):
        assert found[name] == (0.05, 0.5**steps), name
    assert found["stem.norm.weight"] == (0.0, 0.5**17)


def test_a_model_may_leave_a_matrix_without_decay():
    model = paddle.nn.Linear(2, 3)
    model.no_weight_decay = lambda: {"weight"}
    assert rates(make_parameter_groups(model, 0.1), model) == {"weight": (0, 1), "bias": (0, 1)}


def test_an_optimizer_takes_the_groups(model):
    """One step of plain SGD on a gradient of ones moves every parameter by rate and decay."""
    small = create_model("pale_nano", num_classes=4)
    groups = make_parameter_groups(small, 0.1, 0.5)
    optimizer = paddle.optimizer.SGD(0.01, parameters=groups)
    before = {name: p.numpy() for name, p in small.named_parameters() if not p.stop_gradient}
    for p in small.parameters():
        if not p.stop_gradient:
            p.grad = paddle.ones_like(p)
    optimizer.step()
    after = dict(small.named_parameters())
    for name, decay, factor in (
        ("head.weight", 0.1, 1.0),
        ("head.bias", 0.0, 1.0),
        ("merges.0.0.weight", 0.1, 0.5**7),
    ):
        expected = before[name] - 0.01 * factor * (1 + decay * before[name])
        assert abs(after[name].numpy() - expected).max() < 1e-6, name


def test_values_out_of_range(model):
    with pytest.raises(ValueError, match="layer_decay"):
        make_parameter_groups(model, 0.05, 1.5)
    with raises_naming(ValueError, "layer_groups", "Linear"):
        make_parameter_groups(paddle.nn.Linear(2, 2), 0.05, 0.5)


def test_cosine_behind_a_warm_up():
    schedule = make_cosine_schedule(20, 4, learning_rate=0.8, warmup_start_lr=0.4, end_lr=0.1)
    found = []
    for _ in range(20):
        found.append(schedule())
        schedule.step()
    assert found[:4] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    expected = [0.1 + 0.7 * (1 + math.cos(math.pi * k / 16)) / 2 for k in range(16)]
    assert found[4:] == pytest.approx(expected)
    assert make_cosine_schedule(5, 0, learning_rate=0.3)() == 0.3
    with raises_naming(ValueError, "warm-up", "4", "steps"):
        make_cosine_schedule(4, 4, learning_rate=0.1)
