"""PaddleDetection: the import of this module adds the zoo's backbones and SDN, repairs faults, and
makes reading of configurations safe.

Afterwards every model of the zoo (`ppvision list`) is a backbone like any other:

    FasterRCNN: {backbone: pale_tiny, ...}
    pale_tiny: {return_idx: [0, 1, 2, 3], drop_path_rate: 0.1}

`SemanticDiffusionBackbone` puts SDN after any backbone:

    FasterRCNN: {backbone: SemanticDiffusionBackbone, ...}
    SemanticDiffusionBackbone: {backbone: ResNet, levels: [0, 1, 2, 3]}

PaddleDetection reads configurations, `-o` options and its compression files with a loader that
executes any function that a file names (`!!python/object/apply:os.system`). After the import it
accepts only plain values and PaddleDetection's own tags (`!LinearWarmup {...}`). It also refuses
`!Callable`, which calls any function by its name.

`ppvision.data` reads lists, class files, JSON and XML in the forms that common tools write
(`ppvision.plugins.paddledet_data`). `ppvision.data.pictures` reads images: a file that is cut off
or damaged is an error with its name. A data set whose images have more than 8 bits per channel
states the value of white:

    TrainDataset: !COCODataSet {max_value: 4095, ...}
"""

import contextlib
import importlib
import inspect
import io

from ppvision.errors import MissingPackageError, shorten

try:
    with contextlib.redirect_stdout(io.StringIO()):  # it asks for numba, which only tracking needs
        for _package in ("ppdet.metrics", "ppdet.modeling"):  # they register components
            importlib.import_module(_package)
    from ppdet import slim
    from ppdet.core import workspace
    from ppdet.data.source import dataset as datasets
    from ppdet.data.source import keypoint_coco, pose3d_cmb, sniper_coco
    from ppdet.data.transform import operators
    from ppdet.utils import cli
except ImportError as error:
    raise MissingPackageError(
        f"ppvision.plugins.paddledet needs PaddleDetection, which does not import ({error}); "
        "install it with: pip install --no-deps paddledet==2.6.0"
    ) from error

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import cv2
import numpy as np
import yaml
from paddle import Tensor, nn
from ppdet.modeling.shape_spec import ShapeSpec

from ppvision.data.pictures import read_picture
from ppvision.errors import DataError, InputError
from ppvision.nn import SemanticDiffusionPyramid
from ppvision.plugins import paddledet_data, reading, shims
from ppvision.safe_yaml import BoundedLoader
from ppvision.zoo.factory import create_model, find_model_signature
from ppvision.zoo.registry import follow_models

_REFUSED = "!Callable"
# PaddleDetection computes all maps and takes some of them; its name for out_indices is return_idx.
_NOT_OF_A_BACKBONE = ("num_classes", "features_only", "out_indices")


class _Loader(BoundedLoader):
    """YAML's plain values and the tags of PaddleDetection's classes."""


def _registered(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> object:
    # PaddleDetection's `serializable` adds the constructor of every class to YAML's own loader.
    known = yaml.Loader.yaml_constructors.get(f"!{suffix}")
    if known is None or f"!{suffix}" == _REFUSED:
        raise yaml.constructor.ConstructorError(
            None, None, f"expected a tag of PaddleDetection's, got '!{suffix}'", node.start_mark
        )
    return known(loader, node)


_Loader.add_multi_constructor("!", _registered)


def load_yaml(stream: IO[str] | str) -> object:
    """Read one YAML document of PaddleDetection's.

    Raises:
        yaml.YAMLError: not YAML, or a tag that is neither plain nor PaddleDetection's.
    """
    return yaml.load(stream, Loader=_Loader)


class _SafeYaml:
    """The module `yaml` for PaddleDetection's modules: its `yaml.Loader` is the safe one."""

    Loader = _Loader

    def __getattr__(self, name: str) -> object:
        return getattr(yaml, name)


# Only the name `yaml` inside these modules; YAML itself does not change for other code.
for _module in (workspace, cli, slim):
    _module.yaml = _SafeYaml()


class _ZooBackbone(nn.Layer):
    """A model of the zoo as a backbone of PaddleDetection: some of its feature maps.

    Args:
        return_idx: numbers of the feature maps, from the finest. Default None: all.
        out_indices: the same, with the name of `create_model` and PaddleSeg.
        options: those of `create_model`, except those of the head.

    Attributes:
        out_shape: channels and stride of each map.

    Raises:
        ValueError: an argument is out of range, weights do not fit, or both names are used.
        FileNotFoundError: the weights do not exist.
    """

    def __init__(
        self,
        return_idx: Sequence[int] | None = None,
        out_indices: Sequence[int] | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        given = "return_idx" if out_indices is None else "out_indices"
        if return_idx is not None and out_indices is not None:
            raise InputError(
                f"{name}: return_idx and out_indices are two names of one option. Use only one of "
                "them."
            )
        return_idx = return_idx if out_indices is None else out_indices
        self.net = create_model(name, features_only=True, **options)
        count = len(self.net.feat_channels)
        chosen = list(range(count) if return_idx is None else return_idx)
        if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < count:
            raise InputError(
                f"{name}: {given}: expected numbers from 0 to {count - 1}, the finest first, "
                f"got {shorten(return_idx)}."
            )
        self.return_idx = chosen

    def forward(self, inputs: dict) -> list[Tensor]:
        features = self.net(inputs["image"])
        return [features[index] for index in self.return_idx]

    @property
    def out_shape(self) -> list[ShapeSpec]:
        channels, strides = self.net.feat_channels, self.net.feat_strides
        return [ShapeSpec(channels=channels[i], stride=strides[i]) for i in self.return_idx]


def _backbone(name: str) -> type[_ZooBackbone]:
    """Make a class for a model, because PaddleDetection identifies components by the names of
    classes and the arguments of their constructors."""
    own = inspect.signature(_ZooBackbone.__init__).parameters
    options = [
        p.replace(kind=p.POSITIONAL_OR_KEYWORD)  # PaddleDetection ignores other parameters
        for p in find_model_signature(name).parameters.values()
        if p.name not in _NOT_OF_A_BACKBONE
    ]

    def __init__(self: _ZooBackbone, *words: object, **given: object):
        _ZooBackbone.__init__(self, *words, **given)

    first = [own[name] for name in ("self", "return_idx", "out_indices")]
    __init__.__signature__ = inspect.Signature([*first, *options])
    content = {"__doc__": _ZooBackbone.__doc__, "__module__": __name__, "__init__": __init__}
    return type(name, (_ZooBackbone,), content)


class SemanticDiffusionBackbone(nn.Layer):
    """SDN after a backbone of PaddleDetection: its feature maps, sharper at class boundaries.

    Args:
        backbone: a registered backbone; a config gives its name.
        levels: numbers of the feature maps to enhance, among those that the backbone returns;
            negative numbers count from the coarsest. Default None: all.
        similarity: see `ppvision.nn.SemanticDifferenceConv2D`. Default None: `none` (central
            differences).
        groups: groups of the semantic difference convolutions. Default 1.
        width: channels inside them; see `ppvision.nn.SemanticDiffusion`.

    Attributes:
        out_shape: the `out_shape` of the backbone.

    Raises:
        ValueError: a level does not exist.

    Source: SDN, NeurIPS 2022 (`ppvision.nn.semantic_diffusion`).
    """

    __inject__ = ["backbone"]  # noqa: RUF012 (PaddleDetection reads it so)

    def __init__(
        self,
        backbone: nn.Layer,
        levels: Sequence[int] | None = None,
        similarity: str | None = None,
        groups: int = 1,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.diffusion = SemanticDiffusionPyramid(
            [shape.channels for shape in backbone.out_shape],
            levels,
            similarity=similarity,
            groups=groups,
            width=width,
        )

    def forward(self, inputs: dict) -> list[Tensor]:
        return self.diffusion(self.backbone(inputs))

    @property
    def out_shape(self) -> list[ShapeSpec]:
        return self.backbone.out_shape


def _decode(self: operators.Decode, sample: dict, context: object = None) -> dict:
    """Replaces PaddleDetection's `Decode.apply`, with our reader.

    The original passes on files that do not decode, as bytes, and fails at their shape.
    """
    max_value = sample.pop(reading.MAX_VALUE, None)
    path = sample.get("im_file")
    if "image" not in sample:
        sample["image"] = read_picture(sample.pop("im_file"), max_value=max_value)
    elif not isinstance(sample["image"], np.ndarray):  # bytes of a file
        sample["image"] = read_picture(bytes(sample["image"]), path, max_value=max_value)
    image = sample["image"]
    if sample.get("keep_ori_im"):
        sample["ori_image"] = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    for key, found in zip("hw", image.shape, strict=False):
        if sample.get(key, found) != found:
            operators.logger.warning(
                f"{path}: the annotations say {key} = {sample[key]}, the image has {found}"
            )
        sample[key] = found
    sample["im_shape"] = np.array(image.shape[:2], dtype=np.float32)
    sample["scale_factor"] = np.ones(2, np.float32)
    return sample


def _name_file(apply: Callable) -> Callable:
    """Add the name of the file to errors of an operator that decodes bytes."""

    @functools.wraps(apply)
    def named(self: object, sample: dict, context: object = None) -> dict:
        path = sample.get("im_file")
        try:
            return apply(self, sample, context)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    named.names_file = True
    return named


def _keep_max_value(dataset: datasets.DetDataset, max_value: int) -> None:
    dataset.max_value = max_value


def _say_max_value(parse: Callable) -> Callable:
    """Add the data set's `max_value` for `Decode` to every record."""

    @functools.wraps(parse)
    def parse_dataset(self: datasets.DetDataset, *args: object, **kwargs: object) -> None:
        parse(self, *args, **kwargs)
        if self.max_value is not None:
            for record in self.roidbs:
                record[reading.MAX_VALUE] = self.max_value

    parse_dataset.says_max_value = True
    return parse_dataset


def _all_below(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from _all_below(child)


def _read_strictly() -> None:
    reading.read_strictly(operators, keypoint_coco, pose3d_cmb, sniper_coco)
    operators.Decode.apply = _decode
    for operator, method in (
        (operators.DecodeCache, "apply"),
        (operators.SniperDecodeCrop, "__call__"),
    ):
        if not hasattr(getattr(operator, method), "names_file"):
            setattr(operator, method, _name_file(getattr(operator, method)))
    datasets.DetDataset.max_value = None  # until the configuration sets it
    for dataset in _all_below(datasets.DetDataset):
        reading.accept_max_value(dataset, _keep_max_value)
        parse = vars(dataset).get("parse_dataset")
        if parse is not None and not hasattr(parse, "says_max_value"):
            dataset.parse_dataset = _say_max_value(parse)


def _register(component: type[nn.Layer]) -> type[nn.Layer]:
    name = component.__name__
    known = workspace.global_config.get(name)
    if known is None:
        return workspace.register(workspace.serializable(component))
    owner = known.pymodule.__name__
    if owner != __name__:
        raise InputError(
            f"PaddleDetection component {shorten(name)}: expected a free name, but {owner} has "
            "registered it. Import only one of the two."
        )
    return component  # it was imported before and is reloaded now


def _register_model(name: str) -> None:
    """Register a model of the zoo as a backbone, and make it an attribute of this module, where
    PaddleDetection looks for it."""
    if "features_only" in find_model_signature(name).parameters:
        globals()[name] = _register(_backbone(name))


follow_models(_register_model)
SemanticDiffusionBackbone = _register(SemanticDiffusionBackbone)
shims.apply(shims.PADDLEDET_SHIMS)
paddledet_data.read_alike()
_read_strictly()  # after the line above, because it adds `max_value` to those data sets

__all__ = ["SemanticDiffusionBackbone", "load_yaml"]
