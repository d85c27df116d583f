"""Make a folder for `Predictor` from weights of the zoo.

The package contains a whole model in two parts: its graph without weights (`graph/`), and its
weights as a layered model. The first use combines both in the cache folder; nothing is traced or
exported.
"""

import gzip
import hashlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle

from ppvision.deploy.run.composition import list_graph_parameters
from ppvision.deploy.run.manifest import (
    NAME,
    describe_files,
    list_file_names,
    parse_manifest,
    read_manifest,
)
from ppvision.errors import FolderInUseError, InputError, PpvisionError, WeightsError
from ppvision.files import find_cache_folder, name_flag_errors, replace_folder
from ppvision.forms.paddle_private import write_parameters
from ppvision.zoo.cards import WeightsCard, find_card
from ppvision.zoo.stored import check_stored, read_stored

GRAPH = "graph"
PACKED = ".gz"  # suffix of a packed program; gzip reduces this text to a tenth
_WAIT = 120.0  # seconds to wait for another process, which takes about one


def compose_zoo_folder(name: str) -> Path | None:
    """Return the exported folder of a whole model of the zoo; compose it if it does not exist yet.

    Args:
        name: of weights in the zoo.

    Returns:
        A folder inside the cache folder; None for a name that the zoo does not have.

    Raises:
        ValueError: the weights have no graph: they are not those of a whole model.
        WeightsError: the package is damaged.
    """
    card = find_card(name)
    if card is None:
        return None
    graph = card.folder / GRAPH
    if not graph.is_dir():
        raise InputError(
            f"{name}: expected weights of a whole model, got those of {card.model}, which come "
            f"without a graph. Export it: create_model({card.model!r}, pretrained={card.tag!r}), "
            "export_model."
        )
    vouching = check_stored(card)
    folder = find_cache_folder() / "zoo" / f"{card.name}-{_key(graph, vouching)}"
    end = time.monotonic() + _WAIT
    while not _is_whole(folder):
        try:
            _compose(card, graph, folder)
        except FolderInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    return folder


def _key(graph: Path, vouching: Path) -> str:
    """Return a digest of the parts, so that another version of the package gets another folder."""
    digest = hashlib.sha256(vouching.read_bytes())
    for path in sorted(graph.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except PpvisionError:  # missing or damaged: it is composed again
        return False
    return True


def _compose(card: WeightsCard, graph: Path, folder: Path) -> None:
    manifest = parse_manifest((graph / NAME).read_text(encoding="utf-8"), str(graph / NAME))
    arrays = read_stored(card)
    flag = "PPVISION_CACHE"
    with name_flag_errors(flag, folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder(folder, lambda path: not _is_whole(path), "a damaged copy", flag) as work:
        final = work / "final"
        for path in graph.iterdir():
            if path.suffix == PACKED:
                (final / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            elif path.name != NAME:
                shutil.copy2(path, final / path.name)
        tensors = {}
        for parameter in list_graph_parameters(final / manifest.program):
            name = manifest.parameters.get(parameter)
            if name not in arrays:
                raise WeightsError(
                    f"{card.name}: expected weights of {parameter}, found none. Install ppvision "
                    "again."
                )
            tensors[parameter] = paddle.to_tensor(arrays[name].astype(np.float32))
        write_parameters(final / str(manifest.weights), tensors)
        names = list_file_names(manifest.model_files, manifest.earlier_format)
        replace(manifest, files=describe_files(final, names)).write(final)
