from pathlib import Path

import pytest
import yaml

from ppvision.quant import OnceQAT
from ppvision.safe_yaml import drop_places
from ppvision.tasks import open_job
from ppvision.tasks.config import ConfigError, apply_options, read_yaml
from ppvision.tasks.multibit.job import MultiBitJob
from ppvision.tasks.training import train_options
from tests.helpers.configs import ROOT
from tests.helpers.messages import raises_naming


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30), "a\0b"], ids=len)
def test_names_that_no_file_can_have(tmp_path, name):
    (tmp_path / "job.yml").write_text(yaml.safe_dump({"_base_": name}))
    token = "null" if "\0" in name else name[:20]
    for path in (tmp_path / "job.yml", tmp_path / name):
        with pytest.raises(ConfigError, match=token) as raised:
            read_yaml(path)
        assert len(str(raised.value)) < 1000


def test_bases_are_merged_and_replaced(tmp_path):
    (tmp_path / "base.yml").write_text("a: {x: 1, y: 2}\nb: {z: 3}\nc: 4\n")
    (tmp_path / "top.yml").write_text(
        "_base_: base.yml\na: {y: 5}\nb: {_inherited_: False, w: 6}\n"
    )
    assert read_yaml(tmp_path / "top.yml") == {"a": {"x": 1, "y": 5}, "b": {"w": 6}, "c": 4}
    (tmp_path / "other.yml").write_text("_base_: top.yml\nc: {d: 2}\n")
    merged = read_yaml(tmp_path / "other.yml")
    assert merged["c"] == {"d": 2}
    places = {key: merged.place(key).split("/")[-1] for key in "abc"}
    assert places == {"a": "top.yml:2)", "b": "top.yml:3)", "c": "other.yml:2)"}
    assert merged["a"].place("x").endswith("base.yml:1)")
    assert merged["a"].place("y").endswith("top.yml:2)")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a: [1", "job.yml YAML sequence"),
        ("- 1\n- 2\n", "job.yml keys values [1,"),
        ("a: !!python/object/apply:os.system ['true']\n", "job.yml YAML os.system"),
        ("_base_: job.yml\n", "job.yml _base_"),
        ("_base_: jab.yml\n", "jab.yml job.yml"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, tokens):
    (tmp_path / "job.yml").write_text(text)
    with raises_naming(ConfigError, *tokens.split()):
        read_yaml(tmp_path / "job.yml")


def test_a_key_that_is_written_twice_is_refused(tmp_path):
    (tmp_path / "job.yml").write_text("a: {x: 1}\nb: 2\na: {y: 1}\n")
    with raises_naming(ConfigError, "'a'", "twice,", "job.yml:1"):
        read_yaml(tmp_path / "job.yml")


def test_anchors_and_merges_are_plain_yaml(tmp_path):
    (tmp_path / "job.yml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    content = read_yaml(tmp_path / "job.yml")
    assert content == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert type(drop_places(content)["c"]) is dict


def test_errors_name_the_file_and_line(tmp_path):
    """Also of a base, and of an override."""
    base = tmp_path / "base.yml"
    base.write_text("iters: 3\nmodel:\n  type: SegFormer\n  backbnoe: {type: pale_nano}\n")
    top = tmp_path / "top.yml"
    top.write_text("_base_: base.yml\n\nbatchsize: 4\n")
    with raises_naming(ConfigError, "top.yml:3):", "'batchsize'", "batch_size"):
        open_job(top)
    top.write_text("_base_: base.yml\n")
    with raises_naming(ConfigError, "base.yml:4)", "'backbnoe'"):
        open_job(top)
    with raises_naming(ConfigError, "(--opts", "model.type=SegFormr):", "model.type:"):
        open_job(top, ["model.type=SegFormr"])


def test_several_overrides_all_count(config_file):
    """PaddleSeg's own keep only the last of those that share a first key."""
    job = open_job(
        config_file(), ["optimizer.weight_decay=0.5", "optimizer.beta1=0.8", "model.num_classes=11"]
    )
    assert job.content["optimizer"] == {"type": "AdamW", "weight_decay": 0.5, "beta1": 0.8}


def test_an_override_may_begin_a_part_that_was_left_out(config_file):
    path = config_file(lambda c: c.pop("test_config", None))
    assert open_job(path, ["test_config.aug_eval=True"]).content["test_config"] == {
        "aug_eval": True
    }
    with raises_naming(ConfigError, "(--opts", "los.x=1):", "loss"):
        open_job(path, ["los.x=1"])


def test_engine_keys_reach_the_engine(config_file):
    def change(config):
        config |= {"accumulate": 3, "clip_norm": 0.5, "ema_decay": 0.9, "seed": 4}

    options = train_options(open_job(config_file(change)), seed=None, log_iters=7)
    assert (options.accumulate, options.clip_norm, options.ema_decay) == (3, 0.5, 0.9)
    assert (options.seed, options.log_iters, options.batch_size, options.iters) == (4, 7, 4, 6)
    assert train_options(open_job(config_file()), seed=None).seed == 0
    with raises_naming(ConfigError, "job.yml", "accumulate:", "'two'"):
        open_job(config_file(lambda c: c.update(accumulate="two")))


def test_options_reach_lists_and_keep_types():
    config = {"a": {"b": [{"c": 1}, 2]}}
    apply_options(config, ["a.b.0.c=[3, 4]", "a.b.1=5e-1", "a.new=x=y"])
    assert config == {"a": {"b": [{"c": [3, 4]}, 0.5], "new": "x=y"}}
    for option, tokens in (
        ("a", "--opts key=value"),
        ("a.y.z=1", "a.y.z: 'y' b"),
        ("a.b.7.c=1", "a.b.7.c: '7' 2"),
        ("a.b.1.c=1", "a.b.1.c: mapping 'c'"),
    ):
        with raises_naming(ConfigError, *tokens.split()):
            apply_options(config, [option])


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        (lambda c: c.update(itres=3), "'itres' iters"),
        (lambda c: c.update(task="segmentaton"), "task: 'segmentaton' segmentation"),
        (lambda c: c["model"].update(type="SegFomer"), "model.type: 'SegFomer' SegFormer"),
        (
            lambda c: c["model"]["backbone"].update(pale_sise=7),
            "model.backbone: 'pale_sise' pale_size",
        ),
        (
            lambda c: c["train_dataset"]["transforms"].append({"type": "RandomFlip"}),
            "train_dataset.transforms.2.type: 'RandomFlip'",
        ),
        (
            lambda c: c["loss"]["types"][0].update(weights=1),
            "loss.types.0: CrossEntropyLoss 'weights' weight",
        ),
        (lambda c: c["loss"].update(coeff=[1]), "job.yml loss: 'coeff' coef"),
        (lambda c: c["lr_scheduler"].update(pwer=1), "job.yml lr_scheduler: 'pwer'"),
        (lambda c: c["lr_scheduler"].pop("type"), "lr_scheduler: type"),
        (
            lambda c: c["train_dataset"]["transforms"].append("RandomDistort"),
            "train_dataset.transforms.2: {type: 'RandomDistort'",
        ),
        (
            lambda c: c["optimizer"].update(
                grad_clip_cfg={"name": "ClipGradByGlobalNorm", "clip_nrm": 1}
            ),
            "optimizer.grad_clip_cfg: 'clip_nrm' clip_norm",
        ),
        (lambda c: c["optimizer"].update(type="AdamWW"), "optimizer.type: 'AdamWW' AdamW"),
        (lambda c: c.pop("model"), "DefaultPrimaryRule"),
        (
            lambda c: c["val_dataset"].update(num_classes=5),
            "`num_classes` train_dataset val_dataset",
        ),
        (
            lambda c: c.update(imports=["no_such_module_here"]),
            "imports: 'no_such_module_here' ModuleNotFoundError PYTHONPATH",
        ),
        (lambda c: c.update(task="pose"), "task: 'pose' detection"),
        (lambda c: c.update(optimizer=None), "optimizer: keys None"),
        (lambda c: c["model"].update(type=["SegFormer"]), "model.type: ['SegFormer']"),
        (lambda c: c.update(test_config={"is_slid": True}), "test_config: 'is_slid' is_slide"),
        (
            lambda c: c.update(test_config={"is_slide": True}),
            "is_slide: crop_size stride --crop_size",
        ),
        (
            lambda c: c.update(test_config={"flip_vertical": True}),
            "flip_vertical: aug_eval --aug_eval",
        ),
        (
            lambda c: c["lr_scheduler"].update(type="Cosine"),
            "lr_scheduler.type: 'Cosine' PolynomialDecay",
        ),
    ],
)
def test_a_wrong_key_stops_at_once_and_names_the_nearest(config_file, change, tokens):
    with raises_naming(ConfigError, *tokens.split()):
        open_job(config_file(change))


def test_overrides(config_file):
    job = open_job(
        config_file(),
        ["model.embedding_dim=8"],
        batch_size=2,
        learning_rate=0.5,
        epochs=3,
    )
    assert job.config.batch_size == 2
    assert job.iters == 3 * 6  # 12 scenes, 2 a step
    assert job.config.lr_scheduler_cfg["learning_rate"] == 0.5
    assert job.builder.model.linear_pred.weight.shape[1] == 8


SHIPPED = sorted(ROOT.glob("configs/segmentation/*.yml"))


def test_there_are_shipped_configs():
    assert {p.stem for p in SHIPPED} >= {
        *(f"upernet_pale_{v}_ade20k_512x512_160k" for v in ("tiny", "small", "base")),
        *(
            f"{head}_sdn_resnet50_vd_{data}_80k"
            for head in ("fcn", "deeplabv3p")
            for data in ("ade20k_512x512", "cityscapes_1024x512")
        ),
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path: Path, plain_weights):
    """Model, loss, schedule and optimiser; its data set is not here."""
    job = open_job(path)
    builder = job.float_job.builder if isinstance(job, MultiBitJob) else job.builder
    assert builder.loss["types"]
    assert len(job.optimizer._param_groups) > 0
    assert isinstance(job.model, OnceQAT) == ("once_qat" in path.stem)
    assert builder.val_transforms
    assert path.read_text().startswith("#")
