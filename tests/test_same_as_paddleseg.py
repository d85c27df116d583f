"""`ppvision train` gives the losses and weights of PaddleSeg's own loop, bit for bit."""

import importlib

import numpy as np
import paddle
import pytest

from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.forms.cpu_training import cpu_training
from ppvision.tasks import open_job
from ppvision.tasks.training import run_training, train_options

stock = importlib.import_module("paddleseg.core.train")  # the package shadows it by its function
STEPS = 8  # the 12 scenes give 3 batches of 4 an epoch


def deterministic(config: dict) -> None:
    """Draw nothing while training: the stock loop's draws depend on when a sample is read."""
    config["iters"] = STEPS
    config["train_dataset"]["transforms"].pop(0)
    config["model"]["backbone"]["drop_path_rate"] = 0.0
    config["loss"] = {
        "types": [
            {
                "type": "MixedLoss",
                "losses": [{"type": "CrossEntropyLoss"}, {"type": "LovaszSoftmaxLoss"}],
                "coef": [0.8, 0.2],
            }
        ],
        "coef": [1],
    }


def with_auxiliary_losses(config: dict) -> None:
    """Two outputs and two losses, and a schedule with a warm-up; the optimiser clips."""
    deterministic(config)
    config["model"] = {
        "type": "UPerNet",
        "num_classes": 11,
        "backbone": {"type": "pale_nano", "drop_path_rate": 0.0},
        "backbone_indices": [0, 1, 2, 3],
        "channels": 16,
        "enable_auxiliary_loss": True,
        "dropout_prob": 0.0,
    }
    config["loss"] = {
        "types": [{"type": "CrossEntropyLoss"}, {"type": "CrossEntropyLoss"}],
        "coef": [1, 0.4],
    }
    config["lr_scheduler"] |= {"warmup_iters": 3, "warmup_start_lr": 1e-5}
    config["optimizer"]["grad_clip_cfg"] = {"name": "ClipGradByGlobalNorm", "clip_norm": 0.5}


def no_dropout(model: paddle.nn.Layer) -> None:
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.Dropout | paddle.nn.Dropout2D):
            layer.p = 0.0


@pytest.mark.parametrize("change", [deterministic, with_auxiliary_losses])
def test_same_losses_and_weights(config_file, tmp_path, monkeypatch, change):
    path = config_file(change)
    ours = open_job(path)
    paddle.seed(0)
    no_dropout(ours.model)
    options = train_options(ours, log_iters=1, save_interval=STEPS)
    run_training(ours, RunFolder(tmp_path / "ours"), options, do_eval=False, use_vdl=False)

    theirs = open_job(path)
    paddle.seed(0)
    no_dropout(theirs.model)
    seen, whole = [], stock.loss_computation

    def recorded(*args, **kwargs):
        losses = whole(*args, **kwargs)
        seen.append([float(sum(losses)), *(float(loss) for loss in losses)])
        return losses

    monkeypatch.setattr(stock, "loss_computation", recorded)
    builder = theirs.builder
    with cpu_training(builder.model):  # as ours: the same kernels, so that numbers agree to the bit
        stock.train(
            builder.model,
            builder.train_dataset,
            optimizer=builder.optimizer,
            save_dir=str(tmp_path / "theirs"),
            iters=STEPS,
            batch_size=builder.config.batch_size,
            losses=builder.loss,
            log_iters=1,
            save_interval=STEPS,
        )

    rows = read_metrics(tmp_path / "ours" / "metrics.csv")
    tags = ["Train/loss", *(f"Train/loss_{i}" for i in range(len(seen[0]) - 1))]
    if len(tags) == 2:
        tags.pop()  # one loss: its sum is it
    assert len(seen) == STEPS
    for place, tag in enumerate(tags):
        assert [v for _, t, v in rows if t == tag] == [values[place] for values in seen], tag
    assert seen[0][0] != seen[-1][0]
    a, b = ours.model.state_dict(), theirs.model.state_dict()
    assert set(a) <= set(b)  # the stock loop adds counters of operations
    for key in a:
        np.testing.assert_array_equal(a[key].numpy(), b[key].numpy(), err_msg=key)
