"""`benchmark/integer_latency.py`: every arithmetic of a small network once, and its table."""

import csv
import shutil

import pytest

from benchmark import integer_latency
from benchmark.integer_latency import NETWORKS, Network, main
from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.precision import find_integer_unit, find_usable_flags
from ppvision.models.pale_transformer import PaleTransformer
from tests.helpers.small_pale import SMALL_PALE


def measure(monkeypatch, results, *arguments):
    given = ("--work_dir", results.parent / "work", "--results", results, *arguments)
    monkeypatch.setattr("sys.argv", ["integer_latency", *map(str, given)])
    main()


@pytest.mark.all
@pytest.mark.skipif(
    not has_openvino() or find_integer_unit(find_usable_flags()) is None,
    reason="no OpenVINO, or a processor without VNNI",
)
def test_every_arithmetic_has_a_row(monkeypatch, tmp_path):
    small = Network(lambda: PaleTransformer(SMALL_PALE, num_classes=1000), (32, 32))
    monkeypatch.setitem(NETWORKS, "small", small)
    results = tmp_path / "table.csv"
    how = ("--models", "small", "--threads", 1, "--batches", 2, "--seconds", 0)
    measure(monkeypatch, results, *how)
    with results.open() as file:
        rows = {row["arithmetic"]: row for row in csv.DictReader(file)}
    kinds = ["float32", "int8", "int8, 4-bit codes", "int8, 2-bit codes"]
    assert [kind for kind in rows if kind != "bfloat16"] == kinds
    assert {row["engine"] for row in rows.values()} == {"openvino"}
    assert {(row["input"], row["batch"]) for row in rows.values()} == {("2x3x32x32", "2")}
    assert float(rows["float32"]["ratio"]) == 1.0
    assert all(float(row["ms"]) > 0 and int(row["rounds"]) >= 5 for row in rows.values())
    for name, bits in (("int8", 8), ("w4", 4), ("w2", 2)):
        manifest = read_manifest(tmp_path / "work" / f"small-{name}-b2")
        assert (manifest.bits, manifest.activations, manifest.int8.passed) == (bits, 8, True)
    weights = [
        read_manifest(tmp_path / "work" / f"small-{name}-b2").files["model.pdiparams"].bytes
        for name in ("int8", "w4", "w2")
    ]
    assert weights == sorted(weights, reverse=True)

    written = []
    export = integer_latency.export_model
    monkeypatch.setattr(
        integer_latency,
        "export_model",
        lambda model, folder, **others: written.append(folder.name)
        or export(model, folder, **others),
    )
    shutil.rmtree(tmp_path / "work" / "small-w2-b2")
    measure(monkeypatch, results, *how)
    assert written == ["small-w2-b2"]  # the other folders were there
    with results.open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_detectors_have_no_batches(monkeypatch, tmp_path, capsys):
    results = tmp_path / "table.csv"
    measure(monkeypatch, results, "--models", "ppyoloe_pale_nano", "--batches", 8)
    assert "one picture at a time" in capsys.readouterr().out
    assert not results.exists()
