"""Runs files in OpenVINO's own package: `run_openvino.py GIVEN.npz FOUND.npz NAME=FILE ...`.

`GIVEN.npz` holds the inputs `NAME.0`, `NAME.1`, ...; `FOUND.npz` gets the first output of each.
"""

import sys

import numpy as np
import openvino

given, target, *files = sys.argv[1:]
core, found = openvino.Core(), {}
with np.load(given) as inputs:
    for item in files:
        name, _, path = item.partition("=")
        # Otherwise it takes bfloat16 where the processor has it.
        how = {"INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(core.read_model(path), "CPU", how)
        for key in sorted(key for key in inputs.files if key.rpartition(".")[0] == name):
            found[key] = model([inputs[key]])[0]
np.savez(target, **found)
