"""The Python face and the command line's small verbs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ppvision
from benchmark.sdn_boundary import trained_size
from ppvision.cli import run
from ppvision.zoo import registry

ROOT = Path(__file__).resolve().parents[1]


def test_every_name_of_the_face_is_there():
    for name in ppvision.__all__:
        assert getattr(ppvision, name) is not None
        assert name in dir(ppvision)
    from ppvision import deploy

    assert ppvision.Predictor is deploy.Predictor
    assert ppvision.export_model is deploy.export_model
    for module in (ppvision, deploy):
        with pytest.raises(AttributeError, match="absent"):
            module.absent  # noqa: B018


def test_importing_ppvision_loads_no_paddle():
    code = "import sys, ppvision; print('paddle' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ppvision {ppvision.__version__}\n"


def test_list_shows_models_and_their_weights(capsys):
    assert run(["list"]) == 0
    out = capsys.readouterr().out
    for name in ppvision.list_models():
        assert f"\n{name} " in out
    assert "segformer_pale_nano.digit_scenes" in out
    assert "efficientnet_lite0.imagenet" in out
    assert run(["list", "vgg*"]) == 1


def test_the_page_about_the_zoo_runs(tmp_path, monkeypatch):
    """Its Python, from top to bottom."""
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path))
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    try:
        exec(compile("\n".join(blocks), "docs/zoo.md", "exec"), names)
        assert names["logits"].shape == [2, 5]
        assert trained_size(ppvision.create_model("resnet14")) == names["card"].parameters
    finally:
        registry._MODELS.pop("resnet14", None)
