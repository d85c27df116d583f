"""Run an exported graph like the programs of PaddleSeg, PaddleDetection and PaddleX.

They open Paddle Inference with their own settings, which we cannot change. On a CPU all of them use
oneDNN with all of its passes, and request the memory optimisation. This optimisation fails with a
`model.json`, unless the new executor is requested too (Paddle 3.2).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from paddle import inference

from ppvision.deploy.run.engines import Batch, fail_as
from ppvision.deploy.run.manifest import FILES
from ppvision.deploy.run.task_table import softmax
from ppvision.deploy.verify import parity
from ppvision.errors import EngineError, PpvisionError

# Parts of names of models that PaddleX runs without oneDNN (its `MKLDNN_BLOCKLIST`).
_WITHOUT_ONEDNN: tuple[str, ...] = ("RCNN", "MaskFormer", "Co-DINO-Swin", "Co-Deformable-DETR-Swin")
_WITHOUT_ONEDNN += ("Mask-RT-DETR-M", "Mask-RT-DETR-S")


def run_like_clients(
    program: Path, weights: Path, inputs: Sequence[Batch]
) -> list[list[np.ndarray]]:
    """Run a graph as `deploy/python/infer.py` of PaddleSeg and of PaddleDetection do on a CPU.

    Args:
        program: `model.pdmodel`.
        weights: its parameters.
        inputs: batches, or a detector's inputs by name.

    Returns:
        The outputs for each input.

    Raises:
        EngineError: the graph does not load or run.
    """
    config = inference.Config(str(program), str(weights))
    return _run(config, inputs, "a client of PaddleSeg or PaddleDetection")


def run_like_paddlex(folder: Path, inputs: Sequence[Batch], name: str) -> list[list[np.ndarray]]:
    """Run the `model.json` of an export as PaddleX 3.7 does on a CPU.

    Args:
        folder: of the export.
        inputs: as of `run_like_clients`.
        name: the model's name in PaddleX.

    Returns and raises: as `run_like_clients`.
    """
    files = FILES["paddle"]
    config = inference.Config(str(folder / files.program), str(folder / files.weights_beside))
    if any(part in name for part in _WITHOUT_ONEDNN):
        config.disable_mkldnn()
    else:
        config.enable_mkldnn()
    config.enable_new_ir(True)
    config.enable_new_executor()
    config.set_optimization_level(3)
    return _run(config, inputs, "PaddleX")


def _run(config: inference.Config, inputs: Sequence[Batch], reader: str) -> list[list[np.ndarray]]:
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_memory_optim()
    with fail_as(f"The graph does not run as {reader} runs it on a CPU"):
        engine = inference.create_predictor(config)
        names = engine.get_input_names()
        outputs = []
        for batch in inputs:
            for name in names:
                array = batch if isinstance(batch, np.ndarray) else batch[name]
                handle = engine.get_input_handle(name)
                handle.reshape(array.shape)
                handle.copy_from_cpu(np.ascontiguousarray(array))
            engine.run()
            handles = [engine.get_output_handle(name) for name in engine.get_output_names()]
            outputs.append([handle.copy_to_cpu() for handle in handles])
    return outputs


def check_in_paddlex(
    probes: Sequence[tuple[np.ndarray, list[np.ndarray]]],
    folder: Path,
    output_op: str,
    tolerance: float,
    config: Mapping[str, Mapping[str, str]],
) -> None:
    """Compare the graph, run like PaddleX, with the model.

    Args:
        probes: inputs, and the model's logits in eager mode.
        folder: of the export.
        output_op: "argmax" or "softmax".
        tolerance: the bound of `parity`.
        config: `inference.yml`.

    Raises:
        EngineError: the graph does not run, or gives other numbers; the message gives advice.
    """
    name = config["Global"]["model_name"]
    try:
        found = run_like_paddlex(folder, [x for x, _ in probes], name)
        for (x, (logits, *_)), outputs in zip(probes, found, strict=True):
            where = f"As PaddleX runs it, input {list(x.shape)}"
            if output_op == "argmax":
                parity.check_classes(logits, outputs[0], tolerance, where)
            else:
                parity.check_close([softmax(logits)], outputs, tolerance, where)
    except PpvisionError as error:
        raise unfit_for_paddlex(error, name) from error


def unfit_for_paddlex(error: PpvisionError, name: str) -> EngineError:
    """Return `error` with advice."""
    advice = "Export with free sizes (--input_shape None 3 None None), or without --for paddlex."
    if not any(part in name for part in _WITHOUT_ONEDNN):
        advice += (
            f" PaddleX runs {name} with oneDNN; for segmentation it runs --paddlex_name "
            "MaskFormer_small without."
        )
    return EngineError(f"{error} {advice}")
