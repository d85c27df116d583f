"""Training: one loop, its files on disk, and its displays."""
