"""Names of floating-point precisions, each of which has two spellings."""

SPELLINGS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def normalize_precision(name: str) -> str:
    """The short spelling of a precision (`bfloat16` is `bf16`); any other name as it is."""
    return SPELLINGS.get(name, name)
