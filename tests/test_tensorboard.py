"""`train --logger tensorboard`: what TensorBoard would read, by a reader in Python."""

import re
import shutil
import struct
import sys
import types
from pathlib import Path

import pytest

from ppvision import engine
from ppvision.engine.run_folder import RunFolder, read_metrics
from tests.helpers.configs import ROOT
from tests.helpers.verbs import ppvision


def records_of(path: Path) -> list:
    """The events of a file: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events, place = path.read_bytes(), [], 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += length + 16
    return events


def test_scalars_pictures_and_a_resume(classification_file, tmp_path):
    config, folder = classification_file(), RunFolder(tmp_path / "run")
    flags = ["-c", config, "--save_dir", folder.root, "--do_eval", "--log_iters", 1]
    flags += ["--save_interval", 2, "--logger", "tensorboard", "--histograms"]
    assert ppvision("train", *flags, "--iters", 2) == 0
    assert not folder.vdl.exists()
    (first,) = folder.tensorboard.iterdir()
    assert ppvision("train", *flags, "--iters", 4, "--resume", "auto") == 0
    (second,) = set(folder.tensorboard.iterdir()) - {first}
    events = [*records_of(first), *records_of(second)]
    values = [(event.step, value) for event in events for value in event.summary.value]
    scalars = [(s, v.tag, v.simple_value) for s, v in values if v.HasField("simple_value")]
    expected = read_metrics(folder.metrics)
    assert {tag for _, tag, _ in expected} >= {"Train/loss", "Evaluate/top1"}
    assert sorted((s, t) for s, t, _ in scalars) == sorted((s, t) for s, t, _ in expected)
    told = {(s, t): v for s, t, v in scalars}
    for step, tag, number in expected:
        assert told[step, tag] == pytest.approx(number, rel=1e-6)
    assert {s for s, v in values if v.HasField("image")} == {2, 4}
    assert {s for s, v in values if v.HasField("histo")} == {2, 4}
    tags = {v.tag for _, v in values}
    assert {"config/text_summary", "settings/text_summary"} <= tags
    # The second file tells TensorBoard what of the first to forget.
    starts = [event.step for event in records_of(second) if event.HasField("session_log")]
    assert starts == [3]


def test_two_starts_within_a_second_have_a_file_each(tmp_path, monkeypatch):
    from tensorboardX import event_file_writer

    from ppvision.engine.tensorboard_records import TensorBoardRecords

    monkeypatch.setattr(
        event_file_writer, "time", types.SimpleNamespace(time=lambda: 1_700_000_000.0)
    )
    for step in (1, 2):
        records = TensorBoardRecords(tmp_path / "records", step - 1)
        records.scalar("loss", 0.5, step)
        records.close()
    files = sorted((tmp_path / "records").iterdir())  # TensorBoard reads them by their names
    steps = [[e.step for e in records_of(path) if e.summary.value] for path in files]
    assert steps == [[1], [2]]


def test_without_its_package(classification_file, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ppvision.engine.tensorboard_records", raising=False)
    monkeypatch.delattr(engine, "tensorboard_records", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run = tmp_path / "run"
    flags = ["--save_dir", run, "--iters", 2, "--logger", "tensorboard"]
    assert ppvision("train", "-c", classification_file(), *flags) == 1
    assert "pip install tensorboardX" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


def test_the_callback_of_the_page(classification_file, tmp_path, monkeypatch):
    """`docs/training.md`, with a stand-in for W&B."""
    told, page = [], (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "wandb" in b)

    class Run:
        def log(self, numbers: dict, step: int) -> None:
            told.extend((step, tag, value) for tag, value in numbers.items())

        def finish(self) -> None:
            told.append("finished")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda project, config: Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    config = classification_file(lambda config: config.update(iters=4))
    shutil.copy(config, "mine.yml")
    exec(compile(block, "docs/training.md", "exec"), {})
    assert told.pop() == "finished"
    assert sorted(told) == sorted(read_metrics(Path("output/mine/metrics.csv")))
    assert {step for step, tag, _ in told if tag == "Evaluate/top1"} == {2, 4}
