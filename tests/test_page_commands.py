"""Commands and Python on the pages fit the programs: verbs and flags are known, scripts, configs
and benchmarks are there, names can be imported. The Python of the README is run.

This is quick, and of blocks with a mark (`tests/helpers/pages.py`) it is all that is tested.
`tests/test_page_blocks.py` runs the others with `--all`.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppvision.cli import build_parser
from ppvision.configs import find_config
from tests.helpers.configs import ROOT
from tests.helpers.pages import PAGES, blocks_of

# What a script adds to the verb's words: its own arguments come first.
SCRIPTS = {
    "train": ["train", "--config"],
    "eval": ["eval", "--config"],
    "export": ["export", "--config"],
    "predict": ["predict", "--model_dir", "--image_path"],
    "export_multibit": ["export", "--config", "--model_path"],
}
NOT_INSTALLED = {"wandb", "openvino"}
# Words that stand for the reader's own.
YOURS = re.compile(r"CONFIG|WEIGHTS|MODEL|mine|output/|FOLDER|FILE|photo", re.IGNORECASE)


def blocks(language: str) -> list:
    return [
        pytest.param(block.text, id=str(block))
        for page in PAGES
        for block in blocks_of(page)
        if block.language == language
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without variables before it and what follows a pipe."""
    text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def check_verb(words: list[str]) -> None:
    """That a verb takes these words.

    Raises:
        AssertionError: it does not.
    """
    redirected = next((i for i, word in enumerate(words) if word.startswith((">", "<"))), None)
    try:
        args = build_parser().parse_args(words[:redirected])
    except SystemExit as end:
        if end.code:  # --version and --help end with 0
            raise AssertionError(words) from end
        return
    config = getattr(args, "config", None)
    if config and not YOURS.search(config) and "{" not in config:
        assert find_config(config).is_file(), words


def check_script(words: list[str]) -> None:
    path, rest = Path(words[0]), words[1:]
    assert (ROOT / path).is_file(), words
    if path.parent.name == "scripts" and path.stem in SCRIPTS:
        verb, *flags = SCRIPTS[path.stem]
        given = [word for pair in zip(flags, rest, strict=False) for word in pair]
        check_verb([verb, *given, *rest[len(flags) :]])


def check_benchmark(words: list[str]) -> None:
    """That a Python program of the project is there and knows the flags."""
    module = words[0] == "-m"
    name = words[1].replace(".", "/") + ".py" if module else words[0]
    path = ROOT / name
    assert path.is_file(), words
    source = path.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, (name, word)


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_fit_the_programs(text, capsys):
    for words in commands(text):
        program, *rest = words
        if program == "ppvision":
            check_verb(rest)
        elif program.startswith("python") and rest[:2] == ["-m", "ppvision"]:
            check_verb(rest[2:])
        elif program.startswith("python") and rest and rest[0] != "-c":
            if rest[0].startswith(("benchmark/", "scripts/")) or (
                rest[0] == "-m" and rest[1].startswith("benchmark.")
            ):
                check_benchmark(rest)
        elif program == "bash" and "/" in rest[0]:
            check_script(rest)


# docs/reference_python.md has signatures, which tests/test_site.py compares with the code.
@pytest.mark.parametrize("text", [b for b in blocks("python") if "reference" not in b.id])
def test_python_reads_and_its_imports_are_there(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                mine = YOURS.search(alias.name) or alias.name.startswith("my_")
                if not mine and alias.name not in NOT_INSTALLED:
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("my_"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(
                    f"{node.module}.{alias.name}"
                ), (node.module, alias.name)


@pytest.mark.parametrize("page", ["README.md", "README_cn.md"])
def test_the_python_of_the_readme_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path))
    (text,) = (block.text for block in blocks_of(page) if block.language == "python")
    assert len(text.splitlines()) <= 9
    exec(compile(text, page, "exec"), {})
    shown = capsys.readouterr().out
    assert "[32, 64, 128, 256]" in shown
    assert "['RBC', 'WBC', 'Platelets']" in shown
