"""Repairs for code written before Paddle had 0-D tensors and strict type promotion.

PaddleSeg 2.8 and PaddleDetection 2.6 fail in places on Paddle 3, nearly always for one of these
reasons:

    mask * coef                a tensor meets one of another type                    TypeError
    paddle.concat(scalars)     0-D tensors are concatenated                          ValueError
    losses[0].numpy()[0]       a 0-D array or tensor is indexed                      IndexError
    F.one_hot(label * mask)    class numbers arrive as floats, once the first is repaired

A shim is put in only if a probe, which runs what fails once on a tiny input, meets the fault.
`remove` takes it out again. There are three kinds:

    Shim           one function gets new code in which exactly these operations go through
                   `Operations`; the object stays, so that whoever imported it is repaired too
    ConcatShim     the modules of a package find `Operations.concat` as `paddle.concat`
    Replacement    one function of a module or class makes way for another one
"""

import ast
import functools
import importlib
import inspect
import linecache
import operator
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType, SimpleNamespace

import cv2
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.errors import EngineError, InputError
from ppvision.forms.paddle_private import find_private, select_boxes

# What a probe may raise when the fault is there. Anything else is not ours to hide.
FAULTS = (TypeError, ValueError, IndexError)

# A tensor, eager or of a graph that is being traced for export.
_TENSOR = (Tensor, find_private("Value"))


def _rank(x: Tensor) -> int:
    """0 for bool, 1 for integers, 2 for floats, 3 for complex numbers."""
    if x.dtype == paddle.bool:
        return 0
    return 3 if paddle.is_complex(x) else 2 if paddle.is_floating_point(x) else 1


class Operations:
    """The operations as the old code means them; each is Paddle's own where Paddle allows it."""

    @staticmethod
    def arithmetic(name: str, left: object, right: object) -> object:
        """`left (+ - * /) right`; bool gives way to integer, integer to float, as in NumPy.

        `name` is that of the function in `operator`.

        Paddle 2 converted the right operand to the left one's type instead, which cut logarithms to
        whole numbers in `RelaxBoundaryLoss`; that is not repeated.
        """
        if isinstance(left, _TENSOR) and isinstance(right, _TENSOR):
            if _rank(left) < _rank(right):
                left = left.astype(right.dtype)
            elif _rank(right) < _rank(left):
                right = right.astype(left.dtype)
            elif _rank(left) == 1 and left.dtype != right.dtype:
                left, right = left.astype("int64"), right.astype("int64")
        return getattr(operator, name)(left, right)

    @staticmethod
    def concat(x: Iterable[Tensor], axis: int = 0, **options: object) -> Tensor:
        """`paddle.concat`; 0-D tensors count as 1-D ones, integers of two sizes become int64."""
        x = [item.reshape([1]) if item.ndim == 0 else item for item in x]
        if {item.dtype for item in x} == {paddle.int32, paddle.int64}:
            x = [item.astype("int64") for item in x]
        return paddle.concat(x, axis, **options)

    @staticmethod
    def first(x: object) -> object:
        """`x[0]`; a 0-D tensor or array is its own first element."""
        if isinstance(x, (*_TENSOR, np.ndarray)) and x.ndim == 0:
            return x
        return x[0]

    @staticmethod
    def one_hot(x: Tensor, *args: object, **options: object) -> Tensor:
        """`F.one_hot`; whole numbers held as floats count as class numbers."""
        return F.one_hot(x.astype("int64"), *args, **options)


_OPERATIONS = "_ppvision_operations"  # the name under which repaired code finds `Operations`
_OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv"}


class _Rewriter(ast.NodeTransformer):
    """Send the faulty kinds of operation of a function through `Operations`."""

    def __init__(self) -> None:
        self.count = 0

    def _call(self, name: str, node: ast.AST, args: list, keywords: list | None = None) -> ast.Call:
        self.count += 1
        function = ast.Attribute(ast.Name(_OPERATIONS, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(function, args, keywords or []), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = _OPERATORS.get(type(node.op))
        if name is None:
            return node
        return self._call("arithmetic", node, [ast.Constant(name), node.left, node.right])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called in ("paddle.concat", "F.one_hot"):
            return self._call(called.split(".")[-1], node, node.args, node.keywords)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        index = node.slice
        if isinstance(node.ctx, ast.Load) and isinstance(index, ast.Constant) and index.value == 0:
            return self._call("first", node, [node.value])
        return node


def repaired_code(function: FunctionType) -> CodeType:
    """The code of `function` with its faulty kinds of operation sent through `Operations`.

    Raises:
        RuntimeError: its source is not at hand, or holds none of the operations.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise EngineError(
            f"{function.__module__}.{function.__qualname__} needs a repair on this Paddle, but its "
            "source is not installed. Install the package with its .py files."
        ) from error
    tree = ast.parse(source)
    tree.body[0].decorator_list = []
    rewriter = _Rewriter()
    repaired = ast.unparse(ast.fix_missing_locations(rewriter.visit(tree)))
    if not rewriter.count or function.__code__.co_freevars:
        raise EngineError(
            f"{function.__module__}.{function.__qualname__} fails on this Paddle in a way that its "
            "shim does not cover. Please report the versions that `ppvision doctor` prints."
        )
    # Tracebacks, and to_static when it exports, find the repaired source under this name.
    name = f"<{function.__module__}.{function.__qualname__}, repaired by ppvision>"
    linecache.cache[name] = (len(repaired), None, repaired.splitlines(keepends=True), name)
    module = compile(repaired, name, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    return code.replace(co_qualname=function.__code__.co_qualname)


@dataclass(frozen=True)
class Shim:
    """One repair.

    Attributes:
        target: `module:function` or `module:Class.method`.
        probe: runs the target on a tiny input and raises one of `FAULTS` where the fault is there.
    """

    target: str
    probe: Callable[[], object]

    def function(self) -> FunctionType:
        """The function that the shim repairs."""
        module, _, name = self.target.partition(":")
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        return inspect.unwrap(found)

    def fault_present(self) -> bool:
        """Whether the target fails as it now is.

        The user notices nothing of it: what the target warns about is not shown, and the stream of
        random numbers stays where it was.
        """
        random_state = paddle.get_rng_state()
        try:
            with warnings.catch_warnings(), paddle.no_grad():
                warnings.simplefilter("ignore")
                self.probe()
        except FAULTS:
            return True
        finally:
            paddle.set_rng_state(random_state)
        return False

    def put_in(self) -> Callable[[], None]:
        """Repair; returns what takes the repair out again."""
        function = self.function()
        code, before = repaired_code(function), function.__code__
        function.__globals__[_OPERATIONS] = Operations
        function.__code__ = code
        return functools.partial(setattr, function, "__code__", before)


class _Paddle:
    """Paddle, but for `concat`."""

    concat = staticmethod(Operations.concat)

    def __getattr__(self, name: str) -> object:
        return getattr(paddle, name)


@dataclass(frozen=True)
class ConcatShim(Shim):
    """`paddle.concat` of 0-D tensors in all modules of a package; `target` is its name."""

    def put_in(self) -> Callable[[], None]:
        modules = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith(f"{self.target}.") and getattr(module, "paddle", None) is paddle
        ]
        tolerant = _Paddle()
        for module in modules:
            module.paddle = tolerant

        def take_out() -> None:
            for module in modules:
                module.paddle = paddle

        return take_out


@dataclass(frozen=True)
class Replacement(Shim):
    """A function of a module, or a method of one of its classes, that makes way for another.

    Attributes:
        new: from the old function to the new one.
    """

    new: Callable[[Callable], Callable]

    def put_in(self) -> Callable[[], None]:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        old = getattr(owner, name)
        setattr(owner, name, functools.wraps(old)(self.new(old)))
        return functools.partial(setattr, owner, name, old)


_in_force: dict[str, Callable[[], None]] = {}  # how to take out each shim that is in force


def apply(shims: dict[str, Shim]) -> list[str]:
    """Apply those shims whose fault is present and return their names; twice is as once."""
    applied = []
    for name, shim in shims.items():
        if name not in _in_force and shim.fault_present():
            _in_force[name] = shim.put_in()
            applied.append(name)
    return applied


def remove(shims: dict[str, Shim]) -> list[str]:
    """Take out the shims that are in force and return their names."""
    removed = [name for name in shims if name in _in_force]
    for name in reversed(removed):
        _in_force.pop(name)()
    return removed


def active(shims: dict[str, Shim]) -> list[str]:
    """Names of the shims in force."""
    return [name for name in shims if name in _in_force]


def _loss(name: str, *inputs: Callable[[], object], **options: object) -> Callable[[], object]:
    """A probe that computes one of PaddleSeg's losses."""

    def probe() -> object:
        from paddleseg.cvlibs import manager

        return manager.LOSSES[name](**options)(*(make() for make in inputs))

    return probe


def _logits(*shape: int) -> Callable[[], Tensor]:
    return lambda: paddle.zeros(shape)


def _labels(*shape: int) -> Callable[[], Tensor]:
    return lambda: paddle.zeros(shape, "int64")


def _calculate_area() -> object:
    from paddleseg.utils.metrics import calculate_area

    return calculate_area(paddle.zeros([1, 2, 2], "int64"), paddle.zeros([1, 2, 2], "int64"), 2)


def _scalar_loss_indexed() -> object:
    # What train() does to the losses it logs; running it whole would write files.
    return paddle.zeros([2]).mean().numpy()[0]


def _sfnet_warp() -> object:
    from paddleseg.models.sfnet import AlignedModule

    return AlignedModule(2, 1)([paddle.zeros([1, 2, 2, 2])] * 2)


def _decoupled_warp() -> object:
    from paddleseg.models.decoupled_segnet import SqueezeBodyEdge

    return SqueezeBodyEdge(2)(paddle.zeros([1, 2, 4, 4]))


def _test_points() -> object:
    from paddleseg.models.pointrend import PointHead, calculate_uncertainty

    # The method reads one attribute, and building the whole head takes longer than the probe.
    head = SimpleNamespace(subdivision_num_points=paddle.to_tensor(1, dtype="int32"))
    return PointHead.get_points_test(head, paddle.zeros([1, 2, 2, 2]), calculate_uncertainty)


_LOSSES = "paddleseg.models.losses"
PADDLESEG_SHIMS = {
    "cross-entropy": Shim(
        f"{_LOSSES}.cross_entropy_loss:CrossEntropyLoss._post_process_loss",
        _loss("CrossEntropyLoss", _logits(1, 2, 1, 1), _labels(1, 1, 1)),
    ),
    "train-log": Shim("paddleseg.core.train:train", _scalar_loss_indexed),
    "calculate-area": Shim("paddleseg.utils.metrics:calculate_area", _calculate_area),
    "dual-task": Shim(
        f"{_LOSSES}.gscnn_dual_task_loss:DualTaskLoss.forward",
        _loss("DualTaskLoss", _logits(1, 2, 8, 8), _labels(1, 8, 8)),
    ),
    "ohem-cross-entropy": Shim(
        f"{_LOSSES}.ohem_cross_entropy_loss:OhemCrossEntropyLoss.forward",
        _loss("OhemCrossEntropyLoss", _logits(1, 2, 2, 2), _labels(1, 2, 2), min_kept=1),
    ),
    "ohem-edge-attention": Shim(
        f"{_LOSSES}.ohem_edge_attention_loss:OhemEdgeAttentionLoss.forward",
        _loss(
            "OhemEdgeAttentionLoss",
            lambda: (paddle.zeros([1, 2, 2, 2]), paddle.ones([1, 1, 2, 2])),
            _labels(1, 2, 2),
            min_kept=1,
        ),
    ),
    "point-cross-entropy": Shim(
        f"{_LOSSES}.point_cross_entropy_loss:PointCrossEntropyLoss.forward",
        _loss(
            "PointCrossEntropyLoss",
            lambda: (paddle.zeros([1, 2, 1]), paddle.zeros([1, 1, 2])),
            _labels(1, 2, 2),
        ),
    ),
    "relax-boundary": Shim(
        f"{_LOSSES}.decoupledsegnet_relax_boundary_loss:RelaxBoundaryLoss.custom_nll",
        _loss("RelaxBoundaryLoss", _logits(1, 2, 2, 2), _labels(1, 2, 2)),
    ),
    "rmi": Shim(
        f"{_LOSSES}.rmi_loss:RMILoss.forward_sigmoid",
        _loss("RMILoss", _logits(1, 2, 12, 12), _labels(1, 12, 12), num_classes=2),
    ),
    "sfnet": Shim("paddleseg.models.sfnet:AlignedModule.flow_warp", _sfnet_warp),
    "decoupled-segnet": Shim(
        "paddleseg.models.decoupled_segnet:SqueezeBodyEdge.flow_warp", _decoupled_warp
    ),
    "point-rend": Shim("paddleseg.models.pointrend:PointHead.get_points_test", _test_points),
}


# -- PaddleDetection -------------------------------------------------------------------------------


def _proposals() -> object:
    from ppdet.modeling.proposal_generator.rpn_head import RPNHead

    # The method reads two attributes, and building the whole head takes longer than the probe.
    box, one = paddle.zeros([1, 4]), paddle.ones([1])
    head = SimpleNamespace(training=False, export_onnx=False)
    head.test_proposal = lambda **_: (box, one, one, 1)
    inputs = {"im_shape": paddle.ones([2, 2])}
    return RPNHead._gen_proposal(head, [paddle.zeros([2, 1, 1, 1])], [box], [box], inputs)


def _atss() -> object:
    from ppdet.modeling.assigners.atss_assigner import ATSSAssigner

    boxes = paddle.to_tensor([[0.0, 0.0, 4.0, 4.0]])
    arguments = {"gt_labels": paddle.zeros([1, 1, 1], "int32"), "gt_bboxes": boxes.unsqueeze(0)}
    return ATSSAssigner(topk=1, num_classes=2)(
        boxes, [1], pad_gt_mask=paddle.ones([1, 1, 1]), bg_index=2, **arguments
    )


def _task_aligned() -> object:
    from ppdet.modeling.assigners.task_aligned_assigner import TaskAlignedAssigner

    boxes = paddle.to_tensor([[[0.0, 0.0, 4.0, 4.0]]])  # [B, boxes, 4]
    points = paddle.to_tensor([[2.0, 2.0]])
    return TaskAlignedAssigner(topk=1)(
        *(paddle.full([1, 1, 2], 0.5), boxes, points, [1]),
        *(paddle.zeros([1, 1, 1], "int32"), boxes, paddle.ones([1, 1, 1])),
        bg_index=2,
    )


def _masks_of_nothing() -> object:
    from ppdet.metrics import json_results

    return json_results.strip_mask(np.zeros((0, 2, 2), np.int32))


def _strip_mask(old: Callable) -> Callable:
    return lambda mask: old(mask) if len(mask) else mask


def _run_lengths() -> object:
    target = importlib.import_module("ppdet.modeling.proposal_generator.target")
    rle = {"size": [2, 2], "counts": [0, 4]}
    return target.rasterize_polygons_within_box(rle, np.float32([0, 0, 2, 2]), 2)


def _rasterize(old: Callable) -> Callable:
    from pycocotools import mask as coco

    def rasterize(segment: object, box: object, resolution: int) -> Tensor:
        if not isinstance(segment, dict):
            return old(segment, box, resolution)
        if isinstance(segment["counts"], list):
            segment = coco.frPyObjects(segment, *segment["size"])
        left, top, right, bottom = (float(edge) for edge in box)
        across = max(right - left, 0.1) / resolution  # pixels a cell
        down = max(bottom - top, 0.1) / resolution
        # From the middle of a cell to its place in the picture, whose pixel 0 has its middle at 0.
        place = [
            [across, 0, left + (across - 1) / 2],
            [0, down, top + (down - 1) / 2],
        ]
        cells = cv2.warpAffine(
            coco.decode(segment).astype(np.float32),
            np.float32(place),
            (resolution, resolution),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        )
        return paddle.to_tensor(cells >= 0.5, dtype="int32")

    return rasterize


def _graph_of_nms() -> None:
    ops = importlib.import_module("ppdet.modeling.ops")
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            boxes = paddle.static.data("boxes", [1, 2, 4])
            ops.multiclass_nms(boxes, paddle.static.data("scores", [1, 1, 2]), 0.1, 2, 2)
    finally:
        paddle.disable_static()


def _nms(old: Callable) -> Callable:
    def multiclass_nms(
        bboxes: Tensor,
        scores: Tensor,
        score_threshold: float,
        nms_top_k: int,
        keep_top_k: int,
        nms_threshold: float = 0.3,
        normalized: bool = True,
        nms_eta: float = 1.0,
        background_label: int = -1,
        return_index: bool = False,
        return_rois_num: bool = True,
        rois_num: Tensor | None = None,
        name: str | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        bounds = score_threshold, nms_top_k, keep_top_k, nms_threshold, normalized, nms_eta
        out, index, count = select_boxes(bboxes, scores, rois_num, *bounds, background_label)
        return out, count if return_rois_num else None, index if return_index else None

    # Outermost again what it was: Paddle does not look inside of such a function.
    @paddle.jit.not_to_static
    def choose(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (old if paddle.in_dynamic_mode() else multiclass_nms)(*args, **kwargs)

    return choose


def _assigned_nothing(name: str) -> Callable[[], object]:
    """A probe: a batch without objects, for one of PP-YOLOE's assigners."""

    def probe() -> object:
        boxes, none = paddle.zeros([2, 4]), paddle.zeros([1, 0, 4])
        nothing = {
            "gt_labels": paddle.zeros([1, 0, 1], "int32"),
            "gt_bboxes": none,
            "pad_gt_mask": paddle.zeros([1, 0, 1]),
        }
        module = importlib.import_module(f"ppdet.modeling.assigners.{name}_assigner")
        if name == "atss":
            found = module.ATSSAssigner(topk=1, num_classes=2)(boxes, [2], bg_index=2, **nothing)
        else:
            found = module.TaskAlignedAssigner(topk=1)(
                paddle.zeros([1, 2, 2]),
                boxes.unsqueeze(0),
                boxes[:, :2],
                [2],
                bg_index=2,
                **nothing,
            )
        _, _, _, positive = found
        return positive

    return probe


def _assign(old: Callable) -> Callable:
    """With the fourth result, which boxes are positive for which anchors, for no boxes as well."""

    def forward(self: object, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        found = old(self, *args, **kwargs)
        if len(found) == 4:
            return found
        batch, anchors = found[0].shape
        return *found, paddle.zeros([batch, 0, anchors])

    return forward


SMALLEST_REGION = 1e-2  # pixels: far below what a feature map tells apart


def _flat_region() -> object:
    from ppdet.modeling.heads.roi_extractor import RoIAlign

    align = RoIAlign(resolution=2, spatial_scale=1.0, aligned=True)
    regions = paddle.to_tensor([[3.0, 3.0, 3.0, 6.0]])
    found = align([paddle.zeros([1, 1, 8, 8])], [regions], paddle.to_tensor([1], "int32"))
    if paddle.isnan(found).any():
        raise InputError("a region without a width gives NaN")
    return found


def _align(old: Callable) -> Callable:
    """Regions with a width and a height: of those that have none, such as the proposal that stands
    for none, Paddle's kernel takes the mean of no points."""

    def forward(self: object, feats: list[Tensor], roi: list[Tensor], rois_num: Tensor) -> Tensor:
        regions = [
            paddle.concat([r[:, :2], paddle.maximum(r[:, 2:], r[:, :2] + SMALLEST_REGION)], axis=1)
            for r in roi
        ]
        return old(self, feats, regions, rois_num)

    return forward


def _masks_of_one_of_two() -> object:
    from ppdet.modeling.post_process import MaskPostProcess

    rows = paddle.to_tensor([[0, 0, 0, 0, 1, 1], [0, 0.9, 0, 0, 4, 4]], "float32")
    one = paddle.ones([2], "int32")
    found = MaskPostProcess()(paddle.ones([1, 2, 2]), rows, one, paddle.full([2, 2], 4))
    if found.shape[0] != 2:
        raise InputError("one mask for two rows")
    return found


def _masks(old: Callable) -> Callable:
    """A mask for each row: also for the row of score 0 that stands for a picture in which nothing
    was found."""

    def paste(
        self: object, mask_out: Tensor, bboxes: Tensor, bbox_num: Tensor, origin_shape: Tensor
    ) -> Tensor:
        rows = bboxes.shape[0]
        if not paddle.in_dynamic_mode() or mask_out.shape[0] == rows:
            return old(self, mask_out, bboxes, bbox_num, origin_shape)
        counts, scores = bbox_num.numpy().ravel(), bboxes[:, 1].numpy()
        ends = np.cumsum(counts)
        nothing = [end - 1 for end, n in zip(ends, counts, strict=True) if n == 1]
        real = np.setdiff1d(np.arange(rows), [row for row in nothing if scores[row] == 0])
        masks = paddle.zeros([rows, *mask_out.shape[1:]], mask_out.dtype)
        if len(real):
            masks = paddle.scatter(masks, paddle.to_tensor(real), mask_out)
        return old(self, masks, bboxes, bbox_num, origin_shape)

    return paste


PADDLEDET_SHIMS = {
    # PaddleDetection writes it into graphs of Paddle 2, which Paddle 3 no longer makes.
    "nms-in-graphs": Replacement("ppdet.modeling.ops:multiclass_nms", _graph_of_nms, _nms),
    "detection-concat": ConcatShim("ppdet", _proposals),
    "atss": Shim("ppdet.modeling.assigners.atss_assigner:ATSSAssigner.forward", _atss),
    "task-aligned": Shim(
        "ppdet.modeling.assigners.task_aligned_assigner:TaskAlignedAssigner.forward", _task_aligned
    ),
    # Not of Paddle 3, but PaddleDetection's own: pictures in which nothing is found, alone and
    # beside others, and masks as run lengths of single objects (COCO has them of crowds).
    "masks-of-nothing": Replacement(
        "ppdet.metrics.json_results:strip_mask", _masks_of_nothing, _strip_mask
    ),
    "masks-of-some": Replacement(
        "ppdet.modeling.post_process:MaskPostProcess.__call__", _masks_of_one_of_two, _masks
    ),
    # Samples without objects, which `allow_empty: true` lets into training.
    "atss-of-nothing": Replacement(
        "ppdet.modeling.assigners.atss_assigner:ATSSAssigner.forward",
        _assigned_nothing("atss"),
        _assign,
    ),
    "task-aligned-of-nothing": Replacement(
        "ppdet.modeling.assigners.task_aligned_assigner:TaskAlignedAssigner.forward",
        _assigned_nothing("task_aligned"),
        _assign,
    ),
    # Of Paddle: on a CPU, and only with `aligned`.
    "flat-regions": Replacement(
        "ppdet.modeling.heads.roi_extractor:RoIAlign.forward", _flat_region, _align
    ),
    "run-lengths": Replacement(
        "ppdet.modeling.proposal_generator.target:rasterize_polygons_within_box",
        _run_lengths,
        _rasterize,
    ),
}
