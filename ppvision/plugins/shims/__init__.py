"""Repairs of PaddleSeg and PaddleDetection; each is applied only if its fault is found."""

from ppvision.plugins.shims.mechanism import (
    ConcatShim,
    Fault,
    Operations,
    Replacement,
    Shim,
    apply,
    list_active_shims,
    remove,
)
from ppvision.plugins.shims.paddledet import PADDLEDET_SHIMS
from ppvision.plugins.shims.paddleseg import PADDLESEG_SHIMS

__all__ = [
    "PADDLEDET_SHIMS",
    "PADDLESEG_SHIMS",
    "ConcatShim",
    "Fault",
    "Operations",
    "Replacement",
    "Shim",
    "apply",
    "list_active_shims",
    "remove",
]
