"""Layered models: what is written, what is read, and what is refused."""

import copy
import errno
import hashlib
import itertools
import json
import logging
import random
import shutil
import subprocess
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from ppvision.quant import (
    LayeredModelError,
    OnceQAT,
    describe_layered,
    load_layered,
    pack_codes,
    save_layered,
    unpack_codes,
)
from ppvision.quant.store import model as module
from ppvision.quant.store.files import compute_content_digest, compute_digest
from ppvision.quant.store.state import LayeredState, LayeredWeight, extract_state
from tests.helpers.messages import raises_naming
from tests.helpers.small_layered import (
    BITS,
    CONFIG,
    assert_same,
    read_manifest,
    same_arrays,
    tiny_net,
    tiny_once_qat,
    update_entry,
    write_manifest,
)

FILES = [f"w{k}.safetensors" for k in range(2, 9)]
NAMES = ["manifest.json", *FILES]


@pytest.fixture(scope="module")
def model() -> OnceQAT:
    return tiny_once_qat()


@pytest.fixture(scope="module")
def state(model) -> LayeredState:
    return extract_state(model.model, BITS)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    """A layered model that no test changes."""
    folder = tmp_path_factory.mktemp("layered") / "tiny"
    return save_layered(model, folder, bits=BITS, config=CONFIG)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


# -- there and back --------------------------------------------------------------------------------


def test_widths_are_a_list(model, tmp_path):
    with raises_naming(ValueError, "bits:", "list", "[8,", "8."):
        save_layered(model, tmp_path / "out", bits=8, config=CONFIG)


@pytest.mark.parametrize("bits", range(2, 9))
def test_there_and_back(original, state, bits):
    found = load_layered(original, bits)
    assert found.bits == bits
    assert found.config == CONFIG
    assert found.available == 8
    assert_same(found.state, state, bits)
    same_arrays(found.state_dict, state.state_dict(bits))


@pytest.mark.parametrize("steps", ["shared", "per_width"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_float_model_gives_what_the_trained_one_gives(tmp_path, steps, bits):
    """With the loaded tensors, in the architecture that knows nothing of quantization."""
    model = tiny_once_qat(3, steps, activations=False)
    found = load_layered(save_layered(model, tmp_path / "m", bits=BITS, config={}), bits)
    net = tiny_net()
    assert net.state_dict().keys() == found.state_dict.keys()
    for name, tensor in net.state_dict().items():
        tensor.set_value(found.state_dict[name])
    net.eval()
    model.set_bits(bits)
    x = paddle.to_tensor(np.random.default_rng(1).normal(size=(2, 2, 9, 9)).astype(np.float32))
    np.testing.assert_allclose(net(x).numpy(), model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_step_a_width_and_rounded_inputs(tmp_path):
    model = tiny_once_qat(4, "per_width")
    expected = extract_state(model.model, BITS)
    assert expected.activations
    assert expected.weights["3"].scales is not None
    folder = save_layered(model, tmp_path / "m", bits=BITS, config={})
    for bits in range(2, 9):
        assert_same(load_layered(folder, bits).state, expected, bits)


def test_some_of_the_widths(tmp_path, model):
    """A model trained at fewer widths than its quanters know."""
    once = OnceQAT(copy.deepcopy(model.model), [6, 4])
    folder = save_layered(once, tmp_path / "m", bits=[4, 6], config={})
    names = ["manifest.json", "w4.safetensors", "w5.safetensors", "w6.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    expected = extract_state(once.model, (6, 4))
    for bits in (4, 5, 6):
        assert_same(load_layered(folder, bits).state, expected, bits)
    with raises_naming(ValueError, "bits:", "4", "6", "8"):
        load_layered(folder, 8)


def test_one_width(tmp_path, model):
    folder = save_layered(OnceQAT(model.model, [8]), tmp_path / "m", bits=[8], config={})
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "w8.safetensors"]
    assert load_layered(folder).bits == 8


def test_three_ways_to_give_a_model(original, tmp_path, model, state):
    quantised = save_layered(model.model, tmp_path / "a", bits=BITS, config=CONFIG)
    taken_apart = save_layered(state, tmp_path / "b", bits=BITS, config=CONFIG)
    read = save_layered(load_layered(original).state, tmp_path / "c", bits=BITS, config=CONFIG)
    for name in NAMES:
        expected = (original / name).read_bytes()
        for other in (quantised, taken_apart, read):
            assert (other / name).read_bytes() == expected


def test_tensors_of_other_types_and_shapes(tmp_path, state):
    floats = {
        "number": np.array(3, np.int64),
        "flag": np.array([True, False]),
        "half": np.float16([1, 2]),
        "bfloat16": np.uint16([16256]),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "Ünicode/päth": np.float32([1]),
    }
    changed = replace(state, floats={**state.floats, **floats})
    folder = save_layered(changed, tmp_path / "m", bits=BITS, config={})
    assert_same(load_layered(folder, 4).state, changed, 4)


def test_a_model_without_norms_or_activations(tmp_path):
    weight = LayeredWeight(np.int8([[1, -2]]), 8, 8, 2, 0, np.float32([0.5]), (8, 2))
    state = LayeredState((8, 2), 8, {"a": weight}, {})
    found = load_layered(save_layered(state, tmp_path / "m", bits=[8, 2], config={}))
    assert_same(found.state, state, 8)
    same_arrays(found.state_dict, {"a.weight": np.float32([[0.75, -0.75]])})


# -- the files -------------------------------------------------------------------------------------


def test_files_are_plain_safetensors(original, state):
    files = {k: load_file(original / f"w{k}.safetensors") for k in range(2, 9)}
    assert {k: sorted(v) for k, v in files.items() if k > 2} == {
        **{k: ["codes/3"] for k in (3, 4)},
        **{k: ["codes/3", "codes/7"] for k in range(5, 9)},  # the last layer has 4 bits at least
    }
    for path, widths in {"3": (2, 3, 4, 5, 6, 7, 8), "7": (2, 5, 6, 7, 8), "0": (2,)}.items():
        planes = np.concatenate([files[k][f"codes/{path}"] for k in widths])
        codes = state.weights[path].codes
        np.testing.assert_array_equal(planes, pack_codes(codes, 8))
        np.testing.assert_array_equal(unpack_codes(planes, codes.size), codes.reshape(-1))
    assert files[2]["codes/0"].shape == (8, 12)  # 90 weights that stay at 8 bits
    assert files[2]["codes/3"].shape == (2, 40)
    assert files[2]["codes/7"].shape == (4, 3)
    assert files[2]["statistics/1._mean"].shape == (5, 5)
    steps = [state.weights[path].step for path in ("0", "3", "7")]
    np.testing.assert_array_equal(files[2]["steps"], np.concatenate(steps))


def test_the_manifest(original):
    content = read_manifest(original)
    assert content["format_version"] == 1
    assert content["architecture"] == CONFIG
    assert (content["bits"], content["lowest"], content["highest"]) == ([8, 6, 4, 3, 2], 2, 8)
    assert content["weights"]["7"] == {
        "shape": [7, 3],
        "axis": 1,
        "low_bits": 4,
        "top_bits": 8,
        "widths": [8, 6, 4],
        "scales": False,
    }
    assert content["activations"]["3"] == {
        "low_bits": 2,
        "top_bits": 8,
        "widths": [8, 6, 4, 3, 2],
        "signed": False,
    }
    assert list(content["files"]) == FILES
    for name, entry in content["files"].items():
        data = (original / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    own = content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert own == hashlib.sha256(text.encode()).hexdigest()
    assert str(original) not in json.dumps(content)


def test_little_beside_the_numbers(tmp_path):
    """A model of 22 million weights in 170 layers: at most 2% more than its numbers take."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (256, 500), dtype=np.int8)
    weights, floats = {}, {}
    for number in range(170):
        path = f"stages.{number // 50}.blocks.{number % 50}.attention.projection"
        step = rng.uniform(0.1, 1, 256).astype(np.float32)
        weights[path] = LayeredWeight(codes, 8, 8, 2, 0, step, BITS)
        floats |= {f"{path}.bias": step, f"{path}.norm": step}
    state = LayeredState(BITS, 8, weights, floats)
    folder = save_layered(state, tmp_path / "m", bits=BITS, config={"type": "large"})
    others = 3 * 170 * step.nbytes
    for bits, size in describe_layered(folder).precisions.items():
        assert size <= 1.02 * (170 * codes.size * bits / 8 + others)


# -- no more than needed ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_only_the_files_of_a_width_are_opened(folder, state, monkeypatch, bits):
    needed = NAMES[:bits]
    for name in set(NAMES) - set(needed):
        (folder / name).unlink()
    opened, real = [], Path.open

    def spy(path, *arguments, **options):
        opened.append(path.name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", spy)
    found = load_layered(folder, bits)
    assert opened == needed
    assert found.opened == [(name, (folder / name).stat().st_size) for name in needed]
    assert found.available == bits
    assert_same(found.state, state, bits)


def test_other_files_are_not_opened(folder):
    for name in FILES[3:]:
        (folder / name).write_bytes(b"never read")
    assert load_layered(folder, 4).bits == 4


def test_the_highest_width_that_is_there(folder, caplog):
    caplog.set_level(logging.INFO, "ppvision")
    assert load_layered(folder).bits == 8
    assert "using 8 bits, the highest" in caplog.text
    caplog.clear()
    (folder / "w5.safetensors").unlink()
    found = load_layered(folder)
    assert (found.bits, found.available) == (4, 4)
    assert "w5.safetensors is missing; using 4 bits of 2 to 8" in caplog.text


def test_describing_opens_the_manifest_only(folder, monkeypatch):
    (folder / "w7.safetensors").unlink()
    sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
    opened, real = [], Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **o: opened.append(p.name) or real(p, *a, **o))
    found = describe_layered(folder)
    assert opened == ["manifest.json"]
    assert [f.name for f in found.files] == NAMES
    for file in found.files:
        assert file.present == (file.name != "w7.safetensors")
        if file.present:
            assert file.bytes == sizes[file.name]
            assert file.sha256 == hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
    assert found.bits == BITS
    assert found.precisions[4] == sum(sizes[name] for name in NAMES[:4])
    assert list(found.precisions) == list(range(2, 9))
    assert (found.weights, found.fixed, found.count, found.activations) == (3, 1, 426, 3)
    assert found.config == CONFIG
    text = str(found)
    (line,) = [line.split() for line in text.splitlines() if line.startswith("w7.safetensors")]
    assert line[1:] == [f"{found.files[6].bytes:,}", found.files[6].sha256[:16], "missing"]
    assert ["4", "bits", f"{found.precisions[4]:,}"] in [line.split() for line in text.splitlines()]
    assert "5 bits" in text
    assert "not trained" in text
    assert 'type: "Tiny"' in text


# -- writing ---------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_layered_model_is_replaced(folder, model):
    once = OnceQAT(copy.deepcopy(model.model), [4, 3])
    assert save_layered(once, folder, bits=[4, 3], config={"type": "other"}) == folder
    assert set(contents(folder)) == {"manifest.json", "w3.safetensors", "w4.safetensors"}
    assert load_layered(folder).config == {"type": "other"}
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


def test_an_empty_folder_is_taken(tmp_path, state):
    (tmp_path / "m").mkdir()
    assert load_layered(save_layered(state, tmp_path / "m", bits=BITS, config={})).bits == 8


@pytest.mark.parametrize("files", [["a.txt"], ["manifest.json", "a.txt"], ["w2.safetensors"]])
def test_a_folder_with_other_files_is_not_touched(tmp_path, state, files):
    target = tmp_path / "m"
    target.mkdir()
    for name in files:
        (target / name).write_text("mine")
    with raises_naming(FileExistsError, "other", "files"):
        save_layered(state, target, bits=BITS, config={})
    assert contents(target) == dict.fromkeys(files, b"mine")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_file_in_the_way(tmp_path, state):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(FileExistsError):
        save_layered(state, tmp_path / "m", bits=BITS, config={})
    assert (tmp_path / "m").read_text() == "mine"


@pytest.mark.parametrize("number", range(8))
def test_a_full_disk_leaves_the_old_one(folder, state, monkeypatch, number):
    before, calls, real = contents(folder), itertools.count(), module.write_bytes

    def full(path, data):
        if next(calls) == number:
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "write_bytes", full)
    with raises_naming(OSError, "tiny", "space", "left") as info:
        save_layered(state, folder, bits=BITS, config={"type": "new"})
    assert info.value.errno == errno.ENOSPC
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


@pytest.mark.all
def test_a_full_file_system(tmp_path, state):
    """A tmpfs with room for one layered model and a half; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs root: mount -t tmpfs")
    try:
        folder = save_layered(state, disk / "m", bits=BITS, config={})
        before = contents(folder)
        with raises_naming(OSError, "disk/m", "space", "left"):
            save_layered(state, folder, bits=BITS, config={"notes": "x" * 40_000})
        assert contents(folder) == before
        assert [p.name for p in disk.iterdir()] == ["m"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("last", ["final", "tiny"])
def test_a_failed_rename_leaves_the_old_one(folder, state, monkeypatch, last):
    before, real = contents(folder), Path.replace

    def fail(path, target):
        if path.name == last and path.is_dir():
            raise OSError(errno.EIO, "gone")
        return real(path, target)

    # Of a file system that cannot let folders change places.
    monkeypatch.setattr("ppvision.files._exchange", lambda new, folder: False)
    monkeypatch.setattr(Path, "replace", fail)
    with raises_naming(OSError, "write", "tiny"):
        save_layered(state, folder, bits=BITS, config={"type": "new"})
    assert contents(folder) == before


def test_what_a_killed_run_left_between_two_renames_comes_back(folder, state, monkeypatch):
    before = contents(folder)
    left = folder.with_name(".tiny.ppvision-partial")
    left.mkdir()
    folder.rename(left / "old")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    with raises_naming(OSError, "write", "tiny"):
        save_layered(state, folder, bits=BITS, config={})
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]


class Odd:
    pass


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (None, "config: dict NoneType"),
        ({1: 2}, "config: text keys 1"),
        ({"a": {"b": [{2: 3}]}}, "config.a.b[0]: text keys"),
        ({"a": Odd()}, "config.a: dict Odd"),
        ({"a": Path("x")}, "config.a: PosixPath"),
        ({"a": {1, 2}}, "config.a: set"),
        ({"a": float("nan")}, "config: plain values"),
        ({"a": np.float32(1)}, "config.a: float32"),
        ({"a": "x" * (9 << 20)}, "8388608"),
    ],
)
def test_configs_that_are_not_plain(tmp_path, state, config, tokens):
    with raises_naming(ValueError, *tokens.split()):
        save_layered(state, tmp_path / "m", bits=BITS, config=config)
    assert list(tmp_path.iterdir()) == []


def test_models_and_widths_that_do_not_fit(tmp_path, model, state, original):
    def save(model, bits):
        save_layered(model, tmp_path / "m", bits=bits, config={})

    with raises_naming(ValueError, "none", "Conv2D"):
        save(nn.Conv2D(2, 2, 1), BITS)
    with raises_naming(ValueError, "[5]", "[8,", "4,", "3"):
        save(model, [8, 5, 4])
    with pytest.raises(ValueError, match=r"\[3\]"):
        save(OnceQAT(model.model, [8, 4]), [4, 3])
    with raises_naming(ValueError, "2],", "[8,", "4]"):
        save(state, [8, 4])
    with raises_naming(ValueError, "4", "bits", "there"):
        save(load_layered(original, 4).state, BITS)
    with raises_naming(ValueError, "bits:", "list"):
        save(model, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"step": np.float32([-1] * 7)}, "steps '3': finite 0"),
        ({"step": np.float32([np.inf] * 7)}, "steps '3': finite 0"),
        ({"step": np.float32([1e38] * 7)}, "range float32"),
        ({"step": np.float64([1] * 7)}, "float32 float64"),
        ({"step": np.float32([1] * 6)}, "[7] [6]"),
        ({"widths": (6, 8)}, "widths highest [6, 8]"),
        ({"top_bits": 9}, "top_bits: 8"),
        ({"low_bits": 0}, "low_bits: whole number 1 8 0"),
        ({"axis": 4.5}, "axis:"),
        ({"codes": np.zeros((7, 0), np.int8)}, "shape above 0"),
        ({"codes": np.full((7, 5, 3, 3), 300)}, "codes -128 127 300"),
    ],
)
def test_states_that_no_reader_would_take(tmp_path, state, change, tokens):
    weights = {**state.weights, "3": replace(state.weights["3"], **change)}
    with raises_naming(ValueError, *tokens.split()):
        save_layered(replace(state, weights=weights), tmp_path / "m", bits=BITS, config={})
    assert list(tmp_path.iterdir()) == []


def test_tensors_and_statistics_that_no_reader_would_take(tmp_path, state):
    def save(**change):
        save_layered(replace(state, **change), tmp_path / "m", bits=BITS, config={})

    with pytest.raises(LayeredModelError, match=r"'3\.weight'"):
        save(floats={**state.floats, "3.weight": np.float32([1])})
    with pytest.raises(LayeredModelError, match="'z'"):
        save(floats={**state.floats, "z": np.complex64([1])})
    with pytest.raises(LayeredModelError, match="statistics"):
        save(statistics={k: v for k, v in state.statistics.items() if k != 4})
    with pytest.raises(LayeredModelError, match="statistics"):
        save(statistics={**state.statistics, 5: state.statistics[4]})
    zero = {"3": replace(state.activations["3"], steps=np.zeros(5, np.float32))}
    with raises_naming(LayeredModelError, "inputs", "'3'"):
        save(activations=zero)


# -- reading: what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 0, -2, 4.0, True, "4", [4]])
def test_widths_that_are_none(original, bits):
    with raises_naming(ValueError, "bits:", "2", "8", "tiny,"):
        load_layered(original, bits)


def test_no_folder(tmp_path):
    for read in (load_layered, describe_layered):
        with raises_naming(FileNotFoundError, "nothing:", "layered"):
            read(tmp_path / "nothing")
        with pytest.raises(LayeredModelError, match=r"manifest\.json"):
            read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with raises_naming(LayeredModelError, f"{name}:", "Copy", "fetch"):
        load_layered(folder, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_place_of_a_file(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with raises_naming(LayeredModelError, f"{name}:", "file"):
        load_layered(folder, 8)


def test_nothing_but_the_manifest(folder):
    for name in FILES:
        (folder / name).unlink()
    with pytest.raises(LayeredModelError, match=r"w2\.safetensors"):
        load_layered(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_model(folder, tmp_path, name):
    other = save_layered(tiny_once_qat(9), tmp_path / "other", bits=BITS, config=CONFIG)
    shutil.copy(other / name, folder / name)
    with raises_naming(LayeredModelError, f"{name}:", "sha256", "another"):
        load_layered(folder)
    update_entry(folder, name)  # as if it had been packed with it
    with raises_naming(LayeredModelError, f"{name}:", "content", "model"):
        load_layered(folder)


def test_another_version(folder):
    for version in (2, 0, "1", 1.0, True, None):
        write_manifest(folder, {**read_manifest(folder), "format_version": version})
        with raises_naming(LayeredModelError, "format_version", "1"):
            load_layered(folder)


@pytest.mark.parametrize("name", ["../w2.safetensors", "/etc/passwd", "w2.safetensors/x", "w9", ""])
def test_names_that_are_not_of_layers(folder, name):
    content = read_manifest(folder)
    content["files"][name] = content["files"].pop("w8.safetensors")
    write_manifest(folder, content)
    with raises_naming(LayeredModelError, "files:", "w8.safetensors"):
        load_layered(folder, 2)
    content["files"]["w8.safetensors"] = content["files"]["w7.safetensors"]
    write_manifest(folder, content)
    with raises_naming(LayeredModelError, "files:", "more"):
        load_layered(folder, 2)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "keys values"),
        ("null", "keys values"),
        ('{"a": 1, "a": 1}', "key twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ('{"a": 1e999}', "1e999 finite"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
        ("[" * 200_000, "JSON"),
        ('{"a": "\ufeff"}', "format_version"),
        (b"\xff\xfe{}", "JSON"),
        (b"\x00" * 100, "JSON"),
        (b" " * (9 << 20), "8388608"),
    ],
)
def test_manifests_that_are_none(folder, text, tokens):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "manifest.json").write_bytes(data)
    for read in (load_layered, describe_layered):
        with raises_naming(LayeredModelError, *tokens.split()) as info:
            read(folder)
        assert "manifest.json" in str(info.value)
        assert len(str(info.value)) < 600


def test_absurd_sizes_allocate_nothing(folder):
    content = read_manifest(folder)
    content["weights"]["3"]["shape"] = [7, 1 << 35, 3, 3]
    reseal(folder, content)
    with raises_naming(LayeredModelError, "'codes/3':", "uint8"):
        load_layered(folder)
    content = read_manifest(folder)
    content["files"]["w2.safetensors"]["bytes"] = 1 << 45
    write_manifest(folder, content)
    tracemalloc.start()
    try:
        with raises_naming(LayeredModelError, "w2.safetensors:", "35184372088832"):
            load_layered(folder)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# -- reading: anything at all ----------------------------------------------------------------------


def reseal(folder: Path, content: dict) -> None:
    """Write a manifest as one who lies all through would: every digest fits the files."""
    keys = ("format_version", "bits", "lowest", "highest", "weights", "activations")
    chain = compute_digest({key: content.get(key) for key in keys})
    for name in FILES:
        entry = content["files"].get(name) if isinstance(content.get("files"), dict) else None
        chain = compute_content_digest(chain, load_file(folder / name))
        if isinstance(entry, dict):
            entry["content"] = chain
    write_manifest(folder, content)


def check_message(error: LayeredModelError) -> None:
    assert any(name in str(error) for name in NAMES), error
    assert len(str(error)) < 1000


def loads_right_or_raises(folder: Path, state: LayeredState, bits: int | None) -> bool:
    """Whether it loads; anything but a clear error or the same model fails."""
    try:
        found = load_layered(folder, bits)
    except LayeredModelError as error:
        check_message(error)
        return False
    assert_same(found.state, state, found.bits)
    return True


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One flip, cut, insertion, or end."""
    at, length = rng.randrange(len(data)), rng.randrange(1, 40)
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 4:
        return data + rng.randbytes(length)
    return data[:at] + rng.randbytes(length) + data[at + length :]


def test_any_change_of_bytes(folder, state):
    rng = random.Random(1)
    originals = contents(folder)
    for _ in range(800):
        name = rng.choice(NAMES)
        data = mutated(originals[name], rng)
        (folder / name).write_bytes(data)
        loaded = loads_right_or_raises(folder, state, 8)
        if name != "manifest.json":  # there, space between values may come or go
            assert loaded == (data == originals[name])
        (folder / name).write_bytes(originals[name])


VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 8, 9, 10**30, -(10**30), 1 << 62, 0.5, 8.0, 1e308),
    *("", "8", "../../etc/passwd", "/dev/zero", "\ud800", "w2.safetensors", [], {}, [8], [[]]),
    *([8, 6], [2, 3, 4, 6, 8], [10**12, 10**12], [0], [-1], {"a": 1}, "0" * 64, "x" * 1000),
]


def places(value: object) -> list[tuple[dict | list, object]]:
    """Every container and key below a value."""
    found = []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def lie(content: dict, rng: random.Random) -> None:
    """Change a value, its neighbours or its key."""
    all_places = places(content)
    holder, key = rng.choice(all_places)
    kind = rng.randrange(6)
    if kind == 0:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 1 and type(holder[key]) is int:
        holder[key] += rng.choice([-1, 1, 8, 256, 1 << 40])
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(["x", "../x", "w1.safetensors", "9", str(key) + "x"])] = holder[key]
    elif kind == 4:
        other, place = rng.choice(all_places)
        holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
    elif isinstance(holder, list):
        rng.shuffle(holder)
    else:
        others = list(holder)
        place = rng.choice(others)
        holder[key], holder[place] = holder[place], holder[key]


def test_any_lie_of_the_manifest(folder, state):
    rng = random.Random(2)
    honest, loaded = read_manifest(folder), 0
    for _ in range(1500):
        content = copy.deepcopy(honest)
        for _ in range(rng.randint(1, 2)):
            lie(content, rng)
        write_manifest(folder, content)
        loaded += loads_right_or_raises(folder, state, rng.choice([None, 2, 5, 8]))
    assert loaded < 450  # those that changed nothing, or the architecture


def test_any_lie_that_is_sealed(folder, state):
    """With every digest made to fit, another model may come out; a fault may not."""
    rng = random.Random(3)
    honest, loaded = read_manifest(folder), 0
    tracemalloc.start()
    try:
        for _ in range(300):
            content = copy.deepcopy(honest)
            lie(content, rng)
            reseal(folder, content)
            try:
                found = load_layered(folder, 8)
            except LayeredModelError as error:
                check_message(error)
            except ValueError as error:  # a lower highest width
                if "bits: expected" not in str(error):
                    raise
            else:
                assert all(np.isfinite(w).all() for w in found.state_dict.values())
                loaded += 1
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert 0 < loaded < 250


def spoil(tensors: dict[str, np.ndarray], rng: random.Random) -> None:
    """Take out, add, swap or change tensors."""
    if not tensors:
        tensors["codes/3"] = np.zeros((1, 40), np.uint8)
        return
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    array = tensors[name]
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["x", "codes/9", "float/x", "statistics/x", f"{name}x"])] = array
    elif kind == 2:
        tensors[name], tensors[other] = tensors[other], array
    elif kind == 3:
        tensors[name] = array.astype(rng.choice(["float64", "int8", "int64", "float16", "bool"]))
    elif kind == 4:
        tensors[name] = array.reshape(-1) if array.ndim > 1 else array[None]
    elif kind == 5:
        tensors[name] = array[..., :-1] if array.ndim else array
    elif kind == 6 and array.size and array.dtype == np.float32:
        tensors[name] = array.copy()
        value = rng.choice([np.nan, np.inf, -1.0, 1e38])
        tensors[name].reshape(-1)[rng.randrange(array.size)] = value
    else:
        tensors[name] = np.concatenate([array, array]) if array.ndim else array


@pytest.mark.parametrize("sealed", [False, True])
def test_any_file_of_wrong_tensors(folder, state, sealed):
    rng = random.Random(4)
    originals, honest = contents(folder), read_manifest(folder)
    for _ in range(250):
        name = rng.choice([*FILES, *["w2.safetensors"] * 5])
        tensors = load_file(folder / name)
        spoil(tensors, rng)
        save_file({k: np.asarray(v, order="C") for k, v in tensors.items()}, folder / name)
        update_entry(folder, name)
        if not sealed:
            loads_right_or_raises(folder, state, rng.choice([None, 8]))
        else:
            reseal(folder, read_manifest(folder))
            try:
                found = load_layered(folder)
            except LayeredModelError as error:
                check_message(error)
            else:
                assert found.state_dict.keys() >= {"0.weight", "3.weight", "7.weight"}
        (folder / name).write_bytes(originals[name])
        write_manifest(folder, honest)


def test_safetensors_that_numpy_does_not_know(folder):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    for spoiled in (data, b"", bytes(7), bytes(8), b"\xff" * 100, b"\xff" * 7 + b"\x7f" + data):
        (folder / "w2.safetensors").write_bytes(spoiled)
        update_entry(folder, "w2.safetensors")
        with pytest.raises(LayeredModelError, match=r"w2\.safetensors"):
            load_layered(folder)
