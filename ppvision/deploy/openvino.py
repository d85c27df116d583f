"""The graph for Paddle Inference's OpenVINO engine, beside the one for oneDNN.

Paddle's wheels for x86 hold OpenVINO's CPU plugin, and Paddle Inference hands a whole graph to it
(`Config.enable_openvino_engine`). It reads Paddle's earlier program format alone, `model.pdmodel`;
the weights are those of `model.pdiparams`, byte for byte. So an export holds the graph twice and
its weights once.

Only graphs that have something to gain are written: float weights, known height and width, and
Pale blocks in the form for tokens (`ppvision.deploy.token_form`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import paddle
from paddle import Tensor, nn
from paddle.base.layer_helper import LayerHelper
from paddle.pir_utils import DygraphOldIrGuard
from paddle.static import InputSpec

from ppvision.deploy.graph import INPUT_NAME, ModelGraph
from ppvision.deploy.manifest import OPENVINO_PROGRAM
from ppvision.deploy.runtime import in_one_line
from ppvision.deploy.token_form import token_form
from ppvision.quant.packed_layers import packed_bits


class _Deployed(nn.Layer):
    """Of a graph's outputs those that are deployed: every one, or the last alone."""

    def __init__(self, graph: ModelGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.graph(x)
        return outputs if self.graph.every_output else outputs[-1:]


def write_openvino_program(
    model: nn.Layer,
    input_shape: Sequence[int | None],
    output_op: str,
    folder: Path,
    *,
    every_output: bool,
) -> bool:
    """Write `model.pdmodel` beside an export's `model.pdiparams`, where OpenVINO has to gain by it.

    Args:
        model: in evaluation mode.
        input_shape: of the graph, `[B, C, H, W]`.
        output_op: "argmax", "softmax" or "none"; the graph's only output, unless `every_output`.
        folder: holds `model.pdiparams` of the same model.
        every_output: all that the model gives.

    Returns:
        Whether it was written: not for packed codes, free height or width, or without Pale blocks.

    Raises:
        RuntimeError: the model cannot be traced in the earlier format, or its weights come out in
            another order; the cause is attached. Nothing new stands in the folder.
    """
    if packed_bits(model) != 32:
        return False
    with token_form(model, input_shape) as blocks:
        if not blocks:
            return False
        graph = _Deployed(ModelGraph(model, output_op, every_output))
        graph.eval()
        spec = InputSpec(list(input_shape), "float32", name=INPUT_NAME)
        prefix = folder / "openvino"
        try:
            with _earlier_format():
                graph = paddle.jit.to_static(graph, input_spec=[spec], full_graph=True)
                paddle.jit.save(graph, str(prefix))
            weights = (folder / "model.pdiparams").read_bytes()
            if prefix.with_suffix(".pdiparams").read_bytes() != weights:
                raise ValueError("the weights of the two formats differ")
            prefix.with_suffix(".pdmodel").replace(folder / OPENVINO_PROGRAM)
        except Exception as error:  # whatever tracing raises
            raise RuntimeError(
                f"The model has no graph for OpenVINO ({in_one_line(error)})."
            ) from error
        finally:
            for path in folder.glob(f"{prefix.name}.*"):
                path.unlink()
    return True


@contextmanager
def _earlier_format() -> Iterator[None]:
    """Tracing gives a program in the format of before PIR."""
    # Paddle 3.2 moved this function to C++, where it lost the earlier format.
    before = paddle.matmul
    with DygraphOldIrGuard():
        paddle.matmul = _matmul
        try:
            yield
        finally:
            paddle.matmul = before


def _matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: bool = False,
    transpose_y: bool = False,
    name: str | None = None,
) -> Tensor:
    """`paddle.matmul` as an operator of a program in the earlier format."""
    helper = LayerHelper("matmul_v2", name=name)
    out = helper.create_variable_for_type_inference(dtype=x.dtype)
    helper.append_op(
        type="matmul_v2",
        inputs={"X": x, "Y": y},
        outputs={"Out": out},
        attrs={"trans_x": transpose_x, "trans_y": transpose_y},
    )
    return out
