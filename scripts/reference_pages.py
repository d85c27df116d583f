"""Write the reference pages of docs/ from the code: verbs, Python functions, config keys.

    python scripts/reference_pages.py

A test compares the pages with the code.
"""

import argparse
import ast
import inspect
import os
import re
import textwrap
from pathlib import Path

os.environ["COLUMNS"] = "100"  # of the help

import ppvision
from ppvision.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTE = "`python scripts/reference_pages.py` writes this page from the code."
WIDTH = 100  # characters of a line of prose


def _prose(text: str) -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False) + "\n"


def cli_page() -> str:
    """Return the page with the help of every verb."""
    parser = build_parser()
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = [
        "# Reference: the command line\n",
        _prose(f"{NOTE} `ppvision VERB --help` shows the same."),
    ]
    for name, verb in verbs.choices.items():
        parts.append(f"## ppvision {name}\n\n```text\n{verb.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


def python_page() -> str:
    """Return the page with names, signatures and docstrings of the public Python functions."""
    parts = [
        "# Reference: Python\n",
        _prose(f"{NOTE} Everything here is a name of `import ppvision`."),
    ]
    for name in sorted(ppvision.__all__):
        found = getattr(ppvision, name)
        if not callable(found):
            continue
        parts.append(_described(name, found, "##"))
        if inspect.isclass(found):
            parts += [
                _described(f"{name}.{key}", value, "###")
                for key, value in vars(found).items()
                if not key.startswith("_") and (callable(value) or isinstance(value, property))
            ]
    return "\n".join(parts)


def _described(name: str, found: object, level: str) -> str:
    text = inspect.getdoc(found) or ""
    if isinstance(found, property):
        return f"{level} {name}\n\n```text\n{text}\n```\n"
    signature = re.sub(r"<object object at \w+>", "...", str(inspect.signature(found)))
    call = f"{name}{_wrapped(signature)}"
    return f"{level} {name}\n\n```python\n{call}\n```\n\n```text\n{text}\n```\n"


def _wrapped(signature: str) -> str:
    """Format a signature; a long one has one parameter per line."""
    if len(signature) < 80:
        return signature
    parameters, depth = [""], 0
    inside, _, after = signature[1:].rpartition(")")
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parameters.append("")
        else:
            parameters[-1] += letter
    return "(\n" + "".join(f"    {p.strip()},\n" for p in parameters) + f"){after}"


def config_page() -> str:
    """Return the page with the keys of configs, from docstrings of the modules that read them."""
    parts = [
        "# Reference: config keys\n",
        _prose(NOTE),
        _prose(
            "A config is YAML. Its `task` is classification, segmentation or detection. The keys "
            "of **segmentation** are those of PaddleSeg, and the keys of **detection** are those "
            "of PaddleDetection. Our own keys below are valid in both. `-o KEY=VALUE` on the "
            "command line overrides any key. An unknown key is an error with file and line."
        ),
    ]
    for title, module in (
        ("Classification", "ppvision/tasks/classification/config.py"),
        ("Several widths: slim_config", "ppvision/tasks/multibit/slim_config.py"),
    ):
        parts.append(f"## {title}\n\n{_as_markdown(_docstring(module))}\n")
    from ppvision.engine.trainer import TrainOptions

    options = inspect.getdoc(TrainOptions).partition("Raises:")[0].rstrip()
    parts.append(
        "## Training, in every task\n\n"
        + _prose(
            "`seed`, `accumulate`, `clip_norm` and `ema_decay` may be in the config. The others "
            "are flags of `ppvision train`."
        )
        + f"\n```text\n{options}\n```\n"
    )
    return "\n".join(parts)


def _docstring(module: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8"))) or ""


def _as_markdown(text: str) -> str:
    """Mark indented blocks as YAML."""
    block = re.compile(r"(?:^    .*\n?|^\n(?=    ))+", re.MULTILINE)

    def fenced(found: re.Match) -> str:
        lines = [line.removeprefix("    ") for line in found[0].strip("\n").splitlines()]
        return "\n```yaml\n" + "\n".join(lines) + "\n```\n"

    return re.sub(r"\n{3,}", "\n\n", block.sub(fenced, text))


PAGES = {
    "reference_cli.md": cli_page,
    "reference_python.md": python_page,
    "reference_config.md": config_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
