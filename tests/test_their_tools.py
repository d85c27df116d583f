"""What PaddleSeg's tools and PaddleDetection's exporter call, on our backbones, after a plain
import of the plug-in: predict and export. Training and evaluation: test_paddleseg_plugin.py and
test_same_as_paddledet.py."""

import importlib

import numpy as np
import paddle
import pytest
import yaml
from paddle.static import InputSpec
from PIL import Image

pytest.importorskip("paddleseg", reason="pip install --no-deps paddleseg==2.8.0")
pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

import paddleseg.core
from paddleseg.cvlibs import Config, SegBuilder
from paddleseg.transforms import Compose, Normalize
from ppdet.core.workspace import create, load_config
from ppdet.engine import Trainer

import ppvision.plugins.paddledet
import ppvision.plugins.paddleseg  # noqa: F401
from tests.helpers.small_detectors import WARNINGS, small_detector, write_detector

pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings(
        "ignore:(Value|Tensor) do not have 'place'"
    ),  # paddle.ones_like, traced
    pytest.mark.filterwarnings("ignore:Found 'dict' in given outputs"),
]

SIZE = 56  # of the `scenes` of conftest.py


@pytest.fixture(autouse=True, scope="module")
def _two_blocks():
    """A backbone of `small_detector`, which must not be among the zoo's models while tests are
    collected."""
    importlib.import_module("tests.helpers.two_blocks")


def seg_builder(scenes, path) -> SegBuilder:
    data = {"type": "Dataset", "dataset_root": str(scenes), "num_classes": 11}
    data["transforms"] = [{"type": "Normalize"}]
    lists = {mode: str(scenes / f"{mode}.txt") for mode in ("train", "val")}
    document = {
        "batch_size": 1,
        "iters": 1,
        "train_dataset": {**data, "mode": "train", "train_path": lists["train"]},
        "val_dataset": {**data, "mode": "val", "val_path": lists["val"]},
        "optimizer": {"type": "SGD"},
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.001},
        "loss": {"types": [{"type": "CrossEntropyLoss"}], "coef": [1]},
        "model": {
            "type": "SegFormer",
            "embedding_dim": 16,
            "num_classes": 11,
            "backbone": {
                "type": "SemanticDiffusionBackbone",
                "levels": [0],
                "backbone": {"type": "pale_nano", "pale_size": 4, "out_indices": [0, 1, 2, 3]},
            },
        },
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return SegBuilder(Config(str(path)))


class WithLabels(paddle.nn.Layer):
    """As PaddleSeg's tools/export.py wraps a model: the classes of its first logits."""

    def __init__(self, net: paddle.nn.Layer) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return paddle.argmax(self.net(x)[0], axis=1, dtype="int32")


def test_paddleseg_predicts_and_exports(scenes, tmp_path):
    builder = seg_builder(scenes, tmp_path / "c.yml")
    model, dataset = builder.model, builder.val_dataset
    weights = tmp_path / "model.pdparams"
    paddle.save(model.state_dict(), str(weights))
    pictures = [name for name, _ in dataset.file_list]
    paddleseg.core.predict(
        model,
        str(weights),
        transforms=Compose([Normalize()]),
        image_list=pictures,
        image_dir=str(scenes),
        save_dir=str(tmp_path / "predicted"),
    )
    exported = paddle.jit.to_static(
        WithLabels(model),
        input_spec=[InputSpec([None, 3, None, None], "float32")],
        full_graph=True,
    )
    exported.eval()
    paddle.jit.save(exported, str(tmp_path / "exported" / "model"))
    loaded = paddle.jit.load(str(tmp_path / "exported" / "model"))
    for name in pictures:
        image = np.asarray(Image.open(name).convert("RGB"), np.float32)
        x = paddle.to_tensor(((image / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])
        with paddle.no_grad():
            expected = model(x)[0].numpy().argmax(1)[0]
        below = name.removeprefix(str(scenes)).lstrip("/").rsplit(".", 1)[0] + ".png"
        told = np.asarray(Image.open(tmp_path / "predicted" / "pseudo_color_prediction" / below))
        assert (told == expected).mean() > 0.999
        assert (loaded(x).numpy()[0] == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1


def test_paddledet_exports(scenes, tmp_path):
    config = small_detector(scenes, "YOLOv3")
    theirs = {key: value for key, value in config.items() if key not in ("task", "slim_config")}
    theirs |= {f"use_{kind}": False for kind in ("gpu", "npu", "mlu", "xpu")}
    theirs["TestDataset"] = {"!ImageFolder": {}}
    theirs |= {"worker_num": 0, "save_dir": str(tmp_path / "out")}
    cfg = load_config(str(write_detector(tmp_path / "stock.yml", theirs)))
    cfg["model"] = create(cfg.architecture)
    trainer = Trainer(cfg, "test")
    trainer.export(str(tmp_path / "exported"))
    folder = tmp_path / "exported" / "stock"
    described = yaml.safe_load((folder / "infer_cfg.yml").read_text())
    assert described["arch"] == "YOLO"
    loaded = paddle.jit.load(str(folder / "model"))
    x = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    scale = paddle.to_tensor(np.ones((1, 2), np.float32))
    trainer.model.eval()
    inputs = {"image": paddle.to_tensor(x), "scale_factor": scale}
    inputs["im_shape"] = paddle.to_tensor([[64.0, 64.0]])
    with paddle.no_grad():
        expected = trainer.model(inputs)["bbox"].numpy()
    found = loaded(inputs["image"], scale)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
