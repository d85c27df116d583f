"""Layered quantization through the verbs: Pale, SDN and once-QAT in one config."""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import shutil

import cv2
import numpy as np
import paddle
import pytest
import yaml
from paddle import nn
from visualdl.proto.record_pb2 import Record
from visualdl.reader.record_reader import RecordReader

from ppvision.deploy import Predictor, export_model
from ppvision.deploy.run.manifest import read_manifest
from ppvision.deploy.verify.comparison import measure_rounding_error
from ppvision.engine.checkpoint import list_checkpoints
from ppvision.engine.run_folder import RunFolder, read_metrics
from ppvision.quant import OnceQAT, load_layered, save_layered
from ppvision.quant.packed import FixedActivation, pack_model
from ppvision.quant.store.state import LayeredActivation
from ppvision.tasks import open_job
from ppvision.tasks.multibit.scores import score_by_width
from ppvision.tasks.training import run_training, train_options
from ppvision.zoo.weights import read_weights
from tests.helpers.configs import ROOT, classification_config, small_config
from tests.helpers.messages import raises_naming
from tests.helpers.verbs import ppvision, shell

BITS = (8, 4, 2)


def all_three(config: dict) -> None:
    """Pale + SDN + once-QAT."""
    backbone = config["model"]["backbone"]
    config["model"]["backbone"] = {
        "type": "SemanticDiffusionBackbone",
        "similarity": "gaussian",
        "backbone": backbone,
    }
    config["slim_config"] = {"bits": list(BITS)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """Four steps of all three together: `(config, run folder)`."""
    folder = tmp_path_factory.mktemp("once")
    content = small_config(scenes)
    all_three(content)
    config = folder / "job.yml"
    config.write_text(yaml.safe_dump(content))
    code = ppvision(
        *("train", "-c", config, "--save_dir", folder / "run", "--do_eval", "--use_ema"),
        *("--iters", 4, "--log_iters", 1, "--save_interval", 2),
    )
    assert code == 0
    return config, folder / "run"


@pytest.fixture(scope="module")
def packed(trained):
    """Its best model as layers."""
    config, run = trained
    folder = run / "model.layered"
    best = run / "best_model" / "model.pdparams"
    assert ppvision("pack", "-c", config, "--model_path", best, "--output", folder) == 0
    return folder


def scores_in(text: str) -> dict[int, float]:
    """mIoU by bits in a printed table."""
    rows = [line.split() for line in text.splitlines()]
    place = next(i for i, row in enumerate(rows) if row[:2] == ["bits", "mIoU"])
    return {int(row[0]): float(row[1]) for row in rows[place + 1 :][: len(BITS)]}


def test_every_width_is_logged(trained):
    _, run = trained
    rows = read_metrics(run / "metrics.csv")
    for step in (2, 4):
        at = {tag: value for number, tag, value in rows if number == step}
        for name in ("mIoU", "BoundaryIoU", "Ema_mIoU"):
            of_widths = [at[f"Evaluate/{name}_w{k}"] for k in BITS]
            assert at[f"Evaluate/{name}"] == pytest.approx(np.mean(of_widths))
        losses = [at[f"Train/loss_w{k}"] for k in BITS]
        assert at["Train/loss"] == pytest.approx(np.mean(losses))


def test_a_resume_is_exact(trained, tmp_path):
    config, run = trained
    checkpoint = list_checkpoints(run / "checkpoints")[0]
    again = tmp_path / "again"
    code = ppvision(
        *("train", "-c", config, "--save_dir", again, "--do_eval", "--use_ema", "--iters", 4),
        *("--log_iters", 1, "--save_interval", 2, "--resume", checkpoint),
    )
    assert code == 0
    for name in ("model", "ema", "optimizer"):
        whole = read_weights(run / "checkpoints" / "step_4" / f"{name}.safetensors")
        resumed = read_weights(again / "checkpoints" / "step_4" / f"{name}.safetensors")
        assert whole.keys() == resumed.keys()
        for key in whole:
            np.testing.assert_array_equal(whole[key], resumed[key], err_msg=key)
    model, ema = (
        read_weights(run / "checkpoints" / "step_4" / f"{name}.safetensors")
        for name in ("model", "ema")
    )
    steps = [key for key in model if ".initial_step_" in key]
    assert steps
    for key in steps:  # where training began is not averaged
        np.testing.assert_array_equal(model[key], ema[key], err_msg=key)


def test_eval_prints_all_widths_or_one(trained, packed, capsys):
    config, run = trained
    best = run / "best_model" / "model.pdparams"
    tables = []
    for model in (best, packed):
        capsys.readouterr()
        assert ppvision("eval", "-c", config, "--model_path", model) == 0
        tables.append(scores_in(capsys.readouterr().out))
        assert ppvision("eval", "-c", config, "--model_path", model, "--bits", 4) == 0
        one = capsys.readouterr().out
        assert f"mIoU {tables[-1][4]:.4f}" in one
    assert tables[0] == tables[1]
    assert set(tables[0]) == set(BITS)


def test_a_layered_model_needs_no_slim_config(trained, packed, tmp_path, scenes, capsys):
    content = small_config(scenes)
    all_three(content)
    del content["slim_config"]
    plain = tmp_path / "plain.yml"
    plain.write_text(yaml.safe_dump(content))
    assert ppvision("eval", "-c", plain, "--model_path", packed, "--bits", 2) == 0
    image = next((scenes / "images" / "val").iterdir())
    assert (
        ppvision(
            *("predict", "-c", plain, "--model_path", packed, "--bits", 2),
            *("--image_path", image, "--save_dir", tmp_path / "predicted"),
        )
        == 0
    )
    assert ppvision("pack", "--info", packed) == 0
    assert "w2.safetensors" in capsys.readouterr().out

    best = trained[1] / "best_model" / "model.pdparams"
    capsys.readouterr()
    assert ppvision("eval", "-c", plain, "--model_path", best) == 1
    assert "expected slim_config" in capsys.readouterr().err


def test_the_layered_model_says_what_it_is(trained, packed):
    loaded = load_layered(packed, 2)
    assert [name for name, _ in loaded.opened] == ["manifest.json", "w2.safetensors"]
    assert loaded.config["model"]["type"] == "SegFormer"
    assert loaded.config["classes"][0] == "background"
    assert str(packed.parent.parent) not in json.dumps(loaded.config)


def test_a_checkpoint_and_its_layers_are_the_same(trained, packed):
    config, run = trained
    job = open_job(config)
    ours = job.state(run / "best_model" / "model.pdparams")
    for k in BITS:
        theirs = load_layered(packed, k).state_dict
        for name, array in ours.state_dict(k).items():
            np.testing.assert_array_equal(theirs[name], array, err_msg=name)


def export_by_verb(config, packed, *flags) -> str:
    """What `ppvision export` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert ppvision("export", "-c", config, "--model_path", packed, *flags) == 0
    return shown.getvalue()


def export_by_script(config, packed, *flags) -> str:
    """What `export_multibit.sh` shows, which is this verb (`tests/test_scripts.py`)."""
    done = shell("bash", ROOT / "scripts" / "export_multibit.sh", config, packed, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("bits", "export"),
    [((2,), export_by_verb), pytest.param((2, 8), export_by_script, marks=pytest.mark.all)],
    ids=["2", "2 8"],
)
def test_export_of_widths(trained, packed, tmp_path, bits, export):
    """All three ideas, exported: the same numbers as eager mode."""
    config, _ = trained
    folder = tmp_path / "exported"
    shown = export(
        *(config, packed, "--save_dir", folder, "--bits", *bits, "--output_op", "none"),
        *("--input_shape", "None", 3, 56, 56),
    )
    order = sorted(bits, reverse=True)
    table = shown.splitlines()[-len(bits) - 2 : -1]
    assert [line.split()[0] for line in table] == ["bits", *map(str, order)]
    with (folder / "widths.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bits"]) for row in rows] == order
    if len(bits) > 1:
        assert float(rows[0]["weights_bytes"]) > 2.5 * float(rows[1]["weights_bytes"])
    (record,) = (folder / "vdl" / "w2").glob("vdlrecords.*")
    stored = [Record.FromString(data) for data in RecordReader(str(record)).get_all()]
    values = [v for r in stored for v in r.values]
    (settings,) = [v.hparam for v in values if v.WhichOneof("one_value") == "hparam"]
    assert [(h.name, h.int_value) for h in settings.hparamInfos] == [("bits", 2)]
    assert {v.tag for v in values if v.WhichOneof("one_value") == "value"} >= {"bytes", "mIoU"}

    job = open_job(config)
    for k in order:
        manifest = read_manifest(folder / f"w{k}")
        assert manifest.bits == k
        assert manifest.max_error_to_eager <= 1e-4
        with pytest.raises(ValueError, match="float"):
            Predictor(folder / f"w{k}", layered=packed)
        size = (folder / f"w{k}" / "model.pdiparams").stat().st_size
        assert manifest.files["model.pdiparams"].bytes == size
        eager = job.load(packed, k)
        x = np.random.default_rng(0).normal(size=(3, 3, 56, 56)).astype(np.float32)
        (found,) = Predictor(folder / f"w{k}").run(x)
        with paddle.no_grad():
            expected = eager(paddle.to_tensor(x))[0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
        scores = job.evaluate_exported(folder / f"w{k}")
        row = next(row for row in rows if int(row["bits"]) == k)
        assert float(row["mIoU"]) == pytest.approx(scores.miou)


@pytest.mark.all
def test_export_of_widths_does_not_mix(packed, trained, tmp_path, capsys):
    """Neither with other files nor with widths of an earlier export."""
    config, _ = trained
    folder = tmp_path / "widths"
    export = ("export", "-c", config, "--model_path", packed, "--save_dir", folder, "--skip_eval")
    export += ("--input_shape", 1, 3, None, None, "--bits")
    assert ppvision(*export, 4, 2) == 0
    assert ppvision(*export, 2) == 0
    assert {path.name for path in folder.iterdir()} == {"w2", "widths.csv", "vdl"}
    (folder / "w4").mkdir()
    (folder / "w4" / "mine.txt").touch()
    assert ppvision(*export, 8) == 1
    assert "which holds w4" in capsys.readouterr().err
    assert not (folder / "w8").exists()


@pytest.fixture(scope="module")
def float_export(packed, trained, tmp_path_factory):
    """An export without --bits."""
    config, _ = trained
    folder = tmp_path_factory.mktemp("float") / "exported"
    export = ("export", "-c", config, "--model_path", packed, "--save_dir", folder)
    assert ppvision(*export, "--output_op", "none") == 0
    return folder


def logits_of(job: object, packed, bits: int, x: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        return job.load(packed, bits)(paddle.to_tensor(x))[0].numpy()


def test_export_without_bits_is_the_highest_width_in_float(trained, packed, float_export):
    assert read_manifest(float_export).bits == 32
    x = np.random.default_rng(0).normal(size=(1, 3, 61, 45)).astype(np.float32)
    (found,) = Predictor(float_export).run(x)
    np.testing.assert_allclose(found, logits_of(open_job(trained[0]), packed, 8, x), atol=1e-4)


def test_predictor_composes_a_width(trained, packed, float_export):
    job = open_job(trained[0])
    x = np.random.default_rng(0).normal(size=(2, 3, 61, 45)).astype(np.float32)
    predictor = Predictor(float_export, layered=packed, bits=2)
    for bits in (2, 8, 5, 2):
        predictor.set_bits(bits)
        assert predictor.bits == bits
        expected = logits_of(job, packed, bits, x)
        np.testing.assert_allclose(predictor.run(x)[0], expected, atol=1e-4)


def test_predictor_refuses_what_does_not_fit(packed, float_export, tmp_path):
    with raises_naming(ValueError, "bits:", "(layered=...)"):
        Predictor(float_export, bits=4)
    with raises_naming(ValueError, "set_bits:", "(layered=...)"):
        Predictor(float_export).set_bits(4)
    with raises_naming(ValueError, "bits:", "2", "8", "9"):
        Predictor(float_export, layered=packed, bits=9)
    state = load_layered(packed).state
    floats = dict(state.floats)
    floats.pop(next(iter(floats)))
    other = save_layered(
        dataclasses.replace(state, floats=floats), tmp_path / "other", bits=BITS, config={}
    )
    with raises_naming(ValueError, "layered:", "architecture"):
        Predictor(float_export, layered=other)


def test_predictor_refuses_other_classes(packed, float_export, tmp_path):
    loaded = load_layered(packed)
    names = [f"thing {number}" for number in range(read_manifest(float_export).num_classes)]
    other = save_layered(
        loaded.state, tmp_path / "other", bits=BITS, config=loaded.config | {"classes": names}
    )
    named = tmp_path / "named"  # the export, whose classes have names here
    shutil.copytree(float_export, named)
    manifest = yaml.safe_load((named / "deploy.yaml").read_text())
    manifest["classes"] = names
    (named / "deploy.yaml").write_text(yaml.safe_dump(manifest))
    Predictor(named, layered=other)
    manifest["classes"] = names[::-1]
    (named / "deploy.yaml").write_text(yaml.safe_dump(manifest))
    with raises_naming(ValueError, "layered:", "classes", "thing", "0"):
        Predictor(named, layered=other)


def test_an_export_says_the_width_that_it_holds(trained, packed, tmp_path):
    job = open_job(trained[0])
    model = pack_model(job.structure(), load_layered(packed).state, 4)
    for bits in (2, 32):
        with raises_naming(ValueError, "bits:", "4,", str(bits)):
            export_model(model, tmp_path / "out", input_shape=[1, 3, 48, 48], bits=bits)
    with raises_naming(ValueError, "bits:", "32,", "4"):
        export_model(job.float_model, tmp_path / "out", input_shape=[1, 3, 48, 48], bits=4)
    assert not (tmp_path / "out").exists()


def test_export_to_onnx(packed, trained, tmp_path):
    config, _ = trained
    code = ppvision(
        *("export", "-c", config, "--model_path", packed, "--save_dir", tmp_path / "onnx"),
        *("--bits", 4, "--format", "onnx", "--skip_eval", "--input_shape", 1, 3, 56, 56),
    )
    assert code == 0
    manifest = read_manifest(tmp_path / "onnx" / "w4")
    assert (manifest.bits, manifest.format) == (4, "onnx")
    # Packed codes there as well: four bits a weight, not 32.
    with (tmp_path / "onnx" / "widths.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["bytes"]) == manifest.files["model.onnx"].bytes
    whole = sum(p.numel() for p in open_job(config).float_model.parameters())
    assert manifest.files["model.onnx"].bytes < 0.5 * 4 * int(whole)


def test_ptq_with_activations(tmp_path, crops, capsys):
    content = classification_config(crops)
    content["model"] = {"type": "resnet20", "num_classes": 3}
    content["slim_config"] = {"bits": [8, 4], "activations": True}
    config = tmp_path / "job.yml"
    config.write_text(yaml.safe_dump(content))
    job = open_job(config)
    weights = tmp_path / "float.pdparams"
    paddle.save(job.float_model.state_dict(), str(weights))
    out = tmp_path / "layers"
    pack = ("pack", "-c", config, "--model_path", weights, "--output", out)
    assert ppvision(*pack) == 1
    assert "quantise them as they are with --ptq" in capsys.readouterr().err
    assert not out.exists()
    assert ppvision(*pack, "--ptq") == 0
    assert "images of the training set" in capsys.readouterr().err
    assert load_layered(out).state.activations
    assert ppvision(*pack, "--ptq", "--calibration", crops / "val" / "digit 0") == 0
    state = load_layered(out).state
    assert state.activations
    norms = [name for name in state.statistics[8] if name.endswith("_mean")]
    assert norms
    assert any(not np.array_equal(state.statistics[8][n], state.statistics[4][n]) for n in norms)
    assert ppvision("eval", "-c", config, "--model_path", out) == 0
    # A value between two codes rounds either way; at 2 bits nearly all numbers move by that.
    export = ("export", "-c", config, "--model_path", out, "--skip_eval")
    sized = ("--save_dir", tmp_path / "widths", "--input_shape", 1, 3, 24, 24)
    assert ppvision(*export, *sized, "--bits", 8, 4) == 0
    for k in (8, 4):
        manifest = read_manifest(tmp_path / "widths" / f"w{k}")
        assert manifest.max_error_to_eager < 0.5


def test_ptq_with_images_or_weights_that_calibrate_nothing(tmp_path, crops, capsys):
    content = classification_config(crops)
    content["model"] = {"type": "resnet20", "num_classes": 3}
    config = tmp_path / "job.yml"
    config.write_text(yaml.safe_dump(content))
    state = open_job(config).float_model.state_dict()
    paddle.save(state, str(tmp_path / "float.pdparams"))
    state["stem.weight"].set_value(state["stem.weight"] * 1e38)
    state["norm.weight"].set_value(state["norm.weight"] * 1e38)
    paddle.save(state, str(tmp_path / "huge.pdparams"))
    grey = tmp_path / "grey"
    grey.mkdir()
    cv2.imwrite(str(grey / "0.png"), np.full((24, 24, 3), 128, np.uint8))

    def pack(weights: str) -> int:
        out = tmp_path / weights.removesuffix(".pdparams")
        how = ("--ptq", "--activations", 8, "--calibration", grey, "--output", out)
        return ppvision("pack", "-c", config, "--model_path", tmp_path / weights, *how)

    assert pack("float.pdparams") == 0
    assert "one single shade" in capsys.readouterr().err
    assert pack("huge.pdparams") == 1
    assert "infinity" in capsys.readouterr().err
    assert not (tmp_path / "huge").exists()


def test_float_weights_start_quanters_anew(config_file, tmp_path):
    """Whatever was looked at before: quanters take their steps from the weights given last."""
    path = config_file(lambda config: config.update(slim_config={"bits": [8, 4]}))
    paddle.seed(3)
    state = open_job(path).float_model.state_dict()
    other = {n: t * 3 if t.ndim > 1 else t for n, t in state.items()}
    for name, arrays in (("first", state), ("other", other)):
        paddle.save(arrays, str(tmp_path / f"{name}.pdparams"))

    def arrays_of(*names: str, touch: bool = False) -> dict[str, np.ndarray]:
        job = open_job(path)
        if touch:
            assert job.optimizer is not None
            assert job.model is job.model
        for name in names:
            model = job.load(tmp_path / f"{name}.pdparams", 4)
        updated = {id(p) for p in job.optimizer._parameter_list}
        assert all(id(p) in updated for p in model.parameters() if not p.stop_gradient)
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    expected = arrays_of("other")
    for found in (arrays_of("other", touch=True), arrays_of("first", "other", "other")):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, name)


# -- training elsewhere ----------------------------------------------------------------------------


def test_paddlesegs_own_trainer(config_file, tmp_path, monkeypatch):
    """Its losses are those of our engine; every weight is trained."""
    stock = importlib.import_module("paddleseg.core.train")

    def change(config: dict) -> None:
        all_three(config)
        config["model"]["backbone"]["backbone"]["drop_path_rate"] = 0.0
        config["train_dataset"]["transforms"].pop(0)
        config["iters"] = 3

    path = config_file(change)

    def without_dropout() -> object:
        job = open_job(path)
        paddle.seed(0)
        for layer in job.model.sublayers():
            if isinstance(layer, paddle.nn.Dropout | paddle.nn.Dropout2D):
                layer.p = 0.0
        return job

    ours = without_dropout()
    options = train_options(ours, log_iters=1, save_interval=3)
    run_training(ours, RunFolder(tmp_path / "ours"), options, do_eval=False, use_vdl=False)

    theirs, seen = without_dropout(), []
    whole = OnceQAT.loss_computation

    def recorded(self, *arguments):
        losses = whole(self, *arguments)
        seen.append([float(loss) for loss in losses])
        return losses

    monkeypatch.setattr(OnceQAT, "loss_computation", recorded)
    before = {n: p.numpy() for n, p in theirs.model.named_parameters() if not p.stop_gradient}
    optimizer = theirs.optimizer
    stock.train(
        theirs.model,
        theirs.train_dataset,
        optimizer=optimizer,
        save_dir=str(tmp_path / "theirs"),
        iters=3,
        batch_size=4,
        save_interval=3,
        log_iters=1,
        losses=theirs.float_job.builder.loss,
    )
    rows = read_metrics(tmp_path / "ours" / "metrics.csv")
    for place, bits in enumerate(BITS):
        logged = [value for _, tag, value in rows if tag == f"Train/loss_w{bits}"]
        np.testing.assert_allclose([3 * losses[place] for losses in seen], logged, 2e-3)
    for name, parameter in theirs.model.named_parameters():
        if not parameter.stop_gradient:
            assert not np.array_equal(parameter.numpy(), before[name]), name


def test_classification_with_the_sandwich_rule(crops, tmp_path):
    content = classification_config(crops)
    content["slim_config"] = {"bits": [8, 6, 4, 2], "objective": "sandwich", "distillation": 0.5}
    config = tmp_path / "classes.yml"
    config.write_text(yaml.safe_dump(content))
    run = tmp_path / "run"
    code = ppvision(
        *("train", "-c", config, "--save_dir", run, "--do_eval", "--iters", 1),
        *("--log_iters", 1, "--save_interval", 1),
    )
    assert code == 0
    rows = read_metrics(run / "metrics.csv")
    tags = {tag for _, tag, _ in rows}
    assert {"Train/loss_w8", "Train/loss_random", "Train/loss_w2"} <= tags
    assert {f"Evaluate/top1_w{k}" for k in (8, 6, 4, 2)} <= tags
    job = open_job(config)
    model = job.load(run / "best_model" / "model.pdparams", 6)
    assert isinstance(model, OnceQAT)
    found = score_by_width(model, lambda m: {"Evaluate/top1": job.evaluate(m).top1})
    logged = {tag: value for _, tag, value in rows if tag in found}
    assert found == pytest.approx(logged)


@pytest.mark.parametrize(
    ("slim", "message"),
    [
        ({"bit": [8]}, "got 'bit'. Did you mean bits"),
        ({"objective": "sandwhich"}, "got 'sandwhich'. Did you mean sandwich"),
        ({"bits": [8, 9]}, "from 1 to 8, got 9"),
        ({"layers": {"head.*": {"bits": 4}}}, "'head.*' matches no layer"),
        ({"layers": [4]}, "expected a rule such as"),
        ("8", "slim_config: expected keys and values (slim_config: {} takes every default), got"),
        (None, "takes every default), got None"),
        ({"layers": None}, "expected a rule such as"),
        ({"bits": 4}, "bits: expected a list of widths such as [8, 4, 2], got 4"),
        ({"bits": ["8"]}, "slim_config.bits.0: expected a whole number from 1 to 8, got '8'"),
        ({"weights": 3}, "expected a number for each of bits, got 3"),
        ({"activations": "yes"}, "slim_config.activations: expected true, false or 8, got 'yes'"),
        (
            {"weights": [float("inf"), 1]},
            "slim_config.weights.0: expected a number of at least 0, got inf",
        ),
        (
            {"distillation": float("inf")},
            "distillation: expected a number of at least 0",
        ),
        ({"layers": {"head.*": {"bit": 4}}}, "slim_config.layers.head.*: expected only known keys"),
        ({"types": {"Linear": {"float": 1}}}, "Linear.float: expected true or false, got 1"),
        ({"layers": {0: {"bits": 4}}}, "name (a number as a name in quotes)"),
    ],
)
def test_wrong_slim_configs(config_file, tmp_path, capsys, slim, message):
    path = config_file(lambda config: config.update(slim_config=slim))
    assert ppvision("train", "-c", path, "--save_dir", tmp_path / "run", "--iters", 1) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_slim_config_from_its_own_file(config_file, tmp_path):
    slim = tmp_path / "slim.yml"
    slim.write_text("bits: [8, 3]\nsteps: per_width\n")
    job = open_job(config_file(), slim_config=slim)
    assert job.model.widths == (8, 3)
    slim.write_text("slim_config:\n  bits: [4, 2]\n")
    assert open_job(config_file(), slim_config=slim).model.widths == (4, 2)


def test_the_sandwich_of_two_widths_is_both(config_file, tmp_path):
    slim = {"bits": [8, 2], "objective": "sandwich"}
    path = config_file(lambda config: config.update(slim_config=slim))
    run = tmp_path / "run"
    assert ppvision("train", "-c", path, "--save_dir", run, "--iters", 1, "--log_iters", 1) == 0
    tags = {tag for _, tag, _ in read_metrics(run / "metrics.csv")}
    assert {"Train/loss_w8", "Train/loss_w2"} <= tags


def test_bits_of_a_float_model(config_file, tmp_path, capsys):
    config = config_file()
    job = open_job(config)
    weights = tmp_path / "float.pdparams"
    paddle.save(job.float_model.state_dict(), str(weights))
    for verb in (("eval", "--bits", 4), ("export", "--bits", 4, "--save_dir", tmp_path / "x")):
        assert ppvision(verb[0], "-c", config, "--model_path", weights, *verb[1:]) == 1
        assert "expected a model with widths" in capsys.readouterr().err


# -- parity of rounded activations -----------------------------------------------------------------


def test_a_models_own_rounding_is_its_bound():
    activation = LayeredActivation(np.float32([0.5]), (8,), 8, 8, signed=True)
    x = np.full((1, 3, 4, 4), 0.25, np.float32)  # between the codes 0 and 1
    rounding, smooth = FixedActivation(activation, 8), nn.Identity()
    for model, low, high in ((rounding, 0.4, 0.6), (smooth, 1e-7, 1e-4)):
        eager = [model(paddle.to_tensor(x)).numpy()]
        assert low < measure_rounding_error(model, "features", [(x, eager)]) < high


def test_roundings_after_the_first_one_count():
    """The first takes the last digits of the picture away; an engine's own come after it."""
    first, second = (
        FixedActivation(LayeredActivation(np.float32([step]), (8,), 8, 8, signed=True), 8)
        for step in (1.0, 6.0)
    )
    x = np.full((1, 3, 4, 4), 3.1, np.float32)  # code 3 of the first, a half of the second's step
    model = nn.Sequential(first, second)
    eager = [model(paddle.to_tensor(x)).numpy()]
    assert eager[0].min() == 6.0
    assert measure_rounding_error(model, "features", [(x, eager)]) == 1.0  # 0 instead of 6
    assert np.array_equal(model(paddle.to_tensor(x)).numpy(), eager[0])  # nothing is left behind
