"""What the command line shows of an error, and whose error it is."""

import errno
import os
import re
import subprocess
import sys

import pytest
from paddleseg.utils import utils as stock

from ppvision import cli
from ppvision.cli import list_zoo
from ppvision.errors import ConfigError, InputError, LibraryError, PpvisionError
from ppvision.plugins.libraries import wrap_errors
from ppvision.tasks import open_job
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming


def ppvision(*arguments: object) -> int:
    return cli.run([str(a) for a in arguments])


@pytest.fixture
def failing(monkeypatch):
    """Let the verb `list` raise."""

    def fail(error: BaseException) -> None:
        def raise_it(args):
            raise error

        monkeypatch.setattr(list_zoo, "run", raise_it)

    monkeypatch.delenv("PPVISION_TRACEBACK", raising=False)
    return fail


@pytest.mark.parametrize(
    "error",
    [
        *(InputError("a flag"), LibraryError("a component"), PpvisionError("anything")),
        OSError(errno.ENOSPC, "No space left on device", "/somewhere"),
        PermissionError(errno.EACCES, "Permission denied", "/somewhere"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_can_be_mended_is_one_message(failing, error, capsys, monkeypatch):
    failing(error)
    assert ppvision("list") == 1
    shown = capsys.readouterr().err
    assert shown == f"ppvision: {error}\n"
    monkeypatch.setenv("PPVISION_TRACEBACK", "1")
    assert ppvision("list") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(f"ppvision: {error}\n")


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("x"), TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError("x")),
        *(OSError("a library's, without a number"), ImportError("x"), MemoryError("x")),
        *(ZeroDivisionError("x"), RecursionError("x"), AttributeError("x")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_fault_of_ours_keeps_its_traceback(failing, error, capsys):
    failing(error)
    assert ppvision("list") == 1
    shown = capsys.readouterr().err
    assert "in raise_it" in shown
    assert f"ppvision: {type(error).__name__}: this is a fault of ppvision" in shown
    assert "ppvision doctor" in shown


def test_a_package_that_is_not_installed_is_named(failing, capsys):
    failing(ModuleNotFoundError("No module named 'paddle'", name="paddle.nn"))
    assert ppvision("list") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("ppvision: paddle: expected this package")
    assert "ppvision doctor" in shown
    failing(ModuleNotFoundError("No module named 'ppvision.nothing'", name="ppvision.nothing"))
    ppvision("list")
    assert "this is a fault of ppvision" in capsys.readouterr().err


def test_an_interrupt_is_none(failing, capsys):
    failing(KeyboardInterrupt())
    assert ppvision("list") == 130
    assert capsys.readouterr().err == "ppvision: stopped\n"


def test_a_message_without_end_is_cut(failing, capsys):
    failing(InputError("x" * 10**6))
    assert ppvision("list") == 1
    assert len(capsys.readouterr().err) < 30_000


def test_a_reader_that_has_gone():
    """`ppvision list | head -0`"""
    command = f"{sys.executable} -m ppvision list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", f"sleep 0; {command}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 141)  # 0 where all was written before
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# -- whose error it is -----------------------------------------------------------------------------


def test_an_error_of_paddleseg_is_named_with_its_place_and_cause():
    with (
        raises_naming(LibraryError, "step:", "PaddleSeg", "(utils.py:") as caught,
        wrap_errors("step"),
    ):
        stock.get_image_list("/nowhere")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_error_of_ours_inside_of_paddleseg_is_not_wrapped(config_file, monkeypatch):
    from ppvision.plugins import paddleseg as plugin

    # A function of our module's, called by a component that PaddleSeg builds.
    exec(compile("def broken(*a, **k): raise KeyError('ours')", "broken.py", "exec"), vars(plugin))
    monkeypatch.setattr(plugin, "create_model", plugin.broken)
    try:
        with pytest.raises(KeyError, match="ours"):
            open_job(config_file()).float_model  # noqa: B018
    finally:
        del plugin.broken


def test_our_own_error_comes_out_of_paddlesegs_builder_as_it_was(config_file):
    def change(config: dict) -> None:
        config["model"]["backbone"]["drop_path_rate"] = 7.0

    with pytest.raises(InputError, match="drop_path_rate"):
        open_job(config_file(change)).float_model  # noqa: B018


def test_ours_and_the_systems_errors_pass():
    for error in (InputError("x"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, wrap_errors("step"):
            raise error
        assert caught.value is error


def test_a_component_that_paddleseg_does_not_build(config_file, capsys):
    """A head that takes features which the backbone has not."""

    def change(config: dict) -> None:
        config["model"] = {
            "type": "UPerNet",
            "num_classes": 11,
            "backbone": {"type": "pale_nano"},
            "backbone_indices": [0, 1, 2, 9],
            "channels": 16,
        }

    path = config_file(change)
    with raises_naming(LibraryError, "model:", "PaddleSeg", "IndexError"):
        open_job(path).float_model  # noqa: B018
    assert ppvision("train", "-c", path, "--save_dir", path.parent / "run") == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert "PPVISION_TRACEBACK" in shown


def test_a_loss_that_fails_in_training(config_file, capsys):
    """Its weights are not as many as the classes: found by the first step."""

    def change(config: dict) -> None:
        config["loss"]["types"] = [{"type": "CrossEntropyLoss", "weight": [1.0, 2.0]}]

    path = config_file(change)
    assert ppvision("train", "-c", path, "--save_dir", path.parent / "run", "--iters", 1) == 1
    shown = capsys.readouterr().err
    assert "training step: PaddleSeg raised" in shown
    assert "Traceback" not in shown
    assert f"the last lines of {path.parent}/run/log.txt" in shown
    assert "Use the following config" in shown  # of PaddleSeg, in the log


# -- the check of the data -------------------------------------------------------------------------


def test_skip_check_is_said(config_file, capsys, monkeypatch):
    checked = []
    from ppvision.tasks.segmentation.job import Segmentation

    monkeypatch.setattr(Segmentation, "check_data", lambda self, *parts: checked.extend(parts))
    path = config_file()
    train = ("train", "-c", path, "--save_dir", path.parent / "run", "--iters", 1, "--do_eval")
    assert ppvision(*train, "--skip_check") == 0
    assert checked == []
    assert "train_dataset, val_dataset: not checked (--skip_check)" in capsys.readouterr().err
    model = path.parent / "run" / "best_model" / "model.pdparams"
    assert ppvision("eval", "-c", path, "--model_path", model, "--skip_check") == 0
    assert checked == []
    assert "val_dataset: not checked (--skip_check)" in capsys.readouterr().err
    assert ppvision("eval", "-c", path, "--model_path", model) == 0
    assert checked == ["val_dataset"]


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda c: c["optimizer"].update(beta1=7.0), r"optimizer\.beta1"),
        (lambda c: c["model"].update(drop_path_rate="x"), "drop_path_rate"),
        (lambda c: c["model"].update(drop_path_rate=1.5), "drop_path_rate"),
        (lambda c: c["model"].update(pale_size=[1, 2, 3]), "pale_size"),
        (
            lambda c: c["train_dataset"]["transforms"].insert(
                0, {"type": "RandomResizedCrop", "size": 8, "scale": "x"}
            ),
            "RandomResizedCrop",
        ),
    ],
)
def test_values_of_a_classifier_that_do_not_fit(classification_file, change, token, capsys):
    path = classification_file(change)
    assert ppvision("train", "-c", path, "--save_dir", path.parent / "run") == 1
    shown = capsys.readouterr().err
    assert re.search(token, shown)
    assert "Traceback" not in shown


def test_a_text_in_the_place_of_a_number(config_file, capsys):
    """Of Paddle's optimizers, which would find it in their first step."""

    def change(config: dict) -> None:
        config["optimizer"] = {"type": "Momentum", "momentum": "0,9"}

    with raises_naming(ConfigError, "optimizer.momentum", "0.9"):
        open_job(config_file(change))
