"""PS-Attention by the paper's definition, and the network around it, in float64: slow, independent.

Nothing here groups, pads, transposes or batches: for each token it lists the tokens of its pale,
reads their keys and values, and sums. Convolutions and norms are loops as well.
"""

import math

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


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """`x` `[C, H, W]` -> `[K, ceil(H / stride), ceil(W / stride)]`, zero beyond the map.

    `weight` is `[K, C, k, k]` with odd k; as many channels as `x` has, or 1 for depthwise.
    """
    channels, height, width = x.shape
    reach = weight.shape[2] // 2
    out = np.zeros((len(weight), -(-height // stride), -(-width // stride)))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            total = bias.copy()
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    r, c = row * stride + i - reach, column * stride + j - reach
                    if 0 <= r < height and 0 <= c < width:
                        if weight.shape[1] == channels:
                            total += weight[:, :, i, j] @ x[:, r, c]
                        else:
                            total += weight[:, 0, i, j] * x[:, r, c]
            out[:, row, column] = total
    return out


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Over the channels of `x` `[C, H, W]`, at each place on its own."""
    out = np.zeros_like(x)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            token = x[:, row, column]
            variance = ((token - token.mean()) ** 2).mean()
            out[:, row, column] = scale * (token - token.mean()) / np.sqrt(variance + 1e-5) + shift
    return out


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function."""
    return x * np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(x)


def pale_block(x: np.ndarray, block) -> np.ndarray:
    """`x` `[C, H, W]` float64 -> the same, with the numbers of a `PaleBlock`."""
    weights = _numbers(block)
    attention = block.attention

    def norm(name, tokens):
        return layer_norm(tokens, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def pointwise(name, tokens):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return np.einsum("kc,chw->khw", weight[:, :, 0, 0], tokens) + bias[:, None, None]

    x = x + convolution(x, weights["position.weight"], weights["position.bias"], 1)
    x = x + pale_attention(
        norm("norm1", x),
        parameters_of(attention),
        attention.num_heads,
        attention.pale_size,
        attention.mask_padding,
    )
    return x + pointwise("mlp.2", gelu(pointwise("mlp.0", norm("norm2", x))))


def pale_transformer(x: np.ndarray, model) -> list[np.ndarray]:
    """One picture `[3, H, W]` -> the four feature maps, or `[logits]`, of a `PaleTransformer`."""
    weights = _numbers(model)

    def named(prefix):
        return weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]

    features = []
    for stage, blocks in enumerate(model.stages):
        stride = 4 if stage == 0 else 2
        x = layer_norm(
            convolution(x, *named(f"merges.{stage}.0"), stride), *named(f"merges.{stage}.1")
        )
        for block in blocks:
            x = pale_block(x, block)
        features.append(x)
    if model.features_only:
        return [layer_norm(f, *named(f"feature_norms.{i}")) for i, f in enumerate(features)]
    weight, bias = named("head")  # Paddle keeps a Linear's weight as [in, out]
    return [layer_norm(x, *named("norm")).mean(axis=(1, 2)) @ weight + bias]


def _numbers(layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in layer.state_dict().items()}
