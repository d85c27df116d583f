"""Documents with one fault each, for fuzz tests of readers."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

# In the place of a value that belongs there. Large enough to hurt whoever takes them at their word.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 70_000, 2**31, 2**63, 10**9, 10**30, -(10**30)),
    *(0.0, 0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "none", "1", "../../x", "/etc/passwd", "model.json\0", "x" * 5000, "\ud800", "é"),
    *([], {}, [[]], [0], [1, 2, 3, 4, 5], ["x", None], {"type": "Resize"}, {"x": {"y": []}}),
)

# What a parser may run into, whatever the document.
BOMBS = (
    "",
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000 + "x",
    "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(30)),
    "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else 'x'] * 9)}]" for n in range(12)),
    "x: " + "9" * 100_000,
    "x: 0x" + "f" * 100_000,
    "x: " + "1:" * 5000 + "1",
    "x: !!int abc",
    "x: !!bool maybe",
    "x: !!timestamp x",
    "x: 2001-99-99",
    "x: !!binary '*'",
    "x: !!python/object/apply:os.system [echo]",
    "x: !Tag {a: 1}",
    "? [a, b]\n: c",
    "<<: 1",
    "x: 1\nx: 2",
    "--- a\n--- b",
    "%YAML 9.9\n---\na",
    "x: !!set {a, b}",
    "x: *nowhere",
    "a" * 300_000,
    "a: [" + "1," * 200_000 + "1]",
    "a: '" + "\\" * 1000,
    "\ufeff\ufeffa: 1",
    "a:\tb:\tc",
    "\x00",
)


def change_one_value(content: Any, rng: random.Random) -> Any:
    """A copy with another value at one place, or one entry missing, doubled or added."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    owner, key = rng.choice(places)
    action = rng.random()
    if action < 0.8:
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    elif action < 0.9:
        del owner[key]
    elif isinstance(owner, list):
        owner.insert(key, copy.deepcopy(rng.choice([*VALUES, owner[key]])))
    else:
        owner[rng.choice(["x", "", "type", 1, None, True, 0.5])] = rng.choice(VALUES)
    return content


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a document, as its owner and key."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def change_text(text: str, rng: random.Random) -> str:
    """A text with one change of characters, or something else altogether."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + rng.choice([1, 5, 200]))
    return rng.choice(
        [
            lambda: text[:start] + text[end:],
            lambda: text[:start],
            lambda: text[:end] + text[start:],
            lambda: text[:start]
            + rng.choice("[]{}:,-&*!|>'\"%@`#?\t\n 019.eE\x00\u2028é")
            + text[end:],
            lambda: text[:start] + rng.choice(BOMBS) + text[end:],
            lambda: rng.choice(BOMBS),
            lambda: text + "\n" + rng.choice(BOMBS),
        ]
    )()


def mutate_documents(contents: list[Any], count: int, seed: int) -> Iterator[str]:
    """`count` YAML documents; half of them have one value changed inside of a valid one."""
    rng = random.Random(seed)
    for number in range(count):
        content = contents[rng.randrange(len(contents))]
        if number % 2:
            yield yaml.safe_dump(change_one_value(content, rng), sort_keys=False)
        else:
            yield change_text(yaml.safe_dump(content, sort_keys=False), rng)
