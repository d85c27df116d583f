"""Which losses, metrics and models of PaddleSeg run here: every one of them is tried.

    python benchmark/paddleseg_compatibility.py            # all, and rewrites docs/compatibility.md
    python benchmark/paddleseg_compatibility.py model:FCN  # some, printed only

Each attempt is made twice, in a process without `ppvision.plugins.shims` and in one with them:

    loss      forward and backward on logits of 2 x 6 x 24 x 24 or what else it takes
    metric    one call on 2 x 24 x 24 predictions
    model     one optimisation step at 2 x 3 x 64 x 64, then inference in eval mode

A model that takes a `backbone` gets a Pale feature pyramid; one whose code asks for something else
of its backbone is tried with Pale first and then with the backbone that it was written for.
Models are stepped with Paddle's own cross entropy, so that no fault of a loss is charged to them.
"""

import argparse
import copy
import importlib.metadata
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TIME_LIMIT = 240.0  # seconds for one attempt; the slowest takes a tenth of it
BATCH, CLASSES, SIDE = 2, 6, 24  # losses and metrics
PICTURE = 64  # models


def _random(*shape: int):
    import paddle

    return paddle.rand(shape)


def _logits(channels: int = CLASSES, side: int = SIDE):
    import paddle

    x = paddle.randn([BATCH, channels, side, side])
    x.stop_gradient = False
    return x


def _labels(classes: int = CLASSES, side: int = SIDE, ignored: bool = True):
    """Vertical bands, one a class, the two top rows ignored."""
    import paddle

    y = np.broadcast_to(np.arange(side) * classes // side, (BATCH, side, side)).astype("int64")
    if ignored:
        y = y.copy()
        y[:, :2] = 255
    return paddle.to_tensor(y)


def _points():
    import paddle

    logits = paddle.randn([BATCH, CLASSES, 10])
    logits.stop_gradient = False
    return logits, _random(BATCH, 10, 2)


def _queries():
    """What MaskFormer predicts: 6 queries, and one auxiliary output."""
    import paddle

    def output() -> dict:
        parts = {
            "pred_logits": paddle.randn([BATCH, 6, CLASSES + 1]),
            "pred_masks": paddle.randn([BATCH, 6, SIDE // 4, SIDE // 4]),
        }
        for part in parts.values():
            part.stop_gradient = False
        return parts

    return {**output(), "aux_outputs": [output()]}


def _masks(side: int = SIDE) -> dict:
    """Two masks a picture and one empty place, as PaddleSeg's `GenerateInstanceTargets` makes."""
    import paddle

    masks = np.zeros((BATCH, 3, side, side), "int64")
    masks[:, 0, : side // 2] = 1
    masks[:, 1, side // 2 :] = 1
    classes = np.tile(np.array([0, 2, 255], "int64"), (BATCH, 1))
    return {"gt_masks": paddle.to_tensor(masks), "gt_classes": paddle.to_tensor(classes)}


def _mixed(losses: dict) -> object:
    return losses["MixedLoss"]([losses["BCELoss"](), losses["DiceLoss"]()], [0.5, 0.5])


# Name and variant -> (constructor arguments, inputs).
Inputs = Callable[[], tuple]
_plain: Inputs = lambda: (_logits(), _labels())  # noqa: E731
_binary: Inputs = lambda: (_logits(2), _labels(2))  # noqa: E731
_edges: Inputs = lambda: ((_logits(), _random(BATCH, 1, SIDE, SIDE)), _labels())  # noqa: E731
_two: Inputs = lambda: (_logits(), _logits())  # noqa: E731
_WEIGHT = {"weight": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
LOSSES: dict[str, tuple[dict, Inputs]] = {
    "CrossEntropyLoss": ({}, _plain),
    "CrossEntropyLoss weight": (_WEIGHT, _plain),
    "CrossEntropyLoss top_k_percent_pixels": ({"top_k_percent_pixels": 0.3}, _plain),
    "DistillCrossEntropyLoss": ({}, lambda: (_logits(), _logits(), _labels())),
    "BCELoss": ({}, _plain),
    "BCELoss dynamic weights": (
        {"weight": "dynamic", "pos_weight": "dynamic"},
        lambda: (_logits(1), _labels(2)),
    ),
    "LovaszSoftmaxLoss": ({}, _plain),
    "LovaszHingeLoss": ({}, _binary),
    "DualTaskLoss": ({}, _plain),
    "EdgeAttentionLoss": ({}, _edges),
    "BootstrappedCrossEntropyLoss": ({"min_K": 50, "loss_th": 0.5}, _plain),
    "DiceLoss": ({}, _plain),
    "OhemCrossEntropyLoss": ({"min_kept": 100}, _plain),
    "RelaxBoundaryLoss": ({}, _plain),
    "RelaxBoundaryLoss calculate_weights": ({"calculate_weights": True}, _plain),
    "OhemEdgeAttentionLoss": ({"min_kept": 20}, _edges),
    "L1Loss": ({}, _two),
    "MSELoss": ({}, _two),
    "FocalLoss": ({}, _binary),
    "MultiClassFocalLoss": ({"num_class": CLASSES}, _plain),
    "KLLoss": ({}, _two),
    "RMILoss": ({"num_classes": CLASSES}, _plain),
    "DetailAggregateLoss": ({}, lambda: (_logits(1), _labels())),
    "PointCrossEntropyLoss": ({}, lambda: (_points(), _labels())),
    "PointCrossEntropyLoss weight": (_WEIGHT, lambda: (_points(), _labels(ignored=False))),
    "PixelContrastCrossEntropyLoss": (
        {"max_views": 20},
        lambda: ({"seg": _logits(), "embed": _logits(8)}, _labels()),
    ),
    "SECrossEntropyLoss": ({}, lambda: (_logits(side=1).flatten(1), _labels(ignored=False))),
    "SECrossEntropyLoss [N, C, 1, 1]": ({}, lambda: (_logits(side=1), _labels(ignored=False))),
    "SemanticConnectivityLoss": ({}, _plain),
    "MaskFormerLoss": ({"num_classes": CLASSES}, lambda: (_queries(), _masks())),
    "MixedLoss": ({}, _plain),
}


def try_loss(name: str) -> None:
    from paddleseg.cvlibs import manager

    losses = manager.LOSSES.components_dict
    arguments, inputs = LOSSES[name]
    kind = name.split()[0]
    loss = _mixed(losses) if kind == "MixedLoss" else losses[kind](**arguments)
    value = loss(*inputs())
    value = sum(value) if isinstance(value, list) else value
    value.backward()
    if not np.isfinite(float(value)):
        raise ArithmeticError(f"the loss is {float(value)}")


def try_metric(name: str) -> None:
    from paddleseg.utils import metrics

    label = _labels(ignored=False)
    prediction = _logits().argmax(1)
    if name == "calculate_area":
        areas = metrics.calculate_area(prediction, label, CLASSES)
        if [list(area.shape) for area in areas] != [[CLASSES]] * 3:
            raise ArithmeticError(f"expected three areas of {CLASSES}, got {areas}")
    elif name == "auc_roc":
        probabilities = np.full((BATCH, CLASSES, SIDE, SIDE), 1 / CLASSES)
        metrics.auc_roc(probabilities, label.unsqueeze(1).numpy(), CLASSES)
    else:
        import paddle

        area = paddle.to_tensor([3, 4, 5, 6, 7, 8])
        inputs = (area, area + 2, area + 1)
        getattr(metrics, name)(*inputs[: 2 if name == "accuracy" else 3])


def _cross_entropy(model, outputs: list, picture, label):
    import paddle.nn.functional as F

    return sum(F.cross_entropy(x, label, ignore_index=255, axis=1) for x in outputs)


def _at_label_size(model, outputs: list, picture, label):
    """For models whose own losses resize: outputs are brought to the label's size first."""
    import paddle.nn.functional as F

    return _cross_entropy(
        model,
        [F.interpolate(x, [PICTURE, PICTURE], mode="bilinear") for x in outputs],
        picture,
        label,
    )


def _first(model, outputs: list, picture, label):
    return _cross_entropy(model, outputs[:1], picture, label)


def _point_rend(model, outputs: list, picture, label):
    *whole, (points, _) = outputs
    return _cross_entropy(model, whole, picture, label) + points.square().mean()


def _contrast(model, outputs: list, picture, label):
    return _cross_entropy(model, outputs[:1], picture, label) + outputs[1]["embed"].square().mean()


def _se_loss(model, outputs: list, picture, label):
    *whole, code = outputs
    return _cross_entropy(model, whole, picture, label) + code.square().mean()


def _boundary(model, outputs: list, picture, label):
    *whole, detail = outputs
    return _cross_entropy(model, whole, picture, label) + detail.square().mean()


def _mask_former(model, outputs: list, picture, label):
    from paddleseg.cvlibs import manager

    losses = {"types": [manager.LOSSES["MaskFormerLoss"](num_classes=CLASSES)], "coef": [1]}
    data = {"img": picture, "label": label, "instances": _masks(PICTURE)}
    return sum(model.loss_computation(outputs, losses, data))


PYRAMID = [32, 64, 128, 256]  # channels of pale_nano
_ALL = {"backbone_indices": [0, 1, 2, 3]}
_NO_AUXILIARY = {"enable_auxiliary_loss": False}  # an auxiliary head for 1024 channels only
_NO_WEIGHTS = "a file without weights"  # its backbone's constructor opens one unconditionally
_VIT = {
    "type": "VisionTransformer",
    "img_size": 64,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "pretrained": _NO_WEIGHTS,
}
_RESNET = {"type": "ResNet18_vd", "output_stride": 8}


@dataclass(frozen=True)
class Model:
    """How to build and step one model class.

    Attributes:
        options: constructor arguments but for `num_classes` and `backbone`.
        pale: the Pale variant to feed, or None where the class takes no backbone.
        own: the backbone it was written for, where Pale's pyramid is not enough.
        own_options: constructor arguments with that backbone.
        objective: `(model, outputs, picture, label)` to the number that is minimised.
        classes: number of classes.
    """

    options: dict = field(default_factory=dict)
    pale: str | None = "pale_nano"
    own: dict | None = None
    own_options: dict = field(default_factory=dict)
    objective: Callable = _cross_entropy
    classes: int = CLASSES


def _alone(objective: Callable = _cross_entropy, **options: object) -> Model:
    return Model(options, pale=None, objective=objective)


_KNET = {
    "num_stages": 2,
    "kernel_generate_head_params": {
        "head_layer": "FCNKernelHead",
        "in_channels": PYRAMID[3],
        "channels": 32,
        "num_classes": CLASSES,
    },
    "kernel_update_head_params": {
        "num_classes": CLASSES,
        "in_channels": 32,
        "out_channels": 32,
        "feedforward_channels": 64,
        "conv_kernel_size": 1,
        "kernel_updator_cfg": {"in_channels": 32, "feat_channels": 32, "out_channels": 32},
    },
}
MODELS: dict[str, Model] = {
    "ANN": Model({"key_value_channels": 32, "inter_channels": 64}),
    "BiSeNetV2": _alone(),
    "DANet": Model({"backbone_indices": [2, 3]}),
    "DeepLabV3P": Model(),  # its decoder is written for 256 channels
    "DeepLabV3": Model({"aspp_out_channels": 32}),
    "FastSCNN": _alone(),
    "FCN": Model(),
    "GCNet": Model({"gc_channels": 64}),
    "OCRNet": Model({"backbone_indices": [0], "ocr_mid_channels": 64, "ocr_key_channels": 32}),
    "PSPNet": Model({"pp_out_channels": 64}),
    "GSCNN": Model(own=_RESNET, objective=_first),
    "UNet": _alone(),
    "HarDNet": _alone(),
    "U2Net": _alone(),
    "U2Netp": _alone(),
    "AttentionUNet": _alone(),
    "UNetPlusPlus": _alone(),
    "UNet3Plus": _alone(),
    "DecoupledSegNet": Model(objective=_first),
    "EMANet": Model({"ema_channels": 64, "gc_channels": 32, "num_bases": 8, **_NO_AUXILIARY}),
    "ISANet": Model({"isa_channels": 32, "down_factor": (2, 2), **_NO_AUXILIARY}),
    "DNLNet": Model(_NO_AUXILIARY),
    "SegmentationTransformer": Model(
        {"backbone_indices": [0, 1, 2, 3]}, own=_VIT, own_options={"backbone_indices": [0, 1, 2, 3]}
    ),
    "SFNet": Model(_ALL, own={"type": "ResNet18_vd"}, own_options=_ALL),
    "PPHumanSegLite": _alone(),
    "MLATransformer": Model({"in_channels": PYRAMID, "mlahead_channels": 32}),
    "PortraitNet": Model(own={"type": "MobileNetV2_x1_0"}),
    "STDCSeg": Model(own={"type": "STDC1"}, objective=_boundary),
    "SegFormer": Model({"embedding_dim": 32}),
    "PointRend": Model(
        {
            **_ALL,
            "fpn_inplanes": PYRAMID,
            "fpn_outplanes": 32,
            "point_in_channels": [32],
            "point_out_channels": 32,
            "point_num_points": 64,
            "point_subdivision_num_points": 64,
            "PFN_in_channels": [32] * 4,
            "PFN_channels": 32,
        },
        objective=_point_rend,
    ),
    "GINet": Model(own={"type": "ResNet50_vd"}),
    "LinearSegmenter": Model(own=_VIT),
    "MaskSegmenter": Model(
        {"h_embed_dim": 48, "h_depth": 1, "h_num_heads": 4},
        own=_VIT,
        own_options={"h_embed_dim": 48, "h_depth": 1, "h_num_heads": 4},
    ),
    "SegNet": _alone(),
    "ENCNet": Model({"mid_channels": 64, "num_codes": 8}, objective=_se_loss),
    "HRNetW48Contrast": Model(
        {"bb_channels": PYRAMID[0], "drop_prob": 0.1, "proj_dim": 16}, objective=_contrast
    ),
    "ESPNetV2": _alone(_at_label_size),
    "PPLiteSeg": Model(
        {
            "backbone_indices": [1, 2, 3],
            "cm_out_ch": 32,
            "arm_out_chs": [32, 32, 32],
            "seg_head_inter_chs": [32, 32, 32],
        }
    ),
    "DMNet": Model({"mid_channels": 32}, own=_RESNET, own_options={"mid_channels": 32}),
    "ESPNetV1": Model(pale=None, classes=19),  # its decoder is written for Cityscapes' 19
    "ENet": _alone(),
    "BiseNetV1": Model(pale="pale_tiny", own=_RESNET),
    "FastFCN": Model({"mid_channels": 32, "num_codes": 8}, objective=_se_loss),
    "PFPNNet": Model({**_ALL, "channels": 32, "fpn_inplanes": PYRAMID}),
    "GloRe": Model({"gru_num_state": 16, "gru_num_node": 8}),
    "DDRNet_23": _alone(),
    "CCNet": Model(),
    "MobileSeg": Model(),
    "UPerNet": Model({**_ALL, "channels": 32, "enable_auxiliary_loss": True}),
    "UPerNetCAE": Model(
        {
            **_ALL,
            "channels": 32,
            "fpn_channels": 32,
            "head_channels": PYRAMID[3],
            "channels_fpn": PYRAMID,
        },
        own={"type": "CAE", "img_size": 64, "depth": 4, "pretrained": _NO_WEIGHTS},
        own_options={
            "backbone_indices": [0, 1, 2, 3],
            "channels": 32,
            "fpn_channels": 32,
            "head_channels": 768,
            "channels_fpn": [768] * 4,
        },
    ),
    "SINet": _alone(),
    "LRASPP": Model(),
    "MscaleOCRNet": Model(),
    "TopFormer": Model(own={"type": "TopTransformer_Tiny", "lr_mult": 1.0}),
    "RTFormer": _alone(),
    "UPerNetViTAdapter": Model({**_ALL, "channels": 32, "aux_channels": 32}),
    "LPSNet": _alone(depths=[1, 1, 1, 1, 1], channels=[8, 8, 8, 8, 8], scale_ratios=[1.0, 0.5]),
    "MaskFormer": Model(
        own={"type": "SwinTransformer_tiny_patch4_window7_224_maskformer"}, objective=_mask_former
    ),
    "SegNeXt": Model(
        {
            "decoder_cfg": {
                "channels": 32,
                "ham_channels": 32,
                "num_groups": 4,
                "ham_kwargs": {"MD_R": 8, "MD_D": 32},
            }
        }
    ),
    "KNet": Model({"backbone_indices": [3], **_KNET}),
    "PPMobileSeg": Model(
        own={"type": "MobileSeg_Tiny", "inj_type": "AAMSx8", "out_feat_chs": [32, 64, 128]}
    ),
}


def _step(model, case: Model) -> None:
    """One optimisation step, then inference; raises where a number is not what it must be."""
    import paddle

    picture = _random(BATCH, 3, PICTURE, PICTURE)
    label = _labels(side=PICTURE)
    optimizer = paddle.optimizer.SGD(1e-3, parameters=model.parameters())
    model.train()
    outputs = model(picture)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    loss = case.objective(model, list(outputs), picture, label)
    if not np.isfinite(float(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}")
    loss.backward()
    backbone = getattr(model, "backbone", None)
    if backbone is not None and not any(p.grad is not None for p in backbone.parameters()):
        raise ArithmeticError("no gradient reaches the backbone")
    optimizer.step()
    model.eval()
    with paddle.no_grad():
        outputs = model(picture)
    if list(outputs[0].shape[1:]) != [case.classes, PICTURE, PICTURE]:
        raise ArithmeticError(
            f"inference: expected {case.classes} x {PICTURE} x {PICTURE}, got {outputs[0].shape}"
        )


def build_model(name: str, backbone: dict | None = None):
    """`name` is a class, or `class own` for its own backbone; `backbone` stands for Pale."""
    import paddle
    from paddleseg.cvlibs import manager

    name, _, own = name.partition(" ")
    case = MODELS[name]
    # A copy: some constructors take nested options apart.
    options = copy.deepcopy(case.own_options if own else case.options)
    if case.pale is not None:
        kind = dict(case.own) if own else dict(backbone or {"type": case.pale})
        with tempfile.NamedTemporaryFile(suffix=".pdparams") as empty:
            if kind.get("pretrained") == _NO_WEIGHTS:
                paddle.save({}, empty.name)
                kind["pretrained"] = empty.name
            options = {**options, "backbone": manager.BACKBONES[kind.pop("type")](**kind)}
    return manager.MODELS[name](num_classes=case.classes, **options)


def try_model(name: str) -> None:
    """`name`: as of `build_model`."""
    _step(build_model(name), MODELS[name.split()[0]])


def _message(error: BaseException) -> str:
    """Type and the line of a message that says what is wrong (Paddle buries it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("(", "Error Message", "InvalidArgument"))]
    line = (telling or lines or [""])[0]
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/paddleseg/" in frame.filename:
            place = f" ({frame.filename.rpartition('/paddleseg/')[2]}:{frame.lineno})"
            break
    line = line.partition(" (at /")[0].partition("; the filter's")[0]
    return f"{type(error).__name__}: {line[:220]}{place}"


KINDS = {"loss": try_loss, "metric": try_metric, "model": try_model}


def _work(connection, shimmed: bool) -> None:
    """A process that makes attempts, one after another, until it is told to stop."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    import paddle

    import ppvision.plugins.paddleseg  # noqa: F401
    from ppvision.plugins import shims

    if not shimmed:
        shims.remove(shims.PADDLESEG_SHIMS)
    connection.send("ready")
    for attempt in iter(connection.recv, None):
        kind, _, name = attempt.partition(":")
        paddle.seed(0)
        np.random.seed(0)
        try:
            KINDS[kind](name)
            connection.send("")
        except Exception as error:  # whatever a component raises is the finding
            connection.send(_message(error))


class Worker:
    """One `_work` process; a new one after a crash or a hang."""

    def __init__(self, shimmed: bool) -> None:
        self.shimmed = shimmed
        self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.shimmed), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def attempt(self, name: str) -> str:
        """The error's first line, empty where there was none."""
        if self.process is None:
            self._start()
        self.connection.send(name)
        try:
            if self.connection.poll(TIME_LIMIT):
                return self.connection.recv()
            result = f"no result after {TIME_LIMIT:.0f} s"
        except EOFError:
            self.process.join()
            result = f"the process ended with exit code {self.process.exitcode}"
        self.process.kill()
        self.process = None
        return result


def attempts() -> Iterator[str]:
    """Names of all attempts; fails if PaddleSeg has a class that no case covers."""
    import inspect

    import paddleseg.utils.metrics as metrics
    from paddleseg.cvlibs import manager

    functions = [n for n, f in inspect.getmembers(metrics, inspect.isfunction)]
    for kind, cases, known in (
        ("loss", {name.split()[0] for name in LOSSES}, manager.LOSSES.components_dict),
        ("model", MODELS, manager.MODELS.components_dict),
    ):
        if set(cases) != set(known):
            raise RuntimeError(
                f"{kind}: expected a case for each class of PaddleSeg; without one or unknown: "
                f"{', '.join(sorted(set(cases) ^ set(known)))}."
            )
    yield from (f"loss:{name}" for name in LOSSES)
    yield from (f"metric:{name}" for name in functions)
    for name, case in MODELS.items():
        yield f"model:{name}"
        if case.own is not None:
            yield f"model:{name} own"


@dataclass(frozen=True)
class Row:
    name: str
    backbone: str
    outcome: str
    note: str


def run(names: list[str]) -> dict[str, Row]:
    """Make the attempts, without shims and with them."""
    plain, shimmed = Worker(False), Worker(True)
    rows = {}
    for index, name in enumerate(names, start=1):
        start = time.perf_counter()
        before, after = plain.attempt(name), shimmed.attempt(name)
        outcome = "no" if after else "shimmed" if before else "unshimmed"
        kind, _, title = name.partition(":")
        backbone = ""
        if kind == "model":
            title, _, own = title.partition(" ")
            case = MODELS[title]
            backbone = case.own["type"] if own else case.pale or "takes none"
        rows[name] = Row(title, backbone, outcome, after or before)
        print(
            f"[{index}/{len(names)}] {name}: {outcome} ({time.perf_counter() - start:.1f} s) "
            f"{after or before}",
            flush=True,
        )
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(rows: list[Row], with_backbone: bool) -> list[str]:
    head = ["name", *(["backbone"] if with_backbone else []), "outcome", "error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"`{row.name}`", *([row.backbone] if with_backbone else []), row.outcome, row.note]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def document(rows: dict[str, Row]) -> str:
    """The part of docs/compatibility.md between the markers."""
    import ppvision.plugins.paddleseg  # noqa: F401
    from ppvision.environment import machine
    from ppvision.plugins import shims

    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("paddlepaddle", "paddleseg", "numpy")
    )
    lines = [
        BEGIN,
        "",
        f"{versions}, Python {platform.python_version()}; {machine()}; no GPU.",
        "",
    ]
    lines += ["### Shims that this Paddle needs", "", "| name | function |", "|---|---|"]
    lines += [
        f"| {name} | `{shims.PADDLESEG_SHIMS[name].target}` |"
        for name in shims.list_active_shims(shims.PADDLESEG_SHIMS)
    ]
    lines.append("")
    for kind, title in (("loss", "Losses"), ("metric", "Metrics"), ("model", "Models")):
        chosen = [row for name, row in rows.items() if name.startswith(f"{kind}:")]
        counts = {
            o: sum(row.outcome == o for row in chosen) for o in ("unshimmed", "shimmed", "no")
        }
        summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        lines += [f"### {title}", "", f"{len(chosen)} attempts: {summary}.", ""]
        lines += [*_table(chosen, kind == "model"), ""]
    return "\n".join([*lines, END])


def write(rows: dict[str, Row]) -> None:
    """Put the tables into docs/compatibility.md; the prose around them stays."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RuntimeError(f"{DOCUMENT}: expected the markers {BEGIN} and {END}.")
    partial = DOCUMENT.with_name(DOCUMENT.name + ".partial")
    partial.write_text(before + document(rows) + after, encoding="utf-8")
    os.replace(partial, DOCUMENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="loss:NAME, metric:NAME, model:NAME; default all")
    names = parser.parse_args().names
    known = list(attempts())
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"names: expected some of {', '.join(known)}; got {', '.join(unknown)}.")
    rows = run(names or known)
    if not names:
        write(rows)


if __name__ == "__main__":
    main()
