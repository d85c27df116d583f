"""The files of a layered model."""
