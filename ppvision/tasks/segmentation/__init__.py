"""Segmentation: PaddleSeg under our engine."""
