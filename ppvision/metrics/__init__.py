"""Scores that say how well boundaries are met."""

from ppvision.metrics.boundary import BoundaryFScore, BoundaryIoU, TrimapIoU

__all__ = ["BoundaryFScore", "BoundaryIoU", "TrimapIoU"]
