"""The header of a safetensors file, looked at before anything reads it."""

# 10,000 tensors take 1 MB. Read, a header takes about ten times as much memory.
_MAX_HEADER_BYTES = 16 << 20


def header_fits(start: bytes, size: int) -> bool:
    """Whether the header of a safetensors file lies in it and is no larger than any that we write.

    Args:
        start: its first bytes, 8 at least.
        size: its bytes.
    """
    header = int.from_bytes(start[:8], "little")
    return len(start) >= 8 and header <= min(size - 8, _MAX_HEADER_BYTES)
