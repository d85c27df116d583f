"""Artefacts of earlier versions, and what wrote them (`write_artefacts.py`)."""
