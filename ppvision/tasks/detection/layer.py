"""A PaddleDetection architecture as a layer of tensors, for export."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.deploy.verify.detection_parity import Bounds
from ppvision.tasks.config import ConfigError

# isort: split
from ppdet.modeling.proposal_generator.rpn_head import RPNHead


class DetectorLayer(nn.Layer):
    """A detector that gives what it found, and what NMS chose from.

    Args:
        model: an architecture of PaddleDetection's whose boxes go through one NMS.

    Attributes:
        model: the same.
        bounds: of its NMS.

    Raises:
        ConfigError: no NMS, or several.
    """

    def __init__(self, model: nn.Layer) -> None:
        super().__init__()
        self.model = model
        owners = list(_owners_of_nms(model))
        if len({id(owner.nms) for owner in owners}) != 1:
            raise ConfigError(
                f"export: expected an architecture with one NMS, found {len(owners)} in "
                f"{type(model).__name__}."
            )
        self._owner = [owners[0]]  # in a list: a layer would become a sublayer a second time
        nms = owners[0].nms
        self.bounds = Bounds(
            score=max(nms.score_threshold, getattr(nms, "post_threshold", 0.0)),
            overlap=getattr(nms, "nms_threshold", 1.0),
            count=nms.keep_top_k,
        )

    def with_model(self, model: nn.Layer) -> "DetectorLayer":
        """The same around another model of the architecture."""
        return DetectorLayer(model)

    @paddle.no_grad()
    def choose(self, boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """What its NMS keeps of boxes and scores: rows `[N, 6]` and counts `[B]`."""
        rows, counts, *_ = self._owner[0].nms(paddle.to_tensor(boxes), paddle.to_tensor(scores))
        return [rows.numpy(), counts.numpy()]

    def forward(self, image: Tensor, im_shape: Tensor, scale_factor: Tensor) -> list[Tensor]:
        """Rows `[N, 6]` of class, score and box, counts `[B]`, masks `[N, H, W]` where there are
        any; then boxes and scores before NMS (`ppvision.deploy.verify.detection_parity`)."""
        with _Listening(self._owner[0]) as seen:
            found = self.model({"image": image, "im_shape": im_shape, "scale_factor": scale_factor})
        kept = [found[key] for key in ("bbox", "bbox_num", "mask") if key in found]
        boxes, scores = seen
        return [*kept, boxes, scores]

    @contextmanager
    def in_graphs(self) -> Iterator[None]:
        """Inside, detectors of two stages take the way that PaddleDetection has for ONNX: one
        image, without a loop over images, and a box of score 0 after those that were found."""
        parts = [
            part
            for layer in self.model.sublayers(include_self=True)
            for part in (layer, *_plain_parts(layer))
            if getattr(part, "export_onnx", None) is False
        ]
        heads = [layer for layer in self.model.sublayers() if isinstance(layer, RPNHead)]
        hooks = [head.register_forward_post_hook(_one_count) for head in heads]
        for part in parts:
            part.export_onnx = True
        try:
            yield
        finally:
            for part in parts:
                part.export_onnx = False
            for hook in hooks:
                hook.remove()


def _plain_parts(layer: nn.Layer) -> Iterator[Any]:
    """What a layer holds that is no layer, such as NMS, and what that holds."""
    for part in vars(layer).values():
        if type(part).__module__.startswith("ppdet."):
            yield part
            yield from (p for p in vars(part).values() if type(p).__module__.startswith("ppdet."))


def _one_count(head: nn.Layer, inputs: object, outputs: tuple) -> tuple:
    """The number of proposals `[1]`, which that way leaves as a single number `[]`."""
    rois, count, losses = outputs
    return rois, count.reshape([1]), losses


class _Listener:
    """NMS that notes what it is given."""

    def __init__(self, nms: Any) -> None:
        self.nms = nms
        self.seen: list[Tensor] = []

    @paddle.jit.not_to_static
    def __call__(self, boxes: Tensor | Sequence[Tensor], scores: Tensor, *others: object) -> object:
        # Detectors of two stages give the boxes with their numbers by image.
        self.seen += [boxes[0] if isinstance(boxes, tuple) else boxes, scores]
        return self.nms(boxes, scores, *others)


class _Listening:
    """Inside, the owner's NMS notes its boxes and scores in the list that this gives. (A class:
    Paddle's tracing warns of `contextmanager`.)"""

    def __init__(self, owner: Any) -> None:
        self.owner, self.nms = owner, owner.nms

    def __enter__(self) -> list[Tensor]:
        self.owner.nms = _Listener(self.nms)
        return self.owner.nms.seen

    def __exit__(self, *error: object) -> None:
        self.owner.nms = self.nms


def _owners_of_nms(model: nn.Layer) -> Iterator[Any]:
    for layer in model.sublayers(include_self=True):
        for owner in (layer, *_plain_parts(layer)):
            if hasattr(getattr(owner, "nms", None), "score_threshold"):
                yield owner
