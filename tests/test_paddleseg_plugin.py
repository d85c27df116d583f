"""PaddleSeg with Pale backbones: registration, weights, and the stock training loop."""

import importlib
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml

from tests.helpers.messages import raises_naming

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")

import paddleseg.core
from paddleseg.cvlibs import Config, SegBuilder, manager

import ppvision.plugins.paddleseg as plugin
from ppvision.models.pale_transformer import VARIANTS, PaleTransformer

SIZE = 56  # of the `scenes` of conftest.py


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_backbone(name):
    assert manager.BACKBONES[name].__name__ == name
    assert manager.BACKBONES[name] is getattr(plugin, name)


def test_backbone_returns_the_pyramid_it_declares():
    net = manager.BACKBONES["pale_nano"](in_channels=4, pale_size=4, drop_path_rate=0.0)
    features = net(paddle.rand([1, 4, 61, 45]))
    assert [f.shape for f in features] == [
        [1, c, math.ceil(61 / s), math.ceil(45 / s)]
        for c, s in zip(net.feat_channels, (4, 8, 16, 32), strict=True)
    ]


def test_import_again_and_reload_register_once():
    before = manager.BACKBONES["pale_nano"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(plugin)
    assert manager.BACKBONES["pale_nano"] is before


def test_a_foreign_backbone_of_the_same_name_is_refused(monkeypatch):
    def pale_nano():
        """Somebody else's."""

    monkeypatch.setitem(manager.BACKBONES.components_dict, "pale_nano", pale_nano)
    with raises_naming(ValueError, "'pale_nano':", "tests.test_paddleseg_plugin"):
        importlib.reload(plugin)


def test_missing_paddleseg_is_one_sentence_with_the_pip_line():
    code = "import sys; sys.modules['paddleseg'] = None; import ppvision.plugins.paddleseg"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "MissingPackageError: ppvision.plugins.paddleseg needs PaddleSeg" in last
    assert "pip install --no-deps paddleseg==" in last
    assert "direct cause" in run.stderr  # raised from the real error


def test_pretrained_takes_a_classifier_and_leaves_its_head(tmp_path):
    paddle.seed(3)
    classifier = PaleTransformer(VARIANTS["pale_nano"], num_classes=7)
    path = str(tmp_path / "classifier.pdparams")
    paddle.save(classifier.state_dict(), path)
    net = manager.BACKBONES["pale_nano"](pretrained=path)
    expected = dict(classifier.named_parameters())
    compared = 0
    for name, value in net.named_parameters():
        if not name.startswith("feature_norms."):
            np.testing.assert_array_equal(value.numpy(), expected[name].numpy())
            compared += 1
    assert compared > 100


def test_pretrained_of_another_width_is_refused(tmp_path):
    net = PaleTransformer(VARIANTS["pale_nano"], features_only=True, in_channels=4)
    path = str(tmp_path / "four_channels.pdparams")
    paddle.save(net.state_dict(), path)
    with raises_naming(ValueError, "merges.0.0.weight:", "[32,", "3,", "7]"):
        manager.BACKBONES["pale_nano"](pretrained=path)


def _config(scenes: Path, path: Path, model: dict, losses: list[str]) -> Path:
    def dataset(mode: str) -> dict:
        crop = [{"type": "RandomPaddingCrop", "crop_size": [SIZE, SIZE]}, {"type": "RandomDistort"}]
        return {
            "type": "Dataset",
            "dataset_root": str(scenes),
            f"{mode}_path": str(scenes / f"{mode}.txt"),
            "num_classes": 11,
            "img_channels": 3,
            "mode": mode,
            "transforms": [*(crop if mode == "train" else []), {"type": "Normalize"}],
        }

    document = {
        "batch_size": 2,
        "iters": 4,
        "train_dataset": dataset("train"),
        "val_dataset": dataset("val"),
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.001, "end_lr": 0},
        "loss": {"types": [{"type": name} for name in losses], "coef": [1.0] * len(losses)},
        "model": model,
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("head", "losses"),
    [
        ({"type": "SegFormer", "embedding_dim": 32}, ["CrossEntropyLoss"]),
        (
            {
                "type": "UPerNet",
                "backbone_indices": [0, 1, 2, 3],
                "channels": 16,
                "enable_auxiliary_loss": True,
            },
            ["OhemCrossEntropyLoss", "LovaszSoftmaxLoss"],
        ),
    ],
)
def test_stock_training_and_evaluation_run(scenes, tmp_path, monkeypatch, head, losses):
    backbone = {"type": "pale_nano", "drop_path_rate": 0.0, "recompute": len(losses) == 2}
    config = Config(
        str(_config(scenes, tmp_path / "c.yml", {**head, "backbone": backbone}, losses))
    )
    assert config.model_cfg["backbone"]["in_channels"] == 3  # synchronised by PaddleSeg
    builder = SegBuilder(config)
    train_module = sys.modules["paddleseg.core.train"]
    logged = []
    monkeypatch.setattr(train_module.logger, "info", logged.append)
    seen = []
    real = train_module.loss_computation

    def recording(**inputs):
        seen.append(real(**inputs))
        return seen[-1]

    monkeypatch.setattr(train_module, "loss_computation", recording)
    paddleseg.core.train(
        builder.model,
        builder.train_dataset,
        val_dataset=builder.val_dataset,
        optimizer=builder.optimizer,
        save_dir=str(tmp_path / "out"),
        iters=4,
        batch_size=2,
        save_interval=2,
        log_iters=2,
        losses=builder.loss,
        use_vdl=True,
        use_ema=True,
    )
    assert len(seen) == 4
    assert all(math.isfinite(float(loss)) for step in seen for loss in step)
    for name in ("iter_2", "iter_4", "best_model"):
        assert (tmp_path / "out" / name / "model.pdparams").is_file()
    mean = sum(float(sum(step)) for step in seen[:2]) / 2
    assert any(f"iter: 2/4, loss: {mean:.4f}" in line for line in logged)

    miou, accuracy, class_iou, _, _ = paddleseg.core.evaluate(
        builder.model, builder.val_dataset, num_workers=0, print_detail=False
    )
    expected = _independent_iou(builder.model, builder.val_dataset)
    np.testing.assert_allclose(class_iou, expected, atol=1e-6)
    assert miou == pytest.approx(expected.mean(), abs=1e-6)
    assert 0 <= accuracy <= 1


def _independent_iou(model, dataset) -> np.ndarray:
    """IoU of each class by counting pixels in NumPy; 0 where a class is nowhere, as PaddleSeg."""
    model.eval()
    table = np.zeros((11, 11), np.int64)
    for sample in dataset:
        with paddle.no_grad():
            logits = model(paddle.to_tensor(sample["img"][None]))[0].numpy()
        label = np.asarray(sample["label"]).squeeze()
        np.add.at(table, (label.ravel(), logits.argmax(1).ravel()), 1)
    union = table.sum(0) + table.sum(1) - np.diag(table)
    return np.diag(table) / np.maximum(union, 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pdparams"])
def test_a_backbone_takes_its_part_of_a_whole_models_weights(tmp_path, suffix):
    from ppvision.zoo.weights import save_weights

    head = paddle.nn.Conv2D(3, 2, 1)
    source = plugin.pale_nano()
    arrays = {f"backbone.{k}": v.numpy() for k, v in source.state_dict().items()}
    arrays |= {f"decode.{k}": v.numpy() for k, v in head.state_dict().items()}
    path = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_weights(arrays, path)
    else:
        paddle.save({k: paddle.to_tensor(v) for k, v in arrays.items()}, str(path))
    target = plugin.pale_nano(pretrained=str(path))
    for name, tensor in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name].numpy(), tensor.numpy())
