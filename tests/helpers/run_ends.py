"""Whether two runs of `small_run` ended alike."""

import numpy as np
from safetensors.numpy import load_file

from ppvision.engine.run_folder import read_metrics
from tests.helpers.verbs import records

STEPS = 30
COSTS = ("Train/batch_cost", "Train/reader_cost")


def numbers(folder) -> list:
    """What a run recorded, without its timings."""
    return [row for row in read_metrics(folder / "metrics.csv") if row[1] not in COSTS]


def assert_same_end(folder, expected) -> None:
    for name in ("model", "optimizer", "ema"):
        ours, theirs = (
            load_file(f / "checkpoints" / f"step_{STEPS}" / f"{name}.safetensors")
            for f in (folder, expected)
        )
        assert ours.keys() == theirs.keys()
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")
    assert numbers(folder) == numbers(expected)
    points = [(v.id, v.tag) for v in records(folder) if v.WhichOneof("one_value") == "value"]
    assert sorted(points) == sorted((s, t) for s, t, _ in read_metrics(folder / "metrics.csv"))
