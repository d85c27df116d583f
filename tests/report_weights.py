"""Named in a test's config under `imports`: every rank reports its weights when its run ends."""

import os

import numpy as np
import paddle

from ppvision.engine.trainer import Trainer

_fit, _step = Trainer.fit, Trainer._step
_batches = []


def _step_and_keep(self, network, batch):
    _batches.append(batch["img"].numpy().ravel()[:50])
    return _step(self, network, batch)


def _fit_and_report(self):
    progress = _fit(self)
    arrays = {name: p.numpy() for name, p in self.model.named_parameters() if not p.stop_gradient}
    path = f"{os.environ['PPVISION_REPORT']}.{paddle.distributed.get_rank()}.npz"
    np.savez(path, **arrays, **{"|batch": np.stack(_batches)})
    return progress


Trainer.fit, Trainer._step = _fit_and_report, _step_and_keep
