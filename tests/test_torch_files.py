"""Reading PyTorch's files without PyTorch. The files are written here, by hand, in both formats."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import pytest

from ppvision.errors import WeightsError
from ppvision.zoo.torch_files import convert_to_paddle, read_pth
from tests.helpers.messages import raises_naming

KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


class _Named:
    """Something that pickle writes as a function's name alone."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Call:
    def __init__(self, function: _Named, *arguments) -> None:
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    """Writes names of functions that are not there, and storages as persistent."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_named(self, named: _Named) -> None:
        self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())

    def save_call(self, call: _Call) -> None:
        self.save(call.function)
        self.save(call.arguments)
        self.write(pickle.REDUCE)

    dispatch[_Named] = save_named
    dispatch[_Call] = save_call

    def persistent_id(self, value: object) -> object:
        return value.pid if isinstance(value, _Storage) else None


class _Storage:
    def __init__(self, array: np.ndarray, key: str) -> None:
        kind = _Named("torch", KINDS[array.dtype.name])
        self.pid = ("storage", kind, key, "cpu", array.size)


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()


def tensor(array: np.ndarray, key: str, **changes) -> _Call:
    strides = tuple(step // array.itemsize for step in array.strides)
    parts = dict(offset=0, shape=array.shape, strides=strides) | changes
    return _Call(
        _Named("torch._utils", "_rebuild_tensor_v2"),
        *(_Storage(array, key), parts["offset"], parts["shape"], parts["strides"], False),
        _Call(_Named("collections", "OrderedDict")),
    )


ARRAYS = {
    "conv.weight": np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32),
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(3, dtype=np.float16),
    "norm.running_mean": np.arange(4, dtype=np.float32),
    "norm.num_batches_tracked": np.array(7),
}


def old_file(content: object, arrays: dict[str, np.ndarray]) -> bytes:
    """Before PyTorch 1.6: magic number, version, sizes, tensors, keys, storages."""
    parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True})]
    keys = [str(i) for i in range(len(arrays))]
    parts += [pickled(content), pickled(keys)]
    for array in arrays.values():
        parts += [struct.pack("<q", array.size), array.tobytes()]
    return b"".join(parts)


def zip_file(content: object, arrays: dict[str, np.ndarray], **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", b"little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return file.getvalue()


def whole(arrays: dict[str, np.ndarray], **changes) -> dict:
    return {name: tensor(a, str(i), **changes) for i, (name, a) in enumerate(arrays.items())}


@pytest.mark.parametrize("write", [old_file, zip_file])
@pytest.mark.parametrize("around", [None, "state_dict", "model"])
def test_tensors_come_back(tmp_path, write, around):
    content = whole(ARRAYS)
    path = tmp_path / "w.pth"
    path.write_bytes(write({around: content, "epoch": 3} if around else content, ARRAYS))
    found = read_pth(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_views_of_a_storage(tmp_path):
    """A transposed tensor, and two of one storage."""
    base = np.arange(12, dtype=np.float32)
    content = {
        "transposed": tensor(base, "0", shape=(3, 4), strides=(1, 3)),
        "tail": tensor(base, "0", offset=8, shape=(4,), strides=(1,)),
    }
    path = tmp_path / "w.pth"
    path.write_bytes(zip_file(content, {"base": base}))
    found = read_pth(path)
    np.testing.assert_array_equal(found["transposed"], base.reshape(4, 3).T)
    np.testing.assert_array_equal(found["tail"], base[8:])


def test_names_and_layouts_as_paddles():
    found = convert_to_paddle(ARRAYS, [(r"^conv\.", "stem.")])
    assert set(found) == {"stem.weight", "fc.weight", "half", "norm._mean"}
    np.testing.assert_array_equal(found["fc.weight"], ARRAYS["fc.weight"].T)


class Hostile:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("write", [old_file, zip_file])
def test_nothing_that_a_file_names_is_run(tmp_path, write):
    marker = tmp_path / "ran"
    path = tmp_path / "w.pth"
    path.write_bytes(write({**whole(ARRAYS), "evil": Hostile(marker)}, ARRAYS))
    with pytest.raises(WeightsError, match="system"):
        read_pth(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(shape=(1 << 40,), strides=(0,)),
        dict(shape=(1 << 40, 1 << 40), strides=(0, 0)),
        dict(offset=1 << 62),
        dict(offset=-1),
        dict(strides=(-1, 1, 1, 1)),
        dict(shape=(2,), strides=(1, 1)),
        dict(shape=("4",), strides=(1,)),
        dict(shape=(1,) * 9, strides=(1,) * 9),
    ],
    ids=str,
)
def test_views_outside_of_a_storage_are_refused(tmp_path, changes):
    arrays = {"conv.weight": ARRAYS["conv.weight"]}
    path = tmp_path / "w.pth"
    path.write_bytes(zip_file(whole(arrays, **changes), arrays))
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_pth(path)


def _deep_key() -> bytes:
    """A dictionary whose key is a tuple in a tuple in ...: hashing it would end the process."""
    return b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        pickle.dumps([1, 2], 2),
        pickle.dumps(OrderedDict(a=np.ones(2)), 2),
        b"\x80\x02r\xff\xff\xff\xff.",  # LONG_BINPUT: a memo of 4 GiB in C
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BYTEARRAY8 of 2^63 bytes
        _deep_key() * 4,
        old_file(whole(ARRAYS), ARRAYS)[:-20],
        zip_file(whole(ARRAYS), ARRAYS)[:-20],
        zip_file(whole(ARRAYS), {}),
        zip_file(whole(ARRAYS), ARRAYS, compression=zipfile.ZIP_DEFLATED),
        zip_file({"a": 3}, {}),
        zip_file({"a": _Call(_Named("torch._utils", "_rebuild_tensor_v2"), 1, 0, (1,), (1,))}, {}),
    ],
    ids=range(13),
)
def test_files_that_are_no_weights(tmp_path, data):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_pth(path)


def test_no_file():
    with raises_naming(FileNotFoundError, "absent.pth", "PyTorch"):
        read_pth("absent.pth")
