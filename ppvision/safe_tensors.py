"""Check the header of a safetensors file before anything reads it."""

# The header of 10,000 tensors has 1 MB; in memory it takes about ten times as much.
_MAX_HEADER_BYTES = 16 << 20


def header_fits(start: bytes, size: int) -> bool:
    """Whether the header of a safetensors file is inside the file and within the size that we
    write.

    Args:
        start: first bytes of the file, at least 8.
        size: number of bytes of the file.
    """
    header = int.from_bytes(start[:8], "little")
    return len(start) >= 8 and header <= min(size - 8, _MAX_HEADER_BYTES)
