"""`deploy.yaml`: it describes the content of an exported folder, which is verified before use.

Every entry has a type and a range, which its field below states. docs/deployment.md describes the
entries for readers of the file. Optional entries without information are omitted from the file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from ppvision.deploy.run.task_table import TASKS
from ppvision.errors import ManifestError, MissingFileError, shorten
from ppvision.files import compute_sha256, name_read_errors
from ppvision.schema import (
    Count,
    Place,
    SchemaError,
    build,
    check_of,
    number,
    one_of,
    optional,
    plain_mapping,
    refuse,
    text,
    whole,
)

NAME = "deploy.yaml"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

OUTPUT_OPS = tuple(dict.fromkeys(op for task in TASKS.values() for op in task.output_ops))
FORMATS = ("paddle", "onnx")


@dataclass(frozen=True)
class ModelFiles:
    """Names of a model's files in its folder.

    Attributes:
        program: the graph.
        weights: its parameters; None if the graph's file contains them (ONNX).
        own_for_openvino: whether OpenVINO has its own graph: that of a detector up to boxes and
            scores. False: it runs `earlier_program`.
    """

    program: str
    weights: str | None
    own_for_openvino: bool = False

    @property
    def weights_beside(self) -> str:
        """Return the file of the parameters, for a format that has one (Paddle's)."""
        assert self.weights is not None, f"{self.program} holds its parameters"
        return self.weights

    @property
    def earlier_program(self) -> str:
        """Return the file of the same graph in the program format before PIR."""
        return str(PurePosixPath(self.program).with_suffix(".pdmodel"))

    @property
    def raw_program(self) -> str:
        """Return the file of a detector's graph up to its boxes and scores, in that format."""
        return str(PurePosixPath(self.program).with_suffix(".raw.pdmodel"))

    @property
    def openvino_program(self) -> str:
        """Return the file that OpenVINO runs."""
        return self.raw_program if self.own_for_openvino else self.earlier_program


FILES = {
    "paddle": ModelFiles("model.json", "model.pdiparams"),
    "onnx": ModelFiles("model.onnx", None),
}
PADDLEX_FILES = ModelFiles("inference.json", "inference.pdiparams")

# All files that an export may write, for code that replaces an export.
KNOWN_FILES = frozenset(
    {NAME, "infer_cfg.yml", "inference.yml"}
    | {
        name
        for files in (*FILES.values(), PADDLEX_FILES)
        for name in (files.program, files.weights, files.earlier_program, files.raw_program)
        if name is not None
    }
)

# -- limits ----------------------------------------------------------------------------------------

# The largest file that we know, 21,841 classes of ImageNet with commas in their names, has 0.9 MB
# and 66,000 separators. PyYAML takes about 700 bytes of memory and 40 microseconds for each value,
# of which there are at most as many as separators: 60 MB and 3 seconds.
MAX_BYTES = 2 * 2**20
MAX_SEPARATORS = 80_000
# The last two are not in the brackets, because a set with them takes 10 ms to compile.
_SEPARATOR = re.compile(r"""[,\[{\n\r\x85]|[-?:](?=\s)|["'\]}]:|\u2028|\u2029""")

_MAX_SIDE = 2**16  # pixels
_MAX_BATCH = 2**12
_MAX_CHANNELS = 2**16
_MAX_NUMBERS = 2**30  # in the input of one run: 4 GiB
_MAX_CLASSES = 10**6
_MAX_NAMES = 10**5

# -- types of entries ------------------------------------------------------------------------------

Name = Annotated[str, text(1000)]
Share = Annotated[float, number(0, 1)]
Error = Annotated[float, number(0, 1e30)]
Score = Annotated[float, number(-1e30, 1e30)]
Milliseconds = Annotated[float, number(0, 1e9)]
Side = Annotated[int, whole(1, _MAX_SIDE)]
MaxValue = Annotated[int, whole(1, 65535)]
Classes = Annotated[list[Name], Count(0, _MAX_CLASSES)]

_NAMED = "the name of a file in this folder, without a path"
_FILE_NAME = text(200, r"[^/\\\x00-\x1f]+", _NAMED)


def check_max_value(value: object) -> None:
    """Raise `InputError` for a `max_value` that is neither None nor a number of at most 16 bits."""
    optional(whole(1, 65535))(value, Place("max_value"))


def check_name(value: object) -> None:
    """Raise `InputError` for a `name` that is neither None nor text that `deploy.yaml` holds."""
    check_of(Name | None)(value, Place("name"))


def check_classes(value: object) -> None:
    """Raise `InputError` for names of classes that `deploy.yaml` does not hold."""
    check_of(Classes)(value, Place("classes"))


def check_input_shape(value: object) -> None:
    """Raise `InputError` for an `input_shape` out of range, or of too many numbers."""
    shape = _shape(value, Place("input_shape"))
    _size([1 if n is None else n for n in shape], Place("input_shape"))


def _name_of_file(value: Any, place: Place) -> str:
    name = _FILE_NAME(value, place)
    if name in (".", ".."):
        raise refuse(value, place, _NAMED)
    return name


def _shape(value: Any, place: Place) -> list[int | None]:
    if not isinstance(value, list) or len(value) != 4:
        raise refuse(value, place, "[B, C, H, W]")
    side = optional(whole(1, _MAX_SIDE))
    checks = (optional(whole(1, _MAX_BATCH)), whole(1, _MAX_CHANNELS), side, side)
    pairs = enumerate(zip(checks, value, strict=True))
    return [check(item, place.inside(value, i)) for i, (check, item) in pairs]


def _size(value: Any, place: Place) -> list[int]:
    shape = [n for n in _shape(value, place) if n is not None]
    if len(shape) != len(value):
        raise refuse(value, place, "[B, C, H, W], all of them numbers")
    if shape[0] * shape[1] * shape[2] * shape[3] > _MAX_NUMBERS:
        raise refuse(value, place, f"a size of at most {_MAX_NUMBERS} numbers")
    return shape


FileName = Annotated[str, _name_of_file]
Size = Annotated[list[int], _size]
Transform = Annotated[dict[str, Any], plain_mapping(256, 4)]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size and sha256 of a file in the folder."""

    bytes: Annotated[int, whole(0, 2**50)]
    sha256: Annotated[str, text(64, "[0-9a-f]{64}", "64 hexadecimal digits")]


@dataclass(frozen=True, kw_only=True)
class PrecisionCheck:
    """The results of the export's check of another precision than float32.

    Attributes:
        passed: whether precision='auto' may use it.
        engine: the engine of the check.
        max_error: largest error of logits (or features), by the rule of parity.
        equal_labels: fraction of images or pixels with the label of eager mode.
        milliseconds, float_milliseconds: time of a run in this precision and in float32, measured
            in turn.
        score, float_score: score of the metric `metric` in this precision and in float32.
    """

    passed: bool
    engine: Literal["openvino", "onednn", "native", "onnxruntime"] | None = None
    max_error: Error | None = None
    equal_labels: Share | None = None
    milliseconds: Milliseconds | None = None
    float_milliseconds: Milliseconds | None = None
    metric: Name | None = None
    score: Score | None = None
    float_score: Score | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The source of the steps of 8-bit activations.

    Attributes:
        method: smallest error, a percentile, the maximum, or learned in training.
        pictures: number of calibration images; 0 if the steps were learned.
    """

    method: Literal["minimum_error", "percentile", "maximum", "learned"]
    pictures: Annotated[int, whole(0, 10**9)]


@dataclass(frozen=True, kw_only=True)
class Nms:
    """Non-maximum suppression after the graph for OpenVINO, which does not contain it.

    Attributes:
        score_threshold: boxes below are dropped.
        iou_threshold: if two boxes of a class overlap more than this, the one of lower score is
            dropped.
        candidates: number of boxes per class that are considered, those of highest score; null:
            all.
        kept: number of boxes kept per image, those of highest score; null: all.
        normalized: whether the width of a box is right - left; false: one pixel more.
        background: the class that is omitted; null: none.
    """

    score_threshold: Share
    iou_threshold: Share
    candidates: Annotated[int, whole(1, 10**7)] | None
    kept: Annotated[int, whole(1, 10**7)] | None
    normalized: bool = True
    background: Annotated[int, whole(0, _MAX_CLASSES)] | None = None


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How an image that is larger than the input is cut into tiles.

    Attributes:
        size: [H, W] of a tile, in pixels.
        overlap: pixels that neighbours share.
    """

    size: Annotated[list[Side], Count(2, 2)]
    overlap: Annotated[int, whole(0, _MAX_SIDE)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `deploy.yaml`."""

    name: Name
    task: Annotated[str, one_of(*TASKS)]
    format: Annotated[str, one_of(*FORMATS)]
    program: FileName  # the file of the graph
    # The file of its parameters; null if the graph's file contains them (ONNX).
    weights: FileName | None
    # Whether the folder also has the graph in the program format before PIR: the name of `program`
    # with the suffix .pdmodel.
    earlier_format: bool
    # Whether OpenVINO gave the numbers of eager mode with it; null if it was not tried.
    openvino: bool | None
    onednn: bool | None  # the same for oneDNN; null for ONNX
    input_shape: Annotated[list[int | None], _shape]  # [B, C, H, W], null for any size
    # The last operator of the graph; nms may follow the graph for OpenVINO, see `nms`.
    output_op: Annotated[str, one_of(*OUTPUT_OPS)]
    # See ppvision.deploy.run.transforms and ppvision.deploy.run.detection_transforms.
    transforms: Annotated[list[Transform], Count(0, 64)]
    num_classes: Annotated[int, whole(1, _MAX_CLASSES)] | None  # null for features
    classes: Classes  # empty when not given
    bits: Annotated[int, one_of(*range(1, 9), 32)]  # of the weights
    files: Annotated[dict[FileName, FileEntry], Count(0, 64)]
    # The largest error of the parity check, for logits or features, and the inputs of the check.
    max_error_to_eager: Error
    checked_shapes: Annotated[list[Size], Count(1, 64)]
    paddle_version: Annotated[str, text(100)]
    # For a float export for Paddle Inference: the model's name of each parameter of the graph.
    parameters: Annotated[dict[Name, Name], Count(0, _MAX_NAMES)] = field(default_factory=dict)
    # Bits of the inputs of products; null: float.
    activations: Literal[8] | None = None
    # The NMS after a detector's graph for OpenVINO; null: there is no such graph.
    nms: Nms | None = None
    # The value of the brightest pixel in images of more than 8 bits; null: 255.
    max_value: MaxValue | None = None

    # Entries that later versions write. They are reserved, so that the format changes only once.
    # Names of the graph's outputs, in order.
    outputs: Annotated[list[Name], Count(0, 64)] = field(default_factory=list)
    int8: PrecisionCheck | None = None
    bfloat16: PrecisionCheck | None = None
    calibration: Calibration | None = None
    # Names of layers that stay in float in an export with integers.
    keep_float: Annotated[list[Name], Count(0, _MAX_NAMES)] = field(default_factory=list)
    # The model's name in the zoo, and its name in PaddleX.
    architecture: Name | None = None
    paddlex_name: Name | None = None
    tile: Tile | None = None
    # The entry for PaddleSeg's clients, the only one that is not ours. ppvision does not read it.
    Deploy: Annotated[dict, plain_mapping(20_000, 8)] | None = None

    format_version: Annotated[int, one_of(FORMAT_VERSION)] = FORMAT_VERSION

    @property
    def model_files(self) -> ModelFiles:
        files = ModelFiles(self.program, self.weights)
        return replace(files, own_for_openvino=files.raw_program in self.files)

    def write(self, folder: Path) -> None:
        document = format_manifest(self)
        parse_manifest(document, NAME)  # do not write entries that a reader would refuse
        (folder / NAME).write_text(document, encoding="utf-8")


def format_manifest(manifest: Manifest) -> str:
    """Return the content of `deploy.yaml`: required entries, and optional entries that have
    information."""
    from ppvision.safe_yaml import format_short_yaml  # see parse_manifest

    return format_short_yaml(_plain_fields(manifest))


def _plain_fields(value: Any) -> Any:
    if is_dataclass(value):
        given = {entry: getattr(value, entry.name) for entry in fields(value)}
        is_said = lambda entry, item: (  # noqa: E731
            entry.default is MISSING or entry.name == "format_version" or item not in (None, [], {})
        )
        return {e.name: _plain_fields(v) for e, v in given.items() if is_said(e, v)}
    if isinstance(value, dict):
        return {key: _plain_fields(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_fields(item) for item in value]
    return value


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Return bytes and sha256 of files of an export."""
    return {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=compute_sha256(folder / name))
        for name in names
    }


def list_file_names(files: ModelFiles, earlier_format: bool) -> list[str]:
    """Return the files of a model in the existing formats."""
    names = [files.program, files.weights]
    names += [files.earlier_program] if earlier_format else []
    names += [files.raw_program] if files.own_for_openvino else []
    return [name for name in names if name is not None]


# -- reading ---------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read and check `deploy.yaml`, then every file that it names.

    Version 1 of the format is read too.

    Raises:
        MissingFileError: no such folder, no `deploy.yaml`, or a file of the export is missing.
        ManifestError: `deploy.yaml` is not one of ours, an entry has another type or is out of
            range, or a file differs from it in size or sha256.
        StorageError: the system refuses to read one of them, for example without the right to read
            it.
    """
    path = folder / NAME
    with name_read_errors(path):
        if not path.is_file():
            raise MissingFileError(
                f"{folder}: expected a folder written by export_model, found no {NAME} in it."
            )
        manifest = parse_manifest(_read_text(path), str(path))
    verify_files(folder, manifest)
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check every file that a manifest names.

    Raises:
        MissingFileError, ManifestError, StorageError: as `read_manifest`.
    """
    with name_read_errors(folder):
        for name, entry in manifest.files.items():
            _verify(folder, name, entry)


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ManifestError(
            f"{path}: expected at most {MAX_BYTES:,} bytes, the file has more: it was not written "
            "by export_model. Copy or export the folder again."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: expected UTF-8, got another byte at {error.start}. Copy or export the folder "
            "again."
        ) from error


def parse_manifest(document: str, name: str) -> Manifest:
    """Return the content of a `deploy.yaml` from its text; `name` is its name in errors.

    Raises:
        ManifestError: it is not one of ours, or an entry has another type or is out of range.
    """
    # The import of PyYAML takes as long as all other imports of a server. So it is imported when a
    # folder is opened.
    import yaml

    from ppvision.safe_yaml import load_yaml

    count = sum(1 for _ in _SEPARATOR.finditer(document))
    if count > MAX_SEPARATORS:
        raise ManifestError(
            f"{name}: expected at most {MAX_SEPARATORS:,} values, got about {count:,}: it was not "
            "written by export_model. Copy or export the folder again."
        )
    try:
        content = load_yaml(document, name)
    # PyYAML raises many built-in types for values that do not fit their tags: `!!int x`,
    # `2001-99-99`, a thousand brackets.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error)[:400].split())
        raise ManifestError(
            f"{name}: not readable as YAML ({reason[:300]}). Copy or export the folder again."
        ) from error
    try:
        return _checked(content)
    except SchemaError as error:
        raise ManifestError(
            f"{error.line or name}: {error.sentence} Copy or export the folder again."
        ) from error


def _checked(content: Any) -> Manifest:
    if not isinstance(content, dict):
        raise refuse(content, Place(), "keys and values")
    version = content.get("format_version")
    if not any(type(version) is int and version == known for known in READABLE_VERSIONS):
        raise SchemaError(
            Place(),
            f"expected format_version {' or '.join(map(str, READABLE_VERSIONS))}, got "
            f"{shorten(version)}; another version of ppvision wrote it",
        )
    if version == 1:
        content = _from_version_1(content)
    manifest = build(Manifest, content)
    _check_together(manifest, content)
    return manifest


def _from_version_1(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Convert a document of version 1 to the current form. There the names of files were fixed, and
    `openvino` said both that `model.pdmodel` exists and that OpenVINO may run it."""
    later = {"program", "weights", "earlier_format", "activations", "max_value"}
    if mixed := [key for key in content if key in later]:
        raise SchemaError(Place(), f"has {', '.join(mixed)}, which format_version 1 does not know")
    files = FILES["onnx" if content.get("format") == "onnx" else "paddle"]
    openvino = content.get("openvino")
    changed = {
        "program": files.program,
        "weights": files.weights,
        "earlier_format": openvino is True,
        "openvino": openvino,
        "format_version": FORMAT_VERSION,
    }
    # Version 1 did not quote a text like 1e-3, which reads as a number.
    as_text = lambda value: str(value) if type(value) is float else value  # noqa: E731
    if isinstance(content.get("classes"), list):
        changed["classes"] = [as_text(label) for label in content["classes"]]
    if "name" in content:
        changed["name"] = as_text(content["name"])
    from ppvision.safe_yaml import Located  # see parse_manifest

    places = content.where if isinstance(content, Located) else {}
    return Located({**content, **changed}, places)


def _check_together(m: Manifest, content: Mapping[str, Any]) -> None:
    """Check the relations between entries."""
    at = partial(Place().inside, content)
    of_program, of_weights = {"paddle": (".json", ".pdiparams"), "onnx": (".onnx", "")}[m.format]
    if not m.program.endswith(of_program):
        raise refuse(m.program, at("program"), f"a name that ends in {of_program}")
    if (m.weights is None) == bool(of_weights):
        raise refuse(m.weights, at("weights"), "a name, or null for format onnx")
    if m.weights is not None and not m.weights.endswith(of_weights):
        raise refuse(m.weights, at("weights"), f"a name that ends in {of_weights}")
    for name in list_file_names(m.model_files, m.earlier_format):
        if name not in m.files:
            raise SchemaError(at("files"), f"expected bytes and sha256 of {name}, got none")
    task = TASKS[m.task]
    if m.output_op not in task.output_ops:
        expected = f"{' or '.join(task.output_ops)} for {m.task}"
        raise refuse(m.output_op, at("output_op"), expected)
    if m.format == "onnx":
        for key in ("onednn", "openvino", "earlier_format"):
            if getattr(m, key):
                raise refuse(getattr(m, key), at(key), "false or null for format onnx")
    if m.openvino and not (m.earlier_format or m.model_files.own_for_openvino):
        raise refuse(m.openvino, at("openvino"), "false or null without earlier_format")
    if (m.num_classes is None) == task.has_classes:
        expected = "a whole number above 0" if task.has_classes else f"null for {m.task}"
        raise refuse(m.num_classes, at("num_classes"), expected)
    if len(m.classes) not in (0, m.num_classes or 0):
        expected = f"{m.num_classes or 0} names (num_classes) or none"
        raise refuse(m.classes, at("classes"), expected)
    for i, size in enumerate(m.checked_shapes):
        if any(want not in (None, got) for want, got in zip(m.input_shape, size, strict=True)):
            expected = f"sizes that input_shape {shorten(m.input_shape)} takes"
            raise refuse(size, at("checked_shapes").inside(m.checked_shapes, i), expected)
    if m.nms is not None and "nms" not in task.output_ops:
        raise refuse(m.task, at("nms"), "null for a task without output_op nms")
    if m.tile is not None and m.tile.overlap >= min(m.tile.size):
        raise refuse(m.tile.overlap, at("tile"), "an overlap less than the tile's sides")


def _verify(folder: Path, name: str, expected: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise MissingFileError(
            f"{path}: named in {NAME}, but missing. Copy the whole folder again."
        )
    # A link may point to another place in the folder (as in volumes of Kubernetes), but not out of
    # it.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(
            f"{path}: expected a file inside the folder, got a link to {path.resolve()}. Copy "
            "the folder with its files in place of links (cp -rL)."
        )
    size = path.stat().st_size
    if size != expected.bytes:
        raise ManifestError(
            f"{path}: expected {expected.bytes} bytes, got {size}; the file is incomplete or "
            "changed. Copy or export it again."
        )
    if (digest := compute_sha256(path)) != expected.sha256:
        raise ManifestError(
            f"{path}: expected sha256 {expected.sha256}, got {digest}; the file is corrupt or "
            "changed. Copy or export it again."
        )
