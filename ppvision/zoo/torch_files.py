"""Read PyTorch's files of weights without PyTorch and without executing functions that they name.

A `.pth` is a pickle of a dictionary of tensors, with their numbers either after it (before PyTorch
1.6) or next to it in a zip archive. Python's own unpickler reads the pickle (the unpickler in C
allocates the sizes that a file states). It is limited to the instructions that `torch.save` writes.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ppvision.errors import MissingFileError, WeightsError
from ppvision.files import name_read_errors

_TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
# Instructions of pickle protocol 2, which torch.save writes: plain values, containers, calls of
# known functions.
_INSTRUCTIONS = frozenset(
    (
        *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
        *("LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "EMPTY_DICT"),
        *("EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"),
        *("SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
        *("REDUCE", "BUILD", "BINPERSID"),
    )
)
_AXES = 8  # more than any weight has


class _Storage:
    """The place of the numbers of tensors: key and type of a storage."""

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key


class _Tensor:
    """A view of a storage, the result of `_rebuild_tensor_v2`."""

    def __init__(
        self, storage: object, offset: object, shape: object, strides: object, *rest: object
    ) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _Dictionary(dict[str, Any]):
    """A state dict; its attribute `_metadata` of PyTorch is ignored."""

    def __init__(self) -> None:  # torch.save adds the entries one by one
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _TensorsOnly(pickle._Unpickler):  # the unpickler in Python; see the module's docstring
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # hashing a deep tuple would end the process
                raise WeightsError(f"expected names as keys, found a {type(key).__name__}")
            target[key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dictionary
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if module == "torch" and name in _TYPES:
            return name
        raise WeightsError(
            f"expected tensors by name only, found {module}.{name}, which would run code. Do not "
            "use this file; ask its author for safetensors."
        )

    def persistent_load(self, pid: object) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 3 and pid[0] == "storage"):
            raise WeightsError("expected a storage of numbers")
        return _Storage(str(pid[1]), str(pid[2]))


def read_pth(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch file.

    Args:
        path: a file of `torch.save(model.state_dict(), path)`, in either format. A dictionary with
            the tensors under `state_dict` or `model` is accepted too.

    Returns:
        Arrays by name, with PyTorch's names and layouts.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is another one, is incomplete, or names more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"weights: expected a PyTorch file, found none at {path}.")
    with name_read_errors(path):
        path.open("rb").close()  # here, so that a missing right is not reported as damage
    try:
        found = _read_zip(path) if zipfile.is_zipfile(path) else _read_old(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # a hostile or incomplete file can raise anything
        raise WeightsError(
            f"{path}: expected tensors as torch.save writes them, got a file that does not read "
            f"({type(error).__name__}). It may be cut short: fetch it again."
        ) from error
    return found


def _unpickle(file: BinaryIO) -> object:
    start = file.tell()
    for instruction, *_ in pickletools.genops(file):
        if instruction.name not in _INSTRUCTIONS:
            raise WeightsError(
                f"expected a pickle as torch.save writes it, found {instruction.name}"
            )
    file.seek(start)
    return _TensorsOnly(file).load()


def _read_old(path: Path) -> dict[str, np.ndarray]:
    """Read pickles of magic number, version, types, tensors and keys, then storages with their
    sizes."""
    data = path.read_bytes()
    file = io.BytesIO(data)  # its read() never returns more than there is
    for _ in range(3):
        _unpickle(file)
    tensors, keys = _tensors(_unpickle(file)), _unpickle(file)
    kinds = {t.storage.key: t.storage.kind for t in tensors.values()}
    if not isinstance(keys, list) or not set(kinds) == set(map(str, keys)):
        raise WeightsError("expected the storages of its tensors")
    storages = {}
    for key in map(str, keys):
        (count,) = struct.unpack("<q", file.read(8))
        kind = np.dtype(_TYPES[kinds[key]])
        if not 0 <= count * kind.itemsize <= len(data) - file.tell():
            raise WeightsError("expected more numbers: it is cut short")
        storages[key] = np.frombuffer(file.read(count * kind.itemsize), kind)
    return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """Read `NAME/data.pkl`, and each storage as `NAME/data/KEY`, not compressed."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
        folder = pickled.removesuffix("data.pkl")
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # a bomb, or another archive
                raise WeightsError("expected entries that are not compressed")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise WeightsError("expected little-endian numbers")
        tensors = _tensors(_unpickle(io.BytesIO(archive.read(pickled))))
        storages = {
            key: np.frombuffer(archive.read(f"{folder}data/{key}"), np.dtype(_TYPES[kind]))
            for key, kind in {t.storage.key: t.storage.kind for t in tensors.values()}.items()
        }
    return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}


def _tensors(content: object) -> dict[str, Any]:
    if isinstance(content, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"expected tensors by name, got a {type(content).__name__}")
    for name, tensor in content.items():
        whole = isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage)
        if not isinstance(name, str) or not whole:
            raise WeightsError(
                f"expected tensors by name, got {type(tensor).__name__} under {str(name)[:80]!r}"
            )
    return dict(content)


def _view(name: str, tensor: Any, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the numbers of one tensor; a view beyond its storage is refused."""
    storage = storages[tensor.storage.key]
    sizes, steps, offset = list(tensor.shape), list(tensor.strides), tensor.offset
    whole = all(type(n) is int and n >= 0 for n in [*sizes, *steps, offset])
    if not whole or len(sizes) != len(steps) or len(sizes) > _AXES:
        raise WeightsError(f"{name}: expected sizes and steps as whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    count = int(np.prod(sizes, dtype=object)) if sizes else 1
    if count and (last >= storage.size or count > storage.size):
        raise WeightsError(f"{name}: expected numbers inside its storage")
    # Not copied: many tensors of one storage cost no memory.
    return np.lib.stride_tricks.as_strided(
        storage[offset:], sizes, [step * storage.itemsize for step in steps], writeable=False
    )


def convert_to_paddle(
    arrays: Mapping[str, np.ndarray], names: Sequence[tuple[str, str]] = ()
) -> dict[str, np.ndarray]:
    """Convert PyTorch's names and layouts to Paddle's.

    Args:
        arrays: arrays by name.
        names: patterns of names and their replacements, applied one after another.

    Returns:
        Running statistics under Paddle's names, a Linear's weight `[out, in]` as `[in, out]`, no
        `num_batches_tracked`.
    """
    found = {}
    for name, array in arrays.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, new in (
            *names,
            (r"\.running_mean$", "._mean"),
            (r"\.running_var$", "._variance"),
        ):
            name = re.sub(pattern, new, name)
        found[name] = array.T if array.ndim == 2 and name.endswith(".weight") else array
    return found


def is_from_torch(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether names are PyTorch's: they have running statistics of BatchNorm."""
    return any(name.endswith(".running_mean") for name in arrays)
