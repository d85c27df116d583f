"""The configs that come with the package: listed, found by name, copied."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ppvision.cli import run
from ppvision.configs import copy_config, find_config, find_config_folder, list_configs
from ppvision.errors import FolderInUseError, InputError, MissingFileError
from ppvision.tasks import open_job
from ppvision.tasks.config import read_yaml

ROOT = Path(__file__).resolve().parents[1]
NAME = "segmentation/segformer_pale_nano_sdn_once_qat_digit_scenes"


def test_the_list_has_every_config_but_those_that_others_build_on():
    files = [path for path in (ROOT / "configs").rglob("*.yml") if path.parent.name != "_base_"]
    assert sorted(list_configs().values()) == sorted(files)
    assert list_configs()[NAME].samefile(ROOT / "configs" / f"{NAME}.yml")


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yml", f"configs/{NAME}.yml", Path(NAME).name])
def test_names_find_a_config_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).samefile(ROOT / "configs" / f"{NAME}.yml")


def test_a_file_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pale_nano_digits").write_text("task: classification\n")
    assert find_config("pale_nano_digits") == Path("pale_nano_digits")


def test_an_unknown_name_gets_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="pale_nano_digits"):
        open_job("pale_nano_digit")


def test_configs_with_sdn_name_its_similarity():
    """So they, and weights trained with them, stay the same when the default changes."""
    texts = [path.read_text(encoding="utf-8") for path in list_configs().values()]
    with_sdn = [text for text in texts if "SemanticDiffusionBackbone" in text]
    assert len(with_sdn) == 8
    assert all("\n    similarity: " in text or "\n  similarity: " in text for text in with_sdn)


def test_a_copy_brings_what_it_builds_on_and_means_the_same(tmp_path):
    first, *bases = copy_config(NAME, tmp_path)
    assert first == tmp_path / f"{NAME}.yml"
    assert {path.name for path in bases} == {
        "segformer_pale_nano_digit_scenes.yml",
        "digit_scenes.yml",
    }
    assert read_yaml(first) == read_yaml(find_config(NAME))
    assert copy_config(NAME, tmp_path) == [first, *bases]  # unchanged: nothing to lose
    bases[0].write_text("changed: 1\n")
    with pytest.raises(FolderInUseError, match=bases[0].name):
        copy_config(NAME, tmp_path)
    assert bases[0].read_text() == "changed: 1\n"


def test_a_copy_gets_the_name_of_the_file_that_is_asked_for(tmp_path):
    first, *bases = copy_config(NAME, tmp_path / "mine.yml")
    assert first == tmp_path / "mine.yml"
    assert first.is_file()
    assert [path.relative_to(tmp_path).as_posix() for path in bases] == [
        "segformer_pale_nano_digit_scenes.yml",
        "_base_/digit_scenes.yml",
    ]
    assert read_yaml(first) == read_yaml(find_config(NAME))


def test_every_config_can_be_copied(tmp_path):
    for number, (name, path) in enumerate(list_configs().items()):
        copy = copy_config(name, tmp_path / str(number))[0]
        assert read_yaml(copy) == read_yaml(path), name


def test_a_file_of_ones_own_is_not_copied(tmp_path):
    (tmp_path / "mine.yml").write_text("task: classification\n")
    with pytest.raises(InputError, match="packaged"):
        copy_config(tmp_path / "mine.yml", tmp_path / "copy")


def test_the_command_lists_and_copies(tmp_path, capsys):
    assert run(["configs"]) == 0
    assert capsys.readouterr().out.split() == list(list_configs())
    assert run(["configs", "--copy", NAME, "--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{NAME}.yml").is_file()
    assert run(["configs", "--copy", NAME]) == 1


def test_a_wheel_has_the_configs_and_the_weights(tmp_path):
    source = tmp_path / "source"  # a build leaves folders where it runs
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "benchmark"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path / "wheels"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("ppvision-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = [*find_config_folder().rglob("*.yml"), *(ROOT / "ppvision" / "zoo").rglob("*.*")]
    expected = {
        f"ppvision/{path.relative_to(ROOT).as_posix().removeprefix('ppvision/')}"
        for path in packaged
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
