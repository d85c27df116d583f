"""Repairs of PaddleDetection 2.6 (the mechanism: `ppvision.plugins.shims.mechanism`)."""

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.errors import InputError
from ppvision.forms.paddle_private import select_boxes
from ppvision.plugins.shims.mechanism import ConcatShim, Fault, Replacement, Shim


def _fault(
    since: str, mended: str | None, place: str, code: str, reason: str, any_paddle: bool = False
) -> Fault:
    """Describe a fault of PaddleDetection from one tag until before another, by their sources;
    None: all versions up to the commit 666f597 of its branch develop."""
    ran = "run: 2.6.0 on paddlepaddle 3.2.2 and 3.3.1"
    paddle_3 = "; any paddlepaddle" if any_paddle else ""
    if mended is None:
        versions = f"paddledet {since} and later, up to 666f597 ({ran}{paddle_3})"
        until = "requirements.txt names a PaddleDetection after 666f597 whose function passes"
    else:
        versions = f"paddledet {since} and later, before {mended} ({ran}{paddle_3})"
        until = f"requirements.txt names PaddleDetection {mended} or later (PyPI ends at 2.6.0)"
    return Fault(place, code, reason, versions=versions, until=until)


_on_any_paddle = partial(_fault, any_paddle=True)


def _proposals() -> object:
    from ppdet.modeling.proposal_generator.rpn_head import RPNHead

    # The method reads only two attributes, and building the whole head takes longer than the probe.
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
        across = max(right - left, 0.1) / resolution  # pixels per cell
        down = max(bottom - top, 0.1) / resolution
        # From the centre of a cell to its place in the image; the centre of pixel 0 is at 0.
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

    # Keep the outermost decorator: Paddle does not look inside such a function.
    @paddle.jit.not_to_static
    def choose(*args: object, **kwargs: object) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # PaddleDetection's function works in eager mode and in graphs of the earlier format, for
        # OpenVINO.
        return (multiclass_nms if paddle.framework.in_pir_mode() else old)(*args, **kwargs)

    return choose


def _assigned_nothing(name: str) -> Callable[[], object]:
    """Make a probe: a batch without objects, for one of PP-YOLOE's assigners."""

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
    """Return also the fourth result, which boxes are positive for which anchors, for a batch
    without boxes."""

    def forward(self: object, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        found = old(self, *args, **kwargs)
        if len(found) == 4:
            return found
        batch, anchors = found[0].shape
        return *found, paddle.zeros([batch, 0, anchors])

    return forward


SMALLEST_REGION = 1e-2  # pixels: far below the resolution of a feature map


def _flat_region() -> object:
    from ppdet.modeling.heads.roi_extractor import RoIAlign

    align = RoIAlign(resolution=2, spatial_scale=1.0, aligned=True)
    regions = paddle.to_tensor([[3.0, 3.0, 3.0, 6.0]])
    found = align([paddle.zeros([1, 1, 8, 8])], [regions], paddle.to_tensor([1], "int32"))
    if paddle.isnan(found).any():
        raise InputError("a region without a width gives NaN")
    return found


def _align(old: Callable) -> Callable:
    """Give regions a width and a height. For a region without them, such as the proposal that
    represents "no object", Paddle's kernel takes the mean of no points."""

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
    """Give each row a mask, also the row of score 0 that represents an image without found
    objects."""

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


class _Twice(nn.Layer):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["image"] * 2


class _Config(dict):
    architecture = ""


def _exported_inputs() -> None:
    trainer = importlib.import_module("ppdet.engine.trainer")
    owner = SimpleNamespace(cfg=_Config(TestReader={}), model=_Twice())
    try:
        with mock.patch.object(trainer, "_dump_infer_config"):  # it writes a file
            found = trainer.Trainer._get_infer_cfg_and_input_spec(owner, "")
    except RuntimeError as error:  # main_program, if the graph is not whole
        raise InputError(str(error)) from error
    if set(found[1][0]) != {"image"}:
        raise InputError("inputs that the graph does not read")


def _used_inputs(input_spec: list[dict], program: object, _: object) -> list[dict]:
    """Return the inputs that an operator reads; a graph of Paddle 3 names each input in a separate
    operator."""
    used = {
        operator.attrs().get("name")
        for operator in program.global_block().ops
        if operator.name() == "pd_op.data" and not operator.result(0).use_empty()
    }
    return [{name: spec for name, spec in input_spec[0].items() if name in used}]


def _whole_graph(old: Callable) -> Callable:
    def prepare(self: object, *arguments: object, **options: object) -> tuple:
        trainer = importlib.import_module("ppdet.engine.trainer")
        whole = partial(paddle.jit.to_static, full_graph=True)
        with (
            mock.patch.object(paddle.jit, "to_static", whole),
            mock.patch.object(trainer, "_prune_input_spec", _used_inputs),
        ):
            return old(self, *arguments, **options)

    return prepare


_ASSIGNERS = "ppdet/modeling/assigners"
_MIXED = "Paddle 3 refuses arithmetic of int64 and int32"
_THREE = "without boxes it gives three results in the place of four"
PADDLEDET_SHIMS = {
    "graphs-of-exports": Replacement(
        "ppdet.engine.trainer:Trainer._get_infer_cfg_and_input_spec",
        _exported_inputs,
        _fault(
            "2.0.0",
            "666f597",
            "ppdet/engine/trainer.py:1127",
            "static_model = paddle.jit.to_static(",
            "Paddle 3 makes no whole graph unless full_graph=True asks for it, and "
            "_prune_input_spec looks for inputs as graphs of Paddle 2 have them",
        ),
        _whole_graph,
    ),
    "nms-in-graphs": Replacement(
        "ppdet.modeling.ops:multiclass_nms",
        _graph_of_nms,
        _fault(
            "2.0.0",
            "666f597",
            "ppdet/modeling/ops.py:612",
            "helper.append_op(",
            "writes the operator into graphs of Paddle 2, which Paddle 3 no longer makes",
        ),
        _nms,
    ),
    "detection-concat": ConcatShim(
        "ppdet",
        _proposals,
        _fault(
            "2.1.0",
            "2.7.0",
            "ppdet/modeling/proposal_generator/rpn_head.py:234",
            "paddle.concat(bs_rois_num_collect)",
            "0-D tensors in the place of those of shape [1], here and in many other modules",
        ),
    ),
    # 151 lines, and the next has 121, with one sum of int64 and int32 each. Their code is
    # rewritten, because a new function would be a copy.
    "atss": Shim(
        "ppdet.modeling.assigners.atss_assigner:ATSSAssigner.forward",
        _atss,
        _fault(
            "2.3.0",
            "666f597",
            f"{_ASSIGNERS}/atss_assigner.py:194",
            "batch_ind * num_max_boxes",
            _MIXED,
        ),
    ),
    "task-aligned": Shim(
        "ppdet.modeling.assigners.task_aligned_assigner:TaskAlignedAssigner.forward",
        _task_aligned,
        _fault(
            "2.3.0",
            "666f597",
            f"{_ASSIGNERS}/task_aligned_assigner.py:166",
            "batch_ind * num_max_boxes",
            _MIXED,
        ),
    ),
    # Images in which nothing is found, alone and together with others, and masks as run lengths of
    # single objects (COCO has them for crowds).
    "masks-of-nothing": Replacement(
        "ppdet.metrics.json_results:strip_mask",
        _masks_of_nothing,
        _on_any_paddle(
            "2.4.0",
            None,
            "ppdet/metrics/json_results.py:69",
            "mask[0, 0, :]",
            "there is no mask to index",
        ),
        _strip_mask,
    ),
    "masks-of-some": Replacement(
        "ppdet.modeling.post_process:MaskPostProcess.__call__",
        _masks_of_one_of_two,
        _on_any_paddle(
            "2.0.0",
            None,
            "ppdet/modeling/post_process.py:225",
            "num_mask = mask_out.shape[0]",
            "an image without objects has a row but no mask, so that later ones get others' masks",
        ),
        _masks,
    ),
    # Samples without objects, which `allow_empty: true` accepts in training.
    "atss-of-nothing": Replacement(
        "ppdet.modeling.assigners.atss_assigner:ATSSAssigner.forward",
        _assigned_nothing("atss"),
        _on_any_paddle(
            "2.6.0", "2.7.0", f"{_ASSIGNERS}/atss_assigner.py:129", "return assigned_labels", _THREE
        ),
        _assign,
    ),
    "task-aligned-of-nothing": Replacement(
        "ppdet.modeling.assigners.task_aligned_assigner:TaskAlignedAssigner.forward",
        _assigned_nothing("task_aligned"),
        _on_any_paddle(
            "2.6.0",
            "2.7.0",
            f"{_ASSIGNERS}/task_aligned_assigner.py:123",
            "return assigned_labels",
            _THREE,
        ),
        _assign,
    ),
    "flat-regions": Replacement(
        "ppdet.modeling.heads.roi_extractor:RoIAlign.forward",
        _flat_region,
        Fault(
            "ppdet/modeling/heads/roi_extractor.py:80",
            "paddle.vision.ops.roi_align(",
            "Paddle's kernel on a CPU divides by the area of a region, also by 0, with `aligned`",
            versions="paddlepaddle 3.2.2 and 3.3.1",
            until="requirements.txt names a Paddle whose kernel passes the probe",
        ),
        _align,
    ),
    "run-lengths": Replacement(
        "ppdet.modeling.proposal_generator.target:rasterize_polygons_within_box",
        _run_lengths,
        _on_any_paddle(
            "2.1.0",
            None,
            "ppdet/modeling/proposal_generator/target.py:303",
            "np.asarray(p, dtype=np.float64) for p in poly",
            "takes polygons only",
        ),
        _rasterize,
    ),
}
