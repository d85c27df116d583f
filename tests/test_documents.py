"""Names in README, docs, docstrings and comments exist, and docs/design.md lists every module."""

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppvision.moved import MOVED
from tests.helpers.configs import ROOT
from tests.helpers.rooms import ROOMS

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "benchmark/README.md",
]
SOURCES = [p for folder in ("ppvision", "benchmark") for p in sorted((ROOT / folder).rglob("*.py"))]
FOLDERS = "ppvision|benchmark|configs|scripts|tests"
WIDTH = 100  # letters of a line of prose

# Names of files that are the reader's own.
YOURS = re.compile(r"(my_|test_my_|teachers)\w*\.py|.*/mine\.yml")
# Programs of PaddleViT, PaddleSeg and PaddleDetection, on the pages for those who come from them.
THEIRS = {"main_single_gpu.py", "main_multi_gpu.py"}
# What a benchmark writes with an option, which no table here needs.
WRITTEN = {"benchmark/results/picture_reading_profile.csv"}
# Parts of a name that stand for others: MODEL, {train,val}, *.
PLACEHOLDER = re.compile(r"[A-Z]{2,}|[{}*]")

PATH = re.compile(rf"(?<![\w/.~-])(?:{FOLDERS})/[\w./*{{}},-]*\w(?![\w{{}}*])")
MODULE = re.compile(r"(?<![\w./@-])(?:ppvision|benchmark)(?:\.[A-Za-z_]\w*)+(?![\w/])")
FILE = re.compile(r"(?<![\w/.~*}-])\w+\.(?:py|sh)\b")
TEST = re.compile(r"(?<![\w./-])test_\w+\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose_of(source: Path) -> str:
    """Docstrings and comments of a module, or the whole page."""
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
    return "\n".join(found)


def names(pattern: re.Pattern, sources: list[Path]) -> Iterator[tuple[str, str]]:
    """Where a name stands, and the name, without those of the reader's own and placeholders."""
    for source in sources:
        for name in dict.fromkeys(pattern.findall(prose_of(source))):
            if not YOURS.fullmatch(name) and not PLACEHOLDER.search(name):
                yield source.relative_to(ROOT).as_posix(), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name == "torch":  # the comparisons' own package: the file has to do
                return end == len(parts)
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def test_files_are_there():
    found = names(PATH, PAGES + SOURCES)
    wrong = [f"{where}: {n}" for where, n in found if not (ROOT / n).exists() and n not in WRITTEN]
    known = {path.name for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.*")}
    wrong += [
        f"{where}: {n}"
        for where, n in names(FILE, PAGES)
        if n not in known | THEIRS and "results.md" not in where
    ]
    assert wrong == []


def test_modules_and_what_is_in_them_are_there():
    for library in ("paddleseg", "ppdet", "paddleslim"):
        pytest.importorskip(library)
    file = re.compile(r".*\.(py|yml|md)")
    found = [(w, n) for w, n in names(MODULE, PAGES + SOURCES) if not file.fullmatch(n)]
    assert [f"{where}: {n}" for where, n in found if n in MOVED or not resolves(n)] == []


def test_tests_are_there():
    tests = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")}
    functions = {n for text in tests.values() for n in re.findall(r"def (test_\w+)", text)}
    known = tests.keys() | functions | {"test_config", "test_my_net"}  # PaddleSeg's key; yours
    assert [f"{where}: {n}" for where, n in names(TEST, PAGES) if n not in known] == []


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                wrong.append(f"{page.name}: {link}")
    assert wrong == []


def test_lines_of_prose_are_short():
    """Tables, code and pictures cannot be wrapped."""
    wrong = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), page.read_text("utf-8"),
                      flags=re.DOTALL | re.MULTILINE)  # fmt: skip
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > WIDTH and not line.startswith(("|", "!", "#")):
                wrong.append(f"{page.name}:{number}")
    assert wrong == []


def test_the_page_about_the_design_lists_every_room():
    """In the order of `ROOMS`."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| module or folder ")[2].partition("\n\n")[0]
    rooms = re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)
    assert tuple(r if r == "ppvision" else f"ppvision.{r}" for r in rooms) == ROOMS
