"""Write TensorBoard's record files. Only this module needs tensorboardX."""

import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


class TensorBoardRecords:
    """Writes the numbers and images of `Dashboard` for TensorBoard.

    Args:
        folder: folder of the records; each start of a run adds a file.
        start_step: TensorBoard drops records of earlier files after this step.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        purge = start_step + 1 if folder.exists() else None
        # Default names count seconds: a resume within one second would overwrite the previous file.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix)

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """`image` is `[H, W, 3]` uint8 RGB."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, values: np.ndarray, step: int, buckets: int) -> None:
        self._writer.add_histogram(tag, values.ravel(), step, bins=buckets)

    def text(self, tag: str, text: str) -> None:
        self._writer.add_text(tag, text, 0)

    def settings(self, values: dict[str, float | int | str]) -> None:
        """Write settings as a table: the page of hyperparameters would need the scores, which come
        later."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
