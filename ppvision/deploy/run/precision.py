"""Choose the arithmetic in which an exported model runs: float32, bfloat16 or 8-bit integers."""

import os
from collections.abc import Collection
from typing import Literal

from ppvision.deploy.run.manifest import Manifest, PrecisionCheck
from ppvision.environment import read_cpu_flags
from ppvision.errors import InputError, shorten
from ppvision.precision import LONG_SPELLINGS, PRECISIONS

Precision = Literal["float32", "bfloat16", "int8"]

# oneDNN's names, which OpenVINO's plugin also uses, with the flags of /proc/cpuinfo that each
# excludes. Other names exclude nothing.
_MAX_ISA = "ONEDNN_MAX_CPU_ISA"
_AMX = frozenset({"amx_int8", "amx_bf16", "amx_tile"})
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_LEFT_OUT = {
    "SSE41": _AMX | _VNNI,
    "AVX": _AMX | _VNNI,
    "AVX2": _AMX | _VNNI,
    "AVX2_VNNI": _AMX | {"avx512_vnni"},
    "AVX2_VNNI_2": _AMX | {"avx512_vnni"},
    "AVX512_CORE": _AMX | _VNNI,
    "AVX512_CORE_VNNI": _AMX,
    "AVX512_CORE_BF16": _AMX,
    "AVX512_CORE_FP16": _AMX,
    "AVX10_1_512": _AMX,
}


def check_precision(value: str) -> str:
    """Return one of `PRECISIONS`; float32 and bfloat16 may be written fp32 and bf16.

    Raises:
        InputError: another value.
    """
    given = value
    value = LONG_SPELLINGS.get(value, value) if isinstance(value, str) else value
    if value not in PRECISIONS:
        raise InputError(
            f"precision: expected one of {', '.join(PRECISIONS)} (fp32 and bf16 are float32 and "
            f"bfloat16), got {shorten(given)}."
        )
    return value


def find_usable_flags() -> frozenset[str]:
    """Return the features of the processor that the engines may use, with the names of
    /proc/cpuinfo."""
    limit = os.environ.get(_MAX_ISA, "ALL").upper()
    return frozenset(read_cpu_flags()) - _LEFT_OUT.get(limit, frozenset())


def find_integer_unit(flags: Collection[str]) -> str | None:
    """Return the unit that multiplies 8-bit integers into 32 bits: "AMX" or "VNNI". None: the
    processor adds products of 8-bit integers in 16 bits. This saturates, and is about as slow as
    float."""
    if "amx_int8" in flags:
        return "AMX"
    return "VNNI" if _VNNI & set(flags) else None


def choose_precision(
    wanted: str, manifest: Manifest, flags: Collection[str], has_openvino: bool
) -> tuple[Precision, str]:
    """Choose the precision in which a folder runs.

    Args:
        wanted: one of `PRECISIONS`.
        manifest: manifest of the folder.
        flags: features of the processor.
        has_openvino: whether the installed Paddle contains OpenVINO, which runs integers and
            bfloat16.

    Returns:
        The precision, and the reason for the choice (for "auto").

    Raises:
        InputError: the folder or the machine does not support `wanted`.
    """
    can_openvino = manifest.format == "paddle" and manifest.openvino and has_openvino
    can_integers = can_openvino or manifest.format == "onnx"  # ONNX Runtime always can
    if wanted == "int8":
        if manifest.activations != 8:
            raise InputError(
                f"precision: got int8, but {manifest.name} was exported in float. Export it "
                "with --int8 (in Python export_model(..., int8=True))."
            )
        if not can_integers:
            raise InputError(
                f"precision: got int8, but OpenVINO cannot run {manifest.name} here. Pass "
                "precision='auto' or 'float32'."
            )
        return "int8", "asked for"
    if wanted == "bfloat16":
        if manifest.activations == 8 or not can_openvino:
            raise InputError(
                f"precision: got bfloat16, but {manifest.name} has no float graph that "
                "OpenVINO can run here. Pass precision='auto' or 'float32'."
            )
        return "bfloat16", "asked for"
    if wanted == "float32":
        return "float32", "asked for"
    if manifest.activations == 8:
        return _auto_of_integers(manifest, flags, bool(can_integers))
    passed = manifest.bfloat16 is not None and manifest.bfloat16.passed
    if can_openvino and passed and "amx_bf16" in flags:
        return "bfloat16", "the processor has amx_bf16, and the export's check passed"
    return "float32", "the folder is in float"


def find_integer_doubt(manifest: Manifest, flags: Collection[str]) -> str | None:
    """Return why integers that were asked for may give wrong numbers; None: nothing is known."""
    if manifest.int8 is not None and not manifest.int8.passed:
        return "the export's check of the integers failed"
    if find_integer_unit(flags) is None:
        return "the processor has neither VNNI nor AMX, so that sums of 8-bit products can overflow"
    return None


def _auto_of_integers(
    manifest: Manifest, flags: Collection[str], can_integers: bool
) -> tuple[Precision, str]:
    """Choose for a folder with integers: integers, or the same codes computed in float."""
    unit = find_integer_unit(flags)
    if unit is None:
        return "float32", "the processor has neither VNNI nor AMX: the same codes run in float"
    if not can_integers:
        return "float32", "OpenVINO cannot run the graph here: the same codes run in float"
    checked = manifest.int8
    if checked is not None and not checked.passed:
        return "float32", "the export's check of the integers failed: the same codes run in float"
    if checked is not None and manifest.format == "onnx" and _is_slower(checked):
        # ONNX Runtime multiplies integers only if the result is rounded immediately.
        return "float32", "ONNX Runtime took longer with integers when this was exported"
    return "int8", f"the folder holds integers, and the processor has {unit}"


def _is_slower(checked: PrecisionCheck) -> bool:
    if checked.milliseconds is None or checked.float_milliseconds is None:
        return False
    return checked.milliseconds > checked.float_milliseconds
