"""The Python face and the command line's small verbs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paddle import nn

import ppvision
from benchmark.sdn_boundary import trained_size
from ppvision.cli import run
from ppvision.deploy.run.predictor import Predictor
from ppvision.errors import InputError, InputTypeError, MissingFileError
from ppvision.quant import describe_layered, load_layered, save_layered
from ppvision.zoo import registry
from ppvision.zoo.weights import save_weights
from tests.helpers.messages import raises_naming
from tests.helpers.small_layered import tiny_once_qat

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


# -- arguments of another type ---------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


WRONG = (3.5, b"x", {1: 2}, {3}, np.zeros(3), int, Unprintable(), 10**5000, "\ud800\0", ["x", 3])
SHAPE = [1, 3, 8, 8]


class Given:
    """One good value of everything that the functions of the face take."""

    def __init__(self, folder: Path) -> None:
        self.layer = nn.Sequential(nn.Conv2D(3, 2, 1))
        self.once = tiny_once_qat(activations=False)
        self.layered = save_layered(self.once, folder / "m", bits=self.once.widths, config={})
        self.exported = ppvision.export_model(self.layer, folder / "net", input_shape=SHAPE)
        self.predictor = Predictor(self.exported)
        self.picture = np.zeros((8, 8, 3), np.uint8)
        self.batch = np.zeros(SHAPE, np.float32)
        self.weights, self.new = folder / "w.safetensors", folder / "new"
        arrays = {name: tensor.numpy() for name, tensor in self.layer.state_dict().items()}
        save_weights(arrays, self.weights)

    def export(self, folder=None, **arguments):
        folder = self.new if folder is None else folder
        return ppvision.export_model(self.layer, folder, **{"input_shape": SHAPE, **arguments})

    def save(self, folder=None, **arguments):
        how = {"bits": self.once.widths, "config": {}, **arguments}
        return save_layered(self.once, self.new if folder is None else folder, **how)

    def load(self, **allowed):
        return ppvision.load_weights(self.layer, self.weights, **allowed)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"))


EXPORT = ("output_op", "format", "input_shape", "transforms", "task", "name", "bits", "max_value")
MODEL = ("pretrained", "frozen_stages", "norm_eval", "num_classes", "in_channels", "out_indices")
CALLS = {
    "Predictor(folder)": lambda given, wrong: Predictor(wrong),
    **{
        f"Predictor({name})": lambda given, wrong, name=name: Predictor(
            given.exported, **{name: wrong}
        )
        for name in ("threads", "device", "use_onednn", "layered")
    },
    "predictor(images)": lambda given, wrong: given.predictor(wrong),
    "predictor([images])": lambda given, wrong: given.predictor([wrong]),
    "predictor(batch_size)": lambda given, wrong: given.predictor(given.picture, wrong),
    "predictor.run(batch)": lambda given, wrong: given.predictor.run(wrong),
    "predictor.run(sizes)": lambda given, wrong: given.predictor.run(given.batch, wrong),
    "predictor.set_bits": lambda given, wrong: given.predictor.set_bits(wrong),
    "export_model(model)": lambda given, wrong: ppvision.export_model(
        wrong, given.new, input_shape=SHAPE
    ),
    "export_model(folder)": lambda given, wrong: ppvision.export_model(
        given.layer, wrong, input_shape=SHAPE
    ),
    **{
        f"export_model({name})": lambda given, wrong, name=name: given.export(**{name: wrong})
        for name in EXPORT
        if name != "name"  # any text is one
    },
    "export_model(classes)": lambda given, wrong: given.export(classes=[wrong, Unprintable()]),
    "create_model(name)": lambda given, wrong: ppvision.create_model(wrong),
    **{
        f"create_model({name})": lambda given, wrong, name=name: ppvision.create_model(
            "pale_nano", **{name: wrong}
        )
        for name in (*MODEL, "features_only", "recompute", "drop_path_rate")
    },
    "model_card": lambda given, wrong: ppvision.model_card(wrong),
    "list_models(pretrained)": lambda given, wrong: ppvision.list_models("*", wrong),
    "load_weights(net)": lambda given, wrong: ppvision.load_weights(wrong, given.weights),
    "load_weights(path)": lambda given, wrong: ppvision.load_weights(given.layer, wrong),
    "load_layered": lambda given, wrong: load_layered(wrong),
    "load_layered(bits)": lambda given, wrong: load_layered(given.layered, wrong),
    "describe_layered": lambda given, wrong: describe_layered(wrong),
    "save_layered(model)": lambda given, wrong: save_layered(wrong, given.new, bits=[2], config={}),
    "save_layered(folder)": lambda given, wrong: given.save(folder=wrong),
    "save_layered(bits)": lambda given, wrong: given.save(bits=wrong),
    "save_layered(config)": lambda given, wrong: given.save(config={"a": wrong, "b": {3: 4}}),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_another_type(given, call):
    for wrong in WRONG:
        with pytest.raises((InputError, InputTypeError, MissingFileError)) as caught:
            CALLS[call](given, wrong)
        assert len(str(caught.value)) < 800
        assert not given.new.exists()


@pytest.mark.parametrize("wrong", [3.5, b"x", {1: 2}, np.zeros(3), int, Unprintable(), ["x", 3]])
def test_names_and_patterns_that_are_no_text(given, wrong):
    """Any text is one of these."""
    with pytest.raises(InputTypeError, match="pattern"):
        ppvision.list_models(wrong)
    for argument in ("allow_missing", "allow_unexpected"):
        with pytest.raises(InputTypeError, match=argument):
            given.load(**{argument: wrong})
    with pytest.raises(InputError, match="name"):
        given.export(name=wrong)
    assert not given.new.exists()


def test_a_predictor_of_no_folder():
    with pytest.raises(InputTypeError, match=r"\b3\b"):
        Predictor(3)
    with raises_naming(InputTypeError, "b'x'", "os.fsdecode"):
        Predictor(b"x")
    with pytest.raises(MissingFileError, match="long"):
        Predictor("x" * 5000)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "x" * 1001},
        {"classes": ["x" * 1001, "y"]},
        {"classes": b"ab"},
        {"input_shape": [1, 3, 8, 2**16 + 1]},
        {"input_shape": [4096, 3, 4096, 4096]},
        {"transforms": [{"type": "Normalize"}] * 65},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_deploy_yaml_does_not_hold_is_not_exported(given, arguments):
    """Such an export was written, and then refused by `Predictor`."""
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        given.export(**arguments)
    assert not given.new.exists()


def test_numbers_as_names_of_classes(given):
    folder = given.export(folder=given.new.with_name("digits"), classes=[np.int64(0), 1])
    assert Predictor(folder).manifest.classes == ["0", "1"]
