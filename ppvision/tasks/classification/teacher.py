"""Distillation for classification: a trained network answers once for every image.

The teacher gets each whole image of the training set and its left-right mirror, with its own size
and normalisation. Its answers for our classes are kept on disk, so that training takes no more time
than without a teacher. A student learns most if it gets the same view as the teacher (Beyer et al.,
"Knowledge distillation: A good teacher is patient and consistent", CVPR 2022). Answers that are
computed once cannot fit a small crop, so random crops keep at least 0.7 of the area.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
1503.02531.

The keys of a config's `teacher`: `ppvision/tasks/classification/config.py`.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ppvision.console import ProgressLine
from ppvision.data.class_folders import ClassFolders
from ppvision.data.class_zip import ZipPath, read_sample
from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.transforms import Transforms
from ppvision.environment import count_usable_cpus
from ppvision.errors import ConfigError, FolderInUseError, shorten, shorten_text, suggest_nearest
from ppvision.files import find_cache_folder, lock_folder, replace_file, write_text
from ppvision.tasks.config import read_yaml
from ppvision.zoo import create_model, load_weights

logger = logging.getLogger("ppvision")

TEMPERATURE, WEIGHT = 1.0, 0.5  # defaults of the config's keys
SOURCES = ("type", "model_dir", "file")
INPUT_KEYS = ("size", "mean", "std", "interpolation")  # an exported folder contains them
KEYS = (*SOURCES, "weights", *INPUT_KEYS, "classes", "temperature", "weight")

ANSWERS_VERSION = 1  # raise it when answers change for the same teacher, data and mapping
BATCH = 32  # rows per batch of the teacher: 16 images and their mirrors
PART = 512  # images per file of unfinished work: at most a few minutes are lost
WAIT_SECONDS = 5  # between two checks whether another process has finished

Answer = Callable[[list[np.ndarray]], np.ndarray]  # images [H, W, 3] uint8 -> probabilities [B, T]


def distillation_loss(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence from the teacher's answers, the mean over the images.

    It is multiplied by the square of the temperature, so that its gradient keeps its size (section
    2.1 of Hinton et al.).

    Args:
        logits: logits of the student, `[B, K]`.
        answers: probabilities of the classes at that temperature, `[B, K]`.
        temperature: above 0.
    """
    with paddle.amp.auto_cast(enable=False):
        student = F.log_softmax(logits.astype("float32") / temperature, axis=1)
        # log 0 would give NaN if the probability is also 0; 0 times a finite number is 0.
        known = paddle.log(paddle.clip(answers, min=float(np.finfo(np.float32).tiny)))
        return (answers * (known - student)).sum(axis=1).mean() * temperature**2


class Teacher:
    """A config's `teacher` after opening: files are read and checked.

    Args:
        options: checked options of the config.
        classes: names of our classes, in order.
        folders: names of their folders if they differ; or empty.

    Attributes:
        temperature: divisor of the logits.
        weight: weight of the distillation in the loss; the labels have the rest.

    Raises:
        ConfigError: the teacher is not a classifier, or its classes do not fit ours.
        FileNotFoundError, WeightsError, ManifestError: its files are missing or damaged.
    """

    def __init__(
        self, options: Mapping[str, Any], classes: Sequence[str], folders: Sequence[str] = ()
    ) -> None:
        self._options = dict(options)
        self.temperature = float(options.get("temperature", TEMPERATURE))
        self.weight = float(options.get("weight", WEIGHT))
        self._layer: nn.Layer | None = None
        names: Sequence[str] = ()
        if "model_dir" in options:
            self.name = f"model_dir {options['model_dir']}"
            manifest = read_manifest(Path(options["model_dir"]))
            if manifest.task != "classification" or manifest.output_op == "argmax":
                raise ConfigError(
                    f"config: teacher: expected an exported classifier that gives scores, got "
                    f"task {manifest.task} and output {manifest.output_op} in "
                    f"{options['model_dir']}. Export it with --output_op softmax."
                )
            assert manifest.num_classes is not None  # because it is a classifier
            outputs, names = manifest.num_classes, manifest.classes
            described = (
                Path(options["model_dir"]) / "deploy.yaml"
            ).read_bytes()  # has sha256s of files
            self._identity = hashlib.sha256(described).hexdigest()
        else:
            self.name = f"{'type' if 'type' in options else 'file'} {self._model_name}"
            self._layer = self._build()
            outputs = self._count_outputs(self._layer)
            self._identity = self._fingerprint(self._layer)
        self._columns = map_classes(
            options.get("classes"), classes, folders, outputs, names, self.name
        )

    @property
    def _model_name(self) -> str:
        return str(self._options.get("type") or self._options.get("file"))

    def _build(self) -> nn.Layer:
        options = self._options
        weights = options.get("weights")
        if "type" in options:
            own = {key: value for key, value in options.items() if key not in KEYS}
            layer = create_model(options["type"], **own)
        else:
            layer = load_layer(options["file"])
        if weights is not None:
            load_weights(layer, weights)
        layer.eval()
        return layer

    @cached_property
    def _transforms(self) -> list[dict]:
        return make_teacher_transforms(self._options)

    @paddle.no_grad()
    def _count_outputs(self, layer: nn.Layer) -> int:
        width, height = self._transforms[0]["target_size"]
        try:
            out = _first(layer(paddle.zeros([1, 3, height, width])))
        except Exception as error:  # a layer of the user may raise anything
            raise ConfigError(
                f"config: teacher: {self.name}: does not run on an image of {width} x {height} "
                f"({type(error).__name__}: {shorten_text(str(error))}). Check size."
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != 1:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(
                f"config: teacher: {self.name}: expected logits [B, classes], got {found}."
            )
        return out.shape[1]

    def _fingerprint(self, layer: nn.Layer) -> str:
        """Return a digest of what the answers depend on: the user's code, weights, transforms."""
        digest = hashlib.sha256(json.dumps([self._model_name, self._transforms]).encode())
        if "file" in self._options:
            digest.update(_split_file(self._options["file"])[0].read_bytes())
        else:
            own = {k: v for k, v in self._options.items() if k not in KEYS}
            digest.update(json.dumps(own, sort_keys=True, default=str).encode())
        for name, tensor in layer.state_dict().items():
            digest.update(name.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
        return digest.hexdigest()

    # -- answers -------------------------------------------------------------------------------

    def answers(self, dataset: ClassFolders) -> np.ndarray:
        """Return the answers for every image of a data set and its mirror; compute them if needed.

        Finished parts of an interrupted computation are used. A second process waits for the first.

        Returns:
            `[N, 2, K]` float16 in a file: logarithms of the probabilities of our classes, for the
            image and its left-right mirror.

        Raises:
            DataError: an image does not decode.
        """
        folder = find_cache_folder() / "teacher" / self._key(dataset)
        path, shape = folder / "answers.npy", (len(dataset), 2, len(self._columns))
        waited = False
        while (found := _read_answers(path, shape)) is None:
            try:
                with lock_folder(folder, f"teacher: another process is computing {folder}"):
                    if _read_answers(path, shape) is None:  # another process may have finished
                        self._compute(dataset, folder, path, shape)
            except FolderInUseError:
                if not waited:
                    logger.info(f"teacher: waiting for another process that computes {folder}")
                waited = True
                time.sleep(WAIT_SECONDS)
        self._report(dataset, found, folder)
        return found

    def _key(self, dataset: ClassFolders) -> str:
        """Return a digest of teacher, mapping and images; a change of any gives another cache
        folder."""
        parts = [ANSWERS_VERSION, self._identity, self._columns, dataset.max_value]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for path, _ in dataset.samples:
            if isinstance(path, ZipPath):  # by content, wherever the zip is
                entry = path.archive.entries.get(path.name)
                mark = f"{(path.name, entry and (entry.crc, entry.bytes))}\n"
            else:
                status = os.stat(path)
                mark = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(mark.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _compute(
        self, dataset: ClassFolders, folder: Path, path: Path, shape: tuple[int, int, int]
    ) -> None:
        """Compute the parts one after another, each in a file; then join them."""
        logger.info(f"teacher: {self.name} answers for {shape[0]} images, once: {folder}")
        parts = folder / "parts"
        parts.mkdir(exist_ok=True)
        starts = range(0, shape[0], PART)
        files = {start: parts / f"{start:08d}.npy" for start in starts}
        with (
            tempfile.TemporaryDirectory(prefix="ppvision-") as work,
            ProgressLine("teacher", shape[0]) as bar,
        ):
            answer: Answer | None = None
            for start in starts:
                stop = min(start + PART, shape[0])
                if _read_answers(files[start], (stop - start, *shape[1:])) is None:
                    answer = answer or self._open(Path(work))
                    _save_array(files[start], self._answer_part(answer, dataset, start, stop, bar))
                else:
                    bar.update(stop - start)
        _save_array(path, np.concatenate([np.load(file) for file in files.values()]))
        described = {
            "teacher": self.name,
            "pictures": shape[0],
            "first": str(dataset.samples[0][0]),
        }
        write_text(folder / "description.json", json.dumps(described) + "\n")
        shutil.rmtree(parts, ignore_errors=True)

    def _answer_part(
        self, answer: Answer, dataset: ClassFolders, start: int, stop: int, bar: ProgressLine
    ) -> np.ndarray:
        rows = []
        for first in range(start, stop, BATCH // 2):
            last = min(first + BATCH // 2, stop)
            paths = [dataset.samples[k][0] for k in range(first, last)]
            pictures = [read_sample(path, dataset.max_value) for path in paths]
            mirrored = [np.ascontiguousarray(picture[:, ::-1]) for picture in pictures]
            both = [p for pair in zip(pictures, mirrored, strict=True) for p in pair]
            rows.append(merge_shares(answer(both), self._columns))
            bar.update(last - first)
        return np.concatenate(rows).reshape(stop - start, 2, -1).astype(np.float16)

    def _open(self, work: Path) -> Answer:
        """Return the teacher in the fastest engine that runs it: Paddle Inference, or eager
        mode."""
        # One thread if the user has set so, as for Paddle in general.
        threads = int(os.environ.get("OMP_NUM_THREADS") or count_usable_cpus())
        folder: Any = self._options.get("model_dir")
        if self._layer is not None:
            folder = work / "teacher"
            width, height = self._transforms[0]["target_size"]
            try:
                export_model(
                    self._layer,
                    folder,
                    input_shape=[BATCH, 3, height, width],
                    output_op="none",
                    task="classification",
                    transforms=self._transforms,
                )
            except Exception as error:  # tracing a layer of the user may raise anything
                logger.warning(
                    f"teacher: {self.name} cannot be exported ({type(error).__name__}: "
                    f"{str(error)[:200]}); it runs in eager mode, which is slower"
                )
                return self._answer_eagerly
        predictor = Predictor(folder, threads=threads)

        def answer(pictures: list[np.ndarray]) -> np.ndarray:
            return np.stack([p.probabilities for p in predictor(pictures, batch_size=BATCH)])

        return answer

    @paddle.no_grad()
    def _answer_eagerly(self, pictures: list[np.ndarray]) -> np.ndarray:
        layer = self._layer
        assert layer is not None  # otherwise the answers come from an exported folder
        transform = Transforms(self._transforms)
        batch = np.stack([transform(picture)[0] for picture in pictures])
        logits = _first(layer(paddle.to_tensor(batch)))
        return F.softmax(logits.astype("float64"), axis=1).numpy()

    def _report(self, dataset: ClassFolders, answers: np.ndarray, folder: Path) -> None:
        """Log how often the teacher is correct: a wrong mapping or normalisation gives a low
        number."""
        labels = np.array([label for _, label in dataset.samples])
        found = np.concatenate(
            [answers[start : start + 4096, 0].argmax(1) for start in range(0, len(labels), 4096)]
        )
        share = float((found == labels).mean())
        logger.info(
            f"teacher: {self.name}: the class of the label is its first of {answers.shape[2]} for "
            f"{share:.1%} of {len(labels)} images ({folder})"
        )
        if share < 2 / answers.shape[2]:
            logger.warning(
                "teacher: that is little more than chance. Check classes, size, mean and std"
            )


def _first(output: Any) -> Any:
    """Return the first of several outputs, like an export."""
    return output[0] if isinstance(output, list | tuple) else output


def _read_answers(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return an array in its file, or None if it is missing or another one."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # missing, or incomplete after a disk error: computed again
        return None
    return found if found.shape == shape and found.dtype == np.float16 else None


def _save_array(path: Path, array: np.ndarray) -> None:
    with replace_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)


# -- what a config names ---------------------------------------------------------------------------


def make_teacher_transforms(options: Mapping[str, Any]) -> list[dict]:
    """Transform an image for the teacher: resize the whole image, then normalise."""
    size = options["size"]
    resize = {"type": "Resize", "target_size": [size, size] if isinstance(size, int) else size}
    resize["interp"] = options.get("interpolation", "CUBIC")
    normalize = {"type": "Normalize"} | {k: options[k] for k in ("mean", "std") if k in options}
    return [resize, normalize]


def _split_file(file: str) -> tuple[Path, str]:
    """Return path and function of `teachers.py:build`."""
    path, _, function = file.rpartition(":")
    return Path(path), function


def load_layer(file: str) -> nn.Layer:
    """Return the layer from a function without arguments in the user's Python file.

    Args:
        file: `path/to/file.py:function`.

    Raises:
        ConfigError: the file or function does not exist, raises, or returns no layer.
    """
    path, function = _split_file(file)
    where = f"config: teacher.file: {file}"
    if not path.is_file():
        raise ConfigError(f"{where}: expected a Python file, found none at {path}.")
    spec = importlib.util.spec_from_file_location(f"ppvision_teacher_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{where}: expected a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        layer = build() if callable(build) else None
    except Exception as error:  # the user's code can raise anything
        text = shorten_text(str(error))
        raise ConfigError(f"{where}: raised {type(error).__name__}: {text}") from error
    if build is None:
        known = [name for name, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"{where}: found no function {shorten(function)}. {suggest_nearest(function, known)}"
        )
    if not isinstance(layer, nn.Layer):
        raise ConfigError(
            f"{where}: expected a function that returns a paddle.nn.Layer, got "
            f"{type(layer).__name__}."
        )
    return layer


def map_classes(
    mapping: Any,
    classes: Sequence[str],
    folders: Sequence[str],
    outputs: int,
    names: Sequence[str],
    teacher: str,
) -> list[list[int]]:
    """Return the teacher's outputs for each of our classes.

    Args:
        mapping: mapping of the config: a list in the order of our classes, a dictionary by their
            names, or a YAML file with either. A value is a number or name of a teacher's class, or
            a list of them. None: the teacher has our classes.
        classes, folders: names of our classes and folders; either may be used.
        outputs: number of the teacher's outputs.
        names: names of the teacher's classes, if it has them.
        teacher: name of the teacher for messages.

    Raises:
        ConfigError: a class does not exist, or is assigned twice.
    """
    where = "config: teacher.classes"
    if isinstance(mapping, str):
        where = f"{where}: {mapping}"
        mapping = _read_mapping(mapping)
    if mapping is None:
        if outputs != len(classes):
            raise ConfigError(
                f"config: teacher: {teacher} has {outputs} classes and the model has "
                f"{len(classes)}. List the matching classes in teacher.classes."
            )
        if names and list(names) != list(classes):
            differ = next(k for k in range(outputs) if names[k] != classes[k])
            raise ConfigError(
                f"config: teacher: class {differ} is {shorten(names[differ])} for {teacher} and "
                f"{shorten(classes[differ])} in train_dataset. Assign them in teacher.classes."
            )
        return [[k] for k in range(outputs)]
    if isinstance(mapping, Mapping):
        values = _values_by_class(mapping, classes, folders, where)
    else:
        values = list(mapping)
        if len(values) != len(classes):
            raise ConfigError(
                f"{where}: expected an entry for each of the {len(classes)} classes, got "
                f"{len(values)}."
            )
    columns: list[list[int]] = []
    owners: dict[int, str] = {}
    for k, value in enumerate(values):
        found = []
        for item in value if isinstance(value, list) else [value]:
            column = _column(item, outputs, names, f"{where}: {classes[k]}", teacher)
            if column in owners:
                raise ConfigError(
                    f"{where}: class {shorten(item)} of the teacher is assigned to both "
                    f"{shorten(owners[column])} and {shorten(classes[k])}. Assign it to one of "
                    "them."
                )
            owners[column] = classes[k]
            found.append(column)
        columns.append(found)
    return columns


def _read_mapping(path: str) -> object:
    """Read the mapping of a YAML file; a list is under the key `classes`."""
    content = dict(read_yaml(path))
    return content["classes"] if list(content) == ["classes"] else content


def _values_by_class(
    mapping: Mapping, classes: Sequence[str], folders: Sequence[str], where: str
) -> list[object]:
    by_name = {str(key): value for key, value in mapping.items()}
    values = []
    for k, name in enumerate(classes):
        found = [n for n in (name, *folders[k : k + 1]) if n in by_name]
        if not found:
            raise ConfigError(
                f"{where}: expected every class, found none for {shorten(name)}. "
                f"{suggest_nearest(name, mapping)}"
            )
        values.append(by_name.pop(found[0]))
    if by_name:
        other = next(iter(by_name))
        raise ConfigError(
            f"{where}: {shorten(other)} is none of the {len(classes)} classes. "
            f"{suggest_nearest(other, [*classes, *folders])}"
        )
    return values


def _column(item: object, outputs: int, names: Sequence[str], where: str, teacher: str) -> int:
    if isinstance(item, str):
        if not names:
            raise ConfigError(
                f"{where}: got the name {shorten(item)}, but {teacher} does not name its classes. "
                "Give numbers."
            )
        if item not in names:
            raise ConfigError(
                f"{where}: {teacher} has no class {shorten(item)}. "
                f"{suggest_nearest(item, list(names))}"
            )
        return list(names).index(item)
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < outputs:
        raise ConfigError(
            f"{where}: expected a class of the teacher, 0 to {outputs - 1}, got {shorten(item)}."
        )
    return item


def merge_shares(shares: np.ndarray, columns: Sequence[Sequence[int]]) -> np.ndarray:
    """Return logarithms of the probabilities of our classes only, from those of all the teacher's
    classes.

    Shapes: `[B, T]` -> `[B, K]` float64; probabilities of several teacher's classes for one of ours
        are added.
    """
    # A probability of 0 was too small for float32.
    shares = np.maximum(shares.astype(np.float64), np.finfo(np.float32).tiny)
    ours = np.stack([shares[:, group].sum(axis=1) for group in columns], axis=1)
    return np.log(ours / ours.sum(axis=1, keepdims=True))
