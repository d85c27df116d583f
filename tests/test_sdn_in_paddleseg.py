"""SDN in PaddleSeg's own models, by YAML alone: the table of docs/compatibility.md."""

import copy
import importlib
import logging

import numpy as np
import paddle
import pytest
import yaml

from tests.helpers.messages import raises_naming

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

from paddleseg.cvlibs import Config, SegBuilder, manager

from ppvision.deploy.run.manifest import read_manifest
from ppvision.errors import InputError
from ppvision.plugins.paddleseg import SemanticDiffusionBackbone
from ppvision.tasks import open_job
from ppvision.tasks.config import ConfigError
from ppvision.zoo.weights import WeightsError

SIDE = 64
RESNET = {"type": "ResNet18_vd", "output_stride": 8}
PYRAMID = {"type": "ResNet18_vd", "output_stride": 32}
PALE = {"type": "two_blocks", "drop_path_rate": 0.0}  # tests/helpers/two_blocks.py
LAST, ALL = {"backbone_indices": [-1]}, {"backbone_indices": [0, 1, 2, 3]}
LITE = {"cm_out_ch": 32, "arm_out_chs": [32, 32, 32], "seg_head_inter_chs": [16, 16, 16]}
OCR = {"ocr_mid_channels": 32, "ocr_key_channels": 16}

# head: its options, the levels that it reads, its number of logits while training
HEADS = {
    "FCN": (LAST, [-1], 1),
    "PSPNet": ({"pp_out_channels": 32, "enable_auxiliary_loss": False}, [3], 1),
    "DeepLabV3P": ({}, [0, 3], 1),  # its decoder is written for 256 channels
    "UPerNet": ({**ALL, "channels": 16, "enable_auxiliary_loss": False}, None, 1),
    "OCRNet": ({"backbone_indices": [3], **OCR}, [3], 2),
    "PPLiteSeg": ({"backbone_indices": [1, 2, 3], **LITE}, [1, 2, 3], 3),
    "SegFormer": ({"embedding_dim": 32}, None, 1),
    "BiseNetV1": ({}, [2, 3], 3),
}
STOCK = {
    "FCN": {"type": "HRNet_W18_Small_V1"},
    "PSPNet": RESNET,
    "DeepLabV3P": RESNET,
    "UPerNet": PYRAMID,
    "OCRNet": {"type": "HRNet_W18_Small_V1"},
    "PPLiteSeg": {"type": "STDC1"},
    "SegFormer": {"type": "MixVisionTransformer_B0"},
    "BiseNetV1": RESNET,
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    # Not before: other tests go through the zoo when they are collected.
    importlib.import_module("tests.helpers.two_blocks")


def model(head: str, backbone: dict) -> dict:
    options, levels, _ = HEADS[head]
    options = copy.deepcopy(options)
    if backbone["type"].startswith("HRNet"):
        options["backbone_indices"], levels = [0], None
    if backbone["type"] == "STDC1":
        options["backbone_indices"], levels = [2, 3, 4], [2, 3, 4]
    wrapped = {"type": "SemanticDiffusionBackbone", "backbone": dict(backbone)}
    wrapped["similarity"] = "gaussian"
    if levels is not None:
        wrapped["levels"] = levels
    return {"type": head, "num_classes": 11, **options, "backbone": wrapped}


def write_config(path, scenes, model: dict, losses: int):
    def dataset(mode: str) -> dict:
        return {
            "type": "Dataset",
            "mode": mode,
            "dataset_root": str(scenes),
            f"{mode}_path": str(scenes / f"{mode}.txt"),
            "num_classes": 11,
            "transforms": [
                *([{"type": "RandomPaddingCrop", "crop_size": [SIDE, SIDE]}] * (mode == "train")),
                {"type": "Normalize"},
            ],
        }

    content = {
        "task": "segmentation",
        "batch_size": 2,
        "iters": 2,
        "train_dataset": dataset("train"),
        "val_dataset": dataset("val"),
        "model": model,
        "optimizer": {"type": "sgd", "momentum": 0.9, "weight_decay": 4.0e-5},  # as in theirs
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.01},
        "loss": {"types": [{"type": "CrossEntropyLoss"}] * losses, "coef": [1.0] * losses},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


# By default SegFormer and FCN over Pale, and BiseNetV1 over a backbone of PaddleSeg; the others
# with `--all`: SDN wraps each backbone in one way, and SegFormer's head is there over Pale.
BY_DEFAULT = {
    ("BiseNetV1", "ResNet18_vd", "gaussian"): (),
    ("FCN", "two_blocks", None): (),
    ("SegFormer", "two_blocks", "gaussian"): pytest.mark.openvino,
}
CASES = [
    pytest.param(
        head,
        backbone,
        similarity,
        id=f"{head}-{backbone['type']}-{similarity or 'default'}",
        marks=BY_DEFAULT.get((head, backbone["type"], similarity), pytest.mark.all),
    )
    for similarity in ("gaussian", None)
    for head in HEADS
    for backbone in (STOCK[head], PALE)
    # BiseNetV1 wants the widths of ResNet18 and stride 8: not over Pale.
    if (head, backbone) != ("BiseNetV1", PALE)
]


def say_something(net: paddle.nn.Layer) -> None:
    """Bring the logits, which are nearly zero at first, to about one: small ones hide errors."""
    net.eval()
    with paddle.no_grad():
        largest = float(np.abs(net(paddle.rand([1, 3, SIDE, SIDE]))[0].numpy()).max())
    for layer in net.sublayers():
        if isinstance(layer, paddle.nn.Conv2D) and layer._out_channels == 11:
            layer.weight.set_value(layer.weight / largest)


@pytest.mark.filterwarnings(r"ignore:\s*Non compatible API")  # PP-LiteSeg's own calls
@pytest.mark.filterwarnings("ignore:Paddle Inference with oneDNN")
@pytest.mark.filterwarnings(r"ignore:The model has no graph for OpenVINO .* logical_and\(\)")
@pytest.mark.parametrize(("head", "backbone", "similarity"), CASES)
def test_trains_a_step_and_exports(head, backbone, similarity, scenes, tmp_path):
    """Forward, backward with a gradient in SDN and behind it, export with its parity check."""
    losses = HEADS[head][2]
    content = model(head, backbone)
    content["backbone"]["similarity"] = similarity
    job = open_job(write_config(tmp_path / "c.yml", scenes, content, losses))
    paddle.seed(0)
    net = job.model
    assert isinstance(net.backbone, SemanticDiffusionBackbone)
    assert net.backbone.feat_channels == net.backbone.backbone.feat_channels
    # SDN starts as nothing: let it be something, so that its export is compared as well.
    for diffusion in net.backbone.diffusion.diffusions:
        diffusion.fuse.weight.set_value(0.05 * paddle.randn(diffusion.fuse.weight.shape))
    net.train()
    samples = job.batched([job.train_dataset[index] for index in range(2)])
    batch = {key: paddle.to_tensor(samples[key]) for key in ("img", "label")}
    found = job.losses(net, batch)
    assert len(found) == losses
    total = sum(found)
    total.backward()
    assert np.isfinite(float(total))
    for part in (net.backbone.diffusion, net.backbone.backbone):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert max(float(np.abs(g.numpy()).max()) for g in gradients) > 0
    for name, p in net.backbone.diffusion.named_parameters():
        assert p.stop_gradient or p.grad is not None, name

    say_something(net)
    folder = job.export(
        net,
        tmp_path / "exported",
        input_shape=[1, 3, SIDE, SIDE],
        output_op="argmax",
        model_format="paddle",
    )
    # Paddle's oneDNN ignores the align_corners=True in these two.
    manifest = read_manifest(folder)
    assert manifest.onednn is (head not in ("UPerNet", "BiseNetV1"))
    assert manifest.openvino is not False  # None where no graph for it is made


@pytest.mark.filterwarnings("ignore:Paddle Inference with oneDNN")
@pytest.mark.parametrize("guidance", ["classes", "boundary"])
def test_a_guidance_with_a_head_of_its_own(guidance, scenes, tmp_path):
    """The config's second loss trains the head; without training there are the model's logits
    alone, whose export has its parity check."""
    content = model("SegFormer", PALE)
    content["backbone"] |= {"guidance": guidance, "levels": [0, 1]}
    del content["backbone"]["similarity"]
    path = write_config(tmp_path / "c.yml", scenes, content, 2)
    if guidance == "boundary":
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["train_dataset"]["edge"] = True
        config["loss"]["types"][1] = {"type": "BCELoss", "weight": "dynamic", "edge_label": True}
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
    job = open_job(path)
    paddle.seed(0)
    net = job.model
    pyramid = net.backbone.diffusion
    for diffusion in pyramid.diffusions:
        diffusion.fuse.weight.set_value(0.05 * paddle.randn(diffusion.fuse.weight.shape))
    net.train()
    samples = job.batched([job.train_dataset[index] for index in range(2)])
    keys = ("img", "label", *(["edge"] if guidance == "boundary" else []))
    batch = {key: paddle.to_tensor(samples[key]) for key in keys}
    logits = net(batch["img"])
    outputs = 11 if guidance == "classes" else 1
    assert [x.shape for x in logits] == [[2, k, SIDE, SIDE] for k in (11, outputs)]
    assert pyramid.logits == []  # handed on
    _, of_head = job.losses(net, batch)
    of_head.backward()
    for score in pyramid.guidance_head.scores:
        assert np.abs(score.weight.grad.numpy()).max() > 0

    say_something(net)
    assert len(net(batch["img"])) == 1
    folder = job.export(
        net,
        tmp_path / "exported",
        input_shape=[None, 3, None, None],
        output_op="argmax",
        model_format="paddle",
    )
    assert read_manifest(folder).openvino is not False


@pytest.mark.parametrize("head", ["SegFormer", "FCN"])
def test_training_starts_from_a_baseline_and_is_unchanged_at_first(
    head, scenes, tmp_path, caplog, monkeypatch
):
    """Its weights, loaded into the same model with SDN, give the same logits to the bit."""
    monkeypatch.setattr(logging.getLogger("ppvision"), "propagate", True)
    enhanced = model(head, PALE)
    plain = {**enhanced, "backbone": PALE}
    baseline = open_job(write_config(tmp_path / "a.yml", scenes, plain, 1)).model
    weights = tmp_path / "baseline.pdparams"
    paddle.save(baseline.state_dict(), str(weights))
    job = open_job(write_config(tmp_path / "b.yml", scenes, enhanced, 1))
    with caplog.at_level("INFO", "ppvision"):
        job.start_from(weights)
    assert "has no backbone.diffusion: it starts untrained" in caplog.text
    x = paddle.rand([1, 3, 50, 70])
    baseline.eval()
    job.model.eval()
    np.testing.assert_array_equal(job.model(x)[0].numpy(), baseline(x)[0].numpy())
    with raises_naming(WeightsError, "baseline.pdparams:", "backbone.diffusion", "without", "SDN,"):
        job.load(weights)  # nobody wants to evaluate an SDN that is not trained

    whole = job.model.state_dict()
    paddle.save(whole, str(weights))
    caplog.clear()
    job.start_from(weights)
    assert "untrained" not in caplog.text
    del whole["backbone.diffusion.diffusions.0.fuse.weight"]
    paddle.save(whole, str(weights))
    with raises_naming(
        WeightsError, "missing", "(1):", "backbone.diffusion.diffusions.0.fuse.weight"
    ):
        job.start_from(weights)


@pytest.mark.parametrize("place", ["outer", "inner", "both"])
def test_in_channels_reach_the_backbone(place, scenes, tmp_path):
    content = model("SegFormer", PALE)
    if place in ("outer", "both"):
        content["backbone"]["in_channels"] = 4
    if place in ("inner", "both"):
        content["backbone"]["backbone"]["in_channels"] = 4
    path = write_config(tmp_path / "c.yml", scenes, content, 1)
    for net in (SegBuilder(Config(str(path))).model, open_job(path).model):
        assert net(paddle.rand([1, 4, 32, 32]))[0].shape == [1, 11, 32, 32]


def test_in_channels_that_contradict_each_other_are_refused(scenes, tmp_path):
    content = model("SegFormer", PALE)
    content["backbone"]["in_channels"] = 4
    content["backbone"]["backbone"]["in_channels"] = 3
    job = open_job(write_config(tmp_path / "c.yml", scenes, content, 1))
    with raises_naming(InputError, "in_channels:", "4,", "PaleTransformer"):
        _ = job.model


def test_a_backbone_without_channels_is_refused():
    with pytest.raises(ValueError, match="feat_channels"):
        SemanticDiffusionBackbone(paddle.nn.Linear(2, 2))


def test_a_backbone_by_its_name_alone_is_refused(scenes, tmp_path):
    content = model("SegFormer", PALE)
    content["backbone"]["backbone"] = "pale_nano"
    job = open_job(write_config(tmp_path / "c.yml", scenes, content, 1))
    with raises_naming(InputError, "'pale_nano'", "{type:", "NAME}"):
        _ = job.model


@pytest.mark.parametrize(
    ("value", "hint"),
    [("charbonier", "charbonnier"), (["cosine"], "cosine")],
)
def test_a_misspelt_similarity_is_found_in_the_config(value, hint, scenes, tmp_path):
    content = model("SegFormer", PALE)
    content["backbone"]["similarity"] = value
    path = write_config(tmp_path / "c.yml", scenes, content, 1)
    line = 1 + next(
        i for i, text in enumerate(path.read_text().split("\n")) if "similarity" in text
    )
    place = f"{path.name}:{line}):"
    with raises_naming(ConfigError, place, "model.backbone.similarity:", str(value), hint):
        open_job(path)


def test_without_a_similarity_there_are_central_differences(scenes, tmp_path):
    """Weights that have a guidance say what to write then."""
    content = model("SegFormer", PALE)
    guided = open_job(write_config(tmp_path / "guided.yml", scenes, content, 1))
    paddle.save(guided.model.state_dict(), str(tmp_path / "guided.pdparams"))
    del content["backbone"]["similarity"]
    job = open_job(write_config(tmp_path / "c.yml", scenes, content, 1))
    for diffusion in job.model.backbone.diffusion.diffusions:
        assert diffusion.difference.similarity == "none"
        assert diffusion.guide is None
    with raises_naming(WeightsError, "guide", "similarity:", "gaussian"):
        job.start_from(tmp_path / "guided.pdparams")
    paddle.save(job.model.state_dict(), str(tmp_path / "central.pdparams"))
    with raises_naming(WeightsError, "guide", "similarity:", "none"):
        guided.start_from(tmp_path / "central.pdparams")
    content["backbone"]["similarity"] = None
    open_job(write_config(tmp_path / "null.yml", scenes, content, 1))


def test_it_is_registered():
    assert manager.BACKBONES["SemanticDiffusionBackbone"] is SemanticDiffusionBackbone
