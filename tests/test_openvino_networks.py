"""The table of networks in OpenVINO: a row for each, also for one that crashes or hangs."""

import csv
import os
import signal
import time

import pytest

from benchmark import openvino_networks
from benchmark.openvino_networks import FIELDS, TABLE, attempt, main, networks
from ppvision.deploy.run.engines import has_openvino

needs_openvino = pytest.mark.skipif(
    not has_openvino(), reason="this build of Paddle has no OpenVINO"
)


def rows_of(path):
    with path.open(newline="") as file:
        return {row["network"]: row for row in csv.DictReader(file)}


@needs_openvino
def test_three_networks(tmp_path, capsys):
    table = tmp_path / "table.csv"
    main(["--output", str(table), "zoo:resnet20", "vision:LeNet"])
    main(["--output", str(table), "zoo:resnet20", "seg:ENet"])
    assert capsys.readouterr().out.count("zoo:resnet20") == 1  # what is there is not tried again
    rows = rows_of(table)
    assert list(rows) == ["zoo:resnet20", "vision:LeNet", "seg:ENet"]
    for name in ("zoo:resnet20", "vision:LeNet"):
        assert (rows[name]["traced"], rows[name]["runs"], rows[name]["reason"]) == (
            "yes",
            "yes",
            "",
        )
        assert float(rows[name]["error"]) < 1e-4
    assert (rows["seg:ENet"]["traced"], rows["seg:ENet"]["runs"]) == ("yes", "no")
    assert "unpool" in rows["seg:ENet"]["reason"]


# Processes of the tests below do no more than this; with fork they have it as it is here.
def crash(name, connection):
    connection.send({"traced": "yes"})
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(name, connection):
    connection.send({"traced": "yes"})
    time.sleep(600)


@pytest.mark.parametrize(
    ("work", "reason"), [(crash, "its process ended with exit code -11"), (hang, "more than 5 s")]
)
def test_a_crash_and_a_hang_are_rows(monkeypatch, work, reason):
    monkeypatch.setattr(openvino_networks, "_work", work)
    row = attempt("zoo:resnet20", limit=5)
    assert (row["traced"], row["runs"]) == ("yes", "no")
    assert reason in row["reason"]


def test_the_table_has_networks_that_there_are():
    rows = rows_of(TABLE)
    assert set(rows) <= set(networks())
    assert all(list(row) == list(FIELDS) for row in rows.values())
    assert all((row["runs"] == "yes") == (row["reason"] == "") for row in rows.values())
