"""Non-maximum suppression (NMS) after a graph that ends before it."""

import numpy as np
import paddle

from ppvision.deploy.run.engines import Batch, PaddleRuntime
from ppvision.deploy.run.isolated import IsolatedRuntime
from ppvision.deploy.run.manifest import Nms
from ppvision.forms.paddle_private import select_boxes


class RuntimeWithNms:
    """Wraps a `PaddleRuntime` whose graph gives boxes and scores; this runtime gives the result of
    NMS.

    Args:
        runtime: its outputs are boxes `[B, M, 4]` and scores `[B, C, M]`.
        nms: the settings.
    """

    def __init__(self, runtime: PaddleRuntime | IsolatedRuntime, nms: Nms) -> None:
        self._runtime = runtime
        self._nms = nms

    def run(self, batch: Batch) -> list[np.ndarray]:
        """Like `PaddleRuntime.run`: return rows `[N, 6]` of class, score and box, and counts
        `[B]`."""
        boxes, scores = self._runtime.run(batch)
        return suppress(boxes, scores, self._nms)

    def close(self) -> None:
        """End the process of an isolated runtime."""
        if isinstance(self._runtime, IsolatedRuntime):
            self._runtime.close()


def suppress(boxes: np.ndarray, scores: np.ndarray, nms: Nms) -> list[np.ndarray]:
    """Apply NMS by Paddle's own operator, which other graphs contain.

    Args:
        boxes: `[B, M, 4]` of left, top, right, bottom, float32.
        scores: `[B, C, M]`, float32.
        nms: the settings.

    Returns:
        Rows `[N, 6]` of class, score and box, image by image, and the number of rows per image
        `[B]`.
    """
    no_limit = -1
    rows, _, counts = select_boxes(
        paddle.to_tensor(boxes, place=paddle.CPUPlace()),
        paddle.to_tensor(scores, place=paddle.CPUPlace()),
        None,
        nms.score_threshold,
        no_limit if nms.candidates is None else nms.candidates,
        no_limit if nms.kept is None else nms.kept,
        nms.iou_threshold,
        nms.normalized,
        1.0,
        -1 if nms.background is None else nms.background,
    )
    return [rows.numpy(), counts.numpy()]
