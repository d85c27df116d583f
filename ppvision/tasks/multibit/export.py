"""Export one folder per width, and a table that compares them."""

import csv
import io
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ppvision.console import FILE_ONLY, ProgressLine
from ppvision.data.listing import is_leftover
from ppvision.deploy import Predictor
from ppvision.deploy.run.bench import bench_exported, time_arithmetic
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.write.export import may_be_replaced, record_scores
from ppvision.deploy.write.integers import IntegerOptions
from ppvision.engine.dashboard import write_comparison
from ppvision.environment import count_usable_cpus, machine
from ppvision.errors import FolderInUseError
from ppvision.files import replace_folder, sync_files, write_text
from ppvision.quant.codes import MAX_BITS
from ppvision.quant.packed import pack_model
from ppvision.tasks.job import Job, Scores

logger = logging.getLogger("ppvision")

TABLE = "widths.csv"


def export_widths(
    job: Job,
    model_path: str | Path,
    folder: str | Path,
    bits: Sequence[int],
    *,
    input_shape: list[int | None],
    output_op: str | None,
    model_format: str,
    evaluate: bool,
    integers: bool = False,
    paddlex_name: str | None = None,
) -> list[dict[str, object]]:
    """Export a model at several widths, and compare the exports.

    Args:
        job: job of the model.
        model_path: a checkpoint of once-QAT, a layered model, or float weights with a slim_config.
        folder: folder that gets `w8`, `w4`, ... (see `export_model`), `widths.csv`, and a VisualDL
            record per width under `vdl`; VisualDL's page of settings shows the same table.
        bits: widths. When the new export is complete, it replaces the whole earlier export, also
            other widths, because they may be of another model.
        input_shape, output_op, model_format: see `export_model`.
        evaluate: whether to score each export on the val split.
        integers: whether products run in 8-bit integers; this needs a layered model with steps of
            activations. Default False.
        paddlex_name: see `Job.export`.

    Returns:
        One row per width, the highest first: bits, total bytes and bytes of the weights, the task's
        first score, the largest error compared with eager mode, latency and load time. With
        `integers` there are two rows per width, for the same folder in float and in integers; their
        latencies are those of the export, on one thread.

    Raises:
        ConfigError, ValueError: the model is in float, or does not have the width.
        ParityError: an export gives other numbers than the model at its width.
        FileExistsError: the folder contains other files.
    """
    folder, widths = Path(folder).resolve(), sorted(set(bits), reverse=True)
    if other := _other_files(folder):
        raise FolderInUseError(
            f"export --bits: expected a new or empty folder, or an earlier export at widths, got "
            f"{folder}, which holds {', '.join(other[:5])}. Name another one with --save_dir."
        )
    is_earlier = lambda path: path.is_dir() and not _other_files(path)  # noqa: E731
    # All widths, the table and the record are put into place together: if an export fails or is
    # killed, the earlier one does not change.
    replacing = replace_folder(folder, is_earlier, "an earlier export at widths", "save_dir")
    # Two steps per width: export and measurement.
    with replacing as work, ProgressLine("export", 2 * len(widths), "step") as line:
        final = work / "final"
        rows = _export_all(
            job,
            model_path,
            final,
            widths,
            input_shape=input_shape,
            output_op=output_op,
            model_format=model_format,
            evaluate=evaluate,
            integers=integers,
            paddlex_name=paddlex_name,
            line=line,
        )
        _write_table(final / TABLE, rows)
        write_comparison(final / "vdl", _by_name(rows))
        for old in _exports(folder):
            if old.name not in {f"w{k}" for k in widths}:
                logger.info(f"export: removing {old}, of an earlier export")
        sync_files(final)
    return rows


def _export_all(
    job: Job,
    model_path: str | Path,
    folder: Path,
    widths: Sequence[int],
    *,
    input_shape: list[int | None],
    output_op: str | None,
    model_format: str,
    evaluate: bool,
    integers: bool,
    paddlex_name: str | None,
    line: ProgressLine,
) -> list[dict[str, object]]:
    """Write the folder of each width; return one row per width."""
    state = job.state(model_path, widths[0])
    for k in widths:
        state.check_bits(k)
    rows = []
    for k in widths:
        logger.info(f"export: {k} bits", extra=FILE_ONLY)
        model = pack_model(job.structure(), state, k, integers=integers)
        job.export(
            model,
            folder / f"w{k}",
            input_shape=input_shape,
            output_op=output_op,
            model_format=model_format,
            bits=k,
            integers=IntegerOptions() if integers else None,
            paddlex_name=paddlex_name,
        )
        line.update()
    folders = {k: folder / f"w{k}" for k in widths}
    if integers:
        for k, exported in folders.items():
            rows += _rows_of_integers(job, k, exported, evaluate)
            line.update()
        return rows
    latencies = bench_exported(list(folders.values()), threads=count_usable_cpus())
    for (k, exported), latency in zip(folders.items(), latencies, strict=True):
        row: dict[str, object] = {"bits": k, **_sizes(exported)}
        if evaluate:
            row |= _first(job.evaluate_exported(exported))
        row |= _error_and_times(exported, latency.median, latency.load_seconds)
        rows.append(row)
        line.update()
    return rows


def _rows_of_integers(
    job: Job, bits: int, exported: Path, evaluate: bool
) -> list[dict[str, object]]:
    """Return the rows of a folder in float and in integers; write both scores into its
    `deploy.yaml`."""
    checked = read_manifest(exported).int8
    assert checked is not None  # because the export is in integers
    kinds = ("float32", "int8") if checked.engine else ("float32",)  # no engine ran the integers
    found = {}
    if evaluate:
        for arithmetic in kinds:
            found[arithmetic] = _first(job.evaluate_exported(exported, precision=arithmetic))
        if len(found) == 2:
            (metric, score), *_ = found["int8"].items()
            record_scores(exported, metric, score, found["float32"][metric])
    # Not the check's times: its float graph has no rounding, and this folder's has.
    times = time_arithmetic([(exported, arithmetic) for arithmetic in kinds])
    taken = dict(zip(kinds, times, strict=True))
    return [
        {
            "bits": bits,
            "arithmetic": arithmetic,
            **_sizes(exported),
            **found.get(arithmetic, {}),
            **_error_and_times(exported, taken[arithmetic], _load_seconds(exported, arithmetic)),
        }
        for arithmetic in kinds
    ]


def _first(scores: Scores) -> dict[str, float]:
    """Return the first score by name."""
    tag, value = next(iter(scores.by_tag().items()))
    return {tag.rsplit("/", 1)[-1]: value}


def _sizes(exported: Path) -> dict[str, int]:
    manifest = read_manifest(exported)
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    found = {"bytes": sum(sizes.values())}
    if manifest.weights is not None:  # ONNX has both in one file
        found["weights_bytes"] = sizes[manifest.weights]
    return found


def _error_and_times(
    exported: Path, milliseconds: float | None, load_seconds: float | None
) -> dict[str, object]:
    return {
        "max_error": f"{read_manifest(exported).max_error_to_eager:.2g}",
        "latency_ms": None if milliseconds is None else round(milliseconds, 2),
        "load_s": None if load_seconds is None else round(load_seconds, 2),
    }


def _by_name(rows: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Return rows with numbers only, by unique names."""
    found = {}
    for row in rows:
        arithmetic = f"-{row['arithmetic']}" if "arithmetic" in row else ""
        name = f"w{row['bits']}{arithmetic}"
        found[name] = {k: v for k, v in row.items() if k != "arithmetic" and v is not None}
    return found


def _exports(folder: Path) -> list[Path]:
    return [path for k in range(1, MAX_BITS + 1) if (path := folder / f"w{k}").exists()]


# Files that earlier versions left when they were killed.
_LEFTOVER = re.compile(r"\.w[1-8]\.ppvision-partial|widths\.csv(\..*)?\.partial")


def _other_files(folder: Path) -> list[str]:
    """Return names of files that are not from an earlier export at widths."""
    ours = {folder / TABLE, folder / "vdl", *(p for p in _exports(folder) if may_be_replaced(p))}
    present = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path.name for path in present if path not in ours and not is_leftover(path.name)]
    return [name for name in others if not _LEFTOVER.fullmatch(name)]


def _load_seconds(folder: Path, precision: str) -> float:
    start = time.perf_counter()
    with Predictor(folder, threads=count_usable_cpus(), precision=precision):
        return time.perf_counter() - start


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "machine"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "machine": machine()} for row in rows)
    write_text(path, text.getvalue())
