"""Models at all widths: putting quanters in, training, taking apart, packing."""

import copy
import logging
import random

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddle.quantization.quanters import FakeQuanterWithAbsMaxObserver
from paddleslim.quant import SlimQuantConfig
from paddleslim.quant.constraints import FreezedConvBNConstraint

from ppvision.engine.checkpoint import collect_arrays
from ppvision.nn import SemanticDiffusion
from ppvision.plugins.paddleslim import LayeredQAT, end_layers, slim_quant_config
from ppvision.quant import (
    LayeredActivationQuanter,
    LayeredWeightQuanter,
    OnceQAT,
    load_layered,
    save_layered,
)
from ppvision.quant.packed import copy_packed, pack_model
from ppvision.quant.store.state import extract_state
from ppvision.quant.train.layers import LayeredBatchNorm2D, LayeredLayer, set_bits
from ppvision.tasks.multibit.training import draw_widths, make_passes
from ppvision.zoo.weights import WeightsError, assign_weights
from tests.helpers.messages import raises_naming

BITS = (8, 4, 2)


class Small(nn.Layer):
    """Every kind of layer that can be quantised, with odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2D(3, 7, 3, padding=1), nn.BatchNorm2D(7), nn.ReLU())
        self.depthwise = nn.Conv2D(7, 7, 3, padding=1, groups=7)
        self.sdn = SemanticDiffusion(7, similarity="gaussian")
        self.up = nn.Conv2DTranspose(7, 6, 2, stride=2)
        self.grouped = nn.Conv2D(6, 8, 3, padding="SAME", groups=2, padding_mode="zeros")
        self.norm = nn.BatchNorm2D(8)
        self.hidden = nn.Linear(8, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.sdn(self.depthwise(self.stem(x)))
        x = F.relu(self.norm(self.grouped(self.up(x)))).mean(axis=[2, 3])
        return self.head(F.relu(self.hidden(x)))


def pictures(seed: int = 0, batch: int = 2) -> paddle.Tensor:
    shape = [batch, 3, 9, 11]
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=shape), "float32")


def once(seed: int = 0, **options: object) -> OnceQAT:
    paddle.seed(seed)
    model = Small()
    objective = {
        k: options.pop(k) for k in ("objective", "weigh", "weights", "distillation") if k in options
    }
    bits = options.pop("bits", BITS)
    config = slim_quant_config(model, bits=bits, ends=end_layers(model, pictures()), **options)
    return OnceQAT(LayeredQAT(config).quantize(model), bits, **objective)


def loss_of(logits: paddle.Tensor) -> paddle.Tensor:
    return F.cross_entropy(logits, paddle.to_tensor([1, 3]))


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)
    caplog.set_level(logging.INFO, "ppvision")
    return lambda: [record.getMessage() for record in caplog.records]


# -- putting quanters in ---------------------------------------------------------------------------


def quantised(model: nn.Layer) -> dict[str, LayeredLayer]:
    return {
        path: layer
        for path, layer in model.named_sublayers()
        if isinstance(layer, LayeredLayer) and layer.weight_quanter is not None
    }


def test_every_kind_of_layer_is_quantised():
    found = quantised(once().model)
    assert set(found) == {
        *("stem.0", "depthwise", "up", "grouped", "hidden", "head"),
        *("sdn.guide.0", "sdn.difference", "sdn.fuse"),
    }
    fixed = {path for path, layer in found.items() if layer.weight_quanter.widths == (8,)}
    assert fixed == {"stem.0", "head", "sdn.fuse"}  # reads the picture, gives the result, fuses


@pytest.mark.parametrize("bits", [(4, 2), (2,)])
def test_ends_keep_eight_bits_whatever_the_widths(bits, tmp_path):
    net = once(bits=bits)
    net.eval()
    fixed = {p for p, q in quantised(net.model).items() if q.weight_quanter.widths == (8,)}
    assert fixed == {"stem.0", "head", "sdn.fuse"}
    folder = save_layered(net, tmp_path / "layers", bits=bits, config={})
    for k in bits:
        net.set_bits(k)
        packed = pack_model(Small(), load_layered(folder, k).state, k)
        np.testing.assert_allclose(packed(pictures()), net(pictures()), atol=1e-5)


def test_a_checkpoint_of_other_widths_does_not_fit():
    """Its steps would mean other cells."""
    wide, narrow = once(), once(layers={"hidden": {"max_bits": 4}})
    with pytest.raises(WeightsError, match=r"hidden\.weight_quanter\.initial_step_4_2"):
        assign_weights(narrow, collect_arrays(wide), "checkpoint")


@pytest.mark.parametrize("how", ["global", "type", "name", "layer"])
def test_paddleslims_own_config(how):
    model = Small()
    factory = LayeredWeightQuanter(BITS)
    config = SlimQuantConfig(activation=None, weight=factory if how == "global" else None)
    if how == "type":
        config.add_type_config([nn.Conv2D], weight=factory)
    elif how == "name":
        config.add_name_config(model.hidden.full_name(), weight=factory)
    elif how == "layer":
        config.add_layer_config([model.hidden], weight=factory)
    found = set(quantised(LayeredQAT(config).quantize(model)))
    convolutions = {"stem.0", "depthwise", "grouped", "sdn.guide.0", "sdn.fuse"}
    assert (
        found
        == {
            "global": convolutions | {"hidden", "head", "up", "sdn.difference"},
            "type": convolutions,
            "name": {"hidden"},
            "layer": {"hidden"},
        }[how]
    )
    assert not quantised(model), "the model itself was changed"


def test_a_layer_can_be_left_out():
    model = Small()
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    config.add_layer_config([model.hidden], weight=None)
    quantized = LayeredQAT(config).quantize(model)
    assert "hidden" not in quantised(quantized)
    np.testing.assert_array_equal(quantized.hidden.weight.numpy(), model.hidden.weight.numpy())


def test_activations_by_paddleslims_own_config():
    model = Small()
    config = SlimQuantConfig(
        activation=LayeredActivationQuanter(BITS), weight=LayeredWeightQuanter(BITS)
    )
    net = OnceQAT(LayeredQAT(config).quantize(model), BITS)
    net.train()
    net(pictures())
    net.eval()
    for bits in BITS:
        net.set_bits(bits)
        packed = copy_packed(net.model, bits)
        np.testing.assert_allclose(packed(pictures()), net(pictures()), atol=1e-5)


def test_rules_of_yaml():
    net = once(
        types={"Conv2D": {"min_bits": 4}},
        layers={
            "sdn": {"float": True},
            "sdn.difference": {"bits": 6},
            "head": {"min_bits": 2},
            "hid*": {"max_bits": 4, "activations": True},
        },
    )
    found = quantised(net.model)
    widths = {path: layer.weight_quanter.widths for path, layer in found.items()}
    assert widths == {
        "stem.0": (8,),
        "depthwise": (8, 4),
        "grouped": (8, 4),
        "up": (8, 4, 2),
        "sdn.difference": (6,),
        "hidden": (4, 2),
        "head": (8, 4, 2),
    }
    with_activation = {p for p, layer in found.items() if layer.activation_quanter is not None}
    assert with_activation == {"hidden"}


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"layers": {"nothing.*": {"bits": 4}}}, "'nothing.*' matches layer stem.0"),
        ({"types": {"Conv3D": {}}}, "Conv2D 'Conv3D'"),
        ({"layers": {"head": {"bit": 4}}}, "head: bits 'bit'"),
        ({"layers": {"head": {"bits": 4, "min_bits": 2}}}, "head: bits, min_bits"),
        ({"layers": {"head": {"bits": 9}}}, "rule head: bits: 1 8 9"),
        ({"layers": {"head": {"activations": "yes"}}}, "head: activations (true, 8), 'yes'"),
        ({"layers": {"head": {"bits": 0}}}, "rule head: bits: 1 8 0"),
        ({"layers": {"head": {"bits": [4]}}}, "rule head: bits: [4]"),
        ({"layers": {"head": {"min_bits": "4"}}}, "rule head: min_bits: '4'"),
        ({"weights": [float("inf"), 1, 1]}, "weights: number least 0"),
        ({"distillation": float("inf")}, "distillation: number least 0"),
        ({"layers": {"*": {"float": True}}}, "quantize: layer Small,"),
    ],
)
def test_wrong_rules_are_refused(options, tokens):
    with raises_naming(ValueError, *tokens.split()):
        once(**options)


def test_constraints_need_an_input_and_leave_nothing_behind():
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.ReLU())
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    config.add_constraints(FreezedConvBNConstraint())
    with raises_naming(ValueError, "example", "input"):
        LayeredQAT(config).quantize(model)
    model.train()
    before = model[1]._mean.numpy()
    with pytest.raises((TypeError, ValueError, AttributeError)):  # as PaddleSlim's tracer likes
        LayeredQAT(config).quantize(model, inplace=True, inputs="no picture")
    assert not any(hasattr(layer, "__forward_orig__") for layer in model.sublayers())
    assert all(layer.training for layer in model.sublayers())
    np.testing.assert_array_equal(model[1]._mean.numpy(), before)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        ("one layer", "found none goes into nn.Sequential"),
        ("stock activation", "LayeredActivationQuanter None activation"),
        ("activation alone", "NoneType LayeredActivationQuanter"),
        ("weight_norm", "weight computed"),
        ("fusing", "QuantedConv2DBatchNorm"),
    ],
)
def test_what_cannot_be_stored_in_layers_is_refused(case, tokens):
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.ReLU(), nn.Conv2D(4, 2, 1))
    if case == "one layer":
        model = nn.Linear(2, 2)
        config.add_layer_config(model, weight=LayeredWeightQuanter(BITS))
    elif case == "stock activation":
        config.add_layer_config(
            model[0], FakeQuanterWithAbsMaxObserver(), config.global_config.weight
        )
    elif case == "activation alone":
        config.add_layer_config(model[0], LayeredActivationQuanter(BITS), None)
    elif case == "weight_norm":
        nn.utils.weight_norm(model[0])
    else:
        config.add_constraints([FreezedConvBNConstraint()])
    with raises_naming(ValueError, *tokens.split()):
        LayeredQAT(config).quantize(model, inputs=pictures())


class Doubled(nn.Conv2D):
    """A user's own layer."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return 2 * super().forward(x)


class LayeredDoubled(LayeredLayer, Doubled):
    """How a user has it quantised."""


def test_a_users_own_layer():
    model = nn.Sequential(Doubled(3, 5, 3), nn.Conv2D(5, 2, 1))
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    config.add_qat_layer_mapping(Doubled, LayeredDoubled)
    net = LayeredQAT(config).quantize(model)
    net.eval()
    set_bits(net, 2)
    state = extract_state(net, BITS)
    assert set(state.weights) == {"0", "1"}
    for source in (model, copy.deepcopy(net)):
        packed = pack_model(copy.deepcopy(source), state, 2)
        np.testing.assert_allclose(packed(pictures()), net(pictures()), atol=1e-5)


def test_what_stays_in_float_is_said(logged):
    model = nn.Sequential(
        nn.Conv2D(3, 3, 1),
        Doubled(3, 3, 1),
        nn.BatchNorm(3),
        nn.LayerNorm([4]),  # has no weight that a width could be given
        nn.Conv1D(3, 3, 1),
        nn.Sequential(nn.Embedding(4, 3), nn.GRU(3, 3)),
    )
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    LayeredQAT(config).quantize(model)
    (line,) = [line for line in logged() if "left in float" in line]
    assert line.endswith(
        "left in float: 1 (Doubled), 2 (BatchNorm), 4 (Conv1D), 5.0 (Embedding), 5.1 (GRU), "
        "5.1.0.cell (GRUCell)"
    )


def test_a_block_that_stands_in_two_places():
    paddle.seed(0)
    block = nn.Sequential(nn.Conv2D(3, 3, 3, padding=1), nn.ReLU())
    model = nn.Sequential(block, block, nn.Conv2D(3, 2, 1))
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    net = LayeredQAT(config).quantize(model)
    net.eval()
    set_bits(net, 4)
    packed = pack_model(model, extract_state(net, BITS), 4)
    np.testing.assert_allclose(packed(pictures()), net(pictures()), atol=1e-5)


def test_a_rule_that_takes_an_end_off_eight_bits_is_said(logged):
    once(layers={"*": {"min_bits": 2}})
    lines = [line for line in logged() if "another width than 8 bits" in line]
    assert [line.split()[1] for line in lines] == ["stem.0", "head"]


def test_ends_of_a_network():
    assert end_layers(Small(), pictures()) == ("stem.0", "head")


# -- widths ----------------------------------------------------------------------------------------


def test_a_float_checkpoint_keeps_its_names():
    paddle.seed(0)
    names = set(Small().state_dict())
    own = set(once().model.state_dict())
    assert names <= own
    assert all("quanter" in n or ".w4_" in n or ".w2_" in n for n in own - names)


def test_statistics_are_kept_for_every_width():
    net = once()
    net.train()
    norms = [layer for layer in net.sublayers() if isinstance(layer, LayeredBatchNorm2D)]
    start = {k: v.numpy() for k, v in net.model.state_dict().items()}
    with net.alone(4):
        net(pictures(1))
    for path, layer in net.model.named_sublayers():
        if layer not in norms:
            continue
        for name in ("_mean", "_variance"):
            now = net.model.state_dict()
            assert not np.array_equal(now[f"{path}.w4{name}"].numpy(), start[f"{path}.w4{name}"])
            for other in (name, f"w2{name}"):
                np.testing.assert_array_equal(now[f"{path}.{other}"], start[f"{path}.{other}"])
    norm = norms[0]
    for bits, expected in (
        (8, "_mean"),
        (7, "_mean"),
        (4, "w4_mean"),
        (3, "w4_mean"),
        (2, "w2_mean"),
    ):
        net.set_bits(bits)
        held = {**norm._parameters, **norm._buffers}
        assert norm._mean is held[expected], bits


def test_widths_out_of_range():
    net = once()
    for bits in (1, 9, True, "4"):
        with raises_naming(ValueError, "bits:", "2", "8", repr(bits)):
            net.set_bits(bits)
    with raises_naming(ValueError, "quanters", "[6]"):
        OnceQAT(net.model, (8, 6))
    with raises_naming(ValueError, "none", "Small"):
        OnceQAT(Small())


def test_eval_is_the_model_at_its_width():
    net = once()
    net.eval()
    outputs = {}
    for bits in BITS:
        net.set_bits(bits)
        outputs[bits] = net(pictures()).numpy()
    paddle.seed(0)
    exact = Small()
    exact.eval()
    errors = [float(np.abs(outputs[k] - exact(pictures()).numpy()).max()) for k in BITS]
    assert 0 < errors[0] < errors[1] < errors[2]


# -- training --------------------------------------------------------------------------------------


def test_one_width_after_another_gives_the_gradient_of_their_mean():
    together, apart = once(), once()
    together.train()
    logits = together(pictures())
    assert len(logits) == len(BITS)
    (sum(loss_of(x) for x in logits) / len(BITS)).backward()
    apart.train()
    for bits in BITS:
        apart.train_at(bits)
        (loss_of(apart(pictures())) / len(BITS)).backward()
    others = dict(apart.named_parameters())
    for name, parameter in together.named_parameters():
        if parameter.stop_gradient:
            continue
        assert parameter.grad is not None, name
        np.testing.assert_allclose(
            parameter.grad.numpy(), others[name].grad.numpy(), 1e-4, 1e-6, err_msg=name
        )


def test_recomputed_layers_are_recomputed_at_their_width():
    class Recomputed(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
            self.recompute = False

        def forward(self, x: paddle.Tensor) -> paddle.Tensor:
            return recompute(self.body, x) if self.recompute else self.body(x)

    gradients = []
    for again in (False, True):
        paddle.seed(0)
        config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter((8, 2)))
        net = OnceQAT(LayeredQAT(config).quantize(Recomputed()), (8, 2))
        net.model.recompute = again
        net.train()
        x = paddle.to_tensor(np.random.default_rng(0).normal(size=(4, 6)), "float32")
        x.stop_gradient = False
        for forward in make_passes(net, lambda n, batch: [n(batch).square().mean()]).values():
            sum(forward(net, x)).backward()
        gradients.append(
            {n: p.grad.numpy() for n, p in net.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, 1e-5, 1e-7, err_msg=name)


def test_the_width_is_restored_after_training_at_one():
    net = once()
    net.set_bits(4)
    with net.alone(2):
        assert net.bits == 2
    assert net.bits == 4
    net.train()
    assert len(net(pictures())) == len(BITS)


def test_weights_count_in_the_order_of_bits():
    net = once(bits=(2, 8, 4), weights=[3, 1, 2])
    losses = {}
    for bits, logits in zip(net.widths, ([1.0], [10.0], [100.0]), strict=True):
        (losses[bits],) = net.weigh(bits, [paddle.to_tensor(logits[0])], paddle.zeros([1, 2]))
    assert {k: float(v) for k, v in losses.items()} == pytest.approx({8: 0.5, 4: 10.0, 2: 150.0})


def test_two_outputs_a_width_go_to_their_own_losses():
    class TwoHeads(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: paddle.Tensor) -> list[paddle.Tensor]:
            return [self.first(x), self.second(x)]

        def loss_computation(self, logits: list, losses: object, data: object) -> list:
            assert len(logits) == 2
            return [logits[0].sum(), 1000 * logits[1].sum()]

    paddle.seed(0)
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter((8, 2)))
    net = OnceQAT(LayeredQAT(config).quantize(TwoHeads()), (8, 2))
    net.train()
    x = paddle.ones([1, 3])
    found = [float(v) for v in net.loss_computation(net(x), {}, {})]
    expected = []
    for bits in (8, 2):
        with net.alone(bits):
            a, b = net(x)
        expected += [float(a.sum()) / 2, 1000 * float(b.sum()) / 2]
    assert found == pytest.approx(expected, rel=1e-5)


def test_memory_does_not_grow_with_the_number_of_widths():
    from paddle.base import core

    def peak(net: OnceQAT, widths: tuple[int, ...]) -> int:
        net.train()
        x = paddle.to_tensor(np.zeros([16, 3, 64, 64], np.float32))
        for _ in range(2):  # the first pass makes the gradients
            core.host_memory_stat_reset_peak_value("Allocated", 0)
            before = core.host_memory_stat_current_value("Allocated", 0)
            for bits in widths:
                with net.alone(bits):
                    F.cross_entropy(net(x), paddle.zeros([16], "int64")).backward()
            most = core.host_memory_stat_peak_value("Allocated", 0) - before
        return most

    def peak_together(net: OnceQAT) -> int:
        net.train()
        x = paddle.to_tensor(np.zeros([16, 3, 64, 64], np.float32))
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        before = core.host_memory_stat_current_value("Allocated", 0)
        sum(F.cross_entropy(y, paddle.zeros([16], "int64")) for y in net(x)).backward()
        return core.host_memory_stat_peak_value("Allocated", 0) - before

    five = (8, 6, 4, 3, 2)
    one = peak(once(bits=five), (8,))
    assert peak(once(bits=five), five) < 1.1 * one
    assert peak_together(once(bits=five)) > 3 * one  # what the engine spares


def test_objectives():
    net = once(objective="sandwich", bits=(8, 6, 4, 3, 2))
    drawn = []
    for step in range(40):
        net.draw(random.Random(f"7/{step}"))
        assert (net.drawn[0], net.drawn[2]) == (8, 2)
        drawn.append(net.drawn[1])
    assert set(drawn) == {6, 4, 3}
    net.train()
    assert len(net(pictures())) == 3

    weights = once(weights=[1, 1, 2]).weigh.weights
    assert weights == {8: 0.75, 4: 0.75, 2: 1.5}
    for wrong, tokens in (
        ({"objective": "best"}, "objective: mean, sandwich"),
        ({"weights": [1, 2]}, "weights: each"),
        ({"weights": [0, 0, 0]}, "weights: each"),
        ({"distillation": -1}, "distillation: least 0 -1"),
    ):
        with raises_naming(ValueError, *tokens.split()):
            once(**wrong)


def test_distillation_is_the_divergence_from_the_highest_width():
    net = once(distillation=0.5)
    teacher = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    student = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    task = paddle.to_tensor(1.0)
    assert len(net.weigh(8, [task], paddle.to_tensor(teacher))) == 1
    found = net.weigh(2, [task], paddle.to_tensor(student))
    divergence = 0.0
    for t, s in zip(teacher.astype(np.float64), student.astype(np.float64), strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        divergence += (p * np.log(p / q)).sum() / 2
    assert float(found[1]) == pytest.approx(0.5 * divergence, rel=1e-5)


def test_the_caller_says_what_becomes_of_the_losses():
    asked = []

    def weigh(bits: int, losses: list, logits: paddle.Tensor | None) -> list:
        asked.append((bits, len(losses), None if logits is None else logits.shape))
        return [loss * bits for loss in losses]

    net = once(weigh=weigh)
    net.train()
    outputs = net(pictures())
    net.model.loss_computation = lambda logits, losses, data: [logits[0].sum() * 0 + 1]
    found = net.loss_computation(outputs, {}, {})
    shape = outputs[0].shape
    assert asked == [(bits, 1, shape) for bits in BITS]
    assert [float(loss) * len(BITS) for loss in found] == pytest.approx(list(BITS))
    with pytest.raises(ValueError, match="weigh"):
        once(weigh=weigh, weights=[1, 1, 2])
    with pytest.raises(ValueError, match="weigh"):
        once(weigh=weigh, distillation=0.5)


def test_losses_by_name_are_weighed_without_logits():
    class Named(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: paddle.Tensor) -> dict[str, paddle.Tensor]:
            return {"loss": self.inner(x).sum() * 0 + 1}

    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter((8, 2)))
    asked = []

    def weigh(bits: int, losses: list, logits: paddle.Tensor | None) -> list:
        asked.append((bits, logits))
        return [loss * bits for loss in losses]

    net = OnceQAT(LayeredQAT(config).quantize(Named()), (8, 2), weigh=weigh)
    net.train()
    found = net(paddle.ones([1, 3]))
    assert asked == [(8, None), (2, None)]
    assert float(found["loss"]) == pytest.approx(5)
    assert float(found["loss_w8"]) == pytest.approx(1)


def test_the_teacher_does_not_learn_from_the_student():
    net = once(distillation=0.5)
    teacher, student = (paddle.rand([2, 4]) for _ in range(2))
    teacher.stop_gradient = student.stop_gradient = False
    net.weigh(8, [], teacher)
    (loss,) = net.weigh(2, [], student)
    loss.backward()
    assert teacher.grad is None
    assert (student.grad.numpy() != 0).all()


def test_every_parameter_is_trained():
    net = once(activations=True, steps="per_width")
    before = {name: p.numpy() for name, p in net.named_parameters() if not p.stop_gradient}
    optimizer = paddle.optimizer.Adam(1e-2, parameters=net.parameters())
    net.train()
    for step in range(3):
        sum(loss_of(x) for x in net(pictures(step))).backward()
        optimizer.step()
        optimizer.clear_grad()
    for name, parameter in net.named_parameters():
        if not parameter.stop_gradient:
            assert not np.array_equal(parameter.numpy(), before[name]), name


# -- packing ---------------------------------------------------------------------------------------


def trained(**options: object) -> OnceQAT:
    net = once(**options)
    net.train()
    optimizer = paddle.optimizer.Adam(1e-2, parameters=net.parameters())
    for step in range(3):
        sum(loss_of(x) for x in net(pictures(step))).backward()
        optimizer.step()
        optimizer.clear_grad()
    net.eval()
    return net


@pytest.mark.parametrize("options", [{}, {"steps": "per_width"}, {"activations": True}])
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_packed_codes_are_the_model_at_its_width(options, bits):
    net = trained(**options)
    net.set_bits(bits)
    expected = net(pictures(9)).numpy()
    state = extract_state(net.model, BITS)
    for source in (Small(), copy.deepcopy(net.model)):
        packed = pack_model(source, state, bits)
        np.testing.assert_allclose(packed(pictures(9)).numpy(), expected, atol=1e-5)
        assert not any("quanter" in name for name in packed.state_dict())
    if "activations" not in options:
        exact = Small()
        exact.set_state_dict(state.state_dict(bits))
        exact.eval()
        np.testing.assert_allclose(exact(pictures(9)).numpy(), expected, atol=1e-5)


def test_codes_are_those_of_training_on_every_border():
    """Weights on the borders of cells, for steps that no binary fraction is."""
    model = nn.Sequential(nn.Linear(255, 64), nn.Linear(64, 2))
    config = SlimQuantConfig(activation=None, weight=LayeredWeightQuanter(BITS))
    net = OnceQAT(LayeredQAT(config).quantize(model), BITS)
    quanter = net.model[0].weight_quanter
    steps = np.linspace(0.0101, 0.0999, 64, dtype=np.float32)
    quanter.initial_step.set_value(steps)
    cells = np.arange(-127, 128, dtype=np.float32)[:, None]
    net.model[0]._parameters["weight"].set_value(cells * steps)
    state = extract_state(net.model, BITS)
    net.eval()
    for bits in BITS:
        net.set_bits(bits)
        np.testing.assert_array_equal(
            state.weights["0"].at(bits).dequantize(), net.model[0].weight.numpy()
        )


def test_packing_another_architecture_is_refused():
    state = extract_state(once().model, BITS)
    with pytest.raises(ValueError, match="architecture"):
        pack_model(nn.Sequential(nn.Conv2D(3, 4, 3)), state, 8)
    other = Small()
    other.hidden = nn.Linear(9, 5)
    with raises_naming(ValueError, "hidden:", "[8,", "5]"):
        pack_model(other, state, 8)
    central = Small()
    central.sdn = SemanticDiffusion(7)
    with raises_naming(ValueError, "sdn.guide.0,", "similarity:", "gaussian"):
        pack_model(central, state, 8)
    for bits in (1, 9):
        with raises_naming(ValueError, "bits:", "2", "8", str(bits)):
            pack_model(Small(), state, bits)


def test_the_input_of_differences_is_not_rounded():
    layers = dict(once(activations=True).model.named_sublayers())
    assert layers["sdn.difference"].activation_quanter is None
    assert layers["sdn.fuse"].activation_quanter is not None


def test_activations_that_saw_nothing_are_not_packed():
    with raises_naming(ValueError, "stem.0", "set"):
        extract_state(once(activations=True).model, BITS)


class Tied(nn.Layer):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_layer_under_two_names_is_refused():
    model = nn.Sequential(("inner", Tied()))
    with raises_naming(ValueError, "inner.first", "inner.second"):
        LayeredQAT(slim_quant_config(model, bits=BITS)).quantize(model)


def test_inputs_by_name():
    model = once()
    model.eval()
    x = pictures()
    np.testing.assert_array_equal(model(x=x).numpy(), model(x).numpy())
    model.train()
    assert len(model(x=x)) == len(BITS)


def test_the_teacher_is_no_state():
    """The engine puts back all buffers after a step that fails."""
    model = once(distillation=1.0)
    before = [name for name, _ in model.named_buffers()]
    model.weigh(8, [], paddle.rand([2, 4]))
    model.weigh(2, [], paddle.rand([2, 4]))
    assert [name for name, _ in model.named_buffers()] == before


def test_the_middle_width_is_drawn_from_seed_and_step():
    model = once(bits=(8, 6, 4, 3, 2), objective="sandwich")

    def drawn(seed: int) -> list[int]:
        middle = []
        for step in range(60):
            draw_widths(model, seed, step)
            high, k, low = model.drawn
            assert (high, low) == (8, 2)
            middle.append(k)
        return middle

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    assert all(10 <= first.count(k) <= 30 for k in (6, 4, 3))
