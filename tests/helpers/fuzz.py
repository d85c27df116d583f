"""Mutated documents for tests of parsers, and the bounds that every parser has to keep.

    for seed in range(DEFAULT_COUNT):
        rng = random.Random(seed)
        data = json.dumps(mutate_document(document, rng)).encode()
        call_within_bounds(lambda: parse(path), size=len(data), case=f"seed {seed}")

A parser may succeed or raise `PpvisionError`. Anything else, a call that takes too long, and one
that allocates more than ten times its input (64 MiB for small ones) fail the test.
"""

import copy
import itertools
import json
import pickletools
import random
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from ppvision.errors import PpvisionError

COUNT = 1000  # mutations of one parser in `all` mark
DEFAULT_COUNT = COUNT // 10  # the first of the same seeds
FLOOR = 64 * 2**20  # bytes that any call may allocate
FACTOR = 10  # times its input that a call may allocate
SECONDS = 20  # of one call; ten times what the slowest takes on a loaded machine

# In the place of a value that belongs there: of every type that JSON, YAML and Python know, at the
# edges of what formats can hold, large enough to hurt whoever takes them at their word.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 70_000, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1),
    *(2**63, 2**64, -(2**63), 10**9, 10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1e-320, 1e-300, 1e30, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "0", "1", "-1", "1.0", "nan", "1e999", "true", "none", "None", "\0", "\ufeff"),
    *("..", "/", "a/../..", "../../x", "/etc/passwd", "a\\b", "model.json\0", "%s%n", "[", "{}"),
    *("x" * 300, "x" * 5000, "x" * 100_000, "\ud800", "\udcff", "é", "²", "\U0001f600"),
    *([], {}, [[]], [{}], [0], [0] * 1000, [1, 2, 3], [1, 2, 3, 4, 5], [2**40, 2**40], [None]),
    *(["x", None], [["a"]], {"": None}, {"id": 0}, {"type": "Resize"}, {"x": {"y": []}}),
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


def _deep(depth: int) -> list:
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


def strange_value(rng: random.Random) -> object:
    """A value that a careless parser does not expect."""
    if rng.random() < 0.03:
        return _deep(rng.choice((50, 500)))
    return copy.deepcopy(rng.choice(VALUES))


def _places(node: object) -> Iterator[tuple[dict | list, object]]:
    """Every `(container, key or index)` below a node."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])


def mutate_document(document: dict | list, rng: random.Random) -> dict | list:
    """A deep copy of a document of dictionaries, lists and plain values, with one change: a value
    becomes another one, an entry goes, is there twice, has another key or another entry's value.
    """
    mutated = copy.deepcopy(document)
    container, key = rng.choice(list(_places(mutated)))
    change = rng.choice(("value", "value", "value", "remove", "repeat", "swap", "rename"))
    if change == "remove":
        del container[key]
    elif change == "repeat" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif change == "rename" and isinstance(container, dict):
        container[rng.choice(("", "id", str(key) * 2, str(key).upper()))] = container.pop(key)
    elif change == "swap":
        other, place = rng.choice(list(_places(mutated)))
        container[key] = copy.deepcopy(other[place])
    elif isinstance(container[key], (int, float)) and rng.random() < 0.3:
        container[key] = container[key] * rng.choice((-1, 0.5, 2, 1000, 1e30))
    else:
        container[key] = strange_value(rng)
    return mutated


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


def mutate_yaml(contents: list[Any], count: int, seed: int) -> Iterator[str]:
    """`count` YAML documents; half of them have one change inside of a valid one, the others one
    change of their text.
    """
    rng = random.Random(seed)
    for number in range(count):
        content = contents[rng.randrange(len(contents))]
        if number % 2:
            yield _dump(mutate_document(content, rng))
        else:
            yield change_text(_dump(content), rng)


def _dump(content: Any) -> str:
    try:
        return yaml.safe_dump(content, sort_keys=False)
    except RecursionError:  # 500 lists in each other; YAML reads what JSON writes
        return json.dumps(content)


_TOKENS = (
    *(
        b"\0",
        b"\xff",
        b"\xfe\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\t",
        b" ",
        b"\n\n",
    ),
    *(
        b"-1",
        b"0",
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"null",
        b"&x;",
        b"<!--",
        b"]]>",
        b"</",
        b"\x1b[2J",
    ),
    *(
        b"[" * 2000,
        b"{",
        b"}",
        b'"',
        b"'",
        b"\\",
        b"\\ud800",
        b",",
        b":",
        b"..",
        b"/",
        b"*a",
        b"&a ",
    ),
    *(b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8", b"\x85", b"\xb2"),
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """The data with one to three changes: flipped bits, lost, repeated or foreign bytes, a cut."""
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(mutated) + 1)
        end = min(len(mutated), place + rng.choice((1, 1, 2, 8, 64)))
        change = rng.choice(("flip", "random", "remove", "repeat", "token", "token", "cut"))
        if change == "cut":
            del mutated[place:]
        elif change == "remove":
            del mutated[place:end]
        elif change == "repeat":
            mutated[place:place] = mutated[place:end] * rng.choice((1, 2, 100))
        elif change == "token":
            mutated[place:end] = rng.choice(_TOKENS)
        elif change == "random":
            mutated[place:end] = rng.randbytes(end - place)
        elif place < len(mutated):
            mutated[place] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle in which one operation has another argument, is missing, doubled or another one."""
    operations = list(pickletools.genops(data))
    starts = [position for *_, position in operations] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(starts)]
    number = random.randrange(len(parts))
    operation, argument, _ = operations[number]
    kind = random.randrange(4)
    if kind == 0:
        parts[number] = b""
    elif kind == 1:
        parts[number] *= 2
    elif kind == 2:
        parts[number] = rng.choice(parts)
    elif isinstance(argument, str) and operation.name == "GLOBAL":
        names = ("numpy ndarray", "numpy dtype", "numpy void", "os system", "builtins getattr")
        names += ("collections OrderedDict", "_codecs encode", "builtins tuple", "numpy load")
        parts[number] = b"c" + rng.choice(names).replace(" ", "\n").encode() + b"\n"
    elif isinstance(argument, str):
        texts = ("f4", "O8", "V8", "U4", "M8[ns]", "f4,f4", "<", ">", "=", "|", "latin1", "C", "")
        text = rng.choice((*texts, "numpy", "dtype", "os", "system", "x" * 1000)).encode()
        parts[number] = b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(argument, bytes):
        parts[number] = b"B" + struct.pack("<I", count := rng.choice((0, 1, 7, 400))) + b"a" * count
    elif argument is not None or operation.name in ("NONE", "NEWTRUE", "NEWFALSE"):
        numbers = (0, 1, -1, 3, 255, 2**31 - 1, -(2**31), 1 << 20)
        value = rng.choice(numbers)
        if "PUT" in operation.name or "GET" in operation.name:
            parts[number] = rng.choice((b"r", b"j")) + struct.pack("<I", value & 0xFFFFFFFF)
        else:
            forms = (b"J" + struct.pack("<i", value), b"N", b"\x88", b"}", b"]", b")")
            parts[number] = rng.choice((forms[0], *forms))
    return b"".join(parts)


def with_header(document: object, rest: bytes) -> bytes:
    """A safetensors file of a header and the bytes behind it."""
    header = json.dumps(document).encode()
    return struct.pack("<Q", len(header)) + header + rest


class _TooLongError(BaseException):
    """Not an Exception, so that no parser catches it."""


def call_within_bounds(
    call: Callable[[], object], *, size: int, case: str, seconds: float = SECONDS
) -> object:
    """Call a parser; only `PpvisionError` may come out, within bounds of time and memory.

    Args:
        call: without arguments.
        size: bytes of what it reads.
        case: how the test's failure calls it, such as its seed.
        seconds: that it may take. Default 20.

    Returns:
        What `call` returns, or the `PpvisionError`.
    """

    def interrupt(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, interrupt)
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    base, _ = tracemalloc.get_traced_memory()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        result = call()
    except PpvisionError as error:
        result = error
    except _TooLongError:
        raise AssertionError(f"{case}: no answer within {seconds} s") from None
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _, peak = tracemalloc.get_traced_memory()
        if not tracing:
            tracemalloc.stop()
    limit = max(FLOOR, FACTOR * size)
    assert peak - base <= limit, f"{case}: allocated {peak - base} bytes, more than {limit}"
    return result
