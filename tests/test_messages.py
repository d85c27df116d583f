"""Messages are matched by type and tokens: the helpers for that, and that every test does so."""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.messages import find_missing, raises_naming, warns_naming

ROOT = Path(__file__).resolve().parents[1]

MESSAGE = "config (job.yml:32): --bits: expected 2 to 8 for 'pale_nano', got 16. Pass --width."


@pytest.mark.parametrize(
    "token", ["job.yml:32):", "--bits", "--bits:", "16", "'pale_nano'", "pale_nano", "(job.yml"]
)
def test_tokens_that_are_there(token):
    assert find_missing(MESSAGE, token) == []


@pytest.mark.parametrize("token", ["1", "6", "3", "pale", "nano", "bit", "--bit", "job.yml:3", "x"])
def test_a_part_of_a_word_or_number_does_not_count(token):
    assert find_missing(MESSAGE, "16", token) == [token]


@pytest.mark.parametrize("tokens", [(), ("got 16",), ("",), (" 16",)])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(AssertionError, match="token"):
        find_missing(MESSAGE, *tokens)


def test_errors_and_warnings_have_every_token():
    def fail() -> None:
        raise KeyError("a", 1)

    with raises_naming(KeyError, "'a'", "1") as caught:
        fail()
    assert caught.value.args == ("a", 1)
    with pytest.raises(AssertionError, match="'b'"), raises_naming(KeyError, "'a'", "'b'"):
        fail()
    with pytest.raises(KeyError), raises_naming(ValueError, "'a'"):
        fail()
    with pytest.raises(pytest.fail.Exception, match="KeyError"), raises_naming(KeyError, "'a'"):
        pass


def test_one_warning_has_every_token():
    def warn() -> None:
        warnings.warn("oneDNN", UserWarning, stacklevel=1)
        warnings.warn("OpenVINO differs", UserWarning, stacklevel=1)

    with warns_naming(UserWarning, "OpenVINO", "differs"):
        warn()
    with (
        pytest.raises(AssertionError, match="oneDNN"),
        warns_naming(UserWarning, "oneDNN", "differs"),
    ):
        warn()


# -- the convention -------------------------------------------------------------------------------

# Whose arguments after the first are tokens.
NAMING = {"raises_naming", "warns_naming"}


def values_of(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    """What names of a test stand for, where that is written out: in its cases, its loops and its
    assignments."""

    def pair(names: list[str], values: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        for case in getattr(values, "elts", []):
            if isinstance(case, ast.Call) and ast.unparse(case.func) == "pytest.param":
                case = case.args[0] if len(names) == 1 else ast.Tuple(case.args)
            cells = [case] if len(names) == 1 else getattr(case, "elts", [])
            yield from zip(names, cells, strict=False)

    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            names = ast.literal_eval(decorator.args[0])
            names = re.split(r",\s*", names) if isinstance(names, str) else list(names)
            yield from pair(names, decorator.args[1])
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            yield from pair(
                [n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)], node.iter
            )
        elif isinstance(node, ast.Assign):
            yield from ((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))


def patterns_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of what tests look for in messages, as far as it is written out."""
    tables = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        given: dict[str, list[ast.expr]] = {}
        for name, value in values_of(function):
            given.setdefault(name, []).append(value)
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            wanted = [keyword.value for keyword in call.keywords if keyword.arg == "match"]
            if ast.unparse(call.func) in NAMING:
                wanted += call.args[1:]
            for value in wanted:
                if isinstance(value, ast.Name):
                    found = given.get(value.id, [])
                elif isinstance(value, ast.Subscript):  # MESSAGES[name]
                    found = getattr(tables.get(ast.unparse(value.value)), "values", [])
                else:
                    found = value.values if isinstance(value, ast.JoinedStr) else [value]
                for text in found:
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        yield text.lineno, text.value


def find_sentences(source: str) -> list[int]:
    """Lines of patterns that are more than one token: with blanks, or with `.*` between tokens."""
    return sorted(
        {n for n, text in patterns_of(ast.parse(source)) if re.search(r"\s|\\s|\.[*+]", text)}
    )


def test_messages_are_matched_by_tokens():
    """By a name, key, number, flag, class or file: sentences may be reworded."""
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (lines := find_sentences(path.read_text(encoding="utf-8")))
    }
    assert found == {}


SENTENCES = """
REASONS = {"a": "a b"}
@pytest.mark.parametrize(("x", "message"), [(1, "num_classes"), (2, "whole number"), (3, r"a.*b")])
def test_cases(x, message):
    with pytest.raises(ValueError, match=message):
        call(x)
def test_others():
    with pytest.raises(ValueError, match="--bits"):
        call(1)
    with pytest.warns(UserWarning, match=f"{name} is"):
        call(1)
    with raises_naming(ValueError, "bits:", "got 9"):
        call(1)
    for message in ("seed", "of 9"):
        with pytest.raises(ValueError, match=message):
            call(1)
    said = "a sentence"
    with pytest.raises(ValueError, match=said):
        call(REASONS["a"])
    with pytest.raises(ValueError, match=REASONS["a"]):
        call(1)
"""


def test_sentences_are_found():
    assert find_sentences(SENTENCES) == [2, 3, 10, 12, 14, 17]
