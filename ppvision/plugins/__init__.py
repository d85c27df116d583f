"""Adapters to PaddleSeg, PaddleDetection and PaddleSlim; each is imported by its own name.

Importing this package imports none of them.
"""
