"""Write a model's weights as the zoo keeps them: a layered model, its graph, its card.

    python benchmark/zoo_weights.py CONFIG WEIGHTS --card CARD.json --bits 8 6 4 \\
        [--opts val_dataset.dataset_root=...]
    python benchmark/zoo_weights.py CONFIG ARCHITECTURE.TAG

The second command makes only the graph of weights of the zoo anew, after a change of the exporter.
CARD.json is a card without `file`, `sha256` and `config` (`ppvision.zoo.cards`), with the `licence`
of the weights where it is not Apache-2.0. The weights are quantised as they are, without any
training. The graph is that of an export without its parameters: of a classifier for pictures of its
own size, with probabilities; of a detector for the one size to which its TestReader resizes every
picture, where the places of boxes are constants and OpenVINO runs it; of others for pictures of any
size. Writes ppvision/zoo/weights/ARCHITECTURE.TAG. The names of the classes come from the config's
data.
"""

import argparse
import gzip
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from ppvision.environment import prefer_fast_mkl

prefer_fast_mkl()  # before Paddle starts

import numpy as np

from ppvision.deploy.run.composition import list_graph_parameters
from ppvision.deploy.run.manifest import Manifest, read_manifest
from ppvision.deploy.run.zoo_folder import GRAPH, PACKED
from ppvision.files import create_folder, write_text
from ppvision.tasks import open_job
from ppvision.tasks.job import Job
from ppvision.tasks.multibit.packing import pack_checkpoint
from ppvision.zoo.cards import CARD, WEIGHTS_FOLDER, PretrainedConfig, WeightsCard

MANIFEST = "manifest.json"


def write_zoo_weights(
    config: Path,
    weights: str | Path,
    facts: dict,
    *,
    bits: list[int],
    side: int,
    options: list[str],
    output: Path,
) -> Path:
    """Write a folder of the zoo.

    Args:
        config: of the model's training.
        weights: float ones.
        facts: of its card: all but `file`, `sha256` and `config`; and `licence`.
        bits: widths, the highest first.
        side: of the pictures that it was trained on; configs of classifiers and detectors say it.
        options: `--opts` for the config.
        output: folder in which that of the model is made.
    """
    facts = dict(facts)
    licence = facts.pop("licence", PretrainedConfig.licence)
    with create_folder(output / f"{facts['architecture']}.{facts['tag']}") as folder:
        job = open_job(config, [*options, f"slim_config={{bits: {bits}}}"])
        layered = pack_checkpoint(job, weights, folder / "layered", ptq=True)
        job = open_job(config, options)
        name = f"{facts['architecture']}.{facts['tag']}"
        manifest = write_graph(job, layered, folder / GRAPH, name)
        for path in layered.iterdir():
            path.rename(folder / path.name)
        layered.rmdir()
        card = WeightsCard(
            **facts,
            file=MANIFEST,
            sha256=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
            config=replace(
                _feeding(manifest, side),
                options=_own_options(job) if job.task == "classification" else {},
                licence=licence,
            ),
        )
        write_text(folder / CARD, json.dumps(asdict(card), indent=2) + "\n")
    return output / card.name


def write_graph(job: Job, weights: str | Path, folder: Path, name: str) -> Manifest:
    """Write the graph of a folder of the zoo, and return its manifest.

    Args:
        job: of the model.
        weights: the layered model, or its name.
        folder: the new one.
        name: of the model in the manifest.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        graph = Path(work) / "model"
        job.export(
            job.load_float(weights),
            graph,
            input_shape=_input_shape(job),
            output_op="softmax" if job.task == "classification" else None,
            model_format="paddle",
        )
        manifest = read_manifest(graph)
        constants = set(list_graph_parameters(graph / manifest.program)) - {*manifest.parameters}
        if constants:
            raise ValueError(f"expected a graph of named parameters only, found {constants}")
        (graph / manifest.weights).unlink()
        manifest = replace(manifest, name=name, bits=32)
        if manifest.model_files.own_for_openvino:
            manifest = _without_earlier_format(graph, manifest)
        manifest.write(graph)
        pack_programs(graph)
        graph.rename(folder)
    return manifest


def pack_programs(graph: Path) -> None:
    """Compress the programs of a graph; the same program gives the same bytes."""
    for path in graph.glob("model.*"):
        packed = gzip.compress(path.read_bytes(), mtime=0)
        path.with_name(path.name + PACKED).write_bytes(packed)
        path.unlink()


def _without_earlier_format(graph: Path, manifest: Manifest) -> Manifest:
    """Leave out the program that only other people's clients read: none of them reads the zoo, and
    OpenVINO has one of its own."""
    earlier = manifest.model_files.earlier_program
    (graph / earlier).unlink()
    files = {name: facts for name, facts in manifest.files.items() if name != earlier}
    return replace(manifest, earlier_format=False, files=files)


def _input_shape(job: Job) -> list[int | None]:
    """Of the graph: `[batch, channels, height, width]`."""
    if job.task == "classification":
        return [None, 3, *job.example.shape[2:]]
    if job.task == "detection":
        steps = job.content["TestReader"]["sample_transforms"]
        (resize,) = (step["Resize"] for step in steps if "Resize" in step)
        if resize["keep_ratio"]:
            raise ValueError("expected a detector that sees pictures of one size, got keep_ratio")
        return [1, 3, *np.broadcast_to(resize["target_size"], 2).tolist()]
    return [None, 3, None, None]


def _feeding(manifest: Manifest, side: int) -> PretrainedConfig:
    """From the transforms of an export, which resize nothing, or as a classifier's do.

    A card has no word for how a detector's resize: to the size of its graph, whatever the ratio."""
    if manifest.task == "detection":
        (normalize,) = (t["NormalizeImage"] for t in manifest.transforms if "NormalizeImage" in t)
        return PretrainedConfig(
            input_size=tuple(manifest.input_shape[1:]),
            mean=tuple(normalize["mean"]),
            std=tuple(normalize["std"]),
            resize_short=None,
            num_classes=manifest.num_classes or 0,
            classes=tuple(manifest.classes),
        )
    *resizing, normalize = manifest.transforms
    width = height = side
    resize_short = None
    if resizing:
        shorten, crop = (
            resizing  # of ResizeByShort and CenterCrop, as `PretrainedConfig` knows them
        )
        resize_short, (width, height) = shorten["short_size"], crop["target_size"]
    config = PretrainedConfig(
        input_size=(3, height, width),
        mean=tuple(normalize["mean"]),
        std=tuple(normalize["std"]),
        resize_short=resize_short,
        num_classes=manifest.num_classes or 0,
        classes=tuple(manifest.classes),
    )
    if config.transforms != manifest.transforms:
        raise ValueError(
            f"expected transforms such as {config.transforms}, got {manifest.transforms}"
        )
    return config


def _own_options(job: Job) -> dict[str, object]:
    """Of a classifier: what its config says of the network itself."""
    options = dict(job.content["model"])
    for known in ("type", "num_classes", "drop_path_rate", "drop_rate"):
        options.pop(known, None)
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--card", type=Path, help="without it, only the graph is made anew")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--side", type=int, default=112, help="of training pictures")
    parser.add_argument("--opts", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=WEIGHTS_FOLDER)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if args.card is None:
        folder = args.output / args.weights
        job, new = open_job(args.config, args.opts), folder / f"new-{GRAPH}"
        write_graph(job, args.weights, new, args.weights)
        shutil.rmtree(folder / GRAPH)
        new.rename(folder / GRAPH)
        return
    facts = json.loads(args.card.read_text(encoding="utf-8"))
    print(
        write_zoo_weights(
            args.config,
            args.weights,
            facts,
            bits=args.bits,
            side=args.side,
            options=args.opts,
            output=args.output,
        )
    )


if __name__ == "__main__":
    main()
