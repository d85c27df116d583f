"""`Predictor(NAME)`: a whole model of the zoo, composed in the cache folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import ppvision
from ppvision.data.convert.digit_scenes import load_digits
from ppvision.deploy.run.zoo_folder import compose_zoo_folder
from ppvision.tasks import open_job
from ppvision.zoo import cards
from ppvision.zoo.weights import WeightsError, read_weights
from tests.helpers.messages import raises_naming

NAME = "segformer_pale_nano.digit_scenes"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


# What nothing that only predicts may load.
CHILD = """
import sys, numpy, ppvision
predictor = ppvision.Predictor("segformer_pale_nano.digit_scenes")
out = predictor(numpy.full((40, 56, 3), 90, numpy.uint8))
assert out.shape == (40, 56), out.shape
not_wanted = ("paddleseg", "ppdet", "paddleslim", "ppvision.tasks", "ppvision.engine",
              "ppvision.plugins", "ppvision.deploy.write.export", "ppvision.deploy.write.graph",
              "ppvision.deploy.write.detection_export", "ppvision.deploy.write.openvino")
print([m for m in sys.modules if any(m == n or m.startswith(n + ".") for n in not_wanted)])
"""


def test_the_first_use_needs_no_exporter_and_no_paddleseg():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"


def test_predicts_what_the_eager_model_predicts(cache):
    paddleseg = pytest.importorskip("paddleseg.models", reason="the eager model is PaddleSeg's")
    import paddle

    net = ppvision.create_model("pale_nano", features_only=True)
    model = paddleseg.SegFormer(11, net, embedding_dim=128)
    ppvision.load_weights(model, NAME)
    model.eval()
    predictor = ppvision.Predictor(NAME)
    tiles, digits = load_digits("val")
    picture = np.full((56, 72, 3), 120, np.uint8)
    picture[8:36, 20:48] = np.maximum(picture[8:36, 20:48], tiles[digits == 3][0][..., None])
    x = ((picture / 255.0 - 0.5) / 0.5).astype(np.float32).transpose(2, 0, 1)[None]
    expected = model(paddle.to_tensor(x))[0].numpy().argmax(1)[0]
    assert (predictor(picture) == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1
    assert predictor.manifest.classes == list(cards.ZOO_WEIGHTS[NAME].config.classes)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("segformer_pale_nano_sdn.nuclei", "segmentation/segformer_pale_nano_sdn_nuclei"),
        ("pale_nano.tiny_imagenet_100", "classification/pale_nano_tiny_imagenet_100"),
    ],
)
def test_predicts_what_the_model_of_the_config_predicts(name, config, cache):
    pytest.importorskip("paddleseg", reason="the eager model is PaddleSeg's")
    import paddle

    from ppvision.deploy.run.transforms import Transforms
    from ppvision.tasks import open_job

    predictor = ppvision.Predictor(name)
    picture = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    x, _ = Transforms(predictor.manifest.transforms)(picture)
    net = open_job(ROOT / "configs" / f"{config}.yml").load_float(name)
    net.eval()
    with paddle.no_grad():
        found = net(paddle.to_tensor(x[None]))
    predicted = predictor(picture)
    if predictor.manifest.task == "classification":
        expected = paddle.nn.functional.softmax(found)[0].numpy()
        np.testing.assert_allclose(predicted.probabilities, expected, atol=1e-4)
    else:
        expected = found[0].numpy().argmax(1)[0]
        assert (predicted == expected).mean() > 0.999
        assert len(np.unique(expected)) > 1


def test_aliases_name_one_folder_that_is_made_once(cache):
    folder = compose_zoo_folder(NAME)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for alias in ("pale_nano_digit_scenes", "pale_nano.digit_scenes"):
        assert compose_zoo_folder(alias) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert folder.is_relative_to(cache)


def test_a_damaged_copy_is_made_again():
    folder = compose_zoo_folder(NAME)
    whole = (folder / "model.pdiparams").read_bytes()
    (folder / "model.pdiparams").write_bytes(whole[:-5])
    assert compose_zoo_folder(NAME) == folder
    assert (folder / "model.pdiparams").read_bytes() == whole


def test_a_folder_of_that_name_goes_before(tmp_path):
    shutil.copytree(compose_zoo_folder(NAME), tmp_path / NAME)
    manifest = yaml.safe_load((tmp_path / NAME / "deploy.yaml").read_text())
    manifest["classes"] = [f"own {i}" for i in range(11)]
    (tmp_path / NAME / "deploy.yaml").write_text(yaml.safe_dump(manifest))
    assert ppvision.Predictor(NAME).manifest.classes[0] == "own 0"
    (tmp_path / NAME / "deploy.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"deploy\.yaml"):
        ppvision.Predictor(NAME)


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    shutil.copytree(cards.WEIGHTS_FOLDER / NAME, tmp_path / "weights" / NAME)
    (tmp_path / "weights" / NAME / "manifest.json").write_text("{}")
    monkeypatch.setattr(cards, "WEIGHTS_FOLDER", tmp_path / "weights")
    with pytest.raises(WeightsError, match="sha256"):
        ppvision.Predictor(NAME)


def test_several_processes_compose_at_once(cache):
    code = (
        "from ppvision.deploy.run.zoo_folder import compose_zoo_folder\n"
        f"print(compose_zoo_folder({NAME!r}))"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    found = {run.communicate(timeout=300)[0].splitlines()[-1] for run in runs}
    assert found == {str(compose_zoo_folder(NAME))}
    assert [p.name for p in (cache / "zoo").iterdir()] == [compose_zoo_folder(NAME).name]


def test_a_name_without_a_graph_says_so():
    with raises_naming(ValueError, "efficientnet_lite0.imagenet", "graph"):
        ppvision.Predictor("efficientnet_lite0.imagenet")
    with pytest.raises(FileNotFoundError, match=r"segformer_pale_nano\.digit_scenes"):
        ppvision.Predictor("segformer_pale_nano.digit_scene")
    with pytest.raises(FileNotFoundError, match=r"segformer_pale_nano_sdn\.nuclei"):
        ppvision.Predictor("segformer_pale_nano_sdn")
    for name in ("resnet50", "nope", ""):  # all that there are
        with pytest.raises(FileNotFoundError, match=r"segformer_pale_nano_sdn\.nuclei"):
            ppvision.Predictor(name)


def test_a_name_has_the_widths_of_its_layered_model():
    """For `eval --bits` and `export --bits`; without them a name is its highest width, in a float
    model."""
    config = ROOT / "configs" / "segmentation" / "segformer_pale_nano_digit_scenes.yml"
    folder = cards.WEIGHTS_FOLDER / "segformer_pale_nano.digit_scenes"
    found = {}
    for source in ("segformer_pale_nano.digit_scenes", folder):
        ((width, model),) = open_job(config).models(source, [4])
        assert width == 4
        found[source] = {name: value.numpy() for name, value in model.state_dict().items()}
    mine, theirs = found.values()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value)
    ((width, model),) = open_job(config).models("segformer_pale_nano.digit_scenes")
    assert width == 8
    stored = read_weights("segformer_pale_nano.digit_scenes")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), stored[name])


def test_predict_without_a_config_suggests_names(tmp_path, capsys):
    from ppvision.data.writing import write_picture
    from tests.helpers.verbs import ppvision as run_verb

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_picture(pictures / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert run_verb("predict", "--model_path", "pale_nano.nucleus", "--image_path", pictures) == 1
    assert "segformer_pale_nano_sdn.nuclei" in capsys.readouterr().err
