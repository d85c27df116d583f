"""Documents that are nearly right: bytes changed anywhere, or one value of a valid document."""

import copy
import itertools
import json
import pickletools
import struct
from random import Random

# Values that readers stumble over: signs, borders of integers, sizes, types, depth.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1),
    *(2**63, -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e300, -1e300),
    *("", " ", "0", "1", "nan", "null", "\u0000", "\ufeff", "\U0001f600", "../../etc", "x" * 10000),
    *([], {}, [[]], [None], [0], [1, 2, 3], [2**40, 2**40], {"": None}, {"a": {"a": {}}}),
    [0] * 1000,
)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, doubled, removed, or overwritten."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((1, 1, 2, 4, 8, 64)))
        kind = random.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            data[start:start] = data[start:end]
        elif kind == 3:
            del data[start:end]
        elif kind == 4:
            data[start:end] = random.choice((b"\xff", b"\x00", b"\x7f")) * (end - start)
        else:
            data[start:end] = random.randbytes(end - start)
    return bytes(data)


def _places(node: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values below a node."""
    found = [path] if path else []
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def change_value(document: object, random: Random) -> object:
    """A copy of plain dicts and lists in which one value is another, is missing, or has another
    key."""
    document = copy.deepcopy(document)
    *outer, key = random.choice(_places(document))
    node = document
    for step in outer:
        node = node[step]
    kind = random.randrange(10)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[random.choice(("", "x" * 5000, "\u0000", "a/../b"))] = node.pop(key)
    elif kind == 2 and isinstance(node[key], int):
        node[key] += random.choice((-1, 1))
    elif kind == 3:  # a value from elsewhere in the document
        *steps, last = random.choice(_places(document))
        other = document
        for step in steps:
            other = other[step]
        node[key] = copy.deepcopy(other[last])
    else:
        node[key] = copy.deepcopy(random.choice(VALUES))
    return document


def change_operation(data: bytes, random: Random) -> bytes:
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
        parts[number] = random.choice(parts)
    elif isinstance(argument, str) and operation.name == "GLOBAL":
        names = ("numpy ndarray", "numpy dtype", "numpy void", "os system", "builtins getattr")
        names += ("collections OrderedDict", "_codecs encode", "builtins tuple", "numpy load")
        parts[number] = b"c" + random.choice(names).replace(" ", "\n").encode() + b"\n"
    elif isinstance(argument, str):
        texts = ("f4", "O8", "V8", "U4", "M8[ns]", "f4,f4", "<", ">", "=", "|", "latin1", "C", "")
        text = random.choice((*texts, "numpy", "dtype", "os", "system", "x" * 1000)).encode()
        parts[number] = b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(argument, bytes):
        parts[number] = (
            b"B" + struct.pack("<I", count := random.choice((0, 1, 7, 400))) + b"a" * count
        )
    elif argument is not None or operation.name in ("NONE", "NEWTRUE", "NEWFALSE"):
        numbers = (0, 1, -1, 3, 255, 2**31 - 1, -(2**31), 1 << 20)
        value = random.choice(numbers)
        if "PUT" in operation.name or "GET" in operation.name:
            parts[number] = random.choice((b"r", b"j")) + struct.pack("<I", value & 0xFFFFFFFF)
        else:
            forms = (b"J" + struct.pack("<i", value), b"N", b"\x88", b"}", b"]", b")")
            parts[number] = random.choice((forms[0], *forms))
    return b"".join(parts)


def with_header(document: object, rest: bytes) -> bytes:
    """A safetensors file of a header and the bytes behind it."""
    header = json.dumps(document).encode()
    return struct.pack("<Q", len(header)) + header + rest
