"""Scores for the accuracy of boundaries."""

from ppvision.metrics.boundary import BoundaryFScore, BoundaryIoU, TrimapIoU

__all__ = ["BoundaryFScore", "BoundaryIoU", "TrimapIoU"]
