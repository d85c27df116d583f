"""`benchmark/integer_scores.py`: which rows there are, and those of a small network."""

import csv
from dataclasses import replace

import numpy as np
import paddle
import pytest
import yaml

from benchmark import integer_scores
from benchmark.integer_scores import (
    CASES,
    FIELDS,
    WIDTHS,
    Network,
    Paths,
    Variant,
    agreement,
    float_score,
    make_variants,
    missing_variants,
    order,
    register_cifar10_network,
    spread,
    val_pictures,
    write_cifar10_config,
    write_photograph_config,
)
from benchmark.layered_cifar10 import NETWORKS
from ppvision.data.writing import write_lines, write_picture
from ppvision.engine.checkpoint import collect_arrays
from ppvision.tasks import open_job
from ppvision.zoo import create_model, registry
from ppvision.zoo.weights import save_weights


def row_of(variant: Variant, name: str = "digit_scenes", **others: str) -> dict[str, str]:
    columns = {"name": name, "kind": variant.kind, "bits": str(variant.bits)}
    return columns | {"rule": variant.rule, "codes": variant.codes, "score": ""} | others


def test_variants_of_the_kinds():
    made = make_variants(["ptq", "int8", "float"])
    assert [(v.kind, v.bits, v.arithmetic) for v in made] == [
        ("float", 32, "float32"),
        ("int8", 8, "int8"),
        *(("ptq", bits, "int8") for bits in WIDTHS),
    ]
    rules = make_variants(["rule"])
    assert len({(v.rule, v.codes) for v in rules}) == len(rules) == 6
    assert [v.bits for v in make_variants(["once_qat"], [4])] == [4]


def test_only_rows_that_are_missing_are_measured():
    variants = make_variants(["float", "int8", "rule"])
    rows = [row_of(variants[0]), row_of(variants[3]), row_of(variants[1], "nuclei")]
    left = missing_variants("digit_scenes", variants, rows)
    assert left == [variants[1], variants[2], *variants[4:]]
    assert missing_variants("nuclei", variants[:2], rows) == variants[:1]


def test_rows_are_in_the_order_of_cases_kinds_and_widths():
    variants = make_variants(["float", "int8", "ptq", "rule"])
    expected = [row_of(v, name) for name in list(CASES)[:2] for v in variants]
    shuffled = [expected[k] for k in np.random.default_rng(0).permutation(len(expected))]
    assert sorted(shuffled, key=order) == expected


def test_the_loss_is_against_the_network_s_own_float():
    floats = [
        row_of(Variant("float", 32), name, score=score)
        for name, score in (("digit_scenes", "0.5288"), ("imagenet_photographs", ""))
    ]
    rows = [row_of(Variant("int8", 8), score="0.1"), *floats]
    assert float_score("digit_scenes", rows) == 0.5288
    assert float_score("imagenet_photographs", rows) is None
    assert float_score("nuclei", rows) is None


def test_agreement_is_a_mean_over_pictures():
    expected = [np.array([[0, 1], [2, 2]]), np.array([[1]])]
    found = [np.array([[0, 1], [0, 2]]), np.array([[1]])]
    # Shares 3/4 and 1: their mean, and sqrt(1/32) / sqrt(2).
    assert agreement(found, expected) == {
        "agreement": "0.8750",
        "standard_error": "0.1250",
        "pictures": 2,
    }
    assert agreement([], []) == {"pictures": 0}


def test_pictures_are_spread_evenly():
    assert spread(range(101), 3) == [0, 50, 100]
    assert spread(range(2), 3) == [0, 1]


@pytest.fixture
def paths(tmp_path):
    """Ten classes of two pictures in either split, and four photographs."""
    random = np.random.default_rng(0)
    found = Paths(
        *(tmp_path / part for part in ("work", "cifar10", "runs", "photographs/list.txt"))
    )
    found.work.mkdir()
    for split in ("train", "val"):
        for number in range(10):
            folder = found.cifar10 / "classes" / split / f"class{number}"
            folder.mkdir(parents=True)
            for k in range(2):
                write_picture(folder / f"{k}.png", random.integers(0, 256, (32, 32, 3), np.uint8))
    found.photographs.parent.mkdir()
    write_lines(found.photographs, [f"{k}.png {10 * k}" for k in range(4)])
    for k in range(4):
        picture = random.integers(0, 256, (260, 300, 3), np.uint8)
        write_picture(found.photographs.with_name(f"{k}.png"), picture)
    return found


def test_photographs_calibrate_or_are_compared(paths):
    job = open_job(write_photograph_config("efficientnet_lite0", paths))
    assert [path.name for path in job.calibration_pictures()] == ["0.png", "2.png"]
    assert [path.name for path in val_pictures(job)] == ["1.png", "3.png"]
    assert [label for _, label in job.val_dataset.samples] == [10, 30]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cifar10_")])
def test_cifar10_networks_are_those_of_the_other_benchmark(name, paths, monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {**registry._MODELS})
    monkeypatch.setattr(registry, "_followers", {})
    register_cifar10_network()
    network = CASES[name]
    job = open_job(network.config(paths))
    shapes = {key: value.shape for key, value in job.float_model.state_dict().items()}
    benchmark = NETWORKS[name.removeprefix("cifar10_")].build()
    assert shapes == {key: value.shape for key, value in benchmark.state_dict().items()}
    assert network.weights(paths).relative_to(paths.cifar10_runs).parts[0].endswith("_float_0")


def test_every_row_of_a_small_network(monkeypatch, paths, capsys):
    config = write_cifar10_config("resnet20", paths)
    content = yaml.safe_load(config.read_text())
    content |= {"imports": ["tests.helpers.two_blocks"]}
    content["model"]["type"] = "two_blocks"
    config.write_text(yaml.safe_dump(content))
    job = open_job(config)
    paddle.seed(0)
    weights = paths.work / "weights.safetensors"
    small = Network(lambda paths: config, lambda paths: weights)
    monkeypatch.setitem(CASES, "small", small)
    results = paths.work / "table.csv"
    variants = make_variants(integer_scores.KINDS, [8, 2])
    integer_scores.measure("small", paths, variants, results)
    assert "left out" in capsys.readouterr().out
    save_weights(collect_arrays(create_model("two_blocks", num_classes=10)), weights)
    integer_scores.measure("small", paths, variants[:2], results)
    integer_scores.measure("small", paths, [v for v in variants if v.kind != "rule"], results)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [FIELDS] * 4
    assert [(row["kind"], row["bits"]) for row in rows] == [
        *(("float", "32"), ("int8", "8"), ("ptq", "8"), ("ptq", "2"))
    ]
    assert {(row["runs_in"], row["metric"], row["pictures"]) for row in rows} == {
        ("eager", "top1", "20")
    }
    assert (rows[0]["agreement"], rows[0]["loss_points"]) == ("1.0000", "0.00")
    for row in rows:
        loss = 100 * (float(rows[0]["score"]) - float(row["score"]))
        assert float(row["loss_points"]) == pytest.approx(loss, abs=1e-6)
    float_value = job.evaluate(job.load_float(weights)).by_tag()["Evaluate/top1"]
    assert float(rows[0]["score"]) == pytest.approx(float_value, abs=1e-4)

    monkeypatch.setattr(integer_scores, "Measured", lambda *others: pytest.fail("measured again"))
    integer_scores.measure("small", paths, [v for v in variants if v.kind != "rule"], results)


def test_pictures_of_one_size_run_as_exported(monkeypatch, paths):
    weights = paths.work / "weights.safetensors"
    config = write_cifar10_config("resnet20", paths)
    save_weights(collect_arrays(create_model("resnet20", num_classes=10)), weights)
    small = replace(CASES["cifar10_resnet20"], weights=lambda paths: weights)
    monkeypatch.setitem(CASES, "cifar10_resnet20", small)
    results = paths.work / "table.csv"
    integer_scores.measure("cifar10_resnet20", paths, [Variant("float", 32, "float32")], results)
    with results.open() as file:
        (row,) = csv.DictReader(file)
    assert row["runs_in"] != "eager"
    assert float(row["agreement"]) == 1.0
    assert config.exists()
