"""What is in a data set, found by its check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ppvision.errors import shorten_text

_SIZES = 5  # of images, that the table names


@dataclass(frozen=True)
class DataSummary:
    """What is in one part of a data set without faults.

    Attributes:
        images: how many.
        sizes: images by "WIDTHxHEIGHT", the commonest first.
        counted: what `counts` holds: "pixels", "objects" or "pictures".
        counts: of each class, in the order of the classes; None where the data set numbers its
            classes by itself.
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
