"""Messages of errors, matched by type and tokens, so that their sentences can be reworded.

Where one token tells the message from others, `pytest.raises(..., match="num_classes")` does; where
it takes several:

    with raises_naming(ConfigError, "model.backbone", "'pale_sise'", "pale_size"):
        open_job(path)
"""

import contextlib
import re
from collections.abc import Iterator

import pytest


def find_missing(message: str, *tokens: str) -> list[str]:
    """The tokens that a message lacks. One inside of a longer word or number does not count.

    A token has no blanks: a name, key, number, flag, class or file, such as `--bits` or `'a.png'`.
    """
    assert tokens, "expected tokens, got none"
    for token in tokens:
        assert token.split() == [token], f"expected a token without blanks, got {token!r}"
    return [token for token in tokens if not re.search(_whole(token), message)]


def _whole(token: str) -> str:
    """A pattern: no letter, digit or underscore goes on where the token ends with one."""
    start = r"\b" if re.match(r"\w", token[0]) else ""
    end = r"\b" if re.match(r"\w", token[-1]) else ""
    return f"{start}{re.escape(token)}{end}"


@contextlib.contextmanager
def raises_naming(
    error: type[Exception] | tuple[type[Exception], ...], *tokens: str
) -> Iterator[pytest.ExceptionInfo]:
    """`pytest.raises` for an error whose message has each of the tokens, in any order."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    missing = find_missing(message, *tokens)
    assert not missing, f"expected {', '.join(missing)} in the message, got {message!r:.2000}"


@contextlib.contextmanager
def warns_naming(kind: type[Warning], *tokens: str) -> Iterator[pytest.WarningsRecorder]:
    """`pytest.warns` for a warning whose message has each of the tokens, in any order."""
    with pytest.warns(kind) as caught:
        yield caught
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, kind)]
    assert any(not find_missing(message, *tokens) for message in messages), (
        f"expected {', '.join(tokens)} in one message, got {messages!r:.2000}"
    )
