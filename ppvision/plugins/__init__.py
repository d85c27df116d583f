"""Adapters to PaddleSeg, PaddleDetection and PaddleSlim. Import each by its own name.

Importing this package imports none of them.
"""
