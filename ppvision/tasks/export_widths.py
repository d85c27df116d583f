"""One exported folder for every width, and the table that compares them."""

import csv
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ppvision.dashboard import write_comparison
from ppvision.deploy import Predictor
from ppvision.deploy.bench import bench_exported
from ppvision.deploy.export import may_be_replaced
from ppvision.deploy.manifest import read_manifest
from ppvision.environment import machine, usable_cpus
from ppvision.errors import FolderInUseError
from ppvision.quant.codes import MAX_BITS
from ppvision.quant.packed_layers import pack_model
from ppvision.tasks.quantization import ModelWithWidths

logger = logging.getLogger("ppvision")

TABLE = "widths.csv"


def export_widths(
    job: ModelWithWidths,
    model_path: str | Path,
    folder: str | Path,
    bits: Sequence[int],
    *,
    input_shape: list[int | None],
    output_op: str | None,
    model_format: str,
    evaluate: bool,
) -> list[dict[str, object]]:
    """Export a model at several widths, and compare what was exported.

    Args:
        job: of the model.
        model_path: a checkpoint of once-QAT, a layered model, or float weights with a slim_config.
        folder: gets `w8`, `w4`, ... (see `export_model`), `widths.csv`, and a VisualDL record for
            each width under `vdl`, whose page of settings shows the same table.
        bits: widths. Those of an earlier export that are not among them are removed: they may be
            of another model.
        input_shape, output_op, model_format: see `export_model`.
        evaluate: whether to score each export on the val split.

    Returns:
        A row for each width, the highest first: bits, bytes in all and of the weights, the task's
        first score, the largest error to eager mode, latency and load time.

    Raises:
        ConfigError, ValueError: a model in float, a width that is not there.
        ParityError: an export gives other numbers than the model at its width.
        FileExistsError: the folder holds other files.
    """
    folder, widths = Path(folder), sorted(set(bits), reverse=True)
    _check_folder(folder)
    state = job.state(model_path, widths[0])
    for k in widths:
        state.check_bits(k)
    rows = []
    for k in widths:
        logger.info(f"export: {k} bits")
        model = pack_model(job.structure(), state, k)
        job.export(
            model,
            folder / f"w{k}",
            input_shape=input_shape,
            output_op=output_op,
            model_format=model_format,
            bits=k,
        )
    threads = usable_cpus()
    folders = [folder / f"w{k}" for k in widths]
    latencies = bench_exported(folders, threads=threads)
    for k, exported, latency in zip(widths, folders, latencies, strict=True):
        manifest = read_manifest(exported)
        sizes = {name: entry["bytes"] for name, entry in manifest.files.items()}
        row: dict[str, object] = {"bits": k, "bytes": sum(sizes.values())}
        if "model.pdiparams" in sizes:  # ONNX keeps both in one file
            row["weights_bytes"] = sizes["model.pdiparams"]
        if evaluate:
            scores = job.evaluate_exported(exported).by_tag()
            row |= {tag.rsplit("/", 1)[-1]: value for tag, value in list(scores.items())[:1]}
        row |= {
            "max_error": f"{manifest.max_error_to_eager:.2g}",
            "latency_ms": round(latency.median, 2),
            "load_s": round(_load_seconds(exported), 2),
        }
        rows.append(row)
    for old in _exports(folder):
        if old not in folders:
            logger.info(f"export: removing {old}, of an earlier export")
            shutil.rmtree(old)
    _write_table(folder / TABLE, rows)
    write_comparison(folder / "vdl", {f"w{row['bits']}": row for row in rows})
    return rows


def _exports(folder: Path) -> list[Path]:
    return [path for k in range(1, MAX_BITS + 1) if (path := folder / f"w{k}").exists()]


def _check_folder(folder: Path) -> None:
    """Raise `FileExistsError` where something else than an earlier export would be mixed with."""
    present = list(folder.iterdir()) if folder.is_dir() else []
    ours = [folder / TABLE, folder / "vdl", *(p for p in _exports(folder) if may_be_replaced(p))]
    if other := sorted(path.name for path in present if path not in ours):
        raise FolderInUseError(
            f"export --bits: expected a new or empty folder, or an earlier export at widths, got "
            f"{folder}, which holds {', '.join(other[:5])}. Name another one with --save_dir."
        )


def _load_seconds(folder: Path) -> float:
    start = time.perf_counter()
    Predictor(folder, threads=usable_cpus())
    return time.perf_counter() - start


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "machine": machine()} for row in rows)
    partial.replace(path)
