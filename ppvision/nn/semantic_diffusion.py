"""Semantic diffusion: sharper features at class boundaries, in one forward pass.

Source: Tan, Wu, Pi, "Semantic Diffusion Network for Semantic Segmentation", NeurIPS 2022, arXiv
2302.02057. The paper states the diffusion guided by semantics, its approximation by a semantic
difference convolution followed by a fusion, the bilinear enlargement of the guidance, and where the
guidance comes from (the next level, or a strided convolution of the feature itself). We chose the
similarity functions, the projection of the guidance, replicate padding and the start at zero. For
comparisons we added guidance by a separate head (class scores, boundaries), several steps and the
plain convolution of equal size.

    Y[p, o] = sum over q in the 3x3 neighbourhood of p, over channels c, of
              W[o, c, q - p] * S_c(V_p, V_q) * (U_q[c] - U_p[c])
    SDN(U, V) = U + Conv1x1(concat[U, ReLU(BatchNorm(Y))])

The convolution does not unfold its input nine times. Similarity is symmetric, and a difference
changes its sign with its direction. So the weighted differences to two opposite neighbours are one
map of edges: four maps (right, down and the two diagonals) instead of nine, each used twice, one
pixel apart. Training stores none of them: the backward pass computes them again, one at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ppvision.errors import InputError, shorten

# -- similarity of the guidance at two pixels, by its difference [B, C, H, W] in units of lambda ---


def _charbonnier(difference: Tensor) -> Tensor:
    return paddle.rsqrt(1.0 + paddle.square(difference))


def _gaussian(difference: Tensor) -> Tensor:
    return paddle.exp(-0.5 * paddle.square(difference))


def _perona_malik(difference: Tensor) -> Tensor:
    return paddle.reciprocal(1.0 + paddle.square(difference))


def _increasing(difference: Tensor) -> Tensor:
    return 1.0 - _charbonnier(difference)


OF_DIFFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "charbonnier": _charbonnier,
    "gaussian": _gaussian,
    "perona_malik": _perona_malik,
    "increasing": _increasing,
}

# -- similarity by the guidance itself at both pixels, [B, C, H, W] each ---------------------------

_EPSILON = 1e-6  # of a squared length, so that the direction of a zero vector is defined


def _cosine(near: Tensor, far: Tensor) -> Tensor:
    (near, near_rest), (far, far_rest) = _direction(near), _direction(far)
    product = (near * far).sum(axis=1, keepdim=True) + near_rest * far_rest  # [B, 1, H, W]
    return 0.5 * (1.0 + product)


def _direction(v: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise each vector with one more component, the root of `_EPSILON`, to length 1: [B, C, H,
    W] and [B, 1, H, W]. So two zero vectors have the same direction, and a zero vector and a long
    one are orthogonal.
    """
    # In units of the largest component, so that squares do not overflow. (Not v / largest: Paddle's
    # oneDNN computes that wrongly for odd sizes.)
    largest = paddle.clip(paddle.amax(v.abs(), axis=1, keepdim=True).detach(), min=1.0)
    unit = paddle.reciprocal(largest)
    v, rest = v * unit, _EPSILON**0.5 * unit
    scale = paddle.rsqrt(paddle.square(v).sum(axis=1, keepdim=True) + paddle.square(rest))
    return v * scale, rest * scale


def _product(near: Tensor, far: Tensor) -> Tensor:
    return (near * far).sum(axis=1, keepdim=True)  # [B, 1, H, W]


Similarity = Callable[[Tensor, Tensor], Tensor]


def _of_both(similarity: Callable[[Tensor], Tensor]) -> Similarity:
    return lambda near, far: similarity(far - near)


SIMILARITIES: dict[str, Similarity | None] = {
    **{name: _of_both(similarity) for name, similarity in OF_DIFFERENCES.items()},
    "cosine": _cosine,
    "product": _product,
    "none": None,
}
_OF_VECTORS = ("cosine", "product")  # any number of guidance channels, no lambda
_WITHOUT_SCALE = (*_OF_VECTORS, "none")

# -- neighbours ------------------------------------------------------------------------------------

# One of each pair of opposite directions, (rows down, columns right).
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
_LOW_PRECISION = (paddle.float16, paddle.bfloat16)


@paddle.jit.not_to_static
def _window(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return `x[:, :, rows, columns]` of `[B, C, H, W]` in new memory."""
    if not paddle.in_dynamic_mode():
        return x[:, :, rows, columns]
    # Slices in eager mode are views. The next operation copies them tens of times slower than
    # `crop`.
    top, bottom, _ = rows.indices(x.shape[2])
    left, right, _ = columns.indices(x.shape[3])
    return paddle.crop(x, [*x.shape[:2], bottom - top, right - left], [0, 0, top, left])


@paddle.jit.not_to_static
def replicate(x: Tensor) -> Tensor:
    """Add a border of one pixel to `[B, C, H, W]` that repeats its neighbours: [B, C, H+2, W+2].

    We chose this because a border of zeros would look like an edge to the operator.
    """
    everything, first, last = slice(None), slice(0, 1), slice(-1, None)
    x = paddle.concat([_window(x, first, everything), x, _window(x, last, everything)], axis=2)
    return paddle.concat([_window(x, everything, first), x, _window(x, everything, last)], axis=3)


def _starts(step: int) -> slice:
    """Along an axis with border: the range of starts of edges with at least one end in the map."""
    return slice(0 if step > 0 else 1, None if step < 0 else -1)


def _ahead(step: int) -> slice:
    """Along an axis of a map of edges: the range of edges that start at the pixels of the map."""
    return (slice(None, -1), slice(None), slice(1, None))[step + 1]


def ends_of_edges(x: Tensor, direction: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a map with its border at p, and at q = p + direction, for all p such that p or q is in
    the map: `[B, C, H+2, W+2]` -> twice `[B, C, H+|dy|, W+|dx|]`."""
    dy, dx = direction
    return _window(x, _starts(dy), _starts(dx)), _window(x, _starts(-dy), _starts(-dx))


def _edges(
    u: Tensor, v: Tensor | None, direction: tuple[int, int], similarity: Similarity | None
) -> Tensor:
    """Compute `S(V_p, V_q) * (U_q - U_p)` for q = p + direction, for all p such that p or q is in
    the map.

    Shapes: u and v with their border `[B, C, H+2, W+2]` -> `[B, C, H+|dy|, W+|dx|]`.
    """
    near, far = ends_of_edges(u, direction)
    difference = far - near
    return (
        difference if similarity is None else similarity(*ends_of_edges(v, direction)) * difference
    )


def taps(direction: tuple[int, int]) -> tuple[tuple[int, tuple[int, int], slice, slice], ...]:
    """Return the two uses of a map of edges in the sum: (sign, place in the 3x3 kernel, rows,
    columns)."""
    dy, dx = direction
    return (
        (1, (1 + dy, 1 + dx), _ahead(dy), _ahead(dx)),  # the next neighbour of p
        (-1, (1 - dy, 1 - dx), _ahead(-dy), _ahead(-dx)),  # p is its next neighbour
    )


def _check_similarity(similarity: object) -> None:
    if not isinstance(similarity, str) or similarity not in SIMILARITIES:
        raise InputError(
            f"similarity: expected one of {', '.join(SIMILARITIES)}, got {shorten(similarity)}."
        )


def _sum_of_differences(
    u: Tensor, v: Tensor | None, weight: Tensor, similarity: Similarity | None, groups: int
) -> Tensor:
    dtype = u.dtype
    u, v = _bordered(u), None if v is None else _bordered(v)
    total = None
    for direction in DIRECTIONS:
        edges = _edges(u, v, direction, similarity)
        parts = []
        for _, (row, column), rows, columns in taps(direction):
            kernel = weight[:, :, row : row + 1, column : column + 1]  # [O, C/groups, 1, 1]
            # Cut before rounding, because `crop` has no kernel for half precision.
            part = _window(edges, rows, columns).astype(dtype)  # [B, C, H, W]
            parts.append(F.conv2d(part, kernel, groups=groups))
        ahead, behind = parts  # [B, O, H, W]
        total = ahead - behind if total is None else total + ahead - behind
    return total


def _central_difference(u: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Compute the sum without similarity as one convolution, whose centre subtracts the sum of the
    other taps.

    The result is the same except for rounding: a constant u gives nearly zero, not exactly zero.
    """
    return F.conv2d(replicate(u), central_kernel(weight), groups=groups)


def central_kernel(weight: Tensor) -> Tensor:
    """Return the kernel `[O, C/groups, 3, 3]` of the convolution that computes the differences to
    the centre, each times its weight."""
    centre = np.zeros([1, 1, 3, 3], np.float32)
    centre[..., 1, 1] = 1.0
    centre = paddle.to_tensor(centre).astype(weight.dtype)
    others = weight * (1.0 - centre)
    return others - centre * others.sum(axis=[2, 3], keepdim=True)


def _bordered(x: Tensor) -> Tensor:
    """Add a border; convert to float32 under AMP, because squares of differences overflow
    float16."""
    return replicate(x.astype("float32") if x.dtype in _LOW_PRECISION else x)


class _SemanticDifference(PyLayer):
    """`_sum_of_differences` that stores only its inputs for the backward pass.

    Paddle's PyLayer has limits: `paddle.grad` for only some of the inputs is refused, and a second
    backward pass over a retained graph crashes Paddle 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor | None,
        weight: Tensor,
        similarity: Similarity | None,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(u, v, weight)
        ctx.similarity, ctx.groups = similarity, groups
        return _sum_of_differences(u, v, weight, similarity, groups)

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensor()
        weight, groups, dtype = inputs[2], ctx.groups, y_grad.dtype
        batch, outputs, height, width = y_grad.shape
        channels = weight.shape[1]  # of a group
        y_grad = y_grad.reshape([batch, groups, outputs // groups, height * width])
        kernel = weight.astype(dtype).reshape([groups, outputs // groups, channels, 9])
        kernels = kernel.unbind(axis=3)  # 9 x [groups, O/groups, C/groups]

        leaves = [_leaf(x) for x in inputs[:2]]
        with paddle.enable_grad():
            bordered = [None if x is None else _bordered(x) for x in leaves]
        maps = u, v = [_leaf(x) for x in bordered]
        weight_grads = [paddle.zeros_like(kernels[0])] * 9  # the gradient of the centre stays zero

        for direction in DIRECTIONS:
            with paddle.enable_grad():
                edges = _edges(u, v, direction, ctx.similarity)
            rows_of_edges, columns_of_edges = edges.shape[2:]
            edges_grad: Any = 0.0
            for sign, (row, column), rows, columns in taps(direction):
                place = 3 * row + column
                used = _window(edges.detach(), rows, columns).astype(dtype)
                used = used.reshape([batch, groups, channels, height * width])
                product = paddle.matmul(y_grad, used, transpose_y=True)  # [B, groups, O/g, C/g]
                weight_grads[place] = sign * product.sum(axis=0)
                back = paddle.matmul(kernels[place], y_grad, transpose_x=True)  # [B, g, C/g, H*W]
                back = back.reshape([batch, groups * channels, height, width])
                top, left = rows.start or 0, columns.start or 0
                bottom, right = rows_of_edges - height - top, columns_of_edges - width - left
                # All eight numbers, because Paddle's padding of only two axes is twenty times
                # slower.
                edges_grad += sign * F.pad(back, [0, 0, 0, 0, top, bottom, left, right])
            if not edges.stop_gradient:
                # Adds to the gradients of `maps`. (paddle.grad inside paddle.grad crashes.)
                edges.backward(edges_grad.astype(edges.dtype))

        for x, map_ in zip(bordered, maps, strict=True):
            # None: v without similarity
            if x is not None and map_ is not None and map_.grad is not None:
                x.backward(map_.grad)
        weight_grad = None
        if not weight.stop_gradient:
            weight_grad = paddle.stack(weight_grads, axis=3).reshape(weight.shape)
            weight_grad = weight_grad.astype(weight.dtype)
        return (*[x.grad for x in leaves if x is not None], weight_grad)


def _leaf(x: Tensor | None) -> Tensor | None:
    """Return the same numbers as the start of a new graph; constant if x is constant."""
    if x is None:
        return None
    leaf = x.detach()
    leaf.stop_gradient = x.stop_gradient
    return leaf


def semantic_difference(
    u: Tensor, v: Tensor | None, weight: Tensor, similarity: str, groups: int = 1
) -> Tensor:
    """Compute the sum over neighbours in the module's docstring.

    Args:
        u: features `[B, C, H, W]`.
        v: guidance `[B, C, H, W]` in units of lambda; any number of channels for `cosine` and
            `product`, None for `none`.
        weight: `[O, C/groups, 3, 3]`, row and column of q - p from -1 to 1. The centre has no
            effect.
        similarity: a name of `SIMILARITIES`.
        groups: as in `paddle.nn.functional.conv2d`. Default 1.

    Returns:
        `[B, O, H, W]` in u's type; differences and similarities are computed in float32 under AMP.
        Exactly zero if u is constant. In a traced graph without similarity it is zero up to
        rounding, because there it is one convolution.

    Raises:
        ValueError: an unknown similarity.
    """
    _check_similarity(similarity)
    of = SIMILARITIES[similarity]
    if of is None and not paddle.in_dynamic_mode():
        return _central_difference(u, weight, groups)
    # A graph that is traced or not trained needs no stored inputs, and neither does an empty batch.
    if paddle.in_dynamic_mode() and paddle.is_grad_enabled() and u.shape[0]:
        return _SemanticDifference.apply(u, v, weight, of, groups)
    return _sum_of_differences(u, v, weight, of, groups)


# -- layers ----------------------------------------------------------------------------------------


def _check_counts(**counts: object) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(
                f"{name}: expected a whole number of at least 1, got {shorten(count)}."
            )


@paddle.jit.not_to_static  # it would turn the sizes of a graph into tensors
def _check_guidance(v: Tensor, u: Tensor) -> None:
    if len(v.shape) != 4 or (v.shape[0] != u.shape[0] and -1 not in (v.shape[0], u.shape[0])):
        raise InputError(
            f"guidance: expected [B, C, h, w] for as many images as u {list(u.shape)}, got "
            f"{list(v.shape)}."
        )


def _check_channels(name: str, x: Tensor, channels: int | None) -> None:
    if len(x.shape) != 4 or x.shape[1] != channels:
        raise InputError(
            f"{name}: expected [B, {channels}, H, W], as this layer was made, got {list(x.shape)}. "
            f"Make it with the channels of the {name}."
        )


class SemanticDifferenceConv2D(nn.Layer):
    """The semantic difference convolution (SDC): a 3x3 convolution of similarity-weighted
    differences between a pixel and its neighbours.

    Args:
        in_channels: channels of u (and of v, except for `cosine`, `product` and `none`).
        out_channels: channels of the result.
        similarity: weight of a difference. It depends on the distance d of the guidance, in units
            of a learned lambda. The paper has a lambda; we chose its initial value 1.

            - `gaussian` (default): exp(-d^2 / 2), per channel;
            - `charbonnier`: 1 / sqrt(1 + d^2);
            - `perona_malik`: 1 / (1 + d^2);
            - `cosine`: (1 + cos(V_p, V_q)) / 2, one number for all channels, no lambda;
            - `product`: the sum over channels of V_p V_q, one number for all channels, no lambda.
              For roots of probabilities it is the Bhattacharyya coefficient: 1 if the class
              distributions are equal, 0 if they share no class;
            - `increasing`: 1 - charbonnier, which responds at semantic edges;
            - `none`: 1, without guidance: central difference convolution.
        groups: as in `paddle.nn.Conv2D`; with `in_channels` groups it is depthwise. Default 1.

    Shapes: u `[B, in_channels, H, W]`, v `[B, in_channels, h, w]` of any size, enlarged bilinearly
    to u's -> `[B, out_channels, H, W]`. No bias: a BatchNorm follows it.

    Raises:
        ValueError: the similarity is unknown, numbers do not fit, a feature or guidance has another
            number of channels or images, or the guidance is missing.

    Source: SDN, NeurIPS 2022 (see the module). Replicate padding is our choice.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        similarity: str = "gaussian",
        groups: int = 1,
    ) -> None:
        super().__init__()
        _check_counts(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise InputError(
                f"groups: expected a divisor of both {in_channels} and {out_channels} channels, "
                f"got {groups}."
            )
        _check_similarity(similarity)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.similarity, self.groups = similarity, groups
        self.weight = self.create_parameter(
            [out_channels, in_channels // groups, 3, 3],
            default_initializer=nn.initializer.KaimingUniform(),
        )
        if similarity not in _WITHOUT_SCALE:
            # softplus(0.5413) = 1
            self.raw_lambda = self.create_parameter(
                [1], default_initializer=nn.initializer.Constant(0.541324854612918)
            )

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        guidance = self.guidance(u, v)
        return semantic_difference(u, guidance, self.weight, self.similarity, self.groups)

    def guidance(self, u: Tensor, v: Tensor | None) -> Tensor | None:
        """Return `v` in units of lambda and at the size of `u`; None for similarity `none`."""
        _check_channels("feature", u, self.in_channels)
        if self.similarity == "none":
            return None
        if v is None:
            raise InputError(
                f"similarity {self.similarity}: expected a guidance v, got none. Pass one, or take "
                "similarity none (central differences)."
            )
        _check_guidance(v, u)
        if self.similarity not in _OF_VECTORS and v.shape[1] != self.in_channels:
            raise InputError(
                f"guidance: expected {self.in_channels} channels like u, got {v.shape[1]}. Project "
                "it first (SemanticDiffusion does), or take similarity cosine."
            )
        if hasattr(self, "raw_lambda"):
            v = v / F.softplus(self.raw_lambda).astype(v.dtype)
        return _enlarged(v, u)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, similarity={self.similarity}, "
            f"groups={self.groups}"
        )


@paddle.jit.not_to_static
def _enlarged(v: Tensor, u: Tensor) -> Tensor:
    """Return `v` at the height and width of `u`."""
    if paddle.in_dynamic_mode():
        size = u.shape[2:]
        return v if v.shape[2:] == size else F.interpolate(v, size, mode="bilinear")
    if -1 not in u.shape[2:] and u.shape[2:] == v.shape[2:]:
        return v
    return F.interpolate(v, paddle.shape(u)[2:], mode="bilinear")


class PlainConv2D(nn.Conv2D):
    """A 3x3 convolution with the interface of `SemanticDifferenceConv2D`; it ignores the
    guidance."""

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        return super().forward(u)


WIDEST = 512  # largest default number of channels of a semantic difference convolution
OPERATORS = ("difference", "convolution")


class SemanticDiffusion(nn.Layer):
    """SDN: adds the output of a semantic difference convolution to a feature map.

    Args:
        channels: channels of the feature u.
        guidance_channels: channels of the guidance v. Default None: no v is passed. The feature is
            then its own guidance, after a 3x3 convolution of stride 2 (the paper's single-scale
            form), if the similarity needs one.
        similarity: see `SemanticDifferenceConv2D`. With `none` there is no guidance. With `product`
            the guidance is used without a projection. Default None: `gaussian` with
            `guidance_channels`, `none` without.
        groups: groups of the semantic difference convolution. Default 1.
        width: channels inside the semantic difference convolution. If they differ from `channels`,
            a 1x1 convolution comes first. Default None: as many as u, but at most 512. We chose
            this limit because of the cost.
        operator: `difference` (default), or `convolution` for comparisons: a plain 3x3 convolution,
            widened so that the layer has as many parameters as SDN with these options.
        steps: number of diffusion steps, with the same weights and guidance. Default 1.
        detach_guidance: stop the gradient at the guidance. Default False.

    Shapes: u `[B, channels, H, W]`, v `[B, guidance_channels, h, w]` of any size -> as u.

    The last convolution starts at zero, so an untrained layer returns exactly u. We chose this
    form; the paper's `Conv1x1(concat[...])` without `U +` can express the same functions.

    Raises:
        ValueError: see `SemanticDifferenceConv2D`; the operator is unknown; similarity `product`
            needs `guidance_channels`; `detach_guidance` without a guidance; a guidance was passed
            to a layer without `guidance_channels`, or not passed to a layer with them.

    Source: SDN, NeurIPS 2022 (see the module).
    """

    def __init__(
        self,
        channels: int,
        guidance_channels: int | None = None,
        *,
        similarity: str | None = None,
        groups: int = 1,
        width: int | None = None,
        operator: str = "difference",
        steps: int = 1,
        detach_guidance: bool = False,
    ) -> None:
        super().__init__()
        _check_counts(channels=channels, steps=steps)
        width = min(channels, WIDEST) if width is None else width
        _check_counts(width=width)
        if guidance_channels is not None:
            _check_counts(guidance_channels=guidance_channels)
        if operator not in OPERATORS:
            raise InputError(
                f"operator: expected one of {', '.join(OPERATORS)}, got {shorten(operator)}."
            )
        if similarity is None:
            similarity = "none" if guidance_channels is None else "gaussian"
        if detach_guidance and similarity == "none":
            raise InputError(
                "detach_guidance: expected a similarity with a guidance, got none. Write a "
                "similarity such as gaussian, or leave detach_guidance out."
            )
        self.channels, self.guidance_channels = channels, guidance_channels
        self.steps, self.detach_guidance = steps, bool(detach_guidance)
        self.difference = SemanticDifferenceConv2D(
            width, width, similarity=similarity, groups=groups
        )
        self.reduce = (
            nn.Identity() if width == channels else nn.Conv2D(channels, width, 1, bias_attr=False)
        )
        self.guide = self._make_guide(width)
        if operator == "convolution":
            plain = self._equal_width(width)
            self.difference = PlainConv2D(width, plain, 3, padding=1, bias_attr=False)
            self.guide, width = None, plain
        self.norm = nn.BatchNorm2D(width)
        zero = nn.initializer.Constant(0.0)
        self.fuse = nn.Conv2D(
            channels + width,
            channels,
            1,
            weight_attr=paddle.ParamAttr(initializer=zero),
            bias_attr=paddle.ParamAttr(initializer=zero),
        )

    def _make_guide(self, width: int) -> nn.Layer | None:
        """Make the layer that computes the guidance from its source; None if there is none."""
        similarity = self.difference.similarity
        if similarity == "product" and self.guidance_channels is None:
            raise InputError(
                "similarity product: expected guidance_channels, since it takes a guidance as it "
                "is, such as class scores; got None. Take guidance classes or boundary."
            )
        if similarity in ("product", "none"):
            return None
        kernel, stride = (1, 1) if self.guidance_channels is not None else (3, 2)
        return nn.Sequential(
            nn.Conv2D(
                self.guidance_channels or self.channels,
                width,
                kernel,
                stride=stride,
                padding=kernel // 2,
                bias_attr=False,
            ),
            nn.BatchNorm2D(width),
        )

    def _equal_width(self, width: int) -> int:
        """Return the number of outputs of a plain convolution with as many parameters as SDN (with
        BatchNorm and fusion)."""
        replaced = [self.difference] if self.guide is None else [self.difference, self.guide]
        trained = sum(p.size for x in replaced for p in x.parameters() if not p.stop_gradient)
        trained += 2 * width + width * self.channels  # BatchNorm, and the part of the fusion for y
        return round(trained / (9 * width + 2 + self.channels))

    def forward(self, u: Tensor, v: Tensor | None = None) -> Tensor:
        if (v is None) != (self.guidance_channels is None):
            raise InputError(
                f"guidance: this layer was made with guidance_channels={self.guidance_channels}; "
                f"expected {'none' if v is not None else 'one'}."
            )
        _check_channels("feature", u, self.channels)
        if v is not None:
            _check_channels("guidance", v, self.guidance_channels)
        guidance = u if v is None else v
        if self.detach_guidance:
            guidance = guidance.detach()
        if self.guide is not None:
            guidance = self.guide(guidance)
        for _ in range(self.steps):
            y = self.difference(self.reduce(u), guidance)  # [B, width, H, W]
            y = F.relu(self.norm(y))
            u = u + self.fuse(paddle.concat([u, y], axis=1))
        return u


# -- guidance by a head of its own -----------------------------------------------------------------

GUIDANCES = ("next_level", "classes", "boundary")
_SIMILARITY_OF = {"next_level": "gaussian", "classes": "product", "boundary": "product"}


class GuidanceHead(nn.Layer):
    """A linear classifier of every pixel from all levels, at the size of the finest level.

    Args:
        feat_channels: channels of the levels, from fine to coarse.
        outputs: classes, or 1 for boundaries.

    Shapes: a list of `[B, feat_channels[i], H_i, W_i]` -> logits `[B, outputs, H_0, W_0]`.
    """

    def __init__(self, feat_channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.scores = nn.LayerList(nn.Conv2D(channels, outputs, 1) for channels in feat_channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        total = self.scores[0](features[0])
        for score, feature in zip(self.scores[1:], features[1:]):  # noqa: B905 (to_static)
            total = total + _enlarged(score(feature), total)
        return total


def guidance_of(logits: Tensor, guidance: str) -> Tensor:
    """Return the guidance for similarity `product`, in float32.

    Args:
        logits: `[B, K, H, W]` of a `GuidanceHead`.
        guidance: `classes`: roots of the classes' probabilities; `boundary`: the probability of not
            being a boundary.
    """
    logits = logits.astype("float32")
    if guidance == "classes":
        return paddle.exp(0.5 * F.log_softmax(logits, axis=1))
    return F.sigmoid(-logits)


class SemanticDiffusionPyramid(nn.Layer):
    """One SDN for each chosen level of a feature pyramid.

    Args:
        feat_channels: channels of the levels, from fine to coarse.
        levels: levels to enhance; negative numbers count from the coarsest. Default None: all. For
            a decoder that reads only one level, choose only that level.
        guidance: `next_level`: level i + 1 of the backbone; the coarsest level guides itself.
            `classes`: class scores of a `GuidanceHead` over all levels. `boundary`: the probability
            of such a head that a pixel is not a boundary. A head needs its own loss, on `logits`.
            Default None: `next_level` if `similarity` is given and is not `none`, otherwise no
            guidance.
        num_classes: number of classes for the guidance `classes`.
        similarity: see `SemanticDifferenceConv2D`. Default None: `none` (central differences)
            without a guidance, because no guidance had a higher score in our runs (`docs/sdn.md`);
            `gaussian` for the guidance `next_level`, `product` for the others.
        groups, width, operator, steps, detach_guidance: see `SemanticDiffusion`.

    Shapes: a list of `[B, feat_channels[i], H_i, W_i]` -> the same; levels not chosen pass through.

    Attributes:
        logits: in training, the logits of the guidance's head in the last forward pass,
            `[[B, K, H_0, W_0]]`; otherwise an empty list.

    Raises:
        ValueError: a level does not exist or is named twice; the number of features is wrong; the
            guidance is unknown, or guidance `classes` has no `num_classes`.

    Source: SDN, NeurIPS 2022: one module per level, the next one as guidance.
    """

    def __init__(
        self,
        feat_channels: Sequence[int],
        levels: Sequence[int] | None = None,
        *,
        guidance: str | None = None,
        num_classes: int | None = None,
        similarity: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        count = len(feat_channels)
        if levels is not None and not isinstance(levels, (list, tuple)):
            raise InputError(
                f"levels: expected a list of numbers or None, got {shorten(levels)}. Write [0] for "
                "one."
            )
        chosen = list(range(count)) if levels is None else list(levels)
        for level in chosen:
            if isinstance(level, bool) or not isinstance(level, int) or not -count <= level < count:
                raise InputError(
                    f"levels: expected numbers from 0 to {count - 1} (or from -{count} to -1) for "
                    f"a backbone of {count} feature maps, got {shorten(levels)}."
                )
        chosen = [level % count for level in chosen]
        if not chosen:
            raise InputError(
                f"levels: expected at least one, got {shorten(levels)}. None takes all."
            )
        if len(set(chosen)) != len(chosen):
            raise InputError(
                f"levels: expected each once, got {shorten(levels)}, which is {chosen} of {count} "
                "feature maps."
            )
        if guidance not in (None, *GUIDANCES):
            raise InputError(
                f"guidance: expected one of {', '.join(GUIDANCES)}, got {shorten(guidance)}."
            )
        if similarity is None:
            similarity = "none" if guidance is None else _SIMILARITY_OF[guidance]
        guidance = guidance or "next_level"
        self.levels = sorted(chosen)
        self.feat_channels = list(feat_channels)
        self.guidance = guidance
        self.logits: list[Tensor] = []
        channels = [*feat_channels[1:], None]  # channels of the guidance of each level
        if guidance != "next_level":
            outputs = num_classes if guidance == "classes" else 1
            _check_counts(num_classes=outputs)
            assert outputs is not None  # refused by the check
            self.guidance_head = GuidanceHead(feat_channels, outputs)
            channels = [outputs] * count
        self.diffusions = nn.LayerList(
            SemanticDiffusion(
                feat_channels[level], channels[level], similarity=similarity, **options
            )
            for level in self.levels
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        if not isinstance(features, (list, tuple)) or len(features) != len(self.feat_channels):
            got = len(features) if isinstance(features, (list, tuple)) else type(features).__name__
            raise InputError(
                f"features: expected a list of {len(self.feat_channels)} maps of "
                f"{self.feat_channels} channels, got {got}. A backbone returns a list, even for "
                "one map."
            )
        guides = [*features[1:], None]
        if self.guidance != "next_level":
            logits = self.guidance_head(features)
            self._keep(logits)
            guides = [guidance_of(logits, self.guidance)] * len(features)
        result = list(features)
        for level, diffusion in zip(self.levels, self.diffusions):  # noqa: B905 (to_static)
            result[level] = diffusion(features[level], guides[level])
        return result

    @paddle.jit.not_to_static
    def _keep(self, logits: Tensor) -> None:
        self.logits = [logits] if self.training else []


def advise_on_guidance(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return advice if only one of a model and its weights has SDN's guidance, or "".

    Args:
        missing: names of layers or tensors that only the model has.
        unexpected: names that only the weights have.
    """
    if any(map(_is_of_guidance, unexpected)):
        return (
            " The weights have the guidance of SDN, the model has none: write `similarity` in the "
            "config as in training (`similarity: gaussian` if that config has none: it was the "
            "default)."
        )
    if missing and all(map(_is_of_guidance, missing)):
        return (
            " The model has the guidance of SDN, the weights have none: write `similarity` in the "
            "config as in training (`similarity: none` if that config has none)."
        )
    return ""


def _is_of_guidance(name: str) -> bool:
    return ".guide." in name or name.endswith(".raw_lambda")
