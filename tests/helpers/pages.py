"""The fenced blocks of README and docs, and their marks.

A block that no test runs has a mark on the line before it:

    <!-- not run by tests: needs ADE20K and hours on a GPU -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.configs import ROOT

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("examples/**/*.md")),
        ROOT / "benchmark/README.md",
    )
]
RUNNABLE = ("bash", "console", "python")
_BLOCK = re.compile(
    r"(?:^<!-- not run by tests: (?P<reason>[^>]*?) -->\n)?"
    r"^```(?P<language>.*)\n(?P<text>(?s:.*?))^```$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """Attributes:
    page: its path in the repository.
    line: of the page, where its text begins.
    language: the word after the fence; "" without one.
    text: between the fences.
    reason: of its mark; None without a mark.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_page(page: str) -> str:
    return Path(ROOT, page).read_text(encoding="utf-8")


def find_blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    return [
        Block(
            page,
            text.count("\n", 0, match.start("text")) + 1,
            match["language"],
            match["text"],
            " ".join(match["reason"].split()) if match["reason"] is not None else None,
        )
        for match in _BLOCK.finditer(text)
    ]


def blocks_of(page: str) -> list[Block]:
    return find_blocks(page, read_page(page))
