"""A stranger's configuration executes nothing, whichever framework reads it."""

import importlib

import pytest
import yaml
from paddleseg.cvlibs import Config

from ppvision.tasks.config import ConfigError, read_yaml
from tests.helpers.messages import raises_naming


@pytest.fixture
def hostile(tmp_path):
    """A file that would leave another one if it were obeyed: `(config, what it would leave)`."""
    left = tmp_path / "left"
    path = tmp_path / "job.yml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{left}']\n")
    return path, left


def test_the_file_is_dangerous(hostile):
    path, left = hostile
    with path.open() as file:
        yaml.load(file, Loader=yaml.UnsafeLoader)
    assert left.exists()


def test_ours_refuses_and_says_where(hostile):
    path, left = hostile
    with raises_naming(ConfigError, "job.yml", "python/object/apply") as caught:
        read_yaml(path)
    assert "line 1" in str(caught.value)
    assert not left.exists()


def test_paddlesegs_refuses(hostile):
    path, left = hostile
    with pytest.raises(yaml.YAMLError):
        Config(str(path))
    assert not left.exists()


@pytest.mark.filterwarnings("ignore")
def test_paddledetections_refuses_and_keeps_its_own_tags(hostile, tmp_path):
    paddledet = importlib.import_module("ppvision.plugins.paddledet")
    from ppdet.core.workspace import load_config
    from ppdet.optimizer.optimizer import LinearWarmup

    path, left = hostile
    with pytest.raises(yaml.YAMLError, match="python/object/apply"):
        load_config(str(path))
    (tmp_path / "top.yml").write_text(f"_BASE_: ['{path.name}']\n")
    with pytest.raises(yaml.YAMLError, match="python/object/apply"):
        load_config(str(tmp_path / "top.yml"))
    from ppdet.utils.cli import ArgsParser

    with pytest.raises(yaml.YAMLError, match="python/object/apply"):
        ArgsParser().parse_args(
            ["-c", "x.yml", "-o", f"a=!!python/object/apply:os.mkdir ['{left}']"]
        )
    assert not left.exists()

    for text in (f"a: !Callable {{full_type: os.mkdir, args: ['{left}']}}", "a: !Nothing {}"):
        with pytest.raises(yaml.YAMLError, match="tag"):
            paddledet.load_yaml(text)
    (tmp_path / "good.yml").write_text("LearningRate:\n  schedulers: [!LinearWarmup {steps: 7}]\n")
    (warmup,) = load_config(str(tmp_path / "good.yml"))["LearningRate"]["schedulers"]
    assert isinstance(warmup, LinearWarmup)
    assert warmup.steps == 7
