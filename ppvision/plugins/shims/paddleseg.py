"""Repairs of PaddleSeg 2.8 on Paddle 3 (the mechanism: `ppvision.plugins.shims.mechanism`)."""

from collections.abc import Callable
from types import SimpleNamespace

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ppvision.errors import InputError
from ppvision.plugins.shims.mechanism import Fault, Replacement, Shim


def _fault(since: str, mended: str | None, place: str, code: str, reason: str) -> Fault:
    """Describe a fault of PaddleSeg from one tag until before another, by their sources; None: all
    versions up to the commit d7975e7 of its branch develop."""
    ran = "run: 2.8.0 on paddlepaddle 3.2.2 and 3.3.1"
    if mended is None:
        versions = f"paddleseg {since} and later, up to d7975e7 ({ran})"
        until = "requirements.txt names a PaddleSeg after d7975e7 whose function passes the probe"
    else:
        versions = f"paddleseg {since} and later, before {mended} ({ran})"
        until = f"requirements.txt names PaddleSeg {mended} (so far a tag; PyPI ends at 2.8.0)"
    return Fault(place, code, reason, versions=versions, until=until)


# Strict type promotion: Paddle 2 converted the right operand to the type of the left one.
_MIXED = "Paddle 3 refuses arithmetic of integers and floats"
# `.sum()` and `x[0]` give 0-D tensors, where Paddle 2 gave `[1]`.
_ZERO_D = "a 0-D tensor or array in the place of one of shape [1]"

# -- probes ----------------------------------------------------------------------------------------


def _loss(name: str, *inputs: Callable[[], object], **options: object) -> Callable[[], object]:
    """Make a probe that computes one of PaddleSeg's losses."""

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
    # train() does this with the losses that it logs; running all of train() would write files.
    return paddle.zeros([2]).mean().numpy()[0]


def _sfnet_warp() -> object:
    from paddleseg.models.sfnet import AlignedModule

    return AlignedModule(2, 1)([paddle.zeros([1, 2, 2, 2])] * 2)


def _decoupled_warp() -> object:
    from paddleseg.models.decoupled_segnet import SqueezeBodyEdge

    return SqueezeBodyEdge(2)(paddle.zeros([1, 2, 4, 4]))


def _test_points() -> object:
    from paddleseg.models.pointrend import PointHead, calculate_uncertainty

    # The method reads only one attribute, and building the whole head takes longer than the probe.
    head = SimpleNamespace(subdivision_num_points=paddle.to_tensor(1, dtype="int32"))
    return PointHead.get_points_test(head, paddle.zeros([1, 2, 2, 2]), calculate_uncertainty)


# -- new functions ---------------------------------------------------------------------------------


def _count_areas(_: Callable) -> Callable:
    def calculate_area(
        pred: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels of each class `[num_classes]`: in both, predicted, in the label."""
        pred, label = (x.squeeze(1) if x.ndim == 4 else x for x in (pred, label))
        if pred.shape != label.shape:
            raise InputError(
                f"pred: expected the label's shape {list(label.shape)}, got {list(pred.shape)}."
            )
        areas, valid = [], label != ignore_index
        for number in range(num_classes):
            found, meant = paddle.logical_and(pred == number, valid), label == number
            both = paddle.logical_and(found, meant)
            areas.append(paddle.stack([x.astype("int64").sum() for x in (both, found, meant)]))
        both, found, meant = paddle.stack(areas, axis=1).unbind(0)  # [3, num_classes]
        return both, found, meant

    return calculate_area


def _warp(_: Callable) -> Callable:
    # Tracing would find the old function behind the decorator of a replacement.
    @paddle.jit.not_to_static
    def flow_warp(self: object, input: Tensor, flow: Tensor, size: Tensor) -> Tensor:
        """Sample `input` `[B, C, h, w]` at the places of `flow` `[B, 2, H, W]`, in pixels; `size`
        `[2]` is H and W."""
        height, width = size[0], size[1]
        down = paddle.linspace(-1.0, 1.0, height).reshape([-1, 1]).tile([1, width])
        across = paddle.linspace(-1.0, 1.0, width).reshape([1, -1]).tile([height, 1])
        grid = paddle.stack([across, down], axis=2)  # [H, W, 2]
        pixels = size[::-1].reshape([1, 1, 1, -1]).astype(flow.dtype)
        return F.grid_sample(input, grid + flow.transpose([0, 2, 3, 1]) / pixels)

    return flow_warp


def _choose_points(_: Callable) -> Callable:
    @paddle.jit.not_to_static  # see `_warp`
    def get_points_test(
        self: object, seg_logits: Tensor, uncertainty_func: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return places `[B, points]` of the most uncertain pixels, and their centres `[B, points,
        2]` from 0 to 1."""
        uncertainty = uncertainty_func(seg_logits)  # [B, 1, H, W]
        shape = paddle.shape(uncertainty)
        height, width = shape[2], shape[3]
        wanted = self.subdivision_num_points.reshape([]).astype(shape.dtype)
        count = paddle.minimum(height * width, wanted)
        _, places = paddle.topk(uncertainty.flatten(1), count, axis=1)
        across = ((places % width).astype("float32") + 0.5) / width.astype("float32")
        down = ((places // width).astype("float32") + 0.5) / height.astype("float32")
        return places, paddle.stack([across, down], axis=2)

    return get_points_test


def _masked_probabilities(_: Callable) -> Callable:
    def forward_sigmoid(
        self: object, logits_4D: Tensor, labels_4D: Tensor, do_rmi: bool = False
    ) -> Tensor:
        """Compute the loss of logits `[B, K, H, W]` and labels `[B, H, W]`; both are 0 for ignored
        pixels."""
        least = 1e-6  # PaddleSeg's _CLIP_MIN
        mask = (labels_4D != self.ignore_index).astype("int64")
        shown = mask.astype(logits_4D.dtype)
        labels = F.one_hot(labels_4D.astype("int64") * mask, self.num_classes)  # [B, H, W, K]
        labels = (labels * shown.unsqueeze(3)).transpose([0, 3, 1, 2])
        labels.stop_gradient = True
        probabilities = F.sigmoid(logits_4D) * shown.unsqueeze(1) + least
        return self.rmi_lower_bound(labels, probabilities)

    return forward_sigmoid


def _nll(old: Callable) -> Callable:
    def custom_nll(
        self: object, logit: Tensor, label: Tensor, *args: object, **options: object
    ) -> Tensor:
        return old(self, logit, label.astype(logit.dtype), *args, **options)

    return custom_nll


# -- the shims -------------------------------------------------------------------------------------

_LOSSES = "paddleseg.models.losses"
_FILES = "paddleseg/models/losses"
# Each `Shim` rewrites the code of a function. A new function in its place would be a copy of
# PaddleSeg's, long as that is, for one expression in its middle.
PADDLESEG_SHIMS = {
    # 52 lines for weights, masks and hard pixels; `mask * coef` and `label * mask` fail.
    "cross-entropy": Shim(
        f"{_LOSSES}.cross_entropy_loss:CrossEntropyLoss._post_process_loss",
        _loss("CrossEntropyLoss", _logits(1, 2, 1, 1), _labels(1, 1, 1)),
        _fault("2.2.0", "2.9.1", f"{_FILES}/cross_entropy_loss.py:133", "mask * coef", _MIXED),
    ),
    # The whole training, 339 lines; the line that logs two losses fails.
    "train-log": Shim(
        "paddleseg.core.train:train",
        _scalar_loss_indexed,
        _fault("2.0.0", "2.9.0", "paddleseg/core/train.py:273", "l[0] / log_iters", _ZERO_D),
    ),
    "calculate-area": Replacement(
        "paddleseg.utils.metrics:calculate_area",
        _calculate_area,
        _fault(
            "2.0.0", "2.9.0", "paddleseg/utils/metrics.py:57", "paddle.concat(pred_area)", _ZERO_D
        ),
        _count_areas,
    ),
    # 41 lines: the masks of logits, labels and of the loss fail, the rest is unchanged.
    "dual-task": Shim(
        f"{_LOSSES}.gscnn_dual_task_loss:DualTaskLoss.forward",
        _loss("DualTaskLoss", _logits(1, 2, 8, 8), _labels(1, 8, 8)),
        _fault("2.0.0", "2.9.1", f"{_FILES}/gscnn_dual_task_loss.py:110", "logit * mask", _MIXED),
    ),
    # 59 lines that select hard pixels; one sum in the middle fails.
    "ohem-cross-entropy": Shim(
        f"{_LOSSES}.ohem_cross_entropy_loss:OhemCrossEntropyLoss.forward",
        _loss("OhemCrossEntropyLoss", _logits(1, 2, 2, 2), _labels(1, 2, 2), min_kept=1),
        _fault(
            "2.0.0",
            "2.9.1",
            f"{_FILES}/ohem_cross_entropy_loss.py:68",
            "prob + (1 - valid_mask)",
            _MIXED,
        ),
    ),
    # Like the previous one, 67 lines.
    "ohem-edge-attention": Shim(
        f"{_LOSSES}.ohem_edge_attention_loss:OhemEdgeAttentionLoss.forward",
        _loss(
            "OhemEdgeAttentionLoss",
            lambda: (paddle.zeros([1, 2, 2, 2]), paddle.ones([1, 1, 2, 2])),
            _labels(1, 2, 2),
            min_kept=1,
        ),
        _fault(
            "2.0.0",
            "2.9.1",
            f"{_FILES}/ohem_edge_attention_loss.py:84",
            "prob + (1 - valid_mask)",
            _MIXED,
        ),
    ),
    # 68 lines, most of them about points; the mean of the weights fails.
    "point-cross-entropy": Shim(
        f"{_LOSSES}.point_cross_entropy_loss:PointCrossEntropyLoss.forward",
        _loss(
            "PointCrossEntropyLoss",
            lambda: (paddle.zeros([1, 2, 1]), paddle.zeros([1, 1, 2])),
            _labels(1, 2, 2),
        ),
        _fault(
            "2.3.0", "2.9.1", f"{_FILES}/point_cross_entropy_loss.py:115", "mask * coef", _MIXED
        ),
    ),
    "relax-boundary": Replacement(
        f"{_LOSSES}.decoupledsegnet_relax_boundary_loss:RelaxBoundaryLoss.custom_nll",
        _loss("RelaxBoundaryLoss", _logits(1, 2, 2, 2), _labels(1, 2, 2)),
        _fault(
            "2.0.0",
            "2.9.1",
            f"{_FILES}/decoupledsegnet_relax_boundary_loss.py:84",
            "soft * label",
            _MIXED,
        ),
        _nll,
    ),
    "rmi": Replacement(
        f"{_LOSSES}.rmi_loss:RMILoss.forward_sigmoid",
        _loss("RMILoss", _logits(1, 2, 12, 12), _labels(1, 12, 12), num_classes=2),
        _fault(
            "2.3.0",
            "2.9.1",
            f"{_FILES}/rmi_loss.py:104",
            "valid_onehot_labels_4D * paddle.unsqueeze(",
            _MIXED,
        ),
        _masked_probabilities,
    ),
    "sfnet": Replacement(
        "paddleseg.models.sfnet:AlignedModule.flow_warp",
        _sfnet_warp,
        _fault("2.1.0", "2.9.1", "paddleseg/models/sfnet.py:222", "/ norm", _MIXED),
        _warp,
    ),
    "decoupled-segnet": Replacement(
        "paddleseg.models.decoupled_segnet:SqueezeBodyEdge.flow_warp",
        _decoupled_warp,
        _fault("2.0.0", "2.9.1", "paddleseg/models/decoupled_segnet.py:229", "/ norm", _MIXED),
        _warp,
    ),
    "point-rend": Replacement(
        "paddleseg.models.pointrend:PointHead.get_points_test",
        _test_points,
        _fault(
            "2.4",
            None,
            "paddleseg/models/pointrend.py:429",
            "paddle.concat([height * width, num_points]",
            _ZERO_D,
        ),
        _choose_points,
    ),
}
