"""The training of `pale_nano` on one GPU, at a small size on the CPU, and what becomes of it."""

import io
import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import paddle
import pytest

from tests.helpers.messages import raises_naming

pytest.importorskip("torch", reason="pip install -r benchmark/requirements-torch.txt")

import torch

import ppvision
from benchmark.gpu import classification as training
from benchmark.gpu import common, data, pictures, teacher
from benchmark.gpu.card import fill_card
from benchmark.gpu.convert import to_ppvision
from benchmark.torch_pale import Pale
from benchmark.zoo_weights import write_zoo_weights
from ppvision.deploy.run.transforms import Transforms
from ppvision.models.pale_transformer import PaleConfig, PaleTransformer
from ppvision.zoo import cards
from ppvision.zoo.torch_files import convert_to_paddle
from ppvision.zoo.weights import assign_weights, load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]


def randomise(network: torch.nn.Module) -> None:
    """Values that matter for every parameter and statistic, and outputs of usual sizes."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            spread = 0.3 if value.ndim == 1 else (value[0].numel()) ** -0.5
            value.normal_(0.0, spread, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value.add_(1.0)


@pytest.mark.parametrize("size", [(64, 64), (33, 61)])
@pytest.mark.parametrize("num_classes", [5, None])
def test_converted_weights_give_the_same(size, num_classes, tmp_path):
    config = PaleConfig(8, (1, 1, 1, 1), (2, 2, 4, 4), 0.0, pale_size=4)
    theirs = Pale(8, config.depths, config.num_heads, num_classes, size=4).eval()
    randomise(theirs)
    ours = PaleTransformer(config, num_classes=num_classes or 1, features_only=num_classes is None)
    save_weights(to_ppvision(theirs.state_dict(), ours), tmp_path / "weights.safetensors")
    load_weights(ours, tmp_path / "weights.safetensors")
    ours.eval()
    x = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    with torch.inference_mode(), paddle.no_grad():
        expected, found = theirs(torch.from_numpy(x)), ours(paddle.to_tensor(x))
    pairs = zip(found, expected, strict=True) if num_classes is None else [(found, expected)]
    for a, b in pairs:
        assert np.abs(b.numpy()).max() > 0.1
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-5)


def test_weights_that_do_not_fit_are_refused():
    ours = PaleTransformer(PaleConfig(8, (1, 1, 1, 1), (2, 2, 4, 4), 0.0), num_classes=5)
    state = Pale(8, (1, 1, 1, 1), (2, 2, 4, 4), 5).state_dict()
    with raises_naming(ValueError, "missing:", "['head.bias']"):
        to_ppvision({n: v for n, v in state.items() if n != "head.bias"}, ours)
    with raises_naming(ValueError, "used:", "['extra']"):
        to_ppvision({**state, "extra": state["head.bias"]}, ours)
    with raises_naming(ValueError, "head.bias:", "(5,)", "(4,)"):
        to_ppvision({**state, "head.bias": state["head.bias"][:4]}, ours)


def test_the_teacher_is_the_zoos_network():
    """With the same weights, and its BatchNorms put into the convolutions."""
    network = teacher.EfficientNetLite2().eval().requires_grad_(False)
    randomise(network)
    ours = ppvision.create_model("efficientnet_lite2")
    raw = {n: v.numpy() for n, v in network.state_dict().items() if v.is_floating_point()}
    assign_weights(ours, convert_to_paddle(raw, ours.torch_names), "test")
    ours.eval()
    x = np.random.default_rng(0).normal(size=(2, 3, 52, 64)).astype(np.float32)
    with paddle.no_grad():
        expected = ours(paddle.to_tensor(x)).numpy()
    with torch.inference_mode():
        found = [network(torch.from_numpy(x)), teacher.fuse(network)(torch.from_numpy(x))]
    assert np.abs(expected).max() > 0.1
    for logits in found:
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3 * np.abs(expected).max())


def test_shifted_products_are_the_convolution():
    torch.manual_seed(0)
    for bias in (False, True):
        conv = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias)
        x = torch.randn(2, 4, 5, 7, requires_grad=True)
        grads = []
        for shifts in (False, True):
            if shifts:
                common.use_shifts(torch.nn.Sequential(conv))
                assert type(conv) is common.ShiftedConv
            out = conv(x)
            grads.append([out, *torch.autograd.grad(out.square().sum(), [x, *conv.parameters()])])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_augmented_pictures():
    rng = np.random.default_rng(0)
    given = torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    whole = given.permute(0, 3, 1, 2).float() / 255
    zero, one = torch.zeros(3), torch.ones(3)
    draws = torch.full((2, pictures.DRAWS), 0.5)
    draws[:, 0], draws[:, 9] = 0.0, 0.9  # the whole picture, nothing erased
    draws[0, 5], draws[1, 5] = 0.9, 0.1
    expected = torch.stack([whole[0], whole[1].flip(2)])
    assert pictures.mirrored(draws).tolist() == [False, True]
    found = pictures.augment(given, draws, 64, zero, one)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found = pictures.augment(given, draws, 32, zero, one)
    torch.testing.assert_close(
        found, torch.nn.functional.avg_pool2d(expected, 2), atol=1e-5, rtol=0
    )
    draws[:, 9] = 0.0  # a rectangle is erased
    found = pictures.augment(given, draws, 64, zero, one)
    erased = (found == 0).all(1)
    assert 0.15 < erased.float().mean() < 0.2  # the middle of 0.02 and 1 / 3
    torch.testing.assert_close(
        torch.where(erased[:, None], expected, found), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("area", [0.0, 0.5, 0.999])
def test_crops_keep_enough_of_a_picture(area):
    """The place of each pixel, as a picture of its own coordinates: without any colour change."""
    place = torch.arange(64, dtype=torch.float32) * 4
    across = place[None, :].expand(64, 64)
    given = torch.stack([across, across.t(), across], dim=2)[None].to(torch.uint8)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        draws = torch.rand((1, pictures.DRAWS), generator=rng)
        draws[:, 0], draws[:, 2], draws[:, 5:9], draws[:, 9] = area, 0.5, 0.5, 0.9
        found = pictures.augment(given, draws, 64, torch.zeros(3), torch.ones(3))[0] * 255 / 4
        width = (found[0, 0, 60] - found[0, 0, 3]) / 57
        height = (found[1, 60, 0] - found[1, 3, 0]) / 57
        assert float(width * height) == pytest.approx(1 - 0.3 * area, abs=0.03)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Packed pictures of 100 classes that were transferred in parts, and a teacher's answers."""
    folder = tmp_path_factory.mktemp("gpu")
    rng = np.random.default_rng(0)
    recipe = training.Recipe.read(training.CONFIG)
    files = {}
    for split, count in (("train", 2), ("val", 1)):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            for name in recipe.classes:
                for k in range(count):
                    picture = cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (64, 64))
                    quality = [cv2.IMWRITE_JPEG_QUALITY, 80 + 10 * (k % 2)]  # other headers
                    content = cv2.imencode(".jpg", picture, quality)[1].tobytes()
                    file.writestr(f"{split}/{name}/{name}_{k}.JPEG", content)
        (folder / f"{split}.zip").write_bytes(archive.getvalue())
        files[split] = data.pack_pictures(folder / f"{split}.zip", split, list(recipe.classes))
    assert len(files["train"]["head_sizes"]) == 2
    count = data.write_parts(files, folder / "parts", part=50_000)
    assert count > 1
    for k in range(1, count + 1):
        assert (folder / "parts" / str(k) / "data.part").stat().st_size <= 50_000
        subprocess.run(
            ["bash", ROOT / "benchmark/gpu/unpack.sh", folder / "parts" / str(k), folder / "data"],
            check=True,
            capture_output=True,
        )
    lines = [f"{name} name {k}\n" for k, name in enumerate(recipe.classes)]
    (folder / "classes.txt").write_text("".join(lines))
    answers = rng.normal(size=(200, 100)).astype(np.float16)
    np.save(training.answers_path(folder / "data", recipe, 200), answers)
    return folder


def test_packed_pictures_are_read_as_they_were(packed):
    found, labels = pictures.read_pictures(packed / "data" / "train.npz")
    recipe = training.Recipe.read(training.CONFIG)
    with zipfile.ZipFile(packed / "train.zip") as file:
        names = sorted(file.namelist())
        assert len(found) == len(names) == 200
        for k in (0, 1, 123, 199):
            content = np.frombuffer(file.read(names[k]), np.uint8)
            expected = cv2.imdecode(content, cv2.IMREAD_COLOR)[:, :, ::-1]
            np.testing.assert_array_equal(found[k].numpy(), expected)
            assert recipe.classes[labels[k]] == names[k].split("/")[1]
    few, labels = pictures.read_pictures(packed / "data" / "train.npz", per_class=1)
    np.testing.assert_array_equal(few.numpy(), found[::2].numpy())
    assert labels.tolist() == list(range(100))


def test_a_training_ends_in_time_and_its_weights_can_be_converted(packed, monkeypatch, capsys):
    monkeypatch.setattr(training, "SHAPE", (8, (1, 1, 1, 1), (2, 2, 2, 2)))
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    monkeypatch.setattr(training, "Clock", lambda seconds: common.Clock(2.0))
    arguments = ["classification", "--device", "cpu", "--data", str(packed / "data")]
    arguments += ["--output", str(packed / "out"), "--seconds", "600", "--batch", "16"]
    monkeypatch.setattr("sys.argv", [*arguments, "--mode", "eager"])
    training.main()
    record = json.loads((packed / "out" / f"{training.NAME}.json").read_text())
    assert record["finished"]
    assert record["share_of_time"] == 1.0
    assert record["steps"] == sum(record["steps_by_size"].values()) > 0
    assert record["epochs"] == pytest.approx(record["steps"] * 16 / 200, abs=0.01)
    assert len(record["history"]) >= 2
    state = torch.load(packed / "out" / f"{training.NAME}.pt", weights_only=True)
    ours = PaleTransformer(
        PaleConfig(8, (1, 1, 1, 1), (2, 2, 2, 2), 0.0), num_classes=100, pale_size=4
    )
    assign_weights(ours, to_ppvision(state, ours), "test")
    assert "top1" in capsys.readouterr().out


def test_weights_of_a_training_become_weights_of_the_zoo(packed, tmp_path, monkeypatch):
    name = "pale_nano.tiny_imagenet_100"
    recipe = training.Recipe.read(training.CONFIG)
    theirs = training.build(recipe, torch.device("cpu"), shifts=False).eval()
    randomise(theirs)
    ours = ppvision.create_model("pale_nano", num_classes=100, pale_size=4)
    save_weights(to_ppvision(theirs.state_dict(), ours), tmp_path / "weights.safetensors")
    draft = json.loads((ROOT / f"benchmark/gpu/cards/{name}.json").read_text())
    record = {"seed": 0, "pictures": 200, "given_seconds": 240.0, "steps": 7, "batch": 16}
    record |= {"epochs": 0.56, "torch": "2", "gpu": None, "cpus": 2}
    facts = fill_card(draft, record, "0.01")
    assert facts["hours"] == pytest.approx(240 / 3600, abs=1e-3)
    options = [f"val_dataset.root={packed / 'val.zip'}//val"]
    options += [f"val_dataset.class_path={packed / 'classes.txt'}"]
    weights = tmp_path / "weights"
    folder = write_zoo_weights(
        training.CONFIG,
        tmp_path / "weights.safetensors",
        facts,
        bits=[8],
        side=64,
        options=options,
        output=weights,
    )
    assert folder == weights / name
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 4e6
    monkeypatch.setenv("PPVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cards, "WEIGHTS_FOLDER", weights)
    monkeypatch.setitem(cards.ZOO_WEIGHTS, name, cards.read_card(folder / "card.json"))

    picture = np.random.default_rng(1).integers(0, 256, (96, 80, 3), np.uint8)
    predicted = ppvision.Predictor(name)(picture)
    net = ppvision.create_model("pale_nano", pretrained="tiny_imagenet_100")
    net.eval()
    assert net.num_classes == 100
    assert net.pretrained_cfg.classes[3] == "name 3"
    assert "non-commercial" in net.pretrained_cfg.licence
    x, _ = Transforms(net.pretrained_cfg.transforms)(picture)
    assert x.shape == (3, 64, 64)
    with paddle.no_grad():
        logits = net(paddle.to_tensor(x[None])).numpy()[0]
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(predicted.probabilities, expected, atol=1e-4)
    assert predicted.name == f"name {logits.argmax()}"
    with torch.inference_mode():  # 8 bits are near to float
        exact = theirs(torch.from_numpy(x[None]))[0].numpy()
    assert np.corrcoef(exact, logits)[0, 1] > 0.99
    # The network is the one that was trained: with other pales it gives something else.
    load_weights(ours, name)
    ours.eval()
    with paddle.no_grad():
        np.testing.assert_allclose(ours(paddle.to_tensor(x[None])).numpy()[0], logits, atol=1e-5)
    backbone = ppvision.create_model("pale_nano", pretrained=name, features_only=True)
    assert backbone.stages[0][0].attention.pale_size == (7, 7)
    other = ppvision.create_model("pale_nano", pretrained=name, num_classes=5, pale_size=2)
    assert other.stages[0][0].attention.pale_size == (2, 2)


def test_the_rate_follows_the_time():
    assert common.cosine(0.0) == pytest.approx(0.01)
    assert common.cosine(0.03) == pytest.approx(1.0)
    assert common.cosine(1.0) == pytest.approx(0.005)
    middle = common.cosine(0.03 + 0.97 / 2)
    assert middle == pytest.approx((1 + 0.005) / 2)


def test_a_step_leaves_the_model_as_it_was_until_it_is_called():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = common.parameter_groups(model, 0.05)
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    optimizer = common.make_adamw(groups, torch.device("cpu"))
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8) % 2
    step = common.TrainingStep(
        model,
        optimizer,
        lambda network, x, y: torch.nn.functional.cross_entropy(network(x), y),
        [x, y],
        clip_norm=1.0,
        mode="eager",
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])
    common.set_rate(optimizer, 1e-2)
    losses = [float(step(x, y)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]

    # Numbers that are not finite, and the way back.
    state = SimpleNamespace(
        model=model, optimizer=optimizer, ema=common.Ema(model), rate=1.0, returns=0
    )
    good = training.Training.keep_or_return(state, None, losses[-1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(x * float("inf"), y)
    state.ema.update()
    assert training.Training.keep_or_return(state, good, losses[-1]) is good  # the weights are nan
    assert (state.rate, state.returns) == (0.5, 1)
    for network in (model, state.ema.model):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, before[name])
    assert float(step(x, y)) < losses[-2]
