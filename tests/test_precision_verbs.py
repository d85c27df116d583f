"""`export --int8` and `--precision` on the command line; one export for all."""

import contextlib
import io
import json
import re

import paddle
import pytest
import yaml

from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.precision import find_integer_unit, find_usable_flags
from ppvision.tasks import integers, open_job
from tests.helpers.configs import classification_config
from tests.helpers.verbs import ppvision

needs_integers = pytest.mark.skipif(
    not has_openvino() or find_integer_unit(find_usable_flags()) is None,
    reason="no OpenVINO, or a processor without VNNI",
)
SHAPE = ("--input_shape", 1, 3, 24, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory, crops):
    """A small classifier: `(config, weights)`."""
    folder = tmp_path_factory.mktemp("precision")
    config, weights = folder / "net.yml", folder / "net.pdparams"
    config.write_text(yaml.safe_dump(classification_config(crops)))
    paddle.seed(0)
    paddle.save(open_job(config).float_model.state_dict(), str(weights))
    return config, weights


@pytest.fixture(scope="module")
def exported(model):
    """`(folder, what was shown)`, from a command without --save_dir."""
    config, weights = model
    shown = io.StringIO()
    with contextlib.chdir(config.parent), contextlib.redirect_stdout(shown):
        assert ppvision("export", "-c", config, "--model_path", weights, "--int8", *SHAPE) == 0
    return config.parent / "inference" / "net-int8", shown.getvalue()


def score_of(text: str) -> str:
    return re.search(r"top1 (\d\.\d{4})", text)[1]


@needs_integers
def test_the_table_compares_integers_with_float(exported):
    folder, shown = exported
    head, as_float, as_integers, last = [line.split() for line in shown.splitlines()]
    assert head == ["arithmetic", "weights_bytes", "top1", "ms"]
    assert (as_float[0], as_integers[0]) == ("float32", "int8")
    assert int(as_integers[1]) < int(as_float[1])
    assert " ".join(last) == "exported model: inference/net-int8"
    manifest = read_manifest(folder)
    assert int(as_integers[1]) == manifest.files["model.pdiparams"].bytes
    assert manifest.int8.metric == "top1"
    assert float(as_integers[2]) == pytest.approx(manifest.int8.score, abs=5e-5)
    assert float(as_float[2]) == pytest.approx(manifest.int8.float_score, abs=5e-5)
    assert manifest.calibration.pictures == 36  # the training set


@needs_integers
def test_eval_in_each_precision(model, exported, capsys):
    """The score in integers is the one that deploy.yaml has."""
    manifest = read_manifest(exported[0])
    found = {}
    for precision in ("int8", "float32", "fp32"):
        how = ("--model_dir", exported[0], "--precision", precision)
        assert ppvision("eval", "-c", model[0], *how) == 0
        found[precision] = score_of(capsys.readouterr().out)
    assert float(found["int8"]) == pytest.approx(manifest.int8.score, abs=5e-5)
    assert found["fp32"] == found["float32"]


@needs_integers
def test_predict_and_bench_in_integers(exported, crops, tmp_path, capsys):
    picture = crops / "val" / "digit 1" / "0.png"
    out = ("--save_dir", tmp_path / "out")
    how = ("--model_dir", exported[0], "--precision", "int8")
    assert ppvision("predict", *how, "--image_path", picture, *out) == 0
    assert str(picture) in (tmp_path / "out" / "predictions.json").read_text()
    capsys.readouterr()
    assert ppvision("bench", *how, "--repeats", 1, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert "openvino" in row["engine"].lower()


def test_precision_is_of_an_exported_folder(model, crops, capsys):
    config, weights = model
    how = ("-c", config, "--model_path", weights, "--precision", "int8")
    pictures = ("--image_path", crops / "val")
    for command in (("eval", *how), ("predict", *how, *pictures)):
        assert ppvision(*command) == 1
        assert "--model_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ppvision("eval", "-c", config, "--model_dir", "x", "--precision", "int4")


def test_flags_of_integers_are_handed_on(model, tmp_path, monkeypatch, capsys):
    config, weights = model
    given = []

    def record(job, model_path, folder, **how):
        given.append((model_path, folder, how))
        return [{"arithmetic": "int8"}]

    monkeypatch.setattr(integers, "export_integers", record)
    code = ppvision(
        *("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "net"),
        *("--int8", "--calibration", "pictures", "--calibration_rule", "maximum", "--skip_eval"),
        *("--keep_float", "head", "merges.0.0", "--output_op", "softmax", *SHAPE),
    )
    assert code == 0
    ((model_path, folder, how),) = given
    assert (model_path, folder) == (str(weights), str(tmp_path / "net"))
    assert how == {
        "calibration": "pictures",
        "rule": "maximum",
        "keep_float": ["head", "merges.0.0"],
        "evaluate": False,
        "input_shape": [1, 3, 24, 24],
        "output_op": "softmax",
        "model_format": "paddle",
        "paddlex_name": None,
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--calibration", "x"), "--int8"),
        (("--keep_float", "head"), "--int8"),
        (("--calibration_rule", "maximum", "--int8", "--bits", "8"), "--bits"),
    ],
)
def test_flags_that_do_not_go_together(model, flags, says, tmp_path, capsys):
    config, weights = model
    export = ("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "net")
    assert ppvision(*export, *flags) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "net").exists()
