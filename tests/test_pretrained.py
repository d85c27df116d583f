"""`pretrained` of stock components under ppvision: no pickle, and no download unasked."""

import importlib
import io
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddleseg.models.backbones import MixVisionTransformer_B0 as Stock

import ppvision.zoo.fetching as module
from ppvision.cli import run
from ppvision.errors import ConfigError, MissingFileError, WeightsError
from ppvision.files import find_cache_folder
from ppvision.plugins.libraries import load_safely
from ppvision.tasks import open_job
from tests.helpers.arrays import Hostile, assert_same
from tests.helpers.file_server import FileServer, serve_folder
from tests.helpers.messages import raises_naming

# PaddleSeg logs, and PaddleDetection warns that weights are missing.
pytestmark = pytest.mark.filterwarnings("ignore:Skip loading")


def shifted(seed: int = 0) -> Stock:
    """A stock backbone whose weights no initialisation gives."""
    net = Stock()
    for number, tensor in enumerate(net.state_dict().values()):
        tensor.set_value(paddle.full_like(tensor, seed + number % 7 + 0.5))
    return net


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "stock.pdparams"
    paddle.save(shifted().state_dict(), str(path))
    return path


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    with serve_folder(folder) as server:
        yield server


def test_a_file_gives_what_paddlesegs_own_loader_gives(weights):
    own = Stock(pretrained=str(weights))
    with load_safely(allow_download=False):
        ours = Stock(pretrained=str(weights))
    assert_same(own, ours)
    assert_same(ours, shifted())


def test_a_pickle_runs_nothing_and_paddles_loader_is_back_afterwards(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.pdparams").write_bytes(pickle.dumps({"weight": Hostile(marker)}))
    load = paddle.load
    with load_safely(allow_download=False):
        assert paddle.load is not load
        with raises_naming(WeightsError, "evil.pdparams:", "code"):
            Stock(pretrained=str(tmp_path / "evil.pdparams"))
    assert not marker.exists()
    assert paddle.load is load
    paddle.load(str(tmp_path / "evil.pdparams"))  # what its tools would do
    assert marker.exists()


def pack(path: Path, weights: Path, names: tuple[str, ...]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.write(weights, name)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(weights, name)


@pytest.mark.parametrize("name", ["stock.pdparams", "stock.tar.gz", "stock.zip"])
def test_an_address_is_fetched_once_and_on_request_only(server: FileServer, weights, name):
    url = f"{server.url}/{name}"
    if name == weights.name:
        (server.folder / name).write_bytes(weights.read_bytes())
    else:
        pack(
            server.folder / name, weights, ("stock/README", "stock/model.pdparams", "._m.pdparams")
        )
    with (
        load_safely(allow_download=False),
        pytest.raises(WeightsError, match="--allow_download"),
    ):
        Stock(pretrained=url)
    assert server.requests == []
    for allow_download in (True, False):  # the second time it is in the cache
        with load_safely(allow_download):
            assert_same(Stock(pretrained=url), shifted())
    assert server.requests == [("GET", name)]


def test_archives_that_hold_no_weights(server: FileServer, weights, monkeypatch):
    def refused(*tokens: str) -> None:
        with (
            load_safely(allow_download=True),
            raises_naming(WeightsError, *tokens),
        ):
            Stock(pretrained=f"{server.url}/stock.tar.gz")
        assert not list(find_cache_folder().rglob("*.pdparams*"))

    target = server.folder / "stock.tar.gz"
    refused("stock.tar.gz", "404")
    for names in ((), ("a.pdparams", "b.pdparams"), ("a.txt",)):
        pack(target, weights, names)
        refused("stock.tar.gz", "one", ".pdparams")
    pack(target, weights, ("a.pdparams",))
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    refused("stock.tar.gz:", "cut")
    target.write_bytes(whole)
    monkeypatch.setattr(module, "MAX_BYTES", len(whole) - 1)
    refused(str(len(whole) - 1))
    monkeypatch.setattr(module, "MAX_BYTES", len(whole) + 10)  # less than it unpacks to
    refused(str(len(whole) + 10))


@pytest.mark.parametrize("member", ["model.pdparams", "README"])
@pytest.mark.parametrize("name", ["stock.tar.gz", "stock.zip"])
def test_an_archive_that_unpacks_to_far_more_than_it_is(
    server: FileServer, tmp_path, monkeypatch, name, member
):
    zeros = tmp_path / "zeros"
    with zeros.open("wb") as file:
        file.truncate(100 << 20)
    target = server.folder / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(zeros, member)
    else:
        pack(target, zeros, (member,))
    assert target.stat().st_size < 1 << 20
    monkeypatch.setattr(module, "read_weights", lambda path: pytest.fail("it was unpacked"))
    with raises_naming(WeightsError, name, str(64 << 20)):
        module.fetch_weights(f"{server.url}/{name}", allow_download=True)
    assert not [path for path in find_cache_folder().rglob("*") if path.is_file()]


def test_what_an_archive_says_of_its_members_is_not_believed(tmp_path):
    with (
        (tmp_path / "unpacked").open("wb") as target,
        raises_naming(WeightsError, "stock.zip", "10", "bytes"),
    ):
        module._copy(io.BytesIO(bytes(11)), target, "stock.zip", 10)


@pytest.mark.parametrize("name", ["stock.pdparams", "stock.tar.gz"])
def test_a_wrong_answer_does_not_stay_in_the_cache(server: FileServer, weights, tmp_path, name):
    def answer(content: bytes) -> None:
        file = tmp_path / "content"
        file.write_bytes(content)
        if name == weights.name:
            file.replace(server.folder / name)
        else:
            pack(server.folder / name, file, ("stock/model.pdparams",))

    url = f"{server.url}/{name}"
    answer(b"<html>Please log in</html>")
    for _ in range(2):
        with (
            load_safely(allow_download=True),
            raises_naming(WeightsError, f"{name}:", "weights,"),
        ):
            Stock(pretrained=url)
        assert not list(find_cache_folder().rglob("*.pdparams*"))
    answer(weights.read_bytes())
    with load_safely(allow_download=True):
        assert_same(Stock(pretrained=url), shifted())
    assert server.requests == [("GET", name)] * 3


def test_a_cached_file_that_does_not_read_any_more_is_fetched_again(server: FileServer, weights):
    url = f"{server.url}/stock.pdparams"
    (server.folder / weights.name).write_bytes(weights.read_bytes())
    cached = module.fetch_weights(url, allow_download=True)
    cached.write_bytes(weights.read_bytes()[:1000])
    with (
        load_safely(allow_download=False),
        raises_naming(WeightsError, str(cached), "--allow_download"),
    ):
        Stock(pretrained=url)
    with load_safely(allow_download=True):
        assert_same(Stock(pretrained=url), shifted())
    with load_safely(allow_download=False):
        assert_same(Stock(pretrained=url), shifted())
    assert server.requests == [("GET", "stock.pdparams")] * 2


def test_a_link_in_an_archive_is_not_followed(server: FileServer):
    with tarfile.open(server.folder / "stock.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("model.pdparams")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with (
        load_safely(allow_download=True),
        raises_naming(WeightsError, "stock.tar.gz", "0"),
    ):
        Stock(pretrained=f"{server.url}/stock.tar.gz")


def test_other_threads_keep_paddles_loader(tmp_path):
    import threading

    paddle.save({"a": paddle.ones([2])}, str(tmp_path / "m.pdparams"))
    found = []
    with load_safely(allow_download=False):
        path = str(tmp_path / "m.pdparams")
        thread = threading.Thread(target=lambda: found.append(paddle.load(path, return_numpy=True)))
        thread.start()
        thread.join()
    assert isinstance(found[0]["a"], np.ndarray)


@pytest.mark.parametrize("name", ["ConvNeXt", "SwinTransformer", "VisionTransformer"])
def test_paddledetections_components(server: FileServer, tmp_path, name):
    importlib.import_module("ppvision.plugins.paddledet")
    import ppdet.modeling.backbones as backbones

    component = getattr(backbones, name)
    small = {
        "ConvNeXt": {},
        "SwinTransformer": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
        "VisionTransformer": {"embed_dim": 12, "depth": 12, "num_heads": 1},
    }[name]
    marker = tmp_path / "ran"
    (tmp_path / "evil.pdparams").write_bytes(pickle.dumps({"weight": Hostile(marker)}))
    with load_safely(allow_download=False):
        with raises_naming(WeightsError, "evil.pdparams:", "code"):
            component(**small, pretrained=str(tmp_path / "evil.pdparams"))
        with pytest.raises(WeightsError, match="--allow_download"):
            component(**small, pretrained=f"{server.url}/model.pdparams")
    assert not marker.exists()
    assert server.requests == []


@pytest.mark.parametrize("verb", ["train", "eval", "export", "predict"])
def test_every_verb_names_the_flag(server: FileServer, config_file, verb, capsys):
    def change(config: dict) -> None:
        config["model"]["backbone"] = {
            "type": "ResNet18_vd",
            "pretrained": f"{server.url}/stock.tar.gz",
        }

    arguments = [verb, "-c", str(config_file(change))]
    if verb != "train":
        arguments += ["--model_path", "pale_nano_digit_scenes"]
    if verb == "predict":
        arguments += ["--image_path", "x"]
    assert run(arguments) == 1
    shown = capsys.readouterr().err
    assert "ppvision: pretrained: http://" in shown
    assert "--allow_download" in shown
    assert server.requests == []
    assert run([*arguments, "--allow_download"]) == 1
    assert "answers 404" in capsys.readouterr().err
    assert server.requests == [("GET", "stock.tar.gz")]


@pytest.mark.parametrize("path", ["nope.pdparams", "/nowhere.pdparams", "file:///nope.pdparams"])
def test_a_path_that_is_not_there(config_file, path):
    def change(config: dict) -> None:
        config["model"]["backbone"] = {"type": "ResNet18_vd", "pretrained": path}

    with raises_naming(MissingFileError, "pretrained:", "weights,", "none", f"'{path}'"):
        open_job(config_file(change)).float_model  # noqa: B018


def test_a_data_set_is_never_fetched(config_file, capsys):
    """PaddleSeg's own data sets fetch what they do not find; `--skip_check` lets them be built."""

    def change(config: dict) -> None:
        config["model"]["num_classes"] = 2
        del config["val_dataset"]
        config["train_dataset"] = {"type": "OpticDiscSeg", "mode": "train", "transforms": []}

    path = config_file(change)
    arguments = ["train", "-c", str(path), "--skip_check", "--allow_download"]
    assert run([*arguments, "--save_dir", str(path.parent / "run")]) == 1
    assert "does not download data sets" in capsys.readouterr().err


def test_arrays_of_every_type_become_paddles_tensors(tmp_path):
    tensors = {
        kind: paddle.to_tensor([[1.0, 0.0, 3.0]]).astype(kind)
        for kind in ("bool", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
    }
    tensors["one"] = paddle.to_tensor(2.0)
    path = str(tmp_path / "m.pdparams")
    paddle.save(tensors, path)
    expected = paddle.load(path)
    with load_safely(allow_download=False):
        found = paddle.load(path)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy())


# -- texts that components would run as code -------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    """Texts that would leave a file or hand out what is no layer, and the file."""
    left = tmp_path / "left"
    call = f"__import__('os').mkdir({str(left)!r})"
    return left, [
        *(call, f"[{call}]", f"nn.LayerNorm if {call} else 1", f"(lambda *a, **k: {call})"),
        *("nn.__class__", "os.system", "print", "nn", "nn.absent", "absent", "", "nn.LayerNorm(3)"),
        *("paddle.sys.exit", "paddle.os.abort()", "nn.\nLayerNorm", "\uff4en.LayerNorm"),
    ]


def test_paddlesegs_components_run_no_text(texts, config_file):
    left, hostile = texts
    for text in hostile:

        def change(config: dict, text: str = text) -> None:
            config["model"]["backbone"] = {
                "type": "VisionTransformer",
                "img_size": 32,
                "patch_size": 16,
                "embed_dim": 8,
                "depth": 1,
                "num_heads": 1,
                "norm_layer": text,
            }

        with raises_naming(ConfigError, "name", "layer"):
            open_job(config_file(change)).float_model  # noqa: B018
    assert not left.exists()


def test_paddledetections_components_run_no_text(texts):
    importlib.import_module("ppvision.plugins.paddledet")
    from ppdet.modeling.backbones import VisionTransformer
    from ppdet.modeling.backbones.trans_encoder import BertFeedForward

    left, hostile = texts
    small = {"embed_dim": 12, "depth": 12, "num_heads": 1}
    with load_safely(allow_download=False):
        for text in hostile:
            with raises_naming(ConfigError, "name", "layer"):
                VisionTransformer(**small, norm_layer=text)
            with raises_naming(ConfigError, "name", "layer"):
                BertFeedForward(4, 4, 1, 0.0, 0.0, act_fn=text)
    assert not left.exists()


def test_names_of_layers_are_found():
    importlib.import_module("ppvision.plugins.paddledet")
    from paddleseg.models import PPLiteSeg
    from paddleseg.models.backbones import STDC1
    from paddleseg.models.layers.activation import Activation
    from ppdet.modeling.backbones import VisionTransformer

    with load_safely(allow_download=False):
        net = VisionTransformer(embed_dim=12, depth=12, num_heads=1, norm_layer="nn.LayerNorm")
        assert isinstance(net.blocks[0].norm2, paddle.nn.LayerNorm)
        assert isinstance(Activation("relu6").act_func, paddle.nn.ReLU6)
        PPLiteSeg(num_classes=2, backbone=STDC1(), arm_type="UAFM_ChAtten")


def test_every_module_that_runs_texts_is_covered():
    """Whatever says `eval(` in them finds ours."""
    importlib.import_module("ppvision.plugins.paddledet")
    import paddleseg.models  # noqa: F401

    with load_safely(allow_download=False):
        pass
    found = [
        name
        for name, loaded in sys.modules.items()
        if name.startswith(("paddleseg.", "ppdet.")) and getattr(loaded, "__file__", None)
        if re.search(r"(?<![\w.])eval\(", Path(loaded.__file__).read_text(encoding="utf-8"))
    ]
    assert len(found) > 5
    assert all(vars(sys.modules[name])["eval"].__module__.startswith("ppvision") for name in found)
