"""The configuration of a detector: PaddleDetection's YAML, which is checked before anything is
built.

PaddleDetection silently accepts a misspelt key. Here every component, tag, transform and argument
is looked up first, and the message has the file and line of the error.
"""

import inspect
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import paddle
import yaml

import ppvision.plugins.paddledet  # noqa: F401  (registers Pale and SDN, repairs PaddleDetection)

# isort: split
from ppdet.core import workspace
from ppdet.core.config.schema import SchemaDict, SharedConfig
from ppdet.data import transform

from ppvision.errors import shorten, suggest_nearest
from ppvision.files import write_text
from ppvision.safe_yaml import Located, Tagged, format_yaml
from ppvision.tasks.config import ConfigError, check_keys, check_number, check_texts
from ppvision.tasks.multibit.slim_config import check_slim_config

logger = logging.getLogger("ppvision")

OURS = ("task", "imports", "slim_config", "seed", "accumulate", "clip_norm", "ema_decay", "run")
METRICS = ("COCO", "VOC")
# Keys that PaddleDetection's Trainer reads, in addition to components and the keys that these
# share.
_FRAMEWORK = (
    *("architecture", "metric", "map_type", "classwise", "IouType", "bias", "epoch", "log_iter"),
    *("snapshot_epoch", "worker_num", "use_gpu", "use_ema", "ema_decay", "ema_decay_type"),
    *("ema_black_list", "ema_filter_no_grad", "cycle_epoch", "amp", "amp_level"),
    *("custom_white_list", "custom_black_list", "find_unused_parameters", "num_classes"),
    *("norm_type", "weights", "pretrain_weights", "save_dir", "filename"),
)
_REQUIRED = (
    *("architecture", "num_classes", "metric", "epoch", "TrainDataset", "TrainReader"),
    *("TestReader", "LearningRate", "OptimizerBuilder"),
)
_READERS = ("TrainReader", "EvalReader", "TestReader")
_DATASETS = ("TrainDataset", "EvalDataset", "TestDataset")
_FIELDS = (
    *("image", "gt_bbox", "gt_class", "gt_poly", "is_crowd", "difficult", "gt_score"),
    *("gt_rbox", "gt_keypoint", "gt_track_id", "semantic"),
)
_TRANSFORMS = ("sample_transforms", "batch_transforms")
# Arguments that name another component.
_NAMES = (
    *("backbone", "neck", "head", "rpn_head", "bbox_head", "mask_head", "fcos_head"),
    *("yolo_head", "bbox_post_process", "mask_post_process", "post_process"),
)
# Arguments that are objects; their defaults are the arguments of these objects.
_PARTS = (
    *("anchor_generator", "rpn_target_assign", "train_proposal", "test_proposal"),
    *("roi_extractor", "loss_weight"),
)
# Arguments that every reader takes in addition to its own.
_READER_KEYS = (
    *("inputs_def", "use_shared_memory", "mixup_epoch", "cutmix_epoch", "mosaic_epoch"),
    "pre_img_epoch",
)
_GIVEN = ("learning_rate", "parameters", "grad_clip", "name")  # from the task, not the config
_OWN_RULES = "AdamWDL"  # PaddleDetection's own optimizer, with lower rates for earlier layers


_registered: dict[str, SchemaDict] = {}


def list_components() -> dict[str, SchemaDict]:
    """Return all registered components by name.

    PaddleDetection registers components in its global config, where a job's data sets replace their
    schemas.
    """
    found = {k: v for k, v in workspace.global_config.items() if isinstance(v, SchemaDict)}
    _registered.update(found)
    return _registered


def check_config(content: Located) -> None:
    """Raise `ConfigError` for a key, component, tag, transform or argument that is not known."""
    known = list_components()
    shared = {
        name
        for schema in known.values()
        for name, value in schema.schema.items()
        if value.has_default() and isinstance(value.default, SharedConfig)
    }
    check_keys(content, [*OURS, *_FRAMEWORK, *known, *sorted(shared)])
    for key in _REQUIRED:
        if key not in content:
            raise ConfigError(f"config: detection: expected {shorten(key)}, got none.")
    for key in ("epoch", "num_classes", "log_iter", "snapshot_epoch"):
        check_number(content, key, low=1, whole=True)
    for key in ("worker_num", "seed"):
        check_number(content, key, low=0, whole=True)
    if content["metric"] not in METRICS:
        raise ConfigError(
            f"config{content.place('metric')}: metric: got {shorten(content['metric'])}. "
            f"{suggest_nearest(str(content['metric']), list(METRICS))}"
        )
    _check_name(content, "architecture", "", known)
    for name in known.keys() & content.keys():
        _check_component(content, name, known)
    for part in _DATASETS:
        if part in content:
            _check_dataset(content, part)
    training = content["TrainDataset"]
    if content["architecture"] == "FCOS" and training.get("allow_empty"):
        raise ConfigError(
            f"config{training.place('allow_empty')}: TrainDataset.allow_empty: expected false for "
            "FCOS, whose losses are divided by the number of objects in the batch."
        )
    for reader in _READERS:
        for part in _TRANSFORMS:
            _check_transforms(content.get(reader, {}), part, reader)
        if isinstance(content.get(reader), dict):
            check_number(content[reader], "batch_size", reader, low=1, whole=True)
    check_number(content["LearningRate"], "base_lr", "LearningRate", low=0)
    _check_optimizer(content["OptimizerBuilder"])
    for key in ("shuffle", "drop_last"):
        if content["TrainReader"].get(key, True) is not True:
            raise ConfigError(
                f"config{content['TrainReader'].place(key)}: TrainReader.{key}: expected true: a "
                "resume repeats the order of shuffled, whole batches only."
            )
    _check_tags(content)
    if content.get("pretrain_weights"):
        raise ConfigError(
            f"config{content.place('pretrain_weights')}: pretrain_weights: is not read here; "
            "expected the backbone's file as its `pretrained`, or a whole model by --model_path."
        )
    ignored = [key for key in ("use_ema", "amp", "find_unused_parameters") if content.get(key)]
    if ignored:
        logger.warning(
            f"config: {', '.join(ignored)}: PaddleDetection's own loop reads it, `ppvision train` "
            "does not (--use_ema, --precision)"
        )
    if "slim_config" in content:
        check_slim_config(content["slim_config"])


def _check_component(content: Located, name: str, known: dict[str, SchemaDict]) -> None:
    options, schema = content[name], known[name]
    if isinstance(options, Tagged):
        return
    _check_mapping(content, name, name)
    if name in _READERS or schema.strict:
        check_keys(options, [*schema.schema, *(_READER_KEYS if name in _READERS else ())], name)
    for key, value in options.items():
        where = f"{name}.{key}"
        if key in _NAMES and isinstance(value, str):
            _check_name(options, key, name, known)
        elif key in schema.inject and isinstance(value, Located) and "name" in value:
            _check_name(value, "name", where, known)
            check_keys(value, ["name", *known[value["name"]].schema], where)
        elif key in _PARTS and isinstance(schema.schema[key].default, dict):
            _check_mapping(options, key, where)
            check_keys(value, list(schema.schema[key].default), where)


def _check_dataset(content: Located, part: str) -> None:
    """Check that a data set has a tag and names existing fields."""
    options = content[part]
    if not isinstance(options, Tagged) and "name" not in (options or {}):
        raise ConfigError(
            f"config{content.place(part)}: {part}: expected a tag that says what it is, such as "
            f"`{part}: !COCODataSet`, got none."
        )
    check_number(options, "max_value", part, low=1, whole=True)
    fields = options.get("data_fields") or []
    if not isinstance(fields, list):
        raise ConfigError(
            f"config{options.place('data_fields')}: {part}.data_fields: expected a list, got "
            f"{shorten(fields)}."
        )
    for field in fields:
        if field not in _FIELDS:
            raise ConfigError(
                f"config{options.place('data_fields')}: {part}.data_fields: got {shorten(field)}. "
                f"{suggest_nearest(str(field), list(_FIELDS))}"
            )


def _check_mapping(node: Located, key: str, where: str) -> None:
    if not isinstance(node[key], Located):
        raise ConfigError(
            f"config{node.place(key)}: {where}: expected keys and values, got {shorten(node[key])}."
        )


def _check_optimizer(builder: Located) -> None:
    """Check names and arguments that PaddleDetection looks up only when the training begins."""
    where = "OptimizerBuilder"
    for key in ("clip_grad_by_norm", "clip_grad_by_value"):
        if builder.get(key) is not None:
            check_number(builder, key, where, low=0)
    if builder.get("regularizer") not in (None, False, "None"):
        _check_mapping(builder, "regularizer", f"{where}.regularizer")
        options = builder["regularizer"]
        check_keys(options, ["type", "factor"], f"{where}.regularizer")
        _check_choice(options, "type", f"{where}.regularizer", ["L1", "L2"])
        check_number(options, "factor", f"{where}.regularizer", low=0)
    if "optimizer" not in builder:
        return
    _check_mapping(builder, "optimizer", f"{where}.optimizer")
    options, where = builder["optimizer"], f"{where}.optimizer"
    optimizers = {
        name: made
        for name, made in vars(paddle.optimizer).items()
        if inspect.isclass(made) and issubclass(made, paddle.optimizer.Optimizer)
    }
    _check_choice(options, "type", where, [*optimizers, _OWN_RULES])
    if options["type"] != _OWN_RULES:
        taken = [
            name
            for name in inspect.signature(optimizers[options["type"]]).parameters
            if name not in _GIVEN
        ]
        check_keys(options, ["type", "param_groups", *taken], where)
        check_texts(optimizers[options["type"]], options, where)


def _check_choice(node: Located, key: str, where: str, choices: list[str]) -> None:
    if node.get(key) not in choices:
        raise ConfigError(
            f"config{node.place(key)}: {where}.{key}: got {shorten(node.get(key))}. "
            f"{suggest_nearest(str(node.get(key)), choices)}"
        )


def _check_name(node: Located, key: str, where: str, known: dict[str, SchemaDict]) -> None:
    value = node[key]
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"config{node.place(key)}: {where + '.' if where else ''}{key}: got {shorten(value)}. "
            f"{suggest_nearest(str(value), list(known))}"
        )


def _check_transforms(reader: Located, part: str, where: str) -> None:
    entries = reader.get(part, [])
    if not isinstance(entries, list):
        raise ConfigError(
            f"config{reader.place(part)}: {where}.{part}: expected a list, got {shorten(entries)}."
        )
    for number, entry in enumerate(entries):
        place = f"{where}.{part}.{number}"
        if not isinstance(entry, Located) or len(entry) != 1:
            raise ConfigError(f"config: {place}: expected {{NAME: {{...}}}}, got {shorten(entry)}.")
        ((name, options),) = entry.items()
        operators = {k: v for k, v in vars(transform).items() if inspect.isclass(v)}
        if name not in operators:
            raise ConfigError(
                f"config{entry.place(name)}: {place}: got {shorten(name)}. "
                f"{suggest_nearest(str(name), list(operators))}"
            )
        if name == "DecodeCache":
            raise ConfigError(
                f"config{entry.place(name)}: {place}: DecodeCache keeps images as pickles, which "
                "run what they name, in a folder that others may write to. Use Decode."
            )
        if not isinstance(options, dict):
            raise ConfigError(
                f"config{entry.place(name)}: {place}.{name}: expected arguments by name, got "
                f"{shorten(options)}; {{}} are none."
            )
        _check_arguments(operators[name], options, f"{place}.{name}")


def _check_tags(node: object) -> None:
    """Check PaddleDetection's tags and their arguments."""
    if isinstance(node, Tagged):
        known = {k[1:]: v for k, v in yaml.Loader.yaml_constructors.items() if k and k[0] == "!"}
        known.pop("Callable", None)  # it calls any function by name
        if node.tag not in known:
            raise ConfigError(
                f"config ({node.place_of_tag}): got !{node.tag}. "
                f"{suggest_nearest(node.tag, list(known))}"
            )
        made = inspect.getclosurevars(known[node.tag]).nonlocals.get("cls")
        if made is not None:
            _check_arguments(made, node, f"!{node.tag}")
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _check_tags(child)


def _check_arguments(made: Callable, options: dict, where: str) -> None:
    parameters = inspect.signature(made).parameters.values()
    check_texts(made, options, where)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    check_keys(options, [p.name for p in parameters], where)


# -- into PaddleDetection --------------------------------------------------------------------------


def activate(content: Located, name: str) -> workspace.AttrDict:
    """Activate a config in PaddleDetection, by its own `load_config`.

    PaddleDetection keeps one config in a global variable; entries of an earlier config are removed.

    Args:
        content: the checked config; our own keys are omitted.
        name: of the config.
    """
    pristine = {key: schema.copy() for key, schema in list_components().items()}
    for schema in pristine.values():
        schema.clear()  # defaults are stored elsewhere
    workspace.global_config.clear()
    workspace.global_config.update(pristine)
    left_out = (*OURS, "classwise")  # it would draw curves into the current folder
    theirs = Located({k: v for k, v in content.items() if k not in left_out}, content.where)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yml"
        write_text(path, format_yaml(theirs))
        return workspace.load_config(str(path))
