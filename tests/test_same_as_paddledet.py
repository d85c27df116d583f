"""PaddleDetection's own `Trainer` on our backbones, and against `ppvision train`."""

from pathlib import Path

import numpy as np
import paddle
import pytest

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppdet.core.workspace import create, load_config
from ppdet.engine import Trainer
from ppdet.engine.callbacks import Callback

import ppvision.plugins.paddledet  # noqa: F401
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.plugins.paddleslim import LayeredQAT, slim_quant_config
from ppvision.quant import OnceQAT
from ppvision.tasks import open_job
from ppvision.tasks.training import run_training, train_options
from tests.helpers.small_detectors import small_detector, write_detector

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\s*Non compatible API"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
    pytest.mark.filterwarnings("ignore:Skip loading for"),
]

STEPS = 3


def one_batch(scenes: Path, architecture: str = "YOLOv3", **changes: object) -> dict:
    """A config that draws nothing: one batch of the same four pictures, whatever their order."""
    config = small_detector(scenes, architecture)
    config["epoch"] = STEPS
    config["TrainDataset"]["!COCODataSet"]["sample_num"] = 4
    del config["TrainReader"]["sample_transforms"][1]  # the random flip
    config["two_blocks"]["drop_path_rate"] = 0.0
    return config | changes


def stock_config(path: Path, config: dict, folder: Path) -> dict:
    """The same for PaddleDetection's own tools."""
    theirs = {key: value for key, value in config.items() if key not in ("task", "slim_config")}
    devices = {f"use_{kind}": False for kind in ("gpu", "npu", "mlu", "xpu")}
    theirs |= {**devices, "worker_num": 0, "log_iter": 1, "snapshot_epoch": STEPS}
    theirs |= {"save_dir": str(folder), "filename": "job", "output_eval": str(folder)}
    theirs["TestDataset"] = {"!ImageFolder": {}}
    folder.mkdir()
    return load_config(str(write_detector(path, theirs)))


class Losses(Callback):
    """Notes what every step gave."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, status: dict) -> None:
        if status["mode"] == "train":
            meters = status["training_staus"].meters
            self.seen.append({name: meter.value for name, meter in meters.items()})


def train_stock(cfg: dict) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(cfg, "train")
    losses = Losses(trainer)
    trainer.register_callbacks([losses])
    trainer.train(validate=True)
    return trainer, losses.seen


def test_same_losses_and_weights(scenes, tmp_path):
    config = one_batch(scenes)
    job = open_job(write_detector(tmp_path / "job.yml", config))
    paddle.seed(0)
    start = {name: value.numpy() for name, value in job.model.state_dict().items()}
    options = train_options(job, log_iters=1, save_interval=STEPS)
    run_training(job, RunFolder(tmp_path / "ours"), options, do_eval=False, use_vdl=False)
    ours = [v for _, t, v in read_metrics(tmp_path / "ours" / "metrics.csv") if t == "Train/loss"]

    cfg = stock_config(tmp_path / "stock.yml", config, tmp_path / "theirs")
    model = create(cfg.architecture)
    model.set_state_dict(start)
    cfg["model"] = model
    trainer, seen = train_stock(cfg)
    np.testing.assert_allclose([step["loss"] for step in seen], ours, rtol=1e-4)
    assert len(ours) == STEPS
    trained = job.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        moved = np.abs(trained[name].numpy() - start[name]).max()
        np.testing.assert_allclose(
            value.numpy(), trained[name].numpy(), atol=0.02 * moved + 1e-5, err_msg=name
        )


def test_once_qat_in_the_stock_trainer(scenes, tmp_path):
    """One dictionary with the mean and every width's loss; evaluated at the highest."""
    cfg = stock_config(tmp_path / "stock.yml", one_batch(scenes), tmp_path / "theirs")
    model = create(cfg.architecture)
    layers = {"yolo_head.proj_conv": {"float": True}}
    config = slim_quant_config(model, bits=(8, 4, 2), layers=layers)
    once = OnceQAT(LayeredQAT(config).quantize(model, inplace=True), (8, 4, 2), weights=(2, 1, 1))
    steps = next(q for name, q in once.named_parameters() if "weight_quanter" in name)
    before = steps.numpy()
    cfg["model"] = once
    trainer, seen = train_stock(cfg)
    assert trainer.model is once
    assert len(seen) == STEPS
    for step in seen:
        assert set(step) == {"loss", "loss_w8", "loss_w4", "loss_w2"}
        mean = (1.5 * step["loss_w8"] + 0.75 * step["loss_w4"] + 0.75 * step["loss_w2"]) / 3
        assert step["loss"] == pytest.approx(mean, rel=1e-5)
    assert not np.array_equal(steps.numpy(), before)  # they learn
    assert any((tmp_path / "theirs").rglob("bbox.json"))  # it was evaluated


@pytest.mark.all
def test_sandwich_has_the_same_names_at_every_step(scenes, tmp_path):
    """PaddleDetection's log takes the names of the first step."""
    cfg = stock_config(tmp_path / "stock.yml", one_batch(scenes), tmp_path / "theirs")
    model = create(cfg.architecture)
    config = slim_quant_config(model, bits=(8, 6, 4, 2))
    quantized = LayeredQAT(config).quantize(model, inplace=True)
    cfg["model"] = OnceQAT(quantized, (8, 6, 4, 2), objective="sandwich")
    _, seen = train_stock(cfg)
    assert {frozenset(step) for step in seen} == {
        frozenset(("loss", "loss_w8", "loss_random", "loss_w2"))
    }
