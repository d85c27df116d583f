"""PS-Attention by the paper's definition, token by token, in float64: slow and independent.

Nothing here groups, pads, transposes or batches: for each token it lists the tokens of its pale,
reads their keys and values, and sums. The separable convolutions are loops as well.
"""

import numpy as np


def separable_conv(x: np.ndarray, params: dict, padded: tuple[int, int]) -> dict:
    """q, k or v at every position of the padded map: `{(row, column): [C]}`.

    Positions beyond the map read as zero, inside the padding as well as outside of it.
    """
    channels, height, width = x.shape
    depthwise, scale, shift = params["depthwise"], params["scale"], params["shift"]
    weight, bias = params["weight"], params["bias"]
    out = {}
    for row in range(padded[0]):
        for column in range(padded[1]):
            total = np.zeros(channels)
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < height and 0 <= c < width:
                        total += depthwise[:, i, j] * x[:, r, c]
            out[row, column] = weight @ (scale * total + shift) + bias
    return out


def pale_of(row: int, column: int, padded, sizes, branch: str) -> list[tuple[int, int]]:
    """Positions that a token attends to: its row group, or its column group.

    There are `length / size` pales; rows that lie a whole number of pales apart belong together.
    """
    height, width = padded
    if branch == "rows":
        pales = height // sizes[0]
        rows = [r for r in range(height) if (r - row) % pales == 0]
        return [(r, c) for r in rows for c in range(width)]
    pales = width // sizes[1]
    columns = [c for c in range(width) if (c - column) % pales == 0]
    return [(r, c) for r in range(height) for c in columns]


def pale_attention(x, params, num_heads, sizes, mask_padding) -> np.ndarray:
    """`x` `[C, H, W]` float64 -> `[C, H, W]`."""
    channels, height, width = x.shape
    padded = tuple(-(-n // s) * s for n, s in zip((height, width), sizes, strict=True))
    query, key, value = (separable_conv(x, params[name], padded) for name in ("q", "k", "v"))
    head_dim = channels // num_heads
    out = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            mixed = np.zeros(channels)
            for head in range(num_heads):
                part = slice(head * head_dim, (head + 1) * head_dim)
                branch = "rows" if head < num_heads // 2 else "columns"
                places = pale_of(row, column, padded, sizes, branch)
                if mask_padding:
                    places = [(r, c) for r, c in places if r < height and c < width]
                scores = np.array(
                    [query[row, column][part] @ key[p][part] / np.sqrt(head_dim) for p in places]
                )
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[part] = sum(w * value[p][part] for w, p in zip(weights, places, strict=True))
            out[:, row, column] = params["project"]["weight"] @ mixed + params["project"]["bias"]
    return out


def parameters_of(layer) -> dict:
    """The numbers of a `PaleAttention` in evaluation mode, as float64 arrays."""

    def pointwise(conv):
        weight = conv.weight.numpy().astype(np.float64)[:, :, 0, 0]
        return {"weight": weight, "bias": conv.bias.numpy().astype(np.float64)}

    def separable(branch):
        depthwise, norm, point = branch[0], branch[1], branch[2]
        variance = norm._variance.numpy().astype(np.float64)
        mean = norm._mean.numpy().astype(np.float64)
        scale = norm.weight.numpy().astype(np.float64) / np.sqrt(variance + norm._epsilon)
        shift = norm.bias.numpy().astype(np.float64) - mean * scale
        kernel = depthwise.weight.numpy().astype(np.float64)[:, 0]
        return {"depthwise": kernel, "scale": scale, "shift": shift, **pointwise(point)}

    return {
        "q": separable(layer.query),
        "k": separable(layer.key),
        "v": separable(layer.value),
        "project": pointwise(layer.project),
    }
