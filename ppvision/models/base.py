"""The common interface of all models of the zoo. It follows PyTorch's timm.

A model names its stages once (`ZooModel.declare`); feature maps, a new head, frozen stages, groups
of layers for an optimiser and recomputation follow from that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import paddle
from paddle import Tensor, nn

from ppvision.arguments import check_flag
from ppvision.errors import InputError, shorten
from ppvision.nn import DropPath

if TYPE_CHECKING:
    from ppvision.zoo.cards import PretrainedConfig


@dataclass(frozen=True)
class Stage:
    """A part of a network after which a feature map can be taken.

    Attributes:
        channels: channels of the map.
        stride: number of pixels of the image per pixel of the map, on both axes.
        groups: the stage's layers in order, as tuples of paths that belong together (the layers of
            one block); optimisers give each group a learning rate.
    """

    channels: int
    stride: int
    groups: tuple[tuple[str, ...], ...]


class FeatureInfo(list[dict[str, Any]]):
    """One dictionary for each feature map: `num_chs`, `reduction` (its stride) and `module` (the
    path of the last layer before it). The names are timm's."""

    def channels(self) -> list[int]:
        return [entry["num_chs"] for entry in self]

    def reduction(self) -> list[int]:
        return [entry["reduction"] for entry in self]

    def module_name(self) -> list[str]:
        return [entry["module"] for entry in self]


class ZooModel(nn.Layer):
    """A classifier, or with `features_only` a feature pyramid.

    A subclass calls `declare` first in its constructor and defines `forward_stages`. If layers
    follow the stages, it overrides `forward_features` (before the head) and `forward_pyramid`.

    Attributes:
        in_channels: channels of the image.
        num_classes: outputs of the head; 0 without a head.
        num_features: channels of `forward_features`.
        feature_info: see `FeatureInfo`; for the maps that `features_only` returns, or for all.
        feat_channels: channels of these maps.
        feat_strides: their strides.
        out_indices: numbers of these maps among the stages.
        pretrained_cfg: the input that the model expects, and the source of its weights;
            `create_model` sets it.
    """

    # Attributes of the class: the convolution that reads the image, the Linear of the classes, and
    # the layers before the first stage.
    first_conv: ClassVar[str]
    classifier: ClassVar[str]
    stem_layers: ClassVar[tuple[str, ...]]
    # Layers that may follow the stages, in a classifier or in a pyramid.
    behind_stages: ClassVar[tuple[str, ...]]
    # For weights of a PyTorch port: patterns of names and their replacements.
    torch_names: ClassVar[tuple[tuple[str, str], ...]] = ()

    pretrained_cfg: "PretrainedConfig | None" = None

    if TYPE_CHECKING:
        # nn.Layer declares every attribute, because parameters and sublayers become attributes. A
        # type checker would then accept a misspelt method of a model.
        __getattr__: Any

    def declare(
        self,
        stages: Sequence[Stage],
        *,
        num_classes: int,
        num_features: int | None = None,
        in_channels: int,
        features_only: bool,
        out_indices: Sequence[int] | None,
        recompute: bool,
    ) -> int:
        """Check the options that all models share, and set the attributes.

        Args:
            stages: all stages of the network.
            num_classes: outputs of the head, 0 for none.
            num_features: channels before the head; None: those of the last stage.
            in_channels: channels of the image.
            features_only: return feature maps instead of logits.
            out_indices: which ones, from the finest; negative numbers count from the last. None for
                all.
            recompute: see `set_grad_checkpointing`.

        Returns:
            The number of stages to build: stages after the last needed map are omitted.

        Raises:
            ValueError: a number out of its range, or `out_indices` without `features_only`.
        """
        num_classes = _as_count("num_classes", num_classes, 0)
        in_channels = _as_count("in_channels", in_channels, 1)
        if out_indices is not None and not features_only:
            raise InputError(
                "out_indices: names feature maps, which only features_only=True returns. Pass both."
            )
        chosen = _checked_indices(out_indices, len(stages))
        self.in_channels = in_channels
        self.num_classes = 0 if features_only else num_classes
        self.features_only = features_only
        self.out_indices = chosen
        self.recompute = recompute
        built = chosen[-1] + 1
        self._declared, self._left_out = tuple(stages[:built]), tuple(stages[built:])
        self.feature_info = FeatureInfo(
            {
                "num_chs": stages[i].channels,
                "reduction": stages[i].stride,
                "module": stages[i].groups[-1][-1],
            }
            for i in chosen
        )
        self.feat_channels = self.feature_info.channels()
        self.feat_strides = self.feature_info.reduction()
        before_head = stages[-1].channels if num_features is None else num_features
        self.num_features = self.feat_channels[-1] if features_only else before_head
        return built

    # -- forward -----------------------------------------------------------------------------------

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The output of each stage that was built: `[B, C_i, H / s_i, W / s_i]`."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the input of the head: `[B, num_features, H / s, W / s]`."""
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits from `forward_features`.

        Args:
            x: `[B, num_features, H', W']`.
            pre_logits: stop before the head.

        Returns:
            `[B, num_classes]`; `[B, num_features]` with `pre_logits` or without a head.

        Raises:
            ValueError: a model with `features_only`, which has no head.
        """
        if self.features_only:
            raise InputError(
                "forward_head: expected a classifier, got a model with features_only, which has no "
                "head. Create it without."
            )
        x = x.mean(axis=[2, 3])  # [B, num_features]
        return x if pre_logits else getattr(self, self.classifier)(x)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The feature maps of `out_indices`."""
        stages = self.forward_stages(x)
        return [stages[i] for i in self.out_indices]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.forward_pyramid(x)
        return self.forward_head(self.forward_features(x))

    def run_block(self, block: nn.Layer, x: Tensor) -> Tensor:
        """Run a block; if wanted, its activations are computed again in the backward pass."""
        # A block after frozen blocks runs without recompute: recompute would take an input without
        # a gradient to mean that the block needs none, and would not train its parameters.
        if self.recompute and self.training and not x.stop_gradient:
            return paddle.distributed.fleet.utils.recompute(_run_twice(block), x)
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations inside blocks again in the backward pass: do not keep them.

        This needs less memory, but runs the forward pass of the blocks twice.

        Raises:
            TypeError: the value is not True or False.
        """
        self.recompute = check_flag(enable, "enable")

    # -- the head ----------------------------------------------------------------------------------

    @staticmethod
    def init_weights(layer: nn.Layer) -> None:
        """Initialise the weights of one layer if the model's initial values differ from
        Paddle's."""

    def make_head(self, num_classes: int) -> nn.Layer:
        """Make a Linear, or for 0 classes a layer that does nothing."""
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a head with fresh weights.

        Args:
            num_classes: outputs of the head; 0: the model returns the pooled features
                `[B, num_features]`.

        Raises:
            ValueError: a model with `features_only`, or a number out of range.
        """
        if self.features_only:
            raise InputError(
                "reset_classifier: expected a classifier, got a model with features_only, which "
                "has no head. Create it without."
            )
        num_classes = _as_count("num_classes", num_classes, 0)
        head = self.make_head(num_classes)
        head.apply(self.init_weights)
        self.num_classes = num_classes
        setattr(self, self.classifier, head)
        if self.pretrained_cfg is not None:  # a new head has no names of classes
            self.pretrained_cfg = replace(self.pretrained_cfg, num_classes=num_classes, classes=())

    # -- optimisers and fine-tuning ----------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: norms and biases."""
        # Paddle counts BatchNorm's running statistics as parameters; they are not trained.
        return {
            name
            for name, p in self.named_parameters()
            if p.ndim <= 1 and not name.endswith(("._mean", "._variance"))
        }

    def layer_groups(self) -> list[list[str]]:
        """Return names of parameters in groups, from the image to the classes: the stem, each
        block, and the layers after the stages (norms, head)."""
        paths = [self.stem_layers, *(group for stage in self._declared for group in stage.groups)]
        groups: list[list[str]] = [[] for _ in range(len(paths) + 1)]
        for name, _ in self.named_parameters():
            place = next((i for i, group in enumerate(paths) if _is_below(name, group)), -1)
            groups[place].append(name)
        return groups

    def paths_not_built(self) -> list[str]:
        """Return paths of layers that only the whole network has: those after the stages, or in
        stages that `out_indices` excludes."""
        unbuilt = [path for stage in self._left_out for group in stage.groups for path in group]
        return [*self.behind_stages, *unbuilt]

    def freeze(self, stages: int) -> None:
        """Freeze the first stages while the rest is trained.

        Their parameters get no gradient. Their BatchNorms use the running statistics and do not
        change them. Dropout and stochastic depth are off in them. Frozen stages stay frozen: a
        second call can only freeze more.

        Args:
            stages: -1 for none, 0 for the stem, k for the stem and the first k stages.

        Raises:
            ValueError: a number out of range.
        """
        known = len(self._declared)
        whole = isinstance(stages, int) and not isinstance(stages, bool)
        if not whole or not -1 <= stages <= known:
            raise InputError(
                f"frozen_stages: expected a whole number from -1 (none) to {known}, got "
                f"{shorten(stages)}."
            )
        if stages < 0:
            return
        paths = [*self.stem_layers]
        paths += [path for s in self._declared[:stages] for group in s.groups for path in group]
        for name, parameter in self.named_parameters():
            if _is_below(name, paths):
                parameter.stop_gradient = True
        for name, layer in self.named_sublayers():
            if _is_below(name, paths):
                _rest_norm(layer)
                if isinstance(layer, DropPath):
                    layer.drop_prob = 0.0

    def freeze_norms(self) -> None:
        """Let every BatchNorm use its running statistics in training without changing them.

        This is for batches that are too small for their own statistics. Weights and biases are
        still trained."""
        for layer in self.sublayers():
            _rest_norm(layer)


def check_rate(name: str, rate: object) -> None:
    """Raise `InputError` unless this is a valid probability of dropping."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise InputError(
            f"{name}: expected a number of at least 0 and below 1, got {shorten(rate)}."
        )


def _as_count(name: str, value: object, least: int) -> int:
    """Return a whole number; NumPy's are accepted too."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(
            f"{name}: expected a whole number of at least {least}, got {shorten(value)}."
        )
    return int(value)


def _checked_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if out_indices is None:
        return tuple(range(count))
    listed = isinstance(out_indices, Sequence | np.ndarray) and not isinstance(out_indices, str)
    given = list(out_indices) if listed else []
    whole = all(
        isinstance(i, Integral) and not isinstance(i, bool) and -count <= i < count for i in given
    )
    chosen = [int(i) % count for i in given] if whole else []
    if not chosen or sorted(set(chosen)) != chosen:
        raise InputError(
            f"out_indices: expected numbers from 0 to {count - 1}, the finest first, or from "
            f"{-count} to -1 to count from the last; got {shorten(out_indices)}."
        )
    return tuple(chosen)


def _is_below(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _rest_norm(layer: nn.Layer) -> None:
    # Not `training`: the train() of a model around this one sets that of every layer.
    if isinstance(layer, nn.BatchNorm2D):
        layer._use_global_stats = True


def _run_twice(block: nn.Layer) -> Callable[[Tensor], Tensor]:
    """Wrap `block` for recompute, so that its second run does not change BatchNorm's running
    statistics."""
    runs = 0

    def run(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 1:
            return block(x)
        norms = [layer for layer in block.sublayers() if isinstance(layer, nn.BatchNorm2D)]
        momenta = [norm._momentum for norm in norms]
        for norm in norms:
            norm._momentum = 1.0  # no change of the running statistics
        try:
            return block(x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm._momentum = momentum

    return run
