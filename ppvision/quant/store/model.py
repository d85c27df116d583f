"""One stored model for every width: it is written as layers and read as far as needed.

Source: arXiv 2212.05326: the narrowest codes are the basic layer, and each further bit is an
    enhancement layer. `ppvision.quant.store.files` describes the files. Precision k consists of the
    manifest and the files up to `wK`: a device loads what it can use, and later only the next
    layer.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn
from safetensors.numpy import save

from ppvision.arguments import check_file, check_layer
from ppvision.data.listing import holds_only
from ppvision.errors import InputError, MissingFileError, shorten, shorten_text
from ppvision.files import (
    check_replaceable,
    name_read_errors,
    replace_folder,
    resolve_new_folder,
    sync_folder,
    write_bytes,
)
from ppvision.quant.store.fetching import FetchError, Remote, UnreachableError
from ppvision.quant.store.files import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    LayeredModelError,
    Manifest,
    compute_content_digest,
    compute_digest,
    describe_state,
    join_layers,
    name_file,
    parse_manifest,
    parse_tensors,
    split_layers,
)
from ppvision.quant.store.state import LayeredState, extract_state
from ppvision.quant.train.layers import LayeredLayer, LayeredNorm
from ppvision.quant.train.once_qat import OnceQAT
from ppvision.quant.train.quanters import check_widths
from ppvision.remote_cache import is_url
from ppvision.tables import TERMINAL_COLUMNS, format_table

logger = logging.getLogger("ppvision")

_OURS = "an earlier layered model"

# -- writing ---------------------------------------------------------------------------------------


def save_layered(
    model: nn.Layer | LayeredState,
    folder: str | Path,
    *,
    bits: Sequence[int],
    config: Mapping[str, Any],
) -> Path:
    """Write a layered model.

    Args:
        model: a `OnceQAT`, another model with layered quanters, or the state of one.
        folder: the new folder. An existing layered model is replaced after the new one is complete.
            Any other folder with files is an error.
        bits: widths that the model was trained at.
        config: the data that the architecture is built from, for the program that loads the model:
            dicts, lists, text, finite numbers, booleans and None.

    Returns:
        The folder.

    Raises:
        ValueError: the model does not know a width, JSON cannot express the config, or the model is
            not trained (see `extract_state`) or cannot be read back.
        FileExistsError: `folder` contains other files.
        StorageError: for example, the disk is full; an OSError.
        After an error, an older model is unchanged.
    """
    folder = resolve_new_folder(folder)
    state = _state_of(model, check_widths(bits))
    check_output(folder)
    manifest = describe_state(state, _plain(config))
    layers = split_layers(state)
    join_layers(manifest, layers, str(folder))  # do not write what a reader would refuse
    with replace_folder(folder, _is_layered, _OURS) as work:
        _write(manifest, layers, work / "final")
    return folder


def check_output(folder: str | Path) -> None:
    """Raise `FileExistsError` for a folder that `save_layered` does not replace."""
    check_replaceable(resolve_new_folder(folder), _is_layered, _OURS)


def _state_of(model: nn.Layer | LayeredState, bits: tuple[int, ...]) -> LayeredState:
    """Return the model's state, complete at all widths."""
    if isinstance(model, LayeredState):
        if tuple(model.bits) != bits or model.held_bits < bits[0]:
            raise InputError(
                f"bits: expected {list(model.bits)}, which the state was trained at, all of them "
                f"there; got {list(bits)}, {model.held_bits} bits there. Load it at its highest "
                "width."
            )
        return model
    known = set(model.widths) if isinstance(model, OnceQAT) else set(bits)
    model = model.model if isinstance(model, OnceQAT) else check_layer(model)
    quantised = False
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, LayeredNorm):
            known &= set(layer.trained)
        elif isinstance(layer, LayeredLayer) and layer.weight_quanter is not None:
            quantised = True
            known &= set(layer.weight_quanter.range.trained)
    if not quantised:
        raise InputError(
            f"model: expected one with layered quanters, found none in {type(model).__name__}. "
            "Quantise it first: LayeredQAT(config).quantize(model)."
        )
    if unknown := sorted(set(bits) - known):
        raise InputError(
            f"bits: expected widths that the model was trained at, got {unknown} as well. Of the "
            f"others it knows {sorted(known, reverse=True)}."
        )
    return extract_state(model, bits)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config after a round trip through JSON."""
    if not isinstance(config, Mapping):
        raise InputError(f"config: expected a dict, got {type(config).__name__}.")
    _check_plain(config, "config")
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        text = shorten_text(str(error))
        raise InputError(f"config: expected plain values that JSON holds ({text}).") from error


def _check_plain(value: object, where: str) -> None:
    """Check keys, because JSON writes a key of another type as text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: expected text as keys, got {shorten(key)}.")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{where}[{number}]")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise InputError(
            f"{where}: expected a dict, list, text, number, boolean or None, got "
            f"{type(value).__name__}."
        )


def _write(manifest: Manifest, layers: Sequence[Mapping[str, np.ndarray]], folder: Path) -> None:
    files, content = {}, compute_digest(manifest.structure())
    for name, tensors in zip(manifest.names(manifest.highest), layers, strict=True):
        data = save(dict(tensors))
        content = compute_content_digest(content, tensors)
        files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest(), content)
        write_bytes(folder / name, data)
    complete = Manifest(
        manifest.architecture, manifest.bits, manifest.weights, manifest.activations, files
    )
    write_bytes(folder / MANIFEST, complete.encode())
    sync_folder(folder)


def _is_layered(folder: Path) -> bool:
    """Whether a folder is empty or contains only a layered model."""
    return holds_only(folder, [MANIFEST, *map(name_file, range(1, 9))], MANIFEST)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayeredModel:
    """A layered model, up to the width that was read.

    Attributes:
        state: the state of all widths up to `bits`.
        bits: the width that was read; `state.bits` has the trained widths.
        config: the `config` of `save_layered`.
        opened: names and bytes of the files that were read, in that order.
    """

    state: LayeredState
    bits: int
    config: dict[str, Any]
    opened: list[tuple[str, int]]
    _look: Callable[[], int] = field(repr=False)

    @cached_property
    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the float model's tensors at `bits`, by its names."""
        return self.state.state_dict(self.bits)

    @cached_property
    def available(self) -> int:
        """Return the highest width whose files are all in the folder or on the server.

        A server is asked only at the first call, and nothing is downloaded.

        Raises:
            FetchError: the server does not answer this.
        """
        return self._look()


def load_layered(path_or_url: str | Path, bits: int | None = None) -> LayeredModel:
    """Read a layered model at a width, from a folder or over HTTP.

    Over HTTP, each call downloads the manifest. The other files are downloaded once, into
    `~/.cache/ppvision/layered/<hash of the URL>` (the environment variable PPVISION_CACHE replaces
    `~/.cache/ppvision`). A broken download continues where it stopped. If the server does not
    answer and the cached files are sufficient, they are used with a warning.

    Args:
        path_or_url: the folder, or its URL (http or https).
        bits: the width, from the lowest to the highest trained width. A width between them that
            was not trained uses the statistics and steps of the next higher trained width. Default
            None: the highest width whose files are all present; the log names it.

    Raises:
        FileNotFoundError: no such folder.
        StorageError: for example, no right to read the folder; an OSError.
        LayeredModelError: a file is missing, damaged, or belongs to another model; a `FetchError`
            if a server is the cause. Nothing is loaded then.
        ValueError: the model does not have this width.
    """
    if is_url(path_or_url):
        return _load_url(Remote(str(path_or_url)), bits)
    folder = _folder(path_or_url)
    with name_read_errors(folder):
        manifest, size = _read_manifest(folder)
        bits = _chosen(manifest, bits, folder, partial(_present, folder, manifest))
        return _load(folder, manifest, size, bits, partial(_present, folder, manifest))


def _folder(path: str | Path) -> Path:
    folder = check_file(path, "layered model", "its folder or address")
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder}: expected the folder of a layered model (save_layered, `ppvision pack`), "
            "found none."
        )
    return folder


def _read(path: Path, limit: int) -> bytes:
    """Return a file's bytes; if there are more than `limit`, the first `limit` + 1."""
    if not path.is_file():
        raise LayeredModelError(
            f"{path}: expected this file of a layered model, found none. Copy or fetch it again."
        )
    with path.open("rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)


def _read_manifest(folder: Path) -> tuple[Manifest, int]:
    """Return the manifest and its bytes."""
    data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    return parse_manifest(data, str(folder / MANIFEST)), len(data)


def _present(folder: Path, manifest: Manifest) -> int:
    """Return the highest width for which all files exist; a number below the lowest width means
    none."""
    bits = manifest.lowest - 1
    while bits < manifest.highest and (folder / name_file(bits + 1)).is_file():
        bits += 1
    return bits


def _chosen(manifest: Manifest, bits: int | None, source: object, look: Callable[[], int]) -> int:
    """Return the width to load."""
    low, high = manifest.lowest, manifest.highest
    if bits is not None:
        whole = isinstance(bits, (int, np.integer)) and not isinstance(bits, bool)
        if not whole or not low <= bits <= high:
            raise InputError(f"bits: expected {low} to {high} for {source}, got {shorten(bits)}.")
        return int(bits)
    found = max(look(), low)  # if the lowest is missing, reading it gives the error
    if found < high:
        logger.warning(
            "%s: %s is missing; using %d bits of %d to %d",
            *(source, name_file(found + 1), found, low, high),
        )
    else:
        logger.info("%s: using %d bits, the highest width", source, found)
    return found


def _load(
    folder: Path, manifest: Manifest, size: int, bits: int, look: Callable[[], int]
) -> LayeredModel:
    """Read the files of a width; `size` is that of the manifest."""
    opened, layers = [(MANIFEST, size)], []
    content = compute_digest(manifest.structure())
    for name in manifest.names(bits):
        path = folder / name
        data = _read_verified(path, manifest.files[name])
        opened.append((name, len(data)))
        layers.append(parse_tensors(data, str(path)))
        content = compute_content_digest(content, layers[-1])
        if content != manifest.files[name].content:
            raise LayeredModelError(
                f"{path}: expected content of sha256 {manifest.files[name].content}, got {content}:"
                " this file and the manifest are not of one model. Copy or fetch both again."
            )
    state = join_layers(manifest, layers, str(folder))
    return LayeredModel(state, bits, dict(manifest.architecture), opened, look)


def _read_verified(path: Path, entry: FileEntry) -> bytes:
    """Return a file's bytes, read once and compared with the manifest."""

    def differs(what: str, expected: object, got: object) -> LayeredModelError:
        return LayeredModelError(
            f"{path}: expected {what} {expected}, got {got}: the file is incomplete, damaged or of "
            "another model. Copy or fetch it again."
        )

    if path.is_file() and path.stat().st_size != entry.bytes:
        raise differs("bytes", entry.bytes, path.stat().st_size)
    data = _read(path, entry.bytes)
    if len(data) != entry.bytes:
        raise differs("bytes", entry.bytes, len(data))
    if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
        raise differs("sha256", entry.sha256, found)
    return data


# -- over HTTP -------------------------------------------------------------------------------------


def _load_url(remote: Remote, bits: int | None) -> LayeredModel:
    with remote.hold_lock():
        try:
            data = remote.read(MANIFEST, MAX_MANIFEST_BYTES)
        except UnreachableError as error:
            return _load_cached(remote, bits, error)
        manifest = parse_manifest(data, f"{remote.shown}/{MANIFEST}")
        look = partial(_served, remote, manifest)
        bits = _chosen(manifest, bits, remote.shown, look)
        cached = remote.folder / MANIFEST
        if cached.is_file() and cached.read_bytes() != data:
            remote.set_aside([MANIFEST, *manifest.files])
            cached.unlink()
        for name in manifest.names(bits):
            entry = manifest.files[name]
            remote.fetch(name, entry.bytes, entry.sha256)
        # Last, so that the manifest in the cache is one whose files were downloaded.
        write_bytes(cached, data)
        remote.tidy({name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()})
        return _load(remote.folder, manifest, len(data), bits, look)


def _load_cached(remote: Remote, bits: int | None, error: UnreachableError) -> LayeredModel:
    """Use earlier downloads, because the server does not answer."""
    folder = next(
        (known for known in (remote.folder, remote.previous) if (known / MANIFEST).is_file()), None
    )
    if folder is None:
        raise error
    manifest, size = _read_manifest(folder)
    look = partial(_present, folder, manifest)
    bits = _chosen(manifest, bits, remote.shown, look)
    if look() < bits:
        raise FetchError(
            f"{error} In {folder} are the files up to {name_file(look())}, not those of {bits} "
            "bits."
        ) from error
    try:
        model = _load(folder, manifest, size, bits, look)
    except LayeredModelError as damaged:
        raise FetchError(f"{error} The earlier copy is incomplete: {damaged}") from damaged
    logger.warning("%s Using the earlier copy: %s", error, folder)
    return model


def _served(remote: Remote, manifest: Manifest) -> int:
    """Like `_present`, but on a server."""
    bits = manifest.lowest - 1
    while bits < manifest.highest and remote.has(name_file(bits + 1)):
        bits += 1
    return bits


# -- describing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayeredFile:
    """A file: its name, bytes and sha256; `present`: whether it exists, None on a server."""

    name: str
    bytes: int
    sha256: str
    present: bool | None


@dataclass(frozen=True)
class LayeredDescription:
    """The content of a manifest. `pack --info` prints its `str()`.

    Attributes:
        source: folder or URL.
        bits: trained widths, the highest first.
        files: the manifest, then each layer.
        precisions: bytes of the manifest and the files needed, for every width.
        config: the data from which the architecture is built.
        weights: number of quantised weights (tensors).
        fixed: number of them with only one width.
        count: number of values in them.
        activations: number of layers that round their input.
    """

    source: str
    bits: tuple[int, ...]
    files: tuple[LayeredFile, ...]
    precisions: Mapping[int, int]
    config: Mapping[str, Any]
    weights: int
    fixed: int
    count: int
    activations: int

    def __str__(self) -> str:
        lines = [
            self.source,
            f"trained at {', '.join(map(str, self.bits))} bits; {self.activations} rounded inputs",
            f"{self.weights} quantised weights of {self.count:,} numbers, {self.fixed} of one "
            "width",
            *(
                _cut(f"  {key}: {json.dumps(v, ensure_ascii=False)}")
                for key, v in self.config.items()
            ),
        ]
        # The manifest has all 64 digits.
        rows = [("file", "bytes", "sha256 begins", "")]
        rows += [
            (f.name, f"{f.bytes:,}", f.sha256[:16], "missing" if f.present is False else "")
            for f in self.files
        ]
        lines.append(format_table(rows, "<><"))
        sizes = [("precision", "bytes", "")]
        for bits, size in self.precisions.items():
            sizes.append((f"{bits} bits", f"{size:,}", "" if bits in self.bits else "not trained"))
        lines.append(format_table(sizes, "<><"))
        return "\n".join(lines)


def _cut(line: str) -> str:
    return line if len(line) <= TERMINAL_COLUMNS else f"{line[: TERMINAL_COLUMNS - 3]}..."


def describe_layered(path_or_url: str | Path) -> LayeredDescription:
    """Describe a layered model; only its manifest is read.

    Args:
        path_or_url: see `load_layered`.

    Raises:
        FileNotFoundError: no such folder.
        LayeredModelError: the manifest is missing or damaged.
    """
    if is_url(path_or_url):
        remote = Remote(str(path_or_url))
        data, source = remote.read(MANIFEST, MAX_MANIFEST_BYTES), remote.shown
        manifest = parse_manifest(data, f"{source}/{MANIFEST}")
        return _described(source, manifest, data, lambda name: None)
    folder = _folder(path_or_url)
    with name_read_errors(folder):
        data = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(data, str(folder / MANIFEST))
    return _described(str(folder), manifest, data, lambda name: (folder / name).is_file())


def _described(
    source: str, manifest: Manifest, data: bytes, present: Callable[[str], bool | None]
) -> LayeredDescription:
    files = [LayeredFile(MANIFEST, len(data), hashlib.sha256(data).hexdigest(), True)]
    total, precisions = len(data), {}
    for bits in range(manifest.lowest, manifest.highest + 1):
        name = name_file(bits)
        entry = manifest.files[name]
        files.append(LayeredFile(name, entry.bytes, entry.sha256, present(name)))
        total += entry.bytes
        precisions[bits] = total
    weights = manifest.weights.values()
    return LayeredDescription(
        source=source,
        bits=manifest.bits,
        files=tuple(files),
        precisions=precisions,
        config=manifest.architecture,
        weights=len(manifest.weights),
        fixed=sum(w.width(manifest.lowest) == w.width(manifest.highest) for w in weights),
        count=sum(w.count for w in weights),
        activations=len(manifest.activations),
    )
