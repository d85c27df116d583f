"""A run's folder: who may train in it, what a refused command leaves, what a resume moves."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from ppvision.cli import run
from ppvision.engine.checkpoint import list_checkpoints, set_aside
from ppvision.engine.run_folder import RunFolder
from ppvision.errors import FolderInUseError, StorageError
from tests.helpers.messages import raises_naming
from tests.helpers.small_run import build

STEPS = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "whole"
    build(folder, STEPS, keep_checkpoint_max=4).fit()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    """Every file by name, but for the dashboard's, which `small_run` opens before it trains."""
    files = [p for p in folder.rglob("*") if p.is_file() and "vdl" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def older(folder: Path, step: int = 6, **options: object):
    path = folder / "checkpoints" / f"step_{step}"
    return build(folder, STEPS, resume=str(path), **options)


def aside(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints" / "abandoned").iterdir()}


def test_a_refused_resume_leaves_a_running_training_alone(folder):
    before = content(folder / "checkpoints")
    trainer = older(folder)
    with (
        RunFolder(folder).hold_lock(),  # the one that trains there
        pytest.raises(FolderInUseError, match="process"),
    ):
        trainer.fit()
    assert content(folder / "checkpoints") == before
    trainer.callbacks[0].on_end()


def test_building_a_trainer_moves_nothing(folder):
    before = content(folder / "checkpoints")
    older(folder).callbacks[0].on_end()
    assert content(folder / "checkpoints") == before


def test_a_resume_without_a_step_to_make_moves_nothing(folder):
    before = {path.name for path in list_checkpoints(folder / "checkpoints")}
    first = list_checkpoints(folder / "checkpoints")[0]
    build(folder, 1, resume=str(first)).fit()
    assert {path.name for path in list_checkpoints(folder / "checkpoints")} == before
    assert not (folder / "checkpoints" / "abandoned").exists()


def test_checkpoints_of_another_run_in_between_are_not_set_aside(folder):
    """Read before, written meanwhile by a run that has ended since."""
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS}")
    trainer = build(folder, STEPS, resume="auto")
    build(folder, STEPS, resume="auto").fit()
    with raises_naming(FolderInUseError, "resume:", "process", "changed", "checkpoints"):
        trainer.fit()
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step_{STEPS}"
    trainer.callbacks[0].on_end()


def test_every_abandoned_checkpoint_is_kept(folder):
    for _ in range(3):
        older(folder, keep_checkpoint_max=4).fit()
    names = {f"step_{step}{end}" for step in (9, 12) for end in ("", ".2", ".3")}
    assert aside(folder) == names
    assert [p.name for p in list_checkpoints(folder / "checkpoints")][-1] == f"step_{STEPS}"
    again = folder / "checkpoints" / "abandoned" / "step_9.2"
    trainer = build(folder, STEPS, resume=str(again))
    assert trainer.progress.step == 9
    trainer.fit()
    assert aside(folder) == names | {"step_9.4", "step_12.4"}


def test_the_newest_go_first(tmp_path, monkeypatch):
    """A kill between two moves leaves checkpoints of one way."""
    for step in (3, 6, 9, 12):
        (tmp_path / f"step_{step}").mkdir()
    moves, whole = [], Path.replace

    def replace(self, target):
        if len(moves) == 2:
            raise SystemExit("killed")
        moves.append(self.name)
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(SystemExit):
        set_aside(tmp_path, 3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_3", "step_6"]


def test_a_second_train_is_refused_and_changes_nothing(config_file, tmp_path, capsys):
    command = ["train", "-c", str(config_file()), "--save_dir", str(tmp_path / "run")]
    command += ["--iters", "2", "--save_interval", "1"]
    assert run(command) == 0
    before = content(tmp_path / "run")
    first = str(tmp_path / "run" / "checkpoints" / "step_1")
    with RunFolder(tmp_path / "run").hold_lock():
        for flags in ([], ["--resume", "auto"], ["--resume", first]):
            assert run([*command, *flags]) == 1
            assert "another process is training" in capsys.readouterr().err
    assert run(command) == 1
    assert "which holds a run" in capsys.readouterr().err
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(num_classes=-5),
        lambda config: config["lr_scheduler"].update(power="many"),
        lambda config: config["train_dataset"].update(train_path="nowhere.txt"),
        lambda config: config.update(clip_norm=1.0, optimizer={"type": "AdamW", "grad_clip_cfg": {
            "name": "ClipGradByGlobalNorm", "clip_norm": 1.0}}),
    ],
)  # fmt: skip
def test_a_config_that_fails_leaves_no_folder(config_file, tmp_path, change):
    config = config_file(change)
    command = ["train", "-c", str(config), "--save_dir", str(tmp_path / "deep" / "run")]
    assert run([*command, "--iters", "1"]) == 1
    assert not (tmp_path / "deep" / "run").exists()
    config_file()
    assert run([*command, "--iters", "1"]) == 0


def test_what_ended_before_its_first_checkpoint_does_not_block(config_file, tmp_path):
    folder = tmp_path / "run"
    command = ["train", "-c", str(config_file()), "--save_dir", str(folder), "--iters", "1"]

    def fails(self, network, batches):
        raise SystemExit("killed")

    from ppvision.engine.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", fails)
        with pytest.raises(SystemExit):
            run([*command, "--use_vdl"])
    assert {p.name for p in folder.iterdir()} == {"config.yml", "metrics.csv", "log.txt", "vdl"}
    (folder / "metrics.csv.1-2.partial").write_text("of a killed process")
    (folder / "checkpoints" / ".step_1.partial").mkdir(parents=True)
    assert run(command) == 0
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step_1"]


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step_1", "best_model/model.pdparams"])
def test_anything_else_blocks(tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    with raises_naming(FolderInUseError, "holds", "run"):
        RunFolder(tmp_path / "run").check_new(resume=False)
    RunFolder(tmp_path / "run").check_new(resume=True)


@pytest.mark.parametrize(
    ("name", "reason"), [("file/run", "Not a directory"), ("n" * 300, "File name too long")]
)
def test_a_folder_that_cannot_be_made(config_file, tmp_path, capsys, name, reason):
    (tmp_path / "file").write_text("")
    command = ["train", "-c", str(config_file()), "--save_dir", str(tmp_path / name)]
    assert run(command) == 1
    said = capsys.readouterr().err
    assert "ppvision: save_dir: expected a folder that can be written, got " in said
    assert f"({reason}). Name another one." in said
    with pytest.raises(StorageError, match="save_dir:"):
        RunFolder(tmp_path / name).open({})


def test_a_file_is_not_locked(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        raises_naming(FolderInUseError, "save_dir:", "file"),
        RunFolder(tmp_path / "run").hold_lock(),
    ):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_folder(tmp_path, resume):
    (tmp_path / "run").write_text("")
    with raises_naming(FolderInUseError, "save_dir:", "file"):
        RunFolder(tmp_path / "run").check_new(resume)


@pytest.mark.parametrize(
    ("number", "makes_room"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EIO, False)],
)
@pytest.mark.parametrize("step", [3, 6])
def test_room_is_asked_for_where_it_is_missing(tmp_path, monkeypatch, number, makes_room, step):
    from ppvision.engine import checkpoint

    saved = checkpoint.save_weights

    def refused(arrays, path):
        if f"step_{step}" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        saved(arrays, path)

    monkeypatch.setattr(checkpoint, "save_weights", refused)
    with raises_naming(StorageError, *os.strerror(number).split()) as caught:
        build(tmp_path / "run", STEPS).fit()
    assert ("Make room" in str(caught.value)) is makes_room
    assert ("Complete is" in str(caught.value)) is (step == 6)
    assert caught.value.errno == number
