"""The contract of a job: the same parts in any order, for every task, in float and at widths."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import yaml

pytest.importorskip("ppdet", reason="pip install --no-deps paddledet==2.6.0")

from ppvision.errors import InputError
from ppvision.quant import OnceQAT
from ppvision.safe_yaml import Located
from ppvision.tasks import JOBS, open_job
from ppvision.tasks.job import Job, apply_overrides
from ppvision.tasks.multibit.job import MultiBitJob
from ppvision.tasks.prediction import WRITERS, predict_exported
from tests.helpers.configs import classification_config, small_config
from tests.helpers.small_detectors import WARNINGS, small_detector, write_detector

pytestmark = WARNINGS

PARTS: dict[str, Callable[[Job], object]] = {
    "iters": lambda job: job.iters,
    "content": lambda job: job.content,
    "train_dataset": lambda job: job.train_dataset,
    "batched": lambda job: job.batched,
    "class_names": lambda job: job.class_names,
    "float_model": lambda job: job.float_model,
    "model": lambda job: job.model,
    "ends": lambda job: job.ends if isinstance(job, MultiBitJob) else None,
    "structure": lambda job: job.structure(),
    "optimizer": lambda job: job.optimizer,
}
ORDERS = (
    (),
    ("iters", "train_dataset", "model", "structure", "optimizer", "class_names"),
    ("optimizer", "model", "ends", "train_dataset", "iters", "content"),
    ("model", "ends", "structure", "float_model", "optimizer", "train_dataset"),
    ("train_dataset", "iters", "structure", "ends", "optimizer", "content"),
)


@pytest.fixture
def job_file(tmp_path, scenes, crops):
    """Write the small config of a task: `job_file(task, slim)`."""

    def write(task: str, slim: bool = False) -> object:
        path = tmp_path / f"{task}.yml"
        content = {
            "segmentation": lambda: small_config(scenes),
            "classification": lambda: classification_config(crops),
            "detection": lambda: small_detector(scenes, "YOLOv3"),
        }[task]()
        if task == "classification":
            content["sizes"] = [[0.0, 16], [0.5, 24]]
        if slim:
            content["slim_config"] = {"bits": [8, 4]}
        if task == "detection":
            return write_detector(path, content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def describe(job: Job) -> dict[str, object]:
    """All that the parts of a job are, as plain values."""
    facts: dict[str, object] = {"iters": job.iters, "content": job.content}
    facts["samples"] = len(job.train_dataset)
    facts["names"] = job.class_names
    if job.task == "classification":
        task_job = job.float_job if isinstance(job, MultiBitJob) else job
        facts["sides"] = [task_job._side_at(epoch) for epoch in (0, 1)]
    facts["ends"] = PARTS["ends"](job)
    for name, net in (
        ("float", job.float_model),
        ("model", job.model),
        ("structure", job.structure()),
    ):
        facts[name] = {key: value.numpy() for key, value in net.state_dict().items()}
    facts["rate"] = job.optimizer.get_lr()
    # Parameters are named by a counter of the process; their places in the model say which.
    places = {parameter.name: k for k, parameter in enumerate(job.model.parameters())}
    listed = job.optimizer._parameter_list
    groups = [p["params"] if isinstance(p, dict) else [p] for p in listed]
    facts["trained"] = [[places[p.name] for p in group] for group in groups]
    return facts


def check_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in ("float", "model", "structure"):
            assert found[key].keys() == value.keys(), key
            for name, array in value.items():
                np.testing.assert_array_equal(found[key][name], array, err_msg=f"{key}: {name}")
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("slim", [False, True], ids=["float", "widths"])
@pytest.mark.parametrize("task", JOBS)
def test_the_order_of_the_parts_does_not_matter(task, slim, job_file):
    path, facts = job_file(task, slim), []
    for order in ORDERS:
        job = open_job(path, epochs=2)
        paddle.seed(0)
        for name in order:
            PARTS[name](job)
        facts.append(describe(job))
        check_equal(facts[-1], facts[0])
    assert facts[0]["float"].keys() == facts[0]["structure"].keys()
    assert (facts[0]["model"].keys() == facts[0]["float"].keys()) is not slim


def test_another_detector_in_between_does_not_matter(job_file, tmp_path, scenes):
    """PaddleDetection keeps one config in a global."""
    other = open_job(write_detector(tmp_path / "other.yml", small_detector(scenes, "FCOS")))
    facts = []
    for disturbed in (False, True):
        job = open_job(job_file("detection"))
        paddle.seed(0)
        for name in ("train_dataset", "model", "optimizer"):
            if disturbed:
                _ = other.train_dataset, other.class_names
                other.make_optimizer(paddle.nn.Linear(1, 1))
            PARTS[name](job)
        facts.append(describe(job))
        for name in ("float", "model", "structure"):  # the other one's weights were drawn as well
            facts[-1][name] = {key: np.shape(array) for key, array in facts[-1][name].items()}
    check_equal(facts[1], facts[0])


def test_quanters_go_into_layers_around_the_same_tensors(job_file, tmp_path):
    job = open_job(job_file("segmentation", slim=True))
    weights = tmp_path / "float.pdparams"
    paddle.save(job.float_model.state_dict(), str(weights))
    assert isinstance(job.model, OnceQAT)
    assert not any(".weight_quanter." in name for name in job.float_model.state_dict())
    ours = {id(parameter) for parameter in job.model.parameters()}
    assert {id(parameter) for parameter in job.float_model.parameters()} <= ours
    before = job.model, job.optimizer
    job.start_from(weights)  # whose steps these quanters do not have
    assert job.model is not before[0]
    assert job.optimizer is not before[1]
    assert job.model is job.model


def test_the_table_of_tasks():
    for task, place in JOBS.items():
        module, name = place.split(":")
        kind = getattr(importlib.import_module(module), name)
        assert kind.task == task
        # What a task defines anew, the wrapper has to ask it for.
        own = {key for key in vars(kind) if hasattr(Job, key) and not key.startswith("_")}
        assert own - vars(MultiBitJob).keys() <= {"override_keys", "takes_tags"}
    assert WRITERS.keys() == JOBS.keys()


def test_a_folder_of_features_is_no_prediction(tmp_path):
    features = SimpleNamespace(manifest=SimpleNamespace(task="features"))
    with pytest.raises(InputError, match="features"):
        predict_exported(features, tmp_path, tmp_path / "out")


def test_overrides_are_written_where_a_task_has_them():
    keys = {"batch_size": "Reader.batch_size", "iters": "iters", "epochs": "epochs"}
    content = Located({"iters": 5, "other": 1}, {})
    assert apply_overrides(content, keys, batch_size=2, epochs=3, learning_rate=0.1) == {
        "learning_rate": 0.1
    }
    assert content == {"Reader": {"batch_size": 2}, "other": 1, "epochs": 3}
    content = Located({"Reader": "text", "iters": 5}, {})
    assert apply_overrides(content, keys, batch_size=2, iters=None) == {}
    assert content == {"Reader": "text", "iters": 5}
