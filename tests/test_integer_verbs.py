"""Integers through the verbs: export, pack, eval, predict, bench and the table of a quickstart."""

import csv
import json
import sys

import paddle
import pytest
import yaml

from ppvision.deploy.run.engines import has_openvino
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.run.precision import find_integer_unit, find_usable_flags
from ppvision.tasks import open_job
from tests.helpers.configs import ROOT, classification_config
from tests.helpers.verbs import ppvision, shell

pytestmark = pytest.mark.skipif(
    not has_openvino() or find_integer_unit(find_usable_flags()) is None,
    reason="no OpenVINO, or a processor without VNNI",
)
SIDE = 24
SHAPE = ("--input_shape", 1, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def job_files(tmp_path_factory, crops):
    """A config of `pale_nano` on three digits, and weights: random ones, of size enough to tell the
    classes apart."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "digits.yml"
    config.write_text(yaml.safe_dump(classification_config(crops)))
    paddle.seed(2)
    model = open_job(config).float_model
    model.head.weight.set_value(5 * model.head.weight)
    paddle.save(model.state_dict(), str(folder / "model.pdparams"))
    return config, folder / "model.pdparams"


@pytest.fixture(scope="module")
def exported(job_files, tmp_path_factory):
    """`export --int8 --keep_float head`: the folder."""
    config, weights = job_files
    folder = tmp_path_factory.mktemp("exported") / "int8"
    where = ("export", "-c", config, "--model_path", weights, "--save_dir", folder)
    assert ppvision(*where, *SHAPE, "--int8", "--keep_float", "head") == 0
    return folder


def test_export_scores_float_and_integers(exported):
    manifest = read_manifest(exported)
    assert manifest.keep_float == ["head"]
    checked = manifest.int8
    assert checked.passed
    assert checked.metric == "top1"
    assert checked.score == pytest.approx(checked.float_score, abs=0.15)  # of 21 pictures
    assert manifest.calibration.pictures == 36  # the config's training set


def test_eval_predict_and_bench_take_a_precision(exported, job_files, crops, tmp_path, capsys):
    config, _ = job_files
    scores = {}
    for precision in ("int8", "float32"):
        capsys.readouterr()
        how = ("--model_dir", exported, "--precision", precision)
        assert ppvision("eval", "-c", config, *how, "--json") == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        scores[precision] = result["scores"]["top1"]
    assert scores["int8"] == pytest.approx(read_manifest(exported).int8.score, abs=1e-6)
    target = tmp_path / "predicted"
    pictures = crops / "val" / "digit 0"
    how = ("--model_dir", exported, "--precision", "int8")
    assert ppvision("predict", *how, "--image_path", pictures, "--save_dir", target) == 0
    assert (target / "predictions.json").is_file()
    capsys.readouterr()
    assert ppvision("bench", *how, "--threads", 1, "--repeats", 2, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row["engine"] == "openvino"


@pytest.mark.all
def test_every_width_in_float_and_in_integers(exported, job_files, crops, tmp_path):
    """`pack --ptq --activations 8`, then `export --bits ... --int8`: two rows for each width; and
    the table of it all."""
    config, weights = job_files
    layers = tmp_path / "digits.layered"
    where = ("-c", config, "--model_path", weights, "--output", layers)
    calibration = ("--activations", 8, "--calibration", crops / "train" / "digit 0")
    assert ppvision("pack", *where, "--ptq", *calibration) == 0
    folder = tmp_path / "widths"
    where = ("-c", config, "--model_path", layers, "--save_dir", folder)
    assert ppvision("export", *where, *SHAPE, "--bits", 8, 4, "--int8") == 0
    with (folder / "widths.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["bits"], row["arithmetic"]) for row in rows]
    assert found == [(k, kind) for k in ("8", "4") for kind in ("float32", "int8")]
    for row in rows:
        checked = read_manifest(folder / f"w{row['bits']}").int8
        in_integers = row["arithmetic"] == "int8"
        assert float(row["top1"]) == (checked.score if in_integers else checked.float_score)
        assert float(row["latency_ms"]) > 0
    assert int(rows[0]["weights_bytes"]) > 1.5 * int(rows[2]["weights_bytes"])
    as_float = tmp_path / "float"
    where = ("-c", config, "--model_path", weights, "--save_dir", as_float)
    assert ppvision("export", *where, *SHAPE) == 0
    script = ROOT / "scripts" / "arithmetic_table.py"
    table = shell(sys.executable, script, as_float, exported, folder / "w8", folder / "w4")
    assert table.returncode == 0, table.stderr
    lines = [line.split() for line in table.stdout.splitlines()]
    assert lines[0] == ["bits", "arithmetic", "top1", "bytes", "ms"]
    kinds = [("32", "float32"), ("8", "int8"), *found]
    assert [tuple(line[:2]) for line in lines[1:]] == kinds


@pytest.mark.all
def test_onnx_by_verb(job_files, tmp_path, capsys):
    config, weights = job_files
    folder = tmp_path / "onnx"
    where = ("export", "-c", config, "--model_path", weights, "--save_dir", folder)
    assert ppvision(*where, *SHAPE, "--int8", "--format", "onnx") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["arithmetic", "weights_bytes", "top1", "ms"]
    manifest = read_manifest(folder)
    assert manifest.int8.passed
    assert manifest.int8.engine == "onnxruntime"
    assert int(rows[2].split()[1]) < 0.4 * int(rows[1].split()[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--keep_float", 1), "--int8"),
        (("--calibration", "PICTURES"), "--int8"),
        (("--int8", "--keep_float", 0), "at least 1"),
        (("--int8", "--keep_float", "nothing"), "nothing"),
        (("--int8", "--keep_float", 9999), "from 1 to 24"),
        (("--int8", "--calibration", "gone"), "gone"),
        (("--int8", "--bits", 4, "--keep_float", 2), "--bits"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, job_files, tmp_path, capsys):
    config, weights = job_files
    where = ("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "net")
    assert ppvision(*where, *SHAPE, *flags, "--skip_eval") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "net").exists()


def test_a_free_size_is_refused(job_files, tmp_path, capsys):
    config, weights = job_files
    where = ("export", "-c", config, "--model_path", weights, "--save_dir", tmp_path / "net")
    assert ppvision(*where, "--int8", "--skip_eval") == 1
    assert "--input_shape 1 3 H W" in capsys.readouterr().err
