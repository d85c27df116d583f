"""Files and folders are complete under their names or not there; one process writes a folder."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppvision.errors import FolderInUseError
from ppvision.files import (
    ABANDONED_AFTER,
    create_folder,
    find_cache_folder,
    lock_folder,
    replace_file,
    replace_folder,
    write_text,
)
from tests.helpers.messages import raises_naming


def anything(folder: Path) -> bool:
    return True


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stop(Exception):
    """Ends a block half-way."""


def enter(context) -> None:
    with context:
        pass


def stop_inside(context, write=lambda path: None) -> None:
    with context as path:
        write(path)
        raise Stop


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with replace_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["table.csv"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(Stop):
        stop_inside(replace_file(target), lambda partial: partial.write_text("half"))
    assert target.read_text() == "old"
    assert names(tmp_path) == ["table.csv"]


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path):
    fresh, stale = tmp_path / "a.txt.1-2.partial", tmp_path / "a.txt.3-4.partial"
    other = tmp_path / "b.txt.3-4.partial"
    for path in (fresh, stale, other):
        path.write_text("half")
    past = time.time() - ABANDONED_AFTER - 60
    for path in (stale, other):
        os.utime(path, (past, past))
    write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == ["a.txt", fresh.name, other.name]


def test_a_second_holder_is_refused_and_the_first_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder, "busy: run"), raises_naming(FolderInUseError, "busy:", "run"):
        enter(lock_folder(folder, "busy: run"))
    with lock_folder(folder, "busy: run"):
        assert names(folder) == []


def _hold_until_killed(folder: Path, held: object) -> None:
    with lock_folder(folder, "busy"):
        child = os.fork()
        if child == 0:
            time.sleep(60)  # a worker that outlives the process that started it
            os._exit(0)
        held.send(child)
        time.sleep(60)


def test_a_child_of_a_killed_holder_does_not_keep_the_lock(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(
        target=_hold_until_killed, args=(tmp_path, theirs)
    )
    holder.start()
    child = ours.recv()
    try:
        with pytest.raises(FolderInUseError):
            enter(lock_folder(tmp_path, "busy"))
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        os.kill(child, 0)  # it is still there
        with lock_folder(tmp_path, "busy"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_is_replaced_when_it_is_complete(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").touch()
    with replace_folder(target, anything, "an export") as work:
        (work / "final" / "new").touch()
        (work / "scratch").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["export"]


def test_an_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(Stop):
        stop_inside(
            replace_folder(target, anything, "an export"),
            lambda work: (work / "final" / "half").touch(),
        )
    assert names(target) == ["old"]
    assert names(tmp_path) == ["export"]


def test_another_folder_is_not_replaced(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    (target / "holiday.jpg").touch()
    with (
        pytest.raises(FolderInUseError, match="photos"),
        replace_folder(target, lambda folder: False, "an export"),
    ):
        pass
    assert names(target) == ["holiday.jpg"]
    assert names(tmp_path) == ["photos"]


KILLED = """
import sys, time
from pathlib import Path
from ppvision.files import replace_folder
with replace_folder(Path(sys.argv[1]), lambda folder: True, "an export") as work:
    (work / "final" / "half").touch()
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process inside of `replace_folder`, and the folder that it writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "export")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"inside\n"
    yield process, tmp_path / "export"
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_do_not_write_one_folder(writer):
    _, target = writer
    with (
        pytest.raises(FolderInUseError, match="process"),
        replace_folder(target, anything, "an export"),
    ):
        pass


def test_what_a_killed_process_left_blocks_nobody(writer):
    process, target = writer
    process.kill()
    process.wait()
    with replace_folder(target, anything, "an export") as work:
        assert names(work) == ["final"]
        assert names(work / "final") == []
        (work / "final" / "new").touch()
    assert names(target) == ["new"]
    assert names(target.parent) == ["export"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """As a process leaves it that is killed between the two renames."""
    moved = tmp_path / ".export.ppvision-partial" / "old"
    moved.mkdir(parents=True)
    (moved / "model").touch()
    with pytest.raises(Stop):
        stop_inside(replace_folder(tmp_path / "export", anything, "an export"))
    assert names(tmp_path / "export") == ["model"]
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder(tmp_path, there):
    target = tmp_path / "data"
    if there:
        target.mkdir()
    with create_folder(target) as folder:
        (folder / "a").touch()
    assert names(target) == ["a"]
    with pytest.raises(FolderInUseError), create_folder(target):
        pass
    assert names(tmp_path) == ["data"]


def test_the_cache_follows_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.delenv("PPVISION_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_cache_folder() == tmp_path / ".cache" / "ppvision"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_cache_folder() == tmp_path / "xdg" / "ppvision"
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "own"))
    assert find_cache_folder() == tmp_path / "own"


def test_a_folder_is_there_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    """No rename of its own takes the old folder away first."""
    target = tmp_path / "export"
    target.mkdir()
    (target / "old").touch()
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("two steps"))
    with replace_folder(target, anything, "an export") as work:
        (work / "final" / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["export"]


def test_where_folders_cannot_change_places(tmp_path, monkeypatch):
    monkeypatch.setattr("ppvision.files._exchange", lambda new, folder: False)
    test_a_folder_is_replaced_when_it_is_complete(tmp_path)
