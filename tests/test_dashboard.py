"""VisualDL's real server over real runs: asked by HTTP, and looked at in headless Chromium."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import yaml
from visualdl import LogWriter

import ppvision.engine.dashboard as module
from ppvision.cli import run
from ppvision.engine.dashboard import find_vdl_folders
from ppvision.engine.run_folder import read_metrics
from ppvision.errors import EngineError, InputError
from tests.helpers.browser import chromium
from tests.helpers.configs import ROOT, classification_config
from tests.helpers.messages import raises_naming

SCALARS = ("Train/loss", "Train/lr", "Train/grad_norm", "Evaluate/top1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, crops) -> list[Path]:
    """Two runs that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("dashboard")
    for name, rate in (("first", 1e-3), ("second", 3e-3)):
        config = classification_config(crops)
        config["lr_scheduler"]["learning_rate"] = rate
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config))
        arguments = ["train", "-c", folder / f"{name}.yml", "--save_dir", folder / name]
        arguments += ["--do_eval", "--use_vdl", "--log_iters", 2, "--save_interval", 3]
        arguments += ["--histograms"]
        assert run([str(a) for a in arguments]) == 0
    return [folder / "first", folder / "second"]


@pytest.fixture(scope="module")
def address(runs):
    """Of `scripts/dashboard.sh` over both."""
    server = subprocess.Popen(
        ["bash", ROOT / "scripts" / "dashboard.sh", *runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = ""
    found = None
    # Our own line: VisualDL prints one of its own, now before it and now after.
    for line in server.stdout:
        printed += line
        if found := re.search(r"VisualDL: (http://127\.0\.0\.1:\d+)", line):
            break
    try:
        assert found, printed
        yield found[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        server.stdout.close()


def ask(address: str, path: str, **query: object) -> object:
    url = f"{address}/app/api/{path}?{urllib.parse.urlencode(query)}"
    # Without a language VisualDL answers 500.
    request = urllib.request.Request(url, headers={"Accept-Language": "en"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def names(runs) -> list[str]:
    return [f"{path.name}/vdl" for path in runs]


def test_the_server_knows_both_runs_their_tags_and_points(address, runs):
    assert sorted(ask(address, "runs")) == names(runs)
    tags = ask(address, "scalar/tags")
    assert all(set(SCALARS) <= set(found) for found in tags["tags"])
    for path, name in zip(runs, names(runs), strict=True):
        for tag in SCALARS:
            points = [(step, v) for _, step, v in ask(address, "scalar/list", run=name, tag=tag)]
            expected = [(s, v) for s, t, v in read_metrics(path / "metrics.csv") if t == tag]
            assert [s for s, _ in points] == [s for s, _ in expected]
            assert [v for _, v in points] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_pictures_texts_and_histograms(address, runs):
    for name in names(runs):
        images = ask(address, "image/list", run=name, tag="Evaluate/samples")
        assert [entry["step"] for entry in images] == [3, 6]
        histograms = ask(address, "histogram/list", run=name, tag="Weights/head.weight")
        assert [entry[1] for entry in histograms] == [3, 6]
    texts = ask(address, "text/tags")
    assert all(set(found) == {"config", "environment"} for found in texts["tags"])


def test_one_row_of_settings_per_run_with_its_final_scores(address, runs):
    rows = {row["name"]: row for row in ask(address, "hparams/list")}
    assert sorted(rows) == names(runs)
    for path, rate in zip(runs, (1e-3, 3e-3), strict=True):
        row = rows[f"{path.name}/vdl"]
        assert row["hparams"]["lr_scheduler/learning_rate"] == rate
        assert row["hparams"]["model/type"] == "two_blocks"
        assert row["hparams"]["seed"] == 0
        last = {tag: value for _, tag, value in read_metrics(path / "metrics.csv")}
        for tag in ("Evaluate/top1", "Evaluate/loss", "Train/loss"):
            assert row["metrics"][tag] == pytest.approx(last[tag], rel=1e-6)


def test_a_run_without_records_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--use_vdl"):
        find_vdl_folders([tmp_path])


# -- ports -----------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A run folder with one record."""
    with LogWriter(logdir=str(tmp_path / "mine" / "vdl")) as writer:
        writer.add_scalar("Train/loss", 1.5, 1)
    return tmp_path / "mine"


@contextlib.contextmanager
def dashboard(*arguments: object) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "ppvision.dashboard", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def read_until(stream: IO[str], word: str) -> str:
    printed = ""
    for line in stream:
        printed += line
        if word in line:
            return printed
    raise AssertionError(f"ended without {word!r}: {printed}")


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server((host, 0)) as busy:
        yield busy.getsockname()[1]


def test_a_busy_port_gives_the_next_free_one_which_serves(recorded):
    with listening() as port, dashboard(recorded, "--port", port) as server:
        printed = read_until(server.stdout, "VisualDL: http")
        assert f"port {port} is taken" in printed
        found = re.search(r"VisualDL: (http://127\.0\.0\.1:(\d+)) ", printed)
        assert int(found[2]) > port
        assert ask(found[1], "runs") == ["mine/vdl"]
        server.terminate()
        assert server.wait(timeout=30) == 128 + signal.SIGTERM
        with pytest.raises(OSError, match="refused"):
            ask(found[1], "runs")


def test_a_path_for_a_proxy(recorded):
    with dashboard(recorded, "--public_path", "/lab/vdl/") as server:
        printed = read_until(server.stdout, "VisualDL: http")
        address = re.search(r"VisualDL: (http://127\.0\.0\.1:\d+/lab/vdl) ", printed)[1]
        request = urllib.request.Request(f"{address}/api/runs", headers={"Accept-Language": "en"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["data"] == ["mine/vdl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "expected 1 to 65535"),
        (["--port", "²"], "expected 1 to 65535"),
        (["--port", "-1"], "expected"),
        (["--public_path", "/"], "such as /vdl"),
        (["--public_path", "vdl"], "such as /vdl"),
        (["--public_path", "/a b"], "such as /vdl"),
        (["--host", "203.0.113.7"], "cannot listen on '203.0.113.7'"),
        (["--host", "no.such.host.invalid"], "cannot listen on"),
    ],
)
def test_what_no_server_can_have(recorded, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dashboard", str(recorded), *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def test_a_program_that_takes_the_port_meanwhile_is_named():
    """One that answers, but is not VisualDL."""
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with (
                subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive,
                raises_naming(EngineError, "taken", "--port"),
            ):
                module._wait_for_answer(alive, "127.0.0.1", other.server_port)
        finally:
            other.shutdown()
            thread.join()


def test_a_port_that_was_just_given_back_is_free(monkeypatch):
    monkeypatch.setattr(module, "_PORTS", 1)
    with listening() as port:
        with pytest.raises(InputError, match="--port"):
            module.find_free_port("127.0.0.1", port)
        client = socket.create_connection(("127.0.0.1", port))
    client.close()
    assert module.find_free_port("127.0.0.1", port) == port


@pytest.mark.all
@pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="needs apt packages chromium and chromium-driver",
)
def test_the_pages_in_a_browser(address, runs, tmp_path):
    """PPVISION_SCREENSHOTS=FOLDER keeps the pictures."""
    pictures = Path(os.environ.get("PPVISION_SCREENSHOTS", tmp_path))
    with chromium(tmp_path) as browser:

        def shows(*words: str) -> bool:
            text = browser.text()
            return all(word in text for word in words)

        browser.open(f"{address}/app/scalar")
        browser.wait_for(lambda: shows(*names(runs), "Evaluate", "Train"))
        x, y = browser.wait_for(
            lambda: browser.run(
                "const c = document.querySelector('canvas'); if (!c) return null;"
                "const r = c.getBoundingClientRect();"
                "return [Math.round(r.x + r.width * 0.9), Math.round(r.y + r.height / 2)];"
            )
        )

        def tooltip() -> list[str] | None:
            """The rows `run smoothed value step ...` of the first chart's last point."""
            browser.move_to(x - 3, y)
            browser.move_to(x, y)
            lines = [line.split() for line in browser.text().splitlines()]
            rows = [line for line in lines if len(line) > 5 and line[0] in names(runs)]
            return rows if len(rows) == len(runs) else None

        shown = {row[0]: row for row in browser.wait_for(tooltip)}
        for path in runs:
            points = read_metrics(path / "metrics.csv")
            step, value = [(s, v) for s, tag, v in points if tag == "Evaluate/top1"][-1]
            _, _, value_shown, step_shown, *_ = shown[f"{path.name}/vdl"]
            assert int(step_shown) == step
            assert float(value_shown) == pytest.approx(value, abs=1e-4)
        browser.screenshot(pictures / "dashboard_scalars.png")

        browser.open(f"{address}/app/sample/image")
        browser.wait_for(lambda: shows(*names(runs), "Evaluate/samples", "Sample: 1/2"))
        loaded = "return [...document.querySelectorAll('img')].filter(i => i.naturalWidth > 500)"
        browser.wait_for(lambda: len(browser.run(loaded)) == 2)
        browser.screenshot(pictures / "dashboard_images.png")

        browser.open(f"{address}/app/hyper-parameter")
        browser.wait_for(lambda: shows(*names(runs), "lr_scheduler/learning_rate", "Evaluate/top1"))

        def rows() -> dict[str, str]:
            """What each run's row of the table shows."""
            found = browser.run(
                "return [...document.querySelectorAll('[role=row]')].map(row => row.innerText)"
            )
            return {name: row for name in names(runs) for row in found if name in row}

        browser.wait_for(lambda: len(rows()) == 2)
        for name, rate in zip(names(runs), ("0.001", "0.003"), strict=True):
            cells = rows()[name].split()
            assert {rate, "two_blocks", "AdamW"} <= set(cells), cells
        browser.screenshot(pictures / "dashboard_settings.png")

        browser.open(f"{address}/app/histogram")
        browser.wait_for(lambda: shows("Weights"))
