"""Names of precisions; those of floating point have two spellings."""

SPELLINGS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LONG_SPELLINGS = {short: long for long, short in SPELLINGS.items()}

# Precisions of an exported folder; see `ppvision.deploy.run.precision`.
PRECISIONS = ("auto", "float32", "bfloat16", "int8")


def normalize_precision(name: str) -> str:
    """Return the short spelling of a precision (`bfloat16` is `bf16`), and other names
    unchanged."""
    return SPELLINGS.get(name, name)
