"""`benchmark/layered_cifar10.py`: every method once on a few pictures, and its table."""

import csv

import numpy as np
import paddle
import pytest

from benchmark import layered_cifar10
from benchmark.layered_cifar10 import (
    FIELDS,
    NETWORKS,
    WIDTHS,
    Case,
    attempt,
    cases_of,
    is_finished,
    main,
    open_case,
    quantise_model,
    summary,
)
from benchmark.plots.layered_cifar10 import figure
from benchmark.runs import ProcessorClock, spent
from ppvision.data.writing import write_picture
from ppvision.engine.checkpoint import collect_arrays
from ppvision.quant import downsample_codes, quantize_codes
from ppvision.quant.train.layers import LayeredLayer, set_bits
from ppvision.zoo.weights import save_weights


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten classes of two pictures, in either split."""
    root = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(10):
            folder = root / "classes" / split / f"class{number}"
            folder.mkdir(parents=True)
            for k in range(2):
                noise = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                write_picture(folder / f"{k}.png", noise)
    return root


def call(monkeypatch, pictures, folder, *flags: object) -> list[dict]:
    """The script; returns the rows of its table."""
    results = folder / "table.csv"
    monkeypatch.setattr(layered_cifar10, "BATCH", 4)
    paths = ("--data_root", pictures, "--work_dir", folder / "work", "--results", results)
    arguments = ["layered_cifar10", *paths, "--float_steps", 2, "--steps", 1, *flags]
    monkeypatch.setattr("sys.argv", [str(a) for a in arguments])
    main()
    with results.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.all
def test_every_method_once_and_nothing_twice(monkeypatch, pictures, tmp_path):
    rows = call(monkeypatch, pictures, tmp_path, "--network", "resnet20", "--seeds", 3)
    assert [tuple(row) for row in rows] == [FIELDS] * len(rows)
    assert [(row["method"], int(row["bits"])) for row in rows] == [
        ("float", 32),
        *(("dedicated", k) for k in WIDTHS),
        *(("once_mean", k) for k in WIDTHS),
        *(("once_sandwich", k) for k in WIDTHS),
        *(("cut", k) for k in WIDTHS[1:]),
        *(("ptq", k) for k in WIDTHS),
    ]
    for row in rows:
        assert 0 <= float(row["top1"]) <= 1
        assert np.isfinite(float(row["loss"]))
        trained = row["method"] not in ("cut", "ptq")
        steps = {"float": 2}.get(row["method"], 1) if trained else 0
        assert (int(row["steps"]), int(row["images"])) == (steps, 20 * trained)
        assert trained or float(row["cpu_minutes"]) == 0
    plotted = figure(tmp_path / "table.csv")
    assert len(plotted.axes) == 1
    assert len(plotted.axes[0].lines) >= 6

    made = []
    monkeypatch.setattr(layered_cifar10, "run", lambda case, *others: made.append(case.name))
    again = call(monkeypatch, pictures, tmp_path, "--network", "resnet20", "--seeds", 3)
    assert again == rows
    assert made == []


def test_a_run_that_was_stopped_goes_on(monkeypatch, pictures, tmp_path):
    def stop(*others):
        raise KeyboardInterrupt

    flags = ("--network", "resnet20", "--seeds", 0, "--methods", "float")
    with monkeypatch.context() as inner:
        inner.setattr(layered_cifar10, "save_weights", stop)  # behind the last step
        with pytest.raises(KeyboardInterrupt):
            call(inner, pictures, tmp_path, *flags)
    folder = tmp_path / "work" / "resnet20_float_0"
    before = spent(folder)
    assert before > 0
    (row,) = call(monkeypatch, pictures, tmp_path, *flags)
    assert spent(folder) == before  # no step was made again
    assert float(row["cpu_minutes"]) == pytest.approx(before / 60, abs=0.01)


def test_a_run_waits_for_the_weights_that_it_starts_from(tmp_path):
    case = Case("resnet20", "ptq", WIDTHS, 0)

    def make(case):
        raise AssertionError(case)

    assert not attempt(case, tmp_path / "table.csv", tmp_path, make)
    assert not is_finished(case, tmp_path / "table.csv")


def test_cases_are_in_an_order_that_works():
    made = []
    for case in cases_of("resnet20", 1):
        assert case.source is None or case.source.name in made
        made.append(case.name)
    assert len(set(made)) == len(made) == 5 + 5


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_weights_are_the_first_bits_of_the_8_bit_codes(name, tmp_path):
    paddle.seed(0)
    trained = quantise_model(NETWORKS[name].build(), (8,))
    for layer in trained.sublayers():
        if isinstance(layer, LayeredLayer):  # steps are learned: not those that a build begins with
            scale = layer.weight_quanter.log_scale
            scale.set_value(paddle.uniform(scale.shape, min=-0.5, max=0.5))
    case = Case(name, "cut", (2,), 0)
    path = case.source.weights(tmp_path)
    save_weights(collect_arrays(trained), path)
    model = open_case(case, tmp_path)
    layers = [layer for layer in trained.sublayers() if isinstance(layer, LayeredLayer)]
    others = [layer for layer in model.sublayers() if isinstance(layer, LayeredLayer)]
    set_bits(model, 3)
    kept = []
    for layer, other in zip(layers, others, strict=True):
        quanter = layer.weight_quanter
        weight, step = layer._parameters["weight"].numpy(), quanter.steps()
        codes = quantize_codes(weight, step, 8, quanter.axis)
        kept.append(other.weight_quanter.bit_length())
        cell = step.reshape([-1 if axis == quanter.axis else 1 for axis in range(weight.ndim)])
        codes = downsample_codes(codes, 8, kept[-1])
        expected = cell * 2.0 ** (8 - kept[-1]) * (codes + 0.5)
        differ = np.abs(other.weight.numpy() - expected) > 1e-6 * np.abs(expected).max()
        assert differ.mean() < 1e-3  # float32 puts a weight on a border into the other cell
    assert [k for k, _ in enumerate(kept) if kept[k] == 8] == [0, len(kept) - 1]
    assert set(kept[1:-1]) == {3}


def test_the_ends_have_8_bits_at_every_width():
    model = quantise_model(NETWORKS["resnet20"].build(), (2,))
    widths = {path: q.bit_length() for path, q in model.named_sublayers() if hasattr(q, "axis")}
    ends = ("model.stem.weight_quanter", "model.head.weight_quanter")
    assert [path for path, bits in widths.items() if bits == 8] == list(ends)
    assert {bits for path, bits in widths.items() if path not in ends} == {2}


def test_mean_and_deviation_over_seeds():
    def row(seed: int, top1: float) -> dict:
        kind = {"network": "resnet20", "method": "ptq", "bits": "4"}
        return kind | {"seed": seed, "top1": top1, "loss": 1.0, "cpu_minutes": 2.0}

    mean, std = summary([row(0, 0.5), row(1, 0.7)])
    assert (mean["seed"], float(mean["top1"])) == ("mean", 0.6)
    assert float(std["top1"]) == pytest.approx(0.1414, abs=1e-4)
    assert summary([row(0, 0.5)]) == []


def test_time_since_the_last_checkpoint_counts_once(monkeypatch, tmp_path):
    times = iter([10.0, 13.0, 100.0, 104.0])  # the second process starts anew at 100
    monkeypatch.setattr("time.process_time", lambda: next(times))
    ProcessorClock(tmp_path).on_save(1)  # and is killed later
    assert spent(tmp_path) == 3.0
    ProcessorClock(tmp_path).on_save(2)
    assert spent(tmp_path) == 7.0
