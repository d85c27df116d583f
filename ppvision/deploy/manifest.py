"""`deploy.yaml`: what an exported folder holds, and how it is verified before use."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ppvision.errors import InputError, MissingFileError

NAME = "deploy.yaml"
FORMAT_VERSION = 1

TASKS = ("segmentation", "classification", "features", "detection")
OUTPUT_OPS = ("argmax", "softmax", "none", "nms")
FILES = {"paddle": ("model.json", "model.pdiparams"), "onnx": ("model.onnx",)}
# Beside the files of format "paddle", where OpenVINO may run the export.
OPENVINO_PROGRAM = "model.pdmodel"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `deploy.yaml`."""

    name: str
    task: str  # one of TASKS
    format: str  # "paddle" or "onnx"
    input_shape: list[int | None]  # [B, C, H, W], None where any size is taken
    output_op: str  # one of OUTPUT_OPS; it is inside the graph
    transforms: list[dict[str, Any]]  # see ppvision.deploy.transforms
    num_classes: int | None  # K of the logits; None for features
    classes: list[str]  # their names, empty when not given
    bits: int  # of the weights
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    max_error_to_eager: float  # largest error of the parity check, of logits or features
    checked_shapes: list[list[int]]  # the inputs it was measured on
    onednn: bool | None  # whether oneDNN gave the same numbers there; None for ONNX
    paddle_version: str
    # Of a float export for Paddle Inference: the model's name of each of the graph's parameters.
    parameters: dict[str, str] = field(default_factory=dict)
    # Whether OpenVINO runs it, with `model.pdmodel`; None where there was nothing to try.
    openvino: bool | None = None
    # What becomes 255 in pictures of more than 8 bits a channel; None: they are refused.
    max_value: int | None = None
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        text = yaml.safe_dump(
            asdict(self), sort_keys=False, allow_unicode=True, default_flow_style=None
        )
        (folder / NAME).write_text(text, encoding="utf-8")


def describe_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of files of an export."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
    }


def file_names(format: str, openvino: bool | None) -> tuple[str, ...]:
    """The files of an export, without `deploy.yaml`."""
    return (*FILES[format], OPENVINO_PROGRAM) if openvino else FILES[format]


def check_max_value(value: object) -> None:
    """Raise `InputError` for a `max_value` that is neither None nor a whole number above 0."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value >= 1):
        raise InputError(f"max_value: expected a whole number above 0, got {value!r}.")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `deploy.yaml`, then every file that it names.

    Raises:
        FileNotFoundError: no such folder, no `deploy.yaml`, or a file of the export is missing.
        ValueError: `deploy.yaml` is not one of ours, or a file differs from it in size or sha256.
    """
    path = folder / NAME
    if not path.is_file():
        raise MissingFileError(
            f"{folder}: expected a folder written by export_model, found no {NAME} in it."
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not readable as YAML ({error}). Copy or export the folder again."
        ) from error
    manifest = _checked(path, content)
    for name in file_names(manifest.format, manifest.openvino):
        _verify(folder / name, manifest.files[name])
    return manifest


def _checked(path: Path, content: Any) -> Manifest:
    def problem(text: str) -> ValueError:
        return ValueError(f"{path}: {text}. Copy or export the folder again.")

    if not isinstance(content, Mapping):
        raise problem(f"expected keys and values, got {type(content).__name__}")
    if content.get("format_version") != FORMAT_VERSION:
        raise problem(
            f"expected format_version {FORMAT_VERSION}, got {content.get('format_version')!r}; "
            "another version of ppvision wrote it"
        )
    known = {entry.name for entry in fields(Manifest)}
    needed = {
        entry.name
        for entry in fields(Manifest)
        if entry.default is MISSING and entry.default_factory is MISSING
    }
    if missing := needed - content.keys():
        raise problem(f"lacks {', '.join(sorted(missing))}")
    if unknown := content.keys() - known:
        raise problem(f"has unknown keys {', '.join(sorted(map(str, unknown)))}")
    for key, known in (("task", TASKS), ("format", FILES), ("output_op", OUTPUT_OPS)):
        if content[key] not in tuple(known):
            raise problem(f"expected {key} to be one of {', '.join(known)}, got {content[key]!r}")
    if (content["task"] == "detection") != (content["output_op"] == "nms"):
        raise problem(
            f"expected output_op nms for detection and no other task, got {content['output_op']} "
            f"for {content['task']}"
        )
    shape = content["input_shape"]
    if not isinstance(shape, list) or len(shape) != 4:
        raise problem(f"expected input_shape [B, C, H, W], got {shape!r}")
    shapes = content["checked_shapes"]
    if not isinstance(shapes, list) or not shapes or not all(map(_is_size, shapes)):
        raise problem(f"expected checked_shapes to be sizes [B, C, H, W], got {shapes!r}")
    classes, count = content["classes"], content["num_classes"]
    if content["task"] == "features":
        if count is not None:
            raise problem(f"expected num_classes null for features, got {count!r}")
    elif isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise problem(f"expected num_classes to be a whole number above 0, got {count!r}")
    if not isinstance(classes, list) or (count is not None and len(classes) not in (0, count)):
        raise problem(f"expected classes to be a list of {count} names or empty, got {classes!r}")
    names = content.get("parameters", {})
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise problem("expected parameters to be names by name")
    files = content["files"]
    for key in ("onednn", "openvino"):
        value = content.get(key)
        known = value is None or isinstance(value, bool)
        if not known or (value and content["format"] != "paddle"):
            raise problem(
                f"expected {key} to be true, false or null (of format onnx no true), got {value!r}"
            )
    try:
        check_max_value(content.get("max_value"))
    except InputError as error:
        raise problem(str(error).rstrip(".")) from error
    openvino = content.get("openvino")
    for name in file_names(content["format"], openvino):
        entry = files.get(name) if isinstance(files, Mapping) else None
        if not isinstance(entry, Mapping) or not {"bytes", "sha256"} <= entry.keys():
            raise problem(f"expected bytes and sha256 of {name} under files")
    return Manifest(**content)


def _is_size(shape: object) -> bool:
    whole = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
    return whole and len(shape) == 4


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise MissingFileError(
            f"{path}: named in {NAME}, but missing. Copy the whole folder again."
        )
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise InputError(
            f"{path}: expected {expected['bytes']} bytes, got {size}; the file is incomplete or "
            "changed. Copy or export it again."
        )
    if (digest := sha256_of(path)) != expected["sha256"]:
        raise InputError(
            f"{path}: expected sha256 {expected['sha256']}, got {digest}; the file is corrupt or "
            "changed. Copy or export it again."
        )


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
