"""The semantic difference by its definition: one pixel, neighbour, output and channel at a time."""

import numpy as np


def similarity_of(name, a, b):
    """S_c(V_p, V_q) of two pixels' guidance `[C]` in units of lambda."""
    d = b - a
    if name == "cosine":
        lengths = np.sqrt((a @ a + 1e-6) * (b @ b + 1e-6))
        return np.full(1, (1 + (a @ b + 1e-6) / lengths) / 2)
    if name == "product":
        return np.full(1, a @ b)
    return {
        "charbonnier": 1 / np.sqrt(1 + d * d),
        "gaussian": np.exp(-d * d / 2),
        "perona_malik": 1 / (1 + d * d),
        "increasing": 1 - 1 / np.sqrt(1 + d * d),
        "none": np.ones_like(d),
    }[name]


def semantic_difference(u, v, weight, name, groups):
    """`[B, C, H, W]` float64 -> `[B, O, H, W]`; neighbours beyond the edge repeat the edge."""
    batch, channels, height, width = u.shape
    outputs = weight.shape[0]
    result = np.zeros((batch, outputs, height, width))
    for b, y, x in np.ndindex(batch, height, width):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                i, j = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                similar = np.broadcast_to(
                    similarity_of(name, v[b, :, y, x], v[b, :, i, j]), channels
                )
                for o in range(outputs):
                    group = o // (outputs // groups)
                    for k in range(channels // groups):
                        c = group * (channels // groups) + k
                        difference = u[b, c, i, j] - u[b, c, y, x]
                        result[b, o, y, x] += weight[o, k, dy + 1, dx + 1] * similar[c] * difference
    return result
