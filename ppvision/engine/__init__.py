"""Training: one loop, what it keeps on disk, and what it shows."""
