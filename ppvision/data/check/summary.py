"""The contents of a data set, as its check found them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ppvision.errors import shorten_text

_SIZES = 5  # number of image sizes in the table


@dataclass(frozen=True)
class DataSummary:
    """The contents of one part of a data set without problems.

    Attributes:
        images: how many.
        sizes: number of images by "WIDTHxHEIGHT", the most frequent first.
        counted: the unit of `counts`: "pixels", "objects" or "pictures".
        counts: number for each class, in the order of the classes; None if the data set numbers its
            classes itself.
        names: of the classes, or empty.
        ignored: pixels with the ignored label; 0 for other tasks.
    """

    images: int
    sizes: Mapping[str, int]
    counted: str = "pixels"
    counts: Sequence[int] | None = None
    names: Sequence[str] = field(default_factory=list)
    ignored: int = 0

    def table(self) -> str:
        """The summary as text."""
        shown = [f"{size} ({count})" for size, count in list(self.sizes.items())[:_SIZES]]
        if len(self.sizes) > _SIZES:
            shown.append(f"and {len(self.sizes) - _SIZES} other sizes")
        lines = [f"{self.images} images", f"width x height (images): {', '.join(shown)}"]
        if self.counts is None:
            return "\n".join(lines)
        names = [shorten_text(str(name), 40) for name in self.names]
        names = names or [str(number) for number in range(len(self.counts))]
        total = sum(self.counts)
        width = max(len("class"), *(len(name) for name in names))
        lines.append(f"{'class':{width}}  {self.counted:>14}   share")
        for name, count in zip(names, self.counts, strict=True):
            share = f"{count / total:7.2%}" if total else f"{'-':>7}"
            lines.append(f"{name:{width}}  {count:14,}  {share}")
        if self.ignored:
            lines.append(f"{self.ignored:,} pixels are ignored")
        return "\n".join(lines)
