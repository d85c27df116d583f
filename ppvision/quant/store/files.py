"""The format of a layered model: its manifest, and the tensors in its files.

Source: layers of bits, arXiv 2212.05326 (see `ppvision.quant.codes`). We chose the files.

manifest.json       what the tensors mean; bytes and sha256 of every file
w2.safetensors      the basic layer, here of a model whose lowest width is 2:
    codes/PATH        uint8 [width, ceil(count / 8)], the planes of a weight
    statistics/NAME   [widths, ...], BatchNorm's, of each trained width, the highest first
    float/NAME        every other tensor
    steps             float32, the steps of all weights one after another, by their sorted paths;
    scales, inputs    so are their scales, and the steps of layers' inputs. (A tensor of a few
                      numbers would take more room by its name than by itself.)
w3.safetensors ...  one enhance layer each: codes/PATH, uint8 [1, ceil(count / 8)], the next plane
                    of every weight that grows from 2 bits to 3

No file is trusted: the content of each file is compared with the manifest, and the entries of the
manifest with each other, before they are used.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from ppvision.errors import InputError, PpvisionError, shorten, shorten_text
from ppvision.quant.codes import MAX_BITS, count_plane_bytes, unpack_codes
from ppvision.quant.store.state import LayeredActivation, LayeredState, LayeredWeight
from ppvision.safe_tensors import header_fits

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 8 << 20  # 1000 layers are 0.2 MB; JSON needs much more in memory
_AGAIN = "Copy or fetch it again, or pack the model again."
_TYPES = tuple(map(np.dtype, ("f8", "f4", "f2", "i8", "i4", "i2", "i1")))
_TYPES += tuple(map(np.dtype, ("u8", "u4", "u2", "u1", "?")))
_PARTS = ("architecture", "weights", "activations", "files")
_KEYS = ("format_version", "sha256", "bits", "lowest", "highest", *_PARTS)


class LayeredModelError(PpvisionError, ValueError):
    """A layered model is incomplete, damaged, of another version, or not a layered model."""


def name_file(bits: int) -> str:
    """Return the file name of the layer that makes a model `bits` wide."""
    return f"w{bits}.safetensors"


# -- the manifest ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileEntry:
    """One file.

    Attributes:
        bytes: its size.
        sha256: sha256 of its bytes.
        content: sha256 of its tensors, of those in the files before it, and of their description in
            the manifest (`compute_content_digest`). It shows that files and manifest belong
            together.
    """

    bytes: int
    sha256: str
    content: str


@dataclass(frozen=True)
class WeightEntry:
    """A weight's shape, and the fields of `LayeredWeight`; `scales`: whether there are scales."""

    shape: tuple[int, ...]
    axis: int
    low_bits: int
    top_bits: int
    widths: tuple[int, ...]
    scales: bool

    def width(self, bits: int) -> int:
        """Return the layer's width if the model is at `bits`."""
        return min(max(bits, self.low_bits), self.top_bits)

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ActivationEntry:
    """The fields of `LayeredActivation`."""

    low_bits: int
    top_bits: int
    widths: tuple[int, ...]
    signed: bool


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; `bits` are the trained widths, the highest first."""

    architecture: Mapping[str, Any]
    bits: tuple[int, ...]
    weights: Mapping[str, WeightEntry]
    activations: Mapping[str, ActivationEntry]
    files: Mapping[str, FileEntry]

    @property
    def lowest(self) -> int:
        return self.bits[-1]

    @property
    def highest(self) -> int:
        return self.bits[0]

    def names(self, bits: int) -> list[str]:
        """Return the files of a precision, in reading order."""
        return [name_file(k) for k in range(self.lowest, bits + 1)]

    def structure(self) -> dict[str, Any]:
        """Return the meaning of the tensors, in the form of the file."""
        return {
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "lowest": self.lowest,
            "highest": self.highest,
            "weights": {path: asdict(entry) for path, entry in self.weights.items()},
            "activations": {path: asdict(entry) for path, entry in self.activations.items()},
        }

    def encode(self) -> bytes:
        """Return the content of the file.

        Raises:
            LayeredModelError: it would be larger than a reader accepts.
        """
        content = {
            **self.structure(),
            "architecture": self.architecture,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        content = {"format_version": FORMAT_VERSION, "sha256": compute_digest(content), **content}
        data = json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if len(data) > MAX_MANIFEST_BYTES:
            raise LayeredModelError(
                f"{MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}. "
                "Shorten the config."
            )
        return data


def compute_digest(content: object) -> str:
    """Return the sha256 of a value as canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _require(fits: bool, where: str, expected: str, got: object) -> None:
    if not fits:
        raise LayeredModelError(f"{where}: expected {expected}, got {shorten(got)}. {_AGAIN}")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and check its entries.

    Args:
        data: the content of the file.
        where: its name in errors.

    Raises:
        LayeredModelError: not a manifest, of another version, changed since it was written, or
            contradictory.
    """
    _require(len(data) <= MAX_MANIFEST_BYTES, where, f"at most {MAX_MANIFEST_BYTES} bytes", "more")
    content = _parse_json(data, where)
    _require(isinstance(content, dict), where, "keys and values", content)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise LayeredModelError(
            f"{where}: expected format_version {FORMAT_VERSION}, got {shorten(version)}. Another "
            "version of ppvision wrote it: use that one, or pack the model again."
        )
    _require_keys(content, _KEYS, where)
    own = content.pop("sha256")
    _require(compute_digest(content) == own, where, "the sha256 of its content", own)
    bits = _widths(content["bits"], f"{where}: bits")
    for key, value in (("lowest", bits[-1]), ("highest", bits[0])):
        _whole(content[key], value, value, f"{where}: {key}")
    parts = [content[key] for key in _PARTS]
    for part in parts:
        _require(isinstance(part, dict), where, "keys and values in each part", part)
    architecture, weights, activations, files = parts
    _require_keys(files, [name_file(k) for k in range(bits[-1], bits[0] + 1)], f"{where}: files")
    return Manifest(
        architecture,
        bits,
        {path: _weight_entry(e, f"{where}: weight {shorten(path)}") for path, e in weights.items()},
        {p: _activation_entry(e, f"{where}: input {shorten(p)}") for p, e in activations.items()},
        {name: _file_entry(files[name], f"{where}: {name}") for name in sorted(files)},
    )


# A JSON value takes up to 72 bytes of memory; a value of a manifest is 10 bytes long.
_FREE_VALUES = 100_000
_BYTES_PER_VALUE = 8


def _parse_json(data: bytes, where: str) -> object:
    values = sum(map(data.count, (b",", b"[", b"{")))
    fits = values <= _FREE_VALUES + len(data) // _BYTES_PER_VALUE
    _require(fits, where, "JSON with the values of a manifest", f"{values} of them")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise InputError("a key occurs twice")
        return content

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise InputError(f"{text[:20]} is not a finite number")
        return value

    try:
        content = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=number,
            parse_constant=number,
        )
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # JSON can contain half a character
    except (ValueError, RecursionError) as error:
        raise LayeredModelError(
            f"{where}: expected JSON, got a file that does not read "
            f"({shorten_text(str(error), 200)}). {_AGAIN}"
        ) from error
    return content


def _require_keys(content: Mapping[str, object], expected: Sequence[str], where: str) -> None:
    if missing := [key for key in expected if key not in content]:
        raise LayeredModelError(f"{where}: expected {', '.join(missing)}, got none. {_AGAIN}")
    unknown = [key for key in content if key not in expected]
    _require(not unknown, where, f"no more than {', '.join(expected)}", unknown)


def _whole(value: object, low: int, high: int, where: str) -> int:
    fits = type(value) is int and low <= value <= high
    expected = str(low) if low == high else f"a whole number from {low} to {high}"
    _require(fits, where, expected, value)
    return value


def _widths(value: object, where: str) -> tuple[int, ...]:
    fits = isinstance(value, list) and 1 <= len(value) <= MAX_BITS
    fits = fits and all(type(k) is int and 1 <= k <= MAX_BITS for k in value)
    fits = fits and value == sorted(set(value), reverse=True)
    _require(fits, where, f"widths from {MAX_BITS} to 1, the highest first, each once", value)
    return tuple(value)


def _flag(value: object, where: str) -> bool:
    _require(type(value) is bool, where, "true or false", value)
    return value


def _weight_entry(content: object, where: str) -> WeightEntry:
    _require(isinstance(content, dict), where, "keys and values", content)
    _require_keys(content, list(WeightEntry.__dataclass_fields__), where)
    shape, top = content["shape"], content["top_bits"]
    # In addition, a shape is compared with the planes, whose size is known.
    fits = isinstance(shape, list) and 1 <= len(shape) <= 8
    fits = fits and all(type(n) is int and 1 <= n < 1 << 40 for n in shape)
    _require(fits, f"{where}: shape", "1 to 8 whole numbers above 0", shape)
    widths = _widths(content["widths"], f"{where}: widths")
    return WeightEntry(
        shape=tuple(shape),
        axis=_whole(content["axis"], 0, len(shape) - 1, f"{where}: axis"),
        top_bits=_whole(top, widths[0], widths[0], f"{where}: top_bits"),
        low_bits=_whole(content["low_bits"], 1, top, f"{where}: low_bits"),
        widths=widths,
        scales=_flag(content["scales"], f"{where}: scales"),
    )


def _activation_entry(content: object, where: str) -> ActivationEntry:
    _require(isinstance(content, dict), where, "keys and values", content)
    _require_keys(content, list(ActivationEntry.__dataclass_fields__), where)
    top = _whole(content["top_bits"], 1, MAX_BITS, f"{where}: top_bits")
    return ActivationEntry(
        low_bits=_whole(content["low_bits"], 1, top, f"{where}: low_bits"),
        top_bits=top,
        widths=_widths(content["widths"], f"{where}: widths"),
        signed=_flag(content["signed"], f"{where}: signed"),
    )


def _file_entry(content: object, where: str) -> FileEntry:
    _require(isinstance(content, dict), where, "keys and values", content)
    _require_keys(content, list(FileEntry.__dataclass_fields__), where)
    for key in ("sha256", "content"):
        value = content[key]
        fits = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
        _require(fits, f"{where}: {key}", "64 hexadecimal digits", value)
    size = _whole(content["bytes"], 8, 1 << 50, f"{where}: bytes")
    return FileEntry(size, content["sha256"], content["content"])


# -- from a state to tensors -----------------------------------------------------------------------


def describe_state(state: LayeredState, config: Mapping[str, Any]) -> Manifest:
    """Make the manifest of a state, without its files.

    Raises:
        LayeredModelError: a reader would refuse a field of the state.
    """
    weights = {
        path: {
            "shape": [int(n) for n in w.codes.shape],
            "axis": w.axis % max(1, w.codes.ndim),
            "low_bits": w.low_bits,
            "top_bits": w.top_bits,
            "widths": list(w.widths),
            "scales": w.scales is not None,
        }
        for path, w in state.weights.items()
    }
    activations = {
        path: {
            "low_bits": a.low_bits,
            "top_bits": a.top_bits,
            "widths": list(a.widths),
            "signed": a.signed,
        }
        for path, a in state.activations.items()
    }
    return Manifest(
        config,
        _widths(list(state.bits), "state: bits"),
        {path: _weight_entry(e, f"state: weight {shorten(path)}") for path, e in weights.items()},
        {p: _activation_entry(e, f"state: input {shorten(p)}") for p, e in activations.items()},
        {},
    )


def split_layers(state: LayeredState) -> list[dict[str, np.ndarray]]:
    """Return the tensors of every file, from the lowest width of the model to the highest."""
    lowest, highest = state.bits[-1], state.bits[0]
    layers: list[dict[str, np.ndarray]] = [{} for _ in range(lowest, highest + 1)]
    for path, weight in state.weights.items():
        packed = weight.at(highest).pack()
        layers[0][f"codes/{path}"] = packed[: weight.width(lowest)]
        for bits in range(lowest + 1, highest + 1):
            if weight.width(bits) > weight.width(bits - 1):
                plane = packed[weight.width(bits) - 1 : weight.width(bits)]
                layers[bits - lowest][f"codes/{path}"] = plane
    spoilt = _spoilt(state.floats, state.statistics.get(highest, {}))
    if spoilt:
        raise LayeredModelError(
            f"state: expected numbers, got nan in {shorten(spoilt[0])}. The training has diverged: "
            "take an earlier checkpoint, or train again at a lower rate."
        )
    layers[0] |= _split_steps(state) | _split_statistics(state)
    layers[0] |= {f"float/{name}": array for name, array in state.floats.items()}
    # `ascontiguousarray` would add an axis to an array without axes.
    return [{k: np.asarray(array, order="C") for k, array in layer.items()} for layer in layers]


def _spoilt(*parts: Mapping[str, np.ndarray]) -> list[str]:
    """Return names of tensors that contain nan."""
    return [
        name
        for part in parts
        for name, array in part.items()
        if array.dtype.kind in "fc" and np.isnan(array).any()
    ]


def _split_steps(state: LayeredState) -> dict[str, np.ndarray]:
    """Join steps and scales, all of one kind in one tensor."""
    weights = [state.weights[path] for path in sorted(state.weights)]
    activations = [state.activations[path] for path in sorted(state.activations)]
    channels = [w.codes.shape[w.axis] for w in weights]
    kinds = {
        "steps": [(w.step, (n,)) for w, n in zip(weights, channels, strict=True)],
        "scales": [
            (w.scales, (len(w.widths), n))
            for w, n in zip(weights, channels, strict=True)
            if w.scales is not None
        ],
        "inputs": [(a.steps, (len(a.widths),)) for a in activations],
    }
    for kind, parts in kinds.items():
        for array, shape in parts:
            fits = array.dtype == np.float32 and array.shape == shape
            got = f"{array.dtype} {list(array.shape)}"
            _require(fits, f"state: {kind}", f"float32 {list(shape)} for a layer", got)
    none = np.zeros(0, np.float32)
    return {k: np.concatenate([none, *(a.reshape(-1) for a, _ in v)]) for k, v in kinds.items()}


def _split_statistics(state: LayeredState) -> dict[str, np.ndarray]:
    """Join each statistic of all widths in one tensor."""
    forms = {
        bits: {name: (array.dtype, array.shape) for name, array in arrays.items()}
        for bits, arrays in state.statistics.items()
    }
    same = not any(forms.values()) or (
        set(forms) == set(state.bits) and all(f == forms[state.bits[0]] for f in forms.values())
    )
    _require(same, "state: statistics", f"the same ones for each of {list(state.bits)}", [*forms])
    names = state.statistics.get(state.bits[0], {})
    return {
        f"statistics/{name}": np.stack([state.statistics[k][name] for k in state.bits])
        for name in names
    }


def compute_content_digest(below: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Compute `FileEntry.content` of a file.

    Args:
        below: the digest of the file before it; for the first file, the digest of
            `Manifest.structure`.
        tensors: tensors in the file.
    """
    found = hashlib.sha256(below.encode())
    for name in sorted(tensors):
        array = tensors[name]
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        found.update(compute_digest([name, array.dtype.kind, array.itemsize, array.shape]).encode())
        found.update(little.tobytes())
    return found.hexdigest()


# -- from tensors to a state -----------------------------------------------------------------------


def parse_tensors(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Return the tensors of a file.

    Raises:
        LayeredModelError: not safetensors, or of a type that NumPy does not have.
    """
    _require(header_fits(data[:8], len(data)), where, "a header that fits the file", data[:8])
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LayeredModelError(
            f"{where}: expected safetensors, got a file that does not read "
            f"({shorten_text(str(error), 200)}). {_AGAIN}"
        ) from error


class _Taken:
    """The tensors of a file. They are taken out one after another."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: str) -> None:
        self.left, self.where = dict(tensors), where

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        found = self.left.pop(name, None)
        if found is None:
            raise LayeredModelError(f"{self.where}: expected {shorten(name)}, got none. {_AGAIN}")
        got = f"{found.dtype} {list(found.shape)}"
        fits = found.dtype == dtype and found.shape == shape
        _require(fits, f"{self.where}: {shorten(name)}", f"{dtype} {list(shape)}", got)
        return found

    def steps(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Split one tensor into those of each path: finite numbers of at least 0."""
        flat = self.take(name, "float32", (sum(map(math.prod, shapes.values())),))
        start, parts = 0, {}
        for path in sorted(shapes):
            part = flat[start : start + math.prod(shapes[path])].reshape(shapes[path])
            fits = bool(np.isfinite(part).all() and (part >= 0).all())
            where = f"{self.where}: {name} of {shorten(path)}"
            _require(fits, where, "finite numbers of at least 0", "others")
            parts[path] = part
            start += part.size
        return parts

    def rest(self, prefix: str) -> dict[str, np.ndarray]:
        names = [name for name in self.left if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.left.pop(name) for name in names}

    def close(self) -> None:
        _require(not self.left, self.where, "no more than the manifest says", list(self.left))


def join_layers(
    manifest: Manifest, layers: Sequence[Mapping[str, np.ndarray]], folder: str
) -> LayeredState:
    """Make a state from the tensors of the first files.

    Args:
        manifest: the manifest that describes them.
        layers: the tensors of each file, from the model's lowest width up; at least one.
        folder: folder of the files, for errors.

    Raises:
        LayeredModelError: a tensor is missing, not in the manifest, of another type or shape, or
            has invalid values.
    """
    held = manifest.lowest + len(layers) - 1
    taken = [
        _Taken(tensors, f"{folder}/{name}")
        for tensors, name in zip(layers, manifest.names(held), strict=True)
    ]
    basic = taken[0]
    weights = _weights(manifest, taken)
    activations = _activations(manifest, basic)
    statistics = _statistics(manifest, basic)
    floats = basic.rest("float/")
    for each in taken:
        each.close()
    spoilt = _spoilt(floats, *statistics.values())
    _require(not spoilt, f"{basic.where}: {shorten((spoilt or [''])[0])}", "numbers", "nan")
    _check_names([*weights], floats, statistics[manifest.highest], basic.where)
    return LayeredState(manifest.bits, held, weights, floats, statistics, activations)


def _weights(manifest: Manifest, taken: list[_Taken]) -> dict[str, LayeredWeight]:
    entries, basic = manifest.weights, taken[0]
    # Before memory is allocated for the sizes in the manifest.
    packed = {path: _planes(path, entry, manifest, taken) for path, entry in entries.items()}
    channels = {path: entry.shape[entry.axis] for path, entry in entries.items()}
    steps = basic.steps("steps", {path: (n,) for path, n in channels.items()})
    scaled = {p: (len(e.widths), channels[p]) for p, e in entries.items() if e.scales}
    scales = basic.steps("scales", scaled)
    weights = {}
    for path, entry in entries.items():
        step, scale = steps[path], scales.get(path)
        largest = float(step.max()) * 2.0 ** (entry.top_bits - 1)
        largest *= 1.0 if scale is None else float(scale.max())
        fits = largest <= float(np.finfo(np.float32).max)
        where = f"{basic.where}: steps of {shorten(path)}"
        _require(fits, where, "weights within the range of float32", f"up to {largest:g}")
        try:
            codes = unpack_codes(packed[path], entry.count).reshape(entry.shape)
        except ValueError as error:
            where = f"{taken[-1].where}: weight {shorten(path)}"
            raise LayeredModelError(f"{where}: {error} {_AGAIN}") from error
        weights[path] = LayeredWeight(
            codes=codes,
            held_bits=len(packed[path]),
            top_bits=entry.top_bits,
            low_bits=entry.low_bits,
            axis=entry.axis,
            step=step,
            widths=entry.widths,
            scales=scale,
        )
    return weights


def _planes(path: str, entry: WeightEntry, manifest: Manifest, taken: list[_Taken]) -> np.ndarray:
    """Return uint8 `[bits, bytes]`: the planes of a weight in the files."""
    name, size = f"codes/{path}", count_plane_bytes(entry.count)
    planes = [taken[0].take(name, "uint8", (entry.width(manifest.lowest), size))]
    for below, layer in enumerate(taken[1:], manifest.lowest):
        if entry.width(below + 1) > entry.width(below):
            planes.append(layer.take(name, "uint8", (1, size)))
    return np.concatenate(planes)


def _activations(manifest: Manifest, basic: _Taken) -> dict[str, LayeredActivation]:
    entries = manifest.activations
    steps = basic.steps("inputs", {path: (len(e.widths),) for path, e in entries.items()})
    for path, step in steps.items():  # unlike steps of weights, these are divisors
        where = f"{basic.where}: inputs of {shorten(path)}"
        _require(bool((step > 0).all()), where, "steps above 0", "0")
    return {
        path: LayeredActivation(steps[path], e.widths, e.low_bits, e.top_bits, e.signed)
        for path, e in entries.items()
    }


def _statistics(manifest: Manifest, basic: _Taken) -> dict[int, dict[str, np.ndarray]]:
    found = basic.rest("statistics/")
    for name, array in found.items():
        where = f"{basic.where}: statistics of {shorten(name)}"
        fits = array.ndim > 0 and len(array) == len(manifest.bits)
        _require(fits, where, f"[{len(manifest.bits)}, ...], a row a width", list(array.shape))
    rows = enumerate(manifest.bits)
    return {bits: {name: array[row] for name, array in found.items()} for row, bits in rows}


def _check_names(
    weights: Sequence[str],
    floats: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray],
    where: str,
) -> None:
    """Check that there is one tensor per name, of a type that every tool reads."""
    names = [*(f"{path}.weight" for path in weights), *floats, *statistics]
    twice = [name for name, times in Counter(names).items() if times > 1]
    _require(not twice, where, "every tensor once", twice)
    others = [n for n, array in {**floats, **statistics}.items() if array.dtype not in _TYPES]
    _require(not others, where, "numbers, no complex ones", others)
