"""Data sets that the user has, or that packages carry, as folders that ppvision trains on."""
