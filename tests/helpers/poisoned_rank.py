"""Named in a test's config under `imports`: the loss of rank 1 is NaN at step 3."""

import paddle

from ppvision.engine.trainer import Trainer

_forward = Trainer._forward


def _poisoned(self, network, batch, forward):
    losses = _forward(self, network, batch, forward)
    poison = self.progress.step == 3 and paddle.distributed.get_rank() == 1
    return [loss * float("nan") if poison else loss for loss in losses]


Trainer._forward = _poisoned
