"""Check whether an export gives the same numbers as its model."""
