"""The largest size of an image. This module imports nothing, because the command line starts with
it."""

import os

from ppvision.errors import ConfigError

MAX_PIXELS = "PPVISION_MAX_PIXELS"  # the environment variable that raises the limit
# Pixels of one image. 0.8 GB as RGB: more than images of cameras or aerial tiles have, and less
# than a small PNG can decode to.
DEFAULT_MAX_PIXELS = 2**28


def read_max_pixels() -> int:
    """Return the largest number of pixels of an image: `PPVISION_MAX_PIXELS`, or 2^28.

    Raises:
        ConfigError: the variable is no whole number above 0.
    """
    text = os.environ.get(MAX_PIXELS)
    if text is None:
        return DEFAULT_MAX_PIXELS
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) > 0):
        raise ConfigError(f"{MAX_PIXELS}: expected a whole number above 0, got {text!r:.40}.")
    return int(text)
