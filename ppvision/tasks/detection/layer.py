"""Wrap a PaddleDetection architecture as a layer of tensors, for export."""

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
    """A detector that returns its result, and the input of NMS.

    Args:
        model: an architecture of PaddleDetection whose boxes pass through one NMS.

    Attributes:
        model: the argument.
        bounds: limits of its NMS.

    Raises:
        ConfigError: there is no NMS, or several.
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
        self._owner = [owners[0]]  # in a list, so that it is not a sublayer twice
        nms = owners[0].nms
        self.bounds = Bounds(
            score=max(nms.score_threshold, getattr(nms, "post_threshold", 0.0)),
            overlap=getattr(nms, "nms_threshold", 1.0),
            count=nms.keep_top_k,
        )

    def with_model(self, model: nn.Layer) -> "DetectorLayer":
        """Return the same layer around another model of the architecture."""
        return DetectorLayer(model)

    @paddle.no_grad()
    def choose(self, boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """Apply its NMS to boxes and scores; return rows `[N, 6]` and counts `[B]`."""
        rows, counts, *_ = self._owner[0].nms(paddle.to_tensor(boxes), paddle.to_tensor(scores))
        return [rows.numpy(), counts.numpy()]

    def forward(self, image: Tensor, im_shape: Tensor, scale_factor: Tensor) -> list[Tensor]:
        """Return rows `[N, 6]` of class, score and box, counts `[B]`, masks `[N, H, W]` if there
        are any; then boxes and scores before NMS (`ppvision.deploy.verify.detection_parity`)."""
        with _Listening(self._owner[0]) as seen:
            found = self.model({"image": image, "im_shape": im_shape, "scale_factor": scale_factor})
        kept = [found[key] for key in ("bbox", "bbox_num", "mask") if key in found]
        boxes, scores = seen
        return [*kept, boxes, scores]

    @contextmanager
    def in_graphs(self) -> Iterator[None]:
        """In the block, two-stage detectors use PaddleDetection's code for ONNX: one image, without
        a loop over images, and a box of score 0 after the found boxes."""
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
    """Yield attributes of a layer that are not layers, such as NMS, and their attributes."""
    for part in vars(layer).values():
        if type(part).__module__.startswith("ppdet."):
            yield part
            yield from (p for p in vars(part).values() if type(p).__module__.startswith("ppdet."))


def _one_count(head: nn.Layer, inputs: object, outputs: tuple) -> tuple:
    """Return the number of proposals as `[1]`; the code for ONNX gives `[]`."""
    rois, count, losses = outputs
    return rois, count.reshape([1]), losses


class _Listener:
    """NMS that records its inputs."""

    def __init__(self, nms: Any) -> None:
        self.nms = nms
        self.seen: list[Tensor] = []

    @paddle.jit.not_to_static
    def __call__(self, boxes: Tensor | Sequence[Tensor], scores: Tensor, *others: object) -> object:
        # Two-stage detectors give the boxes with their numbers per image.
        self.seen += [boxes[0] if isinstance(boxes, tuple) else boxes, scores]
        return self.nms(boxes, scores, *others)


class _Listening:
    """In the block, the owner's NMS records its boxes and scores in the yielded list. (This is a
    class, because Paddle's tracing warns of `contextmanager`.)"""

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
