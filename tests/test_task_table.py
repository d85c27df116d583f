"""`ppvision/deploy/run/task_table.py`: tasks of `deploy.yaml` are told apart nowhere else."""

import ast
from pathlib import Path

import numpy as np
import pytest

from ppvision.deploy.run import task_table
from ppvision.deploy.run.manifest import OUTPUT_OPS
from ppvision.deploy.run.task_table import TASKS, TENSOR_TASKS
from ppvision.errors import InputError

DEPLOY = Path(task_table.__file__).parents[1]


def compared_tasks(source: str) -> list[str]:
    """Names of tasks that a module compares, `task == "detection"` for one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            found += [text for text in texts if text in TASKS]
    return found


def test_no_other_module_compares_names_of_tasks():
    assert compared_tasks('a = (x, task) == (1, "features")') == ["features"]
    files = [path for path in DEPLOY.rglob("*.py") if path.name != "task_table.py"]
    assert len(files) > 20
    found = {p.name: compared_tasks(p.read_text(encoding="utf-8")) for p in files}
    assert {name: tasks for name, tasks in found.items() if tasks} == {}


def test_the_names_that_a_deploy_yaml_may_hold():
    assert set(TASKS) == {"segmentation", "classification", "features", "detection"}
    assert set(TENSOR_TASKS) == set(TASKS) - {"detection"}
    assert set(OUTPUT_OPS) == {"argmax", "softmax", "none", "nms"}


@pytest.mark.parametrize("task", TASKS)
def test_inputs_of_a_black_picture(task):
    """Every task names its outputs and makes its graph's inputs from a batch."""
    kind, batch = TASKS[task], np.zeros((2, 3, 4, 5), np.float32)
    for output_op in kind.output_ops:
        assert kind.name_outputs(output_op, 1)
    inputs = kind.inputs(batch)
    if task != "detection":
        assert inputs is batch
        with pytest.raises(InputError, match="sizes"):
            kind.check_sizes({}, 2)
        return
    assert inputs["image"] is batch
    np.testing.assert_array_equal(inputs["im_shape"], [[4, 5], [4, 5]])
    np.testing.assert_array_equal(inputs["scale_factor"], np.ones((2, 2)))
    kind.check_sizes({"scale_factor": np.ones((2, 2), np.float32)}, 2)
    with pytest.raises(InputError, match="sizes"):
        kind.check_sizes({"scale_factor": np.ones((1, 2), np.float32)}, 2)
