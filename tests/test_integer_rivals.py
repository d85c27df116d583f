"""`benchmark/integer_rivals.py`: pictures, differences and the table; no rival is run here."""

import csv

import numpy as np
import pytest

from benchmark import integer_rivals
from benchmark.integer_rivals import (
    FIELDS,
    KEY,
    bytes_of,
    difference,
    file_of,
    main,
    make_rows,
    split_pictures,
    write_pictures,
)
from benchmark.runs import replace_rows
from ppvision.data.pictures import read_picture
from ppvision.data.writing import write_picture


def test_pictures_that_calibrate_are_not_compared(tmp_path):
    pictures = [tmp_path / f"{number:03}.jpg" for number in range(200)]
    calibrating, comparing = split_pictures(pictures)
    assert (len(calibrating), len(comparing)) == (64, 16)
    assert not {*calibrating} & {*comparing}
    assert {*calibrating, *comparing} < {*pictures}
    assert (comparing[0], comparing[-1]) == (pictures[0], pictures[-1])
    few = split_pictures(pictures[:3])
    assert [len(part) for part in few] == [2, 1]
    with pytest.raises(ValueError, match="pictures"):
        split_pictures(pictures[:1])


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (40, 40), (17, 8)])
def test_pictures_keep_their_middle(shape, tmp_path):
    picture = np.zeros((*shape, 3), np.uint8)
    height, width = shape
    picture[height // 4 : height - height // 4, width // 4 : width - width // 4] = 200
    write_picture(tmp_path / "a.png", picture)
    (written,) = write_pictures([tmp_path / "a.png"], (16, 8), tmp_path / "made")
    found = read_picture(written)
    assert found.shape == (16, 8, 3)
    assert (found[6:10, 3:5] == 200).all()


def test_difference_is_relative_to_the_outputs():
    expected = np.float32([[1, 3], [4, 0]])
    assert difference(expected, expected) == {"same_labels": 1.0, "error": 0.0}
    # By hand: the squares of the differences add up to 26, those of the outputs too.
    found = difference(np.float32([[2, 3], [0, 3]]), expected)
    assert found == {"same_labels": 0.5, "error": 1.0}
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    other = maps.copy()
    other[0, :, 0, 0] = -other[0, :, 0, 0]  # its lowest becomes its highest: one pixel of 40
    assert difference(other, maps)["same_labels"] == pytest.approx(1 - 1 / 40)
    with pytest.raises(ValueError, match="finite"):
        difference(np.full_like(expected, np.nan), expected)
    with pytest.raises(ValueError, match="finite"):
        difference(expected[:1], expected)


def test_ratios_are_those_of_a_round():
    times = {
        "paddle float32": [10.0, 20.0, 30.0],
        "paddle int8": [5.0, 10.0, 30.0],
        "openvino float32": [8.0, 8.0, 8.0],
        "openvino int8": [4.0, 5.0, 2.0],
    }
    agreements = {name: {"same_labels": 1.0, "error": 0.1} for name in times}
    rows = {f"{row['program']} {row['arithmetic']}": row for row in make_rows(times, agreements)}
    assert [*rows] == [*times]
    found = {
        name: (row["ms"], row["over_our_int8"], row["over_float"]) for name, row in rows.items()
    }
    assert found["paddle float32"] == ("20.00", "2.000", "1.000")
    assert found["paddle int8"] == ("10.00", "1.000", "0.500")
    # Medians of [0.8, 0.5, 0.067] and [0.5, 0.625, 0.25], not ratios of medians.
    assert found["openvino int8"] == ("4.00", "0.500", "0.500")
    assert all(row["rounds"] == 3 for row in rows.values())


def test_bytes_are_those_of_all_files(tmp_path):
    folder = file_of(tmp_path, "paddle", "int8")
    folder.mkdir()
    (folder / "a").write_bytes(b"123")
    (folder / "b").write_bytes(b"45")
    assert bytes_of(folder) == 5
    graph = file_of(tmp_path, "openvino", "int8")
    graph.write_bytes(b"123456")
    graph.with_suffix(".bin").write_bytes(b"7")
    assert bytes_of(graph) == 7
    onnx = file_of(tmp_path, "onnxruntime", "int8")
    onnx.write_bytes(b"12")
    assert bytes_of(onnx) == 2
    assert file_of(tmp_path, "onnxruntime", "float32") == file_of(tmp_path, "openvino", "float32")


def test_rows_of_the_same_case_are_replaced(tmp_path):
    row = dict.fromkeys(FIELDS, "x") | {"threads": 1, "ms": "2.00"}
    table = tmp_path / "table.csv"
    replace_rows(table, [row, row | {"threads": 2}], KEY)
    replace_rows(table, [row | {"ms": "3.00"}], KEY)
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert [(r["threads"], r["ms"]) for r in found] == [("1", "3.00"), ("2", "2.00")]
    assert tuple(found[0]) == FIELDS


def test_files_that_are_not_complete_are_left_out(monkeypatch, tmp_path, capsys):
    words = ["integer_rivals", "--work_dir", tmp_path, "--rivals_python", "python", "--time"]
    words += ["--results", tmp_path / "table.csv", "--models", "resnet50"]
    monkeypatch.setattr("sys.argv", [*map(str, words)])
    monkeypatch.setattr(integer_rivals, "measure", lambda *others: pytest.fail("it was measured"))
    main()
    assert "resnet50: left out" in capsys.readouterr().out
    assert not (tmp_path / "table.csv").exists()
    monkeypatch.setattr("sys.argv", [*map(str, words[:5])])
    with pytest.raises(SystemExit):
        main()
    assert "--pictures" in capsys.readouterr().err
