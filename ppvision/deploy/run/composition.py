"""Combine a float export's graph with the weights of one width of a layered model.

Paddle Inference reads weights from a file only (buffers crash it in Paddle 3.2), so the composed
ones are written to a temporary folder next to a link to the graph.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from ppvision.deploy.run.manifest import Manifest, list_file_names
from ppvision.errors import InputError
from ppvision.forms.paddle_private import read_parameters, write_parameters

if TYPE_CHECKING:
    from ppvision.quant.store.model import LayeredModel


def list_graph_parameters(program: Path) -> list[str]:
    """Return the names of the parameters of an exported graph, in the order of its file of
    weights."""
    found: list[str] = []

    def look(node: object) -> None:
        if isinstance(node, dict):
            if node.get("#") == "p":  # builtin.parameter
                found.append(node["A"][3])
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(json.loads(program.read_text(encoding="utf-8")))
    return sorted(found)


def compose(folder: Path, manifest: Manifest, layered: "LayeredModel", work: Path) -> None:
    """Write a layered model's weights into `work`, next to links to the graphs of a float export.

    Args:
        folder: of the export.
        manifest: the manifest of the export.
        layered: the layered model, loaded at the wanted width.
        work: an empty folder.

    Raises:
        ValueError: packed codes or ONNX in place of a float export; an export of another
            architecture or other classes, or one without names; a model that rounds activations,
            which a float graph does not.
    """
    if manifest.format != "paddle" or manifest.bits != 32 or not manifest.parameters:
        raise InputError(
            f"{folder}: expected a float export for Paddle Inference that names its parameters, "
            f"got {manifest.bits} bits, format {manifest.format}. Export again without --bits."
        )
    if layered.state.activations:
        raise InputError(
            "layered: its activations are quantised, which a float graph cannot do. Use the "
            "folder that `export --bits` wrote for this width."
        )
    theirs, ours = layered.config.get("classes") or [], manifest.classes
    if theirs and ours and list(theirs) != list(ours):
        raise InputError(
            f"layered: expected the classes of {folder}, {', '.join(ours[:8])}; got "
            f"{', '.join(map(str, theirs[:8]))}."
        )
    arrays, names = layered.state_dict, list_graph_parameters(folder / manifest.program)
    weights = manifest.model_files.weights_beside
    tensors = _read(folder / weights, names)
    wrong = []
    for name in names:
        path = manifest.parameters.get(name)
        if path is None:
            continue  # a constant of the graph, which training does not change
        shape = tensors[name].shape
        if path not in arrays or list(arrays[path].shape) != list(shape):
            wrong.append(f"{path} {list(shape)}")
        else:
            tensors[name] = paddle.to_tensor(arrays[path].astype(tensors[name].numpy().dtype))
    if wrong:
        raise InputError(
            f"layered: expected the tensors of {folder}, which is of another architecture; missing "
            f"or of another shape: {', '.join(wrong[:8])}."
        )
    write_parameters(work / weights, tensors)
    for name in list_file_names(manifest.model_files, manifest.earlier_format):
        if name != weights:
            (work / name).symlink_to((folder / name).resolve())


def _read(path: Path, names: list[str]) -> dict[str, paddle.Tensor]:
    tensors = {name: paddle.to_tensor(np.zeros(1, np.float32)) for name in names}
    read_parameters(path, tensors)
    return tensors
