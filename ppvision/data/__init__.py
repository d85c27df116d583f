"""Data: scenes that need no download, converters, and checks before a training starts."""
