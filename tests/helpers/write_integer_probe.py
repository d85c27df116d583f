"""Write `ppvision/deploy/run/integer_probe/`: python -m tests.helpers.write_integer_probe"""

import sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppvision.deploy.run.integer_probe import CHANNELS, FOLDER, SCALE, SIDE, probe_weight
from ppvision.deploy.write.openvino import slim_serialized_program, write_products
from ppvision.quant.integers import IntegerActivation, IntegerWeight
from ppvision.quant.packed import copy_with_integers


def write_probe(folder: Path) -> None:
    """Write `model.pdmodel` and `model.pdiparams` of the probe."""
    weight = IntegerWeight(probe_weight(), np.full(CHANNELS, SCALE, np.float32), 0)
    model = nn.Sequential(nn.Conv2D(CHANNELS, CHANNELS, 1, bias_attr=False))
    model = copy_with_integers(model, {"0": weight}, {"0": IntegerActivation(SCALE, 0)})
    write_products([model[0]], [[1, CHANNELS, SIDE, SIDE]], folder)
    program = folder / "model.pdmodel"
    program.write_bytes(slim_serialized_program(program.read_bytes()))
    (folder / "model.pdiparams.info").unlink()


if __name__ == "__main__":
    paddle.set_device("cpu")
    write_probe(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
