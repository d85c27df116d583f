"""Readers for `tests/test_hostile_files.py`, which run in child processes (`helpers/limits.py`).

Each imports only what it runs: a process with Paddle takes longer to start than to read.
"""

import dataclasses
import hashlib
import importlib
import os
import pickle
import shutil
from pathlib import Path


def read_by_pickle(path: Path) -> object:
    data = path.read_bytes()
    return pickle.loads(data) if data else None


def check_config(path: Path) -> None:
    """All that is looked at before anything is built."""
    from ppvision.tasks import open_job

    for task in ("segmentation", "classification", "detection"):  # a mutation may name another
        importlib.import_module(f"ppvision.tasks.{task}.job")
    open_job(path)


def convert_tar(path: Path) -> None:
    from ppvision.data.convert.cifar10 import convert_cifar10

    convert_cifar10(path, path.parent / "out")


def read_layered(path: Path) -> None:
    """With the files of the whole model, whose chain of digests is made to fit the manifest."""
    from ppvision.quant import describe_layered, load_layered
    from ppvision.quant.store import model as module

    for other in Path(os.environ["PPVISION_TEST_LAYERED"]).iterdir():
        if other.name != "manifest.json":
            shutil.copy(other, path / other.name)
    str(describe_layered(path))
    parse = module.parse_manifest

    def parse_and_vouch(data: bytes, where: str):
        manifest = parse(data, where)
        files, content = {}, module.compute_digest(manifest.structure())
        for name in manifest.names(manifest.highest):
            if not (path / name).is_file():
                return manifest
            tensors = (path / name).read_bytes()
            content = module.compute_content_digest(content, module.parse_tensors(tensors, name))
            files[name] = module.FileEntry(
                len(tensors), hashlib.sha256(tensors).hexdigest(), content
            )
        return dataclasses.replace(manifest, files=files)

    module.parse_manifest = parse_and_vouch
    try:
        for bits in (None, 2):
            load_layered(path, bits).state_dict  # noqa: B018
    finally:
        module.parse_manifest = parse
