"""Pages for people who come from other packages: the new commands are commands of ours."""

import re
import shlex

import pytest

from ppvision import cli
from ppvision.configs import find_config
from tests.helpers.configs import ROOT

PAGES = sorted(ROOT.glob("docs/coming_from_*.md"))


def new_words(page: str) -> list[list[str]]:
    """What the blocks hold, and what the right column of the table has in code."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    cells = [row.split(" | ")[1] for row in page.splitlines() if row.startswith("| ")]
    inside = [code for cell in cells for code in re.findall("`(.*?)`", cell)]
    return [shlex.split(line) for line in [*blocks.splitlines(), *inside] if line]


def flags_of(verb: str) -> set[str]:
    (verbs,) = (a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    return {flag for action in verbs[verb]._actions for flag in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_new_commands_are_commands(page):
    words = new_words(page.read_text(encoding="utf-8"))
    commands = [line for line in words if line[0] == "ppvision" and len(line) > 1]
    assert len(commands) >= 6
    for command in commands:
        cli.build_parser().parse_args(command[1:])
        for word in command:
            if word.startswith("configs/"):
                find_config(word)
    scripts = [line for line in words if "scripts/train.sh" in line]
    assert scripts
    of_training = [line for line in words if line[0].startswith("-")]
    assert of_training
    for line in scripts + of_training:
        given = {word for word in line if word.startswith("-")}
        assert given <= flags_of("train") | flags_of("eval"), line


def test_there_is_a_page_for_each():
    assert {page.stem.removeprefix("coming_from_") for page in PAGES} == {
        *("paddlevit", "paddleseg", "paddledetection")
    }
