"""Every private part of Paddle that ppvision uses. If Paddle moves one, change it here only.

Functions and classes of Paddle's own modules are looked up on use, so that a missing one does not
break the import of ppvision, and the error names it. Attributes of Paddle's layers, optimizers and
quantisation are read where they are needed, because a wrapper would be less clear than the name;
`ATTRIBUTES` lists all of them. `OVERRIDDEN` lists the methods that our classes override.
`tests/test_paddle_private.py` tests each entry of all three.
"""

import functools
import importlib
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import paddle
from paddle import Tensor

from ppvision.errors import EngineError

if TYPE_CHECKING:
    from google.protobuf.message import Message

# Earlier and current places of each, the newest last: `module:attribute`.
PLACES = {
    "parameter_recorder": (
        "paddle.jit.pir_dy2static:parameter_recorder",  # 3.2
        "paddle.jit.dy2static:parameter_recorder",  # 3.3
    ),
    "DygraphOldIrGuard": ("paddle.pir_utils:DygraphOldIrGuard",),
    "LayerHelper": ("paddle.base.layer_helper:LayerHelper",),
    "framework_pb2": ("paddle.base.proto:framework_pb2",),
    "load_combine_func": ("paddle.base.core:load_combine_func",),
    "save_combine_func": ("paddle.base.core:save_combine_func",),
    "_C_ops": ("paddle:_C_ops",),
    "multiclass_nms3": ("paddle._C_ops:multiclass_nms3",),
    "Variable": ("paddle.base.framework:Variable",),
    "Value": ("paddle.pir:Value",),
    "_conv_nd": ("paddle.nn.functional.conv:_conv_nd",),
    "_BatchNormBase": ("paddle.nn.layer.norm:_BatchNormBase",),
    "default_collate_fn": ("paddle.io.dataloader.collate:default_collate_fn",),
}

# Attributes of objects, by class.
ATTRIBUTES = {
    "nn.Layer": (
        "_buffers",
        "_forward_post_hooks",
        "_forward_pre_hooks",
        "_non_persistable_buffer_names_set",
        "_parameters",
        "_sub_layers",
    ),
    "nn.Conv2D": (
        "_data_format",
        "_dilation",
        "_groups",
        "_in_channels",
        "_kernel_size",
        "_out_channels",
        "_padding",
        "_padding_algorithm",
        "_padding_mode",
        "_stride",
        "_updated_padding",
    ),
    "nn.BatchNorm2D": (
        "_data_format",
        "_epsilon",
        "_mean",
        "_momentum",
        "_use_global_stats",
        "_variance",
    ),
    "nn.LayerNorm": ("_epsilon", "_normalized_shape"),
    "nn.GELU": ("_approximate",),
    "DataParallel": ("_layers",),
    "optimizer.Optimizer": ("_grad_clip", "_learning_rate"),
    "quantization.QAT": ("_config",),
    "quantization.QuantConfig": (
        "_customized_qat_layer_mapping",
        "_layer2config",
        "_prefix2config",
        "_type2config",
    ),
    "quantization.factory.QuanterFactory": ("_instance",),
    "io.dataloader.dataloader_iter._DataLoaderIterMultiProcess": ("_try_shutdown_all",),
}

# Methods that our classes override, by Paddle's class, `module:class`. If Paddle renames one,
# nothing fails, but ours is never called.
OVERRIDDEN = {
    "paddle.quantization.factory:ClassWithArguments": ("_get_class",),
    "paddle.vision.transforms.transforms:RandomCrop": ("_get_param",),
    "paddle.vision.transforms.transforms:RandomResizedCrop": ("_dynamic_get_param",),
    "paddleslim.quant.qat:SlimQAT": ("_analysis_model",),
}


@functools.cache
def find_private(name: str) -> Any:
    """Return the object of a name in `PLACES`, from the first place that this Paddle has.

    Raises:
        EngineError: no place has it.
    """
    for place in PLACES[name]:
        module, _, attribute = place.partition(":")
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(found, attribute):
            return getattr(found, attribute)
        try:
            return importlib.import_module(f"{module}.{attribute}")
        except ImportError:
            continue
    first = PLACES[name][0].replace(":", ".")
    raise EngineError(
        f"{first} moved: expected Paddle to have it, Paddle {paddle.__version__} does not. Install "
        "the version that requirements.txt names."
    )


def collate_samples(samples: list) -> Any:
    """Collate a batch of samples with the default function of Paddle's loaders."""
    return find_private("default_collate_fn")(samples)


def trace_tables() -> list[dict]:
    """Return Paddle's notes on programs that it traces, by the program's hash."""
    recorder = find_private("parameter_recorder")
    parameters, inplace = recorder._global_parameter_recorder, recorder._global_inplace_map
    return [parameters.params_dict, parameters.tensor2value, inplace.params_dict]


_whole_stack = traceback.extract_stack
_tracing: set[int] = set()  # threads that are inside `short_stacks`


@contextmanager
def short_stacks() -> Iterator[None]:
    """Let Paddle store one line of Python for each operator that it traces in this thread.

    Paddle stores the whole stack, for messages of a program that runs in this process, and looks up
    a source line for each frame (`traceback.extract_stack`). This takes a seventh of the time of an
    export. An exported graph does not contain the stack: Paddle's writer of `model.json` omits it,
    and so do we in the earlier format.
    """
    thread = threading.get_ident()
    if thread in _tracing:
        yield
        return
    _tracing.add(thread)
    traceback.extract_stack = _extract_stack
    try:
        yield
    finally:
        _tracing.discard(thread)
        if not _tracing:
            traceback.extract_stack = _whole_stack


def _extract_stack(f: FrameType | None = None, limit: int | None = None) -> traceback.StackSummary:
    caller = sys._getframe(1)
    if f is not None or threading.get_ident() not in _tracing:
        return _whole_stack(caller if f is None else f, limit)
    line = (caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_name, "")
    return traceback.StackSummary.from_list([line])


def parse_program(program: bytes) -> "Message":
    """Return the description (`ProgramDesc`) in a serialised program of the earlier format."""
    return find_private("framework_pb2").ProgramDesc.FromString(program)


def read_parameters(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from a graph's file of parameters, which are in the order of their names.

    Args:
        path: `model.pdiparams`.
        tensors: one tensor per parameter, by name. Shapes and types may differ; they become those
            of the file.
    """
    names = sorted(tensors)
    load = find_private("load_combine_func")
    load(str(path), names, _held(tensors, names), False, paddle.CPUPlace())


def write_parameters(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a graph's parameters by name in the form for Paddle Inference."""
    names = sorted(tensors)
    find_private("save_combine_func")(_held(tensors, names), names, str(path), True, False, False)


def _held(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[object]:
    return [tensors[name].value().get_tensor() for name in names]


def select_boxes(
    boxes: Tensor, scores: Tensor, counts: Tensor | None, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of non-maximum suppression; it gives rows, their places, and rows per
    image.

    Args:
        boxes: `[B, N, 4]`, or `[N, classes, 4]` with `counts`.
        scores: `[B, classes, N]`, or `[N, classes]` with `counts`.
        counts: number of boxes per image, `[B]`, or None.
        *options: `score_threshold, nms_top_k, keep_top_k, nms_threshold, normalized, nms_eta,
            background_label`.
    """
    # Not from the cache: while a program of the earlier format is traced, a replacement is
    # installed.
    return find_private.__wrapped__("multiclass_nms3")(boxes, scores, counts, *options)
