"""Which files of a folder are pictures."""

# Picture files as users name them, found in a folder without regard to case.
READABLE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
