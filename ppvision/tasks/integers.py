"""`export --int8`: export a float model with integer products, and measure the effect on the
score."""

from collections.abc import Sequence
from pathlib import Path

from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.write.export import record_scores
from ppvision.deploy.write.integers import DEFAULT_RULE, IntegerOptions
from ppvision.tasks.job import Job


def export_integers(
    job: Job,
    model_path: str | Path,
    folder: str | Path,
    *,
    calibration: str | Path | None,
    rule: str | None,
    keep_float: Sequence[str | int],
    evaluate: bool,
    input_shape: list[int | None],
    output_op: str | None,
    model_format: str,
    paddlex_name: str | None = None,
) -> list[dict[str, object]]:
    """Export a model in float with 8-bit weights and activations.

    Args:
        job: job of the model.
        model_path: weights in float.
        folder: folder of the export.
        calibration: a folder or a list file of images; None for the config's training set.
        rule: rule for the steps of activations; None for the default.
        keep_float: layers that stay in float: paths, and the number of further layers (those that
            lose most).
        evaluate: whether to score float and integers on the val split, and to write both scores
            into `deploy.yaml`.
        input_shape, output_op, model_format, paddlex_name: see `export_model`.

    Returns:
        A row for float and one for integers: arithmetic, bytes of the weights, score, milliseconds
        on one thread.
    """
    if evaluate:
        job.check_data("val_dataset")
    options = IntegerOptions(
        job.calibration_pictures() if calibration is None else calibration,
        rule or DEFAULT_RULE,
        keep_float,
    )
    model = job.load_float(model_path)
    job.export(
        model,
        folder,
        input_shape=input_shape,
        output_op=output_op,
        model_format=model_format,
        integers=options,
        paddlex_name=paddlex_name,
    )
    checked = read_manifest(Path(folder)).int8
    runs = checked is not None and checked.engine is not None
    if evaluate and runs:
        # "int8", not "auto", so that every machine measures the effect of integers.
        scores = [job.evaluate(model), job.evaluate_exported(folder, precision="int8")]
        (tag, as_float), *_ = scores[0].by_tag().items()
        record_scores(Path(folder), tag.rsplit("/", 1)[-1], scores[1].by_tag()[tag], as_float)
    return _rows(Path(folder), sum(4 * p.size for p in model.parameters()))


def _rows(folder: Path, float_bytes: int) -> list[dict[str, object]]:
    manifest = read_manifest(folder)
    checked = manifest.int8
    assert checked is not None  # because the export is in integers
    weights = manifest.weights or manifest.program  # ONNX has both in one file
    rows: list[dict[str, object]] = [
        {"arithmetic": "float32", "weights_bytes": float_bytes},
        {"arithmetic": "int8", "weights_bytes": manifest.files[weights].bytes},
    ]
    if checked.metric is not None:
        rows[0][checked.metric], rows[1][checked.metric] = checked.float_score, checked.score
    for row, taken in zip(rows, (checked.float_milliseconds, checked.milliseconds), strict=True):
        row["ms"] = None if taken is None else round(taken, 2)
    return rows
