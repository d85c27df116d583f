"""A run that a test can kill.

    python -m tests.helpers.small_run FOLDER STEPS [slow] [workers] [stuck=WHAT]

A small network with dropout on random samples, through the whole engine: checkpoints every 3 steps,
averaged weights, scores. With `slow`, every step takes a little longer, so that a kill can hit one.
`workers` reads with 2 processes, whose ids it prints. `stuck=step|evaluation|sample` prints "stuck"
and sleeps there, in the fifth step, the first evaluation or sample 7.
"""

import multiprocessing
import random
import sys
import time
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision.engine.callbacks import DashboardLog
from ppvision.engine.dashboard import Dashboard
from ppvision.engine.run_folder import RunFolder
from ppvision.engine.stopping import TrainingStopped
from ppvision.engine.trainer import Trainer, TrainOptions


class NoisyNumbers(paddle.io.Dataset):
    """Samples that draw from both global generators, as augmentation does."""

    def __getitem__(self, index: int) -> dict:
        x = np.random.default_rng(index).normal(size=8)
        x += np.random.normal(size=8) + random.random()
        return {"x": x.astype(np.float32), "y": np.float32(np.sin(x.sum()))}

    def __len__(self) -> int:
        return 26  # 6 batches of 4, and 2 samples left over


def losses(network: nn.Layer, batch: dict) -> list[paddle.Tensor]:
    return [((network(batch["x"])[:, 0] - batch["y"]) ** 2).mean()]


def build(folder: Path, steps: int, clip=None, config=None, **options) -> Trainer:
    paddle.seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1D(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1)
    )
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.PolynomialDecay(0.05, 30), 5, 0.0, 0.05
    )
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), grad_clip=clip)
    fixed = paddle.to_tensor(np.random.default_rng(1).normal(size=(5, 8)), "float32")

    def evaluate(model: nn.Layer) -> dict[str, float]:
        model.eval()
        return {"Evaluate/score": 1 / (1 + float(model(fixed).square().mean()))}

    run = RunFolder(folder)
    run.check_new(resume=options.get("resume") is not None)
    config = config or {"steps": steps}
    run.open(config)
    trainer = Trainer(
        model,
        optimizer,
        NoisyNumbers(),
        losses,
        evaluate,
        run,
        TrainOptions(
            **{"batch_size": 4, "log_iters": 2, "save_interval": 3, "use_ema": True, **options},
            iters=steps,
        ),
        config,
    )
    progress = trainer.progress
    trainer.callbacks.append(
        DashboardLog(Dashboard(run, True, progress.step, progress.evaluated), None)
    )
    return trainer


def stick() -> None:
    print("stuck", flush=True)
    time.sleep(120)


class StuckNumbers(NoisyNumbers):
    def __getitem__(self, index: int) -> dict:
        if index == 7:
            stick()
        return super().__getitem__(index)


def main() -> int:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    stuck = next((word[6:] for word in sys.argv if word.startswith("stuck=")), None)
    whole = Trainer._step

    def slow(self, network, batches):
        if stuck == "step" and self.progress.step == 5:
            stick()
        if "workers" in sys.argv and "told" not in vars(self):
            self.told = True
            print(
                "workers", *[child.pid for child in multiprocessing.active_children()], flush=True
            )
        time.sleep(0.03 if "slow" in sys.argv else 0)
        return whole(self, network, batches)

    Trainer._step = slow
    trainer = build(folder, steps, resume="auto", num_workers=2 if "workers" in sys.argv else 0)
    if stuck == "evaluation":
        trainer.evaluate = lambda model: stick()
    if stuck == "sample":
        trainer.dataset = StuckNumbers()
        trainer.batches = trainer._batches(trainer.progress.step, steps)
    print("training", flush=True)
    try:
        trainer.fit()
    except TrainingStopped as stop:
        print(f"stopped: {stop}", flush=True)
        return 128 + stop.signal_number
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
